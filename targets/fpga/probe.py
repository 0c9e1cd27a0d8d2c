"""``targets probe`` for a circuit: engines of many shapes are synthesized and the cost table is fitted to them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import reduce
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from bitwright.compiler.interpret.fixed_point import fixed_point
from bitwright.targets.fpga.cells import Cells, Series
from bitwright.targets.fpga.cost_model import cells_of, cost_table, mapped, parts_of
from bitwright.targets.fpga.cost_table import CostTable, table_text
from bitwright.targets.fpga.engines.dot import DepthwiseLayer, MatrixVectorLayer
from bitwright.targets.fpga.engines.pointwise import TableLayer
from bitwright.targets.fpga.engines.pooling import GlobalAverageLayer
from bitwright.targets.fpga.engines.requantization import Requantization, Signed
from bitwright.targets.fpga.engines.window import Window
from bitwright.targets.fpga.network import BINARY, TERNARY, Engine, Folding, WeightCode
from bitwright.targets.fpga.standalone import TOP, write_standalone
from bitwright.targets.fpga.synthesis import Synthesizer
from bitwright.targets.fpga.yosys import yosys_version

CODES = (*(WeightCode("integer", bits) for bits in (8, 6, 5, 4, 3, 2)), TERNARY, BINARY)
# Engines weigh in the fit as if they had at least this many cells more: small ones are mostly fixed parts.
DAMPING = 100.0
# How much a coefficient that is off by its own size counts against a relative error of one engine.
PULL = 0.05
SMALLEST = 5e-4
OUTPUT = Signed(-128, -128, 127, 0)
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Probed:
    """An engine and what it took.

    Attributes:
        engine: The engine.
        cells: Synthesized.
    """

    engine: Engine
    cells: Cells


def weights(code: WeightCode, shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.int64]:
    """Return random weights that need exactly a code."""
    if code.kind == "binary":
        return rng.integers(0, 2, shape) * 2 - 1
    if code.kind == "ternary":
        return rng.integers(-1, 2, shape)
    found = rng.integers(-(1 << (code.bits - 1)), 1 << (code.bits - 1), shape)
    found.flat[0] = -(1 << (code.bits - 1))
    return found


def requantization(channels: int, rng: np.random.Generator, *, spread: int = 3) -> Requantization:
    """Return random parameters of ``channels`` requantizations whose shifts differ by up to ``spread``."""
    real = 2.0 ** -rng.uniform(6, 6 + spread, channels)
    return Requantization(rng.integers(-500, 500, channels), fixed_point(real, 16), OUTPUT)


def matrix_vector(
    code: WeightCode,
    folding: Folding,
    outputs: int,
    inputs: int,
    *,
    spread: int = 3,
    seed: int = 0,
    input_bits: int = 8,
) -> Engine:
    """Return a matrix-vector engine with random weights, for inputs of so many bits."""
    rng = np.random.default_rng([seed, outputs, inputs, folding.pe, folding.simd, code.bits])
    layer = MatrixVectorLayer(
        name="probe",
        node="probe",
        sources=("x",),
        tensor="y",
        positions=1,
        channels=outputs,
        weight=weights(code, (outputs, inputs), rng),
        requantization=requantization(outputs, rng, spread=spread),
        inner=inputs,
        input_bits=input_bits,
    )
    return layer.engines(folding)[-1]


def windowed(window: Window, pe: int, code: WeightCode, *, dsp: bool = False) -> tuple[Engine, ...]:
    """Return a sliding window and the depthwise engine behind it, with random weights."""
    rng = np.random.default_rng([window.channels, pe, code.bits])
    layer = DepthwiseLayer(
        name="probe",
        node="probe",
        sources=("x",),
        tensor="y",
        positions=window.output[0] * window.output[1],
        channels=window.channels,
        weight=weights(code, (window.channels, window.taps), rng),
        requantization=requantization(window.channels, rng),
        window=window,
    )
    return layer.engines(Folding(pe, 1, dsp))


def square(channels: int, side: int, kernel: int = 3, stride: int = 1) -> Window:
    """Return a window over a square image, padded so that a stride of one keeps the size."""
    pad = kernel // 2
    out = (side + 2 * pad - kernel) // stride + 1
    return Window(channels, (side, side), (kernel, kernel), (stride, stride), (pad,) * 4, (out, out), -128)


def _dot_engines() -> Iterator[Engine]:
    for code in CODES:
        yield matrix_vector(code, Folding(1, 4), 16, 64)
        yield matrix_vector(code, Folding(4, 4), 32, 144)
        yield matrix_vector(code, Folding(2, 9), 16, 288, spread=1)
    for code in (CODES[0], CODES[3], CODES[4], TERNARY):
        yield matrix_vector(code, Folding(8, 2), 64, 64, spread=5)
        yield matrix_vector(code, Folding(1, 16), 64, 640)
        yield matrix_vector(code, Folding(1, 1), 12, 32)
    for folding in (Folding(4, 4, True), Folding(1, 8, True), Folding(8, 1, True), Folding(2, 16, True)):
        yield matrix_vector(CODES[0], folding, 64, 288)
        yield matrix_vector(CODES[3], folding, 64, 64, spread=1)


def _window_engines() -> Iterator[Engine]:
    yield from windowed(square(16, 32), 1, CODES[0])
    yield from windowed(square(16, 32), 4, CODES[3])
    yield from windowed(square(64, 8), 16, CODES[4])
    yield from windowed(square(32, 16, 3, 2), 8, TERNARY)
    yield from windowed(square(64, 25, 3), 2, CODES[0], dsp=True)
    yield windowed(square(3, 32), 3, CODES[2])[0]


def _engine(module: str, **parameters: int) -> Engine:
    return Engine(name="probe", node="probe", module=module, parameters=parameters, cycles=1)


def _stream_engines() -> Iterator[Engine]:
    scales = {
        "MULT_A": 98301,
        "MULT_B": 45677,
        "SHIFT": 17,
        "OFFSET": 123456,
        "ZERO": -128,
        "LOW": -128,
        "HIGH": 127,
    }
    for lanes in (1, 4, 16):
        yield _engine("stream_add", LANES=lanes, **scales)
        yield _engine("pool_maximum", LANES=lanes, TAPS=4)
        yield _engine("stream_concat", LANES=lanes, FIRST=8, SECOND=4)
        average = GlobalAverageLayer(
            name="probe",
            node="probe",
            sources=("x",),
            tensor="y",
            positions=1,
            channels=64,
            pixels=64,
            requantization=Requantization(np.array([512]), fixed_point([0.013], 16), OUTPUT),
        )
        yield from average.engines(Folding(lanes))
    for width, ratio in ((8, 4), (32, 3), (64, 8)):
        yield _engine("stream_widen", WIDTH=width, RATIO=ratio)
        yield _engine("stream_narrow", WIDTH=width, RATIO=ratio)
    for width, depth in ((8, 16), (32, 32), (32, 600), (128, 512)):
        yield _engine("stream_fifo", WIDTH=width, DEPTH=depth)
    yield _engine("stream_fork", WIDTH=32, COUNT=2)
    table = np.random.default_rng(0).integers(-128, 128, 256)
    yield from TableLayer(
        name="probe",
        node="probe",
        sources=("x",),
        tensor="y",
        positions=1,
        channels=2,
        table=table,
        function="random",
    ).engines(Folding(2))


def probed_engines() -> list[Engine]:
    """Return the engines that a table is fitted to."""
    return [*_dot_engines(), *_window_engines(), *_stream_engines()]


def measure(engines: Sequence[Engine], synthesizer: Synthesizer, progress: Progress) -> list[Probed]:
    """Synthesize engines one by one."""
    found = []
    for done, engine in enumerate(engines):
        progress(done, len(engines), "engines synthesized")
        with tempfile.TemporaryDirectory(prefix="bitwright-") as place:
            files = write_standalone(engine, Path(place))
            found.append(Probed(engine, synthesizer.module(Path(place), files, TOP)))
    return found


def probe_series(series: Series, path: Path, progress: Progress) -> tuple[str, ...]:
    """Synthesize the engines of a series, fit a table and write it; returns how well it fits and how to use it.

    Raises:
        ToolchainError: yosys is missing or failed.
    """
    found = measure(probed_engines(), Synthesizer(series), progress)
    table = fit(found, series)
    path.write_text(table_text(table), "utf-8")
    return (
        f"{len(found)} engines synthesized by {table.tool}; median error of their LUTs {table.error:.1%}",
        f"to use it: a profile with 'fpga: {{costs: {path}}}'",
    )


def fit(found: Sequence[Probed], series: Series, prior: CostTable | None = None) -> CostTable:
    """Fit a table to synthesized engines; rules of memories are those of the shipped table.

    Args:
        found: Engines.
        series: What they were synthesized for.
        prior: Coefficients that what the engines do not decide stays near to; the shipped table's by default.
    """
    base = cost_table(series)
    parts = [parts_of(p.engine.module, p.engine.parameters) for p in found]
    names = sorted({name for one in parts for name in one.amounts})
    amounts = np.array([[one.amounts.get(name, 0.0) for name in names] for one in parts])
    stored = [
        reduce(Cells.__add__, (mapped(m, base.memories) for m in one.memories), Cells()) for one in parts
    ]

    def coefficients(kind: str) -> dict[str, float]:
        expected: dict[str, float] = getattr(prior or base, kind)
        measured = np.array([getattr(p.cells, kind) for p in found])
        rest = np.maximum(measured - [getattr(s, kind) for s in stored], 0.0)
        weight = 1.0 / (measured + DAMPING)
        # Rows that ask every coefficient to be what is expected, weakly.
        near = np.array([expected.get(name, 0.0) for name in names])
        pull = PULL / np.maximum(near, 0.1)
        rows = np.concatenate([amounts * weight[:, None], np.diag(pull)])
        solved, _ = nnls(rows, np.concatenate([rest * weight, pull * near]))
        unseen = {name: value for name, value in expected.items() if name not in names}
        return unseen | {n: round(float(v), 3) for n, v in zip(names, solved, strict=True) if v > SMALLEST}

    table = replace_table(base, coefficients("luts"), coefficients("ffs"), len(found))
    return table.model_copy(update={"error": round(median_error(found, table), 4)})


def replace_table(base: CostTable, luts: dict[str, float], ffs: dict[str, float], engines: int) -> CostTable:
    """Return a table with other coefficients, measured now."""
    today = datetime.now(UTC).date().isoformat()
    update = {
        "luts": luts,
        "ffs": ffs,
        "engines": engines,
        "tool": yosys_version(),
        "date": today,
        "note": "",
    }
    return base.model_copy(update=update)


def median_error(found: Sequence[Probed], table: CostTable) -> float:
    """Return the median relative error of predicted look-up tables."""
    errors = [
        abs(cells_of(parts_of(p.engine.module, p.engine.parameters), table).luts / p.cells.luts - 1)
        for p in found
        if p.cells.luts
    ]
    return float(np.median(errors))
