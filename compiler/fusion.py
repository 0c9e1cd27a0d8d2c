"""Phase fuse: a decoder's attention and normalizations as ONNX Runtime's own operators, proven and timed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.compiler import accuracy, frontend
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.decoding.interface import MASK, POSITIONS
from bitwright.compiler.errors import DataError, UsageError
from bitwright.compiler.graph.model import static_shape
from bitwright.compiler.ort.equality import rms_difference
from bitwright.compiler.ort.no_regret import WORTHWHILE
from bitwright.compiler.ort.session import SessionConfig, open_session, run
from bitwright.compiler.ort.timing import time_reopened
from bitwright.passes.contract import Pass
from bitwright.passes.fuse_decoder_attention import FuseDecoderAttention, sights
from bitwright.passes.fuse_skip_norms import FuseSkipNorms
from bitwright.passes.join_attention_inputs import JoinAttentionInputs
from bitwright.passes.narrow_cache import STORED, NarrowCache, cache_type
from bitwright.passes.sink_quantizers import SinkQuantizers

Feeds = Mapping[str, np.ndarray]
# Another order of float32 sums changes outputs in the sixth digit; behind kernels that round activations to 8 bits it
# moves a few of them by a step. A wrong mask or position changes outputs by their own size.
FUSED_BOUND = 1e-2
# New tokens and tokens in the cache that both forms are compared with. The longest reaches as far as the tables of
# positions, so that a window of attention would be seen: in the cache, where one token costs little, or as one prompt.
COMPARED = ((5, 0), (1, 5), (3, 4))
LONGEST_CACHE, LONGEST_PROMPT = 8192, 512
MOST_CACHE = 1 << 16  # where a mask is computed with such a number
CACHE_SAMPLES = 32
TIMED_SAMPLES, TIMED_PAST = 4, 64
TOKEN_TYPES = (ir.DataType.INT64, ir.DataType.INT32)
PAST_KEY, PAST_VALUE, TABLE = 3, 4, 7


@dataclass(frozen=True)
class _Decoder:
    """What a fused graph takes.

    Attributes:
        tokens: The input of token numbers.
        caches: Inputs that hold keys and values of earlier tokens, each with heads, width and element type.
        positions: Rows of the tables of positions, or None.
        told_apart: Tokens of a sequence that would show any window or other limit of its masks.
    """

    tokens: ir.Value
    caches: Mapping[str, tuple[int, int, ir.DataType]]
    positions: int | None
    told_apart: int

    def lengths(self) -> Iterator[tuple[int, int]]:
        """Yield numbers of new tokens and of those in the cache."""
        longest = self.longest
        if self.caches:
            yield from COMPARED
            yield 1, longest - 1
        else:
            yield from ((1, 0), (5, 0), (longest, 0))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that both forms are compared with."""
        usual, most = (LONGEST_CACHE, MOST_CACHE) if self.caches else (LONGEST_PROMPT, LONGEST_PROMPT)
        return min(self.positions or usual, max(usual, min(self.told_apart, most)))

    @property
    def is_seen(self) -> bool:
        """Whether that is long enough for all that masks may hide."""
        return self.longest >= min(self.told_apart, self.positions or self.told_apart)

    def feeds(self, new: int, past: int, known: NDArray[np.integer]) -> dict[str, np.ndarray]:
        """Return random inputs, tokens drawn from those that are known to be valid."""
        random = np.random.default_rng(0)
        tokens = random.choice(known, (1, new)).astype(known.dtype)
        caches = {
            name: random.standard_normal((1, heads, past, width)).astype(dtype.numpy())
            for name, (heads, width, dtype) in self.caches.items()
        }
        return {self.tokens.name or "": tokens, **caches}


def fuse(c: Compilation, config: SessionConfig, notes: list[str]) -> None:
    """Write a decoder's attention as GroupQueryAttention where that is proven equal and measured faster.

    Args:
        c: Has a quantized model for ONNX Runtime on this processor; a fused one takes its place.
        config: How the deployment is opened.
        notes: Told what was done, or why not.

    Raises:
        UsageError: A type was asked for the cache of a model that has none, or whose attention cannot be fused.
    """
    assert c.quantized is not None and c.source is not None and c.model is not None
    # Where no integers paid the user's own graph is kept, which is not in the form that is understood here.
    base = c.model if c.quantized is c.source.model else c.quantized
    fused = base.clone()
    SinkQuantizers().run(fused)
    steps: tuple[Pass, ...] = (FuseDecoderAttention(), FuseSkipNorms(), JoinAttentionInputs())
    attention, *rest = (step.run(fused) for step in steps)
    notes.extend(attention.notes)
    if not attention.changed and (hint := _stated_by_option(c)):
        notes.append(f"attention stays spelled out: {hint}")
    found = _described(fused) if "GroupQueryAttention" in _operators(fused) else _not_found(attention.notes)
    reason = found if isinstance(found, str) else _refuted(c, found, fused, config)
    if reason and c.options.kv_cache is not None:
        what = f"the model's attention cannot be fused: {reason}"
        raise _no_cache(what, _stated_by_option(c))
    changed = sum(result.changed for result in (attention, *rest))
    if reason and attention.changed:
        notes.append(f"attention is left as it was: {reason}")
    if not changed and c.options.kv_cache is None:
        return
    if reason or isinstance(found, str) or not _adopted(c, found, fused, config, notes):
        return
    norms, joined = (result.changed for result in rest)
    notes.append(
        f"{attention.changed} attentions became GroupQueryAttention, {joined} of them with one product for queries, "
        f"keys and values; {norms} normalizations became SkipSimplifiedLayerNormalization"
    )
    c.quantized = fused
    if c.options.kv_cache is not None:
        _narrow(c, found, c.options.kv_cache, config, notes)
    if c.options.gate and found.caches:
        _compare(c, found, config, notes)


def _operators(model: ir.Model) -> set[str]:
    return {node.op_type for node in model.graph}


def _not_found(notes: Sequence[str]) -> str:
    return next(iter(notes), "it is no decoder with rotary positions and a causal mask")


def leave(c: Compilation, notes: list[str]) -> None:
    """Leave attention as it is, for a target whose kernels cannot be executed and timed on this machine.

    Raises:
        UsageError: A type was asked for the cache.
    """
    provider = c.profile.runtimes.onnxruntime.execution_provider
    if c.options.kv_cache is not None:
        what = f"only caches on this processor can be changed and proven, {provider} needs other hardware"
        raise _no_cache(what)
    notes.append(
        f"attention is left as it is: whether fused operators are faster with {provider} cannot be measured here"
    )


def _no_cache(what: str, hint: str = "") -> UsageError:
    fix = hint or "leave it out: the cache keeps the type it has in the model"
    return UsageError(what, where="--kv-cache", fix=fix)


def _stated_by_option(c: Compilation) -> str:
    """Return which option would let attention be fused where it reads masks and positions; empty if none would."""
    assert c.source is not None
    taken = [v.name for v in c.source.model.graph.inputs if v.name in (MASK, POSITIONS)]
    if not taken:
        return ""
    return f"the model takes {' and '.join(map(repr, taken))}; if no sequence is ever padded, say so with --unpadded"


def _described(model: ir.Model) -> _Decoder | str:
    """Return what a fused graph takes, or why that is not understood."""
    nodes = [n for n in model.graph if n.op_type == "GroupQueryAttention"]
    caches: dict[str, tuple[int, int, ir.DataType]] = {}
    for value in (n.inputs[k] for n in nodes for k in (PAST_KEY, PAST_VALUE)):
        if value is None:
            continue
        heads, width = (None, None) if value.shape is None else (value.shape[1], value.shape[3])
        if not isinstance(heads, int) or not isinstance(width, int) or value.dtype is None:
            return f"the cache '{value.name}' has no fixed number and width of heads"
        caches[value.name or ""] = (heads, width, value.dtype)
    others = [v for v in model.graph.inputs if v.name not in caches]
    if len(others) != 1 or others[0].dtype not in TOKEN_TYPES:
        names = ", ".join(f"'{v.name}'" for v in others)
        return f"one input of token numbers is expected beside the caches, not {names}"
    shape = static_shape(nodes[0].inputs[TABLE])
    told_apart = max((s.largest + 2 for s in sights(model)), default=0)
    found = _Decoder(others[0], caches, None if shape is None else shape[0], told_apart)
    if not found.is_seen:
        return (
            f"masks are computed with the number {told_apart - 2}, which may limit what is seen, and both forms are "
            f"compared with sequences of {found.longest} tokens"
        )
    return found


def _refuted(c: Compilation, decoder: _Decoder, fused: ir.Model, config: SessionConfig) -> str:
    """Return why a fused model is not used; empty if it computes the same for prompts and for single tokens."""
    assert c.quantized is not None and c.dataset is not None
    known = np.unique(next(iter(c.dataset.batches(1)))[decoder.tokens.name or ""])
    # One after the other: a model that was quantized part by part may not be in memory twice. In an arena the outputs
    # would keep the first session's weights.
    config = replace(config, arena=False)
    expected = {}
    session = open_session(c.quantized, config)
    for sizes in decoder.lengths():
        with suppress(DataError):  # not every model takes a prompt behind a cache, or more than one token
            expected[sizes] = run(session, decoder.feeds(*sizes, known))
    del session
    if not expected:
        return "the model runs with no random tokens"
    after = open_session(fused, config)
    for (new, past), before in expected.items():
        try:
            difference = rms_difference(before, run(after, decoder.feeds(new, past, known)))
        except DataError as error:
            return f"it fails with {new} tokens behind {past}: {error.what}"
        if difference > FUSED_BOUND:
            return (
                f"with {new} tokens behind {past} its outputs would change by {difference:.2g} of their size"
            )
    return ""


def _adopted(
    c: Compilation, decoder: _Decoder, fused: ir.Model, config: SessionConfig, notes: list[str]
) -> bool:
    """Tell whether a fused model is faster, or needed."""
    assert c.quantized is not None and c.dataset is not None
    if c.options.kv_cache is not None or not c.options.gate:
        return True
    before, (what, samples) = c.quantized, _timed_on(c, decoder)
    timing = time_reopened(lambda: open_session(fused, config), lambda: open_session(before, config), samples)
    adopted = timing.ratio < WORTHWHILE
    notes.append(f"fused attention takes {timing.ratio:.2f} of the time of {what}")
    if not adopted:
        notes.append("attention is left as it was: nothing would be gained")
    return adopted


def _timed_on(c: Compilation, decoder: _Decoder) -> tuple[str, list[dict[str, np.ndarray]]]:
    """Return inputs to time: a token behind others where there is a cache, as a text is generated; else the user's."""
    assert c.dataset is not None
    samples = list(islice(c.dataset.batches(1), TIMED_SAMPLES))
    if not decoder.caches:
        return "the samples", samples
    past = min(TIMED_PAST, (decoder.positions or TIMED_PAST + 1) - 1)
    known = np.unique(samples[0][decoder.tokens.name or ""])
    return f"one token behind {past}", [decoder.feeds(1, past, known)]


def _compare(c: Compilation, decoder: _Decoder, config: SessionConfig, notes: list[str]) -> None:
    """Tell how long the next token takes, compared with the model as it was read."""
    assert c.quantized is not None and c.source is not None
    model, original = c.quantized, c.source.model
    what, samples = _timed_on(c, decoder)
    timing = time_reopened(
        lambda: open_session(model, config),
        lambda: open_session(original, SessionConfig(threads=config.threads)),
        samples,
        first_feeds=narrowed(samples, model),
    )
    c.timing = replace(timing, what=what)
    notes.append(f"{what}: {timing.ratio:.2f} of the float model's time in ONNX Runtime")


def _narrow(c: Compilation, decoder: _Decoder, asked: str, config: SessionConfig, notes: list[str]) -> None:
    """Store the cache in fewer bits, and measure the user's metric again."""
    kind = cache_type(asked)
    assert c.quantized is not None
    if not decoder.caches:
        what = "the model keeps no cache"
        raise _no_cache(what)
    if any(dtype != ir.DataType.FLOAT for _, _, dtype in decoder.caches.values()):
        what = "the model's cache is no longer in float32"
        raise _no_cache(what)
    magnitudes = {} if kind == "float16" else _magnitudes(c, decoder, config)
    NarrowCache(kind, magnitudes).run(c.quantized)
    elements = sum(heads * width for heads, width, _ in decoder.caches.values())
    size = {"float16": 2.0, "int8": 1.0, "int4": 0.5}[kind]
    notes.append(
        f"the cache holds {kind}: {round(elements * size)} bytes a token, not {elements * 4}; the graph's past and "
        f"present tensors are {STORED[kind].name.lower()} now"
    )
    accuracy.remeasure(c, notes)


def _magnitudes(c: Compilation, decoder: _Decoder, config: SessionConfig) -> dict[str, NDArray[np.float32]]:
    """Return the largest key and value in every channel over the calibration samples."""
    assert c.quantized is not None
    present: dict[str, str] = {}
    for node in c.quantized.graph:
        if node.op_type == "GroupQueryAttention":
            for past, out in zip(
                (node.inputs[PAST_KEY], node.inputs[PAST_VALUE]), node.outputs[1:], strict=False
            ):
                assert past is not None, "all layers have a cache, or none"
                present[past.name or ""] = out.name or ""
    session = open_session(c.quantized, config)
    found = {name: np.zeros(sizes[:2], np.float32) for name, sizes in decoder.caches.items()}
    for sample in islice(frontend.samples_of(c).batches(1), CACHE_SAMPLES):
        outputs = run(session, sample)
        for name, largest in found.items():
            np.maximum(largest, np.abs(outputs[present[name]]).max(axis=(0, 2)), out=largest)
    return found


def narrowed(samples: Sequence[Feeds], model: ir.Model) -> list[dict[str, np.ndarray]]:
    """Return samples with the caches that a model takes: float32 ones as integers or in half precision.

    Args:
        samples: Inputs of the float model.
        model: With or without a narrow cache.
    """
    stored = {v.name: v for v in model.graph.inputs}
    scales = _scales(model)
    return [
        {k: _stored(v, stored[k], scales.get(k)) if k in stored else v for k, v in s.items()} for s in samples
    ]


def _scales(model: ir.Model) -> dict[str, NDArray[np.float32]]:
    """Return the scale of every channel of the caches that hold integers, shape (heads, 1, width)."""
    found: dict[str, NDArray[np.float32]] = {}
    for node in model.graph:
        if node.op_type != "GroupQueryAttention" or len(node.inputs) < 14:
            continue
        for past, scale in ((PAST_KEY, 12), (PAST_VALUE, 13)):
            value, stored = node.inputs[past], node.inputs[scale]
            if value is not None and stored is not None and stored.const_value is not None:
                heads = node.attributes.get_int("kv_num_heads", 1)
                found[value.name or ""] = stored.const_value.numpy().reshape(heads, 1, -1)
    return found


def _stored(array: np.ndarray, value: ir.Value, scale: NDArray[np.float32] | None) -> np.ndarray:
    if scale is None:
        half = value.dtype == ir.DataType.FLOAT16 and array.dtype == np.float32
        return array.astype(np.float16) if half else array
    if value.dtype == ir.DataType.INT8:
        return np.clip(np.rint(array / scale), -128, 127).astype(np.int8)
    codes = (np.clip(np.rint(array / scale), -8, 7) + 8).astype(np.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4
