"""Follow a submitted job: its log, its exit code, and Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import sys
import time
from dataclasses import dataclass

import aiohttp
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from jobs.entry import INTERRUPTED
from pipeline.core.errors import SubmissionError, first_line
from pipeline.core.redaction import quoted, redact

# A dropped connection looks like a job that logs nothing, so the log is reopened after this time.
SILENCE_S = 60
PAUSE_S = 1
_LOST_AFTER_S = 120


@dataclass(frozen=True, slots=True)
class Job:
    """A job of the cluster at ``address``."""

    id: str
    address: str

    def ray_command(self, action: str) -> str:
        """Ray's own command for this job; ``action`` is ``stop``, ``status`` or ``logs --follow``."""
        return f"ray job {action} --address {quoted(self.address)} {shlex.quote(self.id)}"

    def report(self, state: str) -> None:
        """Prints the job's state and the commands that show its log and stop it."""
        report(f"job {self.id} {state}")
        report(f"its log: {self.ray_command('logs --follow')}")
        report(f"to stop it: {self.ray_command('stop')}")


def report(text: str) -> None:
    """Prints a line about the job to standard error; standard output has only the job's log."""
    print(f"submit: {text}", file=sys.stderr, flush=True)


def follow(client: JobSubmissionClient, job: Job) -> int:
    """Prints the log until the job has ended. Ctrl-C prompts whether to stop the job; a second Ctrl-C, or the first one
    without a terminal, leaves the job running.

    Returns:
        The exit code of the job's command; 130 if the job was stopped or left running.

    Raises:
        SubmissionError: the cluster was unreachable for two minutes, or it did not stop the job.
    """
    log = _Log(client, job)
    while True:
        try:
            info = _wait_for_end(client, job, log)
            break
        except KeyboardInterrupt:
            stop = _confirm_stop()
            if stop is None:
                job.report("continues")
                return INTERRUPTED
            report(f"{'stopping' if stop else 'following'} job {job.id}")
            if stop:
                _stop(client, job)
    return exit_code(info, job.id)


def exit_code(info: JobDetails, job_id: str) -> int:
    """Reports how a job ended. Returns the exit code of its command."""
    if info.status == JobStatus.SUCCEEDED:
        report(f"job {job_id} succeeded")
        return 0
    if info.status == JobStatus.STOPPED:
        report(f"job {job_id} was stopped; what is committed stays, and submitting again resumes from there")
        return INTERRUPTED
    code = info.driver_exit_code
    if code is None:
        report(f"job {job_id} failed before its command ran, or with its node: {info.message}")
        return 1
    report(f"job {job_id} failed with exit code {code}")
    # The convention of shells for a command that a signal ended.
    return code if code >= 0 else 128 - code


class _Log:
    """The log of a job. Each character is printed once, however often the connection is reopened."""

    def __init__(self, client: JobSubmissionClient, job: Job) -> None:
        self._client, self._job_id, self._num_printed = client, job.id, 0

    async def tail(self) -> None:
        """Prints until the log or the connection ends."""
        num_received = 0
        clock = asyncio.get_running_loop().time
        async with asyncio.timeout(SILENCE_S) as timeout:
            # Every connection sends the log from its first character.
            async for text in self._client.tail_job_logs(self._job_id):
                print(text[max(0, self._num_printed - num_received) :], end="", flush=True)
                num_received += len(text)
                self._num_printed = max(self._num_printed, num_received)
                timeout.reschedule(clock() + SILENCE_S)

    def print_rest(self) -> None:
        """Prints the rest of the log of an ended job that a dropped connection did not deliver."""
        print(self._client.get_job_logs(self._job_id)[self._num_printed :], end="", flush=True)


def _wait_for_end(client: JobSubmissionClient, job: Job, log: _Log) -> JobDetails:
    while True:
        # The end of the connection does not show whether the job has ended.
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, RuntimeError):
            asyncio.run(log.tail())
        info = _info(client, job)
        if info.status.is_terminal():
            # A log may be lost with its node.
            with contextlib.suppress(RuntimeError):
                log.print_rest()
            return info
        time.sleep(PAUSE_S)


def _info(client: JobSubmissionClient, job: Job) -> JobDetails:
    attempts = Retrying(
        retry=retry_if_exception_type((OSError, RuntimeError)),
        stop=stop_after_delay(_LOST_AFTER_S),
        wait=wait_fixed(PAUSE_S),
        reraise=True,
    )
    try:
        return attempts(client.get_job_info, job.id)
    except (OSError, RuntimeError) as error:
        raise SubmissionError(
            f"the cluster no longer reports on job {job.id}; the job may still be running",
            code="submit.lost-contact",
            where=redact(job.address),
            got=first_line(error),
            expected=f"a response within {_LOST_AFTER_S} s",
            next_step=f"run {job.ray_command('status')}; submitting again resumes from what is committed",
        ) from error


def _stop(client: JobSubmissionClient, job: Job) -> None:
    try:
        client.stop_job(job.id)
    except RuntimeError as error:
        raise SubmissionError(
            f"the cluster did not stop job {job.id}",
            code="submit.stop-failed",
            where=redact(job.address),
            got=first_line(error),
            next_step=f"try {job.ray_command('stop')}",
        ) from error


def _confirm_stop() -> bool | None:
    """True: stop the job; False: follow it again; None: leave it running and exit."""
    if not sys.stdin.isatty():
        return None
    print("\nsubmit: stop the job? [y/N] (Ctrl-C: leave it running and exit) ", end="", file=sys.stderr, flush=True)
    try:
        line = sys.stdin.readline()
    except KeyboardInterrupt:
        line = ""
    if not line:
        print(file=sys.stderr)
        return None
    return line.strip().lower() in ("y", "yes")
