"""Remove nodes that hand their input on unchanged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from bitwright.compiler.graph.model import dtype_of, int_attribute, ints_attribute, is_op, static_shape
from bitwright.passes.contract import PassResult
from bitwright.passes.rewriting import bypass, frozen_array, graph_of


@dataclass(frozen=True)
class RemoveIdentity:
    """Remove Identity, inference Dropout, Cast to the same type, Transpose and Reshape without effect.

    A node between a graph input (or an outer-scope value) and a graph output stays: the two names must both
    exist.
    """

    name: ClassVar[str] = "remove_identity"

    def run(self, model: ir.Model) -> PassResult:
        """Remove."""
        nodes = [node for graph in model.graphs() for node in graph]
        removed = sum(bypass(node.outputs[0], source) for node in nodes if (source := _unchanged_input(node)))
        return PassResult(model, removed)


def _unchanged_input(node: ir.Node) -> ir.Value | None:
    """Return the input that the node's first output always equals, in type and shape too."""
    source = node.inputs[0] if node.inputs else None
    if source is None or not _is_unchanged(node, source) or _renames_default(node, source):
        return None
    return source


def _is_unchanged(node: ir.Node, source: ir.Value) -> bool:
    if is_op(node, "Identity"):
        return True
    if is_op(node, "Dropout"):
        return _is_inference_dropout(node)
    if is_op(node, "Cast"):
        return dtype_of(source) is not None and int_attribute(node, "to", 0) == int(source.dtype or 0)
    if is_op(node, "Transpose"):
        perm = ints_attribute(node, "perm", ())
        return bool(perm) and perm == tuple(range(len(perm)))
    if is_op(node, "Reshape"):
        shape = static_shape(source)
        return shape is not None and shape == static_shape(node.outputs[0])
    return False


def _is_inference_dropout(node: ir.Node) -> bool:
    """Training mode must be absent or a constant false, and nobody may read the mask."""
    if any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
        return False
    mode = node.inputs[2] if len(node.inputs) > 2 else None
    if mode is None:
        return True
    value = frozen_array(mode)
    return value is not None and not value.any()


def _renames_default(node: ir.Node, source: ir.Value) -> bool:
    """Tell whether the source is an outer-scope value that would become the output of a subgraph."""
    return node.outputs[0].is_graph_output() and source.graph is not graph_of(node)
