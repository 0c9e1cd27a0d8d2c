"""Broken target profiles: every message is pinned, with the line and column it points to."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitwright.compiler.errors import ProfileError
from bitwright.targets.loader import inspect_profile, load_profile, profile_names

from .bad_profiles import HEAD, refused_profile, written

BROKEN_PROFILES = {
    "unknown key": (
        HEAD + "corse: 4\n",
        "board.yaml:5:1: corse: unknown key 'corse'\n  fix: did you mean 'cores'?",
    ),
    "unknown nested key": (
        HEAD + "limits: {max_rnk: 4}\n",
        "board.yaml:5:10: limits.max_rnk: unknown key 'max_rnk'\n  fix: did you mean 'max_rank'?",
    ),
    "unknown key of a rule": (
        HEAD + "runtimes:\n  artifact:\n    ops:\n      Conv: {min_mac: 4}\n",
        "board.yaml:8:14: runtimes.artifact.ops.Conv.min_mac: unknown key 'min_mac'\n  fix: did you mean 'min_macs'?",
    ),
    "number where text is meant": (
        HEAD + "codegen: {mcpu: 1.20}\n",
        "board.yaml:5:11: codegen.mcpu: must be text, not the number 1.20\n  fix: write it in quotes: '1.20'",
    ),
    "text where a number is meant": (
        HEAD + "cores: four\n",
        "board.yaml:5:1: cores: must be an integer, not the text 'four'\n  fix: write an integer, without quotes",
    ),
    "quoted number": (
        HEAD + "cores: '4'\n",
        "board.yaml:5:1: cores: must be an integer, not the text '4'\n  fix: write an integer, without quotes",
    ),
    "fraction of a core": (
        HEAD + "cores: 1.5\n",
        "board.yaml:5:1: cores: must be an integer, not the number 1.5\n  fix: write an integer, without quotes",
    ),
    "truth value as a number": (
        HEAD + "cores: true\n",
        "board.yaml:5:1: cores: must be an integer, not true\n  fix: write an integer, without quotes",
    ),
    "minus one core": (
        HEAD + "cores: -1\n",
        "board.yaml:5:1: cores: must be at least 1, not the number -1\n  fix: correct the number",
    ),
    "0 bits": (
        HEAD + "qspaces: {a8: {bits: 0}}\n",
        "board.yaml:5:16: qspaces.a8.bits: must be 1, 2, 3, 4, 5, 6, 8 or 16, not the number 0\n"
        "  fix: known: 1, 16, 2, 3, 4, 5, 6, 8",
    ),
    "unknown family": (
        HEAD + "family: arm_cp\n",
        "board.yaml:5:1: family: must be 'x86_cpu', 'arm_cpu', 'cortex_m', 'nvidia_gpu', 'fpga', "
        "'ethos_u' or 'npu', not the text 'arm_cp'\n"
        "  fix: did you mean 'arm_cpu'?",
    ),
    "list for a mapping": (
        HEAD + "limits: [1]\n",
        "board.yaml:5:1: limits: must be a mapping, not a list\n  fix: write {key: value} or indented lines",
    ),
    "text for a list": (
        HEAD + "codegen: {mattr: +neon}\n",
        "board.yaml:5:11: codegen.mattr: must be a list, not the text '+neon'\n  fix: write [a, b]",
    ),
    "empty processor": (
        HEAD + "codegen: {mcpu: ''}\n",
        "board.yaml:5:11: codegen.mcpu: must not be empty\n  fix: write at least one entry",
    ),
    "name of a profile": (
        HEAD.replace("name: board", "name: ../board"),
        "board.yaml:2:1: name: the text '../board' is not a name\n"
        "  fix: use lower-case letters, digits, '-', '_' and '.', at most 64",
    ),
    "missing name": (
        HEAD.replace("name: board\n", ""),
        "board.yaml:1:1: name: missing key 'name'\n  fix: write 'name: ...', or extend a profile that has it",
    ),
    "deleted key that is needed": (
        HEAD + "family: null\n",
        "board.yaml:1:1: family: missing key 'family'\n  fix: write 'family: ...', or extend a profile that has it",
    ),
    "no schema version": (
        HEAD.replace("schema: 1\n", ""),
        "board.yaml:1:1: schema: missing key 'schema'\n  fix: write 'schema: 1' in every file",
    ),
    "another schema version": (
        HEAD.replace("schema: 1", "schema: 2"),
        "board.yaml:1:9: schema: schema version 2 is not known here\n  fix: write 'schema: 1'",
    ),
    "numbers without provenance": (
        HEAD + "clock_hz: 1.8e+9\n",
        "board.yaml:5:1: clock_hz: the numbers of 'clock_hz' have no provenance\n"
        "  fix: add 'provenance: {clock_hz: {source: ..., confidence: measured|datasheet|estimate}}' to this file",
    ),
    "threshold without provenance": (
        HEAD + "runtimes: {artifact: {ops: {Conv: {min_macs: 1000}}}}\n",
        "board.yaml:5:1: runtimes: the numbers of 'runtimes' have no provenance\n"
        "  fix: add 'provenance: {runtimes: {source: ..., confidence: measured|datasheet|estimate}}' to this file",
    ),
    "provenance of nothing": (
        HEAD + "provenance: {clocks: {source: x, confidence: measured}}\n",
        "board.yaml:5:14: provenance.clocks: 'clocks' is not a section\n  fix: did you mean 'clock_hz'?",
    ),
    "confidence": (
        HEAD + "provenance: {cores: {source: x, confidence: guess}}\n",
        "board.yaml:5:33: provenance.cores.confidence: must be 'measured', 'datasheet' or 'estimate', "
        "not the text 'guess'\n  fix: known: datasheet, estimate, measured",
    ),
    "unknown qspace": (
        HEAD + "runtimes: {artifact: {ops: {Add: {combos: [{act: w4_grup, out: [a8]}]}}}}\n",
        "board.yaml:5:45: runtimes.artifact.ops.Add.combos[0].act: unknown qspace 'w4_grup'\n"
        "  fix: did you mean 'w4_group'?",
    ),
    "unknown compute row": (
        HEAD + "runtimes: {artifact: {ops: {Conv: {combos: "
        "[{act: a8, weight: w8, out: [a8], intrinsics: [neon_sdt]}]}}}}\n",
        "board.yaml:5:91: runtimes.artifact.ops.Conv.combos[0].intrinsics[0]: unknown compute row 'neon_sdt'\n"
        "  fix: did you mean 'neon_sdot'?",
    ),
    "row of other types": (
        HEAD + "qspaces: {a8: {signed: false}}\n",
        "arm-cortex-a76.yaml: runtimes.artifact.ops.Conv.combos[0].intrinsics[0]: "
        "'neon_sdot' multiplies s8 by s8 and cannot take u8 by s8\n"
        "  fix: name a compute row for these types, or change the qspaces",
    ),
    "carrier that converts": (
        HEAD + "runtimes: {artifact: {ops: {Pad: {combos: [{act: a8, out: [f32]}]}}}}\n",
        "board.yaml:5:54: runtimes.artifact.ops.Pad.combos[0].out: a carrier writes what it reads\n"
        "  fix: write 'out: [a8]'",
    ),
    "anchor without a weight": (
        HEAD + "runtimes: {artifact: {ops: {Conv: {combos: [{act: a8, out: [a8]}]}}}}\n",
        "board.yaml:5:45: runtimes.artifact.ops.Conv.combos[0]: an anchor has a weight\n"
        "  fix: name the qspace of the weight",
    ),
    "fusion of an absent operator": (
        HEAD + "runtimes: {artifact: {fusions: [[Cnv, Relu]]}}\n",
        "board.yaml:5:33: runtimes.artifact.fusions[0]: the chain starts with 'Cnv', which is not in ops\n"
        "  fix: did you mean 'Conv'?",
    ),
    "two rows of one name": (
        HEAD + "compute:\n  - {name: a, act: s8}\n  - {name: a, act: u8}\n"
        "provenance: {compute: {source: x, confidence: measured}}\n",
        "board.yaml:7:5: compute: two rows are named 'a'\n  fix: rename or remove one",
    ),
    "removing a row that is not there": (
        HEAD
        + "memory:\n  - {name: l4, remove: true}\nprovenance: {memory: {source: x, confidence: measured}}\n",
        "board.yaml:6:5: memory: there is no inherited row 'l4' to remove\n  fix: known: dram, l1d, l2, l3",
    ),
    "memory out of order": (
        HEAD + "memory:\n  - {name: l1d, size_bytes: 1.0e+9}\n"
        "provenance: {memory: {source: x, confidence: measured}}\n",
        "'l2' is listed behind 'l1d' but is not larger\n  fix: list memory nearest (smallest) first",
    ),
    "unknown parent": (
        HEAD.replace("arm-cortex-a76", "arm-cortexa76"),
        "board.yaml:3:10: extends: unknown profile 'arm-cortexa76'\n  fix: did you mean 'arm-cortex-a76'?",
    ),
    "parent that is no name": (
        HEAD.replace("arm-cortex-a76", "[[x]]"),
        "board.yaml:3:11: extends: must be a name or a list of names\n  fix: write 'extends: x86-avx2'",
    ),
    "parent named twice": (
        HEAD.replace("arm-cortex-a76", "[x86-base, x86-base]"),
        "board.yaml:3:21: extends: 'x86-base' is named twice\n  fix: keep one of the two",
    ),
    "path out of the folder": (
        HEAD.replace("arm-cortex-a76", "../other.yaml"),
        "board.yaml:3:10: extends: '../other.yaml' is not a plain file name; only files in the same folder can be "
        "extended\n  fix: copy the file beside this one, or name a built-in profile",
    ),
    "itself": (
        HEAD.replace("arm-cortex-a76", "board.yaml"),
        "board.yaml:3:10: extends: a profile extends itself: board.yaml -> board.yaml\n  fix: break the circle",
    ),
    "abstract itself": (
        HEAD + "abstract: true\n",
        "board.yaml:1:1: an abstract profile is a part that other profiles extend, not a target\n"
        f"  fix: known: {', '.join(profile_names())}",
    ),
    "abstract as text": (
        HEAD + "abstract: 'yes'\n",
        "board.yaml:5:11: abstract: must be true or false\n  fix: write 'abstract: true'",
    ),
}


@pytest.mark.parametrize("case", BROKEN_PROFILES)
def test_broken_profile(case: str, tmp_path: Path) -> None:
    text, message = BROKEN_PROFILES[case]
    got = refused_profile(tmp_path, text)
    if message.startswith("board.yaml"):
        assert got == message
    else:  # the message points into a shipped file, whose line numbers may move
        place, _, rest = message.rpartition(".yaml: ")
        assert got.endswith(rest)
        assert place in got


def test_accumulator_overflow_says_the_longest_reduction(tmp_path: Path) -> None:
    # Worst case of asymmetric s8 by narrow s8: |q - z| <= 255 and |w| <= 127; 2**31 - 1 = 66311 * 255 * 127 + 8962.
    assert (2**31 - 1) // (255 * 127) == 66311
    load_profile(written(tmp_path, HEAD + "limits: {max_reduction: 66311}\n"))
    message = refused_profile(tmp_path, HEAD + "limits: {max_reduction: 66312}\n")
    assert "66312 products can overflow the accumulator; the most that fit are 66311" in message
    assert message.endswith("fix: write 'limits: {max_reduction: 66311}' or a smaller number")


def test_saturating_row_is_refused_for_8_bit_weights(tmp_path: Path) -> None:
    text = """schema: 1
name: board
extends: x86-avx2
description: A board.
compute: [{name: vpmaddubsw, act: u8, weight: s8, acc: s32, macs_per_cycle: 32, k_align: 4, saturates: true}]
provenance: {compute: {source: x, confidence: measured}}
runtimes: {artifact: {ops: {Conv: {combos: [{act: a8, weight: w8, out: [a8], intrinsics: [vpmaddubsw]}]}}}}
"""
    assert refused_profile(tmp_path, text) == (
        "board.yaml:7:91: runtimes.artifact.ops.Conv.combos[0].intrinsics[0]: 'vpmaddubsw' adds two products in 16 "
        "bits and saturates with s8 weights\n"
        "  fix: use a row that accumulates exactly; the numerics contract has no saturation"
    )


def test_all_broken_rules_are_found_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, HEAD + "cores: 0\nlimits: {max_rnk: 4}\n")
    found = inspect_profile(path)
    assert found.profile is None
    assert [f.what for f in found.findings] == [
        "must be at least 1, not the number 0",
        "unknown key 'max_rnk'",
    ]


def test_circle_of_files(tmp_path: Path) -> None:
    written(tmp_path, "schema: 1\nextends: board.yaml\n", "other.yaml")
    message = refused_profile(tmp_path, HEAD.replace("arm-cortex-a76", "other.yaml"))
    assert "a profile extends itself: board.yaml -> other.yaml -> board.yaml" in message


def test_long_chain_and_wide_tree_stop(tmp_path: Path) -> None:
    for i in range(12):
        written(tmp_path, f"schema: 1\nextends: f{i + 1}.yaml\n", f"f{i}.yaml")
    assert "more than 8 levels of extends" in refused_profile(
        tmp_path, HEAD.replace("arm-cortex-a76", "f0.yaml")
    )
    for level in range(4):  # each file names all files of the next level: 10**4 paths
        names = ", ".join(f"t{level + 1}{j}.yaml" for j in range(10))
        for j in range(10):
            text = f"schema: 1\nextends: [{names}]\n" if level < 3 else "schema: 1\n"
            written(tmp_path, text, f"t{level}{j}.yaml")
    assert "more than 64 files in one profile" in refused_profile(
        tmp_path, HEAD.replace("arm-cortex-a76", "t00.yaml")
    )


def test_link_out_of_the_folder(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    written(tmp_path, "schema: 1\n", "secret.yaml")
    (inside / "other.yaml").symlink_to(tmp_path / "secret.yaml")
    path = written(inside, HEAD.replace("arm-cortex-a76", "other.yaml"))
    with pytest.raises(
        ProfileError, match=r"board\.yaml:3:10: extends: 'other\.yaml' is a link out of its folder"
    ):
        load_profile(path)


def test_unknown_target_name() -> None:
    with pytest.raises(ProfileError) as caught:
        load_profile("x86-avx22")
    assert (
        caught.value.message
        == "unknown target 'x86-avx22'\n  fix: did you mean 'x86-avx2'? (a file ends in .yaml)"
    )


def test_fragment_is_no_target() -> None:
    with pytest.raises(ProfileError, match="unknown target 'onnxruntime_cpu'"):
        load_profile("onnxruntime_cpu")


def test_terminal_codes_in_a_profile_are_escaped(tmp_path: Path) -> None:
    message = refused_profile(tmp_path, HEAD + '"\\e[31mx": 1\n')
    assert "\x1b" not in message
    assert "\\x1b[31mx" in message
