// Average of every channel over a whole image: sums are kept while the image passes.
module pool_global_average #(
  parameter LANES = 1,
  parameter GROUPS = 8,
  parameter PIXELS = 64,
  parameter BIAS = 0,
  parameter MULT = 1,
  parameter ACC_BITS = 16,
  parameter MULT_BITS = 16,
  parameter SHIFT_MIN = 1,
  parameter ZERO = 0,
  parameter LOW = -128,
  parameter HIGH = 127
) (
  input clk,
  input rst,
  input in_valid,
  output in_ready,
  input [LANES*8-1:0] in_data,
  output out_valid,
  input out_ready,
  output [LANES*8-1:0] out_data
);
  localparam GB = (GROUPS > 1) ? $clog2(GROUPS) : 1;
  localparam NB = (PIXELS > 1) ? $clog2(PIXELS) : 1;
  reg [GB-1:0] group;
  reg [NB-1:0] pixel;
  reg [6:0] valid;
  wire room;
  wire group_end = (group == GROUPS - 1);
  wire last = (pixel == PIXELS - 1);
  assign in_ready = ~last | room;
  wire go = in_valid & in_ready;
  always @(posedge clk) begin
    valid <= rst ? 7'd0 : {valid[5:0], go & last};
    if (rst) begin
      group <= 0;
      pixel <= 0;
    end else if (go) begin
      group <= group_end ? 0 : group + 1'b1;
      if (group_end) pixel <= last ? 0 : pixel + 1'b1;
    end
  end

  wire [LANES*8-1:0] results;
  genvar k;
  generate
    for (k = 0; k < LANES; k = k + 1) begin : lane
      reg signed [ACC_BITS-1:0] sums [0:GROUPS-1];
      wire signed [7:0] x = in_data[k*8 +: 8];
      wire signed [ACC_BITS-1:0] wide = x;
      wire signed [ACC_BITS-1:0] so_far = sums[group];
      wire signed [ACC_BITS-1:0] start = BIAS;
      wire signed [ACC_BITS-1:0] total = ((pixel == 0) ? start : so_far) + wide;
      reg signed [ACC_BITS-1:0] acc;
      wire [MULT_BITS-1:0] mult = MULT;
      wire signed [7:0] y;
      always @(posedge clk) begin
        if (go) sums[group] <= total;
        acc <= total;
      end
      requantize #(
        .ACC_BITS(ACC_BITS), .MULT_BITS(MULT_BITS), .SHIFT_MIN(SHIFT_MIN), .SHIFT_BITS(0),
        .ZERO(ZERO), .LOW(LOW), .HIGH(HIGH)
      ) unit (.clk(clk), .acc(acc), .mult(mult), .shift(1'b0), .y(y));
      assign results[k*8 +: 8] = y;
    end
  endgenerate

  credit_fifo #(.WIDTH(LANES*8), .DEPTH(16), .BEATS(1)) queue (
    .clk(clk), .rst(rst), .reserve(go & last), .room(room),
    .in_valid(valid[5]), .in_data(results),
    .out_valid(out_valid), .out_ready(out_ready), .out_data(out_data)
  );
endmodule
