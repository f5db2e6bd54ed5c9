"""Submit a job to a Ray cluster through its Jobs API and follow it. ``stillroom submit COMMAND CONFIG``."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shlex
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from jobs.paths import urls_by_key, with_absolute_paths
from jobs.ray.connection import check_shadowing, no_response, token_refused
from jobs.submission.follow import Job, follow, report
from jobs.submission.package import CONFIG_FOLDER, find_files, write_package
from pipeline import storage
from pipeline.cache.build.context import cache_config
from pipeline.core.errors import ConfigError, InputError, SubmissionError, first_line
from pipeline.core.hashing import short_digest
from pipeline.core.redaction import redact
from pipeline.storage.config_files import load_config
from pipeline.student.training.config_checks import check_config, check_plan, training_of
from schemas.config import Config

Command = Literal["build", "train", "distill"]

RESPONSE_TIMEOUT_S = 30
_MODULES: dict[Command, str] = {"build": "jobs.build_cache", "train": "jobs.train_student", "distill": "jobs.distill"}
_OUTPUTS: dict[Command, tuple[str, ...]] = {
    "build": ("cache.url",),
    "train": ("run.url",),
    "distill": ("cache.url", "run.url"),
}
_NOT_READ = ("cache.url", "run.url", "data.local_dir")
_URL_SEPARATORS = re.compile(r"[\s,\[\]{}'\"]+")


class _Client(JobSubmissionClient):
    """Ray's client with a timeout: its own requests wait forever for a server that accepts and never responds."""

    def _do_request(self, method: str, endpoint: str, *, data: bytes | None = None, **options: Any) -> Any:
        # An upload may take any time.
        options.setdefault("timeout", None if data else RESPONSE_TIMEOUT_S)
        return super()._do_request(method, endpoint, data=data, **options)


def submit(
    command: Command,
    source: str,
    overrides: Sequence[str] = (),
    *,
    address: str,
    working_dir: Path,
    excludes: Sequence[str] = (),
    env: Sequence[str] = (),
    pip: Path | None = None,
    num_cpus: float = 0,
    num_gpus: float = 0,
    memory_bytes: int = 0,
    submission_id: str | None = None,
    wait: bool = True,
) -> int:
    """Checks the config and the options, uploads, submits, and with ``wait`` prints the log until the job has ended.

    Args:
        source: path or URL of the YAML document.
        address: ``http(s)://HOST:PORT`` of the cluster's dashboard.
        excludes: patterns of .gitignore for files of ``working_dir`` that are not uploaded.
        env: names of variables of this environment that the job gets.
        pip: requirements file that Ray installs for the job; None: the nodes have all packages.
        num_cpus, num_gpus, memory_bytes: reserved for the driver only, in addition to its tasks and workers.

    Returns:
        The exit code of the job's command; 130 if the job was stopped, or left running after Ctrl-C; without ``wait``
        0 once it is submitted.

    Raises:
        InputError: a config, an option or a working directory is wrong; then nothing was submitted.
        ResourceError: no cluster responds at the address, or it refuses the token.
        SubmissionError: the cluster refused the job, or became unreachable while the job ran.
    """
    job = Job(_job_id(submission_id, command), _checked_address(address))
    _check_overrides(overrides)
    config = load_config(source, overrides)
    check_job(command, config)
    runtime_env = _runtime_env(env, pip and _path(pip))
    not_read, read = local_paths(config)
    files = find_files(_path(working_dir), excludes, results=not_read, inputs=read)
    check_shadowing(
        map(Path, files.relative(files.sizes)),
        folder=files.folder,
        next_step="rename it, or leave it out: --exclude /jobs.py --exclude /jobs/",
    )
    report(f"{command} of {redact(source)}; working directory {files}")
    _warn_of_paths_and_env(command, config, env)
    config_name = f"{CONFIG_FOLDER}/{PurePosixPath(redact(source)).name}"
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "working_dir.zip"
        write_package(package, files, config_name, storage.read(source))
        with _connection_errors(job.address), _refusals(job):
            client = _connect(job.address)
            client.submit_job(
                entrypoint=shlex.join(["python", "-m", _MODULES[command], config_name, *overrides]),
                submission_id=job.id,
                runtime_env={**runtime_env, "working_dir": str(package)},
                # Jobs of one config have one fingerprint.
                metadata={
                    "project": "stillroom",
                    "command": command,
                    "config_fingerprint": short_digest(config.model_dump(mode="json")),
                },
                entrypoint_num_cpus=num_cpus,
                entrypoint_num_gpus=num_gpus,
                entrypoint_memory=memory_bytes,
            )
    job.report(f"is submitted to {redact(job.address)}")
    if not wait:
        print(job.id)
        return 0
    with _connection_errors(job.address):
        return follow(client, job)


def check_job(command: Command, config: Config) -> None:
    """Checks a job's config. Reads no shard, cache or model, which only the cluster may be able to reach.

    Raises:
        InputError: as the job itself would; or the job would write into its working directory, which is temporary.
    """
    with_absolute_paths(config)
    if command == "build" or (command == "distill" and config.teacher.mode == "cache"):
        cache_config(config)
    if command == "train":
        check_config(config)
    if command == "distill":
        check_plan(training_of(config))
    urls = urls_by_key(config)
    for key in _OUTPUTS[command]:
        (url,) = urls[key]
        if storage.protocol(url) == "file" and "://" not in url and not _path(url).is_absolute():
            raise ConfigError(
                "a job's working directory is a temporary copy, so results written there are lost",
                code="submit.relative-output",
                where=key,
                got=url,
                expected="an absolute path or a URL that every node reaches",
                next_step=f"append {key}=…",
            )


def _path(path: str | Path) -> Path:
    return Path(storage.expand_home(str(path)))


def local_paths(config: Config) -> tuple[list[Path], list[Path]]:
    """The local paths of a config: first those that a job does not read from its copy of the working directory.

    A job reads absolute paths in place, and of relative ones neither outputs nor ``data.local_dir``.
    """
    not_read: list[Path] = []
    read: list[Path] = []
    for key, patterns in urls_by_key(config).items():
        for url in storage.expand(tuple(pattern for pattern in patterns if storage.protocol(pattern) == "file")):
            path = _path(url.removeprefix("file://"))
            (not_read if path.is_absolute() or key in _NOT_READ else read).append(path)
    return not_read, read


def _checked_address(address: str) -> str:
    if re.fullmatch(r"https?://[^/\s]+(/\S*)?", address):
        return address.rstrip("/")
    raise InputError(
        "this is not the address of a cluster's Jobs API",
        code="submit.bad-address",
        where="--address",
        got=redact(address),
        expected="http://HOST:8265 or https://HOST, the address of the cluster's dashboard",
        next_step=f"did you mean http://{address}?" if "://" not in address else None,
    )


def _job_id(submission_id: str | None, command: Command) -> str:
    job_id = submission_id or f"stillroom-{command}-{secrets.token_hex(4)}"
    # It becomes a part of URLs and file names.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", job_id):
        raise InputError(
            "this is not a job id",
            code="submit.bad-id",
            where="--submission-id",
            got=job_id,
            expected="letters, digits, dots, dashes, _",
        )
    return job_id


def _check_overrides(overrides: Sequence[str]) -> None:
    """Overrides become the job's command line, which the cluster shows to all its users."""
    for override in overrides:
        key, _, value = override.partition("=")
        if any(redact(text) != text for text in _URL_SEPARATORS.split(value)):
            raise ConfigError(
                "the cluster would show an override with a credential or query in its URL",
                code="submit.secret-in-override",
                where=f"override {key}",
                next_step=f"write {key}: ${{oc.env:NAME}} into the config, and set NAME on the nodes (or --env NAME)",
            )


def _runtime_env(env: Sequence[str], pip: Path | None) -> dict[str, Any]:
    for name in env:
        if name not in os.environ:
            # The text after an equals sign may be a secret, so it is not repeated.
            bare_name, equals, _ = name.partition("=")
            raise InputError(
                "this environment has no such variable",
                code="submit.env-not-set",
                where="--env",
                got=bare_name + equals,
                expected="the name of a variable; its value is taken from this environment",
                next_step=f"export {bare_name}, then give --env {bare_name}",
            )
    if pip is not None and not pip.is_file():
        raise InputError(
            "this requirements file is missing", code="submit.missing-requirements", where="--pip", got=str(pip)
        )
    return {"env_vars": {name: os.environ[name] for name in env}, **({} if pip is None else {"pip": str(pip)})}


def _warn_of_paths_and_env(command: Command, config: Config, env: Sequence[str]) -> None:
    if env:
        names = ", ".join(env)
        report(f"Ray stores these values with the job and logs them on its nodes, so give it no credentials: {names}")
    keys = [
        key
        for key, urls in urls_by_key(config).items()
        if (key not in _NOT_READ or key in _OUTPUTS[command]) and any(url.startswith(("/", "file://")) for url in urls)
    ]
    if keys:
        report(f"every node has to see these local paths: {', '.join(keys)}")


def _connect(address: str) -> JobSubmissionClient:
    # Ray prefers this variable to the address that its client is given.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    # These log every upload and the end of every log.
    for module in ("dashboard_sdk", "job.sdk"):
        logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
    return _Client(address)


@contextmanager
def _connection_errors(address: str) -> Generator[None]:
    """Turns failures of the connection into a ``ResourceError``."""
    try:
        yield
    except AuthenticationError as error:
        raise token_refused(redact(address), first_line(error)) from error
    # The reader of our own output has ended.
    except BrokenPipeError:
        raise
    # The exceptions of requests are OSErrors, also that of a response that is no JSON.
    except OSError as error:
        raise no_response(
            redact(address),
            type(error).__name__,
            expected=f"a response of its dashboard within {RESPONSE_TIMEOUT_S} s",
            next_step="check that the cluster runs and that its dashboard's port can be reached from here "
            "(kubectl port-forward, ssh -L)",
        ) from error


@contextmanager
def _refusals(job: Job) -> Generator[None]:
    """Turns the cluster's refusal of a job into an error with its reason."""
    try:
        yield
    except RuntimeError as error:
        if "already exists" in str(error):
            raise InputError(
                "the cluster already has a job of this submission id",
                code="submit.id-taken",
                where=redact(job.address),
                got=job.id,
                expected="a new id for each submission; a submission under any id resumes from what is committed",
                next_step=f"leave out --submission-id, or follow that job: {job.ray_command('logs --follow')}",
            ) from error
        raise SubmissionError(
            "the cluster refused the job", code="submit.refused", where=redact(job.address), got=error
        ) from error
