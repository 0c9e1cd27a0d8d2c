// Largest of TAPS transfers, lane by lane.
module pool_maximum #(
  parameter LANES = 1,
  parameter TAPS = 4
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
  localparam TB = (TAPS > 1) ? $clog2(TAPS) : 1;
  reg [TB-1:0] tap;
  reg finished;
  wire room;
  wire last = (tap == TAPS - 1);
  assign in_ready = ~last | room;
  wire go = in_valid & in_ready;
  wire [LANES*8-1:0] best;

  genvar k;
  generate
    for (k = 0; k < LANES; k = k + 1) begin : lane
      wire signed [7:0] x = in_data[k*8 +: 8];
      reg signed [7:0] most;
      always @(posedge clk) if (go & ((tap == 0) | (x > most))) most <= x;
      assign best[k*8 +: 8] = most;
    end
  endgenerate

  always @(posedge clk) begin
    finished <= go & last & ~rst;
    if (rst) tap <= 0;
    else if (go) tap <= last ? 0 : tap + 1'b1;
  end

  credit_fifo #(.WIDTH(LANES*8), .DEPTH(8), .BEATS(1)) results (
    .clk(clk), .rst(rst), .reserve(go & last), .room(room),
    .in_valid(finished), .in_data(best),
    .out_valid(out_valid), .out_ready(out_ready), .out_data(out_data)
  );
endmodule
