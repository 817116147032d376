"""A decode to look at, forward by forward: what each verified, and what came of it."""

from __future__ import annotations

from typing import Any

from spiffy.bench.watch import Forward, token_text, turn
from spiffy.runtime.decode import Task, decoded


def beginning(task: Task) -> dict[str, Any]:
    """Where the answer will lie, and whether anything drafts.

    `given` are the prompt's tokens in the first block, which the answer's may share.
    """
    canvas = task.canvas
    first = canvas.span(0).start
    given = task.prompt[first:].tolist()
    return {
        "type": "start",
        "drafting": task.adviser is not None or task.drafter is not None,
        "given": [[at, token_text(task.model, token)] for at, token in enumerate(given, first)],
        "prompt_tokens": canvas.prompt_length,
        "answer": [canvas.prompt_length, canvas.prompt_length + canvas.gen_length],
        "blocks": [[span.start, span.stop] for span in map(canvas.span, range(canvas.blocks))],
    }


def forward_event(task: Task, forward: Forward) -> dict[str, Any]:
    """One forward: its drafts and which came true, the steps it was worth, the block after it.

    `tokens` are the texts of the positions of `span`, null for masks. `plain` is how many forwards
    plain decoding needs to come as far, `written` how many tokens of the answer there are.
    """
    told = turn(task.model, task.canvas, forward).model_dump()
    after = forward.reached[-1] if forward.reached else forward.root
    ids = after.ids[told["span"][0] : told["span"][1]].tolist()
    stats, mask = task.stats, task.model.mask_token_id
    answer = decoded(task, after.ids, task.canvas.length)
    return {
        "type": "forward",
        "block": told["block"],
        "span": told["span"],
        "step": after.step,
        "tokens": [None if token == mask else token_text(task.model, token) for token in ids],
        "written": sum(token != mask for token in answer),
        "steps": told["steps"],
        "drafts": told["drafts"],
        "nfe": stats.nfe,
        "plain": task.plain_nfe,
        "positions": stats.positions_computed,
        "seconds": stats.seconds,
    }
