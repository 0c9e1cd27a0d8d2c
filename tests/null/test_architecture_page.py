"""docs/architecture.md names what there is: every package, every layer in its order."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
LAYERS = re.compile(r"From the top:\n\n```\n(.*?)```", re.DOTALL)
FAMILIES = re.compile(r"\btargets\.(?:x86_cpu|arm_cpu|cortex_m|nvidia_gpu|fpga|ethos_u|npu)\b")


def names(text: str) -> set[str]:
    return set(re.findall(r"[a-z_0-9]+(?:\.[a-z_0-9]+)*", text))


def test_the_layers_are_those_that_are_enforced() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    enforced = []
    for layer in contracts[0]["layers"]:
        short = layer.replace("bitwright.compiler.", "").replace("bitwright.", "")
        enforced.append(names(FAMILIES.sub("targets.family", short)))
    found = LAYERS.search(PAGE)
    assert found is not None
    shown = [names(line.split("  ")[0].replace("<family>", "family")) for line in found[1].splitlines()]
    # The families are one line; on the page two layers may share a line.
    joined: list[set[str]] = []
    for line in shown:
        merged: set[str] = set()
        while merged < line and enforced:
            merged |= enforced.pop(0)
        joined.append(merged)
    assert joined == shown
    assert enforced == []


def test_every_package_has_its_line() -> None:
    tops = [p for folder in ("compiler", "targets") for p in (ROOT / folder).iterdir()]
    packages = [p.name for p in tops if (p / "__init__.py").exists()]
    packages += [p.name for p in (ROOT / "compiler/lower").iterdir() if (p / "__init__.py").exists()]
    modules = [
        p.name for p in tops if p.suffix == ".py" and p.parent.name == "compiler" and p.stem != "__init__"
    ]
    assert len(packages) > 20 and len(modules) > 20
    table = PAGE[PAGE.index("## The house") : PAGE.index("Imports point one way")]
    missing = [n for n in packages if f"{n}/" not in table] + [n for n in modules if n not in PAGE]
    assert missing == []
