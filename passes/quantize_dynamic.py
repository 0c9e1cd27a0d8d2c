"""Multiply 8-bit integers with activation scales that are computed from the input, at run time.

The forms are those that ONNX Runtime's CPU provider was measured to execute fastest and correctly:

- one scale a tensor: DynamicQuantizeLinear, MatMulInteger, Cast, Mul, which it fuses to DynamicQuantizeMatMul (with a
  bias, too);
- one scale a row: the rows are divided by their largest magnitude, ``max|x| / 127``, then quantized with scale 1 by a
  plain Q/DQ pair, and the product is multiplied by the rows' scales. It is fused to MatMulIntegerToFloat. The shorter
  MatMulInteger, Cast, Mul of a scale a row is fused, too, but that kernel adds a bias behind it *before* it multiplies
  by the scales of the rows: results are wrong. Unsigned with zero point 128, because MatMulInteger of two signed
  operands takes 20 times as long;
- Conv: ConvInteger with unsigned weights, one scale a tensor. It saves bytes, no time: 1.2 to 5 times a float Conv's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir

from bitwright.compiler.errors import InternalError, ModelError
from bitwright.compiler.graph.model import (
    STANDARD_DOMAINS,
    constant_array,
    int_attribute,
    is_op,
    node_label,
    rank,
)
from bitwright.passes.contract import PassResult
from bitwright.passes.rewriting import add_initializer, fresh_names, frozen_array

Granularity = Literal["tensor", "row"]

ROW_ZERO_POINT = np.uint8(128)
ROW_STEP = np.float32(1 / 127)
# A row of zeros gets this scale; it divides values of any normal size without overflow.
SMALLEST_SCALE = np.float32(2.0**-100)
AXES_ARE_INPUTS_SINCE = 18
CONV_ATTRIBUTES = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


@dataclass(frozen=True)
class QuantizeDynamic:
    """Compute MatMul, Gemm and Conv nodes on 8-bit integers whose scale follows the input.

    Their weights must be 8-bit integers behind a DequantizeLinear already, which is what the rounding passes leave.
    Nodes that read one tensor share its quantization. The integer node takes over the name of the node it replaces.

    Attributes:
        nodes: Node name -> ``"tensor"`` for one activation scale and zero point a call, ``"row"`` for one scale a row
            (token). A Conv has no rows. A model with rows must not be called without any: ONNX Runtime 1.31 does not
            reduce the last axis of an empty tensor.
    """

    nodes: Mapping[str, Granularity]

    @property
    def name(self) -> str:
        """The pass's name."""
        return "quantize_dynamic"

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite ``model`` in place.

        Raises:
            InternalError: A weight is no 8-bit integer behind a DequantizeLinear.
            ModelError: A node has no dynamic form: a Conv a row, a Gemm with transA, a weight of another rank.
        """
        rewrite = _Rewrite(model)
        changed = 0
        for node in list(model.graph):
            granularity = self.nodes.get(node_label(node))
            if granularity is None or not is_op(node, "MatMul", "Gemm", "Conv") or _is_done(node):
                continue
            _refuse(node, granularity)
            (rewrite.by_row if granularity == "row" else rewrite.by_tensor)(node)
            changed += 1
        return PassResult(model, changed)


@dataclass(frozen=True)
class _Weight:
    """Integers as the integer operator wants them, [K, N] or [Cout, Cin/g, ...], and one factor an output channel."""

    integers: ir.Value
    zero_point: ir.Value | None
    scale: np.ndarray


@dataclass(frozen=True)
class _Quantized:
    """A quantized activation: integers, scale and zero point of the tensor."""

    integers: ir.Value
    scale: ir.Value
    zero_point: ir.Value


@dataclass(frozen=True)
class _Rows:
    """An activation in steps of its rows' scales, rounded, and these scales ([..., 1])."""

    steps: ir.Value
    scale: ir.Value


@dataclass
class _Rewrite:
    model: ir.Model
    tensors: dict[ir.Value, _Quantized] = field(default_factory=dict)
    rows: dict[ir.Value, _Rows] = field(default_factory=dict)
    constants: dict[str, ir.Value] = field(default_factory=dict)
    converted: dict[tuple[ir.Value, str], ir.Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = fresh_names(self.model)
        imports = self.model.opset_imports
        self.opset = next((imports[d] for d in STANDARD_DOMAINS if d in imports), 0)

    def by_tensor(self, node: ir.Node) -> None:
        weight, bias, shape = self.weight_of(node), self.bias_of(node), node.outputs[0].shape
        data = node.inputs[0]
        assert data is not None, "the data operand is not optional"
        if data not in self.tensors:
            self.tensors[data] = self.quantized(data)
        result = self.scaled(
            node, self.products(node, self.tensors[data], weight), self.tensors[data], weight
        )
        if bias is not None:
            result = self.emit(node, "Add", [result, bias], shape)
        self.finish(node, result)

    def by_row(self, node: ir.Node) -> None:
        data, shape = node.inputs[0], node.outputs[0].shape
        assert data is not None, "the data operand is not optional"
        weight, bias = self.dequantized_weight(node), self.bias_of(node)
        if data not in self.rows:
            self.rows[data] = self.rounded_rows(data)
        rows = self.rows[data]
        product = self.emit(node, "MatMul", [rows.steps, weight], shape, name=node.name)
        result = self.emit(node, "Mul", [product, rows.scale], shape)
        if bias is not None:
            result = self.emit(node, "Add", [result, bias], shape)
        self.finish(node, result)

    def dequantized_weight(self, node: ir.Node) -> ir.Value:
        """Return the float weight [K, N] that a MatMul reads in place of ``node``."""
        weight = self.weight_of(node)
        if is_op(node, "MatMul"):
            assert node.inputs[1] is not None, "the weight is not optional"
            return node.inputs[1]
        assert weight.integers.dtype is not None, "a stored weight has a type"
        stem = node.outputs[0].name
        channels = np.broadcast_to(weight.scale, int(weight.integers.shape.numpy()[1]))  # type: ignore[union-attr]
        point = constant_array(weight.zero_point)
        points = np.broadcast_to(np.zeros((), np.int8) if point is None else point, channels.shape)
        inputs: list[ir.Value | None] = [
            weight.integers,
            add_initializer(self.model.graph, self.names(f"{stem}_weight_scale"), channels),
            add_initializer(self.model.graph, self.names(f"{stem}_weight_zero_points"), points),
        ]
        return self.emit(node, "DequantizeLinear", inputs, weight.integers.shape, attributes={"axis": 1})

    def finish(self, node: ir.Node, result: ir.Value) -> None:
        output, name = node.outputs[0], node.outputs[0].name
        ir.convenience.replace_all_uses_with(output, result, replace_graph_outputs=True)
        self.model.graph.remove(node, safe=True)
        result.name, result.type, result.shape = name, output.type, output.shape

    def emit(
        self,
        before: ir.Node,
        op_type: str,
        inputs: list[ir.Value | None],
        shape: ir.Shape | None,
        dtype: ir.DataType = ir.DataType.FLOAT,
        attributes: Mapping[str, int | float] | None = None,
        name: str | None = None,
    ) -> ir.Value:
        """Insert a node with one output in front of ``before``."""
        stem = before.outputs[0].name
        node = ir.node(op_type, inputs, attributes or {}, name=name or self.names(f"{stem}_{op_type}"))
        self.model.graph.insert_before(before, node)
        out = node.outputs[0]
        out.name, out.type, out.shape = self.names(f"{node.name}_out"), ir.TensorType(dtype), shape
        return out

    def constant(self, name: str, array: np.ndarray | np.generic) -> ir.Value:
        """Return the initializer that the whole model shares under this name."""
        if name not in self.constants:
            self.constants[name] = add_initializer(self.model.graph, self.names(name), np.asarray(array))
        return self.constants[name]

    def _front(self, data: ir.Value) -> ir.Node:
        """Return the node in front of which the quantization of ``data`` stands: directly behind what makes it."""
        producer = data.producer()
        nodes = list(self.model.graph)
        return nodes[0] if producer is None else nodes[nodes.index(producer) + 1]

    def quantized(self, data: ir.Value) -> _Quantized:
        node = ir.node(
            "DynamicQuantizeLinear",
            [data],
            num_outputs=3,
            name=self.names(f"{data.name}_DynamicQuantizeLinear"),
        )
        self.model.graph.insert_before(self._front(data), node)
        integers, scale, zero = node.outputs
        integers.name, scale.name, zero.name = (
            self.names(f"{data.name}_{what}") for what in ("quantized", "scale", "zero_point")
        )
        integers.type, scale.type = ir.TensorType(ir.DataType.UINT8), ir.TensorType(ir.DataType.FLOAT)
        zero.type, integers.shape, scale.shape = ir.TensorType(ir.DataType.UINT8), data.shape, ir.Shape([])
        zero.shape = ir.Shape([])
        return _Quantized(integers, scale, zero)

    def rounded_rows(self, data: ir.Value) -> _Rows:
        place = self._front(data)
        one_a_row = None if data.shape is None else ir.Shape([*data.shape[:-1], 1])

        def step(op_type: str, inputs: list[ir.Value], shape: ir.Shape | None, what: str) -> ir.Value:
            node = ir.node(op_type, inputs, name=self.names(f"{data.name}_{what}_{op_type}"))
            self.model.graph.insert_before(place, node)
            out = node.outputs[0]
            dtype = ir.DataType.UINT8 if op_type == "QuantizeLinear" else ir.DataType.FLOAT
            out.name, out.type, out.shape = self.names(f"{data.name}_{what}"), ir.TensorType(dtype), shape
            return out

        largest = self._reduced(step("Abs", [data], data.shape, "magnitude"), one_a_row, step)
        raw = step("Mul", [largest, self.constant("row_step", ROW_STEP)], one_a_row, "raw_scale")
        scale = step("Max", [raw, self.constant("smallest_scale", SMALLEST_SCALE)], one_a_row, "scale")
        steps = step("Div", [data, scale], data.shape, "steps")
        one, zero = self.constant("row_unit", np.float32(1)), self.constant("row_zero_point", ROW_ZERO_POINT)
        integers = step("QuantizeLinear", [steps, one, zero], data.shape, "quantized")
        return _Rows(step("DequantizeLinear", [integers, one, zero], data.shape, "rounded"), scale)

    def _reduced(
        self, magnitude: ir.Value, shape: ir.Shape | None, step: Callable[..., ir.Value]
    ) -> ir.Value:
        if self.opset >= AXES_ARE_INPUTS_SINCE:
            last = self.constant("last_axis", np.array([-1], np.int64))
            return step("ReduceMax", [magnitude, last], shape, "largest")
        largest = step("ReduceMax", [magnitude], shape, "largest")
        node = largest.producer()
        assert node is not None, "it was made a line above"
        node.attributes["axes"] = ir.AttrInt64s("axes", [-1])
        return largest

    def weight_of(self, node: ir.Node) -> _Weight:
        """Return the integers behind the node's weight, in the form its integer operator wants."""
        dequantize = node.inputs[1].producer() if node.inputs[1] is not None else None
        stored = (
            None if not is_op(dequantize, "DequantizeLinear") or dequantize is None else dequantize.inputs[0]
        )
        array, scale = (
            constant_array(stored),
            None if dequantize is None else constant_array(dequantize.inputs[1]),
        )
        if stored is None or array is None or scale is None or array.dtype not in (np.int8, np.uint8):
            msg = "its weight is not stored in 8-bit integers behind a DequantizeLinear"
            raise InternalError(msg, where=f"node '{node_label(node)}'")
        assert dequantize is not None
        trans = is_op(node, "Gemm") and int_attribute(node, "transB", 0) == 1
        channels = 0 if trans or is_op(node, "Conv") else array.ndim - 1
        if array.ndim < 2 or (is_op(node, "MatMul", "Gemm") and array.ndim != 2):
            msg = f"a weight of rank {array.ndim} has no dynamic integer form"
            raise ModelError(msg, where=f"node '{node_label(node)}'", fix="keep the node in float")
        if scale.size > 1 and (
            scale.ndim > 1 or int_attribute(dequantize, "axis", 1) % array.ndim != channels
        ):
            msg = "its weight scales do not run along the output channels"
            raise ModelError(
                msg, where=f"node '{node_label(node)}'", fix="choose one scale a channel or a tensor"
            )
        zero = constant_array(dequantize.inputs[2]) if len(dequantize.inputs) > 2 else None
        zero = np.zeros(scale.shape, array.dtype) if zero is None else zero
        factor = scale.astype(np.float32) * np.float32(node.attributes.get_float("alpha", 1.0))
        if is_op(node, "Conv"):
            return self._conv_weight(node, stored, array, zero, factor)
        integers = self._stored(stored, "transposed", array.T) if trans else stored
        zeros = zero.reshape(()) if zero.size == 1 else zero.reshape(-1)
        keep = zeros if zeros.any() else np.zeros((), array.dtype)
        return _Weight(integers, self.constant(f"{stored.name}_weight_zero_point", keep), factor.reshape(-1))

    def _conv_weight(
        self, node: ir.Node, stored: ir.Value, array: np.ndarray, zero: np.ndarray, factor: np.ndarray
    ) -> _Weight:
        """Return unsigned weights: ConvInteger takes three times as long with signed ones."""
        middle = 128 if array.dtype == np.int8 else 0
        if (zero != zero.reshape(-1)[0]).any():
            msg = "ConvInteger takes one zero point for all weights"
            raise ModelError(msg, where=f"node '{node_label(node)}'", fix="choose symmetric weights")
        unsigned = (array.astype(np.int16) + middle).astype(np.uint8)
        point = np.uint8(int(zero.reshape(-1)[0]) + middle)
        return _Weight(
            self._stored(stored, "unsigned", unsigned),
            self.constant(f"{stored.name}_unsigned_zero_point", point),
            factor.reshape(-1),
        )

    def _stored(self, source: ir.Value, what: str, array: np.ndarray) -> ir.Value:
        key = (source, what)
        if key not in self.converted:
            self.converted[key] = add_initializer(
                self.model.graph, self.names(f"{source.name}_{what}"), array
            )
        return self.converted[key]

    def bias_of(self, node: ir.Node) -> ir.Value | None:
        """Return the bias as the output's shape wants it, ``beta`` multiplied in."""
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is None or is_op(node, "MatMul"):
            return None
        beta = node.attributes.get_float("beta", 1.0) if is_op(node, "Gemm") else 1.0
        array = frozen_array(bias)
        if array is None and beta == 1.0 and is_op(node, "Gemm"):
            return bias
        if array is None:
            msg = "its bias is computed at run time"
            raise ModelError(msg, where=f"node '{node_label(node)}'", fix="keep the node in float")
        if is_op(node, "Conv"):
            array = array.reshape(1, -1, *[1] * (_weight_rank(node) - 2))
        elif beta == 1.0:
            return bias
        return add_initializer(self.model.graph, self.names(f"{bias.name}_added"), array * np.float32(beta))

    def products(self, node: ir.Node, data: _Quantized, weight: _Weight) -> ir.Value:
        kept = CONV_ATTRIBUTES if is_op(node, "Conv") else ()
        attributes = [a for a in node.attributes.values() if a.name in kept]
        op_type = "ConvInteger" if is_op(node, "Conv") else "MatMulInteger"
        inputs = [data.integers, weight.integers, data.zero_point, weight.zero_point]
        product = ir.Node("", op_type, inputs, attributes, num_outputs=1, name=node.name)
        self.model.graph.insert_before(node, product)
        out, shape = product.outputs[0], node.outputs[0].shape
        out.name, out.type = self.names(f"{node.outputs[0].name}_products"), ir.TensorType(ir.DataType.INT32)
        out.shape = shape
        return self.emit(node, "Cast", [out], shape, attributes={"to": int(ir.DataType.FLOAT)})

    def scaled(self, node: ir.Node, products: ir.Value, data: _Quantized, weight: _Weight) -> ir.Value:
        factor = weight.scale.reshape(()) if weight.scale.size == 1 else weight.scale
        if is_op(node, "Conv") and factor.ndim:
            factor = factor.reshape(1, -1, *[1] * (_weight_rank(node) - 2))
        stem = node.outputs[0].name
        stored = add_initializer(self.model.graph, self.names(f"{stem}_weight_scale"), factor)
        both = self.emit(node, "Mul", [data.scale, stored], ir.Shape(factor.shape))
        return self.emit(node, "Mul", [products, both], node.outputs[0].shape)


def _is_done(node: ir.Node) -> bool:
    """Tell whether a MatMul reads rounded rows already: it is what this pass makes of a node, under its name."""
    value = node.inputs[0]
    for op_type in ("DequantizeLinear", "QuantizeLinear", "Div"):
        producer = None if value is None else value.producer()
        if producer is None or not is_op(producer, op_type):
            return False
        value = producer.inputs[0]
    return True


def _refuse(node: ir.Node, granularity: Granularity) -> None:
    what = ""
    if granularity not in ("tensor", "row"):
        what = f"no dynamic granularity '{granularity}'"
        raise InternalError(what, where=f"node '{node_label(node)}'")
    if is_op(node, "Conv") and granularity == "row":
        what = "a convolution has no rows to scale"
    if is_op(node, "Gemm") and int_attribute(node, "transA", 0):
        what = "a transposed activation has no dynamic integer form"
    if what:
        raise ModelError(
            what, where=f"node '{node_label(node)}'", fix="choose one scale a tensor, or keep it in float"
        )


def _weight_rank(node: ir.Node) -> int:
    dequantize = node.inputs[1].producer() if node.inputs[1] is not None else None
    found = None if dequantize is None else rank(dequantize.inputs[0])
    assert found is not None, "a stored weight has a shape"
    return found
