"""Random steps other than dot products: pooling, elementwise, look-ups, moves and the edges; many in one program."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from bitwright.compiler.program.ops import (
    Dequantize,
    Move,
    Program,
    QAdd,
    QConcat,
    QLut,
    QMul,
    QPool,
    Quantize,
    QuantParams,
    Step,
    Tensor,
)

Shape = tuple[int, ...]


@dataclass
class Draft:
    """A program in the making.

    Attributes:
        random: What the step in hand is drawn from.
    """

    random: np.random.Generator = field(default_factory=np.random.default_rng)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    feeds: dict[str, np.ndarray] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)

    def ints(self, low: int, high: int, count: int) -> Shape:
        return tuple(int(v) for v in self.random.integers(low, high, count, endpoint=True))

    def one_of(self, *values: object) -> object:
        return values[int(self.random.integers(len(values)))]

    def quant(self) -> QuantParams:
        """Return random parameters of either type."""
        low, high = (0, 255) if self.random.integers(2) else (-128, 127)
        scale = float(np.float32(self.random.uniform(0.005, 0.08)))
        return QuantParams("int8" if low else "uint8", scale, int(self.random.integers(low, high + 1)))

    def tensor(self, shape: Shape, quant: QuantParams | None) -> str:
        name = f"t{len(self.tensors)}"
        self.tensors[name] = Tensor(name, shape, quant.dtype if quant else "float32", quant)
        return name

    def source(self, shape: Shape, quant: QuantParams | None) -> str:
        """Feed a tensor; integers every second time so that their bytes lie in another order than the axes."""
        turned = quant is not None and self.random.integers(2)
        order = [int(a) for a in self.random.permutation(len(shape))] if turned else None
        stored = tuple(shape[a] for a in order) if order else shape
        name = self.tensor(stored, quant)
        if quant is None:
            values = self.random.normal(0, 4, stored).astype(np.float32)
            flat = values.reshape(-1)
            flat[::7] = np.round(flat[::7]) / 2
            flat[3:4], flat[5:6], flat[8:9] = np.inf, -np.inf, np.nan
        else:
            values = self.random.integers(*quant.bounds, stored, endpoint=True).astype(quant.dtype)
        self.feeds[name] = values
        if order is None:
            return name
        perm = tuple(int(a) for a in np.argsort(order))
        return self.write(Move, (name,), shape, quant, kind="transpose", perm=perm)

    def write(
        self,
        step: type[Step],
        inputs: Iterable[str],
        shape: Shape,
        quant: QuantParams | None,
        **fields: object,
    ) -> str:
        output = self.tensor(shape, quant)
        name = f"s{len(self.steps)}"
        self.steps.append(step(name=name, inputs=tuple(inputs), outputs=(output,), **fields))
        return output

    def shape(self, rank: int = 0) -> Shape:
        """Return a random shape; every extent is often around a vector's width."""
        rank = rank or int(self.random.integers(1, 5))
        largest = {1: 400, 2: 70, 3: 40, 4: 24}[rank]
        return (*self.ints(1, min(largest, 12), rank - 1), int(self.random.integers(1, largest + 1)))

    def limits(self, quant: QuantParams) -> dict[str, int]:
        """Return the bounds of a step's result, at times those of a fused Relu."""
        low, high = quant.bounds
        return (
            {"lower": quant.zero_point, "upper": high}
            if self.random.integers(2)
            else {"lower": low, "upper": high}
        )


def quantize(d: Draft) -> str:
    shape = d.shape()
    return d.write(Quantize, [d.source(shape, None)], shape, d.quant())


def dequantize(d: Draft) -> str:
    shape = d.shape()
    return d.write(Dequantize, [d.source(shape, d.quant())], shape, None)


def binary(d: Draft) -> str:
    """Add or multiply, with any broadcasting."""
    whole = d.shape()
    left, right = (tuple(1 if d.random.integers(4) == 0 else e for e in whole) for _ in range(2))
    right = right[int(d.random.integers(len(right))) :] if d.random.integers(3) == 0 else right
    y = d.quant()
    sources = [d.source(shape, d.quant()) for shape in (left, right)]
    kind = QAdd if d.random.integers(2) else QMul
    return d.write(kind, sources, np.broadcast_shapes(left, right), y, **d.limits(y))


def look_up(d: Draft) -> str:
    shape, y = d.shape(), d.quant()
    table = d.random.integers(*y.bounds, 256, endpoint=True).astype(y.dtype)
    return d.write(QLut, [d.source(shape, d.quant())], shape, y, table=table, function="any")


def concat(d: Draft) -> str:
    shape, q = d.shape(), d.quant()
    axis = int(d.random.integers(len(shape)))
    extents = d.ints(1, 9, int(d.random.integers(2, 4)))
    sources = [d.source((*shape[:axis], extent, *shape[axis + 1 :]), q) for extent in extents]
    return d.write(QConcat, sources, (*shape[:axis], sum(extents), *shape[axis + 1 :]), q, axis=axis)


def pool(d: Draft) -> str:
    kind, q = str(d.one_of("max", "average")), d.quant()
    n, c, h, w = *d.ints(1, 3, 1), *d.ints(1, 40, 1), *d.ints(7, 14, 2)
    kernel, strides = (h, w), (1, 1)
    pads, dilations = (0, 0, 0, 0), (1, 1)
    if d.random.integers(4):
        kernel, strides = d.ints(1, 4, 2), d.ints(1, 3, 2)
        pads = tuple(int(d.random.integers(kernel[a % 2])) for a in range(4))
        dilations = d.ints(1, 2, 2) if kind == "max" else (1, 1)
    out = [
        (size + pads[a] + pads[a + 2] - (kernel[a] - 1) * dilations[a] - 1) // strides[a] + 1
        for a, size in enumerate((h, w))
    ]
    fields = {"kernel": kernel, "strides": strides, "pads": pads, "dilations": dilations}
    include = bool(d.random.integers(2))
    return d.write(
        QPool,
        [d.source((n, c, h, w), q)],
        (n, c, *out),
        q if kind == "max" else d.quant(),
        kind=kind,
        count_include_pad=include,
        **fields,
    )


def cut(d: Draft) -> str:
    shape, q = d.shape(), d.quant()
    steps = tuple(int(d.random.choice([1, 1, 2, 3, -1, -2])) for _ in shape)
    starts = tuple(int(d.random.integers(extent)) for extent in shape)
    room = [(e - s - 1) // t if t > 0 else s // -t for e, s, t in zip(shape, starts, steps, strict=True)]
    out = tuple(int(d.random.integers(r + 1)) + 1 for r in room)
    return d.write(Move, [d.source(shape, q)], out, q, kind="slice", starts=starts, steps=steps)


def resize(d: Draft) -> str:
    shape, q = d.shape(), d.quant()
    indices = tuple(d.random.integers(0, e, int(d.random.integers(1, 2 * e + 1))) for e in shape)
    out = tuple(i.size for i in indices)
    return d.write(Move, [d.source(shape, q)], out, q, kind="resize_nearest", indices=indices)


def pad(d: Draft) -> str:
    shape, q = d.shape(), d.quant()
    pads = d.ints(0, 3, 2 * len(shape))
    out = tuple(e + pads[a] + pads[a + len(shape)] for a, e in enumerate(shape))
    return d.write(Move, [d.source(shape, q)], out, q, kind="pad", pads=pads, fill=q.zero_point)


def expand(d: Draft) -> str:
    shape, q = d.shape(), d.quant()
    source = tuple(1 if d.random.integers(2) else e for e in shape)[int(d.random.integers(len(shape))) :]
    return d.write(Move, [d.source(source, q)], shape, q, kind="expand")


def transpose(d: Draft) -> str:
    shape, q = d.shape(), d.quant()
    perm = tuple(int(a) for a in d.random.permutation(len(shape)))
    return d.write(Move, [d.source(shape, q)], tuple(shape[a] for a in perm), q, kind="transpose", perm=perm)


KINDS: tuple[Callable[[Draft], str], ...] = (
    quantize,
    dequantize,
    binary,
    binary,
    pool,
    pool,
    look_up,
    concat,
    cut,
    resize,
    pad,
    expand,
    transpose,
)


def random_program(
    seed: int, numbers: Iterable[int]
) -> tuple[Program, dict[str, np.ndarray], dict[str, str]]:
    """Return independent steps as one program, its inputs, and what each output is, for messages.

    Step ``number`` of a seed is the same in whatever company, so that a failure can be repeated alone.
    """
    draft = Draft()
    for number in numbers:
        draft.random = np.random.default_rng([seed, number])
        kind = KINDS[number % len(KINDS)]
        output = kind(draft)
        step, tensor = draft.steps[-1], draft.tensors[output]
        shapes = [draft.tensors[name].shape for name in step.inputs]
        draft.outputs.append(output)
        draft.labels[output] = (
            f"random_program({seed}, [{number}]): {kind.__name__} {shapes} -> {tensor.shape}"
        )
    program = Program(tuple(draft.feeds), tuple(draft.outputs), tuple(draft.steps), draft.tensors)
    return program, draft.feeds, draft.labels


def differences(
    labels: dict[str, str], found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]
) -> list[str]:
    """Return one line for every output that is not equal bit for bit, every NaN being equal to every other."""
    lines = []
    for name, label in labels.items():
        same = found[name].dtype == wanted[name].dtype and np.array_equal(
            found[name], wanted[name], equal_nan=wanted[name].dtype.kind == "f"
        )
        if not same:
            lines.append(label)
    return lines
