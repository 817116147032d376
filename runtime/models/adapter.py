"""LoRA adapters: read strictly, then merged into the weights by peft.

Nothing of an adapter may be passed over in silence: every tensor of its file has to find its layer,
every layer that it says it adapts has to have its tensors, and what its config selects beside that
has to be computed here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from spiffy.runtime.models.family import Family
from spiffy.runtime.models.source import Source, read_json
from spiffy.schemas import SpiffyError
from spiffy.schemas.errors import option, said

_PREFIX = "base_model.model."
_LORA = re.compile(
    r"(?P<layer>.+)\.(?P<part>lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector(\.weight)?)"
)
_NAME = "default"  # peft's, of an adapter
_KEPT = ".base_layer"  # where peft stores an adapted embedding beside its adapter
# Entries of adapter_config.json that are read; that have one value here; and without effect on what
# is computed: training, initial values, where it came from. Others must be false, 0, empty or null.
_READ = frozenset(
    {"alpha_pattern", "lora_alpha", "modules_to_save", "r", "rank_pattern", "target_modules"}
    | {"use_dora", "use_rslora", "exclude_modules", "layers_pattern", "layers_to_transform"}
)
_ONLY: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Others, such as pissa, change the weights that the adapter is added to.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
_IDLE = frozenset(
    {"auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "lora_dropout"}
    | {"megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config"}
    | {"task_type"}
)
_NEUTRAL: tuple[object, ...] = (None, False, 0, "", [], {})


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as it is stored.

    Attributes
    ----------
    place
        Folder or hub id.
    config
        Content of `adapter_config.json`.
    weights
        Content of `adapter_model.safetensors`, names without peft's prefix.
    """

    place: str
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]


def read_adapter(name: str) -> Adapter:
    """Read an adapter from a folder or the hub.

    Raises
    ------
    SpiffyError
        If peft is not installed, the adapter cannot be read, or it is of a kind that is not
        computed.
    """
    if find_spec("peft") is None:
        raise SpiffyError(f"{option('adapter')} needs peft: pip install 'spiffy-dllm[adapters]'")
    source = Source.of_adapter(name)
    config = read_json(source.file("adapter_config.json"))
    _check_config(name, config)
    path = source.optional_file("adapter_model.safetensors")
    if path is None:
        raise SpiffyError(
            f"{name} has no adapter_model.safetensors; pickled adapters are refused because "
            "loading them can run code: convert them to safetensors first"
        )
    try:
        stored = load_file(path)
    except Exception as error:  # safetensors raises many kinds
        raise SpiffyError(f"{path}: cannot be read: {said(error)}") from None
    for key in stored:
        if not key.startswith(_PREFIX):
            raise SpiffyError(
                f"{name}: {key} is no tensor of peft's: it starts with no {_PREFIX!r}"
            )
    return Adapter(name, config, {key.removeprefix(_PREFIX): stored[key] for key in sorted(stored)})


def _check_config(name: str, config: Mapping[str, Any]) -> None:
    for entry, value in config.items():
        known = entry in _READ | _IDLE or value in _ONLY.get(entry, _NEUTRAL)
        if not known:
            wanted = " or ".join(map(repr, _ONLY.get(entry, ()))) or "null"
            raise SpiffyError(
                f"{name}: adapter_config.json: {entry} = {repr(value)[:80]} is not supported, only "
                f"{wanted} is: load the model with peft and spiffy.runtime.wrap() it"
            )
    for entry in ("r", "lora_alpha"):
        value = config.get(entry, 8)
        if type(value) not in (int, float) or not 0 < value < 1 << 20:
            raise SpiffyError(f"{name}: adapter_config.json: {entry} {value!r} is no rank or scale")
    for entry in ("rank_pattern", "alpha_pattern"):
        _check_pattern(name, entry, config.get(entry) or {})


def _check_pattern(name: str, entry: str, pattern: object) -> None:
    try:
        if not isinstance(pattern, dict):
            raise ValueError("it must be an object")
        for key, value in pattern.items():
            re.compile(key)
            if type(value) not in (int, float) or value <= 0:
                raise ValueError(f"{value!r} is no rank or scale")
    except (ValueError, re.error) as error:
        raise SpiffyError(f"{name}: adapter_config.json: {entry}: {error}") from None


def merge(
    adapter: Adapter, module: Any, name: str, family: Family, config: Mapping[str, Any]
) -> Any:
    """The module with the adapter merged into its weights, which computes as fast as without.

    Parameters
    ----------
    module
        The family's transformers module, loaded.
    name, config
        The model's name, and the content of its `config.json`.

    Raises
    ------
    SpiffyError
        If the adapter does not fit the model, or changes nothing.
    """
    from peft import LoraConfig, LoraModel

    layers = _Layers(adapter, module, name, family, config)
    settings = LoraConfig(
        r=adapter.config.get("r", 8),
        lora_alpha=adapter.config.get("lora_alpha", 8),
        target_modules=sorted(layers.ranks),
        rank_pattern={re.escape(layer): rank for layer, rank in layers.ranks.items()},
        alpha_pattern={re.escape(layer): alpha for layer, alpha in layers.alphas.items()},
        modules_to_save=sorted(layers.whole) or None,
        use_dora=bool(adapter.config.get("use_dora")),
        use_rslora=bool(adapter.config.get("use_rslora")),
        init_lora_weights=False,
        inference_mode=True,
    )
    before = _probe(module)
    adapted = LoraModel(module, settings, _NAME)
    # The names are this module's: peft's own loading would rename those of mixtures, for which it
    # needs a newer transformers than we do.
    state = {layers.name_in_peft(key): tensor for key, tensor in layers.weights.items()}
    found = adapted.model.load_state_dict(state, strict=False)
    astray = [*found.unexpected_keys, *(k for k in found.missing_keys if f".{_NAME}" in k)]
    if astray:
        raise SpiffyError(f"{adapter.place}: {astray[0]} was not applied ({len(astray)} in all)")
    merged = adapted.merge_and_unload(safe_merge=True)
    if torch.equal(before, _probe(merged)):
        raise SpiffyError(
            f"{adapter.place}: the adapter changes nothing that {name} computes: was it trained?"
        )
    return merged


@torch.inference_mode()
def _probe(module: Any) -> Tensor:
    """Hidden states of a few tokens."""
    rows = module.get_input_embeddings().weight.shape[0]
    ids = torch.arange(8, device=module.lm_head.weight.device)[None] * 7919 % rows
    hidden: Tensor = module(input_ids=ids, use_cache=False).logits
    return hidden


class _Layers:
    """What an adapter's tensors are of, by the names of the module that they are merged into.

    Attributes
    ----------
    weights
        Tensors by the module's names.
    ranks, alphas
        Of each adapted layer.
    whole
        Layers whose own weights the adapter replaces (`modules_to_save`).
    """

    def __init__(
        self, adapter: Adapter, module: Any, name: str, family: Family, config: Mapping[str, Any]
    ) -> None:
        self.adapter = adapter
        self.name = name
        self.modules: dict[str, nn.Module] = dict(module.named_modules())
        self.weights: dict[str, Tensor] = {}
        self.ranks: dict[str, int] = {}
        self.alphas: dict[str, float] = {}
        self.whole: set[str] = set()
        together = {key.removesuffix(".weight") for key in family.split(config)}
        listed = adapter.config.get("target_modules")
        names = listed if isinstance(listed, list) else []
        used: set[str] = set()
        trained: set[str] = set()  # whole layers, by both of their names
        for key, tensor in adapter.weights.items():
            match = _LORA.fullmatch(key)
            layer, _, part = (match["layer"], "", match["part"]) if match else key.rpartition(".")
            if layer in together:
                raise SpiffyError(
                    f"{adapter.place}: {layer} is adapted as one, and its weights are several "
                    f"here ({', '.join(family.split(config)[f'{layer}.weight'])}): merge the "
                    "adapter in the code that it was trained with"
                )
            mine = _renamed(f"{layer}.", family.key_mapping).removesuffix(".")
            if mine.endswith(_KEPT):
                self._check_kept(key, mine.removesuffix(_KEPT), tensor)
                continue
            used.update(word for word in names if layer == word or layer.endswith(f".{word}"))
            self._check(key, mine, part, tensor)
            self.weights[f"{mine}.{part}"] = tensor
            if match is None:
                self.whole.add(mine)
                trained.update((layer, mine))
            elif part in ("lora_A.weight", "lora_embedding_A"):
                self.ranks[mine] = len(tensor)
                self.alphas[mine] = _of_pattern(adapter.config, "alpha", layer)
                if (stated := _of_pattern(adapter.config, "rank", layer)) != len(tensor):
                    self._refuse(key, f"has rank {len(tensor)}, adapter_config.json says {stated}")
        for word in adapter.config.get("modules_to_save") or ():
            if not any(f".{word}." in f".{layer}." for layer in trained):
                raise SpiffyError(
                    f"{adapter.place}: adapter_config.json names {word!r} in modules_to_save, of "
                    "which adapter_model.safetensors has no weights"
                )
        self._check_whole(module, {*names}, used)

    def name_in_peft(self, key: str) -> str:
        """Where peft holds a tensor of ours."""
        match = _LORA.fullmatch(key)
        if match is None:
            layer, _, part = key.rpartition(".")
            return f"{layer}.modules_to_save.{_NAME}.{part}"
        kind, _, rest = match["part"].partition(".")
        rest = "weight" if kind == "lora_magnitude_vector" else rest
        return ".".join(filter(None, (match["layer"], kind, _NAME, rest)))

    def _refuse(self, key: str, problem: str) -> None:
        raise SpiffyError(
            f"{self.adapter.place}: {key} {problem}: is it an adapter of {self.name}?"
        )

    def _check_kept(self, key: str, layer: str, tensor: Tensor) -> None:
        """Refuse an embedding that was stored because it is adapted, unless it is the model's."""
        own: Any = getattr(self.modules.get(layer), "weight", None)
        if (
            own is None
            or own.shape != tensor.shape
            or not torch.equal(own.cpu(), tensor.to(own.dtype))
        ):
            self._refuse(key, f"is not the {layer} of the model")

    def _check(self, key: str, layer: str, part: str, tensor: Tensor) -> None:
        """Refuse a tensor that no layer takes."""
        module = self.modules.get(layer)
        own: Any = getattr(module, "weight", None)
        if own is None:
            self._refuse(key, f"adapts {layer}, and there is no such layer")
        outputs, inputs = (*own.shape, 1)[:2]
        count, *rest = (*tensor.shape, 0)
        fits = {
            "lora_A.weight": [*rest[:1]] == [inputs],
            "lora_B.weight": count == outputs,
            "lora_embedding_A": [*rest[:1]] == [outputs],
            "lora_embedding_B": count == inputs,
            "weight": tensor.shape == own.shape,
        }
        is_table = isinstance(module, nn.Embedding)
        wrong_kind = (
            part.startswith("lora_embedding") != is_table if part.startswith("lora_") else False
        )
        if wrong_kind or not fits.get(part, part.startswith("lora_magnitude_vector")):
            self._refuse(key, f"of shape {[*tensor.shape]} does not fit {layer}, {[*own.shape]}")

    def _check_whole(self, module: Any, named: set[str], used: set[str]) -> None:
        """Refuse an adapter of which tensors are missing, or that unties what is tied."""
        place = self.adapter.place
        if not self.weights:
            raise SpiffyError(f"{place}: adapter_model.safetensors holds nothing")
        if named - used:
            raise SpiffyError(
                f"{place}: adapter_config.json names target module {min(named - used)!r}, of which "
                "adapter_model.safetensors has no weights"
            )
        for layer in self.ranks:
            table = isinstance(self.modules[layer], nn.Embedding)
            other = "lora_embedding_B" if table else "lora_B.weight"
            if f"{layer}.{other}" not in self.weights:
                raise SpiffyError(f"{place}: {layer}.{other} is missing")
        chosen = ("exclude_modules", "layers_pattern", "layers_to_transform")
        if named and not any(self.adapter.config.get(entry) for entry in chosen):
            kinds = {_kind(layer) for layer in self.ranks}
            for layer in sorted(self.modules):
                if _kind(layer) in kinds and layer not in self.ranks:
                    raise SpiffyError(f"{place}: the weights of {layer} are missing")
        ends = {"lm_head", "model.embed_tokens"} & (self.ranks.keys() | self.whole)
        if ends and module.lm_head.weight is module.get_input_embeddings().weight:
            raise SpiffyError(
                f"{place}: it adapts {min(ends)}, and in {self.name} head and embedding are one: "
                "merge it in the code that it was trained with"
            )


def _renamed(name: str, key_mapping: Mapping[str, str]) -> str:
    """A checkpoint's name as the module has it; the module's own names stay as they are."""
    for pattern, replacement in key_mapping.items():
        name = re.sub(pattern, replacement, name)
    return name


def _kind(layer: str) -> str:
    """A layer's name without its numbers."""
    return re.sub(r"\.\d+\.", ".*.", layer)


def _of_pattern(config: Mapping[str, Any], what: str, layer: str) -> Any:
    """A layer's rank or alpha: of the first pattern that fits its name, as in peft."""
    patterns: Mapping[str, Any] = config.get(f"{what}_pattern") or {}
    found = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer))
    default = config.get("r", 8) if what == "rank" else config.get("lora_alpha", 8)
    return next(found, default)
