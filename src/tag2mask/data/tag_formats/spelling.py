"""What an image is called behind the address that an annotation tool has for it."""

from __future__ import annotations

import posixpath
import re
from urllib.parse import unquote, urlsplit

_UPLOAD = re.compile(r"(?:^|/)data/upload/(?:\d+/)?([^/]+)$")
_LOCAL = re.compile(r"(?:^|local-files/?)\?(?:[^#]*&)?d=([^&#]+)")
_PREFIX = re.compile(r"^[0-9a-f]{8}-(?=.)")


def spellings(address: str) -> tuple[str, ...]:
    """The names that an address may mean, in the order in which they are tried; the last one reads best.

    "/data/upload/1/8ab3c4d5-a.jpg"      Label Studio's upload: "8ab3c4d5-a.jpg", "a.jpg"
    "/data/local-files/?d=set/a%20b.jpg"  Label Studio's local storage: "set/a b.jpg"
    "s3://bucket/set/a.jpg", "https://host/set/a.jpg?signature": "set/a.jpg"
    "set/a%20b.jpg"                      anything else: as it is, then decoded, "set/a b.jpg"
    """
    written = address.strip()
    local = _LOCAL.search(written)
    if local:
        return (unquote(local[1]),)
    if "://" in written:
        path = urlsplit(written).path.lstrip("/")
        found = _UPLOAD.search(path)
        return _uploaded(unquote(found[1])) if found else (unquote(path),)
    found = _UPLOAD.search(written)
    if found:
        return _uploaded(unquote(found[1].partition("?")[0]))
    return tuple(dict.fromkeys((written, unquote(written))))


def upload(name: str) -> tuple[str, ...]:
    """The spellings of a bare upload, such as "8ab3c4d5-a.jpg"."""
    return _uploaded(posixpath.basename(name.strip()))


def beside(place: str, path: str) -> str:
    """`path` as written in a file at `place`, both with folders: relative to where that file's folder is counted from.

    beside("sub/a.json", "a.jpg") is "sub/a.jpg", beside("a.json", "../images/a.jpg") is "images/a.jpg".
    """
    plain = path.strip().replace("\\", "/")
    joined = posixpath.normpath(posixpath.join(posixpath.dirname(place), plain))
    return re.sub(r"^(\.\./)+", "", joined)


def _uploaded(last: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((last, _PREFIX.sub("", last))))
