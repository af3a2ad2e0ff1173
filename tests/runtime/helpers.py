"""A client of a replica, and what Transformers answers to the same prompt."""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from coldframe.loader.errors import ColdframeError
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.replica.answers import TokenEvent
from coldframe.runtime.replica.replica import Replica


class Client:
    """Collects what comes back for one request."""

    def __init__(self) -> None:
        self.request = ""
        self.events: list[TokenEvent] = []
        self.error: ColdframeError | None = None

    def on_token(self, event: TokenEvent) -> None:
        assert self.error is None
        assert not self.done
        self.events.append(event)

    def on_error(self, error: ColdframeError) -> None:
        assert self.error is None
        self.error = error

    @property
    def done(self) -> bool:
        return self.error is not None or bool(self.events and self.events[-1].finish)

    @property
    def tokens(self) -> list[int]:
        # Each index once and in order: none lost, none repeated.
        assert [event.index for event in self.events] == list(range(len(self.events)))
        return [event.token for event in self.events]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)


def ask(replica: Replica, prompt: Sequence[int], count: int, **params: object) -> Client:
    """Submits a prompt for so many greedy tokens."""
    client = Client()
    sampling = SamplingParams(max_tokens=count, ignore_eos=True, **params)  # type: ignore[arg-type]
    client.request = replica.submit(sampling, client, prompt_ids=tuple(prompt))
    return client


def wait_for(replica: Replica, done: Callable[[], bool], seconds: float = 60) -> None:
    """Polls the replica until something is so; a test that waits in vain fails."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"it never came: {state_of(replica)}"
        replica.poll(0.05)


def state_of(replica: Replica) -> str:
    """What a failure is understood by."""
    told = {"loaded": replica.loaded, "error": replica.error, "staff": replica.staff}
    return str({**told, "pids": replica.pids, "facts": replica.facts})


def finish(replica: Replica, *clients: Client, seconds: float = 60) -> None:
    wait_for(replica, lambda: all(client.done for client in clients), seconds)


def prompt_of(length: int, seed: int = 0, vocab: int = 500) -> list[int]:
    """Token ids without a pattern, always the same ones."""
    state, ids = seed * 7919 + 17, []
    for _ in range(length):
        state = (state * 1103515245 + 12345) % (1 << 31)
        ids.append(5 + (state >> 8) % (vocab - 5))
    return ids


def as_safetensors_saves_it(model: Path, target: Path) -> Path:
    """The same model by the safetensors library: its data begins at any multiple of 8 bytes."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, target)
    for path in target.glob("*.safetensors"):
        tensors, note = load_file(path), ""
        while True:
            save_file(tensors, path, {"format": "pt", "note": note})
            header = int.from_bytes(path.read_bytes()[:8], "little")
            if (header + 8) % 64:
                break
            note += "x" * 8
    return target


@functools.cache
def reference(model: Path):  # type: ignore[no-untyped-def]
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()


@functools.cache
def expected(model: Path, prompt: tuple[int, ...], count: int) -> list[int]:
    """The greedy answer of Transformers."""
    import torch

    ids = torch.tensor([prompt])
    out = reference(model).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=0,
        do_sample=False,
        eos_token_id=[-1],
        pad_token_id=0,
    )
    answer: list[int] = out[0, len(prompt) :].tolist()
    return answer
