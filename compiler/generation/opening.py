"""Opening a decoder for generation: its graph, its session, its tokenizer, the tokens that end a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bitwright.compiler.bench.models import load_session_config
from bitwright.compiler.bundle.decoder import CompiledDecoder
from bitwright.compiler.bundle.manifest import MANIFEST_FILE
from bitwright.compiler.decoding.caches import cache_pairs
from bitwright.compiler.decoding.context import context_of
from bitwright.compiler.decoding.interface import Interface, find_interface
from bitwright.compiler.decoding.ports import ports_of
from bitwright.compiler.errors import ModelError, ToolchainError, UsageError
from bitwright.compiler.generation.stop_tokens import stop_tokens
from bitwright.compiler.ingest.model_reader import read_model
from bitwright.compiler.ingest.stated_context import state_context
from bitwright.compiler.ingest.tokenizer import Tokenizer, tokenizer_beside
from bitwright.compiler.ort.decoding import DecodingSession
from bitwright.compiler.ort.session import SessionConfig, open_session

MODEL_FILE = "model.onnx"


class Session(Protocol):
    """A decoder and the tokens it has seen, in ONNX Runtime or compiled."""

    @property
    def cached(self) -> bool:
        """Whether it is given new tokens only."""

    @property
    def length(self) -> int:
        """Tokens that it has seen."""

    def restart(self) -> None:
        """Forget all tokens."""

    def feed(self, tokens: Sequence[int]) -> NDArray[np.floating]:
        """Give it further tokens; return the logits of what follows the last of them, shape (vocabulary,)."""


@dataclass(frozen=True, eq=False)
class OpenedDecoder:
    """A decoder that is ready to generate.

    Attributes:
        path: Its .onnx file, or the folder of a compiled one.
        session: What is fed with tokens.
        vocabulary: Number of tokens, if the model states it.
        context: The most tokens that it takes, if metadata, tables of positions or config.json say it; else it takes
            any number, or fails at the first one too many.
    """

    path: Path
    session: Session
    vocabulary: int | None
    context: int | None = None

    @property
    def folder(self) -> Path:
        """Where the files beside the model are."""
        return self.path if self.path.is_dir() else self.path.parent


@dataclass(frozen=True, eq=False)
class Language:
    """What stands between text and token numbers.

    Attributes:
        tokenizer: None: token numbers only.
        stops: Tokens that end a text.
        notes: Why there is no text, if there is a tokenizer and it cannot be used.
    """

    tokenizer: Tokenizer | None
    stops: frozenset[int]
    notes: tuple[str, ...] = ()


def model_file(given: Path) -> Path:
    """Return the .onnx file that a user named by itself or by its folder.

    Raises:
        UsageError: There is none, or the folder holds several and none is called model.onnx.
    """
    if not given.is_dir():
        if not given.is_file():
            what = "there is no such file or folder"
            raise UsageError(what, where=str(given), fix="name an .onnx file, or a folder with one")
        return given
    if (given / MODEL_FILE).is_file():
        return given / MODEL_FILE
    found = sorted(given.glob("*.onnx"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found)
        what = f"the folder holds several models: {names}" if found else "the folder holds no .onnx file"
        raise UsageError(what, where=str(given), fix="name one .onnx file")
    return found[0]


def session_config(path: Path, threads: int) -> SessionConfig:
    """Return the options of the .session.json beside a model, if there is one, with so many threads.

    Raises:
        UsageError: The file is damaged.
    """
    beside = path.with_name(path.name.removesuffix(".onnx") + ".session.json")
    config = load_session_config(beside) if beside.is_file() else SessionConfig()
    return replace(config, threads=threads)


def open_decoder(given: Path, threads: int) -> OpenedDecoder:
    """Open a decoder.

    Args:
        given: An .onnx file, a folder with one, or what ``bitwright compile --context`` wrote.
        threads: Threads that compute.

    Raises:
        ModelError: The model is refused, is no decoder, or takes a fixed number of tokens.
        UsageError: There is no such file, or the bundle was compiled without caches.
        ToolchainError: The artifact cannot be executed here.
    """
    if is_bundle(given):
        compiled = CompiledDecoder(given, threads)
        return OpenedDecoder(given, compiled, compiled.vocabulary, compiled.capacity)
    path = model_file(given)
    model = read_model(path).model
    try:
        interface = find_interface(ports_of(model.graph.inputs), ports_of(model.graph.outputs))
        pairs = cache_pairs(model, interface)
        _check_length(interface)
    except ModelError as error:
        raise ModelError(error.what, where=error.where or str(path), fix=error.fix) from error
    session = open_session(path, session_config(path, threads))
    state_context(model, path)
    context = context_of(model)
    decoding = DecodingSession(session, interface, pairs, context)
    return OpenedDecoder(path, decoding, interface.vocabulary, context)


def _check_length(interface: Interface) -> None:
    if interface.length is None or (interface.length == 1 and interface.caches):
        return
    what = f"the model takes {interface.length} tokens in every call, neither more nor fewer"
    raise ModelError(what, fix="export it with a dynamic length, and with a cache if it is to be fast")


def is_bundle(given: Path) -> bool:
    """Tell whether a folder is what ``bitwright compile`` wrote: its artifact is meant, not the model it is made of."""
    return (given / MANIFEST_FILE).is_file()


def open_language(decoder: OpenedDecoder, tokenizer: Path | None, *, needed: bool) -> Language:
    """Open the tokenizer and find out which tokens end a text.

    Args:
        decoder: The decoder.
        tokenizer: tokenizer.json; None: the one beside the model.
        needed: A prompt is given as text.

    Raises:
        UsageError: There is no tokenizer, and it is needed.
        ToolchainError: The package that reads it is not installed, and it is needed.
        DataError: It cannot be read, or files beside it are wrong.
    """
    place = tokenizer or tokenizer_beside(decoder.folder / MODEL_FILE)
    if place is None and needed:
        what = "there is no tokenizer.json beside the model"
        raise UsageError(
            what, where=str(decoder.path), fix="name one with --tokenizer, or pass the prompt as --tokens"
        )
    opened, notes = None, []
    if place is not None:
        try:
            opened = Tokenizer(place)
        except ToolchainError as error:
            if needed or tokenizer is not None:
                raise
            notes.append(f"no text is shown: {error.what} ({error.fix})")
    folder = decoder.folder if place is None else place.parent
    return Language(opened, stop_tokens(folder, opened), tuple(notes))
