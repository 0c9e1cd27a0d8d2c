"""The allocator on real models: predicted against measured time, measured fronts against uniform formats and greedy.

``BITWRIGHT_ZOO=... python benchmarks/allocation.py [--models kws_dscnn resnet8_cifar10 ...] [--out DIR]``

Every model is probed, its plans are built and measured; results are kept in the folder, so that models can be run one
by one, and the tables and the picture show all that are there.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zoo
from allocation_tables import draw, tables
from built_plans import RUNTIME, Built, Judge, Workshop, opener, time_all, write_validation
from threadpoolctl import threadpool_limits
from zoo import ZooModel, model_named

from bitwright.compiler import frontend
from bitwright.compiler.allocate.frontier import FrontPoint
from bitwright.compiler.allocate.problem import Boundary, Budget, Choice, Cost, Group, Metric, Problem, totals
from bitwright.compiler.allocate.solve import allocate
from bitwright.compiler.allocation import allocate_placed, greedy_or_none, placed_seconds
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.options import Options
from bitwright.compiler.ort.session import open_session
from bitwright.compiler.probing.placements import feeds_of
from bitwright.compiler.probing.probe import probe
from bitwright.compiler.sweep import front_of, problem_of, uniform_points
from bitwright.compiler.variants import Variants
from bitwright.targets.loader import load_profile

MODELS = ("kws_dscnn", "resnet8_cifar10", "vww_mobilenet", "ad_autoencoder", "minilm_l6", "ppocr_rec")
FRONTS = ("kws_dscnn", "resnet8_cifar10", "minilm_l6")
METRICS: dict[str, Metric] = {"latency": "latency_s", "size": "weight_bytes"}


def _data(model: ZooModel) -> str:
    return f"{zoo.__file__}:{model.samples.__name__}"


def _probed(model: ZooModel, out: Path, seconds: float) -> Path:
    """Return the profile with the model's times, measured now, or in an earlier run if there are no seconds for it."""
    path = out / f"{model.name}-host.yaml"
    if not seconds:
        return path
    path.unlink(missing_ok=True)
    probe("host", model=model.path, data=_data(model), output=path, seconds=seconds)
    return path


def _middle(problem: Problem, variants: Variants) -> tuple[Built, FrontPoint]:
    """Choose formats under a latency in the middle between the fastest and float."""
    fastest = allocate_placed(problem, Budget(), "latency_s", lambda f: placed_seconds(variants, problem, f))
    slowest = placed_seconds(variants, problem, {g.name: "float" for g in problem.groups})
    limit = (fastest.totals.latency_s + slowest) / 2
    found = allocate_placed(
        problem, Budget(latency_s=limit), "loss", lambda f: placed_seconds(variants, problem, f)
    )
    name = f"latency={limit * 1e6:.0f}us"
    point = FrontPoint(found.formats, found.totals, found.gap)
    return Built(name, "chosen", "", found.totals.latency_s, found.totals.loss), point


def _at_cost_of(greedy: FrontPoint, problem: Problem, variants: Variants, label: str) -> FrontPoint:
    """Return what the allocator finds for what greedy's plan really costs: greedy misses the budget it was given."""

    def seconds(formats: Mapping[str, str]) -> float:
        return placed_seconds(variants, problem, formats)

    cost = seconds(greedy.formats) if label == "latency" else greedy.totals.of(METRICS[label])
    found = allocate_placed(problem, Budget().with_limit(METRICS[label], cost * (1 + 1e-9)), "loss", seconds)
    return FrontPoint(found.formats, found.totals, found.gap)


def _wanted(c: Compilation, problem: Problem, points: int) -> Iterator[tuple[Built, FrontPoint]]:
    """Yield the plans to build: the middle one, the fronts, greedy selection at their budgets, uniform formats."""
    variants = Variants(c, RUNTIME)

    def plan(name: str, kind: str, point: FrontPoint) -> tuple[Built, FrontPoint]:
        if point.whole is not None:
            return Built(name, kind, "", point.totals.latency_s, None), point
        loss = totals(problem, point.formats).loss
        return Built(name, kind, "", placed_seconds(variants, problem, point.formats), loss), point

    yield _middle(problem, variants)
    if not points:
        known = uniform_points(problem)
        yield from (plan(f"uniform {fmt}", "uniform", known[fmt]) for fmt in ("float", "int8"))
        return
    found = {
        label: front_of(c, RUNTIME, problem, metric, points, measure=True)
        for label, metric in METRICS.items()
    }
    for fmt, point in found["latency"].uniform.items():
        yield plan(f"uniform {fmt}", "uniform", point)
    for label, front in found.items():
        for k, point in enumerate(front.points, start=1):
            yield plan(f"{label} front {k}", f"front {label}", point)
        for k, point in enumerate(front.points, start=1):
            limit = point.totals.of(METRICS[label])
            chosen = greedy_or_none(problem, Budget().with_limit(METRICS[label], limit))
            if chosen is not None:
                greedy = FrontPoint(chosen, totals(problem, chosen), math.nan)
                yield plan(f"{label} greedy {k}", f"greedy {label}", greedy)
                yield plan(
                    f"{label} front at greedy {k}",
                    f"front {label}",
                    _at_cost_of(greedy, problem, variants, label),
                )


def measure_model(model: ZooModel, out: Path, *, points: int, seconds: float) -> dict[str, Any]:
    """Probe a model, build its plans and measure them."""
    profile = _probed(model, out, seconds)
    validation = (
        write_validation(model, open_session(model.path), out / f"{model.name}-validation")
        if points
        else None
    )
    c = Compilation(
        Options(
            validation=None if validation is None else str(validation),
            model=model.path,
            target=str(profile),
            data=_data(model),
            recipe="mixed",
            cache=out / "cache",
            gate=False,
        ),
        load_profile(str(profile)),
    )
    start = time.perf_counter()
    problem = problem_of(c, RUNTIME)
    problem_s = time.perf_counter() - start
    plans = list(_wanted(c, problem, points))
    folder = out / model.name
    shop = Workshop(c, folder)
    for built, point in plans:
        built.file = shop.point(problem, point)
    rows = [built for built, _ in plans]
    reference = _measure(c, model, rows, folder)
    return {
        "model": model.name,
        "metric": model.metric,
        "float_metric": reference,
        "groups": len(problem.groups),
        "problem_s": problem_s,
        "rows": [row.as_plain() for row in rows],
    }


def _measure(c: Compilation, model: ZooModel, rows: list[Built], folder: Path) -> float:
    """Fill in what is measured, once for every file; return the float model's metric."""
    files = list(dict.fromkeys(row.file for row in rows))
    feeds = dict(feeds_of(c))
    seconds = dict(zip(files, time_all([opener(c, folder / f) for f in files], feeds), strict=True))
    judge = Judge(model, opener(c, model.path, plain=True)())
    judged = {f: judge(opener(c, folder / f)()) for f in files}
    for row in rows:
        row.size, row.seconds = (folder / row.file).stat().st_size, seconds[row.file]
        row.loss, row.metric = judged[row.file]
    return judge.float_metric


def measure_times_again(name: str, out: Path) -> dict[str, Any]:
    """Measure the seconds of everything that was built for a model once more, say because the machine was busy."""
    result: dict[str, Any] = json.loads((out / f"{name}.json").read_text())
    model = model_named(name)
    target = str(out / f"{name}-host.yaml")
    c = Compilation(
        Options(model=model.path, target=target, data=_data(model), gate=False), load_profile(target)
    )
    for phase in (frontend.ingest, frontend.normalize_model, frontend.choose_shapes):
        phase(c, [])
    files = list(dict.fromkeys(row["file"] for row in result["rows"]))
    found = time_all([opener(c, out / name / file) for file in files], dict(feeds_of(c)))
    for row in result["rows"]:
        row["seconds"] = found[files.index(row["file"])]
    return result


def synthetic(groups: int, formats: int = 5) -> Problem:
    """Return a problem of the size of a large model: a chain with residual boundaries, losses over four decades."""
    rng = np.random.default_rng(0)
    found = []
    for k in range(groups):
        size = float(10 ** rng.uniform(3, 6))
        choices = [
            Choice(
                f"f{j}",
                float(10 ** rng.uniform(-6, -2) * 4.0**-j) if j < formats - 1 else 0.0,
                size * 1e-11 * (1 + j * rng.uniform(0.5, 1.5)),
                size * (j + 1) / formats * rng.uniform(0.9, 1.1),
            )
            for j in range(formats)
        ]
        found.append(Group(f"g{k}", (f"s{k}",), tuple(choices)))
    jumps = [(k, k + 1) for k in range(groups - 1)] + [(k, k + 3) for k in range(0, groups - 3, 4)]
    boundaries = [
        Boundary(
            f"g{a}",
            f"g{b}",
            {
                (f"f{i}", f"f{j}"): Cost(float(rng.uniform(1e-7, 3e-6)))
                for i in range(formats)
                for j in range(formats)
                if (i < 2) != (j < 2)
            },
        )
        for a, b in jumps
    ]
    return Problem(tuple(found), tuple(boundaries))


def solver_times(groups: int = 500) -> dict[str, Any]:
    """Solve the synthetic problem on one thread, under bounds of time and of size."""
    problem = synthetic(groups)
    ends = [totals(problem, {g.name: g.choices[k].format for g in problem.groups}) for k in (0, -1)]
    rows = []
    with threadpool_limits(1):
        for share in (0.25, 0.5, 0.75):
            latency, size = (
                ends[0].of(m) + share * (ends[1].of(m) - ends[0].of(m)) for m in ("latency_s", "weight_bytes")
            )
            wall, cpu = time.perf_counter(), time.process_time()
            found = allocate(problem, Budget(latency_s=latency, weight_bytes=size), prices=False)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            rows.append({"share": share, "wall_s": wall, "cpu_s": cpu, "gap": found.gap, "loss": found.value})
            wall = time.perf_counter()
            plain = greedy_or_none(problem, Budget(latency_s=latency, weight_bytes=size))
            loss = None if plain is None else totals(problem, plain).loss
            rows[-1] |= {"greedy_loss": loss, "greedy_s": time.perf_counter() - wall}
    return {"groups": groups, "boundaries": len(problem.boundaries), "rows": rows}


def main() -> None:
    """Measure what is asked for; print the tables of everything that was ever measured into the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", choices=MODELS, default=MODELS)
    parser.add_argument("--out", type=Path, default=Path("allocation-results"))
    parser.add_argument("--seconds", type=float, default=40.0, help="of each probe; 0 keeps the last one")
    parser.add_argument("--points", type=int, default=8, help="budgets of each front")
    parser.add_argument("--times-only", action="store_true", help="measure times again of what is there")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    if not arguments.times_only:
        (out / "solver.json").write_text(json.dumps(solver_times(), indent=1))
    for name in arguments.models:
        points = arguments.points if name in FRONTS else 0
        if arguments.times_only:
            result = measure_times_again(name, out)
        else:
            result = measure_model(model_named(name), out, points=points, seconds=arguments.seconds)
        (out / f"{name}.json").write_text(json.dumps(result, indent=1))
    results = [json.loads((out / f"{n}.json").read_text()) for n in MODELS if (out / f"{n}.json").exists()]
    text = tables(results, json.loads((out / "solver.json").read_text()))
    (out / "tables.md").write_text(text)
    draw(
        [r for r in results if any(row["kind"].startswith("front") for row in r["rows"])], out / "fronts.svg"
    )
    print(text)


if __name__ == "__main__":
    main()
