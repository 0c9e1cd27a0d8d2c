"""A rotated decoder computes the same, in every spelling; what cannot be rotated is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from llama_models import Sizes, llama_model
from onnx import numpy_helper
from pass_harness import add_weights, check_pass, parse, random

from bitwright.compiler.errors import ModelError
from bitwright.compiler.graph.model import constant_array
from bitwright.compiler.llama.recognise import recognise
from bitwright.passes.normalize import normalize
from bitwright.passes.rotate_residual import RotateResidual, online_products

SIZES = Sizes()
# Three matrix products in float32 where there was one: ten times a pass's usual bound.
BOUND = 1e-4
VARIANTS = [
    SIZES,
    replace(SIZES, tied=False, fused_attention=True),
    replace(
        SIZES, width=60, heads=6, key_heads=2, feed_forward=80
    ),  # 60 = 59 + 1, heads of 10: no Hadamard matrix
    replace(SIZES, key_heads=4, computed_angles=True),
]


def decoder(sizes: Sizes) -> ir.Model:
    return normalize(ir.from_proto(llama_model(sizes))).model


def tokens(sizes: Sizes) -> dict[str, np.ndarray]:
    return {"ids": np.random.default_rng(1).integers(0, sizes.vocabulary, (1, 12))}


@pytest.mark.parametrize("sizes", VARIANTS)
@pytest.mark.parametrize("block", [0, 16])
def test_the_function_stays(sizes: Sizes, block: int) -> None:
    model = decoder(sizes)
    result = check_pass(RotateResidual(down_block=block), model, tokens(sizes), fires=2, bound=BOUND)
    assert ("embedding and head had one weight and now have two" in result.notes) == sizes.tied
    assert len(online_products(model)) == (2 if block else 0)


def test_a_cache_keeps_its_meaning() -> None:
    sizes = replace(SIZES, cache=True)
    model = decoder(sizes)
    shape = (1, sizes.key_heads, 0, sizes.head_width)
    past = {v.name or "": random(*shape, seed=k) for k, v in enumerate(model.graph.inputs[1:])}
    check_pass(RotateResidual(), model, {**tokens(sizes), **past}, fires=2, bound=BOUND)


def test_biases_are_rotated_with_their_layers() -> None:
    """Of values (head by head) and of what is added to the residual stream."""
    proto = llama_model(SIZES)
    for name, width in (("v0_l", 32), ("o1", 64), ("d0", 64)):
        node = next(n for n in proto.graph.node if n.output[0] == name)
        node.output[0] = f"{name}_plain"
        place = list(proto.graph.node).index(node) + 1
        proto.graph.node.insert(place, onnx.helper.make_node("Add", [f"{name}_plain", f"{name}_b"], [name]))
        proto.graph.initializer.append(numpy_helper.from_array(random(width, seed=7), f"{name}_b"))
    model = normalize(ir.from_proto(proto)).model
    assert recognise(model).layers[0].attention.value.bias is not None
    check_pass(RotateResidual(), model, tokens(SIZES), fires=2, bound=BOUND)


def test_outliers_of_the_stream_are_spread() -> None:
    """One channel of the embedding 50 times the others: behind the rotation none stands out."""
    proto = llama_model(SIZES)
    table = next(i for i in proto.graph.initializer if i.name == "w_embedding")
    array = numpy_helper.to_array(table).copy()
    array[:, 3] *= 50
    table.CopyFrom(numpy_helper.from_array(array, "w_embedding"))
    model = normalize(ir.from_proto(proto)).model
    RotateResidual().run(model)
    after = constant_array(recognise(model).embedding)
    assert after is not None

    def peak(rows: np.ndarray) -> float:
        return float((np.abs(rows).max(axis=1) / np.sqrt((rows**2).mean(axis=1))).mean())

    assert peak(array) > 7  # the square root of the 64 channels, if one has everything
    assert peak(after) < 2


def test_other_models_are_refused() -> None:
    text = """<ir_version: 9, opset_import: ["": 20]>
    g (float[m, 8] x, float[8, 8] w) => (float[m, 8] y) { y = MatMul(x, w) }"""
    with pytest.raises(ModelError, match="not a llama decoder"):
        RotateResidual().run(add_weights(parse(text), w=random(8, 8)))


def test_a_stream_that_the_caller_reads_is_refused() -> None:
    proto = llama_model(SIZES)
    proto.graph.output.append(onnx.helper.make_tensor_value_info("y0", onnx.TensorProto.FLOAT, [1, "T", 64]))
    with pytest.raises(ModelError, match="the caller reads it, too"):
        RotateResidual().run(normalize(ir.from_proto(proto)).model)


def test_blocks_must_divide_the_channels() -> None:
    with pytest.raises(ModelError, match="96 channels are no multiple of blocks of 64"):
        RotateResidual(down_block=64).run(decoder(SIZES))
