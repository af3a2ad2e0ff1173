"""`coldframe snapshot`: images of warm workers, made, verified, listed and removed."""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from coldframe.loader.errors import ColdframeError, RequestError, SnapshotError
from coldframe.loader.sources.location import Directory, parse_location
from coldframe.runtime.commands.run import MODEL_HELP, terminate, warn
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.flags.snapshots import add_store_arguments, check_forkable, store_options
from coldframe.runtime.flags.vllm import add_engine_arguments
from coldframe.runtime.frozen.creating import store_of
from coldframe.runtime.machine.device_choice import add_device_argument, choose_device, kind_of
from coldframe.runtime.options import ReplicaOptions, SnapshotOptions
from coldframe.runtime.units import human_bytes, human_seconds
from coldframe.snapshot.machine import Machine
from coldframe.snapshot.manifest import Manifest
from coldframe.snapshot.model_key import ModelKey
from coldframe.snapshot.store import Skipped

if TYPE_CHECKING:
    from coldframe.runtime.replica.replica import Replica

__all__ = ["add_arguments", "run"]

_OF_INTERPRETER = ("python", "executable", "torch", "coldframe")
_ACTIONS = ("create", "verify", "list", "remove", "template")


def add_arguments(parser: Parser) -> None:
    parser.add_argument("action", choices=_ACTIONS, help="what to do")
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help=f"{MODEL_HELP}; for list and remove it may be left out",
    )
    add_store_arguments(parser)
    parser.flag("--image", metavar="ID", help="verify or remove this one (the beginning of its id)")
    parser.flag(
        "--compress",
        choices=["auto", "none", "lz4"],
        default="auto",
        help="how the image is stored: auto takes what restores faster, lz4 where it is installed",
    )
    parser.flag("--threads", metavar="N", type=int, help="threads of the worker (the CPU quota)")
    parser.flag(
        "--graphs",
        choices=["auto", "off"],
        default="auto",
        help="have decode steps in the image: captured on a GPU, compiled where that is faster on "
        "a CPU (auto), or not",
    )
    parser.flag(
        "--engine",
        choices=["native", "vllm"],
        default="native",
        help="whose worker is frozen: our own, or vLLM's engine, as --decode vllm has one",
    )
    add_engine_arguments(parser, parser.add_argument_group("with --engine vllm"))
    add_device_argument(parser)
    parser.flag("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 1 where an image does not verify.

    Raises:
        ColdframeError: It cannot be done.
    """
    signal.signal(signal.SIGTERM, terminate)
    if args.model is None and (args.action in ("create", "verify", "template")):
        raise RequestError(
            f"coldframe snapshot {args.action} needs a model",
            hint="Name it as for `coldframe run`.",
        )
    if args.threads is not None and args.threads < 1:
        raise RequestError(
            "there must be a thread",
            where="--threads",
            got=args.threads,
            hint="Ask for at least 1.",
        )
    if args.action == "template":
        choice = choose_device(args.device)
        if not choice.fall_back:
            check_forkable(choice.device)
    snapshot = store_options(args)
    actions: dict[str, Callable[[argparse.Namespace, SnapshotOptions], int]] = {
        "create": _create,
        "verify": _verify,
        "list": _list,
        "remove": _remove,
        "template": _template,
    }
    return actions[args.action](args, snapshot)


def _create(args: argparse.Namespace, snapshot: SnapshotOptions) -> int:
    if args.engine == "vllm":
        from coldframe.runtime.integrations.vllm.frozen_command import create

        return create(args, snapshot)
    from coldframe.runtime.compiled.compiling import COMPILE_S
    from coldframe.runtime.frozen.creating import prune
    from coldframe.runtime.frozen.freezing import Freezing
    from coldframe.runtime.replica.replica import Replica

    started = time.monotonic()
    # No workers of its own: the clones are the first to see the weights, as they load meanwhile.
    with Replica(_options(args)) as replica:
        replica.run_until(lambda: replica.sized)
        code = COMPILE_S if args.graphs == "auto" else None
        freezing = Freezing(replica, snapshot, compress=args.compress, code=code, again=True)
        freezing.follow(tell=_quiet if args.json else warn)
        if freezing.error is not None:
            raise freezing.error
        manifest = freezing.manifest
        assert manifest is not None
    removed = prune(snapshot, str(freezing.image))
    document = {
        "image": freezing.image,
        "model": args.model,
        "store": snapshot.store,
        "bytes": sum(file["size"] for file in manifest["files"]),
        "oracle": manifest["oracle"],
        "decode_steps": manifest["decode_steps"],
        "removed": removed,
        "seconds": time.monotonic() - started,
    }
    if args.json:
        print(json.dumps(document))
    else:
        print(
            f"image {freezing.image} of {args.model}: {human_bytes(document['bytes'])}, "
            f"{human_seconds(document['seconds'])}, in {snapshot.store}"
        )
        print(f"decode steps: {document['decode_steps']}")
    return 0


def _quiet(_: str) -> None:
    """Says nothing: who reads JSON waits for the end."""


def _template(args: argparse.Namespace, _: SnapshotOptions) -> int:
    from coldframe.runtime.commands.template import run

    return run(args)


def _verify(args: argparse.Namespace, snapshot: SnapshotOptions) -> int:
    from coldframe.runtime.replica.replica import Replica

    images, _ = _chosen(args, snapshot)
    if not images:
        raise RequestError(
            "there is no image to verify",
            where=snapshot.store,
            got=args.model,
            hint="See which there are: coldframe snapshot list.",
        )
    results: list[dict[str, Any]] = []

    def tell(image: Manifest, error: ColdframeError | None) -> None:
        results.append({"image": image.id, "ok": error is None, "error": error and error.to_wire()})
        if not args.json:
            print(f"{image.id}  {'ok' if error is None else error}", flush=True)

    ours = [image for image in images if image.engine is None]
    if ours:
        with Replica(_options(args)) as replica:
            replica.run_until(lambda: replica.sized)
            for image in ours:
                tell(image, _verified(replica, snapshot, image))
    for image in images:
        if image.engine is not None:
            from coldframe.runtime.integrations.vllm.frozen_command import verify

            tell(image, verify(args, snapshot, image))
    if args.json:
        print(json.dumps({"images": results}))
    return 0 if all(result["ok"] for result in results) else 1


def _options(args: argparse.Namespace) -> ReplicaOptions:
    """A replica without workers of its own: those that come are clones."""
    choice = choose_device(args.device)
    return ReplicaOptions(
        args.model,
        prefill=0,
        decode=0,
        threads=args.threads,
        device=choice.device,
        device_why=choice.why,
        fall_back=choice.fall_back,
    )


def _verified(
    replica: Replica, snapshot: SnapshotOptions, image: Manifest
) -> ColdframeError | None:
    """Why an image is not to be used; None where its clones answer as they must."""
    from coldframe.runtime.frozen.freezing import Trial

    model = ModelKey.of(replica.model.directory, replica.model.tensors)
    here = Machine.here(device=kind_of(replica.options.device))
    refusal = image.model.refusal(model) or image.machine.refusal(here)
    if refusal is not None:
        return SnapshotError(
            "the image does not fit",
            where=refusal.field,
            expected=refusal.expected,
            got=refusal.got,
            hint="It may fit another machine, or another state of the model.",
        )
    if image.oracle is None:
        return SnapshotError(
            "the image does not say what its clones must answer", where=f"image {image.id}"
        )
    done: list[Trial] = []
    trial = replace(snapshot, mode="require", manifest=image.to_json())
    try:
        Trial(replica, trial, image.oracle.to_json(), done.append)
    except SnapshotError as error:
        return error
    replica.run_until(partial(bool, done))
    return done[0].error


def _list(args: argparse.Namespace, snapshot: SnapshotOptions) -> int:
    images, skipped = _chosen(args, snapshot)
    here = {kind: Machine.here(device=kind) for kind in {i.machine.device for i in images}}
    rows: list[dict[str, Any]] = []
    for image in images:
        refusal = image.machine.refusal(_compared(image, here[image.machine.device]))
        rows.append(
            {
                "image": image.id,
                "model": image.name,
                "device": image.machine.device,
                "engine": "native" if image.engine is None else image.engine.name,
                "created": image.created,
                "bytes": image.image_bytes,
                "stored_bytes": image.stored_bytes,
                "fits": refusal is None,
                "why_not": refusal and str(refusal),
                "signed": image.signature is not None,
                "decode_steps": image.decode_steps,
                "steps": _steps(image),
            }
        )
    if args.json:
        unusable = [{"image": item.id, "why": item.why} for item in skipped]
        print(json.dumps({"store": snapshot.store, "images": rows, "unusable": unusable}))
        return 0
    for row in rows:
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["created"]))
        fits = "fits this machine" if row["fits"] else f"does not fit: {row['why_not']}"
        size, steps = human_bytes(row["bytes"]), row["steps"]
        print(f"{row['image']}  {made}  {size:>9}  {row['model']}  {steps}  {fits}")
    for item in skipped:
        print(f"coldframe: image {item.id} cannot be used: {item.why}", file=sys.stderr)
    if not rows:
        print(f"no images in {snapshot.store}", file=sys.stderr)
    return 0


def _compared(image: Manifest, here: Machine) -> Machine:
    """This machine, as far as it is to be held against an image's.

    An engine may have an interpreter of its own, with packages of its own; what those are that
    interpreter will look at.
    """
    if image.engine is None:
        return here
    theirs = {name: getattr(image.machine, name) for name in _OF_INTERPRETER}
    return here._replace(**theirs)


def _steps(image: Manifest) -> str:
    """How clones of an image compute decode steps, in a word or two; or whose they are."""
    if image.engine is not None:
        return image.engine.name
    if image.gpu is not None:
        return "captured" if image.gpu.graphs else "eager"
    if not image.decode_steps.startswith("compiled"):
        return "eager"
    threads = re.search(r"\d+ threads?\b", image.decode_steps)
    return "compiled" if threads is None else f"compiled for {threads[0]}"


def _remove(args: argparse.Namespace, snapshot: SnapshotOptions) -> int:
    if args.model is None and args.image is None:
        raise RequestError(
            "it is not said what is to be removed",
            where="coldframe snapshot remove",
            hint="Name a model, or an image with --image.",
        )
    store = store_of(snapshot)
    found, skipped = _chosen(args, snapshot)
    removed = [image.id for image in found] + [item.id for item in skipped]
    for image in removed:
        store.remove(image)
    if args.json:
        print(json.dumps({"removed": removed}))
    else:
        print(f"removed {', '.join(removed) or 'nothing'} from {snapshot.store}")
    return 0


def _chosen(
    args: argparse.Namespace, snapshot: SnapshotOptions
) -> tuple[list[Manifest], list[Skipped]]:
    """The images of the store that the arguments name: the newest first, and the unusable ones.

    Raises:
        RequestError: `--image` names none of them, or several.
    """
    found, skipped = store_of(snapshot).manifests()
    if args.model is not None:
        key = _key_of(args.model)
        found = [image for image in found if image.name == args.model or image.model == key]
        skipped = []  # nobody knows what they are of
    if args.image is None:
        return found, skipped
    ids = [image.id for image in found] + [item.id for item in skipped]
    ids = [image for image in ids if image.startswith(args.image)]
    if len(ids) != 1:
        raise RequestError(
            "there is no such image" if not ids else "there are several such images",
            where=snapshot.store,
            got=args.image or "nothing",
            hint="See which there are: coldframe snapshot list.",
        )
    return (
        [image for image in found if image.id in ids],
        [item for item in skipped if item.id in ids],
    )


def _key_of(model: str) -> ModelKey | None:
    """What a local model is, so that it is found under any name; None where it is not here."""
    location = parse_location(model)
    if not isinstance(location, Directory):
        return None
    try:
        return ModelKey.of(location.path)
    except ColdframeError:  # moved or deleted: its images go by its name
        return None
