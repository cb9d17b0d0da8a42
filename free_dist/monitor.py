"""Watches a run: one JSON line and one set of TensorBoard scalars per logged step, a progress bar, texts and pictures.

Does not know what is trained: it receives named numbers.  ``log.jsonl`` alone is enough to redraw every curve.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LOG = "log.jsonl"
TENSORBOARD = "tensorboard"


class Monitor:
    """Logger of one run directory; on ranks other than 0 every method does nothing.

    Use as a context manager, so that what was logged reaches the disk whatever ends the run.
    """

    def __init__(
        self, run_dir: Path, *, total_steps: int, description: str, done: int = 0, enabled: bool = True
    ) -> None:
        """``done``: steps that an earlier part of the run has logged; TensorBoard forgets what it logged after them."""
        self._enabled = enabled
        self._samples = 0
        self._since = time.perf_counter()
        self._progress = tqdm(
            total=total_steps, initial=done, desc=description, unit="step", disable=not enabled, mininterval=1.0
        )
        if enabled:
            run_dir.mkdir(parents=True, exist_ok=True)
            is_resumed = (run_dir / TENSORBOARD).is_dir()
            self._writer = SummaryWriter(run_dir / TENSORBOARD, purge_step=done + 1 if is_resumed else None)
            self._log = open(run_dir / LOG, "a")

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def advance(self, *, samples: int) -> None:
        """Count one step of this many samples, over all ranks."""
        self._samples += samples
        self._progress.update()

    def scalars(self, step: int, values: Mapping[str, float], *, tokens: int) -> None:
        """Log named numbers, memory, and the throughput since the last call, in which ``tokens`` passed over all ranks."""
        if not self._enabled:
            return
        now = time.perf_counter()
        seconds = now - self._since
        everything = dict(values)
        if self._samples:
            everything |= {
                "throughput/samples_per_second": self._samples / seconds,
                "throughput/tokens_per_second": tokens / seconds,
            }
        everything["memory/gib"] = peak_memory_gib()
        self._samples = 0
        self._since = now
        for name, value in everything.items():
            self._writer.add_scalar(name, value, step)
        self._log.write(json.dumps({"step": step, "time": time.time(), **everything}) + "\n")
        self._log.flush()

    def text(self, step: int, name: str, content: str) -> None:
        """Log Markdown text."""
        if self._enabled:
            self._writer.add_text(name, content, step)

    def event(self, step: int, name: str, message: str) -> None:
        """Log that something happened: one line of JSON with ``event`` and ``message``, and a TensorBoard text."""
        if not self._enabled:
            return
        self._writer.add_text(f"events/{name}", message, step)
        self._log.write(json.dumps({"step": step, "time": time.time(), "event": name, "message": message}) + "\n")
        self._log.flush()

    def close(self) -> None:
        """Flush and close everything."""
        self._progress.close()
        if self._enabled:
            self._writer.close()
            self._log.close()


def log_pictures(run_dir: Path, pictures: Mapping[str, Path], *, step: int = 0) -> None:
    """Add pictures (title -> PNG file) to a run directory's TensorBoard page."""
    with SummaryWriter(run_dir / TENSORBOARD) as writer:
        for title, path in pictures.items():
            with Image.open(path) as picture:
                writer.add_image(title, np.asarray(picture.convert("RGB")), step, dataformats="HWC")


def peak_memory_gib() -> float:
    """Peak memory of this process in GiB: allocated on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
