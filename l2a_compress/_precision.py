"""Whether bfloat16 is worth computing in on this machine."""

from __future__ import annotations

PRECISIONS = ("auto", "fp32", "bf16")


def use_bfloat16(precision: str) -> bool:
    """Whether to compute in bfloat16: as told, or with ``auto`` where the machine has instructions for it.

    Without them PyTorch falls back to loops that are about a hundred times slower than 32 bits (measured on AVX2).
    """
    if precision != "auto":
        return precision == "bf16"
    import torch

    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: dict[str, bool] = getattr(
        torch.cpu, "get_capabilities", dict
    )()  # older versions of PyTorch do not tell
    return capabilities.get("avx512_bf16", False)
