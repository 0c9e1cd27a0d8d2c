"""``--unpadded``: a decoder's inputs for mask and positions go, because every caller would give the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from bitwright.compiler.compilation import Compilation
from bitwright.compiler.decoding.interface import Interface, find_interface, length_axis
from bitwright.compiler.decoding.ports import ports_of
from bitwright.compiler.errors import ModelError, UsageError
from bitwright.passes.assume_unpadded import AssumeUnpadded

OPTION = "--unpadded"


def interface_of(model: ir.Model) -> Interface:
    """Return what a decoder takes and gives.

    Raises:
        ModelError: It is none.
    """
    return find_interface(ports_of(model.graph.inputs), ports_of(model.graph.outputs))


def drop_masks(c: Compilation, notes: list[str]) -> None:
    """Let the source compute its mask and its positions; keep it as it was beside that.

    Args:
        c: Its source has been read.
        notes: Told what the user has stated.

    Raises:
        UsageError: The model takes no mask and no positions.
        ModelError: It is no decoder.
    """
    assert c.source is not None
    model = c.source.model.clone()
    try:
        done = AssumeUnpadded().run(model)
    except ModelError as error:
        where = f"{OPTION}: {error.where}" if error.where else OPTION
        raise ModelError(error.what, where=where, fix=error.fix) from error
    if not done.changed:
        what = "the model takes no 'attention_mask' and no 'position_ids'"
        raise UsageError(what, where=OPTION, fix="leave it out: nothing would change")
    c.masked, c.source = c.source.model, replace(c.source, model=model)
    notes.extend(
        f"{OPTION}: {note}, which the data keeps to; the model takes tokens"
        f"{' and caches' if interface_of(model).caches else ''} alone, and sequences of a batch are equally long"
        for note in done.notes
    )


def with_masks(model: ir.Model, sample: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a sample with the mask and the positions that a decoder takes where nobody is padded.

    Args:
        model: The decoder, with these inputs.
        sample: Its tokens and caches.
    """
    found = interface_of(model)
    caches = [sample[port.name].shape[length_axis(port)] for port in found.caches]
    return {**found.feeds(sample[found.tokens.name], caches[0] if caches else 0), **sample}
