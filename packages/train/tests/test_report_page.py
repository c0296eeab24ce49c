"""One page about runs: it needs nothing, holds what was measured, and says what differs."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tilewright_train.layers import parse
from tilewright_train.metrics import read_metrics
from tilewright_train.pretraining import run
from tilewright_train.report_command import main
from tilewright_train.report_page import smoothed


class _Balanced(HTMLParser):
    """Complains about an end tag that ends something else."""

    _VOID = frozenset({"meta", "br", "use", "path", "image"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in self._VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        if tag not in self._VOID:
            assert self.open.pop() == tag


def parsed(page: str) -> _Balanced:
    parser = _Balanced()
    parser.feed(page)
    assert parser.open == []
    return parser


def two_runs(flags: list[str]) -> list[Path]:
    return [
        run(parse([*flags, "--name", name, *more]), io.StringIO())
        for name, more in (("one", []), ("two", ["--batch-size", "8", "--lr", "0.005"]))
    ]


def test_a_page_of_two_runs_compares_them_and_needs_nothing(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = two_runs(tiny_flags)
    place = tmp_path / "pages" / "both.html"
    assert main([*map(str, runs), "--out", str(place)]) == 0
    assert capsys.readouterr().out == f"{place}\n"
    page = place.read_text()
    tags = parsed(page)
    # Losses by step and by tokens; validation, rate, norm, speed, memory.
    assert tags.counts["svg"] == 7
    assert "script" not in tags.counts
    outside = re.findall(r"""(?:src|href)=["'](?!#)([^"']*)""", page)
    assert outside == []
    for folder in runs:
        records = read_metrics(folder / "metrics.jsonl")
        assert f"<td>{records[-1].val_loss:.4f}</td>" in page
        assert f"<td>{records[-1].tokens:,}</td>" in page
    differing = page.split("Options that differ")[1].split("</table>")[0]
    assert "<td>batch_size</td><td>4</td><td>8</td>" in differing
    assert "<td>lr</td><td>0.01</td><td>0.005</td>" in differing
    assert "<td>seq_len</td>" not in differing


def test_a_page_of_one_run_lies_in_it_and_is_the_same_again(tiny_flags: list[str]) -> None:
    (folder, _) = two_runs(tiny_flags)
    (folder / "skipped" / "step-000003").mkdir(parents=True)
    facts = {"step": 3, "why": "not finite", "loss": "nan", "norm": 1.0, "guilty": "output of <b>"}
    (folder / "skipped" / "step-000003" / "step.json").write_text(json.dumps(facts))
    assert main([str(folder)]) == 0
    page = (folder / "report" / "report.html").read_text()
    parsed(page)
    assert "Options that differ" not in page
    assert "<td>3</td><td>not finite</td><td>nan</td><td>1.0</td>" in page
    assert "output of &lt;b&gt;" in page
    assert "<h2>Samples</h2>" in page
    assert main([str(folder)]) == 0
    assert (folder / "report" / "report.html").read_text() == page


def test_an_average_is_unbiased_and_as_long_as_what_it_smooths() -> None:
    assert smoothed([3.0] * 5, share=0.5) == pytest.approx([3.0] * 5)
    rising = [float(n) for n in range(1000)]
    late = smoothed(rising)[-1]
    assert 970 < late < 985  # 20 steps behind
    assert smoothed([1.0, 5.0]) == [1.0, 5.0]
    assert smoothed([]) == []


def test_a_mistake_is_one_line(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "none")]) == 2
    assert "does not exist: give the folder that a run printed" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert "is no run: it holds no config.toml" in capsys.readouterr().err
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.toml").write_text("[run]\n")
    assert main([str(begun)]) == 2
    assert "metrics.jsonl holds no step yet" in capsys.readouterr().err
    (begun / "metrics.jsonl").write_text('{"step": 0, "val_loss": 2.0}\n')
    assert main([str(begun), str(begun)]) == 2
    assert "is given twice" in capsys.readouterr().err
    (begun / "run.json").write_text('{"parameters": "many"}')
    assert main([str(begun)]) == 0
    capsys.readouterr()
    (begun / "config.toml").write_text("[run]\nname =")
    assert main([str(begun)]) == 2
    assert f"{begun / 'config.toml'} is not TOML" in capsys.readouterr().err
