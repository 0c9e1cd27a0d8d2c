"""Placements in which only chosen layers leave float: what they would cost and what they compute."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bitwright.compiler import frontend, quantizing
from bitwright.compiler.allocate.problem import FLOAT, Group, LiveSet
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.graph.model import constant_array
from bitwright.compiler.graph.operands import stored_weight, table_of, weight_of
from bitwright.compiler.plan.energy import placement_energy_j
from bitwright.compiler.plan.latency import chains, predict
from bitwright.compiler.plan.memory import buffers, live_at, written_bytes
from bitwright.compiler.plan.model import Plan
from bitwright.compiler.plan.planner import RuntimeName, observed_tensors, runtime_of
from bitwright.compiler.plan.selection import Selection
from bitwright.compiler.plan.units import FormatChoice, Unit
from bitwright.compiler.plan.weights import stored_bytes

# Passed through by integers where both neighbours are integers.
BETWEEN = ("follower", "carrier")


@dataclass(frozen=True)
class Site:
    """A layer with a constant weight that may run in one of several formats."""

    unit: Unit
    formats: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its node."""
        return self.unit.name

    @property
    def weight(self) -> ir.Value | None:
        """The initializer behind its weight."""
        return stored_weight(weight_of(self.unit.head)) or table_of(self.unit.head)


class Variants:
    """Placements in which only chosen sites leave float: what they cost and what they compute."""

    def __init__(self, c: Compilation, runtime: RuntimeName) -> None:
        assert c.selection is not None
        self._c, self._runtime, self.current = c, runtime, c.selection
        table = runtime_of(c.profile, runtime)
        recipe = c.recipe.recipe
        self.sites: list[Site] = []
        for unit in c.selection.units:
            if unit.rule is None or unit.combo is None or unit.role not in ("anchor", "table"):
                continue
            menu: tuple[str, ...] = recipe.tables if unit.role == "table" else recipe.formats
            menu = (c.formats.by_node[unit.name],) if unit.name in c.formats.by_node else menu
            kernels = [f for f in menu if unit.rule.combo_for((f,)) or f in table.float_formats]
            if recipe.choose != "allocate" or FLOAT in recipe.formats or not kernels:
                kernels.append(FLOAT)
            self.sites.append(Site(unit, tuple(dict.fromkeys(kernels))))

    def selection(self, formats: Mapping[str, str]) -> Selection:
        """Select with every site in float but those named."""
        by_node = {site.name: FLOAT for site in self.sites} | dict(formats)
        saved = self._c.formats
        self._c.formats = FormatChoice((FLOAT,), saved.others, (FLOAT,), by_node)
        try:
            return frontend.reselect(self._c, self._runtime, alone=True)
        finally:
            self._c.formats = saved

    def plan(self, formats: Mapping[str, str]) -> Plan:
        """Return the plan of such a placement."""
        selection = self.selection(formats)
        frontend.calibrate(self._c, observed_tensors(selection), [])
        return quantizing.with_searched_scales(self._c, frontend.allocate(self._c, selection, self._runtime))

    def model(self, site: str, fmt: str) -> ir.Model:
        """Return the float model with one site in a format."""
        return quantizing.quantized_model(self._c, self.plan({site: fmt}))

    def seconds(self, formats: Mapping[str, str]) -> float:
        """Return the predicted seconds of such a placement."""
        return predict(self.selection(formats), self._c.profile, self._runtime, self._c.shapes).seconds

    def joules(self, formats: Mapping[str, str]) -> float:
        """Return the estimated joules of such a placement.

        Raises:
            ProfileError: The profile says nothing about energy.
        """
        return placement_energy_j(self.selection(formats), self._c.profile, self._runtime, self._c.shapes)

    def weight_bytes(self, site: Site, fmt: str, *, ideal: bool = False) -> float:
        """Return the bytes of a site's weight in a format.

        Args:
            site: One of the sites.
            fmt: One of its formats.
            ideal: Count the bits of the integers alone: no scales of channels, no wider elements that hold them. In
                groups scales and zero points are a good part of the bits, and count.
        """
        array = constant_array(site.weight)
        assert array is not None
        plan = self.plan({site.name: fmt}) if fmt != FLOAT else None
        quant = None if plan is None else plan.weights.get(plan.nodes[site.name].weight)
        if quant is None:
            return float(array.nbytes)
        whole = not ideal or bool(quant.group)
        return stored_bytes(quant, int(array.size)) if whole else array.size * quant.bits / 8

    def live_sets(self, group_of: Mapping[str, Group]) -> list[LiveSet]:
        """Return what is in memory at every step, by the format of the group that wrote it.

        What stands between two layers and can pass integers on goes by the layer before it.
        """
        profile, table = self._c.profile, runtime_of(self._c.profile, self._runtime)
        found, _ = buffers(self.current, table, self._c.shapes)
        owners = _owners(self.current, self.sites)
        steps = chains(self.current, table)
        sets = []
        for step, alive in zip(steps, live_at(found, len(steps)), strict=True):
            sizes: dict[str, dict[str, float]] = {}
            fixed = 0.0
            for buffer in alive:
                site = owners.get(buffer.unit)
                if site is None:
                    fixed += written_bytes(buffer, FLOAT, None, profile)
                    continue
                by_format = sizes.setdefault(group_of[site.name].name, {})
                for fmt in site.formats:
                    combo = site.unit.rule.combo_for((fmt,)) if site.unit.rule is not None else None
                    by_format[fmt] = by_format.get(fmt, 0.0) + written_bytes(buffer, fmt, combo, profile)
            sets.append(LiveSet(step.unit.name, sizes, fixed))
        return sets


def shared_weights(sites: list[Site], *, copies: bool = False) -> list[list[str]]:
    """Return the sites that share a stored weight, set by set.

    Args:
        sites: All of them.
        copies: A product whose weight is the transposed copy of a table counts as sharing it.
    """
    readers: dict[ir.Value, list[str]] = defaultdict(list)
    same = copies_of_tables(sites) if copies else {}
    for site in sites:
        if site.weight is not None:
            readers[same.get(site.weight, site.weight)].append(site.name)
    return [names for names in readers.values() if len(names) > 1]


def copies_of_tables(sites: list[Site]) -> dict[ir.Value, ir.Value]:
    """Return, by weight, the table that it is a transposed copy of."""
    tables = {s.weight: constant_array(s.weight) for s in sites if s.unit.role == "table" and s.weight}
    found: dict[ir.Value, ir.Value] = {}
    for site in sites:
        array = constant_array(site.weight) if site.unit.role == "anchor" else None
        for value, table in tables.items() if array is not None and site.weight is not None else ():
            assert array is not None and site.weight is not None and table is not None and value is not None
            if site.weight is not value and array.shape == table.T.shape and np.array_equal(array, table.T):
                found[site.weight] = value
    return found


def _owners(selection: Selection, sites: list[Site]) -> dict[str, Site]:
    """Return, by unit, the site whose format a unit's result follows."""
    at = {site.unit.output: site for site in sites}
    owners = {site.name: site for site in sites}
    for unit in selection.units:
        source = at.get(unit.activations[0]) if unit.role in BETWEEN and unit.activations else None
        if source is not None:
            owners[unit.name] = at[unit.output] = source
    return owners


def reads_integers(site: Site, fmt: str) -> bool:
    """Tell whether a site's kernel in a format reads integers that a neighbour may have written."""
    combo = site.unit.rule.combo_for((fmt,)) if site.unit.rule is not None else None
    return combo is not None and combo.format in frontend.READING and site.unit.role == "anchor"


def neighbours(selection: Selection, sites: list[Site]) -> list[tuple[str, str]]:
    """Return pairs of sites between which only operators stand that can pass integers on."""
    names = {site.unit.output: site.name for site in sites}
    between = {u.output: u for u in selection.units if u.role in BETWEEN}
    pairs = []
    for site in sites:
        seen: set[ir.Value] = set()
        waiting = list(site.unit.activations)
        while waiting:
            value = waiting.pop()
            if value in names:
                pairs.append((names[value], site.name))
            elif value in between and value not in seen:
                waiting.extend(between[value].activations)
            seen.add(value)
    return list(dict.fromkeys(pairs))
