"""What masks let a position see is read from the comparisons that compute them, or at least bounded."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from bitwright.compiler.llama.window import EVERYTHING, Sight, sight_of
from bitwright.passes.lift_constants import LiftConstants

HEADER = '<ir_version: 10, opset_import: ["" : 21]> g (int64[N, T] ids) => (bool[T, T] mask)'
START = """
 n = Shape <start = 1, end = 2> (ids)
 axis = Constant <value_ints = [0]> ()
 length = Squeeze (n, axis)
 zero = Constant <value_int = 0> ()
 one = Constant <value_int = 1> ()
 last = Constant <value_ints = [-1]> ()
 k = Range (zero, length, one)
 q = Unsqueeze (k, last)
 causal = LessOrEqual (k, q)
"""
SEVEN = "c = Constant <value_int = 7> ()"
# Each lets a position see itself and the six before it; q is a row, k a column.
WINDOWS_OF_SEVEN = {
    "k > q - 7": "s = Sub (q, c) near = Greater (k, s)",
    "q - 7 < k": "s = Sub (q, c) near = Less (s, k)",
    "k + 7 > q": "s = Add (c, k) near = Greater (s, q)",
    "q - k < 7": "s = Sub (q, k) near = Less (s, c)",
    "7 > q - k": "s = Sub (q, k) near = Greater (c, s)",
    "k - q > -7": "s = Sub (k, q) c2 = Constant <value_int = -7> () near = Greater (s, c2)",
    "q - k <= 6": "d = Constant <value_int = 6> () s = Sub (q, k) near = LessOrEqual (s, d)",
    "not k <= q - 7": "s = Sub (q, c) far = LessOrEqual (k, s) near = Not (far)",
    "not k < q - 6": "d = Constant <value_int = 6> () s = Sub (q, d) far = Less (k, s) near = Not (far)",
    "not q - k >= 7": "s = Sub (q, k) far = GreaterOrEqual (s, c) near = Not (far)",
    "as floats": """qf = Cast <to = 1> (q) kf = Cast <to = 1> (k) cf = Constant <value_float = 7.0> ()
        s = Sub (qf, kf) near = Less (s, cf)""",
}


def mask(body: str, tables: dict[str, np.ndarray] | None = None) -> ir.Value:
    proto = onnx.parser.parse_model(f"{HEADER} {{ {START} {SEVEN} {body} }}")
    for name, array in (tables or {}).items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = ir.from_proto(proto)
    LiftConstants().run(model)
    return model.graph.outputs[0]


@pytest.mark.parametrize("body", WINDOWS_OF_SEVEN.values(), ids=WINDOWS_OF_SEVEN)
def test_windows_are_read(body: str) -> None:
    found = sight_of(mask(f"{body} mask = And (causal, near)"))
    assert found.window == 7
    assert found.largest in (6, 7)


def test_masks_that_only_hide_what_follows_have_none() -> None:
    assert sight_of(None) == EVERYTHING
    assert sight_of(mask("mask = Identity (causal)")) == Sight(None, 1)
    shifted = "s = Add (q, one) mask = Less (k, s)"
    assert sight_of(mask(shifted)) == Sight(None, 1)
    assert sight_of(mask("s = Constant <value_int = 9> () mask = Less (k, s)")).window is None, "no distance"


def test_numbers_that_may_limit_are_found() -> None:
    unread = "t = Mod (q, c) mask = Less (t, k)"
    assert sight_of(mask(unread)) == Sight(None, 7)
    two = """d = Constant <value_int = 9> () a = Sub (q, c) b = Sub (q, d)
        x = Less (a, k) y = Less (b, k) mask = And (x, y)"""
    assert sight_of(mask(two)) == Sight(None, 9)
    endless = "e = Constant <value_ints = [9223372036854775807]> () mask = Slice (causal, axis, e)"
    assert sight_of(mask(endless)) == Sight(None, 1)


def test_tables_are_triangles_or_as_large_as_they_are() -> None:
    size = 80
    body = "part = Slice (table, axis, n) mask = Identity (part)"
    full = np.tri(size, dtype=bool)
    assert sight_of(mask(body, {"table": full})).largest == 0
    assert sight_of(mask(body, {"table": full & ~np.tri(size, k=-9, dtype=bool)})).largest == size
    scores = np.where(full, 0.0, -np.inf).astype(np.float32)[None, None]
    assert sight_of(mask(body, {"table": scores})).largest == 0
