"""Cases 12 to 14 of the catalogue of faults: what is fetched, from where, how much, for how long, and what is left."""

from __future__ import annotations

import datetime
import errno
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from motet.errors import StorageFull
from motet.registry import https
from motet.registry.https import Download, SourceFailed, SourceRefused, dial_public, public_address
from motet.registry.sources import check_source, fetched

FILES = {"/a/adapter_config.json": b"{}", "/a/adapter_model.safetensors": bytes(range(256)) * 4000}
BIG = FILES["/a/adapter_model.safetensors"]
ALLOWED = ["https://models.test/*"]


class Server:
    """An HTTPS server on loopback; `faults` answer instead of it, each once, the first one first."""

    def __init__(self, folder: Path) -> None:
        self.requests: list[tuple[str, str | None]] = []
        self.faults: list[Callable[[BaseHTTPRequestHandler], None]] = []
        self.etag = '"one"'
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append((self.path, self.headers["Range"]))
                if self.path == "/a/adapter_model.safetensors" and outer.faults:
                    outer.faults.pop(0)(self)
                else:
                    outer.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        certificate, key = _certificate(folder)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.context = ssl.create_default_context(cafile=str(certificate))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = FILES.get(handler.path)
        if body is None:
            handler.send_error(404)
            return
        asked = handler.headers["Range"]
        begin = int(asked[6:-1]) if asked and handler.headers["If-Range"] == self.etag else 0
        handler.send_response(206 if begin else 200)
        if begin:
            handler.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
        handler.send_header("ETag", self.etag)
        handler.send_header("Content-Length", str(len(body) - begin))
        handler.end_headers()
        handler.wfile.write(body[begin:])

    def dial(self, _: str, __: int, seconds: float) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._server.server_port), seconds)

    def download(self, max_bytes: int, seconds: float) -> Download:
        return Download(max_bytes, seconds, self.dial, self.context)

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _certificate(folder: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "models.test")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.DNSName("models.test")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = (
        builder.serial_number(1).not_valid_before(now - datetime.timedelta(1)).add_extension(names, False)
    )
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    certificate = builder.not_valid_after(now + datetime.timedelta(1)).sign(key, hashes.SHA256())
    files = folder / "cert.pem", folder / "key.pem"
    pem = serialization.Encoding.PEM
    files[0].write_bytes(certificate.public_bytes(pem))
    files[1].write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.close()


def fetch(
    server: Server, parent: Path, max_bytes: int = 10_000_000, seconds: float = 20.0
) -> dict[str, bytes]:
    """What `https://models.test/a` has."""
    with fetched("https://models.test/a", ALLOWED, parent, max_bytes, seconds, server.download) as folder:
        return {file.name: file.read_bytes() for file in folder.iterdir()}


def cut(at: int, etag: str = '"one"') -> Callable[[BaseHTTPRequestHandler], None]:
    """Half an answer, then the line goes dead."""

    def fault(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("ETag", etag)
        handler.send_header("Content-Length", str(len(BIG)))
        handler.end_headers()
        handler.wfile.write(BIG[:at])
        handler.wfile.flush()
        handler.connection.close()

    return fault


def test_two_files_and_no_signature(server: Server, tmp_path: Path) -> None:
    wanted = {"adapter_config.json": b"{}", "adapter_model.safetensors": BIG}
    assert fetch(server, tmp_path / "in") == wanted
    assert server.requests[-1] == ("/a/model.sig", None)
    assert list((tmp_path / "in").iterdir()) == []


def test_a_broken_download_goes_on_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.faults = [cut(100_000), cut(0)]
    assert fetch(server, tmp_path)["adapter_model.safetensors"] == BIG
    ranges = [asked for path, asked in server.requests if path.endswith("safetensors")]
    assert ranges[0] is None
    assert ranges[1] is not None
    assert 0 < int(ranges[1][6:-1]) <= 100_000


def test_a_file_that_changed_meanwhile_is_fetched_again(server: Server, tmp_path: Path) -> None:
    server.faults = [cut(100_000, '"older"')]
    assert fetch(server, tmp_path)["adapter_model.safetensors"] == BIG


def test_a_line_that_always_breaks(server: Server, tmp_path: Path) -> None:
    server.faults = [cut(1000)] * 5
    with pytest.raises(SourceFailed, match="5 times"):
        fetch(server, tmp_path / "in")
    assert list((tmp_path / "in").iterdir()) == []


def redirect(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(302)
    handler.send_header("Location", "https://127.0.0.1/secret")
    handler.end_headers()


def endless(handler: BaseHTTPRequestHandler) -> None:
    """No length, and no end."""
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(bytes(1 << 16))


def refuse(handler: BaseHTTPRequestHandler) -> None:
    handler.send_error(403)


def huge(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(1 << 40))
    handler.end_headers()


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (redirect, SourceRefused, "redirects are not followed"),
        (endless, SourceFailed, "larger than allowed"),
        (huge, SourceFailed, "larger than allowed"),
        (refuse, SourceFailed, "HTTP 403"),
    ],
)
def test_answers_that_are_not_taken(
    server: Server, tmp_path: Path, fault: Callable[..., None], error: type[Exception], message: str
) -> None:
    server.faults = [fault]
    with pytest.raises(error, match=message):
        fetch(server, tmp_path / "in")
    assert list((tmp_path / "in").iterdir()) == [], "the temporary file is gone"


def drip_body(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(BIG)))
    handler.end_headers()
    while True:
        handler.wfile.write(b"x")
        time.sleep(0.02)


def drip_headers(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        handler.wfile.write(b"x")
        time.sleep(0.02)


def silence(_: BaseHTTPRequestHandler) -> None:
    time.sleep(5)


@pytest.mark.parametrize("fault", [drip_body, drip_headers, silence])
def test_at_the_deadline_it_ends_whatever_drips(
    server: Server, tmp_path: Path, fault: Callable[..., None]
) -> None:
    server.faults = [fault]
    began = time.monotonic()
    with pytest.raises(SourceFailed, match="took longer than allowed"):
        fetch(server, tmp_path / "in", seconds=0.6)
    assert time.monotonic() - began < 2
    assert list((tmp_path / "in").iterdir()) == []


def test_the_cap_is_of_all_files_together(server: Server, tmp_path: Path) -> None:
    assert fetch(server, tmp_path, max_bytes=len(BIG) + 2)
    server.faults = [cut(5000)]
    assert fetch(server, tmp_path, max_bytes=len(BIG) + 2), "what is fetched twice counts once"
    with pytest.raises(SourceFailed, match="larger than allowed"):
        fetch(server, tmp_path, max_bytes=len(BIG) + 1)


def test_a_certificate_of_nobody(server: Server, tmp_path: Path) -> None:
    def stranger(max_bytes: int, seconds: float) -> Download:
        return Download(max_bytes, seconds, server.dial)

    with (
        pytest.raises(SourceFailed, match="certificate"),
        fetched("https://models.test/a", ALLOWED, tmp_path, download=stranger),
    ):
        pass


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "127.9.9.9", "169.254.169.254", "10.1.2.3", "192.168.0.1", "172.16.0.1", "0.0.0.0", "100.64.0.1",
     "::1", "fe80::1", "fd00::1", "::ffff:127.0.0.1", "224.0.0.1", "ff02::1"],
)  # fmt: skip
def test_no_connection_to_an_address_that_is_not_public(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    def never(*_: Any) -> socket.socket:
        raise AssertionError("a connection was made")

    def resolve(*_: Any, **__: Any) -> list[Any]:
        return [(0, 0, 0, "", ("93.184.216.34", 443)), (0, 0, 0, "", (address, 443))]

    monkeypatch.setattr(socket, "create_connection", never)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(SourceRefused, match="is not public") as caught:
        dial_public("models.test", 443, 1)
    assert caught.value.status == 400


def test_a_name_that_is_public_only_when_it_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: the second answer is loopback, and nobody asks for it."""
    answers = [["93.184.216.34"], ["127.0.0.1"]]
    dialled = []

    def resolve(*_: Any, **__: Any) -> list[Any]:
        return [(0, 0, 0, "", (address, 443)) for address in answers.pop(0)]

    def connect(where: tuple[str, int], _: float) -> socket.socket:
        dialled.append(where)
        raise OSError("enough")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(OSError, match="enough"):
        dial_public("models.test", 443, 1)
    assert dialled == [("93.184.216.34", 443)]
    assert len(answers) == 1


def test_a_name_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(SourceFailed, match="cannot be resolved"):
        public_address("nowhere.test", 443)


@pytest.mark.parametrize(
    "source",
    ["http://models.test/a", "file:///etc", "ftp://x/y", "https://", "https:///a", "https://evil.test/a",
     "https://models.test.evil.test/a", "https://models.test@evil.test/a", "https://user@models.test/a",
     "https://models.test/../a", "https://models.test/a/%2e%2e/b", "https://models.test/a?x=1", "https://models.test/a#b",
     "https://models.test/a\\b", "https://models.test/a b", "https://models.test/a\n", "s3://other/a", "https://models.test/./a"],
)  # fmt: skip
def test_what_is_not_on_the_list(source: str) -> None:
    with pytest.raises(SourceRefused) as caught:
        check_source(source, [*ALLOWED, "s3://acme/*"])
    assert caught.value.status == 400


@pytest.mark.parametrize("source", ["https://models.test/a", "s3://acme/a/b", "hf://org/repo@v1.2"])
def test_what_is_on_the_list(source: str) -> None:
    check_source(source, [*ALLOWED, "s3://acme/*", "hf://org/*"])
    with pytest.raises(SourceRefused, match="it is empty"):
        check_source(source, [])


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bucket in memory."""
    system = fsspec.filesystem("memory")
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (system, "/" + url.partition("://")[2]))
    system.pipe({"/acme" + path: body for path, body in FILES.items()})
    yield system
    system.rm("/acme", recursive=True)


def test_a_bucket(bucket: Any, tmp_path: Path) -> None:
    bucket.pipe("/acme/a/model.sig", b"signature")
    with fetched("s3://acme/a/", ["s3://acme/*"], tmp_path / "in") as folder:
        assert (folder / "adapter_model.safetensors").read_bytes() == BIG
        assert (folder / "model.sig").read_bytes() == b"signature"
    assert list((tmp_path / "in").iterdir()) == []
    for max_bytes, seconds, message in ((len(BIG), 10.0, "larger"), (1 << 30, -1.0, "longer")):
        with (
            pytest.raises(SourceFailed, match=f"{message} than allowed"),
            fetched("s3://acme/a", ["s3://*"], tmp_path / "in", max_bytes, seconds),
        ):
            pass
    with pytest.raises(SourceFailed, match="has no"), fetched("s3://acme/b", ["s3://*"], tmp_path / "in"):
        pass
    assert list((tmp_path / "in").iterdir()) == []


def test_a_full_disk(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(https.Download, "_copy", full)
    with pytest.raises(StorageFull):
        fetch(server, tmp_path / "in")
    assert list((tmp_path / "in").iterdir()) == []
