"""A runner: what makes decoding steps of fixed shape, and keeps their memory from one generation to the next.

Give one to ``generate``: segments then run as programs over caches that stay where they are, eagerly, compiled, or as CUDA
graphs, and with :class:`MaxProbPolicy` and no cheap checks a token costs one program per segment: the token is embedded,
the blocks run, the exit is asked, and one small tensor tells the host what came out.  Without a runner caches have exactly
the size of a generation and calls exactly their own length, which is faster where starting an operator is cheap.

Programs refer to the weights where they are: make a new runner after moving or converting a model, or changing its exits.
Does not know rows, pending positions or tokens.

Shape letters: K active exits, C capacity.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from free_dist.backbones import Backbone, Start
from free_dist.config import RUNNERS, UserError
from free_dist.decoding.execution import Captured, Compiled, Execution, eagerly
from free_dist.decoding.frame import Frame, Model
from free_dist.decoding.policy import ExitPolicy, MaxProbPolicy
from free_dist.decoding.static_cache import StaticPendingCache
from free_dist.exits import ExitBank, ExitTransformer
from free_dist.exits.gate import ExitChecks, full_head

LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Positions of a call that has a program; longer calls, such as reading a prompt, run operator by operator.

Verifying drafts takes calls of any length up to a dozen, and on a CPU every position that a call is padded with costs time.
"""

SLOT_MULTIPLE = 64
"""Caches have a multiple of so many slots, so that generations of similar length share programs and masks stay aligned."""


class StaticRunner:
    """Frames and programs of one backbone with one set of exits; used by one generation at a time."""

    def __init__(
        self,
        backbone: Backbone,
        bank: ExitBank | None = None,
        checks: ExitChecks | None = None,
        *,
        execution: Execution = eagerly,
        lengths: Sequence[int] = LENGTHS,
        defers_reads: bool | None = None,
    ) -> None:
        """``checks`` default to the full head.

        ``defers_reads``: a token emitted at full depth is read by the host together with the next check, so with one active
        exit the host waits once per token.  The price is one first segment too many where an answer ends at full depth.
        None: on a GPU only.  Raises UserError for lengths that are not increasing from 1.
        """
        if list(lengths) != sorted(set(lengths)) or not lengths or lengths[0] != 1:
            raise UserError(f"lengths={list(lengths)}: want increasing numbers of positions, the first of them 1")
        self.backbone = backbone
        self.bank = bank
        self.checks = ExitChecks(full_head(bank)) if checks is None and bank is not None else checks
        self._execution = execution
        self._lengths = tuple(lengths)
        self._defers_reads = defers_reads
        self._models: dict[tuple[int, ...], Model] = {}
        self._frames: dict[tuple[tuple[int, ...], int, int, int], Frame] = {}

    def fuses(self, policy: ExitPolicy | None) -> bool:
        """Whether a segment and the check behind it can be one program under this policy."""
        checks = self.checks
        return type(policy) is MaxProbPolicy and checks is not None and checks.gates is checks.discriminators is None

    def new_cache(
        self, active: tuple[int, ...], start: Start, capacity: int, policy: ExitPolicy | None
    ) -> StaticPendingCache:
        """An empty cache of at least ``capacity`` positions for the exits ``active`` (indices into the bank).

        It takes over the memory of the runner's last generation of this shape, which must be finished.
        """
        n_slots = _rounded_up(capacity + 1)
        n_memory = 0 if start.memory is None else _rounded_up(start.memory.states.shape[1])
        defers_reads = start.hidden.is_cuda if self._defers_reads is None else self._defers_reads

        def frame_for(n_rows: int) -> Frame:
            frame = self._frame(active, n_rows, n_slots - 1, n_memory, start.hidden)
            if active and isinstance(policy, MaxProbPolicy):
                frame.set_thresholds([policy.thresholds.values[index] for index in active])
            return frame

        return StaticPendingCache(frame_for, start, self._lengths, defers_reads=defers_reads)

    def frames(self) -> list[Frame]:
        """What is kept so far."""
        return list(self._frames.values())

    def clear(self) -> None:
        """Give up all memory and programs."""
        self._frames.clear()

    def _frame(self, active: tuple[int, ...], n_rows: int, capacity: int, n_memory: int, like: Tensor) -> Frame:
        n_rows = 1 << (n_rows - 1).bit_length()
        key = (active, n_rows, capacity, n_memory)
        if key not in self._frames:
            self._frames[key] = Frame(
                self._model(active),
                self._execution,
                n_rows=n_rows,
                capacity=capacity,
                n_memory=n_memory,
                like=like,
            )
        return self._frames[key]

    def _model(self, active: tuple[int, ...]) -> Model:
        if active not in self._models:
            exits: tuple[tuple[int, ExitTransformer], ...] = ()
            if self.bank is not None:
                layers, transformers = self.bank.exit_layers, self.bank.transformers
                exits = tuple((layers[index], transformers[index]) for index in active)  # type: ignore[misc]
            self._models[active] = Model(
                backbone=self.backbone,
                exits=exits,
                exit_indices=active,
                checks=self.checks,
            )
        return self._models[active]


def _rounded_up(n_slots: int) -> int:
    return -(-n_slots // SLOT_MULTIPLE) * SLOT_MULTIPLE


def make_runner(
    name: str, backbone: Backbone, bank: ExitBank | None = None, checks: ExitChecks | None = None
) -> StaticRunner:
    """The runner of that name (one of ``RUNNERS``).

    "eager" runs the fixed shapes operator by operator, "compile" through ``torch.compile``, "reduce-overhead" lets the
    compiler use CUDA graphs, "graph" captures CUDA graphs of the operators, "compile+graph" of compiled code.  Raises
    UserError for an unknown name, and for CUDA graphs without CUDA.
    """
    match name:
        case "eager":
            execution: Execution = eagerly
        case "compile":
            execution = Compiled()
        case "reduce-overhead":
            execution = Compiled("reduce-overhead")
        case "graph":
            execution = Captured()
        case "compile+graph":
            execution = Captured(Compiled())
        case _:
            raise UserError(f"runner {name!r}: want one of {', '.join(RUNNERS)}")
    return StaticRunner(backbone, bank, checks, execution=execution)
