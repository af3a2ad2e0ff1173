"""The example in the documentation is run as it stands."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runtime.serving import served

pytestmark = pytest.mark.heavy

DOCUMENT = Path(__file__).parents[3] / "docs" / "serving.md"


def test_the_example(demo_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    with served(demo_model(), "--model-name", "demo-model") as server:
        exec(code.replace("http://127.0.0.1:8000", server.url), {})
    assert capsys.readouterr().out.strip()
