"""Decoders for generating text: caches of fixed capacity, functions for one token and for pieces of a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from bitwright.compiler.compilation import Compilation
from bitwright.compiler.decoding.context import stated_context
from bitwright.compiler.decoding.interface import Interface, find_interface
from bitwright.compiler.decoding.ports import ports_of
from bitwright.compiler.errors import DataError, InternalError, ModelError, UsageError
from bitwright.compiler.graph.model import node_label
from bitwright.compiler.ingest.dataset import Dataset
from bitwright.compiler.ingest.samples import Sample, input_specs
from bitwright.compiler.ingest.unpadded import open_unpadded
from bitwright.compiler.ort.session import SessionConfig, open_session, run
from bitwright.passes.fix_cache import PAST_LENGTH, FixCache, telling_length
from bitwright.passes.normalize import normalize
from bitwright.targets.toolchain.shape_rules import CacheRule

# New tokens of one call: a single one while text is generated; a prompt is cut into the larger pieces.
PIECES = (1, 16, 64)
FEWEST_PIECES = 2
QUANTIZED = ("MatMulNBits", "DequantizeLinear", "MatMulInteger")
# Positions that the logits are compared at, and how many where masks are computed with such a number, which may be a
# window of attention.
PROVEN, MOST_PROVEN = 512, 2048
# Rows of the data that are also cut into small pieces, so that every function gets samples, with caches behind them.
CUT_ROWS = 4
# Logits of the model with and without fixed caches, both float32: sums over positions in another order.
BOUND = 1e-3


@dataclass(frozen=True)
class FixedDecoder:
    """A decoder with caches of fixed capacity.

    Attributes:
        model: Its graph, float32.
        tokens: Name of the input of token numbers.
        length: Name of its dimension that varies.
        context: Positions that the caches hold.
    """

    model: ir.Model
    tokens: str
    length: str
    context: int

    @cached_property
    def session(self) -> Any:
        """The model in ONNX Runtime."""
        return open_session(self.model, SessionConfig())

    def empty(self) -> dict[str, np.ndarray]:
        """Return its caches, filled with zeros."""
        return {
            v.name or "": np.zeros(v.shape.numpy(), np.float32)
            for v in self.model.graph.inputs
            if v.name not in (self.tokens, PAST_LENGTH) and v.shape is not None
        }

    def feeds(self, tokens: np.ndarray, past: int, caches: Mapping[str, np.ndarray]) -> Sample:
        """Return the inputs of one call."""
        return {self.tokens: tokens, PAST_LENGTH: np.array([past], np.int32), **caches}

    def step(self, feeds: Sample) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return the logits of a call, and the caches behind it, by the names of its inputs."""
        results = list(run(self.session, feeds).values())
        return results[0], dict(zip(self.empty(), results[1:], strict=True))


class Sequences(Dataset):
    """Sequences of tokens as calls of a decoder with fixed caches.

    The beginning of each is one call behind an empty cache. The first few are cut into small pieces as well, each
    behind the cache that the float model filled with those before it.

    Args:
        rows: The sequences, each sample one or several of a length.
        decoder: The decoder.
        pieces: New tokens of a call, ascending.
    """

    def __init__(self, rows: Dataset, decoder: FixedDecoder, pieces: tuple[int, ...]) -> None:
        self.source, self.inputs, self.warnings = rows.source, input_specs(decoder.model), rows.warnings
        self._rows, self._decoder, self._pieces = rows, decoder, pieces
        self._count = sum(1 for _ in self._calls(dry=True))

    def __iter__(self) -> Iterator[Sample]:
        """Yield the calls."""
        return self._calls()

    def _calls(self, *, dry: bool = False) -> Iterator[Sample]:
        """Yield the calls; ``dry``: something for each of them, to be counted."""
        for number, tokens in enumerate(_sequences(self._rows, self._decoder.tokens)):
            largest = max(n for n in self._pieces if n <= tokens.shape[1])
            empty = {} if dry else self._decoder.empty()
            yield self._decoder.feeds(tokens[:, :largest], 0, empty)
            if number < CUT_ROWS:
                yield from self._cut(tokens, empty, dry=dry)

    def _cut(self, tokens: np.ndarray, caches: Mapping[str, np.ndarray], *, dry: bool) -> Iterator[Sample]:
        past = 0
        smaller = self._pieces[:-1][::-1] or self._pieces
        for size in (*smaller, *smaller):
            # Every call is also tried with as much padding as the largest piece has.
            if past + size > tokens.shape[1] or past + self._pieces[-1] > self._decoder.context:
                continue
            feeds = self._decoder.feeds(tokens[:, past : past + size], past, caches)
            yield feeds
            if not dry:
                _, caches = self._decoder.step(feeds)
            past += size


def _sequences(rows: Dataset, name: str) -> Iterator[np.ndarray]:
    for sample in rows.batches(1):
        for k in range(len(sample[name])):
            yield sample[name][k : k + 1]


def open_decoder(c: Compilation, opset: int, notes: list[str]) -> None:
    """Replace the source by a decoder with caches of fixed capacity, and the data by calls of it.

    Args:
        c: Its source has been read; gets its data set and the sizes that functions are made for.
        opset: Of the planned model.
        notes: What there is to say.

    Raises:
        ModelError: The model is no llama decoder, or not in float32.
        UsageError: The context is longer than the model's positions, or the target has no such artifacts.
        DataError: The data does not fit.
        InternalError: The rewritten model computes something else.
    """
    assert c.source is not None and c.options.context is not None
    original = c.masked or c.source.model
    interface = find_interface(ports_of(original.graph.inputs), ports_of(original.graph.outputs))
    limit = stated_context(original)
    if limit is not None and c.options.context > limit:
        msg = f"the model takes {limit} positions, fewer than {c.options.context}"
        raise UsageError(msg, where="--context", fix=f"--context {limit} is the longest")
    rows = _open_rows(c, interface)
    model = c.source.model.clone()
    normalize(model, opset)
    try:
        FixCache(c.options.context).run(model)
    except ModelError as error:
        _refuse_quantized(original, c.options.model, error)
        raise
    decoder = _described(model, interface, c.options.context)
    pieces = _pieces(c, decoder, rows)
    c.source, c.masked = replace(c.source, model=model), None
    c.dataset = Sequences(rows, decoder, pieces)
    notes.extend(c.dataset.warnings)
    c.cache = CacheRule(
        past=PAST_LENGTH, length=decoder.length, capacity=decoder.context, states=len(model.graph.outputs) - 1
    )
    c.options = replace(c.options, buckets={decoder.length: pieces}, pad={decoder.tokens: 0.0})
    known = next(_sequences(rows, decoder.tokens))
    row = np.resize(known, (1, min(decoder.context, _proven(model, decoder))))
    difference = _difference(original, interface, decoder, row)
    room = sum(array.nbytes for array in decoder.empty().values())
    notes.append(
        f"caches of {decoder.context} positions ({room / 1e6:.1f} MB), written in place: logits of {row.shape[1]} "
        f"tokens in two calls differ from the model's by {difference:.1e} of the largest"
    )
    if not difference <= BOUND:
        msg = f"fixed caches changed the logits by {difference:.2g} of the largest (allowed {BOUND:g})"
        fix = "its attention may mask more than what follows; please report this model"
        raise InternalError(msg, where=str(c.options.model), fix=fix)


def _proven(model: ir.Model, decoder: FixedDecoder) -> int:
    """Return at how many positions the logits are compared.

    Raises:
        UsageError: Masks may hide something further back.
    """
    needed = telling_length(model)
    if needed > MOST_PROVEN and needed - 2 < decoder.context:
        msg = f"masks are computed with the number {needed - 2}, which may limit what is seen"
        fix = f"--context {needed - 2}, so far nothing is hidden by it"
        raise UsageError(msg, where="--context", fix=fix)
    return max(PROVEN, min(needed, MOST_PROVEN))


def _refuse_quantized(model: ir.Model, path: Path, error: ModelError) -> None:
    """Say so if what hides a decoder is that it is quantized, e.g. by 'bitwright quantize'."""
    found = next((node for node in model.graph if node.op_type in QUANTIZED), None)
    if found is not None:
        msg = f"its weights are quantized already: '{node_label(found)}' ({found.op_type})"
        fix = "compile the float model that it was made of, with the same --recipe"
        raise ModelError(msg, where=str(path), fix=fix) from error


def _open_rows(c: Compilation, interface: Interface) -> Dataset:
    """Open the data as sequences of tokens; caches and masks are this module's business."""
    assert c.source is not None
    graph = c.source.model.graph
    ports = (interface.tokens.name, interface.logits.name)
    tokens, logits = (
        next(ir.Value(name=v.name, shape=v.shape, type=v.type) for v in side if v.name == name)
        for side, name in zip((graph.inputs, graph.outputs), ports, strict=True)
    )
    view = ir.Model(ir.Graph([tokens], [logits], nodes=[], name="tokens"), ir_version=10)
    data = c.options.data
    if data is None:
        msg = "random tokens say nothing about a decoder"
        raise UsageError(msg, where="--context", fix="pass token sequences with --data")
    found = open_unpadded(data, view, interface)  # a padded sequence would be continued behind its padding
    for sequence in _sequences(found, interface.tokens.name):
        interface.check_tokens(sequence.ravel(), found.source)
    return found


def _described(model: ir.Model, interface: Interface, context: int) -> FixedDecoder:
    tokens = next(v for v in model.graph.inputs if v.name == interface.tokens.name)
    assert tokens.shape is not None
    length = tokens.shape[1]
    assert isinstance(length, ir.SymbolicDim) and length.value is not None, "the rewrite needs such a length"
    strange = [v.name or "" for v in model.graph.inputs[1:] if not (v.name or "").startswith("past_")]
    if strange:
        msg = f"the model reads '{strange[0]}' elsewhere than in attention and rotary positions"
        fix = "export the decoder with tokens, caches, a mask and positions alone"
        raise ModelError(msg, where=f"input '{strange[0]}'", fix=fix)
    return FixedDecoder(model, interface.tokens.name, length.value, context)


def _pieces(c: Compilation, decoder: FixedDecoder, rows: Dataset) -> tuple[int, ...]:
    """Return the sizes of calls: the user's and 1, or those that fit the data and the context."""
    asked = c.options.buckets
    others = [name for name in asked if name != decoder.length]
    if others:
        msg = f"a decoder with fixed caches varies in '{decoder.length}' alone"
        raise UsageError(msg, where=f"--bucket {others[0]}", fix=f"e.g. --bucket {decoder.length}=1,8,32")
    longest = max(row.shape[1] for row in _sequences(rows, decoder.tokens))
    most = min(longest, decoder.context)
    if decoder.length not in asked:
        pieces = tuple(n for n in PIECES if n <= most)
        while not leave_room(pieces, decoder.context):
            pieces = pieces[:-1]
        if len(pieces) < FEWEST_PIECES:
            msg = f"sequences of at most {most} tokens"
            raise DataError(
                msg,
                where=rows.source,
                fix=f"give some of {PIECES[1]} tokens or more, and as long a --context",
            )
        return pieces
    pieces = tuple(sorted({1, *asked[decoder.length]}))
    if pieces[-1] > most:
        msg = f"no sequence of the data has {pieces[-1]} tokens, so a call of so many cannot be verified"
        if pieces[-1] > decoder.context:
            msg = f"caches of {decoder.context} positions do not hold {pieces[-1]} tokens"
        raise DataError(msg, where="--bucket", fix="name smaller sizes, or give longer sequences")
    if not leave_room(pieces, decoder.context):
        msg = f"calls of {pieces[-1]} tokens leave caches of {decoder.context} positions no room to try the others in"
        fix = f"name smaller sizes, or --context {pieces[-1] + sum(pieces[1:-1])}"
        raise UsageError(msg, where="--bucket", fix=fix)
    return pieces


def leave_room(pieces: tuple[int, ...], context: int) -> bool:
    """Tell whether the smaller pieces fit behind each other and, padded to the largest, each behind those before it."""
    return pieces[-1] + sum(pieces[1:-1]) <= context


def _difference(original: ir.Model, interface: Interface, decoder: FixedDecoder, row: np.ndarray) -> float:
    """Return how far logits of two calls behind each other are from those of one call of the given model."""
    feeds = {**interface.empty_caches(), **interface.feeds(row)}
    expected = run(open_session(original, SessionConfig()), feeds)[interface.logits.name]
    half = max(1, row.shape[1] // 2)
    logits, caches = decoder.step(decoder.feeds(row[:, :half], 0, decoder.empty()))
    if half < row.shape[1]:
        second, _ = decoder.step(decoder.feeds(row[:, half:], half, caches))
        logits = np.concatenate([logits, second], axis=1)
    gap = np.abs(logits.astype(np.float64) - expected.astype(np.float64))
    return float(gap.max() / np.abs(expected).max())
