"""Whatever is wrong with the input, or happens on the way: one line that names it, and nothing half-made."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import T5Config

from owl_deploy.errors import first_line
from owl_deploy.pruning import run
from owl_deploy.pruning.plan import METHODS
from owl_deploy.pruning.recipe.write import write_recipes

from .conftest import WORDS, Ran, RunCli, TinyModel

ROOT = Path(__file__).parents[1]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Where the output would go; empty."""
    directory = tmp_path / "work"
    directory.mkdir()
    return directory


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the small LLaMA, to break."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def calibration(reference: Path) -> Path:
    return reference / "tiny_calib.npy"


Prune = Callable[..., Ran]


@pytest.fixture
def prune(run_cli: RunCli, work: Path, calibration: Path) -> Prune:
    """Prune to `work / "out"`, at 50% and with the reference calibration unless told otherwise."""

    def run(model: object, *options: object, quiet: bool = False) -> Ran:
        given = [str(option) for option in options]
        sparsity = [] if {"--sparsity", "--pattern", "--recipe"} & set(given) else ["--sparsity", "0.5"]
        text = [] if "--calibration" in given else ["--calibration", str(calibration)]
        return run_cli("prune", model, "-o", work / "out", *sparsity, *text, *given, *(["--quiet"] if quiet else []))

    return run


def check_refused(ran: Ran, *words: object) -> None:
    """Exit code 2, nothing on stdout, and one line on stderr that holds all `words`."""
    assert ran.code == 2, ran
    assert ran.stdout == ""
    (line,) = ran.stderr.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert str(word) in line


def left(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


# -------------------- the model


@pytest.mark.parametrize("name", ["./no-such-model", "/no/such/model", "no-such.gguf", "a/b/c"])
def test_no_such_model(prune: Prune, work: Path, name: str) -> None:
    check_refused(prune(name), name, "no such file or directory")
    assert left(work) == []


def test_a_hub_id_without_a_network(prune: Prune, work: Path) -> None:
    check_refused(prune("owl-deploy-tests/none"), "owl-deploy-tests/none", "neither a local file", "nor")
    assert left(work) == []


def test_a_directory_that_is_no_model(prune: Prune, work: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    check_refused(prune(tmp_path / "pictures"), tmp_path / "pictures", "config.json")
    assert left(work) == []


def test_a_file_that_is_no_model(prune: Prune, work: Path, calibration: Path) -> None:
    check_refused(prune(calibration), calibration, "not a model")
    assert left(work) == []


def test_a_model_without_weights(prune: Prune, work: Path, model: Path) -> None:
    (model / "model.safetensors").unlink()
    check_refused(prune(model), model, "no *.safetensors")
    assert left(work) == []


def test_a_model_that_is_no_causal_lm(prune: Prune, work: Path, model: Path) -> None:
    T5Config().save_pretrained(model)
    check_refused(prune(model), model, "causal LM")
    assert left(work) == []


def test_a_model_without_blocks(prune: Prune, work: Path, tiny_model: TinyModel) -> None:
    check_refused(prune(tiny_model("llama", num_hidden_layers=0)), "LlamaForCausalLM", "no list of transformer blocks")
    assert left(work) == []


@pytest.mark.parametrize("config", ["{", "[]", "{}", '{"model_type": "unheard_of"}'])
def test_a_config_that_cannot_be_read(prune: Prune, work: Path, model: Path, config: str) -> None:
    (model / "config.json").write_text(config)
    check_refused(prune(model), model)
    assert left(work) == []


@pytest.mark.parametrize("kept_bytes", [0, 5, 1000, 600_000])
def test_a_truncated_safetensors_file(prune: Prune, work: Path, model: Path, kept_bytes: int) -> None:
    os.truncate(model / "model.safetensors", kept_bytes)
    check_refused(prune(model), model / "model.safetensors", "corrupted")
    assert left(work) == []


def test_a_missing_shard(prune: Prune, work: Path, tiny_model: TinyModel, tmp_path: Path) -> None:
    sharded = Path(shutil.copytree(tiny_model("llama", shard="20KB"), tmp_path / "sharded"))
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    check_refused(prune(sharded), shard, "missing")
    assert left(work) == []


def test_a_missing_weight_is_not_made_up(prune: Prune, work: Path, model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    check_refused(prune(model), model, "model.layers.3.mlp.up_proj.weight")
    assert left(work) == []


def test_a_weight_of_another_shape(prune: Prune, work: Path, model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"] = tensors["model.layers.3.mlp.up_proj.weight"][:80].copy()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    check_refused(prune(model), model)
    assert left(work) == []


@pytest.mark.parametrize("kept_bytes", [0, 3, 100, 20_000])
def test_a_truncated_gguf_file(prune: Prune, work: Path, tmp_path: Path, kept_bytes: int) -> None:
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_tensor("token_embd.weight", np.ones((100, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert path.stat().st_size > 20_000
    os.truncate(path, kept_bytes)
    check_refused(prune(path), path)
    assert left(work) == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.5.mlp.down_proj"])
def test_weights_that_are_not_numbers(prune: Prune, work: Path, model: Path, name: str, method: str) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[f"{name}.weight"][3] = np.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    check_refused(prune(model, "--method", method, quiet=True), "NaN")
    assert left(work) == []


def test_an_index_that_names_no_weights(prune: Prune, work: Path, model: Path) -> None:
    for content in ("[]", "{}"):
        (model / "model.safetensors.index.json").write_text(content)
        check_refused(prune(model), model / "model.safetensors.index.json")
    assert left(work) == []


# -------------------- what is asked for


@pytest.mark.parametrize("sparsity", ["1.0", "-0.1", "nan", "inf"])
def test_a_sparsity_out_of_range(prune: Prune, work: Path, tiny_llama: Path, sparsity: str) -> None:
    check_refused(prune(tiny_llama, "--sparsity", sparsity), f"sparsity {float(sparsity)}", "out of range")
    assert left(work) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--pattern", "4:4"], ["4:4"]),
        (["--pattern", "half"], ["half", "N:M"]),
        (["--pattern", "2:4", "--sparsity", "0.5"], ["--sparsity"]),
        (["--pattern", "2:4", "--allocation", "owl"], ["2:4", "uniform"]),
        (["--method", "hope"], ["hope", "wanda"]),
        (["--allocation", "fair"], ["fair", "owl"]),
        (["--allocation", "explicit"], ["explicit"]),
        (["--owl-m", "0"], ["owl_m 0"]),
        (["--owl-lambda", "nan"], ["lambda nan"]),
        (["--lambda", "0.1", "--allocation", "uniform"], ["uniform", "lambda"]),
        (["--pattern", "mixed-4:8", "--allocation", "dlp"], ["mixed-4:8", "dlp"]),
        (["--pattern", "2:4", "--method", "wanda-variant"], ["wanda-variant", "2:4"]),
        (["--pattern", "2:4", "--tune"], ["--tune", "2:4"]),
        (["--granularity", "row", "--method", "sparsegpt"], ["sparsegpt", "--granularity"]),
        (["--granularity", "global"], ["--allocation global"]),
        (["--statistics", "block", "--method", "magnitude"], ["magnitude", "--statistics"]),
        (["--dense-statistics", "--statistics", "linear"], ["--dense-statistics", "exclude"]),
        (["--target", "dense"], ["wanda", "--target"]),
        (["--method", "admm", "--target", "dense", "--dense-statistics"], ["--target dense", "dense statistics"]),
        (["--ablation", "iter"], ["wanda", "--ablation"]),
        (["--percdamp", "0.1"], ["wanda", "--percdamp"]),
        (["--method", "admm", "--percdamp", "-1"], ["dampening -1"]),
        (["--method", "admm", "--admm-steps", "0"], ["admm_steps 0"]),
        (["--allocation", "global", "--tune"], ["--tune", "global"]),
        (["--allocation", "nowhere.json", "--pattern", "unstructured"], ["nowhere.json"]),
        (["--device", "cuda:7"], ["--device cuda:7"]),
    ],
)
def test_a_plan_that_makes_no_sense(
    prune: Prune, work: Path, tiny_llama: Path, options: list[str], words: list[str]
) -> None:
    check_refused(prune(tiny_llama, *options), *words)
    assert left(work) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[0.5, 0.5]", ["2 block sparsities", "6 blocks"]),
        ("[0.5, 1.5]", ["1.5", "out of range"]),
        ('{"model.layers.0.self_attn.q_proj": 0.5}', ["model.layers.0.self_attn.k_proj", "41 of 42"]),
        ('{"a": "b"}', ["numbers"]),
        ("[]", ["numbers"]),
        ("[0.5", ["not valid JSON"]),
    ],
)
def test_an_allocation_file_that_makes_no_sense(
    run_cli: RunCli, work: Path, tiny_llama: Path, calibration: Path, content: str, words: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "sparsities.json"
    path.write_text(content)
    options = ["--allocation", path, "--calibration", calibration, "--quiet"]
    check_refused(run_cli("prune", tiny_llama, "-o", work / "out", *options), *words)
    assert left(work) == []


def test_no_sparsity_at_all(run_cli: RunCli, work: Path, tiny_llama: Path) -> None:
    check_refused(run_cli("prune", tiny_llama, "-o", work / "out"), "--sparsity", "--recipe")
    assert left(work) == []


RECIPE = "pruning_stage:\n  pruning_modifiers:\n    WandaPruningModifier:\n      sparsity: 0.5\n      targets: [{}]\n"


def test_a_recipe_with_an_unknown_field(prune: Prune, work: Path, tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format("LlamaDecoderLayer") + "      sparsty: 0.7\n")
    check_refused(prune(tiny_llama, "--recipe", path), f"{path}:6", "sparsty", "did you mean sparsity?")
    assert left(work) == []


def test_a_recipe_for_another_model(prune: Prune, work: Path, tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format("OPTDecoderLayer"))
    check_refused(prune(tiny_llama, "--recipe", path), f"{path}:5", "OPTDecoderLayer", "LlamaDecoderLayer")
    assert left(work) == []


def test_no_such_recipe(prune: Prune, work: Path, tiny_llama: Path) -> None:
    check_refused(prune(tiny_llama, "--recipe", "no.yaml"), "no.yaml")
    assert left(work) == []


# -------------------- the text


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(" ".join(WORDS * 2))  # 190 tokens
    return path


@pytest.mark.parametrize("name", ["no-such.txt", "no-such.jsonl", "no-such.npy", "wikitext3"])
def test_no_such_text(prune: Prune, work: Path, tiny_with_tokenizer: Path, name: str) -> None:
    check_refused(prune(tiny_with_tokenizer, "--calibration", name), name, "no such")
    assert left(work) == []


def test_a_data_set_of_the_hub_without_a_network(prune: Prune, work: Path, tiny_with_tokenizer: Path) -> None:
    check_refused(prune(tiny_with_tokenizer, "--calibration", "c4"), "c4: cannot be read", "give a local")
    assert left(work) == []


def test_text_for_a_model_without_a_tokenizer(prune: Prune, work: Path, tiny_llama: Path, words: Path) -> None:
    check_refused(prune(tiny_llama, "--calibration", words), words, "no tokenizer", ".npy")
    assert left(work) == []


def test_fewer_calibration_tokens_than_asked(prune: Prune, work: Path, tiny_with_tokenizer: Path, words: Path) -> None:
    ran = prune(tiny_with_tokenizer, "--calibration", words, "--samples", 10, "--seqlen", 32)
    check_refused(ran, words, "190 tokens", "5 windows of 32", "10 asked for")
    assert left(work) == []


@pytest.mark.parametrize(("option", "asked"), [("--samples", 9), ("--seqlen", 65)])
def test_fewer_token_ids_than_asked(
    prune: Prune, work: Path, tiny_llama: Path, calibration: Path, option: str, asked: int
) -> None:
    check_refused(prune(tiny_llama, option, asked), calibration, f"not the {asked} asked for")
    assert left(work) == []


def test_a_window_longer_than_the_context(prune: Prune, work: Path, tiny_with_tokenizer: Path, words: Path) -> None:
    ran = prune(tiny_with_tokenizer, "--calibration", words, "--samples", 1, "--seqlen", 80)
    check_refused(ran, words, "80 tokens", "context of 64")
    assert left(work) == []


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\n", "holds no text"),
        ("latin.txt", b"caf\xe9", "not UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text', "cannot be read"),
        ("other.jsonl", b'{"body": "a"}\n', "no column 'text'"),
        ("broken.parquet", b"PAR1", "cannot be read"),
        ("words.doc", b"a", ".jsonl"),
    ],
)
def test_a_text_file_that_holds_no_text(
    prune: Prune, work: Path, tiny_with_tokenizer: Path, tmp_path: Path, name: str, content: bytes, word: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    check_refused(prune(tiny_with_tokenizer, "--calibration", path), path, word)
    assert left(work) == []


@pytest.mark.parametrize(
    ("ids", "word"),
    [
        (np.zeros((2, 4, 8), dtype=np.int64), "[2, 4, 8]"),
        (np.zeros((0, 64), dtype=np.int64), "[0, 64]"),
        (np.zeros((2, 64)), "float64"),
        (np.full((2, 64), 256), "token id 256"),
        (np.full((2, 64), -1), "token id -1"),
        (np.array([["a"]], dtype=object), "not a readable .npy"),
    ],
)
def test_token_ids_that_cannot_be_used(
    prune: Prune, work: Path, tiny_llama: Path, tmp_path: Path, ids: np.ndarray[tuple[int, ...], np.dtype], word: str
) -> None:
    path = tmp_path / "ids.npy"
    np.save(path, ids)
    check_refused(prune(tiny_llama, "--calibration", path), path, word)
    assert left(work) == []


@pytest.mark.parametrize("content", [b"", b"text", b"\x93NUMPY\x01\x00"])
def test_a_broken_npy_file(prune: Prune, work: Path, tiny_llama: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ids.npy"
    path.write_bytes(content)
    check_refused(prune(tiny_llama, "--calibration", path), path, "not a readable .npy")
    assert left(work) == []


def test_evaluate_names_what_is_wrong_too(run_cli: RunCli, tiny_llama: Path, words: Path) -> None:
    check_refused(run_cli("evaluate", "/no/such/model"), "/no/such/model")
    check_refused(run_cli("evaluate", tiny_llama, "--text", words), words, "no tokenizer")
    check_refused(run_cli("evaluate", tiny_llama, "--text", "no.npy"), "no.npy")


# -------------------- the output


def test_an_output_directory_that_holds_something_else(prune: Prune, work: Path, tiny_llama: Path) -> None:
    (work / "out").mkdir()
    (work / "out" / "thesis.txt").write_text("mine")
    check_refused(prune(tiny_llama), work / "out", "not empty")
    assert left(work) == ["out", "out/thesis.txt"]


def test_an_output_that_is_a_file(prune: Prune, work: Path, tiny_llama: Path) -> None:
    (work / "out").write_text("mine")
    check_refused(prune(tiny_llama), work / "out")
    assert left(work) == ["out"]


def test_an_output_inside_a_file(run_cli: RunCli, work: Path, tiny_llama: Path) -> None:
    (work / "file").write_text("mine")
    check_refused(run_cli("prune", tiny_llama, "-o", work / "file" / "out", "--sparsity", 0), work / "file")
    assert left(work) == ["file"]


def test_the_working_directory_as_output(
    run_cli: RunCli, work: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    for name in (".", "..", "/"):
        check_refused(run_cli("prune", tiny_llama, "-o", name, "--sparsity", 0))
        assert left(work) == []


def test_an_output_that_is_a_link_is_where_it_leads(run_cli: RunCli, work: Path, tiny_llama: Path) -> None:
    (work / "link").symlink_to("real")
    assert run_cli("prune", tiny_llama, "-o", work / "link", "--sparsity", 0).code == 0
    assert (work / "link").is_symlink()
    assert (work / "real" / "pruning.json").is_file()


def test_notes_put_into_the_output_while_it_is_made(
    prune: Prune, work: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take_notes(*arguments: Any) -> None:
        (work / "out").mkdir()
        (work / "out" / "notes.txt").write_text("mine")
        write_recipes(*arguments)

    monkeypatch.setattr(run, "write_recipes", take_notes)
    check_refused(prune(tiny_llama, quiet=True), work / "out", "not empty", work / "out.finished-1")
    assert left(work / "out") == ["notes.txt"]
    assert {"pruning.json", "model.safetensors"} <= set(left(work / "out.finished-1"))
    assert sorted(path.name for path in work.iterdir()) == ["out", "out.finished-1"]


def test_an_empty_output_directory_is_used(prune: Prune, work: Path, tiny_llama: Path) -> None:
    (work / "out").mkdir()
    assert prune(tiny_llama).code == 0


def test_a_record_that_cannot_be_read(prune: Prune, work: Path, tiny_llama: Path) -> None:
    (work / "out").mkdir()
    for content in ("{", "{}", json.dumps({"schema_version": 99})):
        (work / "out" / "pruning.json").write_text(content)
        check_refused(prune(tiny_llama), work / "out" / "pruning.json")


def test_directories_made_for_an_output_go_when_it_fails(run_cli: RunCli, work: Path, model: Path) -> None:
    os.truncate(model / "model.safetensors", 1000)
    check_refused(run_cli("prune", model, "-o", work / "a" / "b" / "out", "--sparsity", 0), "corrupted")
    assert left(work) == []


def test_an_output_that_another_process_is_writing(prune: Prune, work: Path, tiny_llama: Path) -> None:
    code = (
        "import pathlib, sys; from owl_deploy.files import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(work / "out")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        held = left(work)
        check_refused(prune(tiny_llama), work / "out", "in use by another owl-deploy")
        assert left(work) == held
        holder.communicate()
    assert prune(tiny_llama).code == 0


# -------------------- what happens on the way


def start(model: Path, calibration: Path, out: Path, *, file_size_limit: int | None = None) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    texts = ["--calibration", str(calibration), "--evaluate", str(calibration)]
    command = [sys.executable, str(ROOT / "cli.py"), "prune", str(model), "-o", str(out), "--sparsity", "0.5", *texts]

    def limit() -> None:  # a larger file fails with EFBIG (Python ignores the signal), as ENOSPC does on a full disk
        if file_size_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit, file_size_limit))

    return subprocess.Popen(
        [*command, "--quiet"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=limit,
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def writing(model: Path, calibration: Path, work: Path) -> Iterator[subprocess.Popen[str]]:
    """A run that has begun to write its checkpoint."""
    with start(model, calibration, work / "out") as process:
        wait_for(work / ".out.partial" / "model.safetensors", process)
        yield process


def test_a_full_disk(work: Path, model: Path, calibration: Path) -> None:
    with start(model, calibration, work / "out", file_size_limit=200_000) as process:
        stdout, stderr = process.communicate(timeout=120)
    check_refused(Ran(process.returncode, stdout, stderr), work / "out", "cannot be written", "MiB free", "make room")
    assert {path.name for path in work.iterdir()} <= {".out.unfinished"}  # finished blocks, for the next run


def test_a_killed_run_leaves_no_output_and_the_next_one_succeeds(
    prune: Prune, work: Path, model: Path, writing: subprocess.Popen[str]
) -> None:
    writing.kill()
    writing.communicate(timeout=60)
    assert writing.returncode == -signal.SIGKILL
    assert not (work / "out").exists()
    assert prune(model).code == 0
    assert [path.name for path in work.iterdir()] == ["out"]


def test_a_terminated_run_cleans_up(work: Path, writing: subprocess.Popen[str]) -> None:
    writing.terminate()
    stdout, stderr = writing.communicate(timeout=60)
    assert writing.returncode == 130
    assert stdout == ""
    assert stderr.splitlines()[-1].startswith("interrupted")
    assert "Traceback" not in stderr
    assert [path.name for path in work.iterdir()] == [".out.unfinished"]  # finished blocks, for the next run


@pytest.mark.parametrize(
    ("message", "line"), [("no such file\nTraceback: …", "no such file"), ("\n  late\n", "late"), ("", "OSError")]
)
def test_an_error_of_another_package_is_told_on_one_line_even_if_it_says_nothing(message: str, line: str) -> None:
    assert first_line(OSError(message)) == line


def test_a_device_that_fails_without_a_word_is_one_line(
    prune: Prune, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def speechless(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr("torch.empty", speechless)
    ran = prune(model, "--device", "npu")
    assert ran.code == 2
    assert "--device npu: torch cannot compute there (AssertionError)" in ran.stderr
