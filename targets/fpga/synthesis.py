"""Synthesis by yosys, engine by engine: each distinct one once, kept between runs, then joined to the whole circuit.

The design is elaborated first. Every module that the top level instantiates is then mapped to the device's cells by
itself, in a process with a time limit: engines end in registers, so nothing is lost at their borders, and a network
that differs in one engine is synthesized in the time of that engine.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bitwright.compiler.errors import ToolchainError
from bitwright.targets.fpga.cells import Cells, Series, count_cells
from bitwright.targets.fpga.yosys import run_yosys, yosys_version
from bitwright.targets.toolchain.cache import cache_place

UNIT = "unit"
# Raised when scripts change what is kept.
EDITION = 1
_MAP: Mapping[Series, str] = {
    "ecp5": "synth_ecp5",
    "xilinx7": "synth_xilinx -family xc7 -flatten -noiopad -noclkbuf",
}
_COUNTED = re.compile(r"\$[0-9]+")
_CELL = re.compile(r"^  cell (\S+) (\S+)$", re.MULTILINE)

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Synthesis:
    """A synthesized circuit.

    Attributes:
        cells: What the whole takes.
        instances: Instance of the top level -> what it takes.
        netlist: The whole circuit in the device's cells (yosys JSON), for place and route.
        reused: Distinct modules that were known from earlier runs.
        modules: Distinct modules.
    """

    cells: Cells
    instances: Mapping[str, Cells]
    netlist: Path
    reused: int
    modules: int


@dataclass(frozen=True)
class Elaborated:
    """A design with its parameters put in.

    Attributes:
        top: Name of the top module in RTLIL, with its leading backslash.
        modules: Name -> text of the module.
    """

    top: str
    modules: Mapping[str, str]

    def instances(self, name: str) -> dict[str, str]:
        """Return instance -> module of what a module instantiates."""
        found = _CELL.findall(self.modules[name])
        return {instance: module for module, instance in found if module in self.modules}

    def below(self, name: str, stop: Collection[str] = ()) -> tuple[str, ...]:
        """Return a module and all below it, without those to stop at."""
        waiting, seen = [name], dict.fromkeys([name])
        while waiting:
            for module in self.instances(waiting.pop()).values():
                if module not in seen and module not in stop:
                    seen[module] = None
                    waiting.append(module)
        return tuple(seen)

    def closure(self, name: str) -> str:
        """Return the text of a module and of everything below it, the module itself under the name ``unit``."""
        text = "".join(self.modules[m] for m in self.below(name)).replace(name, f"\\{UNIT}")
        return _renumbered(text)


@dataclass(frozen=True)
class Synthesizer:
    """Synthesis for one series of devices.

    Attributes:
        series: The series.
        timeout_s: Longest time of one module.
        cache: Folder that keeps synthesized modules; None: the user's own.
        options: Further options of the synthesis command.
    """

    series: Series
    timeout_s: float = 1800.0
    cache: Path | None = None
    options: str = ""
    _version: list[str] = field(default_factory=list, repr=False, compare=False)

    def circuit(
        self,
        folder: Path,
        files: Sequence[str],
        top: str,
        netlist: Path,
        *,
        split: str | None = None,
        progress: Progress | None = None,
    ) -> Synthesis:
        """Synthesize a whole circuit.

        Args:
            folder: Where the files are; ``$readmemh`` reads relative to it.
            files: Verilog files, relative to ``folder``.
            top: Name of the top module.
            netlist: The file to write.
            split: Name of the module whose instances are synthesized one by one; the top module's by default.
            progress: Told (done, all, what).

        Raises:
            ToolchainError: yosys is missing, failed, or took too long.
        """
        design = elaborate(folder, files, top, timeout_s=self.timeout_s)
        instances = design.instances(f"\\{split or top}")
        kinds = list(dict.fromkeys(instances.values()))
        units: dict[str, Path] = {}
        reused = 0
        for done, kind in enumerate(kinds):
            if progress is not None:
                progress(done, len(kinds), "modules synthesized")
            text = design.closure(kind)
            reused += self.known(text)
            units[kind] = self.unit(text, _plain(kind))
        counted = {kind: self._cells(path) for kind, path in units.items()}
        whole = self._join(design, units, netlist)
        return Synthesis(
            whole,
            {name.removeprefix("\\"): counted[kind] for name, kind in instances.items()},
            netlist,
            reused,
            len(kinds),
        )

    def module(self, folder: Path, files: Sequence[str], top: str) -> Cells:
        """Synthesize one module by itself and return what it takes; arguments as in :meth:`circuit`."""
        design = elaborate(folder, files, top, timeout_s=self.timeout_s)
        return self._cells(self.unit(design.closure(design.top), top))

    def known(self, text: str) -> bool:
        """Tell whether a module was synthesized before."""
        return (self._place(text) / "unit.json").is_file()

    def unit(self, text: str, name: str) -> Path:
        """Return the folder with the netlist ``unit.json`` and the counts ``stat.json`` of a module.

        Args:
            text: RTLIL of a module named ``unit`` and what is below it.
            name: For messages.
        """
        place = self._place(text)
        if (place / "unit.json").is_file():
            return place
        with tempfile.TemporaryDirectory(prefix="bitwright-") as work:
            Path(work, "unit.il").write_text(text, "utf-8")
            lines = [
                "read_rtlil unit.il",
                self._map(UNIT),
                "tee -q -o stat.json stat -json",
                f"select {UNIT}",
                "write_json -selected unit.json",
            ]
            run_yosys(lines, what=f"synthesizing {name}", timeout_s=self.timeout_s, folder=Path(work))
            place.mkdir(parents=True, exist_ok=True)
            for file in ("stat.json", "unit.json"):
                _store(place / file, Path(work, file).read_bytes())
        return place

    def _map(self, top: str) -> str:
        return " ".join(part for part in (_MAP[self.series], self.options, f"-top {top}") if part)

    def _place(self, text: str) -> Path:
        if not self._version:
            self._version.append(yosys_version())
        key = f"{EDITION} {self._version[0]} {self._map('')}\n{text}"
        digest = hashlib.sha256(key.encode()).hexdigest()
        root = cache_place("synthesis") if self.cache is None else self.cache / "synthesis"
        return root / digest[:2] / digest

    def _cells(self, place: Path) -> Cells:
        return count_cells(cell_counts(place / "stat.json"), self.series)

    def _join(self, design: Elaborated, units: Mapping[str, Path], netlist: Path) -> Cells:
        """Map the top level itself and put the modules into it; returns what the whole takes."""
        with tempfile.TemporaryDirectory(prefix="bitwright-") as work:
            glue = design.below(design.top, stop=tuple(units))
            text, lines = "".join(design.modules[m] for m in glue), []
            for number, (kind, place) in enumerate(units.items()):
                text = text.replace(f"cell {kind} ", f"cell \\{UNIT}_{number} ")
                lines += [f"read_json {place / 'unit.json'}", f"rename {UNIT} {UNIT}_{number}"]
            Path(work, "top.il").write_text(text, "utf-8")
            top = design.top.removeprefix("\\")
            lines += [
                f"setattr -mod -set blackbox 1 {UNIT}_*" if units else "",
                "read_rtlil top.il",
                self._map(top),
                f"setattr -mod -unset blackbox ={UNIT}_*" if units else "",
                f"hierarchy -top {top}",
                "flatten",
                "opt_clean -purge",
                "tee -q -o stat.json stat -json",
                f"select {top}",
                "write_json -selected whole.json",
            ]
            run_yosys(lines, what="joining the circuit", timeout_s=self.timeout_s, folder=Path(work))
            shutil.copyfile(Path(work, "whole.json"), netlist)
            return count_cells(cell_counts(Path(work, "stat.json")), self.series)


def elaborate(folder: Path, files: Sequence[str], top: str, *, timeout_s: float) -> Elaborated:
    """Return a design with its parameters put in.

    Raises:
        ToolchainError: yosys refused it.
    """
    with tempfile.TemporaryDirectory(prefix="bitwright-") as work:
        text = Path(work, "design.il")
        lines = [
            *(f"read_verilog -sv {name}" for name in files),
            f"hierarchy -check -top {top}",
            "proc",
            "opt_clean",
            "setattr -unset src *",
            "setattr -mod -unset src *",
            f"write_rtlil {text}",
        ]
        run_yosys(lines, what=f"elaborating {top}", timeout_s=timeout_s, folder=folder)
        return Elaborated(f"\\{top}", _modules(text.read_text("utf-8")))


def _modules(text: str) -> dict[str, str]:
    """Cut RTLIL into its modules; attributes in front belong to the module behind them."""
    found: dict[str, str] = {}
    lines: list[str] = []
    name = ""
    for line in text.splitlines(keepends=True):
        if line.startswith(("#", "autoidx")):
            continue
        lines.append(line)
        if line.startswith("module "):
            name = line.split()[1]
        elif line.rstrip() == "end" and not line.startswith(" "):
            found[name] = "".join(lines)
            lines = []
    return found


def _store(path: Path, data: bytes) -> None:
    """Write a file of the cache so that other processes see all of it or nothing."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_bytes(data)
    part.replace(path)


def cell_counts(path: Path) -> dict[str, int]:
    """Return the cells by type that ``stat -json`` counted.

    Raises:
        ToolchainError: The file is no such report.
    """
    try:
        report = json.loads(path.read_text("utf-8"))
        counts = report["design"]["num_cells_by_type"]
        return {str(name): int(count) for name, count in counts.items()}
    except (KeyError, ValueError, TypeError) as error:
        msg = f"no counts of cells in yosys' report: {error!r}"
        raise ToolchainError(msg, where=str(path), fix="use a yosys from 0.60 on") from error


def _renumbered(text: str) -> str:
    """Return RTLIL whose made-up names do not depend on what else was in the design: counted anew from one."""
    known: dict[str, str] = {}
    return _COUNTED.sub(lambda found: known.setdefault(found[0], f"${len(known) + 1}"), text)


def _plain(name: str) -> str:
    """Return a module's name without what stands for its parameters."""
    return name.rsplit("\\", 1)[-1]
