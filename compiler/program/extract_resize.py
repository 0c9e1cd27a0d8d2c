"""Which input index each output index of a nearest-neighbour Resize reads, as ONNX Runtime computes it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import constant_array, int_attribute, ints_attribute


def nearest_indices(
    node: ir.Node, shape: tuple[int, ...], output: tuple[int, ...]
) -> tuple[np.ndarray, ...] | None:
    """Compute the index tables of a Resize.

    Args:
        node: A Resize node (opset 11 or later).
        shape: Input shape.
        output: Output shape.

    Returns:
        One int64 array an axis, of the output's length; None for what is not nearest interpolation, for
        cropping and for sizes that keep an aspect ratio.
    """
    attributes = node.attributes
    mode = attributes.get_string("coordinate_transformation_mode", "half_pixel")
    rounding = attributes.get_string("nearest_mode", "round_prefer_floor")
    if attributes.get_string("mode", "nearest") != "nearest" or int_attribute(node, "antialias", 0):
        return None
    if attributes.get_string("keep_aspect_ratio_policy", "stretch") != "stretch":
        return None
    scales = _scales(node, shape, output)
    if scales is None or len(shape) != len(output) or mode not in MODES or rounding not in ROUNDINGS:
        return None
    return tuple(
        _axis_indices(i, o, s, mode, rounding) for i, o, s in zip(shape, output, scales, strict=True)
    )


def _scales(node: ir.Node, shape: tuple[int, ...], output: tuple[int, ...]) -> list[np.float32] | None:
    """Return the scale of every axis: given, or the quotient of the sizes."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    given = None if value is None else constant_array(value)
    if given is None or given.size == 0:
        sized = len(node.inputs) > 3 and node.inputs[3] is not None
        return [np.float32(o) / np.float32(i) for i, o in zip(shape, output, strict=True)] if sized else None
    axes = [a % len(shape) for a in ints_attribute(node, "axes", tuple(range(len(shape))))]
    scales = [np.float32(1)] * len(shape)
    for axis, scale in zip(axes, given.astype(np.float32).reshape(-1), strict=True):
        scales[axis] = scale
    return scales


def _axis_indices(size: int, resized: int, scale: np.float32, mode: str, rounding: str) -> np.ndarray:
    if size == resized and scale == 1:
        return np.arange(size, dtype=np.int64)
    # float32 throughout: ONNX Runtime computes coordinates in float32 and ties depend on it.
    x = np.arange(resized).astype(np.float32)
    position = _coordinates(x, scale, np.float32(size), np.float32(resized), mode).astype(np.float32)
    return np.asarray(np.clip(_round(position, rounding), 0, size - 1), np.int64)


MODES = ("half_pixel", "pytorch_half_pixel", "half_pixel_symmetric", "align_corners", "asymmetric")
ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")


def _coordinates(
    x: np.ndarray, scale: np.float32, size: np.float32, resized: np.float32, mode: str
) -> np.ndarray:
    half, one = np.float32(0.5), np.float32(1)
    if mode == "asymmetric":
        return x / scale
    if mode == "align_corners":
        return x * np.float32(0) if resized == 1 else x * (size - one) / (resized - one)
    if mode == "pytorch_half_pixel" and resized <= 1:
        return x * np.float32(0)
    centred = (x + half) / scale - half
    if mode == "half_pixel_symmetric":
        adjustment = resized / (scale * size)
        return size / np.float32(2) * (one - adjustment) + centred
    return centred


def _round(position: np.ndarray, rounding: str) -> np.ndarray:
    if rounding == "floor":
        return np.asarray(np.floor(position))
    if rounding == "ceil":
        return np.asarray(np.ceil(position))
    tie = position == np.trunc(position) + np.float32(0.5)
    away = np.sign(position) * np.floor(np.abs(position) + np.float32(0.5))
    return np.where(tie, np.floor(position), away) if rounding == "round_prefer_floor" else np.asarray(away)
