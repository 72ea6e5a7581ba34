"""Compressors fitted to a model: what it reads, what errors would cost, and the codebooks that follow from it."""

from .driver import calibrate
from .select_layers import select_filter_layers
from .settings import CalibrationSettings

__all__ = ["CalibrationSettings", "calibrate", "select_filter_layers"]
