"""From the integer program to the layers of a streaming network, and what stays on the host at both ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

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
    Step,
)
from bitwright.targets.fpga.engines.requantization import multiplier_bits
from bitwright.targets.fpga.layers import IMAGE_RANK, LayerMaker, refusal
from bitwright.targets.fpga.network import Layer
from bitwright.targets.schema import Profile


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
    maker = LayerMaker(program, multiplier_bits(profile), cut.aliases)
    layers = tuple(maker.layer(step) for step in cut.inside if not isinstance(step, Move))
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
            raise refusal(behind[0], "its result is used by the network again")
        if isinstance(step, FloatIsland | Dequantize | Quantize) or (isinstance(step, Move) and not computed):
            self._on_host(step, host_behind=bool(behind or computed))
            return
        if not isinstance(step, (QConv, QGemm, QAdd, QPool, QLut, QConcat, Move)):
            raise refusal(step, f"there is no circuit for {type(step).__name__}")
        if isinstance(step, Move):
            if step.kind != "reshape":
                raise refusal(step, f"there is no circuit for '{step.kind}'")
            source = self.aliases.get(step.inputs[0], step.inputs[0])
            if not _keeps_order(self.program.tensor(source).shape, self.program.tensor(step.output).shape):
                raise refusal(step, "the elements would travel in another order")
            self.aliases[step.output] = source
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


def _keeps_order(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Tell whether a reshape leaves a stream, channels last, as it is, or makes a whole image one vector."""
    image = len(before) == IMAGE_RANK and before[0] == 1
    channels, pixels = (before[1], prod(before[2:])) if image else (before[-1], prod(before[:-1]))
    if len(after) == IMAGE_RANK:
        return after == before or (pixels == 1 and after == (1, channels, 1, 1))
    return after[-1] == (channels * pixels if image else channels)


def _only(names: list[str], verb: str) -> str:
    if len(names) != 1:
        what = f"{len(names)} integer tensors {verb} the network: {', '.join(names) or 'none'}; a circuit has one"
        raise PerformanceGateError(what, fix="split the model, or quantize what stands between them")
    return names[0]
