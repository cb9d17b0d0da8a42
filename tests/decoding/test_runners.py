"""Fixed shapes, programs and kept memory change nothing that comes out; what they promise about calls and waiting holds."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from free_dist.backbones import Blip2Backbone
from free_dist.backbones.embedded import new_model
from free_dist.config import UserError
from free_dist.decoding import Decoder, DecoderOptions, MaxProbPolicy, generate
from free_dist.decoding.execution import Captured, Compiled, eagerly
from free_dist.decoding.runners import StaticRunner, make_runner
from free_dist.exits import ExitBank
from free_dist.exits.classifier import FeatureClassifiers
from free_dist.exits.gate import ExitChecks, FullHead, PrunedHead

N_TOKENS = 16
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def script(seed: int, n_exits: int = 3) -> MaxProbPolicy:
    """At every answer position and exit, by chance: emit, ask in vain, or do not ask."""
    rng = random.Random(seed)
    table = [[rng.choice((0.0, 0.9999, 2.0)) for _ in range(N_TOKENS)] for _ in range(n_exits)]
    return MaxProbPolicy(table, n_exits)


class CountedExecution:
    """Runs bodies as they are, and counts those made and those run."""

    def __init__(self) -> None:
        self.made = 0
        self.run = 0

    def __call__(
        self, body: Callable[[], Any], *, kept: Sequence[Tensor], changed: Sequence[Tensor]
    ) -> Callable[[], Any]:
        self.made += 1

        def counted() -> Any:
            self.run += 1
            return body()

        return counted


class HostReads(TorchFunctionMode):
    """Counts the calls by which values come from the device to the host."""

    READS = (Tensor.tolist, Tensor.item, Tensor.cpu, Tensor.numpy, Tensor.__bool__, Tensor.__int__, Tensor.__float__)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in self.READS
        return func(*args, **(kwargs or {}))


def in_order(cases: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[list[int]]]:
    """All cases as one batch."""
    return torch.cat([pixels for pixels, _ in cases]), [prompt[0].tolist() for _, prompt in cases]


def assert_same(ours, theirs) -> None:
    """Equal tokens, exits and work; confidences up to rounding."""
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        wanted = [record._replace(confidence=None) for record in other.records]
        assert [record._replace(confidence=None) for record in mine.records] == wanted
        for ours_at, theirs_at in zip(mine.confidences, other.confidences, strict=True):
            assert ours_at == (None if theirs_at is None else pytest.approx(theirs_at, abs=1e-9))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("lossless", "defers"), [(False, False), (False, True), (True, False)])
def test_fixed_shapes_give_the_tokens_and_the_work_of_exact_ones(
    in_float64, cases, seed: int, lossless: bool, defers: bool
) -> None:
    backbone, bank = in_float64
    runner = StaticRunner(backbone, bank, defers_reads=defers)
    exit_layers = set()
    for pixels, prompt in (cases[seed % 4], cases[(seed + 1) % 4]):
        arguments = {"thresholds": script(seed), "max_new_tokens": N_TOKENS, "eos_token_id": -1, "lossless": lossless}
        exact = generate(backbone, bank, pixels.double(), prompt, **arguments)
        fixed = generate(backbone, bank, pixels.double(), prompt, runner=runner, **arguments)
        assert_same(fixed, exact)
        assert fixed.calls == exact.calls
        exit_layers |= set(exact[0].exit_layers)
    assert lossless or {None, 1} < exit_layers


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_rows_of_a_batch_decode_in_fixed_shapes_as_in_exact_ones(
    in_float64, cases, scripted, seed: int, lossless: bool
) -> None:
    backbone, bank = in_float64
    pixels, prompts = in_order(cases)
    runner = StaticRunner(backbone, bank, defers_reads=True)
    free = generate(backbone, None, pixels.double(), prompts, max_new_tokens=N_TOKENS, eos_token_id=-1)
    eos = free[1].tokens[5]
    for policy in (lambda: script(seed), lambda: scripted(seed, emit_rate=0.4)):
        arguments = {"max_new_tokens": N_TOKENS, "eos_token_id": eos, "lossless": lossless}
        exact = generate(backbone, bank, pixels.double(), prompts, thresholds=policy(), **arguments)
        fixed = generate(backbone, bank, pixels.double(), prompts, thresholds=policy(), runner=runner, **arguments)
        assert_same(fixed, exact)
    assert len({len(row.tokens) for row in exact}) > 1, "no row ended before the others"


def test_sampling_draws_the_same_tokens(in_float64, cases) -> None:
    backbone, bank = in_float64
    pixels, prompt = cases[1]
    runner = StaticRunner(backbone, bank, defers_reads=True)
    for lossless in (False, True):
        results = [
            generate(
                backbone,
                bank,
                pixels.double(),
                prompt,
                thresholds=script(8),
                max_new_tokens=N_TOKENS,
                eos_token_id=-1,
                do_sample=True,
                lossless=lossless,
                generator=torch.Generator().manual_seed(3),
                runner=used,
            )
            for used in (None, runner)
        ]
        assert_same(results[1], results[0])


@pytest.mark.parametrize("with_gate", [False, True])
def test_cheap_checks_decide_the_same(in_float64, cases, with_gate: bool) -> None:
    backbone, bank = in_float64
    pixels, prompts = in_order(cases)
    gates = FeatureClassifiers(3, backbone.hidden_size, hidden_size=8) if with_gate else None
    ids = torch.arange(0, backbone.vocab_size, 3)
    checks = ExitChecks(PrunedHead(bank.lm_head, ids), gates=gates, gate_thresholds=[0.5] * 3 if with_gate else [])
    runner = StaticRunner(backbone, bank, checks, defers_reads=True)
    arguments = {"thresholds": script(2), "max_new_tokens": N_TOKENS, "eos_token_id": -1, "checks": checks}
    exact = generate(backbone, bank, pixels.double(), prompts, **arguments)
    assert_same(generate(backbone, bank, pixels.double(), prompts, runner=runner, **arguments), exact)
    assert any(token % 3 == 0 for token in exact[0].tokens)


@pytest.mark.parametrize("seed", range(4))
def test_caches_in_fixed_shapes_hold_what_exact_ones_hold(in_float64, cases, scripted, seed: int) -> None:
    backbone, bank = in_float64
    pixels, prompts = in_order(cases)
    runner = StaticRunner(backbone, bank)
    decoders = []
    with torch.inference_mode():
        start = backbone.start(prompts, backbone.encode_prefix(pixels.double()))
        for used in (None, runner):
            options = DecoderOptions(max_new_tokens=N_TOKENS, eos=-1)
            decoder = Decoder(
                backbone, bank, scripted(seed), ExitChecks(FullHead(bank.lm_head)), start, options, runner=used
            )
            for _ in range(12):
                decoder.step()
            decoder.cache.take_rows([2, 0, 3, 3, 1, 2])  # more rows than the memory was made for
            decoder.cache.roll_back(3, decoder.cache.length(3) - 2)
            decoder.cache.flush()
            decoders.append(decoder.cache)
    exact, fixed = decoders
    assert fixed.calls == exact.calls
    caches = [
        *zip(fixed.block_caches, exact.block_caches, strict=True),
        *zip(fixed.exit_caches, exact.exit_caches, strict=True),
    ]
    for ours, theirs in caches:
        for row in range(6):
            n = exact.length(row)
            torch.testing.assert_close(ours.keys[row, :, :n], theirs.keys[row, :, :n], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(ours.values[row, :, :n], theirs.values[row, :, :n], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_nothing_of_one_generation_is_left_for_the_next(in_float64, cases, seed: int) -> None:
    """Whatever stands in the memory, NaN included, a generation gives what it gives on fresh memory."""
    backbone, bank = in_float64
    pixels, prompts = in_order(cases)
    runner = StaticRunner(backbone, bank, defers_reads=True)
    arguments = {"thresholds": script(seed), "max_new_tokens": N_TOKENS, "eos_token_id": -1}
    with torch.inference_mode():
        fresh = generate(backbone, bank, pixels.double(), prompts, runner=runner, **arguments)
    for value in (float("nan"), 1e300, -7.0):
        for frame in runner.frames():
            for buffer in frame.buffers():
                buffer.fill_(value if buffer.is_floating_point() else 3)
        again = generate(backbone, bank, pixels.double(), prompts, runner=runner, **arguments)
        assert_same(again, fresh)
        # Fewer rows leave spare ones in the memory and in calls.
        alone = generate(backbone, bank, pixels[:3].double(), prompts[:3], runner=runner, **arguments)
        assert_same(alone, fresh[:3])


def test_a_generation_whose_memory_was_taken_over_says_so(backbone, bank, cases) -> None:
    pixels, prompt = cases[0]
    runner = StaticRunner(backbone, bank)
    options = DecoderOptions(max_new_tokens=4, eos=-1)
    checks = ExitChecks(FullHead(bank.lm_head))
    with torch.inference_mode():
        start = backbone.start(prompt.tolist(), backbone.encode_prefix(pixels))
        first = Decoder(backbone, bank, MaxProbPolicy(0.0, 3), checks, start, options, runner=runner)
        first.step()
        generate(backbone, bank, pixels, prompt, thresholds=0.0, max_new_tokens=4, runner=runner)
        with pytest.raises(RuntimeError, match="took over"):
            first.step()


def test_latest_tokens_stay_with_their_rows(backbone, bank, cases) -> None:
    pixels, prompts = in_order(cases)
    runner = StaticRunner(backbone, bank, lengths=(1, 4, 32))
    with torch.inference_mode():
        start = backbone.start(prompts, backbone.encode_prefix(pixels))
        cache = runner.new_cache((), start, capacity=50, policy=None)
        first = cache.advance_and_read([0, 1, 2, 3], last_only=True)
        assert first is not None
        tokens = first.best_of([1, 1, 1, 1])
        cache.append_tokens([0, 1, 3], [-1, -1, -1])
        after = cache.advance_and_read([0, 1, 3], last_only=True)  # as four rows, of which one is spare
        assert after is not None
        moved = after.best_of([1, 1, 1])
        assert cache.latest_tokens([0, 1, 2, 3]) == [moved[0], moved[1], tokens[2], moved[2]]
        cache.take_rows([3, 2, 2])
        assert cache.latest_tokens([0, 1, 2]) == [moved[2], tokens[2], tokens[2]]
    assert len({*moved, tokens[2]}) > 2


def test_calls_are_rounded_up_to_few_shapes_which_are_made_once(backbone, bank, cases) -> None:
    execution = CountedExecution()
    runner = StaticRunner(backbone, bank, execution=execution, lengths=(1, 4))
    pixels, prompt = cases[3]
    for emitted in range(7):
        # Full depth reads the prompt, then what was emitted and one more position, then one.
        rows = [[0.9999, *[0.0] * emitted, 0.9999], *[[2.0] * (emitted + 2)] * 2]
        arguments = {"thresholds": MaxProbPolicy(rows, 3), "max_new_tokens": emitted + 3, "eos_token_id": -1}
        fixed = generate(backbone, bank, pixels, prompt, runner=runner, **arguments)
        assert fixed[0].tokens == generate(backbone, bank, pixels, prompt, **arguments)[0].tokens
    assert execution.made == 3  # a check of one position; full depth for one and for four; longer calls have no program
    made = execution.made
    generate(backbone, bank, pixels, prompt, runner=runner, **arguments)
    assert execution.made == made


@pytest.mark.parametrize(("threshold", "programs"), [(0.0, 1), (0.9999, 2)])
def test_a_token_costs_one_program_per_segment_and_the_host_waits_once(
    backbone, cases, threshold: float, programs: int
) -> None:
    bank = ExitBank(backbone, (2,)).eval()
    pixels, prompt = cases[3]
    used = {}
    for n_tokens in (8, 24):
        execution = CountedExecution()
        runner = StaticRunner(backbone, bank, execution=execution, defers_reads=True)
        arguments = {"thresholds": threshold, "max_new_tokens": n_tokens, "eos_token_id": -1, "runner": runner}
        prefix = backbone.encode_prefix(pixels)
        with HostReads() as reads:
            result = generate(backbone, bank, None, prompt.tolist(), prefix=prefix, **arguments)[0]
        assert set(result.exit_layers) == ({2} if threshold == 0.0 else {None})
        used[n_tokens] = (execution.run, reads.count)
    assert used[24][0] - used[8][0] == 16 * programs
    assert used[24][1] - used[8][1] == 16


def test_reading_full_depth_at_once_waits_twice_per_token(backbone, cases) -> None:
    """What deferring saves, and that the count above can fail."""
    bank = ExitBank(backbone, (2,)).eval()
    runner = StaticRunner(backbone, bank, defers_reads=False)
    counts = []
    for n_tokens in (8, 24):
        with HostReads() as reads:
            generate(
                backbone, bank, *cases[3], thresholds=0.9999, max_new_tokens=n_tokens, eos_token_id=-1, runner=runner
            )
        counts.append(reads.count)
    assert counts[1] - counts[0] == 32


def test_an_answer_that_ends_at_full_depth_is_the_same_when_it_is_read_late(backbone, bank, cases) -> None:
    pixels, prompt = cases[3]
    free = generate(backbone, None, pixels, prompt, max_new_tokens=N_TOKENS, eos_token_id=-1)[0]
    eos = free.tokens[4]
    late = StaticRunner(backbone, bank, defers_reads=True)
    # The check that the last token is read with would emit one more.
    table = [[0.9999] * (free.tokens.index(eos) + 1) + [0.0]] * 3
    arguments = {"thresholds": MaxProbPolicy(table, 3), "max_new_tokens": N_TOKENS, "eos_token_id": eos}
    exact = generate(backbone, bank, pixels, prompt, **arguments)
    fixed = generate(backbone, bank, pixels, prompt, runner=late, **arguments)
    assert fixed[0].tokens == exact[0].tokens == free.tokens[: free.tokens.index(eos) + 1]
    assert [record.blocks for record in fixed[0].records] == [record.blocks for record in exact[0].records]
    # The first segment that ran in vain shows in the work of the call.
    assert fixed.calls.block_calls == exact.calls.block_calls + bank.exit_layers[0]


def test_full_depth_needs_no_exits(backbone, cases) -> None:
    pixels, prompts = in_order(cases)
    runner = StaticRunner(backbone)
    exact = generate(backbone, None, pixels, prompts, max_new_tokens=N_TOKENS)
    assert_same(generate(backbone, None, pixels, prompts, max_new_tokens=N_TOKENS, runner=runner), exact)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_segments_give_the_same_tokens(cases, backend: str) -> None:
    model = new_model(width=32, n_blocks=2, n_heads=2, seed=4).eval().requires_grad_(False)
    for parameter in model.language_model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(10.0)
    backbone = Blip2Backbone(model)
    bank = ExitBank(backbone, (1,), init="same").eval().requires_grad_(False)
    runner = StaticRunner(backbone, bank, execution=Compiled(backend=backend), lengths=(1,))
    table = [[0.9999] * 5 + [0.0, 0.9999, 0.9999, 0.0]]
    for pixels, prompt in cases[:2]:
        arguments = {"thresholds": MaxProbPolicy(table, 1), "max_new_tokens": 12, "eos_token_id": -1}
        exact = generate(backbone, bank, pixels, prompt, **arguments)[0]
        compiled = generate(backbone, bank, pixels, prompt, runner=runner, **arguments)[0]
        assert compiled.tokens == exact.tokens and len(set(exact.tokens)) > 3
        assert compiled.exit_layers == exact.exit_layers and len(set(exact.exit_layers)) == 2


def test_wrong_runners_are_refused_with_what_to_do(backbone, bank, cases) -> None:
    pixels, prompt = cases[0]
    runner = StaticRunner(backbone, bank)
    with pytest.raises(ValueError, match="another backbone, bank or checks"):
        generate(backbone, None, pixels, prompt, max_new_tokens=1, runner=runner)
    with pytest.raises(UserError, match="num_beams"):
        generate(backbone, bank, pixels, prompt, thresholds=0.5, max_new_tokens=1, num_beams=2, runner=runner)
    with pytest.raises(UserError, match="compile, reduce-overhead, graph"):
        make_runner("graphs", backbone)
    with pytest.raises(UserError, match="lengths"):
        StaticRunner(backbone, bank, lengths=(2, 4))
    if not torch.cuda.is_available():
        for name in ("graph", "reduce-overhead", "compile+graph"):
            with pytest.raises(UserError, match="CUDA"):
                make_runner(name, backbone)


@needs_cuda
@pytest.mark.parametrize("before", [eagerly, Compiled()], ids=["graph", "compile+graph"])
@pytest.mark.parametrize("lossless", [False, True])
def test_cuda_graphs_give_the_same_tokens(cases, in_float64, before: Any, lossless: bool) -> None:
    backbone, bank = (module.cuda() for module in in_float64)
    pixels, prompts = in_order(cases)
    runner = StaticRunner(backbone, bank, execution=Captured(before))
    try:
        for seed in range(4):
            arguments = {
                "thresholds": script(seed),
                "max_new_tokens": N_TOKENS,
                "eos_token_id": -1,
                "lossless": lossless,
            }
            for rows in (1, 4):
                images = pixels[:rows].double().cuda()
                exact = generate(backbone, bank, images, prompts[:rows], **arguments)
                assert_same(generate(backbone, bank, images, prompts[:rows], runner=runner, **arguments), exact)
    finally:
        backbone.cpu(), bank.cpu()


@needs_cuda
def test_recording_a_graph_leaves_the_tokens_it_reads_as_they_were() -> None:
    counter = torch.zeros(3, dtype=torch.long, device="cuda")

    def body() -> Tensor:
        counter.add_(1)
        return counter * 2

    replay = Captured()(body, kept=(counter,), changed=(counter,))
    assert counter.tolist() == [0, 0, 0]
    assert replay().tolist() == [2, 2, 2]
    assert replay().tolist() == [4, 4, 4]
