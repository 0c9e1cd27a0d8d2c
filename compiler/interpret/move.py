"""Move and QConcat: integers change place, never value."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bitwright.compiler.errors import InternalError
from bitwright.compiler.program.ops import Move, QConcat, Tensor


def move(step: Move, x: np.ndarray, output: Tensor) -> np.ndarray:
    """Run a Move on integers ``x``; returns integers of the output's shape.

    Raises:
        InternalError: The kind is not one that the program defines.
    """
    kind = KINDS.get(step.kind)
    if kind is None:
        what = f"there is no Move of kind '{step.kind}'"
        raise InternalError(what, where=f"step '{step.name}'")
    return np.ascontiguousarray(kind(step, x, output))


def concat(step: QConcat, inputs: tuple[np.ndarray, ...]) -> np.ndarray:
    """Run a QConcat."""
    return np.concatenate(inputs, axis=step.axis)


def _slice(step: Move, x: np.ndarray, output: Tensor) -> np.ndarray:
    triples = zip(step.starts, step.steps, output.shape, strict=True)
    return x[np.ix_(*[start + stride * np.arange(count) for start, stride, count in triples])]


def _pad(step: Move, x: np.ndarray, _output: Tensor) -> np.ndarray:
    widths = [(step.pads[d], step.pads[d + x.ndim]) for d in range(x.ndim)]
    return np.pad(x, widths, constant_values=step.fill)


KINDS: dict[str, Callable[[Move, np.ndarray, Tensor], np.ndarray]] = {
    "reshape": lambda _step, x, output: x.reshape(output.shape),
    "transpose": lambda step, x, _output: x.transpose(step.perm),
    "slice": _slice,
    "resize_nearest": lambda step, x, _output: x[np.ix_(*step.indices)],
    "pad": _pad,
    "expand": lambda _step, x, output: np.broadcast_to(x, output.shape),
}
