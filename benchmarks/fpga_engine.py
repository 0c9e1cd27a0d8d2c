"""One engine alone, synthesized, placed and routed: the cells it takes and the clock it reaches.

``python benchmarks/fpga_engine.py [--pe 8] [--simd 8] [--formats int8 w4a8] [--dsp] [--target ecp5-45f]``

Needs no model: weights are random and need all of their bits.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from bitwright.targets.fpga.cost_model import predict, table_of
from bitwright.targets.fpga.folding import CODES, device_of
from bitwright.targets.fpga.network import Folding
from bitwright.targets.fpga.place_route import place_and_route
from bitwright.targets.fpga.probe import matrix_vector
from bitwright.targets.fpga.standalone import TOP, write_standalone
from bitwright.targets.fpga.synthesis import Synthesizer
from bitwright.targets.loader import load_profile

OUTPUTS, INPUTS = 64, 576


def row(name: str, folding: Folding, target: str, input_bits: int) -> str:
    """Place one engine and return a line of the table."""
    profile = load_profile(target)
    device, engine = (
        device_of(profile),
        matrix_vector(CODES[name], folding, OUTPUTS, INPUTS, input_bits=input_bits),
    )
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bitwright-") as place:
        work = Path(place)
        netlist = work / "netlist.json"
        found = Synthesizer(device.series).circuit(work, write_standalone(engine, work), TOP, netlist)
        placed = place_and_route(netlist, device, work, clock_hz=profile.clock_hz)
    seconds, predicted = time.perf_counter() - start, predict(engine, table_of(device))
    cells = found.cells
    words = (
        f"{folding.pe} x {folding.simd} in {'DSP blocks' if folding.dsp else 'LUTs'}",
        f"{CODES[name]} x {input_bits}",
        *(f"{getattr(cells, k):.0f} ({getattr(predicted, k):.0f})" for k in ("luts", "ffs", "dsps", "brams")),
        f"{placed.fmax_hz / 1e6:.1f} MHz",
        f"{seconds:.0f} s",
    )
    return "| " + " | ".join(words) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pe", type=int, default=8)
    parser.add_argument("--simd", type=int, default=8)
    parser.add_argument("--formats", nargs="+", default=["int8"], choices=CODES)
    parser.add_argument("--inputs", type=int, default=8, help="bits of the activations")
    parser.add_argument("--dsp", action="store_true")
    parser.add_argument("--target", default="ecp5-45f")
    asked = parser.parse_args()
    print(f"{asked.target}: counted by yosys (predicted), clock by nextpnr")
    print("| lanes | weights x inputs, bits | LUTs | flip-flops | DSP blocks | block RAMs | clock | took |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in asked.formats:
        folding = Folding(asked.pe, asked.simd, asked.dsp)
        print(row(name, folding, asked.target, asked.inputs), flush=True)


if __name__ == "__main__":
    main()
