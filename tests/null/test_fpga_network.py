"""Streaming networks without any tool: foldings, closed forms, sliding windows' plans, names, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fpga_programs import CODES, Chain
from hypothesis import given
from hypothesis import strategies as st

from bitwright.compiler.errors import PerformanceGateError, ProfileError, UsageError
from bitwright.compiler.program.ops import Dequantize, Move, Program, QConv, Quantize, Tensor
from bitwright.targets.fpga import generator
from bitwright.targets.fpga.assemble import build_network
from bitwright.targets.fpga.circuit import from_frame, to_frame
from bitwright.targets.fpga.engines.dot import drain_fifo, drain_lanes, packed
from bitwright.targets.fpga.engines.requantization import bits_for
from bitwright.targets.fpga.engines.window import Window
from bitwright.targets.fpga.host import Host
from bitwright.targets.fpga.names import RESERVED, identifier
from bitwright.targets.fpga.network import BINARY, TERNARY, Folding, WeightCode, narrowest_code
from bitwright.targets.fpga.recognise import layers_of, recognise
from bitwright.targets.fpga.testbench import BENCH_INPUT, BENCH_OUTPUT, bench_files, board_files
from bitwright.targets.fpga.verilog import network_text
from bitwright.targets.generator import Request
from bitwright.targets.loader import load_profile

PROFILE = load_profile("ecp5-85f")
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("code", CODES)
def test_the_narrowest_code_holds_the_weights(code: str) -> None:
    (layer,) = layers_of(Chain((1, 12)).gemm("fc", 8, code).program(), PROFILE)
    assert str(layer.code) == code


def test_codes_at_their_bounds() -> None:
    assert narrowest_code(np.array([-128, 127])) == WeightCode("integer", 8)
    assert narrowest_code(np.array([-8, 7])) == WeightCode("integer", 4)
    assert narrowest_code(np.array([-8, 8])) == WeightCode("integer", 5)
    assert narrowest_code(np.array([-2, 1])) == WeightCode("integer", 2)
    assert narrowest_code(np.array([0, 0])) == TERNARY
    assert narrowest_code(np.array([-1, 1])) == BINARY


def test_packed_weights_put_the_first_in_the_lowest_bits() -> None:
    rows = np.array([[1, -2, 3], [-4, 0, -1]])
    memory = packed(rows, WeightCode("integer", 3))
    assert memory.width == 9 and memory.words == (0b011_110_001, 0b111_000_100)
    assert packed(np.array([[1, -1, -1]]), BINARY).words == (0b110,)
    assert packed(np.array([[1, 0, -1]]), TERNARY).words == (0b11_00_01,)
    assert memory.hex_text() == "0f1\n1c4\n"


def test_cycles_are_the_products_over_the_lanes() -> None:
    chain = Chain((1, 4, 6, 5)).conv("c", 8)
    (layer,) = layers_of(chain.program(), PROFILE)
    for folding in layer.legal_foldings():
        window, own = layer.engines(folding)
        assert own.cycles * folding.lanes == layer.macs == 6 * 5 * 8 * 4 * 9
        assert window.cycles == 6 * 5 * 9 * 4 // folding.simd
        assert layer.cycles(folding) == max(own.cycles, window.cycles)
    assert layer.legal_foldings()[0] == Folding()
    assert {f.simd for f in layer.legal_foldings()} == {1, 2, 4}


def test_another_code_changes_what_is_predicted_and_holds_no_memories() -> None:
    (layer,) = layers_of(Chain((1, 16)).gemm("fc", 8).program(), PROFILE)
    (engine,) = layer.engines(Folding(2, 4), WeightCode("integer", 3))
    (own,) = layer.engines(Folding(2, 4))
    assert engine.parameters["WEIGHT_BITS"] == 3 and not engine.memories and own.memories
    assert engine.parameters["ACC_BITS"] < own.parameters["ACC_BITS"]


def test_illegal_and_unknown_foldings_are_refused() -> None:
    program = Chain((1, 12)).gemm("fc", 8).program()
    with pytest.raises(ProfileError, match="pe=3 simd=1"):
        build_network(program, PROFILE, {"fc": Folding(3, 1)})
    with pytest.raises(ProfileError, match="no layer 'fd'"):
        build_network(program, PROFILE, {"fd": Folding()})


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 512))
def test_results_leave_before_the_next_come(pe: int, beats: int, simd: int) -> None:
    lanes = drain_lanes(pe, beats)
    assert pe % lanes == 0 and pe // lanes <= beats
    assert drain_fifo(pe // lanes, beats, simd) >= 2 * (pe // lanes)


@given(st.integers(-(2**30), 0), st.integers(0, 2**30))
def test_bits_hold_both_bounds(low: int, high: int) -> None:
    bits = bits_for(low, high)
    assert -(1 << (bits - 1)) <= low and high < 1 << (bits - 1)


@given(
    st.tuples(st.integers(3, 12), st.integers(3, 9)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)),
)
def test_rows_of_a_window(
    image: tuple[int, int],
    kernel: tuple[int, int],
    strides: tuple[int, int],
    pads: tuple[int, int, int, int],
) -> None:
    """Following the plan, every window finds its rows in the ring, and every frame gives back all of its rows."""
    pads = tuple(min(p, k - 1) for p, k in zip(pads, (*kernel, *kernel), strict=True))  # type: ignore[assignment]
    size = [
        (i + a + b - k) // s + 1
        for i, a, b, k, s in zip(image, pads[:2], pads[2:], kernel, strides, strict=True)
    ]
    if min(size) < 1:
        return
    window = Window(2, image, kernel, strides, pads, (size[0], size[1]), 0)
    words = window.plan().words
    assert sum(word & 0xFFFF for word in words) == sum(word >> 16 for word in words) == image[0]
    first, need = 0, window.retained()[0][1]
    for frame in range(2):
        for row in range(size[0]):
            top = frame * image[0] + row * strides[0] - pads[0]
            read = [r for r in range(top, top + kernel[0]) if frame * image[0] <= r < (frame + 1) * image[0]]
            assert all(first <= r < need for r in read)
            assert need - first <= window.rows
            need, first = need + (words[row] >> 16), first + (words[row] & 0xFFFF)


def test_frames_and_tensors_are_inverse() -> None:
    chain = Chain((1, 3, 4, 5), dtype="uint8").conv("c", 2)
    (x,) = chain.samples(1)
    program = chain.program()
    frame = to_frame(program, "x", x)
    assert frame[:3].tolist() == [int(v) - 128 for v in x[0, :, 0, 0]]
    np.testing.assert_array_equal(from_frame(program, "x", frame), x)


def test_the_operand_that_waits_has_room_for_what_the_other_way_holds() -> None:
    chain = Chain((1, 4, 16, 16)).conv("a", 4)
    skip = chain.at
    network = build_network(chain.conv("b", 4).conv("c", 4).add("s", skip).program(), PROFILE)
    depths = sorted(e.parameters["DEPTH"] for e in network.engines if e.module == "stream_fifo")
    held = sum(e.parameters["ROWS"] for e in network.engines if e.name in ("b_window", "c_window")) * 16 * 4
    assert len(depths) == 2 and held < depths[1] < 2 * held + 512 and depths[0] < 200


def test_names_become_identifiers_that_stay_apart() -> None:
    assert identifier("stage/1:conv") == "stage_1_conv" and identifier("3x3") == "n_3x3"
    assert identifier("") == "layer" and identifier("reg") == "n_reg" and "wire" in RESERVED
    chain = Chain((1, 8)).gemm("a.b", 8).gemm("a:b", 8)
    names = [e.name for e in build_network(chain.program(), PROFILE).engines]
    assert len(set(names)) == len(names) and "a_b" in names and "a_b_2" in names


def test_hostile_node_names_stay_in_their_comment() -> None:
    name = 'x\n  $finish; /* " \\'
    chain = Chain((1, 8)).gemm(name, 8)
    text = network_text(build_network(chain.program(), PROFILE), "test")
    (line,) = (line for line in text.splitlines() if "$finish" in line)
    assert line.lstrip().startswith("//") and not line.endswith("\\")


def test_the_text_of_a_small_network() -> None:
    chain = Chain((1, 2, 6, 6)).conv("stem", 4)
    skip = chain.at
    program = chain.conv("body", 4, "4", depthwise=True).add("sum", skip).program()
    foldings = {"stem": Folding(2, 2), "body": Folding(2), "sum": Folding(4)}
    text = network_text(build_network(program, PROFILE, foldings), "Example")
    assert text == (GOLDEN / "fpga_network.v").read_text()


def test_only_optional_steps_need_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "simulator_missing", lambda: "pip install pyosys")
    made = generator.GENERATOR
    assert made.missing_tools(PROFILE, Request()) is None
    assert made.missing_tools(PROFILE, Request(steps=frozenset({"synth"}))) == "pip install pyosys"
    reason = made.why_not_executable(PROFILE)
    assert reason is not None and "pip install pyosys" in reason


def test_a_folder_without_a_circuit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no circuit can be read"):
        generator.read_circuit(tmp_path, PROFILE)


def test_every_engine_names_its_node_in_the_top_level() -> None:
    chain = Chain((1, 2, 6, 6)).conv("first", 4).conv("second", 4, depthwise=True)
    text = network_text(build_network(chain.program(), PROFILE), "test")
    assert text.count("// first: ") == 2 and text.count("// second: ") >= 2


def _between(chain: Chain) -> Program:
    """Put a conversion to float and back between two layers."""
    chain.gemm("a", 8)
    quant = chain.tensors[chain.at].quant
    chain.steps.append(Dequantize(name="dq", inputs=(chain.at,), outputs=("f",), nodes=("dq",)))
    chain.steps.append(Quantize(name="q", inputs=("f",), outputs=("g",)))
    chain.tensors |= {"f": Tensor("f", (1, 8), "float32"), "g": Tensor("g", (1, 8), "int8", quant)}
    chain.at = "g"
    return chain.gemm("b", 8).program()


def test_floats_inside_the_network_are_refused_by_name() -> None:
    with pytest.raises(PerformanceGateError, match=r"'dq'.*used by the network again") as caught:
        recognise(_between(Chain((1, 8))), PROFILE)
    assert caught.value.exit_code == 6


def test_what_has_no_circuit_is_refused_by_name() -> None:
    grouped = Chain((1, 4, 5, 5)).conv("c", 4, depthwise=True)
    step = grouped.steps[0]
    assert isinstance(step, QConv)
    weight = np.ones((4, 2, 3, 3), np.int8)
    grouped.steps[0] = replace(step, group=2, weight=weight)
    with pytest.raises(PerformanceGateError, match=r"node 'c'.*2 groups"):
        recognise(grouped.program(), PROFILE)
    dilated = Chain((1, 4, 7, 7)).conv("c", 4)
    dilated.steps[0] = replace(dilated.steps[0], dilations=(2, 2))  # type: ignore[call-arg]
    with pytest.raises(PerformanceGateError, match="dilation"):
        recognise(dilated.program(), PROFILE)
    turned = Chain((1, 4, 5, 5)).conv("c", 4)
    out = turned.tensors[turned.at]
    turned.steps.append(
        Move(name="t", inputs=(out.name,), outputs=("t",), kind="transpose", perm=(0, 1, 3, 2))
    )
    turned.tensors["t"] = replace(out, name="t")
    turned.at = "t"
    with pytest.raises(PerformanceGateError, match="'transpose'"):
        recognise(turned.program(), PROFILE)


def test_orders_that_a_stream_has_not_are_refused() -> None:
    chain = Chain((1, 4, 5, 5)).conv("c", 4)
    with pytest.raises(PerformanceGateError, match="along the width"):
        recognise(chain.gemm("fc", 3).program(), PROFILE)
    chain = Chain((1, 4, 5, 5)).conv("c", 4)
    out = chain.tensors[chain.at]
    chain.steps.append(Move(name="r", inputs=(out.name,), outputs=("r",), kind="reshape"))
    chain.tensors["r"] = replace(out, name="r", shape=(1, 4, 25))
    chain.at = "r"
    with pytest.raises(PerformanceGateError, match="another order"):
        recognise(chain.gemm("fc", 3).program(), PROFILE)
    chain = Chain((1, 4, 5, 5)).conv("c", 4).flatten("f").table("t").gemm("fc", 3)
    with pytest.raises(PerformanceGateError, match="flattened image"):
        recognise(chain.program(), PROFILE)


def test_a_model_without_integers_is_refused() -> None:
    chain = Chain((1, 8))
    with pytest.raises(PerformanceGateError, match="no layer of the model became integers"):
        recognise(chain.program(), PROFILE)


@pytest.mark.parametrize(
    ("change", "why"),
    [({"rounding": "double"}, "half before one shift"), ({"multiplier_bits": 18}, "multipliers of 18 bits")],
)
def test_the_requantization_must_be_that_of_the_circuits(change: dict[str, object], why: str) -> None:
    requantize = PROFILE.numerics.requantize.model_copy(update=change)
    numerics = PROFILE.numerics.model_copy(update={"requantize": requantize})
    with pytest.raises(ProfileError, match=why):
        layers_of(Chain((1, 8)).gemm("fc", 8).program(), PROFILE.model_copy(update={"numerics": numerics}))


def test_bench_and_board_have_what_the_streams_are_wide() -> None:
    program = Chain((1, 12)).gemm("fc", 6).program()
    host = Host(program, recognise(program, PROFILE), 16)
    network = build_network(program, PROFILE, {"fc": Folding(6, 4)})
    files = bench_files(network, host)
    assert len(files[BENCH_INPUT].split()) == 2 * 3 and all(len(w) == 8 for w in files[BENCH_INPUT].split())
    lanes = network.streams[network.output].lanes
    assert len(files[BENCH_OUTPUT].split()) == 2 * 6 // lanes
    board = board_files(network)["board.v"]
    assert ".RATIO(4)) collect" in board
