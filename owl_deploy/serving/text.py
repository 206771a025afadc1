"""The text of an answer as it comes: whole characters, and nothing of a stop string."""

from __future__ import annotations

import re
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


class TokenNames:
    """The bytes that each token stands for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._is_byte_level = is_byte_level(tokenizer)

    def bytes_of(self, token: int) -> bytes:
        """Of a token; those of its name, if it is a special one."""
        name: str | None = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:  # the model has rows that the tokenizer has no tokens for
            return b""
        if token not in self._special:
            if self._is_byte_level and all(letter in _BYTES for letter in name):
                return bytes(_BYTES[letter] for letter in name)
            if _ONE_BYTE.fullmatch(name):
                return bytes([int(name[3:5], 16)])
            name = name.replace("▁", " ")
        return name.encode(errors="replace")


def is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the names of tokens have a letter for each byte."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and "ByteLevel" in repr(backend.pre_tokenizer)


def _byte_letters() -> dict[str, int]:
    """The letter that byte-level tokenizers write for each byte: itself if it can be seen, else the next from 256."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_BYTES = _byte_letters()
_ONE_BYTE = re.compile("<0x[0-9A-F]{2}>")
