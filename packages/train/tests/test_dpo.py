"""DPO's losses and metrics against formulas in float64 that are written out here, pair by pair."""

import dataclasses
import math

import pytest
import torch

from tilewright_model import CausalLM, preset
from tilewright_train.config import DpoOptions
from tilewright_train.dpo import (
    LOGITS,
    METRICS,
    SequenceLogProbs,
    dpo_loss,
    loss_at_start,
    metric_means,
    metric_sums,
)

# Three pairs: chosen gains, rejected gains, neither.
POLICY = [-3.0, -7.5, -4.0, -5.0, -6.0, -4.0]
REFERENCE = [-5.0, -7.0, -4.0, -4.5, -8.0, -4.0]
LENGTHS = [2, 3, 4, 3, 5, 4]


def by_hand(options: DpoOptions) -> list[float]:
    """The loss of each pair in Python's floats."""
    losses = []
    for n in range(3):
        chosen, rejected = POLICY[n], POLICY[n + 3]
        if not options.reference_free:
            chosen, rejected = chosen - REFERENCE[n], rejected - REFERENCE[n + 3]
        scaled = options.beta * (chosen - rejected)
        right = math.log1p(math.exp(-scaled))  # -log σ(scaled)
        wrong = math.log1p(math.exp(scaled))
        smoothing = options.label_smoothing
        match options.loss:
            case "sigmoid":
                losses.append((1 - smoothing) * right + smoothing * wrong)
            case "robust":
                part = (1 - smoothing) * right - smoothing * wrong
                losses.append(part / (1 - 2 * smoothing))
            case "hinge":
                losses.append(max(0.0, 1 - scaled))
            case "ipo":
                margin = chosen / LENGTHS[n] - rejected / LENGTHS[n + 3]
                losses.append((margin - 1 / (2 * options.beta)) ** 2)
    return losses


@pytest.mark.parametrize("reference_free", [False, True])
@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize(
    ("loss", "smoothing"),
    [("sigmoid", 0.0), ("sigmoid", 0.2), ("robust", 0.2), ("robust", 0.0), ("hinge", 0.0),
     ("ipo", 0.0)],
)  # fmt: skip
def test_every_option_is_its_formula(
    loss: str, smoothing: float, beta: float, reference_free: bool
) -> None:
    options = DpoOptions(
        loss=loss,  # pyrefly: ignore
        beta=beta, label_smoothing=smoothing, reference_free=reference_free,
    )  # fmt: skip
    expected = by_hand(options)
    assert len({round(value, 6) for value in expected}) == 3  # the pairs differ under this option
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        policy, reference = (torch.tensor(v, dtype=dtype) for v in (POLICY, REFERENCE))
        computed = dpo_loss(policy, reference, torch.tensor(LENGTHS), options)
        assert computed.tolist() == pytest.approx(expected, rel=tolerance)


def test_the_gradient_of_sigmoid_weighs_a_pair_by_how_wrong_it_is() -> None:
    """∂loss/∂log π(chosen) = -β σ(-βd), the paper's equation 7."""
    policy = torch.tensor(POLICY, dtype=torch.float64, requires_grad=True)
    reference = torch.tensor(REFERENCE, dtype=torch.float64)
    dpo_loss(policy, reference, torch.tensor(LENGTHS), DpoOptions(beta=0.3)).sum().backward()
    margins = [(POLICY[n] - REFERENCE[n]) - (POLICY[n + 3] - REFERENCE[n + 3]) for n in range(3)]
    weights = [0.3 / (1 + math.exp(0.3 * d)) for d in margins]
    assert policy.grad is not None
    assert policy.grad.tolist() == pytest.approx([*(-w for w in weights), *weights], rel=1e-12)


@pytest.mark.parametrize("loss", ["sigmoid", "robust", "hinge", "ipo"])
def test_where_policy_and_reference_are_one_the_loss_is_known(loss: str) -> None:
    smoothing = 0.2 if loss in ("sigmoid", "robust") else 0.0
    options = DpoOptions(loss=loss, beta=0.25, label_smoothing=smoothing)  # pyrefly: ignore
    same = torch.tensor(POLICY, dtype=torch.float64)
    computed = dpo_loss(same, same, torch.tensor(LENGTHS), options)
    known = {"hinge": 1.0, "ipo": 4.0}.get(loss, 0.6931471805599453)
    assert computed.tolist() == pytest.approx([known] * 3, rel=1e-12)
    assert loss_at_start(options) == pytest.approx(known)
    assert loss_at_start(dataclasses.replace(options, reference_free=True)) is None


def test_metrics_are_those_of_trl() -> None:
    logits = [2.0, 3.0, 4.0, 6.0, 10.0, 4.0]  # sums over a sequence of means over the vocabulary
    tensors = [torch.tensor(v) for v in (POLICY, REFERENCE, LENGTHS, logits)]
    sums = metric_sums(*tensors, beta=0.5).tolist()
    means = metric_means(sums, 3)
    rewards = [0.5 * (p - r) for p, r in zip(POLICY, REFERENCE, strict=True)]
    chosen, rejected = rewards[:3], rewards[3:]
    assert tuple(means) == (*METRICS, *LOGITS)
    assert (
        list(means.values())
        == pytest.approx(
            [
                sum(chosen) / 3,
                sum(rejected) / 3,
                1 / 3,  # of three pairs one; equal rewards are not right
                (sum(chosen) - sum(rejected)) / 3,
                sum(POLICY[:3]) / 3,
                sum(POLICY[3:]) / 3,
                1 / 3,
                9 / 9,  # over the tokens of a side, not over its sequences
                20 / 12,
            ]
        )
    )


@pytest.mark.parametrize("tied", [True, False])
def test_log_probabilities_are_sums_of_a_log_softmax(tied: bool) -> None:
    """In float64, with the model's scaling and softcap of logits, which nothing may leave out."""
    torch.manual_seed(0)
    shape = preset(
        "nano", vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=32, max_position_embeddings=8,
        tie_word_embeddings=tied, logits_scaling=2.0, final_logit_softcapping=3.0,
    )  # fmt: skip
    model = CausalLM(shape).double()
    ids = torch.randint(40, (2, 6))
    places = torch.tensor([2, 3, 4, 9, 10])  # row 0 predicts tokens 3 to 5, row 1 4 and 5
    labels = ids.flatten()[places + 1]
    sequences = torch.tensor([0, 0, 0, 1, 1])
    log_probs, logits = SequenceLogProbs(model)(
        ids, labels, places, sequences, torch.tensor([3, 2])
    )
    all_logits = model(ids).logits.flatten(0, 1)[places]
    each = all_logits.log_softmax(-1).gather(1, labels[:, None]).flatten()
    torch.testing.assert_close(log_probs, torch.stack([each[:3].sum(), each[3:].sum()]))
    means = all_logits.mean(-1)
    torch.testing.assert_close(logits, torch.stack([means[:3].sum(), means[3:].sum()]))
    assert log_probs.requires_grad
    assert not logits.requires_grad
