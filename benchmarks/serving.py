"""Load on a server with the API of OpenAI: closed loops of clients, Poisson arrivals, a long prompt, a second turn.

    python benchmarks/serving.py OUT.csv NAME=URL... [--clients 1,4,16] [--rates 1,4] [--requests 48] [--words 90]
        [--new-tokens 64] [--ttft-ms 1000] [--between-ms 100] [--never 0,2] [--intrusion 1300 --running 12] [--rounds 1]

One row for each load, servers in turn within a round. Times are from the client's side of a stream:
to the first token, and from a token to the next. Goodput counts the requests whose first token came within
`--ttft-ms` and whose tokens came `--between-ms` apart on average. `--never` gives tokens a bias of -100: those that end
an answer, so that all answers are equally long. Prompts are different words each, so that nothing is reused; the words
come from the same seed for every server.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from owl_deploy.machine.description import describe_machine
from owl_deploy.machine.threads import available_cores
from owl_deploy.text.documents import demo_documents

LONGEST_S = 600


@dataclass
class Answer:
    """One request: seconds on the client's clock."""

    sent: float
    tokens: list[float] = field(default_factory=list)
    generated: int = 0
    failed: str = ""

    @property
    def first(self) -> float:
        return self.tokens[0] - self.sent

    @property
    def between(self) -> list[float]:
        return [after - before for before, after in zip(self.tokens, self.tokens[1:], strict=False)]


class Load:
    """Sends requests to one server."""

    def __init__(self, url: str, model: str, arguments: argparse.Namespace) -> None:
        self._url = url
        self._model = model
        self._arguments = arguments
        self._words = " ".join(demo_documents("calibration")).split()
        self._random = random.Random(arguments.seed)
        self._client = httpx.AsyncClient(timeout=LONGEST_S, limits=httpx.Limits(max_connections=None))

    def prompt(self, words: int) -> str:
        """Random words of news."""
        return " ".join(self._random.choices(self._words, k=words))

    async def complete(self, prompt: str, new_tokens: int) -> Answer:
        bias = {token: -100 for token in self._arguments.never.split(",") if token}
        return await self._stream(
            "completions", {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "logit_bias": bias}
        )

    async def chat(self, messages: list[dict[str, str]], new_tokens: int) -> Answer:
        return await self._stream(
            "chat/completions", {"messages": messages, "max_tokens": new_tokens, "temperature": 0}
        )

    async def _stream(self, path: str, body: dict[str, Any]) -> Answer:
        answer = Answer(time.perf_counter())
        body |= {"model": self._model, "stream": True, "stream_options": {"include_usage": True}}
        try:
            async with self._client.stream("POST", f"{self._url}/v1/{path}", json=body) as response:
                if response.status_code != 200:
                    answer.failed = str(response.status_code)
                    return answer
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line[6:])
                    if "error" in event:
                        answer.failed = event["error"]["message"]
                    if _has_text(event):
                        answer.tokens.append(time.perf_counter())
                    if event.get("usage"):
                        answer.generated = event["usage"]["completion_tokens"]
        except httpx.HTTPError as error:
            answer.failed = repr(error)
        if not answer.failed and not answer.tokens:
            answer.failed = "no token"
        answer.generated = answer.generated or len(answer.tokens)  # a server may tell no usage in a stream
        return answer

    async def closed(self, clients: int) -> list[Answer]:
        """So many clients, each of which sends its next request when its last one is answered."""
        left = iter(range(self._arguments.requests))
        answers: list[Answer] = []

        async def client() -> None:
            for _ in left:
                answers.append(await self.complete(self.prompt(self._arguments.words), self._arguments.new_tokens))

        await asyncio.gather(*(client() for _ in range(clients)))
        return answers

    async def poisson(self, rate: float) -> list[Answer]:
        """Requests at random times, so many a second, whether others are answered or not."""
        tasks = []
        for _ in range(self._arguments.requests):
            prompt = self.prompt(self._arguments.words)
            tasks.append(asyncio.create_task(self.complete(prompt, self._arguments.new_tokens)))
            await asyncio.sleep(self._random.expovariate(rate))
        return list(await asyncio.gather(*tasks))

    async def intrusion(self, clients: int, words: int) -> dict[str, float]:
        """Milliseconds between the tokens of running answers, before a long prompt arrives and while it is computed."""
        new_tokens = 8 * self._arguments.new_tokens
        running = [asyncio.create_task(self.complete(self.prompt(10), new_tokens)) for _ in range(clients)]
        await asyncio.sleep(3)
        long = await self.complete(self.prompt(words), 1)
        answers = await asyncio.gather(*running)
        gaps: dict[bool, list[float]] = {False: [], True: []}
        for answer in answers:
            for before, after in zip(answer.tokens, answer.tokens[1:], strict=False):
                if before < long.sent + long.first:
                    gaps[after > long.sent].append((after - before) * 1000)
        return {
            "before_ms_p50": _percentile(gaps[False], 50),
            "during_ms_p50": _percentile(gaps[True], 50),
            "during_ms_p99": _percentile(gaps[True], 99),
            "long_prompt_ttft_ms": long.first * 1000,
        }

    async def second_turn(self, words: int) -> dict[str, float]:
        """Milliseconds to the first token of a conversation's first turn, and of its second."""
        messages = [{"role": "user", "content": self.prompt(words)}]
        first = await self.chat(messages, 32)
        messages += [{"role": "assistant", "content": "So it is."}, {"role": "user", "content": self.prompt(10)}]
        second = await self.chat(messages, 2)
        return {"first_ttft_ms": first.first * 1000, "second_ttft_ms": second.first * 1000}


def _has_text(event: dict[str, Any]) -> bool:
    return any(choice.get("text") or choice.get("delta", {}).get("content") for choice in event.get("choices", ()))


def _percentile(values: list[float], percent: float) -> float:
    return float(np.percentile(values, percent)) if values else float("nan")


def summary(answers: list[Answer], arguments: argparse.Namespace) -> dict[str, float]:
    """What a load has measured; times in milliseconds."""
    good = [answer for answer in answers if not answer.failed]
    end = max((answer.tokens[-1] for answer in good), default=float("nan"))
    seconds = end - min(answer.sent for answer in answers)
    between = [gap * 1000 for answer in good for gap in answer.between]
    fast = [
        answer
        for answer in good
        if answer.first * 1000 <= arguments.ttft_ms
        and (not answer.between or float(np.mean(answer.between)) * 1000 <= arguments.between_ms)
    ]
    firsts = [answer.first * 1000 for answer in good]
    return {
        "requests": len(answers),
        "failed": len(answers) - len(good),
        "tokens_per_s": sum(answer.generated for answer in good) / seconds,
        "requests_per_s": len(good) / seconds,
        "goodput_per_s": len(fast) / seconds,
        "ttft_ms_p50": _percentile(firsts, 50),
        "ttft_ms_p99": _percentile(firsts, 99),
        "between_ms_p50": _percentile(between, 50),
        "between_ms_p99": _percentile(between, 99),
    }


async def measure(
    name: str, url: str, arguments: argparse.Namespace, record: Callable[[dict[str, Any]], object]
) -> None:
    """All loads on one server; `record` is called with the row of each."""
    async with httpx.AsyncClient(timeout=60) as client:
        model = (await client.get(f"{url}/v1/models")).json()["data"][0]["id"]
    load = Load(url, model, arguments)
    await load.complete(load.prompt(5), 4)
    for clients in map(int, filter(None, arguments.clients.split(","))):
        record({"server": name, "load": f"{clients} clients"} | summary(await load.closed(clients), arguments))
    for rate in map(float, filter(None, arguments.rates.split(","))):
        record({"server": name, "load": f"{rate:g} a second"} | summary(await load.poisson(rate), arguments))
    if arguments.intrusion:
        intruded = await load.intrusion(arguments.running, arguments.intrusion)
        record({"server": name, "load": f"a long prompt, {arguments.running} running"} | intruded)
        record({"server": name, "load": "a second turn"} | await load.second_turn(arguments.intrusion // 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("servers", nargs="+", metavar="NAME=URL")
    parser.add_argument("--clients", default="1,4,16")
    parser.add_argument("--rates", default="")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--words", type=int, default=90)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--ttft-ms", type=float, default=1000)
    parser.add_argument("--between-ms", type=float, default=100)
    parser.add_argument("--never", default="0,2")
    parser.add_argument("--intrusion", type=int, default=0, help="words of a long prompt")
    parser.add_argument("--running", type=int, default=12, help="answers that run when it arrives")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    rows: list[dict[str, Any]] = []

    def record(line: dict[str, Any]) -> None:
        rows.append(line)
        write(arguments.output, rows)

    for server in [*arguments.servers] * arguments.rounds:
        name, _, url = server.partition("=")
        asyncio.run(measure(name, url.rstrip("/"), arguments, record))
    machine = describe_machine(available_cores())
    columns = list(dict.fromkeys(name for line in rows for name in line))
    table = Table(*columns, title=machine.cpu)
    for line in rows:
        table.add_row(*(_shown(line.get(name, "")) for name in columns))
    Console(width=220).print(table)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for line in rows for name in line))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({name: _shown(value) for name, value in line.items()} for line in rows)


def _shown(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
