"""Llama decoders are found by structure; what is none is refused at its node; names and order of rows are GGUF's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from llama_models import Sizes, llama_model

from bitwright.compiler.errors import InternalError, ModelError
from bitwright.compiler.graph.model import constant_array
from bitwright.compiler.llama.decoder import DEFAULT_CONTEXT, Decoder
from bitwright.compiler.llama.recognise import recognise
from bitwright.compiler.llama.rotary import Frequencies
from bitwright.compiler.llama.tensors import in_graph, in_halves, interleaved, put_back, tensors_of
from bitwright.passes.normalize import normalize


def found_in(proto: onnx.ModelProto) -> Decoder:
    model = ir.from_proto(proto)
    normalize(model)
    return recognise(model)


def anonymous(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Replace every name but those of inputs and outputs by a number, in an order that says nothing."""
    graph = proto.graph
    kept = {v.name for v in (*graph.input, *graph.output)} | {""}
    names = {i.name for i in graph.initializer} | {o for n in graph.node for o in n.output}
    order = np.random.default_rng(0).permutation(len(names))
    new = {name: f"t{k}" for name, k in zip(sorted(names - kept), order, strict=False)}
    for tensor in graph.initializer:
        tensor.name = new.get(tensor.name, tensor.name)
    for node in graph.node:
        node.name = ""
        node.input[:] = [new.get(v, v) for v in node.input]
        node.output[:] = [new.get(v, v) for v in node.output]
    return proto


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(),
        Sizes(tied=False, base=500000.0, epsilon=1e-6),
        Sizes(cache=True, layers=3),
        Sizes(key_heads=4),
        Sizes(layers=1, heads=2, key_heads=1, width=48, feed_forward=32),
        Sizes(fused_attention=True),
        Sizes(guarded_attention=True, cache=True),
    ],
    ids=["grouped", "untied", "cache", "own heads", "one key head", "fused attention", "guarded attention"],
)
def test_sizes_and_constants_are_read_from_the_graph(sizes: Sizes) -> None:
    hyper = found_in(anonymous(llama_model(sizes))).hyper
    assert (hyper.vocabulary, hyper.layers, hyper.width) == (sizes.vocabulary, sizes.layers, sizes.width)
    assert (hyper.heads, hyper.key_heads, hyper.head_width) == (
        sizes.heads,
        sizes.key_heads,
        sizes.head_width,
    )
    assert (hyper.feed_forward, hyper.context, hyper.base) == (
        sizes.feed_forward,
        sizes.positions,
        sizes.base,
    )
    assert hyper.epsilon == pytest.approx(sizes.epsilon) and hyper.factors is None


def test_computed_angles_set_no_limit() -> None:
    hyper = found_in(anonymous(llama_model(Sizes(computed_angles=True, base=500000.0)))).hyper
    assert (hyper.base, hyper.context) == (500000.0, DEFAULT_CONTEXT) and hyper.factors is None


def test_weights_get_ggufs_names_whatever_they_are_called() -> None:
    sizes = Sizes(tied=False)
    proto = llama_model(sizes)
    arrays = {i.name: onnx.numpy_helper.to_array(i) for i in proto.graph.initializer}
    tensors = {t.name: t for t in tensors_of(found_in(anonymous(proto)))}
    pairs = {"token_embd": "w_embedding", "output_norm": "g_z"}
    parts = {"attn_v": "w_v", "attn_output": "w_o", "ffn_gate": "w_g", "ffn_up": "w_u", "ffn_down": "w_d"}
    pairs |= {f"blk.{n}.{ours}": f"{theirs}{n}" for n in range(2) for ours, theirs in parts.items()}
    pairs |= {
        f"blk.{n}.{ours}": f"{theirs}{n}"
        for n in range(2)
        for ours, theirs in (("attn_norm", "g_a"), ("ffn_norm", "g_f"))
    }
    for name, source in pairs.items():
        expected = arrays[source] if name.endswith(("norm", "embd")) else arrays[source].T
        assert np.array_equal(tensors[f"{name}.weight"].load(), expected), name
    assert np.array_equal(tensors["output.weight"].load(), arrays["w_head"].T)
    for part, heads in (("q", sizes.heads), ("k", sizes.key_heads)):
        expected = interleaved(np.ascontiguousarray(arrays[f"w_{part}1"].T), heads)
        assert np.array_equal(tensors[f"blk.1.attn_{part}.weight"].load(), expected)
    assert len(tensors) == 3 + 2 * 9
    assert next(iter(tensors)) == "token_embd.weight"


def test_tied_heads_are_stored_once() -> None:
    tensors = tensors_of(found_in(llama_model(Sizes(tied=True))))
    assert "output.weight" not in {t.name for t in tensors}
    assert [r.label for r in tensors[0].readers], "the head reads the embedding"


def test_rows_are_ordered_as_in_conversion_scripts() -> None:
    # Rows of one head of width 6, of which exporters rotate i with i + 3.
    rows = np.arange(12, dtype=np.float32)[:, None]
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert np.array_equal(in_halves(interleaved(rows, 2), 2), rows)


def test_matrices_can_be_put_back() -> None:
    model = ir.from_proto(llama_model(Sizes()))
    normalize(model)
    tensors = tensors_of(recognise(model))
    changed = {t.name: t.load() * 2 for t in tensors if t.is_matrix}
    for tensor in tensors:
        if tensor.is_matrix:
            put_back(tensor, changed[tensor.name])
    again = {t.name: t.load() for t in tensors_of(recognise(model))}
    for name, values in changed.items():
        assert np.array_equal(again[name], values), name
    embedding = next(t for t in tensors if t.role == "token_embd")
    holders = in_graph(embedding, changed["token_embd.weight"])
    assert len(holders) == 2, "the table, and the transposed copy that the head multiplies with"
    for holder, values in holders.items():
        array = constant_array(holder)
        assert array is not None and np.array_equal(array, values)
    with pytest.raises(InternalError):
        put_back(embedding, np.zeros((1, 1), np.float32))


REFUSED: dict[str, tuple[Sizes, str]] = {
    "another activation": (Sizes(activation="Tanh"), "silu"),
    "another scale": (Sizes(scale=0.3), "not 0.3"),
    "keys without positions": (Sizes(rotate_keys=False), "rotary embedding"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_llama_decoder_is_refused_at_its_node(case: str) -> None:
    sizes, word = REFUSED[case]
    with pytest.raises(ModelError) as caught:
        found_in(llama_model(sizes))
    assert caught.value.where.startswith("node '") and word in caught.value.what


def swapped(graph: onnx.GraphProto) -> None:
    """Rotate the other way round: concat(x2, -x1) in place of concat(-x2, x1)."""
    for node in graph.node:
        if node.op_type == "Concat" and node.input[0].endswith("_n"):
            node.input[:] = list(node.input)[::-1]


def other_table(graph: onnx.GraphProto) -> None:
    """Angles that do not grow with the position."""
    for tensor in graph.initializer:
        if tensor.name in ("cos_table", "sin_table"):
            values = np.random.default_rng(0).uniform(-1, 1, tuple(tensor.dims)).astype(np.float32)
            half = values.shape[1] // 2
            values[:, half:] = values[:, :half]
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def no_residual(graph: onnx.GraphProto) -> None:
    """The first layer's attention has nothing added."""
    next(n for n in graph.node if n.output[0] == "y0").op_type = "Mul"


def scaled_embedding(graph: onnx.GraphProto) -> None:
    """Embeddings are multiplied by a constant."""
    at = next(k for k, n in enumerate(graph.node) if n.output[0] == "x0")
    graph.node[at].output[0] = "raw"
    graph.node.insert(at + 1, onnx.helper.make_node("Mul", ["raw", "scale"], ["x0"]))


def wider_mean(graph: onnx.GraphProto) -> None:
    """A normalization over another axis."""
    node = next(n for n in graph.node if n.op_type == "ReduceMean")
    node.attribute[0].ints[:] = [1]


def keys_not_swapped(graph: onnx.GraphProto) -> None:
    """Keys whose heads and positions are swapped instead of positions and elements."""
    node = next(n for n in graph.node if n.output[0] == "kt0")
    node.attribute[0].ints[:] = [0, 2, 1, 3]


DAMAGES: list[Callable[[onnx.GraphProto], None]] = [
    swapped,
    other_table,
    no_residual,
    scaled_embedding,
    wider_mean,
    keys_not_swapped,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_damaged_decoders_are_refused(damage: Callable[[onnx.GraphProto], None]) -> None:
    proto = llama_model(Sizes())
    damage(proto.graph)
    with pytest.raises(ModelError, match="not a llama decoder"):
        found_in(proto)


def test_a_classifier_is_refused() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> m (float[1, 4] x) => (float[1, 4] y) { y = Relu(x) }'
    )
    with pytest.raises(ModelError, match="no output is made by a linear layer"):
        found_in(proto)


def test_stretched_frequencies_become_factors() -> None:
    pure = 500000.0 ** -(np.arange(16) / 16)
    stretched = np.where(np.arange(16) < 8, pure, pure / 8)
    found = Frequencies(stretched, None)
    assert found.base == pytest.approx(500000.0)
    factors = found.factors()
    assert factors is not None and np.allclose(factors, np.where(np.arange(16) < 8, 1, 8))
    assert Frequencies(pure, None).factors() is None
