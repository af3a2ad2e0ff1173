from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from coldframe.loader.errors import CheckpointError, SnapshotError
from coldframe.snapshot.model_key import ModelKey


@pytest.fixture
def model(demo_model: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_model(), tmp_path / "model"))


def test_the_key_is_of_contents_and_not_of_places_and_layouts(model: Path, tmp_path: Path) -> None:
    key = ModelKey.of(model)
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()), indent=7, sort_keys=True))
    assert ModelKey.of(Path(shutil.copytree(model, tmp_path / "copy"))) == key
    assert ModelKey.from_json(key.to_json()) == key
    assert len({*key, key.digest}) == 5


class _Shape:
    def __init__(self, dtype: str, shape: list[int]) -> None:
        self.dtype = dtype
        self.shape = shape


def test_tensors_may_be_given_and_count_as_if_they_were_read(model: Path) -> None:
    tensors = {}
    for shard in model.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is no mapping
                found = file.get_slice(name)
                tensors[name] = _Shape(found.get_dtype(), found.get_shape())
    key = ModelKey.of(model)
    assert ModelKey.of(model, dict(reversed(tensors.items()))) == key
    next(iter(tensors.values())).shape[0] += 1
    refusal = key.refusal(ModelKey.of(model, tensors))
    assert refusal is not None
    assert refusal.field == "model.tensors"


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("config.json", "config"),
        ("generation_config.json", "generation"),
        ("tokenizer.json", "tokenizer"),
    ],
)
def test_what_has_changed_is_named(model: Path, name: str, field: str) -> None:
    key = ModelKey.of(model)
    path = model / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, "new": 1}))
    other = ModelKey.of(model)
    refusal = key.refusal(other)
    assert refusal is not None
    assert refusal.field == f"model.{field}"
    assert (refusal.expected, refusal.got) == (str(getattr(key, field)), str(getattr(other, field)))
    assert key.digest != other.digest


def test_a_model_need_not_have_a_tokenizer_or_a_generation_config(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "generation_config.json").unlink(missing_ok=True)
    key = ModelKey.of(model)
    assert (key.generation, key.tokenizer) == (None, None)
    assert ModelKey.from_json(key.to_json()) == key


def test_a_bad_model_is_an_error(model: Path) -> None:
    (model / "config.json").write_text("{")
    with pytest.raises(CheckpointError):
        ModelKey.of(model)


def test_a_key_that_is_none_is_refused() -> None:
    key = ModelKey("a" * 64, None, None, "b" * 64).to_json()
    for field, value in (("config", "A" * 64), ("tensors", None), ("tokenizer", 3), ("more", 1)):
        with pytest.raises(SnapshotError) as raised:
            ModelKey.from_json({**key, field: value})
        assert field in str(raised.value.where)
