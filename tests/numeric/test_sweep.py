"""The sweep: a front that dominates uniform formats, and points that are recipes."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from allocation_models import MLP, SAMPLES, build

from bitwright.compiler.allocate.solve import GAP
from bitwright.compiler.errors import UsageError
from bitwright.compiler.options import Options
from bitwright.compiler.recipe.loader import load_recipe
from bitwright.compiler.sweep import Front, sweep_model


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Front:
    folder = tmp_path_factory.mktemp("sweep")
    ir.save(build(MLP), folder / "m.onnx")
    options = Options(
        model=folder / "m.onnx",
        target="x86-avx512-vnni",
        data=SAMPLES[MLP],
        output=folder / "front",
        recipe="mixed",
    )
    return sweep_model(options, "onnxruntime", "size", 8)


def test_no_uniform_format_is_better_than_the_front(front: Front) -> None:
    for point in front.uniform.values():
        size, loss = point.totals.weight_bytes, point.totals.loss
        # The solver stops within GAP of the optimum.
        losses = [p.totals.loss for p in front.points if p.totals.weight_bytes <= size]
        assert losses and min(losses) <= loss * (1 + 2 * GAP) + 1e-12


def test_the_front_falls_from_the_cheapest_to_the_exact_one(front: Front) -> None:
    sizes = [p.totals.weight_bytes for p in front.points]
    losses = [p.totals.loss for p in front.points]
    assert sizes == sorted(sizes) and losses == sorted(losses, reverse=True)
    assert losses[-1] == 0.0 and len(front.points) > 2


def test_table_picture_and_recipes_are_written(front: Front) -> None:
    folder = front.files[0].parent
    rows = list(csv.DictReader((folder / "front.csv").read_text().splitlines()))
    assert len(rows) == len(front.points)
    assert (folder / "front.svg").read_text().startswith("<?xml")
    for number, point in enumerate(front.points, start=1):
        recipe = load_recipe(str(folder / f"point-{number:02d}.yaml")).recipe
        assert recipe.nodes == {s: point.formats[g.name] for g in front.problem.groups for s in g.members}


@pytest.mark.parametrize(("cost", "fix"), [("sise", "did you mean 'size'"), ("loss", "known: energy")])
def test_an_unknown_cost_is_refused(tmp_path: Path, cost: str, fix: str) -> None:
    options = Options(
        model=tmp_path / "m.onnx", target="x86-avx2", data={"x": np.ones((1, 4, 64))}, output=tmp_path / "o"
    )
    with pytest.raises(UsageError, match=fix):
        sweep_model(options, "onnxruntime", cost, 4)
