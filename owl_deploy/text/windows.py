"""Token windows `[n, seqlen]` for calibration and evaluation, from text or from a file of token ids."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from owl_deploy.errors import UserError
from owl_deploy.records import TextRecord
from owl_deploy.text.documents import Split, load_documents

DEFAULT_SAMPLES = 128
DEFAULT_SEQLEN = 2048
_HELD_OUT = 4
"""One calibration window of this many is held out where choices are compared."""


@dataclass(frozen=True)
class TokenWindows:
    """Windows of token ids and where they came from.

    Attributes:
        ids: int64, [n, seqlen].
        source: the text as the user named it.
    """

    ids: NDArray[np.int64]
    source: str

    @property
    def sha256(self) -> str:
        """Over the ids as little-endian int64: equal for equal tokens, whatever the text's format."""
        return hashlib.sha256(self.ids.astype("<i8").tobytes()).hexdigest()

    @property
    def record(self) -> TextRecord:
        """What a manifest says of them."""
        count, seqlen = self.ids.shape
        return TextRecord(source=self.source, windows=count, seqlen=seqlen, sha256=self.sha256)


def calibration_windows(
    spec: str,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    samples: int | None,
    seqlen: int | None,
    seed: int,
) -> TokenWindows:
    """`samples` windows of `seqlen` tokens, drawn with `seed`; a `.npy` file is used as it is.

    From C4 each window is a random part of a random document that is long enough, as SparseGPT, Wanda and OWL
    sample it; from any other text the windows are drawn, without overlap, from the documents joined by blank lines.

    Raises:
        UserError: the text is shorter than what is asked for, or needs a tokenizer the model does not have.
    """
    if spec.endswith(".npy"):
        return _windows_of_ids(spec, samples, seqlen)
    samples, seqlen = samples or DEFAULT_SAMPLES, seqlen or DEFAULT_SEQLEN
    tokenizer = _require(tokenizer, spec)
    documents = load_documents(spec, "calibration")
    rng = random.Random(seed)
    if spec == "c4":
        ids = _sample_documents(documents, tokenizer, samples, seqlen, rng, spec)
    else:
        whole = _tokenize(tokenizer, "\n\n".join(documents))
        available = len(whole) // seqlen
        if available < samples:
            raise UserError(
                f"{spec}: {len(whole)} tokens, which is {available} windows of {seqlen}, not the {samples} asked for; "
                "give more text, fewer --samples or a shorter --seqlen"
            )
        chosen = sorted(rng.sample(range(available), samples))
        ids = whole[: available * seqlen].reshape(available, seqlen)[chosen]
    return TokenWindows(ids, spec)


def evaluation_windows(
    spec: str, tokenizer: PreTrainedTokenizerBase | None, *, seqlen: int | None, limit: int | None = None
) -> TokenWindows:
    """Consecutive windows of `seqlen` tokens, the tail dropped; the first `limit` of them if given.

    Raises:
        UserError: the text is shorter than one window, or needs a tokenizer the model does not have.
    """
    windows = whole_windows(spec, tokenizer, seqlen=seqlen, split="evaluation")
    return TokenWindows(windows.ids[:limit], spec)


def whole_windows(
    spec: str, tokenizer: PreTrainedTokenizerBase | None, *, seqlen: int | None, split: Split
) -> TokenWindows:
    """All consecutive windows of `seqlen` tokens, the tail dropped.

    Raises:
        UserError: the text is shorter than one window, or needs a tokenizer the model does not have.
    """
    if spec.endswith(".npy"):
        return _windows_of_ids(spec, None, seqlen)
    seqlen = seqlen or DEFAULT_SEQLEN
    whole = _tokenize(_require(tokenizer, spec), "\n\n".join(load_documents(spec, split)))
    count = len(whole) // seqlen
    if count == 0:
        raise UserError(f"{spec}: {len(whole)} tokens are less than one window of {seqlen}; give a shorter --seqlen")
    return TokenWindows(whole[: count * seqlen].reshape(count, seqlen), spec)


def held_out(ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first windows of `ids` [n, length], to fit on, and the last quarter (one at least), to compare on."""
    count = max(1, len(ids) // _HELD_OUT)
    return ids[:-count], ids[-count:]


def check_windows(windows: TokenWindows, *, vocabulary: int, context: int | None) -> None:
    """Refuse windows the model cannot run.

    Raises:
        UserError: a window is longer than the model's context, or an id is outside its vocabulary.
    """
    seqlen = windows.ids.shape[1]
    if context is not None and seqlen > context:
        raise UserError(f"{windows.source}: windows of {seqlen} tokens exceed the model's context of {context}")
    low, high = int(windows.ids.min()), int(windows.ids.max())
    if low < 0 or high >= vocabulary:
        bad = low if low < 0 else high
        raise UserError(f"{windows.source}: token id {bad} is outside the model's vocabulary of {vocabulary}")


def _require(tokenizer: PreTrainedTokenizerBase | None, spec: str) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise UserError(f"{spec}: the model has no tokenizer; give token ids as a .npy file [n, length] instead")
    return tokenizer


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> NDArray[np.int64]:
    # verbose=False: the text is meant to be longer than the model's context.
    return np.asarray(tokenizer(text, verbose=False)["input_ids"], dtype=np.int64)


def _sample_documents(
    documents: list[str],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    seqlen: int,
    rng: random.Random,
    spec: str,
) -> NDArray[np.int64]:
    """One random window from each of `samples` random documents longer than a window."""
    windows: list[NDArray[np.int64]] = []
    for index in rng.sample(range(len(documents)), len(documents)):
        ids = _tokenize(tokenizer, documents[index])
        if len(ids) > seqlen:
            start = rng.randrange(len(ids) - seqlen)
            windows.append(ids[start : start + seqlen])
        if len(windows) == samples:
            return np.stack(windows)
    raise UserError(
        f"{spec}: only {len(windows)} documents are longer than {seqlen} tokens, not the {samples} asked for; "
        "ask for fewer --samples or a shorter --seqlen"
    )


def _windows_of_ids(spec: str, samples: int | None, seqlen: int | None) -> TokenWindows:
    """The rows of a `.npy` file, each cut into windows of `seqlen` if that is given; the first `samples` of these."""
    path = Path(spec).expanduser()
    if not path.is_file():
        raise UserError(f"{spec}: no such file")
    try:
        ids = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{spec}: not a readable .npy file ({error})") from error
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"{spec}: token ids must be integers [n, length]; this is {ids.dtype} {list(ids.shape)}")
    if seqlen is not None:
        if seqlen > ids.shape[1]:
            raise UserError(f"{spec}: holds windows of {ids.shape[1]} tokens, not the {seqlen} asked for")
        ids = ids[:, : ids.shape[1] // seqlen * seqlen].reshape(-1, seqlen)
    if samples is not None and samples > len(ids):
        raise UserError(f"{spec}: holds {len(ids)} windows of {ids.shape[1]} tokens, not the {samples} asked for")
    return TokenWindows(ids[:samples].astype(np.int64), spec)
