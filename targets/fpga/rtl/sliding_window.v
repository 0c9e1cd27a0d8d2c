// An image, channels last and row by row, becomes the pixels under every position of a KH x KW kernel.
// A ring of ROWS rows: rows come in as long as one is free, windows go out as soon as their rows are there. What every
// output row waits for and gives back stands in ROW_FILE: {rows that the next output row needs more, rows released}.
module sliding_window #(
  parameter LANES = 1,
  parameter ACT_BITS = 8,         // bits that are kept of a byte; the upper ones repeat the sign
  parameter GROUPS = 1,           // transfers of a pixel
  parameter H = 8,
  parameter W = 8,
  parameter KH = 3,
  parameter KW = 3,
  parameter SH = 1,
  parameter SW = 1,
  parameter TOP = 1,
  parameter LEFT = 1,
  parameter OH = 8,
  parameter OW = 8,
  parameter ROWS = 4,
  parameter NEED = 2,             // rows that the first output row needs
  parameter FILL = 0,             // the integer outside the image
  parameter TAPS_INSIDE = 0,      // 0: channels of a tap follow each other; 1: taps of a group of channels
  parameter ROW_FILE = ""
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
  localparam ROW = W * GROUPS;               // transfers of a row
  localparam TOTAL = ROWS * ROW;
  localparam AB = (TOTAL > 1) ? $clog2(TOTAL) : 1;
  localparam CB = (ROW > 1) ? $clog2(ROW) : 1;
  localparam NB = $clog2(H + ROWS + 1) + 2;  // signed counts of rows
  localparam SB = $clog2((W + KW + SW + LEFT) * GROUPS + 1) + 2;  // signed places in a row
  localparam YB = $clog2(H + KH + SH + TOP + 1) + 2;
  localparam GB = (GROUPS > 1) ? $clog2(GROUPS) : 1;
  localparam KXB = (KW > 1) ? $clog2(KW) : 1;
  localparam KYB = (KH > 1) ? $clog2(KH) : 1;
  localparam OXB = (OW > 1) ? $clog2(OW) : 1;
  localparam OYB = (OH > 1) ? $clog2(OH) : 1;
  localparam SETTLE = (OW * KH * KW * GROUPS < 2);
  // Steps of addresses in the ring, all below TOTAL.
  localparam [AB:0] DOWN = (SH % ROWS) * ROW;
  localparam [AB:0] FRAME = (H % ROWS) * ROW;
  localparam [AB:0] START = ((ROWS - TOP % ROWS) % ROWS) * ROW;
  localparam [AB:0] FRAME_START = ((H + ROWS - TOP % ROWS) % ROWS) * ROW;

  function [AB-1:0] ahead;        // (base + step) mod TOTAL
    input [AB-1:0] base;
    input [AB:0] step;
    reg [AB:0] sum;
    begin
      sum = {1'b0, base} + step;
      ahead = (sum >= TOTAL) ? sum - TOTAL : sum;
    end
  endfunction

  reg [31:0] row_plan [0:OH-1];
  initial if (ROW_FILE != "") $readmemh(ROW_FILE, row_plan);
  reg [31:0] plan;
  wire signed [NB-1:0] more = plan[16 +: NB];
  wire signed [NB-1:0] released = plan[0 +: NB];

  // Rows in.
  reg [AB-1:0] write_address;
  reg [CB-1:0] write_column;
  reg signed [NB-1:0] stored;     // whole rows in the ring
  reg signed [NB-1:0] missing;    // rows that the current output row still waits for
  reg blocked, starved, settled;
  assign in_ready = ~blocked;
  wire take = in_valid & ~blocked;
  wire wrote = take & (write_column == ROW - 1);

  // Windows out.
  reg [GB-1:0] g;
  reg [KXB-1:0] kx;
  reg [KYB-1:0] ky;
  reg [OXB-1:0] ox;
  reg [OYB-1:0] oy;
  wire g_end = (g == GROUPS - 1);
  wire kx_end = (kx == KW - 1);
  wire ky_end = (ky == KH - 1);
  wire ox_end = (ox == OW - 1);
  wire oy_end = (oy == OH - 1);
  wire room;
  wire go = room & ~starved & settled;
  wire window_end = go & g_end & kx_end & ky_end;
  wire row_end = window_end & ox_end;

  // Whether a row was written and whether one ends is known late: all four outcomes are computed before.
  wire signed [NB-1:0] stored_behind = stored - released;
  wire signed [NB-1:0] missing_behind = missing + more;
  wire signed [NB-1:0] stored_base = row_end ? stored_behind : stored;
  wire signed [NB-1:0] missing_base = row_end ? missing_behind : missing;
  // Both sides are signed, so that the comparisons are.
  wire full = row_end ? (stored_behind >= $signed(ROWS)) : (stored >= $signed(ROWS));
  wire full_with = row_end ? (stored_behind >= $signed(ROWS - 1)) : (stored >= $signed(ROWS - 1));
  wire short = row_end ? (missing_behind > 0) : (missing > 0);
  wire short_with = row_end ? (missing_behind > 1) : (missing > 1);
  always @(posedge clk) begin
    plan <= row_plan[oy];
    if (rst) begin
      stored <= 0;
      missing <= NEED;
      blocked <= 0;
      starved <= 1;
      settled <= 0;
      write_address <= 0;
      write_column <= 0;
    end else begin
      stored <= wrote ? stored_base + 1 : stored_base;
      missing <= wrote ? missing_base - 1 : missing_base;
      blocked <= wrote ? full_with : full;
      starved <= wrote ? short_with : short;
      settled <= ~(row_end & SETTLE);
      if (take) begin
        write_address <= (write_address == TOTAL - 1) ? 0 : write_address + 1'b1;
        write_column <= (write_column == ROW - 1) ? 0 : write_column + 1'b1;
      end
    end
  end

  // Place of the window and of the tap in it: signed where they may lie outside the image.
  reg [AB-1:0] frame_base;                   // ring address of row 0
  reg [AB-1:0] top_base;                     // of the window's first row
  reg [AB-1:0] base;                         // of the tap's row
  reg signed [YB-1:0] top, row;
  reg signed [SB-1:0] left, column;          // in pixels
  reg signed [SB-1:0] left_place, place;     // in transfers
  wire [AB-1:0] base_below = ahead(base, ROW);
  wire [AB-1:0] top_base_next = oy_end ? ahead(frame_base, FRAME_START) : ahead(top_base, DOWN);
  wire signed [YB-1:0] top_next = oy_end ? -TOP : top + SH;
  wire signed [SB-1:0] left_next = ox_end ? -LEFT : left + SW;
  wire signed [SB-1:0] left_place_next = ox_end ? -LEFT * GROUPS : left_place + SW * GROUPS;
  wire signed [SB-1:0] group_place = left_place + $signed({1'b0, g});

  always @(posedge clk) begin
    if (rst) begin
      g <= 0;
      kx <= 0;
      ky <= 0;
      ox <= 0;
      oy <= 0;
      frame_base <= 0;
      top_base <= START;
      base <= START;
      top <= -TOP;
      row <= -TOP;
      left <= -LEFT;
      column <= -LEFT;
      left_place <= -LEFT * GROUPS;
      place <= -LEFT * GROUPS;
    end else if (window_end) begin
      g <= 0;
      kx <= 0;
      ky <= 0;
      ox <= ox_end ? 0 : ox + 1'b1;
      left <= left_next;
      column <= left_next;
      left_place <= left_place_next;
      place <= left_place_next;
      if (ox_end) begin
        oy <= oy_end ? 0 : oy + 1'b1;
        top <= top_next;
        row <= top_next;
        top_base <= top_base_next;
        base <= top_base_next;
        if (oy_end) frame_base <= ahead(frame_base, FRAME);
      end else begin
        row <= top;
        base <= top_base;
      end
    end else if (go) begin
      if (TAPS_INSIDE != 0) begin
        kx <= kx_end ? 0 : kx + 1'b1;
        column <= kx_end ? left : column + 1;
        if (~kx_end) place <= place + GROUPS;
        else if (~ky_end) place <= group_place;
        else place <= group_place + 1;
        if (kx_end) begin
          ky <= ky_end ? 0 : ky + 1'b1;
          row <= ky_end ? top : row + 1;
          base <= ky_end ? top_base : base_below;
          if (ky_end) g <= g + 1'b1;
        end
      end else begin
        g <= g_end ? 0 : g + 1'b1;
        place <= (g_end & kx_end) ? left_place : place + 1;
        if (g_end) begin
          kx <= kx_end ? 0 : kx + 1'b1;
          column <= kx_end ? left : column + 1;
          if (kx_end) begin
            ky <= ky + 1'b1;
            row <= row + 1;
            base <= base_below;
          end
        end
      end
    end
  end

  // The ring's memory: address, data, and the fill outside the image.
  reg [LANES*ACT_BITS-1:0] ring [0:TOTAL-1];
  reg [AB-1:0] read_address;
  reg [LANES*ACT_BITS-1:0] found;
  reg [2:0] valid;
  reg outside1, outside2;
  reg [LANES*ACT_BITS-1:0] pixel;
  wire [LANES*ACT_BITS-1:0] given, windowed;
  wire signed [ACT_BITS-1:0] fill = FILL;
  wire row_outside = row[YB-1] | (row >= $signed(H));
  wire column_outside = column[SB-1] | (column >= $signed(W));
  always @(posedge clk) begin
    if (take) ring[write_address] <= given;
    read_address <= (row_outside | column_outside) ? 0 : base + place[SB-1:0];
    outside1 <= row_outside | column_outside;
    found <= ring[read_address];
    outside2 <= outside1;
    pixel <= outside2 ? {LANES{fill}} : found;
    valid <= rst ? 3'd0 : {valid[1:0], go};
  end

  credit_fifo #(.WIDTH(LANES*ACT_BITS), .DEPTH(16), .BEATS(1)) windows (
    .clk(clk), .rst(rst), .reserve(go), .room(room),
    .in_valid(valid[2]), .in_data(pixel),
    .out_valid(out_valid), .out_ready(out_ready), .out_data(windowed)
  );
  genvar k;
  generate
    for (k = 0; k < LANES; k = k + 1) begin : lane
      wire signed [ACT_BITS-1:0] narrow = windowed[k*ACT_BITS +: ACT_BITS];
      wire signed [7:0] wide = narrow;
      assign given[k*ACT_BITS +: ACT_BITS] = in_data[k*8 +: ACT_BITS];
      assign out_data[k*8 +: 8] = wide;
    end
  endgenerate
endmodule
