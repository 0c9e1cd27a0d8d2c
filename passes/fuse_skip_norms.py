"""Write a residual addition and the RMS normalization behind it as one operator of ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from bitwright.compiler.errors import ModelError
from bitwright.compiler.graph.model import FreshNames, is_op, node_label, rank
from bitwright.compiler.llama.parts import NORM_OPERATORS, Norm, expect_norm
from bitwright.passes.contract import PassResult
from bitwright.passes.remove_unused import RemoveUnused
from bitwright.passes.rewriting import fresh_names, take_over

DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class FuseSkipNorms:
    """``RMSNorm(a + b)``, spelled out or not, becomes com.microsoft.SkipSimplifiedLayerNormalization.

    The operator's last result is the sum, which the next residual addition reads. ONNX Runtime itself fuses the
    normalization, but not with the addition; and it does not see one behind a DequantizeLinear, of which every reader
    gets its own copy. So what is no sum is written as the sum of itself with itself: twice the input over twice its
    root mean square, with four times the epsilon, is the same number, rounded the same.
    """

    name: ClassVar[str] = "fuse_skip_norms"

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite ``model`` in place."""
        found = [(n.outputs[0], norm) for n in model.graph if (norm := _norm_of(n)) is not None]
        names = fresh_names(model) if found else None
        for normed, norm in found:
            assert names is not None
            _rewrite(model.graph, normed, norm, names)
        if found:
            model.opset_imports.setdefault(DOMAIN, 1)
            RemoveUnused().run(model)
        return PassResult(model, len(found))


def _norm_of(node: ir.Node) -> Norm | None:
    """Return the normalization that ends in a node, if the operator computes it."""
    if node.op_type not in ("Mul", *NORM_OPERATORS):
        return None
    try:
        norm = expect_norm(node.outputs[0])
    except ModelError:
        return None
    return norm if norm.summed is None and _is_stream(norm.data) else None


def _is_stream(value: ir.Value | None) -> bool:
    """Tell whether a value is computed, of shape (batch, length, width), in float32."""
    return (
        value is not None
        and value.producer() is not None
        and rank(value) == 3
        and value.dtype == ir.DataType.FLOAT
    )


def _rewrite(graph: ir.Graph, normed: ir.Value, norm: Norm, names: FreshNames) -> None:
    add, before = norm.data.producer(), normed.producer()
    assert add is not None and before is not None, "both are computed"
    joined = is_op(add, "Add") and all(_is_stream(v) for v in add.inputs)
    operands, epsilon = (add.inputs, norm.epsilon) if joined else ([norm.data] * 2, 4 * norm.epsilon)
    node = ir.node(
        "SkipSimplifiedLayerNormalization",
        [*operands, norm.source],
        {"epsilon": epsilon},
        domain=DOMAIN,
        num_outputs=4 if joined else 1,
        name=names(f"{node_label(before)}_normalized"),
    )
    # A sum has other readers, in front of the normalization's end.
    graph.insert_before(add if joined else before, node)
    take_over(normed, node.outputs[0])
    if joined:
        take_over(norm.data, node.outputs[3])
        for unread in node.outputs[1:3]:
            unread.name = ""
