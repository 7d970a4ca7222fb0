import pytest
from huggingface_hub import ModelCard
from test_history import record

from hf_dash import DataConfig, History, export_model, read_history, write_results

SHRINK = {
    "config": {"alpha": 0.3, "lam": 0.3, "grouping": "kernel"},
    "num_batches": 20,
    "num_images": 60,
    "seconds": 0.5,
    "mean_factor": 0.4,
    "share_at_lam": 0.2,
    "tensors": [
        {
            "name": "timm_model.fc.weight",
            "num_vectors": 10,
            "mean_factor": 0.4,
            "min_factor": 0.3,
            "max_factor": 0.9,
            "share_at_lam": 0.2,
        }
    ],
}


@pytest.fixture
def history():
    records = [
        record("dash", hardware="1 × cpu, fp32"),
        record("dash", round_index=2, shrink=SHRINK, hardware="1 × cpu, fp32"),
        record("warm"),
    ]
    return History(None, {"lam": 0.3, "output_dir": "/home/me/runs"}, records)


def test_a_run_leaves_tables_and_figures(history, tmp_path):
    tables = write_results(history, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["factors.png", "rounds.png"]
    assert tables.count("| dash ") == 3  # two rounds, one start
    assert "accuracy, old" not in tables


def test_what_was_measured_is_in_the_tables(tmp_path):
    measured = {"before": {"accuracy_old": 1.0}, "after": {"accuracy_old": 0.5}}
    history = History(None, {}, [record(), record(round_index=2, memorisation=measured)])
    assert "accuracy, old" in write_results(history, tmp_path)
    assert not (tmp_path / "factors.png").exists()


def test_a_model_is_exported_with_its_own_records(history, small_model, tmp_path):
    export_model(small_model, tmp_path, history, "dash", 0, DataConfig(), 360)
    own = read_history(tmp_path / "history.json")
    assert own.records == history.records[:2]
    card = ModelCard.load(tmp_path / "README.md")
    assert "/home/me" not in str(card) + (tmp_path / "history.json").read_text()
    assert "| hardware | 1 × cpu, fp32 |" in " ".join(str(card).split())
    with pytest.raises(ValueError, match="no record of start 'cold' and seed 0"):
        export_model(small_model, tmp_path, history, "cold", 0, DataConfig(), 360)
