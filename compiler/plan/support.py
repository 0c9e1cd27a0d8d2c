"""Which forms of an operator the integer kernels cover; everything else stays in float with the reason given here."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import constant_array, int_attribute, is_op, node_label, rank
from bitwright.compiler.graph.operands import activations_of, table_of, weight_array, weight_of
from bitwright.targets.schema import Limits, OpRule, QSpace

# Below 256 KiB of float32 the extra nodes outweigh the bytes.
SMALLEST_TABLE = 65536
HALF_LARGEST = 65504.0


def _parameters_constant(node: ir.Node) -> str | None:
    for value in node.inputs[1:]:
        if value is not None and value.name and constant_array(value) is None:
            return f"its parameter '{value.name}' is computed at run time"
    return None


def _conv(node: ir.Node) -> str | None:
    weight = weight_of(node)
    if weight is None:
        return "its weight is computed at run time"
    dims = weight_array(weight).ndim
    if dims != 4:
        return f"only 2-D convolution has an integer kernel, this one has {dims - 2} spatial dimensions"
    if len(node.inputs) > 2 and node.inputs[2] is not None and constant_array(node.inputs[2]) is None:
        return "its bias is computed at run time"
    return None


def _matmul(node: ir.Node) -> str | None:
    weight = weight_of(node)
    if weight is None:
        return "both operands are computed at run time (an attention product); 8 bits cost accuracy here, not time"
    if weight_array(weight).ndim != 2:
        return "its weight is not a matrix"
    return None


def _gemm(node: ir.Node) -> str | None:
    if weight_of(node) is None:
        return "its weight is computed at run time"
    plain = node.attributes.get_float("alpha", 1.0) == 1.0 and node.attributes.get_float("beta", 1.0) == 1.0
    if not plain or int_attribute(node, "transA", 0) or int_attribute(node, "transB", 0):
        return "it is not in canonical form (alpha = beta = 1, no transposition)"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and constant_array(bias) is None:
        return "its bias is computed at run time"
    if bias is not None and constant_array(bias).size != weight_array(node.inputs[1]).shape[1]:  # type: ignore[union-attr, arg-type]
        return "its bias is not one value a column"
    return None


def _two_tensors(node: ir.Node) -> str | None:
    if any(constant_array(v) is not None for v in node.inputs):
        return "one operand is a constant; the float form is exact and as fast"
    return None


def _average_pool(node: ir.Node) -> str | None:
    if rank(node.inputs[0]) != 4:
        return "only 2-D pooling has an integer kernel"
    if int_attribute(node, "ceil_mode", 0):
        return "ceil_mode has no integer kernel"
    dilations = node.attributes.get_ints("dilations", None)
    if dilations is not None and any(d != 1 for d in dilations):
        return "dilated average pooling has no integer kernel"
    return None


def _max_pool(node: ir.Node) -> str | None:
    if len(node.outputs) > 1 and node.outputs[1].name and node.outputs[1].uses():
        return "it also returns indices"
    return "only 2-D pooling has an integer kernel" if rank(node.inputs[0]) != 4 else None


def _global_pool(node: ir.Node) -> str | None:
    return None if rank(node.inputs[0]) == 4 else "only 2-D pooling has an integer kernel"


def _resize(node: ir.Node) -> str | None:
    if node.attributes.get_string("mode", "nearest") != "nearest":
        return "only nearest-neighbour resizing moves integers unchanged"
    return _parameters_constant(node)


def _pad(node: ir.Node) -> str | None:
    if node.attributes.get_string("mode", "constant") != "constant":
        return "only constant padding has an integer kernel"
    fill = constant_array(node.inputs[2]) if len(node.inputs) > 2 else None
    if fill is not None and fill.size and float(fill.reshape(-1)[0]) != 0.0:
        return "its fill value is not zero"
    return _parameters_constant(node)


def _reduction(node: ir.Node) -> int:
    """Return how many products one accumulator sums, 0 for operators that do not accumulate."""
    weight = weight_of(node)
    if weight is None:
        return 0
    array = weight_array(weight)
    return int(array[0].size if node.op_type == "Conv" else array.shape[0])


def _gather(node: ir.Node) -> str | None:
    table = constant_array(table_of(node))
    if table is None:
        return "it looks up no constant table of rows"
    if table.size < SMALLEST_TABLE:
        return f"its table of {table.size} values is too small to matter"
    return None


_RULES: dict[str, Callable[[ir.Node], str | None]] = {
    "Conv": _conv,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Add": _two_tensors,
    "Mul": _two_tensors,
    "Gather": _gather,
    "Concat": lambda node: (
        "one operand is a constant" if any(constant_array(v) is not None for v in node.inputs) else None
    ),
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool,
    "MaxPool": _max_pool,
    "Resize": _resize,
    "Pad": _pad,
}


def why_unsupported(node: ir.Node, rule: OpRule, limits: Limits) -> str | None:
    """Return why this node has no integer kernel although its operator has one, or None if it has."""
    if any(v.dtype not in (None, ir.DataType.FLOAT) for v in activations_of(node)):
        return "its input is not float32"
    if any((rank(v) or 0) > limits.max_rank for v in activations_of(node)):
        return f"it has more than {limits.max_rank} dimensions"
    if _reduction(node) > limits.max_reduction:
        return f"it sums {_reduction(node)} products; from {limits.max_reduction} on 32-bit accumulators may overflow"
    if rule.role != "anchor" and any(v.dtype is None for v in activations_of(node)):
        return "the type of its input is unknown"
    if activations_of(node) and all(constant_array(v) is not None for v in activations_of(node)):
        return "all its operands are constants"
    if any(is_op(v.producer(), "DequantizeLinear") for v in activations_of(node)):
        return "the input model quantizes it already; its Q/DQ are kept as they are"
    check = _RULES.get(node.op_type)
    reason = check(node) if check is not None else _parameters_constant(node)
    return None if reason is None else f"{reason} ({node_label(node)})"


def possible_groups(space: QSpace, length: int) -> tuple[int, ...]:
    """Return the group lengths, best first, that a weight with ``length`` values along its reduction can have.

    A kernel that looks values up counts its groups through the whole matrix, so they must end with the columns.
    """
    return tuple(g for g in space.groups if space.codebook != "nf4" or length % g == 0)


def why_weight_unfit(node: ir.Node, space: QSpace) -> str | None:
    """Return why a weight cannot be stored in a format that its operator has a kernel for, or None if it can."""
    weight = weight_of(node) or table_of(node)
    if weight is None:
        return None
    array = weight_array(weight)
    is_product = weight_of(node) is not None
    if is_product and space.granularity == "group" and not possible_groups(space, array.shape[0]):
        return (
            f"groups of {', '.join(map(str, sorted(space.groups)))} do not divide its {array.shape[0]} inputs"
        )
    if space.float_type == "f16" and array.size and float(np.abs(array).max()) > HALF_LARGEST:
        return f"its weights exceed {HALF_LARGEST:.0f}, the largest number in half precision"
    return None
