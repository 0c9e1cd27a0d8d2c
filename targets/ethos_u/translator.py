"""A TFLite graph while it is being made: where each tensor of the integer program lies, and what moves it.

ONNX images are channels first, the file's are channels last. No transposition is written that is not needed: a tensor
is remembered together with the order its axes are stored in, operators say which order they read, and only where that
is another one the elements are moved. A Transpose of the model is a change of what is remembered.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from bitwright.compiler.program.ops import Program, QuantParams
from bitwright.targets.ethos_u.tflite_graph import Layer, OptionValue, Stored, TfliteGraph, TfliteTensor

CHANNELS_LAST = (0, 2, 3, 1)
INTEGER_TYPE = "int8"
UNUSUAL = re.compile(r"[^A-Za-z0-9_.:/-]")
LONGEST_NAME = 200


class UnsupportedStepError(Exception):
    """A step has no form in the file; the message says why."""


class Translator:
    """Collects tensors and layers.

    Args:
        program: The integer program.
        inputs: Integer tensors that the host writes; the first reader decides the order they are stored in.
    """

    def __init__(self, program: Program, inputs: tuple[str, ...]) -> None:
        self.program = program
        self.tensors: dict[str, TfliteTensor] = {}
        self.layers: list[Layer] = []
        self.stored: dict[str, Stored] = {}
        self._waiting = set(inputs)
        self._moved: dict[tuple[str, tuple[int, ...], tuple[int, ...]], str] = {}
        self._step = ""

    def begin(self, step: str) -> None:
        """Let what is emitted from now on belong to ``step``."""
        self._step = step

    def quant(self, name: str) -> QuantParams:
        """Return the parameters of a tensor of the program.

        Raises:
            UnsupportedStepError: It is not int8.
        """
        quant = self.program.tensor(name).quant
        if quant is None or quant.dtype != INTEGER_TYPE:
            msg = f"'{name}' is not a quantized int8 tensor"
            raise UnsupportedStepError(msg)
        return quant

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the logical shape of a tensor of the program."""
        return self.program.tensor(name).shape

    # Where tensors lie.

    def where(self, name: str) -> Stored:
        """Return where a tensor of the program lies, in whatever order that is."""
        if name not in self.stored:
            shape = self.shape(name)
            self._place(name, shape, tuple(range(len(shape))))
        return self.stored[name]

    def read(self, name: str, order: tuple[int, ...] | None = None) -> str:
        """Return the file's tensor that holds a tensor of the program with its axes in ``order`` (or as it is)."""
        shape = self.shape(name)
        order = tuple(range(len(shape))) if order is None else order
        if name not in self.stored:
            self._place(name, shape, order)
        return self._arranged(name, Stored("", shape, order))

    def channels_last(self, name: str) -> str:
        """Return the file's tensor that holds an image channels last.

        Raises:
            UnsupportedStepError: It is no image.
        """
        if len(self.shape(name)) != len(CHANNELS_LAST):
            msg = f"'{name}' has {len(self.shape(name))} dimensions, not four"
            raise UnsupportedStepError(msg)
        return self.read(name, CHANNELS_LAST)

    def _place(self, name: str, shape: tuple[int, ...], order: tuple[int, ...]) -> None:
        """Make an input or a constant, in the order of its first reader."""
        constant = self.program.constants.get(name)
        assert constant is not None or name in self._waiting
        stored = Stored(self.fresh(name), shape, order)
        data = None if constant is None else stored.to_file(constant)
        self.add(stored.tensor, stored.shape, self.quant(name), data)
        self.stored[name] = stored

    def _arranged(self, name: str, wanted: Stored) -> str:
        known = self.stored[name]
        key = (name, wanted.view, wanted.order)
        if (known.view, known.order) == key[1:]:
            return known.tensor
        if key not in self._moved:
            self._moved[key] = self._move(name, known, wanted)
        return self._moved[key]

    def _move(self, name: str, known: Stored, wanted: Stored) -> str:
        if np.array_equal(_positions(known), _positions(wanted)):
            return self.reshape(known.tensor, wanted.shape, self.quant(name), name)
        if known.view == wanted.view:
            perm = tuple(known.order.index(axis) for axis in wanted.order)
            return self.transpose(known.tensor, perm, self.quant(name), name)
        rows = self._arranged(name, Stored("", known.view, tuple(range(len(known.view)))))
        same = self.reshape(rows, wanted.view, self.quant(name), name)
        if wanted.order == tuple(range(len(wanted.view))):
            return same
        return self.transpose(same, wanted.order, self.quant(name), name)

    # What is emitted.

    def fresh(self, stem: str) -> str:
        """Return a name that no tensor of the file has, of characters that Vela's tables hold unchanged."""
        stem = UNUSUAL.sub("_", stem)[:LONGEST_NAME] or "tensor"
        name, number = stem, 2
        while name in self.tensors:
            name, number = f"{stem}_{number}", number + 1
        return name

    def add(
        self, name: str, shape: tuple[int, ...], quant: QuantParams, data: np.ndarray | None = None
    ) -> str:
        """Add an activation or a constant activation; returns its name."""
        scale = np.array([quant.scale], np.float32)
        self.tensors[name] = TfliteTensor(name, shape, INTEGER_TYPE, scale, quant.zero_point, data=data)
        return name

    def constant(self, stem: str, data: np.ndarray, scale: np.ndarray | None = None, axis: int = 0) -> str:
        """Add a weight, a bias, a shape or a permutation; returns its name."""
        name = self.fresh(stem)
        scales = np.zeros(0, np.float32) if scale is None else scale.astype(np.float32)
        self.tensors[name] = TfliteTensor(name, data.shape, data.dtype.name, scales, 0, axis, data)
        return name

    def emit(
        self,
        operator: str,
        inputs: tuple[str, ...],
        output: str,
        options_type: str = "",
        options: Mapping[str, OptionValue] | None = None,
        version: int = 1,
    ) -> None:
        """Append a layer."""
        self.layers.append(
            Layer(operator, inputs, output, options_type, options or {}, version, step=self._step)
        )

    def result(
        self, name: str, order: tuple[int, ...] | None = None, view: tuple[int, ...] | None = None
    ) -> str:
        """Add the file's tensor of a result of the program; returns its name.

        Args:
            name: Tensor of the program.
            order: Axes of ``view`` in storage; as they are by default.
            view: Its logical shape by default.
        """
        view = self.shape(name) if view is None else view
        stored = Stored(self.fresh(name), view, tuple(range(len(view))) if order is None else order)
        self.stored[name] = stored
        return self.add(stored.tensor, stored.shape, self.quant(name))

    def reshape(self, source: str, shape: tuple[int, ...], quant: QuantParams, stem: str) -> str:
        """Emit a RESHAPE; returns the tensor it writes."""
        target = self.add(self.fresh(f"{stem}_reshaped"), shape, quant)
        sizes = self.constant(f"{target}_shape", np.array(shape, np.int32))
        # The sizes stand in the second operand; a fixed vector in the options is a list and not needed.
        self.emit("RESHAPE", (source, sizes), target)
        return target

    def transpose(self, source: str, perm: tuple[int, ...], quant: QuantParams, stem: str) -> str:
        """Emit a TRANSPOSE; returns the tensor it writes."""
        shape = tuple(self.tensors[source].shape[axis] for axis in perm)
        target = self.add(self.fresh(f"{stem}_transposed"), shape, quant)
        axes = self.constant(f"{target}_perm", np.array(perm, np.int32))
        self.emit("TRANSPOSE", (source, axes), target, "TransposeOptions", version=2)
        return target

    def graph(self, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> TfliteGraph:
        """Return what was collected.

        Args:
            inputs: Graph input -> integer tensor.
            outputs: Graph output -> integer tensor.
        """
        return TfliteGraph(
            dict(self.tensors),
            tuple(self.layers),
            {name: self.where(tensor) for name, tensor in inputs.items()},
            {name: self.where(tensor) for name, tensor in outputs.items()},
            dict(self.stored),
        )


def _positions(stored: Stored) -> np.ndarray:
    """Return the logical position of each stored element."""
    count = int(np.prod(stored.view, dtype=np.int64))
    positions: np.ndarray = np.arange(count).reshape(stored.view).transpose(stored.order).ravel()
    return positions
