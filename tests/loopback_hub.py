"""A hub on this machine, for tests: the part of the Hub's HTTP interface that up- and downloads of small files use.

Repositories are in memory and every commit is kept. `hub.fault` breaks what comes next:
401, 403, 404 or 500 (that status for everything), "hang" (no answer), "truncate" (half of each file), "gated". With
`hub.token` it answers as to a private repository whoever does not show that token.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class LoopbackHub(ThreadingHTTPServer):
    """Serves while it is a context; `commits` holds (id, {name: bytes}) of each repository, oldest first."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.commits, self.fault, self.token, self.requests = {}, None, None, []
        self.closing = threading.Event()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """A client that went away is no news."""

    def commit(self, repo_id, changes):
        """Adds a commit of `changes` ({name: bytes, or None to delete}) and returns its id."""
        history = self.commits.setdefault(repo_id, [])
        files = {**(history[-1][1] if history else {}), **changes}
        files = {name: content for name, content in files.items() if content is not None}
        sha = hashlib.sha1(f"{repo_id} {len(history)}".encode()).hexdigest()
        history.append((sha, files))
        return sha

    def find(self, repo_id, revision):
        """The commit at `revision`, or None."""
        history = self.commits[repo_id]
        return history[-1] if revision == "main" else next((one for one in history if one[0] == revision), None)


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_GET

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, hub = self.path.split("?")[0], self.server
        hub.requests.append((self.command, path))
        if hub.fault == "hang":
            hub.closing.wait(5)
            self.close_connection = True
        elif hub.fault == "gated":
            self.refuse(403, "GatedRepo")
        elif isinstance(hub.fault, int):
            self.refuse(hub.fault)
        elif hub.token not in (None, self.headers.get("Authorization", "").removeprefix("Bearer ")):
            self.refuse(401, "RepoNotFound")
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo_id = f"{asked['organization']}/{asked['name']}"
            status = 409 if repo_id in hub.commits else 200
            hub.commits.setdefault(repo_id, []) or hub.commit(repo_id, {})
            self.send(status, {"url": f"{hub.url}/{repo_id}", "id": repo_id})
        elif path == "/api/validate-yaml":
            self.send(200, {"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/([^/]+))?", path):
            self.repository(*match.groups(), body)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.file(*match.groups())
        else:
            self.refuse(404)

    def repository(self, repo_id, action, revision, body):
        if repo_id not in self.server.commits:
            return self.refuse(404, "RepoNotFound")
        commit = self.server.find(repo_id, revision or "main")
        if commit is None:
            return self.refuse(404, "RevisionNotFound")
        sha, files = commit
        if action == "preupload":
            asked = json.loads(body)["files"]
            plain = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in asked]
            return self.send(200, {"files": plain})
        if action == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            added = [line["value"] for line in lines if line["key"] == "file"]
            sha = self.server.commit(repo_id, {one["path"]: base64.b64decode(one["content"]) for one in added})
            return self.send(200, {"commitUrl": f"{self.server.url}/{repo_id}/commit/{sha}", "commitOid": sha})
        if action == "tree":
            return self.send(200, [{"type": "file", "path": n, "size": len(c), "oid": sha} for n, c in files.items()])
        self.send(200, {"id": repo_id, "sha": sha, "siblings": [{"rfilename": name} for name in files]})

    def file(self, repo_id, revision, name):
        commit = self.server.find(repo_id, revision) if repo_id in self.server.commits else None
        if commit is None:
            return self.refuse(404, "RevisionNotFound" if repo_id in self.server.commits else "RepoNotFound")
        sha, files = commit
        if name not in files:
            return self.refuse(404, "EntryNotFound", {"X-Repo-Commit": sha})
        content = files[name]
        etag = hashlib.sha256(content).hexdigest()
        begin = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        part = content[int(begin[1]) :] if begin else content
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if begin:
            headers["Content-Range"] = f"bytes {begin[1]}-{len(content) - 1}/{len(content)}"
        self.send(206 if begin else 200, part, headers)

    def refuse(self, status, code=None, headers=None):
        named = {"X-Error-Code": code} if code else {}
        self.send(status, {"error": f"refused with {status}"}, {**named, **(headers or {})})

    def send(self, status, content, headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.fault == "truncate" and isinstance(content, bytes):
            body = body[: len(body) // 2]
            self.close_connection = True
        self.wfile.write(body)
