// Attention under the three masks of NSA (compressed, selected, window) and in full: forward, backward, and the importance that selection
// is made from.
//
//   version 1   simple_attention_forward and the others: f32, any shape, a warp a query and head
//   version 2   fast_attention_forward and the others: bf16 with sums in f32, mma.sync, all heads of a group on one tile of keys
//   version 3   hopper_attention_forward, _backward: wgmma and the copy engine (sm_90a alone); 4 in the check: two sets of queries a warpgroup, as where there are many
//
//   make build/attention && build/attention [check 3 5]      versions 2 and 3 against the CPU, on small and odd shapes (or those of some numbers)
//   build/attention bench 65536 16 1 64 [version [batch]]    times on this GPU: T, heads, KV heads, D of q and k (192: D of v is 128)
//   make build/attention_emulated && build/attention_emulated    the check without a GPU

#define NSA_CU_NO_MAIN
#include "../../train_nsa.cu"
#include "test/check.h"
#include "bench.h"

#include <algorithm>
#include <bitset>
#include <vector>

static double norm_of(const float *a, int64_t n) {
    double norm = 0;
    for (int64_t i = 0; i < n; i++) norm += (double)a[i] * (double)a[i];
    return sqrt(norm);
}

// |a - b| / (|b| + tiny), norms; NaN is not small. Infinities must be equal, and say nothing else.
static double error_past_infinities(const float *a, const float *b, int64_t n, double tiny) {
    double diff = 0, norm = 0;
    for (int64_t i = 0; i < n; i++) {
        if (a[i] != b[i]) diff += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        if (!isinf(b[i])) norm += (double)b[i] * (double)b[i];
    }
    const double e = sqrt(diff) / (sqrt(norm) + tiny);
    return diff == 0 ? 0 : e == e ? e : INFINITY;
}

// ----------------------------------------------------------------------------
// Memory on both sides

static void *device_filled(int64_t bytes) {     // with NaN: what a kernel forgets to write shows
    void *p = device_malloc(bytes);
    CUDA(cudaMemset(p, 0xff, (size_t)bytes));
    return p;
}

static bf16 *device_bf16(const float *x, int64_t n) {
    uint16_t *bits = (uint16_t *)xmalloc((size_t)n * sizeof *bits + 1);
    for (int64_t i = 0; i < n; i++) bits[i] = float_to_bf16(x[i]);
    bf16 *p = (bf16 *)device_malloc(n * 2);
    to_device(p, bits, n * 2);
    free(bits);
    return p;
}

static float *device_f32(const float *x, int64_t n) {
    float *p = (float *)device_malloc(n * 4);
    to_device(p, x, n * 4);
    return p;
}

static float *host_of_bf16(const bf16 *x, int64_t n) {
    uint16_t *bits = (uint16_t *)xmalloc((size_t)n * sizeof *bits + 1);
    float *p = (float *)xmalloc((size_t)n * sizeof *p + 1);
    to_host(bits, x, n * 2);
    for (int64_t i = 0; i < n; i++) p[i] = bf16_to_float(bits[i]);
    free(bits);
    return p;
}

static float *host_of_f32(const float *x, int64_t n) {
    float *p = (float *)xmalloc((size_t)n * sizeof *p + 1);
    to_host(p, x, n * 4);
    return p;
}

static float *zeros(int64_t n) { return (float *)xcalloc((size_t)n + 1, sizeof(float)); }

static uint64_t stream = 1;
static float *normals(int64_t n) {      // that bf16 holds exactly: both sides compute from the same numbers
    float *x = zeros(n);
    stream++;
    for (int64_t i = 0; i < n; i++) x[i] = bf16_to_float(float_to_bf16((float)normal_at(7, stream, (uint64_t)i)));
    return x;
}

static Takers make_takers(const Mask *mask, const AttentionShape *s) {
    Takers t = {NULL, NULL, NULL, 0};
    if (mask->kind != MASK_SELECTED) return t;
    t.blocks = (s->T - 1) / mask->sel_block + 1;
    t.count = (int64_t *)device_malloc(s->B * s->KV * t.blocks * 8);
    t.start = (int64_t *)device_malloc(s->B * s->KV * (t.blocks + 1) * 8);
    t.queries = (int *)device_malloc(s->B * s->T * s->KV * mask->n * 4);
    return t;
}
static void free_takers(Takers *t) {
    CUDA(cudaFree(t->count));
    CUDA(cudaFree(t->start));
    CUDA(cudaFree(t->queries));
}

// ----------------------------------------------------------------------------
// Check: versions 2 and 3 against the CPU's f32 on the same numbers. What bf16 costs: P and dS are rounded to 8 bits before they are factors, and
// so are out, dk and dv at the end and the out that delta is made of. One rounding is an error of 2^-9 at most and 1.1e-3 in norm, three of
// them together 2e-3; delta's can weigh more, where dP and delta nearly cancel. 1e-2 is what no mistake of a mask or an index stays under.

static const double BF16_ERROR = 1e-2, F32_ERROR = 1e-4;

typedef struct Case { int kind; int64_t B, T, Tk; int G, KV, D, Dv; int64_t window; int block, stride, sel_block, n; } Case;

static const char *const kind_names[] = {"window", "compressed", "selected"};

// Attention in bf16 by version 2, 3 or 4: that is 3, whose warpgroups take two sets of queries of a selection, as they do where there are many.
static int last_version(const AttentionShape *s, const Mask *mask) {
    if (!hopper_attention(s, mask)) return 2;
    return mask->kind == MASK_SELECTED && shares_blocks(mask) && s->D == 128 ? 4 : 3;
}
static void forward_by(int version, bf16 *out, float *lse, const bf16 *q, const bf16 *k, const bf16 *v, const Mask *mask, const AttentionShape *s) {
    if (version == 4) hopper_selected_forward_of_shape<128, 128, 2>(out, lse, q, k, v, mask, s);
    else if (version == 3) hopper_attention_forward(out, lse, q, k, v, mask, s);
    else fast_attention_forward(out, lse, q, k, v, mask, s);
}
static void backward_by(int version, float *dq, int accumulate, bf16 *dk, bf16 *dv, const bf16 *dout, const float *gate, const bf16 *out, const float *lse, const bf16 *q,
                        const bf16 *k, const bf16 *v, const Mask *mask, const AttentionShape *s, float *delta, RowStats *stats, const Takers *takers, float *partial) {
    if (version >= 3) gpu_row_stats(stats, dout, gate, out, lse, s->B * s->T * s->H, s->Dv);
    if (version >= 3) hopper_attention_backward(dq, accumulate, dk, dv, dout, gate, out, lse, stats, q, k, v, mask, s, delta, takers, partial);
    else fast_attention_backward(dq, accumulate, dk, dv, dout, gate, out, lse, q, k, v, mask, s, delta, takers, partial);
}

// Blocks that a query might choose: its own, then others at random; -1 behind the last.
static int *random_blocks(const Case *x) {
    Rng rng = {5, ++stream, 0};
    int *idx = (int *)xmalloc((size_t)(x->B * x->T * x->KV * x->n) * sizeof *idx + 1);
    for (int64_t row = 0; row < x->B * x->T * x->KV; row++) {
        const int64_t own = row / x->KV % x->T / x->sel_block;
        int *to = idx + row * x->n, count = 0, others = (int)min64(own, row % 5 == 0 ? x->n / 2 : x->n - 1);     // some take fewer than they may
        for (int64_t j = 0; j < own; j++)
            if ((int64_t)rng_below(&rng, (uint64_t)(own - j)) < others) to[count++] = (int)j, others--;
        to[count++] = (int)own;
        for (; count < x->n; count++) to[count] = -1;
    }
    return idx;
}

// order_queries against the same pairing written down simply: of all pairs (i, j) of groups that are left the one with the most bits in common, of equals that
// of the least i ^ j, until none is left; then of the groups so made. Both sides must agree to the last place. Returns the order on the GPU.
static unsigned char *check_order(const int *idx, const int *device_idx, int n, const AttentionShape *s, const char *name) {
    const int64_t count = s->B * s->KV * s->T;
    unsigned char *order = (unsigned char *)device_filled(count), *got = (unsigned char *)xmalloc((size_t)count);
    Mask mask;
    memset(&mask, 0, sizeof mask);
    mask.n = n;
    mask.block_idx = device_idx;
    order_queries(order, &mask, s);
    to_host(got, order, count);
    int64_t wrong = 0;
    for (int64_t x = 0; x < s->B * s->KV; x++)
        for (int64_t t0 = 0; t0 < s->T; t0 += ORDER_WINDOW) {
            typedef struct Group { std::vector<int> members; std::bitset<ORDER_BITS> bits; } Group;
            const int here = (int)min64(ORDER_WINDOW, s->T - t0);
            std::vector<Group> groups((size_t)here);
            for (int i = 0; i < here; i++) {
                groups[(size_t)i].members.push_back(i);
                for (int j = 0; j < n; j++) {
                    const int block = idx[((x / s->KV * s->T + t0 + i) * s->KV + x % s->KV) * n + j];
                    if (block >= 0) groups[(size_t)i].bits.set((size_t)(block % ORDER_BITS));
                }
            }
            while (here == ORDER_WINDOW && groups.size() > 1) {
                std::vector<Group> pairs;
                std::vector<std::pair<size_t, size_t>> found;
                std::vector<int> taken(groups.size());
                for (size_t left = groups.size(); left > 0; left -= 2) {
                    std::pair<size_t, size_t> best(0, 0);
                    int most = -1;
                    for (size_t i = 0; i < groups.size(); i++)
                        for (size_t j = i + 1; j < groups.size(); j++) {
                            const int common = taken[i] || taken[j] ? -1 : (int)(groups[i].bits & groups[j].bits).count();
                            if (common > most || (common == most && (i ^ j) < (best.first ^ best.second))) most = common, best = {i, j};
                        }
                    taken[best.first] = taken[best.second] = 1;
                    found.push_back(best);
                }
                std::sort(found.begin(), found.end());
                for (const auto &pair : found) {
                    Group both = groups[pair.first];
                    const Group &other = groups[pair.second];
                    both.members.insert(both.members.end(), other.members.begin(), other.members.end());
                    both.bits |= other.bits;
                    pairs.push_back(both);
                }
                groups = pairs;
            }
            std::vector<int> want;
            for (const Group &group : groups) want.insert(want.end(), group.members.begin(), group.members.end());
            for (int i = 0; i < here; i++) wrong += got[x * s->T + t0 + i] != want[(size_t)i];
        }
    check(wrong == 0, "%s: %d places of the order of queries", name, (int)wrong);
    free(got);
    return order;
}

// Choices out of more blocks than there are bits, some of which queries share; fewer than `n`, and none.
static void check_orders(void) {
    for (int i = 0; i < 6; i++) {
        const AttentionShape s = {1 + i % 2, i == 5 ? 63 : 64 * (1 + i) + i * 11, 0, 0, 1 + i % 3, 0, 0, 0, 0, 0, 0};
        const int n = i == 1 ? 64 : 16, blocks = i == 3 ? 3 : 100 << i;      // ties, nothing but ties
        const int64_t count = s.B * s.T * s.KV * n;
        Rng rng = {9, ++stream, 0};
        int *idx = (int *)xmalloc((size_t)count * sizeof *idx), *device_idx = (int *)device_malloc(count * 4);
        for (int64_t row = 0; row < count / n; row++) {
            const int from = (int)rng_below(&rng, 4) * blocks / 4, chosen = row % 7 ? (int)rng_below(&rng, (uint64_t)n + 1) : n;
            for (int j = 0; j < n; j++) idx[row * n + j] = j < chosen ? from + (int)rng_below(&rng, (uint64_t)blocks / 4 + 1) : -1;
        }
        to_device(device_idx, idx, count * 4);
        char *name = format("choices out of %d blocks, T=%d", blocks, (int)s.T);
        CUDA(cudaFree(check_order(idx, device_idx, n, &s, name)));
        CUDA(cudaFree(device_idx));
        free(idx);
        free(name);
    }
}

static void check_select(const Case *x, const AttentionShape *s, const bf16 *dq_in, const bf16 *dk_in, const float *q, const float *k, const float *lse) {
    const SelectShape sel = {x->block, x->stride, x->sel_block, x->n, 1, 1};
    const int64_t rows = s->B * s->T * s->KV, cut = rows * 3 / 7, G = s->H / s->KV;
    float *device_lse = device_f32(lse, s->B * s->T * s->H), *weights = (float *)device_filled(rows * s->Tk * 4);
    fast_select_weights(weights, dq_in, dk_in, device_lse, 0, cut, s, &sel);
    fast_select_weights(weights + cut * s->Tk, dq_in, dk_in, device_lse, cut, rows - cut, s, &sel);
    float *got = host_of_f32(weights, rows * s->Tk);
    double diff = 0, norm = 0;
    for (int64_t row = 0; row < rows; row++) {
        const int64_t kv = row % s->KV, bt = row / s->KV, t = bt % s->T, b = bt / s->T;
        if (t / sel.sel_block + 1 <= sel.n) continue;
        for (int64_t i = 0; i < compressed_seen(t, sel.cmp_block, sel.cmp_stride); i++) {
            double sum = 0;
            for (int64_t h = kv * G; h < (kv + 1) * G; h++) {
                double score = 0;
                for (int c = 0; c < s->D; c++) score += (double)q[bt * s->q_row + h * s->D + c] * (double)k[(b * s->Tk + i) * s->k_row + kv * s->D + c];
                sum += exp(score / sqrt((double)s->D) - (double)lse[bt * s->H + h]);
            }
            diff += (sum - (double)got[row * s->Tk + i]) * (sum - (double)got[row * s->Tk + i]);
            norm += sum * sum;
        }
    }
    check(norm == 0 ? diff == 0 : sqrt(diff / norm) < F32_ERROR, "select weights of G=%d KV=%d D=%d T=%d: error %.2e", x->G, x->KV, x->D, (int)x->T, sqrt(diff / norm));
    CUDA(cudaFree(device_lse));
    CUDA(cudaFree(weights));
    free(got);
}

// `steep`: each block of 64 keys has scores of twice the last one's size, so that later ones outweigh what was summed before them.
static void check_case(const Case *x, int steep) {
    const int H = x->G * x->KV;
    const int dense = x->kind == MASK_COMPRESSED;
    const int64_t wide = H * x->D + x->KV * (x->D + x->Dv) + 24;        // q, k and v beside each other, and something else
    AttentionShape s = {x->B, x->T, x->Tk, H, x->KV, x->D, x->Dv, wide, dense ? x->KV * x->D : wide, dense ? x->KV * x->Dv : wide, 0};
    Mask mask = {x->kind, x->window, x->block, x->stride, x->sel_block, x->n, NULL};
    const int64_t nq = s.B * s.T * s.q_row, nk = s.B * s.Tk * s.k_row, nv = s.B * s.Tk * s.v_row, no = s.B * s.T * H * s.Dv, rows = s.B * s.T * H, nd = rows * s.D;
    char name[256];
    snprintf(name, sizeof name, "%s B=%d T=%d Tk=%d G=%d KV=%d D=%d window=%d sel_block=%d n=%d%s", kind_names[x->kind], (int)s.B, (int)s.T, (int)s.Tk, x->G, x->KV, x->D,
             (int)x->window, x->sel_block, x->n, steep ? " steep" : "");
    check(fast_attention(&s, &mask), "%s: not taken", name);

    // the CPU
    float *q = normals(nq), *k = normals(nk), *v = normals(nv), *dout = normals(no), *gate = zeros(rows * BRANCHES);
    for (int64_t i = 0; i < nk && steep; i++) k[i] *= (float)(1 << min64(i / s.k_row % s.Tk / 64, 5));
    for (int64_t i = 0; i < rows * BRANCHES; i++) gate[i] = (float)fabs((double)normal_at(3, stream, (uint64_t)i));
    int *idx = x->kind == MASK_SELECTED ? random_blocks(x) : NULL;
    mask.block_idx = idx;
    float *out = zeros(no), *lse = zeros(rows), *dq = zeros(nq), *dk = zeros(nk), *dv = zeros(nv), *delta = zeros(rows);
    TileScratch sizes;
    float *side_k = zeros(s.B * s.KV * side_size(key_block(&mask), s.Tk, s.D)), *side_v = zeros(s.B * s.KV * side_size(key_block(&mask), s.Tk, s.Dv));
    float *memory = zeros(thread_count() * max64(tile_scratch(&sizes, NULL, &s, &mask, 0), tile_scratch(&sizes, NULL, &s, &mask, 1)));
    float *parts = zeros(attention_parts(&s) * s.B * s.Tk * s.KV * (s.D + s.Dv));
    attention_forward(out, lse, q, k, v, &mask, &s, side_k, memory);
    attention_backward(dq, dk, dv, dout, gate, BRANCHES, out, lse, q, k, v, &mask, &s, side_k, side_v, parts, memory);
    float *dq_dense = zeros(nd);
    for (int64_t i = 0; i < nd; i++) dq_dense[i] = dq[i / (H * s.D) * s.q_row + i % (H * s.D)];

    // the GPU
    bf16 *dq_in = device_bf16(q, nq), *dk_in = device_bf16(k, nk), *dv_in = device_bf16(v, nv), *ddout = device_bf16(dout, no);
    float *dgate = device_f32(gate, rows * BRANCHES), *ddelta = (float *)device_filled(rows * 4);
    RowStats *stats = (RowStats *)device_filled(rows * (int64_t)sizeof(RowStats));
    const int64_t partials = max64(fast_attention_partial(&s, &mask), hopper_attention_partial(&s, &mask));
    float *partial = (float *)device_filled(partials * 4);
    Takers takers = make_takers(&mask, &s);
    unsigned char *orders[2] = {NULL, NULL};        // of queries: as found, and that of the text
    if (idx) {
        int *device_idx = (int *)device_malloc(s.B * s.T * s.KV * x->n * 4);
        to_device(device_idx, idx, s.B * s.T * s.KV * x->n * 4);
        mask.block_idx = device_idx;
        orders[0] = check_order(idx, device_idx, x->n, &s, name);
        std::vector<unsigned char> text((size_t)(s.B * s.KV * s.T));
        for (size_t i = 0; i < text.size(); i++) text[i] = (unsigned char)((int64_t)i % s.T % ORDER_WINDOW);
        orders[1] = (unsigned char *)device_malloc((int64_t)text.size());
        to_device(orders[1], text.data(), (int64_t)text.size());
    }
    if (idx && s.Tk > 0) {      // the quick way to the lists of takers, against the simple one
        Takers other = make_takers(&mask, &s);
        find_takers(&takers, mask.block_idx, mask.n, &s);
        fast_takers(&other, mask.block_idx, mask.n, &s, (int *)partial);
        const int64_t lists = s.B * s.KV * takers.blocks;
        float *a[] = {host_of_f32((float *)takers.count, lists * 2), host_of_f32((float *)takers.start, lists * 2), host_of_f32((float *)takers.queries, s.B * s.T * s.KV * x->n)};
        float *b[] = {host_of_f32((float *)other.count, lists * 2), host_of_f32((float *)other.start, lists * 2), host_of_f32((float *)other.queries, s.B * s.T * s.KV * x->n)};
        check(memcmp(a[0], b[0], (size_t)lists * 8) == 0 && memcmp(a[1], b[1], (size_t)lists * 8) == 0 && memcmp(a[2], b[2], (size_t)(s.B * s.T * s.KV * x->n) * 4) == 0,
              "%s: lists of takers", name);
        for (int i = 0; i < 3; i++) free(a[i]), free(b[i]);
        free_takers(&other);
    }
    // Each twice; of a selection the second time with another order, in which a row's sums come to the same bits.
    for (int version = 2; version <= last_version(&s, &mask); version++) {
        bf16 *dout_of[2], *ddk[2], *ddv[2];
        float *dlse[2], *ddq[2];
        CUDA(cudaMemset(partial, 0xff, (size_t)partials * 4));
        for (int run = 0; run < 2; run++) {
            mask.order = orders[run];
            dout_of[run] = (bf16 *)device_filled(no * 2);
            dlse[run] = (float *)device_filled(rows * 4);
            forward_by(version, dout_of[run], dlse[run], dq_in, dk_in, dv_in, &mask, &s);
            ddq[run] = (float *)device_filled(nd * 4);
            if (run) CUDA(cudaMemcpy(ddq[1], ddq[0], (size_t)nd * 4, cudaMemcpyDeviceToDevice));       // and once more: twice the first
            ddk[run] = (bf16 *)device_filled(nk * 2);
            ddv[run] = (bf16 *)device_filled(nv * 2);
            backward_by(version, ddq[run], run, ddk[run], ddv[run], ddout, dgate, dout_of[run], dlse[run], dq_in, dk_in, dv_in, &mask, &s, ddelta, stats, &takers, partial);
        }
        float *g_out[2], *g_lse[2], *g_dq[2], *g_dk[2], *g_dv[2];
        for (int run = 0; run < 2; run++) {
            g_out[run] = host_of_bf16(dout_of[run], no);
            g_lse[run] = host_of_f32(dlse[run], rows);
            g_dq[run] = host_of_f32(ddq[run], nd);
            g_dk[run] = host_of_bf16(ddk[run], nk);
            g_dv[run] = host_of_bf16(ddv[run], nv);
        }
        // Between the heads of a row nothing may be written: there the NaN stays.
        int touched = 0;
        for (int64_t i = 0; i < nk; i++)
            if (i % s.k_row >= s.KV * s.D) touched += g_dk[0][i] == g_dk[0][i], g_dk[0][i] = g_dk[1][i] = 0;
        for (int64_t i = 0; i < nv; i++)
            if (i % s.v_row >= s.KV * s.Dv) touched += g_dv[0][i] == g_dv[0][i], g_dv[0][i] = g_dv[1][i] = 0;
        check(touched == 0, "%s: version %d: %d numbers beside dk and dv are overwritten", name, version, touched);

        const double all = sqrt(norm_of(dq_dense, nd) * norm_of(dq_dense, nd) + norm_of(dk, nk) * norm_of(dk, nk) + norm_of(dv, nv) * norm_of(dv, nv));
        const double errors[] = {error_past_infinities(g_out[0], out, no, 0), error_past_infinities(g_lse[0], lse, rows, 1), error_past_infinities(g_dq[0], dq_dense, nd, 1e-4 * all),
                                 error_past_infinities(g_dk[0], dk, nk, 1e-4 * all), error_past_infinities(g_dv[0], dv, nv, 1e-4 * all)};
        const char *const what[] = {"out", "lse", "dq", "dk", "dv"};
        for (int i = 0; i < 5; i++) check(errors[i] < (i == 1 ? F32_ERROR : BF16_ERROR), "%s: version %d: %s: error %.2e", name, version, what[i], errors[i]);
        int same = memcmp(g_out[0], g_out[1], (size_t)no * 4) == 0 && memcmp(g_lse[0], g_lse[1], (size_t)rows * 4) == 0 &&
                   memcmp(g_dk[0], g_dk[1], (size_t)nk * 4) == 0 && memcmp(g_dv[0], g_dv[1], (size_t)nv * 4) == 0;
        for (int64_t i = 0; i < nd; i++) same &= g_dq[1][i] == 2 * g_dq[0][i];
        check(same, "%s: version %d: another run, other bits", name, version);
        printf("%-78s version %d  out %.1e  lse %.1e  dq %.1e  dk %.1e  dv %.1e\n", name, version, errors[0], errors[1], errors[2], errors[3], errors[4]);
        for (int run = 0; run < 2; run++) {
            void *on_device[] = {dout_of[run], dlse[run], ddq[run], ddk[run], ddv[run]};
            for (int i = 0; i < 5; i++) CUDA(cudaFree(on_device[i]));
            free(g_out[run]), free(g_lse[run]), free(g_dq[run]), free(g_dk[run]), free(g_dv[run]);
        }
    }
    if (x->kind == MASK_COMPRESSED && x->sel_block && s.Tk > 0) check_select(x, &s, dq_in, dk_in, q, k, lse);
    void *on_device[] = {dq_in, dk_in, dv_in, ddout, dgate, ddelta, stats, partial, (void *)mask.block_idx, orders[0], orders[1]};
    for (void *x : on_device) CUDA(cudaFree(x));
    free_takers(&takers);
    float *on_host[] = {q, k, v, dout, gate, out, lse, dq, dk, dv, delta, side_k, side_v, memory, parts, dq_dense, (float *)idx};
    for (int i = 0; i < 17; i++) free(on_host[i]);
}

static int check_cases(int first, int last) {
    enum { W = MASK_WINDOW, C = MASK_COMPRESSED, S = MASK_SELECTED };
    const Case cases[] = {
        // kind B T Tk  G KV D Dv  window  block stride  sel_block n
        {W, 1, 1, 1, 1, 1, 64, 64, 1, 0, 0, 0, 0},
        {W, 2, 70, 70, 3, 2, 64, 64, 70, 0, 0, 0, 0},           // full
        {W, 1, 150, 150, 16, 1, 64, 64, 150, 0, 0, 0, 0},       // full, long enough for parts
        {W, 2, 131, 131, 1, 2, 64, 64, 1, 0, 0, 0, 0},
        {W, 1, 133, 133, 2, 1, 64, 64, 7, 0, 0, 0, 0},
        {W, 1, 200, 200, 3, 1, 64, 64, 65, 0, 0, 0, 0},
        {W, 1, 65, 140, 2, 1, 64, 64, 1000, 0, 0, 0, 0},        // keys that nobody sees; a window longer than the text
        {W, 1, 90, 90, 3, 1, 128, 128, 33, 0, 0, 0, 0},
        {W, 1, 77, 77, 16, 1, 128, 128, 77, 0, 0, 0, 0},
        {W, 1, 67, 67, 5, 1, 192, 128, 67, 0, 0, 0, 0},
        {W, 1, 500, 500, 16, 1, 64, 64, 213, 0, 0, 0, 0},       // a window that narrow tiles cover better, of several of them
        {W, 2, 410, 410, 16, 1, 128, 128, 217, 0, 0, 0, 0},
        {C, 1, 20, 0, 3, 1, 64, 64, 0, 32, 16, 64, 2},          // shorter than a block: no keys
        {C, 2, 100, 24, 3, 2, 64, 64, 0, 8, 4, 8, 3},
        {C, 1, 330, 82, 1, 1, 64, 64, 0, 8, 4, 16, 3},
        {C, 1, 300, 299, 2, 1, 64, 64, 0, 2, 1, 8, 4},
        {C, 1, 90, 22, 16, 2, 64, 64, 0, 6, 4, 16, 2},
        {C, 1, 40, 19, 40, 1, 64, 64, 0, 4, 2, 8, 2},           // a group of more than 32 heads
        {C, 1, 60, 29, 3, 1, 128, 128, 0, 4, 2, 8, 3},
        {C, 1, 50, 24, 16, 1, 128, 128, 0, 4, 2, 8, 3},
        {C, 1, 60, 14, 17, 1, 192, 128, 0, 8, 4, 8, 2},
        {C, 1, 60, 14, 9, 1, 192, 128, 0, 8, 4, 8, 2},
        {C, 1, 50, 12, 3, 1, 192, 128, 0, 8, 4, 8, 2},
        {S, 1, 5, 5, 1, 1, 64, 64, 0, 0, 0, 8, 3},              // shorter than a block
        {S, 2, 70, 70, 3, 2, 64, 64, 0, 0, 0, 8, 3},
        {S, 1, 75, 75, 16, 1, 64, 64, 0, 0, 0, 16, 3},
        {S, 1, 100, 100, 2, 2, 64, 64, 0, 0, 0, 32, 2},
        {S, 1, 170, 170, 16, 1, 64, 64, 0, 0, 0, 64, 2},
        {S, 1, 150, 150, 1, 1, 64, 64, 0, 0, 0, 40, 8},         // n beyond all blocks
        {S, 1, 300, 300, 1, 2, 64, 64, 0, 0, 0, 8, 40},         // more blocks a query than lanes
        {S, 1, 190, 190, 3, 1, 64, 64, 0, 0, 0, 80, 2},         // blocks longer than a tile
        {S, 2, 190, 190, 5, 2, 64, 64, 0, 0, 0, 80, 2},
        {S, 1, 130, 130, 4, 1, 64, 64, 0, 0, 0, 40, 3},
        {S, 1, 150, 150, 8, 2, 128, 128, 0, 0, 0, 64, 2},
        {S, 1, 40, 40, 35, 1, 64, 64, 0, 0, 0, 16, 2},          // three warps a query
        {S, 1, 100, 100, 35, 1, 64, 64, 0, 0, 0, 48, 2},
        {S, 1, 70, 70, 3, 1, 128, 128, 0, 0, 0, 16, 3},
        {S, 1, 90, 90, 16, 1, 128, 128, 0, 0, 0, 64, 1},
        {S, 1, 1200, 1200, 32, 1, 128, 128, 0, 0, 0, 64, 4},    // neighbours that choose much that one does not: more than a ring holds
        {S, 1, 333, 333, 12, 1, 128, 128, 0, 0, 0, 64, 3},      // 15 rows of a warp's 16
        {S, 1, 210, 210, 6, 1, 128, 128, 0, 0, 0, 64, 2},       // heads that four warps cannot divide
        {S, 2, 200, 200, 4, 1, 128, 128, 0, 0, 0, 64, 3},       // as many queries as a warp can have
        {S, 1, 140, 140, 64, 1, 64, 64, 0, 0, 0, 64, 2},        // as few
        {S, 1, 50, 50, 4, 1, 192, 128, 0, 0, 0, 24, 2},
    };
    for (int i = first; i <= last && i < (int)(sizeof cases / sizeof *cases); i++) {
        check_case(&cases[i], 0);
        if (cases[i].Tk > 64 && cases[i].T < 400) check_case(&cases[i], 1);
    }

    if (last >= (int)(sizeof cases / sizeof *cases)) check_orders();

    AttentionShape s = {1, 64, 64, 4, 1, 64, 64, 256, 64, 64, 0};
    const Mask mask = {MASK_WINDOW, 64, 0, 0, 0, 0, NULL};
    s.q_row = 260;
    check(!fast_attention(&s, &mask), "a row size that 16 bytes do not divide is taken");
    s.q_row = 256;
    s.D = 96;
    check(!fast_attention(&s, &mask), "D = 96 is taken");
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}

// ----------------------------------------------------------------------------
// Bench

static const double PEAK_FLOPS = 790e12, PEAK_BYTES = 4.3e12;       // of one H200: bf16 matrix product and copy, both measured

// Neighbouring queries of a text look for much the same: 9/10 of each is that of the first of its ALIKE tokens.
enum { ALIKE = 32 };
__global__ void alike_kernel(bf16 *x, float *y, const float *from, int64_t n, int64_t row) {
    const int64_t i = global_thread();
    if (i >= n) return;
    x[i] = __float2bfloat16(sqrtf(0.9f) * from[i / row / ALIKE * ALIKE * row + i % row] + sqrtf(0.1f) * from[i]);
    y[i] = __bfloat162float(x[i]);
}

__global__ void widen_kernel(float *y, const bf16 *x, int64_t n) {
    const int64_t i = global_thread();
    if (i < n) y[i] = __bfloat162float(x[i]);
}

static void report(const char *what, int version, double ms, double flops, double bytes) {
    const double floor_ms = fmax(flops / PEAK_FLOPS, bytes / PEAK_BYTES) * 1e3;
    printf("%-25s version %d  %9.3f ms  %7.1f TFLOP/s  %7.0f GB/s  floor %8.3f ms, %5.1f%%\n", what, version, ms, flops / ms * 1e-9, bytes / ms * 1e-6, floor_ms,
           floor_ms / ms * 100);
}

// Pairs of a query and a key that it sees, for each head.
static double seen_pairs(const Mask *mask, const AttentionShape *s) {
    double pairs = 0;
    int64_t lo, hi;
    if (mask->kind != MASK_SELECTED) {
        for (int64_t t = 0; t < s->T; t++) key_range(mask, t, &lo, &hi), pairs += (double)(hi - lo);
        return pairs * (double)s->B;
    }
    const int64_t count = s->B * s->T * s->KV * mask->n;
    int *idx = (int *)xmalloc((size_t)count * sizeof *idx);
    to_host(idx, mask->block_idx, count * 4);
    for (int64_t i = 0; i < count; i++)
        if (idx[i] >= 0) pairs += (double)(min64((int64_t)(idx[i] + 1) * mask->sel_block, i / mask->n / s->KV % s->T + 1) - (int64_t)idx[i] * mask->sel_block);
    free(idx);
    return pairs / s->KV;
}

typedef struct Tensor { bf16 *b; float *f; } Tensor;
static Tensor random_tensor(int64_t n) {
    Tensor x = {(bf16 *)device_malloc(n * 2), (float *)device_malloc(n * 4)};
    fill_normal(x.b, n, (uint32_t)++stream);
    widen_kernel<<<grid(n, THREADS), THREADS>>>(x.f, x.b, n);
    LAUNCHED();
    return x;
}
static void free_tensor(Tensor *x) {
    CUDA(cudaFree(x->b));
    CUDA(cudaFree(x->f));
}

static void bench_mask(const char *name, const Mask *mask, AttentionShape s, int version, Tensor q, Tensor k, Tensor v) {
    const int64_t rows = s.B * s.T * s.H, no = rows * s.Dv, nd = rows * s.D, nk = s.B * s.Tk * s.k_row, nv = s.B * s.Tk * s.v_row;
    Tensor dout = random_tensor(no), out = random_tensor(no), dk = random_tensor(nk), dv = random_tensor(nv);
    float *lse = (float *)device_malloc(rows * 4), *delta = (float *)device_malloc(rows * 4), *dq = (float *)device_malloc(nd * 4);
    RowStats *stats = (RowStats *)device_malloc(rows * (int64_t)sizeof(RowStats));
    float *partial = (float *)device_malloc(max64(fast_attention_partial(&s, mask), hopper_attention_partial(&s, mask)) * 4);
    Takers takers = make_takers(mask, &s);
    const double pairs = seen_pairs(mask, &s) * s.H, forward = 2 * pairs * (s.D + s.Dv), backward = 2 * pairs * (3 * s.D + 2 * s.Dv);
    const double inputs = (double)nd + (double)(s.B * s.Tk * s.KV * (s.D + s.Dv)), small = 4 * (double)rows;
    char what[64];
    printf("%s: %.3g pairs a head, partial sums %.0f MB\n", name, pairs / s.H, (double)gpu_attention_partial(&s, mask) * 4e-6);
    for (int i = 1; i <= 3; i++) {
        if ((version && version != i) || (i == 3 && !hopper_attention(&s, mask))) continue;
        const int runs = i == 1 ? 1 : 11;
        const double bytes = i == 1 ? 4 : 2;        // of a number
        const double fms = median_ms(runs, [&] {
            if (i == 1) simple_attention_forward(out.f, lse, q.f, k.f, v.f, mask, &s);
            else forward_by(i, out.b, lse, q.b, k.b, v.b, mask, &s);
        });
        snprintf(what, sizeof what, "%s forward", name);
        report(what, i, fms, forward, bytes * (inputs + (double)no) + small);
        const double bms = median_ms(runs, [&] {
            if (i == 1) simple_attention_backward(dq, 0, dk.f, dv.f, dout.f, (const float *)NULL, out.f, lse, q.f, k.f, v.f, mask, &s, delta, &takers);
            else backward_by(i, dq, 0, dk.b, dv.b, dout.b, NULL, out.b, lse, q.b, k.b, v.b, mask, &s, delta, stats, &takers, partial);
        });
        snprintf(what, sizeof what, "%s backward", name);
        report(what, i, bms, backward, bytes * (2 * inputs - (double)nd + 2 * (double)no) + 4 * (double)nd + 2 * small);
    }
    if (mask->kind == MASK_SELECTED) {
        printf("%-25s            %9.3f ms, inside backward\n", "lists of takers", median_ms(5, [&] { fast_takers(&takers, mask->block_idx, mask->n, &s, (int *)partial); }));
        printf("%-25s            %9.3f ms, before forward\n", "order of queries", median_ms(5, [&] { order_queries((unsigned char *)mask->order, mask, &s); }));
    }
    free_tensor(&dout), free_tensor(&out), free_tensor(&dk), free_tensor(&dv);
    void *rest[] = {lse, delta, stats, dq, partial};
    for (int i = 0; i < 5; i++) CUDA(cudaFree(rest[i]));
    free_takers(&takers);
}

static int bench(int64_t T, int H, int KV, int D, int version, int64_t B) {
    const int Dv = D == 192 ? 128 : D;
    const SelectShape sel = {32, 16, 64, 16, 1, 2};
    AttentionShape s = {B, T, T, H, KV, D, Dv, (int64_t)H * D, (int64_t)KV * D, (int64_t)KV * Dv, 0}, cmp = s;
    cmp.Tk = compressed_seen(T - 1, sel.cmp_block, sel.cmp_stride);
    int *block_idx = (int *)device_malloc(B * T * KV * sel.n * 4);
    unsigned char *order = (unsigned char *)device_malloc(B * T * KV);
    const Mask full = {MASK_WINDOW, T, 0, 0, 0, 0, NULL}, window = {MASK_WINDOW, 512, 0, 0, 0, 0, NULL};
    const Mask compressed = {MASK_COMPRESSED, 0, sel.cmp_block, sel.cmp_stride, 0, 0, NULL}, selected = {MASK_SELECTED, 0, 0, 0, sel.sel_block, sel.n, block_idx, order};
    if (!fast_attention(&s, &full)) die(2, "the fast tier takes D = 64, 128 and 192");
    Tensor q = random_tensor(B * T * s.q_row), k = random_tensor(B * T * s.k_row), v = random_tensor(B * T * s.v_row);
    float *lse = (float *)device_malloc(B * T * H * 4), *scratch = (float *)device_malloc(select_scratch(&cmp, &sel) * 4);
    Tensor out = random_tensor(B * T * H * Dv);
    printf("B=%" PRId64 " T=%" PRId64 " H=%d KV=%d D=%d Dv=%d, preset paper, on %s. Floor: %.0f TFLOP/s, %.1f TB/s, 2 matrix products forward and 5 backward\n", B, T, H, KV, D, Dv, gpu.name,
           PEAK_FLOPS * 1e-12, PEAK_BYTES * 1e-12);

    // The blocks that these queries and keys choose; and how long the weights of that choice take.
    const auto choose = [&](Tensor queries) {
        fast_attention_forward(out.b, lse, queries.b, k.b, v.b, &compressed, &cmp);
        gpu_select_forward(block_idx, queries.b, k.b, lse, &cmp, &sel, &compressed, scratch);
        order_queries(order, &selected, &s);
    };
    choose(q);
    const double pairs = seen_pairs(&compressed, &cmp) * H, bytes = (double)(B * T) * KV * (double)cmp.Tk / 2 * 4;
    const int64_t chunk = select_chunk(&cmp, &sel);
    for (int i = 1; i <= 2; i++)
        if (!version || version == i)
            report("select weights", i, median_ms(i == 1 ? 1 : 11, [&] {
                       for (int64_t row = 0; row < B * T * KV; row += chunk) {
                           if (i == 2) fast_select_weights(scratch, q.b, k.b, lse, row, min64(chunk, B * T * KV - row), &cmp, &sel);
                           else simple_select_weights(scratch, q.f, k.f, lse, row, min64(chunk, B * T * KV - row), &cmp, &sel);
                       }
                   }), 2 * pairs * D, bytes);

    bench_mask("compressed", &compressed, cmp, version, q, k, v);
    print_sharing(block_idx, T, KV, sel.n, sel.sel_block);
    bench_mask("selected", &selected, s, version, q, k, v);
    Tensor alike = random_tensor(B * T * s.q_row);
    alike_kernel<<<grid(B * T * s.q_row, THREADS), THREADS>>>(alike.b, alike.f, q.f, B * T * s.q_row, s.q_row);
    LAUNCHED();
    choose(alike);
    print_sharing(block_idx, T, KV, sel.n, sel.sel_block);
    bench_mask("selected, alike", &selected, s, version, alike, k, v);
    free_tensor(&alike);
    bench_mask("window", &window, s, version, q, k, v);
    bench_mask("full", &full, s, version, q, k, v);
    CUDA(cudaFree(lse));
    CUDA(cudaFree(scratch));
    free_tensor(&out);
    free_tensor(&q), free_tensor(&k), free_tensor(&v);
    CUDA(cudaFree(block_idx));
    CUDA(cudaFree(order));
    return 0;
}

int main(int argc, char **argv) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    device_open();
    if (argc == 1 || (argc <= 4 && strcmp(argv[1], "check") == 0))
        return check_cases(argc > 2 ? atoi(argv[2]) : 0, argc > 3 ? atoi(argv[3]) : INT_MAX);
    if ((argc < 6 || argc > 8) || strcmp(argv[1], "bench") != 0) {
        fprintf(stderr, "usage: attention [check [first case [last case]]] | attention bench T H KV D [version [batch]]\n");
        return 2;
    }
    const int64_t T = atoll(argv[2]);
    const int H = atoi(argv[3]), KV = atoi(argv[4]), D = atoi(argv[5]), version = argc > 6 ? atoi(argv[6]) : 0, B = argc > 7 ? atoi(argv[7]) : 1;
    if (B < 1 || T < 1 || H < 1 || KV < 1 || H % KV) die(2, "attention bench: T, H, KV and the batch are positive, and KV divides H");
    return bench(T, H, KV, D, version, B);
}
