"""Ray's internals for connections. Only this module and ``train_internals`` import names that Ray may change in any
release.
"""

from __future__ import annotations

from ray._common.utils import get_default_ray_temp_dir
from ray._private import services
from ray._private.authentication.authentication_token_setup import (
    ensure_token_if_auth_enabled,
    maybe_enable_token_auth_if_token_available,
)
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated.gcs_service_pb2 import CheckAliveRequest  # pyright: ignore[reportAttributeAccessIssue]
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

AUTHENTICATION_LOGGER = "ray._private.authentication"


def default_temp_dir() -> str:
    """The folder that Ray uses where none is named."""
    return get_default_ray_temp_dir()


def local_cluster_address() -> str | None:
    """The address of the cluster that was started last on this machine; None: there is none."""
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    return services.canonicalize_bootstrap_address("auto")


def load_token() -> None:
    """
    Raises:
        AuthenticationError: Ray's authentication is enabled and there is no token.
    """
    ensure_token_if_auth_enabled(create_token_if_missing=False)


def check_alive(address: str, *, timeout_s: float) -> None:
    """One health check of the control service at ``HOST:PORT``.

    Raises:
        grpc.RpcError: it did not respond in time, or refused.
    """
    channel = init_grpc_channel(address)
    try:
        NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=timeout_s, wait_for_ready=True)
    finally:
        channel.close()
