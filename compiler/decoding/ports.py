"""Inputs and outputs of a model as its callers see them: names, element types, sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir


@dataclass(frozen=True)
class Port:
    """An input or an output.

    Attributes:
        name: Its name.
        dtype: Element type; None if numpy has none (sequences, strings).
        dims: For each axis its size, the name of a size that varies, or None; None if the rank is unknown.
    """

    name: str
    dtype: np.dtype | None
    dims: tuple[int | str | None, ...] | None

    @property
    def rank(self) -> int:
        """Number of axes; -1 if unknown."""
        return -1 if self.dims is None else len(self.dims)

    def __str__(self) -> str:
        sizes = "?" if self.dims is None else ", ".join("?" if d is None else str(d) for d in self.dims)
        return f"'{self.name}' {self.dtype or 'of another type'}[{sizes}]"


@dataclass(frozen=True)
class ModelRun:
    """A model that can be called, and what it takes and gives.

    Attributes:
        call: Input name -> array in, output name -> array out.
        inputs: Its inputs.
        outputs: Its outputs.
        context: The most tokens that a decoder takes, or None if nobody knows.
    """

    call: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    context: int | None = None

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the model."""
        return self.call(feeds)


def ports_of(values: Iterable[ir.Value]) -> tuple[Port, ...]:
    """Return graph inputs or outputs as ports."""
    return tuple(_port(value) for value in values)


def _port(value: ir.Value) -> Port:
    dims = None
    if value.shape is not None:
        dims = tuple(d if isinstance(d, int) else (d.value or None) for d in value.shape)
    tensor = isinstance(value.type, ir.TensorType) and value.dtype is not None
    dtype = np.dtype(value.dtype.numpy()) if tensor and value.dtype is not ir.DataType.STRING else None  # type: ignore[union-attr]
    return Port(value.name or "", dtype, dims)
