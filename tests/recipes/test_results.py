"""What is committed as evidence: tables are those of their data."""

import csv
import itertools
import re

import numpy as np
import pytest
from helpers import REPOSITORY

import hf_dash

README = (REPOSITORY / "recipes" / "results" / "README.md").read_text()


SIMULATIONS = sorted(
    (REPOSITORY / "recipes" / "results" / "learning_framework").rglob("simulations.csv")
)


@pytest.mark.parametrize("path", SIMULATIONS, ids=lambda path: path.parent.name)
def test_the_committed_simulations_are_those_of_their_csv(path):
    simulations = {}
    names = ("accuracy", "learned_features", "nonzero_points", "memorized_points")
    with path.open(encoding="utf-8", newline="") as file:
        by_run = itertools.groupby(
            csv.DictReader(file), lambda row: (row["setting"], row["start"], row["seed"])
        )
        for (setting, start, seed), own in by_run:
            lines = [[float(row[name]) for name in names] for row in own]
            one = hf_dash.studies.Simulation(start, int(seed), *np.array(lines).T)
            simulations.setdefault(setting, []).append(one)
    assert hf_dash.studies.simulations_table(simulations) in README
    # The last run once more: C, K, N, γ and τ are in the setting's name.
    setting, group = list(simulations.items())[-1]
    flags = ("num_classes", "num_features", "num_points", "gamma", "tau")
    sizes = (int(part.split("=")[1]) for part in setting.split())
    again = hf_dash.studies.simulate(
        "partial", seed=group[-1].seed, **dict(zip(flags, sizes, strict=True))
    )
    for name in names:
        assert getattr(group[-1], name).tolist() == getattr(again, name).tolist()


RESULTS = sorted((REPOSITORY / "recipes" / "results").glob("*/history.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_committed_tables_are_those_of_their_histories(path):
    records = hf_dash.read_history(path).records
    lengths = any(record.start == "pretraining" for record in records)
    table = hf_dash.studies.pretraining_table if lengths else hf_dash.report.starts_table
    assert table(records) in README
    assert f"`{path.parent.name}`" in README


COMPARED = [part for part in re.split(r"(?m)^(?=## )", README) if "| beside " in part]


@pytest.mark.parametrize("section", COMPARED, ids=lambda section: section.split(":")[0])
def test_committed_comparisons_are_those_of_the_history_in_their_heading(section):
    (name,) = re.findall(r"^## `(\w+)`", section)
    records = hf_dash.read_history(
        REPOSITORY / "recipes" / "results" / name / "history.json"
    ).records
    for table in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE):
        header = [cell.strip() for cell in table.split("\n", 1)[0].split("|")]
        if header[1].startswith("beside "):
            assert table.strip() == hf_dash.report.paired_table(
                records, header[1].removeprefix("beside ")
            )
        if "reached in round" in header:
            assert table.strip() == hf_dash.report.price_table(records, "cold")


def test_the_table_of_grounds_repeats_their_own():
    (table,) = re.findall(r"^\| DASH beside cold on.*\n(?:^\|.*\n)+", README, re.MULTILINE)
    for line in table.splitlines()[2:]:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        path = REPOSITORY / "recipes" / "results" / name.strip("`") / "history.json"
        own = hf_dash.report.paired_table(hf_dash.read_history(path).records, "cold").splitlines()
        assert ["dash", *cells] in [
            [cell.strip() for cell in row.strip("|").split("|")] for row in own
        ]


def test_the_table_in_front_is_that_of_its_history():
    path = REPOSITORY / "recipes" / "results" / "cifar10_small" / "history.json"
    records = hf_dash.read_history(path).records
    assert hf_dash.report.paired_table(records, "cold") in (REPOSITORY / "README.md").read_text()
