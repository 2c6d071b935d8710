// Tests of sample.c: decoding with a cache gives the logits of the training forward, token by token, for every kind of
// model; tokens are drawn from the right distribution. Run from the root of the repository:
//     make build/test_sample && build/test_sample
// test_sample.cu compiles it once more, with the GPU's decoder.

#define SAMPLE_NO_MAIN
#include "../sample.c"
#include "test/check.h"

// ----------------------------------------------------------------------------
// Models. Each row changes a few fields of the first.

typedef struct Case { const char *name, *change; } Case;     // change: option names of train_nsa and their values

static const Case cases[] = {
    {"mlp", ""},
    {"grouped_mlp", "--compress grouped_mlp"},
    {"conv1d", "--compress conv1d"},
    {"avgpool", "--compress avgpool"},
    {"gate q_cond", "--gate q_cond"},
    {"gate static", "--gate static --compress grouped_mlp"},
    {"full", "--attention full"},
    {"full, KV = 1", "--attention full --kv-heads 1"},
    {"hybrid", "--full-layers 0"},
    {"hybrid, last", "--full-layers 1 --compress conv1d"},
    {"KV = 1", "--kv-heads 1"},
    {"KV = H", "--kv-heads 4"},
    {"group of 3", "--heads 6 --kv-heads 2 --head-dim 4"},
    {"wide values", "--v-head-dim 12"},
    {"narrow values", "--v-head-dim 3 --compress grouped_mlp"},
    {"l = d", "--cmp-stride 8"},
    {"d = 1", "--cmp-stride 1"},
    {"l = d = 1, l' = 1", "--cmp-block 1 --cmp-stride 1 --sel-block 1 --sel-blocks 5"},
    {"l = l' = 2d", "--sel-block 8 --sel-blocks 4"},
    {"l' = 3d", "--cmp-block 4 --cmp-stride 4 --sel-block 12"},
    {"forced blocks only", "--sel-blocks 3"},
    {"all blocks", "--sel-blocks 100"},
    {"2 first, 3 local", "--sel-init 2 --sel-local 3 --sel-blocks 6 --sel-block 8"},
    {"no first block", "--sel-init 0 --sel-local 1 --sel-blocks 2 --sel-block 8"},
    {"window of 1", "--window 1"},
    {"window over all", "--window 1000"},
    {"block over all", "--cmp-block 128 --cmp-stride 64 --sel-block 128"},
    {"untied, theta", "--untied-head 1 --rope-theta 500"},
    {"MoE", "--experts 5 --shared-experts 1 --experts-per-token 2 --expert-width 16"},
    {"MoE, k = 1, capacity", "--experts 4 --experts-per-token 1 --expert-width 8 --capacity-factor 0.5 --dense-layers 1"},
    {"everything", "--experts 3 --expert-width 8 --full-layers 1 --compress grouped_mlp --gate q_cond --v-head-dim 6 --untied-head 1 --kv-heads 1"},
};
enum { CASES = sizeof cases / sizeof cases[0], LENGTH = 75, ROWS = 3, VOCAB = 19 };

#ifndef EVERY
#define EVERY 1         // of the texts below one in so many is decoded
#endif

Config case_config(const Case *test) {
    char words[512], *argv[64] = {NULL}, err[ERR_LEN];
    int argc = 1;
    Options o = options_default();
    Config c;
    snprintf(words, sizeof words, "--layers 2 --width 24 --heads 4 --kv-heads 2 --head-dim 8 --ffn-width 40 --vocab %d --seq-len 32 --cmp-block 8 "
             "--cmp-stride 4 --sel-block 16 --sel-blocks 4 --window 9 %s", VOCAB, test->change);
    for (char *word = strtok(words, " "); word; word = strtok(NULL, " ")) argv[argc++] = word;
    options_parse(train_options, TRAIN_OPTIONS, &o, o.given, argc, argv);
    config_from_options(&c, &o, NULL);
    if (config_validate(&c, err) < 0) die(1, "%s: %s", test->name, err);
    return c;
}

// Weights far from where training starts, so that attention and choices are sharp.
void make_model(Model *m, const Config *c, uint64_t seed) {
    const double gate_init[BRANCHES] = {0.5, -0.5, 0.2};
    model_create(m, c);
    model_init(m, seed, gate_init);
    for (int64_t i = 0; i < m->num_elements; i++) m->weights[i] += (real)0.15 * normal_at(seed, 1000, (uint64_t)i);
}

void random_tokens(int *tokens, int64_t n, uint64_t seed) {
    Rng rng = {seed, 77, 0};
    for (int64_t i = 0; i < n; i++) tokens[i] = (int)rng_below(&rng, VOCAB);
}

double row_norm(const real *a, int64_t n) {
    double norm = 0;
    for (int64_t i = 0; i < n; i++) norm += (double)a[i] * (double)a[i];
    return sqrt(norm);
}

double row_error(const real *a, const real *b, int64_t n) {
    double difference = 0;
    for (int64_t i = 0; i < n; i++) difference += (double)(a[i] - b[i]) * (double)(a[i] - b[i]);
    return sqrt(difference) / row_norm(b, n);
}

int likeliest(const real *x, int64_t n) {
    int best = 0;
    for (int64_t i = 1; i < n; i++)
        if (x[i] > x[best]) best = (int)i;
    return best;
}

// How much the likeliest leads: greedy tokens must agree wherever this is more than 1e-3.
double lead(const real *x, int64_t n) {
    const int best = likeliest(x, n);
    double second = -INFINITY;
    for (int64_t i = 0; i < n; i++)
        if (i != best && (double)x[i] > second) second = (double)x[i];
    return (double)x[best] - second;
}

// ----------------------------------------------------------------------------
// Cached decoding against the training forward

// What decoding differs by from the training forward: the worst error of a token's logits, that of all logits together, and how many
// greedy tokens.
typedef struct Difference { double worst, all; int greedy; } Difference;

// Decodes ROWS (or 1) texts that share their first `prompt` tokens and then differ.
Difference decode_difference(Model *m, int prompt, int rows, uint64_t seed) {
    const int64_t V = m->config.vocab_size;
    int *tokens = (int *)xmalloc(ROWS * LENGTH * sizeof(int)), step[ROWS];
    real *wanted = (real *)xmalloc((size_t)(ROWS * LENGTH * V) * sizeof(real));
    Difference found = {0, 0, 0};
    double difference = 0, norm = 0;
    Decoder d;
    random_tokens(tokens, ROWS * LENGTH, seed);
    for (int r = 1; r < rows; r++) memcpy(tokens + r * LENGTH, tokens, (size_t)prompt * sizeof(int));
    model_alloc(m, rows, LENGTH, 0, 0);
    model_logits(m, tokens, rows, LENGTH, wanted, 0);
    decoder_create(&d, m, rows);
    const real *got = decoder_prefill(&d, tokens, prompt, NULL, NULL);
    for (int t = prompt - 1;; t++) {
        for (int r = 0; r < rows; r++) {
            const real *w = wanted + (r * LENGTH + t) * V;
            const double error = row_error(got + r * V, w, V), size = row_norm(w, V);
            if (!(error <= found.worst)) found.worst = error;
            difference += error * error * size * size;
            norm += size * size;
            if (lead(w, V) > 1e-3) found.greedy += likeliest(got + r * V, V) != likeliest(w, V);
        }
        if (t == LENGTH - 1) break;
        for (int r = 0; r < rows; r++) step[r] = tokens[r * LENGTH + t + 1];
        got = decoder_step(&d, step);
    }
    decoder_free(&d);
    free(tokens);
    free(wanted);
    found.all = sqrt(difference / norm);
    return found;
}

void test_decoding(void) {
    const double tolerance = sizeof(real) == 4 ? 1e-4 : 1e-10;
    int ties = 0;
    double worst = 0;
    for (int i = 0; i < CASES; i++) {
        const Config c = case_config(&cases[i]);
        const int l = c.cmp_block < LENGTH ? c.cmp_block : 8, prompts[] = {1, l > 1 ? l - 1 : 2, l, l + 1, c.sel_block < LENGTH ? c.sel_block : 16, 33, LENGTH};
        for (int p = 0; p < 7; p++)
            for (int rows = 1; rows <= ROWS; rows += ROWS - 1) {
                if ((14 * i + 2 * p + rows / ROWS) % EVERY) continue;
                Difference found = {0, 0, 0};
                // Two blocks of nearly the same importance may change places by a rounding error. In float that happens once
                // in some thousand tokens: such a text gets one more chance, and there may only be a few of them.
                for (uint64_t seed = 1; seed <= 2; seed++) {
                    Model m;
                    make_model(&m, &c, seed);
                    found = decode_difference(&m, prompts[p], rows, seed * 100 + (uint64_t)p);
                    model_free(&m);
                    if (found.worst <= tolerance && !found.greedy) break;
                    ties += seed == 1;
                }
                check(found.worst <= tolerance && !found.greedy, "%s: prompt of %d, batch of %d: error %.3g, %d greedy tokens differ", cases[i].name, prompts[p], rows, found.worst, found.greedy);
                if (found.worst > worst) worst = found.worst;
            }
    }
    check(ties <= (sizeof(real) == 4 ? 4 : 0), "%d of the texts needed a second chance", ties);
    printf("cached decoding: worst error %.2g, %d second chances\n", worst, ties);
}

#ifdef NSA_CU
// samplecu --dtype bf16 against the CPU's f32, from weights that bf16 holds exactly. What is rounded to 8 bits is what goes into the caches,
// q, and the softmax's weights; a prompt is read by training's forward in bf16, which rounds the residual stream too. A choice that
// turns out the other way is not an error, but changes a token's logits: hence the error of all of a text's logits together.
static const Case bf16_cases[] = {
    {"simple", ""},
    {"simple, everything", "--experts 3 --expert-width 8 --full-layers 1 --compress grouped_mlp --gate q_cond --v-head-dim 6 --untied-head 1 --kv-heads 1"},
    {"simple, choosing more than the fast tier does", "--head-dim 64 --heads 2 --kv-heads 1 --cmp-block 1 --cmp-stride 1 --sel-block 1 --sel-blocks 66"},
    {"D = 64", "--head-dim 64"},
    {"D = 64, group of 16", "--head-dim 64 --heads 16 --kv-heads 1"},
    {"D = 64, group of 17", "--head-dim 64 --heads 17 --kv-heads 1 --compress conv1d"},
    {"D = 64, choosing often", "--head-dim 64 --cmp-block 4 --cmp-stride 2 --sel-block 4 --sel-blocks 6"},
    {"D = 64, choosing most", "--head-dim 64 --cmp-block 1 --cmp-stride 1 --sel-block 1 --sel-blocks 40 --window 3"},
    {"D = 64, blocks as they are forced", "--head-dim 64 --sel-init 2 --sel-local 3 --sel-blocks 5 --sel-block 4 --cmp-block 4"},
    {"D = 64, full", "--head-dim 64 --attention full"},
    {"D = 64, hybrid", "--head-dim 64 --full-layers 0 --compress avgpool --window 40"},
    {"D = 64, MoE", "--head-dim 64 --experts 5 --shared-experts 1 --experts-per-token 2 --expert-width 16"},
    {"D = 128", "--head-dim 128 --heads 3 --kv-heads 1 --compress grouped_mlp --gate q_cond"},
    {"D = 128, hybrid", "--head-dim 128 --heads 2 --kv-heads 2 --full-layers 1 --gate static"},
    {"D = 192 and 128", "--head-dim 192 --v-head-dim 128 --heads 4 --kv-heads 2"},
    {"D = 64, many lists", "--head-dim 64 --heads 17 --kv-heads 17"},
    {"D = 128, long blocks", "--head-dim 128 --cmp-block 48 --cmp-stride 16 --sel-block 48"},
    {"D = 64, long blocks, convolution", "--head-dim 64 --compress conv1d --cmp-block 48 --cmp-stride 16 --sel-block 48"},
};
enum { BF16_CASES = sizeof bf16_cases / sizeof bf16_cases[0] };

void test_bf16(void) {
    const double tolerance = 2e-2;
    double worst = 0;
    for (int i = 0; i < BF16_CASES; i++) {
        Config c = case_config(&bf16_cases[i]);
        Model m;
        Working tier;
        c.torch_dtype = DTYPE_BF16;
        choose_tier(&tier, &c, 1, LENGTH);
        check(tier.fast == (strncmp(bf16_cases[i].name, "simple", 6) != 0), "%s: the tier", bf16_cases[i].name);
        make_model(&m, &c, 4);
        for (int64_t j = 0; j < m.num_elements; j++) m.weights[j] = bf16_to_float(float_to_bf16(m.weights[j]));
        for (int rows = 1; rows <= ROWS; rows += ROWS - 1) {
            const int prompt = rows == 1 ? 1 : 33;
            if (EVERY > 1 && rows == (i % 2 ? ROWS : 1)) continue;
            const Difference found = decode_difference(&m, prompt, rows, 300 + (uint64_t)i);
            printf("bf16, %s: prompt of %d, batch of %d: error %.2g, of a token %.2g at worst\n", bf16_cases[i].name, prompt, rows, found.all, found.worst);
            check(found.all <= tolerance, "bf16, %s: prompt of %d, batch of %d: error %.3g", bf16_cases[i].name, prompt, rows, found.all);
            if (found.all > worst) worst = found.all;
        }
        model_free(&m);
    }
    printf("cached decoding in bf16: worst error of a text %.2g\n", worst);
}

// Linear maps of few rows against sums in double: norm, sum with another, SwiGLU; sizes that are no multiple of anything, and longer than what waits in shared memory.
template <typename F>
static F *numbers_at(int64_t n, uint64_t stream, F **device) {
    F *x = (F *)xcalloc((size_t)n, sizeof *x);
    for (int64_t i = 0; i < n; i++) x[i] = (F)(float)normal_at(7, stream, (uint64_t)i);
    *device = (F *)device_malloc(n * (int64_t)sizeof *x);
    to_device(*device, x, n * (int64_t)sizeof *x);
    return x;
}
template <typename F>
static void test_linear_of(int rows, int c, int oc, int normed, int added, int swiglu) {
    const int64_t outputs = (int64_t)rows * oc;
    float *at[4];
    F *weight_at;
    float *x = numbers_at((int64_t)rows * c, 1, &at[0]), *norm = numbers_at((int64_t)c, 2, &at[1]), *add = numbers_at(outputs, 3, &at[2]), *out = numbers_at(outputs, 4, &at[3]);
    F *weight = numbers_at((int64_t)oc * (swiglu ? 2 : 1) * c, 5, &weight_at);
    linear<F>(NULL, at[3], added ? at[2] : NULL, normed ? at[1] : NULL, 1e-5, at[0], weight_at, rows, c, oc, swiglu);
    to_host(out, at[3], outputs * (int64_t)sizeof *out);
    double difference = 0, all = 0;
    for (int r = 0; r < rows; r++) {
        double square = 0;
        for (int j = 0; j < c; j++) square += (double)x[r * c + j] * (double)x[r * c + j];
        const double scale = normed ? 1 / sqrt(square / c + 1e-5) : 1;
        for (int o = 0; o < oc; o++) {
            double sum[2] = {0, 0};
            for (int part = 0; part <= swiglu; part++)
                for (int j = 0; j < c; j++) sum[part] += (double)x[r * c + j] * (normed ? (double)norm[j] : 1) * (double)(float)weight[(int64_t)(part * oc + o) * c + j];
            double y = sum[0] * scale;
            if (swiglu) y = y / (1 + exp(-y)) * sum[1] * scale;
            if (added) y += (double)add[r * oc + o];
            difference += ((double)out[r * oc + o] - y) * ((double)out[r * oc + o] - y);
            all += y * y;
        }
    }
    const double error = sqrt(difference / all);
    check(error < 1e-5, "linear, %s: %d rows of %d, %d outputs, norm %d, sum %d, SwiGLU %d: error %.3g", sizeof(F) == 2 ? "bf16" : "float", rows, c, oc, normed, added, swiglu, error);
    for (float *p : at) CUDA(cudaFree(p));
    CUDA(cudaFree(weight_at));
    free(x), free(norm), free(add), free(out), free(weight);
}
void test_linear(void) {
    static const int cases[][6] = {{1, 40, 5, 1, 0, 0}, {2, 8, 3, 0, 1, 0}, {3, 36, 10, 1, 0, 1}, {5, 13, 4, 1, 1, 0}, {9, 296, 33, 1, 1, 0}, {16, 776, 20, 1, 0, 1},
                                   {17, 264, 9, 0, 0, 1}, {33, 4200, 8, 0, 1, 0}, {4, 2312, 7, 1, 0, 1}, {6, 1048, 70, 1, 0, 0}, {2, 64, 17500, 1, 0, 0}};
    device_open();
    allow_linear();
    for (const auto &a : cases) {
        test_linear_of<float>(a[0], a[1], a[2], a[3], a[4], a[5]);
        test_linear_of<bf16>(a[0], a[1], a[2], a[3], a[4], a[5]);
    }
}
#endif

// Lines fed one after another are one text; room grows on the way.
void test_feeding(void) {
    const Config c = case_config(&cases[0]);
    Sampler s;
    int tokens[LENGTH];
    memset(&s, 0, sizeof s);
    s.options = sample_default();
    s.options.seed = 1;
    s.options.tokens = 3;
    s.config = c;
    tokenizer_bytes(&s.tokenizer);
    make_model(&s.model, &c, 3);
    sampler_create(&s);
    random_tokens(tokens, LENGTH, 5);
    real *wanted = (real *)xmalloc(VOCAB * sizeof(real));
    model_alloc(&s.model, 1, LENGTH, 0, 0);
    model_logits(&s.model, tokens, 1, LENGTH, wanted, 1);
    feed(&s, tokens, 10);
    const int64_t room = s.decoder.capacity;
    feed(&s, tokens + 10, 1);
    feed(&s, tokens + 11, 30);
    const real *got = feed(&s, tokens + 41, LENGTH - 41);
    check(room == 13 && s.decoder.capacity >= LENGTH && s.decoder.length == LENGTH, "the caches grow: %d, then %d for %d", (int)room, (int)s.decoder.capacity, (int)s.decoder.length);
    check(row_error(got, wanted, VOCAB) < 1e-4, "text in four parts: error %.3g", row_error(got, wanted, VOCAB));

    // a token that was drawn last and is not in the cache yet comes before the next line
    int64_t n;
    s.next[0] = 7;
    char err[ERR_LEN];
    int *ids = tokens_of(&s, "\x05\x06", 2, &n, err);
    check(n == 3 && ids[0] == 7 && ids[1] == 5 && ids[2] == 6, "the pending token comes first");
    free(ids);
    free(wanted);
    sampler_free(&s);
}

void test_cache_bytes(void) {
    const Config c = case_config(&cases[8]);    // layer 0 full, layer 1 NSA; KV 2, D = Dv = 8, l 8, d 4, w 9
    const int64_t width = 3 * 2 * 16 * (int64_t)sizeof(real);
    int64_t bytes[CACHE_KINDS];
    cache_bytes(bytes, &c, 3, 40);
    check(bytes[CACHE_FULL] == 40 * width && bytes[SLC] == 40 * width && bytes[WIN] == 9 * width && bytes[CMP] == (9 + 8) * width, "bytes of the caches");
}

// ----------------------------------------------------------------------------
// Drawing

enum { DRAWN = 12, DRAWS = 40000 };

// Exact probabilities, from the definition: sort, cut, divide.
void exact_probabilities(double *p, const real *logits, double temp, int top_k, double top_p) {
    int order[DRAWN];
    double sum = 0, mass = 0;
    for (int i = 0; i < DRAWN; i++) order[i] = i;
    for (int i = 1; i < DRAWN; i++)
        for (int j = i; j > 0 && logits[order[j]] > logits[order[j - 1]]; j--) { int x = order[j]; order[j] = order[j - 1]; order[j - 1] = x; }
    const int k = top_k && top_k < DRAWN ? top_k : DRAWN;
    for (int i = 0; i < DRAWN; i++) p[i] = 0;
    for (int i = 0; i < k; i++) sum += p[order[i]] = exp((double)logits[order[i]] / temp);
    int kept = 0;
    while (kept < k && (kept == 0 || mass < top_p * sum)) mass += p[order[kept++]];
    for (int i = 0; i < DRAWN; i++) p[i] /= mass;
    for (int i = kept; i < DRAWN; i++) p[order[i]] = 0;
}

void test_drawing(void) {
    const real logits[DRAWN] = {(real)0.3, 2, (real)-1.5, 2, (real)1.1, 0, (real)-0.2, (real)1.1, (real)0.9, -4, (real)1.7, (real)0.6};
    const struct { double temp; int top_k; double top_p; } how[] = {
        {1, 0, 1}, {0.7, 0, 1}, {1.6, 0, 1}, {1, 5, 1}, {1, 1, 1}, {0.8, 40, 1}, {1, 0, 0.5}, {1, 0, 0.93}, {1, 0, 0}, {0.9, 6, 0.8}, {2, 3, 0.999}, {1, 12, 0.6}};
    Candidate heap[DRAWN];
    for (int h = 0; h < (int)(sizeof how / sizeof how[0]); h++) {
        double p[DRAWN], chi = 0;
        int count[DRAWN] = {0}, freedom = -1, outside = 0;
        Rng rng = {42, (uint64_t)h, 0};
        exact_probabilities(p, logits, how[h].temp, how[h].top_k, how[h].top_p);
        for (int i = 0; i < DRAWS; i++) count[draw_token(logits, DRAWN, how[h].temp, how[h].top_k, how[h].top_p, &rng, heap)]++;
        for (int i = 0; i < DRAWN; i++) {
            if (p[i] > 0) {
                chi += (count[i] - p[i] * DRAWS) * (count[i] - p[i] * DRAWS) / (p[i] * DRAWS);
                freedom++;
            } else outside += count[i];
        }
        // chi-square has mean `freedom` and variance 2·freedom: six deviations and a little are as good as never
        check(!outside && chi < freedom + 6 * sqrt(2.0 * freedom) + 6, "temp %g top-k %d top-p %g: %d outside, chi-square %.1f with %d degrees", how[h].temp,
              how[h].top_k, how[h].top_p, outside, chi, freedom);
    }
    // Of a vocabulary as large as they are, all tokens above the k-th likeliest and no other: at such a temperature each comes 40 times on average, and never with
    // a probability of e^-40.
    enum { MANY = 5000, K = 25 };
    static real large[MANY];
    static Candidate place[MANY];
    static int times[MANY];
    Rng many = {7, 7, 0};
    for (int v = 0; v < MANY; v++) large[v] = (real)(v * 7919 % MANY) / MANY;       // a permutation
    for (int i = 0; i < 40 * K; i++) times[draw_token(large, MANY, 1e3, K, 1, &many, place)]++;
    int wrong = 0;
    for (int v = 0; v < MANY; v++) wrong += (times[v] > 0) != (v * 7919 % MANY >= MANY - K);
    check(!wrong, "top-k %d of %d tokens: %d are wrong", K, MANY, wrong);
    // A quarter of what all weigh together, nearly alike, is a quarter of the tokens
    int outside = 0, behind = 0;
    for (int i = 0; i < 2000; i++) {
        const int rank = MANY - 1 - draw_token(large, MANY, 1e6, 0, 0.25, &many, place) * 7919 % MANY;
        outside += rank > MANY / 4;
        behind += rank > MANY / 5;
    }
    check(!outside && behind > 0, "top-p 0.25 of %d tokens: %d are outside, %d in the last fifth", MANY, outside, behind);
    Rng rng = {1, 2, 3};
    check(draw_token(logits, DRAWN, 0, 0, 1, &rng, heap) == 1 && rng.counter == 3, "temperature 0 takes the lower of two likeliest");
    check(draw_token(logits, DRAWN, 1, 1, 1, &rng, heap) == 1, "so does top-k 1");
    check(draw_token(logits, DRAWN, 1e-30, 0, 1, &rng, heap) % 2 == 1, "a very low temperature");
    check(draw_token(logits, 1, 1, 3, 0.5, &rng, heap) == 0, "a vocabulary of one");
    Rng a = {9, 1, 0}, b = {9, 1, 0}, other = {9, 2, 0};
    int same = 1, differs = 0;
    for (int i = 0; i < 50; i++) {
        const int x = draw_token(logits, DRAWN, 1, 0, 0.9, &a, heap);
        same &= x == draw_token(logits, DRAWN, 1, 0, 0.9, &b, heap);
        differs |= x != draw_token(logits, DRAWN, 1, 0, 0.9, &other, heap);
    }
    check(same && differs, "a row's random stream is its own");
}

int main(void) {
    program_name = "test_sample";
    setvbuf(stdout, NULL, _IOLBF, 0);
#ifdef NSA_CU
    test_linear();
    test_bf16();
#endif
    test_decoding();
    test_feeding();
    test_cache_bytes();
    test_drawing();
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
