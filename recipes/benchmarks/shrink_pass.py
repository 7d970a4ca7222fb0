"""What the shrink costs, side by side in one run, on timm's ResNet-18 at 32×32.

Launch:  accelerate launch recipes/benchmarks/shrink_pass.py
         accelerate launch recipes/benchmarks/shrink_pass.py --dtype bfloat16 --time_limit 60

(a) bare forward and backward over the minibatches our pass reads; (b) our pass and shrink; (c) the
pass over all data as published, on a deep copy; (d) DASH-pytorch where it is installed, over all
data. Images are random: only their number matters. The ways take turns; medians over the repeats.
Memory: the peak beyond that of (a) with every gradient dropped as it comes (Linux or CUDA).
"""

import importlib.util
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from transformers import HfArgumentParser

import hf_dash
from hf_dash.method.reference import published_pass_


@dataclass
class Arguments:
    rounds: list[int] = field(default_factory=lambda: [5, 10, 50])
    repeats: int = 5
    batch_size: int = 128
    dtype: str = "float32"
    channels_last: bool = False
    time_limit: float = field(default=math.inf, metadata={"help": "Begins no more after these."})
    peak_of: str | None = field(default=None, metadata={"help": "Used by the recipe itself."})


def prepare(args, images):
    torch.manual_seed(0)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    placing = {"device": device, "dtype": getattr(torch, args.dtype), "memory_format": layout}
    model = timm.create_model("resnet18", num_classes=10).to(**placing).eval()
    # One batch of pixels serves all, or the data would hide the memory of the pass.
    pixels = torch.randn(args.batch_size, 3, 32, 32).to(**placing)
    labels = torch.randint(0, 10, (images,)).to(device).split(args.batch_size)
    return model, [(pixels[: len(part)], part) for part in labels]


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def dropped(model, batches):
    def drop(parameter):
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(drop) for p in model.parameters()]
    for batch in batches[-hf_dash.DashConfig().newest :]:
        loss_of(model, batch).backward()
    for hook in hooks:
        hook.remove()


def bare(model, batches):
    for batch in batches[-hf_dash.DashConfig().newest :]:
        loss_of(model, batch).backward()
        model.zero_grad()


def dash_pytorch(model, batches):
    from DASH.DASH import AdamW

    optimizer = AdamW(model.parameters(), min_shrink_thres=0.3, grad_ema_decay=0.7)
    for batch in batches:
        loss_of(model, batch).backward()
        optimizer.step(only_update_grad_ema=True)
        optimizer.zero_grad()
    optimizer.shrink_params()


WAYS = {"dropped": dropped, "a": bare, "d": dash_pytorch}
WAYS["b"] = partial(hf_dash.dash_shrink_, loss_fn=loss_of, disable_tqdm=True)
WAYS["c"] = partial(published_pass_, loss_fn=loss_of)


def seconds(way, args, images):
    model, batches = prepare(args, images)
    dropped(model, batches[:1])
    next(model.parameters()).sum().item()  # waits for the device
    started = time.perf_counter()
    WAYS[way](model, batches)
    next(model.parameters()).sum().item()
    return time.perf_counter() - started


def own_peak(args):
    """Print the peak bytes of this process while it goes the way once, over five rounds."""
    model, batches = prepare(args, 5000)
    dropped(model, batches[:1])
    if batches[0][0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    WAYS[args.peak_of](model, batches)
    resident = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    print(torch.cuda.max_memory_allocated() if batches[0][0].is_cuda else 1024 * resident)


def peak(way, args):
    command = [sys.executable, __file__, "--peak_of", way, "--dtype", args.dtype]
    command += ["--channels_last"] if args.channels_last else []
    # Large blocks go back to the system at once, so that the peak is of what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    return int(subprocess.check_output(command, env=environment, text=True).split()[-1])


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if args.peak_of is not None:
        return own_peak(args)
    ways = [way for way in "abcd" if way != "d" or importlib.util.find_spec("DASH")]
    rows, until = [], time.monotonic() + args.time_limit
    for rounds in takewhile(lambda _: not rows or time.monotonic() < until, args.rounds):
        left = takewhile(lambda n: n == 0 or time.monotonic() < until, range(args.repeats))
        # In turn, so that whatever else the machine does hits all of them.
        runs = [{w: seconds(w, args, 1000 * rounds) for w in ways} for _ in left]
        times = [f"{statistics.median(run[way] for run in runs):.2f} s" for way in ways]
        ratios = sorted(run["b"] / run["a"] for run in runs)
        saved = statistics.median(run["c"] / run["b"] for run in runs)
        spread = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} … {ratios[-1]:.3f})"
        rows.append([f"{rounds} × 1,000 ({len(runs)})", *times, spread, f"1/{saved:.1f}"])
        print(rows[-1], flush=True)
    if time.monotonic() < until:
        model, _ = prepare(args, 1)
        size, base = sum(p.nbytes for p in model.parameters()), peak("dropped", args)
        extra = (f"{(peak(way, args) - base) / size:.2f}" for way in ways)
        rows.append(["extra memory / parameters", *extra, "", ""])
    header = ["images (repeats)", *(f"({way})" for way in ways), "b / a", "b / c"]
    print(hf_dash.report.markdown_table(header, rows))


if __name__ == "__main__":
    main()
