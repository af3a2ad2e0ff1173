"""The settings of `--load-format coldframe`: read, checked, refused."""

from __future__ import annotations

import pytest

from coldframe.loader.checkpoints.slices import Rank
from coldframe.loader.errors import RequestError
from coldframe.runtime.integrations.vllm.load_settings import KEYS, LoadSettings


def test_nothing_said_is_vllm_s_own_model():
    settings = LoadSettings.parse({})
    assert settings.memory_service is None
    assert settings.alias == "auto"
    options = settings.load_options("/models/m")
    assert options.model == "/models/m"
    assert (options.rank, options.ranks, options.layout) == (0, 1, None)


def test_a_source_and_what_a_load_has():
    settings = LoadSettings.parse(
        {
            "source": "s3://bucket/m",
            "sources": ["peer://host:1"],
            "throttle": "200MB/s",
            "cache": "/cache",
            "cache_bytes": "2GiB",
            "threads": 3,
            "copy": True,
            "verify": False,
        }
    )
    options = settings.load_options("/models/m")
    assert options.model == "s3://bucket/m"
    assert options.sources == ("peer://host:1",)
    assert options.throttle == 200e6
    assert (options.cache, options.cache_bytes) == ("/cache", 2 << 30)
    assert (options.threads, options.copy, options.verify) == (3, True, False)


def test_a_rank_has_the_only_layout_that_slices_can_have():
    options = LoadSettings.parse({}).load_options("m", Rank(1, 2))
    assert (options.rank, options.ranks, options.layout) == (1, 2, "aligned")


def test_an_unknown_key_is_refused_with_those_that_there_are():
    with pytest.raises(RequestError) as caught:
        LoadSettings.parse({"layuot": "aligned"})
    assert all(key in str(caught.value.expected) for key in KEYS)
    assert "'layout'" in caught.value.hint


def test_a_connector_has_keys_of_its_own():
    assert LoadSettings.parse({"source": "m", "mode": "exact"}, others=True).source == "m"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("source", ""),
        ("source", 3),
        ("sources", [1]),
        ("alias", "yes"),
        ("layout", "rows"),
        ("copy", "true"),
        ("throttle", "fast"),
        ("throttle", -1),
        ("throttle", True),
        ("threads", 0),
        ("threads", True),
        ("cache_bytes", 0),
    ],
)
def test_a_value_that_cannot_be_is_refused(key, value):
    with pytest.raises(RequestError) as caught:
        LoadSettings.parse({key: value})
    assert caught.value.where == f"model_loader_extra_config: {key}"
    assert caught.value.got == repr(value)


@pytest.mark.parametrize("other", [{"source": "m"}, {"layout": "aligned"}])
def test_a_service_has_been_told_already_what_to_load(other):
    with pytest.raises(RequestError, match="by its owner"):
        LoadSettings.parse({"memory_service": "/x.sock", **other})


def test_a_service_and_aliasing_go_together():
    settings = LoadSettings.parse({"memory_service": "/x.sock", "alias": "on"})
    assert (settings.memory_service, settings.alias) == ("/x.sock", "on")
