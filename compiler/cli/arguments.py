"""Arguments and options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

RuntimeName = Literal["artifact", "onnxruntime"]
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="The ONNX file.", show_default=False)]
Target = Annotated[
    str,
    typer.Option(
        "-t", "--target", help="A target's name ('bitwright targets list') or a profile's .yaml file."
    ),
]
Targets = Annotated[
    list[str], typer.Option("-t", "--target", help="A target's name or .yaml file; may be repeated.")
]
Data = Annotated[
    str | None,
    typer.Option(
        "-d",
        "--data",
        help="Samples: an .npz, a folder of .npz files, or FILE.py:FUNC; of a decoder also tokens FILE.npz:ARRAY or a "
        "text FILE.txt,tokenizer=FILE.json, cut into windows (,window=256).",
        metavar="DATA",
    ),
]
Validation = Annotated[
    str | None,
    typer.Option(
        "--validation",
        help="Samples that formats are judged by, named like --data; by default some that are held back.",
        metavar="DATA",
    ),
]
Recipe = Annotated[
    str,
    typer.Option("--recipe", help="A recipe's name ('bitwright recipes'), a recipe's file, or a plan.yaml."),
]
Group = Annotated[
    int | None,
    typer.Option("--group", min=16, max=256, help="Weights that share a scale in grouped formats."),
]
Budget = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        metavar="NAME=AMOUNT",
        help="Bounds: latency=8ms,size=2MB,ram=512KB,energy=1mJ, bits=6 of a weight, loss=0.01 predicted; "
        "of circuits fps=1000 at least, luts=20000, ffs, dsps, brams at most.",
    ),
]
Minimise = Annotated[
    str | None,
    typer.Option(
        "--minimise",
        metavar="WHAT",
        help="Under the budget: loss (the default), latency, size, ram or energy; of circuits interval, luts, dsps.",
    ),
]
Loss = Annotated[
    str, typer.Option("--loss", help="What the allocator predicts the loss by: sqnr, cosine, kl or eval.")
]
Scheduler = Annotated[
    str | None,
    typer.Option("--scheduler", metavar="tcp://HOST:PORT", help="Measure sensitivities on a dask cluster."),
]
Workers = Annotated[int, typer.Option("--workers", min=1, help="Processes that measure sensitivities.")]
Cache = Annotated[
    Path | None, typer.Option("--cache", help="Folder that keeps measured sensitivities for the next run.")
]
Method = Annotated[
    str,
    typer.Option(
        "--method",
        help="How ranges are chosen: mse, minmax, percentile:99.99, entropy, ...; judged tries some.",
    ),
]
Samples = Annotated[int | None, typer.Option("--samples", help="Calibrate on at most so many samples.")]
Dims = Annotated[
    list[str] | None,
    typer.Option("--dim", metavar="NAME=SIZE", help="Size of a dynamic dimension; may be repeated."),
]
Buckets = Annotated[
    list[str] | None,
    typer.Option(
        "--bucket",
        metavar="NAME=SIZE,SIZE,...",
        help="Sizes of a dynamic dimension that the artifact has a function for; inputs of other sizes are padded. "
        "May be repeated.",
    ),
]
Pads = Annotated[
    list[str] | None,
    typer.Option(
        "--pad", metavar="INPUT=VALUE", help="What fills an input up to a bucket's size; may be repeated."
    ),
]
Loop = Annotated[
    str | None,
    typer.Option(
        "--loop", metavar="NAME", help="A dynamic dimension (the batch) that is served one element at a time."
    ),
]
Dynamic = Annotated[
    str | None,
    typer.Option(
        "--dynamic",
        metavar="NAME[=LARGEST]",
        help="A dynamic dimension (the batch, or the length of a sequence) of which one function serves any size, or "
        "any up to the largest; its buckets keep functions of their own.",
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        "--context",
        metavar="POSITIONS",
        help="A decoder: keep so many positions in caches that are written in place, with functions for one new token "
        "and for pieces of a prompt.",
    ),
]
Static = Annotated[
    str | None,
    typer.Option(
        "--static",
        metavar="NAME",
        help="Also write libNAME.a, the model to be linked into a C or C++ program.",
    ),
]
Synth = Annotated[
    bool,
    typer.Option("--synth", help="Circuits: synthesize, and compare the cells with the prediction."),
]
PlaceAndRoute = Annotated[
    bool, typer.Option("--pnr", help="FPGA: synthesize, place and route: clock, utilisation, bitstream.")
]
KeepFloat = Annotated[
    list[str] | None,
    typer.Option("--keep-float", metavar="NODE", help="Leave a node in float; may be repeated."),
]
Evaluate = Annotated[
    str | None,
    typer.Option(
        "--eval",
        metavar="METRIC",
        help="FILE.py:FUNC: FUNC(run) returns a number, higher is better; of a decoder also perplexity:TOKENS, tokens "
        "named like --data.",
    ),
]
MaxDrop = Annotated[
    str | None,
    typer.Option("--max-drop", metavar="SHARE", help="Largest relative drop of the metric: 0.5% or 0.005."),
]
RandomData = Annotated[
    bool, typer.Option("--random-data", help="Calibrate on random data: for a dry try only.")
]
Unpadded = Annotated[
    bool,
    typer.Option(
        "--unpadded",
        help="A decoder: attention_mask is all ones, position_ids continue the cache. Both inputs go, attention can "
        "be fused.",
    ),
]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Threads for calibration and timing.")]
ComputingThreads = Annotated[int, typer.Option("--threads", min=1, help="Threads that compute.")]
Bundle = Annotated[
    Path, typer.Argument(metavar="OUT", help="What 'bitwright compile -o' wrote.", show_default=False)
]
Result = Annotated[
    Path,
    typer.Argument(
        metavar="OUT",
        help="What 'bitwright compile -o' wrote, or the .onnx file of 'bitwright quantize'.",
        show_default=False,
    ),
]
OutputFolder = Annotated[
    Path | None,
    typer.Option("-o", "--output", help="Output folder; one below it for each of several targets."),
]
OutputModel = Annotated[
    Path | None, typer.Option("-o", "--output", help="The file to write; MODEL.RECIPE.onnx unless named.")
]
StopAfter = Annotated[
    str | None, typer.Option("--stop-after", metavar="PHASE", help="Stop after this phase.")
]
Dump = Annotated[Path | None, typer.Option("--dump", help="Folder for the model as it is after every phase.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check model, data and options, show the plan, write nothing.")
]
Timeout = Annotated[float, typer.Option("--timeout", min=1, help="Seconds that lowering may take.")]
Stream = Annotated[
    str,
    typer.Option(
        "--stream",
        metavar="WAY",
        help="Part by part in bounded memory: quantized (calibrated behind quantized parts), float, off, or auto: "
        "models over a quarter of the free memory.",
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Go on behind the parts that an interrupted run with --stream has finished."
    ),
]
Gate = Annotated[
    bool, typer.Option("--gate/--no-gate", help="Measure int8 against float, keep what is faster.")
]
KVCache = Annotated[
    str | None,
    typer.Option(
        "--kv-cache",
        metavar="TYPE",
        help="What a decoder's cache of keys and values holds: float16, int8 or int4. "
        "The graph's past and present tensors change type with it.",
    ),
]
Page = Annotated[Path | None, typer.Option("--report", help="Write the report as an HTML page, too.")]
