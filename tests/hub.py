"""A Hub on the loopback: repositories with commits, branches, tags, pull requests, tokens, private and gated access.

It speaks as much of the Hub's HTTP interface as huggingface_hub needs. Everything is in memory.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


ALICE, BOB = "hf_aliceWritesEverything", "hf_bobReadsNothingPrivate"
READER, FINE = "hf_aliceReadsAndNeverWrites", "hf_aliceWritesHerOwnOnly"  # two more tokens of alice
ORG = "hf_orgWritesAsTheDocsSay"
USERS = {ALICE: "alice", BOB: "bob", READER: "alice", FINE: "alice", ORG: "org"}
SCOPES = [
    {"entity": {"_id": "1", "type": "user", "name": "alice"}, "permissions": ["repo.content.read", "repo.write"]},
    {"entity": {"_id": "2", "type": "org", "name": "team"}, "permissions": ["repo.content.read"]},
]
ACCESS = {  # what the Hub says of a token
    ALICE: {"displayName": "laptop", "role": "write"},
    BOB: {"displayName": "laptop", "role": "write"},
    ORG: {"displayName": "docs", "role": "write"},
    READER: {"displayName": "reader", "role": "read"},
    FINE: {
        "displayName": "fine",
        "role": "fineGrained",
        "expiration": "2027-01-31T00:00:00.000Z",
        "fineGrained": {"canReadGatedRepos": True, "global": ["discussion.write"], "scoped": SCOPES},
    },
}
_REPO = r"/(?:api/models/)?(?P<repo>[^/]+/[^/]+)"
_CARD_VALUES = {  # what the Hub accepts in a model card
    "base_model": r"[\w.-]+(/[\w.-]+)?",
    "datasets": r"[\w.-]+(/[\w.-]+)?",
    "license": r"[a-z0-9.-]+",
}


@dataclass
class Repo:
    """One repository.

    Attributes:
        owner (`str`): who may write, and read when it is private or gated.
        commits (`dict[str, dict[str, bytes]]`): commit -> path -> content.
        refs (`dict[str, str]`): branch, tag or `refs/pr/1` -> commit.
    """

    owner: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: set[str] = field(default_factory=set)
    messages: list[str] = field(default_factory=list)

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)

    def commit(self, files: dict[str, bytes], ref: str, message: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {message} {sorted(files)}".encode()).hexdigest()
        self.commits[oid] = files
        self.refs[ref] = oid
        self.messages.append(message)
        return oid


class Hub:
    """The server and what it holds.

    Attributes:
        requests (`list[tuple[str, str]]`): method and path of every request.
        cut (`int`): how many of the next downloads of a file break off,
        sent (`float`): after which share of it.
        down (`int`): a status that every request is answered with; 0 for none.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.cut, self.sent = 0, 0.5
        self.down = 0
        handler = type("BoundHandler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision of a repository holds."""
        repo = self.repos[repo_id]
        return repo.commits[repo.resolve(revision)]

    def put(self, repo_id: str, files: dict[str, bytes], revision: str = "main", message: str = "by hand") -> str:
        """Commit files as they are, without a client; the commit."""
        repo = self.repos.setdefault(repo_id, Repo(owner=repo_id.split("/")[0]))
        before = repo.commits.get(repo.refs.get(revision, ""), {})
        return repo.commit({**before, **files}, revision, message)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.hub.requests.append((method, url.path))
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else b""
        if self.hub.down:
            return self._error(self.hub.down, "the Hub is down")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.user, self.access = USERS.get(token), ACCESS.get(token, {})
        if token and self.user is None:
            return self._error(401, "Invalid credentials in Authorization header")
        for methods, pattern, name in _ROUTES:
            if method in methods and (match := re.fullmatch(pattern, url.path)):
                groups = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                return getattr(self, name)(**groups)
        return self._error(404, f"the loopback Hub has no route {method} {url.path}")

    def _send(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), Content_Type="application/json")

    def _error(self, status: int, message: str, code: str = "") -> None:
        headers = {"X_Error_Message": message, "Content_Type": "application/json"}
        self._send(
            status, json.dumps({"error": message}).encode(), **headers, **({"X_Error_Code": code} if code else {})
        )

    def _readable(self, repo_id: str, *, content: bool = False) -> Repo | None:
        """The repository, or an error that was already sent."""
        repo = self.hub.repos.get(repo_id)
        mine = repo is not None and repo.owner == self.user
        if repo is None or (repo.private and not mine):
            status = 404 if self.user else 401
            return self._error(
                status, "Repository not found" if self.user else "Invalid username or password.", "RepoNotFound"
            )
        if content and repo.gated and not mine:
            return self._error(403 if self.user else 401, "Access to this model is restricted.", "GatedRepo")
        return repo

    def _writable(self, repo_id: str) -> Repo | None:
        repo = self._readable(repo_id)
        if repo is not None and (repo.owner != self.user or self.access["role"] == "read"):
            return self._error(403 if self.user else 401, "You don't have the rights to write to this repository")
        return repo

    def _changeable(self, repo_id: str) -> Repo | None:
        """A repository to commit to, or to open a pull request in, which whoever may read it may."""
        return self._readable(repo_id) if self.query.get("create_pr") and self.user else self._writable(repo_id)

    def _at(self, repo: Repo, revision: str) -> str | None:
        oid = repo.resolve(revision)
        return oid or self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def whoami(self) -> None:
        if self.user is None:
            return self._error(401, "Invalid username or password.")
        orgs = [{"name": "team"}] if self.user == "alice" else []
        auth = {"type": "access_token", "accessToken": self.access}
        self._json({"type": "user", "name": self.user, "orgs": orgs, "auth": auth})

    def create_repo(self) -> None:
        asked = json.loads(self.body)
        if self.user is None:
            return self._error(401, "Invalid username or password.")
        owner = asked.get("organization") or self.user
        repo_id = f"{owner}/{asked['name']}"
        if owner != self.user or self.access["role"] == "read":
            return self._error(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        answer = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.hub.repos:
            return self._json({**answer, "error": "You already created this model repo"}, 409)
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        repo = self.hub.repos[repo_id] = Repo(owner=owner, private=private)
        repo.commit({".gitattributes": b""}, "main", "initial commit")
        self._json(answer)

    def validate_yaml(self) -> None:
        front = re.match(r"---\n(.*?)---\n", json.loads(self.body)["content"], flags=re.DOTALL)
        card = yaml.safe_load(front[1]) if front else {}
        errors = []
        for key, pattern in _CARD_VALUES.items():
            values = card.get(key) or []
            for value in values if isinstance(values, list) else [values]:
                if not re.fullmatch(pattern, str(value)):
                    errors.append({"message": f'"{key}" with value "{value}" is not valid'})
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def info(self, repo: str, revision: str = "main") -> None:
        if (found := self._readable(repo)) is None or (oid := self._at(found, revision)) is None:
            return
        siblings = [{"rfilename": path} for path in sorted(found.commits[oid])]
        self._json(
            {
                "_id": "0",
                "id": repo,
                "modelId": repo,
                "sha": oid,
                "private": found.private,
                "siblings": siblings,
                "tags": [],
            }
        )

    def tree(self, repo: str, revision: str, path: str = "") -> None:
        if (found := self._readable(repo)) is None or (oid := self._at(found, revision)) is None:
            return
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in sorted(found.commits[oid].items())
            if name.startswith(path)
        ]
        self._json(entries)

    def refs(self, repo: str) -> None:
        if (found := self._readable(repo)) is None:
            return
        kinds: dict[str, list] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
        for name, oid in found.refs.items():
            kind, ref = "branches", f"refs/heads/{name}"
            if name.startswith("refs/pr/"):
                kind, ref = "pullRequests", name
            elif name in found.tags:
                kind, ref = "tags", f"refs/tags/{name}"
            kinds[kind].append({"name": name, "ref": ref, "targetCommit": oid})
        self._json(kinds)

    def branch(self, repo: str, name: str) -> None:
        self._add_ref(repo, name, json.loads(self.body or b"{}").get("startingPoint") or "main")

    def tag(self, repo: str, revision: str) -> None:
        name = json.loads(self.body)["tag"]
        if self._add_ref(repo, name, revision):
            self.hub.repos[repo].tags.add(name)

    def _add_ref(self, repo: str, name: str, start: str) -> bool:
        if (found := self._writable(repo)) is None or (oid := self._at(found, start)) is None:
            return False
        if name in found.refs:
            self._error(409, f"Reference already exists: {name}")
            return False
        found.refs[name] = oid
        self._json({})
        return True

    def preupload(self, repo: str, revision: str) -> None:
        if self._changeable(repo) is None:
            return
        files = json.loads(self.body)["files"]
        modes = ["lfs" if file["path"].endswith((".safetensors", ".bin")) else "regular" for file in files]
        self._json(
            {
                "files": [
                    {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
                    for file, mode in zip(files, modes, strict=True)
                ]
            }
        )

    def lfs_batch(self, repo: str) -> None:
        if self._readable(repo) is None:  # preupload and commit ask for the right to write
            return
        objects = []
        for entry in json.loads(self.body)["objects"]:
            action = {"upload": {"href": f"{self.hub.endpoint}/lfs/{entry['oid']}"}}
            objects.append({**entry, **({} if entry["oid"] in self.hub.blobs else {"actions": action})})
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._error(400, "the content is not that of its hash")
        self.hub.blobs[oid] = self.body
        self._send(200)

    def commit(self, repo: str, revision: str) -> None:
        found = self._changeable(repo)
        if found is None or (oid := self._at(found, revision)) is None:
            return
        files, message = dict(found.commits[oid]), ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        ref, answer = revision, {}
        if self.query.get("create_pr"):
            number = 1 + sum(name.startswith("refs/pr/") for name in found.refs)
            ref = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo}/discussions/{number}"
        oid = found.commit(files, ref, message)
        answer["commitUrl"] = f"{self.hub.endpoint}/{repo}/commit/{oid}"
        self._json({"success": True, "commitOid": oid, **answer})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        if (found := self._readable(repo, content=True)) is None or (oid := self._at(found, revision)) is None:
            return
        headers = {"X_Repo_Commit": oid}
        if path not in found.commits[oid]:
            message = f"Entry not found: {path}"
            return self._send(404, b"", X_Error_Code="EntryNotFound", X_Error_Message=message, **headers)
        content = found.commits[oid][path]
        headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        if self.command == "GET" and self.hub.cut > 0:
            self.hub.cut -= 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: int(len(content) * self.hub.sent)])
            self.close_connection = True
            return
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start and self.command == "GET":
            rest = content[int(start[1]) :]
            spans = f"bytes {start[1]}-{len(content) - 1}/{len(content)}"
            return self._send(206, rest, Content_Range=spans, **headers)
        self._send(200, content, Accept_Ranges="bytes", **headers)


def save_login(token: str) -> None:
    """What `hf auth login` leaves."""
    from huggingface_hub import constants  # not before the address of this Hub is in the environment

    path = Path(constants.HF_TOKEN_PATH)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(token + "\n")


_ROUTES = [
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create_repo"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("GET", rf"{_REPO}/revision/(?P<revision>.+)", "info"),
    ("GET", rf"{_REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
    ("GET", rf"{_REPO}/refs", "refs"),
    ("POST", rf"{_REPO}/branch/(?P<name>.+)", "branch"),
    ("POST", rf"{_REPO}/tag/(?P<revision>.+)", "tag"),
    ("POST", rf"{_REPO}/preupload/(?P<revision>.+)", "preupload"),
    ("POST", rf"{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>\w+)", "lfs_put"),
    ("POST", rf"{_REPO}/commit/(?P<revision>.+)", "commit"),
    ("GET HEAD", rf"{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ("GET", _REPO, "info"),
]
_ROUTES = [(methods.split(), pattern, name) for methods, pattern, name in _ROUTES]


HUB = Hub()
