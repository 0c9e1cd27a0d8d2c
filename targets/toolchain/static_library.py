"""A model as a static archive: kernels, weights and the table that hands them to TVM's runtime.

All global symbols get the model's name as a prefix, so that one program can hold several models.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bitwright.compiler.errors import ToolchainError
from bitwright.targets.toolchain.linker import compile_object, is_native, machine_of
from bitwright.targets.toolchain.process import run_tool

FUNCTION_PREFIX = "__tvm_ffi_"
LIBRARY_BIN = "__tvm_ffi__library_bin"
TOOL_TIMEOUT_S = 300.0
# What an archive cannot be called: words of C and C++, names its own source uses, libraries that programs link.
_RESERVED = """
alignas alignof and asm auto bool break case catch char class concept const consteval constexpr constinit
const_cast continue decltype default delete do double dynamic_cast else enum explicit export extern false float
for friend goto if inline int long mutable namespace new noexcept not nullptr operator or private protected public
register reinterpret_cast requires restrict return short signed sizeof static static_assert static_cast struct
switch template this thread_local throw true try typedef typeid typename typeof union unsigned using virtual void
volatile wchar_t while xor
main text register_symbols
c dl gcc m pthread rt bitwright_runtime tvm_ffi tvm_runtime
"""
RESERVED_NAMES = frozenset(_RESERVED.split())
HEADER = """/* The model in lib{name}.a: bw_open_embedded(&{name}, &model), or bitwright::Model model({name}). */
#ifndef BITWRIGHT_MODEL_{name}_H_
#define BITWRIGHT_MODEL_{name}_H_
#include "bitwright_runtime.h"
#ifdef __cplusplus
extern "C"
#else
extern
#endif
const bw_embedded {name};
#endif
"""


@dataclass(frozen=True)
class Binutils:
    """Programs that work on object files of one machine."""

    nm: str
    objcopy: str
    ar: str


def find_binutils(triple: str) -> Binutils:
    """Return nm, objcopy and ar for a machine: its own, the cross ones, or LLVM's.

    Raises:
        ToolchainError: One is missing.
    """
    prefix = "" if is_native(triple) else f"{machine_of(triple)}-linux-gnu-"
    found = {}
    for name in ("nm", "objcopy", "ar"):
        program = shutil.which(prefix + name) or shutil.which(f"llvm-{name}")
        if program is None:
            msg = f"a static archive for {triple} needs '{prefix}{name}' or 'llvm-{name}'"
            raise ToolchainError(
                msg, where="--static", fix="install binutils for that machine, or leave --static out"
            )
        found[name] = program
    return Binutils(**found)


def archive_model(objects: Sequence[Path], folder: Path, name: str, text: str, triple: str) -> None:
    """Write ``libNAME.a`` and ``NAME.h``.

    Args:
        objects: Object files of the model.
        folder: Receives the two files; its ``include`` holds the runtime's header.
        name: A C identifier; symbols begin with it.
        text: Content of model.txt.
        triple: The machine they are for.

    Raises:
        ToolchainError: A tool is missing or failed.
    """
    tools = find_binutils(triple)
    with tempfile.TemporaryDirectory(prefix="bitwright-static-") as work:
        renamed, symbols = [], list[str]()
        for number, source in enumerate(objects):
            target = Path(work, f"{name}_{number}.o")
            symbols += _rename(tools, source, target, f"{name}_")
            renamed.append(target)
        table = Path(work, f"{name}_table.c")
        table.write_text(_table(name, symbols, text))
        compiled = table.with_suffix(".o")
        compile_object(table, compiled, triple, include=folder / "include")
        archive(tools, folder / f"lib{name}.a", [*renamed, compiled])
    (folder / "include" / f"{name}.h").write_text(HEADER.format(name=name))


def archive(tools: Binutils, target: Path, objects: Sequence[Path]) -> None:
    """Write a static archive; equal objects give equal bytes."""
    target.unlink(missing_ok=True)
    command = [tools.ar, "rcsD", str(target), *map(str, objects)]
    run_tool(command, what=f"making {target.name}", timeout_s=TOOL_TIMEOUT_S)


def _rename(tools: Binutils, source: Path, target: Path, prefix: str) -> list[str]:
    """Copy an object file with ``prefix`` before its global symbols; returns these, as they were."""
    command = [tools.nm, "-g", "--defined-only", "-P", str(source)]
    listing = run_tool(command, what=f"reading {source.name}", timeout_s=TOOL_TIMEOUT_S)
    names = [line.split()[0] for line in listing.splitlines() if line.strip()]
    table = target.with_suffix(".names")
    table.write_text("".join(f"{name} {prefix}{name}\n" for name in names))
    command = [tools.objcopy, f"--redefine-syms={table}", str(source), str(target)]
    run_tool(command, what=f"renaming symbols of {source.name}", timeout_s=TOOL_TIMEOUT_S)
    return names


def _table(name: str, symbols: Sequence[str], text: str) -> str:
    """Return the C file that registers the symbols as TVM looks them up: prefix, then name."""
    prefix = f"{name}_"
    wanted = [s for s in symbols if s.startswith((FUNCTION_PREFIX, "__TVM"))]
    declared = "".join(f"extern char {prefix}{symbol}[];\n" for symbol in wanted)
    rows = "".join(
        f'  TVMFFIEnvModRegisterSystemLibSymbol("{_key(prefix, s)}", {prefix}{s});\n' for s in wanted
    )
    return (
        '#include "bitwright_runtime.h"\n'
        "extern int TVMFFIEnvModRegisterSystemLibSymbol(const char* name, void* symbol);\n"
        f"{declared}static void register_symbols(void) {{\n{rows}}}\n"
        f"static const char text[] =\n{_literal(text)};\n"
        f'const bw_embedded {name} = {{text, "{prefix}", register_symbols}};\n'
    )


def _key(prefix: str, symbol: str) -> str:
    if symbol.startswith(FUNCTION_PREFIX) and symbol != LIBRARY_BIN:
        return FUNCTION_PREFIX + prefix + symbol.removeprefix(FUNCTION_PREFIX)
    return prefix + symbol


def _literal(text: str) -> str:
    """Return printable ASCII lines as a C string."""
    lines = (line.replace("\\", "\\\\").replace('"', '\\"').replace("?", "\\?") for line in text.splitlines())
    return "\n".join(f'  "{line}\\n"' for line in lines)
