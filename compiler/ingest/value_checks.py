"""Rules on the numbers in constant tensors: finite, and of plausible size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.mapped import MappedTensor
from bitwright.compiler.graph.model import node_label
from bitwright.compiler.ingest.text import quoted, refused

# A bias this many times larger than the largest weight drowns the layer's products in float32 (24 bits of
# mantissa).
_ABSURD_BIAS = 1e6
_MOVES = frozenset(
    [
        "Identity",
        "Cast",
        "Reshape",
        "Flatten",
        "Squeeze",
        "Unsqueeze",
        "Transpose",
        "Slice",
        "Gather",
        "Concat",
        "Expand",
        "Tile",
        "Trilu",
        "Split",
    ]
)
# Where an infinity is a mask or the neutral bound of a comparison; -inf may also be added to attention
# scores.
_MASKS = frozenset(
    [
        "Where",
        "Clip",
        "Max",
        "Min",
        "Equal",
        "Less",
        "LessOrEqual",
        "Greater",
        "GreaterOrEqual",
        "ReduceMax",
        "ReduceMin",
    ]
)
_NARROW_BITS = 16


@dataclass(frozen=True)
class Extremes:
    """What a scan of a tensor found.

    Attributes:
        peak: Largest absolute value; meaningless if there is a NaN.
        first: Flat index of the first element that is not finite, or None.
        value: That element, 0.0 if there is none.
        maskable: All non-finite elements are infinities.
        positive: Whether +inf occurs.
    """

    peak: float
    first: int | None
    value: float
    maskable: bool
    positive: bool


def check_values(model: ir.Model, file: str) -> list[str]:
    """Check the numbers of every constant tensor.

    An infinity is accepted, with a warning, in a constant that only masks or bounds other values.

    Returns:
        Warnings, each ``where: what``.

    Raises:
        ModelError: Names the tensor and the index of the first NaN or infinity.
    """
    warnings: list[str] = []
    peaks: dict[ir.Value, float] = {}
    for label, tensor, value in _constants(model):
        found = scan(tensor)
        if found is None:
            continue
        if value is not None:
            peaks[value] = found.peak
        if found.first is None:
            continue
        shape = tuple(int(d) for d in tensor.shape.numpy())
        index = [int(i) for i in np.unravel_index(found.first, shape)]
        if value is None or not found.maskable or not _only_masks(value, found.positive):
            what = f"element {index} is {found.value}; quantization needs finite weights"
            fix = "repair the checkpoint (often a diverged training run) and export again"
            raise refused(file, label, what, fix)
        warnings.append(f"{file}: {label}: element {index} is {found.value}, accepted as a mask or bound")
    return warnings + [f"{file}: {text}" for text in _absurd_biases(model, peaks)]


def scan(tensor: ir.TensorProtocol) -> Extremes | None:
    """Find the extremes of a floating-point tensor, 1 MiB at a time; None for others and empty ones."""
    if not tensor.dtype.is_floating_point() or tensor.size == 0:
        return None
    found = Extremes(0.0, None, 0.0, maskable=True, positive=False)
    start = 0
    for chunk in _chunks(tensor):
        high, low = float(chunk.max()), float(chunk.min())
        if not (math.isfinite(high) and math.isfinite(low)):
            found = _with_bad_chunk(found, chunk, start)
        found = replace(found, peak=max(found.peak, high, -low))
        start += chunk.size
    return found


def _with_bad_chunk(found: Extremes, chunk: np.ndarray, start: int) -> Extremes:
    bad = np.flatnonzero(~np.isfinite(chunk))
    if found.first is None:
        found = replace(found, first=start + int(bad[0]), value=float(chunk[bad[0]]))
    maskable = found.maskable and not bool(np.isnan(chunk[bad]).any())
    return replace(found, maskable=maskable, positive=found.positive or bool(np.isposinf(chunk[bad]).any()))


def _chunks(tensor: ir.TensorProtocol, elements: int = 1 << 18) -> Iterator[np.ndarray]:
    if isinstance(tensor, MappedTensor):
        # Read, not viewed: the pages of a map would count as memory of this process until it is closed.
        dtype = tensor.dtype.numpy().newbyteorder("<")
        yield from (_wide(np.frombuffer(piece, dtype)) for piece in tensor.pieces())
        return
    flat = tensor.numpy().reshape(-1)
    for start in range(0, flat.size, elements):
        yield _wide(flat[start : start + elements])


def _wide(chunk: np.ndarray) -> np.ndarray:
    """Return float32 for the narrow types, whose comparisons numpy has no fast code for."""
    return chunk.astype(np.float32) if chunk.dtype.itemsize * 8 <= _NARROW_BITS else chunk


def _constants(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol, ir.Value | None]]:
    """Yield every constant tensor with its label and the value that carries it, if one does."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield f"tensor {quoted(value.name or '')}", value.const_value, value
    holders: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for holder in holders:
        for node in holder.all_nodes():
            label = f"node {quoted(node_label(node))} ({node.op_type})"
            carrier = node.outputs[0] if node.op_type in ("Constant", "ConstantOfShape") else None
            for attribute in node.attributes.values():
                if attribute.is_ref():
                    continue
                if attribute.type == ir.AttributeType.TENSOR:
                    yield label, attribute.as_tensor(), carrier
                elif attribute.type == ir.AttributeType.TENSORS:
                    yield from ((label, tensor, None) for tensor in attribute.as_tensors())


def _only_masks(value: ir.Value, positive: bool) -> bool:
    """Tell whether every use of a constant, however moved about, is as a mask or a bound."""
    waiting, seen = [value], {value}
    while waiting:
        current = waiting.pop()
        if current.is_graph_output():
            return False
        for node, index in current.uses():
            if node.op_type in _MOVES:
                waiting += [output for output in node.outputs if output not in seen]
                seen.update(node.outputs)
            elif not _masks(node, index, positive):
                return False
    return True


def _masks(node: ir.Node, index: int, positive: bool) -> bool:
    if node.op_type == "Add":
        return not positive
    # Attention's input 3 is its mask, Pad's input 2 the number it fills with.
    return node.op_type in _MASKS or (node.op_type, index) in (("Attention", 3), ("Pad", 2))


def _absurd_biases(model: ir.Model, peaks: dict[ir.Value, float]) -> Iterator[str]:
    for node in model.graph.all_nodes():
        weight, bias = _weight_and_bias(node)
        if weight is None or bias is None or weight not in peaks or bias not in peaks:
            continue
        if peaks[bias] > _ABSURD_BIAS * peaks[weight] > 0:
            label = f"node {quoted(node_label(node))} ({node.op_type})"
            sizes = f"its bias reaches {peaks[bias]:.3g}, its weights only {peaks[weight]:.3g}"
            yield f"{label}: {sizes}; the layer's products are lost beside it"


def _weight_and_bias(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    if node.op_type in ("Conv", "ConvTranspose", "Gemm") and len(node.inputs) > 2:
        return node.inputs[1], node.inputs[2]
    if node.op_type == "Add":
        for product, bias in (node.inputs, node.inputs[::-1]):
            source = None if product is None else product.producer()
            if source is not None and source.op_type == "MatMul":
                return source.inputs[1], bias
    return None, None
