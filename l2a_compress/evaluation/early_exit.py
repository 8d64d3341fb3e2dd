"""Early exit by entropy, the idea of AdaSkip and of confident adaptive decoding, on the frozen model.

A generated token leaves the network behind the first layer where the output head, applied to what is there so far, is
sure enough: the entropy of its prediction is below a threshold. The layers above get its last hidden state for their
keys and values, as in CALM (arXiv 2207.07061). Prompts are read by all layers, and cost nothing here, which favours
the method.

    layer l's input -> norm, head -> entropy < threshold ? -> the row's layers from l on add nothing to this token
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from l2a_compress.modeling.families import decoder_layers
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.layers import LayerPlan

__all__ = ["ExitMeter", "exiting"]


class ExitMeter:
    """Decides for each layer and row whether it runs, and counts: ``ran`` is a list of [batch], one a token."""

    def __init__(self, gated: GatedModel, threshold: float) -> None:
        self.gated, self.threshold = gated, threshold
        self.ran: list[Tensor] = []
        self._open: Tensor | None = None

    def __call__(self, layer: Any, args: tuple[Any, ...]) -> None:
        """Before each layer: ``args[0]`` is its input [batch, length, width]."""
        hidden: Tensor = args[0]
        if hidden.shape[1] > 1:  # the prompt
            layer.state.plans[layer.index] = LayerPlan()
            return
        if layer.index == 0:
            self._open = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
            self.ran.append(torch.zeros(len(hidden), device=hidden.device))
        assert self._open is not None
        if layer.index >= self.gated.gate_config.stem_layers:
            self._open = self._open & (self._entropy(hidden[:, -1]) >= self.threshold)
        self.ran[-1] += self._open
        layer.state.plans[layer.index] = LayerPlan(layer=self._open.float()[:, None, None])

    def _entropy(self, hidden: Tensor) -> Tensor:
        """Of the next token as it would be predicted from here, in nats. [batch, width] -> [batch]."""
        norm = cast(nn.Module, self.gated.model.base_model.norm)
        shares = torch.log_softmax(self.gated.logits(norm(hidden)).float(), -1)
        return -(shares.exp() * shares).sum(-1)

    def cost(self, row: int, tokens: int) -> float:
        """The share of all layers that the first generated tokens of a row ran."""
        steps = self.ran[: max(tokens, 1)]
        return float(sum(step[row] for step in steps)) / (max(len(steps), 1) * self.gated.shape.num_layers)


@contextmanager
def exiting(gated: GatedModel, threshold: float) -> Iterator[ExitMeter]:
    """What is generated inside leaves the network early; the model is left dense."""
    meter = ExitMeter(gated, threshold)
    handles = [layer.register_forward_pre_hook(meter) for layer in decoder_layers(gated.model)]
    try:
        yield meter
    finally:
        for handle in handles:
            handle.remove()
        gated.state.reset()
