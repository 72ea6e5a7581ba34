"""How faithful a cache is, measured against the full cache."""

from .fidelity import Fidelity, WindowFidelity, measure_fidelity

__all__ = ["Fidelity", "WindowFidelity", "measure_fidelity"]
