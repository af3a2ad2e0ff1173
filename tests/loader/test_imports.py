from __future__ import annotations

import json
import pkgutil
import subprocess
import sys

import coldframe.loader

HEAVY = ["torch", "numpy", "safetensors", "transformers", "tokenizers", "psutil"]


def test_no_module_of_the_loader_imports_anything_heavy() -> None:
    modules = [
        found.name
        for found in pkgutil.walk_packages(coldframe.loader.__path__, "coldframe.loader.")
    ]
    assert {"coldframe.loader.memory_service.service", "coldframe.loader.sources.file"} <= set(
        modules
    )
    code = (
        "import importlib, json, sys, threading\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print(json.dumps([[m for m in {HEAVY!r} if m in sys.modules], threading.active_count()]))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    heavy, threads = json.loads(done.stdout)
    assert heavy == []
    assert threads == 1
    assert done.stderr == ""
