"""What `bundle.json` says of one graph: how its logits agree, and how each matrix is stored."""

from __future__ import annotations

from owl_deploy.records import Record, TextRecord
from owl_deploy.sparse.formats import Stored


class ParityRecord(Record):
    """Agreement of two sets of logits, position by position."""

    reference: str
    """What computed the logits compared with: torch, at export, or one of `REFERENCES`, at the same time."""
    positions: int
    """Positions compared without a cache."""
    positions_with_past: int
    """Positions compared with a cache."""
    max_abs_difference: float
    """The largest difference of any logit at any position, without a cache."""
    max_abs_difference_with_past: float
    """The same with a cache."""
    argmax_agreement: float
    """Fraction of positions with the same most likely token."""
    relative_difference: float | None = None
    """Norm of the difference over that of the reference's logits, less each position's mean: what rounding costs."""


class MatrixRecord(Record):
    """One matrix of a sparse graph.

    Attributes:
        name: the initializer that holds it.
        parts: the matrices of the dense graph that it is made of, one below the other.
        rows, columns: outputs and inputs.
        format: as which it is stored; "fp32" if packing would not have paid.
        bytes: of the weights, as stored.
    """

    name: str
    parts: list[str]
    rows: int
    columns: int
    nonzeros: int
    format: Stored
    bytes: int


class StoredRecord(Record):
    """The matrices of a flavor, as its file has them: values, scales and zero points.

    Attributes:
        parameters: of the model, a head that is the token embedding counted once.
        linear_weights, linear_bytes: of the blocks' linears.
        head_weights, head_bytes: of the matrix of the vocabulary.
        cache_values: numbers that a token's keys and values are, in all blocks.
    """

    parameters: int
    linear_weights: int
    linear_bytes: int
    head_weights: int
    head_bytes: int
    cache_values: int

    @property
    def linear_bits(self) -> float | None:
        """Bits of a weight of the blocks' linears; None of a file in which they were not found."""
        return 8 * self.linear_bytes / self.linear_weights if self.linear_weights else None


class CacheRecord(Record):
    """A KV cache of 8-bit integers.

    Attributes:
        text: what its scales were calibrated on: all windows but the last quarter.
        perplexity: on that last quarter.
        perplexity_exact: the same with a cache of fp32.
    """

    text: TextRecord
    perplexity: float
    perplexity_exact: float
