"""Where models are cut into parts, and what is held between them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from llama_models import Sizes, llama_model

from bitwright.compiler.errors import ModelError
from bitwright.compiler.graph.model import node_label
from bitwright.compiler.streaming.chain import Part, chain_of
from bitwright.compiler.streaming.extraction import prepared
from bitwright.compiler.streaming.held import HeldArrays

OPSET = 21


def parts_of(proto: onnx.ModelProto) -> tuple[Part, ...]:
    return chain_of(prepared(ir.from_proto(proto), OPSET))


def text_model(body: str, inputs: str, outputs: str, weights: dict[str, tuple[int, ...]]) -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 21]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    random = np.random.default_rng(0)
    for name, shape in weights.items():
        array = random.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


def products(parts: tuple[Part, ...]) -> list[int]:
    return [len(p.products) for p in parts]


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_decoder_is_cut_at_the_residual_stream(cache: bool, tied: bool, fused: bool) -> None:
    parts = parts_of(llama_model(Sizes(layers=3, cache=cache, tied=tied, fused_attention=fused)))
    # The look-up of tokens, then attention (four products) and feed-forward (three) by turns, then the head.
    assert products(parts) == [0, *(4, 3) * 3, 1]
    assert [p.entry.name for p in parts[1:] if p.entry is not None] == [
        "x0",
        "y0",
        "x1",
        "y1",
        "x2",
        "y2",
        "x3",
    ]
    assert all(len(p.shared) == (3 if len(p.products) == 4 else 0) for p in parts[1:])


def test_parts_hold_every_varying_node_once() -> None:
    model = prepared(ir.from_proto(llama_model(Sizes(layers=2, cache=True))), OPSET)
    parts = chain_of(model)
    labels = [node_label(n) for p in parts for n in p.nodes]
    assert len(labels) == len(set(labels))
    constant = {node_label(n) for n in model.graph} - set(labels)
    assert all(
        not any(v in p.inputs for p in parts for v in n.inputs)
        for n in model.graph
        if node_label(n) in constant
    )
    assert [len(p.inputs) for p in parts] == [1, 2, 0, 2, 0, 0]  # tokens, and the caches of each attention
    assert (
        sum(len(p.outputs) for p in parts) == 4 + 3 + 1 + 3 + 1 + 1
    )  # stream, shared values, caches, logits


def test_plain_network_is_cut_between_products() -> None:
    body = "a = MatMul(x, w1) b = Relu(a) c = MatMul(b, w2) d = Tanh(c) y = MatMul(d, w3)"
    weights = {"w1": (8, 16), "w2": (16, 16), "w3": (16, 4)}
    parts = parts_of(text_model(body, "float[N, 8] x", "float[N, 4] y", weights))
    assert products(parts) == [1, 1, 1]


def test_tied_head_brings_its_weight_along() -> None:
    parts = parts_of(llama_model(Sizes(layers=1, tied=True)))
    assert products(parts)[-1] == 1
    assert parts[-1].shared == ()


def test_side_path_around_a_cut_is_refused() -> None:
    body = """
    a = MatMul(x, w1) b = Relu(a) c = MatMul(b, w2) y = MatMul(c, w3)
    l = MatMul(y, w3) late = Add(l, b)
    """
    weights = {"w1": (8, 8), "w2": (8, 8), "w3": (8, 8)}
    # The last output is made behind both, so nothing before b and y passes everything on: one cut is left, none lies
    # between b and late.
    parts = parts_of(text_model(body, "float[N, 8] x", "float[N, 8] y, float[N, 8] late", weights))
    assert all(p.entry is None or p.entry.name == "b" for p in parts)


def test_parallel_branches_are_refused() -> None:
    body = "a = MatMul(x, w1) b = MatMul(x, w2) c = MatMul(a, w3) y = Add(c, b)"
    weights = dict.fromkeys(("w1", "w2", "w3"), (8, 8))
    with pytest.raises(ModelError, match="no value inside passes everything on"):
        parts_of(text_model(body, "float[N, 8] x", "float[N, 8] y", weights))


@pytest.mark.parametrize("memory", [0, 100, 1 << 20])
def test_held_arrays_come_back_whatever_the_memory(memory: int) -> None:
    random = np.random.default_rng(1)
    arrays = [
        random.standard_normal((1, n, 3)).astype(t) for n, t in ((5, "f4"), (2, "f2"), (7, "f4"), (0, "f4"))
    ]
    held = HeldArrays(memory)
    for array in arrays:
        held.append(array)
    assert len(held) == len(arrays)
    for k in (2, 0, 3, 1):
        assert held[k].dtype == arrays[k].dtype
        np.testing.assert_array_equal(held[k], arrays[k])
    held.close()
    assert len(held) == 0
