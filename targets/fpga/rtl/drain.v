// PE accumulators at once become LANES results a cycle: bias, requantization, output buffer.
// A fold may enter the pipeline only while ``room`` is high, and not before PE / LANES cycles after the last one.
module drain #(
  parameter PE = 1,
  parameter LANES = 1,
  parameter CHANNELS = 1,
  parameter OUT_BITS = 8,
  parameter FIFO = 16,
  parameter ACC_BITS = 24,
  parameter MULT_BITS = 16,            // 0: accumulators leave as they are
  parameter SHIFT_MIN = 1,
  parameter SHIFT_BITS = 0,
  parameter ZERO = 0,
  parameter LOW = -128,
  parameter HIGH = 127,
  parameter PARAMETER_FILE = ""
) (
  input clk,
  input rst,
  input issue,                         // the last cycle of a fold has entered the pipeline
  output room,
  input capture,                       // ``sums`` holds a finished fold
  input [PE*ACC_BITS-1:0] sums,
  output out_valid,
  input out_ready,
  output [LANES*OUT_BITS-1:0] out_data
);
  localparam BEATS = PE / LANES;
  localparam LB = $clog2(BEATS + 1);
  localparam WORDS = CHANNELS / LANES;
  localparam IB = (WORDS > 1) ? $clog2(WORDS) : 1;
  localparam FIELD = ACC_BITS + MULT_BITS + SHIFT_BITS;
  localparam STAGES = (MULT_BITS > 0) ? 7 : 2;

  reg [PE*ACC_BITS-1:0] hold;
  reg [LB-1:0] left;
  reg [IB-1:0] index;
  wire active = (left != 0);
  always @(posedge clk) begin
    if (capture) hold <= sums;
    else hold <= hold >> (LANES * ACC_BITS);
    if (rst) begin
      left <= 0;
      index <= 0;
    end else begin
      if (capture) left <= BEATS;
      else if (active) left <= left - 1'b1;
      if (active) index <= (index == WORDS - 1) ? 0 : index + 1'b1;
    end
  end

  reg [LANES*FIELD-1:0] parameters [0:WORDS-1];
  initial if (PARAMETER_FILE != "") $readmemh(PARAMETER_FILE, parameters);
  reg [LANES*FIELD-1:0] field;
  reg [LANES*ACC_BITS-1:0] acc;
  reg [STAGES-1:0] valid;
  always @(posedge clk) begin
    field <= parameters[index];
    acc <= hold[LANES*ACC_BITS-1:0];
    valid <= rst ? {STAGES{1'b0}} : {valid[STAGES-2:0], active};
  end

  wire [LANES*OUT_BITS-1:0] results;
  genvar k;
  generate
    for (k = 0; k < LANES; k = k + 1) begin : lane
      wire [FIELD-1:0] own = field[k*FIELD +: FIELD];
      wire signed [ACC_BITS-1:0] bias = own[FIELD-1 -: ACC_BITS];
      wire signed [ACC_BITS-1:0] sum = acc[k*ACC_BITS +: ACC_BITS];
      reg signed [ACC_BITS-1:0] biased;
      always @(posedge clk) biased <= sum + bias;
      if (MULT_BITS > 0) begin : scaled
        localparam SB = (SHIFT_BITS > 0) ? SHIFT_BITS : 1;
        reg [MULT_BITS-1:0] mult;
        reg [SB-1:0] shift;
        wire signed [7:0] y;
        always @(posedge clk) begin
          mult <= own[SHIFT_BITS +: MULT_BITS];
          shift <= (SHIFT_BITS > 0) ? own[SB-1:0] : {SB{1'b0}};
        end
        requantize #(
          .ACC_BITS(ACC_BITS), .MULT_BITS(MULT_BITS), .SHIFT_MIN(SHIFT_MIN), .SHIFT_BITS(SHIFT_BITS),
          .ZERO(ZERO), .LOW(LOW), .HIGH(HIGH)
        ) unit (.clk(clk), .acc(biased), .mult(mult), .shift(shift), .y(y));
        assign results[k*OUT_BITS +: OUT_BITS] = y;
      end else begin : raw
        assign results[k*OUT_BITS +: OUT_BITS] = biased;
      end
    end
  endgenerate

  credit_fifo #(.WIDTH(LANES*OUT_BITS), .DEPTH(FIFO), .BEATS(BEATS)) queue (
    .clk(clk), .rst(rst), .reserve(issue), .room(room),
    .in_valid(valid[STAGES-1]), .in_data(results),
    .out_valid(out_valid), .out_ready(out_ready), .out_data(out_data)
  );
endmodule
