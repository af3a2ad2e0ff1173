"""A model's card, as the front would give it, and requests made ready for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jinja2.sandbox
import pytest

from coldframe.runtime.gateway.api import ApiError, ModelCard
from coldframe.runtime.gateway.openai.prepare import Prepared, prepare_chat, prepare_completion

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

Ready = Callable[..., Prepared]


def fill_in(template: str, variables: Mapping[str, Any]) -> str:
    return jinja2.sandbox.ImmutableSandboxedEnvironment().from_string(template).render(**variables)


@pytest.fixture(scope="session")
def card() -> ModelCard:
    return ModelCard(
        name="demo",
        created=1_700_000_000,
        context_length=256,
        vocab_size=1000,
        chat_template=TEMPLATE,
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
    )


@pytest.fixture(scope="session")
def completion(card: ModelCard) -> Ready:
    """`completion(n=2)`: a completion request of "Hi" with these fields, ready."""
    return lambda **fields: prepare_completion({"prompt": "Hi", **fields}, card)


@pytest.fixture(scope="session")
def chat(card: ModelCard) -> Ready:
    """`chat(n=2)`: a chat of one message with these fields, ready."""
    messages = [{"role": "user", "content": "Hi"}]
    return lambda **fields: prepare_chat({"messages": messages, **fields}, card, fill_in)


@pytest.fixture(scope="session")
def refusal() -> Callable[..., ApiError]:
    """`refusal(ready, n=0)`: the error that a request with these fields gets."""

    def refused(ready: Ready, **fields: Any) -> ApiError:
        with pytest.raises(ApiError) as caught:
            ready(**fields)
        return caught.value

    return refused
