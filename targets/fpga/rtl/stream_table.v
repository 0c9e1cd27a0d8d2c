// Any function of one 8-bit stream: a table of 256 entries a lane, addressed by the bit pattern.
module stream_table #(
  parameter LANES = 1,
  parameter TABLE_FILE = ""
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
  wire room;
  reg valid;
  wire [LANES*8-1:0] found;
  assign in_ready = room;
  wire go = in_valid & room;

  genvar k;
  generate
    for (k = 0; k < LANES; k = k + 1) begin : lane
      reg [7:0] entries [0:255];
      reg [7:0] entry;
      initial if (TABLE_FILE != "") $readmemh(TABLE_FILE, entries);
      always @(posedge clk) entry <= entries[in_data[k*8 +: 8]];
      assign found[k*8 +: 8] = entry;
    end
  endgenerate

  always @(posedge clk) valid <= go & ~rst;

  credit_fifo #(.WIDTH(LANES*8), .DEPTH(8), .BEATS(1)) results (
    .clk(clk), .rst(rst), .reserve(go), .room(room),
    .in_valid(valid), .in_data(found),
    .out_valid(out_valid), .out_ready(out_ready), .out_data(out_data)
  );
endmodule
