"""lm-evaluation-harness as a client of `spiffy-serve`: its `local-chat-completions`."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="pip install 'spiffy-dllm[serve]'")
pytest.importorskip("tenacity", reason="pip install 'lm_eval[api]'")
pytest.importorskip("lm_eval", reason="pip install 'lm_eval[api]'")

import lm_eval
from helpers import study
from lm_eval.tasks import TaskManager
from test_serve import Here, here, model

from spiffy.calib.synthetic import problems
from spiffy.runtime import generate

__all__ = ["here"]  # a fixture


def test_the_harness_asks_the_server_and_scores_its_answers(here: Here, tmp_path: Path) -> None:
    length = 32
    given = islice((p for p in problems("test") if len(p.answer) < 45), 2)
    rows = [{"question": p.question, "answer": p.answer.rpartition("#### ")[2]} for p in given]
    places = {"data": tmp_path / "data.jsonl", "cache": tmp_path / "cache"}
    places["data"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "problems.yaml").write_text(study("harness").TASK.format(**places, length=length))

    accepted = here.sample("spiffy_accepted_total")
    found = lm_eval.simple_evaluate(
        "local-chat-completions",
        model_args={
            "model": "tiny-sdar",
            "base_url": f"{here.address}/v1/chat/completions",
            "max_retries": 1,
        },
        tasks=[str(tmp_path / "problems.yaml")],
        task_manager=TaskManager(include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
    )

    answers = [sample["resps"][0][0] for sample in found["samples"]["problems"]]
    options = {"gen_length": length, "stop": ["Question:"]}
    assert answers == [generate(model(), row["question"], **options).text for row in rows]
    right = [f"#### {row['answer']}" in text for row, text in zip(rows, answers, strict=True)]
    score = found["results"]["problems"]["exact_match,strict-match"]
    assert score == sum(right) / len(right) > 0
    assert here.sample("spiffy_accepted_total") > accepted
