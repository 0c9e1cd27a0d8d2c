"""Sequences of any length: at which lengths a model is lowered for them, and what proves the function."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice

import numpy as np

from bitwright.compiler.compilation import Compilation
from bitwright.compiler.errors import DataError, UsageError
from bitwright.compiler.ort.session import SessionConfig, open_session, run
from bitwright.compiler.shape_choice import EXAMINED_SAMPLES
from bitwright.targets.toolchain.shape_rules import ShapeRules

# Lengths at which a function for any length is lowered: shapes are fitted to what is found at each.
LOWERED_LENGTHS = (5, 7, 11, 13, 17, 19, 23)
FEWEST_LENGTHS = 4
# Lengths that it is verified with: one position, less and more than a vector, whole blocks of rows, several of each.
VERIFIED_LENGTHS = (1, 7, 16, 33, 128)


def length_dims(c: Compilation) -> dict[str, dict[int, dict[str, int]]]:
    """Return, for every function for any length, at which lengths it is lowered, with the sizes of all dimensions.

    Raises:
        UsageError: Too few lengths are possible.
    """
    if c.rules is None or not c.rules.has_lengths:
        return {}
    name, longest = c.rules.dynamic, c.rules.longest
    assert name is not None
    lengths = [n for n in LOWERED_LENGTHS if longest is None or n < longest][-FEWEST_LENGTHS:]
    if len(lengths) < FEWEST_LENGTHS:
        msg = f"up to {longest} there are few lengths"
        raise UsageError(msg, where="--dynamic", fix=f"give each its function: --bucket {name}=1,2,...")
    lengths += [longest] if longest is not None else []
    dynamic = [f for f in c.rules.functions if c.rules.is_dynamic(f)]
    return {f.name: {n: c.dims | f.sizes | {name: n} for n in lengths} for f in dynamic}


def length_samples(c: Compilation, rules: ShapeRules, count: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield samples, repeated or cut to the lengths of every function, and to lengths that nothing is made for.

    Raises:
        DataError: No sample has the sizes of the other dimensions.
    """
    name = rules.dynamic
    assert name is not None
    fitting = (s for s in c.dataset.batches(1) if _has_sizes(rules, s)) if c.dataset is not None else iter(())
    known = list(islice(fitting, EXAMINED_SAMPLES))[-count:]
    if not known:
        sizes = ", ".join(f"{dim}={size}" for dim, size in rules.fixed.items())
        msg = f"no sample has the sizes {sizes}, so nothing can be verified"
        raise DataError(msg, where="--dynamic", fix="choose the other sizes with --dim, or add such a sample")
    exact = rules.buckets[name]
    others = [n for n in VERIFIED_LENGTHS if n not in exact and (rules.longest is None or n <= rules.longest)]
    for number, length in enumerate(others):
        yield _of_length(rules, known[number % len(known)], length)
    for function in reversed(rules.functions):
        if not rules.is_dynamic(function):
            yield from (_of_length(rules, sample, function.sizes[name]) for sample in known)


def try_longest(c: Compilation, rules: ShapeRules) -> None:
    """Refuse a largest length that the model itself does not compute, e.g. for want of positions."""
    if rules.longest is None or c.model is None or c.dataset is None:
        return
    for sample in (s for s in c.dataset.batches(1) if _has_sizes(rules, s)):
        try:
            run(
                open_session(c.model, SessionConfig(threads=c.options.threads)),
                _of_length(rules, sample, rules.longest),
            )
        except DataError as error:
            msg = f"the model does not compute a sequence of {rules.longest}: {error.what}"
            fix = f"name the longest that it computes, e.g. --dynamic {rules.dynamic}={max(1, rules.longest // 2)}"
            raise UsageError(msg, where="--dynamic", fix=fix) from error
        return


def _has_sizes(rules: ShapeRules, sample: Mapping[str, np.ndarray]) -> bool:
    try:
        rules.sizes_of(sample)
    except DataError:
        return False
    return True


def _of_length(rules: ShapeRules, sample: Mapping[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    """Return a sample as a sequence of another length: repeated, or cut."""
    found = dict(sample)
    for port in rules.inputs:
        for axis, dim in enumerate(port.dims):
            if dim == rules.dynamic:
                array = found[port.name]
                found[port.name] = np.take(array, np.arange(length) % array.shape[axis], axis)
    return found
