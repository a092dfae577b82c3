"""A stand-in for the Hugging Face hub on 127.0.0.1, as far as huggingface_hub's downloads need it.

It speaks the model, tree and resolve endpoints with the real hub's headers and error codes, and
can drop or stall one file's body half-way, once. `log` holds what was asked: (method, path, range).
"""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GOOD_TOKEN, STRANGERS_TOKEN, NARROW_TOKEN = "hf_good", "hf_stranger", "hf_narrow"


@dataclass
class Hub:
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    down: bool = False  # every answer is 503
    drop: set[str] = field(default_factory=set)  # files whose first body ends half-way
    stall: set[str] = field(default_factory=set)  # files whose first body hangs half-way
    stalled: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    log: list[tuple[str, str, str | None]] = field(default_factory=list)
    url: str = ""

    def start(self) -> ThreadingHTTPServer:
        return serve(self, _Answers)

    def fetched(self, name: str) -> list[str | None]:
        """The byte range of each GET of a file; None for the whole."""
        return [r for method, path, r in self.log if method == "GET" and path.endswith("/" + name)]


def serve(hub: Any, answers: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    """Starts a server whose handlers know the hub, which learns its `url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (answers,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.log.append((self.command, path, self.headers.get("Range")))
        parts = path.split("/")
        api = parts[:2] == ["api", "models"]
        repo, rest = "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[2:]
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")

        if self.hub.down:
            return self.refuse(503, "", "down for repairs")
        if token not in ("", GOOD_TOKEN, STRANGERS_TOKEN, NARROW_TOKEN):
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if repo not in self.hub.repos or (repo in self.hub.private and token != GOOD_TOKEN):
            status, said = (404, "Repository not found") if token else (401, "Invalid username")
            return self.refuse(status, "RepoNotFound", said)
        files = self.hub.repos[repo]
        if rest[1:] and rest[1] not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {rest[1]}")
        if api and rest[:1] == ["tree"]:
            rows = [
                {"type": "file", "path": name, "size": len(body), "oid": etag(body)}
                for name, body in files.items()
            ]
            return self.answer(json.dumps(rows).encode())
        if api:
            siblings = [{"rfilename": n, "size": len(body)} for n, body in files.items()]
            return self.answer(
                json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode()
            )
        if repo in self.hub.gated and token != GOOD_TOKEN:
            if token == NARROW_TOKEN:
                return self.refuse(403, "", "Please enable access to public gated repositories")
            if token:
                return self.refuse(403, "GatedRepo", "you are not in the authorized list")
            return self.refuse(401, "GatedRepo", "You must be authenticated to access it")
        name = "/".join(rest[2:])
        if name not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        return self.send_file(name, files[name])

    def send_file(self, name, body):
        headers = {"ETag": f'"{etag(body)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.command == "GET" and name in self.hub.drop | self.hub.stall:
            self.send(200, {**headers, "Content-Length": str(len(body))}, body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            if name in self.hub.stall:
                self.hub.stall.discard(name)
                self.hub.stalled.set()
                self.hub.release.wait(30)
            self.hub.drop.discard(name)
            return
        if (asked := self.headers.get("Range")) and self.command == "GET":
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or len(body)), len(body) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(body)}"
            return self.answer(body[start : end + 1], headers, 206)
        return self.answer(body, headers)

    def answer(self, body, headers=None, status=200):
        self.send(status, {**(headers or {}), "Content-Length": str(len(body))}, body)

    def refuse(self, status, code, said):
        headers = {"X-Error-Message": said, "X-Error-Code": code} if code else {}
        self.answer(b"", {"X-Error-Message": said, **headers}, status)

    def send(self, status, headers, body):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def etag(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
