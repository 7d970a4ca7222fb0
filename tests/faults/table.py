"""The table of faults: a row is one thing that goes wrong, a column is one of the four commands.

- ``refused``: an error that names it; no file has changed, on disk or on the Hub.
- ``finished``: an error, a warning or a kill in the middle; without its cause the same command then
  ends as if nothing had been.
- ``right``: no error; the end is as if nothing had been.
- ``-``: it says nothing about the command.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from commands import COMMANDS, HOME, READ

from hf_dash.utils.chain import digest_of

OUTCOMES = {"R": "refused", "F": "finished", "=": "right", "-": "-"}


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Args:
        area: what it goes wrong with.
        text: what goes wrong.
        outcomes: of continual, retrain, promote, publish; one letter each, see ``OUTCOMES``.
        says: pattern of the error, where there is one.
        damage: is done to the world before the command.
        inside: is done in the command's own process.
        hub: is done to the Hub before the command, which then pushes.
        flags: more of the command's; ``{home}`` is the flag of the folder that it writes.
        but: names of files whose content may differ from an undisturbed one.
    """

    area: str
    text: str
    outcomes: str
    says: str = ""
    damage: Callable[["World"], None] | None = None
    inside: Callable[[], None] | None = None
    hub: Callable[[object], None] | None = None
    flags: tuple[str, ...] = ()
    but: tuple[str, ...] = ()

    def outcome(self, command):
        return OUTCOMES[self.outcomes[list(COMMANDS).index(command)]]


@dataclass(frozen=True)
class World:
    """Where things lie in the world of a command."""

    folder: Path
    command: str

    @property
    def home(self):
        return self.folder / HOME[self.command]

    @property
    def model(self):
        """The folder of the model that is read."""
        return self.folder / READ[self.command]

    @property
    def history(self):
        """The history that is read."""
        place = {"retrain": "parent"}.get(self.command, HOME[self.command])
        return self.folder / place / ("history.jsonl" if place == "run" else "history.json")

    @property
    def held_out(self):
        return self.folder / "held_out.parquet"

    @property
    def arriving(self):
        """The shard that is new."""
        return self.folder / "shards" / "tuesday.parquet"

    @property
    def seen(self):
        """The shard that was trained on before."""
        return self.folder / "shards" / "monday.parquet"


FAULTS: dict[str, Fault] = {}


def fault(area, text, outcomes, says="", **how):
    """Enter a row."""
    name = f"{area}: {text}"
    assert name not in FAULTS, name
    FAULTS[name] = Fault(area, text, outcomes, says, **how)


def to(place, change):
    """Do something to one file of a world."""
    return lambda world: change(place(world))


# What is done to files.


def flip(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


def into_folder(path):
    path.unlink()
    path.mkdir()


def linked_elsewhere(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def text(content):
    return lambda path: path.write_text(content)


def edited(change):
    """Change the JSON of a file."""

    def write(path):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return write


def rewritten(change, redigest=True):
    """Change the JSON of a history; by somebody who knows how the digest is made, or not."""

    def write(content):
        digest = content.pop("digest")
        change(content)
        content["digest"] = digest_of(content) if redigest else digest

    whole = edited(write)
    return lambda path: rewrite_lines(path, change, redigest) if is_lines(path) else whole(path)


def is_lines(path):
    return path.suffix == ".jsonl"


LISTS = {"records": "round", "promotions": "promotion", "changes": "settings"}


def rewrite_lines(path, change, redigest):
    """Change the lines of a history, given to ``change`` as the lists that a whole file has."""
    (_, header), *lines = map(read_line, path.read_text().splitlines())
    content = dict(header["run"])
    for many, one in LISTS.items():
        content[many] = [line[one] for _, line in lines if one in line]
    digests = {id(entry): digest for digest, line in lines for entry in line.values()}
    change(content)
    entries = [(one, entry) for many, one in LISTS.items() for entry in content[many]]
    order = [*digests, *(id(entry) for _, entry in entries)]
    entries.sort(key=lambda named: order.index(id(named[1])))
    run = {name: content[name] for name in ("format", "settings")}
    with path.open("w") as file:
        for name, entry in [("run", run), *entries]:
            digest = digest_of(entry) if redigest else digests.get(id(entry), digest_of(entry))
            file.write(json.dumps({"digest": digest, name: entry}, sort_keys=True) + "\n")


def read_line(text):
    line = json.loads(text)
    return line.pop("digest"), line
