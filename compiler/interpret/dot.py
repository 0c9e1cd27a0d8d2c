"""QGemm and QConv: exact accumulation and the fused epilogue."""

from __future__ import annotations

import numpy as np

from bitwright.compiler.interpret.fma import fma
from bitwright.compiler.program.ops import Dot, QConv, QGemm, QuantParams, Tensor

# Integers up to here are exact in float64, whatever order the products are summed in.
EXACT_FLOAT64 = 2**53


def gemm(step: QGemm, x: np.ndarray, x_quant: QuantParams, output: Tensor) -> np.ndarray:
    """Run a QGemm.

    Args:
        step: The step.
        x: Integers [..., K].
        x_quant: Parameters of ``x``.
        output: The output tensor.

    Returns:
        Array of the output's shape and dtype.
    """
    return _epilogue(step, gemm_products(step, x, x_quant), x_quant, output).reshape(output.shape)


def conv(step: QConv, x: np.ndarray, x_quant: QuantParams, output: Tensor) -> np.ndarray:
    """Run a QConv.

    Args:
        step: The step.
        x: Integers [N, C, H, W].
        x_quant: Parameters of ``x``.
        output: The output tensor [N, O, OH, OW].

    Returns:
        Array of the output's shape and dtype.
    """
    return _epilogue(step, conv_products(step, x, x_quant, output), x_quant, output)


def gemm_products(step: QGemm, x: np.ndarray, x_quant: QuantParams) -> np.ndarray:
    """Return the exact sums of products of a QGemm without its bias: int64 [rows, N]."""
    rows = x.reshape(-1, x.shape[-1]).astype(np.int64) - x_quant.zero_point
    return _matmul(rows, step.weight.astype(np.int64))


def conv_products(step: QConv, x: np.ndarray, x_quant: QuantParams, output: Tensor) -> np.ndarray:
    """Return the exact sums of products of a QConv without its bias: int64 of the output's shape [N, O, OH, OW]."""
    batch, channels, size = output.shape[0], output.shape[1], output.shape[2:]
    kernel = (step.weight.shape[2], step.weight.shape[3])
    columns = _columns(step, x.astype(np.int64) - x_quant.zero_point, kernel, (size[0], size[1]))
    weight = step.weight.astype(np.int64).reshape(step.group, channels // step.group, -1)
    return _matmul(weight, columns).reshape(batch, channels, *size)


def _columns(step: QConv, centred: np.ndarray, kernel: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Unfold [N, C, H, W] to [N, group, C/group*KH*KW, OH*OW]; padding is 0 because ``zx`` is subtracted."""
    top, left, bottom, right = step.pads
    padded = np.pad(centred, ((0, 0), (0, 0), (top, bottom), (left, right)))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, step.dilations, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=(2, 3))
    windows = windows[
        :, :, :: step.strides[0], :: step.strides[1], :: step.dilations[0], :: step.dilations[1]
    ]
    windows = windows[:, :, : size[0], : size[1]]
    batch, channels = centred.shape[:2]
    ordered = windows.transpose(0, 1, 4, 5, 2, 3)
    rows = channels // step.group * kernel[0] * kernel[1]
    return ordered.reshape(batch, step.group, rows, size[0] * size[1])


def _matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Exact product of int64 arrays: BLAS in float64 when every partial sum is representable, else int64."""
    largest = int(np.abs(a).max(initial=0)) * int(np.abs(b).max(initial=0)) * a.shape[-1]
    if largest < EXACT_FLOAT64:
        return np.asarray(np.matmul(a.astype(np.float64), b.astype(np.float64)), np.int64)
    return np.asarray(np.matmul(a, b))


def _epilogue(step: Dot, acc: np.ndarray, x_quant: QuantParams, output: Tensor) -> np.ndarray:
    """Add the bias and scale to the output; ``acc`` is int64 and exact, its channels are axis 1."""
    shape = [-1 if d == 1 else 1 for d in range(acc.ndim)]
    if step.bias is not None:
        acc = acc + step.bias.astype(np.int64).reshape(shape)
    value = acc.astype(np.float32)
    factor = np.float32(x_quant.scale) * step.weight_scale.astype(np.float32)
    if output.quant is None:
        added = np.zeros(1, np.float32) if step.float_bias is None else step.float_bias.reshape(shape)
        y = fma(value, factor.reshape(shape), added)
        return np.asarray(np.maximum(y, np.float32(0))) if step.relu else y
    factor = factor / np.float32(output.quant.scale)
    steps = np.rint(value * factor.reshape(shape)).astype(np.float64) + output.quant.zero_point
    return np.asarray(np.clip(steps, step.lower, step.upper), output.dtype)
