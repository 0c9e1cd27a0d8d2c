"""A TensorFlow Lite graph as records, before it becomes a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

OptionValue = int | float | bool


@dataclass(frozen=True)
class TfliteTensor:
    """A tensor of the file.

    Attributes:
        name: Unique.
        shape: As it is stored; images are channels last.
        dtype: ``"int8"`` or ``"int32"``.
        scale: float32 [1], or one a channel; empty for integers without a scale (shapes, permutations).
        zero_point: Of all channels.
        axis: Which axis of ``shape`` the scales belong to.
        data: Content of a constant.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    zero_point: int = 0
    axis: int = 0
    data: np.ndarray | None = None


@dataclass(frozen=True)
class Layer:
    """An operator of the file.

    Attributes:
        operator: Name in the schema, e.g. ``"CONV_2D"``.
        inputs: Tensors it reads.
        output: The tensor it writes.
        options_type: Table of its options in the schema, e.g. ``"Conv2DOptions"``; "" without options.
        options: Field of that table -> value.
        version: Oldest version of the operator that does this.
        step: Step of the integer program that it belongs to.
    """

    operator: str
    inputs: tuple[str, ...]
    output: str
    options_type: str = ""
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    version: int = 1
    step: str = ""


@dataclass(frozen=True)
class Stored:
    """How a tensor of the integer program lies in a tensor of the file.

    The logical tensor, reshaped to ``view``, is stored with its axes in ``order``.

    Attributes:
        tensor: Name in the file.
        view: Shape with as many elements as the logical one.
        order: Axes of ``view``, outermost first.
    """

    tensor: str
    view: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the file."""
        return tuple(self.view[axis] for axis in self.order)

    @property
    def is_row_major(self) -> bool:
        """Whether the elements lie in the order of the logical tensor."""
        moved = [axis for axis in self.order if self.view[axis] != 1]
        return moved == sorted(moved)

    def to_file(self, array: np.ndarray) -> np.ndarray:
        """Return a logical array as it is stored."""
        return np.ascontiguousarray(array.reshape(self.view).transpose(self.order))

    def to_logical(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Return an array of the file as the logical one of ``shape``."""
        back = tuple(int(axis) for axis in np.argsort(self.order))
        return np.ascontiguousarray(array.reshape(self.shape).transpose(back)).reshape(shape)


@dataclass(frozen=True)
class TfliteGraph:
    """A whole graph.

    Attributes:
        tensors: By name.
        layers: In topological order.
        inputs: Graph input of the ONNX model -> where the file takes it.
        outputs: Graph output of the ONNX model -> where the file leaves it.
        stored: Tensor of the integer program -> where it lies in the file.
    """

    tensors: Mapping[str, TfliteTensor]
    layers: tuple[Layer, ...]
    inputs: Mapping[str, Stored]
    outputs: Mapping[str, Stored]
    stored: Mapping[str, Stored]
