"""The thread that computes: steps of the scheduler, run on the model; tokens chosen, and handed to those who wait."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from owl_deploy.errors import first_line
from owl_deploy.serving.constraints import Constraint
from owl_deploy.serving.metrics import Metrics
from owl_deploy.serving.sampling import Sampler, TokenLogprob, logprobs
from owl_deploy.serving.scheduler import Batch, Copy, Piece, Request, Scheduler, Step
from owl_deploy.serving.text import AnswerText

Finish = Literal["stop", "length", "deadline", "error", "shutdown", "cancelled"]
Logits = NDArray[np.float32]

_RECENT = 32  # answers whose time is remembered, to tell others how long to wait
_LONGEST_WAIT_S = 60


class Model(Protocol):
    """What computes; `SlotRunner` is one."""

    def prefill(self, slot: int, start: int, tokens: Sequence[int], *, want_logits: bool) -> Logits | None: ...

    def decode(self, first: int, tokens: Sequence[int], lengths: Sequence[int]) -> Logits: ...

    def copy(self, source: int, target: int, tokens: int) -> None: ...


@dataclass(frozen=True)
class Event:
    """What has become of an answer.

    Attributes:
        text: what can be shown since the last event; the rest of the answer, if this is its end.
        token: the token that was chosen; None at an end without one.
        finish: why it ends; None while it does not.
        reason: what went wrong, in words for a log.
    """

    text: str = ""
    token: TokenLogprob | None = None
    finish: Finish | None = None
    reason: str = ""


@dataclass(eq=False, kw_only=True)
class Answer(Request):
    """One answer that is being made: how its tokens are chosen, and who is told of them.

    Attributes:
        most: new tokens at most.
        top_logprobs: how many alternatives to each token are wanted; None for no log-probabilities at all.
        tell: is called in the thread of the engine with every event, the last of which has a `finish`.
    """

    sampler: Sampler
    text: AnswerText
    stop_tokens: frozenset[int]
    most: int
    tell: Callable[[Event], None]
    constraint: Constraint | None = None
    top_logprobs: int | None = None
    submitted_at: float = field(default_factory=time.monotonic)
    last_token_at: float | None = None

    @property
    def new_tokens(self) -> int:
        """Tokens of the answer; a stop token is none of them."""
        return len(self.tokens) - self.prompt_length

    def advance(self, logits: Logits) -> tuple[int, Event]:
        """Choose the next token.

        Raises:
            ValueError: the logits leave no token to choose, or the constraint gives up.
        """
        token = self.sampler.choose(logits, None if self.constraint is None else self.constraint.allowed())
        if token in self.stop_tokens:
            return token, Event(text=self.text.rest(), finish="stop")
        if self.constraint is not None:
            self.constraint.accept(token)
        chosen = TokenLogprob(token, 0.0, ())
        if self.top_logprobs is not None:
            chosen = logprobs(logits, token, self.top_logprobs)
        text = self.text.push(token)
        finish: Finish | None = None
        if self.text.is_stopped or (self.constraint is not None and self.constraint.is_complete):
            finish = "stop"
        elif self.new_tokens + 1 >= self.most:
            finish = "length"
        return token, Event(text + self.text.rest() if finish else text, chosen, finish)


class _Pace:
    """How many pieces of prompts go into a step: as many as take one and a half times as long as its tokens.

    It is always one at least. So the time between two tokens of an answer stays within three times what it is without
    prompts, with some reserve, as far as one piece allows.
    """

    _MOST = 16
    _SHARE = 1.5
    _WEIGHT = 0.2  # of what was measured last

    def __init__(self) -> None:
        self._piece_s: float | None = None
        self._decode_s: float | None = None

    @property
    def pieces(self) -> int:
        """For the next step."""
        if self._piece_s is None or self._decode_s is None:
            return 1
        return min(max(int(self._SHARE * self._decode_s / self._piece_s), 1), self._MOST)

    def observe(self, pieces: int, prompts_s: float, decode_s: float | None) -> None:
        """A step has computed these pieces, and a batch if there was one, in so many seconds."""
        if pieces:
            self._piece_s = self._mean(self._piece_s, prompts_s / pieces)
        if decode_s is not None:
            self._decode_s = self._mean(self._decode_s, decode_s)

    def _mean(self, before: float | None, new: float) -> float:
        return new if before is None else before + self._WEIGHT * (new - before)


class Closed(Exception):
    """The engine takes no more requests."""


class Engine:
    """Runs a scheduler on a model, in a thread of its own. Its methods may be called from any thread."""

    def __init__(self, model: Model, scheduler: Scheduler, metrics: Metrics) -> None:
        self._model = model
        self._scheduler = scheduler
        self._metrics = metrics
        self._changed = threading.Condition()
        self._answers: set[Answer] = set()  # that are not over
        self._pace = _Pace()
        self._recent_s: deque[float] = deque(maxlen=_RECENT)
        self._is_closed = False
        self._must_stop = False
        self._thread = threading.Thread(target=self._run, name="owl-deploy-engine", daemon=True)

    def start(self) -> None:
        """Begin to compute."""
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and not self._is_closed

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    @property
    def unfinished(self) -> int:
        """Answers that wait or run."""
        with self._changed:
            return len(self._answers)

    def counts(self) -> tuple[int, int, int]:
        """Answers that wait, answers that run, and tokens kept."""
        with self._changed:
            return self._scheduler.waiting, self._scheduler.running, self._scheduler.kept

    def retry_after_s(self) -> int:
        """When a slot may be free for one who does not wait now: as long as recent answers took, for those before."""
        with self._changed:
            if not self._recent_s:
                return 1
            mean_s = sum(self._recent_s) / len(self._recent_s)
            turns = 1 + self._scheduler.waiting / max(self._scheduler.running, 1)
        return int(min(max(mean_s * turns, 1), _LONGEST_WAIT_S))

    def submit(self, answers: Sequence[Answer]) -> None:
        """Make these answers: all of them, or none.

        Raises:
            QueueFull: see `Scheduler.submit`.
            Closed: the engine is being stopped.
        """
        with self._changed:
            if self._is_closed or not self._thread.is_alive():
                raise Closed
            self._scheduler.submit(answers)
            self._answers.update(answers)
            self._changed.notify()

    def cancel(self, answer: Answer) -> None:
        """Nobody wants this answer any more; its slot is free at once. No event tells of it."""
        with self._changed:
            if not answer.is_over:
                self._scheduler.cancel(answer)
                self._forget(answer, "cancelled")

    def close(self) -> None:
        """Take no more requests; what was taken is finished."""
        with self._changed:
            self._is_closed = True

    def stop(self, timeout_s: float = 10) -> None:
        """End after the step that is being computed; answers that are not finished are told so."""
        with self._changed:
            self._is_closed = self._must_stop = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    # -------------------- in the thread

    def _run(self) -> None:
        reason = "the server stops"
        try:
            while (step := self._next_step()) is not None:
                for answer in _answers_of(step.expired):
                    self._end(answer, Event(text=answer.text.rest(), finish="deadline"))
                self._compute(step)
        except BaseException as error:
            reason = f"the engine failed ({first_line(error)})"
            raise
        finally:
            with self._changed:
                self._is_closed = True
                left = list(self._answers)
                for answer in left:
                    self._scheduler.cancel(answer)
            for answer in left:
                self._end(answer, Event(finish="shutdown", reason=reason))

    def _next_step(self) -> Step | None:
        with self._changed:
            while not self._must_stop:
                step = self._scheduler.step(time.monotonic(), self._pace.pieces)
                if not step.is_empty or step.expired:
                    return step
                self._changed.wait()
        return None

    def _compute(self, step: Step) -> None:
        start = time.perf_counter()
        for part in step.prompts:
            if isinstance(part, Copy):
                self._model.copy(part.source, part.target, part.tokens)
            else:
                self._prefill(part)
        middle = time.perf_counter()
        if step.batch is not None:
            self._decode(step.batch)
        decode_s = None if step.batch is None else time.perf_counter() - middle
        self._pace.observe(len(step.pieces), middle - start, decode_s)
        rows = 0 if step.batch is None else len(step.batch.tokens)
        self._metrics.observe_step(time.perf_counter() - start, rows)

    def _prefill(self, piece: Piece) -> None:
        (answer,) = _answers_of([piece.request])
        if answer.is_over:  # cancelled since the step was made: its slot must not be taken to keep this piece
            self._drop(piece.slot, piece.start)
            return
        try:
            logits = self._model.prefill(piece.slot, piece.start, piece.tokens, want_logits=piece.is_last)
        except Exception as error:
            self._fail(answer, error, piece.slot)
            return
        if logits is not None:
            self._advance(answer, logits)

    def _decode(self, batch: Batch) -> None:
        try:
            logits: Sequence[Logits] | Logits = self._model.decode(batch.first, batch.tokens, batch.lengths)
        except Exception as error:
            self._decode_one_by_one(batch, error)
            return
        for request, row in zip(batch.requests, logits, strict=True):
            if request is not None:
                (answer,) = _answers_of([request])
                self._advance(answer, row)

    def _decode_one_by_one(self, batch: Batch, error: Exception) -> None:
        """A batch has failed: only those fail that do so alone."""
        for place, (request, token, length) in enumerate(
            zip(batch.requests, batch.tokens, batch.lengths, strict=True), batch.first
        ):
            for answer in _answers_of([] if request is None else [request]):
                try:
                    (logits,) = self._model.decode(place, [token], [length])
                except Exception:
                    self._fail(answer, error, place)
                else:
                    self._advance(answer, logits)

    def _advance(self, answer: Answer, logits: Logits) -> None:
        if answer.is_over:
            return
        try:
            token, event = answer.advance(logits)
        except Exception as error:
            self._fail(answer, error)
            return
        now = time.monotonic()
        self._metrics.observe_token(now - (answer.last_token_at or answer.submitted_at), answer.last_token_at is None)
        answer.last_token_at = now
        if event.finish is None:
            with self._changed:
                self._scheduler.append(answer, token)
            answer.tell(event)
            return
        if event.token is not None:
            answer.tokens.append(token)
        self._end(answer, event)

    def _fail(self, answer: Answer, error: Exception, slot: int | None = None) -> None:
        self._drop(slot, 0)
        self._end(answer, Event(finish="error", reason=first_line(error)))

    def _drop(self, slot: int | None, start: int) -> None:
        """A slot keeps nothing from `start` on: it was not computed."""
        if slot is not None:
            with self._changed:
                self._scheduler.forget(slot, start)

    def _end(self, answer: Answer, event: Event) -> None:
        with self._changed:
            if answer not in self._answers:
                return
            self._scheduler.finish(answer)
            self._forget(answer, event.finish or "error")
        answer.tell(event)

    def _forget(self, answer: Answer, finish: Finish) -> None:
        self._answers.discard(answer)
        duration_s = time.monotonic() - answer.submitted_at
        if finish in ("stop", "length"):
            self._recent_s.append(duration_s)
        self._metrics.observe_answer(finish, duration_s, answer.computed, answer.reused, answer.new_tokens)


def _answers_of(requests: Sequence[Request]) -> Iterator[Answer]:
    """All that are submitted to an engine are answers."""
    for request in requests:
        assert isinstance(request, Answer)
        yield request
