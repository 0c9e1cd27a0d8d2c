"""Convolutions and fully connected layers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from bitwright.compiler.program.ops import Dot, QConv, QGemm, QPool, QuantParams
from bitwright.targets.ethos_u.translator import CHANNELS_LAST, Translator, UnsupportedStepError

# Padding and ActivationFunctionType of the TFLite schema.
SAME, VALID = 0, 1
ACTIVATIONS = {"NONE": 0, "RELU": 1, "RELU_N1_TO_1": 2, "RELU6": 3}


@dataclass(frozen=True)
class Geometry:
    """A window, with the padding as the file says it.

    Attributes:
        source: The tensor it slides over, padded where neither of the two words fits.
        padding: ``SAME`` or ``VALID``.
        strides: (rows, columns).
    """

    source: str
    padding: int
    strides: tuple[int, int]


def fused_activation(lower: int, upper: int, quant: QuantParams) -> str | None:
    """Return the activation whose bounds are exactly these integers, or None.

    Args:
        lower: Smallest integer written.
        upper: Largest.
        quant: Of the output.
    """
    least, most = quant.bounds
    for name, (low, high) in {
        "NONE": (-np.inf, np.inf),
        "RELU": (0.0, np.inf),
        "RELU6": (0.0, 6.0),
        "RELU_N1_TO_1": (-1.0, 1.0),
    }.items():
        bounds = [
            _bound(low, quant) if np.isfinite(low) else least,
            _bound(high, quant) if np.isfinite(high) else most,
        ]
        if [max(bounds[0], least), min(bounds[1], most)] == [lower, upper]:
            return name
    return None


def _bound(value: float, quant: QuantParams) -> int:
    """Round half away from zero, as the kernels do."""
    steps = np.float32(value) / np.float32(quant.scale)
    return quant.zero_point + int(np.copysign(np.floor(np.abs(steps) + np.float32(0.5)), steps))


def clipped(t: Translator, source: str, lower: int, upper: int, quant: QuantParams, stem: str) -> str:
    """Emit MAXIMUM and MINIMUM with constant integers; returns the tensor that holds the result."""
    least, most = quant.bounds
    for operator, bound, needed in (("MAXIMUM", lower, lower > least), ("MINIMUM", upper, upper < most)):
        if needed:
            level = t.fresh(f"{stem}_{operator.lower()}")
            t.add(level, (1,), quant, np.array([bound], np.int8))
            target = t.add(t.fresh(f"{stem}_clipped"), t.tensors[source].shape, quant)
            t.emit(operator, (source, level), target, "MaximumMinimumOptions")
            source = target
    return source


def emit_clipped(
    t: Translator,
    operator: str,
    inputs: tuple[str, ...],
    output: tuple[str, str],
    bounds: tuple[int, int],
    options: tuple[str, dict[str, int | bool]],
    version: int,
) -> None:
    """Emit an operator that ends in an activation; bounds that no activation has are clipped behind it.

    Args:
        t: The graph.
        operator: Its name.
        inputs: What it reads.
        output: Tensor of the program, tensor of the file.
        bounds: Smallest and largest integer written.
        options: Type of its options, and those without the activation.
        version: Of the operator.
    """
    name, target = output
    quant = t.quant(name)
    activation = fused_activation(*bounds, quant)
    chosen = {**options[1], "fusedActivationFunction": ACTIVATIONS[activation or "NONE"]}
    if activation is not None:
        t.emit(operator, inputs, target, options[0], chosen, version)
        return
    raw = t.add(t.fresh(f"{name}_unclipped"), t.tensors[target].shape, quant)
    t.emit(operator, inputs, raw, options[0], chosen, version)
    last = clipped(t, raw, *bounds, quant, name)
    t.stored[name] = replace(t.stored[name], tensor=last)
    del t.tensors[target]


def geometry(
    t: Translator, step: QConv | QPool, kernel: tuple[int, int], *, fill: int | None, same: bool = True
) -> Geometry:
    """Return how a window slides; explicit padding is emitted where the file has no word for it.

    Args:
        t: The graph.
        step: A convolution or pooling of one image.
        kernel: (rows, columns).
        fill: What stands outside the image; None where a padded position must not be read.
        same: TensorFlow's padding is allowed; it counts as no elements in an average.

    Raises:
        UnsupportedStepError: The padding can neither be named nor emitted.
    """
    name = step.inputs[0]
    source, image, size = t.channels_last(name), t.shape(name)[2:], t.shape(step.output)[2:]
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, step.dilations, strict=True)]
    strides = list(step.strides)
    before = tuple(step.pads[:2])
    lengths = [(size[a] - 1) * step.strides[a] + reach[a] for a in (0, 1)]
    if before == (0, 0) and all(lengths[a] <= image[a] for a in (0, 1)):
        # A single window needs no more stride than what keeps it single; the accelerator has small strides only.
        used = [strides[a] if size[a] > 1 else image[a] - reach[a] + 1 for a in (0, 1)]
        return Geometry(source, VALID, (used[0], used[1]))
    total = [max(lengths[a] - image[a], 0) for a in (0, 1)]
    covers = all(size[a] == -(-image[a] // step.strides[a]) for a in (0, 1))
    if same and covers and before == tuple(n // 2 for n in total):
        return Geometry(source, SAME, (strides[0], strides[1]))
    if fill is None:
        msg = f"padding {step.pads} is neither none nor TensorFlow's SAME"
        raise UnsupportedStepError(msg)
    if fill != t.quant(name).zero_point:
        msg = "padding with something else than zero has no operator on the accelerator"
        raise UnsupportedStepError(msg)
    return Geometry(_padded(t, name, source, step.pads), VALID, (strides[0], strides[1]))


def _padded(t: Translator, name: str, source: str, pads: tuple[int, int, int, int]) -> str:
    top, left, bottom, right = pads
    widths = np.array([[0, 0], [top, bottom], [left, right], [0, 0]], np.int32)
    shape = tuple(int(n + w.sum()) for n, w in zip(t.tensors[source].shape, widths, strict=True))
    target = t.add(t.fresh(f"{name}_padded"), shape, t.quant(name))
    t.emit("PAD", (source, t.constant(f"{target}_widths", widths)), target, "PadOptions", version=2)
    return target


def convolution(t: Translator, step: QConv) -> None:
    """Emit CONV_2D or DEPTHWISE_CONV_2D."""
    kernel = (step.weight.shape[2], step.weight.shape[3])
    channels = t.shape(step.inputs[0])[1]
    found = geometry(t, step, kernel, fill=t.quant(step.inputs[0]).zero_point)
    options = {
        "padding": found.padding,
        "strideH": found.strides[0],
        "strideW": found.strides[1],
        "dilationHFactor": step.dilations[0],
        "dilationWFactor": step.dilations[1],
    }
    # A single channel of a group is depthwise, unless there is only one: then both are the same.
    depthwise = step.group == channels and channels > 1
    if depthwise:
        weight = step.weight.reshape(step.weight.shape[0], *kernel).transpose(1, 2, 0)[None]
        options["depthMultiplier"] = step.weight.shape[0] // channels
    else:
        weight = step.weight.transpose(0, 2, 3, 1)
    operands = (found.source, *_parameters(t, step, weight, axis=3 if depthwise else 0))
    operator = "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D"
    kind = "DepthwiseConv2DOptions" if depthwise else "Conv2DOptions"
    target = t.result(step.output, CHANNELS_LAST)
    bounds = (step.lower, step.upper)
    emit_clipped(t, operator, operands, (step.output, target), bounds, (kind, options), 3)


def average(t: Translator, step: QPool) -> None:
    """Emit a pooling as DEPTHWISE_CONV_2D with ones, scaled by the number of elements."""
    channels, kernel = t.shape(step.output)[1], step.kernel
    found = geometry(t, step, kernel, fill=t.quant(step.inputs[0]).zero_point, same=False)
    share = np.full(channels, 1 / (kernel[0] * kernel[1]), np.float32)
    ones = t.constant(f"{step.output}_ones", np.ones((1, *kernel, channels), np.int8), share, 3)
    unit = np.float32(t.quant(step.inputs[0]).scale) * share
    nothing = t.constant(f"{step.output}_bias", np.zeros(channels, np.int32), unit, 0)
    options = {
        "padding": found.padding,
        "strideH": found.strides[0],
        "strideW": found.strides[1],
        "dilationHFactor": 1,
        "dilationWFactor": 1,
        "depthMultiplier": 1,
        "fusedActivationFunction": ACTIVATIONS["NONE"],
    }
    target = t.result(step.output, CHANNELS_LAST)
    t.emit("DEPTHWISE_CONV_2D", (found.source, ones, nothing), target, "DepthwiseConv2DOptions", options, 3)


def fully_connected(t: Translator, step: QGemm) -> None:
    """Emit FULLY_CONNECTED; all leading axes of the input are rows."""
    name, (depth, width) = step.inputs[0], step.weight.shape
    rows = int(np.prod(t.shape(name)[:-1], dtype=np.int64))
    source, weight = _rows(t, step, depth, rows)
    operands = (source, *_parameters(t, step, weight.T, axis=0))
    target = t.result(step.output, view=(rows, width))
    options: tuple[str, dict[str, int | bool]] = ("FullyConnectedOptions", {"keepNumDims": False})
    bounds = (step.lower, step.upper)
    # Scales of channels came with version 12.
    version = 4 if step.weight_scale.size == 1 else 12
    emit_clipped(t, "FULLY_CONNECTED", operands, (step.output, target), bounds, options, version)


def _rows(t: Translator, step: QGemm, depth: int, rows: int) -> tuple[str, np.ndarray]:
    """Return the input as a matrix, and the weight with its rows in the order that the input's columns lie in.

    An image that was flattened stays channels last: the weight is permuted instead.
    """
    name = step.inputs[0]
    stored = t.where(name)
    weight = step.weight
    flat = len(stored.view) > 1 and stored.order[0] == 0 and stored.view[0] == rows
    if flat and not stored.is_row_major:
        inner = np.arange(depth).reshape(stored.view[1:]).transpose([axis - 1 for axis in stored.order[1:]])
        weight, source = weight[inner.ravel()], stored.tensor
    else:
        source = t.read(name)
    if t.tensors[source].shape != (rows, depth):
        source = t.reshape(source, (rows, depth), t.quant(name), name)
    return source, weight


def _parameters(t: Translator, step: Dot, weight: np.ndarray, axis: int) -> tuple[str, str]:
    """Add weight and bias; one scale where all channels have the same."""
    channels = weight.shape[axis]
    scale = step.weight_scale.astype(np.float32)
    bias = np.zeros(channels, np.int32) if step.bias is None else step.bias.astype(np.int32)
    product = np.float32(t.quant(step.inputs[0]).scale) * scale
    return (
        t.constant(f"{step.output}_weight", np.ascontiguousarray(weight), scale, axis),
        t.constant(f"{step.output}_bias", bias, product, 0),
    )
