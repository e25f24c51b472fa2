"""The page's server: loopback only, standard library only, nothing by path.

Who may ask: the address has a secret token in front of every path, so that other people of the same machine cannot
guess it; the Host header must name this machine's loopback, so that a foreign name that is made to point here (DNS
rebinding) is refused; what changes anything must come from the page itself (Origin). URLs name images by number, and
the few files are a fixed table: no path of a request ever meets the disk.
"""

from __future__ import annotations

import errno
import hmac
import json
import os
import re
import secrets
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any

from tag2mask.data.decisions import review_folder
from tag2mask.errors import UserError
from tag2mask.review.session import Fault, Review

LOOPBACK = "127.0.0.1"
HOSTS = re.compile(r"(127\.0\.0\.1|localhost)(:[0-9]{1,5})?")  # any port: the page may come through a tunnel
LARGEST = 1 << 16  # bytes of a request; the names of a hundred classes fit
TOKEN = re.compile(r"[\w-]{22,64}")
PAGES = {
    "": "text/html",
    "page.css": "text/css",
    "page.js": "text/javascript",
    "mask.js": "text/javascript",
    "store.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
PICTURE = re.compile(r"(photo|mask|maps)/([0-9]{1,9})")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Refused(Exception):
    """An answer other than 200: its status and why, for a person."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class ReviewServer(ThreadingHTTPServer):
    """Serves one review on 127.0.0.1; `address` is what a person opens."""

    daemon_threads = True
    request_queue_size = 128  # the usual 5 resets connections when many come at once

    def __init__(self, review: Review, port: int = 0) -> None:
        """Port 0 is any free one. Raises UserError where the port is taken."""
        self.review, self.token = review, read_token(review.path)
        folder = resources.files("tag2mask.review")
        self.pages = {name: ((folder / (name or "page.html")).read_bytes(), kind) for name, kind in PAGES.items()}
        try:
            super().__init__((LOOPBACK, port), Handler)
        except OSError as fault:
            if fault.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            raise UserError(f"--port {port}: {fault.strerror}; give another one") from None

    @property
    def address(self) -> str:
        """The address of the page, with its token."""
        return f"http://{LOOPBACK}:{self.server_port}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away is no error."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: ReviewServer
    protocol_version = "HTTP/1.1"
    timeout = 60
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """The page, its state, its pictures."""
        self._answer(self._get)

    def do_HEAD(self) -> None:
        """The same without a body."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """A decision, or the threshold of a class."""
        self._answer(self._post)

    def do_other(self) -> None:
        """No other method."""
        self._answer(self._not_allowed)

    do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = do_other  # noqa: N815

    def version_string(self) -> str:
        """Who answers; versions are nobody's business."""
        return "tag2mask"

    def log_message(self, format: str, *args: object) -> None:
        """The terminal stays quiet."""

    def _answer(self, handle: Callable[[str], tuple[bytes, str]]) -> None:
        status = 200
        try:
            body, kind = handle(self._path())
        except Refused as fault:
            status, body, kind = fault.status, str(fault).encode(), "text/plain"
        except Fault as fault:
            status, body, kind = 404 if self.command != "POST" else 400, str(fault).encode(), "text/plain"
        except (UserError, OSError) as fault:  # a map that is gone, a disk that is full: the page says it
            if isinstance(fault, ConnectionError | TimeoutError):
                raise
            status, body, kind = 500, str(fault).encode(), "text/plain"
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8" if kind.startswith("text/") else kind)
        self.send_header("Content-Length", str(len(body)))
        if status == 405:
            self.send_header("Allow", "GET, HEAD, POST")
        if status != 200:  # a body that was not read must not be taken for the next request
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _path(self) -> str:
        """What is asked for behind the token. Raises Refused for a foreign host or a wrong token."""
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not HOSTS.fullmatch(hosts[0]):
            raise Refused(403, "this server answers to 127.0.0.1 and localhost only")
        token, slash, path = self.path.removeprefix("/").partition("/")
        if not slash or not hmac.compare_digest(token.encode(), self.server.token.encode()):
            raise Refused(403, "open the address that `tag2mask review` printed")
        return path

    def _get(self, path: str) -> tuple[bytes, str]:
        review = self.server.review
        if path in self.server.pages:
            return self.server.pages[path]
        if path == "state.json":
            return json.dumps(review.state()).encode(), "application/json"
        found = PICTURE.fullmatch(path)
        if not found:
            raise Refused(404, "there is nothing here")
        what, number = found[1], int(found[2])
        if what == "photo":
            return review.photo(number), "image/jpeg"
        return (review.mask if what == "mask" else review.maps)(number), "application/octet-stream"

    def _post(self, path: str) -> tuple[bytes, str]:
        if self.headers.get("Origin") != f"http://{self.headers['Host']}":
            raise Refused(403, "this must come from the page itself")
        given = self._json()
        review = self.server.review
        if path == "decide":
            number, decision, scores = given.get("image"), given.get("decision"), given.get("scores", {})
            if type(number) is not int or not isinstance(decision, str) or not isinstance(scores, dict):
                raise Refused(400, "expected image, decision and scores")
            review.decide(number, decision, scores)
        elif path == "class":
            name, score = given.get("class"), given.get("score")
            if not isinstance(name, str):
                raise Refused(400, "expected class and score")
            review.set_class(name, score)
        else:
            raise Refused(404, "there is nothing here")
        return json.dumps(review.counts()).encode(), "application/json"

    def _json(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"[0-9]{1,12}", length):
            raise Refused(411, "Content-Length is missing")
        if int(length) > LARGEST:
            raise Refused(413, f"at most {LARGEST} bytes")
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "expected application/json")
        try:
            given = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise Refused(400, "this is no JSON") from None
        if not isinstance(given, dict):
            raise Refused(400, "expected an object")
        return given

    def _not_allowed(self, path: str) -> tuple[bytes, str]:
        raise Refused(405, f"{self.command} is not answered")


def read_token(work: Path) -> str:
    """The secret of a work folder, made once, so that an open page lives on when the server starts again."""
    path = review_folder(work) / "token"
    if path.exists() and TOKEN.fullmatch(found := path.read_text("utf-8", errors="replace")):
        return found
    token = secrets.token_urlsafe(24)
    part = path.with_name("token.part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(token)
    os.replace(part, path)
    return token
