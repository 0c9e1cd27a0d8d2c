"""Estimated energy of a call, from the profile's picojoules; a target without them has no estimate."""

from __future__ import annotations

import onnx_ir as ir

from bitwright.compiler.errors import ModelError, ProfileError
from bitwright.compiler.graph.cost import Shapes, node_macs
from bitwright.compiler.graph.model import node_label
from bitwright.compiler.plan.cost import (
    RuntimeName,
    call_traffic,
    estimate,
    fastest_row,
    holding_level,
)
from bitwright.compiler.plan.latency import chains, predict
from bitwright.compiler.plan.selection import Selection
from bitwright.targets.schema import Energy, Profile

_PICO = 1e-12


def energy_j(
    node: ir.Node,
    shapes: Shapes,
    profile: Profile,
    runtime: RuntimeName,
    fmt: str,
    *,
    float_output: bool = False,
) -> float:
    """Return the estimated joules of one call of a node.

    Multiply-accumulates at the price of the compute row that runs them, bytes at the price of the memory level that
    holds them, and the power that is drawn in any case for as long as the call takes.

    Args:
        node: Any node whose inputs and outputs have known shapes.
        shapes: Static shapes of tensors whose dimensions are symbolic in the model.
        profile: The target.
        runtime: Which table of integer kernels applies.
        fmt: ``"float"``, or a format that the profile has a kernel for.
        float_output: For integers: the result is written as float32.

    Raises:
        ProfileError: The profile has no energy section, or no price for what the call uses.
        ModelError: A shape is unknown.
    """
    seconds = estimate(node, shapes, profile, runtime, fmt, float_output=float_output)
    dynamic = _dynamic_j(node, shapes, profile, runtime, fmt, float_output=float_output)
    return dynamic + _section(profile).static_w * seconds


def placement_energy_j(selection: Selection, profile: Profile, runtime: RuntimeName, shapes: Shapes) -> float:
    """Return the estimated joules of one call of a whole placement; operators of unknown shape count nothing.

    Raises:
        ProfileError: The profile has no energy section, or no price for what the placement uses.
    """
    total = _section(profile).static_w * predict(selection, profile, runtime, shapes).seconds
    table = profile.runtimes.artifact if runtime == "artifact" else profile.runtimes.onnxruntime
    for chain in chains(selection, table):
        try:
            total += _dynamic_j(
                chain.unit.head, shapes, profile, runtime, chain.format, float_output=chain.writes == "f"
            )
        except ModelError:
            continue
    return total


def _section(profile: Profile) -> Energy:
    if profile.energy is None:
        what = "the profile says nothing about energy"
        fix = "add 'energy' with its provenance, or ask for no energy budget"
        raise ProfileError(what, where=profile.name, fix=fix)
    return profile.energy


def _dynamic_j(
    node: ir.Node, shapes: Shapes, profile: Profile, runtime: RuntimeName, fmt: str, *, float_output: bool
) -> float:
    energy = _section(profile)
    moved = call_traffic(node, shapes, profile, runtime, fmt, float_output=float_output)
    picojoules = moved * _price(
        energy.pj_per_byte, holding_level(moved, profile).name, "pj_per_byte", profile, node
    )
    row = fastest_row(node, shapes, profile, runtime, fmt)
    if row is not None:
        each = _price(energy.pj_per_mac, row.name, "pj_per_mac", profile, node)
        picojoules += node_macs(node, shapes) * each
    return picojoules * _PICO


def _price(prices: dict[str, float], name: str, key: str, profile: Profile, node: ir.Node) -> float:
    if name not in prices:
        what = f"'energy.{key}' has no price for '{name}', which node '{node_label(node)}' uses"
        raise ProfileError(what, where=profile.name, fix=f"add '{name}' to energy.{key}")
    return prices[name]
