"""Which of a library's functions serves an input of any size, and how it is padded, cut and put together again.

A library for several shapes has a function for each combination of bucket sizes. An input is padded to the smallest
function that holds it; outputs are cut back. A looped dimension (the batch) is served one element at a time. Of a
dynamic dimension any size is served: by a function for just that size if there is one, else by one for all sizes. The
C++ runtime follows the same rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bitwright.compiler.errors import DataError, UsageError

SHAPES_FILE = "shapes.json"
MAIN = "main"

Arrays = Mapping[str, np.ndarray]


class PortRule(BaseModel):
    """One input or output of a model of several shapes.

    Attributes:
        name: Its name in the ONNX model.
        dtype: numpy name.
        dims: Size of each axis, or the name of the dimension it has.
        pad: What fills an input up to the bucket's size; None where it has no bucketed axis.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    dtype: str
    dims: tuple[int | str, ...]
    pad: float | None = None


class CacheRule(BaseModel):
    """Caches of fixed capacity that every call writes to.

    Attributes:
        past: Input that says how many positions they hold already, int32 [1].
        length: Dimension that says how many come with a call.
        capacity: Positions that there is room for.
        states: How many of the last inputs are caches; as many of the last outputs are these caches again.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    past: str
    length: str
    capacity: int = Field(ge=1)
    states: int = Field(ge=1)

    def check(self, feeds: Arrays, sizes: Mapping[str, int]) -> None:
        """Refuse a call that the caches have no room for.

        Raises:
            DataError: Says how many positions there are.
        """
        past, new = int(feeds[self.past].reshape(-1)[0]), sizes[self.length]
        if past < 0 or past + new > self.capacity:
            msg = f"{new} positions behind {past} do not fit caches of {self.capacity}"
            raise DataError(msg, where=f"input '{self.past}'", fix="compile with a larger --context")


class FunctionRule(BaseModel):
    """One function of the library.

    Attributes:
        name: ``main`` or ``main_K``; the latter is also its folder in ``lib``.
        sizes: Bucketed dimension -> size it computes. A dynamic dimension that is missing has any size.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(pattern=r"^main(_[0-9]+)?$")
    sizes: dict[str, int]

    @property
    def folder(self) -> str:
        """Its folder in ``lib``, "" for ``lib`` itself."""
        return "" if self.name == MAIN else self.name


@dataclass(frozen=True)
class Dispatch:
    """How one set of inputs is computed.

    Attributes:
        function: What computes it.
        calls: Inputs of each call, as large as the function wants them.
        sizes: True size of every bucketed and looped dimension.
    """

    function: FunctionRule
    calls: tuple[dict[str, np.ndarray], ...]
    sizes: dict[str, int]


class ShapeRules(BaseModel):
    """The content of shapes.json.

    Attributes:
        version: Of this layout.
        buckets: Dimension -> its sizes, ascending.
        loop: Dimension that is served one element at a time, or None.
        dynamic: Dimension of any size, or None. ``buckets`` has the sizes of it that have functions of their own.
        longest: The largest size of the dynamic dimension; None: there is no bound.
        fixed: Every other dynamic dimension of the model, and the looped one -> size the library is compiled for.
        inputs: In the model's order.
        outputs: In the model's order.
        functions: One for each combination of bucket sizes, and of those without the dynamic dimension's.
        cache: The caches that calls write to, or None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: Literal[1] = 1
    buckets: dict[str, tuple[int, ...]]
    loop: str | None
    dynamic: str | None = None
    longest: int | None = None
    fixed: dict[str, int]
    inputs: tuple[PortRule, ...]
    outputs: tuple[PortRule, ...]
    functions: tuple[FunctionRule, ...] = Field(min_length=1)
    cache: CacheRule | None = None

    @property
    def answers(self) -> tuple[PortRule, ...]:
        """The outputs that are no caches."""
        return self.outputs[: len(self.outputs) - self.states]

    @property
    def states(self) -> int:
        """How many of the last inputs, and of the last outputs, are caches."""
        return 0 if self.cache is None else self.cache.states

    def write(self, folder: Path) -> None:
        """Write ``shapes.json``."""
        (folder / SHAPES_FILE).write_text(self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> ShapeRules | None:
        """Read what :meth:`write` wrote; None if the library has one shape.

        Raises:
            UsageError: The file is damaged.
        """
        path = folder / SHAPES_FILE
        if not path.exists():
            return None
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            msg = f"the rules of shapes are damaged: {error.errors()[0]['msg']}"
            raise UsageError(msg, where=str(path)) from error

    def sizes_of(self, feeds: Arrays) -> dict[str, int]:
        """Return the size of every named dimension in a set of inputs.

        Raises:
            DataError: A name, element type, rank or fixed size does not fit, or a dimension has two sizes.
        """
        unknown = sorted(set(feeds) - {p.name for p in self.inputs})
        if unknown:
            msg = f"the model has no input '{unknown[0]}'"
            raise DataError(msg, fix=f"its inputs are: {', '.join(p.name for p in self.inputs)}")
        sizes: dict[str, int] = {}
        for port in self.inputs:
            _match(port, feeds, sizes)
        if self.cache is not None:
            self.cache.check(feeds, sizes)
        return sizes

    def function_for(self, sizes: Mapping[str, int]) -> FunctionRule:
        """Return the smallest function that holds these sizes; one for just this size goes before one for any.

        Raises:
            DataError: A size is beyond the largest bucket; the message names the buckets.
        """
        if self.dynamic is not None and self.longest is not None and sizes[self.dynamic] > self.longest:
            msg = f"{self.dynamic}={sizes[self.dynamic]} is larger than {self.longest}, the largest that is served"
            fix = f"shorten the input, or compile with --dynamic {self.dynamic}={sizes[self.dynamic]}"
            raise DataError(msg, fix=fix)
        for name, buckets in self.buckets.items():
            if name != self.dynamic and sizes[name] > buckets[-1]:
                msg = f"{name}={sizes[name]} is larger than the largest bucket; {name} has {list(buckets)}"
                raise DataError(msg, fix=f"shorten the input, or compile with a larger --bucket {name}")
        fitting = [f for f in self.functions if all(self._holds(d, n, sizes[d]) for d, n in f.sizes.items())]
        return min(fitting, key=lambda f: (self.is_dynamic(f), prod(f.sizes.values())))

    def _holds(self, dim: str, size: int, wanted: int) -> bool:
        return wanted == size if dim == self.dynamic else wanted <= size

    def is_dynamic(self, function: FunctionRule) -> bool:
        """Tell whether a function computes any size of the dynamic dimension."""
        return self.dynamic is not None and self.dynamic not in function.sizes

    @property
    def has_lengths(self) -> bool:
        """The dynamic dimension is no batch, whose elements lie one behind the other, but a length inside."""
        ports = [p for p in (*self.inputs, *self.outputs) if self.dynamic in p.dims]
        return any(p.dims[0] != self.dynamic or p.dims.count(self.dynamic) > 1 for p in ports)

    def words(self, function: FunctionRule) -> str:
        """Return the sizes of a function in words."""
        bound = f" up to {self.longest}" if self.longest is not None else ""
        any_size = [f"any {self.dynamic}{bound}"] if self.is_dynamic(function) else []
        return ", ".join([*(f"{d}={n}" for d, n in function.sizes.items()), *any_size])

    def batched_inputs(self) -> list[str]:
        """Return the inputs that have the dynamic dimension."""
        return [port.name for port in self.inputs if self.dynamic in port.dims]

    def one_at_a_time(self) -> ShapeRules:
        """Return rules by which the elements of the dynamic dimension are computed one after the other."""
        assert self.dynamic is not None
        buckets = {name: sizes for name, sizes in self.buckets.items() if name != self.dynamic}
        functions = tuple(f for f in self.functions if self.is_dynamic(f))
        changes = {"loop": self.dynamic, "dynamic": None, "buckets": buckets, "functions": functions}
        return self.model_copy(update=changes)

    def dispatch(self, feeds: Arrays, function: FunctionRule | None = None) -> Dispatch:
        """Return how ``feeds`` are computed: by the smallest function that holds them, or by a named one.

        Raises:
            DataError: The inputs do not fit the model, or no bucket holds them.
        """
        sizes = self.sizes_of(feeds)
        chosen = function or self.function_for(sizes)
        padded = {p.name: _padded(p, feeds[p.name], chosen.sizes) for p in self.inputs}
        if self.loop is None:
            return Dispatch(chosen, (padded,), sizes)
        calls = tuple(
            {p.name: _element(p, padded[p.name], self.loop, k) for p in self.inputs}
            for k in range(sizes[self.loop])
        )
        return Dispatch(chosen, calls, sizes)

    def assemble(self, sizes: Mapping[str, int], results: Sequence[Arrays]) -> dict[str, np.ndarray]:
        """Return the model's outputs from those of every call: looped axes joined, bucketed axes cut.

        Args:
            sizes: :attr:`Dispatch.sizes`.
            results: Outputs of each of :attr:`Dispatch.calls`.
        """
        found = {}
        for port in self.outputs:
            arrays = [result[port.name] for result in results]
            joined = arrays[0] if self.loop is None else np.concatenate(arrays, port.dims.index(self.loop))
            cut = tuple(slice(sizes[d]) if isinstance(d, str) else slice(None) for d in port.dims)
            found[port.name] = np.ascontiguousarray(joined[cut])
        return found


def _match(port: PortRule, feeds: Arrays, sizes: dict[str, int]) -> None:
    """Check one input and add what its shape says to ``sizes``."""
    where = f"input '{port.name}'"
    if port.name not in feeds:
        msg = "no array was given"
        raise DataError(msg, where=where)
    array = feeds[port.name]
    if array.dtype.name != port.dtype:
        msg = f"expected {port.dtype}, got {array.dtype.name}"
        raise DataError(msg, where=where)
    expected = f"expected shape [{', '.join(map(str, port.dims))}], got {list(array.shape)}"
    if len(array.shape) != len(port.dims):
        raise DataError(expected, where=where)
    for dim, size in zip(port.dims, array.shape, strict=True):
        wanted = sizes.setdefault(dim, size) if isinstance(dim, str) else dim
        if size != wanted or size < 1:
            named = f", with {dim}={wanted}" if isinstance(dim, str) and size != wanted else ""
            raise DataError(expected + named, where=where)


def _padded(port: PortRule, array: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
    wanted = [
        sizes.get(d, size) if isinstance(d, str) else d
        for d, size in zip(port.dims, array.shape, strict=True)
    ]
    missing = [(0, want - size) for want, size in zip(wanted, array.shape, strict=True)]
    if not any(after for _, after in missing):
        return array
    assert port.pad is not None
    return np.pad(array, missing, constant_values=np.asarray(port.pad).astype(array.dtype))


def _element(port: PortRule, array: np.ndarray, loop: str, number: int) -> np.ndarray:
    """Return one element along the looped axis, which stays; an input without that axis serves every call."""
    if loop not in port.dims:
        return array
    return np.take(array, [number], axis=port.dims.index(loop))
