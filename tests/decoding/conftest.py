"""Fixtures of the decoding tests: a six-block backbone, exits that differ from it, scripted exits, and weight watching."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from free_dist.backbones import Blip2Backbone
from free_dist.backbones.embedded import new_model
from free_dist.decoding import Decision, Scores
from free_dist.exits import ExitBank


class ScriptedPolicy:
    """Emits as a random script says, whatever the confidence, and keeps the logits it was shown."""

    def __init__(self, seed: int, emit_rate: float = 0.5, inactive: Iterable[int] = ()) -> None:
        self.rng = random.Random(seed)
        self.emit_rate = emit_rate
        self.inactive = set(inactive)
        self.seen: list[tuple[int, int, Tensor]] = []
        """(exit, answer position, logits) of every row of every check."""

    def is_active(self, exit_index: int) -> bool:
        return exit_index not in self.inactive

    def is_active_at(self, exit_index: int, position: int) -> bool:
        return self.is_active(exit_index)

    def decide(
        self, exit_index: int, scores: Scores, positions: Sequence[int], earlier: Sequence[Sequence[int]]
    ) -> Decision:
        self.seen += [
            (exit_index, position, logits.clone()) for position, logits in zip(positions, scores.logits, strict=True)
        ]
        emit = [self.rng.random() < self.emit_rate for _ in positions]
        return Decision(scores.logits.argmax(-1), [0.5] * len(emit), emit)


class WeightWatch(TorchFunctionMode):
    """Counts how often every parameter is really read by an operator, and on how many positions a linear map ran."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[int] = Counter()
        self.positions: Counter[int] = Counter()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for argument in args[1:]:
            if isinstance(argument, nn.Parameter):
                self.reads[id(argument)] += 1
                self.positions[id(argument)] += args[0].numel() // args[0].shape[-1]
        return func(*args, **(kwargs or {}))

    def touched(self, module: nn.Module) -> bool:
        """Whether any parameter of the module was read."""
        return any(self.reads[id(parameter)] for parameter in module.parameters())


@pytest.fixture(scope="session")
def backbone() -> Blip2Backbone:
    """Six blocks of width 32, float32, with weights large enough that every block matters and tokens vary."""
    model = new_model(width=32, n_blocks=6, n_heads=2, seed=4).eval().requires_grad_(False)
    for parameter in model.language_model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(10.0)
    return Blip2Backbone(model)


@pytest.fixture(scope="session")
def bank(backbone: Blip2Backbone) -> ExitBank:
    """Exits after blocks 1, 3 and 5, with weights moved away from the blocks they were copied from."""
    bank = ExitBank(backbone, (1, 3, 5))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in bank.transformers.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return bank.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def in_float64(backbone: Blip2Backbone, bank: ExitBank) -> tuple[Blip2Backbone, ExitBank]:
    """The same backbone and exits in float64, where a wrong cache cannot pass for rounding."""
    pair = copy.deepcopy((backbone, bank))  # together, so that the exits still share the norm and the head
    return pair[0].double(), pair[1].double()


@pytest.fixture(scope="session")
def cases(backbone: Blip2Backbone) -> list[tuple[Tensor, Tensor]]:
    """Images [1, 3, 64, 64] with prompts of several lengths [1, T]."""
    generator = torch.Generator().manual_seed(7)
    layout = backbone.layout
    opening = [layout.image_token_id] * layout.num_query_tokens + [layout.bos_token_id]
    prompts = [torch.randint(5, backbone.vocab_size, (n,), generator=generator).tolist() for n in (1, 5, 9, 14)]
    return [(torch.randn(1, 3, 64, 64, generator=generator), torch.tensor([opening + prompt])) for prompt in prompts]


@pytest.fixture(scope="session")
def scripted() -> type[ScriptedPolicy]:
    """The scripted policy class."""
    return ScriptedPolicy


@pytest.fixture
def weight_watch() -> WeightWatch:
    """A fresh watch; use it as a context manager around the code to observe."""
    return WeightWatch()
