"""From the integer program to the layers of a streaming network, and what stays on the host at both ends."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from bitwright.compiler.errors import PerformanceGateError
from bitwright.compiler.program.ops import (
    Dequantize,
    Dot,
    FloatIsland,
    Move,
    Program,
    QAdd,
    QConcat,
    QConv,
    QGemm,
    QLut,
    QPool,
    Quantize,
    QuantParams,
    Step,
)
from bitwright.targets.fpga.engines.dot import RAW_BITS, DepthwiseLayer, MatrixVectorLayer
from bitwright.targets.fpga.engines.pointwise import AddLayer, ConcatLayer, TableLayer
from bitwright.targets.fpga.engines.pooling import GlobalAverageLayer, MaxPoolLayer
from bitwright.targets.fpga.engines.requantization import (
    Requantization,
    multiplier_bits,
    requantization,
    signed,
)
from bitwright.targets.fpga.engines.window import Window
from bitwright.targets.fpga.network import Integers, Layer
from bitwright.targets.fpga.reference import add_scales, average_multiplier, dot_multipliers
from bitwright.targets.schema import Profile

IMAGE_RANK = 4
LOWEST = -128


@dataclass(frozen=True)
class Circuit:
    """A program cut in three: before the circuit, the circuit, behind it.

    Attributes:
        before: Steps of the host up to the tensor that it sends.
        layers: The circuit, in topological order.
        after: Steps of the host from the tensor that it receives.
        source: The tensor that the host sends.
        result: The tensor that the host receives.
        aliases: Tensor -> the tensor whose stream carries it (reshapes).
    """

    before: tuple[Step, ...]
    layers: tuple[Layer, ...]
    after: tuple[Step, ...]
    source: str
    result: str
    aliases: dict[str, str]


def layers_of(program: Program, profile: Profile) -> tuple[Layer, ...]:
    """Return the layers of a program's circuit; errors as :func:`recognise`."""
    return recognise(program, profile).layers


def recognise(program: Program, profile: Profile) -> Circuit:
    """Cut a program into host and circuit, and make the circuit's layers.

    Raises:
        PerformanceGateError: A step inside the network has no circuit; the message names it.
        ProfileError: The profile's requantization is not that of the circuits.
    """
    cut = _Cut(program)
    for step in program.steps:
        cut.place(step)
    cut.check()
    reader = _Reader(program, multiplier_bits(profile), cut.aliases)
    layers = tuple(reader.layer(step) for step in cut.inside if not isinstance(step, Move))
    return Circuit(
        tuple(cut.before), layers, tuple(cut.after), cut.source(), cut.result(layers), dict(cut.aliases)
    )


@dataclass
class _Cut:
    """Where every step of a program is computed."""

    program: Program
    before: list[Step] = field(default_factory=list)
    inside: list[Step] = field(default_factory=list)
    after: list[Step] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    on_host: dict[str, Step | None] = field(default_factory=dict)
    streamed: dict[str, Step] = field(default_factory=dict)
    received: dict[str, Step] = field(default_factory=dict)

    def place(self, step: Step) -> None:
        """Decide where a step is computed; steps come in topological order."""
        behind = [self.received[name] for name in step.inputs if name in self.received]
        computed = [name for name in step.inputs if name in self.streamed]
        if behind and isinstance(step, (Dot, QAdd, QPool, QLut, QConcat, Quantize)):
            raise _refusal(behind[0], "its result is used by the network again")
        if isinstance(step, FloatIsland | Dequantize | Quantize) or (isinstance(step, Move) and not computed):
            self._on_host(step, host_behind=bool(behind or computed))
            return
        if not isinstance(step, (QConv, QGemm, QAdd, QPool, QLut, QConcat, Move)):
            raise _refusal(step, f"there is no circuit for {type(step).__name__}")
        if isinstance(step, Move):
            if step.kind != "reshape":
                raise _refusal(step, f"there is no circuit for '{step.kind}'")
            self.aliases[step.output] = self.aliases.get(step.inputs[0], step.inputs[0])
        self.inside.append(step)
        self.streamed[step.output] = step

    def _on_host(self, step: Step, *, host_behind: bool) -> None:
        if host_behind:
            self.after.append(step)
            self.received |= dict.fromkeys(step.outputs, step)
        else:
            self.before.append(step)

    def check(self) -> None:
        """Refuse circuits that nothing can be said about."""
        if not any(isinstance(step, Dot) for step in self.inside):
            what = "no layer of the model became integers, so there is no circuit"
            notes = "; ".join(self.program.notes[:3])
            raise PerformanceGateError(what, fix=notes or "quantize convolutions and matrix products")
        stray = [name for step in self.inside for name in step.inputs if name in self.program.constants]
        if stray:
            what = "a constant operand of a step between streams has no circuit"
            raise PerformanceGateError(what, where=f"tensor '{stray[0]}'")

    def source(self) -> str:
        """Return the only tensor that the host sends."""
        sent = [n for s in self.inside for n in s.inputs if n not in self.streamed]
        return _only(list(dict.fromkeys(sent)), "enter")

    def result(self, layers: Sequence[Layer]) -> str:
        """Return the only tensor that the host receives, under the name of its stream."""
        written = {layer.tensor for layer in layers}
        wanted = [*(n for s in self.after for n in s.inputs), *self.program.outputs]
        streams = [self.aliases.get(n, n) for n in wanted]
        return _only([n for n in dict.fromkeys(streams) if n in written], "leave")


def _only(names: list[str], verb: str) -> str:
    if len(names) != 1:
        what = f"{len(names)} integer tensors {verb} the network: {', '.join(names) or 'none'}; a circuit has one"
        raise PerformanceGateError(what, fix="split the model, or quantize what stands between them")
    return names[0]


def _refusal(step: Step, why: str) -> PerformanceGateError:
    nodes = ", ".join(f"'{name}'" for name in step.nodes[:6] or (step.name,))
    what = f"the step cannot be part of the circuit: {why}"
    fix = "quantize it, move it to an end of the model, or choose another target"
    return PerformanceGateError(what, where=f"node {nodes}", fix=fix)


@dataclass(frozen=True)
class _Reader:
    """Makes layers of steps."""

    program: Program
    bits: int
    aliases: dict[str, str]
    names: dict[str, int] = field(default_factory=dict)

    def layer(self, step: Step) -> Layer:
        """Return the layer of a step."""
        makers: dict[type, Callable[..., Layer]] = {
            QConv: self._conv,
            QGemm: self._gemm,
            QAdd: self._add,
            QPool: self._pool,
            QLut: self._table,
            QConcat: self._concat,
        }
        return makers[type(step)](step)

    def _quant(self, name: str) -> QuantParams:
        quant = self.program.tensor(name).quant
        assert quant is not None
        return quant

    def _image(self, name: str) -> tuple[int, int, int]:
        """Return (C, H, W) of a stream; rows of vectors are an image of one column."""
        shape = self.program.tensor(self.aliases.get(name, name)).shape
        if len(shape) == IMAGE_RANK and shape[0] == 1:
            return shape[1], shape[2], shape[3]
        return shape[-1], int(np.prod(shape[:-1], dtype=np.int64)), 1

    def _common(self, step: Step) -> dict[str, object]:
        image = self._image(step.output)
        return {
            "name": step.name,
            "node": step.name,
            "sources": tuple(self.aliases.get(name, name) for name in step.inputs),
            "tensor": step.output,
            "positions": image[1] * image[2],
            "channels": image[0],
        }

    def _requantization(self, step: QConv | QGemm, weight: Integers) -> tuple[Requantization, int]:
        """Return what follows the sums (zero point of the input in the bias), and bits of the result."""
        x, output = self._quant(step.inputs[0]), self.program.tensor(step.output)
        bias = np.zeros(len(weight), np.int64) if step.bias is None else step.bias.astype(np.int64)
        bias = bias - signed(x).zero_point * weight.sum(axis=1)
        if output.quant is None:
            return Requantization(bias, None, signed(QuantParams("int8", 1.0, 0))), RAW_BITS
        real = np.broadcast_to(dot_multipliers(step, x, output.quant), bias.shape)
        bounds = signed(output.quant, step.lower, step.upper)
        return requantization(bias, real, bounds, self.bits), 8

    def _window(self, step: QConv | QPool, fill: int) -> Window:
        channels, height, width = self._image(step.inputs[0])
        kernel = step.kernel if isinstance(step, QPool) else (step.weight.shape[2], step.weight.shape[3])
        output = self.program.tensor(step.output).shape
        if tuple(step.dilations) != (1, 1):
            raise _refusal(step, "windows have no dilation")
        if any(pad >= size for pad, size in zip(step.pads, (*kernel, *kernel), strict=True)):
            raise _refusal(step, "the padding is as large as the kernel")
        return Window(
            channels,
            (height, width),
            (kernel[0], kernel[1]),
            step.strides,
            step.pads,
            (output[2], output[3]),
            fill,
        )

    def _conv(self, step: QConv) -> Layer:
        x = signed(self._quant(step.inputs[0]))
        window = self._window(step, x.zero_point)
        outputs, per_group = step.weight.shape[:2]
        if step.group == outputs == window.channels and per_group == 1:
            weight = step.weight.reshape(outputs, -1).astype(np.int64)
            requantizing, bits = self._requantization(step, weight)
            return DepthwiseLayer(
                **self._common(step), weight=weight, requantization=requantizing, window=window, bits=bits
            )  # type: ignore[arg-type]
        if step.group != 1:
            raise _refusal(step, f"convolutions in {step.group} groups have no circuit (1, or depthwise)")
        weight = step.weight.transpose(0, 2, 3, 1).reshape(outputs, -1).astype(np.int64)
        requantizing, bits = self._requantization(step, weight)
        return MatrixVectorLayer(
            **self._common(step),
            weight=weight,
            requantization=requantizing,
            window=None if window.trivial else window,
            inner=window.channels,
            bits=bits,
        )  # type: ignore[arg-type]

    def _gemm(self, step: QGemm) -> Layer:
        weight = step.weight.T.astype(np.int64)
        channels, height, width = self._image(step.inputs[0])
        if channels != weight.shape[1]:  # a flattened image: the stream has its channels last
            weight = weight.reshape(len(weight), channels, height, width).transpose(0, 2, 3, 1)
            weight = weight.reshape(len(weight), -1)
        requantizing, bits = self._requantization(step, weight)
        return MatrixVectorLayer(
            **self._common(step),
            weight=weight,
            requantization=requantizing,
            inner=weight.shape[1],
            bits=bits,
        )  # type: ignore[arg-type]

    def _add(self, step: QAdd) -> Layer:
        if self._image(step.inputs[0]) != self._image(step.inputs[1]):
            raise _refusal(step, "the operands of a sum have different shapes")
        a, b, y = (self._quant(name) for name in (*step.inputs, step.output))
        scales = add_scales(a, b, y, self.bits)
        zeros = signed(a).zero_point, signed(b).zero_point
        offset = -sum(m * z for m, z in zip(scales.multipliers, zeros, strict=True))
        return AddLayer(
            **self._common(step),
            multipliers=scales.multipliers,
            shift=scales.shift,
            offset=offset,
            output=signed(y, step.lower, step.upper),
        )  # type: ignore[arg-type]

    def _pool(self, step: QPool) -> Layer:
        x, y = (self._quant(name) for name in (step.inputs[0], step.output))
        channels = self._image(step.inputs[0])[0]
        if step.kind == "max":
            return MaxPoolLayer(**self._common(step), window=self._window(step, LOWEST))  # type: ignore[arg-type]
        window = self._window(step, signed(x).zero_point)
        if any(step.pads) and not step.count_include_pad:
            raise _refusal(step, "an average that leaves out padding divides by another number at the border")
        bias = np.full(channels, -signed(x).zero_point * window.taps, np.int64)
        by = np.broadcast_to(average_multiplier(step, x, y), (channels,))
        requantizing = requantization(bias, by, signed(y), self.bits)
        if window.whole:
            return GlobalAverageLayer(**self._common(step), pixels=window.taps, requantization=requantizing)  # type: ignore[arg-type]
        weight = np.ones((channels, window.taps), np.int64)
        return DepthwiseLayer(**self._common(step), weight=weight, requantization=requantizing, window=window)  # type: ignore[arg-type]

    def _table(self, step: QLut) -> Layer:
        table = step.table.astype(np.int64) - signed(self._quant(step.output)).offset
        return TableLayer(**self._common(step), table=table, function=step.function)  # type: ignore[arg-type]

    def _concat(self, step: QConcat) -> Layer:
        shape = self.program.tensor(step.inputs[0]).shape
        axis = step.axis % len(shape)
        parts = tuple(self._image(name)[0] for name in step.inputs)
        if len(parts) != 2 or axis != (1 if len(shape) == IMAGE_RANK else len(shape) - 1):
            raise _refusal(step, "two streams are joined along their channels, and nothing else")
        return ConcatLayer(**self._common(step), parts=(parts[0], parts[1]))  # type: ignore[arg-type]


# Words that no instance may be called; see IEEE 1364-2005, annex B.
KEYWORDS = """
    always and assign automatic begin buf case casex casez cell config deassign default defparam design disable edge
    else end endcase endconfig endfunction endgenerate endmodule endprimitive endspecify endtable endtask event for
    force forever fork function generate genvar if ifnone incdir include initial inout input instance integer join
    large liblist library localparam macromodule medium module nand negedge nmos nor not notif0 notif1 or output
    parameter pmos posedge primitive pull0 pull1 pulldown pullup rcmos real realtime reg release repeat rnmos rpmos
    rtran scalared showcancelled signed small specify specparam strong0 strong1 supply0 supply1 table task time tran
    tri tri0 tri1 triand trior trireg unsigned use vectored wait wand weak0 weak1 while wire wor xnor xor
"""
RESERVED = frozenset(KEYWORDS.split())
LONGEST_NAME = 60


def identifier(name: str) -> str:
    """Return a Verilog identifier made of a name."""
    word = re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_")[:LONGEST_NAME] or "layer"
    return word if word[0].isalpha() and word not in RESERVED else f"n_{word}"
