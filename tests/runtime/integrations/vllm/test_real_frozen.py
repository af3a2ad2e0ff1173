"""A vLLM engine frozen by a real CRIU: what is in its image, and who its clones are."""

from __future__ import annotations

import json
import mmap
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from coldframe.loader.errors import NoImage, SnapshotError
from coldframe.runtime.engine.structure import Structure
from coldframe.runtime.integrations.vllm.frozen_image import EngineImage
from coldframe.runtime.options import ReplicaOptions, SnapshotOptions
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.replica.vllm_spec import VllmOptions
from coldframe.snapshot.cloner import Cloner
from coldframe.snapshot.criu import Criu
from coldframe.snapshot.identity import Identity
from coldframe.snapshot.manifest import Manifest
from coldframe.snapshot.store import open_store
from tests.runtime.helpers import ask, finish, wait_for
from tests.runtime.integrations.vllm.bridges import START_S, pid_of
from tests.runtime.integrations.vllm.hosts import host

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(240)]

KV_BYTES, CONTEXT = 768 << 20, 1000
PROMPTS = [[5, 6, 7], list(range(1, 41)), [(7 * i) % 900 + 2 for i in range(300)]]
TOKENS = 12


@dataclass
class Made:
    """An image of an engine with a bf16 model, which computes with AMX where the CPU has it.

    Args:
        model: The model, which is no more where it was when the image was made.
    """

    model: Path
    engine: EngineImage
    snapshot: SnapshotOptions
    manifest: Manifest
    secret: str

    def options(self, runs: Path, **given: Any) -> ReplicaOptions:
        """Those of a replica that has nobody but a clone."""
        asked = {"kv_bytes": 16 << 20, "threads": 2, "vllm": self.engine.vllm, **given}
        return ReplicaOptions(
            str(self.model),
            run_dir=str(runs),
            prefill=0,
            decode=0,
            snapshot=self.snapshot,
            **asked,
        )


@pytest.fixture(scope="module")
def made(
    criu: Criu, demo_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Made:
    folder = tmp_path_factory.mktemp("images")
    first, model = folder / "first", folder / "moved"
    shutil.copytree(demo_model(dtype="bfloat16"), first)
    store = folder / "store"
    secret = f"secret-{secrets.token_hex(16)}"
    sizes = ["--vllm-kv", str(KV_BYTES), "--vllm-args", f"max_model_len={CONTEXT}"]
    # Stored as it is: what is compressed is another test's, and takes its time.
    options = [*sizes, "--engine", "vllm", "--threads", "2", "--compress", "none"]
    environment = {"COLDFRAME_CRIU": criu.path, "HF_TOKEN": secret, "VLLM_API_KEY": secret}
    done = command("create", first, store, *options, environment=environment)
    first.rename(model)
    (manifest,), skipped = open_store(str(store)).manifests()
    assert not skipped
    assert done["image"] == manifest.id
    assert (done["engine"], done["kv_cache_memory_bytes"]) == ("vllm", KV_BYTES)
    assert done["max_model_len"] == CONTEXT
    engine = EngineImage(str(model), VllmOptions(alone=True), 2)
    snapshot = SnapshotOptions(mode="require", store=str(store))
    return Made(model, engine, snapshot, manifest, secret)


def command(
    action: str,
    model: Path,
    store: Path | str,
    *options: str,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What `coldframe snapshot` says; it has to end well."""
    coldframe = str(Path(sys.executable).parent / "coldframe")
    done = subprocess.run(
        [coldframe, "snapshot", action, model, "--snapshot-store", store, "--json", *options],
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        timeout=200,
        check=True,
    )
    return json.loads(done.stdout)


def other_weights(model: Path, into: Path) -> Path:
    """The same model with the sign of every weight changed."""
    shutil.copytree(model, into)
    for path in into.glob("*.safetensors"):
        content = bytearray(path.read_bytes())
        begin = 8 + int.from_bytes(content[:8], "little")
        for at in range(begin + 1, len(content), 2):
            content[at] ^= 0x80
        path.write_bytes(content)
    return into


def ask_for_tiles(_: object) -> None:
    """vLLM uses AMX in its attention and leaves it to others to ask for it: alone it may crash."""
    import torch

    torch.cpu._init_amx()


def holds(image: Path, what: bytes) -> bool:
    """Whether some file of an image holds that."""
    for path in image.iterdir():
        if path.stat().st_size:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
                if view.find(what) >= 0:
                    return True
    return False


def test_a_clone_answers_as_a_fresh_engine_with_the_weights_that_it_is_given(
    made: Made, no_leaks: Path, tmp_path: Path
) -> None:
    with host(made.model, max_model_len=CONTEXT) as fresh:
        fresh.call(ask_for_tiles)
        wanted = [
            fresh.generate([prompt], max_tokens=TOKENS, ignore_eos=True)[0].tokens
            for prompt in PROMPTS
        ]
        (recorded,) = fresh.generate([made.manifest.oracle.prompt_ids], max_tokens=8)
        assert recorded.tokens == list(made.manifest.oracle.token_ids)
    found = []
    other = other_weights(made.model, tmp_path / "other")
    for model in (made.model, other):
        with Replica(replace(made.options(no_leaks), model=str(model))) as replica:
            replica.run_until(lambda replica=replica: replica.sized)
            clients = []
            for prompt in PROMPTS:  # one by one, as they were asked there: rounding is the same
                clients.append(ask(replica, prompt, TOKENS))
                finish(replica, clients[-1])
            found.append([client.tokens for client in clients])
            assert replica.facts["snapshot"]["engine"]["image"] == made.manifest.id
    assert found[0] == wanted
    assert found[1] != wanted


def test_the_image_has_no_weights_no_kv_and_no_secrets(made: Made, tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    pages.mkdir()
    open_store(made.snapshot.store).fetch(made.manifest, pages)
    assert holds(pages, b"vllm.model_executor")
    assert not holds(pages, made.secret.encode())
    for path in made.model.glob("*.safetensors"):
        content = path.read_bytes()
        middle = len(content) // 2
        assert not holds(pages, content[middle : middle + 64])
    # Of 768 MiB of KV there is nothing: they would more than double it.
    assert made.manifest.image_bytes < 600e6


def test_a_clone_becomes_another_user_and_needs_nothing_of_where_the_model_was(
    made: Made, no_leaks: Path
) -> None:
    nobody = Identity.current()
    if os.geteuid() == 0:
        nobody = Identity(65532, 65532, (), Identity.current().namespace)
    with Replica(made.options(no_leaks, user=nobody)) as replica:
        replica.run_until(lambda: replica.sized)
        client = ask(replica, PROMPTS[1], TOKENS)
        form = Structure("choice", '["yes", "no"]')
        formed = ask(replica, PROMPTS[1], TOKENS, structured=form)
        finish(replica, client, formed)
        assert client.error is None
        assert formed.text.startswith(("yes", "no"))
        process = psutil.Process(pid_of(replica, "vllm"))
        assert process.uids().real == nobody.uid
        status = Path(f"/proc/{process.pid}/status").read_text()
        rights = dict(line.split(":\t") for line in status.splitlines() if "Cap" in line)
        assert int(rights["CapPrm"], 16) == int(rights["CapEff"], 16) == 0
        assert int(Path(f"/proc/{process.pid}/oom_score_adj").read_text()) >= 500
        assert len(os.sched_getaffinity(process.pid)) == len(os.sched_getaffinity(0))


def test_it_is_verified_by_the_answer_that_it_must_give(made: Made) -> None:
    (row,) = command("verify", made.model, made.snapshot.store)["images"]
    assert row == {"image": made.manifest.id, "ok": True, "error": None}
    (row,) = command("list", made.model, made.snapshot.store)["images"]
    assert (row["engine"], row["fits"]) == ("vllm", True)
    oracle = made.manifest.oracle
    assert oracle is not None
    wrong = oracle._replace(logprobs=(oracle.logprobs[0] - 3.0, *oracle.logprobs[1:]))
    with pytest.raises(SnapshotError, match="log-probability 0"):
        made.engine.verify(made.snapshot, made.manifest._replace(oracle=wrong))


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (VllmOptions(alone=True, kv_bytes=64 << 20), "engine.kv_cache_memory_bytes"),
        (VllmOptions(alone=True, args=(("max_model_len", 512),)), "engine.max_model_len"),
        (VllmOptions(alone=True, args=(("max_num_seqs", 4),)), "engine.arguments"),
    ],
)
def test_where_another_engine_is_asked_for_and_a_clone_required_there_is_none(
    made: Made, no_leaks: Path, other: VllmOptions, why: str
) -> None:
    with Replica(made.options(no_leaks, vllm=other)) as replica:
        wait_for(replica, lambda: replica.error is not None, START_S)
        assert isinstance(replica.error, SnapshotError)
        assert "in vLLM" in str(replica.error.where)
        assert why in str(replica.error.got)


def test_our_own_workers_have_none_either(made: Made, tmp_path: Path) -> None:
    cloner = Cloner.spawn_restorer()
    wanted = {"store": made.snapshot.store, "name": str(made.model), "manifest": None}
    more = {"directory": str(made.model), "hash": True, "key_file": None, "device": "cpu"}
    cloner.prepare({**wanted, **more, "work": str(tmp_path)})
    try:
        while not cloner.events:
            cloner.receive(1.0)
        error = cloner.events.popleft().error
        assert isinstance(error, NoImage)
        assert "no image of this model" in str(error)
    finally:
        cloner.close()
