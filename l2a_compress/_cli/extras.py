"""A package that an extra would have installed: one error that says how, in the place of a traceback."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

from l2a_compress.errors import ConfigError

# By the name that is imported. What several extras hold stands here under one of them.
EXTRAS: Mapping[str, str] = MappingProxyType(
    {
        "lm_eval": "lm-eval",
        "onnxruntime": "serve",
        **dict.fromkeys(("ml_dtypes", "onnx", "onnx_ir", "onnxscript"), "export"),
        **dict.fromkeys(("accelerate", "datasets", "jsonschema", "matplotlib", "optimum", "peft"), "train"),
        **dict.fromkeys(("safetensors", "torch", "transformers"), "train"),
    }
)


@contextmanager
def optional_packages() -> Iterator[None]:
    """Turns the lack of an optional package into one error.

    Raises:
        ConfigError: a package of an extra is not installed; says which, and the line that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:  # a fault, not a choice
            raise
        other = ", or [gpu] for an NVIDIA GPU" if package == "onnxruntime" else ""
        raise ConfigError(
            f"the package {package} is not installed, which this command needs: "
            f"pip install 'l2a-compress[{EXTRAS[package]}]'{other}"
        ) from error
