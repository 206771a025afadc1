"""The graph of a bundle in onnxruntime-genai's generate loop, packed or not.

Its config has a place for our operator: `custom_ops_library` among the decoder's session options. It is laid over the
config when the graph is loaded, as the threads are, so that a bundle names nothing of the machine it was made on. The
loop is as fast as that of `SparseEngine`, and brings the cache, stop tokens and sampling.

A `standard` graph comes without a config; it is given one, in a directory that is gone when the graph is loaded.

Found in 0.14.0, and minded here: with a top-p but no top-k its sampler takes tokens from outside the nucleus; a
top-k above the size of the vocabulary, or a temperature next to 0, ends the process. Sampling from the whole vocabulary
sorts it: 49152 tokens take 10 ms.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from owl_deploy.bundle.manifest import GRAPH, BundleManifest
from owl_deploy.bundle.names import Flavor, weights_of
from owl_deploy.engines.rounded_cache import attention_for
from owl_deploy.errors import UserError, first_line
from owl_deploy.files import read_json, write_json
from owl_deploy.sparse.library import library_path

_CONFIG = "genai_config.json"
_NO_LIMIT = 2**31 - 1  # tokens, for a model that names no context; the cache of a standard graph grows as needed
_COLD = 1e-6  # a temperature that leaves nothing to chance, and with which its sampler may end the process
_SILENT = 4  # ONNX Runtime's log level: errors come as exceptions


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: the logits are divided by it; 0 takes the likeliest token every time.
        top_k: sample from this many likeliest tokens; 0 for all.
        top_p: of these, from the likeliest that together have this probability.
        repetition_penalty: the logits of tokens seen before, prompt included, are divided by it, or multiplied below 0.
        seed: of the sampling; the same seed gives the same text.
    """

    temperature: float = 0.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    @property
    def is_random(self) -> bool:
        """Whether the seed matters."""
        return self.temperature > _COLD


class GenerationModel:
    """A graph, loaded for generation.

    Attributes:
        context: tokens of the longest sequence, prompt and new.
        stop_tokens: the ids that end a text.

    Raises:
        UserError: the graph or its config cannot be loaded.
    """

    def __init__(self, bundle: Path, manifest: BundleManifest, flavor: Flavor, *, threads: int) -> None:
        import onnxruntime_genai

        directory = bundle / flavor
        options: dict[str, Any] = {"intra_op_num_threads": threads, "log_severity_level": _SILENT}
        if weights_of(flavor) is not None:
            options["custom_ops_library"] = str(library_path().absolute())
        overlay = json.dumps({"model": {"decoder": {"session_options": options}}})
        with tempfile.TemporaryDirectory(prefix="owl-deploy-") as temporary:
            described = directory
            if not (directory / _CONFIG).is_file():
                described = Path(temporary)
                write_json(described / _CONFIG, _config_of_standard(directory, manifest, described))
            model: dict[str, Any] = read_json(described / _CONFIG)["model"]
            try:
                config = onnxruntime_genai.Config(str(described))
                config.overlay(overlay)
                with attention_for(directory / GRAPH):
                    self._model = onnxruntime_genai.Model(config)
            except RuntimeError as error:
                reason = first_line(error)
                raise UserError(f"{directory}: onnxruntime-genai cannot load it ({reason}); export it again") from error
        self._vocabulary = manifest.vocabulary
        self.context: int = model["context_length"]
        self.stop_tokens = frozenset(_as_list(model.get("eos_token_id")))

    def tokens(self, prompt: Sequence[int], new_tokens: int, sampling: Sampling) -> Iterator[tuple[int, float]]:
        """Generate up to `new_tokens` tokens, each with the milliseconds it took; the first's include the prompt's.

        Ends after a stop token. The prompt and the new tokens must fit into the context.
        """
        import onnxruntime_genai

        parameters = onnxruntime_genai.GeneratorParams(self._model)
        parameters.set_search_options(
            max_length=len(prompt) + new_tokens,
            do_sample=sampling.is_random,
            temperature=sampling.temperature,
            top_k=min(sampling.top_k or self._vocabulary, self._vocabulary),
            top_p=sampling.top_p,
            repetition_penalty=sampling.repetition_penalty,
            random_seed=sampling.seed,
        )
        generator = onnxruntime_genai.Generator(self._model, parameters)
        start = time.perf_counter()
        generator.append_tokens(np.asarray(prompt, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            yield token, (time.perf_counter() - start) * 1000
            start = time.perf_counter()


def _config_of_standard(directory: Path, manifest: BundleManifest, relative_to: Path) -> dict[str, Any]:
    """What onnxruntime-genai has to know of a `standard` graph, whose caches have the names it expects."""
    graph = directory / GRAPH
    inputs = onnx.load(str(graph), load_external_data=False).graph.input
    keys = [value for value in inputs if value.name.startswith("past_key_values.") and value.name.endswith(".key")]
    _, heads, _, head_size = (dimension.dim_value for dimension in keys[0].type.tensor_type.shape.dim)
    decoder = {
        "filename": os.path.relpath(graph.resolve(), relative_to.resolve()),  # it knows no absolute paths
        "num_hidden_layers": len(keys),
        "num_key_value_heads": heads,
        "head_size": head_size,
    }
    model = {
        "type": "decoder",
        "vocab_size": manifest.vocabulary,
        "context_length": manifest.context or _NO_LIMIT,
        "eos_token_id": _stop_tokens(directory),
        "pad_token_id": 0,  # never used: there is one sequence
        "decoder": decoder,
    }
    return {"model": model, "search": {"past_present_share_buffer": False}}


def _stop_tokens(directory: Path) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        if (directory / name).is_file():
            found = _as_list(read_json(directory / name).get("eos_token_id"))
            if found:
                return found
    return []


def _as_list(ids: int | list[int] | None) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]
