"""Take the mean error that quantization leaves at the output of each layer out of its bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.compiler.graph.model import (
    FreshNames,
    node_label,
    only_consumer,
)
from bitwright.compiler.moments import InputMoments
from bitwright.compiler.plan.model import ActivationQuant, NodeDecision, Plan
from bitwright.compiler.plan.weight_grids import matrices_of
from bitwright.compiler.rounding.grid import codebook
from bitwright.compiler.rounding.layout import as_matrices
from bitwright.passes.contract import PassResult
from bitwright.passes.dequantized import dequantized_array
from bitwright.passes.rewriting import add_initializer, frozen_array, set_input

_FLOAT8 = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}


@dataclass(frozen=True)
class CorrectBias:
    """Add ``E[x W] - E[Q(x) Q(W)]`` to the biases (Nagel et al. 2019, "Data-Free Quantization", section 4.2).

    Runs behind the rounding passes and before InsertQDQ, which turns biases into integers. The expectation is
    over the calibration rows: exact for what the weights contribute, and from the kept rows for what rounding the
    activations does. A bias is added where an operand is free for it (Conv, Gemm); a MatMul is corrected in the
    constant Add behind it, and left alone where there is none.

    Attributes:
        plan: Names the activations that each node reads as integers, and their quantizers.
        moments: Input moments by node name, of ``reference``.
        reference: The float model before rounding, with the same node names.
    """

    plan: Plan
    moments: Mapping[str, InputMoments]
    reference: ir.Model

    @property
    def name(self) -> str:
        """The pass's name."""
        return "correct_bias"

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite ``model`` in place."""
        fresh, notes = FreshNames(model), []
        originals = {node_label(n): n for n in self.reference.graph}
        changed = 0
        for node in list(model.graph):
            label = node_label(node)
            decision = self.plan.nodes.get(label)
            if decision is None or not decision.weight or label not in self.moments or label not in originals:
                continue
            rounded = dequantized_array(node.inputs[1])
            weights = matrices_of(originals[label])
            place = _Place.of(node, originals[label])
            if rounded is None or weights is None or place is None:
                notes.append(f"{label}: no bias that can be corrected")
                continue
            moments = self.moments[label]
            matrices = as_matrices(rounded, moments.groups, conv=node.op_type == "Conv")
            shift = output_shift(moments, weights, matrices, self._activation(decision))
            changed += place.write(model, place.bias(len(shift)) + shift, fresh)
        return PassResult(model, changed, tuple(notes))

    def _activation(self, decision: NodeDecision) -> ActivationQuant | None:
        return self.plan.activations.get(decision.inputs[0]) if decision.inputs else None


def output_shift(
    moments: InputMoments,
    weights: NDArray[np.float32],
    rounded: NDArray[np.generic],
    activation: ActivationQuant | None,
) -> NDArray[np.float64]:
    """Return ``E[x W] - E[Q(x) Q(W)]``, one value a output channel, float64, shape (G * N,).

    Split as ``E[x] (W - Q(W)) + E[x - Q(x)] Q(W)``: the first mean is known from all rows, the second only from the
    kept ones. Where inputs are rounded without a preference, the second is zero and what is seen of it is chance:
    it is shrunk by its own standard error.

    Args:
        moments: Of the float inputs.
        weights: W as matrices (G, K, N).
        rounded: Q(W) likewise.
        activation: The input's quantizer; None where it is read in float, or scaled at run time.
    """
    quantized = rounded.astype(np.float64)
    shift = np.einsum("gk,gkn->gn", moments.mean, weights.astype(np.float64) - quantized)
    if activation is not None:
        lost = (moments.rows - quantize_rows(moments.rows, activation)).transpose(1, 0, 2)  # (G, n, K)
        shift += shrunk_mean(lost @ quantized.astype(np.float32), moments.count)
    found: NDArray[np.float64] = shift.reshape(-1)
    return found


def shrunk_mean(errors: NDArray[np.float32], population: int) -> NDArray[np.float64]:
    """Return means over sampled rows, drawn to zero as far as chance explains them.

    Each mean m with standard error s is multiplied by ``max(0, 1 - s^2 / m^2)`` (positive-part James-Stein); s is that
    of a sample without replacement, so the mean over all rows stays as it is.

    Args:
        errors: Shape (G, n, N).
        population: Rows that the n were taken from.

    Returns:
        Shape (G, N).
    """
    n = errors.shape[1]
    mean, variance = (f(errors, axis=1, dtype=np.float64) for f in (np.mean, np.var))
    unseen = variance / n * max(0.0, 1 - n / population)
    square = mean * mean
    found: NDArray[np.float64] = mean * (
        1 - np.divide(unseen, square, out=np.ones_like(mean), where=square > unseen)
    )
    return found


def quantize_rows(rows: NDArray[np.float32], quant: ActivationQuant) -> NDArray[np.float32]:
    """Return what rows are after quantization and dequantization, float32, any shape."""
    scale = np.float32(quant.scale)
    if quant.dtype in _FLOAT8:
        grid = codebook(_FLOAT8[quant.dtype])
        return grid.nearest(rows / scale) * scale
    info = np.iinfo(quant.dtype)
    zero = np.float32(quant.zero_point)
    steps = np.clip(np.rint(rows / scale) + zero, np.float32(info.min), np.float32(info.max))
    found: NDArray[np.float32] = ((steps - zero) * scale).astype(np.float32)
    return found


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a layer's bias is, or could be.

    Attributes:
        node, index: The node and the operand of the model that is rounded.
        known: The bias of the reference; None where it has none.
        written: The bias now.
    """

    node: ir.Node
    index: int
    known: NDArray[np.generic] | None
    written: NDArray[np.generic] | None

    @staticmethod
    def of(node: ir.Node, original: ir.Node) -> _Place | None:
        """Find it; None where there is no place that costs nothing."""
        if node.op_type == "MatMul":
            return _behind(node, original)
        if any(node.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta")):
            return None
        written, known = (n.inputs[2] if len(n.inputs) > 2 else None for n in (node, original))
        place = _Place(node, 2, frozen_array(known), frozen_array(written))
        return None if (written is None) != (place.written is None) else place

    def bias(self, channels: int) -> NDArray[np.float64]:
        """Return the reference's bias, shape (channels,)."""
        if self.known is None:
            return np.zeros(channels)
        return np.broadcast_to(self.known.astype(np.float64).reshape(-1), (channels,))

    def write(self, model: ir.Model, bias: NDArray[np.float64], fresh: FreshNames) -> bool:
        """Set the bias; False if it has this value already."""
        shape = bias.shape
        if self.written is not None and self.written.size == bias.size:
            shape = self.written.shape
        array = bias.astype(np.float32).reshape(shape)
        if self.written is not None and np.array_equal(self.written, array):
            return False
        before = self.node.inputs[self.index] if len(self.node.inputs) > self.index else None
        stem = (before.name if before is not None else None) or f"{node_label(self.node)}_bias"
        set_input(self.node, self.index, add_initializer(model.graph, fresh(f"{stem}_corrected"), array))
        return True


def _behind(node: ir.Node, original: ir.Node) -> _Place | None:
    """Return the constant operand of the Add behind a MatMul."""
    found = [_added_constant(n) for n in (node, original)]
    if found[0] is None or found[1] is None:
        return None
    (add, index, written), (_, _, known) = found[0], found[1]
    return _Place(add, index, known, written)


def _added_constant(node: ir.Node) -> tuple[ir.Node, int, NDArray[np.generic]] | None:
    add, product = only_consumer(node.outputs[0]), node.outputs[0]
    if add is None or add.op_type != "Add" or add.graph is not node.graph:
        return None
    for index, value in enumerate(add.inputs):
        array = frozen_array(value)
        if value is not product and array is not None and array.ndim and array.size == array.shape[-1]:
            return (add, index, array) if array.size == _channels(node) else None
    return None


def _channels(node: ir.Node) -> int:
    weight = node.inputs[1]
    return int(weight.shape[-1]) if weight is not None and weight.shape is not None else -1  # type: ignore[arg-type]
