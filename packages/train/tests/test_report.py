"""The picture of a run has its curves in it."""

from pathlib import Path

import numpy as np
from matplotlib.image import imread

from tilewright_train.metrics import Record
from tilewright_train.report import plot_losses


def draw(path: Path, records: list[Record]) -> None:
    plot_losses(records, path, title="a run", vocab_size=300, bigram_loss=4.0)


def test_the_picture_shows_the_losses(tmp_path: Path) -> None:
    losses = [Record(step=0, val_loss=5.7)]
    losses += [
        Record(step=s, loss=5.7 - s / 20, lr=0.1, val_loss=5.6 - s / 20 if s % 10 == 0 else None)
        for s in range(1, 41)
    ]
    draw(tmp_path / "report" / "loss.png", losses)
    draw(tmp_path / "flat.png", losses[:1])
    picture = imread(tmp_path / "report" / "loss.png")
    assert picture.shape == (660, 990, 4)
    # The blue of the training curve, drawn from top left to bottom right.
    distance = np.abs(picture[..., :3] - np.array([0x9B, 0xB8, 0xD3]) / 255)
    blue = np.all(distance < 0.02, axis=-1)
    rows, columns = blue.nonzero()
    assert blue.sum() > 300
    left, right = columns < 400, columns > 700
    assert rows[left].mean() < rows[right].mean()
    assert imread(tmp_path / "flat.png").shape == picture.shape


def test_a_run_of_one_measurement_can_be_drawn(tmp_path: Path) -> None:
    draw(tmp_path / "loss.png", [Record(step=0, val_loss=5.7)])
    assert imread(tmp_path / "loss.png").std() > 0.01
