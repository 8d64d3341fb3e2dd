"""What a request runs: its budget as a graph reads it, and the allocation that the gates or the ladder give for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from l2a_compress.budget import Budget
from l2a_compress.bundle import Bundle, GraphEntry
from l2a_compress.errors import BudgetError, BundleError
from l2a_compress.limits import Contract, limits_of, think_share
from l2a_compress.runtime.decoder import GraphDecoder
from l2a_compress.runtime.native import NativeDecoder
from l2a_compress.runtime.request import Request, Told
from l2a_compress.runtime.tensorrt import EngineDecoder

Array = np.ndarray[Any, np.dtype[Any]]
Serve = Literal["if", "variants"]
Decoder = GraphDecoder | NativeDecoder | EngineDecoder
Widths = tuple[int, ...]  # KV groups of each layer
_MOST_CHOSEN = 256  # budgets whose allocation is kept


class Chooser:
    """Asks the gates, through the router graph, once for a budget and prompt; or once a budget, where they are blind.

    Args:
        folder: the bundle's.
        bundle: what it holds.
        contract: under which the gates allocate.
        serve: ``if``: what the gates choose; ``variants``: of the static graphs that keep to the budget, the largest.
        decoder: opens a graph.
    """

    def __init__(
        self,
        folder: Path,
        bundle: Bundle,
        *,
        contract: Contract,
        serve: Serve,
        decoder: Callable[[GraphEntry], Decoder],
    ) -> None:
        self.folder, self.bundle, self.contract, self.serve, self._decoder = folder, bundle, contract, serve, decoder
        self.router: Decoder | None = None
        self._chosen: dict[Told, Widths] = {}  # where all prompts get the same

    def serves(self, budget: float) -> bool:
        """Whether anything in the bundle keeps to it."""
        try:
            self.told(Budget(compute=budget))
        except BudgetError:
            return False
        return True

    def told(self, budget: Budget) -> Told:
        """The budget as a graph's inputs.

        Raises:
            BudgetError: nothing in the bundle keeps to it.
        """
        bundle = self.bundle
        if self.serve == "variants" and not self._fitting(budget):
            raise BudgetError(f"no variant of the bundle keeps to the budget {budget}; export one with --ladder")
        spend = limits_of(
            budget, bundle.cost, bundle.gates["stem_layers"], contract=self.contract, prices=bundle.prices
        )
        share = think_share(budget, bundle.gates["think_reference"])
        return Told((budget.compute, share), (spend.units, spend.layers, spend.heads), spend.price)

    def choose(self, request: Request, budget: Budget, told: Told) -> Widths:
        """KV groups of each layer that a prompt gets under a budget.

        Raises:
            BundleError: the gates must be asked and the bundle has no router graph.
            SessionError: the router graph cannot be run.
        """
        chosen = self._known(request, told)
        if told not in chosen:
            kept = self._fixed(request, budget, told) if self.serve == "variants" else self._ask(request, told)
            self.remember(request, told, kept)
        return chosen[told]

    def remember(self, request: Request, told: Told, kept: Widths) -> None:
        """Notes what the gates chose, so that they need not be asked again."""
        chosen = self._known(request, told)
        if told not in chosen and len(chosen) >= _MOST_CHOSEN:
            chosen.clear()
        chosen[told] = kept

    def close(self) -> None:
        """Frees the router graph."""
        self.router = None

    def _fitting(self, budget: Budget) -> list[GraphEntry]:
        """The variants that keep to a budget, the largest first."""
        layers_and_heads = replace(budget, think_tokens=None)
        cost = self.bundle.cost
        return [v for v in self.bundle.variants if v.allocation and cost.fits(v.allocation, layers_and_heads)]

    def _blind(self, told: Told) -> bool:
        """Whether the gates do not read the prompt under this budget."""
        contract = "mean" if math.isfinite(told.price) else "cap"
        return contract in self.bundle.gates.get("input_blind", ())

    def _known(self, request: Request, told: Told) -> dict[Told, Widths]:
        """What was chosen by budget: for this request, or for all of them."""
        return self._chosen if self._blind(told) else request.chosen

    def _fixed(self, request: Request, budget: Budget, told: Told) -> Widths:
        """Of the variants that keep to a budget, the largest; of several, what the router says.

        The router knows budgets and no other caps: where its choice breaks one, it is the nearest that does not.
        """
        fit = self._fitting(budget)
        same = [entry for entry in fit if entry.budget == fit[0].budget]
        if len(same) == 1:
            return widths_of(same[0])
        told = Told((same[0].budget or 1.0, told.features[1]), told.limits, told.price)
        found = self._route(request, told)
        named = self.bundle.variants[int(found["variant"][0])]
        if named in same:
            return widths_of(named)
        kept = found["kept_groups"][0]
        return min(map(widths_of, same), key=lambda widths: int(abs(np.array(widths) - kept).sum()))

    def _ask(self, request: Request, told: Told) -> Widths:
        """What the gates choose."""
        return tuple(self._route(request, told)["kept_groups"][0].tolist())

    def _route(self, request: Request, told: Told) -> Mapping[str, Array]:
        if self.router is None:
            entry = next((entry for entry in self.bundle.graphs if entry.kind == "router"), None)
            if entry is None:
                raise BundleError(f"{self.folder}: has no router graph to ask the gates again; export it again")
            self.router = self._decoder(entry)
        prompt = request.prompt[-1:] if self._blind(told) else request.prompt
        tokens = np.array([prompt], dtype=np.int64)
        return self.router.step(tokens, np.ones_like(tokens), **decision([told]))


def decision(told: Sequence[Told]) -> dict[str, Array]:
    """Budgets as a graph reads them."""
    return {
        "budget": np.array([each.features for each in told], dtype=np.float32),
        "limits": np.array([each.limits for each in told], dtype=np.int64),
        "price": np.array([each.price for each in told], dtype=np.float32),
    }


def widths_of(entry: GraphEntry) -> Widths:
    """KV groups of each layer of a variant."""
    return tuple(len(kept) for kept in entry.allocation.groups) if entry.allocation else ()
