"""Peak bytes of activations: what is alive at every step of a placement, executed in graph order.

A tensor lives from the step that writes it to the last step that reads it, graph outputs to the end. A value that is
quantized for integer readers and kept in float for others exists twice. What a Reshape returns is its input's memory.
Scratch memory of kernels and the padding of allocators are not counted: the figure is a lower bound that two runtimes
share, and ranks placements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod

import onnx_ir as ir

from bitwright.compiler.errors import ModelError
from bitwright.compiler.graph.cost import Shapes, shape_of
from bitwright.compiler.graph.model import constant_array, consumers, is_op
from bitwright.compiler.plan.cost import RuntimeName, widths
from bitwright.compiler.plan.latency import Chain, chains
from bitwright.compiler.plan.selection import Selection
from bitwright.targets.schema import Combo, Profile, Runtime

_VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")
_FLOAT_BYTES = 4.0
_HALF_BYTES = 2.0


@dataclass(frozen=True)
class Buffer:
    """A tensor in memory.

    Attributes:
        value: The tensor; a view belongs to what it is a view of.
        unit: Name of the unit that writes it, "" for a graph input.
        elements: How many.
        first: Step that writes it.
        last: Last step that reads it.
    """

    value: ir.Value
    unit: str
    elements: int
    first: int
    last: int


@dataclass(frozen=True)
class Peak:
    """The step at which most is alive.

    Attributes:
        bytes: Of activations, weights not included.
        step: Name of the unit that runs then.
        tensors: (tensor, bytes) alive then, largest first.
        unknown: Tensors left out because their shape is unknown.
    """

    bytes: int
    step: str
    tensors: tuple[tuple[str, int], ...]
    unknown: tuple[str, ...] = ()


def buffers(selection: Selection, runtime: Runtime, shapes: Shapes) -> tuple[list[Buffer], tuple[str, ...]]:
    """Return every activation tensor with the steps between which it lives, and the names of unknown shape.

    Step ``k`` is the ``k``-th of :func:`bitwright.compiler.plan.latency.chains`; which tensors exist, and how long,
    does not depend on formats, so one call serves every allocation.

    Args:
        selection: Any placement of the model.
        runtime: The table it was planned for.
        shapes: Static shape of every tensor.
    """
    steps = chains(selection, runtime)
    step_of = {node: k for k, chain in enumerate(steps) for node in (chain.unit.head, *chain.tail)}
    spans: dict[ir.Value, tuple[str, int, int]] = {}
    for value, unit, born in _written(steps):
        last = _last_read(value, born, step_of, len(steps))
        root = _viewed(value, spans)
        if root is not None:
            name, first, known = spans[root]
            spans[root] = (name, first, max(known, last))
            spans[value] = spans[root]
        else:
            spans[value] = (unit, born, last)
    return _sized(spans, shapes)


def live_at(found: Sequence[Buffer], steps: int) -> list[list[Buffer]]:
    """Return, for every step, the buffers that are alive while it runs."""
    return [[b for b in found if b.first <= k <= b.last] for k in range(steps)]


def written_bytes(buffer: Buffer, fmt: str, combo: Combo | None, profile: Profile) -> float:
    """Return the bytes of a buffer if its unit runs in a format: of the integers that its kernel prefers to write.

    Args:
        buffer: From :func:`buffers`.
        fmt: Format of the unit.
        combo: Its kernel, None in floating point.
        profile: The target.
    """
    if not _is_float(buffer.value):
        return buffer.elements * _item_bytes(buffer.value)
    if combo is None:
        return buffer.elements * (_HALF_BYTES if fmt in ("fp16", "bf16") else _FLOAT_BYTES)
    out = profile.qspace(combo.out[0])
    if out.calibrated:
        return float(ceil(buffer.elements * max(out.bits, 8) / 8))
    return buffer.elements * (_FLOAT_BYTES if out.float_type in (None, "f32") else _HALF_BYTES)


def peak_activation_bytes(
    selection: Selection, profile: Profile, runtime: RuntimeName, shapes: Shapes
) -> Peak:
    """Return the step of a placement at which most bytes of activations are alive.

    Args:
        selection: Which units run in which format.
        profile: The target.
        runtime: Which of the two runtimes.
        shapes: Static shape of every tensor at the planning sizes.
    """
    table = profile.runtimes.artifact if runtime == "artifact" else profile.runtimes.onnxruntime
    steps = chains(selection, table)
    found, unknown = buffers(selection, table, shapes)
    sizes = _placed_bytes(found, selection, steps, profile)
    live = live_at(found, len(steps))
    totals = [sum(sizes[b.value] for b in alive) for alive in live]
    if not totals:
        return Peak(0, "", (), unknown)
    worst = max(range(len(totals)), key=totals.__getitem__)
    tensors = sorted(((b.value.name or "", sizes[b.value]) for b in live[worst]), key=lambda t: (-t[1], t[0]))
    return Peak(totals[worst], steps[worst].unit.name, tuple(tensors), unknown)


def _written(steps: Sequence[Chain]) -> list[tuple[ir.Value, str, int]]:
    """Return (tensor, unit, step) in order of writing: graph inputs at the step that reads them first."""
    made = {v for chain in steps for node in (chain.unit.head, *chain.tail) for v in node.outputs}
    result: list[tuple[ir.Value, str, int]] = []
    entering: set[ir.Value] = set()
    for k, chain in enumerate(steps):
        for node in (chain.unit.head, *chain.tail):
            for value in node.inputs:
                if value is None or value in made or value in entering or constant_array(value) is not None:
                    continue
                entering.add(value)
                result.append((value, "", 0))
        last = chain.tail[-1] if chain.tail else chain.unit.head
        result += [(v, chain.unit.name, k) for v in last.outputs if v.name]
    return result


def _last_read(value: ir.Value, born: int, step_of: Mapping[ir.Node, int], steps: int) -> int:
    if value.is_graph_output():
        return steps - 1
    return max([born, *(step_of[n] for n in consumers(value) if n in step_of)])


def _viewed(value: ir.Value, spans: Mapping[ir.Value, tuple[str, int, int]]) -> ir.Value | None:
    """Return what a value is a view of, through any number of views."""
    root: ir.Value | None = None
    node = value.producer()
    while node is not None and is_op(node, *_VIEWS):
        source = node.inputs[0]
        if source is None or source not in spans:
            break
        root, node = source, source.producer()
    return root


def _sized(
    spans: Mapping[ir.Value, tuple[str, int, int]], shapes: Shapes
) -> tuple[list[Buffer], tuple[str, ...]]:
    found: list[Buffer] = []
    unknown: list[str] = []
    for value, (unit, first, last) in spans.items():
        if _viewed(value, spans) is not None:
            continue
        node = value.producer() or next(iter(consumers(value)))
        try:
            found.append(Buffer(value, unit, prod(shape_of(value, shapes, node)), first, last))
        except ModelError:
            unknown.append(value.name or "")
    return found, tuple(unknown)


def _placed_bytes(
    found: Sequence[Buffer], selection: Selection, steps: Sequence[Chain], profile: Profile
) -> dict[ir.Value, int]:
    """Return the bytes of every tensor in a placement: its float form, its integer form, or both."""
    chain_of = {chain.unit.name: chain for chain in steps}
    readers = {v: u for u in reversed(selection.units) if u in selection.integer for v in u.activations}
    result = {}
    for buffer in found:
        chain = chain_of.get(buffer.unit)
        total = 0.0
        if chain is None or chain.writes != "q" or buffer.value in selection.float_readers:
            half = chain is not None and chain.format in ("fp16", "bf16")
            each = _HALF_BYTES if half else _FLOAT_BYTES
            total += buffer.elements * (each if _is_float(buffer.value) else _item_bytes(buffer.value))
        if buffer.value in selection.quantized:
            reader = readers.get(buffer.value, chain.unit if chain is not None else None)
            combo = None if reader is None else reader.combo
            total += buffer.elements * widths(combo, profile)[0]
        result[buffer.value] = ceil(total)
    return result


def _is_float(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype.is_floating_point()


def _item_bytes(value: ir.Value) -> float:
    return _FLOAT_BYTES if value.dtype is None else float(value.dtype.itemsize)
