"""What `/metrics` shows, in Prometheus's format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_STEP_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2)
_ANSWER_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300)
_COUNTS = {
    "owl_answers_waiting": "Answers that wait for a slot.",
    "owl_answers_running": "Answers that have a slot.",
    "owl_tokens_kept": "Tokens whose keys and values are in the slots.",
}


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        on = self._registry
        self._responses = Counter(
            "owl_http_responses", "Responses by path and status.", ["path", "status"], registry=on
        )
        self._answers = Counter("owl_answers", "Answers by how they ended.", ["finish"], registry=on)
        self._computed = Counter("owl_prompt_tokens_computed", "Tokens of prompts that were computed.", registry=on)
        self._reused = Counter("owl_prompt_tokens_reused", "Tokens of prompts that were kept from before.", registry=on)
        self._generated = Counter("owl_generated_tokens", "Tokens of answers.", registry=on)
        self._first_s = Histogram(
            "owl_time_to_first_token_seconds", "From a request to its first token.", buckets=_ANSWER_S, registry=on
        )
        self._between_s = Histogram(
            "owl_time_between_tokens_seconds", "From one token of an answer to the next.", buckets=_STEP_S, registry=on
        )
        self._answer_s = Histogram("owl_answer_seconds", "From a request to its end.", buckets=_ANSWER_S, registry=on)
        self._step_s = Histogram("owl_step_seconds", "Steps of the engine.", buckets=_STEP_S, registry=on)
        self._rows = Histogram(
            "owl_batch_slots", "Slots that a step decodes together.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=on
        )

    def watch(self, counts: Callable[[], tuple[int, int, int]], slots: int, buffer_bytes: int) -> None:
        """Show these as they are when asked: answers that wait, answers that run, and tokens kept."""
        for place, (name, text) in enumerate(_COUNTS.items()):
            Gauge(name, text, registry=self._registry).set_function(_nth(counts, place))
        Gauge("owl_slots", "Answers that can run at once.", registry=self._registry).set(slots)
        Gauge("owl_kv_buffer_bytes", "Memory of keys and values.", registry=self._registry).set(buffer_bytes)

    def observe_response(self, path: str, status: int) -> None:
        """A response has begun."""
        self._responses.labels(path, str(status)).inc()

    def observe_step(self, seconds: float, rows: int) -> None:
        """A step has computed, and decoded so many slots."""
        self._step_s.observe(seconds)
        if rows:
            self._rows.observe(rows)

    def observe_token(self, seconds: float, is_first: bool) -> None:
        """A token has come, so long after the one before or after its request."""
        (self._first_s if is_first else self._between_s).observe(seconds)

    def observe_answer(self, finish: str, seconds: float, computed: int, reused: int, generated: int) -> None:
        """An answer has ended; of its prompt, so many tokens had been there already."""
        self._answers.labels(finish).inc()
        self._answer_s.observe(seconds)
        self._reused.inc(reused)
        self._computed.inc(computed - reused)
        self._generated.inc(generated)

    def page(self) -> bytes:
        """All of it, as text."""
        return generate_latest(self._registry)


def _nth(counts: Callable[[], tuple[int, ...]], place: int) -> Callable[[], float]:
    return lambda: counts()[place]
