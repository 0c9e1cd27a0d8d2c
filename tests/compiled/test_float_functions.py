"""Accuracy of the float functions inside islands: bounds per operator, with their reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tvm
from scipy.special import erf
from tvm.runtime.vm import VirtualMachine

from bitwright.compiler.lower.compile import compile_float, optimize
from bitwright.compiler.lower.island import import_model
from bitwright.targets.backend import backend_for
from bitwright.targets.loader import load_profile

# The vectorised polynomials are good to a few float32 roundings (2^-23 = 1.2e-7 each).
POLYNOMIAL = 5e-7
# A row of 400 exponentials is summed in float32: their rounding errors add up to about sqrt(400) of one.
SOFTMAX = 5e-6


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


@pytest.mark.parametrize(
    ("operator", "reference", "low", "high", "bound"),
    [
        ("Exp", np.exp, -80.0, 80.0, POLYNOMIAL),
        ("Erf", erf, -6.0, 6.0, POLYNOMIAL),
        ("Tanh", np.tanh, -12.0, 12.0, POLYNOMIAL),
        ("Sigmoid", lambda x: 1 / (1 + np.exp(-x)), -60.0, 60.0, POLYNOMIAL),
        ("Softmax", softmax, -40.0, 40.0, SOFTMAX),
    ],
)
def test_relative_error(
    operator: str,
    reference: Callable[[np.ndarray], np.ndarray],
    low: float,
    high: float,
    bound: float,
    tmp_path: Path,
) -> None:
    text = f'<ir_version: 8, opset_import: ["" : 17]> g (float[50,400] x) => (float[50,400] y) {{ y = {operator}(x) }}'
    profile = load_profile("host")
    target = backend_for(profile.family).tvm_target(profile)
    library = tmp_path / "f.so"
    compile_float(ir.from_proto(onnx.parser.parse_model(text)), target).export_library(str(library))
    x = (
        np.random.default_rng(0)
        .permutation(np.linspace(low, high, 20000))
        .astype(np.float32)
        .reshape(50, 400)
    )
    machine = VirtualMachine(tvm.runtime.load_module(str(library)), tvm.cpu())
    actual = machine["main"](tvm.runtime.tensor(x)).numpy().astype(np.float64)
    expected = reference(x.astype(np.float64))
    # Below the smallest normal float32 there are no relative digits left to compare.
    error = np.abs(actual - expected) / np.maximum(np.abs(expected), 1e-30)
    assert error.max() < bound


def test_a_chain_of_elementwise_operators_is_one_pass_over_memory() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    gelu (float[64,512] x) => (float[64,512] y) <float root = {1.4142135}, float one = {1.0}, float half = {0.5}>
    { d = Div(x, root) e = Erf(d) a = Add(e, one) b = Mul(x, a) y = Mul(b, half) }
    """
    profile = load_profile("host")
    target = tvm.target.Target(backend_for(profile.family).tvm_target(profile))
    module = optimize(import_model(ir.from_proto(onnx.parser.parse_model(text)), "gelu"), target)
    functions = [f for _, f in module.functions_items() if isinstance(f, tvm.tirx.PrimFunc)]
    assert len(functions) == 1
