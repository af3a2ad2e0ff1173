"""Requests that go between the native engine and vLLM, and a look into vLLM's process."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coldframe.runtime.integrations.vllm.kv_pages import checksum
from coldframe.runtime.integrations.vllm.transfer import Mode, consume, prompt_of
from tests.runtime import helpers
from tests.runtime.integrations.vllm.hosts import Host
from tests.runtime.integrations.vllm.prefills import Native

MODULE = "coldframe.runtime.integrations.vllm.connector"


def transfer_config(native: Native, load: str, policy: str) -> dict:
    return {
        "kv_connector": "ColdframeConnector",
        "kv_connector_module_path": MODULE,
        "kv_role": "kv_both",
        "kv_load_failure_policy": policy,
        "kv_connector_extra_config": {"memory_service": native.path, "load": load},
    }


@contextmanager
def native_of(model: Path) -> Iterator[Native]:
    with tempfile.TemporaryDirectory(prefix="cf-") as runs:
        made = Native(model, Path(runs))
        try:
            yield made
        finally:
            made.close()


_names = iter(range(1 << 20))


class Asked:
    """A request that the native engine has prefilled, on its way into vLLM."""

    def __init__(self, native: Native, prompt: list[int], mode: Mode = "fast", **more) -> None:
        self.name = f"r{next(_names)}"
        self.handoff = native.prefill(self.name, prompt)
        self.prompt = prompt_of(self.handoff, mode)
        self.params = consume(self.handoff, mode, **more)

    def add(self, engine: Host, **sampling) -> None:
        engine.add(self.name, self.prompt, self.params, **sampling)


def fresh(length: int) -> list[int]:
    """A prompt that nobody has had."""
    return helpers.prompt_of(length, seed=next(_names) + 1000)


def plain(engine: Host, prompt: list[int], **sampling) -> list[int]:
    """What vLLM alone answers, nothing found of it from before."""
    engine.call(forget)
    return engine.generate([prompt], **sampling)[0].tokens


def counts(engine: Host) -> dict[str, int]:
    return engine.call(counted)


def nothing_is_left(engine: Host, native: Native, free: int) -> None:
    native.wait_used(0)
    assert engine.free_blocks() == free
    assert engine.call(remembered) == (0, 0)


def checksums(native: Native, asked: Asked) -> list[str]:
    found = []
    for layer in range(native.spec.layers):
        pages = native.cache.pages[list(asked.handoff.blocks), layer]
        k, v = (pages[:, i].flatten(0, 1)[: asked.handoff.kv_tokens] for i in (0, 1))
        found.append(checksum(k, v))
    return found


# -- in the engine's process -----------------------------------------------------------------------


def sides(engine):
    from coldframe.runtime.integrations.vllm.connector import connectors

    return connectors(engine)


def counted(engine):
    scheduler, worker = sides(engine)
    return dict(scheduler.tally.counts + worker.tally.counts)


def compiled(engine):
    """The backend, and how many graphs it was given or had in its cache."""
    from torch._dynamo.utils import counters

    backend = engine.vllm_config.compilation_config.backend
    return backend, counters["aot_autograd"]["total"]


def own_fingerprint(engine):
    return sides(engine)[0].fingerprint


def remembered(engine):
    schedule = sides(engine)[0]._schedule
    return len(schedule._consumers), len(schedule._outgoing)


def forget(engine):
    assert engine.reset_prefix_cache()


def preempt(engine):
    engine.engine_core.engine_core.scheduler.reset_prefix_cache(reset_running_requests=True)


def step_until(engine, request, tokens):
    """Steps until a request has so many tokens."""
    for _ in range(10_000):
        for output in engine.step():
            if len(output.outputs[0].token_ids) >= tokens:
                return
    raise AssertionError(f"{request} does not get on")


def step_some(engine, count):
    for _ in range(count):
        engine.engine_core.engine_core.step()


def settle(engine):
    """Steps until the scheduler knows of no request any more."""
    core = engine.engine_core.engine_core
    for _ in range(10_000):
        if not core.scheduler.has_requests():
            return
        core.step()
    raise AssertionError("a request is never over")


def cancel_while_loaded(engine, job, kv_transfer_params):
    """As a worker: takes a request, forgets it while its KV comes, and steps while it is busy."""
    from coldframe.runtime.integrations.vllm.engine import Engine
    from coldframe.runtime.integrations.vllm.params import ask

    worker = Engine(engine)
    hold_back(engine)
    worker.add(job.request, ask(job, (), kv_transfer_params=kv_transfer_params, mode="fast"))
    for _ in range(3):
        worker.step()
    worker.remove(job.request)
    for _ in range(3):
        worker.step()
    assert not len(worker)
    assert worker.busy
    let_through(engine)
    for _ in range(10_000):
        if not worker.busy:
            return
        assert not worker.step()
    raise AssertionError("it is busy for ever")


def run_one(engine, request):
    for _ in range(10_000):
        for output in engine.step():
            if output.finished and output.request_id == request:
                return list(output.outputs[0].token_ids)
    raise AssertionError(f"{request} is never over")


def hold_back(engine):
    """Nothing is loaded until it is let through."""
    copier = sides(engine)[1]._worker._copier
    gate, real = threading.Event(), copier._copy

    def copy(job, started):
        gate.wait(60)
        real(job, started)

    copier._copy, copier.gate = copy, (gate, real)


def let_through(engine):
    copier = sides(engine)[1]._worker._copier
    gate, real = copier.gate
    copier._copy = real
    gate.set()
