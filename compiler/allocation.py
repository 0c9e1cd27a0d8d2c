"""Phase allocate: a format for every group of layers, an exact optimum over measured losses and the target's cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from bitwright.compiler import frontend
from bitwright.compiler.allocate.grouping import tied_groups
from bitwright.compiler.allocate.notes import allocation_notes
from bitwright.compiler.allocate.problem import Boundary, Budget, Cost, Group, Metric, Problem, Totals, totals
from bitwright.compiler.allocate.sensitivity import Sensitivity, SiteLoss, measure_sensitivity
from bitwright.compiler.allocate.solve import allocate
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.errors import UsageError
from bitwright.compiler.migration import observe_inputs
from bitwright.compiler.ort.session import config_for
from bitwright.compiler.plan.planner import RuntimeName
from bitwright.compiler.variants import FLOAT, Site, Variants, neighbours, reads_integers

OBJECTIVES: Mapping[str, Metric] = {
    "loss": "loss",
    "latency": "latency_s",
    "size": "weight_bytes",
    "ram": "peak_ram_bytes",
    "energy": "energy_j",
}
SAMPLES = 16


def wanted(c: Compilation) -> bool:
    """Tell whether there is anything to choose: the recipe says so, or a budget has to be met."""
    return c.recipe.recipe.choose == "allocate" or bool(c.options.budget or budget_of(c).limits())


def choose_formats(c: Compilation, runtime: RuntimeName, notes: list[str]) -> None:
    """Choose a format for every group of layers; afterwards the formats are fixed, node by node."""
    problem = allocation_problem(c, runtime, notes)
    budget, objective = goal(c, problem, notes)
    c.allocation = allocate(problem, budget, objective=objective)
    apply_formats(c, runtime, problem, c.allocation.formats)
    notes.extend(allocation_notes(c.allocation))


def goal(c: Compilation, problem: Problem, notes: list[str]) -> tuple[Budget, Metric]:
    """Return what may be spent and what is to be small.

    With bounds on cost the loss is minimised, with a bound on the loss the time. Without any bound: the time, as
    long as no more is lost than with every layer in the recipe's first format.
    """
    budget = budget_of(c, problem)
    objective = c.options.objective
    if not budget.limits():
        first = {g.name: _first(c, g) for g in problem.groups}
        budget = Budget(loss=totals(problem, first).loss)
        notes.append(
            f"no budget: as fast as possible, no more lost than by {c.recipe.recipe.formats[0]} everywhere"
        )
    if objective is None:
        return budget, "loss" if budget.loss is None else "latency_s"
    return budget, OBJECTIVES[objective]


def _first(c: Compilation, group: Group) -> str:
    """Return the recipe's first format that a group can have."""
    known = [choice.format for choice in group.choices]
    recipe = c.recipe.recipe
    return next((f for f in (*recipe.formats, *recipe.tables) if f in known), FLOAT)


def budget_of(c: Compilation, problem: Problem | None = None) -> Budget:
    """Return the user's bounds, completed by the profile's.

    Args:
        c: The compilation.
        problem: Needed to turn a bound on the bits of a weight into one on bytes.
    """
    asked, default = c.options.budget, c.profile.budgets
    size = asked.get("size", default.weights_bytes)
    if "bits" in asked and problem is not None:
        elements = sum(group.choice(FLOAT).weight_bytes / 4 for group in problem.groups)
        size = problem.fixed.weight_bytes + asked["bits"] / 8 * elements
    return Budget(
        loss=asked.get("loss"),
        latency_s=asked.get("latency", default.latency_s),
        weight_bytes=size,
        peak_ram_bytes=asked.get("ram", default.peak_ram_bytes),
        energy_j=asked.get("energy"),
    )


def apply_formats(c: Compilation, runtime: RuntimeName, problem: Problem, formats: Mapping[str, str]) -> None:
    """Fix the formats of all sites and select anew."""
    by_node = {site: formats[group.name] for group in problem.groups for site in group.members}
    c.formats = replace(c.formats, by_node={**c.formats.by_node, **by_node})
    c.selection = frontend.reselect(c, runtime)


def allocation_problem(c: Compilation, runtime: RuntimeName, notes: list[str]) -> Problem:
    """Measure losses, predict costs, and put the problem together.

    Raises:
        UsageError: The model has no layer with a constant weight that the target could quantize.
    """
    assert c.selection is not None
    variants = Variants(c, runtime)
    if not variants.sites:
        what = (
            f"{c.profile.name} has no quantized kernel for any layer of this model: nothing can be allocated"
        )
        raise UsageError(what, where="--budget", fix="leave budgets and allocating recipes out")
    observe_inputs(c, c.selection)
    losses = _losses(c, variants, notes)
    base = variants.seconds({})
    ties = _ties(variants.sites)
    costs = _costs(c, variants, base, ties)
    groups = tied_groups(losses, costs, ties)
    group_of = {name: group for group in groups for name in group.members}
    return Problem(
        groups,
        boundaries=tuple(_boundaries(variants, groups, base, costs)),
        live_sets=tuple(variants.live_sets(group_of)) if budget_of(c).peak_ram_bytes else (),
        fixed=Totals(
            latency_s=base,
            weight_bytes=_other_bytes(c, variants),
            energy_j=variants.joules({}) if _counts_energy(c) else 0.0,
        ),
    )


def _counts_energy(c: Compilation) -> bool:
    return "energy" in c.options.budget or c.options.objective == "energy"


def _costs(
    c: Compilation, variants: Variants, base: float, ties: list[list[str]]
) -> dict[tuple[str, str], Cost]:
    """Return what every site costs in every format, beyond the float model where that is subtracted."""
    idle = variants.joules({}) if _counts_energy(c) else 0.0
    # A weight that several layers share is stored once: the first one pays for it.
    free = {name for tie in ties for name in tie[1:]}
    costs = {}
    for site in variants.sites:
        for fmt in site.formats:
            alone = {site.name: fmt} if fmt != FLOAT else {}
            costs[site.name, fmt] = Cost(
                variants.seconds(alone) - base if alone else 0.0,
                0.0
                if site.name in free
                else variants.weight_bytes(site, fmt, ideal="bits" in c.options.budget),
                variants.joules(alone) - idle if alone and _counts_energy(c) else 0.0,
            )
    return costs


def _losses(c: Compilation, variants: Variants, notes: list[str]) -> list[SiteLoss]:
    assert c.model is not None
    candidates = [(s.name, f) for s in variants.sites for f in s.formats if f != FLOAT]
    how = Sensitivity(
        c.options.loss,  # type: ignore[arg-type]
        c.options.evaluate if c.options.loss == "eval" else None,
        config_for(c.profile.runtimes.onnxruntime, threads=c.options.threads),
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
    return found


def _cache_file(folder: Path | None) -> Path | None:
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "sensitivity.jsonl"


def _ties(sites: list[Site]) -> list[list[str]]:
    """Return the sites that share a stored weight, set by set."""
    readers: dict[ir.Value, list[str]] = defaultdict(list)
    for site in sites:
        if site.weight is not None:
            readers[site.weight].append(site.name)
    return [names for names in readers.values() if len(names) > 1]


def _other_bytes(c: Compilation, variants: Variants) -> float:
    """Return the bytes of constants that no choice changes."""
    assert c.model is not None
    weights = {s.weight for s in variants.sites}
    others = (v.const_value for v in c.model.graph.initializers.values() if v not in weights)
    return float(sum(t.nbytes for t in others if t is not None))


def _boundaries(
    variants: Variants, groups: tuple[Group, ...], base: float, costs: Mapping[tuple[str, str], Cost]
) -> list[Boundary]:
    """Return what neighbours save together: integers that pass between them need no conversion.

    Formats that read the same integers are alike here, so one pair of them is predicted for all.
    """
    group_of = {name: g for g in groups for name in g.members}
    reading = {s.name: [f for f in s.formats if reads_integers(s, f)] for s in variants.sites}
    found = []
    for first, second in neighbours(variants.current, variants.sites):
        if not reading[first] or not reading[second] or group_of[first] is group_of[second]:
            continue
        a, b = reading[first][0], reading[second][0]
        together = variants.seconds({first: a, second: b}) - base
        saved = together - costs[first, a].latency_s - costs[second, b].latency_s
        if saved:
            pairs = {(f, g): Cost(saved) for f in reading[first] for g in reading[second]}
            found.append(Boundary(group_of[first].name, group_of[second].name, pairs))
    return found
