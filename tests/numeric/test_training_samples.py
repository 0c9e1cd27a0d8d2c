"""Which samples train, which judge, and in what order they come."""

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch", reason="training needs PyTorch: pip install bitwright[qat]")
torch.set_num_threads(1)

from bitwright.compiler.errors import DataError  # noqa: E402
from bitwright.compiler.ingest.dataset import dataset_from_memory  # noqa: E402
from bitwright.compiler.training.samples import load  # noqa: E402

BATCHED = "net (float[N, 2] x) => (float[N, 2] y) { y = Relu (x) }"
FIXED = "net (float[3, 2] x) => (float[3, 2] y) { y = Relu (x) }"
PICTURES = "net (float[N, 3, 8, 9] x) => (float[N, 3, 8, 9] y) { y = Relu (x) }"
INDICES = "net (int64[N, 2] x) => (int64[N, 2] y) { y = Abs (x) }"
X = np.stack([np.arange(20), np.arange(20) * 10], axis=1).astype(np.float32)
DEFAULTS = {"batch": 4, "seed": 3, "mixture": 0.0, "held": 0.2}


def data_of(text, x, labels=None, **changes):
    model = ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {text}'))
    return load(dataset_from_memory(x, model), labels, **{**DEFAULTS, **changes})


def numbers(batches):
    return [int(v) for batch in batches for v in batch.feeds["x"][:, 0].tolist()]


def test_an_epoch_shows_every_sample_once_and_none_that_judges():
    data = data_of(BATCHED, {"x": X})
    assert data.steps_per_epoch == 4
    first, second = (numbers(data.at(4 * e + k) for k in range(4)) for e in (0, 1))
    judging = numbers(data.held_out())
    assert len(judging) == 4
    assert sorted(first) == sorted(second) == sorted(set(range(20)) - set(judging))
    assert first != second


def test_a_batch_depends_on_seed_and_step_alone():
    data, again, other = (data_of(BATCHED, {"x": X}, seed=s, mixture=0.5) for s in (3, 3, 4))
    assert all(torch.equal(data.at(k).feeds["x"], again.at(k).feeds["x"]) for k in (7, 2, 0))
    assert any(not torch.equal(data.at(k).feeds["x"], other.at(k).feeds["x"]) for k in (7, 2, 0))


def test_labels_go_with_their_samples_and_mixtures_have_none():
    labels = np.arange(20) % 5
    batch = data_of(BATCHED, {"x": X}, labels).at(1)
    assert batch.labels.tolist() == [int(v) % 5 for v in batch.feeds["x"][:, 0]]
    mixed = data_of(BATCHED, {"x": X}, labels, mixture=1.0).at(1)
    assert mixed.labels is None
    found = mixed.feeds["x"]
    torch.testing.assert_close(found[:, 1], 10 * found[:, 0])  # a convex combination keeps what is linear
    assert not bool((found[:, 0] == found[:, 0].round()).all())


def test_some_samples_train_are_whole_batches_and_no_mixtures():
    data = data_of(BATCHED, {"x": X}, mixture=1.0)
    few, all_of_them = numbers(data.some(10)), numbers(data.some(100))
    assert [len(b.feeds["x"]) for b in data.some(10)] == [4, 4]
    assert few == numbers(data.some(10)) == all_of_them[:8]
    assert sorted(all_of_them) == sorted(set(range(20)) - set(numbers(data.held_out())))


def is_box(mask):
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return int(mask.sum()) == int(rows[-1] - rows[0] + 1) * int(columns[-1] - columns[0] + 1)


def test_half_of_the_mixtures_have_a_box_of_another_sample():
    """Samples of one value each: a blend has one value, too, with a pasted box there are two of the originals."""
    x = np.broadcast_to(np.arange(20, dtype=np.float32)[:, None, None, None], (20, 3, 8, 9)).copy()
    data = data_of(PICTURES, {"x": x}, mixture=1.0)
    samples = [sample for step in range(40) for sample in data.at(step).feeds["x"]]
    pasted = [sample for sample in samples if len(sample.unique()) > 1]
    assert 20 < len(pasted) < 120  # about half of 160, less those that were mixed with themselves
    for sample in pasted:
        values = sample.unique().tolist()
        assert len(values) == 2
        assert set(values) <= set(range(20))
        assert bool((sample == sample[0]).all())  # three colours are cut alike
        inside = sample[0] == values[0]
        assert is_box(inside) or is_box(~inside)


def test_a_model_of_a_fixed_batch_gets_its_samples_one_by_one():
    x = np.arange(30, dtype=np.float32).reshape(5, 3, 2)
    labels = np.arange(15).reshape(5, 3)
    data = data_of(FIXED, {"x": x}, labels)
    batch = data.at(0)
    assert batch.feeds["x"].shape == (3, 2)
    assert batch.labels.tolist() == labels[int(batch.feeds["x"][0, 0]) // 6].tolist()


def test_samples_of_several_shapes_are_refused():
    wide = "net (float[N, M] x) => (float[N, M] y) { y = Relu (x) }"
    samples = [{"x": np.zeros((1, k), np.float32)} for k in (2, 3)]
    with pytest.raises(DataError, match="2 different shapes"):
        data_of(wide, samples)


def test_one_sample_is_too_few():
    with pytest.raises(DataError, match="one sample"):
        data_of(BATCHED, {"x": X[:1]})


def test_indices_cannot_be_mixed():
    with pytest.raises(DataError, match="indices cannot be mixed"):
        data_of(INDICES, {"x": X.astype(np.int64)}, mixture=0.5)


def judged_by(text, x, judges, labels=None):
    model = ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {text}'))
    data, judging = (dataset_from_memory({"x": a}, model) for a in (x, judges))
    return load(data, labels, **DEFAULTS, judging=judging)


def test_samples_that_are_named_as_judges_judge_and_all_others_train():
    data = judged_by(BATCHED, X[:15], X[15:], np.arange(20))
    assert numbers(data.held_out()) == list(range(15, 20))
    assert sorted(numbers(data.at(k) for k in range(data.steps_per_epoch))) == list(range(15))
    assert [int(v) for batch in data.held_out() for v in batch.labels] == list(range(15, 20))


def test_a_fixed_batch_has_judges_of_its_own_too():
    x = np.arange(30, dtype=np.float32).reshape(5, 3, 2)
    data = judged_by(FIXED, x[:3], x[3:])
    assert [batch.feeds["x"][0, 0].item() for batch in data.held_out()] == [18.0, 24.0]


def test_judges_of_another_size_are_refused():
    wide = "net (float[N, M] x) => (float[N, M] y) { y = Relu (x) }"
    with pytest.raises(DataError, match=r"samples of shape \(3,\), those to train on \(2,\)"):
        judged_by(wide, X, np.zeros((4, 3), np.float32))


def test_labels_are_those_of_the_judges_as_well():
    with pytest.raises(DataError, match="15 labels for 20 samples"):
        judged_by(BATCHED, X[:15], X[15:], np.arange(15))
