"""The no-regret gate: a region that is slower as integers in ONNX Runtime is left in float.

Kernels differ in speed by machine and version in ways no table foresees, so the gate measures. Layers of one kind are
judged together: first everything in integers, then kind by kind in float, keeping what is faster; at last the winner
against the float model itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.operands import weight_array, weight_of
from bitwright.compiler.ort.session import SessionConfig, open_session
from bitwright.compiler.ort.timing import ROUND_S, time_paired, time_reopened
from bitwright.compiler.plan.selection import Selection
from bitwright.compiler.plan.units import Unit

# A change must win by more than the noise of a paired measurement to be believed.
WORTHWHILE = 0.98
MAX_KINDS = 8


@dataclass(frozen=True)
class Trial:
    """One measurement of the gate.

    Attributes:
        subject: What was tried, in words.
        ratio: Its time over the time of what it was compared with.
        adopted: Whether it was kept.
    """

    subject: str
    ratio: float
    adopted: bool


@dataclass(frozen=True)
class GateResult:
    """The gate's verdict.

    Attributes:
        keep_float: Anchors to leave in float.
        all_float: No integer form was faster than float.
        ratio: Time of the chosen model over the float model (1.0 when all_float).
        trials: Everything measured, in order.
    """

    keep_float: frozenset[str]
    all_float: bool
    ratio: float
    trials: tuple[Trial, ...]


def kinds(selection: Selection) -> dict[str, frozenset[str]]:
    """Group the integer anchors by what decides their speed; merges to coarser kinds when there are too many."""
    anchors = [u for u in selection.integer if u.role == "anchor"]
    for key in (_fine_kind, _coarse_kind):
        groups: dict[str, set[str]] = defaultdict(set)
        for unit in anchors:
            groups[key(unit)].add(unit.name)
        if len(groups) <= MAX_KINDS:
            break
    return {k: frozenset(v) for k, v in sorted(groups.items(), key=lambda item: -len(item[1]))}


def _form(unit: Unit) -> str:
    weight = weight_of(unit.head)
    assert weight is not None
    shape = weight_array(weight).shape
    if unit.head.op_type != "Conv":
        return unit.head.op_type
    if unit.head.attributes.get_int("group", 1) > 1:
        return "depthwise Conv" if shape[1] == 1 else "grouped Conv"
    return "1x1 Conv" if shape[2:] == (1, 1) else "Conv"


def _fine_kind(unit: Unit) -> str:
    weight = weight_of(unit.head)
    assert weight is not None
    return f"{_form(unit)} {'x'.join(map(str, weight_array(weight).shape))}"


def _coarse_kind(unit: Unit) -> str:
    return _form(unit)


def no_regret(
    float_model: ir.Model,
    build: Callable[[frozenset[str]], ir.Model],
    groups: Mapping[str, frozenset[str]],
    feeds: Sequence[Mapping[str, np.ndarray]],
    config: SessionConfig,
    *,
    rounds: int = 11,
    progress: Callable[[str], None] = lambda _: None,
) -> GateResult:
    """Find the placement that ONNX Runtime executes fastest, never slower than float.

    Args:
        float_model: The normalized float model.
        build: Makes the Q/DQ model with the named anchors left in float.
        groups: Kind -> anchors, from :func:`kinds`.
        feeds: Samples to time on.
        config: Session options of the deployment.
        rounds: Pairs of rounds of each measurement.
        progress: Told what is measured.
    """
    if not groups:
        return GateResult(frozenset(), True, 1.0, ())
    keep: frozenset[str] = frozenset()
    current = open_session(build(keep), config)
    trials: list[Trial] = []
    for kind, names in groups.items() if len(groups) > 1 else ():
        progress(f"{kind} in float")
        candidate = open_session(build(keep | names), config)
        ratio = time_paired(candidate, current, feeds, rounds=rounds).ratio
        adopted = ratio < WORTHWHILE
        trials.append(Trial(f"{kind} ({len(names)} layers) in float instead of int8", ratio, adopted))
        if adopted:
            keep, current = keep | names, candidate
    progress("int8 against float")
    everything = keep >= frozenset().union(*groups.values())
    ratio = 1.0
    if not everything:
        chosen = build(keep)
        plain = SessionConfig(threads=config.threads)
        ratio = time_reopened(
            lambda: open_session(chosen, config),
            lambda: open_session(float_model, plain),
            feeds,
            round_s=ROUND_S,
        ).ratio
    worth = not everything and ratio < WORTHWHILE
    trials.append(Trial("the chosen integer model instead of float", ratio, worth))
    return GateResult(keep, not worth, ratio if worth else 1.0, tuple(trials))
