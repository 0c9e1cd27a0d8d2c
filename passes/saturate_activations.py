"""Activations of fewer bits than their type: a Clip in front of the quantizer keeps the integers in their range."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import FreshNames, constant_array, is_op, only_consumer
from bitwright.passes.contract import PassResult
from bitwright.passes.rewriting import add_initializer, bypass, fresh_names


@dataclass(frozen=True)
class SaturateActivations:
    """Insert ``Clip((low - z) s, (high - z) s)`` before QuantizeLinear; it takes the place of a Relu where it can.

    Every runtime executes 8-bit types and Clip; narrower activation types few do. Bounds that the type's own saturation
    keeps are not written twice, and neither are those of a tensor that only moves saturated integers.

    Attributes:
        levels: Tensor that is quantized -> smallest and largest integer.
        moved: Tensors whose integers were saturated before.
        integers: Clip the integers behind QuantizeLinear instead of the floats before it. ONNX Runtime fuses no
            convolution with a Clip and a quantizer, but clips 8-bit integers as they are.
    """

    levels: Mapping[str, tuple[int, int]]
    moved: frozenset[str] = frozenset()
    integers: bool = False

    @property
    def name(self) -> str:
        """The pass's name."""
        return "saturate_activations"

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite ``model`` in place."""
        names = fresh_names(model)
        found = [n for n in model.graph if is_op(n, "QuantizeLinear") and self._wanted(n)]
        saturate = _saturate_integers if self.integers else _saturate
        changed = sum(saturate(model, n, self.levels[_read(n)], names) for n in found)
        return PassResult(model, changed)

    def _wanted(self, node: ir.Node) -> bool:
        if any(is_op(use.node, "Clip") for use in node.outputs[0].uses()):
            return False
        return _read(node) in self.levels and _read(node) not in self.moved


def _read(node: ir.Node) -> str:
    value = node.inputs[0]
    return "" if value is None else value.name or ""


def _saturate(model: ir.Model, quantize: ir.Node, levels: tuple[int, int], names: FreshNames) -> int:
    value, scale, zero = quantize.inputs[0], constant_array(quantize.inputs[1]), quantize.inputs[2]
    point = constant_array(zero)
    assert value is not None and scale is not None and point is not None, "insert_qdq writes them"
    kind = np.iinfo(point.dtype)
    own = (int(kind.min), int(kind.max))
    if levels == own:
        return 0
    bounds = tuple((level - int(point)) * np.float32(scale) for level in levels)
    previous = value.producer()
    relu = previous is not None and is_op(previous, "Relu") and only_consumer(value) is quantize
    stem = value.name or "tensor"
    inputs = [
        value,
        None,
        add_initializer(model.graph, names(f"{stem}_highest"), np.asarray(bounds[1], np.float32)),
    ]
    if levels[0] != own[0] or relu:
        inputs[1] = add_initializer(model.graph, names(f"{stem}_lowest"), np.asarray(bounds[0], np.float32))
    clip = ir.Node("", "Clip", inputs, num_outputs=1, name=names(f"{stem}_Clip"))
    result = clip.outputs[0]
    result.name, result.type, result.shape = names(f"{stem}_saturated"), value.type, value.shape
    model.graph.insert_before(quantize, clip)
    quantize.replace_input_with(0, result)
    if relu and bounds[0] == 0:
        assert previous is not None and previous.inputs[0] is not None
        bypass(value, previous.inputs[0])
    return 1


def _saturate_integers(model: ir.Model, quantize: ir.Node, levels: tuple[int, int], names: FreshNames) -> int:
    point, integers = constant_array(quantize.inputs[2]), quantize.outputs[0]
    assert point is not None, "insert_qdq writes it"
    kind = np.iinfo(point.dtype)
    if levels == (int(kind.min), int(kind.max)):
        return 0
    stem = _read(quantize) or "tensor"
    bounds = [
        add_initializer(model.graph, names(f"{stem}_{what}"), np.asarray(level, point.dtype))
        for what, level in zip(("lowest", "highest"), levels, strict=True)
    ]
    readers = list(integers.uses())
    clip = ir.Node("", "Clip", [integers, *bounds], num_outputs=1, name=names(f"{stem}_Clip"))
    result = clip.outputs[0]
    result.name, result.type, result.shape = names(f"{stem}_saturated"), integers.type, integers.shape
    model.graph.insert_after(quantize, clip)
    for reader, index in readers:
        reader.replace_input_with(index, result)
    return 1
