"""A small Hugging Face Hub on the loopback interface: the part of its HTTP protocol that pushing and loading use.

The name of a repository with a data set begins with `datasets/`.

It answers as huggingface.co does, status codes and error headers included, and keeps everything in memory. Weights and
pictures go through git LFS, in several parts if they are larger than `PART`. Xet is not supported (set
HF_HUB_DISABLE_XET=1).
"""

import base64
import contextlib
import hashlib
import http.server
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import ceil
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".onnx", ".onnx.data", ".png")
WRITER, READER = "hf_" + "W" * 34, "hf_" + "R" * 34  # tokens
PART = 16_384  # bytes; the parts of the real Hub are several megabytes


@dataclass
class Entry:
    """A file of a commit; a file in LFS is a reference to an object."""

    content: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        if self.is_lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repository:
    """Commits from the first to the last, and the branches that point to them."""

    private: bool = False
    commits: dict[str, dict[str, Entry]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, message: str, files: dict[str, Entry]) -> str:
        content = [(path, entry.oid) for path, entry in sorted(files.items())]
        oid = hashlib.sha1(f"{content} {len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return {path: entry.content for path, entry in self.commits[self.branches[branch]].items()}


@dataclass
class Account:
    """The user of a token and its permission in the user's namespace and organisations: `read` or `write`."""

    name: str
    role: str = "write"
    organisations: tuple[str, ...] = ()

    def may_write(self, namespace: str) -> bool:
        return self.role == "write" and namespace in (self.name, *self.organisations)


class HubError(Exception):
    """An HTTP answer that reports an error."""

    def __init__(self, status: int, message: str, code: str | None = None):
        self.status, self.message, self.code = status, message, code


class Hub:
    """The state of the server.

    Attributes:
        accounts: Accounts by token.
        repositories: Repositories by full name.
        objects: LFS objects by SHA-256.
        stored: SHA-256 of each LFS object, in the order in which the uploads finished.
        requests: Method and path of each request.
        disturb: Called before each request. If it raises a `HubError`, the server sends that as the answer; if it
            raises a `ConnectionError`, the server drops the connection after it has read the request.
    """

    def __init__(self):
        self.accounts: dict[str, Account] = {}
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.stored: list[str] = []
        self.requests: list[tuple[str, str]] = []
        self.disturb: Callable[[str, str], None] = lambda method, path: None
        self.url = ""
        self.parts: dict[tuple[str, int], bytes] = {}
        self.lock = threading.Lock()

    # ---- Permissions ----

    def account(self, token: str | None) -> Account:
        if token not in self.accounts:
            raise HubError(401, "Invalid username or password.")
        return self.accounts[token]

    def repository(self, token: str | None, name: str, write: bool = False) -> Repository:
        account, repository = self.accounts.get(token), self.repositories.get(name)
        writer = account is not None and account.may_write(name.split("/")[-2])
        if token is not None and account is None:
            raise HubError(401, "Invalid username or password.")
        if repository is None or (repository.private and not writer):
            raise HubError(404 if account else 401, "Repository not found", "RepoNotFound")
        if write and not writer:
            raise HubError(403, "Forbidden: you must have write access to the repository")
        return repository

    # ---- The API ----

    def whoami(self, token, body, query):
        account = self.account(token)
        organisations = [{"name": name, "type": "org"} for name in account.organisations]
        access = {"accessToken": {"displayName": "test", "role": account.role}}
        return {"type": "user", "name": account.name, "orgs": organisations, "auth": access}

    def create(self, token, body, query):
        account = self.account(token)
        asked = json.loads(body)
        namespace = asked["organization"] or account.name
        name = f"{namespace}/{asked['name']}"
        answer = {"url": f"{self.url}/{name}", "name": name}
        if not account.may_write(namespace):
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", **answer}
        repository = self.repositories[name] = Repository(private=asked.get("visibility") == "private")
        repository.commit("main", "initial commit", {".gitattributes": Entry(b"*.safetensors filter=lfs\n", False)})
        return answer

    def validate_yaml(self, token, body, query):
        return {"errors": [], "warnings": []}

    def auth_check(self, token, body, query, name, write):
        self.repository(token, name, write=write is not None)
        return {}

    def branch(self, token, body, query, name, branch):
        repository = self.repository(token, name, write=True)
        if branch in repository.branches:
            raise HubError(409, f"Reference refs/heads/{branch} already exists")
        repository.branches[branch] = repository.branches["main"]
        return {}

    def refs(self, token, body, query, name):
        repository = self.repository(token, name)
        branches = [
            {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": commit}
            for branch, commit in repository.branches.items()
        ]
        return {"branches": branches, "tags": [], "converts": []}

    def info(self, token, body, query, name, revision):
        repository = self.repository(token, name)
        commit, files = self.revision(repository, revision or "main")
        siblings = [{"rfilename": path} for path in files]
        return {"_id": name, "id": name, "sha": commit, "private": repository.private, "siblings": siblings, "tags": []}

    def tree(self, token, body, query, name, revision, folder):
        _, files = self.revision(self.repository(token, name), revision)
        prefix = f"{folder}/" if folder else ""
        entries = []
        for path, entry in files.items():
            if path.startswith(prefix) and ("recursive" in query or "/" not in path[len(prefix) :]):
                lfs = {"oid": entry.oid, "size": len(entry.content), "pointerSize": 130}
                entries.append(
                    {"type": "file", "path": path, "oid": entry.oid, "size": len(entry.content)}
                    | ({"lfs": lfs} if entry.is_lfs else {})
                )
        if folder and not entries:
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return entries

    def paths_info(self, token, body, query, name, revision):
        asked = parse_qs(body.decode())["paths"]
        return [
            entry for entry in self.tree(token, body, {"recursive": []}, name, revision, "") if entry["path"] in asked
        ]

    def preupload(self, token, body, query, name, revision):
        _, files = self.revision(self.repository(token, name, write=True), revision)
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                    "shouldIgnore": False,
                    "oid": files[file["path"]].oid if file["path"] in files else None,
                }
                for file in json.loads(body)["files"]
            ]
        }

    def commit(self, token, body, query, name, revision):
        repository = self.repository(token, name, write=True)
        _, files = self.revision(repository, revision)
        files, message = dict(files), ""
        for line in body.decode().splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                message = value["summary"]
            elif operation["key"] == "file":
                files[value["path"]] = Entry(base64.b64decode(value["content"]), False)
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    raise HubError(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = Entry(self.objects[value["oid"]], True)
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        oid = repository.commit(revision, message, files)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}", "hookOutput": ""}

    # ---- Git LFS ----

    def lfs_batch(self, token, body, query, name):
        self.repository(token, name, write=True)
        return {"transfer": "basic", "objects": [self.lfs_object(**asked) for asked in json.loads(body)["objects"]]}

    def lfs_object(self, oid: str, size: int) -> dict:
        answer = {"oid": oid, "size": size}
        if oid in self.objects:
            return answer
        upload = {"href": f"{self.url}/lfs/{oid}"}
        if size > PART:
            parts = range(1, ceil(size / PART) + 1)
            urls = {str(number): f"{self.url}/lfs/{oid}/{number}" for number in parts}
            upload = {"href": f"{self.url}/lfs/{oid}/complete", "header": {"chunk_size": str(PART), **urls}}
        return answer | {"actions": {"upload": upload, "verify": {"href": f"{self.url}/lfs/verify"}}}

    def lfs_put(self, token, body, query, oid, part):
        if part is None:
            self.store(oid, body)
        else:
            self.parts[oid, int(part)] = body
        return {}

    def lfs_complete(self, token, body, query, oid):
        numbers = [part["partNumber"] for part in json.loads(body)["parts"]]
        self.store(oid, b"".join(self.parts[oid, number] for number in numbers))
        return {}

    def lfs_verify(self, token, body, query):
        asked = json.loads(body)
        if len(self.objects.get(asked["oid"], b"")) != asked["size"]:
            raise HubError(404, "The object does not exist")
        return {}

    def store(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, "XAmzContentSHA256Mismatch")
        self.objects[oid] = content
        self.stored.append(oid)

    # ---- Files ----

    def revision(self, repository: Repository, revision: str) -> tuple[str, dict[str, Entry]]:
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, repository.commits[commit]

    def resolve(self, token, body, query, name, revision, path):
        commit, files = self.revision(self.repository(token, name), revision)
        if path not in files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        entry = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{entry.oid}"', "Accept-Ranges": "bytes"}
        if entry.is_lfs:
            headers |= {"X-Linked-ETag": f'"{entry.oid}"', "X-Linked-Size": str(len(entry.content))}
        return 200, entry.content, headers


_NAME = r"/api/(?:models/|(?=datasets/))((?:datasets/)?[^/]+/[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", Hub.whoami),
    ("POST", r"/api/repos/create", Hub.create),
    ("POST", r"/api/validate-yaml", Hub.validate_yaml),
    ("GET", _NAME + r"/auth-check(/write)?", Hub.auth_check),
    ("POST", _NAME + r"/branch/(.+)", Hub.branch),
    ("GET", _NAME + r"/refs", Hub.refs),
    ("GET", _NAME + r"(?:/revision/(.+))?", Hub.info),
    ("GET", _NAME + r"/tree/([^/]+)(?:/(.*))?", Hub.tree),
    ("POST", _NAME + r"/paths-info/(.+)", Hub.paths_info),
    ("POST", _NAME + r"/preupload/(.+)", Hub.preupload),
    ("POST", _NAME + r"/commit/(.+)", Hub.commit),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", Hub.lfs_batch),
    ("POST", r"/lfs/verify", Hub.lfs_verify),
    ("POST", r"/lfs/(\w+)/complete", Hub.lfs_complete),
    ("PUT", r"/lfs/(\w+)(?:/(\d+))?", Hub.lfs_put),
    ("GET", r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", Hub.resolve),
]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def do_GET(self):
        url, body = urlsplit(self.path), self._body()
        path = unquote(url.path)
        self.hub.requests.append((self.command, path))
        try:
            self.hub.disturb(self.command, path)
            with self.hub.lock:
                answer = self._answer(path, body, parse_qs(url.query))
        except ConnectionError:
            self.close_connection = True
            return
        except HubError as error:
            headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
            answer = error.status, {"error": error.message}, headers
        self._send(*answer)

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self, path: str, body: bytes, query: dict) -> tuple:
        method = "GET" if self.command == "HEAD" else self.command
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        for wanted, pattern, function in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and wanted == method:
                answer = function(self.hub, token, body, query, *match.groups())
                return answer if isinstance(answer, tuple) else (200, answer)
        raise HubError(404, "Sorry, we can't find the page you are looking for.")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, status: int, content, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"ETag": '"part"', "Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    """Serves a new, empty Hub in threads of this process."""
    hub = Hub()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.hub = hub
        hub.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()


def once(condition: Callable[[str, str], bool], error: Exception) -> Callable[[str, str], None]:
    """A `disturb` function that affects only the first request that fulfils a condition."""
    calls = itertools.count()

    def disturb(method: str, path: str) -> None:
        if condition(method, path) and next(calls) == 0:
            raise error

    return disturb
