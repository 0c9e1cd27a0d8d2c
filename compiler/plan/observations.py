"""From single measurements to the tables of a profile: repeated calls are averaged, the rest is fitted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from bitwright.compiler.plan.measured import Point, fit_work
from bitwright.compiler.plan.signature import beside
from bitwright.targets.schema import MeasuredTimes, WorkFit

DIGITS = 4


@dataclass(frozen=True)
class Observation:
    """One measured operator or conversion.

    Attributes:
        op: Operator type.
        format: Its format.
        key: Its signature.
        work: Kinds of work it counts for, closest first.
        macs: Multiply-accumulates.
        bytes: Bytes read and written at least once.
        seconds: Measured.
        layout_s: The part of it that changes the storage order; the fits leave it out, since another neighbour
            would need another change.
        weight: How much it counts among equal calls.
        neighbour: Format of the layer before it.
    """

    op: str
    format: str
    key: str
    work: tuple[str, ...]
    macs: float
    bytes: float
    seconds: float
    layout_s: float = 0.0
    weight: float = 1.0
    neighbour: str = ""


def tables(
    found: Iterable[Observation],
    *,
    machine: str,
    versions: Mapping[str, str],
    date: str,
    threads: int,
    call_s: float,
    exact: bool = True,
) -> MeasuredTimes:
    """Return the measured section of one runtime.

    Equal calls are averaged, not their median taken: what is fused into a neighbour counts nothing in one place and all
    of it in another, and only the mean keeps the sum.

    Args:
        found: What was measured.
        machine: What it was measured on.
        versions: Package -> version.
        date: ISO date.
        threads: Threads that computed.
        call_s: Seconds of an empty call.
        exact: Write down every call; without, only the models fitted to them.
    """
    observations = list(found)
    return MeasuredTimes(
        machine=machine,
        versions=dict(versions),
        date=date,
        threads=threads,
        call_s=_rounded(call_s),
        times=_times(observations) if exact else {},  # type: ignore[arg-type]
        fits=_fits(observations),  # type: ignore[arg-type]
    )


def _times(found: list[Observation]) -> dict[str, dict[str, dict[str, float]]]:
    groups: dict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
    for o in found:
        for key in {o.key, beside(o.key, o.neighbour)}:
            groups[o.op, o.format, key].append((o.seconds, o.weight))
    result: dict[str, dict[str, dict[str, float]]] = {}
    for (op, fmt, key), calls in sorted(groups.items()):
        seconds, weights = zip(*calls, strict=True)
        mean = float(np.average(seconds, weights=weights))
        result.setdefault(op, {}).setdefault(fmt, {})[key] = _rounded(mean)
    return result


def _fits(found: list[Observation]) -> dict[str, dict[str, WorkFit]]:
    groups: dict[tuple[str, str], list[Point]] = defaultdict(list)
    for o in found:
        for name in o.work:
            groups[name, o.format].append(Point(o.macs, o.bytes, o.seconds - o.layout_s))
    result: dict[str, dict[str, WorkFit]] = {}
    for (name, fmt), points in sorted(groups.items()):
        fit = fit_work(points)
        if fit is not None:
            result.setdefault(name, {})[fmt] = _short(fit)
    return result


def _short(fit: WorkFit) -> WorkFit:
    return WorkFit(
        call_s=_rounded(fit.call_s),
        mac_s=_rounded(fit.mac_s),
        byte_s=_rounded(fit.byte_s),
        points=fit.points,
        error=_rounded(fit.error),
    )


def _rounded(value: float) -> float:
    """Four digits: measurements hold no more."""
    return float(f"{value:.{DIGITS - 1}e}")
