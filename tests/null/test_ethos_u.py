"""Ethos-U without its tools: orders of storage, functions, gates, Vela's tables, firmware text, integer-only plans."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from bitwright.compiler.errors import InfeasibleBudgetError, PerformanceGateError, ToolchainError
from bitwright.compiler.plan.planner import make_plan, observed_tensors, plan_selection
from bitwright.compiler.program.affine import all_integers, dequantize, quantize
from bitwright.compiler.program.ops import (
    Dequantize,
    Move,
    Program,
    QGemm,
    QPool,
    Quantize,
    QuantParams,
    Tensor,
)
from bitwright.targets.ethos_u.execution import accepted
from bitwright.targets.ethos_u.firmware import write_firmware
from bitwright.targets.ethos_u.functions import operator_for
from bitwright.targets.ethos_u.generator import check_coverage, check_memory, layer_prices
from bitwright.targets.ethos_u.softmax import softmax
from bitwright.targets.ethos_u.tflite_graph import Stored, TfliteGraph, TfliteTensor
from bitwright.targets.ethos_u.translate import translate_program
from bitwright.targets.ethos_u.translate_dot import fused_activation
from bitwright.targets.ethos_u.vela import VelaReport, read_report
from bitwright.targets.loader import load_profile
from bitwright.targets.sections.vela import Vela

PROFILE = load_profile("ethos-u55-128")
QUANT = QuantParams("int8", 0.05, 3)

SUMMARY = {
    "cycles_total": "3000",
    "inference_time": "6e-06",
    "sram_memory_used": "2.0",
    "dram_memory_used": "0.0",
    "on_chip_flash_memory_used": "0.0",
    "off_chip_flash_memory_used": "10.0",
    "total_original_weights": "1000",
    "total_npu_encoded_weights": "500",
}


def vela_row(name: str, target: str, cycles: int, npu: int, flash: int) -> dict[str, str]:
    return {
        "Original Operator": "FullyConnected",
        "Target": target,
        "Op Cycles": str(cycles),
        "NPU": str(npu),
        "SRAM AC": "10.0",
        "DRAM AC": "0.0",
        "OnFlash AC": "0.0",
        "OffFlash AC": str(flash),
        "MAC Count": "4096",
        "Util% (MAC)": "12.5",
        "Name": name,
    }


ROWS = [
    vela_row("a", "NPU", 2000, 100, 2000),
    vela_row("b", "NPU", 1000, 1000, 20),
    vela_row("c", "CPU", 0, 0, 0),
]


def report(rows: list[dict[str, str]] = ROWS) -> VelaReport:
    return read_report(Path("model_vela.tflite"), [SUMMARY], rows)


# Orders of storage.


@given(st.permutations(range(4)), st.lists(st.integers(1, 4), min_size=4, max_size=4))
def test_storage_and_back_is_nothing(order: list[int], shape: list[int]) -> None:
    stored = Stored("t", tuple(shape), tuple(order))
    array = np.arange(np.prod(shape)).reshape(shape)
    assert stored.to_file(array).shape == stored.shape
    assert np.array_equal(stored.to_logical(stored.to_file(array), tuple(shape)), array)
    flat = (1, int(np.prod(shape)))
    assert np.array_equal(stored.to_logical(stored.to_file(array), flat).ravel(), array.ravel())
    assert stored.is_row_major == np.array_equal(stored.to_file(array).ravel(), array.ravel())


def flattened() -> Program:
    """An image that is pooled, flattened and multiplied."""
    shapes = {"x": (1, 3, 2, 2), "p": (1, 3, 2, 2), "r": (1, 12), "y": (1, 5)}
    weight = np.arange(60).reshape(12, 5).astype(np.int8)
    scale = np.full(5, 0.01, np.float32)
    tensors = {n: Tensor(n, s, "int8", QUANT) for n, s in shapes.items()}
    tensors |= {"f": Tensor("f", shapes["x"], "float32"), "z": Tensor("z", shapes["y"], "float32")}
    steps = (
        Quantize(name="q", inputs=("f",), outputs=("x",)),
        QPool(name="pool", inputs=("x",), outputs=("p",), kind="max", kernel=(1, 1)),
        Move(name="flatten", inputs=("p",), outputs=("r",), kind="reshape"),
        QGemm(
            name="gemm",
            inputs=("r",),
            outputs=("y",),
            weight=weight,
            weight_scale=scale,
            lower=-128,
            upper=127,
        ),
        Dequantize(name="d", inputs=("y",), outputs=("z",)),
    )
    return Program(("f",), ("z",), steps, tensors)


def test_a_flattened_image_moves_the_weight_instead_of_the_image() -> None:
    graph = accepted(translate_program(flattened()))
    assert [layer.operator for layer in graph.layers] == ["MAX_POOL_2D", "RESHAPE", "FULLY_CONNECTED"]
    assert graph.inputs["f"].shape == (1, 2, 2, 3)
    stored = graph.tensors["y_weight"].data
    weight = np.arange(60).reshape(12, 5)
    expected = weight.reshape(3, 2, 2, 5).transpose(1, 2, 0, 3).reshape(12, 5).T
    assert stored is not None and np.array_equal(stored, expected)


def test_every_layer_reads_what_exists() -> None:
    graph = accepted(translate_program(flattened()))
    known = {stored.tensor for stored in graph.inputs.values()}
    known |= {name for name, tensor in graph.tensors.items() if tensor.data is not None}
    for layer in graph.layers:
        assert set(layer.inputs) <= known, layer
        known.add(layer.output)
    assert set(graph.tensors) == known


# Activations and functions.


@pytest.mark.parametrize(
    ("bounds", "name"),
    [
        ((-128, 127), "NONE"),
        ((3, 127), "RELU"),
        ((3, 123), "RELU6"),
        ((-17, 23), "RELU_N1_TO_1"),
        ((4, 90), None),
    ],
)
def test_an_activation_is_named_only_if_its_bounds_are_exact(
    bounds: tuple[int, int], name: str | None
) -> None:
    assert fused_activation(*bounds, QUANT) == name


@pytest.mark.parametrize(
    ("function", "output", "operator"),
    [
        (lambda v: 1 / (1 + np.exp(-v)), QuantParams("int8", 1 / 256, -128), "LOGISTIC"),
        (np.tanh, QuantParams("int8", 1 / 128, 0), "TANH"),
        (lambda v: np.maximum(v, 0), QuantParams("int8", 0.05, -100), "RELU"),
        (lambda v: np.where(v > 0, v, 0.2 * v), QuantParams("int8", 0.05, 0), "LEAKY_RELU"),
        (lambda v: v * np.clip(v / 6 + 0.5, 0, 1), QuantParams("int8", 0.025, -110), "HARD_SWISH"),
        (lambda v: v, QuantParams("int8", 0.06, 10), "QUANTIZE"),
        (lambda v: np.sin(3 * v), QuantParams("int8", 1 / 128, 0), None),
    ],
)
def test_a_table_is_recognised_by_its_values(function, output, operator) -> None:  # type: ignore[no-untyped-def]
    real = dequantize(all_integers(QUANT), QUANT).astype(np.float64)
    found = operator_for(quantize(function(real).astype(np.float32), output), QUANT, output, (0.2, 0.01))
    assert (None if found is None else found.operator) == operator


def test_softmax_sums_to_one_and_keeps_the_order() -> None:
    x = np.array([[-128, 0, 20, 127], [5, 5, 5, 5]], np.int8)
    found = softmax(x, QuantParams("int8", 0.05, 0)).astype(int) + 128
    assert np.all(np.abs(found.sum(axis=1) - 256) <= 2) and found[1].tolist() == [64] * 4
    assert np.all(np.diff(found[0]) >= 0)


# Plans for integers only.

MODEL = """
<ir_version: 8, opset_import: ["" : 17]>
m (float[1,4] x) => (float[1,2,2] y)
{
  a = Gemm(x, w, b)
  s = Softmax(a)
  y = Reshape(s, shape)
}
"""


def test_everything_becomes_integers_and_prescribed_ranges_win() -> None:
    proto = onnx.parser.parse_model(MODEL)
    values = {"w": np.eye(4, dtype=np.float32), "b": np.ones(4, np.float32), "shape": np.array([1, 2, 2])}
    proto.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in values.items())
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    shapes = {"x": (1, 4), "a": (1, 4), "s": (1, 4), "y": (1, 2, 2), "w": (4, 4), "b": (4,), "shape": (3,)}
    selection = plan_selection(model, PROFILE, "artifact", shapes)
    assert {u.head.op_type for u in selection.integer} == {"Gemm", "Softmax", "Reshape"}
    ranges = dict.fromkeys(observed_tensors(selection), (-3.0, 5.0))
    plan = make_plan(selection, ranges, PROFILE, "artifact", shapes, method="minmax")
    written = {n: (a.scale, a.zero_point) for n, a in plan.activations.items()}
    assert written["s"] == written["y"] == (1 / 256, -128)
    assert written["a"][0] == pytest.approx(8 / 255)
    alone = plan_selection(model, PROFILE, "artifact", shapes, alone=True)
    assert {u.head.op_type for u in alone.integer} == {"Gemm"}


# Vela's tables and the gates.


def test_vela_tables_are_read() -> None:
    found = report()
    assert (found.cycles, found.bits_per_weight) == (3000, 4.0)
    assert found.memory_bytes["off_chip_flash"] == 10240
    assert [layer.bound for layer in found.layers] == ["flash", "NPU", "SRAM"]
    assert [layer.tensor for layer in found.on_cpu] == ["c"]


@pytest.mark.parametrize("column", ["Op Cycles", "Target", "Name"])
def test_tables_of_another_vela_are_refused(column: str) -> None:
    row = {k: v for k, v in ROWS[0].items() if k != column}
    with pytest.raises(ToolchainError, match="version 5"):
        report([row])


def test_prices_add_up_by_node_and_count_bytes_at_the_bandwidth() -> None:
    prices = layer_prices(report(), {"a": "fc0", "b": "fc0"}, PROFILE)
    assert prices["fc0"].seconds == pytest.approx(3000 / PROFILE.clock_hz)
    assert prices["fc0"].weight_bytes == pytest.approx(2020 / PROFILE.clock_hz * 5e8)


def test_operators_on_the_processor_are_refused_with_their_names() -> None:
    options = PROFILE.vela
    assert options is not None
    check_coverage({}, options)
    with pytest.raises(PerformanceGateError, match="'resize_3'"):
        check_coverage({"resize_3": "ResizeNearestNeighbor"}, options)
    allowed = Vela(**{**options.model_dump(), "cpu_operators": "allowed"})
    check_coverage({"resize_3": "ResizeNearestNeighbor"}, allowed)


@pytest.mark.parametrize(("limit", "word"), [("ram_bytes", "SRAM"), ("flash_bytes", "flash")])
def test_too_little_memory_is_refused(limit: str, word: str) -> None:
    check_memory(report(), PROFILE)
    small = PROFILE.model_copy(update={"limits": PROFILE.limits.model_copy(update={limit: 1024.0})})
    with pytest.raises(InfeasibleBudgetError, match=word):
        check_memory(report(), small)


# Firmware.


def test_a_name_from_a_model_cannot_leave_its_comment(tmp_path: Path) -> None:
    evil = "x */ int main(void) { return 1; } /*\n#define A"
    tensor = TfliteTensor("t", (1, 2), "int8", np.array([0.5], np.float32), -3)
    stored = {evil: Stored("t", (1, 2), (0, 1))}
    files = write_firmware(
        tmp_path, TfliteGraph({"t": tensor}, (), stored, stored, {}), b"\x01\xff", "npu", 99
    )
    text = (tmp_path / files[0]).read_text()
    assert text.count("*/") == text.count("/*") and "int main(void) {" not in text.replace(
        "int main(void) _", ""
    )
    assert "BITWRIGHT_INPUT_0_SCALE 0.5f" in text and "BITWRIGHT_OUTPUT_0_ZERO_POINT (-3)" in text
    assert "BITWRIGHT_SRAM_BYTES 99" in text and "0x01, 0xff" in (tmp_path / files[1]).read_text()
