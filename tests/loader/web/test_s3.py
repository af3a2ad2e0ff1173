from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import boto3
import botocore.session
import pytest
import trustme
from boto3.s3.transfer import TransferConfig
from botocore.awsrequest import AWSResponse

import coldframe.loader
from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.errors import (
    ColdframeError,
    SourceChanged,
    SourceCorrupt,
    SourceCredentials,
    SourceDenied,
    SourceElsewhere,
    SourceError,
    SourceNotFound,
    SourceUntrusted,
)
from coldframe.loader.sources.location import S3
from coldframe.loader.web.address import Again, Target
from coldframe.loader.web.limits import Limits
from coldframe.loader.web.origin import WebOrigin
from coldframe.loader.web.s3 import S3Address, s3_origin
from tests.loader.checkpoints.written import tensor, write_model
from tests.loader.web.asking import ask, refusal
from tests.loader.web.moto_server import KEY, SECRET, isolate, moto, only_allowed, upload
from tests.loader.web.servers import Fault, FaultProxy, Request

BUCKET = "models"
TOKEN = "IQoJb3JpZ2luX2VjEXAMPLETOKEN=="


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with moto() as url:
        yield url


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: str) -> None:
    isolate(monkeypatch, tmp_path, server)


@pytest.fixture
def client(_isolated: None) -> Iterator[Any]:
    client = botocore.session.get_session().create_client("s3")
    yield client
    client.close()


def address(prefix: str = "tiny", bucket: str = BUCKET) -> S3Address:
    return S3Address(S3(bucket, prefix))


def header(target: Target, name: str) -> str | None:
    return next((v for k, v in target.headers.items() if k.lower() == name), None)


def region_of(target: Target) -> str:
    found = re.search(r"Credential=[^/]+/\d+/([^/]+)/s3/", header(target, "authorization") or "")
    assert found is not None
    return found[1]


def key_of(target: Target) -> str:
    found = re.search(r"Credential=([^/]+)/", header(target, "authorization") or "")
    assert found is not None
    return found[1]


def xml(code: str, message: str = "", more: str = "") -> bytes:
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f"<Error><Code>{code}</Code><Message>{message}</Message>{more}"
        "<RequestId>4442587FB7D0A2F9</RequestId></Error>"
    ).encode()


def again(place: S3Address, status: int, body: bytes, **headers: str) -> Again:
    """What an address makes of an answer to a request that looks like its own."""
    found = {name.replace("_", "-"): value for name, value in headers.items()}
    scope = f"{KEY}/20260101/us-east-1/s3/aws4_request"
    signed = f"AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders=host, Signature=0123"
    target = Target("http", "127.0.0.1", 9000, "/models/x", {"Authorization": signed})
    return place.refused(refusal(place, target, status, found, body))


def error(place: S3Address, status: int, body: bytes, **headers: str) -> SourceError:
    with pytest.raises(SourceError) as raised:
        again(place, status, body, **headers)
    return raised.value


# Where a bucket is asked


class _Nothing:
    """The body of an answer that never came."""

    def stream(self, *_: object, **__: object) -> Iterator[bytes]:
        return iter(())


def sent_by_botocore(bucket: str, key: str) -> str:
    """The URL of a GET as botocore itself sends it."""
    client = botocore.session.get_session().create_client("s3")
    sent: list[str] = []

    def send(request: Any, **_: object) -> AWSResponse:
        sent.append(request.url)
        return AWSResponse(request.url, 200, {}, _Nothing())

    client.meta.events.register("before-send.s3.GetObject", send)
    client.get_object(Bucket=bucket, Key=key)
    client.close()
    return sent[0]


AWS = {"AWS_ENDPOINT_URL": "", "AWS_DEFAULT_REGION": "eu-central-1"}


@pytest.mark.parametrize(
    ("environ", "config", "bucket", "host", "path"),
    [
        (AWS, "", "b1-models", "b1-models.s3.eu-central-1.amazonaws.com", "/"),
        (AWS, "", "dotted.models", "s3.eu-central-1.amazonaws.com", "/dotted.models/"),
        (AWS, "s3 =\n  addressing_style = path", "b1", "s3.eu-central-1.amazonaws.com", "/b1/"),
        (
            {**AWS, "AWS_USE_DUALSTACK_ENDPOINT": "true"},
            "",
            "b1-models",
            "b1-models.s3.dualstack.eu-central-1.amazonaws.com",
            "/",
        ),
        (
            {"AWS_ENDPOINT_URL": "", "AWS_DEFAULT_REGION": "us-gov-west-1"},
            "use_fips_endpoint = true",
            "b1-models",
            "b1-models.s3-fips.us-gov-west-1.amazonaws.com",
            "/",
        ),
        (
            {"AWS_ENDPOINT_URL": "", "AWS_DEFAULT_REGION": "cn-north-1"},
            "",
            "b1-models",
            "b1-models.s3.cn-north-1.amazonaws.com.cn",
            "/",
        ),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9000"}, "", "b1", "127.0.0.1", "/b1/"),
        ({"AWS_ENDPOINT_URL": "http://[::1]:9000/"}, "", "b1", "::1", "/b1/"),
        ({"AWS_ENDPOINT_URL_S3": "http://minio:9000/s3"}, "", "b1", "minio", "/s3/b1/"),
        (
            {"AWS_ENDPOINT_URL": ""},
            "endpoint_url = https://storage.googleapis.com",
            "b1-models",
            "storage.googleapis.com",
            "/b1-models/",
        ),
        (
            {"AWS_ENDPOINT_URL": "https://s3.example.org"},
            "s3 =\n  addressing_style = virtual",
            "b1-models",
            "b1-models.s3.example.org",
            "/",
        ),
    ],
)
def test_it_asks_where_botocore_asks(
    environ: dict[str, str],
    config: str,
    bucket: str,
    host: str,
    path: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for variable, value in environ.items():
        monkeypatch.setenv(variable, value) if value else monkeypatch.delenv(variable)
    (tmp_path / "aws-config").write_text(f"[default]\n{config}\n")
    place = S3Address(S3(bucket, "some models/ä"))
    name = "a b+c/~é=&?#%.x"
    target = place.target(name, {"Range": "bytes=0-9"})
    assert (target.host, target.path[: len(path)]) == (host, path)
    shown = f"[{host}]" if ":" in host else host
    port = "" if target.port in (80, 443) else f":{target.port}"
    assert f"{target.scheme}://{shown}{port}{target.path}" == sent_by_botocore(
        bucket, f"some models/ä/{name}"
    )
    place.close()


@pytest.mark.parametrize(
    ("prefix", "uri", "key"),
    [
        ("", "s3://models", "config.json"),
        ("a", "s3://models/a", "a/config.json"),
        ("a/b c", "s3://models/a/b c", "a/b c/config.json"),
    ],
)
def test_a_key_is_the_prefix_and_the_name(prefix: str, uri: str, key: str) -> None:
    place = address(prefix)
    assert place.uri == uri
    assert place.key("config.json") == key
    assert place.uri_of("config.json") == f"s3://models/{key}"


def test_nothing_is_imported_before_the_first_request() -> None:
    code = (
        "import sys; from coldframe.loader.web.s3 import S3Address;"
        "from coldframe.loader.sources.location import S3; S3Address(S3('b', 'p'));"
        "print([m for m in ('botocore', 'boto3', 'awscrt', 'http.client', 'ssl')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_it_works_in_a_process_that_knows_no_packages(server: str) -> None:
    code = (
        f"import sys; sys.path[:0] = {[p for p in sys.path if 'site-packages' not in p]!r};"
        "from coldframe.loader.web.s3 import S3Address;"
        "from coldframe.loader.sources.location import S3;"
        "print(S3Address(S3('b', 'p')).target('x', {}))"
    )
    root = Path(next(iter(coldframe.loader.__path__))).parent
    done = subprocess.run(
        [sys.executable, "-S", "-c", _linked(root) + code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Target(scheme='http', host='127.0.0.1'" in done.stdout


def _linked(root: Path) -> str:
    """Code that makes `coldframe` importable without site-packages."""
    return (
        "import sys, types; package = types.ModuleType('coldframe');"
        f"package.__path__ = [{str(root)!r}]; sys.modules['coldframe'] = package;"
    )


# What is read


def test_a_checkpoint_is_read_byte_for_byte(client: Any, tmp_path: Path) -> None:
    root = write_model(tmp_path / "m", [[tensor("a", 5000)], [tensor("b", 777, 1)]])
    upload(client, root, BUCKET, "tiny/")
    place = address()
    for path in root.iterdir():
        assert ask(place, path.name).body == path.read_bytes()
    part = ask(place, "model-00001-of-00002.safetensors", {"Range": "bytes=100-1099"})
    whole = (root / "model-00001-of-00002.safetensors").read_bytes()
    assert (part.status, part.body) == (206, whole[100:1100])
    assert part.headers["content-range"] == f"bytes 100-1099/{len(whole)}"


def test_odd_keys_and_multipart_objects(client: Any) -> None:
    client.create_bucket(Bucket=BUCKET)
    key = "a b+c/d~é=&?#%41/x.safetensors"
    content = os.urandom(6 << 20)
    made = client.create_multipart_upload(Bucket=BUCKET, Key=key)
    where = {"Bucket": BUCKET, "Key": key, "UploadId": made["UploadId"]}
    parts = [
        {
            "PartNumber": n,
            "ETag": client.upload_part(**where, PartNumber=n, Body=body)["ETag"],
        }
        for n, body in enumerate([content[: 5 << 20], content[5 << 20 :]], 1)
    ]
    client.complete_multipart_upload(**where, MultipartUpload={"Parts": parts})
    answer = ask(address("a b+c/d~é=&?#%41"), "x.safetensors")
    assert answer.body == content
    pinned = {"If-Match": answer.headers["etag"], "Range": "bytes=0-0"}
    assert ask(address("a b+c/d~é=&?#%41"), "x.safetensors", pinned).body == content[:1]


def test_a_replaced_object_is_not_read_on(client: Any) -> None:
    client.create_bucket(Bucket=BUCKET)
    client.put_object(Bucket=BUCKET, Key="tiny/x", Body=b"old")
    pinned = {"If-Match": ask(address(), "x").headers["etag"]}
    client.put_object(Bucket=BUCKET, Key="tiny/x", Body=b"new")
    with pytest.raises(SourceChanged, match="replaced"):
        ask(address(), "x", pinned)


def test_many_threads_share_one_address(client: Any) -> None:
    client.create_bucket(Bucket=BUCKET)
    client.put_object(Bucket=BUCKET, Key="tiny/x", Body=b"content")
    place = address()
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(ask(place, "x").body)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"content"] * 8


# Who may read it


@pytest.fixture
def reader(server: str, client: Any) -> Iterator[tuple[str, str]]:
    """Key and secret of a user who may read s3://models/tiny/* only."""
    client.create_bucket(Bucket=BUCKET)
    client.put_object(Bucket=BUCKET, Key="tiny/x", Body=b"content")
    client.put_object(Bucket=BUCKET, Key="other/x", Body=b"content")
    iam = botocore.session.get_session().create_client("iam")
    iam.create_user(UserName="reader")
    policy = {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Action": "s3:GetObject",
                "Resource": f"arn:aws:s3:::{BUCKET}/tiny/*",
            }
        ],
    }
    iam.put_user_policy(UserName="reader", PolicyName="p", PolicyDocument=json.dumps(policy))
    made = iam.create_access_key(UserName="reader")["AccessKey"]
    with only_allowed(server):
        yield made["AccessKeyId"], made["SecretAccessKey"]
    iam.delete_access_key(UserName="reader", AccessKeyId=made["AccessKeyId"])
    iam.delete_user_policy(UserName="reader", PolicyName="p")
    iam.delete_user(UserName="reader")
    iam.close()


def test_the_signature_is_what_the_server_computes(
    reader: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", reader[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", reader[1])
    assert ask(address(), "x", {"Range": "bytes=1-3"}).body == b"ont"
    with pytest.raises(SourceDenied) as denied:
        ask(address("other"), "x")
    assert type(denied.value) is SourceDenied
    assert "s3:GetObject" in str(denied.value)
    assert "s3:ListBucket" in denied.value.hint
    assert denied.value.where == "s3://models/other/x, bytes 0-99"

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with pytest.raises(SourceCredentials, match="signature") as wrong:
        ask(address(), "x")
    assert "secret key" in wrong.value.hint

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    with pytest.raises(SourceCredentials, match="no such access key"):
        ask(address(), "x")


def test_without_credentials_it_says_where_it_has_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(SourceCredentials, match="there are no AWS credentials") as raised:
        address().target("x", {})
    assert "environment" in str(raised.value)
    assert "'default'" in str(raised.value)
    assert "COLDFRAME_S3_UNSIGNED=1" in raised.value.hint


def test_public_buckets_need_none(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client.create_bucket(Bucket=BUCKET)
    client.put_object(Bucket=BUCKET, Key="tiny/x", Body=b"content", ACL="public-read")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("COLDFRAME_S3_UNSIGNED", "1")
    answer = ask(address(), "x", {"Range": "bytes=0-2"})
    assert answer.body == b"con"
    assert answer.target.headers == {"Range": "bytes=0-2"}


def test_a_profile_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    monkeypatch.setenv("AWS_CA_BUNDLE", "/etc/ssl/ca.pem")
    (tmp_path / "aws-config").write_text("[profile lab]\nregion = eu-west-3\n")
    (tmp_path / "aws-credentials").write_text(
        f"[lab]\naws_access_key_id = {KEY[::-1]}\naws_secret_access_key = {SECRET}\n"
    )
    place = address()
    target = place.target("x", {})
    assert (region_of(target), key_of(target)) == ("eu-west-3", KEY[::-1])
    assert place.region == "eu-west-3"
    assert place.ca_bundle == "/etc/ssl/ca.pem"


def test_the_region_is_also_where_aws_puts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    assert address().target("x", {}).host == "models.s3.eu-north-1.amazonaws.com"


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ("[profile other]\n", "The config profile (lab) could not be found"),
        ("[profile lab]\ncredential_process = false\n", "custom-process"),
        ("[profile lab]\naws_access_key_id = x\n", "missing: aws_secret_access_key"),
    ],
)
def test_credentials_that_cannot_be_had(
    config: str, text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    (tmp_path / "aws-config").write_text(config)
    with pytest.raises(SourceCredentials, match="cannot be had") as raised:
        address().target("x", {})
    assert text in str(raised.value)


@pytest.mark.parametrize("bucket", ["x--use1-az4--x-s3", "a"])
def test_a_bucket_that_cannot_be_addressed(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    with pytest.raises(SourceError) as raised:
        address(bucket=bucket).target("x", {})
    assert bucket in str(raised.value)


def issue_credentials(tmp_path: Path) -> Path:
    """A profile whose credentials expire, and come anew from a program; returns their counter."""
    counter, program = tmp_path / "counter", tmp_path / "issue.py"
    counter.write_text("0")
    program.write_text(
        "import datetime, json, pathlib\n"
        f"path = pathlib.Path({str(counter)!r})\n"
        "number = int(path.read_text()) + 1\n"
        "path.write_text(str(number))\n"
        "expires = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(hours=1)\n"
        "print(json.dumps(dict(Version=1, AccessKeyId=f'KEY{number}', SecretAccessKey='s',\n"
        f"    SessionToken={TOKEN!r} + str(number), Expiration=expires.isoformat())))\n"
    )
    (tmp_path / "aws-config").write_text(
        f"[default]\ncredential_process = {sys.executable} {program}\n"
    )
    return counter


def test_credentials_that_expired_are_renewed_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    counter = issue_credentials(tmp_path)
    place = address()
    old = [place.target("x", {}) for _ in range(2)]
    assert [key_of(target) for target in old] == ["KEY1", "KEY1"]
    assert header(old[0], "x-amz-security-token") == f"{TOKEN}1"
    expired = xml("ExpiredToken", "The provided token has expired.", f"<Token-0>{TOKEN}1</Token-0>")
    for target in old:  # the second is of another thread, sent before the first was refused
        assert place.refused(refusal(place, target, 400, {}, expired)).at_once
    new = place.target("x", {})
    assert key_of(new) == "KEY2"
    assert counter.read_text() == "2"
    with pytest.raises(SourceCredentials, match="expired"):
        place.refused(refusal(place, new, 400, {}, expired))
    assert counter.read_text() == "2"


def test_credentials_are_refreshed_before_they_expire(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    issue_credentials(tmp_path)
    program = tmp_path / "issue.py"
    program.write_text(program.read_text().replace("hours=1", "minutes=5 if number == 1 else 60"))
    place = address()
    # botocore refreshes a quarter of an hour ahead.
    assert key_of(place.target("x", {})) == "KEY2"
    assert key_of(place.target("x", {})) == "KEY2"


def test_keys_that_were_replaced_in_the_file_are_found(
    server: str, client: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    client.create_bucket(Bucket=BUCKET)
    client.put_object(Bucket=BUCKET, Key="tiny/x", Body=b"content")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    file = tmp_path / "aws-credentials"
    text = "[default]\naws_access_key_id = {}\naws_secret_access_key = s\n"
    file.write_text(text.format("OLD"))
    with FaultProxy(server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        place = address()
        assert key_of(place.target("x", {})) == "OLD"
        file.write_text(text.format("NEW"))
        proxy.faults = [Fault(status=403, body=xml("InvalidAccessKeyId", "does not exist"))]
        answer = ask(place, "x")
    assert (answer.body, key_of(answer.target)) == (b"content", "NEW")
    assert [a.at_once for a in answer.agains] == [True]


# Where it is


WRONG_REGION = "The authorization header is malformed; the region 'us-east-1' is wrong"


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=301, headers={"x-amz-bucket-region": "eu-west-2"}, body=b""),
        Fault(
            status=400,
            body=xml("AuthorizationHeaderMalformed", WRONG_REGION, "<Region>eu-west-2</Region>"),
        ),
        Fault(
            status=400,
            body=xml("AuthorizationHeaderMalformed", f"{WRONG_REGION}; expecting 'eu-west-2'"),
        ),
        Fault(
            status=307,
            headers={"x-amz-bucket-region": "eu-west-2", "Location": "http://elsewhere.invalid/?s"},
            body=xml("TemporaryRedirect"),
        ),
    ],
)
def test_the_region_that_s3_names_is_followed(
    fault: Fault, server: str, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.create_bucket(Bucket=BUCKET)
    client.put_object(Bucket=BUCKET, Key="tiny/x", Body=b"content")
    with FaultProxy(server, [fault]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        place = address()
        answer = ask(place, "x")
        assert answer.body == b"content"
        assert [a.at_once for a in answer.agains] == [True]
        assert [region for r in proxy.log for region in re.findall(r"/\d{8}/([^/]+)/", str(r))] == [
            "us-east-1",
            "eu-west-2",
        ]
        assert ask(place, "x").agains == []


def test_on_aws_the_host_changes_with_the_region(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    for unsigned in ("0", "1"):
        monkeypatch.setenv("COLDFRAME_S3_UNSIGNED", unsigned)
        place = address()
        first, second = (place.target("x", {}) for _ in range(2))
        for target in (first, second):  # two threads find it out
            moved = refusal(place, target, 301, {"x-amz-bucket-region": "ap-south-1"})
            assert place.refused(moved).at_once
        third = place.target("x", {})
        assert third.host == "models.s3.ap-south-1.amazonaws.com"
        moved = refusal(place, third, 301, {"x-amz-bucket-region": "sa-east-1"})
        with pytest.raises(SourceElsewhere) as raised:
            place.refused(moved)
        assert "ap-south-1" in str(raised.value)
        assert "AWS_REGION=sa-east-1" in raised.value.hint


@pytest.mark.parametrize("region", ["", "us-east-1"])
def test_a_redirect_that_leads_nowhere(region: str) -> None:
    found = error(
        address(), 301, b"", location="https://user:pw@b.example/?sig=1", x_amz_bucket_region=region
    )
    assert type(found) is SourceElsewhere
    assert "https://b.example" in str(found)
    assert "pw" not in str(found)
    assert "sig" not in str(found)
    assert "us-east-1" in str(found)


# All of it, with the reader of ranges


SHARDS = [[tensor("a", 300_000), tensor("b", 41, 1)], [tensor("c", 700_000, 2)]]


def read_all(origin: WebOrigin, size: int = 100_000) -> tuple[Checkpoint, list[bytes], str]:
    """The checkpoint, its data, read in ranges from the back to the front, and the final note."""
    found = Checkpoint.open(origin)
    source = origin.open_source(found.shards)
    contents = []
    try:
        for index, shard in enumerate(found.shards):
            memory = memoryview(bytearray(shard.size))
            for at in reversed(range(shard.data_offset, shard.size, size)):
                source.read_into(index, at, [memory[at : min(at + size, shard.size)]])
            contents.append(bytes(memory[shard.data_offset :]))
        source.finish()
        return found, contents, source.note
    finally:
        source.close()


@pytest.mark.parametrize("kind", ["CRC64NVME", "CRC32"])
def test_a_checkpoint_comes_through_whatever_happens(
    kind: str, server: str, client: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = write_model(tmp_path / "m", SHARDS, {"model_type": "llama"})
    upload(client, root, BUCKET, "odd prefix/ä/", ChecksumAlgorithm=kind)
    seen: dict[str, int] = {}

    def faults(request: Request) -> Fault | None:
        first, last = request.range or (0, 0)
        key = f"{request.method} {request.path} {first}"
        seen[key] = seen.get(key, 0) + 1
        if request.method != "GET" or seen[key] > 1:
            return None
        if first == 0 and "index" in request.path:
            return Fault(status=301, headers={"x-amz-bucket-region": "eu-west-2"})
        if first % 3 == 0:
            return Fault(status=503, body=xml("SlowDown", "Please reduce your request rate."))
        return Fault(cut_after=(last - first) // 2)

    with FaultProxy(server, faults) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        origin = s3_origin(S3(BUCKET, "odd prefix/ä"), limits=Limits(backoff_s=0.001))
        found, contents, note = read_all(origin)
        origin.close()
    assert found.config == {"model_type": "llama"}
    assert contents == [b"".join(t[3] for t in shard) for shard in SHARDS]
    assert note.endswith(f"verified by S3's {kind.lower()}")
    assert "retries" in note


def test_bytes_that_change_on_the_way_are_found(
    server: str, client: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = write_model(tmp_path / "m", SHARDS)
    upload(client, root, BUCKET, "tiny/", ChecksumAlgorithm="CRC64NVME")

    def faults(request: Request) -> Fault | None:
        first, last = request.range or (0, 0)
        return Fault(flip_at=50) if first > 100 and last - first > 90_000 else None

    with FaultProxy(server, faults) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        origin = s3_origin(S3(BUCKET, "tiny"))
        with pytest.raises(SourceCorrupt) as raised:
            read_all(origin)
        assert "model-00001-of-00002.safetensors" in str(raised.value)
        origin.close()


def test_the_profiles_authority_is_trusted(
    server: str, client: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = write_model(tmp_path / "m", SHARDS)
    upload(client, root, BUCKET, "tiny/", ChecksumAlgorithm="CRC64NVME")
    authority = trustme.CA()
    with FaultProxy(server, tls=authority.issue_cert("127.0.0.1")) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        origin = s3_origin(S3(BUCKET, "tiny"))
        with pytest.raises(SourceUntrusted):
            read_all(origin)
        origin.close()
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "ca.pem"))
        origin = s3_origin(S3(BUCKET, "tiny"))
        _, contents, note = read_all(origin)
        assert note.endswith("verified by S3's crc64nvme")
        origin.close()
    assert contents == [b"".join(t[3] for t in shard) for shard in SHARDS]


# What else it says


@pytest.mark.parametrize(
    ("bucket", "prefix", "text"),
    [(BUCKET, "nowhere", "no such object"), ("no-such-bucket", "tiny", "no bucket 'no-such-bu")],
)
def test_what_is_not_there(client: Any, bucket: str, prefix: str, text: str) -> None:
    client.create_bucket(Bucket=BUCKET)
    with pytest.raises(SourceNotFound, match=text) as raised:
        ask(address(prefix, bucket), "config.json")
    assert f"s3://{bucket}/{prefix}/config.json" in str(raised.value)


@pytest.mark.parametrize(
    ("status", "code", "slow_down"),
    [
        (503, "SlowDown", True),
        (503, "ServiceUnavailable", True),
        (429, "TooManyRequests", True),
        (500, "InternalError", False),
        (502, "", False),
        (504, "", False),
        (400, "RequestTimeout", False),
        (409, "OperationAborted", False),
    ],
)
def test_what_may_go_better_another_time(status: int, code: str, slow_down: bool) -> None:
    found = again(address(), status, xml(code, "Please wait.") if code else b"", retry_after="7")
    assert (found.slow_down, found.at_once, found.after_s) == (slow_down, False, 7.0)
    assert str(status) in found.why
    assert code in found.why


DENIED = (
    "User: arn:aws:sts::123456789012:assumed-role/web/i-1 is not authorized to perform: "
    "s3:GetObject on resource: &quot;arn:aws:s3:::models/tiny/x&quot; because no identity-based "
    "policy allows the s3:GetObject action"
)
CLOCKS = (
    "<RequestTime>20260101T000000Z</RequestTime><ServerTime>2026-01-01T09:00:00Z</ServerTime>"
    "<MaxAllowedSkewMilliseconds>900000</MaxAllowedSkewMilliseconds>"
)


@pytest.mark.parametrize(
    ("status", "body", "kind", "texts"),
    [
        (403, xml("AccessDenied", DENIED), SourceDenied, ["assumed-role/web/i-1", '"arn:aws:s3']),
        (
            403,
            xml("AccessDenied", "User is not authorized to perform: kms:Decrypt on the key"),
            SourceDenied,
            ["kms:Decrypt", "the key's"],
        ),
        (403, b"<html>go away</html>", SourceDenied, ["403"]),
        (404, b"", SourceNotFound, ["404"]),
        (400, xml("ExpiredToken", "has expired"), SourceCredentials, ["have expired", "Log in"]),
        (403, xml("InvalidAccessKeyId", "m"), SourceCredentials, ["no such access key"]),
        (400, xml("InvalidToken", "m"), SourceCredentials, ["AWS_SESSION_TOKEN"]),
        (403, xml("SignatureDoesNotMatch", "m"), SourceCredentials, ["secret key"]),
        (401, xml("Unauthorized", "m"), SourceCredentials, ["refused"]),
        (403, xml("InvalidSecurity", "m"), SourceCredentials, ["refused"]),
        (
            403,
            xml("RequestTimeTooSkewed", "m", CLOCKS),
            SourceCredentials,
            ["20260101T000000Z here", "2026-01-01T09:00:00Z", "clock"],
        ),
        (403, xml("InvalidObjectState", "m"), SourceError, ["archived", "Restore"]),
        (412, xml("PreconditionFailed", "m"), SourceChanged, ["replaced"]),
        (
            400,
            xml("AuthorizationHeaderMalformed", "the Credential is mal-formed"),
            SourceError,
            ["mal-formed"],
        ),
        (400, xml("InvalidRequest", "encrypted with a key"), SourceError, ["InvalidRequest"]),
    ],
)
def test_each_refusal_has_its_own_words(
    status: int, body: bytes, kind: type[ColdframeError], texts: list[str]
) -> None:
    found = error(address(), status, body)
    assert type(found) is kind
    assert found.where == "s3://models/tiny/config.json, bytes 0-99"
    assert str(status) in str(found) or "clock" in str(found)
    for text in texts:
        assert text in str(found)


def test_no_secret_is_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    place = address()
    target = place.target("x", {"Range": "bytes=0-99"})
    authorization = header(target, "authorization") or ""
    signature = authorization.rpartition("=")[2]
    secrets = [KEY, SECRET, TOKEN, signature, authorization]
    quoted = "".join(f" {secret} " for secret in secrets)
    more = "".join(f"<AWSAccessKeyId>{s}</AWSAccessKeyId><Token-0>{s}</Token-0>" for s in secrets)
    texts = [repr(target), repr(place), place.uri]
    for status in (301, 400, 401, 403, 404, 405, 412, 416, 500, 501, 503):
        for code in ("AccessDenied", "SignatureDoesNotMatch", "ExpiredToken", "Odd", quoted):
            # A store never learns the secret key; all else it may quote.
            body = xml(code.replace(SECRET, ""), quoted.replace(SECRET, ""), more)
            try:
                texts.append(str(place.refused(refusal(place, target, status, {}, body))))
            except SourceError as raised:
                texts += [str(raised), repr(raised), str(raised.to_wire())]
    for secret in secrets:
        assert not any(secret in text for text in texts)


@pytest.mark.parametrize(
    "body",
    [
        b'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;">]><Error><Code>&b;</Code>',
        b"<Error><Code>Odd</Code><Message>" + b"x" * 60_000 + b"</Message>",
        b"\xff\xfe\x00<Code",
        b"<Error><Code>Line\nbreak\x1b[31m</Code></Error>",
    ],
)
def test_odd_bodies_stay_short_and_plain(body: bytes) -> None:
    text = str(error(address(), 405, body))
    assert len(text) < 1000
    assert text.isprintable()


@pytest.mark.heavy
def test_a_large_object_as_boto3_uploads_it_is_not_called_corrupt(
    client: Any, tmp_path: Path
) -> None:
    # In parts, and this server names the checksum of their checksums without saying so.
    root = write_model(tmp_path / "m", [[tensor("a", 9_000_000)]])
    path = root / "model.safetensors"
    in_parts = TransferConfig(multipart_threshold=5 << 20, multipart_chunksize=5 << 20)
    with closing(boto3.client("s3")) as uploader:
        for file in root.iterdir():
            uploader.upload_file(str(file), BUCKET, f"parts/{file.name}", Config=in_parts)
    assert client.head_object(Bucket=BUCKET, Key=f"parts/{path.name}")["ETag"].endswith('-2"')
    origin = s3_origin(S3(BUCKET, "parts"))
    _, (data,), _ = read_all(origin, size=1 << 20)
    assert path.read_bytes().endswith(data)
    origin.close()
