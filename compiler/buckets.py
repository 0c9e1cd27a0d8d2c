"""Artifacts for several shapes: which functions the library gets, and the proof that padding changes nothing.

Whether padded positions reach the others is a property of the model that no local rule can see: an attention mask
keeps them apart in one place, a mean over positions mixes them in another. So padding is tried: samples of several
lengths, padded and not, must give the same outputs up to float rounding in the float model, and differ by less than
quantization itself changed in the quantized one, where a rounding may fall on the other side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from math import prod

import numpy as np

from bitwright.compiler.compilation import Compilation
from bitwright.compiler.errors import DataError, UsageError, VerificationError
from bitwright.compiler.graph.model import node_label
from bitwright.compiler.lengths import length_dims, length_samples, try_longest
from bitwright.compiler.ort.equality import largest_difference
from bitwright.compiler.ort.mixing import first_mixing_node
from bitwright.compiler.ort.session import SessionConfig, open_session, run
from bitwright.compiler.served_shapes import option_of, shape_rules
from bitwright.compiler.shape_choice import EXAMINED_SAMPLES
from bitwright.targets.toolchain.shape_rules import (
    MAIN,
    Dispatch,
    FunctionRule,
    ShapeRules,
)

# Sums in another order through a few dozen layers differ by some 1e-6; a position that leaks, by 1e-2 and more.
ROUNDING_BOUND = 1e-4
TRIED_SAMPLES = 6
# Sizes of a dynamic dimension that its function is verified with: each way to cut them into blocks occurs.
VERIFIED_SIZES = (2, 3, 7, 17, 33, 100)
# Of all tensors of such a batch together: what the reference computes in seconds.
MOST_VERIFIED_VALUES = 20_000_000

Sample = Mapping[str, np.ndarray]
Outputs = Mapping[str, np.ndarray]
Run = Callable[[Sample], dict[str, np.ndarray]]


def plan_shapes(c: Compilation, notes: list[str]) -> None:
    """Decide the library's functions and prove on the float model that padding and looping are harmless.

    Raises:
        UsageError: An input lacks its padding, or ``--pad`` names none.
        DataError: The samples cannot prove it.
        VerificationError: The padded or looped model computes something else.
    """
    asked = c.options
    if not asked.buckets and asked.loop is None and asked.dynamic is None:
        return
    assert c.model is not None
    if c.profile.codegen.executor == "static":
        msg = f"an artifact for {c.profile.name} has no runtime that could choose among shapes"
        option = "--dynamic" if asked.dynamic else "--bucket" if asked.buckets else "--loop"
        raise UsageError(msg, where=option, fix="compile it for one shape, with --dim")
    c.rules = shape_rules(c)
    if c.rules.has_lengths:
        # The function computes what the model does at that length: there is nothing to prove.
        try_longest(c, c.rules)
        notes.append("shapes: " + "; ".join(map(c.rules.words, c.rules.functions)))
        return
    session = open_session(c.model, SessionConfig(threads=c.options.threads))
    worst = 0.0
    tried = _tried_rules(c.rules)
    for what, dispatch, expected in _trials(c, tried, partial(run, session)):
        found = _computed(tried, dispatch, partial(run, session))
        difference = largest_difference(expected, found)
        worst = max(worst, difference)
        if difference > ROUNDING_BOUND:
            by = f"by {difference:.2g} of their largest value (allowed {ROUNDING_BOUND:g})"
            _refuse(what, by, option_of(c), _mixing_node(c, tried, dispatch))
    functions = "; ".join(map(c.rules.words, c.rules.functions))
    looped = f"{c.rules.loop} one at a time" if c.rules.loop else ""
    notes.append("shapes: " + "; ".join(filter(None, (functions, looped))))
    notes.append(
        f"padding and looping change the float model's outputs by at most {worst:.1e} of their largest value"
    )


def check_quantized(c: Compilation, notes: list[str]) -> None:
    """Prove that padding changes the quantized model by less than quantization did.

    Raises:
        VerificationError: It changes more, e.g. because a dynamic quantizer sees the padding.
    """
    if c.rules is None or c.rules.has_lengths:
        return
    assert c.model is not None and c.quantized is not None
    exact = partial(run, open_session(c.model, SessionConfig(threads=c.options.threads)))
    quantized = partial(run, open_session(c.quantized, SessionConfig(threads=c.options.threads)))
    worst = 0.0
    tried = _tried_rules(c.rules)
    for what, dispatch, expected in _trials(c, tried, quantized):
        found = _computed(tried, dispatch, quantized)
        share = _share_of_noise(expected, found, _computed(tried, dispatch, exact))
        worst = max(worst, share)
        if share > 1.0:
            _refuse(what, f"in the quantized model by {share:.2g} of what quantization changed", option_of(c))
    notes.append(
        f"padding and looping change the quantized outputs by at most {worst:.2f} of what quantization changed"
    )


def function_dims(c: Compilation) -> dict[str, dict[str, int]]:
    """Return the sizes of all dynamic dimensions for each further function (all but ``main``)."""
    if c.rules is None:
        return {}
    one = {c.rules.dynamic: 1} if c.rules.dynamic is not None else {}
    others = [f for f in c.rules.functions if f.name != MAIN and f.name not in length_dims(c)]
    return {f.name: c.dims | one | f.sizes for f in others}


def batched_inputs(c: Compilation) -> dict[str, list[str]]:
    """Return, for every function for any number of elements, its inputs that hold elements."""
    if c.rules is None or c.rules.has_lengths:
        return {}
    return {f.name: c.rules.batched_inputs() for f in c.rules.functions if c.rules.is_dynamic(f)}


def golden_samples(c: Compilation, count: int) -> list[dict[str, np.ndarray]]:
    """Return up to ``count`` samples for each function, those of ``main`` last, and one that needs the loop.

    Raises:
        DataError: A function serves no sample.
    """
    assert c.rules is not None and c.dataset is not None
    if c.rules.has_lengths:
        return list(length_samples(c, c.rules, count))
    if c.rules.dynamic is not None:
        return list(_batches(c, c.rules, count))
    served: dict[str, list[dict[str, np.ndarray]]] = {f.name: [] for f in reversed(c.rules.functions)}
    for sample in islice(_fitting(c, c.rules), EXAMINED_SAMPLES):
        served[c.rules.function_for(c.rules.sizes_of(sample)).name].append(dict(sample))
    for function in c.rules.functions:
        if not served[function.name]:
            raise _no_sample(c.rules, function)
    pairs = [_joined(c.rules, pair) for pair in islice(_pairs(c, c.rules), 1)]
    return [*pairs, *(sample for found in served.values() for sample in found[-count:])]


def _no_sample(rules: ShapeRules, function: FunctionRule) -> DataError:
    msg = f"no sample is served by the function for {rules.words(function)}, so it cannot be verified"
    return DataError(msg, where="--bucket", fix="leave that bucket out, or add such a sample")


def _batches(c: Compilation, rules: ShapeRules, count: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield samples put together to batches: up to ``count`` for every exact size, and sizes that nothing is made for.

    Raises:
        DataError: A function serves no sample.
    """
    one = rules.one_at_a_time()
    assert one.loop is not None
    shapes: dict[str, dict[tuple[int, ...], list[Sample]]] = {f.name: {} for f in one.functions}
    for sample in islice(_fitting(c, one), EXAMINED_SAMPLES):
        sizes = one.sizes_of(sample)
        if sizes[one.loop] == 1:
            alike = shapes[one.function_for(sizes).name]
            alike.setdefault(tuple(sizes.values()), []).append(sample)
    for function in reversed(rules.functions):
        others = {name: size for name, size in function.sizes.items() if name != rules.dynamic}
        serving = next(f for f in one.functions if f.sizes == others)
        if not shapes[serving.name]:
            raise _no_sample(rules, function)
        known = max(shapes[serving.name].values(), key=len)
        for number, size in enumerate(_batch_sizes(c, rules, function, count)):
            yield _joined(one, [known[(number + k) % len(known)] for k in range(size)])


def _batch_sizes(c: Compilation, rules: ShapeRules, function: FunctionRule, count: int) -> list[int]:
    """Return the sizes of the dynamic dimension that a function is verified with."""
    assert rules.dynamic is not None and c.model is not None
    if not rules.is_dynamic(function):
        return [function.sizes[rules.dynamic]] * count
    computed = [value.name or "" for node in c.model.graph for value in node.outputs]
    of_one = sum(prod(c.shapes.get(name, ())) for name in computed) // c.dims[rules.dynamic]
    most = max(VERIFIED_SIZES[1], MOST_VERIFIED_VALUES // max(1, of_one))
    sizes: tuple[int, ...] = VERIFIED_SIZES
    if rules.longest is not None:
        sizes = (*(n for n in sizes if n < rules.longest), rules.longest)
    served = [n for n in sizes if n not in rules.buckets[rules.dynamic]]
    # At least one: the smallest may be more values than that.
    return [n for n in served if n <= most] or served[:1]


def _tried_rules(rules: ShapeRules) -> ShapeRules:
    """Return the rules that a trial compares with the model: elements apart, sizes padded."""
    return rules if rules.dynamic is None else rules.one_at_a_time()


def _mixing_node(c: Compilation, rules: ShapeRules, dispatch: Dispatch) -> str:
    """Return the node that makes elements of a batch influence each other, in words; "" if there is none."""
    if len(dispatch.calls) < 2:
        return ""
    assert c.model is not None
    together = _joined(rules, dispatch.calls)
    node = first_mixing_node(
        c.model, together, dispatch.calls, bound=ROUNDING_BOUND, threads=c.options.threads
    )
    return (
        "" if node is None else f"; the first node that mixes them is '{node_label(node)}' ({node.op_type})"
    )


def _refuse(what: str, by: str, option: str, cause: str = "") -> None:
    msg = f"{what} changes the outputs {by}{'' if 'padding' in what else cause}"
    raise VerificationError(
        msg,
        where="--bucket" if "padding" in what else option,
        fix="padded positions reach others (is a mask padded with 0, is there a mean over positions?): compile for "
        "fixed sizes with --dim, or give the model a mask"
        if "padding" in what
        else "elements of the batch influence each other: compile for a fixed size with --dim",
    )


def _trials(c: Compilation, rules: ShapeRules, compute: Run) -> Iterator[tuple[str, Dispatch, Outputs]]:
    """Yield what is tried, how the rules would compute it, and what the model computes without them."""
    for sample, function in _padded_samples(c, rules):
        sizes = rules.sizes_of(sample)
        words = ", ".join(f"{d} from {sizes[d]} to {n}" for d, n in function.sizes.items() if sizes[d] != n)
        # A cache has what is padded behind its last position, where nobody reads it.
        answers = {port.name for port in rules.answers}
        found = {name: array for name, array in compute(sample).items() if name in answers}
        yield f"padding {words}", rules.dispatch(sample, function), found
    for pair in islice(_pairs(c, rules), 2):
        joined = _joined(rules, pair)
        yield f"computing {rules.loop} one at a time", rules.dispatch(joined), compute(joined)


def _padded_samples(c: Compilation, rules: ShapeRules) -> list[tuple[Sample, FunctionRule]]:
    """Return samples of different sizes, each with the function that serves it and with the largest one.

    Raises:
        DataError: No sample needs padding.
    """
    if not rules.buckets:
        return []
    largest = max(rules.functions, key=lambda f: tuple(f.sizes.values()))
    kinds: dict[tuple[int, ...], Sample] = {}
    for sample in islice(_fitting(c, rules), EXAMINED_SAMPLES):
        sizes = rules.sizes_of(sample)
        kinds.setdefault(tuple(sizes[d] for d in rules.buckets), sample)
    found = []
    for kind, sample in sorted(kinds.items(), key=lambda item: item[0]):
        functions = {f.name: f for f in (rules.function_for(rules.sizes_of(sample)), largest)}
        found += [(sample, f) for f in functions.values() if tuple(f.sizes.values()) != kind]
    if not found:
        msg = "every sample has exactly a bucket's size, so nothing shows that padding is harmless"
        raise DataError(msg, where="--bucket", fix="add samples of other lengths")
    step = max(1, len(found) // TRIED_SAMPLES)
    return found[::step][:TRIED_SAMPLES]


def _fitting(c: Compilation, rules: ShapeRules) -> Iterator[Sample]:
    """Yield the samples that the rules serve: of the fixed sizes, and no larger than the largest bucket."""
    assert c.dataset is not None
    for sample in c.dataset.batches(1):
        try:
            rules.function_for(rules.sizes_of(sample))
        except DataError:
            continue
        yield sample


def _pairs(c: Compilation, rules: ShapeRules) -> Iterator[tuple[Sample, Sample]]:
    """Yield pairs of samples of one shape, for the looped dimension.

    Raises:
        DataError: There is none.
    """
    if rules.loop is None:
        return
    waiting: dict[tuple[int, ...], Sample] = {}
    found = 0
    for sample in islice(_fitting(c, rules), EXAMINED_SAMPLES):
        key = tuple(rules.sizes_of(sample).values())
        if key in waiting:
            found += 1
            yield waiting.pop(key), sample
        else:
            waiting[key] = sample
    if not found:
        msg = "no two samples have the same shape, so nothing shows that elements are independent"
        raise DataError(msg, where="--loop", fix="add two samples of one shape")


def _joined(rules: ShapeRules, pair: Sequence[Sample]) -> dict[str, np.ndarray]:
    assert rules.loop is not None
    axes = {p.name: p.dims.index(rules.loop) for p in rules.inputs if rules.loop in p.dims}
    joined = {name: np.concatenate([s[name] for s in pair], axis) for name, axis in axes.items()}
    return {**pair[0], **joined}


def _computed(rules: ShapeRules, dispatch: Dispatch, compute: Run) -> dict[str, np.ndarray]:
    return rules.assemble(dispatch.sizes, [compute(feeds) for feeds in dispatch.calls])


def _share_of_noise(expected: Outputs, found: Outputs, exact: Outputs) -> float:
    """Return the largest share of the error by padding in that by quantization (both as root of squares)."""
    shares = []
    for name, array in expected.items():
        before = array.astype(np.float64)
        change = np.linalg.norm(found[name].astype(np.float64) - before)
        noise = np.linalg.norm(exact[name].astype(np.float64) - before)
        floor = ROUNDING_BOUND * np.linalg.norm(before) + np.finfo(np.float32).tiny
        shares.append(float(change / max(noise, floor)))
    return max(shares)
