"""How many tokens a chunk takes."""

import pytest

from tilewright_kernels._logit_chunks import LEAST_BYTES, ROUNDED_SUMS, chunk_rows

H200 = 132


def test_a_budget_is_kept_and_used():
    for tokens in (1, 127, 1000, 16384):
        for budget in (1, 64, 100, 128, 500, 4000, 20000):
            rows = chunk_rows(tokens, 1536, 1000, 1000 * budget, H200)
            assert min(tokens, budget) / 2 < rows <= max(1, min(tokens, budget))
            assert rows % 128 == 0 or rows in (tokens, budget)


def test_chunks_fill_waves_of_tiles():
    # 22 x 6 tiles of 128 x 256 are one wave; 2944 to 3200 rows would be two.
    assert chunk_rows(16384, 1536, 65536, 3200 * 65536, H200) == 2816
    # 24 x 16 tiles are 97 % of three waves; 3200 rows would be four.
    assert chunk_rows(16384, 4096, 262144, 3200 * 262144, H200) == 3072


@pytest.mark.parametrize("width", [512, 1024, 1536, 4096])
@pytest.mark.parametrize(("tokens", "row_bytes"), [(16384, 65536), (1275, 524288), (300, 2000)])
def test_default_is_a_fifth_of_the_logits_in_few_chunks(tokens, row_bytes, width):
    rows = chunk_rows(tokens, width, row_bytes, None, H200)
    assert rows * row_bytes <= max(tokens * row_bytes // 5, LEAST_BYTES)
    assert -(-tokens // rows) <= ROUNDED_SUMS
