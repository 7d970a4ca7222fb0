"""Where images lie does not change what is trained on them: the same run, to the bit."""

import pytest
from datasets import ClassLabel, Dataset, Features, Image
from helpers import QUICK, hub_address, launch
from hub_double import TOKENS, HubDouble
from image_files import encoded, photo, write_tar

import hf_dash

pytestmark = pytest.mark.slow

TOKEN = next(iter(TOKENS))
RUN = ["--streaming", "--num_rounds", "3", "--starts", "dash", "--replay_samples", "1.0"]
RUN += ["--no_cache_images", "--num_workers", "1", *QUICK]
SPLITS = {"train": (0, 120), "test": (500, 20)}  # first image, and how many


def trained(folder, output_dir, *flags, **environment):
    """Run three rounds; return the weights and the old images of each."""
    cache = str(folder / "cache")
    flags = ["--output_dir", output_dir, *RUN, *flags]
    launch(
        "continual_rounds.py", folder, *flags, launcher=False, HF_DASH_CACHE=cache, **environment
    )
    records = hf_dash.read_history(folder / output_dir / "history.jsonl").records
    assert len(records) == 3
    return [(one.weights_sha256, one.replay) for one in records]


def test_a_compressed_archive_trains_as_a_plain_one_does(tmp_path):
    for split, (first, count) in SPLITS.items():
        members = []
        for n in range(count):
            members.append((f"{n:04}.png", encoded(photo(n % 2, first + n))))
            members.append((f"{n:04}.cls", str(n % 2).encode()))
        write_tar(tmp_path / f"{split}.tar", members)
        write_tar(tmp_path / f"{split}.tar.gz", members, "w:gz")
    columns = ["--image_column_name", "png", "--label_column_name", "cls"]
    plain, packed = (
        trained(
            *(tmp_path, end, *columns, "--dataset_name", f"train.{end}"),
            *("--test_dataset_name", f"test.{end}"),
        )
        for end in ("tar", "tar.gz")
    )
    assert plain == packed


def test_a_dataset_on_the_hub_trains_as_its_files_do_and_no_token_is_kept(tmp_path):
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    for split, (first, count) in SPLITS.items():
        images = [encoded(photo(n % 2, first + n)) for n in range(count)]
        rows = {"image": [{"bytes": data, "path": None} for data in images]}
        rows["label"] = [n % 2 for n in range(count)]
        Dataset.from_dict(rows, features).to_parquet(tmp_path / f"{split}.parquet", batch_size=10)
    names = ["train.parquet", "test.parquet"]
    with HubDouble(hub_address()) as hub:
        hub.put("user/data", {name: (tmp_path / name).read_bytes() for name in names}, private=True)
        online = {"HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
        remote = trained(tmp_path, "hub", "--dataset_name", "user/data", **online)
    sources = ["--dataset_name", names[0], "--test_dataset_name", names[1]]
    assert trained(tmp_path, "here", *sources) == remote
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in content for content in written)
