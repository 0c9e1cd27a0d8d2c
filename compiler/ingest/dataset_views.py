"""Parts of a dataset: its first samples, or those that calibrate apart from those that judge."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from bitwright.compiler.ingest.dataset import Dataset, joined_batches
from bitwright.compiler.ingest.samples import Sample


class Limited:
    """The first samples of a dataset."""

    def __init__(self, dataset: Dataset | Held, samples: int) -> None:
        self._dataset, self._samples = dataset, samples

    def __len__(self) -> int:
        """Return the number of samples."""
        return min(self._samples, len(self._dataset))

    def batches(self, size: int) -> Iterator[Sample]:
        """Yield batches that hold at most the wanted samples."""
        size = min(size, self._samples)
        return islice(self._dataset.batches(size), self._samples // size)


class Held:
    """Every so many samples of a dataset, or all the others.

    Args:
        dataset: The whole.
        count: Samples that are held back, evenly spaced.
        back: These samples; False: the others.
    """

    def __init__(self, dataset: Dataset, count: int, *, back: bool) -> None:
        assert 0 < count < len(dataset), "something is held back, and something is left"
        self._dataset, self._back = dataset, back
        total = len(dataset)
        self._held = frozenset((2 * k + 1) * total // (2 * count) for k in range(count))

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._held) if self._back else len(self._dataset) - len(self._held)

    def __iter__(self) -> Iterator[Sample]:
        """Yield the samples in order."""
        return (s for k, s in enumerate(self._dataset) if (k in self._held) == self._back)

    def batches(self, size: int) -> Iterator[Sample]:
        """Yield the samples in order, joined as the dataset joins them."""
        return joined_batches(self, size if self._dataset.stackable else 1)
