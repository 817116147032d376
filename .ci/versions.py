"""Try a fast part of the suite with other versions of the dependencies than the pinned ones.

    python .ci/versions.py oldest newest         # beside the installed torch: CI does this
    python .ci/versions.py --with-torch oldest   # torch too, which may be gigabytes

`oldest` are the lower bounds in pyproject.toml, each of them; `newest` is what pip finds. Prints
the versions tried and the seconds that installing and testing took; leaves nothing installed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXTRAS = ("fast", "report", "large", "adapters", "quantize", "serve")
# Come with torch, and would bring another one along.
WITH_TORCH = ("torch", "accelerate", "peft")

# What a dependency could break: the official outputs, loading, losslessness, the commands.
LOSSLESS = "tests/test_losslessness.py::test_"
LOAD = "tests/test_load.py::test_"
LIMITS = "tests/test_serve_limits.py::test_"
CLI = "tests/test_cli.py::test_"
DOOR = "tests/test_transformers_door.py::test_"
HUB = "tests/test_hub.py::test_"
SERVE = "tests/test_serve.py::test_"
# One official loop of every checkpoint, and of every cache. What a dependency can change there are
# the logits, and these are compared in all recorded forwards.
LOOPS = (
    "llada-a-full_L8_2tok",
    "llada-a-prefix_L8_2tok",
    "llada-a-dual_L8_2tok",
    "dream-a-maskgit_plus_half",
    "dream-a-block_dual_L8_thr",
    "sdar-a-static_L8_1tok",
    "llada2-a-thr_L8_s8",
    "illada-a-orig_L8_2tok",
    "illadalike-a-full_L8_thr",
    "sdc-a-L8_1tok",
    "a2d-mdlm-a-L8_1tok",
    "a2d-bd3lm-a-L4_2tok",
    "llada21-a-joint_L8",
    "fastdllm2-a-L32_s8_thr",
)
# What loading has to do with huggingface_hub, safetensors, tokenizers, transformers, accelerate.
LOADING = (
    "a_hub_id_without_network_is_refused",
    "a_cached_config_without_weights_is_refused",
    "a_cached_model_loads_without_network",
    "all_files_are_of_the_commit_that_the_hub_names",
    "a_missing_parameter_is_named",
    "an_unexpected_parameter_is_named",
    "a_parameter_of_another_shape_is_refused",
    "a_truncated_weight_file_is_refused",
    "a_sharded_checkpoint_equals_the_single_file",
    "a_broken_index_of_shards_is_refused",
    "a_loaded_model_does_not_depend_on_its_file",
    "bfloat16_gives_float32_logits_near_those_of_float32",
    "a_tied_checkpoint_uses_its_embeddings_as_output_head",
    "eos_tokens_are_those_of_both_configs",
    "without_a_mask_token_in_the_config_it_is_the_tokenizers",
    "a_device_map_places_layers_and_changes_no_logits",
    "a_device_map_that_names_no_device_is_refused",
    "special_tokens_spelled_in_a_prompt_stay_text",
)
FAST = (
    "tests/test_warnings.py",
    *(f"{LOAD}{name}" for name in LOADING),
    "tests/test_compiled_drafts.py",
    "tests/test_parity.py::test_logits_equal_the_official_models",
    *(f"tests/test_parity.py::test_trajectory_equals_the_official_loop[{loop}]" for loop in LOOPS),
    *(
        f"{LOSSLESS}any_drafts_leave_every_state_as_it_was[{case}]"
        for case in ("llada-dual-threshold", "dream-none-uneven", "sdar-block-entropy-bounded")
    ),
    *(
        f"{LOSSLESS}batched_decoding_equals_one_by_one[{case}]"
        for case in ("llada-dual-0.0", "dream-none-1.0", "sdar-block-1.0")
    ),
    f"{CLI}verify_compares_with_plain_decoding",
    f"{CLI}json_has_one_object_per_prompt",
    f"{CLI}graph_commands_describe_an_artifact",
    f"{CLI}help_and_version",
    "tests/test_wrap.py::test_what_transformers_loads_is_what_our_loader_gives",
    *(
        f"tests/test_wrap.py::test_attention_that_does_not_keep_to_the_mask_is_refused[{case}]"
        for case in (
            "llada-a-_causal",
            "dream-a-_ignoring",
            "sdar-a-_causal",
            "llada2-a-_forgetful",
        )
    ),
    "tests/test_adapters.py::test_drafts_leave_an_adapted_models_tokens_as_they_are",
    "tests/test_quantize.py::test_drafts_leave_a_quantized_models_tokens_as_they_are",
    *(
        f"tests/test_prepack.py::test_drafts_leave_its_tokens_as_they_are[{case}-float32]"
        for case in ("llada-a-none", "dream-a-dual", "sdar-a-block")
    ),
    f"{CLI}bad_decode_input_is_one_line[budget -1]",
    f"{DOOR}rows_of_a_padded_batch_are_what_generate_gives",
    f"{DOOR}a_streamer_gets_the_prompt_and_then_block_by_block",
    f"{DOOR}stopping_criteria_end_an_answer_where_they_would_token_by_token",
    f"{DOOR}what_has_no_meaning_is_refused",
    f"{HUB}push_makes_a_repository_that_the_graph_is_found_in",
    f"{HUB}transformers_decodes_with_what_push_put_beside_the_weights",
    f"{SERVE}chat_answers_and_counts",
    f"{SERVE}a_stream_comes_block_by_block",
    f"{SERVE}a_head_that_does_not_come_closes_the_connection",
    f"{SERVE}the_command_serves_and_drains_when_asked_to_stop",
    f"{LIMITS}the_first_wrong_item_is_enough",
    f"{LIMITS}who_went_is_not_encoded_for",
)
SHOW = """
import sys
from importlib.metadata import version
print(", ".join(f"{name} {version(name)}" for name in sys.argv[1:]))
"""
COMPILE = "from spiffy.runtime.draft import fastest_search; fastest_search()"
TEST_TOOLS = ("hypothesis", "openai", "pytest", "pytest-xdist")


def bounds() -> dict[str, str]:
    """Dependencies of users, extras included, and their lower bounds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [*project["dependencies"]]
    for extra in EXTRAS:
        listed += project["optional-dependencies"][extra]
    found = [re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement) for requirement in listed]
    assert all(found), f"a dependency without a plain lower bound: {listed}"
    return {match[1]: match[2] for match in found if match}


def requirements(which: str, with_torch: bool) -> list[str]:
    """What to ask pip for."""
    versions = bounds()
    chosen = {k: v for k, v in versions.items() if with_torch or k not in WITH_TORCH}
    if which == "newest":
        return [*chosen]
    exact = [f"{name}=={version}" for name, version in chosen.items() if name != "torch"]
    # transformers 5.0 asks for typer-slim, which once held the same files as typer.
    exact.append(f"typer-slim=={versions['typer']}")
    return [*exact, f"torch=={versions['torch']}.*"] if with_torch else exact


def install(command: list[str]) -> int:
    """Run pip; what it says of packages that are not tried here is of interest only if it fails."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout, done.stderr, sep="", flush=True)
    return done.returncode


def run(command: list[str], **variables: str) -> int:
    """Run a command in the checkout and return its exit status."""
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **variables}, check=False
    ).returncode


@dataclass(frozen=True)
class Installed:
    """Versions in a folder of their own: by which Python, and how, they are imported."""

    name: str
    python: str
    variables: dict[str, str]
    failed: int
    seconds: float


def installed(which: str, folder: str, with_torch: bool) -> Installed:
    """Install them into an empty folder."""
    pip = ["-m", "pip", "install", "-q", "--no-compile", "--disable-pip-version-check"]
    began = time.monotonic()
    python, variables = sys.executable, {"OMP_NUM_THREADS": "1", "PYTHONPATH": folder}
    variables["NUMBA_CACHE_DIR"] = folder  # what another numba compiled is not to be replaced
    variables["SPIFFY_EXAMPLES"] = "20"  # of a test: a dependency breaks the first one
    wanted = requirements(which, with_torch)
    if with_torch:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python, variables["PYTHONPATH"] = f"{folder}/bin/python", ""
        failed = install([python, *pip, *wanted, *TEST_TOOLS])
        failed = failed or install([python, *pip, "--no-deps", "-e", "."])
    else:
        failed = install([python, *pip, "--target", folder, *wanted])
    name = f"{which} with torch" if with_torch else which
    return Installed(name, python, variables, failed, time.monotonic() - began)


def tested(found: Installed) -> int:
    """Test, say what was tried and how long it took; nonzero if anything failed."""
    name, python, variables = found.name, found.python, found.variables
    if found.failed:
        print(f"{name}: cannot be installed", flush=True)
        return found.failed
    began = time.monotonic()
    print(f"{name}: ", end="", flush=True)
    run([python, "-c", SHOW, *sorted(bounds())], **variables)
    # Once, and not by every worker at the same time.
    run([python, "-W", "ignore", "-c", COMPILE], **variables)
    test = [python, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile"]
    failed = run([*test, "-p", "no:cacheprovider", *FAST], **variables)
    print(
        f"{name}: {'FAILED' if failed else 'passed'}; {found.seconds:.0f} s to install, "
        f"{time.monotonic() - began:.0f} s to test",
        flush=True,
    )
    return failed


def main() -> int:
    """Try the versions asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("which", nargs="+", choices=("oldest", "newest"))
    parser.add_argument("--with-torch", action="store_true", help="torch as well: gigabytes")
    args = parser.parse_args()
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        # Not in the checkout: hypothesis reads the source of all that is imported from there.
        folders = [
            stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{which}-"))
            for which in args.which
        ]
        # Side by side: pip waits for the network and the disk most of the time.
        ready = pool.map(partial(installed, with_torch=args.with_torch), args.which, folders)
        # A process that a signal ended has a negative code.
        return max(abs(tested(found)) for found in ready)


if __name__ == "__main__":
    sys.exit(main())
