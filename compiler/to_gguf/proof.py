"""Proof that the recognised decoder is the graph: the same logits from its parts, computed as llama.cpp does."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from bitwright.compiler.errors import ModelError
from bitwright.compiler.ingest.samples import input_specs
from bitwright.compiler.llama.decoder import Decoder
from bitwright.compiler.llama.reference import logits
from bitwright.compiler.llama.tensors import ModelTensor
from bitwright.compiler.ort.session import SessionConfig, open_session, run

# Float32 sums in another order differ by some 1e-6 of the largest logit; a wrong scale or rotation by tenths.
BOUND = 1e-3
TOKENS = 24
# A window of attention is looked behind up to here; numpy holds all scores of a layer at once.
MOST_TOKENS = 512


def prove(model: ir.Model, decoder: Decoder, tensors: tuple[ModelTensor, ...], *, threads: int = 1) -> float:
    """Compare the graph's logits with those of the parts that will be written.

    Returns:
        The largest difference relative to the largest logit.

    Raises:
        ModelError: They differ by more than float32 sums explain: the graph does something that was not recognised.
    """
    by_name = {t.name: t for t in tensors}

    def weights(name: str) -> np.ndarray | None:
        return by_name[name].load() if name in by_name else None

    tokens = np.arange(_length(model, decoder)) * 7919 % decoder.hyper.vocabulary
    expected = graph_logits(model, decoder, tokens, threads=threads)
    found = logits(tokens, decoder.hyper, weights)[-len(expected) :]
    difference = float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-12))
    if not difference <= BOUND:
        msg = f"a llama decoder of this graph's parts gives other logits (by {difference:.3g} of the largest)"
        fix = "the graph computes something between its layers that the architecture does not have"
        raise ModelError(msg, where=f"output '{decoder.logits.name}'", fix=fix)
    return difference


def _length(model: ir.Model, decoder: Decoder) -> int:
    """Return the length of the sequence: the graph's own if it is fixed, else such that windows would be seen."""
    spec = next(s for s in input_specs(model) if s.name == decoder.tokens.name)
    size = spec.dims[-1] if spec.dims else None
    if isinstance(size, int):
        return size
    shows = max(layer.attention.sight.largest for layer in decoder.layers) + 2
    limit = decoder.layers[0].attention.frequencies.positions or MOST_TOKENS
    return min(max(TOKENS, shows), MOST_TOKENS, max(TOKENS, limit))


def graph_logits(model: ir.Model, decoder: Decoder, tokens: np.ndarray, *, threads: int = 1) -> np.ndarray:
    """Run the graph on a sequence, caches empty; returns float32, shape (positions, vocabulary)."""
    feeds = _feeds(model, decoder, tokens)
    session = open_session(model, SessionConfig(threads=threads))
    found = run(session, feeds)[decoder.logits.name or ""]
    return found.reshape(-1, found.shape[-1]).astype(np.float32)


def _feeds(model: ir.Model, decoder: Decoder, tokens: np.ndarray) -> Mapping[str, np.ndarray]:
    """Return the inputs of one sequence: its tokens, ones for a mask, its positions, empty caches."""
    feeds: dict[str, np.ndarray] = {}
    for spec in input_specs(model):
        if spec.name == decoder.tokens.name:
            feeds[spec.name] = tokens[None].astype(spec.dtype)
        elif len(spec.dims) == 4:
            sizes = [d if isinstance(d, int) else 1 if axis == 0 else 0 for axis, d in enumerate(spec.dims)]
            feeds[spec.name] = np.zeros(sizes, spec.dtype)
        elif len(spec.dims) == 2 and np.issubdtype(spec.dtype, np.integer):
            row = np.arange(len(tokens)) if "position" in spec.name else np.ones(len(tokens))
            feeds[spec.name] = row[None].astype(spec.dtype)
        else:
            msg = "nobody knows what this input of a decoder takes"
            raise ModelError(
                msg, where=f"input '{spec.name}'", fix="export the decoder with tokens and caches only"
            )
    return feeds
