"""Stand-in for the Hugging Face Hub on loopback, with the part of its API that huggingface_hub calls, in memory.

It serves the HTTP and LFS paths of huggingface_hub, not Xet storage (set HF_HUB_DISABLE_XET=1).
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

WRITER, READER = "hf_writer", "hf_reader"
LARGE = (".safetensors", ".pt", ".bin")


@dataclass
class Repository:
    """Files at each commit, and the branches."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str = "") -> str:
        """Make files the content of a branch."""
        self.messages.append(message)
        name = hashlib.sha1(f"{branch} {len(self.messages)} {message}".encode()).hexdigest()
        self.commits[name] = dict(files)
        self.branches[branch] = name
        return name

    def at(self, revision: str) -> str | None:
        """Return the commit of a revision."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class Hub:
    """Content of the server, and every request as ``(method, path)``."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.endpoint = ""
        self.broken: int | None = None
        self.storage_is_broken = False

    def add(self, repo: str, files: dict[str, bytes], revision: str = "main") -> Repository:
        """Put files at a revision of a repository."""
        repository = self.repositories.setdefault(repo, Repository())
        if not repository.branches and revision != "main":
            repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        repository.commit(revision, files)
        return repository

    def files(self, repo: str, revision: str) -> dict[str, bytes]:
        """Return the files at a revision."""
        repository = self.repositories[repo]
        return repository.commits[repository.branches[revision]]

    def fetched(self) -> list[str]:
        """Return the names of the files whose content was fetched, in order."""
        paths = [path for method, path in self.requests if method == "GET" and ("/resolve/" in path or "/cdn/" in path)]
        return sorted({Path(path).name for path in paths})


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Log nothing."""

    def _answer(self) -> None:
        self.path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, self.path))
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        try:
            self._route(self.path.strip("/").split("/"), body)
        except _Refusal as refusal:
            self._send(refusal.status, {"error": refusal.text} | refusal.more, {"X-Error-Code": refusal.code})

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _route(self, parts: list[str], body: bytes) -> None:
        if self.hub.broken is not None:
            raise _Refusal(self.hub.broken, "", "this server is broken on purpose")
        if parts[:3] == ["api", "repos", "create"]:
            self._create(json.loads(body))
        elif parts[:2] == ["api", "validate-yaml"]:
            self._send(200, {"errors": [], "warnings": []})
        elif parts[:2] == ["api", "models"]:
            self._api("/".join(parts[2:4]), parts[4:], body)
        elif parts[:2] == ["storage", "put"]:
            self._store(parts[2], body)
        elif parts[:2] == ["storage", "verify"]:
            self._send(200, {})
        elif "info" in parts and parts[-1] == "batch":
            self._batch(json.loads(body))
        elif parts[0] == "cdn":
            self._bytes(self.hub.repositories[f"{parts[1]}/{parts[2]}"].commits[parts[3]]["/".join(parts[4:])], {})
        elif "resolve" in parts:
            self._resolve("/".join(parts[:2]), parts[3:])
        else:
            raise _Refusal(404, "", f"no {self.path} here")

    def _create(self, wanted: dict[str, object]) -> None:
        self._may_write()
        repo = f"{wanted['organization']}/{wanted['name']}"
        if repo in self.hub.repositories:
            raise _Refusal(409, "", "You already created this model repo", url=f"{self.hub.endpoint}/{repo}")
        private = wanted.get("private") is True or wanted.get("visibility") == "private"
        self.hub.add(repo, {".gitattributes": b"*.safetensors filter=lfs\n"}).private = private
        self._send(200, {"url": f"{self.hub.endpoint}/{repo}"})

    def _api(self, repo: str, rest: list[str], body: bytes) -> None:
        repository = self._repository(repo)
        verb, argument = (rest[0], "/".join(rest[1:])) if rest else ("revision", "main")
        if verb == "branch":
            self._may_write()
            if argument in repository.branches:
                raise _Refusal(409, "", "Reference already exists")
            repository.branches[argument] = repository.branches["main"]
            self._send(200, {})
        elif verb == "revision":
            commit = self._commit_of(repository, argument)
            siblings = [{"rfilename": name} for name in repository.commits[commit]]
            known = {"_id": "0", "id": repo, "modelId": repo, "tags": [], "downloads": 0, "likes": 0}
            self._send(200, known | {"sha": commit, "private": repository.private, "siblings": siblings})
        elif verb == "tree":
            files = repository.commits[self._commit_of(repository, argument)]
            self._send(200, [_entry(name, data) for name, data in files.items()])
        elif verb == "preupload":
            self._may_write()
            files = json.loads(body)["files"]
            modes = {file["path"]: "lfs" if file["path"].endswith(LARGE) else "regular" for file in files}
            shown = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            self._send(200, {"files": shown})
        elif verb == "commit":
            self._may_write()
            self._commit(repo, repository, argument, [json.loads(line) for line in body.splitlines()])
        else:
            raise _Refusal(404, "", f"no {self.path} here")

    def _commit(self, repo: str, repository: Repository, revision: str, lines: list[dict[str, dict[str, str]]]) -> None:
        head = self._commit_of(repository, revision)
        files, message = dict(repository.commits[head]), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit", head) != head:
                    raise _Refusal(412, "", "A commit has happened since. Please refresh and try again.")
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        made = repository.commit(revision, files, message)
        self._send(200, {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{made}", "commitOid": made})

    def _batch(self, wanted: dict[str, list[dict[str, object]]]) -> None:
        self._may_write()
        objects = []
        for each in wanted["objects"]:
            actions = {key: {"href": f"{self.hub.endpoint}/storage/{key}/{each['oid']}"} for key in ("put", "verify")}
            objects.append({**each, "actions": {"upload": actions["put"], "verify": actions["verify"]}})
        self._send(200, {"transfer": "basic", "objects": objects})

    def _store(self, name: str, body: bytes) -> None:
        if self.hub.storage_is_broken:
            raise _Refusal(403, "", "this link has expired")
        if hashlib.sha256(body).hexdigest() != name:
            raise _Refusal(400, "", "the bytes are not those of the name")
        self.hub.uploads[name] = body
        self._send(200, {})

    def _resolve(self, repo: str, rest: list[str]) -> None:
        """Serve a file; a large one redirects to another host, as on the Hub."""
        repository = self._repository(repo)
        commit, name = self._commit_of(repository, rest[0]), "/".join(rest[1:])
        data = repository.commits[commit].get(name)
        if data is None:
            raise _Refusal(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        if not name.endswith(LARGE):
            self._bytes(data, headers)
            return
        digest = hashlib.sha256(data).hexdigest()
        headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        # The other host name makes the redirect visible, because a client follows redirects within the Hub by itself.
        elsewhere = self.hub.endpoint.replace("127.0.0.1", "localhost")
        self._send(302, {}, headers | {"Location": f"{elsewhere}/cdn/{repo}/{commit}/{name}"})

    def _repository(self, repo: str) -> Repository:
        repository = self.hub.repositories.get(repo)
        if repository is None or (repository.private and self._token() is None):
            raise _Refusal(404, "RepoNotFound", "Repository not found")
        return repository

    def _commit_of(self, repository: Repository, revision: str) -> str:
        commit = repository.at(revision)
        if commit is None:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _token(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return token if token in (WRITER, READER) else None

    def _may_write(self) -> None:
        if self._token() is None:
            raise _Refusal(401, "", "Invalid username or password.")
        if self._token() != WRITER:
            raise _Refusal(403, "", "You don't have the rights to write to this namespace")

    def _send(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        self._bytes(json.dumps(content).encode(), headers or {}, status)

    def _bytes(self, data: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


class _Refusal(Exception):
    def __init__(self, status: int, code: str, text: str, **more: str) -> None:
        self.status, self.code, self.text, self.more = status, code, text, more


def _entry(name: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if name.endswith(LARGE):
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        entry["lfs"] = lfs
    return entry


def read(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder, for :meth:`Hub.add`."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a server while the context lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def point_at(hub: Hub, home: Path, monkeypatch: object, token: str | None = WRITER) -> None:
    """Make this process use a server as the Hub, with a separate cache and token."""
    for name, value in variables(hub, home, token).items():
        monkeypatch.setenv(name, value)  # type: ignore[attr-defined]
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    changes = {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
        "HF_TOKEN_PATH": str(home / "token"),
    }
    # The functions of the module use this object, made at its import.
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.endpoint)  # type: ignore[attr-defined]
    for name, value in changes.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)  # type: ignore[attr-defined]


def variables(hub: Hub, home: Path, token: str | None = WRITER) -> dict[str, str]:
    """Return the environment in which a process uses a server as the Hub."""
    known = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    return known | {"HF_TOKEN": token or "", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost"}
