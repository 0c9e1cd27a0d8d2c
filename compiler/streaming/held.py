"""What passes from part to part: one array for each sample, and the samples that a part sees because of it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from bitwright.compiler.ingest.dataset import Dataset
from bitwright.compiler.ingest.dataset_views import Held, Limited
from bitwright.compiler.ingest.samples import Sample, input_specs
from bitwright.compiler.ort.layer_error import with_outputs
from bitwright.compiler.ort.session import SessionConfig, open_session, run
from bitwright.compiler.streaming.chain import Part
from bitwright.passes.remove_unused import RemoveUnused

# Hidden states up to so many bytes stay in memory; further ones go to a temporary file.
MEMORY_BYTES = 128 << 20


class HeldArrays:
    """Arrays of any shape, in the order they came: in memory up to a bound, then in a file that nobody else sees."""

    def __init__(self, memory_bytes: int = MEMORY_BYTES) -> None:
        self._memory_bytes, self._taken = memory_bytes, 0
        self._kept: list[np.ndarray | tuple[int, np.dtype[np.generic], tuple[int, ...]]] = []
        self._file: BinaryIO | None = None

    def append(self, array: np.ndarray) -> None:
        """Keep an array."""
        if self._taken + array.nbytes <= self._memory_bytes:
            self._taken += array.nbytes
            self._kept.append(array)
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="bitwright-states-")  # noqa: SIM115 - closed in close()
        place = self._file.seek(0, 2)
        self._file.write(np.ascontiguousarray(array).tobytes())
        self._kept.append((place, array.dtype, array.shape))

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._kept)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return one of them."""
        found = self._kept[index]
        if isinstance(found, np.ndarray):
            return found
        assert self._file is not None, "a place in the file was given away"
        place, dtype, shape = found
        self._file.seek(place)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return np.frombuffer(self._file.read(size), dtype).reshape(shape)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield one after the other."""
        return (self[k] for k in range(len(self)))

    def close(self) -> None:
        """Let go of everything."""
        self._kept.clear()
        if self._file is not None:
            self._file.close()
            self._file = None


class PartData(Dataset):
    """The samples of one part: the value that enters it, what the first part shares, and graph inputs.

    They were computed from samples that were checked when the model's data were opened.

    Attributes:
        source: For messages.
        inputs: Of the part's model.
        warnings: None.
    """

    def __init__(self, stream: Stream, part: Part, inputs: ir.Model | None = None) -> None:
        """Look at a stream at a part that it has reached."""
        self.source, self.warnings = "the samples", ()
        self.inputs = () if inputs is None else input_specs(inputs)
        self._stream, self._part = stream, part
        self._count = stream.count

    def __iter__(self) -> Iterator[Sample]:
        """Yield one sample after the other."""
        entry, names = self._part.entry, [v.name or "" for v in self._part.inputs]
        shared = self._stream.sharing(self._part)
        for k, sample in enumerate(self._stream.samples()):
            feeds = {name: sample[name] for name in names} | shared(sample)
            if entry is not None:
                assert self._stream.held is not None, "a part behind the first is entered by a held value"
                feeds[entry.name or ""] = self._stream.held[k]
            yield feeds

    def batches(self, size: int) -> Iterator[Sample]:
        """Yield the samples one by one: they are sequences, large enough for any product."""
        return iter(self)


@dataclass
class Stream:
    """The state of some samples on their way through the parts, in float or as the quantized parts make it.

    Attributes:
        data: The model's samples.
        most: Follow so many of them; None: all.
        config: Session options of the parts.
        held: What enters the next part.
        first: The first part's model; what it shares is computed anew for every part that reads it.
        later: Names of the first part's values that others read beside its last one.
        memory_bytes: How much may be held in memory, the rest goes to a temporary file.
    """

    data: Dataset | Held | Limited
    most: int | None
    config: SessionConfig
    later: Sequence[str] = ()
    held: HeldArrays | None = None
    first: ir.Model | None = None
    memory_bytes: int = field(default=MEMORY_BYTES)

    @property
    def count(self) -> int:
        """How many samples are followed."""
        return len(self.data) if self.most is None else min(self.most, len(self.data))

    def samples(self) -> Iterator[Sample]:
        """Yield the model's samples."""
        return islice(self.data.batches(1), self.count)

    def sharing(self, part: Part) -> Callable[[Sample], Sample]:
        """Return what computes the values that a part reads from the first one."""
        if not part.shared:
            return lambda sample: {}
        assert self.first is not None, "the first part is done"
        session = open_session(_computing(self.first, [v.name or "" for v in part.shared]), self.config)
        return lambda sample: run(session, sample)

    def advance(self, part: Part, model: ir.Model) -> None:
        """Go through a part.

        Args:
            part: The part that the stream has reached.
            model: The part's model, float or quantized.
        """
        following = HeldArrays(self.memory_bytes)
        if part.leaves is not None:
            name = part.leaves.name or ""
            session = open_session(_computing(model, [name]), self.config)
            for feeds in PartData(self, part):
                following.append(run(session, feeds)[name])
        if part.entry is None and self.later:
            self.first = _computing(model, self.later)  # without the table of embeddings
        self.close()
        self.held = following

    def restore(self, passed: Iterable[np.ndarray], first: ir.Model | None) -> None:
        """Go on from what a part passed on in an earlier run."""
        self.held, self.first = HeldArrays(self.memory_bytes), first
        for array in passed:
            self.held.append(array)

    def close(self) -> None:
        """Let go of what is held."""
        if self.held is not None:
            self.held.close()
            self.held = None


def _computing(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """Return a copy that computes some of a model's outputs and nothing else."""
    copy = with_outputs(model, names)
    RemoveUnused().run(copy)
    return copy
