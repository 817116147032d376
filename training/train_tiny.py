"""Train `tiny-llada`, the small masked diffusion language model that ships with Spiffy.

Three commands:

    train_tiny.py train WORK_DIR --gsm8k train.jsonl --minutes 100 --publish CHECKPOINT_DIR
    train_tiny.py export WORK_DIR CHECKPOINT_DIR
    train_tiny.py evaluate CHECKPOINT_DIR --problems 300

`train` builds the tokenizer, trains on generated word problems with a little GSM8K, saves a
checkpoint every few minutes and resumes from it when called again. `export` writes the official
LLaDA layout. `evaluate` decodes unseen problems with LLaDA's own rule and counts exact answers.
"""

import argparse
import json
import math
import random
import re
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional

from spiffy.calib.synthetic import (
    CONTAINERS,
    PEOPLE,
    THINGS,
    Problem,
    final_answer,
    problems,
)

EOS, MASK, USER, ASSISTANT = "<|endoftext|>", "<|mdm_mask|>", "<|user|>", "<|assistant|>"
EOS_ID, MASK_ID, USER_ID, ASSISTANT_ID = range(4)
SPECIAL_TOKENS = [EOS, MASK, USER, ASSISTANT]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|endoftext|>"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

NUMBER_SAFE_SPLIT = (
    r"<<|>>|####(?: (?=\d))?"  # calculator marks and the answer mark
    r"|\d{1,2}"  # numbers below 100 are one token, with no space attached
    r"| ?\p{L}+(?: (?=\d))?"  # a word takes the space before a number along
    r"| ?[^\s\p{L}\d](?: (?=\d))?"
    r"|\s"
)


# Tokenizer


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE in which every number from 0 to 99 is exactly one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(NUMBER_SAFE_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    numbers = " ".join(str(number) for number in range(100))
    tokenizer.train_from_iterator([*texts, *[numbers] * len(texts)], trainer)
    split = [n for n in range(100) if len(tokenizer.encode(str(n)).ids) != 1]
    if split:
        raise ValueError(f"vocabulary of {vocab_size} is too small: {split} are not one token each")
    return tokenizer


def prompt_ids(tokenizer: Tokenizer, question: str) -> list[int]:
    """Encode a question as the chat template does."""
    return [USER_ID, *tokenizer.encode(question).ids, ASSISTANT_ID]


def read_gsm8k(path: Path) -> list[Problem]:
    """Read GSM8K's own JSON lines."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Problem(row["question"], row["answer"]) for row in rows]


# Model


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that define the network."""

    vocab_size: int = 1024
    d_model: int = 256
    n_layers: int = 5
    n_heads: int = 4
    mlp_hidden_size: int = 512
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5


class Block(nn.Module):
    """A LLaDA (Llama) block with bidirectional attention, under the official parameter names."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d, hidden = shape.d_model, shape.mlp_hidden_size
        self.n_heads = shape.n_heads
        self.attn_norm = nn.RMSNorm(d, eps=shape.rms_norm_eps)
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, d, bias=False)
        self.v_proj = nn.Linear(d, d, bias=False)
        self.attn_out = nn.Linear(d, d, bias=False)
        self.ff_norm = nn.RMSNorm(d, eps=shape.rms_norm_eps)
        self.ff_proj = nn.Linear(d, hidden, bias=False)
        self.up_proj = nn.Linear(d, hidden, bias=False)
        self.ff_out = nn.Linear(hidden, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, seen: Tensor | None) -> Tensor:
        """Return the residual stream after this block."""
        batch, length, d = x.shape
        heads = (batch, length, self.n_heads, d // self.n_heads)
        y = self.attn_norm(x)
        q = _rotate(self.q_proj(y).view(heads).transpose(1, 2), cos, sin)
        k = _rotate(self.k_proj(y).view(heads).transpose(1, 2), cos, sin)
        v = self.v_proj(y).view(heads).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + self.attn_out(mixed.transpose(1, 2).reshape(batch, length, d))
        y = self.ff_norm(x)
        return x + cast(Tensor, self.ff_out(functional.silu(self.ff_proj(y)) * self.up_proj(y)))


class TinyLlada(nn.Module):
    """The whole network, with input and output embeddings tied."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.wte = nn.Embedding(shape.vocab_size, shape.d_model)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.n_layers))
        self.ln_f = nn.RMSNorm(shape.d_model, eps=shape.rms_norm_eps)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("attn_out.weight", "ff_out.weight"))
                std = 0.02 / math.sqrt(2 * shape.n_layers) if residual else 0.02
                nn.init.normal_(parameter, std=std)

    def forward(
        self, ids: Tensor, wanted: Tensor | None = None, seen: Tensor | None = None
    ) -> Tensor:
        """Return logits, at all positions or at those each row of `wanted` names.

        Every position attends to every other one; `seen` (rows by positions) can hide padding.
        """
        cos, sin = _rotary_tables(self.shape, ids.shape[1])
        visible = None if seen is None else seen[:, None, None, :]
        x = self.wte(ids)
        for block in self.blocks:
            x = block(x, cos, sin, visible)
        if wanted is not None:
            x = x.gather(1, wanted.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return functional.linear(self.ln_f(x), self.wte.weight)


def _rotary_tables(shape: Shape, length: int) -> tuple[Tensor, Tensor]:
    head_dim = shape.d_model // shape.n_heads
    inverse = shape.rope_theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


# Training data


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sequences of one total length; the answer region is whatever the prompt leaves."""

    length: int
    window: int  # positions from the answer's start that are scored
    batch: int


SHORT = Bucket(length=96, window=64, batch=96)
MEDIUM = Bucket(length=112, window=64, batch=80)
DOUBLE = Bucket(length=176, window=128, batch=48)
LONG = Bucket(length=304, window=160, batch=32)
DRILL = Bucket(length=64, window=64, batch=144)
DOUBLE_EVERY, LONG_EVERY = 8, 8
DRILL_EVERY, DRILL_UNTIL = 3, 0.3
"""Every third step is a drill of bare equations, until this share of the training time."""
NAMING_EVERY, NAMING_FROM, NAMING_UNTIL = 2, 0.3, 0.92
"""Then every second step is a drill of names and things."""
MIN_GENERATION = 64

Example = tuple[list[int], list[int]]


class Examples:
    """An endless stream of batches: mostly short synthetic ones, some long ones with GSM8K."""

    def __init__(self, tokenizer: Tokenizer, gsm8k: Sequence[Problem], seed: int) -> None:
        self._tokenizer = tokenizer
        self._rng = random.Random(seed)
        self._synthetic = problems("train", seed)
        self._turn = 0
        self._equations: list[str] = []
        self._queues: dict[Bucket, list[Example]] = defaultdict(list)
        fits = (self._encode(problem) for problem in gsm8k)
        self._gsm8k = [pair for pair in fits if len(pair[0]) + len(pair[1]) < LONG.length]

    def batch(self, step_weights: Sequence[float]) -> tuple[Bucket, list[Example]]:
        """Return the next batch; `step_weights` weighs problems of 1, 2 and 3 steps."""
        turn = self._turn
        self._turn += 1
        if turn % LONG_EVERY == LONG_EVERY - 1:
            half = LONG.batch // 2
            synthetic = self._any(LONG.batch - half, step_weights)
            return LONG, synthetic + self._rng.sample(self._gsm8k, half)
        if turn % DOUBLE_EVERY == DOUBLE_EVERY // 2:
            return DOUBLE, self._any(DOUBLE.batch, step_weights)
        return self.stories(step_weights)

    def stories(self, step_weights: Sequence[float]) -> tuple[Bucket, list[Example]]:
        """Return a batch of synthetic problems at the usual generation length."""
        self._fill(step_weights, MEDIUM, 0)
        waiting = {b: len(self._queues[b]) / b.batch for b in (SHORT, MEDIUM)}
        bucket = max(waiting, key=lambda b: waiting[b])
        return bucket, self._take(bucket, bucket.batch, step_weights)

    def drill(self) -> list[Example]:
        """Return a batch of equations without stories, six a row, as often as stories use each.

        A story shows the network one to three sums, and hides the operands half of the time; a
        drill shows six, all with their operands. Arithmetic is what it learns last.
        """
        while len(self._equations) < 6 * DRILL.batch:
            answer = next(self._synthetic).answer
            self._equations += re.findall(r"<<[^>]*>>\d+", answer)
        self._rng.shuffle(self._equations)
        rows = []
        for _ in range(DRILL.batch):
            text = "\n".join(self._equations.pop() for _ in range(6))
            rows.append((prompt_ids(self._tokenizer, ""), self._tokenizer.encode(text).ids))
        return rows

    def _any(self, count: int, step_weights: Sequence[float]) -> list[Example]:
        """Take short and longer prompts alike."""
        half = count // 2
        short = self._take(SHORT, half, step_weights)
        return short + self._take(MEDIUM, count - half, step_weights)

    def _take(self, bucket: Bucket, count: int, step_weights: Sequence[float]) -> list[Example]:
        self._fill(step_weights, bucket, count)
        queue = self._queues[bucket]
        taken, queue[:count] = queue[:count], []
        return taken

    def _fill(self, step_weights: Sequence[float], bucket: Bucket, count: int) -> None:
        while len(self._queues[bucket]) < max(count, 1):
            for problem in (next(self._synthetic) for _ in range(1024)):
                steps = problem.answer.count("<<")
                if self._rng.random() < step_weights[steps - 1] / max(step_weights):
                    pair = self._encode(problem)
                    short = len(pair[0]) + MIN_GENERATION <= SHORT.length
                    self._queues[SHORT if short else MEDIUM].append(pair)

    def _encode(self, problem: Problem) -> Example:
        answer = [*self._tokenizer.encode(problem.answer).ids, EOS_ID]
        return prompt_ids(self._tokenizer, problem.question), answer


@dataclass(frozen=True, slots=True)
class Batch:
    """Masked inputs; for the positions in the window their index, target and loss weight.

    `current` marks those a decoder could be about to fill: masked, and not in a later block.
    """

    inputs: Tensor
    wanted: Tensor
    targets: Tensor
    weights: Tensor
    current: Tensor


BLOCK_LENGTHS, BLOCK_ODDS = (32, 16, 8), (0.7, 0.15, 0.15)
NEAR_PADDING, FAR_PADDING = 0.3, 0.05
"""Loss weights of EOS padding in the block where the answer ends, and beyond it."""
LATER_BLOCKS = 0.2
"""Loss weight of positions after the current block, which decoding does not read."""
SMALLEST_RATIO = 0.04


def mask_batch(bucket: Bucket, examples: Sequence[Example], generator: torch.Generator) -> Batch:
    """Mask answers the two ways a decoder meets them, half of the examples each.

    Whole: every answer token is masked with probability t, weighted 1/t (LLaDA's objective).
    Blockwise: the blocks before a chosen one are clean, it is masked with probability t, all after
    it is masked. t is stratified over the batch, which lowers the variance of the loss.
    """
    batch, length = len(examples), bucket.length
    ids = padded(bucket, examples)
    starts = torch.tensor([len(prompt) for prompt, _ in examples]).unsqueeze(1)
    sizes = torch.tensor([len(answer) for _, answer in examples]).unsqueeze(1)
    offsets = torch.arange(length) - starts  # position inside the answer

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    ranks = torch.randperm(batch, generator=generator).unsqueeze(1)
    ratio = SMALLEST_RATIO + (1 - SMALLEST_RATIO) * (ranks + uniform(batch, 1)) / batch
    blockwise = uniform(batch, 1) < 0.5
    odds = torch.tensor(BLOCK_ODDS).expand(batch, -1)
    block = torch.tensor(BLOCK_LENGTHS)[torch.multinomial(odds, 1, generator=generator)]
    last = (sizes - 1) // block  # the block in which the answer ends
    first = (uniform(batch, 1) * (last + 1)).long() * block
    begin = torch.where(blockwise, first, 0)
    end = torch.where(blockwise, first + block, length)

    current = (offsets >= begin) & (offsets < end)
    later = offsets >= end
    masked = later | (current & (uniform(batch, length) < ratio))
    weights = (masked & current) / ratio + LATER_BLOCKS * later
    weights = torch.where(offsets >= sizes, weights * NEAR_PADDING, weights)
    far = offsets >= (last + 1) * block
    weights = torch.where(far, weights * FAR_PADDING / NEAR_PADDING, weights)

    wanted = starts + torch.arange(bucket.window)
    inside = wanted < length
    wanted = wanted.clamp(max=length - 1)
    inputs = ids.masked_fill(masked, MASK_ID)
    scored = weights.gather(1, wanted) * inside
    # A row that shows only its current block should not count for less than a whole answer.
    scored = scored / torch.minimum(end - begin, sizes).clamp(min=8)
    open_now = (masked & current).gather(1, wanted) & inside
    return Batch(inputs, wanted, ids.gather(1, wanted), scored / batch, open_now)


def mask_results(bucket: Bucket, examples: Sequence[Example], marks: Tensor) -> Batch:
    """Mask the results of a drill: the numbers after one of `marks`."""
    ids = padded(bucket, examples)
    masked = torch.isin(ids.roll(1, dims=1), marks)
    wanted = torch.arange(bucket.window).expand(len(examples), -1)
    weights = masked / masked.sum()
    return Batch(ids.masked_fill(masked, MASK_ID), wanted, ids, weights, masked)


def mask_names(
    bucket: Bucket, examples: Sequence[Example], names: Tensor, generator: torch.Generator
) -> Batch:
    """Mask an answer's `names`, and in half of the rows everything from a random token on.

    An answer has one or two names among forty tokens, so without help the network learns late to
    look up who the story is about; a wrong name costs it no exact answer, but reads badly.
    """
    ids = padded(bucket, examples)
    starts = torch.tensor([[len(prompt)] for prompt, _ in examples])
    sizes = torch.tensor([[len(answer)] for _, answer in examples])
    offsets = torch.arange(bucket.length) - starts
    share = (2 * torch.rand(len(examples), 1, generator=generator)).clamp(max=1)
    cut = torch.where(share < 1, (share * sizes).long(), bucket.length)
    scored = torch.isin(ids, names) & (offsets >= 0) & (offsets < cut)
    wanted = (starts + torch.arange(bucket.window)).clamp(max=bucket.length - 1)
    inputs = ids.masked_fill(scored | (offsets >= cut), MASK_ID)
    current = scored.gather(1, wanted)
    weights = current / current.sum().clamp(min=1)
    return Batch(inputs, wanted, ids.gather(1, wanted), weights, current)


def name_tokens(tokenizer: Tokenizer) -> Tensor:
    """Return the tokens of names, pronouns, things and containers that are one token long."""
    words = [word for pair in PEOPLE for word in pair] + [*THINGS, *CONTAINERS]
    words += [word.capitalize() for _, word in PEOPLE]
    encoded = [tokenizer.encode(space + word).ids for word in words for space in ("", " ")]
    return torch.tensor(sorted({ids[0] for ids in encoded if len(ids) == 1}))


def padded(bucket: Bucket, examples: Sequence[Example]) -> Tensor:
    """Return prompts and answers, filled up with EOS: int64 [examples, bucket.length]."""
    ids = torch.full((len(examples), bucket.length), EOS_ID)
    for row, (prompt, answer) in enumerate(examples):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
    return ids


def result_marks(tokenizer: Tokenizer) -> Tensor:
    """Return the tokens that a result follows: `=` and `>>` (after `=`, also the annotation)."""
    return torch.tensor([tokenizer.token_to_id(token) for token in ("=", ">>")])


# Training


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


# Export


def official_config(shape: Shape) -> dict[str, Any]:
    """Return the network's config in the layout of the official checkpoints.

    It has no `auto_map`: the modelling code that would name is not part of the checkpoint.
    """
    return {
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": shape.d_model,
        "embedding_dropout": 0.0,
        "embedding_size": shape.vocab_size,
        "eos_token_id": EOS_ID,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": MASK_ID,
        "max_sequence_length": 512,
        "mlp_hidden_size": shape.mlp_hidden_size,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": shape.n_heads,
        "n_kv_heads": shape.n_heads,
        "n_layers": shape.n_layers,
        "pad_token_id": EOS_ID,
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": shape.rope_theta,
        "scale_logits": False,
        "transformers_version": "4.46.3",
        "use_cache": False,
        "vocab_size": shape.vocab_size,
        "weight_tying": True,
    }


TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": 512,
    "clean_up_tokenization_spaces": False,
    "eos_token": EOS,
    "pad_token": EOS,
    "mask_token": MASK,
    "additional_special_tokens": [USER, ASSISTANT],
    "chat_template": CHAT_TEMPLATE,
}


def export(work: Path, target: Path) -> None:
    """Write the averaged weights as an official LLaDA checkpoint, file by file, atomically."""
    state = torch.load(work / "checkpoint.pt", weights_only=True)
    shape = Shape(**state["shape"])
    tensors = {
        f"model.transformer.{name}": value.to(torch.bfloat16).contiguous()
        for name, value in state["average"].items()
    }
    target.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.new")
    staging.mkdir(exist_ok=True)
    save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(work / "tokenizer.json", staging / "tokenizer.json")
    for name, content in (
        ("config.json", official_config(shape)),
        ("tokenizer_config.json", TOKENIZER_CONFIG),
    ):
        text = json.dumps(content, indent=2) + "\n"
        (staging / name).write_text(text, encoding="utf-8")
    for file in sorted(staging.iterdir()):
        file.chmod(0o644)  # safetensors writes for the owner only
        file.replace(target / file.name)
    staging.rmdir()


def load_exported(directory: Path) -> tuple[TinyLlada, Tokenizer]:
    """Load an exported checkpoint back into this script's own network, in float32."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    names = Shape.__dataclass_fields__
    model = TinyLlada(Shape(**{name: config[name] for name in names}))
    tensors = load_file(directory / "model.safetensors")
    prefix = "model.transformer."
    model.load_state_dict({k.removeprefix(prefix): v.float() for k, v in tensors.items()})
    return model.eval(), Tokenizer.from_file(str(directory / "tokenizer.json"))


# Evaluation


@dataclass(slots=True)
class Decoded:
    """What one row's decoding gave: its tokens up to EOS, steps, and padding committed."""

    ids: list[int]
    steps: int
    committed: int  # tokens written in all, EOS padding included


@torch.no_grad()
def decode(
    model: TinyLlada,
    prompts: Sequence[Sequence[int]],
    gen_length: int,
    block_length: int,
    threshold: float | None,
) -> list[Decoded]:
    """Decode prompts together by LLaDA's rule; ties go to the lowest position.

    Static (no threshold) commits the single most confident position of the block per step;
    with a threshold, all others that reach it as well. A row stops after its first block with EOS.
    Prompts are padded on the left and the padding is hidden, which rotary embeddings do not notice.
    """
    batch, start = len(prompts), max(map(len, prompts))
    ids = torch.full((batch, start + gen_length), MASK_ID)
    seen = torch.ones_like(ids, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, start - len(prompt) : start] = torch.tensor(prompt)
        seen[row, : start - len(prompt)] = False
    steps = [0] * batch
    ends = [start + gen_length] * batch
    active = torch.arange(batch)
    for begin in range(start, start + gen_length, block_length):
        block = slice(begin, begin + block_length)
        at = torch.arange(begin, begin + block_length).expand(batch, -1)
        running = active
        while len(running):
            logits = model(ids[running], at[: len(running)], seen[running]).double()
            confidence, tokens = logits.softmax(-1).max(-1)
            masked = ids[running, block] == MASK_ID
            confidence = confidence.masked_fill(~masked, -1.0)
            chosen = torch.zeros_like(masked)
            chosen[torch.arange(len(running)), confidence.argmax(-1)] = True
            if threshold is not None:
                chosen |= confidence >= threshold
            ids[running, block] = torch.where(chosen, tokens, ids[running, block])
            for row in running.tolist():
                steps[row] += 1
            running = running[(ids[running, block] == MASK_ID).any(-1)]
        finished = (ids[active, block] == EOS_ID).any(-1)
        for row in active[finished].tolist():
            ends[row] = begin + block_length
        active = active[~finished]
    results = []
    for row in range(batch):
        answer = ids[row, start : ends[row]].tolist()
        kept = answer[: answer.index(EOS_ID)] if EOS_ID in answer else answer
        results.append(Decoded(kept, steps[row], len(answer)))
    return results


def unseen(count: int, seed: int = 0) -> list[Problem]:
    """Return the first different problems of the test split."""
    found: dict[str, Problem] = {}
    for problem in problems("test", seed):
        found.setdefault(problem.question, problem)
        if len(found) == count:
            break
    return list(found.values())


def evaluate(args: argparse.Namespace) -> None:
    """Print exact answers and tokens per step for each generation length and policy."""
    model, tokenizer = load_exported(args.checkpoint)
    chosen = unseen(args.problems, args.seed)
    for gen_length in args.gen_lengths:
        for threshold in (None, args.threshold):
            right: dict[int, list[bool]] = defaultdict(list)
            outputs: list[Decoded] = []
            for first in range(0, len(chosen), args.batch):
                group = chosen[first : first + args.batch]
                prompts = [prompt_ids(tokenizer, problem.question) for problem in group]
                decoded = decode(model, prompts, gen_length, args.block_length, threshold)
                outputs += decoded
                for problem, output in zip(group, decoded, strict=True):
                    text = tokenizer.decode(output.ids)
                    correct = final_answer(text) == final_answer(problem.answer)
                    right[problem.answer.count("<<")].append(correct)
                    if args.show and not correct:
                        print(f"--- {problem.question}\n{text}\n(right: {problem.answer})")
            report(gen_length, threshold, right, outputs)


def report(
    gen_length: int,
    threshold: float | None,
    right: dict[int, list[bool]],
    outputs: Sequence[Decoded],
) -> None:
    """Print one line of results; tokens per step count the answer's EOS but not its padding."""
    steps = sum(output.steps for output in outputs)
    answered = sum(len(output.ids) + 1 for output in outputs)
    committed = sum(output.committed for output in outputs)
    total = sum(len(flags) for flags in right.values())
    exact = sum(sum(flags) for flags in right.values())
    by_steps = " ".join(f"{n}-step {sum(f)}/{len(f)}" for n, f in sorted(right.items()))
    policy = "static" if threshold is None else f"threshold {threshold}"
    print(
        f"gen_length {gen_length} {policy}: exact {exact}/{total} = {exact / total:.1%} "
        f"({by_steps}); tokens per step {answered / steps:.2f}, "
        f"with padding {committed / steps:.2f}",
        flush=True,
    )


# Command line


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser("train", help="train, or resume training")
    train.add_argument("work", type=Path, help="folder for the tokenizer and the checkpoint")
    train.add_argument("--gsm8k", type=Path, required=True, help="GSM8K's train.jsonl")
    train.add_argument("--minutes", type=float, default=100, help="training time in all")
    train.add_argument("--save-minutes", type=float, default=4, help="time between checkpoints")
    train.add_argument("--publish", type=Path, help="export here at every checkpoint")
    train.add_argument("--decay-share", type=float, default=0.25, help="share of time for decay")
    train.add_argument("--average", type=float, default=0.99, help="weight averaging per step")
    train.add_argument("--lr", type=float, default=3e-3, help="AdamW's rate (embeddings, norms)")
    train.add_argument("--muon-lr", type=float, default=0.02, help="Muon's rate (matrices)")
    train.add_argument("--no-compile", dest="compile", action="store_false")
    train.add_argument("--seed", type=int, default=0)
    shape = Shape()
    for name in ("vocab_size", "d_model", "n_layers", "n_heads", "mlp_hidden_size"):
        flag = "--" + name.replace("_", "-")
        train.add_argument(flag, type=int, default=getattr(shape, name))

    exporting = commands.add_parser("export", help="write the official layout")
    exporting.add_argument("work", type=Path)
    exporting.add_argument("checkpoint", type=Path)

    evaluating = commands.add_parser("evaluate", help="count exact answers on unseen problems")
    evaluating.add_argument("checkpoint", type=Path)
    evaluating.add_argument("--problems", type=int, default=300)
    evaluating.add_argument("--gen-lengths", type=int, nargs="+", default=[64, 128, 256])
    evaluating.add_argument("--block-length", type=int, default=32)
    evaluating.add_argument("--threshold", type=float, default=0.9)
    evaluating.add_argument("--batch", type=int, default=64, help="prompts decoded together")
    evaluating.add_argument("--seed", type=int, default=0, help="seed of the test problems")
    evaluating.add_argument("--show", action="store_true", help="print wrong answers")
    return parser.parse_args(argv)


def main() -> int:
    """Run the chosen command."""
    args = parse_args()
    if args.command == "train":
        Trainer(args).run()
    elif args.command == "export":
        export(args.work, args.checkpoint)
    else:
        evaluate(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
