"""The training loop of `tiny-llada`: schedule, drills, checkpoints to go on from, and its log."""

import argparse
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from checkpoint import export
from corpus import DRILL, EOS_ID, Examples, read_gsm8k, train_tokenizer
from masking import Batch, mask_batch, mask_names, mask_results, name_tokens, result_marks
from network import Shape, TinyLlada
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from spiffy.calib.synthetic import problems

DRILL_EVERY, DRILL_UNTIL = 3, 0.3
"""Every third step is a drill of bare equations, until this share of the training time."""
NAMING_EVERY, NAMING_FROM, NAMING_UNTIL = 2, 0.3, 0.92
"""Then every second step is a drill of names and things."""


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return the unweighted cross-entropy of every scored position."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(batch.inputs, batch.wanted)
    return functional.cross_entropy(
        logits.float().flatten(0, 1), batch.targets.flatten(), reduction="none"
    )


def make_optimizers(model: TinyLlada, lr: float, muon_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings and norms."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.05),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate_factor(step: int, progress: float, decay_share: float) -> float:
    """Warm up over 60 steps, hold, then fall linearly to 0 over the last `decay_share`."""
    return min(1.0, (step + 1) / 60, max(0.0, (1 - progress) / decay_share))


def curriculum(progress: float) -> tuple[float, float, float]:
    """Weights of problems with 1, 2 and 3 steps: mostly one step first, all alike later."""
    share = min(1.0, progress / 0.15)
    return 1.0, 0.25 + 0.75 * share, 0.1 + 0.9 * share


def step_kind(step: int, progress: float) -> Literal["stories", "sums", "names"]:
    """Say what a training step is spent on: whole answers, or one of the drills."""
    if step % DRILL_EVERY == 0 and progress < DRILL_UNTIL:
        return "sums"
    if step % NAMING_EVERY == 0 and NAMING_FROM <= progress < NAMING_UNTIL:
        return "names"
    return "stories"


@dataclass(slots=True)
class Progress:
    """How far training has come, over all resumed runs."""

    step: int = 0
    seconds: float = 0.0


class Trainer:
    """The training state, and how it is saved, resumed and exported."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.work = Path(args.work)
        self.work.mkdir(parents=True, exist_ok=True)
        self.gsm8k = read_gsm8k(args.gsm8k)
        self.tokenizer = self._tokenizer(args.vocab_size)
        self.args = args
        self.progress = Progress()
        shape = Shape(
            vocab_size=args.vocab_size,
            d_model=args.d_model,
            n_layers=args.n_layers,
            n_heads=args.n_heads,
            mlp_hidden_size=args.mlp_hidden_size,
        )
        torch.manual_seed(args.seed)
        self.model = TinyLlada(shape)
        self.average = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.optimizers = make_optimizers(self.model, args.lr, args.muon_lr)
        self.peaks = [args.lr if i else args.muon_lr for i in range(2)]
        self._resume()

    def run(self) -> None:
        """Train until the time budget is spent, saving and publishing on the way."""
        args, model = self.args, self.model
        forward = cast(nn.Module, torch.compile(model, dynamic=False)) if args.compile else model
        seed = args.seed + self.progress.step  # a resumed run goes on with fresh data
        examples = Examples(self.tokenizer, self.gsm8k, seed)
        generator = torch.Generator().manual_seed(seed)
        logs = {kind: Log(self.tokenizer) for kind in ("stories", "sums", "names")}
        marks, names = result_marks(self.tokenizer), name_tokens(self.tokenizer)
        saved = time.monotonic()
        while self.progress.seconds < args.minutes * 60:
            began = time.monotonic()
            done = self.progress.seconds / (args.minutes * 60)
            kind = step_kind(self.progress.step, done)
            if kind == "sums":
                batch = mask_results(DRILL, examples.drill(), marks)
            elif kind == "names":
                bucket, chosen = examples.stories(curriculum(done))
                batch = mask_names(bucket, chosen, names, generator)
            else:
                bucket, chosen = examples.batch(curriculum(done))
                batch = mask_batch(bucket, chosen, generator)
            losses = token_losses(forward, batch)
            torch.autograd.backward((losses * batch.weights.flatten()).sum())
            self._update(rate_factor(self.progress.step, done, args.decay_share))
            self.progress.step += 1
            self.progress.seconds += time.monotonic() - began
            logs[kind].add(batch, losses.detach())
            if self.progress.step % 50 == 0:
                for name, log in logs.items():
                    log.show(name, self.progress)
            if time.monotonic() - saved > args.save_minutes * 60:
                self.save()
                saved = time.monotonic()
        self.save()

    def save(self) -> None:
        """Write the checkpoint and, if asked to, publish the averaged weights."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": asdict(self.progress),
            "shape": asdict(self.model.shape),
        }
        target = self.work / "checkpoint.pt"
        temporary = target.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(target)
        if self.args.publish:
            export(self.work, self.args.publish)

    def _tokenizer(self, vocab_size: int) -> Tokenizer:
        path = self.work / "tokenizer.json"
        if not path.exists():
            stream = problems("train", seed=-1)
            synthetic = [next(stream) for _ in range(20000)]
            texts = [p.question for p in synthetic] + [p.answer for p in synthetic]
            texts += [p.question for p in self.gsm8k] + [p.answer for p in self.gsm8k]
            train_tokenizer(texts, vocab_size).save(str(path))
        return Tokenizer.from_file(str(path))

    def _resume(self) -> None:
        path = self.work / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(**state["progress"])
        print(f"resumed at step {self.progress.step}", flush=True)

    def _update(self, factor: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        keep = min(self.args.average, (1 + self.progress.step) / (10 + self.progress.step))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                self.average[name].lerp_(value, 1 - keep)


class Log:
    """Running losses, with the number tokens apart: operands against results.

    A number right after `>>` or between `=` and `>>` is a result; other numbers in an answer are
    operands, copied from the question or from an earlier line.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        numbers = [tokenizer.encode(str(n)).ids[0] for n in range(100)]
        self._is_number = torch.zeros(tokenizer.get_vocab_size(), dtype=torch.bool)
        self._is_number[torch.tensor(numbers)] = True
        self._result_marks = result_marks(tokenizer)
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._mark = time.monotonic()
        self._tokens = 0

    def add(self, batch: Batch, losses: Tensor) -> None:
        """Take in a batch's losses at current positions, each counted once."""
        current = batch.current.flatten()
        number = self._is_number[batch.targets]
        before = batch.targets.roll(1, dims=1)
        result = number & torch.isin(before, self._result_marks)
        groups = {
            "words": ~number & (batch.targets != EOS_ID),
            "operands": number & ~result,
            "results": result,
            "eos": batch.targets == EOS_ID,
        }
        self._bump("loss", float((losses * batch.weights.flatten()).sum()), 1.0)
        for name, chosen in groups.items():
            picked = chosen.flatten() & current
            self._bump(name, float(losses[picked].sum()), float(picked.sum()))
        self._tokens += batch.inputs.numel()

    def show(self, name: str, progress: Progress) -> None:
        """Print the means since the last call, if any, and start over."""
        if not self._sums:
            return
        seconds = time.monotonic() - self._mark
        means = " ".join(f"{k} {v[0] / max(v[1], 1):.3f}" for k, v in self._sums.items())
        rate = self._tokens / seconds
        minutes = progress.seconds / 60
        at = f"{minutes:6.1f} min step {progress.step}"
        print(f"{at} {name}: {means} | {rate:.0f} tok/s", flush=True)
        self._sums.clear()
        self._tokens, self._mark = 0, time.monotonic()

    def _bump(self, name: str, total: float, count: float) -> None:
        self._sums[name][0] += total
        self._sums[name][1] += count
