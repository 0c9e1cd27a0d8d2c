"""Alignment of narrow convolutions with the float model: moments, and the same numbers after folding."""

import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import training_models

torch = pytest.importorskip("torch", reason="training needs PyTorch: pip install bitwright[qat]")
torch.set_num_threads(1)

from bitwright.compiler.compilation import Compilation, Silent  # noqa: E402
from bitwright.compiler.ingest.dataset import dataset_from_memory  # noqa: E402
from bitwright.compiler.ort.session import SessionConfig, open_session, run  # noqa: E402
from bitwright.compiler.training import entry  # noqa: E402
from bitwright.compiler.training import train as verb  # noqa: E402
from bitwright.compiler.training.alignment import FEWEST_VALUES, Alignment  # noqa: E402
from bitwright.compiler.training.samples import load  # noqa: E402
from bitwright.targets.loader import load_profile  # noqa: E402

PLAIN = SessionConfig(optimize=False)
OPTIONS, TRAINING = training_models.options, training_models.training


@dataclasses.dataclass
class Case:
    """Student and teacher at the start of training, what aligns them, and a batch."""

    student: object
    teacher: object
    alignment: Alignment | None
    feeds: dict

    def outputs(self):
        with torch.no_grad():
            self.teacher(self.feeds)
            return self.student(self.feeds)

    def integers(self):
        points = self.student.points
        return {
            key: (self.student.weight(name) / points.weight(key).scale(None).reshape(-1, 1, 1, 1)).detach()
            for key, (name, _) in points.weight_names.items()
            if self.student.weight(name).dim() == 4
        }


def case(folder, **changes):
    """Return the small network's; its third convolution has no bias, its product is no convolution."""
    training = TRAINING(**changes)
    c = Compilation(OPTIONS(folder), load_profile(training_models.TARGET), Silent())
    tensors = verb.start_plan(c, training)
    student, teacher, _ = verb._modules(c, training, tensors)
    data = verb._data(c, training)
    alignment = verb._alignment(c.model, student, teacher, data)
    if alignment is not None:
        student.watch, teacher.watch = alignment.align, alignment.observe
    return Case(student, teacher, alignment, next(data.some(training.batch)).feeds)


@pytest.fixture
def folder(tmp_path):
    training_models.write(tmp_path)
    return tmp_path


def watched(module, names):
    """Record what a module passes on."""
    seen, before = {}, module.watch

    def watch(name, value):
        seen[name] = result = before(name, value)
        return result

    module.watch = watch
    return seen


def test_narrow_convolutions_with_a_bias_are_aligned(folder):
    found = case(folder).alignment
    assert [layer.source.output for layer in found] == ["c0", "c1"]


def test_channels_have_the_moments_of_the_float_model(folder):
    it = case(folder)
    student, teacher = watched(it.student, ("c0", "c1")), watched(it.teacher, ("c0", "c1"))
    it.outputs()
    for name in ("c0", "c1"):
        (variance, mean), (wanted, centre) = (
            torch.var_mean(seen[name], (0, 2, 3), correction=0) for seen in (student, teacher)
        )
        # float32, and the share of the mean variance that is added to both variances
        assert torch.allclose(mean, centre, atol=1e-5 * float(centre.abs().max()))
        assert torch.allclose(variance, wanted, rtol=1e-3)


def test_folded_is_what_was_aligned(folder, monkeypatch):
    monkeypatch.setattr("bitwright.compiler.training.alignment.WIDEST", 7)
    # Fine grids, so that what the order of float operations decides, a step here or there, stays small: 7 bits.
    it = case(folder, weights=7, activations=8)
    with torch.no_grad():
        for layer in it.alignment:
            layer.log_gain.normal_(0, 0.1)
            layer.shift.normal_(0, 0.1)
    aligned, before = it.outputs(), it.integers()
    it.alignment.fold(it.student, it.teacher, [it.feeds])
    with it.alignment.inactive():
        plain = it.outputs()
    for name, value in aligned.items():
        assert float((value - plain[name]).abs().max()) < 0.02 * float(value.abs().max())
    for key, steps in it.integers().items():
        assert torch.allclose(steps, before[key], rtol=1e-5), "folding leaves the integers alone"


def test_moments_of_several_batches_are_those_of_their_union(folder):
    it, both = case(folder, batch=16), case(folder, batch=8)
    x = it.feeds["x"]
    halves = [{"x": x[:8]}, {"x": x[8:]}]
    # The first layer alone: what later ones see was aligned batch by batch.
    for one, batches in ((it, [it.feeds]), (both, halves)):
        one.alignment.fold(one.student, one.teacher, batches)
    for name in ("w0", "b0"):
        assert torch.allclose(it.student.weight(name), both.student.weight(name), rtol=1e-3, atol=1e-4)


def test_a_channel_that_never_varies_stays_finite(folder):
    model = onnx.load(folder / "model.onnx")
    (weight,) = (t for t in model.graph.initializer if t.name == "w0")
    array = onnx.numpy_helper.to_array(weight).copy()
    array[3] = 0
    weight.CopyFrom(onnx.numpy_helper.from_array(array, "w0"))
    onnx.save(model, folder / "model.onnx")
    it = case(folder)
    it.alignment.fold(it.student, it.teacher, [it.feeds])
    for layer in it.alignment:
        for value in (layer.source.weight, layer.source.bias):
            assert bool(torch.isfinite(it.student.weight(value)).all())
        assert bool(torch.isfinite(it.student.points.weight(layer.source.key).scale(None)).all())


def test_one_value_of_a_channel_becomes_the_float_model_s(folder):
    found = case(folder).alignment
    wanted = torch.arange(8.0).reshape(1, 8, 1, 1)
    found.observe("c0", wanted)
    assert torch.equal(found.align("c0", torch.randn(1, 8, 1, 1)), wanted)


@pytest.mark.parametrize(
    "changes",
    [{"weights": 4}, {"batch": FEWEST_VALUES // 64 - 1}, {"weights": "ternary", "scaling": "mean"}],
    ids=["wide", "few-values", "scales-not-learned"],
)
def test_layers_that_do_not_fit_are_left_alone(folder, changes):
    assert case(folder, **changes).alignment is None


def test_what_is_judged_is_what_is_written(folder):
    trained = entry.train(OPTIONS(folder), TRAINING(epochs=2.0))
    again = entry.train(OPTIONS(folder, "again.onnx"), TRAINING(epochs=2.0))
    first, second = (onnx.load(t.model).graph.initializer for t in (trained, again))
    assert all(a == b for a, b in zip(first, second, strict=True))
    x = np.load(folder / "x.npz")["x"]
    data = load(
        dataset_from_memory({"x": x}, ir.load(folder / "model.onnx")),
        None,
        batch=8,
        seed=0,
        mixture=0.0,
        held=0.2,
    )
    floating, rounded = (
        np.concatenate([run(open_session(ir.load(m), PLAIN), {"x": x[data.held]})["y"]])
        for m in (folder / "model.onnx", trained.model)
    )
    divergence = (floating * np.log(floating / rounded)).sum(-1).mean()
    # The file has its outputs in 8 bits, training judged the logits before them.
    assert divergence == pytest.approx(trained.outcome.best_loss, rel=0.2)
