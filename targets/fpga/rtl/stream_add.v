// Sum of two 8-bit streams with fixed-point scales:
// y = clip(((a * MULT_A + b * MULT_B + OFFSET) * 2**-SHIFT, half rounded up) + ZERO).
module stream_add #(
  parameter LANES = 1,
  parameter MULT_A = 1,
  parameter MULT_B = 1,
  parameter SHIFT = 1,
  parameter OFFSET = 0,
  parameter ZERO = 0,
  parameter LOW = -128,
  parameter HIGH = 127
) (
  input clk,
  input rst,
  input a_valid,
  output a_ready,
  input [LANES*8-1:0] a_data,
  input b_valid,
  output b_ready,
  input [LANES*8-1:0] b_data,
  output out_valid,
  input out_ready,
  output [LANES*8-1:0] out_data
);
  localparam BITS = 28;    // 2 * 128 * 2**17 and both zero points
  wire room;
  wire go = a_valid & b_valid & room;
  assign a_ready = b_valid & room;
  assign b_ready = a_valid & room;
  reg [4:0] valid;
  wire [LANES*8-1:0] sums;

  genvar k;
  generate
    for (k = 0; k < LANES; k = k + 1) begin : lane
      localparam signed [BITS-1:0] MA = MULT_A;
      localparam signed [BITS-1:0] MB = MULT_B;
      localparam signed [BITS-1:0] ADDED = OFFSET;
      wire signed [7:0] a = a_data[k*8 +: 8];
      wire signed [7:0] b = b_data[k*8 +: 8];
      reg signed [7:0] a1, b1;
      reg signed [BITS-1:0] pa, pb, total, rounded;
      reg signed [7:0] clipped;
      always @(posedge clk) begin
        a1 <= a;
        b1 <= b;
        pa <= a1 * MA;
        pb <= b1 * MB + ADDED;
        total <= pa + pb;
        rounded <= ((total >>> (SHIFT - 1)) + (2 * ZERO + 1)) >>> 1;
        clipped <= (rounded > HIGH) ? HIGH : (rounded < LOW) ? LOW : rounded;
      end
      assign sums[k*8 +: 8] = clipped;
    end
  endgenerate

  always @(posedge clk) valid <= rst ? 5'd0 : {valid[3:0], go};

  credit_fifo #(.WIDTH(LANES*8), .DEPTH(16), .BEATS(1)) results (
    .clk(clk), .rst(rst), .reserve(go), .room(room),
    .in_valid(valid[4]), .in_data(sums),
    .out_valid(out_valid), .out_ready(out_ready), .out_data(out_data)
  );
endmodule
