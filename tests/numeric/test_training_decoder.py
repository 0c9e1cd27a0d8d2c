"""Weight-only formats trained on tokens: grouped ternary weights, an embedding table, and a head tied to it."""

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import training_models

torch = pytest.importorskip("torch", reason="training needs PyTorch: pip install bitwright[qat]")
torch.set_num_threads(1)

from bitwright.compiler.compilation import Compilation, Silent  # noqa: E402
from bitwright.compiler.ort.session import SessionConfig, open_session, run  # noqa: E402
from bitwright.compiler.training import train as verb  # noqa: E402
from bitwright.targets.loader import load_profile  # noqa: E402

TEXT = """
<ir_version: 10, opset_import: ["" : 20]>
net (int64[N, T] tokens) => (float[N, T, 1040] logits)
<float[1] table = {0}, float[1] gain = {0}, float[1] up = {0}, float[1] down = {0}>
{
  e = Gather (table, tokens)
  n = Mul (e, gain)
  u = MatMul (n, up)
  r = Relu (u)
  d = MatMul (r, down)
  s = Add (e, d)
  head = Transpose <perm = [1, 0]> (table)
  logits = MatMul (s, head)
}
"""
SHAPES = {"table": (1040, 64), "gain": (64,), "up": (64, 96), "down": (96, 64)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("decoder")
    model = ir.from_proto(onnx.parser.parse_model(TEXT))
    rng = np.random.default_rng(5)
    for name, shape in SHAPES.items():
        array = rng.normal(0, 0.3, shape).astype(np.float32)
        model.graph.initializers[name].const_value = ir.Tensor(array, name=name)
        model.graph.initializers[name].shape = ir.Shape(shape)
    onnx.save(ir.to_proto(model), place / "model.onnx")
    np.savez(place / "x.npz", tokens=rng.integers(0, 1040, (40, 12)))
    return place


@pytest.mark.parametrize(
    ("recipe", "scaling"),
    [("ternary", "learned"), ("ternary", "mean"), ("w4", "learned"), ("binary", "mean")],
)
def test_grouped_weights_are_trained_and_written(folder, recipe, scaling):
    training = training_models.training(None, None, scaling=scaling, epochs=2.0)
    options = training_models.options(folder, f"{recipe}.onnx", recipe=recipe)
    c = Compilation(options, load_profile(options.target), Silent())
    tensors = verb.start_plan(c, training)
    student, teacher, difference = verb._modules(c, training, tensors)
    assert difference < 1e-5
    outcome = verb._trained(c, training, student, teacher)
    assert outcome.best_loss < outcome.first_loss
    tokens = np.load(folder / "x.npz")["tokens"]
    with torch.no_grad():
        expected = student({"tokens": torch.from_numpy(tokens)})["logits"].numpy()
    model, plan = verb.written_model(c, student, {})
    assert {d.format for d in plan.nodes.values() if d.weight} == {recipe, "int8"}  # int8: the table
    found = run(open_session(model, SessionConfig(optimize=False)), {"tokens": tokens})["logits"]
    # The same integers times the same scales: what differs is the order of float32 sums.
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
