"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

from quantization.compare import Runner, compare
from quantization.competitors import ALL, COMPETITORS
from quantization.results import read_results

NNCF_PACKAGES = ("nncf==3.4.0", "numpy>=2")


def nncf_python(folder: Path) -> str:
    """Make a virtual environment with NNCF and this interpreter's onnx and onnxruntime; return its Python."""
    import onnx
    import onnxruntime

    same = (f"onnx=={onnx.__version__}", f"onnxruntime=={onnxruntime.__version__}")
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *NNCF_PACKAGES, *same], check=True)
    return str(python)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks/quantization", description=__doc__)
    parser.add_argument("action", choices=("run", "table", "paired"), nargs="?", default="run")
    parser.add_argument("--models", default=",".join(ALL), help="zoo names, by comma")
    parser.add_argument(
        "--only", default="*", help="patterns of competitors' names, by comma: nncf,ort-static-*"
    )
    parser.add_argument(
        "--again",
        choices=("quantize", "measure"),
        default="",
        help="do again what the results hold: everything, or only the measuring of models kept by --keep",
    )
    parser.add_argument("--results", type=Path, default=Path("quantization_results.jsonl"))
    parser.add_argument("--keep", type=Path, help="keep quantized models and logs in this folder")
    parser.add_argument("--nncf-python", help="a Python with nncf, onnx and onnxruntime")
    parser.add_argument("--install", type=Path, help="make an environment with NNCF in this folder")
    parser.add_argument("--markdown", type=Path, help="write the tables here instead of printing them")
    parser.add_argument("--picture", type=Path, help="write the picture (SVG) here")
    parser.add_argument("--rounds", type=int, default=3, help="paired: how often each quantizes")
    parser.add_argument("--ours", default="bitwright-int8", help="paired: the setting of Bitwright")
    parser.add_argument("--rival", default="nncf-transformer", help="paired: whom it is compared with")
    return parser


def _interpreters(arguments: argparse.Namespace) -> dict[str, str]:
    interpreters = {"own": sys.executable}
    python = arguments.nncf_python or (nncf_python(arguments.install) if arguments.install else None)
    return interpreters | ({"nncf": python} if python else {})


def _write(arguments: argparse.Namespace) -> None:
    from quantization.table import markdown

    results = read_results(arguments.results)
    text = markdown(results)
    if arguments.markdown:
        arguments.markdown.write_text(text)
    else:
        print(text)
    if arguments.picture:
        from quantization.picture import draw

        draw(results, arguments.picture)


def main() -> int:
    """Run the command line."""
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.again == "measure" and arguments.keep is None:
        parser.error("--again measure needs --keep")
    if "BITWRIGHT_ZOO" not in os.environ:
        print("set BITWRIGHT_ZOO to the folder with the models", file=sys.stderr)
        return 2
    runner = Runner(_interpreters(arguments), arguments.keep)
    if arguments.action == "paired":
        from quantization.paired import paired

        print(paired(runner, ours=arguments.ours, rival=arguments.rival, rounds=arguments.rounds))
        return 0
    if arguments.action == "run":
        patterns = arguments.only.split(",")
        chosen = [c for c in COMPETITORS if any(fnmatch(c.name, p) for p in patterns)]
        compare(
            runner,
            arguments.models.split(","),
            chosen,
            arguments.results,
            again=arguments.again,
        )
    _write(arguments)
    return 0
