"""``--method judged``: the better of two methods by samples that did not calibrate, and the default where none is."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest

from bitwright.compiler import judged_method
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.errors import UsageError
from bitwright.compiler.options import Options
from bitwright.compiler.pipeline import FRONT
from bitwright.targets.loader import load_profile

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 3, 8, 8] x, float[8, 3, 3, 3] w1, float[8] b1, float[6, 8, 3, 3] w2) => (float[N, 6, 6, 6] y) {
    a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w1, b1)
    r = Relu (a)
    y = Conv <kernel_shape = [3, 3]> (r, w2)
}
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    found = onnx.parser.parse_model(TEXT)
    for name, shape in {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (6, 8, 3, 3)}.items():
        value = rng.normal(size=shape).astype(np.float32)
        found.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    del found.graph.input[1:]
    onnx.save(found, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def migrated(model: Path, samples: int, method: str = "judged") -> tuple[str, str]:
    """Run the phases up to migration; return the method that calibration will use, and the phase's last note."""
    x = np.random.default_rng(1).normal(size=(samples, 3, 8, 8)).astype(np.float32)
    options = Options(model=model, target="x86-avx2", data={"x": x}, dims={"N": 1}, method=method)
    c = Compilation(options, load_profile("x86-avx2"))
    last: list[str] = []
    for name, phase in FRONT:
        with c.recorded(name) as notes:
            phase(c, notes)
            last = notes
        if name == "migrate":
            break
    return c.options.method, last[-1]


@pytest.mark.parametrize("first", [0, 1])
def test_the_method_that_is_better_on_unseen_samples(
    model: Path, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    """A tenth of normally distributed values cut off is worse than none, whichever of the two is the default."""
    candidates = ("minmax", "percentile:90")
    monkeypatch.setattr(judged_method, "CANDIDATES", candidates[first:] + candidates[:first])
    method, note = migrated(model, 16)
    assert method == "minmax" and note.startswith("ranges by minmax")
    quality = {name: float(db) for name, db in re.findall(r"(minmax|percentile:90) (\d+\.\d) dB", note)}
    assert quality["minmax"] > quality["percentile:90"] + 5


def test_what_hardly_differs_leaves_the_default(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judged_method, "CANDIDATES", ("percentile:99.99", "percentile:99.995"))
    assert migrated(model, 16)[0] == "percentile:99.99"


def test_too_few_samples_cannot_judge(model: Path) -> None:
    method, note = migrated(model, 7)
    assert (method, note) == ("mse", "ranges by mse: fewer than 8 samples cannot judge")


def test_a_named_method_is_not_judged(model: Path) -> None:
    method, note = migrated(model, 16, "minmax")
    assert method == "minmax" and "unseen samples" not in note


def test_a_method_nobody_knows(model: Path) -> None:
    with pytest.raises(UsageError, match=r"(?s)unknown calibration method 'judge'.*did you mean 'judged'"):
        migrated(model, 16, "judge")
