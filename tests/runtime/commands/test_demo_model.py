"""The demo checkpoints, read by Transformers, safetensors and tokenizers."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from coldframe.loader.errors import PlatformError, RequestError
from coldframe.runtime.checkpoints.demo_weights import DTYPES, FAMILIES, SIZES
from coldframe.runtime.commands.demo_model import DemoModel, add_arguments, run, write_demo_model
from coldframe.runtime.flags.parser import Parser
from tests.support import unavailable

PROMPT = "Once upon a time, a replica slept at zero, and then a request 🦀"

COMMAND = """
import sys
from coldframe.runtime.commands import demo_model
from coldframe.runtime.flags.parser import Parser
parser = Parser()
demo_model.add_arguments(parser)
sys.exit(demo_model.run(parser.parse_args()))
"""


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("demos")
    for family in FAMILIES:
        assert write_demo_model(root / family, DemoModel("tiny", family))
    return {family: root / family for family in FAMILIES}


def digest(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_and_runs_it(demos: dict[str, Path], family: str) -> None:
    loaded: Any = AutoModelForCausalLM.from_pretrained(demos[family], output_loading_info=True)
    model, report = loaded
    assert not any(report.values())
    assert model.dtype == torch.bfloat16
    assert model.num_parameters() == DemoModel("tiny", family).parameters()
    assert model.config.tie_word_embeddings == family.startswith("qwen")
    window = getattr(model.config, "sliding_window", None)
    assert window == (64 if family == "mistral" else None)
    assert model.generation_config.eos_token_id == [1, 3]

    tokenizer: Any = AutoTokenizer.from_pretrained(demos[family])
    ids = tokenizer(PROMPT)["input_ids"]
    assert ids == Tokenizer.from_file(str(demos[family] / "tokenizer.json")).encode(PROMPT).ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == PROMPT
    assert len(tokenizer) == model.config.vocab_size
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")

    # Greedy text is varied, does not end by itself, and a change at the far end changes it.
    other = [*ids[:1], ids[1] + 1, *ids[2:]]
    texts = model.float().generate(torch.tensor([ids, other]), max_new_tokens=64, do_sample=False)
    texts = texts[:, len(ids) :]
    assert texts.shape[1] == 64
    assert len(set(texts[0].tolist())) > 16
    assert not texts[0].equal(texts[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_are_whole_ordered_and_aligned(demos: dict[str, Path], family: str) -> None:
    model = DemoModel("tiny", family)
    index = json.loads((demos[family] / "model.safetensors.index.json").read_bytes())
    assert index["metadata"]["total_size"] == model.nbytes()
    seen = []
    for path in sorted(demos[family].glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            assert all(index["weight_map"][name] == path.name for name in file.keys())  # noqa: SIM118
        content = path.read_bytes()
        length = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:length])
        del header["__metadata__"]
        assert all((length + info["data_offsets"][0]) % 64 == 0 for info in header.values())
        seen += [(name, tuple(info["shape"])) for name, info in header.items()]
    assert len(set(index["weight_map"].values())) == 2
    assert seen == [(entry.name, entry.shape) for entry in model.tensors()]


def test_the_same_arguments_give_the_same_bytes(demos: dict[str, Path], tmp_path: Path) -> None:
    # In another process, so that nothing depends on a hash seed or on what ran before.
    command = [sys.executable, "-c", COMMAND, str(tmp_path / "again"), "--size", "tiny"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert digest(tmp_path / "again") == digest(demos["llama"])
    write_demo_model(tmp_path / "other", DemoModel("tiny", "llama", seed=1))
    ours, theirs = digest(tmp_path / "other"), digest(demos["llama"])
    assert {name for name in ours if ours[name] != theirs[name]} == {
        "coldframe_demo.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(tmp_path: Path, dtype: str) -> None:
    model = DemoModel("tiny", "qwen2", dtype=dtype)
    write_demo_model(tmp_path / "demo", model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "demo")
    assert loaded.dtype == getattr(torch, dtype)
    assert all(parameter.isfinite().all() for parameter in loaded.parameters())


def test_shapes_of_every_size() -> None:
    base = DemoModel()
    assert base.parameters() == 213_156_864
    assert base.nbytes() == 2 * base.parameters()
    assert len(base.shards()) == 4
    assert {entry.name for entry in base.tensors()}.isdisjoint({"lm_head.weight"})
    assert DemoModel("small").parameters() == pytest.approx(25e6, rel=0.05)
    assert DemoModel("tiny").parameters() <= 1.01e6
    for size in SIZES:
        for family in FAMILIES:
            model = DemoModel(size, family)
            shards = model.shards()
            assert [entry for shard in shards for entry in shard] == model.tensors()
            sizes = [sum(entry.nbytes for entry in shard) for shard in shards]
            assert max(sizes) < 1.5 * min(sizes)


def test_a_second_call_knows_its_own_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = Parser()
    add_arguments(parser)
    target = tmp_path / "deep" / "er" / "demo"
    args = parser.parse_args([str(target), "--size", "tiny"])
    assert run(args) == 0
    assert "written in" in capsys.readouterr().out
    stamp = (target / "config.json").stat().st_mtime_ns
    assert run(args) == 0
    assert "already there" in capsys.readouterr().out
    assert (target / "config.json").stat().st_mtime_ns == stamp


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    assert write_demo_model(tmp_path / "demo", DemoModel("tiny"))
    assert os.listdir(tmp_path) == ["demo"]


@pytest.mark.parametrize("damage", ["other arguments", "a file missing", "a file cut"])
def test_another_demo_model_is_replaced_by_force_alone(
    demos: dict[str, Path], tmp_path: Path, damage: str
) -> None:
    target = tmp_path / "demo"
    shutil.copytree(demos["llama"], target)
    model = DemoModel("tiny", seed=int(damage == "other arguments"))
    if damage == "a file missing":
        (target / "tokenizer.json").unlink()
    if damage == "a file cut":
        os.truncate(target / "model-00002-of-00002.safetensors", 1000)
    before = digest(target)
    with pytest.raises(RequestError, match="--force"):
        write_demo_model(target, model)
    assert digest(target) == before
    assert write_demo_model(target, model, force=True)
    assert not write_demo_model(target, model)
    assert os.listdir(tmp_path) == ["demo"]


@pytest.mark.parametrize("force", [False, True])
def test_nothing_else_is_ever_replaced(tmp_path: Path, force: bool) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("home", "file", "link"):
        with pytest.raises(RequestError, match="something else") as caught:
            write_demo_model(tmp_path / name, DemoModel("tiny"), force=force)
        assert caught.value.where == str(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["file", "home", "link"]
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PlatformError, match="cannot be written"):
        write_demo_model(tmp_path / "file" / "demo", DemoModel("tiny"))


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", COMMAND, str(tmp_path / "demo"), "--size", "small"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not os.listdir(tmp_path):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    assert os.listdir(tmp_path) == []


# A tmpfs of its own, in a mount namespace of its own: a disk that is really full.
FULL_DISK = """
import os, sys
from pathlib import Path
from coldframe.loader.errors import PlatformError
from coldframe.runtime.commands.demo_model import DemoModel, write_demo_model
try:
    write_demo_model(Path(sys.argv[1]) / "demo", DemoModel("tiny"))
except PlatformError as error:
    print(error.expected, error.got, os.listdir(sys.argv[1]), sep="|")
"""


@pytest.mark.parametrize(
    "limit",
    [
        pytest.param("size=1M", id="too small from the start"),
        pytest.param("size=64M,nr_inodes=5", id="full while writing"),
    ],
)
def test_a_full_disk(tmp_path: Path, limit: str) -> None:
    script = f'mount -t tmpfs -o {limit} tmpfs "$1" || exit 99; exec "$2" -c "$3" "$1"'
    command = ["unshare", "-m", "sh", "-c", script, "sh", str(tmp_path), sys.executable, FULL_DISK]
    if shutil.which("unshare") is None:
        unavailable("there is no unshare command")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 99 or "unshare failed" in done.stderr:
        unavailable(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    expected, got, left = done.stdout.strip().split("|")
    needed = DemoModel("tiny").nbytes()
    assert int(expected.removesuffix(" bytes")) > needed
    assert got.endswith(" bytes free")
    assert left == "[]"
