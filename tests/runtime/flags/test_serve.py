"""What `coldframe serve` says to values that cannot be, before any of it reaches a process."""

from __future__ import annotations

import pytest

from coldframe.loader.errors import RequestError
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.flags.serve import add_arguments, policy_for, settings_for
from coldframe.runtime.gateway.platforms.table import by_name
from coldframe.runtime.gateway.settings import GatewaySettings


def settings(*arguments: str) -> GatewaySettings:
    parser = Parser()
    add_arguments(parser)
    return settings_for(parser.parse(["m", *arguments]), by_name("generic"), ("m",))


def test_what_they_say() -> None:
    found = settings("--max-running", "3", "--max-wait", "2.5", "--drain", "7", "--park", "0")
    assert (found.max_running, found.max_wait_s, found.drain_s) == (3, 2.5, 7)


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("--max-running", ("0", "-1")),
        ("--max-waiting", ("0",)),
        ("--max-wait", ("0", "inf", "nan")),
        ("--drain", ("0", "-1", "inf", "nan")),
        ("--idle", ("0", "inf", "nan")),
        ("--park", ("-1", "inf", "nan")),
        ("--pool", ("-1",)),
        ("--budget", ("0", "-1", "inf", "nan")),
        ("--policy", ("best", "histogram:", "histogram:bin=0", "next:penalty=x", "fixed:-1")),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(flag: str, values: tuple[str, ...]) -> None:
    for value in values:
        with pytest.raises(RequestError) as raised:
            settings(flag, value)
        assert raised.value.where == flag


def test_who_keeps_a_pool_never_ends_for_want_of_requests() -> None:
    assert settings("--on-idle", "exit").models == settings("--pool", "1").models
    with pytest.raises(RequestError, match="--on-idle exit"):
        settings("--pool", "1", "--on-idle", "exit")


@pytest.mark.parametrize("flag", ["--idle", "--park", "--pool"])
@pytest.mark.parametrize("policy", ["histogram", "next:penalty=5", "fixed:60,600"])
def test_what_is_the_fixed_policys_is_refused_beside_another(flag: str, policy: str) -> None:
    assert settings("--policy", "fixed", flag, "3").models == ("m",)
    with pytest.raises(RequestError, match="--policy fixed alone") as raised:
        settings("--policy", policy, flag, "3")
    assert raised.value.where == flag


def test_each_model_has_a_policy_of_its_own() -> None:
    parser = Parser()
    add_arguments(parser)
    for text in ("fixed", "fixed:60,600", "histogram:bin=60", "next"):
        make = policy_for(parser.parse(["m", "--policy", text, "--budget", "60"]))
        assert make().name == text.partition(":")[0]
        assert make() is not make()
    pooled = policy_for(parser.parse(["m", "--idle", "5", "--pool", "1"]))()
    assert pooled.idle(0.0).steps == ((0.0, "warm"), (5.0, "parked"))
