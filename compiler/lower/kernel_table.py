"""The kernel calls of a compiled module, in execution order: maps a recorded trace back to the Program.

The n-th entry describes the n-th kernel call of ``main``. No tvm here: bundles and verifiers read it as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bitwright.compiler.errors import InternalError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Stored:
    """How one tensor of the Program lies in a kernel's buffer.

    Attributes:
        tensor: Name in the Program.
        shape: Logical shape.
        order: Logical axes, outermost in memory first.
        dtype: numpy name.
        argument: Position among the kernel's arguments.
        buffer_shape: Shape the kernel declares for the buffer; same number of elements as ``shape``.
    """

    tensor: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    dtype: str
    argument: int
    buffer_shape: tuple[int, ...]


@dataclass(frozen=True)
class KernelCall:
    """One call of an integer kernel.

    Attributes:
        step: Name of the Program step, or None for a change of storage order between two steps.
        operation: Class name of the step (``QConv``, ...), ``Move.slice``, ... or ``Layout``.
        function: Symbol of the kernel; several calls may share it.
        occurrence: This is the n-th call of that function in ``main``, from 0.
        intrinsic: Compute row it is built on, or ``llvm``.
        inputs: Activations, in the order of the step's inputs. A Layout call has one.
        output: Written tensor; for a Layout call the same tensor in another order.
    """

    step: str | None
    operation: str
    function: str
    occurrence: int
    intrinsic: str
    inputs: tuple[Stored, ...]
    output: Stored


def to_logical(array: np.ndarray, stored: Stored) -> np.ndarray:
    """Return a recorded buffer as a row-major array of the tensor's logical shape.

    Args:
        array: The kernel's argument, any shape with the right number of elements.
        stored: The entry's description of that argument.

    Raises:
        InternalError: Element count or dtype differ from the description.
    """
    if array.size != int(np.prod(stored.shape, dtype=np.int64)) or array.dtype.name != stored.dtype:
        what = f"recorded {array.dtype.name}{list(array.shape)}, expected {stored.dtype}{list(stored.shape)}"
        raise InternalError(what, where=stored.tensor)
    physical = array.reshape([stored.shape[axis] for axis in stored.order])
    return np.ascontiguousarray(np.transpose(physical, np.argsort(stored.order)))


def activation_counts(table: Sequence[KernelCall]) -> dict[str, int]:
    """Return how many leading arguments of each kernel are activations; the last argument is its output."""
    return {call.function: len(call.inputs) for call in table}


def dump_table(table: Sequence[KernelCall]) -> str:
    """Return the table as JSON text."""
    return json.dumps({"version": FORMAT_VERSION, "calls": [asdict(call) for call in table]}, indent=1) + "\n"


def load_table(text: str) -> tuple[KernelCall, ...]:
    """Return the table that ``dump_table`` wrote.

    Raises:
        InternalError: The text is not such a table.
    """
    try:
        data = json.loads(text)
        if data["version"] != FORMAT_VERSION:
            what = f"kernel table has version {data['version']}, expected {FORMAT_VERSION}"
            raise InternalError(what)
        return tuple(_call(item) for item in data["calls"])
    except (ValueError, KeyError, TypeError) as error:
        what = f"not a kernel table: {error}"
        raise InternalError(what) from error


def _call(item: dict[str, Any]) -> KernelCall:
    inputs = tuple(_stored(entry) for entry in item["inputs"])
    return KernelCall(**{**item, "inputs": inputs, "output": _stored(item["output"])})


def _stored(item: dict[str, Any]) -> Stored:
    tuples = {key: tuple(int(v) for v in item[key]) for key in ("shape", "order", "buffer_shape")}
    return Stored(**{**item, **tuples})
