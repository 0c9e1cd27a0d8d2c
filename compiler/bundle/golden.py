"""Recorded inputs and outputs that travel with a bundle."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def write_golden(
    folder: Path, number: int, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]
) -> None:
    """Write one golden set, ``inputs_K.npz`` and ``outputs_K.npz``, into ``folder`` (created if needed)."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, arrays in (("inputs", inputs), ("outputs", outputs)):
        # numpy.savez takes the names as keywords, and a tensor may be called "file", as its own parameter is.
        write_npz(folder / f"{kind}_{number}.npz", arrays)


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name; any name is allowed, and equal arrays give equal files."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            # A fixed date makes equal arrays give equal files.
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.compress_type = zipfile.ZIP_DEFLATED  # of its own: the archive's is for entries without one
            with archive.open(entry, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
