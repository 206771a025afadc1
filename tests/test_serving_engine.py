"""What `serve` computes: the tokens of a batch are those of a lone run, sampling is what it says, text is whole."""

from __future__ import annotations

import itertools
import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from owl_deploy.bundle.names import SPARSE_BY_BYTES, Flavor, sparse_flavor
from owl_deploy.engines.onnxruntime_engine import OnnxRuntimeEngine
from owl_deploy.engines.sparse_engine import SparseEngine
from owl_deploy.errors import UserError
from owl_deploy.serving.constraints import GrammarError, Grammars
from owl_deploy.serving.engine import Answer, Event
from owl_deploy.serving.requests import Function
from owl_deploy.serving.run import _PREFERRED, Opened, Serving, open_bundle
from owl_deploy.serving.runner import SlotRunner
from owl_deploy.serving.sampling import Sampler, Sampling, logprobs
from owl_deploy.serving.text import AnswerText, TokenNames
from owl_deploy.serving.tools import CallReader, call_grammar
from owl_deploy.sparse.formats import WEIGHTS

from .served import CONTEXT, bytes_tokenizer

FLAVORS: list[Flavor] = ["genai", "sparse-int8"]
NEW = 12
TOKENIZER = bytes_tokenizer()
logits_arrays = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=40).map(lambda x: np.array(x, np.float32))


# -------------------- the runner


def slot_runner(bundle: Path, flavor: Flavor, slots: int = 4) -> SlotRunner:
    runner = SlotRunner(
        bundle / flavor / "model.onnx", packed=flavor == "sparse-int8", slots=slots, context=CONTEXT, threads=1
    )
    runner.allocate()
    return runner


def prefill(runner: SlotRunner, slot: int, prompt: list[int], piece: int) -> NDArray[np.float32]:
    for start in range(0, len(prompt), piece):
        tokens = prompt[start : start + piece]
        logits = runner.prefill(slot, start, tokens, want_logits=start + piece >= len(prompt))
    assert logits is not None
    return logits


@pytest.mark.parametrize("flavor", FLAVORS)
def test_slots_of_different_lengths_decode_in_one_batch_what_the_engine_of_bench_decodes_alone(
    served_tiny: Path, flavor: Flavor
) -> None:
    random = np.random.default_rng(0)
    prompts = [random.integers(2, 300, length).tolist() for length in (3, 70, 1, 33)]
    runner = slot_runner(served_tiny, flavor)
    found = [[int(prefill(runner, slot, prompt, 32).argmax())] for slot, prompt in enumerate(prompts)]
    for _ in range(NEW - 1):
        lengths = [len(prompt) + len(tokens) - 1 for prompt, tokens in zip(prompts, found, strict=True)]
        logits = runner.decode(0, [tokens[-1] for tokens in found], lengths)
        for tokens, row in zip(found, logits, strict=True):
            tokens.append(int(row.argmax()))
    engine_class = SparseEngine if flavor.startswith("sparse") else OnnxRuntimeEngine
    engine = engine_class(served_tiny / flavor / "model.onnx", threads=1, context=CONTEXT)
    for prompt, tokens in zip(prompts, found, strict=True):
        expected = [int(engine.prefill(np.array([prompt], np.int64))[0].argmax())]
        while len(expected) < NEW:
            expected.append(int(engine.decode(np.array(expected[-1:]))[0].argmax()))
        assert tokens == expected


@pytest.mark.parametrize("flavor", FLAVORS)
def test_a_slot_that_is_run_along_keeps_what_it_has_and_changes_nothing_for_the_others(
    served_tiny: Path, flavor: Flavor
) -> None:
    prompt = list(range(2, 42))
    runner = slot_runner(served_tiny, flavor)
    for slot in range(3):
        prefill(runner, slot, prompt, 32)
    alone = runner.decode(1, [7], [40])[0].copy()
    beside = runner.decode(0, [0, 7, 0], [40, 40, 40])
    assert np.array_equal(beside[1], alone)
    assert np.array_equal(runner.decode(0, [7], [40])[0], alone)


@pytest.mark.parametrize("flavor", FLAVORS)
def test_a_copied_beginning_is_as_good_as_a_computed_one(served_tiny: Path, flavor: Flavor) -> None:
    prompt = list(range(2, 72))
    runner = slot_runner(served_tiny, flavor)
    computed = prefill(runner, 0, prompt, 32)
    runner.copy(0, 3, 64)
    copied = runner.prefill(3, 64, prompt[64:], want_logits=True)
    assert copied is not None
    assert np.array_equal(copied, computed)


def test_the_buffer_is_as_large_as_it_says(served_tiny: Path) -> None:
    runner = slot_runner(served_tiny, "genai", slots=4)
    assert runner.token_bytes == 2 * 3 * 2 * 16 * 4  # keys and values, layers, heads, head size, bytes
    assert runner.buffer_bytes == runner.token_bytes * 4 * CONTEXT


def test_every_sparse_flavor_can_be_served() -> None:
    assert sorted(SPARSE_BY_BYTES) == sorted(sparse_flavor(weights) for weights in WEIGHTS)
    assert set(SPARSE_BY_BYTES) < set(_PREFERRED)


# -------------------- the engine


class Heard:
    """The events of one answer, and their end."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._ended = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if event.finish is not None:
            self._ended.set()

    def finish(self) -> str | None:
        assert self._ended.wait(60)
        return self.events[-1].finish

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)


def answer(prompt: list[int], heard: Heard, new: int = NEW, **sampling: float) -> Answer:
    return Answer(
        tokens=list(prompt),
        sampler=Sampler(Sampling(**({"temperature": 0.0} | sampling)), prompt),
        text=AnswerText(TOKENIZER, []),
        stop_tokens=frozenset(),
        most=new,
        tell=heard,
    )


def open_tiny(bundle: Path, flavor: Flavor, **serving: int) -> Opened:
    return open_bundle(bundle, Serving(flavor=flavor, **serving))


@pytest.fixture(params=FLAVORS)
def engine_of(request: pytest.FixtureRequest, served_tiny: Path) -> Iterator[Opened]:
    opened = open_tiny(served_tiny, request.param, slots=5)
    opened.engine.start()
    yield opened
    opened.engine.stop()


def test_greedy_answers_are_the_same_alone_and_in_any_batch(engine_of: Opened) -> None:
    engine = engine_of.engine
    random = np.random.default_rng(1)
    beginning = random.integers(2, 300, 40).tolist()
    prompts = [
        *(random.integers(2, 300, length).tolist() for length in (1, 5, 31, 32, 33, 64, 90, 100)),
        *([*beginning, *random.integers(2, 300, 30).tolist()] for _ in range(4)),
    ]

    def run(together: bool) -> list[list[int]]:
        answers = []
        for prompt in prompts:
            answers.append((answer(prompt, heard := Heard()), heard))
            engine.submit([answers[-1][0]])
            if not together:
                heard.finish()
        assert [heard.finish() for _, heard in answers] == ["length"] * len(prompts)
        return [found.tokens for found, _ in answers]

    alone = run(together=False)
    assert run(together=True) == alone
    assert engine.counts()[:2] == (0, 0)


def test_a_request_that_fails_takes_no_other_with_it(engine_of: Opened) -> None:
    engine = engine_of.engine
    good, bad = Heard(), Heard()
    broken = answer([5, 6, 7], bad)

    def fail(_logits: object, _allowed: object) -> int:
        raise RuntimeError("a sampler that breaks")

    broken.sampler.choose = fail
    engine.submit([answer([2, 3, 4], good), broken])
    assert bad.finish() == "error"
    assert "a sampler that breaks" in bad.events[-1].reason
    assert good.finish() == "length"
    assert len(good.events) == NEW


def test_when_a_batch_fails_only_those_fail_that_do_so_alone(served_tiny: Path) -> None:
    opened = open_tiny(served_tiny, "genai", slots=3)
    engine, model = opened.engine, opened.engine._model
    decode = model.decode

    def failing(first: int, tokens: list[int], lengths: list[int]) -> NDArray[np.float32]:
        if 9 in lengths:
            raise RuntimeError("no memory for nine tokens")
        return decode(first, tokens, lengths)

    model.decode = failing
    heard = [Heard() for _ in range(3)]
    answers = [answer(list(range(2, 2 + length)), heard[place]) for place, length in enumerate((9, 10, 11))]
    engine.start()
    engine.submit(answers)
    assert [one.finish() for one in heard] == ["error", "length", "length"]
    again = Heard()
    engine.submit([answer(list(range(2, 12)), again)])
    assert again.finish() == "length"
    engine.stop()


def test_what_is_cancelled_frees_its_slot_and_tells_nothing(engine_of: Opened) -> None:
    engine = engine_of.engine
    heard = [Heard() for _ in range(7)]
    answers = [answer([place + 2], one, new=CONTEXT - 1) for place, one in enumerate(heard)]
    engine.submit(answers)
    for one in answers:
        engine.cancel(one)
    assert engine.counts()[:2] == (0, 0)
    assert engine.unfinished == 0
    assert all(event.finish is None for one in heard for event in one.events)


def test_those_who_wait_are_told_when_the_engine_stops(served_tiny: Path) -> None:
    opened = open_tiny(served_tiny, "genai", slots=1)
    heard = [Heard(), Heard()]
    opened.engine.start()
    opened.engine.submit([answer([2], one, new=CONTEXT - 1) for one in heard])
    opened.engine.stop()
    assert {one.finish() for one in heard} <= {"shutdown", "length"}
    assert heard[1].finish() == "shutdown"


@pytest.mark.parametrize(
    ("serving", "message"),
    [
        (Serving(flavor="standard"), "--flavor standard: is not here, or its graph cannot be served; choose from"),
        (Serving(flavor="nonsense"), "--flavor nonsense: is unknown; choose from sparse-int8, genai"),
        (Serving(context=CONTEXT + 1), f"--context {CONTEXT + 1}: the model was made for {CONTEXT} tokens"),
        (Serving(slots=10**9), "keys and values take"),
    ],
)
def test_what_cannot_be_served_is_refused(served_tiny: Path, serving: Serving, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_bundle(served_tiny, serving)


# -------------------- sampling


@settings(deadline=None)
@given(
    logits=logits_arrays,
    top_k=st.integers(1, 5),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_a_drawn_token_is_one_that_every_filter_leaves(
    logits: NDArray[np.float32], top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    sampling = Sampling(temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    token = Sampler(sampling, []).choose(logits)
    assert Sampler(sampling, []).choose(logits) == token
    weights = np.exp((logits.astype(np.float64) - float(logits.max())) / 0.8)
    kept = np.sort(weights)[::-1][:top_k]
    assert weights[token] >= kept[-1]
    assert weights[weights > weights[token]].sum() < top_p * kept.sum() + 1e-9
    assert weights[token] >= min_p - 1e-9


def test_draws_are_as_frequent_as_they_are_likely() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(Sampling(seed=3), [])
    counts = np.bincount([sampler.choose(logits) for _ in range(4000)], minlength=4) / 4000
    assert np.allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.03)


def test_a_large_nucleus_is_found_too() -> None:
    logits = np.zeros(5000, np.float32)  # all alike: 99% of the probability needs 4950 tokens
    drawn = {Sampler(Sampling(top_p=0.99, seed=seed), []).choose(logits) for seed in range(300)}
    assert len(drawn) > 250


def test_penalties_and_bias_change_the_likeliest() -> None:
    logits = np.array([2.0, 1.9, 1.0, -1.0], np.float32)
    cold = {"temperature": 0.0}
    assert Sampler(Sampling(**cold), [0]).choose(logits) == 0
    assert Sampler(Sampling(**cold, repetition_penalty=1.5), [0]).choose(logits) == 1
    assert Sampler(Sampling(**cold, logit_bias={3: 100.0}), []).choose(logits) == 3
    assert Sampler(Sampling(**cold, presence_penalty=1.0), [0]).choose(logits) == 0  # of the answer alone
    frequent = Sampler(Sampling(**cold, frequency_penalty=0.5), [])
    assert [frequent.choose(logits) for _ in range(5)] == [0, 1, 0, 1, 0]
    assert logits.tolist() == pytest.approx([2.0, 1.9, 1.0, -1.0])


def test_logprobs_are_of_the_model_and_sorted() -> None:
    logits = np.array([1.0, 3.0, 2.0], np.float32)
    found = logprobs(logits, token=0, top=2)
    total = math.log(sum(math.exp(value) for value in (1, 3, 2)))
    assert found.logprob == pytest.approx(1 - total)
    assert [token for token, _ in found.top] == [1, 2]
    assert [value for _, value in found.top] == pytest.approx([3 - total, 2 - total])


def test_logits_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="leave no token"):
        Sampler(Sampling(temperature=0.0), []).choose(np.full(4, np.nan, np.float32))


# -------------------- text


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(alphabet="ab€🙂 n", max_size=30),
    stops=st.lists(st.text(alphabet="ab🙂", min_size=1, max_size=3), max_size=2),
)
def test_text_comes_whole_and_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    shown = AnswerText(TOKENIZER, stops)
    pieces = []
    for token in TOKENIZER(text)["input_ids"]:
        pieces.append(shown.push(token))
        if shown.is_stopped:
            break
    pieces.append(shown.rest())
    places = [text.find(stop) for stop in stops if stop in text]
    assert "".join(pieces) == text[: min(places, default=len(text))]
    assert shown.is_stopped == bool(places)
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


def test_every_token_has_its_bytes() -> None:
    names = TokenNames(TOKENIZER)
    text = "word €🙂"
    assert b"".join(names.bytes_of(token) for token in TOKENIZER(text)["input_ids"]) == text.encode()
    assert names.bytes_of(TOKENIZER.convert_tokens_to_ids("<|im_end|>")) == b"<|im_end|>"
    assert names.bytes_of(319) == b""


# -------------------- constraints and tools


GRAMMARS = Grammars(TOKENIZER, 320, [1])


def constrained(text: str, grammar: str) -> bool:
    """Whether a grammar allows this text, and it may end there."""
    constraint = GRAMMARS.lark(grammar)
    for token in TOKENIZER(text)["input_ids"]:
        if constraint.is_complete or not constraint.allowed()[token]:
            return False
        constraint.accept(token)
    return bool(constraint.allowed()[1])


def test_json_of_a_schema_is_what_may_come() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    constraint = GRAMMARS.json(schema)
    allowed = constraint.allowed()
    assert allowed.shape == (320,)
    assert allowed[TOKENIZER.convert_tokens_to_ids("{")]
    assert not allowed[TOKENIZER.convert_tokens_to_ids("a")]
    for token in TOKENIZER('{"a": 1}')["input_ids"]:
        assert constraint.allowed()[token]
        constraint.accept(token)
    assert constraint.is_complete


@pytest.mark.parametrize(
    ("schema", "reason"), [({"type": "nonsense"}, "Invalid type: nonsense"), ({"not": {"type": "null"}}, "not")]
)
def test_a_schema_that_cannot_be_kept_to_is_refused(schema: dict[str, object], reason: str) -> None:
    with pytest.raises(GrammarError, match=reason):
        GRAMMARS.json(schema)


def test_the_grammar_of_tools_allows_calls_of_them_and_text_where_it_may_be() -> None:
    functions = [
        Function(
            name="add", parameters={"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
        ),
        Function(name="now"),
    ]
    call = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'
    other = '<tool_call>\n{"name": "sub", "arguments": {}}\n</tool_call>'
    one = {"is_one_token": GRAMMARS.is_one_token}
    free = call_grammar(functions, may_write_text=True, several=True, **one)
    assert constrained("just text", free)
    assert constrained("let me see " + call, free)
    assert not constrained("let me see " + other, free)
    forced = call_grammar(functions, may_write_text=False, several=True, **one)
    assert constrained(call, forced)
    assert constrained(f"{call}\n{call}", forced)
    assert not constrained("text", forced)
    assert not constrained(f"{call}\n{call}", call_grammar(functions, may_write_text=False, several=False, **one))


@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, 200), max_size=6))
def test_calls_are_read_from_text_however_it_is_cut(cuts: list[int]) -> None:
    call = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'
    text = f"a < b {call}\n{call} and <tool_call>not one</tool_call>"
    reader = CallReader()
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    shown, calls = "", []
    for start, end in itertools.pairwise(places):
        piece, found = reader.push(text[start:end])
        shown += piece
        calls += found
    shown += reader.rest()
    assert [(found.name, json.loads(found.arguments)) for found in calls] == [("add", {"x": 1})] * 2
    assert shown.replace("\n", "") == "a < b  and <tool_call>not one</tool_call>"
