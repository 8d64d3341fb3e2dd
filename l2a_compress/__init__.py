"""Learning to Allocate: language models whose layers, heads and thinking follow the input and a compute budget.

This module is light: it imports no deep-learning framework. Training lives in ``l2a_compress.training``, evaluation
in ``l2a_compress.evaluation``.
"""

from l2a_compress.allocation import Allocation
from l2a_compress.artifact import ARTIFACT_FILE, ArtifactConfig
from l2a_compress.budget import Budget
from l2a_compress.bundle import MANIFEST_FILE, Bundle
from l2a_compress.cost import CostModel, ModelShape
from l2a_compress.device import DeviceProfile, list_devices
from l2a_compress.errors import (
    AllocationError,
    ArtifactError,
    BudgetError,
    BundleError,
    ConfigError,
    DataError,
    EngineError,
    L2AError,
    OutOfMemoryError,
    SessionError,
    StorageError,
    TokenizerError,
    TrainingError,
    UnsupportedModelError,
)
from l2a_compress.split import Split, SplitPoint

__version__ = "0.1.0"

__all__ = [
    "ARTIFACT_FILE",
    "MANIFEST_FILE",
    "Allocation",
    "AllocationError",
    "ArtifactConfig",
    "ArtifactError",
    "Budget",
    "BudgetError",
    "Bundle",
    "BundleError",
    "ConfigError",
    "CostModel",
    "DataError",
    "DeviceProfile",
    "EngineError",
    "L2AError",
    "ModelShape",
    "OutOfMemoryError",
    "SessionError",
    "Split",
    "SplitPoint",
    "StorageError",
    "TokenizerError",
    "TrainingError",
    "UnsupportedModelError",
    "__version__",
    "list_devices",
]
