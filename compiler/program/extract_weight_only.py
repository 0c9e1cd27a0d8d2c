"""Products of float activations with blocked weights become WeightOnlyDot steps.

Two forms are read: ``DequantizeLinear`` with ``block_size`` behind ``MatMul`` or ``Gemm``, and the contrib operator
``MatMulNBits``. The first says nothing about the arithmetic and gets that of ONNX Runtime's default for it, which
rounds the activations to 8 bits in blocks (accuracy level 4); the second only if it asks for that level.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import (
    constant_array,
    int_attribute,
    is_op,
    node_label,
    only_consumer,
    static_shape,
)
from bitwright.compiler.program.draft import Draft, labels
from bitwright.compiler.program.extract_dot import match_dot
from bitwright.compiler.program.extract_quantizers import constant_real, quantized_constant
from bitwright.compiler.program.ops import LONGEST_GROUP, Tensor, WeightOnlyDot

CONTRIB = "com.microsoft"
BITS = {"int8": 8, "uint8": 8, "int4": 4, "uint4": 4, "int2": 2, "uint2": 2}
ROUNDED_ACTIVATIONS = 4


@dataclass(frozen=True)
class Blocked:
    """A blocked weight: ``(integers - zero_point) * scale``.

    Attributes:
        integers: uint8 [K, N], counted from the lowest integer of the type.
        scale: float32 [G, N].
        zero_point: uint8 [G, N], counted likewise.
        bits: 2, 4 or 8.
        group: Length of a group.
    """

    integers: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    bits: int
    group: int


@dataclass(frozen=True)
class Product:
    """One matched product: activations, weight, float32 bias [N] or None, covered nodes."""

    x: ir.Value
    weight: Blocked
    bias: np.ndarray | None
    nodes: tuple[ir.Node | None, ...]


def match_product(draft: Draft, node: ir.Node) -> None:
    """MatMul or Gemm: of a blocked weight, or of 8-bit operands."""
    product = _matmul(draft, node)
    if product is None:
        match_dot(draft, node)
    else:
        _offer(draft, node, product)


def match_nbits(draft: Draft, node: ir.Node) -> None:
    """MatMulNBits of the contrib domain."""
    product = _nbits(draft, node)
    if product is not None:
        _offer(draft, node, product)


def _matmul(draft: Draft, node: ir.Node) -> Product | None:
    x, source = node.inputs[0], None if node.inputs[1] is None else node.inputs[1].producer()
    if x is None or source is None or not is_op(source, "DequantizeLinear"):
        return None
    if not int_attribute(source, "block_size", 0):
        return None
    weight, problem = _blocked(source)
    plain = is_op(node, "MatMul") or _plain_gemm(node)
    if weight is None or not plain:
        draft.note(node, problem or "alpha, beta, transA or transB is not the default")
        return None
    added = node.inputs[2] if len(node.inputs) > 2 else None
    bias = None if added is None else _vector(added, weight.integers.shape[1])
    if added is not None and bias is None:
        draft.note(node, "its bias is not a constant vector")
        return None
    return Product(x, weight, bias, (source, _dequantizer(added), node))


def _plain_gemm(node: ir.Node) -> bool:
    units = (node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0))
    return units == (1.0, 1.0) and not any(int_attribute(node, name, 0) for name in ("transA", "transB"))


def _vector(value: ir.Value, columns: int) -> np.ndarray | None:
    """Return a constant as float32 [columns] if it adds one number a column, else None."""
    real = constant_real(value)
    if real is None or real.size not in (1, columns) or any(d != 1 for d in real.shape[:-1]):
        return None
    return np.ascontiguousarray(np.broadcast_to(real.reshape(-1), (columns,)))


def _dequantizer(value: ir.Value | None) -> ir.Node | None:
    found = quantized_constant(value)
    return None if found is None else found.node


def _blocked(node: ir.Node) -> tuple[Blocked | None, str]:
    """Return the weight behind a blocked DequantizeLinear, or None and why it has no kernel."""
    weight, scale_value, zero_value = (*node.inputs, None)[:3]
    integers, scale, zeros = (constant_array(v) for v in (weight, scale_value, zero_value))
    if integers is None or scale is None or (zero_value is not None and zeros is None):
        return None, "its blocked weight is computed at run time"
    name, group = integers.dtype.name, int_attribute(node, "block_size", 0)
    if name not in BITS or scale.dtype != np.float32 or integers.ndim != 2:
        return None, f"there is no kernel for a blocked weight of {name}{list(integers.shape)}"
    if int_attribute(node, "axis", 1) not in (0, -2):
        return None, "its blocks run across the columns, not along the reduction"
    bits = BITS[name]
    offset = 0 if name.startswith("u") else 2 ** (bits - 1)
    lifted = np.full(scale.shape, offset) if zeros is None else zeros.astype(np.int16) + offset
    raised = (integers.astype(np.int16) + offset).astype(np.uint8)
    return _checked(Blocked(raised, scale, lifted.astype(np.uint8), bits, group))


def _checked(weight: Blocked) -> tuple[Blocked | None, str]:
    depth, columns = weight.integers.shape
    expected = (-(-depth // weight.group), columns)
    if 0 in weight.integers.shape or weight.scale.shape != expected or weight.zero_point.shape != expected:
        return None, "its scales do not fit its weight"
    if not np.all(np.isfinite(weight.scale)):
        return None, "a scale is not finite"
    if weight.group > LONGEST_GROUP:
        return None, f"its groups are longer than {LONGEST_GROUP}"
    return weight, ""


def _nbits(draft: Draft, node: ir.Node) -> Product | None:
    """Read a MatMulNBits: A, B [N, G, bytes], scales, zero points, group indices, bias."""
    if node.domain != CONTRIB:
        return None
    x, _, _, _, indices, added = (*node.inputs, *[None] * 6)[:6]
    if int_attribute(node, "accuracy_level", 0) != ROUNDED_ACTIVATIONS:
        draft.note(node, "its accuracy level forbids rounding activations to 8 bits, the kernels' only form")
        return None
    weight, problem = (None, "it has group indices") if indices is not None else _unpacked(node)
    bias = None if added is None or weight is None else _vector(added, weight.integers.shape[1])
    if x is None or weight is None or (added is not None and bias is None):
        draft.note(node, problem or "its bias is not a constant vector")
        return None
    return Product(x, weight, bias, (_dequantizer(added), node))


def _unpacked(node: ir.Node) -> tuple[Blocked | None, str]:
    packed, scales, zeros = (constant_array(v) for v in (*node.inputs, None)[1:4])
    has_zeros = len(node.inputs) > 3 and node.inputs[3] is not None
    depth, columns, group = (int_attribute(node, name, 0) for name in ("K", "N", "block_size"))
    bits = int_attribute(node, "bits", 4)
    if packed is None or scales is None or (has_zeros and zeros is None):
        return None, "its weight is computed at run time"
    if bits not in BITS.values() or scales.dtype != np.float32 or packed.dtype != np.uint8 or not group:
        return None, f"there is no kernel for {bits} bits with {scales.dtype.name} scales"
    groups = -(-depth // group)
    if scales.size != columns * groups or packed.size * (8 // bits) != columns * groups * group:
        return None, "its scales do not fit its weight"
    integers = unpack(packed.reshape(columns, -1), bits)[:, :depth].T
    middle = np.full((groups, columns), 2 ** (bits - 1), np.uint8)
    if zeros is not None and zeros.dtype != np.uint8:
        return None, "its zero points are no integers"
    lifted = middle if zeros is None else unpack(zeros.reshape(columns, -1), bits)[:, :groups].T
    scale = np.ascontiguousarray(scales.reshape(columns, groups).T)
    return _checked(Blocked(np.ascontiguousarray(integers), scale, np.ascontiguousarray(lifted), bits, group))


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """Return the unsigned integers of packed bytes, lowest bits first: uint8, the last axis times ``8 / bits``."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    parts = (packed[..., None] >> shifts) & np.uint8(2**bits - 1)
    return parts.reshape(*packed.shape[:-1], -1)


def _absorb_add(product: Product, value: ir.Value) -> tuple[Product, ir.Value]:
    """Take the constant vector of a following Add as the bias of a product that has none."""
    add = only_consumer(value)
    if product.bias is not None or add is None or not is_op(add, "Add"):
        return product, value
    other = add.inputs[1] if add.inputs[0] is value else add.inputs[0]
    vector = None if other is value or other is None else _vector(other, product.weight.integers.shape[1])
    if vector is None or static_shape(add.outputs[0]) != static_shape(value):
        return product, value
    nodes = (*product.nodes, _dequantizer(other), add)
    return replace(product, bias=vector, nodes=nodes), add.outputs[0]


def _offer(draft: Draft, node: ir.Node, product: Product) -> None:
    value = node.outputs[0]
    shape = static_shape(product.x)
    if shape is None or not shape or 0 in shape or product.x.dtype not in (None, ir.DataType.FLOAT):
        draft.note(node, "its activations are not float32 of a fixed shape")
        return
    depth, columns = product.weight.integers.shape
    if shape[-1] != depth or constant_array(product.x) is not None:
        return
    product, value = _absorb_add(product, value)
    assert value.name is not None and product.x.name is not None
    step = WeightOnlyDot(
        name=draft.label(node_label(node)),
        inputs=(product.x.name,),
        outputs=(value.name,),
        nodes=labels(*product.nodes),
        weight=product.weight.integers,
        scale=product.weight.scale,
        zero_point=product.weight.zero_point,
        bits=product.weight.bits,
        group=product.weight.group,
        bias=product.bias,
    )
    draft.add(step, Tensor(value.name, (*shape[:-1], columns), "float32"))
