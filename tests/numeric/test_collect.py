"""One streaming pass in ONNX Runtime against running the whole model by hand."""

import numpy as np
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest

from bitwright.compiler.calibrate import observed
from bitwright.compiler.calibrate.cache import data_digest, load_statistics, model_digest, save_statistics
from bitwright.compiler.calibrate.histogram import GrowingHistogram
from bitwright.compiler.calibrate.methods import Entropy, MinMax, MovingAverage, Mse, Percentile
from bitwright.compiler.calibrate.stream import collect
from bitwright.compiler.errors import DataError, ModelError, UsageError
from bitwright.compiler.graph import saving
from bitwright.compiler.ingest.dataset import dataset_from_memory

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N, L, 4] x, int64[N, L] ids) => (float[N, L, 3] y)
<float[4, 3] w = {1, -2, 3, -4, 5, -6, 7, -8, 9, -10, 11, -12}>
{
    scale = Constant <value = float {0.5}> ()
    h = Mul (x, scale)
    a = Relu (h)
    m = MatMul (a, w)
    k = Cast <to = 1> (ids)
    y = Softmax (m)
    unused = Neg (y)
}
"""


def model_of(text=TEXT):
    return ir.from_proto(onnx.parser.parse_model(text))


class Samples:
    """Samples in memory; a batch never mixes shapes."""

    def __init__(self, samples):
        self.samples = samples
        self.sizes = []

    def __len__(self):
        return len(self.samples)

    def batches(self, size):
        group = []
        for sample in [*self.samples, None]:
            if group and (
                sample is None or len(group) == size or self._shape(sample) != self._shape(group[0])
            ):
                self.sizes.append(len(group))
                yield {k: np.concatenate([g[k] for g in group]) for k in group[0]}
                group = []
            group.append(sample)

    @staticmethod
    def _shape(sample):
        return sample["x"].shape


def samples_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return Samples(
        [
            {
                "x": rng.normal(size=(1, n, 4)).astype(np.float32),
                "ids": rng.integers(0, 9, (1, n)),
            }
            for n in lengths
        ]
    )


LENGTHS = [3, 3, 7, 1, 5, 5, 5, 30]
TENSORS = ["a", "x", "m", "k"]


def values_by_hand(model, dataset, tensors):
    """Run every sample alone with all wanted values as outputs, and keep everything."""
    model = model.clone()
    values = {v.name: v for node in model.graph for v in node.outputs}
    model.graph.outputs.extend(values[t] for t in tensors if t in values)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    runs = [
        {**s, **dict(zip((o.name for o in session.get_outputs()), session.run(None, s), strict=True))}
        for s in dataset.samples
    ]
    return {t: [r[t] for r in runs] for t in tensors}


@pytest.mark.parametrize("method", [MinMax(), Percentile(), Mse(), Entropy()], ids=str)
def test_statistics_equal_a_run_by_hand(method):
    model, data = model_of(), samples_of(LENGTHS)
    found = collect(model, data, TENSORS, method=method)
    assert list(found) == TENSORS
    for name, arrays in values_by_hand(model, data, TENSORS).items():
        whole = np.concatenate([a.ravel() for a in arrays])
        assert (found[name].low, found[name].high) == (whole.min(), whole.max())
        if method == MinMax():
            assert found[name].histogram is None
            continue
        expected = GrowingHistogram()
        expected.update(whole)
        histogram = found[name].histogram
        assert np.array_equal(histogram.counts, expected.counts)
        assert (histogram.exponent, histogram.first, histogram.zeros) == (
            expected.exponent,
            expected.first,
            expected.zeros,
        )


def test_a_moving_average_is_taken_sample_by_sample():
    model, data = model_of(), samples_of([5] * 8)
    found = collect(model, data, ["m"], method=MovingAverage())["m"]
    by_hand = values_by_hand(model, data, ["m"])["m"]
    assert found.batches == 8
    assert found.average_low == pytest.approx(np.mean([a.min() for a in by_hand]))
    assert found.average_high == pytest.approx(np.mean([a.max() for a in by_hand]))


def test_the_largest_magnitude_of_each_channel():
    model, data = model_of(), samples_of(LENGTHS)
    found = collect(model, data, ["x", "m"], method=MinMax(), channel_axes={"m": -1})
    expected = np.max([np.abs(a).max(axis=(0, 1)) for a in values_by_hand(model, data, ["m"])["m"]], axis=0)
    np.testing.assert_array_equal(found["m"].channel_max, expected)
    assert found["x"].channel_max is None


def test_the_model_is_not_changed_and_its_tail_is_not_run():
    model, data = model_of(), samples_of([2])
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    with observed.observe(model, ["a", "x"]) as run:
        assert [o.name for o in run.session.get_outputs()] == ["a"]
        assert sorted(name for name, _ in run.run(data.samples[0])) == ["a", "x"]
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    pruned = observed._with_outputs(model, ["a"])
    assert [n.op_type for n in pruned.graph] == ["Constant", "Mul", "Relu"]
    assert not pruned.graph.initializers


def test_graph_inputs_alone_need_no_session():
    with observed.observe(model_of(), ["x"]) as run:
        assert run.session is None
    found = collect(model_of(), samples_of(LENGTHS), ["x"], method=Percentile())
    assert found["x"].histogram.count == 4 * sum(LENGTHS)


def test_weights_in_a_mapped_file_give_the_same_statistics(monkeypatch):
    model, data = model_of(), samples_of(LENGTHS)
    inline = collect(model, data, ["m"], method=MinMax())["m"]
    monkeypatch.setattr(saving, "MAP_ABOVE_BYTES", 0)
    mapped = collect(model, data, ["m"], method=MinMax())["m"]
    assert (inline.low, inline.high) == (mapped.low, mapped.high)


@pytest.mark.parametrize(
    ("batch_bytes", "size"),
    # One sample gives "a" 1 x 5 x 4 float32 values: 80 bytes.
    [(1 << 20, 16), (80 * 4 + 79, 4), (1, 1)],
    ids=["as many as allowed", "byte budget", "at least one"],
)
def test_the_batch_follows_the_byte_budget(batch_bytes, size):
    data = samples_of([5] * 32)
    collect(model_of(), data, ["a"], method=MinMax(), batch_bytes=batch_bytes)
    assert data.sizes[-(32 // size) :] == [size] * (32 // size)


def test_a_model_that_takes_one_sample_only_is_given_one():
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N, 5, 4] x) => (float[1, 20] y)
    { shape = Constant <value = int64[2] {1, 20}> ()
      y = Reshape (x, shape) }
    """
    model, data = model_of(text), samples_of([5] * 6)
    found = collect(model, data, ["y"], method=MinMax())
    assert data.sizes[-6:] == [1] * 6
    assert found["y"].high == max(s["x"].max() for s in data.samples)


def test_the_real_dataset_is_read():
    model, data = model_of(), samples_of(LENGTHS)
    dataset = dataset_from_memory(data.samples, model)
    found, expected = (collect(model, d, ["m"], method=Percentile())["m"] for d in (dataset, data))
    np.testing.assert_equal(vars(found.histogram), vars(expected.histogram))


def test_a_static_batch_is_one_sample():
    model = model_of(TEXT.replace("[N, L, 4]", "[4, L, 4]").replace("[N, L]", "[4, L]"))
    rng, seen = np.random.default_rng(0), []
    samples = [
        {"x": rng.normal(size=(4, 2, 4)).astype(np.float32), "ids": np.ones((4, 2), np.int64)}
        for _ in range(3)
    ]
    found = collect(
        model,
        dataset_from_memory(samples, model),
        ["x", "m"],
        method=MinMax(),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert found["x"].high == max(s["x"].max() for s in samples)


def test_progress_counts_samples():
    seen = []
    collect(
        model_of(),
        samples_of(LENGTHS),
        ["a"],
        method=MinMax(),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == sorted(seen)
    assert seen[-1] == (len(LENGTHS), len(LENGTHS))


@pytest.mark.parametrize(
    ("tensor", "error", "message"),
    [
        ("mm", UsageError, r"tensor 'mm': .*\n.*did you mean 'm'"),
        ("w", UsageError, "tensor 'w': .*constant"),
        ("ids", DataError, "tensor 'ids': .*floating-point"),
    ],
)
def test_wrong_tensors_are_refused_by_name(tensor, error, message):
    with pytest.raises(error, match=message):
        collect(model_of(), samples_of([2]), ["a", tensor], method=MinMax())


def test_data_without_an_input_are_refused():
    data = samples_of([2])
    del data.samples[0]["ids"]
    with pytest.raises(DataError, match=r"no array for input 'ids'\n.*found: x"):
        collect(model_of(), data, ["a"], method=MinMax())


def test_data_of_a_wrong_shape_are_refused():
    data = samples_of([2])
    data.samples[0]["x"] = np.zeros((1, 2, 5), np.float32)
    with pytest.raises(DataError, match="cannot run the model on a batch"):
        collect(model_of(), data, ["a"], method=MinMax())


def test_no_samples_are_refused():
    with pytest.raises(DataError, match=r"tensor 'a': no sample"):
        collect(model_of(), samples_of([]), ["a"], method=MinMax())


def test_nan_inside_the_model_is_refused_by_name():
    data = samples_of([2, 2, 2])
    data.samples[1]["x"][0, 1, 2] = np.nan
    with pytest.raises(DataError, match=r"tensor 'm': .*NaN"):
        collect(model_of(), data, ["m"], method=MinMax())


def test_a_model_that_onnxruntime_cannot_load_is_refused():
    text = """
    <ir_version: 8, opset_import: ["" : 17, "nowhere" : 1]>
    net (float[N] x) => (float[N] y) { y = nowhere.Op (x) }
    """
    with pytest.raises(ModelError, match="cannot load"):
        collect(model_of(text), samples_of([2]), ["y"], method=MinMax())


class TestCache:
    @pytest.fixture
    def saved(self, tmp_path):
        model, data = model_of(), samples_of(LENGTHS)
        found = collect(model, data, TENSORS, method=Percentile(), channel_axes={"m": 2})
        keys = {"model": model_digest(model), "data": data_digest(data)}
        save_statistics(tmp_path / "s.npz", found, **keys)
        return tmp_path / "s.npz", found, keys

    def test_everything_comes_back(self, saved):
        path, found, keys = saved
        loaded = load_statistics(path, **keys)
        assert list(loaded) == list(found)
        for name, statistics in found.items():
            ours, theirs = vars(statistics).copy(), vars(loaded[name]).copy()
            a, b = vars(ours.pop("histogram")).copy(), vars(theirs.pop("histogram")).copy()
            np.testing.assert_equal(b, a)
            np.testing.assert_equal(theirs, ours)

    @pytest.mark.parametrize("key", ["model", "data"])
    def test_stale_statistics_are_refused(self, saved, key):
        path, _, keys = saved
        with pytest.raises(DataError, match=f"stale.*another {key}"):
            load_statistics(path, **{**keys, key: "0" * 64})

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"\x93NUMPY"])
    def test_other_files_are_refused(self, tmp_path, content):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(DataError, match="not a file of calibration statistics"):
            load_statistics(tmp_path / "x.npz", model="", data="")

    def test_digests_see_a_changed_weight_node_or_sample(self):
        model = model_of()
        changed = model_of(TEXT.replace("{1, -2", "{1, -3"))
        other = model_of(TEXT.replace("Softmax (m)", "Softmax <axis = 1> (m)"))
        assert len({model_digest(m) for m in (model, changed, other)}) == 3
        assert model_digest(model) == model_digest(model_of())
        data = [samples_of([3, 4]), samples_of([3, 4]), samples_of([3, 4], seed=1), samples_of([4, 3])]
        assert len({data_digest(d) for d in data}) == 3
