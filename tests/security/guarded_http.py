"""Serves files behind a password and a signature, as private data is served."""

from __future__ import annotations

import base64
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

PASSWORD, SIGNATURES = "HUSH4711", ("HUSH0815", "HUSH1848")
SECRET = re.compile(b"HUSH(4711|0815|1848)|" + base64.b64encode(f"user:{PASSWORD}".encode()))


def signed(address: str, name: str, signature: str = SIGNATURES[0]) -> str:
    """The URL of a file with its password and signature."""
    return f"http://user:{PASSWORD}@{address}/{name}?sig={signature}"


@contextmanager
def guarded(folder: Path) -> Iterator[str]:
    """Serves the files of a folder for the length of a ``with``; HOST:PORT."""

    class Handler(_Guarded):
        root = folder

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


class _Guarded(BaseHTTPRequestHandler):
    root: Path

    def do_GET(self) -> None:
        url, expected = urlsplit(self.path), base64.b64encode(f"user:{PASSWORD}".encode()).decode()
        if self.headers["Authorization"] != f"Basic {expected}" or url.query.removeprefix("sig=") not in SIGNATURES:
            self.send_error(403)
            return
        path = self.root / url.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data, byte_range = path.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
        part = data[int(byte_range[1]) : int(byte_range[2]) + 1] if byte_range else data
        self.send_response(206 if byte_range else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "bytes")
        if byte_range:
            self.send_header("Content-Range", f"bytes {byte_range[1]}-{byte_range[2]}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None: ...
