"""Times of a run as tuning records: later compilations choose the kernels that were fastest on that device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bitwright.compiler.tune.farm import board_name
from bitwright.compiler.tune.hardware import hardware_key
from bitwright.compiler.tune.records import Key, Record
from bitwright.compiler.tune.store import TuningStore
from bitwright.targets.backend import KernelChoice
from bitwright.targets.loader import load_profile


def learn(result: Mapping[str, Any], device_key: str, store: Path) -> int:
    """Append what a run measured to a store; returns the number of workloads.

    Args:
        result: What ``run.py`` wrote.
        device_key: What compilations will call the device: ``--device-key``.
        store: File of tuning records.

    Raises:
        ValueError: The run timed nothing, or the kernels' sources have changed since the folder was built.
    """
    profile = load_profile(result["kit"]["profile"])
    if result["kit"]["made_by"] != hardware_key(profile, ""):
        msg = "the kernels have changed since this folder was built: build it again"
        raise ValueError(msg)
    hardware = hardware_key(profile, board_name(device_key))
    found = [record for trials in _workloads(result).values() for record in _records(trials, hardware)]
    if not found:
        msg = "the run timed no kernel of a model"
        raise ValueError(msg)
    TuningStore(store).append(found)
    return sum(record.kind == "finished" for record in found)


def _workloads(result: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Return the right and timed kernels by workload; two models may share one."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for kernel in result["kernels"]:
        if "workload" in kernel and "best_us" in kernel and kernel.get("exact"):
            found.setdefault(kernel["workload"], []).append(kernel)
    return {key: trials for key, trials in found.items() if any(t["rank"] == 0 for t in trials)}


def _records(trials: list[Mapping[str, Any]], hardware: str) -> Iterator[Record]:
    default = min(t["best_us"] for t in trials if t["rank"] == 0) * 1e-6
    for trial in trials:
        yield _record("trial", trial, hardware, default, 0)
    best = min(trials, key=lambda t: float(t["best_us"]))
    yield _record("finished", best, hardware, default, len(trials))


def _record(kind: Any, trial: Mapping[str, Any], hardware: str, default_s: float, trials: int) -> Record:
    choice = KernelChoice.from_plain(trial["plan"])
    key, seconds = Key(trial["workload"], hardware), trial["best_us"] * 1e-6
    return Record(kind, key, choice, seconds, default_s, rank=trial["rank"], trials=trials)
