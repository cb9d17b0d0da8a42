"""Fitting of cheap checks: rows come from the training split alone, thresholds keep their promise, positions are chosen best."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import shutil
from pathlib import Path

import pytest
import torch

from free_dist.backbones import Blip2Backbone
from free_dist.backbones.embedded import new_model
from free_dist.config import TASKS
from free_dist.data.samples import IGNORE, evaluation_samples
from free_dist.data.stream import epoch_samples, records
from free_dist.exits import ExitBank
from free_dist.exits.check_files import build_checks
from free_dist.exits.check_fitting import (
    CHOOSE,
    MEASURE,
    TRAIN,
    CheckRows,
    FitSettings,
    covering_size,
    fit_checks,
    recall_thresholds,
    token_order,
    worthwhile_positions,
)
from free_dist.exits.check_replay import ask, ask_all, measure, outcome, with_positions, worth_asking
from free_dist.exits.gate import CheckOptions
from free_dist.training.check_rows import answer_positions, collect_rows, training_token_counts

LAYERS = (2, 3)


@pytest.fixture(scope="module")
def backbone() -> Blip2Backbone:
    """Four blocks whose weights are large enough that blocks matter, tokens vary, and exits are sometimes sure."""
    model = new_model(width=32, n_blocks=4, n_heads=2, seed=4).eval().requires_grad_(False)
    for parameter in model.language_model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(6.0)
    return Blip2Backbone(model)


@pytest.fixture(scope="module")
def bank(backbone) -> ExitBank:
    """Exits moved away from the blocks they were copied from: both agree with the full model on some rows only."""
    bank = ExitBank(backbone, LAYERS).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for parameter in bank.transformers.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return bank


@pytest.fixture(scope="module")
def encoder(tiny_encoder, backbone):
    assert tiny_encoder.layout == backbone.layout
    return tiny_encoder


@pytest.fixture(scope="module")
def rows(backbone, bank, encoder, tiny_data) -> CheckRows:
    return collect_rows(backbone, encoder, bank, tiny_data, samples_per_task=48, batch_size=16, quiet=True)


@pytest.fixture(scope="module")
def thresholds(rows) -> tuple[float, ...]:
    """Confidences that half of the rows exceed, and on which no row stands."""
    ordered = rows.confidences.sort(-1).values
    half = ordered.shape[-1] // 2
    return tuple(((ordered[..., half - 1] + ordered[..., half]) / 2).tolist())


@pytest.fixture(scope="module")
def counts(encoder, tiny_data, backbone):
    return training_token_counts(tiny_data, encoder, backbone.vocab_size)


@pytest.fixture(scope="module")
def fitted(rows, bank, backbone, counts, thresholds):
    settings = FitSettings(steps=150, recall=0.9)
    eos = backbone.layout.eos_token_id
    return fit_checks(rows, bank, thresholds=thresholds, token_counts=counts, eos=eos, settings=settings)


# Rows.


def test_rows_need_no_split_but_the_training_one(backbone, bank, encoder, tiny_data, rows, counts, tmp_path) -> None:
    root = tmp_path / "data"
    shutil.copytree(f"{tiny_data.root}/train", root / "train")
    alone = dataclasses.replace(tiny_data, root=str(root))
    again = collect_rows(backbone, encoder, bank, alone, samples_per_task=48, batch_size=16, quiet=True)
    assert torch.equal(again.hidden, rows.hidden)
    assert torch.equal(training_token_counts(alone, encoder, backbone.vocab_size), counts)


def test_rows_are_what_a_plain_forward_says_at_answer_positions(backbone, bank, encoder, tiny_data, rows) -> None:
    sample = next(epoch_samples(tiny_data, "vqa", seed=0, epoch=0))
    batch = encoder.collate([sample])
    kept = (batch.targets[0] != IGNORE).nonzero().flatten()
    with torch.inference_mode():
        prefix = backbone.encode_prefix(batch.pixel_values)
        h0 = backbone.embed(batch.input_ids, prefix)
        for k, layer in enumerate(LAYERS):
            hidden = backbone.run_blocks(h0, 0, layer)
            feature = backbone.final_norm(bank.transformers[k](hidden))[0, kept]
            probability, token = torch.softmax(backbone.lm_head(feature), -1).max(-1)
            torch.testing.assert_close(rows.hidden[k, : len(kept)], hidden[0, kept], atol=1e-3, rtol=1e-4)
            torch.testing.assert_close(rows.features[k, : len(kept)], feature, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(rows.confidences[k, : len(kept)], probability, atol=1e-4, rtol=1e-3)
            assert torch.equal(rows.exit_tokens[k, : len(kept)], token)
        final = backbone.lm_head(backbone.final_norm(backbone.run_blocks(h0, 0, 4)))[0, kept].argmax(-1)
    assert torch.equal(rows.final_tokens[: len(kept)], final)
    assert rows.positions[: len(kept)].tolist() == list(range(len(kept)))


def test_no_image_stands_in_two_parts(backbone, bank, encoder, tiny_data) -> None:
    def parts_of(task: str) -> dict[str, set[int]]:
        one = dataclasses.replace(tiny_data, tasks={task: 1.0})
        found = collect_rows(backbone, encoder, bank, one, samples_per_task=48, batch_size=7, quiet=True)
        dealt: dict[str, set[int]] = {}
        parts = iter(found.parts.tolist())
        for sample in itertools.islice(epoch_samples(one, task, seed=0, epoch=0), 48):
            n = sum(target != IGNORE for target in encoder.encode_text(sample.turns)[1])
            dealt.setdefault(sample.key.partition("-q")[0], set()).update(itertools.islice(parts, n))
        return dealt

    dealt = parts_of("vqa")
    assert max(len(parts) for parts in dealt.values()) == 1
    assert set().union(*dealt.values()) == {TRAIN, CHOOSE, MEASURE}


def test_rows_know_their_task(encoder, tiny_data, rows) -> None:
    for task in TASKS:
        samples = itertools.islice(epoch_samples(tiny_data, task, seed=0, epoch=0), 48)
        wanted = sum(sum(t != IGNORE for t in encoder.encode_text(sample.turns)[1]) for sample in samples)
        assert (rows.tasks == TASKS.index(task)).sum() == wanted


def test_answer_positions_start_anew_with_every_answer() -> None:
    answers = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 0], [0, 1, 0, 0, 1, 1, 0, 0]]).bool()
    assert answer_positions(answers).tolist() == [[0, 0, 0, 1, 2, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0, 0]]


def test_tokens_are_counted_as_rows_hold_them(tiny_data, encoder, counts) -> None:
    wanted = torch.zeros_like(counts)
    for record in records(Path(tiny_data.root), "train"):
        for task in tiny_data.tasks:
            for sample in evaluation_samples(record, task, tiny_data):
                for reference in sample.references:
                    turns = [*sample.turns[:-1], dataclasses.replace(sample.turns[-1], answer=reference)]
                    targets = torch.tensor(encoder.encode_text(turns)[1])
                    wanted += torch.bincount(targets[targets != IGNORE], minlength=len(wanted))
    assert torch.equal(counts, wanted)
    assert counts.sum() > 0


# Statistics.


def test_token_order_puts_the_end_of_sequence_first_and_then_falls() -> None:
    counts = torch.tensor([3, 0, 9, 1, 9, 0])
    assert token_order(counts, eos=5).tolist() == [5, 2, 4, 0, 3, 1]


@pytest.mark.parametrize("coverage", [0.3, 0.5, 0.9, 1.0])
def test_covering_size_is_the_shortest_prefix_that_covers(coverage: float) -> None:
    counts = torch.tensor([1, 50, 30, 10, 5, 4, 0, 0])
    size = covering_size(counts, coverage)
    assert counts[:size].sum() >= coverage * counts.sum() - 1e-9
    assert counts[: size - 1].sum() < coverage * counts.sum()


@pytest.mark.parametrize("recall", [0.5, 0.9, 0.98, 1.0])
def test_recall_thresholds_keep_the_wanted_share_and_are_the_largest_that_do(recall: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 6 * torch.randn(3, 400, generator=generator)
    positives = torch.rand(3, 400, generator=generator) < 0.4
    for scores, wanted, threshold in zip(
        torch.sigmoid(logits.double()), positives, recall_thresholds(logits, positives, recall), strict=True
    ):
        found = scores[wanted].sort().values
        assert (found > threshold).double().mean() >= recall
        after = found[found > threshold][0]  # a threshold at this score would lose it
        assert (found > after).double().mean() < recall


def test_an_exit_that_never_emits_is_not_held_back() -> None:
    assert recall_thresholds(torch.randn(1, 9), torch.zeros(1, 9, dtype=torch.bool), 0.98) == (0.0,)


@pytest.mark.parametrize(
    ("rate", "cost", "pays"), [(0.5, 1.9, True), (0.5, 2.1, False), (0.1, 0.3, True), (0.1, 0.5, False)]
)
def test_one_exit_pays_where_its_rate_times_the_blocks_saved_exceeds_its_cost(rate, cost, pays) -> None:
    emits = (torch.arange(100) < 100 * rate)[None]
    place = torch.zeros(100, dtype=torch.long)
    found = worthwhile_positions(emits, torch.full((1, 100), cost), place, exit_layers=(4,), n_blocks=8, n_positions=1)
    assert found.tolist() == [[pays]]


def walk(emits, costs, layers, n_blocks, asked) -> float:
    """Blocks of one row, exits asked from shallow to deep; plain Python."""
    total = 0.0
    for k, layer in enumerate(layers):
        if asked[k]:
            total += float(costs[k])
            if emits[k]:
                return total + layer
    return total + n_blocks


def test_positions_are_the_cheapest_of_all_choices() -> None:
    generator = torch.Generator().manual_seed(2)
    layers, n_blocks, n_positions = (2, 4, 7), 16, 3
    emits = torch.rand(3, 200, generator=generator) < torch.tensor([[0.2], [0.5], [0.6]])
    costs = 4 * torch.rand(3, 200, generator=generator)
    positions = torch.randint(0, 5, (200,), generator=generator)  # 3 and 4 belong to the last column
    found = worthwhile_positions(
        emits, costs, positions, exit_layers=layers, n_blocks=n_blocks, n_positions=n_positions
    )
    for p in range(n_positions):
        here = [i for i in range(200) if min(int(positions[i]), n_positions - 1) == p]

        def mean_cost(asked, here=here):
            return sum(walk(emits[:, i], costs[:, i], layers, n_blocks, asked) for i in here) / len(here)

        best = min(mean_cost(asked) for asked in itertools.product((False, True), repeat=3))
        assert mean_cost(found[:, p].tolist()) == pytest.approx(best)


def test_an_exit_that_a_deeper_one_makes_needless_is_not_asked() -> None:
    # Both emit the same rows, one block apart: the second check would cost more than the block it saves.
    emits = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0]]).bool()
    found = worthwhile_positions(
        emits, torch.full((2, 4), 2.0), torch.zeros(4, dtype=torch.long), exit_layers=(3, 4), n_blocks=20, n_positions=1
    )
    assert found.sum() == 1


# Fitting.


def area_under_curve(scores, wanted) -> float:
    """Chance that a wanted row scores higher than another."""
    return float((scores[wanted][:, None] > scores[~wanted][None]).double().mean())


def test_gates_and_discriminators_beat_chance_on_held_out_images(rows, fitted, thresholds) -> None:
    outside = rows.parts != TRAIN
    held_out = dataclasses.replace(rows, parts=torch.where(outside, MEASURE, TRAIN)).part(MEASURE)
    normed = torch.nn.functional.layer_norm(held_out.hidden, held_out.hidden.shape[2:])
    emitting = held_out.confident(thresholds) & held_out.agreeing()
    generator = torch.Generator().manual_seed(0)
    for logits, wanted in (
        (fitted.gates(normed), emitting),
        (fitted.discriminators(held_out.features), held_out.agreeing()),
    ):
        for scores, truth in zip(logits, wanted, strict=True):
            assert min(truth.sum(), (~truth).sum()) > 20
            shuffles = (truth[torch.randperm(len(truth), generator=generator)] for _ in range(300))
            assert area_under_curve(scores, truth) > max(area_under_curve(scores, chance) for chance in shuffles)


def test_gates_reach_their_recall_where_it_was_chosen(rows, bank, backbone, fitted, thresholds) -> None:
    chosen = rows.part(CHOOSE)
    answers = ask(build_checks(bank, fitted, CheckOptions(gate=True)), chosen, thresholds, backbone, bank)
    wanted = chosen.confident(thresholds) & chosen.agreeing()
    for passed, truth in zip(answers.gate, wanted, strict=True):
        assert (passed & truth).sum() >= 0.9 * truth.sum()


def test_full_checks_replayed_are_the_recorded_exits(rows, bank, backbone, fitted, thresholds) -> None:
    answers = ask(build_checks(bank, fitted, CheckOptions()), rows, thresholds, backbone, bank)
    assert torch.equal(answers.emits, rows.confident(thresholds))
    assert torch.equal(answers.tokens, rows.exit_tokens)


def replayed(answers, rows, asked_at) -> dict[str, float]:
    """Reference of ``outcome``, one row after the other; ``asked_at(k, i)`` says which exits are asked."""
    spent, blocks, fruitless, right, emitted = [], [], [], [], 0
    costs = answers.costs
    for i in range(len(rows.positions)):
        spent.append(0.0)
        blocks.append(4)
        for k, layer in enumerate(LAYERS):
            if not asked_at(k, i):
                continue
            price = costs.gate
            if answers.gate[k, i]:
                price += 1 + costs.discriminator + (costs.head if answers.discriminator[k, i] else 0)
            spent[-1] += price
            if answers.gate[k, i] and answers.discriminator[k, i] and answers.sure[k, i]:
                blocks[-1] = layer
                emitted += 1
                right.append(float(answers.tokens[k, i] == rows.final_tokens[i]))
                break
            fruitless.append(price)

    def mean(values) -> float:
        return sum(values) / len(values) if values else 0.0

    return {
        "emitted": emitted / len(spent),
        "agreement": mean(right) if right else 1.0,
        "backbone_blocks": mean(blocks),
        "check_blocks": mean(spent),
        "fruitless_visit": mean(fruitless),
    }


def test_outcomes_are_those_of_one_row_after_the_other(rows, bank, backbone, fitted) -> None:
    held_out = rows.part(MEASURE)
    every = ask_all(bank, fitted, held_out, backbone)
    chosen = with_positions(fitted, every, held_out, exit_layers=LAYERS, n_blocks=4, n_positions=2)
    for name, answers in every.items():
        asked = worth_asking(chosen, name, held_out)
        found = outcome(answers, held_out, exit_layers=LAYERS, n_blocks=4, asked=asked)
        everywhere = outcome(answers, held_out, exit_layers=LAYERS, n_blocks=4)

        def pays(k, i, name=name):
            table = chosen.worthwhile[TASKS[held_out.tasks[i]]][name]
            return table[k][min(int(held_out.positions[i]), 1)]

        wanted = replayed(answers, held_out, pays)
        assert dataclasses.asdict(found) == pytest.approx(wanted, rel=1e-4)
        assert dataclasses.asdict(everywhere) == pytest.approx(replayed(answers, held_out, lambda *_: True), rel=1e-4)
        # Asking everybody and asking nobody are among the choices.
        assert found.total_blocks <= min(everywhere.total_blocks, 4) + 1e-6


def test_costs_are_weights_over_a_blocks_weights(bank, backbone, fitted) -> None:
    def size(module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    options = CheckOptions(gate=True, discriminator=True, head="pruned", pruned_size=10)
    costs = build_checks(bank, fitted, options).costs(backbone, bank.transformers[0])
    block = size(backbone.block(1))
    assert costs.gate == pytest.approx(size(fitted.gates) / len(LAYERS) / block)
    assert costs.head == pytest.approx(10 * backbone.hidden_size / block)
    assert build_checks(bank, fitted, CheckOptions()).costs(backbone, bank.transformers[0]).visit() == pytest.approx(
        1 + size(bank.lm_head) / block
    )
    assert costs.visit(0.0) == costs.gate


def test_the_same_seed_fits_the_same_checks_and_leaves_the_global_generator_alone(
    rows, bank, backbone, counts, thresholds, fitted
) -> None:
    state = torch.get_rng_state()
    settings = FitSettings(steps=150, recall=0.9)
    again = fit_checks(
        rows, bank, thresholds=thresholds, token_counts=counts, eos=backbone.layout.eos_token_id, settings=settings
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again.gates.weight_in, fitted.gates.weight_in)
    assert again.gate_thresholds == fitted.gate_thresholds


def test_the_report_covers_every_setting_and_the_whole_vocabulary(rows, bank, backbone, fitted) -> None:
    held_out = rows.part(MEASURE)
    complete = with_positions(
        fitted, ask_all(bank, fitted, held_out, backbone), held_out, exit_layers=LAYERS, n_blocks=4, n_positions=2
    )
    report = measure(complete, bank, backbone, held_out)
    assert len(report.everywhere) == len(report.where_it_pays) == 12
    assert report.coverage[backbone.vocab_size] == 1.0
    assert list(report.coverage.values()) == sorted(report.coverage.values())
    assert report.screen[backbone.hidden_size] == 1.0
    assert report.everywhere["full"].agreement <= 1.0


def test_too_few_images_are_told(rows, bank, backbone, counts, thresholds) -> None:
    lonely = copy.copy(rows.part(TRAIN))
    with pytest.raises(ValueError, match="too few images"):
        fit_checks(lonely, bank, thresholds=thresholds, token_counts=counts, eos=2, settings=FitSettings(steps=1))


@pytest.mark.parametrize("field", ["recall", "coverage", "steps", "rank", "n_positions"])
def test_settings_that_cannot_run_are_named(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}=0"):
        FitSettings(**{field: 0})
