"""Reading QuantizeLinear and DequantizeLinear nodes, and the constants behind them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import constant_array, int_attribute, is_op
from bitwright.compiler.program.affine import quantize
from bitwright.compiler.program.ops import QuantParams

ACTIVATION_DTYPES = ("uint8", "int8")


@dataclass(frozen=True)
class ChannelParams:
    """Scales and zero points of one Q or DQ node, per tensor or per channel.

    Attributes:
        scale: float32 vector, one element when per tensor.
        zero_point: int64 vector of the same length.
        axis: Axis of the vectors; meaningless when they have one element.
        dtype: Numpy name of the integer type.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    axis: int
    dtype: str


def channel_params(node: ir.Node | None) -> ChannelParams | None:
    """Return the constant parameters of a Q or DQ node; None if computed, blocked or not float32."""
    if node is None or not is_op(node, "QuantizeLinear", "DequantizeLinear"):
        return None
    scale = constant_array(node.inputs[1])
    if scale is None or scale.dtype != np.float32 or scale.ndim > 1:
        return None
    if int_attribute(node, "block_size", 0) or int_attribute(node, "precision", 0) not in (0, 1):
        return None
    zero = _zero_point(node, scale)
    if zero is None or zero.size != scale.size or not np.all(np.isfinite(scale)):
        return None
    quantizes = node.op_type == "QuantizeLinear"
    dtype = _integer_dtype(node, zero) if quantizes else _dtype_name(node.inputs[0])
    if dtype is None or (not quantizes and node.outputs[0].dtype not in (None, ir.DataType.FLOAT)):
        return None
    axis = int_attribute(node, "axis", 1)
    return ChannelParams(scale.reshape(-1), zero.astype(np.int64).reshape(-1), axis, dtype)


def _zero_point(node: ir.Node, scale: np.ndarray) -> np.ndarray | None:
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return np.zeros(scale.shape, np.uint8)
    return constant_array(node.inputs[2])


def _integer_dtype(node: ir.Node, zero: np.ndarray) -> str | None:
    """The output type of QuantizeLinear: of its zero point, else the attribute, else uint8."""
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        return str(zero.dtype.name)
    code = int_attribute(node, "output_dtype", 0)
    return str(ir.DataType(code).numpy().name) if code else "uint8"


def _dtype_name(value: ir.Value | None) -> str | None:
    if value is None:
        return None
    if value.dtype is None:
        array = constant_array(value)
        return None if array is None else str(array.dtype.name)
    return str(value.dtype.numpy().name)


def tensor_params(node: ir.Node | None) -> QuantParams | None:
    """Return the parameters of a per-tensor 8-bit activation Q or DQ node, else None."""
    found = channel_params(node)
    if found is None or found.scale.size != 1 or found.dtype not in ACTIVATION_DTYPES:
        return None
    scale, zero = float(found.scale[0]), int(found.zero_point[0])
    info = np.iinfo(found.dtype)
    if not scale > 0 or not info.min <= zero <= info.max:
        return None
    return QuantParams(found.dtype, scale, zero)


def constant_integers(value: ir.Value | None) -> np.ndarray | None:
    """Return the integers of a constant: stored as such, or a float constant behind QuantizeLinear."""
    found = constant_array(value)
    if found is not None:
        return found
    node = None if value is None else value.producer()
    if node is None or not is_op(node, "QuantizeLinear"):
        return None
    floats, params = constant_array(node.inputs[0]), channel_params(node)
    if (
        floats is None
        or params is None
        or floats.dtype != np.float32
        or params.dtype not in ACTIVATION_DTYPES
    ):
        return None
    if np.any(params.scale <= 0):
        return None
    return _quantize_channels(floats, params)


def _quantize_channels(floats: np.ndarray, params: ChannelParams) -> np.ndarray:
    if params.scale.size == 1:
        return quantize(floats, QuantParams(params.dtype, float(params.scale[0]), int(params.zero_point[0])))
    rows = np.moveaxis(floats, params.axis, 0)
    pairs = zip(params.scale.tolist(), params.zero_point.tolist(), strict=True)
    done = [quantize(row, QuantParams(params.dtype, s, z)) for row, (s, z) in zip(rows, pairs, strict=True)]
    return np.moveaxis(np.stack(done), 0, params.axis)


@dataclass(frozen=True)
class QuantizedConstant:
    """``real = integers * scale`` along ``axis``; the zero point is already subtracted.

    Attributes:
        integers: int64 array.
        scale: float32 vector, one element when per tensor.
        axis: Non-negative axis of ``scale``.
        node: The DequantizeLinear node.
    """

    integers: np.ndarray
    scale: np.ndarray
    axis: int
    node: ir.Node

    @property
    def real(self) -> np.ndarray:
        """The float32 array that DequantizeLinear computes."""
        shape = [1] * self.integers.ndim
        if self.scale.size > 1:
            shape[self.axis] = self.scale.size
        scale = self.scale.reshape(shape) if self.integers.ndim else self.scale[0]
        return np.asarray(self.integers.astype(np.float32) * scale, np.float32)


def quantized_constant(value: ir.Value | None) -> QuantizedConstant | None:
    """Return the constant behind a DequantizeLinear output, else None."""
    node = None if value is None else value.producer()
    if node is None or not is_op(node, "DequantizeLinear"):
        return None
    params, integers = channel_params(node), constant_integers(node.inputs[0])
    if params is None or integers is None or np.any(params.scale < 0):
        return None
    centred = integers.astype(np.int64)
    if params.scale.size == 1:
        return QuantizedConstant(centred - params.zero_point[0], params.scale, 0, node)
    axis = params.axis % max(centred.ndim, 1)
    if centred.ndim == 0 or centred.shape[axis] != params.scale.size:
        return None
    shape = [-1 if d == axis else 1 for d in range(centred.ndim)]
    return QuantizedConstant(centred - params.zero_point.reshape(shape), params.scale, axis, node)


def constant_real(value: ir.Value | None) -> np.ndarray | None:
    """Return a float32 constant, stored as such or dequantized; None if computed or of another type."""
    found = constant_array(value)
    if found is None:
        dequantized = quantized_constant(value)
        found = None if dequantized is None else dequantized.real
    return found if found is not None and found.dtype == np.float32 else None
