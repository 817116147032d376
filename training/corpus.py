"""What the tiny models learn from: word problems, GSM8K, tokenizer, batches of one length."""

import json
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from spiffy.calib.synthetic import Problem, problems

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


def unseen(count: int, seed: int = 0) -> list[Problem]:
    """Return the first different problems of the test split."""
    found: dict[str, Problem] = {}
    for problem in problems("test", seed):
        found.setdefault(problem.question, problem)
        if len(found) == count:
            break
    return list(found.values())


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
