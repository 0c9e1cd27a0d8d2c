"""Small Q/DQ models from ONNX text: their parameters by key, what they become, what ONNX Runtime makes of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from bitwright.compiler.program.extract import extract_program
from bitwright.compiler.program.ops import Program

RNG = np.random.default_rng(7)
# Activation parameters by key: scale and zero point. Round ratios of scales would make ties common.
PARAMS = {
    "a": (np.float32(0.02137), np.uint8(120)),
    "b": (np.float32(0.031), np.int8(-5)),
    "c": (np.float32(0.0511), np.uint8(100)),
    "e": (np.float32(0.017), np.int8(3)),
    "r": (np.float32(0.013), np.uint8(0)),
}


def i8(*shape: int) -> np.ndarray:
    return RNG.integers(-127, 128, shape).astype(np.int8)


def scales(n: int) -> np.ndarray:
    return RNG.uniform(0.001, 0.003, n).astype(np.float32)


def i32_bias(sw: np.ndarray, key: str = "a") -> dict[str, np.ndarray]:
    """An int32 bias ``B`` with scale ``sB = sx * sw``."""
    return {"B": RNG.integers(-900, 900, sw.size).astype(np.int32), "sB": PARAMS[key][0] * sw}


def q(value: str, key: str) -> str:
    return f"{value}_q = QuantizeLinear({value}, s_{key}, z_{key})\n"


def qdq(value: str, key: str) -> str:
    """``value`` -> ``value_q`` -> ``value_d``."""
    return q(value, key) + f"{value}_d = DequantizeLinear({value}_q, s_{key}, z_{key})\n"


def out(value: str, key: str) -> str:
    """``value`` -> ``value_q`` -> the graph output ``y``."""
    return q(value, key) + f"y = DequantizeLinear({value}_q, s_{key}, z_{key})\n"


def weight(axis: int | None = None) -> str:
    attribute = "" if axis is None else f"<axis={axis}>"
    return f"w = DequantizeLinear{attribute}(W, sW, zW)\n"


BIAS = "bias = DequantizeLinear<axis=0>(B, sB)\n"


@dataclass(frozen=True)
class Case:
    """A model, the step kinds it must become, and the parameters of its output (None: float)."""

    name: str
    body: str
    shape: str
    result: str
    kinds: str
    quantum: str | None
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    opset: int = 20
    # Whether ONNX Runtime's optimised graph is equal bit for bit.
    exact: bool = True
    # False where ONNX Runtime's optimiser aborts the process.
    optimises: bool = True


def build(case: Case) -> onnx.ModelProto:
    inputs = ", ".join(f"float{s} x{i or ''}" for i, s in enumerate(case.shape.split("|")))
    outputs = ", ".join(f"float{s} y{i or ''}" for i, s in enumerate(case.result.split("|")))
    header = f'<ir_version: 10, opset_import: ["": {case.opset}]>'
    model = onnx.parser.parse_model(f"{header} g ({inputs}) => ({outputs}) {{\n{case.body}\n}}")
    arrays = dict(case.arrays)
    for key, (s, z) in PARAMS.items():
        arrays |= {f"s_{key}": np.asarray(s), f"z_{key}": np.asarray(z)}
    if "W" in arrays and "zW" not in arrays:
        arrays["zW"] = np.zeros(arrays["sW"].shape, np.int8)
    used = {n for node in model.graph.node for n in node.input}
    for node in model.graph.node:
        for attribute in node.attribute:
            used |= {n for inner in attribute.g.node for n in inner.input}
    for name in sorted(arrays.keys() & used):
        model.graph.initializer.append(onnx.numpy_helper.from_array(arrays[name], name))
    onnx.checker.check_model(model, full_check=True)
    return model


def extract(model: onnx.ModelProto) -> Program:
    return extract_program(ir.from_proto(model))


def kinds(program: Program) -> str:
    return " ".join(type(s).__name__ + (f":{s.kind}" if hasattr(s, "kind") else "") for s in program.steps)


def feeds(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    return {name: RNG.normal(0, 1.2, shape).astype(np.float32) for name, shape in shapes.items()}


def ort_run(model: onnx.ModelProto, data: dict[str, np.ndarray], *, optimised: bool) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in model.graph.output]
    return dict(zip(names, session.run(names, data), strict=True))
