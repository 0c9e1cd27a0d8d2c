"""The program while it is being read: integer views of float values and the steps behind them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import (
    FreshNames,
    constant_array,
    consumers,
    is_op,
    node_label,
    only_consumer,
    static_shape,
)
from bitwright.compiler.program.affine import quantize
from bitwright.compiler.program.extract_quantizers import tensor_params
from bitwright.compiler.program.ops import QuantParams, Step, Tensor


@dataclass(frozen=True)
class QuantizedEnd:
    """Where a float result becomes integers again.

    Attributes:
        output: The output tensor (named as the QuantizeLinear output).
        lower: Smallest integer, after fused Relu and Clip.
        upper: Largest integer.
        nodes: The nodes from the result to QuantizeLinear.
    """

    output: Tensor
    lower: int
    upper: int
    nodes: tuple[ir.Node, ...]

    @property
    def quant(self) -> QuantParams:
        """The parameters of the output."""
        assert self.output.quant is not None
        return self.output.quant


class Draft:
    """Steps that could be taken, by the tensor they write; which are needed is decided at the end.

    A float value has a *view* when it equals the dequantization of an integer tensor exactly: the output of
    DequantizeLinear, and every value that is moved, maximised or rectified from such a value. Views are
    recorded in topological order, so a matcher finds the views of its inputs ready.

    Attributes:
        model: The model being read. Nothing edits it.
        steps: Step by the name of each tensor it writes.
        tensors: Tensor by name, for all names in ``steps`` and ``constants`` and for integer graph inputs.
        constants: Constant integer tensors.
        notes: Reasons for what stayed float.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.steps: dict[str, Step] = {}
        self.tensors: dict[str, Tensor] = {}
        self.constants: dict[str, np.ndarray] = {}
        self.notes: list[str] = []
        self._fresh = FreshNames(model)
        self._labels: dict[str, int] = {}
        self._views: dict[ir.Value, Tensor] = {}
        self._integers: dict[ir.Value, Tensor] = {}

    def view(self, value: ir.Value | None) -> Tensor | None:
        """Return the integer tensor whose dequantization ``value`` is, if there is one."""
        return None if value is None else self._views.get(value)

    def variable_view(self, value: ir.Value | None) -> Tensor | None:
        """Return the view unless the tensor is a constant."""
        found = self.view(value)
        return None if found is None or found.name in self.constants else found

    def set_view(self, value: ir.Value, tensor: Tensor) -> None:
        """Record that ``value`` is the dequantization of ``tensor``."""
        self._views[value] = tensor

    @contextmanager
    def pretended_view(self, value: ir.Value, tensor: Tensor) -> Iterator[None]:
        """Let ``value``, which has no view, view ``tensor`` within the block."""
        self._views[value] = tensor
        try:
            yield
        finally:
            del self._views[value]

    def integer_tensor(self, value: ir.Value, params: QuantParams) -> Tensor | None:
        """Return the tensor of an integer value read with ``params``; None if it has others or no shape."""
        if value in self._integers:
            known = self._integers[value]
            return known if known.quant == params else None
        assert value.name is not None
        known_name = self.tensors.get(value.name)
        if known_name is not None:
            return known_name if known_name.quant == params else None
        tensor = self.new_tensor(value.name, static_shape(value), params)
        if tensor is not None:
            self.tensors[tensor.name] = tensor
        return tensor

    def alias(self, value: ir.Value, tensor: Tensor) -> None:
        """Record that the integer graph value ``value`` holds the same integers as ``tensor``."""
        self._integers[value] = tensor

    @staticmethod
    def new_tensor(name: str, shape: tuple[int, ...] | None, params: QuantParams) -> Tensor | None:
        """Return a quantized tensor record; None if the shape is unknown or empty."""
        if shape is None or 0 in shape:
            return None
        return Tensor(name, shape, params.dtype, params)

    def add(self, step: Step, *outputs: Tensor) -> None:
        """Offer a step that writes ``outputs``."""
        for tensor in outputs:
            self.steps[tensor.name] = step
            self.tensors[tensor.name] = tensor

    def add_constant(self, tensor: Tensor, array: np.ndarray) -> None:
        """Record a constant integer tensor."""
        self.tensors[tensor.name] = tensor
        self.constants[tensor.name] = np.ascontiguousarray(array)

    def fresh(self, stem: str) -> str:
        """Return a tensor name that is not taken."""
        return self._fresh(stem)

    def label(self, stem: str) -> str:
        """Return a unique step name."""
        self._labels[stem] = self._labels.get(stem, 0) + 1
        if self._labels[stem] == 1:
            return stem
        return self.label(f"{stem}_{self._labels[stem]}")

    def note(self, node: ir.Node, reason: str) -> None:
        """Say why a node stays float."""
        self.notes.append(f"{node.op_type} '{node_label(node)}' stays float: {reason}")

    def viewed_output(self, value: ir.Value, params: QuantParams) -> Tensor | None:
        """Return the tensor that a new view of ``value`` is stored in.

        It carries the name of the QuantizeLinear output when a node quantizes ``value`` with the same
        parameters, otherwise a fresh one.
        """
        for node in consumers(value):
            if is_op(node, "QuantizeLinear") and node.inputs[0] is value and tensor_params(node) == params:
                name = node.outputs[0].name
                break
        else:
            name = self.fresh(f"{value.name}_quantized")
        return None if name is None else self.new_tensor(name, static_shape(value), params)

    def quantized_end(self, value: ir.Value) -> QuantizedEnd | None:
        """Follow Relu and Clip from ``value`` to the QuantizeLinear that is the only reader, else None."""
        bounds, nodes = (-np.inf, np.inf), []
        while (node := only_consumer(value)) is not None and node.inputs[0] is value:
            nodes.append(node)
            params = tensor_params(node)
            if is_op(node, "QuantizeLinear") and params is not None:
                return self._end(node, params, bounds, tuple(nodes))
            limits = clip_limits(node)
            if limits is None:
                return None
            bounds = (clip_scalar(bounds[0], limits), clip_scalar(bounds[1], limits))
            value = node.outputs[0]
        return None

    def _end(
        self, node: ir.Node, params: QuantParams, bounds: tuple[float, float], nodes: tuple[ir.Node, ...]
    ) -> QuantizedEnd | None:
        output = self.integer_tensor(node.outputs[0], params)
        if output is None:
            return None
        # Quantization is monotone, so clipping before it equals clipping integers after it.
        lower, upper = (int(quantize(np.array(b, np.float32), params)) for b in bounds)
        return QuantizedEnd(output, lower, upper, nodes)


def clip_limits(node: ir.Node) -> tuple[float, float] | None:
    """Return the bounds of a Relu or a Clip with constant bounds, else None."""
    if is_op(node, "Relu"):
        return 0.0, float(np.inf)
    if not is_op(node, "Clip"):
        return None
    limits = [-float(np.inf), float(np.inf)]
    for i, value in enumerate(node.inputs[1:]):
        if value is None:
            continue
        array = constant_array(value)
        if array is None or array.size != 1 or np.isnan(array).any():
            return None
        limits[i] = float(array.reshape(-1)[0])
    return limits[0], limits[1]


def clip_scalar(x: float, limits: tuple[float, float]) -> float:
    """Return ``min(high, max(x, low))``: as ONNX Clip, the upper bound wins when they cross."""
    return min(limits[1], max(x, limits[0]))


def labels(*nodes: ir.Node | None) -> tuple[str, ...]:
    """Return the labels of nodes, each once, in order."""
    return tuple(dict.fromkeys(node_label(n) for n in nodes if n is not None))
