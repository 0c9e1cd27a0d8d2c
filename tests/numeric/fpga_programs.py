"""Integer programs with random weights for tests of circuits: layers are appended one after the other."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from bitwright.compiler.program.ops import (
    Move,
    Program,
    QAdd,
    QConcat,
    QConv,
    QGemm,
    QLut,
    QPool,
    QuantParams,
    Step,
    Tensor,
)

CODES = ("8", "6", "5", "4", "3", "2", "ternary", "binary")


def random_weight(rng: np.random.Generator, shape: tuple[int, ...], code: str) -> np.ndarray:
    """Return weights that need exactly the code."""
    if code == "binary":
        return (rng.integers(0, 2, shape) * 2 - 1).astype(np.int8)
    if code == "ternary":
        weight = rng.integers(-1, 2, shape).astype(np.int8)
        weight.flat[0] = 0
        return weight
    low = -(1 << (int(code) - 1))
    weight = rng.integers(low, -low, shape).astype(np.int8)
    weight.flat[0] = low
    return weight


@dataclass
class Chain:
    """A program under construction; ``at`` is the tensor that the next layer reads.

    Attributes:
        dtype: Type of all activations.
        levels: Integers that activations inside the network can have, from the first one and its number of followers;
            None: nearly all of the type.
        seed: Of weights, scales and biases.
    """

    shape: tuple[int, ...]
    dtype: str = "int8"
    seed: int = 0
    levels: tuple[int, int] | None = None
    steps: list[Step] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.at = "x"
        inside, self.levels = self.levels, None
        self.tensors["x"] = Tensor("x", self.shape, self.dtype, self._quant())
        self.levels = inside

    def _bounds(self, above: int, below: int) -> dict[str, int]:
        """Return the bounds of a result: the levels, or the type's but for some at the ends."""
        if self.levels is not None:
            return {"lower": self.levels[0], "upper": sum(self.levels)}
        info = np.iinfo(self.dtype)
        return {"lower": int(info.min) + above, "upper": int(info.max) - below}

    def _quant(self) -> QuantParams:
        if self.levels is not None:
            zero = self.levels[0] + int(self.rng.integers(0, self.levels[1] + 1))
            return QuantParams(self.dtype, float(np.float32(self.rng.uniform(2, 6))), zero)
        info = np.iinfo(self.dtype)
        middle = (int(info.min) + int(info.max) + 1) // 2
        return QuantParams(
            self.dtype, float(np.float32(self.rng.uniform(0.2, 0.6))), middle + int(self.rng.integers(-9, 9))
        )

    def _put(self, name: str, shape: tuple[int, ...], quant: QuantParams | None) -> str:
        dtype = self.dtype if quant else "float32"
        self.tensors[name] = Tensor(name, shape, dtype, quant)
        return name

    def _dot_fields(self, weight: np.ndarray, outputs: int, y: QuantParams | None) -> dict[str, object]:
        per_output = weight.size // outputs
        spread = np.sqrt(per_output) * 74 * max(float(weight.std()), 0.5)
        x = self.tensors[self.at].quant
        assert x is not None
        levels = 255 if self.levels is None else self.levels[1]
        taken = 255 if self.at == "x" else levels
        scale = (y.scale if y else 1.0) * 45 * levels / taken / spread / x.scale
        return {
            "weight": weight,
            "weight_scale": (scale * self.rng.uniform(0.05, 1.0, outputs)).astype(np.float32),
            "bias": self.rng.integers(-3000, 3000, outputs).astype(np.int32),
            **self._bounds(3, 2),
        }

    def gemm(self, name: str, outputs: int, code: str = "8", *, raw: bool = False) -> Chain:
        """Append a matrix product."""
        shape = self.tensors[self.at].shape
        y = None if raw else self._quant()
        weight = random_weight(self.rng, (shape[-1], outputs), code)
        fields = self._dot_fields(weight, outputs, y)
        out = self._put(f"{name}_y", (*shape[:-1], outputs), y)
        self.steps.append(QGemm(name=name, inputs=(self.at,), outputs=(out,), **fields))  # type: ignore[arg-type]
        self.at = out
        return self

    def conv(
        self,
        name: str,
        outputs: int,
        code: str = "8",
        *,
        kernel: tuple[int, int] = (3, 3),
        strides: tuple[int, int] = (1, 1),
        pads: tuple[int, int, int, int] = (1, 1, 1, 1),
        depthwise: bool = False,
    ) -> Chain:
        """Append a convolution."""
        _, channels, height, width = self.tensors[self.at].shape
        group = channels if depthwise else 1
        weight = random_weight(self.rng, (outputs, channels // group, *kernel), code)
        y = self._quant()
        size = _sizes((height, width), kernel, strides, pads)
        fields = self._dot_fields(weight, outputs, y)
        out = self._put(f"{name}_y", (1, outputs, *size), y)
        step = QConv(
            name=name, inputs=(self.at,), outputs=(out,), strides=strides, pads=pads, group=group, **fields
        )  # type: ignore[arg-type]
        self.steps.append(step)
        self.at = out
        return self

    def pool(self, name: str, kind: str, kernel: tuple[int, int], strides: tuple[int, int]) -> Chain:
        """Append pooling without padding."""
        before = self.tensors[self.at]
        _, channels, height, width = before.shape
        size = _sizes((height, width), kernel, strides, (0, 0, 0, 0))
        quant = before.quant if kind == "max" else self._quant()
        out = self._put(f"{name}_y", (1, channels, *size), quant)
        self.steps.append(
            QPool(name=name, inputs=(self.at,), outputs=(out,), kind=kind, kernel=kernel, strides=strides)
        )
        self.at = out
        return self

    def add(self, name: str, other: str) -> Chain:
        """Append the sum with an earlier tensor."""
        out = self._put(f"{name}_y", self.tensors[self.at].shape, self._quant())
        step = QAdd(name=name, inputs=(self.at, other), outputs=(out,), **self._bounds(5, 0))
        self.steps.append(step)
        self.at = out
        return self

    def table(self, name: str) -> Chain:
        """Append a random function."""
        info = np.iinfo(self.dtype)
        low, high = (info.min, info.max) if self.levels is None else (self.levels[0], sum(self.levels))
        table = self.rng.integers(low, high + 1, 256).astype(self.dtype)
        out = self._put(f"{name}_y", self.tensors[self.at].shape, self._quant())
        self.steps.append(QLut(name=name, inputs=(self.at,), outputs=(out,), table=table, function="random"))
        self.at = out
        return self

    def concat(self, name: str, other: str) -> Chain:
        """Append the channels of this tensor and of an earlier one."""
        mine, theirs = self.tensors[self.at], self.tensors[other]
        shape = (1, mine.shape[1] + theirs.shape[1], *mine.shape[2:])
        out = self._put(f"{name}_y", shape, mine.quant)
        self.steps.append(QConcat(name=name, inputs=(self.at, other), outputs=(out,), axis=1))
        self.at = out
        return self

    def flatten(self, name: str) -> Chain:
        """Append a reshape to one vector."""
        before = self.tensors[self.at]
        out = self._put(f"{name}_y", (1, int(np.prod(before.shape))), before.quant)
        self.steps.append(Move(name=name, inputs=(self.at,), outputs=(out,), kind="reshape"))
        self.at = out
        return self

    def program(self) -> Program:
        """Return the program."""
        return Program(("x",), (self.at,), tuple(self.steps), dict(self.tensors))

    def samples(self, count: int) -> list[np.ndarray]:
        """Return random inputs that reach both ends of the type."""
        info = np.iinfo(self.dtype)
        return [
            self.rng.integers(info.min, info.max + 1, self.shape).astype(self.dtype) for _ in range(count)
        ]


def _sizes(
    image: tuple[int, int], kernel: tuple[int, int], strides: tuple[int, int], pads: tuple[int, int, int, int]
) -> tuple[int, int]:
    padded = image[0] + pads[0] + pads[2], image[1] + pads[1] + pads[3]
    height, width = ((p - k) // s + 1 for p, k, s in zip(padded, kernel, strides, strict=True))
    return height, width
