import pytest
from image_files import class_folders, write_folder

from hf_dash import DataConfig
from hf_dash.data.shards import merge_shards


def held_out(config):
    split, shards = config.open_held_out()
    return split, (len(merge_shards(shards)[0]) if shards else None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of 4 images, of which ``both_…`` hold two splits."""
    root = tmp_path_factory.mktemp("folders")
    class_folders(root / "train_only", count=2)
    class_folders(root / "held", count=1, first=50)
    for name in ("val", "valid", "dev", "validation", "test", "eval"):
        class_folders(root / f"both_{name}" / "train", count=2)
        class_folders(root / f"both_{name}" / name, count=1, first=50)
    for name in ("train", "dev", "test"):
        class_folders(root / "three" / name, count=1, first=len(name))
    return root


@pytest.mark.parametrize("name", ["val", "valid", "dev", "validation", "test", "eval"])
def test_the_held_out_split_is_found_by_its_name(folders, name):
    config = DataConfig(str(folders / f"both_{name}"))
    assert held_out(config) == (name, 2)
    assert len(config.load_train()) == 4


def test_the_validation_split_comes_before_the_test(folders):
    assert held_out(DataConfig(str(folders / "three")))[0] == "dev"
    assert held_out(DataConfig(str(folders / "three"), test_split="test"))[0] == "test"
    assert held_out(DataConfig(str(folders / "three"), test_split="validation"))[0] == "dev"


def test_another_dataset_is_held_out_whole_or_by_its_split(folders):
    train = str(folders / "train_only")
    assert held_out(DataConfig(train, test_dataset_name=str(folders / "held"))) == ("train", 2)
    both = str(folders / "both_val")
    assert held_out(DataConfig(train, test_dataset_name=both)) == ("val", 2)
    assert held_out(DataConfig(train, test_dataset_name=both, test_split="train")) == ("train", 4)
    assert held_out(DataConfig(train, validation_dir=str(folders / "held"))) == ("validation", 2)


def test_a_train_dir_has_no_splits(folders):
    config = DataConfig(train_dir=str(folders / "train_only"), validation_dir=str(folders / "held"))
    assert (len(config.load_train()), config.source) == (4, str(folders / "train_only"))
    # Its folders are not in class folders, whatever they are called.
    with pytest.raises(ValueError, match=r"lies in several.*dataset_name finds splits"):
        DataConfig(train_dir=str(folders / "both_val")).load_train()


def test_what_is_to_be_held_out_is_asked_for(folders):
    name = str(folders / "train_only")
    with pytest.raises(ValueError, match="test_dataset_name must be given"):
        DataConfig(name).open_held_out()
    assert held_out(DataConfig(name, train_val_split=0.25)) == ("25% of train", None)
    with pytest.raises(ValueError, match=r"test_dataset_name .* got test_split 'test'"):
        DataConfig(name, train_val_split=0.25, test_split="test").open_held_out()
    # Which images arrive is not known yet, so a share of them would differ from round to round.
    with pytest.raises(ValueError, match="test_dataset_name must be given"):
        DataConfig(name, train_val_split=0.25, arrive_by="files").open_held_out()
    odd = {f"{split}-00000-of-00001.parquet": b"" for split in ("a", "b")}
    write_folder(folders / "odd", odd)
    config = DataConfig(name, test_dataset_name=str(folders / "odd"))
    with pytest.raises(ValueError, match=r"test_split must be given.*\['a', 'b'\]"):
        config.open_held_out()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class_folder": "middle"}, r"class_folder must be one of \(None, 'first', 'last'\)"),
        ({"compare_images_by": "name"}, r"compare_images_by must be one of \('bytes', 'pixels'\)"),
        ({"train_val_split": 0.0}, r"train_val_split must be in \(0, 1\), got 0\.0"),
        ({"max_eval_samples": 0}, "max_eval_samples must be at least 1, got 0"),
        ({"dataset_name": "digits", "train_dir": "x"}, "either dataset_name or train_dir"),
        ({"dataset_name": None}, "either dataset_name or train_dir must be given"),
        ({"train_dir": "x", "arrive_by": "files"}, "train_dir must be None .* got 'x'"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)


@pytest.mark.parametrize("name", ["allow_missing", "allow_overlap", "allow_disjoint_classes"])
def test_permissions_are_flags(name):
    with pytest.raises(TypeError, match=f"{name} must be True or False, got 'yes'"):
        DataConfig(**{name: "yes"})
