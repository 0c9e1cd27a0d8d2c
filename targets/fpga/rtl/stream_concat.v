// Channels of two streams, pixel by pixel: FIRST transfers of a, then SECOND of b.
module stream_concat #(
  parameter LANES = 1,
  parameter FIRST = 1,
  parameter SECOND = 1
) (
  input clk,
  input rst,
  input a_valid,
  output a_ready,
  input [LANES*8-1:0] a_data,
  input b_valid,
  output b_ready,
  input [LANES*8-1:0] b_data,
  output out_valid,
  input out_ready,
  output [LANES*8-1:0] out_data
);
  localparam CB = $clog2(FIRST + SECOND);
  reg [CB-1:0] count;
  wire second = (count >= FIRST);
  assign out_valid = second ? b_valid : a_valid;
  assign out_data = second ? b_data : a_data;
  assign a_ready = ~second & out_ready;
  assign b_ready = second & out_ready;

  always @(posedge clk) begin
    if (rst) count <= 0;
    else if (out_valid & out_ready) count <= (count == FIRST + SECOND - 1) ? 0 : count + 1'b1;
  end
endmodule
