"""What a request is told behind replicas that have died under it."""

from __future__ import annotations

import pytest

from coldframe.loader.errors import ColdframeError, DeviceLost, ReplicaError
from coldframe.runtime.endpoint.asks import Asks
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.replica.answers import TokenEvent
from tests.runtime.helpers import Client

TOKEN = TokenEvent(0, 5, "a", None, None, ())


@pytest.fixture
def asks() -> Asks:
    return Asks(lambda: True)


def asked(asks: Asks) -> Client:
    client = Client()
    client.request = asks.add(
        SamplingParams(), client, prompt="a", prompt_ids=None, add_special=True
    )
    return client


def test_one_that_replicas_die_under_is_given_up_with_an_error_of_its_own(asks: Asks) -> None:
    client = asked(asks)
    died = ReplicaError("the memory service died")
    for _ in range(2):
        asks.lose(died, for_good=False)
        assert client.error is None
    asks.lose(died, for_good=False)
    # Else whoever has passed it on would try it elsewhere.
    assert client.error is not died
    assert client.error is not None
    assert client.error.what == "replicas die under this request again and again"
    assert client.error.got == died.what
    assert len(asks) == 0


@pytest.mark.parametrize(
    ("error", "for_good"), [(ReplicaError("it died"), True), (DeviceLost("it is gone"), False)]
)
def test_what_is_no_matter_of_the_request_is_told_as_it_is(
    asks: Asks, error: ColdframeError, for_good: bool
) -> None:
    client = asked(asks)
    asks.lose(error, for_good=for_good)
    assert client.error is error


def test_one_with_tokens_can_go_on_with_somebody_else_alone(asks: Asks) -> None:
    client = asked(asks)
    asks._open[client.request].on_token(TOKEN)
    died = ReplicaError("it died")
    asks.lose(died, for_good=False)
    assert client.error is died
