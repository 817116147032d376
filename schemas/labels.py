"""What artifacts and decodes hold, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from spiffy.schemas.decoding import DecodingSettings
from spiffy.schemas.records import MAX_NODES, AcceptanceModel, Fill, Node


def written(fill: Fill) -> str:
    """A fill as "+position rank.token rank ..."."""
    return " ".join(f"+{i}.{j}" for i, j in fill)


def policy_in_words(settings: DecodingSettings) -> str:
    """The unmasking policy, with what it commits by."""
    if settings.policy == "threshold":
        return f"threshold {settings.threshold:g}"
    if settings.policy == "joint":
        return (
            f"joint {settings.threshold:g}, edits above {settings.edit_threshold:g}, at most "
            f"{settings.max_post_steps} steps of a full block"
        )
    if settings.policy == "entropy-bounded":
        return f"entropy-bounded, {settings.entropy_bound:g} nats"
    if settings.own_policy and settings.steps_per_block is None:
        return f"{settings.policy}, tokens a step: at least {settings.tokens_per_step}"
    if settings.steps_per_block is not None:
        return f"{settings.policy}, {settings.steps_per_block} steps a block ({settings.schedule})"
    return f"{settings.policy}, tokens a step: {settings.tokens_per_step}"


def beyond_parent(nodes: Sequence[Node], number: int) -> str:
    """What node `number` (from 1) fills in beyond its first parent, written."""
    node = nodes[number - 1]
    parent = node.parents[0]
    known = nodes[parent - 1].fill if parent else ()
    return written(tuple(pair for pair in node.fill if pair not in known))


def shown_budgets(most: int) -> list[int]:
    """Numbers of drafts that tables list where there are up to `most`: doubled, and that one."""
    doubled = (1 << k for k in range(MAX_NODES.bit_length()))
    return [*(drafts for drafts in doubled if drafts < most), most]


def acceptance_in_words(model: AcceptanceModel | None) -> str:
    """Size of an acceptance model."""
    if model is None:
        return "none, the nodes are the drafts"
    parts = {"position": model.position, "commit": model.commit or {}, "token": model.token}
    sizes = [f"{len(part)} {name}" for name, part in parts.items() if part]
    return f"{' and '.join(sizes)} coefficients, {len(model.bigrams)} bigrams"


def device_in_words(device: str, dtype: str, threads: int | None) -> str:
    """What computes: `threads` of a CPU, None on other devices."""
    if threads is None:
        return f"{device}, {dtype}"
    return f"{device}, {dtype}, {threads} thread{'' if threads == 1 else 's'}"


def ties_in_words(dtype: str) -> tuple[str, str]:
    """Why exact decoding may still give other tokens in a dtype, and one in which it should not."""
    if dtype in ("float32", "float64"):
        return "a tie in floating point can do that, though seldom", "float64"
    cause = "near-ties can do that, as another batch size can: the shape of a forward decides"
    return cause, "float32"


def budgets_in_words(chosen: Iterable[Mapping[str, int]], why: str) -> str:
    """What `auto` chose, answer by answer, and what that rests on in the end; "" if it did not."""
    used: Counter[str] = sum(map(Counter, chosen), Counter())
    parts = [f"{used['plain']} plain"] if used["plain"] else []
    for way, who in (("graph", "the graph"), ("model", "the acceptance model")):
        named = (name.split() for name, _ in used.most_common() if name.startswith(way))
        counts = [f"{used[' '.join(name)]} with up to {name[1]}" for name in named]
        if counts:
            parts.append(f"{', '.join(counts)} drafts by {who}")
    return f"forwards: {'; '.join(parts)}; at the end {why}" if used else ""
