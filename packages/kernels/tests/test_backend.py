"""Choosing a backend, and the report of what ran."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tilewright_kernels import backend_report, parse_backends, rms_norm, use_backend
from tilewright_kernels._backend import decide


@pytest.fixture(autouse=True)
def _default_choice():
    with use_backend("auto"):
        yield


def call(device="cpu"):
    return rms_norm(torch.ones(2, 8, device=device), (8,))


def run_python(code, **environment):
    """A process of its own: the environment is read when the package is imported."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_auto_takes_the_reference_on_a_cpu_and_says_why():
    backend_report(reset=True)
    call()
    row = backend_report()["rms_norm"]
    assert (row.setting, row.triton, row.torch, row.launches) == ("auto", 0, 1, 0)
    assert row.reasons == ("torch (auto: the tensors are on cpu)",)
    assert not row.fell_back, "a CPU has nothing to fall back from"


@pytest.mark.gpu
def test_auto_takes_the_kernel_on_a_gpu():
    backend_report(reset=True)
    call("cuda")
    row = backend_report()["rms_norm"]
    assert (row.triton, row.torch, row.launches) == (1, 0, 1)
    assert row.reasons == ("triton (auto: the tensors are on cuda)",)


def test_asked_for(device):
    for backend, launches in (("triton", 1), ("torch", 0)):
        backend_report(reset=True)
        with use_backend(backend):
            call(device)
            row = backend_report()["rms_norm"]
        assert (row.setting, row.launches) == (backend, launches)
        assert row.reasons == (f"{backend} (asked for)",)


def test_an_unsupported_call_on_a_gpu_counts_as_a_fallback():
    assert decide("rms_norm", "cuda", "rows are too odd") == (
        "torch",
        "auto: rows are too odd",
        True,
    )
    with use_backend("triton"), pytest.raises(ValueError, match="rows are too odd"):
        decide("rms_norm", "cuda", "rows are too odd")
    with use_backend("torch"):
        assert not decide("rms_norm", "cuda", "rows are too odd").fell_back


def test_auto_takes_torch_where_it_is_better_and_that_is_no_fallback():
    better = "torch is faster here"
    assert decide("rms_norm", "cuda", None, better) == ("torch", f"auto: {better}", False)
    assert decide("rms_norm", "cuda", "rows are too odd", better).fell_back
    assert decide("rms_norm", "cpu", None, better).reason == "auto: the tensors are on cpu"
    with use_backend("triton"):
        assert decide("rms_norm", "cuda", None, better).backend == "triton"


def test_the_report_is_a_table():
    backend_report(reset=True)
    call()
    header, *lines = str(backend_report()).splitlines()
    assert header.split() == ["operator", "setting", "triton", "torch", "launches", "why"]
    (line,) = (line for line in lines if line.startswith("rms_norm"))
    assert line.split(maxsplit=5) == [
        *("rms_norm", "auto", "0", "1", "0"),
        "torch (auto: the tensors are on cpu)",
    ]


def test_traced_calls_are_reported(device):
    backend_report(reset=True)
    with use_backend("triton"):
        compiled = torch.compile(lambda x: rms_norm(x, (8,)), fullgraph=True, backend="aot_eager")
        for _ in range(3):
            compiled(torch.ones(2, 8, device=device))
    row = backend_report()["rms_norm"]
    assert row.triton >= 1, "the traced call"
    assert row.launches == 3, "every launch"


def test_as_a_context_manager_it_restores_also_after_an_error():
    use_backend("torch", rms_norm="triton")

    def fail():
        with use_backend("auto", rms_norm="torch"):
            assert decide("rms_norm", "cpu").backend == "torch"
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert backend_report()["rms_norm"].setting == "triton"


def test_one_operator_over_the_default():
    with use_backend("torch", rms_norm="triton"):
        assert backend_report()["rms_norm"].setting == "triton"
        with use_backend("torch"):  # a new default starts from a clean sheet
            assert backend_report()["rms_norm"].setting == "torch"
        with use_backend(rms_norm="torch"):
            assert backend_report()["rms_norm"].setting == "torch"


def test_unknown_names_list_the_valid_ones():
    unknown: Any = "cuda"
    with pytest.raises(ValueError, match="'cuda' is not a backend; choose from auto, triton"):
        use_backend(unknown)
    with pytest.raises(ValueError, match="rms_norm='cuda' is not a backend"):
        use_backend(rms_norm=unknown)
    with pytest.raises(ValueError, match=r"'rms_nrom'.*did you mean 'rms_norm'.*operators are"):
        use_backend(rms_nrom="torch")
    assert backend_report()["rms_norm"].setting == "auto", "a refused choice changes nothing"


def test_importing_leaves_the_compiler_alone():
    # It takes longer to import than torch itself, and eager users never need it.
    code = "import sys, tilewright_kernels; print('torch._dynamo' in sys.modules)"
    assert run_python(code).stdout == "False\n"


@pytest.mark.parametrize(
    ("text", "default", "single"),
    [
        ("", None, {}),
        (" triton", "triton", {}),
        ("torch, ", "torch", {}),
        (" rms_norm = triton ,auto,adamw=torch", "auto", {"rms_norm": "triton", "adamw": "torch"}),
    ],
)
def test_the_text_of_a_choice(text, default, single):
    assert parse_backends(text) == (default, single)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("auto,cuda", "^'cuda' is not a backend; choose from auto, triton, torch"),
        ("rms_norm = cuda", "^rms_norm='cuda' is not a backend"),
        ("rms_norm=", "^rms_norm='' is not a backend"),
    ],
)
def test_the_text_of_an_unknown_backend(text, message):
    with pytest.raises(ValueError, match=message):
        parse_backends(text)


def test_environment_chooses():
    code = (
        "from tilewright_kernels import backend_report as report;"
        "print([(r.operator, r.setting) for r in report().values()])"
    )
    done = run_python(code, TILEWRIGHT_BACKEND="torch, rms_norm = triton")
    assert "('rms_norm', 'triton')" in done.stdout, done.stderr
    assert "('swiglu', 'torch')" in done.stdout


def test_environment_with_a_mistake():
    done = run_python("import tilewright_kernels", TILEWRIGHT_BACKEND="cuda")
    assert "TILEWRIGHT_BACKEND='cuda' is not a backend" in done.stderr
    code = "import torch, tilewright_kernels as k; k.rms_norm(torch.ones(1, 2), (2,))"
    done = run_python(code, TILEWRIGHT_BACKEND="auto,rms_nrom=torch")
    assert "TILEWRIGHT_BACKEND: 'rms_nrom' is not an operator (did you mean" in done.stderr
    code = "import tilewright_kernels as k; k.check_environment()"
    early = run_python(code, TILEWRIGHT_BACKEND="auto,rms_nrom=torch")
    assert early.stderr.splitlines()[-1] == done.stderr.splitlines()[-1]
    assert done.returncode != 0


def test_triton_without_a_gpu_or_the_interpreter_says_what_to_do():
    code = "import torch, tilewright_kernels as k; k.rms_norm(torch.ones(1, 2), (2,))"
    done = run_python(code, TILEWRIGHT_BACKEND="triton", TRITON_INTERPRET="0")
    assert "the tensors are on cpu; move the tensors to a CUDA device" in done.stderr


def test_without_triton_installed_the_references_run():
    # macOS and Windows have no triton wheels. None in sys.modules makes its import fail.
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "import torch, tilewright_kernels as k\n"
        "print(k.rms_norm(torch.full((1, 2), 3.0), (2,)))\n"
        "k.use_backend('triton'); k.rms_norm(torch.ones(1, 2), (2,))"
    )
    done = run_python(code)
    assert "tensor([[1., 1.]])" in done.stdout, done.stderr
    assert "triton is not installed" in done.stderr
