"""A Ray that emloc starts is reachable neither from other machines nor without its token."""

import ipaddress
import os
import subprocess
import sys
import textwrap

import psutil
import pytest

#: Starts Ray as ``--engine ray`` does, and holds a worker until stdin is closed.
LOCAL = """
    import sys, threading
    from emloc_core.zoo.engines.cluster import RayEngine
    engine = RayEngine(workers=1, memory=1 << 30)
    worker = engine._ray.remote(threading.Event).remote()
    engine._ray.get(worker.is_set.remote())
    print(engine._ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
    engine.close()
"""

#: The same with the demo's two nodes.
NODES = """
    import sys, threading
    from emloc_demo.zoo.command import two_nodes
    with two_nodes() as address:
        from emloc_core.zoo.engines.cluster import RayEngine
        engine = RayEngine(address=address)
        worker = engine._ray.remote(threading.Event).remote()
        engine._ray.get(worker.is_set.remote())
        print(address, flush=True)
        sys.stdin.read()
        engine.close()
"""

JOIN = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"


pytestmark = pytest.mark.thorough  # starting Ray takes seconds


@pytest.fixture(
    scope="module", params=[LOCAL, pytest.param(NODES, marks=pytest.mark.slow)], ids=["one node", "two nodes"]
)
def ray(request):
    """A Ray that is running: its driver's process and its address."""
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(request.param)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as driver:
        address = driver.stdout.readline().strip()
        yield psutil.Process(driver.pid), address
        driver.stdin.close()
        assert driver.wait() == 0


def listening(process):
    """Return name and address of every socket on which a process, or one that it started, listens."""
    addresses = []
    for member in [process, *process.children(recursive=True)]:
        addresses += [
            (member.name(), connection.laddr)
            for connection in member.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
    return addresses


def is_loopback(address):
    ip = ipaddress.ip_address(address)
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def test_listens_on_loopback_alone(ray):
    driver, _ = ray
    listeners = listening(driver)
    assert {name for name, _ in listeners} >= {"gcs_server", "raylet"}
    assert any(name.startswith("ray::") for name, _ in listeners)  # workers
    assert [name for name, address in listeners if not is_loopback(address.ip)] == []


@pytest.mark.parametrize("token", [None, "0" * 64])
def test_answers_no_one_without_the_token(ray, token, tmp_path):
    _, address = ray
    others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    credentials = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {}
    timeouts = {"RAY_gcs_server_request_timeout_seconds": "2", "RAY_gcs_rpc_server_connect_timeout_s": "1"}
    process = subprocess.run(
        [sys.executable, "-c", JOIN, address],
        env={**others, **credentials, **timeouts, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode != 0
    assert "AuthenticationError" in process.stderr
