"""Caches that survive their process: one safetensors file, checked before anything of it is used."""

from .cache_file import load, save
from .prompt import SavedPrompt

__all__ = ["SavedPrompt", "load", "save"]
