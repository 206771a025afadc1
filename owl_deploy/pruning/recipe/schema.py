"""What a recipe's modifiers may say: their classes, and the values of each field."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from owl_deploy.pruning.plan import Ablation, Allocation, Granularity, Method, Statistics, Target
from owl_deploy.rounding import Rounded

CLASS_OF: dict[Method, str] = {
    "magnitude": "MagnitudePruningModifier",
    "wanda": "WandaPruningModifier",
    "sparsegpt": "SparseGPTModifier",
}
OWN_CLASS = "OwlDeployPruningModifier"
UNSTRUCTURED = "0:0"


def _refuse_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a truth value is not a number")
    return value


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _number_or_list(value: object) -> str:
    return "list" if isinstance(value, list) else "number"


_Real = Annotated[float, BeforeValidator(_refuse_bool), Field(allow_inf_nan=False)]
_Integer = Annotated[int, BeforeValidator(_refuse_bool), Field(ge=1)]
_Fraction = Annotated[_Real, Field(ge=0, lt=1)]
_FractionOrList = Annotated[
    Annotated[_Fraction, Tag("number")] | Annotated[tuple[_Fraction, ...], Field(min_length=1), Tag("list")],
    Discriminator(_number_or_list),
]
_NM_PATTERN = r"[0-9]+:[0-9]+"


class Modifier(BaseModel):
    """Fields that every modifier has. A description says, in messages, what the field must be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    targets: tuple[str, ...] = Field(
        min_length=1,
        description="a list: of the class of the model's blocks, such as [LlamaDecoderLayer], or of all its "
        "blocks. A bare name means nothing to llm-compressor, and no targets mean all linears to it",
    )
    mask_structure: str = Field(
        default=UNSTRUCTURED,
        pattern=f"^{_NM_PATTERN}$",
        description='"N:M" in quotes (N of every M weights are pruned), or "0:0" for unstructured',
    )


class Wanda(Modifier):
    sparsity: _FractionOrList = Field(
        description="a fraction from 0 up to, not including, 1, or a list of these, one for each block"
    )
    sparsity_profile: Annotated[Literal["owl"] | None, BeforeValidator(_lower)] = Field(
        default=None, description="owl, or left out; SparseML ignores any other"
    )
    owl_m: _Integer | None = Field(default=None, description="an integer of at least 1")
    owl_lmbda: _Fraction | None = Field(default=None, description="a number from 0 up to, not including, 1")
    sequential_update: Literal[True] = Field(
        default=True, description="true: each block is calibrated on what the pruned blocks before it put out"
    )
    ignore: tuple[Literal["lm_head", "re:.*lm_head"], ...] = Field(
        default=(), description="[lm_head], which stays dense anyway; every linear of a block is pruned"
    )
    requires_calibration_data: Literal[True] = Field(default=True, description="true, or left out")


class SparseGPT(Wanda):
    block_size: _Integer = Field(default=128, description="an integer of at least 1")
    dampening_frac: Annotated[_Real, Field(gt=0)] = Field(default=0.01, description="a number above 0")
    preserve_sparsity_mask: Literal[False] = Field(default=False, description="false: owl-deploy chooses the mask anew")
    offload_hessians: bool = Field(default=False, description="true or false")


class Magnitude(Modifier):
    init_sparsity: _Fraction = Field(description="a fraction from 0 up to, not including, 1")
    final_sparsity: _Fraction = Field(description="a fraction from 0 up to, not including, 1")
    mask_structure: str = Field(
        default="unstructured",
        pattern=f"^({_NM_PATTERN}|unstructured)$",
        description='"N:M" in quotes (N of every M weights are pruned), or unstructured',
    )
    leave_enabled: bool = Field(default=True, description="true or false")
    apply_globally: Literal[False] = Field(default=False, description="false: each linear has its own threshold")


class Own(Modifier):
    """A plan of ours, field by field; `PruningPlan` checks what goes together."""

    sparsity: _Fraction = Field(description="a fraction from 0 up to, not including, 1")
    method: Method = Field(description="one of owl-deploy's methods")
    allocation: Allocation = Field(description="one of owl-deploy's allocations")
    owl_m: _Real = Field(default=5.0, description="a number above 0")
    half_range: _Real | None = Field(default=None, description="a number from 0")
    block_sparsities: tuple[_Fraction, ...] | None = Field(
        default=None, description="a list of fractions, one for each block"
    )
    linear_sparsities: dict[str, _Fraction] | None = Field(
        default=None, description="a fraction for each linear, by its full name"
    )
    granularity: Granularity | None = Field(default=None, description="row, layer or global")
    statistics: Statistics | None = Field(default=None, description="dense, block or linear")
    target: Target | None = Field(default=None, description="layer or dense")
    ablation: Ablation | None = Field(default=None, description="seq or iter")
    block_size: _Integer = Field(default=128, description="an integer of at least 1")
    dampening: _Real | None = Field(default=None, description="a number above 0")
    admm_steps: _Integer = Field(default=20, description="an integer of at least 1")
    weights: Rounded | None = Field(default=None, description="int8, int4 or int3")
    linear_weights: dict[str, Rounded] | None = Field(
        default=None, description="int8, int4 or int3 for each linear, by its full name"
    )
    generations: _Integer | None = Field(default=None, description="an integer of at least 1")
    bits: _Real | None = Field(default=None, description="a number from 2 to 16")
    mask_structure: str = Field(
        default=UNSTRUCTURED,
        pattern=f"^(mixed-)?{_NM_PATTERN}$",
        description='"N:M" or "mixed-N:M" in quotes, or "0:0" for unstructured',
    )


MODELS: dict[str, type[Modifier]] = {
    CLASS_OF["magnitude"]: Magnitude,
    CLASS_OF["wanda"]: Wanda,
    CLASS_OF["sparsegpt"]: SparseGPT,
    OWN_CLASS: Own,
}
TRAINING_FIELDS = ("start", "end", "update", "update_scheduler", "scheduler_args")
