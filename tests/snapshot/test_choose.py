from __future__ import annotations

import pytest

from coldframe.snapshot.choose import choose
from coldframe.snapshot.engine_key import EngineKey
from coldframe.snapshot.machine import Machine
from coldframe.snapshot.manifest import Manifest
from coldframe.snapshot.model_key import ModelKey
from tests.snapshot.images import MACHINE, MODEL, draft
from tests.snapshot.test_manifest import MANIFEST

OTHER = MODEL._replace(tensors="e" * 64)
VLLM = EngineKey("vllm", "vllm 0.32.0 01234567", '{"max_model_len": 1024}')


def image(
    created: int, name: str = "org/model", model: ModelKey = MODEL, machine: Machine = MACHINE
) -> Manifest:
    made = draft(name, model=model, machine=machine)
    return Manifest(created, *made, objects=MANIFEST.objects, files=MANIFEST.files)


def test_the_newest_that_fits_is_chosen() -> None:
    newest = image(3, machine=MACHINE._replace(kernel=(7, 0)))
    fits, older = image(2), image(1)
    choice = choose([newest, fits, older], MACHINE, model=MODEL, name="org/model")
    assert choice.manifest == fits
    assert [(image, refusal.field) for image, refusal in choice.refusals] == [(newest.id, "kernel")]
    assert choice.why == f"image {fits.id[:8]} fits"


def test_images_of_other_models_are_not_spoken_of() -> None:
    found = [image(2, "another", OTHER), image(1, "third", OTHER)]
    choice = choose(found, MACHINE, model=MODEL, name="org/model")
    assert choice == (None, ())
    assert choice.why == "no image of this model"
    assert choose([], MACHINE, model=None, name="org/model").why == "no image of this model"


def test_a_model_that_changed_under_its_name_is_named() -> None:
    old = image(1, model=OTHER)
    choice = choose([old], MACHINE, model=MODEL, name="org/model")
    assert choice.manifest is None
    assert choice.why == (
        f"image {old.id[:8]}: model.tensors: expected {OTHER.tensors}, got {MODEL.tensors}"
    )


def test_the_same_model_under_another_name_is_taken() -> None:
    elsewhere = image(1, "/models/copy")
    assert choose([elsewhere], MACHINE, model=MODEL, name="org/model").manifest == elsewhere


def test_where_the_model_is_not_known_yet_its_name_decides() -> None:
    ours, others = image(1, model=OTHER), image(2, "another")
    assert choose([others, ours], MACHINE, model=None, name="org/model").manifest == ours
    assert choose([others], MACHINE, model=None, name="org/model").manifest is None


def test_an_image_that_has_failed_is_left_out() -> None:
    newest, older = image(2), image(1)
    choice = choose(
        [newest, older], MACHINE, model=MODEL, name="org/model", exclude=frozenset({newest.id})
    )
    assert choice.manifest == older
    everything = frozenset({newest.id, older.id})
    choice = choose([newest, older], MACHINE, model=MODEL, name="org/model", exclude=everything)
    assert choice.manifest is None
    assert choice.why.startswith(f"image {newest.id[:8]}: image: expected")
    assert choice.why.endswith(", and 1 more")


@pytest.mark.parametrize("field", ["glibc", "torch", "coldframe", "arch"])
def test_why_names_the_field(field: str) -> None:
    here = MACHINE._replace(**{field: "other"})
    found = image(1)
    why = choose([found], here, model=MODEL, name="org/model").why
    assert why == f"image {found.id[:8]}: {field}: expected {getattr(MACHINE, field)}, got other"


def test_an_image_of_another_engine_is_not_for_our_workers_nor_the_other_way() -> None:
    ours = image(2)
    theirs = image(3)._replace(engine=VLLM)
    found = [theirs, ours]
    assert choose(found, MACHINE, model=MODEL, name="org/model").manifest == ours
    assert choose(found, MACHINE, model=MODEL, name="org/model", engine=VLLM).manifest == theirs
    assert choose([theirs], MACHINE, model=MODEL, name="org/model") == (None, ())
    assert choose([ours], MACHINE, model=MODEL, name="org/model", engine=VLLM) == (None, ())


@pytest.mark.parametrize(
    ("field", "value"), [("build", "vllm 0.33.0 89abcdef"), ("arguments", "{}")]
)
def test_an_engine_of_another_build_or_with_other_arguments_is_refused(
    field: str, value: str
) -> None:
    other = image(1)._replace(engine=VLLM._replace(**{field: value}))
    choice = choose([other], MACHINE, model=MODEL, name="org/model", engine=VLLM)
    assert choice.manifest is None
    ((_, refusal),) = choice.refusals
    assert refusal == (f"engine.{field}", value, getattr(VLLM, field))
