"""Published benchmarks on the user's data: LongBench, RULER, SCBench, AIME and GSM8K, with any of the caches."""

from .items import BenchmarkItem, Turn
from .loading import FORMATS, load_benchmark
from .runner import MODES, ItemResult, run_benchmark
from .summary import DatasetScore, summarize

__all__ = [
    "FORMATS",
    "MODES",
    "BenchmarkItem",
    "DatasetScore",
    "ItemResult",
    "Turn",
    "load_benchmark",
    "run_benchmark",
    "summarize",
]
