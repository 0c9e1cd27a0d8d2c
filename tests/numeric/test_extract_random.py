"""Random small Q/DQ graphs: no step is more than one quantum away from ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from bitwright.compiler.interpret.run import run_step
from bitwright.compiler.program.extract import extract_program

SHAPE = (1, 4, 5, 6)


@dataclass
class Sketch:
    """A graph under construction; every value has the shape [1, 4, 5, 6]."""

    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def constant(self, array: np.ndarray) -> str:
        name = f"k{len(self.arrays)}"
        self.arrays[name] = array
        return name

    def op(self, kind: str, *inputs: str, **attributes: object) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(kind, list(inputs), [name], name=f"n{len(self.nodes)}", **attributes)
        )
        return name

    def quantizer(self) -> list[str]:
        dtype = self.rng.choice([np.uint8, np.int8])
        info = np.iinfo(dtype)
        zero = self.rng.integers(info.min, info.max + 1)
        return [
            self.constant(np.asarray(self.rng.uniform(0.005, 0.05), np.float32)),
            self.constant(np.asarray(zero, dtype)),
        ]

    def requantized(self, value: str, params: list[str] | None = None) -> str:
        params = params or self.quantizer()
        return self.op("DequantizeLinear", self.op("QuantizeLinear", value, *params), *params)

    def weight(self, shape: tuple[int, ...]) -> str:
        scale = self.constant(self.rng.uniform(0.002, 0.02, shape[0]).astype(np.float32))
        zero = self.constant(np.zeros(shape[0], np.int8))
        integers = self.constant(self.rng.integers(-127, 128, shape).astype(np.int8))
        return self.op("DequantizeLinear", integers, scale, zero, axis=0)


def conv(s: Sketch, x: str, _other: str) -> str:
    return s.op("Conv", x, s.weight((4, 4, 3, 3)), pads=[1, 1, 1, 1])


def depthwise(s: Sketch, x: str, _other: str) -> str:
    return s.op("Relu", s.op("Conv", x, s.weight((4, 1, 1, 3)), pads=[0, 1, 0, 1], group=4))


def pool(s: Sketch, x: str, _other: str) -> str:
    kind = str(s.rng.choice(["MaxPool", "AveragePool"]))
    return s.op(kind, x, kernel_shape=[3, 3], pads=[1, 1, 1, 1])


def reshaped(s: Sketch, x: str, _other: str) -> str:
    turned = s.op("Transpose", x, perm=[0, 1, 3, 2])
    return s.op("Reshape", turned, s.constant(np.array(SHAPE, np.int64)))


def concat(s: Sketch, x: str, other: str) -> str:
    halves = [s.op("Slice", v, *(s.constant(np.array([n], np.int64)) for n in (0, 2, 1))) for v in (x, other)]
    return s.op("Concat", *halves, axis=1)


def unary(s: Sketch, x: str, _other: str) -> str:
    return s.op(str(s.rng.choice(["Sigmoid", "Tanh", "Relu", "HardSwish", "Softmax", "LeakyRelu"])), x)


def binary(s: Sketch, x: str, other: str) -> str:
    return s.op(str(s.rng.choice(["Add", "Mul", "Sub"])), x, other)


LAYERS = [conv, depthwise, pool, reshaped, concat, unary, binary]
CHOICE = st.tuples(st.sampled_from(LAYERS), st.integers(0, 99), st.integers(0, 99), st.sampled_from("qqqfs"))


def build(layers: list[tuple], seed: int) -> onnx.ModelProto:
    s = Sketch(np.random.default_rng(seed))
    values = [s.requantized("x")]
    for layer, first, second, ending in layers:
        value = layer(s, values[first % len(values)], values[second % len(values)])
        if ending == "q":
            value = s.requantized(value)
        elif ending == "s":
            values.append(s.requantized(value))
        values.append(value)
    outputs = list(dict.fromkeys(values[-2:]))
    graph = helper.make_graph(
        s.nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info(v, TensorProto.FLOAT, SHAPE) for v in outputs],
        [numpy_helper.from_array(a, n) for n, a in s.arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


def all_values(model: onnx.ModelProto, x: np.ndarray) -> dict[str, np.ndarray]:
    """Run ONNX Runtime without optimizations and return every tensor of the model."""
    traced = onnx.shape_inference.infer_shapes(model)
    known = {o.name for o in traced.graph.output}
    traced.graph.output.extend(v for v in traced.graph.value_info if v.name not in known)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(traced.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return {"x": x} | dict(zip(names, session.run(names, {"x": x}), strict=True))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(CHOICE, min_size=1, max_size=9), st.integers(0, 2**31))
def test_random_graph(layers: list[tuple], seed: int) -> None:
    """Each step gets ONNX Runtime's own tensors, so one rounding difference cannot grow through the graph."""
    model = build(layers, seed)
    program = extract_program(ir.from_proto(model))
    x = np.random.default_rng(seed + 1).normal(0, 1, SHAPE).astype(np.float32)
    values = all_values(model, x) | program.constants
    assert {*program.outputs} <= {n for s in program.steps for n in s.outputs}
    for step in program.steps:
        results = run_step(step, program, tuple(values[n] for n in step.inputs))
        for name, result in zip(step.outputs, results, strict=True):
            # Tensors without a name in the model (moved or requantized integers) are only known here.
            expected = values.setdefault(name, result)
            if result.dtype.kind in "iu":
                # The accumulator is scaled once here; ONNX Runtime sums float products, then divides.
                assert np.abs(result.astype(int) - expected).max() <= 1, step
            else:
                np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-4)
