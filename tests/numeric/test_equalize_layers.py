"""Cross-layer equalization keeps the function, lowers the noise of rounding, and knows what it may not scale."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest
from pass_harness import FLOAT32, add_weights, check_pass, parse, random, run_onnxruntime

from bitwright.compiler.calibrate.channels import collect_channels
from bitwright.compiler.errors import DataError
from bitwright.compiler.graph.model import constant_array, consumers
from bitwright.compiler.ingest.dataset import dataset_from_memory
from bitwright.compiler.moments import ChannelStatistics
from bitwright.passes.channel_groups import channel_groups
from bitwright.passes.equalize_layers import EqualizeLayers, noise_gains, tensors_to_observe
from bitwright.passes.infer_shapes import InferShapes

CHAIN = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[n, 3, 8, 8] x, float[8, 3, 3, 3] w1, float[8] b1, float[8, 1, 3, 3] w2, float[8] b2, float[4, 8, 1, 1] w3)
    => (float[n, 4, 8, 8] y) {
    a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w1, b1)
    r = Relu (a)
    d = Conv <group = 8, kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r, w2, b2)
    e = Relu (d)
    y = Conv (e, w3)
}
"""

RESIDUAL = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[n, 3, 8, 8] x, float[6, 3, 1, 1] w1, float[6, 6, 3, 3] w2, float[6] b2, float[5, 6] w3, float[5] b3)
    => (float[n, 5] y) {
    a = Conv (x, w1)
    r = Relu (a)
    c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r, w2, b2)
    s = Add (r, c)
    t = Relu (s)
    p = GlobalMaxPool (t)
    f = Flatten (p)
    y = Gemm <transB = 1> (f, w3, b3)
}
"""


def shaped(model: ir.Model) -> ir.Model:
    """Return the model with the shapes that normalization would have inferred."""
    return InferShapes().run(model).model


def uneven(*shape: int, seed: int, ratio: float = 100.0) -> np.ndarray:
    """Return weights whose output channels differ in magnitude, from 1 / ratio to ratio."""
    factors = np.geomspace(1 / ratio, ratio, shape[0]).astype(np.float32)
    np.random.default_rng(seed).shuffle(factors)
    return random(*shape, seed=seed) * factors.reshape(-1, *[1] * (len(shape) - 1))


def chain(ratio: float = 100.0) -> ir.Model:
    """Return a depthwise-separable chain whose channels have very different ranges; none is always zero."""
    weights = {
        "w1": uneven(8, 3, 3, 3, seed=1, ratio=ratio),
        "w2": uneven(8, 1, 3, 3, seed=2, ratio=ratio),
        "w3": random(4, 8, 1, 1, seed=3),
    }
    biases = {"b1": random(8, seed=4) / 1000, "b2": random(8, seed=5) / 1000}
    return shaped(add_weights(parse(CHAIN), **weights, **biases))


def residual() -> ir.Model:
    """Return a block whose shortcut ties what two layers write."""
    weights = {"w1": uneven(6, 3, 1, 1, seed=1), "w2": random(6, 6, 3, 3, seed=2), "w3": random(5, 6, seed=3)}
    return shaped(add_weights(parse(RESIDUAL), b2=random(6, seed=4), b3=random(5, seed=5), **weights))


def statistics_of(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, ChannelStatistics]:
    """Return the statistics of all that the pass wants to know if everything is rounded."""
    names = tensors_to_observe(model, everything(model))
    return collect_channels(model, dataset_from_memory(dict(feeds), model), names)


def everything(model: ir.Model) -> frozenset[str]:
    """Return the names of all computed values, but not of those within a fused pair of a layer and its Relu."""
    values = [v for node in model.graph for v in node.outputs]
    return frozenset(v.name or "" for v in values if {n.op_type for n in consumers(v)} != {"Relu"})


def equalizer(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> EqualizeLayers:
    """Return the pass for a model in which everything is rounded."""
    return EqualizeLayers(statistics_of(model, feeds), everything(model))


def rounded(values: np.ndarray, axis: int | None = None, steps: int = 255) -> np.ndarray:
    """Round to nearest on an even grid that spans the values (of each index of ``axis``)."""
    others = tuple(k for k in range(values.ndim) if k != axis)
    high = np.maximum(values.max(axis=others, keepdims=True), 0)
    low = np.minimum(values.min(axis=others, keepdims=True), 0)
    step = np.where(high > low, (high - low) / steps, 1)
    return (np.rint(values / step) * step).astype(np.float32)


def layer_noise(
    model: ir.Model, value: str, weight: str, output: str, feeds: Mapping[str, np.ndarray]
) -> float:
    """Return the relative noise power at ``output`` if one activation and the weight that reads it are rounded."""
    copy = model.clone()
    named = {v.name: v for node in copy.graph for v in node.outputs}
    (reader,) = [node for node in copy.graph if named[output] in node.outputs]
    array = constant_array(reader.inputs[1])
    assert array is not None and reader.inputs[0] is named[value] and weight
    exact = run_onnxruntime(with_output(copy, [value, output]), feeds)
    tail = copy.clone()
    (node,) = [n for n in tail.graph if n.outputs[0].name == output]
    node.inputs[1].const_value = ir.Tensor(rounded(array, 0), name=node.inputs[1].name)  # type: ignore[union-attr]
    source = ir.Value(name="fed", type=ir.TensorType(ir.DataType.FLOAT), shape=node.inputs[0].shape)  # type: ignore[union-attr]
    tail.graph.inputs.append(source)
    node.replace_input_with(0, source)
    found = run_onnxruntime(with_output(tail, [output]), {**feeds, "fed": rounded(exact[value])})[output]
    return float(np.mean((found - exact[output]) ** 2) / np.mean(exact[output] ** 2))


def with_output(model: ir.Model, names: list[str]) -> ir.Model:
    """Let a model write the named values."""
    named = {v.name: v for node in model.graph for v in node.outputs}
    model.graph.outputs.clear()
    model.graph.outputs.extend(named[n] for n in names)
    return model


def test_depthwise_chain() -> None:
    model, feeds = chain(), {"x": random(16, 3, 8, 8)}
    result = check_pass(equalizer(model, feeds), model, feeds, fires=2, bound=FLOAT32)
    assert all("8 channels scaled" in note for note in result.notes)


def test_residual_block_shares_one_factor() -> None:
    model, feeds = residual(), {"x": random(16, 3, 8, 8)}
    (group,) = channel_groups(model)
    assert [v.name for v in group.values] == ["a", "r", "c", "s", "t", "p", "f"]
    assert len(group.sources) == 2
    assert len(group.sinks) == 2  # the layer inside the block is at both ends
    check_pass(equalizer(model, feeds), model, feeds, fires=1, bound=FLOAT32)


def test_rounding_costs_less_afterwards() -> None:
    """Ranges apart by orders of magnitude: equalized, the small channels get their share of 255 steps."""
    feeds = {"x": random(16, 3, 8, 8)}
    before, after = chain(), chain()
    equalizer(after, feeds).run(after)
    for value, weight, output in (("r", "w2", "d"), ("e", "w3", "y")):
        noise = [layer_noise(m, value, weight, output, feeds) for m in (before, after)]
        assert noise[1] < noise[0]
    # Depthwise weights cost nothing, so ranges 10^4 apart meet; the noise is flat where one channel counts most.
    reach = statistics_of(after, feeds)["r"].high
    assert reach.max() / reach.min() < 4


def test_prediction_is_not_far_from_the_truth() -> None:
    """Uniform, independent noise is a model: it must be right within a factor of two."""
    feeds = {"x": random(64, 3, 8, 8)}
    model = chain(ratio=1.0)  # of uneven channels few weights count, and their errors do not average
    step = EqualizeLayers(statistics_of(model, feeds), frozenset({"e"}))
    group = channel_groups(model)[1]
    noise = step._noise(group, noise_gains(model, step.statistics))
    predicted = noise.exact(np.ones(8)) / 4  # mean over the outputs' channels
    signal = np.mean(run_onnxruntime(model, feeds)["y"] ** 2)
    measured = layer_noise(model, "e", "w3", "y", feeds) * signal
    assert 0.5 < measured / predicted < 2


@pytest.mark.parametrize("axis", [0, 1])
def test_gradient_is_that_of_the_noise(axis: int) -> None:
    model, feeds = residual() if axis else chain(), {"x": random(8, 3, 8, 8)}
    step = equalizer(model, feeds)
    noise = step._noise(channel_groups(model)[0], noise_gains(model, step.statistics))
    place = random(len(noise.tensors[0].high), seed=7).astype(np.float64) * 0.3
    value, gradient = noise.smooth(place)
    assert value >= noise.exact(np.exp(place)) > 0
    small = 1e-5
    for k in range(len(place)):
        moved = [noise.smooth(place + sign * small * np.eye(len(place))[k])[0] for sign in (1, -1)]
        # Central differences: error of order small**2 relative to third derivatives, plus rounding.
        assert (moved[0] - moved[1]) / (2 * small) == pytest.approx(gradient[k], rel=1e-4, abs=1e-6 * value)


def test_dead_channels_keep_their_factor_and_unread_ones_give_way() -> None:
    model, feeds = chain(), {"x": random(16, 3, 8, 8)}
    layers = {n.outputs[0].name: n for n in model.graph if n.op_type == "Conv"}
    first, bias, last = layers["a"].inputs[1], layers["a"].inputs[2], layers["y"].inputs[1]
    assert first is not None and bias is not None and last is not None
    reach = statistics_of(model, feeds)["e"].high
    unread = int(np.argmax(reach))  # the channel that sets the step, and that nothing reads
    for value, index in ((first, (2,)), (bias, (2,)), (last, (slice(None), unread))):
        array = np.array(constant_array(value))
        array[index] = 0.0
        value.const_value = ir.Tensor(array, name=value.name)
    before = [np.array(constant_array(v)) for v in layers["d"].inputs[1:]]
    check_pass(equalizer(model, feeds), model, feeds, fires=2, bound=FLOAT32)
    scaled = [np.array(constant_array(v)) for v in layers["d"].inputs[1:]]
    # The bias takes the factor of the output only; so does the weight, if that of the dead input is 1.
    ratios = [np.abs(new[2]).max() / np.abs(old[2]).max() for new, old in zip(scaled, before, strict=True)]
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-5)
    after = statistics_of(model, feeds)["e"].high
    assert after[unread] <= np.delete(after, unread).max()
    for node in model.graph:
        assert all(np.isfinite(a).all() for v in node.inputs if (a := constant_array(v)) is not None)


def test_model_without_noise_to_lose_stays() -> None:
    """Channels that are alike already gain nothing."""
    model, feeds = chain(), {"x": random(16, 3, 8, 8)}
    step = equalizer(model, feeds)
    assert EqualizeLayers(step.statistics, step.quantized, gain_db=100.0).run(model).changed == 0
    untouched = chain()
    assert EqualizeLayers(step.statistics, frozenset()).run(untouched).notes[0].endswith("is rounded")


def test_means_over_positions_stay() -> None:
    text = RESIDUAL.replace("GlobalMaxPool", "GlobalAveragePool")
    weights = {"w1": uneven(6, 3, 1, 1, seed=1), "w2": random(6, 6, 3, 3), "w3": random(5, 6)}
    model = shaped(add_weights(parse(text), b2=random(6), b3=random(5), **weights))
    feeds = {"x": random(4, 3, 8, 8)}
    result = check_pass(equalizer(model, feeds), model, feeds, fires=0)
    assert "mean over positions" in result.notes[0]


def test_not_finite_data_are_refused() -> None:
    model, data = chain(), random(2, 3, 8, 8)
    data[0, 0, 0, 0] = np.nan
    with pytest.raises(DataError):
        collect_channels(model, dataset_from_memory({"x": data}, model), ["a"])
