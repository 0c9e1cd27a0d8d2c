// First-in first-out buffer with a registered output; one transfer a cycle in and out.
// A word written to an empty buffer shows at the output two cycles later.
module stream_fifo #(
  parameter WIDTH = 8,
  parameter DEPTH = 16
) (
  input clk,
  input rst,
  input in_valid,
  output in_ready,
  input [WIDTH-1:0] in_data,
  output reg out_valid,
  input out_ready,
  output reg [WIDTH-1:0] out_data
);
  localparam AB = (DEPTH > 1) ? $clog2(DEPTH) : 1;
  reg [WIDTH-1:0] words [0:DEPTH-1];
  reg [AB-1:0] head;       // next word to read
  reg [AB-1:0] tail;       // next place to write
  reg [AB:0] stored;       // words in the memory, the output register not counted
  reg full;
  reg some;

  assign in_ready = ~full;
  wire push = in_valid & ~full;
  wire fetch = some & (~out_valid | out_ready);
  wire [AB:0] stored_next = stored + {{AB{1'b0}}, push} - {{AB{1'b0}}, fetch};

  always @(posedge clk) begin
    if (push) words[tail] <= in_data;
    if (fetch) out_data <= words[head];
    if (rst) begin
      head <= 0;
      tail <= 0;
      stored <= 0;
      full <= 0;
      some <= 0;
      out_valid <= 0;
    end else begin
      if (push) tail <= (tail == DEPTH - 1) ? 0 : tail + 1'b1;
      if (fetch) head <= (head == DEPTH - 1) ? 0 : head + 1'b1;
      stored <= stored_next;
      full <= (stored_next == DEPTH);
      some <= (stored_next != 0);
      out_valid <= fetch | (out_valid & ~out_ready);
    end
  end
endmodule

// Output buffer of a pipeline that never stops: what enters the pipeline reserves its room first.
// ``room`` says that BEATS more words fit.
module credit_fifo #(
  parameter WIDTH = 8,
  parameter DEPTH = 16,
  parameter BEATS = 1
) (
  input clk,
  input rst,
  input reserve,           // BEATS words have entered the pipeline
  output reg room,
  input in_valid,
  input [WIDTH-1:0] in_data,
  output out_valid,
  input out_ready,
  output [WIDTH-1:0] out_data
);
  localparam CB = $clog2(DEPTH + 1);
  reg [CB-1:0] free;
  wire pop = out_valid & out_ready;
  wire [CB-1:0] taken = reserve ? BEATS : 0;
  wire [CB-1:0] free_next = free - taken + {{(CB-1){1'b0}}, pop};
  wire unused;

  always @(posedge clk) begin
    if (rst) begin
      free <= DEPTH;
      room <= 1;
    end else begin
      free <= free_next;
      room <= (free_next >= BEATS);
    end
  end

  stream_fifo #(.WIDTH(WIDTH), .DEPTH(DEPTH)) buffer (
    .clk(clk), .rst(rst),
    .in_valid(in_valid), .in_ready(unused), .in_data(in_data),
    .out_valid(out_valid), .out_ready(out_ready), .out_data(out_data)
  );
endmodule
