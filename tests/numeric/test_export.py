"""PyTorch export: both exporters agree with PyTorch, and what does not agree is refused. Needs the torch extra."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bitwright.compiler.errors import DataError, ModelError
from bitwright.compiler.export_torch import AGREEMENT_BOUND, export
from bitwright.compiler.inspect import inspect_model
from bitwright.compiler.ort.session import open_session, run

torch = pytest.importorskip("torch", reason="the torch extra is not installed")

SCRIPT = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(8)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))

class Pair(torch.nn.Module):
    def forward(self, a, b):
        return a @ b, a - b

class Noise(torch.nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)

def net():
    torch.manual_seed(0)
    return Net(), torch.randn(1, 3, 8, 8)

def pair():
    return Pair(), {"a": torch.ones(4, 4), "b": torch.eye(4)}

def noise():
    return Noise(), torch.zeros(4, 4)

def three():
    return 3
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "nets.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture(params=["torch.export", "TorchScript"])
def exporter(request, monkeypatch):
    """Name of the exporter to use; the other one raises."""
    if request.param == "TorchScript":
        real = torch.onnx.export

        def legacy_only(*arguments, dynamo, **options):
            if dynamo:
                message = "switched off"
                raise RuntimeError(message)
            return real(*arguments, dynamo=dynamo, **options)

        monkeypatch.setattr(torch.onnx, "export", legacy_only)
    return request.param


def test_a_module_is_exported_checked_and_can_be_planned(script, exporter, tmp_path):
    found = export(f"{script}:net", tmp_path / "net.onnx", opset=18)
    assert found.exporter == exporter and found.largest_difference < AGREEMENT_BOUND
    assert inspect_model(found.path, "x86-avx2").macs == 8 * 8 * 8 * 27 + 8 * 5


def test_keyword_inputs_and_several_outputs(script, exporter, tmp_path):
    found = export(f"{script}:pair", tmp_path / "pair.onnx", opset=18)
    a, b = np.full((4, 4), 2, np.float32), np.eye(4, dtype=np.float32)
    product, difference = run(open_session(found.path), {"a": a, "b": b}).values()
    np.testing.assert_array_equal(product, a)
    np.testing.assert_array_equal(difference, a - b)


def test_what_computes_something_else_is_not_written(script, tmp_path):
    with pytest.raises(ModelError, match="differs from PyTorch"):
        export(f"{script}:noise", tmp_path / "noise.onnx", opset=18)
    with pytest.raises(DataError, match="returned int"):
        export(f"{script}:three", tmp_path / "noise.onnx", opset=18)
    assert not list(tmp_path.glob("*.onnx"))
