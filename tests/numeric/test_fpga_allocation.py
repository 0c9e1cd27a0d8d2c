"""Formats and foldings of a small network, chosen under budgets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from bitwright.compiler import folding, pipeline
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.errors import InfeasibleBudgetError, UsageError
from bitwright.compiler.options import Options
from bitwright.compiler.plan.plan_file import plan_to_yaml
from bitwright.compiler.recipe.loader import load_recipe
from bitwright.targets.loader import load_profile

MODEL = """
<ir_version: 9, opset_import: ["" : 17]>
net (float[1,3,12,12] x) => (float[1,10] y) {
  a = Conv<pads=[1,1,1,1]>(x, wa, ba)
  b = Relu(a)
  c = Conv<pads=[1,1,1,1], strides=[2,2]>(b, wc, bc)
  d = Relu(c)
  e = GlobalAveragePool(d)
  f = Flatten(e)
  y = Gemm(f, wy, by)
}
"""
SHAPES = {"wa": (16, 3, 3, 3), "ba": (16,), "wc": (32, 16, 3, 3), "bc": (32,), "wy": (32, 10), "by": (10,)}
TARGET = "ecp5-25f"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(5)
    proto = onnx.parser.parse_model(MODEL)
    for name, shape in SHAPES.items():
        array = rng.standard_normal(shape) / np.sqrt(max(1, np.prod(shape[1:])))
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    path = tmp_path_factory.mktemp("model") / "net.onnx"
    onnx.save(proto, path)
    return path


def quantized(model: Path, recipe: str = "int8", **options: object) -> Compilation:
    """Run the phases before anything is generated."""
    rng = np.random.default_rng(0)
    data = [{"x": rng.standard_normal((1, 3, 12, 12)).astype(np.float32)} for _ in range(8)]
    asked = Options(model, TARGET, data, recipe=recipe, **options)  # type: ignore[arg-type]
    c = Compilation(asked, load_profile(TARGET))
    for name, phase in pipeline.FRONT:
        if name not in ("audit", "tune"):
            with c.recorded(name) as notes:
                phase(c, notes)
    return c


@pytest.mark.parametrize("fps", [500.0, 5000.0])
def test_a_frame_rate_is_met_with_few_luts(model: Path, fps: float) -> None:
    found = folding.folded(quantized(model, budget={"fps": fps}), [])
    taken = found.taken
    assert 1e8 / taken.cycles >= fps
    # The cells of the parts are those of the whole.
    assert taken.luts == pytest.approx(found.beside.luts + sum(o.taken.luts for o in found.options.values()))
    assert found.allocation.gap < 1e-3


def test_more_frames_take_more_cells(model: Path) -> None:
    slow, fast = (folding.folded(quantized(model, budget={"fps": fps}), []).taken for fps in (500.0, 5000.0))
    assert fast.cycles < slow.cycles
    assert fast.luts + 150 * fast.dsps > slow.luts + 150 * slow.dsps


def test_without_a_rate_the_shortest_interval_that_fits(model: Path) -> None:
    few = folding.folded(quantized(model, budget={"luts": 5000.0, "dsps": 8.0}), []).taken
    many = folding.folded(quantized(model, budget={"luts": 15000.0, "dsps": 8.0}), []).taken
    assert few.luts <= 5000
    assert few.dsps <= 8
    assert many.cycles < few.cycles


def test_bits_are_given_up_where_cells_are_few(model: Path) -> None:
    int8 = folding.folded(quantized(model, budget={"fps": 4000.0, "dsps": 8.0}), []).taken
    c = quantized(
        model, "short-mixed", budget={"fps": 4000.0, "dsps": 8.0, "luts": 0.8 * int8.luts}, golden=1
    )
    mixed = folding.folded(c, [])
    assert c.plan is not None and c.allocation is not None
    formats = {d.format for d in c.plan.nodes.values() if d.constant_weight}
    assert formats & {"w6a8", "w5a8", "w4a8", "w3a8", "w2a8", "ternary-a8"}
    assert mixed.taken.luts <= 0.8 * int8.luts
    assert 1e8 / mixed.taken.cycles >= 4000
    assert set(c.allocation.formats.values()) == formats


def test_what_does_not_fit_is_said_with_what_would(model: Path) -> None:
    with pytest.raises(InfeasibleBudgetError, match="no choice of formats meets") as caught:
        folding.folded(quantized(model, budget={"fps": 5000.0, "luts": 2000.0, "dsps": 0.0}), [])
    assert caught.value.exit_code == 4
    assert "allow" in caught.value.fix


def test_a_plan_keeps_its_foldings(model: Path, tmp_path: Path) -> None:
    c = quantized(model, budget={"fps": 1000.0})
    chosen = folding.choose_foldings(c, [])
    assert c.plan is not None
    c.plan.foldings = {name: dict(values) for name, values in chosen.items()}
    path = tmp_path / "plan.yaml"
    path.write_text(plan_to_yaml(c.plan, c.recipe.as_plain()), "utf-8")
    assert load_recipe(str(path)).foldings == chosen
    again = quantized(model, str(path))
    assert folding.choose_foldings(again, []) == chosen


@pytest.mark.parametrize(("option", "what"), [({"latency": 1e-3}, "latency"), ({"ram": 1e5}, "ram")])
def test_bounds_that_circuits_do_not_have_are_refused(
    model: Path, option: dict[str, float], what: str
) -> None:
    with pytest.raises(UsageError, match=f"a circuit has no '{what}'"):
        quantized(model, budget=option)
