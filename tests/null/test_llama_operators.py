"""Llama decoders written with operators for their parts are the same decoders; operators that do more are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from llama_models import Sizes, llama_model
from llama_operators import SPELLINGS, Spelling, operator_model
from onnx import helper

from bitwright.compiler.errors import ModelError
from bitwright.compiler.ingest.runtime_norms import expand_norms
from bitwright.compiler.llama.decoder import Decoder
from bitwright.compiler.llama.recognise import recognise
from bitwright.compiler.llama.tensors import tensors_of
from bitwright.passes.normalize import normalize

GROUPED, STANDARD = SPELLINGS["group query that rotates"], SPELLINGS["opset 23"]


def sizes_for(spelling: Spelling, *, cache: bool = False) -> Sizes:
    # MultiHeadAttention has as many key heads as query heads.
    return Sizes(cache=cache, tied=False, key_heads=4 if spelling.attention == "MultiHeadAttention" else 2)


def found_in(proto: onnx.ModelProto, *, normalized: bool = True) -> Decoder:
    if normalized:
        expand_norms(proto)
    model = ir.from_proto(proto)
    if normalized:
        normalize(model)
    return recognise(model)


# Only normalization takes one product for queries, keys and values apart.
READ = [
    (case, normalized)
    for case, p in SPELLINGS.items()
    for normalized in (True, False)
    if normalized or not p.packed
]


@pytest.mark.parametrize("cache", [False, True], ids=["plain", "cache"])
@pytest.mark.parametrize(("case", "normalized"), READ)
def test_operators_are_what_they_stand_for(case: str, cache: bool, normalized: bool) -> None:
    spelling = SPELLINGS[case]
    sizes = sizes_for(spelling, cache=cache)
    found = found_in(operator_model(spelling, sizes), normalized=normalized)
    expected = found_in(llama_model(sizes))
    for name in ("vocabulary", "layers", "width", "feed_forward", "heads", "key_heads", "context", "base"):
        assert getattr(found.hyper, name) == getattr(expected.hyper, name), name
    assert found.hyper.epsilon == pytest.approx(sizes.epsilon) and found.hyper.factors is None
    tensors = {t.name: t for t in tensors_of(expected)}
    for tensor in tensors_of(found):
        if tensor.role == "bias":
            assert spelling.packed and not tensor.load().any()
            continue
        assert np.array_equal(tensor.load(), tensors.pop(tensor.name).load()), tensor.name
    assert not tensors
    caches = found.caches
    assert (caches is not None) == cache
    for layer, entry in enumerate(caches or ()):
        assert (entry.past_key.name, entry.past_value.name) == (f"past_k{layer}", f"past_v{layer}")
        assert (entry.present_key.name, entry.present_value.name) == (
            f"new_past_k{layer}",
            f"new_past_v{layer}",
        )


def node_of(proto: onnx.ModelProto, op_type: str) -> onnx.NodeProto:
    return next(n for n in proto.graph.node if n.op_type == op_type)


def with_attribute(op_type: str, name: str, value: float) -> Callable[[onnx.ModelProto], None]:
    def change(proto: onnx.ModelProto) -> None:
        node_of(proto, op_type).attribute.append(helper.make_attribute(name, value))

    return change


def with_bias(proto: onnx.ModelProto) -> None:
    node_of(proto, "SkipSimplifiedLayerNormalization").input.append("g_z")


def normalized_stream(proto: onnx.ModelProto) -> None:
    """The stream goes on from behind the normalization instead of from the sum."""
    norms = [n for n in proto.graph.node if n.op_type == "SkipSimplifiedLayerNormalization"]
    norms[1].input[1] = norms[0].output[0]


def key_bias(proto: onnx.ModelProto) -> None:
    node_of(proto, "MultiHeadAttention").input[3] = "g_z"


def packed(proto: onnx.ModelProto) -> None:
    """Queries, keys and values in one operand that no single product makes."""
    node = node_of(proto, "GroupQueryAttention")
    node.input[1] = node.input[2] = ""
    at = list(proto.graph.node).index(node)
    joined = helper.make_node("Concat", ["q0", "k0", "v0"], ["joined"], axis=-1)
    node.input[0] = "joined"
    proto.graph.node.insert(at, joined)


def half_of_each_head(proto: onnx.ModelProto) -> None:
    for tensor in proto.graph.initializer:
        if tensor.name in ("cos_half", "sin_half"):
            array = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array[:, :4].copy(), tensor.name))


REFUSED: dict[str, tuple[Spelling, Callable[[onnx.ModelProto], None], str]] = {
    "capped": (GROUPED, with_attribute("GroupQueryAttention", "softcap", 30.0), "softcap"),
    "capped, opset 23": (STANDARD, with_attribute("Attention", "softcap", 30.0), "softcap"),
    "scale": (STANDARD, with_attribute("Attention", "scale", 0.3), "not 0.3"),
    "neighbours": (
        GROUPED,
        with_attribute("GroupQueryAttention", "rotary_interleaved", 1),
        "rotary_interleaved",
    ),
    "neighbours, opset 23": (STANDARD, with_attribute("RotaryEmbedding", "interleaved", 1), "half rotations"),
    "packed": (GROUPED, packed, "operands of their own"),
    "biases inside": (SPELLINGS["multi-head"], key_bias, "without operand 3"),
    "a sum with bias": (GROUPED, with_bias, "a sum without bias"),
    "behind the normalization": (GROUPED, normalized_stream, "normalization"),
    "half of each head": (STANDARD, half_of_each_head, "whole heads"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_operators_that_do_something_else_are_refused(case: str) -> None:
    spelling, change, word = REFUSED[case]
    proto = operator_model(spelling, sizes_for(spelling))
    change(proto)
    with pytest.raises(ModelError, match="not a llama decoder") as caught:
        found_in(proto)
    assert word in caught.value.what


def norm_model(kind: int = onnx.TensorProto.FLOAT, outputs: int = 1, **attributes: float) -> onnx.ModelProto:
    node = helper.make_node(
        "SimplifiedLayerNormalization", ["x", "g"], ["y", "inverse"][:outputs], name="norm", **attributes
    )
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", kind, ["N", 8])],
        [helper.make_tensor_value_info("y", kind, ["N", 8])],
        [helper.make_tensor("g", kind, [8], np.ones(8))],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("kind", [onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16])
def test_runtime_norms_become_valid_standard_operators(kind: int, opset: int) -> None:
    proto = norm_model(kind, epsilon=1e-6, axis=-1, stash_type=1)
    proto.opset_import[0].version = opset
    assert expand_norms(proto) == 1 and expand_norms(proto) == 0
    onnx.checker.check_model(proto, full_check=True)
    assert proto.graph.node[-1].name == "norm"


@pytest.mark.parametrize(
    "proto",
    [norm_model(axis=1), norm_model(stash_type=10), norm_model(outputs=2), norm_model(gain_offset=1.0)],
    ids=["axis", "precision", "second output", "unknown attribute"],
)
def test_runtime_norms_that_are_not_understood_stay(proto: onnx.ModelProto) -> None:
    before = proto.SerializeToString()
    assert expand_norms(proto) == 0 and proto.SerializeToString() == before


def test_spellings_differ() -> None:
    assert len(set(SPELLINGS.values())) == len(SPELLINGS)
    assert replace(STANDARD) == Spelling()


def test_a_window_of_the_operator_is_its_layers() -> None:
    proto = operator_model(GROUPED, Sizes())
    with_attribute("GroupQueryAttention", "local_window_size", 8)(proto)
    model = ir.from_proto(proto)
    normalize(model)
    windows = recognise(model).hyper.windows
    assert windows[0] == 8 and set(windows[1:]) == {None}
