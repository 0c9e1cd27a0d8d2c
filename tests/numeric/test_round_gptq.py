"""GPTQ and searched scales on every kind of anchor, judged by what the layers compute."""

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from rounding_models import ANCHORS, build, make_plan, moments_of, values_of

from bitwright.compiler.errors import InternalError
from bitwright.compiler.plan.model import Plan, WeightQuant
from bitwright.compiler.plan.quantizers import BIAS_LIMIT
from bitwright.compiler.plan.weight_search import search_weight_scales
from bitwright.passes.dequantized import dequantized_array
from bitwright.passes.remove_unused import RemoveUnused
from bitwright.passes.round_gptq import RoundGPTQ
from bitwright.passes.round_nearest import RoundNearest


def node_of(model, name):
    return next(n for n in model.graph if n.name == name)


def weight_as_read(model, name):
    return dequantized_array(node_of(model, name).inputs[1])


def rounded(model, plan, moments=None, *, refine=False):
    """Return a copy rounded with GPTQ where there are moments, else to nearest."""
    copy = model.clone()
    if moments is not None:
        RoundGPTQ(plan, moments, refine).run(copy)
    RoundNearest(plan).run(copy)
    RemoveUnused().run(copy)
    onnx.checker.check_model(ir.to_proto(copy), full_check=True)
    return copy


def layer_error(model, other, name):
    """Return the mean square error of one layer whose weight alone is replaced, from its real inputs."""
    copy = model.clone()
    node = node_of(copy, name)
    array = weight_as_read(other, name)
    value = ir.Value(name="replacement", const_value=ir.Tensor(array, name="replacement"))
    copy.graph.register_initializer(value)
    node.replace_input_with(1, value)
    return float(((values_of(copy, [name])[name] - values_of(model, [name])[name]) ** 2).mean())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("refine", [False, True])
def test_every_layers_output_changes_less_than_with_rounding_to_nearest(bits, refine):
    model = build()
    plan, moments = make_plan(model, bits=bits), moments_of(model)
    nearest, better = rounded(model, plan), rounded(model, plan, moments, refine=refine)
    for name, *_ in ANCHORS:
        plain, found = layer_error(model, nearest, name), layer_error(model, better, name)
        # Rounding minimises the error with damped, shrunk correlations, which is the real one but for a few per cent.
        assert found <= 1.02 * plain, name
    total = [sum(layer_error(model, m, a[0]) for a in ANCHORS) for m in (nearest, better)]
    assert total[1] < 0.9 * total[0]


def test_the_nodes_are_those_of_rounding_to_nearest():
    model = build()
    plan, moments = make_plan(model), moments_of(model)
    nearest, better = rounded(model, plan), rounded(model, plan, moments)
    assert [(n.op_type, len(n.inputs)) for n in nearest.graph] == [
        (n.op_type, len(n.inputs)) for n in better.graph
    ]
    for name, *_ in ANCHORS:
        ours, theirs = (node_of(m, name).inputs[1].producer().inputs for m in (better, nearest))
        assert [(v.dtype, v.shape) for v in ours] == [(v.dtype, v.shape) for v in theirs]
        np.testing.assert_array_equal(ours[1].const_value.numpy(), theirs[1].const_value.numpy())


def test_a_second_run_changes_nothing():
    model = build()
    plan, moments = make_plan(model), moments_of(model)
    first = RoundGPTQ(plan, moments).run(model)
    assert first.changed == len(ANCHORS)
    before = ir.to_proto(model).SerializeToString()
    assert RoundGPTQ(plan, moments).run(model).changed == 0
    assert ir.to_proto(model).SerializeToString() == before


def test_weights_without_moments_or_levels_are_left_to_rounding_to_nearest():
    model = build()
    plan, moments = make_plan(model), moments_of(model)
    del moments["b"]
    plan.weights["we"] = WeightQuant("we", "float16", None, np.ones(1, np.float32), bits=16)
    copy = model.clone()
    assert RoundGPTQ(plan, moments).run(copy).changed == len(ANCHORS) - 2
    for name in ("b", "y"):
        assert node_of(copy, name).inputs[1].is_initializer()


GROUPED = np.ones((4, 32), np.float32)
FORMATS = [
    WeightQuant("wd", "int4", 0, GROUPED, group=16, bits=4),
    WeightQuant("wd", "uint4", 0, GROUPED, group=16, bits=4),
    WeightQuant("wd", "uint4", 0, GROUPED, np.full((4, 32), 8, np.uint8), 16, 4),
    WeightQuant("wd", "int8", None, np.ones(1, np.float32), bits=8),
    WeightQuant("wd", "int8", 1, np.ones(32, np.float32), bits=4),
    WeightQuant("wd", "int8", 1, np.ones(32, np.float32), bits=2, codebook="ternary"),
    WeightQuant("wd", "float8_e4m3fn", 1, np.ones(32, np.float32), bits=8),
]


@pytest.mark.parametrize("quant", FORMATS, ids=lambda q: f"{q.dtype}-{q.bits}-{q.group}-{q.codebook}")
def test_every_format_is_searched_rounded_and_stored(quant):
    model = build()
    plan, moments = make_plan(model), moments_of(model)
    plan.weights["wd"] = quant
    plan = search_weight_scales(plan, model, moments)
    found = plan.weights["wd"]
    assert replace(found, scale=quant.scale, zero_point=quant.zero_point) == quant
    assert found.scale.shape == quant.scale.shape and (found.scale > 0).all()
    if quant.zero_point is not None:
        assert found.zero_point.dtype == quant.zero_point.dtype
    errors = [layer_error(model, rounded(model, plan, m), "d") for m in (None, moments)]
    power = float((values_of(model, ["d"])["d"] ** 2).mean())
    assert errors[1] <= 1.02 * errors[0] < 0.5 * power


def test_searched_scales_lower_the_error_of_rounding_to_nearest():
    model = build()
    plan, moments = make_plan(model, bits=4), moments_of(model)
    searched = search_weight_scales(plan, model, moments)
    assert searched is not plan and searched.nodes is plan.nodes
    totals = [sum(layer_error(model, rounded(model, p), a[0]) for a in ANCHORS) for p in (plan, searched)]
    assert totals[1] < 0.95 * totals[0]


def test_a_bias_that_would_not_fit_keeps_its_wider_scale():
    model = build()
    bias = np.full(8, 1e9, np.float32)
    model.graph.initializers["ba"].const_value = ir.Tensor(bias, name="ba")
    plan = make_plan(build())
    scale = search_weight_scales(plan, model, {}).weights["wa"].scale
    assert (bias / (plan.activations["x"].scale * scale.astype(np.float64)) <= BIAS_LIMIT * (1 + 1e-6)).all()


def test_a_shared_weight_is_rounded_once_for_all_its_readers():
    model = build()
    plan, moments = make_plan(model), moments_of(model)
    node = node_of(model, "d")
    twin = ir.Node("", "MatMul", list(node.inputs), name="twin")
    twin.outputs[0].name = "twin"
    model.graph.insert_after(node, twin)
    model.graph.outputs.append(twin.outputs[0])
    plan.nodes["twin"] = replace(plan.nodes["d"], node="twin")
    moments["twin"] = moments["d"]
    assert RoundGPTQ(plan, moments).run(model).changed == len(ANCHORS) + 1
    assert node_of(model, "twin").inputs[1] is node_of(model, "d").inputs[1]


def test_moments_of_another_form_of_the_model_are_refused():
    model = build()
    plan, moments = make_plan(model), moments_of(model)
    moments["d"] = moments["y"]
    with pytest.raises(InternalError, match="node 'd'"):
        RoundGPTQ(plan, moments).run(model.clone())
    with pytest.raises(InternalError, match="node 'd'"):
        search_weight_scales(plan, model, moments)


def test_an_empty_plan_changes_nothing():
    model = build()
    assert RoundGPTQ(Plan("t", "artifact"), moments_of(model)).run(model).changed == 0
