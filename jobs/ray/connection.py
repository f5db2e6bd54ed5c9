"""Connect to a Ray cluster or start a private one on this machine; fail early with one clear error."""

from __future__ import annotations

import logging
import os
import socket
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

import grpc
import ray
from ray.exceptions import AuthenticationError

from jobs.observability.log import warn
from jobs.ray.address import JOB_ENV, starts_locally
from jobs.ray.core_internals import (
    AUTHENTICATION_LOGGER,
    check_alive,
    default_temp_dir,
    load_token,
    local_cluster_address,
)
from pipeline.core.errors import ClusterError, InputError, ResourceError, first_line

_TOKEN_HELP = "set RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN or its file in RAY_AUTH_TOKEN_PATH"  # noqa: S105
# Ray itself retries an unreachable address for 14 minutes.
RESPONSE_TIMEOUT_S, _PORT_TIMEOUT_S = 10.0, 3.0
_CLIENT_SCHEME = "ray://"
_PACKAGE = "jobs"
# A folder with this file is a checkout of Stillroom.
_CHECKOUT_MARKER = PurePath(_PACKAGE, "build_cache.py")
# The kernel's limit for the path of a Unix socket, without its terminating zero.
_MAX_SOCKET_PATH_BYTES = 107
_LONGEST_SOCKET = "session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
# Ray puts the working folder first on its workers' import path, after these modules are imported.
_PRELOAD = {"preload_python_modules": [_PACKAGE]}
_SHORT_ROOTS = ("/tmp", "/var/tmp")  # noqa: S108 - the folder below is created for this user alone, and checked


def connect(address: str) -> None:
    """Connects to the cluster of ``ray.address``, or starts one here.

    Raises:
        ResourceError: no cluster responds at the address, it refuses the token, or Ray's folders cannot be written.
        ClusterError: Ray could not start.
    """
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    # It warns that the cluster requires a token.
    logging.getLogger(AUTHENTICATION_LOGGER).setLevel(logging.ERROR)
    if starts_locally(address):
        _start(common)
    else:
        _join("auto" if address == "local" else address, common)


def _start(common: dict[str, Any]) -> None:
    # A private cluster sends no usage statistics.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    folder = _temporary_folder()
    _check_token_file()
    try:
        ray.init(address="local", include_dashboard=False, _temp_dir=folder, _system_config=_PRELOAD, **common)
    except Exception as error:
        # Ray raises exceptions of many classes here, none of them for a bug of this program.
        raise ClusterError(
            "Ray could not start on this machine",
            code="ray.start-failed",
            where="ray.address=local",
            got=f"{type(error).__name__}: {first_line(error)}",
            next_step=f"read the logs in {folder or default_temp_dir()}/session_latest/logs, or set "
            "ray.address=none to work in one process without Ray",
        ) from error


def _temporary_folder() -> str | None:
    """The folder for Ray's sessions; None: Ray's default.

    Raises:
        ResourceError: the folder cannot be written.
    """
    default = default_temp_dir()
    size_bytes = len(os.fsencode(f"{default}/{_LONGEST_SOCKET}"))
    if size_bytes <= _MAX_SOCKET_PATH_BYTES:
        _check_writable(default)
        return None
    folder = _short_folder()
    warn(
        f"Ray's temporary folder is {folder} (logs, spilled objects): below {default} its sockets' paths would have "
        f"{size_bytes} bytes, and the system allows {_MAX_SOCKET_PATH_BYTES}; RAY_TMPDIR chooses another folder"
    )
    return folder


def _short_folder() -> str:
    """``/tmp/ray-UID``, or the same below ``/var/tmp``: a folder that no other user can write."""
    uid = os.getuid()
    errors: list[str] = []
    for root in _SHORT_ROOTS:
        folder = Path(root, f"ray-{uid}")
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            status = folder.lstat()
        except OSError as error:
            errors.append(str(error))
            continue
        if stat.S_ISDIR(status.st_mode) and status.st_uid == uid:
            return str(folder)
        errors.append(f"{folder} belongs to another user")
    raise _unwritable("; ".join(errors), where=" and ".join(_SHORT_ROOTS))


def _check_writable(folder: str) -> None:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(str(error), where=folder) from error


def _unwritable(reason: str, *, where: str) -> ResourceError:
    return ResourceError(
        "Ray cannot write its temporary folder",
        code="ray.temp-dir-unwritable",
        where=where,
        got=reason,
        expected="a folder that this user can write, with a short path",
        next_step="export RAY_TMPDIR=FOLDER with a folder of this user, or set ray.address=none",
    )


def _check_token_file() -> None:
    """Ray writes a token into the home directory before it starts a cluster, unless one is given.

    Raises:
        ResourceError: the home directory cannot be written.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        return
    path = Path.home() / ".ray" / "auth_token"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with tempfile.TemporaryFile(dir=path.parent):
                return
        path.read_bytes()
    except OSError as error:
        raise ResourceError(
            "Ray cannot store its authentication token",
            code="ray.token-unwritable",
            where=str(path),
            got=str(error),
            expected="a home directory that this user can write, or a token in RAY_AUTH_TOKEN",
            next_step="export RAY_AUTH_TOKEN=$(openssl rand -hex 32), or set HOME to a folder of this user",
        ) from error


def _join(address: str, common: dict[str, Any]) -> None:
    try:
        resolved = _resolve(address)
    except (ConnectionError, ValueError) as error:
        raise _no_response(address, first_line(error)) from error
    check_response(resolved)
    if JOB_ENV not in os.environ:
        folder = Path.cwd()
        files = [path.relative_to(folder) for pattern in ("*.py", "jobs*/*.py") for path in folder.glob(pattern)]
        check_shadowing(files, folder=folder, next_step="rename it, or run the command in another folder")
    try:
        ray.init(address=address, **common)
    except Exception as error:
        raise ClusterError(
            "Ray could not connect to this cluster",
            code="ray.connect-failed",
            where=f"ray.address={address}",
            got=f"{type(error).__name__}: {first_line(error)}",
            expected="the same versions of Ray and Python as the cluster; for HOST:PORT, a node of it on this machine",
            next_step="set ray.address=auto on a node of the cluster, or run stillroom submit",
        ) from error


def _resolve(address: str) -> str:
    """``auto`` is RAY_ADDRESS, or else the cluster that was started last on this machine."""
    if address != "auto":
        return address
    resolved = os.environ.get("RAY_ADDRESS") or local_cluster_address()
    if resolved is None:
        raise _no_response("auto", "no cluster was started on this machine")
    return resolved


def check_response(address: str) -> None:
    """One health check of a cluster's control service (``HOST:PORT``) or of its client server (``ray://HOST:PORT``).

    Raises:
        ResourceError: no response in time, or the token is refused.
    """
    try:
        load_token()
        check_alive(address.removeprefix(_CLIENT_SCHEME), timeout_s=RESPONSE_TIMEOUT_S)
    except AuthenticationError as error:
        raise token_refused(f"ray.address={address}", first_line(error)) from error
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()  # pyright: ignore[reportAttributeAccessIssue]
        if code == grpc.StatusCode.UNAUTHENTICATED:
            raise token_refused(f"ray.address={address}", str(error.details())) from error  # pyright: ignore[reportAttributeAccessIssue]
        # The client server responds that it has no such method.
        if code == grpc.StatusCode.UNIMPLEMENTED and address.startswith(_CLIENT_SCHEME):
            return
        raise _no_response(address, _reason(address)) from error


def _reason(address: str) -> str:
    """Why there was no response: gRPC reports only the timeout."""
    host, _, port = address.removeprefix(_CLIENT_SCHEME).rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PORT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        return str(error)
    return "a server listens there, but does not respond like Ray"


def token_refused(where: str, reason: str) -> ResourceError:
    return ResourceError(
        "the cluster did not accept the token, or none was sent",
        code="ray.token-refused",
        where=where,
        got=reason,
        next_step=_TOKEN_HELP,
    )


def no_response(where: str, reason: str, *, expected: str, next_step: str) -> ResourceError:
    return ResourceError(
        "no Ray cluster responds",
        code="ray.no-response",
        where=where,
        got=reason,
        expected=expected,
        next_step=next_step,
    )


def _no_response(address: str, reason: str) -> ResourceError:
    return no_response(
        f"ray.address={address}",
        reason,
        expected="a response of its control service (port 6379), or with ray:// of its client server (10001), within "
        f"{RESPONSE_TIMEOUT_S:g} s",
        next_step="start one (ray start --head), or set ray.address=local to start one here",
    )


def check_shadowing(files: Iterable[PurePath], *, folder: Path, next_step: str) -> None:
    """Detects a user's own module named ``jobs``, which Ray's workers would import instead of Stillroom's package.

    Args:
        files: relative to a folder that comes first on the import path of Ray's workers.

    Raises:
        InputError: a module of that folder hides Stillroom's package.
    """
    names = set(files)
    hiding = {PurePath(f"{_PACKAGE}.py"), PurePath(_PACKAGE, "__init__.py")} & names
    if hiding and _CHECKOUT_MARKER not in names:
        raise InputError(
            f"a module of this folder hides Stillroom's package {_PACKAGE} from Ray's workers",
            code="ray.hidden-package",
            where=str(folder),
            got=", ".join(str(path) for path in sorted(hiding)),
            expected=f"no module named {_PACKAGE}",
            next_step=next_step,
        )
