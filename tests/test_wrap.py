"""Modules that are loaded already become models, or are refused in one line.

Whoever wraps a module gets what loading the checkpoint would give: the same logits, fingerprint and
tokens. What computes it is tried out, because nothing in a module says that it keeps to a mask.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PARITY, Oracle, decode, parity_model, random_prompt, refusal, states
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from spiffy.runtime import ALIASES, DiffusionLM, load_model, wrap
from spiffy.runtime.draft import GraphDrafter
from spiffy.runtime.models.attention import Group
from spiffy.runtime.models.mask import Mask
from spiffy.runtime.models.stored import stored_tensors
from spiffy.schemas import DecodingSettings, SpiffyError

IDS = torch.tensor([[5, 9, 311, 311, 7, 42]])
# One of each way of attending, with and without shifted logits, and a mixture of experts.
CHECKPOINTS = ("llada-a", "dream-a", "sdar-a", "llada2-a", "fastdllm2-a")


def config_of(checkpoint: str) -> dict[str, Any]:
    folder = Path(ALIASES.get(checkpoint, PARITY / checkpoint))
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


def own(checkpoint: str, dtype: str = "float32") -> DiffusionLM:
    """A model that may be changed."""
    return load_model(str(PARITY / checkpoint), device="cpu", dtype=dtype)


def wrapped(model: DiffusionLM, checkpoint: str, **options: Any) -> DiffusionLM:
    return wrap(model.module, None, model.family.name, config_of(checkpoint), **options)


# ---------------------------------------------------------------- what a wrapped module is


@pytest.mark.parametrize(
    ("checkpoint", "settings", "kind"),
    [("dream-a", Qwen2Config, Qwen2ForCausalLM), ("sdar-a", Qwen3Config, Qwen3ForCausalLM)],
)
def test_what_transformers_loads_is_what_our_loader_gives(
    checkpoint: str, settings: Any, kind: Any
) -> None:
    folder, loaded = PARITY / checkpoint, parity_model(checkpoint)
    config = settings.from_pretrained(folder)
    module = kind.from_pretrained(folder, config=config, attn_implementation="sdpa").train()
    ours = wrap(module, None, loaded.family.name)
    assert not module.training
    assert ours.name == str(folder)
    for fact in ("fingerprint", "vocab_size", "mask_token_id", "eos_token_ids", "max_length"):
        assert getattr(ours, fact) == getattr(loaded, fact), fact
    for fact in ("dtype", "device", "arithmetic", "default_block_length"):
        assert getattr(ours, fact) == getattr(loaded, fact), fact
    assert torch.equal(ours.forward_logits(IDS), loaded.forward_logits(IDS))


@pytest.mark.parametrize("checkpoint", ["llada-a", "llada2-a", "fastdllm2-a", "a2d-mdlm-a"])
def test_with_the_checkpoints_config_the_fingerprint_is_the_loaders(checkpoint: str) -> None:
    loaded = parity_model(checkpoint)
    ours = wrapped(loaded, checkpoint)
    assert ours.fingerprint == loaded.fingerprint
    assert ours.eos_token_ids == loaded.eos_token_ids


@pytest.mark.parametrize("name", ["tiny-llada", "tiny-dream", "tiny-sdar", "tiny-llada2"])
def test_a_graph_of_a_checkpoint_fits_its_wrapped_module(name: str) -> None:
    """Also without `config`: llada's module has an end token of transformers' making."""
    loaded = load_model(name, device="cpu")
    for config in (None, config_of(name)):
        ours = wrap(loaded.module, loaded.tokenizer, loaded.family.name, config, name)
        assert ours.fingerprint == loaded.fingerprint
        assert ours.eos_token_ids == loaded.eos_token_ids
    assert ours.default_block_length == loaded.default_block_length


def test_a_block_size_that_nothing_states_is_asked_for() -> None:
    loaded = load_model("tiny-sdar", device="cpu")
    ours = wrap(loaded.module, loaded.tokenizer, "sdar", name="tiny-sdar")
    assert "give --block-length" in refusal(lambda: ours.default_block_length)


def test_a_block_size_comes_from_the_name_given() -> None:
    model = parity_model("sdar-a")
    assert wrapped(model, "sdar-a", name="org/sdar-b16").default_block_length == 16
    assert wrapped(model, "sdar-a").default_block_length == 4  # its config's


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpoint", ["dream-a", "sdar-a"])
def test_eager_attention_decodes_with_drafts_to_its_own_tokens(checkpoint: str, dtype: str) -> None:
    model = own(checkpoint, dtype)
    model.module.set_attn_implementation("eager")  # type: ignore[operator]
    ours = wrapped(model, checkpoint)
    assert ours.arithmetic == f"{dtype}, eager"
    logits = parity_model(checkpoint).forward_logits(IDS)
    gap = (ours.forward_logits(IDS) - logits).std()
    assert gap < logits.std() * (1e-5 if dtype == "float32" else 0.05)
    cache = ours.family.caches[-1] if ours.family.block_causal else "dual"
    settings = DecodingSettings.parse(cache=cache, block_length=8, gen_length=16, stop_at_eos=False)
    plainly = decode(ours, random_prompt(ours, 11), settings)
    drafted = decode(ours, plainly.prompt, settings, Oracle(plainly, depth=3))
    assert states(drafted) == states(plainly)
    assert drafted.stats.accepted > 0


# ---------------------------------------------------------------- what it must compute


def _ignoring(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> Any:
    return _attended(module, query, key, value, None)


def _causal(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> Any:
    return _attended(module, query, key, value, _triangle(query, key))


def _causal_and_masked(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **_: Any
) -> Any:
    return _attended(module, query, key, value, _triangle(query, key) & mask)


def _forgetful(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **_: Any
) -> Any:
    """Leaves out what is frozen."""
    own = query.shape[2]
    return _attended(module, query, key[:, :, -own:], value[:, :, -own:], mask[..., -own:])


def _failing(*_: Any, **__: Any) -> Any:
    raise TypeError("no such kernel\nhere")


def _triangle(query: Tensor, key: Tensor) -> Tensor:
    return torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(
        key.shape[2] - query.shape[2]
    )


def _attended(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = nn.functional.scaled_dot_product_attention(query, key, value, mask)
    return out.transpose(1, 2), None


def _honest(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **_: Any
) -> Any:
    return _attended(module, query, key, value, mask)


@pytest.fixture
def attention() -> Iterator[Callable[[DiffusionLM, Any], None]]:
    """Let a model compute with an attention of the test's."""

    registered = set()

    def register(model: DiffusionLM, function: Any) -> None:
        registered.add(function.__name__)
        AttentionInterface.register(function.__name__, function)
        model.module.config._attn_implementation = function.__name__  # type: ignore[union-attr]

    yield register
    for name in registered:
        AttentionInterface._global_mapping.pop(name, None)


BROKEN = (_ignoring, _causal, _causal_and_masked, _forgetful)


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_attention_that_does_not_keep_to_the_mask_is_refused(
    checkpoint: str, broken: Any, attention: Callable[[DiffusionLM, Any], None]
) -> None:
    model = own(checkpoint)
    attention(model, broken)
    message = refusal(lambda: wrapped(model, checkpoint))
    assert f"its attention ({broken.__name__}) does not keep to the mask" in message
    assert "attn_implementation='sdpa' or 'eager'" in message


@pytest.mark.parametrize("name", ["tiny-llada", "tiny-dream", "tiny-sdar", "tiny-llada2"])
def test_trained_models_with_broken_attention_are_refused_too(
    name: str, attention: Callable[[DiffusionLM, Any], None]
) -> None:
    """Their states differ less between tokens than those of random weights."""
    model = load_model(name, device="cpu", dtype="bfloat16")
    for broken in BROKEN:
        attention(model, broken)
        with pytest.raises(SpiffyError, match="does not keep to the mask"):
            wrap(model.module, model.tokenizer, model.family.name)
    attention(model, _honest)
    assert wrap(model.module, model.tokenizer, model.family.name).arithmetic == "bfloat16, _honest"


def test_all_layers_of_a_forward_are_given_the_same_masks(
    attention: Callable[[DiffusionLM, Any], None],
) -> None:
    """Of a group that has one and of one that attends to everything: they are made once."""
    given: list[Tensor] = []

    def noting(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **_: Any
    ) -> Any:
        given.append(mask)
        return _attended(module, query, key, value, mask)

    model = own("sdar-a")
    attention(model, noting)
    ours = wrapped(model, "sdar-a")
    given.clear()
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    ids = random_prompt(ours, 7)
    ours.hidden_states(ids, torch.arange(7), [Group(1, 4, Mask.of(causal)), Group(1, 3)])
    masked, free = given[::2], given[1::2]
    assert len(masked) == len(free) == model.module.config.num_hidden_layers > 1  # type: ignore[union-attr]
    assert all(mask is masked[0] for mask in masked)
    assert all(mask is free[0] for mask in free)
    assert masked[0].tolist() == [[causal.tolist()]]
    assert free[0].tolist() == [[[[True] * 3] * 3]]


def test_a_forward_that_fails_is_one_line(attention: Callable[[DiffusionLM, Any], None]) -> None:
    model = own("sdar-a")
    attention(model, _failing)
    message = refusal(lambda: wrapped(model, "sdar-a"))
    assert "its forward fails with the mask that drafts need (attention: _failing)" in message
    assert message.endswith("(TypeError: no such kernel here)")


def test_flex_attention_is_refused_by_its_name() -> None:
    """SDAR's own config names it; trying it on a CPU would end the process."""
    model = own("sdar-a")
    model.module.config._attn_implementation = "flex_attention"
    message = refusal(lambda: wrapped(model, "sdar-a"))
    assert "flex attention does not take the mask that drafts need" in message
    assert "attn_implementation='sdpa' or 'eager'" in message


def test_broken_weights_are_not_taken_for_broken_attention() -> None:
    model = own("sdar-a")
    weight = model.module.get_parameter("model.layers.1.mlp.up_proj.weight")
    weight.data[3, 3] = torch.nan
    message = refusal(lambda: wrapped(model, "sdar-a"))
    assert message.endswith("NaN or infinity: model.layers.1.mlp.up_proj.weight holds them")


# ---------------------------------------------------------------- what is no model


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    message = refusal(lambda: wrap(parity_model("sdar-a").module, None, "sedar"))
    assert message.startswith("unknown family 'sedar': choose one of llada, dream, sdar")


def test_a_module_of_another_family_is_refused() -> None:
    message = refusal(lambda: wrap(parity_model("sdar-a").module, None, "llada"))
    assert message == "wrapped llada: llada is computed by llama, and this module is a qwen3"


@pytest.mark.parametrize("module", [nn.Linear(2, 2), None, "tiny-llada"])
def test_what_has_no_transformer_and_head_is_refused(module: Any) -> None:
    message = refusal(lambda: wrap(module, None, "llada"))
    assert f"a {type(module).__name__} cannot be wrapped: give a module with .model" in message


def test_a_module_without_a_mask_token_is_refused() -> None:
    message = refusal(lambda: wrap(parity_model("dream-a").module, None, "dream"))
    assert message.startswith("wrapped dream: neither its config nor its tokenizer has 'mask_token")
    assert message.endswith("config.json as config=")


def test_a_published_mask_token_beyond_the_vocabulary_is_refused() -> None:
    message = refusal(lambda: wrap(parity_model("llada2-a").module, None, "llada2"))
    assert "mask_token_id 156895 is not a token of 256" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_layers": 4}, "config= says num_hidden_layers 4, the module has 3"),
        ({"d_model": None}, "config.json: "),
        ({"model_type": "sdar"}, "config= is of model_type 'sdar', llada of llada"),
        ({"alibi": True}, "alibi = True is not supported"),
        ({"rope_theta": 20000.0}, "config= says RoPE {'rope_type': 'default', 'rope_theta': 20000"),
    ],
)
def test_a_config_of_another_model_is_refused(changes: dict[str, Any], words: str) -> None:
    config = config_of("llada-a") | changes
    module = parity_model("llada-a").module
    assert words in refusal(lambda: wrap(module, None, "llada", config))


def test_norms_that_the_module_does_without_are_refused() -> None:
    """transformers only warns that their weights are left over."""
    module = own("llada2-a").module
    module.config.use_qk_norm = False
    message = refusal(lambda: wrap(module, None, "llada2", config_of("llada2-a")))
    assert "config= says use_qk_norm True, the module has False" in message


def test_a_published_mask_token_is_of_those_who_published_it() -> None:
    """Qwen2's vocabulary is another than Qwen3's: its token of that number means nothing."""
    sizes: Any = {"vocab_size": 151936, "hidden_size": 8, "intermediate_size": 8}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    qwen3 = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=4)).eval()
    assert wrap(qwen3, None, "a2d-mdlm").mask_token_id == 151669
    qwen2 = Qwen2ForCausalLM(Qwen2Config(**sizes)).eval()
    message = refusal(lambda: wrap(qwen2, None, "a2d-mdlm"))
    assert "neither its config nor its tokenizer has 'mask_token_id'" in message
    assert wrap(qwen2, None, "a2d-mdlm", mask_token_id=151665).mask_token_id == 151665


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("sliding_window", 64, "use_sliding_window = True is not supported"),
        (
            "rope_parameters",
            {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 16,
            },
            "'longrope'",
        ),
    ],
)
def test_a_module_that_computes_what_drafts_cannot_is_refused(
    field: str, value: Any, words: str
) -> None:
    settings = Qwen3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        mask_token_id=31,
        use_sliding_window=field == "sliding_window",
        **{field: value},
    )
    assert words in refusal(lambda: wrap(Qwen3ForCausalLM(settings), None, "sdar"))


def test_a_config_with_quantization_is_taken_because_the_module_is_there() -> None:
    config = config_of("llada-a") | {"quantization_config": {"quant_method": "gptq"}}
    assert wrap(parity_model("llada-a").module, None, "llada", config).family.name == "llada"


def test_a_quantized_checkpoint_is_refused_with_the_way_that_works(tmp_path: Path) -> None:
    config = config_of("llada-a") | {"quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = refusal(lambda: load_model(str(tmp_path)))
    assert "the weights are quantized (awq), which is not supported" in message
    assert "load them with transformers and spiffy.runtime.wrap() the module" in message


# ---------------------------------------------------------------- other people's weights


class Packed(nn.Module):
    """A linear layer as GPTQ's are: no parameter, integers in buffers, no `weight`."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        scale = layer.weight.detach().abs().max() / 127
        self.register_buffer("qweight", (layer.weight.detach() / scale).round().to(torch.int32))
        self.register_buffer("scale", scale)

    def forward(self, hidden: Tensor) -> Tensor:
        weight = self.qweight.to(hidden.dtype) * self.scale  # type: ignore[operator]
        return nn.functional.linear(hidden, weight)


def test_layers_and_a_head_without_weights_decode_with_drafts() -> None:
    model = own("sdar-a", "float64")
    module: Any = model.module
    for block in module.model.layers:
        block.mlp.up_proj = Packed(block.mlp.up_proj)
    module.lm_head = Packed(module.lm_head)
    ours = wrapped(model, "sdar-a")
    assert (ours.vocab_size, ours.dtype, ours.device) == (320, torch.float64, torch.device("cpu"))
    assert not ours.head_is_expensive
    assert ours.head_of(torch.zeros(1, 1, 64), torch.tensor([[1]])) is None
    assert ours.arithmetic == f"float64, {__name__}.Packed"
    assert ours.broken_weights() is None
    settings = DecodingSettings.parse(cache="block", block_length=8, gen_length=16)
    plainly = decode(ours, random_prompt(ours, 11), settings)
    graph = [[(0, 0)], [(0, 0), (1, 0)], [(0, 1)]]
    drafted = decode(ours, plainly.prompt, settings, GraphDrafter(graph, ours))
    assert states(drafted) == states(plainly)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_module_spread_by_a_device_map_wraps(place: str) -> None:
    device_map = {"model": "cpu", "lm_head": place}
    loaded = load_model(str(PARITY / "sdar-a"), dtype="float32", device_map=device_map)
    ours = wrapped(loaded, "sdar-a")
    assert (ours.device, ours.dtype) == (torch.device("cpu"), torch.float32)
    assert ours.broken_weights() is None  # of those that are there
    gap = ours.forward_logits(IDS) - parity_model("sdar-a").forward_logits(IDS)
    assert gap.abs().max() < 1e-3
    settings = DecodingSettings.parse(cache="block", block_length=8, gen_length=16)
    plainly = decode(ours, random_prompt(ours, 11), settings)
    assert states(decode(ours, plainly.prompt, settings, Oracle(plainly, 3))) == states(plainly)


def test_a_plain_parameter_is_its_own_storage() -> None:
    weight = nn.Parameter(torch.ones(2))
    assert [*stored_tensors(weight)] == [weight]


def test_a_graph_of_another_mask_token_does_not_fit() -> None:
    model = parity_model("sdar-a")
    other = wrap(model.module, None, "sdar", config_of("sdar-a") | {"mask_token_id": 7})
    assert other.fingerprint != wrapped(model, "sdar-a").fingerprint
    assert other.mask_token_id == 7
