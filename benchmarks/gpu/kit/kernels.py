"""Integer kernels on the device: equal to the values computed when the kit was built, and how long they take."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from device import Device
from patterns import pattern

ROUNDS, CALLS = 15, 20


def array_of(record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the array of a parameter: from the kit's file, from a pattern, or what the kernel is to write."""
    if "array" in record:
        return arrays[record["array"]]
    shape = tuple(record["shape"])
    if "pattern" in record:
        return pattern(shape, record["dtype"], record["pattern"])
    return np.full(shape, 99, record["dtype"])


def compare(got: np.ndarray, golden: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return whether an output is what the kit's builder computed.

    Args:
        got: The output.
        golden: ``sha256`` of all bytes; or ``array``, all of it; or ``array`` of the first rows with ``tolerance``, the
            largest share of their largest magnitude by which they may differ.
        arrays: The kit's arrays.
    """
    if "sha256" in golden:
        return {"exact": hashlib.sha256(np.ascontiguousarray(got).tobytes()).hexdigest() == golden["sha256"]}
    want = arrays[golden["array"]]
    if "tolerance" in golden:
        error = np.abs(got[: len(want)].astype(np.float64) - want).max() / np.abs(want).max()
        return {"within": bool(error <= golden["tolerance"]), "error": float(error)}
    same = got.reshape(-1).view(np.uint8) == want.reshape(-1).view(np.uint8)
    return {
        "exact": bool(same.all()),
        "differing_bytes": int(np.count_nonzero(~same)),
        "bytes": int(same.size),
    }


def run_kernels(folder: Path, device: Device, *, timed: bool) -> list[dict[str, Any]]:
    """Check every kernel of the kit, and time those that are to be timed."""
    import json

    records = json.loads((folder / "kernels.json").read_text())
    module = device.load((folder / "kernels.cubin").read_bytes())
    found = []
    with np.load(folder / "kernels.npz") as archive:
        arrays = {name: archive[name] for name in archive.files}
    for record in records:
        kernel = device.kernel(module, record["launch"])
        values = {p["name"]: array_of(p, arrays) for p in record["parameters"]}
        places = {name: device.upload(value) for name, value in values.items()}
        arguments = [places[name] for name in record["launch"]["buffers"]]
        kernel(arguments)
        output = values[record["parameters"][-1]["name"]].copy()
        device.download(places[record["parameters"][-1]["name"]], output)
        kept = ("name", "group", "choice", "macs", "workload", "plan", "rank")
        result = {key: record[key] for key in kept if key in record}
        result |= compare(output, record["golden"], arrays)
        if timed and record["timed"]:
            times = device.microseconds(kernel, arguments, CALLS, ROUNDS)
            result |= {"best_us": min(times), "median_us": statistics.median(times)}
        for place in places.values():
            device.release(place)
        found.append(result)
    return found
