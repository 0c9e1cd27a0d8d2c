"""What is shipped and what it takes at run time: files by size, working memory by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from bitwright.compiler.compilation import Compilation
from bitwright.compiler.lower.memory_plan import MemoryPlan
from bitwright.compiler.report.figures import DASH, size_text
from bitwright.compiler.report.markup import Child, element
from bitwright.compiler.report.section import Section, section
from bitwright.compiler.report.tables import table
from bitwright.targets.schema import Limits


def planned_text(plans: Mapping[str, MemoryPlan], limits: Limits) -> str:
    """Return what the functions of a library will need, and of how much: known before there is machine code."""

    def of(limit: float | None, memory: str = "") -> str:
        return "" if limit is None else f" of {size_text(limit)}{memory}"

    largest = max(plans.values(), key=lambda plan: plan.peak_bytes)
    if not largest.constant_bytes:
        return f"planned: working memory {size_text(largest.peak_bytes)}{of(limits.ram_bytes)}"
    ram = f"RAM {size_text(largest.peak_bytes)}{of(limits.ram_bytes)}"
    return f"planned: {ram}, constants {size_text(largest.constant_bytes)}{of(limits.flash_bytes, ' flash')}"


def deployment_section(c: Compilation) -> dict[str, Any] | None:
    """Return files, functions and memory of a compiled artifact; None where there is none.

    Keys: ``files`` (``name``, ``bytes``, ``what``; only what a program needs at run time), ``bytes`` (their sum),
    ``model_bytes``, ``functions`` (``name``, ``sizes``, ``memory``) and ``static`` (the archive) or None.
    ``memory`` is ``peak_bytes`` (what a call takes besides weights), ``pool_bytes``, ``live_bytes`` (what a perfect
    plan would take), ``storages`` and ``layers`` (``layer``, ``function``, ``live_bytes``, ``held_bytes``,
    ``workspace_bytes``).
    """
    if c.lowering is None or not c.shipped:
        return None
    needed = [f for f in c.shipped if f.what != "archive"]
    archive = next((asdict(f) for f in c.shipped if f.what == "archive"), None)
    return {
        "files": [asdict(f) for f in needed],
        "bytes": sum(f.bytes for f in needed),
        "model_bytes": sum(f.bytes for f in needed if f.what == "model"),
        "functions": _functions(c),
        "static": archive,
    }


def _functions(c: Compilation) -> list[dict[str, Any]]:
    assert c.lowering is not None
    sizes = {f.name: dict(f.sizes) for f in c.rules.functions} if c.rules is not None else {}
    if c.rules is not None and c.rules.dynamic is not None and c.rules.longest is not None:
        for function in filter(c.rules.is_dynamic, c.rules.functions):
            sizes[function.name][c.rules.dynamic] = c.rules.longest  # what its memory is planned for
    found = []
    for name, plan in c.lowering.memory.items():
        table = c.lowering.variants.get(name, c.lowering.kernel_table)
        steps = [(call.function, call.step or f"layout of {call.output.tensor}") for call in table]
        found.append({"name": name, "sizes": dict(sizes.get(name, {})), "memory": _memory(plan, steps)})
    return found


def _memory(plan: MemoryPlan, steps: list[tuple[str, str]]) -> dict[str, Any]:
    return {
        "peak_bytes": plan.peak_bytes,
        "pool_bytes": plan.pool_bytes,
        "live_bytes": plan.live_bytes,
        "storages": plan.storages,
        "layers": _layers(plan, steps),
    }


def _layers(plan: MemoryPlan, steps: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Name every call: an integer kernel's by its step, in the order of the kernel table, the others by themselves."""
    kernels = {function for function, _ in steps}
    waiting = iter(steps)
    rows = []
    for step in plan.steps:
        layer = (
            next(waiting, (step.function, step.function))[1] if step.function in kernels else step.function
        )
        rows.append(
            {
                "layer": layer,
                "function": step.function,
                "live_bytes": step.live_bytes,
                "held_bytes": step.held_bytes,
                "workspace_bytes": step.workspace_bytes,
            }
        )
    return rows


def deployment_page(found: Mapping[str, Any] | None) -> Section:
    """Return the section of the page."""
    if found is None:
        return "Deployment", None
    lead = _lead(found)
    rows: list[list[Child]] = [[f["name"], f["what"], size_text(f["bytes"])] for f in found["files"]]
    parts: list[Child] = [table(("File", "What", "#Size"), rows)]
    if found["static"] is not None:
        archive = found["static"]
        parts.append(element("p", f"Static archive: {archive['name']}, {size_text(archive['bytes'])}."))
    for function in found["functions"]:
        parts += _function_parts(function)
    return section("Deployment", lead, *parts)


def _lead(found: Mapping[str, Any]) -> str:
    if found["bytes"] == found["model_bytes"]:
        return (
            f"Code and constants take {size_text(found['bytes'])}; there is no runtime. Working memory is one arena, "
            "inputs, outputs and the stack; live is what tensors need during a layer."
        )
    return (
        f"A program needs {size_text(found['bytes'])} at run time, {size_text(found['model_bytes'])} of it the model; "
        "the rest serves all models of one TVM version. Working memory comes from a pool that keeps what a call "
        "returned; held is what is in use during a layer in whole pages, live what tensors need then."
    )


def _function_parts(function: Mapping[str, Any]) -> list[Child]:
    memory = function["memory"]
    sizes = ", ".join(f"{name} = {size}" for name, size in function["sizes"].items())
    head = f"{function['name']} ({sizes})" if sizes else function["name"]
    text = (
        f"{head}: working memory {size_text(memory['peak_bytes'])} in {memory['storages']} blocks; "
        f"{size_text(memory['live_bytes'])} of tensors are needed at once."
    )
    top = max((row["held_bytes"] + row["workspace_bytes"] for row in memory["layers"]), default=0)
    rows: list[list[Child]] = [
        [
            row["layer"],
            size_text(row["live_bytes"]),
            size_text(row["held_bytes"]),
            size_text(row["workspace_bytes"]) if row["workspace_bytes"] else DASH,
            "peak" if row["held_bytes"] + row["workspace_bytes"] == top else "",
        ]
        for row in memory["layers"]
    ]
    inside = table(("Layer", "#Live", "#Held", "#Scratch", ""), rows, tall=True)
    return [element("p", text), element("details", element("summary", "Memory by layer"), inside)]
