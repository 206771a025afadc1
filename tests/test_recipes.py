"""Recipes: what is written is read back, what would be lost is refused, and the real tools agree."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from owl_deploy.errors import UserError
from owl_deploy.pruning.plan import ALLOCATIONS, METHODS, NM, BlockShare, PruningPlan
from owl_deploy.pruning.recipe.read import Recipe, read_recipe
from owl_deploy.pruning.recipe.write import EXPLICIT_RECIPE, RECIPE, write_recipes
from owl_deploy.rounding import ROUNDED

ROOT = Path(__file__).parents[1]
READY_MADE = sorted((ROOT / "recipes").glob("*.yaml"))
BLOCK = "LlamaDecoderLayer"
LAYERS = [f"model.layers.{index}" for index in range(12)]
FOUND = [0.6 + 0.01 * index for index in range(12)]

GOOD = """\
pruning_stage:
  run_type: oneshot
  pruning_modifiers:
    WandaPruningModifier:
      sparsity: 0.6
      sparsity_profile: owl
      owl_m: 5
      owl_lmbda: 0.08
      mask_structure: "0:0"
      sequential_update: true
      targets: [LlamaDecoderLayer]
"""


def write(plan: PruningPlan, directory: Path, found: list[float] = FOUND) -> tuple[Recipe, Recipe]:
    write_recipes(directory, plan, BLOCK, [share(value) for value in found], LAYERS[: len(found)])
    return read_recipe(directory / RECIPE), read_recipe(directory / EXPLICIT_RECIPE)


def share(sparsity: float) -> BlockShare:
    return BlockShare({"q_proj": sparsity, "o_proj": sparsity})


def read(text: str, directory: Path) -> Recipe:
    path = directory / "given.yaml"
    path.write_text(text, encoding="utf-8")
    return read_recipe(path)


# -------------------- what is written is read back

fractions = st.floats(min_value=0, max_value=1, exclude_max=True)
patterns = st.integers(2, 16).flatmap(lambda of: st.builds(NM, st.integers(1, of - 1), st.just(of)))


@st.composite
def plans(draw: st.DrawFn) -> PruningPlan:
    """Any plan that makes sense."""

    def maybe(values: st.SearchStrategy[Any]) -> Any:
        return draw(st.none() | values)

    method = draw(st.sampled_from(METHODS))
    allocation = draw(st.sampled_from(ALLOCATIONS))
    listed = draw(st.lists(fractions, min_size=2, max_size=12)) if allocation == "explicit" else None
    damped = method in ("sparsegpt", "admm") or method.startswith("ablate")
    try:
        return PruningPlan(
            sparsity=draw(fractions),
            method=method,
            allocation=allocation,
            owl_m=draw(st.one_of(st.integers(1, 20).map(float), st.floats(0.1, 20))),
            half_range=maybe(fractions) if allocation in ("owl", "dlp", "linear") else None,
            block_sparsities=None if listed is None else tuple(listed),
            pattern=maybe(patterns) if allocation == "uniform" else None,
            granularity=maybe(st.sampled_from(["row", "layer"])) if method in ("wanda", "magnitude") else None,
            statistics=maybe(st.sampled_from(["dense", "block", "linear"])) if method != "magnitude" else None,
            target=maybe(st.sampled_from(["layer", "dense"])) if method == "admm" else None,
            ablation=maybe(st.sampled_from(["seq", "iter"])) if method.startswith("ablate") else None,
            block_size=draw(st.integers(1, 4096)),
            dampening=maybe(st.floats(min_value=0, max_value=1e6, exclude_min=True)) if damped else None,
            weights=maybe(st.sampled_from(ROUNDED)),
        )
    except UserError:
        reject()


def is_of_the_tools(plan: PruningPlan) -> bool:
    if plan.is_rounded:
        return False
    usual = {"magnitude": ("layer", None), "wanda": ("row", "block"), "sparsegpt": (None, "block")}
    granularity = "layer" if plan.allocation == "global" and plan.method == "magnitude" else plan.granularity
    if plan.allocation == "global" and plan.method == "sparsegpt":
        granularity = None
    return usual.get(plan.method) == (granularity, plan.statistics)


def essence(plan: PruningPlan) -> PruningPlan:
    """The plan with every setting that its own method and allocation never look at at its default."""
    unused: dict[str, Any] = {}
    if plan.allocation != "owl":
        unused |= {"owl_m": 5.0}
    if plan.method != "sparsegpt":
        unused |= {"block_size": 128}
    if plan.pattern is not None:
        unused["sparsity"] = plan.pattern.prune / plan.pattern.of
    if plan.block_sparsities is not None:
        unused["sparsity"] = fmean(plan.block_sparsities)
    return dataclasses.replace(plan, **unused)


def frozen(plan: PruningPlan, found: list[float]) -> PruningPlan:
    of_global = {"granularity": "layer" if plan.method in ("magnitude", "wanda", "ria", "admm") else None}
    changed: dict[str, Any] = of_global if plan.allocation == "global" and plan.granularity == "global" else {}
    explicit = {"allocation": "explicit", "block_sparsities": tuple(found), "half_range": None, "generations": None}
    return dataclasses.replace(plan, **explicit, **changed)


@settings(deadline=None)  # each example writes two files
@given(plan=plans(), data=st.data())
def test_a_plan_survives_writing_and_reading(
    plan: PruningPlan, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    count = len(plan.block_sparsities or LAYERS)
    found = data.draw(st.lists(fractions, min_size=count, max_size=count))
    asked, explicit = write(plan, tmp_path_factory.mktemp("recipes"), found)
    for recipe in asked, explicit:
        recipe.check_targets(BLOCK, LAYERS[:count])
    if not is_of_the_tools(plan):
        assert asked.plan == plan
        assert explicit.plan == (plan if plan.pattern else frozen(plan, found))
        return
    is_sayable = plan.allocation in ("uniform", "explicit")
    is_sayable |= plan.allocation == "owl" and plan.method != "magnitude" and plan.owl_m.is_integer()
    assert asked.plan == (essence(plan) if is_sayable else essence(frozen(plan, found)))
    assert explicit.plan == (essence(frozen(plan, found)) if plan.pattern is None else essence(plan))


def test_sparsities_that_differ_within_a_block_are_read_back(tmp_path: Path) -> None:
    plan = PruningPlan(0.5, allocation="erdos-renyi")
    shares = [BlockShare({"q_proj": 0.25, "o_proj": 0.75}), BlockShare({"q_proj": 0.5, "o_proj": 0.5})]
    write_recipes(tmp_path, plan, BLOCK, shares, LAYERS[:2])
    assert read_recipe(tmp_path / RECIPE).plan == plan
    found = read_recipe(tmp_path / EXPLICIT_RECIPE).plan
    assert found.allocation == "explicit"
    assert found.linear_sparsities == {
        f"{block}.{name}": value
        for block, share in zip(LAYERS, shares, strict=False)
        for name, value in share.sparsities.items()
    }


def test_the_same_plan_gives_the_same_bytes(tmp_path: Path) -> None:
    write(PruningPlan(0.7), tmp_path)
    first = [(tmp_path / name).read_bytes() for name in (RECIPE, EXPLICIT_RECIPE)]
    write(PruningPlan(0.7), tmp_path)
    assert [(tmp_path / name).read_bytes() for name in (RECIPE, EXPLICIT_RECIPE)] == first


@pytest.mark.parametrize(
    ("plan", "why"),
    [(PruningPlan(0.7, "magnitude"), "no OWL"), (PruningPlan(0.7, owl_m=5.5), "owl_m is an integer")],
)
def test_what_the_format_cannot_say_is_listed_and_said_in_the_header(
    plan: PruningPlan, why: str, tmp_path: Path
) -> None:
    asked, _ = write(plan, tmp_path)
    header = (tmp_path / RECIPE).read_text(encoding="utf-8").splitlines()[0]
    assert asked.plan.block_sparsities == tuple(FOUND)
    assert why in header and f"M {plan.owl_m}" in header


def test_lists_of_different_lengths_are_a_programming_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 shares of 1 blocks"):
        write_recipes(tmp_path, PruningPlan(0.7), BLOCK, [share(0.6), share(0.8)], LAYERS[:1])


# -------------------- recipes of other people

LLMCOMPRESSOR_SAVED = """\
default_stage:
  default_modifiers:
    SparseGPTModifier:
      sparsity: 0.5
      mask_structure: '2:4'
      requires_calibration_data: true
      sequential_update: true
      targets: [LlamaDecoderLayer]
      ignore: ['re:.*lm_head']
      block_size: 64
      dampening_frac: 1e-2
      preserve_sparsity_mask: false
      offload_hessians: true
"""
MAGNITUDE = """\
pruning_stage:
  pruning_modifiers:
    MagnitudePruningModifier:
      targets: [LlamaDecoderLayer]
      init_sparsity: 0.5
      final_sparsity: 0.5
      mask_structure: unstructured
"""


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        (GOOD, PruningPlan(0.6)),
        (GOOD.replace("owl\n", "OWL\n"), PruningPlan(0.6)),
        (LLMCOMPRESSOR_SAVED, PruningPlan(0.5, "sparsegpt", "uniform", pattern=NM(2, 4), block_size=64)),
        (MAGNITUDE, PruningPlan(0.5, "magnitude", "uniform")),
        (json.dumps(yaml.safe_load(GOOD)), PruningPlan(0.6)),
    ],
)
def test_recipes_of_other_people_are_read(text: str, plan: PruningPlan, tmp_path: Path) -> None:
    recipe = read(text, tmp_path)
    assert recipe.plan == plan
    recipe.check_targets(BLOCK, LAYERS)


@pytest.mark.parametrize("path", READY_MADE, ids=lambda path: path.name)
def test_ready_made_recipes_are_readable_and_in_the_table(path: Path) -> None:
    recipe = read_recipe(path)
    (target,) = recipe.targets
    assert target == ("OPTDecoderLayer" if "opt" in path.name else BLOCK)
    table = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8").splitlines()
    row = next(line for line in table if f"`{path.name}`" in line)
    assert f"| {recipe.plan.sparsity:.0%} |" in row
    if recipe.plan.allocation == "owl":
        assert f"| {recipe.plan.owl_m:g} | {recipe.plan.half_range:g} |" in row


# -------------------- refusals

TWO_MODIFIERS = GOOD + "    SparseGPTModifier:\n      sparsity: 0.5\n      targets: [LlamaDecoderLayer]\n"
LISTED = GOOD.replace("0.6", "[0.5, 1.5]").replace("      sparsity_profile: owl\n", "")
WITHOUT_PROFILE = GOOD.replace("      sparsity_profile: owl\n", "")
UNIFORM = WITHOUT_PROFILE.replace("      owl_m: 5\n", "").replace("      owl_lmbda: 0.08\n", "")
TWO_BLOCKS = "targets: [model.layers.0, model.layers.1]"
TWO_MAGNITUDES = MAGNITUDE + MAGNITUDE.replace("pruning_stage:\n", "").replace("pruning_", "more_", 1)


def changed(old: str, new: str, text: str = GOOD) -> str:
    assert text.count(old) == 1
    return text.replace(old, new)


@pytest.mark.parametrize(
    ("line", "message", "text"),
    [
        # what the tools drop in silence
        (3, "must end in _modifiers", changed("pruning_modifiers", "pruning")),
        (3, "call it pruning_modifiers", changed("pruning_modifiers", "modifiers")),
        (2, "did you mean run_type", changed("run_type", "runtype")),
        (1, "no stage holds it", changed("pruning_stage", "pruning")),
        (7, "did you mean owl_m", changed("owl_m:", "owl_mm:")),
        (8, "did you mean owl_lmbda", changed("owl_lmbda", "owl_lambda")),
        (6, "owl_m without", WITHOUT_PROFILE),
        (6, "sparsity_profile is 'owls'", changed("profile: owl", "profile: owls")),
        (6, "needs owl_m too", changed("      owl_m: 5\n", "")),
        (9, "ignore the owl profile", changed("0:0", "2:4")),
        (6, "sparsity is already given on line 5", changed("sparsity_profile: owl", "sparsity: 0.7")),
        (5, "ignore sparsity; set it to 0.75", changed("0:0", "3:4", UNIFORM)),
        (11, "A bare name means nothing", changed("[LlamaDecoderLayer]", "LlamaDecoderLayer")),
        (4, "lacks targets", changed("      targets: [LlamaDecoderLayer]\n", "")),
        # what owl-deploy cannot apply
        (4, "did you mean WandaPruningModifier", changed("WandaPruning", "WandaPrunning")),
        (4, "makes no zeros", changed("WandaPruning", "ConstantPruning")),
        (12, "2 pruning modifiers", TWO_MODIFIERS),
        (12, "second stage", GOOD + "finetuning_stage:\n  run_type: train\n"),
        (2, "run_type must be oneshot", changed("oneshot", "train")),
        (10, "sequential_update is False", changed("true", "false")),
        (11, "leave linears out", changed("LlamaDecoderLayer", "Linear")),
        (11, "leave linears out", changed("LlamaDecoderLayer", "'re:.*q_proj'")),
        (11, "leave linears out", changed("LlamaDecoderLayer", "__ALL__")),
        (11, "not both", changed("LlamaDecoderLayer", "LlamaDecoderLayer, model.layers.1")),
        (11, "named twice", changed("LlamaDecoderLayer", "model.layers.1, model.layers.1")),
        (12, "ignore is", GOOD + "      ignore: ['re:.*down_proj']\n"),
        (5, "not a list", changed("0.6", "[0.5, 0.6]")),
        (5, "3 sparsities for 2 blocks", changed("0.6", "[0.5, 0.6, 0.7]", UNIFORM).replace(
            "targets: [LlamaDecoderLayer]", TWO_BLOCKS)),
        (5, "init_sparsity must equal", changed("init_sparsity: 0.5", "init_sparsity: 0.1", MAGNITUDE)),
        (8, "start is for pruning while training", MAGNITUDE + "      start: 0.0\n"),
        (4, "each name one block", TWO_MAGNITUDES),
        # values
        (5, "sparsity is 1.0", changed("0.6", "1.0")),
        (5, "sparsity is True", changed("0.6", "true")),
        (5, "sparsity is nan", changed("0.6", ".nan")),
        (5, "sparsity is {'a': 0.5}", changed("0.6", "{a: 0.5}")),
        (5, "sparsity is 'eval(s)'", changed("0.6", "eval(s)")),
        (5, "sparsity is 1.5", LISTED),
        (7, "owl_m is 5.5; it must be an integer", changed("owl_m: 5", "owl_m: 5.5")),
        (8, "owl_lmbda is -1", changed("0.08", "-1")),
        (9, "mask_structure is 124; it must be \"N:M\" in quotes", changed('"0:0"', "2:4")),
        (6, "N must be between 1 and M - 1", changed("0:0", "4:2", UNIFORM)),
        (8, "block_size is 0", changed("block_size: 64", "block_size: 0", LLMCOMPRESSOR_SAVED).replace(
            "      requires_calibration_data: true\n      sequential_update: true\n", "")),
        # not a recipe at all
        (1, "must be a mapping", "- pruning_stage\n"),
        (2, "pruning_modifiers must be a mapping", "pruning_stage:\n  pruning_modifiers: [x]\n"),
        (1, "no modifier", "pruning_stage:\n  run_type: oneshot\n"),
        (1, "empty", "# nothing\n"),
        (1, "a key that is not a name", "[1, 2]: 3\n"),
        (6, "not valid YAML", changed("0.6", "[0.6")),
        (5, "cannot be read as a value", changed("0.6", "!!python/object:os.system x")),
        (1, "not valid YAML", "a: \x07\n"),
    ],
)  # fmt: skip
def test_refused_with_file_and_line(line: int, message: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refusal:
        read(text, tmp_path)
    assert str(refusal.value).startswith(f"{tmp_path / 'given.yaml'}:{line}: ")
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: cannot be read \(No such file"):
        read_recipe(tmp_path / "nowhere.yaml")


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"model\.yaml: not a text file"):
        read_recipe(tmp_path / "model.yaml")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("OPTDecoderLayer", "give LlamaDecoderLayer, or 12 names, model.layers.0 to model.layers.11"),
        ("model.layers.0, model.layers.1", "not the blocks"),
        (", ".join(reversed(LAYERS)), "not the blocks"),
    ],
)
def test_targets_that_are_not_all_blocks_in_order(targets: str, message: str, tmp_path: Path) -> None:
    recipe = read(GOOD.replace("LlamaDecoderLayer", targets), tmp_path)
    with pytest.raises(UserError, match=message) as refusal:
        recipe.check_targets(BLOCK, LAYERS)
    assert str(refusal.value).startswith(f"{tmp_path / 'given.yaml'}:11: ")


def test_a_list_of_another_length_than_the_model_is_refused(tmp_path: Path) -> None:
    recipe = read(UNIFORM.replace("0.6", "[0.5, 0.7]"), tmp_path)
    with pytest.raises(UserError, match="2 sparsities for a model of 12 blocks"):
        recipe.check_targets(BLOCK, LAYERS)


# -------------------- the tools themselves

PLANS = {
    f"{method}-{kind}": PruningPlan(method=method, **settings)
    for method in ("magnitude", "wanda", "sparsegpt")
    for kind, settings in {
        "uniform": {"sparsity": 0.7, "allocation": "uniform"},
        "owl": {"sparsity": 0.7, "owl_m": 7.0, "half_range": 0.1},
        "owl-fractional": {"sparsity": 0.7, "owl_m": 5.5},
        "dlp": {"sparsity": 0.7, "allocation": "dlp"},
        "explicit": {"sparsity": 0.7, "allocation": "explicit", "block_sparsities": tuple(reversed(FOUND))},
        "2of4": {"sparsity": 0.5, "allocation": "uniform", "pattern": NM(2, 4)},
    }.items()
} | {"solver": PruningPlan(0.7, "sparsegpt", "uniform", block_size=64, dampening=1e-5)}


def interpreter(name: str) -> Path:
    """The interpreter of a tool's own environment; the test is skipped where there is none."""
    variable = f"OWL_{name.upper()}_PYTHON"
    python = Path(os.environ.get(variable, ROOT / ".venvs" / name / "bin" / "python"))
    if not python.exists():
        pytest.skip(f"no {python}; make it from tests/environments/{name}.txt, or set {variable}")
    return python


def parse_with(tool: str, *recipes: Path) -> subprocess.CompletedProcess[str]:
    """What the tool, in its own environment, makes of recipes."""
    script = ROOT / "tests" / "environments" / f"parse_with_{tool}.py"
    command = [interpreter(tool), script, *recipes]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


both_tools = pytest.mark.parametrize(
    "tool",
    [
        pytest.param("sparseml", marks=pytest.mark.sparseml),
        pytest.param("llmcompressor", marks=pytest.mark.llmcompressor),
    ],
)


@both_tools
def test_the_tool_makes_of_our_recipes_the_modifiers_we_wrote(tool: str, tmp_path: Path) -> None:
    for name, plan in PLANS.items():
        (tmp_path / name).mkdir()
        write(plan, tmp_path / name)
    paths = [*tmp_path.glob("*/*.yaml"), *READY_MADE]
    assert len(paths) == 2 * len(PLANS) + len(READY_MADE)
    run = parse_with(tool, *paths)
    assert run.returncode == 0, run.stderr[-2000:]
    parsed = json.loads(run.stdout)
    for path in paths:
        groups = yaml.safe_load(path.read_text(encoding="utf-8"))["pruning_stage"]
        written = [item for key, group in groups.items() if key != "run_type" for item in group.items()]
        made = parsed[str(path)]
        assert [kind for kind, _ in made] == [kind for kind, _ in written]
        for (_, made_fields), (_, written_fields) in zip(made, written, strict=True):
            assert {name: made_fields[name] for name in written_fields} == written_fields


@both_tools
def test_the_tool_refuses_what_only_we_can_apply(tool: str, tmp_path: Path) -> None:
    write(PruningPlan(0.7, "admm"), tmp_path)
    run = parse_with(tool, tmp_path / RECIPE)
    assert run.returncode != 0
    assert "OwlDeployPruningModifier" in run.stderr
