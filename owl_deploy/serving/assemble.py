"""From the engine's events to responses: whole ones, and the pieces of streams."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from owl_deploy.serving.engine import Event
from owl_deploy.serving.prepare import Prepared, ServedModel
from owl_deploy.serving.requests import FunctionCall, ToolCall
from owl_deploy.serving.responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprob,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    FinishReason,
    PromptDetails,
    TopLogprob,
    Usage,
)
from owl_deploy.serving.sampling import TokenLogprob
from owl_deploy.serving.text import TokenNames
from owl_deploy.serving.tools import Call, CallReader


@dataclass
class _Part:
    """What has come of one answer since it was last asked for."""

    text: str = ""
    calls: list[Call] = field(default_factory=list)
    tokens: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None


class Assembler:
    """Gathers the events of one request.

    Args:
        chat: answer as `/v1/chat/completions` does, else as `/v1/completions`.
    """

    def __init__(self, model: ServedModel, names: TokenNames, prepared: Prepared, *, chat: bool) -> None:
        self._names = names
        self._prepared = prepared
        self._chat = chat
        self._head: dict[str, Any] = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model.name,
        }
        count = len(prepared.answers)
        self._readers = [CallReader() if prepared.reads_calls else None for _ in range(count)]
        self._parts = [_Part() for _ in range(count)]
        self._characters = [0] * count  # given before, of each answer
        self._open = count

    @property
    def is_complete(self) -> bool:
        """Whether every answer has ended."""
        return self._open == 0

    def add(self, index: int, event: Event) -> None:
        """Take an event of an answer, whose finish is not an error."""
        part, reader = self._parts[index], self._readers[index]
        text, calls = (event.text, []) if reader is None else reader.push(event.text)
        if event.token is not None and self._prepared.answers[index].top_logprobs is not None:
            part.tokens.append(event.token)
        if event.finish is not None:
            self._open -= 1
            text += "" if reader is None else reader.rest()
            has_called = reader is not None and reader.found > 0
            part.finish = "tool_calls" if has_called and event.finish == "stop" else _reason(event)
        part.text += text
        part.calls += calls

    def usage(self) -> Usage:
        """Tokens of all prompts, each counted once, and of all answers."""
        answers = self._prepared.answers
        prompt = sum(map(len, self._prepared.prompts))
        completion = sum(answer.new_tokens for answer in answers)
        each = len(answers) // len(self._prepared.prompts)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptDetails(cached_tokens=sum(answer.reused for answer in answers[::each])),
        )

    def whole(self) -> BaseModel:
        """The response, once every answer has ended."""
        if self._chat:
            return ChatCompletion(
                **self._head,
                choices=[self._chat_choice(index, part) for index, part in enumerate(self._parts)],
                usage=self.usage(),
            )
        choices = [self._completion_choice(index, part) for index, part in enumerate(self._parts)]
        return Completion(**self._head, choices=choices, usage=self.usage())

    def opening(self) -> Iterator[BaseModel]:
        """What a stream begins with."""
        if self._chat:
            for index in range(len(self._parts)):
                yield self._chunk(index, {"role": "assistant", "content": ""}, None, None)

    def pieces(self, index: int) -> Iterator[BaseModel]:
        """What has come of an answer since this was last asked."""
        part, self._parts[index] = self._parts[index], _Part()
        if not (part.text or part.calls or part.finish):
            self._parts[index].tokens = part.tokens  # they go with the text
        elif self._chat:
            yield from self._chat_pieces(index, part)
        else:
            choice = self._completion_choice(index, part)
            yield Completion(**self._head, choices=[choice])

    def closing(self) -> BaseModel:
        """The piece of a stream with what all of it took."""
        if self._chat:
            return ChatChunk(**self._head, choices=[], usage=self.usage())
        return Completion(**self._head, choices=[], usage=self.usage())

    # -------------------- chat

    def _chat_choice(self, index: int, part: _Part) -> ChatChoice:
        assert part.finish is not None
        calls = [_tool_call(call) for call in part.calls] or None
        message = AssistantMessage(content=None if calls and not part.text else part.text, tool_calls=calls)
        logprobs = self._chat_logprobs(index, part.tokens)
        return ChatChoice(index=index, message=message, logprobs=logprobs, finish_reason=part.finish)

    def _chat_pieces(self, index: int, part: _Part) -> Iterator[BaseModel]:
        reader = self._readers[index]
        if part.text or part.tokens:
            yield self._chunk(index, {"content": part.text}, self._chat_logprobs(index, part.tokens), None)
        first = 0 if reader is None else reader.found - len(part.calls)
        for place, call in enumerate(part.calls, first):
            delta = {"tool_calls": [{"index": place, **_tool_call(call).model_dump()}]}
            yield self._chunk(index, delta, None, None)
        if part.finish is not None:
            yield self._chunk(index, {}, None, part.finish)

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: ChatLogprobs | None, finish: FinishReason | None
    ) -> ChatChunk:
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish)
        return ChatChunk(**self._head, choices=[choice])

    def _chat_logprobs(self, index: int, tokens: list[TokenLogprob]) -> ChatLogprobs | None:
        if self._prepared.answers[index].top_logprobs is None:
            return None
        return ChatLogprobs(
            content=[
                ChatLogprob(
                    **self._named(chosen.token, chosen.logprob).model_dump(),
                    top_logprobs=[self._named(token, logprob) for token, logprob in chosen.top],
                )
                for chosen in tokens
            ]
        )

    def _named(self, token: int, logprob: float) -> TopLogprob:
        name = self._names.bytes_of(token)
        return TopLogprob(token=name.decode(errors="replace"), logprob=logprob, bytes=list(name))

    # -------------------- completions

    def _completion_choice(self, index: int, part: _Part) -> CompletionChoice:
        offset = self._characters[index]
        self._characters[index] += len(part.text)
        logprobs = self._completion_logprobs(part.tokens, offset)
        if self._prepared.answers[index].top_logprobs is None:
            logprobs = None
        return CompletionChoice(index=index, text=part.text, logprobs=logprobs, finish_reason=part.finish)

    def _completion_logprobs(self, tokens: list[TokenLogprob], offset: int) -> CompletionLogprobs | None:
        names = [self._name(chosen.token) for chosen in tokens]
        offsets = [offset + sum(map(len, names[:place])) for place in range(len(names))]
        return CompletionLogprobs(
            tokens=names,
            token_logprobs=[chosen.logprob for chosen in tokens],
            top_logprobs=[{self._name(token): logprob for token, logprob in chosen.top} for chosen in tokens],
            text_offset=offsets,
        )

    def _name(self, token: int) -> str:
        return self._names.bytes_of(token).decode(errors="replace")


def _reason(event: Event) -> FinishReason:
    return "length" if event.finish == "length" else "stop"


def _tool_call(call: Call) -> ToolCall:
    return ToolCall(id=call.id, type="function", function=FunctionCall(name=call.name, arguments=call.arguments))
