"""Which GPU takes the place of which."""

from __future__ import annotations

from pathlib import Path

import pytest

from coldframe.loader.errors import AnotherDevice
from coldframe.snapshot.gpu_pairs import gpu_pairs, hidden_gpus

PAIRS: dict[str, tuple[str, str, dict[str, str] | None]] = {
    "none": ("", "", None),
    "the same": ("a:X b:X", "a:X b:X", None),
    "the same, hidden differently": ("a:X b:X c:Y", "a:X c:Y b:X", None),
    "one for one": ("a:X", "b:X", {"a": "b"}),
    "the own first": ("a:X b:X", "b:X a:X", {"a": "b", "b": "a"}),
    "what is here stays": ("a:X b:X c:X", "d:X c:X b:X", {"a": "d", "b": "b", "c": "c"}),
    "by name": ("a:X b:Y c:X", "d:X e:X f:Y", {"a": "d", "b": "f", "c": "e"}),
}
REFUSED = {
    "more": ("a:X", "a:X b:X"),
    "fewer": ("a:X b:X", "a:X"),
    "of another kind": ("a:X b:X", "a:X b:Y"),
    "the own is of another kind": ("a:X b:Y", "b:Y a:X"),
    "none": ("a:X", ""),
}


def gpus(text: str) -> dict[str, str]:
    return {word.partition(":")[0]: word.partition(":")[2] for word in text.split()}


@pytest.mark.parametrize("case", PAIRS)
def test_which_gpu_takes_the_place_of_which(case: str) -> None:
    old, new, pairs = PAIRS[case]
    assert gpu_pairs(gpus(old), gpus(new)) == pairs


@pytest.mark.parametrize("case", REFUSED)
def test_other_gpus_are_refused(case: str) -> None:
    old, new = REFUSED[case]
    with pytest.raises(AnotherDevice):
        gpu_pairs(gpus(old), gpus(new))


def test_what_the_kernel_does_not_say_is_nothing(tmp_path: Path) -> None:
    assert hidden_gpus(str(tmp_path / "none")) == {}
    folder = tmp_path / "0000:01:00.0"
    folder.mkdir()
    (folder / "information").write_text("Model: A GPU\nGPU UUID: ????????-????\n")
    assert hidden_gpus(str(tmp_path)) == {}
