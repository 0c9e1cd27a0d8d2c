"""The one product in front of a GroupQueryAttention is taken apart where it can be, and the results stay."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from llama_models import Sizes
from llama_operators import SPELLINGS, operator_model
from onnx import helper, numpy_helper
from pass_harness import FLOAT32, check_pass

from bitwright.compiler.ingest.runtime_norms import expand_norms
from bitwright.passes.split_packed_attention import SplitPackedAttention

SIZES = Sizes(tied=False)
TOKENS = {"ids": np.arange(12)[None]}


def packed_model(*, biases: bool = True) -> onnx.ModelProto:
    proto = operator_model(SPELLINGS["group query of one product"], SIZES)
    expand_norms(proto)
    random = np.random.default_rng(3)
    for tensor in proto.graph.initializer:
        if tensor.name.startswith("b_qkv"):
            values = random.standard_normal(tuple(tensor.dims)).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    if not biases:
        for node in [n for n in proto.graph.node if n.op_type == "Add" and n.output[0].startswith("packed")]:
            product = next(n for n in proto.graph.node if n.output[0] == node.input[1])
            product.output[0] = node.output[0]
            proto.graph.node.remove(node)
    return proto


@pytest.mark.parametrize("biases", [True, False])
def test_products_are_taken_apart(biases: bool) -> None:
    model = ir.from_proto(packed_model(biases=biases))
    before = sum(n.op_type == "MatMul" for n in model.graph)
    result = check_pass(SplitPackedAttention(), model, TOKENS, fires=SIZES.layers, bound=FLOAT32)
    assert sum(n.op_type == "MatMul" for n in result.model.graph) == before + 2 * SIZES.layers
    attention = next(n for n in result.model.graph if n.op_type == "GroupQueryAttention")
    assert [tuple(v.producer().op_type for v in attention.inputs[:3])] == [
        ("Add" if biases else "MatMul",) * 3
    ]
    widths = [int(v.shape[-1]) for v in attention.inputs[:3] if v is not None and v.shape is not None]
    assert widths in ([], [64, 32, 32])


def read_twice(proto: onnx.ModelProto) -> None:
    """The joined result is an output as well."""
    proto.graph.output.append(helper.make_tensor_value_info("packed0", 1, ["N", "T", 128]))
    proto.graph.output.append(helper.make_tensor_value_info("packed1", 1, ["N", "T", 128]))


def computed_matrix(proto: onnx.ModelProto) -> None:
    for node in proto.graph.node:
        if node.op_type == "MatMul" and node.input[1].startswith("w_qkv"):
            name = node.input[1]
            node.input[1] = f"{name}_given"
            proto.graph.input.append(helper.make_tensor_value_info(f"{name}_given", 1, [64, 128]))


def other_heads(proto: onnx.ModelProto) -> None:
    """Heads that 128 columns cannot be cut into."""
    for node in proto.graph.node:
        if node.op_type == "GroupQueryAttention":
            next(a for a in node.attribute if a.name == "num_heads").i = 7


@pytest.mark.parametrize("change", [read_twice, computed_matrix, other_heads], ids=lambda f: f.__name__)
def test_others_stay(change: Callable[[onnx.ModelProto], None]) -> None:
    proto = packed_model()
    change(proto)
    model = ir.from_proto(proto)
    assert SplitPackedAttention().run(model).changed == 0
    assert ir.to_proto(model) == ir.to_proto(ir.from_proto(proto))
