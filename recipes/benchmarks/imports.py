"""What an import costs: hf_dash's first line beside those of the libraries it builds on.

Launch:  accelerate launch recipes/benchmarks/imports.py

Each import runs in a new Python process; the time is the CPU time of that process, a bare
interpreter's included. The imports take turns, so a busy machine slows all of them alike.
"""

import resource
import statistics
import subprocess
import sys
from dataclasses import dataclass

from transformers import HfArgumentParser

import hf_dash

IMPORTS = [
    "import torch",
    "from hf_dash import dash_shrink_",
    "from hf_dash import DashCallback",
    "import transformers",
    "from transformers import Trainer",
    "import datasets",
    "import timm",
]


@dataclass
class Arguments:
    repeats: int = 5


def cpu_seconds(code):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    for code in IMPORTS:
        cpu_seconds(code)  # reads the files from disk once
    seconds = {code: [] for code in IMPORTS}
    for _ in range(args.repeats):
        for code in IMPORTS:
            seconds[code].append(cpu_seconds(code))
    medians = {code: statistics.median(times) for code, times in seconds.items()}
    rows = [
        [f"`{code}`", f"{median:.2f}", f"× {median / medians['import torch']:.2f}"]
        for code, median in medians.items()
    ]
    header = ["import", "CPU seconds, median", "vs. `import torch`"]
    print(hf_dash.report.markdown_table(header, rows))


if __name__ == "__main__":
    main()
