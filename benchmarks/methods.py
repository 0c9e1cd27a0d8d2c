"""Calibration methods side by side: task metric and output noise of the artifact's model.onnx.

usage: BITWRIGHT_ZOO=... python benchmarks/methods.py [MODEL ...]
"""

from __future__ import annotations

import sys

from zoo import model_named

from bitwright.compiler.compilation import Compilation
from bitwright.compiler.options import Options
from bitwright.compiler.ort.session import open_session, run
from bitwright.compiler.pipeline import FRONT
from bitwright.targets.loader import load_profile

METHODS = ("minmax", "moving_average", "percentile:99.99", "percentile:99.999", "mse")
DEFAULT = ("kws_dscnn", "resnet8_cifar10", "vww_mobilenet", "ppocr_rec")


def cell(name: str, method: str) -> str:
    """Quantize for the artifact with one method and return ``metric (output SQNR)``."""
    entry = model_named(name)
    options = Options(model=entry.path, target="host", data=list(entry.samples()), method=method)
    c = Compilation(options, load_profile("host"))
    for _, phase in FRONT:
        phase(c, [])
    assert c.quantized is not None
    session = open_session(c.quantized)
    noise = min(c.sqnr_db[o.name or ""] for o in c.quantized.graph.outputs)
    return f"{entry.evaluate(lambda feeds: run(session, feeds)):.4f} ({noise:.1f} dB)"


def main() -> None:
    """Print the table."""
    print("| model |", " | ".join(METHODS), "|")
    print("| --- " * (len(METHODS) + 1) + "|")
    for name in sys.argv[1:] or DEFAULT:
        print(f"| {name} |", " | ".join(cell(name, method) for method in METHODS), "|", flush=True)


if __name__ == "__main__":
    main()
