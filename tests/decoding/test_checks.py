"""Cheap checks: smaller heads agree with the full one, gates only send tokens deeper, files are read back or refused."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from free_dist.decoding.generate import generate
from free_dist.exits import ExitBank, FeatureClassifiers
from free_dist.exits.check_files import (
    MANIFEST,
    WEIGHTS,
    FittedChecks,
    build_checks,
    load_checks,
    load_fitted,
    read_checks_manifest,
    save_checks,
)
from free_dist.exits.check_fitting import fit_screen, token_order
from free_dist.exits.export import backbone_hash, save_exits
from free_dist.exits.gate import CheckOptions, ExitChecks, FullHead, LowRankHead, PrunedHead

LAYERS = (1, 3, 5)


def classifiers(width: int, seed: int, hidden: int = 16) -> FeatureClassifiers:
    """Untrained ones whose logits differ from exit to exit and from row to row."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = FeatureClassifiers(len(LAYERS), width, hidden)
        nn.init.normal_(made.bias_in)
        nn.init.normal_(made.bias_out)
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def features(backbone):
    generator = torch.Generator().manual_seed(3)
    scales = torch.logspace(0, -2, backbone.hidden_size)  # anisotropic, as features are
    return torch.randn(40, backbone.hidden_size, generator=generator) * scales


@pytest.fixture(scope="module")
def fitted(backbone, bank, features) -> FittedChecks:
    width, vocab = backbone.hidden_size, backbone.vocab_size
    gates, discriminators = classifiers(width, 11), classifiers(width, 12)
    stacked = features.expand(len(LAYERS), -1, -1)
    # Half the rows pass, and no row stands on the threshold.
    middle = slice(len(features) // 2 - 1, len(features) // 2 + 1)
    medians = [
        tuple(torch.sigmoid(logits).sort().values[:, middle].mean(-1).tolist())
        for logits in (gates(nn.functional.layer_norm(stacked, (width,))), discriminators(stacked))
    ]
    counts = torch.randint(0, 50, (vocab,), generator=torch.Generator().manual_seed(1))
    down, lift = fit_screen(bank.lm_head.weight, features, width)
    settings = [
        f"{g}{d}{h}" for g in ("", "gate+") for d in ("", "discriminator+") for h in ("full", "pruned", "low_rank")
    ]
    return FittedChecks(
        gates=gates,
        gate_thresholds=medians[0],
        discriminators=discriminators,
        discriminator_thresholds=medians[1],
        token_order=token_order(counts, backbone.layout.eos_token_id),
        pruned_size=20,
        down=down,
        lift=lift,
        screen_rank=8,
        thresholds=(0.1, 0.2, 0.3),
        worthwhile={"vqa": dict.fromkeys(settings, ((True, False), (False, True), (True, True)))},
    )


# Heads.


def test_a_pruned_head_has_the_full_heads_logits_on_its_rows(bank, features, fitted) -> None:
    head = PrunedHead(bank.lm_head, fitted.token_order[:50])
    scores = head(features)
    torch.testing.assert_close(scores.logits, bank.lm_head(features)[:, scores.ids])
    assert torch.equal(scores.ids, torch.sort(fitted.token_order[:50]).values)
    assert head.weight.is_contiguous()


@pytest.mark.parametrize("size", [1, 7])
def test_every_pruned_head_keeps_the_end_of_sequence(backbone, bank, fitted, size: int) -> None:
    head = build_checks(bank, fitted, CheckOptions(head="pruned", pruned_size=size)).head
    assert backbone.layout.eos_token_id in head.ids.tolist()
    assert len(head.ids) == size


def test_a_screen_of_full_rank_reads_what_the_full_head_reads(bank, features, fitted) -> None:
    width = features.shape[1]
    scores = LowRankHead(bank.lm_head, fitted.down[:width], fitted.lift[:, :width], 4)(features)
    exact = bank.lm_head(features)
    torch.testing.assert_close(scores.logits, exact, atol=1e-3, rtol=1e-3)
    assert torch.equal(scores.logits.argmax(-1), exact.argmax(-1))


@pytest.mark.parametrize("rank", [1, 4])
def test_rescored_columns_are_exact_at_any_rank_and_the_others_are_not(bank, features, fitted, rank: int) -> None:
    rescored = 5
    head = LowRankHead(bank.lm_head, fitted.down[:rank], fitted.lift[:, :rank], rescored)
    logits, exact = head(features).logits, bank.lm_head(features)
    screen = features @ head.down.T @ head.up.T
    best = screen.topk(rescored, dim=-1).indices
    torch.testing.assert_close(logits.gather(1, best), exact.gather(1, best))
    others = torch.ones_like(logits, dtype=torch.bool).scatter(1, best, False)
    torch.testing.assert_close(logits[others], screen[others])
    assert not torch.allclose(logits[others], exact[others], atol=1e-3)


def test_heads_with_a_bias_are_pruned_and_screened_with_it(bank, features, fitted) -> None:
    biased = nn.Linear(features.shape[1], len(bank.lm_head.weight)).requires_grad_(False)
    nn.init.normal_(biased.bias)
    exact = biased(features)
    pruned = PrunedHead(biased, fitted.token_order[:9])(features)
    torch.testing.assert_close(pruned.logits, exact[:, pruned.ids])
    down, lift = fit_screen(biased.weight, features, features.shape[1])
    torch.testing.assert_close(LowRankHead(biased, down, lift, 3)(features).logits, exact, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("rank", [1, 3, 10])
def test_the_screen_has_the_least_possible_error_of_its_rank_on_the_logits(bank, features, rank: int) -> None:
    weight, rows = bank.lm_head.weight.double(), features.double()
    exact = rows @ weight.T
    down, lift = fit_screen(bank.lm_head.weight, features, rank)
    error = (rows @ down.double().T @ lift.double().T @ weight.T - exact).square().sum()
    # Eckart and Young: no matrix of this rank comes nearer to the logits than the sum of the squared tail.
    least = torch.linalg.svdvals(exact)[rank:].square().sum()
    assert error <= least * 1.01
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    plain = left[:, :rank] * values[:rank] @ right[:rank]
    assert error < (rows @ plain.T - exact).square().sum()


# All checks together.


def test_each_exits_classifier_alone_gives_what_all_give_together(bank, features, fitted) -> None:
    checks = build_checks(bank, fitted, CheckOptions(gate=True, discriminator=True))
    stacked = features.expand(len(LAYERS), -1, -1)
    gates = torch.sigmoid(fitted.gates(nn.functional.layer_norm(stacked, features.shape[1:])))
    discriminators = torch.sigmoid(fitted.discriminators(stacked))
    for k in range(len(LAYERS)):
        passed, final = checks.may_exit(k, features), checks.looks_final(k, features)
        assert torch.equal(passed, gates[k] > fitted.gate_thresholds[k])
        assert torch.equal(final, discriminators[k] > fitted.discriminator_thresholds[k])
        assert passed.sum() == final.sum() == len(features) // 2


@pytest.mark.parametrize("head", ["full", "pruned", "low_rank"])
def test_rows_do_not_touch_each_other(bank, features, fitted, head: str) -> None:
    checks = build_checks(bank, fitted, CheckOptions(gate=True, discriminator=True, head=head))
    together, gate, final = checks.scores(1, features), checks.may_exit(1, features), checks.looks_final(1, features)
    for i in range(len(features)):
        one = features[i : i + 1]
        torch.testing.assert_close(checks.scores(1, one).logits[0], together.logits[i])
        assert bool(checks.may_exit(1, one)) == bool(gate[i])
        assert bool(checks.looks_final(1, one)) == bool(final[i])


@pytest.mark.parametrize("head", ["full", "pruned", "low_rank"])
def test_no_check_waits_for_the_device(bank, features, fitted, head: str) -> None:
    # A meta tensor has no values: whatever asks for one raises.
    options = CheckOptions(gate=True, discriminator=True, head=head)
    checks = copy.deepcopy(build_checks(bank, fitted, options)).to("meta")
    rows = features.to("meta")
    assert checks.may_exit(0, rows).shape == checks.looks_final(2, rows).shape == (len(rows),)
    assert checks.scores(1, rows).logits.shape[0] == len(rows)


def test_checks_that_are_off_answer_nothing(bank, features, fitted) -> None:
    for checks in (build_checks(bank, fitted, CheckOptions()), ExitChecks(FullHead(bank.lm_head))):
        assert checks.may_exit(0, features) is None and checks.looks_final(0, features) is None
        assert torch.equal(checks.scores(0, features).logits, bank.lm_head(features))


def test_building_checks_leaves_the_bank_and_the_fit_as_they_are(backbone, fitted) -> None:
    half = copy.deepcopy(backbone).bfloat16()
    bank = ExitBank(half, LAYERS).eval().requires_grad_(False)
    checks = build_checks(bank, fitted, CheckOptions(gate=True, discriminator=True, head="low_rank"))
    row = torch.ones(1, backbone.hidden_size, dtype=torch.bfloat16)
    assert checks.scores(0, row).logits.dtype == bank.lm_head.weight.dtype == torch.bfloat16
    assert checks.gates.weight_in.dtype == fitted.gates.weight_in.dtype == torch.float32
    assert checks.may_exit(0, row).shape == (1,)


# Decoding.


@pytest.mark.parametrize("threshold", [0.005, 0.02])
def test_a_gate_changes_a_token_only_by_sending_it_deeper(in_float64, cases, fitted, threshold: float) -> None:
    backbone, bank = in_float64
    depth = [*LAYERS, None]
    gated = build_checks(bank, fitted, CheckOptions(gate=True))
    moved = 0
    for pixels, prompt in cases:
        # The first token alone: later ones may be read after another history.
        without, with_gate = (
            generate(backbone, bank, pixels.double(), prompt, thresholds=threshold, checks=checks, max_new_tokens=1)[0]
            for checks in (None, gated)
        )
        before, after = depth.index(without.exit_layers[0]), depth.index(with_gate.exit_layers[0])
        assert after >= before
        assert with_gate.exit_calls <= without.exit_calls + after - before
        if after == before:
            assert with_gate.tokens == without.tokens
        moved += after > before
    assert moved  # else this says nothing


def test_a_shut_gate_is_full_depth_and_an_open_one_no_gate(in_float64, cases, fitted) -> None:
    backbone, bank = in_float64
    shut, opened = (
        build_checks(bank, fitted, CheckOptions(gate=True, gate_threshold=threshold)) for threshold in (1.0, 0.0)
    )
    for pixels, prompt in cases:
        arguments = (pixels.double(), prompt)

        def decode(checks, exits=bank, arguments=arguments):
            thresholds = None if exits is None else 0.01
            return generate(backbone, exits, *arguments, thresholds=thresholds, checks=checks, max_new_tokens=6)[0]

        assert decode(shut).tokens == decode(None, exits=None).tokens
        assert decode(shut).exit_calls == 0
        assert decode(opened).records == decode(None).records


@pytest.mark.parametrize(
    "options",
    [
        CheckOptions(gate=True),
        CheckOptions(discriminator=True),
        CheckOptions(head="pruned"),
        CheckOptions(head="low_rank"),
    ],
    ids=lambda options: options.setting,
)
def test_lossless_decoding_stays_lossless_with_any_check(in_float64, cases, fitted, options: CheckOptions) -> None:
    backbone, bank = in_float64
    checks = build_checks(bank, fitted, options)
    drafted = 0
    for pixels, prompt in cases:
        full = generate(backbone, None, pixels.double(), prompt, max_new_tokens=8)[0]
        checked = generate(
            backbone, bank, pixels.double(), prompt, thresholds=0.01, checks=checks, lossless=True, max_new_tokens=8
        )[0]
        assert checked.tokens == full.tokens
        drafted += checked.drafted
    assert drafted


def test_a_position_table_is_asked_only_where_it_pays(backbone, bank, cases, fitted) -> None:
    table = fitted.position_thresholds(CheckOptions(gate=True), "vqa", [0.0, 0.0, 0.0])
    assert table == ((0.0, 1.0), (1.0, 0.0), (0.0, 0.0))
    assert fitted.position_thresholds(CheckOptions(), "vqa") == ((0.1, 1.0), (1.0, 0.2), (0.3, 0.3))
    for pixels, prompt in cases:
        answer = generate(backbone, bank, pixels, prompt, thresholds=table, max_new_tokens=4, eos_token_id=-1)[0]
        assert answer.exit_layers == [1, 3, 3, 3]
    with pytest.raises(ValueError, match="task 'caption'"):
        fitted.position_thresholds(CheckOptions(), "caption")


# Files.


@pytest.fixture
def saved(backbone, bank, fitted, tmp_path):
    save_exits(bank, tmp_path, backbone_hash=backbone_hash(backbone), thresholds=0.5)
    save_checks(tmp_path, fitted, {"data": "here"})
    return tmp_path


@pytest.mark.parametrize("head", ["full", "pruned", "low_rank"])
def test_checks_loaded_again_answer_the_same(backbone, bank, features, fitted, saved, head: str) -> None:
    options = CheckOptions(gate=True, discriminator=True, head=head, rank=5, pruned_size=13)
    first, second = build_checks(bank, fitted, options), load_checks(saved, backbone, bank, options)
    for k in range(len(LAYERS)):
        assert torch.equal(first.scores(k, features).logits, second.scores(k, features).logits)
        assert torch.equal(first.may_exit(k, features), second.may_exit(k, features))
        assert torch.equal(first.looks_final(k, features), second.looks_final(k, features))


def test_everything_that_was_fitted_is_kept(backbone, bank, fitted, saved) -> None:
    loaded = load_fitted(saved, backbone, bank)
    for entry in dataclasses.fields(FittedChecks):
        before, after = getattr(fitted, entry.name), getattr(loaded, entry.name)
        if isinstance(before, nn.Module):
            assert all(torch.equal(x, y) for x, y in zip(before.parameters(), after.parameters(), strict=True))
        elif isinstance(before, torch.Tensor):
            assert torch.equal(before, after)
        else:
            assert before == after
    assert read_checks_manifest(saved).extra == {"data": "here"}
    assert sorted(path.name for path in saved.iterdir()) == sorted(
        [MANIFEST, WEIGHTS, "exits.json", "exits.safetensors"]
    )


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS])
def test_a_missing_file_is_named(backbone, bank, saved, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_fitted(saved, backbone, bank)


def test_checks_need_exits_beside_them(fitted, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"exits\.json"):
        save_checks(tmp_path, fitted)


def test_damaged_weights_are_noticed(backbone, bank, saved) -> None:
    content = bytearray((saved / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (saved / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        load_fitted(saved, backbone, bank)


def test_checks_of_other_exits_are_refused(backbone, bank, saved) -> None:
    other = copy.deepcopy(bank)
    next(other.transformers.parameters()).data += 1
    save_exits(other, saved, backbone_hash=backbone_hash(backbone), thresholds=0.5)
    with pytest.raises(ValueError, match="fit the checks again"):
        load_fitted(saved, backbone, other)


def test_exits_at_other_layers_are_refused(backbone, saved) -> None:
    with pytest.raises(ValueError, match=r"\[1, 3, 5\].*\[1, 3\]"):
        load_fitted(saved, backbone, ExitBank(backbone, (1, 3)))


@pytest.mark.parametrize("change", ["shape", "missing"])
def test_weights_that_do_not_fit_are_named(backbone, bank, saved, change: str) -> None:
    tensors = load_file(saved / WEIGHTS)
    if change == "shape":
        tensors["gates.weight_in"] = tensors["gates.weight_in"][:, 1:].contiguous()
    else:
        del tensors["gates.weight_in"]
    save_file(tensors, saved / WEIGHTS)
    manifest = json.loads((saved / MANIFEST).read_text())
    manifest["weights_sha256"] = hashlib.sha256((saved / WEIGHTS).read_bytes()).hexdigest()
    (saved / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"gates\.weight_in"):
        load_fitted(saved, backbone, bank)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format_version": 1}'])
def test_a_file_that_is_no_manifest_is_named(backbone, bank, saved, content: str) -> None:
    (saved / MANIFEST).write_text(content)
    with pytest.raises(ValueError, match=MANIFEST):
        load_fitted(saved, backbone, bank)


def test_a_later_format_is_refused(backbone, bank, saved) -> None:
    manifest = json.loads((saved / MANIFEST).read_text())
    (saved / MANIFEST).write_text(json.dumps(manifest | {"format_version": 2}))
    with pytest.raises(ValueError, match="format 2"):
        load_fitted(saved, backbone, bank)


# Options.


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"head": "small"}, "head='small'"),
        ({"pruned_size": 0}, "pruned_size=0"),
        ({"rescored": -1}, "rescored=-1"),
        ({"gate_threshold": 1.5}, r"gate_threshold=1\.5"),
        ({"discriminator_threshold": [0.5, float("nan")]}, "discriminator_threshold"),
    ],
)
def test_values_that_cannot_run_are_refused_by_name(values, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CheckOptions(**values)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (CheckOptions(head="pruned", pruned_size=10**6), "pruned_size=1000000"),
        (CheckOptions(head="low_rank", rank=10**6), "rank=1000000"),
        (CheckOptions(gate=True, gate_threshold=[0.5]), "gate_threshold: 1 values for 3 exits"),
    ],
)
def test_options_beyond_what_was_fitted_are_refused_by_name(bank, fitted, options: CheckOptions, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_checks(bank, fitted, options)
