// Example: 11 engines; a new frame every 648 cycles.
// In: 36 x 2 elements of 8 bits, channels last, 2 side by side.
// Out: 36 x 4 elements of 8 bits, channels last, 4 side by side.
module network (
  input clk,
  input rst,
  input in_valid,
  output in_ready,
  input [15:0] in_data,
  output out_valid,
  input out_ready,
  output [31:0] out_data
`ifdef BITWRIGHT_TAPS
  , output [16:0] tap_0
  , output [8:0] tap_1
  , output [16:0] tap_2
  , output [8:0] tap_3
  , output [32:0] tap_4
  , output [32:0] tap_5
  , output [32:0] tap_6
`endif
);
  wire from_host_valid, from_host_ready; wire [15:0] from_host_data;
  wire stem_window_out_valid, stem_window_out_ready; wire [15:0] stem_window_out_data;
  wire stem_out_valid, stem_out_ready; wire [7:0] stem_out_data;
  wire stem_out_copy_valid, stem_out_copy_ready; wire [7:0] stem_out_copy_data;
  wire stem_out_copy_2_valid, stem_out_copy_2_ready; wire [7:0] stem_out_copy_2_data;
  wire stem_out_copy_x2_valid, stem_out_copy_x2_ready; wire [15:0] stem_out_copy_x2_data;
  wire body_window_out_valid, body_window_out_ready; wire [15:0] body_window_out_data;
  wire body_out_valid, body_out_ready; wire [7:0] body_out_data;
  wire body_out_x4_valid, body_out_x4_ready; wire [31:0] body_out_x4_data;
  wire stem_out_copy_2_x4_valid, stem_out_copy_2_x4_ready; wire [31:0] stem_out_copy_2_x4_data;
  wire body_out_x4_waiting_valid, body_out_x4_waiting_ready; wire [31:0] body_out_x4_waiting_data;
  wire stem_out_copy_2_x4_waiting_valid, stem_out_copy_2_x4_waiting_ready; wire [31:0] stem_out_copy_2_x4_waiting_data;
  wire sum_out_valid, sum_out_ready; wire [31:0] sum_out_data;
  assign from_host_valid = in_valid;
  assign from_host_data = in_data;
  assign in_ready = from_host_ready;
  assign out_valid = sum_out_valid;
  assign out_data = sum_out_data;
  assign sum_out_ready = out_ready;
`ifdef BITWRIGHT_TAPS
  assign tap_0 = {from_host_valid & from_host_ready, from_host_data};
  assign tap_1 = {stem_out_valid & stem_out_ready, stem_out_data};
  assign tap_2 = {stem_out_copy_x2_valid & stem_out_copy_x2_ready, stem_out_copy_x2_data};
  assign tap_3 = {body_out_valid & body_out_ready, body_out_data};
  assign tap_4 = {body_out_x4_waiting_valid & body_out_x4_waiting_ready, body_out_x4_waiting_data};
  assign tap_5 = {stem_out_copy_2_x4_waiting_valid & stem_out_copy_2_x4_waiting_ready, stem_out_copy_2_x4_waiting_data};
  assign tap_6 = {sum_out_valid & sum_out_ready, sum_out_data};
`endif

  // stem: windows 3x3 of 6x6x2; 324 cycles a frame
  sliding_window #(
    .LANES(2), .ACT_BITS(8), .GROUPS(1), .H(6), .W(6), .KH(3), .KW(3), .SH(1), .SW(1), .TOP(1), .LEFT(1),
    .OH(6), .OW(6), .ROWS(4), .NEED(2), .FILL(0), .TAPS_INSIDE(0), .ROW_FILE("memory/stem_window.row.hex")
  ) stem_window (
    .clk(clk), .rst(rst), .in_valid(from_host_valid), .in_ready(from_host_ready), .in_data(from_host_data),
    .out_valid(stem_window_out_valid), .out_ready(stem_window_out_ready), .out_data(stem_window_out_data)
  );

  // stem: 4 x 18 matrix, 36 vectors a frame; 648 cycles a frame
  matrix_vector #(
    .IN(18), .OUT(4), .SIMD(2), .PE(2), .ACT_BITS(8), .WEIGHT_BITS(8), .KIND(0), .DSP(0), .LANES(1),
    .OUT_BITS(8), .FIFO(8), .ACC_BITS(19), .MULT_BITS(16), .SHIFT_MIN(25), .SHIFT_BITS(1), .ZERO(7), .LOW(-125),
    .HIGH(125), .WEIGHT_FILE("memory/stem.weight.hex"), .PARAMETER_FILE("memory/stem.parameter.hex")
  ) stem (
    .clk(clk), .rst(rst), .in_valid(stem_window_out_valid), .in_ready(stem_window_out_ready),
    .in_data(stem_window_out_data), .out_valid(stem_out_valid), .out_ready(stem_out_ready),
    .out_data(stem_out_data)
  );

  // stem: 2 readers; 144 cycles a frame
  stream_fork #(
    .WIDTH(8), .COUNT(2)
  ) stem_out_fork (
    .clk(clk), .rst(rst), .in_valid(stem_out_valid), .in_ready(stem_out_ready), .in_data(stem_out_data),
    .out_valid({stem_out_copy_2_valid, stem_out_copy_valid}), .out_ready({stem_out_copy_2_ready,
    stem_out_copy_ready}), .out_data({stem_out_copy_2_data, stem_out_copy_data})
  );

  // body: 1 to 2 elements side by side; 144 cycles a frame
  stream_widen #(
    .WIDTH(8), .RATIO(2)
  ) stem_out_copy_x2_width (
    .clk(clk), .rst(rst), .in_valid(stem_out_copy_valid), .in_ready(stem_out_copy_ready),
    .in_data(stem_out_copy_data), .out_valid(stem_out_copy_x2_valid), .out_ready(stem_out_copy_x2_ready),
    .out_data(stem_out_copy_x2_data)
  );

  // body: windows 3x3 of 6x6x4; 648 cycles a frame
  sliding_window #(
    .LANES(2), .ACT_BITS(8), .GROUPS(2), .H(6), .W(6), .KH(3), .KW(3), .SH(1), .SW(1), .TOP(1), .LEFT(1),
    .OH(6), .OW(6), .ROWS(4), .NEED(2), .FILL(7), .TAPS_INSIDE(1), .ROW_FILE("memory/body_window.row.hex")
  ) body_window (
    .clk(clk), .rst(rst), .in_valid(stem_out_copy_x2_valid), .in_ready(stem_out_copy_x2_ready),
    .in_data(stem_out_copy_x2_data), .out_valid(body_window_out_valid), .out_ready(body_window_out_ready),
    .out_data(body_window_out_data)
  );

  // body: 4 filters of 9 weights, 36 pixels a frame; 648 cycles a frame
  depthwise #(
    .CHANNELS(4), .TAPS(9), .PE(2), .ACT_BITS(8), .WEIGHT_BITS(4), .KIND(0), .DSP(0), .LANES(1), .OUT_BITS(8),
    .FIFO(8), .ACC_BITS(14), .MULT_BITS(16), .SHIFT_MIN(20), .SHIFT_BITS(2), .ZERO(7), .LOW(-125), .HIGH(125),
    .WEIGHT_FILE("memory/body.weight.hex"), .PARAMETER_FILE("memory/body.parameter.hex")
  ) body (
    .clk(clk), .rst(rst), .in_valid(body_window_out_valid), .in_ready(body_window_out_ready),
    .in_data(body_window_out_data), .out_valid(body_out_valid), .out_ready(body_out_ready),
    .out_data(body_out_data)
  );

  // sum: 1 to 4 elements side by side; 144 cycles a frame
  stream_widen #(
    .WIDTH(8), .RATIO(4)
  ) body_out_x4_width (
    .clk(clk), .rst(rst), .in_valid(body_out_valid), .in_ready(body_out_ready), .in_data(body_out_data),
    .out_valid(body_out_x4_valid), .out_ready(body_out_x4_ready), .out_data(body_out_x4_data)
  );

  // sum: 1 to 4 elements side by side; 144 cycles a frame
  stream_widen #(
    .WIDTH(8), .RATIO(4)
  ) stem_out_copy_2_x4_width (
    .clk(clk), .rst(rst), .in_valid(stem_out_copy_2_valid), .in_ready(stem_out_copy_2_ready),
    .in_data(stem_out_copy_2_data), .out_valid(stem_out_copy_2_x4_valid), .out_ready(stem_out_copy_2_x4_ready),
    .out_data(stem_out_copy_2_x4_data)
  );

  // sum: waits for the other operand; 36 cycles a frame
  stream_fifo #(
    .WIDTH(32), .DEPTH(16)
  ) body_out_x4_waiting_fifo (
    .clk(clk), .rst(rst), .in_valid(body_out_x4_valid), .in_ready(body_out_x4_ready),
    .in_data(body_out_x4_data), .out_valid(body_out_x4_waiting_valid), .out_ready(body_out_x4_waiting_ready),
    .out_data(body_out_x4_waiting_data)
  );

  // sum: waits for the other operand; 36 cycles a frame
  stream_fifo #(
    .WIDTH(32), .DEPTH(53)
  ) stem_out_copy_2_x4_waiting_fifo (
    .clk(clk), .rst(rst), .in_valid(stem_out_copy_2_x4_valid), .in_ready(stem_out_copy_2_x4_ready),
    .in_data(stem_out_copy_2_x4_data), .out_valid(stem_out_copy_2_x4_waiting_valid),
    .out_ready(stem_out_copy_2_x4_waiting_ready), .out_data(stem_out_copy_2_x4_waiting_data)
  );

  // sum: residual sum with fixed-point scales; 36 cycles a frame
  stream_add #(
    .LANES(4), .MULT_A(24805), .MULT_B(32926), .SHIFT(15), .OFFSET(-404117), .ZERO(2), .LOW(-123), .HIGH(127)
  ) sum (
    .clk(clk), .rst(rst), .a_valid(body_out_x4_waiting_valid), .a_ready(body_out_x4_waiting_ready),
    .a_data(body_out_x4_waiting_data), .b_valid(stem_out_copy_2_x4_waiting_valid),
    .b_ready(stem_out_copy_2_x4_waiting_ready), .b_data(stem_out_copy_2_x4_waiting_data),
    .out_valid(sum_out_valid), .out_ready(sum_out_ready), .out_data(sum_out_data)
  );
endmodule
