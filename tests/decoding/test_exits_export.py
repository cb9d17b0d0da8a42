"""Exits saved and loaded again are the same exits; anything else is refused by name."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from free_dist.backbones import Blip2Backbone
from free_dist.backbones.embedded import new_model
from free_dist.decoding import generate
from free_dist.exits.export import MANIFEST, WEIGHTS, backbone_hash, load_exits, read_exits_manifest, save_exits


@pytest.fixture
def exported(backbone, bank, tmp_path):
    directory = tmp_path / "export"
    save_exits(
        bank, directory, backbone_hash=backbone_hash(backbone), thresholds=[0.2, 0.4, 0.9], extra={"git_hash": "abc"}
    )
    return directory


def test_round_trip_gives_identical_generation(backbone, bank, cases, exported) -> None:
    loaded = load_exits(backbone, exported)
    for pixels, prompt in cases:
        first, second = (
            generate(backbone, exits, pixels, prompt, thresholds=0.01, max_new_tokens=8) for exits in (bank, loaded)
        )
        assert first == second
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.lm_head is backbone.shared_modules()[1]


def test_manifest_keeps_what_was_saved_and_no_temporary_file_stays(backbone, exported) -> None:
    manifest = read_exits_manifest(exported)
    assert manifest.exit_layers == (1, 3, 5)
    assert manifest.thresholds == (0.2, 0.4, 0.9)
    assert manifest.extra == {"git_hash": "abc"}
    assert manifest.backbone_hash == backbone_hash(backbone)
    assert sorted(path.name for path in exported.iterdir()) == [MANIFEST, WEIGHTS]


def test_export_holds_no_frozen_weight(exported) -> None:
    assert all(name.startswith("transformers.") for name in load_file(exported / WEIGHTS))


def test_hash_changes_with_one_bit_a_name_or_a_shape(backbone) -> None:
    wanted = backbone_hash(backbone)
    assert backbone_hash(copy.deepcopy(backbone)) == wanted
    changed = copy.deepcopy(backbone)
    weight = changed.block(2).fc1.weight.data
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    assert backbone_hash(changed) != wanted
    assert backbone_hash(torch.nn.Linear(2, 3, bias=False)) != backbone_hash(torch.nn.Linear(3, 2, bias=False))


def test_another_backbone_is_refused(exported) -> None:
    other = Blip2Backbone(new_model(width=32, n_blocks=6, n_heads=2, seed=5))
    with pytest.raises(ValueError, match="hash"):
        load_exits(other, exported)


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS])
def test_a_missing_file_is_named(backbone, exported, name: str) -> None:
    (exported / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_exits(backbone, exported)


def test_damaged_weights_are_noticed(backbone, exported) -> None:
    content = bytearray((exported / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (exported / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        load_exits(backbone, exported)


@pytest.mark.parametrize("change", ["shape", "missing", "surplus"])
def test_weights_that_do_not_fit_are_named(backbone, exported, change: str) -> None:
    import hashlib

    tensors = load_file(exported / WEIGHTS)
    name = "transformers.1.block.fc1.weight"
    if change == "shape":
        tensors[name] = tensors[name][:5].contiguous()
    elif change == "missing":
        del tensors[name]
    else:
        name = "transformers.7.block.fc1.weight"
        tensors[name] = torch.zeros(2)
    save_file(tensors, exported / WEIGHTS)
    manifest = json.loads((exported / MANIFEST).read_text())
    manifest["weights_sha256"] = hashlib.sha256((exported / WEIGHTS).read_bytes()).hexdigest()
    (exported / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_exits(backbone, exported)


@pytest.mark.parametrize("content", ["", "{}", '{"format_version": 1}', "[]"])
def test_a_file_that_is_no_manifest_is_named(backbone, exported, content: str) -> None:
    (exported / MANIFEST).write_text(content)
    with pytest.raises(ValueError, match=MANIFEST):
        load_exits(backbone, exported)


def test_a_later_format_is_refused(backbone, exported) -> None:
    manifest = json.loads((exported / MANIFEST).read_text())
    (exported / MANIFEST).write_text(json.dumps(manifest | {"format_version": 2}))
    with pytest.raises(ValueError, match="format 2"):
        load_exits(backbone, exported)


def test_thresholds_must_match_the_exits(backbone, bank, tmp_path) -> None:
    with pytest.raises(ValueError, match="2 values for 3 exits"):
        save_exits(bank, tmp_path, backbone_hash="0", thresholds=[0.1, 0.2])
