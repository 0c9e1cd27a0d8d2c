// One stream to COUNT readers; each takes a transfer when it likes, the next one comes when all have it.
module stream_fork #(
  parameter WIDTH = 8,
  parameter COUNT = 2
) (
  input clk,
  input rst,
  input in_valid,
  output in_ready,
  input [WIDTH-1:0] in_data,
  output [COUNT-1:0] out_valid,
  input [COUNT-1:0] out_ready,
  output [WIDTH*COUNT-1:0] out_data
);
  reg [COUNT-1:0] done;
  wire [COUNT-1:0] served = done | out_ready;
  assign out_valid = {COUNT{in_valid}} & ~done;
  assign out_data = {COUNT{in_data}};
  assign in_ready = &served;

  always @(posedge clk) begin
    if (rst | (in_valid & in_ready)) done <= 0;
    else if (in_valid) done <= served;
  end
endmodule
