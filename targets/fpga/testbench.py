"""What stands around a circuit: a test bench with its vectors, and a top level for a real board."""

from __future__ import annotations

import numpy as np

from bitwright.targets.fpga.circuit import from_frame, to_frame
from bitwright.targets.fpga.host import Host
from bitwright.targets.fpga.network import Network, Stream
from bitwright.targets.fpga.verilog import TOP

FRAMES = 2
BENCH = "testbench.v"
BENCH_INPUT, BENCH_OUTPUT = "testbench/input.hex", "testbench/expected.hex"
BOARD_TOP = "board"
BOARD_FILE, BOARD_CONSTRAINTS = "board.v", "board.lpf"
BOARD_CLOCK_HZ = 25_000_000
BAUD = 1_000_000


def bench_files(network: Network, host: Host) -> dict[str, str]:
    """Return a self-checking test bench and its vectors: random frames and what the reference makes of them."""
    rng = np.random.default_rng(0)
    source, result = network.streams[network.input], network.streams[network.output]
    frames = rng.integers(-128, 128, (FRAMES, source.elements))
    expected = [_expected(host, frame) for frame in frames]
    return {
        BENCH: _bench(source, result, network.interval),
        BENCH_INPUT: _words(frames.reshape(-1), source),
        BENCH_OUTPUT: _words(np.concatenate(expected), result),
    }


def _expected(host: Host, frame: np.ndarray) -> np.ndarray:
    tensor = from_frame(host.program, host.circuit.source, frame)
    return to_frame(host.program, host.circuit.result, host.reference(tensor)[host.circuit.result])


def _words(elements: np.ndarray, stream: Stream) -> str:
    digits, mask = stream.bits // 4, (1 << stream.bits) - 1
    rows = elements.reshape(-1, stream.lanes)
    return "".join("".join(f"{int(v) & mask:0{digits}x}" for v in reversed(row)) + "\n" for row in rows)


def _bench(source: Stream, result: Stream, interval: int) -> str:
    limit = FRAMES * interval * 4 + 1_000_000
    return f"""// Feeds {FRAMES} frames, compares what comes out, prints PASS or every difference.
// iverilog -g2005 -o bench testbench.v axis.v network.v rtl/*.v && vvp bench
// or: verilator --binary --timing --default-language 1364-2005 -Wno-fatal --top-module testbench testbench.v axis.v
//   network.v rtl/*.v && obj_dir/Vtestbench
`timescale 1ns / 1ps
module testbench;
  localparam SENT = {FRAMES * source.beats};
  localparam RECEIVED = {FRAMES * result.beats};
  reg clk = 0;
  reg resetn = 0;
  reg [{source.lanes * source.bits - 1}:0] given [0:SENT-1];
  reg [{result.lanes * result.bits - 1}:0] expected [0:RECEIVED-1];
  initial $readmemh("{BENCH_INPUT}", given);
  initial $readmemh("{BENCH_OUTPUT}", expected);
  always #5 clk = ~clk;

  integer sent = 0, received = 0, wrong = 0, cycles = 0;
  wire in_ready, out_valid, out_last;
  wire in_valid = resetn & (sent < SENT);
  wire [{result.lanes * result.bits - 1}:0] out_data;
  {TOP} dut (
    .aclk(clk), .aresetn(resetn),
    .s_axis_tvalid(in_valid), .s_axis_tready(in_ready), .s_axis_tdata(given[sent < SENT ? sent : 0]),
    .m_axis_tvalid(out_valid), .m_axis_tready(1'b1), .m_axis_tdata(out_data), .m_axis_tlast(out_last)
  );

  always @(posedge clk) begin
    cycles <= cycles + 1;
    if (cycles == 8) resetn <= 1;
    if (in_valid & in_ready) sent <= sent + 1;
    if (resetn & out_valid) begin
      if (out_data !== expected[received]) begin
        wrong <= wrong + 1;
        $display("transfer %0d: %h, expected %h", received, out_data, expected[received]);
      end
      received <= received + 1;
    end
    if (received == RECEIVED || cycles > {limit}) begin
      if (received == RECEIVED && wrong == 0) $display("PASS: %0d transfers, %0d cycles", received, cycles);
      else $display("FAIL: %0d of %0d transfers, %0d wrong", received, RECEIVED, wrong);
      $finish;
    end
  end
endmodule
"""


def board_files(network: Network) -> dict[str, str]:
    """Return the top level for a ULX3S board, and its pins: frames in and out over the USB serial port."""
    source, result = network.streams[network.input], network.streams[network.output]
    return {BOARD_FILE: _board(source, result), BOARD_CONSTRAINTS: CONSTRAINTS}


def _board(source: Stream, result: Stream) -> str:
    inside, outside = source.lanes * source.bits, result.lanes * result.bits
    widen = (
        f"stream_widen #(.WIDTH(8), .RATIO({inside // 8})) collect (.clk(clk_25mhz), .rst(rst), "
        ".in_valid(rx_valid), .in_ready(rx_ready), .in_data(rx_data), "
        ".out_valid(given_valid), .out_ready(given_ready), .out_data(given_data));"
        if inside > 8
        else "assign given_valid = rx_valid; assign given_data = rx_data; assign rx_ready = given_ready;"
    )
    narrow = (
        f"stream_narrow #(.WIDTH(8), .RATIO({outside // 8})) split (.clk(clk_25mhz), .rst(rst), "
        ".in_valid(found_valid), .in_ready(found_ready), .in_data(found_data), "
        ".out_valid(tx_valid), .out_ready(tx_ready), .out_data(tx_data));"
        if outside > 8
        else "assign tx_valid = found_valid; assign tx_data = found_data; assign found_ready = tx_ready;"
    )
    return f"""// ULX3S board: bytes of frames come and go over the USB serial port at {BAUD} baud, 8N1.
module {BOARD_TOP} (
  input clk_25mhz,
  input ftdi_txd,           // from the serial port's chip
  output ftdi_rxd,          // to it
  output [7:0] led
);
  reg [3:0] started = 0;
  wire rst = ~started[3];
  always @(posedge clk_25mhz) if (rst) started <= started + 1'b1;

  wire rx_valid, rx_ready, given_valid, given_ready, found_valid, found_ready, tx_valid, tx_ready;
  wire [7:0] rx_data, tx_data;
  wire [{inside - 1}:0] given_data;
  wire [{outside - 1}:0] found_data;
  uart #(.CYCLES({BOARD_CLOCK_HZ // BAUD})) serial (
    .clk(clk_25mhz), .rst(rst), .rx(ftdi_txd), .tx(ftdi_rxd),
    .in_valid(tx_valid), .in_ready(tx_ready), .in_data(tx_data),
    .out_valid(rx_valid), .out_ready(rx_ready), .out_data(rx_data)
  );
  {widen}
  wire last;
  {TOP} model (
    .aclk(clk_25mhz), .aresetn(~rst),
    .s_axis_tvalid(given_valid), .s_axis_tready(given_ready), .s_axis_tdata(given_data),
    .m_axis_tvalid(found_valid), .m_axis_tready(found_ready), .m_axis_tdata(found_data), .m_axis_tlast(last)
  );
  {narrow}

  // Frames that have been finished, for the eye.
  reg [7:0] finished;
  always @(posedge clk_25mhz) begin
    if (rst) finished <= 0;
    else if (found_valid & found_ready & last) finished <= finished + 1'b1;
  end
  assign led = finished;
endmodule
"""


CONSTRAINTS = """# ULX3S, all versions from 2.0 on (LFE5U-12F to 85F in CABGA381).
BLOCK RESETPATHS;
BLOCK ASYNCPATHS;
LOCATE COMP "clk_25mhz" SITE "G2";
IOBUF PORT "clk_25mhz" PULLMODE=NONE IO_TYPE=LVCMOS33;
FREQUENCY PORT "clk_25mhz" 25 MHZ;
# The serial port's chip receives on the first pin and sends on the second.
LOCATE COMP "ftdi_rxd" SITE "L4";
LOCATE COMP "ftdi_txd" SITE "M1";
IOBUF PORT "ftdi_rxd" PULLMODE=UP IO_TYPE=LVCMOS33 DRIVE=4;
IOBUF PORT "ftdi_txd" PULLMODE=UP IO_TYPE=LVCMOS33;
""" + "".join(
    f'LOCATE COMP "led[{k}]" SITE "{site}";\nIOBUF PORT "led[{k}]" PULLMODE=DOWN IO_TYPE=LVCMOS33 DRIVE=4;\n'
    for k, site in enumerate(("B2", "C2", "C1", "D2", "D1", "E2", "E1", "H3"))
)
