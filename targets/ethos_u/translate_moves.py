"""Moves: integers change place, never value."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bitwright.compiler.program.ops import Move
from bitwright.targets.ethos_u.translator import CHANNELS_LAST, Translator, UnsupportedStepError

# Resizing as TFLite's kernels compute it: (align_corners, half_pixel_centers).
RESIZING = ((False, False), (False, True), (True, False))


def moved(t: Translator, step: Move) -> None:
    """Emit what a Move needs, if it needs anything.

    Raises:
        UnsupportedStepError: There is no operator for it.
    """
    kinds = {
        "reshape": _reshape,
        "transpose": _transpose,
        "slice": _slice,
        "pad": _pad,
        "resize_nearest": _resize,
    }
    if step.kind not in kinds:
        msg = f"'{step.kind}' has no operator on the accelerator"
        raise UnsupportedStepError(msg)
    kinds[step.kind](t, step)


def _reshape(t: Translator, step: Move) -> None:
    t.stored[step.output] = t.where(step.inputs[0])


def _transpose(t: Translator, step: Move) -> None:
    name = step.inputs[0]
    stored = t.where(name)
    if stored.view != t.shape(name):
        stored = replace(stored, tensor=t.read(name), view=t.shape(name), order=tuple(range(len(step.perm))))
    order = tuple(step.perm.index(axis) for axis in stored.order)
    t.stored[step.output] = replace(stored, view=t.shape(step.output), order=order)


def _in_place(t: Translator, step: Move) -> tuple[str, tuple[int, ...]]:
    """Return the input with the axes it logically has, in whatever order, and that order."""
    name = step.inputs[0]
    stored = t.where(name)
    if stored.view == t.shape(name):
        return stored.tensor, stored.order
    return t.read(name), tuple(range(len(t.shape(name))))


def _slice(t: Translator, step: Move) -> None:
    if min(step.steps) < 0:
        msg = "reversing an axis has no operator on the accelerator"
        raise UnsupportedStepError(msg)
    source, order = _in_place(t, step)
    size = t.shape(step.output)
    ends = [first + (n - 1) * by + 1 for first, n, by in zip(step.starts, size, step.steps, strict=True)]
    operands = [
        t.constant(f"{step.output}_{word}", np.array([values[axis] for axis in order], np.int32))
        for word, values in (("begin", step.starts), ("end", ends), ("strides", step.steps))
    ]
    options = dict.fromkeys(("beginMask", "endMask", "ellipsisMask", "newAxisMask", "shrinkAxisMask"), 0)
    target = t.result(step.output, order)
    t.emit("STRIDED_SLICE", (source, *operands), target, "StridedSliceOptions", options, 2)


def _pad(t: Translator, step: Move) -> None:
    if step.fill != t.quant(step.inputs[0]).zero_point:
        msg = "padding with something else than zero has no operator on the accelerator"
        raise UnsupportedStepError(msg)
    source, order = _in_place(t, step)
    rank = len(order)
    widths = np.array([[step.pads[axis], step.pads[axis + rank]] for axis in order], np.int32)
    target = t.result(step.output, order)
    t.emit("PAD", (source, t.constant(f"{target}_widths", widths)), target, "PadOptions", version=2)


def _resize(t: Translator, step: Move) -> None:
    image, size = t.shape(step.inputs[0]), t.shape(step.output)
    if len(image) != len(CHANNELS_LAST) or image[:2] != size[:2]:
        msg = "only images are resized, and only in height and width"
        raise UnsupportedStepError(msg)
    flags = next(
        (f for f in RESIZING if all(_reads(image[a], size[a], f, step.indices[a]) for a in (2, 3))), None
    )
    if flags is None:
        msg = "it picks other neighbours than TensorFlow's kernels do"
        raise UnsupportedStepError(msg)
    source = t.channels_last(step.inputs[0])
    shape = t.constant(f"{step.output}_size", np.array(size[2:], np.int32))
    options = {"alignCorners": flags[0], "halfPixelCenters": flags[1]}
    target = t.result(step.output, CHANNELS_LAST)
    kind = "ResizeNearestNeighborOptions"
    t.emit("RESIZE_NEAREST_NEIGHBOR", (source, shape), target, kind, options, 3)


def _reads(length: int, outputs: int, flags: tuple[bool, bool], indices: np.ndarray) -> bool:
    """Tell whether the kernel reads exactly these indices along one axis."""
    align, half = flags
    scale = np.float32(length - 1) / np.float32(outputs - 1) if align and outputs > 1 else None
    scale = np.float32(length) / np.float32(outputs) if scale is None else scale
    at = (np.arange(outputs, dtype=np.float32) + np.float32(0.5 if half else 0.0)) * scale
    picked = np.floor(at + np.float32(0.5)) if align else np.floor(at)
    return np.array_equal(np.clip(picked, 0, length - 1).astype(np.int64), np.asarray(indices))
