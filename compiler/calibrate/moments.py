"""Second moments of the anchors' inputs, in as few streaming passes over the data as the memory allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.compiler.calibrate.histogram import finite_range
from bitwright.compiler.calibrate.observed import observe
from bitwright.compiler.calibrate.patches import PATCHES_PER_SAMPLE, RowGeometry, row_geometry
from bitwright.compiler.calibrate.stream import BATCH_BYTES, Dataset, batch_size, counted_batches
from bitwright.compiler.errors import DataError, UsageError, nearest
from bitwright.compiler.graph.model import node_label
from bitwright.compiler.moments import InputMoments

MEMORY_BYTES = 1 << 30
# Rows are joined until a block is so large (in elements): one matrix product instead of one for each sample.
BLOCK = 1 << 20
# Rows of a moment that are added at once: a product of thousands of inputs with themselves is hundreds of megabytes.
PANEL = 2048
# Larger moments are kept in float32: what damping adds is a hundred thousand times what that loses.
NARROWED_BYTES = 128 << 20
# Beyond this magnitude a sum of float32 squares could overflow, so the block is multiplied in float64.
LARGE = 2.0**50
# The kept rows of one input take at most so much.
ROW_BYTES = 4 << 20

Key = tuple[str, RowGeometry]


# 2^64 over the golden ratio, made odd: multiples of it modulo 2^64 spread as evenly as any sequence can.
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class RowSample:
    """Nearly evenly spaced rows of a stream of unknown length, without chance.

    A row is kept if the multiple of the golden ratio that belongs to its number is among the smallest. A constant
    stride would not do: images have the same number of patches each, often a power of two, and the same few places
    of every image, the padded border for one, would stand for all.
    """

    def __init__(self, wanted: int) -> None:
        self._wanted, self._seen = wanted, 0
        self._below = np.iinfo(np.uint64).max
        self._keys: list[NDArray[np.uint64]] = []
        self._kept: list[NDArray[np.float32]] = []

    def update(self, rows: np.ndarray) -> None:
        """Take further rows, shape (n, ...)."""
        keys = np.arange(self._seen, self._seen + len(rows), dtype=np.uint64) * GOLDEN
        self._seen += len(rows)
        chosen = keys <= self._below
        self._keys.append(keys[chosen])
        self._kept.append(rows[chosen].astype(np.float32))
        if sum(len(k) for k in self._keys) >= 2 * self._wanted:
            self._thin()

    def _thin(self) -> None:
        """Keep the wanted number of rows, in the order of the stream."""
        keys, rows = np.concatenate(self._keys), np.concatenate(self._kept)
        if len(keys) > self._wanted:
            self._below = np.partition(keys, self._wanted - 1)[self._wanted - 1]
            keys, rows = keys[keys <= self._below], rows[keys <= self._below]
        self._keys, self._kept = [keys], [rows]

    def result(self) -> NDArray[np.float32]:
        """Return at most the wanted number of rows."""
        self._thin()
        return self._kept[0]


class MomentSums:
    """Running sums of one input: float32 matrix products of large blocks, added in float64."""

    def __init__(
        self, geometry: RowGeometry, tensor: str, rows: int, patches: int = PATCHES_PER_SAMPLE
    ) -> None:
        groups, depth = geometry.groups, geometry.depth
        self._geometry, self._tensor, self._patches = geometry, tensor, patches
        self._count = 0
        self._sum = np.zeros((groups, depth))
        self._second = np.zeros((groups, depth, depth))
        self._largest = np.zeros((groups, depth), np.float32)
        self._sample = RowSample(max(1, min(rows, ROW_BYTES // (4 * groups * depth))))
        self._block: list[np.ndarray] = []
        self._gathered = 0

    def update(self, values: np.ndarray) -> None:
        """Take the tensor's value for one batch.

        Raises:
            DataError: It is not floating point, not finite, or does not have the node's row length.
        """
        if values.size == 0:
            return
        finite_range(values, self._tensor)
        for rows in self._geometry.rows(values, self._patches):
            self._sample.update(rows)
            self._block.append(rows)
            self._gathered += rows.size
            if self._gathered >= BLOCK:
                self._flush()

    def _flush(self) -> None:
        if not self._block:
            return
        rows = np.ascontiguousarray(np.concatenate(self._block).transpose(1, 0, 2))  # (G, n, K)
        self._block, self._gathered = [], 0
        largest = np.maximum(rows.max(axis=1), -rows.min(axis=1))
        if largest.max() > LARGE:
            rows = rows.astype(np.float64)
        self._count += rows.shape[1]
        self._sum += rows.sum(axis=1, dtype=np.float64)
        for start in range(0, rows.shape[2], PANEL):
            part = slice(start, start + PANEL)
            self._second[:, part] += rows[:, :, part].transpose(0, 2, 1) @ rows
        self._largest = np.maximum(self._largest, largest.astype(np.float32))

    def result(self) -> InputMoments:
        """Return the means.

        Raises:
            DataError: No sample gave the tensor a value.
        """
        self._flush()
        if self._count == 0:
            msg = "no sample gave this tensor a value"
            raise DataError(
                msg,
                where=f"tensor '{self._tensor}'",
                fix="give at least one calibration sample in which the tensor is not empty",
            )
        self._sum /= self._count
        self._second /= self._count
        large = self._second.nbytes > NARROWED_BYTES
        second = self._second.astype(np.float32) if large else self._second
        return InputMoments(self._count, self._sum, second, self._largest, self._sample.result())


def collect_moments(
    model: ir.Model,
    dataset: Dataset,
    nodes: Sequence[str],
    *,
    rows: int = 512,
    patches: int = PATCHES_PER_SAMPLE,
    threads: int = 1,
    memory_bytes: int = MEMORY_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, InputMoments]:
    """Run the float model over the data and return the input moments of the named anchors.

    All the results together take ``8 * G * K * K`` bytes for each distinct input, plus its rows; see
    :func:`moment_passes` for work that needs only some of them at a time.

    Args:
        model: The float model; not changed.
        dataset: The samples.
        nodes: Names (``node_label``) of MatMul, Gemm and Conv nodes with a constant weight, in the main graph.
        rows: Rows of each input to keep, evenly spaced; fewer where they would take more than 4 MiB.
        patches: Patches of each sample of a convolution that count.
        threads: Threads of one operator of the model.
        memory_bytes: How much the second moments of one pass over the data may take. Where all of them need
            more, the data are run several times.
        progress: Called with (samples done, all samples) after each batch, over all passes.

    Returns:
        Moments by node name. Nodes that read one tensor in one geometry share one object.

    Raises:
        UsageError: A name is unknown, or the node is no anchor.
        ModelError: ONNX Runtime refuses the model.
        DataError: No samples, samples that do not fit the model, or an input that is not finite.
    """
    found: dict[str, InputMoments] = {}
    for part in moment_passes(
        model,
        dataset,
        nodes,
        rows=rows,
        patches=patches,
        threads=threads,
        memory_bytes=memory_bytes,
        progress=progress,
    ):
        found |= part
    return {name: found[name] for name in nodes}


def moment_passes(
    model: ir.Model,
    dataset: Dataset,
    nodes: Sequence[str],
    *,
    rows: int = 512,
    patches: int = PATCHES_PER_SAMPLE,
    threads: int = 1,
    memory_bytes: int = MEMORY_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[dict[str, InputMoments]]:
    """Yield the moments of some of the nodes after each pass over the data, until all were given.

    Arguments, results and errors are those of :func:`collect_moments`; a caller that drops each part before it
    asks for the next stays within ``memory_bytes`` however large the model.
    """
    inputs = _inputs(model, nodes)
    parts = _passes(list(inputs), memory_bytes)
    total = len(dataset)
    for number, keys in enumerate(parts):

        def report(done: int, _: int, before: int = number * total) -> None:
            if progress is not None:
                progress(before + done, total * len(parts))

        sums = {key: MomentSums(key[1], key[0], rows, patches) for key in keys}
        moments = _one_pass(model, dataset, sums, threads, report)
        yield {name: moments[key] for key in keys for name in inputs[key]}


def _inputs(model: ir.Model, nodes: Sequence[str]) -> dict[Key, list[str]]:
    """Return the nodes that read each distinct input."""
    known = {node_label(node): node for node in model.graph}
    found: dict[Key, list[str]] = {}
    for name in nodes:
        if name not in known:
            msg = "the main graph has no node of this name"
            raise UsageError(msg, where=f"node '{name}'", fix=nearest(name, sorted(known)))
        node = known[name]
        geometry = row_geometry(node)
        data = node.inputs[0]
        found.setdefault(((data.name if data is not None else None) or "", geometry), []).append(name)
    return found


def _passes(keys: Sequence[Key], memory_bytes: int) -> list[list[Key]]:
    """Cut the inputs into runs that fit the memory; one that does not fit alone gets a pass of its own."""
    parts: list[list[Key]] = []
    taken = 0
    for key in keys:
        needed = 8 * key[1].groups * key[1].depth ** 2
        if not parts or taken + needed > memory_bytes:
            parts.append([])
            taken = 0
        parts[-1].append(key)
        taken += needed
    return parts


def _one_pass(
    model: ir.Model,
    dataset: Dataset,
    sums: dict[Key, MomentSums],
    threads: int,
    progress: Callable[[int, int], None],
) -> dict[Key, InputMoments]:
    tensors = list(dict.fromkeys(key[0] for key in sums))
    with observe(model, tensors, threads=threads) as observed:
        for done, batch in counted_batches(dataset, batch_size(observed, dataset, BATCH_BYTES)):
            for tensor, value in observed.run(batch):
                for key, found in sums.items():
                    if key[0] == tensor:
                        found.update(value)
            progress(done, len(dataset))
    return {key: sums.pop(key).result() for key in list(sums)}
