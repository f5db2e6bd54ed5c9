"""Following a job over connections that break: each line of its log once, and its exit code."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from aiohttp import WSMsgType, web

from tests.jobs.programs import run_python

LINES = [f"line {number}\n" for number in range(30)]
SCRIPT = """
import sys
import jobs.submission.follow as follow
from ray.job_submission import JobSubmissionClient
follow.SILENCE_S, follow.PAUSE_S = 1, 0.05
sys.exit(follow.follow(JobSubmissionClient(sys.argv[1]), follow.Job("job", sys.argv[1])))
"""


class Cluster:
    """A server of Ray's Jobs API with one job, over connections that fail in every way.

    The first connection to the log breaks in the middle, the second goes silent, the third is closed as if the log had
    ended. One request gets status 500, another none. The job has ended with the fourth connection to its log.
    """

    def __init__(self) -> None:
        self.num_tails, self.num_requests = 0, 0

    async def version(self, _: web.Request) -> web.Response:
        return web.json_response({"ray_version": "2.60.0", "version": "4", "ray_commit": "", "session_name": ""})

    async def info(self, request: web.Request) -> web.Response:
        self.num_requests += 1
        if self.num_requests == 1:
            raise web.HTTPInternalServerError(text="not now")
        if self.num_requests == 2:
            assert request.transport is not None
            request.transport.abort()
        ended = self.num_tails == 4
        return web.json_response(
            {
                "type": "SUBMISSION",
                "status": "FAILED" if ended else "RUNNING",
                "entrypoint": "python",
                "driver_exit_code": 3 if ended else None,
            }
        )

    async def logs(self, _: web.Request) -> web.Response:
        return web.json_response({"logs": "".join(LINES)})

    async def tail(self, request: web.Request) -> web.WebSocketResponse:
        self.num_tails += 1
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        # In parts of lines: the log is counted in characters. The last connection sends less than the whole log.
        text = "".join(LINES)
        num_sent = {1: 52, 2: 100, 3: 75, 4: 150}[self.num_tails]
        for start in range(0, num_sent, 25):
            await socket.send_str(text[start : min(start + 25, num_sent)])
        if self.num_tails == 1:
            assert request.transport is not None
            await asyncio.sleep(0.2)
            request.transport.abort()
        if self.num_tails == 2:
            assert (await socket.receive()).type in (WSMsgType.CLOSE, WSMsgType.CLOSED, WSMsgType.CLOSING)
        return socket


@contextmanager
def served(cluster: Cluster) -> Iterator[str]:
    """The cluster's address for the length of a ``with``."""
    app = web.Application()
    app.router.add_get("/api/version", cluster.version)
    app.router.add_get("/api/jobs/job", cluster.info)
    app.router.add_get("/api/jobs/job/logs", cluster.logs)
    app.router.add_get("/api/jobs/job/logs/tail", cluster.tail)
    loop, runner = asyncio.new_event_loop(), web.AppRunner(app, shutdown_timeout=1)

    async def start() -> int:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return int(runner.addresses[0][1])

    port = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.mark.slow
def test_a_log_whose_connection_breaks_and_goes_silent_is_printed_once_and_to_its_end() -> None:
    cluster = Cluster()
    with served(cluster) as address:
        # In another process: Ray reads the token once in a process, and other tests need other tokens.
        done = run_python("-c", SCRIPT, address, RAY_AUTH_MODE="disabled", RAY_API_SERVER_ADDRESS=address)
    assert done.returncode == 3, done.stdout + done.stderr
    assert done.stdout == "".join(LINES)
    assert "job job failed with exit code 3" in done.stderr
    assert cluster.num_tails == 4
    assert cluster.num_requests >= 6
