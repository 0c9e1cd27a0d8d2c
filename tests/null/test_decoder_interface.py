"""What decoders take and give, read off their inputs and outputs; which output continues which cache."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from llama_models import Sizes, llama_model

from bitwright.compiler.decoding.caches import cache_pairs
from bitwright.compiler.decoding.interface import find_interface
from bitwright.compiler.decoding.ports import Port, ports_of
from bitwright.compiler.errors import DataError, ModelError

TOKENS = Port("ids", np.dtype(np.int64), ("N", "T"))
LOGITS = Port("scores", np.dtype(np.float32), ("N", "T", 48))
CACHE = Port("past", np.dtype(np.float16), ("N", 2, "P", 8))


def parsed(inputs: str, outputs: str, body: str) -> ir.Model:
    header = '<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>'
    model = onnx.parser.parse_model(f"{header} g (int64[N, T] ids, {inputs}) => ({outputs}) {{ {body} }}")
    return ir.serde.deserialize_model(model)


def pairs_of(model: ir.Model) -> dict[str, str]:
    interface = find_interface(ports_of(model.graph.inputs), ports_of(model.graph.outputs))
    return cache_pairs(model, interface)


def test_a_plain_decoder() -> None:
    found = find_interface([TOKENS], [LOGITS])
    assert (found.tokens, found.logits, found.caches, found.vocabulary, found.length) == (
        TOKENS,
        LOGITS,
        (),
        48,
        None,
    )
    feeds = found.feeds(np.array([[1, 2, 3]]))
    assert list(feeds) == ["ids"] and feeds["ids"].dtype == np.int64


def test_masks_and_positions_count_what_is_in_the_cache() -> None:
    extra = [
        Port("attention_mask", np.dtype(np.int64), ("N", "S")),
        Port("position_ids", np.dtype(np.int32), ("N", "T")),
    ]
    found = find_interface([TOKENS, *extra, CACHE], [LOGITS])
    feeds = found.feeds(np.array([[7, 8]]), past=3)
    np.testing.assert_array_equal(feeds["attention_mask"], np.ones((1, 5), np.int64))
    np.testing.assert_array_equal(feeds["position_ids"], [[3, 4]])
    assert feeds["position_ids"].dtype == np.int32
    (empty,) = found.empty_caches().values()
    assert empty.shape == (1, 2, 0, 8) and empty.dtype == np.float16


@pytest.mark.parametrize(
    ("inputs", "outputs", "words"),
    [
        ([Port("image", np.dtype(np.float32), ("N", 3))], [LOGITS], "no single input holds token numbers"),
        (
            [TOKENS, Port("types", np.dtype(np.int64), ("N", "T"))],
            [LOGITS],
            "no single input holds token numbers",
        ),
        ([TOKENS], [Port("state", np.dtype(np.float32), ("N", 8))], "no single output can be the logits"),
        (
            [TOKENS],
            [LOGITS, Port("other", np.dtype(np.float32), ("N", "T", 9))],
            "no single output can be the logits",
        ),
        ([TOKENS, Port("x", np.dtype(np.float32), ("N", 8))], [LOGITS], "nothing that a decoder takes"),
        ([TOKENS, Port("p", np.dtype(np.float32), ("N", 2, 64, 8))], [LOGITS], "fixed length"),
        (
            [TOKENS, Port("p", np.dtype(np.float32), ("N", "H", "P", 8))],
            [LOGITS],
            "leaves more than its length open",
        ),
        ([TOKENS, Port("p", np.dtype(np.float32), (4, 2, "P", 8))], [LOGITS], "several sequences"),
        ([Port("ids", np.dtype(np.int64), (4, "T"))], [LOGITS], "several sequences"),
    ],
)
def test_what_is_no_decoder_is_refused(inputs: list[Port], outputs: list[Port], words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        find_interface(inputs, outputs)
    assert caught.value.fix


@pytest.mark.parametrize("wrong", [48, -1])
def test_tokens_that_the_model_lacks_are_refused(wrong: int) -> None:
    with pytest.raises(DataError, match=f"token {wrong} is none of the model's 48 tokens"):
        find_interface([TOKENS], [LOGITS]).check_tokens([0, 47, wrong], "prompt")


def test_caches_of_one_shape_are_told_apart_by_the_graph() -> None:
    model = ir.serde.deserialize_model(llama_model(Sizes(cache=True)))
    assert pairs_of(model) == {f"past_{p}{n}": f"new_past_{p}{n}" for n in range(2) for p in "kv"}


def test_caches_of_fused_attention() -> None:
    cache = "float[N, 2, P, 8]"
    model = parsed(
        f"float[N, T, 32] q, {cache} b, {cache} a",
        f"float[N, T, 32] logits, {cache.replace('P', 'R')} first, {cache.replace('P', 'R')} second",
        "logits, first, second = com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=2>"
        "(q, q, q, a, b, ids, ids)",
    )
    outputs = ports_of(model.graph.outputs)
    inputs = [p for p in ports_of(model.graph.inputs) if p.name != "q"]
    assert cache_pairs(model, find_interface(inputs, outputs)) == {"a": "first", "b": "second"}


def test_a_cache_that_is_turned_and_stored_in_other_types_is_followed() -> None:
    model = parsed(
        "float[N, 2, P, 8] p, float[N, 2, P, 8] r, float[N, T, 9] x, float[N, 2, T, 8] new",
        "float[N, T, 9] logits, float[N, 2, Q, 8] one, float[N, 2, Q, 8] two",
        "logits = Identity(x) a = Cast<to=10>(p) b = Cast<to=1>(a) two = Concat<axis=2>(b, new) "
        "one = Concat<axis=2>(r, new)",
    )
    inputs = [p for p in ports_of(model.graph.inputs) if p.name not in ("x", "new")]
    assert cache_pairs(model, find_interface(inputs, ports_of(model.graph.outputs))) == {
        "p": "two",
        "r": "one",
    }


def test_what_the_graph_does_not_say_is_refused() -> None:
    cache = "float[N, 2, P, 8]"
    model = parsed(
        f"{cache} p, {cache} r, float[N, T, 9] x",
        f"float[N, T, 9] logits, {cache} one, {cache} two",
        "logits = Identity(x) one = Add(p, r) two = Mul(p, r)",
    )
    inputs = [p for p in ports_of(model.graph.inputs) if p.name != "x"]
    interface = find_interface(inputs, ports_of(model.graph.outputs))
    with pytest.raises(ModelError, match="any of 'one', 'two' could continue the cache 'p'"):
        cache_pairs(model, interface)


def test_a_cache_that_nothing_continues_is_refused() -> None:
    model = parsed("float[N, 2, P, 8] p, float[N, T, 9] x", "float[N, T, 9] logits", "logits = Identity(x)")
    inputs = [p for p in ports_of(model.graph.inputs) if p.name != "x"]
    with pytest.raises(ModelError, match="none of the outputs continues the cache 'p'"):
        cache_pairs(model, find_interface(inputs, ports_of(model.graph.outputs)))
