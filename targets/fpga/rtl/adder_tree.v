// Sum of COUNT signed terms, a register behind every second level: (levels + 1) / 2 cycles.
module adder_tree #(
  parameter COUNT = 1,
  parameter WIDTH = 16,
  parameter LEVELS = 0      // ceil(log2(COUNT))
) (
  input clk,
  input [COUNT*WIDTH-1:0] terms,
  output [WIDTH+LEVELS-1:0] sum
);
  genvar l, n;
  generate
    for (l = 0; l <= LEVELS; l = l + 1) begin : level
      localparam NODES = (COUNT + (1 << l) - 1) >> l;
      localparam BITS = WIDTH + l;
      wire [NODES*BITS-1:0] value;
      if (l == 0) begin : leaves
        assign value = terms;
      end else begin : inner
        localparam BELOW = (COUNT + (1 << (l - 1)) - 1) >> (l - 1);
        wire [NODES*BITS-1:0] sums;
        for (n = 0; n < NODES; n = n + 1) begin : node
          wire signed [BITS-2:0] a = level[l-1].value[2*n*(BITS-1) +: BITS-1];
          // Kept, so that synthesis does not make compressors of two levels, which are larger than carries.
          (* keep *) wire signed [BITS-1:0] total;
          if (2 * n + 1 < BELOW) begin : pair
            wire signed [BITS-2:0] b = level[l-1].value[(2*n+1)*(BITS-1) +: BITS-1];
            assign total = a + b;
          end else begin : single
            assign total = a;
          end
          assign sums[n*BITS +: BITS] = total;
        end
        if (l % 2 == 0 || l == LEVELS) begin : stage
          reg [NODES*BITS-1:0] r;
          always @(posedge clk) r <= sums;
          assign value = r;
        end else begin : through
          assign value = sums;
        end
      end
    end
  endgenerate
  assign sum = level[LEVELS].value;
endmodule
