"""Compiles each Triton kernel for compute capability 9.0; prints the lines of its assembly.

It needs no GPU: Triton carries the assembler. ``python tests/kernels/compile_triton.py``
"""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from optq.core.triton_columns import column_kernel
from optq.kernels.triton_matmul import dequantize_kernel, matmul_kernel
from optq.kernels.triton_matvec import matvec_kernel

THREE_BITS = {"periods": 8, "wbits": 3, "sym": False, "HALVES": 2, "PARTS": 2, "PLACES": 8}
FOUR_BITS = {"periods": 32, "wbits": 4, "sym": True, "HALVES": 1, "PARTS": 1, "PLACES": 8}
POINTERS = {"low": "*i32", "high": "*i32", "scales": "*fp16", "zeros": "*u8"}
POINTERS |= {"codes": "*u8", "group": "*i32"}
POINTERS |= dict.fromkeys(("W_hat", "W", "scale", "zero", "N", "squares", "residual"), "*fp32")
ACTIVATIONS = ("x", "y", "weight")


def compiled(kernel, constants, num_warps):
    """The kernel for bfloat16 activations, sizes that are multiples of 16."""
    kernel = kernel.fn if isinstance(kernel, triton.runtime.Autotuner) else kernel
    names = kernel.arg_names
    types = {name: POINTERS.get(name, "*bf16" if name in ACTIVATIONS else "i32") for name in names}
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants},
    )
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"num_warps": num_warps})


def main():
    matvec = {"RUN": 8, "TOKENS": 1, "ROWS": 2, "PERIODS": 32}
    matmul = {"RUN": 8, "TOKENS": 16, "SPLITS": 2, "ROWS": 32}
    for kernel, constants, warps in [
        (matvec_kernel, FOUR_BITS | matvec, 4),
        (matvec_kernel, THREE_BITS | matvec | {"PERIODS": 8, "RUN": 2, "TOKENS": 2}, 1),
        (matmul_kernel, FOUR_BITS | matmul, 1),
        (dequantize_kernel, THREE_BITS | {"RUN": 8, "ROWS": 16}, 4),
        (column_kernel, {"count": 64, "COLUMNS": 64, "ROWS": 32}, 1),
        (column_kernel, {"count": 5, "COLUMNS": 16, "ROWS": 32}, 1),
    ]:
        assembly = compiled(kernel, constants, warps).asm["ptx"]
        if kernel is column_kernel:  # divides and rounds as the CPU: nothing is simplified away
            assert all(part in assembly for part in ("div.rn.f32", "0f4B400000", "0fCB400000"))
        print(assembly.count("\n"))


if __name__ == "__main__":
    main()
