"""Compiles every kernel for every kind of card, on a machine without any; prints `[kernel, capability, bytes]` lines.

A process of its own: with the interpreter, which tests of what kernels compute use, nothing is compiled.
"""

import json

import triton
from deltakv_hf.kernels.reference import grid_limit
from deltakv_hf.kernels.triton_ops import nearest_references, score, vector_quantize
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)
# of each kernel: its arguments that are no pointers to float32, what it is specialised to, and options
NEAREST = {"codes": "*i8", "reference_codes": "*i8", "num_visible": "*i32", "found": "*i32"}
NEAREST |= dict.fromkeys(("num_tokens", "num_references", "width"), "i32")
ASSIGN = {"codes": "*u8"}
ASSIGN |= dict.fromkeys(("num_tokens", "num_components", "num_bytes", "first_component", "first_byte"), "i32")

SCORE = dict.fromkeys(("num_tokens", "num_components", "num_queries", "half", "pairs", "angle_stride"), "i32")


def kernels(capability: int):
    """(kernel, types, constants, options) of everything that runs on a card."""
    for is_first in (True, False):
        constants = {"IS_FIRST": is_first, "IN_BYTES": capability >= 80} | nearest_references.TILE
        yield nearest_references.nearest_kernel, NEAREST, constants, {"enable_fp_fusion": False}
    for size in (1, 4, 16):
        constants = {"SIZE": size, "LIMIT": grid_limit(size), "BLOCK_TOKENS": vector_quantize.BLOCK_TOKENS}
        yield vector_quantize.assign_kernel, ASSIGN | {"table": "*i16" if size < 4 else "*i8"}, constants, {}
    for half in (32, 64, 128):
        constants = {"HALF": half, "QUERIES": 16, "PRECISION": "ieee"} | score.tile(half)
        yield score.score_kernel, SCORE, constants, {}


for capability in CAPABILITIES:
    for kernel, types, constants, options in kernels(capability):
        signature = {arg: types.get(arg, "*fp32") for arg in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
        values = {(kernel.arg_names.index(arg),): value for arg, value in constants.items()}
        target = GPUTarget("cuda", capability, 32)
        made = triton.compile(ASTSource(kernel, signature, values), target=target, options=options)
        print(json.dumps([kernel.__name__, capability, made.metadata.shared]))
