"""state_tensors and load_state_tensors: through safetensors and back, bit for bit."""

import copy

import pytest
import torch

from tilewright_kernels import use_backend
from tilewright_optim import Adam, AdamW, Muon
from tilewright_optim._states import as_one


@pytest.fixture(autouse=True)
def plain():
    with use_backend("torch"):
        yield


def a_model(device, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Linear(30, 3)).to(device, dtype)


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p)
        optimizer.step()


@pytest.mark.parametrize(
    "storage",
    [{}, {"master": "exact"}, {"master": "exact", "state_dtype": "int8"}, {"amsgrad": True}],
    ids=str,
)
@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_a_run_goes_on_exactly(kind, storage, device, tmp_path):
    model, other = a_model(device), a_model(device)
    optimizer = kind(model.parameters(), lr=1e-2, **storage)
    train(model, optimizer, range(2))
    tensors = {k: v.cpu() for k, v in optimizer.state_tensors(model.named_parameters()).items()}
    assert "1.weight.exp_avg" in tensors
    assert tensors["0.bias.step"] == 2
    assert len({t.untyped_storage().data_ptr() for t in tensors.values()}) == len(tensors)
    torch.save(tensors, tmp_path / "state.pt")

    other.load_state_dict(model.state_dict())
    resumed = kind(other.parameters(), lr=1e-2, **storage)
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_tensors(loaded, other.named_parameters())
    train(model, optimizer, range(2, 4))
    train(other, resumed, range(2, 4))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    ours, theirs = (o.state_tensors(m.named_parameters())
                    for o, m in ((optimizer, model), (resumed, other)))  # fmt: skip
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours)


def test_names_given_to_the_optimizer(device):
    model = a_model(device)
    optimizer = AdamW(model.named_parameters())
    train(model, optimizer, range(1))
    assert set(optimizer.state_tensors()) == {
        f"{i}.{p}.{s}"
        for i in (0, 1)
        for p in ("weight", "bias")
        for s in ("step", "exp_avg", "exp_avg_sq")
    }


def test_what_is_loaded_is_a_copy_and_all_there_is(device):
    model = a_model(device)
    optimizer = AdamW(model.named_parameters())
    train(model, optimizer, range(1))
    tensors = optimizer.state_tensors()
    part = {k: v.clone() for k, v in tensors.items() if k.startswith("0.weight")}
    optimizer.load_state_tensors(part)
    train(model, optimizer, range(1, 2))
    assert part["0.weight.step"] == 1
    steps = {k: v.item() for k, v in optimizer.state_tensors().items() if k.endswith("step")}
    assert steps == {"0.weight.step": 2, "0.bias.step": 1, "1.weight.step": 1, "1.bias.step": 1}


def test_bad_tensors(device):
    model = a_model(device)
    optimizer = AdamW(model.parameters())
    with pytest.raises(ValueError, match="have no names; give named_parameters"):
        optimizer.state_tensors()
    named = dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"9\.weight\.exp_avg belongs to no parameter"):
        optimizer.load_state_tensors({"9.weight.exp_avg": torch.ones(1)}, named.items())
    with pytest.raises(ValueError, match=r"0\.bias\.exp_avg has shape \(7,\) and its parameter"):
        optimizer.load_state_tensors({"0.bias.exp_avg": torch.ones(7)}, named.items())
    with pytest.raises(ValueError, match=r"0\.bias\.exp_avg_scale has shape \(7,\)"):
        optimizer.load_state_tensors({"0.bias.exp_avg_scale": torch.ones(7)}, named.items())


@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_a_state_of_other_shapes_is_refused_before_anything_changes(kind, device):
    ours = [torch.nn.Parameter(torch.ones(*s, device=device)) for s in ((4, 3), (2, 5))]
    theirs = [torch.nn.Parameter(torch.ones_like(p)) for p in reversed(ours)]
    optimizer, other = kind(ours, lr=0.1), kind(theirs, lr=0.2)
    for p in (*ours, *theirs):
        p.grad = torch.ones_like(p)
    optimizer.step()
    other.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"of shape \(2, 5\) for a parameter of shape \(4, 3\)"):
        optimizer.load_state_dict(other.state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, state in before["state"].items():
        assert all(torch.equal(state[key], after["state"][index][key]) for key in state)


def test_options_that_torch_lacks_stay_as_they_are(device):
    p, q = (torch.nn.Parameter(torch.ones(4, 3, device=device)) for _ in range(2))
    ours = Muon([{"params": [p], "split_sizes": (2, 2)}])
    ours.load_state_dict(torch.optim.Muon([q], lr=0.5).state_dict())
    assert ours.param_groups[0]["split_sizes"] == (2, 2)
    assert ours.param_groups[0]["lr"] == 0.5
    decayed = AdamW([{"params": [p], "cautious": True}])
    decayed.load_state_dict(torch.optim.AdamW([q]).state_dict())
    assert decayed.param_groups[0]["cautious"]


@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_hooks_may_change_what_is_loaded(kind, device):
    p, q = (torch.nn.Parameter(torch.ones(4, 3, device=device).bfloat16()) for _ in range(2))
    p.grad = torch.ones_like(p)
    optimizer, other = kind([p], master="exact"), kind([q], master="exact")
    optimizer.step()
    saved = optimizer.state_dict()
    renamed = {"state": {7: saved["state"][0]}, "param_groups": saved["param_groups"]}

    def by_the_old_number(_, loading):
        return {**loading, "state": {0: loading["state"][7]}}

    other.register_load_state_dict_pre_hook(by_the_old_number)
    other.load_state_dict(renamed)
    assert other.state[q].keys() == optimizer.state[p].keys()
    for key, value in optimizer.state[p].items():
        assert torch.equal(other.state[q][key], value)
        assert other.state[q][key].dtype == value.dtype
    assert len(other._optimizer_load_state_dict_pre_hooks) == 1


def test_steps_of_one_launch_lie_together(device):
    dtypes = (torch.bfloat16, torch.float32) * 3
    params = [torch.nn.Parameter(torch.ones(3, device=device, dtype=d)) for d in dtypes]
    optimizer = AdamW(params, master="exact")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for start in (0, 1):
        assert as_one([optimizer.state[p]["step"] for p in params[start::2]]) is not None
