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


IMAGES = """
<ir_version: 8, opset_import: ["" : 17]>
block (float[1,3,11,13] x, float[10,3,3,3] w, float[10] b, float[10,1,3,3] d, float[10,1,2,2] g,
       float[10,10,1,1] p) => (float[1,10] y)
{
  c = Conv <strides = [2,2], pads = [1,0,1,1]> (x, w, b)
  r = Relu(c)
  e = Conv <group = 10, pads = [1,1,1,1]> (r, d)
  f = Conv(e, p)
  a = Add(c, f)
  m = MaxPool <kernel_shape = [3,3], pads = [1,1,1,1]> (a)
  h = AveragePool <kernel_shape = [3,3], strides = [2,2], pads = [1,1,0,0]> (m)
  i = Conv <group = 10> (h, g)
  n = GlobalAveragePool(i)
  y = Flatten(n)
}
"""


def weights(text: str) -> onnx.ModelProto:
    """Return a model whose inputs, the first left out, are constants."""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(1)
    for value in list(proto.graph.input)[1:]:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        array = rng.normal(size=shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
        proto.graph.input.remove(value)
    return proto


def check(target: str, proto: onnx.ModelProto, folder: Path, tolerance: float) -> None:
    """Compile a float model, run it on the target's emulator and compare with ONNX Runtime."""
    profile = load_profile(target)
    backend = backend_for(profile.family)
    reason = backend.why_not_executable(profile)
    if reason:
        pytest.skip(reason)
    try:
        find_driver(profile.toolchain.triple)
    except ToolchainError as error:
        pytest.skip(error.message)
    objects, lib = folder / "objects", folder / "lib"
    objects.mkdir()
    lib.mkdir()
    proto = onnx.shape_inference.infer_shapes(proto)
    executable = compile_float(ir.from_proto(proto), backend.tvm_target(profile))
    backend.link(export_objects(executable, objects), lib / "model.so", profile)
    inputs, outputs = (tuple(map(port, values)) for values in (proto.graph.input, proto.graph.output))
    status = add_runtime(lib, profile, Interface(inputs, outputs, {}))
    if status.missing:
        pytest.skip(status.missing)
    rng = np.random.default_rng(0)
    feeds = {p.name: rng.normal(size=p.shape).astype(np.float32) for p in inputs}
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, feeds)
    found = backend.execute(folder, feeds, profile, trace=False).outputs["y"]
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def port(value: onnx.ValueInfoProto) -> Port:
    return Port(value.name, "float32", tuple(d.dim_value for d in value.type.tensor_type.shape.dim))


@pytest.mark.parametrize("target", ["arm-cortex-a53", "arm-neoverse-n2"])
def test_attention_agrees_with_onnxruntime(target: str, tmp_path: Path) -> None:
    # sums of at most 24 float32 products of order 1, and functions good to a few roundings
    check(target, onnx.parser.parse_model(TEXT), tmp_path, 2e-5)


def test_convolutions_and_pooling_agree_with_onnxruntime(tmp_path: Path) -> None:
    # sums of at most 27 float32 products of order 1 to 10, one after the other
    check("arm-cortex-a53", weights(IMAGES), tmp_path, 1e-4)
