"""The part of the Hugging Face Hub's HTTP API that uploads and downloads of models use, served from this machine.

Every file is taken as a regular one, so that neither LFS nor xet is needed.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_dummy"
ACCOUNT = "someone"


class FakeHub:
    """A Hub with one account, whose token is `TOKEN`; usable as a context.

    Attributes:
        repositories: files by repository and path; what goes into pull requests is under "owner/name@refs/pr/1".
        created: what each repository was asked to be, by its id.
        commits: the messages, in order.
        failing: a status to answer with, by the beginning of the address ("/api/repos/create": 500).
        paths: every address that was asked for, with its method, in order.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.created: dict[str, dict] = {}
        self.commits: list[str] = []
        self.failing: dict[str, int] = {}
        self.paths: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Environment variables for a process whose Hub this is; read when huggingface_hub is first imported."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
            "NO_PROXY": "127.0.0.1",
        }

    def sha(self, repo_id: str) -> str:
        """The id of the latest commit."""
        digest = hashlib.sha1(repo_id.encode())
        for path, content in sorted(self.repositories[repo_id].items()):
            digest.update(path.encode() + content)
        return digest.hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.hub.paths.append(f"{self.command} {self.path}")
        address = urlsplit(self.path)
        path = unquote(address.path)
        for begin, status in self.hub.failing.items():
            if path.startswith(begin):
                return self._json({"error": "the Hub has the hiccups"}, status)
        writes = self.command == "POST" or path == "/api/whoami-v2"
        if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "Invalid username or password."}, 401)
        if path == "/api/whoami-v2":
            return self._json({"type": "user", "name": ACCOUNT, "orgs": [], "auth": {"type": "access_token"}})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(\w+)(?:/(.+))?)?", path):
            return self._model(*match.groups(), pull_request="create_pr=1" in address.query, body=body)
        if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            return self._file(match[1], match[3])
        return self._json({"error": f"no such address: {path}"}, 404)

    def _create(self, wanted: dict) -> None:
        repo_id = f"{wanted.get('organization') or ACCOUNT}/{wanted['name']}"
        if repo_id in self.hub.repositories:
            return self._json({"error": "it exists", "url": f"{self.hub.url}/{repo_id}"}, 409)
        self.hub.repositories[repo_id], self.hub.created[repo_id] = {}, wanted
        return self._json({"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id})

    def _validate(self, card: str) -> None:
        data = yaml.safe_load(card.split("---\n")[1])
        wrong = [name for name in ("library_name", "pipeline_tag") if not isinstance(data.get(name), str)]
        base = data.get("base_model")
        if base is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
            wrong.append("base_model")
        errors = [{"message": f"{name} is wrong"} for name in wrong]
        return self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _model(self, repo_id: str, action: str | None, rest: str | None, pull_request: bool, body: bytes) -> None:
        if repo_id not in self.hub.repositories:
            return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        files = self.hub.repositories[repo_id]
        if action == "preupload":
            modes = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._json({"files": modes})
        if action == "commit":
            target = f"{repo_id}@refs/pr/1" if pull_request else repo_id
            files = self.hub.repositories.setdefault(target, {})
            for entry in (json.loads(line) for line in body.splitlines()):
                value = entry["value"]
                if entry["key"] == "header":
                    self.hub.commits.append(value["summary"])
                else:
                    assert (entry["key"], value["encoding"]) == ("file", "base64"), entry["key"]
                    files[value["path"]] = base64.b64decode(value["content"])
            answer = {"commitUrl": f"{self.hub.url}/{repo_id}/commit/1", "commitOid": self.hub.sha(target)}
            if pull_request:
                answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/1"
            return self._json(answer)
        if action == "tree":
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
            return self._json(entries)
        return self._json(
            {
                **{"id": repo_id, "modelId": repo_id, "sha": self.hub.sha(repo_id), "private": False},
                **{"tags": [], "downloads": 0, "likes": 0, "siblings": [{"rfilename": name} for name in files]},
            }
        )

    def _file(self, repo_id: str, name: str) -> None:
        content = self.hub.repositories.get(repo_id, {}).get(name)
        if content is None:
            code = "EntryNotFound" if repo_id in self.hub.repositories else "RepoNotFound"
            return self._json({"error": code}, 404, {"X-Error-Code": code})
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": self.hub.sha(repo_id)}
        return self._answer(content, 200, {"Content-Type": "application/octet-stream", **headers})

    def _json(self, answer: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._answer(json.dumps(answer).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _answer(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
