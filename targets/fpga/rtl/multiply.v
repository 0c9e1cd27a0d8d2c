// Product of a signed activation of ACT_BITS and a weight. KIND 0: two's complement; 1: ternary (-1, 0, 1 in two bits);
// 2: binary (0 is 1, 1 is -1). Without DSP the products are sums of shifted activations in LUTs; above four bits they
// take two cycles. PRODUCT bits: ACT_BITS + WEIGHT_BITS for integers, ACT_BITS + 1 otherwise.
module multiply #(
  parameter ACT_BITS = 8,
  parameter WEIGHT_BITS = 8,
  parameter KIND = 0,
  parameter DSP = 0,
  parameter PRODUCT = 16
) (
  input clk,
  input signed [ACT_BITS-1:0] x,
  input [WEIGHT_BITS-1:0] w,
  output [PRODUCT-1:0] p
);
  generate
    if (KIND == 2) begin : binary
      reg signed [ACT_BITS:0] r;
      wire signed [ACT_BITS:0] wide = x;
      always @(posedge clk) r <= w[0] ? -wide : wide;
      assign p = r;
    end else if (KIND == 1) begin : ternary
      reg signed [ACT_BITS:0] r;
      wire signed [ACT_BITS:0] wide = x;
      always @(posedge clk) r <= w[0] ? (w[1] ? -wide : wide) : $signed({(ACT_BITS+1){1'b0}});
      assign p = r;
    end else if (DSP != 0) begin : block
      reg signed [PRODUCT-1:0] r;
      wire signed [WEIGHT_BITS-1:0] ws = w;
      always @(posedge clk) r <= x * ws;
      assign p = r;
    end else if (WEIGHT_BITS <= 4) begin : shallow
      reg [PRODUCT-1:0] r;
      wire [PRODUCT-1:0] sum;
      partial_sum #(.ACT_BITS(ACT_BITS), .BITS(WEIGHT_BITS), .SIGNED(1)) terms (.x(x), .w(w), .sum(sum));
      always @(posedge clk) r <= sum;
      assign p = r;
    end else begin : deep
      // The lower four bits count up, the upper ones hold the sign.
      localparam UPPER = WEIGHT_BITS - 4;
      wire [ACT_BITS+3:0] low;
      wire [PRODUCT-5:0] high;
      reg signed [ACT_BITS+3:0] low_r;
      reg signed [PRODUCT-5:0] high_r;
      reg [PRODUCT-1:0] r;
      wire signed [ACT_BITS-1:0] carried = low_r[ACT_BITS+3:4];
      wire signed [PRODUCT-5:0] upper = high_r + carried;
      partial_sum #(.ACT_BITS(ACT_BITS), .BITS(4), .SIGNED(0)) lower (.x(x), .w(w[3:0]), .sum(low));
      partial_sum #(.ACT_BITS(ACT_BITS), .BITS(UPPER), .SIGNED(1)) higher (.x(x), .w(w[WEIGHT_BITS-1:4]), .sum(high));
      always @(posedge clk) begin
        low_r <= low;
        high_r <= high;
        r <= {upper, low_r[3:0]};
      end
      assign p = r;
    end
  endgenerate
endmodule

// Sum of the shifted activations that the bits of a weight select; the top bit of a signed weight counts down.
// From the lowest bit up: a step adds to the upper bits of the sum so far and lets its lowest bit go.
module partial_sum #(
  parameter ACT_BITS = 8,
  parameter BITS = 4,
  parameter SIGNED = 1
) (
  input signed [ACT_BITS-1:0] x,
  input [BITS-1:0] w,
  output [BITS+ACT_BITS-1:0] sum
);
  genvar k;
  generate
    for (k = 0; k < BITS; k = k + 1) begin : step
      wire signed [ACT_BITS-1:0] term = x & {ACT_BITS{w[k]}};
      // Kept, so that synthesis leaves a chain of carries and does not make compressors of it, which are larger.
      (* keep *) wire signed [ACT_BITS:0] upper;
      if (k == 0) begin : first
        if (SIGNED != 0 && BITS == 1) assign upper = -term;
        else assign upper = term;
      end else begin : following
        wire signed [ACT_BITS-1:0] so_far = step[k-1].upper[ACT_BITS:1];
        if (SIGNED != 0 && k == BITS - 1) assign upper = so_far - term;
        else assign upper = so_far + term;
      end
      if (k < BITS - 1) assign sum[k] = upper[0];
      else assign sum[BITS+ACT_BITS-1:k] = upper;
    end
  endgenerate
endmodule
