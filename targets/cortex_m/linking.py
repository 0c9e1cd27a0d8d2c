"""From the files of a static executor to programs for a board, by ziglang's clang and lld."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from importlib.resources import as_file, files
from importlib.util import find_spec
from pathlib import Path

from bitwright.compiler.errors import InfeasibleBudgetError, ToolchainError
from bitwright.targets.cortex_m.boards import HARNESS_SECTION, board_of, linker_script
from bitwright.targets.cortex_m.elf import loaded_sections
from bitwright.targets.schema import Profile
from bitwright.targets.toolchain.linker import Driver

# Ziglang's names of the processors, with the floating-point units that they may have.
ZIG_CPUS = {
    "cortex-m4": "cortex_m4+vfp4d16sp",
    "cortex-m7": "cortex_m7+fp_armv8d16sp",
    "cortex-m55": "cortex_m55",
}
FLAGS = ("-Os", "-ffreestanding", "-fno-builtin", "-fno-unwind-tables", "-fno-asynchronous-unwind-tables")
SECTIONS = ("-ffunction-sections", "-fdata-sections", "-fno-sanitize=all", "-fno-stack-protector")
HARNESS_FILES = ("harness.c", "support.c")
PROGRAM_FILE, TRACED_FILE, SCRIPT_FILE = "runner", "runner_traced", "board.ld"


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
    target = ("-target", "thumb-freestanding-eabihf", f"-mcpu={cpu}")
    return Driver((sys.executable, "-m", "ziglang", "cc", *target), is_zig=True)


def link_static(objects: Sequence[Path], folder: Path, profile: Profile) -> str:
    """Put the sources into a bundle's ``lib`` and build the programs for the profile's board.

    Args:
        objects: The files of a static executor.
        folder: Receives them, the harness, the linker script and the two programs.
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
        for name in HARNESS_FILES:
            shutil.copyfile(board_folder / name, folder / name)
    driver = find_compiler(profile)
    board = board_of(profile)
    if board is not None:
        (folder / SCRIPT_FILE).write_text(linker_script(board))
        _build(driver, folder, PROGRAM_FILE, ())
        _build(driver, folder, TRACED_FILE, ("-DNET_TRACE",))
        _check_flash(folder / PROGRAM_FILE, profile)
    return driver.version()


def flash_bytes(program: Path) -> dict[str, int]:
    """Return the flash that a network takes, by kind; the harness and its vector table do not count."""
    sections = loaded_sections(program)
    constants = sections.get(".rodata", 0)
    other = sum(
        size for name, size in sections.items() if name not in (HARNESS_SECTION, ".vectors", ".rodata")
    )
    return {"code_bytes": other, "constant_bytes": constants, "flash_bytes": other + constants}


def _check_flash(program: Path, profile: Profile) -> None:
    limit, used = profile.limits.flash_bytes, flash_bytes(program)
    if limit is not None and used["flash_bytes"] > limit:
        what = (
            f"the network needs {used['flash_bytes']} bytes of flash ({used['code_bytes']} code, "
            f"{used['constant_bytes']} constants); the target has {limit:.0f}"
        )
        raise InfeasibleBudgetError(
            what, where=profile.name, fix="a smaller model, or a target with more flash"
        )


def _build(driver: Driver, folder: Path, program: str, defines: Sequence[str]) -> None:
    sources = sorted(p for p in folder.glob("*.c"))
    with tempfile.TemporaryDirectory(prefix="bitwright-link-") as work:
        compiled = []
        for source in sources:
            target = Path(work) / f"{source.stem}.o"
            command = [*driver.command, *FLAGS, *SECTIONS, *defines, "-c", str(source), "-o", str(target)]
            driver.run(command, f"compiling {source.name}")
            compiled.append(str(target))
        kernels = [str(p) for p in sorted(folder.glob("*.o"))]
        link = ["-nostartfiles", "-T", str(folder / SCRIPT_FILE), "-Wl,--gc-sections", "-Wl,-e,reset", "-s"]
        driver.run(
            [*driver.command, *link, *compiled, *kernels, "-o", str(folder / program)],
            f"linking {program}",
        )
