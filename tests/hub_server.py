"""A Hugging Face Hub on the loopback interface, made of local folders, for tests with the real client."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import threading
from base64 import b64decode
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import parse_qs, unquote, urlsplit

_WRITE = re.compile(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/([^/]+)")
_BATCH = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")
_OBJECT = re.compile(r"/lfs/([0-9a-f]{64})")
_API = re.compile(r"/api/models/([^/]+(?:/[^/]+)??)(?:/(revision|tree)/([^/]+)(?:/(.*))?)?")
_RESOLVE = re.compile(r"/([^/]+(?:/[^/]+)??)/resolve/([^/]+)/(.+)")
_RANGE = re.compile(r"bytes=(?=.*\d)(\d*)-(\d*)")
_LFS_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"}
_SKIPPED = {".git", ".cache"}


@dataclass
class Request:
    """One request as the server saw it."""

    method: str
    path: str  # as sent: percent-encoded, with the query string
    range: str | None
    authorization: str | None  # such as "Bearer hf_x"
    status: int = 0
    bytes_sent: int = 0  # of the body


class Cut(Exception):
    """Drops a connection."""


@dataclass(eq=False)
class _Refusal(Exception):
    status: int
    code: str
    message: str
    commit: str = ""
    url: str = ""  # of the repository that is there already


@dataclass(frozen=True)
class _File:
    source: Path
    size: int
    oid: str  # git blob id, of the pointer for an LFS file
    sha256: str | None  # None for a file kept in git itself

    def describe(self, oid_key: str, sha256_key: str) -> dict[str, Any]:
        """Size and digests, under the names that differ between the two listings of the Hub."""
        lfs = {"lfs": {sha256_key: self.sha256, "size": self.size, "pointerSize": 134}} if self.sha256 else {}
        return {oid_key: self.oid, "size": self.size, **lfs}


_Files = dict[str, _File]  # by path in the repository


@functools.cache
def _digest(source: Path, size: int, mtime_ns: int) -> tuple[str, str | None]:
    """Git blob id and LFS sha256 of a file; size and time make an edited file a new cache entry."""
    data, sha256 = source.read_bytes(), None
    if size > 10_000_000 or source.suffix in _LFS_SUFFIXES:
        sha256 = hashlib.sha256(data).hexdigest()
        data = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), sha256


def _snapshot(repo: str, folder: Path) -> tuple[str, _Files]:
    """Commit id and files of a folder; a link that leads out of the folder is not a file."""
    root, files = folder.resolve(), {}
    for path in sorted(root.rglob("*")):
        name, source = path.relative_to(root), path.resolve()
        if source.is_file() and source.is_relative_to(root) and not _SKIPPED.intersection(name.parts):
            size, mtime = source.stat().st_size, source.stat().st_mtime_ns
            digest = _digest if size > 1_000_000 else _digest.__wrapped__  # file times are coarse
            files[name.as_posix()] = _File(source, size, *digest(source, size, mtime))
    lines = [repo, *(f"{file.oid} {path}" for path, file in files.items())]
    return hashlib.sha1("\n".join(lines).encode()).hexdigest(), files


def _tree(commit: str, files: _Files, under: str, recursive: bool) -> list[dict[str, Any]]:
    """Entries below a folder of the repository: all of them, or its direct children."""
    prefix = f"{under.rstrip('/')}/" if under else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, file in files.items():
        for parent in map(str, list(PurePosixPath(path).parents)[-2::-1]):
            oid = hashlib.sha1(f"{commit} {parent}".encode()).hexdigest()
            entries[parent] = {"type": "directory", "oid": oid, "size": 0, "path": parent}
        entries[path] = {"type": "file", "path": path, **file.describe("oid", "oid")}
    below = {path.removeprefix(prefix): entry for path, entry in entries.items() if path.startswith(prefix)}
    if prefix and not below:
        raise _Refusal(404, "EntryNotFound", f"{under} does not exist", commit)
    return [entry for path, entry in below.items() if recursive or "/" not in path]


class HubServer:
    """Serves `repos` (repository id -> folder), at revision "main" and at the commit id of its content.

    `revisions` adds branches or tags: {repository id: {revision: folder}}. Folders are read at each request,
    so an edited file makes a new commit. A client needs `token` to see a `private` repository and to download
    from a `gated` one. With `token` given, a client that sends another one is refused everywhere, as on the
    real Hub; without, every token is that of a guest who may see public repositories only.

    `watch` is called before each piece of a file's content is sent: what it waits for throttles the client, and
    `Cut` raised there drops the connection. With `store`, another server's URL, large files are redirected to it.

    `meet` is called with each request before it is answered; `Cut` raised there is no answer.

    With `writes`, a folder, the owner of `token` may make repositories, which are kept below it, and commit to them
    and to the others. `meet` sees these requests too; `Cut` raised there by one that sends a file drops it half-way.

    `spoil` is asked of each request what headers its answer has beside the true ones, or in place of them.

    `piece` is how many bytes of a file's content are sent at a time.

    `limit` is how many bytes of a file's content are sent before the connection is dropped.

    With `lost` what is written is done, and the connection dropped in place of an answer.

    `broken` maps the beginning of a request ("GET /api/models/org/name") to what is answered in place of the truth:
    a status, or a body.
    """

    def __init__(
        self,
        repos: Mapping[str, Path],
        *,
        revisions: Mapping[str, Mapping[str, Path]] | None = None,
        private: Collection[str] = (),
        gated: Collection[str] = (),
        token: str | None = None,
        writes: Path | None = None,
    ) -> None:
        self.folders = {repo: {"main": folder} for repo, folder in repos.items()}
        for repo, folders in (revisions or {}).items():
            self.folders[repo].update(folders)
        self.private, self.gated, self.token = set(private), gated, token
        self.writes, self.objects = writes, dict[str, bytes]()
        self.requests: list[Request] = []
        self.broken: dict[str, int | bytes] = {}
        self.meet: Callable[[Request], None] = lambda request: None
        self.watch: Callable[[Request], None] = lambda request: None
        self.spoil: Callable[[Request], Mapping[str, str]] = lambda request: {}
        self.limit: int | None = None
        self.piece = 65_536
        self.lost = False
        self.store: str | None = None
        self._server = _Server(("127.0.0.1", 0), type("_BoundHandler", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()  # from here on connections are refused

    @property
    def bytes_sent(self) -> int:
        """Body bytes sent since the start or the last `clear()`."""
        return sum(request.bytes_sent for request in self.requests)

    def clear(self) -> None:
        """Forget the requests recorded so far."""
        self.requests.clear()

    def commit(self, repo: str, revision: str = "main") -> str:
        """Commit id that a revision has now."""
        return _snapshot(repo, self.folders[repo][revision])[0]

    def env(self, home: Path, **extra: str) -> dict[str, str]:
        """Environment for a subprocess: this server as the Hub, `home` as HF_HOME, no other Hub setting."""
        dropped = ("HF_", "HUGGING", "TRANSFORMERS_", "XDG_CACHE_HOME")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        hub = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {**kept, **hub, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **extra}

    def create(self, repo: str, *, private: bool) -> None:
        """Make a repository, with the one file that the Hub puts into a new one."""
        assert self.writes is not None
        folder = self.writes / repo
        folder.mkdir(parents=True)
        (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        self.folders[repo] = {"main": folder}
        self.private |= {repo} if private else set()

    def apply(self, repo: str, lines: list[dict[str, Any]]) -> str:
        """Carry out a commit: all of it, or none; its id."""
        head = self.commit(repo)
        if lines[0]["value"].get("parentCommit") not in (None, head):
            raise _Refusal(412, "", "A commit has happened since. Please refresh and try again.")
        folder, written = self.folders[repo]["main"], dict[str, bytes | None]()
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                written[value["path"]] = self.objects[value["oid"]]
            else:
                written[value["path"]] = b64decode(value["content"]) if line["key"] == "file" else None
        for path, data in written.items():
            if data is None:
                (folder / path).unlink()
            else:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(data)
        return self.commit(repo)

    def _open(self, repo: str, revision: str, token: str, *, download: bool) -> tuple[str, _Files]:
        """Commit id and files of a revision; raises the refusal that the Hub would answer with."""
        owner = bool(token) and token == self.token
        if token and self.token and not owner:
            raise _Refusal(401, "", "Invalid credentials in Authorization header")
        if repo in self.private and not token:
            raise _Refusal(401, "RepoNotFound", "Invalid username or password.")
        if repo not in self.folders or (repo in self.private and not owner):
            raise _Refusal(404, "RepoNotFound", "Repository not found")
        if repo in self.gated and download and not owner:
            raise _Refusal(403 if token else 401, "GatedRepo", f"Access to model {repo} is restricted.")
        folders = self.folders[repo]
        for folder in [folders[revision]] if revision in folders else folders.values():
            commit, files = _snapshot(repo, folder)
            if revision in folders or revision == commit:
                return commit, files
        raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")


class _Server(ThreadingHTTPServer):
    request_queue_size = 64  # connections are not kept alive

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent: a client that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""

    def do_GET(self) -> None:
        self.seen = Request(self.command, self.path, self.headers["Range"], self.headers["Authorization"])
        self.hub.requests.append(self.seen)
        self.hub.meet(self.seen)
        for request, answer in self.hub.broken.items():
            if f"{self.command} {self.path}".startswith(request):
                status, body = (answer, b"{}") if isinstance(answer, int) else (200, answer)
                return self._send(status, {"Content-Type": "application/json"}, len(body), BytesIO(body))
        token = (self.seen.authorization or "").removeprefix("Bearer ")
        url = urlsplit(self.path)
        try:
            if url.path == "/api/whoami-v2":
                if not token or (self.hub.token and token != self.hub.token):
                    raise _Refusal(401, "", "Invalid credentials in Authorization header")
                self._send_json({"type": "user", "name": "someone", "orgs": []})
            elif match := _API.fullmatch(url.path):
                repo, kind, revision, path = (unquote(part or "") for part in match.groups())
                commit, files = self.hub._open(repo, revision or "main", token, download=False)
                asked = {name for name, values in parse_qs(url.query).items() if values == ["true"]}
                if kind == "tree":
                    self._send_json(_tree(commit, files, path, "recursive" in asked))
                else:
                    self._send_json(self._info(repo, commit, files, "blobs" in asked))
            elif match := _RESOLVE.fullmatch(url.path):
                repo, revision, path = map(unquote, match.groups())
                commit, files = self.hub._open(repo, revision, token, download=True)
                if path not in files:
                    raise _Refusal(404, "EntryNotFound", "Entry not found", commit)
                self._send_file(files[path], commit)
            else:
                raise _Refusal(404, "", "Page not found")
        except _Refusal as no:
            headers = {"X-Error-Message": no.message, "X-Error-Code": no.code, "X-Repo-Commit": no.commit}
            self._send_json({"error": no.message}, no.status, headers)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """A request that writes."""
        self.seen = Request(self.command, self.path, None, self.headers["Authorization"])
        self.hub.requests.append(self.seen)
        length = int(self.headers["Content-Length"])
        try:
            self.hub.meet(self.seen)
        except Cut:
            self.rfile.read(length // 2)
            raise
        try:
            answer = self._written(urlsplit(self.path).path, self.rfile.read(length))
            if self.hub.lost:
                raise Cut
            self._send_json(answer)
        except _Refusal as no:
            headers = {"X-Error-Message": no.message, "X-Error-Code": no.code}
            self._send_json({"error": no.message, "url": no.url}, no.status, headers)

    do_PUT = do_POST

    def _written(self, path: str, body: bytes) -> dict[str, Any]:
        """The answer to a request that writes, which is done."""
        if match := _OBJECT.fullmatch(path):  # of a store of its own, which is given no token
            if hashlib.sha256(body).hexdigest() != match[1]:
                raise _Refusal(400, "", "Not the object that was announced")
            self.hub.objects[match[1]] = body
            return {}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if self.hub.writes is None or self.seen.authorization != f"Bearer {self.hub.token}":
            raise _Refusal(401, "", "Invalid credentials in Authorization header")
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if repo in self.hub.folders:
                raise _Refusal(409, "", "You already created this model repo", url=f"{self.hub.url}/{repo}")
            self.hub.create(repo, private=bool(asked.get("private") or asked.get("visibility") == "private"))
            return {"url": f"{self.hub.url}/{repo}"}
        if match := _BATCH.fullmatch(path):
            return {"objects": [self._place(found) for found in json.loads(body)["objects"]]}
        match = _WRITE.fullmatch(path)
        if match is None or match[1] not in self.hub.folders:
            raise _Refusal(404, "RepoNotFound", "Repository not found")
        if match[2] == "commit":
            oid = self.hub.apply(match[1], [json.loads(line) for line in body.splitlines()])
            return {"commitUrl": f"{self.hub.url}/{match[1]}/commit/{oid}", "commitOid": oid}
        files = [found["path"] for found in json.loads(body)["files"]]
        modes = {file: "lfs" if PurePosixPath(file).suffix in _LFS_SUFFIXES else "regular" for file in files}
        return {"files": [{"path": file, "uploadMode": mode, "shouldIgnore": False} for file, mode in modes.items()]}

    def _place(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """Where an object is to be sent; nowhere if it is here."""
        here = found["oid"] in self.hub.objects
        upload = {} if here else {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{found['oid']}"}}}
        return {"oid": found["oid"], "size": found["size"]} | upload

    def _info(self, repo: str, commit: str, files: _Files, blobs: bool) -> dict[str, Any]:
        info: dict[str, Any] = {"id": repo, "sha": commit, "lastModified": "2026-01-01T00:00:00.000Z"}
        info |= {"author": repo.split("/")[0]} if "/" in repo else {}
        info |= {"private": repo in self.hub.private, "gated": "auto" if repo in self.hub.gated else False}
        details = [file.describe("blobId", "sha256") if blobs else {} for file in files.values()]
        return info | {"siblings": [{"rfilename": p, **more} for p, more in zip(files, details, strict=True)]}

    def _send_json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self._send(status, {"Content-Type": "application/json", **(headers or {})}, len(body), BytesIO(body))

    def _send_file(self, file: _File, commit: str) -> None:
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.sha256 or file.oid}"', "Accept-Ranges": "bytes"}
        if file.sha256:
            headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(file.size)}
            if self.hub.store:
                headers["Location"] = self.hub.store + self.path
                return self._send(302, headers, 0, BytesIO())
        start, stop, status = 0, file.size, 200
        if self.command == "GET" and (match := _RANGE.fullmatch(self.seen.range or "")):
            first, last = match.groups()
            start = int(first) if first else max(0, file.size - int(last))
            stop = min(file.size, int(last) + 1) if first and last else file.size
            if start >= stop:
                raise _Refusal(416, "", "Range not satisfiable")
            status, headers["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{file.size}"
        with file.source.open("rb") as stream:
            stream.seek(start)
            self._send(status, headers, stop - start, stream, self.hub.watch)

    def _send(
        self,
        status: int,
        headers: Mapping[str, str],
        length: int,
        body: BinaryIO,
        watch: Callable[[Request], None] = lambda request: None,
    ) -> None:
        self.seen.status = status
        self.send_response(status)
        sent = {**headers, "Content-Length": str(length), "Connection": "close", **self.hub.spoil(self.seen)}
        for name, value in sent.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        while self.command != "HEAD" and (data := body.read(min(self.hub.piece, length - self.seen.bytes_sent))):
            watch(self.seen)
            if "/resolve/" in self.path and self.hub.limit is not None:
                data = data[: self.hub.limit - self.seen.bytes_sent]
                if not data:
                    raise Cut
            self.seen.bytes_sent += len(data)  # before the last byte lets the client go on and look here
            self.wfile.write(data)
