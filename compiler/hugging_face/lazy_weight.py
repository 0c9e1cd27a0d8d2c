"""Initializers that stay in the checkpoint: read, converted and turned piece by piece when somebody asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from bitwright.compiler.errors import ModelError
from bitwright.compiler.hugging_face.checkpoint import Checkpoint
from bitwright.compiler.hugging_face.names import Part

# What is in memory of a weight while it is written.
PIECE_BYTES = 16 << 20


class LazyWeight(ir.LazyTensor):
    """A weight of a checkpoint as an initializer; nobody keeps its values.

    Attributes:
        part: Which one.
        transposed: The initializer is (inputs, outputs), the checkpoint has (outputs, inputs).
    """

    def __init__(self, checkpoint: Checkpoint, part: Part, dtype: ir.DataType, *, transposed: bool) -> None:
        """Describe a weight.

        Args:
            checkpoint: Where it is.
            part: Which one.
            dtype: FLOAT or FLOAT16.
            transposed: Give it as (inputs, outputs).
        """
        self.part, self.transposed = part, transposed
        self._checkpoint = checkpoint
        shape = part.shape[::-1] if transposed else part.shape
        # No bound method: its representation would be that of this tensor, which shows its function's.
        super().__init__(lambda: self._whole(), dtype, ir.Shape(shape), name=part.name)

    def pieces(self) -> Iterator[np.ndarray]:
        """Yield rows of the initializer in order, some megabytes at a time.

        Raises:
            ModelError: A value is NaN or infinity, or is so in 16 bits.
        """
        rows, *rest = (int(n) for n in self.shape.numpy())
        step = max(1, PIECE_BYTES // (4 * int(np.prod(rest))))
        for start, stop in pairwise([*range(0, rows, step), rows]):
            index = (slice(None), slice(start, stop)) if self.transposed else (slice(start, stop),)
            values = self._checkpoint.read(self.part, index)
            yield self._converted(values.T if self.transposed else values)

    def tofile(self, file: BinaryIO) -> None:
        """Write the bytes to an open file."""
        for piece in self.pieces():
            file.write(piece.data)

    def tobytes(self) -> bytes:
        """Return the bytes."""
        return b"".join(piece.tobytes() for piece in self.pieces())

    def _whole(self) -> ir.Tensor[np.ndarray]:
        values = np.empty(tuple(int(n) for n in self.shape.numpy()), self.dtype.numpy())
        start = 0
        for piece in self.pieces():
            values[start : start + len(piece)] = piece
            start += len(piece)
        return ir.Tensor(values, dtype=self.dtype, name=self.name)

    def _converted(self, values: np.ndarray) -> np.ndarray:
        """Return values in the initializer's type and the order of their bytes."""
        with np.errstate(over="ignore"):
            found = np.ascontiguousarray(values, self.dtype.numpy())
        if not np.isfinite(found).all():
            msg = f"tensor '{self.part.name}' has values beyond 65504, which float16 does not reach"
            raise ModelError(msg, where=str(self._checkpoint.folder), fix="pass --dtype float32")
        return found
