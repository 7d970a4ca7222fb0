"""Faults of the history that is read."""

import os
import shutil
from dataclasses import replace

import hf_dash
from faults.table import cut, empty, fault, into_folder, remove, rewritten, text, to

AREA = "history"


def history(world):
    return world.history


def newest(**changes):
    return lambda content: content["records"][-1].update(changes)


def drop_first(content):
    del content["records"][0]


def older_copy(world):
    """The history as it was before the newest round; the folders are newer."""

    def older(content):
        content["records"] = content["records"][:-1]
        content["promotions"] = []

    rewritten(older)(world.history)


def older_copy_with_gap(world):
    """An older copy, where what came in between is recorded nowhere else."""
    path = world.history
    content = path.read_bytes()
    own = hf_dash.read_history(path)
    rejected = own.records[-1]
    own.append_promotion(hf_dash.history.Promotion("reject", rejected.folder, None, "worse", ""))
    later = replace(rejected, round_index=9, previous=own.head)
    target = world.home / later.folder
    shutil.copytree(world.home / rejected.folder, target)
    hf_dash.history.write_history(target / "history.json", own.settings, [later])
    path.write_bytes(content)


def places(content):
    content["settings"]["train_dir"] = "/home/me/images"


WHOLE = "is not a whole hf_dash history"

# Of a run's lines a torn one is cut off, and what it held comes back from the folders. The half of
# a run of one round ends in its settings.
fault(AREA, "cut in the middle", "RR=R", WHOLE, damage=to(history, cut))
for told, change in (
    ("empty", empty),
    ("of another kind of file", lambda path: path.write_bytes(bytes(range(256)))),
    ("a list", text("[]")),
    ("100,000 levels deep", text("[" * 100_000 + "]" * 100_000)),
    ("larger than 64 MB", lambda path: os.truncate(path, 65 * 2**20)),
    ("of another format", rewritten(lambda content: content.update(format=9))),
    ("a number edited by hand", rewritten(newest(accuracy=0.99), redigest=False)),
    ("an accuracy that is text", rewritten(newest(accuracy="high"))),
    ("an accuracy of 97.5", rewritten(newest(accuracy=97.5))),
    ("an accuracy of NaN", rewritten(newest(accuracy=float("nan")))),
    ("a class's accuracy that is text", rewritten(newest(per_class_accuracy={"0": "x"}))),
    ("a round 0", rewritten(newest(round_index=0))),
    ("a negative number of steps", rewritten(newest(steps=-1))),
    ("a seed that is not an integer", rewritten(newest(seed=0.5))),
    ("a field missing", rewritten(lambda c: c["records"][-1].pop("steps"))),
    ("an unknown field", rewritten(newest(more=1))),
    ("a start named ../../x", rewritten(newest(start="../../x"))),
    ("a shrink without tensors", rewritten(newest(shrink={"config": {}}))),
    ("a checksum that cannot be one", rewritten(newest(weights_sha256="x"))),
    ("settings that are a list", rewritten(lambda c: c.update(settings=[]))),
    ("an unknown kind of promotion", rewritten(lambda c: c["promotions"].append({"kind": "x"}))),
):
    fault(AREA, told, "RRRR", WHOLE, damage=to(history, change))

fault(AREA, "a folder", "RRRR", r"history\.json", damage=to(history, into_folder))
fault(
    AREA,
    "an entry removed from the middle",
    "--R-",
    "ha(s|ve) lost the one before|is older than",
    damage=to(history, rewritten(drop_first)),
)
fault(AREA, "an older copy than its folders", "=-=-", damage=older_copy)
fault(
    AREA,
    "an older copy, and entries between are lost",
    "R-R-",
    "is older than rounds/009",
    damage=older_copy_with_gap,
)
fault(AREA, "missing in a run", "=-R-", r"history\.json", damage=to(history, remove))
fault(AREA, "missing next to a model", "---R", r"history\.json", damage=to(history, remove))
fault(
    AREA,
    "names a place on this machine",
    "-==R",
    "names 1 places",
    damage=to(history, rewritten(places)),
    but=("history.json", "history.jsonl"),
)
fault(
    AREA,
    "champion.json damaged",
    "--R-",
    "is not a whole promotion",
    damage=lambda world: (world.home / "champion.json").write_text("{"),
)
