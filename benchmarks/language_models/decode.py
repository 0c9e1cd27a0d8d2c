"""Decoding with 4-bit weights: the compiled artifact against ONNX Runtime's MatMulNBits, one thread, by turns.

usage: BITWRIGHT_ZOO=... python benchmarks/language_models/decode.py [model] [shapes] [rows]

``model``: tinylm with a key-value cache, both runtimes executing the same Q/DQ file. ``shapes``: single products of one
row in the sizes of a decoder with a billion parameters. ``rows``: one of these with more rows, as a prompt has.
Each figure is the best thread CPU time of one call over the rounds; inputs and outputs are bound in advance. ONNX
Runtime computes at accuracy level 4 (activations rounded to 8 bits in blocks, as here) and at level 0 (float32).
"""

from __future__ import annotations

import os

os.environ["TVM_NUM_THREADS"] = "1"  # read when tvm is imported
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when numpy is imported

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import tvm
from tvm.runtime.vm import VirtualMachine

from bitwright.compiler.compilation import Compilation
from bitwright.compiler.lower.compile import compile_module
from bitwright.compiler.lower.relax_module import build_module
from bitwright.compiler.options import Options
from bitwright.compiler.ort.bound import bound_call
from bitwright.compiler.ort.session import SessionConfig, config_for, open_session
from bitwright.compiler.pipeline import FRONT
from bitwright.compiler.program.extract import extract_program
from bitwright.passes.normalize import specialize
from bitwright.passes.pack_nbits import PackNBits
from bitwright.passes.remove_unused import RemoveUnused
from bitwright.passes.rewriting import add_initializer
from bitwright.targets.backend import backend_for
from bitwright.targets.loader import load_profile

sys.path.insert(0, str(Path(__file__).parents[1]))
from turns import Call, best_times
from zoo import Feeds, folder, load

LEVEL_KEY = "session.qdq_matmulnbits_accuracy_level"
PASTS = (16, 64, 256)
SHAPES = ((2048, 2048), (2048, 8192), (8192, 2048))
ROWS = (1, 2, 4, 8, 16, 64, 128)
GROUP = 32
ROUNDS = 40
BANDWIDTH_BYTES = 1 << 28


def artifact_call(model: ir.Model, feeds: Feeds, folder: Path) -> Call:
    """Compile a Q/DQ model for this machine and return a call of it."""
    profile = load_profile("host")
    backend = backend_for(profile.family)
    lowered = build_module(extract_program(model), profile, backend.dot_kernel)
    executable = compile_module(lowered.ir_module, backend.tvm_target(profile))
    library = folder / f"{len(list(folder.iterdir()))}.so"
    executable.export_library(str(library))
    machine = VirtualMachine(tvm.runtime.load_module(str(library)), tvm.cpu())
    arguments = [tvm.runtime.tensor(feeds[v.name or ""]) for v in model.graph.inputs]
    return lambda: machine["main"](*arguments)


def onnxruntime_calls(model: ir.Model, feeds: Feeds) -> list[Call]:
    """Return calls at accuracy levels 4 and 0."""
    config = config_for(load_profile("host").runtimes.onnxruntime)
    entries = dict(config.session_config_entries or {})
    configs = [replace(config, session_config_entries={**entries, LEVEL_KEY: level}) for level in ("4", "0")]
    return [bound_call(open_session(model, c), feeds) for c in configs]


def decoding(past: int) -> Compilation:
    """Quantize tinylm in its form with a key-value cache, for one new token behind ``past`` others."""
    tokens = load("tinylm")["calib"].astype(np.int64)
    file = folder("tinylm") / "model_kv.onnx"
    session = open_session(file)
    caches = [i for i in session.get_inputs() if i.name != "input_ids"]
    samples = []
    for k in range(0, 8 * 257, 257):
        empty = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in caches}
        found = session.run(None, {"input_ids": tokens[None, k : k + past], **empty})
        filled = {i.name: array for i, array in zip(caches, found[1:], strict=True)}
        samples.append({"input_ids": tokens[None, k + past : k + past + 1], **filled})
    c = Compilation(Options(model=file, target="host", data=samples, recipe="w4"), load_profile("host"))
    for name, phase in FRONT:
        if name != "audit":  # which only reports
            phase(c, [])
    return c


def model_table() -> None:
    """Print the whole decoder."""
    print(
        "| tinylm, one token | artifact us | / MatMulNBits level 4 | / level 0 | / fp32 | / best of the three |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for past in PASTS:
        c = decoding(past)
        assert c.static is not None and c.model is not None
        plain, feeds = c.model.clone(), c.golden[-1]
        specialize(plain, c.dims)
        with tempfile.TemporaryDirectory() as work:
            calls = [
                artifact_call(c.static, feeds, Path(work)),
                *onnxruntime_calls(c.static, feeds),
                bound_call(open_session(plain, SessionConfig()), feeds),
            ]
            ours, *rivals = best_times(calls, ROUNDS)
        ratios = " | ".join(f"{ours / t:.2f}" for t in (*rivals, min(rivals)))
        print(f"| behind {past} | {ours * 1e6:.0f} | {ratios} |", flush=True)


def product(rows: int, depth: int, columns: int) -> tuple[ir.Model, Feeds]:
    """Return one product with random 4-bit weights, as a blocked DequantizeLinear, and an input."""
    random = np.random.default_rng(0)
    groups = depth // GROUP
    constants = {
        "q": random.integers(0, 16, (depth, columns)).astype(ir.DataType.UINT4.numpy()),
        "s": random.uniform(0.001, 0.02, (groups, columns)).astype(np.float32),
        "z": np.full((groups, columns), 8).astype(ir.DataType.UINT4.numpy()),
    }
    x = ir.Value(name="x", shape=ir.Shape((rows, depth)), type=ir.TensorType(ir.DataType.FLOAT))
    y = ir.Value(name="y", shape=ir.Shape((rows, columns)), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [y], nodes=[], opset_imports={"": 21}, name="product")
    stored = [add_initializer(graph, name, array) for name, array in constants.items()]
    weight = ir.node("DequantizeLinear", stored, {"axis": 0, "block_size": GROUP})
    graph.extend([weight, ir.node("MatMul", [x, weight.outputs[0]], outputs=[y])])
    model = ir.Model(graph, ir_version=10)
    return model, {"x": random.normal(size=(rows, depth)).astype(np.float32)}


def spelled_out(model: ir.Model, level: int) -> ir.Model:
    """Return the model with MatMulNBits written out, at an accuracy level."""
    packed = PackNBits(everywhere=True, accuracy_level=level).run(model.clone()).model
    return RemoveUnused().run(packed).model


def read_bandwidth() -> float:
    """Return bytes a second that one thread reads from memory: the best of a BLAS dot product of a large vector."""
    data = np.ones(BANDWIDTH_BYTES // 4, np.float32)
    return BANDWIDTH_BYTES / best_times([lambda: data @ data], ROUNDS)[0]


def product_rows(rows: int, depth: int, columns: int) -> tuple[float, float, float]:
    """Return seconds of one product: ours, MatMulNBits at level 4 and at level 0."""
    model, feeds = product(rows, depth, columns)
    with tempfile.TemporaryDirectory() as work:
        calls = [
            artifact_call(model, feeds, Path(work)),
            *(bound_call(open_session(spelled_out(model, level)), feeds) for level in (4, 0)),
        ]
        ours, rounded, exact = best_times(calls, ROUNDS)
    return ours, rounded, exact


def shape_table() -> None:
    """Print single products of one row with what they read a second."""
    limit = read_bandwidth()
    print(
        f"\nmemory read by one thread (dot product of {BANDWIDTH_BYTES >> 20} MiB): {limit / 1e9:.1f} GB/s\n"
    )
    print("| K x N, one row | artifact us | / level 4 | / level 0 | GB/s of weights and scales | of memory |")
    print("| --- | --- | --- | --- | --- | --- |")
    for depth, columns in SHAPES:
        ours, rounded, exact = product_rows(1, depth, columns)
        speed = depth * columns * (0.5 + 4 / GROUP) / ours
        print(
            f"| {depth} x {columns} | {ours * 1e6:.0f} | {ours / rounded:.2f} | {ours / exact:.2f} "
            f"| {speed / 1e9:.1f} | {speed / limit:.2f} |",
            flush=True,
        )


def rows_table() -> None:
    """Print one product with more and more rows."""
    depth, columns = SHAPES[0]
    print(f"\n| rows of {depth} x {columns} | artifact us | / level 4 | / level 0 | GMAC/s |")
    print("| --- | --- | --- | --- | --- |")
    for rows in ROWS:
        ours, rounded, exact = product_rows(rows, depth, columns)
        speed = rows * depth * columns / ours / 1e9
        print(
            f"| {rows} | {ours * 1e6:.0f} | {ours / rounded:.2f} | {ours / exact:.2f} | {speed:.0f} |",
            flush=True,
        )


TABLES: dict[str, Callable[[], None]] = {"model": model_table, "shapes": shape_table, "rows": rows_table}


def main() -> None:
    """Print the tables."""
    for name in sys.argv[1:] or TABLES:
        TABLES[name]()


if __name__ == "__main__":
    main()
