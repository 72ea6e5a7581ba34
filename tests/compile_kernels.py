"""Compiles every kernel for every kind of card, on a machine without any; prints `[kernel, capability, bytes]` lines.

A process of its own: with the interpreter, which tests of what kernels compute use, nothing is compiled.
"""

import json

import torch
import triton
from deltakv_hf.kernels.triton_ops import attend_kernels, int4_decode, nearest_references, vector_quantize
from deltakv_hf.kernels.triton_ops import reconstruct_and_attend as ra
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)
# of each kernel: its arguments that are no pointers to float32; integers that 16 divides are marked, as in real calls
I32, WHOLE = "i32", "i32:16"


def integers(names: str, whole: str = "") -> dict[str, str]:
    return dict.fromkeys(names.split(), I32) | dict.fromkeys(whole.split(), WHOLE)


NEAREST = {"codes": "*i8", "reference_codes": "*i8", "num_visible": "*i32", "found": "*i32"}
NEAREST |= integers("num_tokens num_references", "width")
ASSIGN = {"codes": "*u8", "limit": "fp32"} | integers(
    "num_tokens num_components num_bytes first_component first_byte size"
)
HALVES = dict.fromkeys(("query", "components", "table", "key_map"), "*fp16")
INDICES = {"codes": "*u8"} | dict.fromkeys(
    ("slots", "positions", "lengths", "byte_idx", "first_entry", "vector_size"), "*i32"
)
DECODE = HALVES | INDICES | integers("first num_tokens num_components row_stride slot_stride", "width room")
SCORE = HALVES | INDICES | integers("first num_tokens num_components num_heads num_queries angle_stride")
SCORE |= integers("mask_row mask_head mask_query mask_token", "width room half pairs map_stride")
MIX = HALVES | integers("first_span count num_components num_rows row_blocks", "span width room")
MERGE = integers("num_spans num_components")
INT4 = dict.fromkeys(("key_codes", "key_levels", "value_codes", "value_levels", "block_table", "lengths"), "*i32")
INT4 |= integers("num_tokens span num_heads num_queries mask_row mask_head mask_query mask_token")
INT4 |= {name: WHOLE for name in int4_decode.int4_kernel.arg_names if name.endswith(("_row", "_head"))} | INT4


def kernels(capability: int):
    """(kernel, types, constants, options) of everything that runs on a card."""
    for is_first in (True, False):
        constants = {"IS_FIRST": is_first, "IN_BYTES": capability >= 80}
        tile = nearest_references.tile(capability)
        yield nearest_references.nearest_kernel, NEAREST, constants | tile, {"enable_fp_fusion": False}
    for table in ("*i8", "*i16"):
        yield vector_quantize.assign_kernel, ASSIGN | {"table": table}, dict(vector_quantize.TILE), {}
    yield attend_kernels.decode_kernel, DECODE, {"HAS_SLOTS": True} | ra.DECODE_TILE, {}
    for half in (32, 64, 128):
        for dtype, types in ((torch.float16, SCORE), (torch.float32, {n: t for n, t in SCORE.items() if t != "*fp16"})):
            constants = {
                "HAS_MASK": True,
                "HAS_POSITIONS": True,
                "HAS_LENGTHS": True,
                "HALF": half,
                "QUERIES": ra.MOST_QUERIES,
            }
            yield attend_kernels.score_kernel, types, constants | ra.score_tile(half, dtype, capability), {}
    for rows in (16, 64):
        for types in (MIX, {n: t for n, t in MIX.items() if t != "*fp16"}):
            yield attend_kernels.mix_kernel, types, {"ROWS": rows} | ra.MIX_TILE, {}
    for head_dim, queries in ((128, 4), (96, 8), (256, 8)):
        for dtype, query in ((torch.float16, "*fp16"), (torch.float32, "*fp32")):
            constants = {"HAS_MASK": True, "HAS_TABLE": head_dim == 128, "HAS_LENGTHS": True}
            constants |= int4_decode.shapes(head_dim, head_dim, queries, dtype, capability)
            constants.pop("programs")
            yield int4_decode.int4_kernel, INT4 | {"query": query}, constants, {}
    yield attend_kernels.merge_kernel, MERGE, {"SPANS": 64, "BLOCK_COMPONENTS": ra.MIX_TILE["BLOCK_COMPONENTS"]}, {}


for capability in CAPABILITIES:
    for kernel, types, constants, options in kernels(capability):
        options |= {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
        signature = {arg: types.get(arg, "*fp32") for arg in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
        values = {(kernel.arg_names.index(arg),): value for arg, value in constants.items()}
        aligned = {arg for arg, kind in signature.items() if kind.startswith("*") or kind == WHOLE}
        attributes = {(kernel.arg_names.index(arg),): [["tt.divisibility", 16]] for arg in aligned}
        signature = {arg: kind.removesuffix(":16") for arg, kind in signature.items()}
        target = GPUTarget("cuda", capability, 32)
        made = triton.compile(ASTSource(kernel, signature, values, attributes), target=target, options=options)
        print(json.dumps([kernel.__name__, capability, made.metadata.shared]), flush=True)
