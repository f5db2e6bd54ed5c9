"""Connect to a Ray cluster, or start a private one on this machine, and fail early with one clear error."""

from __future__ import annotations

import logging
import os
import socket
import stat
import tempfile
from pathlib import Path
from typing import Any

import grpc
import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private import services
from ray._private.authentication.authentication_token_setup import (
    ensure_token_if_auth_enabled,
    maybe_enable_token_auth_if_token_available,
)
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated.gcs_service_pb2 import CheckAliveRequest  # pyright: ignore[reportAttributeAccessIssue]
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
from ray.exceptions import AuthenticationError

from jobs.observability.log import emit
from jobs.ray.address import JOB_ENV, starts_locally
from jobs.ray.shadowing import check_shadowing
from pipeline.core.errors import ClusterError, ResourceError

TOKEN_HELP = "set RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN or its file in RAY_AUTH_TOKEN_PATH"  # noqa: S105
# Ray itself retries a dead address for 14 minutes.
_ANSWER_TIMEOUT_S, _REASON_TIMEOUT_S = 10.0, 3.0
_MOVE = "rename it, or run the command in another folder"
_CLIENT_SCHEME = "ray://"
# The kernel's limit for the path of a Unix socket, less its terminating zero.
_MAX_SOCKET_PATH_BYTES = 107
_LONGEST_SOCKET = "session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
# Ray puts the working folder first on its workers' path. What is imported before that cannot be hidden by it.
_PRELOAD = {"preload_python_modules": ["jobs"]}
_SHORT_ROOTS = ("/tmp", "/var/tmp")  # noqa: S108 - a folder below is created for this user alone, and checked


def connect(address: str) -> None:
    """Connects to the cluster of ``ray.address``, or starts one here.

    Raises:
        ResourceError: no cluster answers at the address, it refuses the token, or Ray's folders cannot be written.
        ClusterError: Ray could not start.
    """
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    # That Ray guards a cluster with a token is as it should be, and no news.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    if starts_locally(address):
        _start(common)
    else:
        _join("auto" if address == "local" else address, common)


def _start(common: dict[str, Any]) -> None:
    # A private cluster phones nowhere.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    folder = _temporary_folder()
    _check_token_file()
    try:
        ray.init(address="local", include_dashboard=False, _temp_dir=folder, _system_config=_PRELOAD, **common)
    except Exception as error:
        # Ray raises errors of many classes here. None of them is about this program's own state.
        raise ClusterError(
            "Ray could not start on this machine",
            code="ray.start-failed",
            where="ray.address=local",
            got=f"{type(error).__name__}: {_first_line(error)}",
            next_step=f"read the logs in {folder or get_default_ray_temp_dir()}/session_latest/logs, or set "
            "ray.address=none to work in one process without Ray",
        ) from error


def _temporary_folder() -> str | None:
    """The folder for Ray's sessions; None: Ray's default, which suits.

    Raises:
        ResourceError: the folder cannot be written.
    """
    default = get_default_ray_temp_dir()
    size_bytes = len(os.fsencode(f"{default}/{_LONGEST_SOCKET}"))
    if size_bytes <= _MAX_SOCKET_PATH_BYTES:
        _check_writable(default)
        return None
    folder = _short_folder()
    emit(
        f"Ray's temporary folder is {folder} (logs, spilled objects): below {default} its sockets' paths would have "
        f"{size_bytes} bytes, and the system allows {_MAX_SOCKET_PATH_BYTES}; RAY_TMPDIR chooses another folder",
        event="warning",
        level=logging.WARNING,
    )
    return folder


def _short_folder() -> str:
    """``/tmp/ray-UID``, or the same below ``/var/tmp``: a folder of this user that no other user can write."""
    uid = os.getuid()
    errors: list[str] = []
    for root in _SHORT_ROOTS:
        folder = Path(root, f"ray-{uid}")
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()
        except OSError as error:
            errors.append(str(error))
            continue
        if stat.S_ISDIR(found.st_mode) and found.st_uid == uid:
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
    """Ray writes a token into the home directory before it starts a cluster, unless it is given one.

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
        found = _resolve(address)
    except (ConnectionError, ValueError) as error:
        raise _silent(address, _first_line(error)) from error
    check_answers(found)
    if JOB_ENV not in os.environ:
        here = Path.cwd()
        files = (path.relative_to(here) for path in here.glob("jobs*/*.py"))
        check_shadowing([*files, *(Path(path.name) for path in here.glob("*.py"))], folder=here, next_step=_MOVE)
    try:
        ray.init(address=address, **common)
    except Exception as error:
        raise ClusterError(
            "Ray could not connect to this cluster",
            code="ray.connect-failed",
            where=f"ray.address={address}",
            got=f"{type(error).__name__}: {_first_line(error)}",
            expected="the same versions of Ray and Python as the cluster; for HOST:PORT, a node of it on this machine",
            next_step="set ray.address=auto on a node of the cluster, or hand the job to it with stillroom submit",
        ) from error


def _resolve(address: str) -> str:
    """Where ``auto`` leads: to RAY_ADDRESS, or to the cluster that was started last on this machine."""
    if address != "auto":
        return address
    if given := os.environ.get("RAY_ADDRESS"):
        return given
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    found = services.canonicalize_bootstrap_address("auto")
    if found is None:
        raise _silent("auto", "no cluster was started on this machine")
    return found


def check_answers(address: str) -> None:
    """One health check of a cluster's control service (``HOST:PORT``) or of its client server (``ray://HOST:PORT``).

    Raises:
        ResourceError: nothing answers in time, something else than Ray answers, or the token is refused.
    """
    try:
        ensure_token_if_auth_enabled(create_token_if_missing=False)
    except AuthenticationError as error:
        raise _refused(address, _first_line(error)) from error
    channel = init_grpc_channel(address.removeprefix(_CLIENT_SCHEME))
    try:
        NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=_ANSWER_TIMEOUT_S, wait_for_ready=True)
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()  # pyright: ignore[reportAttributeAccessIssue]
        if code == grpc.StatusCode.UNAUTHENTICATED:
            raise _refused(address, str(error.details())) from error  # pyright: ignore[reportAttributeAccessIssue]
        # The client server has no such method, which it says: it is there.
        if code == grpc.StatusCode.UNIMPLEMENTED and address.startswith(_CLIENT_SCHEME):
            return
        raise _silent(address, _reason(address)) from error
    finally:
        channel.close()


def _reason(address: str) -> str:
    """Why nothing answered: gRPC only reports that the time is over."""
    host, _, port = address.removeprefix(_CLIENT_SCHEME).rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REASON_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        return str(error)
    return "something listens there, but does not answer as Ray does"


def _refused(address: str, reason: str) -> ResourceError:
    return ResourceError(
        "the cluster did not accept the token, or there was none",
        code="ray.token-refused",
        where=f"ray.address={address}",
        got=reason,
        next_step=TOKEN_HELP,
    )


def _silent(address: str, reason: str) -> ResourceError:
    return ResourceError(
        "no Ray cluster responds",
        code="ray.no-answer",
        where=f"ray.address={address}",
        got=reason,
        expected=f"an answer of its control service (port 6379), or with ray:// of its client server (10001), within "
        f"{_ANSWER_TIMEOUT_S:g} s",
        next_step="start one (ray start --head), or set ray.address=local to start one here",
    )


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
