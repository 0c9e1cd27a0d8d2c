"""Changing formats in the text of a plan.yaml: one line each, everything else as it was."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bitwright.compiler.errors import UsageError
from bitwright.compiler.plan.model import NodeDecision, Plan
from bitwright.compiler.plan.plan_file import plan_to_yaml
from bitwright.compiler.plan.plan_patch import PlanText

# What a YAML writer quotes, folds or escapes: spaces beyond the line width, quotes, a colon, a number, a newline.
NAMES = ["conv1", "a b " * 60, 'say "no": #1', "12", "line\nbreak", "\u00e9\u2028", "conv10"]


def plan(**formats: str) -> Plan:
    decisions = [NodeDecision(n, "Conv", formats.get(n, "int8"), "anchor", "why: [it] is") for n in NAMES]
    return Plan("host", "onnxruntime", {d.node: d for d in decisions})


def text(**formats: str) -> str:
    return plan_to_yaml(plan(**formats), {"name": "int8"})


@pytest.mark.parametrize("node", NAMES)
def test_one_node_changes_as_if_the_plan_had_been_written_so(node: str) -> None:
    changed = PlanText.read(text(), "plan.yaml").with_formats({node: "w4a8"})
    assert changed == text(**{node: "w4a8"}) != text()


@pytest.mark.parametrize("node", NAMES)
def test_a_patch_is_one_that_patch_applies(node: str, tmp_path: Path) -> None:
    found = PlanText.read(text(), "plan.yaml").patch(node, "float")
    lines = found.splitlines()
    assert lines[:2] == ["--- plan.yaml", "+++ plan.yaml"]
    assert [line for line in lines[3:] if line[0] in "+-"] == ["-  format: int8", "+  format: float"]
    (tmp_path / "plan.yaml").write_text(text())
    done = subprocess.run(
        ["git", "apply", "-p0", "-"], input=found, text=True, cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plan.yaml").read_text() == text(**{node: "float"})


def test_comments_quotes_and_flow_style_of_an_editor_stay() -> None:
    edited = (
        "# mine\nrecipe: {name: int8}\nnodes:\n"
        "  - {op: Conv, node: a, format: int8, role: anchor}\n"
        "  - node: b\n    format: 'w4'   # tried\n    role: anchor\n"
        "activations: []\n"
    )
    changed = PlanText.read(edited, "p.yaml").with_formats({"a": "float", "b": "w8"})
    assert changed == edited.replace("format: int8", "format: float").replace("format: 'w4'", "format: w8")


def test_several_nodes_change_at_once() -> None:
    changed = PlanText.read(text(), "plan.yaml").with_formats({"conv1": "float", "conv10": "w4a8"})
    assert changed == text(conv1="float", conv10="w4a8")


def test_an_unknown_node_is_named_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'conv1'"):
        PlanText.read(text(), "plan.yaml").with_formats({"conv2": "float"})


@pytest.mark.parametrize(
    "broken", ["nodes: 1\n", "a: b\n", "- 1\n", "nodes: [\n", "", "a: &x 1\n", "nodes: {a: b}\n"]
)
def test_what_is_no_plan_is_refused(broken: str) -> None:
    with pytest.raises(UsageError, match=r"p\.yaml"):
        PlanText.read(broken, "p.yaml")
