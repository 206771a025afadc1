"""`owl-deploy serve` over HTTP: what OpenAI's own client gets from it, and what it does under load and faults."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from openai import OpenAI
from schemathesis.specs.openapi.checks import positive_data_acceptance

from owl_deploy.serving.app import Limits
from owl_deploy.serving.run import Serving

from .conftest import RunCli
from .served import CONTEXT, KEY, Running, rss_bytes, running, started

HELLO = [{"role": "user", "content": "hello"}]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["x"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def server(served_tiny: Path) -> Iterator[Running]:
    """Started as a user starts it, with a key."""
    with started(served_tiny, "--port", 0, "--slots", 4, OWL_DEPLOY_API_KEY=KEY) as (found, _):
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[OpenAI]:
    with server.client() as found:
        yield found


def counts(url: str) -> tuple[int, int]:
    """Answers that wait, and that run."""
    status = httpx.get(f"{url}/health").json()
    return status["waiting"], status["running"]


def wait_until_idle(url: str, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while counts(url) != (0, 0):
        assert time.monotonic() < end, counts(url)
        time.sleep(0.02)


# -------------------- what it answers


def test_it_names_its_model(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("tiny", "model")
    assert client.models.retrieve("tiny").id == "tiny"


def test_a_chat_is_answered_the_same_at_once_in_a_stream_and_by_the_async_client(
    client: OpenAI, server: Running
) -> None:
    asked = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 20}
    whole = client.chat.completions.create(**asked)
    (choice,) = whole.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("length", "stop")
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens

    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == choice.message.content
    assert chunks[-2].choices[0].finish_reason == choice.finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in client.chat.completions.create(**asked, stream=True))

    async def ask() -> str | None:
        async with server.async_client() as asynchronous:
            answers = await asyncio.gather(*(asynchronous.chat.completions.create(**asked) for _ in range(6)))
            texts = {answer.choices[0].message.content for answer in answers}
            assert len(texts) == 1
            return texts.pop()

    assert asyncio.run(ask()) == choice.message.content


def test_a_text_is_continued_from_text_and_from_ids(client: OpenAI, server: Running) -> None:
    asked = {"model": "tiny", "temperature": 0, "max_tokens": 8}
    of_text = client.completions.create(prompt="the word", **asked)
    ids = httpx.post(f"{server.url}/tokenize", json={"prompt": "the word"}, headers=_key()).json()
    assert ids["count"] == len(ids["tokens"])
    of_ids = client.completions.create(prompt=ids["tokens"], **asked)
    assert of_ids.choices[0].text == of_text.choices[0].text
    several = client.completions.create(prompt=["the word", "a"], n=2, **asked)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in several.choices[:2]] == [of_text.choices[0].text] * 2
    streamed = client.completions.create(prompt="the word", stream=True, **asked)
    assert "".join(chunk.choices[0].text for chunk in streamed) == of_text.choices[0].text


def test_a_seed_gives_the_same_answers_and_n_gives_different_ones(client: OpenAI) -> None:
    def ask(seed: int) -> list[str | None]:
        made = client.chat.completions.create(
            model="tiny", messages=HELLO, n=3, seed=seed, max_tokens=12, temperature=1.5, top_p=0.95,
            extra_body={"top_k": 100, "min_p": 0.001, "repetition_penalty": 1.1},
        )  # fmt: skip
        return [choice.message.content for choice in made.choices]

    assert ask(1) == ask(1)
    assert ask(1) != ask(2)
    assert len(set(ask(1))) == 3


def test_an_answer_ends_before_a_stop_string(client: OpenAI) -> None:
    asked = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 30}
    text = client.chat.completions.create(**asked).choices[0].message.content or ""
    stop = text[5:7]
    made = client.chat.completions.create(**asked, stop=[stop, "never there"]).choices[0]
    assert (made.message.content, made.finish_reason) == (text[: text.index(stop)], "stop")


def test_logprobs_are_those_of_the_tokens(client: OpenAI) -> None:
    asked = {"model": "tiny", "temperature": 0, "max_tokens": 6}
    chat = client.chat.completions.create(messages=HELLO, logprobs=True, top_logprobs=3, **asked).choices[0]
    assert chat.logprobs is not None and chat.logprobs.content is not None
    assert len(chat.logprobs.content) == 6
    for token in chat.logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob <= 0
    joined = b"".join(bytes(token.bytes or ()) for token in chat.logprobs.content)
    assert joined.decode(errors="replace").startswith((chat.message.content or "").rstrip("\N{REPLACEMENT CHARACTER}"))
    streamed = client.chat.completions.create(messages=HELLO, logprobs=True, top_logprobs=3, stream=True, **asked)
    found = [
        token.logprob
        for chunk in streamed
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content or []
    ]
    assert found == [token.logprob for token in chat.logprobs.content]
    text = client.completions.create(prompt="the", logprobs=2, **asked).choices[0]
    assert text.logprobs is not None and text.logprobs.tokens is not None
    assert len(text.logprobs.tokens) == len(text.logprobs.token_logprobs or []) == 6


def test_a_bias_forces_a_token(client: OpenAI) -> None:
    made = client.completions.create(model="tiny", prompt="a", max_tokens=5, logit_bias={"40": 100}, logprobs=0)
    assert made.choices[0].logprobs is not None
    assert len(set(made.choices[0].logprobs.tokens or [])) == 1


@pytest.mark.parametrize("seed", range(3))
def test_json_keeps_to_its_schema(client: OpenAI, seed: int) -> None:
    made = client.chat.completions.create(
        model="tiny", messages=HELLO, seed=seed, max_tokens=200,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}},
    )  # fmt: skip
    assert made.choices[0].finish_reason == "stop"
    person = json.loads(made.choices[0].message.content or "")
    assert person.keys() == {"name", "age"}
    assert 0 <= person["age"] <= 99


def test_a_json_object_begins_as_one(client: OpenAI) -> None:
    made = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=20, response_format={"type": "json_object"}
    )
    assert (made.choices[0].message.content or "").startswith("{")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_tool_is_called_at_once_and_in_a_stream(client: OpenAI, choice: object) -> None:
    asked = {
        "model": "tiny", "messages": HELLO, "tools": [ADD], "tool_choice": choice, "temperature": 0, "max_tokens": 150,
        "parallel_tool_calls": False,
    }  # fmt: skip
    made = client.chat.completions.create(**asked).choices[0]
    assert made.finish_reason == "tool_calls"
    (call,) = made.message.tool_calls or []
    assert call.function.name == "add"
    assert json.loads(call.function.arguments)["x"] in range(10)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    (streamed,) = [found for chunk in chunks for found in chunk.choices[0].delta.tool_calls or []]
    assert streamed.function is not None
    assert (streamed.function.name, streamed.function.arguments) == ("add", call.function.arguments)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    conversation = [*HELLO, made.message.to_dict(), {"role": "tool", "tool_call_id": call.id, "content": "1"}]
    again = client.chat.completions.create(model="tiny", messages=conversation, tools=[ADD], max_tokens=5)
    assert again.choices[0].finish_reason


def test_tools_may_be_left_alone(client: OpenAI) -> None:
    asked = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 10}
    plain = client.chat.completions.create(**asked).choices[0].message.content
    assert client.chat.completions.create(**asked, tools=[ADD], tool_choice="none").choices[0].message.content == plain


# -------------------- what it refuses


def _key() -> dict[str, str]:
    return {"Authorization": f"Bearer {KEY}"}


@pytest.mark.parametrize(
    ("asked", "param", "message"),
    [
        ({"frequency": 1}, "frequency", "frequency is not supported"),
        ({"store": True}, "store", "store is not supported"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None, ""),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"logit_bias": {"320": 1}}, "logit_bias", "'320' is no token of the model, which knows 320"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, None, ""),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}},
            "response_format",
            "nonsense",
        ),
        ({"max_tokens": 10**6}, "max_tokens", f"of the context of {CONTEXT}"),
        (
            {"messages": [{"role": "user", "content": "x" * 1200}]},
            "messages",
            "tokens and leaves no room in the context",
        ),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(
    server: Running, asked: dict[str, object], param: str | None, message: str
) -> None:
    body = {"model": "tiny", "messages": HELLO} | asked
    response = httpx.post(f"{server.url}/v1/chat/completions", content=json.dumps(body), headers=_key() | _JSON)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]
    assert param is None or error["param"] == param


_JSON = {"Content-Type": "application/json"}


def test_errors_are_the_exceptions_of_the_client(client: OpenAI, server: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.chat.completions.create(model="other", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="best_of is not supported"):
        client.completions.create(model="tiny", prompt="a", best_of=2)
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny", prompt="x" * 1000)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
        server.client(api_key="another").models.list()
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="tiny", input="x")


def test_the_key_is_asked_for_where_answers_are_made(server: Running) -> None:
    for path in ("/v1/models", "/metrics", "/nothing"):
        response = httpx.get(server.url + path)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/", "/docs", "/openapi.json", "/health", "/ready"):
        assert httpx.get(server.url + path).status_code == 200


def test_rubbish_is_refused_and_nothing_breaks(server: Running) -> None:
    url = f"{server.url}/v1/chat/completions"
    for content in (b"", b"rubbish", b"[1]", b'{"model": "tiny"', b"\xff\xfe", b'{"model": NaN}', b"null"):
        response = httpx.post(url, content=content, headers=_key() | _JSON)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["message"]
    large = httpx.post(url, content=b"x" * (2 << 20), headers=_key() | _JSON)
    assert large.status_code == 413

    def pieces() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * (1 << 16)

    assert httpx.post(url, content=pieces(), headers=_key() | _JSON).status_code == 413
    assert httpx.put(url, headers=_key()).status_code == 405
    assert httpx.get(f"{server.url}/nothing", headers=_key()).json()["error"]["message"] == "Not Found"
    assert counts(server.url) == (0, 0)


def test_metrics_count_what_was_done(client: OpenAI, server: Running) -> None:
    client.completions.create(model="tiny", prompt="count this", max_tokens=3, logit_bias={"1": -100})

    def value(name: str) -> float:
        page = httpx.get(f"{server.url}/metrics", headers=_key()).text
        return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(name))

    before = value("owl_generated_tokens_total")
    client.completions.create(model="tiny", prompt="count this", max_tokens=7, logit_bias={"1": -100})
    assert value("owl_generated_tokens_total") == before + 7
    assert value("owl_answers_running") == 0
    assert value("owl_kv_buffer_bytes") == 2 * 3 * 2 * 16 * 4 * 4 * CONTEXT


def test_a_second_turn_reuses_the_first(client: OpenAI) -> None:
    first = [{"role": "user", "content": "a conversation that is long enough to be kept, " * 2}]
    made = client.chat.completions.create(model="tiny", messages=first, max_tokens=20, temperature=0)
    turn = [*first, {"role": "assistant", "content": made.choices[0].message.content or ""}, *HELLO]
    usage = client.chat.completions.create(model="tiny", messages=turn, max_tokens=2).usage
    assert usage is not None and usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens_details.cached_tokens or 0) >= 64


# -------------------- schemathesis


def test_every_response_is_one_that_the_openapi_page_describes(served_tiny: Path) -> None:
    with running(served_tiny, Serving(slots=4, context=64), limits=Limits(timeout_s=5)) as served:
        schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
        assert {operation.ok().path for operation in schema.get_all_operations()} >= {
            "/v1/chat/completions", "/v1/completions", "/tokenize", "/v1/models", "/health", "/metrics",
        }  # fmt: skip
        end = time.monotonic() + 10

        for operation in schema.get_all_operations():
            _check_operation(operation.ok(), end)
        wait_until_idle(served.url)


def _check_operation(operation: object, end: float) -> None:
    @given(case=operation.as_strategy())
    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    def check(case: schemathesis.Case) -> None:
        if time.monotonic() < end:
            response = case.call(timeout=30)
            assert response.status_code < 500, response.text
            # A schema cannot say that fields go together, or that a prompt fits into the context: 400 is right there.
            case.validate_response(response, excluded_checks=[positive_data_acceptance])

    check()


# -------------------- load and faults


def test_a_full_queue_is_429_with_a_time_to_come_back(served_tiny: Path) -> None:
    with running(served_tiny, Serving(slots=1, queue=1)) as served, served.client() as client:
        asked = {"model": "tiny", "prompt": "a", "max_tokens": CONTEXT - 1, "logit_bias": {"1": -100}}
        first, second = (client.completions.create(**asked, stream=True) for _ in range(2))
        next(iter(first))
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(**asked)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert refused.value.code == "queue_full"
        first.close()
        second.close()
        wait_until_idle(served.url)
        patient = served.client(max_retries=3)
        assert patient.completions.create(**asked | {"max_tokens": 2}).choices[0].text is not None


def test_a_deadline_ends_an_answer_at_once_and_in_a_stream(served_tiny: Path) -> None:
    with running(served_tiny, Serving(slots=1), limits=Limits(timeout_s=0.05)) as served, served.client() as client:
        asked = {"model": "tiny", "prompt": "a" * 100, "max_tokens": 100, "n": 4, "logit_bias": {"1": -100}}
        with pytest.raises(openai.InternalServerError, match=r"not finished within 0\.05 s"):
            client.completions.create(**asked)
        with pytest.raises(openai.APIError, match=r"not finished within 0\.05 s"):
            list(client.completions.create(**asked, stream=True))
        wait_until_idle(served.url)


def test_a_client_that_goes_away_frees_its_slot(served_tiny: Path) -> None:
    with running(served_tiny, Serving(slots=2)) as served, served.client() as client:
        asked = {"model": "tiny", "prompt": "a", "max_tokens": CONTEXT - 1, "logit_bias": {"1": -100}}
        assert served.opened is not None
        decode = served.opened.engine._model.decode
        served.opened.engine._model.decode = lambda *given: (time.sleep(0.05), decode(*given))[1]  # 13 s an answer
        stream = client.completions.create(**asked, stream=True)
        next(iter(stream))
        assert counts(served.url) == (0, 1)
        stream.close()
        wait_until_idle(served.url, 3)
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.3).completions.create(**asked)
        wait_until_idle(served.url, 3)
        body = json.dumps(asked | {"stream": True}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        host, port = served.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as abrupt:
            abrupt.sendall(head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            abrupt.recv(100)
            abrupt.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # it resets the connection
        wait_until_idle(served.url, 3)


def misbehave(client: OpenAI, asked: dict[str, object], chance: random.Random) -> str:
    """One request of a client that may vanish, time out or send rubbish; the text it got, or what came of it."""
    kind = chance.choice(["good", "good", "good", "vanish", "time out", "rubbish"])
    try:
        if kind == "rubbish":
            content = bytes(chance.randrange(256) for _ in range(chance.randrange(200)))
            status = client._client.post(
                f"{client.base_url}completions", content=content, headers=_key() | _JSON
            ).status_code
            return kind if status == 400 else f"{status} for rubbish"
        if kind == "vanish":
            stream = client.completions.create(**asked, stream=True)
            for _ in range(chance.randrange(1, 4)):
                next(iter(stream), None)
            stream.close()
            return kind
        patience = chance.random() / 20 if kind == "time out" else 60
        return client.with_options(timeout=patience).completions.create(**asked).choices[0].text
    except (openai.APITimeoutError, openai.RateLimitError, openai.APIConnectionError) as error:
        return "refused" if kind != "good" or isinstance(error, openai.RateLimitError) else repr(error)


def test_many_clients_that_misbehave_leak_nothing_and_get_no_wrong_answer(server: Running, client: OpenAI) -> None:
    """OWL_DEPLOY_SOAK_S makes it longer."""
    prompts = [f"{'the same beginning ' * (place % 3)}{place}" for place in range(12)]
    asked = [{"model": "tiny", "prompt": text, "max_tokens": 16, "temperature": 0} for text in prompts]
    right = [client.completions.create(**one).choices[0].text for one in asked]
    end = time.monotonic() + float(os.environ.get("OWL_DEPLOY_SOAK_S", "6"))
    rss: list[int] = []

    def visit(seed: int) -> list[str]:
        chance, outcomes = random.Random(seed), []
        with server.client() as visitor:
            while time.monotonic() < end:
                place = chance.randrange(len(prompts))
                got = misbehave(visitor, asked[place], chance)
                outcomes.append("right" if got == right[place] else got)
        return outcomes

    with ThreadPoolExecutor(64) as pool:
        visits = [pool.submit(visit, seed) for seed in range(64)]
        while time.monotonic() < end:
            rss.append(rss_bytes(server.pid))
            time.sleep(0.5)
        outcomes = Counter(outcome for visited in visits for outcome in visited.result())
    assert outcomes.keys() <= {"right", "refused", "vanish", "rubbish"}
    assert outcomes["right"] > 0
    wait_until_idle(server.url)
    print(f"{outcomes}; MiB: {[size >> 20 for size in rss[:: max(len(rss) // 12, 1)]]}")
    assert rss[-1] < rss[len(rss) // 2] + (16 << 20)


def test_it_drains_at_the_first_signal_and_starts_again_after_a_kill(served_tiny: Path) -> None:
    asked = {"model": "tiny", "prompt": "a", "max_tokens": CONTEXT - 1, "temperature": 0, "logit_bias": {"1": -100}}
    with started(served_tiny, "--port", 0, "--quiet") as (served, process):
        port = served.url.rpartition(":")[2]
        before = served.client().completions.create(**asked).choices[0].text
        begun = served.client().completions.create(**asked, stream=True)
        next(iter(begun))
        process.kill()
        with pytest.raises((openai.APIError, httpx.HTTPError)):
            list(begun)
    with started(served_tiny, "--port", port) as (served, process):
        client = served.client()
        begun = iter(client.completions.create(**asked, stream=True))
        text = next(begun).choices[0].text
        process.send_signal(signal.SIGTERM)
        text += "".join(chunk.choices[0].text for chunk in begun)
        assert text == before
        _, said = process.communicate(timeout=30)
        assert process.returncode == 0, said
        assert "stopping: answers that were begun are finished" in said


def test_a_second_signal_does_not_wait(served_tiny: Path) -> None:
    with started(served_tiny, "--port", 0) as (served, process):
        threads = [threading.Thread(target=lambda: _ask_until_cut(served), daemon=True) for _ in range(8)]
        for thread in threads:
            thread.start()
        while counts(served.url)[1] == 0:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=20)
        assert process.returncode == 130
        assert "interrupted" in said


def _ask_until_cut(served: Running) -> None:
    with contextlib.suppress(openai.APIError):
        served.client().completions.create(
            model="tiny", prompt="a", max_tokens=CONTEXT - 1, n=16, logit_bias={"1": -100}
        )


# -------------------- the command


def test_mistakes_are_one_line(served_tiny: Path, tmp_path: Path, run_cli: RunCli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = run_cli("serve", served_tiny, "--port", port)
        assert (ran.code, ran.stdout) == (2, "")
        assert f"--port {port}: cannot be had on 127.0.0.1" in ran.stderr
    empty = tmp_path / "key"
    empty.write_text("\n")
    ran = run_cli("serve", served_tiny, "--api-key", empty)
    assert ran.code == 2 and "is empty" in ran.stderr
    ran = run_cli("serve", tmp_path)
    assert ran.code == 2 and "not an export bundle" in ran.stderr
    ran = run_cli("serve", served_tiny, "--port", 0, "--slots", 256, "--context", 10**6)
    assert ran.code == 2 and len(ran.stderr.splitlines()) == 1
