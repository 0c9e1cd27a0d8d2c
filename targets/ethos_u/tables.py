"""What the report shows of a compiled file: cycles of every layer, what binds it, memories, weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from bitwright.compiler.program.ops import Dot
from bitwright.targets.backend import Measurement
from bitwright.targets.ethos_u.tflite_graph import TfliteGraph
from bitwright.targets.ethos_u.translate import Translation
from bitwright.targets.ethos_u.vela import SRAM, VelaLayer, VelaReport
from bitwright.targets.generator import Table
from bitwright.targets.schema import Profile

ESTIMATE = "Vela's estimate"
HONEST = "numerics verified against the TFLite reference kernels, cycles are Vela's estimate"


def nodes_of(translation: Translation) -> dict[str, str]:
    """Return the ONNX node that a tensor of the file comes from, by the tensor's name."""
    assert translation.graph is not None
    return {layer.output: layer.step for layer in translation.graph.layers}


def measurements(report: VelaReport, profile: Profile) -> tuple[Measurement, ...]:
    """Return the figures of a whole file."""
    found = [
        Measurement("Cycles of an inference", f"{report.cycles:,}", ESTIMATE),
        Measurement(
            "Time of an inference",
            f"{report.seconds * 1e3:.3f} ms",
            f"{ESTIMATE} at {profile.clock_hz / 1e6:.0f} MHz",
        ),
        Measurement(
            "Operators on the accelerator",
            f"{_share(report):.0%}",
            f"{len(report.layers) - len(report.on_cpu)} of {len(report.layers)}",
        ),
    ]
    limits = {"sram": profile.limits.ram_bytes}
    for name, used in report.memory_bytes.items():
        if used:
            limit = limits.get(name, profile.limits.flash_bytes)
            detail = "Vela's plan" if limit is None else f"Vela's plan, of {limit / 1024:,.0f} KiB"
            found.append(Measurement(f"Memory: {name.replace('_', ' ')}", f"{used / 1024:.1f} KiB", detail))
    bits = f"{report.bits_per_weight:.2f} bits"
    found.append(
        Measurement("Stored weight", bits, f"{report.weights:,} weights, encoded by Vela without loss")
    )
    return tuple(found)


def _share(report: VelaReport) -> float:
    return 1 - len(report.on_cpu) / len(report.layers) if report.layers else 0.0


def layer_table(report: VelaReport, nodes: Mapping[str, str]) -> Table:
    """Return the table of cycles."""
    total = max(sum(layer.cycles for layer in report.layers), 1)
    rows = tuple(_row(layer, nodes, total) for layer in report.layers if layer.cycles)
    columns = (
        *("Node", "Operator", "On", "Cycles", "Share %", "Bound by"),
        *("NPU cycles", "SRAM cycles", "Flash and DRAM cycles", "MACs", "Utilisation %"),
    )
    note = (
        "Cycles are Vela's estimate. A layer bound by flash or DRAM gets faster with fewer distinct weights, one bound "
        "by the NPU does not."
    )
    return Table("Layers", columns, rows, note)


def _row(layer: VelaLayer, nodes: Mapping[str, str], total: int) -> tuple[str | int | float | None, ...]:
    outside = sum(cycles for name, cycles in layer.memory_cycles.items() if name != SRAM)
    return (
        nodes.get(layer.tensor, layer.tensor),
        layer.operator,
        layer.target,
        layer.cycles,
        round(100 * layer.cycles / total, 1),
        layer.bound,
        layer.npu_cycles,
        layer.memory_cycles[SRAM],
        outside,
        layer.macs,
        round(layer.utilisation, 1),
    )


def weight_table(translation: Translation) -> Table:
    """Return how many different integers each weight consists of: what the encoding lives on."""
    rows = tuple(_weights(translation))
    note = (
        "Entropy is what no encoding of single weights can be below; zeros in a row are encoded better still."
    )
    return Table("Weights", ("Node", "Weights", "Different integers", "Entropy, bits"), rows, note)


def _weights(translation: Translation) -> Iterator[tuple[str, int, int, float]]:
    for step in translation.steps.steps:
        if isinstance(step, Dot):
            _, counts = np.unique(step.weight, return_counts=True)
            share = counts / counts.sum()
            entropy = abs(float(-(share * np.log2(share)).sum()))
            yield step.name, int(step.weight.size), len(counts), round(entropy, 2)


def io_table(graph: TfliteGraph) -> Table:
    """Return how the host quantizes inputs and dequantizes outputs."""
    rows = []
    for word, tensors in (("input", graph.inputs), ("output", graph.outputs)):
        for name, stored in tensors.items():
            tensor = graph.tensors[stored.tensor]
            shape = " x ".join(map(str, tensor.shape))
            order = "as in the ONNX model" if stored.is_row_major else f"axes {stored.order}"
            rows.append((word, name, shape, order, float(tensor.scale[0]), tensor.zero_point))
    columns = ("", "Name", "Shape in the file", "Order", "Scale", "Zero point")
    return Table("Inputs and outputs", columns, tuple(rows), "Both are int8; the processor converts.")
