"""Every error this library raises on purpose.

Tree:

    L2AError
    ├── BudgetError            (ValueError)    a budget out of range, or one that no allocation can meet
    ├── AllocationError        (ValueError)    layers or KV groups that the model does not have
    ├── ConfigError            (ValueError)    a bad option, recipe key or settings file
    ├── DataError              (ValueError)    a missing column, an empty data set, a bad row
    ├── UnsupportedModelError  (ValueError)    a model family that is not known
    ├── TokenizerError         (ValueError)    a tokenizer without the think and answer tags
    ├── ArtifactError          (ValueError)    an artifact folder that is missing, corrupt or foreign
    ├── BundleError            (ValueError)    a bundle folder that is missing, corrupt or foreign
    ├── StorageError           (OSError)       a full disk, a folder that is not writable
    ├── TrainingError          (RuntimeError)  a loss that is not finite, a run that cannot go on
    ├── EngineError            (RuntimeError)  a TensorRT engine that cannot be built, or is not for this machine
    └── SessionError           (RuntimeError)  a graph that cannot be loaded or run
        └── OutOfMemoryError   (MemoryError)   not enough memory for it

Each message names the option, field or file, what was found there, and what to do next. All of them are also the
built-in error a caller would expect, so that ``except ValueError`` keeps working.
"""

from __future__ import annotations

__all__ = [
    "AllocationError",
    "ArtifactError",
    "BudgetError",
    "BundleError",
    "ConfigError",
    "DataError",
    "EngineError",
    "L2AError",
    "OutOfMemoryError",
    "SessionError",
    "StorageError",
    "TokenizerError",
    "TrainingError",
    "UnsupportedModelError",
]


class L2AError(Exception):
    """Base of every error of this library."""


class BudgetError(L2AError, ValueError):
    """A budget is out of range, or no allocation can meet it."""


class AllocationError(L2AError, ValueError):
    """An allocation names layers or KV groups that the model does not have."""


class ConfigError(L2AError, ValueError):
    """An option, a recipe key or a settings file is wrong."""


class DataError(L2AError, ValueError):
    """Data cannot be used: a missing column, an empty data set, a bad row."""


class UnsupportedModelError(L2AError, ValueError):
    """The model belongs to a family that the library does not know."""


class TokenizerError(L2AError, ValueError):
    """The tokenizer lacks what the think and answer format needs."""


class ArtifactError(L2AError, ValueError):
    """An artifact folder is missing, corrupt, too new or not an artifact."""


class BundleError(L2AError, ValueError):
    """A bundle folder is missing, corrupt or not ours."""


class StorageError(L2AError, OSError):
    """The disk is full, or a path cannot be written or read. ``errno`` is kept where there is one."""


class TrainingError(L2AError, RuntimeError):
    """Training cannot go on, for example because the loss is not finite."""


class EngineError(L2AError, RuntimeError):
    """A TensorRT engine cannot be built here, or was not built for what is here."""


class SessionError(L2AError, RuntimeError):
    """A graph of a bundle cannot be loaded or run."""


class OutOfMemoryError(SessionError, MemoryError):
    """There is not enough memory to load a graph, to run it, or for a request's keys and values."""
