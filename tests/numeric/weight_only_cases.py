"""Models, the passes of the deployment and a numpy reference for the tests of weight-only formats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from bitwright.compiler.graph.model import constant_array
from bitwright.compiler.ort.audit import optimized_graph
from bitwright.compiler.ort.session import config_for
from bitwright.compiler.plan.model import Plan, WeightQuant
from bitwright.compiler.plan.planner import make_plan, plan_selection
from bitwright.compiler.plan.units import FormatChoice
from bitwright.passes.block_tables import BlockTables
from bitwright.passes.insert_qdq import InsertQDQ
from bitwright.passes.pack_bnb4 import PackBnb4
from bitwright.passes.pack_nbits import PackNBits
from bitwright.passes.quantize_tables import QuantizeTables
from bitwright.passes.raise_opset import RaiseOpset
from bitwright.passes.remove_unused import RemoveUnused
from bitwright.passes.round_nearest import RoundNearest
from bitwright.passes.stored_weights import needed_opset
from bitwright.targets.loader import load_profile

PROFILE = load_profile("x86-avx512-vnni")
GOLDEN = Path(__file__).parents[1] / "golden"
# ONNX Runtime sums float32 products in blocks; the reference in float64.
FLOAT32 = 2e-6
INTEGER_FORMATS = ["w8", "w4", "w2", "ternary", "binary"]
MATMUL = """<ir_version: 9, opset_import: ["": 20]>
g (float[m, {K}] x) => (float[m, {N}] y) {{
  [product] t = MatMul(x, w)
  [bias] y = Add(t, b)
}}"""
GEMM = """<ir_version: 9, opset_import: ["": 20]>
g (float[m, {K}] x) => (float[m, {N}] y) {{
  [product] y = Gemm(x, w, b)
}}"""
TWO_READERS = """<ir_version: 9, opset_import: ["": 20]>
g (float[m, {K}] x) => (float[m, {N}] y) {{
  [first] t = MatMul(x, w)
  [second] u = MatMul(x, w)
  [sum] v = Sub(t, u)
  [product] z = MatMul(x, w)
  [bias] s = Add(z, b)
  [result] y = Add(s, v)
}}"""
TABLE = """<ir_version: 9, opset_import: ["": 20]>
g (int64[1, m] i) => (float[1, m, 800] y) {{
  [rows] e = Gather(w, i)
  [turn] t = Transpose<perm = [1, 0]>(w)
  [head] y = MatMul(e, t)
}}"""


def build(text: str, depth: int = 70, columns: int = 47, **given: np.ndarray) -> ir.Model:
    """Return the model with the arrays given, others random normal."""
    random = np.random.default_rng(0)
    arrays = {"w": random.normal(size=(depth, columns)), "b": random.normal(size=columns), **given}
    proto = onnx.parser.parse_model(text.format(K=depth, N=columns))
    used = {name for node in proto.graph.node for name in node.input}
    for name, array in arrays.items():
        if name in used:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def plan_of(
    model: ir.Model,
    fmt: str,
    *,
    group: int | None = None,
    tables: tuple[str, ...] = ("int8",),
    nodes: Mapping[str, str] | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> Plan:
    choice = FormatChoice((fmt,), (), tables, nodes or {})
    selection = plan_selection(model, PROFILE, "onnxruntime", {}, formats=choice)
    return make_plan(selection, ranges or {}, PROFILE, "onnxruntime", {}, method="minmax", group=group)


def quantized(model: ir.Model, plan: Plan, *, everywhere: bool = False, level: int = 4) -> ir.Model:
    """Run the passes of the deployment and check what they wrote."""
    result = model.clone()
    RaiseOpset(needed_opset(plan.weights.values())).run(result)
    for step in (
        BlockTables(plan),
        QuantizeTables(plan),
        RoundNearest(plan),
        InsertQDQ(plan),
        PackBnb4(),
        PackNBits(everywhere, level),
        RemoveUnused(),
    ):
        step.run(result)
    onnx.checker.check_model(ir.to_proto(result), full_check=True)
    for step in (BlockTables(plan), PackBnb4(), PackNBits(everywhere, level)):
        assert step.run(result).changed == 0, "run on its own output a pass changes nothing"
    return result


NF4_UPPER = [0, 0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1]
NF4_LOWER = [-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500]
NF4 = np.array([*NF4_LOWER, *NF4_UPPER])


def dequantized(weight: np.ndarray, quant: WeightQuant) -> np.ndarray:
    """Return what a weight becomes, group by group and in float64; independent of the passes' code."""
    result = np.empty(weight.shape)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            at = [row, column]
            at[quant.axis or 0] //= quant.group
            scale = float(quant.scale[tuple(at)])
            step = float(np.float32(weight[row, column]) / np.float32(scale))
            if quant.codebook == "nf4":
                level = NF4[np.abs(NF4 - step).argmin()]
            elif quant.codebook == "ternary":
                level = float(np.clip(np.rint(step), -1, 1))
            elif quant.codebook == "binary":
                level = 1.0 if step >= 0 else -1.0
            else:
                zero = 0 if quant.zero_point is None else int(quant.zero_point[tuple(at)])
                low = 0 if quant.dtype.startswith("uint") else -(2 ** (quant.bits - 1))
                level = float(np.clip(np.rint(step) + zero, low, low + 2**quant.bits - 1) - zero)
            result[row, column] = level * scale
    return result


def activation_bound(x: np.ndarray, weight: np.ndarray, block: int) -> np.ndarray:
    """Return how far an output may be off if activations are rounded to 8 bits in blocks.

    The block's largest magnitude is 127 steps, and rounding is off by half a step at most.
    """
    bound = np.zeros((x.shape[0], weight.shape[1]))
    for start in range(0, x.shape[1], block):
        step = np.abs(x[:, start : start + block]).max(axis=1) / 127
        bound += step[:, None] / 2 * np.abs(weight[start : start + block]).sum(axis=0)
    return bound


def array_of(model: ir.Model, name: str) -> np.ndarray:
    array = constant_array(model.graph.initializers[name])
    assert array is not None
    return array


def stored(model: ir.Model, ending: str) -> np.ndarray:
    """Return the one initializer whose name has this ending."""
    names = [n for n in model.graph.initializers if n.endswith(ending)]
    assert len(names) == 1, names
    return array_of(model, names[0])


def inputs(depth: int, rows: int = 5) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(rows, depth)).astype(np.float32)


def kernels(model: ir.Model) -> list[str]:
    return [n.op_type for n in optimized_graph(model, config_for(PROFILE.runtimes.onnxruntime)).graph]
