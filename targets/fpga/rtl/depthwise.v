// One filter a channel: PE channels a cycle, TAPS cycles a group of channels, groups in order, pixel after pixel.
module depthwise #(
  parameter CHANNELS = 8,
  parameter TAPS = 9,
  parameter PE = 1,
  parameter ACT_BITS = 8,           // of the inputs; the upper bits of their bytes repeat the sign
  parameter WEIGHT_BITS = 8,
  parameter KIND = 0,
  parameter DSP = 0,
  parameter LANES = 1,
  parameter OUT_BITS = 8,
  parameter FIFO = 16,
  parameter ACC_BITS = 24,
  parameter MULT_BITS = 16,
  parameter SHIFT_MIN = 1,
  parameter SHIFT_BITS = 0,
  parameter ZERO = 0,
  parameter LOW = -128,
  parameter HIGH = 127,
  parameter WEIGHT_FILE = "",
  parameter PARAMETER_FILE = ""
) (
  input clk,
  input rst,
  input in_valid,
  output in_ready,
  input [PE*8-1:0] in_data,
  output out_valid,
  input out_ready,
  output [LANES*OUT_BITS-1:0] out_data
);
  localparam WORDS = CHANNELS / PE * TAPS;
  localparam TB = (TAPS > 1) ? $clog2(TAPS) : 1;
  localparam AB = (WORDS > 1) ? $clog2(WORDS) : 1;
  localparam PRODUCT = ACT_BITS + ((KIND == 0) ? WEIGHT_BITS : 1);
  localparam STAGES = 2 + ((KIND == 0 && DSP == 0 && WEIGHT_BITS > 4) ? 2 : 1);

  reg [TB-1:0] tap;
  reg [AB-1:0] address;
  wire room;
  wire last = (tap == TAPS - 1);
  wire free = ~last | room;
  wire go = in_valid & free;
  assign in_ready = free;
  always @(posedge clk) begin
    if (rst) begin
      tap <= 0;
      address <= 0;
    end else if (go) begin
      tap <= last ? 0 : tap + 1'b1;
      address <= (address == WORDS - 1) ? 0 : address + 1'b1;
    end
  end

  reg [STAGES-1:0] valid_at, first_at;
  reg [STAGES:0] last_at;
  always @(posedge clk) begin
    valid_at <= rst ? {STAGES{1'b0}} : {valid_at[STAGES-2:0], go};
    first_at <= {first_at[STAGES-2:0], tap == 0};
    last_at <= rst ? {(STAGES+1){1'b0}} : {last_at[STAGES-1:0], go & last};
  end

  reg [PE*WEIGHT_BITS-1:0] weights [0:WORDS-1];
  initial if (WEIGHT_FILE != "") $readmemh(WEIGHT_FILE, weights);
  reg [PE*WEIGHT_BITS-1:0] w1, w2;
  reg [PE*ACT_BITS-1:0] x1, x2;
  wire [PE*ACT_BITS-1:0] given;
  always @(posedge clk) begin
    w1 <= weights[address];
    w2 <= w1;
    x1 <= given;
    x2 <= x1;
  end

  wire [PE*ACC_BITS-1:0] sums;
  genvar p;
  generate
    for (p = 0; p < PE; p = p + 1) begin : channel
      assign given[p*ACT_BITS +: ACT_BITS] = in_data[p*8 +: ACT_BITS];
      wire signed [PRODUCT-1:0] product;
      multiply #(.ACT_BITS(ACT_BITS), .WEIGHT_BITS(WEIGHT_BITS), .KIND(KIND), .DSP(DSP), .PRODUCT(PRODUCT)) unit (
        .clk(clk), .x(x2[p*ACT_BITS +: ACT_BITS]), .w(w2[p*WEIGHT_BITS +: WEIGHT_BITS]), .p(product)
      );
      wire signed [ACC_BITS-1:0] added = product;
      reg signed [ACC_BITS-1:0] acc;
      always @(posedge clk) if (valid_at[STAGES-1]) acc <= first_at[STAGES-1] ? added : acc + added;
      assign sums[p*ACC_BITS +: ACC_BITS] = acc;
    end
  endgenerate

  drain #(
    .PE(PE), .LANES(LANES), .CHANNELS(CHANNELS), .OUT_BITS(OUT_BITS), .FIFO(FIFO), .ACC_BITS(ACC_BITS),
    .MULT_BITS(MULT_BITS), .SHIFT_MIN(SHIFT_MIN), .SHIFT_BITS(SHIFT_BITS), .ZERO(ZERO), .LOW(LOW), .HIGH(HIGH),
    .PARAMETER_FILE(PARAMETER_FILE)
  ) results (
    .clk(clk), .rst(rst), .issue(go & last), .room(room), .capture(last_at[STAGES]), .sums(sums),
    .out_valid(out_valid), .out_ready(out_ready), .out_data(out_data)
  );
endmodule
