"""These tests need vLLM: `make test-vllm` runs them in its environment.

What starts once for all of them is here: an engine takes seconds, wherever it comes from.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.runtime.integrations.vllm.hosts import Host
    from tests.runtime.integrations.vllm.prefills import Native

# Elsewhere only those that need none of it, and which say so by their name.
collect_ignore_glob = [] if find_spec("vllm") is not None else ["test_real_*.py"]


@pytest.fixture(scope="session", autouse=True)
def _nothing_of_vllm_is_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The temporary directory of all tests is one of their own, and in the end looked at."""
    if find_spec("vllm") is None:
        yield
        return
    from tests.runtime.integrations.vllm.hosts import ENVIRONMENT
    from tests.runtime.integrations.vllm.leftovers import leftovers

    tmp_path_factory.getbasetemp()  # which stays where it is
    folder = tempfile.mkdtemp(prefix="cf-")  # a socket's path is short
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        # What is compiled is for the next session, too.
        name = "TORCHINDUCTOR_CACHE_DIR"
        patch.setenv(name, os.environ.get(name, ENVIRONMENT[name]))
        yield
    left = leftovers(Path(folder))
    shutil.rmtree(folder)
    assert left == []


@pytest.fixture(scope="session")
def own(demo_model: Callable[..., Path]) -> Iterator[Host]:
    """vLLM as it is, with the demo model by its own loader."""
    from tests.runtime.integrations.vllm.hosts import host

    with host(demo_model(), dtype="float32") as made:
        yield made


@pytest.fixture(scope="session")
def native(demo_model: Callable[..., Path]) -> Iterator[Native]:
    """The native engine with that model, and KV that both engines know."""
    from tests.runtime.integrations.vllm.transfers import native_of

    with native_of(demo_model()) as made:
        yield made


@pytest.fixture(scope="session")
def beside(demo_model: Callable[..., Path], native: Native) -> Iterator[Host]:
    """The KV comes beside steps, a loss is an error, and vLLM keeps nothing of its own."""
    from tests.runtime.integrations.vllm.hosts import host
    from tests.runtime.integrations.vllm.transfers import transfer_config

    config = transfer_config(native, "async", "fail")
    more = {"enable_prefix_caching": False, "kv_transfer_config": config}
    with host(demo_model(), dtype="float32", **more) as made:
        yield made
