"""What rounding the activations of a quantized decoder costs, by simulation: no kernel multiplies 4-bit activations.

``BITWRIGHT_ZOO=... python benchmarks/language_models/activations.py FILE.onnx ... [--bits 8 4] [--windows 32]``

In front of every product with packed or grouped weights each row (token) is divided by its largest magnitude, rounded
to integers of so many bits and multiplied again. The products themselves compute in float. ``kernel`` is what the file
itself does in ONNX Runtime: activations in 8 bits, a scale for each group of the weight.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx_ir as ir
from formats import folder, perplexity

from bitwright.compiler.graph.model import is_op
from bitwright.compiler.ort.session import SessionConfig, config_for, open_session
from bitwright.compiler.plan.planner import runtime_of
from bitwright.passes.rewriting import add_initializer, fresh_names
from bitwright.targets.loader import load_profile

EXACT = {"session.qdq_matmulnbits_accuracy_level": "0"}


def _is_product(node: ir.Node) -> bool:
    if node.op_type == "MatMulNBits":
        return True
    source = node.inputs[1].producer() if is_op(node, "MatMul") and node.inputs[1] is not None else None
    return source is not None and is_op(source, "DequantizeLinear")


def with_rounded_rows(model: ir.Model, bits: int) -> ir.Model:
    """Return a copy in which products read rows rounded to symmetric integers; 0 bits: rows as they are."""
    copy = model.clone()
    names, done = fresh_names(copy), dict[ir.Value, ir.Value]()
    largest = 2 ** (bits - 1) - 1 if bits else 0
    constants = {
        "last": np.array([-1], np.int64),
        "step": np.array(1 / max(largest, 1), np.float32),
        "least": np.array(1e-20, np.float32),
    }
    known = {k: add_initializer(copy.graph, names(f"rounded_{k}"), a) for k, a in constants.items()}
    for node in [n for n in copy.graph if _is_product(n)]:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
        value = node.inputs[0]
        if not bits or value is None:
            continue
        if value not in done:
            done[value] = _rounded(node, value, known)
        node.replace_input_with(0, done[value])
    return copy


def _rounded(before: ir.Node, value: ir.Value, known: dict[str, ir.Value]) -> ir.Value:
    magnitude = ir.node("Abs", [value])
    largest = ir.node("ReduceMax", [magnitude.outputs[0], known["last"]])
    step = ir.node("Mul", [largest.outputs[0], known["step"]])
    scale = ir.node("Max", [step.outputs[0], known["least"]])
    steps = ir.node("Div", [value, scale.outputs[0]])
    integers = ir.node("Round", [steps.outputs[0]])
    back = ir.node("Mul", [integers.outputs[0], scale.outputs[0]])
    assert before.graph is not None
    before.graph.insert_before(before, [magnitude, largest, step, scale, steps, integers, back])
    return back.outputs[0]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--bits", nargs="*", type=int, default=[0, 8, 4])
    parser.add_argument("--windows", type=int, default=32)
    options = parser.parse_args()
    with np.load(folder() / "data.npz") as data:
        tokens = data["test"].astype(np.int64)
    plain = SessionConfig(threads=1)
    base = perplexity(open_session(ir.load(folder() / "model.onnx"), plain), tokens, options.windows)
    kernel = config_for(runtime_of(load_profile("host"), "onnxruntime"), threads=1)
    print("| file | kernel |", " | ".join(f"{b} bits a row" if b else "float" for b in options.bits), "|")
    print("| --- " * (len(options.bits) + 2) + "|")
    for path in options.files:
        model = ir.load(path)
        found = [perplexity(open_session(model, kernel), tokens, options.windows)]
        exact = SessionConfig(threads=1, session_config_entries=EXACT)
        for bits in options.bits:
            session = open_session(with_rounded_rows(model, bits), exact)
            found.append(perplexity(session, tokens, options.windows))
        print(f"| {path.stem} |", " | ".join(f"{p / base:.4f}" for p in found), "|", flush=True)


if __name__ == "__main__":
    main()
