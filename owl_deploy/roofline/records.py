"""`roofline.json`: what was read, what it could take at best, and what it took. Milliseconds are per decoded token."""

from __future__ import annotations

from owl_deploy import __version__
from owl_deploy.records import Record


class BandwidthRecord(Record):
    """How fast so many threads read a set of this size again and again, GB (1e9 bytes) a second."""

    set_bytes: int
    threads: int
    gb_s: float


class Figures(Record):
    """Bytes, and how long reading them takes.

    Attributes:
        floor_ms: reading as fast as the machine reads what the flavor reads for a token.
        measured_ms: null where the engine does not tell it apart.
        gb_s: reached.
        share: of the bandwidth, `floor_ms` over `measured_ms`. Above 1 the machine was slower when it was read alone.
    """

    bytes: int
    floor_ms: float
    measured_ms: float | None
    gb_s: float | None
    share: float | None


class MatrixFigures(Figures):
    """One matrix; rows are outputs, columns inputs."""

    name: str
    kind: str
    rows: int
    columns: int
    format: str


class KindFigures(Figures):
    """All matrices of one kind, or what is read beside matrices; `matrices` is then 0."""

    kind: str
    matrices: int
    formats: list[str]


class FlavorFigures(Record):
    """One flavor.

    Attributes:
        bandwidth_gb_s: the roof: the highest that at most as many threads reached on a set at least as large as what
            a token reads, or on the largest that was read.
        fits_cache: what a token reads is smaller than the last-level cache, so that `memory_floor_ms` is no floor.
        memory_floor_ms: reading from memory alone.
        kinds: the matrices by kind.
        attention: of the KV cache.
        rest: norms, biases, one row of each table, and every other operator.
        token: all of it, as the engine does it unprofiled: the median over all rounds.
        matrices: all of them together, as `kinds`.
        between_ms: what no operator takes: running the graph, and choosing the next token. Null where some matrix has
            no time of its own.
        outside_ms: what is spent outside the matrices: `attention`, `rest` and `between_ms`.
        operators_ms: the operators that are not products with matrices, the longest first.
        profiled_token_ms: a token's time while operators were timed.
        profile_cost_ms: what timing one operator cost, of which its time was relieved.
        decode_ms: every sample, round by round.
    """

    flavor: str
    engine: str
    facts: dict[str, object]
    bandwidth_gb_s: float
    fits_cache: bool
    memory_floor_ms: float
    kinds: list[KindFigures]
    matrices: KindFigures
    attention: KindFigures
    rest: KindFigures
    token: KindFigures
    between_ms: float | None
    outside_ms: float | None
    operators_ms: dict[str, float]
    profiled_token_ms: float
    profile_cost_ms: float
    decode_ms: list[list[float]]
    each_matrix: list[MatrixFigures]

    @property
    def parts_ms(self) -> float | None:
        """What the parts add up to; on a steady machine, to the whole token."""
        if self.matrices.measured_ms is None or self.outside_ms is None:
            return None
        return self.matrices.measured_ms + self.outside_ms


class EngineFigures(Figures):
    """One engine, as a whole: what a token reads of its file and its cache, and how long it takes.

    Attributes:
        kv_cache: how it keeps keys and values.
        linear_bits: bits of a weight of the blocks' linears in the file; null in a bundle of an older owl-deploy.
        bandwidth_gb_s: as of `FlavorFigures`.
    """

    engine: str
    flavor: str
    kv_cache: str
    linear_bits: float | None
    bandwidth_gb_s: float


class Roofline(Record):
    """The whole of `roofline.json`.

    Attributes:
        past, new_tokens: tokens of the prompt, and generated after it.
        cache_bytes: the last-level cache; null if the system does not tell.
        other_load_cores: cores that other processes kept busy before measuring began.
        flavors: of our own environment, operator by operator.
        engines: all that were measured, those of `flavors` too.
    """

    schema_version: int = 2
    owl_deploy_version: str = __version__
    model: str
    bundle: str
    sparsity_achieved: float
    threads: int
    past: int
    new_tokens: int
    rounds: int
    cpu: str
    cores: int
    instruction_set: str
    cache_bytes: int | None
    other_load_cores: float
    memory_set_bytes: int
    bandwidth: list[BandwidthRecord]
    flavors: list[FlavorFigures]
    engines: list[EngineFigures]
