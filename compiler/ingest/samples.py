"""What a sample of a model is, and the rules every sample has to keep."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from bitwright.compiler.errors import DataError, ModelError, nearest
from bitwright.compiler.ingest.limits import Limits
from bitwright.compiler.ingest.text import quoted, size

Sample = dict[str, np.ndarray]
# A value this many times larger than the typical one stretches an 8-bit range until everything else is one
# step.
_OUTLIER = 1e6


@dataclass(frozen=True)
class InputSpec:
    """A graph input.

    Attributes:
        name: Its name.
        dtype: numpy element type.
        dims: One entry an axis: the size, the name of a dimension that varies, or None for an unnamed one.
        may_be_empty: A dimension may have size 0: a cache before the first token.
        optional: Samples need not have it.
    """

    name: str
    dtype: np.dtype
    dims: tuple[int | str | None, ...]
    may_be_empty: bool = False
    optional: bool = False

    def __str__(self) -> str:
        shape = ", ".join("?" if d is None else str(d) for d in self.dims)
        return f"{self.dtype}[{shape}]"

    @property
    def varying_batch(self) -> bool:
        """Whether the first dimension varies."""
        return bool(self.dims) and not isinstance(self.dims[0], int)


def input_specs(model: ir.Model) -> tuple[InputSpec, ...]:
    """Return the inputs of a model.

    Raises:
        ModelError: An input has no type or rank, or the model has no inputs.
    """
    if not model.graph.inputs:
        what = "the model has no inputs"
        raise ModelError(what, fix="nothing can be calibrated; export it with inputs")
    return tuple(_spec(value) for value in model.graph.inputs)


def _spec(value: ir.Value) -> InputSpec:
    if value.dtype is None or value.shape is None:
        where = f"input {quoted(value.name or '')}"
        what = "has no type or no shape"
        raise ModelError(what, where=where, fix="declare it in the model")
    dims = tuple(d if isinstance(d, int) else (d.value or None) for d in value.shape)
    return InputSpec(value.name or "", np.dtype(value.dtype.numpy()), dims)


def check_names(names: Iterable[str], inputs: tuple[InputSpec, ...], where: str) -> list[str]:
    """Check that there is an array for every input; returns the names that are no input.

    Raises:
        DataError: Names the input that is missing and the nearest name that is there.
    """
    given = list(names)
    known = {spec.name for spec in inputs}
    for spec in inputs:
        if spec.name not in given and not spec.optional:
            spare = [name for name in given if name not in known]
            fix = nearest(spec.name, spare) if spare else f"add an array of that name, {spec}"
            what = f"there is no array for input {quoted(spec.name)}"
            raise DataError(what, where=where, fix=fix)
    return [name for name in given if name not in known]


def present(inputs: tuple[InputSpec, ...], names: Collection[str]) -> tuple[InputSpec, ...]:
    """Return the inputs that samples with arrays of these names hold: all but optional ones that are not there."""
    return tuple(spec for spec in inputs if not spec.optional or spec.name in names)


def check_dtype(dtype: np.dtype, spec: InputSpec, where: str) -> None:
    """Check that an array has exactly the element type of the input.

    Raises:
        DataError: Says how to cast.
    """
    if dtype.hasobject:
        fix = "give every sample the same shape, or use a folder of .npz files"
        what = "is an array of Python objects"
        raise DataError(what, where=where, fix=fix)
    if dtype != spec.dtype:
        fix = f"cast it: x.astype(numpy.{spec.dtype})"
        what = f"is {dtype}, the model needs {spec.dtype}"
        raise DataError(what, where=where, fix=fix)


@dataclass
class _Census:
    """Running statistics of one floating-point input."""

    low: float = np.inf
    high: float = -np.inf
    peak: float = 0.0
    peak_sample: int = 0
    elements: int = 0
    medians: list[float] = field(default_factory=list)


class SampleChecker:
    """Checks samples one by one, and at the end says what was suspicious about all of them.

    Args:
        inputs: The model's inputs.
        source: Where the samples come from, for messages.
        limits: Budgets.
    """

    def __init__(self, inputs: tuple[InputSpec, ...], source: str, limits: Limits) -> None:
        self._inputs, self._source, self._limits = inputs, source, limits
        self._census = {s.name: _Census() for s in inputs if _is_float(s.dtype)}
        self._ignored: dict[str, None] = {}
        self.count = 0
        self.bytes = 0

    def check(self, sample: Mapping[str, object]) -> Sample:
        """Return the sample as contiguous arrays, inputs only.

        Raises:
            DataError: Names the sample and the input.
        """
        where = f"{self._source}: sample {self.count}"
        if not isinstance(sample, Mapping):
            fix = "give a dictionary from input name to numpy array"
            what = f"is {type(sample).__name__}, not a dictionary"
            raise DataError(what, where=where, fix=fix)
        self._ignored |= dict.fromkeys(check_names(sample, self._inputs, where))
        arrays = {}
        for spec in present(self._inputs, sample):
            array = self._array(sample[spec.name], spec, f"{where}, input {quoted(spec.name)}")
            arrays[spec.name] = array
            self.bytes += array.nbytes
        self.count += 1
        if self.bytes > self._limits.data_bytes or self.count > self._limits.samples:
            what = f"more than {self._limits.samples} samples or {size(self._limits.data_bytes)}"
            raise DataError(what, where=self._source, fix="a few hundred samples are enough to calibrate")
        return arrays

    def _array(self, given: object, spec: InputSpec, where: str) -> np.ndarray:
        try:
            array = np.asarray(given)
        except Exception as error:  # any type may be given, and may refuse in its own way
            fix = "give a numpy array; every row needs the same length"
            what = f"is no array: {error}"
            raise DataError(what, where=where, fix=fix) from error
        check_dtype(array.dtype, spec, where)
        if array.nbytes > self._limits.sample_bytes:
            what = f"has {size(array.nbytes)}, more than {size(self._limits.sample_bytes)}"
            raise DataError(what, where=where, fix="give smaller samples")
        _check_shape(array.shape, spec, where)
        array = np.ascontiguousarray(array).reshape(array.shape)
        if spec.name in self._census and array.size:
            self._look_at(array, spec, where)
        return array

    def _look_at(self, array: np.ndarray, spec: InputSpec, where: str) -> None:
        wide = array.astype(np.float32) if array.dtype.itemsize < 4 else array
        low, high = float(wide.min()), float(wide.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            flat = np.flatnonzero(~np.isfinite(wide))[0]
            index = [int(i) for i in np.unravel_index(flat, wide.shape)]
            what = f"element {index} is {wide.reshape(-1)[flat]}"
            raise DataError(what, where=where, fix="remove the sample, or repair the preprocessing")
        census = self._census[spec.name]
        census.low, census.high = min(census.low, low), max(census.high, high)
        census.elements += wide.size
        if max(high, -low) > census.peak:
            census.peak, census.peak_sample = max(high, -low), self.count
        used = np.abs(wide[wide != 0])
        if used.size:
            census.medians.append(float(np.median(used)))

    def warnings(self) -> list[str]:
        """Return what is legal but suspicious about the samples seen so far, each ``where: what``."""
        found = [
            f"{self._source}: array {quoted(name)}: is no input of the model, ignored"
            for name in self._ignored
        ]
        for name, census in self._census.items():
            where = f"{self._source}: input {quoted(name)}"
            if census.low == census.high and census.elements > 1:
                found.append(
                    f"{where}: every element of every sample is {census.low:g}; ranges will be useless"
                )
            elif census.medians and census.peak > _OUTLIER * float(np.median(census.medians)):
                typical = float(np.median(census.medians))
                found.append(
                    f"{where}: sample {census.peak_sample} reaches {census.peak:.3g}, "
                    f"typical values are {typical:.3g}; an outlier like this ruins the ranges"
                )
        return found


def _check_shape(shape: tuple[int, ...], spec: InputSpec, where: str) -> None:
    wrong = len(shape) != len(spec.dims)
    wrong = wrong or any(isinstance(d, int) and d != n for n, d in zip(shape, spec.dims, strict=True))
    if wrong:
        fix = "give samples of the model's shape; [1, ...] for one item of a batch"
        what = f"has shape {list(shape)}, the model needs {spec}"
        raise DataError(what, where=where, fix=fix)
    if 0 in shape and not spec.may_be_empty:
        what = f"is empty: shape {list(shape)}"
        raise DataError(what, where=where, fix="leave empty samples out")


def _is_float(dtype: np.dtype) -> bool:
    # The narrow floating-point types of ml_dtypes have kind 'V'; integers, booleans and complex numbers are
    # none.
    return dtype.kind in "fV"
