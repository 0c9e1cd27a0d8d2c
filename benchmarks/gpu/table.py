"""A result as the table of the documentation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

HEAD = "| what | time, us | rate | against | ratio | bound | held |\n|" + " --- |" * 7
# (entry, name of the ratio, what it is against, bound)
BOUNDS = (
    ("int8_gemm", "share_of_vendor_int8", "PyTorch `_int_mm`", 0.65),
    ("int8_gemm", "times_vendor_fp16", "PyTorch fp16 product", 1.0),
    ("fp16_gemm", "share_of_vendor_fp16", "PyTorch fp16 product", None),
    ("int4_row", "times_vendor_fp16", "PyTorch fp16 product of one row", None),
    ("minilm_l6", "times_torch_fp16", "PyTorch fp16 eager, 32 x 128", 1.3),
    ("resnet8_cifar10", "times_torch_fp16", "PyTorch fp16 with a CUDA graph", 1.0),
    ("vww_mobilenet", "times_torch_fp16", "PyTorch fp16 with a CUDA graph", 1.0),
)


def table_of(result: Mapping[str, Any]) -> str:
    """Return a Markdown text: where it ran, whether everything was right, and the ratios with their bounds."""
    kernels, models = result["kernels"], result["models"]
    exact = sum(bool(k.get("exact")) for k in kernels)
    checked = sum("exact" in k for k in kernels)
    right = sum(bool(m["within"]) for m in models)
    lines = [
        f"{result['device']}, {result['date'][:10]}: {exact} of {checked} integer kernels bit-equal to the "
        f"reference, {right} of {len(models)} models within the bound of their float parts.",
        "",
        HEAD,
        *_rows(result["compared"]),
    ]
    return "\n".join(lines)


def _rows(compared: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for entry, ratio, against, bound in BOUNDS:
        found = compared.get(entry, {})
        if ratio not in found:
            continue
        rate = f"{found['tera_operations']:.0f} TOP/s" if "tera_operations" in found else ""
        held = "" if bound is None else ("yes" if found[ratio] >= bound else "no")
        cells = (entry, f"{found['us']:.1f}", rate, against, f"{found[ratio]:.2f}", bound or "", held)
        yield "| " + " | ".join(map(str, cells)) + " |"
