"""Activation checkpointing: which results of a block are kept for the backward pass, and which are computed again.

    none       everything that autograd asks for is kept
    full       of each block only the input (Chen et al. 2016)
    selective  by operation: besides the input, results of matrix products and of attention, which are dear to compute
               and small; norms, activations and rotations are computed again
    budget     as many blocks in full as it takes for the predicted bytes to fit, the first ones

Random numbers come out the same the second time. Refused: a budget below what `full` needs.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from minigpt.model import Sight
from parallel.memory import Plan, activations, block_activations
from parallel.model import StageGPT, run_block, split_layers

ActivationPolicy = Literal["none", "full", "selective", "budget"]

aten = torch.ops.aten
# Not bmm: where attention is spelled out, its products are the scores, which are not small.
DEAR = frozenset({
    aten.mm.default,
    aten.addmm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_attention_math.default,
})  # fmt: skip


def choose(ctx, operation, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in DEAR else CheckpointPolicy.PREFER_RECOMPUTE


def run_full(block: nn.Module, x_BTC: Tensor, sight: Sight) -> Tensor:
    if not torch.is_grad_enabled():
        return run_block(block, x_BTC, sight)
    return checkpoint(block, x_BTC, sight, use_reentrant=False)


def run_selective(block: nn.Module, x_BTC: Tensor, sight: Sight) -> Tensor:
    if not torch.is_grad_enabled():
        return run_block(block, x_BTC, sight)
    contexts = lambda: create_selective_checkpoint_contexts(choose)  # noqa: E731
    return checkpoint(block, x_BTC, sight, use_reentrant=False, context_fn=contexts)


def apply_activation_policy(
    stage: StageGPT, policy: ActivationPolicy, budget_bytes: int | None = None, *, plan: Plan | None = None,
    index: int = 0,
) -> int:  # fmt: skip
    """Sets `stage.run_block`, and returns how many blocks are computed again, in full or in part.

    "budget" needs `budget_bytes` for the activations of this rank and a `plan` that says how long rows are, how many
    bytes a number has, how tensor and pipeline parallelism divide; `index` is the number of the pipeline stage. Raises
    ValueError for another policy, and for a budget that is missing, not wanted, or too small.
    """
    if policy not in get_args(ActivationPolicy):
        raise ValueError(f"activation policy {policy!r}: expected one of {', '.join(get_args(ActivationPolicy))}")
    if (policy == "budget") != (budget_bytes is not None and plan is not None):
        raise ValueError(
            f"policy {policy!r} with budget {budget_bytes} and plan {plan}: expected both for budget, else none"
        )
    if policy != "budget":
        stage.run_block = {"none": run_block, "full": run_full, "selective": run_selective}[policy]
        return 0 if policy == "none" else len(stage.blocks)
    count = blocks_to_recompute(stage, budget_bytes, plan, index)
    chosen = {id(block) for block in list(stage.blocks.values())[:count]}
    stage.run_block = lambda block, x_BTC, sight: (run_full if id(block) in chosen else run_block)(block, x_BTC, sight)
    return count


def blocks_to_recompute(stage: StageGPT, budget_bytes: int, plan: Plan, index: int = 0) -> int:
    """The fewest blocks of this stage whose recomputation keeps `activations` within the budget."""
    layers = len(stage.blocks)
    if layers != len(split_layers(stage.config.layers, plan.pp)[index]):
        raise ValueError(f"stage {index} of {plan.pp} has {layers} blocks: expected those of split_layers")
    for count in range(layers + 1):
        if activations(stage.config, plan, "full", index, recomputed=count) <= budget_bytes:
            return count
    least = activations(stage.config, plan, "full", index)
    raise ValueError(
        f"a budget of {budget_bytes:,} bytes for activations: the least, with all {layers} blocks computed again, is "
        f"{least:,}, and each block kept whole takes {block_activations(stage.config, plan):,}"
    )
