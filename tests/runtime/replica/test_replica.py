"""Replicas of real processes: right answers while loading and after, and after any death."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from coldframe.loader.checkpoints.checkpoint import read_config
from coldframe.loader.errors import (
    CheckpointError,
    DeviceError,
    ReplicaError,
    RequestError,
    SourceChanged,
    SourceNotFound,
    UnsupportedModel,
)
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.replica import Replica
from tests.runtime.helpers import (
    Client,
    as_safetensors_saves_it,
    ask,
    expected,
    finish,
    prompt_of,
    wait_for,
)

Make = Callable[..., Path]
Hold = Callable[[Path], Path]

_PIDFD_GETFD = 438
"""The number of that call, the same on every architecture."""


def options(model: Path, runs: Path, **more: object) -> ReplicaOptions:
    return ReplicaOptions(model=str(model), run_dir=str(runs), **more)  # type: ignore[arg-type]


def size_of(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def descriptor_of(process: int, fd: int) -> int:
    """A descriptor of another process, as one of ours."""
    theirs = os.pidfd_open(process)
    try:
        ours: int = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, theirs, fd, 0)
    finally:
        os.close(theirs)
    assert ours >= 0, os.strerror(ctypes.get_errno())
    return ours


def pid(replica: Replica, role: str) -> int:
    (found,) = [p for name, p in replica.pids.items() if name.startswith(role)]
    return found


@pytest.mark.heavy
def test_a_long_prompt_is_tokenised_beside_the_others(demo_model: Make, no_leaks: Path) -> None:
    with Replica(options(demo_model(), no_leaks)) as replica:
        long, short = Client(), Client()
        replica.submit(SamplingParams(max_tokens=2), long, prompt="once upon a time " * 100_000)
        replica.submit(SamplingParams(max_tokens=2), short, prompt="once")
        wait_for(replica, lambda: short.done)
        assert long.error is None
        wait_for(replica, lambda: long.error is not None)
        assert isinstance(long.error, RequestError)


def kill_and_wait(replica: Replica, role: str) -> None:
    victim = pid(replica, role)
    os.kill(victim, signal.SIGKILL)
    wait_for(replica, lambda: victim not in replica.pids.values())


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        pytest.param("mistral", marks=pytest.mark.heavy),
        pytest.param("qwen2", marks=pytest.mark.heavy),
        pytest.param("qwen3", marks=pytest.mark.heavy),
    ],
)
def test_answers_are_those_of_transformers(demo_model: Make, no_leaks: Path, family: str) -> None:
    model = demo_model(family)
    prompts = [prompt_of(length, seed=length) for length in (1, 7, 64, 300)]
    # Slow enough that the prompts are there before the weights: prefill runs while loading.
    slow = options(model, no_leaks, throttle=size_of(model) / 1.5)
    with Replica(slow) as replica:
        loading = [ask(replica, prompt, 12) for prompt in prompts]
        finish(replica, *loading)
        loaded = [ask(replica, prompt, 12) for prompt in prompts]
        finish(replica, *loaded)
        assert replica.facts["mode"] == "copied"
    for prompt, *clients in zip(prompts, loading, loaded, strict=True):
        for client in clients:
            assert client.error is None
            assert client.tokens == expected(model, tuple(prompt), 12)


def test_cached_weights_are_mapped_and_not_copied(
    demo_model: Make, in_memory: Hold, no_leaks: Path
) -> None:
    model = in_memory(demo_model("llama"))
    with Replica(options(model, no_leaks)) as replica:
        client = ask(replica, prompt_of(7), 5)
        finish(replica, client)
        assert replica.facts["mode"] == "mapped"
        maps = Path(f"/proc/{pid(replica, 'decode')}/maps").read_text()
        assert "model-00001-of-" in maps
    assert client.tokens == expected(model, tuple(prompt_of(7)), 5)


@pytest.mark.heavy
def test_overlap_can_be_switched_off(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    slow = options(model, no_leaks, throttle=size_of(model) / 1.0, overlap=False)
    with Replica(slow) as replica:
        client = ask(replica, prompt_of(7), 5)
        finish(replica, client)
        wait_for(replica, lambda: replica.loaded)
        last_stage = max(s.end_ns for s in replica.spans if s.name.startswith("stage_ready"))
        computed = [s for s in replica.spans if s.name.startswith("prefill")]
        assert computed
        assert all(span.start_ns >= last_stage for span in computed)
    assert client.tokens == expected(model, tuple(prompt_of(7)), 5)


@pytest.mark.heavy
def test_prefill_runs_ahead_of_the_weights(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    with Replica(options(model, no_leaks, throttle=size_of(model) / 8.0)) as replica:
        finish(replica, ask(replica, prompt_of(64), 2))
        wait_for(replica, lambda: replica.loaded)
        last_stage = max(s.end_ns for s in replica.spans if s.name.startswith("stage_ready"))
        early = [s for s in replica.spans if s.name == "prefill[0]" and s.end_ns < last_stage]
        assert early


# -- deaths ---------------------------------------------------------------------------------


@pytest.mark.heavy
def test_a_prefill_worker_killed_while_loading(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    prompt = prompt_of(40)
    with Replica(options(model, no_leaks, throttle=size_of(model) / 3.0)) as replica:
        client = ask(replica, prompt, 8)
        wait_for(replica, lambda: replica.board is not None and replica.board.progress.done > 0)
        os.kill(pid(replica, "prefill"), signal.SIGKILL)
        finish(replica, client)
    assert client.tokens == expected(model, tuple(prompt), 8)


@pytest.mark.heavy
def test_a_prefill_worker_killed_between_first_token_and_acknowledgement(
    demo_model: Make, no_leaks: Path
) -> None:
    model = demo_model("llama")
    prompt = prompt_of(40)
    with Replica(options(model, no_leaks)) as replica:
        warm = ask(replica, prompt_of(3), 2)
        finish(replica, warm)
        decode = pid(replica, "decode")
        os.kill(decode, signal.SIGSTOP)
        client = ask(replica, prompt, 8)
        wait_for(replica, lambda: len(client.events) == 1)
        old = pid(replica, "prefill")
        os.kill(old, signal.SIGKILL)
        wait_for(replica, lambda: old not in replica.pids.values())
        assert len(client.events) == 1
        os.kill(decode, signal.SIGCONT)
        finish(replica, client)
        assert pid(replica, "decode") == decode
    assert client.tokens == expected(model, tuple(prompt), 8)


@pytest.mark.heavy
def test_a_decode_worker_killed_before_it_acknowledges(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    prompt = prompt_of(40)
    with Replica(options(model, no_leaks)) as replica:
        finish(replica, ask(replica, prompt_of(3), 2))
        decode = pid(replica, "decode")
        os.kill(decode, signal.SIGSTOP)
        client = ask(replica, prompt, 8)
        wait_for(replica, lambda: len(client.events) == 1)
        os.kill(decode, signal.SIGKILL)
        finish(replica, client)
    assert client.tokens == expected(model, tuple(prompt), 8)


@pytest.mark.heavy
def test_a_decode_worker_killed_in_mid_stream(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    prompts = [prompt_of(length, seed=length) for length in (5, 33, 80)]
    with Replica(options(model, no_leaks)) as replica:
        clients = [ask(replica, prompt, 300) for prompt in prompts]
        wait_for(replica, lambda: all(len(client.events) > 5 for client in clients))
        os.kill(pid(replica, "decode"), signal.SIGKILL)
        finish(replica, *clients)
    for prompt, client in zip(prompts, clients, strict=True):
        assert client.tokens == expected(model, tuple(prompt), 300)


def test_a_request_whose_kv_was_lost_is_computed_again(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    prompt = prompt_of(70)
    # The lease runs out long before another decode worker is up.
    with Replica(options(model, no_leaks, lease_s=0.01)) as replica:
        client = ask(replica, prompt, 200)
        wait_for(replica, lambda: len(client.events) > 5)
        os.kill(pid(replica, "decode"), signal.SIGKILL)
        finish(replica, client)
    assert client.tokens == expected(model, tuple(prompt), 200)


@pytest.mark.heavy
def test_sampled_text_is_the_same_after_a_death(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    sampling = {"temperature": 1.0, "top_p": 0.9, "seed": 7, "frequency_penalty": 0.3}
    with Replica(options(model, no_leaks)) as replica:
        undisturbed = ask(replica, prompt_of(20), 200, **sampling)
        finish(replica, undisturbed)
        client = ask(replica, prompt_of(20), 200, **sampling)
        wait_for(replica, lambda: len(client.events) > 5)
        os.kill(pid(replica, "decode"), signal.SIGKILL)
        finish(replica, client)
    assert client.tokens == undisturbed.tokens
    assert client.text == undisturbed.text


def test_the_memory_services_death_is_an_error(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    with Replica(options(model, no_leaks, throttle=size_of(model) / 20.0)) as replica:
        client = ask(replica, prompt_of(20), 8)
        wait_for(replica, lambda: replica.board is not None)
        os.kill(pid(replica, "memory"), signal.SIGKILL)
        finish(replica, client, seconds=20)
        assert isinstance(client.error, ReplicaError)
        assert "memory service" in str(client.error)
        with pytest.raises(ReplicaError):
            ask(replica, prompt_of(3), 2)


@pytest.mark.heavy
def test_no_worker_is_started_for_a_memory_service_that_is_dying(
    demo_model: Make, no_leaks: Path
) -> None:
    """A dying process closes its sockets in any order: the front's may be the last."""
    model = demo_model("llama")
    with Replica(options(model, no_leaks, throttle=size_of(model) / 20.0)) as replica:
        client = ask(replica, prompt_of(20), 8)
        wait_for(replica, lambda: replica.board is not None)
        wait_for(replica, lambda: all(w.up for w in replica._workforce.workers.values()))
        before, service = set(replica.pids), pid(replica, "memory")
        held = descriptor_of(service, 3)  # its end of the front's socket
        os.kill(service, signal.SIGKILL)
        threading.Timer(0.3, os.close, [held]).start()
        finish(replica, client, seconds=20)
        assert "the memory service died" in str(client.error)
        assert set(replica.pids) <= before


def test_workers_that_die_again_and_again_end_the_replica(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    with Replica(options(model, no_leaks, throttle=size_of(model) / 60.0)) as replica:
        client = ask(replica, prompt_of(20), 8)
        other = ask(replica, prompt_of(20), 8)
        wait_for(replica, lambda: replica.board is not None)  # they have been given to workers
        for _ in range(4):
            kill_and_wait(replica, "prefill")
        finish(replica, client, other)
        for failed in (client, other):
            assert isinstance(failed.error, ReplicaError)
            assert "under this request again and again" in str(failed.error)
            assert "SIGKILL" in str(failed.error)
        assert replica.error is None
        late = ask(replica, prompt_of(20), 8)
        for _ in range(3):
            kill_and_wait(replica, "decode")
        finish(replica, late)
        assert replica.error is late.error is not None
        assert "workers die again and again" in str(late.error)


# -- requests -------------------------------------------------------------------------------


def test_the_ends_that_generation_config_names_end_an_answer(
    demo_model: Make, tmp_path: Path, no_leaks: Path
) -> None:
    answer = expected(demo_model("llama"), tuple(prompt_of(9)), 6)
    model = tmp_path / "model"
    shutil.copytree(demo_model("llama"), model)
    file = model / "generation_config.json"
    # As Llama 3 Instruct has it: the end of a turn is in this file alone.
    file.write_text(json.dumps({"eos_token_id": [1, answer[2]]}))
    with Replica(options(model, no_leaks)) as replica:
        client = Client()
        replica.submit(SamplingParams(max_tokens=6), client, prompt_ids=tuple(prompt_of(9)))
        finish(replica, client)
    assert client.tokens == answer[: answer.index(answer[2]) + 1]
    assert client.events[-1].finish == "stop"


@pytest.mark.heavy
def test_the_stored_dtype_counts_where_the_config_names_another(
    demo_model: Make, tmp_path: Path, no_leaks: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(demo_model("llama"), model)
    config = json.loads((model / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = "bfloat16"
    (model / "config.json").write_text(json.dumps(config))
    with Replica(options(model, no_leaks)) as replica:
        client = ask(replica, prompt_of(9), 6)
        finish(replica, client)
        assert replica.spec.dtype == "F32"
    assert client.tokens == expected(demo_model("llama"), tuple(prompt_of(9)), 6)


def test_bad_requests_fail_alone(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    with Replica(options(model, no_leaks)) as replica:
        good = ask(replica, prompt_of(9), 6)
        bad = {
            "out of range": ask(replica, [1, 2, 10**6], 4),
            "negative": ask(replica, [-1], 4),
            "too long": ask(replica, prompt_of(100_000), 4),
            "too many": ask(replica, prompt_of(9), 10**6),
            "empty": ask(replica, [], 4),
            "temperature": ask(replica, prompt_of(9), 4, temperature=-1.0),
        }
        finish(replica, good, *bad.values())
        for name, client in bad.items():
            assert isinstance(client.error, RequestError), name
            assert client.events == []
    assert good.tokens == expected(model, tuple(prompt_of(9)), 6)


def test_requests_wait_for_kv_and_are_all_answered(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    block = ModelSpec.from_config(read_config(str(model))).kv_block_bytes(4)
    with Replica(options(model, no_leaks, kv_bytes=3 * block)) as replica:
        prompts = [prompt_of(30, seed=seed) for seed in range(5)]
        clients = [ask(replica, prompt, 20) for prompt in prompts]  # two blocks each
        too_large = ask(replica, prompt_of(80), 20)
        finish(replica, too_large, *clients)
    assert isinstance(too_large.error, RequestError)
    assert "more KV than there is" in str(too_large.error)
    for prompt, client in zip(prompts, clients, strict=True):
        assert client.tokens == expected(model, tuple(prompt), 20)


def test_kv_memory_for_less_than_one_block_is_refused(demo_model: Make, no_leaks: Path) -> None:
    with pytest.raises(DeviceError, match="not one block"):
        Replica(options(demo_model("llama"), no_leaks, kv_bytes=100))


def test_kv_memory_beyond_what_there_is_is_refused(demo_model: Make, no_leaks: Path) -> None:
    with pytest.raises(DeviceError, match="larger than what is available"):
        Replica(options(demo_model("llama"), no_leaks, kv_bytes=10**15))


def test_what_is_in_use_can_be_asked_for(demo_model: Make, no_leaks: Path) -> None:
    with Replica(options(demo_model("llama"), no_leaks)) as replica:
        client = ask(replica, prompt_of(20), 400)
        wait_for(replica, lambda: len(client.events) > 3)
        replica.ask_usage()
        wait_for(replica, lambda: replica.usage.get("kv_used", 0) > 0)
        total = replica.usage["kv_total"]
        assert replica.usage["kv_used"] < total
        assert replica.usage["bytes_done"] == replica.facts["weights_bytes"]
        replica.cancel(client.request)
        while replica.usage["kv_used"]:  # the worker lets go between two steps
            replica.ask_usage()
            replica.poll(0.1)
        assert replica.usage["kv_total"] == total


def test_cancelled_requests_free_what_they_had(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    with Replica(options(model, no_leaks)) as replica:
        finish(replica, ask(replica, prompt_of(3), 2))
        for _ in range(3):
            client = ask(replica, prompt_of(20), 400)
            wait_for(replica, lambda c=client: len(c.events) > 3)  # type: ignore[misc]
            seen = len(client.events)
            replica.cancel(client.request)
            replica.poll(0.1)
            assert len(client.events) == seen
        again = ask(replica, prompt_of(20), 6)
        finish(replica, again)
    assert again.tokens == expected(model, tuple(prompt_of(20)), 6)


@pytest.mark.parametrize("role", [pytest.param("prefill", marks=pytest.mark.heavy), "decode"])
def test_a_worker_whose_mapped_file_is_cut_means_a_start_with_a_copy(
    role: str, demo_model: Make, in_memory: Hold, no_leaks: Path
) -> None:
    model = in_memory(demo_model("llama"))
    with Replica(options(model, no_leaks)) as replica:
        wait_for(replica, lambda: replica.loaded)
        assert replica.facts["mode"] == "mapped"
        client = ask(replica, prompt_of(12), 60)
        wait_for(replica, lambda: len(client.events) > 4)
        before = replica.pids
        os.kill(next(pid for name, pid in before.items() if name.startswith(role)), signal.SIGBUS)
        # The answer may be there before that death is heard of.
        wait_for(replica, lambda: replica.facts.get("mode") == "copied")
        finish(replica, client)
        assert "shrank" in replica.facts["restarted"]
        assert not set(before.values()) & set(replica.pids.values())
        again = ask(replica, prompt_of(5), 4)
        finish(replica, again)
    assert client.tokens == expected(model, tuple(prompt_of(12)), 60)
    assert again.tokens == expected(model, tuple(prompt_of(5)), 4)


# -- what cannot be served ----------------------------------------------------------------------


def test_a_missing_model_is_not_found(tmp_path: Path, no_leaks: Path) -> None:
    with pytest.raises(SourceNotFound):
        Replica(options(tmp_path / "nowhere", no_leaks))


def test_an_unsupported_model_is_refused_by_name(
    demo_model: Make, tmp_path: Path, no_leaks: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(demo_model("llama"), model)
    config = json.loads((model / "config.json").read_text())
    config["architectures"] = ["MixtralForCausalLM"]
    config["model_type"] = "mixtral"
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="mixture of experts"):
        Replica(options(model, no_leaks))


def test_a_broken_checkpoint_is_refused_by_its_file(
    demo_model: Make, tmp_path: Path, no_leaks: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(demo_model("llama"), broken)
    shard = sorted(broken.glob("*.safetensors"))[-1]
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=shard.name):
        Replica(options(broken, no_leaks))


@pytest.mark.heavy
def test_a_shard_that_shrinks_while_it_is_read_ends_the_replica(
    demo_model: Make, tmp_path: Path, no_leaks: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(demo_model("llama"), model)
    shard = sorted(model.glob("*.safetensors"))[-1]
    with Replica(options(model, no_leaks, throttle=size_of(model) / 5.0)) as replica:
        client = ask(replica, prompt_of(5), 2)
        wait_for(replica, lambda: replica.board is not None and replica.board.progress.done > 0)
        os.truncate(shard, shard.stat().st_size - 100)
        finish(replica, client)
        assert isinstance(client.error, SourceChanged)
        assert shard.name in str(client.error)
        assert client.events == []


def test_nothing_is_left_when_the_parent_is_killed(
    demo_model: Make, no_leaks: Path, tmp_path: Path
) -> None:
    import subprocess
    import sys

    code = (
        "import sys, time\n"
        "from coldframe.runtime.options import ReplicaOptions\n"
        "from coldframe.runtime.replica.replica import Replica\n"
        "r = Replica(ReplicaOptions(model=sys.argv[1], run_dir=sys.argv[2], throttle=1e5))\n"
        "while r.board is None: r.poll(0.05)\n"
        "print(*r.pids.values(), flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(demo_model("llama")), str(no_leaks)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 3
    children = [psutil.Process(p) for p in pids]
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []


# -- weights laid out anew behind the first token -------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize("copy", [False, True])
def test_weights_are_laid_out_anew_in_the_middle_of_an_answer(
    copy: bool, demo_model: Make, tmp_path: Path, no_leaks: Path
) -> None:
    model = as_safetensors_saves_it(demo_model("qwen2"), tmp_path / "model")
    with Replica(options(model, no_leaks, copy=copy, realign=True)) as replica:
        client = ask(replica, prompt_of(12), 600)
        wait_for(replica, lambda: "laid out anew" in (replica.facts.get("why") or ""))
        assert 0 < len(client.events) < 600
        finish(replica, client)
        again = ask(replica, prompt_of(70), 8)
        finish(replica, again)
        assert any(span.name == "realign" for span in replica.spans)
        # A worker that comes later finds the weights where they are now.
        os.kill(next(iter(replica.pids[n] for n in replica.pids if "decode" in n)), signal.SIGKILL)
        late = ask(replica, prompt_of(9), 8)
        finish(replica, late)
    assert client.tokens == expected(model, tuple(prompt_of(12)), 600)
    assert again.tokens == expected(model, tuple(prompt_of(70)), 8)
    assert late.tokens == expected(model, tuple(prompt_of(9)), 8)


@pytest.mark.heavy
def test_weights_stay_where_they_are_if_wanted(
    demo_model: Make, in_memory: Hold, tmp_path: Path, no_leaks: Path
) -> None:
    model = in_memory(as_safetensors_saves_it(demo_model("llama"), tmp_path / "model"))
    with Replica(options(model, no_leaks)) as replica:
        client = ask(replica, prompt_of(5), 30)
        finish(replica, client)
        wait_for(replica, lambda: replica.loaded)
        assert replica.facts["mode"] == "mapped"
        assert not any(span.name == "realign" for span in replica.spans)
