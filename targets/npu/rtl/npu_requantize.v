// One lane of the requantization unit: from a 32-bit accumulator to an 8-bit output, one a cycle, five cycles later.
//
//     out = clip(((accumulator + bias) * multiplier + 2^(shift-1)) >> shift) + zero_point, lower, upper)
//
// The multiplier has at most 16 bits, so a product has at most 48 and a shift by more than 48 places leaves 0: the
// host writes 48 then.
module npu_requantize (
    input clk,
    input advance,  // the pipeline stands still without
    input signed [31:0] accumulator,
    input signed [31:0] bias,
    input [15:0] multiplier,
    input [5:0] shift,  // 1 to 48
    input signed [7:0] zero_point, lower, upper,
    output reg signed [7:0] out
);
    reg signed [31:0] value, sum;
    reg signed [49:0] product, rounded;
    wire signed [16:0] factor = {1'b0, multiplier};
    wire signed [49:0] half = 50'sd1 <<< (shift - 6'd1);
    wire signed [49:0] total = product + half;
    wire signed [49:0] moved = rounded + zero_point;
    always @(posedge clk) if (advance) begin
        value <= accumulator;
        sum <= value + bias;
        product <= sum * factor;
        rounded <= total >>> shift;
        out <= moved > upper ? upper : moved < lower ? lower : moved[7:0];
    end
endmodule
