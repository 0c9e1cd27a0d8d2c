"""report.html: one file, no network, made from the content of report.json."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from bitwright.compiler.report import choices, tables
from bitwright.compiler.report.deployment import deployment_page
from bitwright.compiler.report.figures import count_text, number_text
from bitwright.compiler.report.formats import KINDS, kind_of
from bitwright.compiler.report.generated import generated_page
from bitwright.compiler.report.headline import Fact, headline
from bitwright.compiler.report.markup import Child, Markup, element
from bitwright.compiler.report.pictures import size_picture, sqnr_picture
from bitwright.compiler.report.section import Section, anchor, key, section
from bitwright.compiler.report.tuning import tuning_section

LONG_VALUE = 12
RUNTIMES = {"artifact": "compiled artifact", "onnxruntime": "ONNX Runtime deployment"}


def render_page(content: Mapping[str, Any]) -> str:
    """Return the report as one self-contained HTML document; equal content gives equal text.

    Args:
        content: From :func:`bitwright.compiler.report.content.report_content`, or a report.json read back. Sections
            that are None or empty are left out.
    """
    sections = [(title, part) for title, part in _sections(content) if part is not None]
    title = f"{content['model']['file']} for {content['target']['name']}"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{title} \N{MIDDLE DOT} Bitwright"),
        element("style", Markup(_style())),
    )
    body = element(
        "body",
        _header(content, [name for name, _ in sections]),
        element("main", *(part for _, part in sections)),
        element("footer", f"Made by Bitwright {content['bitwright']}. The same figures are in report.json."),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _style() -> str:
    return files("bitwright.compiler.report").joinpath("templates/page.css").read_text(encoding="utf-8")


def _header(content: Mapping[str, Any], names: list[str]) -> Markup:
    model, target = content["model"], content["target"]
    to = element("span", f" \N{RIGHTWARDS ARROW} {target['name']}", class_="to")
    about = [
        target["description"],
        " ",
        tables.pill(RUNTIMES.get(target["runtime"], target["runtime"]), "plain"),
    ]
    return element(
        "header",
        element("h1", model["file"], to),
        element("p", *about, class_="soft"),
        _warnings(content["warnings"]),
        element("div", *(_card(fact) for fact in headline(content)), class_="cards"),
        element("nav", *(element("a", name, href=f"#{anchor(name)}") for name in names)),
    )


def _warnings(warnings: list[str]) -> Markup | None:
    if not warnings:
        return None
    head = "Warning" if len(warnings) == 1 else f"{len(warnings)} warnings"
    listed = element("ul", *(element("li", line) for line in warnings))
    return element("div", element("strong", f"\N{WARNING SIGN} {head}"), listed, class_="shout", role="alert")


def _card(fact: Fact) -> Markup:
    mark = {"good": "\N{CHECK MARK} ", "bad": "\N{BALLOT X} ", "warn": "\N{WARNING SIGN} ", "plain": ""}[
        fact.tone
    ]
    size = "value" if len(fact.value) <= LONG_VALUE else "value long"
    return element(
        "div",
        element("div", fact.label, class_="label"),
        element("div", f"{mark}{fact.value}", class_=size),
        element("div", fact.detail, class_="detail"),
        class_=f"card {fact.tone}",
    )


def _sections(content: Mapping[str, Any]) -> list[Section]:
    return [
        choices.formats_section(content),
        _accuracy(content.get("accuracy")),
        _noise(content["noise"]),
        choices.advice_section(content),
        _sizes(content["sizes"]),
        _layers(content["layers"]),
        _float(content["float"]),
        _not_lowered(content.get("not_lowered", [])),
        _verification(content.get("verification")),
        tuning_section(content.get("tuning")),
        deployment_page(content.get("deployment")),
        generated_page(content.get("generated")),
        choices.allocation_section(content),
        choices.migration_section(content),
        _gate(content.get("gate")),
        _audit(content.get("audit")),
        _phases(content["phases"]),
        _model(content),
    ]


def _accuracy(accuracy: Mapping[str, Any] | None) -> Section:
    if accuracy is None:
        return "Accuracy", None
    sign = -1 if accuracy.get("kind") else 1
    row = [
        number_text(sign * accuracy["float_value"]),
        number_text(sign * accuracy["quantized_value"]),
        f"{accuracy['drop'] * 100:.3f} %",
    ]
    lead = "Your own metric on both models, run in ONNX Runtime; higher is better."
    if sign < 0:
        lead = (
            "Perplexity of both models, run in ONNX Runtime; lower is better, the drop is its relative rise."
        )
    return section("Accuracy", lead, tables.table(("#Float", "#Quantized", "#Relative drop"), [row]))


def _noise(measured: list[dict[str, Any]]) -> Section:
    lead = (
        "Signal to quantization noise of what each layer writes, in graph order: as a bar with everything before it "
        "quantized, too, as a line with the layer alone quantized and its inputs exact. Six decibel are one bit. A low "
        "line names a layer that is bad itself; a bar far below its line has inherited its noise."
    )
    picture = sqnr_picture(measured)
    present = {kind_of(row["format"]) for row in measured}
    entries = [(kind, text) for kind, text in KINDS.items() if kind in present]
    if any(row["own_sqnr_db"] is not None for row in measured):
        entries.append(("own", "the layer's own noise alone"))
    return section("Noise by layer", lead, *((key(*entries), picture) if picture else ()))


def _sizes(ledger: list[dict[str, Any]]) -> Section:
    picture = size_picture(ledger)
    lead = "Constants by the layer that reads them, then every initializer: weights, biases, scales and zero points."
    if picture is None:
        return "Size", None
    legend = key(("ghost", "float32"), ("integer", "now"))
    return section("Size", lead, legend, picture, tables.size_table(ledger))


def _layers(layers: list[dict[str, Any]]) -> Section:
    lead = (
        "Every operator the target has a kernel for in another format than float, and what was decided. Own is the "
        "noise the layer adds to exact inputs, SQNR that of its output with all before it. Estimated times, here and "
        "in float, come from the profile: they rank choices, they do not predict a clock. Measured is the "
        "best time of the layer's kernels in the compiled artifact, where it ran on this machine."
    )
    return section("Layers", lead, *((tables.layer_table(layers),) if layers else ()))


def _float(rows: list[dict[str, Any]]) -> Section:
    return section("Stayed float", "Operators that run in float, by reason.", *tables.float_groups(rows))


def _not_lowered(found: list[dict[str, Any]]) -> Section:
    rows = [
        {"node": node, "reason": f"{', '.join(part['operators'])}: {part['reason']}"}
        for part in found
        for node in part["nodes"]
    ]
    lead = (
        "What the compiler has no code for. The artifact is in segments: these nodes are ONNX files that ONNX Runtime "
        "executes between the compiled libraries; on this machine during verification, whatever the target is."
    )
    return section("Left to ONNX Runtime", lead, *tables.float_groups(rows))


def _verification(found: Mapping[str, Any] | None) -> Section:
    if found is None:
        return "Verification", None
    if found["executed"] == "none":
        text = f"Compiled, not executed: {found['reason']}"
        return section("Verification", "", element("p", text, class_="warn-text"))
    equal = found["calls"] - len(found["kernel_differences"])
    lead = (
        f"Nothing of the model is compiled: ONNX Runtime executed all of it on {found['sets']} golden input sets."
        if found["executed"] == "onnxruntime"
        else f"The artifact was executed ({found['executed']}) on {found['sets']} golden input sets. Each integer "
        f"kernel's recorded inputs went to the reference interpreter: {equal} of {found['calls']} calls are equal to "
        f"it bit for bit, {count_text(found['elements'])} elements in all. Outputs below may differ where float "
        "operators round differently in the two runtimes."
    )
    parts: list[Child] = []
    if found["kernel_differences"]:
        parts.append(tables.kernel_difference_table(found["kernel_differences"]))
    parts.append(
        tables.output_table(found["outputs"]) if found["outputs"] else element("p", "No outputs compared.")
    )
    if found["unrecorded"]:
        parts.append(
            element("p", "No kernel call of their own: ", tables.code(", ".join(found["unrecorded"])))
        )
    return section("Verification", lead, *parts)


def _gate(gate: Mapping[str, Any] | None) -> Section:
    if gate is None or not gate["trials"]:
        return "No-regret gate", None
    lead = "Measured on this machine: a kind of layer that is not faster as integers stays in float."
    verdict = "No integer form was faster than float: the model stays in float." if gate["all_float"] else ""
    note = element("p", verdict, class_="warn-text") if verdict else None
    return section("No-regret gate", lead, note, tables.gate_table(gate))


def _audit(audit: Mapping[str, Any] | None) -> Section:
    if audit is None:
        return "ONNX Runtime audit", None
    executed = "The graph that ONNX Runtime really executes, read back after its optimizations."
    expected = "Nothing was executed: what TensorRT's published rules say of the file, and what breaks them."
    lead = expected if audit.get("patterns") else executed
    return section("ONNX Runtime audit", lead, *tables.audit_tables(audit))


def _phases(phases: list[dict[str, Any]]) -> Section:
    return section("Phases", "", *((tables.phase_table(phases),) if phases else ()))


def _port(port: Mapping[str, Any]) -> str:
    shape = (
        "unknown shape"
        if port["shape"] is None
        else " \N{MULTIPLICATION SIGN} ".join(map(str, port["shape"])) or "scalar"
    )
    return f"{port['name']}: {port['dtype']}, {shape}"


def _model(content: Mapping[str, Any]) -> Section:
    model, target = content["model"], content["target"]
    entries = [
        ("File", model["file"]),
        ("SHA-256", tables.code(model["sha256"])),
        ("Nodes", f"{model['nodes']}, after normalization {model['nodes_normalized']}"),
        ("Parameters", count_text(model["parameters"])),
        ("Inputs", "; ".join(map(_port, model["inputs"]))),
        ("Outputs", "; ".join(map(_port, model["outputs"]))),
        ("Target", f"{target['name']} ({target['family']})"),
        ("Planned for", ", ".join(f"{k} = {v}" for k, v in target["dims"].items()) or "fixed shapes"),
    ]
    return section("Model", "", element("dl", *((element("dt", k), element("dd", v)) for k, v in entries)))
