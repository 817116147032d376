"""`spiffy-lm-eval`: lm-evaluation-harness with drafts, and with what they saved in its results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from spiffy.cli.common import INTERRUPTED, console, log, run_app
from spiffy.cli.streams import write
from spiffy.schemas import SpiffyError
from spiffy.schemas.io import check_folder

if TYPE_CHECKING:
    from spiffy.integrations.lm_eval import SpiffyLM

_OPTION = "--verify-share"
_HELP = f"""spiffy-lm-eval takes lm-evaluation-harness's own options, and registers a model:

  --model spiffy --model_args pretrained=NAME,graph=FILE,budget=auto,...

with the options of spiffy-decode by their names: budget, gen_length, block_length, policy, cache,
threshold, dtype, adapter, quantize, ... It writes forwards, positions, steps per forward and tokens
per second into "config" of the harness's results.

  {_OPTION} X  also decode this share of the answers plainly, compare; exit 1 if any differs

What follows is the harness's own help.

"""


def _evaluate() -> None:
    arguments, share = _without_share(sys.argv[1:])
    if "--version" in arguments:
        write(f"spiffy-dllm {version('spiffy-dllm')}\n")
        return
    if not arguments or {"-h", "--help"} & {*arguments}:
        write(_HELP)
    _check_output(arguments)
    if share and _of_harness(arguments, "model", "-M") not in (None, "spiffy"):
        raise SpiffyError(f"{_OPTION} compares answers of --model spiffy: give that")
    from spiffy.integrations.lm_eval import launched, run_harness

    sys.argv[1:] = arguments
    with launched(share) as models:
        try:
            unsaved = run_harness()
        except KeyboardInterrupt:
            for model in models:
                _show(model)
            log.print("interrupted: with --use_cache the same command goes on", soft_wrap=True)
            sys.exit(INTERRUPTED)
    if share and not models:
        raise SpiffyError(f"{_OPTION} compares answers of --model spiffy: give that")
    for model in models:
        _show(model)
    if share and not any(counts.verified for model in models for counts in model.counts.values()):
        log.print(f"{_OPTION}: nothing was verified, as no answer was decoded", soft_wrap=True)
    if unsaved:
        raise SpiffyError(f"lm-evaluation-harness: {unsaved[0]}: see --output_path")
    if any(counts.differing for model in models for counts in model.counts.values()):
        sys.exit(1)


def _without_share(arguments: Sequence[str]) -> tuple[list[str], float]:
    """The harness's arguments, and the share to verify: the one option that is ours."""
    left, share = [], 0.0
    words = iter(arguments)
    for word in words:
        name, given, value = word.partition("=")
        if name != _OPTION:
            left.append(word)
            continue
        value = value if given else next(words, "")
        try:
            share = float(value)
        except ValueError:
            share = -1.0
        if not 0 < share <= 1:
            raise SpiffyError(f"{_OPTION} {value!r}: give a share of the answers, such as 0.1")
    return left, share


def _check_output(arguments: Sequence[str]) -> None:
    """Refuse a place that the harness could not save to: it finds out when all is decoded."""
    place = _of_harness(arguments, "output_path", "-o")
    if place is not None:
        path = Path(place)
        check_folder(path.parent if path.suffix == ".json" else path)


def _of_harness(arguments: Sequence[str], name: str, short: str) -> str | None:
    """An option of the harness, as given or in the file that another one names.

    Whatever is wrong with them is for the harness to say.
    """
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument(f"--{name}", short)
    parser.add_argument("--config", "-C", type=Path)
    try:
        given, _ = parser.parse_known_args([*arguments])
    except argparse.ArgumentError:
        return None
    if getattr(given, name) is not None or given.config is None:
        return getattr(given, name) or None
    import yaml  # the harness needs it

    try:
        content = yaml.safe_load(given.config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    found = content.get(name) if isinstance(content, dict) else None
    return found if isinstance(found, str) else None


def _show(model: SpiffyLM) -> None:
    """Print what answers took; the harness prints how good they are."""
    if not model.counts:
        return
    table = Table(title=f"{model.loaded.model.name}: what decoding took")
    names = ("answers", "NFE", "positions", "steps per forward", "tokens/s", "identical")
    for name in ("task", *names):
        table.add_column(name, justify="left" if name == "task" else "right")
    for task, counts in model.counts.items():
        identical = counts.verified - len(counts.differing)
        table.add_row(
            task,
            str(counts.answers),
            str(counts.nfe),
            str(counts.positions_computed),
            f"{counts.steps / counts.nfe:.2f}" if counts.nfe else "-",
            f"{counts.tokens / counts.seconds:.1f}" if counts.seconds else "-",
            f"{identical} of {counts.verified}" if counts.verified else "-",
        )
        if counts.differing:
            documents = ", ".join(map(str, counts.differing))
            log.print(f"{task}: other answers with drafts: documents {documents}", soft_wrap=True)
    console.print(table)


def main() -> None:
    """Entry point of `spiffy-lm-eval`."""
    run_app(_evaluate)


if __name__ == "__main__":
    main()
