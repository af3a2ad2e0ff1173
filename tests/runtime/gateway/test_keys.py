"""API keys: where they come from, who passes, and that they stay where they are."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from coldframe.loader.errors import PlatformError
from coldframe.runtime.gateway.cors import check_origins, with_cors
from coldframe.runtime.gateway.keys import (
    KEYS_FILE_VARIABLE,
    KEYS_VARIABLE,
    ApiKeys,
    KeyGuard,
    load_keys,
    open_paths,
)
from tests.runtime.gateway.raw import answer

ONE = "sk-0123456789abcdef"
TWO = "sk-fedcba9876543210"


def test_keys_are_set_apart_by_commas_and_lines() -> None:
    text = f" {ONE} ,,\n{TWO}\r\n, {ONE}\n"
    assert load_keys({KEYS_VARIABLE: text}).keys == (ONE, TWO)


def test_keys_come_from_a_file_too(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"\ufeff{TWO}\n")
    environ = {KEYS_VARIABLE: ONE, KEYS_FILE_VARIABLE: str(path)}
    assert load_keys(environ).keys == (ONE, TWO)


def test_no_keys_are_worth_a_warning_where_others_reach_the_port() -> None:
    assert load_keys({}).warnings == ()
    (warning,) = load_keys({}, loopback=False).warnings
    assert KEYS_VARIABLE in warning


def test_short_keys_are_worth_a_warning_that_does_not_name_them() -> None:
    loaded = load_keys({KEYS_VARIABLE: f"hush,{ONE}"})
    (warning,) = loaded.warnings
    assert "16" in warning
    assert "hush" not in warning + repr(loaded)


@pytest.mark.parametrize(
    "text", ["", " ", ",", "\n,\n", "a b", f"{ONE},\x00x", "schlüssel", "x" * 2000]
)
def test_nonsense_is_an_error_and_not_an_open_door(text: str) -> None:
    with pytest.raises(PlatformError) as caught:
        load_keys({KEYS_VARIABLE: text})
    assert KEYS_VARIABLE in str(caught.value)
    assert ONE not in str(caught.value)
    assert "schl" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe" + ONE.encode(), b"k," * 600_000])
def test_a_file_of_nonsense_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(PlatformError) as caught:
        load_keys({KEYS_FILE_VARIABLE: str(path)})
    assert ONE not in str(caught.value)


@pytest.mark.parametrize("name", ["", "missing", "."])
def test_a_file_that_is_none_is_an_error(tmp_path: Path, name: str) -> None:
    path = str(tmp_path / name) if name else ""
    with pytest.raises(PlatformError, match="cannot be read"):
        load_keys({KEYS_FILE_VARIABLE: path})


def test_only_whole_keys_match() -> None:
    keys = ApiKeys([ONE, TWO])
    assert keys.match(ONE.encode())
    assert keys.match(TWO.encode())
    for wrong in ["", ONE[:-1], ONE + "0", ONE.upper(), f"{ONE},{TWO}", f" {ONE}", "\xff"]:
        assert not keys.match(wrong.encode("latin-1"))


def test_all_keys_are_looked_at_whichever_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    looked: list[bytes] = []
    real = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        looked.append(other)
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    keys = ApiKeys([ONE, TWO, "sk-3"])
    for presented in (ONE, TWO, "sk-3", "wrong"):
        looked.clear()
        keys.match(presented.encode())
        assert len(set(looked)) == 3


def test_no_key_is_kept() -> None:
    keys = ApiKeys([ONE])
    assert ONE not in repr(keys) + repr(vars(keys))


async def application(scope: Any, receive: Any, send: Any) -> None:
    await answer(send, 200, b"in")


def guarded(*keys: str, metrics: bool = False, cors: tuple[str, ...] = ()) -> TestClient:
    guard = KeyGuard(application, ApiKeys(keys), open_paths({"/ping"}, metrics=metrics))
    return TestClient(with_cors(guard, cors))


@pytest.mark.parametrize(
    "headers",
    [
        [("Authorization", f"Bearer {ONE}")],
        [("Authorization", f"bearer  {TWO}")],
        [("X-Api-Key", ONE)],
        [("Api-Key", TWO)],
        [("Authorization", "Bearer platforms-own"), ("X-Api-Key", ONE)],
        [("Authorization", "Bearer wrong"), ("Authorization", f"Bearer {ONE}")],
    ],
)
def test_a_right_key_passes(headers: list[tuple[str, str]]) -> None:
    assert guarded(ONE, TWO).post("/v1/completions", headers=headers).text == "in"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ONE},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": f"Basic {ONE}"},
        {"Authorization": f"Bearer {ONE}x"},
        {"Authorization": f"Bearer {ONE},{TWO}"},
        {"X-Api-Key": ""},
        {"Cookie": f"key={ONE}"},
    ],
)
def test_no_key_and_a_wrong_key_are_401(headers: dict[str, str]) -> None:
    got = guarded(ONE, TWO).post(f"/v1/completions?api_key={ONE}", headers=headers)
    assert got.status_code == 401
    assert got.headers["www-authenticate"] == "Bearer"
    error = got.json()["error"]
    assert error["code"] == "invalid_api_key"
    assert set(error) == {"message", "type", "param", "code"}
    assert ONE not in got.text


def test_probes_need_no_key() -> None:
    client = guarded(ONE)
    for path in ("/healthz", "/readyz", "/ping", "/"):
        assert client.get(path).status_code == 200
        assert client.head(path).status_code == 200
        assert client.post(path).status_code == 401


@pytest.mark.parametrize(
    "path", ["/metrics", "/startup", "/openapi.json", "/v1/models", "/healthz/x", "/ping/"]
)
def test_the_rest_does(path: str) -> None:
    assert guarded(ONE).get(path).status_code == 401
    assert guarded(ONE).options(path).status_code == 401


def test_metrics_are_open_where_asked_for() -> None:
    assert guarded(ONE, metrics=True).get("/metrics").status_code == 200


def test_without_keys_everybody_passes() -> None:
    assert guarded().post("/v1/completions").text == "in"


def test_other_protocols_do_not_pass() -> None:
    said: list[Any] = []

    async def main() -> None:
        async def send(message: Any) -> None:
            said.append(message)

        guard = KeyGuard(application, ApiKeys([ONE]), ())
        await guard({"type": "websocket", "path": "/", "headers": []}, None, send)

    asyncio.run(main())
    assert said == [{"type": "websocket.close", "code": 1008}]


PREFLIGHT = {
    "Origin": "https://page.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type, x-stainless-lang",
}


def test_pages_may_not_ask() -> None:
    got = guarded().options("/v1/completions", headers=PREFLIGHT)
    assert not any(name.startswith("access-control") for name in got.headers)


def test_a_page_that_is_named_may_ask_and_needs_a_key() -> None:
    client = guarded(ONE, cors=("https://page.example",))
    got = client.options("/v1/completions", headers=PREFLIGHT)
    assert got.status_code == 200
    assert got.headers["access-control-allow-origin"] == "https://page.example"
    assert "authorization" in got.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in got.headers
    origin = {"Origin": "https://page.example"}
    got = client.post("/v1/completions", headers=origin)
    assert got.status_code == 401
    assert got.headers["access-control-allow-origin"] == "https://page.example"
    got = client.post("/v1/completions", headers=origin | {"Authorization": f"Bearer {ONE}"})
    assert got.text == "in"
    assert "x-request-id" in got.headers["access-control-expose-headers"]


def test_another_page_may_not() -> None:
    client = guarded(cors=("https://page.example",))
    got = client.options("/v1/completions", headers=PREFLIGHT | {"Origin": "https://other"})
    assert got.status_code == 400
    assert "access-control-allow-origin" not in got.headers


@pytest.mark.parametrize(
    "origin", ["https://page.example", "http://localhost:3000", "http://[::1]:8080", "*"]
)
def test_origins_are_taken_as_browsers_send_them(origin: str) -> None:
    assert check_origins([origin]) == (origin,)


@pytest.mark.parametrize(
    "origin", ["", "page.example", "https://page.example/", "https://Page.example", "https://a b"]
)
def test_what_would_never_match_is_an_error(origin: str) -> None:
    with pytest.raises(PlatformError, match="no origin"):
        check_origins([origin])


def test_an_error_is_json_without_the_key() -> None:
    with pytest.raises(PlatformError) as caught:
        load_keys({KEYS_VARIABLE: f"{ONE},not a key"})
    assert "not a key" not in json.dumps(caught.value.to_wire())
