"""The Triton kernels of local_implicit and local_texture: the decoders, their gradients by layer, and the sums of both.

A row is one evaluation of the MLP: a query and a neighbour (row T q + t, T = 4 or 1), or, with the ensemble
first, a query alone. A sample is a query and a neighbour in either case. A program takes M rows through all
layers; their hidden state is a tuple of chunks [M, C] that cover the padded width W. There are L layers between
the first and the last. No kernel uses atomics.

All are launched without floating-point fusion: the coordinates are rounded at each step exactly as LIIF rounds them.
Fused multiply-adds are explicit.
"""

# ruff: noqa: RUF005 (Triton concatenates tuples, it does not unpack them)

import triton
import triton.language as tl

from .first_layer import first_layer, locate, neighbour, plus_outer, texture_layer, waves


@triton.jit
def bias_rows(
    affine,  # [3, P] float32: bias, the cell's columns
    n, cell_y, cell_x, P: tl.constexpr, M: tl.constexpr, C: tl.constexpr, LATE_CELL: tl.constexpr,
):  # fmt: skip
    """The summand of a Linear's product, [M, C]: the bias, and with LATE_CELL the contribution of the cell."""
    v = tl.broadcast_to(tl.load(affine + n)[None, :], [M, C])
    if LATE_CELL:
        v = plus_outer(v, cell_y, tl.load(affine + P + n))
        v = plus_outer(v, cell_x, tl.load(affine + 2 * P + n))
    return v


@triton.jit(do_not_specialize=["queries", "depth"])
def decode(
    out,  # [queries.end, N_OUT] contiguous; or None
    final,  # [rows, W] contiguous: the last Linear's input if it is computed elsewhere; or None
    states,  # [L + 1, rows, W] contiguous: the inputs of all following Linears (not FUSED: of the first only); or None
    hoisted,  # [B, band_rows, w, N1] contiguous; TEXTURE: [..., 2 N1], see `waves`
    position,  # [4, W] float32: columns of the position weight
    hidden,  # [L, W, W]: weights [out, in]
    last,  # [P_OUT, W]: the last weight; P_OUT is N_OUT in whole blocks of BO
    affine,  # [L + 1, 3, P] float32: bias, the cell's columns with LATE_CELL
    queries,
    depth,  # L
    N1: tl.constexpr,
    N_OUT: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    BO: tl.constexpr,
    M: tl.constexpr,
    COLUMNS: tl.constexpr,
    LATE_CELL: tl.constexpr,
    ENSEMBLE: tl.constexpr,
    FIRST: tl.constexpr,
    TEXTURE: tl.constexpr,
    FUSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Decodes M rows, from the coordinates to the image."""
    DTYPE: tl.constexpr = hoisted.dtype.element_ty
    CHUNKS: tl.constexpr = W // C
    T: tl.constexpr = 4 if ENSEMBLE else 1
    PER_QUERY: tl.constexpr = 1 if FIRST else T
    i = tl.arange(0, M)
    n = tl.arange(0, C)
    first = tl.program_id(0).to(tl.int64) * (M // PER_QUERY) + queries.begin
    left = tl.minimum(queries.end - first, M).to(tl.int32)  # queries
    image, ys, xs, cell_y, cell_x = locate(
        first, tl.minimum(i // PER_QUERY, left - 1), queries, ENSEMBLE, COLUMNS == 4 or LATE_CELL
    )
    pixel, rel_y, rel_x, weight = neighbour(i % PER_QUERY, image, ys, xs, queries, ENSEMBLE)

    h = ()
    for j in tl.static_range(CHUNKS):
        if final is not None:
            row = tl.program_id(0) * M + i
            known = (row < (queries.end - queries.begin) * PER_QUERY)[:, None]
            v = tl.load(final + row[:, None] * W + (j * C + n)[None, :], mask=known, other=0.0)
        elif FIRST:
            v = tl.zeros([M, C], tl.float32)
            for t in tl.static_range(T):
                pixel_t, rel_y_t, rel_x_t, weight_t = neighbour(t + i * 0, image, ys, xs, queries, ENSEMBLE)
                pred = first_layer(
                    hoisted, position, pixel_t, rel_y_t, rel_x_t, cell_y, cell_x, j * C + n, N1, W, COLUMNS
                )
                v = tl.fma(pred, tl.broadcast_to(weight_t[:, None], [M, C]), v)
        elif TEXTURE:
            v = texture_layer(hoisted, position, pixel, rel_y, rel_x, cell_y, cell_x, j * C + n, N1, W)
        else:
            v = first_layer(hoisted, position, pixel, rel_y, rel_x, cell_y, cell_x, j * C + n, N1, W, COLUMNS)
        h = h + (v.to(DTYPE),)
    if states is not None:
        rows = ((queries.end - queries.begin) * PER_QUERY).to(tl.int32)
        row = tl.program_id(0) * M + i
        for j in tl.static_range(CHUNKS):
            tl.store(states + row[:, None] * W + (j * C + n)[None, :], h[j], mask=(row < rows)[:, None])

    if FUSED:
        for layer in range(depth):
            matrix = hidden + layer * W * W + n[None, :] * W + n[:, None]  # [in, out]
            g = ()
            for j in tl.static_range(CHUNKS):
                v = bias_rows(affine + layer * 3 * P, j * C + n, cell_y, cell_x, P, M, C, LATE_CELL)
                for k in tl.static_range(CHUNKS):
                    v = tl.dot(h[k], tl.load(matrix + (j * W + k) * C), v, input_precision=PRECISION)
                g = g + (tl.where(v < 0, 0.0, v).to(DTYPE),)
            h = g
            if states is not None:
                states += rows * W
                for j in tl.static_range(CHUNKS):
                    tl.store(states + row[:, None] * W + (j * C + n)[None, :], h[j], mask=(row < rows)[:, None])

    if out is not None:
        o = tl.arange(0, BO)
        q = tl.arange(0, M // PER_QUERY)
        out += first * N_OUT
        for start in range(0, N_OUT, BO):
            y = tl.zeros([M, BO], tl.float32)
            if FIRST:
                y = bias_rows(affine + depth * 3 * P, start + o, cell_y, cell_x, P, M, BO, LATE_CELL)
            for k in tl.static_range(CHUNKS):
                tile = tl.load(last + (start + o)[None, :] * W + (k * C + n)[:, None])
                y = tl.dot(h[k], tile, y, input_precision=PRECISION)
            mask = (q < left)[:, None] & (start + o < N_OUT)[None, :]
            at = out + q[:, None] * N_OUT + (start + o)[None, :]
            if FIRST:
                tl.store(at, y.to(DTYPE), mask=mask)
            else:  # the last Linear commutes with the ensemble
                blend = tl.sum(tl.reshape(y * weight[:, None], [M // T, T, BO]), 1)
                blend += tl.load(affine + depth * 3 * P + start + o)[None, :]
                tl.store(at, blend.to(DTYPE), mask=mask)


@triton.jit
def gate(
    v,
    states,  # [L + 1, rows, W]
    row, rows, level, n, W: tl.constexpr, LINEAR: tl.constexpr,
):  # fmt: skip
    """v [M, C] where the ReLU that produced this state was positive, else 0. With LINEAR, state 0 has no ReLU."""
    state = tl.load(states + (level * rows + row)[:, None] * W + n[None, :], mask=(row < rows)[:, None], other=0.0)
    closed = state <= 0
    if LINEAR:
        closed = closed & (level > 0)
    return tl.where(closed, 0.0, v).to(state.dtype)


@triton.jit(do_not_specialize=["queries", "depth"])
def backpropagate(
    last_gradients,  # [rows, P_OUT]: gradients of the last Linear's output
    gradients,  # [L + 1, rows, W]: of the first layer's output (FIRST: of the blend) and the hidden ones'
    extras,  # [rows, 16]: rel_y, rel_x, cell_y, cell_x, 1, 0, ...
    pixels,  # [rows] int32: index in the band's map; not with FIRST, see `blend_backward`
    grad,  # [queries.end, N_OUT] contiguous
    states,  # [L + 1, rows, W], of `decode`
    hidden,  # [L, W, W]: weights [out, in]
    last,  # [P_OUT, W]; P_OUT is N_OUT in whole blocks of BO
    queries,
    depth,  # L
    N_OUT: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    BO: tl.constexpr,
    M: tl.constexpr,
    COLUMNS: tl.constexpr,
    LATE_CELL: tl.constexpr,
    ENSEMBLE: tl.constexpr,
    FIRST: tl.constexpr,
    TEXTURE: tl.constexpr,
    FUSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Propagates M rows of the image's gradient back to the hoisted map; stores the factors of the weights' gradients.

    All buffers but `grad` hold only this run of queries, contiguous.
    """
    DTYPE: tl.constexpr = hidden.dtype.element_ty
    CHUNKS: tl.constexpr = W // C
    CELL: tl.constexpr = COLUMNS == 4 or LATE_CELL
    P_OUT: tl.constexpr = (N_OUT + BO - 1) // BO * BO
    T: tl.constexpr = 4 if ENSEMBLE else 1
    PER_QUERY: tl.constexpr = 1 if FIRST else T
    i = tl.arange(0, M)
    n = tl.arange(0, C)
    o = tl.arange(0, BO)
    first = tl.program_id(0).to(tl.int64) * (M // PER_QUERY) + queries.begin
    left = tl.minimum(queries.end - first, M).to(tl.int32)  # queries
    rows = ((queries.end - queries.begin) * PER_QUERY).to(tl.int32)
    row = tl.program_id(0) * M + i
    inside = row < rows
    image, ys, xs, cell_y, cell_x = locate(first, tl.minimum(i // PER_QUERY, left - 1), queries, ENSEMBLE, CELL)
    pixel, rel_y, rel_x, weight = neighbour(i % PER_QUERY, image, ys, xs, queries, ENSEMBLE)
    write_extras(extras, row, inside, rel_y, rel_x, cell_y, cell_x, DTYPE, CELL, M)
    if not FIRST:
        tl.store(pixels + row, pixel, mask=inside)

    g = ()
    for j in tl.static_range(CHUNKS):
        v = tl.zeros([M, C], tl.float32)
        for start in range(0, N_OUT, BO):
            mask = inside[:, None] & (start + o < N_OUT)[None, :]
            at = grad + first * N_OUT + (i // PER_QUERY)[:, None] * N_OUT + (start + o)[None, :]
            above = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            if not FIRST:
                above = tl.where(mask, above * weight[:, None], 0.0)
            above = above.to(DTYPE)
            if j == 0:
                at = last_gradients + row[:, None] * P_OUT + (start + o)[None, :]
                tl.store(at, above, mask=inside[:, None])
            tile = tl.load(last + (start + o)[:, None] * W + (j * C + n)[None, :])
            v = tl.dot(above, tile, v, input_precision=PRECISION)
        g = g + (gate(v, states, row, rows, depth, j * C + n, W, FIRST or TEXTURE),)
        target = gradients + (depth * rows + row)[:, None] * W + (j * C + n)[None, :]
        tl.store(target, g[j], mask=inside[:, None])

    if FUSED:
        for back in range(depth):
            layer = depth - 1 - back
            matrix = hidden + layer * W * W + n[:, None] * W + n[None, :]  # [out, in]
            d = ()
            for j in tl.static_range(CHUNKS):
                v = tl.zeros([M, C], tl.float32)
                for k in tl.static_range(CHUNKS):
                    v = tl.dot(g[k], tl.load(matrix + (k * W + j) * C), v, input_precision=PRECISION)
                target = gradients + (layer * rows + row)[:, None] * W + (j * C + n)[None, :]
                d = d + (gate(v, states, row, rows, layer, j * C + n, W, FIRST or TEXTURE),)
                tl.store(target, d[j], mask=inside[:, None])
            g = d


@triton.jit(do_not_specialize=["queries"])
def blend_backward(
    sample_gradients,  # [samples, W] contiguous: of the first layer's output for each neighbour
    sample_extras,  # [samples, 16]
    pixels,  # [samples] int32: index in the band's map
    gradients,  # [queries, W] contiguous: of the blend
    hoisted,  # [B, band_rows, w, N1] contiguous
    position,  # [4, W] float32
    queries,
    N1: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    M: tl.constexpr,
    LATE_CELL: tl.constexpr,
    ENSEMBLE: tl.constexpr,
):
    """With the ensemble first: propagates the blend's gradient to its neighbours, through their ReLUs."""
    DTYPE: tl.constexpr = hoisted.dtype.element_ty
    T: tl.constexpr = 4 if ENSEMBLE else 1
    i = tl.arange(0, M)
    first = tl.program_id(0).to(tl.int64) * M + queries.begin
    left = tl.minimum(queries.end - first, M).to(tl.int32)
    row = tl.program_id(0) * M + i
    inside = i < left
    image, ys, xs, cell_y, cell_x = locate(first, tl.minimum(i, left - 1), queries, ENSEMBLE, LATE_CELL)
    for t in range(T):
        pixel, rel_y, rel_x, weight = neighbour(t + i * 0, image, ys, xs, queries, ENSEMBLE)
        at = row * T + t
        tl.store(pixels + at, pixel, mask=inside)
        write_extras(sample_extras, at, inside, rel_y, rel_x, cell_y, cell_x, DTYPE, False, M)
        for start in range(0, W, C):
            n = start + tl.arange(0, C)
            pred = first_layer(hoisted, position, pixel, rel_y, rel_x, cell_y, cell_x, n, N1, W, 2)
            g = tl.load(gradients + row[:, None] * W + n[None, :], mask=inside[:, None], other=0.0)
            v = tl.where(pred <= 0, 0.0, g.to(tl.float32) * weight[:, None]).to(DTYPE)
            tl.store(sample_gradients + at[:, None] * W + n[None, :], v, mask=inside[:, None])


@triton.jit(do_not_specialize=["queries"])
def texture_backward(
    map_gradients,  # [rows, 2 N1] contiguous: of the texture at each neighbour
    phase_gradients,  # [rows, W] contiguous: of the angles in half turns, whose last W - N1 / 2 columns are not written
    gradients,  # [rows, W] contiguous: of the first layer's output
    texture,  # [B, band_rows, w, 2 N1] contiguous, see `waves`
    position,  # [4, W] float32
    queries,
    N1: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    M: tl.constexpr,
    ENSEMBLE: tl.constexpr,
):
    """Propagates the gradient of LTE's first layer to the coefficients, the frequencies and the phase."""
    DTYPE: tl.constexpr = texture.dtype.element_ty
    T: tl.constexpr = 4 if ENSEMBLE else 1
    K: tl.constexpr = N1 // 2
    i = tl.arange(0, M)
    first = tl.program_id(0).to(tl.int64) * (M // T) + queries.begin
    left = tl.minimum(queries.end - first, M).to(tl.int32)  # queries
    row = (tl.program_id(0) * M + i).to(tl.int64)
    inside = row < (queries.end - queries.begin) * T
    image, ys, xs, cell_y, cell_x = locate(first, tl.minimum(i // T, left - 1), queries, ENSEMBLE, True)
    pixel, rel_y, rel_x, weight = neighbour(i % T, image, ys, xs, queries, ENSEMBLE)
    for start in range(0, K, C):
        n = start + tl.arange(0, C)
        mask = inside[:, None] & (n < K)[None, :]
        sine, cosine = waves(texture, position, pixel, rel_y, rel_x, cell_y, cell_x, n, N1, W)
        coef = texture + pixel.to(tl.int64)[:, None] * 2 * N1 + n[None, :]
        grad = gradients + row[:, None] * W + n[None, :]
        of_cosine = tl.load(grad, mask=mask, other=0.0).to(tl.float32)
        of_sine = tl.load(grad + K, mask=mask, other=0.0).to(tl.float32)
        angle = of_sine * tl.load(coef + K, mask=mask, other=0.0) * cosine
        angle = 3.141592653589793 * (angle - of_cosine * tl.load(coef, mask=mask, other=0.0) * sine)
        to = map_gradients + row[:, None] * 2 * N1 + n[None, :]
        tl.store(to, (of_cosine * cosine).to(DTYPE), mask=mask)
        tl.store(to + K, (of_sine * sine).to(DTYPE), mask=mask)
        tl.store(to + 2 * K, (angle * rel_y[:, None]).to(DTYPE), mask=mask)
        tl.store(to + 3 * K, (angle * rel_x[:, None]).to(DTYPE), mask=mask)
        tl.store(phase_gradients + row[:, None] * W + n[None, :], angle.to(DTYPE), mask=mask)


@triton.jit
def write_extras(
    extras,  # [rows, 16]
    row, inside, rel_y, rel_x, cell_y, cell_x, DTYPE: tl.constexpr, CELL: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Stores the inputs of the Linears other than their states, and a one for the bias: [M, 16]."""
    i = tl.broadcast_to(tl.arange(0, 16)[None, :], [M, 16])
    v = tl.where(i == 4, 1.0, 0.0)
    v = tl.where(i == 0, rel_y[:, None], v)
    v = tl.where(i == 1, rel_x[:, None], v)
    if CELL:
        v = tl.where(i == 2, cell_y[:, None], v)
        v = tl.where(i == 3, cell_x[:, None], v)
    tl.store(extras + row[:, None] * 16 + i, v.to(DTYPE), mask=inside[:, None])


@triton.jit(do_not_specialize=["rows"])
def add_products(
    sums,  # [SPLITS, levels, N, K] float32 contiguous, read and written
    left,  # [levels, rows, N], level stride left_level
    right,  # [levels, rows, K], level stride right_level (0: the same for all)
    left_level,
    right_level,
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums[split, level] += left[level]^T right[level] over the split's share of the rows: one tile [BN, BK]."""
    n = tl.program_id(0) // (K // BK) * BN + tl.arange(0, BN)
    k = tl.program_id(0) % (K // BK) * BK + tl.arange(0, BK)
    split = tl.program_id(1)
    level = tl.program_id(2).to(tl.int64)
    share = tl.cdiv(tl.cdiv(rows, BR), SPLITS) * BR
    left += level * left_level
    right += level * right_level
    v = tl.zeros([BN, BK], tl.float32)
    for start in range(split * share, tl.minimum(rows, (split + 1) * share), BR):
        r = (start + tl.arange(0, BR)).to(tl.int64)
        a = tl.load(left + r[None, :] * N + n[:, None], mask=(r < rows)[None, :], other=0.0)
        b = tl.load(right + r[:, None] * K + k[None, :], mask=(r < rows)[:, None], other=0.0)
        v = tl.dot(a, b, v, input_precision=PRECISION)
    at = sums + (split * tl.num_programs(2) + level) * N * K + n[:, None] * K + k[None, :]
    tl.store(at, tl.load(at) + v)


@triton.jit
def add_segments(
    d_hoisted,  # [pixels of the band's map, N1] float32 contiguous, read and written
    gradients,  # [samples, W] contiguous
    pixels,  # [samples] int32, ascending
    order,  # [samples] int64: the sample of each entry; stably sorted
    ends,  # [samples] int64: the end of the entries of the same pixel
    N1: tl.constexpr,
    W: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    """d_hoisted[pixel] += the gradients of its samples, in their order, in BN channels.

    There is a program for each entry; that of a pixel's first entry does the work of the pixel.
    """
    entry = tl.program_id(0)
    pixel = tl.load(pixels + entry).to(tl.int64)
    before = tl.load(pixels + tl.maximum(entry - 1, 0))
    if (entry == 0) | (before != pixel):
        end = tl.load(ends + entry)
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        v = tl.zeros([BN], tl.float32)
        for start in range(entry, end, BR):
            r = start + tl.arange(0, BR)
            sample = tl.load(order + r, mask=r < end, other=0)
            mask = (r < end)[:, None] & (n < N1)[None, :]
            rows = tl.load(gradients + sample[:, None] * W + n[None, :], mask=mask, other=0.0)
            v += tl.sum(rows.to(tl.float32), 0)
        at = d_hoisted + pixel * N1 + n
        tl.store(at, tl.load(at, mask=n < N1) + v, mask=n < N1)
