"""Calibration samples of a decoder: windows of a stream of tokens, before them an empty cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from bitwright.compiler.decoding.context import context_of
from bitwright.compiler.decoding.interface import find_interface
from bitwright.compiler.decoding.ports import ports_of
from bitwright.compiler.errors import DataError, ModelError
from bitwright.compiler.ingest.limits import Limits
from bitwright.compiler.ingest.samples import InputSpec, Sample, input_specs
from bitwright.compiler.ingest.token_source import holds_streams, is_text, parse_token_source, read_stream

# As many are enough: 128 windows of 256 tokens are 32 thousand rows for every layer.
CALIBRATION_WINDOWS = 128
OpenSamples = Callable[[], Iterator[Sample]]


def is_token_source(text: str, model: ir.Model, limits: Limits) -> bool:
    """Tell whether what a user named as data is a stream of tokens rather than samples.

    It is one if it names a text, an array of an .npz file or how windows are cut; or an .npz file in which every array
    is a stream of integers, if the model is a decoder.

    Raises:
        DataError: The .npz file is damaged.
    """
    whole = Path(text)
    if whole.exists():
        return is_text(whole) or (
            whole.suffix == ".npz" and _is_decoder(model) and holds_streams(whole, limits)
        )
    head, comma, _ = text.partition(",")
    named = head.rpartition(":")[0].endswith(".npz")
    return named or is_text(Path(head)) or (bool(comma) and head.endswith(".npz"))


def _is_decoder(model: ir.Model) -> bool:
    try:
        find_interface(ports_of(model.graph.inputs), ports_of(model.graph.outputs))
    except ModelError:
        return False
    return len(model.graph.inputs) > 0


def token_samples(
    text: str, model: ir.Model, limits: Limits
) -> tuple[tuple[InputSpec, ...], OpenSamples, list[str]]:
    """Open a stream of tokens as samples of a decoder.

    Args:
        text: ``FILE[:ARRAY]`` with options, see
            :func:`~bitwright.compiler.ingest.token_source.parse_token_source`.
        model: The decoder.
        limits: Budgets.

    Returns:
        The inputs, of which caches may be empty; what starts an iteration over the samples, each a window; and notes.

    Raises:
        ModelError: The model is no decoder.
        UsageError: There is no such file, or an option is wrong.
        DataError: The stream is too short, has tokens that the model lacks, or cannot be read, or a window is longer
            than what the model takes.
        ToolchainError: A text needs the package ``tokenizers``, which is not installed.
    """
    interface = find_interface(ports_of(model.graph.inputs), ports_of(model.graph.outputs))
    source = (
        parse_token_source(text) if interface.length is None else parse_token_source(text, interface.length)
    )
    tokens = read_stream(source, limits).tokens
    interface.check_tokens(tokens, text)
    cut = source.windows
    context = context_of(model)
    if context is not None and cut.window > context:
        what = f"a window has {cut.window} tokens, the model takes {context}"
        raise DataError(
            what,
            where=text,
            fix=f"{source.path}{f':{source.array}' if source.array else ''},window={context}",
        )
    total = len(cut.starts(len(tokens)))
    if cut.count is None and total > CALIBRATION_WINDOWS:
        cut = replace(cut, stride=None, count=CALIBRATION_WINDOWS)
    caches = {port.name for port in interface.caches}
    inputs = tuple(replace(spec, may_be_empty=spec.name in caches) for spec in input_specs(model))

    def samples() -> Iterator[Sample]:
        for window, _ in cut.cut(tokens):
            yield {**interface.empty_caches(), **interface.feeds(window[None, :-1])}

    spread = "evenly spaced " if cut.count is not None else ""
    used = len(cut.starts(len(tokens)))
    note = f"{text}: {used} {spread}windows of {cut.window} tokens out of {len(tokens)}"
    return inputs, samples, [f"{note}, each with an empty cache" if caches else note]
