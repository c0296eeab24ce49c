from unittest.mock import patch

import pytest
import torch

from tilewright_bench import (
    Case,
    Work,
    normal_inputs,
    skip_rows_that_liger_refuses,
    usual_providers,
    variants,
)

CPU = torch.device("cpu")


def case(*shape):
    work = Work(bytes=1, flops=1)
    return Case(
        operator="scale",
        shape=shape,
        dtype=torch.float32,
        make_inputs=normal_inputs(shape, (3,), dtype=torch.float32),
        reference=lambda x, y: x,
        forward=work,
        backward=work,
    )


def test_inputs_are_random_and_differentiated_and_follow_the_seed():
    x, y = case(4, 1000).inputs(CPU, seed=1)
    assert (x.shape, y.shape) == ((4, 1000), (3,))
    assert x.dtype == torch.float32
    assert x.requires_grad
    assert y.requires_grad
    assert abs(x.mean()) < 0.1
    assert abs(x.std() - 1) < 0.1
    assert torch.equal(x, case(4, 1000).inputs(CPU, seed=1)[0])
    assert not torch.equal(x, case(4, 1000).inputs(CPU, seed=2)[0])


def test_ours_torch_and_its_compiler_are_compared_with_others_behind():
    def ours(x):
        return x

    def eager(x):
        return x + 0

    built = []
    providers = usual_providers(ours, eager, liger=lambda: built.append("liger") or abs)
    assert list(providers) == ["tilewright", "torch", "compile", "liger"]
    assert built == []  # what may be missing is asked for when its turn comes
    assert providers["tilewright"]() is ours
    assert providers["torch"]() is eager
    with patch("torch.compile") as compiled:
        assert providers["compile"]() is compiled.return_value
    compiled.assert_called_once_with(eager, dynamic=False)


def test_liger_is_skipped_on_rows_that_it_refuses():
    found = {
        v.provider: v for v in variants(usual_providers(abs, abs, liger=lambda: abs), ("fwd",))
    }
    skip_rows_that_liger_refuses(case(2, 65536), found["liger"])
    skip_rows_that_liger_refuses(case(2, 65537), found["tilewright"])
    with pytest.raises(pytest.skip.Exception, match="rows wider than 65536"):
        skip_rows_that_liger_refuses(case(2, 65537), found["liger"])
