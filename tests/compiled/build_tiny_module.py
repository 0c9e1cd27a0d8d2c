"""Builds object files of a two-kernel Relax module: ``python build_tiny_module.py TARGET_JSON FOLDER``.

The module computes ``bw_scale``: ``y = x * 3 + 1`` on int8 [4, 16] with int32 output, then ``bw_dot``: int8
dot products ``z[i, j] = sum_k x[i, k] * w[j, k]``, which LLVM turns into the target's dot-product instruction
where it has one.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import tvm
from tvm import relax
from tvm.script import tirx as T  # noqa: N812 - the name TVMScript is written with


@T.prim_func(s_tir=True)
def bw_scale(x: T.Buffer((4, 16), "int8"), y: T.Buffer((4, 16), "int32")):
    T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
    with T.sblock("root"):
        T.reads(x[0:4, 0:16])
        T.writes(y[0:4, 0:16])
        for i, j in T.grid(4, 16):
            y[i, j] = T.Cast("int32", x[i, j]) * 3 + 1


@T.prim_func(s_tir=True)
def bw_dot(x: T.Buffer((4, 16), "int8"), w: T.Buffer((8, 16), "int8"), z: T.Buffer((4, 8), "int32")):
    T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
    with T.sblock("root"):
        T.reads(x[0:4, 0:16], w[0:8, 0:16])
        T.writes(z[0:4, 0:8])
        for i, j in T.grid(4, 8):
            z[i, j] = 0
            for k in T.serial(16):
                z[i, j] = z[i, j] + T.Cast("int32", x[i, k]) * T.Cast("int32", w[j, k])


def weights() -> np.ndarray:
    return (np.arange(128, dtype=np.int32).reshape(8, 16) * 37 % 255 - 127).astype("int8")


def module() -> tvm.IRModule:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((4, 16), "int8"))
    with builder.function("main", [x]):
        with builder.dataflow():
            scale = builder.add_func(bw_scale, "bw_scale")
            dot = builder.add_func(bw_dot, "bw_dot")
            y = builder.emit(
                relax.call_tir(scale, relax.Tuple([x]), out_ty=relax.TensorType((4, 16), "int32"))
            )
            constant = relax.const(weights())
            z = builder.emit(
                relax.call_tir(dot, relax.Tuple([x, constant]), out_ty=relax.TensorType((4, 8), "int32"))
            )
            result = builder.emit_output(relax.Tuple([y, z]))
        builder.emit_func_output(result)
    return builder.get()


def main(target: str, folder: Path) -> None:
    executable = tvm.compile(module(), target=tvm.target.Target(json.loads(target)))

    def keep(file_name: str, objects: list[str], **_: object) -> None:
        for number, path in enumerate(objects):
            shutil.copy(path, folder / f"{number}.o")
        Path(file_name).touch()

    keep.output_format = "so"
    executable.export_library(str(folder / "unused.so"), fcompile=keep)
    (folder / "unused.so").unlink(missing_ok=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
