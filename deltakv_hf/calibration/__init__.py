"""Compressors made for a model from texts of the user."""
