"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

DEFAULT_TARGETS = "host,x86-avx512-vnni"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks/kernels", description=__doc__)
    parser.add_argument("action", choices=("run", "table", "roofline"), nargs="?", default="run")
    parser.add_argument("--models", default="", help="names, by comma; all unless given")
    parser.add_argument("--targets", default=DEFAULT_TARGETS, help="by comma; NAME+tuned is tuned first")
    parser.add_argument("--threads", default="1", help="numbers of threads, by comma: 1,2")
    parser.add_argument("--out", type=Path, default=Path("kernel-results"), help="keeps models and results")
    parser.add_argument("--rounds", type=int, default=10, help="turns of every process")
    parser.add_argument("--sessions", type=int, default=3, help="how often all processes are started anew")
    parser.add_argument("--again", action="store_true", help="measure again what the results hold")
    parser.add_argument("--tune", default="90s", help="budget of the targets NAME+tuned: 90s, 5m, 200 trials")
    parser.add_argument("--roofline-models", default="resnet8_cifar10,minilm_l6-128,conv28,mlp-128")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    from kernels.measure import Effort, measure_model
    from kernels.models import MODELS, models_named

    chosen = models_named(arguments.models.split(",")) if arguments.models else list(MODELS)
    for model in chosen:
        print(model.name, file=sys.stderr, flush=True)
        measure_model(
            model,
            arguments.out,
            targets=arguments.targets.split(","),
            threads=[int(n) for n in arguments.threads.split(",")],
            effort=Effort(arguments.rounds, arguments.sessions),
            again=arguments.again,
            tune=arguments.tune,
        )
        _write_tables(arguments.out)


def results_in(out: Path) -> list[dict[str, Any]]:
    """Return everything that was ever measured into the folder, in the order of the table."""
    from kernels.models import MODELS

    found = [json.loads(path.read_text()) for path in (out / "results").glob("*.json")]
    order = {m.name: k for k, m in enumerate(MODELS)}
    return sorted(found, key=lambda r: (r["threads"], order.get(r["model"], len(order))))


def _write_tables(out: Path) -> str:
    from kernels.table import markdown

    results = results_in(out)
    text = markdown(results) if results else "nothing was measured yet\n"
    (out / "tables.md").write_text(text)
    return text


def _roofline(arguments: argparse.Namespace) -> None:
    """Measure the kernels of some models and draw them together, one picture for each number of threads."""
    from bitwright.compiler.bench.roofline import measure_roofline
    from bitwright.compiler.bench.roofline_picture import roofline_picture
    from kernels.forms import Forms
    from kernels.models import models_named

    target = arguments.targets.split(",")[0]
    for threads in (int(n) for n in arguments.threads.split(",")):
        found = []
        for model in models_named(arguments.roofline_models.split(",")):
            bundle = Forms(model, arguments.out / "models" / model.name).bundle(target, tune=arguments.tune)
            found.append(measure_roofline(bundle.path, threads=threads, label=model.name))
            print(model.name, *found[-1].lines(), sep="\n  ")
        (arguments.out / f"roofline-{target}-{threads}.svg").write_text(roofline_picture(found))
        record = [r.to_dict() for r in found]
        (arguments.out / f"roofline-{target}-{threads}.json").write_text(json.dumps(record, indent=1))


def main() -> int:
    """Run the command line."""
    arguments = _parser().parse_args()
    if "BITWRIGHT_ZOO" not in os.environ:
        print("set BITWRIGHT_ZOO to the folder with the models", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.action == "run":
        _run(arguments)
    if arguments.action == "roofline":
        _roofline(arguments)
    else:
        print(_write_tables(arguments.out))
    return 0
