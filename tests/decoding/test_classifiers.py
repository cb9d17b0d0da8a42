"""Independent exit classifiers on their way out and back in, and what they and the logit lens refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from free_dist.backbones import Blip2Backbone
from free_dist.config import ConfigError, UserError
from free_dist.decoding import generate
from free_dist.decoding.policy import FixedDepthPolicy
from free_dist.exits import ExitBank
from free_dist.exits.export import load_exits, read_exits_manifest, save_exits
from free_dist.exits.gate import ExitChecks, full_head, linear_head
from free_dist.recipe_io import load_recipe
from free_dist.training.runs import training_seconds

LAYERS = (1, 3, 5)


@pytest.fixture(scope="module")
def classifiers(backbone: Blip2Backbone) -> ExitBank:
    """Heads moved far enough that each says something of its own."""
    bank = ExitBank(backbone, LAYERS, variant="classifier")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in bank.transformers.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return bank.eval().requires_grad_(False)


def tokens(backbone: Blip2Backbone, bank: ExitBank, cases, policy) -> list[list[int]]:
    return [
        generate(backbone, bank, pixels, prompt, thresholds=policy, max_new_tokens=8, eos_token_id=-1)[0].tokens
        for pixels, prompt in cases
    ]


def test_an_export_brings_the_same_heads_back_and_decodes_the_same(
    backbone, classifiers, cases, tmp_path: Path
) -> None:
    save_exits(classifiers, tmp_path, backbone=backbone, thresholds=0.5)
    manifest = read_exits_manifest(tmp_path)
    assert (manifest.variant.name, manifest.exit_layers) == ("classifier", LAYERS)
    loaded = load_exits(backbone, tmp_path)
    ours, theirs = classifiers.trainable_state_dict(), loaded.trainable_state_dict()
    assert ours.keys() == theirs.keys() and len(ours) == len(LAYERS)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for index in range(len(LAYERS)):
        found = [tokens(backbone, bank, cases, FixedDepthPolicy(index, len(LAYERS))) for bank in (classifiers, loaded)]
        assert found[0] == found[1]
        lens = ExitBank(backbone, LAYERS, variant="lens").eval()
        assert found[0] != tokens(backbone, lens, cases, FixedDepthPolicy(index, len(LAYERS)))


def test_checks_read_the_exits_own_heads_and_refuse_smaller_ones(backbone, classifiers) -> None:
    checks = ExitChecks(full_head(classifiers))
    features = torch.randn(4, backbone.hidden_size, generator=torch.Generator().manual_seed(1))
    for index, exit_transformer in enumerate(classifiers.transformers):
        (weight,) = exit_transformer.parameters()
        torch.testing.assert_close(checks.scores(index, features).logits, features @ weight.T)
    costs = checks.costs(backbone, classifiers.transformers[0])
    block = sum(parameter.numel() for parameter in backbone.block(1).parameters())
    assert costs.exit_transformer == 0 and costs.head == pytest.approx(weight.numel() / block)
    with pytest.raises(UserError, match="only head=full"):
        linear_head(classifiers)


def test_what_has_no_weights_is_not_exported(backbone, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no weights to export"):
        save_exits(ExitBank(backbone, LAYERS, variant="lens"), tmp_path, backbone=backbone, thresholds=0.5)
    with pytest.raises(UserError, match="exit_index=3: with 3 exits want 0 to 2"):
        FixedDepthPolicy(3, 3)


def test_a_recipe_with_classifiers_and_discriminators_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"loss\.adversarial_weight=0\.1.*exits\.variant=classifier"):
        load_recipe(None, ["exits.variant=classifier"])
    recipe = load_recipe(None, ["exits.variant=classifier", "loss.adversarial_weight=0"])
    assert recipe.exits.variant == "classifier"


def test_seconds_of_a_training_leave_out_a_pause(tmp_path: Path) -> None:
    def write(*points: tuple[int, float]) -> None:
        lines = [json.dumps({"step": step, "time": time}) for step, time in points]
        (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")

    assert training_seconds(tmp_path) is None
    write((1, 100.0))
    assert training_seconds(tmp_path) is None
    write((1, 100.0), (11, 120.0), (21, 140.0))
    assert training_seconds(tmp_path) == pytest.approx(2.0 * 21)
    write((1, 100.0), (11, 120.0), (21, 5140.0), (31, 5160.0))
    assert training_seconds(tmp_path) == pytest.approx(2.0 * 31)
