"""Hostile checkpoints, bad text, broken numbers, little memory: one line, or the same tokens."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PARITY, Call, Oracle, decode, parity_model, random_prompt, refusal, states
from safetensors.torch import load_file, save_file
from test_cli import PROMPT, TINY
from tokenizers import AddedToken
from transformers import PreTrainedModel

from spiffy.calib.audit import audit
from spiffy.calib.prompts import load_prompts
from spiffy.calib.provenance import portable
from spiffy.runtime import ALIASES, load_model
from spiffy.runtime.decode import driver, make_task, run
from spiffy.runtime.forward.pack import forward
from spiffy.runtime.models.base import DiffusionLM
from spiffy.schemas import DecodingSettings, DraftGraph, SpiffyError
from spiffy.schemas.errors import is_out_of_memory


def copy_of(source: str, folder: Path) -> Path:
    place = Path(ALIASES[source]) if source in ALIASES else PARITY / source
    shutil.copytree(place, folder, dirs_exist_ok=True)
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tokenizer_in_two_files(folder: Path) -> None:
    """Dream's own layout: Qwen2's two files instead of one."""
    spec = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(spec["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec.get("merges", [])]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))


# ---------------------------------------------------------------- checkpoints


def test_code_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    folder, marker = copy_of("tiny-dream", tmp_path / "model"), tmp_path / "marker"
    code = f"open({str(marker)!r}, 'w').write('run')\nclass X: pass\n"
    modules = ("modeling_x", "configuration_x", "tokenization_x", "generation_utils", "__init__")
    for name in modules:
        (folder / f"{name}.py").write_text(code)
    config = {"AutoConfig": "configuration_x.X", "AutoModel": "modeling_x.X"}
    edit(folder / "config.json", auto_map=config | {"AutoModelForCausalLM": "modeling_x.X"})
    asked = {"AutoTokenizer": ["tokenization_x.X", None]}
    edit(folder / "tokenizer_config.json", auto_map=asked, tokenizer_class="X")
    model = load_model(str(folder), device="cpu")
    assert model.fingerprint == load_model("tiny-dream", device="cpu").fingerprint
    assert len(model.encode("How many?"))
    tokenizer_in_two_files(folder)
    load_model(str(folder), device="cpu")
    load_model(str(folder), device_map="cpu", dtype="float32")
    assert not marker.exists()


def test_a_tokenizer_whose_settings_break_it_in_use_is_refused(tmp_path: Path) -> None:
    folder = copy_of("tiny-dream", tmp_path / "model")
    tokenizer_in_two_files(folder)
    edit(folder / "tokenizer_config.json", model_max_length="512")
    message = refusal(lambda: load_model(str(folder), device="cpu"))
    assert f"{folder}: its tokenizer cannot encode text: " in message


@pytest.mark.parametrize("named", ["", "<|none of these|>x"])
def test_a_mask_token_that_is_no_token_is_not_another_one(tmp_path: Path, named: str) -> None:
    """The tokenizer gives the unknown token's id for it, which here ends answers."""
    folder = copy_of("tiny-dream", tmp_path / "model")
    tokenizer_in_two_files(folder)
    edit(folder / "tokenizer_config.json", mask_token=named)
    config = json.loads((folder / "config.json").read_text())
    del config["mask_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    message = refusal(lambda: load_model(str(folder), device="cpu"))
    assert "mask_token_id" in message or "larger than the embedding" in message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../model.safetensors", "/m.safetensors"])
def test_an_index_cannot_name_pickles_or_other_folders(tmp_path: Path, name: str) -> None:
    folder = copy_of("llada-a", tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"weight_map": {"a": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "not the name of a safetensors file" in refusal(lambda: load_model(str(folder)))


ABSURD: dict[str, Any] = {
    "d_model": -1,
    "n_layers": 10**12,
    "n_heads": 0,
    "n_kv_heads": 3,
    "mlp_hidden_size": "many",
    "vocab_size": 1.5,
    "embedding_size": 1 << 23,
    "max_sequence_length": None,
    "rms_norm_eps": "1e-6",
    "rope_theta": -1,
    "mask_token_id": True,
    "eos_token_id": {"a": 1},
    "weight_tying": [],
    "model_type": ["llada"],
}


@pytest.mark.parametrize("field", ABSURD)
def test_an_absurd_config_is_refused_in_one_line(tmp_path: Path, field: str) -> None:
    edit(copy_of("llada-a", tmp_path) / "config.json", **{field: ABSURD[field]})
    assert str(tmp_path) in refusal(lambda: load_model(str(tmp_path), device="cpu"))


def test_a_config_of_another_scale_is_refused_before_memory_is_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(copy_of("llada-a", tmp_path) / "config.json", n_layers=100)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    message = refusal(lambda: load_model(str(tmp_path), device="cpu"))
    assert re.search(r"config\.json describes \d{7} parameters, the weights hold \d{6}: ", message)


def test_mutated_configs_load_or_are_refused(tmp_path: Path) -> None:
    values = (None, -1, 0, 3, 10**12, 10**400, 1.5, 1e308, True, "", "a\nb", [], [1], {}, {"a": []})
    rng, outcomes = random.Random(0), []
    for source in ("llada-a", "dream-a", "sdar-a", "tiny-sdar"):
        folder = copy_of(source, tmp_path / source)
        names = [n for n in ("config.json", "tokenizer_config.json") if (folder / n).is_file()]
        for _ in range(25):
            path = folder / rng.choice(names)
            whole = path.read_text()
            edit(path, **{rng.choice(sorted(json.loads(whole))): rng.choice(values)})
            try:
                load_model(str(folder), device="cpu")
                outcomes.append("loaded")
            except SpiffyError as error:
                assert str(error).isprintable()  # noqa: PT017
                outcomes.append("refused")
            path.write_text(whole)
    assert min(outcomes.count("loaded"), outcomes.count("refused")) > 10


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "raw", [b"", b"{", b"\xff" * 64, b"[" * 100_000, b"\x80" + bytes(7) + b"{"]
)
def test_broken_files_of_a_checkpoint_are_refused_in_one_line(
    tmp_path: Path, file: str, raw: bytes
) -> None:
    (copy_of("tiny-llada", tmp_path) / file).write_bytes(raw)
    assert str(tmp_path) in refusal(lambda: load_model(str(tmp_path), device="cpu"))


def test_a_checkpoint_without_tokenizer_takes_ids_only(tmp_path: Path) -> None:
    (copy_of("tiny-llada", tmp_path) / "tokenizer.json").unlink()
    model = load_model(str(tmp_path), device="cpu")
    assert "ships no tokenizer" in refusal(lambda: model.encode("How many?"))


@pytest.mark.parametrize(
    "template", ["{{ 1/0 }}", "{% for", "nothing", "{{ messages.__class__() }}"]
)
def test_a_broken_chat_template_is_refused(tmp_path: Path, template: str) -> None:
    edit(copy_of("tiny-llada", tmp_path) / "tokenizer_config.json", chat_template=template)
    model = load_model(str(tmp_path), device="cpu")
    assert "its chat template" in refusal(lambda: model.encode("How many?"))


# ---------------------------------------------------------------- text

SPELLED = ["<|mdm_mask|>", "<|mask|>", "<|MASK|>", "<|im_end|>", "<|eot_id|>", "<|endoftext|>"]


@pytest.mark.parametrize("name", ["tiny-llada", "tiny-dream", "tiny-sdar"])
@pytest.mark.parametrize("template", [True, False])
def test_no_special_token_can_be_spelled_in_a_prompt(
    tmp_path: Path, name: str, template: bool
) -> None:
    """However the checkpoint declares it: LLaDA's mask is no `mask_token` of its tokenizer."""
    folder = copy_of(name, tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    spec = json.loads((folder / "tokenizer.json").read_text())
    for key in [k for k in settings if k.endswith("_token")]:
        del settings[key]  # so that the tokenizer knows no special token by role
    if not template:
        settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    model = load_model(str(folder), device="cpu")
    special = {token["content"]: token["id"] for token in spec["added_tokens"]}
    mask = next(text for text, token_id in special.items() if token_id == model.mask_token_id)
    honest = [k for k in model.encode("How many?").tolist() if k in special.values()]
    for text in (mask, f"a{mask}b", " ".join(special), *SPELLED):
        ids = model.encode(text).tolist()
        assert [k for k in ids if k in special.values()] == honest
        assert model.mask_token_id not in ids
        assert text in model.tokenizer.decode(ids)


def test_a_mask_token_that_is_not_declared_special_stays_text_too(tmp_path: Path) -> None:
    folder = copy_of("tiny-llada", tmp_path)
    spec = json.loads((folder / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token |= {"special": False, "normalized": True}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    model = load_model(str(folder), device="cpu")
    assert model.mask_token_id not in model.encode("a <|mdm_mask|> b").tolist()
    model.tokenizer.add_tokens([AddedToken("b c", special=False)])
    assert len(model.encode("a b c"))


def test_text_that_is_odd_but_text_is_encoded() -> None:
    model = load_model(TINY, device="cpu")
    for text in ("a\0b", "\u202e", "\ue000message\ue000", "{{ 1 }} {% x %}", "é\u0301" * 9):
        assert text in model.tokenizer.decode(model.encode(text), skip_special_tokens=False)


def test_a_prompt_beyond_the_models_limit_says_the_limit(call: Call) -> None:
    limit = load_model(TINY, device="cpu").max_length
    code, _, log = call("decode", "--model", TINY, "--prompt", "word " * 20_000)
    assert code == 2
    assert f"exceeds the {limit} positions" in log
    assert len(log.strip().splitlines()) == 1


BROKEN = [
    b'{"prompt": "half',
    b'{"prompt": "\xff"}',
    b"[]",
    b'{"prompt": "\\ud800"}',
    b"[" * 99_999,
]


@pytest.mark.parametrize("line", BROKEN)
def test_a_broken_line_is_named_or_skipped(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "one"}\n' + line + b'\n\n{"question": "two"}\n')
    assert f"{path}, line 2: " in refusal(lambda: load_prompts(str(path)))
    found = load_prompts(str(path), skip_bad=True)
    assert (found.texts, found.skipped) == (("one", "two"), 1)
    path.write_bytes(line)
    assert "holds no prompts: line 1: " in refusal(lambda: load_prompts(str(path), skip_bad=True))


def test_skip_bad_counts_what_it_skips(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\n".join([b'{"prompt": "How many?"}', *BROKEN]))
    arguments = ("decode", "--model", TINY, "--prompts", path, "--gen-length", 32, "--json")
    code, _, log = call(*arguments)
    assert code == 2
    assert "line 2" in log
    code, printed, log = call(*arguments, "--skip-bad")
    assert code == 0
    assert len(printed.splitlines()) == 1
    assert "5 broken lines" in log
    assert call("decode", "--model", TINY, "--prompt", "x", "--skip-bad")[0] == 2


# ---------------------------------------------------------------- numbers that are none


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_weights_stop_decoding_and_are_named(
    call: Call,
    tmp_path: Path,
    bad: float,
) -> None:
    folder = copy_of("tiny-llada", tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("blocks.1.q_proj.weight"))
    weights[name][3, 5] = bad
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    code, printed, log = call("decode", "--model", folder, "--prompt", "x", "--gen-length", 32)
    assert (code, printed) == (2, "")
    assert "computed NaN at block 0, step 0" in log
    assert "layers.1.self_attn.q_proj.weight" in log
    assert len(log.strip().splitlines()) == 1


@pytest.mark.parametrize(("name", "cache"), [("llada-a", "none"), ("sdar-a", "block")])
def test_a_forward_that_overflows_says_when_and_blames_the_dtype(
    monkeypatch: pytest.MonkeyPatch, name: str, cache: Any
) -> None:
    model = parity_model(name)
    options: dict[str, Any] = {"block_length": 8, "gen_length": 16, "stop_at_eos": False}
    settings = DecodingSettings.parse(cache=cache, **options)
    prompt, head, calls = random_prompt(model, 8), model.head, 0

    def overflowing(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        logits = head(hidden).clone()
        if calls == 11:
            logits[0, 17] = torch.inf
        return logits

    monkeypatch.setattr(model, "head", overflowing)
    message = refusal(lambda: decode(model, prompt, settings))
    assert "computed NaN at block 1, step 10" in message
    assert "overflows in float32" in message


# ---------------------------------------------------------------- memory


class Memory:
    """A forward that fails beyond a number of positions, as an allocator would."""

    def __init__(self, most: int, error: RuntimeError) -> None:
        self.most, self.error, self.failed = most, error, 0

    def __call__(self, model: Any, rows: Any, *rest: Any) -> Any:
        if sum(len(row.ids) for row in rows) > self.most:
            self.failed += 1
            raise self.error
        return forward(model, rows, *rest)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
]
SMALL = {
    "llada-none": ("llada-a", "none", 27 * 4),
    "dream-dual": ("dream-a", "dual", 8 * 4),
    "sdar-block": ("sdar-a", "block", 8 * 4),
}


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu", "cublas", "triton"])
def test_what_allocators_raise_is_known(error: RuntimeError) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", SMALL)
def test_drafts_that_do_not_fit_are_halved_and_no_token_changes(
    monkeypatch: pytest.MonkeyPatch, layout: str, batch: int
) -> None:
    checkpoint, cache, most = SMALL[layout]
    model = parity_model(checkpoint, "float64")
    settings: Any = {"cache": cache, "block_length": 8, "gen_length": 16, "stop_at_eos": False}
    settings = DecodingSettings.parse(**settings)
    prompts = [random_prompt(model, 11, seed) for seed in range(batch + 1)]
    plainly = [decode(model, prompt, settings) for prompt in prompts]
    tasks = [make_task(model, p.prompt, settings, Oracle(p, 8)) for p in plainly]
    memory = Memory(max(most, 27) * batch, ERRORS[0])
    monkeypatch.setattr(driver, "forward", memory)
    for _ in run(model, tasks, batch):
        pass
    assert [states(task) for task in tasks] == [states(task) for task in plainly]
    halvings = sum(task.stats.halvings for task in tasks)
    assert 0 < memory.failed <= halvings < 12  # remembered: not tried again at every forward
    assert sum(task.stats.accepted for task in tasks) > 0  # it still drafts
    for ours, theirs in zip(tasks, plainly, strict=True):
        assert ours.stats.nfe + ours.stats.accepted == theirs.stats.nfe


@pytest.mark.parametrize("batch", [1, 2])
def test_that_fewer_drafts_fit_is_said_once_and_remembered(
    call: Call,
    calibrated: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
) -> None:
    prompts, model = [PROMPT, PROMPT.replace("3", "5")], load_model(TINY, device="cpu")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    files = ("--graph", calibrated, "--prompts", tmp_path / "p.jsonl")
    command = ("decode", *files, "--batch-size", batch)
    answers = call(*command, "--no-speculation")[1]
    longest = 32 + max(len(model.encode(prompt)) for prompt in prompts)
    memory = Memory(3 * longest * batch, ERRORS[0])
    monkeypatch.setattr(driver, "forward", memory)
    code, printed, log = call(*command, "--budget", 4)
    assert (code, printed) == (0, answers)
    assert log.count("out of memory: going on with at most 2 drafts per forward") == 1
    assert log.count("out of memory") == memory.failed == 1


@pytest.mark.parametrize("batch", [1, 2])
def test_that_drafts_overflow_is_said_once(
    call: Call, calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    prompts = [PROMPT, PROMPT.replace("3", "5")]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    files = ("--graph", calibrated, "--prompts", tmp_path / "p.jsonl")
    command = ("decode", *files, "--cache", "dual", "--batch-size", batch)
    answers = call(*command, "--no-speculation")[1]
    hidden_states = DiffusionLM.hidden_states

    def overflowing(model: DiffusionLM, *given: Any) -> torch.Tensor:
        hidden, groups = hidden_states(model, *given), given[-1]
        packed = [group.mask is not None for group in groups for _ in range(group.positions)]
        return hidden.masked_fill(torch.tensor(packed)[:, None], torch.nan)

    monkeypatch.setattr(DiffusionLM, "hidden_states", overflowing)
    code, printed, log = call(*command, "--budget", 4)
    assert (code, printed) == (0, answers)
    assert log.count("a draft overflowed in float32") == 1


def test_plain_decoding_that_does_not_fit_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
    call: Call,
) -> None:
    for error in ERRORS:
        monkeypatch.setattr(driver, "forward", Memory(10, error))
        code, _, log = call("decode", "--model", TINY, "--prompt", "x", "--gen-length", 32)
        assert code == 2
        assert log.startswith("error: out of memory")
        assert len(log.strip().splitlines()) == 1


def test_another_error_of_a_forward_is_not_taken_for_want_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = parity_model("llada-a")
    settings = DecodingSettings.parse(block_length=8, gen_length=16)
    monkeypatch.setattr(driver, "forward", Memory(10, RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        decode(model, random_prompt(model, 8), settings)


# ---------------------------------------------------------------- provenance


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from spiffy.cli import calibrate

    path = tmp_path_factory.mktemp("artifact") / "graph.json"
    command = ["spiffy-calibrate", "--model", TINY, "--budget", "4", "--samples", "5"]
    command += ["--gen-length", "32", "--edges", "complete,fold", "--seed", "7", "--out", str(path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", command)
        with pytest.raises(SystemExit):
            calibrate.main()
    return path


def test_an_artifact_says_what_made_it(calibrated: Path) -> None:
    graph = DraftGraph.load(calibrated)
    made = graph.provenance
    assert made is not None
    assert set(made.versions) == {"spiffy-dllm", "torch", "transformers", "python"}
    assert made.versions["torch"] == torch.__version__
    assert made.command[:3] == ("spiffy-calibrate", "--model", TINY)
    assert str(calibrated.parent) not in calibrated.read_text()
    assert graph.calibration.edges == ("complete", "fold")
    assert (graph.calibration.prompts, graph.calibration.seed) == (5, 7)
    # Outside the digest: another command line, the same graph.
    assert graph.model_copy(update={"provenance": None}).digest() == graph.digest()


def test_command_lines_are_recorded_without_folders(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").touch()
    data = str(tmp_path / "p.jsonl")
    command = ["x", "--dataset", data, "--out", "/a/b.json", f"--model={tmp_path}", "--out=c"]
    assert portable(command) == ["x", "--dataset", "p.jsonl", f"--model={tmp_path.name}"]
    assert portable(["x", "a\nb", "\0", "y" * 5000]) == ["x", r"a\nb", r"\x00", "y" * 1000]


def test_strict_validation_says_what_it_checked_and_what_not(
    call: Call,
    calibrated: Path,
) -> None:
    code, printed, _ = call("graph", "validate", "--strict", "--model", TINY, calibrated)
    assert code == 0
    assert "checked: digest, closure of the graph, counts, expected steps, data, finger" in printed
    assert "not checked: values" in printed
    code, printed, _ = call("graph", "validate", "--strict", calibrated)
    assert code == 0
    assert "not checked: fingerprint: give --model" in printed
    code, _, log = call("graph", "validate", "--strict", "--model", "tiny-dream", calibrated)
    assert code == 2
    assert "family llada, this model has dream" in log
    assert call("graph", "validate", "--model", TINY, calibrated)[0] == 2


def test_strict_validation_reads_no_weights(call: Call, calibrated: Path, tmp_path: Path) -> None:
    folder = tmp_path / "without"
    shutil.copytree(ALIASES[TINY], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    code, printed, log = call("graph", "validate", "--strict", "--model", folder, calibrated)
    assert code == 0, log
    assert "finger" in printed.partition("not checked")[0]


FORGED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "count beyond roots": (
        lambda c: c["nodes"][0].update(count=10**6),
        "node 1: count 1000000",
    ),
    "counts beyond roots": (
        lambda c: [node.update(count=c["calibration"]["roots"]) for node in c["nodes"]],
        "counts add up to",
    ),
    "steps beyond drafts": (
        lambda c: c.update(expected_steps=[1.0, 3.0, 3.0, 3.0, 3.0]),
        "3.0 steps of a forward with 1 drafts",
    ),
    "measured steps beyond drafts": (
        lambda c: c["measured_steps"]["graph"][0].update(steps=4000.0),
        "measured_steps.graph: 4000.0 steps of a forward with",
    ),
    "roots": (lambda c: c["calibration"].update(roots=10**6), "calibration.roots"),
    "data": (lambda c: c["calibration"].update(seed=8), "drawn with seed 8 have digest"),
}


@pytest.mark.parametrize("kind", FORGED)
def test_strict_validation_finds_what_contradicts_itself(
    calibrated: Path, tmp_path: Path, kind: str
) -> None:
    forge, words = FORGED[kind]
    content = json.loads(calibrated.read_text())
    del content["digest"]
    forge(content)
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(content))
    found = audit(DraftGraph.load(path), None)  # every reader takes it
    assert any(words in problem for problem in found.wrong), found.wrong
    assert any(line.startswith("digest: the file states none") for line in found.unchecked)


def test_data_of_a_file_is_compared_with_the_file(calibrated: Path, tmp_path: Path) -> None:
    data = tmp_path / "p.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"question {k}"}) + "\n" for k in range(9)))
    graph = DraftGraph.load(calibrated)
    record = graph.calibration.model_copy(
        update={"dataset": "p.jsonl", "dataset_sha256": load_prompts(str(data), 5, 7).sha256}
    )
    graph = graph.model_copy(update={"calibration": record})
    assert any(line.startswith("data: give --dataset") for line in audit(graph, None).unchecked)
    assert not audit(graph, None, str(data)).wrong
    record = record.model_copy(update={"dataset_sha256": load_prompts(str(data)).sha256})
    shuffled = record.model_copy(update={"prompt_digests": load_prompts(str(data), 5, 7).digests})
    assert audit(graph.model_copy(update={"calibration": record}), None, str(data)).wrong
    assert not audit(graph.model_copy(update={"calibration": shuffled}), None, str(data)).wrong
    named = tmp_path / "named.jsonl"
    named.write_text(data.read_text().replace('"prompt"', '"text": "no", "goal"'))
    problems = audit(graph, None, str(named)).wrong
    assert any("another --field?" in line for line in problems)
    assert not audit(graph, None, str(named), field="goal").wrong
    data.write_text(data.read_text().replace("question", "another"))
    assert any(line.startswith("data: ") for line in audit(graph, None, str(data)).wrong)
