"""Compute at compile time what depends on constants only."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnxscript.optimizer import _constant_folding as folding

from bitwright.compiler.errors import ModelError
from bitwright.compiler.graph.model import is_op, static_shape
from bitwright.passes.contract import PassResult

DEFAULT_BUDGET_BYTES = 1 << 20
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
GROWING = ("ConstantOfShape", "Expand", "Tile", "Range", "Resize", "OneHot", "Pad")
TIED_RANK = 2  # constants of lower rank are biases and shapes, free to copy


@dataclass(frozen=True)
class FoldConstants:
    """Fold constant expressions with onnxscript's folder, which also shapes chains of Shape, Gather, Concat.

    Never folded: quantizers (they are the quantization), random operators, the Transpose of a weight that
    another node reads as well (an embedding table tied to the output layer), and results that would add more
    than ``budget_bytes`` to the model.

    Attributes:
        budget_bytes: Largest growth one folded node may cause.
    """

    budget_bytes: int = DEFAULT_BUDGET_BYTES
    name: ClassVar[str] = "fold_constants"

    def run(self, model: ir.Model) -> PassResult:
        """Fold.

        Raises:
            ModelError: A node is so malformed that its constant inputs cannot be understood.
        """
        before = _nodes(model)
        folder = folding.FoldConstantsPass(
            shape_inference=True,
            input_size_limit=sys.maxsize,
            output_size_limit=sys.maxsize,
            should_fold=self._should_fold,
        )
        with _quiet(folding.logger):
            try:
                modified = folder(model).modified
            except RuntimeError as error:
                msg = f"{error}: {error.__cause__}"
                raise ModelError(msg, fix="export the model again") from error
        _drop_provenance(model)
        return PassResult(model, max(1, before - _nodes(model)) if modified else 0)

    def _should_fold(self, node: ir.Node) -> bool:
        if is_op(node, *QUANTIZERS) or _is_tied_transpose(node):
            return False
        consumed = sum(_bytes(v) for v in set(node.inputs) if v is not None and len(v.uses()) == 1)
        produced = _output_bytes(node)
        if produced is None:
            return not is_op(node, *GROWING) and consumed <= self.budget_bytes
        return produced - consumed <= self.budget_bytes


def _is_tied_transpose(node: ir.Node) -> bool:
    source = node.inputs[0] if node.inputs else None
    if source is None or not is_op(node, "Transpose") or source.const_value is None:
        return False
    return len(source.const_value.shape) >= TIED_RANK and len(source.uses()) > 1


def _bytes(value: ir.Value) -> int:
    return value.const_value.nbytes if value.const_value is not None else 0


def _output_bytes(node: ir.Node) -> int | None:
    """Return the size of the result, or None where inference does not know it."""
    total = 0
    for output in node.outputs:
        shape = static_shape(output)
        if shape is None or output.dtype is None:
            return None
        elements = 1
        for size in shape:
            elements *= size
        total += int(elements * output.dtype.itemsize)
    return total


def _nodes(model: ir.Model) -> int:
    return sum(len(graph) for graph in model.graphs())


def _drop_provenance(model: ir.Model) -> None:
    """Remove the notes on folded names that onnxscript writes into the metadata of values."""
    for graph in model.graphs():
        for node in graph:
            for value in [*node.inputs, *node.outputs]:
                if value is not None:
                    value.metadata_props.pop(folding.FOLDED_FROM_KEY, None)


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Silence warnings about nodes that are left unfolded: leaving them is a normal outcome."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
