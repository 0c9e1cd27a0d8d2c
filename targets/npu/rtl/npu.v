// A systolic accelerator: three buffers around an array of multiply-accumulators, and three units that work side by
// side on commands given one after the other.
//
//   load   writes words from the host into the activation or the weight buffer, or a slot of channel parameters;
//   tile   streams words through the array and adds what comes out to the accumulator buffer;
//   store  requantizes rows of the accumulator buffer and hands them to the host.
//
// A command is taken when its unit is idle and nobody uses the half of a buffer that it needs; until then
// command_ready stays low. So a host that alternates between the halves overlaps loading, computing and storing, and
// one that does not still computes the same. What a command takes, counted from the cycle in which it is taken to the
// first cycle in which its unit can take another:
//
//   load                                             count + 1
//   tile, output stationary (count steps)            count + rows + ROWS + COLUMNS
//   tile, weight stationary (count activations)      (reload ? ROWS : 0) + count + ROWS + COLUMNS + 1
//   store (rows)                                     rows + 6
//
// Word of the activation buffer: ROWS bytes. Output stationary: one reduction index of ROWS outputs' rows. Weight
// stationary: ROWS reduction indices of one output row. Word of the weight buffer: one reduction index of COLUMNS
// output channels. Word of the accumulator buffer: one output row of COLUMNS channels.
module npu #(
    parameter ROWS = 8, COLUMNS = 8, WEIGHT_BITS = 8, WEIGHT_STATIONARY = 0,
    parameter ACTIVATION_WORDS = 1024, WEIGHT_WORDS = 1024, ACCUMULATOR_WORDS = 256,
    parameter LANES = ROWS > COLUMNS ? ROWS : COLUMNS
) (
    input clk, reset,

    input command_valid,
    output command_ready,
    input [2:0] opcode,
    input [15:0] address,              // what is loaded; activations of a tile; accumulators to store
    input [15:0] weight_address,       // tile
    input [15:0] accumulator_address,  // tile
    input [15:0] count,                // load: words. tile: words of activations
    input [15:0] rows,                 // output stationary tile, store: output rows
    input accumulate,                  // tile: add to the accumulator buffer instead of overwriting it
    input reload,                      // weight stationary tile: move the weights into the array first
    input slot,                        // parameters that are loaded, or used by a store
    input signed [7:0] zero_point, lower, upper,  // store

    input in_valid,
    output in_ready,
    input [8*LANES-1:0] in_data,

    output out_valid,
    input out_ready,
    output [8*COLUMNS-1:0] out_data,

    output idle
);
    localparam [2:0] LOAD_ACTIVATIONS = 0, LOAD_WEIGHTS = 1, LOAD_PARAMETERS = 2, TILE = 3, STORE = 4;
    localparam PARAMETER_WORDS = 7;  // bytes of a channel: bias (4), multiplier (2), shift (1)
    localparam STORE_STAGES = 5;

    // ---- which halves of a buffer a range of words lies in
    function [1:0] halves(input [15:0] first, input [15:0] length, input [15:0] half);
        halves = {{1'b0, first} + {1'b0, length} > {1'b0, half}, first < half};
    endfunction

    localparam [15:0] ACTIVATION_HALF = ACTIVATION_WORDS / 2, WEIGHT_HALF = WEIGHT_WORDS / 2;
    localparam [15:0] ACCUMULATOR_HALF = ACCUMULATOR_WORDS / 2;
    wire [15:0] weights_used = WEIGHT_STATIONARY ? (reload ? ROWS : 0) : count;
    wire [15:0] rows_written = WEIGHT_STATIONARY ? count : rows;
    wire [1:0] needs_activations = opcode == TILE || opcode == LOAD_ACTIVATIONS ? halves(address, count, ACTIVATION_HALF) : 2'b00;
    wire [1:0] needs_weights = opcode == TILE ? (weights_used == 0 ? 2'b00 : halves(weight_address, weights_used, WEIGHT_HALF))
                             : opcode == LOAD_WEIGHTS ? halves(address, count, WEIGHT_HALF) : 2'b00;
    wire [1:0] needs_accumulators = opcode == TILE ? halves(accumulator_address, rows_written, ACCUMULATOR_HALF)
                                  : opcode == STORE ? halves(address, rows, ACCUMULATOR_HALF) : 2'b00;
    wire [1:0] needs_parameters = opcode == STORE || opcode == LOAD_PARAMETERS ? 2'b01 << slot : 2'b00;

    reg loading, computing, storing;
    reg [1:0] load_activations, load_weights, load_parameters;      // what the units use while they are busy
    reg [1:0] tile_activations, tile_weights, tile_accumulators;
    reg [1:0] store_accumulators, store_parameters;

    wire is_load = opcode == LOAD_ACTIVATIONS || opcode == LOAD_WEIGHTS || opcode == LOAD_PARAMETERS;
    wire load_waits = loading
        || (computing && ((needs_activations & tile_activations) != 0 || (needs_weights & tile_weights) != 0))
        || (storing && (needs_parameters & store_parameters) != 0);
    wire tile_waits = computing
        || (loading && ((needs_activations & load_activations) != 0 || (needs_weights & load_weights) != 0))
        || (storing && (needs_accumulators & store_accumulators) != 0);
    wire store_waits = storing
        || (computing && (needs_accumulators & tile_accumulators) != 0)
        || (loading && (needs_parameters & load_parameters) != 0);
    assign command_ready = is_load ? !load_waits : opcode == TILE ? !tile_waits : !store_waits;
    assign idle = !loading && !computing && !storing;

    wire taken = command_valid && command_ready;
    wire load_taken = taken && is_load;
    wire tile_taken = taken && opcode == TILE;
    wire store_taken = taken && opcode == STORE;

    // ---- load
    reg [2:0] load_opcode;
    reg [15:0] load_address, load_left;
    reg load_slot;
    assign in_ready = loading;
    wire word = loading && in_valid;
    reg [8*ROWS-1:0] activation_memory [0:ACTIVATION_WORDS-1];
    reg [8*COLUMNS-1:0] weight_memory [0:WEIGHT_WORDS-1];
    reg [8*COLUMNS-1:0] parameter_memory [0:2*PARAMETER_WORDS-1];
    always @(posedge clk) begin
        if (word && load_opcode == LOAD_ACTIVATIONS) activation_memory[load_address] <= in_data[8*ROWS-1:0];
        if (word && load_opcode == LOAD_WEIGHTS) weight_memory[load_address] <= in_data[8*COLUMNS-1:0];
        if (word && load_opcode == LOAD_PARAMETERS)
            parameter_memory[(load_slot ? PARAMETER_WORDS : 0) + load_address] <= in_data[8*COLUMNS-1:0];
        if (word) begin
            load_address <= load_address + 1;
            load_left <= load_left - 1;
            if (load_left == 1) loading <= 0;
        end
        if (load_taken) begin
            loading <= 1;
            load_opcode <= opcode;
            load_address <= opcode == LOAD_PARAMETERS ? 0 : address;
            load_left <= opcode == LOAD_PARAMETERS ? PARAMETER_WORDS : count;
            load_slot <= slot;
            load_activations <= needs_activations;
            load_weights <= needs_weights;
            load_parameters <= needs_parameters;
        end
        if (reset) loading <= 0;
    end

    // ---- tile: a clock counts from the cycle after the command; everything else follows from it
    reg [17:0] clock;
    reg [15:0] tile_address, tile_weight_address, tile_accumulator_address, tile_count, tile_rows;
    reg tile_accumulate, tile_reload;
    wire [17:0] preload = WEIGHT_STATIONARY && tile_reload ? ROWS : 0;
    // The first row of results can be written in this cycle.
    wire [17:0] first_result = WEIGHT_STATIONARY ? preload + ROWS + COLUMNS : tile_count + ROWS + COLUMNS - 1;
    wire [17:0] results = WEIGHT_STATIONARY ? tile_count : tile_rows;
    wire reads_activations = computing && clock >= preload && clock < preload + tile_count;
    wire reads_weights = computing && (WEIGHT_STATIONARY ? clock < preload : clock < tile_count);
    wire writes = computing && clock >= first_result;
    wire [17:0] activation_index = tile_address + clock - preload;
    wire [17:0] weight_index = WEIGHT_STATIONARY ? tile_weight_address + ROWS - 1 - clock : tile_weight_address + clock;
    wire [17:0] row_index = tile_accumulator_address + clock - first_result;

    reg [8*ROWS-1:0] activations;
    reg [8*COLUMNS-1:0] weights;
    reg activations_valid, weights_valid, first_step;
    wire [32*COLUMNS-1:0] result;
    reg [32*COLUMNS-1:0] accumulator_memory [0:ACCUMULATOR_WORDS-1];
    reg [32*COLUMNS-1:0] old;
    wire [32*COLUMNS-1:0] updated;
    always @(posedge clk) begin
        activations <= activation_memory[activation_index[15:0]];
        weights <= weight_memory[weight_index[15:0]];
        activations_valid <= reads_activations;
        weights_valid <= reads_weights;
        first_step <= clock == 0;
        old <= accumulator_memory[row_index[15:0] + 16'd1];  // of the row that is written in the next cycle
        if (writes) accumulator_memory[row_index[15:0]] <= updated;
        clock <= clock + 1;
        if (computing && clock == first_result + results - 1) computing <= 0;
        if (tile_taken) begin
            computing <= 1;
            clock <= 0;
            tile_address <= address;
            tile_weight_address <= weight_address;
            tile_accumulator_address <= accumulator_address;
            tile_count <= count;
            tile_rows <= rows;
            tile_accumulate <= accumulate;
            tile_reload <= reload;
            tile_activations <= needs_activations;
            tile_weights <= needs_weights;
            tile_accumulators <= needs_accumulators;
        end
        if (reset) computing <= 0;
    end

    genvar column;
    generate
        if (WEIGHT_STATIONARY) begin : array
            npu_weight_stationary_array #(.ROWS(ROWS), .COLUMNS(COLUMNS), .WEIGHT_BITS(WEIGHT_BITS)) cells (
                .clk(clk), .load(weights_valid), .activations(activations), .weights(weights), .bottom(result));
        end else begin : array
            npu_output_stationary_array #(.ROWS(ROWS), .COLUMNS(COLUMNS), .WEIGHT_BITS(WEIGHT_BITS)) cells (
                .clk(clk), .step(activations_valid), .first(first_step), .shift(writes),
                .activations(activations), .weights(weights), .top(result));
        end
        for (column = 0; column < COLUMNS; column = column + 1) begin : sums
            assign updated[32*column +: 32] =
                (tile_accumulate ? old[32*column +: 32] : 32'd0) + result[32*column +: 32];
        end
    endgenerate

    // ---- store
    reg [15:0] store_address, store_left;
    reg [STORE_STAGES-1:0] in_flight;  // which stages of the pipeline hold a row
    reg store_slot;
    reg signed [7:0] store_zero_point, store_lower, store_upper;
    assign out_valid = in_flight[STORE_STAGES-1];
    wire advance = !out_valid || out_ready;
    wire [32*COLUMNS-1:0] stored = accumulator_memory[store_address];
    wire issue = storing && store_left != 0;
    always @(posedge clk) begin
        if (advance) begin
            in_flight <= {in_flight[STORE_STAGES-2:0], issue};
            if (issue) begin
                store_address <= store_address + 1;
                store_left <= store_left - 1;
            end
            if (storing && store_left == 0 && in_flight[STORE_STAGES-2:0] == 0) storing <= 0;
        end
        if (store_taken) begin
            storing <= 1;
            store_address <= address;
            store_left <= rows;
            store_slot <= slot;
            store_zero_point <= zero_point;
            store_lower <= lower;
            store_upper <= upper;
            store_accumulators <= needs_accumulators;
            store_parameters <= needs_parameters;
        end
        if (reset) begin
            storing <= 0;
            in_flight <= 0;
        end
    end

    // Byte b of all channels' parameters is one word, so that they come in through the same port.
    wire [8*COLUMNS*PARAMETER_WORDS-1:0] parameters;
    genvar plane;
    generate
        for (plane = 0; plane < PARAMETER_WORDS; plane = plane + 1) begin : planes
            assign parameters[8*COLUMNS*plane +: 8*COLUMNS] =
                parameter_memory[(store_slot ? PARAMETER_WORDS : 0) + plane];
        end
        for (column = 0; column < COLUMNS; column = column + 1) begin : lanes
            wire [8*PARAMETER_WORDS-1:0] own;
            for (plane = 0; plane < PARAMETER_WORDS; plane = plane + 1) begin : bytes
                assign own[8*plane +: 8] = parameters[8*COLUMNS*plane + 8*column +: 8];
            end
            npu_requantize lane (
                .clk(clk), .advance(advance),
                .accumulator(stored[32*column +: 32]), .bias(own[31:0]), .multiplier(own[47:32]), .shift(own[53:48]),
                .zero_point(store_zero_point), .lower(store_lower), .upper(store_upper),
                .out(out_data[8*column +: 8]));
        end
    endgenerate
endmodule
