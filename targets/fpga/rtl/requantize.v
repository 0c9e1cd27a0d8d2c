// y = clip((acc * mult * 2**-(SHIFT_MIN + shift), half rounded up) + ZERO), five cycles later.
module requantize #(
  parameter ACC_BITS = 24,
  parameter MULT_BITS = 16,
  parameter SHIFT_MIN = 1,
  parameter SHIFT_BITS = 0,
  parameter ZERO = 0,
  parameter LOW = -128,
  parameter HIGH = 127
) (
  input clk,
  input signed [ACC_BITS-1:0] acc,
  input [MULT_BITS-1:0] mult,
  input [(SHIFT_BITS > 0 ? SHIFT_BITS : 1)-1:0] shift,
  output reg signed [7:0] y
);
  localparam PART = 17;                                       // what an 18-bit signed multiplier takes unsigned
  localparam HB = (ACC_BITS > PART + 1) ? ACC_BITS - PART : 0;  // bits of the upper part
  localparam PB = ACC_BITS + MULT_BITS + 1;
  localparam TB = PB - (SHIFT_MIN - 1) > 10 ? PB - (SHIFT_MIN - 1) : 10;
  localparam SB = (SHIFT_BITS > 0) ? SHIFT_BITS : 1;

  wire signed [MULT_BITS:0] m = {1'b0, mult};
  reg signed [PB-1:0] product;
  reg [SB-1:0] shift1, shift2;
  always @(posedge clk) begin
    shift1 <= shift;
    shift2 <= shift1;
  end

  generate
    if (HB > 0) begin : split
      wire signed [PART:0] low = {1'b0, acc[PART-1:0]};
      wire signed [HB-1:0] high = acc[ACC_BITS-1:PART];
      reg signed [PART+MULT_BITS:0] low_product;
      reg signed [HB+MULT_BITS:0] high_product;
      always @(posedge clk) begin
        low_product <= low * m;
        high_product <= high * m;
        product <= low_product + $signed({high_product, {PART{1'b0}}});
      end
    end else begin : whole
      reg signed [PB-1:0] early;
      always @(posedge clk) begin
        early <= acc * m;
        product <= early;
      end
    end
  endgenerate

  // One place less than the shift: the last place is lost only after half of it has been added.
  reg signed [TB-1:0] shifted;
  reg signed [TB-1:0] rounded;
  wire signed [PB-1:0] scaled = product >>> (SHIFT_MIN - 1);
  wire signed [TB-1:0] narrow = scaled;
  always @(posedge clk) begin
    shifted <= (SHIFT_BITS > 0) ? (narrow >>> shift2) : narrow;
    rounded <= (shifted + (2 * ZERO + 1)) >>> 1;
    y <= (rounded > HIGH) ? HIGH : (rounded < LOW) ? LOW : rounded;
  end
endmodule
