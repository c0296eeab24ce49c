import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from tilewright_kernels import use_backend
from tilewright_kernels.testing import count_launches
from tilewright_model import CausalLM, KVCache, ModelConfig, preset
from tilewright_model.loss import logits_loss, next_tokens

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    intermediate_size=40,
    max_position_embeddings=16,
)
UNTIED = dataclasses.replace(CONFIG, tie_word_embeddings=False)


def build(config: ModelConfig = CONFIG, device: torch.device | str = "cpu") -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(config).to(device)


def tokens(batch: int = 2, length: int = 9, device: torch.device | str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(CONFIG.vocab_size, (batch, length), generator=generator).to(device)


@pytest.mark.smoke
def test_a_step_of_training_lowers_the_loss() -> None:
    model, ids = build(), tokens()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_gradients_reach_every_parameter(config: ModelConfig, device: torch.device) -> None:
    model, ids = build(config, device), tokens(device=device)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # Every row of a projection takes part; of the embedding, those of tokens that occur or,
        # tied, that are predicted.
        rows = parameter.grad.reshape(len(parameter), -1).abs().sum(1)
        if name == "embed_tokens.weight" and not config.tie_word_embeddings:
            rows = rows[ids[:, :-1].unique()]
        assert (rows > 0).all(), name


@pytest.mark.parametrize("name", ["nano", "26m"])
def test_the_first_loss_is_that_of_a_uniform_guess(name: str) -> None:
    torch.manual_seed(0)
    config = preset(name)
    model = CausalLM(config)
    ids = torch.randint(config.vocab_size, (2, 64))
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    assert loss.item() == pytest.approx(math.log(config.vocab_size), rel=0.05)


def test_weights_start_as_documented() -> None:
    config = dataclasses.replace(CONFIG, hidden_size=96, intermediate_size=128, vocab_size=256)
    for name, parameter in build(config).named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
            continue
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.02 / math.sqrt(2 * 3) if residual else 0.02
        # 9216 samples or more: the standard error of their deviation is 0.7 %.
        assert parameter.std().item() == pytest.approx(std, rel=0.04), name
        assert abs(parameter.mean().item()) < 0.04 * std, name


def test_a_token_changes_no_logits_before_it(device: torch.device) -> None:
    model, ids = build(device=device), tokens(device=device)
    before = model(ids).logits
    for t in (0, 4, 8):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 1) % CONFIG.vocab_size
        after = model(changed).logits
        assert torch.equal(after[:, :t], before[:, :t])
        assert ((after[:, t:] - before[:, t:]).abs().amax(dim=-1) > 0).all()


def test_sequences_of_a_batch_are_independent() -> None:
    model, ids = build(), tokens(batch=3)
    together = model(ids).logits
    for row in range(3):
        torch.testing.assert_close(model(ids[row : row + 1]).logits, together[row : row + 1])


def test_loss_is_the_mean_over_next_tokens_that_count() -> None:
    model, ids = build().double(), tokens()
    labels = ids.clone()
    labels[0, :4] = -100
    labels[1, 6] = -100
    output = model(ids, labels=labels, return_logits=True)
    # Position t is scored against labels[t + 1]; the first label has no position before it.
    log_p = output.logits[:, :-1].log_softmax(-1)
    terms = [
        -log_p[b, t, labels[b, t + 1]]
        for b in range(2)
        for t in range(8)
        if labels[b, t + 1] != -100
    ]
    assert len(terms) == 8 - 3 + 8 - 1
    torch.testing.assert_close(output.loss.double(), sum(terms) / len(terms), rtol=1e-6, atol=0)


def test_num_items_weighs_every_token_of_a_step_alike() -> None:
    model, ids = build(), tokens(batch=4)
    labels = ids.clone()
    labels[0, 2:] = -100  # the micro-batches count 1 + 8 and 8 + 8 labels
    whole = model(ids, labels=labels)
    for num_items in (25, torch.tensor(25)):
        parts = [
            model(ids[rows], labels=labels[rows], num_items=num_items).loss
            for rows in (slice(0, 2), slice(2, 4))
        ]
        torch.testing.assert_close(parts[0] + parts[1], whole.loss)


def test_logits_are_returned_when_asked_for() -> None:
    model, ids = build(), tokens()
    assert model(ids).loss is None
    assert model(ids).logits.shape == (2, 9, 64)
    assert model(ids, labels=ids).logits is None
    assert torch.equal(model(ids, labels=ids, return_logits=True).logits, model(ids).logits)
    assert model(ids, return_logits=False) == (None, None, None)


def test_loss_does_not_copy_the_logits() -> None:
    logits, labels = torch.randn(2, 5, 8), torch.randint(8, (2, 5))
    seen = []

    def spy(input: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        seen.append(input.untyped_storage().data_ptr())
        return torch.zeros(())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tilewright_model.loss.cross_entropy", spy)
        logits_loss(logits, next_tokens(labels))
    assert seen == [logits.untyped_storage().data_ptr()]


def test_position_ids_default_to_the_order() -> None:
    model, ids = build(), tokens()
    order = torch.arange(9).expand(2, 9)
    torch.testing.assert_close(model(ids, position_ids=order).logits, model(ids).logits)
    # Two documents packed in a row keep their own positions; distances within each are unchanged,
    # so that only what looks across the seam differs.
    packed = torch.cat([torch.arange(4), torch.arange(5)]).expand(2, 9)
    logits = model(ids, position_ids=packed).logits
    torch.testing.assert_close(logits[:, :4], model(ids).logits[:, :4])
    assert (logits[:, 4:] - model(ids).logits[:, 4:]).abs().max() > 1e-4


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("chunks", [[9], [4, 1, 1, 3], [1] * 9], ids=str)
def test_reading_through_a_cache_gives_the_same_logits(
    chunks: list[int], backend: Literal["torch", "triton"], device: torch.device
) -> None:
    model, ids = build(device=device), tokens(device=device)
    cache = KVCache(CONFIG, 2, 12, device=device)
    with use_backend(backend), torch.no_grad(), count_launches() as launches:
        whole = model(ids).logits
        parts = [model(part, cache=cache).logits for part in ids.split(chunks, dim=1)]
    assert cache.position == 9
    # One token at a time is read against the cache by a kernel of its own.
    assert (launches["flash_attn_decode"] > 0) == (backend == "triton" and 1 in chunks)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_half_precision_and_autocast(device: torch.device) -> None:
    model, ids = build(device=device), tokens(device=device)
    exact = model(ids, labels=ids)
    with torch.autocast(device.type, torch.bfloat16):
        mixed = model(ids, labels=ids, return_logits=True)
    mixed.loss.backward()
    assert mixed.logits.dtype == torch.bfloat16
    assert mixed.loss.dtype == torch.float32
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    whole = model.to(torch.bfloat16)(ids, labels=ids)
    # The logits are about 0.1 and rounded to 8 bits: the loss of 4.16 moves in the fourth digit.
    torch.testing.assert_close(mixed.loss, exact.loss, rtol=1e-3, atol=0)
    torch.testing.assert_close(whole.loss.float(), exact.loss, rtol=1e-3, atol=0)


def test_backends_agree(device: torch.device) -> None:
    model, ids = build(device=device), tokens(device=device)

    def step(backend: Literal["torch", "triton"]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        with use_backend(backend), count_launches() as launches:
            loss = model(ids, labels=ids).loss
            loss.backward()
        kernels = {
            "rms_norm", "add_rms_norm", "gated_mlp", "apply_rotary_emb",
            "scaled_dot_product_attention", "linear_cross_entropy",
        }  # fmt: skip
        assert {name for name in kernels if launches[name]} == (
            kernels if backend == "triton" else set()
        )
        return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    loss, gradients = step("triton")
    expected_loss, expected = step("torch")
    torch.testing.assert_close(loss, expected_loss)
    assert gradients.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)


# torch 2.11 looks at .grad of the hidden states while it traces, and warns about it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_one_compilation_serves_all_blocks() -> None:
    model, ids = build(), tokens()
    expected = model(ids, labels=ids).loss
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.layers:
        block.compile(fullgraph=True, backend=counter)
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert counter.frame_count == 1
    torch.testing.assert_close(loss, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], msg=name)


def test_the_whole_model_compiles() -> None:
    model, ids = build(), tokens()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, labels=ids).loss, model(ids, labels=ids).loss)


def test_the_same_seed_gives_the_same_weights() -> None:
    first, second = build(), build()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_tied_embeddings_are_one_parameter() -> None:
    tied, untied = build(), build(UNTIED)
    assert "lm_head.weight" not in tied.state_dict()
    assert untied.state_dict().keys() - tied.state_dict().keys() == {"lm_head.weight"}
    hidden = torch.randn(3, 24)
    assert torch.equal(tied.project_logits(hidden), F.linear(hidden, tied.embed_tokens.weight))
    assert untied.lm_head is not None
    assert torch.equal(untied.project_logits(hidden), F.linear(hidden, untied.lm_head.weight))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x: m(x.float()), TypeError, "input_ids is torch.float32"),
        (lambda m, x: m(x[0]), ValueError, r"input_ids is \[9\]"),
        (lambda m, x: m(x[:, :0]), ValueError, r"input_ids is \[2, 0\]"),
        (lambda m, x: m(x, labels=x[:, 1:]), ValueError, r"labels \[2, 8\].*\[2, 9\] \(unsh"),
        (lambda m, x: m(x, num_items=3), ValueError, "num_items 3 .* give labels"),
        (lambda m, x: m(x, labels=x, num_items=0), ValueError, "num_items is 0"),
        (lambda m, x: m(x, labels=x, num_items=torch.tensor(-3)), ValueError, "num_items is .*-3"),
        (lambda m, x: m(x, labels=x + 64), ValueError, r"label \d+ is outside .* of 64: .* -100"),
        (lambda m, x: m(x, labels=-1 - 0 * x), ValueError, "label -1 is outside"),
        (lambda m, x: m(x, position_ids=x[0]), ValueError, r"position_ids \[9\]"),
        (lambda m, x: m(x.repeat(1, 2)), ValueError, "18 tokens exceed max_position_embeddings 16"),
        (lambda m, x: m(x, cache=KVCache(CONFIG, 2, 9)), ValueError, "under torch.no_grad"),
        (lambda m, x: m(x, cache=KVCache(CONFIG, 3, 9)), ValueError, "cache of batch size 3"),
        (lambda m, x: m(x, cache=KVCache(CONFIG, 2, 8)), ValueError, "holds 0 of 8 tokens and 9"),
    ],
)
def test_bad_input_is_refused_by_name(call: Callable, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(build(), tokens())
