"""Without a network a download ends soon, and says why."""

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from vitkit_data.download import require_answer


@pytest.fixture
def silent_port():
    """A port that takes connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def refusing_port():
    """A web server that answers 403 to everything, as storage hosts do for their front page."""

    class Refuse(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(403)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Refuse)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


def test_any_answer_will_do(refusing_port, closed_port):
    require_answer([f"http://127.0.0.1:{refusing_port}/file"])
    require_answer([f"http://127.0.0.1:{closed_port}/file", f"http://127.0.0.1:{refusing_port}/file"])


def test_hosts_that_refuse_are_named_with_the_reason(closed_port):
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1: .*[Rr]efused"):
        require_answer([f"http://127.0.0.1:{closed_port}/file"])


def test_silence_ends_in_time(silent_port):
    began = time.monotonic()
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1: timed out|no answer from 127\.0\.0\.1, localhost within"):
        require_answer([f"http://{host}:{silent_port}/" for host in ("127.0.0.1", "localhost")], seconds=0.2)
    assert time.monotonic() - began < 5


def test_an_unknown_host_is_named():
    with pytest.raises(ConnectionError, match=r"(no-such-host\.invalid: .*)|(no answer from no-such-host\.invalid)"):
        require_answer(["https://no-such-host.invalid/file"], seconds=3.0)
