"""Training of compressors through a frozen model: `train` is the way in."""

from .beginning import Form
from .settings import TrainingSettings
from .trainer import History, train

__all__ = ["Form", "History", "TrainingSettings", "train"]
