"""The command line of the GPU benchmark."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

MODELS = ("resnet8_cifar10", "vww_mobilenet", "minilm_l6")


def main(arguments: list[str] | None = None) -> int:
    """Build a kit, or print the table of a result; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python benchmarks/gpu")
    verbs = parser.add_subparsers(dest="verb", required=True)
    build = verbs.add_parser("build", help="write the folder")
    build.add_argument("--out", type=Path, required=True)
    build.add_argument("--profile", default="nvidia-h100")
    build.add_argument("--models", nargs="*", default=list(MODELS))
    build.add_argument("--gemm", type=int, default=4096, help="side of the measured products")
    build.add_argument("--emulated", action="store_true", help="add what checks the folder on a CPU")
    table = verbs.add_parser("table", help="print a result as Markdown")
    table.add_argument("result", type=Path)
    given = parser.parse_args(arguments)
    if given.verb == "table":
        from gpu.table import table_of

        print(table_of(json.loads(given.result.read_text())))
        return 0
    from gpu.build import build_kit

    size = build_kit(given.out, given.profile, given.models, given.gemm, emulated=given.emulated)
    print(f"{given.out}: {size / 1e6:.1f} MB; on the machine with the GPU: python3 run.py")
    return 0
