"""Spell out the DequantizeLinear of constants as arithmetic that a runtime folds when it loads the model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import FreshNames, dtype_of, int_attribute, is_op
from bitwright.passes.contract import PassResult
from bitwright.passes.rewriting import add_initializer, fresh_names, frozen_array, graph_of, replace_node

STORED = frozenset({"INT8", "UINT8", "INT16", "UINT16", "FLOAT8E4M3FN", "FLOAT8E5M2"})


@dataclass(frozen=True)
class ExpandDequantize:
    """Rewrite ``DequantizeLinear(constant)`` as ``Mul(Cast(constant), scale)``, with a Sub for a zero point.

    ONNX Runtime keeps a DequantizeLinear for its fusions and, where none fits (16-bit activations, float8), computes
    it on every call: up to 17 times a float MatMul's time. Cast and Mul it folds once. The float weights are equal
    bit for bit, the file stays small, and the memory at run time is that of the float model. Not for weights of
    integer kernels: those need their DequantizeLinear.

    Attributes:
        weights: Names of the stored tensors (first inputs of DequantizeLinear); None for all constants.
        types: ONNX element types that are rewritten.
    """

    weights: frozenset[str] | None = None
    types: frozenset[str] = STORED

    @property
    def name(self) -> str:
        """The pass's name."""
        return "expand_dequantize"

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite ``model`` in place; blocked scales stay as they are."""
        names = fresh_names(model)
        changed = 0
        for graph in model.graphs():
            for node in list(graph):
                if is_op(node, "DequantizeLinear") and self._wanted(node):
                    changed += _expand(graph, node, names)
        return PassResult(model, changed)

    def _wanted(self, node: ir.Node) -> bool:
        stored = node.inputs[0]
        dtype = dtype_of(stored)
        known = dtype is not None and dtype.name in self.types and frozen_array(stored) is not None
        return known and stored is not None and (self.weights is None or stored.name in self.weights)


def _expand(graph: ir.Graph, node: ir.Node, names: FreshNames) -> bool:
    stored, scale = node.inputs[0], frozen_array(node.inputs[1])
    zero = frozen_array(node.inputs[2]) if len(node.inputs) > 2 else None
    has_zero = len(node.inputs) > 2 and node.inputs[2] is not None
    if (
        stored is None
        or scale is None
        or scale.ndim > 1
        or scale.dtype != np.float32
        or (has_zero and zero is None)
    ):
        return False
    assert stored.shape is not None, "a constant has a shape"
    shape = _broadcast_shape(scale, len(stored.shape), int_attribute(node, "axis", 1))
    stem = stored.name or "weight"
    cast = ir.node("Cast", [stored], {"to": int(ir.DataType.FLOAT)}, name=names(f"{stem}_to_float32"))
    steps = [cast]
    if zero is not None and (zero.astype(np.float32) != 0).any():
        offset = add_initializer(graph, names(f"{stem}_offset"), zero.astype(np.float32).reshape(shape))
        steps.append(ir.node("Sub", [cast.outputs[0], offset], name=names(f"{stem}_Sub")))
    factor = add_initializer(graph, names(f"{stem}_factor"), scale.reshape(shape))
    steps.append(ir.node("Mul", [steps[-1].outputs[0], factor], name=names(f"{stem}_Mul")))
    for step in steps:
        out = step.outputs[0]
        out.name, out.type, out.shape = (
            names(f"{step.name}_out"),
            ir.TensorType(ir.DataType.FLOAT),
            stored.shape,
        )
    assert graph_of(node) is graph
    replace_node(node, steps, [steps[-1].outputs[0]])
    return True


def _broadcast_shape(scale: np.ndarray, rank: int, axis: int) -> tuple[int, ...]:
    if scale.size == 1:
        return ()
    shape = [1] * rank
    shape[axis % rank] = scale.size
    return tuple(shape)
