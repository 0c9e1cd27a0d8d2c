"""A Hugging Face folder to ONNX: the graph is built from config.json, the weights are copied tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from bitwright.compiler.bundle.model_files import write_model_atomically
from bitwright.compiler.errors import BitwrightError, InternalError, ModelError, UsageError
from bitwright.compiler.graph.saving import INLINE_LIMIT_BYTES, weight_bytes
from bitwright.compiler.hugging_face.checkpoint import Checkpoint, open_checkpoint
from bitwright.compiler.hugging_face.graph import LOGITS, TOKENS, FloatName, Form, decoder_model
from bitwright.compiler.hugging_face.json_file import check_regular
from bitwright.compiler.llama.reference import logits
from bitwright.compiler.ort.session import SessionConfig, open_session, run

# What belongs to the model beside its weights.
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
LARGEST_COMPANION = 64 << 20
# Float32 sums in another order differ by some 1e-6 of the largest logit, products in 16 bits by some 1e-3; a wrong
# layer by tenths.
BOUNDS = {"float32": 1e-3, "float16": 5e-2}
CHECKED_TOKENS = 12
# A window of attention is looked behind up to here: the numpy decoder holds all scores of a layer at once.
MOST_CHECKED = 512


@dataclass(frozen=True)
class ExportedDecoder:
    """A decoder that was written.

    Attributes:
        path: The ONNX file.
        companions: Files that were copied beside it.
        architecture: As config.json has it.
        parameters: Elements of all weights.
        context: Longest sequence.
        largest_difference: Largest difference of the logits to the decoder in numpy, over the largest logit; None if
            the model is too large to be run for a check.
    """

    path: Path
    companions: tuple[Path, ...]
    architecture: str
    parameters: int
    context: int
    largest_difference: float | None


def export_folder(
    folder: Path,
    output: Path,
    *,
    form: Form = "cache",
    dtype: FloatName = "float32",
    context: int | None = None,
    threads: int = 1,
) -> ExportedDecoder:
    """Write the decoder of a folder as an ONNX file, with external data above 1 GiB.

    At most some tens of megabytes of the weights are in memory at a time. A model below 1 GiB is run on a few tokens
    and compared with the same decoder in numpy, before anything is written.

    Args:
        folder: With config.json and safetensors.
        output: The .onnx file; the tokenizer's files are copied beside it.
        form: With a cache of keys and values, or without.
        dtype: Of weights, products and caches.
        context: Longest sequence; by default the checkpoint's.
        threads: That the check computes with.

    Raises:
        UsageError: There is no such folder, the context is longer than the checkpoint's, or another model's tokenizer
            lies where this one's would be written.
        ModelError: The folder is refused, or the check fails.
    """
    checkpoint = open_checkpoint(folder)
    limit = checkpoint.hyper.context
    if context is not None and not 1 <= context <= limit:
        what = f"{context} positions; the checkpoint was made for {limit}"
        raise UsageError(what, where="--context", fix=f"choose 1 to {limit}")
    companions = _companions(folder, output)
    model = decoder_model(checkpoint, form, dtype, context=context)
    difference = None
    if weight_bytes(model) <= INLINE_LIMIT_BYTES:
        difference = _difference(model, checkpoint, dtype, threads)
    _write(model, output, companions)
    parameters = sum(int(np.prod(p.shape)) for p in checkpoint.parts.values())
    architecture = checkpoint.config.architecture
    return ExportedDecoder(output, tuple(companions), architecture, parameters, context or limit, difference)


def _write(model: ir.Model, output: Path, companions: dict[Path, str]) -> None:
    """Write the model, its weights read as they are written."""
    try:
        write_model_atomically(model, output, companions)
    except ir.serde.SerdeError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        # What is wrong with a weight is found in the middle of somebody else's serialization.
        if isinstance(cause, BitwrightError):
            raise cause from None
        raise


def _companions(folder: Path, output: Path) -> dict[Path, str]:
    """Return what is copied beside the model, and where to.

    Raises:
        UsageError: Something else is there.
        ModelError: A file is too large or no text.
    """
    found: dict[Path, str] = {}
    for name in COMPANIONS:
        source, place = folder / name, output.parent / name
        if not source.exists():
            continue
        text = _text(source)
        if not place.exists():
            found[place] = text
        elif not place.is_file() or place.read_bytes() != text.encode("utf-8"):
            what = "belongs to another model and would be replaced"
            raise UsageError(what, where=str(place), fix="write the model to a folder of its own")
    return found


def _text(path: Path) -> str:
    check_regular(path, LARGEST_COMPANION)
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        msg = f"is not UTF-8: {error.reason} at byte {error.start}"
        raise ModelError(msg, where=str(path), fix="get the file anew") from None


def _difference(model: ir.Model, checkpoint: Checkpoint, dtype: FloatName, threads: int) -> float:
    """Return how far the graph's logits are from those of the same decoder in numpy.

    Raises:
        InternalError: Further than float sums in another order explain: the graph is wrong.
    """
    hyper = checkpoint.hyper
    longest = CHECKED_TOKENS if hyper.window is None else min(CHECKED_TOKENS + hyper.window, MOST_CHECKED)
    count = min(longest, int(model.metadata_props["context_length"]))
    tokens = np.arange(count) * 7919 % hyper.vocabulary
    expected = logits(tokens, hyper, checkpoint.weight)
    feeds = {TOKENS: tokens[None]}
    for value in model.graph.inputs[1:]:
        empty = np.zeros((1, hyper.key_heads, 0, hyper.head_width), dtype)
        feeds[value.name or ""] = empty
    found = run(open_session(model, SessionConfig(threads=threads)), feeds)[LOGITS][0]
    largest = max(float(np.abs(expected).max()), 1e-12)
    difference = float(np.abs(found - expected).max()) / largest
    if not difference <= BOUNDS[dtype]:
        msg = f"the graph's logits differ from the checkpoint's by {difference:.3g} of the largest"
        raise InternalError(
            msg, where=str(checkpoint.folder), fix="please report it with the folder's config.json"
        )
    return difference
