"""Decode steps that are really compiled: the same tokens, also in clones of an image."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from coldframe.runtime.compiled import compiling
from coldframe.runtime.compiled.compiling import SEQUENCES
from coldframe.runtime.compiled.folder import CodeFolder, key_of
from coldframe.runtime.compiled.loading import load_code
from coldframe.runtime.engine.batch import Chunk
from coldframe.runtime.engine.code_shape import CodeShape
from coldframe.runtime.engine.compiled import CompiledSteps
from coldframe.runtime.engine.kv import KVCache
from coldframe.runtime.engine.model import Model
from coldframe.runtime.frozen.freezing import Freezing
from coldframe.runtime.options import ReplicaOptions, SnapshotOptions
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.replica.sizing import ModelFacts
from coldframe.runtime.worker.tensors import torch_dtypes
from coldframe.snapshot.criu import Criu
from tests.runtime.helpers import ask, expected, finish, prompt_of
from tests.runtime.snapshots import Commands, flip, resident

pytestmark = [pytest.mark.heavy, pytest.mark.alone, pytest.mark.timeout(300)]

THREADS = 2
COMPILE = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
import torch
from coldframe.runtime.compiled.folder import CodeFolder
from coldframe.runtime.compiled.compiler import compile_size
from coldframe.runtime.engine.code_shape import CodeShape
from coldframe.runtime.replica.sizing import ModelFacts
for model, threads, sequences, folder in json.loads(sys.argv[1]):
    facts = ModelFacts(model)
    shape = CodeShape.of_tensors(facts.spec, facts.tensors, threads)
    work = os.environ["TMPDIR"]
    sizes = [compile_size(facts.spec, shape, n, folder, work) for n in sequences]
    CodeFolder(folder, shape, tuple(sizes), "compiled for a test").write()
"""
"""What the compiler does, but for the trial: whether it is faster is not what is asked here."""


@dataclass(frozen=True)
class Compiled:
    """A model, and the folder of its code, which lies in a cache."""

    model: Path
    folder: Path

    @property
    def facts(self) -> ModelFacts:
        return ModelFacts(str(self.model))


@pytest.fixture(scope="session")
def compiled(
    demo_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Compiled]:
    """Models with their code, compiled once by one process."""
    cache, work = tmp_path_factory.mktemp("code"), tmp_path_factory.mktemp("work")
    asked = {"llama": ("float32", (1, 2)), "qwen3": ("bfloat16", (2,))}
    made: dict[str, Compiled] = {}
    orders = []
    for family, (dtype, sequences) in asked.items():
        model = demo_model(family, dtype)
        facts = ModelFacts(str(model))
        shape = CodeShape.of_tensors(facts.spec, facts.tensors, THREADS)
        folder = cache / "coldframe/compiled" / key_of(shape, SEQUENCES)
        folder.mkdir(0o700, parents=True)
        made[family] = Compiled(model, folder)
        orders.append([str(model), THREADS, sequences, str(folder)])
    places = {"TMPDIR": str(work), "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor")}
    command = [sys.executable, "-P", "-c", COMPILE, json.dumps(orders)]
    subprocess.run(command, check=True, env={**os.environ, **places}, timeout=600)
    return made


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


class Computed:
    """A model in this process, by its code and without."""

    def __init__(self, made: Compiled, gap: int = 0) -> None:
        facts = made.facts
        self.spec = facts.spec
        self.weights: dict[str, torch.Tensor] = {}
        for file in sorted(made.model.glob("*.safetensors")):
            for name, tensor in load_file(file).items():
                # In memory of its own, `gap` bytes behind where it would be aligned.
                memory = torch.empty(tensor.nbytes + gap, dtype=torch.uint8)
                place = memory[gap:].view(tensor.dtype).view(tensor.shape)
                self.weights[name] = place.copy_(tensor)
        dtype = torch_dtypes()[self.spec.dtype]
        memory = torch.zeros(64 * self.spec.kv_block_bytes(dtype.itemsize), dtype=torch.uint8)
        cache = KVCache(memory, self.spec, dtype, 64)
        self.model = Model(self.spec, self.weights, cache)
        self.why: list[str] = []
        code = load_code(CodeFolder.read(str(made.folder)))
        self.steps = CompiledSteps(self.model, code, self.why.append)

    def exact(self) -> Model:
        """The same in float32."""
        spec = replace(self.spec, dtype="F32")
        memory = torch.zeros(64 * spec.kv_block_bytes(4), dtype=torch.uint8)
        weights = {name: tensor.float() for name, tensor in self.weights.items()}
        return Model(spec, weights, KVCache(memory, spec, torch.float32, 64))

    def chunk(self, ids: list[int], row: int, start: int, prompt: int) -> Chunk:
        return Chunk(ids[start:], start, prompt, range(row * 16, row * 16 + 16))

    def logprobs(
        self, prompts: list[list[int]], count: int, *, both: bool = False
    ) -> tuple[list[list[int]], float]:
        """Greedy answers, and how far log-probabilities came to be from eager ones."""
        texts, apart = [list(prompt) for prompt in prompts], 0.0
        first = [self.chunk(text[:-1], row, 0, len(text)) for row, text in enumerate(texts)]
        self.model.forward(self.model.batch(first))
        for _ in range(count):
            chunks = [
                self.chunk(text, row, len(text) - 1, len(prompt))
                for row, (text, prompt) in enumerate(zip(texts, prompts, strict=True))
            ]
            logits = self.steps.forward(chunks)
            if both:
                eager = self.model.forward(self.model.batch(chunks))
                apart = max(apart, _apart(logits, eager))
            for text, token in zip(texts, logits.argmax(-1), strict=True):
                text.append(int(token))
        assert self.steps.in_use, self.why
        return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)], apart


def _apart(logits: torch.Tensor, eager: torch.Tensor) -> float:
    """Of the likeliest tokens' log-probabilities."""
    ours, theirs = (x.log_softmax(-1) for x in (logits, eager))
    likely = theirs.topk(20).indices
    return float((ours.gather(1, likely) - theirs.gather(1, likely)).abs().max())


# -- in this process -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.usefixtures("threads")
def test_tokens_are_those_of_transformers(compiled: dict[str, Compiled], count: int) -> None:
    made = compiled["llama"]
    prompts = [prompt_of(40 + 13 * row) for row in range(count)]
    answers, apart = Computed(made).logprobs(prompts, 48, both=True)
    assert answers == [expected(made.model, tuple(prompt), 48) for prompt in prompts]
    assert apart < 1e-3


@pytest.mark.usefixtures("threads")
def test_in_bfloat16_it_is_no_further_from_the_truth_than_eager(
    compiled: dict[str, Compiled],
) -> None:
    computed = Computed(compiled["qwen3"])
    exact = computed.exact()
    # One sequence is padded to the two that this was compiled for.
    for prompts in ([prompt_of(40)], [prompt_of(40), prompt_of(70)]):
        ours, eagers = [], []
        for length in range(1, 17):
            texts = [[*prompt, *prompt_of(length, seed=1)] for prompt in prompts]
            chunks = [
                computed.chunk(text, row, len(text) - 1, len(text))
                for row, text in enumerate(texts)
            ]
            for model in (computed.model, exact):
                rest = [computed.chunk(t[:-1], row, 0, len(t)) for row, t in enumerate(texts)]
                model.forward(model.batch(rest))
            truth = exact.forward(exact.batch(chunks))
            eagers.append(_apart(computed.model.forward(computed.model.batch(chunks)), truth))
            ours.append(_apart(computed.steps.forward(chunks), truth))
        assert computed.steps.in_use, computed.why
        assert mean(ours) <= 1.5 * mean(eagers)


@pytest.mark.usefixtures("threads")
def test_weights_may_lie_at_any_address(compiled: dict[str, Compiled]) -> None:
    made = compiled["llama"]
    computed = Computed(made, gap=4)
    assert any(tensor.data_ptr() % 8 for tensor in computed.weights.values())
    answers, _ = computed.logprobs([prompt_of(40)], 4)
    assert answers == [expected(made.model, tuple(prompt_of(40)), 4)]
    computed.model.rebind({name: tensor.clone() for name, tensor in computed.weights.items()})
    for tensor in computed.weights.values():
        tensor.zero_()
    answers, _ = computed.logprobs([prompt_of(40)], 4)
    assert answers == [expected(made.model, tuple(prompt_of(40)), 4)]


@pytest.mark.usefixtures("threads")
def test_no_file_stands_behind_it(compiled: dict[str, Compiled]) -> None:
    before = set(os.listdir("/proc/self/fd"))
    code = load_code(CodeFolder.read(str(compiled["llama"].folder)))
    maps = Path("/proc/self/maps").read_text()
    assert "coldframe-code" not in maps
    assert str(compiled["llama"].folder) not in maps
    assert set(os.listdir("/proc/self/fd")) == before
    assert len(code.sizes) == 2


# -- images --------------------------------------------------------------------------------------


def steps_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [stage for stage in document["stages"] if stage["name"] == "graph_restore"]


def test_clones_decode_with_it(
    compiled: dict[str, Compiled], criu: Criu, no_leaks: Path, tmp_path: Path
) -> None:
    made = compiled["llama"]
    commands = Commands(no_leaks, made.folder.parents[2])
    store = ("--snapshot-store", tmp_path / "store")
    document = commands.json("snapshot", "create", made.model, *store, "--threads", THREADS)
    assert document["decode_steps"] == "compiled for a test"
    # Where it has been restored there is nothing of it but what is in the image.
    elsewhere = Commands(no_leaks, tmp_path / "another-cache")
    ids = ",".join(map(str, prompt_of(40)))
    asked = ("run", made.model, "--prompt-ids", ids, "-n", 24, "--ignore-eos", *store)
    asked = (*asked, "--snapshot", "require")
    answer = expected(made.model, tuple(prompt_of(40)), 24)
    found = elsewhere.json(*asked, "--threads", THREADS)
    assert found["token_ids"] == answer
    (span,) = steps_of(found)
    assert span["process"].startswith("decode")
    assert span["note"] == "compiled for a test"
    (ready,) = [s for s in found["stages"] if s["name"] == "ready" and "decode" in s["process"]]
    assert ready["note"] == "but for the weights; compiled decode step"
    # Not where nobody wants it, and not with another number of threads.
    found = elsewhere.json(*asked, "--threads", THREADS, "--graphs", "off")
    assert (found["token_ids"], steps_of(found)) == (answer, [])
    found = elsewhere.json(*asked, "--threads", 1)
    assert found["token_ids"] == answer
    (span,) = steps_of(found)
    assert span["note"].endswith("compiled for threads 2, here it is 1")
    # Weights that are laid out anew while it decodes.
    found = elsewhere.json(*asked, "--threads", THREADS, "--realign", "--copy")
    assert found["token_ids"] == answer
    assert steps_of(found)[0]["note"] == "compiled for a test"
    verified = elsewhere.json("snapshot", "verify", made.model, *store, "--threads", THREADS)
    assert [image["ok"] for image in verified["images"]] == [True]


def test_forks_of_a_template_decode_with_it(
    compiled: dict[str, Compiled], no_leaks: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = compiled["llama"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(made.folder.parents[2]))
    monkeypatch.setenv("COLDFRAME_RUN_DIR", str(no_leaks))
    snapshot = SnapshotOptions("require", str(tmp_path / "store"))
    with resident(made.model, "--threads", str(THREADS)):
        options = ReplicaOptions(
            str(made.model), run_dir=str(no_leaks), snapshot=snapshot, threads=THREADS
        )
        with Replica(options) as replica:
            clients = [ask(replica, prompt_of(length), 24) for length in (40, 55)]
            finish(replica, *clients)
            spans = [span for span in replica.spans if span.name == "graph_restore"]
    for client, length in zip(clients, (40, 55), strict=True):
        assert client.tokens == expected(made.model, tuple(prompt_of(length)), 24)
    assert [span.note for span in spans] == ["compiled for a test"]


def test_an_image_is_made_without_a_compiler(
    demo_model: Callable[..., Path],
    criu: Criu,
    no_leaks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiling, "LEAST_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLDFRAME_CRIU", str(criu.path))
    monkeypatch.setenv("PATH", str(tmp_path))
    options = ReplicaOptions(str(demo_model()), prefill=0, decode=0, run_dir=str(no_leaks))
    with Replica(options) as replica:
        replica.run_until(lambda: replica.known)
        store = SnapshotOptions("off", str(tmp_path / "store"))
        freezing = Freezing(replica, store, code=60)
        assert freezing.compiling
        freezing.follow()
    assert freezing.error is None
    assert freezing.manifest is not None
    assert freezing.manifest["decode_steps"].startswith("eager; there is no C++ compiler")


def test_damaged_code_is_left_out(
    compiled: dict[str, Compiled], criu: Criu, no_leaks: Path, tmp_path: Path
) -> None:
    made = compiled["llama"]
    flip(made.folder / "layer-1.so", 5000)
    try:
        commands = Commands(no_leaks, made.folder.parents[2])
        store = ("--snapshot-store", tmp_path / "store")
        document = commands.json("snapshot", "create", made.model, *store, "--threads", THREADS)
    finally:
        flip(made.folder / "layer-1.so", 5000)
    assert document["decode_steps"].startswith("eager; not compiled")
