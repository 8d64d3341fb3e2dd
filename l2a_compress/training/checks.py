"""What is wrong with a recipe, said before anything is read, or at the latest before a model is trained."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from l2a_compress.errors import ConfigError
from l2a_compress.modeling.budgets import minimum_compute
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.training.recipe import Recipe

log = logging.getLogger(__name__)


def is_searched(recipe: Recipe) -> bool:
    """Whether the order of the layers is searched, and not learned."""
    return bool(recipe.annealing.search_rows) and recipe.gates.mode == "stem" and not recipe.static.method


def check_recipe(recipe: Recipe, trackers: Sequence[str], processes: int) -> None:
    """Refuses settings that do not go together, and warns of what has no effect.

    Args:
        recipe: all settings.
        trackers: names of the Trainer's trackers.
        processes: that train together.

    Raises:
        ConfigError: says which setting, and what to do.
    """
    from l2a_compress.evaluation.baselines import BASELINES

    optim, gates, static = recipe.optim, recipe.gates, recipe.static
    if is_searched(recipe) and not gates.has_demand and recipe.draws.contract != "cap":
        raise ConfigError(
            f"draws.contract = {recipe.draws.contract!r}: where the order of the layers is searched and there is no "
            "demand head, nothing learns what a price buys; set draws.contract=cap, or gates.demand=true"
        )
    if is_searched(recipe) and recipe.annealing.search_trials and not recipe.adapter.rank:
        raise ConfigError(
            f"annealing.search_trials = {recipe.annealing.search_trials}: a trial trains the adapters, and "
            "adapter.rank = 0 has none; set annealing.search_trials=0, or a rank"
        )
    if recipe.model.dtype == "float16" and not optim.bf16:
        raise ConfigError(
            "model.dtype = 'float16': gradients of 16 bits vanish in it; set model.dtype=bfloat16 or float32"
        )
    if static.method and static.method not in BASELINES:
        raise ConfigError(f"static.method = {static.method!r}: choose from {', '.join(BASELINES)}")
    if optim.batch_size % (processes * optim.accumulate):
        raise ConfigError(
            f"optim.batch_size = {optim.batch_size}: does not split over {processes} processes, each of which "
            f"accumulates {optim.accumulate}; choose a multiple of {processes * optim.accumulate}"
        )
    try:
        get_reporting_integration_callbacks(list(trackers))
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"--tracker {','.join(trackers)}: {error}") from error
    _warn(recipe)


def check_model(recipe: Recipe, gated: GatedModel) -> None:
    """Refuses shares of the compute that are less than what this model's always-on layers cost.

    Raises:
        ConfigError: names the setting.
    """
    least, static = minimum_compute(gated.cost, gated.gate_config), recipe.static
    asked = {"static.compute": static.compute} if static.method else {"draws.minimum": recipe.draws.minimum}
    if not static.method and gated.gate_config.has_demand:
        asked["gates.least_compute"] = gated.gate_config.least_compute
    for name, share in asked.items():
        if share < least:
            raise ConfigError(f"{name} = {share:g}: is below {least:.4g}, what the always-on layers cost; raise it")


def _warn(recipe: Recipe) -> None:
    draws, gates, annealing = recipe.draws, recipe.gates, recipe.annealing
    if recipe.static.method:
        return
    if gates.mode == "inline" and draws.switch_share:
        log.warning("draws.switch_share = %g has no effect: inline gates keep one budget", draws.switch_share)
    if gates.mode == "inline" and annealing.search_rows:
        log.warning("annealing.search_rows = %d has no effect: inline gates learn their order", annealing.search_rows)
    if recipe.evaluation.demand_rows and not gates.has_demand:
        log.warning("evaluation.demand_rows = %d has no effect: no demand head", recipe.evaluation.demand_rows)
    budgets = {"evaluation.budgets": min(recipe.evaluation.budgets)}
    if gates.has_demand:
        budgets["gates.least_compute"] = gates.least_compute
    for name, least in budgets.items():
        if least < draws.minimum:
            log.warning(
                "%s goes down to %g, and no sample has less than draws.minimum = %g: nothing is trained there",
                name,
                least,
                draws.minimum,
            )
