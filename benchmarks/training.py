"""What a training step costs, and what each way of saving is worth, on the embedded backbone.

    python benchmarks/training.py                       # about ten minutes; prepares data/easyvqa if it is not there
    python benchmarks/training.py --root DIR --rounds 3

Sides take turns, step by step and on the same task, in one process of one thread; figures come from the medians of each
task's steps.  The last line is JSON:

- ``gan_over_ce``: time of an adversarial step over one of cross entropy alone (``loss.adversarial_weight=0``), both with three
  DeepSpeed engines' bookkeeping and with every option on, where it is highest; ``gan_over_ce_default``: with none.
- ``options``: for each, ``ratio``, samples a second with it alone over without it, in plain PyTorch
  (``benchmarks/plain_training.py``, which names what else an option needs), reading of data left out; and
  ``max_gradient_error``, the largest difference of a gradient over the gradient's largest value, in float64.
- ``all_over_plain``: samples a second, reading of data included, of ``launch/train.py``'s step with every option, over the plain
  path: no option, rows padded to the longest row of all tasks.  ``..._one_forward``: over a plain path that has that one
  option; ``..._own_length``: over one that pads to the longest row of each task instead.
- ``two_process_efficiency``: samples a second of two processes over twice those of one, with every option on and as many
  rows in each process.  It needs two free cores (``cores``: those it may use); with ``--clock cpu`` waiting is not counted, so
  the figure tells the work of communication alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from plain_training import NEEDS, PlainTrainer, Savings

from free_dist.backbones import Blip2Backbone
from free_dist.config import EMBEDDED_BACKBONE, CostConfig, DataConfig, LossConfig
from free_dist.data import easyvqa
from free_dist.data.pretrained import load_pretrained
from free_dist.data.samples import Batch, SampleEncoder
from free_dist.data.stream import epoch_samples, records, training_batches
from free_dist.data.visual_cache import VisualCache
from free_dist.data.visual_cache_maker import CacheMaker
from free_dist.distributed import distributed_session
from free_dist.ds_config import read_ds_config, with_backbone_stage
from free_dist.engines import Engines, build_engines
from free_dist.exits import ExitBank, FeatureClassifiers
from free_dist.launchers import free_port
from free_dist.training.schedule import warmup_cosine
from free_dist.training.step import adversarial_step

EXIT_LAYERS = (2, 4, 7)
TASKS = ("vqa", "caption", "dialogue")
ALL = CostConfig(drop_padding=True, share_prefix=True, answer_queries=True)
DISTRIBUTION = Path(__file__).parents[1] / "ds_configs" / "cpu.json"
CHECKED_ROWS = 8
"""Rows of the batch of each task whose gradients are compared."""

Step = Callable[[str], float]
"""Runs one step of a task and returns its seconds."""


class Bench:
    """Backbone, data and clock that all sides share."""

    def __init__(self, root: str, cache: Path, clock: str, rows: int) -> None:
        self.root, self.cache, self.rows = root, cache, rows
        self.clock = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
        self.backbone, self.encoder = load_pretrained(EMBEDDED_BACKBONE)
        self.backbone.requires_grad_(False)
        self.cached = copy.copy(self.encoder)
        if not (cache / "index.json").exists():
            maker = CacheMaker(cache, self.backbone, self.encoder)
            maker.add(record.image for record in records(DataConfig(root=root), "train"))
            maker.finish()
        self.cached.visual_cache = VisualCache(cache, self.backbone, self.encoder)
        self.longest = {task: longest_row(self.data(task), task, self.encoder) for task in TASKS}

    def data(self, task: str, *, bucket: int = 0) -> DataConfig:
        """One task, read in this thread: what a side reads is on its own account."""
        return DataConfig(root=self.root, tasks={task: 1.0}, bucket=bucket, workers=0)

    def batches(self, task: str, *, saved: bool, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Endless batches of a task; ``saved``: vision features in the place of pixels, and rows in buckets."""
        data, encoder = self.data(task, bucket=self.rows if saved else 0), self.cached if saved else self.encoder
        return training_batches(data, encoder, seed=0, micro_batch_size=self.rows, rank=rank, world_size=world_size)

    def modules(self, backbone: Blip2Backbone | None = None) -> tuple[Blip2Backbone, ExitBank, FeatureClassifiers]:
        """The same untrained exits and discriminators every time."""
        torch.manual_seed(0)
        backbone = backbone or self.backbone
        bank = ExitBank(backbone, EXIT_LAYERS).train()
        return backbone, bank, FeatureClassifiers(len(EXIT_LAYERS), backbone.hidden_size, 256)

    def engines(self, *, adversarial: bool) -> Engines:
        """DeepSpeed engines of ``ds_configs/cpu.json``, the backbone replicated, which is faster than sharded."""
        backbone, bank, classifiers = self.modules()
        distribution = with_backbone_stage(read_ds_config(DISTRIBUTION), 0)
        schedule = warmup_cosine(warmup_steps=20, max_steps=10_000)
        return build_engines(backbone, bank, classifiers if adversarial else None, distribution, schedule)

    def plain(self, savings: Savings | None = None, *, own_length: str | None = None) -> PlainTrainer:
        """A plain trainer; ``own_length``: the task whose longest row is enough."""
        length = self.longest[own_length] if own_length else max(self.longest.values())
        return PlainTrainer(*self.modules(), fixed_length=length, savings=savings)


def longest_row(data: DataConfig, task: str, encoder: SampleEncoder) -> int:
    """Positions of the longest row of an epoch."""
    return max(len(encoder.encode_text(sample.turns)[0]) for sample in epoch_samples(data, task, seed=0, epoch=0))


def engine_side(bench: Bench, engines: Engines, *, cost: CostConfig, saved: bool, **ranks: int) -> Step:
    """Steps as in training, the reading of their data included."""
    loss = LossConfig(adversarial_weight=LossConfig().adversarial_weight if engines.discriminators else 0.0)
    streams = {task: bench.batches(task, saved=saved, **ranks) for task in TASKS}

    def step(task: str) -> float:
        begun = bench.clock()
        adversarial_step(engines, next(streams[task]), loss, cost=cost)
        return bench.clock() - begun

    return step


def plain_side(bench: Bench, trainers: dict[str, PlainTrainer]) -> Step:
    """Steps of plain trainers, by task, the reading of their data included."""
    streams = {task: bench.batches(task, saved=False) for task in TASKS}

    def step(task: str) -> float:
        begun = bench.clock()
        trainers[task].step(trainers[task].prepared(next(streams[task])))
        return bench.clock() - begun

    return step


def drawn_side(bench: Bench, trainer: PlainTrainer, drawn: dict[str, list[Batch]]) -> Step:
    """Steps of a plain trainer on batches that were drawn before, again and again."""
    ready = {task: [trainer.prepared(batch) for batch in batches] for task, batches in drawn.items()}
    place = dict.fromkeys(TASKS, 0)

    def step(task: str) -> float:
        batch = ready[task][place[task] % len(ready[task])]
        place[task] += 1
        begun = bench.clock()
        trainer.step(batch)
        return bench.clock() - begun

    return step


def seconds(sides: dict[str, Step], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of a step, by side and task; sides take turns, a round begins with another one each time."""
    taken: dict[str, dict[str, list[float]]] = {name: {task: [] for task in TASKS} for name in sides}
    names = list(sides)
    for number in range(rounds + 1):  # the first one warms up
        for task in TASKS:
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                spent = sides[name](task)
                if number:
                    taken[name][task].append(spent)
    return {name: {task: statistics.median(spent[task]) for task in TASKS} for name, spent in taken.items()}


def ratio(slow: dict[str, float], fast: dict[str, float]) -> float:
    """Time of one step of every task over that of another side."""
    return round(sum(slow.values()) / sum(fast.values()), 3)


def measure_steps(bench: Bench, rounds: int) -> dict[str, Any]:
    """Adversarial over cross entropy, and every option over the plain path; inside a process group of one."""
    gan, ce = bench.engines(adversarial=True), bench.engines(adversarial=False)
    plain, one_forward = bench.plain(), bench.plain(Savings(one_forward=True))
    found = seconds(
        {
            "plain": plain_side(bench, dict.fromkeys(TASKS, plain)),
            "one_forward": plain_side(bench, dict.fromkeys(TASKS, one_forward)),
            "own_length": plain_side(bench, {task: bench.plain(own_length=task) for task in TASKS}),
            "all": engine_side(bench, gan, cost=ALL, saved=True),
            "all_ce": engine_side(bench, ce, cost=ALL, saved=True),
            "default": engine_side(bench, gan, cost=CostConfig(), saved=False),
            "default_ce": engine_side(bench, ce, cost=CostConfig(), saved=False),
        },
        rounds,
    )
    return {
        "gan_over_ce": ratio(found["all"], found["all_ce"]),
        "gan_over_ce_default": ratio(found["default"], found["default_ce"]),
        "all_over_plain": ratio(found["plain"], found["all"]),
        "all_over_plain_by_task": {task: round(found["plain"][task] / found["all"][task], 3) for task in TASKS},
        "all_over_plain_one_forward": ratio(found["one_forward"], found["all"]),
        "all_over_plain_own_length": ratio(found["own_length"], found["all"]),
        "all_over_default": ratio(found["default"], found["all"]),
        "samples_per_second": {
            name: round(len(TASKS) * bench.rows / sum(spent.values()), 1) for name, spent in found.items()
        },
        "fixed_length": max(bench.longest.values()),
    }


def pairs() -> dict[str, tuple[Savings, Savings]]:
    """Option -> (without it, with it alone); both have what it needs."""
    found = {}
    for name in vars(Savings()):
        without = Savings(**dict.fromkeys(NEEDS.get(name, ()), True))
        found[name] = (without, replace(without, **{name: True}))
    return found


def measure_options(bench: Bench, rounds: int) -> dict[str, dict[str, float]]:
    """Speed and exactness of each option alone."""
    drawn = {saved: {task: [] for task in TASKS} for saved in ("pixels", "features", "buckets")}
    for task in TASKS:
        for kind in drawn:
            encoder = bench.cached if kind == "features" else bench.encoder
            data = bench.data(task, bucket=bench.rows if kind == "buckets" else 0)
            stream = training_batches(data, encoder, seed=0, micro_batch_size=bench.rows)
            drawn[kind][task] = [next(stream) for _ in range(2)]
    kinds = {"visual_cache": "features", "bucketing": "buckets"}
    sides: dict[Savings, Step] = {}
    for name, (without, with_it) in pairs().items():
        sides.setdefault(without, drawn_side(bench, bench.plain(without), drawn["pixels"]))
        sides[with_it] = drawn_side(bench, bench.plain(with_it), drawn[kinds.get(name, "pixels")])
    taken = seconds({repr(savings): step for savings, step in sides.items()}, rounds)
    errors = gradient_errors(bench)
    return {
        name: {
            "ratio": ratio(taken[repr(without)], taken[repr(with_it)]),
            "max_gradient_error": float(f"{errors[name]:.2e}"),
        }
        for name, (without, with_it) in pairs().items()
    }


def gradient_errors(bench: Bench) -> dict[str, float]:
    """Option -> largest relative difference of a gradient or loss to the plain path's, over a small batch of every task.

    In float64 behind the vision tower, which stays in float32: so do the features that a cache keeps.
    """
    wide = copy.deepcopy(bench.backbone).double()
    largest = dict.fromkeys(pairs(), 0.0)
    for task in TASKS:
        batches = {}
        for name, encoder in (("pixels", bench.encoder), ("features", bench.cached)):
            batches[name] = next(training_batches(bench.data(task), encoder, seed=0, micro_batch_size=CHECKED_ROWS))
        with torch.no_grad():
            patches = bench.backbone.encode_patches(batches["pixels"].pixel_values)
        plain = replace(batches["pixels"], pixel_values=patches)
        wanted = gradients(bench, wide, Savings(), plain)
        for name, (_, with_it) in pairs().items():
            found = gradients(bench, wide, with_it, batches["features"] if name == "visual_cache" else plain)
            largest[name] = max(largest[name], relative_error(found, wanted))
    return largest


def gradients(bench: Bench, backbone: Blip2Backbone, savings: Savings, batch: Batch) -> dict[str, torch.Tensor]:
    """Losses of both players, and each one's gradients by name."""
    _, bank, classifiers = bench.modules(backbone)
    trainer = PlainTrainer(
        backbone, bank, classifiers.double(), fixed_length=max(bench.longest.values()), savings=savings
    )
    exits, discriminators = trainer.backward(trainer.prepared(batch))
    found = {"exits": exits, "discriminators": discriminators}
    for name, weight in [*bank.named_parameters(), *classifiers.named_parameters()]:
        if weight.grad is not None:
            found[name] = weight.grad
    return found


def relative_error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Largest difference over the largest value; of key biases, whose gradient is zero but for rounding, none."""
    assert found.keys() == wanted.keys()
    names = [name for name in wanted if not name.endswith("k_proj.bias")]
    return max(float((found[name] - wanted[name]).abs().max() / wanted[name].abs().max()) for name in names)


def measure_processes(arguments: argparse.Namespace, cache: Path) -> dict[str, float]:
    """Speed of two processes over twice that of one, which take turns."""
    speeds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(arguments.process_rounds):
        for size in speeds:
            speeds[size].append(speed_of(size, arguments, cache))
    one, two = (statistics.median(speeds[size]) for size in (1, 2))
    return {"two_process_efficiency": round(two / (2 * one), 3), "cores": len(os.sched_getaffinity(0))}


def speed_of(size: int, arguments: argparse.Namespace, cache: Path) -> float:
    """Samples a second of ``size`` fresh processes."""
    port = (size > 1 and arguments.port) or free_port()
    command = [sys.executable, __file__, "--root", arguments.root, "--rounds", str(arguments.rounds)]
    command += ["--rows", str(arguments.rows), "--clock", arguments.clock]
    workers = [
        subprocess.Popen(
            [*command, "--worker", str(cache)],
            env=os.environ | environment(rank, size, port),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    printed = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise SystemExit(f"a process of {size} failed")
    return float(printed[0].splitlines()[-1])


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What a launcher would set."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
    return {name: str(value) for name, value in ranks.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def work(arguments: argparse.Namespace) -> None:
    """One of several processes: steps as in training; prints the samples a second of all of them."""
    with distributed_session() as world:
        bench = Bench(arguments.root, Path(arguments.worker), arguments.clock, arguments.rows)
        engines = bench.engines(adversarial=True)
        step = engine_side(bench, engines, cost=ALL, saved=True, rank=world.rank, world_size=world.size)
        taken = seconds({"all": step}, arguments.rounds)["all"]
        print(len(TASKS) * bench.rows * world.size / sum(taken.values()))


def main() -> None:
    """Measure the parts that are asked for; print one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=DataConfig().root, help="directory of prepared easy-VQA shards")
    parser.add_argument("--rows", type=int, default=32, help="rows of a step, in every process")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of every side and task")
    parser.add_argument("--process-rounds", type=int, default=3, help="starts of one and of two processes")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: this process's own time, on a busy machine"
    )
    parser.add_argument("--port", type=int, default=0, help="port of the two processes; 0: any free one")
    parser.add_argument(
        "--parts", nargs="+", choices=("steps", "options", "processes"), default=["steps", "options", "processes"]
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.worker:
        work(arguments)
        return
    if arguments.root == DataConfig().root:
        easyvqa.prepare(Path(arguments.root))
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        cache = Path(directory) / "cache"
        bench = Bench(arguments.root, cache, arguments.clock, arguments.rows)
        if "steps" in arguments.parts:
            os.environ.update(environment(0, 1, arguments.port or free_port()))
            with distributed_session():
                figures |= measure_steps(bench, arguments.rounds)
            print(json.dumps(figures), flush=True)  # so much is known if a later part is interrupted
        if "options" in arguments.parts:
            figures["options"] = measure_options(bench, arguments.rounds)
            print(json.dumps(figures), flush=True)
        if "processes" in arguments.parts:
            figures |= measure_processes(arguments, cache)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
