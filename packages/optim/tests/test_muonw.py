"""MuonW: Muon and AdamW in one, groups found from a module, one learning rate for both."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from tilewright_kernels.testing import count_launches
from tilewright_optim import AdamW, Muon, MuonW, WarmupCosine

pytestmark = pytest.mark.usefixtures("backend")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.qkv_proj = nn.Linear(16, 32)
        self.gate_up_proj = nn.Linear(16, 48, bias=False)
        self.router = nn.Linear(16, 3, bias=False)
        self.experts = nn.Parameter(torch.empty(3, 16, 24).normal_())


class Model(nn.Module):
    def __init__(self, tied=False, layers=2):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.unembedding = nn.Linear(16, 20, bias=False)
        self.conv = nn.Conv1d(4, 4, 3)
        self.conv.weight.data = self.conv.weight.data[..., None]  # four dimensions
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        if tied:
            self.unembedding.weight = self.embed.weight


def make(device, dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    return Model(**kwargs).to(device, dtype)


def set_grads(model, seed, factor=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = (torch.randn(p.shape, generator=generator) * factor).to(p)


def names_by_group(optimizer):
    return [
        (g["kind"], g["weight_decay"], g.get("split_sizes"), g["param_names"])
        for g in optimizer.param_groups
    ]


SPLITS = {"qkv_proj.weight": (16, 8, 8), "gate_up_proj.weight": (24, 24)}


@pytest.mark.parametrize("tied", [False, True])
def test_groups_of_a_module(tied, device):
    model = make(device, tied=tied)
    optimizer = MuonW.from_module(model, lr=0.1, weight_decay=0.2, split_sizes=SPLITS)
    layers = ("layers.0", "layers.1")
    matrices = [f"{layer}.experts" for layer in layers]
    vectors = [f"{layer}.{v}" for layer in layers for v in ("norm.weight", "norm.bias")]
    found = {key[:3]: set(key[3]) for key in names_by_group(optimizer)}
    assert found["muon", 0.2, None] == set(matrices)
    assert found["muon", 0.2, (16, 8, 8)] == {f"{layer}.qkv_proj.weight" for layer in layers}
    assert found["muon", 0.2, (24, 24)] == {f"{layer}.gate_up_proj.weight" for layer in layers}
    head = set() if tied else {"unembedding.weight"}
    routers = {f"{layer}.router.weight" for layer in layers}
    assert found["adamw", 0.2, None] == {"embed.weight"} | head | routers
    biases = {f"{layer}.qkv_proj.bias" for layer in layers}
    assert found["adamw", 0.0, None] == set(vectors) | biases | {"conv.weight", "conv.bias"}
    assert sum(map(len, found.values())) == sum(p.requires_grad for p in model.parameters())


def test_a_layer_with_as_many_rows_as_words_is_a_matrix():
    model = nn.Sequential(nn.Embedding(48, 16), Block(), nn.Linear(16, 48))
    kinds = {n: g["kind"] for g in MuonW.from_module(model).param_groups for n in g["param_names"]}
    assert kinds["1.gate_up_proj.weight"] == "muon"
    assert kinds["2.weight"] == "adamw"


def test_three_dimensions_that_are_no_experts():
    class Speech(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(8, 8, 3)
            self.positions = nn.Parameter(torch.zeros(1, 5, 8))
            self.experts = nn.Parameter(torch.zeros(2, 5, 8))

    kinds = {
        n: g["kind"] for g in MuonW.from_module(Speech()).param_groups for n in g["param_names"]
    }
    assert kinds["conv.weight"] == kinds["positions"] == "adamw"
    assert kinds["experts"] == "muon"


def test_parameters_that_adamw_shall_have(device):
    model = make(device)
    experts = [p for name, p in model.named_parameters() if name.endswith("experts")]
    optimizer = MuonW.from_module(model, adamw=experts)
    kinds = {n: g["kind"] for g in optimizer.param_groups for n in g["param_names"]}
    assert kinds["layers.0.experts"] == "adamw"
    assert kinds["layers.0.qkv_proj.weight"] == "muon"


def test_steps_as_the_two_would(device):
    ours, theirs = make(device, layers=1), make(device, layers=1)
    optimizer = MuonW.from_module(ours, lr=0.1, weight_decay=0.2, split_sizes=SPLITS)
    by_name = dict(theirs.named_parameters())
    others: list[Any] = []
    for group in optimizer.param_groups:
        params = [by_name[name] for name in group["param_names"]]
        if group["kind"] == "muon":
            others.append(
                Muon(
                    params, 0.1, 0.2, adjust_lr_fn="match_rms_adamw",
                    split_sizes=group["split_sizes"],
                )
            )  # fmt: skip
        else:
            others.append(AdamW(params, 0.1, (0.9, 0.95), weight_decay=group["weight_decay"]))
    for step in range(2):
        set_grads(ours, step)
        set_grads(theirs, step)
        optimizer.step()
        for other in others:
            other.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_updates_of_all_shapes_are_alike(device):
    # What lets one learning rate serve: each step changes any weight by about 0.2 of it (AdamW's
    # first steps, with their bias corrections, by 1).
    model = make(device)
    optimizer = MuonW.from_module(model, lr=0.01, weight_decay=0.0, split_sizes=SPLITS)
    set_grads(model, 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    for group in optimizer.param_groups:
        if group["kind"] == "muon":
            for name in group["param_names"]:
                change = (dict(model.named_parameters())[name] - before[name]) / 0.01
                assert 0.12 < change.square().mean().sqrt() < 0.28, name


def test_both_kinds_are_launched(backend, device):
    model = make(device)
    optimizer = MuonW.from_module(model)
    set_grads(model, 0)
    with count_launches() as launches:
        optimizer.step()
    assert (launches["muon"] > 0) == (launches["adamw"] > 0) == (backend == "triton")


def test_max_grad_norm_is_of_the_whole_model(device):
    ours, theirs = make(device, layers=1), make(device, layers=1)
    one = MuonW.from_module(ours, lr=0.1, max_grad_norm=0.5)
    two = MuonW.from_module(theirs, lr=0.1)
    for step, factor in enumerate((1.0, 1e-4)):  # above the limit, and below
        set_grads(ours, step, factor)
        set_grads(theirs, step, factor)
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        one.step()
        two.step()
        torch.testing.assert_close(one.grad_norm, norm)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-3, msg=name)


def test_found_inf_leaves_everything_untouched(device):
    for capturable in (False, True):
        model = make(device, layers=1)
        optimizer = MuonW.from_module(model, lr=0.1, capturable=capturable)
        set_grads(model, 0)
        optimizer.step()
        states = [
            t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)
        ]
        kept = [*model.parameters(), *states]
        before = [t.detach().clone() for t in kept]
        for p in model.parameters():
            p.grad = torch.full_like(p, torch.nan)
        optimizer.found_inf = torch.ones((), device=device)
        optimizer.step()
        assert all(torch.equal(t, b) for t, b in zip(kept, before, strict=True))


def test_grad_scale_divides_for_both(device):
    a, b = make(device, layers=1), make(device, layers=1)
    one, two = MuonW.from_module(a, lr=0.1), MuonW.from_module(b, lr=0.1)
    two.grad_scale = torch.tensor(64.0, device=device)
    set_grads(a, 0)
    set_grads(b, 0, 64.0)
    one.step()
    two.step()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def test_schedules_set_the_rate_of_all_groups(device):
    model = make(device)
    optimizer = MuonW.from_module(model, lr=0.1)
    WarmupCosine(optimizer, warmup_steps=10, total_steps=20)
    rates = {group["lr"] for group in optimizer.param_groups}
    assert len(rates) == 1
    assert rates.pop() == pytest.approx(0.01)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict", "state_tensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resumes_bit_for_bit(dtype, how, device):
    model = make(device, dtype, layers=1)
    options: dict[str, Any] = {"lr": 0.1, "split_sizes": SPLITS, "max_grad_norm": 1.0}
    if dtype == torch.bfloat16:
        options |= {"master": "exact", "state_dtype": "int8"}
    optimizer = MuonW.from_module(model, **options)
    for step in range(2):
        set_grads(model, step)
        optimizer.step()
    if how == "deepcopy":
        twin, again = copy.deepcopy((model, optimizer))
    elif how == "pickle":
        twin, again = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        twin = copy.deepcopy(model)
        again = MuonW.from_module(twin, **options)
        if how == "state_dict":
            again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        else:
            again.load_state_tensors({k: t.clone() for k, t in optimizer.state_tensors().items()})
    for some, one in ((model, optimizer), (twin, again)):
        for step in (2, 3):
            set_grads(some, step)
            one.step()
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(p, q[1]), name
    assert again.max_grad_norm == 1.0


def test_add_param_group(device):
    model = make(device)
    optimizer = MuonW.from_module(model, lr=0.1)
    more = nn.Parameter(torch.randn(6, 8, device=device))
    optimizer.add_param_group({"params": [("more", more)], "kind": "muon", "lr": 0.3})
    assert optimizer.param_groups[-1]["momentum"] == 0.95
    before = more.detach().clone()
    more.grad = torch.randn_like(more)
    optimizer.step()
    assert not torch.equal(more, before)
    vector = ("v", nn.Parameter(torch.ones(3, device=device)))
    with pytest.raises(ValueError, match="takes matrices"):
        optimizer.add_param_group({"params": [vector], "kind": "muon"})
    count = len(optimizer.param_groups)
    with pytest.raises(ValueError, match="more than one"):
        optimizer.add_param_group({"params": [("more", more)], "kind": "adamw"})
    assert len(optimizer.param_groups) == count
    optimizer.step()


def test_kinds_are_asked_for():
    with pytest.raises(ValueError, match="from_module"):
        MuonW([nn.Parameter(torch.ones(3, 3))])
    with pytest.raises(ValueError, match="kind 'sgd'"):
        MuonW([{"params": [nn.Parameter(torch.ones(3, 3))], "kind": "sgd"}])


def test_bad_options():
    with pytest.raises(ValueError, match="max_grad_norm is 0; it must be above 0, or None"):
        MuonW.from_module(nn.Linear(3, 3), max_grad_norm=0)
    with pytest.raises(ValueError, match="weight_decay is a tensor"):
        MuonW.from_module(nn.Linear(3, 3), weight_decay=torch.tensor(0.1))  # pyrefly: ignore


def test_split_sizes_that_name_nothing():
    with pytest.raises(ValueError, match=r"gate\.weight"):
        MuonW.from_module(make("cpu"), split_sizes={"gate.weight": (8, 8)})


def test_state_of_other_groups_is_refused(device):
    model = make(device)
    optimizer = MuonW.from_module(model)
    other = MuonW.from_module(model, split_sizes=SPLITS)
    with pytest.raises(ValueError, match="same groups"):
        other.load_state_dict(optimizer.state_dict())


def test_closure(device):
    model = make(device, layers=1)
    optimizer = MuonW.from_module(model, lr=0.01)

    def closure():
        optimizer.zero_grad()
        loss = torch.stack([p.square().sum() for p in model.parameters()]).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > optimizer.step(closure)
