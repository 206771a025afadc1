"""`serve` on the real SmolLM2: it answers, keeps to a schema, and its batches change nothing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from owl_deploy.exporting.run import export_checkpoint
from owl_deploy.serving.run import Serving

from .served import Running, running

pytestmark = pytest.mark.smollm2
QUESTIONS = ("What is the capital of France?", "Name a primary color.", "What is 2 + 2?", "Who wrote Hamlet?")


@pytest.fixture(scope="module")
def server(smollm2_dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    bundle = tmp_path_factory.mktemp("served") / "smollm2"
    export_checkpoint(smollm2_dense, bundle, ["sparse-int8"])
    with running(bundle, Serving(slots=6, context=512)) as found:
        yield found


async def ask(server: Running, questions: tuple[str, ...], *, together: bool) -> list[str]:
    """Greedy answers, one after the other or all at once."""
    async with server.async_client(timeout=300) as client:

        async def one(question: str) -> str:
            made = await client.chat.completions.create(
                model="smollm2", messages=[{"role": "user", "content": question}], temperature=0, max_tokens=24
            )
            return made.choices[0].message.content or ""

        if together:
            return list(await asyncio.gather(*map(one, questions)))
        return [await one(question) for question in questions]


def test_answers_are_right_and_the_same_alone_and_in_any_batch(server: Running) -> None:
    alone = asyncio.run(ask(server, QUESTIONS, together=False))
    assert "Paris" in alone[0]
    assert asyncio.run(ask(server, QUESTIONS * 2, together=True)) == alone * 2


def test_json_of_a_schema_and_log_probabilities(server: Running) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "people": {"type": "integer"}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    with server.client(timeout=300) as client:
        made = client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": "Describe Paris as JSON."}],
            response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
            logprobs=True,
            temperature=0,
            max_tokens=60,
        )
    (choice,) = made.choices
    assert choice.finish_reason == "stop"
    assert json.loads(choice.message.content or "").keys() == {"city", "people"}
    assert choice.logprobs is not None
    text = b"".join(bytes(token.bytes or ()) for token in choice.logprobs.content or ())
    assert text.decode() == choice.message.content
