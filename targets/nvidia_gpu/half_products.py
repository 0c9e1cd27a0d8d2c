"""Half precision in compiled models: products with constant weights on tensor cores, other sums in float32.

Every value is stored as float16. What computes on tensor cores rounds once, behind bias and Relu; every other operator
widens what it reads, computes in float32 and rounds its result, so no sum overflows or loses digits on its way.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import ir, relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from bitwright.compiler.lower.float.bindings import Bindings, float_shape
from bitwright.compiler.lower.float.products import Product, find_products
from bitwright.compiler.lower.float.replace import Replacement, relax_functions, with_replacements
from bitwright.compiler.lower.templates.geometry import DotGeometry
from bitwright.targets.backend import Kernel
from bitwright.targets.nvidia_gpu.execution import HALF_PRODUCT
from bitwright.targets.nvidia_gpu.float_gemm import HALF_BYTES, K_ALIGN, MMA_F16, half_gemm_kernel
from bitwright.targets.nvidia_gpu.kernels import FEW_COLUMNS, FEW_ROWS, gpu_of
from bitwright.targets.nvidia_gpu.mma_tiles import Tiling, extent_of, space
from bitwright.targets.schema import Profile
from bitwright.targets.sections.gpu import Gpu

HALF, SINGLE = "float16", "float32"
CONVOLUTIONS = ("relax.nn.conv1d", "relax.nn.conv2d", "relax.nn.conv3d")
# These pass values on as they are, or convert them themselves.
MOVES = frozenset(
    f"relax.{name}"
    for name in (
        "astype",
        "broadcast_to",
        "call_tir",
        "concat",
        "dynamic_strided_slice",
        "expand_dims",
        "flatten",
        "flip",
        "gather_elements",
        "gather_nd",
        "permute_dims",
        "repeat",
        "reshape",
        "split",
        "squeeze",
        "stack",
        "strided_slice",
        "take",
        "tile",
        "where",
    )
)


def use_half_kernels(module: tvm.IRModule, profile: Profile) -> tvm.IRModule:
    """Put float16 products on tensor cores, and let every other float16 operator compute in float32.

    Products of two activations, and those that fill no tile (few rows or columns, an odd reduction), are among the
    others, as all of them are where the profile has no row ``mma_f16``.

    Args:
        module: Operators are not legalized yet; shapes are static.
        profile: With a GPU.
    """
    if any(row.name == MMA_F16 for row in profile.compute):
        module = _on_tensor_cores(module, gpu_of(profile))
    return _Widened(module).run()


def _on_tensor_cores(module: tvm.IRModule, gpu: Gpu) -> tvm.IRModule:
    replaced: dict[Any, Replacement] = {}
    dropped: set[Any] = set()
    for _, function in relax_functions(module):
        for product in find_products(Bindings(function), strided=False):
            kernel = _kernel(product, gpu)
            if kernel is not None:
                replaced[product.root] = _replacement(product, kernel)
                dropped.update(product.members)
    return with_replacements(module, replaced, dropped - replaced.keys())


def _replacement(product: Product, kernel: Kernel) -> Replacement:
    operands = (*product.arguments, *kernel.constants)
    return Replacement(HALF_PRODUCT, kernel.key, lambda: kernel.function, lambda: operands, product)


def _kernel(product: Product, gpu: Gpu) -> Kernel | None:
    """Return the kernel of a product, or None if tensor cores do not take it or would mostly multiply padding."""
    g, weight = product.geometry, product.weight
    if weight is None or g.dtype != HALF or g.batch:
        return None
    if g.m <= FEW_ROWS or g.n < FEW_COLUMNS or g.k % K_ALIGN:
        return None
    tiling = _tiling(g.m, g.n, g.k, gpu)
    shape = float_shape(product.root)
    assert shape is not None  # find_products knows it
    return None if tiling is None else half_gemm_kernel(shape[:-1], weight, product.bias, tiling, relu=g.relu)


def _tiling(rows: int, columns: int, depth: int, gpu: Gpu) -> Tiling | None:
    """Return the cut that is estimated to take least: fp16 has half the rate of int8, and twice its bytes."""
    geometry = DotGeometry((rows, depth), (rows, columns), 1, 1, rows, depth, 1, rows, columns)
    return next(space(extent_of(geometry, HALF_BYTES), gpu, 0), None)


@mutator
class _Widened(PyExprMutator):  # type: ignore[misc]
    """Rebuilds every Relax function with casts around operators that compute in float16."""

    def run(self) -> tvm.IRModule:
        for variable, function in relax_functions(self.builder_.get()):
            self.builder_.update_func(variable, self.visit_expr(function))
        return self.builder_.get()

    def visit_call_(self, call: Any) -> Any:
        call = self.visit_expr_post_order(call)
        if not isinstance(call.op, ir.Op) or call.op.name in MOVES or not _is_half(call):
            return call
        result = self.builder_.emit(self.widened(call))
        return relax.op.astype(result, HALF) if not _is_half(result) else result

    def widened(self, call: Any) -> Any:
        """Return the operator in float32; products and convolutions read float16 and sum in float32."""
        if call.op.name == "relax.matmul":
            return relax.op.matmul(*call.args, out_dtype=SINGLE)
        if call.op.name in CONVOLUTIONS:
            return _wide_convolution(call)
        arguments = [self.wide(argument) for argument in call.args]
        return tvm.ir.Call(call.op, arguments, call.attrs, call.ty_args)

    def wide(self, argument: Any) -> Any:
        """Return an operand in float32 if it is float16."""
        return self.builder_.emit(relax.op.astype(argument, SINGLE)) if _is_half(argument) else argument


def _wide_convolution(call: Any) -> Any:
    a = call.attrs
    function = getattr(relax.op.nn, call.op.name.rsplit(".", 1)[1])
    layouts = (a.data_layout, a.kernel_layout, a.out_layout)
    return function(*call.args, a.strides, a.padding, a.dilation, int(a.groups), *layouts, SINGLE)


def _is_half(value: Any) -> bool:
    return isinstance(value.ty, relax.TensorType) and str(value.ty.dtype) == HALF
