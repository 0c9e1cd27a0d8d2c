"""Streamed moments against those of all activations at once."""

import numpy as np
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest

from bitwright.compiler.calibrate.moments import MomentSums, RowSample, collect_moments, moment_passes
from bitwright.compiler.calibrate.patches import RowGeometry, spread
from bitwright.compiler.errors import DataError, UsageError
from bitwright.compiler.ingest.dataset import dataset_from_memory

LINEAR = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N, L, 4] x) => (float[N, L, 3] y, float[N, L, 3] z, float[N, L, 2] v)
<float[4, 3] w = {1, -2, 3, -4, 5, -6, 7, -8, 9, -10, 11, -12}, float[1] u = {0}, float[1] t = {0}>
{
    a = Relu (x)
    y = MatMul (a, w)
    z = MatMul (a, u)
    v = MatMul (z, t)
}
"""


def with_weights(text, *, seed=0, **shapes):
    """Return the model with named nodes and random weights of the given shapes."""
    model = ir.from_proto(onnx.parser.parse_model(text))
    rng = np.random.default_rng(seed)
    for name, shape in shapes.items():
        array = rng.normal(size=shape).astype(np.float32)
        model.graph.initializers[name].const_value = ir.Tensor(array, name=name)
        model.graph.initializers[name].shape = ir.Shape(shape)
    for node in model.graph:
        node.name = node.outputs[0].name
    return model


def linear_model():
    return with_weights(LINEAR, u=(4, 3), t=(3, 2))


def texts(count=7, seed=1):
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=(1, 2 + k % 3, 4)).astype(np.float32)} for k in range(count)]


def check_against(moments, rows):
    """Compare with moments of all rows (n, G, K); float32 products allow 1e-6 of the largest."""
    wide = rows.astype(np.float64)
    assert moments.count == len(rows)
    np.testing.assert_allclose(moments.mean, wide.mean(axis=0), atol=1e-6)
    second = np.einsum("ngk,ngl->gkl", wide, wide) / len(rows)
    np.testing.assert_allclose(moments.second, second, atol=1e-6 * np.abs(second).max())
    np.testing.assert_allclose(moments.power, np.diagonal(second, axis1=1, axis2=2), atol=1e-5)
    np.testing.assert_array_equal(moments.largest, np.abs(rows).max(axis=0))


def test_a_linear_layers_moments_are_those_of_all_tokens():
    model, samples = linear_model(), texts()
    found = collect_moments(model, dataset_from_memory(samples, model), ["y", "z", "v"])
    rows = np.concatenate([np.maximum(s["x"], 0).reshape(-1, 1, 4) for s in samples])
    check_against(found["y"], rows)
    np.testing.assert_array_equal(found["y"].rows, rows)
    assert found["y"] is found["z"] and found["v"] is not found["y"]
    z = rows @ model.graph.initializers["u"].const_value.numpy()
    np.testing.assert_allclose(found["v"].rows, z, atol=1e-5)
    check_against(found["v"], found["v"].rows)


def test_several_passes_give_what_one_gives():
    model = linear_model()
    data = dataset_from_memory(texts(), model)
    calls = []
    parts = list(
        moment_passes(model, data, ["v", "y", "z"], memory_bytes=1, progress=lambda *c: calls.append(c))
    )
    whole = collect_moments(model, data, ["v", "y", "z"])
    assert [set(p) for p in parts] == [{"v"}, {"y", "z"}]
    for name in whole:
        part = next(p[name] for p in parts if name in p)
        np.testing.assert_array_equal(part.second, whole[name].second)
    assert calls[-1] == (2 * len(data), 2 * len(data))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


CONV = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N, 4, 9, 8] x) => (float[N, 6, A, B] y)
<float[1] w = {0}>
{ y = Conv <ATTRIBUTES> (x, w) }
"""


@pytest.mark.parametrize(
    ("attributes", "shape"),
    [
        ("pads = [1, 1, 1, 1]", (6, 4, 3, 3)),
        ("pads = [0, 2, 1, 0], strides = [2, 1]", (6, 4, 3, 2)),
        ("dilations = [2, 3], pads = [1, 0, 0, 2]", (6, 4, 3, 2)),
        ("group = 2, pads = [1, 1, 1, 1], strides = [2, 2]", (6, 2, 3, 3)),
        ("group = 4", (8, 1, 2, 2)),
        ('auto_pad = "SAME_UPPER", strides = [2, 2]', (6, 4, 3, 4)),
        ('auto_pad = "SAME_LOWER", strides = [2, 3]', (6, 4, 3, 2)),
        ('auto_pad = "VALID"', (6, 4, 3, 3)),
    ],
)
def test_patches_times_the_weight_matrices_are_the_convolution(attributes, shape):
    model = with_weights(CONV.replace("ATTRIBUTES", attributes).replace("N, 6,", f"N, {shape[0]},"), w=shape)
    rng = np.random.default_rng(2)
    samples = [{"x": rng.normal(size=(1, 4, 9, 8)).astype(np.float32)} for _ in range(3)]
    moments = collect_moments(model, dataset_from_memory(samples, model), ["y"])["y"]
    weight = model.graph.initializers["w"].const_value.numpy()
    matrices = weight.reshape(moments.groups, -1, moments.depth)  # (G, Cout / G, K)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    outputs = np.concatenate([session.run(None, s)[0] for s in samples])
    expected = outputs.transpose(0, 2, 3, 1).reshape(-1, shape[0])
    computed = np.einsum("ngk,gck->ngc", moments.rows, matrices).reshape(len(expected), -1)
    assert moments.count == len(expected)
    np.testing.assert_allclose(computed, expected, atol=1e-4)
    check_against(moments, moments.rows)


def test_a_large_image_gives_evenly_spaced_patches_of_every_column():
    geometry = RowGeometry(1, kernel=(1, 1), strides=(1, 1), dilations=(1, 1), pads=(0, 0, 0, 0))
    image = np.arange(64 * 64, dtype=np.float32).reshape(1, 1, 64, 64)
    (rows,) = geometry.rows(image, patches=500)
    assert 400 <= len(rows) <= 500
    assert set((rows.reshape(-1) % 64).astype(int)) == set(range(64))


@pytest.mark.parametrize(("count", "limit", "width"), [(10, 20, 5), (100, 7, 10), (12544, 1024, 112)])
def test_spread_stays_below_its_limit(count, limit, width):
    assert 0 < len(spread(count, limit, width)) <= limit


@pytest.mark.parametrize("wanted", [1, 3, 16])
@pytest.mark.parametrize("blocks", [[5], [1] * 50, [100, 1, 33], [7] * 30])
def test_the_row_sample_is_nearly_evenly_spaced(wanted, blocks):
    sample = RowSample(wanted)
    numbers = np.arange(sum(blocks), dtype=np.float32)[:, None]
    for part in np.split(numbers, np.cumsum(blocks)[:-1]):
        sample.update(part)
    found = sample.result()[:, 0]
    assert len(found) == min(wanted, len(numbers))
    if len(found) > 2:
        gaps = np.diff(found)
        # Three gaps at most, neighbouring Fibonacci numbers and their sum: 1, 2 and 3 are furthest apart.
        assert gaps.min() > 0 and gaps.max() <= 3 * gaps.min()


@pytest.mark.parametrize("patches", [16, 64, 96])
def test_the_row_sample_sees_every_place_of_images_of_one_size(patches):
    sample = RowSample(512)
    for _ in range(200):
        sample.update(np.arange(patches, dtype=np.float32)[:, None])
    places = sample.result()[:, 0].astype(int)
    # 512 rows of so many places: none may be missing, and none may stand for many.
    counts = np.bincount(places, minlength=patches)
    assert counts.min() > 0 and counts.max() <= 2 * 512 / patches


def test_moments_of_huge_values_do_not_overflow():
    sums = MomentSums(RowGeometry(2), "x", 8)
    sums.update(np.array([[1e30, 1.0], [1e30, -1.0]], np.float32))
    found = sums.result()
    np.testing.assert_allclose(found.second[0], [[1e60, 0], [0, 1]], rtol=1e-6, atol=1e50)


def test_an_input_that_overflows_is_refused_with_its_name():
    model = linear_model()
    model.graph.initializers["u"].const_value = ir.Tensor(np.full((4, 3), 3e38, np.float32), name="u")
    with pytest.raises(DataError, match="tensor 'z'"):
        collect_moments(model, dataset_from_memory(texts(), model), ["v"])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad):
    sums = MomentSums(RowGeometry(2), "x", 8)
    with pytest.raises(DataError, match="tensor 'x'"):
        sums.update(np.array([[1.0, bad]], np.float32))


def test_names_that_are_no_anchor_are_refused():
    model = linear_model()
    data = dataset_from_memory(texts(), model)
    with pytest.raises(UsageError, match="no node of this name"):
        collect_moments(model, data, ["nobody"])
    with pytest.raises(UsageError, match="only a MatMul"):
        collect_moments(model, data, ["a"])


def test_an_input_that_is_always_empty_is_refused():
    sums = MomentSums(RowGeometry(2), "x", 8)
    sums.update(np.zeros((0, 2), np.float32))
    with pytest.raises(DataError, match="tensor 'x'"):
        sums.result()
