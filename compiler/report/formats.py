"""Formats in words, and the few kinds that pictures tell apart by colour."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitwright.compiler.report.figures import share_text
from bitwright.targets.schema import SHORT_FORMATS

WORDS: Mapping[str, str] = {
    "float": "32-bit floating point",
    "int8": "8-bit weights and activations",
    "int8-dynamic": "8-bit weights and activations, one activation scale a call",
    "int8-row": "8-bit weights and activations, one activation scale a row",
    "w6a8": "6-bit weights, 8-bit activations",
    "w5a8": "5-bit weights, 8-bit activations",
    "w4a8": "4-bit weights on 8-bit kernels",
    "w3a8": "3-bit weights, 8-bit activations",
    "w2a8": "2-bit weights, 8-bit activations",
    "ternary-a8": "weights -1, 0 and 1 times a scale a channel, 8-bit activations",
    "binary-a8": "weights -1 and 1 times a scale a channel, 8-bit activations",
    "w8a16": "8-bit weights, 16-bit activations",
    "fp8": "8-bit floating point",
    "w8": "8-bit weights in groups, float activations",
    "w4": "4-bit weights in groups, float activations",
    "w3": "3-bit weights in groups, float activations",
    "w2": "2-bit weights in groups, float activations",
    "nf4": "4-bit weights from a table of normal quantiles, float activations",
    "ternary": "weights -1, 0 and 1 times a scale, float activations",
    "binary": "weights -1 and 1 times a scale, float activations",
    "fp8-weights": "weights in 8-bit floating point, computed in float",
    "fp16-weights": "weights in half precision, computed in float",
    "fp16": "half precision",
    "bf16": "half precision (bfloat16)",
}
# Class of the style sheet -> what it stands for.
KINDS: Mapping[str, str] = {
    "integer": "integers, 8 bits and more",
    "short": "integers with weights below 8 bits",
    "stored": "quantized weights, computed in float",
    "half": "half precision",
    "float": "float",
}
_KIND_OF = {
    **dict.fromkeys(("int8", "int8-dynamic", "int8-row", "w8a16", "fp8"), "integer"),
    **dict.fromkeys(SHORT_FORMATS, "short"),
    **dict.fromkeys(("w8", "w4", "w3", "w2", "nf4", "ternary", "binary"), "stored"),
    **dict.fromkeys(("fp8-weights", "fp16-weights", "fp16", "bf16"), "half"),
}
# They multiply integers although no scale of theirs is known before the call.
DYNAMIC = ("int8-dynamic", "int8-row")


def kind_of(fmt: str) -> str:
    """Return the kind of a format: a key of :data:`KINDS`."""
    return _KIND_OF.get(fmt, "float")


def bits_text(parameters: Mapping[str, int]) -> str:
    """Return the shares of weights by their bits: ``80 % in 8 bits, 20 % in 4 bits``."""
    total = sum(parameters.values())
    rows = sorted(parameters.items(), key=lambda item: (-item[1], int(item[0])))
    return ", ".join(
        f"{share_text(count / total)} in {bits} bit{'s' if bits != '1' else ''}"
        for bits, count in rows
        if count
    )


def short_weight_text(weight: Mapping[str, Any]) -> str:
    """Return how a weight is quantized, in a few characters: ``4 bits/32``, ``8 bits``, ``nf4/64``."""
    head = weight["codebook"] or f"{weight['bits']} bits"
    return f"{head}/{weight['group']}" if weight["granularity"] == "group" else str(head)


def weight_text(weight: Mapping[str, Any]) -> str:
    """Return how a weight is quantized: ``4 bits in groups of 32 (uint4, 128 scales)``."""
    if weight["granularity"] == "none":
        return f"{weight['bits']} bits ({weight['dtype']}), not scaled"
    values = f"values of the table {weight['codebook']}" if weight["codebook"] else f"{weight['bits']} bits"
    if weight["granularity"] == "group":
        values += f" in groups of {weight['group']}"
    elif weight["granularity"] == "channel":
        values += " for each channel"
    scales = f"{weight['scales']} scale{'s' if weight['scales'] != 1 else ''}"
    return f"{values} ({weight['dtype']}, {scales})"
