"""Merge chains of Transpose and chains of Reshape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import int_attribute, ints_attribute, is_op
from bitwright.passes.contract import PassResult
from bitwright.passes.rewriting import frozen_array


@dataclass(frozen=True)
class MergeDataMovement:
    """``Transpose(Transpose(x))`` becomes one Transpose, ``Reshape(Reshape(x))`` the outer Reshape.

    A merged Transpose that changes nothing is left for ``remove_identity``; the inner node goes when nobody
    else reads it. An outer Reshape that copies dimensions from its input (0 without ``allowzero``) is left
    alone.
    """

    name: ClassVar[str] = "merge_data_movement"

    def run(self, model: ir.Model) -> PassResult:
        """Merge."""
        nodes = [node for graph in model.graphs() for node in graph]
        return PassResult(model, sum(_merge(node) for node in nodes))


def _merge(node: ir.Node) -> bool:
    source = node.inputs[0] if node.inputs else None
    inner = source.producer() if source is not None else None
    if inner is None or inner.graph is not node.graph:
        return False
    if is_op(node, "Transpose") and is_op(inner, "Transpose"):
        return _merge_transposes(inner, node)
    if is_op(node, "Reshape") and is_op(inner, "Reshape") and not _copies_dimensions(node):
        node.replace_input_with(0, inner.inputs[0])
        return True
    return False


def _merge_transposes(inner: ir.Node, outer: ir.Node) -> bool:
    first, second = ints_attribute(inner, "perm", ()), ints_attribute(outer, "perm", ())
    if not first or len(first) != len(second):
        return False
    outer.attributes["perm"] = ir.AttrInt64s("perm", [first[axis] for axis in second])
    outer.replace_input_with(0, inner.inputs[0])
    return True


def _copies_dimensions(reshape: ir.Node) -> bool:
    target = frozen_array(reshape.inputs[1])
    return target is None or (not int_attribute(reshape, "allowzero", 0) and bool(np.any(target == 0)))
