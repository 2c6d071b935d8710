/*
Matrix products of a mixture of experts: each expert has its own weights and as many rows as the router sent it.

    version 1   an expert after the other: its rows gathered, a cuBLAS product, its rows scattered; the host waits to learn how
                many rows each has. Here, where it is easier to follow than what replaced it
    version 2   one launch for all experts; the host never learns it. In train_nsa.cu

    make build/experts && build/experts            checks both against the CPU's mixture, and version 2's products against plain loops
    build/experts bench [N C F E k]                times both: tokens, model width, width of an expert, experts, of them each token's
    make build/experts_emulated && build/experts_emulated      the check without a GPU

SPDX-License-Identifier: MIT
*/

#define NSA_CU_NO_MAIN
#include "../../train_nsa.cu"
#include "test/check.h"
#include "bench.h"

// ----------------------------------------------------------------------------
// Version 1

template <typename F>
__global__ void gather_rows_kernel(F *out, const F *x, const int *rows, int64_t n, int64_t c, int k) {
    const int64_t item = global_thread();
    if (item < n * c) out[item] = x[rows[item / c] / k * c + item % c];
}

// out[token] += weight · y, or with weight NULL += y; a token is at most once among the rows.
template <typename F>
__global__ void scatter_rows_kernel(F *out, const F *y, const float *weight, const int *rows, int64_t n, int64_t c, int k) {
    const int64_t item = global_thread();
    if (item >= n * c) return;
    const int row = rows[item / c];
    F *to = out + row / k * c + item % c;
    *to = (F)((float)*to + (weight ? weight[row] : 1) * (float)y[item]);
}

// dweight[row] = <dh, h>; then dy and dh carry the share's weight.
template <typename F>
__global__ void moe_dweight_kernel(float *dweight, F *dy, F *dh, const F *h, const float *weight, const int *rows, int64_t n, int64_t c, int64_t f) {
    const int64_t i = global_warp();
    if (i >= n) return;
    const int row = rows[i];
    float sum = 0;
    for (int64_t j = lane(); j < f; j += WARP) sum += (float)dh[i * f + j] * (float)h[i * f + j];
    sum = warp_sum(sum);
    if (lane() == 0) dweight[row] = sum;
    for (int64_t j = lane(); j < c; j += WARP) dy[i * c + j] = (F)((float)dy[i * c + j] * weight[row]);
    for (int64_t j = lane(); j < f; j += WARP) dh[i * f + j] = (F)((float)dh[i * f + j] * weight[row]);
}

template <typename F>
static void gather_rows(F *out, const F *x, const int *rows, int64_t n, int64_t c, int k) {
    gather_rows_kernel<<<grid(n * c, THREADS), THREADS>>>(out, x, rows, n, c, k);
    LAUNCHED();
}

template <typename F>
static void scatter_rows(F *out, const F *y, const float *weight, const int *rows, int64_t n, int64_t c, int k) {
    scatter_rows_kernel<<<grid(n * c, THREADS), THREADS>>>(out, y, weight, rows, n, c, k);
    LAUNCHED();
}

// One expert's; it has no more rows than there are tokens.
template <typename F>
struct ExpertScratch {
    F *rows, *y, *h, *dh;       // (N,C), (N,C), (N,F), (N,F); y is of the output or its gradient, then of the rows' gradient
};

template <typename F>
static void carve_expert_scratch(ExpertScratch<F> *m, const MoeShape *s, Carver *memory) {
    carve(memory, &m->rows, s->N * s->C);
    carve(memory, &m->y, s->N * s->C);
    carve(memory, &m->h, s->N * s->F);
    carve(memory, &m->dh, s->N * s->F);
}

// work(e, from, n) for each expert that has rows: n of them, from `from` on. The host asks, and waits for the answer.
template <typename Work>
static void each_expert(const Routing *r, const MoeShape *s, Work work) {
    int64_t *start = (int64_t *)xmalloc((size_t)(s->E + 1) * sizeof(int64_t));
    to_host(start, r->start, (s->E + 1) * (int64_t)sizeof(int64_t));
    for (int e = 0; e < s->E; e++)
        if (start[e] < start[e + 1]) work(e, start[e], start[e + 1] - start[e]);
    free(start);
}

// out (N,C) += Σ_e w_e·expert_e(x), x (N,C); gate_up (N·k,2F), rows sorted by expert, is kept for backward.
template <typename F>
static void gpu_moe_forward1(F *out, F *gate_up, const F *x, const F *experts, const Routing *r, const MoeShape *s, const ExpertScratch<F> *m) {
    const int64_t C = s->C, Fe = s->F;
    each_expert(r, s, [&](int e, int64_t from, int64_t n) {
        const int *list = r->row_token + from;
        const F *w_gate_up = experts + e * 3 * Fe * C, *w_down = w_gate_up + 2 * Fe * C;
        F *a = gate_up + from * 2 * Fe;
        gather_rows(m->rows, x, list, n, C, s->k);
        gpu_linear_forward(a, 2 * Fe, m->rows, C, w_gate_up, n, C, 2 * Fe);
        gpu_swiglu_forward(m->h, a, n, Fe);
        gpu_linear_forward(m->y, C, m->h, Fe, w_down, n, Fe, C);
        scatter_rows(out, m->y, r->weight, list, n, C, s->k);
    });
}

// dx (N,C) +=, dexperts +=, dweight (N·k) for router_backward_kernel; gate_up becomes its gradient.
template <typename F>
static void gpu_moe_backward1(F *dx, float *dexperts, float *dweight, const F *dout, F *gate_up, const F *x, const F *experts,
                              const Routing *r, const MoeShape *s, const ExpertScratch<F> *m) {
    const int64_t C = s->C, Fe = s->F;
    device_zero(dweight, s->N * s->k * (int64_t)sizeof(float));         // a dropped share has no gradient
    each_expert(r, s, [&](int e, int64_t from, int64_t n) {
        const int *list = r->row_token + from;
        const F *w_gate_up = experts + e * 3 * Fe * C, *w_down = w_gate_up + 2 * Fe * C;
        float *dw_gate_up = dexperts + e * 3 * Fe * C, *dw_down = dw_gate_up + 2 * Fe * C;
        F *a = gate_up + from * 2 * Fe;
        gather_rows(m->rows, x, list, n, C, s->k);
        gather_rows(m->y, dout, list, n, C, s->k);
        gpu_swiglu_forward(m->h, a, n, Fe);
        gemm(n, Fe, C, m->y, C, 0, w_down, Fe, 0, m->dh, Fe, 0);
        moe_dweight_kernel<<<grid(n, WARPS), THREADS>>>(dweight, m->y, m->dh, m->h, r->weight, list, n, C, Fe);
        LAUNCHED();
        gemm(C, Fe, n, m->y, C, 1, m->h, Fe, 0, dw_down, Fe, 1);
        gpu_swiglu_backward(a, m->h, m->dh, n, Fe);
        gpu_linear_backward(m->y, C, dw_gate_up, a, 2 * Fe, m->rows, C, w_gate_up, n, C, 2 * Fe, 0);
        scatter_rows(dx, m->y, NULL, list, n, C, s->k);
    });
}

// ----------------------------------------------------------------------------
// Numbers to check with

static const char *what = "";       // is checked

static void check_error(const char *name, double error, double limit) {
    check(error <= limit, "%s: %s: error %.3g, allowed %.3g", what, name, error, limit);
}

static float *host_numbers(int64_t n) { return (float *)xcalloc((size_t)max64(n, 1), sizeof(float)); }

template <typename F>
static float *random_numbers(int64_t n, float scale, uint64_t stream) {     // as a number of type F has them
    float *x = host_numbers(n);
    for (int64_t i = 0; i < n; i++) x[i] = (float)(F)(scale * normal_at(3, stream, (uint64_t)i));
    return x;
}

template <typename F>
static F *upload(const float *x, int64_t n) {
    F *host = (F *)xmalloc((size_t)max64(n, 1) * sizeof(F)), *device = (F *)device_malloc(n * (int64_t)sizeof(F));
    for (int64_t i = 0; i < n; i++) host[i] = (F)x[i];
    to_device(device, host, n * (int64_t)sizeof(F));
    free(host);
    return device;
}

template <typename F>
static float *download(const F *device, int64_t n) {
    F *host = (F *)xmalloc((size_t)max64(n, 1) * sizeof(F));
    float *x = host_numbers(n);
    to_host(host, device, n * (int64_t)sizeof(F));
    for (int64_t i = 0; i < n; i++) x[i] = (float)host[i];
    free(host);
    return x;
}

// ----------------------------------------------------------------------------
// Routing, by the CPU

enum Skew { NONE, ALL_TO_LAST, HALF_EMPTY };

static void routing_make(Routing *r, const MoeShape *s, int skew) {
    const int64_t N = s->N, R = N * s->k;
    r->probs = host_numbers(N * s->E);
    r->lse = host_numbers(N);
    r->weight = host_numbers(R);
    r->choice = (int *)host_numbers(R);
    r->row_token = (int *)host_numbers(R);
    r->start = (int64_t *)host_numbers(2 * (s->E + 1));
    r->load = (int64_t *)host_numbers(2 * s->E);
    for (int64_t i = 0; i < N * s->E; i++) {
        const int e = (int)(i % s->E);
        r->probs[i] = normal_at(3, 1, (uint64_t)i);
        if (skew == ALL_TO_LAST && e == s->E - 1) r->probs[i] += 50;
        if (skew == HALF_EMPTY && e % 2 == 0) r->probs[i] -= 50;
    }
    moe_route(r, s);
}

static void routing_free(Routing *r) {
    void *all[] = {r->probs, r->lse, r->weight, r->choice, r->row_token, r->start, r->load};
    for (void *p : all) free(p);
}

// The part of it that the products need, on the GPU.
static Routing routing_upload(const Routing *r, const MoeShape *s) {
    const int64_t R = s->N * s->k;
    Routing d;
    memset(&d, 0, sizeof d);
    d.weight = upload<float>(r->weight, R);
    d.row_token = (int *)device_malloc(R * (int64_t)sizeof(int));
    d.start = (int64_t *)device_malloc((s->E + 1) * (int64_t)sizeof(int64_t));
    // a dropped share has no row: what lies there may be anything
    int *list = (int *)xmalloc((size_t)R * sizeof(int));
    for (int64_t i = 0; i < R; i++) list[i] = i < r->start[s->E] ? r->row_token[i] : INT_MAX;
    to_device(d.row_token, list, R * (int64_t)sizeof(int));
    to_device(d.start, r->start, (s->E + 1) * (int64_t)sizeof(int64_t));
    free(list);
    return d;
}

static void routing_free_device(Routing *d) {
    void *all[] = {d->weight, d->row_token, d->start};
    for (void *p : all) CUDA(cudaFree(p));
}

// ----------------------------------------------------------------------------
// Each product against a plain loop in double

// out (R,n) = inp (R,m) · W_e, W_e (m,n) lying so that its number (i, j) is at w[i·down + j·across]
static float *rows_reference(const float *inp, const int *list, const float *w, int64_t stride, int64_t m, int64_t n, int64_t down, int64_t across, const Routing *r, const MoeShape *s) {
    float *out = host_numbers(s->N * s->k * n);
    for (int e = 0; e < s->E; e++)
        for (int64_t i = r->start[e]; i < r->start[e + 1]; i++)
            for (int64_t j = 0; j < n; j++) {
                double sum = 0;
                for (int64_t p = 0; p < m; p++) sum += (double)inp[(list ? list[i] : i) * m + p] * (double)w[e * stride + p * down + j * across];
                out[i * n + j] = (float)sum;
            }
    return out;
}

static void add_dweight_reference(float *dw, int64_t stride, const float *dout, const int *dlist, const float *inp, const int *list, int64_t c, int64_t oc, const Routing *r, const MoeShape *s) {
    for (int e = 0; e < s->E; e++)
        for (int64_t o = 0; o < oc; o++)
            for (int64_t j = 0; j < c; j++) {
                double sum = 0;
                for (int64_t i = r->start[e]; i < r->start[e + 1]; i++) sum += (double)dout[(dlist ? dlist[i] : i) * oc + o] * (double)inp[(list ? list[i] : i) * c + j];
                dw[e * stride + o * c + j] += (float)sum;
            }
}

static double largest_difference(const float *a, const float *b, int64_t n) {
    double most = 0;
    for (int64_t i = 0; i < n; i++) most = fmax(most, a[i] == b[i] ? 0 : fabs((double)a[i] - (double)b[i]));
    return most;
}

// Rows of `out` as the reference has them, and those behind the last as they were before: all 7.
static void check_rows(const char *name, const float *out, const float *reference, int64_t rows, int64_t rows_max, int64_t n, double limit) {
    check_error(name, error_of(out, reference, rows * n), limit);
    int touched = 0;
    for (int64_t i = rows * n; i < rows_max * n; i++) touched += out[i] != 7;
    check_error(name, touched, 0);
}

template <typename F>
static void check_products(const MoeShape *s, const Routing *r, const Routing *on_gpu) {
    const double limit = sizeof(F) == 4 ? 1e-5 : 4e-3;
    const int64_t N = s->N, C = s->C, OC = 2 * s->F, R = N * s->k, rows = r->start[s->E], stride = OC * C + 8;
    const Groups g = {on_gpu->start, s->E, R};
    int *token = (int *)xmalloc((size_t)R * sizeof(int)), *ints = (int *)device_malloc(2 * R * (int64_t)sizeof(int));
    for (int64_t i = 0; i < rows; i++) token[i] = r->row_token[i] / s->k;
    find_share_rows(ints, ints + R, on_gpu, s);
    int *row_of = (int *)xmalloc((size_t)R * sizeof(int)), *device_token = (int *)xmalloc((size_t)R * sizeof(int));
    to_host(row_of, ints, R * (int64_t)sizeof(int));
    to_host(device_token, ints + R, R * (int64_t)sizeof(int));
    int64_t wrong = 0, dropped = 0;
    for (int64_t i = 0; i < rows; i++) wrong += row_of[r->row_token[i]] != i || device_token[i] != token[i];
    for (int64_t i = 0; i < R; i++) dropped += row_of[i] < 0;
    check_error("rows of shares", (double)(wrong + llabs(dropped - (R - rows))), 0);

    float *x = random_numbers<F>(R * C, 1, 11), *dy = random_numbers<F>(R * OC, 1, 12), *w = random_numbers<F>(s->E * stride, 0.3f, 13), *seven = host_numbers(R * max64(C, OC));
    float *dw = random_numbers<float>(s->E * stride, 1, 14);
    for (int64_t i = 0; i < R * max64(C, OC); i++) seven[i] = 7;
    F *gx = upload<F>(x, R * C), *gdy = upload<F>(dy, R * OC), *gw = upload<F>(w, s->E * stride);
    for (int listed = 0; listed < 2; listed++) {
        const int *list = listed ? token : NULL, *device_list = listed ? ints + R : NULL;
        F *out = upload<F>(seven, R * OC), *dx = upload<F>(seven, R * C);
        grouped_forward(out, gx, device_list, gw, stride, C, OC, &g);
        grouped_dinp(dx, gdy, device_list, gw, stride, C, OC, &g);
        float *h_out = download(out, R * OC), *h_dx = download(dx, R * C);
        float *want_out = rows_reference(x, list, w, stride, C, OC, 1, C, r, s), *want_dx = rows_reference(dy, list, w, stride, OC, C, C, 1, r, s);
        check_rows(listed ? "forward, listed" : "forward", h_out, want_out, rows, R, OC, limit);
        check_rows(listed ? "dinp, listed" : "dinp", h_dx, want_dx, rows, R, C, limit);
        void *all[] = {h_out, h_dx, want_out, want_dx}, *device[] = {out, dx};
        for (void *p : all) free(p);
        for (void *p : device) CUDA(cudaFree(p));
    }
    for (int listed = 0; listed < 4; listed++) {        // accumulates, and leaves what lies between two experts alone
        float *gdw = upload<float>(dw, s->E * stride), *want = host_numbers(s->E * stride);
        memcpy(want, dw, (size_t)(s->E * stride) * sizeof(float));
        grouped_dweight(gdw, stride, gdy, listed & 1 ? ints + R : NULL, gx, listed & 2 ? ints + R : NULL, C, OC, &g);
        add_dweight_reference(want, stride, dy, listed & 1 ? token : NULL, x, listed & 2 ? token : NULL, C, OC, r, s);
        float *got = download(gdw, s->E * stride);
        check_error("dweight", error_of(got, want, s->E * stride), 1e-5);
        double between = 0;
        for (int e = 0; e < s->E; e++) between = fmax(between, largest_difference(got + e * stride + OC * C, dw + e * stride + OC * C, 8));
        check_error("dweight, between experts", between, 0);
        free(got);
        free(want);
        CUDA(cudaFree(gdw));
    }
    void *all[] = {token, row_of, device_token, x, dy, w, seven, dw}, *device[] = {ints, gx, gdy, gw};
    for (void *p : all) free(p);
    for (void *p : device) CUDA(cudaFree(p));
}

// ----------------------------------------------------------------------------
// The mixture, forward and backward, against the CPU's

// What a mixture makes. The gradient of gate_up takes its place, and is not kept by the CPU: version 2's is checked against 1's.
enum { OUT, GATE_UP, DX, DEXPERTS, DWEIGHT, DGATE_UP, RESULTS };
static const char *result_names[RESULTS] = {"out", "gate_up", "dx", "dexperts", "dweight", "dgate_up"};

// A scratch of type Scratch, full of NaN.
template <typename Scratch, typename Carve>
static void *scratch_of_nan(Scratch *m, const MoeShape *s, Carve carve_all) {
    Carver memory = {NULL, 0};
    carve_all(m, s, &memory);
    const int64_t bytes = memory.used;
    memory = {(char *)device_malloc(bytes), 0};
    CUDA(cudaMemset(memory.memory, 0xff, (size_t)bytes));
    carve_all(m, s, &memory);
    return memory.memory;
}

template <typename F>
static void run_mixture(float *results[RESULTS], const int64_t sizes[RESULTS], const float *x, const float *experts, const float *dout, const Routing *r, const MoeShape *s, int version) {
    const int64_t most = max64(max64(sizes[DEXPERTS], sizes[DX]), sizes[DWEIGHT]);
    float *ones = host_numbers(most);
    for (int64_t i = 0; i < most; i++) ones[i] = 1;        // out, dx, dexperts are added to, dweight is not
    const F *gx = upload<F>(x, sizes[DX]), *gw = upload<F>(experts, sizes[DEXPERTS]), *gdout = upload<F>(dout, sizes[OUT]);
    F *out = upload<F>(ones, sizes[OUT]), *dx = upload<F>(ones, sizes[DX]), *gate_up = (F *)device_malloc(sizes[GATE_UP] * (int64_t)sizeof(F));
    float *dw = upload<float>(ones, sizes[DEXPERTS]), *dweight = upload<float>(ones, sizes[DWEIGHT]);
    ExpertScratch<F> one;
    MoeScratch<F> all;
    void *scratch = version == 1 ? scratch_of_nan(&one, s, carve_expert_scratch<F>) : scratch_of_nan(&all, s, carve_moe_scratch<F>);
    if (version == 1) gpu_moe_forward1(out, gate_up, gx, gw, r, s, &one);
    else gpu_moe_forward(out, gate_up, gx, gw, r, s, &all);
    results[GATE_UP] = download(gate_up, sizes[GATE_UP]);
    if (version == 1) gpu_moe_backward1(dx, dw, dweight, gdout, gate_up, gx, gw, r, s, &one);
    else gpu_moe_backward(dx, dw, dweight, gdout, gate_up, gx, gw, r, s, &all);
    results[OUT] = download(out, sizes[OUT]);
    results[DX] = download(dx, sizes[DX]);
    results[DEXPERTS] = download(dw, sizes[DEXPERTS]);
    results[DWEIGHT] = download(dweight, sizes[DWEIGHT]);
    results[DGATE_UP] = download(gate_up, sizes[DGATE_UP]);
    void *device[] = {(void *)gx, (void *)gw, (void *)gdout, out, dx, gate_up, dw, dweight, scratch};
    for (void *p : device) CUDA(cudaFree(p));
    free(ones);
}

static void free_results(float *results[RESULTS]) {
    for (int i = 0; i < RESULTS; i++) free(results[i]);
}

template <typename F>
static void check_mixture(const MoeShape *s, const Routing *r, const Routing *on_gpu) {
    const double limit = sizeof(F) == 4 ? 1e-5 : 1e-2;
    const int64_t N = s->N, C = s->C, weights = s->E * 3 * s->F * C, rows = r->start[s->E];
    const int64_t sizes[RESULTS] = {N * C, N * s->k * 2 * s->F, N * C, weights, N * s->k, N * s->k * 2 * s->F};
    float *x = random_numbers<F>(N * C, 1, 21), *experts = random_numbers<F>(weights, 0.3f, 22), *dout = random_numbers<F>(N * C, 1, 23);
    float *want[RESULTS], *got[RESULTS], *again[RESULTS], *dprobs = host_numbers(N * s->E), *scratch = host_numbers(moe_scratch(s));
    for (int i = 0; i < RESULTS; i++) want[i] = host_numbers(sizes[i]);
    for (int i : {OUT, DX, DEXPERTS})
        for (int64_t j = 0; j < sizes[i]; j++) want[i][j] = 1;
    moe_forward(want[OUT], want[GATE_UP], x, experts, r, s, scratch);
    moe_backward(want[DX], want[DEXPERTS], dprobs, dout, want[GATE_UP], x, experts, r, s, scratch);
    memcpy(want[DWEIGHT], scratch + N * (2 * C + 4 * s->F), (size_t)sizes[DWEIGHT] * sizeof(float));

    for (int version = 1; version <= 2; version++) {
        run_mixture<F>(got, sizes, x, experts, dout, on_gpu, s, version);
        run_mixture<F>(again, sizes, x, experts, dout, on_gpu, s, version);
        if (version == 1) memcpy(want[DGATE_UP], got[DGATE_UP], (size_t)sizes[DGATE_UP] * sizeof(float));
        for (int i = 0; i < RESULTS; i++) {
            const int64_t n = i == GATE_UP || i == DGATE_UP ? rows * 2 * s->F : sizes[i];
            char name[100];
            snprintf(name, sizeof name, "version %d, %s", version, result_names[i]);
            if (version == 2 || i != DGATE_UP) check_error(name, error_of(got[i], want[i], n), limit);
            snprintf(name, sizeof name, "version %d, %s, the same bits again", version, result_names[i]);
            check_error(name, memcmp(got[i], again[i], (size_t)n * sizeof(float)) != 0, 0);
        }
        free_results(again);
        free_results(got);
    }
    free_results(want);
    void *all[] = {x, experts, dout, dprobs, scratch};
    for (void *p : all) free(p);
}

typedef struct Case {
    const char *name;
    MoeShape shape;     // tokens, model width, expert's width, experts, of them each token's, capacity
    int skew;
} Case;

// The cases whose names hold `part`.
static int check_cases(const char *part) {
    const Case cases[] = {
        {"odd sizes", {37, 21, 11, 3, 2, 0}, NONE},
        {"one expert", {70, 24, 40, 1, 1, 0}, NONE},
        {"one token", {1, 8, 4, 8, 3, 0}, NONE},
        {"three of eight", {150, 40, 24, 8, 3, 0}, NONE},
        {"all to the last", {330, 24, 16, 8, 1, 0}, ALL_TO_LAST},
        {"all to the last, odd", {190, 9, 5, 8, 1, 0}, ALL_TO_LAST},
        {"half of them empty", {90, 136, 72, 8, 2, 0}, HALF_EMPTY},
        {"dropped shares", {130, 72, 100, 3, 2, 0.6}, NONE},
        {"dropped shares, odd", {130, 17, 33, 3, 3, 0.4}, NONE},
        {"wide", {33, 264, 8, 3, 1, 0}, NONE},
        {"exact tiles", {128, 128, 64, 1, 1, 0}, NONE},
        {"many experts", {50, 16, 8, 256, 3, 0}, NONE},
        {"many experts, few rows", {20, 8, 4, 70, 1, 0.1}, HALF_EMPTY},
    };
    for (const Case &c : cases) {
        if (!strstr(c.name, part)) continue;
        Routing r;
        routing_make(&r, &c.shape, c.skew);
        Routing on_gpu = routing_upload(&r, &c.shape);
        char name[100];
        for (int is_bf16 = 0; is_bf16 < 2; is_bf16++) {
            snprintf(name, sizeof name, "%s, %s", c.name, is_bf16 ? "bf16" : "f32");
            what = name;
            if (is_bf16) check_products<bf16>(&c.shape, &r, &on_gpu), check_mixture<bf16>(&c.shape, &r, &on_gpu);
            else check_products<float>(&c.shape, &r, &on_gpu), check_mixture<float>(&c.shape, &r, &on_gpu);
        }
        routing_free_device(&on_gpu);
        routing_free(&r);
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}

// ----------------------------------------------------------------------------
// Times

#ifdef CUDA_ON_CPU
static int bench(const MoeShape *) { die(2, "times are those of a GPU"); }
#else
enum { RUNS = 15 };
static const double FLOPS = 790e12, BYTES = 4.3e12;     // a second, of the GPU

static void report(const char *name, int version, double ms, double flop, double bytes) {
    const double floor_ms = 1e3 * fmax(flop / FLOPS, bytes / BYTES);
    printf("%-24s version %d  %9.3f ms  %7.1f TFLOP/s  floor %8.3f ms  %5.1f %% of it\n", name, version, ms, flop / ms * 1e-9, floor_ms, 100 * floor_ms / ms);
}

template <typename F>
__global__ void fill_kernel(F *x, int64_t n, float scale) {
    const int64_t i = global_thread();
    if (i < n) x[i] = (F)(scale * ((float)((uint32_t)i * 2654435761u >> 8) / 8388608 - 1));
}
template <typename F>
static F *filled(int64_t n, float scale) {
    F *x = (F *)device_malloc(n * (int64_t)sizeof(F));
    fill_kernel<<<grid(n, THREADS), THREADS>>>(x, n, scale);
    LAUNCHED();
    return x;
}

static int bench(const MoeShape *s) {
    Routing r;
    routing_make(&r, s, NONE);
    Routing on_gpu = routing_upload(&r, s);
    const int64_t N = s->N, C = s->C, OC = 2 * s->F, R = N * s->k, stride = 3 * s->F * C, weights = s->E * stride;
    const Groups g = expert_groups(&on_gpu, s);
    bf16 *out = filled<bf16>(R * OC, 1), *rows = filled<bf16>(R * C, 1), *dx = filled<bf16>(N * C, 1), *y = filled<bf16>(N * C, 1);
    const bf16 *x = filled<bf16>(N * C, 1), *w = filled<bf16>(weights, 0.05f);
    float *dw = filled<float>(weights, 0), *dweight = filled<float>(R, 0);
    ExpertScratch<bf16> one;
    MoeScratch<bf16> all;
    void *scratch1 = scratch_of_nan(&one, s, carve_expert_scratch<bf16>), *scratch2 = scratch_of_nan(&all, s, carve_moe_scratch<bf16>);
    find_share_rows(all.row_of, all.token, &on_gpu, s);
    const int *token = all.token;
    const auto gather = [&](int64_t from, int64_t n) { gather_rows(rows + from * C, x, on_gpu.row_token + from, n, C, s->k); };
    printf("%s: N %" PRId64 ", C %" PRId64 ", F %" PRId64 ", E %d, k %d, bf16\n", gpu.name, N, C, s->F, s->E, s->k);
    const double flop = 2.0 * (double)R * (double)C * (double)OC, w_bytes = 2.0 * (double)(s->E * OC * C), out_bytes = 2.0 * (double)(R * OC), bytes = w_bytes + out_bytes + 2.0 * (double)(N * C);
    report("gate_up", 1, median_ms(RUNS, [&] { each_expert(&on_gpu, s, [&](int e, int64_t from, int64_t n) { gather(from, n); gemm(n, OC, C, rows + from * C, C, 0, w + e * stride, C, 1, out + from * OC, OC, 0); }); }), flop, bytes);
    report("gate_up", 2, median_ms(RUNS, [&] { grouped_forward(out, x, token, w, stride, C, OC, &g); }), flop, bytes);
    report("dinp of gate_up", 1, median_ms(RUNS, [&] { each_expert(&on_gpu, s, [&](int e, int64_t from, int64_t n) { gemm(n, C, OC, out + from * OC, OC, 0, w + e * stride, C, 0, rows + from * C, C, 0); }); }), flop, w_bytes + out_bytes + 2.0 * (double)(R * C));
    report("dinp of gate_up", 2, median_ms(RUNS, [&] { grouped_dinp(rows, out, NULL, w, stride, C, OC, &g); }), flop, w_bytes + out_bytes + 2.0 * (double)(R * C));
    report("dweight of gate_up", 1, median_ms(RUNS, [&] { each_expert(&on_gpu, s, [&](int e, int64_t from, int64_t n) { gather(from, n); gemm(OC, C, n, out + from * OC, OC, 1, rows + from * C, C, 0, dw + e * stride, C, 1); }); }), flop, bytes + 3 * w_bytes);
    report("dweight of gate_up", 2, median_ms(RUNS, [&] { grouped_dweight(dw, stride, out, NULL, x, token, C, OC, &g); }), flop, bytes + 3 * w_bytes);
    // What must be moved: the weights and gate_up, the tokens' rows; backward also reads and writes the gradients of the weights.
    // It takes gate_up's place: it is timed with a forward before it.
    const double small = 2.0 * 3 * (double)(N * C), moved = 1.5 * w_bytes + out_bytes + small;
    const auto forward = [&](int version) {
        if (version == 1) gpu_moe_forward1(y, out, x, w, &on_gpu, s, &one);
        else gpu_moe_forward(y, out, x, w, &on_gpu, s, &all);
    };
    for (int version = 1; version <= 2; version++) report("mixture, forward", version, median_ms(RUNS, [&] { forward(version); }), 1.5 * flop, moved);
    for (int version = 1; version <= 2; version++)
        report("mixture, both ways", version, median_ms(RUNS, [&] {
            forward(version);
            if (version == 1) gpu_moe_backward1(dx, dw, dweight, x, out, x, w, &on_gpu, s, &one);
            else gpu_moe_backward(dx, dw, dweight, x, out, x, w, &on_gpu, s, &all);
        }), 4.5 * flop, 2 * moved + 6 * w_bytes + small);
    void *device[] = {(void *)x, (void *)w, out, rows, dx, y, dw, dweight, scratch1, scratch2};
    for (void *p : device) CUDA(cudaFree(p));
    routing_free_device(&on_gpu);
    routing_free(&r);
    return 0;
}
#endif

int main(int argc, char **argv) {
    device_open();
    if (argc == 1 || !strcmp(argv[1], "check")) return check_cases(argc > 2 ? argv[2] : "");
    if (strcmp(argv[1], "bench") || (argc != 2 && argc != 7)) die(2, "%s [check [part of a case's name] | bench [N C F E k]]", argv[0]);
    if (argc == 7) {
        const MoeShape s = {atoll(argv[2]), atoll(argv[3]), atoll(argv[4]), atoi(argv[5]), atoi(argv[6]), 0, 1};
        return bench(&s);
    }
    const MoeShape shapes[] = {{16384, 768, 512, 16, 4, 0}, {16384, 2048, 1408, 64, 6, 0}, {32768, 1024, 256, 128, 8, 0}};
    for (const MoeShape &s : shapes) bench(&s);
    return 0;
}
