"""Saving a training run while it runs, and putting it back: engines, place in the data, random numbers, schedules.

    found = newest_sound(directory, world, tell)           the newest checkpoint that proves whole, on all ranks alike
    with Checkpoints(...) as checkpoints:
        done, samples = go_on(checkpoints, found, ...)     0 where there is none; logs are cut back to it
        for step in range(done + 1, steps + 1):
            ...
            checkpoints.after_step(step, loss, last=...)   saves when a save is due

A save notes what this rank holds and returns; a thread copies that within the host's memory and writes the file while training
goes on.  The next optimizer step, the first thing that changes it, waits for the copy.  When all ranks' files are on disk, which
ranks learn from each other once per step, rank 0 writes the manifest and gives the directory its name.  At most one save is
under way.  Knows engines and ranks; does not know what is trained.
"""

from __future__ import annotations

import concurrent.futures
import random
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from safetensors import safe_open
from torch import Tensor

from free_dist.config import Recipe, TrainingConfig, UserError
from free_dist.data.order import StreamState
from free_dist.distributed import World, all_gather, all_reduce_sum, all_true, seed_everything
from free_dist.monitor import LOG
from free_dist.training.checkpoint_files import (
    FORMAT,
    FileRecord,
    Snapshot,
    checkpoints,
    damage,
    publish,
    rank_file,
    read_manifest,
    remove_unfinished,
    set_aside,
    step_directory,
    unfinished,
)
from free_dist.training.checkpoint_state import EngineState, Pieces
from free_dist.training.random_state import random_state, set_random_state
from free_dist.training.run_directory import SAMPLES, forget_log_after
from free_dist.training.sample_log import SampleLog

RANDOM = "random/"
"""Beginning of the names of random states in a rank's file."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A sound checkpoint."""

    path: Path
    manifest: dict[str, Any]


def newest_sound(directory: Path, world: World, tell: Callable[[str], None]) -> Found | None:
    """The newest checkpoint whose every checksum is right, or None; all ranks call it and get the same.

    Damaged ones are named to ``tell`` and renamed.  What a dead process had begun to write is removed.
    """
    if world.is_main:
        remove_unfinished(directory)
    listed = all_gather([[path.name for path in checkpoints(directory)] if world.is_main else []])[0][0]
    for path in (directory / name for name in listed):
        complaints = [c for (c,) in all_gather([damage(path, rank=world.rank, world_size=world.size)]) if c is not None]
        if not complaints:
            manifest = read_manifest(path)
            assert manifest is not None
            return Found(path=path, manifest=manifest)
        if world.is_main:
            aside = set_aside(path)
            tell(
                f"damaged checkpoint {path}: {complaints[0]}; it is now called {aside.name}, and the one before is taken"
            )
    return None


class Checkpoints:
    """Saves and restores one run; every method is called by all ranks.  Use as a context manager around the loop."""

    def __init__(
        self,
        directory: Path,
        engines: Mapping[str, DeepSpeedEngine],
        *,
        world: World,
        training: TrainingConfig,
        rows_per_step: int,
        tasks: Mapping[str, float],
        backbone: str,
        facts: Mapping[str, Any],
    ) -> None:
        """``engines``: those that train, by name; ``tasks``: weights of the stream's tasks; ``backbone``: hash of the frozen
        weights, which are not stored; ``facts``: what else the manifest shall say, for JSON."""
        self._directory = directory
        self._engines = {name: EngineState(name, engine) for name, engine in engines.items()}
        self._world = world
        self._training = training
        self._rows = rows_per_step
        self._tasks = tasks
        self._belongs = {**facts, "backbone": backbone}
        self._snapshot = Snapshot()
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._job: Future[FileRecord | None] | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._hooks = [
            engine.basic_optimizer.register_step_pre_hook(self._wait_for_copy) for engine in engines.values()
        ]
        self._saving: dict[str, Any] | None = None
        self._random = random_state()
        self._losses: list[Tensor] = []
        self.stalled = 0.0
        """Seconds for which saves have held up the loop so far."""

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.finish()
        finally:
            # After an error other ranks may be gone: the file is finished, but nobody agrees on a manifest.
            self._threads.shutdown(wait=True)
            for hook in self._hooks:
                hook.remove()

    def restore(self, found: Found | None) -> int:
        """Put engines and random numbers where the checkpoint left them; returns the number of steps done.

        With another number of ranks, engines are the same up to rounding, and random numbers are drawn anew, by (seed, step,
        rank).  Raises UserError for a checkpoint on another backbone, of other modules, or of steps of other sizes.
        """
        if found is None:
            return 0
        manifest = found.manifest
        for name, here in (("backbone", self._belongs["backbone"]), ("rows_per_step", self._rows)):
            if manifest[name] != here:
                what = {
                    "backbone": "frozen weights with hash {}, and those of the recipe's backbone have {}: restore the backbone",
                    "rows_per_step": "steps of {} rows, and this start has {}: change the number of processes or --ds_config",
                }[name].format(manifest[name], here)
                raise UserError(f"{found.path} was made with {what}, or choose another run_dir")
        if manifest["engines"].keys() != self._engines.keys():
            raise UserError(f"{found.path} holds the engines {', '.join(manifest['engines'])}: choose another run_dir")
        with Pieces(found.path, [record["name"] for record in manifest["files"]]) as stored:
            for name, engine in self._engines.items():
                engine.restore(manifest["engines"][name], stored)
        step = int(manifest["step"])
        rank = self._world.rank
        if manifest["world_size"] == self._world.size:
            with safe_open(found.path / rank_file(rank), framework="pt") as file:
                names = [name for name in file.keys() if name.startswith(RANDOM)]  # noqa: SIM118 - not a mapping
                set_random_state({name.removeprefix(RANDOM): file.get_tensor(name) for name in names})
        else:
            seed_everything(random.Random(f"{self._training.seed}/resumed/{step}/{rank}").getrandbits(32))
        return step

    def is_due(self, step: int, *, last: bool) -> bool:
        """Whether :meth:`after_step` will save."""
        every = self._training.save_every
        return bool(every) and (last or step % every == 0)

    def after_step(self, step: int, loss: Tensor, *, last: bool) -> None:
        """Once per optimizer step: see how the save under way gets on, and start one where it is due.

        ``loss``: this rank's, a scalar whose mean over ranks is the step's; the mean since the last save ranks checkpoints.
        ``last``: no step follows, so the save is waited for.  Raises UserError when a rank could not write.
        """
        began = time.perf_counter()
        self._advance()
        if self._training.save_every:
            self._losses.append(loss.detach())
        if self.is_due(step, last=last):
            self.save(step)
            if last or not self._training.save_in_background:
                self.finish()
        self.stalled += time.perf_counter() - began

    def save(self, step: int) -> None:
        """Start to save what is known after ``step``; waits for the save before, if that is not done."""
        self.finish()
        losses = (
            torch.stack(self._losses).double()
            if self._losses
            else torch.zeros(0, dtype=torch.float64, device=self._world.device)
        )
        self._losses.clear()
        finite = torch.isfinite(losses).double()
        total, count = all_reduce_sum(torch.stack([losses.nan_to_num(0, 0, 0).sum(), finite.sum()])).tolist()
        for name, state in random_state().items():
            # Now, for they go on at once; and into tensors that are always the same, with which choosing is short.
            self._random[name].copy_(state)
        tensors = {RANDOM + name: state for name, state in self._random.items()}
        for engine in self._engines.values():
            tensors |= engine.pieces()
        self._snapshot.choose(tensors)
        self._saving = {
            "format": FORMAT,
            "step": step,
            "world_size": self._world.size,
            "rows_per_step": self._rows,
            "score": total / count if count else None,
            **self._belongs,
            "engines": {name: engine.facts() for name, engine in self._engines.items()},
        }
        path = unfinished(step_directory(self._directory, step)) / rank_file(self._world.rank)
        if self._snapshot.is_of_host:
            self._copied.clear()
            self._job = self._threads.submit(self._copy_and_write, path)
        else:
            self._snapshot.copy()  # in the order of this thread's work on the device, and fast
            self._job = self._threads.submit(self._snapshot.write, path)

    def _copy_and_write(self, path: Path) -> FileRecord:
        try:
            self._snapshot.copy()
        finally:
            self._copied.set()
        return self._snapshot.write(path)

    def _wait_for_copy(self, *_step: object) -> None:
        """Before an optimizer changes what a save still has to copy."""
        began = time.perf_counter()
        self._copied.wait()
        self.stalled += time.perf_counter() - began

    def _publish(self, final: Path, manifest: dict[str, Any]) -> None:
        stream = {"stream": self.position(manifest["step"]).to_dict()}
        keep = {"keep_last": self._training.keep_last, "keep_best": self._training.keep_best}
        publish(final, manifest | stream, **keep)

    def position(self, step: int) -> StreamState:
        """Where the data stream stands after ``step`` steps."""
        return StreamState.after(step, weights=self._tasks, seed=self._training.seed, rows=self._rows)

    def finish(self) -> None:
        """Wait until the save under way, if there is one, is whole; raises as :meth:`after_step`."""
        while self._job is not None:
            concurrent.futures.wait([self._job])
            self._next_part()

    @property
    def is_idle(self) -> bool:
        """Whether this rank has nothing left to do for the save that was started last."""
        return self._job is None or self._job.done()

    def _advance(self) -> None:
        if self._job is not None and all_true(self._job.done(), self._world.device):
            self._next_part()

    def _next_part(self) -> None:
        """This rank's part of the save has ended: hear how the others' did, and go on to the manifest or to nothing."""
        job, self._job = self._job, None
        assert job is not None
        error = job.exception()
        if error is not None and not isinstance(error, OSError):
            raise error
        outcome = f"{error.strerror or error}" if error is not None else job.result()
        outcomes = [part[0] for part in all_gather([outcome])]
        for rank, told in enumerate(outcomes):
            if isinstance(told, str):
                raise UserError(
                    f"run_dir: rank {rank} could not write a checkpoint to {self._directory}: {told}; put that right and start "
                    "the same command again, which goes on from the newest whole checkpoint"
                )
        if self._saving is None:
            return
        manifest = self._saving | {"files": [asdict(record) for record in outcomes if isinstance(record, FileRecord)]}
        self._saving = None
        if self._world.is_main:
            final = step_directory(self._directory, manifest["step"])
            self._job = self._threads.submit(self._publish, final, manifest)
        else:
            self._job = Future()
            self._job.set_result(None)


def go_on(
    checkpoints: Checkpoints, found: Found | None, recipe: Recipe, world: World, tell: Callable[[str], None]
) -> tuple[int, SampleLog]:
    """Restore what was ``found``, say so, and cut the logs back to it; returns the steps done and the log of sample ids."""
    run_dir = Path(recipe.run_dir)
    done = checkpoints.restore(found)
    if found is not None:
        tell(f"goes on after step {done} of {recipe.training.max_steps}, from {found.path}")
    if world.is_main:
        for log in (LOG, SAMPLES):
            forget_log_after(run_dir / log, done)
    return done, SampleLog(run_dir / SAMPLES, world, enabled=recipe.training.log_samples)
