"""Circuits in simulation: every engine and every weight code against the integer reference, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from fpga_programs import CODES, Chain

from bitwright.compiler.bundle.bundle import Bundle
from bitwright.compiler.interpret.run import run_program
from bitwright.compiler.options import Options
from bitwright.compiler.pipeline import compile_model
from bitwright.compiler.program.ops import Program
from bitwright.targets.fpga.assemble import assemble
from bitwright.targets.fpga.circuit import from_frame, to_frame, write_circuit
from bitwright.targets.fpga.generator import compare_layers
from bitwright.targets.fpga.host import Host
from bitwright.targets.fpga.network import Folding, Network
from bitwright.targets.fpga.recognise import recognise
from bitwright.targets.fpga.simulation import Trace, build_simulator, simulate
from bitwright.targets.fpga.testbench import bench_files, board_files
from bitwright.targets.loader import load_profile
from bitwright.targets.toolchain.circuit_simulator import simulator_missing
from bitwright.targets.toolchain.process import run_tool

PROFILE = load_profile("ecp5-85f")
MISSING = simulator_missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"circuits cannot be simulated: {MISSING}")


@dataclass(frozen=True)
class Built:
    """A circuit and its simulator."""

    host: Host
    network: Network
    program: Path

    def run(self, samples: list[np.ndarray], stalls: int = 0) -> Trace:
        """Simulate frames and compare every layer of every frame with the reference."""
        source = self.host.circuit.source
        frames = np.stack([to_frame(self.host.program, source, x) for x in samples])
        trace = simulate(self.program, self.network, frames, stalls=stalls)
        for k, x in enumerate(samples):
            expected = self.host.reference(x)[self.host.circuit.result]
            actual = from_frame(self.host.program, self.host.circuit.result, trace.outputs[k])
            np.testing.assert_array_equal(actual, expected)
        for check in compare_layers(self.host, self.network, trace):
            np.testing.assert_array_equal(check.actual, check.expected, err_msg=check.part)
        return trace


def build(program: Program, folder: Path, foldings: Mapping[str, Folding]) -> Built:
    """Write a circuit and translate it for simulation."""
    host = Host(program, recognise(program, PROFILE), 16)
    network = assemble(host.circuit, program, foldings)
    write_circuit(network, folder, "test")
    return Built(host, network, build_simulator(folder, network))


def assert_interval(trace: Trace, network: Network) -> None:
    """The closed form is exact; one cycle a frame is left to rounding of the mean."""
    assert abs(trace.interval - network.interval) <= 1


FOLDED = ((8, 2), (4, 8), (6, 4), (12, 3), (2, 12), (24, 24), (3, 6), (8, 8))


def test_every_weight_code_in_luts(tmp_path: Path) -> None:
    """Eight layers of 24 x 24, each with another code and folding; also when both ends of the circuit wait."""
    chain = Chain((1, 24))
    for code in CODES:
        chain.gemm(f"fc{code}", 24, code)
    foldings = {f"fc{code}": Folding(pe, simd) for code, (pe, simd) in zip(CODES, FOLDED, strict=True)}
    built = build(chain.program(), tmp_path, foldings)
    engines = {e.name: e for e in built.network.engines if e.step}
    assert [str(layer.code) for layer in built.network.layers] == list(CODES)
    assert engines["fc8"].parameters["DSP"] == 0
    samples = chain.samples(12)
    trace = built.run(samples)
    assert_interval(trace, built.network)
    waiting = built.run(samples, stalls=7)
    np.testing.assert_array_equal(waiting.outputs, trace.outputs)
    assert waiting.cycles > trace.cycles


def test_products_in_dsp_blocks_unsigned_activations_and_accumulators(tmp_path: Path) -> None:
    """Unsigned tensors travel moved down by 128; the last layer's accumulators leave as 32 bits."""
    chain = Chain((5, 12), dtype="uint8", seed=1)
    chain.gemm("a", 20, "8").gemm("b", 8, "5").gemm("c", 6, "8", raw=True)
    foldings = {"a": Folding(5, 4, True), "b": Folding(8, 20, True), "c": Folding(6, 8, True)}
    built = build(chain.program(), tmp_path, foldings)
    assert built.network.streams[built.network.output].bits == 32
    assert_interval(built.run(chain.samples(6)), built.network)
    built.run(chain.samples(4), stalls=3)


@pytest.mark.parametrize("code", ["8", "4"])
def test_every_product(tmp_path: Path, code: str) -> None:
    """Each activation times each weight, as sums of shifted activations (two cycles above four bits)."""
    most = 1 << (int(code) - 1)
    chain = Chain((256, 1), seed=2).gemm("fc", 2 * most, code, raw=True)
    step = chain.steps[0]
    object.__setattr__(step, "weight", np.arange(-most, most).astype(np.int8)[None])
    x = np.arange(-128, 128).astype(np.int8)[:, None]
    built = build(chain.program(), tmp_path, {"fc": Folding(8, 1)})
    trace = built.run([x])
    quant = chain.tensors["x"].quant
    assert quant is not None
    direct = (x.astype(int) - quant.zero_point) * np.arange(-most, most) + step.bias  # type: ignore[attr-defined]
    np.testing.assert_array_equal(trace.outputs[0].reshape(256, -1), direct)


def test_convolutions_residual_sum_and_pooling(tmp_path: Path) -> None:
    """A small residual network: windows of all kinds, a fork, FIFOs, a global average, a flattened image."""
    chain = Chain((1, 3, 12, 10), seed=3).conv("stem", 8, "8")
    skip = chain.at
    chain.conv("one", 8, "4").conv("two", 8, "ternary").add("sum", skip)
    chain.conv("dw", 8, "3", depthwise=True).conv("pw", 12, "6", kernel=(1, 1), pads=(0, 0, 0, 0))
    chain.conv("half", 8, "2", strides=(2, 2), pads=(0, 0, 1, 1)).pool("most", "max", (2, 2), (1, 1))
    chain.pool("mean", "average", (2, 2), (1, 2)).flatten("flat").gemm("fc", 5, "5")
    foldings = {
        "stem": Folding(8, 3),
        "one": Folding(4, 8),
        "two": Folding(8, 4),
        "sum": Folding(2),
        "dw": Folding(4),
        "pw": Folding(3, 4),
        "half": Folding(2, 12),
        "most": Folding(2),
        "mean": Folding(2),
        "fc": Folding(5, 4),
    }
    built = build(chain.program(), tmp_path, foldings)
    trace = built.run(chain.samples(5))
    assert_interval(trace, built.network)
    built.run(chain.samples(2), stalls=11)


def test_concatenation_table_and_global_average(tmp_path: Path) -> None:
    """Channels of two branches, one of them strided and pointwise; unsigned activations."""
    chain = Chain((1, 4, 9, 8), dtype="uint8", seed=4).conv("a", 4, "8", kernel=(2, 3), pads=(1, 0, 0, 2))
    branch = chain.at
    chain.conv("b", 6, "4", kernel=(1, 1), strides=(2, 2), pads=(0, 0, 0, 0)).table("f")
    strided = chain.at
    chain.at = branch
    chain.conv("c", 2, "8", kernel=(3, 2), strides=(2, 2), pads=(1, 0, 1, 0)).concat("both", strided)
    chain.pool("mean", "average", (5, 4), (1, 1))
    foldings = {
        "a": Folding(4, 2),
        "b": Folding(3, 2),
        "c": Folding(2, 4),
        "both": Folding(2),
        "f": Folding(3),
    }
    built = build(chain.program(), tmp_path, foldings)
    assert_interval(built.run(chain.samples(4)), built.network)
    built.run(chain.samples(2), stalls=5)


def test_activations_of_few_bits(tmp_path: Path) -> None:
    """Activations clipped to 16 levels: windows, products and accumulators of four bits behind the first layer."""
    chain = Chain((1, 3, 9, 8), "uint8", seed=8, levels=(0, 15)).conv("stem", 8, "8")
    skip = chain.at
    chain.conv("one", 8, "2").conv("two", 8, "ternary").add("sum", skip)
    chain.conv("dw", 8, "8", depthwise=True).pool("most", "max", (2, 2), (1, 1))
    chain.conv("pw", 8, "5", kernel=(1, 1), pads=(0, 0, 0, 0)).table("f")
    chain.pool("mean", "average", (8, 7), (1, 1)).flatten("flat").gemm("fc", 6, "4")
    foldings = {
        "stem": Folding(4, 3),
        "one": Folding(4, 4),
        "two": Folding(2, 8),
        "dw": Folding(2),
        "fc": Folding(2, 8),
    }
    built = build(chain.program(), tmp_path, foldings | {"pw": Folding(4, 4, True)})
    bits = {e.name: e.parameters["ACT_BITS"] for e in built.network.engines if "ACT_BITS" in e.parameters}
    assert bits.pop("stem") == bits.pop("stem_window") == 8
    # The average's bounds are those of its type: it has a scale of its own.
    assert bits.pop("fc") == 8 and set(bits.values()) == {4} and len(bits) == 8
    trace = built.run(chain.samples(4))
    assert_interval(trace, built.network)
    built.run(chain.samples(2), stalls=13)


@pytest.mark.parametrize(("dtype", "levels"), [("int8", (-4, 7)), ("int8", (-128, 3)), ("uint8", (100, 31))])
def test_few_levels_anywhere_in_their_type(tmp_path: Path, dtype: str, levels: tuple[int, int]) -> None:
    """Levels that are signed, at the end of the type, in its middle; joined with a tensor that has all of them."""
    chain = Chain((1, 2, 5, 4), dtype, seed=9, levels=levels).conv("a", 4, "3")
    narrow = chain.at
    chain.conv("b", 4, "binary", depthwise=True).concat("both", narrow)
    chain.conv("c", 4, "6").flatten("flat").gemm("fc", 3, "8", raw=True)
    built = build(chain.program(), tmp_path, {"a": Folding(2, 2), "b": Folding(2), "fc": Folding(3, 4)})
    bits = [
        e.parameters["ACT_BITS"] for e in built.network.engines if e.module in ("depthwise", "matrix_vector")
    ]
    assert bits == [8, *([levels[1].bit_length()] * 3)]
    built.run(chain.samples(3))


LOOP = """
module loop (input clk, input rst, input in_valid, output in_ready, input [7:0] in_data,
             output out_valid, input out_ready, output [7:0] out_data);
  wire up, down;
  wire [7:0] led;
  uart #(.CYCLES(25)) computer (.clk(clk), .rst(rst), .rx(down), .tx(up),
    .in_valid(in_valid), .in_ready(in_ready), .in_data(in_data),
    .out_valid(out_valid), .out_ready(out_ready), .out_data(out_data));
  board dut (.clk_25mhz(clk), .ftdi_txd(up), .ftdi_rxd(down), .led(led));
endmodule
"""


def test_board_over_its_serial_port(tmp_path: Path) -> None:
    """The board's top level, AXI streams inside, with a serial port at its pins: bytes in, bytes out."""
    chain = Chain((1, 12), seed=8).gemm("fc", 6)
    host = Host(chain.program(), recognise(chain.program(), PROFILE), 16)
    network = assemble(host.circuit, host.program, {"fc": Folding(6, 4)})
    write_circuit(network, tmp_path, "test")
    for name, text in (board_files(network) | {"loop.v": LOOP}).items():
        (tmp_path / name).write_text(text)
    program = build_simulator(tmp_path, network, top="loop", files=("axis.v", "board.v", "loop.v"))
    bytewise = replace(network, streams={k: replace(s, lanes=1) for k, s in network.streams.items()})
    samples = chain.samples(3)
    trace = simulate(program, bytewise, np.stack([to_frame(host.program, "x", x) for x in samples]))
    for k, x in enumerate(samples):
        np.testing.assert_array_equal(trace.outputs[k], host.reference(x)["fc_y"].reshape(-1))


VERILATOR = (
    "--binary",
    "--timing",
    "--default-language",
    "1364-2005",
    "-Wno-fatal",
    "--top-module",
    "testbench",
)


@pytest.mark.skipif(
    not (shutil.which("iverilog") or shutil.which("verilator")),
    reason="neither Icarus nor Verilator is installed",
)
def test_bench_passes_in_another_simulator(tmp_path: Path) -> None:
    """The shipped test bench, in a simulator that has nothing to do with the one of verification."""
    chain = Chain((1, 2, 5, 4), seed=9).conv("c", 4, "5").flatten("f").gemm("fc", 3)
    host = Host(chain.program(), recognise(chain.program(), PROFILE), 16)
    network = assemble(host.circuit, host.program, {"c": Folding(2, 2)})
    write_circuit(network, tmp_path, "test")
    (tmp_path / "testbench").mkdir()
    for name, text in bench_files(network, host).items():
        (tmp_path / name).write_text(text)
    files = [
        "testbench.v",
        "axis.v",
        "network.v",
        *(f"rtl/{path.name}" for path in (tmp_path / "rtl").iterdir()),
    ]
    icarus = shutil.which("iverilog") is not None
    build_it = ["iverilog", "-g2005", "-o", "bench", *files] if icarus else ["verilator", *VERILATOR, *files]
    run_tool(build_it, what="test bench", timeout_s=600, folder=tmp_path)
    run_it = ["vvp", "bench"] if icarus else ["obj_dir/Vtestbench"]
    assert run_tool(run_it, what="test bench", timeout_s=600, folder=tmp_path).startswith("PASS")


MODEL = """
<ir_version: 8, opset_import: ["" : 17]>
small (float[1,2,8,8] x) => (float[1,4] p) <
  float[6,2,3,3] w0, float[6] b0, float[6,1,3,3] w1, float[6] b1, float[4,6] w2, float[4] b2
> {
  c0 = Conv <pads = [1,1,1,1], strides = [2,2]> (x, w0, b0)
  r0 = Relu(c0)
  c1 = Conv <pads = [1,1,1,1], group = 6> (r0, w1, b1)
  s = Add(c1, r0)
  r1 = Relu(s)
  m = GlobalAveragePool(r1)
  f = Flatten(m)
  g = Gemm <transB = 1> (f, w2, b2)
  p = Softmax(g)
}
"""


def small_model(path: Path) -> Path:
    """Write a small residual network with random weights."""
    rng = np.random.default_rng(5)
    model = onnx.parser.parse_model(MODEL)
    shapes = {"w0": (6, 2, 3, 3), "b0": (6,), "w1": (6, 1, 3, 3), "b1": (6,), "w2": (4, 6), "b2": (4,)}
    for name, shape in shapes.items():
        value = (rng.normal(size=shape) / 2).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    onnx.save(model, path)
    return path


def test_compile_from_onnx(tmp_path: Path) -> None:
    """A float model becomes a circuit whose every layer is proven, and the folder can be executed again."""
    rng = np.random.default_rng(6)
    np.savez(tmp_path / "data.npz", x=rng.normal(size=(8, 2, 8, 8)).astype(np.float32))
    options = Options(
        small_model(tmp_path / "small.onnx"),
        "ecp5-85f",
        data=str(tmp_path / "data.npz"),
        output=tmp_path / "out",
    )
    bundle = compile_model(options)
    assert bundle is not None
    found = bundle.report["verification"]
    assert found["executed"] == "simulated (cxxrtl)" and not found["kernel_differences"]
    tables = {table["title"]: table for table in bundle.report["generated"]["tables"]}
    assert {row[2] for row in tables["Engines"]["rows"]} >= {
        "matrix_vector",
        "depthwise",
        "sliding_window",
        "stream_add",
    }
    feeds = {"x": rng.normal(size=(1, 2, 8, 8)).astype(np.float32)}
    again = Bundle.open(tmp_path / "out").run(feeds)
    # Against the Q/DQ model: one step of the logits' scale moves a probability of four by little.
    np.testing.assert_allclose(again["p"], bundle.run(feeds, "ort")["p"], atol=0.05)


def test_fixed_point_stays_near_the_float_scales() -> None:
    """One multiplier of 16 bits is off by 2**-17 at most, so results differ by one step, and rarely."""
    chain = Chain((64, 40), seed=7).gemm("a", 40).gemm("b", 40)
    program = chain.program()
    (x,) = chain.samples(1)
    fixed = Host(program, recognise(program, PROFILE), 16).reference(x)
    scaled = run_program(program, {"x": x}, keep=("a_y",))
    apart = np.abs(fixed["a_y"].astype(int) - scaled["a_y"].astype(int))
    assert apart.max() <= 1 and (apart > 0).mean() < 0.01
