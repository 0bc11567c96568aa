"""A small Hugging Face hub on the loopback address, for the real client to talk to."""

import base64
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Files by repository. `requests` is a log.

    `cut` makes the server hang up in the middle of a body; `spoilt` makes it send a body whose last byte is
    not what the headers promise.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.cut = self.spoilt = False
        self.requests: list[str] = []
        self.url = ""

    def __enter__(self) -> "FakeHub":
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                hub.answer_file(self, body=False)

            def do_GET(self):
                hub.answer_file(self, body=True)

            def do_POST(self):
                hub.answer_post(self)

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer_file(self, request, body: bool) -> None:
        self.requests.append(f"{request.command} {request.path}")
        parts = request.path.strip("/").split("/")
        repo, rest = "/".join(parts[:2]), parts[2:]
        files = self.repos.get(repo)
        if files is None:
            return self.send(request, 404, error="RepoNotFound")
        if rest[:1] != ["resolve"] or rest[1] not in ("main", COMMIT):
            return self.send(request, 404, error="RevisionNotFound")
        content = files.get("/".join(rest[2:]))
        if content is None:
            return self.send(request, 404, error="EntryNotFound")
        self.send(request, 200, content, body=body)

    def answer_post(self, request) -> None:
        self.requests.append(f"POST {request.path}")
        sent = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        if request.path.endswith("/repos/create"):
            made = json.loads(sent)
            repo = "/".join(filter(None, [made.get("organization"), made["name"]]))
            self.repos.setdefault(repo, {})
            return self.send_json(request, {"url": f"{self.url}/{repo}"})
        if "/preupload/" in request.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(sent)["files"]
            ]
            return self.send_json(request, {"files": files})
        if "/commit/" in request.path:
            repo = "/".join(request.path.split("/")[3:5])
            for line in map(json.loads, sent.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.repos[repo][line["value"]["path"]] = content
            return self.send_json(
                request, {"commitOid": COMMIT, "commitUrl": f"{self.url}/{repo}/commit/{COMMIT}"}
            )
        self.send_json(request, {})

    def send_json(self, request, answer: dict) -> None:
        self.send(request, 200, json.dumps(answer).encode())

    def send(self, request, status, content=b"", body=True, error=None) -> None:
        request.send_response(status)
        if error:
            request.send_header("X-Error-Code", error)
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("ETag", f'"{hash(content) & 0xFFFFFFFF:08x}"')
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if self.spoilt and content:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if body:
            request.wfile.write(content[: len(content) // 2] if self.cut else content)
        if body and self.cut:
            request.close_connection = True


@contextmanager
def serving(repos: dict[str, dict[str, bytes]]):
    """A hub with these repositories."""
    with FakeHub() as hub:
        hub.repos = repos
        yield hub
