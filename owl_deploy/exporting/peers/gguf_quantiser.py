"""llama.cpp's own quantiser, through its bindings. Started as a script under llama.cpp's own interpreter.

    python gguf_quantiser.py SOURCE OUT FILE_TYPE IMPORTANCE THREADS

IMPORTANCE is an .npz file with a vector for each matrix of SOURCE that has one, under its name there. It imports numpy
and llama.cpp alone. What llama.cpp says of an error goes to stderr.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

_ERROR = 4  # of enum ggml_log_level


def _quantise(source: str, out: str, file_type: int, importance: str, threads: int) -> int:
    """llama.cpp's status: 0 for done."""
    import llama_cpp
    import numpy as np

    def note(level: int, text: bytes, _: object) -> None:
        if level == _ERROR:
            sys.stderr.write(text.decode(errors="replace"))

    callback: Any = llama_cpp.llama_log_callback(note)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    with np.load(importance) as found:
        vectors = {name: np.ascontiguousarray(found[name], np.float32) for name in found.files}
    entries = (llama_cpp.llama_model_imatrix_data * (len(vectors) + 1))()  # the last one, without a name, ends the list
    for entry, (name, values) in zip(entries, vectors.items(), strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread, settings.imatrix = file_type, threads, entries
    return int(llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(settings)))


if __name__ == "__main__":
    sys.path.pop(0)  # this script's folder, whose modules would shadow others
    source, out, file_type, importance, threads = sys.argv[1:]
    sys.exit(_quantise(source, out, int(file_type), importance, int(threads)))
