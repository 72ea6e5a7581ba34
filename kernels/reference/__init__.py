"""The pure-PyTorch specification of every op, one op a file.

Each op here is readable, runs on any device and decides what is right; `triton_ops` repeats its names and signatures.
"""

from .analyse import analyse
from .analyse_states import analyse_states
from .attend import Attended, attend, attend_many, weigh
from .attend_blocks import Fusion, attend_blocks
from .block_directions import block_directions
from .choose import choose
from .compare_blocks import compare_blocks
from .feed_forward import LINEAR_MAPS, feed_forward
from .int4_decode import GROUP as INT4_GROUP
from .int4_decode import int4_decode, int4_dense, int4_encode
from .nearest_references import nearest_references
from .quantize import dequantize, pack, quantize, unpack
from .reconstruct import predict, reconstruct
from .reconstruct_and_attend import (
    KeyMap,
    References,
    Rotation,
    ValueMap,
    Vectors,
    reconstruct_and_attend,
)
from .residuals import residuals
from .score import paired, score
from .score_leading import score_leading
from .unrotate import unrotate
from .vector_quantize import Groups, grid_limit, group_runs, vector_dequantize, vector_quantize

__all__ = [
    "INT4_GROUP",
    "LINEAR_MAPS",
    "Attended",
    "Fusion",
    "Groups",
    "KeyMap",
    "References",
    "Rotation",
    "ValueMap",
    "Vectors",
    "analyse",
    "analyse_states",
    "attend",
    "attend_blocks",
    "block_directions",
    "compare_blocks",
    "attend_many",
    "choose",
    "dequantize",
    "feed_forward",
    "grid_limit",
    "group_runs",
    "int4_decode",
    "int4_dense",
    "int4_encode",
    "nearest_references",
    "pack",
    "paired",
    "predict",
    "quantize",
    "reconstruct",
    "reconstruct_and_attend",
    "residuals",
    "score",
    "score_leading",
    "unpack",
    "unrotate",
    "vector_dequantize",
    "vector_quantize",
    "weigh",
]
