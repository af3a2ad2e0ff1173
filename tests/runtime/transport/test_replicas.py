"""Two replicas: one makes first tokens and gives its requests away, the other goes on with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from coldframe.loader.errors import TransferRefused
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.options import ReplicaOptions, TransferOptions
from coldframe.runtime.replica import Replica
from coldframe.runtime.scale_spec import Scale
from coldframe.runtime.transport.base import Given
from tests.runtime.helpers import Client, expected, finish, prompt_of, wait_for

SECRET = "the secret of these two replicas"
COUNT = 12
Make = Callable[..., Path]


class Giver(Client):
    """A client whose request is given away."""

    given: Given | None = None

    def on_given(self, given: Given) -> None:
        assert self.given is None
        self.given = given


@pytest.fixture
def model(demo_model: Make) -> Path:
    return demo_model("llama")


@pytest.fixture
def pair(
    model: Path, no_leaks: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[Replica, Replica]]]:
    monkeypatch.setenv("COLDFRAME_KV_SECRET", SECRET)
    with ExitStack() as stack:

        def start(*ways: str, ttl_s: float = 30.0) -> tuple[Replica, Replica]:
            transfer = TransferOptions("127.0.0.1:0", None, ways or ("shared", "tcp"), ttl_s=ttl_s)
            common = {"run_dir": str(no_leaks), "transfer": transfer, "threads": 1}
            none = Scale(0, 0)
            gives = ReplicaOptions(str(model), decode=none, local_prefill=0, **common)  # type: ignore[arg-type]
            takes = ReplicaOptions(str(model), prefill=none, **common)  # type: ignore[arg-type]
            first = stack.enter_context(Replica(gives))
            second = stack.enter_context(Replica(takes))
            for replica in (first, second):
                replica.run_until(lambda replica=replica: replica.known and replica.loaded)  # type: ignore[misc]
            return first, second

        yield start


def give(replica: Replica, prompt: list[int], **params: object) -> Giver:
    client = Giver()
    sampling = SamplingParams(max_tokens=COUNT, ignore_eos=True, **params)  # type: ignore[arg-type]
    client.request = replica.submit(sampling, client, prompt_ids=tuple(prompt), give=True)
    wait_for(replica, lambda: client.given is not None or client.error is not None)
    assert client.error is None
    return client


def take(
    replica: Replica, prompt: list[int], given: Given, *, behind: bool = True, **params: object
) -> Client:
    client = Client()
    sampling = SamplingParams(max_tokens=COUNT, ignore_eos=True, **params)  # type: ignore[arg-type]
    first = given.first if behind else ()
    client.request = replica.submit(
        sampling, client, prompt_ids=tuple(prompt), generated_ids=first, kv=given
    )
    return client


def handoffs(replica: Replica) -> list[str | None]:
    return [span.note for span in replica.spans if span.name == "handoff"]


@pytest.mark.parametrize("way", ["shared", "tcp"])
def test_the_answer_goes_on_elsewhere(
    way: str, model: Path, pair: Callable[..., tuple[Replica, Replica]]
) -> None:
    first, second = pair(way)
    for length in (1, 32, 77):
        prompt = prompt_of(length, seed=length)
        client = give(first, prompt)
        assert client.given is not None
        assert Given.from_params(client.given.to_params()) == client.given
        assert [event.token for event in client.events] == list(client.given.first)
        behind = take(second, prompt, client.given)
        finish(second, behind)
        assert behind.error is None
        tokens = [*client.given.first, *(event.token for event in behind.events)]
        assert tokens == expected(model, tuple(prompt), COUNT)
        assert [event.index for event in behind.events] == list(range(1, COUNT))
        # Two requests may not be told apart by what they begin with: the next one is not either.
        wait_for(first, lambda: first.given == 0)
    wait_for(second, lambda: len(handoffs(second)) == 3)
    assert handoffs(second) == ["from another replica"] * 3
    assert not any(span.name == "prefill" for span in second.spans)


def test_the_first_token_can_be_made_anew(
    model: Path, pair: Callable[..., tuple[Replica, Replica]]
) -> None:
    first, second = pair("shared")
    prompt = prompt_of(64, seed=3)
    client = give(first, prompt, temperature=1.0)
    assert client.given is not None
    again = take(
        second, prompt, client.given, behind=False, temperature=1.0, seed=client.given.seed
    )
    finish(second, again)
    assert again.tokens[0] == client.given.first[0]
    assert len(again.tokens) == COUNT


def test_kv_that_is_gone_is_computed_again(
    model: Path, pair: Callable[..., tuple[Replica, Replica]]
) -> None:
    first, second = pair("tcp", ttl_s=0.2)
    prompt = prompt_of(50, seed=4)
    client = give(first, prompt)
    assert client.given is not None
    wait_for(first, lambda: first.given == 0)
    behind = take(second, prompt, client.given)
    finish(second, behind)
    tokens = [*client.given.first, *(event.token for event in behind.events)]
    assert tokens == expected(model, tuple(prompt), COUNT)
    wait_for(second, lambda: len(handoffs(second)) == 1)
    (note,) = handoffs(second)
    assert note is not None
    assert note.startswith("computed again: there is no such KV")


def test_a_request_can_be_taken_back(pair: Callable[..., tuple[Replica, Replica]]) -> None:
    first, _ = pair("shared")
    client = give(first, prompt_of(40, seed=5))
    assert first.given == 1
    first.cancel(client.request)
    wait_for(first, lambda: first.given == 0)

    def free() -> bool:
        first.ask_usage()
        return first.usage.get("kv_used", 1) == 0

    wait_for(first, free)


def test_kv_of_another_prompt_is_not_used(pair: Callable[..., tuple[Replica, Replica]]) -> None:
    first, second = pair("shared")
    client = give(first, prompt_of(40, seed=6))
    assert client.given is not None
    with pytest.raises(TransferRefused, match="other tokens"):
        take(second, prompt_of(40, seed=7), client.given)


def test_a_replica_that_only_decodes_answers_by_itself(
    model: Path, pair: Callable[..., tuple[Replica, Replica]]
) -> None:
    _, second = pair("shared")
    prompt = prompt_of(70, seed=8)
    client = Client()
    params = SamplingParams(max_tokens=COUNT, ignore_eos=True)
    client.request = second.submit(params, client, prompt_ids=tuple(prompt))
    finish(second, client)
    assert client.tokens == expected(model, tuple(prompt), COUNT)
