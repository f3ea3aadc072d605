"""A double of the Hugging Face hub on this machine: repositories in memory, by the calls that huggingface_hub makes."""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

COMMIT = "c" * 40


class Hub:
    """The repositories: id -> path in it -> content; and which are private."""

    def __init__(self) -> None:
        self.address = ""
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.refuses = False
        self.hangs = 0.0  # seconds

    def add(self, repository: str, directory: Path) -> None:
        """Publish the files of a directory."""
        paths = [path for path in directory.rglob("*") if path.is_file()]
        self.files[repository] = {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, content: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _json(self, content: object, status: int = 200) -> None:
            self._answer(json.dumps(content).encode(), status, Content_Type="application/json")

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_POST(self) -> None:
            path, body = self.path.partition("?")[0], self._body()
            time.sleep(hub.hangs)
            if hub.refuses:
                self._json({"error": "You are not logged in."}, 401)
            elif path == "/api/repos/create":
                query = json.loads(body)
                name = f"{query['organization']}/{query['name']}" if query.get("organization") else query["name"]
                hub.files.setdefault(name, {})
                hub.private[name] = query.get("private", False) or query.get("visibility") == "private"
                self._json({"url": f"{hub.address}/{name}", "id": name})
            elif path == "/api/validate-yaml":
                self._json({"errors": [], "warnings": []})
            elif path.endswith("/preupload/main"):
                files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                         for file in json.loads(body)["files"]]  # fmt: skip
                self._json({"files": files})
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        hub.files[match[1]][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    elif line["key"] == "deletedFile":
                        del hub.files[match[1]][line["value"]["path"]]
                address = f"{hub.address}/{match[1]}/commit/{COMMIT}"
                self._json({"success": True, "commitOid": COMMIT, "commitUrl": address})
            else:
                self._json({"error": path}, 404)

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if (match := re.match(r"/api/models/([^/]+/[^/]+)(/|$)", path)) and match[1] in hub.files:
                files = sorted(hub.files[match[1]])
                if "/tree/" in path:
                    self._json([{"type": "file", "path": name, "size": 1, "oid": "0"} for name in files])
                else:
                    self._json({"id": match[1], "sha": COMMIT, "private": False,
                                "siblings": [{"rfilename": name} for name in files]})  # fmt: skip
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
                content = hub.files.get(match[1], {}).get(match[2])
                if content is None:
                    self._answer(b"", 404, X_Error_Code="EntryNotFound")
                else:
                    etag = hashlib.sha1(content, usedforsecurity=False).hexdigest()
                    self._answer(content, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)
            else:
                self._answer(b"", 404, X_Error_Code="RepoNotFound")

        def do_HEAD(self) -> None:
            self.do_GET()

    return Handler


@contextmanager
def local_hub(cache: Path) -> Iterator[Hub]:
    """Let huggingface_hub talk to a hub on this machine, with an empty cache of its own."""
    from huggingface_hub import constants

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.address = endpoint = f"http://127.0.0.1:{server.server_port}"
    changes = {"ENDPOINT": endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(cache),
               "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}"}  # fmt: skip
    try:
        with mock.patch.multiple(constants, **changes):
            yield hub
    finally:
        server.shutdown()
        server.server_close()
