"""Generate text on a bundle, and say how long it took."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from owl_deploy.bundle.manifest import BundleManifest, read_bundle
from owl_deploy.bundle.names import FLAVORS, SPARSE_BY_BYTES, Flavor
from owl_deploy.bundle.verify import verify_files
from owl_deploy.errors import UserError
from owl_deploy.generation.model import GenerationModel, Sampling
from owl_deploy.generation.text import TextStream, prompt_ids
from owl_deploy.models.load import load_tokenizer
from owl_deploy.models.source import ModelSource

_PREFERRED: tuple[Flavor, ...] = (*SPARSE_BY_BYTES, "genai", "standard")


@dataclass(frozen=True)
class Generation:
    """A text, and what making it took.

    Attributes:
        new_tokens: those of the text; the stop token is none of them.
        finish: why it ends: at a stop token, after as many tokens as were asked for, or where the context is full.
        ttft_ms: from the prompt's ids to the first new token's id. It includes the logits of every position of the
            prompt, which onnxruntime-genai asks for; `bench` times an engine that computes the last one's alone.
        decode_ms_p50, decode_tokens_per_s: over the steps after the first; None if there were none.
        seed: None where nothing was left to chance.
    """

    flavor: Flavor
    prompt_tokens: int
    new_tokens: int
    text: str
    finish: Literal["stop", "length", "context"]
    ttft_ms: float
    decode_ms_p50: float | None
    decode_tokens_per_s: float | None
    seed: int | None


def generate_text(
    bundle: Path,
    prompt: str,
    *,
    flavor: str | None,
    max_new_tokens: int,
    sampling: Sampling,
    threads: int,
    system: str | None = None,
    chat: bool = True,
    on_text: Callable[[str], object] = lambda _: None,
) -> Generation:
    """Continue `prompt`, or answer it; `on_text` is called with each piece of the text as soon as it is there.

    Args:
        flavor: the graph to run; None for the fastest there is.
        system, chat: see `prompt_ids`.

    Raises:
        UserError: the bundle has no tokenizer or no such flavor, or the prompt does not do.
    """
    manifest = read_bundle(bundle)
    chosen = _choose_flavor(bundle, manifest, flavor)
    verify_files(bundle, manifest.flavors[chosen].graph_files)
    tokenizer = load_tokenizer(ModelSource(str(bundle / chosen), bundle / chosen))
    if tokenizer is None:
        raise UserError(f"{bundle / chosen}: has no tokenizer; export a checkpoint that comes with one")
    ids = prompt_ids(tokenizer, prompt, system=system, chat=chat)
    if max(ids) >= manifest.vocabulary:
        raise UserError(
            f"{bundle / chosen}: its tokenizer knows token {max(ids)}, its model only {manifest.vocabulary}; export a "
            "checkpoint with the right one"
        )
    model = GenerationModel(bundle, manifest, chosen, threads=threads)
    room = model.context - len(ids)
    if room < 1:
        raise UserError(
            f"the prompt has {len(ids)} tokens and leaves no room in the model's context of {model.context}; shorten it"
        )

    stream = TextStream(tokenizer)
    pieces: list[str] = []
    times_ms: list[float] = []
    finish: Literal["stop", "length", "context"] = "length" if max_new_tokens <= room else "context"
    for token, milliseconds in model.tokens(ids, min(max_new_tokens, room), sampling):
        times_ms.append(milliseconds)
        if token in model.stop_tokens:
            finish = "stop"
            break
        pieces.append(stream.push(token))
        on_text(pieces[-1])
    pieces.append(stream.rest())
    on_text(pieces[-1])
    return Generation(
        flavor=chosen,
        prompt_tokens=len(ids),
        new_tokens=len(times_ms) - (finish == "stop"),
        text="".join(pieces),
        finish=finish,
        ttft_ms=times_ms[0],
        decode_ms_p50=statistics.median(times_ms[1:]) if times_ms[1:] else None,
        decode_tokens_per_s=_rate(times_ms[1:]),
        seed=sampling.seed if sampling.is_random else None,
    )


def _choose_flavor(bundle: Path, manifest: BundleManifest, asked: str | None) -> Flavor:
    if asked is None:
        return next(flavor for flavor in _PREFERRED if flavor in manifest.flavors)
    for flavor in manifest.flavors:
        if flavor == asked:
            return flavor
    if asked in FLAVORS:
        raise UserError(f"{bundle}: holds no {asked}; choose from {', '.join(manifest.flavors)}, or export it too")
    raise UserError(f"--flavor {asked}: is unknown; {bundle} holds {', '.join(manifest.flavors)}")


def _rate(times_ms: Sequence[float]) -> float | None:
    return 1000 * len(times_ms) / sum(times_ms) if times_ms else None
