"""What the host computes around a circuit: floats to integers before it, integers to the model's outputs behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bitwright.compiler.interpret.fma import fma
from bitwright.compiler.interpret.run import FloatRunner, run_step
from bitwright.compiler.program.ops import Dot, Move, Program, QConv, QGemm, Step
from bitwright.targets.fpga.recognise import Circuit
from bitwright.targets.fpga.reference import accumulators, run_fixed_step


@dataclass(frozen=True)
class Host:
    """A program around its circuit.

    Attributes:
        program: The integer program.
        circuit: Its parts.
        bits: Bits of the circuit's multipliers.
    """

    program: Program
    circuit: Circuit
    bits: int

    def send(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the integers that the circuit is fed with, in the program's shape."""
        values = dict(self.program.constants) | dict(feeds)
        return np.asarray(self._run(self.circuit.before, values, None)[self.circuit.source])

    def receive(
        self, result: np.ndarray, feeds: Mapping[str, np.ndarray], runner: FloatRunner | None = None
    ) -> dict[str, np.ndarray]:
        """Return the model's outputs.

        Args:
            result: What the circuit computed: integers of the output's type, or accumulators (int64).
            feeds: The model's inputs, for steps that read them, too.
            runner: Executes float islands.
        """
        values = dict(self.program.constants) | dict(feeds)
        values |= {self.circuit.result: self._finished(result)}
        for alias, name in self.circuit.aliases.items():
            if name == self.circuit.result:
                values[alias] = values[name].reshape(self.program.tensor(alias).shape)
        values = self._run(self.circuit.after, values, runner)
        return {name: values[name] for name in self.program.outputs}

    def reference(self, source: np.ndarray) -> dict[str, np.ndarray]:
        """Return every tensor of the circuit as the integer reference computes it; accumulators as int64."""
        values: dict[str, np.ndarray] = {self.circuit.source: source}
        for step in self.inside():
            values[step.output] = self.expected(step, [values[name] for name in step.inputs])
        return values

    def inside(self) -> list[Step]:
        """Return the steps of the circuit, reshapes included."""
        names = {id(step) for step in (*self.circuit.before, *self.circuit.after)}
        return [step for step in self.program.steps if id(step) not in names]

    def expected(self, step: Step, inputs: Sequence[np.ndarray]) -> np.ndarray:
        """Return what one step of the circuit computes."""
        shape = self.program.tensor(step.output).shape
        if isinstance(step, Move):
            return inputs[0].reshape(shape)
        if isinstance(step, QGemm | QConv) and self.program.tensor(step.output).quant is None:
            return accumulators(step, self.program, inputs[0]).reshape(shape)
        return run_fixed_step(step, self.program, tuple(inputs), self.bits)

    def _finished(self, result: np.ndarray) -> np.ndarray:
        """Scale accumulators as the program says, in float."""
        step = next(step for step in self.program.steps if self.circuit.result in step.outputs)
        if self.program.tensor(self.circuit.result).quant is not None:
            return result
        assert isinstance(step, Dot)
        quant = self.program.tensor(step.inputs[0]).quant
        assert quant is not None
        axis = 1 if isinstance(step, QConv) else result.ndim - 1
        shape = [-1 if d == axis else 1 for d in range(result.ndim)]
        factor = (np.float32(quant.scale) * step.weight_scale.astype(np.float32)).reshape(shape)
        bias = np.zeros(1, np.float32) if step.float_bias is None else step.float_bias.reshape(shape)
        y = fma(result.astype(np.float32), factor, bias)
        return np.asarray(np.maximum(y, np.float32(0)) if step.relu else y, np.float32)

    def _run(
        self, steps: Sequence[Step], values: dict[str, np.ndarray], runner: FloatRunner | None
    ) -> dict[str, np.ndarray]:
        for step in steps:
            inputs = tuple(values[name] for name in step.inputs)
            values |= zip(
                step.outputs, run_step(step, self.program, inputs, float_runner=runner), strict=True
            )
        return values
