import dataclasses
import re
from itertools import pairwise

import pytest
from matplotlib import style
from matplotlib.figure import Figure

from tilewright_bench import plots
from tilewright_bench.plots import Roofline, bars, digest, digest_in, draw
from tilewright_bench.rows import row_of


@pytest.fixture
def rows(info):
    def row(median, **fields):
        return row_of({"median": median, "iqr": 0.0}, info(**fields))

    return [
        row(1.5, provider="liger", share=0.6),
        row(1.0, share=0.9044),
        row(2.0, provider="torch", share=0.45),
        row(3.0, provider="other", share=0.3, direction="bwd", case="8x4096x16x8x128-bf16"),
    ]


ROOFLINE = Roofline(
    device="NVIDIA H200",
    bandwidths=(("L2", 8000.0), ("memory", 4200.0)),
    rates=(("bf16", 700.0), ("fp16", 712.0), ("fp32", 50.0)),
    points=(
        ("norms", "fwd", 1.0, 3.9),
        ("norms", "bwd", 2.0, 7.5),
        ("linear-cross-entropy", "fwd+bwd", 3000.0, 450.0),
    ),
)


def test_bars_are_shares_with_ours_first_and_the_lead_over_the_best_peer(rows):
    plot = bars(rows)
    assert plot.providers == ("tilewright", "torch", "liger", "other")
    assert plot.cases == ("16384x4096-bf16", "8x4096x16x8x128-bf16")
    assert ("fwd", "16384x4096-bf16", "tilewright", 90.4) in plot.shares
    assert plot.leads == (("fwd", "16384x4096-bf16", 1.5),)


def test_a_drawing_shows_its_data_and_holds_their_digest(rows, tmp_path):
    plot = bars(rows)
    path = tmp_path / "images" / "rms_norm.svg"
    assert digest_in(path) is None
    draw(plot, path)
    svg = path.read_text()
    assert digest_in(path) == digest(plot)
    for text in ("1.50×", "forward", "backward", "% of copy", "Liger-Kernel", "16384×4096"):
        assert re.search(f">{re.escape(text)}<", svg), text


@pytest.mark.parametrize("name", ["bars", "roofline"])
def test_the_same_data_give_the_same_bytes(rows, tmp_path, name):
    plot = bars(rows) if name == "bars" else ROOFLINE
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    draw(plot, first)
    draw(plot, second)
    assert first.read_bytes() == second.read_bytes()
    assert b"<dc:date>" not in first.read_bytes()


def test_a_drawing_changed_by_hand_is_noticed(rows, tmp_path):
    path = tmp_path / "rms_norm.svg"
    draw(bars(rows), path)
    path.write_text(path.read_text().replace("1.50×", "1.60×"))
    assert digest_in(path) == ""


def test_bars_under_different_ceilings_name_both(rows):
    product = dataclasses.replace(rows[0], ceiling="matmul")
    assert bars([product]).ceiling == "matrix product"
    assert bars([product, *rows]).ceiling == "copy or matrix product"


def test_a_digest_depends_on_the_data_the_style_and_the_code(rows, tmp_path, monkeypatch):
    plot = bars(rows)
    assert digest(plot) == digest(bars(rows))
    other = dataclasses.replace(plot, leads=(("fwd", "16384x4096-bf16", 1.51),))
    assert digest(other) != digest(plot)
    before = digest(plot)
    with monkeypatch.context() as patched:
        patched.setattr(plots, "DRAWING", plots.DRAWING + 1)
        assert digest(plot) != before
    style = tmp_path / "other.mplstyle"
    style.write_text(plots.STYLE.read_text() + "\nfont.size: 7\n")
    monkeypatch.setattr(plots, "STYLE", style)
    assert digest(plot) != before


def test_nothing_in_a_drawing_is_black_or_white(rows, tmp_path):
    for name, plot in (("bars", bars(rows)), ("roofline", ROOFLINE)):
        path = tmp_path / f"{name}.svg"
        draw(plot, path)
        svg = path.read_text()
        assert not re.findall(r"(?:fill|stroke): ?(?:#000000|#ffffff|black|white)", svg)


def test_a_roofline_names_its_ceilings_and_families(tmp_path):
    path = tmp_path / "roofline.svg"
    draw(ROOFLINE, path)
    svg = path.read_text()
    for text in ("fp16 712, bf16 700", "fp32 50", "linear-cross-entropy", "backward"):
        assert f">{text}<" in svg, text


@pytest.mark.parametrize(
    ("cache", "labels"),
    [(8000.0, ["L2 8000, memory 4200 GB/s"]), (9000.0, ["L2 9000 GB/s", "memory 4200 GB/s"])],
)
def test_bandwidths_near_one_another_share_a_label(tmp_path, cache, labels):
    path = tmp_path / "roofline.svg"
    bandwidths = (("L2", cache), ("memory", 4200.0))
    draw(dataclasses.replace(ROOFLINE, bandwidths=bandwidths), path)
    assert re.findall(r">([^<]*GB/s)<", path.read_text()) == labels


def test_labels_of_rates_lie_beside_the_axes_and_apart():
    rates = (("fp8", 1330.0), ("bf16", 680.0), ("fp16", 660.0), ("tf32", 353.0), ("fp32", 51.0))
    figure = Figure()
    with style.context(plots.STYLE):
        plots._draw_roofline(dataclasses.replace(ROOFLINE, rates=rates), figure)
        figure.draw_without_rendering()
    (axes,) = figure.axes
    labels = [text for text in axes.texts if "GB/s" not in text.get_text()]
    assert [text.get_text() for text in labels] == [
        "fp8 1330",
        "bf16 680, fp16 660",
        "tf32 353",
        "fp32 51",
    ]
    boxes = [text.get_window_extent() for text in labels]
    assert all(box.x0 > axes.bbox.x1 for box in boxes)
    assert all(above.y0 >= below.y1 for above, below in pairwise(boxes))
