"""The text of an answer as it comes: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from owl_deploy.generation.text import TextStream


class AnswerText:
    """Turns tokens into text that can be shown: what might be the beginning of a stop string is held back.

    Attributes:
        is_stopped: a stop string has come; the text ends before it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> None:
        self._stream = TextStream(tokenizer)
        self._stops = stops
        self._held = ""
        self.is_stopped = False

    def push(self, token: int) -> str:
        """Append a token; the text that can be shown now, often empty."""
        return self._show(self._stream.push(token))

    def rest(self) -> str:
        """All that was held back, at the end."""
        shown = self._show(self._stream.rest())
        held, self._held = self._held, ""
        return shown if self.is_stopped else shown + held

    def _show(self, piece: str) -> str:
        text = self._held + piece
        found = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.is_stopped = True
            self._held = ""
            return text[: min(found)]
        safe = len(text) - max((_begun(text, stop) for stop in self._stops), default=0)
        self._held = text[safe:]
        return text[:safe]


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    return next((length for length in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:length])), 0)
