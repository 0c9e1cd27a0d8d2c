"""report.json and report.html of a real quantization: figures that add up, markup that a model cannot break."""

from __future__ import annotations

import copy
import json
from html.parser import HTMLParser

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from bitwright.compiler.deploy import quantize
from bitwright.compiler.options import Options
from bitwright.compiler.report.figures import count_text, seconds_text, share_text, size_text, speed_text
from bitwright.compiler.report.headline import headline
from bitwright.compiler.report.page import render_page

TEXT = """
<ir_version: 10, opset_import: ["": 17]>
small (float[N,3,16,16] x) => (float[N,10] y) {
  [first] a = Conv<pads=[1,1,1,1]>(x, w1, b1)
  [relu] b = Relu(a)
  [second] c = Conv<pads=[1,1,1,1]>(b, w2)
  [pool] d = GlobalAveragePool(c)
  [flat] e = Flatten(d)
  [head] f = Gemm(e, w3)
  [soft] y = Softmax(f)
}
"""
MEGABYTE = 1_000_000


def small_model() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(TEXT)
    shapes = {"w1": (16, 3, 3, 3), "b1": (16,), "w2": (32, 16, 3, 3), "w3": (32, 10)}
    for name, shape in shapes.items():
        values = rng.normal(size=shape).astype(np.float32) / np.sqrt(np.prod(shape[1:]))
        model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    onnx.save(small_model(), folder / "m.onnx")
    data = {"x": np.random.default_rng(1).normal(size=(8, 3, 16, 16)).astype(np.float32)}
    options = Options(
        model=folder / "m.onnx", target="x86-avx2", data=data, output=folder / "q.onnx", gate=False
    )
    return quantize(options)


@pytest.fixture
def content(made):
    return copy.deepcopy(made.report)


def constants(path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def test_the_report_is_json(content):
    assert json.loads(json.dumps(content, allow_nan=False))["schema"] == 1


def test_sizes_are_those_of_the_written_file(made, content):
    written = constants(made.model)
    assert content["summary"]["bytes"] == sum(a.nbytes for a in written.values())
    assert {row["initializer"] for row in content["sizes"]} == set(written)


def test_float_size_is_that_of_the_model(content):
    # Weights and biases alone: quantizing adds scales and zero points, which have no float size.
    model = small_model()
    assert content["summary"]["float_bytes"] == sum(
        numpy_helper.to_array(t).nbytes for t in model.graph.initializer
    )


def test_every_integer_weight_belongs_to_its_operator(content):
    readers = {row["initializer"]: row["node"] for row in content["sizes"]}
    assert readers["w1_quantized"] == "first" and readers["w2_quantized"] == "second"


def test_layers_carry_their_scales_and_noise(content):
    row = next(r for r in content["layers"] if r["node"] == "first")
    assert row["format"] == "int8" and row["fused"] == ["relu"]
    assert row["weight_scales"] == 16 and 0 < row["weight_scale_min"] <= row["weight_scale_max"]
    assert row["input_quant"]["tensor"] == "x" and row["output_quant"]["tensor"] == "b"
    # 8 bits of a Gaussian layer give some 30 to 45 dB; a mix-up of tensors gives about 0.
    assert 20 < row["sqnr_db"] < 60


def test_noise_is_listed_in_graph_order(content):
    nodes = [row["node"] for row in content["noise"]]
    assert nodes.index("first") < nodes.index("second") < nodes.index("soft")


def test_shares_follow_from_the_layers(content):
    anchors = [r for r in content["layers"] if r["role"] == "anchor" and r["constant_weight"]]
    assert (
        content["summary"]["macs"] == sum(r["macs"] for r in anchors) == 16 * 16 * (16 * 27 + 32 * 144) + 320
    )


class Balance(HTMLParser):
    """Checks that every element is closed, and collects texts and attributes."""

    VOID = {"meta", "br"}

    def __init__(self):
        super().__init__()
        self.stack, self.tags, self.texts, self.attributes = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def parsed(page: str) -> Balance:
    found = Balance()
    found.feed(page)
    found.close()
    assert found.stack == []
    return found


def test_the_page_is_whole_small_and_alone(content):
    page = render_page(content)
    found = parsed(page)
    assert len(page) < MEGABYTE
    assert not {"script", "link", "iframe", "img", "object"} & set(found.tags)
    assert not [a for a in found.attributes if a[0] in ("src", "srcset", "action") or a[0].startswith("on")]
    assert "url(" not in page and "@import" not in page
    assert all(value.startswith("#") for name, value in found.attributes if name == "href")


def test_the_page_shows_what_was_decided(content):
    text = " ".join(parsed(render_page(content)).texts)
    for word in (
        "m.onnx",
        "x86-avx2",
        "first",
        "second",
        "head",
        "Softmax has no integer kernel",
        "w2_quantized",
    ):
        assert word in text
    assert share_text(content["summary"]["integer_macs_share"]) in text


def test_equal_content_gives_equal_pages(content):
    again = json.loads(json.dumps(content))
    assert render_page(content) == render_page(again)


ALLOCATION = {
    "formats": {"first": "int8"},
    "totals": {"loss": 0.5, "weight_bytes": 90.0},
    "objective": "loss",
    "value": 0.5,
    "bound": 0.5,
    "gap": 0.0,
    "proven": True,
    "budgets": [
        {
            "metric": "weight_bytes",
            "limit": 100.0,
            "used": 90.0,
            "binding": True,
            "per_unit": 0.1,
            "more_limit": 105.0,
            "more_objective": 0.25,
        }
    ],
    "dropped": [],
    "seconds": 0.1,
    "notes": ["formats: 1 in int8", "weights: 90 bytes of 100 bytes, binding: 105 bytes would buy loss 0.25"],
}


def test_the_price_of_a_budget_is_told(content):
    content["allocation"] = ALLOCATION
    text = " ".join(parsed(render_page(content)).texts)
    assert "loss 0.25, 50.0% less, with 105 bytes" in text and "90 bytes" in text
    fact = next(f for f in headline(content) if f.label == "Allocation")
    assert fact.value == "optimal" and "would buy loss 0.25" in fact.detail
    content["allocation"] = {**ALLOCATION, "proven": False, "gap": 0.02}
    assert next(f for f in headline(content) if f.label == "Allocation").value == "within 2.0%"
    assert "at most 2.00% better" in render_page(content)


def test_the_page_tells_own_from_accumulated_noise(content):
    found = parsed(render_page(content))
    kinds = [value for name, value in found.attributes if name == "class"]
    measured = [row for row in content["noise"] if row["own_sqnr_db"] is not None]
    assert kinds.count("bar own") == len(measured) >= 3
    assert "the layer's own noise alone" in " ".join(found.texts)


def test_the_headline_tells_the_mix_of_formats(content):
    fact = next(f for f in headline(content) if f.label == "Layers")
    assert fact.value == "3 int8" and fact.detail == "weights: 100 % in 8 bits"
    content["summary"]["formats"] = {"int8": 18, "w4": 6, "float": 3}
    content["summary"]["parameters_by_bits"] = {"4": 100, "8": 300, "32": 0}
    fact = next(f for f in headline(content) if f.label == "Layers")
    assert fact.value == "18 int8, 6 w4, 3 float" and fact.detail == "weights: 75 % in 8 bits, 25 % in 4 bits"


def test_names_of_a_model_are_text(content):
    evil = "<script>alert('1')</script>\x1b[31m\" onload=\"x"
    content["advice"] = [{**a, "patch": f"--- {evil}\n+{evil}", "command": evil} for a in content["advice"]]
    content["migrations"].append({"rewrite": evil, "changes": 1, "notes": [evil] * 9})
    content["allocation"] = {**ALLOCATION, "dropped": [{"group": evil, "format": evil, "reason": evil}]}
    content["allocation"]["notes"] = [f"{evil} binding"]
    content["recipe"]["name"] = content["recipe"]["description"] = evil
    for row in (
        *content["layers"],
        *content["float"],
        *content["noise"],
        *content["sizes"],
        *content["advice"],
    ):
        row["node"] = row["reason"] = row["text"] = row["format"] = evil
        if row.get("weight_quant"):
            row["weight_quant"]["dtype"] = row["weight_quant"]["codebook"] = evil
    content["model"]["file"] = content["target"]["description"] = evil
    content["model"]["inputs"][0]["name"] = content["sizes"][0]["initializer"] = evil
    content["warnings"], content["phases"][0]["notes"] = [evil], [evil]
    content["audit"]["operators"][evil] = 1
    page = render_page(content)
    found = parsed(page)
    assert "script" not in found.tags and "\x1b" not in page
    assert not [a for a in found.attributes if a[0] == "onload"]
    assert "<script>alert('1')</script>" in " ".join(found.texts)


@pytest.mark.parametrize(
    "section", ["accuracy", "advice", "allocation", "audit", "gate", "migrations", "verification"]
)
def test_sections_without_content_are_left_out(content, section):
    content[section] = None
    parsed(render_page(content))


def test_a_model_without_layers_has_a_page(content):
    for section in ("layers", "noise", "advice", "migrations", "sizes", "float", "phases"):
        content[section] = []
    content["summary"]["formats"] = content["summary"]["parameters_by_bits"] = {}
    content["summary"]["output_sqnr_db"] = {}
    assert "Model" in " ".join(parsed(render_page(content)).texts)


def test_warnings_are_shouted(content):
    content["warnings"] = ["calibrated on RANDOM data: ranges mean nothing"]
    page = render_page(content)
    assert 'role="alert"' in page and page.index("RANDOM") < page.index("<main")


def verification(**changes):
    found = {"executed": "native", "reason": "", "sets": 2, "calls": 6, "elements": 600, "seconds": 1e-4}
    return found | {"kernel_differences": [], "outputs": [], "unrecorded": [], "passed": True} | changes


DIFFERENCE = {
    "golden": 0,
    "step": "second",
    "function": "k1",
    "difference": {"elements": 100, "differing": 3, "largest": None},
}


@pytest.mark.parametrize(
    ("found", "verdict", "tone"),
    [
        (verification(), "bit-exact", "good"),
        (verification(kernel_differences=[DIFFERENCE]), "DIFFERS", "bad"),
        (verification(executed="none", calls=0, reason="no emulator"), "not executed", "warn"),
        (verification(calls=0, elements=0), "no integers", "warn"),
        (None, "none", "plain"),
    ],
)
def test_the_verdict_never_claims_more_than_was_compared(content, found, verdict, tone):
    content["verification"] = found
    fact = next(f for f in headline(content) if f.label == "Artifact")
    assert (fact.value, fact.tone) == (verdict, tone)
    text = " ".join(parsed(render_page(content)).texts)
    assert ("bit-exact" in text) == (verdict == "bit-exact")


def test_speed_that_was_not_measured_is_called_modelled(content):
    content["timing"] = {"onnxruntime": None}
    fact = next(f for f in headline(content) if f.label == "Speed")
    assert "not measured" in fact.detail and fact.tone == "plain"


def test_a_slower_model_is_no_good_news(content):
    content["timing"]["onnxruntime"]["ratio"] = 1.25
    fact = next(f for f in headline(content) if f.label == "Speed")
    assert fact.tone == "warn" and fact.value.startswith("0.80")


def test_figures_read_well():
    assert [size_text(n) for n in (0, 999, 1000, 83322, 999_999, 5_000_000)] == [
        "0 B",
        "999 B",
        "1 kB",
        "83.3 kB",
        "1 MB",
        "5 MB",
    ]
    assert [seconds_text(s) for s in (None, 0.0, 4.54e-6, 0.0123, 3.1, 1800)] == [
        "\u2013",
        "0",
        "4.54 \u00b5s",
        "12.3 ms",
        "3.1 s",
        "1800 s",
    ]
    assert [share_text(s) for s in (0, 0.0001, 0.5, 0.9999, 1)] == [
        "0 %",
        "< 0.1 %",
        "50 %",
        "> 99.9 %",
        "100 %",
    ]
    assert count_text(12_501_632) == "12.5 M" and speed_text(0.5) == "2.00\u00d7"
