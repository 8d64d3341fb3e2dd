"""The lm-eval model ``l2a`` on a local task file made from problems in GSM8K's format."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from l2a_compress.errors import BudgetError, ConfigError
from test_evaluation_cli import saved_artifact
from toy_data import REPOSITORY, TINY_GSM8K

pytestmark = [
    pytest.mark.skipif(
        find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'l2a-compress[train,lm-eval]'"
    ),
    pytest.mark.filterwarnings("ignore"),  # its dependencies warn about their own use of each other
]

TASK = """
task: gsm8k_local
dataset_path: json
dataset_kwargs:
  data_files: {{test: {path}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer.split('#### ')[-1]}}}}"
generation_kwargs: {{until: ["\\n\\n"], do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, regexes_to_ignore: [","]}}
metadata: {{version: 1}}
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_artifact(tmp_path_factory.mktemp("saved"))


def new_model(artifact: Path, **options: Any) -> Any:
    from l2a_compress.evaluation.lm_eval_adapter import L2AModel

    return L2AModel(str(artifact), **options)


def lm_eval_adapter() -> Any:
    from l2a_compress.evaluation import lm_eval_adapter

    return lm_eval_adapter


def requests(*arguments: tuple[object, ...]) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=args) for args in arguments]


QUESTIONS = ["how many does Ann have ?", "Bob has 1 2 .", "Cal has 3 . how many does Cal have ?"]


def test_replies_do_not_depend_on_the_batch(artifact: Path) -> None:
    asked = requests(*((question, {"until": ["\n\n"]}) for question in QUESTIONS))
    together = new_model(artifact, budget=0.6, batch_size=8).generate_until(asked)
    alone = new_model(artifact, budget=0.6, batch_size=1).generate_until(asked)
    assert together == alone
    assert all(together)
    assert not any("think" in reply for reply in together)


def test_options_of_a_request_are_kept_to(artifact: Path) -> None:
    model = new_model(artifact, reply="trace")
    (full,) = model.generate_until(requests((QUESTIONS[0], {"until": []})))
    assert "\n#### " in full
    stop = full.split()[0]
    cut, short = model.generate_until(
        requests((QUESTIONS[0], {"until": [stop]}), (QUESTIONS[0], {"until": [], "max_gen_toks": 2}))
    )
    assert cut == full.split(stop)[0]
    assert len(short.split("\n####")[0].split()) <= 2


def test_one_question_asked_often_is_drawn_anew_each_time(artifact: Path) -> None:
    model = new_model(artifact, reply="trace", batch_size=1)
    options = {"until": [], "do_sample": True, "temperature": 5.0}
    replies = model.generate_until(requests(*[(QUESTIONS[0], options)] * 4))
    assert len(set(replies)) == 4
    assert replies == new_model(artifact, reply="trace", batch_size=1).generate_until(
        requests(*[(QUESTIONS[0], options)] * 4)
    )
    with pytest.raises(ConfigError, match="top_p"):
        model.generate_until(requests((QUESTIONS[0], {**options, "top_p": 0.9})))


def test_what_has_no_context_begins_as_in_training(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model(artifact)
    assert model.prefix_token_id == model.eot_token_id
    monkeypatch.setattr(lm_eval_adapter(), "begin_ids", lambda tokenizer: [7])
    assert model.prefix_token_id == 7
    (score,) = model.loglikelihood_rolling(requests((QUESTIONS[0],)))
    ids = model.tok_encode(QUESTIONS[0], add_special_tokens=False)
    assert score == pytest.approx(model._score([([7], ids)])[0][0])


@torch.no_grad()
def test_loglikelihood_is_the_sum_over_the_continuation(artifact: Path) -> None:
    model = new_model(artifact, dense=True, batch_size=2)
    pairs = [(QUESTIONS[0], " Ann has 4"), (QUESTIONS[1], " 7"), (QUESTIONS[2], " Bob")]
    scores = model.loglikelihood(requests(*pairs), disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(pairs, scores, strict=True):
        ids = model.tok_encode(context + continuation)
        start = len(model.tok_encode(context))
        with model.gated.teacher():
            logits = model.gated.logits(model.gated(torch.tensor([ids])).hidden)[0].log_softmax(-1)
        each = logits[range(start - 1, len(ids) - 1), ids[start:]]
        assert value == pytest.approx(float(each.sum()), rel=1e-4)
        assert greedy == bool((logits[start - 1 : -1].argmax(-1) == torch.tensor(ids[start:])).all())
    assert new_model(artifact, budget=0.5).loglikelihood(requests(*pairs), disable_tqdm=True) != scores


def test_rolling_counts_every_token_once(artifact: Path) -> None:
    model = new_model(artifact, dense=True)
    text = " ".join(QUESTIONS)
    (whole,) = model.loglikelihood_rolling(requests((text,)))
    ids = model.tok_encode(text, add_special_tokens=False)
    (expected, _), *_ = model._score([([model.prefix_token_id], ids)])
    assert whole == pytest.approx(expected, rel=1e-5)
    windows = new_model(artifact, dense=True, max_length=6).loglikelihood_rolling(requests((text,)))
    assert windows[0] < 0 != whole


def test_wrong_arguments_are_one_clear_error(artifact: Path) -> None:
    with pytest.raises(BudgetError, match=r"1\.5"):
        new_model(artifact, budget=1.5)
    with pytest.raises(ConfigError, match="contract=best"):
        new_model(artifact, contract="best")


@pytest.mark.slow
def test_the_harness_runs_it_on_a_local_task(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "gsm8k_local.yaml").write_text(TASK.format(path=TINY_GSM8K))
    arguments = ["--model", "l2a", "--model_args", f"artifact={artifact},budget=0.6,reply=trace"]
    arguments += ["--tasks", "gsm8k_local", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    arguments += ["--log_samples", "--device", "cpu"]
    command = [sys.executable, "-m", "l2a_compress.evaluation.lm_eval_adapter", "run", *arguments]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(results.read_text())["results"]["gsm8k_local"]
    assert 0.0 <= found["exact_match,none"] <= 1.0
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    replies = [json.loads(line)["resps"][0][0] for line in samples.read_text().splitlines()]
    assert len(replies) == 6
    assert all("####" in reply for reply in replies)
