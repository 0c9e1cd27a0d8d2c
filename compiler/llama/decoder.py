"""What a llama decoder consists of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.compiler.llama.parts import Linear, Norm
from bitwright.compiler.llama.rotary import Frequencies
from bitwright.compiler.llama.window import EVERYTHING, Sight

# llama.cpp needs a number; this is that of the first llama models, for graphs that set no limit themselves.
DEFAULT_CONTEXT = 2048


@dataclass(frozen=True, eq=False)
class Cache:
    """Where the keys and values of earlier positions go in, and those of all positions come out.

    Keys are stored rotated. Each has shape (batch, key heads, positions, elements of a head).

    Attributes:
        past_key, past_value: Graph inputs.
        present_key, present_value: Graph outputs.
    """

    past_key: ir.Value
    past_value: ir.Value
    present_key: ir.Value
    present_value: ir.Value


@dataclass(frozen=True, eq=False)
class Attention:
    """Grouped-query attention.

    Attributes:
        query, key, value, output: Its linear layers.
        heads: Query heads.
        key_heads: Key and value heads.
        width: Elements of a head.
        frequencies: Of the rotary positions.
        cache: Where earlier positions come from, or None.
        query_norm, key_norm: Normalize each head before it is rotated; None where nothing does.
        sight: What a position sees of those before it.
    """

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    heads: int
    key_heads: int
    width: int
    frequencies: Frequencies
    cache: Cache | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    sight: Sight = EVERYTHING


@dataclass(frozen=True, eq=False)
class Layer:
    """One decoder layer.

    Attributes:
        attention_norm: Before attention.
        attention: The attention.
        feed_forward_norm: Before the feed-forward part.
        gate, up, down: down(silu(gate(x)) * up(x)).
    """

    attention_norm: Norm
    attention: Attention
    feed_forward_norm: Norm
    gate: Linear
    up: Linear
    down: Linear


def norms_of(layer: Layer) -> tuple[Norm, ...]:
    """Return a layer's normalizations, those of heads included."""
    a = layer.attention
    found = (layer.attention_norm, a.query_norm, a.key_norm, layer.feed_forward_norm)
    return tuple(n for n in found if n is not None)


@dataclass(frozen=True, eq=False)
class Decoder:
    """A whole decoder.

    Attributes:
        tokens: The graph input that holds token numbers.
        logits: The graph output.
        embedding: The initializer of the token embeddings, shape (vocabulary, width).
        layers: First to last.
        norm: Before the head.
        head: The last linear layer.
        tied: The head's weight is the embedding.
    """

    tokens: ir.Value
    logits: ir.Value
    embedding: ir.Value
    layers: tuple[Layer, ...]
    norm: Norm
    head: Linear
    tied: bool

    @property
    def caches(self) -> tuple[Cache, ...] | None:
        """The cache of each layer, first to last; None if the graph computes whole sequences."""
        found = tuple(x.attention.cache for x in self.layers if x.attention.cache is not None)
        return found if len(found) == len(self.layers) else None

    @property
    def hyper(self) -> HyperParameters:
        """The numbers that GGUF states."""
        first = self.layers[0]
        attention = first.attention
        feed_forward, width = first.gate.shape()
        vocabulary = self.head.shape()[0]
        return HyperParameters(
            vocabulary=vocabulary,
            layers=len(self.layers),
            width=width,
            feed_forward=feed_forward,
            heads=attention.heads,
            key_heads=attention.key_heads,
            head_width=attention.width,
            context=attention.frequencies.positions or DEFAULT_CONTEXT,
            base=attention.frequencies.base,
            epsilon=first.attention_norm.epsilon,
            factors=attention.frequencies.factors(),
            head_norms=attention.query_norm is not None,
            windows=tuple(layer.attention.sight.window for layer in self.layers),
        )


@dataclass(frozen=True, eq=False)
class HyperParameters:
    """Sizes and constants of a decoder.

    Attributes:
        vocabulary: Tokens.
        layers: Decoder layers.
        width: Elements of the residual stream.
        feed_forward: Elements between up and down.
        heads: Query heads.
        key_heads: Key and value heads.
        head_width: Elements of a head.
        context: Longest sequence.
        base: Rope theta.
        epsilon: Of the normalizations.
        factors: Divisors of the rotary frequencies, or None.
        head_norms: Query and key heads are normalized before they are rotated, as in Qwen3.
        windows: How many positions each layer sees, the token's own included; None where all. Empty: none has any.
    """

    vocabulary: int
    layers: int
    width: int
    feed_forward: int
    heads: int
    key_heads: int
    head_width: int
    context: int
    base: float
    epsilon: float
    factors: NDArray[np.float32] | None = None
    head_norms: bool = False
    windows: tuple[int | None, ...] = ()

    @property
    def architecture(self) -> str:
        """GGUF's name for it. llama turns neighbouring elements of a head, qwen3 element i with i + width / 2."""
        return "qwen3" if self.head_norms else "llama"

    @property
    def window(self) -> int | None:
        """The shortest window of all layers, or None."""
        return min((w for w in self.windows if w is not None), default=None)
