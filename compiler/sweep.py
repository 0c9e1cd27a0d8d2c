"""``sweep``: the front of loss against a cost, as a table, a picture, and a recipe for every point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bitwright.compiler import frontend, migration
from bitwright.compiler.allocate.frontier import FrontPoint, front_csv, not_dominated, sweep
from bitwright.compiler.allocate.problem import Budget, Metric, Problem, totals
from bitwright.compiler.allocate.solve import allocate
from bitwright.compiler.allocation import OBJECTIVES, allocation_problem, budget_of
from bitwright.compiler.bundle.atomic import write_atomically
from bitwright.compiler.compilation import Compilation, Progress, Silent
from bitwright.compiler.errors import UsageError, nearest
from bitwright.compiler.options import Options
from bitwright.compiler.plan.planner import RuntimeName, observed_tensors
from bitwright.compiler.recipe.loader import recipe_text
from bitwright.compiler.report.front_picture import front_picture
from bitwright.targets.loader import load_profile

FLOAT = "float"
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
    options: Options, runtime: RuntimeName, cost: str, points: int, progress: Progress | None = None
) -> Front:
    """Find the front of a model on a target and write it to the folder ``options.output``.

    Args:
        options: Model, target, data, recipe (whose formats are the choices), budgets that every point keeps.
        runtime: Which of the two runtimes.
        cost: ``latency``, ``size``, ``ram`` or ``energy``.
        points: Budgets to try between the extremes.
        progress: Told about every phase.

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
    problem = _problem(c, runtime)
    metric = OBJECTIVES[cost]
    with c.recorded("sweep"):
        found = sweep(
            problem,
            metric,
            points=points,
            budget=budget_of(c, problem),
            progress=lambda done, total: c.progress.step(done, total, "budgets"),
        )
        uniform = uniform_points(problem)
        found = _with_uniform_costs(problem, metric, budget_of(c, problem), found, uniform)
    return Front(
        tuple(found), uniform, problem, metric, _write(c, options.output, found, uniform, problem, metric)
    )


def _problem(c: Compilation, runtime: RuntimeName) -> Problem:
    """Run the phases up to the allocation."""
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
        return allocation_problem(c, runtime, notes)


def _with_uniform_costs(
    problem: Problem,
    metric: Metric,
    budget: Budget,
    found: list[FrontPoint],
    uniform: Mapping[str, FrontPoint],
) -> list[FrontPoint]:
    """Add what is best at the cost of every uniform format, so that each can be compared with a point of the front."""
    points = list(found)
    for point in uniform.values():
        limits = budget.with_limit(metric, point.totals.of(metric))
        if budget.met_by(point.totals):
            best = allocate(problem, limits, prices=False)
            points.append(FrontPoint(best.formats, best.totals, best.gap))
    return not_dominated(points, metric)


def uniform_points(problem: Problem) -> dict[str, FrontPoint]:
    """Return the model with one format everywhere, format by format; layers without such a kernel stay in float."""
    formats = dict.fromkeys(choice.format for group in problem.groups for choice in group.choices)
    found = {}
    for fmt in formats:
        chosen = {g.name: fmt if any(c.format == fmt for c in g.choices) else FLOAT for g in problem.groups}
        found[fmt] = FrontPoint(chosen, totals(problem, chosen), 0.0)
    return found


def _write(
    c: Compilation,
    folder: Path,
    points: list[FrontPoint],
    uniform: Mapping[str, FrontPoint],
    problem: Problem,
    cost: Metric,
) -> tuple[Path, ...]:
    others = {fmt: [(p.totals.of(cost), p.totals.loss)] for fmt, p in uniform.items()}
    picture = front_picture([(p.totals.of(cost), p.totals.loss) for p in points], cost=cost, others=others)
    files = {folder / "front.csv": front_csv(points), folder / "front.svg": picture}
    for number, point in enumerate(points, start=1):
        files[folder / f"point-{number:02d}.yaml"] = _recipe_of(c, problem, point, number)
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        write_atomically(path, text.encode())
    return tuple(files)


def _recipe_of(c: Compilation, problem: Problem, point: FrontPoint, number: int) -> str:
    """Return a point as a recipe: ``compile --recipe point-03.yaml`` makes it."""
    recipe = c.recipe.recipe
    nodes = {site: point.formats[group.name] for group in problem.groups for site in group.members}
    return recipe_text(
        recipe.model_copy(
            update={
                "name": f"{recipe.name}-point-{number:02d}",
                "description": f"point {number} of a sweep on {c.profile.name}",
                "choose": "first",
                "nodes": {**recipe.nodes, **nodes},
            }
        )
    )
