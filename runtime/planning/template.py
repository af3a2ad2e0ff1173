"""Whether a template of a model is resident here, and one of its scale model for the while."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.errors import ColdframeError
from coldframe.loader.sources.base import Origin
from coldframe.runtime.machine.device_choice import CPU
from coldframe.runtime.planning.processes import end_process, read_until, start_process
from coldframe.runtime.planning.scratch import scratch
from coldframe.snapshot.model_key import ModelKey
from coldframe.snapshot.places import KEY_DIGITS, template_directory, templates

__all__ = ["Resident", "ScaleTemplate", "resident_template", "scale_template"]

_PREFIX = "cf-plan-"
_PATIENCE_S = 120.0


class Resident(NamedTuple):
    """Why no template of a model can be forked here; None where one can."""

    why: str | None


class ScaleTemplate(NamedTuple):
    """A template of a scale model: the environment in which workers are its forks, and its pid."""

    environment: Mapping[str, str]
    pid: int


def resident_template(origin: Origin, checkpoint: Checkpoint, device: str) -> Resident:
    """Looks for one."""
    if device != CPU:
        return Resident(f"a fork has nothing of a context on {device}")
    if origin.path is None:
        return Resident("whether a template is of this model is known once its files are here")
    try:
        digits = ModelKey.of(origin.path, checkpoint.tensors).digest[:KEY_DIGITS]
    except ColdframeError as error:
        return Resident(str(error))
    if any(os.path.basename(path).startswith(digits) for path in templates()):
        return Resident(None)
    return Resident("no template of it is resident (coldframe snapshot template MODEL)")


@contextmanager
def scale_template(model: str, work: str) -> Iterator[ScaleTemplate]:
    """A template of a scale model while the context lasts.

    Args:
        model: The scale model's directory.
        work: A folder of our own.

    Raises:
        PlatformError: There can be none.
        OSError: Nothing can be made here.
    """
    # A socket's path is short, that of a temporary directory may not be.
    base = os.path.dirname(template_directory())
    with scratch(base, _PREFIX) as runs:
        environment = {
            "COLDFRAME_RUN_DIR": runs,
            "COLDFRAME_SNAPSHOT": "require",
            "COLDFRAME_SNAPSHOT_STORE": os.path.join(work, "none"),
        }
        command = ["snapshot", "template", model, "--graphs", "off", "--json"]
        process = start_process(
            command, environment, stdout=subprocess.PIPE, stderr=sys.stderr.fileno()
        )
        try:
            read_until(process, 1, _PATIENCE_S)  # it tells of itself once it is there
            yield ScaleTemplate(environment, process.pid)
        finally:
            end_process(process)
