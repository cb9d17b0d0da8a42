"""Candidate answers ranked by their likelihood through the exits, as VisDial judges models that generate answers.

A candidate's log-likelihood is the sum over its tokens, the one that ends it among them, given image, prompt and the tokens
before; plain, or divided by their number.  Every sample is read in several ways: at full depth; through each exit's head; and by
a confidence threshold, each token through the first exit that is confident enough about whatever follows there, which is the one
where the decoder would leave (its caches are exact, so teacher forcing sees the decoder's own states).  Ranking computes all
depths for every token, so it gives no speed.

The prompt runs once and all candidates continue from its keys and values.  Samples are shared out by image.

Shape letters: A readings, C candidates, R candidates that run together, N tokens of an answer, M tokens of several, D model
width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from free_dist.backbones import Backbone, LayerCache, Memory, Span
from free_dist.config import Recipe, UserError
from free_dist.data.samples import Sample, SampleEncoder, image_numbers
from free_dist.decoding.policy import MaxProbPolicy, widened
from free_dist.evaluation.benchmark import mean_with_interval
from free_dist.evaluation.evaluate import Gather, alone, task_samples
from free_dist.evaluation.metrics_ranking import ndcg, ranking_metrics, ranks_of
from free_dist.evaluation.rows import RankingRow
from free_dist.exits import ExitBank

TOGETHER = 25
"""Candidates that run together; each holds a copy of the prompt's keys and values."""


class Reading(NamedTuple):
    """One way of reading likelihoods."""

    method: str
    """``full``, or the name of a bank."""
    exit_layer: int | None
    """The exit whose head scores every token; None: full depth, or by ``threshold``."""
    threshold: float | None

    @property
    def name(self) -> str:
        """For file names: ``full``, ``exits@4``, ``exits-0.9``."""
        where = "" if self.exit_layer is None else f"@{self.exit_layer}"
        return self.method + where + ("" if self.threshold is None else f"-{self.threshold:g}")


class Likelihoods(NamedTuple):
    """What every reading says of C candidates."""

    sums: NDArray[np.float64]
    """[A, C], log-likelihoods in nats."""
    tokens: NDArray[np.int64]
    """[C]."""
    layers: NDArray[np.int64]
    """[A, L + 1], tokens that were scored after block k, by k; all candidates together."""


class CandidateScorer:
    """Likelihoods of answers on one backbone, in all readings at once."""

    def __init__(
        self,
        backbone: Backbone,
        banks: Mapping[str, ExitBank],
        thresholds: Sequence[float],
        *,
        together: int = TOGETHER,
    ) -> None:
        """Readings: full depth, then every exit and every threshold below 1 of every bank."""
        self.backbone = backbone
        self.banks = dict(banks)
        self.together = together
        self.readings = [Reading("full", None, None)]
        for method, bank in banks.items():
            self.readings += [Reading(method, layer, None) for layer in bank.exit_layers]
            self.readings += [Reading(method, None, threshold) for threshold in thresholds if threshold < 1]
        self._taps = sorted({layer for bank in banks.values() for layer in bank.exit_layers})

    @torch.inference_mode()
    def score(self, prefix: Tensor, prompt_ids: Sequence[int], answers: Sequence[Sequence[int]]) -> Likelihoods:
        """Visual prefix [1, Q, D], a prompt's ids and C answers' ids, each with the token that ends it.

        Raises UserError where prompt and answer exceed the backbone's positions, ValueError for an empty answer.
        """
        if not answers or not all(answers):
            raise ValueError("want at least one answer, and none without tokens")
        backbone, device = self.backbone, prefix.device
        start = backbone.start([list(prompt_ids)], prefix)
        begin, longest = start.hidden.shape[1], max(map(len, answers))
        if begin + longest - 1 > backbone.max_positions:
            raise UserError(
                f"a prompt of {begin} positions and a candidate of {longest} tokens exceed the backbone's "
                f"{backbone.max_positions} positions: lower data.max_turns or data.max_history_tokens"
            )
        run = _Run(self, start.memory, 1, begin + longest - 1)
        opening = run.advance(start.hidden, backbone.new_span(0, begin, device), last_only=True)
        sums = torch.zeros(len(self.readings), len(answers), dtype=torch.float64, device=device)
        layers = torch.zeros(len(self.readings), backbone.n_blocks + 1, dtype=torch.long, device=device)
        first = torch.tensor([answer[0] for answer in answers], device=device)
        everyone = torch.arange(len(answers), device=device)
        # What follows the prompt is asked once for all of them.
        self._add(sums, layers, [feature.expand(len(answers), -1, -1) for feature in opening], first[:, None], everyone)
        for chunk in everyone[[len(answer) > 1 for answer in answers]].split(self.together):
            rows = [answers[c] for c in chunk.tolist()]
            width = max(map(len, rows)) - 1
            ids = torch.full((len(rows), width + 1), backbone.layout.pad_token_id, device=device)
            wanted = torch.full((len(rows), width), -1, device=device)
            for r, row in enumerate(rows):
                ids[r, : len(row)] = torch.tensor(row, device=device)
                wanted[r, : len(row) - 1] = ids[r, 1 : len(row)]
            hidden = backbone.embed(ids[:, :-1], None, begin)
            features = run.repeated(len(rows)).advance(hidden, backbone.new_span(begin, width, device))
            self._add(sums, layers, features, wanted, chunk)
        tokens = np.array([len(answer) for answer in answers])
        return Likelihoods(sums.cpu().numpy(), tokens, layers.cpu().numpy())

    def _add(
        self, sums: Tensor, layers: Tensor, features: Sequence[Tensor], wanted: Tensor, candidates: Tensor
    ) -> None:
        """Count the tokens ``wanted`` [R, N] (-1: none) of ``candidates`` [R], read from ``features``, each [R, N, D].

        ``features``: the full model's, then every exit's, bank by bank.
        """
        kept = wanted >= 0
        targets = wanted[kept][:, None]  # [M, 1]
        rows = candidates[:, None].expand_as(wanted)[kept]
        depth = self.backbone.n_blocks
        full = _log_likelihood(self.backbone.lm_head(features[0][kept]), targets)
        read = [(full, torch.full_like(rows, depth))]
        place = 1
        for method, bank in self.banks.items():
            likelihoods, confidences = [], []
            for index, feature in enumerate(features[place : place + len(bank.exit_layers)]):
                logits = bank.logits_of(index, feature[kept])
                likelihoods.append(_log_likelihood(logits, targets))
                measured = MaxProbPolicy.measure(widened(logits))[1]
                confidences.append(torch.tensor(measured, dtype=torch.float64, device=logits.device))
            place += len(bank.exit_layers)
            read += [(own, torch.full_like(rows, k)) for k, own in zip(bank.exit_layers, likelihoods, strict=True)]
            thresholds = [one.threshold for one in self.readings if one.method == method and one.threshold is not None]
            for threshold in thresholds:
                chosen, where = read[0]
                deepest_first = zip(reversed(bank.exit_layers), likelihoods[::-1], confidences[::-1], strict=True)
                for k, own, confidence in deepest_first:
                    leaves = confidence > threshold
                    chosen = torch.where(leaves, own, chosen)
                    where = where.masked_fill(leaves, k)
                read.append((chosen, where))
        for a, (likelihood, where) in enumerate(read):
            sums[a].index_add_(0, rows, likelihood)
            layers[a] += torch.bincount(where, minlength=depth + 1)


class _Run:
    """Keys and values of one prompt, in the blocks and in every exit, for one row or many."""

    def __init__(self, scorer: CandidateScorer, memory: Memory | None, n_rows: int, capacity: int) -> None:
        self._scorer = scorer
        self._memory = memory
        backbone = scorer.backbone
        n_exits = sum(len(bank.exit_layers) for bank in scorer.banks.values())
        caches = [backbone.new_layer_cache(n_rows, capacity, memory) for _ in range(backbone.n_blocks + n_exits)]
        self._blocks, self._exits = caches[: backbone.n_blocks], caches[backbone.n_blocks :]

    def repeated(self, n_rows: int) -> _Run:
        """The same for ``n_rows`` rows, all of them this one; this one stays as it is."""
        run = copy.copy(self)
        rows = torch.zeros(n_rows, dtype=torch.long, device=self._blocks[0].keys.device)
        run._memory = None if self._memory is None else self._memory.take_rows(rows)
        run._blocks = [_taken(cache, rows, run._memory) for cache in self._blocks]
        run._exits = [_taken(cache, rows, run._memory) for cache in self._exits]
        return run

    def advance(self, hidden: Tensor, span: Span, *, last_only: bool = False) -> list[Tensor]:
        """``h_0`` [R, N, D] at new positions -> normed features [R, N, D] of the full model and of every exit.

        ``last_only``: of the last position alone, [R, 1, D].
        """
        backbone, scorer = self._scorer.backbone, self._scorer
        taps: dict[int, Tensor] = {}
        reached = 0
        for k in scorer._taps:
            hidden = backbone.run_blocks(hidden, reached, k, self._blocks, span)
            taps[k], reached = hidden, k
        # The last block's output may be what an exit reads, too.
        hidden = backbone.run_blocks(
            hidden, reached, backbone.n_blocks, self._blocks, span, last_only=last_only and reached < backbone.n_blocks
        )
        states = [hidden[:, -1:] if last_only else hidden]
        caches = iter(self._exits)
        for bank in scorer.banks.values():
            for k, transformer in zip(bank.exit_layers, bank.transformers, strict=True):
                states.append(transformer(taps[k], next(caches), span, last_only=last_only))
        return [backbone.final_norm(state) for state in states]


def _taken(cache: LayerCache, rows: Tensor, memory: Memory | None) -> LayerCache:
    own = copy.copy(cache)
    own.take_rows(rows, memory)
    return own


def _log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits [M, V] and ids [M, 1] -> log-probabilities [M], float64."""
    wide = widened(logits)
    return (wide.gather(1, targets).squeeze(1) - wide.logsumexp(1)).double()


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """One sample's candidates, ranked; small enough to send between ranks."""

    index: int
    """Place in the whole evaluation."""
    ranks: NDArray[np.int16]
    """[A, 2, C], from 1; the second of the two by likelihood per token."""
    layers: NDArray[np.int64]
    """[A, L + 1], see Likelihoods."""


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The candidates of all samples of a task, ranked in every reading."""

    task: str
    readings: tuple[Reading, ...]
    samples: tuple[Sample, ...]
    ranked: tuple[Ranked, ...]
    """In the order of ``samples``."""

    def rows(self) -> list[RankingRow]:
        """One row per reading, plain and by likelihood per token."""
        return [self._row(a, normalized) for a in range(len(self.readings)) for normalized in (False, True)]

    def _row(self, a: int, normalized: bool) -> RankingRow:
        origins = [sample.origin for sample in self.samples]
        ranks = [one.ranks[a, int(normalized)] for one in self.ranked]
        gold, relevance = [origin.gold for origin in origins], [origin.relevance for origin in origins]
        counts = np.sum([one.layers[a] for one in self.ranked], axis=0)
        asked = list(zip(ranks, gold, relevance, image_numbers(self.samples), strict=True))
        golden = [(1 / float(own[g]), image) for own, g, _, image in asked if g is not None]
        judged = [(ndcg(own, wanted), image) for own, _, wanted, image in asked if any(wanted)]
        full = [one.ranks[0, int(normalized)] for one in self.ranked]
        return RankingRow(
            task=self.task,
            method=self.readings[a].method,
            exit_layer=self.readings[a].exit_layer,
            threshold=self.readings[a].threshold,
            normalized=normalized,
            metrics=ranking_metrics(ranks, gold, relevance),
            mrr_interval=_interval(golden),
            ndcg_interval=_interval(judged),
            best_agreement=float(np.mean([own.argmin() == of_full.argmin() for own, of_full in zip(ranks, full, strict=True)])),
            mean_layer=float((counts * np.arange(len(counts))).sum() / counts.sum()),
            n=len(self.ranked),
        )  # fmt: skip


def rank_candidates(
    backbone: Backbone,
    encoder: SampleEncoder,
    banks: Mapping[str, ExitBank],
    recipe: Recipe,
    *,
    task: str = "dialogue",
    rank: int = 0,
    world_size: int = 1,
    gather: Gather[Ranked] = alone,
    quiet: bool = False,
) -> Ranking | None:
    """Rank the candidates of every sample of ``task`` that has some; None where none has, or the recipe does not want it.

    ``evaluation.max_samples`` and ``evaluation.split`` hold here too.  Every rank returns the same.
    """
    if not recipe.evaluation.rank_candidates:
        return None
    samples = [sample for sample in task_samples(recipe, task) if sample.origin.candidates]
    if not samples:
        return None
    scorer = CandidateScorer(backbone, banks, recipe.evaluation.thresholds)
    mine = [i for i, place in enumerate(image_numbers(samples)) if place % world_size == rank]
    device = next(backbone.parameters()).device
    seen: tuple[bytes, Any] | None = None
    found = []
    for i in tqdm(mine, desc=f"rank {task}", unit="sample", disable=quiet or rank != 0, mininterval=1.0):
        sample = samples[i]
        if seen is None or seen[0] != sample.image or backbone.prefix_reads_prompt:
            pixels = encoder.encode_image(sample.image)[None].to(device)
            with torch.inference_mode():
                instruction = encoder.encode_instruction(sample.turns, device)
                seen = sample.image, backbone.encode_prefix(pixels, None, instruction)
        answers = [encoder.encode_answer(text) for text in sample.origin.candidates]
        told = scorer.score(seen[1], encoder.encode_prompt(sample.turns), answers)
        ranks = [[ranks_of(sums), ranks_of(sums / told.tokens)] for sums in told.sums]
        found.append(Ranked(index=i, ranks=np.array(ranks, dtype=np.int16), layers=told.layers))
    merged = sorted((one for part in gather(found) for one in part), key=lambda one: one.index)
    assert [one.index for one in merged] == list(range(len(samples))), "a sample was dropped or counted twice"
    return Ranking(task=task, readings=tuple(scorer.readings), samples=tuple(samples), ranked=tuple(merged))


def _interval(values: Sequence[tuple[float, int]]) -> tuple[float, float] | None:
    """95% bootstrap interval of the mean of (value, image) over images; None without values."""
    return mean_with_interval(*zip(*values, strict=True))[1] if values else None
