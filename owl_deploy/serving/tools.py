"""Tools: what a model has to write to call one, and calls read from what it wrote.

The way of Hermes, which Qwen and SmolLM follow: each call is a JSON object of `name` and `arguments` between
`<tool_call>` and `</tool_call>`. The constraint writes the frame of a call, the model its name and arguments.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from owl_deploy.serving.constraints import json_grammar
from owl_deploy.serving.requests import Function

BEGIN, END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Call:
    """A call of a tool; `arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str


def knows_tools(template: str | None) -> bool:
    """Whether a chat template tells a model of tools, and how to call them in the way read here."""
    return template is not None and "tools" in template and BEGIN in template


def call_grammar(
    functions: Sequence[Function], *, may_write_text: bool, several: bool, is_one_token: Callable[[str], bool]
) -> str:
    """A grammar of calls of these functions, in llguidance's dialect of Lark.

    Args:
        may_write_text: text may stand before calls, or instead of them.
        several: more than one call may come.
        is_one_token: whether a text is a special token, which grammars name without quotes.
    """
    begin, end = (text if is_one_token(text) else json.dumps(text) for text in (BEGIN, END))
    names = [f"call_{place}" for place in range(len(functions))]
    rules = [f'body: "\\n" ({" | ".join(names)}) "\\n" {end}']
    for name, function in zip(names, functions, strict=True):
        opening = json.dumps(f'{{"name": {json.dumps(function.name)}, "arguments": ')
        rules.append(f'{name}: {opening} %json {json_grammar(function.parameters)} "}}"')
    if may_write_text:
        head = f"head: TEXT {begin}" if is_one_token(BEGIN) else f"head[lazy]: TEXT {begin}"
        return "\n".join([f"start: (head body){'*' if several else '?'} tail", head, "tail: TEXT", _TEXT, *rules])
    more = f' ("\\n" {begin} body)*' if several else ""
    return "\n".join([f"start: {begin} body{more}", *rules])


_TEXT = r"TEXT: /(.|\n)*/"


class CallReader:
    """Divides text that comes in pieces into what is to be shown, and calls.

    Attributes:
        found: how many calls there were.
    """

    def __init__(self) -> None:
        self._held = ""
        self._gap: str | None = None  # white space since a call; None where text has come since
        self.found = 0

    def push(self, piece: str) -> tuple[str, list[Call]]:
        """Append text; what can be shown now, and the calls that are complete."""
        self._held += piece
        shown = ""
        calls: list[Call] = []
        while True:
            before, begin, after = self._held.partition(BEGIN)
            if not begin:
                kept = _begun(before)
                self._held = before[len(before) - kept :]
                return shown + self._visible(before[: len(before) - kept]), calls
            shown += self._visible(before)
            body, end, rest = after.partition(END)
            call = _call(body) if end else None
            if not end:
                self._held = begin + after
                return shown, calls
            if call is None:
                shown += self._visible(begin + body + end)
            else:
                self.found += 1
                self._gap = ""
                calls.append(call)
            self._held = rest

    def rest(self) -> str:
        """What was held back, at the end: a call that is not complete is text."""
        held, self._held = self._held, ""
        return self._visible(held)

    def _visible(self, text: str) -> str:
        """White space after a call is part of the answer only where text follows it."""
        if self._gap is None:
            return text
        self._gap += text
        if not self._gap.strip():
            return ""
        shown, self._gap = self._gap, None
        return shown


def _begun(text: str) -> int:
    """How many characters at the end may be the beginning of a call."""
    return next((length for length in range(len(BEGIN) - 1, 0, -1) if text.endswith(BEGIN[:length])), 0)


def _call(body: str) -> Call | None:
    """The call that is written between the tags; None if it is not one."""
    try:
        written = json.loads(body)
        name, arguments = written["name"], written["arguments"]
    except (ValueError, KeyError, TypeError):
        return None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return Call(f"call_{secrets.token_hex(12)}", name, json.dumps(arguments, ensure_ascii=False))
