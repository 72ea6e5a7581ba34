"""The public names of the package and what users may call on them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import deltakv_hf
from deltakv_hf import calibration, evaluation, training

MODULES = (deltakv_hf, calibration, evaluation, training)


def public_objects() -> Iterator[tuple[str, object]]:
    """Name and object of everything that a public module exports."""
    for module in MODULES:
        for name in module.__all__:
            yield f"{module.__name__}.{name}", getattr(module, name)


def public_functions() -> Iterator[tuple[str, Callable]]:
    """Exported functions, and methods of exported classes that this package defines."""
    for name, thing in public_objects():
        if inspect.isfunction(thing):
            yield name, thing
        elif inspect.isclass(thing):
            yield from _methods(name, thing)


def _methods(name: str, owner: type) -> Iterator[tuple[str, Callable]]:
    for attribute in dir(owner):
        definer = next(base for base in owner.__mro__ if attribute in vars(base))
        if attribute.startswith("_") or not definer.__module__.startswith("deltakv_hf"):
            continue
        value = getattr(owner, attribute)
        if inspect.isfunction(value) or inspect.ismethod(value):
            yield f"{name}.{attribute}", value


def arguments(function: Callable) -> list[str]:
    """Names of a function's arguments, without `self` and `cls`."""
    parameters = inspect.signature(function).parameters
    return [name for name in parameters if name not in ("self", "cls", "args", "kwargs")]
