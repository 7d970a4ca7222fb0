"""A small double of the Hub on 127.0.0.1, for the real clients of huggingface_hub and its users.

It checks what it receives: tokens, the oid and size of every uploaded file, that a commit names
only what was uploaded and builds on the head it names, the card's metadata. What no honest client
would send lands in ``problems``. ``fail`` makes it misbehave.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub_repositories import Blob, Refused, Repository

TOKENS = {"hf_goodtokenofuser": "user", "hf_goodtokenofother": "other"}
NOW = "2026-01-01T00:00:00.000Z"
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
API = rf"/api/(?:models|datasets)/{REPO}"


class HubDouble:
    """Use as a context manager; a free port of its own unless an address is given."""

    def __init__(self, address=("127.0.0.1", 0)):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.sent: Counter[str] = Counter()  # bytes of content, by request
        self.problems: list[str] = []
        self.faults: list[list] = []
        self.lock, self.closing = threading.RLock(), threading.Event()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(address, handler)
        self.server.daemon_threads = True
        self.endpoint = "http://{}:{}".format(*self.server.server_address)

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def fail(self, pattern, action, times=1_000_000):
        """Answer the next requests ``"METHOD path"`` that match by a status, or as a word says.

        "drop" resets the connection, "hang" leaves it open, "drip" sends the body byte by byte, and
        "lose" does what was asked for and then resets the connection.
        """
        self.faults.append([pattern, action, times])

    def fault(self, request):
        for fault in self.faults:
            if fault[2] > 0 and re.search(fault[0], request):
                fault[2] -= 1
                return fault[1]
        return None

    def put(self, repo, files, private=False):
        """Make a repository of these files, by their paths, or a commit to it."""
        found = self.repositories.setdefault(repo, Repository(private))
        blobs = {path: Blob(content, lfs=True) for path, content in files.items()}
        found.branches["main"] = found.add(found.branches.get("main"), "files", "", blobs)

    def files(self, repo, revision="main"):
        return {
            path: b.content for path, b in self.repositories[repo].commit(revision).files.items()
        }


class Handler(BaseHTTPRequestHandler):
    """Routes by name of method and pattern of path to the methods marked by ``route``."""

    protocol_version = "HTTP/1.1"
    hub: HubDouble
    routes: list = []  # noqa: RUF012

    def log_message(self, *_):
        pass

    def handle_any(self):
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        request = f"{self.command} {url.path}"
        with self.hub.lock:
            self.hub.requests.append(request)
            fault = self.hub.fault(request)
        if fault == "hang":
            self.hub.closing.wait(30)
        if fault in ("drop", "hang"):
            # In the middle of what the client sends; a reset, as when a machine dies.
            self.rfile.read(min(1000, int(self.headers.get("Content-Length", 0))))
            self.reset()
            return
        self.body, self.dripping = self.read_body(), fault == "drip"
        try:
            if fault == "lose":
                with self.hub.lock:
                    self.dispatch(url.path)
                self.reset()
                return
            if fault not in (None, "drip"):
                raise Refused(fault, f"injected {fault}")
            with self.hub.lock:
                answer = self.dispatch(url.path)
            self.answer(*answer)
        except Refused as refused:
            headers = {"X-Error-Message": refused.message}
            if refused.code is not None:
                headers["X-Error-Code"] = refused.code
            self.answer(refused.status, {"error": refused.message}, headers)
        except Exception as error:
            self.hub.problems.append(f"{request}: {type(error).__name__}: {error}")
            self.answer(500, {"error": "the double broke"})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815

    def reset(self):
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
        self.connection.close()

    def read_body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def dispatch(self, path):
        for methods, pattern, action in self.routes:
            match = re.fullmatch(pattern, path)
            if self.command in methods and match:
                return action(self, **match.groupdict())
        if self.command not in ("GET", "HEAD"):
            self.hub.problems.append(f"unknown: {self.command} {path}")
        raise Refused(404, f"no route for {path}")

    def answer(self, status, content=b"", headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.hub.sent[f"{self.command} {urlsplit(self.path).path}"] += len(body)
        if not self.dripping:
            self.wfile.write(body)
            return
        for byte in body:
            if self.hub.closing.wait(0.1):
                return
            try:
                self.wfile.write(bytes([byte]))
            except OSError:  # the client has given up
                return

    def user(self):
        given = self.headers.get("Authorization")
        if given is None:
            return None
        if given.removeprefix("Bearer ") not in TOKENS:
            raise Refused(401, "Invalid credentials in Authorization header")
        return TOKENS[given.removeprefix("Bearer ")]

    def repository(self, repo, write=False):
        found, user = self.hub.repositories.get(repo), self.user()
        owned = user == repo.partition("/")[0]
        if found is None or (found.private and not owned):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and not owned:
            raise Refused(403, "You don't have the required permissions")
        return found

    def problem(self, text):
        self.hub.problems.append(text)
        raise Refused(400, text)


def route(methods, pattern):
    def mark(action):
        Handler.routes.append((methods.split(), pattern, action))
        return action

    return mark


@route("GET", "/api/whoami-v2")
def whoami(self):
    if self.user() is None:
        raise Refused(401, "Invalid username or password.")
    return 200, {"type": "user", "name": self.user(), "orgs": []}


@route("POST", "/api/repos/create")
def create(self):
    given, user = json.loads(self.body), self.user()
    if user is None:
        raise Refused(401, "Invalid username or password.")
    repo = f"{given.get('organization') or user}/{given['name']}"
    answer = {"url": f"{self.hub.endpoint}/{repo}"}
    if repo.partition("/")[0] != user:
        raise Refused(403, "You don't have the rights to create a model under this namespace")
    if repo in self.hub.repositories:
        return 409, {**answer, "error": "You already created this model repo"}
    # Older clients say private, newer ones visibility.
    made = Repository(given.get("private") is True or given.get("visibility") == "private")
    made.branches["main"] = made.add(None, "initial commit", "", {".gitattributes": Blob(b"")})
    self.hub.repositories[repo] = made
    return 200, answer


@route("POST", "/api/validate-yaml")
def validate_yaml(self):
    text = json.loads(self.body)["content"]
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    metadata = yaml.safe_load(found[1]) if found else {}
    ids = [metadata.get("base_model") or [], metadata.get("datasets") or []]
    for one in [i for given in ids for i in ([given] if isinstance(given, str) else given)]:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", one):
            return 400, {"errors": [{"message": f"{one!r} is no id"}], "warnings": []}
    for result in [r for model in metadata.get("model-index", []) for r in model["results"]]:
        value = result["metrics"][0]["value"]
        if not isinstance(value, float):
            return 400, {"errors": [{"message": f"{value!r} is no number"}], "warnings": []}
    return 200, {"errors": [], "warnings": []}


@route("POST", rf"{API}/preupload/(?P<revision>[^/]+)")
def preupload(self, repo, revision):
    found = self.repository(repo, write=not self.query.get("create_pr"))
    present = found.commit(revision).files
    answer = []
    for file in json.loads(self.body)["files"]:
        path, size = file["path"], file["size"]
        if path.startswith(("/", "../")) or len(base64.b64decode(file["sample"])) > 512:
            self.problem(f"preupload of {path!r}")
        mode = "lfs" if path.endswith((".safetensors", ".png")) or size > 10_000_000 else "regular"
        found.modes[path] = mode, size
        one = {"path": path, "uploadMode": mode, "shouldIgnore": False}
        answer.append({**one, "oid": present[path].oid if path in present else None})
    return 200, {"files": answer}


@route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
def lfs_batch(self, repo):
    self.repository(repo)
    given, objects = json.loads(self.body), []
    if given["operation"] != "upload" or given["hash_algo"] != "sha256":
        self.problem(f"LFS batch {given}")
    for one in given["objects"]:
        oid, size = one["oid"], one["size"]
        if oid not in self.hub.objects:
            href = f"{self.hub.endpoint}/lfs/{oid}?size={size}"
            one = {**one, "actions": {"upload": {"href": href, "header": {}}}}
        objects.append(one)
    return 200, {"transfer": "basic", "objects": objects}


@route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
def lfs_put(self, oid):
    if "Authorization" in self.headers:
        self.problem("a token was sent to the storage, whose address is signed")
    if hashlib.sha256(self.body).hexdigest() != oid or len(self.body) != int(self.query["size"]):
        self.problem(f"the body of LFS object {oid} is another one")
    self.hub.objects[oid] = self.body
    return 200, b"", {"ETag": oid}


def committed_file(self, found, value, mode):
    """The blob of one line of a commit, checked."""
    path = value["path"]
    announced, size = found.modes.pop(path, (mode, None))
    if mode == "lfs":
        if value["oid"] not in self.hub.objects:
            self.problem(f"{path} was never uploaded")
        blob = Blob(self.hub.objects[value["oid"]], lfs=True)
    else:
        blob = Blob(base64.b64decode(value["content"], validate=True))
    if announced != mode or size not in (None, len(blob.content)):
        self.problem(f"{path} was announced as {announced}, {size} bytes")
    return blob


@route("POST", rf"{API}/commit/(?P<revision>[^/]+)")
def commit(self, repo, revision):
    create_pr, revision = bool(self.query.get("create_pr")), unquote(revision)
    found = self.repository(repo, write=not create_pr)
    lines = [json.loads(line) for line in self.body.splitlines()]
    if [line["key"] for line in lines].index("header") != 0 or len(lines) < 2:
        self.problem("a commit begins with its header and is not empty")
    header = lines[0]["value"]
    if revision not in found.branches and revision not in found.pull_requests:
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    head = found.commit(revision)
    if header.get("parentCommit") not in (None, head.oid):
        raise Refused(412, "A commit has happened since. Please refresh and try again.")
    files = dict(head.files)
    for line in lines[1:]:
        key, value = line["key"], line["value"]
        if key == "deletedFile" and value["path"] in files:
            del files[value["path"]]
        elif key in ("file", "lfsFile"):
            mode = "lfs" if key == "lfsFile" else "regular"
            files[value["path"]] = committed_file(self, found, value, mode)
        else:
            self.problem(f"{key} {value.get('path')!r}")
    oid = found.add(head.oid, header["summary"], header["description"], files)
    answer = {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{oid}", "commitOid": oid}
    if create_pr:
        number = len(found.pull_requests) + 1
        found.pull_requests[f"refs/pr/{number}"] = oid
        url = f"{self.hub.endpoint}/{repo}/discussions/{number}"
        return 200, {**answer, "pullRequestUrl": url}
    (found.pull_requests if revision in found.pull_requests else found.branches)[revision] = oid
    return 200, answer


@route("GET HEAD", rf"{API}(/revision/(?P<revision>[^/]+))?")
def model_info(self, repo, revision):
    found = self.repository(repo)
    commit = found.commit(revision or "main")
    siblings = []
    for path, blob in sorted(commit.files.items()):
        one = entry(path, blob) if "blobs" in self.query else {}
        siblings.append({"rfilename": path, "blobId": one.get("oid"), "lfs": one.get("lfs")})
    names = {"id": repo, "modelId": repo, "sha": commit.oid, "private": found.private}
    return 200, {**names, "siblings": siblings, "tags": [], "downloads": 0, "lastModified": NOW}


def entry(path, blob):
    one = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.git_oid}
    if blob.lfs:
        sizes = {"size": len(blob.content), "pointerSize": 130}
        one["lfs"] = {"oid": blob.sha256, "sha256": blob.sha256, **sizes}
    return one


@route("GET", rf"{API}/tree/(?P<revision>[^/]+)(/(?P<folder>.*))?")
def tree(self, repo, revision, folder):
    files, below = (
        self.repository(repo).commit(revision).files,
        f"{unquote(folder or '')}/".lstrip("/"),
    )
    found = {path: blob for path, blob in sorted(files.items()) if path.startswith(below)}
    if folder and not found:
        raise Refused(404, f"{folder} does not exist", "EntryNotFound")
    folders = {below + path.removeprefix(below).split("/")[0] for path in found} - found.keys()
    if self.query.get("recursive", "false").lower() != "true":
        found = {path: blob for path, blob in found.items() if "/" not in path.removeprefix(below)}
    tops = [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders]
    return 200, tops + [entry(path, blob) for path, blob in found.items()]


@route("POST", rf"{API}/paths-info/(?P<revision>[^/]+)")
def paths_info(self, repo, revision):
    files = self.repository(repo).commit(revision).files
    wanted = parse_qs(self.body.decode())["paths"]
    return 200, [entry(path, files[path]) for path in wanted if path in files]


@route("GET", rf"{API}/refs")
def refs(self, repo):
    found = self.repository(repo)
    kinds = {"branches": ("heads/", found.branches), "tags": ("tags/", found.tags)}
    answer = {
        kind: [{"name": n, "ref": f"refs/{p}{n}", "targetCommit": o} for n, o in held.items()]
        for kind, (p, held) in kinds.items()
    }
    return 200, {**answer, "converts": []}


@route("POST", rf"{API}/branch/(?P<name>[^/]+)")
def create_branch(self, repo, name):
    found, name = self.repository(repo, write=True), unquote(name)
    if name in found.branches:
        raise Refused(409, "Reference already exists")
    found.branches[name] = found.commit(json.loads(self.body).get("startingPoint", "main")).oid
    return 200, b""


@route("POST", rf"{API}/tag/(?P<revision>[^/]+)")
def create_tag(self, repo, revision):
    found, name = self.repository(repo, write=True), json.loads(self.body)["tag"]
    if name in found.tags:
        raise Refused(409, "Tag reference exists already")
    found.tags[name] = found.commit(revision).oid
    return 200, b""


@route("DELETE", rf"{API}/tag/(?P<name>[^/]+)")
def delete_tag(self, repo, name):
    if self.repository(repo, write=True).tags.pop(unquote(name), None) is None:
        raise Refused(404, "no such tag", "RevisionNotFound")
    return 200, b""


@route("GET", rf"{API}/discussions")
def discussions(self, repo):
    found = self.repository(repo)
    owner, made = {"name": "user"}, []
    for number, (ref, oid) in enumerate(found.pull_requests.items(), start=1):
        closed = int(ref.rpartition("/")[2]) in found.closed
        one = {"num": number, "title": found.commits[oid].title, "author": owner, "createdAt": NOW}
        one |= {"status": "closed" if closed else "open", "isPullRequest": True}
        made.append({**one, "repo": {"name": repo, "type": "model"}})
    made = [one for one in made if self.query.get("status") in (None, one["status"])]
    return 200, {"discussions": made, "count": len(made), "start": 0}


@route("POST", rf"{API}/discussions/(?P<number>\d+)/status")
def discussion_status(self, repo, number):
    found, given = self.repository(repo, write=True), json.loads(self.body)
    if f"refs/pr/{number}" not in found.pull_requests or given["status"] != "closed":
        raise Refused(404, "Discussion not found")
    found.closed.add(int(number))
    data = {"type": "status-change", "createdAt": NOW, "data": {"status": "closed"}}
    return 200, {"newStatus": {"id": "1", **data}}


@route("GET HEAD", rf"/(?:datasets/)?{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(self, repo, revision, path):
    commit = self.repository(repo).commit(revision)
    blob = commit.files.get(unquote(path))
    if blob is None:
        raise Refused(404, f"{path} does not exist", "EntryNotFound")
    headers = {"ETag": f'"{blob.oid}"', "X-Repo-Commit": commit.oid}
    if blob.lfs:
        headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.content))}
    if "Range" not in self.headers:
        return 200, blob.content, headers
    first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"]).groups()
    content = blob.content[int(first) : int(last) + 1 if last else None]
    end = int(first) + len(content) - 1
    return 206, content, {**headers, "Content-Range": f"bytes {first}-{end}/{len(blob.content)}"}
