"""The sweep: a front that dominates uniform formats, and points that are recipes."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from allocation_models import MLP, SAMPLES, build

from bitwright.compiler.allocate.frontier import FrontPoint
from bitwright.compiler.allocate.solve import GAP
from bitwright.compiler.errors import UsageError
from bitwright.compiler.measured_front import measured_loss
from bitwright.compiler.options import Options
from bitwright.compiler.recipe.loader import load_recipe
from bitwright.compiler.sweep import Front, sweep_model


def _swept(folder: Path, *, measure: bool) -> Front:
    ir.save(build(MLP), folder / "m.onnx")
    options = Options(
        model=folder / "m.onnx",
        target="x86-avx512-vnni",
        data=SAMPLES[MLP],
        output=folder / "front",
        recipe="mixed",
    )
    return sweep_model(options, "onnxruntime", "size", 8, measure=measure)


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Front:
    return _swept(tmp_path_factory.mktemp("sweep"), measure=True)


@pytest.fixture(scope="module")
def predicted(tmp_path_factory: pytest.TempPathFactory) -> Front:
    return _swept(tmp_path_factory.mktemp("predicted"), measure=False)


def test_the_solvers_front_dominates_uniform_formats_in_its_own_model(predicted: Front) -> None:
    for point in predicted.uniform.values():
        size, loss = point.totals.weight_bytes, point.totals.loss
        # The solver stops within GAP of the optimum.
        losses = [p.totals.loss for p in predicted.points if p.totals.weight_bytes <= size]
        assert losses and min(losses) <= loss * (1 + 2 * GAP) + 1e-12


def test_what_was_built_is_no_worse_than_any_format_everywhere(front: Front) -> None:
    assert {"int8", "w4", "fp16", "float"} <= set(front.uniform)
    for point in front.uniform.values():
        assert point.measured is not None
        losses = [measured_loss(p) for p in front.points if _bytes(p) <= _bytes(point)]
        assert losses and min(losses) <= measured_loss(point)


def _bytes(point: FrontPoint) -> int:
    assert point.measured is not None
    return point.measured.file_bytes


def test_the_front_falls_from_the_cheapest_to_the_exact_one(front: Front) -> None:
    sizes = [_bytes(p) for p in front.points]
    losses = [measured_loss(p) for p in front.points]
    assert sizes == sorted(sizes) and losses == sorted(losses, reverse=True)
    assert losses[-1] == 0.0 and len(front.points) > 2


def test_table_picture_and_recipes_are_written(front: Front) -> None:
    folder = front.files[0].parent
    rows = list(csv.DictReader((folder / "front.csv").read_text().splitlines()))
    assert len(rows) == len(front.points)
    assert (folder / "front.svg").read_text().startswith("<?xml")
    for number, point in enumerate(front.points, start=1):
        recipe = load_recipe(str(folder / f"point-{number:02d}.yaml")).recipe
        if point.whole is not None:
            assert recipe.formats == (point.whole,)
            continue
        assert recipe.nodes == {s: point.formats[g.name] for g in front.problem.groups for s in g.members}


@pytest.mark.parametrize(("cost", "fix"), [("sise", "did you mean 'size'"), ("loss", "known: energy")])
def test_an_unknown_cost_is_refused(tmp_path: Path, cost: str, fix: str) -> None:
    options = Options(
        model=tmp_path / "m.onnx", target="x86-avx2", data={"x": np.ones((1, 4, 64))}, output=tmp_path / "o"
    )
    with pytest.raises(UsageError, match=fix):
        sweep_model(options, "onnxruntime", cost, 4)
