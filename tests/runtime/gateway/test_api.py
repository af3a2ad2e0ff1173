from __future__ import annotations

import pytest

from coldframe.loader.errors import (
    ColdframeError,
    DeviceError,
    DeviceFull,
    DeviceLost,
    NoDevice,
    ReplicaError,
)
from coldframe.runtime.gateway.api import ApiError


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NoDevice("there is no GPU"), 500),
        (DeviceFull("no memory"), 500),
        (DeviceError("the driver is too old"), 500),
        (DeviceLost("it broke"), 503),  # which another start may mend
        (ReplicaError("a process died"), 503),
    ],
)
def test_a_client_is_told_whether_another_try_is_of_use(error: ColdframeError, status: int) -> None:
    told = ApiError.of(error)
    assert (told.status, told.message, told.kind) == (status, error.what, "server_error")
    assert told.retry_after_s is None
    error.retry_after_s = 12.0
    assert ApiError.of(error).retry_after_s == (12.0 if status == 503 else None)
