"""How a quantized weight is written: initializers, and the nodes that give the float weight back.

Every rounding pass writes through :func:`store_weight`, so that what reads the graph behind them (packing, Q/DQ
insertion, a runtime's fusions) meets one form:

- integers, ternary and binary values: ``DequantizeLinear``, per tensor, per channel, or in blocks;
- a codebook of other values (NF4): ``Reshape(Mul(Gather(codebook, Cast(indices)), scales))``, indices and scales with
  an axis for the groups;
- half precision: ``Cast``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.compiler.errors import InternalError
from bitwright.compiler.graph.model import FreshNames
from bitwright.compiler.plan.model import WeightQuant
from bitwright.compiler.rounding.grid import codebook
from bitwright.passes.rewriting import add_initializer

# Codebooks whose values are integers already.
INTEGER_CODEBOOKS = ("ternary", "binary")
FLOAT_TYPES = ("float16", "bfloat16")

_OPSET_OF_TYPE = {"int4": 21, "uint4": 21, "int2": 25, "uint2": 25}
_OPSET_OF_BLOCKS = 21


def needed_opset(quants: Iterable[WeightQuant]) -> int:
    """Return the oldest opset in which all of these weights can be written, 0 if any will do."""
    return max((_opset(q) for q in quants), default=0)


def _opset(quant: WeightQuant) -> int:
    return max(_OPSET_OF_TYPE.get(quant.dtype, 0), _OPSET_OF_BLOCKS if quant.group else 0)


def stored_type(dtype: str) -> np.dtype[np.generic]:
    """Return the numpy type of an element type by its name in the plan, e.g. ``"int4"`` or ``"float8_e4m3fn"``."""
    return ir.DataType[_ONNX_NAMES.get(dtype, dtype.upper())].numpy()


def is_indexed(quant: WeightQuant) -> bool:
    """Tell whether the stored integers are positions in a table of values (NF4)."""
    return quant.codebook == "nf4"


def integer_range(quant: WeightQuant) -> tuple[int, int]:
    """Return the smallest and the largest integer that may be stored for a weight.

    Kernels of 8-bit products want symmetric integers (``[-127, 127]``); grouped weights, which only a
    weight-only kernel reads, those with a zero point and those of 2 bits use every integer of their width.
    """
    if quant.codebook in INTEGER_CODEBOOKS:
        return -1, 1
    if is_indexed(quant) or quant.dtype.startswith("uint"):
        return 0, int(2**quant.bits - 1)
    high = int(2 ** (quant.bits - 1) - 1)
    symmetric = quant.zero_point is None and not quant.group and quant.bits > 2
    return (-high, high) if symmetric else (-high - 1, high)


def explicit_zero_point(quant: WeightQuant) -> np.ndarray | None:
    """Return the zero points to write, None to write none: kernels of 8-bit products want them even if zero."""
    if quant.zero_point is not None:
        return quant.zero_point
    if quant.dtype.startswith("uint"):
        return np.full(quant.scale.shape, 2 ** (quant.bits - 1))
    return None if quant.group else np.zeros(quant.scale.shape)


def expand(blocks: np.ndarray, quant: WeightQuant, shape: tuple[int, ...]) -> np.ndarray:
    """Return scales or zero points in a form that broadcasts to a weight of ``shape``."""
    if quant.group:
        assert quant.axis is not None, "groups are cut along an axis"
        return np.repeat(blocks, quant.group, axis=quant.axis).take(range(shape[quant.axis]), axis=quant.axis)
    over = [1] * len(shape)
    if quant.axis is not None:
        over[quant.axis] = -1
    return blocks.reshape(over)


def store_weight(
    model: ir.Model, stem: str, integers: NDArray[np.generic], quant: WeightQuant, names: FreshNames
) -> Callable[[], ir.Value]:
    """Add a quantized weight to a model.

    Args:
        model: Of an opset that :func:`needed_opset` allows.
        stem: The new initializers and values are named after it.
        integers: Of the weight's shape and any integer type: what is stored, zero point included; positions
            in the codebook for NF4; the weight itself for half precision.
        quant: The weight's entry in the plan.
        names: The model's free names.

    Returns:
        A function that gives a float32 value of the weight's shape to read. Weights that integer kernels
        read give the same value each time; weight-only formats give every reader nodes of its own, because
        runtimes fuse a dequantizer with one reader only. The initializers are shared.

    Raises:
        InternalError: An integer is outside the format.
    """
    _check(integers, quant, stem)
    write = _Writer(model, stem, quant, names)
    if quant.dtype in FLOAT_TYPES:
        return write.half(integers)
    return write.indexed(integers) if is_indexed(quant) else write.affine(integers)


def _check(integers: NDArray[np.generic], quant: WeightQuant, stem: str) -> None:
    if quant.dtype in FLOAT_TYPES or quant.dtype.startswith("float8"):
        return
    low, high = integer_range(quant)
    if integers.size and (integers.min() < low or integers.max() > high):
        msg = f"rounding left the integers {low} to {high} of {quant.dtype}"
        raise InternalError(msg, where=f"weight '{stem}'")


@dataclass(frozen=True)
class _Writer:
    model: ir.Model
    stem: str
    quant: WeightQuant
    names: FreshNames

    def half(self, array: NDArray[np.generic]) -> Callable[[], ir.Value]:
        stored = self._initializer("half", array, self.quant.dtype)
        shared = self._node("Cast", [stored], array.shape, [ir.AttrInt64("to", ir.DataType.FLOAT.value)])
        return lambda: shared

    def affine(self, array: NDArray[np.generic]) -> Callable[[], ir.Value]:
        quant = self.quant
        scale = quant.scale.astype(np.float32)
        inputs = [self._initializer("quantized", array, quant.dtype)]
        inputs.append(
            self._initializer("scale", scale if quant.axis is not None else scale.reshape(()), "float32")
        )
        zero = explicit_zero_point(quant)
        if zero is not None:
            inputs.append(self._initializer("zero_point", zero.reshape(inputs[1].shape.numpy()), quant.dtype))  # type: ignore[union-attr]
        attributes = [] if quant.axis is None else [ir.AttrInt64("axis", quant.axis)]
        if not quant.group:
            shared = self._node("DequantizeLinear", inputs, array.shape, attributes)
            return lambda: shared
        attributes.append(ir.AttrInt64("block_size", quant.group))
        return lambda: self._node("DequantizeLinear", inputs, array.shape, attributes)

    def indexed(self, array: NDArray[np.generic]) -> Callable[[], ir.Value]:
        quant = self.quant
        if quant.axis != 0 or array.ndim != 2 or array.shape[0] % quant.group:
            msg = f"{quant.codebook} weights of shape {array.shape} in groups of {quant.group} along {quant.axis}"
            raise InternalError(msg, where=f"weight '{self.stem}'")
        blocks = array.reshape(-1, quant.group, array.shape[1])
        indices = self._initializer("indices", blocks, quant.dtype)
        scale = self._initializer("scale", quant.scale[:, None, :], "float32")
        table = self._initializer("codebook", codebook(quant.codebook).values, "float32")
        shape = self._initializer("shape", np.array(array.shape), "int64")

        def read() -> ir.Value:
            wide = self._node("Cast", [indices], blocks.shape, [ir.AttrInt64("to", ir.DataType.INT32.value)])
            wide.dtype = ir.DataType.INT32
            values = self._node("Gather", [table, wide], blocks.shape)
            return self._node(
                "Reshape", [self._node("Mul", [values, scale], blocks.shape), shape], array.shape
            )

        return read

    def _initializer(self, what: str, array: NDArray[np.generic], dtype: str) -> ir.Value:
        return add_initializer(
            self.model.graph, self.names(f"{self.stem}_{what}"), array.astype(stored_type(dtype), copy=False)
        )

    def _node(
        self, op_type: str, inputs: list[ir.Value], shape: tuple[int, ...], attributes: Iterable[ir.Attr] = ()
    ) -> ir.Value:
        """Insert a node in front of the graph, behind the nodes it reads: any later node may read a constant."""
        node = ir.Node(
            "", op_type, inputs, attributes, num_outputs=1, name=self.names(f"{self.stem}_{op_type}")
        )
        output = node.outputs[0]
        output.name = self.names(f"{self.stem}_{_OUTPUT_NAMES.get(op_type, 'dequantized')}")
        output.dtype, output.shape = ir.DataType.FLOAT, ir.Shape(shape)
        sources = [p for v in inputs if (p := v.producer()) is not None]
        if sources:
            self.model.graph.insert_after(sources[-1], node)
        else:
            self.model.graph.insert_before(next(iter(self.model.graph)), node)
        return output


_OUTPUT_NAMES = {"Gather": "values", "Mul": "scaled"}
_ONNX_NAMES = {
    "float32": "FLOAT",
    "float8_e4m3fn": "FLOAT8E4M3FN",
    "float8_e5m2": "FLOAT8E5M2",
}
