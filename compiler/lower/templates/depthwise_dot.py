"""Depthwise convolution by dot-product instructions: the taps of a column lie side by side in one lane.

A dot-product instruction sums neighbouring bytes of a lane. In channels-last order neighbours are channels, which a
depthwise convolution must not sum; so the rows under the kernel are interleaved first, into a line in which every
lane holds the taps of one column of one channel. That costs few shuffles a row, because all horizontal positions of
the kernel read the same line at different offsets, and it pads the borders on the way: the image is not copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import gcd

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.assemble import assemble_kernel
from bitwright.compiler.lower.templates.epilogue import (
    PACKED_VECTORS,
    Epilogue,
    Part,
    channel_constants,
    epilogue_of,
    store_parts,
)
from bitwright.compiler.lower.templates.geometry import DotGeometry
from bitwright.compiler.lower.templates.instruction import DotInstruction
from bitwright.compiler.lower.templates.scaffold import (
    MIN_PARALLEL_MACS,
    PARALLEL_PIECES,
    Buffer,
    Expr,
    allocate,
    allocate_addressed,
    for_span,
    load,
    loop,
    pieces,
    share,
    shuffle,
    splat,
    store,
    vector_type,
)
from bitwright.compiler.lower.templates.staging import SIGN_SHIFT, Staging, convert
from bitwright.compiler.program.ops import Dot, Program
from bitwright.targets.backend import Kernel

# Unrolled up to so many products of one vector; their weights stay in registers along a row of pixels.
MAX_UNROLLED = 16
# Only here does the order of a permutation across 128-bit lanes matter: x86.
PERMUTED_LANES = 64


@dataclass(frozen=True)
class DepthwiseDotParams:
    """What a tuner may change; the result never depends on it.

    Attributes:
        strip: Channels handled at once, a divisor of all.
        chunks: Pieces the output rows are split into: the parallel loop.
        parallel: Spread the pieces over threads.
    """

    strip: int
    chunks: int
    parallel: bool


def space(geometry: DotGeometry, instruction: DotInstruction) -> Iterator[DepthwiseDotParams]:
    """Yield the legal parameters, the default first."""
    wide = PACKED_VECTORS * instruction.lanes
    strips = [s for s in (wide, 2 * wide, 4 * wide) if geometry.channels % s == 0 and s < geometry.channels]
    parallel = geometry.macs >= MIN_PARALLEL_MACS
    chunks = min(geometry.rows, PARALLEL_PIECES) if parallel else 1
    for strip in [*strips, geometry.channels]:
        for count in dict.fromkeys((chunks, min(geometry.rows, 2 * chunks) if parallel else 1)):
            yield DepthwiseDotParams(strip, count, parallel)


def depthwise_dot_kernel(
    step: Dot,
    program: Program,
    geometry: DotGeometry,
    instruction: DotInstruction,
    params: DepthwiseDotParams | None = None,
) -> Kernel:
    """Return the kernel of a depthwise step (``geometry.is_depthwise``).

    Args:
        step: The convolution.
        program: For shapes, scales and zero points.
        geometry: ``geometry_of(step, program)``.
        instruction: How to multiply; has a ``lanewise`` form.
        params: Blocking; the first of ``space`` when None.
    """
    params = params or next(space(geometry, instruction))
    source = program.tensor(step.inputs[0])
    assert source.quant is not None and instruction.lanewise is not None
    shift = SIGN_SHIFT.get((source.dtype, instruction.operand), 0)
    height, width = geometry.reach
    fill = source.quant.zero_point + shift
    staging = Staging(source.dtype, instruction.operand, height, width, 0, True, fill)
    epilogue = epilogue_of(step, program)
    template = _Template(geometry, staging, epilogue, instruction, params)
    lanes = template.channel_of_lane()
    arrays = channel_constants(step, program, shift)
    constants = {
        "weight": template.pack(step.weight, lanes),
        **{name: _take(np.broadcast_to(array, (geometry.outputs,)), lanes) for name, array in arrays.items()},
    }
    return assemble_kernel(
        instruction.name, geometry, staging, epilogue, ("dw", params), constants, template.body
    )


def _take(array: np.ndarray, lanes: np.ndarray) -> np.ndarray:
    """Return array[..., lanes], zeros where there is no such channel."""
    return np.where(lanes >= 0, array[..., np.maximum(lanes, 0)], 0).astype(array.dtype)


@dataclass(frozen=True)
class _Vector:
    """One accumulator of a unit: offsets in lanes of the line and of the output, number of its weight vector."""

    line: int
    output: int
    weight: int
    used: int
    follows: bool


@dataclass(frozen=True)
class _Template:
    geometry: DotGeometry
    staging: Staging
    epilogue: Epilogue
    instruction: DotInstruction
    params: DepthwiseDotParams

    @property
    def groups(self) -> int:
        """Lines: how many groups of ``step`` taps a kernel column has."""
        return -(-self.geometry.kernel[0] // self.instruction.step)

    @property
    def flat(self) -> bool:
        """Neighbouring output pixels read neighbouring columns: vectors may run across pixels."""
        return self.geometry.strides[1] == 1 and self.params.strip == self.geometry.channels

    @property
    def unit(self) -> int:
        """Output pixels handled together, so that their vectors are filled and packed four at a time."""
        wide, width = PACKED_VECTORS * self.instruction.lanes, self.geometry.out_width
        if self.flat:
            return min(width, wide // gcd(self.params.strip, wide))
        return min(
            width, max(1, wide // (-(-self.params.strip // self.instruction.lanes) * self.instruction.lanes))
        )

    def vectors(self) -> list[_Vector]:
        """Return the accumulators of a unit, in the order of memory."""
        lanes, strip, g = self.instruction.lanes, self.params.strip, self.geometry
        if self.flat:
            total = self.unit * strip
            return [
                _Vector(at, at, at // lanes, min(lanes, total - at), at > 0) for at in range(0, total, lanes)
            ]
        return [
            _Vector(
                p * g.strides[1] * strip + at,
                p * g.channels + at,
                at // lanes,
                min(lanes, strip - at),
                at > 0 or strip == g.channels,
            )
            for p in range(self.unit)
            for at in range(0, strip, lanes)
        ]

    def channel_of_lane(self) -> np.ndarray:
        """Return the channel of every lane of every weight vector of every strip; -1 is none."""
        lanes, strip = self.instruction.lanes, self.params.strip
        length = self.unit * strip if self.flat else strip
        at = np.arange(-(-length // lanes) * lanes)
        inside = np.where(at < length, at % strip, -1)
        strips = np.arange(self.geometry.channels // strip)[:, None] * strip
        return np.where(inside >= 0, inside + strips, -1).reshape(-1)

    def pack(self, weight: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        """Return the weight [C, 1, KH, KW] as flat [strips, KW, groups, vectors * lanes, step]."""
        (kh, kw), step = self.geometry.kernel, self.instruction.step
        taps = np.zeros((kw, self.groups * step, self.geometry.channels), np.int8)
        taps[:, :kh] = weight[:, 0].transpose(2, 1, 0)
        taken = _take(taps, lanes).reshape(
            kw, self.groups, step, self.geometry.channels // self.params.strip, -1
        )
        return np.ascontiguousarray(taken.transpose(3, 0, 1, 4, 2)).reshape(-1)

    @property
    def line_length(self) -> int:
        """Elements of one line, with what vectors of the last pixel read behind it."""
        slack = self.instruction.lanes
        return (self.staging.width * self.params.strip + slack) * self.instruction.step

    def body(self, buffers: list[Buffer]) -> None:
        x, weight, *constants, y = buffers
        g = self.geometry
        with loop(self.params.chunks, parallel=self.params.parallel) as chunk:
            lines = allocate_addressed(self.groups * self.line_length, self.instruction.operand)
            for_span(self.groups * self.line_length, lambda at, lanes: self._fill(lines, at, lanes))
            strips = g.channels // self.params.strip
            with share(g.rows, self.params.chunks, chunk) as row, loop(strips) as strip:
                self._interleave(x, lines, row, strip)
                self._row(lines, weight, constants, y, row, strip)

    def _fill(self, lines: Buffer, at: Expr, lanes: int) -> None:
        store(lines, splat(T.cast(self.staging.fill, self.instruction.operand), lanes), [at], lanes)

    def _interleave(self, x: Buffer, lines: Buffer, row: Expr, strip: Expr) -> None:
        """Write the lines under one output row; the columns of the borders were filled before."""
        g, step = self.geometry, self.instruction.step
        first = row % g.out_height * g.strides[0] - g.pads[0]
        for group in range(self.groups):
            taps = range(group * step, min((group + 1) * step, g.kernel[0]))
            rows = [first + tap * g.dilations[0] for tap in taps]
            inside = tirx.all(rows[0] >= 0, rows[-1] < g.height)
            if not g.pads[0] and rows_fit(g):
                self._copy(x, lines, group, rows, row, strip, checked=False)
                continue
            with T.If(inside):
                with T.Then():
                    self._copy(x, lines, group, rows, row, strip, checked=False)
                with T.Else():
                    self._copy(x, lines, group, rows, row, strip, checked=True)

    def _copy(
        self,
        x: Buffer,
        lines: Buffer,
        group: int,
        rows: list[Expr],
        row: Expr,
        strip: Expr,
        *,
        checked: bool,
    ) -> None:
        """Interleave the given rows of the image; with ``checked``, those outside it are padding."""
        g, step, size = self.geometry, self.instruction.step, self.params.strip
        image = row // g.out_height * g.height
        before = min(g.pads[1], self.staging.width)
        columns = max(0, min(g.width, self.staging.width - before))

        def copy(at: Expr, source: Expr, lanes: int) -> None:
            taps = [
                self._tap(x, r, (image + r) * g.width * g.channels + source, lanes, checked) for r in rows
            ]
            none = splat(T.cast(0, self.instruction.operand), lanes)
            value = interleave([*taps, *[none] * (step - len(taps))], lanes, self.instruction.operand)
            start = group * self.line_length + (before * size + at) * step
            store(lines, value, [start], lanes * step)

        if size == g.channels:
            spans(columns * size, self.instruction.interleaved, lambda at, lanes: copy(at, at, lanes))
            return
        with loop(columns) as column:
            spans(
                size,
                self.instruction.interleaved,
                lambda at, lanes: copy(column * size + at, column * g.channels + strip * size + at, lanes),
            )

    def _tap(self, x: Buffer, row: Expr, at: Expr, lanes: int, checked: bool) -> Expr:
        if not checked:
            return convert(load(x, [at], lanes), self.staging, lanes)
        inside = tirx.all(row >= 0, row < self.geometry.height)
        fill = splat(T.cast(self.staging.fill, self.instruction.operand), lanes)
        return T.if_then_else(inside, convert(load(x, [at], lanes), self.staging, lanes), fill)

    def _row(
        self, lines: Buffer, weight: Buffer, constants: list[Buffer], output: Buffer, row: Expr, strip: Expr
    ) -> None:
        """Emit one row of output pixels of one strip of channels, some vectors of every unit at a time."""
        g, found = self.geometry, self.vectors()
        units, together = -(-g.out_width // self.unit), PACKED_VECTORS * self.instruction.lanes

        def pixels(vectors: list[_Vector], shift: Expr) -> None:
            with loop(units) as unit:
                # The last unit moves back over pixels that are done, instead of being shorter.
                column = T.min(unit * self.unit, g.out_width - self.unit) if units > 1 else 0
                at = (row * g.out_width + column) * g.channels + strip * self.params.strip + shift
                start = column * g.strides[1] * self.params.strip + shift
                self._unit(vectors, lines, weight, constants, output, start, at, strip, shift)

        # Vectors that lie one behind the other in everything they touch: one piece of code for all.
        regular = self.flat or self.unit == 1
        full = sum(v.used for v in found) // together if regular else 0
        if full:
            with loop(full) as number:
                pixels(found[:PACKED_VECTORS], number * together)
        for first in range(full * PACKED_VECTORS, len(found), PACKED_VECTORS):
            pixels(found[first : first + PACKED_VECTORS], 0)

    def _unit(
        self,
        vectors: list[_Vector],
        lines: Buffer,
        weight: Buffer,
        constants: list[Buffer],
        output: Buffer,
        start: Expr,
        at: Expr,
        strip: Expr,
        shift: Expr,
    ) -> None:
        """Emit some vectors of one unit; all their indices are moved by ``shift`` lanes."""
        lanes, step, (_, kw) = self.instruction.lanes, self.instruction.step, self.geometry.kernel
        count = len(self.channel_of_lane()) * self.params.strip // self.geometry.channels
        accumulators = allocate((len(vectors), lanes), "int32", "local")
        for n, vector in enumerate(vectors):
            bias = load(constants[0], [strip * count + vector.weight * lanes + shift], lanes)
            store(accumulators, bias, [n, 0], lanes)

        def column(j: Expr, group: int) -> None:
            pixel = start + j * self.geometry.dilations[1] * self.params.strip
            for n, vector in enumerate(vectors):
                x = load(lines, [group * self.line_length + (pixel + vector.line) * step], lanes * step)
                w_at = ((strip * kw + j) * self.groups + group) * count + vector.weight * lanes + shift
                w = load(weight, [w_at * step], lanes * step)
                assert self.instruction.lanewise is not None
                total = self.instruction.lanewise(load(accumulators, [n, 0], lanes), x, w)
                store(accumulators, total, [n, 0], lanes)

        for group in range(self.groups):
            if kw * self.groups <= MAX_UNROLLED:
                for j in range(kw):
                    column(j, group)
            else:
                with loop(kw) as j:
                    column(j, group)
        parts = [
            Part(
                load(accumulators, [n, 0], lanes),
                strip * count + v.weight * lanes + shift,
                at + v.output,
                v.used,
                v.follows,
            )
            for n, v in enumerate(vectors)
        ]
        store_parts(self.epilogue, parts, constants, output, lanes, self.instruction.narrowing)


def rows_fit(geometry: DotGeometry) -> bool:
    """Tell whether no output row reads below the image."""
    return geometry.reach[0] - geometry.pads[0] <= geometry.height


def spans(length: int, width: int, emit: Callable[[Expr, int], None]) -> None:
    """Emit code for ``length`` elements, full vectors first; the rest moves back over elements that are done."""
    full, rest = divmod(length, width)
    if full:
        with loop(full) as block:
            emit(block * width, width)
        if rest:
            emit(length - width, width)
        return
    for offset, lanes in pieces(rest, width):
        emit(offset, lanes)


def interleave(vectors: list[Expr], lanes: int, dtype: str) -> Expr:
    """Return the elements of several vectors in turn: a0 b0 c0 ... a1 b1 c1 ..."""
    if len(vectors) != 4 or lanes != PERMUTED_LANES:
        count = len(vectors)
        return shuffle(vectors, [lane + lanes * v for lane in range(lanes) for v in range(count)])
    # Unpacking works within 128-bit lanes; groups of four elements are put into the lane that needs them first.
    order = [p % 4 * 4 + p // 4 for p in range(16)]
    a, b, c, d = (_reordered(v, order, dtype) for v in vectors)
    low, high = ([16 * lane + k for lane in range(4) for k in half] for half in (range(8), range(8, 16)))
    (ab0, ab1), (cd0, cd1) = ((_zip(x, y, low, 1), _zip(x, y, high, 1)) for x, y in ((a, b), (c, d)))
    found = [_zip(ab, cd, half, 2) for ab, cd in ((ab0, cd0), (ab1, cd1)) for half in (low, high)]
    return shuffle(found, range(4 * lanes))


def _reordered(vector: Expr, order: list[int], dtype: str) -> Expr:
    words = shuffle(T.reinterpret(vector, dtype=vector_type("int32", len(order))), order)
    return T.reinterpret(words, dtype=vector_type(dtype, 4 * len(order)))


def _zip(first: Expr, second: Expr, lanes: list[int], width: int) -> Expr:
    """Return the given bytes of both vectors, ``width`` of the one and ``width`` of the other in turn."""
    taken = [lanes[i : i + width] for i in range(0, len(lanes), width)]
    indices = [lane + 64 * v for group in taken for v in (0, 1) for lane in group]
    return shuffle([first, second], indices)
