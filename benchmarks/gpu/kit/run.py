"""Checks and times this folder's kernels and models on the GPU of this machine. Needs Python 3.10, numpy, a driver.

usage: python run.py [--verify-only] [--without-torch] [--output result.json]

Nothing is downloaded. PyTorch, if it is there, is what the times are compared with; ``--without-torch`` goes without.
Exit status: 0 everything is as it was computed when this folder was built, 1 something differs, 2 no device.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))


def is_right(result: dict[str, Any]) -> bool:
    """Return whether a kernel or a model gave what was computed when the kit was built."""
    return bool(result.get("exact", result.get("within")))


def compared(
    kernels: list[dict[str, Any]], models: list[dict[str, Any]], rivals: dict[str, Any]
) -> dict[str, Any]:
    """Return the figures that are asked for: shares of the vendor's speed, and ratios of times."""
    found: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {}
    for result in (k for k in kernels if k.get("best_us") and "workload" not in k):
        best = groups.setdefault(result["group"], result)
        if result["best_us"] < best["best_us"]:
            groups[result["group"]] = result
    for group, best in groups.items():
        found[group] = {"best": best["name"], "choice": best["choice"], "us": best["best_us"]}
        found[group]["tera_operations"] = 2 * best["macs"] / best["best_us"] / 1e6
    if "int8_gemm" in groups and "int8_product" in rivals:
        ours = groups["int8_gemm"]["best_us"]
        found["int8_gemm"]["share_of_vendor_int8"] = rivals["int8_product"]["best_us"] / ours
        found["int8_gemm"]["times_vendor_fp16"] = rivals["fp16_product"]["best_us"] / ours
    if "fp16_gemm" in groups and "fp16_product" in rivals:
        share = rivals["fp16_product"]["best_us"] / groups["fp16_gemm"]["best_us"]
        found["fp16_gemm"]["share_of_vendor_fp16"] = share
    if "int4_row" in groups and "fp16_row" in rivals:
        found["int4_row"]["times_vendor_fp16"] = rivals["fp16_row"]["best_us"] / groups["int4_row"]["best_us"]
    for result in models:
        if result.get("best_us") and result["name"] in rivals:
            ratio = rivals[result["name"]]["best_us"] / result["best_us"]
            found[result["name"]] = {"us": result["best_us"], "times_torch_fp16": ratio}
    return found


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Check and time everything.

    Raises:
        RuntimeError, OSError: There is no device.
    """
    from device import Device
    from kernels import run_kernels
    from models import run_model

    about = json.loads((FOLDER / "kit.json").read_text())
    device, timed = Device(), not given.verify_only
    kernels = run_kernels(FOLDER, device, timed=timed)
    models = [run_model(FOLDER, name, timed=timed) for name in about["models"]]
    rivals: dict[str, Any] = {}
    if timed and not given.without_torch:
        from rivals import run_rivals

        rivals = run_rivals(about["gemm_size"])
    return {
        "kit": about,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device.name(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "right": all(map(is_right, [*kernels, *models])),
        "compared": compared(kernels, models, rivals),
        "kernels": kernels,
        "models": models,
        "rivals": rivals,
    }


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--verify-only", action="store_true", help="time nothing")
    parser.add_argument("--without-torch", action="store_true", help="compare with nothing")
    parser.add_argument("--output", type=Path, default=Path("result.json"))
    given = parser.parse_args(arguments)
    try:
        result = measure(given)
    except (RuntimeError, OSError, ImportError) as error:
        print(f"cannot run: {error}", file=sys.stderr)
        return 2
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    wrong = [r["name"] for r in (*result["kernels"], *result["models"]) if not is_right(r)]
    print(f"{len(result['kernels'])} kernels, {len(result['models'])} models on {result['device']}: ", end="")
    print("all as computed" if not wrong else f"DIFFERENT: {', '.join(wrong)}")
    print(json.dumps(result["compared"], indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
