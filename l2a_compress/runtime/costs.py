"""The cost table of a bundle on this machine, measured through the engine that serves it.

A table holds for one bundle, processor, version of onnxruntime, provider, number of threads and of rows, contract and
way of serving; a GPU or a limit of the processor that changes behind it is not seen. It is measured when it is first
needed, in seconds to a minute, and kept in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnxruntime as ort

from l2a_compress import _validate
from l2a_compress._machine import held_bytes, peak_bytes, peak_of, processor, processors
from l2a_compress.budget import Budget
from l2a_compress.bundle import MANIFEST_FILE
from l2a_compress.errors import ConfigError, OutOfMemoryError, SessionError, StorageError
from l2a_compress.files import write_atomic
from l2a_compress.runtime.engine import Engine
from l2a_compress.runtime.request import TAGS, Limits
from l2a_compress.runtime.sampling import Endless
from l2a_compress.runtime.selector import Step

PROMPT, TOKENS, ROUNDS = 64, 12, 5
_MEASURED_BY = 2  # of how it is measured: another number where old tables mean something else
FAR = 8 * PROMPT  # the context at which it is measured what more of it costs
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CostTable:
    """What each budget of a ladder costs.

    Attributes:
        device: The processor's name.
        threads: Of one operator; None: onnxruntime's choice.
        serve: ``if`` or ``variants``.
        rows: The most rows that were measured together.
        steps: From the largest budget to the smallest, measured behind short contexts.
        context_seconds: That a step of the largest budget takes longer for each token more in a row's caches.
        alone: Whether there was room for all rows, and memory is that of processes of their own; such a table alone is
            kept.
    """

    device: str
    threads: int | None
    serve: str
    rows: int
    steps: tuple[Step, ...]
    context_seconds: float
    alone: bool = True

    def __post_init__(self) -> None:
        if not self.steps:
            raise ConfigError("steps: a cost table holds at least one")
        if self.context_seconds != 0:
            _validate.positive(self.context_seconds, "context_seconds", ConfigError)
        for place, step in enumerate(self.steps):
            for name, value in asdict(step).items():
                zero = name in ("memory_bytes", "row_seconds", "cache_bytes") and value == 0
                if not zero:
                    _validate.positive(value, f"steps[{place}].{name}", ConfigError)

    def step_seconds(self, budget: float, rows: int, context: int) -> float:
        """Of one token of each of so many rows that have ``context`` tokens in the caches, all together.

        Attention reads the caches of the groups that are kept, so that they share what a longer context costs. Between
        two steps the ``If`` graph spends all of its budget, and a variant what the smaller step costs.
        """
        place = next((place for place, step in enumerate(self.steps) if step.budget <= budget), len(self.steps) - 1)
        step, above = self.steps[place], self.steps[max(0, place - 1)]
        part = (budget - step.budget) / (above.budget - step.budget) if above.budget > step.budget else 0.0
        part = min(1.0, max(0.0, part)) if self.serve == "if" else 0.0
        longer = max(0, context - rows * (PROMPT + TOKENS // 2)) * self.context_seconds / self.steps[0].heads
        low, high = (each.step_seconds(rows) + longer * each.heads for each in (step, above))
        return low + part * (high - low)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that ``from_json`` turns back into an equal table."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: object) -> CostTable:
        """Reads a table from a JSON object.

        Raises:
            ConfigError: a key that is missing or unknown, or a value out of range.
        """
        values = _validate.keywords(cls, data, ConfigError, optional=frozenset({"alone"}))
        if not isinstance(values["steps"], list | tuple):
            raise ConfigError(f"steps must be a list, found {values['steps']!r}")
        optional = frozenset({"row_seconds"})
        steps = (Step(**_validate.keywords(Step, step, ConfigError, optional=optional)) for step in values["steps"])
        return cls(**{**values, "steps": tuple(steps)})

    @classmethod
    def load(cls, path: str | Path) -> CostTable:
        """Reads a file that :meth:`write` wrote.

        Raises:
            ConfigError: it cannot be read, or is no cost table.
        """
        try:
            return cls.from_json(json.loads(Path(path).read_text()))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: not a cost table ({error}); measure it again with `l2a bench`") from error

    def write(self, path: str | Path) -> None:
        """Writes the table, atomically.

        Raises:
            StorageError: the disk is full or the folder is not writable.
        """
        write_atomic(Path(path), json.dumps(self.to_json(), indent=2) + "\n")


def cost_table(engine: Engine, *, progress: Callable[[str], None] | None = None) -> CostTable:
    """The table of an idle engine: what this machine measured before, or else measured now.

    Raises:
        ConfigError: requests are running.
        SessionError: a graph cannot be loaded or run.
    """
    try:
        return CostTable.load(cached_path(engine))
    except (ConfigError, StorageError):
        (progress or (lambda _: None))("measuring what each budget costs on this machine")
    table = measure(engine)
    try:
        keep(engine, table)
    except StorageError as error:
        log.warning("the costs that were measured are not kept for the next start: %s", error)
    return table


def keep(engine: Engine, table: CostTable) -> None:
    """Keeps a table for the next engines like this one, unless memory was too short to measure it.

    Raises:
        StorageError: the cache folder is not writable, or the disk is full.
    """
    if not table.alone:
        return
    path = cached_path(engine)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{path.parent}: cannot be made ({error}); set L2A_CACHE to a folder that can") from error
    table.write(path)


def cached_path(engine: Engine) -> Path:
    """Where the table of an engine is kept. ``L2A_CACHE`` moves the folder, else it is under ``XDG_CACHE_HOME``."""
    told = os.environ.get("L2A_CACHE")
    cache = Path(told) if told else _user_cache() / "l2a_compress"
    manifest = (engine.folder / MANIFEST_FILE).read_bytes()
    about = [_MEASURED_BY, processor(), processors(), engine.threads, engine.serve, engine.max_rows, engine.contract]
    about += [ort.__version__]  # whose kernels change from one to the next
    about += [] if engine.engine == "python" else [engine.engine]
    about += [] if engine.provider == "cpu" else [engine.provider]
    digest = hashlib.sha256(json.dumps(about).encode() + manifest).hexdigest()
    return cache / "costs" / f"{digest[:32]}.json"


def _user_cache() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # a user that the system does not know
        raise StorageError(f"no folder for what is measured: {error}; set L2A_CACHE to one") from error


def measure(engine: Engine, *, rounds: int = ROUNDS) -> CostTable:
    """Measures every budget of an idle engine's ladder.

    The budgets take turns, so that a machine that slows down slows all of them; medians over rounds. Memory is the peak
    of a process of its own, or of this one where another does not fit. Without room for all rows half as many are
    measured.

    Raises:
        ConfigError: requests are running.
        SessionError: a graph cannot be loaded or run.
    """
    rows = engine.max_rows
    while True:
        try:
            found = _measure(engine, rows, rounds)
        except OutOfMemoryError:
            if rows == 1:
                raise
            rows //= 2
        else:
            return found if rows == engine.max_rows else replace(found, alone=False)


def _measure(engine: Engine, rows: int, rounds: int) -> CostTable:
    """The table, with so many rows together."""
    ladder = engine.ladder
    alone: dict[float, list[Step]] = {budget: [] for budget in ladder}
    full: dict[float, list[float]] = {budget: [] for budget in ladder}
    far = min(FAR, engine.bundle.positions - TOKENS - 2 - TAGS)  # as long as the bundle allows
    longer: list[float] = []
    for number in range(rounds + 1):
        for budget in ladder:
            if engine.serve == "variants":  # loading does not count
                _rehearse(engine, budget, rows=1)
            one, many = _rehearse(engine, budget, rows=1), _rehearse(engine, budget, rows=rows)
            if number:  # the first round warms up
                alone[budget].append(one)
                full[budget].append(many.decode_seconds)
            if number and budget == ladder[0] and far > PROMPT:
                with suppress(OutOfMemoryError):
                    behind = _rehearse(engine, budget, rows=1, prompt_tokens=far)
                    longer.append((behind.decode_seconds - one.decode_seconds) / (far - PROMPT))
    if engine.serve == "if":
        peaks = dict.fromkeys(ladder, _peak(engine, ladder[0]))
    else:
        peaks = {budget: _peak(engine, budget) for budget in ladder}
    steps = []
    for budget in ladder:
        decode = statistics.median(one.decode_seconds for one in alone[budget])
        steps.append(
            replace(
                alone[budget][0],
                prefill_seconds=statistics.median(one.prefill_seconds for one in alone[budget]),
                decode_seconds=decode,
                row_seconds=max(0.0, statistics.median(full[budget]) - decode) / max(1, rows - 1),
                memory_bytes=peaks[budget][0],
            )
        )
    return CostTable(
        device=processor(),
        threads=engine.threads,
        serve=engine.serve,
        rows=rows,
        steps=tuple(steps),
        context_seconds=max(0.0, statistics.median(longer or [0.0])),
        alone=all(alone for _, alone in peaks.values()),
    )


def _rehearse(engine: Engine, budget: float, *, rows: int, prompt_tokens: int = PROMPT) -> Step:
    """What so many rows of made-up text cost: of all of them, where it is the time of a step.

    Each row has another text, as gates that read the prompt then keep other layers of each, and a step runs them all.

    Raises:
        OutOfMemoryError: there is no room for all rows.
    """
    if engine.busy:
        raise ConfigError("requests are running; measure before they come: `l2a bench`, or `Runtime.controller`")
    words, think = engine.bundle.shape.vocab_size - 1, engine.tags.think
    texts = [[1 + (place * (2 * row + 1) + row) % words for place in range(prompt_tokens - 1)] for row in range(rows)]
    limits = Limits(max_think_tokens=TOKENS + 1, max_answer_tokens=1, tau_threshold=None)
    requests = engine.submit([[*text, think] for text in texts], [Budget(compute=budget)] * rows, limits=limits)
    for request in requests:
        request.sampler = Endless(engine.tags)
    engine.steps.clear()
    for _ in range(TOKENS):
        engine.step()
    steps, lane, kept = list(engine.steps), engine.lanes.of(requests[0]), requests[0].kept or ()
    failed = next((request.error for request in requests if request.error is not None), None)
    for request in requests:
        engine.cancel(request)
    engine.steps.clear()
    if failed is not None or lane is None:
        raise failed or SessionError(f"{engine.folder}: no row could run")
    if min(step.rows for step in steps) < rows:
        raise OutOfMemoryError(f"{engine.folder}: there is no memory for {rows} rows; free some, or lower max_rows")
    return Step(
        budget=budget,
        prefill_seconds=sum(step.prompt_seconds for step in steps) / (rows * prompt_tokens),
        decode_seconds=sum(step.seconds for step in steps) / TOKENS,
        layers=sum(1 for count in kept if count),
        heads=sum(kept),
        memory_bytes=0,
        cache_bytes=lane.caches.token_bytes,
    )


def _peak(engine: Engine, budget: float) -> tuple[float, bool]:
    """Bytes of a process that serves one request, and whether it was one of its own; 0 where the system is silent.

    It holds the model a second time. Where there is no room for that it is the most that this process has held, which
    is too much for the smaller of several variants, but lets nothing in that does not fit.
    """
    left, held = engine.memory_left(), held_bytes()
    if left is not None and held is not None and left < held:
        log.warning("%g bytes are left, too few to measure what budget %g takes alone", left, budget)
        return float(peak_bytes() or 0), False
    names = ("serve", "threads", "engine", "provider", "contract")
    about = {"folder": str(engine.folder), **{name: getattr(engine, name) for name in names}}
    try:
        return float(peak_of(f"from {__name__} import serve_one; serve_one({about!r}, {budget!r})") or 0), True
    except OutOfMemoryError as error:
        log.warning("what budget %g takes alone cannot be measured: %s", budget, error)
        return float(peak_bytes() or 0), False


def serve_one(about: Mapping[str, Any], budget: float) -> None:
    """Serves one request."""
    _rehearse(Engine(max_rows=1, **about), budget, rows=1)
