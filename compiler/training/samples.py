"""Training samples in memory: which are held out, in which order they come, and mixtures of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitwright.compiler.errors import DataError
from bitwright.compiler.ingest import npz
from bitwright.compiler.ingest.dataset import Dataset
from bitwright.compiler.ingest.limits import DEFAULT_LIMITS

FEWEST_SAMPLES = 2
SHORTEST_CUT = 4  # positions of an axis that is cut; three are more often colours than places
MOST_AXES = 8


@dataclass(frozen=True)
class Batch:
    """Some samples.

    Attributes:
        feeds: Input -> tensor, samples along the first axis.
        labels: Classes, int64, or None.
    """

    feeds: Mapping[str, Tensor]
    labels: Tensor | None = None


@dataclass(frozen=True)
class TrainingData:
    """Samples that are trained on, and those that judge.

    Attributes:
        arrays: Input -> samples along the first axis.
        labels: Class of each sample (further axes: of each position), or None.
        train: Numbers of the samples that are trained on.
        held: Numbers of the samples that are held out.
        batch: Samples of a step.
        seed: Of the order and of mixtures.
        mixture: Share of the batches that are mixtures of two samples each.
    """

    arrays: Mapping[str, np.ndarray]
    labels: np.ndarray | None
    train: np.ndarray
    held: np.ndarray
    batch: int
    seed: int
    mixture: float = 0.0

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every sample is seen once."""
        return -(-len(self.train) // self.batch)

    def at(self, step: int) -> Batch:
        """Return the batch of a step: a function of seed and step alone, so that training can be taken up anywhere."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.train)
        chosen = order[place * self.batch : (place + 1) * self.batch]
        random = np.random.default_rng([self.seed, epoch, place])
        if self.mixture and random.random() < self.mixture:
            return self._mixed(chosen, random)
        return self._batch(chosen)

    def some(self, count: int) -> Iterator[Batch]:
        """Yield up to ``count`` samples that are trained on, always the same, in whole batches; none are mixtures."""
        chosen = np.random.default_rng(self.seed).permutation(self.train)[:count]
        whole = len(chosen) // self.batch * self.batch
        for start in range(0, whole, self.batch):
            yield self._batch(chosen[start : start + self.batch])

    def held_out(self) -> Iterator[Batch]:
        """Yield the samples that judge, in order."""
        for start in range(0, len(self.held), self.batch):
            yield self._batch(self.held[start : start + self.batch])

    def _batch(self, chosen: np.ndarray) -> Batch:
        feeds = {name: torch.from_numpy(array[chosen]) for name, array in self.arrays.items()}
        labels = None if self.labels is None else torch.from_numpy(self.labels[chosen].astype(np.int64))
        return Batch(feeds, labels)

    def _mixed(self, chosen: np.ndarray, random: np.random.Generator) -> Batch:
        """Return samples mixed with others of the batch, blended or pasted; they have no labels."""
        others = random.permutation(chosen)
        shares = random.uniform(0.0, 1.0, len(chosen))
        pastes = random.random() < 0.5
        corners = random.uniform(0.0, 1.0, (len(chosen), MOST_AXES))
        feeds = {}
        for name, array in self.arrays.items():
            first, second = array[chosen], array[others]
            pasted = pastes and max(array.shape[1:], default=1) >= SHORTEST_CUT
            mixed = _pasted(first, second, shares, corners) if pasted else _blended(first, second, shares)
            feeds[name] = torch.from_numpy(mixed)
        return Batch(feeds)


def _blended(first: np.ndarray, second: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Return convex combinations (Zhang et al. 2018, "mixup")."""
    share = shares.reshape(-1, *(1,) * (first.ndim - 1)).astype(first.dtype)
    found: np.ndarray = share * first + (1 - share) * second
    return found


def _pasted(first: np.ndarray, second: np.ndarray, shares: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Return samples with a box of another in them (Yun et al. 2019, "CutMix").

    A box covers ``1 - share`` of the sample, as far as whole positions allow. Axes too short to be cut (colours) are
    covered whole.

    Args:
        first: Samples along the first axis.
        second: What the boxes are cut from, of the same shape.
        shares: What stays of each first sample.
        corners: Where the box lies, for each sample and axis: 0 at the beginning, 1 at the end.
    """
    found = first.copy()
    cut = [k for k, size in enumerate(first.shape[1:]) if size >= SHORTEST_CUT]
    for k, share in enumerate(shares):
        box = [slice(None)] * (first.ndim - 1)
        for axis in cut:
            size = first.shape[1 + axis]
            length = round(size * float(1 - share) ** (1 / len(cut)))
            start = round((size - length) * float(corners[k, axis % MOST_AXES]))
            box[axis] = slice(start, start + length)
        found[k][tuple(box)] = second[k][tuple(box)]
    return found


def load(
    dataset: Dataset,
    labels: np.ndarray | None,
    *,
    batch: int,
    seed: int,
    mixture: float,
    held: float,
    judging: Dataset | None = None,
) -> TrainingData:
    """Read all samples.

    Args:
        dataset: Of samples of one shape.
        labels: One entry a sample, those of ``judging`` last, or None.
        batch: Samples of a step; 1 where the model does not take more.
        seed: Of the order.
        mixture: Share of the batches that are mixed; needs inputs that are numbers, not indices.
        held: Share of the samples that judge and are not trained on, where ``judging`` is None.
        judging: Samples that judge.

    Raises:
        DataError: Samples of different shapes, too few, labels of another number, or indices to be mixed.
    """
    arrays = _stacked(dataset, FEWEST_SAMPLES)
    count = _count(arrays)
    if judging is not None:
        arrays = _behind(arrays, _stacked(judging, 1), judging.source)
    total = _count(arrays)
    if mixture and any(a.dtype.kind != "f" for a in arrays.values()):
        what = "has inputs that are no floats; indices cannot be mixed"
        raise DataError(what, where=dataset.source, fix="leave --mix out")
    if labels is not None and len(labels) != total:
        what = f"{len(labels)} labels for {total} samples"
        raise DataError(what, where="--labels", fix="give one label a sample, in the same order")
    train, judges = (
        _split(count, held, seed) if total == count else (np.arange(count), np.arange(count, total))
    )
    if not dataset.stackable:  # the model's first dimension is no batch
        return _OneByOne(arrays, labels, train, judges, 1, seed)
    return TrainingData(arrays, labels, train, judges, min(batch, len(train)), seed, mixture)


def _stacked(dataset: Dataset, fewest: int) -> dict[str, np.ndarray]:
    samples = list(dataset)
    shapes = {tuple(array.shape for array in sample.values()) for sample in samples}
    if len(shapes) > 1:
        what = f"has samples of {len(shapes)} different shapes; training needs one"
        raise DataError(what, where=dataset.source, fix="cut or pad the samples to one size")
    if len(samples) < fewest:
        what = "has one sample; training needs some to learn from and some to judge by"
        raise DataError(what, where=dataset.source, fix="give at least a few dozen samples")
    stack = np.concatenate if dataset.stackable else np.stack
    return {name: stack([s[name] for s in samples]) for name in samples[0]}


def _count(arrays: Mapping[str, np.ndarray]) -> int:
    return len(next(iter(arrays.values())))


def _behind(
    arrays: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray], source: str
) -> dict[str, np.ndarray]:
    """Return arrays with others behind them."""
    for name, array in arrays.items():
        if others[name].shape[1:] != array.shape[1:]:
            what = (
                f"'{name}' has samples of shape {others[name].shape[1:]}, those to train on {array.shape[1:]}"
            )
            raise DataError(what, where=source, fix="cut or pad the samples to one size")
    return {name: np.concatenate([array, others[name]]) for name, array in arrays.items()}


class _OneByOne(TrainingData):
    def _batch(self, chosen: np.ndarray) -> Batch:
        found = super()._batch(chosen)
        labels = None if found.labels is None else found.labels[0]
        return Batch({name: tensor[0] for name, tensor in found.feeds.items()}, labels)


def _split(count: int, held: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of samples to train on and to judge by; at least one of each."""
    order = np.random.default_rng([seed, count]).permutation(count)
    judging = min(count - 1, max(1, round(held * count)))
    return np.sort(order[judging:]), np.sort(order[:judging])


def read_labels(path: Path) -> np.ndarray:
    """Read the labels: an .npz file with one array of integers.

    Raises:
        DataError: It holds something else.
    """
    if not path.is_file():
        what = "there is no such file"
        raise DataError(what, where=f"--labels {path}", fix="give an .npz file with one array of integers")
    with npz.opened(path) as archive:
        found = npz.headers(archive, path, DEFAULT_LIMITS)
        kinds = [member.dtype.kind for member in found.values()]
        if len(found) != 1 or kinds[0] not in "iu":
            what = f"holds {len(found)} arrays of kinds {', '.join(kinds)}, not one of integers"
            raise DataError(what, where=f"--labels {path}", fix="numpy.savez(FILE, labels=classes)")
        return npz.whole(archive, next(iter(found.values())))
