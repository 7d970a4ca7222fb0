"""stub, replaced at merge."""

import hashlib

from datasets import Image


def fingerprint(dataset):
    d = hashlib.sha256()
    for row in dataset.cast_column("image", Image(decode=False)):
        d.update(row["image"]["bytes"] + str(row["label"]).encode())
    return d.hexdigest()
