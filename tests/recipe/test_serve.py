"""The page of a run while it lasts: what it shows, and to whom."""

import http.client
import os
import socket
import struct
import threading

import pytest
from support.runs import HOSTILE, finished_run

from emloc_core.cli.report import command
from emloc_core.errors import EmlocError
from emloc_core.recipe.live import Doing, Live
from emloc_core.recipe.page import live_page
from emloc_core.recipe.serve import HOST, server
from emloc_core.stages.progress import ProgressEvent

EVENT = ProgressEvent("train", "adapter", 12, 40, HOSTILE, 1.25, 95.0, 2 * 10**9, number=2, stages=6)


@pytest.fixture
def get(tmp_path):
    """A function that requests a page of an empty run; it returns status, text, and the port."""
    with server(tmp_path) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()

        def request(path="/", host=None, method="GET"):
            connection = http.client.HTTPConnection(HOST, serving.server_port, timeout=60)
            connection.request(method, path, headers={"Host": host} if host else {})
            answer = connection.getresponse()
            return answer.status, answer.read().decode(), serving.server_port

        yield request
        serving.shutdown()
        thread.join()


def test_it_shows_what_runs_and_then_what_is_done(tmp_path):
    assert "Nothing is running" in live_page(tmp_path)
    with Live(tmp_path) as live:
        live.begin(Doing(HOSTILE, "tune a LoRA", EVENT, losses=[(10, 1.5)]))
        page = live_page(tmp_path)
    for text in ("tune a LoRA", "stage 2 of 6", "12 of 40", "1.25", "95 s", "2 GB", 'http-equiv="refresh"', "svg"):
        assert text in page, text
    assert HOSTILE not in page
    finished = live_page(finished_run(tmp_path))
    assert "All stages are done" in finished
    assert "What was done" in finished


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--serve", "--json"], "--serve writes no page"),
        (["--serve", "-o", "page.html"], "--serve writes no page"),
        (["--port", "8000"], "--port has no effect without --serve"),
    ],
)
def test_what_serving_ignores_is_refused(options, complaint, tmp_path):
    with pytest.raises(EmlocError, match=complaint):
        command.main([str(tmp_path / "nothing"), *options], standalone_mode=False)


def test_only_this_machine_sees_one_page(get):
    assert get()[0] == 200
    assert get("/?again")[0] == 200
    assert get("/progress.json")[0] == 404
    assert get("/../../etc/passwd")[0] == 404
    assert get(host="attacker.example:80")[0] == 403
    assert get(host="localhost:80")[0] == get(host="localhost")[0] == 200
    assert get(method="POST")[0] == 501


def test_what_cannot_be_shown_is_said_on_the_page_alone(get, tmp_path, capfd):
    port = get()[2]
    connection = socket.create_connection((HOST, port))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # ends it by a reset
    connection.close()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "emloc.json").write_text("<")
    status, text, _ = get()
    assert (status, "emloc.json is not valid JSON" in text) == (500, True)
    assert capfd.readouterr().err == ""


def test_it_listens_on_loopback_and_says_what_it_cannot_do(tmp_path):
    with server(tmp_path) as first:
        assert first.server_address[0] == "127.0.0.1"
        with pytest.raises(EmlocError, match=f"port {first.server_port} cannot be used"):
            server(tmp_path, first.server_port)
    with pytest.raises(EmlocError, match="is not a directory"):
        server(tmp_path / "nowhere")


def test_the_file_of_a_stranger_harms_nothing(tmp_path):
    for content in ("[]", "{", '{"pid": -1}', f'{{"pid": {os.getpid()}, "name": 1, "purpose": 2, "event": {{}}}}'):
        (tmp_path / "progress.json").write_text(content)
        assert "Nothing is running" in live_page(tmp_path)
