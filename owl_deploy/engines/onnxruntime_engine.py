"""ONNX Runtime on the CPU, with IO binding; the KV cache is one shared buffer where the graph allows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from owl_deploy.bundle.names import LOGITS_FROM
from owl_deploy.engines.protocol import Logits, TokenIds
from owl_deploy.engines.rounded_cache import attention_for
from owl_deploy.machine.cpu import Widest, instruction_set

_PIECE = 256  # tokens
CACHE_TYPES: dict[str, np.dtype[Any]] = {"tensor(float)": np.dtype(np.float32), "tensor(int8)": np.dtype(np.int8)}
"""Of keys and values, by how ONNX Runtime calls them."""


class OnnxRuntimeEngine:
    """Runs `genai/` and `standard/` graphs.

    A graph that lies beside a `genai_config.json` attends with GroupQueryAttention, which appends to its cache in
    place: past and present are bound to one buffer of `context` tokens. Any other graph returns a longer cache
    each step, which becomes the next step's past without a copy of our own.

    Where that cache is of 8 bits, a prompt of one sequence is run in pieces: the kernel that decodes it fastest holds
    all scores of a piece at once, 4 bytes for each head, query and key.

    A graph without the input `LOGITS_FROM` computes the logits of every position, whoever asks.

    ONNX Runtime copies fp32 matrices when it loads them, rearranged for its kernels. Without `rearrange` it maps them
    from the file, which takes less time and memory where only a few tokens are run.

    With `profile`, a path, ONNX Runtime notes what each of its operators takes; see `end_profile`.
    """

    widest: ClassVar[Widest] = "avx512"
    """Of the instruction sets that its products of fp32 know."""

    def __init__(
        self,
        graph: Path,
        *,
        threads: int,
        context: int,
        prompts: tuple[int, ...] = (),
        batch: int = 1,
        profile: Path | None = None,
        rearrange: bool = True,
    ) -> None:
        del prompts  # shapes are dynamic: nothing is compiled per length
        self._batch = batch
        options = self._options(threads)
        if not rearrange:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        with attention_for(graph):
            self._session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self._binding = self._session.io_binding()
        inputs = [*self._session.get_inputs(), *self._session.get_overridable_initializers()]
        self._inputs = {value.name: value for value in inputs}
        self._vocabulary: int = self._session.get_outputs()[0].shape[-1]
        self._caches = [name for name in self._inputs if name.startswith("past_key_values.")]
        self._buffers: dict[str, Any] = {}
        self._selects_positions = LOGITS_FROM in self._inputs
        self._shares_cache = (graph.parent / "genai_config.json").is_file()
        self._rounds_cache = any(self._inputs[name].type == "tensor(int8)" for name in self._caches)
        self._ones = np.ones((batch, context), np.int64)
        self._positions = np.tile(np.arange(context, dtype=np.int64), (batch, 1))
        self._length = 0
        if self._shares_cache:
            self._bind_shared_cache(context)

    def _options(self, threads: int) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        return options

    def describe(self) -> dict[str, Any]:
        return {
            "version": onnxruntime.__version__,
            "instruction_set": instruction_set(self.widest),
            "prefill_logits": "last" if self._selects_positions else "all",
            "shared_kv_buffer": self._shares_cache,
            "kv_cache": "int8" if self._rounds_cache else "fp32",
        }

    def prefill(self, ids: TokenIds) -> Logits:
        self._begin()
        *before, last = self._pieces(ids)
        for piece in before:
            self._run(piece)
        return self._run(last)[:, -1]

    def score(self, ids: TokenIds) -> Logits:
        self._begin()
        return np.concatenate([self._run(piece, every_position=True) for piece in self._pieces(ids)], axis=1)

    def _pieces(self, ids: TokenIds) -> list[TokenIds]:
        """`ids` [batch, length] as they are to be run one after the other."""
        if not self._rounds_cache or self._batch > 1:  # after others, GroupQueryAttention takes tokens of one sequence
            return [ids]
        return [ids[:, first : first + _PIECE] for first in range(0, ids.shape[1], _PIECE)]

    def _begin(self) -> None:
        self._length = 0
        if not self._shares_cache:
            for name in self._caches:
                self._binding.bind_ortvalue_input(name, _ort_value(self._empty_cache(name, 0)))

    def decode(self, tokens: TokenIds) -> Logits:
        return self._run(tokens[:, None])[:, -1]

    def cached(self) -> dict[str, NDArray[Any]]:
        """What a shared cache holds of the sequences, [batch, heads, tokens, head size], by the name of its input."""
        return {name: buffer.numpy()[:, :, : self._length].copy() for name, buffer in self._buffers.items()}

    def end_profile(self) -> Path:
        """Write what was noted so far; the JSON file, whose name begins with `profile`."""
        return Path(self._session.end_profiling())

    def _run(self, ids: TokenIds, *, every_position: bool = False) -> Logits:
        """Append `ids` [batch, new] to the sequences; logits [batch, positions, vocab].

        These are of the last position alone, unless `every_position` is asked for or the graph knows no other way.
        """
        new = ids.shape[1]
        total = self._length + new
        feeds = {
            "input_ids": ids,
            "attention_mask": self._ones[:, :total],
            "position_ids": self._positions[:, self._length : total],
            LOGITS_FROM: np.array([0 if every_position else -1]),
        }
        for name, array in feeds.items():
            if name in self._inputs:
                self._bind_input(name, np.ascontiguousarray(array))
        positions = new if every_position or not self._selects_positions else 1
        logits: NDArray[np.float32] = np.empty((self._batch, positions, self._vocabulary), np.float32)
        self._binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        if not self._shares_cache:
            for name in self._caches:
                self._binding.bind_output(_present(name), "cpu")
        self._session.run_with_iobinding(self._binding)
        if not self._shares_cache:
            presents = dict(zip(self._output_names, self._binding.get_outputs(), strict=True))
            for name in self._caches:
                self._binding.bind_ortvalue_input(name, presents[_present(name)])
        self._length = total
        return logits

    @property
    def _output_names(self) -> list[str]:
        return ["logits", *(_present(name) for name in self._caches)]  # in the order they are bound

    def _bind_input(self, name: str, array: NDArray[np.int64]) -> None:
        self._binding.bind_ortvalue_input(name, _ort_value(array))

    def _bind_shared_cache(self, context: int) -> None:
        for name in self._caches:
            self._buffers[name] = buffer = _ort_value(self._empty_cache(name, context))
            self._binding.bind_ortvalue_input(name, buffer)
            self._binding.bind_ortvalue_output(_present(name), buffer)

    def _empty_cache(self, name: str, tokens: int) -> NDArray[Any]:
        _, heads, _, head_size = self._inputs[name].shape
        return np.zeros((self._batch, heads, tokens, head_size), CACHE_TYPES[self._inputs[name].type])


class RoundedOnnxRuntimeEngine(OnnxRuntimeEngine):
    """Runs `genai-int8/` and `genai-int4/`, whose products round their inputs to 8 bits and multiply integers."""

    widest: ClassVar[Widest] = "avx512_vnni"


def _present(past: str) -> str:
    return past.replace("past_key_values", "present")


def _ort_value(array: NDArray[Any]) -> Any:
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
