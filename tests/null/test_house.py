"""The rules of the house that no linter knows: sizes, one pass a file, targets as data, who opens models."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = ("compiler", "passes", "targets")
TREE = (*CODE, "tests", "benchmarks", "examples")

FILE_LINES, FUNCTION_LINES = 450, 60
# Longer than the limits, and how long at most. Entries may shrink or go, and must go once they are not needed.
LONG_FILES: dict[str, int] = {}
LONG_FUNCTIONS = {"tests/compiled/test_lower_module.py:example_program": 80}

# Files of passes/ that are no pass, and what they are.
NO_PASS = {
    "__init__": "the package",
    "contract": "what a pass is",
    "rewriting": "graph surgery that passes share",
    "channel_groups": "which values of a convolutional network can be scaled channel by channel",
    "channel_noise": "predicted rounding noise around such values, and its minimum",
    "channel_scaling": "what the two folds of per-channel arithmetic share",
    "weightless": "models without weight bytes, for onnx's own functions",
    "normalize": "the list of passes",
    "dequantized": "what the nodes behind a stored weight compute",
    "elementwise_region": "where whole channels can be copied",
    "head_norms": "the normalization of heads in front of an attention operator",
    "linear_inputs": "what passes that rewrite a linear layer's input share",
    "scale_folding": "where a factor for each channel folds",
    "stored_weights": "how a quantized weight is written",
    "narrow_rules": "which nodes may compute in half precision",
}

# Who may open a model file outside compiler/ingest, and why that file needs no checks.
MODEL_OPENERS = {
    "compiler/lower/worker.py": "the job file that our own process wrote",
    "compiler/streaming/kept.py": "parts of a model that an earlier run wrote, checked by their SHA-256",
    "compiler/tune/worker.py": "the job file that our own process wrote",
    "compiler/ort/audit.py": "the optimized graph that ONNX Runtime wrote a moment ago",
}
OPENING_CALLS = {
    "onnx.load",
    "onnx.load_model",
    "onnx.load_from_string",
    "onnx.load_model_from_string",
    "onnx_ir.load",
    "onnx_ir.serde.deserialize_model",
}

VAGUE_FILE_NAMES = {"utils.py", "util.py", "common.py", "misc.py", "manager.py"}
# Spelled in parts, because this file is searched too.
FORBIDDEN_TEXT = ("/wo" + "rk/", "/ro" + "ot/", "TO" + "DO", "FIX" + "ME", "not imple" + "mented yet")


def python_files(*folders: str) -> list[Path]:
    """Return the Python files below top-level folders."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (n for n in ast.walk(tree_of(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def too_long(lengths: dict[str, int], limit: int, allowed: dict[str, int]) -> list[str]:
    """Return what is over the limit and over its allowance, and allowances that nothing needs."""
    over = [f"{k}: {n} lines" for k, n in lengths.items() if n > allowed.get(k, limit)]
    needless = [f"{k}: leave the list" for k in allowed if lengths.get(k, 0) <= limit]
    return over + needless


def test_files_are_short() -> None:
    lengths = {relative(p): len(p.read_text(encoding="utf-8").splitlines()) for p in python_files(*TREE)}
    assert len(lengths) > 100
    assert too_long(lengths, FILE_LINES, LONG_FILES) == []


def test_functions_are_short() -> None:
    lengths = {
        f"{relative(path)}:{f.name}": (f.end_lineno or f.lineno) - f.lineno + 1
        for path in python_files(*TREE)
        for f in functions(path)
    }
    assert too_long(lengths, FUNCTION_LINES, LONG_FUNCTIONS) == []


def test_the_length_rule_sees_what_it_should() -> None:
    assert too_long({"a": 9, "b": 5}, 5, {}) == ["a: 9 lines"]
    assert too_long({"a": 9}, 5, {"a": 8}) == ["a: 9 lines"]
    assert too_long({"a": 4}, 5, {"a": 8}) == ["a: leave the list"]


def test_file_names_say_what_is_in_them() -> None:
    assert [relative(p) for p in python_files(*TREE) if p.name in VAGUE_FILE_NAMES] == []


PASS_FILES = [p for p in python_files("passes") if p.stem not in NO_PASS]


@pytest.mark.parametrize("path", PASS_FILES, ids=lambda p: p.stem)
def test_a_pass_file_defines_the_pass_of_its_name(path: Path) -> None:
    classes = [n for n in tree_of(path).body if isinstance(n, ast.ClassDef)]
    passes = [c for c in classes if any(isinstance(f, ast.FunctionDef) and f.name == "run" for f in c.body)]
    assert [c.name.lower() for c in passes] == [path.stem.replace("_", "")]
    decorators = [ast.unparse(d) for d in passes[0].decorator_list]
    assert decorators == ["dataclass(frozen=True)"]


def test_what_is_no_pass_is_still_there() -> None:
    assert set(NO_PASS) <= {p.stem for p in python_files("passes")}


def target_names() -> set[str]:
    """Return every name that stands for one target or family."""
    profiles = {p.stem for p in (ROOT / "targets").glob("*/profiles/*.yaml")}
    families = {p.parent.name for p in (ROOT / "targets").glob("*/profiles")}
    return profiles | families


def named_in_conditions(tree: ast.AST, names: set[str]) -> list[tuple[int, str]]:
    """Return line and name of every string constant from ``names`` that a decision depends on."""
    conditions: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.IfExp | ast.While | ast.Assert):
            conditions.append(node.test)
        elif isinstance(node, ast.Compare | ast.match_case):
            conditions.append(node.pattern if isinstance(node, ast.match_case) else node)
        elif isinstance(node, ast.comprehension):
            conditions.extend(node.ifs)
    found = {
        (constant.lineno, constant.value)
        for condition in conditions
        for constant in ast.walk(condition)
        if isinstance(constant, ast.Constant) and constant.value in names
    }
    return sorted(found)


def test_no_decision_outside_targets_depends_on_a_targets_name() -> None:
    names = target_names()
    assert {"x86_cpu", "arm_cpu", "arm-cortex-a76"} <= names
    found = {relative(p): named_in_conditions(tree_of(p), names) for p in python_files("compiler", "passes")}
    assert {k: v for k, v in found.items() if v} == {}


@pytest.mark.parametrize(
    "code", ["if f == 'arm_cpu': pass", "x = 1 if 'arm_cpu' in f else 2", "[k for k in f if k != 'arm_cpu']"]
)
def test_the_target_rule_sees_what_it_should(code: str) -> None:
    assert named_in_conditions(ast.parse(code), {"arm_cpu"}) == [(1, "arm_cpu")]


def qualified_calls(tree: ast.AST) -> set[str]:
    """Return the full names of called functions, import aliases resolved."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {
                a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0]
                for a in node.names
            }
        elif isinstance(node, ast.ImportFrom) and node.module:
            aliases |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    called = (ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call))
    heads = ((name.split(".")[0], name) for name in called)
    return {aliases[head] + name[len(head) :] for head, name in heads if head in aliases}


def test_only_ingest_opens_model_files() -> None:
    files = [p for p in python_files(*CODE) if not relative(p).startswith("compiler/ingest/")]
    openers = {relative(p) for p in files if qualified_calls(tree_of(p)) & OPENING_CALLS}
    assert openers == set(MODEL_OPENERS)


@pytest.mark.parametrize(
    "code",
    [
        "import onnx\nonnx.load('m')",
        "import onnx_ir as ir\nir.load('m')",
        "from onnx import load as r\nr('m')",
    ],
)
def test_the_opening_rule_sees_what_it_should(code: str) -> None:
    assert qualified_calls(ast.parse(code)) & OPENING_CALLS


def imported_packages(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_nothing_imports_the_bare_folder_names() -> None:
    assert [relative(p) for p in python_files(*TREE) if imported_packages(p) & set(CODE)] == []


def test_the_inside_takes_only_the_version_from_the_public_face() -> None:
    found = {
        alias.name
        for path in python_files(*CODE)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ImportFrom) and node.module == "bitwright"
        for alias in node.names
        if not relative(path).startswith("compiler/cli/")
    }
    assert found <= {"__version__"}


def test_the_public_face_loads_no_second_copy_and_no_tvm() -> None:
    code = "import sys, bitwright; print(sorted({'compiler', 'passes', 'targets', 'tvm'} & set(sys.modules)))"
    # From the root, where the bare names could be imported.
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def text_files() -> list[Path]:
    """Return everything written by hand."""
    endings = {".py", ".md", ".yaml", ".toml", ".json", ".cc", ".html", ".css", ".js", ".svg"}
    top = [p for p in ROOT.iterdir() if p.is_file() and (p.suffix in endings or p.name == "Makefile")]
    below = [p for f in (*TREE, "docs", ".ci") for p in (ROOT / f).rglob("*") if p.is_file()]
    return sorted({*top, *(p for p in below if p.suffix in endings or p.parent.name == ".ci")})


def test_no_paths_of_one_machine_and_no_unfinished_business() -> None:
    texts = {relative(p): p.read_text(encoding="utf-8") for p in text_files()}
    found = [(name, word) for name, text in texts.items() for word in FORBIDDEN_TEXT if word in text]
    assert found == []
