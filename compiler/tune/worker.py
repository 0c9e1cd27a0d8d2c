"""The child process of ``compiler.tune.child``: compiles and executes candidates, and may die of it.

Requests come on stdin, one JSON object a line; answers go to what was stdout, one JSON object a line:
``ready``, then for each request ``candidates``, or any number of ``running`` and one ``measured``, or ``error``.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import onnx_ir as ir

from bitwright.compiler.errors import BitwrightError, ToolchainError, to_record
from bitwright.compiler.program.extract import extract_program
from bitwright.compiler.program.ops import Program, Step
from bitwright.compiler.program.workload import tunable, workload_key
from bitwright.compiler.tune.child import FARM_FILE, MODELS, PROFILE_FILE
from bitwright.compiler.tune.external import ExternalMeasurer
from bitwright.compiler.tune.hardware import cannot_time
from bitwright.compiler.tune.kernels import Bench
from bitwright.compiler.tune.native import NativeMeasurer
from bitwright.compiler.tune.timing import Measurer, Timing
from bitwright.targets.backend import Backend, KernelChoice, TunableBackend, backend_for
from bitwright.targets.schema import Profile


@dataclass(frozen=True)
class Session:
    """What the worker works with."""

    steps: Mapping[str, tuple[Step, Program]]
    profile: Profile
    backend: Backend
    measurer: Measurer
    answers: TextIO

    def answer(self, event: str, **values: Any) -> None:
        """Send one line to the parent."""
        self.answers.write(json.dumps({"event": event, **values}) + "\n")
        self.answers.flush()

    def serve(self, request: Mapping[str, Any]) -> None:
        """Answer one request."""
        step, program = self.steps[request["workload"]]
        if request["do"] == "candidates":
            found = self.backend.candidates(step, program, self.profile)
            self.answer("candidates", choices=[c.as_plain() for c in found])
            return
        bench = Bench(step, program, self.profile, self.backend)
        choices = [KernelChoice.from_plain(c) for c in request["choices"]]
        timings = self.measure(bench, choices, int(request["rounds"]))
        self.answer("measured", timings=[_plain(t) for t in timings])

    def measure(self, bench: Bench, choices: Sequence[KernelChoice], rounds: int) -> list[Timing]:
        """Return the timing of every choice; the first is the default kernel."""
        self.answer("running", choice=choices[0].as_plain())
        batch = bench.build(choices)
        failed = [Timing(choice, "failed", detail=why) for choice, why in batch.failed.items()]
        if not batch.candidates or batch.candidates[0].choice != choices[0]:
            what = f"the default kernel of '{bench.step.name}' cannot be built: {batch.failed[choices[0]]}"
            raise ToolchainError(what, where="tuning")

        def announce(choice: KernelChoice) -> None:
            self.answer("running", choice=choice.as_plain())

        return [*self.measurer.measure(bench, batch, rounds=rounds, announce=announce), *failed]


def _plain(timing: Timing) -> dict[str, Any]:
    """Return a timing as JSON values; an infinite time becomes None."""
    times = {
        name: value if math.isfinite(value) else None
        for name, value in (("seconds", timing.seconds), ("default_s", timing.default_s))
    }
    return {
        "choice": timing.choice.as_plain(),
        "status": timing.status,
        "detail": timing.detail,
        **times,
    }


def open_measurer(folder: Path, profile: Profile, backend: Backend) -> Measurer:
    """Return what times the kernels of a profile: a farm if one was named, this machine, or a model.

    Raises:
        ToolchainError: Nothing can, or the farm cannot be reached.
    """
    farm = folder / FARM_FILE
    if farm.exists():
        from bitwright.compiler.tune.remote import open_farm

        found = json.loads(farm.read_text())
        return open_farm(str(found["tracker"]), str(found["device_key"]))
    if isinstance(backend, TunableBackend):
        timer = backend.kernel_timer(profile)
        if timer is not None:
            return ExternalMeasurer([timer])
        if backend.executes_natively(profile):
            backend.prepare_process(profile)
            return NativeMeasurer(backend.hardware())
    what = f"this machine cannot time kernels for '{profile.name}': {cannot_time(profile, backend)}"
    raise ToolchainError(what, where="tuning", fix="name boards with --tracker HOST:PORT --device-key KEY")


def _steps(folder: Path) -> dict[str, tuple[Step, Program]]:
    """Return a step, and its program, for every workload of the models in the folder."""
    found: dict[str, tuple[Step, Program]] = {}
    for path in sorted(folder.glob(MODELS)):
        # The parent wrote this file from a model that ingest has vouched for.
        program = extract_program(ir.load(path))
        for step in filter(tunable, program.steps):
            found.setdefault(workload_key(step, program), (step, program))
    return found


@contextmanager
def _answers() -> Iterator[TextIO]:
    """Keep the pipe to the parent to ourselves: what TVM and LLVM print goes to stderr."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as pipe:
        os.dup2(2, 1)
        yield pipe


def main(folder: Path) -> int:
    """Serve requests until stdin ends. Returns the exit status."""
    with _answers() as pipe:
        try:
            profile = Profile.model_validate_json((folder / PROFILE_FILE).read_text())
            backend = backend_for(profile.family)
            measurer = open_measurer(folder, profile, backend)
            session = Session(_steps(folder), profile, backend, measurer, pipe)
            session.answer("ready", hardware=measurer.hardware, executed=measurer.executed)
            for line in sys.stdin:
                session.serve(json.loads(line))
        except BitwrightError as error:
            pipe.write(json.dumps({"event": "error", **to_record(error)}) + "\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
