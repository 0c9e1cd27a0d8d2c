"""Bring linear layers to one form: weights stored [K, N], no factors, no transposes at run time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import (
    FreshNames,
    consumers,
    int_attribute,
    ints_attribute,
    is_op,
    node_label,
)
from bitwright.passes.contract import PassResult
from bitwright.passes.rewriting import add_initializer, fresh_names, frozen_array, graph_of, set_input


@dataclass(frozen=True)
class CanonicalizeLinear:
    """Rewrite Gemm and MatMul with a constant weight.

    Gemm gets ``alpha = beta = 1``, ``transA = transB = 0``, its weight stored [K, N] and its bias [N]; the
    factors go into weight and bias. A MatMul whose weight stands behind a Transpose gets the transposed
    weight. Weights that several such layers share stay shared. A weight that anything else reads (an
    embedding table, say) is not transposed, because that would store it twice; a note says so.
    """

    name: ClassVar[str] = "canonicalize_linear"

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite."""
        edit = _Edit(fresh_names(model))
        for node in [n for g in model.graphs() for n in g]:
            if is_op(node, "Gemm"):
                edit.canonicalize_gemm(node)
            elif is_op(node, "MatMul", "Gemm"):
                edit.fold_transpose(node)
        return PassResult(model, edit.changed, tuple(edit.notes))


@dataclass
class _Edit:
    """One run: the weights already rewritten, so that tied layers get the same new weight."""

    names: FreshNames
    changed: int = 0
    notes: list[str] = field(default_factory=list)
    rewritten: dict[tuple[ir.Value, float, bool], ir.Value] = field(default_factory=dict)

    def canonicalize_gemm(self, gemm: ir.Node) -> None:
        steps = (self._factor_and_transpose(gemm), self._bias(gemm), self._transpose_input(gemm))
        self.changed += any(steps)

    def fold_transpose(self, matmul: ir.Node) -> None:
        """Store the weight transposed where MatMul alone reads it, through a Transpose."""
        source = matmul.inputs[1]
        transpose = source.producer() if source is not None else None
        if source is None or transpose is None or not is_op(transpose, "Transpose"):
            return
        weight = transpose.inputs[0]
        array = frozen_array(weight)
        if weight is None or array is None or source.is_graph_output() or weight.graph is not transpose.graph:
            return
        if consumers(weight) != [transpose] or weight.is_graph_output():
            self.notes.append(
                f"{node_label(matmul)}: '{weight.name}' is shared, it stays behind its Transpose"
            )
            return
        perm = ints_attribute(transpose, "perm", tuple(reversed(range(array.ndim))))
        new = self.names(f"{weight.name}_transposed")
        source.replace_all_uses_with(add_initializer(graph_of(transpose), new, array.transpose(perm)))
        self.changed += 1

    def _factor_and_transpose(self, gemm: ir.Node) -> bool:
        alpha, trans_b = gemm.attributes.get_float("alpha", 1.0), bool(int_attribute(gemm, "transB", 0))
        weight = gemm.inputs[1]
        array = frozen_array(weight)
        if (alpha == 1.0 and not trans_b) or weight is None or array is None:
            return False
        if not _only_same_gemms(weight, alpha, trans_b):
            self.notes.append(
                f"{node_label(gemm)}: '{weight.name}' is shared with another use, it stays as stored"
            )
            return False
        key = (weight, alpha, trans_b)
        if key not in self.rewritten:
            suffix = "transposed" if trans_b else "scaled"
            new = (array.T if trans_b else array) * np.asarray(alpha, array.dtype)
            self.rewritten[key] = add_initializer(
                _home(weight, gemm), self.names(f"{weight.name}_{suffix}"), new
            )
        set_input(gemm, 1, self.rewritten[key])
        _drop(gemm, "alpha", "transB")
        return True

    def _bias(self, gemm: ir.Node) -> bool:
        """Multiply a constant bias by beta and store it as [N]; one that differs by row keeps its shape."""
        beta = gemm.attributes.get_float("beta", 1.0)
        bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
        weight = gemm.inputs[1]
        array = frozen_array(bias)
        if bias is None:
            return False
        if array is None or weight is None or weight.shape is None:
            return False
        features = weight.shape[0 if int_attribute(gemm, "transB", 0) else 1]
        is_row = (
            isinstance(features, int)
            and array.size in (1, features)
            and array.shape[-1:] in ((), (array.size,))
        )
        if beta == 1.0 and (not is_row or array.shape == (features,)):
            return False
        new = array * np.asarray(beta, array.dtype)
        if is_row and isinstance(features, int):
            new = np.broadcast_to(new.reshape(-1), (features,)).copy()
        set_input(gemm, 2, add_initializer(graph_of(gemm), self.names(f"{bias.name}_row"), new))
        _drop(gemm, "beta")
        return True

    def _transpose_input(self, gemm: ir.Node) -> bool:
        source = gemm.inputs[0]
        if not int_attribute(gemm, "transA", 0) or source is None:
            return False
        transpose = ir.node(
            "Transpose", [source], {"perm": [1, 0]}, name=self.names(f"{gemm.name}_transpose")
        )
        out = transpose.outputs[0]
        out.name, out.type = self.names(f"{source.name}_transposed"), source.type
        if source.shape is not None:
            out.shape = ir.Shape(list(reversed(list(source.shape))))
        graph_of(gemm).insert_before(gemm, transpose)
        gemm.replace_input_with(0, out)
        _drop(gemm, "transA")
        return True


def _only_same_gemms(weight: ir.Value, alpha: float, trans_b: bool) -> bool:
    """Tell whether every use of ``weight`` is the B input of a Gemm with the same factors."""
    return not weight.is_graph_output() and all(
        is_op(use.node, "Gemm")
        and use.idx == 1
        and use.node.attributes.get_float("alpha", 1.0) == alpha
        and bool(int_attribute(use.node, "transB", 0)) == trans_b
        for use in weight.uses()
    )


def _home(weight: ir.Value, gemm: ir.Node) -> ir.Graph:
    """Return the graph that holds ``weight``, so that uses in several subgraphs can share the new one."""
    return weight.graph if isinstance(weight.graph, ir.Graph) else graph_of(gemm)


def _drop(node: ir.Node, *attributes: str) -> None:
    for name in attributes:
        if name in node.attributes:
            del node.attributes[name]
