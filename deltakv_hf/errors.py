"""Every error that this package raises on purpose. Each message names the argument, the rule, the value and the fix."""


class DeltaKVError(Exception):
    """Base class of all errors of this package."""


class InvalidOptionError(DeltaKVError, ValueError):
    """An option or argument is unknown, of the wrong kind or out of range."""


class UnsupportedModelError(DeltaKVError, ValueError):
    """The model's attention cannot be served rightly by this cache."""


class CacheStateError(DeltaKVError, RuntimeError):
    """The cache was used in an order, or with tensors, for which no right answer exists."""


class NotPicklableError(DeltaKVError, TypeError):
    """A cache was about to be pickled."""


class CompressorError(DeltaKVError, ValueError):
    """A compressor folder cannot be found, read, written or used with this model."""


class TrainingError(DeltaKVError, RuntimeError):
    """Training cannot begin or go on: memory is short, or the model gives no numbers."""
