"""What transformers gets wrong about a GGUF's tokenizer, put right from the file's own metadata.

transformers 4.57 rebuilds a tokenizer that prepends BOS whatever `tokenizer.ggml.add_bos_token` says, takes BOS
for EOS where no token is called `</s>`, does not split digits for the `smollm` pre-tokenizer, and saves the whole
GGUF as `tokenizer.model`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from owl_deploy.errors import UserError

_SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def read_metadata(path: Path) -> dict[str, Any]:
    """The scalars and strings in a GGUF file's header (the vocabulary's arrays are slow to decode, and left out).

    Raises:
        UserError: the file is not GGUF, or is cut short.
    """
    from gguf import GGUFReader, GGUFValueType

    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise UserError(f"{path}: not a readable GGUF file ({error}); fetch it again") from error
    fields = reader.fields.items()
    return {key: field.contents() for key, field in fields if field.types[:1] != [GGUFValueType.ARRAY]}


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer a GGUF file describes, or None when it describes none."""
    metadata = read_metadata(path)
    if metadata.get("tokenizer.ggml.model", "none") == "none":
        return None
    rebuilt = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    backend = Tokenizer.from_str(rebuilt.backend_tokenizer.to_str())
    special = {
        name: backend.id_to_token(metadata[key])
        for name, field in _SPECIAL_TOKENS.items()
        if (key := f"tokenizer.ggml.{field}_token_id") in metadata
    }
    _set_bos(backend, special.get("bos_token"), metadata)
    if metadata.get("tokenizer.ggml.pre") == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    architecture = metadata["general.architecture"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=metadata.get(f"{architecture}.context_length"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _set_bos(backend: Tokenizer, bos: str | None, metadata: dict[str, Any]) -> None:
    """Prepend BOS only where the metadata says so; a GGUF that is silent means yes for SentencePiece models."""
    default = metadata.get("tokenizer.ggml.model") == "llama"
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", default):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, metadata["tokenizer.ggml.bos_token_id"])],
        )
    else:
        backend.post_processor = processors.Sequence([])
