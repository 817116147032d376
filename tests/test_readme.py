"""What README and docs show a newcomer is what happens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from spiffy.runtime import generate, load_model
from spiffy.runtime.step import own_policy

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "cli" / "decode.py")
#: What the shipped models are asked in them, and the answer.
ASKED = {"Lily has 9 old pens and buys 2 new pens. How many pens are there now?": "11"}


def prompts(page: Path) -> list[str]:
    """Prompts that a page gives to a command or to `generate`."""
    found = re.findall(r'(?:--prompt |prompt = )"([^"]+)"', page.read_text(encoding="utf-8"))
    return [re.sub(r"\s+", " ", prompt) for prompt in found]


def test_every_prompt_shown_is_one_whose_answer_is_known() -> None:
    shown = {prompt for page in PAGES for prompt in prompts(page)}
    assert shown == set(ASKED)


@pytest.mark.parametrize("name", ["tiny-llada", "tiny-dream", "tiny-sdar"])
@pytest.mark.parametrize("prompt", ASKED)
def test_the_shipped_models_answer_it_correctly(name: str, prompt: str) -> None:
    out = generate(load_model(name, device="cpu"), prompt, gen_length=64)
    assert out.text.endswith(f"#### {ASKED[prompt]}")


def test_the_answer_in_the_readme_is_that_of_the_length_it_calibrates_for() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    (length,) = re.findall(r"spiffy-calibrate --model tiny-llada --gen-length (\d+)", text)
    (stated,) = re.findall(r"The answer to the prompt is `([^`]+)`", text)
    (asked,) = ASKED
    out = generate(
        load_model("tiny-llada", device="cpu"), asked, gen_length=int(length), cache="dual"
    )
    assert " ".join(out.text.split()) == stated


def test_the_drafter_and_the_policy_of_the_docs_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_policy, "_registered", {})
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}  # one snippet uses the drafter of the other
    for code in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(compile(code, "extending.md", "exec"), names)  # it asserts that no token changed
    printed = capsys.readouterr().out.splitlines()
    assert printed == re.findall(r"`(\d+ -> \d+)`", page)
    (static, _), (plain, ours) = (map(int, line.split(" -> ")) for line in printed)
    assert ours < plain < static
    assert f"where `static` needs {static}" in page


def test_the_python_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from spiffy.calib.pipeline import build_graph, prepare, record
    from spiffy.calib.prompts import load_prompts
    from spiffy.runtime import decoding_settings

    model, drawn = load_model("tiny-llada", device="cpu"), load_prompts("synthetic", 5)
    settings = decoding_settings(model, gen_length=64, cache="dual")
    traces = record(model, prepare(model, drawn, settings))
    build_graph(model, drawn, settings, traces, 8).save(tmp_path / "llada.json")
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.S)
    assert code
    for snippet in code:
        if "import ray" in snippet:  # tests/test_ray.py runs it
            continue
        exec(compile(snippet, "README.md", "exec"), {})
    assert "#### 11" in capsys.readouterr().out
