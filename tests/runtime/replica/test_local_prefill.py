"""Prompts whose rest a decode worker computes: the same answers, whatever dies or goes meanwhile.

A prompt is left to the decode worker where it would have to wait at the prefill worker. So each of
these comes behind a crowd of shorter ones, and again where the crowd was through too soon.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from coldframe.runtime.engine.saturation import SIZES
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.replica.sizing import ModelFacts, kv_blocks
from tests.runtime.helpers import Client, ask, finish, prompt_of, reference, wait_for
from tests.runtime.serving import greedy, served
from tests.runtime.snapshots import eventually

Make = Callable[..., Path]
CROWD, SHORT = 60, 20
KNOWN = 192
"""Tokens of a chat that are in KV: full blocks of its first turn, of 200."""


def options(model: Path, runs: Path, **more: object) -> ReplicaOptions:
    return ReplicaOptions(model=str(model), run_dir=str(runs), **more)  # type: ignore[arg-type]


def pid(replica: Replica, role: str) -> int:
    (found,) = [pid for name, pid in replica.pids.items() if name.startswith(role)]
    return found


class Chats:
    """Turns of one chat, each behind a crowd of so many prompts of so many tokens."""

    def __init__(self, replica: Replica, many: int = CROWD, short: int = SHORT) -> None:
        self.replica = replica
        self._many, self._short = many, short
        self.crowd: list[Client] = []
        self._asked = 0
        finish(replica, ask(replica, prompt_of(200), 1))

    def prompt(self, number: int, length: int) -> list[int]:
        """The chat, and what nobody has said yet."""
        return [*prompt_of(200), *prompt_of(length - 200, seed=50 + number)]

    def ask(self, length: int, count: int, **params: object) -> tuple[list[int], Client]:
        """The next turn."""
        self.crowd = []
        for _ in range(self._many):
            self._asked += 1
            prompt = [5 + self._asked % 400, *prompt_of(self._short - 1, seed=1000 + self._asked)]
            self.crowd.append(ask(self.replica, prompt, 1))
        self._asked += 1
        prompt = self.prompt(self._asked, length)
        return prompt, ask(self.replica, prompt, count, **params)

    def ask_decode(self, length: int, count: int, **params: object) -> tuple[list[int], Client]:
        """A turn whose rest is the decode worker's to compute; it has not begun to say anything."""
        for _ in range(50):
            before = self.replica.prefilled_by_decode
            prompt, client = self.ask(length, count, **params)
            wait_for(self.replica, partial(self._is_on_its_way, client))
            if self.replica.prefilled_by_decode > before and not client.events:
                return prompt, client
            self.replica.cancel(client.request)
            self.settle()
        raise AssertionError("none was left to the decode worker")

    def _is_on_its_way(self, client: Client) -> bool:
        """Whether it has been handed over, one way or the other."""
        found = self.replica._router._requests.get(client.request)
        return bool(client.events) or found is None or found.handoff is not None

    def settle(self) -> None:
        """Waits for the crowd."""
        finish(self.replica, *self.crowd)


def is_greedy(model: Path, prompt: Sequence[int], answer: Sequence[int]) -> bool:
    """Whether Transformers would have said each token of an answer behind those before it.

    All of them at once: to have it generate hundreds takes longer than all else here.
    """
    with torch.inference_mode():
        logits = reference(model)(torch.tensor([[*prompt, *answer]])).logits[0]
    best: list[int] = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
    return best == list(answer)


def check(model: Path, prompt: list[int], client: Client, count: int) -> None:
    assert client.error is None
    assert len(client.tokens) == count
    assert is_greedy(model, prompt, client.tokens)
    # It is told what was there before, whoever computed the rest.
    assert client.events[0].cached_tokens == KNOWN
    assert client.events[0].prompt_tokens == len(prompt)
    assert {event.cached_tokens for event in client.events[1:]} <= {0}


def settled(replica: Replica) -> bool:
    replica.ask_usage()
    return replica.usage.get("kv_used") == 0


def test_answers_are_those_of_transformers(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    with Replica(options(model, no_leaks)) as replica:
        chats = Chats(replica)
        prompt, client = chats.ask_decode(250, 12)
        finish(replica, client)
        check(model, prompt, client, 12)
        # What it computed is there for the next one.
        chats.settle()
        longer = ask(replica, [*prompt, *client.tokens, 7], 3)
        finish(replica, longer)
        assert longer.events[0].cached_tokens == (250 + 11) // 32 * 32
        assert is_greedy(model, [*prompt, *client.tokens, 7], longer.tokens)
        wait_for(replica, lambda: settled(replica))
        spans = [s for s in replica.spans if s.process.startswith("decode") and s.name == "prefill"]
        assert spans


@pytest.mark.heavy
def test_who_is_not_to_compute_does_not(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    with Replica(options(model, no_leaks, local_prefill=0)) as replica:
        chats = Chats(replica)
        for length in (201, 250):
            prompt, client = chats.ask(length, 12)
            finish(replica, client)
            check(model, prompt, client, 12)
        assert replica.prefilled_by_decode == 0


@pytest.mark.heavy
def test_long_rests_and_prompts_that_nobody_knows_are_not_left(
    demo_model: Make, no_leaks: Path
) -> None:
    model = demo_model("llama")
    with Replica(options(model, no_leaks, local_prefill=20)) as replica:
        chats = Chats(replica)
        for length in (213, 250):  # 21 tokens and more behind what is known
            prompt, client = chats.ask(length, 3)
            finish(replica, client, *chats.crowd)
            check(model, prompt, client, 3)
        crowd = [ask(replica, prompt_of(15, seed=200 + n), 2) for n in range(80)]
        finish(replica, *crowd)
        assert replica.prefilled_by_decode == 0
        prompt, client = chats.ask_decode(212, 3)
        finish(replica, client)
        check(model, prompt, client, 3)


@pytest.mark.heavy
def test_sampled_answers_are_those_without_it(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    sampling = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 3}
    with Replica(options(model, no_leaks)) as replica:
        chats = Chats(replica)
        prompt, client = chats.ask_decode(250, 30, **sampling)
        finish(replica, client, *chats.crowd)
        alone = ask(replica, prompt, 30, **sampling)
        finish(replica, alone)
        assert (client.tokens, client.text) == (alone.tokens, alone.text)


@pytest.mark.heavy
def test_running_answers_go_on_beside_it(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    with Replica(options(model, no_leaks, local_prefill=800)) as replica:
        chats = Chats(replica)
        running = [ask(replica, prompt_of(30 + n, seed=n), 300) for n in range(3)]
        wait_for(replica, lambda: all(client.events for client in running))
        prompt, client = chats.ask_decode(900, 20)
        begun = [len(other.events) for other in running]
        wait_for(replica, lambda: bool(client.events))
        # Of the 708 tokens the steps take few at a time, and each of them gives everybody a token.
        assert all(len(r.events) > n + 5 or r.done for r, n in zip(running, begun, strict=True))
        finish(replica, client, *running)
        check(model, prompt, client, 20)
        for number, other in enumerate(running):
            assert len(other.tokens) == 300
            assert is_greedy(model, prompt_of(30 + number, seed=number), other.tokens)


@pytest.mark.heavy
def test_several_decode_workers_of_one_device_share_it(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    with Replica(options(model, no_leaks, decode=2, local_prefill=800)) as replica:
        chats = Chats(replica)
        wait_for(replica, lambda: replica.staff["decode"]["up"] == 2)
        assert {worker.domain for worker in replica._router._workers.values()} == {"cpu"}
        both = [pid for name, pid in replica.pids.items() if name.startswith("decode")]
        for stopped in both:
            os.kill(stopped, signal.SIGSTOP)
        turns = [chats.ask_decode(250, 20) for _ in range(2)]
        holders = {replica._router._requests[client.request].worker for _, client in turns}
        for stopped in both:
            os.kill(stopped, signal.SIGCONT)
        # The second one is for whoever has less to do: their KV is the same.
        assert len(holders) == 2
        finish(replica, *[client for _, client in turns])
        for prompt, client in turns:
            check(model, prompt, client, 20)


@pytest.mark.heavy
def test_no_more_is_left_than_has_been_taken(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    with Replica(options(model, no_leaks)) as replica:
        chats = Chats(replica)
        finish(replica, ask(replica, prompt_of(3), 3))
        decode = pid(replica, "decode")
        os.kill(decode, signal.SIGSTOP)
        turns = [chats.ask_decode(250, 9)]
        # 58 tokens are on their way; of 64 there is no room for as many again.
        turns.append(chats.ask(250, 9))
        wait_for(replica, lambda: bool(turns[-1][1].events))
        assert replica.prefilled_by_decode == 1
        os.kill(decode, signal.SIGCONT)
        finish(replica, *[client for _, client in turns])
        for prompt, client in turns:
            check(model, prompt, client, 9)


# -- deaths and cancels -----------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize("lease_s", [30.0, 0.01])
def test_a_decode_worker_killed_before_it_begins(
    demo_model: Make, no_leaks: Path, lease_s: float
) -> None:
    model = demo_model("llama")
    with Replica(options(model, no_leaks, lease_s=lease_s)) as replica:
        chats = Chats(replica)
        finish(replica, ask(replica, prompt_of(3), 3))  # the decode worker is up
        stopped = pid(replica, "decode")
        os.kill(stopped, signal.SIGSTOP)
        prompt, client = chats.ask_decode(250, 12)
        os.kill(stopped, signal.SIGKILL)
        finish(replica, client)
        check(model, prompt, client, 12)


@pytest.mark.heavy
@pytest.mark.parametrize("lease_s", [30.0, 0.01])
def test_a_decode_worker_killed_in_the_midst(
    demo_model: Make, no_leaks: Path, lease_s: float
) -> None:
    model = demo_model("llama")
    with Replica(options(model, no_leaks, local_prefill=800, lease_s=lease_s)) as replica:
        chats = Chats(replica)
        running = ask(replica, prompt_of(30), 300)
        wait_for(replica, lambda: bool(running.events))
        for _ in range(50):
            prompt, client = chats.ask_decode(900, 12)
            found = replica._router._requests[client.request]
            victim = pid(replica, "decode")
            wait_for(replica, lambda found=found: found.acked)  # type: ignore[misc]
            if not client.events:
                break
            finish(replica, client)
        os.kill(victim, signal.SIGKILL)
        finish(replica, client, running, *chats.crowd)
        check(model, prompt, client, 12)
        assert len(running.tokens) == 300
        assert is_greedy(model, prompt_of(30), running.tokens)
        wait_for(replica, lambda: settled(replica))


@pytest.mark.heavy
def test_a_prefill_worker_killed_behind_such_a_hand_off(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    with Replica(options(model, no_leaks)) as replica:
        chats = Chats(replica)
        finish(replica, ask(replica, prompt_of(3), 3))
        decode, prefill = pid(replica, "decode"), pid(replica, "prefill")
        os.kill(decode, signal.SIGSTOP)
        prompt, client = chats.ask_decode(250, 12)
        os.kill(prefill, signal.SIGKILL)
        wait_for(replica, lambda: prefill not in replica.pids.values())
        os.kill(decode, signal.SIGCONT)
        finish(replica, client, *chats.crowd)
        check(model, prompt, client, 12)
        assert pid(replica, "decode") == decode


@pytest.mark.heavy
def test_cancels_before_it_and_in_it(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    with Replica(options(model, no_leaks, local_prefill=800)) as replica:
        chats = Chats(replica)
        running = ask(replica, prompt_of(30), 300)
        wait_for(replica, lambda: bool(running.events))
        decode = pid(replica, "decode")
        os.kill(decode, signal.SIGSTOP)
        _, before = chats.ask_decode(900, 12)
        replica.cancel(before.request)
        os.kill(decode, signal.SIGCONT)
        _, within = chats.ask_decode(900, 12)
        found = replica._router._requests[within.request]
        wait_for(replica, lambda: found.acked)
        replica.cancel(within.request)
        told = len(within.events)
        finish(replica, running, *chats.crowd)
        assert (len(before.events), len(within.events)) == (0, told)
        assert len(running.tokens) == 300
        assert is_greedy(model, prompt_of(30), running.tokens)
        wait_for(replica, lambda: settled(replica))
        # What it had computed until then is right for others.
        prompt, client = chats.ask_decode(900, 12)
        finish(replica, client)
        check(model, prompt, client, 12)


@pytest.mark.heavy
def test_blocks_that_were_lost_are_waited_for(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    block, _ = kv_blocks(ModelFacts(str(model)).spec, None)
    more = {"lease_s": 0.01, "kv_bytes": 40 * block, "local_prefill": 800}
    with Replica(options(model, no_leaks, **more)) as replica:
        chats = Chats(replica, 20, 31)
        finish(replica, ask(replica, prompt_of(3), 3))
        decode = pid(replica, "decode")
        os.kill(decode, signal.SIGSTOP)
        # Each can come to need 18 blocks, 6 of which it shares with the others. Each of them loses
        # its own before it is decoded, and then there is room for two.
        asked = []
        for _ in range(3):
            asked.append(chats.ask_decode(250, 300))
            chats.settle()
            wait_for(replica, lambda: settled(replica))
        os.kill(decode, signal.SIGCONT)
        finish(replica, *[client for _, client in asked])
        for prompt, client in asked:
            check(model, prompt, client, 300)
        wait_for(replica, lambda: settled(replica))


# -- over HTTP --------------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize("stream", [False, True])
def test_over_http_it_is_counted_and_changes_nothing(demo_model: Make, stream: bool) -> None:
    model = demo_model("llama")
    known = prompt_of(200)
    with served(model, "--max-running", 256) as server, server.openai(max_retries=0) as client:
        more = {"model": model.name, "temperature": 0, "max_tokens": 8}
        ignore = {"extra_body": {"ignore_eos": True}}
        client.completions.create(prompt=[known], **more, **ignore)
        for number in range(20):
            crowd = [[5 + n, *prompt_of(SHORT - 1, seed=100 * number + n)] for n in range(CROWD)]
            turn = [*known, *prompt_of(50, seed=7000 + number)]
            prompts = [*crowd, turn]
            texts = [""] * len(prompts)
            asked = client.completions.create(prompt=prompts, stream=stream, **more, **ignore)
            for event in asked if stream else [asked]:
                for choice in event.choices:
                    texts[choice.index] += choice.text
            assert texts[-1] == greedy(model, tuple(turn), 8)
            assert texts[0] == greedy(model, tuple(crowd[0]), 8)
            if server.metrics()["coldframe_requests_prefilled_by_decode_total"]:
                break
        else:
            raise AssertionError("none was left to the decode worker")
        eventually(lambda: server.metrics()["coldframe_prefill_batch_tokens"] in SIZES, seconds=60)
