"""Three ways out for an edited model: a Hugging Face folder, the delta alone, a LoRA adapter."""

from .changes import Change, between, changes_of_model, given
from .checkpoint import Checkpoint
from .delta import Delta, DeltaEntry, apply_delta, delta_changes, load_delta, save_delta, write_delta
from .factors import factorise
from .folder import export_folder, write_folder
from .lora import LoraLayer, LoraReport, export_lora, vllm_rank, write_lora
from .scores import evaluate_both

__all__ = [
    "Change", "Checkpoint", "Delta", "DeltaEntry", "LoraLayer", "LoraReport", "apply_delta", "between",
    "changes_of_model", "delta_changes", "evaluate_both", "export_folder", "export_lora", "factorise", "given",
    "load_delta", "save_delta", "vllm_rank", "write_delta", "write_folder", "write_lora",
]  # fmt: skip
