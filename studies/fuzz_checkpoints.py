"""Feed the loader checkpoints that nobody meant to make, and compare what it makes of them.

Every case is a small checkpoint changed by one to three mutations: of config, tokenizer, index of
shards, header or data of the weights, kinds of files. It must be refused in one line that names
it, or load and then agree with `Reference`: transformers' own module, built from that very
`config.json` and the stored tensors without any of the runtime's code. Eight tokens are decoded
too. Anything else is a bug and is printed with its seed.

    python studies/fuzz_checkpoints.py --cases 20000
"""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import process_time
from typing import Any

import torch
from checkpoints import Files, as_bytes, bases
from mutations import mutate
from reference import Reference, UnclearError
from seeds import Tally, arguments
from tokenizers import Tokenizer
from transformers.utils import logging

from spiffy.runtime import DiffusionLM, generate, load_model
from spiffy.schemas import SpiffyError
from spiffy.schemas.errors import MAX_MESSAGE

PATIENCE = 20  # seconds that a case may take
IDS = torch.tensor([[20, 41, 7, 99, 150, 3, 77, 210, 12, 180, 33]])
TEXT_PROMPT = "How many old pens?"


# ---------------------------------------------------------------- cases


def case(seed: int) -> tuple[str, str, Files]:
    """Name of the checkpoint to start from, kind of the first mutation, and the files."""
    rng = random.Random(seed)
    small = [name for name in bases() if not name.startswith("tiny")]
    base = rng.choice(small if rng.random() < 0.93 else sorted(bases().keys() - set(small)))
    files = dict(bases()[base])
    kinds = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        try:
            kinds.append(mutate(rng, files))
        except (TypeError, IndexError, UnicodeDecodeError):  # of what is no such file any more
            kinds.append("text")
    return base, kinds[0], files


def lay_out(folder: Path, base: str, files: Files, whole: Path) -> None:
    """Write what was changed; what was not is a link into the whole checkpoint."""
    folder.mkdir()
    for name, content in files.items():
        path = folder / name
        if content == "a folder":
            path.mkdir()
        elif content == "a link to nowhere":
            path.symlink_to("nowhere")
        elif content == "a pipe":
            os.mkfifo(path)
        elif content is bases()[base].get(name):
            path.symlink_to(whole / base / name)
        else:
            path.write_bytes(as_bytes(content))


# ---------------------------------------------------------------- verdict


class TooLongError(Exception):
    """A case that does not end."""


@contextmanager
def patience(seconds: int) -> Iterator[None]:
    """Raise `TooLongError` if what is inside takes longer."""

    def stop(*_: object) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def in_one_line(error: SpiffyError, folder: Path) -> str:
    """Say "refused" if a message is one line that names the checkpoint, else what is wrong."""
    message = str(error)
    if not (message.isprintable() and 0 < len(message) <= MAX_MESSAGE):
        return f"BAD MESSAGE {message!r}"[:300]
    return "refused" if str(folder) in message else f"MESSAGE WITHOUT A NAME {message}"


def verdict(folder: Path) -> str:
    """Say "loaded" (and it agrees with the reference), "refused", or what is wrong with that."""
    try:
        with patience(PATIENCE):
            try:
                model = load_model(str(folder), device="cpu", dtype="float32")
            except SpiffyError as error:
                return in_one_line(error, folder)
            return difference(model, folder) or text_problem(model, folder) or "loaded"
    except TooLongError:
        return f"NO END IN {PATIENCE} s"
    except Exception as error:  # what this is looking for
        return f"TRACEBACK {type(error).__name__}: {error}"[:300]


def difference(model: DiffusionLM, folder: Path) -> str | None:
    """What the loaded model computes otherwise than the reference, if anything."""
    reference = Reference(folder)
    try:
        logits = reference.logits(IDS, 4)
    except UnclearError as unclear:
        return f"LOADED ALTHOUGH {unclear}"
    ids, block = IDS, {"block_length": 4} if model.family.block_causal else {}
    ours = model.forward_logits(ids, **block)
    if ours.shape != logits.shape:
        return f"LOGITS of shape {[*ours.shape]}, {[*logits.shape]} expected"
    scale = max(1.0, float(logits.nan_to_num(0, 0, 0).abs().max()))
    if not torch.allclose(ours, logits, rtol=1e-4, atol=1e-4 * scale, equal_nan=True):
        return f"LOGITS DIFFER by {(ours - logits).abs().max():.2g} of {scale:.2g}"
    if model.mask_token_id != reference.mask_token_id():
        return f"MASK {model.mask_token_id}, {reference.mask_token_id()} expected"
    lengths: dict[str, Any] = {"block_length": 4 if block else 8, "gen_length": 8}
    if model.family.sub_block_length:
        lengths["sub_block_length"] = 2
    try:
        out = generate(model, IDS[0], stop_at_eos=False, trace=True, **lengths)
    except SpiffyError as error:
        # Weights that are NaN or of another scale may show on other tokens only.
        largest = [float(p.detach().abs().max()) for p in model.module.parameters()]
        most = math.inf if any(map(math.isnan, largest)) else max(largest)
        if logits.isfinite().all() and most < 1e6 and (model.max_length or 99) >= IDS.shape[1] + 8:
            return f"DECODING REFUSED {error}"
        return None if in_one_line(error, folder) == "refused" else f"BAD MESSAGE {error}"
    final = out.states[-1]
    wrong = len(final) < IDS.shape[1] + 8 or model.mask_token_id in final[IDS.shape[1] :]
    return f"DECODED {final}" if wrong else None


def text_problem(model: DiffusionLM, folder: Path) -> str | None:
    """What is wrong with how the loaded model encodes text, if anything."""
    try:
        ids = model.encode(TEXT_PROMPT).tolist()
        model.decode_text(ids)
    except SpiffyError as error:
        found = in_one_line(error, folder)
        return None if found == "refused" else found
    path = folder / "tokenizer.json"
    if model.tokenizer is None or model.tokenizer.chat_template or not path.exists():
        return None
    plain = Tokenizer.from_file(str(path))
    plain.no_truncation()
    plain.no_padding()
    expected = plain.encode(TEXT_PROMPT).ids
    return None if ids == expected else f"ENCODED AS {ids}, {expected} expected"


@contextmanager
def whole_checkpoints() -> Iterator[Path]:
    """A folder with every base as it is, for links, and room for cases."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        for name, files in bases().items():
            (Path(place) / name).mkdir()
            for file, content in files.items():
                (Path(place) / name / file).write_bytes(as_bytes(content))
        yield Path(place)


def judge(seed: int, place: Path) -> tuple[str, str, float]:
    """Kind and outcome of one case, and its seconds."""
    base, kind, files = case(seed)
    # A2D's folder says which of two it is; a base's name says no block size.
    folder = place / "case" / base.removesuffix("-shards")
    folder.parent.mkdir()
    try:
        lay_out(folder, base, files, place)
        started = process_time()
        found = verdict(folder)
        return kind, found, process_time() - started
    finally:
        shutil.rmtree(folder.parent)


def main() -> None:
    """Run all cases and print the counts."""
    options = arguments(__doc__, 20_000).parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()  # of odd configs
    tally = Tally(("loaded", "refused"))
    with whole_checkpoints() as place:
        for seed in tally.seeds(options):
            kind, found, seconds = judge(seed, place)
            tally.add(kind, found, f"seed {seed} ({case(seed)[0]}, {kind})", seconds)
    print(tally.table())
    print(tally.line())
    sys.exit(bool(tally.bugs))


if __name__ == "__main__":
    main()
