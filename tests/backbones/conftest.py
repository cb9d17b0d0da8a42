"""Fixtures of the tests over all backbones: one checkpoint directory per combination, written once per session."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # whatever pytest's import mode, tests import their neighbours

from checkpoints import COMBINATIONS, overrides, write_checkpoint  # noqa: E402

from free_dist.backbones import Blip2Backbone  # noqa: E402
from free_dist.config import TASKS, DataConfig  # noqa: E402
from free_dist.data.pretrained import load_pretrained  # noqa: E402
from free_dist.data.samples import Sample, SampleEncoder  # noqa: E402
from free_dist.data.stream import corpus, split_samples  # noqa: E402
from free_dist.recipe_io import load_recipe  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One combination as a user holds it: a directory, and what the project makes of it in float32."""

    name: str
    directory: Path
    backbone: Blip2Backbone
    encoder: SampleEncoder
    data: DataConfig
    test_split: dict[str, list[Sample]]
    """Task -> samples; questions follow each other by image."""

    @property
    def has_encoder(self) -> bool:
        return self.backbone.layout.decoder_start_token_id is not None

    def samples(self, task: str, count: int) -> list[Sample]:
        """The first ``count`` samples of the test split."""
        return self.test_split[task][:count]


@pytest.fixture(scope="session")
def texts(tiny_data: DataConfig) -> list[str]:
    """What the tiny tokenizers are trained on."""
    return [*corpus(tiny_data), "###Human: <Img>", "</Img> Describe this image. ###Assistant:"]


@pytest.fixture(scope="session")
def checkpoint_named(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], tiny_root: Path
) -> Callable[[str], Checkpoint]:
    """``checkpoint_named(name)``: a combination, written when first asked for."""
    made: dict[str, Checkpoint] = {}

    def make(name: str) -> Checkpoint:
        if name not in made:
            directory = tmp_path_factory.mktemp("checkpoints") / name
            write_checkpoint(name, directory, texts)
            backbone, encoder = load_pretrained(str(directory))
            settings = ["data.max_turns=3", f"data.root={tiny_root}", *overrides(name)]
            data = load_recipe(None, settings).data
            made[name] = Checkpoint(
                name=name,
                directory=directory,
                backbone=backbone,
                encoder=encoder,
                data=data,
                test_split={task: split_samples(data, "test", task) for task in TASKS},
            )
        return made[name]

    return make


@pytest.fixture(params=COMBINATIONS)
def checkpoint(request: pytest.FixtureRequest, checkpoint_named: Callable[[str], Checkpoint]) -> Checkpoint:
    """Each of the seven combinations; parametrise indirectly for some of them."""
    return checkpoint_named(request.param)
