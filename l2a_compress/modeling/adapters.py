"""LoRA adapters through PEFT, injected in place and removable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from l2a_compress.errors import ConfigError
from l2a_compress.modeling.families import ATTENTION_PROJECTIONS, MLP_PROJECTIONS

ADAPTER_NAME = "default"


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """LoRA on all linear projections of all layers (paper: r = 16). ``rank`` 0 trains no adapter."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 0:
            raise ConfigError(f"adapter rank = {self.rank!r}: must be a whole number, 0 for none")
        if not self.alpha > 0:
            raise ConfigError(f"adapter alpha = {self.alpha!r}: must be above 0: adapters learn nothing by 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"adapter dropout = {self.dropout!r}: must lie in [0, 1)")

    def to_json(self) -> dict[str, Any]:
        """All fields by name."""
        return dict(self.__dict__)

    def to_peft(self) -> LoraConfig:
        """PEFT's own configuration, as its adapter_config.json holds it."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=[*ATTENTION_PROJECTIONS, *MLP_PROJECTIONS],
            task_type="CAUSAL_LM",
        )


def add_adapters(model: PreTrainedModel, config: AdapterConfig) -> dict[str, nn.Parameter]:
    """Injects LoRA, freezes the rest, and returns the new parameters by their names in PEFT's file format."""
    model.requires_grad_(False)
    if config.rank == 0:
        return {}
    inject_adapter_in_model(config.to_peft(), model, adapter_name=ADAPTER_NAME)
    named = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()  # small steps are lost in the half precision of a frozen base
            named["base_model.model." + name.replace(f".{ADAPTER_NAME}", "")] = parameter
    return named


def remove_adapters(model: nn.Module) -> None:
    """Puts every base layer back where its adapter stands, and forgets what PEFT noted on the model."""
    vars(model).pop("peft_config", None)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoraLayer):
                setattr(module, name, child.get_base_layer())


def set_adapters(model: nn.Module, enabled: bool) -> None:
    """Turns all adapters on or off."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module._disable_adapters = not enabled
