"""How many tokens a decoder takes at most: what its metadata state, and what its tables of positions hold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir

from bitwright.compiler.decoding.interface import find_interface, length_axis
from bitwright.compiler.decoding.ports import ports_of
from bitwright.compiler.errors import DataError, ModelError
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


def check_lengths(samples: Iterable[Mapping[str, np.ndarray]], model: ir.Model, where: str) -> None:
    """Refuse samples that reach beyond a decoder's context; those of other models, or of an unknown one, are let be.

    Args:
        samples: Input name -> array.
        model: What they are for.
        where: Where they come from, for the message.

    Raises:
        DataError: One does; the message names it.
    """
    context = context_of(model)
    if context is None:
        return
    try:
        interface = find_interface(ports_of(model.graph.inputs), ports_of(model.graph.outputs))
    except ModelError:
        return
    for number, sample in enumerate(samples):
        past = max((sample[port.name].shape[length_axis(port)] for port in interface.caches), default=0)
        total = past + sample[interface.tokens.name].shape[1]
        if total > context:
            what = f"{total} tokens, those in the cache included, where the model takes {context}"
            raise DataError(what, where=f"{where}: sample {number}", fix="give shorter sequences")
