"""Weights to blocks: scales, then integer scales, then codes, each by the weighted square error that is left."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitwright.compiler.errors import InternalError, ModelError
from bitwright.compiler.gguf.bit_planes import Bytes
from bitwright.compiler.gguf.blocks import FORMATS, Codes, Float32, Format, decode, encode
from bitwright.compiler.gguf.fitting import NonlinearGrid, dot, fit_affine, fit_scale, grid_of, inverse
from bitwright.compiler.gguf.types import F16, F32, TensorType

# Weights that are looked at together: the temporaries of one step stay in the second-level cache.
CHUNK = 1 << 16
ROUNDS = 2
SUPER_SHARES = np.linspace(0.9, 1.1, 9)
HALF_LARGEST = 65504.0
# Inputs that calibration never saw keep this share of the mean importance, so that their weights are not free.
LEAST_IMPORTANCE = 1e-3


def quantize(
    weights: NDArray[np.floating],
    kind: TensorType,
    importance: NDArray[np.floating] | None = None,
    *,
    threads: int = 1,
) -> Bytes:
    """Round a matrix to blocks of a tensor type.

    Args:
        weights: Finite, shape (rows, columns); the columns are what an input is multiplied with, and a multiple of
            the type's block.
        kind: The type.
        importance: What an error of each column costs, usually the mean square of its input, shape (columns,);
            all the same if not given.
        threads: Parts that are worked at at once.

    Returns:
        uint8, shape (rows, bytes of a row).

    Raises:
        ModelError: A weight is not finite, or larger than the type can store.
    """
    if not kind.fits(weights.shape[1]):
        msg = f"rows of {weights.shape[1]} elements cannot be stored as {kind.name}"
        raise InternalError(msg)
    if not np.isfinite(weights).all():
        msg = "a weight is NaN or infinite and cannot be rounded"
        raise ModelError(msg, where="weights", fix="repair the model")
    if kind in (F32, F16):
        return _as_float(weights, kind)
    fmt, share = FORMATS[kind], _shares(importance, weights.shape[1])
    parts = [weights[rows] for rows in _row_parts(*weights.shape)]

    def work(part: NDArray[np.floating]) -> Bytes:
        return _quantize_rows(part.astype(np.float32), fmt, share)

    if threads == 1 or len(parts) == 1:
        return np.concatenate([work(p) for p in parts])
    with ThreadPoolExecutor(threads) as pool:
        return np.concatenate(list(pool.map(work, parts)))


def dequantize(stored: Bytes, kind: TensorType) -> Float32:
    """Return the values of stored rows, bit for bit what ggml computes.

    Args:
        stored: uint8, shape (rows, bytes of a row).
        kind: Their type.

    Returns:
        float32, shape (rows, columns).
    """
    rows = len(stored)
    if kind in (F32, F16):
        return np.ascontiguousarray(stored).view("<f4" if kind is F32 else "<f2").astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):  # a hostile file may hold any bits
        values = decode(FORMATS[kind], stored.reshape(-1, kind.bytes))
    return values.reshape(rows, -1)


def square_error(
    weights: NDArray[np.floating],
    stored: Bytes,
    kind: TensorType,
    importance: NDArray[np.floating] | None = None,
) -> float:
    """Return ``sum importance (w - w')^2`` of a stored matrix."""
    residual = (weights - dequantize(stored, kind)).astype(np.float64)
    columns = np.einsum("rc,rc->c", residual, residual)
    return float(columns.sum() if importance is None else columns @ importance.astype(np.float64))


def _as_float(weights: NDArray[np.floating], kind: TensorType) -> Bytes:
    if kind is F16 and np.abs(weights).max(initial=0) > HALF_LARGEST:
        msg = f"a weight of magnitude {np.abs(weights).max():.3g} does not fit float16"
        raise ModelError(msg, where="weights", fix="choose a type with float32 weights (F32)")
    stored = np.ascontiguousarray(weights.astype("<f4" if kind is F32 else "<f2"))
    return stored.view(np.uint8)


def _shares(importance: NDArray[np.floating] | None, columns: int) -> Float32 | None:
    """Return the importance relative to its mean, never quite zero."""
    if importance is None:
        return None
    if importance.shape != (columns,):
        msg = f"importance has shape {importance.shape}, the rows have {columns} columns"
        raise InternalError(msg)
    mean = float(importance.mean())
    if not mean > 0:
        return None
    found: Float32 = np.maximum(importance / mean, LEAST_IMPORTANCE).astype(np.float32)
    return found


def _row_parts(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, CHUNK // columns)
    return (slice(r, r + step) for r in range(0, rows, step))


def _quantize_rows(rows: Float32, fmt: Format, share: Float32 | None) -> Bytes:
    """Round some rows."""
    w = np.ones_like(rows) if share is None else np.broadcast_to(share, rows.shape)
    shape = (-1, fmt.groups, fmt.group)
    x = rows.reshape(shape)
    limit = HALF_LARGEST * max(abs(fmt.low), abs(fmt.high))
    if np.abs(rows).max(initial=0) > limit:
        msg = f"a weight of magnitude {np.abs(rows).max():.3g} is too large for {fmt.type.name}"
        raise ModelError(msg, where="weights", fix="store the tensor as F32")
    # Weights far from 1 would overflow squares in float32, or vanish: the search is done near 1.
    exponent = np.clip(np.frexp(np.abs(x).max(axis=(1, 2)))[1], -100, 100)
    unit = np.ldexp(np.float32(1), -exponent).astype(np.float32)
    found = _Search(x * unit[:, None, None], np.ascontiguousarray(w).reshape(shape), fmt, 1 / unit).run()
    return encode(fmt, found).reshape(len(rows), -1)


@dataclass
class _Fit:
    """The numbers of each block; scale and offset have shape (n, groups)."""

    d: Float32
    dmin: Float32
    scale: Float32
    offset: Float32

    def choose(self, other: _Fit, better: NDArray[np.bool_]) -> _Fit:
        """Return the other fit where it is better."""
        b = better[:, None]
        return _Fit(
            np.where(better, other.d, self.d),
            np.where(better, other.dmin, self.dmin),
            np.where(b, other.scale, self.scale),
            np.where(b, other.offset, self.offset),
        )


class _Search:
    """The best numbers of some blocks: x and w have shape (n, groups, k); x is scaled by 1 / ``back``."""

    def __init__(self, x: Float32, w: Float32, fmt: Format, back: Float32) -> None:
        self._x, self._w, self._fmt, self._back = x, w, fmt, back
        self._grid = grid_of(fmt)
        self._affine = fmt.added or fmt.offset > 0

    def run(self) -> Codes:
        """Search, and round."""
        fit = self._two_level(*self._fitted()) if self._fmt.two_level else self._one_level(*self._fitted())
        error = self._error(fit)
        for _ in range(ROUNDS):
            if self._fmt.two_level:
                fit = self._neighbours(fit)
                error = self._error(fit)
            other = self._least_squares(fit)
            other_error = self._error(other)
            fit, error = fit.choose(other, other_error < error), np.minimum(error, other_error)
        return self._codes(fit)

    def _fitted(self) -> tuple[Float32, Float32]:
        if self._affine:
            return fit_affine(self._x, self._w, self._fmt.high, below_zero=not self._fmt.added)
        levels = self._fmt.high - self._fmt.low + 1
        scale = fit_scale(self._x, self._w, self._grid, levels)
        return scale, np.zeros_like(scale)

    def _half(self, values: Float32) -> Float32:
        """Return the nearest numbers that float16 can store, in the units of the search."""
        stored = np.clip(values * self._back, -HALF_LARGEST, HALF_LARGEST).astype(np.float16)
        found: Float32 = stored.astype(np.float32) / self._back
        return found

    def _one_level(self, scale: Float32, offset: Float32) -> _Fit:
        """Return the better of the fitted numbers and those of the plain rule (range over levels)."""
        ones = np.ones_like(scale)
        fit = _Fit(self._half(scale[:, 0]), self._half(offset[:, 0]), ones, ones)
        for d, m in self._plain():
            other = _Fit(self._half(d), self._half(m), ones, ones)
            fit = fit.choose(other, self._error(other) < self._error(fit))
        return fit

    def _plain(self) -> Iterator[tuple[Float32, Float32]]:
        flat = self._x.reshape(len(self._x), -1)
        if self._affine:
            low, high = flat.min(axis=1), flat.max(axis=1)
            yield (high - low) / np.float32(self._fmt.high), -low
            return
        peak = np.take_along_axis(flat, np.abs(flat).argmax(axis=1, keepdims=True), axis=1)[:, 0]
        for edge in self._grid.edges:
            yield peak / np.float32(edge), np.zeros_like(peak)

    def _two_level(self, scale: Float32, offset: Float32) -> _Fit:
        """Round fitted scales and minima to integers of common numbers."""
        level = self._grid.nearest((self._x + offset[..., None]) * inverse(scale)[..., None])
        curvature = dot(self._w * level, level)
        d, s = self._integers(scale, curvature, self._fmt.scale)
        if not self._fmt.offset:
            return _Fit(d, np.zeros_like(d), s, np.zeros_like(s))
        dmin, m = self._integers(offset, self._w.sum(axis=-1), (0, self._fmt.offset))
        return _Fit(d, dmin, s, m)

    def _integers(self, values: Float32, weight: Float32, limits: tuple[int, int]) -> tuple[Float32, Float32]:
        """Return a float16 unit for each block, and the values as integers of it."""
        low, high = limits
        edge = low if -low > high else high
        peak = np.take_along_axis(values, np.abs(values).argmax(axis=1, keepdims=True), axis=1)[:, 0]
        best = unit = integers = None
        for share in SUPER_SHARES:
            d = self._half(peak / np.float32(edge * share))
            k = np.clip(np.rint(values * inverse(d)[:, None]), low, high)
            error = dot(weight, (values - d[:, None] * k) ** 2)
            if best is None or unit is None or integers is None:
                best, unit, integers = error, d, k
                continue
            better = error < best
            best, unit = np.where(better, error, best), np.where(better, d, unit)
            integers = np.where(better[:, None], k, integers)
        assert unit is not None and integers is not None
        return unit, integers

    def _numbers(self, fit: _Fit) -> tuple[Float32, Float32]:
        """Return the scale and the offset of each group."""
        return fit.d[:, None] * fit.scale, fit.dmin[:, None] * fit.offset

    def _levels(self, fit: _Fit) -> Float32:
        scale, offset = self._numbers(fit)
        return self._grid.nearest((self._x + offset[..., None]) * inverse(scale)[..., None])

    def _group_errors(self, fit: _Fit) -> Float32:
        scale, offset = self._numbers(fit)
        residual = self._levels(fit)
        residual *= scale[..., None]
        residual -= offset[..., None]
        residual -= self._x
        return dot(self._w * residual, residual)

    def _error(self, fit: _Fit) -> Float32:
        found: Float32 = self._group_errors(fit).sum(axis=1)
        return found

    def _neighbours(self, fit: _Fit) -> _Fit:
        """Move each group's integers by one where that helps."""
        scale, offset = fit.scale.copy(), fit.offset.copy()
        error = self._group_errors(fit)
        for ds in (-1, 0, 1):
            for dm in (-1, 0, 1) if self._fmt.offset else (0,):
                if ds == dm == 0:
                    continue
                s = np.clip(fit.scale + ds, *self._fmt.scale)
                m = np.clip(fit.offset + dm, 0, self._fmt.offset)
                tried = self._group_errors(_Fit(fit.d, fit.dmin, s, m))
                better = tried < error
                scale, offset = np.where(better, s, scale), np.where(better, m, offset)
                error = np.minimum(error, tried)
        return _Fit(fit.d, fit.dmin, scale, offset)

    def _least_squares(self, fit: _Fit) -> _Fit:
        """Return the fit with the blocks' numbers that suit the present codes best."""
        a = (self._levels(fit) * fit.scale[..., None]).reshape(len(self._x), -1)
        x, w = self._x.reshape(a.shape), self._w.reshape(a.shape)
        wa = w * a
        aa, ax = dot(wa, a), dot(wa, x)
        if not self._affine:
            return _Fit(self._half(ax * inverse(aa)), fit.dmin, fit.scale, fit.offset)
        b = np.broadcast_to(fit.offset[..., None], self._x.shape).reshape(a.shape)
        wb = w * b
        bb, ab, bx = dot(wb, b), dot(wa, b), dot(wb, x)
        det = inverse(aa * bb - ab * ab)
        d, m = (bb * ax - ab * bx) * det, (ab * ax - aa * bx) * det
        usable = det != 0
        if not self._fmt.added:
            usable &= (m >= 0) & (d >= 0)
        d, m = np.where(usable, d, ax * inverse(aa)), np.where(usable, m, fit.dmin)
        return _Fit(self._half(d), self._half(m), fit.scale, fit.offset)

    def _codes(self, fit: _Fit) -> Codes:
        level = self._levels(fit).reshape(len(self._x), -1)
        index = self._grid.indices(level) if isinstance(self._grid, NonlinearGrid) else level
        sign = np.float32(-1 if self._fmt.added else 1)
        return Codes(
            fit.d * self._back,
            sign * fit.dmin * self._back,
            fit.scale.astype(np.int32),
            fit.offset.astype(np.int32),
            index.astype(np.int32),
        )
