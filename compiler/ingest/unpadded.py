"""Samples of a decoder that takes no mask and no positions any more: they are checked, and left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from bitwright.compiler.decoding.interface import Interface, first_hidden, length_axis
from bitwright.compiler.decoding.ports import Port
from bitwright.compiler.errors import DataError, InternalError
from bitwright.compiler.ingest.dataset import Dataset, dataset_from_memory, open_dataset
from bitwright.compiler.ingest.limits import DEFAULT_LIMITS, Limits
from bitwright.compiler.ingest.samples import InputSpec, Sample, input_specs
from bitwright.compiler.ingest.text import quoted

PADDED_FIX = (
    "cut the padding off, one sequence a sample, or give a stream of tokens: FILE.npz:ARRAY or FILE.txt"
)


class UnpaddedDataset(Dataset):
    """Samples without masks and positions, which must say what the model computes for itself.

    Args:
        data: Samples that may hold masks, positions and caches; a cache that is not there is empty.
        inputs: The inputs of the model without mask and positions.
        interface: The decoder's, with them.

    Raises:
        DataError: A position is masked, or positions do not continue those in the cache.
    """

    def __init__(self, data: Dataset, inputs: tuple[InputSpec, ...], interface: Interface) -> None:
        caches = {port.name for port in interface.caches}
        self._data, self._interface = data, interface
        self._caches = [spec.name for spec in inputs if spec.name in caches]
        kept = tuple(replace(spec, may_be_empty=spec.name in caches) for spec in inputs)
        super().__init__(data.source, kept, self._stripped, notes=data.notes)
        self.warnings = tuple(dict.fromkeys((*data.warnings, *self.warnings)))

    def _stripped(self) -> Iterator[Mapping[str, object]]:
        names = {spec.name for spec in self.inputs}
        for number, sample in enumerate(self._data):
            self._check(sample, f"{self.source}: sample {number}")
            yield {**self._empty(sample), **{k: v for k, v in sample.items() if k in names}}

    def _empty(self, sample: Sample) -> Sample:
        """Return caches that hold nothing, for a sample without any."""
        if any(name in sample for name in self._caches):
            return {}  # then all have to be there, which the checks of a sample see to
        batch, empty = len(sample[self._interface.tokens.name]), self._interface.empty_caches()
        return {name: np.repeat(empty[name], batch, axis=0) for name in self._caches}

    def _check(self, sample: Sample, where: str) -> None:
        """Refuse a sample whose mask or positions say something else than that nobody is padded."""
        interface, past = self._interface, self._past(sample)
        new = sample[interface.tokens.name].shape[1]
        mask, positions = interface.mask, interface.positions
        if mask is not None and mask.name in sample:
            _check_mask(sample[mask.name], past + new, f"{where}, input {quoted(mask.name)}")
        if positions is not None and positions.name in sample:
            _check_positions(sample[positions.name], past, new, f"{where}, input {quoted(positions.name)}")

    def _past(self, sample: Sample) -> int:
        """Return how many tokens the sample's caches hold."""
        port = next((p for p in self._interface.caches if p.name in sample), None)
        return 0 if port is None else sample[port.name].shape[length_axis(port)]


def _check_mask(mask: np.ndarray, total: int, where: str) -> None:
    hidden = first_hidden(mask)
    if hidden is not None:
        what = f"element {hidden} is {mask[tuple(hidden)]}, where nobody is said to be padded"
        raise DataError(what, where=where, fix=PADDED_FIX)
    if mask.shape[1] != total:
        what = f"covers {mask.shape[1]} positions, tokens and cache have {total}"
        raise DataError(what, where=where, fix="leave the array out")


def _check_positions(positions: np.ndarray, past: int, new: int, where: str) -> None:
    expected = np.arange(past, past + new)
    if positions.shape[1] != new or (positions != expected).any():
        what = f"positions are not {past} to {past + new - 1}, as without padding behind a cache of {past}"
        raise DataError(what, where=where, fix=f"{PADDED_FIX}; or leave the array out")


def open_unpadded(
    source: str | Mapping[str, np.ndarray] | Iterable[Mapping[str, np.ndarray]],
    model: ir.Model,
    interface: Interface,
    limits: Limits = DEFAULT_LIMITS,
) -> Dataset:
    """Open samples of a decoder without mask and positions; they may still hold these.

    Args:
        source: As :func:`~bitwright.compiler.ingest.dataset.open_dataset` takes it, or in memory.
        model: The decoder, without its inputs for mask and positions.
        interface: What it took with them.
        limits: Budgets.

    Raises:
        BitwrightError: As :func:`~bitwright.compiler.ingest.dataset.open_dataset`.
        DataError: A position is masked, or positions do not continue those in the cache.
    """
    inputs = input_specs(model)
    caches = {port.name for port in interface.caches}
    wanted = [replace(s, may_be_empty=True, optional=True) if s.name in caches else s for s in inputs]
    wanted += [_optional(p) for p in (interface.mask, interface.positions) if p is not None]
    if isinstance(source, str):
        data = open_dataset(source, model, limits, tuple(wanted))
    else:
        data = dataset_from_memory(source, model, limits, tuple(wanted))
    return UnpaddedDataset(data, inputs, interface)


def _optional(port: Port) -> InputSpec:
    if port.dtype is None or port.dims is None:
        what = "a mask without type or shape was taken for one"
        raise InternalError(what, where=f"input {quoted(port.name)}")
    return InputSpec(port.name, port.dtype, port.dims, optional=True)
