"""Submit a job to a Ray cluster through its Jobs API, and see it through. ``stillroom submit COMMAND CONFIG``."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shlex
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from jobs.paths import with_absolute_paths
from jobs.ray.connection import TOKEN_HELP
from jobs.ray.shadowing import check_shadowing
from jobs.submission.follow import follow, job_command, say
from jobs.submission.package import CONFIG_FOLDER, WorkingDir, find_files, write_package
from pipeline import storage
from pipeline.cache.build.part import cache_config
from pipeline.core.errors import ConfigError, InputError, ResourceError, SubmissionError, first_line
from pipeline.core.hashing import short
from pipeline.core.redaction import redact
from pipeline.storage.config_files import load_config
from pipeline.student.training.config_checks import check_config, check_plan, training_of
from schemas.config import Config

Command = Literal["build", "train", "distill"]

_ANSWER_TIMEOUT_S = 30
_MODULES: dict[Command, str] = {"build": "jobs.build_cache", "train": "jobs.train_student", "distill": "jobs.distill"}
_INPUTS = (
    "data.shards",
    "data.val_shards",
    "data.cache",
    "data.index",
    "teacher.weights",
    "teacher.class_means",
    "student.weights",
    "cache.class_means_url",
)
_OUTPUTS: dict[Command, tuple[str, ...]] = {
    "build": ("cache.url",),
    "train": ("run.url",),
    "distill": ("cache.url", "run.url"),
}
_NUM_NAMED = 5
_UNREAD = ("cache.url", "run.url", "data.local_dir")
_BETWEEN_URLS = re.compile(r"[\s,\[\]{}'\"]+")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What to run, where, and with what."""

    command: Command
    # Path or URL of the YAML document.
    source: str
    overrides: Sequence[str]
    # http(s)://HOST:PORT of the cluster's dashboard.
    address: str
    working_dir: Path
    # Patterns of .gitignore.
    excludes: Sequence[str] = ()
    # Names of variables of this environment that the job gets too.
    env: Sequence[str] = ()
    # A requirements file that Ray installs for the job; None: the nodes have all it needs.
    pip: Path | None = None
    # Reserved for the driver alone, beside what its tasks and workers take.
    num_cpus: float = 0
    num_gpus: float = 0
    memory_bytes: int = 0
    submission_id: str | None = None
    wait: bool = True


class _Client(JobSubmissionClient):
    """Ray's client, which by itself waits for ever for an address that takes a connection and says nothing."""

    def _do_request(self, method: str, endpoint: str, *, data: bytes | None = None, **more: Any) -> Any:
        # An upload lasts as long as it lasts.
        more.setdefault("timeout", None if data else _ANSWER_TIMEOUT_S)
        return super()._do_request(method, endpoint, data=data, **more)


def submit(asked: Submission) -> int:
    """Checks what can be checked here, uploads, submits, and with ``wait`` shows the log until the job has ended.

    Returns:
        The exit code of the job's command; 130 if the job was stopped, or left running after Ctrl-C; without ``wait``
        0 once it is submitted.

    Raises:
        InputError: a config, an option or a working directory that is wrong; nothing was submitted then.
        ResourceError: no cluster answers at the address, or it refuses the token.
        SubmissionError: the cluster did not take the job, or fell silent while it ran.
    """
    asked = replace(asked, working_dir=_expanded(asked.working_dir), pip=asked.pip and _expanded(asked.pip))
    address, job = _checked_address(asked.address), _job_id(asked)
    _check_overrides(asked.overrides)
    config = load_config(asked.source, asked.overrides)
    check_job(asked.command, config)
    runtime_env: dict[str, Any] = {"env_vars": _environment(asked.env)}
    if asked.pip is not None:
        runtime_env["pip"] = str(_existing(asked.pip))
    unread, read = local_paths(config)
    found = find_files(asked.working_dir, asked.excludes, results=unread, inputs=read)
    check_shadowing(
        (path.relative_to(found.folder) for path in found.sizes),
        folder=found.folder,
        next_step="rename it, or leave it out: --exclude /jobs.py --exclude /jobs/",
    )
    _describe(asked, found, config)
    with tempfile.TemporaryDirectory() as scratch:
        package, config_name = Path(scratch) / "working_dir.zip", _config_name(asked.source)
        write_package(package, found, config_name, storage.read(asked.source))
        with _talking_to(address), _told_of_refusal(job, address):
            client = _connect(address)
            client.submit_job(
                entrypoint=shlex.join(["python", "-m", _MODULES[asked.command], config_name, *asked.overrides]),
                submission_id=job,
                runtime_env={**runtime_env, "working_dir": str(package)},
                metadata=_metadata(asked.command, config),
                entrypoint_num_cpus=asked.num_cpus,
                entrypoint_num_gpus=asked.num_gpus,
                entrypoint_memory=asked.memory_bytes,
            )
    say(f"job {job} is submitted to {redact(address)}")
    say(f"its log: {job_command('logs --follow', job, address)}")
    say(f"to stop it: {job_command('stop', job, address)}")
    if not asked.wait:
        print(job)
        return 0
    with _talking_to(address):
        return follow(client, job, address)


def check_job(command: Command, config: Config) -> None:
    """What the config alone shows to be wrong. Reads no shard, cache or model: only the cluster may reach those.

    Raises:
        InputError: as the job itself would; or it would write into its working directory, which nobody keeps.
    """
    with_absolute_paths(config)
    if command == "build" or (command == "distill" and config.teacher.mode == "cache"):
        cache_config(config)
    if command == "train":
        check_config(config)
    if command == "distill":
        check_plan(training_of(config))
    for key in _OUTPUTS[command]:
        (url,) = _urls(config, key)
        if storage.protocol(url) == "file" and "://" not in url and not _expanded(url).is_absolute():
            raise ConfigError(
                "a job's working directory is a copy that disappears, and with it what is written there",
                where=key,
                got=url,
                expected="an absolute path or a URL that every node reaches",
                next_step=f"append {key}=…",
            )


def _expanded(path: str | Path) -> Path:
    return Path(storage.expand_home(str(path)))


def _urls(config: Config, key: str) -> tuple[str, ...]:
    section_name, name = key.split(".")
    section = getattr(config, section_name)
    value = None if section is None else getattr(section, name, None)
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def local_paths(config: Config) -> tuple[list[Path], list[Path]]:
    """Local paths of a config that a job does not read from its copy of the working directory, and those that it does.

    Absolute paths are read where they are. Of relative ones, outputs and copies of a node are not read.
    """
    unread: list[Path] = []
    read: list[Path] = []
    for key in (*_INPUTS, *_UNREAD):
        for pattern in _urls(config, key):
            if pattern in ("random", "pretrained") or storage.protocol(pattern) != "file":
                continue
            paths = [_expanded(url.removeprefix("file://")) for url in storage.expand(pattern)]
            for path in paths:
                (unread if path.is_absolute() or key in _UNREAD else read).append(path)
    return unread, read


def _checked_address(address: str) -> str:
    if re.fullmatch(r"https?://[^/\s]+(/\S*)?", address):
        return address.rstrip("/")
    raise InputError(
        "this is no address of a cluster's Jobs API",
        where="--address",
        got=redact(address),
        expected="http://HOST:8265 or https://HOST, as the cluster's dashboard has it",
        next_step=f"did you mean http://{address}?" if "://" not in address else None,
    )


def _job_id(asked: Submission) -> str:
    job = asked.submission_id or f"stillroom-{asked.command}-{secrets.token_hex(4)}"
    # It becomes a part of URLs and file names.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", job):
        raise InputError(
            "this is no id of a job", where="--submission-id", got=job, expected="letters, digits, dots, dashes, _"
        )
    return job


def _check_overrides(overrides: Sequence[str]) -> None:
    """Overrides become the job's command line, which the cluster shows to everyone."""
    for override in overrides:
        key, _, value = override.partition("=")
        if any(redact(piece) != piece for piece in _BETWEEN_URLS.split(value)):
            raise ConfigError(
                "an override with a credential or query in its URL would be shown by the cluster",
                where=f"override {key}",
                next_step=f"write {key}: ${{oc.env:NAME}} into the config, and set NAME on the nodes (or --env NAME)",
            )


def _environment(names: Sequence[str]) -> dict[str, str]:
    for name in names:
        # What follows an equals sign may be a secret, and is not repeated.
        plain = name.partition("=")[0]
        if not _ENV_NAME.fullmatch(name):
            raise InputError(
                "this is no name of a variable",
                where="--env",
                got=plain + ("=…" if "=" in name else ""),
                expected="a name alone; the value is taken from this environment",
                next_step=f"export {plain}, then give --env {plain}" if _ENV_NAME.fullmatch(plain) else None,
            )
        if name not in os.environ:
            raise InputError("this variable is not set here", where="--env", got=name, next_step=f"export {name}")
    return {name: os.environ[name] for name in names}


def _existing(requirements: Path) -> Path:
    if not requirements.is_file():
        raise InputError("this requirements file is missing", where="--pip", got=str(requirements))
    return requirements


def _describe(asked: Submission, found: WorkingDir, config: Config) -> None:
    size = f"{len(found.sizes)} files, {found.size_bytes / 1e6:.1f} MB"
    say(f"{asked.command} of {redact(asked.source)}; working directory {found.folder} ({size})")
    if found.left_out:
        names = ", ".join(str(path.relative_to(found.folder)) for path in found.left_out)
        say(f"left out, being links to folders or no files: {names}")
    if found.results:
        names = ", ".join(str(path.relative_to(found.folder)) for path in found.results[:_NUM_NAMED])
        more = f" and {len(found.results) - _NUM_NAMED} more" if len(found.results) > _NUM_NAMED else ""
        say(f"left out, being caches, runs or absolute paths of the config: {names}{more}")
    if asked.env:
        names = ", ".join(asked.env)
        say(f"Ray keeps these values with the job and logs them on its nodes, so give it no credentials: {names}")
    keys = [
        key.removesuffix("_url")
        for key in (*_INPUTS, *_OUTPUTS[asked.command])
        if any(url.startswith(("/", "file://")) for url in _urls(config, key))
    ]
    if keys:
        say(f"every node has to see these local paths: {', '.join(keys)}")


def _config_name(source: str) -> str:
    return f"{CONFIG_FOLDER}/{PurePosixPath(redact(source)).name}"


def _metadata(command: Command, config: Config) -> dict[str, str]:
    """What the cluster shows of the job; the fingerprint tells jobs of one config from others."""
    fingerprint = short(config.model_dump(mode="json"))
    return {"project": "stillroom", "command": command, "config_fingerprint": fingerprint}


def _connect(address: str) -> JobSubmissionClient:
    # Ray heeds this variable above the address that it is given.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    # These tell of every upload and of the end of every log.
    for module in ("dashboard_sdk", "job.sdk"):
        logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
    return _Client(address)


@contextmanager
def _talking_to(address: str) -> Generator[None]:
    try:
        yield
    except AuthenticationError as error:
        raise ResourceError(
            "the cluster did not accept the token, or there was none",
            where=redact(address),
            got=first_line(error),
            code="ray.token-refused",
            next_step=TOKEN_HELP,
        ) from error
    # That is of our own output, which ended.
    except BrokenPipeError:
        raise
    # Exceptions of requests are OSErrors, that of an answer which is no JSON too.
    except OSError as error:
        raise ResourceError(
            "no Ray cluster answers",
            where=redact(address),
            got=type(error).__name__,
            expected=f"an answer of its dashboard within {_ANSWER_TIMEOUT_S} s",
            next_step="see that the cluster runs and that its dashboard's port can be reached from here "
            "(kubectl port-forward, ssh -L)",
        ) from error


@contextmanager
def _told_of_refusal(job: str, address: str) -> Generator[None]:
    try:
        yield
    except RuntimeError as error:
        if "already exists" in str(error):
            raise InputError(
                "the cluster has a job of this submission id",
                where=redact(address),
                got=job,
                expected="an id of its own for each submission; work goes on from what is committed under any id",
                next_step=f"leave out --submission-id, or follow it: {job_command('logs --follow', job, address)}",
            ) from error
        raise SubmissionError("the cluster did not take the job", where=redact(address), got=error) from error
