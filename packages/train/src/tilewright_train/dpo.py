"""Direct preference optimization: what a policy gains on chosen and rejected completions.

    c = log π(chosen) - log π_ref(chosen),  r the same of rejected,  d = c - r

    sigmoid   -(1 - ε) log σ(βd) - ε log σ(-βd)            Rafailov et al. 2023, arXiv:2305.18290;
                                                           ε > 0 is cDPO (Mitchell 2023)
    robust    ((ε - 1) log σ(βd) + ε log σ(-βd)) / (1 - 2ε)  Chowdhury et al. 2024, 2403.00409
    hinge     max(0, 1 - βd)                               Zhao et al. 2023, arXiv:2305.10425
    ipo       (c / |chosen| - r / |rejected| - 1 / 2β)²    Azar et al. 2023, arXiv:2310.12036

Log-probabilities are sums over a completion's tokens and never see all logits. Of ipo they are
means, as in TRL. Reference-free, log π_ref counts as 0 in the loss; rewards are against it still.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from tilewright_kernels import linear_log_prob
from tilewright_model import CausalLM
from tilewright_train.config import DpoOptions

METRICS = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
    "logps/chosen", "logps/rejected", "logps/accuracies",
)  # fmt: skip
"""Means over pairs. The rewards are β·c and β·r, an accuracy is the share of pairs with the larger
one chosen; all but the last, which compares log π itself, are named and defined as in TRL 1.16."""

LOGITS = ("logits/chosen", "logits/rejected")
"""Means over the vocabulary and over the predictions of a side."""


class SequenceLogProbs(nn.Module):
    """A model as a function from sequences to the log-probabilities of their completions."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        places: torch.Tensor,
        sequences: torch.Tensor,
        lengths: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of log-probabilities, and sums of mean logits, by sequence.

        Only at `places` is anything multiplied with the vocabulary.

        Args:
            input_ids: [B, T] int64, one sequence a row, or [1, N] with `cu_seqlens`.
            labels: [M] int64, tokens to predict.
            places: [M] int64, where each is predicted among the B·T tokens.
            sequences: [M] int64, below S.
            lengths: [S] int64, predictions of each sequence.
            position_ids: [1, N] int64.
            cu_seqlens: [S + 1] int32.

        Returns:
            [S] float32 with gradients, [S] float32 without.
        """
        model = self.model
        hidden = model.hidden_states(input_ids, position_ids=position_ids, cu_seqlens=cu_seqlens)
        head = model.embed_tokens if model.lm_head is None else model.lm_head
        log_probs, logits = linear_log_prob(
            hidden.flatten(0, 1)[places] / model.config.logits_scaling,
            head.weight,
            labels,
            softcap=model.config.final_logit_softcapping,
            return_mean_logits=True,
        )
        zeros = log_probs.new_zeros(lengths.numel())
        return (
            zeros.index_add(0, sequences, log_probs),
            zeros.index_add(0, sequences, logits.to(zeros.dtype)),
        )


def dpo_loss(
    policy: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor, options: DpoOptions
) -> torch.Tensor:
    """The loss of each pair.

    Args:
        policy: [2P] log-probabilities of the chosen completions, then of the rejected ones.
        reference: [2P] likewise, without gradient.
        lengths: [2P] predictions of each.
        options: Which loss.

    Returns:
        [P] in the dtype of `policy`.
    """
    gains = policy if options.reference_free else policy - reference
    smoothing, beta = options.label_smoothing, options.beta
    if options.loss == "ipo":
        chosen, rejected = (gains / lengths).chunk(2)
        return (chosen - rejected - 1 / (2 * beta)) ** 2
    chosen, rejected = gains.chunk(2)
    scaled = beta * (chosen - rejected)
    if options.loss == "hinge":
        return torch.relu(1 - scaled)
    right, wrong = -F.logsigmoid(scaled), -F.logsigmoid(-scaled)
    if options.loss == "robust":
        return ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)
    return (1 - smoothing) * right + smoothing * wrong


def loss_at_start(options: DpoOptions) -> float | None:
    """The loss where policy and reference are one; None where it depends on the model."""
    if options.reference_free:
        return None
    at_start = {"hinge": 1.0, "ipo": (1 / (2 * options.beta)) ** 2}
    return at_start.get(options.loss, math.log(2))


def metric_sums(
    policy: torch.Tensor,
    reference: torch.Tensor,
    lengths: torch.Tensor,
    logits: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """What `metric_means` divides, summed over the pairs of a batch; arguments as above, logits
    are the second result of `SequenceLogProbs`.
    """
    chosen, rejected = policy.detach().chunk(2)
    reward_chosen, reward_rejected = (beta * (policy.detach() - reference)).chunk(2)
    by_pair = (
        reward_chosen,
        reward_rejected,
        reward_chosen > reward_rejected,
        reward_chosen - reward_rejected,
        chosen,
        rejected,
        chosen > rejected,
    )
    by_side = (*logits.chunk(2), *lengths.chunk(2))
    return torch.stack([part.sum().to(policy.dtype) for part in (*by_pair, *by_side)])


def metric_means(sums: list[float], pairs: int) -> dict[str, float]:
    """The metrics of so many pairs, by name; a side's logits count by their predictions."""
    means = dict(zip(METRICS, (value / pairs for value in sums), strict=False))
    logits, counts = sums[len(METRICS) : len(METRICS) + 2], sums[len(METRICS) + 2 :]
    return means | {
        name: value / count for name, value, count in zip(LOGITS, logits, counts, strict=True)
    }
