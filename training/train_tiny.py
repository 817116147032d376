"""Train `tiny-llada`, the small masked diffusion language model that ships with Spiffy.

Three commands:

    train_tiny.py train WORK_DIR --gsm8k train.jsonl --minutes 100 --publish CHECKPOINT_DIR
    train_tiny.py export WORK_DIR CHECKPOINT_DIR
    train_tiny.py evaluate CHECKPOINT_DIR --problems 300

`train` builds the tokenizer, trains on generated word problems with a little GSM8K, saves a
checkpoint every few minutes and resumes from it when called again. `export` writes the official
LLaDA layout. `evaluate` decodes unseen problems with LLaDA's own rule and counts exact answers.

The parts: `corpus.py` (problems, tokenizer, batches), `masking.py`, `network.py`, `trainer.py`
(loop and log), `checkpoint.py` (the official layout), `evaluation.py`; here is the command line.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from checkpoint import export
from evaluation import evaluate
from network import Shape
from trainer import Trainer


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
