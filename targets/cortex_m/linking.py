"""From the files of a static executor to programs for a board or for Linux, by ziglang's clang and lld."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from importlib.util import find_spec
from pathlib import Path

from bitwright.compiler.errors import InfeasibleBudgetError, ToolchainError
from bitwright.compiler.lower.static_c.emit import RECORD_FILE
from bitwright.targets.cortex_m.boards import HARNESS_SECTION, board_of, linker_script
from bitwright.targets.cortex_m.elf import loaded_sections
from bitwright.targets.schema import Profile
from bitwright.targets.toolchain.linker import Driver

# Ziglang's names of the processors, with the floating-point units that they may have.
ZIG_CPUS = {
    "cortex-m4": "cortex_m4+vfp4d16sp",
    "cortex-m7": "cortex_m7+fp_armv8d16sp",
    "cortex-m55": "cortex_m55",
    "cortex-a7": "cortex_a7",
}
FLAGS = ("-Os", "-fno-unwind-tables", "-fno-asynchronous-unwind-tables")
SECTIONS = ("-ffunction-sections", "-fdata-sections", "-fno-sanitize=all", "-fno-stack-protector")
BARE_METAL = ("-ffreestanding", "-fno-builtin")
HARNESS, LINUX_HARNESS, SUPPORT = "harness.c", "linux_harness.c", "support.c"
PROGRAM_FILE, TRACED_FILE, SCRIPT_FILE = "runner", "runner_traced", "board.ld"


def is_linux(profile: Profile) -> bool:
    """Tell whether a profile's programs are started by Linux rather than by a processor's reset."""
    return "-linux-" in profile.toolchain.triple


def find_compiler(profile: Profile) -> Driver:
    """Return the compiler for a profile's processor.

    Raises:
        ToolchainError: There is none.
    """
    cpu = ZIG_CPUS.get(profile.codegen.mcpu)
    if cpu is None or find_spec("ziglang") is None:
        missing = "ziglang is not installed" if cpu else f"unknown processor '{profile.codegen.mcpu}'"
        fix = "pip install ziglang (or 'bitwright[link]')" if cpu else f"known: {', '.join(ZIG_CPUS)}"
        msg = f"no compiler for {profile.name}: {missing}"
        raise ToolchainError(msg, fix=fix)
    triple = profile.toolchain.triple if is_linux(profile) else "thumb-freestanding-eabihf"
    target = ("-target", triple, f"-mcpu={cpu}")
    return Driver((sys.executable, "-m", "ziglang", "cc", *target), is_zig=True)


def link_static(objects: Sequence[Path], folder: Path, profile: Profile) -> str:
    """Put the sources into a bundle's ``lib`` and build the programs for the profile's board, or for Linux.

    Args:
        objects: The files of a static executor.
        folder: Receives them, the harness, a board's linker script and the two programs.
        profile: Target; its flash is a limit.

    Returns:
        The compiler's name and version.

    Raises:
        ToolchainError: No compiler, or it failed.
        InfeasibleBudgetError: Code and constants need more flash than the device has.
    """
    for path in objects:
        shutil.copyfile(path, folder / path.name)
    with as_file(files("bitwright.targets.cortex_m") / "board") as board_folder:
        for name in (LINUX_HARNESS if is_linux(profile) else HARNESS, SUPPORT):
            shutil.copyfile(board_folder / name, folder / name)
    driver = find_compiler(profile)
    board = board_of(profile)
    if board is not None:
        (folder / SCRIPT_FILE).write_text(linker_script(board))
        script = ["-nostartfiles", "-T", str(folder / SCRIPT_FILE), "-Wl,-e,reset"]
        _build(driver, folder, PROGRAM_FILE, BARE_METAL, script)
        _build(driver, folder, TRACED_FILE, (*BARE_METAL, "-DNET_TRACE"), script)
        _note_flash(folder, flash_bytes(folder / PROGRAM_FILE), profile)
    elif is_linux(profile):
        used = _build(driver, folder, PROGRAM_FILE, (), ["-static"])
        _build(driver, folder, TRACED_FILE, ("-DNET_TRACE",), ["-static"])
        _note_flash(folder, used, profile)
    return driver.version()


def _note_flash(folder: Path, used: dict[str, int], profile: Profile) -> None:
    """Write into the network's record what code and constants take, and refuse too much of it."""
    _check_flash(used, profile)
    path = folder / RECORD_FILE
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "flash": used}, indent=1) + "\n")


def flash_bytes(program: Path) -> dict[str, int]:
    """Return the flash that a network takes, by kind; the harness and its vector table do not count."""
    sections = loaded_sections(program)
    return _by_kind({n: size for n, size in sections.items() if n not in (HARNESS_SECTION, ".vectors")})


def _by_kind(sections: Mapping[str, int]) -> dict[str, int]:
    constants = sum(size for name, size in sections.items() if name.startswith((".rodata", ".data.rel.ro")))
    total = sum(sections.values())
    return {"code_bytes": total - constants, "constant_bytes": constants, "flash_bytes": total}


def _check_flash(used: Mapping[str, int], profile: Profile) -> None:
    limit = profile.limits.flash_bytes
    if limit is not None and used["flash_bytes"] > limit:
        what = (
            f"the network needs {used['flash_bytes']} bytes of flash ({used['code_bytes']} code, "
            f"{used['constant_bytes']} constants); the target has {limit:.0f}"
        )
        raise InfeasibleBudgetError(
            what, where=profile.name, fix="a smaller model, or a target with more flash"
        )


def _build(
    driver: Driver, folder: Path, program: str, compiling: Sequence[str], linking: Sequence[str]
) -> dict[str, int]:
    """Compile all sources and link a program; return what the network itself takes, without harness and C library."""
    objects = sorted(folder.glob("*.o"))
    with tempfile.TemporaryDirectory(prefix="bitwright-link-") as work:
        for source in sorted(folder.glob("*.c")):
            target = Path(work) / f"{source.stem}.o"
            command = [*driver.command, *FLAGS, *SECTIONS, *compiling, "-c", str(source), "-o", str(target)]
            driver.run(command, f"compiling {source.name}")
            objects.append(target)
        link = [*linking, "-Wl,--gc-sections", "-s", *map(str, objects), "-o", str(folder / program)]
        driver.run([*driver.command, *link], f"linking {program}")
        found: Counter[str] = Counter()
        for path in objects:
            if "harness" not in path.stem:
                found.update(loaded_sections(path))
    return _by_kind(found)
