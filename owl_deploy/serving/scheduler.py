"""Continuous batching: which request gets which slot, and what each step computes. Knows nothing of models or threads.

A slot is one row of the KV buffer. The tokens whose keys and values lie in it are `kept`, also after its request has
ended, so that a later prompt which begins with them need not compute them again: they are copied from the slot that
keeps most of them, busy or not, or used in place.

A step computes a few pieces of prompts, then one token of every running request. So a long prompt delays the others by
a few pieces a token. The prompt with the least left to compute comes first: no other order gives first tokens
sooner on average. Every fourth piece is of the oldest prompt, so that a long one is computed too. Prompts with the same
beginning compute it once between them, since each looks at its turn for what the others have kept.

One batch is a range of slots that lie side by side. Slots in it that have nothing to decode are run along: they get a
token that is written behind what they keep, and counts for nothing. A request therefore gets a free slot next to the
running ones, and one at the edge of the range moves inwards when more than half of it would run for nothing.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

IDLE_TOKEN = 0
_OLDEST_EVERY = 4  # pieces: one of so many is of the prompt that came first


class QueueFull(Exception):
    """As many requests wait as may; try again later."""


@dataclass(eq=False)
class Request:
    """One sequence to generate.

    Attributes:
        tokens: the prompt, and what was generated since.
        deadline: when it ends at the latest, on the clock that `step` is called with, in seconds.
        slot: where it runs; None while it waits, and once it has ended.
        computed: tokens of the prompt whose keys and values are in its slot, by its own pieces or reused.
        reused: those of them that it did not compute.
        is_over: it has ended, or was cancelled.
    """

    tokens: list[int]
    deadline: float = math.inf
    slot: int | None = field(default=None, init=False)
    computed: int = field(default=0, init=False)
    reused: int = field(default=0, init=False)
    is_over: bool = field(default=False, init=False)
    prompt_length: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)


@dataclass(frozen=True)
class Copy:
    """The first `tokens` keys and values of one slot also go into another."""

    source: int
    target: int
    tokens: int


@dataclass(frozen=True)
class Piece:
    """Tokens to append to what a slot keeps, `start` of them being there; the last piece's logits choose a token."""

    request: Request
    slot: int
    start: int
    tokens: list[int]
    is_last: bool


@dataclass(frozen=True)
class Batch:
    """One token for each slot from `first` on, to append after `lengths` tokens; the logits of `requests` count.

    Attributes:
        requests: one for each slot; None for one that is run along.
    """

    first: int
    tokens: list[int]
    lengths: list[int]
    requests: list[Request | None]


@dataclass(frozen=True)
class Step:
    """What to compute next, in this order.

    Attributes:
        expired: requests whose deadline is past; they are over, and nothing is computed for them.
        prompts: pieces, and copies that they build on.
    """

    expired: list[Request]
    prompts: list[Copy | Piece]
    batch: Batch | None

    @property
    def pieces(self) -> list[Piece]:
        """The pieces alone."""
        return [part for part in self.prompts if isinstance(part, Piece)]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.pieces and self.batch is None


@dataclass
class _Slot:
    kept: list[int] = field(default_factory=list)
    request: Request | None = None
    used_at: int = 0  # the step in which it was used last


class Scheduler:
    """Requests wait in order, get slots, and run until `finish` or `cancel`.

    Whoever calls `step` computes what it returns, then calls `append` or `finish` for every request that got logits.

    Args:
        slots: how many requests run at once.
        context: tokens that fit into a slot.
        piece: tokens of a prompt that are computed together. Pieces end at multiples of it, whatever else runs.
        waiting: requests that may wait at most.
    """

    def __init__(self, *, slots: int, context: int, piece: int, waiting: int) -> None:
        self._slots = [_Slot() for _ in range(slots)]
        self._context = context
        self._piece = piece
        self._most_waiting = waiting
        self._waiting: deque[Request] = deque()
        self._prompts: list[Request] = []  # that are not computed yet, in the order they came
        self._pieces = 0
        self._steps = 0

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests with one."""
        return sum(slot.request is not None for slot in self._slots)

    @property
    def kept(self) -> int:
        """Tokens whose keys and values are there, in all slots."""
        return sum(len(slot.kept) for slot in self._slots)

    def submit(self, requests: Sequence[Request]) -> None:
        """Let these wait for slots: all of them, or none.

        Raises:
            QueueFull: they are more than may still wait, beside those that find a free slot.
            ValueError: one has no prompt, or one that leaves no room for a token.
        """
        for request in requests:
            if not 0 < request.prompt_length < self._context:
                raise ValueError(f"a prompt of {request.prompt_length} tokens in a context of {self._context}")
        free = len(self._slots) - self.running
        if len(self._waiting) + len(requests) > self._most_waiting + free:
            raise QueueFull
        self._waiting.extend(requests)

    def cancel(self, request: Request) -> None:
        """End a request at any time, also while a step is computed; its slot is free at once."""
        if request.is_over:
            return
        request.is_over = True
        if request.slot is None:
            self._waiting.remove(request)
            return
        self._slots[request.slot].request = None
        request.slot = None
        if request in self._prompts:
            self._prompts.remove(request)

    finish = cancel

    def append(self, request: Request, token: int) -> None:
        """Go on with a request after `token`, unless it is over. `finish` it first where its slot would overflow."""
        if not request.is_over:
            request.tokens.append(token)

    def forget(self, slot: int, start: int = 0) -> None:
        """What a slot keeps from `start` on is not to be used: it was not computed."""
        del self._slots[slot].kept[start:]

    def step(self, now: float, pieces: int = 1) -> Step:
        """Decide what to compute, with at most so many pieces, and take it as computed."""
        self._steps += 1
        expired = self._expire(now)
        self._admit()
        prompts: list[Copy | Piece] = [*self._close_gaps()]
        prefilling = {id(request) for request in self._prompts}
        for _ in range(pieces):
            prompts += self._next_piece()
        return Step(expired, prompts, self._next_batch(prefilling))

    # -------------------- who runs where

    def _expire(self, now: float) -> list[Request]:
        present = [*self._waiting, *(slot.request for slot in self._slots if slot.request is not None)]
        expired = [request for request in present if request.deadline <= now]
        for request in expired:
            self.cancel(request)
        return expired

    def _admit(self) -> None:
        """Give free slots to those who have waited longest."""
        while self._waiting and self.running < len(self._slots):
            request = self._waiting.popleft()
            request.slot = self._choose_slot(request.tokens)
            self._slots[request.slot].request = request
            self._prompts.append(request)

    def _choose_slot(self, prompt: list[int]) -> int:
        """The free slot that makes the batch widest least; of these, which keeps most of the prompt; the oldest."""
        busy = [place for place, slot in enumerate(self._slots) if slot.request is not None]

        def cost(place: int) -> tuple[int, int, int]:
            slot = self._slots[place]
            width = max([place, *busy]) - min([place, *busy])
            return width, -common_length(slot.kept, prompt), slot.used_at

        return min((place for place, slot in enumerate(self._slots) if slot.request is None), key=cost)

    def _close_gaps(self) -> list[Copy]:
        """Move requests at the edge into gaps, until no more than half of the slots from first to last are idle."""
        copies: list[Copy] = []
        while True:
            busy = [place for place, slot in enumerate(self._slots) if slot.request is not None]
            if not busy or busy[-1] - busy[0] + 1 <= 2 * len(busy):
                return copies
            gaps = [place for place in range(busy[0], busy[-1]) if place not in busy]
            near_first = 2 * sum(busy) < len(busy) * (busy[0] + busy[-1])  # on which side most of them are
            source, target = (busy[-1], gaps[0]) if near_first else (busy[0], gaps[-1])
            copies.append(self._move(source, target))

    def _move(self, source: int, target: int) -> Copy:
        """Let a request go on in another slot; its old one keeps what it kept."""
        old, new = self._slots[source], self._slots[target]
        assert old.request is not None and new.request is None
        old.request.slot, new.request, old.request = target, old.request, None
        new.kept, new.used_at = list(old.kept), self._steps
        return Copy(source, target, len(old.kept))

    # -------------------- what is computed

    def _next_piece(self) -> list[Copy | Piece]:
        """The next piece of the prompt whose turn it is, after a copy of what any slot keeps of it."""
        if not self._prompts:
            return []
        self._pieces += 1
        request = self._prompts[0]
        if self._pieces % _OLDEST_EVERY:
            request = min(self._prompts, key=lambda prompt: prompt.prompt_length - prompt.computed)
        assert request.slot is not None
        slot = self._slots[request.slot]
        copies = self._reuse(request)
        start = len(slot.kept)
        request.reused += start - request.computed
        end = min((start // self._piece + 1) * self._piece, request.prompt_length)
        is_last = end == request.prompt_length
        if is_last:
            self._prompts.remove(request)
        request.computed = end
        tokens = request.tokens[start:end]
        slot.kept.extend(tokens)
        slot.used_at = self._steps
        return [*copies, Piece(request, request.slot, start, tokens, is_last)]

    def _reuse(self, request: Request) -> list[Copy]:
        """Let the request's slot keep as many whole pieces of its prompt as any does, and no other tokens.

        Where pieces begin then does not depend on what was there before, and neither do their last bits. The last token
        of a prompt is always computed, for its logits.
        """
        assert request.slot is not None
        own = self._slots[request.slot]
        prompt = request.tokens[: request.prompt_length - 1]
        there = [common_length(slot.kept, prompt) // self._piece * self._piece for slot in self._slots]
        most = max(there)
        copies = [Copy(there.index(most), request.slot, most)] if there[request.slot] < most else []
        own.kept[:] = prompt[:most]
        return copies

    def _next_batch(self, prefilling: set[int]) -> Batch | None:
        """A token for every request but these, whose prompts are not computed before this step."""
        places = [
            place
            for place, slot in enumerate(self._slots)
            if slot.request is not None and id(slot.request) not in prefilling
        ]
        if not places:
            return None
        tokens: list[int] = []
        lengths: list[int] = []
        requests: list[Request | None] = []
        for place in range(places[0], places[-1] + 1):
            slot = self._slots[place]
            lengths.append(len(slot.kept))
            if place in places:
                assert slot.request is not None
                tokens.append(slot.request.tokens[-1])
                requests.append(slot.request)
                slot.kept.append(tokens[-1])
                slot.used_at = self._steps
            else:
                tokens.append(IDLE_TOKEN)
                requests.append(None)
        return Batch(places[0], tokens, lengths, requests)


def common_length(kept: list[int], prompt: list[int]) -> int:
    """How many tokens two sequences begin with alike."""
    most = min(len(kept), len(prompt))
    if kept[:most] == prompt[:most]:
        return most
    return bisect_right(range(1, most + 1), False, key=lambda length: kept[:length] != prompt[:length])
