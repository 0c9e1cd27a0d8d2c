"""Quantize a decoder to 4 bits, measure what that costs in perplexity, and let both continue a text.

MODEL is an ONNX decoder, e.g. of ``bitwright export FOLDER``, with its tokenizer.json beside it. The first nine tenths
of TEXT calibrate, the rest is what perplexity is measured on.

usage: python examples/language_model.py MODEL.onnx TEXT.txt --prompt "Once upon a time" [--output FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

import bitwright


def split_tokens(text: Path, tokenizer: Path, output: Path) -> Path:
    """Write the tokens of a text as two streams, ``calibration`` and ``test``, and return the file."""
    written = text.read_text(encoding="utf-8")
    tokens = np.array(Tokenizer.from_file(str(tokenizer)).encode(written, add_special_tokens=False).ids)
    cut = len(tokens) * 9 // 10
    ratio = len(written.encode()) / len(tokens)
    path = output / "tokens.npz"
    np.savez(path, calibration=tokens[:cut], test=tokens[cut:], bytes_per_token=ratio)
    return path


def quantized(model: Path, tokens: Path, output: Path, window: int) -> Path:
    """Write the 4-bit model; its tokenizer goes with it."""
    path = output / "model.onnx"
    data = f"{tokens}:calibration,window={window}"
    bitwright.quantize(model, target="host", data=data, recipe="w4", output=path)
    return path


def compared(models: dict[str, Path], tokens: Path, prompt: str, window: int) -> Table:
    """Return a table of size, perplexity, speed and text of each model."""
    table = Table("", *models)
    metric = f"perplexity:{tokens}:test,window={window}"
    measured = [bitwright.evaluate(path, metric).perplexity for path in models.values()]
    written = [bitwright.generate(path, prompt, max_tokens=48) for path in models.values()]
    table.add_row("size", *(f"{path.stat().st_size / 1e6:.2f} MB" for path in models.values()))
    table.add_row("perplexity", *(f"{m.perplexity:.3f}" for m in measured if m))
    table.add_row("bits a byte", *(f"{m.bits_per_byte:.4f}" for m in measured if m))
    table.add_row("tokens a second", *("-" if g.rate is None else f"{g.rate:.0f}" for g in written))
    table.add_row("text", *(Text(f"{prompt}{g.text}", overflow="fold") for g in written))
    return table


def main() -> None:
    """Quantize, measure, generate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--output", type=Path, default=Path("out/language_model"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    tokens = split_tokens(arguments.text, arguments.model.with_name("tokenizer.json"), arguments.output)
    small = quantized(arguments.model, tokens, arguments.output, arguments.window)
    models = {"as given": arguments.model, "4-bit weights": small}
    Console().print(compared(models, tokens, arguments.prompt, arguments.window))


if __name__ == "__main__":
    main()
