# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# ruff: noqa: RET505, SIM102 (branches on constants stay apart from branches on values)
"""The Triton kernels: flash attention over indexed, partitioned and two-part keys, and token maps.

Needs Triton; the other modules import this one when they first launch a kernel. All strides arrive in units of
`UNIT` elements, see `launch.stride_unit`. A head of D columns is worked on as two parts of D0 and D1 columns (D1
may be 0), powers of two of which the last is padded; see `launch.split_width`.
"""

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load(base, offset, ok, C0: tl.constexpr, C: tl.constexpr, D: tl.constexpr, MASK: tl.constexpr, FILL: tl.constexpr):
    """Columns C0 .. C0 + C of the rows at `offset`; FILL beyond column D and, if MASK, in rows that are not ok."""
    column = C0 + tl.arange(0, C)
    address = base + offset[:, None] + column[None, :]
    if C0 + C > D:
        if MASK:
            return tl.load(address, mask=ok[:, None] & (column < D)[None, :], other=FILL)
        else:
            return tl.load(address, mask=(column < D)[None, :], other=FILL)
    else:
        if MASK:
            return tl.load(address, mask=ok[:, None], other=FILL)
        else:
            return tl.load(address)


@triton.jit
def _store(base, offset, ok, value, C0: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    column = C0 + tl.arange(0, C)
    address = base + offset[:, None] + column[None, :]
    tl.store(address, value.to(base.dtype.element_ty), mask=ok[:, None] & (column < D)[None, :])


@triton.jit
def _round22(x):
    """float32 rounded to 22 significant bits: just what two TF32 numbers hold."""
    return ((x.to(tl.int32, bitcast=True) + 2) & -4).to(tl.float32, bitcast=True)


@triton.jit
def _dot(a, b, acc, WIDEN: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a @ b. WIDEN: the interpreter multiplies bfloat16 bit patterns, so it gets float32."""
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif PRECISION == "tf32x3":
        # The three passes cut operands off at 22 bits; rounding there first halves the error.
        return tl.dot(_round22(a), _round22(b), acc, input_precision=PRECISION)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _step(
    acc0, acc1, top, total, q0, q1, K, V, rows, ok, k_token, v_token, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    TAIL: tl.constexpr, ONES: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of N keys. Logits are in base 2: `scale` carries log2(e), `top` is their running maximum."""
    s = _dot(
        q0, tl.trans(_load(K, rows * k_token, ok, 0, D0, D, TAIL, 0.0)), tl.zeros([M, N], tl.float32), WIDEN, PRECISION
    )
    if D1 > 0:
        s = _dot(q1, tl.trans(_load(K, rows * k_token, ok, D0, D1, D, TAIL, 0.0)), s, WIDEN, PRECISION)
    if TAIL:
        s = tl.where(ok[None, :], s, float("-inf"))
    # scale > 0, so the maximum may be scaled instead of every score; so the loop needs one multiply-add per score.
    new_top = tl.maximum(top, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    if not ONES:
        total = total * shrink + tl.sum(p, 1)
    fill: tl.constexpr = 1.0 if ONES else 0.0
    v0 = _load(V, rows * v_token, ok, 0, D0, D, TAIL, fill)
    p = p.to(v0.dtype)
    acc0 = _dot(p, v0, acc0 * shrink[:, None], WIDEN, PRECISION)
    if D1 > 0:
        v1 = _load(V, rows * v_token, ok, D0, D1, D, TAIL, fill)
        acc1 = _dot(p, v1, acc1 * shrink[:, None], WIDEN, PRECISION)
    return acc0, acc1, new_top, total


@triton.jit
def _segment(
    acc0, acc1, top, total, q0, q1, K, V, ORDER, low, high, k_token, v_token, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    GATHER: tl.constexpr, EVEN: tl.constexpr, ONES: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys at positions low .. high - 1, through ORDER if GATHER: whole blocks, then, unless EVEN, a masked rest."""
    lane = tl.arange(0, N)
    whole = low + (high - low) // N * N
    for start in range(low, whole, N):
        position = start + lane
        rows = tl.load(ORDER + position) if GATHER else position
        acc0, acc1, top, total = _step(
            acc0, acc1, top, total, q0, q1, K, V, rows, lane < N, k_token, v_token, scale,
            D, D0, D1, M, N, False, ONES, WIDEN, PRECISION,
        )  # fmt: skip
    if not EVEN:
        if whole < high:
            position = whole + lane
            ok = position < high
            rows = tl.load(ORDER + position, mask=ok, other=0) if GATHER else tl.where(ok, position, 0)
            acc0, acc1, top, total = _step(
                acc0, acc1, top, total, q0, q1, K, V, rows, ok, k_token, v_token, scale,
                D, D0, D1, M, N, True, ONES, WIDEN, PRECISION,
            )  # fmt: skip
    return acc0, acc1, top, total


@triton.jit
def _row(INDEX, PACKED, batch):
    """The row that `batch` reads: from a tensor, or, without one, from PACKED, see `rows.packed`."""
    if INDEX is None:
        row = (PACKED >> (batch * 4).to(tl.int64)).to(tl.int32) & 15
        return tl.where(row == 15, -1, row)
    else:
        return tl.load(INDEX + batch)


# Specialised on packed rows, the kernel would be compiled again for some values of them.
@triton.jit(do_not_specialize=["PACKED", "PACKED2"])
def mutual_attention_kernel(
    Q, K, V, K2, V2, OUT, LSE, KV_INDEX, KV_INDEX2, KEY_ORDER, KEY_COUNT, QUERY_ORDER, QUERY_WEIGHT, FULL_ROWS,
    PACKED: tl.int64, PACKED2: tl.int64, scale, bias, heads, n_queries, n_keys, n_keys2,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    k2_batch, k2_head, k2_token, v2_batch, v2_head, v2_token, o_batch, o_head, o_token,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, M: tl.constexpr, N: tl.constexpr, UNIT: tl.constexpr,
    MASKED: tl.constexpr, UNION: tl.constexpr, EVEN: tl.constexpr, ONES: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Out (B, H, Nq, D) for M queries of one row and head per program; online softmax in float32.

    Row b reads source KV_INDEX[b]; in a UNION also the keys of row KV_INDEX2[b] of K2 and V2, unless that is -1.
    Rows known to the host come in PACKED and PACKED2 instead, and the tensors are None.
    MASKED: queries come in QUERY_ORDER and keys in KEY_ORDER, both grouped by region, so nearly every program
    needs the keys of one region only.
    LSE (B, H, Nq) float32, or None: the natural logarithm of the sum of the exponentiated logits; not if MASKED.
    """
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    wide = tl.full((), UNIT, tl.int64)  # offsets of rows and heads may exceed 32 bits, those within a head do not
    source = _row(KV_INDEX, PACKED, batch)
    position = tl.program_id(0) * M + tl.arange(0, M)
    ok = position < n_queries
    # Beyond the end the last query is computed again, which needs fewer registers than masked loads.
    rows = tl.minimum(position, n_queries - 1)
    if MASKED:
        rows = tl.load(QUERY_ORDER + batch.to(tl.int64) * n_queries + rows)
    q_base = Q + batch * (q_batch * wide) + head * (q_head * wide)
    q0 = _load(q_base, rows * (q_token * UNIT), ok, 0, D0, D, False, 0.0)
    q1 = q0
    if D1 > 0:
        q1 = _load(q_base, rows * (q_token * UNIT), ok, D0, D1, D, False, 0.0)
    k_base = K + source * (k_batch * wide) + head * (k_head * wide)
    v_base = V + source * (v_batch * wide) + head * (v_head * wide)
    o_base = OUT + batch * (o_batch * wide) + head * (o_head * wide)
    own = source
    if UNION:
        own = _row(KV_INDEX2, PACKED2, batch)
    k2_base = K2 + own * (k2_batch * wide) + head * (k2_head * wide)
    v2_base = V2 + own * (v2_batch * wide) + head * (v2_head * wide)

    first = 0
    last = 1
    split = n_keys
    weight = tl.full([M], 1.0, tl.float32)
    order = KEY_ORDER
    if MASKED:
        order = KEY_ORDER + source.to(tl.int64) * n_keys
        count = tl.load(KEY_COUNT + source)
        weight = tl.load(QUERY_WEIGHT + batch.to(tl.int64) * n_queries + rows)
        # A full row, or one whose source has an empty region, sees every key: one region, of all the keys.
        whole = (tl.load(FULL_ROWS + batch) != 0) | (count == 0) | (count == n_keys)
        split = tl.where(whole, n_keys, count)
        weight = tl.where(whole, 1.0, weight)
        first = tl.where(tl.max(weight, 0) > 0.0, 0, 1)
        last = tl.where(tl.min(weight, 0) < 1.0, 2, 1)

    for region in range(first, last):
        acc0 = tl.zeros([M, D0], tl.float32)
        acc1 = tl.zeros([M, D1 if D1 > 0 else 16], tl.float32)
        top = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        low = tl.where(region == 0, 0, split)
        high = tl.where(region == 0, split, n_keys)
        acc0, acc1, top, total = _segment(
            acc0, acc1, top, total, q0, q1, k_base, v_base, order, low, high, k_token * UNIT, v_token * UNIT,
            scale, D, D0, D1, M, N, MASKED, EVEN and not MASKED, ONES, WIDEN, PRECISION,
        )  # fmt: skip
        if UNION:
            if own >= 0:
                top += bias  # on every logit so far
                acc0, acc1, top, total = _segment(
                    acc0, acc1, top, total, q0, q1, k2_base, v2_base, order, 0, n_keys2, k2_token * UNIT,
                    v2_token * UNIT, scale, D, D0, D1, M, N, False, EVEN, ONES, WIDEN, PRECISION,
                )  # fmt: skip
        if ONES:
            if D1 > 0:
                total = tl.sum(tl.where((D0 + tl.arange(0, D1) == D)[None, :], acc1, 0.0), 1)
            else:
                total = tl.sum(tl.where((tl.arange(0, D0) == D)[None, :], acc0, 0.0), 1)
        if LSE is not None:
            tl.store(LSE + tl.program_id(1).to(tl.int64) * n_queries + rows, (top + tl.log2(total)) * LN_2, mask=ok)
        share = (tl.where(region == 0, weight, 1.0 - weight) if MASKED else 1.0) / total
        acc0 *= share[:, None]
        acc1 *= share[:, None]
        if MASKED:
            if region > first:
                # The first region's answer waits in OUT: a second set of accumulators would spill.
                tl.debug_barrier()
                acc0 += _load(o_base, rows * (o_token * UNIT), ok, 0, D0, D, True, 0.0).to(tl.float32)
                if D1 > 0:
                    acc1 += _load(o_base, rows * (o_token * UNIT), ok, D0, D1, D, True, 0.0).to(tl.float32)
        _store(o_base, rows * (o_token * UNIT), ok, acc0, 0, D0, D)
        if D1 > 0:
            _store(o_base, rows * (o_token * UNIT), ok, acc1, D0, D1, D)


@triton.jit
def cross_attention_maps_kernel(
    Q, K, V, OUT, TOKEN_WEIGHTS, MAPS, scale, heads, n_queries, n_keys, n_maps, weights_batch,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, o_batch, o_head, o_token,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, M: tl.constexpr, N: tl.constexpr, T: tl.constexpr,
    UNIT: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Out (B, H, Nq, D) and MAPS (B, T, Nq) for M queries of one row, all its heads, per program.

    The token weights act as T further columns of V, so a head's maps come out of the same online softmax as its
    output and no probability outlives its block.
    """
    batch = tl.program_id(1)
    wide = tl.full((), UNIT, tl.int64)
    position = tl.program_id(0) * M + tl.arange(0, M)
    ok = position < n_queries
    rows = tl.minimum(position, n_queries - 1)
    lane = tl.arange(0, N)
    token_set = tl.arange(0, T)
    weights = TOKEN_WEIGHTS + batch.to(tl.int64) * weights_batch + token_set * n_keys
    head_sum = tl.zeros([M, T], tl.float32)
    for head in range(heads):
        q_base = Q + batch * (q_batch * wide) + head * (q_head * wide)
        k_base = K + batch * (k_batch * wide) + head * (k_head * wide)
        v_base = V + batch * (v_batch * wide) + head * (v_head * wide)
        o_base = OUT + batch * (o_batch * wide) + head * (o_head * wide)
        q0 = _load(q_base, rows * (q_token * UNIT), ok, 0, D0, D, False, 0.0)
        q1 = q0
        if D1 > 0:
            q1 = _load(q_base, rows * (q_token * UNIT), ok, D0, D1, D, False, 0.0)
        acc0 = tl.zeros([M, D0], tl.float32)
        acc1 = tl.zeros([M, D1 if D1 > 0 else 16], tl.float32)
        seen = tl.zeros([M, T], tl.float32)
        top = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        for start in range(0, n_keys, N):
            keys = start + lane
            key_ok = keys < n_keys
            k0 = _load(k_base, keys * (k_token * UNIT), key_ok, 0, D0, D, True, 0.0)
            s = _dot(q0, tl.trans(k0), tl.zeros([M, N], tl.float32), WIDEN, PRECISION)
            if D1 > 0:
                k1 = _load(k_base, keys * (k_token * UNIT), key_ok, D0, D1, D, True, 0.0)
                s = _dot(q1, tl.trans(k1), s, WIDEN, PRECISION)
            s = tl.where(key_ok[None, :], s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1) * scale)
            p = tl.exp2(s * scale - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(p, 1)
            top = new_top
            v0 = _load(v_base, keys * (v_token * UNIT), key_ok, 0, D0, D, True, 0.0)
            p = p.to(v0.dtype)
            acc0 = _dot(p, v0, acc0 * shrink[:, None], WIDEN, PRECISION)
            if D1 > 0:
                v1 = _load(v_base, keys * (v_token * UNIT), key_ok, D0, D1, D, True, 0.0)
                acc1 = _dot(p, v1, acc1 * shrink[:, None], WIDEN, PRECISION)
            wanted = key_ok[:, None] & (token_set < n_maps)[None, :]
            w = tl.load(weights[None, :] + keys[:, None], mask=wanted, other=0.0).to(v0.dtype)
            seen = _dot(p, w, seen * shrink[:, None], WIDEN, PRECISION)
        head_sum += seen / total[:, None]
        _store(o_base, rows * (o_token * UNIT), ok, acc0 / total[:, None], 0, D0, D)
        if D1 > 0:
            _store(o_base, rows * (o_token * UNIT), ok, acc1 / total[:, None], D0, D1, D)
    address = MAPS + (batch.to(tl.int64) * n_maps + token_set)[None, :] * n_queries + rows[:, None]
    tl.store(address, head_sum / heads, mask=ok[:, None] & (token_set < n_maps)[None, :])
