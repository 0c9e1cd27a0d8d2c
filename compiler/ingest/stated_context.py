"""How many positions a decoder was made for, where only the config.json beside it says so, as exporters leave it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from bitwright.compiler.decoding.context import CONTEXT_LENGTH, context_of
from bitwright.compiler.errors import ModelError
from bitwright.compiler.hugging_face.json_file import read_object

CONFIG_FILE = "config.json"
LARGEST_CONFIG = 1 << 20
MAXIMUM = "max_position_embeddings"
# Positions that are stretched when the model runs reach further than config.json says; these two do not.
EXACT = ("default", "llama3")
TOKEN_TYPES = (ir.DataType.INT64, ir.DataType.INT32)
ROPE_KEYS = ("rope_scaling", "rope_parameters")


def state_context(model: ir.Model, path: Path) -> int | None:
    """Write the context into a model's metadata where the graph does not say it and the config.json beside it does.

    A graph that computes its angles goes on beyond the positions it was trained for, and writes nonsense.

    Args:
        model: Its metadata may get an entry, nothing else is changed.
        path: The .onnx file.

    Returns:
        The context that was written, or None: it is known already, or nobody says it.
    """
    if context_of(model) is not None or not _reads_tokens(model):
        return None
    try:
        config = read_object(path.with_name(CONFIG_FILE), LARGEST_CONFIG)
    except ModelError:
        return None  # it may be anybody's file; a decoder needs none
    found = config.get(MAXIMUM)
    if not isinstance(found, int) or isinstance(found, bool) or not 0 < found < 1 << 30:
        return None
    if any(_stretched(config.get(key)) for key in ROPE_KEYS):
        return None
    model.metadata_props[CONTEXT_LENGTH] = str(found)
    return found


def _reads_tokens(model: ir.Model) -> bool:
    return any(
        v.shape is not None and len(v.shape) == 2 and v.dtype in TOKEN_TYPES for v in model.graph.inputs
    )


def _stretched(rope: Any) -> bool:
    if not isinstance(rope, dict):
        return rope is not None
    return rope.get("rope_type", rope.get("type", EXACT[0])) not in EXACT
