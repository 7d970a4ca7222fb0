"""Tables over whole experiments."""

import json

import pytest
from helpers import record

from hf_dash.history import History
from hf_dash.report import (
    grounds_table,
    paired_table,
    setup_text,
    verdict_text,
    verdicts_table,
    write_evidence,
)

ABOUT = {
    "commands": ["train \\\n    --seeds 2", "compare"],
    "commits": ["d4ea7da", "17afb7e"],
    "network": "ResNet",
    "machine": "two cores",
    "ground": "noisy | labels",
}


def records(**accuracies):
    """Two rounds of each start: the accuracies of the last one by seed."""
    return [
        record(start.replace("__", "+"), seed, index, accuracy=accuracy, steps=steps)
        for start, by_seed in accuracies.items()
        for seed, accuracy in enumerate(by_seed)
        for index, steps in ((1, 10), (2, 30 if start == "cold" else 20 + seed))
    ]


def test_a_setup_says_what_it_takes_to_repeat_an_experiment(tmp_path):
    own = [
        record(seed=2, hardware="1 × cpu, fp32", versions={"torch": "2.14.1", "timm": "1.0.31"}),
        record(seed=10, hardware="1 × cuda, bf16", versions={"torch": "2.15.0", "timm": "1.0.31"}),
    ]
    write_evidence(History(None, {}, own), tmp_path, about=ABOUT)
    assert setup_text(tmp_path).splitlines() == [
        "```bash",
        "train \\",
        "    --seeds 2",
        "compare",
        "```",
        "",
        "- Network: ResNet",
        "- Seeds: 2, 10",
        "- Commits: `d4ea7da`, `17afb7e`",
        "- Hardware: two cores, 1 × cpu, fp32, 1 × cuda, bf16",
        "- Versions: torch 2.14.1, timm 1.0.31, torch 2.15.0",
    ]


def test_a_setup_without_records_says_what_was_said(tmp_path):
    about = {"commands": ["measure"], "network": "none", "machine": "two cores"}
    (tmp_path / "settings.json").write_text(json.dumps({"about": about}))
    lines = ["```bash", "measure", "```", "", "- Network: none", "- Hardware: two cores"]
    assert setup_text(tmp_path).splitlines() == lines


def test_grounds_repeat_the_paired_table_and_name_the_best_rival(tmp_path):
    own = records(
        cold=[0.5, 0.6, 0.5],
        warm=[0.4, 0.5],
        fire__fire_steps_5=[0.7, 0.7],
        head_reset=[0.1, 0.1],
        dash=[0.7, 0.6, 0.7],
        dash__lam_0=[0.9, 0.9],
    )
    write_evidence(History(None, {}, own), tmp_path / "two", about=ABOUT)
    lone = records(cold=[0.5], warm=[0.4], dash=[0.75])
    write_evidence(History(None, {}, lone), tmp_path / "one", about=ABOUT)
    table = grounds_table([tmp_path / "two", tmp_path / "one"]).splitlines()
    header, _, two, one = ([c.strip() for c in line.strip("| ").split(" | ")] for line in table)
    assert header[2:] == ["seeds", "dash vs. cold", "vs. warm", "vs. best rival", "steps vs. cold"]
    assert two[:3] == ["[two](two/README.md): noisy \\| labels", "ResNet", "3"]
    paired = next(x for x in paired_table(own, "cold").splitlines() if x.startswith("| dash "))
    _, _, points, _, steps, _ = (cell.strip() for cell in paired.strip("| ").split(" | "))
    assert points.startswith("+13.33 (")
    assert two[3].startswith("+13.3 (")
    assert f"× {two[6]}" == steps
    assert two[4].startswith("+20.0 (")
    assert two[5].startswith("-5.0 (")
    assert two[5].endswith(") fire")
    assert one[2:] == ["1", "+25.0", "+35.0", "–", "0.67"]


def test_an_experiment_without_a_start_has_no_ground(tmp_path):
    write_evidence(History(None, {}, records(cold=[0.5], dash=[0.5])), tmp_path, about=ABOUT)
    with pytest.raises(
        ValueError, match=r"must have the starts \['warm'\], got \['cold', 'dash'\]"
    ):
        grounds_table([tmp_path])


@pytest.mark.parametrize(
    ("dash", "difference", "within"),
    [
        # 0.5 below in every seed; 0, 0.5 and 1 below (0.5 ± 1.24); 1.5 below.
        ([0.495, 0.595, 0.495], "-0.5 (-0.5 … -0.5)", "yes"),
        ([0.500, 0.595, 0.490], "-0.5 (-1.7 … +0.7)", "on average"),
        ([0.485, 0.585, 0.485], "-1.5 (-1.5 … -1.5)", "no"),
    ],
)
def test_verdicts_say_whether_a_start_harms(tmp_path, dash, difference, within):
    own = records(cold=[0.49, 0.59, 0.49], warm=[0.5, 0.6, 0.5], dash=dash)
    write_evidence(History(None, {}, own), tmp_path / "tuned", about=ABOUT)
    cells = verdicts_table([tmp_path / "tuned"]).splitlines()[-1].strip("| ").split(" | ")
    assert [cell.strip() for cell in cells[2:]] == [
        "+1.0 (+1.0 … +1.0)",
        difference,
        within,
        "0.25",  # already after round 1, 10 of cold's 40 steps
        "warm",
    ]
    assert "keep warm" in verdict_text(tmp_path / "tuned")
