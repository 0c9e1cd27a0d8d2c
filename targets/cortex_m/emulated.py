"""Running static executors: on an emulated board, whose files travel by semihosting, or as programs under Linux."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.compiler.errors import InfeasibleBudgetError, InternalError, ToolchainError, UsageError
from bitwright.compiler.lower.static_c.emit import RECORD_FILE
from bitwright.targets.backend import Execution, Measurement
from bitwright.targets.cortex_m.boards import board_of
from bitwright.targets.cortex_m.linking import PROGRAM_FILE, TRACED_FILE, is_linux
from bitwright.targets.schema import Profile
from bitwright.targets.toolchain.instruction_counter import plugin, read_counts
from bitwright.targets.toolchain.interface import Interface
from bitwright.targets.toolchain.process import run_tool

RUN_TIMEOUT_S = 1800.0
ON_BOARD, AS_PROGRAM = "emulated (board)", "emulated"
COUNTS_FILE = "counts"
Trace = list[tuple[str, tuple[np.ndarray, ...], np.ndarray]]


def why_not_executable(profile: Profile) -> str | None:
    """Return why this machine cannot emulate a board or processor for ``profile``, or None if it can."""
    emulator = profile.toolchain.emulator
    if emulator is None or (board_of(profile) is None and not is_linux(profile)):
        return f"profile '{profile.name}' names no emulated board"
    if shutil.which(emulator.command) is None:
        package = "qemu-user" if emulator.board is None else emulator.command
        return f"missing system packages: {package} (apt-get install {package})"
    if emulator.board is None:
        known = emulator.cpu in _listed(emulator.command, "-cpu")
        return None if known else f"this {emulator.command} does not know the processor '{emulator.cpu}'"
    if emulator.board not in _listed(emulator.command, "-M"):
        return f"this {emulator.command} does not know the board '{emulator.board}'"
    return None


@cache
def _listed(command: str, option: str) -> frozenset[str]:
    # Older releases print the list of processors and exit with 1.
    listing = run_tool([command, option, "help"], what="asking qemu", timeout_s=30, accepted=(0, 1))
    return frozenset(word for line in listing.splitlines() for word in line.split()[:1])


def execute(bundle: Path, feeds: Mapping[str, np.ndarray], profile: Profile, *, trace: bool) -> Execution:
    """Run a bundle's network once on one set of inputs.

    Args:
        bundle: Its ``lib`` holds the programs.
        feeds: Input name -> array.
        profile: Names the emulator and the board.
        trace: Record every integer kernel, in a second run of a program that does.

    Raises:
        DataError: ``feeds`` does not fit the model.
        InfeasibleBudgetError: It used more RAM than the device has.
        InternalError: It used more stack than was planned from its machine code.
        ToolchainError: There is no emulator, or the run failed.
    """
    lib = bundle.resolve() / "lib"
    interface, record = Interface.read(lib), read_record(lib)
    reason = why_not_executable(profile)
    if reason is not None:
        raise ToolchainError(reason, where=profile.name)
    with tempfile.TemporaryDirectory(prefix="bitwright-board-") as work:
        folder = Path(work)
        for number, array in enumerate(interface.arrange(feeds)):
            (folder / f"input_{number}").write_bytes(array.tobytes())
        _run(lib / PROGRAM_FILE, folder, profile)
        outputs = {
            port.name: np.frombuffer((folder / f"output_{k}").read_bytes(), port.dtype).reshape(port.shape)
            for k, port in enumerate(interface.outputs)
        }
        usage = _measured(folder, lib, record, profile)
        _check_stack(usage, record, profile)
        _check_ram(usage, profile)
        calls: Trace = []
        if trace:
            _run(lib / TRACED_FILE, folder, profile)
            calls = list(_read_trace((folder / "trace").read_bytes(), record["calls"]))
    executed = ON_BOARD if board_of(profile) is not None else AS_PROGRAM
    found = tuple(_measurements(usage, record, profile))
    return Execution(outputs, calls, executed, None, measurements=found)


def measure(bundle: Path, feeds: Mapping[str, np.ndarray], profile: Profile) -> dict[str, int]:
    """Run a bundle's network once and return what it used.

    Returns:
        ``stack_bytes``, ``arena_bytes``, ``io_bytes``, ``ram_bytes`` (their sum), ``code_bytes``,
        ``constant_bytes``, ``flash_bytes``, and ``instructions`` where they can be counted.
    """
    lib = bundle.resolve() / "lib"
    interface, record = Interface.read(lib), read_record(lib)
    with tempfile.TemporaryDirectory(prefix="bitwright-board-") as work:
        folder = Path(work)
        for number, array in enumerate(interface.arrange(feeds)):
            (folder / f"input_{number}").write_bytes(array.tobytes())
        _run(lib / PROGRAM_FILE, folder, profile)
        return _measured(folder, lib, record, profile)


def read_record(lib: Path) -> dict[str, Any]:
    """Return what lowering wrote about a network: its memory plan and its calls.

    Raises:
        UsageError: The file is missing or damaged.
    """
    try:
        record: dict[str, Any] = json.loads((lib / RECORD_FILE).read_text())
    except (OSError, ValueError) as error:
        msg = f"the network's record cannot be read: {error}"
        raise UsageError(msg, where=str(lib / RECORD_FILE)) from error
    return record


def _run(program: Path, folder: Path, profile: Profile) -> None:
    emulator = profile.toolchain.emulator
    assert emulator is not None
    if emulator.board is None:
        command = [emulator.command, "-cpu", emulator.cpu, *_counting(folder), str(program)]
    else:
        # icount with shift 0: a nanosecond an instruction, so the board's timer counts instructions.
        command = [emulator.command, "-M", emulator.board, "-nographic", "-icount", "shift=0"]
        command += ["-semihosting-config", "enable=on,target=native", "-kernel", str(program)]
    run_tool(command, what="running the network in the emulator", timeout_s=RUN_TIMEOUT_S, folder=folder)


def _counting(folder: Path) -> list[str]:
    """Return options that count instructions; none where the plug-in cannot be built."""
    try:
        return ["-plugin", f"{plugin()},out={folder / COUNTS_FILE}"]
    except ToolchainError:
        return []


def _instructions(folder: Path, ticks: int, profile: Profile) -> dict[str, int]:
    """Return the executed instructions, if anything counted them."""
    board = board_of(profile)
    if board is not None:
        return {"instructions": ticks * 1_000_000_000 // board.timer_hz}
    if not (folder / COUNTS_FILE).exists():
        return {}
    marks = read_counts(folder / COUNTS_FILE).marks
    return {"instructions": marks[1] - marks[0]}


def _measured(folder: Path, lib: Path, record: Mapping[str, Any], profile: Profile) -> dict[str, int]:
    stack, arena, ticks = struct.unpack("<3I", (folder / "usage").read_bytes())
    io_bytes = int(record["memory"]["io_bytes"])
    return {
        "stack_bytes": stack,
        "arena_bytes": arena,
        "io_bytes": io_bytes,
        "ram_bytes": stack + arena + io_bytes,
        **{name: int(size) for name, size in record["flash"].items()},
        **_instructions(folder, ticks, profile),
    }


def _check_stack(usage: Mapping[str, int], record: Mapping[str, Any], profile: Profile) -> None:
    planned = int(record["memory"]["stack_bytes"])
    if usage["stack_bytes"] > planned:
        what = f"the network used {usage['stack_bytes']} bytes of stack, and its machine code needs {planned}"
        raise InternalError(what, where=profile.name)


def _check_ram(usage: Mapping[str, int], profile: Profile) -> None:
    limit = profile.limits.ram_bytes
    if limit is not None and usage["ram_bytes"] > limit:
        what = f"the network used {usage['ram_bytes']} bytes of RAM; the target has {limit:.0f}"
        raise InfeasibleBudgetError(
            what, where=profile.name, fix="a smaller model or input, or a target with more memory"
        )


def _measurements(
    usage: Mapping[str, int], record: Mapping[str, Any], profile: Profile
) -> Iterator[Measurement]:
    planned, limits = int(record["memory"]["ram_bytes"]), profile.limits
    parts = (
        f"arena {usage['arena_bytes']}, inputs and outputs {usage['io_bytes']}, stack {usage['stack_bytes']}"
    )
    detail = f"{parts}; planned {planned}{_of(limits.ram_bytes)}"
    place = "RAM" if is_linux(profile) else "RAM on the board"
    yield Measurement(place, f"{usage['ram_bytes']} bytes", detail)
    parts = f"code {usage['code_bytes']}, constants {usage['constant_bytes']}"
    label = "Code and constants" if is_linux(profile) else "Flash"
    yield Measurement(label, f"{usage['flash_bytes']} bytes", f"{parts}{_of(limits.flash_bytes)}")
    if "instructions" in usage:
        what = "an inference; the emulator counts them, they are no cycles"
        yield Measurement("Instructions", f"{usage['instructions']}", what)


def _of(limit: float | None) -> str:
    return "" if limit is None else f"; the device has {limit:.0f}"


def _read_trace(
    data: bytes, calls: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, tuple[np.ndarray, ...], np.ndarray]]:
    """Yield function, activations and output of every recorded call."""
    at = 0
    for call in calls:
        arrays = []
        for entry in call["recorded"]:
            dtype, shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
            count = int(np.prod(shape, dtype=np.int64))
            if at + count * dtype.itemsize > len(data):
                msg = "the board's trace is cut short"
                raise ToolchainError(msg, where=str(call["function"]))
            arrays.append(np.frombuffer(data, dtype, count, at).reshape(shape))
            at += count * dtype.itemsize
        if arrays:
            yield str(call["function"]), tuple(arrays[:-1]), arrays[-1]
