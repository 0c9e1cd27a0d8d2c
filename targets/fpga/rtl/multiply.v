// Product of a signed 8-bit activation and a weight. KIND 0: two's complement; 1: ternary (-1, 0, 1 in two bits);
// 2: binary (0 is 1, 1 is -1). Without DSP the products are sums of shifted activations in LUTs; above four bits they
// take two cycles. PRODUCT bits: 8 + WEIGHT_BITS for integers, 9 otherwise.
module multiply #(
  parameter WEIGHT_BITS = 8,
  parameter KIND = 0,
  parameter DSP = 0,
  parameter PRODUCT = 16
) (
  input clk,
  input signed [7:0] x,
  input [WEIGHT_BITS-1:0] w,
  output [PRODUCT-1:0] p
);
  generate
    if (KIND == 2) begin : binary
      reg signed [8:0] r;
      wire signed [8:0] wide = x;
      always @(posedge clk) r <= w[0] ? -wide : wide;
      assign p = r;
    end else if (KIND == 1) begin : ternary
      reg signed [8:0] r;
      wire signed [8:0] wide = x;
      always @(posedge clk) r <= w[0] ? (w[1] ? -wide : wide) : 9'sd0;
      assign p = r;
    end else if (DSP != 0) begin : block
      reg signed [PRODUCT-1:0] r;
      wire signed [WEIGHT_BITS-1:0] ws = w;
      always @(posedge clk) r <= x * ws;
      assign p = r;
    end else if (WEIGHT_BITS <= 4) begin : shallow
      reg [PRODUCT-1:0] r;
      wire [PRODUCT-1:0] sum;
      partial_sum #(.BITS(WEIGHT_BITS), .PRODUCT(PRODUCT), .SIGNED(1)) terms (.x(x), .w(w), .sum(sum));
      always @(posedge clk) r <= sum;
      assign p = r;
    end else begin : deep
      // The lower four bits count up, the upper ones hold the sign.
      localparam UPPER = WEIGHT_BITS - 4;
      wire [11:0] low;
      wire [PRODUCT-5:0] high;
      reg signed [11:0] low_r;
      reg [PRODUCT-5:0] high_r;
      reg [PRODUCT-1:0] r;
      wire [PRODUCT-1:0] low_wide = {{(PRODUCT-12){low_r[11]}}, low_r};
      partial_sum #(.BITS(4), .PRODUCT(12), .SIGNED(0)) lower (.x(x), .w(w[3:0]), .sum(low));
      partial_sum #(.BITS(UPPER), .PRODUCT(PRODUCT-4), .SIGNED(1)) upper (.x(x), .w(w[WEIGHT_BITS-1:4]), .sum(high));
      always @(posedge clk) begin
        low_r <= low;
        high_r <= high;
        r <= low_wide + {high_r, 4'b0000};
      end
      assign p = r;
    end
  endgenerate
endmodule

// Sum of the shifted activations that the bits of a weight select; the top bit of a signed weight counts down.
module partial_sum #(
  parameter BITS = 4,
  parameter PRODUCT = 12,
  parameter SIGNED = 1
) (
  input signed [7:0] x,
  input [BITS-1:0] w,
  output reg [PRODUCT-1:0] sum
);
  wire [PRODUCT-1:0] wide = {{(PRODUCT-8){x[7]}}, x};
  integer k;
  always @* begin
    sum = 0;
    for (k = 0; k < BITS - SIGNED; k = k + 1) sum = sum + ((wide << k) & {PRODUCT{w[k]}});
    if (SIGNED != 0) sum = sum - ((wide << (BITS - 1)) & {PRODUCT{w[BITS-1]}});
  end
endmodule
