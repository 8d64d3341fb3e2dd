"""A bundle that answers: text in, text out, at any budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from l2a_compress.allocation import Allocation
from l2a_compress.budget import Budget
from l2a_compress.errors import BundleError, ConfigError
from l2a_compress.limits import Contract
from l2a_compress.runtime.engine import Engine, Limits, Request
from l2a_compress.runtime.sampling import Sampling

TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one prompt got.

    Attributes:
        think: The reasoning.
        answer: The answer.
        think_tokens: Tokens of the reasoning, without tags.
        stopped_by: Why reasoning ended: ``model``, ``cap`` or ``tau``.
        layers: How many layers ran.
        heads: KV groups that ran, summed over the layers.
        cost: Share of the dense layers' compute that ran.
    """

    think: str
    answer: str
    think_tokens: int
    stopped_by: str
    layers: int
    heads: int
    cost: float


class Runtime:
    """An open bundle.

    Args:
        folder: the bundle.
        max_rows: most prompts that run at a time.
        threads: of one operator; None leaves it to onnxruntime.
        contract: under which the gates allocate.

    Raises:
        BundleError: the folder is not a whole bundle, or cannot be served by its ``If`` graph.
    """

    def __init__(
        self, folder: str | Path, *, max_rows: int = 8, threads: int | None = None, contract: Contract = "cap"
    ) -> None:
        self.engine = Engine(folder, max_rows=max_rows, threads=threads, contract=contract)
        path = Path(folder) / TOKENIZER_FILE
        if TOKENIZER_FILE not in self.engine.bundle.files:
            raise BundleError(f"{path}: the bundle has no tokenizer; export it again")
        self.tokenizer = Tokenizer.from_file(str(path))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        # What a tokenizer puts in front of every text, where it does; a tag that is written in a text is not a tag.
        self._begin = self.tokenizer.encode("").ids[:1]
        self.tokenizer.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        """A prompt as the model was trained on it: token ids, ending in ``<think>``.

        Raises:
            ConfigError: the text has a tag in it, and the tokenizer cannot read it as ordinary characters.
        """
        ids, tags = self.tokenizer.encode(text, add_special_tokens=False).ids, self.engine.tags
        if {tags.think, tags.end_think, tags.answer, tags.end_answer} & set(ids):
            raise ConfigError(f"prompt {text[:40]!r}: has a think or answer tag in it; leave it out")
        return [*self._begin, *ids, tags.think]

    def generate(
        self,
        prompts: Sequence[str],
        budget: Budget | Sequence[Budget] | None = None,
        *,
        limits: Limits | None = None,
        sampling: Sampling | None = None,
    ) -> list[Answer]:
        """Answers all prompts together.

        Args:
            prompts: texts.
            budget: one for all, or one for each; None for all that the model has.
            limits: of their length.
            sampling: None for greedy. Each prompt draws as if it were alone.

        Raises:
            BudgetError: the model cannot keep to a budget.
            ConfigError: a prompt that is too long; nothing has been generated then.
        """
        budgets = [budget] * len(prompts) if budget is None or isinstance(budget, Budget) else list(budget)
        if len(budgets) != len(prompts):
            raise ConfigError(f"{len(budgets)} budgets for {len(prompts)} prompts; give one, or one for each")
        requests = self.engine.submit(
            [self.encode(text) for text in prompts], budgets, limits=limits, sampling=sampling
        )
        while not all(request.done for request in requests):
            self.engine.step()
        return [self.answer(request) for request in requests]

    def stream(
        self,
        prompt: str,
        budget: Budget | None = None,
        *,
        limits: Limits | None = None,
        sampling: Sampling | None = None,
    ) -> Iterator[str | Answer]:
        """Pieces of text as they are written, tags included, and the answer as the last item."""
        (request,) = self.engine.submit([self.encode(prompt)], [budget], limits=limits, sampling=sampling)
        return self._pieces(request)

    def _pieces(self, request: Request) -> Iterator[str | Answer]:
        told = ""
        try:
            while not request.done:
                self.engine.step()
                text = self.tokenizer.decode(request.written, skip_special_tokens=False)
                if not text.endswith("\N{REPLACEMENT CHARACTER}") or request.done:  # half a character is not told
                    yield text[len(told) :]
                    told = text
            yield self.answer(request)
        finally:
            self.engine.cancel(request)  # where the caller does not listen any more

    def answer(self, request: Request) -> Answer:
        """What a request that is done has written."""
        bundle, reasoning = self.engine.bundle, request.reasoning
        kept = request.kept or (0,) * bundle.shape.num_layers
        ran = Allocation(num_groups=bundle.shape.num_groups, groups=tuple(tuple(range(count)) for count in kept))
        return Answer(
            think=self.tokenizer.decode(reasoning.think).strip(),
            answer=self.tokenizer.decode(reasoning.answer).strip(),
            think_tokens=len(reasoning.think),
            stopped_by=reasoning.stopped_by,
            layers=len(ran.layers),
            heads=ran.num_kept_groups,
            cost=bundle.cost.fraction(ran),
        )
