"""A recipe: every setting of a training run in one value, from TOML with overrides by dotted names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin, get_type_hints

from l2a_compress import _validate
from l2a_compress._precision import PRECISIONS, use_bfloat16
from l2a_compress.errors import ConfigError
from l2a_compress.limits import Contract
from l2a_compress.modeling.adapters import AdapterConfig
from l2a_compress.modeling.gates import GateConfig
from l2a_compress.profiles import load_recipe
from l2a_compress.training.data_config import DataConfig, MixtureConfig, data_from_json
from l2a_compress.training.draws import Annealing, DrawConfig
from l2a_compress.training.objective import ObjectiveConfig

SECTIONS: Mapping[str, type] = {
    "gates": GateConfig,
    "adapter": AdapterConfig,
    "objective": ObjectiveConfig,
    "draws": DrawConfig,
    "annealing": Annealing,
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which base model: ``embedded``, a local folder, or a hub name.

    Attributes:
        name: as above.
        gguf_file: a GGUF file inside the folder, to be dequantized (needs the package gguf).
        dtype: ``float32``, ``bfloat16`` or ``float16``, of the frozen weights.
        attention: Transformers' attn_implementation.
        add_tags: add the four think/answer tags to the tokenizer where they are missing.
    """

    name: str = "embedded"
    gguf_file: str | None = None
    dtype: str = "float32"
    attention: str = "sdpa"
    add_tags: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ConfigError(f"model dtype {self.dtype!r}: choose float32, bfloat16 or float16")


BETAS = (0.9, 0.98)  # of AdamW, wherever the network is trained


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Steps, batch and learning rates.

    Attributes:
        steps: optimizer steps.
        batch_size: samples a step, over all processes and accumulation.
        accumulate: gradient accumulation steps; ``batch_size`` must be a multiple of it.
        lr: of the adapters.
        gate_lr: of the gates.
        warmup: share of the steps that warm up.
        decay: share of the steps, at the end, over which the rate falls linearly to 0.
        clip: largest gradient norm.
        precision: what layers compute in: ``fp32``, ``bf16`` (autocast), or ``auto``, which is bf16 where the machine
            has instructions for it.
        gradient_checkpointing: recompute layers in the backward pass.
        teacher: ``online`` or ``cached`` (top-k log-probabilities computed once before training).
        teacher_top_k: words kept by ``cached``.
        prior_rows: samples that the gates' prior is measured on: one forward pass of them for each gated layer and KV
            group.
        save_steps: steps between checkpoints.
        log_steps: steps between log lines.
        threads: CPU threads, 0 for PyTorch's own choice.
    """

    steps: int = 600
    batch_size: int = 32
    accumulate: int = 1
    lr: float = 2e-3
    gate_lr: float = 3e-3
    warmup: float = 0.03
    decay: float = 0.5
    clip: float = 1.0
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    teacher: str = "online"
    teacher_top_k: int = 32
    prior_rows: int = 64
    save_steps: int = 100
    log_steps: int = 10
    threads: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "save_steps", "log_steps", "teacher_top_k", "prior_rows"):
            _validate.integer(getattr(self, name), f"optim.{name}", ConfigError, minimum=1)
        _validate.integer(self.threads, "optim.threads", ConfigError, minimum=0)
        for name in ("lr", "gate_lr", "clip"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"optim.{name} = {getattr(self, name)!r}: must be above 0")
        if self.batch_size % self.accumulate:
            raise ConfigError(f"optim.batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"optim.precision {self.precision!r}: choose one of {', '.join(PRECISIONS)}")
        if self.teacher not in ("online", "cached"):
            raise ConfigError(f"optim.teacher {self.teacher!r}: choose online or cached")
        if not (0 <= self.warmup <= 1 and 0 <= self.decay <= 1):
            raise ConfigError("optim.warmup and optim.decay are shares of the steps: they must lie in [0, 1]")

    @property
    def bf16(self) -> bool:
        """Whether this machine computes in bfloat16 under ``precision``."""
        return use_bfloat16(self.precision)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is evaluated after training.

    Attributes:
        budgets: compute budgets.
        contracts: of ``cap`` and ``mean``.
        problems: held-out problems a point.
        calibration: prompts that the prices of ``mean`` are calibrated on.
        demand_rows: calibration examples that the demand head is fitted on anew, each at several budgets, when training
            ends; 0 leaves it as it was trained.
        baselines: named ones, as they are.
        max_think_tokens: hard cap on reasoning.
        max_answer_tokens: hard cap on the answer.
    """

    budgets: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
    contracts: tuple[str, ...] = ("cap", "mean")
    problems: int = 500
    calibration: int = 1024
    demand_rows: int = 0
    baselines: tuple[str, ...] = ()
    max_think_tokens: int = 160
    max_answer_tokens: int = 16

    def __post_init__(self) -> None:
        for name, least in (
            ("problems", 1),
            ("calibration", 1),
            ("demand_rows", 0),
            ("max_think_tokens", 1),
            ("max_answer_tokens", 1),
        ):
            _validate.integer(getattr(self, name), f"evaluation.{name}", ConfigError, minimum=least)
        if not self.contracts:
            raise ConfigError(f"evaluation.contracts: give at least one of {', '.join(get_args(Contract))}")
        if not self.budgets or not all(0 < budget <= 1 for budget in self.budgets):
            raise ConfigError(f"evaluation.budgets = {self.budgets!r}: must be shares of the dense cost, in (0, 1]")
        for contract in self.contracts:
            if contract not in get_args(Contract):
                raise ConfigError(f"contract {contract!r}: choose from {', '.join(get_args(Contract))}")


@dataclass(frozen=True, kw_only=True)
class StaticConfig:
    """One allocation for every input, in the place of gates: what a static method is when it is fine-tuned as well.

    Attributes:
        method: a static baseline by name (see ``l2a_compress.evaluation.baselines``); empty for a gated model.
        compute: the share of the dense cost that it spends.
        artifact: for ``fixed_budget`` the artifact whose gates choose.
    """

    method: str = ""
    compute: float = 1.0
    artifact: str = ""

    def __post_init__(self) -> None:
        _validate.share(self.compute, "static.compute", ConfigError)
        if self.compute < 1 and not self.method:
            raise ConfigError(
                f"static.compute = {self.compute:g} is of a static model: name its static.method (--static)"
            )
        if (self.method == "fixed_budget") != bool(self.artifact):
            raise ConfigError("static.artifact names the artifact of static.method fixed_budget: give both or neither")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of a run. ``Recipe()`` is a valid one: the embedded default."""

    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig | MixtureConfig = field(default_factory=DataConfig)
    gates: GateConfig = field(default_factory=GateConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    draws: DrawConfig = field(default_factory=DrawConfig)
    annealing: Annealing = field(default_factory=Annealing)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    static: StaticConfig = field(default_factory=StaticConfig)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that :meth:`from_json` turns back into an equal recipe."""
        values: dict[str, Any] = {"seed": self.seed, "data": self.data.to_json()}
        for name in ("model", "gates", "adapter", "objective", "draws", "annealing", "optim", "evaluation", "static"):
            values[name] = {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in dataclasses.asdict(getattr(self, name)).items()
            }
        return values

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Recipe:
        """Reads a recipe from a JSON object or a parsed TOML document; sections may be left out.

        Raises:
            ConfigError: an unknown section or key, or a value out of range; the message names it.
        """
        kinds = {
            **SECTIONS,
            "model": ModelConfig,
            "optim": OptimConfig,
            "evaluation": EvalConfig,
            "static": StaticConfig,
        }
        unknown = sorted(set(data) - set(kinds) - {"seed", "data"})
        if unknown:
            raise ConfigError(
                f"recipe: unknown section {unknown[0]!r}; known: {', '.join(sorted([*kinds, 'seed', 'data']))}"
            )
        values: dict[str, Any] = {name: _section(kinds[name], name, data[name]) for name in kinds if name in data}
        if "data" in data:
            values["data"] = data_from_json(data["data"])
        seed = _validate.integer(data.get("seed", 0), "seed", ConfigError, minimum=0, maximum=2**32 - 1)
        return cls(seed=seed, **values)

    @classmethod
    def named(cls, name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
        """A shipped recipe or a TOML file, with ``section.key=value`` overrides (values as TOML writes them)."""
        return cls.from_json(with_overrides(load_recipe(name_or_path), overrides))


def _section(kind: type, name: str, table: object) -> Any:
    if not isinstance(table, Mapping):
        raise ConfigError(f"recipe: [{name}] must be a table, found {table!r}")
    known = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(table) - set(known))
    if unknown:
        raise ConfigError(f"recipe: [{name}] has no setting {unknown[0]!r}; known: {', '.join(known)}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    hints = get_type_hints(kind)
    for key, value in values.items():
        _typed(value, hints[key], f"{name}.{key}")
    return kind(**values)


def _typed(value: object, hint: Any, name: str) -> None:
    """Refuses a value of another type than its setting has."""
    checks: dict[Any, Any] = {bool: _validate.flag, int: _validate.integer, float: _validate.number}
    if get_origin(hint) is tuple:
        if not isinstance(value, tuple):
            raise ConfigError(f"{name} must be a list, found {_validate.shown(value)}")
        for one in value:
            _typed(one, get_args(hint)[0], name)
    elif hint in checks:
        checks[hint](value, name, ConfigError)
    elif not isinstance(value, str) and not (value is None and type(None) in get_args(hint)):
        raise ConfigError(f"{name} must be text, found {_validate.shown(value)}")


def with_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """``data`` with each ``section.key=value`` put in; ``section.key=`` takes the setting out, for its default.

    Raises:
        ConfigError: an override is not of that form.
    """
    import tomllib

    merged: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in data.items()}
    for text in overrides:
        name, equals, value = text.partition("=")
        path = name.strip().split(".")
        if not equals or not all(path) or len(path) > 2:
            raise ConfigError(f"--set {text!r}: expected section.key=value, e.g. optim.steps=100")
        try:
            parsed = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            parsed = value.strip()  # a bare word is text
        target = merged if len(path) == 1 else merged.setdefault(path[0], {})
        if not isinstance(target, dict):
            raise ConfigError(f"--set {text!r}: {path[0]} is a list of sources here; edit the recipe file instead")
        if value.strip():
            target[path[-1]] = parsed
        else:
            target.pop(path[-1], None)
    return merged
