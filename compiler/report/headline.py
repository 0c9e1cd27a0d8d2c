"""The few lines a reader wants first; the page and the command line show the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bitwright.compiler.report.figures import (
    DASH,
    count_text,
    decibel_text,
    number_text,
    seconds_text,
    share_text,
    size_text,
    speed_text,
)
from bitwright.compiler.report.formats import bits_text

Tone = Literal["good", "bad", "warn", "plain"]


@dataclass(frozen=True)
class Fact:
    """One line of the headline.

    Attributes:
        label: What it is about.
        value: The figure.
        detail: What the figure means.
        tone: How a reader should feel about it.
    """

    label: str
    value: str
    detail: str
    tone: Tone = "plain"


def headline(content: Mapping[str, Any]) -> list[Fact]:
    """Return the headline of a report."""
    facts = [
        _integers(content["summary"]),
        _formats(content["summary"]),
        _size(content["summary"]),
        shipped_fact(content.get("deployment")),
        memory_fact(content.get("deployment")),
        *_measurements(content.get("verification")),
        _allocation(content.get("allocation")),
        *_accuracy(content),
        _noise(content["summary"]),
        _speed(content),
        _verdict(content),
    ]
    return [fact for fact in facts if fact is not None]


def _integers(summary: Mapping[str, Any]) -> Fact:
    """Return the share that is multiplied in integers; where none is, the share that is quantized for its size."""
    integer, quantized = summary["integer_macs_share"], summary["quantized_macs_share"]
    size_only = not integer and bool(quantized)
    label, share, count = (
        ("Quantized", quantized, summary["quantized_anchors"])
        if size_only
        else ("In integers", integer, summary["integer_anchors"])
    )
    detail = (
        f"of {count_text(summary['macs'])} multiply-accumulates with a constant weight; "
        f"{count} of {summary['anchors']} operators"
    )
    if size_only:
        detail += "; none multiplies integers"
    elif quantized > integer:
        detail += f"; {share_text(quantized - integer)} more have only their weights or precision reduced"
    return Fact(label, share_text(share), detail, "plain" if share else "warn")


def _formats(summary: Mapping[str, Any]) -> Fact | None:
    if not summary["formats"]:
        return None
    value = ", ".join(f"{count} {fmt}" for fmt, count in summary["formats"].items())
    return Fact("Layers", value, f"weights: {bits_text(summary['parameters_by_bits'])}")


def _allocation(found: Mapping[str, Any] | None) -> Fact | None:
    """Return how good the chosen formats are, and what the budgets leave."""
    if found is None:
        return None
    value = "optimal" if found["proven"] else f"within {found['gap']:.1%}"
    prices = [note for note in found["notes"] if "binding" in note]
    detail = "; ".join(["formats chosen by the allocator", *prices])
    return Fact("Allocation", value, detail, "good" if found["proven"] else "plain")


def _size(summary: Mapping[str, Any]) -> Fact:
    before, after = summary["float_bytes"], summary["bytes"]
    factor = f"{before / after:.2f}\N{MULTIPLICATION SIGN} smaller: " if before > after > 0 else ""
    return Fact("Weights", size_text(after), f"{factor}{size_text(before)} before", "plain")


def shipped_fact(found: Mapping[str, Any] | None) -> Fact | None:
    """Return what a program needs at run time."""
    if found is None:
        return None
    runtime = found["bytes"] - found["model_bytes"]
    files = ", ".join(f["name"] for f in found["files"] if f["what"] == "model")
    detail = f"at run time: {size_text(found['model_bytes'])} model ({files}), {size_text(runtime)} runtime"
    if not runtime:
        detail = "; ".join(f"{f['name']}: {size_text(f['bytes'])}" for f in found["files"])
    return Fact("To ship", size_text(found["bytes"]), detail)


def memory_fact(found: Mapping[str, Any] | None) -> Fact | None:
    """Return the working memory of the largest function."""
    functions = [] if found is None else found["functions"]
    if not functions:
        return None
    memory = max((f["memory"] for f in functions), key=lambda m: int(m["peak_bytes"]))
    where = f" in the largest of {len(functions)} functions" if len(functions) > 1 else ""
    detail = f"a call{where}; {size_text(memory['live_bytes'])} of tensors are needed at once"
    return Fact("Working memory", size_text(memory["peak_bytes"]), detail)


def _measurements(found: Mapping[str, Any] | None) -> list[Fact]:
    """Return what the execution of the artifact measured besides its time."""
    return [Fact(m["label"], m["value"], m["detail"]) for m in (found or {}).get("measurements", ())]


def _accuracy(content: Mapping[str, Any]) -> list[Fact]:
    accuracy = content.get("accuracy")
    if accuracy is None:
        return []
    if accuracy.get("kind"):
        detail = f"{number_text(-accuracy['float_value'])} in float; {accuracy['drop'] * 100:+.2f} %"
        return [Fact(accuracy["kind"].capitalize(), number_text(-accuracy["quantized_value"]), detail)]
    detail = f"{number_text(accuracy['float_value'])} in float; relative drop {accuracy['drop'] * 100:.2f} %"
    return [Fact("Your metric", number_text(accuracy["quantized_value"]), detail)]


def _noise(summary: Mapping[str, Any]) -> Fact | None:
    outputs = summary["output_sqnr_db"]
    if not outputs:
        return None
    name, worst = min(outputs.items(), key=lambda item: (item[1], item[0]))
    which = f"output '{name}'" if len(outputs) == 1 else f"worst of {len(outputs)} outputs, '{name}'"
    return Fact("Output SQNR", decibel_text(worst), f"signal to quantization noise at {which}")


def _speed(content: Mapping[str, Any]) -> Fact:
    timing = (content.get("timing") or {}).get("onnxruntime")
    if timing is not None:
        on = f" on {timing['what']}" if timing.get("what") else ""
        detail = (
            f"as fast as float, measured in ONNX Runtime{on}: {seconds_text(timing['first_s'])} against "
            f"{seconds_text(timing['second_s'])} ({timing['ratio']:.2f} \N{PLUS-MINUS SIGN} "
            f"{timing['spread'] / 2:.2f} of the time)"
        )
        return Fact("Speed", speed_text(timing["ratio"]), detail, "good" if timing["ratio"] < 1 else "warn")
    artifact = (content.get("timing") or {}).get("artifact")
    if artifact is not None:
        detail = (
            f"as fast as the float model in ONNX Runtime, the compiled artifact measured on this machine: "
            f"{seconds_text(artifact['seconds'])} against {seconds_text(artifact['float_s'])}"
        )
        return Fact(
            "Speed", speed_text(artifact["ratio"]), detail, "good" if artifact["ratio"] < 1 else "warn"
        )
    predicted = (content.get("generated") or {}).get("seconds")
    if predicted is not None:
        return Fact(
            "Time", seconds_text(predicted), "of an inference, estimated by the target's own tools, not timed"
        )
    integer = sum(row["estimated_s"] for row in content["layers"])
    real = sum(row["estimated_float_s"] for row in content["layers"])
    if not integer or not real:
        return Fact("Speed", DASH, "not measured")
    sources = " and ".join(sorted({row.get("estimate", "modelled") for row in content["layers"]}))
    known = "modelled and not measured" if sources == "modelled" else f"not measured as a whole ({sources})"
    detail = f"as fast as float, {known}: {seconds_text(integer)} against {seconds_text(real)}"
    return Fact("Speed", speed_text(integer / real), detail)


def _verdict(content: Mapping[str, Any]) -> Fact:
    found = content.get("verification")
    if found is None:
        detail = "an ONNX Runtime deployment has no compiled artifact to execute"
        return Fact(
            "Artifact", "none", detail if content["target"]["runtime"] == "onnxruntime" else "not verified"
        )
    if found["executed"] == "none":
        return Fact("Artifact", "not executed", found["reason"] or "this machine cannot run it", "warn")
    time = f"; {seconds_text(found['seconds'])} a call" if found["seconds"] is not None else ""
    differing = len(found["kernel_differences"])
    if differing:
        detail = f"{differing} of {found['calls']} integer kernel calls differ from the reference ({found['executed']})"
        return Fact("Artifact", "DIFFERS", detail, "bad")
    left = sum(len(part["nodes"]) for part in content.get("not_lowered", ()))
    time += f"; {left} nodes are left to ONNX Runtime" if left else ""
    if not found["calls"]:
        return Fact(
            "Artifact", "no integers", f"executed ({found['executed']}) without integer kernels{time}", "warn"
        )
    compared = f"{found['calls']} integer kernel calls, {count_text(found['elements'])} elements"
    detail = f"{compared}, executed {found['executed']}"
    return Fact("Artifact", "bit-exact", detail + time, "good")
