"""What runs a bundle. It needs onnxruntime and NumPy, never torch."""

from l2a_compress.runtime.policy import Policy, Tier
from l2a_compress.runtime.request import Limits
from l2a_compress.runtime.runtime import Answer, Runtime
from l2a_compress.runtime.sampling import Sampling
from l2a_compress.runtime.server import Server, Stream

__all__ = ["Answer", "Limits", "Policy", "Runtime", "Sampling", "Server", "Stream", "Tier"]
