"""Running a user's script leaves nothing behind."""

from bitwright.compiler.ingest.evaluator import load_eval


def test_a_users_script_gets_no_pycache_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    script = tmp_path / "metric.py"
    script.write_text("def score(run):\n    return 1.0\n")
    assert load_eval(f"{script}:score")(lambda feeds: {}) == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["metric.py"]
