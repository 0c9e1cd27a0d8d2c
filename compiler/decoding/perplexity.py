"""Perplexity of a decoder over a stream of tokens, cut into windows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitwright.compiler.decoding.interface import Interface, find_interface
from bitwright.compiler.decoding.ports import ModelRun
from bitwright.compiler.errors import DataError, InternalError, ModelError, UsageError

DEFAULT_WINDOW = 256
# Logits that are looked at together: with 128 thousand tokens those of a window would take gigabytes in float64.
BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Windows:
    """How a stream is cut.

    Attributes:
        window: Tokens that are predicted in one window; it holds one more, the first, that nothing predicts.
        stride: From the start of one window to the next. Where it is smaller than the window only the last
            ``stride`` predictions of each count, the first window's all: every token has more before it.
        count: Take so many windows evenly spaced over the stream instead; None: all, one stride apart.
    """

    window: int = DEFAULT_WINDOW
    stride: int | None = None
    count: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("window", self.window), ("stride", self.stride), ("windows", self.count)):
            if value is not None and value < 1:
                what = f"{name}={value}: at least 1 is needed"
                raise UsageError(what, where="windows of tokens", fix=f"e.g. {name}=256")
        if self.stride is not None and self.stride > self.window:
            what = f"a stride of {self.stride} leaves out tokens between windows of {self.window}"
            raise UsageError(what, where="windows of tokens", fix="give a stride of at most the window")
        if self.stride is not None and self.count is not None:
            what = "windows are evenly spaced or one stride apart, not both"
            raise UsageError(what, where="windows of tokens", fix="leave out windows or stride")

    def starts(self, length: int) -> list[int]:
        """Return where the windows of a stream begin.

        What does not fill a window at the end is left out.

        Args:
            length: Tokens of the stream.

        Raises:
            DataError: They do not fill a window.
        """
        last = length - self.window - 1
        if last < 0:
            what = f"{length} tokens do not fill a window of {self.window} (and the token before it)"
            raise DataError(what, where="windows of tokens", fix="give more text, or a smaller window=")
        if self.count is not None:
            return [int(start) for start in np.linspace(0, max(last - 1, 0), self.count).astype(int)]
        return list(range(0, last + 1, self.stride or self.window))

    def cut(self, tokens: NDArray[np.integer]) -> Iterator[tuple[NDArray[np.integer], int]]:
        """Yield windows, shape (window + 1,), and how many of their last tokens count."""
        for number, start in enumerate(self.starts(len(tokens))):
            counted = self.stride if self.stride is not None and number else self.window
            yield tokens[start : start + self.window + 1], counted


@dataclass(frozen=True)
class PerplexityResult:
    """What was found.

    Attributes:
        nll: Mean negative log-likelihood of a token, in nats.
        tokens: How many were predicted.
        bytes_per_token: Bytes of text a token stands for, or None if nobody knows.
    """

    nll: float
    tokens: int
    bytes_per_token: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(nll): among how many equally likely tokens the model might as well choose."""
        return math.exp(min(self.nll, 700.0))

    @property
    def bits_per_byte(self) -> float | None:
        """Bits that a byte of text takes when it is coded with the model's predictions."""
        if self.bytes_per_token is None:
            return None
        return self.nll / math.log(2) / self.bytes_per_token

    def to_dict(self) -> dict[str, object]:
        """Return the JSON form."""
        return {
            "perplexity": self.perplexity,
            "nll": self.nll,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
        }


@dataclass(frozen=True)
class PerplexityMetric:
    """Perplexity as a metric of which more is better: its negative, so that a relative drop is its relative rise.

    Attributes:
        source: What the user named.
        tokens: The stream, shape (tokens,).
        windows: How it is cut.
        bytes_per_token: Of the stream, or None.
    """

    source: str
    tokens: NDArray[np.integer]
    windows: Windows
    bytes_per_token: float | None = None

    def __call__(self, run: object) -> float:
        """Return minus the perplexity."""
        return -self.result(run).perplexity

    def check_context(self, context: int | None) -> None:
        """Refuse windows that are longer than what a model takes.

        Args:
            context: The most tokens that it takes, or None if nobody knows.

        Raises:
            DataError: They are.
        """
        if context is not None and self.windows.window > context:
            what = f"a window has {self.windows.window} tokens, the model takes {context}"
            raise DataError(what, where=self.source, fix=f"add ,window={context}")

    def result(self, run: object) -> PerplexityResult:
        """Run a decoder over all windows.

        Raises:
            ModelError: It is no decoder, or its logits are not finite.
            DataError: The stream has tokens that the model lacks, or the model fails.
        """
        if not isinstance(run, ModelRun):
            what = "perplexity needs to know the inputs of the model it runs"
            raise InternalError(what, where=self.source)
        interface = find_interface(run.inputs, run.outputs)
        interface.check_tokens(self.tokens, self.source)
        if interface.length not in (None, self.windows.window):
            what = f"the model takes {interface.length} tokens at once, a window has {self.windows.window}"
            raise DataError(what, where=self.source, fix=f"add ,window={interface.length}")
        self.check_context(run.context)
        total, count = 0.0, 0
        for window, counted in self.windows.cut(self.tokens):
            total += float(_losses(run, interface, window)[-counted:].sum())
            count += counted
        return PerplexityResult(total / count, count, self.bytes_per_token)


def _losses(run: ModelRun, interface: Interface, window: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return the negative log-likelihood of every token of a window but the first."""
    feeds = {**interface.empty_caches(), **interface.feeds(window[None, :-1])}
    logits = run(feeds)[interface.logits.name]
    if logits.shape[:2] != (1, len(window) - 1):
        what = f"the logits of {len(window) - 1} tokens have shape {list(logits.shape)}"
        raise ModelError(what, where=f"output '{interface.logits.name}'", fix="export logits for every token")
    losses = negative_log_likelihood(logits[0], window[1:])
    if not np.isfinite(losses).all():
        what = "the model's logits are not finite"
        raise ModelError(what, where=f"output '{interface.logits.name}'", fix="check the model in float32")
    return losses


def negative_log_likelihood(
    logits: NDArray[np.floating], targets: NDArray[np.integer]
) -> NDArray[np.float64]:
    """Return -log softmax(logits)[target] of every row.

    Args:
        logits: Shape (tokens, vocabulary).
        targets: Shape (tokens,).

    Returns:
        In nats, float64, shape (tokens,).
    """
    losses = np.empty(len(targets))
    rows = max(1, BLOCK_ELEMENTS // logits.shape[1])
    for start in range(0, len(targets), rows):
        wide = logits[start : start + rows].astype(np.float64)
        wide -= wide.max(axis=-1, keepdims=True)
        chosen = wide[np.arange(len(wide)), targets[start : start + rows]]
        losses[start : start + rows] = np.log(np.exp(wide).sum(axis=-1)) - chosen
    return losses
