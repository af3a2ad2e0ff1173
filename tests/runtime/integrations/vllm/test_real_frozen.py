"""A vLLM engine frozen by a real CRIU: its clones answer as an engine that started fresh does."""

from __future__ import annotations

import json
import mmap
import os
import secrets
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from coldframe.loader.errors import NoImage, SnapshotError
from coldframe.loader.process import make_run_dir, remove_run_dir
from coldframe.runtime.integrations.vllm.frozen_image import EngineClone, EngineImage, cloner_of
from coldframe.runtime.options import SnapshotOptions
from coldframe.snapshot.cloner import Cloner
from coldframe.snapshot.criu import Criu
from coldframe.snapshot.identity import Identity
from coldframe.snapshot.manifest import Manifest
from coldframe.snapshot.store import open_store
from tests.runtime.integrations.vllm.held import Held
from tests.runtime.integrations.vllm.hosts import host

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(240)]

ARGUMENTS = {"max_model_len": 1024, "kv_cache_memory_bytes": 768 << 20}
PROMPTS = [[5, 6, 7], list(range(1, 41)), [(7 * i) % 900 + 2 for i in range(300)]]
TOKENS = 12


@dataclass
class Made:
    """An image of an engine with a bf16 model, which computes with AMX where the CPU has it."""

    engine: EngineImage
    snapshot: SnapshotOptions
    manifest: Manifest
    secret: str


@pytest.fixture(scope="module")
def made(
    criu: Criu, demo_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Made:
    engine = EngineImage(str(demo_model(dtype="bfloat16")), ARGUMENTS, 2)
    store = tmp_path_factory.mktemp("images") / "store"
    secret = f"secret-{secrets.token_hex(16)}"
    # Stored as it is: what is compressed is another test's, and takes its time.
    options = ["--engine-args", json.dumps(ARGUMENTS), "--threads", "2", "--compress", "none"]
    environment = {"COLDFRAME_CRIU": criu.path, "HF_TOKEN": secret}
    done = command("create", engine, store, *options, environment=environment)
    (manifest,), skipped = open_store(str(store)).manifests()
    assert not skipped
    assert done["image"] == manifest.id
    assert done["engine"] == "vllm"
    snapshot = SnapshotOptions(mode="require", store=str(store))
    return Made(engine, snapshot, manifest, secret)


def command(
    action: str,
    engine: EngineImage,
    store: Path | str,
    *options: str,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What `coldframe snapshot` says; it has to end well."""
    coldframe = str(Path(sys.executable).parent / "coldframe")
    where = ["--engine", "vllm", "--snapshot-store", str(store), "--json"]
    done = subprocess.run(
        [coldframe, "snapshot", action, engine.model, *where, *options],
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        timeout=200,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def run_dir() -> Iterator[str]:
    path, lock = make_run_dir()
    yield path
    remove_run_dir(path)
    os.close(lock)


@pytest.fixture(scope="module")
def cloner(made: Made, run_dir: str) -> Iterator[Cloner]:
    with cloner_of(made.engine, made.snapshot, run_dir) as cloner:
        yield cloner


@pytest.fixture
def clone(cloner: Cloner, run_dir: str) -> Iterator[Callable[..., EngineClone]]:
    clones: list[EngineClone] = []

    def start(name: str, **given: object) -> EngineClone:
        clones.append(EngineClone(cloner, name, 2, run_dir, **given))
        return clones[-1]

    yield start
    for each in clones:
        each.close()


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
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
                if pages.find(what) >= 0:
                    return True
    return False


def test_clones_answer_as_a_fresh_engine_does(
    made: Made, clone: Callable[..., EngineClone], tmp_path: Path
) -> None:
    model = Path(made.engine.model)
    with host(model, **ARGUMENTS) as fresh:
        fresh.call(ask_for_tiles)
        wanted = [
            fresh.generate([prompt], max_tokens=TOKENS, ignore_eos=True)[0].tokens
            for prompt in PROMPTS
        ]
        (recorded,) = fresh.generate([made.manifest.oracle.prompt_ids], max_tokens=8)
        assert recorded.tokens == list(made.manifest.oracle.token_ids)
    # Two at once; one takes vLLM's own loader, the other one ours, with a memory service.
    one, two = clone("one"), clone("two")
    one.load("auto")
    two.load("coldframe", {"source": str(model)})
    for each in (one, two):
        assert [each.ask(prompt, TOKENS)["token_ids"] for prompt in PROMPTS] == wanted
    # Weights come when the clone wakes up, and from where it is told.
    three = clone("three")
    three.load("coldframe", {"source": str(other_weights(model, tmp_path / "other"))})
    assert [three.ask(prompt, TOKENS)["token_ids"] for prompt in PROMPTS] != wanted


def test_a_clone_is_loaded_when_its_weights_are_in_and_once(
    made: Made, clone: Callable[..., EngineClone]
) -> None:
    late = clone("late")
    with Held(Path(made.engine.model), upto=1) as source:
        timer = threading.Timer(2.0, source.release)
        timer.start()
        assert late.load("coldframe", {"source": source.url}) >= 1.5
        timer.join()
    assert len(late.ask(PROMPTS[0], TOKENS)["token_ids"]) == TOKENS
    with pytest.raises(SnapshotError, match="once"):
        late.load("auto")
    assert len(late.ask(PROMPTS[0], TOKENS)["token_ids"]) == TOKENS


def test_the_image_has_no_weights_no_kv_and_no_secrets(made: Made, tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    pages.mkdir()
    open_store(made.snapshot.store).fetch(made.manifest, pages)
    assert holds(pages, b"vllm.model_executor")
    assert not holds(pages, made.secret.encode())
    for path in Path(made.engine.model).glob("*.safetensors"):
        content = path.read_bytes()
        middle = len(content) // 2
        assert not holds(pages, content[middle : middle + 64])
    # Of 768 MiB of KV there is nothing: they would more than double it.
    assert made.manifest.image_bytes < 600e6


def test_a_clone_becomes_another_user(made: Made, clone: Callable[..., EngineClone]) -> None:
    if os.geteuid() != 0:
        nobody = Identity.current()
    else:
        nobody = Identity(65532, 65532, (), Identity.current().namespace)
    woken = clone("nobody", identity=nobody)
    process = psutil.Process(woken.child.pid)
    assert process.uids().real == nobody.uid
    assert set(woken.woken["hooks"]) >= {"random", "registers", "threads", "vllm-groups"}
    with open(f"/proc/{process.pid}/status") as file:
        rights = dict(line.split(":\t") for line in file.read().splitlines() if "Cap" in line)
    assert int(rights["CapPrm"], 16) == int(rights["CapEff"], 16) == 0


def test_it_is_verified_by_the_answer_that_it_must_give(made: Made) -> None:
    (row,) = command("verify", made.engine, made.snapshot.store)["images"]
    assert row == {"image": made.manifest.id, "ok": True, "error": None}
    (row,) = command("list", made.engine, made.snapshot.store)["images"]
    assert (row["engine"], row["fits"]) == ("vllm", True)
    oracle = made.manifest.oracle
    assert oracle is not None
    wrong = oracle._replace(logprobs=(oracle.logprobs[0] - 3.0, *oracle.logprobs[1:]))
    with pytest.raises(SnapshotError, match="log-probability 0"):
        made.engine.verify(made.snapshot, made.manifest._replace(oracle=wrong))


def test_an_engine_with_other_arguments_has_no_image(made: Made, run_dir: str) -> None:
    other = replace(made.engine, arguments={**ARGUMENTS, "max_model_len": 512})
    with (
        cloner_of(other, made.snapshot, run_dir) as cloner,
        pytest.raises(NoImage, match=r"engine\.arguments"),
    ):
        EngineClone(cloner, "other", 2, run_dir)


def test_our_own_workers_have_none_either(made: Made, run_dir: str) -> None:
    cloner = Cloner.spawn_restorer()
    wanted = {"store": made.snapshot.store, "name": made.engine.model, "manifest": None}
    more = {"directory": made.engine.model, "hash": True, "key_file": None, "device": "cpu"}
    cloner.prepare({**wanted, **more, "work": run_dir})
    try:
        while not cloner.events:
            cloner.receive(1.0)
        error = cloner.events.popleft().error
        assert isinstance(error, NoImage)
        assert "no image of this model" in str(error)
    finally:
        cloner.close()
