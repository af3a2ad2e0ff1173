"""vLLM alone with `--load-format coldframe`: its command, and weights from everywhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import botocore.session
import pytest

from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.replica import Replica
from tests.loader.web.moto_server import isolate, moto, upload
from tests.loader.web.servers import nginx
from tests.runtime.helpers import ask, expected, finish, wait_for
from tests.runtime.integrations.vllm.hosts import Answer, Host, HostError, host
from tests.runtime.integrations.vllm.memories import memory_of
from tests.runtime.integrations.vllm.vllm_servers import vllm_serve

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

Make = Callable[..., Path]
PROMPTS = [[5, 6, 7], [8, 9], list(range(20, 60))]
TOKENS = 12
PEER_TOKEN = "correct-horse"
FLAGS = ("--dtype", "float32", "--enforce-eager")


@pytest.fixture(scope="module")
def model(demo_model: Make) -> Path:
    return demo_model()


@pytest.fixture(scope="module")
def plain(model: Path) -> list[Answer]:
    """What vLLM's own loader makes of the model."""
    with host(model, dtype="float32") as engine:
        return engine.generate(PROMPTS, max_tokens=TOKENS)


@pytest.fixture
def empty(model: Path, tmp_path: Path) -> Path:
    """All that vLLM has of the model itself: no weights."""
    ignore = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(model, tmp_path / "empty", ignore=ignore))


def check(complete: Callable[[list[int], int], list[int]], plain: list[Answer]) -> None:
    assert [complete(prompt, TOKENS) for prompt in PROMPTS] == [one.tokens for one in plain]


def test_the_command_with_weights_from_a_web_server(
    model: Path, empty: Path, plain: list[Answer]
) -> None:
    with nginx(model.parent) as base:
        extra = {"source": f"{base}/{model.name}", "gated": True}
        more = ("--kv-cache-memory-bytes", "256M")
        with vllm_serve(empty, *FLAGS, *more, extra=extra) as server:
            check(server.complete, plain)
            assert "parameters are the arena itself" in server.log
            names = [" ".join(one.cmdline()) for one in server.family()]
            # What linear layers compute with is packed; the arena was let go when it was of no use.
            assert not [name for name in names if "coldframe.loader.memory_service.service" in name]


def test_the_command_beside_a_replica_that_has_the_weights(
    model: Path, plain: list[Answer], no_leaks: Path
) -> None:
    options = ReplicaOptions(model=str(model), run_dir=str(no_leaks), layout="aligned", threads=1)
    with Replica(options) as replica:
        wait_for(replica, lambda: replica.loaded)
        socket = Path(replica.run_dir, "memory.sock")
        extra = {"memory_service": str(socket), "alias": "on"}
        with vllm_serve(model, *FLAGS, extra=extra) as server:
            check(server.complete, plain)
            assert "; copied: " not in server.log  # nothing is there twice
            native = ask(replica, PROMPTS[2], TOKENS)
            finish(replica, native)
            assert native.tokens == expected(model, tuple(PROMPTS[2]), TOKENS)
        # The replica does not feel that vLLM has gone.
        again = ask(replica, PROMPTS[0], TOKENS)
        finish(replica, again)
        assert again.error is None


def on_s3(model: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setenv("AWS_ENDPOINT_URL", stack.enter_context(moto()))
    client = botocore.session.get_session().create_client("s3")
    upload(client, model, "models", "some/m/", ChecksumAlgorithm="CRC64NVME")
    client.close()
    return {"source": "s3://models/some/m"}


def on_a_peer(model: Path, stack: ExitStack, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setenv("COLDFRAME_PEER_TOKEN", PEER_TOKEN)
    memory = stack.enter_context(
        memory_of(model, serve_peers="127.0.0.1:0", peer_token=PEER_TOKEN, copy=True)
    )
    return {"source": f"peer://{memory.report(60)['peers_at']}"}


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.mark.parametrize("where", [on_s3, on_a_peer], ids=["s3", "peer"])
def test_weights_from_elsewhere(
    where: Callable[..., dict[str, Any]],
    model: Path,
    empty: Path,
    plain: list[Answer],
    stack: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    isolate(monkeypatch, tmp_path)
    extra = where(model, stack, monkeypatch)
    engine = stack.enter_context(
        host(empty, dtype="float32", load_format="coldframe", model_loader_extra_config=extra)
    )
    assert engine.generate(PROMPTS, max_tokens=TOKENS) == plain


def test_a_fine_tune_is_not_served_by_its_base_s_name(model: Path, tmp_path: Path) -> None:
    """Config, names and shapes are the same, and nothing else."""
    from safetensors.torch import load_file, save_file

    tuned = Path(shutil.copytree(model, tmp_path / "tuned"))
    for shard in tuned.glob("*.safetensors"):
        weights = load_file(shard)
        save_file(
            {name: weight * 1.01 for name, weight in weights.items()}, shard, {"format": "pt"}
        )
    with memory_of(tuned) as memory, pytest.raises(HostError) as caught:
        Host(
            model,
            dtype="float32",
            load_format="coldframe",
            model_loader_extra_config={"memory_service": memory.path, "gated": False},
            log=tmp_path / "log",
        )
    assert "CheckpointError: the weights that come are not those of vLLM's MODEL" in str(
        caught.value
    )
