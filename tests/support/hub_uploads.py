"""A stand-in for the hub on 127.0.0.1 as far as huggingface_hub's uploads need it, and its user."""

import base64
import hashlib
import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from support.hub_server import serve
from support.hub_user import environ_of

REPO = "me/tuned"
WRITER, READER = "hf_writer", "hf_reader"


@dataclass
class Hub:
    """What the hub's upload endpoints have taken in; `large` are LFS objects by their sha256."""

    repos: dict[str, dict[str, Any]] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    commits: list[dict[str, Any]] = field(default_factory=list)
    broken: str = ""  # the part of a path that answers 500
    url: str = ""


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format, *args):
        pass

    def answer(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        if status >= 400:
            self.send_header("X-Error-Message", str(value.get("error")))
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self):
        self.do_POST()

    def do_GET(self):
        self.do_POST()

    def do_POST(self):
        hub, path = self.hub, unquote(urlsplit(self.path).path).strip("/")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.log.append(f"{self.command} {path}")
        if hub.broken and hub.broken in path:
            return self.answer(501, {"error": "broken"})
        if path.startswith("large/"):  # storage elsewhere: its address is its own permission
            digest = path.removeprefix("large/")
            assert hashlib.sha256(body).hexdigest() == digest
            hub.large[digest] = body
            return self.answer(200, {})
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in (WRITER, READER):
            return self.answer(401, {"error": "Invalid credentials in Authorization header"})
        if path == "api/validate-yaml":
            header = json.loads(body)["content"].split("---")[1]
            wrong = not isinstance(yaml.safe_load(header), dict)
            said = {"errors": [{"message": "no mapping"}] if wrong else [], "warnings": []}
            return self.answer(400 if wrong else 200, said)
        if path == "api/repos/create":
            return self.create(json.loads(body), token)
        match = re.fullmatch(r"(?:api/models/)?([\w.-]+/[\w.-]+?)(?:\.git/(.*)|/(.*))?", path)
        repo, rest = (match[1], match[2] or match[3] or "") if match else ("", "")
        if repo not in hub.repos:
            return self.answer(404, {"error": "Repository not found"})
        if self.command == "GET":
            private = hub.repos[repo]["private"]
            return self.answer(200, {"id": repo, "private": private, "sha": "a" * 40})
        if token != WRITER:
            return self.answer(403, {"error": "You don't have the required permissions"})
        return self.write(repo, rest, body)

    def create(self, asked: dict[str, Any], token: str) -> None:
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        value = {"url": f"{self.hub.url}/{repo}", "error": "You already created this model repo"}
        if token != WRITER or not repo.startswith("me/"):
            return self.answer(403, {"error": "You don't have the rights to create a model"})
        if repo in self.hub.repos:
            return self.answer(409, value)
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repos[repo] = {"private": private, "branches": {"main": {}}}
        return self.answer(200, value)

    def write(self, repo: str, rest: str, body: bytes) -> None:
        branches = self.hub.repos[repo]["branches"]
        if rest.startswith("branch/"):
            if (name := rest.removeprefix("branch/")) in branches:
                return self.answer(409, {"error": "exists"})
            branches[name] = {}
            return self.answer(201, {})
        if rest.startswith("preupload/"):
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": modes})
        if rest == "info/lfs/objects/batch":
            objects = []
            for entry in json.loads(body)["objects"]:
                href = f"{self.hub.url}/large/{entry['oid']}"
                new = {"actions": {"upload": {"href": href}}}
                objects.append(entry | ({} if entry["oid"] in self.hub.large else new))
            return self.answer(200, {"transfer": "basic", "objects": objects})
        assert rest.startswith("commit/"), rest
        files = branches.get(rest.removeprefix("commit/"))
        if files is None:
            return self.answer(404, {"error": "Invalid rev id"})
        header, *operations = [json.loads(line) for line in body.splitlines()]
        self.hub.commits.append(header["value"])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            else:
                assert operation["key"] == "file", operation
                files[value["path"]] = base64.b64decode(value["content"])
        url = f"{self.hub.url}/{repo}/commit/{'b' * 40}"
        return self.answer(200, {"commitUrl": url, "commitOid": "b" * 40})


@pytest.fixture
def hub():
    hub = Hub()
    server = serve(hub, Answers)
    yield hub
    server.shutdown()
    server.server_close()


# Pushes in a process of its own, because huggingface_hub reads its environment on import.
CHILD = """
import dataclasses, json, sys
from mlx_qlora.adapters.push import push_to_hub
from mlx_qlora.errors import UserError
folder, repo, how = json.loads(sys.argv[1])
try:
    pushed = push_to_hub(folder, repo, **how)
except UserError as error:
    print("\\nERROR " + json.dumps([type(error).__name__, str(error)]))
else:
    print("\\nPUSHED " + json.dumps(dataclasses.asdict(pushed)))
"""


class Away:
    """A user's machine: a home, an environment, and calls of `push_to_hub` on it."""

    def __init__(self, home: Path, hub: Hub) -> None:
        self.home, self.hub = home, hub

    def call(self, folder: Path, repo: str, how: dict[str, Any], environ: dict[str, str]) -> Any:
        kept = environ_of(self.home, self.hub.url, **({"HF_TOKEN": WRITER} | environ))
        asked = json.dumps([str(folder), repo, how])
        child = subprocess.run(
            # The client's own PUT warns of how it calls httpx.
            [sys.executable, "-W", "error", "-W", "ignore:Use 'content", "-c", CHILD, asked],
            env={name: value for name, value in kept.items() if value},
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=50,
        )
        found = re.search(r"^(PUSHED|ERROR) (.*)$", child.stdout, re.MULTILINE)
        assert found, child.stderr
        return found[1], json.loads(found[2])

    def push(self, folder: Path, repo: str = REPO, **how: Any) -> dict[str, Any]:
        kind, pushed = self.call(folder, repo, how, {})
        assert kind == "PUSHED", pushed
        return pushed

    def refused(self, folder: Path, repo: str = REPO, environ: Any = None, **how: Any) -> str:
        kind, (name, message) = self.call(folder, repo, how, environ or {})
        assert kind == "ERROR" and name in ("SourceError", "ConfigError")
        return message


@pytest.fixture
def away(tmp_path, hub):
    (tmp_path / "home").mkdir()
    return Away(tmp_path / "home", hub)
