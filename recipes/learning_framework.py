"""The paper's learning framework: why a warm start generalizes worse, in a figure and a table.

Launch:  accelerate launch recipes/learning_framework.py
         accelerate launch recipes/learning_framework.py --sweep gamma 25 50 100
         accelerate launch recipes/learning_framework.py --starts warm ideal partial \
             --forget_share 0.2 --num_experiments 20

Test accuracy, learned features and points with a gradient over experiments (Shin et al. 2024,
section 3): mean ± one standard deviation over seeds. ``simulations.png`` is the figure, a row of
panels per setting; ``simulations.csv`` holds every number of every seed. Flags: those below, and
the fields of hf_dash's FrameworkConfig.
"""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from accelerate import Accelerator
from transformers import HfArgumentParser

import hf_dash


@dataclass
class Arguments:
    starts: list[str] = field(default_factory=lambda: ["random", "warm", "ideal", "partial"])
    seeds: int = field(default=10, metadata={"help": "Seeds 0, 1, … of the data."})
    sweep: list[str] = field(
        default_factory=list,
        metadata={"help": "A flag of the framework and the values it takes in turn."},
    )
    output_dir: str = "runs/learning_framework"


def settings_of(sweep, framework):
    """Return the settings to simulate, by their names."""
    kinds = {one.name: type(getattr(framework, one.name)) for one in fields(framework)}
    if not sweep:
        settings = [framework]
    elif sweep[0] not in kinds or len(sweep) < 2:
        raise ValueError(
            f"sweep must be one of {list(kinds)} and at least one value, got {' '.join(sweep)!r}"
        )
    else:
        name, *values = sweep
        settings = [replace(framework, **{name: kinds[name](value)}) for value in values]
    names = {"num_classes": "C", "num_features": "K", "num_points": "N", "gamma": "γ", "tau": "τ"}
    if sweep:
        names[sweep[0]] = names.get(sweep[0], sweep[0])
    return {
        " ".join(f"{letter}={getattr(one, name)}" for name, letter in names.items()): one
        for one in settings
    }


def main():
    args, framework = HfArgumentParser(
        (Arguments, hf_dash.studies.FrameworkConfig)
    ).parse_args_into_dataclasses()
    if args.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {args.seeds}")
    settings = settings_of(args.sweep, framework)
    if not Accelerator().is_main_process:
        return
    simulations = {
        name: [
            hf_dash.studies.simulate(start, seed=seed, config=setting)
            for start in args.starts
            for seed in range(args.seeds)
        ]
        for name, setting in settings.items()
    }
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    hf_dash.studies.write_simulations(simulations, output_dir / "simulations.csv")
    hf_dash.studies.plot_simulations(simulations, output_dir / "simulations.png")
    print(hf_dash.studies.simulations_table(simulations), end="\n\n")
    print(f"figure and numbers: {output_dir}")


if __name__ == "__main__":
    main()
