from itertools import pairwise

import matplotlib.image
import pytest
from helpers import record

from hf_dash import DashConfig, ShrinkReport
from hf_dash.method.shrink import TensorReport
from hf_dash.report import plot_factors, plot_rounds, plots
from hf_dash.studies import framework, plot_pretraining, plot_simulations, pretraining, simulate

EIGHT = ["a", "b", "c", "d", "e", "f", "g", "h"]


@pytest.fixture
def figures(monkeypatch):
    """The figures themselves, in place of the files they would be saved to."""
    kept = []
    for module in (plots, framework, pretraining):
        monkeypatch.setattr(module, "save_figure", lambda figure, path: kept.append(figure))
    return kept


def some_records(starts, rounds, seeds=(0, 1)):
    return [
        record(start, seed, index, accuracy=0.1 * index + 0.2 * seed, steps=10 * index)
        for start in starts
        for seed in seeds
        for index in rounds
    ]


def some_report(count=3):
    tensors = [
        TensorReport(f"timm_model.layer{n}.weight", 10, 0.5 + 0.001 * n, 0.3, 0.9, 0.4)
        for n in range(count)
    ]
    return ShrinkReport(tuple(tensors), ("norm.weight",), DashConfig(lam=0.25), 20, 2560, 1.0)


def legend_of(figure):
    return figure.legends[0] if figure.legends else figure.axes[0].get_legend()


def test_a_figure_of_several_starts_and_seeds_is_drawn(tmp_path):
    plot_rounds(some_records(["cold", "dash"], (1, 2, 3)), tmp_path / "rounds.png")
    pixels = matplotlib.image.imread(tmp_path / "rounds.png")
    assert pixels.shape == (540, 1650, 4)
    colors = {tuple(c) for c in pixels[:, :, :3].reshape(-1, 3).round(2).tolist()}
    assert len(colors) > 10
    assert [file.name for file in tmp_path.iterdir()] == ["rounds.png"]


def test_one_record_is_enough(tmp_path):
    plot_rounds([record()], tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 1000


def test_lines_are_the_means_and_the_cost_adds_up(figures):
    records = some_records(["dash"], (1, 2, 3))
    # A start of its own from round 2 on, in an order of its own: 2.5 seconds a round, then 7.
    records += [record("warm", 0, 3, train_seconds=6.5, steps=7), record("warm", 0, 2, steps=5)]
    plot_rounds(records, "unused.png")
    accuracy, steps, seconds = (
        [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines]
        for axes in figures[0].axes
    )
    assert accuracy[0] == ([1, 2, 3], pytest.approx([20, 30, 40]))
    assert steps == [([1, 2, 3], [10, 20, 30]), ([2, 3], [5, 7])]
    assert seconds == [([1, 2, 3], [2.5, 5, 7.5]), ([2, 3], [2.5, 9.5])]


def test_eight_starts_are_told_apart_and_named_outside_the_panels(figures):
    plot_rounds(some_records(EIGHT, range(1, 51)), "unused.png")
    figure = figures[0]
    for axes in figure.axes:
        assert axes.get_legend() is None
        assert len({line.get_color() for line in axes.lines}) == 8
        assert len({line.get_marker() for line in axes.lines}) == 8
        assert len(axes.collections) == 8, "the bands"
        assert len(axes.get_xticks()) < 15
    figure.draw_without_rendering()
    legend = legend_of(figure)
    assert [text.get_text() for text in legend.get_texts()] == EIGHT
    box = legend.get_window_extent()
    assert not any(box.overlaps(axes.get_tightbbox()) for axes in figure.axes)


def test_a_ninth_start_is_dashed(figures):
    plot_rounds(some_records([*EIGHT, "ninth"], (1, 2)), "unused.png")
    for axes in figures[0].axes:
        assert [line.get_linestyle() for line in axes.lines] == ["-"] * 8 + ["--"]


def test_few_starts_are_named_inside(figures):
    plot_rounds(some_records(EIGHT[:4], (1, 2)), "unused.png")
    assert not figures[0].legends
    assert [text.get_text() for text in legend_of(figures[0]).get_texts()] == EIGHT[:4]


def test_rounds_are_whole_numbers(figures):
    plot_rounds(some_records(["cold"], (1, 2)), "unused.png")
    low, high = figures[0].axes[0].get_xlim()
    assert [tick for tick in figures[0].axes[0].get_xticks() if low <= tick <= high] == [1, 2]


def some_pretraining(names):
    """Records of two seeds, pre-trained for 2 and 5 epochs, two starts after either."""
    records = []
    for seed in (0, 1):
        parent = None
        records.append(record("cold", seed, accuracy=0.5 + 0.2 * seed))
        for index, epochs in ((1, 2), (2, 3)):
            records.append(record("pretraining", seed, index, epochs=epochs, parent=parent))
            parent = records[-1].folder
            for start, share in (("warm", 1.0), ("dash", 0.5)):
                known = dict.fromkeys(names, 0.4 * index)
                sides = {"before": known, "after": {name: share * known[name] for name in names}}
                parts = {"parent": parent, "accuracy": 0.1 * index, "memorization": sides}
                records.append(record(start, seed, index + 1, **parts))
    return records


def test_lengths_of_pretraining_are_drawn_beside_training_from_scratch(figures):
    plot_pretraining(some_pretraining(["accuracy_old", "flipped_reproduced"]), "unused.png")
    accuracy, old, wrong = (
        [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines]
        for axes in figures[0].axes
    )
    assert accuracy[0] == ([2, 5], pytest.approx([60, 60]))
    assert accuracy[1:] == [([2, 5], pytest.approx([10, 20]))] * 2
    assert old == wrong
    warm, dash, before = old
    assert warm == before == ([2, 5], pytest.approx([40, 80]))
    assert dash == ([2, 5], pytest.approx([20, 40]))
    names = [text.get_text() for text in legend_of(figures[0]).get_texts()]
    assert names == ["cold, from scratch", "warm", "dash", "before any start"]
    assert all(len(axes.collections) == len(axes.lines) for axes in figures[0].axes), "the bands"


def test_without_wrong_labels_there_is_no_panel_of_them(figures, tmp_path):
    plot_pretraining(some_pretraining(["accuracy_old"]), "unused.png")
    assert [axes.get_title() for axes in figures[0].axes] == [
        "Held-out accuracy",
        "Old labels known",
    ]
    with pytest.raises(ValueError, match="records must be of run_pretraining"):
        plot_pretraining(some_records(["cold", "dash"], (1, 2)), tmp_path / "none.png")
    assert not list(tmp_path.iterdir())


def test_factors_are_drawn_in_the_order_of_the_model(figures):
    plot_factors(some_report(), "unused.png")
    (axes,) = figures[0].axes
    assert [t.get_text() for t in axes.get_yticklabels()] == [f"layer{n}.weight" for n in range(3)]
    assert axes.yaxis_inverted(), "the first layer is on top"
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["mean"].get_xdata().tolist() == pytest.approx([0.5, 0.501, 0.502])
    assert lines["mean"].get_ydata().tolist() == [0, 1, 2]
    assert set(lines["λ = 0.25"].get_xdata()) == {0.25}
    (bars,) = axes.collections
    assert [bar.tolist() for bar in bars.get_segments()] == [
        [[0.3, row], [0.9, row]] for row in range(3)
    ]
    assert axes.get_title() == "Factors of the shrink: mean 0.501, 40% of the vectors at λ"


def test_sixty_names_do_not_overlap(figures):
    plot_factors(some_report(60), "unused.png")
    figures[0].draw_without_rendering()
    boxes = [label.get_window_extent() for label in figures[0].axes[0].get_yticklabels()]
    assert len(boxes) == 60
    assert not any(above.overlaps(below) for above, below in pairwise(boxes))


def test_a_record_a_report_and_its_dict_give_the_same_file(tmp_path):
    report = some_report()
    forms = [report, report.to_dict(), record(round_index=2, shrink=report.to_dict())]
    for number, form in enumerate(forms):
        plot_factors(form, tmp_path / f"{number}.png")
    first, *others = [(tmp_path / f"{number}.png").read_bytes() for number in range(3)]
    assert others == [first, first]


@pytest.mark.parametrize(
    ("shrink", "message"),
    [
        (record("warm", 0, 2), "began with a shrink, got start 'warm', round 2"),
        ({"tensors": []}, r"but has no \['config', 'mean_factor', 'share_at_lam'\]"),
    ],
)
def test_what_holds_no_factors_is_refused(shrink, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plot_factors(shrink, tmp_path / "none.png")
    assert not list(tmp_path.iterdir())


def some_simulations(experiments=12, seeds=(0, 1), **sizes):
    sizes = {"num_points": 40, "gamma": 4, "num_test_points": 100, **sizes}
    return [
        simulate(start, seed=seed, num_experiments=experiments, **sizes)
        for start in ("random", "warm", "ideal", "partial")
        for seed in seeds
    ]


def test_simulations_are_lines_over_experiments(figures):
    runs = some_simulations()
    plot_simulations({"gamma=4": runs}, "unused.png")
    (row,) = figures[0].subfigs
    assert row.get_suptitle() == "gamma=4"
    values = [
        [100 * one.accuracy for one in runs],
        [one.learned_features for one in runs],
        [one.nonzero_points for one in runs],
    ]
    for axes, lines in zip(row.axes, values, strict=True):
        for number, line in enumerate(axes.lines):
            assert line.get_xdata().tolist() == list(range(1, 13))
            first, second = lines[2 * number : 2 * number + 2]
            assert line.get_ydata().tolist() == pytest.approx(((first + second) / 2).tolist())
        assert len({line.get_color() for line in axes.lines}) == 4
        assert len(axes.collections) == 4, "the bands"
    names = [text.get_text() for text in row.axes[2].get_legend().get_texts()]
    assert names == ["random", "warm", "ideal", "partial"]


def test_every_setting_is_a_row_and_may_have_its_own_length(figures, tmp_path):
    settings = {f"{n}": some_simulations(n, seeds=[0]) for n in (3, 1)}
    plot_simulations(settings, tmp_path / "unused.png")
    rows = figures[0].subfigs
    assert [row.get_suptitle() for row in rows] == ["3", "1"]
    assert [len(row.axes[0].lines[0].get_xdata()) for row in rows] == [3, 1]
    assert not rows[0].axes[0].collections, "one seed has no band"


@pytest.mark.parametrize(
    ("lengths", "message"),
    [((2, 3), r"simulations\['x'\] must .* got \[2, 3\]"), ((), r"got \[\]")],
)
def test_simulations_that_fit_no_panel_are_refused(lengths, message, tmp_path):
    runs = [simulate("warm", num_experiments=n, num_points=10, num_test_points=0) for n in lengths]
    with pytest.raises(ValueError, match=message):
        plot_simulations({"x": runs}, tmp_path / "none.png")
    with pytest.raises(ValueError, match="at least one setting"):
        plot_simulations({}, tmp_path / "none.png")
    assert not list(tmp_path.iterdir())
