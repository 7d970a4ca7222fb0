"""What the repositories of the Hub's double hold: files, commits, branches and tags."""

import hashlib
from dataclasses import dataclass, field
from urllib.parse import unquote


class Refused(Exception):  # noqa: N818
    """An answer with an error status."""

    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass(frozen=True)
class Blob:
    content: bytes
    lfs: bool = False

    @property
    def sha256(self):
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self):
        content = self.content
        if self.lfs:
            pointer = f"oid sha256:{self.sha256}\nsize {len(content)}\n"
            content = f"version https://git-lfs.github.com/spec/v1\n{pointer}".encode()
        return hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()

    @property
    def oid(self):
        return self.sha256 if self.lfs else self.git_oid


@dataclass
class Commit:
    oid: str
    parent: str | None
    title: str
    description: str
    files: dict[str, Blob]


@dataclass
class Repository:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[str, str] = field(default_factory=dict)
    closed: set[int] = field(default_factory=set)
    modes: dict[str, tuple[str, int]] = field(default_factory=dict)  # path → upload mode, size

    def add(self, parent, title, description, files):
        text = repr((parent, title, description, sorted((p, b.oid) for p, b in files.items())))
        oid = hashlib.sha1(f"{len(self.commits)}{text}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, description, files)
        return oid

    def commit(self, revision):
        refs = {**self.branches, **self.tags, **self.pull_requests}
        oid = refs.get(unquote(revision), unquote(revision))
        if oid not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def log(self, revision="main"):
        """Commits from a revision back to the first."""
        commit = self.commit(revision)
        while commit is not None:
            yield commit
            commit = self.commits.get(commit.parent)
