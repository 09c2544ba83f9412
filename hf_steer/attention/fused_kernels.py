"""Triton kernels of flash attention with a low-rank bias on the logits, forward and backward; `fused_launch` runs them.

The bias tile is computed in registers from a column of `bias.query` and a row of `bias.key`. Tensors are handed over as tuples
`(tensor, stride of batch, of head, of row, ...)`; the last stride of query, key, value and their like is 1, that of a size of 1 is
0. Logits are in base 2, as the hardware's exponential is. Recurrence: FlashAttention-2 (https://arxiv.org/abs/2307.08691).
"""

# mypy: disable-error-code="import-untyped,import-not-found,untyped-decorator"
# triton has no types

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
HIDDEN = tl.constexpr(-1.0e30)
"""Logit where attention is not allowed: finite, since the difference of two infinities is not a number."""

NO_MASK, BOOL_MASK, FLOAT_MASK = (tl.constexpr(kind) for kind in range(3))


@triton.jit
def _at(tensor: tl.tensor, batch: tl.tensor, head: tl.tensor) -> tl.tensor:
    """Pointer to one head of one batch row."""
    return tensor[0] + batch * tensor[1] + tl.cast(head, tl.int64) * tensor[2]


INTERPRETED = tl.constexpr(not isinstance(_at, triton.JITFunction))
"""Triton 3.9's interpreter multiplies matrices of bfloat16 as the integers that store them: it is handed float32 instead."""


@triton.jit
def _load(
    rows: tl.tensor, first: tl.tensor, length: tl.tensor, stride: tl.tensor, BLOCK: tl.constexpr, SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """`(BLOCK, WIDTH)`, zero beyond `length` rows and `SIZE` columns."""
    at = first + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    inside = (at < length)[:, None]
    if SIZE != WIDTH:
        inside = inside & (column < SIZE)[None, :]
    tile = tl.load(rows + at[:, None].to(tl.int64) * stride + column[None, :], mask=inside, other=0.0)
    if INTERPRETED:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _store(
    tile: tl.tensor, rows: tl.tensor, first: tl.tensor, length: tl.tensor, stride: tl.tensor, BLOCK: tl.constexpr,
    SIZE: tl.constexpr, WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    """What `_load` reads."""
    at = first + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    inside = (at < length)[:, None] & (column < SIZE)[None, :]
    tl.store(rows + at[:, None].to(tl.int64) * stride + column[None, :], tile.to(rows.dtype.element_ty), mask=inside)


@triton.jit
def _logits(
    products: tl.tensor, query_at: tl.tensor, key_at: tl.tensor, queries: tl.tensor, keys: tl.tensor, scale: tl.tensor,
    bias_query: tl.tensor, bias_key: tl.tensor, mask: tl.tensor, mask_floor: tl.tensor, RANK: tl.constexpr, MASK: tl.constexpr,
    CAUSAL: tl.constexpr, EDGE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Base-2 logits of a tile, `HIDDEN` where attention is not allowed; works for both orientations.

    Args:
        products: query times key.
        query_at: positions, a column or a row.
        key_at: positions, the other one.
        queries: how many there are.
        keys: how many there are.
        scale: factor on the products.
        bias_query: pointer, stride of queries, stride of ranks.
        bias_key: pointer, stride of keys, stride of ranks.
        mask: pointer, stride of queries, stride of keys.
        mask_floor: entries of a float mask at or below it hide.
        RANK: of the bias.
        MASK: which kind.
        CAUSAL: whether a query sees nothing after itself.
        EDGE: whether the tile touches the diagonal or the last key; elsewhere neither is looked at.
    """
    logits = products * (scale * LOG2E)
    query_inside = query_at < queries
    key_inside = key_at < keys
    for rank in tl.static_range(RANK):
        of_query = tl.load(bias_query[0] + query_at * bias_query[1] + rank * bias_query[2], mask=query_inside, other=0.0)
        of_key = tl.load(bias_key[0] + key_at * bias_key[1] + rank * bias_key[2], mask=key_inside, other=0.0)
        logits += (of_query.to(tl.float32) * LOG2E) * of_key.to(tl.float32)
    if MASK != NO_MASK:
        cells = mask[0] + query_at.to(tl.int64) * mask[1] + key_at.to(tl.int64) * mask[2]
        entries = tl.load(cells, mask=query_inside & key_inside, other=0)
        if MASK == BOOL_MASK:
            logits = tl.where(entries != 0, logits, HIDDEN)
        else:
            added = entries.to(tl.float32)
            logits = tl.where(added > mask_floor, logits + tl.maximum(added, HIDDEN) * LOG2E, HIDDEN)
    if EDGE:
        seen = query_inside & key_inside
        if CAUSAL:
            seen = seen & (query_at >= key_at)
        logits = tl.where(seen, logits, HIDDEN)
    return logits


@triton.jit
def _weights(logits: tl.tensor, reference: tl.tensor, MASK: tl.constexpr, EDGE: tl.constexpr) -> tl.tensor:
    """`2 ** (logits - reference)`, exactly 0 where hidden, also where everything is."""
    weights = tl.exp2(logits - reference)
    if EDGE or MASK != NO_MASK:
        weights = tl.where(logits > HIDDEN, weights, 0.0)
    return weights


@triton.jit
def _bias_gradient(
    total: tl.tensor, slope: tl.tensor, at: tl.tensor, length: tl.tensor, factor: tl.tensor, stride: tl.tensor,
    rank_stride: tl.tensor, RANK: tl.constexpr, RANKS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Adds, for each rank, `slope` times the other factor of the bias, summed along rows: `(rows, RANKS)`."""
    for rank in tl.static_range(RANK):
        other = tl.load(factor + at * stride + rank * rank_stride, mask=at < length, other=0.0).to(tl.float32)
        total += tl.where(tl.arange(0, RANKS)[None, :] == rank, tl.sum(slope * other, 1)[:, None], 0.0)
    return total


@triton.jit
def _reach_of_queries(
    first: tl.tensor, keys: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr
) -> tl.tensor:
    """Up to which key all tiles are wholly seen by a block of queries (0 with a mask), and up to which key anything is."""
    whole = keys
    end = keys
    if CAUSAL:
        whole = tl.minimum(keys, first + 1)
        end = tl.minimum(keys, first + BLOCK_M)
    if MASK != NO_MASK:
        whole = 0
    return whole // BLOCK_N * BLOCK_N, end


@triton.jit
def _attend_to_keys(
    gathered: tl.tensor, top: tl.tensor, total: tl.tensor, q: tl.tensor, query_at: tl.tensor, start: tl.tensor, end: tl.tensor,
    queries: tl.tensor, keys: tl.tensor, scale: tl.tensor, key: tl.tensor, key_stride: tl.tensor, value: tl.tensor,
    value_stride: tl.tensor, bias_query: tl.tensor, bias_key: tl.tensor, mask: tl.tensor, mask_floor: tl.tensor, HEAD: tl.constexpr,
    HEAD_WIDTH: tl.constexpr, VALUE: tl.constexpr, VALUE_WIDTH: tl.constexpr, RANK: tl.constexpr, MASK: tl.constexpr,
    CAUSAL: tl.constexpr, EDGE: tl.constexpr, BLOCK_N: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The running softmax over the keys from `start` to `end`."""
    for first in range(start, end, BLOCK_N):
        k = _load(key, first, keys, key_stride, BLOCK_N, HEAD, HEAD_WIDTH)
        key_at = (first + tl.arange(0, BLOCK_N))[None, :]
        logits = _logits(
            tl.dot(q, tl.trans(k)), query_at, key_at, queries, keys, scale, bias_query, bias_key, mask, mask_floor,
            RANK, MASK, CAUSAL, EDGE,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(logits, 1))
        weights = _weights(logits, new_top[:, None], MASK, EDGE)
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        v = _load(value, first, keys, value_stride, BLOCK_N, VALUE, VALUE_WIDTH)
        gathered = tl.dot(weights.to(value.dtype.element_ty).to(v.dtype), v, gathered * shrink[:, None])
        top = new_top
    return gathered, top, total


@triton.jit
def forward_kernel(
    query: tl.tensor, key: tl.tensor, value: tl.tensor, bias_query: tl.tensor, bias_key: tl.tensor, mask: tl.tensor,
    output: tl.tensor, log_sum: tl.tensor, queries: tl.tensor, keys: tl.tensor, heads: tl.tensor, group: tl.tensor,
    scale: tl.tensor, mask_floor: tl.tensor, HEAD: tl.constexpr, HEAD_WIDTH: tl.constexpr, VALUE: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, RANK: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """Output and base-2 log-sum-exp of one block of queries of one head."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the longest rows of a causal triangle start first
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    rows = first + tl.arange(0, BLOCK_M)
    q = _load(_at(query, batch, head), first, queries, query[3], BLOCK_M, HEAD, HEAD_WIDTH)
    gathered = tl.zeros((BLOCK_M, VALUE_WIDTH), tl.float32)
    top = tl.full((BLOCK_M,), HIDDEN, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    whole, end = _reach_of_queries(first, keys, BLOCK_M, BLOCK_N, CAUSAL, MASK)
    for edge in tl.static_range(2):
        if edge == 1 or MASK == NO_MASK:
            gathered, top, total = _attend_to_keys(
                gathered, top, total, q, rows[:, None], edge * whole, whole + edge * (end - whole), queries, keys, scale,
                _at(key, batch, head // group), key[3], _at(value, batch, head // group), value[3],
                (_at(bias_query, batch, head), bias_query[3], bias_query[4]),
                (bias_key[0] + batch * bias_key[1], bias_key[2], bias_key[3]),
                (_at(mask, batch, head), mask[3], mask[4]), mask_floor,
                HEAD, HEAD_WIDTH, VALUE, VALUE_WIDTH, RANK, MASK, CAUSAL, edge == 1, BLOCK_N,
            )  # fmt: skip
    top, total = tl.where(total > 0, top, 0.0), tl.where(total > 0, total, 1.0)  # nothing to attend to: output 0, and no overflow
    _store(gathered / total[:, None], _at(output, batch, head), first, queries, output[3], BLOCK_M, VALUE, VALUE_WIDTH)
    tl.store(log_sum + tl.program_id(1).to(tl.int64) * queries + rows, top + tl.log2(total), mask=rows < queries)


@triton.jit
def _gather_from_keys(
    query_grad: tl.tensor, bias_grad: tl.tensor, q: tl.tensor, o_grad: tl.tensor, log_sum: tl.tensor, delta: tl.tensor,
    query_at: tl.tensor, start: tl.tensor, end: tl.tensor, queries: tl.tensor, keys: tl.tensor, scale: tl.tensor, key: tl.tensor,
    key_stride: tl.tensor, value: tl.tensor, value_stride: tl.tensor, bias_query: tl.tensor, bias_key: tl.tensor, mask: tl.tensor,
    mask_floor: tl.tensor, HEAD: tl.constexpr, HEAD_WIDTH: tl.constexpr, VALUE: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr,
    NEEDS_QUERY: tl.constexpr, NEEDS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """What the keys from `start` to `end` add to the gradients of a block of queries."""
    for first in range(start, end, BLOCK_N):
        k = _load(key, first, keys, key_stride, BLOCK_N, HEAD, HEAD_WIDTH)
        v = _load(value, first, keys, value_stride, BLOCK_N, VALUE, VALUE_WIDTH)
        key_at = (first + tl.arange(0, BLOCK_N))[None, :]
        logits = _logits(
            tl.dot(q, tl.trans(k)), query_at, key_at, queries, keys, scale, bias_query, bias_key, mask, mask_floor,
            RANK, MASK, CAUSAL, EDGE,
        )  # fmt: skip
        slope = _weights(logits, log_sum, MASK, EDGE) * (tl.dot(o_grad, tl.trans(v)) - delta)
        if NEEDS_QUERY:
            query_grad = tl.dot(slope.to(key.dtype.element_ty).to(k.dtype), k, query_grad)
        if NEEDS_BIAS:
            bias_grad = _bias_gradient(bias_grad, slope, key_at, keys, bias_key[0], bias_key[1], bias_key[2], RANK, RANKS)
    return query_grad, bias_grad


@triton.jit
def query_gradient_kernel(
    query: tl.tensor, key: tl.tensor, value: tl.tensor, bias_query: tl.tensor, bias_key: tl.tensor, mask: tl.tensor,
    output: tl.tensor, output_grad: tl.tensor, log_sum: tl.tensor, delta: tl.tensor, query_grad: tl.tensor,
    bias_query_grad: tl.tensor, queries: tl.tensor, keys: tl.tensor, heads: tl.tensor, group: tl.tensor, scale: tl.tensor,
    mask_floor: tl.tensor, HEAD: tl.constexpr, HEAD_WIDTH: tl.constexpr, VALUE: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, NEEDS_QUERY: tl.constexpr,
    NEEDS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients of one block of queries of one head; leaves output times its gradient, row by row, in `delta`."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    rows = first + tl.arange(0, BLOCK_M)
    scalars = tl.program_id(1).to(tl.int64) * queries + rows
    o_grad = _load(_at(output_grad, batch, head), first, queries, output_grad[3], BLOCK_M, VALUE, VALUE_WIDTH)
    o = _load(_at(output, batch, head), first, queries, output[3], BLOCK_M, VALUE, VALUE_WIDTH)
    delta_row = tl.sum(o.to(tl.float32) * o_grad.to(tl.float32), 1)
    tl.store(delta + scalars, delta_row, mask=rows < queries)
    if NEEDS_QUERY or NEEDS_BIAS:
        q = _load(_at(query, batch, head), first, queries, query[3], BLOCK_M, HEAD, HEAD_WIDTH)
        log_sums = tl.load(log_sum + scalars, mask=rows < queries, other=0.0)
        to_query = tl.zeros((BLOCK_M, HEAD_WIDTH), tl.float32)
        to_bias = tl.zeros((BLOCK_M, RANKS), tl.float32)
        whole, end = _reach_of_queries(first, keys, BLOCK_M, BLOCK_N, CAUSAL, MASK)
        for edge in tl.static_range(2):
            if edge == 1 or MASK == NO_MASK:
                to_query, to_bias = _gather_from_keys(
                    to_query, to_bias, q, o_grad, log_sums[:, None], delta_row[:, None], rows[:, None],
                    edge * whole, whole + edge * (end - whole), queries, keys, scale,
                    _at(key, batch, head // group), key[3], _at(value, batch, head // group), value[3],
                    (_at(bias_query, batch, head), bias_query[3], bias_query[4]),
                    (bias_key[0] + batch * bias_key[1], bias_key[2], bias_key[3]),
                    (_at(mask, batch, head), mask[3], mask[4]), mask_floor,
                    HEAD, HEAD_WIDTH, VALUE, VALUE_WIDTH, RANK, RANKS, MASK, CAUSAL, edge == 1, NEEDS_QUERY, NEEDS_BIAS, BLOCK_N,
                )  # fmt: skip
        if NEEDS_QUERY:
            _store(to_query * scale, _at(query_grad, batch, head), first, queries, query_grad[3], BLOCK_M, HEAD, HEAD_WIDTH)
        if NEEDS_BIAS:
            _store(to_bias, _at(bias_query_grad, batch, head), first, queries, bias_query_grad[3], BLOCK_M, RANK, RANKS)


@triton.jit
def _gather_from_queries(
    key_grad: tl.tensor, value_grad: tl.tensor, bias_grad: tl.tensor, k: tl.tensor, v: tl.tensor, key_at: tl.tensor,
    start: tl.tensor, queries: tl.tensor, keys: tl.tensor, scale: tl.tensor, query: tl.tensor, query_stride: tl.tensor,
    output_grad: tl.tensor, output_grad_stride: tl.tensor, log_sum: tl.tensor, delta: tl.tensor, bias_query: tl.tensor,
    bias_key: tl.tensor, mask: tl.tensor, mask_floor: tl.tensor, HEAD: tl.constexpr, HEAD_WIDTH: tl.constexpr, VALUE: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    NEEDS_KEY: tl.constexpr, NEEDS_VALUE: tl.constexpr, NEEDS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """What the queries from `start` on add to the gradients of a block of keys; tiles are keys × queries.

    Rows beyond the last query need no look: there query, output's gradient, log-sum and delta are 0, and so is what they add.
    One sweep, also where only a few tiles touch the diagonal: a second one costs registers that the sums need.
    """
    for first in range(start, queries, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        query_at = rows[None, :]
        q = _load(query, first, queries, query_stride, BLOCK_M, HEAD, HEAD_WIDTH)
        o_grad = _load(output_grad, first, queries, output_grad_stride, BLOCK_M, VALUE, VALUE_WIDTH)
        logits = _logits(
            tl.dot(k, tl.trans(q)), query_at, key_at, queries, keys, scale, bias_query, bias_key, mask, mask_floor,
            RANK, MASK, CAUSAL, CAUSAL,
        )  # fmt: skip
        weights = _weights(logits, tl.load(log_sum + rows, mask=rows < queries, other=0.0)[None, :], MASK, CAUSAL)
        if NEEDS_VALUE:
            value_grad = tl.dot(weights.to(output_grad.dtype.element_ty).to(o_grad.dtype), o_grad, value_grad)
        if NEEDS_KEY or NEEDS_BIAS:
            deltas = tl.load(delta + rows, mask=rows < queries, other=0.0)[None, :]
            slope = weights * (tl.dot(v, tl.trans(o_grad)) - deltas)
            if NEEDS_KEY:
                key_grad = tl.dot(slope.to(query.dtype.element_ty).to(q.dtype), q, key_grad)
            if NEEDS_BIAS:
                bias_grad = _bias_gradient(
                    bias_grad, slope, query_at, queries, bias_query[0], bias_query[1], bias_query[2], RANK, RANKS
                )
    return key_grad, value_grad, bias_grad


@triton.jit
def key_gradient_kernel(
    query: tl.tensor, key: tl.tensor, value: tl.tensor, bias_query: tl.tensor, bias_key: tl.tensor, mask: tl.tensor,
    output_grad: tl.tensor, log_sum: tl.tensor, delta: tl.tensor, key_grad: tl.tensor, value_grad: tl.tensor,
    bias_key_grad: tl.tensor, queries: tl.tensor, keys: tl.tensor, heads: tl.tensor, group: tl.tensor, scale: tl.tensor,
    mask_floor: tl.tensor, HEAD: tl.constexpr, HEAD_WIDTH: tl.constexpr, VALUE: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, NEEDS_KEY: tl.constexpr,
    NEEDS_VALUE: tl.constexpr, NEEDS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients of one block of keys of one key-value head, summed over the query heads that share it, in their order."""
    first = tl.program_id(0) * BLOCK_N
    key_heads = heads // group
    batch, key_head = (tl.program_id(1) // key_heads).to(tl.int64), tl.program_id(1) % key_heads
    key_at = (first + tl.arange(0, BLOCK_N))[:, None]
    k = _load(_at(key, batch, key_head), first, keys, key[3], BLOCK_N, HEAD, HEAD_WIDTH)
    v = _load(_at(value, batch, key_head), first, keys, value[3], BLOCK_N, VALUE, VALUE_WIDTH)
    to_key = tl.zeros((BLOCK_N, HEAD_WIDTH), tl.float32)
    to_value = tl.zeros((BLOCK_N, VALUE_WIDTH), tl.float32)
    to_bias = tl.zeros((BLOCK_N, RANKS), tl.float32)
    start = 0
    if CAUSAL:
        start = first // BLOCK_M * BLOCK_M
    for head in range(key_head * group, key_head * group + group):
        scalars = (batch * heads + head) * queries
        to_key, to_value, to_bias = _gather_from_queries(
            to_key, to_value, to_bias, k, v, key_at, start, queries, keys, scale,
            _at(query, batch, head), query[3], _at(output_grad, batch, head), output_grad[3], log_sum + scalars, delta + scalars,
            (_at(bias_query, batch, head), bias_query[3], bias_query[4]),
            (bias_key[0] + batch * bias_key[1], bias_key[2], bias_key[3]),
            (_at(mask, batch, head), mask[3], mask[4]), mask_floor,
            HEAD, HEAD_WIDTH, VALUE, VALUE_WIDTH, RANK, RANKS, MASK, CAUSAL, NEEDS_KEY, NEEDS_VALUE, NEEDS_BIAS, BLOCK_M,
        )  # fmt: skip
    if NEEDS_KEY:
        _store(to_key * scale, _at(key_grad, batch, key_head), first, keys, key_grad[3], BLOCK_N, HEAD, HEAD_WIDTH)
    if NEEDS_VALUE:
        _store(to_value, _at(value_grad, batch, key_head), first, keys, value_grad[3], BLOCK_N, VALUE, VALUE_WIDTH)
    if NEEDS_BIAS:
        _store(to_bias, _at(bias_key_grad, batch, key_head), first, keys, bias_key_grad[3], BLOCK_N, RANK, RANKS)
