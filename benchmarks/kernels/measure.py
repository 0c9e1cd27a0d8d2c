"""One model, all its forms in turns; the result is kept as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.compiler.bench.entry import Entry
from bitwright.compiler.bench.quiet import surroundings
from bitwright.compiler.bench.turns import take_turns
from bitwright.compiler.bundle.bundle import Bundle
from bitwright.compiler.bundle.manifest import package_versions
from bitwright.compiler.errors import BitwrightError
from kernels.forms import RIVALS, TUNED, Forms, failure, has_amx
from kernels.models import BenchModel
from kernels.table import TILED, WITHOUT_AMX


@dataclass(frozen=True)
class Effort:
    """How long to measure: turns of each process, and how often all processes are started anew."""

    rounds: int
    sessions: int


def result_file(out: Path, model: str, threads: int) -> Path:
    """Return where the result of a model is kept."""
    return out / "results" / f"{model}-{threads}.json"


def measure_model(
    model: BenchModel,
    out: Path,
    *,
    targets: Sequence[str],
    threads: Sequence[int],
    effort: Effort,
    again: bool,
    tune: str,
) -> None:
    """Build what is missing and measure what is not measured yet."""
    wanted = [n for n in threads if again or not _holds(result_file(out, model.name, n), targets)]
    if not wanted:
        return
    forms, failures = Forms(model, out / "models" / model.name), []
    bundles: dict[str, Bundle] = {}
    for target in targets:
        try:
            bundles[target] = forms.bundle(target, tune=tune)
        except BitwrightError as error:
            failures.append(failure(out, f"{model.name}: compile for {target}", error))
    if not bundles:
        return
    first = next(iter(bundles.values()))
    for number in wanted:
        entries = [forms.artifact_entry(t, b, number) for t, b in bundles.items()]
        names = [*RIVALS, *(n + WITHOUT_AMX for n in RIVALS if has_amx() and _untiled(targets))]
        entries += _rivals(forms, first, names, number, out, failures)
        record = _measured(entries, number, effort)
        record |= {"model": model.name, "what": model.what, "failures": failures}
        path = result_file(out, model.name, number)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(record, indent=1))


def _holds(path: Path, targets: Sequence[str]) -> bool:
    """Tell whether a result has all targets."""
    return path.exists() and set(targets) <= set(json.loads(path.read_text())["contestants"])


def _untiled(targets: Sequence[str]) -> bool:
    return any(t.removesuffix(TUNED) not in TILED for t in targets)


def _rivals(
    forms: Forms,
    bundle: Bundle,
    names: Sequence[str],
    threads: int,
    out: Path,
    failures: list[dict[str, str]],
) -> list[Entry]:
    """Return every form that ONNX Runtime runs; one that cannot be made is noted."""
    found = []
    for name in names:
        try:
            found.append(forms.rival_entry(name, bundle, threads))
        except Exception as error:  # whatever onnxruntime's quantizer raises: it is one rival less, and noted
            failures.append(failure(out, f"{forms.model.name}: {name}", error))
    return found


def _measured(entries: Sequence[Entry], threads: int, effort: Effort) -> dict[str, Any]:
    turns = take_turns(entries, rounds=effort.rounds, sessions=effort.sessions)
    contestants = {
        entry.label: {
            "kind": entry.kind,
            "median_s": float(np.median(turns.medians[k])),
            "best_s": float(turns.best[k].min()),
            "medians": turns.medians[k].tolist(),
        }
        for k, entry in enumerate(entries)
    }
    return {
        "threads": threads,
        "clock": turns.clock,
        "contestants": contestants,
        "surroundings": asdict(surroundings(turns.preempted)),
        "date": datetime.now(tz=UTC).isoformat(timespec="seconds"),
        "versions": package_versions(),
    }
