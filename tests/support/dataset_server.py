"""A stand-in for the hub's data sets on 127.0.0.1, as far as `datasets.load_dataset` needs them.

`repos` become data sets: their files, with README.md, where the hub keeps configs and splits.
"""

import json
from http.server import ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from support.hub_server import COMMIT, Hub, _Answers, etag, serve


class DatasetHub(Hub):
    def start(self) -> ThreadingHTTPServer:
        return serve(self, _DatasetAnswers)


class _DatasetAnswers(_Answers):
    def do_GET(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        self.hub.log.append((self.command, "/".join(parts), self.headers.get("Range")))
        api = parts[:2] == ["api", "datasets"]
        owner, name, kind, revision, *rest = [*parts[2 if api else 1 :], "", "", "", ""]
        files, path = self.hub.repos.get(f"{owner}/{name}"), "/".join(filter(None, rest))
        if "datasets" not in parts[:2] or files is None:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        if revision not in ("", "main", COMMIT):
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if not api:
            if path in files:
                return self.send_file(path, files[path])
            return self.refuse(404, "EntryNotFound", "Entry not found")
        if kind == "tree":
            folders = {name.rpartition("/")[0] for name in files} - {""}
            rows = [{"type": "directory", "path": folder, "oid": ""} for folder in folders]
            rows += [
                {"type": "file", "path": name, "size": len(body), "oid": etag(body)}
                for name, body in files.items()
            ]
            rows = [row for row in rows if not path or row["path"].startswith(f"{path}/")]
            if not rows:
                return self.refuse(404, "EntryNotFound", f"{path} does not exist")
            return self.answer(json.dumps(rows).encode())
        about = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": [], "tags": []}
        return self.answer(json.dumps(about).encode())
