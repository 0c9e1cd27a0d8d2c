// Serial port, 8 data bits, no parity, one stop bit; CYCLES clock cycles a bit. A byte that comes while the last one
// has not been taken is lost: 16 bytes are buffered.
module uart #(
  parameter CYCLES = 25
) (
  input clk,
  input rst,
  input rx,
  output reg tx,
  input in_valid,
  output in_ready,
  input [7:0] in_data,
  output out_valid,
  input out_ready,
  output [7:0] out_data
);
  localparam CB = $clog2(CYCLES + 1);

  // Sender: start bit, data from the lowest bit up, stop bit.
  reg [CB-1:0] tx_wait;
  reg [3:0] tx_left;
  reg [8:0] tx_bits;
  assign in_ready = (tx_left == 0);
  always @(posedge clk) begin
    if (rst) begin
      tx <= 1;
      tx_left <= 0;
      tx_wait <= 0;
    end else if (tx_left == 0) begin
      tx <= ~in_valid;
      tx_bits <= {1'b1, in_data};
      tx_wait <= CYCLES - 1;
      tx_left <= in_valid ? 4'd10 : 4'd0;
    end else if (tx_wait != 0) begin
      tx_wait <= tx_wait - 1'b1;
    end else begin
      tx <= tx_bits[0];
      tx_bits <= {1'b1, tx_bits[8:1]};
      tx_wait <= CYCLES - 1;
      tx_left <= tx_left - 1'b1;
    end
  end

  // Receiver: samples the middle of every bit.
  reg [2:0] line;
  reg [CB-1:0] rx_wait;
  reg [3:0] rx_left;
  reg [7:0] rx_bits;
  reg got;
  wire unused;
  always @(posedge clk) begin
    line <= {line[1:0], rx};
    got <= 0;
    if (rst) begin
      line <= 3'b111;
      rx_left <= 0;
      rx_wait <= 0;
    end else if (rx_left == 0) begin
      if (~line[2]) begin
        rx_left <= 10;
        rx_wait <= CYCLES / 2;
      end
    end else if (rx_wait != 0) begin
      rx_wait <= rx_wait - 1'b1;
    end else begin
      rx_wait <= CYCLES - 1;
      rx_left <= rx_left - 1'b1;
      if (rx_left == 10 && line[2]) rx_left <= 0;       // no start bit after all
      if (rx_left < 10 && rx_left > 1) rx_bits <= {line[2], rx_bits[7:1]};
      if (rx_left == 1) got <= line[2];
    end
  end
  stream_fifo #(.WIDTH(8), .DEPTH(16)) received (
    .clk(clk), .rst(rst), .in_valid(got), .in_ready(unused), .in_data(rx_bits),
    .out_valid(out_valid), .out_ready(out_ready), .out_data(out_data)
  );
endmodule
