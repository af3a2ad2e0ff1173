"""The site: built strictly, whole, and in need of nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.docs.commands import ROOT

pytestmark = pytest.mark.heavy

_LOADING = {
    "audio": ["src"],
    "embed": ["src"],
    "iframe": ["src"],
    "img": ["src", "srcset"],
    "input": ["src"],
    "object": ["data"],
    "script": ["src"],
    "source": ["src", "srcset"],
    "track": ["src"],
    "use": ["href", "xlink:href"],
    "video": ["src", "poster"],
}
"""Attributes by which a page has a browser fetch something by itself. `link` is looked at apart."""
_TOLD = {"next", "prev", "search", "index", "author", "canonical", "genindex"}
"""What a `link` may be that is fetched when somebody asks for it, and not before."""


class Page(HTMLParser):
    """What a page loads, where its links lead, and what can be linked to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self._style = False
        self.styles = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids.update(found[name] for name in ("id", "name") if name in found)
        self.loads += [found[name] for name in _LOADING.get(tag, ()) if name in found]
        if tag == "link" and not set(found.get("rel", "").split()) <= _TOLD:
            self.loads.append(found.get("href", ""))
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        self.styles += found.get("style", "")
        self._style = tag == "style"

    def handle_data(self, data: str) -> None:
        if self._style:
            self.styles += data

    def handle_endtag(self, tag: str) -> None:
        self._style = False


def build(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """What `make docs` does, without a way to a network."""
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    return subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-E", "-a", "-W", "--keep-going", source, target],
        cwd=ROOT,
        env={**os.environ, **nowhere, "PYTHONWARNINGS": "default"},
        capture_output=True,
        text=True,
        timeout=110,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    done = build(ROOT / "docs", target)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def test_every_page_is_there(site: Path) -> None:
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / page.with_suffix(".html").name).exists(), page.name
    assert (site / "searchindex.js").stat().st_size > 50_000
    text = (site / "configuration.html").read_text()
    assert "COLDFRAME_THROTTLE" in text
    assert "made:" not in text


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    assert len(pages) > 15
    for path, page in pages.items():
        for address in page.loads:
            parts = urlsplit(address)
            assert parts.scheme in ("", "data"), f"{path.name}: {address}"
            assert not parts.netloc, f"{path.name}: {address}"
            if parts.path and not parts.scheme:
                assert (path.parent / unquote(parts.path)).is_file(), f"{path.name}: {address}"
        assert not elsewhere(page.styles), path.name
    for sheet in site.rglob("*.css"):
        assert not elsewhere(sheet.read_text()), sheet.name


def elsewhere(style: str) -> list[str]:
    """What a style sheet fetches from other hosts."""
    named = re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')\s;]+)", style)
    return [address for address in named if urlsplit(address).netloc]


def test_links_lead_to_what_is_there(pages: dict[Path, Page]) -> None:
    count = 0
    for path, page in pages.items():
        for address in page.links:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), f"{path.name}: {address}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids, f"{path.name}: {address}"
            count += 1
    assert count > 500


def test_pictures_have_words(pages: dict[Path, Page], site: Path) -> None:
    text = (site / "index.html").read_text()
    found = re.findall(r"<img[^>]*>", text)
    assert len(found) >= 2
    assert all(re.search(r'alt="[^"]{20,}"', image) for image in found)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[there](nowhere.md)", "nowhere.md"),
        ("[there](index.md#nowhere)", "nowhere"),
        ("![there](nowhere.svg)", "nowhere.svg"),
        ("# A\n\n[there](#nowhere)", "nowhere"),
    ],
    ids=["page", "anchor", "picture", "anchor of its own"],
)
def test_what_is_broken_fails_the_build(tmp_path: Path, text: str, told: str) -> None:
    source = tmp_path / "docs"
    source.mkdir()
    config = (ROOT / "docs" / "conf.py").read_text()
    config = config.replace("str(Path(__file__).parents[1])", repr(str(ROOT)))
    (source / "conf.py").write_text(config.replace('["_static"]', "[]"))
    (source / "index.md").write_text("# Start\n\n```{toctree}\npage\n```\n")
    (source / "page.md").write_text(f"# Page\n\n{text}\n")
    done = build(source, tmp_path / "site")
    assert done.returncode != 0
    assert told in done.stderr
