"""tinylm as GGUF: size and perplexity of every type, beside llama.cpp's own rounding, and what llama.cpp makes of it.

``BITWRIGHT_ZOO=... python benchmarks/language_models/gguf_types.py [--types Q4_K_M ...] [--bits 4.5 ...]
[--windows 128] [--out DIR]``

Perplexities are those of the ONNX model with the weights that the file gives, dequantized, on 256-token windows of
held-out text, in ONNX Runtime. Where ``llama_cpp`` (PyPI: llama-cpp-python) is importable, llama.cpp also rounds the
same float file by its own quantizers, loads our files, and generates.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.compiler.ort.session import SessionConfig, open_session
from bitwright.compiler.to_gguf.export import Opened, Request, export_gguf, open_decoder
from bitwright.compiler.to_gguf.importance import mean_squares
from bitwright.compiler.to_gguf.mixtures import MIXTURES
from bitwright.compiler.to_gguf.restore import listing, with_weights_of

sys.path.insert(0, str(Path(__file__).parents[1]))
from zoo import folder, load

WINDOW = 256
CALIBRATION = 32
RIVALS = ("Q2_K", "Q3_K_M", "Q4_0", "Q4_K_M", "Q5_K_S")
GENERATED = ("F32", "Q4_K_M", "Q5_K_S", "Q2_K")
PROMPT = "The following example shows how to"


@dataclass(frozen=True)
class Row:
    """One file."""

    types: str
    bits: float
    kilobytes: float
    perplexity: float
    ratio: float
    seconds: float
    rival_ratio: float | None = None


def perplexity(run: Callable[[np.ndarray], np.ndarray], tokens: np.ndarray, windows: int) -> float:
    """Return the perplexity per token over evenly spaced windows."""
    losses = []
    for start in np.linspace(0, len(tokens) - WINDOW - 2, windows).astype(int):
        part = tokens[start : start + WINDOW + 1]
        logits = run(part[None, :-1])[0].astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        chosen = logits[np.arange(WINDOW), part[1:]]
        losses.append(float((np.log(np.exp(logits).sum(axis=-1)) - chosen).mean()))
    return float(np.exp(np.mean(losses)))


def of_model(model: Any, tokens: np.ndarray, windows: int) -> float:
    """Return the perplexity of an ONNX model."""
    session = open_session(model, SessionConfig(threads=1))
    return perplexity(lambda ids: session.run(None, {"input_ids": ids})[0], tokens, windows)


def rounded_by_llama_cpp(
    source: Path, target: Path, number: int, importance: Mapping[str, np.ndarray]
) -> Path:
    """Let llama.cpp round a float file, with the mean squares of each tensor's input as its importance matrix."""
    library = import_module("llama_cpp")
    entry = library.llama_model_imatrix_data
    kept = [np.ascontiguousarray(values, np.float32) for values in importance.values()]
    entries = (entry * (len(kept) + 1))()  # an entry without name ends the list
    for place, name, values in zip(entries, importance, kept, strict=False):
        place.name, place.size = name.encode(), values.size
        place.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    parameters = library.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = number, 1
    parameters.imatrix = ctypes.cast(entries, ctypes.POINTER(entry))
    code = library.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
    if code != 0:
        msg = f"llama.cpp cannot round {source} ({code})"
        raise RuntimeError(msg)
    return target


def in_llama_cpp(path: Path, opened: Opened, tokens: np.ndarray) -> dict[str, Any]:
    """Load a file in llama.cpp: its logits beside those of the ONNX model with the same weights, and a text."""
    library = import_module("llama_cpp")
    model = library.Llama(str(path), n_ctx=WINDOW, logits_all=True, verbose=False, n_threads=1)
    part = tokens[:128]
    model.eval(part.tolist())
    found = np.array(model.scores[: len(part)])
    session = open_session(with_weights_of(opened, path), SessionConfig(threads=1))
    expected = session.run(None, {"input_ids": part[None]})[0][0]
    text = model(PROMPT, max_tokens=40, temperature=0.0)["choices"][0]["text"]
    return {
        "file": path.name,
        "largest_difference": float(np.abs(found - expected).max() / np.abs(expected).max()),
        "mean_difference": float(np.abs(found - expected).mean() / np.abs(expected).mean()),
        "same_token": float((found.argmax(axis=-1) == expected.argmax(axis=-1)).mean()),
        "text": text,
    }


def table(rows: Iterable[Row]) -> str:
    """Return the table for the documentation."""
    lines = ["| types | bits a weight | KiB | perplexity | / fp32 | llama.cpp's rounding / fp32 | s |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for r in rows:
        rival = "" if r.rival_ratio is None else f"{r.rival_ratio:.4f}"
        figures = f"{r.bits:.2f} | {r.kilobytes:.0f} | {r.perplexity:.3f} | {r.ratio:.4f} | {rival} | {r.seconds:.0f}"
        lines.append(f"| {r.types} | {figures} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Bench:
    """What every file is measured with.

    Attributes:
        model: The float model.
        opened: The same, recognised; it takes the weights of one file after the other.
        tokens: Held-out text.
        samples: Calibration samples.
        importance: Mean squares that they give.
        windows: Windows of held-out text.
        out: Folder of the files.
        base: Perplexity of the float model.
        float_file: The model as a file of float32, what llama.cpp rounds; None without llama.cpp.
    """

    model: Path
    opened: Opened
    tokens: np.ndarray
    samples: dict[str, np.ndarray]
    importance: Mapping[str, np.ndarray]
    windows: int
    out: Path
    base: float
    float_file: Path | None

    def ratio(self, path: Path) -> float:
        """Return the perplexity with a file's weights over that of the float model."""
        return of_model(with_weights_of(self.opened, path), self.tokens, self.windows) / self.base

    def row(self, kind: str, bits: float | None) -> Row:
        """Make and measure a file."""
        path = self.out / (f"{kind}.gguf" if bits is None else f"{bits:g}-bits.gguf")
        start = time.monotonic()
        written = export_gguf(Request(self.model, path, kind, bits, self.samples))
        seconds = time.monotonic() - start
        ratio, rival = self.ratio(path), None
        if self.float_file is not None and bits is None and kind in RIVALS:
            rival_path = self.out / "rival.gguf"
            theirs = rounded_by_llama_cpp(self.float_file, rival_path, MIXTURES[kind].number, self.importance)
            assert listing(theirs).bits == written.bits, "the same types everywhere, or it is no comparison"
            rival = self.ratio(theirs)
        return Row(written.kind, written.bits, written.bytes / 1024, ratio * self.base, ratio, seconds, rival)


def prepared(windows: int, out: Path) -> Bench:
    """Open model and data, and measure the float model."""
    out.mkdir(parents=True, exist_ok=True)
    model, data = folder("tinylm") / "model.onnx", load("tinylm")
    tokens = data["test"].astype(np.int64)
    samples = {
        "input_ids": data["calib"].astype(np.int64)[: CALIBRATION * WINDOW].reshape(CALIBRATION, WINDOW)
    }
    float_file = None
    if find_spec("llama_cpp") is not None:
        float_file = export_gguf(Request(model, out / "F32.gguf", "F32")).path
    base = of_model(model, tokens, windows)
    opened = open_decoder(model, samples)
    assert opened.dataset is not None, "there are samples"
    importance = mean_squares(opened.model, opened.dataset, opened.tensors)
    return Bench(model, opened, tokens, samples, importance, windows, out, base, float_file)


def main() -> None:
    """Make the files, measure them, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", nargs="*", default=list(MIXTURES))
    parser.add_argument("--bits", nargs="*", type=float, default=[4.5, 5.0])
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("gguf-files"))
    options = parser.parse_args()
    bench = prepared(options.windows, options.out)
    print(f"fp32 perplexity {bench.base:.4f} on {WINDOW * options.windows} tokens", flush=True)
    rows = []
    for kind, bits in [(k, None) for k in options.types] + [("Q4_K_M", b) for b in options.bits]:
        rows.append(bench.row(kind, bits))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))
    texts = []
    if bench.float_file is None:
        print("llama_cpp is not importable: no rival, no text")
    else:
        wanted = [k for k in GENERATED if k in options.types]
        texts = [in_llama_cpp(options.out / f"{k}.gguf", bench.opened, bench.tokens) for k in wanted]
    for found in texts:
        print(json.dumps(found, ensure_ascii=False))
    record = {"fp32": bench.base, "files": [asdict(r) for r in rows], "llama_cpp": texts}
    (options.out / "result.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
