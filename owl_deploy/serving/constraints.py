"""Answers of a given form: JSON, JSON of a schema, calls of tools. llguidance says which tokens may come next."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from owl_deploy.errors import first_line
from owl_deploy.serving.text import is_byte_level

# White space that a model may put into JSON, at each place where JSON allows it: one that likes to would never end.
_JSON_OPTIONS: Any = {"whitespace_flexible": True, "whitespace_pattern": r"[ \t\n]{1,16}"}
_LIMITS = LLParserLimits(verbose_errors=False)
_LONGEST_REASON = 300  # characters of what llguidance says of a grammar


class GrammarError(ValueError):
    """A schema or grammar cannot be used; the message says why."""


class Constraint:
    """Which tokens may come next in one answer. Not thread-safe."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow."""
        return self._matcher.is_stopped()

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, [vocab].

        Raises:
            GrammarError: the grammar asks for more work than it may.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.zeros(self._vocabulary, np.bool_)
        known = np.unpackbits(bits, bitorder="little")[: self._vocabulary]
        allowed[: known.size] = known
        return allowed

    def accept(self, token: int) -> None:
        """`token` has come.

        Raises:
            GrammarError: see `allowed`.
        """
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(_reason(self._matcher.get_error()))


class Grammars:
    """Makes constraints for one model.

    Args:
        vocabulary: of the model, which may be larger than the tokenizer's.
        stop_tokens: what ends an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, stop_tokens: Sequence[int]) -> None:
        self._hf = tokenizer
        self._vocabulary = vocabulary
        self._stop_tokens = list(stop_tokens)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        if not isinstance(self._hf, PreTrainedTokenizerFast):
            raise GrammarError("the model's tokenizer is not one of the tokenizers library")
        try:
            described = _described(self._hf)
            return LLTokenizer(described, n_vocab=self._vocabulary, eos_token=self._stop_tokens or None)
        except Exception as error:  # whatever its Rust side says of a tokenizer that it does not know
            raise GrammarError(f"llguidance cannot use the model's tokenizer ({_reason(first_line(error))})") from error

    def json(self, schema: Mapping[str, Any]) -> Constraint:
        """JSON that a schema allows.

        Raises:
            GrammarError: it uses what is not supported, or cannot be met.
        """
        return self.lark(f"start: %json {json_grammar(schema)}")

    def lark(self, grammar: str) -> Constraint:
        """Text of a grammar in llguidance's dialect of Lark.

        Raises:
            GrammarError: the grammar is not one, or too large.
        """
        matcher = LLMatcher(self._tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise GrammarError(_reason(matcher.get_error()))
        return Constraint(matcher, self._vocabulary)

    def is_one_token(self, text: str) -> bool:
        """Whether this text is a special token."""
        tokens = self._tokenizer.tokenize_str(text, parse_special=True)
        return len(tokens) == 1 and self._tokenizer.is_special_token(tokens[0])


def _described(tokenizer: PreTrainedTokenizerFast) -> str:
    """tokenizer.json, as llguidance understands it.

    llguidance (1.9) takes one by its decoder. Where transformers has made the tokenizer from a GGUF file, the decoder
    begins with that of SentencePiece, which is not what the tokens are made with.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described |= {"padding": None, "truncation": None}
    if is_byte_level(tokenizer):
        described["decoder"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return json.dumps(described)


def json_grammar(schema: Mapping[str, Any]) -> str:
    """A schema for `%json` in a Lark grammar."""
    return json.dumps({**schema, "x-guidance": _JSON_OPTIONS})


def _reason(text: str) -> str:
    line = " ".join(text.partition("1 | ")[0].split())  # what follows is the grammar
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]}…"
