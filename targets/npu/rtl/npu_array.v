// The systolic arrays: a grid of multiply-accumulators that talk to their neighbours only.
//
// Both are fed on their edges, one word a cycle. Lane i of a word enters i cycles late (npu_skew), so that operands
// that belong together meet in every cell.

// Delays lane i of a word by i cycles, or, reversed, lane i by LANES-1-i cycles.
module npu_skew #(parameter LANES = 8, WIDTH = 8, REVERSED = 0) (
    input clk,
    input [LANES*WIDTH-1:0] in,
    output [LANES*WIDTH-1:0] out
);
    genvar lane, stage;
    generate
        for (lane = 0; lane < LANES; lane = lane + 1) begin : lanes
            localparam STAGES = REVERSED ? LANES - 1 - lane : lane;
            wire [WIDTH*(STAGES+1)-1:0] delayed;
            assign delayed[WIDTH-1:0] = in[lane*WIDTH +: WIDTH];
            for (stage = 0; stage < STAGES; stage = stage + 1) begin : stages
                reg [WIDTH-1:0] held;
                always @(posedge clk) held <= delayed[WIDTH*stage +: WIDTH];
                assign delayed[WIDTH*(stage+1) +: WIDTH] = held;
            end
            assign out[lane*WIDTH +: WIDTH] = delayed[WIDTH*STAGES +: WIDTH];
        end
    endgenerate
endmodule

// A cell that keeps its sum; activations move to the right, weights move down. Sums leave through the cell above.
module npu_output_stationary_cell #(parameter WEIGHT_BITS = 8) (
    input clk,
    input step, first, shift,
    input signed [7:0] activation,
    input signed [WEIGHT_BITS-1:0] weight,
    input signed [31:0] below,
    output reg step_right, first_right,
    output reg signed [7:0] activation_right,
    output reg signed [WEIGHT_BITS-1:0] weight_down,
    output reg signed [31:0] sum
);
    wire signed [WEIGHT_BITS+7:0] product = activation * weight;
    wire signed [31:0] so_far = first ? 32'sd0 : sum;
    always @(posedge clk) begin
        step_right <= step;
        first_right <= first;
        activation_right <= activation;
        weight_down <= weight;
        if (shift) sum <= below;
        else if (step) sum <= so_far + product;
    end
endmodule

// ROWS x COLUMNS sums. A word of ROWS activations and a word of COLUMNS weights are one step of the reduction.
// With `shift` the sums move up by one row a cycle; row 0 is visible at `top`.
module npu_output_stationary_array #(parameter ROWS = 8, COLUMNS = 8, WEIGHT_BITS = 8) (
    input clk,
    input step, first, shift,
    input [8*ROWS-1:0] activations,
    input [8*COLUMNS-1:0] weights,
    output [32*COLUMNS-1:0] top
);
    localparam ENTERING = 10;  // an activation, and whether it is a step and the first one
    wire [ENTERING*ROWS-1:0] entering, skewed;
    wire [8*COLUMNS-1:0] skewed_weights;
    npu_skew #(.LANES(ROWS), .WIDTH(ENTERING)) rows_skew (.clk(clk), .in(entering), .out(skewed));
    npu_skew #(.LANES(COLUMNS), .WIDTH(8)) columns_skew (.clk(clk), .in(weights), .out(skewed_weights));

    // Edges and cells as one grid: index [row][column] of what enters a cell from the left and from above.
    wire [(COLUMNS+1)*ROWS-1:0] steps, firsts;
    wire [8*(COLUMNS+1)*ROWS-1:0] moving_right;
    wire [WEIGHT_BITS*COLUMNS*(ROWS+1)-1:0] moving_down;
    wire [32*COLUMNS*(ROWS+1)-1:0] sums;
    genvar row, column;
    generate
        for (row = 0; row < ROWS; row = row + 1) begin : left
            localparam EDGE = row * (COLUMNS + 1);
            assign entering[ENTERING*row +: ENTERING] = {first, step, activations[8*row +: 8]};
            assign moving_right[8*EDGE +: 8] = skewed[ENTERING*row +: 8];
            assign steps[EDGE] = skewed[ENTERING*row + 8];
            assign firsts[EDGE] = skewed[ENTERING*row + 9];
        end
        for (column = 0; column < COLUMNS; column = column + 1) begin : above
            assign moving_down[WEIGHT_BITS*column +: WEIGHT_BITS] = skewed_weights[8*column +: WEIGHT_BITS];
            assign sums[32*(ROWS*COLUMNS+column) +: 32] = 32'd0;
        end
        for (row = 0; row < ROWS; row = row + 1) begin : rows
            for (column = 0; column < COLUMNS; column = column + 1) begin : columns
                localparam LEFT = row * (COLUMNS + 1) + column;
                localparam ABOVE = row * COLUMNS + column;
                localparam BELOW = ABOVE + COLUMNS;
                npu_output_stationary_cell #(.WEIGHT_BITS(WEIGHT_BITS)) cell_ (
                    .clk(clk), .shift(shift),
                    .step(steps[LEFT]), .first(firsts[LEFT]),
                    .step_right(steps[LEFT+1]), .first_right(firsts[LEFT+1]),
                    .activation(moving_right[8*LEFT +: 8]), .activation_right(moving_right[8*(LEFT+1) +: 8]),
                    .weight(moving_down[WEIGHT_BITS*ABOVE +: WEIGHT_BITS]),
                    .weight_down(moving_down[WEIGHT_BITS*BELOW +: WEIGHT_BITS]),
                    .below(sums[32*BELOW +: 32]), .sum(sums[32*ABOVE +: 32]));
            end
        end
    endgenerate
    assign top = sums[32*COLUMNS-1:0];
endmodule

// A cell that keeps its weight; activations move to the right, sums move down. Weights arrive through the cell above.
module npu_weight_stationary_cell #(parameter WEIGHT_BITS = 8) (
    input clk,
    input load,
    input signed [7:0] activation,
    input signed [WEIGHT_BITS-1:0] weight_above,
    input signed [31:0] sum_above,
    output reg signed [7:0] activation_right,
    output reg signed [WEIGHT_BITS-1:0] weight,
    output reg signed [31:0] sum
);
    wire signed [WEIGHT_BITS+7:0] product = activation * weight;
    always @(posedge clk) begin
        activation_right <= activation;
        if (load) weight <= weight_above;
        sum <= sum_above + product;
    end
endmodule

// ROWS x COLUMNS weights. A word of ROWS activations makes a word of COLUMNS sums over the rows, ROWS+COLUMNS-1
// cycles later. With `load` the weights move down by one row a cycle.
module npu_weight_stationary_array #(parameter ROWS = 8, COLUMNS = 8, WEIGHT_BITS = 8) (
    input clk,
    input load,
    input [8*ROWS-1:0] activations,
    input [8*COLUMNS-1:0] weights,
    output [32*COLUMNS-1:0] bottom
);
    wire [8*ROWS-1:0] skewed;
    npu_skew #(.LANES(ROWS), .WIDTH(8)) rows_skew (.clk(clk), .in(activations), .out(skewed));

    wire [8*(COLUMNS+1)*ROWS-1:0] moving_right;
    wire [WEIGHT_BITS*COLUMNS*(ROWS+1)-1:0] held;
    wire [32*COLUMNS*(ROWS+1)-1:0] sums;
    genvar row, column;
    generate
        for (row = 0; row < ROWS; row = row + 1) begin : left
            assign moving_right[8*row*(COLUMNS+1) +: 8] = skewed[8*row +: 8];
        end
        for (column = 0; column < COLUMNS; column = column + 1) begin : above
            assign held[WEIGHT_BITS*column +: WEIGHT_BITS] = weights[8*column +: WEIGHT_BITS];
            assign sums[32*column +: 32] = 32'd0;
        end
        for (row = 0; row < ROWS; row = row + 1) begin : rows
            for (column = 0; column < COLUMNS; column = column + 1) begin : columns
                localparam LEFT = row * (COLUMNS + 1) + column;
                localparam ABOVE = row * COLUMNS + column;
                localparam BELOW = ABOVE + COLUMNS;
                npu_weight_stationary_cell #(.WEIGHT_BITS(WEIGHT_BITS)) cell_ (
                    .clk(clk), .load(load),
                    .activation(moving_right[8*LEFT +: 8]), .activation_right(moving_right[8*(LEFT+1) +: 8]),
                    .weight_above(held[WEIGHT_BITS*ABOVE +: WEIGHT_BITS]),
                    .weight(held[WEIGHT_BITS*BELOW +: WEIGHT_BITS]),
                    .sum_above(sums[32*ABOVE +: 32]), .sum(sums[32*BELOW +: 32]));
            end
        end
    endgenerate
    npu_skew #(.LANES(COLUMNS), .WIDTH(32), .REVERSED(1)) columns_skew (
        .clk(clk), .in(sums[32*ROWS*COLUMNS +: 32*COLUMNS]), .out(bottom));
endmodule
