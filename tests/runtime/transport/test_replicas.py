"""Two replicas: one makes first tokens and gives its requests away, the other goes on with them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from coldframe.loader.errors import TransferRefused
from coldframe.loader.transport.usage import TakeUsage
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.options import ReplicaOptions, TransferOptions
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.replica.scale_spec import Scale
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


@pytest.fixture(scope="module")
def model(demo_model: Make) -> Path:
    return demo_model("llama")


@pytest.fixture(scope="module")
def pair(model: Path) -> Iterator[tuple[Replica, Replica]]:
    """One that only makes first tokens, and one that only decodes."""
    runs = Path(tempfile.mkdtemp(prefix="cf-"))
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv("COLDFRAME_KV_SECRET", SECRET)
        common = {
            "run_dir": str(runs),
            "transfer": TransferOptions("127.0.0.1:0"),
            "threads": 1,
        }
        none = Scale(0, 0)
        gives = ReplicaOptions(str(model), decode=none, local_prefill=0, **common)  # type: ignore[arg-type]
        takes = ReplicaOptions(str(model), prefill=none, **common)  # type: ignore[arg-type]
        first = stack.enter_context(Replica(gives))
        second = stack.enter_context(Replica(takes))
        for replica in (first, second):
            replica.run_until(lambda replica=replica: replica.known and replica.loaded)  # type: ignore[misc]
        yield first, second
    assert list(runs.iterdir()) == []
    runs.rmdir()


def by(way: str, given: Given) -> Given:
    """The same with one way to its KV."""
    assert given.ticket is not None
    ways = tuple(found for found in given.ticket.ways if found.transport == way)
    assert len(ways) == 1
    return replace(given, ticket=replace(given.ticket, ways=ways))


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


def tickets(replica: Replica) -> tuple[int, int, int]:
    """Of requests that came with a ticket: taken, lost, and bytes taken."""
    for _ in range(2):  # the first answer may be one to a question from before
        before = replica.usage
        replica.ask_usage()
        wait_for(replica, lambda before=before: replica.usage is not before)  # type: ignore[misc]
    taken, lost, nbytes = (replica.usage[name] for name in TakeUsage.names())
    return taken, lost, nbytes


def handoffs(replica: Replica) -> list[str | None]:
    return [span.note for span in replica.spans if span.name == "handoff"]


@pytest.mark.parametrize("way", ["shared", "tcp"])
def test_the_answer_goes_on_elsewhere(way: str, model: Path, pair: tuple[Replica, Replica]) -> None:
    first, second = pair
    before = len(handoffs(second))
    taken, lost, nbytes = tickets(second)
    for length in (1, 32, 77):
        prompt = prompt_of(length, seed=length + len(way))
        client = give(first, prompt)
        assert client.given is not None
        assert Given.from_params(client.given.to_params()) == client.given
        assert [event.token for event in client.events] == list(client.given.first)
        behind = take(second, prompt, by(way, client.given))
        finish(second, behind)
        assert behind.error is None
        tokens = [*client.given.first, *(event.token for event in behind.events)]
        assert tokens == expected(model, tuple(prompt), COUNT)
        assert [event.index for event in behind.events] == list(range(1, COUNT))
        wait_for(first, lambda: first.given == 0)
    wait_for(second, lambda: len(handoffs(second)) == before + 3)
    assert handoffs(second)[before:] == ["from another replica"] * 3
    after = tickets(second)
    assert after[:2] == (taken + 3, lost)
    # Blocks of 32 tokens: one, one and three.
    assert (after[2] - nbytes) % 5 == 0
    assert after[2] > nbytes
    assert not any(span.name == "prefill" for span in second.spans)


def test_the_first_token_can_be_made_anew(pair: tuple[Replica, Replica]) -> None:
    first, second = pair
    prompt = prompt_of(64, seed=3)
    client = give(first, prompt, temperature=1.0)
    assert client.given is not None
    again = take(
        second, prompt, client.given, behind=False, temperature=1.0, seed=client.given.seed
    )
    finish(second, again)
    assert again.tokens[0] == client.given.first[0]
    assert len(again.tokens) == COUNT


@pytest.mark.parametrize("way", ["shared", "tcp"])
def test_kv_that_is_gone_is_computed_again(
    way: str, model: Path, pair: tuple[Replica, Replica]
) -> None:
    first, second = pair
    before = len(handoffs(second))
    taken, lost, nbytes = tickets(second)
    prompt = prompt_of(50, seed=4 + len(way))
    client = give(first, prompt)
    assert client.given is not None
    first.cancel(client.request)
    wait_for(first, lambda: first.given == 0)
    behind = take(second, prompt, by(way, client.given))
    finish(second, behind)
    tokens = [*client.given.first, *(event.token for event in behind.events)]
    assert tokens == expected(model, tuple(prompt), COUNT)
    wait_for(second, lambda: len(handoffs(second)) == before + 1)
    note = handoffs(second)[-1]
    assert note is not None
    assert note.startswith("computed again: there is no such KV")
    assert tickets(second) == (taken, lost + 1, nbytes)


def test_a_request_can_be_taken_back(pair: tuple[Replica, Replica]) -> None:
    first, _ = pair
    client = give(first, prompt_of(40, seed=5))
    assert first.given == 1
    first.cancel(client.request)
    wait_for(first, lambda: first.given == 0)

    def free() -> bool:
        first.ask_usage()
        return first.usage.get("kv_used", 1) == 0

    wait_for(first, free)


def test_kv_of_another_prompt_is_not_used(pair: tuple[Replica, Replica]) -> None:
    first, second = pair
    client = give(first, prompt_of(40, seed=6))
    assert client.given is not None
    with pytest.raises(TransferRefused, match="other tokens"):
        take(second, prompt_of(40, seed=7), client.given)
    first.cancel(client.request)


def test_a_request_of_another_model_is_refused(pair: tuple[Replica, Replica]) -> None:
    first, second = pair
    prompt = prompt_of(40, seed=9)
    client = give(first, prompt)
    assert client.given is not None
    other = take(second, prompt, replace(client.given, fingerprint="0" * 64))
    wait_for(second, lambda: other.error is not None)
    assert isinstance(other.error, TransferRefused)
    assert "another model" in str(other.error)
    first.cancel(client.request)
    mine = take(second, prompt, client.given)  # and the worker goes on
    finish(second, mine)
    assert mine.error is None


def test_who_leaves_while_kv_is_on_its_way_leaves_nothing(pair: tuple[Replica, Replica]) -> None:
    first, second = pair
    clients = []
    for seed in range(10, 16):
        prompt = prompt_of(90, seed=seed)
        client = give(first, prompt)
        assert client.given is not None
        clients.append(take(second, prompt, client.given))
    for client in clients:
        second.cancel(client.request)

    def free() -> bool:
        second.ask_usage()
        return second.usage.get("kv_used", 1) == 0

    wait_for(second, free)


def test_a_replica_that_only_decodes_answers_by_itself(
    model: Path, pair: tuple[Replica, Replica]
) -> None:
    _, second = pair
    prompt = prompt_of(70, seed=8)
    client = Client()
    params = SamplingParams(max_tokens=COUNT, ignore_eos=True)
    client.request = second.submit(params, client, prompt_ids=tuple(prompt))
    finish(second, client)
    assert client.tokens == expected(model, tuple(prompt), COUNT)
