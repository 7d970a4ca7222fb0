import matplotlib.image
from test_history import record

from hf_dash import plot_rounds


def test_a_figure_of_several_starts_and_seeds_is_drawn(tmp_path):
    records = [
        record(start, seed, index, accuracy=0.1 * index)
        for start in ("cold", "dash")
        for seed in (0, 1)
        for index in (1, 2, 3)
    ]
    plot_rounds(records, tmp_path / "rounds.png")
    pixels = matplotlib.image.imread(tmp_path / "rounds.png")
    assert pixels.shape == (540, 1350, 4)
    colours = {tuple(c) for c in pixels[:, :, :3].reshape(-1, 3).round(2).tolist()}
    assert len(colours) > 10


def test_one_record_is_enough(tmp_path):
    plot_rounds([record()], tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 1000
