"""Faults of the files of the model that is read."""

import pickle

from safetensors.torch import load_file, save_file

from faults.table import (
    cut,
    edited,
    empty,
    fault,
    flip,
    into_folder,
    linked_elsewhere,
    remove,
    text,
    to,
)

CHANGED = "its checksum differs|is not whole"
GONE = r"is gone|holds no model\.safetensors|has no model\.safetensors"


def weights(world):
    return world.model / "model.safetensors"


def config(world):
    return world.model / "config.json"


def optimizer(world):
    return world.model / "optimizer.safetensors"


def pickled(path):
    path.unlink()
    path.with_name("pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))


def changed_tensors(change):
    def write(path):
        state = {name: change(tensor) for name, tensor in load_file(path).items()}
        save_file(state, path, metadata={"format": "pt"})

    return write


for told, change in (
    ("a bit flipped", flip),
    ("cut in the middle", cut),
    ("empty", empty),
    ("those of another round", changed_tensors(lambda tensor: -tensor)),
    ("all NaN", changed_tensors(lambda tensor: tensor * float("nan"))),
):
    fault("weights", told, "RRRR", CHANGED, damage=to(weights, change))
for told, change in (
    ("missing", remove),
    ("a folder", into_folder),
    ("a pickle in their place", pickled),
):
    fault("weights", told, "RRRR", GONE, damage=to(weights, change))
fault(
    "weights",
    "a symbolic link to the same bytes",
    "===R",
    "is a symbolic link",
    damage=to(weights, linked_elsewhere),
)


def permuted(content):
    content["label_names"] = content["label_names"][::-1]


def large(content):
    content["pretrained_cfg"]["input_size"] = [3, 20_000, 20_000]


for told, change in (
    ("label names in another order", edited(permuted)),
    ("cut in the middle", cut),
    ("100,000 levels deep", text("[" * 100_000 + "]" * 100_000)),
    ("an architecture hf-hub:o/x", edited(lambda c: c.update(architecture="hf-hub:o/x"))),
    ("a checkpoint_path", edited(lambda c: c["model_args"].update(checkpoint_path="/x"))),
    ("an input of 20,000 pixels", edited(large)),
):
    fault("config", told, "RRRR", CHANGED, damage=to(config, change))
fault("config", "missing", "RRRR", "config|model is gone", damage=to(config, remove))


def of_a_stranger(change):
    """A config that no record vouches for: the model has no history."""

    def write(world):
        change(config(world))
        world.history.unlink()

    return write


for told, change, says in (
    ("a checkpoint_path", lambda c: c["model_args"].update(checkpoint_path="/x"), "model_args"),
    ("an architecture hf-hub:o/x", lambda c: c.update(architecture="hf-hub:o/x"), "architecture"),
    ("an input of 20,000 pixels", large, "input_size"),
    ("an unknown key", lambda c: c.update(auto_map={"AutoModel": "x.X"}), "auto_map"),
    ("a file of weights elsewhere", lambda c: c["pretrained_cfg"].update(file="/x"), "file"),
):
    damage = of_a_stranger(edited(change))
    fault("a stranger's config", told, "-R--", says, damage=damage)

fault("optimizer", "a bit flipped", "R-R-", CHANGED, damage=to(optimizer, flip))
fault("optimizer", "missing", "R-R-", GONE, damage=to(optimizer, remove))
fault(
    "card",
    "missing",
    "---R",
    r"has no README\.md",
    damage=lambda world: (world.model / "README.md").unlink(),
)
fault(
    "figure",
    "a symbolic link to a secret",
    "---R",
    "is a symbolic link",
    damage=lambda world: linked_elsewhere(world.model / "rounds.png"),
)
