"""The scheduler of `serve`: no slot leaks, nobody starves, and every request gets the tokens it would get alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from owl_deploy.serving.scheduler import Batch, Copy, Piece, QueueFull, Request, Scheduler, Step, common_length

CONTEXT = 24
PIECE = 4
UNKNOWN = -1


def next_token(sequence: list[int]) -> int:
    """A token that depends on all before it."""
    return hash(tuple(sequence)) % 5 + 1


def answer(prompt: list[int], new: int) -> list[int]:
    """What a request gets that runs alone."""
    sequence = list(prompt)
    for _ in range(new):
        sequence.append(next_token(sequence))
    return sequence


@dataclass
class Paper:
    """A KV buffer as a model would fill it, on paper: the tokens behind its keys and values, by slot and position."""

    slots: int
    rows: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows = [[UNKNOWN] * CONTEXT for _ in range(self.slots)]

    def compute(self, step: Step) -> dict[Request, int]:
        """What the requests get that have logits after this step."""
        got: dict[Request, int] = {}
        for part in step.prompts:
            if isinstance(part, Copy):
                self.rows[part.target][: part.tokens] = self.rows[part.source][: part.tokens]
            else:
                self._prefill(part, got)
        if step.batch is not None:
            self._decode(step.batch, got)
        return got

    def _prefill(self, piece: Piece, got: dict[Request, int]) -> None:
        end = piece.start + len(piece.tokens)
        assert 0 < len(piece.tokens) <= PIECE
        assert end % PIECE == 0 or piece.is_last
        self.rows[piece.slot][piece.start : end] = piece.tokens
        if piece.is_last:
            got[piece.request] = next_token(self.rows[piece.slot][:end])

    def _decode(self, batch: Batch, got: dict[Request, int]) -> None:
        assert len(batch.tokens) == len(batch.lengths) == len(batch.requests)
        for slot, (token, length, request) in enumerate(
            zip(batch.tokens, batch.lengths, batch.requests, strict=True), batch.first
        ):
            assert length < CONTEXT
            self.rows[slot][length] = token if request is not None else UNKNOWN
            if request is not None:
                assert request.is_over or request.slot == slot
                got[request] = next_token(self.rows[slot][: length + 1])


def run(scheduler: Scheduler, paper: Paper, wanted: dict[Request, int], now: float = 0, pieces: int = 1) -> Step:
    """One step; requests that have `wanted` new tokens are finished, as the engine does."""
    step = scheduler.step(now, pieces)
    for request, token in paper.compute(step).items():
        scheduler.append(request, token)
        if len(request.tokens) - request.prompt_length >= wanted[request]:
            scheduler.finish(request)
    return step


def drain(scheduler: Scheduler, paper: Paper, wanted: dict[Request, int], most: int = 2000) -> int:
    """Steps until nothing is left to do."""
    for steps in range(most):
        if run(scheduler, paper, wanted).is_empty:
            return steps
    raise AssertionError("it does not come to an end")


prompts = st.lists(st.integers(1, 2), min_size=1, max_size=14)  # few tokens: many prompts begin alike
events = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), prompts, st.integers(1, 8)),
        st.tuples(st.just("deadline"), prompts, st.integers(1, 6)),
        st.tuples(st.just("cancel"), st.integers(0, 30), st.just(0)),
        st.tuples(st.just("cancel within a step"), st.integers(0, 30), st.just(0)),
        st.tuples(st.just("failure"), st.integers(0, 30), st.just(0)),
        st.tuples(st.just("step"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(slots=st.integers(1, 6), waiting=st.integers(0, 5), pieces=st.integers(1, 3), events=events)
def test_whatever_happens_every_answer_is_the_one_it_would_be_alone_and_no_slot_leaks(
    slots: int, waiting: int, pieces: int, events: list[tuple[str, list[int] | int, int]]
) -> None:
    scheduler = Scheduler(slots=slots, context=CONTEXT, piece=PIECE, waiting=waiting)
    paper = Paper(slots)
    wanted: dict[Request, int] = {}
    gone: set[Request] = set()
    now = 0.0
    for kind, what, number in events:
        now += 1
        if isinstance(what, list):
            request = Request(list(what), now + number if kind == "deadline" else math.inf)
            room = waiting + slots - scheduler.running - scheduler.waiting
            try:
                scheduler.submit([request])
            except QueueFull:
                assert room <= 0
                continue
            assert room > 0
            wanted[request] = number
        elif kind == "step":
            gone.update(run(scheduler, paper, wanted, now, pieces).expired)
        elif kind == "failure":
            scheduler.forget(what % slots)
            paper.rows[what % slots] = [UNKNOWN] * CONTEXT
            for request in [one for one in wanted if one.slot == what % slots]:
                scheduler.cancel(request)
                gone.add(request)
        elif wanted:
            request = list(wanted)[what % len(wanted)]
            if not request.is_over:
                gone.add(request)
            step = scheduler.step(now, pieces) if kind == "cancel within a step" else None
            scheduler.cancel(request)
            if step is not None:
                gone.update(step.expired)
                for other, token in paper.compute(step).items():
                    scheduler.append(other, token)
                    if len(other.tokens) - other.prompt_length >= wanted[other]:
                        scheduler.finish(other)
        assert scheduler.running <= slots
        assert scheduler.waiting <= waiting + slots
    for request in [one for one in wanted if one.deadline < math.inf and not one.is_over]:
        scheduler.cancel(request)
        gone.add(request)
    drain(scheduler, paper, wanted)
    assert (scheduler.running, scheduler.waiting) == (0, 0)
    for request, new in wanted.items():
        assert request.is_over
        assert request.slot is None
        alone = answer(request.tokens[: request.prompt_length], new)
        assert request.tokens == (alone[: len(request.tokens)] if request in gone else alone)


@settings(max_examples=100, deadline=None)
@given(kept=st.lists(st.integers(0, 1)), prompt=st.lists(st.integers(0, 1)))
def test_a_common_length_is_the_longest(kept: list[int], prompt: list[int]) -> None:
    length = common_length(kept, prompt)
    assert kept[:length] == prompt[:length]
    assert length == min(len(kept), len(prompt)) or kept[length] != prompt[length]


def scheduled(slots: int = 4, waiting: int = 8) -> tuple[Scheduler, Paper]:
    return Scheduler(slots=slots, context=CONTEXT, piece=PIECE, waiting=waiting), Paper(slots)


def test_running_requests_get_a_token_in_every_step_while_a_long_prompt_is_computed() -> None:
    scheduler, paper = scheduled()
    running, long = Request([1, 2]), Request([3] * 16)
    wanted = {running: 12, long: 1}
    scheduler.submit([running])
    run(scheduler, paper, wanted)
    scheduler.submit([long])
    for pieces in range(1, 5):
        before = len(running.tokens)
        step = run(scheduler, paper, wanted)
        assert [piece.is_last for piece in step.pieces] == [pieces == 4]
        assert len(running.tokens) == before + 1


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    scheduler, paper = scheduled()
    long, short = Request([3] * 20), Request([4] * 3)
    wanted = {long: 1, short: 1}
    scheduler.submit([long, short])
    for _ in range(2):
        run(scheduler, paper, wanted)
    assert short.is_over
    assert not long.is_over


def test_a_long_prompt_is_computed_though_short_ones_keep_coming() -> None:
    scheduler, paper = scheduled(slots=2)
    long = Request([3] * 20)
    wanted = {long: 1}
    scheduler.submit([long])
    for number in range(40):
        wanted[short := Request([number + 4])] = 1
        scheduler.submit([short])
        run(scheduler, paper, wanted)
    assert long.is_over


def test_those_who_wait_get_slots_in_the_order_they_came() -> None:
    scheduler, paper = scheduled(slots=1, waiting=3)
    requests = [Request([number]) for number in range(1, 5)]
    wanted = dict.fromkeys(requests, 2)
    scheduler.submit(requests)
    ended = []
    for _ in range(20):
        run(scheduler, paper, wanted)
        ended += [request for request in requests if request.is_over and request not in ended]
    assert ended == requests


def test_the_queue_is_bounded_and_takes_several_requests_or_none() -> None:
    scheduler, _ = scheduled(slots=2, waiting=1)
    scheduler.submit([Request([1]), Request([2])])
    with pytest.raises(QueueFull):
        scheduler.submit([Request([3]), Request([4])])
    assert scheduler.waiting == 2
    scheduler.submit([Request([3])])
    with pytest.raises(QueueFull):
        scheduler.submit([Request([4])])
    with pytest.raises(ValueError, match="a prompt of 24 tokens in a context of 24"):
        scheduler.submit([Request([1] * CONTEXT)])


def test_a_common_beginning_is_computed_once_also_by_requests_that_come_together() -> None:
    scheduler, paper = scheduled()
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    requests = [Request([*prompt, last]) for last in (11, 12, 13)]
    wanted = dict.fromkeys(requests, 3)
    scheduler.submit(requests)
    computed = 0
    while not all(request.is_over for request in requests):
        step = run(scheduler, paper, wanted)
        computed += sum(len(piece.tokens) for piece in step.pieces)
    assert computed == 8 + 3 * 3  # two whole pieces once, and what follows them for each
    assert [request.tokens for request in requests] == [answer([*prompt, last], 3) for last in (11, 12, 13)]


def test_the_next_turn_of_a_conversation_computes_only_what_is_new() -> None:
    scheduler, paper = scheduled()
    first = Request([1, 2, 3, 4, 5, 6])
    wanted = {first: 4}
    scheduler.submit([first])
    drain(scheduler, paper, wanted)
    second = Request([*first.tokens, 9, 9])
    wanted[second] = 1
    scheduler.submit([second])
    step = run(scheduler, paper, wanted)
    assert step.pieces[0].start == second.reused == 8  # whole pieces, of the prompt and of the answer


def test_where_pieces_begin_does_not_depend_on_what_was_there_before() -> None:
    scheduler, paper = scheduled()
    before, after = Request([1, 2, 3, 4, 5, 6]), Request([1, 2, 3, 4, 5, 6, 7, 8, 9])
    wanted = {before: 1, after: 1}
    scheduler.submit([before])
    drain(scheduler, paper, wanted)
    scheduler.submit([after])
    pieces = [piece for _ in range(2) for piece in run(scheduler, paper, wanted).pieces]
    assert [(piece.start, piece.tokens) for piece in pieces] == [(4, [5, 6, 7, 8]), (8, [9])]


def test_no_more_than_half_of_a_batch_runs_along() -> None:
    scheduler, paper = scheduled(slots=16, waiting=0)
    requests = [Request([1, number]) for number in range(2, 18)]
    wanted = dict.fromkeys(requests, 9)
    scheduler.submit(requests)
    for _ in range(16):
        run(scheduler, paper, wanted)
    for request in requests[1:15]:
        scheduler.cancel(request)
    step = run(scheduler, paper, wanted)
    assert step.batch is not None
    assert len(step.batch.requests) <= 2 * sum(request is not None for request in step.batch.requests)
    drain(scheduler, paper, wanted)
    for request in (requests[0], requests[15]):
        assert request.tokens[2:] == answer(request.tokens[:2], 9)[2 : len(request.tokens)]


def test_a_deadline_ends_those_who_wait_and_those_who_run() -> None:
    scheduler, paper = scheduled(slots=1)
    running, waiting = Request([1], deadline=5), Request([2], deadline=3)
    wanted = {running: 99, waiting: 1}
    scheduler.submit([running, waiting])
    assert run(scheduler, paper, wanted, now=1).expired == []
    assert run(scheduler, paper, wanted, now=3).expired == [waiting]
    assert run(scheduler, paper, wanted, now=5).expired == [running]
    assert (scheduler.running, scheduler.waiting) == (0, 0)
