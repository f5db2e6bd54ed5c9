"""A proxy before an S3 server that injects faults of networks and stores, and counts them."""

from __future__ import annotations

import base64
import contextlib
import http.client
import random
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

FAULTS = ("error 500", "slow down", "reset", "response lost", "slow body", "cut body", "damaged upload")
_ONLY_FOR = {"slow body": "GET", "cut body": "GET", "damaged upload": "PUT"}
# An operation has five attempts, so more faults would be an error.
_MAX_PER_NAME = 3
_BURST = 3
_ERROR_BODY = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>"
_HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "expect", "keep-alive"}


@dataclass
class FaultPlan:
    """Decides the faults: sampled for every request, a bounded number for every object."""

    share: float
    random: random.Random
    honours_conditions: bool = True
    injected: Counter[str] = field(default_factory=Counter)
    checksums: Counter[str] = field(default_factory=Counter)
    _per_name: Counter[str] = field(default_factory=Counter)
    _burst_left: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fault_for(self, method: str, path: str) -> str | None:
        """The fault for this request, or None. A burst of ``slow down`` applies to the following requests."""
        url = urlsplit(path)
        name = parse_qs(url.query).get("prefix", [url.path.split("/", 2)[-1]])[0].strip("/")
        with self._lock:
            if self._per_name[name] >= _MAX_PER_NAME:
                return None
            if self._burst_left:
                self._burst_left -= 1
                kind = "slow down"
            elif self.random.random() < self.share:
                # The rarest fault so far, so that a short run has every kind.
                possible = [fault for fault in FAULTS if method == _ONLY_FOR.get(fault, method)]
                kind = min(possible, key=lambda fault: (self.injected[fault], self.random.random()))
                self._burst_left = self.random.randrange(_BURST) if kind == "slow down" else 0
            else:
                return None
            self._per_name[name] += 1
            self.injected[kind] += 1
            return kind


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    plan: FaultPlan
    target: str

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.command == "PUT":
            self.plan.checksums["with" if "x-amz-checksum-crc32" in self.headers else "without"] += 1
        fault = self.plan.fault_for(self.command, self.path)
        if fault == "error 500":
            self._fail(500, "InternalError")
        elif fault == "slow down":
            self._fail(503, "SlowDown")
        elif fault == "reset":
            self._reset()
        elif fault == "damaged upload" and body and self._refuses(bytes([body[0] ^ 1]) + body[1:]):
            self._fail(400, "BadDigest")
        else:
            self._forward(body, fault)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any

    def _refuses(self, body: bytes) -> bool:
        """Whether S3 refuses this body because it does not match the checksum of the request."""
        checksum = base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()
        return self.headers.get("x-amz-checksum-crc32", checksum) != checksum

    def _forward(self, body: bytes, fault: str | None) -> None:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
        if not self.plan.honours_conditions:
            headers = {name: value for name, value in headers.items() if name.lower() != "if-none-match"}
        connection = http.client.HTTPConnection(self.target, timeout=60)
        connection.request(self.command, self.path, body, headers)
        response = connection.getresponse()
        data = response.read()
        connection.close()
        if fault == "response lost":
            self._reset()
            return
        self.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        length = response.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        if length is not None:
            self.send_header("Content-Length", length)
        self.end_headers()
        self._send(data, fault)

    def _send(self, data: bytes, fault: str | None) -> None:
        if fault == "cut body":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif fault == "slow body":
            step = max(1, len(data) // 4)
            for start in range(0, len(data), step):
                self.wfile.write(data[start : start + step])
                self.wfile.flush()
                # The fault itself, not synchronisation.
                time.sleep(0.1)
        elif self.command != "HEAD":
            self.wfile.write(data)

    def _fail(self, status: int, code: str) -> None:
        data = _ERROR_BODY.format(code=code).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _reset(self) -> None:
        """Ends the connection with RST."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """Tests read no log."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that disconnect are expected."""


@contextmanager
def proxy(target: str, plan: FaultPlan) -> Iterator[str]:
    """The URL of a proxy before ``http://target``."""
    handler = type("Proxy", (_Proxy,), {"plan": plan, "target": target})
    with _Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
