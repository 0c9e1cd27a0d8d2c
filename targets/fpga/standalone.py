"""One engine as a design of its own, to be synthesized by itself."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from bitwright.targets.fpga.network import Engine

RTL = Path(__file__).parent / "rtl"
TOP = "standalone"
FILE = "standalone.v"
_HEADER = re.compile(r"^module (\w+) #\((.*?)^\) \((.*?)^\);", re.MULTILINE | re.DOTALL)
_PARAMETER = re.compile(r"parameter (?:\[[^]]*\] )?(\w+) = ([^,\n/]+)")
_PORT = re.compile(r"^\s*(?:input|output).*?(\w+)\s*,?\s*(?://.*)?$", re.MULTILINE)


@lru_cache
def headers() -> dict[str, tuple[str, str]]:
    """Return module -> text of its parameters and of its ports."""
    found = {}
    for path in sorted(RTL.glob("*.v")):
        for name, parameters, ports in _HEADER.findall(path.read_text("utf-8")):
            found[name] = (parameters, ports)
    return found


def write_standalone(engine: Engine, folder: Path) -> list[str]:
    """Write an engine with its memories and every module under ``rtl/``; return the names of the Verilog files."""
    files = []
    for path in sorted(RTL.glob("*.v")):
        shutil.copyfile(path, folder / path.name)
        files.append(path.name)
    names = {}
    for parameter, content in engine.memories.items():
        names[parameter] = f"{parameter.lower()}.hex"
        (folder / names[parameter]).write_text(content().hex_text(), "utf-8")
    (folder / FILE).write_text("\n".join(_top(engine, names)) + "\n", "utf-8")
    return [*files, FILE]


def _top(engine: Engine, memories: dict[str, str]) -> Iterator[str]:
    parameters, ports = headers()[engine.module]
    values = {name: str(value) for name, value in engine.parameters.items()}
    values |= {name: f'"{file}"' for name, file in memories.items()}
    declared = _PARAMETER.findall(parameters)
    settings = ", ".join(
        f"parameter {name} = {values.get(name, default.strip())}" for name, default in declared
    )
    yield f"module {TOP} #({settings}) ("
    yield ports.strip("\n")
    yield ");"
    passed = ", ".join(f".{name}({name})" for name, _ in declared)
    wires = ", ".join(f".{name}({name})" for name in _PORT.findall(ports))
    yield f"  {engine.module} #({passed}) engine ({wires});"
    yield "endmodule"
