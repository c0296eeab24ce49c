"""Kernels of routing: choose and count, prefix, place; and the gradient of the weights.

    p = softmax(x) or sigmoid(x)      ids = the k best of p + bias      w_j = scale · p_j / D
    D = Σ_j p_j, or 1

With the gradient dw of the weights, dp is 0 for experts that were not chosen, and for the others

    dp_j = scale · (dw_j - Σ_i dw_i p_i / D) / D  (or scale · dw_j)
    dx = p · (dp - Σ dp · p)  for softmax         dx = p · (1 - p) · dp  for sigmoid

Order without a sort: a program counts what its tokens choose (a histogram of its own, [E, blocks]),
a second kernel sums these along the blocks, and a third knows then where the rows of its tokens
begin at each expert; within a block a token comes after the tokens before it. No atomics, so rows
of an expert are in the order of tokens and two runs give the same. All of it reads T·E logits once
and T·k choices twice: microseconds, if no one waits between.
"""

from tilewright_kernels._math import logistic
from tilewright_kernels._triton import tl, triton

_TINY = tl.constexpr(1e-20)


@triton.jit
def sortable(x):
    """Integers that are ordered as x, NaN above all, 0 and -0 alike; the lowest one is left out."""
    x = tl.where(x == 0, 0.0, x)
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        key = tl.where(x != x, 0x7FFFFFFFFFFFFFFF, bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF))
    else:
        bits = x.to(tl.int32, bitcast=True)
        key = tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return key


@triton.jit
def from_sortable(key):
    """What `sortable` was made of."""
    if key.dtype == tl.int64:
        x = (key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)
    else:
        x = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return x


@triton.jit
def first_best(key, cols):
    """Of each row the largest key, and the lowest column that has it."""
    best = tl.max(key, axis=1)
    return best, tl.min(tl.where(key == best[:, None], cols[None, :], 0x7FFFFFFF), axis=1)


@triton.jit
def _keys_of_best_groups(
    key, cols, n_cols, LOWEST, GROUPS: tl.constexpr, TOPK_GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """key where a column is in one of the best groups, that of -inf elsewhere."""
    size = n_cols // GROUPS
    groups = tl.arange(0, BLOCK_G)
    group_key = tl.full([key.shape[0], BLOCK_G], LOWEST, dtype=key.dtype)
    for group in range(GROUPS):
        own = tl.where((cols // size == group)[None, :], key, LOWEST)
        best, at = first_best(own, cols)
        score = from_sortable(best)
        if size > 1:
            second = tl.max(tl.where(cols[None, :] == at[:, None], LOWEST, own), axis=1)
            score += from_sortable(second)
        group_key = tl.where((groups == group)[None, :], sortable(score)[:, None], group_key)
    never = sortable(tl.full(key.shape, -float("inf"), dtype=from_sortable(key).dtype))
    result = never
    for _ in range(TOPK_GROUPS):
        _, at = first_best(group_key, groups)
        group_key = tl.where(groups[None, :] == at[:, None], LOWEST, group_key)
        result = tl.where((cols // size)[None, :] == at[:, None], key, result)
    return result


@triton.jit
def _scores(x, peak, total, SOFTMAX: tl.constexpr):
    """p of logits x; peak and total, of the whole row, are read for softmax only."""
    if SOFTMAX:
        score = tl.exp(x - peak) / total
    else:
        score, _ = logistic(x)
    return score


@triton.jit
def _load_logits(
    logits_ptr, row_stride, tokens, num_tokens, n_cols, ACC: tl.constexpr, BLOCK_E: tl.constexpr
):
    """A tile of rows, -inf right of them, with each one's maximum and sum of exponentials."""
    cols = tl.arange(0, BLOCK_E)
    inside = (tokens < num_tokens)[:, None] & (cols < n_cols)[None, :]
    rows = tokens.to(tl.int64)[:, None] * row_stride
    x = tl.load(logits_ptr + rows + cols[None, :], mask=inside, other=0.0).to(ACC)
    x = tl.where((cols < n_cols)[None, :], x, -float("inf"))
    peak = tl.max(x, axis=1)[:, None]
    total = tl.sum(tl.exp(x - peak), axis=1)[:, None]
    return x, inside, peak, total


@triton.jit
def moe_choose_kernel(
    logits_ptr, bias_ptr, weights_ptr, ids_ptr, counts_ptr,
    row_stride, num_tokens, n_cols,
    K: tl.constexpr, SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr, SCALE: tl.constexpr,
    GROUPS: tl.constexpr, TOPK_GROUPS: tl.constexpr, BLOCK_G: tl.constexpr,
    LOWEST: tl.constexpr, ACC: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """ids, weights and a histogram [E] of the choices of BLOCK_T tokens; T·E logits in."""
    block = tl.program_id(0)
    tokens, cols = block * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E)
    x, inside, peak, total = _load_logits(
        logits_ptr, row_stride, tokens, num_tokens, n_cols, ACC, BLOCK_E
    )
    preference = x  # orders as the scores do, and before they are rounded
    if bias_ptr is not None or GROUPS > 1:
        preference = _scores(x, peak, total, SOFTMAX)
    if bias_ptr is not None:
        preference += tl.load(bias_ptr + cols, mask=cols < n_cols, other=0.0).to(ACC)[None, :]
    key = sortable(preference)
    if GROUPS > 1:
        key = _keys_of_best_groups(key, cols, n_cols, LOWEST, GROUPS, TOPK_GROUPS, BLOCK_G)
    key = tl.where(inside, key, LOWEST)

    choices = tl.arange(0, BLOCK_K)
    ids = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.int32)
    for j in range(K):
        _, at = first_best(key, cols)
        ids = tl.where((choices == j)[None, :], at[:, None], ids)
        key = tl.where(cols[None, :] == at[:, None], LOWEST, key)
    taken = (key == LOWEST) & inside
    counts = tl.sum(taken.to(tl.int32), axis=0)
    counts_at = counts_ptr + cols.to(tl.int64) * tl.num_programs(0) + block
    tl.store(counts_at, counts, mask=cols < n_cols)

    chosen = (tokens < num_tokens)[:, None] & (choices < K)[None, :]
    rows = tokens.to(tl.int64)[:, None]
    # They lie in the caches; to find them among the registers would be one more reduction each.
    x_chosen = tl.load(logits_ptr + rows * row_stride + ids, mask=chosen, other=0.0)
    weights = _scores(x_chosen.to(ACC), peak, total, SOFTMAX)
    if NORMALIZE:
        sums = tl.sum(tl.where(chosen, weights, 0.0), axis=1)
        weights /= sums[:, None] + _TINY
    out = rows * K + choices[None, :]
    tl.store(ids_ptr + out, ids, mask=chosen)
    tl.store(weights_ptr + out, weights * SCALE, mask=chosen)


@triton.jit
def _taken(ids_ptr, tokens, num_tokens, cols, K: tl.constexpr):
    """1 where a token goes to an expert, [tokens, experts] int32."""
    taken = tl.zeros([tokens.shape[0], cols.shape[0]], dtype=tl.int32)
    for j in range(K):
        ids = tl.load(ids_ptr + tokens * K + j, mask=tokens < num_tokens, other=-1)
        taken = tl.where(cols[None, :] == ids[:, None], 1, taken)
    return taken


@triton.jit
def moe_count_kernel(
    ids_ptr, counts_ptr, num_tokens, n_cols,
    K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The histogram of BLOCK_T tokens whose ids are given."""
    block = tl.program_id(0)
    tokens, cols = block * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E)
    counts = tl.sum(_taken(ids_ptr, tokens, num_tokens, cols, K), axis=0)
    counts_at = counts_ptr + cols.to(tl.int64) * tl.num_programs(0) + block
    tl.store(counts_at, counts, mask=cols < n_cols)


@triton.jit
def moe_prefix_kernel(counts_ptr, totals_ptr, num_blocks, BLOCK_B: tl.constexpr):
    """counts [E, blocks] of an expert to what stands before each; totals [E], its sum. In place."""
    expert = tl.program_id(0)
    row_ptr = counts_ptr + expert.to(tl.int64) * num_blocks
    before = tl.zeros((), dtype=tl.int32)
    for start in range(0, num_blocks, BLOCK_B):
        blocks = start + tl.arange(0, BLOCK_B)
        counts = tl.load(row_ptr + blocks, mask=blocks < num_blocks, other=0)
        exclusive = before + tl.cumsum(counts, axis=0) - counts
        tl.store(row_ptr + blocks, exclusive, mask=blocks < num_blocks)
        before += tl.sum(counts, axis=0)
    tl.store(totals_ptr + expert, before)


@triton.jit
def moe_place_kernel(
    ids_ptr, before_ptr, totals_ptr, offs_ptr, indices_ptr, inverse_ptr, num_tokens, n_cols,
    K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The rows of BLOCK_T tokens' assignments, and their inverse; once, the ends of experts."""
    block = tl.program_id(0)
    tokens, cols = block * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E)
    totals = tl.load(totals_ptr + cols, mask=cols < n_cols, other=0)
    offs = tl.cumsum(totals, axis=0)
    if block == 0:
        tl.store(offs_ptr + cols, offs, mask=cols < n_cols)
    before_at = before_ptr + cols.to(tl.int64) * tl.num_programs(0) + block
    before = tl.load(before_at, mask=cols < n_cols, other=0)
    taken = _taken(ids_ptr, tokens, num_tokens, cols, K)
    row_of = tl.cumsum(taken, axis=0) - taken + (offs - totals + before)[None, :]
    choices = tl.arange(0, BLOCK_K)
    assignment = tokens[:, None] * K + choices[None, :]
    mask = (tokens < num_tokens)[:, None] & (choices < K)[None, :]
    ids = tl.load(ids_ptr + assignment, mask=mask, other=0).to(tl.int32)
    mask = mask & (ids >= 0) & (ids < n_cols)  # ids of the caller's may be wrong
    row = tl.gather(row_of, tl.where(mask, ids, 0), axis=1)
    tl.store(inverse_ptr + assignment, row, mask=mask)
    tl.store(indices_ptr + row, assignment, mask=mask)


@triton.jit
def moe_route_bwd_kernel(
    dweights_ptr, logits_ptr, ids_ptr, dlogits_ptr,
    row_stride, num_tokens, n_cols,
    K: tl.constexpr, SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr, SCALE: tl.constexpr,
    ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dlogits of BLOCK_T tokens; logits in, as many gradients out."""
    tokens, cols = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E)
    x, inside, peak, total = _load_logits(
        logits_ptr, row_stride, tokens, num_tokens, n_cols, ACC, BLOCK_E
    )
    p = tl.where(inside, _scores(x, peak, total, SOFTMAX), 0.0)
    taken = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.int1)
    dp = tl.zeros([BLOCK_T, BLOCK_E], dtype=ACC)
    for j in range(K):
        assignment = tokens.to(tl.int64) * K + j
        ids = tl.load(ids_ptr + assignment, mask=tokens < num_tokens, other=-1)
        dweight = tl.load(dweights_ptr + assignment, mask=tokens < num_tokens, other=0.0).to(ACC)
        here = cols[None, :] == ids[:, None]
        taken = taken | here
        dp = tl.where(here, dweight[:, None], dp)
    dp *= SCALE
    if NORMALIZE:
        share = 1 / (tl.sum(tl.where(taken, p, 0.0), axis=1)[:, None] + _TINY)
        mean = tl.sum(dp * p, axis=1)[:, None] * share
        dp = tl.where(taken, (dp - mean) * share, 0.0)
    if SOFTMAX:
        dx = p * (dp - tl.sum(dp * p, axis=1)[:, None])
    else:
        _, density = logistic(x)
        dx = density * dp
    out = tokens.to(tl.int64)[:, None] * n_cols + cols[None, :]
    tl.store(dlogits_ptr + out, dx, mask=inside)
