/* attend_tile.cuh -- attention on tensor cores, in the shape of the real model: all segments for up to four rows.
 *
 * A block has ATTEND_TILE rows of the step and ATTEND_HEADS heads; two of its warps have a row, with all these heads.
 * Of a segment, one of the two takes the scores with the first 64 keys, the other those with the last; then one the
 * first 128 latents of the values, the other the last.  A lane has two heads, g = lane / 4 and g + 8, and in every
 * tile of 8 keys or latents the columns 2 c and 2 c + 1, c = lane % 4.  So the 16 partial sums over keys of a head are
 * in four lanes, four each, and only go from the first warp to the second.
 *
 * Registers hold most of the queries as fragments, and o of the group of segments; o of all groups waits in x.
 */
#ifndef MS4_ATTEND_TILE_CUH
#define MS4_ATTEND_TILE_CUH
#include "fragments.cuh"

#define TILE_ROWS (ATTEND_TILE * ATTEND_HEADS)  /* a row and a head each */
struct tile_room {
    char *keys, *weights;                       /* weights: of TILE_ROWS rows */
    float *d;
    float *sums, *most;                         /* of the first warps, where the weights will be: partial; largest w */
    float *top, *l, *unit;                      /* by row; top: of the first warps, then of the second */
    float *all_m, *all_l;                       /* sums of all groups; those of a group are in registers */
    /* Later top is what o needs to be folded: first into the group, then into all. */
};
DEV tile_room tile_room_at(char *shared) {
    char *weights = shared + KV_ROWS * KEY_BYTES, *d = weights + TILE_ROWS * WEIGHT_BYTES;
    float *top = (float *)(d + KV_ROWS * 12), *l = top + 2 * TILE_ROWS, *sums = (float *)weights;
    return { shared, weights, (float *)d, sums, sums + 4 * 8 * TILE_ROWS, top, l, l + TILE_ROWS, l + 2 * TILE_ROWS,
             l + 3 * TILE_ROWS };
}
_Static_assert(MMA_TILE_ROOM == KV_ROWS * (KEY_BYTES + 12) + TILE_ROWS * (WEIGHT_BYTES + 6 * 4), "tile_room");
_Static_assert((4 * 8 + 1) * TILE_ROWS * 4 <= TILE_ROWS * WEIGHT_BYTES, "sums in the place of weights");

/* What a lane knows of its row and its two heads. */
struct tile_lane {
    int second, tile_row, g, column;            /* second: of the two warps; column: 2 c */
};
/* Registers are short.  zero is 0, but the compiler does not know: else it would keep what is the same for all segments
 * in registers all the time, addresses above all; and sums of products, of which a score takes three, until late. */
DEV int tile_zero(const seen_keys &keys) { return keys.n >> 10; }
DEV int tile_thread(int zero) { return (int)threadIdx.x + zero; }
DEV int after(int x, float y, int zero) { return x ^ (__float_as_int(y) & zero); }       /* x, once y is there */
DEV tile_lane tile_lane_of(int thread) {
    const int warp = thread / 32, lane = thread % 32;
    return { warp / ATTEND_TILE, warp % ATTEND_TILE, lane / 4, lane % 4 * 2 };
}
DEV int tile_head(const tile_lane &own, int i) { return own.tile_row * ATTEND_HEADS + own.g + 8 * i; }

/* What is to be done: rows of the step from `first` on, and heads from `head` on. */
struct tile_work { int first, rows, head, heads, last_position; };
/* A row of the tile and a head of the block, in q and x; those that there are not are others. */
DEV size_t tile_place(const attend_rows_args &a, const tile_work &work, int row, int head) {
    const size_t t = (size_t)(work.first + (row < work.rows ? row : work.rows - 1));
    return t * (size_t)a.n_head + (size_t)(work.head + (head < work.heads ? head : 0));
}
/* The sums of the group, for a row and a head: one of the first TILE_ROWS threads has them. */
struct tile_sums { float m, l; };

/* Queries: steps 0 to HELD - 1 are held in registers; there is no room for more, so the last four, which are 256 bytes
 * a row, come to shared memory with each segment, into the place of the weights. */
#define STEPS (KEY_BYTES / 64)
#define LATENT_STEPS (TENSOR_RANK / 32)
#define STAGED (WEIGHT_BYTES / 64)
#define HELD (STEPS - STAGED)
/* Straight from memory, in the order of ldmatrix. */
DEV void load_query(fragment_a *q, const attend_rows_args &a, const tile_work &work) {
    const tile_lane own = tile_lane_of((int)threadIdx.x);
    const int16_t *upper = a.q + tile_place(a, work, own.tile_row, own.g) * (KEY_BYTES / 2) + own.column;
    const int16_t *lower = a.q + tile_place(a, work, own.tile_row, own.g + 8) * (KEY_BYTES / 2) + own.column;
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        unsigned r[4], s[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            r[i] = *(const unsigned *)(upper + k * 32 + i * 8);
            s[i] = *(const unsigned *)(lower + k * 32 + i * 8);
        }
        take_a(q[k], r, s);
    }
}
/* 16 threads a head. */
DEV void stage_query(char *to, const attend_rows_args &a, const tile_work &work, int thread) {
    const int head = thread / 16, chunk = thread % 16;
#pragma unroll 1
    for (int i = 0; i < ATTEND_TILE; i++) {
        const int16_t *from = a.q + tile_place(a, work, i, head) * (KEY_BYTES / 2) + HELD * 32 + chunk * 8;
        copy16_async(to + chunk_at(i * ATTEND_HEADS + head, WEIGHT_BYTES, chunk), from);
    }
}
#define TILE_SCORES 8                           /* tiles of 8 keys of a warp */
/* Steps [FIRST, END) of the lane's row with a tile of 8 keys. */
template <int FIRST, int END>
DEV void tile_products(products &p, const tile_room &room, const fragment_a *q, int rows_q, int rows_k, int tile) {
#pragma unroll
    for (int k = FIRST; k < END; k++) {
        fragment_a a;
        fragment_b b;
        __syncwarp(ALL);                        /* else more loads are begun than there are registers for */
        load_b(b, room.keys + tile * 8 * KEY_BYTES, rows_k, k);
        if (k >= HELD) load_a(a, room.weights, rows_q, WEIGHT_BYTES, k - HELD);
        if (k == FIRST) multiply_first(p, k < HELD ? q[k] : a, b);
        else multiply(p, k < HELD ? q[k] : a, b);
    }
}
/* s[tile]: head g with two keys, then head g + 8; n: keys of the segment that the row sees.  The rope keys' part comes
 * first, of all tiles, so that only one product at a time takes registers. */
DEV void tile_scores(float (*s)[4], const tile_room &room, const fragment_a *q, const attend_rows_args &a,
                     const tile_work &work, int thread, int zero, int n) {
    const tile_lane own = tile_lane_of(thread);
    int rows_k = lane_rows(own.second * 64, KEY_BYTES);
    const int key = own.second * 64 + own.column;
    const int rows_q = lane_rows(own.tile_row * ATTEND_HEADS, WEIGHT_BYTES);
    const float *upper = a.q_d + 2 * tile_place(a, work, own.tile_row, own.g);
    const float *lower = a.q_d + 2 * tile_place(a, work, own.tile_row, own.g + 8);
    const float q_d[2][2] = { { upper[0], upper[1] }, { lower[0], lower[1] } };
#pragma unroll
    for (int tile = 0; tile < TILE_SCORES; tile++) {
        products p;
        tile_products<LATENT_STEPS, STEPS>(p, room, q, rows_q, rows_k, tile);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            s[tile][i] = rope_score(q_d[i / 2], room.d + 3 * (key + tile * 8 + i % 2), whole(p, i));
            rows_k = after(rows_k, s[tile][i], zero);
        }
    }
#pragma unroll
    for (int tile = 0; tile < TILE_SCORES; tile++) {
        products p;
        tile_products<0, LATENT_STEPS>(p, room, q, rows_q, rows_k, tile);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int j = key + tile * 8 + i % 2;
            const float x = add_latent_score(q_d[i / 2], room.d + 3 * j, whole(p, i), s[tile][i]);
            s[tile][i] = j < n ? x : MINUS_INFINITY;
            rows_k = after(rows_k, s[tile][i], zero);
        }
    }
}
/* Of the four lanes with the same heads. */
DEV float largest_4(float x) {
    x = larger_float(x, __shfl_xor_sync(ALL, x, 1));
    return larger_float(x, __shfl_xor_sync(ALL, x, 2));
}
/* The largest score of this warp's keys, by head, to the other warp. */
DEV void show_top(const float (*s)[4], const tile_room &room, const tile_lane &own) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float top = MINUS_INFINITY;
#pragma unroll
        for (int tile = 0; tile < TILE_SCORES; tile++)
            top = larger_float(top, larger_float(s[tile][2 * i], s[tile][2 * i + 1]));
        top = largest_4(top);
        if (!own.column) room.top[own.second * TILE_ROWS + tile_head(own, i)] = top;
    }
}
/* Partial sums of a head that a lane has: of the keys 2 c, 2 c + 1, 8 + 2 c, 9 + 2 c (mod 16). */
struct key_sums { float p[4], w[4]; };          /* of p; of w times the largest latent */
DEV float tree_of_keys(float *part) {
    float low = __fadd_rn(part[0], part[2]), high = __fadd_rn(part[1], part[3]);              /* j with j + 8 */
    for (int lanes = 2; lanes; lanes >>= 1) {                                                 /* + 4, + 2 */
        low = __fadd_rn(low, __shfl_xor_sync(ALL, low, lanes));
        high = __fadd_rn(high, __shfl_xor_sync(ALL, high, lanes));
    }
    return __fadd_rn(low, high);
}
/* p, of which there are n keys, become w; sums goes on with both.  Returns the largest w of the head. */
DEV float add_keys(float (*s)[4], key_sums &sums, const tile_room &room, const tile_lane &own, int i, int n) {
    float most = 0;
#pragma unroll
    for (int tile = 0; tile < TILE_SCORES; tile++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int j = own.second * 64 + tile * 8 + own.column + e, part = tile % 2 * 2 + e;
            const float p = s[tile][2 * i + e], *d = room.d + 3 * j, w = j < n ? __fmul_rn(p, d[0]) : 0.0f;
            sums.p[part] = __fadd_rn(sums.p[part], p);
            sums.w[part] = __fmaf_rn(w, j < n ? d[2] : 0.0f, sums.w[part]);
            most = larger_float(most, w);
            s[tile][2 * i + e] = w;
        }
    return largest_4(most);
}
DEV float tile_top(const tile_room &room, int h) { return larger_float(room.top[h], room.top[TILE_ROWS + h]); }
/* Scores become p. */
DEV void to_powers(float (*s)[4], const tile_room &room, const tile_lane &own, int i) {
    const float top = tile_top(room, tile_head(own, i)), shift = top == MINUS_INFINITY ? 0 : top;
#pragma unroll
    for (int tile = 0; tile < TILE_SCORES; tile++)
#pragma unroll
        for (int e = 0; e < 2; e++) s[tile][2 * i + e] = exp_dev(__fsub_rn(s[tile][2 * i + e], shift));
}
/* A lane's partial sums of a head, where the other warp finds them. */
DEV float *shown_sums(const tile_room &room, const tile_lane &own, int i) {
    return room.sums + (tile_head(own, i) * 4 + own.column / 2) * 8;
}
/* The first warp: w, and its partial sums. */
DEV void begin_sums(float (*s)[4], const tile_room &room, const tile_lane &own, int n) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        key_sums sums = {};
        const float most = add_keys(s, sums, room, own, i, n);
        float *to = shown_sums(room, own, i);
        *(float_4 *)to = { sums.p[0], sums.p[1], sums.p[2], sums.p[3] };
        *(float_4 *)(to + 4) = { sums.w[0], sums.w[1], sums.w[2], sums.w[3] };
        if (!own.column) room.most[tile_head(own, i)] = most;
    }
}
/* The second: goes on from there; l and unit of both heads, for all. */
DEV void end_sums(float (*s)[4], const tile_room &room, const tile_lane &own, int n) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float *from = shown_sums(room, own, i);
        const float_4 p = *(const float_4 *)from, w = *(const float_4 *)(from + 4);
        key_sums sums;
        for (int j = 0; j < 4; j++) sums.p[j] = p.v[j], sums.w[j] = w.v[j];
        const float own_most = add_keys(s, sums, room, own, i, n);
        const float most = larger_float(own_most, room.most[tile_head(own, i)]);
        const float l = tree_of_keys(sums.p), unit = weights_unit(most, tree_of_keys(sums.w));
        if (!own.column) {
            room.l[tile_head(own, i)] = l;
            room.unit[tile_head(own, i)] = unit;
        }
    }
}
/* w to 16-bit weights, to both warps.  (chunk_at(h, WEIGHT_BYTES, 8 * own.second + tile), as h % 8 is g.) */
DEV void put_weights(const float (*s)[4], const tile_room &room, const tile_lane &own) {
    const int place = tile_head(own, 0) * WEIGHT_BYTES + own.second * 128 + own.g * 16 + own.column * 2;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int h = tile_head(own, i);
        const float unit = room.unit[h], factor = weights_factor(unit);
#pragma unroll
        for (int tile = 0; tile < TILE_SCORES; tile++) {
            const unsigned low = (uint16_t)weight_16(s[tile][2 * i], factor, unit);
            const unsigned high = (uint16_t)weight_16(s[tile][2 * i + 1], factor, unit);
            *(unsigned *)(room.weights + i * 8 * WEIGHT_BYTES + (place ^ tile * 16)) = low | high << 16;
        }
    }
}
#define TILE_VALUES 16                          /* tiles of 8 latents of a warp */
/* o of the segment, folded into o of its group. */
DEV void tile_values(float (*o)[4], const tile_room &room, int thread, int zero) {
    const tile_lane own = tile_lane_of(thread);
    int lane = thread % 32;
    const int rows = lane_rows(own.tile_row * ATTEND_HEADS, WEIGHT_BYTES), h = tile_head(own, 0);
    const float unit[2] = { room.unit[h], room.unit[h + 8] };
    const fold_factors f[2] = { { room.top[h], room.top[TILE_ROWS + h] },
                                { room.top[h + 8], room.top[TILE_ROWS + h + 8] } };
    fragment_a a[KV_ROWS / 32];
#pragma unroll
    for (int k = 0; k < KV_ROWS / 32; k++) load_a(a[k], room.weights, rows, WEIGHT_BYTES, k);
#pragma unroll
    for (int tile = 0; tile < TILE_VALUES; tile++) {
        products p;
#pragma unroll
        for (int k = 0; k < KV_ROWS / 32; k++) {
            fragment_b b;
            if (k % 2 == 0) __syncwarp(ALL);    /* likewise */
            load_values(b, room.keys, lane, own.second * TILE_VALUES + tile, k);
            if (k) multiply(p, a[k], b);
            else multiply_first(p, a[k], b);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            o[tile][i] = fold_one(f[i / 2], o[tile][i], __fmul_rn(__int2float_rn(whole(p, i)), unit[i / 2]));
            lane = after(lane, o[tile][i], zero);
        }
    }
}
/* The group into all, in x.  first: there is nothing yet; last: divided by l. */
DEV void tile_group(const float (*o)[4], const tile_room &room, tile_sums &sums, const attend_rows_args &a,
                    const tile_work &work, int thread, bool first, bool last) {
    const tile_lane own = tile_lane_of(thread);
    if (thread < TILE_ROWS) {
        float m = first ? MINUS_INFINITY : room.all_m[thread], l = first ? 0 : room.all_l[thread];
        const fold_factors f = fold_sums(m, l, sums.m, sums.l);
        room.all_m[thread] = m;
        room.all_l[thread] = l;
        room.top[thread] = f.old;
        room.top[TILE_ROWS + thread] = f.fresh;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = tile_head(own, i);
        const fold_factors f = { room.top[row], room.top[TILE_ROWS + row] };
        float *to = a.x + tile_place(a, work, own.tile_row, own.g + 8 * i) * TENSOR_RANK;
        to += own.second * TILE_VALUES * 8 + own.column;
        if (own.tile_row >= work.rows || own.g + 8 * i >= work.heads) continue;
#pragma unroll
        for (int tile = 0; tile < TILE_VALUES; tile++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                to[tile * 8 + e] = fold_one(f, first ? 0.0f : to[tile * 8 + e], o[tile][2 * i + e]);
#pragma unroll 1
        for (int tile = 0; last && tile < TILE_VALUES; tile++, to += 8) {
            to[0] = __fdiv_rn(to[0], room.all_l[row]);
            to[1] = __fdiv_rn(to[1], room.all_l[row]);
        }
    }
}
DEV void tile_copy(const tile_room &room, const attend_rows_args &a, const tile_work &work, const seen_keys &keys,
                   int thread) {
    copy_rows(room.keys, keys.rows, keys.n, thread, ATTEND_THREADS);
    copy_scales(room.d, keys.d, keys.n, thread, ATTEND_THREADS);
    stage_query(room.weights, a, work, thread);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
}
/* One segment, keys being those that the last row sees. */
DEV void tile_segment(float (*o)[4], const tile_room &room, const fragment_a *q, const attend_rows_args &a,
                      const tile_work &work, tile_sums &sums, const seen_keys &keys, int segment) {
    const int zero = tile_zero(keys), thread = tile_thread(zero), row = tile_lane_of(thread).tile_row;
    const int ahead = row < work.rows ? work.rows - 1 - row : 0;
    const int n = seen_of(work.last_position - ahead, segment);      /* keys that the lane's row sees */
    float s[TILE_SCORES][4];
    tile_copy(room, a, work, keys, thread);
    tile_scores(s, room, q, a, work, thread, zero, n);
    const tile_lane own = tile_lane_of(thread);
    show_top(s, room, own);
    __syncthreads();
    to_powers(s, room, own, 0);
    to_powers(s, room, own, 1);
    if (!own.second) begin_sums(s, room, own, n);
    __syncthreads();
    if (own.second) end_sums(s, room, own, n);
    __syncthreads();
    put_weights(s, room, own);
    if (thread < TILE_ROWS) {
        const fold_factors f = fold_sums(sums.m, sums.l, tile_top(room, thread), room.l[thread]);
        room.top[thread] = f.old;
        room.top[TILE_ROWS + thread] = f.fresh;
    }
    __syncthreads();
    tile_values(o, room, thread, zero);
    __syncthreads();                            /* before the next keys, and the group's sums */
}
DEV void attend_mma_tile(char *shared, const attend_rows_args &a, const attend_tile &tile, int head, int heads) {
    const tile_room room = tile_room_at(shared);
    const kv_span *span = a.spans + tile.span;
    const tile_work work = { tile.first, tile.n, head, heads, span->pos + tile.first + tile.n - 1 - span->first };
    fragment_a q[HELD];
    float o[TILE_VALUES][4];
    tile_sums sums = { 0, 0 };
    load_query(q, a, work);
    for (int segment = 0; segment <= work.last_position / KV_ROWS; segment++) {
        const bool last = segment == work.last_position / KV_ROWS;
        if (segment % SEGMENT_GROUP == 0) {
            sums.m = MINUS_INFINITY;
            sums.l = 0;
#pragma unroll
            for (int i = 0; i < TILE_VALUES; i++) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0;
        }
        const seen_keys keys = keys_of(*span, a.layer_offset, work.last_position, segment, KEY_BYTES / 2);
        tile_segment(o, room, q, a, work, sums, keys, segment);
        if (last || segment % SEGMENT_GROUP == SEGMENT_GROUP - 1)
            tile_group(o, room, sums, a, work, tile_thread(tile_zero(keys)), segment < SEGMENT_GROUP, last);
    }
}
#endif
