"""Whether sparse pays, against what and at what perplexity; and models that share a picture."""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from owl_deploy.benchmarking.rows import RESULTS, Row, Samples, read_rows
from owl_deploy.report.findings import findings
from owl_deploy.report.series import by_series, by_workload, short_names
from owl_deploy.report.tables import markdown_table
from owl_deploy.report.verdict import verdict_on
from owl_deploy.report.write import write_report

from .conftest import RunCli, TinyModel
from .test_report import MACHINE, make_dense, make_failed, make_row, results_file

SHAPE = {"architecture": "LlamaForCausalLM, blocks: 30"}
ROUNDS = ("level 0", "level 1", "level 2")


def timed(*medians_ms: float, rounds: tuple[str, ...] = ROUNDS) -> dict[str, Any]:
    """The times of a row: one sample a round."""
    middle = sorted(medians_ms)[len(medians_ms) // 2]
    samples = Samples(ttft=[], decode=[[ms] for ms in medians_ms], rounds=list(rounds[: len(medians_ms)]))
    return {"decode_ms_p50": middle, "samples_ms": samples}


def dense(engine: str, perplexity: float | None, *medians_ms: float, **changes: Any) -> Row:
    fields = SHAPE | timed(*medians_ms) | {"model": "smol", "bundle": "dense", "checkpoint_sha256": "d" * 64}
    return make_dense(engine, perplexity=perplexity, **fields | changes)


def recovered(engine: str, perplexity: float | None, *medians_ms: float, **changes: Any) -> Row:
    """Pruned to 50% and trained further by another tool."""
    fields = SHAPE | timed(*medians_ms) | {"model": "x/smol-50-recovered", "bundle": "r", "checkpoint_sha256": "r" * 64}
    fields |= {"sparsity_asked": None, "sparsity_achieved": 0.5, "perplexity": perplexity, "paper_speedup": None}
    return make_row(engine, **fields | changes)


INT8 = dense("onnxruntime-int8", 26.0, 12, 13, 12, weights="int8")
RECOVERED = "sparse-int8 of smol-50-recovered at 50%"


def test_sparse_pays_where_it_is_faster_in_every_round_at_no_worse_perplexity() -> None:
    rows = [INT8, dense("onnxruntime", 25.9, 30, 31, 30), recovered("sparse-int8", 25.8, 8, 10, 8)]
    assert verdict_on(rows) == [
        f"Sparse pays here: {RECOVERED} decodes 1.50x (1.30–1.50) as fast as dense onnxruntime-int8 of smol "
        "(perplexity 26.00, 12.0 ms a token), at perplexity 25.80.",
        f"Fastest at no worse perplexity than onnxruntime of smol (25.90): {RECOVERED}, 3.75x (3.10–3.75) faster.",
        f"Fastest at no worse perplexity than onnxruntime-int8 of smol (26.00): {RECOVERED}, 1.50x (1.30–1.50) faster.",
    ]


def test_sparse_does_not_pay_where_nothing_sparse_is_as_good() -> None:
    first, line = verdict_on([INT8, recovered("sparse-int8", 47.8, 8, 8, 8)])
    assert first == (
        "Sparse does not pay here: no sparse model is as good as dense onnxruntime-int8 of smol (perplexity 26.00, "
        f"12.0 ms a token); the fastest sparse one, {RECOVERED}, is 1.50x (1.50–1.62) faster at perplexity 47.80."
    )
    assert line.startswith("Nothing is clearly faster at no worse perplexity than onnxruntime-int8 of smol (26.00)")


def test_a_dense_model_that_is_faster_and_nearly_as_good_is_the_one_to_beat() -> None:
    """Beating fp32 alone would mislead: 8-bit weights are faster still, and lose next to nothing."""
    rows = [INT8, dense("onnxruntime", 25.9, 30, 30, 30), recovered("sparse-int8", 25.85, 20, 20, 20)]
    first, over_fp32, _ = verdict_on(rows)
    assert first.startswith("Sparse does not pay here: of the sparse models as good as dense onnxruntime-int8")
    assert first.endswith("is only 0.60x (0.60–0.65) as fast.")
    assert over_fp32.endswith(f": {RECOVERED}, 1.50x (1.50–1.50) faster.")


def test_a_tie_within_the_spread_of_rounds_is_no_gain() -> None:
    first, line = verdict_on([INT8, recovered("sparse-int8", 26.0, 11, 14, 11)])
    assert first.startswith("Sparse does not pay here:")
    assert first.endswith("is as fast within the spread of rounds, 1.09x (0.93–1.09).")
    assert line.startswith("Nothing is clearly faster")


def test_the_fastest_at_a_rivals_perplexity_may_be_dense() -> None:
    rows = [INT8, dense("openvino", 26.5, 24, 26, 24), recovered("sparse-int8", 40.0, 6, 6, 6)]
    assert verdict_on(rows)[-1] == (
        "Fastest at no worse perplexity than openvino of smol (26.50): dense onnxruntime-int8 of smol, "
        "2.00x (2.00–2.00) faster."
    )


def test_rows_of_different_runs_are_compared_by_all_their_rounds() -> None:
    other_run = MACHINE.model_copy(update={"memory_bandwidth_gb_s": 20.0})
    apart = recovered("sparse-int8", 25.0, 10, 12, 10, machine=other_run)
    assert "1.20x (1.00–1.30)" in verdict_on([INT8, apart])[0]


def test_what_older_versions_recorded_is_read_with_its_own_speedups() -> None:
    rows = [make_dense("sparse-int8"), make_row("sparse-int8", 0.5, 1.5, perplexity=11.0)]
    assert verdict_on(rows)[0] == (
        "Sparse pays here: sparse-int8 at 50% decodes 1.50x (1.47–1.53) as fast as dense sparse-int8 "
        "(perplexity 12.00, 20.0 ms a token), at perplexity 11.00."
    )


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([INT8], "no sparse model was measured"),
        ([recovered("sparse-int8", 25.0, 8)], "no dense model was measured"),
        ([INT8, make_failed(model="smol", **SHAPE)], "no sparse model was measured"),
        ([dense("a", None, 12), recovered("b", None, 8)], "without the perplexity of both"),
        ([dense("a", float("nan"), 12), recovered("b", 25.0, 8)], "without the perplexity of both"),
        ([INT8, recovered("b", 25.0, 8, perplexity_text="another text")], "no sparse model is as good"),
    ],
)
def test_what_cannot_be_said_is_not(rows: list[Row], words: str) -> None:
    assert words in verdict_on(rows)[0]


def test_every_machine_has_its_own_verdict() -> None:
    other = MACHINE.model_copy(update={"cpu": "Other CPU"})
    rows = [INT8, recovered("b", 25.0, 8, 8, 8), *(row.model_copy(update={"machine": other}) for row in [INT8])]
    firsts = {name: verdict_on(here)[0].split(":")[0] for name, here in by_workload(rows).items()}
    assert firsts == {"Other CPU": "Whether sparse pays cannot be said", "Test CPU": "Sparse pays here"}


# -------------------- models that share a picture


def test_models_of_one_architecture_share_a_picture_in_which_each_is_named(tmp_path: Path) -> None:
    rows = [dense("sparse-int8", 25.9, 12, 12, 12), recovered("sparse-int8", 26.5, 8, 8, 8)]
    assert list(by_workload(rows)) == [""]
    assert [one.name for one in by_series(rows)] == ["sparse-int8 of smol", "sparse-int8 of smol-50-recovered"]
    assert "| sparse-int8 of smol-50-recovered |" in markdown_table(rows)
    assert not any("no dense row of its own" in finding for finding in findings(rows))
    assert "over the dense smol in the same engine" in findings(rows)[0]
    text = write_report(rows, tmp_path, command="x").read_text(encoding="utf-8")
    assert text.startswith("# Sparse decode speed of smol and smol-50-recovered\n")
    first = text.partition("## What this table shows\n\n- ")[2]
    assert first.startswith("Sparse does not pay here: no sparse model is as good as dense sparse-int8 of smol")


def test_models_of_other_architectures_have_pictures_of_their_own() -> None:
    rows = [INT8, dense("onnxruntime-int8", 20.0, 9, model="large", architecture="LlamaForCausalLM, blocks: 40")]
    assert list(by_workload(rows)) == ["large", "smol"]
    same_name = [INT8, INT8.model_copy(update={"architecture": "LlamaForCausalLM, blocks: 40"})]
    assert sum(map(len, by_workload(same_name).values())) == 2


def test_rows_of_an_older_version_go_with_newer_ones_of_the_same_model() -> None:
    older = INT8.model_copy(update={"architecture": None, "checkpoint_sha256": None, "bundle": "old"})
    assert list(by_workload([older, INT8])) == [""]


def test_models_are_called_by_as_little_as_tells_them_apart() -> None:
    assert short_names(["someone/Tiny-1B"]) == {"someone/Tiny-1B": "Tiny-1B"}
    assert short_names(["/a/run-1/checkpoint", "/a/run-2/checkpoint"]) == {
        "/a/run-1/checkpoint": "run-1/checkpoint",
        "/a/run-2/checkpoint": "run-2/checkpoint",
    }
    assert short_names(["a", "x/a"]) == {"a": "a", "x/a": "x/a"}


def test_the_terminal_ends_with_the_verdict_unless_asked_to_be_quiet(tmp_path: Path, run_cli: RunCli) -> None:
    results = results_file(tmp_path / "results", INT8, recovered("sparse-int8", 25.8, 8, 8, 8))
    shown = run_cli("report", results, "-o", tmp_path / "out").stdout
    assert "\nSparse pays here: sparse-int8 of smol-50-recovered at 50% decodes 1.50x" in shown
    assert run_cli("report", results, "-o", tmp_path / "out", "--quiet").stdout == ""
    assert "Sparse pays" not in run_cli("report", results, "-o", tmp_path / "out", "--json").stdout
    assert len(read_rows(tmp_path / "out" / RESULTS)) == 2


# -------------------- from checkpoints to the verdict


def trained_further(checkpoint: Path, out: Path) -> Path:
    """As another tool leaves it: half of each block linear's weights zero, the others changed, no `pruning.json`."""
    shutil.copytree(checkpoint, out)
    tensors = load_file(out / "model.safetensors")
    for name, weight in tensors.items():
        if "layers." in name and weight.ndim == 2:
            weight[:, ::2] = 0
            weight *= 1.01
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_a_model_that_another_tool_trained_further_is_compared_with_its_dense_one(
    tmp_path: Path, tiny_model: TinyModel, run_cli: RunCli
) -> None:
    base, deeper = tiny_model("llama"), tiny_model("llama", num_hidden_layers=5)
    checkpoints = {"deeper": deeper, "smol": base, "smol-50-recovered": trained_further(base, tmp_path / "trained")}
    for name, checkpoint in checkpoints.items():
        assert run_cli("export", shutil.copytree(checkpoint, tmp_path / name), "-o", tmp_path / f"b-{name}").code == 0
    bundles = [tmp_path / f"b-{name}" for name in checkpoints]
    workload = ("--prompt", 8, "--new-tokens", 4, "--threads", 1, "--max-load", 99, "--repetitions", 2)
    ran = run_cli("bench", *bundles, "-o", tmp_path / "out", *workload, "--json")
    assert ran.code == 0
    rows = {Path(row.model).name: row for row in map(Row.model_validate_json, ran.stdout.splitlines())}
    assert rows["smol"].speedup_same_engine == rows["deeper"].speedup_same_engine == 1
    shared = set(rows["smol"].samples_ms.rounds) & set(rows["smol-50-recovered"].samples_ms.rounds)
    dense, sparse = (
        [statistics.median(row.samples_ms.decode[row.samples_ms.rounds.index(name)]) for name in sorted(shared)]
        for row in (rows["smol"], rows["smol-50-recovered"])
    )
    expected = statistics.median(there / here for there, here in zip(dense, sparse, strict=True))
    assert rows["smol-50-recovered"].speedup_same_engine == pytest.approx(expected)
    pictures = {name: {row.model for row in here} for name, here in by_workload(list(rows.values())).items()}
    assert {name: len(models) for name, models in pictures.items()} == {"deeper": 1, "smol and smol-50-recovered": 2}
