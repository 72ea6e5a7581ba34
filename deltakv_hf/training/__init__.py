"""Training of compressors through a frozen model: `train` is the way in."""

from .trainer import History, train

__all__ = ["History", "train"]
