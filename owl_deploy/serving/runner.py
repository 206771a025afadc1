"""A graph over ONNX Runtime whose KV buffer is shared by slots: pieces of prompts into one slot, a token for many.

The buffer of each layer is [slots, kv heads, context, head size]. Any slots that lie side by side are a batch of the
graph in place, bound as past and as present. GroupQueryAttention takes a length for each sequence, and counts them in
the attention mask; several tokens after a past it takes for one sequence only (ONNX Runtime 1.31), so prompts are
computed one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from owl_deploy.bundle.names import LOGITS_FROM
from owl_deploy.engines.onnxruntime_engine import CACHE_TYPES
from owl_deploy.engines.rounded_cache import attention_for
from owl_deploy.errors import UserError, first_line
from owl_deploy.sparse.library import library_path

_PAST, _PRESENT = "past_key_values.", "present."
_ERRORS_ONLY = 3  # ONNX Runtime's log level


class SlotRunner:
    """One model, loaded once. Not thread-safe.

    Args:
        graph: of a `genai*` or `sparse-*` flavor.
        packed: whether it needs our operator.
        slots: sequences that are kept at once.
        context: tokens of each.

    Raises:
        UserError: the graph cannot be loaded.
    """

    def __init__(self, graph: Path, *, packed: bool, slots: int, context: int, threads: int) -> None:
        try:
            with attention_for(graph):
                self._session = onnxruntime.InferenceSession(
                    str(graph), _options(threads, packed), providers=["CPUExecutionProvider"]
                )
        except Exception as error:  # of ONNX Runtime, which has a class for each of its codes
            raise UserError(f"{graph}: ONNX Runtime cannot load it ({first_line(error)}); export it again") from error
        inputs = [*self._session.get_inputs(), *self._session.get_overridable_initializers()]
        self._shapes: dict[str, list[Any]] = {value.name: value.shape for value in inputs}
        self._caches = {value.name: CACHE_TYPES[value.type] for value in inputs if value.name.startswith(_PAST)}
        self._slots, self._context = slots, context
        self.vocabulary: int = self._session.get_outputs()[0].shape[-1]
        self._buffers: dict[str, NDArray[Any]] = {}
        self._bindings: dict[tuple[int, int], Any] = {}

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token, in all layers."""
        return sum(
            self._shapes[name][1] * self._shapes[name][3] * dtype.itemsize for name, dtype in self._caches.items()
        )

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the whole buffer."""
        return self.token_bytes * self._slots * self._context

    def allocate(self) -> None:
        """Make the buffer, all of which is memory from then on.

        Pages that are touched for the first time while a request waits would delay it by tenths of a second.
        """
        for name, dtype in self._caches.items():
            _, heads, _, size = self._shapes[name]
            buffer = np.empty((self._slots, heads, self._context, size), dtype)
            buffer.fill(0)
            self._buffers[name] = buffer

    def copy(self, source: int, target: int, tokens: int) -> None:
        """The first `tokens` of a slot also go into another."""
        for buffer in self._buffers.values():
            buffer[target, :, :tokens] = buffer[source, :, :tokens]

    def prefill(self, slot: int, start: int, tokens: Sequence[int], *, want_logits: bool) -> NDArray[np.float32] | None:
        """Append a piece of a prompt after `start` tokens; the logits [vocab] that follow it, if they are wanted."""
        end = start + len(tokens)
        logits = self._run(
            slot,
            ids=np.array([tokens], np.int64),
            mask=np.ones((1, end), np.int64),
            positions=np.arange(start, end, dtype=np.int64)[None],
            want_logits=want_logits,
        )
        return None if logits is None else logits[0]

    def decode(self, first: int, tokens: Sequence[int], lengths: Sequence[int]) -> NDArray[np.float32]:
        """Append a token to each slot from `first` on, after `lengths` tokens; the logits that follow [slots, vocab].

        They are overwritten by the next run.
        """
        past = np.array(lengths, np.int64)[:, None]
        logits = self._run(
            first,
            ids=np.array(tokens, np.int64)[:, None],
            mask=(np.arange(max(lengths) + 1) <= past).astype(np.int64),
            positions=past,
            want_logits=True,
        )
        assert logits is not None
        return logits

    def _run(
        self,
        first: int,
        *,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        positions: NDArray[np.int64],
        want_logits: bool,
    ) -> NDArray[np.float32] | None:
        rows, new = ids.shape
        binding = self._binding(first, rows)
        feeds = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions,
            LOGITS_FROM: np.array([-1 if want_logits else new]),  # from `new` on there are none
        }
        for name, array in feeds.items():
            if name in self._shapes:
                binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)))
        selects = LOGITS_FROM in self._shapes
        computed = 1 if want_logits and selects else 0 if selects else new
        logits: NDArray[np.float32] = np.empty((rows, computed, self.vocabulary), np.float32)
        if computed:
            binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        else:
            binding.bind_output("logits", "cpu")
        self._session.run_with_iobinding(binding)
        return logits[:, -1] if want_logits else None

    def _binding(self, first: int, rows: int) -> Any:
        """The part of the buffer of these slots, bound as past and present."""
        if (first, rows) not in self._bindings:
            binding = self._session.io_binding()
            for name, buffer in self._buffers.items():
                part = buffer[first : first + rows]
                place = ("cpu", 0, buffer.dtype, part.shape, part.ctypes.data)
                binding.bind_input(name, *place)
                binding.bind_output(name.replace(_PAST, _PRESENT), *place)
            self._bindings[first, rows] = binding
        return self._bindings[first, rows]


def _options(threads: int, packed: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    options.enable_mem_pattern = False  # no two steps have the same shapes
    options.add_session_config_entry("session.force_spinning_stop", "1")  # between steps the cores are for others
    if packed:
        options.register_custom_ops_library(str(library_path()))
    return options
