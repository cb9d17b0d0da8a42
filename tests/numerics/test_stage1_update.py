"""What stage 1 changed, put on the backbone it started from, is the trained backbone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "backbones"))

from checkpoints import write_checkpoint

import free_dist
from free_dist.backbones.loading import load_model
from free_dist.config import FinetuneConfig, MissingFileError, UserError
from free_dist.training.stage1_result import save_trained
from free_dist.training.stage1_update import (
    ABOUT,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONNECTOR,
    apply_update,
    frozen_hash,
    save_update,
)
from free_dist.training.trained_parts import train_parts

TEXTS = ["what colour is the circle? red", "is there a blue square? yes", "a photo of a red circle"] * 4
SETTINGS = FinetuneConfig(train=["qformer", "projection", "lora"], lora_rank=4, lora_alpha=8, keep_adapter=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A start, the backbone that a pretended stage 1 made of it, and its adapter."""
    root = tmp_path_factory.mktemp("update")
    write_checkpoint("blip2-opt", root / "start", TEXTS)
    model = load_model(root / "start", dtype=torch.float32)
    train_parts(model, SETTINGS)
    draw = torch.Generator().manual_seed(0)
    weights = {
        name: parameter.detach() + 0.1 * torch.randn(parameter.shape, generator=draw)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    save_trained(root / "start", weights, SETTINGS, root / "backbone", adapter=root / "adapter")
    return root / "start", root / "backbone", root / "adapter"


@pytest.fixture
def update(trained: tuple[Path, Path, Path], tmp_path: Path) -> Path:
    start, backbone, adapter = trained
    save_update(start, backbone, adapter, tmp_path / "update")
    return tmp_path / "update"


def test_an_update_makes_the_trained_backbone_within_float16(trained, update: Path, tmp_path: Path) -> None:
    start, backbone, _ = trained
    apply_update(start, update, tmp_path / "made")
    before, wanted, made = (
        load_model(d, dtype=torch.float32).state_dict() for d in (start, backbone, tmp_path / "made")
    )
    assert wanted.keys() == made.keys()
    moved = 0
    for name, value in wanted.items():
        assert torch.allclose(made[name], value, rtol=2**-10, atol=2e-3), name
        if torch.equal(before[name], value):
            assert torch.equal(made[name], value), f"{name}: stage 1 left it as it was"
        else:
            moved += 1
            assert not torch.allclose(made[name], before[name], rtol=2**-10, atol=2e-3), name
    assert moved > 10
    assert {path.name for path in (tmp_path / "made").iterdir()} == {path.name for path in backbone.iterdir()}


def test_an_update_holds_nothing_of_the_frozen_backbone_and_no_path(trained, update: Path) -> None:
    assert (
        sum(path.stat().st_size for path in update.iterdir()) < 0.5 * (trained[1] / "model.safetensors").stat().st_size
    )
    for path in update.iterdir():
        assert str(update.parent).encode() not in path.read_bytes()
        assert str(trained[0]).encode() not in path.read_bytes()


def test_another_start_is_refused_but_not_for_its_untrained_connector(trained, update: Path, tmp_path: Path) -> None:
    start = trained[0]
    model = load_model(start, dtype=torch.float32)
    model.language_projection.weight.data += 1
    model.save_pretrained(tmp_path / "other_connector")
    assert frozen_hash(tmp_path / "other_connector") == frozen_hash(start)
    model.get_input_embeddings().weight.data[0, 0] += 1
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"was trained on frozen weights with hash"):
        apply_update(tmp_path / "other", update, tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", [CONNECTOR, ADAPTER_WEIGHTS, ABOUT])
def test_a_missing_file_is_named(trained, update: Path, tmp_path: Path, name: str) -> None:
    (update / name).unlink()
    with pytest.raises(MissingFileError, match=f"lacks {name}"):
        apply_update(trained[0], update, tmp_path / "made")


@pytest.mark.parametrize("name", [CONNECTOR, ADAPTER_WEIGHTS])
def test_a_cut_file_is_told_in_one_line(trained, update: Path, tmp_path: Path, name: str) -> None:
    (update / name).write_bytes((update / name).read_bytes()[:-100])
    with pytest.raises(UserError, match="is damaged"):
        apply_update(trained[0], update, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_run_without_adapter_is_told(trained, tmp_path: Path) -> None:
    start, backbone, _ = trained
    with pytest.raises(MissingFileError, match=r"finetune.keep_adapter=true"):
        save_update(start, backbone, backbone, tmp_path / "update")


def test_what_is_shipped_is_whole_and_small() -> None:
    shipped = Path(free_dist.__file__).parent / "assets" / "smollm2"
    names = {path.name for path in shipped.iterdir()}
    assert {CONNECTOR, ADAPTER_CONFIG, ADAPTER_WEIGHTS, ABOUT} <= names
    assert sum(path.stat().st_size for path in shipped.iterdir()) < 16e6
    connector, adapter = load_file(shipped / CONNECTOR), load_file(shipped / ADAPTER_WEIGHTS)
    assert len(adapter) == 2 * 2 * 30  # two factors of query and value in thirty blocks
    for tensor in (*connector.values(), *adapter.values()):
        assert tensor.dtype == torch.float16 and tensor.isfinite().all()
