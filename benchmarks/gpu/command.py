"""The command line of the GPU benchmark."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

MODELS = ("resnet8_cifar10", "vww_mobilenet", "minilm_l6")


def main(arguments: list[str] | None = None) -> int:
    """Build a kit, learn from a result or print its table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python benchmarks/gpu")
    verbs = parser.add_subparsers(dest="verb", required=True)
    build = verbs.add_parser("build", help="write the folder")
    build.add_argument("--out", type=Path, required=True)
    build.add_argument("--profile", default="nvidia-h100")
    build.add_argument("--models", nargs="*", default=list(MODELS))
    build.add_argument("--gemm", type=int, default=4096, help="side of the measured products")
    build.add_argument("--device-key", help="choose the models' kernels by records of this device")
    build.add_argument("--tuning-store", type=Path, help="where these are")
    build.add_argument("--emulated", action="store_true", help="add what checks the folder on a CPU")
    table = verbs.add_parser("table", help="print a result as Markdown")
    table.add_argument("result", type=Path)
    learn = verbs.add_parser("learn", help="turn a result's times into tuning records")
    learn.add_argument("result", type=Path)
    learn.add_argument("--device-key", required=True, help="what compilations will call the device")
    learn.add_argument("--tuning-store", type=Path, required=True)
    given = parser.parse_args(arguments)
    if given.verb == "build" and (given.device_key is None) != (given.tuning_store is None):
        parser.error("--device-key and --tuning-store belong together")
    return {"build": _build, "learn": _learn, "table": _table}[given.verb](given)


def _learn(given: argparse.Namespace) -> int:
    from gpu.learn import learn

    count = learn(json.loads(given.result.read_text()), given.device_key, given.tuning_store)
    print(
        f"{given.tuning_store}: {count} kinds of dot products; compile with --device-key {given.device_key}"
    )
    return 0


def _table(given: argparse.Namespace) -> int:
    from gpu.table import table_of

    print(table_of(json.loads(given.result.read_text())))
    return 0


def _build(given: argparse.Namespace) -> int:
    from gpu.build import Records, build_kit

    records = Records(given.device_key, given.tuning_store) if given.device_key else None
    size = build_kit(
        given.out, given.profile, given.models, given.gemm, emulated=given.emulated, records=records
    )
    print(f"{given.out}: {size / 1e6:.1f} MB; on the machine with the GPU: python3 run.py")
    return 0
