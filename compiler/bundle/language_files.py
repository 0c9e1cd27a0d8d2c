"""What stands between text and token numbers goes where a decoder goes: its tokenizer, the tokens that end a text."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from bitwright.compiler.bundle.atomic import write_atomically
from bitwright.compiler.decoding.interface import find_interface
from bitwright.compiler.decoding.ports import ports_of
from bitwright.compiler.errors import ModelError

LANGUAGE_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
LARGEST_FILE = 256 << 20


def copy_language_files(source: Path, model: ir.Model, folder: Path) -> list[str]:
    """Copy a decoder's tokenizer and what belongs to it into the folder that a form of it was written to.

    Nothing that is there already is replaced.

    Args:
        source: The decoder's .onnx file; the files are beside it.
        model: The decoder; of any other model nothing is copied.
        folder: Where they go.

    Returns:
        Notes: files that were left alone because others of their name are there, or because they are too large.

    Raises:
        UsageError: The disk is full or the place cannot be written.
    """
    if not _is_decoder(model):
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


def _is_decoder(model: ir.Model) -> bool:
    try:
        find_interface(ports_of(model.graph.inputs), ports_of(model.graph.outputs))
    except ModelError:
        return False
    return True
