"""How many tokens a decoder takes at most: what its metadata state, and what its tables of positions hold."""

from __future__ import annotations

import re

import onnx_ir as ir

from bitwright.compiler.llama.reach import table_positions

CONTEXT_LENGTH = "context_length"  # an entry of the model's metadata


def stated_context(model: ir.Model) -> int | None:
    """Return the context that a model's metadata state, or None."""
    stated = model.metadata_props.get(CONTEXT_LENGTH, "")
    return int(stated) if re.fullmatch("[1-9][0-9]{0,8}", stated) else None


def context_of(model: ir.Model) -> int | None:
    """Return how many tokens, those in the cache included, a decoder takes at most, or None if nobody says it."""
    known = [n for n in (stated_context(model), table_positions(model)) if n is not None]
    return min(known, default=None)
