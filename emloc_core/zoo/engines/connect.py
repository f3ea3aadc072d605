"""Connects to Ray: to an existing cluster, or to one on this machine that no other machine can reach."""

import ipaddress
import os
import secrets
import socket
from typing import Any

from emloc_core.errors import EmlocError
from emloc_core.zoo.jobs.faults import describe

#: Objects are outcomes, a few kilobytes each; Ray would take a third of the memory for them.
_OBJECTS = 80 << 20
_ANSWER = 10.0  # seconds in which a cluster answers


def confine() -> None:
    """Have a Ray that this process or its children start listen on loopback alone, and answer no one without a token.

    Its workers get the priority of this process, as those of the local engine do. Ray takes all of this from the
    environment, when it is imported. What joins such a cluster inherits it, and with it the token; other users of the
    machine can read neither.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Loopback is Ray's own address of a node where it makes no clusters of machines, and this is its name for that.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Ray's own 15 is so low a priority that beside anything else on this machine they hardly run.
    os.environ.setdefault("RAY_worker_niceness", "0")


def connect(address: str | None, memory: int | None) -> Any:
    """Return Ray, connected to a cluster or to one that it starts."""
    if address is None:
        confine()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before Ray is imported
    try:
        import ray
    except ImportError:
        raise EmlocError("--engine ray needs the package ray.", "pip install 'emloc[cluster]'") from None
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        _start(ray, {"include_dashboard": False, "object_store_memory": _OBJECTS, "_memory": memory, **quiet})
        return ray
    try:
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if host:  # Ray itself asks for minutes before it gives up
            socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER).close()
        ray.init(address=address, **quiet)
    except Exception as error:  # of many kinds, by how it was not to be reached
        raise EmlocError(
            f"There is no Ray cluster at {address} ({describe(error).rstrip('.')}).",
            "Check --address, the token (RAY_AUTH_MODE, RAY_AUTH_TOKEN) if the cluster asks for one, and that this "
            "machine has the same versions of Ray and Python.",
        ) from error
    return ray


def _start(ray: Any, options: dict[str, Any]) -> None:
    """Start Ray on this machine, for this machine alone."""
    try:
        ray.init(address="local", **options)
    except Exception as error:  # of many kinds
        raise EmlocError(f"Ray did not start ({describe(error).rstrip('.')}).", "Use --engine local.") from error
    node = ray.util.get_node_ip_address()
    if not ipaddress.ip_address(node).is_loopback:  # it had been imported before it was confined
        ray.shutdown()
        raise EmlocError(
            f"Ray would listen on {node}, where other machines can reach it.",
            "Do not import ray before emloc starts it, or start a cluster yourself and give its --address.",
        )
