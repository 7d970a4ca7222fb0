"""Starts of one seed side by side, each in a process of its own, on one device.

Flow: every start gets a folder of its own and the first round, which is trained once → a process
per start goes through the other rounds there → ``run_rounds`` takes its rounds over, start by
start, so that history and folders are those of a run of one start after the other.
One model of this size leaves most of a device idle: its processes share it. They also share the
decoded images, a byte per value, in one file per arrival (``hf_dash.data.pixel_cache``). With
``on_device`` each process keeps a copy of its round there: 150 MB for all of CIFAR-10. CUDA could
hand one copy to all, but only while this process lives and by handles that a restart loses.
"""

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, TorchDynamoPlugin
from transformers import PreTrainedModel

from hf_dash.data.examples import ImageExamples
from hf_dash.data.rounds import Round
from hf_dash.history import History, RoundRecord
from hf_dash.runs.continual import ALIKE, Run, has_every_round, run_rounds
from hf_dash.runs.start_folders import (
    hand_over,
    import_round,
    open_start,
    shared_first_round,
    start_folder,
)
from hf_dash.starts import find_start, need_state
from hf_dash.utils.checks import check_count
from hf_dash.utils.logging import get_logger

logger = get_logger(__name__)

# Never forked from this process, which may hold a device.
_METHOD = "forkserver" if os.name == "posix" else "spawn"

# Takes no arguments and gives a model with the run's first weights.
Create = Callable[[], PreTrainedModel]


def run_starts(
    create: Create,
    rounds: Sequence[Round],
    held_out: ImageExamples,
    runs: Sequence[Run],
    num_parallel_starts: int,
) -> None:
    """Train several starts of one seed side by side; ``run_rounds`` for each run then finds it all.

    A start that fails does not end the others. What is trained is kept in ``output_dir/starts``,
    and the same call continues. Interrupted or killed, this process takes the others with it.

    A process for a start is a fresh interpreter with the same number of threads, the same device,
    precision and compiler as the accelerator's; other global settings of torch are the default. It
    imports the script that calls, which must hold its calls behind ``__name__ == "__main__"``.

    Args:
        create: gives the model that the first round begins with; must be picklable.
        rounds: in order, from the first.
        held_out: as for :func:`run_rounds`.
        runs: one per start, with a name that :func:`~hf_dash.find_start` knows; alike but for it.
        num_parallel_starts: that train at the same time, at least 1. With 1 nothing is done here.

    Raises:
        ValueError: ``num_parallel_starts`` does not fit, or ``runs`` differ in more than the name,
            repeat a name, have no ``output_dir`` or have a ``parent``.
        TypeError: something given cannot be sent to another process.
        RuntimeError: starts failed; the message names each with its error.

    Example:
        >>> import hf_dash
        >>> hf_dash.runs.run_starts(lambda: None, [], None, [], 1)
    """
    check_count("num_parallel_starts", num_parallel_starts)
    if num_parallel_starts == 1 or not runs or not rounds:
        return
    check_parallel(num_parallel_starts, runs[0].accelerator)
    _check_alike(runs)
    task = _Task.of(create, list(rounds), held_out, runs)
    waiting = _prepare(create, rounds, held_out, runs)
    failed = _run_processes(task, waiting, num_parallel_starts)
    if failed:
        told = "; ".join(f"{name}: {error}" for name, error in failed.items())
        raise RuntimeError(
            f"of {len(runs)} starts side by side, {len(failed)} failed ({told}); what is trained is"
            " kept, and the same command continues"
        )


def check_parallel(num_parallel_starts: int, accelerator: Accelerator) -> None:
    """Check that starts can run side by side.

    Raises:
        TypeError: ``num_parallel_starts`` is not an integer.
        ValueError: it is less than 1, or more while a start takes several processes itself.

    Example:
        >>> import hf_dash
        >>> from accelerate import Accelerator
        >>> hf_dash.runs.check_parallel(4, Accelerator(cpu=True))
    """
    check_count("num_parallel_starts", num_parallel_starts)
    kind = accelerator.distributed_type
    if num_parallel_starts > 1 and kind != DistributedType.NO:
        raise ValueError(
            f"num_parallel_starts must be 1 with {accelerator.num_processes} processes of"
            f" {kind.value}, got {num_parallel_starts}: launch with one process"
        )


def _check_alike(runs: Sequence[Run]) -> None:
    first = runs[0]
    if first.output_dir is None or first.parent is not None:
        raise ValueError(
            "runs must have an output_dir and no parent to train side by side, got output_dir"
            f" {first.output_dir!r} and parent {first.parent!r}"
        )
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"runs must have different names, got {names}")
    for run in runs:
        find_start(run.name)
        if replace(run, name=first.name) != first:
            raise ValueError(f"runs must be alike but for their names, {run.name!r} is not")


@dataclass(frozen=True)
class _Task:
    """What a process for a start needs, all of it picklable."""

    content: bytes
    cpu: bool
    mixed_precision: str
    dynamo_plugin: TorchDynamoPlugin
    threads: int
    log_level: int
    folder: str
    environment: dict[str, str] = field(repr=False)

    @classmethod
    def of(
        cls, create: Create, rounds: list[Round], held_out: ImageExamples, runs: Sequence[Run]
    ) -> "_Task":
        """Return the task; nothing has been done if it cannot be."""
        plain = [
            replace(
                run,
                history=History(None, run.history.settings, may_differ=run.history.may_differ),
                accelerator=None,
                training=replace(run.training, disable_tqdm=True),
            )
            for run in runs
        ]
        try:
            content = pickle.dumps((create, rounds, held_out, plain))
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            raise TypeError(
                "create, rounds and held_out must be picklable for processes side by side, such as"
                f" a functools.partial of a module's function: {error}"
            ) from error
        accelerator = runs[0].accelerator
        return cls(
            content,
            cpu=accelerator.device.type == "cpu",
            mixed_precision=accelerator.mixed_precision,
            dynamo_plugin=accelerator.state.dynamo_plugin,
            threads=torch.get_num_threads(),
            log_level=get_logger("hf_dash").level,
            folder=os.getcwd(),
            environment=dict(os.environ),
        )

    def train(self, name: str) -> None:
        """Take the start of that name through all rounds, in its own folder."""
        os.environ.update(self.environment)
        os.chdir(self.folder)
        torch.set_num_threads(self.threads)
        get_logger("hf_dash").setLevel(self.log_level)
        accelerator = Accelerator(
            cpu=self.cpu, mixed_precision=self.mixed_precision, dynamo_plugin=self.dynamo_plugin
        )
        create, rounds, held_out, runs = pickle.loads(self.content)
        run = next(run for run in runs if run.name == name)
        folder = start_folder(run.output_dir, name, run.seed)
        with open_start(run.output_dir, run.history, name, run.seed) as history:
            own = replace(run, history=history, accelerator=accelerator, output_dir=folder)
            run_rounds(create(), rounds, held_out, find_start(name), own)


def _prepare(
    create: Create, rounds: Sequence[Round], held_out: ImageExamples, runs: Sequence[Run]
) -> list[str]:
    """Give every start its folder and its first round; return the names of unfinished ones."""
    last = rounds[-1].index
    with ExitStack() as stack:
        own = []
        for run in runs:
            if run.history.find(run.name, run.seed, last) is None:
                history = stack.enter_context(open_start(*_place(run), run.name, run.seed))
                hand_over(*_place(run), history, run.name, run.seed)
                folder = start_folder(_place(run)[0], run.name, run.seed)
                own.append(replace(run, history=history, output_dir=folder))
        _share_first_round(create, rounds[0], held_out, runs[0], own)
        return [run.name for run in own if run.history.find(run.name, run.seed, last) is None]


def _place(run: Run) -> tuple[str | Path, History]:
    """Return where a run keeps its rounds and their records."""
    assert run.output_dir is not None
    return run.output_dir, run.history


def _share_first_round(
    create: Create, first: Round, held_out: ImageExamples, whole: Run, own: Sequence[Run]
) -> None:
    """Give starts that lack it the first round: the whole run's, another start's, or a new one."""
    wanting = [
        run
        for run in own
        if not has_every_round(find_start(run.name))
        and run.history.find(run.name, run.seed, first.index) is None
    ]
    if not wanting:
        return
    state = need_state(whole.start_config, {}, [run.name for run in wanting])
    if not any(_first_of(run, first, state) for run in (whole, *own)):
        run_rounds(create(), [first], held_out, find_start(wanting[0].name), wanting[0])
    files, record = next(found for run in (whole, *own) if (found := _first_of(run, first, state)))
    for run in wanting:
        import_round(*_place(run), files, replace(record, start=run.name))


def _first_of(run: Run, first: Round, state: bool) -> tuple[Path, RoundRecord] | None:
    """Return the folder and the record of a first round that all starts share, where there is."""
    output_dir, history = _place(run)
    place = (history, output_dir, ALIKE, run.seed, first.fingerprint)
    record = shared_first_round(*place, with_state=state)
    return None if record is None else (Path(output_dir) / record.folder, record)


def _run_processes(task: _Task, names: Sequence[str], at_once: int) -> dict[str, str]:
    """Run a process per start, so many at once; return the errors of those that failed, by name."""
    queue, running, failed = list(names), dict[Any, _Process](), dict[str, str]()
    try:
        while queue or running:
            while queue and len(running) < at_once:
                process = _Process(task, queue.pop(0))
                running[process.sentinel] = process
            for sentinel in connection.wait(list(running)):
                process = running.pop(sentinel)
                error = process.error()
                if error is not None:
                    failed[process.name] = error
                    logger.warning("%s has failed: %s", process.name, error)
    finally:
        for process in running.values():
            process.stop()
    return failed


class _Process:
    """A start in a process of its own."""

    def __init__(self, task: _Task, name: str) -> None:
        context: Any = multiprocessing.get_context(_METHOD)
        self.name = name
        self._errors, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_go, args=(task, name, sender), name=name)
        self._process.start()
        sender.close()
        self.sentinel = self._process.sentinel

    def error(self) -> str | None:
        """Return what went wrong in a process that has ended; None if nothing."""
        self._process.join()
        if self._process.exitcode == 0:
            return None
        try:
            return str(self._errors.recv())
        except EOFError:
            return f"its process ended with exit code {self._process.exitcode}"

    def stop(self) -> None:
        self._process.kill()
        self._process.join()


def _go(task: _Task, name: str, errors: "connection.Connection[str, Any]") -> None:
    """Take one start through its rounds, in a process of its own."""
    # The parent is interrupted too, and stops this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        task.train(name)
    except Exception as error:
        traceback.print_exc()
        # Short enough to wait in the pipe until this process has ended.
        errors.send(f"{type(error).__name__}: {error}"[:2000])
        raise SystemExit(1) from None


def _end_with_parent() -> None:
    """End this process, at once, when its parent has ended: rounds on disk are whole anyway."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
