"""How bad data is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from bitwright.compiler.errors import DataError
from bitwright.compiler.ingest.dataset import open_dataset
from bitwright.compiler.ingest.limits import Limits

from . import build


def model(inputs: str) -> ir.Model:
    first = inputs.split(",  ")[0].split()[-1]
    return ir.from_proto(build.parsed(f"g ({inputs}) => (float[A] out) {{ out = Identity ({first}) }}"))


IMAGES = "float[N, 3, 4, 4] x"


def images(count: int = 5) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, 4, 4)).astype(np.float32)


def saved(folder: Path, compressed: bool = False, **arrays: np.ndarray) -> Path:
    path = folder / "data.npz"
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def refused(source: object, network: ir.Model, *needles: str, limits: Limits | None = None) -> str:
    with pytest.raises(DataError) as caught:
        open_dataset(source, network, limits or Limits())
    assert caught.value.exit_code == 3
    assert str(source) in caught.value.where
    assert caught.value.fix
    for needle in needles:
        assert needle in caught.value.message, caught.value.message
    return caught.value.message
