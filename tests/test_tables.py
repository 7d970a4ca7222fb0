from test_history import record

from hf_dash import rounds_table, starts_table
from hf_dash.tables import markdown_table


def test_a_table_is_laid_out():
    assert markdown_table(["a", "number"], [["x|y", "1"], ["z", "23"]]).splitlines() == [
        "| a    | number |",
        "| ---- | -----: |",
        "| x\\|y |      1 |",
        "| z    |     23 |",
    ]


def test_rounds_show_their_numbers_and_mark_what_did_not_converge():
    text = rounds_table([record(), record(round_index=2, converged=False, accuracy=0.25)])
    lines = text.splitlines()
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert cells == ["warm", "0", "2", "20", "25.00%", "30*", "2.5", "0.50"]
    assert lines[-1].endswith("before convergence")
    assert "*" not in rounds_table([record(converged=None)])


def test_starts_are_averaged_over_seeds():
    records = [
        record("dash", seed, index, accuracy=0.1 * index + 0.2 * seed, steps=10 * index)
        for seed in (0, 1)
        for index in (1, 2, 3)
    ]
    cells = [cell.strip() for cell in starts_table(records).splitlines()[2].strip("|").split("|")]
    # Last round: 0.3 and 0.5, whose sample standard deviation is 0.2 / √2; rounds 2, 3: means of
    # 0.2, 0.3 and of 0.4, 0.5. Steps of rounds 2, 3: 25. Seconds: three rounds of 2.5 and 0.5.
    assert cells == [
        "dash",
        "2",
        "40.00 ± 14.14 %",
        "35.00 ± 14.14 %",
        "30 ± 0",
        "25 ± 0",
        "7.5 ± 0.0",
        "1.50 ± 0.00",
    ]


def test_one_seed_has_no_spread():
    assert "±" not in starts_table([record(), record(round_index=2)])
