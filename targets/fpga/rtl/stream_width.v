// RATIO narrow transfers become one wide transfer, the first in the lowest bits.
module stream_widen #(
  parameter WIDTH = 8,
  parameter RATIO = 2
) (
  input clk,
  input rst,
  input in_valid,
  output in_ready,
  input [WIDTH-1:0] in_data,
  output reg out_valid,
  input out_ready,
  output reg [WIDTH*RATIO-1:0] out_data
);
  localparam CB = $clog2(RATIO);
  reg [CB-1:0] count;
  wire last = (count == RATIO - 1);
  assign in_ready = ~out_valid | out_ready;
  wire take = in_valid & in_ready;

  always @(posedge clk) begin
    // Shifted in from above, so that no place has to be selected.
    if (take) out_data <= {in_data, out_data[WIDTH*RATIO-1:WIDTH]};
    if (rst) begin
      count <= 0;
      out_valid <= 0;
    end else begin
      if (take) count <= last ? 0 : count + 1'b1;
      out_valid <= (take & last) | (out_valid & ~out_ready);
    end
  end
endmodule

// One wide transfer becomes RATIO narrow ones, the lowest bits first.
module stream_narrow #(
  parameter WIDTH = 8,
  parameter RATIO = 2
) (
  input clk,
  input rst,
  input in_valid,
  output in_ready,
  input [WIDTH*RATIO-1:0] in_data,
  output out_valid,
  input out_ready,
  output [WIDTH-1:0] out_data
);
  localparam CB = $clog2(RATIO + 1);
  reg [CB-1:0] left;
  reg [WIDTH*RATIO-1:0] word;
  assign out_valid = (left != 0);
  assign out_data = word[WIDTH-1:0];
  assign in_ready = (left == 0) | ((left == 1) & out_ready);

  always @(posedge clk) begin
    if (in_valid & in_ready) word <= in_data;
    else if (out_valid & out_ready) word <= word >> WIDTH;
    if (rst) left <= 0;
    else if (in_valid & in_ready) left <= RATIO;
    else if (out_valid & out_ready) left <= left - 1'b1;
  end
endmodule
