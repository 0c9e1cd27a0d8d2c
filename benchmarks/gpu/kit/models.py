"""Whole models by the compiled artifact: outputs against the reference, and the time of a call."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

REPEAT = 300
TIMEOUT_S = 600


def environment(folder: Path) -> dict[str, str]:
    """Return this process's variables with the kit's runtime libraries behind the system's."""
    earlier = os.environ.get("LD_LIBRARY_PATH", "")
    paths = [*([earlier] if earlier else []), str(folder / "runtime")]
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(paths)}


def run_model(folder: Path, name: str, *, timed: bool) -> dict[str, Any]:
    """Run one model on its golden inputs.

    Returns:
        Per output the largest difference, whether all are within the bound, and microseconds of a call: inputs on the
        device, outputs there, waiting included.
    """
    place = folder / "models" / name
    about = json.loads((place / "model.json").read_text())
    with tempfile.TemporaryDirectory() as work:
        inputs = [str(place / f"input_{k}.npy") for k in range(len(about["inputs"]))]
        command = [str(folder / "runtime/runner"), str(place / about["library"]), work, "--device", "cuda"]
        command += ["--repeat", str(REPEAT)] if timed else []
        variables = environment(folder)
        if about.get("emulated") and "BITWRIGHT_EMULATED_KERNELS" in variables:
            variables["BITWRIGHT_EMULATED_KERNELS"] = str(place / about["emulated"])
        done = subprocess.run(
            [*command, *inputs], capture_output=True, text=True, timeout=TIMEOUT_S, env=variables, check=False
        )
        if done.returncode:
            return {"name": name, "within": False, "failed": (done.stderr or done.stdout)[-2000:]}
        outputs = [np.load(Path(work, f"output_{k}.npy")) for k in range(len(about["outputs"]))]
    result: dict[str, Any] = {"name": name, "outputs": {}, "within": True}
    for k, (output, got) in enumerate(zip(about["outputs"], outputs, strict=True)):
        want = np.load(place / f"golden_{k}.npy")
        error = float(np.abs(got.astype(np.float64) - want).max())
        result["outputs"][output] = {"largest_difference": error, "bound": about["bound"]}
        result["within"] = bool(result["within"] and got.shape == want.shape and error <= about["bound"])
    times = re.search(r"best_us ([\d.]+) mean_us ([\d.]+)", done.stdout)
    if times:
        result |= {"best_us": float(times[1]), "mean_us": float(times[2])}
    return result
