"""Turn `tiny-llada` into the other tiny models: other attention, same corpus and tokenizer.

    adapt_tiny.py sdar LLADA_DIR TARGET_DIR --gsm8k train.jsonl --minutes 20
    adapt_tiny.py llada2 SDAR_DIR TARGET_DIR --gsm8k train.jsonl --minutes 40
    adapt_tiny.py evaluate TARGET_DIR --problems 300

The weights start from the trained LLaDA model. Dream (Qwen2) gets zero biases and learns to speak
of the next position; SDAR (Qwen3) gets query and key norms that keep the size queries and keys had,
and learns to see whole blocks before its own and nothing after it. LLaDA2 starts from that SDAR
model and becomes a mixture of experts (`mixture.py`) that decodes blocks of 32, 16 or 8.
"""

import argparse
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from corpus import EOS_ID, MASK_ID, Bucket, Example, Examples, read_gsm8k, unseen
from masking import (
    BLOCK_LENGTHS,
    BLOCK_ODDS,
    NEAR_PADDING,
    SMALLEST_RATIO,
    Batch,
    mask_batch,
    padded,
)
from mixture import mixture_config, official_weights, start_from_sdar
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from spiffy.calib.synthetic import final_answer
from spiffy.runtime import decoding_settings, generate_many, load_model
from spiffy.runtime.models.dream import DREAM
from spiffy.runtime.models.llada import LLADA
from spiffy.runtime.models.sdar import SDAR

FAMILIES = {"sdar": SDAR, "dream": DREAM}
BLOCK_SIZE = 8  # SDAR's


def target_config(family: str, llada: dict[str, Any]) -> dict[str, Any]:
    """The config of the adapted model, in the family's official layout."""
    heads = llada["n_heads"]
    config = {
        "architectures": ["SDARForCausalLM" if family == "sdar" else "DreamModel"],
        "attention_dropout": 0.0,
        "bos_token_id": EOS_ID,
        "eos_token_id": EOS_ID,
        "hidden_act": "silu",
        "hidden_size": llada["d_model"],
        "initializer_range": 0.02,
        "intermediate_size": llada["mlp_hidden_size"],
        "mask_token_id": MASK_ID,
        "max_position_embeddings": llada["max_sequence_length"],
        "max_window_layers": llada["n_layers"],
        "model_type": "sdar" if family == "sdar" else "Dream",
        "num_attention_heads": heads,
        "num_hidden_layers": llada["n_layers"],
        "num_key_value_heads": heads,
        "pad_token_id": EOS_ID,
        "rms_norm_eps": llada["rms_norm_eps"],
        "rope_scaling": None,
        "rope_theta": llada["rope_theta"],
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": False,
        "use_sliding_window": False,
        "vocab_size": llada["vocab_size"],
    }
    if family == "sdar":
        config |= {
            "attention_bias": False,
            "block_size": BLOCK_SIZE,
            "head_dim": llada["d_model"] // heads,
        }
    return config


def start_from_llada(family: str, source: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Build the family's module with the LLaDA model's weights, and its config."""
    config = target_config(family, json.loads((source / "config.json").read_text()))
    architecture, module_config = FAMILIES[family].architecture(config)
    module = architecture(module_config)
    weights = {}
    for name, value in load_file(source / "model.safetensors").items():
        for pattern, replacement in LLADA.key_mapping.items():
            name = re.sub(pattern, replacement, name)
        weights[name] = value.float()
    report = module.load_state_dict(weights, strict=False)
    fresh = ("q_norm", "k_norm", "bias", "lm_head")  # lm_head is tied to the embedding
    unexplained = [key for key in report.missing_keys if not any(part in key for part in fresh)]
    if unexplained or report.unexpected_keys:
        raise ValueError(f"weights do not fit: {unexplained} {report.unexpected_keys}")
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    return cast(nn.Module, module), config


@torch.no_grad()
def match_norms(module: Any, ids: Tensor, seen: Tensor) -> None:
    """Set each layer's query and key norms to the size that queries and keys have on `ids`.

    Layer by layer, because a layer's input depends on the norms below it.
    """
    for layer in module.model.layers:
        attention = layer.self_attn
        sizes: dict[str, Tensor] = {}

        def note(name: str, sizes: dict[str, Tensor] = sizes) -> Any:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                sizes[name] = inputs[0].pow(2).mean().sqrt()

            return hook

        handles = [
            getattr(attention, name).register_forward_pre_hook(note(name))
            for name in ("q_norm", "k_norm")
        ]
        module.model(input_ids=ids, attention_mask=seen, use_cache=False)
        for handle, name in zip(handles, ("q_norm", "k_norm"), strict=True):
            handle.remove()
            getattr(attention, name).weight.fill_(float(sizes[name]))


def doubled_mask(length: int, block_length: int) -> Tensor:
    """Who sees whom when a noisy copy [0, length) stands before a clean one, bool [1, 1, 2n, 2n].

    A noisy block sees itself and the clean blocks before it; a clean block sees itself and those
    before it. So one forward scores every block as if the ones before it had been decoded.
    """
    block = torch.arange(length) // block_length
    same, earlier = block[:, None] == block[None, :], block[:, None] > block[None, :]
    nothing = torch.zeros_like(same)
    noisy, clean = torch.cat((same, earlier), 1), torch.cat((nothing, same | earlier), 1)
    return torch.cat((noisy, clean), 0)[None, None]


def mask_blocks(
    bucket: Bucket, examples: Sequence[Example], block_length: int, generator: torch.Generator
) -> tuple[Batch, Tensor]:
    """Mask every block of the answers with a ratio of its own; also returns the clean ids."""
    batch, length = len(examples), bucket.length
    ids = padded(bucket, examples)
    starts = torch.tensor([len(prompt) for prompt, _ in examples]).unsqueeze(1)
    ends = starts + torch.tensor([len(answer) for _, answer in examples]).unsqueeze(1)
    position = torch.arange(length)
    blocks = -(-length // block_length)
    ratio = SMALLEST_RATIO + (1 - SMALLEST_RATIO) * torch.rand(batch, blocks, generator=generator)
    ratio = ratio.repeat_interleave(block_length, dim=1)[:, :length]
    masked = (torch.rand(batch, length, generator=generator) < ratio) & (position >= starts)
    decoded = position < (ends + block_length - 1) // block_length * block_length
    weights = masked * decoded / ratio
    weights = torch.where(position >= ends, weights * NEAR_PADDING, weights)
    weights = weights / (ends - starts).clamp(min=block_length) / batch
    wanted = (starts + torch.arange(bucket.window)).clamp(max=length - 1)
    inside = starts + torch.arange(bucket.window) < length
    scored = weights.gather(1, wanted) * inside
    inputs = ids.masked_fill(masked, MASK_ID)
    return Batch(inputs, wanted, ids.gather(1, wanted), scored, scored > 0), ids


def losses_of(
    family: str,
    module: Any,
    bucket: Bucket,
    examples: Sequence[Example],
    generator: torch.Generator,
) -> tuple[Tensor, Batch]:
    """The family's cross-entropy at every scored position [batch, window], and the batch."""
    if family != "dream":
        size = BLOCK_SIZE
        if family == "llada2":  # as often as `mask_batch` takes them
            chosen = torch.multinomial(torch.tensor(BLOCK_ODDS), 1, generator=generator)
            size = BLOCK_LENGTHS[int(chosen)]
        batch, clean = mask_blocks(bucket, examples, size, generator)
        ids = torch.cat((batch.inputs, clean), 1)
        positions = torch.arange(bucket.length).repeat(2)[None]
        seen, rows = doubled_mask(bucket.length, size), batch.wanted
    else:
        batch = mask_batch(bucket, examples, generator)
        ids, positions = batch.inputs, torch.arange(bucket.length)[None]
        seen = torch.ones(1, 1, bucket.length, bucket.length, dtype=torch.bool)
        rows = batch.wanted - 1  # raw row k - 1 speaks of token k
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = module.model(
            input_ids=ids, position_ids=positions, attention_mask=seen, use_cache=False
        ).last_hidden_state
        hidden = hidden.gather(1, rows.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        logits = module.lm_head(hidden)
    losses = functional.cross_entropy(
        logits.float().flatten(0, 1), batch.targets.flatten(), reduction="none"
    )
    return losses.view_as(batch.weights), batch


def adapt(args: argparse.Namespace) -> None:
    """Train for the given time and write the checkpoint every few minutes."""
    family = args.command
    torch.manual_seed(args.seed)
    tokenizer = Tokenizer.from_file(str(args.source / "tokenizer.json"))
    examples = Examples(tokenizer, read_gsm8k(args.gsm8k), args.seed + 1000)
    generator = torch.Generator().manual_seed(args.seed)
    everything = (1.0, 1.0, 1.0)
    bucket, rows = examples.batch(everything)
    length = bucket.length
    seen = doubled_mask(length, BLOCK_SIZE)[:, :, length:, length:]
    module: Any
    if family == "llada2":
        sdar = load_model(str(args.source))
        config = mixture_config(sdar.config)
        module = start_from_sdar(sdar.module, sdar.config, padded(bucket, rows)[:32], seen)
    else:
        module, config = start_from_llada(family, args.source)
    if family == "sdar":
        match_norms(module, padded(bucket, rows)[:16], seen)
    matrices = [p for n, p in module.named_parameters() if p.dim() == 2 and ".layers." in n]
    chosen = {id(p) for p in matrices}
    rest = [p for p in module.parameters() if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=args.muon_lr, momentum=0.95, weight_decay=0.05),
        torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    peaks = [args.muon_lr, args.lr]
    average = {k: v.detach().clone() for k, v in module.state_dict().items()}
    began = saved = time.monotonic()
    step, running = 0, 0.0
    while (progress := (time.monotonic() - began) / (args.minutes * 60)) < 1:
        bucket, batch_rows = examples.batch(everything)
        if family != "dream":  # two copies of every row: half as many rows
            bucket = replace(bucket, batch=max(bucket.batch // 2, 1))
            batch_rows = batch_rows[: bucket.batch]
        losses, batch = losses_of(family, module, bucket, batch_rows, generator)
        loss = (losses * batch.weights).sum()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        factor = min(1.0, (step + 1) / 30, (1 - progress) / 0.6)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        keep = min(0.98, (1 + step) / (10 + step))
        for name, value in module.state_dict().items():
            average[name].lerp_(value, 1 - keep)
        running += loss.item()
        if step % 50 == 0:
            minutes = (time.monotonic() - began) / 60
            print(f"{minutes:5.1f} min step {step} loss {running / 50:.3f}", flush=True)
            running = 0.0
        if not math.isfinite(running):
            raise FloatingPointError(f"the loss is {running} at step {step}")
        if time.monotonic() - saved > args.save_minutes * 60:
            export(args.source, args.target, config, average)
            saved = time.monotonic()
    export(args.source, args.target, config, average)


def export(source: Path, target: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Write the checkpoint in the official layout; the tokenizer is LLaDA's."""
    target.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.new")
    staging.mkdir(exist_ok=True)
    if config["model_type"] == "llada2_moe":
        weights = official_weights(weights)
    tensors = {
        name: value.to(torch.bfloat16).contiguous()
        for name, value in weights.items()
        if name != "lm_head.weight"
    }
    save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})
    (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, staging / name)
    for file in sorted(staging.iterdir()):
        file.chmod(0o644)  # safetensors writes for the owner only
        file.replace(target / file.name)
    staging.rmdir()


def evaluate(args: argparse.Namespace) -> None:
    """Count exact answers on unseen problems, decoded by the package itself."""
    model = load_model(str(args.checkpoint))
    for policy in ("static", "threshold"):
        lengths = {"gen_length": args.gen_length, "block_length": args.block_length}
        settings = decoding_settings(model, policy=policy, **lengths)
        chosen = unseen(args.problems)
        asked = [problem.question for problem in chosen]
        exact = tokens = steps = 0
        outputs = generate_many(model, asked, batch_size=args.batch, policy=policy, **lengths)
        for problem, output in zip(chosen, outputs, strict=True):
            exact += final_answer(output.text) == final_answer(problem.answer)
            tokens += len(output.token_ids)
            steps += output.stats.steps
        print(
            f"{args.checkpoint.name} {policy}, gen_length {args.gen_length}, block "
            f"{settings.block_length}: exact {exact}/{len(chosen)} = {exact / len(chosen):.1%}, "
            f"tokens per step {tokens / steps:.2f}",
            flush=True,
        )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for family in (*FAMILIES, "llada2"):
        source = "tiny-sdar" if family == "llada2" else "tiny-llada"
        adapting = commands.add_parser(family, help=f"adapt {source} to {family}")
        adapting.add_argument("source", type=Path, help=f"{source}'s folder")
        adapting.add_argument("target", type=Path, help="folder to write")
        adapting.add_argument("--gsm8k", type=Path, required=True, help="GSM8K's train.jsonl")
        adapting.add_argument("--minutes", type=float, default=20)
        adapting.add_argument("--save-minutes", type=float, default=4)
        adapting.add_argument("--lr", type=float, default=2e-3)
        adapting.add_argument("--muon-lr", type=float, default=0.01)
        adapting.add_argument("--seed", type=int, default=0)
    evaluating = commands.add_parser("evaluate", help="count exact answers on unseen problems")
    evaluating.add_argument("checkpoint", type=Path)
    evaluating.add_argument("--problems", type=int, default=300)
    evaluating.add_argument("--gen-length", type=int, default=64)
    evaluating.add_argument("--block-length", type=int, default=None)
    evaluating.add_argument("--batch", type=int, default=32)
    return parser.parse_args(argv)


def main() -> int:
    """Run the chosen command."""
    args = parse_args()
    (evaluate if args.command == "evaluate" else adapt)(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
