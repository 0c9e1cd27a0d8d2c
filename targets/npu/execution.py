"""Running an artifact's programs: outputs, every kernel's operands, cycles of every kernel of the accelerator."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitwright.compiler.errors import InternalError, UsageError
from bitwright.compiler.lower.kernel_table import KernelCall, Stored, load_table, to_logical
from bitwright.targets.toolchain.interface import Interface
from bitwright.targets.toolchain.process import run_tool

RUN_TIMEOUT_S = 1800.0
TABLE_FILE, CYCLES_FILE = "kernels.json", "cycles.json"
ON_ARRAY = "systolic"


@dataclass(frozen=True)
class Run:
    """What one run of a program gave.

    Attributes:
        outputs: Output name -> array.
        calls: Every integer kernel call: its record, its activations and its output, as logical arrays.
        cycles: Cycles of every kernel of the accelerator, in the order of its calls.
    """

    outputs: Mapping[str, np.ndarray]
    calls: Sequence[tuple[KernelCall, tuple[np.ndarray, ...], np.ndarray]]
    cycles: tuple[int, ...]


def run_program(folder: Path, program: str, feeds: Mapping[str, np.ndarray]) -> Run:
    """Run one of an artifact's programs on one set of inputs.

    Args:
        folder: The artifact's.
        program: File name of the program.
        feeds: Input name -> array.

    Raises:
        DataError: ``feeds`` does not fit the model.
        ToolchainError: The program failed.
        InternalError: Its trace is not what the table says.
    """
    folder = folder.resolve()
    interface = Interface.read(folder)
    with tempfile.TemporaryDirectory(prefix="bitwright-npu-") as place:
        work = Path(place)
        for number, array in enumerate(interface.arrange(feeds)):
            (work / f"input_{number}").write_bytes(array.tobytes())
        run_tool([str(folder / program)], what=f"running {program}", timeout_s=RUN_TIMEOUT_S, folder=work)
        outputs = {
            port.name: np.frombuffer((work / f"output_{k}").read_bytes(), port.dtype).reshape(port.shape)
            for k, port in enumerate(interface.outputs)
        }
        calls = _read_trace((work / "trace").read_bytes(), read_table(folder))
        ends = np.frombuffer((work / "cycles").read_bytes(), np.int64)
    return Run(outputs, calls, tuple(int(c) for c in np.diff(ends, prepend=0)))


def read_table(folder: Path) -> tuple[KernelCall, ...]:
    """Return an artifact's integer kernel calls.

    Raises:
        UsageError: The file is missing.
    """
    try:
        return load_table((folder / TABLE_FILE).read_text())
    except OSError as error:
        msg = f"the kernel table cannot be read: {error}"
        raise UsageError(msg, where=str(folder)) from error


def _read_trace(
    data: bytes, table: Sequence[KernelCall]
) -> list[tuple[KernelCall, tuple[np.ndarray, ...], np.ndarray]]:
    found, at = [], 0

    def take(stored: Stored) -> np.ndarray:
        nonlocal at
        count = int(np.prod(stored.buffer_shape, dtype=np.int64))
        size = count * np.dtype(stored.dtype).itemsize
        if at + size > len(data):
            what = f"the trace ends inside '{stored.tensor}'"
            raise InternalError(what)
        array = np.frombuffer(data, stored.dtype, count, at)
        at += size
        return to_logical(array, stored)

    for call in table:
        found.append((call, tuple(take(stored) for stored in call.inputs), take(call.output)))
    if at != len(data):
        what = f"the trace has {len(data)} bytes, its calls {at}"
        raise InternalError(what)
    return found


def read_cycles(folder: Path) -> dict[str, int]:
    """Return what the cycle model predicts: step -> cycles, in execution order.

    Raises:
        UsageError: The file is missing or damaged.
    """
    try:
        found = json.loads((folder / CYCLES_FILE).read_text())
        return {str(step): int(entry["cycles"]) for step, entry in found.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f"the predicted cycles cannot be read: {error}"
        raise UsageError(msg, where=str(folder / CYCLES_FILE)) from error
