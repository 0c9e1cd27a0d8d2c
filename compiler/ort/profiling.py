"""Seconds of every kernel inside one call of a model, from ONNX Runtime's own profile."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from bitwright.compiler.ort.audit import read_optimized
from bitwright.compiler.ort.session import SessionConfig, open_session, run

# Times are whole microseconds, rounded down.
ROUNDED_OFF_S = 0.5e-6
# Between two kernels ONNX Runtime looks up and allocates their tensors.
MOST_START_S = 1e-6
_KERNEL = "_kernel_time"
_SHARE_OF_CALLS = (10, 50)


@dataclass(frozen=True)
class Kernel:
    """One node of the graph that ONNX Runtime executes.

    Attributes:
        name: Its name there.
        op: Operator type there, e.g. ``QLinearConv``.
        inputs: Names of the tensors it reads.
        outputs: Names of the tensors it writes.
        seconds: Of one call.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class CallProfile:
    """Where the time of one call goes.

    Attributes:
        kernels: In execution order; their seconds and ``call_s`` add up to ``seconds``.
        seconds: Of one call, measured without profiling.
        call_s: Seconds of an empty call: what running no kernel at all takes.
    """

    kernels: tuple[Kernel, ...]
    seconds: float
    call_s: float


def profile_call(
    model: ir.Model, config: SessionConfig, feeds: Mapping[str, np.ndarray], *, seconds: float = 1.0
) -> CallProfile:
    """Measure one call of a model and of every kernel in it, in fresh sessions.

    Profiling slows a call down and rounds to microseconds, so the kernels' times are scaled to what the call takes
    without it.

    Args:
        model: Any model that ONNX Runtime runs.
        config: Session options.
        feeds: Inputs of the call.
        seconds: About how long to measure.

    Raises:
        ModelError: ONNX Runtime cannot load the model.
        DataError: It fails on these inputs.
    """
    with tempfile.TemporaryDirectory(prefix="bitwright-") as folder:
        kernels = _profiled(model, config, feeds, Path(folder), seconds / 2)
    total = call_seconds(model, config, feeds, seconds / 2)
    empty = min(_empty_call_s(config, feeds), total / 2)
    return CallProfile(_scaled(kernels, total - empty), total, empty)


def median_profile(found: Sequence[CallProfile]) -> CallProfile:
    """Return the medians over several profiles of one model.

    Where a session's buffers lie changes its speed for its whole life, so one session is no measurement; and sessions
    that are opened one right after the other share whatever else the machine does at that moment.
    """
    rows = zip(*(p.kernels for p in found), strict=True)
    kernels = [replace(row[0], seconds=float(np.median([k.seconds for k in row]))) for row in rows]
    total = float(np.median([p.seconds for p in found]))
    empty = float(np.median([p.call_s for p in found]))
    return CallProfile(_scaled(kernels, total - empty), total, empty)


def _empty_call_s(config: SessionConfig, feeds: Mapping[str, np.ndarray]) -> float:
    """Return the seconds of a call that runs one trivial kernel on inputs like ``feeds``."""
    values = [
        ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(a.dtype)), shape=ir.Shape(a.shape))
        for name, a in feeds.items()
    ]
    size = ir.Node("", "Size", [values[0]], num_outputs=1)
    size.outputs[0].name, size.outputs[0].dtype = "size", ir.DataType.INT64
    size.outputs[0].shape = ir.Shape([])
    graph = ir.Graph(values, size.outputs, nodes=[size], opset_imports={"": 20}, name="empty")
    return call_seconds(ir.Model(graph, ir_version=10), config, feeds, 0.03)


def _scaled(kernels: Sequence[Kernel], total: float) -> tuple[Kernel, ...]:
    """Make the kernels' times add up to ``total``: a shortfall is first what starting each costs, then shared."""
    known = sum(k.seconds for k in kernels)
    start = min(max(total - known, 0.0) / max(len(kernels), 1), MOST_START_S)
    factor = max(total - start * len(kernels), 0.0) / known if known > 0 else 1.0
    return tuple(replace(k, seconds=k.seconds * factor + start) for k in kernels)


def _seconds_of_one(session: ort.InferenceSession, feeds: Mapping[str, np.ndarray], threads: int) -> float:
    """CPU seconds of this thread where it computes alone, else wall seconds."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    start = clock()
    run(session, feeds)
    return clock() - start


def call_seconds(
    model: ir.Model, config: SessionConfig, feeds: Mapping[str, np.ndarray], budget_s: float
) -> float:
    """Return the median seconds of a call in one fresh session: of CPU where one thread computes, else of wall time.

    Args:
        model: Any model that ONNX Runtime runs.
        config: Session options.
        feeds: Inputs of the call.
        budget_s: About how long to measure.
    """
    session = open_session(model, config)
    once = max(min(_seconds_of_one(session, feeds, config.threads) for _ in range(3)), 1e-6)
    rounds = 7
    calls = max(1, min(2000, int(budget_s / rounds / once)))
    clock = time.thread_time if config.threads == 1 else time.perf_counter
    found = []
    for _ in range(rounds):
        start = clock()
        for _ in range(calls):
            run(session, feeds)
        found.append((clock() - start) / calls)
    return float(np.median(found))


def _profiled(
    model: ir.Model, config: SessionConfig, feeds: Mapping[str, np.ndarray], folder: Path, budget_s: float
) -> list[Kernel]:
    graph_file = folder / "optimized.onnx"
    session = open_session(model, config, optimized_path=graph_file, profile_prefix=folder / "profile")
    run(session, feeds)
    start = time.perf_counter()
    run(session, feeds)
    once = max(time.perf_counter() - start, 1e-6)
    for _ in range(max(5, min(500, int(budget_s / once)))):
        run(session, feeds)
    durations = _durations(Path(session.end_profiling()))
    return [_kernel(node, durations) for node in read_optimized(graph_file).graph]


def _kernel(node: ir.Node, durations: Mapping[str, list[float]]) -> Kernel:
    found = durations.get(node.name or "", [])
    return Kernel(
        node.name or "",
        node.op_type,
        tuple(v.name for v in node.inputs if v is not None and v.name),
        tuple(v.name for v in node.outputs if v.name),
        _typical(found) if found else 0.0,
    )


def _durations(path: Path) -> dict[str, list[float]]:
    """Return node name -> seconds of each of its calls."""
    durations: dict[str, list[float]] = defaultdict(list)
    for event in json.loads(path.read_text("utf-8")):
        name = event.get("name", "")
        if event.get("cat") == "Node" and name.endswith(_KERNEL):
            durations[name[: -len(_KERNEL)]].append(event["dur"] * 1e-6 + ROUNDED_OFF_S)
    return durations


def _typical(seconds: list[float]) -> float:
    """Return the mean of the faster half: whole microseconds need a mean, another job's interruptions no voice."""
    low, high = np.percentile(seconds, _SHARE_OF_CALLS)
    return float(np.mean([s for s in seconds if low <= s <= high]))


_SUFFIX = re.compile(r"(_token_\d+|_nchwc|_nhwc|_quant|_reordered|/\w*Fusion/?)$")


def original_name(name: str) -> str:
    """Return the name that ONNX Runtime derived a node's or a tensor's name from."""
    while (shorter := _SUFFIX.sub("", name)) != name and shorter:
        name = shorter
    return name
