"""What stands between text and token numbers goes where a language model goes: tokenizer, tokens that end a text."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from bitwright.compiler.bundle.atomic import write_atomically
from bitwright.compiler.decoding.ports import ports_of

LANGUAGE_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
LARGEST_FILE = 256 << 20


def copy_language_files(source: Path, model: ir.Model, folder: Path) -> list[str]:
    """Copy a language model's tokenizer and what belongs to it into the folder that a form of it was written to.

    Nothing that is there already is replaced.

    Args:
        source: The .onnx file; the files are beside it.
        model: Its graph; where no input holds rows of integers nothing is copied.
        folder: Where they go.

    Returns:
        Notes: files that were left alone because others of their name are there, or because they are too large.

    Raises:
        UsageError: The disk is full or the place cannot be written.
    """
    if not _reads_tokens(model):
        return []
    notes = []
    for name in LANGUAGE_FILES:
        found, place = source.with_name(name), folder / name
        if not found.is_file() or (place.exists() and place.samefile(found)):
            continue
        if found.stat().st_size > LARGEST_FILE:
            notes.append(f"{found}: larger than {LARGEST_FILE} bytes, not copied")
        elif not place.exists():
            write_atomically(place, found.read_bytes())
        elif not place.is_file() or place.read_bytes() != found.read_bytes():
            notes.append(
                f"{place}: another model's, left as it is; pass {found} where this model's is needed"
            )
    return notes


def _reads_tokens(model: ir.Model) -> bool:
    """Tell whether a model may read text: an input holds rows of integers."""
    ports = ports_of(model.graph.inputs)
    return any(port.dtype is not None and port.dtype.kind in "iu" and port.rank == 2 for port in ports)
