"""``sweep``: the front of loss against a cost, as a table, a picture, and a recipe for every point."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from bitwright.compiler import frontend, migration, pricing
from bitwright.compiler.allocate.frontier import FrontPoint, front_csv, not_dominated, sweep
from bitwright.compiler.allocate.problem import FLOAT, Budget, Metric, Problem, totals
from bitwright.compiler.allocate.solve import allocate
from bitwright.compiler.allocation import (
    OBJECTIVES,
    allocation_problem,
    budget_of,
    greedy_near,
    greedy_or_none,
    placed_seconds,
    placed_totals,
    polish,
)
from bitwright.compiler.bundle.atomic import write_atomically
from bitwright.compiler.compilation import Compilation, Progress, Silent
from bitwright.compiler.errors import InfeasibleBudgetError, UsageError, nearest
from bitwright.compiler.measured_front import (
    better_by_measure,
    measure_points,
    measured_by_format,
    measured_loss,
)
from bitwright.compiler.options import Options
from bitwright.compiler.plan.planner import RuntimeName, observed_tensors
from bitwright.compiler.recipe.loader import recipe_text
from bitwright.compiler.report.front_picture import front_picture
from bitwright.compiler.variants import Variants
from bitwright.targets.loader import load_profile

# Measured times are known to half a per cent at best.
RESOLUTION = 0.005
COSTS = tuple(name for name in OBJECTIVES if name != "loss")


@dataclass(frozen=True)
class Front:
    """What a sweep found.

    Attributes:
        points: The front, the cheapest first.
        uniform: Format -> totals of the model with every layer in it (float where it has no such kernel).
        problem: What was chosen from.
        cost: The metric on the other axis.
        files: What was written.
    """

    points: tuple[FrontPoint, ...]
    uniform: Mapping[str, FrontPoint]
    problem: Problem
    cost: Metric
    files: tuple[Path, ...]


def sweep_model(
    options: Options,
    runtime: RuntimeName,
    cost: str,
    points: int,
    progress: Progress | None = None,
    *,
    measure: bool = True,
) -> Front:
    """Find the front of a model on a target and write it to the folder ``options.output``.

    Args:
        options: Model, target, data, recipe (whose formats are the choices), budgets that every point keeps.
        runtime: Which of the two runtimes.
        cost: ``latency``, ``size``, ``ram`` or ``energy``.
        points: Budgets to try between the extremes.
        progress: Told about every phase.
        measure: Build the points and compare them by what they really lose.

    Raises:
        BitwrightError: See the subclasses; nothing is written then.
    """
    if cost not in COSTS:
        what = f"unknown cost '{cost}'"
        raise UsageError(what, where="--cost", fix=nearest(cost, COSTS))
    if options.output is None:
        what = "no output folder"
        raise UsageError(what, where="--output", fix="pass -o FOLDER")
    c = Compilation(options, load_profile(options.target), progress or Silent())
    problem = problem_of(c, runtime)
    front = front_of(c, runtime, problem, OBJECTIVES[cost], points, measure=measure)
    return replace(front, files=_write(c, options.output, front))


def front_of(
    c: Compilation,
    runtime: RuntimeName,
    problem: Problem,
    metric: Metric,
    points: int,
    *,
    measure: bool = False,
) -> Front:
    """Return the front of one cost; its seconds are predictions of whole placements.

    Args:
        c: The compilation that the problem was made of.
        runtime: Which of the two runtimes.
        problem: From :func:`problem_of`.
        metric: The cost.
        points: Budgets to try between the extremes.
        measure: Build the points, and leave out which others dominate by what they really lose; half precision is
            among them then.
    """
    budget, variants = budget_of(c, problem), Variants(c, runtime)

    def seconds(formats: Mapping[str, str]) -> float:
        if pricing.is_priced(c, runtime):  # the prices of layers add up
            return totals(problem, formats).latency_s
        return placed_seconds(variants, problem, formats)

    def placed(point: FrontPoint) -> FrontPoint:
        return replace(point, totals=placed_totals(problem, point.formats, seconds))

    with c.recorded("sweep"):
        found = sweep(
            problem,
            metric,
            points=points,
            budget=budget,
            progress=lambda done, total: c.progress.step(done, total, "budgets"),
        )
        uniform = uniform_points(problem)
        found += _at_uniform_costs(problem, metric, budget, uniform)
        uniform = {fmt: placed(point) for fmt, point in uniform.items()}
        greedy = [placed(p) for p in _greedy_points(problem, metric, budget, found)]
        compared = [*greedy, *uniform.values()]
        known = [*map(placed, found), *compared]
        if metric == "latency_s":
            known += [placed(p) for p in _greedy_near(problem, budget, found)]
            known += [_polished(problem, budget, point, seconds) for point in not_dominated(known, metric)]
        kept = [p for p in known if budget.met_by(p.totals)]
    if measure:
        with c.recorded("measure"):
            # What is dominated by prediction is built only if it is one format everywhere or greedy's.
            built = measure_points(c, runtime, problem, [*not_dominated(kept, metric), *compared])
            rest = _beside_wholes(problem, metric, budget, built)
            built += measure_points(c, runtime, problem, [*map(placed, rest)], wholes=False)
        uniform = measured_by_format(built, uniform)
        inside = [p for p in built if budget.met_by(p.totals)]
        chosen = better_by_measure(inside, lambda p: _paid(p, metric))
    else:
        chosen = not_dominated(kept, metric)
    return Front(tuple(_apart(chosen) if metric == "latency_s" else chosen), uniform, problem, metric, ())


def _paid(point: FrontPoint, metric: Metric) -> float:
    """Return the cost of a built point: bytes as they are, everything else as it is predicted."""
    if metric == "weight_bytes" and point.measured is not None:
        return float(point.measured.file_bytes)
    return point.totals.of(metric)


def _greedy_points(
    problem: Problem, metric: Metric, budget: Budget, found: Sequence[FrontPoint]
) -> list[FrontPoint]:
    """Return greedy selection at the costs of known points.

    Under one budget it is never better than the optimum. But a budget that lies between two others has an optimum of
    its own, and the time of a placement is not exactly what the solver's model says.
    """
    chosen = [greedy_or_none(problem, budget.with_limit(metric, p.totals.of(metric))) for p in found]
    return [FrontPoint(f, totals(problem, f), math.nan) for f in chosen if f is not None]


def _greedy_near(problem: Problem, budget: Budget, found: Sequence[FrontPoint]) -> list[FrontPoint]:
    """Return greedy selection at limits of time near those of known points: its times are not the placement's."""
    near = [
        f for p in found for f in greedy_near(problem, budget.with_limit("latency_s", p.totals.latency_s))
    ]
    return [FrontPoint(f, totals(problem, f), math.nan) for f in near]


def _beside_wholes(
    problem: Problem, metric: Metric, budget: Budget, built: Sequence[FrontPoint]
) -> list[FrontPoint]:
    """Return what is best, and what greedy selection finds, at the cost of whole-model half precision."""
    found = []
    for limit in (p.totals.of(metric) for p in built if p.whole is not None):
        with suppress(InfeasibleBudgetError):
            best = allocate(problem, budget.with_limit(metric, limit), prices=False)
            found.append(FrontPoint(best.formats, best.totals, best.gap))
    return found + _greedy_points(problem, metric, budget, found)


def _polished(
    problem: Problem, budget: Budget, point: FrontPoint, seconds: Callable[[Mapping[str, str]], float]
) -> FrontPoint:
    """Return a point that loses less than another and is as fast, up to what times are known to."""
    limit = point.totals.latency_s * (1 + RESOLUTION)
    formats = polish(problem, budget.with_limit("latency_s", limit), point.formats, seconds)
    return FrontPoint(formats, placed_totals(problem, formats, seconds), math.nan)


def _apart(points: list[FrontPoint]) -> list[FrontPoint]:
    """Leave out points that are faster than the next one, which loses less, by no more than times are known to."""
    kept: list[FrontPoint] = []
    for point in reversed(points):
        if not kept or point.totals.latency_s < (1 - RESOLUTION) * kept[-1].totals.latency_s:
            kept.append(point)
    return kept[::-1]


def problem_of(c: Compilation, runtime: RuntimeName) -> Problem:
    """Run the phases up to the allocation and return what is to be chosen from."""
    for name, phase in (
        ("ingest", frontend.ingest),
        ("normalize", frontend.normalize_model),
        ("shapes", frontend.choose_shapes),
    ):
        with c.recorded(name) as notes:
            phase(c, notes)
    with c.recorded("plan") as notes:
        notes.extend(frontend.check_recipe(c, runtime))
        c.selection = frontend.select_units(c, runtime)
    with c.recorded("migrate") as notes:
        migration.migrate(c, runtime, notes)
    with c.recorded("calibrate") as notes:
        frontend.calibrate(c, observed_tensors(c.selection), notes)
    with c.recorded("allocate") as notes:
        if pricing.is_priced(c, runtime):
            return pricing.priced_problem(c, notes)
        return allocation_problem(c, runtime, notes)


def _at_uniform_costs(
    problem: Problem, metric: Metric, budget: Budget, uniform: Mapping[str, FrontPoint]
) -> list[FrontPoint]:
    """Return what is best at the cost of every uniform format, so that each can be compared with a point."""
    found = []
    for point in uniform.values():
        limits = budget.with_limit(metric, point.totals.of(metric))
        if budget.met_by(point.totals):
            best = allocate(problem, limits, prices=False)
            found.append(FrontPoint(best.formats, best.totals, best.gap))
    return found


def uniform_points(problem: Problem) -> dict[str, FrontPoint]:
    """Return the model with one format everywhere, format by format; layers without such a kernel stay in float."""
    formats = dict.fromkeys(choice.format for group in problem.groups for choice in group.choices)
    found = {}
    for fmt in formats:
        chosen = {g.name: fmt if any(c.format == fmt for c in g.choices) else FLOAT for g in problem.groups}
        found[fmt] = FrontPoint(chosen, totals(problem, chosen), math.nan)
    return found


def _write(c: Compilation, folder: Path, front: Front) -> tuple[Path, ...]:
    cost, points = front.cost, front.points
    others = {fmt: [_drawn(p, cost)] for fmt, p in front.uniform.items()}
    built = all(p.measured is not None for p in points)
    picture = front_picture([_drawn(p, cost) for p in points], cost=cost, others=others, measured=built)
    files = {folder / "front.csv": front_csv(points), folder / "front.svg": picture}
    for number, point in enumerate(points, start=1):
        name = f"point-{number:02d}"
        files[folder / f"{name}.yaml"] = recipe_of(c, front.problem, point, name)
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        write_atomically(path, text.encode())
    return tuple(files)


def _drawn(point: FrontPoint, cost: Metric) -> tuple[float, float]:
    return _paid(point, cost), point.totals.loss if point.measured is None else measured_loss(point)


def recipe_of(c: Compilation, problem: Problem, point: FrontPoint, name: str) -> str:
    """Return a point as a recipe: ``compile --recipe point-03.yaml`` makes it."""
    recipe = c.recipe.recipe
    nodes = {site: point.formats[group.name] for group in problem.groups for site in group.members}
    changed = {
        "name": f"{recipe.name}-{name}",
        "description": f"{name} of a sweep on {c.profile.name}",
        "choose": "first",
        "nodes": {**recipe.nodes, **nodes},
    }
    if point.whole is not None:
        others = (point.whole, *recipe.others)
        changed |= {"formats": (point.whole,), "others": others, "nodes": dict(recipe.nodes)}
    return recipe_text(recipe.model_copy(update=changed))
