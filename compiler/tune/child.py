"""The parent's end of ``compiler.tune.worker``: asks, and survives whatever a candidate does to the child."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import onnx_ir as ir

from bitwright.compiler.child import CHILD
from bitwright.compiler.errors import BitwrightError, ToolchainError, from_record
from bitwright.compiler.graph.saving import save_model
from bitwright.compiler.tune.farm import Farm
from bitwright.compiler.tune.timing import Timing
from bitwright.targets.backend import KernelChoice
from bitwright.targets.schema import Profile
from bitwright.targets.toolchain.process import LineReader

WORKER = (*CHILD, "bitwright.compiler.tune.worker")
MODELS, PROFILE_FILE, FARM_FILE, LOG_FILE = "model_*.onnx", "profile.json", "farm.json", "log.txt"
START_S = 300.0
# Building a batch and executing it; whoever takes longer is stopped, and costs what was in flight.
ANSWER_S = 180.0


class WorkerDiedError(Exception):
    """The child is gone.

    Attributes:
        running: What it was executing, or None.
        how: What became of it.
    """

    def __init__(self, running: KernelChoice | None, how: str) -> None:
        super().__init__(how)
        self.running, self.how = running, how


class TuningChild:
    """A worker process that lives until it is closed or dies; then the next request starts another.

    Args:
        models: Static Q/DQ models, one for each function of the library.
        profile: Target.
        farm: Boards to measure on; None: this machine, or the target's model of cycles.
        worker: Arguments of the Python interpreter; the folder is appended.
    """

    def __init__(
        self,
        models: Iterable[ir.Model],
        profile: Profile,
        farm: Farm | None = None,
        *,
        worker: Sequence[str] = WORKER,
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="bitwright-tune-"))
        self._worker = tuple(worker)
        for number, model in enumerate(models):
            save_model(model, self._folder / MODELS.replace("*", str(number)))
        (self._folder / PROFILE_FILE).write_text(json.dumps(profile.dump()))
        if farm is not None:
            (self._folder / FARM_FILE).write_text(json.dumps(asdict(farm)))
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: LineReader | None = None
        self.executed = ""

    def __enter__(self) -> TuningChild:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the child and remove its folder."""
        self._stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def candidates(self, workload: str) -> tuple[KernelChoice, ...]:
        """Return the ways to compute a workload, the default first.

        Raises:
            BitwrightError: The child reports one, or dies.
        """
        try:
            answer = self._ask({"do": "candidates", "workload": workload})
        except WorkerDiedError as error:
            raise self._died(error) from error
        return tuple(KernelChoice.from_plain(c) for c in answer["choices"])

    def measure(self, workload: str, choices: Sequence[KernelChoice], rounds: int) -> list[Timing]:
        """Return the timing of every choice; the first is the default kernel.

        A candidate that ends the process is reported as crashed, and the others are measured without it.

        Raises:
            BitwrightError: The child reports one, or the default kernel itself crashes.
        """
        crashed: list[Timing] = []
        left = list(choices)
        while True:
            plain = [c.as_plain() for c in left]
            request = {"do": "measure", "workload": workload, "choices": plain}
            try:
                answer = self._ask({**request, "rounds": rounds})
            except WorkerDiedError as error:
                if error.running is None or error.running not in left[1:]:
                    raise self._died(error) from error
                left.remove(error.running)
                crashed.append(Timing(error.running, "crashed", detail=error.how))
                continue
            return [*map(_timing, answer["timings"]), *crashed]

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        process = self._process or self._start()
        running: KernelChoice | None = None
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            while True:
                answer = self._read(ANSWER_S)
                if answer["event"] != "running":
                    return answer
                running = KernelChoice.from_plain(answer["choice"])
        except (EOFError, OSError, TimeoutError) as error:
            how = self._stop()
            raise WorkerDiedError(running, f"timed out: {error}" if str(error) else how) from error

    def _start(self) -> subprocess.Popen[bytes]:
        # One thread; a session of its own, so that the terminal's Ctrl-C reaches only the parent.
        environment = {**os.environ, "TVM_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        with (self._folder / LOG_FILE).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *self._worker, str(self._folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        assert process.stdout is not None
        self._process, self._answers = process, LineReader(process.stdout)
        try:
            ready = self._read(START_S)
        except (EOFError, TimeoutError) as error:
            raise self._died(WorkerDiedError(None, self._stop())) from error
        self.executed = str(ready["executed"])
        return process

    def _read(self, limit_s: float) -> dict[str, Any]:
        """Return the next answer; an error of the child is raised here."""
        assert self._answers is not None
        answer: dict[str, Any] = json.loads(self._answers.line(limit_s))
        if answer["event"] == "error":
            self._stop()
            raise from_record(answer)
        return answer

    def _stop(self) -> str:
        """End the child; returns how it ended."""
        process, self._process = self._process, None
        if process is None:
            return "it was not running"
        if process.stdin is not None:
            process.stdin.close()
        try:
            code = process.wait(0.5)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        if process.stdout is not None:
            process.stdout.close()
        return f"signal {-code}" if code < 0 else f"exit status {code}"

    def _died(self, error: WorkerDiedError) -> BitwrightError:
        log = self._folder / LOG_FILE
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        last = f"; last output: {lines[-1]}" if lines else ""
        what = f"the process that measures kernels died ({error.how}){last}"
        return ToolchainError(what, where="tuning", fix="leave --tune out; what was measured is kept")


def _timing(data: Mapping[str, Any]) -> Timing:
    def number(value: Any) -> float:
        return math.inf if value is None else float(value)

    choice = KernelChoice.from_plain(data["choice"])
    return Timing(choice, data["status"], number(data["seconds"]), number(data["default_s"]), data["detail"])
