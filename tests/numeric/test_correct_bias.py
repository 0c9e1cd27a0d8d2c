"""Bias correction against the mean error of the layers, computed from all activations."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from rounding_models import ANCHORS, build, make_plan, moments_of, values_of

from bitwright.passes.correct_bias import CorrectBias, quantize_rows, shrunk_mean
from bitwright.passes.insert_qdq import InsertQDQ
from bitwright.passes.round_gptq import RoundGPTQ
from bitwright.passes.round_nearest import RoundNearest

# Where each anchor's biased result is.
RESULT = {"a": "a", "b": "b", "c": "c", "d": "s", "y": "y"}
CHANNEL_AXES = {"a": (0, 2, 3), "b": (0, 2, 3), "c": (0, 2, 3), "d": (0,), "y": (0,)}


def node_of(model, name):
    return next(n for n in model.graph if n.name == name)


def rounded(model, plan):
    copy = model.clone()
    RoundNearest(plan).run(copy)
    return copy


def mean_error(model, other, plan, name):
    """Return each channel's mean error of one layer that alone is quantized, its inputs being the float ones."""
    copy = model.clone()
    node, source = node_of(copy, name), node_of(other, name)
    if plan.activations:
        data = node.inputs[0]
        quant = plan.activations[data.name]
        inputs = [data]
        for k, array in enumerate((np.float32(quant.scale), np.asarray(quant.zero_point, quant.dtype))):
            value = ir.Value(name=f"q{k}", const_value=ir.Tensor(np.asarray(array), name=f"q{k}"))
            copy.graph.register_initializer(value)
            inputs.append(value)
        quantize = ir.Node("", "QuantizeLinear", inputs)
        dequantize = ir.Node("", "DequantizeLinear", [quantize.outputs[0], *inputs[1:]])
        copy.graph.insert_before(node, [quantize, dequantize])
        node.replace_input_with(0, dequantize.outputs[0])
    stored = source.inputs[1].producer()
    for k, value in enumerate(stored.inputs):
        copy.graph.initializers[f"stored{k}"] = ir.Value(name=f"stored{k}", const_value=value.const_value)
    weight = ir.Node(
        "",
        "DequantizeLinear",
        [copy.graph.initializers[f"stored{k}"] for k in range(len(stored.inputs))],
        list(stored.attributes.values()),
    )
    copy.graph.insert_before(node, weight)
    node.replace_input_with(1, weight.outputs[0])
    reader, bias_reader = (node_of(copy, RESULT[name]), node_of(other, RESULT[name]))
    index = 1 if name == "d" else 2
    if len(bias_reader.inputs) > index:
        bias = ir.Value(name="bias", const_value=bias_reader.inputs[index].const_value)
        copy.graph.register_initializer(bias)
        reader.resize_inputs(index + 1)
        reader.replace_input_with(index, bias)
    result = RESULT[name]
    difference = values_of(copy, [result])[result] - values_of(model, [result])[result]
    return difference.mean(axis=CHANNEL_AXES[name])


@pytest.mark.parametrize("activations", [True, False])
@pytest.mark.parametrize("bits", [8, 3])
def test_no_channel_of_any_layer_is_off_on_average(bits, activations):
    model = build()
    plan, moments = make_plan(model, bits=bits, activations=activations), moments_of(model)
    before = rounded(model, plan)
    after = before.clone()
    found = CorrectBias(plan, moments, model).run(after)
    assert found.changed == len(ANCHORS) and found.notes == ()
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    for name, *_ in ANCHORS:
        wrong, right = (np.abs(mean_error(model, m, plan, name)).max() for m in (before, after))
        # All rows are kept, so what is left is float32 rounding (and steps that fall the other way at a tie).
        assert right < 2e-4 and right < 0.2 * wrong, name


def test_a_second_run_changes_nothing():
    model = build()
    plan, moments = make_plan(model), moments_of(model)
    work = rounded(model, plan)
    CorrectBias(plan, moments, model).run(work)
    before = ir.to_proto(work).SerializeToString()
    assert CorrectBias(plan, moments, model).run(work).changed == 0
    assert ir.to_proto(work).SerializeToString() == before


def test_a_matmul_without_a_bias_is_left_alone_and_named():
    model = build()
    add = node_of(model, "s")
    node_of(model, "rs").replace_input_with(0, add.inputs[0])
    model.graph.remove(add, safe=True)
    plan, moments = make_plan(build()), moments_of(model)
    work = rounded(model, plan)
    found = CorrectBias(plan, moments, model).run(work)
    assert found.changed == len(ANCHORS) - 1
    assert found.notes == ("d: no bias that can be corrected",)


def test_a_bias_that_another_layer_reads_stays_for_it():
    model = build()
    value = model.graph.initializers["bd"]
    extra = ir.Node("", "Neg", [value], name="extra")
    extra.outputs[0].name = "extra"
    model.graph.append(extra)
    model.graph.outputs.append(extra.outputs[0])
    plan, moments = make_plan(model), moments_of(model)
    work = rounded(model, plan)
    kept = work.graph.initializers["bd"].const_value.numpy().copy()
    CorrectBias(plan, moments, model).run(work)
    np.testing.assert_array_equal(node_of(work, "extra").inputs[0].const_value.numpy(), kept)
    assert node_of(work, "s").inputs[1].name != "bd"


def test_it_works_behind_gptq_and_in_front_of_insertion():
    model = build()
    plan, moments = make_plan(model, bits=4), moments_of(model)
    work = model.clone()
    RoundGPTQ(plan, moments).run(work)
    plain = work.clone()
    CorrectBias(plan, moments, model).run(work)
    errors = []
    for candidate in (plain, work):
        InsertQDQ(plan).run(candidate)
        onnx.checker.check_model(ir.to_proto(candidate), full_check=True)
        errors.append((values_of(candidate, ["y"])["y"] - values_of(model, ["y"])["y"]).mean(axis=0))
    assert np.abs(errors[1]).mean() < np.abs(errors[0]).mean()


def test_rows_are_quantized_as_the_runtime_does():
    plan = make_plan(build())
    quant = plan.activations["x"]
    rows = np.linspace(2 * quant.low, 2 * quant.high, 1001, dtype=np.float32)
    found = quantize_rows(rows, quant)
    assert len(np.unique(found)) == 256 and 0 in found
    inside = (rows >= quant.low) & (rows <= quant.high)
    assert np.abs(found - rows)[inside].max() <= 0.501 * quant.scale


def test_a_mean_of_few_rows_counts_as_far_as_it_stands_out_of_chance():
    # Three channels: no mean, one of ten standard errors, and no spread at all.
    rows = np.random.default_rng(0).standard_normal((1, 400, 3)).astype(np.float32)
    rows = (rows - rows.mean(axis=1)) / rows.std(axis=1) * [1, 1, 0] + [0.02, 0.5, 0.5]
    mean = rows.mean(axis=1)
    found = shrunk_mean(rows.astype(np.float32), 10**9)
    assert found[0, 0] == 0
    # (1 / 20)^2 / 0.5^2 = 0.01 of the second is put down to chance.
    np.testing.assert_allclose(found[0, 1:], mean[0, 1:] * [0.99, 1], rtol=1e-5)
    np.testing.assert_array_equal(
        shrunk_mean(rows.astype(np.float32), 400), rows.astype(np.float32).mean(1, np.float64)
    )
