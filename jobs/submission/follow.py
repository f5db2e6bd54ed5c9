"""A submitted job from here: its log, its end, and what Ctrl-C means to it."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import sys
import time

import aiohttp
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from jobs.entry import INTERRUPTED
from pipeline.core.errors import SubmissionError, first_line
from pipeline.core.redaction import quoted, redact

# A connection that was cut without a word looks like a job without a word; after so long it is made anew.
_SILENCE_S = 60
_LOST_AFTER_S = 120
_PAUSE_S = 1


def follow(client: JobSubmissionClient, job: str, address: str) -> int:
    """Shows the log until the job has ended. Ctrl-C asks whether to stop the job; a second one, or one that nobody can
    be asked after, leaves it running.

    Returns:
        The exit code of the job's command; 130 if the job was stopped or left running.

    Raises:
        SubmissionError: nothing was heard of the cluster for two minutes, or it does not stop the job.
    """
    log = _Log(client, job)
    while True:
        try:
            info = _wait(client, log, job, address)
            break
        except KeyboardInterrupt:
            answer = _asked_to_stop()
            if answer is None:
                say(f"job {job} goes on. Its log: {job_command('logs --follow', job, address)}")
                say(f"to stop it: {job_command('stop', job, address)}")
                return INTERRUPTED
            say(f"{'stopping' if answer else 'following'} job {job}")
            if answer:
                _stop(client, job, address)
    return exit_code(info, job)


def job_command(words: str, job: str, address: str) -> str:
    """The command of Ray that does something to this job."""
    return f"ray job {words} --address {quoted(address)} {shlex.quote(job)}"


def exit_code(info: JobDetails, job: str) -> int:
    """Of the command of a job that has ended, and a line that says how it did."""
    if info.status == JobStatus.SUCCEEDED:
        say(f"job {job} succeeded")
        return 0
    if info.status == JobStatus.STOPPED:
        say(f"job {job} was stopped; what is committed stays, and submitting again goes on from there")
        return INTERRUPTED
    code = info.driver_exit_code
    if code is None:
        say(f"job {job} failed before its command ran, or with its node: {info.message}")
        return 1
    say(f"job {job} failed with exit code {code}")
    # As shells have it, for a command that a signal ended.
    return code if code >= 0 else 128 - code


def say(text: str) -> None:
    """A line about the job, apart from its log."""
    print(f"submit: {text}", file=sys.stderr, flush=True)


class _Log:
    """The log of a job, each character of it printed once, however often the connection is made anew."""

    def __init__(self, client: JobSubmissionClient, job: str) -> None:
        self._client, self._job, self._num_shown = client, job, 0

    async def show(self) -> None:
        """Until the log ends, or the connection does."""
        num_seen = 0
        clock = asyncio.get_running_loop().time
        async with asyncio.timeout(_SILENCE_S) as patience:
            # Every connection begins at the beginning.
            async for text in self._client.tail_job_logs(self._job):
                print(text[max(0, self._num_shown - num_seen) :], end="", flush=True)
                num_seen += len(text)
                self._num_shown = max(self._num_shown, num_seen)
                patience.reschedule(clock() + _SILENCE_S)

    def show_rest(self) -> None:
        """Of a job that has ended: what a connection that was cut did not bring."""
        print(self._client.get_job_logs(self._job)[self._num_shown :], end="", flush=True)


def _wait(client: JobSubmissionClient, log: _Log, job: str, address: str) -> JobDetails:
    while True:
        # Whether the job has ended, the log's connection cannot tell: it ends for reasons of its own.
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, RuntimeError):
            asyncio.run(log.show())
        info = _info(client, job, address)
        if info.status.is_terminal():
            # A log may be gone with its node.
            with contextlib.suppress(RuntimeError):
                log.show_rest()
            return info
        time.sleep(_PAUSE_S)


def _info(client: JobSubmissionClient, job: str, address: str) -> JobDetails:
    attempts = Retrying(
        retry=retry_if_exception_type((OSError, RuntimeError)),
        stop=stop_after_delay(_LOST_AFTER_S),
        wait=wait_fixed(_PAUSE_S),
        reraise=True,
    )
    try:
        return attempts(client.get_job_info, job)
    except (OSError, RuntimeError) as error:
        raise SubmissionError(
            f"the cluster says nothing of job {job} any more; it may go on",
            where=redact(address),
            got=first_line(error),
            expected=f"an answer within {_LOST_AFTER_S} s",
            next_step=f"see {job_command('status', job, address)}; submitting again goes on from what is committed",
        ) from error


def _stop(client: JobSubmissionClient, job: str, address: str) -> None:
    try:
        client.stop_job(job)
    except RuntimeError as error:
        raise SubmissionError(
            f"the cluster does not stop job {job}",
            where=redact(address),
            got=first_line(error),
            next_step=f"try {job_command('stop', job, address)}",
        ) from error


def _asked_to_stop() -> bool | None:
    """None: leave the job alone, and go."""
    if not sys.stdin.isatty():
        return None
    print("\nsubmit: stop the job? [y/N] (Ctrl-C: leave it running, and go) ", end="", file=sys.stderr, flush=True)
    try:
        answer = sys.stdin.readline()
    except KeyboardInterrupt:
        answer = ""
    if not answer:
        print(file=sys.stderr)
        return None
    return answer.strip().lower() in ("y", "yes")
