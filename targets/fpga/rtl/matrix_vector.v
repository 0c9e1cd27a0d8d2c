// Folded matrix-vector product with constant weights: PE outputs times SIMD inputs a cycle, one vector after the other.
// memory -> register -> product -> tree -> accumulator -> drain; nothing behind the address counters ever stops.
module matrix_vector #(
  parameter IN = 8,
  parameter OUT = 8,
  parameter SIMD = 1,
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
  input [SIMD*8-1:0] in_data,
  output out_valid,
  input out_ready,
  output [LANES*OUT_BITS-1:0] out_data
);
  localparam BEATS = IN / SIMD;
  localparam FOLDS = OUT / PE;
  localparam BB = (BEATS > 1) ? $clog2(BEATS) : 1;
  localparam FB = (FOLDS > 1) ? $clog2(FOLDS) : 1;
  localparam AB = (BEATS * FOLDS > 1) ? $clog2(BEATS * FOLDS) : 1;
  localparam WORD = PE * SIMD * WEIGHT_BITS;
  localparam PRODUCT = ACT_BITS + ((KIND == 0) ? WEIGHT_BITS : 1);
  localparam LEVELS = (SIMD > 1) ? $clog2(SIMD) : 0;
  localparam MULTIPLYING = (KIND == 0 && DSP == 0 && WEIGHT_BITS > 4) ? 2 : 1;
  localparam STAGES = 2 + MULTIPLYING + (LEVELS + 1) / 2;   // from the counters to the accumulator's input

  // Which inputs, which outputs.
  reg [BB-1:0] beat;
  reg [FB-1:0] fold;
  reg [AB-1:0] address;
  wire room;
  wire last = (beat == BEATS - 1);
  wire fresh = (fold == 0);              // the first outputs of a vector take it in, the others read it again
  wire free = ~last | room;
  wire go = (in_valid | ~fresh) & free;
  assign in_ready = fresh & free;
  always @(posedge clk) begin
    if (rst) begin
      beat <= 0;
      fold <= 0;
      address <= 0;
    end else if (go) begin
      beat <= last ? 0 : beat + 1'b1;
      if (last) fold <= (fold == FOLDS - 1) ? 0 : fold + 1'b1;
      address <= (address == BEATS * FOLDS - 1) ? 0 : address + 1'b1;
    end
  end

  reg [STAGES-1:0] valid_at, first_at;
  reg [STAGES:0] last_at;
  always @(posedge clk) begin
    valid_at <= rst ? {STAGES{1'b0}} : {valid_at[STAGES-2:0], go};
    first_at <= {first_at[STAGES-2:0], beat == 0};
    last_at <= rst ? {(STAGES+1){1'b0}} : {last_at[STAGES-1:0], go & last};
  end

  // Weights and inputs.
  reg [WORD-1:0] weights [0:BEATS*FOLDS-1];
  initial if (WEIGHT_FILE != "") $readmemh(WEIGHT_FILE, weights);
  reg [WORD-1:0] w1, w2;
  reg [SIMD*ACT_BITS-1:0] x2;
  wire [SIMD*ACT_BITS-1:0] given;
  always @(posedge clk) begin
    w1 <= weights[address];
    w2 <= w1;
  end
  genvar p, s;
  generate
    for (s = 0; s < SIMD; s = s + 1) begin : narrow
      assign given[s*ACT_BITS +: ACT_BITS] = in_data[s*8 +: ACT_BITS];
    end
    if (FOLDS > 1) begin : replay
      reg [SIMD*ACT_BITS-1:0] vector [0:BEATS-1];
      reg [SIMD*ACT_BITS-1:0] kept, arrived;
      reg fresh1;
      always @(posedge clk) begin
        if (go & fresh) vector[beat] <= given;
        if (~fresh) kept <= vector[beat];
        arrived <= given;
        fresh1 <= fresh;
        x2 <= fresh1 ? arrived : kept;
      end
    end else begin : direct
      reg [SIMD*ACT_BITS-1:0] arrived;
      always @(posedge clk) begin
        arrived <= given;
        x2 <= arrived;
      end
    end
  endgenerate

  // Products, their sum, the accumulator.
  wire [PE*ACC_BITS-1:0] sums;
  generate
    for (p = 0; p < PE; p = p + 1) begin : row
      wire [SIMD*PRODUCT-1:0] products;
      for (s = 0; s < SIMD; s = s + 1) begin : column
        multiply #(.ACT_BITS(ACT_BITS), .WEIGHT_BITS(WEIGHT_BITS), .KIND(KIND), .DSP(DSP), .PRODUCT(PRODUCT)) unit (
          .clk(clk), .x(x2[s*ACT_BITS +: ACT_BITS]), .w(w2[(p*SIMD+s)*WEIGHT_BITS +: WEIGHT_BITS]),
          .p(products[s*PRODUCT +: PRODUCT])
        );
      end
      wire signed [PRODUCT+LEVELS-1:0] total;
      adder_tree #(.COUNT(SIMD), .WIDTH(PRODUCT), .LEVELS(LEVELS)) tree (
        .clk(clk), .terms(products), .sum(total)
      );
      wire signed [ACC_BITS-1:0] added = total;
      reg signed [ACC_BITS-1:0] acc;
      always @(posedge clk) if (valid_at[STAGES-1]) acc <= first_at[STAGES-1] ? added : acc + added;
      assign sums[p*ACC_BITS +: ACC_BITS] = acc;
    end
  endgenerate

  drain #(
    .PE(PE), .LANES(LANES), .CHANNELS(OUT), .OUT_BITS(OUT_BITS), .FIFO(FIFO), .ACC_BITS(ACC_BITS),
    .MULT_BITS(MULT_BITS), .SHIFT_MIN(SHIFT_MIN), .SHIFT_BITS(SHIFT_BITS), .ZERO(ZERO), .LOW(LOW), .HIGH(HIGH),
    .PARAMETER_FILE(PARAMETER_FILE)
  ) results (
    .clk(clk), .rst(rst), .issue(go & last), .room(room), .capture(last_at[STAGES]), .sums(sums),
    .out_valid(out_valid), .out_ready(out_ready), .out_data(out_data)
  );
endmodule
