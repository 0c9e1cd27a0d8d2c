"""Quantize a text recognizer, compile it for this machine and for an ARM board, and read lines with every form of it.

The model is PP-OCRv6 small (Apache-2.0) from the Python package ``rapidocr``; ``make demo`` installs it. The lines are
rendered here; those that calibrate are never read.

usage: python examples/read_text.py [MODEL.onnx] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnxruntime_deploy import open_deployed
from rich.console import Console
from rich.table import Table
from text_lines import decode, edit_distance, input_of, lines, samples

import bitwright
from bitwright.compiler.errors import BitwrightError
from bitwright.targets.loader import load_profile

MODEL_IN_PACKAGE = "models/PP-OCRv6_rec_small.onnx"
BOARD = "arm-cortex-a76"
READ_LINES, EMULATED_LINES, ROUNDS, CALLS = 64, 4, 5, 8

Read = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Form:
    """One form of the model, ready to read.

    Attributes:
        name: Column title.
        read: Input [1, 3, 48, 320] -> scores [1, steps, symbols].
        size: Bytes of the file that holds the model.
        seconds: Best time of a few calls, or None where a time would mean nothing.
        proof: What verification found.
        count: How many lines it reads.
    """

    name: str
    read: Read
    size: int
    seconds: Callable[[np.ndarray], float] | None
    proof: str = ""
    count: int = READ_LINES


def packaged_model() -> Path:
    """Return the recognizer that ``make demo`` installs."""
    package = find_spec("rapidocr")
    if package is None or not package.submodule_search_locations:
        msg = "the text recognizer is not installed: pip install --no-deps rapidocr==3.10.0, or make demo"
        raise SystemExit(msg)
    return Path(package.submodule_search_locations[0], MODEL_IN_PACKAGE)


def in_session(name: str, session: ort.InferenceSession, size: int) -> Form:
    """Return the form that ONNX Runtime executes."""
    port = session.get_inputs()[0].name

    def read(x: np.ndarray) -> np.ndarray:
        return session.run(None, {port: x})[0]

    return Form(name, read, size, lambda x: min(timeit.repeat(partial(read, x), number=1, repeat=CALLS)))


def compiled(model: Path, target: str, data: list[dict[str, np.ndarray]], folder: Path) -> Form | str:
    """Compile for one target; return its form, or why this machine cannot run it."""
    bundle = bitwright.compile(model, target=target, data=data, output=folder)
    why_not = bundle.why_not_executable()
    if why_not:
        return f"{target}: compiled, not executed: {why_not}"
    found = bundle.report["verification"]
    proof = f"{found['calls'] - len(found['kernel_differences'])} of {found['calls']} kernels"
    size = (folder / "lib" / "model.so").stat().st_size
    read = partial(_run_artifact, bundle)
    if found["executed"] == "emulated":
        return Form(f"compiled, {target} (emulated)", read, size, None, proof, EMULATED_LINES)
    return Form(f"compiled, {target}", read, size, partial(_time_artifact, bundle), proof)


def _time_artifact(bundle: bitwright.Bundle, x: np.ndarray) -> float:
    seconds = bundle.execute({"x": x}, repeat=CALLS).seconds
    assert seconds is not None
    return seconds


def _run_artifact(bundle: bitwright.Bundle, x: np.ndarray) -> np.ndarray:
    return next(iter(bundle.run({"x": x}).values()))


def forms(model: Path, output: Path, console: Console) -> list[Form]:
    """Make every form of the model."""
    data = list(samples())
    threads = load_profile("host").cores
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    found = [in_session("fp32", ort.InferenceSession(model, options), model.stat().st_size)]
    console.print("== quantizing for ONNX Runtime")
    quantized = output / "onnxruntime" / "model.onnx"
    quantized.parent.mkdir(parents=True, exist_ok=True)
    bitwright.quantize(model, target="host", data=data, output=quantized)
    found.append(
        in_session("int8, ONNX Runtime", open_deployed(quantized, threads), quantized.stat().st_size)
    )
    for target in ("host", BOARD):
        console.print(f"== compiling for {target} and verifying")
        form = _compiled_or_reason(model, target, data, output / target)
        if isinstance(form, Form):
            found.append(form)
        else:
            console.print(form)
    return found


def _compiled_or_reason(
    model: Path, target: str, data: list[dict[str, np.ndarray]], folder: Path
) -> Form | str:
    try:
        return compiled(model, target, data, folder)
    except BitwrightError as error:
        return f"{target}: {error}"


def alphabet_of(model: Path) -> list[str]:
    """Return the symbols that the model's scores stand for; the first is the blank."""
    entries = ort.InferenceSession(model).get_modelmeta().custom_metadata_map
    return ["", *entries["character"].split("\n"), " "]


def show(found: list[Form], alphabet: list[str], console: Console) -> dict[str, float]:
    """Read the lines with every form, print the texts and the summary; returns the character accuracy of each."""
    console.print(f"== reading {READ_LINES} lines with every form")
    written = list(lines(READ_LINES, seed=2))
    texts = {f.name: [decode(f.read(input_of(p)), alphabet) for _, p in written[: f.count]] for f in found}
    truth = [text for text, _ in written]
    accuracy = {name: character_accuracy(truth[: len(got)], got) for name, got in texts.items()}
    console.print(_table_of_texts(truth, texts))
    console.print(_summary(found, accuracy, times(found)))
    return accuracy


def character_accuracy(truth: list[str], read: list[str]) -> float:
    """Return 1 - edit distance / length over all lines."""
    errors = sum(edit_distance(a, b) for a, b in zip(truth, read, strict=True))
    return 1 - errors / sum(map(len, truth))


def _table_of_texts(truth: list[str], texts: dict[str, list[str]]) -> Table:
    table = Table("written", *texts, title="What each form reads in lines that did not calibrate")
    for k in range(EMULATED_LINES):
        table.add_row(truth[k], *(got[k] for got in texts.values()))
    return table


def times(found: list[Form]) -> dict[str, float]:
    """Return the best seconds of every form that can be timed, measured in turns so that all meet the same load."""
    picture = next(lines(1, seed=3))[1]
    timed = {f.name: f.seconds for f in found if f.seconds is not None}
    rounds = [{name: measure(input_of(picture)) for name, measure in timed.items()} for _ in range(ROUNDS)]
    return {name: min(r[name] for r in rounds) for name in timed}


def _summary(found: list[Form], accuracy: dict[str, float], seconds: dict[str, float]) -> Table:
    table = Table(*("", *(f.name for f in found)), title="The same model in every form")
    table.add_row("lines read", *(str(f.count) for f in found))
    table.add_row("character accuracy", *(f"{accuracy[f.name]:.2%}" for f in found))
    table.add_row("size", *(f"{f.size / 1e6:.1f} MB" for f in found))
    known = [seconds.get(f.name) for f in found]
    table.add_row("time of one line", *("not measured" if s is None else f"{s * 1e3:.1f} ms" for s in known))
    table.add_row("time / fp32", *("" if s is None else f"{s / seconds[found[0].name]:.2f}" for s in known))
    table.add_row("bit-exact kernels", *(f.proof for f in found))
    table.caption = f"Times: best of {ROUNDS * CALLS} calls on this machine, taking turns."
    return table


def main() -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--output", type=Path, default=Path("out/read_text"))
    arguments = parser.parse_args()
    model = arguments.output / "model.onnx"
    model.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(arguments.model or packaged_model(), model)
    console = Console(width=None if Console().is_terminal else 120)
    start = time.perf_counter()
    found = forms(model, arguments.output, console)
    accuracy = show(found, alphabet_of(model), console)
    (arguments.output / "accuracy.json").write_text(json.dumps(accuracy, indent=1) + "\n")
    for report in sorted(arguments.output.glob("*/report.html")):
        console.print(f"report: {report}")
    console.print(f"finished in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
