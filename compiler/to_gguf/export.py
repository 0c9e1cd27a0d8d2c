"""``gguf``: an ONNX decoder written as a GGUF file that llama.cpp runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.compiler.bundle.atomic import open_atomically
from bitwright.compiler.compilation import Progress, Silent
from bitwright.compiler.decoding.context import context_of
from bitwright.compiler.errors import UsageError
from bitwright.compiler.gguf.bit_planes import Bytes
from bitwright.compiler.gguf.rounding import quantize, square_error
from bitwright.compiler.gguf.types import F16, F32, TensorType
from bitwright.compiler.gguf.values import Typed, text, uint32
from bitwright.compiler.gguf.writer import PlannedTensor, write_gguf
from bitwright.compiler.ingest.dataset import Dataset, dataset_from_memory, open_dataset
from bitwright.compiler.ingest.model_reader import read_model
from bitwright.compiler.ingest.stated_context import state_context
from bitwright.compiler.llama.decoder import Decoder, HyperParameters
from bitwright.compiler.llama.recognise import recognise
from bitwright.compiler.llama.tensors import ModelTensor, tensors_of
from bitwright.compiler.to_gguf.budget import check_feasible, measure, spend
from bitwright.compiler.to_gguf.feedback import Feedbacks, with_feedback
from bitwright.compiler.to_gguf.importance import mean_squares
from bitwright.compiler.to_gguf.metadata import check_expressible, of_decoder
from bitwright.compiler.to_gguf.mixtures import GUESSED, assign, fallbacks, mixture
from bitwright.compiler.to_gguf.proof import prove
from bitwright.compiler.to_gguf.tokenizer import no_tokenizer, read_tokenizer
from bitwright.passes.normalize import normalize

QUANTIZATION_VERSION = 2


@dataclass(frozen=True)
class Request:
    """What is wanted.

    Attributes:
        model: The ONNX file.
        output: The file to write.
        kind: A mixture's name; with ``bits`` ignored.
        bits: Choose the types under so many bits for each weight.
        data: Samples for importance: a path as on the command line, arrays, or None.
        tokenizer: tokenizer.json; by default the one beside the model.
        without_tokenizer: Write none.
        name: general.name; by default the model file's.
        context: Longest sequence; by default what metadata, rotary tables or a config.json beside the model say.
        pure: Every matrix gets the type the mixture usually has.
        threads: Threads that compute.
        feedback: Round codes by GPTQ, within the scales that are found for uncorrelated inputs; needs data.
    """

    model: Path
    output: Path
    kind: str = "Q4_K_M"
    bits: float | None = None
    data: str | Mapping[str, np.ndarray] | None = None
    tokenizer: Path | None = None
    without_tokenizer: bool = False
    name: str | None = None
    context: int | None = None
    pure: bool = False
    threads: int = 1
    feedback: bool = False


@dataclass(frozen=True)
class WrittenTensor:
    """One tensor of the file.

    Attributes:
        name: GGUF's name.
        kind: Type.
        shape: Outermost dimension first.
        sqnr_db: Power of the weights over that of the error, importance included; infinite where nothing was lost.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    sqnr_db: float


@dataclass(frozen=True)
class Written:
    """A finished file.

    Attributes:
        path: The file.
        kind: What the types follow: a mixture's name, or the budget.
        bytes: Its size.
        bits: Bits of the tensors' data for each weight.
        tensors: What it holds.
        proof: Largest relative difference between the graph's logits and those of the parts.
        notes: What was assumed, what was stored otherwise than asked.
    """

    path: Path
    kind: str
    bytes: int
    bits: float
    tensors: tuple[WrittenTensor, ...]
    proof: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "model": str(self.path),
            "type": self.kind,
            "bytes": self.bytes,
            "bits_per_weight": self.bits,
            "logits_difference": self.proof,
            "tensors": [
                {
                    "name": t.name,
                    "type": t.kind,
                    "shape": list(t.shape),
                    "sqnr_db": t.sqnr_db if np.isfinite(t.sqnr_db) else None,
                }
                for t in self.tensors
            ],
            "notes": list(self.notes),
        }


@dataclass(frozen=True, eq=False)
class Opened:
    """A decoder that was recognised and proven.

    Attributes:
        model: Normalized.
        decoder: Its parts.
        tensors: The same as the file will have them.
        proof: See :func:`prove`.
        dataset: The samples, if there are any.
        warnings: Of model and data.
    """

    model: ir.Model
    decoder: Decoder
    tensors: tuple[ModelTensor, ...]
    proof: float
    dataset: Dataset | None
    warnings: tuple[str, ...]


def open_decoder(
    path: Path, data: str | Mapping[str, np.ndarray] | None = None, *, threads: int = 1
) -> Opened:
    """Read a model, recognise the decoder in it and prove it.

    Raises:
        ModelError: The model is refused, or is no llama decoder.
        DataError: The samples do not fit the model.
        UsageError: There are no such samples.
    """
    source = read_model(path)
    state_context(source.model, path)
    model = source.model.clone()
    normalize(model)
    decoder = recognise(model)
    tensors = tensors_of(decoder)
    dataset = None
    if data is not None:
        dataset = (
            open_dataset(data, source.model)
            if isinstance(data, str)
            else dataset_from_memory(data, source.model)
        )
    of_data = () if dataset is None else (*dataset.notes, *dataset.warnings)
    warnings = (*source.warnings, *of_data)
    return Opened(model, decoder, tensors, prove(model, decoder, tensors, threads=threads), dataset, warnings)


def export_gguf(request: Request, progress: Progress | None = None) -> Written:
    """Write a llama decoder as a GGUF file.

    Args:
        request: What is wanted.
        progress: Told how far the work is.

    Raises:
        UsageError: The type is unknown, a budget has no data, or the file cannot be written.
        ModelError: The model is refused, or is no llama decoder; the message names the node.
        DataError: The samples or the tokenizer do not fit the model.
        InfeasibleBudgetError: No types are small enough for the budget.
    """
    told = progress or Silent()
    chosen = mixture(request.kind)
    if request.bits is not None and request.data is None:
        msg = "without samples nobody knows which matrices matter"
        raise UsageError(msg, where="--budget", fix="pass --data")
    if request.feedback and request.data is None:
        msg = "what errors of one column do to the others is learned from samples"
        raise UsageError(msg, where="--feedback", fix="pass --data")
    told.phase("recognise")
    opened = open_decoder(request.model, request.data, threads=request.threads)
    hyper = opened.decoder.hyper
    context = request.context or context_of(opened.model) or hyper.context
    check_expressible(opened.decoder, opened.tensors, context)
    vocabulary, notes = _vocabulary(request, hyper)
    if request.bits is not None:
        check_feasible(opened.tensors, request.bits)
    importance = _importance(opened, request, told)
    if request.bits is None:
        weighted = bool(importance)
        types = assign(chosen, opened.tensors, hyper, weighted=weighted, pure=request.pure)
        kind, number = (f"{chosen.name}, pure" if request.pure else chosen.name), chosen.number
    else:
        types = _spend(opened, importance, request, told)
        kind, number = f"{request.bits:g} bits a weight", GUESSED
    notes = [*opened.warnings, *notes, *_fallback_notes(types, opened.tensors)]
    metadata = {
        **_general(request, hyper.architecture, number),
        **of_decoder(hyper, context),
        **vocabulary,
    }
    told.phase("round and write")
    rounding = _Rounding(
        opened.tensors, types, importance, request.threads, told, _feedbacks(opened, request, told)
    )
    with open_atomically(request.output) as file:
        size = write_gguf(file, metadata, rounding.planned, rounding.data_of)
    elements = sum(t.elements for t in opened.tensors)
    bits = 8 * sum(p.bytes for p in rounding.planned) / elements
    return Written(request.output, kind, size, bits, tuple(rounding.written), opened.proof, tuple(notes))


def _importance(opened: Opened, request: Request, told: Progress) -> dict[str, NDArray[np.float64]]:
    if opened.dataset is None:
        return {}
    told.phase("calibrate")
    return mean_squares(
        opened.model,
        opened.dataset,
        opened.tensors,
        threads=request.threads,
        progress=_steps(told, "samples"),
    )


def _feedbacks(opened: Opened, request: Request, told: Progress) -> Feedbacks | None:
    if not request.feedback or opened.dataset is None:
        return None
    return Feedbacks(
        opened.model,
        opened.dataset,
        opened.tensors,
        threads=request.threads,
        progress=_steps(told, "samples"),
    )


def _steps(told: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: told.step(done, total, what)


def _spend(
    opened: Opened, importance: Mapping[str, NDArray[np.float64]], request: Request, told: Progress
) -> dict[str, TensorType]:
    assert opened.dataset is not None and request.bits is not None
    told.phase("measure")
    losses = measure(
        opened.model, opened.decoder, opened.tensors, opened.dataset, importance,
        threads=request.threads, progress=_steps(told, "matrices"),
    )  # fmt: skip
    told.phase("allocate")
    return spend(
        opened.tensors,
        importance,
        losses,
        request.bits,
        threads=request.threads,
        progress=_steps(told, "matrices"),
    )


def _fallback_notes(types: Mapping[str, TensorType], tensors: Sequence[ModelTensor]) -> list[str]:
    return [
        f"rows of {columns} elements are no multiple of 256: {len(names)} matrices are stored in blocks of 32 "
        f"({', '.join(sorted({types[n].name for n in names}))})"
        for columns, names in fallbacks(types, tensors).items()
    ]


def _vocabulary(request: Request, hyper: HyperParameters) -> tuple[dict[str, Typed], list[str]]:
    """Return the tokenizer's metadata and notes about it."""
    if request.without_tokenizer:
        return no_tokenizer(), ["no tokenizer: llama.cpp takes and gives token numbers only"]
    beside = request.model.with_name("tokenizer.json")
    path = request.tokenizer or beside
    if not path.is_file():
        msg = "there is no tokenizer.json" if request.tokenizer is None else "there is no such file"
        raise UsageError(
            msg, where=str(path), fix="pass --tokenizer FILE, or --no-tokenizer for token numbers only"
        )
    found = read_tokenizer(path, hyper.vocabulary)
    return found.metadata(), list(found.notes)


def _general(request: Request, architecture: str, file_type: int) -> dict[str, Typed]:
    return {
        "general.architecture": text(architecture),
        "general.type": text("model"),
        "general.name": text(request.name or request.model.stem),
        "general.file_type": uint32(file_type),
        "general.quantization_version": uint32(QUANTIZATION_VERSION),
    }


class _Rounding:
    """Loads, rounds and judges one tensor after the other."""

    def __init__(
        self,
        tensors: Sequence[ModelTensor],
        types: Mapping[str, TensorType],
        importance: Mapping[str, NDArray[np.float64]],
        threads: int,
        told: Progress,
        feedbacks: Feedbacks | None = None,
    ) -> None:
        self._by_name, self._importance = {t.name: t for t in tensors}, importance
        self._feedbacks = feedbacks
        self._threads, self._told = threads, told
        self.planned = [PlannedTensor(t.name, types[t.name], t.shape) for t in tensors]
        self.written: list[WrittenTensor] = []

    def data_of(self, planned: PlannedTensor) -> Bytes:
        """Return a tensor's bytes."""
        values = self._by_name[planned.name].load().reshape(-1, planned.shape[-1])
        share = self._importance.get(planned.name)
        stored = quantize(values, planned.kind, share, threads=self._threads)
        feedback = None if self._feedbacks is None else self._feedbacks.of(self._by_name[planned.name])
        if feedback is not None and planned.kind not in (F32, F16):
            stored = with_feedback(values.astype(np.float32, copy=False), stored, planned.kind, feedback)
        self.written.append(
            WrittenTensor(
                planned.name, planned.kind.name, planned.shape, _sqnr(values, stored, planned.kind, share)
            )
        )
        self._told.step(len(self.written), len(self.planned), "tensors")
        return stored


def _sqnr(
    values: NDArray[np.float32], stored: Bytes, kind: TensorType, share: NDArray[np.float64] | None
) -> float:
    if kind in (F32, F16):
        return float("inf")
    power = np.einsum("rc,rc->c", values, values, dtype=np.float64)
    signal = float(power.sum() if share is None else power @ share)
    noise = square_error(values, stored, kind, share)
    return 10 * float(np.log10(signal / noise)) if signal > 0 and noise > 0 else float("inf")
