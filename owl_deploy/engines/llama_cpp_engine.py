"""llama.cpp on GGUF files, through llama-cpp-python's bindings of its C functions: runs in its own environment."""

from __future__ import annotations

import ctypes
from collections import deque
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from owl_deploy.engines.protocol import Logits, TokenIds
from owl_deploy.errors import UserError

# As llama.cpp names what it was compiled for, the widest first.
_INSTRUCTION_SETS = {
    "AMX_INT8": "amx",
    "AVX512_VNNI": "avx512_vnni",
    "AVX512": "avx512",
    "AVX2": "avx2",
    "NEON": "neon",
}
_ERROR = 4  # of enum ggml_log_level
_errors: deque[str] = deque(maxlen=3)
_callbacks: list[Any] = []  # llama.cpp holds bare pointers to them


class LlamaCppEngine:
    """`protocol.Engine` on llama.cpp, with its defaults: a KV cache of f16, flash attention where it can, the file
    mapped into memory, and weights laid out anew at load where it has faster kernels for that.

    Raises:
        UserError: llama-cpp-python is not installed in this environment, or llama.cpp cannot load the model, or it
            was not made for so long a context.
    """

    def __init__(self, model: Path, *, threads: int, context: int, prompts: tuple[int, ...], batch: int = 1) -> None:
        del prompts  # shapes are dynamic: nothing is compiled per length
        lib = self._lib = _import_llama_cpp()
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(str(model).encode(), lib.llama_model_default_params())
        if not self._model:
            raise UserError(f"{model}: llama.cpp cannot load it ({_last_errors()}); export the model again")
        longest = lib.llama_model_n_ctx_train(self._model)
        if context > longest:
            raise UserError(f"{model}: made for sequences of {longest} tokens, and {context} are asked for")
        settings = lib.llama_context_default_params()
        settings.n_ctx = context * batch
        settings.n_seq_max = batch
        settings.n_threads = settings.n_threads_batch = threads
        self._state = lib.llama_init_from_model(self._model, settings)
        if not self._state:
            raise UserError(f"{model}: llama.cpp has no room for {batch} x {context} tokens ({_last_errors()})")
        self._at_once = lib.llama_n_batch(self._state)
        self._vocabulary: int = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._sequences = np.arange(batch, dtype=np.int32)
        self._context = context
        self._length = 0

    def describe(self) -> dict[str, Any]:
        """Beside the protocol's facts: how keys and values are stored, how many tokens are run in one go, and what
        llama.cpp says of its build. The instruction set is the widest it was compiled for."""
        system_info = self._lib.llama_print_system_info().decode()
        compiled = {name for name in _INSTRUCTION_SETS if f" {name} = 1 " in system_info}
        return {
            "version": self._lib.__version__,
            "instruction_set": next((_INSTRUCTION_SETS[name] for name in _INSTRUCTION_SETS if name in compiled), ""),
            "prefill_logits": "last",
            "kv_cache": "f16",
            "flash_attention": "auto",
            "batch_tokens": self._at_once,
            "micro_batch_tokens": self._lib.llama_n_ubatch(self._state),
            "system_info": system_info.strip(),
        }

    def prefill(self, ids: TokenIds) -> Logits:
        """See `protocol.Engine`.

        Raises:
            ValueError: `ids` do not fit the context.
        """
        self._begin()
        return self._append(ids, every_position=False)[:, 0]

    def score(self, ids: TokenIds) -> Logits:
        """See `protocol.Engine`.

        Raises:
            ValueError: `ids` do not fit the context.
        """
        self._begin()
        return self._append(ids, every_position=True)

    def decode(self, tokens: TokenIds) -> Logits:
        """See `protocol.Engine`.

        Raises:
            ValueError: the context is full.
        """
        return self._append(tokens[:, None], every_position=False)[:, 0]

    def _begin(self) -> None:
        # The cells are only marked free: nothing reads what an earlier sequence left in them.
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._state), False)
        self._length = 0

    def _append(self, ids: TokenIds, *, every_position: bool) -> NDArray[np.float32]:
        """Append `ids` [batch, new], in pieces of at most llama.cpp's batch.

        Returns logits [batch, positions, vocab], of every position or of the last one.
        """
        sequences, new = ids.shape
        if not 0 < new <= self._context - self._length:
            raise ValueError(f"{new} tokens after {self._length} do not fit a context of {self._context}")
        logits = np.empty((sequences, new if every_position else 1, self._vocabulary), np.float32)
        step = max(1, self._at_once // sequences)
        filled = 0
        for first in range(0, new, step):
            piece = ids[:, first : first + step]
            wanted = piece.shape[1] if every_position else int(first + step >= new)
            logits[:, filled : filled + wanted] = self._run(piece, wanted)
            filled += wanted
            self._length += piece.shape[1]
        return logits

    def _run(self, ids: TokenIds, wanted: int) -> NDArray[np.float32]:
        """Run `ids` [batch, new] after what is in the cache; the logits of the last `wanted` positions.

        They are [batch, wanted, vocab], and valid until the next run.
        """
        sequences, new = ids.shape
        count = sequences * new
        tokens = np.ascontiguousarray(ids, np.int32)
        positions = np.tile(np.arange(self._length, self._length + new, dtype=np.int32), sequences)
        # Each token has a list of the sequences it belongs to: of length 1, a pointer to the number of its sequence.
        lengths = np.ones(count, np.int32)
        lists = self._sequences.ctypes.data + self._sequences.itemsize * np.repeat(np.arange(sequences), new)
        lists = lists.astype(np.uintp)
        flags = np.tile((np.arange(new) >= new - wanted).astype(np.int8), sequences)
        batch = self._lib.llama_batch(
            n_tokens=count,
            token=_pointer(tokens, ctypes.c_int32),
            pos=_pointer(positions, ctypes.c_int32),
            n_seq_id=_pointer(lengths, ctypes.c_int32),
            seq_id=_pointer(lists, ctypes.POINTER(ctypes.c_int32)),
            logits=_pointer(flags, ctypes.c_int8),
        )
        code = self._lib.llama_decode(self._state, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code} for {count} tokens ({_last_errors()})")
        shape = sequences, wanted, self._vocabulary
        if not wanted:
            return np.empty(shape, np.float32)
        # Those of the flagged tokens, in the order of the tokens.
        return np.ctypeslib.as_array(self._lib.llama_get_logits(self._state), shape)


def _pointer(array: NDArray[Any], to: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(to))


def _import_llama_cpp() -> ModuleType:
    """The bindings, with llama.cpp's many messages kept from stderr, and its errors for `_last_errors`."""
    try:
        import llama_cpp
    except (ImportError, RuntimeError, OSError) as error:  # the package, or its library
        raise UserError(
            f"llama.cpp cannot be imported ({error}); install it with: owl-deploy engines install llama.cpp"
        ) from error
    module: ModuleType = llama_cpp
    if not _callbacks:

        def note(level: int, text: bytes, _: object) -> None:
            if level == _ERROR:
                _errors.append(text.decode(errors="replace").strip())

        _callbacks.append(module.llama_log_callback(note))
        module.llama_log_set(_callbacks[0], ctypes.c_void_p(0))
    return module


def _last_errors() -> str:
    return " | ".join(_errors) or "it said nothing"
