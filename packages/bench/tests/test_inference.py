"""What is said of recorded inference: rates beside their bars, the cache's memory."""

import copy

from tilewright_bench.inference import cache_memory, rates_table

GREEDY = {"prompt": 128, "new": 256, "options": {"temperature": 0}, "first_call_s": 8.0}
RECORD = {
    "model": "0.5b",
    "decode": [
        GREEDY | {"batch": 1, "tokens_per_s": 2000.4, "tokens_per_s_with_prompts": 1900.0},
        GREEDY | {"batch": 32, "tokens_per_s": 44000.0, "tokens_per_s_with_prompts": 40000.0},
        GREEDY
        | {"batch": 1, "tokens_per_s": 1800.0, "tokens_per_s_with_prompts": 1700.0}
        | {"options": {"temperature": 0.8}},
    ],
    "prefill": {"batch": 8, "length": 4096, "tflop_per_s": 500.4, "share": 0.71}
    | {"tokens_per_s": 400000},
    "cache": [
        {"cache": "rows", "batch": 1, "tokens": 100, "tokens_per_s": 300.0}
        | {"bytes_each_50_tokens": [2**20, 2**20]},
        {"cache": "concatenation", "batch": 1, "tokens": 100, "tokens_per_s": 200.0}
        | {"bytes_each_50_tokens": [2**19, 2**20]},
    ],
}


def test_rates_stand_beside_their_bars():
    table = rates_table(RECORD)
    assert "| 2,000 tokens/s (1,900 with prompts) | ≥ 1,400 tokens/s | yes |" in table
    assert "| 44,000 tokens/s (40,000 with prompts) | ≥ 45,000 tokens/s | no |" in table
    assert "top-p | 1,800 tokens/s (1,700 with prompts) |  |  |" in table
    assert "| 8.0 s | < 20 s | yes |" in table
    assert "| 500 TFLOP/s, 71 % of matmul (400,000 tokens/s) | ≥ 70 % | yes |" in table
    assert "| 1.50× (300 and 200 tokens/s) | ≥ 1.3× | yes |" in table


def test_a_missed_bar_is_said():
    slow = copy.deepcopy(RECORD)
    slow["decode"][0]["first_call_s"] = 21.0
    slow["prefill"]["share"] = 0.69
    slow["cache"][0]["tokens_per_s"] = 250.0
    assert rates_table(slow).count("| no |") == 4


def test_memory_is_drawn_over_tokens():
    rows, joined = cache_memory(RECORD).panels[0].lines
    assert rows.points == ((50, 1.0), (100, 1.0))
    assert joined.points == ((50, 0.5), (100, 1.0))
    assert (rows.label, joined.label) == ("one allocation", "concatenation")
