"""The ONNX graph of a checkpoint, spelled out in operators that every runtime has; the weights stay where they are."""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx_ir as ir

from bitwright.compiler.hugging_face.checkpoint import Checkpoint
from bitwright.compiler.hugging_face.config import check_context
from bitwright.compiler.hugging_face.graph_writer import GraphWriter
from bitwright.compiler.hugging_face.names import (
    EMBEDDING,
    HEAD,
    HEAD_NORMS,
    LAYER_LINEARS,
    LAYER_NORMS,
    NORM,
)
from bitwright.compiler.llama.decoder import HyperParameters

Form = Literal["plain", "cache"]
FloatName = Literal["float32", "float16"]
OPSET, IR_VERSION = 21, 10
TOKENS, LOGITS = "input_ids", "logits"
# Far below any score, and still a float32 after scores are added.
MASKED = -1e9


def decoder_model(
    checkpoint: Checkpoint, form: Form = "cache", dtype: FloatName = "float32", *, context: int | None = None
) -> ir.Model:
    """Return the graph of a decoder.

    ``plain``: ``input_ids`` int64 [N, T] -> ``logits`` float32 [N, T, vocabulary]. ``cache``: further inputs
    ``past_0_k``, ``past_0_v``, ... [N, key heads, P, head width] and outputs ``present_0_k``, ... [N, key heads,
    P + T, head width]; the tokens stand at positions P, P + 1, ... Products are computed in ``dtype``; normalizations,
    angles and Softmax in float32.

    Args:
        checkpoint: Where the weights are; initializers read it when they are asked for their values.
        form: With a cache of keys and values, or without.
        dtype: Of weights, products and caches.
        context: Longest sequence, for which tables of positions are made; by default the checkpoint's.

    Returns:
        A model of opset 21; a tied embedding is one initializer.

    Raises:
        ModelError: The tables of positions would be too large.
    """
    hyper = checkpoint.config.hyper(context)
    check_context(hyper.context, hyper.head_width, str(checkpoint.folder))
    kind = ir.DataType.FLOAT if dtype == "float32" else ir.DataType.FLOAT16
    built = _Decoder(checkpoint, hyper, kind, cached=form == "cache")
    graph = built.graph()
    properties = {
        "architecture": checkpoint.config.architecture,
        "context_length": str(hyper.context),
        "form": form,
        "dtype": dtype,
    }
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="bitwright", metadata_props=properties)


class _Decoder:
    """Writes the nodes of one decoder, from the tokens to the logits."""

    def __init__(
        self, checkpoint: Checkpoint, hyper: HyperParameters, kind: ir.DataType, *, cached: bool
    ) -> None:
        self._hyper, self._kind, self._cached = hyper, kind, cached
        self._tied = checkpoint.config.tied
        self._w = GraphWriter(checkpoint, kind)
        self._tokens = ir.Value(
            name=TOKENS, shape=ir.Shape(["N", "T"]), type=ir.TensorType(ir.DataType.INT64)
        )
        self._pasts = [self._past(n, part) for n in range(hyper.layers) for part in "kv"] if cached else []
        self._presents: list[ir.Value] = []

    def graph(self) -> ir.Graph:
        """Write everything."""
        w = self._w
        table = w.weight(EMBEDDING)
        x = w.op("Gather", table, self._tokens, name="model.embed_tokens")
        self._positions()
        for layer in range(self._hyper.layers):
            x = self._layer(x, layer)
        x = self._norm(x, NORM.removesuffix(".weight"))
        if self._tied:
            head = w.op("Transpose", table, name="lm_head.tied", perm=[1, 0])
        else:
            head = w.weight(HEAD, transposed=True)
        logits = w.single(w.op("MatMul", x, head, name="lm_head"), "lm_head.float32")
        logits.name = LOGITS
        logits.type = ir.TensorType(ir.DataType.FLOAT)
        logits.shape = ir.Shape(["N", "T", self._hyper.vocabulary])
        return ir.Graph(
            [self._tokens, *self._pasts],
            [logits, *self._presents],
            nodes=w.nodes,
            initializers=w.initializers,
            opset_imports={"": OPSET},
            name="decoder",
        )

    def _past(self, layer: int, part: str) -> ir.Value:
        return self._cache_value(f"past_{layer}_{part}", "P")

    def _cache_value(self, name: str, positions: str) -> ir.Value:
        shape = ir.Shape(["N", self._hyper.key_heads, positions, self._hyper.head_width])
        return ir.Value(name=name, shape=shape, type=ir.TensorType(self._kind))

    def _positions(self) -> None:
        """Write what all layers share: cosines and sines of the positions, and the mask."""
        w = self._w
        new = w.op("Shape", self._tokens, name="positions.new", start=1, end=2)
        past = w.constant("zeros", np.zeros(1, np.int64))
        if self._cached:
            past = w.op("Shape", self._pasts[0], name="positions.past", start=2, end=3)
        total = w.op("Add", past, new, name="positions.total")
        cos, sin = self._tables()
        self._cos, self._sin = (
            w.working(w.op("Slice", table, past, total, w.constant("zeros"), name=name), f"{name}.cast")
            for table, name in ((cos, "positions.cos"), (sin, "positions.sin"))
        )
        first, last = (w.op("Squeeze", v, name=f"{v.name}.scalar") for v in (past, total))
        one = w.constant("one", np.array(1, np.int64))
        rows = w.op("Range", first, last, one, name="positions.rows")
        columns = w.op(
            "Range", w.constant("zero", np.array(0, np.int64)), last, one, name="positions.columns"
        )
        rows = w.op("Unsqueeze", rows, w.constant("last", np.array([-1], np.int64)), name="mask.rows")
        self._masks = {
            window: self._mask(rows, columns, window) for window in dict.fromkeys(self._hyper.windows)
        }

    def _mask(self, rows: ir.Value, columns: ir.Value, window: int | None) -> ir.Value:
        """Write what is added to scores: nothing where a position (row) sees another (column).

        A window of w positions holds the row's own and the w - 1 before it.
        """
        w = self._w
        name = "mask" if window is None else f"mask.window_{window}"
        allowed = w.op("LessOrEqual", columns, rows, name=f"{name}.allowed")
        if window is not None:
            size = w.constant(f"window_{window}", np.array(window, np.int64))
            first = w.op("Sub", rows, size, name=f"{name}.before_first")
            near = w.op("Greater", columns, first, name=f"{name}.near")
            allowed = w.op("And", allowed, near, name=f"{name}.seen")
        nothing, masked = (
            w.constant(n, np.array(v, np.float32)) for n, v in (("nothing", 0.0), ("masked", MASKED))
        )
        return w.op("Where", allowed, nothing, masked, name=name)

    def _tables(self) -> tuple[ir.Value, ir.Value]:
        """Return cosines and sines of all positions, each frequency twice, float32 [context, head width]."""
        hyper = self._hyper
        half = hyper.head_width // 2
        inverse = hyper.base ** -(np.arange(half) / half)
        if hyper.factors is not None:
            inverse = inverse / hyper.factors
        angles = np.arange(hyper.context)[:, None] * inverse
        cos, sin = (
            self._w.constant(name, np.tile(f(angles).astype(np.float32), 2))
            for name, f in (("cos_table", np.cos), ("sin_table", np.sin))
        )
        return cos, sin

    def _layer(self, x: ir.Value, layer: int) -> ir.Value:
        w, stem = self._w, f"model.layers.{layer}"
        attended = self._attention(self._norm(x, f"{stem}.{LAYER_NORMS['attn_norm']}"), layer, stem)
        x = w.op("Add", x, attended, name=f"{stem}.attention_residual")
        mixed = self._feed_forward(self._norm(x, f"{stem}.{LAYER_NORMS['ffn_norm']}"), stem)
        return w.op("Add", x, mixed, name=f"{stem}.mlp_residual")

    def _norm(self, x: ir.Value, name: str) -> ir.Value:
        """Write ``gain * (x / sqrt(mean(x^2) + eps))``, the quotient in float32."""
        w = self._w
        x = w.single(x, f"{name}.float32")
        square = w.op("Pow", x, w.constant("two", np.array(2.0, np.float32)), name=f"{name}.square")
        mean = w.op("ReduceMean", square, w.constant("last"), name=f"{name}.mean", keepdims=1)
        epsilon = w.constant("epsilon", np.array(self._hyper.epsilon, np.float32))
        root = w.op("Sqrt", w.op("Add", mean, epsilon, name=f"{name}.epsilon"), name=f"{name}.root")
        unit = w.working(w.op("Div", x, root, name=f"{name}.unit"), f"{name}.cast")
        return w.op("Mul", unit, w.weight(f"{name}.weight"), name=name)

    def _linear(self, x: ir.Value, stem: str, part: str) -> ir.Value:
        return self._w.linear(x, f"{stem}.{LAYER_LINEARS[part]}")

    def _attention(self, x: ir.Value, layer: int, stem: str) -> ir.Value:
        w, hyper = self._w, self._hyper
        name = f"{stem}.self_attn"
        counts = {"attn_q": hyper.heads, "attn_k": hyper.key_heads, "attn_v": hyper.key_heads}
        q, k, v = (self._heads(x, stem, part, n) for part, n in counts.items())
        q, k = self._rotated(q, f"{name}.q"), self._rotated(k, f"{name}.k")
        if self._cached:
            k, v = self._appended(k, layer, "k"), self._appended(v, layer, "v")
        k, v = (self._repeated(part, f"{name}.{p}") for part, p in ((k, "k"), (v, "v")))
        swapped = w.op("Transpose", k, name=f"{name}.k.swapped", perm=[0, 1, 3, 2])
        scores = w.single(w.op("MatMul", q, swapped, name=f"{name}.scores"), f"{name}.scores.float32")
        scale = w.constant("scale", np.array(hyper.head_width**-0.5, np.float32))
        scores = w.op("Mul", scores, scale, name=f"{name}.scaled")
        mask = self._masks[hyper.windows[layer]]
        shares = w.op(
            "Softmax", w.op("Add", scores, mask, name=f"{name}.masked"), name=f"{name}.shares", axis=-1
        )
        mixed = w.op("MatMul", w.working(shares, f"{name}.shares.cast"), v, name=f"{name}.mixed")
        mixed = w.op("Transpose", mixed, name=f"{name}.positions_first", perm=[0, 2, 1, 3])
        flat = w.constant("flat", np.array([0, 0, hyper.heads * hyper.head_width], np.int64))
        mixed = w.op("Reshape", mixed, flat, name=f"{name}.flat")
        return self._linear(mixed, stem, "attn_output")

    def _heads(self, x: ir.Value, stem: str, part: str, count: int) -> ir.Value:
        """Write a linear layer, its result cut into heads [N, count, T, width] that may be normalized."""
        w, name = self._w, f"{stem}.self_attn.{part[-1]}"
        shape = w.constant(f"heads_{count}", np.array([0, 0, count, self._hyper.head_width], np.int64))
        x = w.op("Reshape", self._linear(x, stem, part), shape, name=f"{name}.split")
        if self._hyper.head_norms and f"{part}_norm" in HEAD_NORMS:
            x = self._norm(x, f"{stem}.{HEAD_NORMS[f'{part}_norm']}")
        return w.op("Transpose", x, name=f"{name}.heads", perm=[0, 2, 1, 3])

    def _rotated(self, x: ir.Value, name: str) -> ir.Value:
        """Write ``x * cos + concat(-x2, x1) * sin``."""
        w, half = self._w, self._hyper.head_width // 2
        zeros, last = w.constant("zeros"), w.constant("last")
        middle = w.constant("half", np.array([half], np.int64))
        end = w.constant("whole", np.array([2 * half], np.int64))
        first = w.op("Slice", x, zeros, middle, last, name=f"{name}.first_half")
        second = w.op("Slice", x, middle, end, last, name=f"{name}.second_half")
        turned = w.op(
            "Concat", w.op("Neg", second, name=f"{name}.negated"), first, name=f"{name}.turned", axis=-1
        )
        straight = w.op("Mul", x, self._cos, name=f"{name}.straight")
        return w.op(
            "Add", straight, w.op("Mul", turned, self._sin, name=f"{name}.across"), name=f"{name}.rotated"
        )

    def _appended(self, new: ir.Value, layer: int, part: str) -> ir.Value:
        past = self._pasts[2 * layer + "kv".index(part)]
        node = ir.node("Concat", [past, new], {"axis": 2}, name=f"present_{layer}_{part}")
        present = self._cache_value(f"present_{layer}_{part}", "R")
        value = node.outputs[0]
        value.name, value.shape, value.type = present.name, present.shape, present.type
        self._w.nodes.append(node)
        self._presents.append(value)
        return value

    def _repeated(self, x: ir.Value, name: str) -> ir.Value:
        """Repeat each key or value head for the query heads that share it."""
        w, hyper = self._w, self._hyper
        times = hyper.heads // hyper.key_heads
        if times == 1:
            return x
        x = w.op("Unsqueeze", x, w.constant("axis_2", np.array([2], np.int64)), name=f"{name}.spread")
        x = w.op(
            "Expand", x, w.constant("times", np.array([1, 1, times, 1, 1], np.int64)), name=f"{name}.repeated"
        )
        shape = w.constant("all_heads", np.array([0, hyper.heads, -1, hyper.head_width], np.int64))
        return w.op("Reshape", x, shape, name=f"{name}.all_heads")

    def _feed_forward(self, x: ir.Value, stem: str) -> ir.Value:
        w, name = self._w, f"{stem}.mlp"
        gate, up = self._linear(x, stem, "ffn_gate"), self._linear(x, stem, "ffn_up")
        silu = w.op("Mul", gate, w.op("Sigmoid", gate, name=f"{name}.sigmoid"), name=f"{name}.silu")
        return self._linear(w.op("Mul", silu, up, name=f"{name}.gated"), stem, "ffn_down")
