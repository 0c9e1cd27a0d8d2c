"""Generating: a prompt goes in with one call, then token after token."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bitwright.compiler.decoding.sampling import Sampler, Sampling
from bitwright.compiler.errors import DataError, UsageError
from bitwright.compiler.generation.chat import chat_text
from bitwright.compiler.generation.opening import Language, OpenedDecoder, open_decoder, open_language
from bitwright.compiler.generation.text_stream import TextStream

Reason = Literal["length", "stop token", "context"]
Told = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What is to be generated.

    Attributes:
        model: An .onnx file, a folder with one, or what ``bitwright compile --context`` wrote.
        prompt: Text; or None.
        tokens: The prompt as token numbers; or None.
        tokenizer: tokenizer.json; None: the one beside the model.
        max_tokens: Generate at most so many tokens.
        sampling: How they are chosen.
        threads: Threads that compute.
        chat: The prompt is a message: it is put into the model's chat template.
        system: What the model is told before the message, or None.
    """

    model: Path
    prompt: str | None = None
    tokens: tuple[int, ...] | None = None
    tokenizer: Path | None = None
    max_tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    threads: int = 1
    chat: bool = False
    system: str | None = None

    def __post_init__(self) -> None:
        if self.chat and self.prompt is None:
            what = "token numbers are no message"
            raise UsageError(what, where="--chat", fix='pass --prompt "..."')
        if self.system is not None and not self.chat:
            what = "only a chat begins with what the model is told"
            raise UsageError(what, where="--system", fix="pass --chat, too")
        if (self.prompt is None) == (self.tokens is None):
            what = (
                "a prompt is needed" if self.prompt is None else "the prompt is given as text and as tokens"
            )
            raise UsageError(what, where="--prompt", fix='pass --prompt "..." or --tokens 1,2,3')
        if self.max_tokens < 1:
            what = f"{self.max_tokens} tokens are none"
            raise UsageError(what, where="--max-tokens", fix="pass 1 or more")


@dataclass(frozen=True)
class Generation:
    """What a decoder wrote.

    Attributes:
        model: Its .onnx file, or the folder of a compiled one.
        prompt: Token numbers of the prompt.
        tokens: Token numbers that followed; the one that ended the text is not among them.
        text: Their text, or None without a tokenizer.
        reason: Why it ended.
        prompt_s: Seconds of the call with the prompt, first choice included.
        steps_s: Seconds of all later calls and choices.
        steps: How many these were.
        cached: The graph has a cache; otherwise every call computed all tokens anew.
        notes: What is to be known about it.
    """

    model: Path
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str | None
    reason: Reason
    prompt_s: float
    steps_s: float
    steps: int
    cached: bool
    notes: tuple[str, ...] = ()

    @property
    def prompt_rate(self) -> float:
        """Tokens of the prompt a second."""
        return len(self.prompt) / self.prompt_s

    @property
    def rate(self) -> float | None:
        """Generated tokens a second behind the first, or None if there was no further one."""
        return self.steps / self.steps_s if self.steps else None

    def to_dict(self) -> dict[str, object]:
        """Return the JSON form."""
        return {
            "model": str(self.model),
            "prompt": list(self.prompt),
            "tokens": list(self.tokens),
            "text": self.text,
            "reason": self.reason,
            "cached": self.cached,
            "prompt_s": self.prompt_s,
            "prompt_tokens_per_s": self.prompt_rate,
            "steps": self.steps,
            "steps_s": self.steps_s,
            "tokens_per_s": self.rate,
            "notes": list(self.notes),
        }


def generate(request: Request, told: Told | None = None) -> Generation:
    """Generate text.

    Args:
        request: What is wanted.
        told: Gets every piece of text as it comes; without a tokenizer the token numbers, separated by blanks.

    Raises:
        UsageError: A file is missing, or an option is wrong.
        ModelError: The model is refused, is no decoder, or its logits are not finite.
        DataError: The prompt is empty, has tokens that the model lacks, or is longer than the model can take.
        ToolchainError: The package ``tokenizers`` is needed and not installed.
    """
    decoder = open_decoder(request.model, request.threads)
    language = open_language(decoder, request.tokenizer, needed=request.prompt is not None)
    return continued(decoder, language, prompt_tokens(request, language), request, told)


def prompt_tokens(request: Request, language: Language) -> tuple[int, ...]:
    """Return the token numbers of a request's prompt.

    Raises:
        UsageError: There is none, or a message is given and the model has no chat template.
        DataError: The template fails.
        ToolchainError: The package that reads templates is not installed.
    """
    found = request.tokens
    if request.prompt is not None:
        tokenizer = language.tokenizer
        assert tokenizer is not None, "a prompt of text needs a tokenizer"
        if request.chat:  # the template writes special tokens itself
            text = chat_text(tokenizer.path.parent, request.prompt, request.system)
            found = tuple(tokenizer.encode_plain(text).tolist())
        else:
            found = tuple(tokenizer.encode(request.prompt))
    if not found:
        what = "the prompt has no token"
        raise UsageError(what, where="--prompt", fix="pass some text")
    return found


def continued(
    decoder: OpenedDecoder,
    language: Language,
    prompt: tuple[int, ...],
    request: Request,
    told: Told | None = None,
) -> Generation:
    """Let an opened decoder continue a prompt; see :func:`generate`."""
    session, sampler = decoder.session, Sampler(request.sampling)
    if decoder.context is not None and len(prompt) > decoder.context:
        what = f"the prompt has {len(prompt)} tokens, the model takes {decoder.context}"
        raise DataError(what, where=str(decoder.path), fix="shorten the prompt")
    session.restart()
    writer = _Writer(language, prompt, told)
    tokens: list[int] = []
    start = time.perf_counter()
    token = sampler.choose(session.feed(prompt))
    prompt_s = time.perf_counter() - start
    steps, steps_s = 0, 0.0
    reason: Reason = "stop token"
    while token not in language.stops:
        tokens.append(token)
        writer.add(token)
        full = _full(decoder, request, len(tokens))
        if full is not None:
            reason = full
            break
        start = time.perf_counter()
        token = sampler.choose(session.feed([token]))
        steps_s += time.perf_counter() - start
        steps += 1
    text = writer.finish()
    notes = language.notes
    if not session.cached:
        notes = (*notes, "the graph has no cache: every token is computed from all before it anew")
    found = tuple(tokens)
    return Generation(
        decoder.path, prompt, found, text, reason, prompt_s, steps_s, steps, session.cached, notes
    )


def _full(decoder: OpenedDecoder, request: Request, count: int) -> Reason | None:
    """Return what allows no further token behind so many, or None."""
    if count == request.max_tokens:
        return "length"
    return "context" if decoder.session.length == decoder.context else None


class _Writer:
    """Collects the text and tells it piece by piece."""

    def __init__(self, language: Language, prompt: tuple[int, ...], told: Told | None) -> None:
        tokenizer = language.tokenizer
        self._stream = None if tokenizer is None else TextStream(tokenizer.decode, prompt)
        self._told, self._pieces = told, list[str]()

    def add(self, token: int) -> None:
        self._tell(f"{token} " if self._stream is None else self._stream.add(token))

    def finish(self) -> str | None:
        """Tell what is left and return the whole text."""
        if self._stream is None:
            return None
        self._tell(self._stream.rest())
        return "".join(self._pieces)

    def _tell(self, piece: str) -> None:
        self._pieces.append(piece)
        if self._told is not None and piece:
            self._told(piece)
