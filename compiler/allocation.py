"""Phase allocate: a format for every group of layers, an exact optimum over measured losses and the target's cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from bitwright.compiler import frontend
from bitwright.compiler.allocate.grouping import tied_groups
from bitwright.compiler.allocate.moves import greedy
from bitwright.compiler.allocate.notes import allocation_notes
from bitwright.compiler.allocate.problem import (
    FLOAT,
    Budget,
    Cost,
    Group,
    Metric,
    Problem,
    Totals,
    tolerance,
    totals,
)
from bitwright.compiler.allocate.sensitivity import Sensitivity, SiteLoss, measure_sensitivity
from bitwright.compiler.allocate.solve import Allocation, allocate
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.errors import InfeasibleBudgetError, UsageError
from bitwright.compiler.graph.model import constant_array
from bitwright.compiler.interactions import boundaries_between
from bitwright.compiler.migration import observe_inputs
from bitwright.compiler.ort.session import local_config
from bitwright.compiler.plan.planner import RuntimeName
from bitwright.compiler.variants import Site, Variants, copies_of_tables, shared_weights

OBJECTIVES: Mapping[str, Metric] = {
    "loss": "loss",
    "latency": "latency_s",
    "size": "weight_bytes",
    "ram": "peak_ram_bytes",
    "energy": "energy_j",
}
# Every candidate of every layer runs on all samples that judge.
MOST_SAMPLES = 64
# Solutions whose whole placement may be predicted, and how much of the time it may leave over.
TRIES = 5
LEFT_OVER = 0.01
POLISHED = 200
# Shares of a limit of time that greedy selection is given: its times are sums of pairs, the placement's are not.
SHARES = (0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15)


def choose_formats(c: Compilation, runtime: RuntimeName, notes: list[str]) -> None:
    """Choose a format for every group of layers; afterwards the formats are fixed, node by node."""
    problem = allocation_problem(c, runtime, notes)
    budget, objective = goal(c, problem, notes)
    variants = Variants(c, runtime)
    c.allocation = allocate_placed(
        problem, budget, objective, lambda formats: placed_seconds(variants, problem, formats)
    )
    apply_formats(c, runtime, problem, c.allocation.formats)
    notes.extend(allocation_notes(c.allocation))
    if budget.latency_s is not None:
        notes.append(
            "the whole placement keeps the limit of time; what is proven holds for its model of pairs"
        )


def placed_seconds(variants: Variants, problem: Problem, formats: Mapping[str, str]) -> float:
    """Return the predicted seconds of an assignment: of the placement itself, which no sum of pairs is exactly."""
    return variants.seconds(
        {site: formats[g.name] for g in problem.groups for site in g.members if formats[g.name] != FLOAT}
    )


def allocate_placed(
    problem: Problem, budget: Budget, objective: Metric, seconds: Callable[[Mapping[str, str]], float]
) -> Allocation:
    """Allocate under a limit of time that the whole placement keeps, not only its pairwise model.

    The limit that the solver is given is moved by what the model was wrong by, until the placement keeps the limit and
    leaves hardly anything of it over.

    Args:
        problem: What to choose from.
        budget: Upper limits.
        objective: What to minimise.
        seconds: Predicts an assignment of formats as a whole.

    Returns:
        The best assignment found; its seconds are those of the placement.

    Raises:
        InfeasibleBudgetError: No assignment meets the budget.
    """
    limit, limits = budget.latency_s, budget
    seconds = _asked_once(seconds)
    best: Allocation | None = None
    for _ in range(TRIES):
        try:
            found = allocate(problem, limits, objective=objective)
        except InfeasibleBudgetError:
            if best is None:
                raise
            break
        modelled, exact = found.totals.latency_s, seconds(found.formats)
        found = _with_seconds(found, exact)
        kept = limit is None or exact <= limit + tolerance(limit)
        if kept and (best is None or found.value < best.value):
            best = found
        if limit is None or limits.latency_s is None:
            break
        wanted_more = any(p.binding for p in found.prices if p.metric == "latency_s")
        if kept and (exact >= (1 - LEFT_OVER) * limit or not wanted_more):
            break
        limits = limits.with_limit("latency_s", limit + modelled - exact)
    if best is None:
        what = (
            f"no assignment was found whose whole placement keeps {limit:.6g} s; predicted are {exact:.6g} s"
        )
        raise InfeasibleBudgetError(what, where="--budget latency", fix=f"allow latency={exact * 1e6:.0f}us")
    return best if limit is None or objective != "loss" else _polished(problem, budget, best, seconds)


def _asked_once(seconds: Callable[[Mapping[str, str]], float]) -> Callable[[Mapping[str, str]], float]:
    """Return ``seconds`` with a memory: a target's own compiler answers, and searches meet at the same assignments."""
    known: dict[frozenset[tuple[str, str]], float] = {}

    def remembered(formats: Mapping[str, str]) -> float:
        key = frozenset(formats.items())
        if key not in known:
            known[key] = seconds(formats)
        return known[key]

    return remembered


def polish(
    problem: Problem,
    budget: Budget,
    formats: Mapping[str, str],
    seconds: Callable[[Mapping[str, str]], float],
    *,
    most: int = POLISHED,
) -> dict[str, str]:
    """Return an assignment with single groups moved to formats of a smaller loss, as far as the placement allows.

    Args:
        problem: What to choose from.
        budget: Upper limits; ``formats`` keeps them.
        formats: The start.
        seconds: Predicts an assignment as a whole.
        most: Placements to predict at most.
    """
    chosen = dict(formats)
    moves = [
        (group.choice(chosen[group.name]).loss - choice.loss, group.name, choice.format)
        for group in problem.groups
        for choice in group.choices
        if choice.loss < group.choice(chosen[group.name]).loss
    ]
    for gain, name, fmt in sorted(moves, reverse=True)[:most]:
        tried = chosen | {name: fmt}
        better = totals(problem, tried).loss < totals(problem, chosen).loss
        if gain > 0 and better and budget.met_by(placed_totals(problem, tried, seconds)):
            chosen = tried
    return chosen


def placed_totals(
    problem: Problem, formats: Mapping[str, str], seconds: Callable[[Mapping[str, str]], float]
) -> Totals:
    """Return what an assignment costs; its seconds are those of the placement."""
    return replace(totals(problem, formats), latency_s=seconds(formats))


def greedy_or_none(problem: Problem, budget: Budget) -> dict[str, str] | None:
    """Return what greedy selection finds under a budget, if anything."""
    try:
        return greedy(problem, budget)
    except InfeasibleBudgetError:
        return None


def greedy_near(problem: Problem, budget: Budget) -> list[dict[str, str]]:
    """Return what greedy selection finds under a limit of time and under limits that its model may be wrong by."""
    assert budget.latency_s is not None
    limits = (budget.with_limit("latency_s", share * budget.latency_s) for share in SHARES)
    found = (greedy_or_none(problem, limit) for limit in limits)
    return list({tuple(sorted(f.items())): f for f in found if f is not None}.values())


def _polished(
    problem: Problem, budget: Budget, best: Allocation, seconds: Callable[[Mapping[str, str]], float]
) -> Allocation:
    """Improve an optimum of the pairwise model by what the placements themselves allow; greedy's plans are more starts.

    The optimum's bound is kept: it is that of the model.
    """
    others = greedy_near(problem, budget)
    starts = [best.formats, *(f for f in others if budget.met_by(placed_totals(problem, f, seconds)))]
    ends = [polish(problem, budget, start, seconds) for start in starts]
    chosen = min(ends, key=lambda formats: totals(problem, formats).loss)
    paid = placed_totals(problem, chosen, seconds)
    if paid.loss >= best.value:
        return best
    return _with_seconds(replace(best, formats=chosen, totals=paid, value=paid.loss), paid.latency_s)


def _with_seconds(found: Allocation, exact: float) -> Allocation:
    """Replace the modelled seconds of an allocation by those of the placement."""
    moved = exact - found.totals.latency_s if found.objective == "latency_s" else 0.0
    return replace(
        found,
        totals=replace(found.totals, latency_s=exact),
        value=found.value + moved,
        bound=found.bound + moved,
        prices=tuple(replace(p, used=exact) if p.metric == "latency_s" else p for p in found.prices),
    )


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


def _elements(c: Compilation, problem: Problem) -> int:
    """Return how many weights have a choice; one that several layers share counts once."""
    assert c.selection is not None
    names = {site for group in problem.groups for site in group.members}
    sites = [Site(u, ()) for u in c.selection.units if u.name in names]
    same = copies_of_tables(sites) if _stored_once(c) else {}
    weights = {same.get(s.weight, s.weight) if s.weight is not None else None for s in sites}
    return sum(0 if (array := constant_array(w)) is None else array.size for w in weights)


def budget_of(c: Compilation, problem: Problem | None = None) -> Budget:
    """Return the user's bounds, completed by the profile's.

    Args:
        c: The compilation.
        problem: Needed to turn a bound on the bits of a weight into one on bytes.
    """
    asked, default = c.options.budget, c.profile.budgets
    size = asked.get("size", default.weights_bytes)
    if "bits" in asked and problem is not None:
        elements = _elements(c, problem)
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
    losses = measured_losses(c, variants, notes)
    base = variants.seconds({})
    ties = shared_weights(variants.sites, copies=_stored_once(c))
    costs = _costs(c, variants, base, ties)
    groups = tied_groups(losses, costs, ties)
    group_of = {name: group for group in groups for name in group.members}
    return Problem(
        groups,
        boundaries=tuple(
            boundaries_between(variants.current, variants.sites, groups, costs, variants.seconds)
        ),
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


def measured_losses(c: Compilation, variants: Variants, notes: list[str]) -> list[SiteLoss]:
    """Measure what every site loses in every format, each alone."""
    assert c.model is not None
    candidates = [(s.name, f) for s in variants.sites for f in s.formats if f != FLOAT]
    how = Sensitivity(
        c.options.loss,  # type: ignore[arg-type]
        c.options.evaluate if c.options.loss == "eval" else None,
        local_config(c.profile.runtimes.onnxruntime, threads=c.options.threads),
        c.options.workers,
        c.options.scheduler,
        _cache_file(c.options.cache),
    )
    found = measure_sensitivity(
        c.model,
        candidates,
        variants.model,
        frontend.judging_samples(c, MOST_SAMPLES),
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


# Formats in which a table and a product by its transposed copy read the same bytes (passes/block_tables.py).
GROUPED = frozenset({"w8", "w4", "w3", "w2"})


def _stored_once(c: Compilation) -> bool:
    """Tell whether a table and a head that is its transposed copy will be one weight, whatever is chosen for them."""
    recipe = c.recipe.recipe
    return GROUPED.issuperset(recipe.tables) and recipe.rounding.granularity == "kernel"


def _other_bytes(c: Compilation, variants: Variants) -> float:
    """Return the bytes of constants that no choice changes."""
    assert c.model is not None
    weights = {s.weight for s in variants.sites}
    # A rewrite leaves the weight it replaced behind; without readers it does not get into the file.
    read = (v for v in c.model.graph.initializers.values() if v.uses() or v.is_graph_output())
    others = (v.const_value for v in read if v not in weights)
    return float(sum(t.nbytes for t in others if t is not None))
