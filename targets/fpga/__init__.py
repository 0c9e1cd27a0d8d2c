"""FPGAs: one streaming engine a layer, generated as Verilog."""
