"""LoRA's changes as an adapter that PEFT loads beside the sparse checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from owl_deploy.files import write_json
from owl_deploy.recovery.plan import RecoveryPlan


def write_adapter(directory: Path, parameters: Mapping[str, torch.Tensor], plan: RecoveryPlan, base: str) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        parameters: `lora_A.weight` [rank, in] and `lora_B.weight` [out, rank] by the path of their linear.
        base: the checkpoint that was trained.
    """
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": plan.lora_rank,
        "lora_alpha": plan.lora_alpha,
        "lora_dropout": plan.lora_dropout,
        "target_modules": list(plan.lora_targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_json(directory / "adapter_config.json", config)
    tensors = {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in parameters.items()}
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
