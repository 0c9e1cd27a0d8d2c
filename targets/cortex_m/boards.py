"""Boards that qemu-system-arm emulates: their memories, and the linker script for them."""

from __future__ import annotations

from dataclasses import dataclass

from bitwright.compiler.errors import ProfileError, nearest
from bitwright.targets.schema import Profile

STACK_BYTES = 16384
# The harness is linked into sections of its own: what is left is the network's.
HARNESS_SECTION = ".harness"


@dataclass(frozen=True)
class Region:
    """A memory of a board: first address and bytes."""

    origin: int
    length: int


@dataclass(frozen=True)
class Board:
    """What the linker and the timer need to know.

    Attributes:
        cpu: LLVM's name of its processor.
        code: Where the vector table and code lie.
        constants: Where constants lie; may be the same memory.
        ram: Where the arena, inputs, outputs and the stack lie.
        timer_hz: Clock of the system timer.
    """

    cpu: str
    code: Region
    constants: Region
    ram: Region
    timer_hz: int


_MPS2 = Region(0, 4 << 20)
_MPS2_RAM = Region(0x20000000, 4 << 20)
BOARDS = {
    "mps2-an386": Board("cortex-m4", _MPS2, _MPS2, _MPS2_RAM, 25_000_000),
    "mps2-an500": Board("cortex-m7", _MPS2, _MPS2, _MPS2_RAM, 25_000_000),
    "mps3-an547": Board(
        "cortex-m55",
        Region(0, 512 << 10),
        Region(0x01000000, 2 << 20),
        Region(0x20000000, 512 << 10),
        32_000_000,
    ),
}


def board_of(profile: Profile) -> Board | None:
    """Return the board that a profile's artifacts are executed on, or None if it names none.

    Raises:
        ProfileError: It names an unknown one.
    """
    emulator = profile.toolchain.emulator
    if emulator is None or emulator.board is None:
        return None
    if emulator.board not in BOARDS:
        msg = f"unknown board '{emulator.board}'"
        raise ProfileError(msg, where=profile.name, fix=nearest(emulator.board, tuple(BOARDS)))
    return BOARDS[emulator.board]


def linker_script(board: Board) -> str:
    """Return the linker script of a board."""
    regions = {"CODE": ("rx", board.code), "RAM": ("rw", board.ram)}
    constants = "CODE"
    if board.constants != board.code:
        regions["CONSTANTS"] = ("r", board.constants)
        constants = "CONSTANTS"
    memory = "\n".join(
        f"  {name} ({access}) : ORIGIN = {region.origin:#x}, LENGTH = {region.length:#x}"
        for name, (access, region) in regions.items()
    )
    return _SCRIPT.format(memory=memory, constants=constants, stack=STACK_BYTES, harness=HARNESS_SECTION)


_SCRIPT = """MEMORY
{{
{memory}
}}
ENTRY(reset)
SECTIONS
{{
  .vectors : {{ KEEP(*(.vectors)) }} > CODE
  {harness} : {{ *harness*.o(.text* .rodata*) }} > CODE
  .text : {{ *(.text*) }} > CODE
  .rodata : {{ *(.rodata*) *(.data.rel.ro*) }} > {constants}
  .data : {{ *(.data*) }} > RAM AT > CODE
  .bss (NOLOAD) : ALIGN(16) {{ __bss_start = .; *(.bss*) *(COMMON) . = ALIGN(4); __bss_end = .; }} > RAM
  .stack (NOLOAD) : ALIGN(16) {{ __stack_bottom = .; . += {stack}; __stack_top = .; }} > RAM
  /DISCARD/ : {{ *(.ARM.exidx*) *(.ARM.extab*) *(.comment) *(.debug*) }}
}}
"""
