"""From the body of a request to the answers that the engine is to make."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from owl_deploy.errors import first_line
from owl_deploy.serving.constraints import Constraint, GrammarError, Grammars
from owl_deploy.serving.engine import Answer, Event
from owl_deploy.serving.errors import ApiError, invalid, unsupported
from owl_deploy.serving.requests import (
    ChatRequest,
    CompletionRequest,
    JsonFormat,
    Message,
    NamedTool,
    SamplingBody,
    SchemaFormat,
    TokenizeRequest,
)
from owl_deploy.serving.sampling import Sampler, Sampling
from owl_deploy.serving.text import AnswerText
from owl_deploy.serving.tools import call_grammar, knows_tools

_SEEDS = 2**63


@dataclass(frozen=True)
class ServedModel:
    """What the server knows of its model.

    Attributes:
        name: what requests call it.
        created: when its bundle was made, in seconds since 1970.
        context: tokens of a slot.
        vocabulary: tokens that the model knows.
        stop_tokens: ids that end an answer.
        most_answers: that can run and wait at once.
    """

    name: str
    created: int
    tokenizer: PreTrainedTokenizerBase
    context: int
    vocabulary: int
    stop_tokens: frozenset[int]
    most_answers: int
    grammars: Grammars


Tell = Callable[[int, Event], None]
"""Is told of the events of each answer, by its index."""


@dataclass(frozen=True)
class Prepared:
    """Answers to make, by index.

    Attributes:
        prompts: the ids of each prompt; `n` answers follow one another for each.
        reads_calls: whether calls of tools are to be read from the text.
    """

    answers: list[Answer]
    prompts: list[list[int]]
    reads_calls: bool = False


def prepare_completion(model: ServedModel, body: CompletionRequest, deadline: float, tell: Tell) -> Prepared:
    """
    Raises:
        ApiError: the request asks for what it cannot have.
    """
    prompts = [_prompt_ids(model, prompt) for prompt in body.prompts]
    return _prepare(model, body, prompts, deadline, tell, max_tokens=body.max_tokens, top_logprobs=body.logprobs)


def prepare_chat(model: ServedModel, body: ChatRequest, deadline: float, tell: Tell) -> Prepared:
    """
    Raises:
        ApiError: the request asks for what it cannot have.
    """
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise invalid("max_tokens and max_completion_tokens are the same limit; give one", "max_tokens")
    constrain, uses_tools = _constraints(model, body)
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or []] if uses_tools else None
    return _prepare(
        model,
        body,
        [chat_ids(model, body.messages, tools)],
        deadline,
        tell,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        constrain=constrain,
        reads_calls=uses_tools,
    )


def token_ids(model: ServedModel, body: TokenizeRequest) -> list[int]:
    """
    Raises:
        ApiError: there is no prompt and no conversation, or both.
    """
    if body.messages is not None and body.prompt is None:
        return chat_ids(model, body.messages, None)
    if body.prompt is None or body.messages is not None:
        raise invalid("give either prompt or messages", "prompt")
    return _encode(model, body.prompt, special=body.add_special_tokens)


def chat_ids(model: ServedModel, messages: Sequence[Message], tools: list[dict[str, Any]] | None) -> list[int]:
    """The ids of a conversation, in the form that the model was trained with.

    Raises:
        ApiError: the model has no chat template, or its template refuses the conversation.
    """
    if model.tokenizer.chat_template is None:
        raise invalid("the model's tokenizer has no chat template; use /v1/completions", "messages")
    try:
        text = model.tokenizer.apply_chat_template(
            [_templated(message) for message in messages], tools=tools, tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:  # what a template does with a strange message
        raise invalid(f"the model's chat template refuses this ({first_line(error)})", "messages") from error
    return _encode(model, text, special=False)


def _templated(message: Message) -> dict[str, Any]:
    """A message as templates know it."""
    role = "system" if message.role == "developer" else message.role
    found: dict[str, Any] = {"role": role, "content": message.text}
    found |= {name: value for name in ("name", "tool_call_id") if (value := getattr(message, name)) is not None}
    if message.tool_calls is not None:
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return found


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise invalid(f"the arguments of a tool call are not JSON ({error})", "messages") from error


def _constraints(model: ServedModel, body: ChatRequest) -> tuple[Callable[[], Constraint] | None, bool]:
    """What makes the constraint of an answer, if there is one; and whether the model is told of tools."""
    form = body.response_format
    if body.tools is None and body.tool_choice not in (None, "none"):
        raise invalid("tool_choice needs tools", "tool_choice")
    if body.tools is not None and body.tool_choice != "none":
        if isinstance(form, JsonFormat | SchemaFormat):
            raise unsupported("response_format", "together with tools")
        if not knows_tools(model.tokenizer.chat_template):
            raise unsupported("tools", "the model's chat template has no <tool_call>")
        return lambda: model.grammars.lark(_tool_grammar(model, body)), True
    if isinstance(form, JsonFormat):
        return lambda: model.grammars.json({"type": "object"}), False
    if isinstance(form, SchemaFormat):
        schema = form.json_schema.schema_
        return lambda: model.grammars.json(schema), False
    return None, False


def _tool_grammar(model: ServedModel, body: ChatRequest) -> str:
    functions = [tool.function for tool in body.tools or []]
    if isinstance(body.tool_choice, NamedTool):
        named = body.tool_choice.function.name
        functions = [function for function in functions if function.name == named]
        if not functions:
            raise invalid(f"tool_choice names {named}, which is not among tools", "tool_choice")
    return call_grammar(
        functions,
        may_write_text=body.tool_choice in (None, "auto"),
        several=body.parallel_tool_calls and not isinstance(body.tool_choice, NamedTool),
        is_one_token=model.grammars.is_one_token,
    )


def _prepare(
    model: ServedModel,
    body: SamplingBody,
    prompts: list[list[int]],
    deadline: float,
    tell: Tell,
    *,
    max_tokens: int | None,
    top_logprobs: int | None,
    constrain: Callable[[], Constraint] | None = None,
    reads_calls: bool = False,
) -> Prepared:
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options needs stream: true", "stream_options")
    count = len(prompts) * body.n
    if count > model.most_answers:
        raise invalid(f"{count} answers in one request; this server has room for {model.most_answers}", "n")
    bias = _bias(model, body)
    seed = secrets.randbelow(_SEEDS) if body.seed is None else body.seed % _SEEDS
    answers = []
    for index in range(count):
        prompt = prompts[index // body.n]
        sampling = Sampling(
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=max(body.top_k, 0),
            min_p=body.min_p,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            repetition_penalty=body.repetition_penalty,
            logit_bias=bias,
            seed=seed + index % body.n,
        )
        answers.append(
            Answer(
                tokens=list(prompt),
                deadline=deadline,
                sampler=Sampler(sampling, prompt),
                text=AnswerText(model.tokenizer, body.stops),
                stop_tokens=model.stop_tokens,
                most=_room(model, len(prompt), max_tokens),
                tell=_told(tell, index),
                constraint=_constraint(constrain),
                top_logprobs=top_logprobs,
                submitted_at=time.monotonic(),
            )
        )
    return Prepared(answers, prompts, reads_calls)


def _told(tell: Tell, index: int) -> Callable[[Event], None]:
    return lambda event: tell(index, event)


def _constraint(make: Callable[[], Constraint] | None) -> Constraint | None:
    if make is None:
        return None
    try:
        return make()
    except GrammarError as error:
        raise invalid(f"the answer cannot be constrained like this ({error})", "response_format") from error


def _room(model: ServedModel, prompt_tokens: int, max_tokens: int | None) -> int:
    """How many new tokens there may be."""
    room = model.context - prompt_tokens
    if room < 1:
        raise invalid(
            f"the prompt has {prompt_tokens} tokens and leaves no room in the context of {model.context}; shorten it",
            "messages",
            "context_length_exceeded",
        )
    if max_tokens is not None and max_tokens > room:
        raise invalid(
            f"the prompt has {prompt_tokens} tokens, which leaves {room} of the context of {model.context}: fewer than "
            f"the {max_tokens} of max_tokens",
            "max_tokens",
            "context_length_exceeded",
        )
    return room if max_tokens is None else max_tokens


def _bias(model: ServedModel, body: SamplingBody) -> dict[int, float]:
    bias = {}
    for name, value in body.logit_bias.items():
        if not (name.isascii() and name.isdecimal() and int(name) < model.vocabulary):
            raise invalid(
                f"logit_bias: {name!r} is no token of the model, which knows {model.vocabulary}", "logit_bias"
            )
        bias[int(name)] = value
    return bias


def _prompt_ids(model: ServedModel, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        return _encode(model, prompt, special=True)
    if max(prompt) >= model.vocabulary:
        raise invalid(f"token {max(prompt)} is none of the model, which knows {model.vocabulary}", "prompt")
    return prompt


def _encode(model: ServedModel, text: str, *, special: bool) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, which JSON may hold
        raise invalid("the text is not valid Unicode", "prompt") from error
    # verbose: no warning of a sequence that is too long; that is said in the response.
    ids: list[int] = model.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    if not ids:
        raise invalid("the text has no tokens; give another", "prompt")
    if max(ids) >= model.vocabulary:
        raise ApiError(
            500, f"the tokenizer knows token {max(ids)}, the model only {model.vocabulary}", type="server_error"
        )
    return ids
