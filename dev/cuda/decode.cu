/*
Attention of one token that is decoded: dense, over all keys, and NSA's, over its three branches, with the choice and the sum.

    version 1   f32 and any shape: attend_kernel, select_kernel, merge_kernel
    version 2   bf16 on tensor cores: fast_attend_kernel, then dense merge_kernel, NSA fast_selected_kernel, by teams of blocks of threads

The kernels are those of sample.c, and so is what launches them.

    make build/decode && build/decode                   both against plain loops on the CPU, on small and odd shapes
    build/decode bench 65536 1 64 4 128 [version]       times on this GPU: tokens in the caches, texts, heads, KV heads, D (192: D of v is 128)
    make build/decode NVCC_FLAGS="-O3 -DPHASES"         with bench, also where version 2's time for sparse attention goes
    make build/decode_emulated && build/decode_emulated     the check without a GPU

SPDX-License-Identifier: MIT
*/

#define NSA_CU
#define SAMPLE_NO_MAIN
#include "../../sample.c"
#include "bench.h"
#include "test/check.h"

// A model of one layer, and a decoder with room for T tokens.
static void open_decoder(Decoder *d, Model *m, int version, int64_t T, int rows, const char *options) {
    char words[512], *argv[64] = {NULL}, err[ERR_LEN];
    int argc = 1;
    Options o = options_default();
    Config c;
    const double gate_init[BRANCHES] = {-2, -2, 2};
    snprintf(words, sizeof words, "--layers 1 --width 32 --ffn-width 8 --vocab 16 --dtype %s %s", version == 1 ? "f32" : "bf16", options);
    for (char *word = strtok(words, " "); word; word = strtok(NULL, " ")) argv[argc++] = word;
    options_parse(train_options, TRAIN_OPTIONS, &o, o.given, argc, argv);
    config_from_options(&c, &o, NULL);
    if (config_validate(&c, err) < 0) die(2, "%s", err);
    model_create(m, &c);
    model_init(m, 1, gate_init);
    decoder_create(d, m, rows);
    decoder_reserve(d, T);
}

static void close_decoder(Decoder *d, Model *m) {
    decoder_free(d);
    model_free(m);
}

// Token t is the one to come.
static void set_position(Decoder *d, int64_t t) {
    int *tokens = (int *)xcalloc((size_t)d->rows, sizeof(int));
    d->length = t;
    plan_token(d, tokens);
    free(tokens);
    to_device(d->work->device_input, d->work->input, (int64_t)input_bytes(d));
}

// ----------------------------------------------------------------------------
// Check. q, keys and values are numbers that bf16 holds exactly. Version 2 then errs by the softmax's weights, which it rounds to 8 bits
// before they meet the values: 2^-9 at most and 1.1e-3 in norm.

static const double F32_ERROR = 1e-4, BF16_ERROR = 5e-3;

typedef struct Case { int rows, T; const char *options; } Case;

static const Case cases[] = {
    {1, 1, "--heads 2 --kv-heads 1 --head-dim 64 --attention full"},
    {2, 37, "--heads 6 --kv-heads 2 --head-dim 64 --attention full"},
    {1, 1500, "--heads 16 --kv-heads 1 --head-dim 64 --attention full"},
    {1, 900, "--heads 17 --kv-heads 1 --head-dim 128 --attention full"},
    {1, 300, "--heads 4 --kv-heads 2 --head-dim 192 --v-head-dim 128 --attention full"},
    {1, 150, "--heads 3 --kv-heads 1 --head-dim 24 --attention full"},
    {1, 5, "--heads 2 --kv-heads 1 --head-dim 64 --preset paper"},              // no compressed block yet
    {1, 700, "--heads 16 --kv-heads 1 --head-dim 64 --preset paper"},           // all blocks
    {1, 1700, "--heads 16 --kv-heads 1 --head-dim 64 --preset paper"},
    {1, 2011, "--heads 32 --kv-heads 2 --head-dim 128 --preset paper"},
    {2, 600, "--heads 20 --kv-heads 1 --head-dim 64 --preset short"},
    {1, 1300, "--heads 2 --kv-heads 1 --head-dim 64 --preset medium --window 1000"},
    {1, 500, "--heads 4 --kv-heads 2 --head-dim 192 --v-head-dim 128 --cmp-block 8 --cmp-stride 4 --sel-block 12 --sel-blocks 9 --window 1"},
    {1, 400, "--heads 4 --kv-heads 1 --head-dim 64 --cmp-block 4 --cmp-stride 2 --sel-block 4 --sel-blocks 60 --window 50"},
    {1, 400, "--heads 4 --kv-heads 1 --head-dim 64 --cmp-block 4 --cmp-stride 2 --sel-block 4 --sel-blocks 80 --window 50"},     // too many for version 2
    {3, 400, "--heads 4 --kv-heads 2 --head-dim 24 --v-head-dim 7 --cmp-block 4 --cmp-stride 2 --sel-block 8 --sel-blocks 6 --window 50"},
    {3, 1700, "--heads 10 --kv-heads 2 --head-dim 128 --preset paper --sel-blocks 8"},
    {1, 2011, "--heads 16 --kv-heads 1 --head-dim 64 --cmp-block 2 --cmp-stride 1 --sel-block 2 --sel-blocks 40"},      // more candidates than threads
    {1, 140003, "--heads 2 --kv-heads 1 --head-dim 64 --cmp-block 2 --cmp-stride 1 --sel-block 2 --sel-blocks 40 --window 50"},     // that must be weighed in parts, and first thinned out
    {1, 300, "--heads 4 --kv-heads 2 --head-dim 64 --cmp-block 4 --cmp-stride 2 --sel-block 8 --sel-blocks 3 --window 50"},      // forced blocks only
    {1, 2900, "--heads 16 --kv-heads 1 --head-dim 128 --preset paper --sel-blocks 40"},     // more than a team reads in a round of half tiles
    {1, 2011, "--heads 4 --kv-heads 2 --head-dim 192 --v-head-dim 128 --preset paper"},
};

static float *normals(int64_t n) {
    static uint64_t stream = 1;
    float *x = (float *)xmalloc((size_t)n * sizeof(float) + 1);
    stream++;
    for (int64_t i = 0; i < n; i++) x[i] = bf16_to_float(float_to_bf16((float)normal_at(7, stream, (uint64_t)i)));
    return x;
}

// n numbers of f32 as what the decoder keeps.
static void upload(const Decoder *d, void *to, const float *x, int64_t n) {
    if (cache_number(&d->model->config) == 4) {
        to_device(to, x, n * 4);
        return;
    }
    uint16_t *bits = (uint16_t *)xmalloc((size_t)n * 2 + 1);
    for (int64_t i = 0; i < n; i++) bits[i] = float_to_bf16(x[i]);
    to_device(to, bits, n * 2);
    free(bits);
}

// out (Dv) += gate · attention of q (D) to the keys [0, end) of the blocks idx (n); p: their weights, key after key.
static void plain_attention(double *out, double gate, float *p, const float *q, const float *k, const float *v, const int *idx, int n, int64_t block, int64_t end, int D, int Dv) {
    double top = -INFINITY, sum = 0;
    for (int pass = 0; pass < 3; pass++) {
        int64_t count = 0;
        for (int i = 0; i < n && idx[i] >= 0; i++)
            for (int64_t key = idx[i] * block; key < min64((idx[i] + 1) * block, end); key++, count++) {
                double score = 0;
                for (int c = 0; c < D; c++) score += (double)q[c] * (double)k[key * D + c];
                score /= sqrt((double)D);
                if (pass == 0) top = fmax(top, score);
                if (pass == 1) sum += exp(score - top);
                if (pass < 2) continue;
                p[count] = (float)(exp(score - top) / sum);
                for (int c = 0; c < Dv; c++) out[c] += gate * exp(score - top) / sum * (double)v[key * Dv + c];
            }
    }
}

// The relative error of what the GPU makes of token T-1, in norm.
static void check_case(const Case *x, int version) {
    Decoder d;
    Model m;
    open_decoder(&d, &m, version, x->T, x->rows, x->options);
    const Config *c = &m.config;
    const int rows = x->rows, H = c->num_attention_heads, KV = c->num_key_value_heads, G = H / KV, D = c->head_dim, Dv = c->v_head_dim, branches = cache_branches(c, 0);
    const int64_t t = x->T - 1, row_size = wide_row(c, 0).size, heads = rows * H;
    const SelectShape sel = select_shape(c);
    float *q = normals(rows * row_size), *gates = normals(heads * BRANCHES), *k[BRANCHES], *v[BRANCHES];
    int64_t slots[BRANCHES];
    for (int b = 0; b < branches; b++) {
        KeyCache *cache = &d.layers[0].branch[b];
        slots[b] = cache->slots;
        k[b] = normals(rows * KV * slots[b] * D);
        v[b] = normals(rows * KV * slots[b] * Dv);
        upload(&d, cache->k, k[b], rows * KV * slots[b] * D);
        upload(&d, cache->v, v[b], rows * KV * slots[b] * Dv);
    }
    set_position(&d, t);
    to_device(d.work->wide, q, rows * row_size * 4);
    for (int r = 0; r < rows && d.work->fast; r++) upload(&d, d.work->queries + r * H * D, q + r * row_size, H * D);
    to_device(d.work->gates, gates, heads * BRANCHES * 4);
    if (version == 1) decode_branches<float>(&d, 0, 0);
    else decode_branches<bf16>(&d, 0, 0);
    CUDA(cudaStreamSynchronize(d.work->stream));
    float *got = (float *)xmalloc((size_t)(heads * Dv) * sizeof(float));
    to_host(got, d.work->attention, heads * Dv * 4);

    double difference = 0, norm = 0, *out = (double *)xmalloc((size_t)Dv * sizeof(double));
    const int64_t visible = branches > 1 ? compressed_seen(t, sel.cmp_block, sel.cmp_stride) : 0, blocks = t / sel.sel_block + 1;
    float *p = (float *)xmalloc((size_t)(G + 1) * (size_t)x->T * sizeof(float)), *importance = (float *)xmalloc((size_t)blocks * sizeof(float));
    int *idx = (int *)xmalloc((size_t)max64(sel.n, 1) * sizeof(int));
    const int whole = 0;
    for (int64_t list = 0; list < rows * KV; list++) {
        const float *queries = q + list / KV * row_size + list % KV * G * D;
        const int64_t first = list * G;         // head
        double *outs = (double *)xcalloc((size_t)(G * Dv), sizeof(double));
        for (int b = 0; b < branches; b++) {
            const float *keys = k[b] + list * slots[b] * D, *values = v[b] + list * slots[b] * Dv;
            const int64_t all = branches > 1 && b == CMP ? visible : min64(t + 1, slots[b]);
            const int chosen = branches > 1 && b == SLC;
            if (chosen) {
                for (int64_t i = 0; i < visible; i++)
                    for (int g = 1; g < G; g++) p[i] += p[g * x->T + i];
                block_importance(importance, p, blocks, visible, &sel);
                choose_blocks(idx, importance, blocks, &sel);
            }
            for (int g = 0; g < G; g++)
                plain_attention(outs + g * Dv, branches > 1 ? (double)gates[(first + g) * BRANCHES + b] : 1, p + (chosen ? 0 : g) * x->T, queries + g * D, keys, values,
                                chosen ? idx : &whole, chosen ? sel.n : 1, chosen ? sel.sel_block : max64(all, 1), all, D, Dv);
        }
        for (int64_t i = 0; i < G * Dv; i++) {
            const double e = (double)got[first * Dv + i] - outs[i];
            difference += e * e;
            norm += outs[i] * outs[i];
        }
        free(outs);
    }
    const double error = sqrt(difference / norm);
    printf("version %d%s, %d x %4d, %s: error %.1e, %d shares, teams of %d\n", version, version == 2 && !d.work->fast ? " (simple)" : "", rows, x->T, x->options, error,
           d.work->splits, d.work->plan.team);
    check(error < (d.work->fast ? BF16_ERROR : F32_ERROR), "version %d, %d x %d, %s: error %.2e", version, rows, x->T, x->options, error);
    float *all[] = {q, gates, got, p, importance, (float *)out, (float *)idx};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    for (int b = 0; b < branches; b++) free(k[b]), free(v[b]);
    close_decoder(&d, &m);
}

// ----------------------------------------------------------------------------
// Bench. As many caches as it takes for none of them to be left in the L2 cache when its turn comes again, as in a model of many layers.

enum { VISITS = 32, RUNS = 21 };
static const double COLD_BYTES = 256e6, MOST_BYTES = 30e9;

// Bytes a second that a copy reads and writes.
static double copy_rate(void) {
    const int64_t bytes = (int64_t)1 << 30;
    void *from = device_malloc(bytes), *to = device_malloc(bytes);
    const double ms = median_ms(RUNS, [&] { CUDA(cudaMemcpyAsync(to, from, (size_t)bytes, cudaMemcpyDeviceToDevice, 0)); });
    CUDA(cudaFree(from));
    CUDA(cudaFree(to));
    return 2 * (double)bytes / ms * 1e3;
}

// The phases of the last launch of a graph, of so many runs: noted between them.
#ifdef PHASES
static float phase_us[PHASES_IN_ALL][RUNS];
static void note_phases(void) {
    static int run;
    long long clock[PHASES_IN_ALL];
    CUDA(cudaMemcpyFromSymbol(clock, phase_clock, sizeof clock));
    for (int i = 1; i < PHASES_IN_ALL; i++) phase_us[i][run % RUNS] = (float)(clock[i] - clock[i - 1]) * 1e-3f;
    run++;
}
static void print_phases(void) {
    for (int i = 1; i < PHASES_IN_ALL; i++) {
        qsort(phase_us[i], RUNS, sizeof *phase_us[i], ascending);
        printf("      %-32s %7.2f us\n", phase_names[i], (double)phase_us[i][RUNS / 2]);
    }
}
#else
static void note_phases(void) {}
static void print_phases(void) {}
#endif

// Microseconds of work(0), work(1), ... in one graph, each: work(i) launches for cache i.
template <typename F, typename Work>
static double graph_us(Decoder *d, const LayerCache *caches, int count, Work work) {
    Working *w = d->work;
    const Config *c = &d->model->config;
    const LayerCache own = d->layers[0];
    const int visits = count > VISITS ? count : VISITS;
    cudaGraphExec_t graph = record(w->stream, [&] {
        begin_kernel<F><<<(unsigned)d->rows, THREADS, 0, w->stream>>>(w->x, w->angles, w->device_input, matrix<F>(d->model->twin, d->model->twin->embed), c->hidden_size, w->frequency, c->head_dim / 2, c->cmp_block);
        LAUNCHED();
        for (int i = 0; i < visits; i++) {
            d->layers[0] = caches[i % count];
            work();
        }
    });
    d->layers[0] = own;
    const double ms = median_ms(RUNS, note_phases, [&] { CUDA(cudaGraphLaunch(graph, w->stream)); });
    CUDA(cudaGraphExecDestroy(graph));
    return ms * 1e3 / visits;
}

static void report(const char *what, double us, double bytes, double rate) {
    printf("    %-26s %9.2f us", what, us);
    if (bytes > 0) printf("  %9.2f MB  %7.0f GB/s  floor %8.2f us, %5.1f%%", bytes * 1e-6, bytes / us * 1e-3, bytes / rate * 1e6, bytes / rate * 1e8 / us);
    printf("\n");
}

// Times version 1 (F = float) or 2 (bf16) of a kind of attention; returns the microseconds of a token, on average over a stride.
template <typename F>
static double bench_kind(int version, const char *kind, int64_t T, int rows, int H, int KV, int D, double rate, double *bytes) {
    char options[256];
    Decoder d;
    Model m;
    snprintf(options, sizeof options, "--heads %d --kv-heads %d --head-dim %d --v-head-dim %d %s", H, KV, D, D == 192 ? 128 : D, kind);
    open_decoder(&d, &m, version, T, rows, options);
    const Config *c = &m.config;
    const int branches = cache_branches(c, 0), nsa = branches > 1;
    const double token = (double)(rows * KV) * (c->head_dim + c->v_head_dim) * sizeof(F);      // of one key and value for each text and KV head
    int64_t kept[CACHE_KINDS], held = 0;
    cache_bytes(kept, c, rows, d.capacity);
    for (int i = 0; i < CACHE_KINDS; i++) held += kept[i];

    int64_t ordinary = T - 1, completing = T - 1;
    while (nsa && completing > c->cmp_block && !completes_block(c, completing)) completing--;
    while (nsa && ordinary > c->cmp_block && completes_block(c, ordinary)) ordinary--;
    set_position(&d, ordinary);
    const Reading *of = d.work->input->of;
    const double first = nsa ? of[CMP].keys + of[WIN].keys : of[CACHE_FULL].keys, second = nsa ? of[SLC].keys : 0;
    *bytes = token * (first + second);
    const int count = (int)fmax(1, fmin(ceil(COLD_BYTES / *bytes), floor(MOST_BYTES / (double)held)));
    LayerCache *caches = (LayerCache *)xcalloc((size_t)count, sizeof(LayerCache));
    for (int i = 0; i < count; i++) {
        for (int b = 0; b < branches; b++) {
            KeyCache *cache = &caches[i].branch[b];
            cache->slots = d.layers[0].branch[b].slots;
            const int64_t keys = (int64_t)rows * KV * cache->slots;
            cache->k = device_malloc(keys * c->head_dim * (int64_t)sizeof(F));
            cache->v = device_malloc(keys * c->v_head_dim * (int64_t)sizeof(F));
            fill_normal((F *)cache->k, keys * c->head_dim, (uint32_t)(6 * i + 2 * b));
            fill_normal((F *)cache->v, keys * c->v_head_dim, (uint32_t)(6 * i + 2 * b + 1));
        }
        for (int v = 0; v < 2; v++) caches[i].tail[v] = d.layers[0].tail[v];
    }
    fill_normal(d.work->wide, rows * wide_row(c, 0).size, 1u << 20);
    if (d.work->fast) fill_normal(d.work->queries, (int64_t)rows * H * D, 1u << 22);
    fill_normal(d.work->gates, (int64_t)rows * H * BRANCHES, 1u << 21);

    printf("version %d, %s: %s tier, %d shares, teams of %d, %d caches of %s\n", version, nsa ? "NSA" : "dense", d.work->fast ? "fast" : "simple", d.work->splits, d.work->plan.team, count, human_bytes((double)held));
    const auto time = [&](int completes) { return graph_us<F>(&d, caches, count, [&] { decode_branches<F>(&d, 0, completes); }); };
    double us = time(0);
    report(nsa ? "a token" : "a token, dense", us, *bytes, rate);
    if (nsa && d.work->fast) print_phases();
    if (nsa) {
        const auto part = [&](int list, int other) { return graph_us<F>(&d, caches, count, [&] { launch_attend<F>(d.work, attend_call(&d, 0), list, other); }); };
        if (!d.work->fast) {
            report("  compressed and window", part(CMP, WIN), token * first, rate);
            report("  choice", graph_us<F>(&d, caches, count, [&] { launch_choice(&d, 0); }), 0, rate);
            report("  selected", part(SLC, NO_LIST), token * second, rate);
        }
        set_position(&d, completing);
        report("  compression", graph_us<F>(&d, caches, count, [&] { compress_step<F>(&d, 0); }), 0, rate);
        const double whole = time(1), average = us + (whole - us) / c->cmp_stride;
        report("one that completes a block", whole, *bytes, rate);
        report("on average", us = average, *bytes, rate);
    }
    if (!nsa || !d.work->fast) report("  merge", graph_us<F>(&d, caches, count, [&] { launch_merge(&d, 0); }), 0, rate);
    for (int i = 0; i < count; i++)
        for (int b = 0; b < branches; b++) CUDA(cudaFree(caches[i].branch[b].k)), CUDA(cudaFree(caches[i].branch[b].v));
    free(caches);
    close_decoder(&d, &m);
    return us;
}

static int bench(int64_t T, int rows, int H, int KV, int D, int only) {
    const char *kinds[] = {"--attention full", "--preset paper"};
    const double rate = copy_rate();
    printf("%s: %" PRId64 " tokens in the caches, batch %d, H=%d KV=%d D=%d, preset paper. A copy reads and writes %.0f GB/s: the floor. Bytes are of keys and values\n",
           gpu.name, T, rows, H, KV, D, rate * 1e-9);
    for (int version = 1; version <= 2; version++) {
        double us[2], bytes[2];
        if (only && only != version) continue;
        for (int i = 0; i < 2; i++)
            us[i] = version == 1 ? bench_kind<float>(version, kinds[i], T, rows, H, KV, D, rate, &bytes[i]) : bench_kind<bf16>(version, kinds[i], T, rows, H, KV, D, rate, &bytes[i]);
        printf("version %d: dense / NSA = %.2f in time, %.2f in bytes\n", version, us[0] / us[1], bytes[0] / bytes[1]);
    }
    return 0;
}

int main(int argc, char **argv) {
    program_name = "decode";
    setvbuf(stdout, NULL, _IOLBF, 0);
    device_open();
    if (argc == 1 || (argc == 2 && !strcmp(argv[1], "check"))) {
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
            for (int version = 1; version <= 2; version++) check_case(&cases[i], version);
        printf("%d passed, %d failed\n", passed, failed);
        return failed > 0;
    }
    if ((argc != 7 && argc != 8) || strcmp(argv[1], "bench")) die(2, "usage: %s [check] | %s bench T batch H KV D [version]", argv[0], argv[0]);
    return bench(atoll(argv[2]), atoi(argv[3]), atoi(argv[4]), atoi(argv[5]), atoi(argv[6]), argc == 8 ? atoi(argv[7]) : 0);
}
