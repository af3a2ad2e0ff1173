"""The rates of starts on this machine: rehearsed now, or kept from when they last were.

A cell is a way to start workers (`fresh`, `template`, `restored`), a way to ask (`run`, `http`)
and how the weights are had (`mapped` where they lie, or `copied` to an arena).
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

from coldframe.loader.cgroup import cpu_count
from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.errors import ColdframeError
from coldframe.loader.process import spawn_python
from coldframe.loader.sources.base import Origin
from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.options import SnapshotOptions
from coldframe.runtime.planning.footprint import Footprint
from coldframe.runtime.planning.images import Found, borrowed, find_image
from coldframe.runtime.planning.kept import Kept
from coldframe.runtime.planning.law import Worker
from coldframe.runtime.planning.processor import drop_files, load_files
from coldframe.runtime.planning.rehearsal import Rehearsed, rehearse_run, rehearse_serve
from coldframe.runtime.planning.room import rehearsal_room
from coldframe.runtime.planning.scale_model import write_scale_model
from coldframe.runtime.planning.scratch import scratch
from coldframe.runtime.planning.template import resident_template, scale_template
from coldframe.snapshot.machine import cpu_here, own_sources, torch_version

__all__ = ["Cell", "Rates", "measure_rates"]

_OFF = {"COLDFRAME_SNAPSHOT": "off"}
_STEP = 7
"""Between two tokens of a prompt, which are all different then."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What was measured of one; see `Rehearsed`."""

    worker: Worker
    memory: Footprint


@dataclass(slots=True)
class Rates:
    """All that was measured.

    Attributes:
        layers: Of the scale model.
        nbytes: Of its weights.
        head_share: How much of the model's vocabulary it has.
        cells: By `tier/through/weights`.
        rests: Seconds of a request to a replica of the scale model that rests.
        device_bytes: What the scale model's replica took of a GPU besides its weights; None on a
            CPU.
        why: Why there are no cells of a tier.
        age_s: How long ago the newest rehearsal was; 0 where it was now.
        count: Of how many rehearsals these are the medians.
        seconds: What measuring has taken now.
        path: The file that they are kept in.
    """

    layers: int = 0
    nbytes: int = 0
    head_share: float = 1.0
    cells: dict[str, Cell] = field(default_factory=dict)
    rests: dict[str, float] = field(default_factory=dict)
    device_bytes: int | None = None
    why: dict[str, str] = field(default_factory=dict)
    age_s: float = 0.0
    count: int = 0
    seconds: float = 0.0
    path: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Where the figures are from."""
        return {
            "source": "rehearsed now" if self.seconds else "kept" if self.count else "none",
            "age_s": self.age_s,
            "rehearsals": self.count,
            "seconds": self.seconds,
            "kept_in": self.path,
            "scale_model": {"layers": self.layers, "bytes": self.nbytes},
        }


def measure_rates(
    name: str,
    origin: Origin,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    *,
    tokens: int,
    device: str,
    maps: bool,
    snapshot: SnapshotOptions,
    anew: bool = False,
    times: int = 1,
    rest_s: float = 0.0,
    free: Callable[[], int] | None = None,
    gpu: Mapping[str, Any] | None = None,
    tell: Callable[[str], None] = lambda what: None,
) -> Rates:
    """What starts of a model take here.

    Args:
        name: MODEL, as it was written.
        origin: Where it is.
        checkpoint: As it was opened there.
        spec: Its shape.
        tokens: Of the prompt.
        device: Where workers compute.
        maps: Whether weights in the page cache are mapped where they lie.
        snapshot: Where images are.
        anew: Forget what is kept.
        times: How often to rehearse, where that is done.
        rest_s: How long to rest before each start; see `runtime.machine.free_memory`.
        free: Bytes of the GPU that nobody has, now.
        gpu: What its driver says of it; see `loader.devices.report`.
        tell: Gets what is being rehearsed.

    Raises:
        ColdframeError: A fresh start cannot be rehearsed.
    """
    image = find_image(name, origin, checkpoint, snapshot, device)
    if image.manifest is not None and "://" in snapshot.store:
        image = Found(None, "the image is in a bucket: its way here is not measured")
    template = resident_template(origin, checkpoint, device)
    key = {
        # A number is another GPU's after CUDA_VISIBLE_DEVICES, or on another day's machine.
        "machine": [*_machine(), device, *(() if gpu is None else _gpu(gpu))],
        "shape": asdict(spec),
        "tokens": tokens,
        "maps": maps,
        "rest_s": rest_s,
        "image": None if image.manifest is None else image.manifest.id,
        "template": template.why is None,
    }
    kept = Kept(key)
    if anew:
        kept.forget()
    rates = Rates(path=kept.path)
    if not kept.fresh or kept.count < times:
        started = time.monotonic()
        rehearsal = _Rehearsal(origin, checkpoint, spec, tokens, device, maps, rest_s, free, tell)
        _warm_imports()
        for _ in range(times):
            kept.add(rehearsal.hold(image, snapshot, template=template.why is None))
        rates.seconds = time.monotonic() - started
    _fill(rates, kept.medians())
    rates.age_s, rates.count = kept.age_s or 0.0, kept.count
    if image.why is not None:
        rates.why["restored"] = image.why
    if template.why is not None:
        rates.why["template"] = template.why
    return rates


def _fill(rates: Rates, figures: Mapping[str, Any]) -> None:
    rates.layers, rates.nbytes = int(figures["layers"]), int(figures["nbytes"])
    rates.head_share = figures["head_share"]
    if "device_bytes" in figures:
        rates.device_bytes = int(figures["device_bytes"])
    rates.rests = dict(figures["rests"])
    rates.why |= figures["why"]
    for name, cell in figures["cells"].items():
        memory = {k: int(v) for k, v in cell["memory"].items() if k != "processes"}
        processes = {k: int(v) for k, v in cell["memory"]["processes"].items()}
        rates.cells[name] = Cell(Worker(**cell["worker"]), Footprint(**memory, processes=processes))


def _machine() -> list[Any]:
    """What of this machine and its versions a start's time depends on."""
    vendor, features = cpu_here()
    return [
        platform.node(),
        vendor,
        *features,
        os.uname().release,
        cpu_count(),
        sys.version,
        torch_version(),
        own_sources(),
    ]


def _gpu(gpu: Mapping[str, Any]) -> list[Any]:
    """What tells a GPU from others, as far as a start's time goes."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [seen, *(gpu.get(key) for key in ("name", "total", "driver", "kernel_module"))]


def _warm_imports() -> None:
    """Torch's files into the page cache: the first start after a boot is another matter."""
    null = os.open(os.devnull, os.O_RDONLY)
    try:
        spawn_python("import torch", [], null, dict(os.environ)).wait()
    finally:
        os.close(null)


@dataclass(frozen=True, slots=True)
class _Rehearsal:
    """The rehearsals of one model here."""

    origin: Origin
    checkpoint: Checkpoint
    spec: ModelSpec
    tokens: int
    device: str
    maps: bool
    rest_s: float
    free: Callable[[], int] | None
    tell: Callable[[str], None]

    def hold(self, image: Found, snapshot: SnapshotOptions, *, template: bool) -> dict[str, Any]:
        """Holds all of them: figures to be kept.

        Args:
            image: What workers can be restored from.
            snapshot: Where that is.
            template: Whether a template of the model is resident.
        """
        with ExitStack() as stack:
            base = tempfile.gettempdir()
            work = stack.enter_context(scratch(base))
            model = os.path.join(work, "model")
            os.mkdir(model)
            scale = write_scale_model(
                model, self.origin, self.checkpoint.config, self.spec, rehearsal_room(base)
            )
            prompt = [(5 + _STEP * i) % scale.spec.vocab_size for i in range(self.tokens)]
            device = ["--device", self.device]
            cells: dict[str, Any] = {}
            # Kept with the rest: the next plan is to tell, too.
            why: dict[str, str] = {}
            found: dict[str, Any] = {
                "layers": scale.spec.layers,
                "nbytes": scale.nbytes,
                "head_share": scale.head_share,
                "cells": cells,
                "why": why,
            }
            before = None if self.free is None else self.free()

            def measure(
                tier: str, environment: Mapping[str, str], template: int | None = None
            ) -> dict[str, float]:
                self.tell(f"rehearsing {tier} starts of a scale model")
                load_files(scale.files)  # which an earlier rehearsal has dropped
                if self.maps:
                    time.sleep(self.rest_s)
                    run = rehearse_run(scale, prompt, device, environment, template)
                    cells[f"{tier}/run/mapped"] = _figures(run)
                weights = "mapped" if self.maps else "copied"
                time.sleep(self.rest_s)
                served, rests, left = rehearse_serve(
                    scale, prompt, device, environment, self.free, template
                )
                cells[f"{tier}/http/{weights}"] = _figures(served)
                if before is not None and left is not None:
                    found["device_bytes"] = max(0, before - left - scale.nbytes)
                # As from a disk: what a byte takes of the processors on that way is in it.
                drop_files(scale.files)
                copied = [*device, "--copy"]
                time.sleep(self.rest_s)
                run = rehearse_run(scale, prompt, copied, environment, template)
                cells[f"{tier}/run/copied"] = _figures(run)
                return dict(rests.ttft_s)

            found["rests"] = measure("fresh", _OFF)
            if image.manifest is not None:
                try:
                    with borrowed(image.manifest, snapshot, model, work) as environment:
                        measure("restored", environment)
                except (ColdframeError, OSError) as error:
                    why["restored"] = str(error)
            if template:
                try:
                    with scale_template(model, work) as forked:
                        measure("template", *forked)
                except (ColdframeError, OSError) as error:
                    why["template"] = str(error)
            return found


def _figures(rehearsed: Rehearsed) -> dict[str, Any]:
    return {"worker": asdict(rehearsed.worker), "memory": asdict(rehearsed.memory)}
