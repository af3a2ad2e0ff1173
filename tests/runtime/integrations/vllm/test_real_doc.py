"""The example of the guide is what the tests of the connector run with."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.config import KVTransferConfig

from tests.runtime.integrations.vllm.transfers import transfer_config

pytestmark = pytest.mark.vllm

PAGE = Path(__file__).parents[4] / "docs" / "vllm.md"


def test_the_connectors_settings() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    shown: KVTransferConfig = eval(code, {"KVTransferConfig": KVTransferConfig})
    place = shown.kv_connector_extra_config["memory_service"]
    told = transfer_config(SimpleNamespace(path=place), "async", "recompute")
    told["kv_connector_extra_config"].pop("load")  # the page's default
    run = KVTransferConfig(**told)
    # Each has an engine's name of its own.
    assert asdict(shown) | {"engine_id": ""} == asdict(run) | {"engine_id": ""}
