"""What `bundle.json` says of one graph: how its logits agree, and how each matrix is stored."""

from __future__ import annotations

from owl_deploy.records import Record
from owl_deploy.sparse.formats import Stored


class ParityRecord(Record):
    """Agreement of two sets of logits, position by position.

    Attributes:
        reference: what computed the logits compared with: torch, or one of `REFERENCES`.
        positions, positions_with_past: compared without and with a cache.
        max_abs_difference, max_abs_difference_with_past: of any logit, at any position; without and with a cache.
        argmax_agreement: fraction of positions with the same most likely token.
        relative_difference: the norm of the difference over that of the reference's logits, each position's mean
            logit taken off; what rounding weights changes.
    """

    reference: str
    positions: int
    positions_with_past: int
    max_abs_difference: float
    max_abs_difference_with_past: float
    argmax_agreement: float
    relative_difference: float | None = None


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
