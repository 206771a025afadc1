"""The bodies of requests. What a body asks for and this server does not do is refused by name, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

MOST_CHOICES = 16
MOST_LOGPROBS = 20

_Stop: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=256)]
_Bias: TypeAlias = Annotated[float, Field(ge=-100, le=100)]
_Token: TypeAlias = Annotated[int, Field(ge=0)]
_Ids: TypeAlias = Annotated[list[_Token], Field(min_length=1)]


class Body(BaseModel):
    """What all bodies have in common: null is as good as nothing, and there is nothing but the fields below.

    A field that is known but does nothing here may have the value that asks for nothing: see `_ASKS_NOTHING`.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    _ASKS_NOTHING: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            name: value
            for name, value in data.items()
            if value is not None and not (name in cls._ASKS_NOTHING and value in cls._ASKS_NOTHING[name])
        }


class StreamOptions(Body):
    """How a stream is sent."""

    include_usage: bool = False


class SamplingBody(Body):
    """How tokens are chosen, and how many."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, description="0 and -1 take all tokens.")] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    logit_bias: Annotated[dict[str, _Bias], Field(max_length=1024)] = {}
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] = []
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(description="Accepted; it changes nothing.")] | None = None

    @property
    def stops(self) -> list[str]:
        """The strings that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop


class CompletionRequest(SamplingBody):
    """`POST /v1/completions`."""

    _ASKS_NOTHING: ClassVar[dict[str, tuple[Any, ...]]] = {"echo": (False,), "suffix": ("",), "best_of": (1,)}

    prompt: str | _Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[_Ids], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One for each sequence to continue."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class FunctionCall(Body):
    """What an assistant has called."""

    name: str
    arguments: str


class ToolCall(Body):
    """One call in a message of the assistant."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class Message(Body):
    """One message of a conversation."""

    _ASKS_NOTHING: ClassVar[dict[str, tuple[Any, ...]]] = {"refusal": ("",), "annotations": ([],)}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] = ""
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """The content, in one piece."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Function(Body):
    """A tool that the model may call."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] = {"type": "object", "properties": {}}
    strict: bool | None = None


class Tool(Body):
    """A tool, which is always a function."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """The name of a function."""

    name: str


class NamedTool(Body):
    """The tool that has to be called."""

    type: Literal["function"]
    function: NamedFunction


class TextFormat(Body):
    """Any text."""

    type: Literal["text"]


class JsonFormat(Body):
    """A JSON object."""

    type: Literal["json_object"]


class Schema(Body):
    """A JSON schema; answers keep to it, `strict` or not."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class SchemaFormat(Body):
    """JSON that a schema allows."""

    type: Literal["json_schema"]
    json_schema: Schema


class ChatRequest(SamplingBody):
    """`POST /v1/chat/completions`."""

    _ASKS_NOTHING: ClassVar[dict[str, tuple[Any, ...]]] = {
        "store": (False,),
        "service_tier": ("auto", "default"),
        "modalities": (["text"],),
    }

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")] | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True


class TokenizeRequest(Body):
    """`POST /tokenize`: of a text as it stands, or of a conversation as the model is given it."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: Annotated[bool, Field(description="Those that the tokenizer puts around a prompt.")] = True
