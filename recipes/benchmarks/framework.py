"""How fast the learning framework runs beside its plain loops, side by side in one run.

Launch:  accelerate launch recipes/benchmarks/framework.py
         accelerate launch recipes/benchmarks/framework.py --loop_experiments 50 --repeats 1

(a) ``hf_dash.simulate`` at the paper's size; (b) the same with fewer experiments; (c) plain loops
with as many as (b), whose time grows with the square of the experiments. All take turns; medians
over the repeats, in seconds of this process alone, whatever else the machine does. Every number of
(b) and (c) must be equal. Last, the whole figure: all starts with (a)'s sizes, CSV and PNG.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from transformers import HfArgumentParser

import hf_dash
from hf_dash.method.reference import SIMULATED, reference_simulation


@dataclass
class Arguments:
    num_experiments: int = 50
    loop_experiments: int = 5
    num_test_points: int = 10_000
    repeats: int = 5
    figure_seeds: int = 10


STARTS = ("random", "warm", "ideal", "partial")


def timed(function, *args, **kwargs):
    started = time.process_time()
    result = function(*args, **kwargs)
    return result, time.process_time() - started


def draw(args, folder):
    sizes = {"num_experiments": args.num_experiments, "num_test_points": args.num_test_points}
    seeds = range(args.figure_seeds)
    runs = [
        hf_dash.studies.simulate(start, seed=seed, **sizes) for start in STARTS for seed in seeds
    ]
    hf_dash.studies.write_simulations({"": runs}, Path(folder) / "simulations.csv")
    hf_dash.studies.plot_simulations({"": runs}, Path(folder) / "simulations.png")


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    rows = []
    for start in STARTS:
        seconds = []
        for seed in range(args.repeats):
            sizes = {"seed": seed, "num_test_points": args.num_test_points}
            _, whole = timed(
                hf_dash.studies.simulate, start, num_experiments=args.num_experiments, **sizes
            )
            ours, fast = timed(
                hf_dash.studies.simulate, start, num_experiments=args.loop_experiments, **sizes
            )
            loops, slow = timed(reference_simulation, start, J=args.loop_experiments, **sizes)
            if loops != {name: getattr(ours, name).tolist() for name in SIMULATED}:
                raise RuntimeError(f"{start}, seed {seed}: the plain loops give other numbers")
            seconds.append((whole, fast, slow))
        medians = [statistics.median(column) for column in zip(*seconds, strict=True)]
        ratio = statistics.median(slow / fast for _, fast, slow in seconds)
        rows.append([start, *(f"{median:.3f} s" for median in medians), f"{ratio:.1f}"])
    counts = args.num_experiments, args.loop_experiments, args.loop_experiments
    names = [f"({w}) {n} experiments" for w, n in zip("abc", counts, strict=True)]
    print(hf_dash.report.markdown_table(["start", *names, "c / b"], rows))
    with tempfile.TemporaryDirectory() as folder:
        _, whole = timed(draw, args, folder)
    print(f"\n{args.figure_seeds} seeds of all starts with figure: {whole:.1f} s")


if __name__ == "__main__":
    main()
