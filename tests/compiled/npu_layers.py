"""Random layers for systolic accelerators: many products in one program, each with a schedule of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bitwright.compiler.lower.templates.geometry import geometry_of
from bitwright.compiler.program.ops import Dot, Program, QConv, QGemm, QuantParams, Tensor
from bitwright.targets.generator import Check
from bitwright.targets.loader import load_profile
from bitwright.targets.npu.execution import Run, run_program
from bitwright.targets.npu.generator import compare
from bitwright.targets.npu.lowering import write_host
from bitwright.targets.npu.machine import Machine
from bitwright.targets.npu.problem import problem_of
from bitwright.targets.npu.programs import MODEL_PROGRAM, build_programs, write_sources
from bitwright.targets.npu.search import cycles_of
from bitwright.targets.npu.tiling import Tiling, grid_of, legal_tilings
from bitwright.targets.toolchain.interface import Interface, Port


@dataclass
class Layers:
    """A program of independent layers.

    Attributes:
        random: Where sizes, weights and inputs come from.
        weight_bits: Width of the weights.
    """

    random: np.random.Generator
    weight_bits: int = 8
    tensors: dict[str, Tensor] = field(default_factory=dict)
    steps: list[Dot] = field(default_factory=list)
    feeds: dict[str, np.ndarray] = field(default_factory=dict)

    def draw(self, low: int, high: int) -> int:
        return int(self.random.integers(low, high, endpoint=True))

    def tensor(self, name: str, shape: tuple[int, ...], largest: float) -> Tensor:
        """Add a tensor whose integers mean at most about ``largest``."""
        quant = QuantParams("int8", float(np.float32(largest / 128)), self.draw(-20, 20))
        self.tensors[name] = Tensor(name, shape, "int8", quant)
        return self.tensors[name]

    def add(
        self, kind: type[Dot], x: tuple[int, ...], y: tuple[int, ...], weight: tuple[int, ...], **more: object
    ) -> None:
        """Add a layer; its outputs use most of their range, and some of them are clipped."""
        number, limit = len(self.steps), 1 << (self.weight_bits - 1)
        self.tensor(f"x{number}", x, 1.0)
        depth = weight[0] if kind is QGemm else int(np.prod(weight[1:]))
        self.tensor(f"y{number}", y, 0.7 * depth**0.5)
        outputs = weight[1] if kind is QGemm else weight[0]
        self.steps.append(
            kind(
                name=f"layer{number}",
                inputs=(f"x{number}",),
                outputs=(f"y{number}",),
                nodes=(f"layer{number}",),
                weight=self.random.integers(-limit, limit, weight).astype(np.int8),
                weight_scale=(self.random.uniform(0.5, 1.5, outputs) / limit).astype(np.float32),
                bias=self.random.integers(-3000, 3000, outputs).astype(np.int32),
                lower=self.draw(-128, -10),
                upper=127,
                **more,
            )
        )
        self.feeds[f"x{number}"] = self.random.integers(-128, 128, x).astype(np.int8)

    def add_gemm(self) -> None:
        m, k, n = self.draw(1, 20), self.draw(1, 30), self.draw(1, 12)
        leading = (2, m) if self.draw(0, 1) else (m,)
        self.add(QGemm, (*leading, k), (*leading, n), (k, n))

    def add_conv(self) -> None:
        group = (1, 1, 2, 3)[self.draw(0, 3)]
        channels, outputs = group * self.draw(1, 5), group * self.draw(1, 6)
        kernel = self.draw(1, 3), self.draw(1, 3)
        strides, dilations = (self.draw(1, 2), self.draw(1, 2)), (self.draw(1, 2), self.draw(1, 2))
        pads = tuple(self.draw(0, 2) for _ in range(4))
        size = self.draw(6, 9), self.draw(6, 9)
        out = tuple(
            (s + pads[i] + pads[i + 2] - (k - 1) * d - 1) // t + 1
            for i, (s, k, d, t) in enumerate(zip(size, kernel, dilations, strides, strict=True))
        )
        batch = self.draw(1, 2)
        self.add(
            QConv,
            (batch, channels, *size),
            (batch, outputs, *out),
            (outputs, channels // group, *kernel),
            strides=strides,
            pads=pads,
            dilations=dilations,
            group=group,
        )

    def add_depthwise(self) -> None:
        channels = self.draw(2, 9)
        self.add(
            QConv,
            (1, channels, 7, 6),
            (1, channels, 7, 6),
            (channels, 1, 3, 3),
            pads=(1, 1, 1, 1),
            group=channels,
        )

    def program(self) -> Program:
        names = tuple(f"x{k}" for k in range(len(self.steps)))
        outputs = tuple(f"y{k}" for k in range(len(self.steps)))
        return Program(names, outputs, tuple(self.steps), self.tensors)

    def tilings(self, machine: Machine) -> dict[str, Tiling]:
        """Draw a legal schedule for every layer."""
        program, found = self.program(), {}
        for step in self.steps:
            legal = list(
                legal_tilings(grid_of(problem_of(geometry_of(step, program), machine), machine), machine)
            )
            found[step.name] = legal[self.draw(0, len(legal) - 1)]
        return found


def random_layers(seed: int, count: int, machine: Machine) -> Layers:
    """Return layers of every kind."""
    layers = Layers(np.random.default_rng(seed), machine.weight_bits)
    kinds = (layers.add_gemm, layers.add_conv, layers.add_depthwise, layers.add_conv)
    layers.add(QGemm, (1, 1), (1, 1), (1, 1))  # the smallest
    for number in range(count):
        kinds[number % len(kinds)]()
    return layers


def expected_cycles(layers: Layers, tilings: Mapping[str, Tiling], machine: Machine) -> tuple[int, ...]:
    """Return what the search's model says of every layer."""
    program = layers.program()
    return tuple(
        cycles_of(grid_of(problem_of(geometry_of(s, program), machine), machine), tilings[s.name], machine)
        for s in layers.steps
    )


def build(
    layers: Layers, tilings: Mapping[str, Tiling], machine: Machine, folder: Path, *, circuit: bool
) -> None:
    """Write and build the programs of some layers."""
    program = layers.program()
    write_sources(machine, folder)
    write_host(program, load_profile("npu-8x8"), machine, tilings, folder, "random layers */ \\")

    def ports(names: tuple[str, ...]) -> tuple[Port, ...]:
        return tuple(Port(n, "int8", program.tensor(n).shape) for n in names)

    Interface(ports(program.inputs), ports(program.outputs), {}).write(folder)
    build_programs(machine, folder, circuit=circuit)


def run(layers: Layers, folder: Path, which: str = MODEL_PROGRAM) -> tuple[Run, tuple[Check, ...]]:
    """Run one of the programs; return what it gave, and every kernel beside its reference."""
    found = run_program(folder, which, layers.feeds)
    return found, compare(found, layers.program())
