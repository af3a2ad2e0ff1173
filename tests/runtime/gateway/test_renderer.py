from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from coldframe.runtime.gateway.api import ApiError
from coldframe.runtime.gateway.renderer import Renderer
from tests.runtime.gateway.chat_templates import (
    CONVERSATIONS,
    SNIPPETS,
    SPECIAL,
    TEMPLATES,
    TOOLS,
)

DATA = {"list": [1, 2.5, None, True], "z": "<é>\u2028", "a": {"b": {}}}


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    made = Renderer(deadline_s=60)  # the machine may have much else to do
    yield made
    made.close()


def refusal(renderer: Renderer, template: str, **variables: Any) -> str:
    """What a client is told; and the renderer goes on."""
    with pytest.raises(ApiError) as caught:
        renderer.render(template, variables)
    assert (caught.value.status, caught.value.code) == (400, "chat_template")
    assert len(caught.value.message) < 1200
    assert renderer.render("{{ x }}", {"x": "on"}) == "on"
    return caught.value.message


def compare(renderer: Renderer, template: str, messages: list[Any], **more: Any) -> None:
    """Ours must say what Transformers says, also where that is no."""
    variables = {
        "add_generation_prompt": False,
        "tools": None,
        "documents": None,
        **SPECIAL,
        **more,
    }
    expected: str | Exception
    try:
        (expected,), _ = render_jinja_template([messages], chat_template=template, **variables)
    except Exception as error:  # noqa: BLE001 - whatever a template may end with
        expected = error
    variables["messages"] = messages
    if isinstance(expected, str):
        assert renderer.render(template, variables) == expected
        return
    with pytest.raises(ApiError) as caught:
        renderer.render(template, variables)
    assert (caught.value.status, caught.value.code) == (400, "chat_template")
    if type(expected) is jinja2.TemplateError:  # the template's own words
        assert caught.value.message == str(expected)
    elif isinstance(expected, RecursionError):
        assert "nests too deeply" in caught.value.message
    else:
        assert type(expected).__name__ in caught.value.message


# -- what it makes -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_say_what_they_say_in_transformers(name: str, renderer: Renderer) -> None:
    documents = [{"title": "Ä", "text": "b"}]
    for messages in CONVERSATIONS.values():
        for more in (
            {},
            {"add_generation_prompt": True, "enable_thinking": False},
            {"tools": TOOLS, "documents": documents},
        ):
            compare(renderer, TEMPLATES[name], messages, **more)


def test_all_that_templates_are_made_of_is_as_in_transformers(renderer: Renderer) -> None:
    for template in SNIPPETS:
        compare(renderer, template, CONVERSATIONS["one"], data=DATA)


TEXT = st.text(st.characters(codec=None), max_size=20) | st.sampled_from(
    ["<think>a</think>b", "{{ x }}", "{% raw %}", "\ud800\x00\x1b\u2028", " \n\t", "</s>"]
)
CONTENT = TEXT | st.lists(
    st.fixed_dictionaries({"type": st.sampled_from(["text", "image"]), "text": TEXT}), max_size=3
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": CONTENT},
    optional={"reasoning_content": TEXT, "name": TEXT},
)


@settings(max_examples=40, deadline=None)
@given(messages=st.lists(MESSAGE, min_size=1, max_size=5), asked=st.booleans())
def test_whatever_a_client_says_ends_in_the_same_text(
    renderer: Renderer, messages: list[Any], asked: bool
) -> None:
    for template in TEMPLATES.values():
        compare(renderer, template, messages, add_generation_prompt=asked)


def test_a_template_knows_the_date(renderer: Renderer) -> None:
    before = datetime.now().strftime("%d %b %Y %H:%M")
    found = renderer.render("{{ strftime_now('%d %b %Y %H:%M') }}", {})
    assert found in (before, datetime.now().strftime("%d %b %Y %H:%M"))


def test_a_template_can_be_compiled_before_it_is_needed(renderer: Renderer) -> None:
    renderer.prepare(TEMPLATES["qwen-3"])
    with pytest.raises(ApiError, match="TemplateSyntaxError"):
        renderer.prepare("{% if %}")


# -- what it survives --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ 'a' * 10 ** 10 }}", "too much memory"),
        ("{{ x * 10 ** 10 }}", "too much memory"),
        ("{{ ('a' * 2 ** 28) + ('b' * 2 ** 28) }}", "too much memory"),
        ("{{ '%01000000000000d' % 1 }}", "too much memory"),
        ("{{ '{:>10000000000}'.format(1) }}", "too much memory"),
        ("{{ 'x' | center(10 ** 10) }}", "too much memory"),
        ("{{ 'x' * 8388609 }}", "more than 8388608 characters"),
        ("{% for i in range(9) %}{{ 'x' * 1000000 }}{% endfor %}", "more than 8388608 characters"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "nests too deeply"),
        ("{{ " + "not " * 3000 + "1 }}", "nests too deeply"),
        ("{% for i in [1] %}" * 30 + "{% endfor %}" * 30, "SyntaxError"),
        ("{{ raise_exception('a' * 10 ** 6) }}", "aaa"),
    ],
)
def test_a_template_that_wants_too_much_is_refused(
    template: str, why: str, renderer: Renderer
) -> None:
    assert why in refusal(renderer, template, x="y")


def test_an_answer_may_be_as_long_as_it_may(renderer: Renderer) -> None:
    assert renderer.render("{{ '\u00e9' * 8388608 }}", {}) == "\u00e9" * 8388608


@pytest.mark.parametrize("value", [{1, 2}, 10**5000, b"bytes"], ids=["set", "long", "bytes"])
def test_what_is_no_json_is_refused(value: object, renderer: Renderer) -> None:
    assert "no JSON" in refusal(renderer, "{{ x }}", x=value)


def test_messages_that_nest_without_end_are_refused(renderer: Renderer) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert "no JSON" in refusal(renderer, "{{ x }}", x=deep)


def test_threads_get_their_own_answers(renderer: Renderer) -> None:
    start = threading.Barrier(8)

    def ask(number: int) -> list[str]:
        start.wait()
        return [renderer.render("{{ x }}", {"x": f"{number}-{i}"}) for i in range(20)]

    with ThreadPoolExecutor(8) as pool:
        for number, answers in enumerate(pool.map(ask, range(8))):
            assert answers == [f"{number}-{i}" for i in range(20)]
