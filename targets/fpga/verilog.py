"""The top level of a circuit as Verilog text: one instance an engine, a comment with the node it came from."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from textwrap import fill

from bitwright.targets.fpga.network import Engine, Network, Stream

RTL_FILES = (
    "adder_tree.v",
    "depthwise.v",
    "drain.v",
    "matrix_vector.v",
    "multiply.v",
    "pool_global_average.v",
    "pool_maximum.v",
    "requantize.v",
    "sliding_window.v",
    "stream_add.v",
    "stream_concat.v",
    "stream_fifo.v",
    "stream_fork.v",
    "stream_table.v",
    "stream_width.v",
    "uart.v",
)
NETWORK = "network"
TOP = "bitwright_axis"
MEMORY_FOLDER = "memory"
LINE = 112
# Defined, the network also shows its inner streams, for simulation.
TAPS = "BITWRIGHT_TAPS"


def rtl_sources() -> dict[str, str]:
    """Return the text of every module file by name."""
    folder = files("bitwright.targets.fpga").joinpath("rtl")
    return {name: folder.joinpath(name).read_text("utf-8") for name in RTL_FILES}


def tapped_streams(network: Network) -> tuple[Stream, ...]:
    """Return the streams that simulation records: every layer's inputs and its result."""
    wanted: dict[str, None] = {}
    for engine in network.engines:
        if engine.step is not None:
            wanted |= dict.fromkeys((*_layer_inputs(network, engine), *engine.outputs))
    return tuple(network.streams[name] for name in wanted)


def layer_inputs(network: Network, engine: Engine) -> tuple[str, ...]:
    """Return the streams that carry the operands of the layer whose last engine this is."""
    return _layer_inputs(network, engine)


def _layer_inputs(network: Network, engine: Engine) -> tuple[str, ...]:
    """Step back over the layer's own sliding window."""
    (first, *_) = engine.inputs
    if network.streams[first].tensor:
        return engine.inputs
    return next(before.inputs for before in network.engines if first in before.outputs)


def network_text(network: Network, title: str) -> str:
    """Return the module that joins all engines.

    Args:
        network: The network.
        title: What it computes, for the first line.
    """
    taps = tapped_streams(network)
    source, result = network.streams[network.input], network.streams[network.output]
    lines = [
        f"// {title}: {len(network.engines)} engines; a new frame every {network.interval} cycles.",
        f"// In: {_words(source)}.",
        f"// Out: {_words(result)}.",
        f"module {NETWORK} (",
        "  input clk,",
        "  input rst,",
        "  input in_valid,",
        "  output in_ready,",
        f"  input [{_width(source) - 1}:0] in_data,",
        "  output out_valid,",
        "  input out_ready,",
        f"  output [{_width(result) - 1}:0] out_data",
        f"`ifdef {TAPS}",
        *(f"  , output [{_width(tap)}:0] tap_{k}" for k, tap in enumerate(taps)),
        "`endif",
        ");",
        *(_wires(stream) for stream in network.streams.values()),
        *_assignments(network),
        f"`ifdef {TAPS}",
        *(
            f"  assign tap_{k} = {{{tap.name}_valid & {tap.name}_ready, {tap.name}_data}};"
            for k, tap in enumerate(taps)
        ),
        "`endif",
    ]
    lines += [_instance(network, engine) for engine in network.engines]
    return "\n".join((*lines, "endmodule", ""))


def _words(stream: Stream) -> str:
    pixels = f"{stream.positions} x {stream.channels}"
    return f"{pixels} elements of {stream.bits} bits, channels last, {stream.lanes} side by side"


def _width(stream: Stream) -> int:
    return stream.lanes * stream.bits


def _wires(stream: Stream) -> str:
    width = _width(stream)
    return f"  wire {stream.name}_valid, {stream.name}_ready; wire [{width - 1}:0] {stream.name}_data;"


def _assignments(network: Network) -> tuple[str, ...]:
    source, result = network.input, network.output
    return (
        f"  assign {source}_valid = in_valid;",
        f"  assign {source}_data = in_data;",
        f"  assign in_ready = {source}_ready;",
        f"  assign out_valid = {result}_valid;",
        f"  assign out_data = {result}_data;",
        f"  assign {result}_ready = out_ready;",
    )


def memory_file(engine: Engine, parameter: str) -> str:
    """Return the name of the file of one of an engine's memories, relative to the circuit's folder."""
    return f"{MEMORY_FOLDER}/{engine.name}.{parameter.removesuffix('_FILE').lower()}.hex"


def memory_texts(network: Network) -> dict[str, str]:
    """Return the content of every memory file by name."""
    return {
        memory_file(engine, parameter): content().hex_text()
        for engine in network.engines
        for parameter, content in engine.memories.items()
    }


def _instance(network: Network, engine: Engine) -> str:
    values: Mapping[str, int | str] = {
        **engine.parameters,
        **{parameter: f'"{memory_file(engine, parameter)}"' for parameter in engine.memories},
    }
    parameters = ", ".join(f".{name}({value})" for name, value in values.items())
    ports = ", ".join(f".{port}({wire})" for port, wire in _ports(network, engine))
    note = f": {engine.note}" if engine.note else ""
    return "\n".join(
        (
            f"\n  // {_comment(engine.node)}{note}; {engine.cycles} cycles a frame",
            f"  {engine.module} #(",
            _wrapped(parameters),
            f"  ) {engine.name} (",
            _wrapped(f".clk(clk), .rst(rst), {ports}"),
            "  );",
        )
    )


def _wrapped(text: str) -> str:
    indent = " " * 4
    return fill(
        text,
        LINE,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _comment(text: str) -> str:
    """Keep names from a model within one comment."""
    return "".join(c if c.isprintable() else "?" for c in text).replace("\\", "/")


def _ports(network: Network, engine: Engine) -> list[tuple[str, str]]:
    del network
    found: list[tuple[str, str]] = []
    heads = ("in",) if len(engine.inputs) == 1 else ("a", "b")
    for head, name in zip(heads, engine.inputs, strict=True):
        found += [(f"{head}_{part}", f"{name}_{part}") for part in ("valid", "ready", "data")]
    for part in ("valid", "ready", "data"):
        # The last reader in the highest bits.
        wires = ", ".join(f"{name}_{part}" for name in reversed(engine.outputs))
        found.append((f"out_{part}", wires if len(engine.outputs) == 1 else f"{{{wires}}}"))
    return found


def axis_text(network: Network) -> str:
    """Return the AXI-stream top level around the network."""
    source, result = network.streams[network.input], network.streams[network.output]
    beats = result.beats
    bits = max(1, (beats - 1).bit_length())
    return f"""// AXI4-Stream top level: a frame in, a frame out; tlast marks the last transfer of a frame.
module {TOP} (
  input aclk,
  input aresetn,
  input s_axis_tvalid,
  output s_axis_tready,
  input [{_width(source) - 1}:0] s_axis_tdata,
  output m_axis_tvalid,
  input m_axis_tready,
  output [{_width(result) - 1}:0] m_axis_tdata,
  output m_axis_tlast
);
  reg rst = 1;
  reg [{bits - 1}:0] beat;
  assign m_axis_tlast = (beat == {beats - 1});
  always @(posedge aclk) begin
    rst <= ~aresetn;
    if (rst) beat <= 0;
    else if (m_axis_tvalid & m_axis_tready) beat <= m_axis_tlast ? 0 : beat + 1'b1;
  end

  // In reset, which reaches the network a cycle after aresetn, nothing is taken and nothing offered.
  wire in_ready, out_valid;
  assign s_axis_tready = in_ready & ~rst;
  assign m_axis_tvalid = out_valid & ~rst;
  {NETWORK} model (
    .clk(aclk), .rst(rst),
    .in_valid(s_axis_tvalid & ~rst), .in_ready(in_ready), .in_data(s_axis_tdata),
    .out_valid(out_valid), .out_ready(m_axis_tready & ~rst), .out_data(m_axis_tdata)
  );
endmodule
"""
