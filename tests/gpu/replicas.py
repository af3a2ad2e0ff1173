"""Replicas on a GPU, and what Transformers computes there."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from coldframe.loader.wire import Channel
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.replica import Replica
from tests.runtime.helpers import wait_for

_ARRIVES_S = 6.0
"""Seconds that weights are on their way: more than a worker takes that has its libraries, with its
context and the first uses of the GPU."""
_HEARD_S = 10.0


def options(model: Path, runs: Path, device: str, **more: Any) -> ReplicaOptions:
    """A replica for which no CPU stands in."""
    return ReplicaOptions(model=str(model), run_dir=str(runs), device=device, **more)


@contextmanager
def arriving(model: Path, runs: Path, device: str) -> Iterator[Replica]:
    """A replica whose weights come slowly, from now on: its workers have their libraries.

    Without that they would come up when everything is in: on a GPU their libraries take longer.
    """
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    told = options(model, runs, device, hold_load=True, throttle=size / _ARRIVES_S)
    with Replica(told) as replica:
        wait_for(replica, lambda: replica.imported)
        replica.start_load()
        yield replica


def began_while_loading(replica: Replica) -> bool:
    """Whether the first layer was computed before the last weight was in; waits for both."""

    def moments(name: str) -> list[tuple[int, int]]:
        return [(s.start_ns, s.end_ns) for s in replica.spans if s.name.startswith(name)]

    wait_for(replica, lambda: replica.loaded and bool(moments("prefill[0]")))
    wait_for(replica, lambda: bool(moments("stage_ready[")))
    return min(moments("prefill[0]"))[0] < max(end for _, end in moments("stage_ready["))


def pid_of(replica: Replica, role: str) -> int:
    (found,) = [pid for name, pid in replica.pids.items() if name.startswith(role)]
    return found


def expect_kv_in_pieces(replica: Replica, count: int) -> None:
    """Comes as a worker would, and is given KV's memory in so many pieces at least.

    Raises:
        TimeoutError: They are fewer.
    """
    with closing(Channel.connect(os.path.join(replica.run_dir, "memory.sock"))) as channel:
        channel.send({"type": "hello", "name": "test"})
        while count > 0:
            message = channel.recv(_HEARD_S)
            assert message is not None, "the memory service has hung up"
            for fd in message.fds:
                os.close(fd)
            if message.kind in ("kv", "kv_grown"):
                count -= len(message.fds)
        for message in channel.buffered():
            for fd in message.fds:
                os.close(fd)


def beside(device: str) -> str:
    """Where Transformers computes: on the same GPU, or where COLDFRAME_TEST_BESIDE says."""
    return os.environ.get("COLDFRAME_TEST_BESIDE", device)


@functools.cache
def reference(model: Path, device: str, dtype: str) -> Any:
    """Transformers' model on the GPU; its float32 is exact, not tf32."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.backends.cuda.matmul.allow_tf32 = False
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    return loaded.eval().to(beside(device))


@functools.cache
def expected(model: Path, device: str, prompt: tuple[int, ...], count: int) -> list[int]:
    """The greedy answer of Transformers in float32."""
    import torch

    ids = torch.tensor([prompt], device=beside(device))
    out = reference(model, device, "float32").generate(
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


def logprobs(
    model: Path, device: str, dtype: str, prompt: Sequence[int], answer: Sequence[int]
) -> list[float]:
    """What Transformers gives to each token of an answer, the ones before it given."""
    import torch

    ids = torch.tensor([[*prompt, *answer]], device=beside(device))
    with torch.inference_mode():
        logits = reference(model, device, dtype)(ids).logits[0, len(prompt) - 1 : -1]
    rows = logits.double().log_softmax(-1)
    found: list[float] = rows[range(len(answer)), list(answer)].tolist()
    return found
