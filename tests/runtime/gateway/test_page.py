"""The page at `/`: its policy, and what a browser makes of it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from starlette.responses import JSONResponse

from coldframe.loader.timeline import Span
from coldframe.runtime.gateway.loadstate import LoadState
from coldframe.runtime.gateway.page import read_page
from coldframe.runtime.gateway.startup import in_short, startup_document
from coldframe.runtime.timeline.timeline import Timeline
from tests.runtime.gateway.browser import Backstage, chromium, until

MS = 1_000_000
EXEC = 5_000 * MS
ATTACK = '<img src=x onerror="window.pwned=1"><script>window.pwned=1</script>\'"&amp;'
SHOWN = ("model", "state", "progress-text", "speed", "answer", "key-hint", "cold-text")


def a_timeline(note: str | None = None, process: str = "prefill-0") -> dict[str, Any]:
    """A start of 100 ms as `/startup` tells it."""
    told = [
        ("interpreter", "front", 0, 10, None, None),
        ("weight_read", "memory", 10, 90, note, None),
        ("imports", process, 10, 40, None, None),
        ("prefill[embed]", process, 40, 42, None, None),
        ("wait", process, 42, 90, None, "stage_ready[0]"),
        ("prefill[0]", process, 90, 95, None, None),
        ("prefill[head]", process, 95, 100, None, None),
        ("decode", "front", 100, 500, None, None),
    ]
    spans = [Span(n, p, EXEC + a * MS, EXEC + b * MS, o, w) for n, p, a, b, o, w in told]
    return Timeline(spans, EXEC, EXEC + 100 * MS).to_json()


def a_document(state: LoadState, **more: Any) -> dict[str, Any]:
    """What `/startup` says, as the gateway makes it and JSON brings it."""
    given = {"running": 0, "waiting": 0, "timeline": None, "model": "a-model", **more}
    document: dict[str, Any] = json.loads(
        json.dumps(startup_document(given.pop("model"), state, **given))
    )
    return document


LOADING = LoadState("starting", "weights", 123_000_000, 426_000_000, 0.5)
READY = LoadState("ready", None, 426_000_000, 426_000_000, 1.0, "image")


# -- without a browser ----------------------------------------------------------------------------


def policy() -> dict[str, str]:
    told = read_page().headers["content-security-policy"]
    return dict(part.split(" ", 1) for part in told.split("; "))


def test_the_policy_allows_this_script_and_this_style_alone() -> None:
    body = read_page().body
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>".encode(), body, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
        assert policy()[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy()["default-src"] == policy()["base-uri"] == "'none'"
    assert policy()["frame-ancestors"] == policy()["form-action"] == "'none'"
    assert "unsafe" not in read_page().headers["content-security-policy"]


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [(name, value or "") for name, value in attrs]


def test_the_page_names_nothing_that_is_elsewhere() -> None:
    links = _Links()
    links.feed(read_page().body.decode())
    names = {name for name, _ in links.found}
    assert not any(name.startswith("on") for name in names)  # the policy would not have it
    assert "style" not in names
    goes = [value for name, value in links.found if name in ("href", "src", "action")]
    assert goes == ["data:,", "startup"]  # relative: it may lie below a path of a platform's
    script = read_page().body.decode()
    addresses = set(re.findall(r"https?://[^\"'` )]+", script))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a namespace, which nobody fetches
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script)
    assert not re.search(r"localStorage|sessionStorage|indexedDB|document\.cookie", script)


def test_the_document_says_when_the_weights_will_be_in() -> None:
    document = a_document(LOADING, waiting=3)
    assert document == {
        "state": "starting",
        "model": "a-model",
        "stage": "weights",
        "bytes_done": 123_000_000,
        "bytes_total": 426_000_000,
        "rate": 246_000_000.0,
        "eta_s": pytest.approx(303 / 246),
        "tier": None,
        "device": None,
        "device_why": None,
        "contexts": None,
        "decode": None,
        "error": None,
        "failures": 0,
        "queue": {"running": 0, "waiting": 3},
        "timeline": None,
    }
    assert a_document(READY)["eta_s"] is None
    by_vllm = {"engine": "vllm", "why": None}
    assert a_document(READY, decode=by_vllm)["decode"] == by_vllm
    assert a_document(LoadState("zero"), decode=by_vllm)["decode"] is None
    nothing_yet = a_document(LoadState())
    assert (nothing_yet["rate"], nothing_yet["eta_s"]) == (None, None)


# -- in a browser ---------------------------------------------------------------------------------

heavy = pytest.mark.heavy


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(started: WebDriver) -> Iterator[WebDriver]:
    """The browser. No test may leave an error or a breach of the policy in its log."""
    started.get_log("browser")  # type: ignore[no-untyped-call]
    yield started
    log = started.get_log("browser")  # type: ignore[no-untyped-call]
    started.get("about:blank")
    # That a server answers 401 or 503 is said there, too; some tests want that.
    said = [e for e in log if e["level"] == "SEVERE" and e["source"] != "network"]
    said += [e for e in log if "Content Security Policy" in e["message"]]
    assert not said


@pytest.fixture
def backstage() -> Iterator[Backstage]:
    with Backstage(a_document(READY)).running() as made:
        yield made


def text(browser: WebDriver, name: str) -> str:
    return browser.find_element("id", name).text


def shown(browser: WebDriver, name: str) -> bool:
    return browser.find_element("id", name).is_displayed()


def type_prompt(browser: WebDriver, *keys: str) -> None:
    browser.find_element("id", "prompt").send_keys(*keys)


@heavy
def test_progress_then_ready(browser: WebDriver, backstage: Backstage) -> None:
    backstage.document = a_document(LoadState(), waiting=2)
    browser.get(backstage.url)
    until(lambda: text(browser, "state") == "starting")
    progress = browser.find_element("id", "progress")
    assert progress.get_attribute("value") in (None, "0")
    assert not progress.get_property("position") >= 0  # type: ignore[operator]
    assert text(browser, "queue") == "0 running, 2 waiting"
    backstage.document = a_document(LOADING)
    until(lambda: "MB" in text(browser, "progress-text"))
    words = "waiting for weights · 123 MB of 426 MB · 246 MB/s · 1.23 s left"
    assert text(browser, "progress-text") == words
    assert progress.get_property("position") == pytest.approx(123 / 426)
    backstage.document = a_document(READY, timeline=a_timeline())
    until(lambda: text(browser, "state") == "ready")
    assert not shown(browser, "start")
    assert text(browser, "model") == "a-model"
    assert "a-model" in browser.title


def several(**states: LoadState) -> dict[str, dict[str, Any]]:
    """What `/startup` says of each of several models."""
    models = {name: in_short(state) for name, state in states.items()}
    return {
        name: {**a_document(state, model=name, timeline=a_timeline(name)), "models": models}
        for name, state in states.items()
    }


@heavy
def test_of_several_models_one_is_chosen(browser: WebDriver, backstage: Backstage) -> None:
    backstage.named = several(**{ATTACK: READY, "b": LOADING, "c": LoadState("parked", None)})
    backstage.document = backstage.named[ATTACK]
    browser.get(backstage.url)

    def listed() -> list[tuple[str, str | None]]:
        buttons = browser.find_elements("css selector", "#models button")
        return [(button.text, button.get_attribute("aria-pressed")) for button in buttons]

    until(lambda: shown(browser, "models"))
    first = f"{ATTACK} ready"
    assert listed() == [(first, "true"), ("b starting", "false"), ("c parked", "false")]
    assert not shown(browser, "start")
    button = browser.find_elements("css selector", "#models button")[1]
    assert button.accessible_name == "b starting"
    button.send_keys(Keys.ENTER)
    until(lambda: text(browser, "model") == "b")
    until(lambda: listed() == [(first, "false"), ("b starting", "true"), ("c parked", "false")])
    assert shown(browser, "start")
    bars = 'return [...document.querySelectorAll("#waterfall rect")].map((b) => b.textContent)'
    assert any("(b)" in bar for bar in browser.execute_script(bars))  # type: ignore[no-untyped-call]
    assert browser.switch_to.active_element == button
    # It goes on looking at that one, and asks it.
    backstage.named = several(**{ATTACK: READY, "b": READY, "c": LoadState("parked", None)})
    until(lambda: text(browser, "state") == "ready")
    assert listed()[1] == ("b ready", "true")
    type_prompt(browser, "x", Keys.CONTROL, Keys.ENTER)
    until(lambda: backstage.asked)
    assert backstage.asked[0]["model"] == "b"
    backstage.token("yes")
    backstage.end(1)
    until(lambda: text(browser, "answer") == "yes")
    # Where it is gone, the first one is shown.
    del backstage.named["b"]
    backstage.document = a_document(READY, model="other")
    type_prompt(browser, "y", Keys.CONTROL, Keys.ENTER)
    backstage.token("no")
    backstage.end(1)
    until(lambda: text(browser, "model") == "other")
    assert not shown(browser, "models")


@heavy
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_list_of_models_can_be_read(
    browser: WebDriver, backstage: Backstage, scheme: str
) -> None:
    states = [LOADING, READY, LoadState("failed", None), LoadState("zero"), LoadState("draining")]
    backstage.named = several(**{f"m{number}": state for number, state in enumerate(states)})
    backstage.document = backstage.named["m0"]
    assert poor_contrasts(browser, backstage, scheme, "models") == []


@heavy
def test_the_waterfall_is_that_of_the_timeline(browser: WebDriver, backstage: Backstage) -> None:
    backstage.document = a_document(READY, timeline=a_timeline(note="two threads"))
    browser.get(backstage.url)
    until(lambda: shown(browser, "cold"))
    words = "First token after 100 ms, by clones of the image; 0 ms of it belong to no stage."
    assert text(browser, "cold-text") == words
    script = """
        return [...document.querySelectorAll("#waterfall rect")].map((bar) => ({
            about: bar.textContent, x: bar.x.baseVal.value, width: bar.width.baseVal.value,
            y: bar.y.baseVal.value, pale: bar.classList.contains("waits"),
        }));
    """
    bars = browser.execute_script(script)  # type: ignore[no-untyped-call]
    found = {bar["about"]: bar for bar in bars if bar["y"] > 20}  # below the critical path
    read = found["memory weight_read: 80 ms from 10 ms (two threads)"]
    wait = found["prefill-0 wait: 48 ms from 42 ms, waits for stage_ready[0]"]
    full = read["width"] / 0.8
    assert wait["width"] == pytest.approx(0.48 * full)
    assert wait["x"] - read["x"] == pytest.approx(0.32 * full)
    assert (wait["pale"], read["pale"]) == (True, False)
    assert len(found) == 7  # what came behind the first token is left out
    layers = [bar["y"] for about, bar in found.items() if "prefill[" in about]
    assert len(layers) == 3
    assert len(set(layers)) == 1  # a row for all layers
    path = sorted((bar["x"], bar["width"]) for bar in bars if bar["y"] <= 20)
    for (left, width), (right, _) in pairwise(path):
        assert left + width == pytest.approx(right, abs=1.5)
    assert sum(width for _, width in path) == pytest.approx(full, abs=3)
    browser.find_element("css selector", "summary").click()
    table = [row.text for row in browser.find_elements("css selector", "#path tr")]
    steps = backstage.document["timeline"]["critical_path"]
    assert len(table) == len(steps)
    assert table[0] == "interpreter front 0 ms 10 ms"


@heavy
def test_tokens_are_shown_as_they_come(browser: WebDriver, backstage: Backstage) -> None:
    browser.get(backstage.url)
    until(lambda: text(browser, "state") == "ready")
    type_prompt(browser, "Once upon", Keys.ENTER, "a time", Keys.CONTROL, Keys.ENTER)
    until(lambda: backstage.asked)
    assert backstage.asked[0] == {
        "model": "a-model",
        "prompt": "Once upon\na time",
        "max_tokens": 64,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert text(browser, "speed") == "waiting for the first token"
    answer = browser.find_element("id", "answer")
    assert answer.get_attribute("aria-busy") == "true"
    seen = ""
    for word in (" the", " <b>frame</b>", " was", "\r\n\ncold 🥶"):
        backstage.token(word)
        seen += word
        until(lambda: answer.get_property("textContent") == seen)  # noqa: B023
    assert re.fullmatch(
        r"first token after [\d.]+ m?s · 4 tokens · [\d.]+ tokens/s", text(browser, "speed")
    )
    assert not browser.find_element("id", "go").is_enabled()
    backstage.end(5)  # the usage knows best
    until(lambda: "5 tokens" in text(browser, "speed"))
    until(lambda: browser.find_element("id", "go").is_enabled())
    assert answer.get_attribute("aria-busy") == "false"
    assert not shown(browser, "stop")


@heavy
def test_a_stream_may_be_cut_anywhere(browser: WebDriver, backstage: Backstage) -> None:
    browser.get(backstage.url)
    type_prompt(browser, "x", Keys.CONTROL, Keys.ENTER)
    until(lambda: backstage.asked)
    # What is shown proves that the page has read what came with it, too.
    backstage.say(': a comment\r\n\r\ndata: {"choices": [{"text": "one"}]}\n\ndata: {"cho')
    until(lambda: text(browser, "answer") == "one")
    backstage.say('ices": [{"text": " and"}]}\r')
    until(lambda: text(browser, "answer") == "one and")
    backstage.say("\n\r\n")
    backstage.token(" two")
    backstage.say('data: {"error": {"message": "a worker died <i>"}}\n\n')
    until(lambda: text(browser, "problem") == "a worker died <i>")
    assert text(browser, "answer") == "one and two"
    assert "3 tokens" in text(browser, "speed")


@heavy
def test_a_connection_that_breaks_is_said(browser: WebDriver, backstage: Backstage) -> None:
    browser.get(backstage.url)
    type_prompt(browser, "x", Keys.CONTROL, Keys.ENTER)
    until(lambda: backstage.asked)
    backstage.token("half")
    until(lambda: text(browser, "answer") == "half")
    backstage.say(None)
    until(lambda: text(browser, "problem") == "the answer broke off")
    assert browser.find_element("id", "go").is_enabled()


@heavy
def test_an_answer_can_be_stopped(browser: WebDriver, backstage: Backstage) -> None:
    browser.get(backstage.url)
    type_prompt(browser, "x", Keys.CONTROL, Keys.ENTER)
    backstage.token("one")
    until(lambda: text(browser, "answer") == "one")
    browser.find_element("id", "stop").send_keys(Keys.ENTER)
    until(lambda: backstage.left == 1)  # the server hears of it
    until(lambda: text(browser, "speed").endswith("stopped"))
    assert text(browser, "answer") == "one"
    assert text(browser, "problem") == ""
    assert browser.switch_to.active_element.get_attribute("id") == "prompt"


@heavy
def test_a_refusal_is_told_with_when_to_come_again(
    browser: WebDriver, backstage: Backstage
) -> None:
    error = {"error": {"message": "Loading model: too many wait.", "type": "unavailable_error"}}
    backstage.refuse = JSONResponse(error, 503, headers={"retry-after": "7"})
    browser.get(backstage.url)
    type_prompt(browser, "x", Keys.CONTROL, Keys.ENTER)
    until(lambda: text(browser, "problem"))
    assert text(browser, "problem") == "Loading model: too many wait. Try again in 7 s."
    assert text(browser, "speed") == ""


@heavy
def test_an_api_key_is_asked_for_and_kept_nowhere(browser: WebDriver, backstage: Backstage) -> None:
    backstage.key = "sk-very-secret"
    browser.get(backstage.url)
    until(lambda: shown(browser, "key"))
    assert browser.switch_to.active_element.get_attribute("id") == "key"
    field = browser.find_element("id", "key")
    assert field.get_attribute("type") == "password"
    assert backstage.count("/startup") == 1  # it does not knock again without one
    field.send_keys(backstage.key, Keys.TAB)
    until(lambda: text(browser, "state") == "ready")
    type_prompt(browser, "x", Keys.CONTROL, Keys.ENTER)
    backstage.token("yes")
    backstage.end(1)
    until(lambda: text(browser, "answer") == "yes")
    script = """
        return JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie,
            location.href, history.length, document.documentElement.outerHTML]);
    """
    assert backstage.key not in browser.execute_script(script)  # type: ignore[no-untyped-call]
    browser.get(backstage.url)
    until(lambda: shown(browser, "key"))
    assert field_value(browser) == ""


def field_value(browser: WebDriver) -> Any:
    return browser.find_element("id", "key").get_property("value")


@heavy
@pytest.mark.parametrize("state", ["starting", "ready", "failed"])
def test_hostile_words_are_only_words(browser: WebDriver, backstage: Backstage, state: str) -> None:
    error = {"error": ATTACK, "what": ATTACK, "where": None, ATTACK: ATTACK}
    timeline = a_timeline(note=ATTACK, process=ATTACK)
    timeline["stages"].append({"name": ATTACK, "process": ATTACK, "start_s": 0, "end_s": 0.05})
    timeline["critical_path"].append(timeline["stages"][-1])
    backstage.document = a_document(
        LoadState(state, ATTACK, 1, 2, 1.0, ATTACK, error if state == "failed" else None),
        model=ATTACK,
        timeline=timeline,
    )
    browser.get(backstage.url)
    until(lambda: text(browser, "model") == ATTACK)
    type_prompt(browser, ATTACK, Keys.CONTROL, Keys.ENTER)
    backstage.token(ATTACK)
    backstage.say(f"data: {json.dumps({'error': {'message': ATTACK}})}\n\n")
    until(lambda: text(browser, "problem") == ATTACK)
    assert text(browser, "answer") == ATTACK
    assert browser.find_elements("css selector", "img") == []
    assert len(browser.find_elements("css selector", "script")) == 1
    assert browser.execute_script("return window.pwned") is None  # type: ignore[no-untyped-call]
    if state == "failed":
        assert ATTACK in text(browser, "failure-parts")


@heavy
@pytest.mark.parametrize(
    "document",
    [
        [],
        None,
        7,
        {"state": "constructor"},
        {"state": "ready", "queue": 7, "timeline": "x", "error": 3, "model": {"a": 1}},
        {
            "state": "starting",
            "bytes_total": "9",
            "bytes_done": -1,
            "timeline": {
                "ttft_s": 1e-9,
                "stages": [None, 1, {"start_s": 2, "end_s": 1}, {"start_s": "0", "end_s": None}],
                "critical_path": {"a": 1},
            },
        },
    ],
)
def test_a_document_that_is_none_does_no_harm(
    browser: WebDriver, backstage: Backstage, document: Any
) -> None:
    backstage.document = document
    browser.get(backstage.url)
    until(lambda: text(browser, "state") != "looking …")
    type_prompt(browser, "x", Keys.CONTROL, Keys.ENTER)
    backstage.token("still there")
    backstage.end(1)
    until(lambda: text(browser, "answer") == "still there")


@heavy
def test_a_script_that_is_not_the_pages_own_does_not_run(
    started: WebDriver, backstage: Backstage
) -> None:
    started.get(backstage.url)
    until(lambda: text(started, "state") == "ready")
    smuggle = """
        const done = arguments[0];
        document.addEventListener("securitypolicyviolation", (e) => done(e.violatedDirective));
        const image = document.createElement("img");
        image.src = "/elsewhere.png";
        document.body.append(image);
    """
    assert started.execute_async_script(smuggle) == "img-src"  # type: ignore[no-untyped-call]
    markup = """
        try { document.body.innerHTML = "<b>x</b>"; } catch (error) { return error.name; }
    """
    assert started.execute_script(markup) == "TypeError"  # type: ignore[no-untyped-call]
    assert backstage.count("/elsewhere.png") == 0
    started.get_log("browser")  # type: ignore[no-untyped-call]


@heavy
def test_it_asks_for_nothing_but_itself_and_says_that_it_only_looks(
    browser: WebDriver, backstage: Backstage
) -> None:
    browser.get(backstage.url)
    until(lambda: backstage.count("/startup"))
    until(lambda: text(browser, "state") == "ready")
    assert {(method, path) for method, path, _ in backstage.seen} == {
        ("GET", "/"),
        ("GET", "/startup"),
    }
    looks = [headers for _, path, headers in backstage.seen if path == "/startup"]
    assert all(headers["x-coldframe-probe"] == "page" for headers in looks)


@heavy
def test_it_looks_less_often_when_there_is_less_to_see(
    browser: WebDriver, backstage: Backstage
) -> None:
    # A clock of the test's own: timers are noted, and run when the test says so.
    clock = """
        window.clock = { now: 0, timers: [] };
        performance.now = () => window.clock.now;
        window.setTimeout = (run, ms) => window.clock.timers.push({ run, ms });
        window.clearTimeout = () => {};
    """
    source = browser.execute_cdp_cmd(  # type: ignore[no-untyped-call,attr-defined]
        "Page.addScriptToEvaluateOnNewDocument", {"source": clock}
    )
    try:
        backstage.document = a_document(LOADING)
        browser.get(backstage.url)

        def due() -> Any:
            """How long the page waits until it looks again; None where it does not."""
            script = "return window.clock.timers.map((timer) => timer.ms)"
            waits = browser.execute_script(script)  # type: ignore[no-untyped-call]
            return waits[-1] if waits else None

        def step(ms: int) -> None:
            seen = backstage.count("/startup")
            script = """
                window.clock.now += arguments[0];
                const timer = window.clock.timers.pop();
                if (timer) timer.run();
            """
            browser.execute_script(script, ms)  # type: ignore[no-untyped-call]
            until(lambda: backstage.count("/startup") > seen)

        until(lambda: due() == 300)
        backstage.document = a_document(READY)
        step(300)
        until(lambda: due() == 5000)
        step(5000)
        until(lambda: due() == 5000)
        step(60_000)  # nobody has touched it for a minute
        until(lambda: text(browser, "state") == "ready")
        seen = backstage.count("/startup")
        assert due() is None
        browser.find_element("id", "prompt").click()  # somebody is there
        until(lambda: backstage.count("/startup") > seen)
        until(lambda: due() == 5000)
    finally:
        browser.execute_cdp_cmd(  # type: ignore[no-untyped-call,attr-defined]
            "Page.removeScriptToEvaluateOnNewDocument", source
        )


@heavy
def test_everything_has_a_name_and_is_reached_by_keys(
    browser: WebDriver, backstage: Backstage
) -> None:
    backstage.document = a_document(READY, timeline=a_timeline())
    browser.get(backstage.url)
    until(lambda: shown(browser, "cold"))
    reached = []
    for _ in range(7):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        active = browser.switch_to.active_element
        reached.append(active.accessible_name)
        outline = active.value_of_css_property("outline-style")
        assert outline == "solid", active.accessible_name  # where the focus is can be seen
        if active.tag_name == "summary":
            break
    assert reached == [
        "Prompt",
        "Tokens at most",
        "Generate",
        "Waterfall, scrollable",
        "What the first token waited for, as a table",
    ]
    picture = browser.find_element("id", "waterfall")
    assert picture.aria_role == "image" or picture.aria_role == "img"
    assert picture.accessible_name.startswith("Last cold start First token after 100 ms")
    assert browser.find_element("id", "answer").aria_role == "log"
    assert browser.find_element("id", "state").aria_role == "status"
    assert browser.find_element("css selector", "html").get_attribute("lang") == "en"
    levels = [h.tag_name for h in browser.find_elements("css selector", "h1, h2, h3")]
    assert levels[0] == "h1"
    assert set(levels[1:]) == {"h2"}


@heavy
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("state", ["starting", "ready", "failed"])
def test_text_can_be_read_in_both_schemes(
    browser: WebDriver, backstage: Backstage, scheme: str, state: str
) -> None:
    error = {"what": "a shard is cut"} if state == "failed" else None
    load = LoadState(state, "weights", 1, 2, 1.0, "image", error)
    backstage.document = a_document(load, timeline=a_timeline(), waiting=1)
    assert poor_contrasts(browser, backstage, scheme, "cold") == []


def poor_contrasts(
    browser: WebDriver, backstage: Backstage, scheme: str, there: str
) -> list[tuple[str, float]]:
    """Texts that are hard to read, with their contrasts, once an element is shown."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd(  # type: ignore[no-untyped-call,attr-defined]
        "Emulation.setEmulatedMedia", {"features": [feature]}
    )
    browser.get(backstage.url)
    until(lambda: shown(browser, there))
    script = """
        const light = (colour) => {
            const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255).map(
                (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const behind = (node) => {
            for (; node; node = node.parentElement) {
                const colour = getComputedStyle(node).backgroundColor;
                if (!colour.endsWith(", 0)")) return colour;
            }
        };
        return [...document.querySelectorAll("body *")].filter(
            (node) => node.checkVisibility() && node.tagName !== "title" &&
                [...node.childNodes].some((c) => c.nodeType === 3 && c.data.trim()),
        ).map((node) => {
            const style = getComputedStyle(node);
            const ink = node instanceof SVGElement ? style.fill : style.color;
            const [a, b] = [light(ink), light(behind(node))].sort((p, q) => q - p);
            return [node.textContent.trim().slice(0, 40), (a + 0.05) / (b + 0.05)];
        });
    """
    found = browser.execute_script(script)  # type: ignore[no-untyped-call]
    assert len(found) > 20
    # WCAG 2.2, success criterion 1.4.3
    return [(words, ratio) for words, ratio in found if ratio < 4.5]


@heavy
def test_a_narrow_screen_scrolls_the_waterfall_alone(
    browser: WebDriver, backstage: Backstage
) -> None:
    backstage.document = a_document(READY, timeline=a_timeline(), model="m" * 300)
    size = {"width": 340, "height": 700, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd(  # type: ignore[no-untyped-call,attr-defined]
        "Emulation.setDeviceMetricsOverride", size
    )
    try:
        browser.get(backstage.url)
        until(lambda: shown(browser, "cold"))
        script = "return document.documentElement.scrollWidth"
        assert browser.execute_script(script) <= 340  # type: ignore[no-untyped-call]
    finally:
        browser.execute_cdp_cmd(  # type: ignore[no-untyped-call,attr-defined]
            "Emulation.clearDeviceMetricsOverride", {}
        )
