"""vLLM as it is: it runs here, and finds this package's plug-in."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.vllm


def test_it_answers(own):
    before = own.free_blocks()
    answers = own.generate([[5, 6, 7], [8, 9]], max_tokens=4)
    assert [len(answer.tokens) for answer in answers] == [4, 4]
    assert own.free_blocks() == before
    assert own.call(_plugins) == ["coldframe"]


def _plugins(engine):
    from vllm.plugins import load_plugins_by_group

    return [name for name in load_plugins_by_group("vllm.general_plugins") if name == "coldframe"]
