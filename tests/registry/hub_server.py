"""The part of the Hub's HTTP surface that publishing a version needs, in memory, on the loopback interface.

Strict where the real one is: tokens, `parentCommit` (412), tags that exist (409), uploaded bytes that do not
have the announced sha256, paths, model cards, .gitignore. Faults are injected through the attributes of `HubServer`.
"""

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

sys.path.insert(0, str(Path(__file__).parent))
from hub_model import LFS_FROM_BYTES, Files, Repo, StoredFile

WRITE_TOKEN = "hf_write_secret_of_alice"
READ_TOKEN = "hf_read_secret_of_alice"
PAGE_SIZE = 2
_NAMESPACES = {"alice", "alices-company"}
_TEXT_FIELDS = ("license", "license_name", "license_link", "pipeline_tag", "library_name", "base_model")


class RefusalError(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] = {}) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers


@dataclass
class Fault:
    """What the next request whose "METHOD /path" contains `word` gets instead of being worked on."""

    word: str
    status: int
    headers: Mapping[str, str]


class HubServer:
    """A Hub that lives as long as the `with` block.

    Attributes:
        endpoint: http://127.0.0.1:port
        repos: id -> Repo, to look into.
        requests: "METHOD /path" of every request, in order.
        ranges: what was asked for by Range.
        faults: word in "METHOD /path", such as "/commit/" -> status to answer with, always.
        passing_faults: to answer with once each.
        cut_at: (number, "before" or "after"): the request whose line is cut before, or after, it was worked on.
        cut_body_after_bytes: of the next file that is downloaded, only so much is sent.
        largest_bytes: of a file.
        before_commit: called with repository and branch just before a commit is checked; may change the repository
            or raise ConnectionAbortedError to cut the line.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.faults: dict[str, int] = {}
        self.passing_faults: list[Fault] = []
        self.cut_at: tuple[int, str] | None = None
        self.cut_body_after_bytes: int | None = None
        self.largest_bytes = 1 << 40
        self.before_commit: Callable[[Repo, str], None] = lambda repo, branch: None
        self.collections: dict[str, dict] = {}
        self.lock = threading.RLock()
        handler = type("BoundHandler", (_Handler,), {"hub": self})
        self._http = _Server(("127.0.0.1", 0), handler)
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


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is killed breaks its connection; anything else is a fault of this server, and told."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


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

    def do_PATCH(self) -> None:
        self._serve()

    def do_DELETE(self) -> None:
        self._serve()

    def log_message(self, *_arguments: object) -> None:
        pass

    def _serve(self) -> None:
        num_bytes = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(num_bytes)
        if len(self.body) < num_bytes:
            raise ConnectionAbortedError(f"the client sent {len(self.body)} of {num_bytes} bytes")
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        with self.hub.lock:
            self.is_cut = False
            number, when = self.hub.cut_at or (-1, "")
            is_to_cut = len(self.hub.requests) == number
            self.hub.requests.append(f"{self.command} {self.path}")
            try:
                if is_to_cut and when == "before":
                    raise ConnectionAbortedError
                self.is_cut = is_to_cut
                self._fail_if_told()
                self._route(parts)
            except RefusalError as refusal:
                headers = {"X-Error-Code": refusal.code, **refusal.headers}
                self._answer({"error": refusal.message}, refusal.status, headers)
            except ConnectionAbortedError:
                self.close_connection = True

    def _fail_if_told(self) -> None:
        said = f"injected, your header was {self.headers.get('Authorization')}"
        line = f"{self.command} {self.path}"
        for word, status in self.hub.faults.items():
            if word in line:
                raise RefusalError(status, said)
        for fault in self.hub.passing_faults:
            if fault.word in line:
                self.hub.passing_faults.remove(fault)
                raise RefusalError(fault.status, said, headers=fault.headers)

    def _route(self, parts: list[str]) -> None:
        match [self.command, *parts]:
            case ["POST", "api", "repos", "create"]:
                self._create()
            case ["POST", "api", "validate-yaml"]:
                self._validate_card()
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
            case ["POST", "api", "models", owner, name, "branch", branch]:
                self._make_branch(f"{owner}/{name}", branch)
            case ["DELETE", "api", "models", owner, name, "branch", branch]:
                self._delete_branch(f"{owner}/{name}", branch)
            case ["GET", "api", "models", owner, name, "commits", revision]:
                self._commits(f"{owner}/{name}", revision)
            case ["POST", "api", "collections"]:
                self._make_collection()
            case ["GET", "api", "collections", owner, slug]:
                self._answer(self._collection(f"{owner}/{slug}"))
            case ["POST", "api", "collections", owner, slug, "items"]:
                self._add_item(f"{owner}/{slug}")
            case ["PATCH", "api", "collections", owner, slug, "items", item]:
                self._change_item(f"{owner}/{slug}", item)
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
        if (wanted["organization"] or "alice") not in _NAMESPACES:
            raise RefusalError(403, "You don't have the rights to create a model under this namespace")
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
            answer = {
                "path": wanted["path"],
                "uploadMode": mode,
                "shouldIgnore": repo.ignores(commit, wanted["path"]),
            }
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
            if wanted["size"] > self.hub.largest_bytes:
                raise RefusalError(413, "Payload too large")
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
        repo = self._repo(repo_id)
        self.hub.before_commit(repo, branch)
        if branch not in repo.branches:
            raise RefusalError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines.pop(0)["value"]
        head, parent = repo.branches[branch], header.get("parentCommit")
        if parent is not None and not (re.fullmatch("[0-9a-f]{5,40}", parent) and head.startswith(parent)):
            raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[head])
        for line in lines:
            self._apply(line["key"], line["value"], files)
        oid = repo.commit(files, header["summary"], branch)
        url = f"{self.hub.endpoint}/{repo_id}/commit/{oid}"
        self._answer({"success": True, "commitOid": oid, "commitUrl": url})

    def _apply(self, key: str, value: dict, files: Files) -> None:
        path = value["path"]
        if any(part in ("", ".", "..") for part in path.split("/")) or "\0" in path:
            raise RefusalError(400, f"invalid path {path!r}")
        if key == "file":
            content = base64.b64decode(value["content"])
            if len(content) >= LFS_FROM_BYTES:
                raise RefusalError(400, f"{path} is too large to be sent inline")
            files[path] = StoredFile(content, False)
        elif key == "lfsFile":
            if value["oid"] not in self.hub.lfs_objects:
                raise RefusalError(400, f"LFS object {value['oid']} was not uploaded")
            if value["size"] != len(self.hub.lfs_objects[value["oid"]]):
                raise RefusalError(400, f"LFS object {value['oid']} has another size")
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

    def _make_branch(self, repo_id: str, branch: str) -> None:
        self._require_write()
        repo, commit = self._at(repo_id, json.loads(self.body or b"{}").get("startingPoint", "main"))
        if branch in repo.branches:
            raise RefusalError(409, "Reference already exists")
        repo.branches[branch] = commit
        self._answer({})

    def _delete_branch(self, repo_id: str, branch: str) -> None:
        self._require_write()
        if branch == "main":
            raise RefusalError(403, "main cannot be deleted")
        if self._repo(repo_id).branches.pop(branch, None) is None:
            raise RefusalError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        self._answer({})

    def _commits(self, repo_id: str, revision: str) -> None:
        repo, commit = self._at(repo_id, revision)
        self._answer(
            [
                {
                    "id": oid,
                    "title": repo.titles[oid],
                    "message": "",
                    "date": "2026-11-22T01:00:00.000Z",
                    "authors": [{"user": "alice"}],
                }
                for oid in repo.history(commit)
            ]
        )

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo, commit = self._at(repo_id, revision)
        file = repo.commits[commit].get(path)
        if file is None:
            raise RefusalError(404, "Entry not found", "EntryNotFound")
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{file.etag}"',
            "Content-Type": "application/octet-stream",
            "Accept-Ranges": "bytes",
        }
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(asked[1]) if asked else 0
        if start and start >= len(file.content):
            raise RefusalError(416, "Range not satisfiable")
        if start:
            self.hub.ranges.append(self.headers["Range"])
            headers["Content-Range"] = f"bytes {start}-{len(file.content) - 1}/{len(file.content)}"
        self._send(206 if start else 200, file.content[start:], headers)

    def _validate_card(self) -> None:
        header = json.loads(self.body)["content"].split("---")[1:2]
        try:
            fields = yaml.safe_load(header[0]) if header else {}
        except yaml.YAMLError as error:
            fields = {"error": str(error)}
        wrong = [f'"{key}" must be a string' for key in _TEXT_FIELDS if not isinstance(fields.get(key, ""), str)]
        wrong += [
            f'"{key}" must be a list' for key in ("datasets", "tags") if not isinstance(fields.get(key, []), list)
        ]
        if fields.get("base_model_relation", "quantized") not in ("adapter", "merge", "quantized", "finetune"):
            wrong.append('"base_model_relation" is unknown')
        wrong += [fields["error"]] if "error" in fields else []
        errors = [{"message": message} for message in wrong]
        self._answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    # Collections

    def _make_collection(self) -> None:
        self._require_write()
        wanted = json.loads(self.body)
        if wanted["namespace"] not in _NAMESPACES:
            raise RefusalError(403, "You don't have the rights to create a collection under this namespace")
        for slug, collection in self.hub.collections.items():
            if (collection["owner"]["name"], collection["title"]) == (wanted["namespace"], wanted["title"]):
                self._answer({"error": "You already created this collection", "slug": slug}, 409)
                return
        number = len(self.hub.collections)
        slug = f"{wanted['namespace']}/{re.sub('[^a-z0-9]+', '-', wanted['title'].lower())}-{number:024x}"
        self.hub.collections[slug] = {
            "slug": slug,
            "title": wanted["title"],
            "owner": {"name": wanted["namespace"]},
            "items": [],
            "lastUpdated": "2026-11-22T01:00:00.000Z",
            "private": wanted["private"],
            "theme": "orange",
            "upvotes": 0,
            "position": 0,
        }
        self._answer(self.hub.collections[slug])

    def _collection(self, slug: str) -> dict:
        self._token()
        if slug not in self.hub.collections:
            raise RefusalError(404, "Collection not found")
        return self.hub.collections[slug]

    def _add_item(self, slug: str) -> None:
        self._require_write()
        collection, wanted = self._collection(slug), json.loads(self.body)
        if wanted["item"]["id"] in [item["id"] for item in collection["items"]]:
            raise RefusalError(409, "This item is already in the collection")
        if len(wanted.get("note", "")) > 500:
            raise RefusalError(400, "note is too long")
        item = {
            "_id": f"{len(collection['items']):024x}",
            "id": wanted["item"]["id"],
            "type": wanted["item"]["type"],
            "position": len(collection["items"]),
            "note": {"text": wanted["note"]} if "note" in wanted else None,
        }
        collection["items"].append(item)
        self._answer(collection)

    def _change_item(self, slug: str, item_id: str) -> None:
        self._require_write()
        item = next((item for item in self._collection(slug)["items"] if item["_id"] == item_id), None)
        if item is None:
            raise RefusalError(404, "Item not found")
        item["note"] = {"text": json.loads(self.body)["note"]}
        self._answer({})

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
        if self.is_cut:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.send_header("X-Request-Id", "test-request")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET" and "/resolve/" in self.path and self.hub.cut_body_after_bytes is not None:
            body, self.hub.cut_body_after_bytes = body[: self.hub.cut_body_after_bytes], None
            self.close_connection = True
        if self.command != "HEAD":
            self.wfile.write(body)
