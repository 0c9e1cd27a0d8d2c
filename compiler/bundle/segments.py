"""Artifacts in segments: libraries, and ONNX files for what could not be lowered, executed one after the other.

A folder ``lib`` with a ``segments.json`` holds, for segment K, either ``segment_K/`` with ``model.so``,
``interface.json``, ``roles.txt`` and ``kernels.json``, or ``segment_K.onnx``. The runner and TVM's runtime libraries
are shared by all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bitwright.compiler.errors import UsageError
from bitwright.compiler.lower.job import LoweredSegment
from bitwright.compiler.lower.kernel_table import KernelCall, activation_counts, dump_table, load_table
from bitwright.compiler.program.ops import Tensor
from bitwright.compiler.program.segments import NotLowered
from bitwright.targets.backend import Execution
from bitwright.targets.toolchain.interface import Interface, Port

SEGMENTS_FILE = "segments.json"
KERNEL_TABLE_FILE = "kernels.json"
# What an Execution says of an artifact without a library.
ONLY_ONNXRUNTIME = "onnxruntime"

Arrays = Mapping[str, np.ndarray]
RunLibrary = Callable[[str, Arrays], Execution]
RunModel = Callable[[Path, Arrays], Arrays]


class SegmentRecord(BaseModel):
    """One segment of an artifact.

    Attributes:
        executor: Who executes it.
        path: Its folder or ONNX file, in ``lib``.
        inputs: Tensors it reads: the model's inputs or outputs of earlier segments.
        outputs: Tensors it computes, in the library's order.
        steps: Names of its steps.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    executor: Literal["kernels", "onnxruntime"]
    path: str = Field(pattern=r"^segment_[0-9]+(\.onnx)?$")
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    steps: tuple[str, ...]


class NotLoweredRecord(BaseModel):
    """Nodes that are left to ONNX Runtime, as in :class:`~bitwright.compiler.program.segments.NotLowered`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    nodes: tuple[str, ...]
    operators: tuple[str, ...]
    reason: str


class SegmentList(BaseModel):
    """The content of segments.json.

    Attributes:
        version: Of this layout.
        segments: In execution order.
        not_lowered: Why there are segments at all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: Literal[1] = 1
    segments: tuple[SegmentRecord, ...] = Field(min_length=1)
    not_lowered: tuple[NotLoweredRecord, ...]

    @property
    def has_library(self) -> bool:
        """At least one segment is compiled."""
        return any(segment.executor == "kernels" for segment in self.segments)

    def findings(self) -> tuple[NotLowered, ...]:
        """Return what is left to ONNX Runtime."""
        return tuple(NotLowered(f.nodes, f.operators, f.reason) for f in self.not_lowered)


def segment_path(number: int, segment: LoweredSegment) -> str:
    """Return the name of a segment's folder or file in ``lib``."""
    return f"segment_{number}" if segment.model is None else segment.model.name


def write_segments(lib: Path, segments: Sequence[LoweredSegment], not_lowered: Sequence[NotLowered]) -> None:
    """Write ``segments.json``, and the interface and kernel table of every library."""
    for number, segment in enumerate(segments):
        if segment.model is None:
            folder = lib / segment_path(number, segment)
            folder.mkdir(exist_ok=True)
            roles = activation_counts(segment.kernel_table)
            Interface(_ports(segment.inputs), _ports(segment.outputs), roles).write(folder)
            (folder / KERNEL_TABLE_FILE).write_text(dump_table(segment.kernel_table))
    content = SegmentList(
        segments=tuple(_record(number, segment) for number, segment in enumerate(segments)),
        not_lowered=tuple(NotLoweredRecord(**asdict(found)) for found in not_lowered),
    )
    (lib / SEGMENTS_FILE).write_text(content.model_dump_json(indent=1) + "\n")


def _ports(tensors: Sequence[Tensor]) -> tuple[Port, ...]:
    return tuple(Port(t.name, t.dtype, t.shape) for t in tensors)


def _record(number: int, segment: LoweredSegment) -> SegmentRecord:
    return SegmentRecord(
        executor=segment.executor,
        path=segment_path(number, segment),
        inputs=tuple(t.name for t in segment.inputs),
        outputs=tuple(t.name for t in segment.outputs),
        steps=segment.steps,
    )


def read_segments(lib: Path) -> SegmentList | None:
    """Return the artifact's segments, or None if it is one library.

    Raises:
        UsageError: segments.json is damaged.
    """
    path = lib / SEGMENTS_FILE
    if not path.exists():
        return None
    try:
        return SegmentList.model_validate_json(path.read_bytes())
    except ValidationError as error:
        msg = f"the list of segments is damaged: {error.errors()[0]['msg']}"
        raise UsageError(msg, where=str(path)) from error


def read_kernel_table(lib: Path) -> tuple[KernelCall, ...]:
    """Return the kernel calls of the whole artifact, in the order that :func:`execute_segments` records them."""
    found = read_segments(lib)
    folders = [lib] if found is None else [lib / s.path for s in found.segments if s.executor == "kernels"]
    return tuple(call for folder in folders for call in load_table((folder / KERNEL_TABLE_FILE).read_text()))


def execute_segments(
    lib: Path, feeds: Arrays, *, library: RunLibrary, model: RunModel, repeat: int = 1
) -> Execution:
    """Run the segments of an artifact on one set of inputs.

    Args:
        lib: Folder with ``segments.json``.
        feeds: Input name -> array.
        library: Runs a library: name of its folder in ``lib``, inputs.
        model: Runs an ONNX file in ONNX Runtime.
        repeat: Timed runs of every ONNX file; 0 for none.

    Returns:
        The trace is that of all libraries. ``seconds`` is the sum of the segments' best times, without the
        time to hand tensors over; None if one of them has none.

    Raises:
        DataError: ``feeds`` does not fit the model.
        ToolchainError: A library cannot be run.
    """
    found, interface = read_segments(lib), Interface.read(lib)
    assert found is not None
    ports = zip(interface.inputs, interface.arrange(feeds), strict=True)
    values: dict[str, np.ndarray] = {port.name: array for port, array in ports}
    done: list[Execution] = []
    for segment in found.segments:
        inputs = {name: values[name] for name in segment.inputs}
        if segment.executor == "kernels":
            done.append(library(segment.path, inputs))
        else:
            done.append(_run_model(lib / segment.path, inputs, model, repeat))
        values |= done[-1].outputs
    times = [part.seconds for part in done if part.seconds is not None]
    executed = {part.executed for part in done if part.executed != ONLY_ONNXRUNTIME}
    return Execution(
        outputs={port.name: values[port.name] for port in interface.outputs},
        trace=[call for part in done for call in part.trace],
        executed=executed.pop() if executed else ONLY_ONNXRUNTIME,
        seconds=sum(times) if len(times) == len(done) else None,
    )


def _run_model(path: Path, inputs: Arrays, model: RunModel, repeat: int) -> Execution:
    outputs = model(path, inputs)  # opens it the first time
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        model(path, inputs)
        times.append(time.perf_counter() - start)
    return Execution(outputs=outputs, trace=(), executed=ONLY_ONNXRUNTIME, seconds=min(times, default=None))
