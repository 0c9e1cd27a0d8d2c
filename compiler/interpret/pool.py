"""QPool: maximum and average over 2-D windows."""

from __future__ import annotations

import numpy as np

from bitwright.compiler.program.ops import QPool, QuantParams, Tensor


def pool(step: QPool, x: np.ndarray, x_quant: QuantParams, output: Tensor) -> np.ndarray:
    """Run a QPool.

    Args:
        step: The step.
        x: Integers [N, C, H, W].
        x_quant: Parameters of ``x``.
        output: The output tensor [N, C, OH, OW].

    Returns:
        Integers of the output's shape and dtype.
    """
    if step.kind == "max":
        lowest = int(np.iinfo(x.dtype).min)
        return np.asarray(windows(step, x, lowest, output).max(axis=(4, 5)), output.dtype)
    return _average(step, x, x_quant, output)


def _average(step: QPool, x: np.ndarray, x_quant: QuantParams, output: Tensor) -> np.ndarray:
    assert output.quant is not None
    total = windows(step, x.astype(np.int32) - x_quant.zero_point, 0, output).sum(axis=(4, 5), dtype=np.int64)
    count = np.full((1, 1, 1, 1), step.kernel[0] * step.kernel[1])
    if not step.count_include_pad:
        inside = np.ones((1, 1, *x.shape[2:]), np.int64)
        count = windows(step, inside, 0, output).sum(axis=(4, 5))
    ratio = np.float32(x_quant.scale) / np.float32(output.quant.scale)
    steps = np.rint(total.astype(np.float32) * (ratio / count.astype(np.float32)))
    low, high = output.quant.bounds
    shifted = steps.astype(np.float64) + output.quant.zero_point
    return np.asarray(np.clip(shifted, low, high), output.dtype)


def windows(step: QPool, x: np.ndarray, fill: int, output: Tensor) -> np.ndarray:
    """Return all windows: [N, C, OH, OW, KH, KW], ``fill`` outside the image."""
    top, left, bottom, right = step.pads
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=fill)
    reach = [(k - 1) * d + 1 for k, d in zip(step.kernel, step.dilations, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=(2, 3))
    windows = windows[
        :, :, :: step.strides[0], :: step.strides[1], :: step.dilations[0], :: step.dilations[1]
    ]
    return windows[:, :, : output.shape[2], : output.shape[3]]
