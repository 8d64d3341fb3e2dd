"""What is drawn at random for one training sample: budget, contract, think share, switch point, exploration noise.

Everything depends on (seed, sample index) alone. A resumed run, and a run on more processes, therefore draw the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from l2a_compress.errors import ConfigError
from l2a_compress.training.examples import Style

CONTRACTS = ("cap", "mean", "both")
_PRICES = (0.003, 3.0)  # log-uniform: from hardly any saving to hardly anything kept
_MOST_LOST = 0.3  # tokens of a noised prompt
_SHARES = (
    "minimum dense_share minimum_share full_think_share condensed_below brief_below switch_share noised_share"
).split()


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """Shares and ranges of the draws.

    Attributes:
        minimum: smallest compute budget of a sample.
        dense_share: share of samples at b = 1 (the sandwich's top).
        minimum_share: share of samples at the minimum (its bottom); the rest is uniform between.
        contract: ``cap``, ``mean`` or ``both`` (half the samples each).
        full_think_share: share of samples whose reasoning is not limited; the rest draw a share uniformly.
        condensed_below: think share under which a sample is shown its condensed trace (``short``).
        brief_below: think share under which it is shown its ``brief`` one, where it has one.
        switch_share: share of samples whose budget changes in the middle of the sequence.
        noised_share: share of samples whose prompt loses tokens at random, for the network to stay as the dense one on
            prompts unlike those it is trained on. Of the loss they have the KL term alone.
    """

    minimum: float = 0.4
    dense_share: float = 0.15
    minimum_share: float = 0.15
    contract: str = "both"
    full_think_share: float = 0.4
    condensed_below: float = 0.6
    brief_below: float = 0.0
    switch_share: float = 0.1
    noised_share: float = 0.0

    def __post_init__(self) -> None:
        if self.contract not in CONTRACTS:
            raise ConfigError(f"contract {self.contract!r}: choose one of {', '.join(CONTRACTS)}")
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: must lie in [0, 1]")
        if self.minimum == 0 or self.dense_share + self.minimum_share > 1:
            raise ConfigError("minimum must be above 0, and dense_share + minimum_share at most 1")


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One sample's draw. ``after`` is the compute budget behind the switch, ``switch`` the share before it.

    Of a ``mean`` sample ``price`` is what it pays, in failures for the dense compute, where there is a demand head.
    ``lost`` is the chance of every token of the prompt to be left out.
    """

    compute: float
    mean: bool
    think: float
    style: Style
    after: float
    switch: float
    price: float
    lost: float


def _generator(seed: int, index: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, index], counter=[0, 0, 0, stream]))


def draw(config: DrawConfig, seed: int, index: int) -> Draw:
    """The draw of sample ``index``."""
    u = _generator(seed, index, 0).random(12)
    compute = _compute(config, u[0], u[1])
    think = 1.0 if u[2] < config.full_think_share else 0.1 + 0.9 * u[3]
    switched = u[4] < config.switch_share
    return Draw(
        compute=compute,
        mean=config.contract == "mean" or (config.contract == "both" and u[7] < 0.5),
        think=float(think),
        style=_style(config, think),
        after=_compute(config, u[5], u[6]) if switched else compute,
        switch=float(0.2 + 0.7 * u[11]) if switched else 1.0,
        price=float(_PRICES[0] * (_PRICES[1] / _PRICES[0]) ** u[8]),
        lost=float(_MOST_LOST * u[10]) if u[9] < config.noised_share else 0.0,
    )


def _style(config: DrawConfig, think: float) -> Style:
    return "brief" if think < config.brief_below else "short" if think < config.condensed_below else "long"


def _compute(config: DrawConfig, kind: float, value: float) -> float:
    if kind < config.dense_share:
        return 1.0
    if kind < config.dense_share + config.minimum_share:
        return config.minimum
    return float(config.minimum + (1 - config.minimum) * value)


def survivors(seed: int, index: int, count: int, lost: float) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which of ``count`` tokens of sample ``index`` are left when each is lost with that chance."""
    return _generator(seed, index, 2).random(count) >= lost


def gumbel_noise(seed: int, index: int, shape: tuple[int, ...]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Standard Gumbel noise of that shape for sample ``index``: scores perturbed by it sample a ranking."""
    return _generator(seed, index, 1).gumbel(size=shape).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Annealing:
    """How the gates' temperature and the exploration noise fall over a run.

    The first ``explore`` share of the steps runs allocations that are random apart from the prior (phase 1 of the
    method: make the network robust to many allocations); from there the noise falls linearly to ``noise_end`` at
    ``settle``.

    ``search_rows`` samples are what the order of layers and groups is measured on behind the exploration, once and for
    all inputs (``stem`` gates only); with 0 the gates learn it, by gradient. With ``search_trials`` above 0 it is then
    mended by trials of ``trial_steps`` training steps each: that many to find a set of layers for the middle of the
    budgets, and as many as it takes to order the others around it.
    """

    temperature_start: float = 1.0
    temperature_end: float = 0.3
    noise_start: float = 1.0
    noise_end: float = 0.0
    explore: float = 0.3
    settle: float = 0.8
    search_rows: int = 0
    search_trials: int = 0
    trial_steps: int = 40

    def __post_init__(self) -> None:
        if not 0 <= self.explore <= self.settle <= 1:
            raise ConfigError(
                f"annealing: explore {self.explore} and settle {self.settle} must be 0 <= explore <= settle <= 1"
            )
        if self.search_rows < 0 or (self.search_rows and not self.explore):
            raise ConfigError(
                f"annealing.search_rows {self.search_rows}: must be 0 or more, and 0 where nothing is explored"
            )
        if self.search_trials < 0 or (self.search_trials and not self.search_rows) or self.trial_steps < 1:
            raise ConfigError(
                f"annealing: search_trials {self.search_trials} must be 0 or more, and 0 without search_rows; "
                f"trial_steps {self.trial_steps} must be 1 or more"
            )
        if not (self.temperature_start > 0 and self.temperature_end > 0 and min(self.noise_start, self.noise_end) >= 0):
            raise ConfigError("annealing: temperatures must be above 0 and noise 0 or more")

    def temperature(self, progress: float) -> float:
        """At ``progress`` in [0, 1], geometric between start and end."""
        ratio = self.temperature_end / self.temperature_start
        return float(self.temperature_start * ratio ** min(1.0, max(0.0, progress)))

    def noise(self, progress: float) -> float:
        """Scale of the exploration noise at ``progress``."""
        span = max(self.settle - self.explore, 1e-9)
        done = min(1.0, max(0.0, (progress - self.explore) / span))
        return self.noise_start + (self.noise_end - self.noise_start) * done
