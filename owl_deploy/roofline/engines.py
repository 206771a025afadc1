"""Every engine as a whole: the bytes of its file that a token reads, over the time of a token.

What an engine makes of its file when it loads it is not known. PyTorch alone is counted as it runs: in fp32, whatever
the file's precision. Norms, biases and a row of the embedding are less than a thousandth, and left out.
"""

from __future__ import annotations

from collections.abc import Mapping

from owl_deploy.bundle.manifest import FlavorRecord
from owl_deploy.bundle.names import Flavor
from owl_deploy.engines.registry import ENGINES, EngineSpec
from owl_deploy.roofline.records import EngineFigures, FlavorFigures

_BYTES_PER_MS = 1e6  # at 1 GB/s
_FP32_BYTES = 4
_CACHE_BYTES = {"fp32": 4, "f32": 4, "f16": 2, "bf16": 2, "u8": 1, "i8": 1, "int8": 1}


def engines_of(flavor: Flavor) -> list[EngineSpec]:
    """The engines that run this flavor by preference and are installed."""
    return [
        spec
        for spec in ENGINES.values()
        if spec.flavors[0] == flavor and (spec.environment is None or spec.environment.is_ready())
    ]


def least_bytes(record: FlavorRecord, spec: EngineSpec, past: int, facts: Mapping[str, object] | None = None) -> int:
    """What a token that `past` others precede reads: the linears, the head, and the cache as the engine keeps it.

    Without `facts`, which it gives once it is loaded, the cache is left out.
    """
    stored = record.stored
    assert stored is not None
    if spec.package == "torch":
        matrices = (stored.linear_weights + stored.head_weights) * _FP32_BYTES
    else:
        matrices = stored.linear_bytes + stored.head_bytes
    cache = _CACHE_BYTES.get(cache_of(facts), _FP32_BYTES) if facts is not None else 0
    return matrices + stored.cache_values * past * cache


def cache_of(facts: Mapping[str, object]) -> str:
    """How an engine says that it keeps keys and values; fp32 for one that does not."""
    return str(facts.get("kv_cache") or facts.get("kv_cache_precision") or "fp32")


def whole_engine(
    spec: EngineSpec,
    record: FlavorRecord,
    size: int,
    token_ms: float,
    bandwidth_gb_s: float,
    facts: Mapping[str, object],
) -> EngineFigures:
    """The figures of an engine that reads `size` bytes for a token in `token_ms`."""
    gb_s = size / _BYTES_PER_MS / token_ms
    return EngineFigures(
        engine=spec.name,
        flavor=spec.flavors[0],
        kv_cache=cache_of(facts),
        linear_bits=record.stored.linear_bits if record.stored else None,
        bandwidth_gb_s=bandwidth_gb_s,
        bytes=size,
        floor_ms=size / _BYTES_PER_MS / bandwidth_gb_s,
        measured_ms=token_ms,
        gb_s=gb_s,
        share=gb_s / bandwidth_gb_s,
    )


def engine_of(figures: FlavorFigures, record: FlavorRecord) -> EngineFigures:
    """The same of a flavor that was measured operator by operator."""
    return EngineFigures(
        **figures.token.model_dump(exclude={"kind", "matrices", "formats"}),
        engine=figures.engine,
        flavor=figures.flavor,
        kv_cache=cache_of(figures.facts),
        linear_bits=record.stored.linear_bits if record.stored else None,
        bandwidth_gb_s=figures.bandwidth_gb_s,
    )
