"""Systolic accelerators: resnet8 and a 256x256x256 product on arrays that only YAML describes, all simulated.

``BITWRIGHT_ZOO=... python benchmarks/npu.py [--targets npu-8x8 my-array.yaml ...] [--out DIR]``

Every figure of cycles is the simulated circuit's; it is compared with the cycle model's, which the schedules were
searched with, and the run fails where they differ.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from zoo import load, model_named

from bitwright.compiler.bundle.bundle import Bundle
from bitwright.compiler.options import Options
from bitwright.compiler.ort.session import SessionConfig, open_session, run
from bitwright.compiler.pipeline import compile_model
from bitwright.compiler.program.ops import Program, QGemm, QuantParams, Tensor
from bitwright.targets.loader import load_profile
from bitwright.targets.npu.area import predicted_area
from bitwright.targets.npu.execution import run_program
from bitwright.targets.npu.generator import compare, plan_layer
from bitwright.targets.npu.lowering import write_host
from bitwright.targets.npu.machine import Machine, machine_of
from bitwright.targets.npu.programs import CIRCUIT_PROGRAM, MODEL_PROGRAM, build_programs, write_sources
from bitwright.targets.npu.tiling import Tiling, grid_of, legal_tilings
from bitwright.targets.toolchain.interface import Interface, Port

MODEL = "resnet8_cifar10"
SIZE = 256
USERS = """schema: 1
name: my-array
extends: npu-base
description: An array of a size that no shipped profile has.
clock_hz: 1.5e+8
compute:
  - {name: systolic, weight: s8, act: s8, acc: s32, macs_per_cycle: 240}
  - {name: host_fma, weight: f32, act: f32, acc: f32, macs_per_cycle: 1}
memory:
  - {name: buffers, size_bytes: 98304, bytes_per_s: 1.8e+9}
  - {name: dram, size_bytes: 67108864, bytes_per_s: 1.8e+9}
array:
  rows: 12
  columns: 20
  dataflow: output_stationary
  activation_buffer_bytes: 32768
  weight_buffer_bytes: 32768
  accumulator_buffer_bytes: 32768
provenance:
  clock_hz: {source: "assumed for this benchmark", confidence: estimate}
  compute: {source: "one multiply-accumulate a cell and cycle", confidence: estimate}
  memory: {source: "the array's buffers; one word a cycle through the port", confidence: estimate}
"""


def product_program(size: int) -> tuple[Program, dict[str, np.ndarray]]:
    """Return a square product and its input."""
    random = np.random.default_rng(0)
    tensors = {
        "x": Tensor("x", (size, size), "int8", QuantParams("int8", 0.02, 5)),
        "y": Tensor("y", (size, size), "int8", QuantParams("int8", 0.25, -4)),
    }
    step = QGemm(
        name="product",
        inputs=("x",),
        outputs=("y",),
        weight=random.integers(-127, 128, (size, size)).astype(np.int8),
        weight_scale=random.uniform(0.005, 0.01, size).astype(np.float32),
        bias=random.integers(-1000, 1000, size).astype(np.int32),
        lower=-128,
        upper=127,
    )
    feeds = {"x": random.integers(-128, 128, (size, size)).astype(np.int8)}
    return Program(("x",), ("y",), (step,), tensors), feeds


def simulated_product(target: str, machine: Machine, tiling: Tiling) -> int:
    """Return the circuit's cycles for the product with one schedule; its outputs must equal the reference."""
    program, feeds = product_program(SIZE)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_sources(machine, folder)
        write_host(program, load_profile(target), machine, {"product": tiling}, folder, "product")
        ports = [(Port(n, "int8", (SIZE, SIZE)),) for n in ("x", "y")]
        Interface(ports[0], ports[1], {}).write(folder)
        build_programs(machine, folder)
        simulated = run_program(folder, CIRCUIT_PROGRAM, feeds)
    for check in compare(simulated, program):
        np.testing.assert_array_equal(check.actual, check.expected)
    return simulated.cycles[0]


def product_row(target: str) -> list[str]:
    """Return a row of the table of products: the best and the first legal schedule, both simulated."""
    machine = machine_of(load_profile(target))
    program, _ = product_program(SIZE)
    (step,) = program.steps
    assert isinstance(step, QGemm)
    plan = plan_layer(step, program, machine)
    first = next(legal_tilings(grid_of(plan.problem, machine), machine))
    best_cycles = simulated_product(target, machine, plan.tuned.best)
    first_cycles = simulated_product(target, machine, first)
    assert (best_cycles, first_cycles) == (plan.tuned.cycles, plan.tuned.first_cycles)
    return [
        machine_text(machine),
        f"{plan.tuned.cycles:,}",
        f"{best_cycles:,}",
        f"{first_cycles:,}",
        f"{first_cycles / best_cycles:.2f}",
        f"{100 * plan.busy(machine):.0f} %",
        f"{plan.tuned.counted} of {plan.tuned.legal:,}",
    ]


def machine_text(machine: Machine) -> str:
    return f"{machine.rows}x{machine.columns}, {machine.dataflow}"


def compiled(target: str, out: Path, golden: int) -> Bundle:
    """Compile resnet8 and verify every layer on the circuit."""
    model = model_named(MODEL)
    options = Options(
        model=model.path,
        target=target,
        data=list(model.samples()),
        output=out,
        golden=golden,
    )
    bundle = compile_model(options)
    assert bundle is not None
    return bundle


def network_rows(target: str, report: Mapping[str, object]) -> tuple[list[str], list[list[object]]]:
    """Return the summary and the layers of a report."""
    machine = machine_of(load_profile(target))
    generated, verification = report["generated"], report["verification"]
    assert isinstance(generated, Mapping) and isinstance(verification, Mapping)
    layers = next(t for t in generated["tables"] if t["title"] == "Products on the array")["rows"]
    cycles, first, macs = (sum(int(row[k]) for row in layers) for k in (3, 4, 2))
    array = load_profile(target).array
    assert array is not None and array.area is not None
    area = predicted_area(machine, array.area)
    circuit = next(m for m in verification["measurements"] if m["label"] == "Cycles of the circuit")
    summary = [
        machine_text(machine),
        f"{cycles:,}",
        str(circuit["value"]),
        f"{first:,}",
        f"{first / cycles:.2f}",
        f"{100 * macs / cycles / machine.macs_per_cycle:.0f} %",
        f"{1e3 * cycles / machine.clock_hz:.2f}",
        f"{area.total / 1e3:,.0f} k",
        f"{verification['calls']} equal",
    ]
    return summary, layers


def accuracy(bundle: Bundle, images: int) -> tuple[float, float]:
    """Return top-1 of the artifact (the program around the cycle model, proven equal to the circuit) and of float32."""
    data = load(MODEL)
    x, y = data["x"][:images].astype(np.float32), data["y"][:images]
    lib = bundle.path / "lib"
    (port,) = Interface.read(lib).inputs
    session = open_session(model_named(MODEL).path, SessionConfig())
    hits = [0, 0]
    for image, label in zip(x, y, strict=True):
        feeds = {port.name: image.reshape(port.shape)}
        for k, found in enumerate((run_program(lib, MODEL_PROGRAM, feeds).outputs, run(session, feeds))):
            hits[k] += int(next(iter(found.values())).argmax() == label)
    return hits[0] / images, hits[1] / images


def print_table(head: list[str], rows: list[list[object]]) -> None:
    print("| " + " | ".join(head) + " |")
    print("|" + " --- |" * len(head))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", default=["npu-8x8", "npu-16x16", "my-array"])
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--golden", type=int, default=2, help="images through the simulated circuit")
    parser.add_argument("--images", type=int, default=200, help="images of the accuracy")
    given = parser.parse_args()
    out = given.out or Path(tempfile.mkdtemp(prefix="bitwright-npu-"))
    out.mkdir(parents=True, exist_ok=True)
    users = out / "my-array.yaml"
    users.write_text(USERS)
    targets = [str(users) if t == "my-array" else t for t in given.targets]
    head = ["array", "cycles, model", "cycles, circuit", "first legal", "gain", "array busy"]
    print(f"A {SIZE}x{SIZE}x{SIZE} product; both schedules simulated, outputs equal to the reference\n")
    print_table([*head, "schedules counted"], [list(product_row(t)) for t in targets])
    summaries, details = [], []
    for target in targets:
        bundle = compiled(target, out / f"resnet8-{Path(target).stem}", given.golden)
        report = json.loads((bundle.path / "report.json").read_text())
        summary, layers = network_rows(target, report)
        if given.images:
            ours, floats = accuracy(bundle, given.images)
            summary += [f"{ours:.3f} ({floats:.3f})"]
        summaries.append(list(summary))
        details.append((summary[0], layers))
    print(f"{MODEL}: every product on the array, {given.golden} images through the simulated circuit\n")
    last = [f"top-1 of {given.images} (float32)"] if given.images else []
    print_table([*head, "ms at its clock", "gate equivalents", "kernels of the images", *last], summaries)
    for name, layers in details:
        print(f"{MODEL} on {name}\n")
        print_table(
            ["node", "product", "MACs", "cycles", "first legal", "gain", "array busy %"],
            [list(r) for r in layers],
        )


if __name__ == "__main__":
    main()
