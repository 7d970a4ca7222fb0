"""All that waits for a GPU, within one limit: steps, ResNet-18's 50 rounds, the shrink, GPU tests.

Launch:  accelerate launch recipes/benchmarks/gpu_session.py --dataset_name ../shared/data/cifar10
         accelerate launch recipes/benchmarks/gpu_session.py --tiny --time_limit 600

Every stage is a command with seconds of its own, and ends by its limit: (a) what a step costs,
compiled or not; (b) the starts side by side, whole ones before half ones, (c) among them the
control, which multiplies every weight by one factor, (d) then a second seed; (e) what the shrink
costs by precision; (f) the GPU tests. What was printed and the histories, never weights, go to
``--output_dir``. ``--tiny`` tries all of it on a small network, on the CPU too.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser

import hf_dash

RECIPES = Path(__file__).resolve().parents[1]
TESTS = RECIPES.parent / "tests"
STARTS = ["cold", "warm", "dash", "shrink_perturb", "fire", "dash+preset=paper"]


@dataclass
class Arguments:
    output_dir: str = "runs/gpu_session"
    dataset_name: str = "digits"
    time_limit: float = field(default=540, metadata={"help": "Seconds for all stages."})
    starts: list[str] = field(default_factory=lambda: STARTS, metadata={"help": "Best ones first."})
    seeds: str = field(default="2", metadata={"help": "As for continual_rounds.py."})
    num_parallel_starts: int = 4
    num_rounds: int = 50
    control_factor: float = field(default=0.35, metadata={"help": "In (c); 0: without."})
    start_seconds: float = field(default=250, metadata={"help": "Of these, at most, for (b)."})
    tiny: bool = field(default=False, metadata={"help": "A small network, few images and rounds."})
    stages: list[str] = field(default_factory=lambda: ["step", "starts", "shrink", "tests"])


def launched(script, *flags, precision="no", dynamo=()):
    """Return the command that launches a recipe on this machine's device."""
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    how = ["--num_processes", "1", "--mixed_precision", precision]
    return [*accelerate, *how, *dynamo, str(RECIPES / script), *flags]


def step_stages(args):
    """What a step costs: the same images and batches as in the starts."""
    flags = "--num_examples 4000 --batch_size 125 --image_size 64 --channels_last --time_limit"
    if args.tiny:
        flags = "--model test_resnet --num_examples 32 --batch_size 16 --repeats 1 --time_limit"
    mode = [] if torch.cuda.is_available() else ["--mode", ""]
    train = ("benchmarks/train_step.py", *flags.split())
    yield "step_bf16", 100, launched(*train, "40", *mode, precision="bf16")
    yield "step_fp32", 30, launched(*train, "5", "--mode", "")


def start_stages(args, runs):
    """The authors' plain training, one history a start. 125 images divide every round."""
    rounds = 2 if args.tiny else args.num_rounds
    flags = f"--dataset_name {args.dataset_name} --num_rounds {rounds} --seeds {args.seeds}"
    flags += f" --output_dir {runs} --num_parallel_starts {args.num_parallel_starts} --on_device"
    flags += f" --starts {' '.join(args.starts)}"
    if args.control_factor > 0:
        flags += f" shrink_perturb+perturb_lam={args.control_factor}+perturb_sigma=0"
    flags += " --training_preset plain --no_reset_optimizer --channels_last"
    flags += " --save_total_limit 1 --disable_tqdm"
    flags += " --cuda_graphs" if torch.cuda.is_available() else ""
    if args.tiny:
        flags += " --architecture test_resnet --max_epochs 1 --examples_per_round 40"
        return [("starts", args.start_seconds, launched("continual_rounds.py", *flags.split()))]
    flags += " --examples_per_round 1000 --train_batch_size 125 --max_epochs 1000 --image_size 64"
    network = ["--architecture", "resnet18", "--model_args", '{"zero_init_last": false}']
    command = ("continual_rounds.py", *flags.split(), *network)
    how = {"precision": "bf16", "dynamo": ["--dynamo_backend", "inductor"]}
    return [("starts", args.start_seconds, launched(*command, **how))]


def shrink_stages(args):
    for dtype in ["float32", "bfloat16"][: 1 if args.tiny else 2]:
        flags = f"--dtype {dtype} --time_limit 10 --channels_last"
        flags += " --rounds 1 --batch_size 250 --repeats 1 --time_limit 0" if args.tiny else ""
        yield f"shrink_{dtype}", 40, launched("benchmarks/shrink_pass.py", *flags.split())


def test_stages():
    marked = [path for path in sorted(TESTS.rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "-v"]
    return [("tests", 80, [*pytest, *map(str, marked)])]


def run(name, seconds, command, output):
    """Run a command to its end or its limit, what it prints goes to a file; return what it did."""
    begun = time.monotonic()
    with (output / f"{name}.txt").open("w") as file:
        file.write(shlex.join(command).replace(str(RECIPES.parent), ".") + "\n\n")
        file.flush()
        # A group of its own, so that the limit ends all its processes.
        streams = {"stdout": file, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, **streams, start_new_session=True)
        try:
            ended = f"exit code {process.wait(max(1, seconds))}"
        except subprocess.TimeoutExpired:
            ended = "at its limit"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return [name, f"{time.monotonic() - begun:.0f} s", ended]


def keep_histories(runs, output):
    """Copy histories and reports of the run, and of starts that the run has not come to yet."""
    for history in sorted(runs.glob("history.json*")) + sorted(runs.glob("starts/*/history.json*")):
        owner = "run" if history.parent == runs else history.parent.name
        shutil.copy(history, output / f"{owner}.{history.name}")
        for report in history.parent.glob("rounds/*/*/dash_report.json"):
            os.makedirs(output / report.parent.relative_to(history.parent), exist_ok=True)
            shutil.copy(report, output / report.relative_to(history.parent))


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    output, until, done = Path(args.output_dir), time.monotonic() + args.time_limit, []
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "run"
        by_name = {"step": step_stages(args), "starts": start_stages(args, runs)}
        by_name |= {"shrink": shrink_stages(args), "tests": test_stages()}
        for name, seconds, command in (stage for kind in args.stages for stage in by_name[kind]):
            left = until - time.monotonic()
            if left > 5:
                limit = left if args.tiny else min(seconds, left)
                done.append(run(name, limit, command, output))
                print(done[-1], flush=True)
            keep_histories(runs, output)
    print(hf_dash.report.markdown_table(["stage", "took", "ended"], done))


if __name__ == "__main__":
    main()
