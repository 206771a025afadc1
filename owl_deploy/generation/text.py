"""From a prompt to ids, and from ids, one by one, back to text, with the tokenizer of transformers.

onnxruntime-genai brings a tokenizer of its own, which is not used: 0.14.0 takes that of SmolLM2 for a SentencePiece one
and gives -1 for every space.
"""

from __future__ import annotations

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from owl_deploy.errors import UserError

_PART_OF_CHARACTER = "\N{REPLACEMENT CHARACTER}"  # what bytes that are not yet a character are decoded to


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, *, system: str | None, chat: bool) -> list[int]:
    """The ids a model is given: of a conversation that the user opened with `prompt`, or of `prompt` as it stands.

    Args:
        system: what the conversation says before the user does; None for what the chat template says by itself.
        chat: use the chat template; without one, the prompt is taken as it stands all the same.

    Raises:
        UserError: the prompt is empty or not text, there is no chat for `system` to open, or the template refuses it.
    """
    if not prompt.strip():
        raise UserError("the prompt is empty; give some text, or - to read it from stdin")
    try:
        (prompt + (system or "")).encode()
    except UnicodeEncodeError as error:  # bytes of the command line or of stdin that Python could not read
        raise UserError("the prompt is not UTF-8 text; give it in UTF-8") from error
    if chat and tokenizer.chat_template is not None:
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": prompt})
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise UserError(
                f"the model's chat template refuses this ({error}); try without --system, or --no-chat"
            ) from error
        # verbose: the warning of a sequence too long; who asks for the ids checks them against the graph.
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    elif system is not None:
        reason = "the model's tokenizer has none" if chat else "--no-chat is without"
        raise UserError(f"--system needs a chat template, and {reason}; leave it out")
    else:
        ids = tokenizer(prompt, verbose=False)["input_ids"]
    if not ids:
        raise UserError("the model's tokenizer makes no tokens of this prompt; give another")
    return ids


class TextStream:
    """The text of tokens that come one by one: all that `push` returns, and `rest`, are the text of them together.

    A character may take several tokens, and a token's text depends on whether another stands before it. So a piece is
    what a token adds to the text of the tokens of the piece before, and comes when its last character is whole.

    Of bytes that are no UTF-8, which sampling may draw, the text is approximate: a tokenizer with byte fallback takes
    back what it said of them before. `tokenizers.decoders.DecodeStream` (0.22) works the same way, but raises there,
    has no `rest`, and needs a fast tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown_ids = 0  # the first of `_ids`, those of the last piece
        self._shown = ""

    def push(self, token: int) -> str:
        """Append a token; the piece of text that is now complete, often empty."""
        self._ids.append(token)
        text = self._decode()
        if text.endswith(_PART_OF_CHARACTER) or len(text) <= len(self._shown):
            return ""
        piece = text[len(self._shown) :]
        del self._ids[: self._shown_ids]
        self._shown_ids, self._shown = len(self._ids), self._decode()
        return piece

    def rest(self) -> str:
        """What was held back as part of a character, and stays one."""
        return self._decode()[len(self._shown) :]

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text
