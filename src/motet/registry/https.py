"""One file over HTTPS, from a host that may be anybody's: to no private address, no redirect, no more bytes and no
longer than allowed, and continued where a connection breaks.

The name is resolved once, every address of it is checked, and the connection goes to the address that was checked: what
the name resolves to a moment later does not matter. At the deadline the socket is shut down, whatever it waits for.
"""

from __future__ import annotations

import errno
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from motet.errors import MotetError

_CHUNK = 1 << 20
_SILENCE_SECONDS = 30.0
_ATTEMPTS = 5
Dial = Callable[[str, int, float], socket.socket]


class SourceRefused(MotetError):
    """Adapters may not be fetched from there."""

    status = 400
    code = "source_refused"


class SourceFailed(MotetError):
    """The download did not end as it should; nothing of it is kept."""

    status = 502
    code = "source_failed"


class _Broken(Exception):
    """The connection ended before the file did."""


@dataclass
class _Partial:
    """What there is of a file; with the server's `etag` for it, a download can go on."""

    url: str
    file: BinaryIO
    etag: str = ""

    def headers(self) -> dict[str, str]:
        """Ask for the rest, and for all of it if it has changed."""
        offset = self.file.tell()
        rest = {"Range": f"bytes={offset}-", "If-Range": self.etag} if offset and self.etag else {}
        return {"Accept-Encoding": "identity", **rest}


def public_address(host: str, port: int) -> str:
    """An address of `host`, if all that it has are on the public internet. Raises SourceRefused, SourceFailed."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        raise SourceFailed(f"{host} cannot be resolved: {error}") from error
    for address in sorted(found):
        parsed = ipaddress.ip_address(address.partition("%")[0])
        mapped = getattr(parsed, "ipv4_mapped", None)
        if not (mapped or parsed).is_global or parsed.is_multicast:
            raise SourceRefused(f"{host} has the address {address}, which is not public")
    return min(found)


def dial_public(host: str, port: int, seconds: float) -> socket.socket:
    """Connect to a public address of `host`."""
    return socket.create_connection((public_address(host, port), port), seconds)


class Download:
    """Fetches files with one budget of bytes and of time for all of them."""

    def __init__(
        self, max_bytes: int, seconds: float, dial: Dial = dial_public, context: ssl.SSLContext | None = None
    ) -> None:
        self._left = max_bytes
        self._deadline = time.monotonic() + seconds
        self._dial = dial
        self._context = context or ssl.create_default_context()

    def fetch(self, url: str, target: Path) -> bool:
        """Write what is at `url` to `target`; False if there is nothing (404).

        Raises SourceRefused or SourceFailed, and leaves no file then.
        """
        found = False
        try:
            with target.open("xb") as file:
                found = self._complete(_Partial(url, file))
            return found
        finally:
            if not found:
                target.unlink()

    def _complete(self, partial: _Partial) -> bool:
        """As many attempts as it takes, each from where the one before broke."""
        for attempt in range(_ATTEMPTS):
            try:
                return self._attempt(partial)
            except _Broken as error:
                if attempt == _ATTEMPTS - 1:
                    raise SourceFailed(f"{partial.url}: {error}, {_ATTEMPTS} times") from error
        raise AssertionError

    def _attempt(self, partial: _Partial) -> bool:
        parts = urlsplit(partial.url)
        assert parts.hostname is not None
        host, port = parts.hostname, parts.port or 443
        connection = http.client.HTTPSConnection(host, port, context=self._context)
        try:
            raw = self._dial(host, port, min(_SILENCE_SECONDS, self._remaining(partial)))
            raw.settimeout(_SILENCE_SECONDS)
            tls = self._context.wrap_socket(raw, server_hostname=host, do_handshake_on_connect=False)
        except OSError as error:
            raise _Broken(f"no connection: {error}") from error
        alarm = threading.Timer(self._remaining(partial), _shut, (tls,))
        alarm.daemon = True
        alarm.start()
        try:
            tls.do_handshake()
            connection.sock = tls
            connection.request("GET", parts.path, headers=partial.headers())
            answer = connection.getresponse()
            if answer.status == 404:
                return False
            self._begin(partial, answer)
            self._copy(partial, answer)
        except ssl.SSLCertVerificationError as error:
            raise SourceFailed(f"{partial.url}: {error.verify_message}") from error
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._remaining(partial)  # if the alarm went off, that is the reason
            raise _Broken(f"the connection broke ({type(error).__name__})") from error
        finally:
            alarm.cancel()
            connection.close()  # and the answer, which holds on to the socket
            tls.close()
        return True

    def _begin(self, partial: _Partial, answer: http.client.HTTPResponse) -> None:
        """Put the file where the body goes on, or empty it if the server begins again."""
        if 300 <= answer.status < 400:
            raise SourceRefused(f"{partial.url} redirects, and redirects are not followed")
        offset = partial.file.tell()
        if answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
            return
        if answer.status != 200:
            raise SourceFailed(f"{partial.url}: HTTP {answer.status}")
        self._left += offset
        partial.file.seek(0)
        partial.file.truncate()
        partial.etag = answer.headers.get("ETag", "")

    def _copy(self, partial: _Partial, answer: http.client.HTTPResponse) -> None:
        length = answer.length
        if length is not None and length > self._left:
            raise SourceFailed(f"{partial.url} is larger than allowed")
        begin = partial.file.tell()
        while chunk := answer.read1(_CHUNK):
            self._left -= len(chunk)
            if self._left < 0:
                raise SourceFailed(f"{partial.url} is larger than allowed")
            partial.file.write(chunk)
            self._remaining(partial)
        self._remaining(partial)  # an alarm ends the body too
        if length is not None and partial.file.tell() - begin != length:
            raise http.client.IncompleteRead(b"", length)

    def _remaining(self, partial: _Partial) -> float:
        """Seconds until the deadline. Raises SourceFailed once there are none."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise SourceFailed(f"{partial.url} took longer than allowed")
        return left


def _shut(connection: ssl.SSLSocket) -> None:
    """Wake up whoever reads from it."""
    try:
        socket.socket.shutdown(connection, socket.SHUT_RDWR)  # SSLSocket's own is not for other threads
    except OSError:
        return  # it has ended by itself
