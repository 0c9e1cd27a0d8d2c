"""Runs every competitor on every model, each in processes of its own, and keeps the results."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quantization.competitors import Competitor
from quantization.isolate import Usage, run_isolated
from quantization.job import Job
from quantization.results import append_result, read_results

BENCHMARKS = Path(__file__).resolve().parents[1]
MEASURE_LIMIT_S = 1800.0
MEMORY_LIMIT_BYTES = 8e9
# Every tool has one thread: wall times are then comparable on a machine that others use, too.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Runner:
    """Where and with what the processes run.

    Attributes:
        interpreters: Python of each environment.
        keep: Folder for quantized models and logs, or None to delete them.
    """

    interpreters: Mapping[str, str]
    keep: Path | None = None

    def _python(self, environment: str, arguments: list[str], log: Path, limit_s: float) -> Usage:
        python = self.interpreters[environment]
        return run_isolated(
            [python, "-m", *arguments],
            environment={"PYTHONPATH": str(BENCHMARKS), "PYTHONWARNINGS": "ignore", **ONE_THREAD},
            log=log,
            time_limit_s=limit_s,
            memory_limit_bytes=MEMORY_LIMIT_BYTES,
        )

    def quantize(self, competitor: Competitor, model: str, folder: Path) -> dict[str, Any]:
        """Quantize in a process of its own; the model is ``folder/model.onnx`` if there is no ``error``."""
        job = Job(model, competitor.function, str(folder / "model.onnx"), competitor.settings)
        request, outcome = folder / "job.json", folder / "outcome.json"
        request.write_text(job.to_json())
        usage = self._python(
            competitor.environment,
            ["quantization.child", str(request), str(outcome)],
            folder / "quantize.log",
            competitor.time_limit_s,
        )
        row: dict[str, Any] = {"wall_s": usage.wall_s, "cpu_s": usage.cpu_s, "peak_bytes": usage.peak_bytes}
        if usage.ended_for == "time":
            return row | {"error": f"no result within {competitor.time_limit_s:.0f} s"}
        if usage.ended_for == "memory":
            return row | {"error": f"ended when it held {MEMORY_LIMIT_BYTES / 1e9:.0f} GB of memory"}
        if not outcome.exists():
            return row | {"error": f"the process ended with code {usage.exit_code}"}
        return row | json.loads(outcome.read_text())

    def measure(self, model: str, file: Path | Literal["fp32"], folder: Path) -> dict[str, Any]:
        """Measure a model in a process of its own."""
        result = folder / "measured.json"
        usage = self._python(
            "own",
            ["quantization.measure", model, str(file), str(result)],
            folder / "measure.log",
            MEASURE_LIMIT_S,
        )
        if not result.exists():
            reason = f"its {usage.ended_for} limit" if usage.ended_for else f"code {usage.exit_code}"
            return {"error": f"the measuring process ended at {reason}"}
        found: dict[str, Any] = json.loads(result.read_text())
        return found

    def row(self, competitor: Competitor, model: str) -> dict[str, Any]:
        """Quantize, measure, and return everything known."""
        if competitor.environment not in self.interpreters:
            return {"error": f"no interpreter with {competitor.environment} was named"}
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            made = self.quantize(competitor, model, folder)
            if "error" not in made:
                made |= self.measure(model, folder / "model.onnx", folder)
            if self.keep is not None:
                shutil.copytree(folder, self.keep / model / competitor.name, dirs_exist_ok=True)
        return made

    def remeasured(self, competitor: Competitor, model: str, row: Mapping[str, Any]) -> dict[str, Any]:
        """Measure a kept model again; what quantizing took stays as it was."""
        assert self.keep is not None
        folder = self.keep / model / competitor.name
        taken = {k: row[k] for k in ("wall_s", "cpu_s", "call_s", "peak_bytes")}
        return taken | self.measure(model, folder / "model.onnx", folder)

    def float_row(self, model: str) -> dict[str, Any]:
        """Measure the float model itself."""
        with tempfile.TemporaryDirectory() as scratch:
            return self.measure(model, "fp32", Path(scratch))


def compare(
    runner: Runner,
    models: Iterable[str],
    competitors: Iterable[Competitor],
    results: Path,
    *,
    again: Literal["", "quantize", "measure"] = "",
) -> None:
    """Fill the results file.

    Args:
        runner: Starts the processes.
        models: Zoo names.
        competitors: Who takes part.
        results: The file; a row that it holds is left as it is unless ``again`` says otherwise.
        again: ``"quantize"`` does everything anew, ``"measure"`` measures the models that ``runner`` kept.
    """
    everyone = list(competitors)
    for model in models:
        known = read_results(results)
        if (model, "fp32") not in known:
            append_result(results, {"model": model, "competitor": "fp32", **runner.float_row(model)})
        for competitor in everyone:
            old = known.get((model, competitor.name))
            if model not in competitor.models or (old is not None and not again):
                continue
            if again == "measure" and old is not None:
                if "error" in old:
                    continue
                row = runner.remeasured(competitor, model, old)
            else:
                row = runner.row(competitor, model)
            append_result(results, {"model": model, "competitor": competitor.name, **row})
            print(model, competitor.name, row.get("error", "ok"), file=sys.stderr, flush=True)
