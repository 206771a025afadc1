"""A tokenizer as a GGUF file describes it: llama.cpp then takes and gives text.

llama.cpp knows pre-tokenizers by name and not by their rules, so only those of this list are written. A model with
another tokenizer takes and gives token ids, which is all that a benchmark needs.
"""

from __future__ import annotations

import json
import re
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# What text is split by before it becomes bytes, and llama.cpp's name for that.
_PRE_TOKENIZERS: dict[tuple[str, ...], str] = {
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
    (_CONTRACTIONS + r"\p{N}{1,3}" + _REST,): "llama-bpe",
    (_CONTRACTIONS + r"\p{N}" + _REST,): "qwen2",
}


def add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int) -> str:
    """Describe `tokenizer` in the file of a model with `vocabulary` words, and say in words what was done."""
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return "token ids only: no tokenizer"
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else None
    if backend is not None and (splits := _pre_tokenizer(backend)) is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(splits)
        writer.add_token_merges([" ".join(merge) for merge in _merges(backend)])
    elif backend is not None and _is_sentencepiece(backend):
        splits = "sentencepiece"
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([-float(index) for index in range(vocabulary)])  # the earlier merged, the better
    else:
        writer.add_tokenizer_model("none")
        return "token ids only: llama.cpp lacks its tokenizer"
    tokens, types = _tokens(backend, vocabulary)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for token, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if token is not None:
            add(token)
    writer.add_add_bos_token(tokenizer.bos_token_id in tokenizer("")["input_ids"])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
    return f"tokenizer {splits}"


def _pre_tokenizer(backend: dict[str, Any]) -> str | None:
    """llama.cpp's name for how a tokenizer.json splits text; None if it has none."""
    if backend["model"]["type"] != "BPE" or not _keeps_text(backend["normalizer"]):
        return None
    pre = backend["pre_tokenizer"] or {}
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    *splits, last = steps
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    rules = []
    for step in splits:
        if step["type"] == "Digits" and step["individual_digits"]:
            rules.append("digits")
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            rules.append(step["pattern"].get("Regex", ""))
        else:
            return None
    return _PRE_TOKENIZERS.get((*rules, *(["words"] if last["use_regex"] else [])))


def _is_sentencepiece(backend: dict[str, Any]) -> bool:
    """Whether it is LLaMA's: BPE on text whose spaces are `▁`, in which the token of the smaller id is merged first."""
    vocabulary = backend["model"].get("vocab")
    if backend["model"]["type"] != "BPE" or "<0x00>" not in vocabulary:
        return False
    spaces = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
    normalizer, pre = backend["normalizer"] or {}, backend["pre_tokenizer"] or {}
    replaced = normalizer.get("normalizers") == spaces and not pre
    split = pre.get("type") == "Metaspace" and pre["prepend_scheme"] == "first" and not pre["split"] and not normalizer
    merged = [vocabulary["".join(merge)] for merge in _merges(backend)]
    return (replaced or split) and merged == sorted(merged)


def _merges(backend: dict[str, Any]) -> list[list[str]]:
    """The pairs of tokens that become one, the first ones first; older files write a pair as one string."""
    merges = backend["model"]["merges"]
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]


def _keeps_text(normalizer: dict[str, Any] | None) -> bool:
    """Whether it changes nothing. NFC passes for nothing: llama.cpp takes text as already composed."""
    if normalizer is None or normalizer["type"] == "NFC":
        return True
    return normalizer["type"] == "Sequence" and all(_keeps_text(step) for step in normalizer["normalizers"])


def _tokens(backend: dict[str, Any], vocabulary: int) -> tuple[list[str], list[TokenType]]:
    """Each token's text and kind, by its id; the ids that no token has are unused."""
    tokens = [f"[PAD{index}]" for index in range(vocabulary)]
    types = [TokenType.UNUSED] * vocabulary
    for text, index in backend["model"]["vocab"].items():
        is_byte = backend["model"]["byte_fallback"] and re.fullmatch("<0x[0-9A-F]{2}>", text)
        tokens[index], types[index] = text, TokenType.BYTE if is_byte else TokenType.NORMAL
    for added in backend["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    return tokens, types
