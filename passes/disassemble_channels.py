"""Split the few channels with outliers into several small ones (QLLM's channel disassembly)."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.compiler.graph.model import FreshNames
from bitwright.compiler.moments import InputMoments
from bitwright.compiler.rounding.product_error import ProductError
from bitwright.passes.contract import PassResult
from bitwright.passes.elementwise_region import Region, copy_channels, find_region
from bitwright.passes.linear_inputs import (
    LinearInput,
    insert_behind,
    insert_scale,
    linear_inputs,
    migrate_moments,
    rewrite_weights,
)
from bitwright.passes.rewriting import add_initializer, fresh_names, graph_of
from bitwright.passes.scale_folding import apply_fold, find_fold

FEWEST_ROWS = 16


@dataclass(frozen=True)
class DisassembleChannels:
    """Replace an input channel with outliers by ``T`` copies of a ``T``-th of it.

    ``x_j W_j = sum over T_j copies of (x_j / T_j) W_j`` with ``T_j = ceil(max|x_j| / theta)`` (Liu et al. 2024,
    QLLM, section 4.1, channel disassembly): exact, and the quantizer's range shrinks to ``theta``. ``theta``
    follows from how many channels may be added. The producer's columns are repeated where only elementwise
    functions stand between (the producer of a Gelu, both of a SwiGLU), else a Gather repeats the channels; the
    division is folded where it folds (a SwiGLU's up-projection) and is one Mul where it does not (a Gelu).

    An input is rewritten where the predicted error, cross-validated over sampled rows, falls enough. The
    paper's second step, which merges similar channels to get the width back, is lossy and is not done: the
    widths that pay are 1 to 3 per cent.

    Attributes:
        moments: By node name. Kept in step: rewritten layers' entries are replaced by those of their new
            inputs.
        budget: Largest share of channels to add.
        multiple: The new width is a multiple of this, which is what matrix kernels step by.
        gain: Share of the predicted error that must go.
        levels: Grid points of the activations.
        largest: Largest integer of the weights.
    """

    name: ClassVar[str] = "disassemble_channels"

    moments: MutableMapping[str, InputMoments] = field(repr=False)
    budget: float = 0.03
    multiple: int = 16
    gain: float = 0.6
    levels: int = 256
    largest: int = 127

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite ``model`` in place."""
        names, notes, changed = fresh_names(model), [], 0
        for found in linear_inputs(model, self.moments, self.name):
            extra, ratio = self._best_width(found)
            if not extra:
                notes.append(f"{found.label}: left as it is, nothing to split or no room in the budget")
                continue
            if ratio > 1.0 - self.gain:
                notes.append(f"{found.label}: left as it is, the error would fall to {ratio:.2f} only")
                continue
            copies = split_counts(found.moments.largest[0], extra)
            how = self._rewrite(found, copies, names)
            changed += 1
            notes.append(
                f"{found.label}: {extra} channels added to {found.channels}, the largest split in "
                f"{copies.max()}, predicted error {ratio:.2f} of before, {how}"
            )
        return PassResult(model, changed, tuple(notes))

    def _widths(self, channels: int) -> list[int]:
        """Return the numbers of channels to try to add."""
        first = -channels % self.multiple or self.multiple
        return list(range(first, int(channels * self.budget) + 1, self.multiple))

    def _best_width(self, found: LinearInput) -> tuple[int, float]:
        """Return how many channels to add (0: none may be) and the error in terms of the error without."""
        widths = self._widths(found.channels)
        if not widths or len(found.moments.rows) < FEWEST_ROWS or not found.moments.largest.any():
            return 0, 1.0
        error = ProductError(found.moments.rows[:, 0], found.weight, self.levels, self.largest)
        one = np.ones(found.channels, np.float32)
        before = error.of(lambda _: (None, one))
        after = [error.of(partial(_split, extra=width)) for width in widths]
        best = int(np.argmin(after))
        return widths[best], after[best] / before if before > 0 else 1.0

    def _rewrite(self, found: LinearInput, copies: NDArray[np.intp], names: FreshNames) -> str:
        index = np.repeat(np.arange(found.channels), copies)
        divisor = copies[index].astype(np.float64)
        region = find_region(found.value, found.readers, found.channels)
        rewrite_weights(found, index, np.ones(index.size), names)
        migrate_moments(self.moments, found, index, divisor)
        if region is None:
            gathered = _gather(found, index, names)
            insert_scale(LinearInput(gathered, found.readers, found.moments), 1.0 / divisor, names)
            return "repeated by a Gather, divided by a Mul"
        return _through(found, region, index, divisor, names)


def _through(
    found: LinearInput,
    region: Region,
    index: NDArray[np.intp],
    divisor: NDArray[np.float64],
    names: FreshNames,
) -> str:
    copy_channels(region, index, names)
    fold = find_fold(found.value, found.readers, index.size)
    if fold.sites and np.array_equal(fold.groups, np.arange(index.size)):
        apply_fold(fold, 1.0 / divisor, names)
        return "repeated by its producers, divided by one of them"
    insert_scale(found, 1.0 / divisor, names)
    return "repeated by its producers, divided by a Mul"


def _gather(found: LinearInput, index: NDArray[np.intp], names: FreshNames) -> ir.Value:
    value, graph = found.value, graph_of(found.readers[0])
    constant = add_initializer(graph, names(f"{value.name}_copies"), index.astype(np.int64))
    gather = ir.node("Gather", [value, constant], {"axis": -1}, name=names(f"{value.name}_repeat"))
    output = gather.outputs[0]
    output.name, output.type = names(f"{value.name}_repeated"), value.type
    if value.shape is not None:
        output.shape = ir.Shape([*list(value.shape)[:-1], index.size])
    insert_behind(graph, value, [gather])
    return output


def _split(rows: NDArray[np.float32], extra: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    copies = split_counts(np.abs(rows).max(axis=0), extra)
    index = np.repeat(np.arange(copies.size), copies)
    return index, copies[index].astype(np.float32)


def split_counts(largest: NDArray[np.float32], extra: int) -> NDArray[np.intp]:
    """Return ``T_j = ceil(max|x_j| / theta)`` for the theta that adds exactly ``extra`` channels.

    One channel more goes each time to the one whose share ``max|x_j| / T_j`` is the largest: this walks down
    all thresholds theta at which a count changes.

    Args:
        largest: Largest magnitude of each channel, [K].
        extra: Channels to add.
    """
    copies = np.ones(largest.size, np.intp)
    share = largest.astype(np.float64)
    for _ in range(extra):
        worst = int(share.argmax())
        copies[worst] += 1
        share[worst] = largest[worst] / copies[worst]
    return copies
