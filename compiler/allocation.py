"""Phase allocate: a format for every group of layers, an exact optimum over measured losses and the target's cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import networkx as nx
import onnx_ir as ir

from bitwright.compiler import frontend, quantizing
from bitwright.compiler.allocate.problem import (
    Boundary,
    BoundaryCost,
    Budget,
    Choice,
    Group,
    Metric,
    Problem,
    Totals,
    totals,
)
from bitwright.compiler.allocate.sensitivity import Sensitivity, measure_sensitivity
from bitwright.compiler.allocate.solve import Allocation, allocate
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.graph.model import constant_array
from bitwright.compiler.graph.operands import stored_weight, table_of, weight_of
from bitwright.compiler.migration import observe_inputs
from bitwright.compiler.ort.session import SessionConfig
from bitwright.compiler.plan.latency import predict
from bitwright.compiler.plan.model import Plan
from bitwright.compiler.plan.planner import RuntimeName, observed_tensors, runtime_of
from bitwright.compiler.plan.selection import Selection
from bitwright.compiler.plan.units import FormatChoice, Unit
from bitwright.compiler.plan.weights import stored_bytes

FLOAT = "float"
OBJECTIVES: Mapping[str, Metric] = {
    "loss": "loss",
    "latency": "latency_s",
    "size": "weight_bytes",
    "ram": "peak_ram_bytes",
    "energy": "energy_j",
}
# Passed through by integers where both neighbours are integers.
BETWEEN = ("follower", "carrier")
SAMPLES = 16


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


def wanted(c: Compilation) -> bool:
    """Tell whether there is anything to choose: the recipe says so, or a budget has to be met."""
    return c.recipe.recipe.choose == "allocate" or bool(c.options.budget)


def choose_formats(c: Compilation, runtime: RuntimeName, notes: list[str]) -> None:
    """Choose a format for every group of layers; afterwards the formats are fixed, node by node."""
    variants = Variants(c, runtime)
    problem = allocation_problem(c, variants, notes)
    budget, objective = goal(c, problem, notes)
    c.allocation = allocate(problem, budget, objective=objective)
    apply_formats(c, runtime, problem, c.allocation.formats)
    notes.extend(summary(c.allocation))


def goal(c: Compilation, problem: Problem, notes: list[str]) -> tuple[Budget, Metric]:
    """Return what may be spent and what is to be small.

    With bounds on cost the loss is minimised, with a bound on the loss the time. Without any bound: the time, as
    long as no more is lost than with every layer in the recipe's first format.
    """
    budget = budget_of(c)
    objective = c.options.objective
    if not budget.limits():
        first = {g.name: g.choices[0].format for g in problem.groups}
        budget = Budget(loss=totals(problem, first).loss)
        notes.append(
            f"no budget: as fast as possible, no more lost than by {c.recipe.recipe.formats[0]} everywhere"
        )
    if objective is None:
        return budget, "loss" if budget.loss is None else "latency_s"
    return budget, OBJECTIVES[objective]


def budget_of(c: Compilation) -> Budget:
    """Return the user's bounds, completed by the profile's."""
    asked, default = c.options.budget, c.profile.budgets
    return Budget(
        loss=asked.get("loss"),
        latency_s=asked.get("latency", default.latency_s),
        weight_bytes=asked.get("size", default.weights_bytes),
        peak_ram_bytes=asked.get("ram", default.peak_ram_bytes),
        energy_j=asked.get("energy"),
    )


def apply_formats(c: Compilation, runtime: RuntimeName, problem: Problem, formats: Mapping[str, str]) -> None:
    """Fix the formats of all sites and select anew."""
    by_node = {site: formats[group.name] for group in problem.groups for site in group.members}
    c.formats = replace(c.formats, by_node={**c.formats.by_node, **by_node})
    c.selection = frontend.reselect(c, runtime)


def summary(found: Allocation) -> list[str]:
    """Return what a user wants to know about an optimum: how sure it is, what binds, what more would buy."""
    lines = [
        f"optimum of {len(found.formats)} groups: {found.objective} {found.value:.4g}, "
        f"gap {found.gap:.1%}, {found.seconds:.2f} s"
    ]
    for price in found.prices:
        state = "binds" if price.binding else "does not bind"
        lines.append(
            f"budget {price.metric}: {price.used:.4g} of {price.limit:.4g}, {state}; with {price.more_limit:.4g} "
            f"the {found.objective} would be {price.more_objective:.4g}"
        )
    lines.extend(f"{d.group} in {d.format}: {d.reason}" for d in found.dropped)
    return lines


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
            self.sites.append(Site(unit, tuple(dict.fromkeys([*kernels, FLOAT]))))

    def selection(self, formats: Mapping[str, str]) -> Selection:
        """Select with every site in float but those named."""
        by_node = {site.name: FLOAT for site in self.sites} | dict(formats)
        saved = self._c.formats
        self._c.formats = FormatChoice((FLOAT,), saved.others, (FLOAT,), by_node)
        try:
            return frontend.reselect(self._c, self._runtime)
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


def allocation_problem(c: Compilation, variants: Variants, notes: list[str]) -> Problem:
    """Measure losses, predict costs, and put the problem together."""
    assert c.selection is not None
    observe_inputs(c, c.selection)
    losses = _losses(c, variants, notes)
    base = variants.seconds({})
    alone = {
        (s.name, f): max(variants.seconds({s.name: f}) - base, -base)
        for s in variants.sites
        for f in s.formats
        if f != FLOAT
    }
    groups = [_group(members, variants, losses, alone) for members in _tied(variants.sites)]
    return Problem(
        tuple(groups),
        boundaries=tuple(_boundaries(variants, groups, base, alone)),
        fixed=Totals(latency_s=base, weight_bytes=_other_bytes(c, variants)),
    )


def _losses(c: Compilation, variants: Variants, notes: list[str]) -> dict[tuple[str, str], float]:
    assert c.model is not None
    candidates = [(s.name, f) for s in variants.sites for f in s.formats if f != FLOAT]
    how = Sensitivity(
        c.options.loss,  # type: ignore[arg-type]
        c.options.evaluate if c.options.loss == "eval" else None,
        SessionConfig(threads=c.options.threads),
        c.options.workers,
        c.options.scheduler,
        _cache_file(c.options.cache),
    )
    found = measure_sensitivity(
        c.model,
        candidates,
        variants.model,
        frontend.limited(c, SAMPLES),
        how,
        progress=lambda done, total: c.progress.step(done, total, "candidates"),
    )
    notes.append(f"{len(found)} losses ({c.options.loss}) of {len(variants.sites)} layers, each alone")
    return {(f.site, f.format): f.loss for f in found} | {(s.name, FLOAT): 0.0 for s in variants.sites}


def _cache_file(folder: Path | None) -> Path | None:
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "sensitivity.jsonl"


def _tied(sites: list[Site]) -> list[list[Site]]:
    """Return the sites in groups that share a stored weight."""
    graph: nx.Graph[int] = nx.Graph()
    graph.add_nodes_from(range(len(sites)))
    first: dict[ir.Value, int] = {}
    for k, site in enumerate(sites):
        if site.weight is not None:
            graph.add_edge(first.setdefault(site.weight, k), k)
    components = sorted(sorted(found) for found in nx.connected_components(graph))
    return [[sites[k] for k in component] for component in components]


def _group(
    members: list[Site],
    variants: Variants,
    losses: Mapping[tuple[str, str], float],
    alone: Mapping[tuple[str, str], float],
) -> Group:
    """Return the choices that all members have."""
    common = [f for f in members[0].formats if all(f in m.formats for m in members)]
    choices = [
        Choice(
            fmt,
            loss=sum(losses[m.name, fmt] for m in members),
            latency_s=sum(alone.get((m.name, fmt), 0.0) for m in members),
            weight_bytes=_weight_bytes(members[0], fmt, variants),
        )
        for fmt in common
    ]
    return Group(members[0].name, tuple(m.name for m in members), tuple(choices))


def _weight_bytes(site: Site, fmt: str, variants: Variants) -> int:
    array = constant_array(site.weight)
    assert array is not None
    if fmt == FLOAT:
        return int(array.nbytes)
    plan = variants.plan({site.name: fmt})
    quant = plan.weights.get(plan.nodes[site.name].weight)
    return int(array.nbytes) if quant is None else stored_bytes(quant, int(array.size))


def _other_bytes(c: Compilation, variants: Variants) -> float:
    """Return the bytes of constants that no choice changes."""
    assert c.model is not None
    weights = {s.weight for s in variants.sites}
    others = (v.const_value for v in c.model.graph.initializers.values() if v not in weights)
    return float(sum(t.nbytes for t in others if t is not None))


def _boundaries(
    variants: Variants, groups: list[Group], base: float, alone: Mapping[tuple[str, str], float]
) -> list[Boundary]:
    """Return what neighbours save together: integers that pass between them need no conversion.

    Formats that read the same integers are alike here, so one pair of them is predicted for all.
    """
    group_of = {name: g for g in groups for name in g.members}
    reading = {s.name: [f for f in s.formats if _reads_integers(s, f)] for s in variants.sites}
    found = []
    for first, second in _neighbours(variants.current, variants.sites):
        if not reading[first] or not reading[second] or group_of[first] is group_of[second]:
            continue
        a, b = reading[first][0], reading[second][0]
        together = variants.seconds({first: a, second: b}) - base
        saved = together - alone[first, a] - alone[second, b]
        if saved:
            costs = {(f, g): BoundaryCost(latency_s=saved) for f in reading[first] for g in reading[second]}
            found.append(Boundary(group_of[first].name, group_of[second].name, costs))
    return found


def _reads_integers(site: Site, fmt: str) -> bool:
    combo = site.unit.rule.combo_for((fmt,)) if site.unit.rule is not None else None
    return combo is not None and combo.format in frontend.READING and site.unit.role == "anchor"


def _neighbours(selection: Selection, sites: list[Site]) -> list[tuple[str, str]]:
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
