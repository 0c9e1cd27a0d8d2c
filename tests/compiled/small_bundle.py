"""A small Q/DQ model and the bundle it compiles to, for the tests of verification."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from bitwright.compiler.bundle.golden import write_golden
from bitwright.compiler.bundle.runtime import add_runtime
from bitwright.compiler.graph.saving import save_model
from bitwright.compiler.lower.job import lower_in_worker
from bitwright.compiler.lower.kernel_table import activation_counts, dump_table
from bitwright.compiler.ort.session import SessionConfig, open_session, run
from bitwright.targets.backend import backend_for
from bitwright.targets.schema import Profile
from bitwright.targets.toolchain.interface import Interface, Port

# Gemm, Relu, residual Add, Softmax: integer kernels, a float island and float outputs.
MODEL = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[4, 8] x) => (float[4, 8] y)
<float sx = {0.02}, uint8 zx = {128}, float sh = {0.05}, uint8 zh = {0}, float sr = {0.06}, uint8 zr = {100},
 float sw = {0.01}, int8 wz = {0}>
{
  qx = QuantizeLinear(x, sx, zx)
  dx = DequantizeLinear(qx, sx, zx)
  dw = DequantizeLinear(w, sw, wz)
  m = MatMul(dx, dw)
  h = Relu(m)
  qh = QuantizeLinear(h, sh, zh)
  dh = DequantizeLinear(qh, sh, zh)
  r = Add(dh, dx)
  qr = QuantizeLinear(r, sr, zr)
  dr = DequantizeLinear(qr, sr, zr)
  y = Softmax <axis = -1> (dr)
}
"""
# ONNX Runtime adds in float32 before it quantizes, the artifact with fused multiply-adds: at a tie the sum
# may differ by one step of the last quantizer (0.06), which moves a softmax value by at most a quarter of it.
ONE_STEP = 0.06 / 4


def model(seed: int = 0) -> ir.Model:
    proto = onnx.parser.parse_model(MODEL)
    weight = np.random.default_rng(seed).integers(-127, 128, (8, 8)).astype("int8")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return ir.from_proto(proto)


def feeds(seed: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).normal(size=(4, 8)).astype("float32")}


def fill(folder: Path, profile: Profile) -> None:
    """Put a compiled model into the folder of a bundle; everything but report and manifest."""
    backend, source = backend_for(profile.family), model()
    for name in ("lib", "objects"):
        (folder / name).mkdir()
    result = lower_in_worker(source, profile, folder / "objects")
    backend.link(result.objects, folder / "lib/model.so", profile)
    save_model(source, folder / "model.onnx")
    save_model(source, folder / "lib/model.static.onnx")
    (folder / "lib/kernels.json").write_text(dump_table(result.kernel_table))
    interface = Interface(
        (Port("x", "float32", (4, 8)),),
        (Port("y", "float32", (4, 8)),),
        activation_counts(result.kernel_table),
    )
    assert add_runtime(folder / "lib", profile, interface).missing is None
    session = open_session(source, SessionConfig(optimize=False))
    for number in range(2):
        write_golden(folder / "golden", number, feeds(number), run(session, feeds(number)))
