"""schemathesis over the OpenAPI document: what it promises is kept, what it forbids is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, given, seed, settings

from coldframe.runtime.gateway.openai.forms import FIELDS
from coldframe.runtime.gateway.openapi import openapi
from coldframe.runtime.gateway.platforms.table import PROFILES
from coldframe.runtime.gateway.routes import add_routes
from coldframe.runtime.gateway.settings import GatewaySettings
from tests.runtime.gateway.front import fronted
from tests.runtime.serving import Server, served
from tests.runtime.snapshots import eventually

Make = Callable[..., Path]

OPENAI = ("POST /v1/completions", "POST /v1/chat/completions", "POST /invoke")
"""Whose bodies the document knows in full."""
NOT_SAID = (
    "best_of",  # not more than n
    *FIELDS,  # where there is a vLLM engine
    "logit_bias",  # the vocabulary is the model's
    "max_completion_tokens",  # together with the prompt
    "max_tokens",
    "messages",  # whose calls have JSON in them
    "n",  # times the prompts
    "prompt",  # the vocabulary, and together with the answer
    "stop_token_ids",
    "stream",  # at /invoke of one sequence only
    "stream_options",  # only with stream
    "tool_choice",  # only with tools, of which it names one
    "tools",  # each once, where the template knows of them
    "top_logprobs",  # only with logprobs
)
"""Fields whose bounds depend on another field or on the model; a schema does not say that."""


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.name)
def test_the_document_names_every_route_and_no_other(profile: Any) -> None:
    gateway = GatewaySettings(("demo",), profile.name)
    app = FastAPI()
    add_routes(app, gateway, None, None, None)  # type: ignore[arg-type]
    served = {
        (method.lower(), route.path.replace(":path", ""))
        for route in app.routes
        if isinstance(route, APIRoute) and route.include_in_schema
        for method in route.methods
    }
    paths = app.openapi()["paths"]
    assert {(method, path) for path, methods in paths.items() for method in methods} == served


def test_keys_are_in_the_document_where_they_are_asked_for() -> None:
    paths = openapi(GatewaySettings(("demo",), "generic", keys=("k",)), {})["paths"]
    guarded = {
        path for path, methods in paths.items() for op in methods.values() if "security" in op
    }
    assert guarded == {
        "/invoke",
        "/metrics",
        "/startup",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/v1/models/{name}",
    }
    assert "security" not in str(openapi(GatewaySettings(("demo",), "generic"), {}))


def test_nothing_of_it_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys\n"
        "import coldframe.runtime.gateway.app\n"
        "print(*(name for name in sys.modules if name.endswith(('.openapi', '.schemas'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "coldframe" not in done.stdout


# -- a real server --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(demo_model: Make) -> Iterator[Server]:
    # KServe's has the most routes.
    flags = ("--platform", "kserve", "--model-name", "demo")
    with served(demo_model("llama", "float32"), *flags) as server:
        server.ready()
        yield server


def plainer(value: Any) -> Any:
    """Whole numbers are written without a point: 16.0 is one to JSON Schema, and not to readers."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [plainer(item) for item in value]
    if isinstance(value, dict):
        return {name: plainer(item) for name, item in value.items()}
    return value


def shorter(body: Any) -> Any:
    """The same with a short answer, or a test would take for ever."""
    if not isinstance(body, dict):
        return body
    given = {name: body.get(name) for name in ("max_tokens", "max_completion_tokens")}
    less = {name: 1 + n % 4 for name, n in given.items() if type(n) is int and n > 4}
    if "messages" in body and set(given.values()) == {None}:
        less["max_tokens"] = 4
    return body | less


@pytest.mark.heavy
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_what_the_document_says_is_so(server: Server, mode: str) -> None:
    keeps_its_word(server.url, mode)
    assert server.complete(max_tokens=1)


@pytest.mark.heavy
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_what_the_document_says_of_several_models_is_so(tmp_path: Path, mode: str) -> None:
    with fronted(tmp_path, "one", "org/other", platform="kserve") as front:
        front.ready()
        eventually(lambda: front.get("/readyz").status_code == 200)
        keeps_its_word(front.url, mode)
        asked = {submitted["model"] for submitted in front.submitted}
        assert asked == ({"one", "org/other"} if mode == "positive" else set())


def keeps_its_word(url: str, mode: str) -> None:
    """Asks a server all that its document offers, or what it forbids."""
    import schemathesis
    from schemathesis.checks import load_all_checks
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    load_all_checks()
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    seen: Counter[tuple[str, int]] = Counter()

    def check(case: Any) -> None:
        if mode == "positive":
            case.body = shorter(plainer(case.body))
        response = case.call()
        label = case.operation.label
        seen[label, response.status_code] += 1
        # That valid data is taken is checked below.
        case.validate_response(response, excluded_checks=[positive_data_acceptance])
        if mode == "positive" and label in OPENAI and response.status_code != 200:
            assert response.status_code == 400, response.text
            error = response.json()["error"]
            assert re.split(r"[\[.]", error["param"])[0] in NOT_SAID, error

    for found in schema.get_all_operations():
        operation = found.ok()
        if mode == "negative" and "post" not in operation.method.lower():
            continue  # there is nothing to get wrong
        cases = operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode))
        bounded = settings(
            max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )
        seed(7)(bounded(given(case=cases)(check)))()
    assert all(status < 500 for _, status in seen)
    for label in OPENAI:
        taken = seen[label, 200]
        assert taken > 20 if mode == "positive" else taken == 0, seen
