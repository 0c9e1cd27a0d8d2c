"""Wrong options and inputs on the command line: one clear message, the documented exit code, nothing written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from bitwright.compiler.cli.app import main

TEXT = """
<ir_version: 10, opset_import: ["": 17]>
small (float[N,4] x, float[N,4] z) => (float[N,6] y) {
  [sum] s = Add(x, z)
  [hidden] h = Gemm(s, w1)
  [relu] r = Relu(h)
  [head] y = Gemm(r, w2)
}
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(TEXT)
    for name, shape in {"w1": (4, 64), "w2": (64, 6)}.items():
        model.graph.initializer.append(
            numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)
        )
    onnx.save(model, folder / "m.onnx")
    x = rng.normal(size=(8, 4)).astype(np.float32)
    np.savez(folder / "data.npz", x=x, z=x[::-1])
    np.savez(folder / "half.npz", x=x)
    (folder / "broken.onnx").write_bytes(b"\x08\x0a\xff\xff")
    (folder / "metric.py").write_text(
        "calls = []\ndef falling(run):\n    calls.append(0)\n    return 1.0 / len(calls)\n"
        "def same(run):\n    return 0.9\ndef loud():\n    print('noise')\n    import numpy as np\n"
        "    return [{'x': np.ones((1, 4), np.float32), 'z': np.zeros((1, 4), np.float32)}]\n"
    )
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """An empty working folder beside a file and a folder that are no output of ours."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "file.txt").write_text("mine")
    (folder / "full").mkdir()
    (folder / "full" / "letter.txt").write_text("mine")
    monkeypatch.chdir(folder)
    return folder


def listing(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def filled(arguments: str, inputs: Path) -> list[str]:
    return [word.format(i=inputs) for word in arguments.split()]


GOOD = "{i}/m.onnx -t x86-avx2 -d {i}/data.npz"
CASES = {
    "unknown target": (
        "compile {i}/m.onnx -t x86-avx3 -d {i}/data.npz -o out",
        2,
        "did you mean 'x86-avx2'?",
    ),
    "missing profile": ("compile {i}/m.onnx -t my/none.yaml -d {i}/data.npz -o out", 2, "none.yaml"),
    "unknown phase": (f"compile {GOOD} -o out --stop-after calibrat", 2, "did you mean 'calibrate'?"),
    "unknown recipe": (f"compile {GOOD} -o out --recipe int9", 2, "did you mean 'int8'?"),
    "unknown method": (f"compile {GOOD} -o out --method minmx", 2, "did you mean 'minmax'?"),
    "unknown dim": (f"compile {GOOD} -o out --dim M=1", 2, "no dynamic dimension 'M'"),
    "dim without size": (f"compile {GOOD} -o out --dim N", 2, "--dim"),
    "dim of zero": (f"compile {GOOD} -o out --dim N=0", 2, "--dim"),
    "unknown node": (f"compile {GOOD} -o out --keep-float hiden", 2, "did you mean 'hidden'?"),
    "no data": ("compile {i}/m.onnx -t x86-avx2 -o out", 2, "--random-data"),
    "missing data": ("compile {i}/m.onnx -t x86-avx2 -d none.npz -o out", 2, "none.npz"),
    "data lacks an input": ("compile {i}/m.onnx -t x86-avx2 -d {i}/half.npz -o out", 3, "'z'"),
    "data function is missing": (
        "compile {i}/m.onnx -t x86-avx2 -d {i}/metric.py:lod -o out",
        2,
        "did you mean 'loud'?",
    ),
    "bad drop": (f"compile {GOOD} -o out --eval {{i}}/metric.py:same --max-drop much", 2, "--max-drop"),
    "drop of what": (f"compile {GOOD} -o out --max-drop 1%", 2, "--eval"),
    "missing metric": (f"compile {GOOD} -o out --eval {{i}}/metric.py:sam", 2, "did you mean 'same'?"),
    "no output": (f"compile {GOOD}", 2, "--output"),
    "output is a file": (f"compile {GOOD} -o file.txt", 2, "is not a bitwright output folder"),
    "output is a foreign folder": (f"compile {GOOD} -o full", 2, "is not a bitwright output folder"),
    "output below a file": (f"compile {GOOD} -o file.txt/out", 2, "is not a folder"),
    "output with a long name": (f"compile {GOOD} -o {'o' * 210}", 2, "choose a shorter name"),
    "output where nothing can be": (f"compile {GOOD} -o /proc/out", 2, "cannot be written"),
    "data with a long name": (f"compile {{i}}/m.onnx -t x86-avx2 -d {'d' * 300} -o out", 2, "too long"),
    "report of a long name": (f"explain {'o' * 300}", 2, "no readable manifest"),
    "dump below a file": (f"compile {GOOD} -o out --dump file.txt/dump", 2, "--dump"),
    "a target twice": ("compile {i}/m.onnx -t x86-avx2 -t x86-avx2 -d {i}/data.npz -o out", 2, "named twice"),
    "second target unknown": (
        "compile {i}/m.onnx -t x86-avx2 -t x86-avx3 -d {i}/data.npz -o out",
        2,
        "x86-avx3",
    ),
    "missing model": ("compile none.onnx -t x86-avx2 -d {i}/data.npz -o out", 2, "none.onnx"),
    "broken model": ("compile {i}/broken.onnx -t x86-avx2 -d {i}/data.npz -o out", 3, "broken.onnx"),
    "no samples": (f"compile {GOOD} -o out --samples 0", 2, "--samples"),
    "quantize over the model": (f"quantize {GOOD} -o {{i}}/m.onnx", 2, "overwrite the model"),
    "quantize into a folder": (f"quantize {GOOD} -o full", 2, "is a folder"),
    "quantize below a file": (f"quantize {GOOD} -o file.txt/q.onnx", 2, "is not a folder"),
    "report below a file": (f"quantize {GOOD} -o q.onnx --report file.txt/r.html", 2, "--report"),
    "metric falls": (
        f"quantize {GOOD} -o q.onnx --no-gate --eval {{i}}/metric.py:falling --max-drop 1%",
        5,
        "0.5",
    ),
    "bucket without sizes": (f"compile {GOOD} -o out --bucket N=", 2, "--bucket T=16,32,64"),
    "bucket of zero": (f"compile {GOOD} -o out --bucket N=0,4", 2, "--bucket"),
    "bucket of nothing": (f"compile {GOOD} -o out --bucket M=4,8", 2, "no dynamic dimension 'M'"),
    "buckets twice": (f"compile {GOOD} -o out --bucket N=1,2 --bucket N=4", 2, "one list"),
    "bucket and dim": (f"compile {GOOD} -o out --bucket N=1,2 --dim N=2", 2, "--dim and by --bucket"),
    "bucket without padding": (f"compile {GOOD} -o out --bucket N=1,2 --pad x=0", 2, "--pad z=0"),
    "bucket on a microcontroller": (
        "compile {i}/m.onnx -t cortex-m4 -d {i}/data.npz -o out --bucket N=1,2 --pad x=0 --pad z=0",
        2,
        "no runtime",
    ),
    "padding without a bucket": (f"compile {GOOD} -o out --pad x=0", 2, "name the buckets"),
    "padding of no input": (
        f"compile {GOOD} -o out --bucket N=1,2 --pad x=0 --pad z=0 --pad y=0",
        2,
        "no input 'y'",
    ),
    "padding with nothing": (f"compile {GOOD} -o out --bucket N=1,2 --pad x=nan", 2, "--pad"),
    "two paddings": (f"compile {GOOD} -o out --bucket N=1,2 --pad x=1 --pad x=2", 2, "two values"),
    "dynamic below a bucket": (
        f"compile {GOOD} -o out --dynamic N=4 --bucket N=1,8",
        2,
        "the bucket N=8 is larger than 4",
    ),
    "dynamic without a size left": (
        f"compile {GOOD} -o out --dynamic N=2 --bucket N=1,2",
        2,
        "each has a function of its own",
    ),
    "loop over nothing": (f"compile {GOOD} -o out --loop M", 2, "no dynamic dimension 'M'"),
    "loop and bucket": (f"compile {GOOD} -o out --loop N --bucket N=1,2", 2, "--bucket and by --loop"),
    "loop and dim": (f"compile {GOOD} -o out --loop N --dim N=4", 2, "--dim and by --loop"),
    "archive with an odd name": (f"compile {GOOD} -o out --static a-b", 2, "no name for C"),
    "archive for firmware": (
        "compile {i}/m.onnx -t cortex-m4 -d {i}/data.npz -o out --static net",
        2,
        "leave --static out",
    ),
    "archive named by a keyword": (f"compile {GOOD} -o out --static int", 2, "int_model"),
    "archive named like the C library": (f"compile {GOOD} -o out --static c", 2, "c_model"),
    "missing validation data": (f"compile {GOOD} -o out --validation none.npz", 2, "none.npz"),
    "validation lacks an input": (f"compile {GOOD} -o out --validation {{i}}/half.npz", 3, "'z'"),
    "budget out of reach": (f"compile {GOOD} -o out --recipe mixed --budget size=1B", 4, "the nearest takes"),
    "tuning into another file": (f"tune {GOOD} --tuning-store file.txt --tune 1", 2, "no tuning store"),
    "tuning for what cannot be timed": (
        "compile {i}/m.onnx -t cortex-m4 -d {i}/data.npz -o out --tune 5",
        7,
        "--tracker",
    ),
    "tuning in quantize": (f"quantize {GOOD} -o q.onnx --tune 5", 2, "--tune"),
    "sweep below a file": (f"sweep {GOOD} -o file.txt", 2, "is not a folder"),
    "sweep over no cost": (f"sweep {GOOD} -o s --cost speed", 2, "known: energy, latency, ram, size"),
    "sweep for no runtime": (f"sweep {GOOD} -o s --no-measure --runtime ort", 2, "--runtime"),
    "sweep of one point": (f"sweep {GOOD} -o s --points 1", 2, "--points"),
    "sweep misspelt": (f"sweep {GOOD} -o s --no-measur", 2, "--no-measure"),
    "sweep out of reach": (f"sweep {GOOD} -o s --no-measure --budget size=1B", 4, "the nearest takes"),
    "inspect dim": ("inspect {i}/m.onnx -t x86-avx2 --dim M=1", 2, "'M'"),
    "inspect runtime": ("inspect {i}/m.onnx -t x86-avx2 --runtime ort", 2, "--runtime"),
    "verify no bundle": ("verify full", 2, "not a bitwright output folder"),
    "verify nothing": ("verify none", 2, "none"),
    "report no bundle": ("report full", 2, "not a bitwright output folder"),
    "explain no bundle": ("explain full conv", 2, "not a bitwright output folder"),
    "explain without a report": ("explain {i}/m.onnx", 2, "no report is beside m.onnx"),
    "report without a report": ("report {i}/m.onnx", 2, "no report is beside m.onnx"),
    "bench one model": ("bench {i}/m.onnx", 2, "second model"),
    "bench no model": ("bench {i}/m.onnx file.txt", 3, "file.txt"),
    "export form": ("export net:make -o e.onnx", 2, "MODULE.py:FACTORY"),
    "new target exists": ("targets new mine --like x86-avx2 -o file.txt", 2, ".yaml"),
    "new target like nothing": ("targets new mine --like x86-avx3", 2, "did you mean 'x86-avx2'?"),
}


@pytest.mark.parametrize("json_form", [False, True], ids=["people", "json"])
@pytest.mark.parametrize("case", CASES)
def test_one_message_one_exit_code_nothing_written(case, json_form, inputs, work, capfd):
    arguments, code, words = CASES[case]
    if "falling" in arguments:
        (work.parent / "m.py").write_text((inputs / "metric.py").read_text())
        arguments = arguments.replace("{i}/metric.py", str(work.parent / "m.py"))
    before = listing(work) | listing(inputs)
    assert main([*filled(arguments, inputs), *(["--json"] if json_form else [])]) == code
    captured = capfd.readouterr()
    message = captured.err
    if json_form:
        error = json.loads(captured.out)["error"]
        assert error["exit_code"] == code and error["what"]
        message = f"{error['where']}: {error['what']} {error['fix']}"
    else:
        assert captured.out == ""
        assert message.count("\n  fix: ") <= 1 and len(message.splitlines()) <= 3
    assert words in message
    assert "Traceback" not in captured.err + captured.out
    assert listing(work) | listing(inputs) == before
    assert {p.name for p in work.iterdir()} == {"file.txt", "full"}


def test_a_missing_exporter_is_a_tool_chain_error(work, capsys, monkeypatch):
    monkeypatch.setattr("bitwright.compiler.export_torch.find_spec", lambda name: None)
    assert main(["export", "net.py:make", "-o", "e.onnx"]) == 7
    assert "pip install bitwright[torch]" in capsys.readouterr().err


def test_a_failed_verification_is_8_with_one_document(work, capsys, monkeypatch):
    from bitwright.compiler.bundle import verify

    difference = verify.KernelDifference(0, "conv", "k0", verify.Difference(10, 1, 2.0))
    result = verify.Verification("native", sets=1, calls=1, elements=10, kernel_differences=(difference,))
    monkeypatch.setattr(verify, "verify", lambda *_, **__: result)
    assert main(["verify", "full"]) == 8
    assert "1 of 10 elements differ" in capsys.readouterr().err
    assert main(["verify", "full", "--json"]) == 8
    assert json.loads(capsys.readouterr().out)["error"]["class"] == "VerificationError"


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_without_permission_is_refused(inputs, work, capsys):
    (work / "full").chmod(0o500)
    assert main(filled(f"quantize {GOOD} -o full/q.onnx", inputs)) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_quantize_prints_its_files_and_nothing_else_on_stdout(inputs, work, capfd):
    data = f"{inputs}/metric.py:loud"
    arguments = filled("quantize {i}/m.onnx -t x86-avx2 -o q.onnx --no-gate --report r.html", inputs)
    assert main([*arguments, "-d", data]) == 0
    captured = capfd.readouterr()
    files = ["q.onnx", "q.session.json", "q.plan.yaml", "q.report.json", "r.html"]
    assert captured.out.splitlines() == files
    assert "noise" in captured.err and "m.onnx for x86-avx2" in captured.err
    assert set(files) <= {p.name for p in work.iterdir()}
    assert main([*arguments, "-d", data, "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["model"] == "q.onnx" and document["report_file"] == "q.report.json"
    assert document["report"]["target"]["name"] == "x86-avx2"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "not a report of this version"),
        ('{"layers": []}', "not a report"),
        ("[" * 9999, "JSON"),
    ],
)
def test_a_broken_report_is_refused(text, words, work, capsys):
    (work / "q.report.json").write_text(text)
    assert main(["explain", "q.onnx"]) == 2
    assert words in capsys.readouterr().err


def test_advice_is_applied_to_a_new_file_only(inputs, work, capsys):
    assert main(filled(f"quantize {GOOD} -o q.onnx --no-gate --recipe w4 -q", inputs)) == 0
    before = listing(work)
    for arguments, words in (
        ("explain q.onnx --apply q.plan.yaml", "would replace the plan"),
        ("explain q.onnx --apply full", "is a folder"),
        ("explain q.onnx --apply file.txt/p.yaml", "is not a folder"),
        ("explain q.onnx heed", "did you mean 'head'?"),
        ("explain q.onnx heed --apply p.yaml", "did you mean 'head'?"),
        ("explain q.onnx sum --apply p.yaml", "advises no change for 'sum'"),
    ):
        capsys.readouterr()
        assert main(arguments.split()) == 2
        assert words in capsys.readouterr().err
    assert listing(work) == before
    assert main(["explain", "q.onnx", "--apply", "new/p.yaml"]) == 0
    assert {k: v for k, v in listing(work).items() if k in before} == before and (
        work / "new/p.yaml"
    ).exists()
    (work / "q.plan.yaml").unlink()
    assert main(["explain", "q.onnx", "--apply", "p.yaml"]) == 2
    assert "the plan is not there any more" in capsys.readouterr().err


def test_random_data_is_shouted_even_when_quiet(inputs, work, capsys):
    arguments = filled("quantize {i}/m.onnx -t x86-avx2 --random-data -o q.onnx --no-gate -q", inputs)
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "RANDOM" in captured.err and "m.onnx for" not in captured.err


def test_a_dry_run_shows_the_plan_and_writes_nothing(inputs, work, capsys):
    before = listing(work)
    assert main(filled(f"compile {GOOD} -o out --dry-run --json", inputs)) == 0
    (found,) = json.loads(capsys.readouterr().out)["inspections"]
    assert [r["node"] for r in found["rows"]] == ["sum", "hidden", "head"]
    assert found["dims"] == {"N": 1} and listing(work) == before
    assert main(filled(f"quantize {GOOD} -o q.onnx --dry-run", inputs)) == 0
    assert listing(work) == before


def test_inspect_counts_what_the_model_has(inputs, work, capsys):
    assert main(filled("inspect {i}/m.onnx -t x86-avx2 --dim N=8 --json", inputs)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["macs"] == 8 * (4 * 64 + 64 * 6) and found["assumed"] == []
    assert found["float_bytes"] == 4 * (4 * 64 + 64 * 6)
    assert found["estimated_float_s"] > 0 and found["bytes"] <= found["float_bytes"]
    assert main(filled("inspect {i}/m.onnx -t x86-avx2", inputs)) == 0
    assert "N assumed" in capsys.readouterr().err


def test_stopping_early_leaves_numbered_models(inputs, work, capsys):
    assert main(filled(f"compile {GOOD} --stop-after plan --dump dump", inputs)) == 0
    assert capsys.readouterr().out == "dump\n"
    names = sorted(p.name for p in (work / "dump").iterdir())
    assert names[0].endswith("ingest.onnx") or names[0].endswith("normalize.onnx")
    assert names[-1].endswith("plan.onnx")
    onnx.checker.check_model(onnx.load(work / "dump" / names[-1]))


def test_bench_honours_the_session_file_and_refuses_a_broken_one(inputs, work, capsys):
    model = work / "b.onnx"
    model.write_bytes((inputs / "m.onnx").read_bytes())
    session = work / "b.session.json"
    session.write_text('{"session_config_entries": {"session.set_denormal_as_zero": "1"}}')
    assert main(["bench", "b.onnx", f"{inputs}/m.onnx", "-d", f"{inputs}/data.npz", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    # The same model twice; timing noise of a call of microseconds is far below a factor of three.
    assert 1 / 3 < found["ratio"] < 3 and "b.session.json" in found["notes"][0]
    for text, words in (
        ("[1", "JSON"),
        ("[]", "object"),
        ('{"thread": 1}', "thread"),
        ('{"providers": 1}', "providers"),
    ):
        session.write_text(text)
        assert main(["bench", "b.onnx", f"{inputs}/m.onnx"]) == 2
        captured = capsys.readouterr()
        assert words in captured.err and "b.session.json" in captured.err


def test_bench_refuses_models_with_different_inputs(inputs, work, capsys):
    onnx.save(
        onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["": 17]> g (float[N,4] q) => (float[N,4] y) { y = Relu(q) }'
        ),
        "o.onnx",
    )
    assert main(["bench", "o.onnx", f"{inputs}/m.onnx"]) == 3
    assert "different inputs" in capsys.readouterr().err
