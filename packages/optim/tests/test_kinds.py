"""How columns of tensors are split into launches."""

import pytest
import torch

from tilewright_optim._kinds import by_kind

HALF, SINGLE = torch.ones(2, dtype=torch.float16), torch.ones(2)


def test_alike_tensors_stay_together():
    columns = ([SINGLE, SINGLE], [HALF, HALF])
    ((kind, parts),) = by_kind(columns, ([], [SINGLE, HALF]))
    assert parts == [*columns, [], [SINGLE, HALF]]
    assert [dtype for _, dtype, _ in kind] == [torch.float32, torch.float16]


def test_rows_are_split_by_all_columns_in_order():
    a, b, c, d = (torch.full((2,), float(i)) for i in range(4))
    params, grads, steps = [a, b, HALF, c, d], [a, HALF, HALF, c, HALF], [a, b, c, d, a]
    split = list(by_kind((params, grads), ([], steps)))
    assert [[dtype for _, dtype, _ in kind] for kind, _ in split] == [
        [torch.float32, torch.float32],
        [torch.float32, torch.float16],
        [torch.float16, torch.float16],
    ]
    expected = [
        [[a, c], [a, c], [], [a, d]],
        [[b, d], [HALF, HALF], [], [b, a]],
        [[HALF], [HALF], [], [c]],
    ]
    for (_, parts), wanted in zip(split, expected, strict=True):
        assert [[id(t) for t in part] for part in parts] == [[id(t) for t in w] for w in wanted]


def test_nothing():
    assert list(by_kind(([], []), ([], []))) == []


def test_sparse_gradients_are_a_kind_of_their_own():
    sparse = torch.ones(2).to_sparse()
    assert len(list(by_kind(([SINGLE, SINGLE], [SINGLE, sparse])))) == 2


@pytest.mark.gpu
def test_devices_are_told_apart():
    cuda = SINGLE.cuda()
    kinds = [kind for kind, _ in by_kind(([cuda, SINGLE, cuda],))]
    assert [device.type for ((device, _, _),) in kinds] == ["cuda", "cpu"]
