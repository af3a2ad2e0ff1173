"""One part of the run, as a process of its own: a GPU that one part loses is there for the next.

Its exit status says how it ended: 0 done, 3 left out, 1 failed. The reason is the last line of
standard error.
"""

from __future__ import annotations

import json
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

from coldframe.benchmarks.gpu.report import Found, LeftOut, Report, Setting
from coldframe.loader.errors import ColdframeError, NoDevice

__all__ = ["DONE", "FAILED", "LEFT_OUT", "main"]

DONE, FAILED, LEFT_OUT = 0, 1, 3


def main(argv: list[str]) -> int:
    """Runs a part.

    Args:
        argv: The module that has `measure`, where to write, where earlier parts have written, and
            the setting in JSON.
    """
    module, file, earlier, setting = argv
    before = Found()
    for name in json.loads(earlier):
        before.add(Found.read(Path(name)))
    report = Report(Path(file), before)
    try:
        measure: Any = import_module(module).measure
        measure(report, Setting(**json.loads(setting)))
    except (LeftOut, NoDevice) as error:
        return _end(LEFT_OUT, error)
    except ColdframeError as error:
        return _end(FAILED, error)
    except Exception as error:  # noqa: BLE001 - whatever ends a part is its reason
        traceback.print_exc()
        return _end(FAILED, error)
    finally:
        report.close()
    return DONE


def _end(status: int, error: Exception) -> int:
    ours = isinstance(error, ColdframeError | LeftOut)
    said = str(error) if ours else f"{type(error).__name__}: {error}"
    print(" ".join(said.split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
