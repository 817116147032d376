"""The server's page: what is seen of a decode, and that nothing else gets into it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from in_browser import Browser, needs_browser
from test_serve import (
    LENGTH,
    QUESTION,
    Here,
    forwards_of,
    graph,
    held,
    model,
    plainly,
    served,
    settings,
    wait_until,
)

from spiffy.integrations.serve.app import Access
from spiffy.integrations.serve.engine import Engine
from spiffy.integrations.serve.events import sent
from spiffy.integrations.serve.listen import Sockets
from spiffy.integrations.serve.page import page


def test_the_page_is_one_file_that_runs_its_own_script_and_nothing_else() -> None:
    text, headers = page()
    assert len(text.encode()) < 40_000
    policy = dict(rule.split(" ", 1) for rule in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for kind in ("script", "style"):
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", policy[f"{kind}-src"])
        assert text.count(f"<{kind}") == 1  # one hash covers all there is
    assert not re.search(r"\b(innerHTML|outerHTML|insertAdjacentHTML|write|eval)\b", text)
    # Firefox keeps over a reload which buttons were disabled, unless told not to.
    for name in ("run", "stop"):
        assert re.search(rf'<button [^>]*id="{name}"[^>]* autocomplete="off"', text)
    assert not re.search(r"(?:src|href|action)=[\"'](?!data:|health|metrics)", text)


@pytest.fixture(scope="module")
def here() -> Iterator[Here]:
    with served(Engine(model(), settings(), graph(), budget=4), Access(), Sockets()) as found:
        yield found


@pytest.mark.parametrize("drafts", [True, False])
def test_the_page_is_told_where_the_prompt_ends_and_how_much_is_written(
    here: Here, drafts: bool
) -> None:
    start, *forwards, end = forwards_of(here, drafts=drafts)
    prompt = model().encode(QUESTION).tolist()
    given = [at for at, _ in start["given"]]
    assert given == list(range(start["blocks"][0][0], len(prompt))) != []
    spelled = "".join(text for _, text in start["given"])
    assert spelled == model().tokenizer.decode(prompt[given[0] :])
    assert start["drafting"] == drafts
    written = [event["written"] for event in forwards]
    # Tokens behind the end of the answer, which its last block holds too, are not the answer's.
    assert written[-1] == end["tokens"] == len(plainly().token_ids)
    committed = sum(len(step) for event in forwards for step in event["steps"])
    assert written[-1] < committed
    assert forwards[-1]["positions"] == end["positions"]


def test_an_event_is_one_line_to_whoever_reads_lines() -> None:
    """Python's `splitlines`, with which clients read, knows more line ends than JSON does."""
    content = {"text": "a\x85b\u2028c\u2029d\x0b\x1c\r\n\u20ac"}
    event = sent(content)
    line, *rest = event.decode().splitlines()
    assert rest == [""]
    assert json.loads(line.removeprefix("data: ")) == content
    assert "\u20ac" in line  # what ends no line is as it was


class Shown:
    """The page in a browser."""

    def __init__(self, browser: Browser, here: Here, width: int = 1280) -> None:
        self.browser, self.js = browser, browser.js
        browser.errors(), browser.requests()  # of what was open before
        browser.open(f"{here.address}/", width)
        self.set("pace", "0")
        self.set("length", LENGTH)

    def set(self, name: str, value: object) -> None:
        self.js(f"document.getElementById('{name}').value = '{value}'")

    def click(self, name: str) -> None:
        self.js(f"document.getElementById('{name}').click()")

    def wait(self, expression: str) -> None:
        wait_until(lambda: bool(self.js(expression)))

    def decode(self, mode: str) -> None:
        self.js(f"document.querySelector('input[value={mode}]').click()")
        self.click("run")
        self.wait("document.querySelector('#verdict.done')")

    def texts(self, selector: str) -> list[str]:
        found = self.js(f"[...document.querySelectorAll('{selector}')].map(e => e.textContent)")
        return [str(text) for text in found]

    @property
    def error(self) -> str:
        return str(self.js("document.getElementById('error').textContent"))


@needs_browser
def test_both_ways_of_decoding_race_to_the_same_answer(browser: Browser, here: Here) -> None:
    shown, plain = Shown(browser, here, width=360), plainly()
    shown.decode("both")
    assert shown.texts(".text") == [plain.text, plain.text]
    assert "The same answer" in shown.texts("#verdict")[0]
    drafted, plainly_made = map(int, shown.texts("[data-part=forwards]"))
    assert drafted < plainly_made == plain.stats.nfe
    assert len(shown.texts(".strip i")) == drafted + plainly_made
    assert shown.js("document.documentElement.scrollWidth") <= 360
    assert browser.errors() == []
    network = [url for url in browser.requests() if re.match("(http|ws)s?:", url)]
    assert f"{here.address}/spiffy/decode" in network
    assert [url for url in network if not url.startswith(f"{here.address}/")] == []


@needs_browser
def test_the_switch_shows_one_way_alone_and_steps_through_it(browser: Browser, here: Here) -> None:
    shown, plain = Shown(browser, here), plainly()
    for mode, panel in (("plain", 0), ("drafts", 1)):
        shown.decode(mode)
        assert shown.texts(".text") == [plain.text]
        panels = "[...document.querySelectorAll('[data-part=drafts-panel]')]"
        assert shown.js(f"{panels}.filter(e => !e.hidden).length") == panel
    assert shown.js("document.documentElement.scrollWidth") <= 1280
    forwards = int(shown.texts("[data-part=forwards]")[0])
    browser.press("ArrowLeft")
    assert shown.texts("#place") == [f"forward {forwards - 1} of {forwards}"]
    shown.click("first")
    assert shown.texts(".board .tok:not(.mask):not(.given)") == []
    assert shown.js("document.getElementById('back').disabled")
    # Every forward commits something, and shows its drafts: those that came true are marked.
    rows, fresh = "document.querySelectorAll('tbody tr')", "document.querySelector('.tok.first')"
    browser.press("ArrowRight")
    steps = shown.js(
        f"Array.from({{length: {forwards}}}, (_, k) => {{"
        f"if (k) document.getElementById('next').click();"
        f"return [{fresh} !== null, ...[...{rows}].map(e => e.className)]; }})"
    )
    assert all(step[0] for step in steps)
    seen = [kind for step in steps for kind in step[1:]]
    assert seen.count("true") == plain.stats.nfe - forwards > 0
    assert "false" in seen
    shown.click("play")  # from the start again, to the end
    shown.wait("document.querySelector('#verdict.done')")
    assert browser.errors() == []


@needs_browser
def test_stop_frees_the_rows(browser: Browser, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, before = Shown(browser, here), here.sample("spiffy_cancelled_total")
    with held(monkeypatch) as go_on:
        shown.click("run")
        shown.wait("!document.getElementById('stop').disabled")
        shown.wait("document.querySelector('.block')")  # it has been taken on
        shown.click("stop")
        shown.wait("!document.getElementById('run').disabled")
        go_on.set()
    shown.wait("document.getElementById('stop').disabled")
    wait_until(lambda: here.sample("spiffy_cancelled_total") == before + 1)
    assert shown.error == ""
    shown.decode("plain")
    assert shown.texts(".text") == [plainly().text]


@needs_browser
def test_what_is_refused_is_said_in_a_line(browser: Browser, here: Here) -> None:
    shown = Shown(browser, here)
    shown.set("length", 4000)
    shown.click("run")
    shown.wait("!document.getElementById('error').hidden")
    assert "more than the 512 of tiny-sdar" in shown.error
    assert "\n" not in shown.error
    assert shown.js("document.getElementById('player').hidden")
    browser.errors()  # the browser logs every 400


@needs_browser
def test_a_field_that_is_folded_away_is_shown_if_it_is_wrong(browser: Browser, here: Here) -> None:
    shown = Shown(browser, here)
    assert not shown.js("document.querySelector('form details').open")
    shown.set("length", 0)
    shown.click("run")
    assert shown.js("document.querySelector('form details').open")
    assert shown.js("document.activeElement.id") == "length"
    assert shown.js("document.getElementById('player').hidden")  # nothing was asked


def long_decode(forwards: int) -> str:
    """What the server tells of a decode that commits a token per forward."""
    blocks = [[k, k + 32] for k in range(0, forwards, 32)]
    start = {"type": "start", "drafting": False, "given": [], "blocks": blocks}
    start |= {"prompt_tokens": 0, "answer": [0, forwards]}
    events: list[dict[str, Any]] = [start]
    for k in range(forwards):
        told = {"type": "forward", "block": k // 32, "step": k + 1, "steps": [[[k, "a"]]]}
        events.append(told | {"drafts": [], "nfe": k + 1, "plain": k + 1, "written": k + 1})
        events[-1]["seconds"] = 0.01 * (k + 1)
    end = {"type": "end", "text": "a", "tokens": forwards, "seconds": 1.0}
    events.append(end | {"nfe": forwards, "plain": forwards})
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events)


@needs_browser
def test_a_long_answer_fits_on_a_phone(browser: Browser, here: Here) -> None:
    forwards, shown = 400, Shown(browser, here, width=360)
    browser.driver.execute_script(
        f"const told = {json.dumps(long_decode(forwards))};"
        "window.fetch = async () => new Response(told);"
    )
    shown.js("document.querySelector('input[value=plain]').click()")
    shown.click("run")
    shown.wait(f"document.getElementById('slider').max == '{forwards}'")
    shown.click("play")  # no longer
    strip = "document.querySelector('.strip')"
    columns = f"[...{strip}.children]"
    assert shown.js(f"{strip}.scrollWidth") <= shown.js(f"{strip}.clientWidth")
    assert shown.js("document.documentElement.scrollWidth") <= 360
    widths = shown.js(f"{columns}.map(e => e.querySelector('b').getBoundingClientRect().width)")
    assert min(widths) >= 1.5
    each = -(-forwards // len(widths))
    assert len(widths) == -(-forwards // each)
    shown.click("first")
    at = 40
    shown.js(f"{columns}[{at}].click()")
    assert shown.texts("#place") == [f"forward {at * each + 1} of {forwards}"]
    now = f"{columns}.findIndex(e => e.className.includes('now'))"
    assert shown.js(now) == at
    assert len(shown.texts(".strip .past")) == at + 1
    browser.press("ArrowRight")
    assert shown.texts("#place") == [f"forward {at * each + 2} of {forwards}"]
    browser.press("ArrowLeft")
    browser.press("ArrowLeft")
    assert shown.js(now) == at - 1
    browser.open("data:,", 1280)
    assert browser.errors() == []


@contextmanager
def locked() -> Iterator[Here]:
    with served(Engine(model(), settings()), Access("sesame"), Sockets()) as found:
        yield found


@needs_browser
def test_a_key_is_asked_for_where_one_is_wanted(browser: Browser) -> None:
    with locked() as here:
        shown = Shown(browser, here)
        shown.wait("!document.getElementById('key-row').hidden")
        shown.click("run")
        shown.wait("!document.getElementById('error').hidden")
        assert "API key" in shown.error
        shown.set("key", "sésame\u2019")
        shown.click("run")
        shown.wait("document.getElementById('error').textContent.includes('ASCII')")
        assert shown.js("document.getElementById('model').hidden")
        shown.set("key", "sesame")
        shown.decode("drafts")
        shown.wait("!document.getElementById('model').hidden")
        assert shown.texts("#model") == ["tiny-sdar"]
        assert shown.texts(".text") == [plainly().text]
        assert "without a draft graph" in shown.texts("[data-part=drafts-title]")[0]
        browser.driver.get("data:,")  # lets the server's connections go
        browser.errors()
