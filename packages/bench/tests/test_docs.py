from pathlib import Path

import pytest

from tilewright_bench import roofline
from tilewright_bench.docs import NOT_MEASURED, stale, update
from tilewright_bench.pages import PageError
from tilewright_bench.saved import BASELINES, SavedRunError

ROOT = Path(__file__).parents[3]

BENCHMARK = """
import pytest, torch
from tilewright_bench import Case, Work

def case(operator):
    work = Work(bytes=1, flops=1)
    return Case(operator=operator, shape=(8,), dtype=torch.float32, make_inputs=lambda d, g: (),
                reference=abs, forward=work, backward=work)

@pytest.mark.parametrize("case", [case("softmax"), pytest.param(case("log_softmax"), id="log")])
def bench_softmax(case): ...
"""


def marked(*markers):
    return "\n\n".join(f"<!-- bench-docs {m} -->\n<!-- /bench-docs -->" for m in markers) + "\n"


@pytest.fixture
def root(tmp_path, write_run, info):
    """A workspace with a baseline of rms_norm and swiglu, and a benchmark of two softmaxes."""
    infos = {
        "a": info(),
        "b": info(provider="torch", share=0.8, clock="cuda events"),
        "c": info(direction="bwd"),
        "d": info(operator="swiglu"),
    }
    medians = {"a": 68e-6, "b": 82e-6, "c": 1e-4, "d": 2e-4}
    write_run(tmp_path / BASELINES / "h200-norms.json", medians, infos=infos)
    benchmarks = tmp_path / "packages/bench/benchmarks"
    benchmarks.mkdir(parents=True)
    (benchmarks / "bench_softmax.py").write_text(BENCHMARK)
    (tmp_path / "docs" / "operators").mkdir(parents=True)
    (tmp_path / "README.md").write_text("# none\n")
    return tmp_path


def test_tables_and_plots_are_made_from_the_baseline(root):
    page = root / "docs" / "operators" / "norms.md"
    page.write_text(marked("table: rms_norm", "plot: rms_norm"))
    assert update(root, "h200") == [page, root / "docs/images/rms_norm.svg"]
    text = page.read_text()
    assert (
        "| 16384×4096 bf16 | forward | tilewright | 68 | 3912 | 95 % | | 21 | 2 | 1.6e-03 |" in text
    )
    assert "![rms_norm on one NVIDIA H200" in text
    assert "](../images/rms_norm.svg)" in text
    assert "One NVIDIA H200 (driver 580.1), torch 2.11.0, triton 3.6.0, commit `0123456789`" in text
    assert "`packages/bench/baselines/h200-norms.json`. † by events" in text
    assert update(root, "h200") == []
    assert stale(root, "h200") == []


def test_several_operators_stand_under_their_names(root):
    page = root / "docs" / "page.md"
    page.write_text(marked("table: swiglu softmax", "plot: swiglu"))
    update(root, "h200")
    text = page.read_text()
    assert text.index("`swiglu`:\n\n| shape") < text.index(f"`softmax`:\n\n{NOT_MEASURED}")
    assert "](images/swiglu.svg)" in text


def test_a_summary_chooses_cases_and_directions(root):
    page = root / "README.md"
    page.write_text(marked("summary: rms_norm/16384x4096/fwd swiglu log_softmax"))
    update(root, "h200")
    lines = page.read_text().splitlines()
    assert lines[4] == "| `rms_norm` 16384×4096 bf16 forward | 68 (95 %) | 82 † (80 %) |"
    assert lines[5] == "| `swiglu` 16384×4096 bf16 forward | 200 (95 %) | |"
    assert lines[7].endswith("`log_softmax`: not measured yet.")


@pytest.mark.parametrize("kind", ["table", "plot", "summary"])
def test_an_operator_without_a_baseline_is_not_measured_yet(root, kind):
    page = root / "docs" / "page.md"
    page.write_text(marked(f"{kind}: log_softmax"))
    assert stale(root, "h200") == ["docs/page.md:2: differs from the baselines"]
    update(root, "h200")
    assert page.read_text().splitlines()[1:4] == ["", NOT_MEASURED, ""]
    assert stale(root, "h200") == []


def test_bars_of_a_family_are_held_against_its_baseline(root):
    page = root / "docs" / "page.md"
    page.write_text(marked("bars: norms", "bars: softmax"))
    update(root, "h200")
    norms, softmax = page.read_text().split("<!-- bench-docs bars: softmax -->")
    place, bar = "`rms_norm` 16384×4096 bf16 forward", "share of the ceiling ≥ 95 %"
    assert f"| {place} | {bar} | 95.3 % of copy | yes |" in norms
    assert "not measured. One NVIDIA H200 (driver 580.1)" in norms
    assert f"| {place.replace('rms_norm', 'softmax')} | {bar} | not measured | |" in softmax
    assert "0 met, 0 missed" in softmax
    page.write_text(page.read_text().replace("| 95.3 % of copy | yes |", "| 95.3 % of copy | no |"))
    assert stale(root, "h200") == ["docs/page.md:7: differs from the baselines"]


def test_the_roofline_comes_from_the_measured_ceilings(root):
    page = root / "docs" / "bench.md"
    page.write_text(marked("roofline"))
    update(root, "h200")
    assert NOT_MEASURED in page.read_text()
    ceilings = {
        "machine_info": {"gpu": "NVIDIA H200"},
        "copy_gb_per_s": {"4294967296": 4200.0},
        "l2_copy_gb_per_s": 8000.0,
        "matmul_tflop_per_s": {"bf16": 700.0},
    }
    roofline.save(ceilings, root / roofline.FOLDER / "h200.json")
    update(root, "h200")
    assert "](images/roofline.svg)" in page.read_text()
    assert (root / "docs/images/roofline.svg").exists()


def test_what_differs_from_the_baselines_is_stale(root, write_run, info):
    page = root / "docs" / "page.md"
    page.write_text(f"# title\n\n{marked('table: swiglu', 'plot: swiglu', 'plot: rms_norm')}")
    update(root, "h200")
    page.write_text(page.read_text().replace("| 200 |", "| 199 |"))
    (root / "docs/images/rms_norm.svg").unlink()
    assert stale(root, "h200") == [
        "docs/page.md:7: differs from the baselines",
        "docs/images/rms_norm.svg: other than what would be drawn from the baselines",
    ]
    update(root, "h200")
    new = {"d": info(operator="swiglu", share=0.99)}
    write_run(root / BASELINES / "h200-norms.json", {"d": 2e-4}, infos=new)
    page.write_text(marked("plot: swiglu"))
    update(root, "h200")
    assert stale(root, "h200") == ["docs/images/rms_norm.svg: no page asks for this plot"]


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("table: softmaxx", r"docs/page.md:1: no benchmark measures an operator 'softmaxx' \(did"),
        ("plot: zzz", r"\(log_softmax, rms_norm, softmax, swiglu\)"),
        ("tabel: rms_norm", "'tabel' is none of table, plot, summary, bars, roof"),
        ("plot", "name at least one operator, as in plot: rms_norm"),
        ("bars", "name at least one family, as in bars: norms"),
        ("bars: norm", r"there are no bars for a family 'norm' \(did you mean 'norms'\?\)"),
        ("summary: rms_norm/8x8", "has no 'rms_norm/8x8', but 16384x4096-bf16/fwd, 16384x4096-bf1"),
    ],
)
def test_markers_that_cannot_be_filled_are_named(root, marker, message):
    (root / "docs" / "page.md").write_text(marked(marker))
    for function in (update, stale):
        with pytest.raises(PageError, match=message):
            function(root, "h200")


def test_a_figure_has_one_source(root, write_run, info):
    write_run(root / BASELINES / "h200.json", {"e": 1e-4}, infos={"e": info()})
    with pytest.raises(SavedRunError, match=r"rms_norm is in .*norms.json and in .*h200.json"):
        update(root, "h200")


def test_a_device_without_a_baseline(root):
    with pytest.raises(SavedRunError, match="holds no baseline of 'a100'"):
        update(root, "a100")


def test_the_pages_of_this_repository_are_made_from_its_baselines():
    if not (ROOT / "docs").exists():
        pytest.skip("needs the workspace, of which this is a copy without docs")
    assert stale(ROOT, "h200") == [], "make them anew with: bench-docs"
