"""Recovery trains what was kept, keeps every zero, and continues an interrupted run to the same bytes."""

from __future__ import annotations

import csv
import json
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from owl_deploy.evaluation.perplexity import perplexity
from owl_deploy.models.load import load_model
from owl_deploy.models.source import ModelSource
from owl_deploy.models.structure import find_blocks
from owl_deploy.recovery import blocks as by_blocks
from owl_deploy.recovery import teacher as teachers
from owl_deploy.recovery import training
from owl_deploy.recovery.losses import Seen, cross_entropy, kl, squarehead
from owl_deploy.recovery.plan import RecoveryPlan, parse_tokens
from owl_deploy.recovery.save import Zeros
from owl_deploy.recovery.teacher import RememberingTeacher, Teacher, teacher_of
from owl_deploy.recovery.text import training_text
from owl_deploy.recovery.train import Trainer
from owl_deploy.recovery.weights import KeptWeights, LowRank
from owl_deploy.rounding import GRIDS

from .conftest import FAMILIES, RunCli, TinyModel, linears_in

TOKENS = 640
PRUNED = ["--sparsity", "0.5", "--method", "magnitude", "--allocation", "uniform", "--quiet"]
OPTIONS = ["--tokens", TOKENS, "--seqlen", 16, "--evaluations", 2, "--lr", "0.0005", "--quiet"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ids with a pattern, so that there is something to learn."""
    path = tmp_path_factory.mktemp("text") / "text.npy"
    rng = np.random.default_rng(0)
    starts = rng.integers(0, 96, (48, 1))
    np.save(path, (starts + 7 * np.arange(16)) % 96)
    return path


@pytest.fixture
def sparse(run_cli: RunCli, tiny_model: TinyModel, tmp_path: Path) -> Path:
    made = tmp_path / "sparse"
    assert run_cli("prune", tiny_model("llama"), "-o", made, *PRUNED).code == 0
    return made


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_every_zero_stays_and_what_was_kept_is_trained(
    run_cli: RunCli, tiny_model: TinyModel, sparse: Path, text: Path, tmp_path: Path
) -> None:
    dense, out = tiny_model("llama"), tmp_path / "out"
    ran = run_cli("recover", sparse, "--dense", dense, "-o", out, "--text", text, *OPTIONS, "--json")
    assert ran.code == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert told["zeros_kept"] is True
    assert told["tokens"] == TOKENS and told["steps"] == 10
    assert told["tokens_per_s"] > 0 and told["seconds"]["train"] > 0
    assert told["perplexity"] == told["held_out"]
    before, after = weights(sparse), weights(out)
    assert before.keys() == after.keys()
    assert all(not after[name][tensor == 0].any() for name, tensor in before.items() if "proj" in name)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"model.norm.weight", "model.layers.0.mlp.down_proj.weight"} <= changed
    assert not {name for name in changed if "embed" in name or "head" in name}
    assert {path.name for path in out.iterdir()} >= {
        *("recovery.json", "recovery.csv", "recovery.png", "recipe.yaml", "pruning.json")
    }
    with (out / "recovery.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 11))
    assert sum(row["perplexity"] != "" for row in rows) == 2
    assert float(rows[-1]["loss"]) < 0.8 * float(rows[0]["loss"])


def test_the_same_inputs_give_the_same_bytes_also_after_a_kill(
    run_cli: RunCli, tiny_model: TinyModel, sparse: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["recover", sparse, "--dense", tiny_model("llama"), "--text", text, *OPTIONS, "--patience", 2]
    assert run_cli(*arguments, "-o", tmp_path / "whole").code == 0
    monkeypatch.setattr(training, "_SAVED_EVERY_S", 0)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted_at(7, Trainer.step))
        assert run_cli(*arguments, "-o", tmp_path / "out").code == 130
    assert not (tmp_path / "out").exists()
    saved = json.loads((tmp_path / ".out.unfinished" / "facts.json").read_text())
    steps: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", counted(steps, Trainer.step))
        assert run_cli(*arguments, "-o", tmp_path / "out").code == 0
    assert len(steps) == 10 - 6
    assert json.loads((tmp_path / "out" / "recovery.json").read_text())["seconds"]["train"] > saved["seconds"]
    for name in ("model.safetensors", "recovery.csv", "recovery.png", "recipe.yaml"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    made = run_cli(*arguments[:-3], "--patience", 2, "-o", tmp_path / "out")
    assert made.code == 0  # and nothing is done again
    other = run_cli(*arguments, "--seed", 1, "-o", tmp_path / "out")
    assert other.code == 2 and "other inputs" in other.stderr
    assert not list(tmp_path.glob(".*"))


def test_a_disk_that_fills_up_leaves_the_last_save(
    run_cli: RunCli, tiny_model: TinyModel, sparse: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["recover", sparse, "--dense", tiny_model("llama"), "--text", text, *OPTIONS]
    assert run_cli(*arguments, "-o", tmp_path / "whole").code == 0
    monkeypatch.setattr(training, "_SAVED_EVERY_S", 0)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted_at(4, Trainer.step))
        assert run_cli(*arguments, "-o", tmp_path / "out").code == 130
    saved = (tmp_path / ".out.unfinished" / "state.safetensors").read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # a larger file fails as on a full disk
    try:
        ran = run_cli(*arguments, "-o", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ran.code == 2 and "cannot be written" in ran.stderr and "make room" in ran.stderr
    assert (tmp_path / ".out.unfinished" / "state.safetensors").read_bytes() == saved
    assert run_cli(*arguments, "-o", tmp_path / "out").code == 0
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole


def interrupted_at(number: int, step: Any) -> Any:
    def interrupted(self: Trainer, ids: Any) -> Any:
        if len(self.log) + 1 == number:
            raise KeyboardInterrupt
        return step(self, ids)

    return interrupted


def counted(steps: list[int], step: Any) -> Any:
    def count(self: Trainer, ids: Any) -> Any:
        steps.append(len(self.log))
        return step(self, ids)

    return count


def test_prune_and_recover_in_one_go(run_cli: RunCli, tiny_with_tokenizer: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text(" ".join(f"word{7 * index % 95}" for index in range(4000)))
    arguments = [
        "prune",
        tiny_with_tokenizer,
        "--sparsity",
        "0.5",
        "--calibration",
        words,
        "--samples",
        4,
        "--seqlen",
        16,
    ]
    out = tmp_path / "out"
    assert run_cli(*arguments, "--recover-text", words, "-o", out).code == 2
    assert run_cli(*arguments, "--recover", 640, "--offload", "-o", out).code == 2
    assert not list(tmp_path.glob("out*"))
    ran = run_cli(*arguments, "--recover", 640, "--weights", "int4", "-o", out, "--json", "--quiet")
    assert ran.code == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert told["tokens"] == 640 and told["model"] == str(tmp_path / "out.pruned") and told["plan"]["seqlen"] == 16
    pruned, after = linears_in(tmp_path / "out.pruned"), linears_in(out)
    assert sum(int((weight == 0).sum()) for weight in pruned.values()) > 0
    for name, weight in after.items():
        assert not weight[pruned[name] == 0].any()
        assert torch.equal(GRIDS["int4"].rounded(weight), weight)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_model_trained_on_a_grid_is_on_it(
    name: Any, run_cli: RunCli, tiny_model: TinyModel, sparse: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = [sparse, "--dense", tiny_model("llama"), "-o", out, "--text", text, *OPTIONS, "--weights", name]
    ran = run_cli("recover", *arguments)
    assert ran.code == 0, ran.stderr
    for linear, weight in linears_in(out).items():
        assert torch.equal(GRIDS[name].rounded(weight), weight), linear
        assert not weight[linears_in(sparse)[linear] == 0].any()


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_rounded_weights_are_exported_as_they_were_trained(
    run_cli: RunCli, tiny_model: TinyModel, text: Path, tmp_path: Path, weights: str
) -> None:
    dense, sparse, out = tiny_model("llama", head_dim=16), tmp_path / "sparse", tmp_path / "out"
    assert run_cli("prune", dense, "-o", sparse, *PRUNED).code == 0
    arguments = [sparse, "--dense", dense, "-o", out, "--text", text, *OPTIONS, "--weights", weights]
    assert run_cli("recover", *arguments).code == 0
    bundle = tmp_path / "bundle"
    ran = run_cli("export", out, "-o", bundle, "--flavor", "sparse", "--weights", weights, "--head", "fp32", "--quiet")
    assert ran.code == 0, ran.stderr
    manifest = json.loads((bundle / "bundle.json").read_text())
    assert manifest["flavors"][f"sparse-{weights}"]["packed"]["error"] == 0.0
    assert manifest["flavors"][f"sparse-{weights}"]["parity"]["max_abs_difference"] < 5e-3
    assert manifest["base_sha256"] == ModelSource("dense", dense).fingerprint()


def test_a_dense_model_can_be_trained_on_a_grid(
    run_cli: RunCli, tiny_model: TinyModel, text: Path, tmp_path: Path
) -> None:
    dense = tiny_model("llama")
    arguments = ["recover", dense, "--dense", dense, "-o", tmp_path / "out", "--text", text, *OPTIONS]
    refused = run_cli(*arguments)
    assert refused.code == 2 and "nothing was pruned" in refused.stderr
    assert run_cli(*arguments, "--weights", "int4").code == 0


def test_recoveries_chain(run_cli: RunCli, tiny_model: TinyModel, sparse: Path, text: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for source, out in ((sparse, first), (first, second)):
        ran = run_cli("recover", source, "--dense", tiny_model("llama"), "-o", out, "--text", text, *OPTIONS)
        assert ran.code == 0, ran.stderr
    told = json.loads((second / "recovery.json").read_text())
    assert [earlier["model"] for earlier in told["earlier"]] == [str(sparse)]
    assert (second / "recipe.yaml").read_text().count("finetuning_stage:") == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_keeps_its_dtype(
    dtype: torch.dtype, run_cli: RunCli, tiny_model: TinyModel, text: Path, tmp_path: Path
) -> None:
    dense, sparse, out = tiny_model("llama", dtype=dtype), tmp_path / "sparse", tmp_path / "out"
    assert run_cli("prune", dense, "-o", sparse, *PRUNED).code == 0
    assert run_cli("recover", sparse, "--dense", dense, "-o", out, "--text", text, *OPTIONS).code == 0
    before, after = weights(sparse), weights(out)
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_recovers(family: str, tiny_model: TinyModel, text: Path) -> None:
    dense, model = (load_model(ModelSource(family, tiny_model(family))) for _ in range(2))
    blocks = find_blocks(model)
    for block in blocks:
        for linear in block.linears.values():
            linear.weight[linear.weight.abs() < linear.weight.abs().median()] = 0
    zeros = Zeros(blocks)
    plan = RecoveryPlan(64 * 20, seqlen=16, learning_rate=3e-4, warmup=0, positions=1.0)
    trainer = Trainer(model, KeptWeights(model, blocks), Teacher(dense, plan), plan)
    ids = np.load(text)
    losses = [trainer.step(ids[:4]).loss for _ in range(12)]
    assert losses[-1] < losses[0]
    assert zeros.lost(find_blocks(trainer.finish(merge=True))) == []


def test_bf16_passes_train_fp32_weights(tiny_model: TinyModel, text: Path) -> None:
    dense = load_model(ModelSource("dense", tiny_model("llama")), torch.bfloat16)
    model = load_model(ModelSource("sparse", tiny_model("llama")))
    embedding = model.get_input_embeddings().weight.detach().clone()
    plan = RecoveryPlan(640, seqlen=16, cross_entropy=1.0, warmup=0)
    trainer = Trainer(model, KeptWeights(model, find_blocks(model)), Teacher(dense, plan), plan)
    assert model.dtype == torch.bfloat16
    trainer.step(np.load(text)[:4])
    trained = trainer.finish(merge=True)
    weight = trained.get_parameter("model.layers.0.mlp.down_proj.weight")
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())
    assert torch.equal(trained.get_input_embeddings().weight, embedding)


# -------------------- the dense model's states


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_states_that_are_kept_are_those_of_a_pass(
    family: str, tiny_model: TinyModel, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(ModelSource(family, tiny_model(family)))
    ids, positions = np.load(text), torch.tensor([0, 3, 11])
    plan = RecoveryPlan(10 * ids.size, seqlen=16, passes=10)
    teacher = teacher_of(model, plan, ids, tmp_path)
    if not isinstance(teacher, RememberingTeacher):  # its logits are not the head's alone
        assert getattr(model.config, "final_logit_softcapping", None) or getattr(model.config, "logit_scale", None)
        return
    sequences = torch.from_numpy(ids[[5, 2]])
    wanted, seen = Teacher(model, plan).seen(sequences, positions), teacher.seen(sequences, positions)
    torch.testing.assert_close(seen.hidden[-1], wanted.hidden[-1])
    torch.testing.assert_close(seen.logits, wanted.logits)
    monkeypatch.setattr(teachers, "forward_at", None)
    for again in (teacher, RememberingTeacher(model, plan, ids, tmp_path)):  # and a later run finds them
        assert torch.equal(again.seen(sequences, positions).logits, seen.logits)


def test_a_text_that_is_repeated_goes_through_the_dense_model_once(
    run_cli: RunCli, tiny_model: TinyModel, sparse: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["recover", sparse, "--dense", tiny_model("llama"), "--text", text, *OPTIONS, "--tokens", 2400]
    passes: list[int] = []
    forward_at = teachers.forward_at

    def passing(model: Any, sequences: torch.Tensor, positions: torch.Tensor, **options: Any) -> Any:
        passes.append(len(sequences))
        return forward_at(model, sequences, positions, **options)

    with monkeypatch.context() as patch:
        patch.setattr(teachers, "forward_at", passing)
        assert run_cli(*arguments, "-o", tmp_path / "whole").code == 0
    windows, trained = len(np.load(text)) - 2, 38 * 4
    assert trained > 3 * windows
    different = len(np.unique(np.load(text), axis=0))
    assert sum(passes) - trained <= different + 1  # of the dense model, which is also tried once
    monkeypatch.setattr(training, "_SAVED_EVERY_S", 0)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted_at(20, Trainer.step))
        assert run_cli(*arguments, "-o", tmp_path / "out").code == 130
    assert run_cli(*arguments, "-o", tmp_path / "out").code == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


# -------------------- LoRA

LORA = ["--method", "lora", "--lr", "0.01"]


def test_lora_changes_nothing_at_first_and_merges_exactly(tiny_model: TinyModel, sparse: Path, text: Path) -> None:
    dense, model, untouched = (load_model(ModelSource("it", path)) for path in (tiny_model("llama"), sparse, sparse))
    blocks, ids = find_blocks(model), torch.from_numpy(np.load(text)[:4])
    zeros = Zeros(blocks)
    what = LowRank(blocks, ("q_proj", "v_proj"), rank=4, alpha=8, dropout=0.1, masked=True, seed=0)
    assert torch.equal(model(ids).logits, untouched(ids).logits)
    plan = RecoveryPlan(640, seqlen=16, method="lora", merge=True, learning_rate=0.01)
    trainer = Trainer(model, what, Teacher(dense, plan), plan)
    for _ in range(3):
        trainer.step(ids.numpy())
    with torch.no_grad():
        unmerged = model(ids).logits
        merged = trainer.finish(merge=True)(ids).logits
    assert not torch.equal(unmerged, untouched(ids).logits)
    torch.testing.assert_close(merged, unmerged, rtol=1e-5, atol=1e-6)
    assert zeros.lost(blocks) == []


def test_lora_by_the_command_also_after_a_kill(
    run_cli: RunCli, tiny_model: TinyModel, sparse: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["recover", sparse, "--dense", tiny_model("llama"), "--text", text, *OPTIONS, *LORA]
    assert run_cli(*arguments, "-o", tmp_path / "whole").code == 0
    monkeypatch.setattr(training, "_SAVED_EVERY_S", 0)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted_at(5, Trainer.step))
        assert run_cli(*arguments, "-o", tmp_path / "out").code == 130
    assert run_cli(*arguments, "-o", tmp_path / "out").code == 0
    before, after, whole = weights(sparse), weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert all(torch.equal(after[name], whole[name]) for name in whole)
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"q_proj", "v_proj"}
    assert not any(after[name][tensor == 0].any() for name, tensor in before.items() if "proj" in name)


def test_an_adapter_is_one_of_peft(
    run_cli: RunCli, tiny_model: TinyModel, sparse: Path, text: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    out = tmp_path / "adapter"
    arguments = ["--text", text, *OPTIONS, *LORA, "--no-merge", "--evaluate", text, "--json"]
    ran = run_cli("recover", sparse, "--dense", tiny_model("llama"), "-o", out, *arguments)
    assert ran.code == 0, ran.stderr
    model = peft.PeftModel.from_pretrained(load_model(ModelSource("sparse", sparse)), out)
    measured = perplexity(model, np.load(text))
    assert measured == pytest.approx(json.loads(ran.stdout)["perplexity"]["after"], rel=1e-6)
    assert measured != pytest.approx(json.loads(ran.stdout)["perplexity"]["before"], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--lora-targets", "query"], "no linear has this name; there are down_proj"),
        (["--weights", "int4"], "rounds what --method full trains"),
        (["--method", "full", "--no-merge"], "has no adapter"),
        (["--method", "prompt"], "one of full, lora, blocks"),
    ],
)
def test_lora_that_makes_no_sense(
    options: list[str], told: str, run_cli: RunCli, tiny_model: TinyModel, sparse: Path, text: Path, tmp_path: Path
) -> None:
    arguments = ["--dense", tiny_model("llama"), "-o", tmp_path / "out", "--text", text, *OPTIONS, *LORA]
    ran = run_cli("recover", sparse, *arguments, *options)
    assert ran.code == 2 and told in ran.stderr and len(ran.stderr.splitlines()) == 1


# -------------------- block by block

BLOCKS = ["--method", "blocks", "--lr", "0.001"]


@pytest.mark.parametrize("offload", [False, True])
def test_blocks_come_closer_to_the_dense_ones(
    offload: bool, run_cli: RunCli, tiny_model: TinyModel, sparse: Path, text: Path, tmp_path: Path
) -> None:
    dense, out = tiny_model("llama"), tmp_path / "out"
    arguments = ["recover", sparse, "--dense", dense, "--text", text, *OPTIONS, *BLOCKS, "--json"]
    ran = run_cli(*arguments, "-o", out, *(["--offload"] if offload else []))
    assert ran.code == 0, ran.stderr
    before, after = weights(sparse), weights(out)
    assert not any(after[name][tensor == 0].any() for name, tensor in before.items() if "proj" in name)
    assert {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    ids = torch.from_numpy(np.load(text))
    wanted, had, has = (
        load_model(ModelSource("it", path))(ids, output_hidden_states=True).hidden_states[-1]
        for path in (dense, sparse, out)
    )
    assert (has - wanted).norm() < 0.8 * (had - wanted).norm()
    if offload:
        assert run_cli(*arguments, "-o", tmp_path / "in-memory").code == 0
        whole = weights(tmp_path / "in-memory")
        assert all(torch.equal(tensor, whole[name]) for name, tensor in after.items())


def test_blocks_are_continued_after_a_kill(
    run_cli: RunCli, tiny_model: TinyModel, sparse: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["recover", sparse, "--dense", tiny_model("llama"), "--text", text, *OPTIONS, *BLOCKS]
    assert run_cli(*arguments, "-o", tmp_path / "whole").code == 0
    fitted: list[int] = []

    def fit(until: int) -> Any:
        def fits(block: Any, stream: Any, wanted: Any, text: Any, plan: Any, number: int) -> None:
            if number == until:
                raise KeyboardInterrupt
            fitted.append(number)
            original(block, stream, wanted, text, plan, number)

        return fits

    original = by_blocks._fit
    with monkeypatch.context() as patch:
        patch.setattr(by_blocks, "_fit", fit(until=2))
        assert run_cli(*arguments, "-o", tmp_path / "out").code == 130
        patch.setattr(by_blocks, "_fit", fit(until=9))
        assert run_cli(*arguments, "-o", tmp_path / "out").code == 0
    assert fitted == [0, 1, 2]
    whole = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(tmp_path / "out").items())


@pytest.mark.parametrize(
    "options", [["--offload"], [*BLOCKS, "--offload", "--text", "self"], [*BLOCKS, "--weights", "int4"]]
)
def test_what_cannot_be_offloaded_or_done_by_blocks(
    options: list[str], run_cli: RunCli, tiny_model: TinyModel, sparse: Path, text: Path, tmp_path: Path
) -> None:
    arguments = ["--dense", tiny_model("llama"), "-o", tmp_path / "out", "--text", text, *OPTIONS]
    ran = run_cli("recover", sparse, *arguments, *options)
    assert ran.code == 2 and len(ran.stderr.splitlines()) == 1


# -------------------- what it is asked


@pytest.mark.parametrize(("text", "tokens"), [("150k", 150_000), ("2M", 2_000_000), ("1.5M", 1_500_000), ("64", 64)])
def test_numbers_of_tokens(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("asked", ["0", "-1", "1m", "many", "", "1e6", "nan"])
def test_no_number_of_tokens(asked: str, run_cli: RunCli, sparse: Path, tmp_path: Path) -> None:
    ran = run_cli("recover", sparse, "--dense", sparse, "-o", tmp_path / "out", "--text", "demo", "--tokens", asked)
    assert ran.code == 2 and "--tokens" in ran.stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--lr", value) for value in ("0", "nan", "-1")),
        *(("--kl", value) for value in ("-1", "inf")),
        *(("--positions", value) for value in ("0", "1.1")),
        *(("--states", "first"), ("--weights", "int5"), ("--micro-batch", "3")),
    ],
)
def test_plans_that_make_no_sense(option: str, value: str, run_cli: RunCli, sparse: Path, tmp_path: Path) -> None:
    ran = run_cli("recover", sparse, "--dense", sparse, "-o", tmp_path / "out", "--text", "demo", option, value)
    assert ran.code == 2 and len(ran.stderr.splitlines()) == 1


def test_another_dense_model_is_refused(
    run_cli: RunCli, tiny_model: TinyModel, sparse: Path, text: Path, tmp_path: Path
) -> None:
    arguments = ["-o", tmp_path / "out", "--text", text, *OPTIONS]
    other = tiny_model("llama", rope_theta=5000.0)
    ran = run_cli("recover", sparse, "--dense", other, *arguments)
    assert ran.code == 2 and "is not what" in ran.stderr and "was pruned from" in ran.stderr
    unknown = shutil.copytree(sparse, tmp_path / "unknown")
    (unknown / "pruning.json").unlink()
    ran = run_cli("recover", unknown, "--dense", tiny_model("llama", num_hidden_layers=2), *arguments)
    assert ran.code == 2 and "is no dense model of" in ran.stderr
    assert run_cli("recover", unknown, "--dense", tiny_model("llama"), *arguments).code == 0


def test_a_text_that_is_too_short(
    run_cli: RunCli, tiny_model: TinyModel, sparse: Path, text: Path, tmp_path: Path
) -> None:
    arguments = ["--dense", tiny_model("llama"), "-o", tmp_path / "out", "--text", text, *OPTIONS]
    ran = run_cli("recover", sparse, *arguments, "--tokens", "1M")
    assert ran.code == 2
    assert "768 tokens, of which 32 are held out, make 2944 in 4 passes, not the 1000000 asked for" in ran.stderr


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_save(
    run_cli: RunCli, tiny_model: TinyModel, sparse: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_SAVED_EVERY_S", 0)
    monkeypatch.setattr("owl_deploy.recovery.train.kl", nan_from(4))
    arguments = ["--dense", tiny_model("llama"), "-o", tmp_path / "out", "--text", text, *OPTIONS]
    ran = run_cli("recover", sparse, *arguments)
    assert ran.code == 1
    assert "step 4: the loss or its gradient is not a finite number" in ran.stderr
    assert "out.step-3" in ran.stderr
    kept = weights(tmp_path / "out.step-3")
    assert all(bool(tensor.isfinite().all()) for tensor in kept.values())
    assert not torch.equal(kept["model.norm.weight"], weights(sparse)["model.norm.weight"])
    assert not (tmp_path / "out").exists()


def nan_from(step: int) -> Any:
    calls = []

    def loss(ours: Seen, theirs: Seen) -> torch.Tensor:
        calls.append(1)
        return kl(ours, theirs) * (torch.nan if len(calls) > 2 * (step - 1) else 1.0)  # two micro-batches a step

    return loss


# -------------------- the text


def test_held_out_windows_are_not_trained_on_and_each_pass_has_its_own_order(text: Path) -> None:
    plan = RecoveryPlan(16 * 100, seqlen=16)
    made = training_text(str(text), None, plan)
    assert len(made.windows.ids) + len(made.held_out.ids) == 48
    count = len(made.windows.ids)
    orders = [list(made.order(number, 0)) for number in range(2)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == list(range(count))
    taken = np.concatenate([made.step(step, 4, 0) for step in range(count // 2)])
    expected = np.concatenate([made.windows.ids[order] for order in orders])
    np.testing.assert_array_equal(taken, expected[: len(taken)])


def test_the_dense_model_writes_the_text_itself(
    run_cli: RunCli, tiny_model: TinyModel, sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("owl_deploy.recovery.self_text._BATCH", 8)
    arguments = ["recover", sparse, "--dense", tiny_model("llama"), "--text", "self", *OPTIONS]
    assert run_cli(*arguments, "-o", tmp_path / "out").code == 0
    written = np.load(tmp_path / "out" / "text.npy")
    assert written.shape == (10 + 16, 16)  # 40 sequences in 4 passes, and what is held out
    assert written.min() >= 0 and written.max() < 96 and len(np.unique(written)) > 40
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted_at(2, Trainer.step))
        assert run_cli(*arguments, "-o", tmp_path / "again").code == 130
    with monkeypatch.context() as patch:
        patch.setattr("owl_deploy.recovery.self_text._sample", None)  # all of it was written
        assert run_cli(*arguments, "-o", tmp_path / "again").code == 0
    np.testing.assert_array_equal(np.load(tmp_path / "again" / "text.npy"), written)
    ran = run_cli(*arguments, "--text", tmp_path / "out" / "text.npy", "-o", tmp_path / "as-file")
    assert ran.code == 0
    assert weights(tmp_path / "as-file").keys() == weights(tmp_path / "out").keys()
    for name, tensor in weights(tmp_path / "out").items():
        assert torch.equal(tensor, weights(tmp_path / "as-file")[name]), name


# -------------------- the losses


def test_losses_by_hand() -> None:
    ours = Seen([torch.tensor([[[1.0, 2.0]]])], torch.tensor([[[0.0, 0.0]]]))
    theirs = Seen([torch.tensor([[[1.0, 4.0]]])], torch.tensor([[[0.0, np.log(3.0)]]]))
    assert float(kl(ours, theirs)) == pytest.approx(0.25 * np.log(0.5) + 0.75 * np.log(1.5))
    assert float(squarehead(ours, theirs)) == pytest.approx((4 / 2) / (17 / 2))
    assert float(cross_entropy(theirs, torch.tensor([[1]]))) == pytest.approx(-np.log(0.75))
    assert float(kl(theirs, theirs)) == float(squarehead(theirs, theirs)) == 0.0


def test_the_learning_rate_rises_and_falls() -> None:
    plan = RecoveryPlan(2048 * 100, warmup=10, learning_rate=1.0)
    rates = [plan.learning_rate_at(step) for step in range(plan.steps)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.05 < rates[-1] < 0.052
    assert sum(plan.is_evaluated_after(step) for step in range(1, 101)) == 10 and plan.is_evaluated_after(100)
