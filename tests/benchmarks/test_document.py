from __future__ import annotations

import json

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldframe.benchmarks.document import SCHEMA, document, figure, percentile, print_document

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40)


@given(VALUES, st.floats(0, 1))
def test_percentiles_are_numpys(values: list[float], share: float) -> None:
    expected = np.percentile(values, 100 * share)
    assert percentile(values, share) == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(json.loads(SCHEMA.read_text()))


def test_a_figure_has_what_its_schema_says(capsys: pytest.CaptureFixture[str]) -> None:
    schema = json.loads(SCHEMA.read_text())
    found = figure([3.0, 1.0, 2.0], "s")
    assert (found["median"], found["min"], found["max"], found["runs"]) == (2, 1, 3, [3, 1, 2])
    part = {"$ref": "#/$defs/figure", "$defs": schema["$defs"]}
    jsonschema.validate(found, part)
    for wrong in ({**found, "unit": "furlong"}, {**found, "runs": []}, {**found, "more": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, part)
    print_document(document("kind", found=found))
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["schema"] == 1
    assert last["found"] == found
    jsonschema.validate(last["fingerprint"], {**part, "$ref": "#/$defs/fingerprint"})
