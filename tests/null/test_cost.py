"""The cost model on cases computed by hand."""
# ruff: noqa: E501 - one model or one row of numbers a line

from __future__ import annotations

import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from bitwright.compiler.errors import ModelError, ProfileError
from bitwright.compiler.graph.cost import is_depthwise, node_macs, reduction
from bitwright.compiler.plan.cost import estimate, holding_level, quantize_s, traffic, work_kind
from bitwright.targets.loader import load_profile
from bitwright.targets.schema import ComputeRow, Efficiency, MemoryLevel, Overheads, Profile


def node(body: str, inputs: str, output: str, constants: str = "") -> ir.Node:
    text = f'<ir_version: 10, opset_import: ["" : 21]>\ng ({inputs}) => ({output} y) {constants} {{ y = {body} }}'
    return ir.from_proto(onnx.parser.parse_model(text)).graph.node(0)


@pytest.fixture
def machine() -> Profile:
    """1 GHz, 2 cores, round numbers everywhere, so that every expectation below is mental arithmetic."""
    rows = (
        ComputeRow(name="dot", weight="s8", act="u8", acc="s32", macs_per_cycle=100.0, k_align=4),
        ComputeRow(
            name="tile", weight="s8", act="u8", acc="s32", macs_per_cycle=1000.0, k_align=64, efficiency=0.5
        ),
        ComputeRow(name="fma", weight="f32", act="f32", acc="f32", macs_per_cycle=10.0),
    )
    memory = (
        MemoryLevel(name="l1", size_bytes=1000.0, bytes_per_s=1e10, per_core=True),
        MemoryLevel(name="dram", size_bytes=1e9, bytes_per_s=1e9),
    )
    changes = {
        "clock_hz": 1e9,
        "cores": 2,
        "compute": rows,
        "memory": memory,
        "efficiency": Efficiency(gemm=0.5, conv=0.25, depthwise=0.1, elementwise=0.5),
        "overheads": Overheads(
            per_op_s=1e-6, quantize_cycles_per_element=2.0, requantize_cycles_per_element=1.0
        ),
    }
    return load_profile("x86-avx512-vnni").model_copy(update=changes)


def without_traffic(profile: Profile) -> Profile:
    level = MemoryLevel(name="infinite", size_bytes=1e18, bytes_per_s=1e30)
    return profile.model_copy(update={"memory": (level,)})


CASES = {
    "gemm": ("Gemm(x, w)", "float[4,8] x, float[8,16] w", "float[4,16]", 4 * 8 * 16, 8),
    "gemm transposed": (
        "Gemm<transA=1, transB=1>(x, w)",
        "float[8,4] x, float[16,8] w",
        "float[4,16]",
        512,
        8,
    ),
    "matmul": ("MatMul(x, w)", "float[2,3,4,8] x, float[8,16] w", "float[2,3,4,16]", 2 * 3 * 4 * 8 * 16, 8),
    "matmul broadcast": (
        "MatMul(x, w)",
        "float[1,3,4,8] x, float[2,1,8,16] w",
        "float[2,3,4,16]",
        2 * 3 * 4 * 8 * 16,
        8,
    ),
    "matrix by vector": ("MatMul(x, w)", "float[4,8] x, float[8] w", "float[4]", 32, 8),
    "vector by matrix": ("MatMul(x, w)", "float[8] x, float[8,16] w", "float[16]", 128, 8),
    "vector by vector": ("MatMul(x, w)", "float[8] x, float[8] w", "float", 8, 8),
    "conv": (
        "Conv(x, w)",
        "float[1,3,8,8] x, float[16,3,3,3] w",
        "float[1,16,6,6]",
        16 * 6 * 6 * 27,
        27,
    ),
    "grouped conv": (
        "Conv<group=2>(x, w)",
        "float[1,4,8,8] x, float[16,2,3,3] w",
        "float[1,16,6,6]",
        16 * 36 * 18,
        18,
    ),
    "depthwise conv": (
        "Conv<group=4>(x, w)",
        "float[1,4,8,8] x, float[4,1,3,3] w",
        "float[1,4,6,6]",
        4 * 36 * 9,
        9,
    ),
    "1-d conv": ("Conv(x, w)", "float[1,3,8] x, float[5,3,2] w", "float[1,5,7]", 5 * 7 * 6, 6),
    "no arithmetic that counts": ("Relu(x)", "float[4,8] x", "float[4,8]", 0, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_macs_and_reduction(case: str) -> None:
    body, inputs, output, macs, length = CASES[case]
    found = node(body, inputs, output)
    assert (node_macs(found), reduction(found)) == (macs, length)
    assert is_depthwise(found) == (case == "depthwise conv")


def test_given_shapes_replace_symbolic_ones() -> None:
    found = node("MatMul(x, w)", "float[batch,8] x, float[8,16] w", "float[batch,16]")
    with pytest.raises(ModelError) as caught:
        node_macs(found)
    assert caught.value.message == (
        "node 'MatMul(y)': the shape of 'x' is unknown, so its cost cannot be computed\n"
        "  fix: give the sizes of the dynamic dimensions"
    )
    assert node_macs(found, {"x": (5, 8), "y": (5, 16)}) == 5 * 8 * 16


def test_custom_operator_of_the_same_name_costs_nothing() -> None:
    text = '<ir_version: 10, opset_import: ["" : 21, "my" : 1]>\ng (float[4,4] x) => (float[4,4] y) { y = my.MatMul(x, x) }'
    assert node_macs(ir.from_proto(onnx.parser.parse_model(text)).graph.node(0)) == 0


GEMM = ("Gemm(x, w)", "float[4,64] x, float[64,16] w", "float[4,16]")
GEMM_MACS = 4 * 64 * 16


def test_float_arithmetic(machine: Profile) -> None:
    # 4096 MACs / (10 a cycle x 0.5 x 1 GHz x 2 cores) = 409.6 ns, plus 1 us to start.
    seconds = estimate(node(*GEMM), {}, without_traffic(machine), "onnxruntime", "float")
    assert seconds == pytest.approx(1e-6 + GEMM_MACS / 10e9)


def test_integer_arithmetic_takes_the_best_row(machine: Profile) -> None:
    # 'tile' at 1000 x 0.5 x 0.5 = 250 a cycle beats 'dot' at 50; 64 requantized outputs cost 32 ns on two cores.
    seconds = estimate(node(*GEMM), {}, without_traffic(machine), "onnxruntime", "int8")
    assert seconds == pytest.approx(1e-6 + GEMM_MACS / 500e9 + 64 / 2e9)


def test_short_reductions_waste_a_long_tile(machine: Profile) -> None:
    # K = 6: 'dot' pads to 8 at 50 a cycle = 0.16 per product group, 'tile' pads to 64 at 250 = 0.256; dot wins.
    short = node("Gemm(x, w)", "float[4,6] x, float[6,16] w", "float[4,16]")
    seconds = estimate(short, {}, without_traffic(machine), "onnxruntime", "int8")
    assert seconds == pytest.approx(1e-6 + 4 * 8 * 16 / 100e9 + 64 / 2e9)


def test_named_rows_only(machine: Profile) -> None:
    # x86-avx512-vnni's artifact table names avx512_vnni, so the faster 'tile' row may not be used.
    rows = (machine.compute[0].model_copy(update={"name": "avx512_vnni"}), *machine.compute[1:])
    profile = without_traffic(machine.model_copy(update={"compute": rows}))
    assert estimate(node(*GEMM), {}, profile, "artifact", "int8") == pytest.approx(
        1e-6 + GEMM_MACS / 100e9 + 64 / 2e9
    )


def test_depthwise_and_conv_have_their_own_efficiency(machine: Profile) -> None:
    profile = without_traffic(machine)
    depthwise = node("Conv<group=4>(x, w)", "float[1,4,8,8] x, float[4,1,3,3] w", "float[1,4,6,6]")
    conv = node("Conv(x, w)", "float[1,4,8,8] x, float[4,4,3,3] w", "float[1,4,6,6]")
    assert (work_kind(depthwise, {}), work_kind(conv, {})) == ("depthwise", "conv")
    assert estimate(depthwise, {}, profile, "artifact", "float") == pytest.approx(
        1e-6 + 1296 / (10 * 0.1 * 2e9)
    )
    assert estimate(conv, {}, profile, "artifact", "float") == pytest.approx(1e-6 + 5184 / (10 * 0.25 * 2e9))


def test_memory_bound_call(machine: Profile) -> None:
    # One row by 1000 x 1000: 4 MB of float weights from dram at 1 GB/s take 4 ms, the arithmetic 0.1 ms.
    wide = node("MatMul(x, w)", "float[1,1000] x, float[1000,1000] w", "float[1,1000]")
    moved = 4 * (1000 + 1_000_000 + 1000)
    assert traffic(wide, {}) == moved
    assert estimate(wide, {}, machine, "onnxruntime", "float") == pytest.approx(1e-6 + moved / 1e9)
    # int8 reads a quarter; float output writes 4 bytes an element.
    assert traffic(wide, {}, (1, 1)) == moved // 4
    assert traffic(wide, {}, (1, 1), float_output=True) == moved // 4 + 3000


def test_small_tensors_live_in_the_near_level(machine: Profile) -> None:
    # 250 + 250 floats are 2000 bytes: exactly the two 1000-byte parts, read at 2 x 10 GB/s, of which half is reached.
    relu = node("Relu(x)", "float[250] x", "float[250]")
    assert holding_level(2000, machine).name == "l1"
    assert holding_level(2001, machine).name == "dram"
    assert holding_level(1e12, machine).name == "dram"
    assert estimate(relu, {}, machine, "artifact", "float") == pytest.approx(1e-6 + 2000 / (20e9 * 0.5))


def test_bias_and_other_constants_keep_four_bytes() -> None:
    gemm = node(
        "Gemm(x, w, b)",
        "float[1,2] x",
        "float[1,2]",
        "<float[2,2] w = {1, 2, 3, 4}, float[2] b = {1, 2}>",
    )
    assert traffic(gemm, {}, (1, 1)) == 2 + 4 + 2 * 4 + 2
    assert traffic(gemm, {}) == 4 * 10


def test_inputs_that_arrive_in_float_are_quantized(machine: Profile) -> None:
    profile = without_traffic(machine)
    inside = estimate(node(*GEMM), {}, profile, "onnxruntime", "int8")
    border = estimate(node(*GEMM), {}, profile, "onnxruntime", "int8", float_inputs={"x"})
    # 256 elements at two cycles on two cores, and an operator of its own to start.
    assert quantize_s(4 * 64, profile) == pytest.approx(4 * 64 * 2 / 2e9)
    assert border - inside == pytest.approx(1e-6 + 4 * 64 * 2 / 2e9)


def test_no_integer_kernel_is_an_error(machine: Profile) -> None:
    softmax = node("Softmax(x)", "float[4,8] x", "float[4,8]")
    with pytest.raises(
        ProfileError, match=r"node 'Softmax\(y\)': artifact has no integer kernel for Softmax"
    ):
        estimate(softmax, {}, machine, "artifact", "int8")


def test_no_fitting_row_is_an_error(machine: Profile) -> None:
    profile = machine.model_copy(update={"compute": machine.compute[:1]})
    with pytest.raises(ProfileError, match="can run this node"):
        estimate(node(*GEMM), {}, profile, "onnxruntime", "float")


@pytest.mark.parametrize(
    "name", ["x86-avx2", "x86-avx512-vnni", "x86-amx", "arm-cortex-a53", "arm-cortex-a76"]
)
def test_a_large_linear_layer_gains_on_every_shipped_target(name: str) -> None:
    layer = node("MatMul(x, w)", "float[128,384] x, float[384,1536] w", "float[128,1536]")
    profile = load_profile(name)
    integer = estimate(layer, {}, profile, "artifact", "int8", float_inputs={"x"}, float_output=True)
    floating = estimate(layer, {}, profile, "artifact", "float")
    # A53: NEON multiplies no faster than it adds floats, only memory traffic shrinks.
    assert integer < floating * (1.1 if name == "arm-cortex-a53" else 1.0)


def test_weights_that_are_only_stored_in_half_precision_take_the_time_of_float() -> None:
    profile = load_profile("x86-avx512-vnni")
    gemm = node(*GEMM)
    narrow = estimate(gemm, {}, profile, "onnxruntime", "fp16-weights")
    assert narrow == estimate(gemm, {}, profile, "onnxruntime", "float")
