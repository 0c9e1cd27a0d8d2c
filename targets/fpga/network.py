"""A streaming network: one circuit a layer, joined by valid/ready streams of 8-bit integers, channels last.

Two levels. A :class:`Layer` is a step of the integer program with its closed forms: which foldings are legal and how
many cycles a frame takes. Given a :class:`Folding` it becomes one or two :class:`Engine` records: instances of the
modules under ``rtl/`` with all parameters. A :class:`Network` holds the engines of a whole model with the converters,
forks and FIFOs between them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bitwright.compiler.errors import ProfileError

Integers: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, order=True)
class Folding:
    """How much of a layer is computed in one cycle.

    Attributes:
        pe: Outputs (channels) computed side by side.
        simd: Inputs of each of them multiplied in one cycle.
        dsp: Products in DSP blocks; otherwise in LUTs.
    """

    pe: int = 1
    simd: int = 1
    dsp: bool = False

    @property
    def lanes(self) -> int:
        """Multiply-accumulates a cycle."""
        return self.pe * self.simd


@dataclass(frozen=True, order=True)
class WeightCode:
    """How a weight is stored and multiplied.

    Attributes:
        kind: ``integer``: two's complement. ``ternary``: -1, 0, 1 in two bits. ``binary``: -1, 1 in one bit.
        bits: Stored bits of a weight.
    """

    kind: Literal["integer", "ternary", "binary"]
    bits: int

    @property
    def largest(self) -> int:
        """Largest magnitude of a weight."""
        return 1 << (self.bits - 1) if self.kind == "integer" else 1

    def __str__(self) -> str:
        """Return the word of reports, e.g. ``4``, ``ternary``."""
        return str(self.bits) if self.kind == "integer" else self.kind


TERNARY, BINARY = WeightCode("ternary", 2), WeightCode("binary", 1)


def narrowest_code(weight: np.ndarray) -> WeightCode:
    """Return the narrowest code that holds every weight exactly."""
    values = np.unique(weight).astype(np.int64)
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    if low >= -1 and high <= 1:
        return TERNARY if 0 in values else BINARY
    return WeightCode("integer", max((-low - 1).bit_length() if low < 0 else 0, high.bit_length()) + 1)


@dataclass(frozen=True)
class Stream:
    """A stream of one tensor, a frame after the other.

    Attributes:
        name: Prefix of its wires.
        tensor: The tensor of the integer program that it carries.
        positions: Pixels (or rows) of a frame.
        channels: Channels of a pixel.
        lanes: Elements that travel side by side; divides ``positions * channels``.
        bits: Bits of an element: 8, or those of accumulators.
    """

    name: str
    tensor: str
    positions: int
    channels: int
    lanes: int = 1
    bits: int = 8

    @property
    def elements(self) -> int:
        """Elements of a frame."""
        return self.positions * self.channels

    @property
    def beats(self) -> int:
        """Transfers of a frame."""
        return self.elements // self.lanes


@dataclass(frozen=True)
class Memory:
    """Content of a read-only memory.

    Attributes:
        width: Bits of a word.
        words: Words from address 0 up, each in ``[0, 2**width)``.
    """

    width: int
    words: tuple[int, ...]

    def hex_text(self) -> str:
        """Return the text that ``$readmemh`` reads."""
        digits = (self.width + 3) // 4
        return "".join(f"{word:0{digits}x}\n" for word in self.words)


# Made only when the file is written: allocators ask for many engines and write none.
Content: TypeAlias = Callable[[], Memory]


@dataclass(frozen=True, kw_only=True)
class Engine:
    """An instance of a module under ``rtl/``.

    Attributes:
        name: Verilog identifier of the instance.
        node: Label of the ONNX node that it computes (of the layer it serves, for converters and FIFOs).
        module: Name of the module.
        parameters: Parameters by name; cost models look at these. Names of memory files are not among them.
        cycles: Cycles of one frame, exact, if its neighbours never let it wait.
        capacity: Most input elements it holds that have not shown up in its output, for sizes of FIFOs.
        inputs: Names of streams it reads.
        outputs: Names of streams it writes.
        memories: Parameter that names the file -> content.
        step: Name of the program's step whose result its output is, if it is the last engine of the layer.
        note: What it does, for the comment in the top level.
    """

    name: str
    node: str
    module: str
    parameters: Mapping[str, int]
    cycles: int
    capacity: int = 0
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    memories: Mapping[str, Content] = field(default_factory=dict)
    step: str | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Layer(ABC):
    """A step of the program that becomes engines.

    Attributes:
        name: Name of the step; foldings are given by it.
        node: The ONNX node it came from.
        sources: Tensors it reads as streams.
        tensor: The tensor it writes.
        positions: Pixels it writes a frame.
        channels: Channels it writes.
        bits: Bits of what it writes.
    """

    name: str
    node: str
    sources: tuple[str, ...]
    tensor: str
    positions: int
    channels: int
    bits: int = 8

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a frame with constant weights."""
        return 0

    @property
    def weights(self) -> int:
        """Constant weights."""
        return 0

    @property
    def code(self) -> WeightCode | None:
        """How its weights are stored; None without weights."""
        return None

    @abstractmethod
    def legal_foldings(self) -> tuple[Folding, ...]:
        """Return every folding, the smallest first."""

    @abstractmethod
    def engines(self, folding: Folding, code: WeightCode | None = None) -> tuple[Engine, ...]:
        """Return its engines, in the order in which data passes them, not yet connected.

        Args:
            folding: A legal folding.
            code: Another code of the weights than the model's, to know what that would cost; the engines then hold
                no memories.
        """

    @abstractmethod
    def input_lanes(self, folding: Folding) -> int:
        """Return the elements it takes side by side."""

    @abstractmethod
    def output_lanes(self, folding: Folding) -> int:
        """Return the elements it writes side by side."""

    def cycles(self, folding: Folding) -> int:
        """Return the cycles of a frame: those of its slowest engine."""
        return max(engine.cycles for engine in self.engines(folding, self.code))

    def check(self, folding: Folding) -> Folding:
        """Return a folding if it is legal.

        Raises:
            ProfileError: It is not.
        """
        if folding not in self.legal_foldings():
            pairs = sorted({(f.pe, f.simd) for f in self.legal_foldings()})
            what = f"pe={folding.pe} simd={folding.simd} dsp={folding.dsp} is no folding of this layer"
            shown = ", ".join(f"{pe}x{simd}" for pe, simd in pairs[:24])
            raise ProfileError(what, where=f"layer '{self.name}'", fix=f"legal are pe x simd: {shown}")
        return folding


@dataclass(frozen=True)
class Network:
    """A whole model as a circuit.

    Attributes:
        engines: In the order of the stream.
        streams: Every stream by name.
        input: Stream that the host feeds.
        output: Stream that the host reads.
        layers: The layers it was made from.
        foldings: The folding of every layer.
    """

    engines: tuple[Engine, ...]
    streams: Mapping[str, Stream]
    input: str
    output: str
    layers: tuple[Layer, ...]
    foldings: Mapping[str, Folding]

    @cached_property
    def bottleneck(self) -> Engine:
        """The engine that takes longest."""
        return max(self.engines, key=lambda engine: engine.cycles)

    @property
    def interval(self) -> int:
        """Cycles between two frames: those of the slowest engine."""
        return self.bottleneck.cycles


def divisors(number: int) -> tuple[int, ...]:
    """Return the divisors of a positive number, the smallest first."""
    return tuple(d for d in range(1, number + 1) if number % d == 0)
