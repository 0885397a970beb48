"""The part of the Hub's HTTP surface that publishing a version needs, in memory, on the loopback interface.

Strict where the real one is: tokens, `parentCommit` (412), tags that exist (409), uploaded bytes that do not
have the announced sha256. Faults are injected through `HubServer.faults` and `HubServer.before_commit`.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

WRITE_TOKEN = "hf_write_secret_of_alice"
READ_TOKEN = "hf_read_secret_of_alice"
LFS_FROM_BYTES = 1000
PAGE_SIZE = 2
Files = dict[str, "StoredFile"]


@dataclass
class StoredFile:
    """Bytes and what the server claims about them; the two differ only after `HubServer.corrupt`."""

    content: bytes
    is_lfs: bool

    def __post_init__(self) -> None:
        self.size = len(self.content)
        self.sha256 = hashlib.sha256(self.content).hexdigest()
        self.git_oid = hashlib.sha1(b"blob %d\0" % self.size + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_oid


@dataclass
class Repo:
    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> str | None:
        name = self.branches.get(revision) or self.tags.get(revision) or revision
        return name if name in self.commits else None

    def commit(self, files: Files, summary: str) -> str:
        parent = self.branches.get("main", "")
        listing = json.dumps([[path, file.etag] for path, file in sorted(files.items())])
        oid = hashlib.sha1(f"{parent}{summary}{len(self.commits)}{listing}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches["main"] = oid
        return oid


class RefusalError(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class HubServer:
    """A Hub that lives as long as the `with` block.

    Attributes:
        endpoint: http://127.0.0.1:port
        repos: id -> Repo, to look into.
        requests: "METHOD /path" of every request, in order.
        faults: word in a path, such as "/commit/" -> status to answer with instead of working.
        before_commit: called with the repository just before a commit is checked; may change the repository
            or raise ConnectionAbortedError to cut the line.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: dict[str, int] = {}
        self.before_commit: Callable[[Repo], None] = lambda repo: None
        self.lock = threading.RLock()
        handler = type("BoundHandler", (_Handler,), {"hub": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def head(self, repo_id: str) -> Files:
        repo = self.repos[repo_id]
        return repo.commits[repo.branches["main"]]

    def corrupt(self, repo_id: str, path: str) -> None:
        """Flip one bit of a stored file; the listing goes on to claim the old hash."""
        file = self.head(repo_id)[path]
        file.content = bytes([file.content[0] ^ 1]) + file.content[1:]

    def sent(self, word: str) -> list[str]:
        """The requests whose line contains `word`."""
        return [line for line in self.requests if word in line]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body in one packet: an answer in two waits for the other side's acknowledgement

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def log_message(self, *_arguments: object) -> None:
        pass

    def _serve(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {self.path}")
            try:
                for word, status in self.hub.faults.items():
                    if word in self.path:
                        raise RefusalError(status, f"injected, your header was {self.headers.get('Authorization')}")
                self._route(parts)
            except RefusalError as refusal:
                self._answer({"error": refusal.message}, refusal.status, {"X-Error-Code": refusal.code})
            except ConnectionAbortedError:
                self.close_connection = True

    def _route(self, parts: list[str]) -> None:
        match [self.command, *parts]:
            case ["POST", "api", "repos", "create"]:
                self._create()
            case ["POST", "api", "validate-yaml"]:
                self._answer({"errors": [], "warnings": []})
            case ["GET", "api", "models", owner, name]:
                self._info(f"{owner}/{name}", "main")
            case ["GET", "api", "models", owner, name, "revision", revision]:
                self._info(f"{owner}/{name}", revision)
            case ["GET", "api", "models", owner, name, "refs"]:
                self._refs(f"{owner}/{name}")
            case ["GET", "api", "models", owner, name, "tree", revision]:
                self._tree(f"{owner}/{name}", revision)
            case ["POST", "api", "models", owner, name, "preupload", revision]:
                self._preupload(f"{owner}/{name}", revision)
            case ["POST", "api", "models", owner, name, "commit", branch]:
                self._commit(f"{owner}/{name}", branch)
            case ["POST", "api", "models", owner, name, "tag", revision]:
                self._tag(f"{owner}/{name}", revision)
            case ["POST", owner, name, "info", "lfs", "objects", "batch"]:
                self._lfs_batch(f"{owner}/{name.removesuffix('.git')}")
            case ["PUT", "lfs-upload", sha256]:
                self._lfs_upload(sha256)
            case ["GET" | "HEAD", owner, name, "resolve", revision, *path]:
                self._resolve(f"{owner}/{name}", revision, "/".join(path))
            case _:
                raise RefusalError(404, f"no such route {self.path}")

    # What each route does

    def _create(self) -> None:
        self._require_write()
        wanted = json.loads(self.body)
        repo_id = f"{wanted['organization'] or 'alice'}/{wanted['name']}"
        url = f"{self.hub.endpoint}/{repo_id}"
        if repo_id in self.hub.repos:
            self._answer({"error": "You already created this model repo", "url": url}, 409)
            return
        repo = self.hub.repos[repo_id] = Repo(private=wanted.get("visibility") == "private")
        repo.commit({".gitattributes": StoredFile(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        self._answer({"url": url})

    def _info(self, repo_id: str, revision: str) -> None:
        repo, commit = self._at(repo_id, revision)
        siblings = [{"rfilename": path} for path in repo.commits[commit]]
        self._answer({"id": repo_id, "sha": commit, "private": repo.private, "tags": [], "siblings": siblings})

    def _refs(self, repo_id: str) -> None:
        repo = self._repo(repo_id)
        listed = {
            kind: [{"name": n, "ref": f"refs/{ref}/{n}", "targetCommit": c} for n, c in sorted(names.items())]
            for kind, ref, names in [("branches", "heads", repo.branches), ("tags", "tags", repo.tags)]
        }
        self._answer(listed | {"converts": []})

    def _tree(self, repo_id: str, revision: str) -> None:
        repo, commit = self._at(repo_id, revision)
        files = sorted(repo.commits[commit].items())
        start = int(self.query.get("cursor", ["0"])[0])
        page = [self._listed(path, file) for path, file in files[start : start + PAGE_SIZE]]
        more = start + PAGE_SIZE < len(files)
        base = self.path.split("?")[0]
        following = f"{self.hub.endpoint}{base}?recursive=True&expand=False&cursor={start + PAGE_SIZE}"
        self._answer(page, headers={"Link": f'<{following}>; rel="next"' if more else None})

    def _listed(self, path: str, file: StoredFile) -> dict:
        listed = {"type": "file", "path": path, "size": file.size, "oid": file.git_oid}
        if file.is_lfs:
            listed["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
        return listed

    def _preupload(self, repo_id: str, revision: str) -> None:
        self._require_write()
        repo, commit = self._at(repo_id, revision)
        answers = []
        for wanted in json.loads(self.body)["files"]:
            mode = "lfs" if wanted["size"] >= LFS_FROM_BYTES else "regular"
            answer = {"path": wanted["path"], "uploadMode": mode, "shouldIgnore": False}
            if known := repo.commits[commit].get(wanted["path"]):
                answer["oid"] = known.etag
            answers.append(answer)
        self._answer({"files": answers})

    def _lfs_batch(self, repo_id: str) -> None:
        self._require_write()
        self._repo(repo_id)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.lfs_objects:
                href = f"{self.hub.endpoint}/lfs-upload/{wanted['oid']}"
                answer["actions"] = {"upload": {"href": href, "header": {}}}
            objects.append(answer)
        self._answer({"transfer": "basic", "objects": objects})

    def _lfs_upload(self, sha256: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise RefusalError(400, "the bytes do not have the announced sha256")
        self.hub.lfs_objects[sha256] = self.body
        self._answer({})

    def _commit(self, repo_id: str, branch: str) -> None:
        self._require_write()
        repo, _ = self._at(repo_id, branch)
        self.hub.before_commit(repo)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines.pop(0)["value"]
        if header.get("parentCommit") not in (None, repo.branches[branch]):
            raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[repo.branches[branch]])
        for line in lines:
            self._apply(line["key"], line["value"], files)
        oid = repo.commit(files, header["summary"])
        url = f"{self.hub.endpoint}/{repo_id}/commit/{oid}"
        self._answer({"success": True, "commitOid": oid, "commitUrl": url})

    def _apply(self, key: str, value: dict, files: Files) -> None:
        path = value["path"]
        if key == "file":
            files[path] = StoredFile(base64.b64decode(value["content"]), False)
        elif key == "lfsFile":
            if value["oid"] not in self.hub.lfs_objects:
                raise RefusalError(400, f"LFS object {value['oid']} was not uploaded")
            files[path] = StoredFile(self.hub.lfs_objects[value["oid"]], True)
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise RefusalError(404, "A file with this name doesn't exist", "EntryNotFound")
        else:
            raise RefusalError(400, f"unknown operation {key}")

    def _tag(self, repo_id: str, revision: str) -> None:
        self._require_write()
        repo, commit = self._at(repo_id, revision)
        name = json.loads(self.body)["tag"]
        if name in repo.tags:
            raise RefusalError(409, "Tag reference exists already")
        repo.tags[name] = commit
        self._answer({})

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo, commit = self._at(repo_id, revision)
        file = repo.commits[commit].get(path)
        if file is None:
            raise RefusalError(404, "Entry not found", "EntryNotFound")
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{file.etag}"',
            "Content-Type": "application/octet-stream",
        }
        self._send(200, file.content, headers)

    # Who may do what, and how answers go out

    def _token(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if token not in (None, WRITE_TOKEN, READ_TOKEN):
            raise RefusalError(401, "Invalid credentials in Authorization header")
        return token

    def _require_write(self) -> None:
        token = self._token()
        if token is None:
            raise RefusalError(401, "Invalid username or password.")
        if token != WRITE_TOKEN:
            raise RefusalError(403, "You don't have the rights to write here.")

    def _repo(self, repo_id: str) -> Repo:
        token = self._token()
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and token is None):
            raise RefusalError(404 if token else 401, "Repository not found", "RepoNotFound")
        return repo

    def _at(self, repo_id: str, revision: str) -> tuple[Repo, str]:
        repo = self._repo(repo_id)
        commit = repo.resolve(revision)
        if commit is None:
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, commit

    def _answer(self, body: object, status: int = 200, headers: Mapping[str, str | None] | None = None) -> None:
        self._send(status, json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str | None]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.send_header("X-Request-Id", "test-request")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
