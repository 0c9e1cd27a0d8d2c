"""Integer steps of any number of rows: which of them treat rows alike, and their kernels for a few rows.

A row is what one position of a sequence holds. A step qualifies if its tensors hold their rows one behind the other
and it treats each for itself: products with constant weights, quantizers, elementwise functions and look-ups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from bitwright.compiler.lower.dynamic.blocks import BLOCKS
from bitwright.compiler.lower.dynamic.sizes import Polynomial, Size, fitted
from bitwright.compiler.lower.kernel_table import KernelCall, Stored
from bitwright.compiler.lower.kernels.edge import dequantize, quantize
from bitwright.compiler.lower.kernels.elementwise import add, look_up, multiply
from bitwright.compiler.lower.kernels.move import concat, move, reorder
from bitwright.compiler.lower.layout import Order
from bitwright.compiler.lower.relax_module import DotKernel
from bitwright.compiler.program.ops import (
    Dequantize,
    Move,
    Program,
    QAdd,
    QConcat,
    QGemm,
    QLut,
    QMul,
    Quantize,
    Step,
    WeightOnlyDot,
)
from bitwright.targets.backend import Kernel
from bitwright.targets.schema import Profile

_MAPS: dict[type[Step], Callable[..., Kernel]] = {
    Quantize: quantize,
    Dequantize: dequantize,
    QAdd: add,
    QMul: multiply,
    QLut: look_up,
}


class NoRows(Exception):  # noqa: N818
    """A step mixes the positions of the sequence; the message says how."""


@dataclass(frozen=True)
class RowStep:
    """A kernel call that treats every row for itself.

    Attributes:
        rows: How many there are.
        following: Positions of its inputs that hold rows; the others are the same for all.
        step: Of the program; None for a change of storage order.
        program: With the tensors of the call as large as for one row.
        call: Of the table.
        splits: Tensor -> the axis, in memory order, that counts rows; those before it have one element.
    """

    rows: Size
    following: tuple[int, ...]
    step: Step | None
    program: Program
    call: KernelCall
    splits: Mapping[str, int]

    def kernel(self, rows: int, dot_kernel: DotKernel, profile: Profile) -> Kernel:
        """Return the kernel for so many rows."""
        tensors = dict(self.program.tensors)
        orders: dict[str, Order] = {}
        for stored in (*self.call.inputs, self.call.output):
            orders[stored.tensor] = stored.order
            if stored.tensor in self.splits:
                axis = stored.order[self.splits[stored.tensor]]
                shape = list(tensors[stored.tensor].shape)
                shape[axis] = rows
                tensors[stored.tensor] = replace(tensors[stored.tensor], shape=tuple(shape))
        program = replace(self.program, tensors=tensors)
        if self.step is None:
            name = self.call.output.tensor
            return reorder(tensors[name], self.call.inputs[0].order, self.call.output.order)
        if isinstance(self.step, QGemm | WeightOnlyDot):
            return dot_kernel(self.step, program, profile)
        if isinstance(self.step, QConcat):
            return concat(self.step, program, orders)
        if isinstance(self.step, Move):
            return move(self.step, program, orders)
        return _MAPS[type(self.step)](self.step, program, orders)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Numbers of rows, falling, that it has kernels for beside the one for a single row."""
        return BLOCKS if isinstance(self.step, QGemm | WeightOnlyDot) else ()

    @property
    def cost(self) -> int:
        """What a row costs, in values written."""
        written = prod(self.program.tensor(self.call.output.tensor).shape)
        if isinstance(self.step, QGemm | WeightOnlyDot):
            written += self.step.weight.size // 128
        return written


def reorders(call: KernelCall, step: Step | None) -> tuple[int, ...]:
    """Return the inputs of an elementwise kernel call that it reads in another storage order than it writes."""
    if step is not None and type(step) not in _MAPS:
        return ()
    wanted = call.output.order
    return tuple(
        k
        for k, stored in enumerate(call.inputs)
        if len(stored.order) == len(wanted) and stored.order != wanted
    )


def in_order(call: KernelCall, inputs: Sequence[int]) -> KernelCall:
    """Return a kernel call with some of its inputs in the storage order of its output."""
    order = call.output.order
    found = list(call.inputs)
    for k in inputs:
        shape = tuple(found[k].shape[axis] for axis in order)
        found[k] = replace(found[k], order=order, buffer_shape=shape)
    return replace(call, inputs=tuple(found))


def row_step(
    lengths: Sequence[int], calls: Sequence[KernelCall], program: Program, step: Step | None
) -> RowStep:
    """Return how a kernel call, found at several lengths, works on rows.

    Args:
        lengths: Of the sequence.
        calls: The call at each.
        program: The program at the first.
        step: Of the program; None for changes of storage order.

    Raises:
        NoRows: It does not.
    """
    splits: dict[str, int] = {}
    counts: list[Size] = []
    following = []
    for position, versions in enumerate(zip(*((*c.inputs, c.output) for c in calls), strict=True)):
        if len({s.order for s in versions}) > 1:
            msg = "the storage order changes with the length"
            raise NoRows(msg)
        found = _split(lengths, versions)
        if found is None:
            continue
        axis, count = found
        splits[versions[0].tensor] = axis
        counts.append(count)
        following.append(position)
    if len(calls[0].inputs) not in following or len(set(counts)) != 1:
        msg = "its tensors hold different numbers of rows"
        raise NoRows(msg)
    reason = _why_mixed(step, calls[0], splits, program)
    if reason is not None:
        raise NoRows(reason)
    one = _one_row(program, calls[0], splits)
    inputs = tuple(p for p in following if p < len(calls[0].inputs))
    return RowStep(counts[0], inputs, step, one, calls[0], splits)


def _split(lengths: Sequence[int], versions: Sequence[Stored]) -> tuple[int, Size] | None:
    """Return the innermost axis, in memory order, that follows the length, and how many rows that makes."""
    sizes = [fitted(lengths, [stored.shape[axis] for stored in versions]) for axis in versions[0].order]
    if None in sizes:
        msg = f"the size of '{versions[0].tensor}' is no polynomial of the length"
        raise NoRows(msg)
    moving = [k for k, size in enumerate(sizes) if isinstance(size, Polynomial)]
    if not moving:
        return None
    count: Size = 1
    for size in sizes[: moving[-1] + 1]:
        assert size is not None
        count = count * size
    return moving[-1], count


def _why_mixed(
    step: Step | None, call: KernelCall, splits: Mapping[str, int], program: Program
) -> str | None:
    """Return how a step sees more than one row, or None if it does not."""
    tensors = [s for s in (*call.inputs, call.output) if s.tensor in splits]
    if isinstance(step, QGemm | WeightOnlyDot):
        summed = any(splits[s.tensor] == len(s.shape) - 1 for s in tensors)
        return "it sums over the positions of the sequence" if summed else None
    leads = [[s.shape[a] for a in s.order[: splits[s.tensor] + 1]] for s in tensors]
    if any(lead != leads[0] for lead in leads[1:]):
        return "its tensors hold their rows in different shapes"
    orders = {s.order[: splits[s.tensor] + 1] for s in tensors}
    if len(orders) > 1:
        return "it changes the order of the positions"
    if isinstance(step, Move):
        along = next(iter(orders))
        whole = step.kind == "slice" and all((step.starts[a], step.steps[a]) == (0, 1) for a in along)
        return None if whole else f"it is a {step.kind} along the sequence"
    if isinstance(step, QConcat):
        inside = {a for s in tensors for a in s.order[splits[s.tensor] + 1 :]}
        return None if step.axis % len(call.output.shape) in inside else "it joins sequences"
    if step is not None and type(step) not in _MAPS:
        return "it mixes the positions of the sequence"
    return _why_unlike_rows(call, tensors, splits, program)


def _why_unlike_rows(
    call: KernelCall, tensors: Sequence[Stored], splits: Mapping[str, int], program: Program
) -> str | None:
    """Return how an operand that does not follow the length differs from row to row, or None."""
    fixed = [program.tensor(s.tensor).shape for s in call.inputs if s.tensor not in splits]
    within = len(call.output.shape) - 1 - splits[call.output.tensor]
    same_rank = len({len(s.shape) for s in tensors}) == 1
    alike = all(prod(shape[: max(0, len(shape) - within)]) == 1 for shape in fixed)
    return None if same_rank and alike else "an operand differs from row to row"


def _one_row(program: Program, call: KernelCall, splits: Mapping[str, int]) -> Program:
    tensors = dict(program.tensors)
    for stored in (*call.inputs, call.output):
        if stored.tensor in splits:
            lead = stored.order[: splits[stored.tensor] + 1]
            shape = tuple(1 if a in lead else n for a, n in enumerate(stored.shape))
            tensors[stored.tensor] = replace(tensors[stored.tensor], shape=shape)
    return replace(program, tensors=tensors)
