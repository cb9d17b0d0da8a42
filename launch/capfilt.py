#!/usr/bin/env python
"""CapFilt: let a BLIP captioner write captions for the images of shards, and keep those that a BLIP filter lets pass.

    python launch/capfilt.py --source data/coco --out data/coco_capfilt --captioner models/blip-caption --filter models/blip-itm
    deepspeed --num_gpus 8 launch/capfilt.py --source data/coco --out data/coco_capfilt --captioner ... --filter ...

Captioner and filter are Hugging Face directories of BlipForConditionalGeneration and BlipForImageTextRetrieval; or, in the
environment of salesforce-lavis, lavis:blip_caption/base_coco and lavis:blip_image_text_matching/base. What is written is an
ordinary data set: train on it with data.root=data/coco_capfilt, mixed by data.synthetic_share. The same command goes on after a
kill, shard by shard, with any number of processes; SIGTERM or SIGUSR1 to any of them stops all before their next batch, with
code 85.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from free_dist.config import MissingFileError, UserError
from free_dist.launchers import is_launched
from free_dist.recipe_io import fail_clearly, positive_integer
from free_dist.stopping import Interrupted, stop_clearly

if TYPE_CHECKING:
    from free_dist.data.capfilt import CapFiltSettings, Counts
    from free_dist.data.capfilt_shards import CapFilt
    from free_dist.distributed import StopFlag


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, metavar="DIR", help="prepared data set")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="data set to write")
    parser.add_argument(
        "--splits", nargs="+", default=["train"], metavar="SPLIT",
        help="splits that get captions (default: train); the others are copied as they are",
    )  # fmt: skip
    parser.add_argument("--captioner", required=True, metavar="DIR", help="BLIP for captioning, or lavis:NAME")
    parser.add_argument("--filter", required=True, metavar="DIR", help="BLIP for image-text retrieval, or lavis:NAME")
    parser.add_argument("--captions", type=int, metavar="N", help="captions written per image (default: 1)")
    parser.add_argument("--prompt", help="begins every caption, and is no part of it (default: 'a picture of ')")
    parser.add_argument("--top-p", type=float, help="probability of the nucleus (default: 0.9)")
    parser.add_argument("--top-k", type=int, help="most tokens in it (default: 50; 0: no limit)")
    parser.add_argument("--repetition-penalty", type=float, help="of tokens that stand there already (default: 1.1)")
    parser.add_argument("--min-length", type=int, help="tokens, those of the prompt included (default: 10)")
    parser.add_argument("--max-length", type=int, help="tokens, those of the prompt included (default: 30)")
    parser.add_argument(
        "--threshold", type=float, help="matching probability below which a caption goes (default: 0.5)"
    )
    parser.add_argument("--filter-human", action="store_true", default=None, help="hold human captions to it as well")
    parser.add_argument("--seed", type=int, help="of the sampling (default: 0)")
    parser.add_argument("--batch-size", type=positive_integer, default=16, help="images at once (default: %(default)s)")
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)  # passed by some launchers
    parser.add_argument("--device", help="where the models run (default: cpu; under a launcher, each process's own)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
    arguments = parser.parse_args()
    with fail_clearly(parser), stop_clearly():
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Caption, filter, write, and say what was kept."""
    from free_dist.data.capfilt import CapFiltSettings
    from free_dist.data.capfilt_shards import copy_split, finish, finished, run_rank, unfinished
    from free_dist.data.shards import MANIFEST, read_manifest

    flags = vars(arguments)
    given = {name: flags[name] for name in CapFiltSettings.__dataclass_fields__ if flags[name] is not None}
    settings = CapFiltSettings(**given)
    settings.check()
    source, out = arguments.source, arguments.out
    if source.resolve() == out.resolve():
        raise UserError(f"--out {out}: want another directory than --source")
    for split in arguments.splits:
        read_manifest(source, split)
    others = sorted(path.parent.name for path in source.glob(f"*/{MANIFEST}"))
    with processes(arguments.device) as (rank, world_size, device, barrier, stop):
        capfilt = load(arguments, settings, device)
        for split in arguments.splits:
            counts = finished(source, out, split, capfilt)
            remaining = [] if counts else unfinished(source, out, split, capfilt)
            barrier()  # nobody has begun before all know what is left
            if counts is None:
                run_rank(
                    source, out, split, capfilt,
                    batch_size=arguments.batch_size, rank=rank, world_size=world_size, remaining=remaining,
                    must_stop=stop.agreed,
                )  # fmt: skip
                if stop.agreed_while_others_work():
                    raise Interrupted(f"stopped while captioning {split}: the same command goes on, shard by shard")
                counts = finish(source, out, split, capfilt) if rank == 0 else None
            if counts is not None and rank == 0:
                print(f"{out / split}: {told(counts, settings)}", flush=True)
        if rank == 0:
            for split in others:
                if split not in arguments.splits:
                    print(f"{out / split}: {copy_split(source, out, split).samples} images, as they were", flush=True)


@contextmanager
def processes(device: str | None) -> Iterator[tuple[int, int, str, Callable[[], None], StopFlag]]:
    """Rank, number of processes, device, a barrier and what all read to stop; of one process without a launcher, which then
    needs no DeepSpeed."""
    import torch

    from free_dist.distributed import StopFlag

    if not is_launched(os.environ):
        with StopFlag() as stop:
            yield 0, 1, device or "cpu", lambda: None, stop
        return
    from free_dist.distributed import distributed_session

    with distributed_session() as world, StopFlag(world.device) as stop:
        yield world.rank, world.size, device or str(world.device), torch.distributed.barrier, stop


def load(arguments: argparse.Namespace, settings: CapFiltSettings, device: str) -> CapFilt:
    """The two models that the flags name, both of transformers or both of LAVIS."""
    from free_dist.data.capfilt_lavis import PREFIX, LavisCaptioner, LavisFilter
    from free_dist.data.capfilt_shards import CapFilt

    named = {"--captioner": arguments.captioner, "--filter": arguments.filter}
    of_lavis = [name.startswith(PREFIX) for name in named.values()]
    if all(of_lavis):
        if arguments.dtype != "float32":
            raise UserError(f"--dtype {arguments.dtype}: LAVIS's models run in float32; leave the flag out")
        return CapFilt(
            captioner=LavisCaptioner(arguments.captioner, device=device),
            matcher=LavisFilter(arguments.filter, device=device),
            settings=settings,
        )
    if any(of_lavis):
        raise UserError(
            "--captioner, --filter: LAVIS and transformers 5 share no environment; name both models of one of them"
        )
    for flag, directory in named.items():
        if not Path(directory).is_dir():
            raise MissingFileError(f"{flag} {directory}: no such directory")
    from transformers.utils.logging import disable_progress_bar

    from free_dist.data.capfilt_models import BlipCaptioner, BlipFilter

    disable_progress_bar()
    return CapFilt(
        captioner=BlipCaptioner(arguments.captioner, device=device, dtype=arguments.dtype),
        matcher=BlipFilter(arguments.filter, device=device, dtype=arguments.dtype),
        settings=settings,
    )


def told(counts: Counts, settings: CapFiltSettings) -> str:
    """What became of the captions, in one line."""
    parts = [
        f"{counts.images} images, {counts.written} captions written, {counts.distinct} distinct",
        f"{counts.kept} kept ({counts.kept_share:.1%}) at {settings.threshold}",
        f"mean score {counts.score_sum / max(1, counts.distinct):.3f}",
    ]
    if settings.filter_human:
        parts.append(f"{counts.human_kept} of {counts.human} human captions kept")
    parts.append(f"{counts.without_captions} images without a caption")
    if counts.unreadable:
        parts.append(f"{counts.unreadable} images could not be read")
    return "; ".join(parts)


if __name__ == "__main__":
    main()
