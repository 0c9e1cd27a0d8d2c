"""Shipped profiles, inheritance, the JSON Schema and the detection of the host."""
# ruff: noqa: E501 - texts of files stay unbroken

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from bitwright.compiler.errors import ProfileError, UsageError
from bitwright.targets import verbs
from bitwright.targets.checks import DEFAULT_PROVENANCE, longest_reduction
from bitwright.targets.extends import NUMBER_SECTIONS
from bitwright.targets.loader import (
    HOST,
    builtin_files,
    fragment_files,
    inspect_profile,
    is_abstract,
    list_profiles,
    load_profile,
    profile_names,
)
from bitwright.targets.schema import FAMILIES, Profile
from bitwright.targets.x86_cpu.detect import choose_base, describe, read_caches, read_machine
from bitwright.targets.yaml_reader import parse, read_file

ROOT = Path(__file__).parents[2]
SHIPPED = [name for name in profile_names() if name != HOST]

TEN_LINES = """schema: 1
name: my-board
extends: arm-cortex-a76
description: Four A76 cores and 2 GB.
clock_hz: 1.8e+9
memory:
  - {name: l3, remove: true}
  - {name: dram, size_bytes: 2.0e+9}
limits: {ram_bytes: 2.0e+9}
provenance: {clock_hz: {source: board manual, confidence: datasheet}, memory: {source: manual, confidence: datasheet}}
"""


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profile_loads_and_round_trips(name: str, tmp_path: Path) -> None:
    profile = load_profile(name)
    assert profile.name == name == builtin_files()[name].stem
    assert builtin_files()[name].parent.parent.name == profile.family
    copy = tmp_path / "copy.yaml"
    copy.write_text(verbs.show(name), "utf-8")
    assert load_profile(copy) == profile


@pytest.mark.parametrize("name", SHIPPED)
def test_every_number_has_a_real_source(name: str) -> None:
    sources = load_profile(name).provenance
    for section in NUMBER_SECTIONS:
        assert sources[section].source != DEFAULT_PROVENANCE["source"]
        assert len(sources[section].source) > 10


@pytest.mark.parametrize("name", SHIPPED)
def test_int8_outruns_float_at_peak(name: str) -> None:
    profile = load_profile(name)
    integer = [r.macs_per_cycle for r in profile.compute if r.acc == "s32"]
    floating = [r.macs_per_cycle for r in profile.compute if r.acc == "f32"]
    assert max(integer) >= max(floating)
    assert all(r.saturates is False for r in profile.compute)


def test_names_and_summaries() -> None:
    assert profile_names() == (
        "arm-cortex-a53",
        "arm-cortex-a7",
        "arm-cortex-a72",
        "arm-cortex-a76",
        "arm-neoverse-n2",
        "artix-7-100t",
        "cortex-m4",
        "cortex-m55",
        "cortex-m7",
        "ecp5-25f",
        "ecp5-45f",
        "ecp5-85f",
        "ethos-u55-128",
        "ethos-u55-256",
        "ethos-u55-64",
        "ethos-u65-512",
        "ethos-u85-2048",
        "ethos-u85-256",
        "host",
        "npu-16x16",
        "npu-8x8",
        "nvidia-a100",
        "nvidia-ada",
        "nvidia-h100",
        "nvidia-orin",
        "x86-amx",
        "x86-avx2",
        "x86-avx512-vnni",
        "zynq-7020",
    )
    summaries = {s.name: s for s in list_profiles()}
    assert set(summaries) >= set(SHIPPED)
    assert summaries["arm-cortex-a53"].family == "arm_cpu"


def test_every_shipped_part_is_marked_abstract_or_a_target() -> None:
    for path in fragment_files().values():
        assert is_abstract(read_file(path, path.name))
    for base in ("x86-base", "arm-base", "gpu-base"):
        with pytest.raises(ProfileError, match="abstract profile"):
            load_profile(base)


def test_family_list_and_schema_agree() -> None:
    assert get_args(Profile.model_fields["family"].annotation) == FAMILIES


def test_onnxruntime_table_is_what_was_seen_to_fuse() -> None:
    ops = load_profile("x86-avx2").runtimes.onnxruntime.ops
    roles = {
        role: {op for op, rule in ops.items() if rule.role == role}
        for role in ("anchor", "follower", "carrier")
    }
    assert roles["anchor"] == {"Conv", "MatMul", "Gemm"}
    assert roles["follower"] == {
        "Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid",
    }  # fmt: skip
    assert roles["carrier"] == {
        "MaxPool", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Resize",
    }  # fmt: skip
    assert ops["MatMul"].combos[0].out == ("f32", "a8")
    assert ops["Conv"].combos[0].out == ("a8",)
    assert ops["Concat"].scales == "unified"


@pytest.mark.parametrize("name", SHIPPED)
def test_float_islands_are_absent_everywhere(name: str) -> None:
    profile = load_profile(name)
    for runtime in (profile.runtimes.artifact, profile.runtimes.onnxruntime):
        islands = {"Softmax", "LayerNormalization", "Gelu", "Erf"}
        # Where nothing is computed in float, a Softmax of 8 bits is the only one there is.
        allowed = {"Softmax"} if runtime.integer_only else set()
        assert islands & set(runtime.ops) <= allowed


def test_activations_are_unsigned_on_x86_and_signed_on_arm() -> None:
    assert {n: load_profile(n).qspace("a8").signed for n in SHIPPED} == {
        n: not n.startswith("x86") for n in SHIPPED
    }


def test_avx2_asks_onnxruntime_for_its_exact_product() -> None:
    config = load_profile("x86-avx2").runtimes.onnxruntime.session_config
    assert config["session.x64quantprecision"] == "1"
    assert "session.x64quantprecision" not in load_profile("x86-amx").runtimes.onnxruntime.session_config


# ------------------------------------------------------------------------------------------------ extends


def test_ten_lines_describe_a_board(tmp_path: Path) -> None:
    assert len(TEN_LINES.splitlines()) == 10
    path = tmp_path / "my-board.yaml"
    path.write_text(TEN_LINES, "utf-8")
    board, base = load_profile(path), load_profile("arm-cortex-a76")
    assert board.clock_hz == 1.8e9
    assert [(m.name, m.size_bytes) for m in board.memory] == [("l1d", 65536), ("l2", 524288), ("dram", 2e9)]
    assert board.memory[2].bytes_per_s == base.memory[3].bytes_per_s
    assert board.provenance["compute"] == base.provenance["compute"]
    assert board.provenance["clock_hz"].source == "board manual"
    assert board.runtimes == base.runtimes


def test_the_documented_example_is_the_tested_one() -> None:
    assert TEN_LINES in (ROOT / "docs" / "target-profile.md").read_text("utf-8")


def test_new_rows_stand_where_they_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "b.yaml"
    path.write_text(
        "schema: 1\nname: b\nextends: arm-cortex-a76\ndescription: d\n"
        "memory:\n  - {name: l0, size_bytes: 1024, bytes_per_s: 1.0e+12}\n  - {name: l3}\n"
        "  - {name: l4, size_bytes: 4194304, bytes_per_s: 1.0e+10}\n"
        "provenance: {memory: {source: made up, confidence: estimate}}\n",
        "utf-8",
    )
    found = inspect_profile(path)
    assert [f.what for f in found.findings] == ["'l0' is listed behind 'l2' but is not larger"]
    fixed = path.read_text("utf-8").replace("  - {name: l3}\n", "  - {name: l1d}\n  - {name: l3}\n")
    path.write_text(fixed, "utf-8")
    assert [m.name for m in load_profile(path).memory] == ["l0", "l1d", "l2", "l3", "l4", "dram"]


def test_later_parents_win_and_files_in_the_folder_can_be_extended(tmp_path: Path) -> None:
    (tmp_path / "fast.yaml").write_text(
        "schema: 1\nabstract: true\ncores: 2\nlimits: {max_rank: 5}\n", "utf-8"
    )
    (tmp_path / "b.yaml").write_text(
        "schema: 1\nname: b\nextends: [x86-avx2, fast.yaml]\ndescription: d\nlimits: {max_rank: null}\n",
        "utf-8",
    )
    board = load_profile(tmp_path / "b.yaml")
    assert (board.cores, board.limits.max_rank) == (2, 6)


def test_defaults_are_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text(
        "schema: 1\nname: b\nextends: x86-avx2\ndescription: d\nefficiency: null\n", "utf-8"
    )
    board = load_profile(tmp_path / "b.yaml")
    assert board.efficiency.gemm == 0.5
    assert board.provenance["efficiency"].model_dump(exclude_none=True) == DEFAULT_PROVENANCE


def test_longest_reduction_by_hand() -> None:
    x86, arm = load_profile("x86-avx2"), load_profile("arm-cortex-a53")
    # u8 - zero point is at most 255, s8 - zero point too; narrow s8 is at most 127.
    assert longest_reduction(x86.qspace("a8"), x86.qspace("w8"), "s32") == (2**31 - 1) // (255 * 127)
    assert longest_reduction(arm.qspace("a8"), arm.qspace("w8"), "s32") == (2**31 - 1) // (255 * 127)
    wide = arm.qspace("w8").model_copy(update={"narrow": False})
    assert longest_reduction(wide, wide, "s32") == (2**31 - 1) // (128 * 128)


# -------------------------------------------------------------------------------------------------- verbs


def test_new_profile_checks_clean_and_is_never_overwritten(tmp_path: Path) -> None:
    path = verbs.new("mine", "arm-cortex-a72", tmp_path / "mine.yaml")
    text = path.read_text("utf-8")
    assert len(text.splitlines()) == 10
    assert verbs.check(path) == []
    assert load_profile(path).codegen == load_profile("arm-cortex-a72").codegen
    with pytest.raises(UsageError, match="the file exists already"):
        verbs.new("mine", "x86-avx2", path)
    assert path.read_text("utf-8") == text
    assert [p.name for p in tmp_path.iterdir()] == ["mine.yaml"]


def test_new_profile_refusals(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="did you mean 'x86-avx2'"):
        verbs.new("mine", "x86-avx3", tmp_path / "a.yaml")
    with pytest.raises(ProfileError, match="is not a profile name"):
        verbs.new("x: 1\ny", "x86-avx2", tmp_path / "a.yaml")
    with pytest.raises(UsageError, match=r"ends in \.yaml"):
        verbs.new("mine", "x86-avx2", tmp_path / "a.txt")
    with pytest.raises(UsageError, match="cannot write here"):
        verbs.new("mine", "x86-avx2", tmp_path / "none" / "a.yaml")
    assert list(tmp_path.iterdir()) == []


def test_check_returns_findings_with_places(tmp_path: Path) -> None:
    path = tmp_path / "b.yaml"
    path.write_text("schema: 1\nname: b\nextends: x86-avx2\ndescription: d\ncorse: 1\n", "utf-8")
    (finding,) = verbs.check(path)
    assert (finding.where, finding.what) == (f"{path}:5:1: corse", "unknown key 'corse'")
    path.write_text("a: [\n", "utf-8")
    assert "not valid YAML" in verbs.check(path)[0].what


def test_committed_json_schema_is_current() -> None:
    committed = json.loads((ROOT / "docs" / "target-profile.schema.json").read_text("utf-8"))
    assert committed == verbs.json_schema()
    assert committed["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def _accepts(schema: dict[str, Any], root: dict[str, Any], value: Any) -> bool:
    """A small evaluator of the keywords that pydantic writes; enough to try files against the schema."""
    if "$ref" in schema:
        return _accepts(root["$defs"][schema["$ref"].rsplit("/", 1)[1]], root, value)
    if "anyOf" in schema and not any(_accepts(s, root, value) for s in schema["anyOf"]):
        return False
    if "const" in schema and value != schema["const"]:
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    kind = schema.get("type")
    if kind in kinds and not isinstance(value, kinds[kind]):
        return False
    if kind in ("number", "integer") and (isinstance(value, bool) or not isinstance(value, int | float)):
        return False
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        extra = schema.get("additionalProperties", True)
        known = all(_accepts(properties[k], root, v) for k, v in value.items() if k in properties)
        rest = [v for k, v in value.items() if k not in properties]
        allowed = not rest if extra is False else extra is True or all(_accepts(extra, root, v) for v in rest)
        return known and allowed and all(k in value for k in schema.get("required", []))
    if isinstance(value, list) and "items" in schema:
        return all(_accepts(schema["items"], root, v) for v in value)
    return True


def test_json_schema_accepts_every_shipped_file_and_refuses_a_typo() -> None:
    schema = verbs.json_schema()
    for path in [*builtin_files().values(), *fragment_files().values()]:
        assert _accepts(schema, schema, yaml.safe_load(path.read_text("utf-8"))), path.name
    board = yaml.safe_load(TEN_LINES)
    assert _accepts(schema, schema, board)
    assert not _accepts(schema, schema, board | {"corse": 4})
    assert not _accepts(schema, schema, board | {"cores": "four"})
    assert not _accepts(schema, schema, {k: v for k, v in board.items() if k != "schema"})


# --------------------------------------------------------------------------------------------------- host

AVX2 = "avx2 fma f16c bmi1 bmi2 abm movbe"
VNNI = f"{AVX2} avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni"
ICELAKE = f"{VNNI} gfni vaes vpclmulqdq avx512_vbmi2 avx512vbmi avx512ifma avx512_bitalg avx512_vpopcntdq"
SPR = f"{ICELAKE} avx_vnni avx512_bf16 avx512_fp16 amx_tile amx_int8"


def cpuinfo(
    flags: str, model: str = "Intel(R) Xeon(R) Gold 6248 CPU @ 2.50GHz", cores: int = 2, threads: int = 2
) -> str:
    block = "processor\t: {p}\nmodel name\t: {m}\ncpu MHz\t\t: 1799.9\nphysical id\t: 0\ncore id\t\t: {c}\nflags\t\t: {f}\nbogomips\t: 5000.00\n"
    return "\n".join(block.format(p=i, m=model, c=i % cores, f=flags) for i in range(cores * threads))


def host(tmp_path: Path, flags: str, **options: Any) -> Profile:
    caches = options.pop("caches", ((1, 32768, True), (2, 1048576, True), (3, 28835840, False)))
    usable = options.pop("usable", 64)
    machine = read_machine(cpuinfo(flags, **options), "MemTotal:  16384000 kB\n", caches, usable)
    path = tmp_path / "host.yaml"
    path.write_text(describe(machine), "utf-8")
    return load_profile(path)


@pytest.mark.parametrize(
    ("flags", "mcpu", "row"),
    [
        (AVX2, "haswell", "avx2_pmaddwd"),
        (VNNI, "cascadelake", "avx512_vnni"),
        (ICELAKE, "icelake-server", "avx512_vnni"),
        (SPR, "sapphirerapids", "amx_int8"),
    ],
)
def test_host_takes_the_best_base_its_flags_allow(flags: str, mcpu: str, row: str, tmp_path: Path) -> None:
    profile = host(tmp_path, flags)
    assert (profile.codegen.mcpu, profile.compute[0].name, profile.codegen.mattr) == (mcpu, row, ())


def test_host_numbers_come_from_the_machine(tmp_path: Path) -> None:
    profile = host(tmp_path, VNNI)
    assert (profile.clock_hz, profile.cores) == (2.5e9, 2)  # two cores with two threads each
    assert [(m.name, m.size_bytes) for m in profile.memory] == [
        ("l1d", 32768),
        ("l2", 1048576),
        ("l3", 28835840),
        ("dram", 16384000 * 1024),
    ]
    assert profile.provenance["clock_hz"].source == "/proc/cpuinfo (model name), detected"
    assert "detected" in profile.provenance["memory"].source
    assert profile.provenance["compute"] == load_profile("x86-avx512-vnni").provenance["compute"]


def test_host_in_a_virtual_machine(tmp_path: Path) -> None:
    flags = SPR.replace(" avx512_fp16", "") + " hypervisor"
    profile = host(tmp_path, flags, model="Virtual CPU", usable=1)
    assert profile.codegen.mattr == ("-avx512fp16",)  # hidden by the hypervisor, so LLVM must not emit it
    assert profile.clock_hz == 2.5e9
    assert profile.cores == 1
    assert profile.memory[2].size_bytes == 4 * 1024 * 1024
    assert "a virtual machine" in profile.provenance["memory"].source


def test_host_without_cache_listing_keeps_the_base_caches(tmp_path: Path) -> None:
    profile = host(tmp_path, VNNI, caches=())
    assert [m.name for m in profile.memory] == ["l1d", "l2", "l3", "dram"]
    assert profile.memory[0] == load_profile("x86-avx512-vnni").memory[0]


def test_host_without_l3(tmp_path: Path) -> None:
    profile = host(tmp_path, AVX2, caches=((1, 32768, True), (2, 524288, True)))
    assert [m.name for m in profile.memory] == ["l1d", "l2", "dram"]


def test_odd_model_name_cannot_break_the_yaml(tmp_path: Path) -> None:
    assert "#1: {x}" in host(tmp_path, AVX2, model="CPU '\"#1: {x}").description


def test_machines_that_cannot_be_described(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ProfileError, match=r"host: this processor lacks avx2, fma\n  fix: use a machine with AVX2"
    ):
        choose_base(frozenset({"f16c", "bmi1", "bmi2", "abm", "movbe"}))
    with pytest.raises(ProfileError, match="lists no CPU flags"):
        read_machine("processor : 0\n", "", (), 1)
    with pytest.raises(ProfileError, match="names no clock"):
        read_machine("flags : avx2\n", "", (), 1)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(
        ProfileError, match="host: the host profile describes x86 Linux machines; this one is"
    ):
        load_profile(HOST)
    assert HOST not in [s.name for s in list_profiles()]


def test_caches_are_read_from_sys(tmp_path: Path) -> None:
    listed = [
        ("1", "Data", "48K"),
        ("1", "Instruction", "64K"),
        ("2", "Unified", "2048K"),
        ("3", "Unified", "32M"),
    ]
    for i, (level, kind, size) in enumerate(listed):
        folder = tmp_path / f"index{i}"
        folder.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(f"{text}\n", "ascii")
    assert read_caches(tmp_path) == ((1, 49152, True), (2, 2097152, True), (3, 33554432, False))
    assert read_caches(tmp_path / "none") == ()


# ------------------------------------------------------------------------------------------------- reader


def test_good_yaml_keeps_values_and_places() -> None:
    root = parse(
        "a: 1\nb: [2.5, 'no', \"1.20\"]\nc: {d: true, e: null}\nf: 2.0e+9\ng: -3\nh: text here\n", "p.yaml"
    )
    values = [getattr(n, "value", None) for n in root.entries.values()]
    assert values == [1, None, None, 2e9, -3, "text here"]
    assert [i.value for i in root.entries["b"].items] == [2.5, "no", "1.20"]  # type: ignore[union-attr]
    assert str(root.entries["b"].items[1].mark) == "p.yaml:2:10"  # type: ignore[union-attr]


def test_the_reader_agrees_with_pyyaml_on_everything_shipped() -> None:
    from bitwright.targets.schema_errors import plain

    for path in [*builtin_files().values(), *fragment_files().values()]:
        assert plain(read_file(path, path.name)) == yaml.safe_load(path.read_text("utf-8")), path.name


def test_documentation_names_every_key() -> None:
    text = (ROOT / "docs" / "target-profile.md").read_text("utf-8")
    schema = verbs.json_schema()
    keys = set(schema["properties"]) | {k for d in schema["$defs"].values() for k in d.get("properties", {})}
    assert sorted(k for k in keys if not re.search(rf"`([a-z_.]*\.)?{re.escape(k)}`", text)) == []
