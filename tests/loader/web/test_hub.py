from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import hf_hub_download, hf_hub_url, scan_cache_dir, try_to_load_from_cache

from coldframe.loader.errors import (
    RequestError,
    SourceChanged,
    SourceCredentials,
    SourceDenied,
    SourceError,
    SourceNotFound,
)
from coldframe.loader.sources.location import Hub
from coldframe.loader.web.hub import HubAddress
from coldframe.loader.web.hub_cache import cache_directory, find_cached, find_token, is_offline
from tests.loader.web.asking import ask, refusal
from tests.loader.web.hub_server import FakeHub, Repo
from tests.loader.web.reading import read_model, sharded_model, weights_of

REPO = "org/name"
FILES = {"config.json": b'{"model_type": "x"}', "model.safetensors": bytes(range(256)) * 10}
SHARDED = {
    "config.json": b"{}",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "a.safetensors", "b": "b.safetensors", "c": "a.safetensors"}}
    ).encode(),
    "a.safetensors": b"a" * 1000,
    "b.safetensors": b"b" * 1000,
}
VARIABLES = [
    *("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "HF_ENDPOINT"),
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_DISABLE_IMPLICIT_TOKEN"),
    *("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"),
]


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub() as server:
        server.repos[REPO] = Repo()
        server.repos[REPO].push(FILES)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def download(hub: FakeHub, cache: Path, name: str, revision: str = "main") -> Path:
    """By the huggingface_hub package."""
    path = hf_hub_download(
        REPO, name, revision=revision, cache_dir=cache, endpoint=hub.url, token=False
    )
    return Path(path)


# -- the cache


def test_a_snapshot_is_found_once_it_is_whole(hub: FakeHub, cache: Path) -> None:
    commit = hub.repos[REPO].push(SHARDED)
    assert find_cached(REPO) is None
    for name in SHARDED:
        assert find_cached(REPO) is None
        path = download(hub, cache, name)
    assert find_cached(REPO) == str(path.parent)
    assert find_cached(REPO, "main") == find_cached(REPO, commit) == str(path.parent)
    assert find_cached(REPO, "other") is None
    assert find_cached("org/other") is None

    [repo] = scan_cache_dir(cache).repos
    [revision] = repo.revisions
    assert str(revision.snapshot_path) == find_cached(REPO)
    for name in SHARDED:
        assert try_to_load_from_cache(REPO, name, cache_dir=cache) == f"{path.parent}/{name}"


def test_one_file_of_weights_is_enough(hub: FakeHub, cache: Path) -> None:
    download(hub, cache, "model.safetensors")
    assert find_cached(REPO) is None
    path = download(hub, cache, "config.json")
    assert find_cached(REPO) == str(path.parent)


def test_revisions(hub: FakeHub, cache: Path) -> None:
    old = hub.repos[REPO].push(FILES, "main")
    hub.repos[REPO].refs["refs/pr/1"] = old
    new = hub.repos[REPO].push({**FILES, "config.json": b"{}"}, "main")
    for name in FILES:
        download(hub, cache, name, "refs/pr/1")
        download(hub, cache, name, new)
    for revision, commit in [("refs/pr/1", old), (old, old), (new, new)]:
        found = find_cached(REPO, revision)
        assert found is not None
        assert found == os.path.dirname(
            str(try_to_load_from_cache(REPO, "config.json", cache_dir=cache, revision=revision))
        )
        assert os.path.basename(found) == commit
    # A commit by its hash leaves no branch behind.
    assert find_cached(REPO, "main") is None
    assert try_to_load_from_cache(REPO, "config.json", cache_dir=cache) is None


def test_a_snapshot_that_was_evicted_in_part_is_not_whole(hub: FakeHub, cache: Path) -> None:
    for name in FILES:
        path = download(hub, cache, name)
    assert find_cached(REPO) is not None
    (path.parent / "model.safetensors").resolve().unlink()  # the blob; the link stays
    assert find_cached(REPO) is None


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b'{"weight_map": []}',
        b'{"weight_map": {}}',
        b'{"weight_map": {"a": 1}}',
        b'{"weight_map": {"a": ["config.json"]}}',
    ],
)
def test_a_bad_index_is_no_whole_snapshot(index: bytes, cache: Path) -> None:
    snapshot = cache / "models--org--name" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_bytes(b"{}")
    (snapshot / "model.safetensors.index.json").write_bytes(index)
    assert find_cached(REPO) is None


@pytest.mark.parametrize("commit", ["../..", "/", "..", ".", "a/b"])
def test_a_ref_leads_nowhere_else(commit: str, cache: Path) -> None:
    (cache / "models--org--name" / "refs").mkdir(parents=True)
    (cache / "models--org--name" / "snapshots").mkdir(parents=True)
    (cache / "models--org--name" / "refs" / "main").write_text(commit)
    for folder in (cache, cache / "models--org--name", cache / "models--org--name" / "snapshots"):
        (folder / "config.json").write_bytes(b"{}")
        (folder / "model.safetensors").write_bytes(b"")
    assert find_cached(REPO) is None
    assert find_cached(REPO, commit) is None


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"XDG_CACHE_HOME": "/xdg"},
        {"HF_HOME": "/hf"},
        {"HF_HOME": "~/hf", "XDG_CACHE_HOME": "/xdg"},
        {"HF_HOME": "$HOME/hf"},
        {"HF_HUB_CACHE": "~/cache", "HF_HOME": "/hf"},
        {"HUGGINGFACE_HUB_CACHE": "/old"},
        {"HUGGINGFACE_HUB_CACHE": "/old", "HF_HUB_CACHE": "/new"},
        {"HF_TOKEN_PATH": "~/token", "HF_HOME": "/hf"},
        {"HF_HUB_OFFLINE": "1"},
        {"HF_HUB_OFFLINE": "yes"},
        {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "1"},
        {"HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": "True"},
        {"HF_HUB_OFFLINE": "2"},
    ],
)
def test_the_environment_means_what_it_means_to_huggingface_hub(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_CACHE")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    # That module reads the environment once, so it is run anew; the package around it is slow.
    constants = Path(huggingface_hub.__path__[0], "constants.py")
    code = (
        f"import json, runpy; found = runpy.run_path({str(constants)!r}); print(json.dumps("
        "[found[n] for n in ('HF_HUB_CACHE', 'HF_TOKEN_PATH', 'HF_HUB_OFFLINE')]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    theirs, token_path, offline = json.loads(done.stdout)
    assert cache_directory() == theirs
    assert is_offline() is offline
    if token_path.startswith(str(tmp_path)):
        Path(token_path).parent.mkdir(parents=True)
        Path(token_path).write_text("TOKEN\n")
        assert find_token() == ("TOKEN", token_path)


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_token() is None
    file = tmp_path / "home" / ".cache" / "huggingface" / "token"
    file.parent.mkdir(parents=True)
    file.write_text("  FILE\n\n")
    assert find_token() == ("FILE", str(file))
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "OLD")
    assert find_token() == ("OLD", "HUGGING_FACE_HUB_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "NEW\n")
    assert find_token() == ("NEW", "HF_TOKEN")
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    assert find_token() is None


def test_a_token_that_cannot_be_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    monkeypatch.setenv("HF_TOKEN_PATH", str(file))
    file.write_bytes(b"SECRET\xff")
    with pytest.raises(SourceCredentials, match="no text") as error:
        find_token()
    assert "SECRET" not in str(error.value)
    file.write_text("SECRET SECRET")
    with pytest.raises(SourceCredentials, match="no token") as error:
        HubAddress(Hub(REPO))
    assert "SECRET" not in str(error.value)


# -- how the hub is asked


@pytest.mark.parametrize(
    ("repo", "revision", "name"),
    [
        ("org/name", "main", "config.json"),
        ("gpt2", "v1.0", "config.json"),
        ("org/name", "refs/pr/1", "model-00001-of-00002.safetensors"),
        ("org/name", "ü+b", "a b#?%.json"),
    ],
)
def test_urls_are_those_of_huggingface_hub(repo: str, revision: str, name: str) -> None:
    target = HubAddress(Hub(repo, revision)).target(name, {})
    theirs = hf_hub_url(repo, name, revision=revision, endpoint="https://huggingface.co")
    assert f"{target.scheme}://{target.host}{target.path}" == theirs
    assert target.port == 443


def test_another_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror:8080/hf/")
    target = HubAddress(Hub(REPO)).target("config.json", {})
    assert (target.scheme, target.host, target.port) == ("http", "mirror", 8080)
    assert target.path == "/hf/org/name/resolve/main/config.json"
    monkeypatch.setenv("HF_ENDPOINT", "mirror:SECRET")
    with pytest.raises(RequestError, match="HF_ENDPOINT") as error:
        HubAddress(Hub(REPO))
    assert "SECRET" not in str(error.value)


def test_offline_the_hub_is_not_asked(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceNotFound, match="local cache, and offline mode is on") as error:
        HubAddress(Hub(REPO))
    assert error.value.where == "hf://org/name"
    assert hub.hub_log == []


@pytest.mark.parametrize("small_redirects", [False, True])
def test_files_large_and_small(small_redirects: bool, hub: FakeHub) -> None:
    hub.small_redirects = small_redirects
    address = HubAddress(Hub(REPO))
    for name, content in FILES.items():
        assert ask(address, name).body == content
        answer = ask(address, name, {"Range": "bytes=3-10"})
        assert (answer.status, answer.body) == (206, content[3:11])
    # The link is remembered: two ranges of the weights, one question where they are.
    asked = [seen.path for seen in hub.hub_log if "safetensors" in seen.path]
    assert len(asked) == 1
    assert len(hub.cdn_log) == 2


def test_the_token_goes_to_the_hub_alone(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.small_redirects = True
    hub.accounts = {"hf_SECRET"}
    hub.repos[REPO].tokens = {"hf_SECRET"}
    monkeypatch.setenv("HF_TOKEN", "hf_SECRET")
    address = HubAddress(Hub(REPO))
    for name, content in FILES.items():
        assert ask(address, name).body == content
    assert {seen.headers["authorization"] for seen in hub.hub_log} == {"Bearer hf_SECRET"}
    assert len(hub.cdn_log) == 1
    assert "hf_SECRET" not in str(hub.cdn_log)


@pytest.mark.parametrize("small_redirects", [False, True])
@pytest.mark.parametrize("order", [list(FILES), list(reversed(FILES))])
def test_a_push_in_between_mixes_nothing(
    order: list[str], small_redirects: bool, hub: FakeHub
) -> None:
    hub.small_redirects = small_redirects
    commit = hub.repos[REPO].refs["main"]
    address = HubAddress(Hub(REPO))
    assert address.commit is None
    for name in order:
        assert ask(address, name).body == FILES[name]
        assert address.commit == commit
        hub.repos[REPO].push({"config.json": b"new", "model.safetensors": b"new"})
        hub.signatures.clear()
    for name in order:
        assert ask(address, name).body == FILES[name]
    assert ask(HubAddress(Hub(REPO)), "config.json").body == b"new"


def test_no_such_file_fixes_the_commit_too(hub: FakeHub) -> None:
    address = HubAddress(Hub(REPO))
    with pytest.raises(SourceNotFound):
        ask(address, "no.json")
    hub.repos[REPO].push({"config.json": b"new"})
    assert ask(address, "config.json").body == FILES["config.json"]


def test_answers_of_two_commits_are_refused(hub: FakeHub) -> None:
    """Of requests that were under way before the first answer."""
    address = HubAddress(Hub(REPO))
    targets = [address.target(name, {}) for name in FILES]
    address.accepted(targets[0], {"x-repo-commit": "a" * 40})
    address.accepted(targets[1], {"x-repo-commit": "a" * 40})
    with pytest.raises(SourceChanged, match="pushed to while it was read"):
        address.accepted(targets[1], {"x-repo-commit": "b" * 40})
    with pytest.raises(SourceChanged):
        address.refused(refusal(address, targets[1], 302, {"x-repo-commit": "b" * 40}))


def test_only_the_hub_names_a_commit(hub: FakeHub) -> None:
    address = HubAddress(Hub(REPO))
    link = {"location": f"{hub.cdn_url}/x"}
    address.refused(refusal(address, address.target("config.json", {}), 302, link))
    address.accepted(address.target("config.json", {}), {"x-repo-commit": "a" * 40})
    assert address.commit is None
    address.accepted(address.target("other.json", {}), {"x-repo-commit": "../../x"})
    assert address.commit is None


def test_links_that_expire_are_asked_for_anew(hub: FakeHub) -> None:
    address = HubAddress(Hub(REPO))
    name = "model.safetensors"
    assert ask(address, name).body == FILES[name]
    hub.signatures.clear()
    answer = ask(address, name, {"Range": "bytes=5-9"})
    assert answer.body == FILES[name][5:10]
    assert [again.at_once for again in answer.agains] == [True, True]
    hub.signing = False  # its clock is wrong, say
    hub.signatures.clear()
    with pytest.raises(SourceError, match=f"403 Forbidden from {hub.cdn_url}") as error:
        ask(address, name)
    assert "SIGNATURE" not in str(error.value)


# -- what its refusals mean


def refused_by(hub: FakeHub, location: Hub, name: str = "config.json") -> SourceError:
    with pytest.raises(SourceError) as error:
        ask(HubAddress(location), name)
    assert "hf_SECRET" not in f"{error.value!s} {error.value!r}"
    return error.value


def test_gated(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.accounts = {"hf_SECRET"}
    hub.repos[REPO].tokens = set()
    hub.repos[REPO].gated = True
    for kind in (SourceCredentials, SourceDenied):
        error = refused_by(hub, Hub(REPO))
        assert type(error) is kind
        assert "the repository is gated" in str(error)
        assert f"Accept its licence at {hub.url}/org/name, and set HF_TOKEN" in error.hint
        monkeypatch.setenv("HF_TOKEN", "hf_SECRET")


def test_private_or_missing(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.accounts = {"hf_SECRET"}
    hub.repos["org/private"] = Repo(tokens=set())
    hub.repos["org/private"].push(FILES)
    for repo in ("org/private", "org/missing"):
        error = refused_by(hub, Hub(repo))
        assert type(error) is SourceCredentials
        assert "there is no such repository, or it is private" in str(error)
        assert error.where == f"hf://{repo} at {hub.url}"
        assert "set HF_TOKEN" in error.hint
        assert f"A directory is written ./{repo}." in error.hint
    monkeypatch.setenv("HF_TOKEN", "hf_SECRET")
    for repo in ("org/private", "org/missing"):
        error = refused_by(hub, Hub(repo))
        assert type(error) is SourceNotFound
        assert "The token of HF_TOKEN cannot read it." in error.hint


def test_a_token_that_is_not_valid(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_SECRET")
    error = refused_by(hub, Hub(REPO))
    assert type(error) is SourceCredentials
    assert "does not take the token" in str(error)
    assert "in HF_TOKEN" in error.hint


def test_no_such_revision(hub: FakeHub) -> None:
    error = refused_by(hub, Hub(REPO, "v9"))
    assert type(error) is SourceNotFound
    assert "there is no such revision" in str(error)
    assert error.where == f"hf://org/name@v9 at {hub.url}"


def test_no_such_file(hub: FakeHub) -> None:
    error = refused_by(hub, Hub(REPO), "no.json")
    assert type(error) is SourceNotFound
    assert "the hub has no such file" in str(error)
    assert error.where == "hf://org/name/no.json, bytes 0-99"


def test_disabled(hub: FakeHub) -> None:
    hub.repos[REPO].disabled = True
    error = refused_by(hub, Hub(REPO))
    assert type(error) is SourceDenied
    assert "the hub has disabled the repository" in str(error)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, SourceError),
        (401, SourceCredentials),
        (403, SourceDenied),
        (404, SourceNotFound),
        (407, SourceCredentials),
        (410, SourceNotFound),
        (451, SourceError),
    ],
)
def test_a_mirror_that_gives_no_reasons(status: int, kind: type[SourceError]) -> None:
    address = HubAddress(Hub(REPO))
    with pytest.raises(SourceError, match=f"status {status}") as error:
        address.refused(refusal(address, address.target("config.json", {}), status))
    assert type(error.value) is kind


def test_what_passes_is_asked_again() -> None:
    address = HubAddress(Hub(REPO))
    target = address.target("config.json", {})
    for status in (408, 429, 500, 503):
        headers = {"retry-after": "7", "x-error-code": "RepoNotFound"}
        again = address.refused(refusal(address, target, status, headers))
        assert again.after_s == 7
        assert not again.at_once


def test_nothing_secret_is_in_any_error_or_repr(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_SECRET")
    codes = ["", "RepoNotFound", "GatedRepo", "RevisionNotFound", "EntryNotFound", "SECRET"]
    link = {"location": "https://u:SECRET@cdn/SECRET?X-Amz-Signature=SECRET"}
    shown: list[str] = []
    for redirected in (False, True):
        for status in range(300, 600):
            for code in codes:
                address = HubAddress(Hub(REPO))
                if redirected:
                    address.refused(refusal(address, address.target("x", {}), 302, link))
                target = address.target("x", {})
                headers = {**link, "x-error-code": code, "x-error-message": "SECRET"}
                said = refusal(address, target, status, headers, b"SECRET")
                shown += [repr(address), repr(target)]
                try:
                    shown.append(repr(address.refused(said)))
                except SourceError as error:
                    shown += [str(error), str(error.to_wire())]
    assert len(shown) > 10000
    assert "SECRET" not in "\n".join(shown)


# -- whole checkpoints, through the reader


@pytest.fixture
def model(hub: FakeHub, tmp_path: Path) -> Path:
    """A directory whose files are the repository's."""
    root = sharded_model(tmp_path / "model")
    hub.repos[REPO] = Repo()
    hub.repos[REPO].push({path.name: path.read_bytes() for path in root.iterdir()})
    return root


def test_a_checkpoint_of_the_hub(
    model: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.accounts = {"hf_SECRET"}
    hub.repos[REPO].tokens = {"hf_SECRET"}
    monkeypatch.setenv("HF_TOKEN", "hf_SECRET")
    checkpoint, found = read_model(REPO)
    assert found == weights_of(model)
    assert checkpoint.path == "hf://org/name"
    assert all(seen.headers["authorization"] == "Bearer hf_SECRET" for seen in hub.hub_log)
    assert hub.cdn_log
    assert "hf_SECRET" not in str(hub.cdn_log)
    assert "SECRET" not in repr(checkpoint)
    assert "SIGNATURE" not in repr(checkpoint)


def test_a_checkpoint_of_the_cache(model: Path, hub: FakeHub, cache: Path) -> None:
    for path in model.iterdir():
        snapshot = download(hub, cache, path.name).parent
    hub.hub_log.clear()
    checkpoint, found = read_model(REPO)
    assert found == weights_of(model)
    assert checkpoint.path == str(snapshot)
    assert hub.hub_log == []


@pytest.mark.parametrize("small_redirects", [False, True])
def test_a_push_while_a_checkpoint_is_read(
    small_redirects: bool, model: Path, hub: FakeHub
) -> None:
    hub.small_redirects = small_redirects
    # As soon as the config has been given, the branch is another model.
    hub.after = lambda seen: "config.json" in seen.path and hub.repos[REPO].push({"x": b""})
    checkpoint, found = read_model(REPO)
    assert checkpoint.config == {"model_type": "x"}
    assert found == weights_of(model)
    with pytest.raises(SourceNotFound, match="no such file"):
        read_model(REPO)


def test_the_errors_of_the_hub_come_through(
    model: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SourceCredentials, match="no such repository, or it is private"):
        read_model("org/missing")
    with pytest.raises(SourceNotFound, match="no such revision"):
        read_model(f"{REPO}@v9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceNotFound, match="offline mode is on"):
        read_model(REPO)
