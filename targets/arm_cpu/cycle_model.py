"""Cycles of code blocks in LLVM's model of a processor: a static estimate, not a measurement.

``llvm-mca`` knows a core's pipelines and latencies, and neither caches nor branch prediction; each block is taken as
if it repeated itself. It ranks inner loops that compute; it predicts no latency and was not compared with silicon.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bitwright.compiler.errors import ToolchainError
from bitwright.targets.arm_cpu.counting import INSTRUCTION_BYTES
from bitwright.targets.toolchain.process import run_tool

TRIPLE = "aarch64-linux-gnu"
FEATURES = "+dotprod,+i8mm,+fullfp16,+bf16"
ITERATIONS = 50
TIMEOUT_S = 300.0
# Cores without a model in LLVM, whose own entry there is that of an older one: the sibling that has one.
SIBLINGS = {"cortex-a76": "neoverse-n1"}
_ENCODED = re.compile(r"^\s*(?P<text>\S.*?)\s*// encoding: \[(?P<bytes>[0-9a-fx,]+)\]")


@dataclass(frozen=True)
class CycleModel:
    """LLVM's tools and the core they are asked about.

    Attributes:
        disassembler, analyzer: Paths of llvm-mc and llvm-mca, of one version.
        version: Theirs.
        core: Name of the core in LLVM.
    """

    disassembler: str
    analyzer: str
    version: str
    core: str

    @property
    def name(self) -> str:
        """Say what the cycles come from."""
        return f"llvm-mca {self.version} of {self.core}"

    def cycles(self, codes: Collection[bytes]) -> Mapping[bytes, float]:
        """Return the cycles that one execution of each block of code takes.

        Raises:
            ToolchainError: A tool failed.
        """
        blocks = sorted(set(codes))
        words = {
            code[at : at + INSTRUCTION_BYTES]
            for code in blocks
            for at in range(0, len(code), INSTRUCTION_BYTES)
        }
        texts = self._disassemble(sorted(words))
        found = self._analyze([_lines(code, texts) for code in blocks])
        return dict(zip(blocks, found, strict=True))

    def _disassemble(self, words: Sequence[bytes]) -> Mapping[bytes, str]:
        """Return the text of every instruction that LLVM knows."""
        listing = "\n".join(" ".join(f"0x{byte:02x}" for byte in word) for word in words)
        options = ["--disassemble", f"-triple={TRIPLE}", "-mattr=+all", "--show-encoding"]
        printed = _with_input(listing, [self.disassembler, *options], "disassembling blocks")
        found = {}
        for line in printed.splitlines():
            match = _ENCODED.match(line)
            if match:
                found[bytes(int(byte, 16) for byte in match["bytes"].split(","))] = match["text"]
        return found

    def _analyze(self, blocks: Sequence[Sequence[str]]) -> list[float]:
        regions = [
            "\n".join((f"# LLVM-MCA-BEGIN {number}", *lines, f"# LLVM-MCA-END {number}"))
            for number, lines in enumerate(blocks)
            if lines
        ]
        options = [
            f"-mtriple={TRIPLE}",
            f"-mcpu={self.core}",
            f"-mattr={FEATURES}",
            f"-iterations={ITERATIONS}",
        ]
        if int(self.version.split(".")[0]) >= 19:
            options.append("-skip-unsupported-instructions=any")
        command = [self.analyzer, *options, "-json", "-instruction-info=0", "-resource-pressure=0"]
        report = json.loads(_with_input("\n".join(regions) + "\n", command, "modelling cycles"))
        known = {r["Name"]: r["SummaryView"]["TotalCycles"] / ITERATIONS for r in report["CodeRegions"]}
        return [float(known.get(str(number), len(lines))) for number, lines in enumerate(blocks)]


def _lines(code: bytes, texts: Mapping[bytes, str]) -> list[str]:
    words = (code[at : at + INSTRUCTION_BYTES] for at in range(0, len(code), INSTRUCTION_BYTES))
    return [texts[word] for word in words if word in texts]


def _with_input(text: str, command: Sequence[str], what: str) -> str:
    with tempfile.TemporaryDirectory(prefix="bitwright-cycles-") as work:
        file = Path(work, "input")
        file.write_text(text)
        return run_tool([*command, str(file)], what=what, timeout_s=TIMEOUT_S)


@cache
def find_cycle_model(mcpu: str) -> CycleModel:
    """Return the newest LLVM's model of a core.

    Raises:
        ToolchainError: There is no llvm-mca, or it does not know the core.
    """
    suffixes = [*(f"-{version}" for version in range(30, 13, -1)), ""]
    for suffix in suffixes:
        paths = [shutil.which(f"{tool}{suffix}") for tool in ("llvm-mc", "llvm-mca")]
        if paths[0] and paths[1]:
            return CycleModel(
                paths[0], paths[1], _version(paths[1]), _core(paths[1], SIBLINGS.get(mcpu, mcpu))
            )
    msg = "llvm-mc and llvm-mca are not installed"
    raise ToolchainError(
        msg, where="modelling cycles", fix="apt-get install llvm-19, or any version from 14 on"
    )


def _version(analyzer: str) -> str:
    printed = run_tool([analyzer, "--version"], what="asking llvm-mca's version", timeout_s=TIMEOUT_S)
    match = re.search(r"LLVM version (\d+(?:\.\d+)*)", printed)
    return match[1] if match else "0"


def _core(analyzer: str, mcpu: str) -> str:
    """Return ``mcpu`` if the tool has a scheduling model for it."""
    try:
        _with_input("nop\n", [analyzer, f"-mtriple={TRIPLE}", f"-mcpu={mcpu}"], f"asking for {mcpu}")
    except ToolchainError as error:
        msg = f"{Path(analyzer).name} has no model of '{mcpu}': {error.what}"
        raise ToolchainError(msg, where="modelling cycles", fix="install a newer LLVM") from error
    return mcpu
