// Tests of the layers and the model, each against something independent: finite differences, the fixtures that
// dev/reference.py wrote, plain loops, or a closed form. Run from the root of the repository:
//     make build/test_nsa build/test_nsa_double && build/test_nsa && build/test_nsa_double
// The double build is the sharp one: finite differences run only there.

#define NSA_NO_MAIN
#include "../train_nsa.c"
#include "test/check.h"
#include "test/fixtures.h"

static const int sharp = sizeof(real) == sizeof(double);

// ----------------------------------------------------------------------------
// Helpers

// Memory of a test, released all at once.
static void *lent[1024];
static int lent_count = 0;

static void *lend(int64_t bytes) {
    if (lent_count == (int)(sizeof lent / sizeof *lent)) die(1, "too many arrays in one test");
    return lent[lent_count++] = xcalloc(1, (size_t)max64(bytes, 1));
}
static real *zeros(int64_t n) { return (real *)lend(n * (int64_t)sizeof(real)); }
static double *doubles(int64_t n) { return (double *)lend(n * (int64_t)sizeof(double)); }
static int *ints(int64_t n) { return (int *)lend(n * (int64_t)sizeof(int)); }
static void release(void) {
    while (lent_count > 0) free(lent[--lent_count]);
}

static Rng rng = {2025, 1, 0};
static int below(int n) { return (int)rng_below(&rng, (uint64_t)n); }
static real uniform(void) { return (real)(2 * rng_uniform(&rng) - 1); }
static real *fill(real *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] = uniform();
    return x;
}
static real *randoms(int64_t n) { return fill(zeros(n), n); }
static real *copy(const real *x, int64_t n) {
    real *y = zeros(n);
    memcpy(y, x, (size_t)n * sizeof(real));
    return y;
}

// |a - b| / (|b| + tiny), norms. NaN is not small, and neither is it equal.
static double error_of(const real *a, const double *b, int64_t n, double tiny) {
    double diff = 0, norm = 0;
    for (int64_t i = 0; i < n; i++) {
        diff += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        norm += b[i] * b[i];
    }
    const double e = sqrt(diff) / (sqrt(norm) + tiny);
    return diff == 0 ? 0 : e == e ? e : INFINITY;
}
static double difference(const real *a, const real *b, int64_t n) {
    double diff = 0, norm = 0;
    for (int64_t i = 0; i < n; i++) {
        diff += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        norm += (double)b[i] * (double)b[i];
    }
    const double e = sqrt(diff) / (sqrt(norm) + 1e-30);
    return diff == 0 ? 0 : e == e ? e : INFINITY;
}
static int all_finite(const real *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) if (!isfinite((double)x[i])) return 0;
    return 1;
}
static double inner(const real *a, const real *b, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)a[i] * (double)b[i];
    return sum;
}

static void set_threads(int n) {
    (void)n;
#ifdef _OPENMP
    omp_set_num_threads(n);
#endif
}

// The worst error of each section, printed at its end.
static double worst = 0;
static void within(double error, double in_double, double in_float, const char *what) {
    const double limit = sharp ? in_double : in_float;
    if (!(error <= worst)) worst = error;
    check(error <= limit, "%s: error %.2e over %.0e", what, error, limit);
}

// ----------------------------------------------------------------------------
// Models

// Small, with every size different from every other.
static Config tiny(void) {
    Config c = config_default();
    c.vocab_size = 19;
    c.hidden_size = 12;
    c.intermediate_size = 20;
    c.num_hidden_layers = 2;
    c.num_attention_heads = 4;
    c.num_key_value_heads = 2;
    c.head_dim = 6;
    c.v_head_dim = 5;
    c.cmp_block = 8;
    c.cmp_stride = 4;
    c.sel_block = 8;
    c.sel_blocks = 3;
    c.sel_init_blocks = 1;
    c.sel_local_blocks = 1;
    c.window = 7;
    c.moe_intermediate_size = 7;
    c.num_experts_per_tok = 2;
    return c;
}

static Config tiny_moe(int experts, int shared, int k, double capacity) {
    Config c = tiny();
    c.num_experts = experts;
    c.num_shared_experts = shared;
    c.num_experts_per_tok = k;
    c.capacity_factor = capacity;
    return c;
}

// Everything that model_alloc gave becomes NaN: whatever is read before it is written shows.
static void poison(Model *m) {
    LayerActs *acts = (LayerActs *)xcalloc((size_t)m->config.num_hidden_layers, sizeof(LayerActs));
    Scratch scratch;
    const int64_t n = round_up((int64_t)m->B * m->T, 16) + carve_acts(acts, &m->config, m->B, m->T, m->recompute, m->train, NULL) +
                      carve_scratch(&scratch, &m->config, m->B, m->T, m->train, NULL);
    memset(m->final_rstd, 0xff, (size_t)n * sizeof(real));
    free(acts);
}

// Weights far enough from the init that everything matters: gates open, attention uneven, biases and norms not trivial.
static void make_model(Model *m, const Config *c, int64_t B, int64_t T, int recompute, int train) {
    const double gate_init[BRANCHES] = {-0.5, 0.5, 1};
    model_create(m, c);
    model_init(m, 3, gate_init);
    for (int64_t i = 0; i < m->num_elements; i++) m->weights[i] += (real)0.15 * normal_at(9, 77, (uint64_t)i);
    model_alloc(m, B, T, recompute, train);
    poison(m);
}

static const int *random_tokens(int64_t n, int vocab) {
    int *t = ints(n);
    for (int64_t i = 0; i < n; i++) t[i] = below(vocab);
    return t;
}

static StepInfo plain_step(void) {
    const StepInfo info = {0, 1, 1, 0, 1.0, 1};
    return info;
}

// ----------------------------------------------------------------------------
// 1. The fixtures of the PyTorch oracle

// Logits of what the last forward left in the residual stream.
static const real *logits_of_step(Model *m, int64_t N) {
    const int64_t C = m->config.hidden_size, V = m->config.vocab_size;
    real *logits = zeros(N * V), *norm = zeros(N * C), *rstd = zeros(N);
    rmsnorm_forward(norm, rstd, m->acts[m->config.num_hidden_layers - 1].out, m->norm, N, C, m->config.rms_norm_eps);
    linear_forward(logits, V, norm, C, m->head, N, C, V);
    return logits;
}

static void test_fixture(const Fixture *f) {
    const Config c = f->config;
    const int64_t B = f->B, T = f->T, V = c.vocab_size;
    const char *name = f->name;
    Model m;
    model_create(&m, &c);
    real *expected = zeros(m.num_elements), *logits_wanted = zeros(B * T * V), *eval_logits_wanted = zeros(B * T * V);
    fixture_params(f, &m, "param", m.weights);
    fixture_params(f, &m, "grad", expected);
    fixture_logits(f, "logits", logits_wanted);
    fixture_logits(f, f->in_training ? "eval_logits" : "logits", eval_logits_wanted);
    const double all = sqrt(inner(expected, expected, m.num_elements));
    double *exact = doubles(m.num_elements);
    for (int64_t i = 0; i < m.num_elements; i++) exact[i] = (double)expected[i];
    const StepInfo info = plain_step();

    for (int recompute = 0; recompute <= 2; recompute++) {
        char *what = format("%s, recompute %d", name, recompute);
        model_alloc(&m, B, T, recompute, 1);
        poison(&m);
        model_zero_grads(&m);
        const double loss = model_forward_backward(&m, f->tokens, f->targets, B, T, &info), wanted = fixture_number(f, "loss");
        const double z = fixture_number(f, "moe_z"), balance = fixture_number(f, "moe_balance");
        within(fabs(loss - wanted) / fabs(wanted), 1e-9, 1e-5, what);
        within(fabs(m.moe_z - z) / (fabs(z) + 1e-6), 1e-9, 1e-5, what);
        within(fabs(m.moe_balance - balance) / (fabs(balance) + 1e-6), 1e-9, 1e-5, what);
        within(difference(logits_of_step(&m, B * T), logits_wanted, B * T * V), 1e-9, 1e-5, what);
        for (int i = 0; i < m.num_params; i++) {
            const Param *p = &m.params[i];
            const double e = error_of(m.grads + p->offset, exact + p->offset, p->count, 1e-6 * all);
            if (!(e <= worst)) worst = e;
            check(e <= (sharp ? 1e-9 : 1e-5), "%s: gradient of %s, error %.2e", what, p->name, e);
        }
        free(what);
        // evaluation has no capacity, and shares its memory between the layers
        if (recompute == 2) model_alloc(&m, B, T, 0, 0), poison(&m);
        const double eval = model_evaluate(&m, f->tokens, f->targets, B, T), eval_wanted = f->in_training ? fixture_number(f, "eval_loss") : wanted;
        within(fabs(eval - eval_wanted) / fabs(eval_wanted), 1e-9, 1e-5, name);
        real *logits = zeros(B * T * V), *last = zeros(B * V);
        model_logits(&m, f->tokens, B, T, logits, 0);
        within(difference(logits, eval_logits_wanted, B * T * V), 1e-9, 1e-5, name);
        model_logits(&m, f->tokens, B, T, last, 1);
        for (int64_t b = 0; b < B; b++) within(difference(last + b * V, eval_logits_wanted + (b * T + T - 1) * V, V), 1e-9, 1e-5, name);
        for (int l = 0; l < c.num_hidden_layers && recompute == 0; l++) {
            if (layer_is_full(&c, l)) continue;
            const int64_t n = B * T * c.num_key_value_heads * c.sel_blocks;
            char *key = format("block_idx.%d", l);
            const StTensor *idx = safetensors_find(&f->st, key);
            check(idx && idx->dtype == ST_I32 && idx->end - idx->begin == n * 4 && !memcmp(m.acts[l].block_idx, f->st.data + idx->begin, (size_t)n * 4),
                  "%s: %s differs", name, key);
            free(key);
        }
    }
    model_free(&m);
    release();
}

static void test_fixtures(void) { for_each_fixture(test_fixture); }

// ----------------------------------------------------------------------------
// 4. Attention against full matrices

typedef struct Attention {
    AttentionShape s;
    Mask mask;
    real *q, *k, *v, *dout, *gate, *out, *lse, *side_k, *side_v, *parts, *tile;
    int64_t nq, nk, nv, no;
} Attention;

static const char *mask_names[] = {"window", "compressed", "selected"};

// A case with random numbers. a, b: window; block and stride; selection block and n.
static Attention attention_case(int64_t B, int64_t T, int G, int KV, int D, int Dv, int kind, int a, int b) {
    Attention x;
    memset(&x, 0, sizeof x);
    const int H = G * KV;
    x.mask.kind = kind;
    if (kind == MASK_WINDOW) x.mask.window = a;
    if (kind == MASK_COMPRESSED) x.mask.block = a, x.mask.stride = b;
    const int64_t Tk = kind == MASK_COMPRESSED ? (T < a ? 0 : (T - a) / b + 1) : T;
    const AttentionShape s = {B, T, Tk, H, KV, D, Dv, H * D + 3, KV * D + 5, KV * Dv + 1, 0};
    x.s = s;
    if (kind == MASK_SELECTED) {
        x.mask.sel_block = a, x.mask.n = b;
        int *idx = ints(B * T * KV * b);
        for (int64_t i = 0; i < B * T * KV; i++) {
            const int blocks = (int)(i / KV % T / a) + 1;
            int n = 0;      // a random subset, ascending; now and then an empty one
            for (int j = 0, wanted = below(b + 1); j < blocks && n < wanted; j++)
                if (below(blocks - j) < wanted - n) idx[i * b + n++] = j;
            while (n < b) idx[i * b + n++] = -1;
        }
        x.mask.block_idx = idx;
    }
    x.nq = B * T * s.q_row, x.nk = B * Tk * s.k_row, x.nv = B * Tk * s.v_row, x.no = B * T * H * Dv;
    x.q = randoms(x.nq), x.k = randoms(x.nk), x.v = randoms(x.nv), x.dout = randoms(x.no), x.gate = randoms(B * T * H * 3);
    for (int64_t i = 0; i < x.nq; i++) x.q[i] *= 3;
    x.out = zeros(x.no), x.lse = zeros(B * T * H);
    TileScratch w;
    const int64_t block = key_block(&x.mask);
    x.side_k = zeros(B * KV * side_size(block, Tk, D));
    x.side_v = zeros(B * KV * side_size(block, Tk, Dv));
    x.parts = zeros(attention_parts(&s) * B * Tk * KV * (D + Dv));
    x.tile = zeros(thread_count() * max64(tile_scratch(&w, NULL, &s, &x.mask, 1), tile_scratch(&w, NULL, &s, &x.mask, 0)));
    return x;
}

static int sees(const Attention *x, int64_t b, int64_t t, int kv, int64_t i) {
    const Mask *m = &x->mask;
    if (m->kind == MASK_WINDOW) return i <= t && t - i < m->window;
    if (m->kind == MASK_COMPRESSED) return i * m->stride + m->block - 1 <= t;
    const int *idx = m->block_idx + ((b * x->s.T + t) * x->s.KV + kv) * m->n;
    for (int j = 0; j < m->n; j++) if (idx[j] >= 0 && i >= (int64_t)idx[j] * m->sel_block && i < (int64_t)(idx[j] + 1) * m->sel_block) return i <= t;
    return 0;
}

static void test_attention_case(const char *what, int64_t B, int64_t T, int G, int KV, int D, int Dv, int kind, int a, int b) {
    Attention x = attention_case(B, T, G, KV, D, Dv, kind, a, b);
    const AttentionShape *s = &x.s;
    const int64_t H = s->H, Tk = s->Tk;
    const int gated = below(2);
    double *out = doubles(x.no), *lse = doubles(B * T * H), *dq = doubles(x.nq), *dk = doubles(x.nk), *dv = doubles(x.nv);
    double *p = doubles(Tk), *dp = doubles(Tk);
    int nothing_is_zero = 1;
    // gradients are added to what is there
    real *rq = randoms(x.nq), *rk = randoms(x.nk), *rv = randoms(x.nv);
    for (int64_t i = 0; i < x.nq; i++) dq[i] = (double)rq[i];
    for (int64_t i = 0; i < x.nk; i++) dk[i] = (double)rk[i];
    for (int64_t i = 0; i < x.nv; i++) dv[i] = (double)rv[i];

    attention_forward(x.out, x.lse, x.q, x.k, x.v, &x.mask, s, x.side_k, x.tile);
    attention_backward(rq, rk, rv, x.dout, gated ? x.gate + 1 : NULL, 3, x.out, x.lse, x.q, x.k, x.v, &x.mask, s, x.side_k, x.side_v, x.parts, x.tile);

    for (int64_t bt = 0; bt < B * T; bt++)
        for (int64_t h = 0; h < H; h++) {
            const int64_t at = bt / T, t = bt % T, kv = h / G, th = bt * H + h;
            const real *q = x.q + bt * s->q_row + h * D;
            double top = -INFINITY, sum = 0, mean = 0, g = gated ? (double)x.gate[th * 3 + 1] : 1;
            for (int64_t i = 0; i < Tk; i++) {
                p[i] = -INFINITY;
                if (!sees(&x, at, t, (int)kv, i)) continue;
                p[i] = inner(q, x.k + (at * Tk + i) * s->k_row + kv * D, D) / sqrt(D);
                top = p[i] > top ? p[i] : top;
            }
            for (int64_t i = 0; i < Tk; i++) sum += p[i] = p[i] > -INFINITY ? exp(p[i] - top) : 0;
            lse[th] = sum > 0 ? top + log(sum) : -INFINITY;
            if (sum == 0) {
                nothing_is_zero &= x.lse[th] == -INFINITY;
                for (int64_t c = 0; c < Dv; c++) nothing_is_zero &= x.out[th * Dv + c] == 0;
                x.lse[th] = 0, lse[th] = 0;
            }
            for (int64_t i = 0; i < Tk; i++) {
                if (p[i] == 0) continue;
                p[i] /= sum;
                const real *v = x.v + (at * Tk + i) * s->v_row + kv * Dv;
                dp[i] = g * inner(x.dout + th * Dv, v, Dv);
                mean += p[i] * dp[i];
                for (int64_t c = 0; c < Dv; c++) {
                    out[th * Dv + c] += p[i] * (double)v[c];
                    dv[(at * Tk + i) * s->v_row + kv * Dv + c] += p[i] * g * (double)x.dout[th * Dv + c];
                }
            }
            for (int64_t i = 0; i < Tk; i++) {
                if (p[i] == 0) continue;
                const double ds = p[i] * (dp[i] - mean) / sqrt(D);
                for (int64_t c = 0; c < D; c++) {
                    dq[bt * s->q_row + h * D + c] += ds * (double)x.k[(at * Tk + i) * s->k_row + kv * D + c];
                    dk[(at * Tk + i) * s->k_row + kv * D + c] += ds * (double)q[c];
                }
            }
        }
    char *name = format("%s attention %s, B %d T %d G %d KV %d D %d Dv %d (%d,%d), %d threads", what, mask_names[kind], (int)B, (int)T, G, KV, D, Dv,
                        a, b, thread_count());
    check(nothing_is_zero, "%s: a query that sees nothing must give 0 and -inf", name);
    within(error_of(x.out, out, x.no, 1e-30), 1e-12, 1e-5, name);
    within(error_of(x.lse, lse, B * T * H, 1e-30), 1e-12, 1e-5, name);
    within(error_of(rq, dq, x.nq, 1e-30), 1e-12, 1e-5, name);
    within(error_of(rk, dk, x.nk, 1e-30), 1e-12, 1e-5, name);
    within(error_of(rv, dv, x.nv, 1e-30), 1e-12, 1e-5, name);
    free(name);
    release();
}

static void test_attention(void) {
    const int lengths[] = {1, 2, 5, 63, 64, 65, 97, 130, 200}, groups[] = {1, 2, 3, 8};
    for (int threads = 1; threads <= 3; threads++) {
        set_threads(threads);
        for (int i = 0; i < 9; i++)
            for (int g = 0; g < 4; g++) {
                const int64_t T = lengths[i];
                const int G = groups[g];
                if ((i + g) % 3 != threads - 1 && T > 5) continue;      // every size at some thread count
                test_attention_case("", 1 + g % 2, T, G, 1 + i % 3, 6, 5, MASK_WINDOW, 1 + below(9), 0);
                test_attention_case("", 1, T, G, 1 + i % 2, 4, 9, MASK_WINDOW, (int)T + 3, 0);
                test_attention_case("", 1, T, G, 1 + g % 2, 6, 5, MASK_WINDOW, 1, 0);
                test_attention_case("", 1 + i % 2, T, G, 1 + g % 2, 8, 5, MASK_COMPRESSED, 8, 4);
                test_attention_case("", 1, T, G, 2, 2, 3, MASK_COMPRESSED, 4 + below(9), 1 + below(4));
                test_attention_case("", 1 + g % 2, T, G, 1 + i % 2, 6, 5, MASK_SELECTED, 1 + below(20), 1 + below(5));
            }
        // past one tile of queries (768 rows), past a chunk (96 rows), through several key blocks
        const int G = groups[threads];
        test_attention_case("long", 1, 790 / threads, G, 1, 6, 5, MASK_WINDOW, 70, 0);
        test_attention_case("long", 1, 800 / G, G, 1, 6, 5, MASK_WINDOW, 1000, 0);
        test_attention_case("long", 1, 900 / threads, G, 1, 6, 5, MASK_COMPRESSED, 8, 4);
        test_attention_case("long", 1, 900 / threads, G, 1, 6, 5, MASK_SELECTED, 16, 6);
        test_attention_case("long", 1, 350, G, 2, 6, 5, MASK_SELECTED, 80, 3);      // larger than a key block of the others
    }
    set_threads(1);
    test_attention_case("long", 1, 900, 1, 1, 4, 3, MASK_WINDOW, 900, 0);
    test_attention_case("wide", 1, 70, 2, 1, 128, 96, MASK_WINDOW, 50, 0);
    test_attention_case("wide", 1, 70, 2, 1, 64, 400, MASK_SELECTED, 16, 3);
}

// ----------------------------------------------------------------------------
// 2. Backward against finite differences

typedef double Function(void *context);
typedef struct Input { const char *name; real *x; const real *dx; int64_t n; } Input;

// For each input, the slope of f along random directions against <gradient, direction>.
static void check_slopes(const char *what, Function *f, void *context, const Input *inputs, int count, double limit) {
    double all = 0;
    for (int i = 0; i < count; i++) all += inner(inputs[i].dx, inputs[i].dx, inputs[i].n);
    for (int i = 0; i < count; i++) {
        const Input *in = &inputs[i];
        double error = 0, scale = sqrt(inner(in->dx, in->dx, in->n)) + 1e-4 * sqrt(all) + 1e-30;
        for (int round = 0; round < 2 && in->n > 0; round++) {
            const real eps = (real)1e-5;
            real *kept = copy(in->x, in->n), *u = randoms(in->n);
            for (int64_t j = 0; j < in->n; j++) in->x[j] = kept[j] + eps * u[j];
            double up = f(context);
            for (int64_t j = 0; j < in->n; j++) in->x[j] = kept[j] - eps * u[j];
            double down = f(context);
            memcpy(in->x, kept, (size_t)in->n * sizeof(real));
            const double e = fabs((up - down) / (2 * (double)eps) - inner(in->dx, u, in->n)) / scale;
            error = e <= error ? error : e == e ? e : INFINITY;
            for (int j = 0; j < 2; j++) free(lent[--lent_count]);
        }
        if (!(error <= worst)) worst = error;
        check(error < limit, "%s: slope along %s, error %.2e", what, in->name, error);
    }
}

// --- each layer: f = <weighting, output>

typedef struct Linear { real *x, *w, *out, *r; int64_t n, c, oc, row; } Linear;
static double linear_value(void *p) {
    const Linear *l = (const Linear *)p;
    linear_forward(l->out, l->row, l->x, l->c, l->w, l->n, l->c, l->oc);
    return inner(l->out, l->r, l->n * l->row);
}
static void slope_linear(void) {
    Linear l = {NULL, NULL, NULL, NULL, 37, 11, 13, 17};
    l.x = randoms(l.n * l.c), l.w = randoms(l.oc * l.c), l.out = zeros(l.n * l.row), l.r = randoms(l.n * l.row);
    for (int64_t i = 0; i < l.n; i++) for (int64_t j = l.oc; j < l.row; j++) l.r[i * l.row + j] = 0;
    real *dx = randoms(l.n * l.c), *dw = zeros(l.oc * l.c), *more = copy(dx, l.n * l.c);
    linear_backward(dx, l.c, dw, l.r, l.row, l.x, l.c, l.w, l.n, l.c, l.oc, 0);
    const Input in[] = {{"x", l.x, dx, l.n * l.c}, {"w", l.w, dw, l.oc * l.c}};
    check_slopes("linear", linear_value, &l, in, 2, 1e-8);
    real *before = copy(more, l.n * l.c);
    linear_backward(more, l.c, dw, l.r, l.row, l.x, l.c, l.w, l.n, l.c, l.oc, 1);
    for (int64_t i = 0; i < l.n * l.c; i++) more[i] -= before[i];
    within(difference(more, dx, l.n * l.c), 1e-12, 1e-5, "linear, accumulated");
}

typedef struct Norm { real *x, *w, *out, *rstd, *r; int64_t n, c; } Norm;
static double norm_value(void *p) {
    const Norm *l = (const Norm *)p;
    rmsnorm_forward(l->out, l->rstd, l->x, l->w, l->n, l->c, 1e-2);
    return inner(l->out, l->r, l->n * l->c);
}
static void slope_norm(int64_t n, int64_t c) {
    Norm l = {randoms(n * c), randoms(c), zeros(n * c), zeros(n), randoms(n * c), n, c};
    real *dx = zeros(n * c), *dw = zeros(c), *again = zeros(n * c);
    norm_value(&l);
    rmsnorm_again(again, l.rstd, l.x, l.w, n, c);
    within(difference(again, l.out, n * c), 1e-15, 1e-6, "rmsnorm again");
    rmsnorm_backward(dx, dw, l.r, l.x, l.rstd, l.w, n, c);
    const Input in[] = {{"x", l.x, dx, n * c}, {"w", l.w, dw, c}};
    check_slopes("rmsnorm", norm_value, &l, in, 2, 1e-7);
}

static double attention_value(void *p) {
    const Attention *x = (const Attention *)p;
    const AttentionShape *s = &x->s;
    attention_forward(x->out, x->lse, x->q, x->k, x->v, &x->mask, s, x->side_k, x->tile);
    double sum = 0;
    for (int64_t th = 0; th < s->B * s->T * s->H; th++) sum += (double)x->gate[th * 3] * inner(x->out + th * s->Dv, x->dout + th * s->Dv, s->Dv);
    return sum;
}
static void slope_attention(int kind, int a, int b) {
    Attention x = attention_case(2, 41, 2, 2, 6, 5, kind, a, b);
    real *dq = zeros(x.nq), *dk = zeros(x.nk), *dv = zeros(x.nv);
    attention_value(&x);
    attention_backward(dq, dk, dv, x.dout, x.gate, 3, x.out, x.lse, x.q, x.k, x.v, &x.mask, &x.s, x.side_k, x.side_v, x.parts, x.tile);
    const Input in[] = {{"q", x.q, dq, x.nq}, {"k", x.k, dk, x.nk}, {"v", x.v, dv, x.nv}};
    check_slopes(mask_names[kind], attention_value, &x, in, 3, 1e-7);
}

typedef struct Compress { CompressShape s; CompressWeights w; real *x, *out, *hidden, *r, *scratch; int64_t n; } Compress;
static double compress_value(void *p) {
    Compress *l = (Compress *)p;
    compress_forward(l->out, l->hidden, l->x, &l->w, &l->s, l->scratch);
    return inner(l->out, l->r, l->n);
}
// The sizes of pos, fc1, fc1_bias, fc2, fc2_bias, conv, conv_bias (section 3.1 of the design).
static void compress_sizes(int64_t size[7], const CompressShape *s) {
    const int64_t D = s->D, LD = s->block * D, sets = s->kind == COMPRESS_MLP ? 1 : s->KV;
    const int mlp = s->kind == COMPRESS_MLP || s->kind == COMPRESS_GROUPED_MLP, conv = s->kind == COMPRESS_CONV1D;
    const int64_t sizes[7] = {mlp * LD, mlp * sets * 2 * D * LD, mlp * sets * 2 * D, mlp * sets * 2 * D * D, mlp * sets * D,
        conv * sets * D * LD, conv * sets * D};
    memcpy(size, sizes, sizeof sizes);
}
static void slope_compress(int kind, int64_t B, int64_t T, int KV, int D, int block, int stride) {
    static const char *const names[7] = {"pos", "fc1", "fc1 bias", "fc2", "fc2 bias", "conv", "conv bias"};
    static const char *const kinds[COMPRESS_COUNT] = {"compress mlp", "compress grouped_mlp", "compress conv1d", "compress avgpool"};
    Compress l;
    memset(&l, 0, sizeof l);
    const CompressShape s = {B, T, (int64_t)KV * D + 3, KV, D, block, stride, kind};
    l.s = s;
    const int64_t nc = T < block ? 0 : (T - block) / stride + 1;
    l.n = B * nc * KV * D;
    int64_t size[7];
    compress_sizes(size, &s);
    real *w[7], *dw[7];
    for (int i = 0; i < 7; i++) w[i] = size[i] ? randoms(size[i]) : NULL, dw[i] = size[i] ? zeros(size[i]) : NULL;
    for (int64_t i = 0; i < size[1]; i++) w[1][i] *= (real)0.3;
    const CompressWeights weights = {w[0], w[1], w[2], w[3], w[4], w[5], w[6]}, dweights = {dw[0], dw[1], dw[2], dw[3], dw[4], dw[5], dw[6]};
    l.w = weights;
    l.x = randoms(B * T * s.x_row), l.out = zeros(l.n), l.r = randoms(l.n);
    l.hidden = zeros(2 * l.n), l.scratch = zeros(compress_scratch(kind, D, block));
    real *dx = zeros(B * T * s.x_row);
    compress_value(&l);

    double *naive = doubles(l.n);       // phi, block by block
    for (int64_t bi = 0; bi < B * nc; bi++)
        for (int kv = 0; kv < KV; kv++) {
            const int set = kind == COMPRESS_MLP ? 0 : kv, LD = block * D, W = 2 * D;
            double flat[64], hidden[16] = {0};
            for (int j = 0; j < LD; j++)
                flat[j] = (double)l.x[(bi / nc * T + bi % nc * stride + j / D) * s.x_row + kv * D + j % D] + (w[0] ? (double)w[0][j] : 0);
            for (int k = 0; k < W && w[1]; k++) {
                double h = (double)w[2][set * W + k];
                for (int j = 0; j < LD; j++) h += flat[j] * (double)w[1][((int64_t)set * W + k) * LD + j];
                hidden[k] = 0.5 * h * (1 + tanh(sqrt(2 / M_PI) * (h + 0.044715 * h * h * h)));
            }
            for (int c = 0; c < D; c++) {
                double y = w[1] ? (double)w[4][set * D + c] : w[5] ? (double)w[6][set * D + c] : 0;
                for (int k = 0; k < W && w[1]; k++) y += hidden[k] * (double)w[3][((int64_t)set * D + c) * W + k];
                for (int j = 0; j < LD && w[5]; j++) y += flat[j] * (double)w[5][((int64_t)set * D + c) * LD + j];
                for (int j = 0; j < block && kind == COMPRESS_AVGPOOL; j++) y += flat[j * D + c] / block;
                naive[(bi * KV + kv) * D + c] = y;
            }
        }
    within(error_of(l.out, naive, l.n, 1e-30), 1e-12, 1e-5, kinds[kind]);
    if (!sharp) return;
    compress_backward(dx, &dweights, l.r, l.hidden, l.x, &l.w, &s, l.scratch);
    Input in[8] = {{"x", l.x, dx, B * T * s.x_row}};
    for (int i = 0; i < 7; i++) {
        const Input one = {names[i], w[i], dw[i], size[i]};
        in[i + 1] = one;
    }
    check_slopes(kinds[kind], compress_value, &l, in, 8, 1e-6);
}

typedef struct Gates { real *logits, *q, *w, *b, *gates, *r; int64_t n, row; int h, d, kind; } Gates;
static double gates_value(void *p) {
    const Gates *l = (const Gates *)p;
    gates_forward(l->gates, l->logits, l->row, l->q, l->row, l->w, l->b, l->n, l->h, l->d, l->kind);
    return inner(l->gates, l->r, l->n * l->h * 3);
}
static void slope_gates(int kind) {
    static const char *const kinds[] = {"gate input", "gate q_cond", "gate static"};
    Gates l = {NULL, NULL, NULL, NULL, NULL, NULL, 29, 40, 3, 6, kind};
    const int64_t wide = l.n * l.row, ng = l.n * l.h * 3, nw = l.h * 3 * l.d;
    l.logits = randoms(wide), l.q = randoms(wide), l.w = randoms(nw), l.b = randoms(l.h * 3), l.gates = zeros(ng), l.r = randoms(ng);
    gates_value(&l);
    double *naive = doubles(ng);
    for (int64_t i = 0; i < ng; i++) {
        const int64_t n = i / (l.h * 3), j = i % (l.h * 3);
        double x = (double)l.b[j];
        if (kind == GATE_INPUT) x += (double)l.logits[n * l.row + j];
        if (kind == GATE_Q_COND) x += inner(l.w + j * l.d, l.q + n * l.row + j / 3 * l.d, l.d);
        naive[i] = 1 / (1 + exp(-x));
    }
    within(error_of(l.gates, naive, ng, 0), 1e-13, 1e-6, kinds[kind]);
    if (!sharp) return;
    real *dgates = copy(l.r, ng), *dlogits = zeros(wide), *dq = zeros(wide), *dw = zeros(nw), *db = zeros(l.h * 3);
    gates_backward(dgates, dlogits, l.row, dq, l.q, l.row, dw, db, l.gates, l.w, l.n, l.h, l.d, kind);
    const Input in[] = {{"bias", l.b, db, l.h * 3}, {"logits", l.logits, dlogits, wide}, {"q", l.q, dq, wide}, {"weight", l.w, dw, nw}};
    check_slopes(kinds[kind], gates_value, &l, in, 4, 1e-7);
}

typedef struct Swiglu { real *x, *out, *r; int64_t n, f; } Swiglu;
static double swiglu_value(void *p) {
    const Swiglu *l = (const Swiglu *)p;
    swiglu_forward(l->out, l->x, l->n, l->f);
    return inner(l->out, l->r, l->n * l->f);
}
static void slope_swiglu(void) {
    Swiglu l = {randoms(31 * 2 * 9), zeros(31 * 9), randoms(31 * 9), 31, 9};
    double *naive = doubles(31 * 9);
    for (int i = 0; i < 31 * 9; i++) {
        const double a = (double)l.x[i / 9 * 18 + i % 9], u = (double)l.x[i / 9 * 18 + 9 + i % 9];
        naive[i] = a / (1 + exp(-a)) * u;
    }
    real *dx = zeros(31 * 2 * 9);
    swiglu_value(&l);
    within(error_of(l.out, naive, 31 * 9, 0), 1e-13, 1e-6, "swiglu");
    if (!sharp) return;
    swiglu_backward(dx, l.r, l.x, l.n, l.f);
    const Input in[] = {{"x", l.x, dx, 31 * 2 * 9}};
    check_slopes("swiglu", swiglu_value, &l, in, 1, 1e-7);
}

static void test_rope(void) {
    const int64_t B = 2, T = 23, step = 4, D = 10, heads = 3, row = 41, n = B * T;
    real *table = zeros(T * step * D), *x = randoms(n * row), *before = copy(x, n * row);
    double *naive = doubles(n * row);
    rope_table(table, T * step, D, 500);
    for (int64_t i = 0; i < n * row; i++) naive[i] = (double)x[i];
    for (int64_t i = 0; i < n * heads; i++)
        for (int64_t j = 0; j < D / 2; j++) {
            double angle = (double)(i / heads % T * step) * pow(500, -2.0 * (double)j / D), *a = naive + i / heads * row + i % heads * D + j, *b = a + D / 2;
            const double x0 = *a, x1 = *b;
            *a = x0 * cos(angle) - x1 * sin(angle);
            *b = x1 * cos(angle) + x0 * sin(angle);
        }
    rope(x, row, table, n, T, step, heads, D, 1);
    within(error_of(x, naive, n * row, 0), 1e-13, 1e-6, "rope");
    rope(x, row, table, n, T, step, heads, D, -1);
    within(difference(x, before, n * row), 1e-13, 1e-6, "rope there and back");
}

typedef struct Moe { MoeShape s; Routing r; real *logits, *x, *experts, *out, *gate_up, *scratch, *weighting; double z, balance; } Moe;
static double moe_value(void *p) {
    Moe *l = (Moe *)p;
    double z, balance;
    memcpy(l->r.probs, l->logits, (size_t)(l->s.N * l->s.E) * sizeof(real));
    memset(l->out, 0, (size_t)(l->s.N * l->s.C) * sizeof(real));
    moe_route(&l->r, &l->s);
    moe_forward(l->out, l->gate_up, l->x, l->experts, &l->r, &l->s, l->scratch);
    moe_losses(&z, &balance, &l->r, &l->s, l->z, l->balance);
    return inner(l->out, l->weighting, l->s.N * l->s.C) + z + balance;
}

// Routing and experts by the book: for each token the k most probable, then the most probable tokens of each expert.
static void naive_moe(const Moe *l, const char *what) {
    const int64_t N = l->s.N, C = l->s.C, F = l->s.F;
    const int E = l->s.E, k = l->s.k;
    double *p = doubles(N * E), *out = doubles(N * C), squares = 0, balance = 0, *mean = doubles(E), *load = doubles(E);
    char *chosen = (char *)lend(N * E), *kept = (char *)lend(N * E);
    for (int64_t i = 0; i < N; i++) {
        double sum = 0;
        for (int e = 0; e < E; e++) sum += p[i * E + e] = exp((double)l->logits[i * E + e]);
        for (int e = 0; e < E; e++) p[i * E + e] /= sum, mean[e] += p[i * E + e] / (double)N;
        squares += log(sum) * log(sum) / (double)N;
        for (int e = 0; e < E; e++) {
            int better = 0;
            for (int o = 0; o < E; o++) better += p[i * E + o] > p[i * E + e] || (p[i * E + o] == p[i * E + e] && o < e);
            kept[i * E + e] = chosen[i * E + e] = better < k;
            load[e] += better < k;
        }
    }
    const int64_t limit = l->s.capacity > 0 ? (int64_t)ceil(l->s.capacity * (double)(N * k) / E) : N;
    int64_t drops = 0;
    for (int64_t i = 0; i < N * E; i++) {
        if (!chosen[i]) continue;
        int64_t better = 0;
        for (int64_t o = i % E; o < N * E; o += E) better += chosen[o] && (p[o] > p[i] || (p[o] == p[i] && o < i));
        kept[i] = better < limit;
        drops += !kept[i];
    }
    for (int64_t i = 0; i < N; i++) {
        double total = 0;
        for (int e = 0; e < E; e++) total += chosen[i * E + e] ? p[i * E + e] : 0;
        for (int e = 0; e < E; e++) {
            if (!kept[i * E + e]) continue;
            const real *w = l->experts + e * 3 * F * C;
            const double share = k == 1 ? p[i * E + e] : p[i * E + e] / total;
            for (int64_t f = 0; f < F; f++) {
                const double a = inner(w + f * C, l->x + i * C, C), u = inner(w + (F + f) * C, l->x + i * C, C), h = a / (1 + exp(-a)) * u;
                for (int64_t c = 0; c < C; c++) out[i * C + c] += share * h * (double)w[2 * F * C + c * F + f];
            }
        }
    }
    for (int e = 0; e < E; e++) balance += l->balance * E * load[e] / (double)(N * k) * mean[e];
    double z_found, balance_found;
    moe_losses(&z_found, &balance_found, &l->r, &l->s, l->z, l->balance);
    within(error_of(l->out, out, N * C, 1e-30), 1e-12, 1e-5, what);
    within(fabs(z_found - l->z * squares) / (l->z * squares), 1e-12, 1e-5, what);
    within(fabs(balance_found - balance) / balance, 1e-12, 1e-5, what);
    check(l->s.capacity == 0 || l->s.capacity >= 1 || drops > 0, "%s: a capacity that drops nothing tests nothing", what);
    for (int e = 0; e < E; e++) check(l->r.load[e] == (int64_t)load[e], "%s: load of expert %d", what, e);
}

static void slope_moe(const char *what, int64_t N, int E, int k, double capacity, int ties) {
    Moe l;
    memset(&l, 0, sizeof l);
    const MoeShape s = {N, 6, 5, E, k, capacity, 1};
    const int64_t NE = N * E, nw = E * 3 * s.F * s.C, nx = N * s.C;
    l.s = s, l.z = 0.7, l.balance = 0.9;
    l.logits = randoms(NE), l.x = randoms(nx), l.experts = randoms(nw), l.out = zeros(nx), l.weighting = randoms(nx);
    for (int64_t i = 0; i < NE; i++) l.logits[i] *= 2;
    for (int64_t i = 0; i < NE && ties; i++)     // four kinds of tokens, each with two equal experts
        l.logits[i] = i / E >= 4 ? l.logits[i - 4 * E] : i % E == i / E + 1 ? l.logits[i - 1] : l.logits[i];
    l.gate_up = zeros(N * k * 2 * s.F), l.scratch = zeros(moe_scratch(&s));
    l.r.probs = zeros(NE), l.r.lse = zeros(N), l.r.weight = zeros(N * k), l.r.choice = ints(N * k), l.r.row_token = ints(N * k);
    l.r.start = (int64_t *)lend((E + 1) * 8), l.r.load = (int64_t *)lend(E * 8);
    moe_value(&l);
    naive_moe(&l, what);
    if (!sharp || ties) return;
    real *dx = zeros(nx), *dw = zeros(nw), *dlogits = zeros(NE);
    moe_backward(dx, dw, dlogits, l.weighting, l.gate_up, l.x, l.experts, &l.r, &s, l.scratch);
    router_backward(dlogits, &l.r, &s, l.z, l.balance, 1);
    const Input in[] = {{"x", l.x, dx, nx}, {"experts", l.experts, dw, nw}, {"router", l.logits, dlogits, NE}};
    check_slopes(what, moe_value, &l, in, 3, 1e-7);
}

static void test_layers(void) {
    set_threads(2);
    if (sharp) slope_linear(), release();
    if (sharp) slope_norm(17, 13), slope_norm(70, 150), release();
    test_rope(), slope_swiglu(), release();
    for (int kind = 0; kind < 3; kind++) slope_gates(kind);
    release();
    for (int kind = 0; kind < COMPRESS_COUNT; kind++) {
        slope_compress(kind, 2, 29, 2, 5, 8, 4);       // overlapping twice
        slope_compress(kind, 1, 21, 3, 4, 6, 2);       // three times
        slope_compress(kind, 1, 24, 1, 2, 8, 8);       // not at all
        slope_compress(kind, 1, 6, 2, 3, 8, 4);        // no block
        slope_compress(kind, 2, 1103, 2, 2, 4, 2);     // more than are flattened at a time
        release();
    }
    slope_moe("moe k 2", 23, 4, 2, 0, 0);
    slope_moe("moe k 1", 23, 4, 1, 0, 0);
    slope_moe("moe k 3, capacity 0.7", 23, 5, 3, 0.7, 0);
    slope_moe("moe k 1, capacity 0.5", 23, 4, 1, 0.5, 0);
    slope_moe("moe k 2, capacity 0.5, ties", 41, 5, 2, 0.5, 1);     // 9 of an expert's tokens stay, equal ones come by tens
    slope_moe("moe k 1, ties", 41, 5, 1, 0, 1);
    slope_moe("moe k 4 of 4", 9, 4, 4, 0, 0);
    slope_moe("moe one expert", 9, 1, 1, 0, 0);
    release();
    if (!sharp) return;
    for (int threads = 1; threads <= 3; threads++) {
        set_threads(threads);
        slope_attention(MASK_WINDOW, 7, 0), slope_attention(MASK_WINDOW, 99, 0), slope_attention(MASK_COMPRESSED, 8, 4), slope_attention(MASK_SELECTED, 8, 3);
        release();
    }
}

// --- whole models: f = the loss with the router's terms

typedef struct Whole { Model *m; const int *tokens, *targets; int64_t B, T; StepInfo info; } Whole;
static double whole_value(void *p) {
    Whole *w = (Whole *)p;
    const real *x = layers_forward(w->m, w->tokens, w->B, w->T, &w->info);
    return head_loss(w->m, x, w->targets, w->B * w->T, NULL) + w->m->moe_z + w->m->moe_balance;
}
static void slope_model(const char *what, Config c, int64_t B, int64_t T, double dropout, int recompute) {
    Model m;
    make_model(&m, &c, B, T, recompute, 1);
    Whole w = {&m, random_tokens(B * T, c.vocab_size), random_tokens(B * T, c.vocab_size), B, T, {dropout, 7, 3, 2, 1.0, 1}};
    model_zero_grads(&m);
    model_forward_backward(&m, w.tokens, w.targets, B, T, &w.info);
    Input *in = (Input *)lend(m.num_params * (int64_t)sizeof(Input));
    for (int i = 0; i < m.num_params; i++) {
        const Param *p = &m.params[i];
        const Input one = {p->name, m.weights + p->offset, m.grads + p->offset, p->count};
        in[i] = one;
    }
    check_slopes(what, whole_value, &w, in, m.num_params, 1e-5);
    model_free(&m);
    release();
}

static void test_whole_models(void) {
    if (!sharp) return;
    set_threads(1);
    static const char *const compress[] = {"mlp", "grouped_mlp", "conv1d", "avgpool"}, *const gate[] = {"input", "q_cond", "static"};
    for (int i = 0; i < COMPRESS_COUNT; i++)
        for (int j = 0; j < 3; j++) {
            Config c = tiny();
            char *what = format("model %s %s", compress[i], gate[j]);
            c.compress = i, c.gate = j, c.tie_word_embeddings = j != 1;
            slope_model(what, c, 2, 33, j == 2 ? 0.2 : 0, (i + j) % 3);
            free(what);
        }
    Config c = tiny();
    slope_model("model with dropout", c, 2, 29, 0.3, 0);
    slope_model("model with dropout, recompute 1", c, 2, 29, 0.3, 1);
    slope_model("model with dropout, recompute 2", c, 2, 29, 0.3, 2);
    c.attention = ATTENTION_FULL;
    slope_model("model full", c, 2, 30, 0, 0);
    slope_model("model full, recompute 2", c, 2, 30, 0.1, 2);
    c = tiny(), c.full_layer[1] = 1;
    slope_model("model hybrid", c, 2, 30, 0, 0);
    slope_model("model hybrid, recompute 2", c, 2, 30, 0, 2);
    c = tiny_moe(4, 1, 2, 0), c.first_dense_layers = 1;
    slope_model("model moe, shared, one dense layer", c, 2, 30, 0, 0);
    slope_model("model moe, recompute 1", c, 2, 30, 0, 1);
    slope_model("model moe k 1, capacity 1", tiny_moe(4, 0, 1, 1), 2, 30, 0, 0);
    slope_model("model moe k 3, capacity 0.8, recompute 2", tiny_moe(4, 0, 3, 0.8), 2, 30, 0.1, 2);
    c = tiny(), c.num_key_value_heads = 1, c.sel_blocks = 9;
    slope_model("model KV 1, all blocks", c, 1, 45, 0, 0);
}

// ----------------------------------------------------------------------------
// 3. Matrix products

// c (m,n) inside rows of c_row, a and b stored plain or transposed with gaps. packed: matmul, else block_multiply.
static void test_product(int64_t m, int64_t n, int64_t k, int a_turned, int b_turned, int accumulate, int packed) {
    const int64_t gap = 3, c_row = n + 2;
    const int64_t a_row = a_turned ? 1 : k + gap, a_col = a_turned ? m + gap : 1;
    const int64_t b_row = b_turned ? 1 : n + gap, b_col = b_turned ? k + gap : 1;
    real *a = randoms((a_turned ? k : m) * (a_turned ? m + gap : k + gap)), *b = randoms((b_turned ? n : k) * (b_turned ? k + gap : n + gap));
    real *c = randoms(m * c_row), *before = copy(c, m * c_row);
    double *exact = doubles(m * n), error = 0;
    for (int64_t i = 0; i < m; i++)
        for (int64_t p = 0; p < k; p++)
            for (int64_t j = 0; j < n; j++) exact[i * n + j] += (double)a[i * a_row + p * a_col] * (double)b[p * b_row + j * b_col];
    if (packed) matmul(m, n, k, a, a_row, a_col, b, b_row, b_col, c, c_row, accumulate);
    else block_multiply(m, n, k, a, a_row, a_col, b, b_row, c, c_row, accumulate);
    int outside = 1;
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < n; j++) {
            const double e = fabs((double)c[i * c_row + j] - exact[i * n + j] - (accumulate ? (double)before[i * c_row + j] : 0));
            error = e <= error ? error : e == e ? e : INFINITY;
        }
        for (int64_t j = n; j < c_row; j++) outside &= c[i * c_row + j] == before[i * c_row + j];
    }
    char *what = format("%s (%d,%d,%d)%s%s%s, %d threads", packed ? "matmul" : "block_multiply", (int)m, (int)n, (int)k, a_turned ? " aT" : "",
                        b_turned ? " bT" : "", accumulate ? " accumulate" : "", thread_count());
    within(error / sqrt((double)k + 1), 1e-14, 1e-5, what);
    check(outside, "%s wrote outside of its columns", what);
    free(what);
    release();
}

static void test_products(void) {
    const int64_t ms[] = {1, 2, 3, 4, 5, MR - 1, MR, MR + 1, 2 * MR + MR / 3, MC - 1, MC, MC + 5};
    const int64_t ns[] = {1, 2, 7, NR - 1, NR, NR + 1, 3 * NR + 5}, ks[] = {1, 2, 5, 33};
    for (int i = 0; i < 12; i++)
        for (int j = 0; j < 7; j++)
            for (int p = 0; p < 4; p++) {
                set_threads(1 + (i + j + p) % 4);
                const int kind = i + 3 * j + 5 * p;
                test_product(ms[i], ns[j], ks[p], kind & 1, kind >> 1 & 1, kind >> 2 & 1, 1);
                test_product(ms[i], ns[j], ks[p], 0, 1, p & 1, 1);
                test_product(ms[i], ns[j], ks[p], (i + j) & 1, 0, p & 1, 0);
            }
    for (int kind = 0; kind < 8; kind++) {      // across the cache blocks
        set_threads(1 + kind % 4);
        const int a = kind & 1, b = kind >> 1 & 1, add = kind >> 2;
        test_product(MC + MR + 1, NR + 3, KC - 1, a, b, add, 1);
        test_product(2 * MC + 7, 2 * NR + 1, KC, a, b, add, 1);
        test_product(MR + 5, 3 * NR - 1, 2 * KC + 5, a, b, add, 1);
        test_product(7, NC + 3 * NR + 1, 9, a, b, add, 1);
        test_product(5, NC, KC + 1, a, b, add, 1);
        test_product(3, 1234, 61, 0, b, add, 1);
        test_product(2 * MC + 7, 2 * NR + 1, KC + 7, a, 0, add, 0);
        test_product(MR + 1, NR - 1, 2 * KC + 5, a, 0, add, 0);
    }
    for (int empty = 0; empty < 3; empty++) {
        real c = 5;
        matmul(empty != 0, empty != 1, empty != 2, &c, 1, 1, &c, 1, 1, &c, 1, 1);
        check(c == 5, "an empty product changes nothing");
    }
    for (int rows = 0; rows < 14; rows++)
        for (int cols = 0; cols < 14; cols++) {
            real *in = randoms(14 * 17), *out = randoms(14 * 19), *before = copy(out, 14 * 19);
            transpose(out, 19, in, 17, rows, cols);
            int right = 1;
            for (int c = 0; c < 14; c++)
                for (int r = 0; r < 19; r++) right &= out[c * 19 + r] == (c < cols && r < rows ? in[r * 17 + c] : before[c * 19 + r]);
            check(right, "transpose of (%d,%d)", rows, cols);
            release();
        }
}

// ----------------------------------------------------------------------------
// 5. Selection

typedef struct Candidate { double importance; int index, forced; } Candidate;
static int compare_candidates(const void *a, const void *b) {
    const Candidate *x = (const Candidate *)a, *y = (const Candidate *)b;
    if (x->forced != y->forced) return y->forced - x->forced;
    if (x->importance != y->importance) return x->importance < y->importance ? 1 : -1;
    return x->index - y->index;
}

// The choice by sorting: the forced ones, then by importance, then by index. Writes n places. Returns how near to another choice
// it was: the gap between the last chosen and the first left out.
static double sorted_choice(int *idx, const double *importance, int blocks, const SelectShape *s) {
    Candidate *c = (Candidate *)xcalloc((size_t)blocks, sizeof(Candidate));
    char *taken = (char *)xcalloc((size_t)blocks, 1);
    for (int j = 0; j < blocks; j++) {
        const Candidate one = {importance[j], j, j < s->n_init || j >= blocks - s->n_local};
        c[j] = one;
    }
    qsort(c, (size_t)blocks, sizeof(Candidate), compare_candidates);
    for (int i = 0; i < s->n && i < blocks; i++) taken[c[i].index] = 1;
    const double gap = blocks > s->n && !c[s->n - 1].forced ? c[s->n - 1].importance - c[s->n].importance : INFINITY;
    int found = 0;
    for (int j = 0; j < blocks; j++) if (taken[j]) idx[found++] = j;
    while (found < s->n) idx[found++] = -1;
    free(c);
    free(taken);
    return gap;
}

static void test_choice(void) {
    int wrong = 0, cases = 0;
    for (int round = 0; round < 6000; round++) {
        const int blocks = 1 + below(round % 3 ? 12 : 90), n_init = below(4), n_local = 1 + below(3),
            n = n_init + n_local + below(round % 2 ? 4 : 30);
        const SelectShape s = {0, 0, 0, n, n_init, n_local};
        real *x = zeros(blocks);
        double *y = doubles(blocks);
        const int levels = round % 5 == 0 ? 1 : 1 + below(12);      // few levels: many ties
        for (int j = 0; j < blocks; j++) y[j] = (double)(x[j] = (real)below(levels));
        int *idx = ints(n + 1), *wanted = ints(n);
        idx[n] = 77;
        choose_blocks(idx, x, blocks, &s);
        sorted_choice(wanted, y, blocks, &s);
        wrong += memcmp(idx, wanted, (size_t)n * sizeof(int)) != 0 || idx[n] != 77;
        cases++;
        release();
    }
    check(wrong == 0, "choose_blocks: %d of %d differ from sorting", wrong, cases);
}

static void test_pieces(void) {
    const int known[] = {0, 1, 2, 2, 2, 1, 0};
    for (int64_t j = 1; j < 4; j++)
        for (int64_t i = 0; i < 7; i++)
            check(pieces_inside(4 * j - 2 + i, j, 2, 4) == known[i], "weights 1,2,2,2,1 of the paper: block %d of %d", (int)i, (int)j);
    const int shapes[][3] = {{32, 16, 64}, {16, 16, 16}, {8, 2, 12}, {6, 3, 9}, {12, 4, 12}, {5, 1, 7}, {1, 1, 1}, {1, 1, 4}};
    for (int k = 0; k < 8; k++) {
        const int l = shapes[k][0], d = shapes[k][1], b = shapes[k][2];
        int wrong = 0;
        for (int i = 0; i < 40; i++)
            for (int j = 0; j < 20; j++) {
                int count = 0;      // pieces of d tokens whose first token, hence all, lies in block j
                for (int piece = 0; piece < l / d; piece++) count += (i * d + piece * d) / b == j;
                wrong += pieces_inside(i, j, l / d, b / d) != count;
            }
        check(wrong == 0, "pieces_inside for l %d, d %d, l' %d: %d wrong", l, d, b, wrong);
    }
}

static void test_select(int64_t B, int64_t T, int G, int KV, int D, SelectShape sel) {
    Attention x = attention_case(B, T, G, KV, D, 3, MASK_COMPRESSED, sel.cmp_block, sel.cmp_stride);
    const AttentionShape *s = &x.s;
    int *idx = ints(B * T * KV * sel.n), *wanted = ints(sel.n), wrong = 0, near = 0;
    real *memory = zeros(thread_count() * select_scratch(s, sel.sel_block));
    double *p = doubles(s->Tk), *importance = doubles(T / sel.sel_block + 1);
    attention_forward(x.out, x.lse, x.q, x.k, x.v, &x.mask, s, x.side_k, x.tile);
    select_forward(idx, x.q, x.side_k, x.lse, s, &sel, memory);
    for (int64_t btk = 0; btk < B * T * KV; btk++) {
        const int64_t b = btk / KV / T, t = btk / KV % T, kv = btk % KV, bt = btk / KV;
        const int blocks = (int)(t / sel.sel_block) + 1;
        for (int j = 0; j < blocks; j++) importance[j] = 0;
        for (int g = 0; g < G; g++) {
            double sum = 0;
            for (int64_t i = 0; i < s->Tk; i++) {
                const real *q = x.q + bt * s->q_row + (kv * G + g) * D, *k = x.k + (b * s->Tk + i) * s->k_row + kv * D;
                p[i] = i * sel.cmp_stride + sel.cmp_block - 1 <= t ? exp(inner(q, k, D) / sqrt(D)) : 0;
                sum += p[i];
            }
            for (int64_t i = 0; i < s->Tk && sum > 0; i++)      // token by token: each of a block's l tokens is 1/d of a piece
                for (int64_t u = i * sel.cmp_stride; p[i] > 0 && u < i * sel.cmp_stride + sel.cmp_block; u++)
                    importance[u / sel.sel_block] += p[i] / sum / sel.cmp_stride;
        }
        const double gap = sorted_choice(wanted, importance, blocks, &sel);
        if (gap < (sharp ? 1e-12 : 1e-5)) near++;       // rounding may choose otherwise
        else wrong += memcmp(idx + btk * sel.n, wanted, (size_t)sel.n * sizeof(int)) != 0;
    }
    check(wrong == 0, "select_forward, T %d G %d KV %d l %d d %d l' %d n %d: %d of %d choices are wrong", (int)T, G, KV, sel.cmp_block,
          sel.cmp_stride,
          sel.sel_block, sel.n, wrong, (int)(B * T * KV));
    check(near <= B * T * KV / 20, "select_forward, T %d: %d of %d choices too near to tell", (int)T, near, (int)(B * T * KV));
    release();
}

static void test_selection(void) {
    test_pieces();
    test_choice();
    const SelectShape shapes[] = {{8, 4, 16, 4, 1, 1}, {8, 4, 8, 5, 1, 2}, {4, 4, 4, 6, 0, 1}, {6, 2, 12, 3, 1, 1}, {32, 16, 64, 4, 1, 2},
        {3, 1, 5, 8, 2, 3}, {8, 8, 8, 3, 1, 2}};
    for (int i = 0; i < 7; i++) {
        set_threads(1 + i % 3);
        test_select(1 + i % 2, 150, 2, 2, 6, shapes[i]);
        test_select(1, 61 + i, 3, 1, 4, shapes[i]);
        test_select(1, 1 + i, 1, 2, 4, shapes[i]);
    }
    set_threads(2);
    test_select(1, 420, 1, 1, 6, shapes[0]);
    test_select(1, 420, 8, 1, 6, shapes[2]);       // more compressed blocks than a key block has
}

// ----------------------------------------------------------------------------
// 6. Causality

static void causal(const char *what, Config c, int64_t T) {
    Model m;
    make_model(&m, &c, 2, T, 0, 0);
    const int64_t V = c.vocab_size;
    const int experts = c.num_experts > 0;      // other rows in an expert's product: other rounding
    int *tokens = ints(2 * T);
    memcpy(tokens, random_tokens(2 * T, c.vocab_size), (size_t)(2 * T) * sizeof(int));
    real *before = zeros(2 * T * V), *after = zeros(2 * T * V);
    model_logits(&m, tokens, 2, T, before, 0);
    for (int round = 0; round < 14; round++) {
        const int64_t t = round == 0 ? T - 1 : round == 1 ? 0 : below((int)T);
        const int kept = tokens[t];
        tokens[t] = (kept + 1 + below(c.vocab_size - 1)) % c.vocab_size;
        model_logits(&m, tokens, 2, T, after, 0);
        tokens[t] = kept;
        check(experts ? difference(after, before, t * V) < (sharp ? 1e-12 : 1e-4) : !memcmp(after, before, (size_t)(t * V) * sizeof(real)),
              "%s: token %d of %d changes logits before it, by %.1e", what, (int)t, (int)T, difference(after, before, t * V));
        check(difference(after + t * V, before + t * V, V) > 1e-3, "%s: token %d of %d changes nothing at its place", what, (int)t, (int)T);
        check(t == T - 1 || difference(after + (t + 1) * V, before + (t + 1) * V, (T - t - 1) * V) > 1e-7,
              "%s: token %d of %d changes nothing after it", what, (int)t, (int)T);
        check(experts ? difference(after + T * V, before + T * V, T * V) < (sharp ? 1e-12 : 1e-4) : !memcmp(after + T * V, before + T * V,
              (size_t)(T * V) * sizeof(real)),
              "%s: token %d changes another sequence", what, (int)t);
    }
    model_free(&m);
    release();
}

static void test_causality(void) {
    Config c = tiny();
    causal("mlp", c, 149);
    c.compress = COMPRESS_GROUPED_MLP, c.gate = GATE_Q_COND;
    causal("grouped_mlp, q_cond", c, 96);
    c.compress = COMPRESS_CONV1D, c.gate = GATE_STATIC, c.sel_block = 16, c.window = 1;
    causal("conv1d, static, window 1", c, 120);
    c.compress = COMPRESS_AVGPOOL, c.cmp_stride = 8, c.window = 200;
    causal("avgpool, window over T", c, 77);
    c = tiny(), c.attention = ATTENTION_FULL;
    causal("full", c, 150);
    c = tiny(), c.full_layer[0] = 1;
    causal("hybrid", c, 133);
    causal("moe", tiny_moe(4, 1, 2, 0), 100);
    causal("moe with a capacity, which evaluation has not", tiny_moe(4, 1, 2, 0.5), 100);

    // How far each branch looks: one layer, one branch open. Token 0 reaches the last place through the first block, which is
    // always selected, and through the compressed branch; the window alone does not reach it.
    for (int branch = 0; branch < BRANCHES; branch++) {
        Model m;
        c = tiny(), c.num_hidden_layers = 1, c.gate = GATE_STATIC, c.window = 7;
        const int64_t T = 62;
        make_model(&m, &c, 1, T, 0, 0);
        for (int i = 0; i < c.num_attention_heads * 3; i++) m.layers[0].gate_bias[i] = i % 3 == branch ? 5 : -200;
        int *tokens = ints(T), reached = 0;
        memcpy(tokens, random_tokens(T, 19), (size_t)T * sizeof(int));
        real *before = zeros(19), *after = zeros(19);
        model_logits(&m, tokens, 1, T, before, 1);
        for (int64_t t = 0; t < T; t++) {
            const int kept = tokens[t];
            tokens[t] = (kept + 1) % 19;
            model_logits(&m, tokens, 1, T, after, 1);
            tokens[t] = kept;
            const int moved = memcmp(before, after, 19 * sizeof(real)) != 0;
            reached += moved;
            if (branch == CMP) check(moved == (t < T - T % 4 || t == T - 1), "the compressed branch and token %d of 62", (int)t);
            if (branch == WIN) check(moved == (t >= T - 7), "a window of 7 and token %d of 62", (int)t);
            if (branch == SLC && (t < 8 || t >= 56)) check(moved, "the first and the last selected block hold token %d of 62", (int)t);
        }
        // the selected branch: 8 + 8 + 6 tokens of 3 blocks, but other tokens change what is chosen
        if (branch == SLC) check(reached >= 22, "the selected branch reads %d tokens, 22 are its own", reached);
        model_free(&m);
        release();
    }
}

// ----------------------------------------------------------------------------
// 7. Sizes at the edge

static void edge(const char *what, Config c, int64_t B, int64_t T) {
    for (int recompute = 0; recompute <= 2; recompute += 2) {
        Model m;
        make_model(&m, &c, B, T, recompute, 1);
        const StepInfo info = plain_step();
        const int *tokens = random_tokens(B * (T + 1), c.vocab_size);
        const double loss = model_forward_backward(&m, tokens, tokens + 1, B, T, &info);
        check(isfinite(loss) && loss > 0 && all_finite(m.grads, m.num_elements), "%s: loss %g or a gradient is not finite", what, loss);
        const double norm = model_grad_norm(&m), again = model_evaluate(&m, tokens, tokens + 1, B, T);
        check(isfinite(norm) && norm > 0, "%s: norm of the gradient %g", what, norm);
        check(c.capacity_factor > 0 || fabs(again - loss) < 1e-5 * loss, "%s: evaluation says %g, training %g", what, again, loss);
        for (int l = 0; l < c.num_hidden_layers && recompute == 0; l++) {
            if (layer_is_full(&c, l)) continue;
            const int64_t n = c.sel_blocks;
            int right = 1;
            for (int64_t i = 0; i < B * T * c.num_key_value_heads; i++) {
                const int *idx = m.acts[l].block_idx + i * n;
                const int64_t candidates = i / c.num_key_value_heads % T / c.sel_block + 1;
                for (int64_t j = 0; j < n; j++) {
                    right &= j < candidates ? idx[j] >= 0 && idx[j] < candidates && (j == 0 || idx[j] > idx[j - 1]) : idx[j] == -1;
                    if (candidates > n && j < c.sel_init_blocks) right &= idx[j] == j;
                    if (candidates > n && j >= n - c.sel_local_blocks) right &= idx[j] == candidates - n + j;
                }
            }
            check(right, "%s: block_idx is not ascending, has a hole, or lacks a block that is always taken", what);
        }
        model_free(&m);
    }
    release();
}

static void test_edges(void) {
    Config c = tiny();
    const int lengths[] = {1, 2, 7, 8, 9, 11, 12, 31, 45, 64};
    for (int i = 0; i < 10; i++) edge("length", c, 1 + i % 3, lengths[i]);
    c.cmp_block = c.cmp_stride = c.sel_block = 1, c.sel_blocks = 2, c.window = 1;
    edge("blocks of one token", c, 2, 9);
    edge("blocks of one token, one token", c, 1, 1);
    c = tiny(), c.sel_blocks = 50;
    edge("n over all blocks", c, 2, 37);
    c = tiny(), c.sel_blocks = 1, c.sel_init_blocks = 0;
    edge("n 1, only the local block", c, 2, 37);
    c = tiny(), c.sel_blocks = 5, c.sel_init_blocks = 3, c.sel_local_blocks = 2;
    edge("only forced blocks", c, 2, 75);
    c = tiny(), c.num_key_value_heads = 4;
    edge("KV = H", c, 2, 37);
    c.num_key_value_heads = 1;
    edge("KV = 1", c, 2, 37);
    c.num_attention_heads = 1;
    edge("H = 1", c, 2, 37);
    c = tiny(), c.window = 1;
    edge("window 1", c, 2, 37);
    c.window = 1 << 30;
    edge("window over everything", c, 2, 37);
    c = tiny(), c.head_dim = 2, c.v_head_dim = 1;
    edge("D 2, Dv 1", c, 2, 37);
    c = tiny(), c.head_dim = 22, c.v_head_dim = 31, c.hidden_size = 5;
    edge("H*D over C", c, 2, 37);
    c = tiny(), c.num_hidden_layers = 1, c.hidden_size = 1, c.intermediate_size = 1, c.vocab_size = 2;
    edge("one layer, one channel, two words", c, 2, 37);
    c = tiny(), c.attention = ATTENTION_FULL;
    edge("full, one token", c, 2, 1);
    edge("moe, one token", tiny_moe(4, 1, 2, 0), 1, 1);
    edge("moe, one token, capacity", tiny_moe(8, 0, 1, 0.01), 1, 1);
    edge("moe, all experts", tiny_moe(3, 2, 3, 0), 2, 37);
    edge("moe, more experts than tokens", tiny_moe(40, 1, 2, 1), 1, 9);
    c = tiny_moe(4, 1, 2, 0), c.first_dense_layers = 2;
    edge("moe, all layers dense", c, 2, 20);
    set_threads(3);
    edge("three threads", tiny(), 1, 45);
    edge("three threads, three sequences", tiny_moe(4, 1, 2, 0), 3, 45);

    // A batch smaller than the memory that was taken gives what it gives in its own.
    set_threads(2);
    c = tiny();
    Model own, larger;
    const StepInfo info = plain_step();
    make_model(&own, &c, 2, 29, 0, 1);
    make_model(&larger, &c, 4, 47, 0, 1);
    const int *tokens = random_tokens(59, c.vocab_size);
    model_forward_backward(&own, tokens, tokens + 1, 2, 29, &info);
    model_forward_backward(&larger, tokens, tokens + 1, 2, 29, &info);
    check(own.loss == larger.loss && !memcmp(own.grads, larger.grads, (size_t)own.num_elements * sizeof(real)),
          "a small batch in a large memory differs");
    model_free(&own);
    model_free(&larger);
}

// ----------------------------------------------------------------------------
// 8. Dropout

static void test_dropout(void) {
    const int64_t n = 40000;
    const double p = 0.3;
    real *ones = zeros(n), *x, *y;
    for (int64_t i = 0; i < n; i++) ones[i] = 1;
    x = copy(ones, n);
    dropout_apply(x, n, 0, p, 42, 7, 3);
    int64_t dropped = 0, other = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t word[4];
        const uint32_t counter[4] = {(uint32_t)(i / 4), 0, 3, 7}, key[2] = {42, 0};
        philox4x32(word, counter, key);
        const int drop = (double)word[i % 4] < floor(p * 4294967296.0);
        dropped += x[i] == 0;
        other += drop ? x[i] != 0 : fabs((double)x[i] - 1 / (1 - p)) > 1e-6;
    }
    check(other == 0, "dropout: %d of %d elements are not what Philox says", (int)other, (int)n);
    check(fabs((double)dropped / (double)n - p) < 5 * sqrt(p * (1 - p) / (double)n), "dropout drops %d of %d at p = %g", (int)dropped, (int)n, p);
    for (int64_t from = 1; from < 9; from++) {       // any piece of it
        y = copy(ones, 1000);
        dropout_apply(y, 1000, from * 777, p, 42, 7, 3);
        check(!memcmp(y, x + from * 777, 1000 * sizeof(real)), "dropout from element %d on", (int)from * 777);
    }
    const struct { uint64_t seed; int64_t step; int site; } others[] = {{43, 7, 3}, {42 + (1ull << 32), 7, 3}, {42, 8, 3}, {42, 7, 4}, {42, 3, 7}};
    for (int i = 0; i < 5; i++) {
        int64_t same = 0;
        y = copy(ones, n);
        dropout_apply(y, n, 0, p, others[i].seed, others[i].step, others[i].site);
        for (int64_t j = 0; j < n; j++) same += x[j] == y[j];
        const double chance = p * p + (1 - p) * (1 - p);
        check(fabs((double)same / (double)n - chance) < 5 * sqrt(chance * (1 - chance) / (double)n),
              "dropout masks of another seed, step or site agree in %d of %d", (int)same, (int)n);
    }
    y = copy(ones, n);
    dropout_apply(y, n, 0, 0, 42, 7, 3);
    check(!memcmp(y, ones, (size_t)n * sizeof(real)), "dropout 0 changes something");
    release();

    // A batch of 4 is 2 and 2, or 1 and 3.
    const Config c = tiny();
    const int64_t T = 21;
    Model m;
    make_model(&m, &c, 4, T, 0, 1);
    const int *tokens = random_tokens(4 * T, c.vocab_size), *targets = random_tokens(4 * T, c.vocab_size);
    StepInfo info = {0.25, 11, 5, 8, 1.0, 1};
    model_zero_grads(&m);
    const double loss = model_forward_backward(&m, tokens, targets, 4, T, &info);
    real *whole = copy(m.grads, m.num_elements);
    for (int first = 1; first <= 2; first++) {
        double sum = 0;
        model_zero_grads(&m);
        for (int part = 0; part < 2; part++) {
            const int at = part * first, size = part ? 4 - first : first;
            StepInfo half = info;
            half.first_sequence += at;
            half.grad_scale = size / 4.0;
            sum += model_forward_backward(&m, tokens + at * T, targets + at * T, size, T, &half) * size / 4;
        }
        within(difference(m.grads, whole, m.num_elements), 1e-12, 1e-5, "gradient of two micro-batches with dropout");
        within(fabs(sum - loss) / loss, 1e-12, 1e-5, "loss of two micro-batches with dropout");
    }
    for (int change = 0; change < 4; change++) {
        StepInfo o = info;
        o.step += change == 0, o.seed += change == 1, o.first_sequence += change == 2, o.dropout = change == 3 ? 0 : o.dropout;
        check(model_forward_backward(&m, tokens, targets, 4, T, &o) != loss, "dropout does not depend on what it must (%d)", change);
    }
    info.dropout = 0;
    check(model_forward_backward(&m, tokens, targets, 4, T, &info) == model_evaluate(&m, tokens, targets, 4, T), "dropout 0 is no evaluation");
    info.dropout = 0.25;
    check(model_evaluate(&m, tokens, targets, 4, T) != loss, "evaluation drops");
    model_free(&m);

    // grad_scale multiplies the router's own gradients too.
    const Config moe = tiny_moe(4, 1, 2, 0.8);
    make_model(&m, &moe, 4, T, 0, 1);
    info.grad_scale = 1;
    model_forward_backward(&m, tokens, targets, 4, T, &info);
    real *full = copy(m.grads, m.num_elements);
    for (int64_t i = 0; i < m.num_elements; i++) full[i] *= (real)0.25;
    model_zero_grads(&m);
    info.grad_scale = 0.25;
    model_forward_backward(&m, tokens, targets, 4, T, &info);
    for (int i = 0; i < m.num_params; i++) {
        const Param *one = &m.params[i];
        within(difference(m.grads + one->offset, full + one->offset, one->count), 1e-12, 1e-5, one->name);
    }
    model_free(&m);
}

// ----------------------------------------------------------------------------
// 9. AdamW

static void test_adamw(void) {
    Config c = tiny_moe(3, 1, 2, 0);
    c.tie_word_embeddings = 0, c.first_dense_layers = 1, c.hidden_size = 40, c.vocab_size = 150;
    for (int gate = 0; gate < 3; gate++) {
        c.gate = gate, c.compress = gate;
        Model m;
        make_model(&m, &c, 1, 8, 0, 1);
        const int64_t n = m.num_elements;
        const double lr = 0.01, b1 = 0.9, b2 = 0.95, eps = 1e-4, decay = 0.3, clip = 0.7;
        double *w = doubles(n), *a = doubles(n), *v = doubles(n), *start = doubles(n);
        for (int64_t i = 0; i < n; i++) start[i] = w[i] = (double)m.weights[i];
        int decaying = 0;
        for (int t = 1; t <= 4; t++) {
            fill(m.grads, n);
            double squares = 0;
            for (int64_t i = 0; i < n; i++) squares += (double)m.grads[i] * (double)m.grads[i];
            within(fabs(model_grad_norm(&m) - sqrt(squares)) / sqrt(squares), 1e-12, 1e-12, "norm of the gradient");
            model_adamw(&m, lr, b1, b2, eps, decay, t, clip);
            for (int i = 0; i < m.num_params; i++) {
                const Param *p = &m.params[i];
                const char *name = p->name, *end = name + strlen(name);
                const int norm = strstr(name, "layernorm") || !strcmp(name, "model.norm.weight");
                const int decays = !norm && !strcmp(end - 7, ".weight");
                decaying += t == 1 && decays;
                for (int64_t j = p->offset; j < p->offset + p->count; j++) {
                    const double g = (double)m.grads[j] * clip;
                    a[j] = b1 * a[j] + (1 - b1) * g;
                    v[j] = b2 * v[j] + (1 - b2) * g * g;
                    const double m_hat = a[j] / (1 - pow(b1, t)), v_hat = v[j] / (1 - pow(b2, t));
                    w[j] -= lr * (m_hat / (sqrt(v_hat) + eps) + (decays ? decay : 0) * w[j]);
                }
            }
        }
        double moved = 0;
        for (int i = 0; i < m.num_params; i++) {       // the way each tensor has gone
            const Param *p = &m.params[i];
            real *way = zeros(p->count);
            double *exact = doubles(p->count);
            for (int64_t j = 0; j < p->count; j++) {
                way[j] = (real)((double)m.weights[p->offset + j] - start[p->offset + j]);
                exact[j] = w[p->offset + j] - start[p->offset + j];
                moved += fabs(exact[j]);
            }
            within(error_of(way, exact, p->count, 1e-30), 1e-11, 1e-4, p->name);
        }
        within(error_of(m.adam_m, a, n, 0), 1e-13, 1e-6, "AdamW's mean");
        within(error_of(m.adam_v, v, n, 0), 1e-13, 1e-6, "AdamW's square");
        // embedding, head; each layer q 1, k 3, v 3, o 1, the gate's and phi's; ffn 3; moe: router, 3 experts and 1 shared
        const int gates[] = {1, 1, 0}, phi[] = {4, 4, 2};
        check(decaying == 2 + 2 * (8 + gates[gate] + phi[gate]) + 3 + 1 + 4 * 3, "%d tensors decay", decaying);
        check(moved > 0, "AdamW moves nothing");
        model_free(&m);
        release();
    }
    // several chunks of the sum
    Config wide = tiny();
    wide.vocab_size = 20000;
    Model m;
    make_model(&m, &wide, 1, 1, 0, 1);
    fill(m.grads, m.num_elements);
    const double norm = model_grad_norm(&m);
    within(fabs(norm - sqrt(inner(m.grads, m.grads, m.num_elements))) / norm, 1e-12, 1e-12, "norm of a long gradient");
    set_threads(3);
    check(model_grad_norm(&m) == norm, "the norm depends on the threads");
    model_free(&m);
}

// ----------------------------------------------------------------------------
// 10. The same bits

static void test_determinism(void) {
    Config cases[] = {tiny(), tiny(), tiny(), tiny_moe(4, 1, 2, 0.9)};
    cases[1].num_key_value_heads = 1, cases[1].compress = COMPRESS_CONV1D, cases[1].gate = GATE_Q_COND;
    cases[2].full_layer[0] = 1, cases[2].vocab_size = 400, cases[2].hidden_size = 80;
    for (int i = 0; i < 4; i++) {
        const int64_t B = 1 + i % 2, T = i == 1 ? 450 : 120;     // 450: more than a tile of queries, whose dk threads share
        const int *tokens = random_tokens(B * T, cases[i].vocab_size), *targets = random_tokens(B * T, cases[i].vocab_size);
        const StepInfo info = {0.1, 2, 3, 4, 1.0, 1};
        real *first = NULL;
        int *choice = NULL;
        for (int threads = 1; threads <= 3; threads++) {
            set_threads(threads);
            real *here = NULL;
            double loss = 0;
            for (int run = 0; run < 3; run++) {        // the third one recomputes
                Model m;
                make_model(&m, &cases[i], B, T, run == 2 ? 2 : 0, 1);
                const int64_t n = m.num_elements, blocks = B * T * cases[i].num_key_value_heads * cases[i].sel_blocks;
                model_forward_backward(&m, tokens, targets, B, T, &info);
                if (run == 0) here = copy(m.grads, n), loss = m.loss;
                check(loss == m.loss && !memcmp(here, m.grads, (size_t)n * sizeof(real)), "case %d, %d threads: run %d has other bits", i,
                      threads, run);
                if (!first) {
                    first = copy(m.grads, n);
                    choice = ints(blocks);
                    memcpy(choice, m.acts[1].block_idx, (size_t)blocks * sizeof(int));
                }
                within(difference(m.grads, first, n), 1e-12, 2e-5, "threads 1, 2, 3");
                if (run < 2) check(!memcmp(choice, m.acts[1].block_idx, (size_t)blocks * sizeof(int)),
                    "case %d: %d threads choose other blocks", i, threads);
                model_free(&m);
            }
        }
        release();
    }
}

// ----------------------------------------------------------------------------
// 11. Small functions

static void test_small_functions(void) {
    double error = 0, slope_error = 0, gelu_error = 0, sigmoid_error = 0;
    for (int i = 0; i <= 400000; i++) {
        const real x = (real)(-87 + 175.0 * i / 400000);
        const double e = fabs((double)fast_exp(x) / exp((double)x) - 1);
        error = e > error ? e : error;
    }
    within(error, 1e-15, 3e-7, "fast_exp, relative");
    check(fast_exp(0) == 1 && fast_exp(-INFINITY) == 0 && fast_exp(-1e4f) == 0 && fast_exp(-1e30f) == 0, "fast_exp of 0, -10000 and -inf");
    const real nan = fast_exp((real)NAN), minus_nan = fast_exp(-(real)NAN);
    check(nan != nan && minus_nan != minus_nan, "fast_exp of NaN");
    for (real x = -95; x < -80; x += (real)0.01) check(fast_exp(x) >= 0 && (double)fast_exp(x) <= exp((double)x) * 1.001, "fast_exp(%g)", (double)x);
    check(fast_exp(1000) > 1e37f, "fast_exp of 1000");
    for (int i = -6000; i <= 6000; i++) {
        const double x = (double)(real)(i / 500.0), u = sqrt(2 / M_PI) * (x + 0.044715 * x * x * x), t = tanh(u);
        const double slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * sqrt(2 / M_PI) * (1 + 3 * 0.044715 * x * x);
        gelu_error = fmax(gelu_error, fabs((double)gelu((real)x) - 0.5 * x * (1 + t)));
        slope_error = fmax(slope_error, fabs((double)gelu_slope((real)x) - slope));
        sigmoid_error = fmax(sigmoid_error, fabs((double)sigmoid((real)x) - 1 / (1 + exp(-x))));
    }
    within(gelu_error, 1e-14, 2e-6, "gelu");
    within(slope_error, 1e-13, 5e-6, "gelu_slope");
    within(sigmoid_error, 1e-15, 3e-7, "sigmoid");
    check(sigmoid(200) == 1 && sigmoid(-200) < 1e-37f && sigmoid(-200) >= 0, "sigmoid of 200 and -200");
    real *a = randoms(1003), *b = randoms(1003);
    for (int n = 0; n < 40; n++) within(fabs((double)dot(a, b, n) - inner(a, b, n)), 1e-14, 1e-5, "dot");
}

// ----------------------------------------------------------------------------
// 12. The table and the init

// Section 3 of the design, added up.
static int64_t expected_params(const Config *c) {
    const int64_t C = c->hidden_size, H = c->num_attention_heads, KV = c->num_key_value_heads, D = c->head_dim, Dv = c->v_head_dim, l = c->cmp_block;
    int64_t n = c->vocab_size * C * (c->tie_word_embeddings ? 1 : 2) + C;
    for (int i = 0; i < c->num_hidden_layers; i++) {
        n += 2 * C + C * H * D + C * H * Dv;
        if (c->attention == ATTENTION_FULL || c->full_layer[i]) {
            n += C * KV * (D + Dv);
        } else {
            n += 3 * C * KV * (D + Dv);
            n += c->gate == GATE_INPUT ? 3 * H * (C + 1) : c->gate == GATE_Q_COND ? 3 * H * (D + 1) : 3 * H;
            for (int v = 0; v < 2; v++) {
                const int64_t d = v ? Dv : D, mlp = 2 * d * l * d + 2 * d + 2 * d * d + d;
                if (c->compress == COMPRESS_MLP) n += l * d + mlp;
                if (c->compress == COMPRESS_GROUPED_MLP) n += l * d + KV * mlp;
                if (c->compress == COMPRESS_CONV1D) n += KV * (d * l * d + d);
            }
        }
        if (c->num_experts == 0 || i < c->first_dense_layers) n += 3 * C * c->intermediate_size;
        else n += C * c->num_experts + 3 * C * c->moe_intermediate_size * (c->num_experts + c->num_shared_experts);
    }
    return n;
}

static void test_init(void) {
    Config c = tiny_moe(3, 2, 2, 0);
    c.num_hidden_layers = 3, c.first_dense_layers = 1, c.full_layer[2] = 1;
    for (int i = 0; i < 12; i++) {
        c.compress = i % 4, c.gate = i % 3, c.tie_word_embeddings = i % 2;
        check(count_params(&c) == expected_params(&c), "count_params: %d, the formula says %d", (int)count_params(&c), (int)expected_params(&c));
    }
    c.attention = ATTENTION_FULL;
    check(count_params(&c) == expected_params(&c), "count_params of full attention");

    const double gate_init[BRANCHES] = {-2.5, -1.5, 3.5};
    for (int gate = 0; gate < 3; gate++) {
        c = tiny_moe(2, 1, 2, 0);
        c.gate = gate, c.compress = gate, c.num_hidden_layers = 5, c.hidden_size = 64, c.intermediate_size = 64, c.moe_intermediate_size = 48;
        c.head_dim = c.v_head_dim = 16, c.vocab_size = 500, c.first_dense_layers = 1, c.num_attention_heads = 6, c.tie_word_embeddings = 0;
        Model m, again, other;
        model_create(&m, &c), model_create(&again, &c), model_create(&other, &c);
        model_init(&m, 17, gate_init);
        set_threads(3);
        model_init(&again, 17, gate_init);
        model_init(&other, 18, gate_init);
        check(!memcmp(m.weights, again.weights, (size_t)m.num_elements * sizeof(real)), "the same seed gives other weights");
        int64_t offset = 0;
        int gates = 0;
        for (int i = 0; i < m.num_params; i++) {
            const Param *p = &m.params[i];
            const real *w = m.weights + p->offset;
            const char *name = p->name;
            check(p->offset == offset, "%s does not follow the tensor before it", name);
            offset += p->count;
            for (int j = 0; j < i; j++) check(strcmp(m.params[j].name, name) != 0, "two tensors are called %s", name);
            int wrong = 0;
            if (strstr(name, "norm")) {
                for (int64_t j = 0; j < p->count; j++) wrong += w[j] != 1;
                check(wrong == 0, "%s does not start as 1", name);
            } else if (strstr(name, ".bias")) {
                const int of_gate = !strstr(name, "compress_");
                gates += of_gate;
                for (int64_t j = 0; j < p->count; j++) wrong += w[j] != (of_gate ? (real)gate_init[j % 3] : 0);
                check(wrong == 0, "%s does not start as it should", name);
                check(!of_gate || p->count == 3 * c.num_attention_heads, "%s has %d numbers", name, (int)p->count);
            } else {
                const double sd = strstr(name, "o_proj") || strstr(name, "down_proj") ? 0.02 / sqrt(2 * 5) : 0.02, n = (double)p->count;
                double mean = 0, square = 0, fourth = 0;
                for (int64_t j = 0; j < p->count; j++) {
                    const double z = (double)w[j] / sd;
                    mean += z / n, square += z * z / n, fourth += z * z * z * z / n;
                }
                check(fabs(mean) < 5 / sqrt(n) && fabs(square - 1) < 5 * sqrt(2 / n) && fabs(fourth - 3) < 6 * sqrt(96 / n),
                      "%s: moments %.3f %.3f %.3f of %d numbers are not normal(0, %.4f)", name, mean, square, fourth, (int)n, sd);
                check(memcmp(w, other.weights + p->offset, (size_t)p->count * sizeof(real)) != 0, "%s does not depend on the seed", name);
            }
        }
        check(gates == 5, "%d gate biases in 5 layers", gates);
        check(offset == m.num_elements && offset == count_params(&c), "the table has holes");
        model_free(&m), model_free(&again), model_free(&other);
    }
}

// ----------------------------------------------------------------------------
// 13. Memory

static void test_memory(void) {
    for (int preset = 0; preset < 4; preset++)
        for (int train = 0; train < 2; train++)
            for (int recompute = 0; recompute <= 2; recompute++) {
                Config c = config_default();
                c.vocab_size = 256;
                config_preset(&c, preset);
                config_complete(&c);
                for (int64_t T = 1024; 4 * T <= 65536; T *= 2) {
                    const double ratio = (double)model_bytes(&c, 1, 4 * T, recompute, train, NULL) / (double)model_bytes(&c, 1, T,
                        recompute, train, NULL);
                    check(ratio < 4.3, "preset %d, recompute %d, training %d: %d tokens take %.2f times the memory of %d", preset,
                          recompute, train, (int)(4 * T), ratio, (int)T);
                }
            }
    Config c = config_default();
    c.vocab_size = 256, c.num_hidden_layers = 8;
    config_complete(&c);
    const int64_t all = model_bytes(&c, 1, 4096, 0, 1, NULL), ffn = model_bytes(&c, 1, 4096, 1, 1, NULL), most = model_bytes(&c, 1, 4096, 2, 1, NULL);
    check(most < ffn && ffn < all, "recompute saves nothing: %d, %d, %d MB", (int)(all >> 20), (int)(ffn >> 20), (int)(most >> 20));
    check(model_bytes(&c, 1, 4096, 0, 0, NULL) < most, "evaluation takes more than training");
    Text table = {NULL, 0, 0};
    model_bytes(&c, 1, 4096, 0, 1, &table);
    check(table.data && strstr(table.data, "AdamW state") && strstr(table.data, "total"), "the table of the memory");
    free(table.data);
}

// ----------------------------------------------------------------------------

static void run_section(const char *name, void (*test)(void)) {
    const double start = now_seconds();
    worst = 0;
    test();
    release();
    set_threads(2);
    printf("%-24s %6.2f s   worst error %.1e\n", name, now_seconds() - start, worst);
    fflush(stdout);
}

int main(void) {
    run_section("fixtures", test_fixtures);
    run_section("layers", test_layers);
    run_section("whole models", test_whole_models);
    run_section("attention", test_attention);
    run_section("matrix products", test_products);
    run_section("selection", test_selection);
    run_section("causality", test_causality);
    run_section("sizes at the edge", test_edges);
    run_section("dropout", test_dropout);
    run_section("AdamW", test_adamw);
    run_section("determinism", test_determinism);
    run_section("small functions", test_small_functions);
    run_section("init", test_init);
    run_section("memory", test_memory);
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
