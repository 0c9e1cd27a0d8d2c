"""Dot products with constant weights: matrix-vector engines (Gemm, convolution) and depthwise engines."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np

from bitwright.targets.fpga.engines.requantization import Requantization, bits_for
from bitwright.targets.fpga.engines.window import Window
from bitwright.targets.fpga.network import (
    Content,
    Engine,
    Folding,
    Integers,
    Layer,
    Memory,
    WeightCode,
    divisors,
    narrowest_code,
)

MOST_LANES = 2048
KINDS = {"integer": 0, "ternary": 1, "binary": 2}
RAW_BITS = 32


@dataclass(frozen=True, kw_only=True)
class DotLayer(Layer):
    """What matrix-vector and depthwise layers share.

    Attributes:
        weight: Integers [outputs, reduction], the reduction in the order of the stream: taps, then channels.
        requantization: What follows the accumulators.
        window: The sliding window in front, or None.
        input_bits: Of the integers it multiplies.
    """

    weight: Integers = field(repr=False)
    requantization: Requantization = field(repr=False)
    window: Window | None = None
    input_bits: int = 8

    @cached_property
    def code(self) -> WeightCode:
        """The narrowest code that holds the weights."""
        return narrowest_code(self.weight)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a frame."""
        return self.positions * self.weight.size

    @property
    def weights(self) -> int:
        """Number of weights."""
        return int(self.weight.size)

    @property
    def raw(self) -> bool:
        """Whether accumulators leave as they are."""
        return self.requantization.by is None

    def accumulator_bits(self, code: WeightCode | None = None) -> int:
        """Return the bits that hold every sum of these weights, or of weights as large as ``code`` allows."""
        high, low = self._extremes
        scale = 1.0 if code is None else code.largest / self.code.largest
        return bits_for(int(np.floor(low * min(scale, 1.0))), int(np.ceil(high * min(scale, 1.0))))

    @cached_property
    def _extremes(self) -> tuple[int, int]:
        up, down = self.weight.clip(min=0).sum(axis=1), self.weight.clip(max=0).sum(axis=1)
        bias = self.requantization.bias
        half = 1 << (self.input_bits - 1)
        largest, smallest = (half - 1) * up - half * down, (half - 1) * down - half * up
        return (
            int(max(0, largest.max(), (largest + bias).max(), bias.max())),
            int(min(0, smallest.min(), (smallest + bias).min(), bias.min())),
        )

    def _arithmetic(self, folding: Folding, code: WeightCode, beats: int) -> dict[str, int]:
        """Return the parameters that both modules have; ``beats`` of input are accumulated."""
        lanes = drain_lanes(folding.pe, beats)
        simd = folding.simd
        return {
            "PE": folding.pe,
            "ACT_BITS": self.input_bits,
            "WEIGHT_BITS": code.bits,
            "KIND": KINDS[code.kind],
            "DSP": int(folding.dsp),
            "LANES": lanes,
            "OUT_BITS": self.bits,
            "FIFO": drain_fifo(folding.pe // lanes, beats, simd),
            **self.requantization.parameters(self.accumulator_bits(code)),
        }

    def _parameter_memory(self, folding: Folding, beats: int) -> Content:
        return lambda: self.requantization.memory(self.accumulator_bits(), drain_lanes(folding.pe, beats))


def drain_lanes(pe: int, beats: int) -> int:
    """Return how many of ``pe`` results have to leave side by side if new ones come every ``beats`` cycles."""
    return next(lanes for lanes in divisors(pe) if pe // lanes <= beats)


def drain_fifo(drained: int, beats: int, simd: int) -> int:
    """Return the depth of the output FIFO: what is in the pipeline when every fold's end has room."""
    levels = (simd - 1).bit_length()
    latency = 18 + (levels + 1) // 2
    folds = -(-(latency + drained) // beats) + 1
    return 1 << max(2, (folds * drained - 1).bit_length())


def packed(rows: Integers, code: WeightCode) -> Memory:
    """Return weights as words: ``rows`` [words, weights of a word], the first weight in the lowest bits."""
    bits = code.bits
    fields = (rows < 0).astype(np.int64) if code.kind == "binary" else rows & ((1 << bits) - 1)
    columns = (fields[..., None] >> np.arange(bits)) & 1
    flat = columns.reshape(len(rows), -1).astype(np.uint8)
    octets = np.packbits(flat, axis=1, bitorder="little")
    return Memory(flat.shape[1], tuple(int.from_bytes(row.tobytes(), "little") for row in octets))


@lru_cache(maxsize=4096)
def _pairs(outputs: int, inputs: int) -> tuple[tuple[int, int], ...]:
    found = [(pe, simd) for pe in divisors(outputs) for simd in divisors(inputs) if pe * simd <= MOST_LANES]
    return tuple(sorted(found, key=lambda pair: (pair[0] * pair[1], pair)))


@dataclass(frozen=True, kw_only=True)
class MatrixVectorLayer(DotLayer):
    """Gemm, or a convolution behind its sliding window: ``positions`` vectors times one matrix.

    A cycle multiplies ``simd`` inputs with the weights of ``pe`` outputs.

    Attributes:
        inner: Neighbours in the stream that may travel side by side: channels of a pixel, or the whole vector.
    """

    inner: int

    @property
    def outputs(self) -> int:
        """Rows of the matrix."""
        return int(self.weight.shape[0])

    @property
    def reduction(self) -> int:
        """Columns of the matrix."""
        return int(self.weight.shape[1])

    def legal_foldings(self) -> tuple[Folding, ...]:
        """Return all (pe, simd) that divide the matrix, in LUTs and in DSP blocks."""
        pairs = _pairs(self.outputs, self.inner)
        return tuple(Folding(pe, simd, dsp) for pe, simd in pairs for dsp in (False, True))

    def cycles(self, folding: Folding) -> int:
        """Return ``positions * outputs / pe * reduction / simd``, or the window's cycles if those are more."""
        own = self.positions * (self.outputs // folding.pe) * (self.reduction // folding.simd)
        return own if self.window is None else max(own, self.window.cycles(folding.simd))

    def input_lanes(self, folding: Folding) -> int:
        """Return ``simd``."""
        return folding.simd

    def output_lanes(self, folding: Folding) -> int:
        """Return how many results leave side by side."""
        return drain_lanes(folding.pe, self.reduction // folding.simd)

    def engines(self, folding: Folding, code: WeightCode | None = None) -> tuple[Engine, ...]:
        """Return the sliding window, if there is one, and the matrix-vector engine."""
        beats = self.reduction // folding.simd
        folds = self.outputs // folding.pe
        own = Engine(
            name=self.name,
            node=self.node,
            module="matrix_vector",
            parameters={
                "IN": self.reduction,
                "OUT": self.outputs,
                "SIMD": folding.simd,
                **self._arithmetic(folding, code or self.code, beats),
            },
            cycles=self.positions * folds * beats,
            capacity=self.reduction + 4 * folding.simd,
            memories={} if code not in (None, self.code) else self._memories(folding, beats),
            step=self.name,
            note=f"{self.outputs} x {self.reduction} matrix, {self.positions} vectors a frame",
        )
        if self.window is None:
            return (own,)
        return self.window.engine(self.name, self.node, folding.simd, taps_inside=False), own

    def _memories(self, folding: Folding, beats: int) -> dict[str, Content]:
        def weights() -> Memory:
            folds = self.outputs // folding.pe
            blocks = self.weight.reshape(folds, folding.pe, beats, folding.simd)
            return packed(blocks.transpose(0, 2, 1, 3).reshape(folds * beats, -1), self.code)

        return {"WEIGHT_FILE": weights, "PARAMETER_FILE": self._parameter_memory(folding, beats)}


@dataclass(frozen=True, kw_only=True)
class DepthwiseLayer(DotLayer):
    """Depthwise convolution, and average pooling as one with equal weights: every channel has a filter of its own."""

    window: Window

    @property
    def taps(self) -> int:
        """Weights of a channel."""
        return int(self.weight.shape[1])

    def legal_foldings(self) -> tuple[Folding, ...]:
        """Return every number of channels side by side, in LUTs and in DSP blocks."""
        return tuple(Folding(pe, 1, dsp) for pe in divisors(self.channels) for dsp in (False, True))

    def cycles(self, folding: Folding) -> int:
        """Return ``positions * channels / pe * taps``, or the window's cycles if those are more."""
        own = self.positions * (self.channels // folding.pe) * self.taps
        return max(own, self.window.cycles(folding.pe))

    def input_lanes(self, folding: Folding) -> int:
        """Return ``pe``."""
        return folding.pe

    def output_lanes(self, folding: Folding) -> int:
        """Return how many results leave side by side."""
        return drain_lanes(folding.pe, self.taps)

    def engines(self, folding: Folding, code: WeightCode | None = None) -> tuple[Engine, ...]:
        """Return the sliding window and the depthwise engine."""
        groups = self.channels // folding.pe
        own = Engine(
            name=self.name,
            node=self.node,
            module="depthwise",
            parameters={
                "CHANNELS": self.channels,
                "TAPS": self.taps,
                **self._arithmetic(folding, code or self.code, self.taps),
            },
            cycles=self.positions * groups * self.taps,
            capacity=(self.taps + 4) * folding.pe,
            memories={} if code not in (None, self.code) else self._memories(folding),
            step=self.name,
            note=f"{self.channels} filters of {self.taps} weights, {self.positions} pixels a frame",
        )
        return self.window.engine(self.name, self.node, folding.pe, taps_inside=True), own

    def _memories(self, folding: Folding) -> dict[str, Content]:
        def weights() -> Memory:
            groups = self.channels // folding.pe
            blocks = self.weight.reshape(groups, folding.pe, self.taps)
            return packed(blocks.transpose(0, 2, 1).reshape(groups * self.taps, -1), self.code)

        return {"WEIGHT_FILE": weights, "PARAMETER_FILE": self._parameter_memory(folding, self.taps)}
