"""The training forward of every backbone against transformers' own, on batches as training makes them."""

from __future__ import annotations

import pytest
import torch
from checkpoints import INSTRUCTED
from hugging_face import forward, load_reference
from torch.nn import functional as F

from free_dist.backbones import vision_path
from free_dist.data.pretrained import load_pretrained
from free_dist.data.samples import IGNORE
from free_dist.exits import ExitBank

EXITS = (1, 3)


def batch_of(checkpoint, task: str, count: int = 5):
    batch = checkpoint.encoder.collate(checkpoint.samples(task, count))
    lengths = {len(checkpoint.encoder.encode_prompt(sample.turns)) for sample in checkpoint.samples(task, count)}
    if task == "vqa":
        assert len(batch.pixel_values) < len(batch.keys), "rows must share an image"
        assert len(lengths) > 1, "rows must be padded"
    return batch


def assert_equal(ours, wanted) -> None:
    """Up to the rounding of float32 at the size of the numbers."""
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("task", ["vqa", "caption", "dialogue"])
def test_features_after_every_block_logits_and_loss_equal_hugging_face(checkpoint, task: str) -> None:
    batch, backbone = batch_of(checkpoint, task), checkpoint.backbone
    wanted = forward(checkpoint, load_reference(checkpoint), batch)
    found = backbone(**batch.inputs(), exit_layers=range(1, backbone.n_blocks))
    for k, ours in enumerate(found.exits, start=1):
        assert_equal(ours[wanted.kept], wanted.states[k][wanted.kept])
        assert (wanted.states[k] - wanted.states[k - 1])[wanted.kept].abs().max() > 0.1, "a block that does nothing"
    logits = backbone.lm_head(found.final)
    assert_equal(logits[wanted.kept], wanted.logits[wanted.kept])
    kept = batch.targets != IGNORE
    assert_equal(F.cross_entropy(logits[kept], batch.targets[kept]), wanted.loss)


@torch.no_grad()
def test_in_bfloat16_features_and_logits_equal_hugging_face_in_bfloat16(checkpoint) -> None:
    batch = batch_of(checkpoint, "vqa")
    reference = load_reference(checkpoint, torch.bfloat16)
    backbone, _ = load_pretrained(str(checkpoint.directory), dtype=torch.bfloat16)
    types = {name: parameter.dtype for name, parameter in reference.named_parameters()}
    assert {name: parameter.dtype for name, parameter in backbone.model.named_parameters()} == types
    wanted = forward(checkpoint, reference, batch)
    found = backbone(**batch.inputs(), exit_layers=range(1, backbone.n_blocks))
    pairs = [*zip(found.exits, wanted.states[1:-1], strict=True), (backbone.lm_head(found.final), wanted.logits)]
    exact = forward(checkpoint, load_reference(checkpoint), batch)
    for ours, theirs, true in zip(*zip(*pairs, strict=True), [*exact.states[1:-1], exact.logits], strict=True):
        assert ours.dtype == theirs.dtype
        ours, theirs, true = (tensor[wanted.kept].float() for tensor in (ours, theirs, true))
        # As far from the truth as transformers is, and not farther from each other: it is the same arithmetic.
        error = (theirs - true).norm()
        assert (ours - true).norm() < 1.2 * error
        assert (ours - theirs).norm() < error


def test_every_weight_of_an_exit_learns_and_no_frozen_one_does(checkpoint) -> None:
    batch, backbone = batch_of(checkpoint, "vqa"), checkpoint.backbone
    kept = batch.targets != IGNORE
    with torch.no_grad():
        found = backbone(**batch.inputs(), exit_layers=EXITS)
    for init in ("same", "next", "last"):
        bank = ExitBank(backbone, EXITS, init=init)
        features = bank(found.exits, kept, memory=found.memory, span=found.span)
        assert features.shape == (len(EXITS), int(kept.sum()), backbone.hidden_size)
        logits = bank.logits(features)
        F.cross_entropy(logits.flatten(0, 1), batch.targets[kept].repeat(len(EXITS))).backward()
        for name, parameter in bank.transformers.named_parameters():
            assert parameter.grad is not None, name
            # A key bias shifts all scores of a softmax alike: its gradient is zero up to rounding.
            assert name.endswith("k_proj.bias") or parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in backbone.parameters())


@torch.no_grad()
def test_an_exit_with_a_block_s_weights_gives_the_next_feature(checkpoint) -> None:
    batch, backbone = batch_of(checkpoint, "vqa"), checkpoint.backbone
    kept = batch.targets != IGNORE
    found = backbone(**batch.inputs(), exit_layers=(1, 2, 3))
    bank = ExitBank(backbone, (1, 2), init="next")
    features = bank(found.exits[:2], kept, memory=found.memory, span=found.span)
    wanted = torch.stack([backbone.final_norm(state[kept]) for state in found.exits[1:]])
    assert_equal(features, wanted)


@torch.no_grad()
def test_vision_features_stand_for_the_pixels_they_were_made_of(checkpoint) -> None:
    batch, backbone = batch_of(checkpoint, "vqa"), checkpoint.backbone
    wanted = backbone(**batch.inputs(), exit_layers=EXITS)
    features = backbone.encode_patches(batch.pixel_values)
    found = backbone(**batch.inputs() | {"pixel_values": features}, exit_layers=EXITS)
    for ours, theirs in zip((*found.exits, found.final), (*wanted.exits, wanted.final), strict=True):
        assert torch.equal(ours, theirs)
    other = backbone(**batch.inputs() | {"pixel_values": features.flip(-1)}, exit_layers=EXITS)
    assert not torch.equal(other.final, wanted.final)


@torch.no_grad()
def test_the_lean_vision_tower_equals_the_library_s_and_is_used(checkpoint) -> None:
    backbone = checkpoint.backbone
    pixels = torch.stack([checkpoint.encoder.encode_image(sample.image) for sample in checkpoint.samples("caption", 3)])
    called = []
    handle = backbone.model.vision_model.encoder.register_forward_hook(lambda *_: called.append(None))
    ours = backbone.encode_patches(pixels)
    assert not called
    with torch.enable_grad():
        theirs = backbone.encode_patches(pixels)
    assert called
    handle.remove()
    assert_equal(ours, theirs)
    assert vision_path.supports_qformer(backbone.model) == (checkpoint.name not in INSTRUCTED)
