"""Float kernels on an emulated processor: attention and a norm, against ONNX Runtime on this machine."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from bitwright.compiler.bundle.runtime import add_runtime
from bitwright.compiler.errors import ToolchainError
from bitwright.compiler.lower.compile import compile_float, export_objects
from bitwright.targets.backend import backend_for
from bitwright.targets.loader import load_profile
from bitwright.targets.toolchain.interface import Interface, Port
from bitwright.targets.toolchain.linker import find_driver

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine needs no emulator"),
]

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
block (float[1,20,24] x, float[24] w, float[24] b) => (float[1,20,24] y)
<int64[4] s = {1,20,3,8}, int64[3] t = {1,20,24}, float d = {2.8}>
{
  n = LayerNormalization <axis = -1> (x, w, b)
  r = Reshape(n, s)
  q = Transpose <perm = [0,2,1,3]> (r)
  k = Transpose <perm = [0,2,3,1]> (r)
  a = MatMul(q, k)
  c = Div(a, d)
  e = Softmax <axis = -1> (c)
  f = MatMul(e, q)
  h = Transpose <perm = [0,2,1,3]> (f)
  g = Reshape(h, t)
  i = Sigmoid(g)
  j = Mul(g, i)
  y = Add(x, j)
}
"""


@pytest.mark.parametrize("target", ["arm-cortex-a53", "arm-neoverse-n2"])
def test_attention_agrees_with_onnxruntime(target: str, tmp_path: Path) -> None:
    profile = load_profile(target)
    backend = backend_for(profile.family)
    reason = backend.why_not_executable(profile)
    if reason:
        pytest.skip(reason)
    try:
        find_driver(profile.toolchain.triple)
    except ToolchainError as error:
        pytest.skip(error.message)
    objects, lib = tmp_path / "objects", tmp_path / "lib"
    objects.mkdir()
    lib.mkdir()
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(TEXT))
    executable = compile_float(ir.from_proto(proto), backend.tvm_target(profile))
    backend.link(export_objects(executable, objects), lib / "model.so", profile)
    shape = (1, 20, 24)
    inputs = (Port("x", "float32", shape), Port("w", "float32", (24,)), Port("b", "float32", (24,)))
    status = add_runtime(lib, profile, Interface(inputs, (Port("y", "float32", shape),), {}))
    if status.missing:
        pytest.skip(status.missing)
    rng = np.random.default_rng(0)
    feeds = {port.name: rng.normal(size=port.shape).astype(np.float32) for port in inputs}
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, feeds)
    found = backend.execute(tmp_path, feeds, profile, trace=False).outputs["y"]
    # sums of at most 24 float32 products of order 1, and functions good to a few roundings
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
