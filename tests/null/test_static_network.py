"""Memory plans, limits and the C source of static networks."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from bitwright.compiler.bundle.static_runtime import add_static_runtime
from bitwright.compiler.errors import InfeasibleBudgetError, ProfileError, ToolchainError
from bitwright.compiler.lower.static_c import emit
from bitwright.compiler.lower.static_c.network import (
    Call,
    Network,
    Place,
    Recorded,
    buffer_lifetimes,
    check_limits,
    plan_memory,
    unique_constants,
    with_stack,
    working_memory,
)
from bitwright.compiler.lower.static_c.stack import NET_RUN_BYTES
from bitwright.compiler.program.ops import Tensor
from bitwright.compiler.report.headline import memory_fact, shipped_fact
from bitwright.targets.cortex_m.boards import BOARDS, board_of, linker_script
from bitwright.targets.cortex_m.elf import loaded_sections
from bitwright.targets.loader import load_profile
from bitwright.targets.schema import Limits
from bitwright.targets.toolchain.interface import Interface

EVIL = 'x */ int evil; /* \\\n "'


def place(kind: str, index: int) -> Place:
    return Place(kind, index)  # type: ignore[arg-type]


def network() -> Network:
    """Two calls: the second reads a scratch buffer of its own, and an output is an input."""
    calls = (
        Call(
            "first",
            (place("input", 0), place("constant", 0), place("buffer", 0)),
            EVIL,
            (Recorded(0, "int8", (5,)),),
        ),
        Call("second", (place("buffer", 0), place("output", 0), place("buffer", 1)), "float operators"),
    )
    tensors = (Tensor(EVIL, (5,), "int8"), Tensor("y", (3,), "float32"), Tensor("z", (5,), "int8"))
    constants = (np.array([1.5, -0.0, np.inf, np.nan], np.float32),)
    return Network(tensors[:1], tensors[1:], (33, 100), constants, calls, ((place("input", 0), 1),))


def test_the_plan_counts_everything_that_is_in_ram() -> None:
    plan = plan_memory(network(), {"first": 8, "second": 24})
    assert [(b.first, b.last) for b in buffer_lifetimes(network())] == [(0, 1), (1, 1)]
    assert (plan.arena.size, plan.live) == (48 + 112, (48, 160))
    assert plan.io_bytes == 16 + 16 + 16  # 5, 12 and 5 bytes, each rounded up
    assert plan.ram_bytes == plan.arena.size + plan.io_bytes + plan.stack_bytes
    assert plan.constant_bytes == 16
    assert str(plan.ram_bytes) in plan.sentence()


def test_machine_code_replaces_the_estimate_of_the_stack() -> None:
    plan = plan_memory(network(), {"first": 8, "second": 24})
    known = with_stack(network(), plan, {"first": 1000, "second": 40})
    assert (known.stack_bytes, known.arena) == (NET_RUN_BYTES + 1000, plan.arena)
    assert f"#define NET_STACK_BYTES {known.stack_bytes} " in emit.header(network(), known, "net")
    assert json.loads(emit.record(network(), known))["memory"]["ram_bytes"] == known.ram_bytes


def test_the_plan_is_reported_as_that_of_every_target() -> None:
    plan = plan_memory(network(), {})
    found = working_memory(network(), plan)
    assert (found.peak_bytes, found.live_bytes, found.constant_bytes) == (plan.ram_bytes, 160, 16)
    assert [(step.function, step.live_bytes) for step in found.steps] == [("first", 48), ("second", 160)]


def test_the_report_says_what_goes_into_flash(tmp_path: Path) -> None:
    record = {"flash": {"code_bytes": 13_000, "constant_bytes": 26_800, "flash_bytes": 39_800}}
    (tmp_path / emit.RECORD_FILE).write_text(json.dumps(record))
    for name in (emit.SOURCE_FILE, emit.OBJECT_FILE, "support.c"):
        (tmp_path / name).touch()
    shipped = add_static_runtime(tmp_path, Interface((), (), {}))
    found = {
        "files": [asdict(f) for f in shipped],
        "bytes": sum(f.bytes for f in shipped),
        "model_bytes": sum(f.bytes for f in shipped),
        "functions": [{"memory": {"peak_bytes": 18_800, "live_bytes": 16_000}}],
    }
    facts = {fact.label: fact for fact in (shipped_fact(found), memory_fact(found)) if fact is not None}
    assert (facts["To ship"].value, facts["Working memory"].value) == ("39.8 kB", "18.8 kB")
    detail = "net_constants.c: 26.8 kB; net.c, net_kernels.o, support.c: 13 kB"
    assert facts["To ship"].detail == detail
    # Nothing was linked, so nobody knows.
    (tmp_path / emit.RECORD_FILE).write_text("{}")
    assert add_static_runtime(tmp_path, Interface((), (), {})) == ()


def test_a_copied_output_keeps_its_buffer_to_the_end() -> None:
    net = network()
    late = Network(net.inputs, net.outputs, net.buffers, net.constants, net.calls, ((place("buffer", 0), 1),))
    assert [(b.first, b.last) for b in buffer_lifetimes(late)] == [(0, 2), (1, 1)]


@pytest.mark.parametrize(
    ("limits", "memory"), [(Limits(ram_bytes=500.0), "RAM"), (Limits(flash_bytes=15.0), "flash")]
)
def test_a_plan_beyond_the_limits_is_refused(limits: Limits, memory: str) -> None:
    plan = plan_memory(network(), {})
    with pytest.raises(InfeasibleBudgetError, match=f"has [0-9]+ bytes of {memory}") as found:
        check_limits(plan, limits, "cortex-m4")
    assert found.value.exit_code == 4
    check_limits(plan, Limits(ram_bytes=float(plan.ram_bytes), flash_bytes=16.0), "cortex-m4")


def test_names_from_a_model_stay_inside_their_comments() -> None:
    plan = plan_memory(network(), {})
    for text in (emit.header(network(), plan, EVIL), emit.source(network(), plan, EVIL)):
        code = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
        assert "evil" in text and "evil" not in code
        assert text.count("/*") == text.count("*/")


def test_the_source_calls_in_order_and_copies_at_the_end() -> None:
    plan = plan_memory(network(), {})
    text = emit.source(network(), plan, "net")
    first, second = (f"net_arena + {plan.offset(k)}" for k in (0, 1))
    calls = [
        f"    first(inputs[0], net_constant_0, {first});",
        "    TRACE(inputs[0], 5);",
        f"    second({first}, outputs[0], {second});",
        "    __builtin_memcpy(outputs[1], inputs[0], 5);",
    ]
    at = [text.index(line) for line in calls]
    assert at == sorted(at)


def test_constants_are_written_bit_by_bit() -> None:
    text = emit.constants_source(network(), "net")
    (body,) = re.findall(r"= \{\n(.*?)\};", text, flags=re.DOTALL)
    words = [int(word) for word in body.replace(",", " ").split()]
    assert struct.pack("<4I", *words) == network().constants[0].tobytes()


def test_the_record_tells_a_trace_and_the_plan() -> None:
    plan = plan_memory(network(), {})
    record = json.loads(emit.record(network(), plan))
    assert record["memory"]["ram_bytes"] == plan.ram_bytes
    assert [c["recorded"] for c in record["calls"]] == [[{"argument": 0, "dtype": "int8", "shape": [5]}], []]


def test_equal_constants_are_kept_once() -> None:
    a, b = np.arange(4, dtype=np.int8), np.arange(4, dtype=np.int8)
    kept, numbers = unique_constants([a, a.astype(np.uint8), b])
    assert (len(kept), numbers) == (2, (0, 1, 0))


def test_every_profile_names_a_board_with_its_processor() -> None:
    for name in ("cortex-m4", "cortex-m7", "cortex-m55"):
        profile = load_profile(name)
        board = board_of(profile)
        assert board is not None and board.cpu == profile.codegen.mcpu
        assert profile.limits.ram_bytes is not None and profile.limits.ram_bytes <= board.ram.length
        assert f"LENGTH = {board.ram.length:#x}" in linker_script(board)
    assert "CONSTANTS" in linker_script(BOARDS["mps3-an547"])
    assert "CONSTANTS" not in linker_script(BOARDS["mps2-an386"])


def test_an_unknown_board_is_refused_with_the_nearest_name() -> None:
    profile = load_profile("cortex-m4")
    emulator = profile.toolchain.emulator
    assert emulator is not None
    wrong = emulator.model_copy(update={"board": "mps2-an368"})
    changed = profile.model_copy(
        update={"toolchain": profile.toolchain.model_copy(update={"emulator": wrong})}
    )
    with pytest.raises(ProfileError, match="unknown board 'mps2-an368'") as found:
        board_of(changed)
    assert "mps2-an386" in found.value.fix


def test_a_file_that_is_no_elf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "program"
    path.write_bytes(b"MZ" + bytes(60))
    with pytest.raises(ToolchainError, match="no 32-bit little-endian ELF"):
        loaded_sections(path)
