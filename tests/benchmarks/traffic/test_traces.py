from __future__ import annotations

from pathlib import Path

import pytest

from coldframe.benchmarks.traffic.traces import Arrival, read_trace
from coldframe.loader.errors import RequestError

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def test_a_trace_is_read_in_the_order_of_its_arrivals(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(
        HEAD + "2023-11-16 18:17:04.0319600,3180,8\n2023-11-16 18:17:03.5319600,4808,10\n"
    )
    assert read_trace(trace) == [Arrival(0.0, 4808, 10), Arrival(0.5, 3180, 8)]


@pytest.mark.parametrize(
    "content",
    ["", HEAD, "a,b\n1,2\n", HEAD + "yesterday,1,2\n", HEAD + "2023-11-16 18:17:04,x,2\n"],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, content: str) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(content)
    with pytest.raises(RequestError, match="no trace"):
        read_trace(trace)
    with pytest.raises(RequestError, match="no trace"):
        read_trace(tmp_path / "none.csv")
