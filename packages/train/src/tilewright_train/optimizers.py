"""The optimizer of a run: AdamW, or MuonW (Muon for the hidden matrices, AdamW for the rest)."""

import torch

from tilewright_model import CausalLM, ModelConfig
from tilewright_train.config import TrainingOptions
from tilewright_train.precision import arithmetic


def make_optimizer(
    options: TrainingOptions, model: CausalLM, lr: float, precision: str = "fp32"
) -> torch.optim.Optimizer:
    """An optimizer of all of a model's parameters; norms are not decayed.

    On a GPU it counts steps on the device, so that one can be left out without asking the device.

    Args:
        options: Which optimizer, and its rates.
        model: With its weights as `precision` stores them.
        lr: Learning rate.
        precision: Weights in bf16 get exact float32 masters.
    """
    # Imported here, behind the thread that `pretraining` starts for it.
    from tilewright_optim import AdamW, MuonW

    betas = options.beta1, options.beta2
    master = arithmetic(precision).master
    capturable = model.embed_tokens.weight.is_cuda
    if options.optim == "muon":
        return MuonW.from_module(
            model,
            lr=lr,
            weight_decay=options.weight_decay,
            betas=betas,
            split_sizes=stacked_rows(model.config),
            master=master,
            capturable=capturable,
        )
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=lr, betas=betas, master=master, capturable=capturable)


def stacked_rows(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Rows of the matrices that the model stacks in one weight, by the end of the weight's name."""
    head = config.attention_head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    rows: dict[str, tuple[int, ...]] = {"qkv_proj.weight": (queries, keys, keys)}
    if len(config.sparse_layers) < config.num_hidden_layers:
        rows["mlp.gate_up_proj.weight"] = (config.intermediate_size, config.intermediate_size)
    if config.sparse_layers:
        rows["experts.gate_up_proj"] = (config.expert_size, config.expert_size)
        if shared := config.num_shared_experts * config.expert_size:
            rows["shared_experts.gate_up_proj.weight"] = (shared, shared)
    return rows
