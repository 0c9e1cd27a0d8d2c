"""Names of instances and wires made of names in models."""

from __future__ import annotations

import re

# Words that no instance may be called; see IEEE 1364-2005, annex B.
KEYWORDS = """
    always and assign automatic begin buf case casex casez cell config deassign default defparam design disable edge
    else end endcase endconfig endfunction endgenerate endmodule endprimitive endspecify endtable endtask event for
    force forever fork function generate genvar if ifnone incdir include initial inout input instance integer join
    large liblist library localparam macromodule medium module nand negedge nmos nor not notif0 notif1 or output
    parameter pmos posedge primitive pull0 pull1 pulldown pullup rcmos real realtime reg release repeat rnmos rpmos
    rtran scalared showcancelled signed small specify specparam strong0 strong1 supply0 supply1 table task time tran
    tri tri0 tri1 triand trior trireg unsigned use vectored wait wand weak0 weak1 while wire wor xnor xor
"""
RESERVED = frozenset(KEYWORDS.split())
LONGEST_NAME = 60


def identifier(name: str) -> str:
    """Return a Verilog identifier made of a name."""
    word = re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_")[:LONGEST_NAME] or "layer"
    return word if word[0].isalpha() and word not in RESERVED else f"n_{word}"
