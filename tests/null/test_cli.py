"""The command line without models: help, versions, exit codes, JSON, target verbs, option values."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bitwright.compiler import errors
from bitwright.compiler.cli.app import EPILOG, main
from bitwright.compiler.cli.output import Output
from bitwright.compiler.cli.parsing import check_place, parse_dims, parse_drop
from bitwright.compiler.cli.progress import TerminalProgress
from bitwright.compiler.report.explain import changes, explain
from bitwright.targets import loader

VERBS = (
    *("quantize", "compile", "train", "export", "gguf"),
    *("inspect", "verify", "report", "explain", "bench", "evaluate", "generate"),
    *("recipes", "sweep", "tune"),
)
TARGET_VERBS = ("list", "show", "check", "new", "probe", "schema")


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("bitwright 0.")


def test_no_arguments_show_the_verbs(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in (*VERBS, "targets"))


@pytest.mark.parametrize("verb", [(v,) for v in VERBS] + [("targets", v) for v in TARGET_VERBS], ids=" ".join)
def test_every_verb_has_help_and_the_printing_options(verb, capsys):
    assert main([*verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert "--json" in text and "--quiet" in text and "Usage: bitwright" in text


@pytest.mark.parametrize("quiet", [False, True])
def test_notes_are_printed_where_people_read_along(quiet, capsys):
    with TerminalProgress(Output(quiet=quiet)) as progress:
        progress.phase("lower")
        progress.step(1, 2, "not a terminal")
        progress.note("planned: RAM [1 kB]")
    assert capsys.readouterr().err == ("" if quiet else "planned: RAM [1 kB]\n")


def test_the_script_entry_starts_quickly_and_alone():
    code = (
        "import sys; from bitwright.compiler.cli.app import main; code = main(['targets', 'list', '--json']); "
        "heavy = {'onnx', 'onnxruntime', 'tvm', 'torch'} & set(sys.modules); print(heavy, file=sys.stderr); "
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0
    assert done.stderr == "set()\n"
    assert "x86-avx2" in [t["name"] for t in json.loads(done.stdout)["targets"]]


def test_the_package_imports_nothing_heavy():
    code = "import sys, bitwright; print({'numpy', 'onnx', 'onnxruntime', 'tvm', 'rich'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "set()\n"


def test_the_package_names_what_it_offers():
    import bitwright

    assert (
        {"compile", "quantize", "inspect", "Bundle", "Options"}
        <= set(bitwright.__all__)
        <= set(dir(bitwright))
    )
    assert bitwright.Options.__name__ == "Options"
    with pytest.raises(AttributeError, match="no attribute 'compil'"):
        _ = bitwright.compil


def test_python_functions_refuse_unknown_options():
    import bitwright

    with pytest.raises(bitwright.UsageError, match="keep_float"):
        bitwright.quantize("m.onnx", target="host", output="q.onnx", keep_flot=())


ERRORS = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.BitwrightError)]


@pytest.mark.parametrize("error", ERRORS, ids=lambda c: c.__name__)
def test_every_error_class_has_its_exit_code(error, monkeypatch, capsys):
    def fail():
        message = "broken"
        raise error(message, where="place", fix="mend it")

    monkeypatch.setattr(loader, "list_profiles", fail)
    assert main(["targets", "list"]) == error.exit_code
    captured = capsys.readouterr()
    assert captured.err == "place: broken\n  fix: mend it\n"
    assert captured.out == ""
    assert main(["targets", "list", "--json"]) == error.exit_code
    captured = capsys.readouterr()
    record = {
        "class": error.__name__,
        "where": "place",
        "what": "broken",
        "fix": "mend it",
        "exit_code": error.exit_code,
    }
    assert json.loads(captured.out) == {"error": record}
    assert captured.err == ""


def test_the_help_documents_every_exit_code():
    assert all(f"{code} " in EPILOG for code in {e.exit_code for e in ERRORS} | {0, 130})


def test_an_interrupt_is_130(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(loader, "list_profiles", interrupt)
    assert main(["targets", "list"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_bug_is_one_line_and_keeps_its_traceback(monkeypatch, capsys):
    def fail():
        message = "two\nlines"
        raise KeyError(message)

    monkeypatch.setattr(loader, "list_profiles", fail)
    assert main(["targets", "list"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("this is a bug in bitwright: KeyError:") and "Traceback" not in err
    kept = Path(err.strip().rsplit(" ", 1)[1])
    assert "Traceback" in kept.read_text()
    kept.unlink()
    assert main(["targets", "list", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compil"], "Did you mean 'compile'"),
        (["quantize", "m.onnx", "--frobnicate"], "--frobnicate"),
        (["inspect"], "MODEL"),
        (["inspect", "m.onnx"], "--target"),
        (["targets"], "a verb is missing"),
        (["compile", "m.onnx", "-t", "host", "--threads", "0"], "--threads"),
        (["compile", "m.onnx", "-t", "host", "--threads", "two"], "--threads"),
    ],
)
def test_usage_errors_are_2_and_name_the_mistake(arguments, words, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert words in captured.err and "--help" in captured.err and captured.out == ""
    assert main([*arguments, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["class"] == "UsageError"


def test_targets_list_prints_tables_for_people_and_names_when_quiet(capsys):
    assert main(["targets", "list"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "arm-cortex-a53" in captured.err
    assert main(["targets", "list", "-q"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and "arm-cortex-a53" in captured.out.splitlines()


def test_targets_show_loads_back(tmp_path, capsys):
    assert main(["targets", "show", "x86-avx2"]) == 0
    file = tmp_path / "copy.yaml"
    file.write_text(capsys.readouterr().out)
    assert loader.load_profile(file) == loader.load_profile("x86-avx2")
    assert main(["targets", "show", "x86-avx2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == loader.load_profile("x86-avx2").dump()


def test_targets_show_suggests_the_nearest_name(capsys):
    assert main(["targets", "show", "x86-avx3"]) == 2
    assert "did you mean 'x86-avx2'?" in capsys.readouterr().err


def test_targets_new_then_check(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    assert main(["targets", "new", "mine", "--like", "arm-cortex-a53", "-o", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}\n"
    assert main(["targets", "check", str(file)]) == 0
    capsys.readouterr()
    file.write_text(file.read_text().replace("cores:", "coers:"))
    assert main(["targets", "check", str(file), "--json"]) == 2
    (finding, *_) = json.loads(capsys.readouterr().out)["findings"]
    assert "coers" in finding["where"] + finding["what"]
    assert main(["targets", "check", str(file)]) == 2
    captured = capsys.readouterr()
    assert "coers" in captured.err and captured.out == ""


def test_targets_schema_is_json(capsys):
    assert main(["targets", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Bitwright target profile"


@pytest.mark.parametrize(
    ("text", "value"), [("0.5%", 0.005), ("0.005", 0.005), (" 1 % ", 0.01), ("0", 0.0), (None, None)]
)
def test_a_drop_is_a_share_or_percent(text, value):
    assert parse_drop(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "%", "five", "-0.1", "-1%", "nan", "inf", "5", "101%", "0,5%"])
def test_other_drops_are_refused(text):
    with pytest.raises(errors.UsageError, match="max-drop"):
        parse_drop(text)


def test_a_percentage_without_its_sign_is_suspected():
    with pytest.raises(errors.UsageError, match=r"did you mean 5%\?"):
        parse_drop("5")


def test_dims_take_names_with_colons_and_equals():
    assert parse_dims(["N=1", "state:1=64", "a=b=3", "N=1"]) == {"N": 1, "state:1": 64, "a=b": 3}


@pytest.mark.parametrize(
    "entry", ["N", "N=", "=3", "N=0", "N=-1", "N=1.5", "N=1_0", "N=9999999999", "N=\u0663"]
)
def test_other_dims_are_refused(entry):
    with pytest.raises(errors.UsageError, match="--dim"):
        parse_dims([entry])


def test_a_dim_has_one_size():
    with pytest.raises(errors.UsageError, match="two sizes"):
        parse_dims(["N=1", "N=2"])


def test_a_place_below_a_file_is_refused_and_nothing_is_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(errors.UsageError, match="is not a folder"):
        check_place(tmp_path / "file" / "a" / "b", "--output")
    check_place(tmp_path / "new" / "a" / "b", "--output")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


REPORT = {
    "model": {"file": "m.onnx"},
    "layers": [{"node": "conv1", "op": "Conv", "format": "int8", "reason": "why", "fused": ["relu1"]}],
    "float": [{"node": "soft", "op": "Softmax", "reason": "no kernel"}],
    "sizes": [
        {"node": "conv1", "bytes": 10, "float_bytes": 40},
        {"node": "conv1", "bytes": 4, "float_bytes": 0},
        {"node": "soft", "bytes": 7, "float_bytes": 7},
    ],
    "audit": {
        "findings": [{"node": "conv1", "tensor": "t", "kind": "k", "why": "w"}, {"node": "x", "tensor": "y"}]
    },
}


def test_explain_adds_up_constants_and_findings():
    row = explain(REPORT, "conv1")
    assert (row["bytes"], row["float_bytes"], len(row["findings"])) == (14, 40, 1)


def test_explain_resolves_fused_nodes_and_float_ones():
    assert explain(REPORT, "relu1")["node"] == "conv1" and explain(REPORT, "relu1")["asked"] == "relu1"
    assert explain(REPORT, "soft")["format"] == "float"


ADVICE = {"node": "conv1", "change": "w8", "patch": "p"}


def test_explain_adds_the_advice_to_the_worst():
    content = {**REPORT, "advice": [ADVICE]}
    assert explain(content, "relu1")["advice"] == ADVICE and explain(content, "soft")["advice"] is None
    assert changes(content) == changes(content, "relu1") == {"conv1": "w8"}


@pytest.mark.parametrize(
    ("advice", "words"),
    [([ADVICE], "advises one for conv1"), ([{**ADVICE, "change": None}], "no single layer")],
)
def test_no_change_is_made_that_was_not_advised(advice, words):
    with pytest.raises(errors.UsageError, match=words):
        changes({**REPORT, "advice": advice}, "soft")


def test_explain_suggests_the_nearest_node():
    with pytest.raises(errors.UsageError, match="did you mean 'conv1'"):
        explain(REPORT, "conv")
