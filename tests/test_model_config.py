import json

import pytest
from helpers import make_tiny_timm, tiny_vit

import hf_dash
from hf_dash.model_config import LARGEST, check_config


def write(folder, **changes):
    """The config of a tiny timm model, with changes; returns its path."""
    hf_dash.save_model(make_tiny_timm(), folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


def test_what_this_package_and_transformers_write_is_allowed(tmp_path):
    check_config(write(tmp_path / "timm"))
    hf_dash.save_model(tiny_vit(), tmp_path / "vit")
    check_config(tmp_path / "vit" / "config.json")
    model = make_tiny_timm()
    model.save_pretrained(tmp_path / "wrapper")
    check_config(tmp_path / "wrapper" / "config.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "hf-hub:other/x"}, "architecture must be .*, got 'hf-hub:other/x'"),
        ({"architecture": "local-dir:/etc"}, "architecture must be .*, got 'local-dir:/etc'"),
        ({"architecture": "no_such_model"}, "architecture must be .*, got 'no_such_model'"),
        ({"architecture": ["resnet18"]}, r"architecture must be .*, got \['resnet18'\]"),
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, r"got \['checkpoint_path'\]"),
        ({"model_args": {"pretrained": True}}, r"model_args .*, got \['pretrained'\]"),
        ({"model_args": {"pretrained_cfg_overlay": {"file": "x"}}}, "pretrained_cfg_overlay"),
        ({"model_args": {"cache_dir": "/"}}, r"model_args .*, got \['cache_dir'\]"),
        ({"model_args": [1]}, r"model_args must be by name, got \[1\]"),
        ({"pretrained_cfg": {"input_size": [3, 20000, 20000]}}, "input_size must be at most 4,096"),
        ({"pretrained_cfg": {"file": "/etc/passwd"}}, "pretrained_cfg must not hold file"),
        ({"pretrained_cfg": {"custom_load": True}}, "pretrained_cfg must not hold custom_load"),
        ({"pretrained_cfg": 7}, "pretrained_cfg must be by name, got 7"),
        ({"model_args": {"img_size": 1e9}}, "img_size must be at most 4,096, got 1000000000.0"),
        ({"model_args": {"channels": [10**9]}}, "channels must be at most 65,536"),
        ({"model_args": {"layers": [1] * 2000}}, "layers must have at most 1024 entries, got 2000"),
        ({"num_features": float("nan")}, "num_features must be at most 65,536, got nan"),
        ({"auto_map": {"AutoConfig": "own.Own"}}, r"got \['auto_map'\] too"),
        ({"hf_hub_id": "other/x"}, r"got \['hf_hub_id'\] too"),
    ],
)
def test_what_leads_elsewhere_or_takes_all_memory_is_refused(tmp_path, changes, message):
    path = write(tmp_path, **changes)
    with pytest.raises(ValueError, match=rf"config\.json cannot be used: .*{message}"):
        check_config(path)
    with pytest.raises(ValueError, match=r"config\.json cannot be used"):
        hf_dash.load_model(str(tmp_path))


def test_a_large_image_of_another_family_is_refused(tmp_path):
    hf_dash.save_model(tiny_vit(), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_size": 20_000}))
    with pytest.raises(ValueError, match="image_size must be at most 4,096, got 20000"):
        hf_dash.load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be used"),
        ("[1]", "it must hold an object, got list"),
        ("[" * 100_000 + "]" * 100_000, "it is nested too deeply"),
        (" " * (LARGEST + 1), "at most 16,777,216 are read"),
    ],
)
def test_a_file_that_is_not_a_config_is_refused(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        check_config(path)
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        check_config(tmp_path / "nowhere" / "config.json")
