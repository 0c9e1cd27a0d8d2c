"""Round once behind a movement of data instead of before and behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import constant_array, is_op, only_consumer
from bitwright.passes.contract import PassResult
from bitwright.passes.remove_unused import RemoveUnused

MOVES = ("Transpose", "Reshape")


@dataclass(frozen=True)
class SinkQuantizers:
    """Let a Transpose or Reshape read what was quantized in front of it, if it is quantized by the same scale behind.

    Moving values and rounding them commute, and rounding twice by one scale is rounding once: the results are equal bit
    for bit. A runtime that moves integers wants both quantizers; patterns of float operators want neither between them.
    """

    name: ClassVar[str] = "sink_quantizers"

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite ``model`` in place."""
        changed = 0
        for node in list(model.graph):
            before = _quantized(node) if is_op(node, *MOVES) else None
            after = only_consumer(node.outputs[0]) if before is not None else None
            if (
                before is None
                or after is None
                or not is_op(after, "QuantizeLinear")
                or not _alike(before, after)
            ):
                continue
            node.replace_input_with(0, before.inputs[0])
            changed += 1
        if changed:
            RemoveUnused().run(model)
        return PassResult(model, changed)


def _quantized(node: ir.Node) -> ir.Node | None:
    """Return the quantizer whose dequantized result a node reads; its input is of the same float type."""
    back = node.inputs[0].producer() if node.inputs[0] is not None else None
    if back is None or not is_op(back, "DequantizeLinear") or back.inputs[0] is None:
        return None
    quantizer = back.inputs[0].producer()
    if quantizer is None or not is_op(quantizer, "QuantizeLinear") or not _alike(quantizer, back):
        return None
    return quantizer


def _alike(first: ir.Node, other: ir.Node) -> bool:
    """Tell whether two quantizers or dequantizers have one and the same scale and zero point."""
    for k in (1, 2):
        one, two = (constant_array(n.inputs[k]) if len(n.inputs) > k else None for n in (first, other))
        if (one is None) != (two is None) or (k == 1 and one is None):
            return False
        if one is not None and two is not None:
            same = one.size == two.size == 1 and one.dtype == two.dtype
            if not same or not np.array_equal(one.reshape(-1), two.reshape(-1)):
                return False
    return True
