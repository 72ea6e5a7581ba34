"""Compiles every kernel for every kind of card, on a machine without any; prints `[kernel, capability, bytes]` lines.

A process of its own: with the interpreter, which tests of what kernels compute use, nothing is compiled.
"""

import itertools
import json

import torch
import triton
from deltakv_hf.kernels.triton_ops import (
    analyse,
    analyse_states,
    attend,
    attend_blocks,
    attend_kernels,
    block_directions,
    block_kernels,
    choose,
    choose_kernels,
    compare_blocks,
    decoding,
    int4_decode,
    int4_kernels,
    lead_kernels,
    merge_kernels,
    nearest_references,
    residuals,
    round_rows,
    score_leading,
    scoring,
    unrotate,
    vector_dequantize,
    vector_quantize,
)
from deltakv_hf.kernels.triton_ops import reconstruct_and_attend as ra
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)
# of each kernel: its arguments that are no pointers to float32; integers that 16 divides are marked, as in real calls
I32, WHOLE = "i32", "i32:16"


def integers(names: str, whole: str = "") -> dict[str, str]:
    return dict.fromkeys(names.split(), I32) | dict.fromkeys(whole.split(), WHOLE)


NEAREST = {"codes": "*i8", "reference_codes": "*i8", "num_visible": "*i32", "found": "*i32", "known_found": "*i32"}
NEAREST |= integers("num_tokens num_references part_size", "width")
ASSIGN = {"table": "*i16", "codes": "*u8", "vectors": "*fp16"}
ASSIGN |= dict.fromkeys("first_component first_entry first_place sizes byte_idx".split(), "*i32")
ASSIGN |= integers("num_tokens num_components num_bytes first_group")
PICK = {"table": "*i16", "codes": "*u8", "group_idx": "*i32"}
PICK |= dict.fromkeys("first_component first_entry sizes byte_idx".split(), "*i32")
PICK |= integers("num_tokens num_bytes num_components num_coded")
ROUND = {"codes": "*i8", "share": "fp32", "places": "*i64"} | integers("num_rows num_places width", "room")
LEFT = {"places": "*i64", "reference_idx": "*i16"} | integers("num_tokens num_places num_references width")
SPLIT = {"parts": "*fp16"} | integers("", "width room")
MULTIPLY = {"parts": "*fp16", "inverse": "*fp16"}
MULTIPLY |= integers("num_tokens num_components", "stride width room")
CENTRE = {"keys": "*bf16", "values": "*bf16", "numbers": "*fp16"}
CENTRE |= integers(
    "num_tokens key_row value_row angle_row", "key_width value_width room key_head key_token value_head value_token"
)
UNROTATE = {"states": "*fp16"}
UNROTATE |= integers("num_tokens heads row_stride angle_stride", "head_dim pairs head_stride token_stride width")
HALVES = dict.fromkeys(("query", "components", "table", "key_map"), "*fp16")
INDICES = (
    {"codes": "*u8"}
    | dict.fromkeys(
        "slots slot_map reference_map positions lengths byte_idx first_entry vector_size".split()
        + "reference_byte_idx reference_first_entry reference_vector_size".split(),
        "*i32",
    )
    | {"reference_codes": "*u8", "reference_idx": "*i16"}
)
DECODE = (
    HALVES | INDICES | integers("first num_tokens num_components row_stride slot_stride slot_map_stride", "width room")
)
DECODE |= integers("reference_row_stride reference_stride idx_row_stride reference_map_stride end_16 end_8 end_4 end_2")
SCORE = (
    HALVES
    | INDICES
    | {"query": "*bf16", "scale": "fp32"}
    | integers("first num_tokens num_components part_size num_heads num_queries angle_stride")
)
SCORE |= integers("mask_row mask_head mask_query mask_token", "width room score_room half pairs map_stride")
MIX = HALVES | integers("chunk count num_components num_rows row_blocks", "span width room")
SEEN = {"output": "*bf16"} | integers("num_spans num_heads num_queries num_blocks num_components")
PROJECT = SEEN | {"value_map": "*fp16"}
RAW = integers("num_tokens first second third num_heads num_queries mask_row mask_head mask_query mask_token")
RAW |= {"scale": "fp32"}
BLOCKS = integers(" ".join(block_kernels.ANY), "block_stride token_stride")
BLOCKS |= {"scale": "fp32", "block_table": "*i64"} | dict.fromkeys("leader positions lengths".split(), "*i32")
CHOOSE = dict.fromkeys("keys counters tallies slots".split(), "*i32")
CHOOSE |= integers(" ".join(choose_kernels.ANY))
INT4 = dict.fromkeys(("key_codes", "key_levels", "value_codes", "value_levels", "block_table", "lengths"), "*i32")
INT4 |= {"query_scale": "fp32"} | integers(
    "num_tokens span num_heads num_queries mask_row mask_head mask_query mask_token"
)
INT4 |= {name: WHOLE for name in int4_decode.int4_kernel.arg_names if name.endswith(("_row", "_head"))} | INT4


def kernels(capability: int):
    """(kernel, types, constants, options) of everything that runs on a card."""
    for interleaved in (True, False):
        constants = {"INTERLEAVED": interleaved, "BLOCK_TOKENS": unrotate.BLOCK_TOKENS, "BLOCK_DIM": 128}
        yield unrotate.unrotate_kernel, UNROTATE, constants, {"enable_fp_fusion": False}
    yield analyse.split_kernel, SPLIT, {"BLOCK_WIDTH": analyse.SPLIT_WIDTH}, {}
    for parts in (1, 2):
        yield analyse.multiply_kernel, MULTIPLY, {"PARTS": parts} | analyse.tile(capability), {}
    for interleaved, pairs, block in ((False, 64, 1024), (True, 48, 4096), (False, 0, 256)):
        constants = {"KEY_DIM": 128, "VALUE_DIM": 96, "PAIRS": pairs, "INTERLEAVED": interleaved}
        constants |= {"KEY_BLOCK": block, "VALUE_BLOCK": block, "num_warps": 4 if block < 4096 else 8}
        yield analyse_states.centre_kernel, CENTRE, constants, {"enable_fp_fusion": False}
    for is_first in (True, False):
        constants = {"IS_FIRST": is_first, "IN_BYTES": capability >= 80}
        tile = nearest_references.tile(capability)
        yield nearest_references.nearest_kernel, NEAREST, constants | tile, {"enable_fp_fusion": False}
    for block, num_warps in ((2048, 4), (8192, 8)):
        options = {"num_warps": num_warps, "enable_fp_fusion": False}
        yield round_rows.round_kernel, ROUND, {"HAS_PLACES": block == 2048, "BLOCK": block}, options
    yield residuals.residual_kernel, LEFT, {"BLOCK": residuals.BLOCK}, {"enable_fp_fusion": False}
    yield vector_dequantize.pick_kernel, PICK, dict(vector_dequantize.TILE), {}
    yield vector_quantize.vectors_kernel, ASSIGN, {"PLACES": 16}, {}
    yield vector_quantize.assign_kernel, ASSIGN, vector_quantize.tile(capability), {}
    for num_places in (32, 64, 128, vector_quantize.MOST_PLACES):
        yield vector_quantize.vectors_kernel, ASSIGN, {"PLACES": num_places}, {}
        yield vector_quantize.assign_long_kernel, ASSIGN, vector_quantize.long_tile(capability, num_places), {}
    for has_references, has_map in itertools.product((True, False), repeat=2):
        constants = {"HAS_SLOTS": True, "HAS_MAP": has_map, "HAS_REFERENCES": has_references}
        yield attend_kernels.decode_kernel, DECODE, constants | decoding.DECODE_TILE, {}
    for half in (32, 64, 128):
        for dtype, types in ((torch.float16, SCORE), (torch.float32, {n: t for n, t in SCORE.items() if t != "*fp16"})):
            constants = {
                "HAS_MASK": True,
                "HAS_POSITIONS": True,
                "HAS_LENGTHS": True,
                "INTERLEAVED": half == 32,
                "HALF": half,
                "QUERIES": scoring.MOST_QUERIES,
            }
            yield attend_kernels.score_kernel, types, constants | scoring.score_tile(half, dtype, capability), {}
            constants = {name: part for name, part in constants.items() if name != "HAS_MASK"}
            constants |= {"QUERIES": score_leading.QUERIES} | score_leading.tile(half, 64, dtype, capability)
            yield lead_kernels.lead_kernel, types, constants, {}
    for rows in (16, 64):
        for dtype, types in ((torch.float16, MIX), (torch.float32, {n: t for n, t in MIX.items() if t != "*fp16"})):
            constants = {"PARTS": 2, "ROWS": rows, "num_stages": ra.mix_stages(dtype)} | ra.MIX_TILE
            yield attend_kernels.mix_kernel, types, constants, {}
    for head_dim, queries in ((128, 4), (96, 8), (256, 8)):
        for dtype, query in ((torch.float16, "*fp16"), (torch.float32, "*fp32")):
            constants = {"HAS_MASK": True, "HAS_TABLE": head_dim == 128, "HAS_LENGTHS": True}
            constants["KEEPS_SCORES"] = head_dim == 128
            constants |= int4_decode.shapes(head_dim, head_dim, queries, dtype, capability)
            constants.pop("programs")
            yield int4_kernels.int4_kernel, INT4 | {"query": query}, constants, {}
    for value_dim, rows in ((128, 16), (256, 64)):
        constants = {"VALUE_DIM": value_dim, "SPANS": 8}
        seen = constants | {"HAS_BEFORE": True}
        yield merge_kernels.merge_kernel, SEEN, seen | {"BLOCK_VALUES": merge_kernels.MERGE_VALUES}, {}
        seen |= {"BLOCKS": 16, "BLOCK_VALUES": triton.next_power_of_2(value_dim)}
        yield merge_kernels.finish_kernel, SEEN, seen, {}
        constants |= {"ROWS": rows, "BLOCK_VALUES": ra.PROJECT_VALUES, "BLOCK_COMPONENTS": 128}
        yield merge_kernels.project_kernel, PROJECT, constants, {}
    for dtype, kind, head_dim in (
        (torch.float16, "*fp16", 80),
        (torch.bfloat16, "*bf16", 128),
        (torch.float32, "*fp32", 256),
    ):
        types = {name: kind for name in attend.attend_kernel.arg_names if name.endswith(("query", "keys", "values"))}
        constants = {"HAS_MASK": True, "IS_WHOLE": head_dim == 128, "SPAN": attend.SPAN, "ROWS": attend.ROWS}
        constants |= {"HEAD_DIM": head_dim, "VALUE_DIM": head_dim}
        constants |= dict.fromkeys(("KEY_BLOCK", "VALUE_BLOCK"), triton.next_power_of_2(head_dim))
        tile = attend.tile(head_dim, dtype, capability)
        yield attend.attend_kernel, types | RAW | {"mask_query": I32}, constants | tile, {}
    for dtype, kind, head_dim in (
        (torch.float16, "*fp16", 64),
        (torch.bfloat16, "*bf16", 128),
        (torch.float32, "*fp32", 256),
    ):
        # read as stored, or with all there is
        constants = dict.fromkeys("IS_FUSED HAS_POSITIONS HAS_MASK HAS_LENGTHS".split(), head_dim != 64)
        constants |= {"INTERLEAVED": head_dim == 256, "PAIRS": 0 if head_dim == 64 else head_dim // 2}
        constants |= dict.fromkeys(("HEAD_DIM", "VALUE_DIM", "KEY_BLOCK", "VALUE_BLOCK"), head_dim)
        constants |= {"ROWS": attend_blocks.ROWS} | attend_blocks.tile(head_dim, dtype, capability)
        yield block_kernels.block_kernel, {"query": kind, "blocks": kind} | BLOCKS, constants, {}
    pairs = {"blocks": "*bf16", "directions": "*bf16"} | dict.fromkeys("places members leaders".split(), "*i64")
    pairs |= integers("block_size", "key_width width")
    for kernel in (block_directions.direction_kernel, compare_blocks.compare_kernel):
        yield kernel, pairs, {"COLUMNS": block_directions.COLUMNS}, {}
    constants = {"SPANS": 16, "ROWS": choose.KEY_ROWS, "BLOCK": choose.KEY_TOKENS}
    yield choose_kernels.sum_kernel, CHOOSE, {"BLOCK": choose.SUM_TOKENS}, {}
    yield choose_kernels.key_kernel, CHOOSE, constants, {"num_warps": 8}
    yield choose_kernels.tally_kernel, CHOOSE, {"BLOCK": choose.BLOCK}, {}
    yield choose_kernels.write_kernel, CHOOSE, {"BLOCK": choose.BLOCK, "BLOCKS": 128}, {}


for capability in CAPABILITIES:
    for kernel, types, constants, options in kernels(capability):
        options |= {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
        signature = {arg: types.get(arg, "*fp32") for arg in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
        values = {(kernel.arg_names.index(arg),): value for arg, value in constants.items()}
        aligned = {arg for arg, kind in signature.items() if kind.startswith("*") or kind == WHOLE}
        # a launch would not say that of an argument whose name is on the list of what is not looked at
        assert not aligned & set(kernel.do_not_specialize or ()), (kernel.__name__, kernel.do_not_specialize)
        attributes = {(kernel.arg_names.index(arg),): [["tt.divisibility", 16]] for arg in aligned}
        signature = {arg: kind.removesuffix(":16") for arg, kind in signature.items()}
        target = GPUTarget("cuda", capability, 32)
        made = triton.compile(ASTSource(kernel, signature, values, attributes), target=target, options=options)
        print(json.dumps([kernel.__name__, capability, made.metadata.shared]), flush=True)
