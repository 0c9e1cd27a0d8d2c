"""One placement, measured in ONNX Runtime: an observation for every operator and every conversion in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import onnx_ir as ir

from bitwright.compiler.errors import ModelError
from bitwright.compiler.graph.cost import Shapes, node_macs
from bitwright.compiler.ort.attribution import Owner, attribute
from bitwright.compiler.ort.profiling import CallProfile, median_profile, profile_call
from bitwright.compiler.ort.session import SessionConfig, config_for
from bitwright.compiler.plan.cost import bytes_each, traffic
from bitwright.compiler.plan.latency import Chain, Crossing, chains, crossings, formats_before
from bitwright.compiler.plan.observations import Observation
from bitwright.compiler.plan.selection import Selection
from bitwright.compiler.plan.signature import boundary_signature, fit_names, signature
from bitwright.targets.schema import Profile


@dataclass(frozen=True)
class Placed:
    """A placement and the model that carries it out.

    Attributes:
        label: What it is, in words.
        selection: Which units run in which format.
        model: The Q/DQ model.
        shapes: Static shape of every tensor of the normalized model.
        feeds: Inputs of one call.
        weight: How much its calls count against equal ones in other placements.
    """

    label: str
    selection: Selection
    model: ir.Model
    shapes: Shapes
    feeds: Mapping[str, np.ndarray]
    weight: float = 1.0


@dataclass(frozen=True)
class Observed:
    """What measuring a placement gave.

    Attributes:
        observations: Of every operator and conversion with known shapes.
        call_s: Seconds of a call that belong to none of them.
        seconds: Of the whole call.
    """

    observations: tuple[Observation, ...]
    call_s: float
    seconds: float


def measure(placed: Placed, profile: Profile, *, threads: int, seconds: float) -> CallProfile:
    """Run a placement in fresh sessions of ONNX Runtime.

    Args:
        placed: What to run.
        profile: The target; this machine must be it.
        threads: Threads that compute.
        seconds: About how long to measure.

    Raises:
        ModelError: ONNX Runtime cannot load the model.
    """
    return profile_call(placed.model, _config(placed, profile, threads), placed.feeds, seconds=seconds)


def _config(placed: Placed, profile: Profile, threads: int) -> SessionConfig:
    """Return the deployment's session options; those that protect integers would only hinder a float model."""
    if placed.selection.integer:
        return config_for(profile.runtimes.onnxruntime, threads=threads)
    return SessionConfig(threads=threads)


def observe(placed: Placed, calls: Sequence[CallProfile], profile: Profile) -> Observed:
    """Share out what :func:`measure` found, in one or several rounds, to operators and conversions."""
    call = median_profile(calls)
    table = profile.runtimes.onnxruntime
    shares = attribute(call, placed.model, placed.selection, table, placed.shapes)
    found: list[Observation] = []
    rest = shares.rest_s
    everything = chains(placed.selection, table)
    operators = {c.unit.name: c for c in everything}
    before = dict(zip(operators, formats_before(everything), strict=True))
    conversions = {(c.operator, c.value.name or ""): c for c in crossings(placed.selection)}
    for owner, taken in shares.seconds.items():
        try:
            one = _observation(owner, taken, operators, conversions, placed.shapes, profile)
            moved = 0.0 if owner.is_conversion else shares.layout[owner]
            neighbour = "" if owner.is_conversion else before[owner.name]
            found.append(replace(one, layout_s=moved, weight=placed.weight, neighbour=neighbour))
        except ModelError:
            rest += taken
    return Observed(tuple(found), call.call_s + rest, call.seconds)


def _observation(
    owner: Owner,
    taken: float,
    operators: Mapping[str, Chain],
    conversions: Mapping[tuple[str, str], Crossing],
    shapes: Shapes,
    profile: Profile,
) -> Observation:
    if owner.is_conversion:
        return conversion(conversions[owner.kind, owner.name], taken, shapes)
    return operator(operators[owner.name], taken, shapes, profile)


def operator(chain: Chain, taken: float, shapes: Shapes, profile: Profile) -> Observation:
    """Return the observation of an operator and what is fused behind it.

    Raises:
        ModelError: A shape is unknown.
    """
    head, combo = chain.unit.head, chain.unit.combo if chain.writes else None
    moved = traffic(head, shapes, bytes_each(chain.format, combo, profile), float_output=chain.writes == "f")
    key = signature(head, shapes, chain.tail, writes=chain.writes)
    macs = node_macs(head, shapes)
    return Observation(head.op_type, chain.format, key, fit_names(head, shapes), macs, moved, taken)


def conversion(crossing: Crossing, taken: float, shapes: Shapes) -> Observation:
    """Return the observation of a tensor's conversion between float and integers.

    Raises:
        ModelError: Its shape is unknown.
    """
    name = crossing.value.name or ""
    if name not in shapes:
        what = f"the shape of '{name}' is unknown"
        raise ModelError(what)
    shape = shapes[name]
    key, moved = boundary_signature(shape), 5 * prod(shape)
    return Observation(crossing.operator, crossing.format, key, (crossing.operator,), 0, moved, taken)
