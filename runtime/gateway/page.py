"""The page at `/`: one file that needs nothing from elsewhere, under a policy that says so.

The policy names its one script and its one style by their hashes. What the page shows comes from
`/startup` (`coldframe.runtime.gateway.startup`), and what it asks goes to `/v1/completions`.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Page", "read_page"]


@dataclass(frozen=True, slots=True)
class Page:
    """The page as it is sent.

    Args:
        body: UTF-8.
        headers: All that belong to it.
    """

    body: bytes
    headers: Mapping[str, str]


@functools.cache
def read_page() -> Page:
    """The page; it is read once, when it is first asked for."""
    body = Path(__file__).with_name("page.html").read_bytes()
    policy = {
        "default-src": "'none'",
        "script-src": _hash(body, b"script"),
        "style-src": _hash(body, b"style"),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        # Where a browser knows these, it refuses to make markup out of text at all.
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return Page(
        body,
        {
            "content-type": "text/html; charset=utf-8",
            "content-security-policy": "; ".join(f"{k} {v}" for k, v in policy.items()),
            "cache-control": "no-cache",
            "etag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
        },
    )


def _hash(body: bytes, tag: bytes) -> str:
    """The source expression of the page's only element of that name (CSP Level 3, 8.2)."""
    (content,) = re.findall(b"<" + tag + b">(.*?)</" + tag + b">", body, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"
