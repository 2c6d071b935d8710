/*
nsa.c: text from a trained model, one token at the cost of one token.

    make sample
    ./sample -e out/run_001/latest -p "Once upon a time"
    ./sample --help

Training computes all tokens of a text at once. Here each new token needs the keys and values of the old
ones, and they are kept. NSA makes that cheap to read:

    branch        kept for each layer              read for one token
    compression   one key a block, K~ and V~       all of them: t/d keys
    selection     all keys k_slc, v_slc            n blocks of l' keys
    window        the last w keys, in a ring       w keys
    full layers   all keys                         all of them: t keys

A block is compressed when its last token comes; until then its raw keys and values wait in a tail of at
most l tokens.

The sections: 1. decoding with a cache, 2. drawing a token, 3. the command line, 4. text in and out, main.

SPDX-License-Identifier: MIT
*/

#define NSA_NO_MAIN
#ifdef NSA_CU
#define NSA_CU_NO_MAIN
#include "train_nsa.cu"
#else
#include "train_nsa.c"
#endif
#include <sys/resource.h>

// ----------------------------------------------------------------------------
// 1. Decoding with a cache. The rest of the program sees a Decoder and four functions:
//   decoder_create, decoder_prefill (the prompt in one pass), decoder_step (one token more), decoder_free.

// Keys (rows,KV,slots,D) and values (rows,KV,slots,Dv): what one query reads lies together.
typedef struct KeyCache { real *k, *v; int64_t slots; } KeyCache;

typedef struct LayerCache {
    KeyCache branch[BRANCHES];      // a full-attention layer has the first one only, for every token
    real *tail[2];                  // (rows,l,KV·D), (rows,l,KV·Dv): raw k_cmp and v_cmp since the first token of the next block
} LayerCache;

typedef struct Decoder {
    Model *model;
    int rows;                       // texts side by side, all of the same length
    int64_t length, capacity;       // tokens in the caches, and how many they have room for
    LayerCache *layers;
    real *angles;                   // (2,D): RoPE of this token, and of the first token of the block it completes
    real *compressed, *hidden;      // a block that is being compressed: (rows,KV,D | Dv), (rows,KV,2D | 2Dv)
    real *scratch;                  // for each thread: scores (G,capacity), importance (capacity)
    real *logits;                   // (rows,V)
} Decoder;

int64_t cache_slots(const Config *c, int layer, int branch, int64_t capacity) {
    if (layer_is_full(c, layer) || branch == SLC) return capacity;
    return branch == WIN ? min64(c->window, capacity) : compressed_seen(capacity - 1, c->cmp_block, c->cmp_stride);
}

static inline int cache_branches(const Config *c, int layer) { return layer_is_full(c, layer) ? 1 : BRANCHES; }

// Bytes of the caches by kind, by branch and then full-attention layers, for `tokens` tokens.
enum { CACHE_FULL = BRANCHES, CACHE_KINDS };

void cache_bytes(int64_t bytes[CACHE_KINDS], const Config *c, int rows, int64_t tokens) {
    const int64_t width = (int64_t)rows * c->num_key_value_heads * (c->head_dim + c->v_head_dim) * (int64_t)sizeof(real);
    memset(bytes, 0, CACHE_KINDS * sizeof bytes[0]);
    for (int l = 0; l < c->num_hidden_layers; l++) {
        for (int b = 0; b < cache_branches(c, l); b++)
            bytes[layer_is_full(c, l) ? CACHE_FULL : b] += cache_slots(c, l, b, tokens) * width;
        if (!layer_is_full(c, l)) bytes[CMP] += c->cmp_block * width;
    }
}

void decoder_create(Decoder *d, Model *m, int rows) {
    const Config *c = &m->config;
    const int64_t D = c->head_dim, Dv = c->v_head_dim, n = (int64_t)rows * c->num_key_value_heads;
    memset(d, 0, sizeof *d);
    d->model = m;
    d->rows = rows;
    d->layers = (LayerCache *)xcalloc((size_t)c->num_hidden_layers, sizeof(LayerCache));
    for (int l = 0; l < c->num_hidden_layers; l++)
        for (int i = 0; i < 2 && !layer_is_full(c, l); i++)
            d->layers[l].tail[i] = (real *)xmalloc((size_t)(n * c->cmp_block * (i ? Dv : D)) * sizeof(real));
    d->angles = (real *)xmalloc((size_t)(2 * D) * sizeof(real));
    d->compressed = (real *)xmalloc((size_t)(n * max64(D, Dv)) * sizeof(real));
    d->hidden = (real *)xmalloc((size_t)(n * compress_hidden(c->compress, (int)max64(D, Dv))) * sizeof(real));
    d->logits = (real *)xmalloc((size_t)rows * (size_t)c->vocab_size * sizeof(real));
}

void decoder_free(Decoder *d) {
    for (int l = 0; l < d->model->config.num_hidden_layers; l++) {
        for (int b = 0; b < BRANCHES; b++) { free(d->layers[l].branch[b].k); free(d->layers[l].branch[b].v); }
        for (int i = 0; i < 2; i++) free(d->layers[l].tail[i]);
    }
    void *all[] = {d->layers, d->angles, d->compressed, d->hidden, d->scratch, d->logits};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    memset(d, 0, sizeof *d);
}

// The same lists with more slots.
real *grow_lists(real *old, int64_t lists, int64_t old_slots, int64_t slots, int64_t width) {
    real *grown = (real *)xmalloc((size_t)(lists * slots * width) * sizeof(real));
    for (int64_t i = 0; i < lists && old; i++)
        memcpy(grown + i * slots * width, old + i * old_slots * width, (size_t)(old_slots * width) * sizeof(real));
    free(old);
    return grown;
}

// Room for `tokens` tokens. A ring that is not as long as the window yet has not wrapped either.
void decoder_reserve(Decoder *d, int64_t tokens) {
    const Config *c = &d->model->config;
    const int64_t lists = (int64_t)d->rows * c->num_key_value_heads, G = c->num_attention_heads / c->num_key_value_heads;
    if (tokens <= d->capacity) return;
    d->capacity = max64(tokens, d->capacity + d->capacity / 2);
    for (int l = 0; l < c->num_hidden_layers; l++)
        for (int b = 0; b < cache_branches(c, l); b++) {
            KeyCache *cache = &d->layers[l].branch[b];
            const int64_t slots = cache_slots(c, l, b, d->capacity);
            if (cache->k && slots == cache->slots) continue;
            cache->k = grow_lists(cache->k, lists, cache->slots, slots, c->head_dim);
            cache->v = grow_lists(cache->v, lists, cache->slots, slots, c->v_head_dim);
            cache->slots = slots;
        }
    free(d->scratch);
    d->scratch = (real *)xmalloc((size_t)(thread_count() * (G + 1) * d->capacity) * sizeof(real));
}

// Puts x (n,KV,width), x_row apart, into slots `first` and on of one row's lists (KV,slots,width); a ring goes round.
void lists_put(real *lists, int64_t slots, int64_t first, const real *x, int64_t x_row, int64_t n, int kv, int64_t width) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t h = 0; h < kv; h++)
            memcpy(lists + (h * slots + (first + i) % slots) * width, x + i * x_row + h * width, (size_t)width * sizeof(real));
}

void cache_put(KeyCache *cache, const Config *c, int row, int64_t first, const real *k, int64_t k_row,
                      const real *v, int64_t v_row, int64_t n) {
    const int KV = c->num_key_value_heads;
    lists_put(cache->k + row * KV * cache->slots * c->head_dim, cache->slots, first, k, k_row, n, KV, c->head_dim);
    lists_put(cache->v + row * KV * cache->slots * c->v_head_dim, cache->slots, first, v, v_row, n, KV, c->v_head_dim);
}

// Raw k_cmp and v_cmp of n tokens, from place `at` of the tail on.
void tail_put(LayerCache *cache, const Config *c, int row, int64_t at, const real *k, const real *v, int64_t x_row, int64_t n) {
    for (int i = 0; i < 2; i++) {
        const int64_t width = (int64_t)c->num_key_value_heads * (i ? c->v_head_dim : c->head_dim);
        for (int64_t t = 0; t < n; t++)
            memcpy(cache->tail[i] + (row * c->cmp_block + at + t) * width, (i ? v : k) + t * x_row, (size_t)width * sizeof(real));
    }
}

// What the forward pass of a layer over the prompt (T tokens) leaves for later tokens, in every row.
void cache_fill(Decoder *d, int layer, int64_t T) {
    const Config *c = &d->model->config;
    const LayerActs *a = &d->model->acts[layer];
    const WideRow row = wide_row(c, layer);
    LayerCache *cache = &d->layers[layer];
    const int KV = c->num_key_value_heads, nsa = row.branches > 1;
    for (int r = 0; r < d->rows; r++)
        for (int b = 0; b < row.branches; b++) {
            if (nsa && b == CMP) {
                const int64_t blocks = compressed_seen(T - 1, c->cmp_block, c->cmp_stride), first = blocks * c->cmp_stride;
                cache_put(&cache->branch[b], c, r, 0, a->compressed[0], (int64_t)KV * c->head_dim, a->compressed[1], (int64_t)KV * c->v_head_dim, blocks);
                tail_put(cache, c, r, 0, a->wide + first * row.size + row.k[b], a->wide + first * row.size + row.v[b], row.size, T - first);
            } else {
                const int64_t first = max64(0, T - cache->branch[b].slots);
                cache_put(&cache->branch[b], c, r, first, a->wide + first * row.size + row.k[b], row.size, a->wide + first * row.size + row.v[b], row.size, T - first);
            }
        }
}

// The logits of every token of the prompt, some rows at a time: (T,V) may be larger than the model.
int write_logits(Model *m, const real *x, int64_t T, const char *path, char *err) {
    const int64_t C = m->config.hidden_size, V = m->config.vocab_size, rows = logit_rows(&m->config, T), shape[2] = {T, V};
    StWriter w;
    if (st_writer_begin(&w, path, err) < 0) return -1;
    st_writer_tensor(&w, "logits", ST_F32, 2, shape);
    if (st_writer_header(&w, err) < 0) return -1;
    for (int64_t i = 0; i < T; i += rows) {
        const int64_t n = min64(rows, T - i);
        rmsnorm_forward(m->scratch.norm, m->final_rstd, x + i * C, m->norm, n, C, m->config.rms_norm_eps);
        linear_forward(m->scratch.logits, V, m->scratch.norm, C, m->head, n, C, V);
        if (st_writer_real(&w, m->scratch.logits, n * V, ST_F32, err) < 0) return -1;
    }
    return st_writer_end(&w, err);
}

// Begins the file of --dump-attention: which blocks each token chose and its gates, for every NSA layer.
int attention_dump_begin(StWriter *w, const Config *c, const int *tokens, int64_t T, const char *path, char *err) {
    const int64_t block_idx[3] = {T, c->num_key_value_heads, c->sel_blocks}, gates[3] = {T, c->num_attention_heads, BRANCHES};
    Text config = {NULL, 0, 0};
    if (st_writer_begin(w, path, err) < 0) return -1;
    config_write(c, &config);
    st_writer_meta(w, "config", config.data);
    free(config.data);
    st_writer_tensor(w, "tokens", ST_I32, 1, &T);
    for (int l = 0; l < c->num_hidden_layers; l++) {
        char name[80];
        if (layer_is_full(c, l)) continue;
        snprintf(name, sizeof name, "model.layers.%d.self_attn.block_idx", l);
        st_writer_tensor(w, name, ST_I32, 3, block_idx);
        snprintf(name, sizeof name, "model.layers.%d.self_attn.gates", l);
        st_writer_tensor(w, name, ST_F32, 3, gates);
    }
    return st_writer_header(w, err) < 0 ? -1 : st_writer_data(w, tokens, T * (int64_t)sizeof(int), err);
}

int attention_dump_layer(StWriter *w, const Model *m, int layer, int64_t T, char *err) {
    const Config *c = &m->config;
    const LayerActs *a = &m->acts[layer];
    if (layer_is_full(c, layer)) return 0;
    if (st_writer_data(w, a->block_idx, T * c->num_key_value_heads * c->sel_blocks * (int64_t)sizeof(int), err) < 0) return -1;
    return st_writer_real(w, a->gates, T * c->num_attention_heads * BRANCHES, ST_F32, err);
}

// Logits of n rows of the last layer's output.
void decoder_head(Decoder *d, const real *x, int64_t n) {
    Model *m = d->model;
    const int64_t C = m->config.hidden_size, V = m->config.vocab_size;
    rmsnorm_forward(m->scratch.norm, m->final_rstd, x, m->norm, n, C, m->config.rms_norm_eps);
    linear_forward(d->logits, V, m->scratch.norm, C, m->head, n, C, V);
}

// Starts every row with the same T tokens, in one pass of the training forward, whose memory is given back before decoding.
// Returns the logits (rows,V) behind the last token. dump_logits and dump_attention: files to write, or NULL.
const real *decoder_prefill(Decoder *d, const int *tokens, int64_t T, const char *dump_logits, const char *dump_attention) {
    Model *m = d->model;
    const Config *c = &m->config;
    const int64_t C = c->hidden_size, V = c->vocab_size;
    char err[ERR_LEN];
    StWriter attention;
    d->length = 0;
    decoder_reserve(d, T);
    model_alloc(m, 1, T, 0, 0);
    if (dump_attention && attention_dump_begin(&attention, c, tokens, T, dump_attention, err) < 0) die(1, "%s", err);
    model_embed(m, tokens, 1, T, NULL);
    for (int l = 0; l < c->num_hidden_layers; l++) {
        model_layer_forward(m, l, 1, T, NULL);
        cache_fill(d, l, T);
        if (dump_attention && attention_dump_layer(&attention, m, l, T, err) < 0) die(1, "%s", err);
    }
    if (dump_attention && st_writer_end(&attention, err) < 0) die(1, "%s", err);
    const real *x = m->acts[c->num_hidden_layers - 1].out;
    if (dump_logits && write_logits(m, x, T, dump_logits, err) < 0) die(1, "%s", err);
    decoder_head(d, x + (T - 1) * C, 1);
    for (int r = 1; r < d->rows; r++) memcpy(d->logits + r * V, d->logits, (size_t)V * sizeof(real));
    d->length = T;
    model_alloc(m, d->rows, 1, 0, 0);
    return d->logits;
}

// p (G,keys), rows p_row apart = scale · q (G,D) · k (keys,D)ᵀ. There is no tile here for registers to hold: what counts is to
// read k once, and to leave no loop over D to a compiler that does not know D.
void attend_scores(real *p, int64_t p_row, const real *q, const real *k, int64_t keys, int G, int64_t D, real scale) {
    const int64_t vectors = D / VECTOR * VECTOR;
    for (int64_t j = 0; j < keys; j++)
        for (int g = 0; g < G; g++) {
            const real *x = q + g * D, *y = k + j * D;
            Vector sums = {0};
            real sum = 0;
            for (int64_t i = 0; i < vectors; i += VECTOR) sums += *(const Vector *)(x + i) * *(const Vector *)(y + i);
            for (int i = 0; i < VECTOR; i++) sum += sums[i];
            for (int64_t i = vectors; i < D; i++) sum += x[i] * y[i];
            p[g * p_row + j] = scale * sum;
        }
}

// One query of each of G heads, q (G,D), reads keys [0, end) of the blocks that idx (n) names, -1 behind the last; out (G,Dv).
// k (end,D), v (end,Dv). p (G,p_row) is left with the attention weights, key after key. No key: out = 0.
void attend(real *out, real *p, int64_t p_row, const real *q, const real *k, const real *v, const int *idx, int n,
            int64_t block, int64_t end, int G, int D, int Dv) {
    const real scale = 1 / (real)sqrt((double)D);
    int64_t count = 0, from = 0;
    memset(out, 0, (size_t)G * (size_t)Dv * sizeof(real));
    for (int i = 0; i < n && idx[i] >= 0; i++) {
        const int64_t first = idx[i] * block, keys = min64(block, end - first);
        attend_scores(p + count, p_row, q, k + first * D, keys, G, D, scale);
        count += keys;
    }
    for (int g = 0; g < G && count > 0; g++) {
        real *x = p + g * p_row, top = x[0], sum = 0;
        #pragma omp simd reduction(max : top)
        for (int64_t j = 0; j < count; j++) top = x[j] > top ? x[j] : top;
        #pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < count; j++) { x[j] = fast_exp(x[j] - top); sum += x[j]; }
        for (int64_t j = 0; j < count; j++) x[j] /= sum;
    }
    for (int i = 0; i < n && idx[i] >= 0; i++) {
        const int64_t first = idx[i] * block, keys = min64(block, end - first);
        block_multiply(G, Dv, keys, p + from, p_row, 1, v + first * Dv, Dv, out, Dv, 1);
        from += keys;
    }
}

// idx (n): the blocks that token t reads, from the compressed branch's weights p (G,p_row), which are summed up in place.
void choose_from(int *idx, real *p, int64_t p_row, real *importance, int64_t t, const Config *c) {
    const SelectShape s = select_shape(c);
    const int G = c->num_attention_heads / c->num_key_value_heads;
    const int64_t blocks = t / s.sel_block + 1, visible = compressed_seen(t, s.cmp_block, s.cmp_stride);
    if (blocks > s.n) {     // otherwise there is no choice
        for (int g = 1; g < G; g++)
            for (int64_t i = 0; i < visible; i++) p[i] += p[g * p_row + i];
        block_importance(importance, p, blocks, visible, &s);
    }
    choose_blocks(idx, importance, blocks, &s);
}

// The block that token t completes goes into the cache, and what the next one does not need leaves the tail.
void compress_tail(Decoder *d, int layer, int64_t t) {
    Model *m = d->model;
    const Config *c = &m->config;
    LayerCache *cache = &d->layers[layer];
    const int64_t KV = c->num_key_value_heads, l = c->cmp_block, stride = c->cmp_stride, i = compressed_seen(t, c->cmp_block, c->cmp_stride) - 1;
    for (int v = 0; v < 2; v++) {
        const int64_t D = v ? c->v_head_dim : c->head_dim, slots = cache->branch[CMP].slots;
        const CompressShape shape = compress_shape(c, d->rows, l, KV * D, v);
        real *lists = v ? cache->branch[CMP].v : cache->branch[CMP].k;
        compress_forward(d->compressed, d->hidden, cache->tail[v], &m->layers[layer].compress[v], &shape, m->scratch.compress);
        if (!v) rope(d->compressed, KV * D, d->angles + D, d->rows, 1, 0, (int)KV, (int)D, 1);
        for (int r = 0; r < d->rows; r++) {
            real *tail = cache->tail[v] + r * l * KV * D;
            lists_put(lists + r * KV * slots * D, slots, i, d->compressed + r * KV * D, KV * D, 1, (int)KV, D);
            memmove(tail, tail + stride * KV * D, (size_t)((l - stride) * KV * D) * sizeof(real));
        }
    }
}

// x + attention(rmsnorm(x)) of one token a row: acts.x -> acts.mid, as attention_layer_forward does it for whole texts.
void decode_attention(Decoder *d, int layer) {
    Model *m = d->model;
    const Config *c = &m->config;
    const LayerWeights *w = &m->layers[layer];
    const LayerActs *a = &m->acts[layer];
    const Scratch *s = &m->scratch;
    const WideRow row = wide_row(c, layer);
    LayerCache *cache = &d->layers[layer];
    const int64_t C = c->hidden_size, t = d->length, before = compressed_seen(t - 1, c->cmp_block, c->cmp_stride);
    const int64_t seen = compressed_seen(t, c->cmp_block, c->cmp_stride);
    const int rows = d->rows, H = c->num_attention_heads, KV = c->num_key_value_heads, D = c->head_dim, Dv = c->v_head_dim, G = H / KV;
    const int nsa = row.branches > 1;

    rmsnorm_forward(s->norm, a->rstd1, a->x, w->norm1, rows, C, c->rms_norm_eps);
    linear_forward(a->wide, row.size, s->norm, C, w->wide, rows, C, row.size);
    if (nsa) gates_forward(a->gates, a->wide + row.gate, row.size, a->wide, row.size, w->gate_weight, w->gate_bias, rows, H, D, c->gate);
    rope(a->wide, row.size, d->angles, rows, 1, 0, H, D, 1);
    for (int b = 0; b < row.branches; b++) {
        const int compressed = nsa && b == CMP;
        if (!compressed) rope(a->wide + row.k[b], row.size, d->angles, rows, 1, 0, KV, D, 1);
        for (int r = 0; r < rows; r++) {
            const real *k = a->wide + r * row.size + row.k[b], *v = a->wide + r * row.size + row.v[b];
            if (compressed) tail_put(cache, c, r, t - before * c->cmp_stride, k, v, row.size, 1);
            else cache_put(&cache->branch[b], c, r, t, k, row.size, v, row.size, 1);
        }
        if (compressed && seen > before) compress_tail(d, layer, t);
    }

    #pragma omp parallel for schedule(dynamic) if (rows * t * H * D > 65536)
    for (int64_t item = 0; item < (int64_t)rows * KV; item++) {     // item = row·KV + kv
        const real *q = a->wide + item / KV * row.size + row.q + item % KV * G * D;
        real *p = d->scratch + thread_index() * (G + 1) * d->capacity;
        int *idx = nsa ? a->block_idx + item * c->sel_blocks : NULL;
        for (int b = 0; b < row.branches; b++) {
            const KeyCache *keys = &cache->branch[b];
            const int64_t all = nsa && b == CMP ? seen : min64(t + 1, keys->slots);
            const real *k = keys->k + item * keys->slots * D, *v = keys->v + item * keys->slots * Dv;
            const int whole = 0;                                    // without a choice, the cache is one block
            const int chosen = nsa && b == SLC;
            attend(a->branch[b] + item * G * Dv, p, d->capacity, q, k, v, chosen ? idx : &whole, chosen ? c->sel_blocks : 1,
                   chosen ? c->sel_block : all, all, G, D, Dv);
            if (nsa && b == CMP) choose_from(idx, p, d->capacity, p + G * d->capacity, t, c);
        }
    }

    const real *attention = a->branch[0];
    if (nsa) {
        branches_sum(s->attention, a->branch, a->gates, (int64_t)rows * H, Dv);
        attention = s->attention;
    }
    linear_forward(s->y, C, attention, (int64_t)H * Dv, w->o, rows, (int64_t)H * Dv, C);
    add_residual(a->mid, a->x, s->y, rows * C);
}

// Appends one token to each row, tokens (rows); returns the logits (rows,V) behind them.
const real *decoder_step(Decoder *d, const int *tokens) {
    Model *m = d->model;
    const Config *c = &m->config;
    decoder_reserve(d, d->length + 1);
    rope_angles(d->angles, d->length, c->head_dim, c->rope_theta);
    rope_angles(d->angles + c->head_dim, max64(0, d->length + 1 - c->cmp_block), c->head_dim, c->rope_theta);
    model_embed(m, tokens, d->rows, 1, NULL);
    for (int l = 0; l < c->num_hidden_layers; l++) {
        decode_attention(d, l);
        ffn_layer_forward(m, l, d->rows, 1, NULL);
    }
    d->length++;
    decoder_head(d, m->acts[c->num_hidden_layers - 1].out, d->rows);
    return d->logits;
}

// ----------------------------------------------------------------------------
// 2. Drawing a token

typedef struct Candidate { real logit; int id; } Candidate;

// The likelier one; of equals the one with the lower number.
static inline int comes_before(Candidate a, Candidate b) { return a.logit != b.logit ? a.logit > b.logit : a.id < b.id; }

// heap[at] sinks below everything that comes before it.
void heap_sink(Candidate *heap, int64_t n, int64_t at) {
    const Candidate x = heap[at];
    for (int64_t child; (child = 2 * at + 1) < n; at = child) {
        if (child + 1 < n && comes_before(heap[child + 1], heap[child])) child++;
        if (!comes_before(heap[child], x)) break;
        heap[at] = heap[child];
    }
    heap[at] = x;
}

// What a logit weighs in the softmax, before it is divided by the sum.
static inline double softmax_weight(real logit, real top, double temp) { return exp((double)(logit - top) / temp); }

// Draws from softmax(logits / temp), of which only the top_k likeliest tokens stay (0: all), and of these only the fewest
// that hold top_p of what they weigh together. temp 0 takes the likeliest. heap: memory for V candidates.
int draw_token(const real *logits, int V, double temp, int64_t top_k, double top_p, Rng *rng, Candidate *heap) {
    int best = 0, finite = 1;
    for (int v = 0; v < V; v++) {
        finite &= isfinite(logits[v]) != 0;
        if (logits[v] > logits[best]) best = v;
    }
    if (!finite) die(1, "the model's logits are not finite: its weights are broken");
    if (temp <= 0) return best;
    const real top = logits[best];
    const int64_t most = top_k > 0 && top_k < V ? top_k : V;
    int64_t kept = 0, left = V;     // candidates in the heap; those taken from it stand behind, the last one first
    double total = 0, mass = 0;
    for (int v = 0; v < V; v++) {
        heap[v].logit = logits[v];
        heap[v].id = v;
    }
    if (most == V && top_p >= 1) {  // everything stays: the order does not matter
        for (int v = 0; v < V; v++) total += softmax_weight(logits[v], top, temp);
        double x = rng_uniform(rng) * total;
        for (int v = 0; v < V; v++)
            if ((x -= softmax_weight(logits[v], top, temp)) < 0) return v;
        return best;
    }
    for (int64_t i = V / 2; i-- > 0;) heap_sink(heap, V, i);
    if (most == V)
        for (int v = 0; v < V; v++) total += softmax_weight(logits[v], top, temp);
    while (kept < most && (most < V || kept == 0 || mass < top_p * total)) {
        const Candidate next = heap[0];
        heap[0] = heap[--left];
        heap_sink(heap, left, 0);
        heap[left] = next;
        kept++;
        mass += softmax_weight(next.logit, top, temp);
    }
    if (most < V) {                 // top_p of what top_k has left
        total = mass;
        for (kept = 0, mass = 0; kept == 0 || (kept < most && mass < top_p * total); kept++) mass += softmax_weight(heap[V - 1 - kept].logit, top, temp);
    }
    double x = rng_uniform(rng) * mass;
    for (int64_t i = 0; i < kept; i++)
        if ((x -= softmax_weight(heap[V - 1 - i].logit, top, temp)) < 0) return heap[V - 1 - i].id;
    return best;
}

// ----------------------------------------------------------------------------
// 3. The command line

typedef struct SampleOptions {
    const char *model, *tokenizer, *prompt, *file, *dump_logits, *dump_attention;
    int interactive, no_echo, stats, help, batch, threads;
    int64_t tokens, top_k, seed;
    double temp, top_p;
    unsigned char given[MAX_OPTIONS];
} SampleOptions;

SampleOptions sample_default(void) {
    SampleOptions o;
    memset(&o, 0, sizeof o);
    o.tokens = 256;
    o.temp = 0.8;
    o.top_k = 40;
    o.top_p = 1;
    o.seed = -1;
    o.batch = 1;
    return o;
}

#define AT(field) offsetof(SampleOptions, field)
#define GROUP(title) {0, NULL, OPT_GROUP, 0, 0, NULL, 0, 0, NULL, title}
static const Option sample_options[] = {
    GROUP("Model"),
    {'e', "model", OPT_TEXT, OF_CALL, AT(model), "FOLDER", 0, 0, "", "a checkpoint, such as out/run_001/latest"},
    {0, "tokenizer", OPT_TEXT, OF_CALL, AT(tokenizer), "FILE", 0, 0, "FOLDER/tokenizer.json, else bytes", "byte-level BPE, a tokenizer.json"},

    GROUP("Prompt"),
    {'p', "prompt", OPT_PROMPT, OF_CALL, AT(prompt), "TEXT", 0, 0, "start of a text", "the text to continue"},
    {'f', "file", OPT_TEXT, OF_CALL, AT(file), "FILE", 0, 0, "", "the text to continue, as it stands in a file; - is the standard input"},
    {'i', "interactive", OPT_FLAG, OF_CALL, AT(interactive), NULL, 0, 0, "", "read lines and continue the text after each: Enter alone goes on, Ctrl-C stops an answer, Ctrl-D ends"},
    {0, "no-echo", OPT_FLAG, OF_CALL, AT(no_echo), NULL, 0, 0, "", "print the continuation without the prompt before it"},

    GROUP("Sampling"),
    {'n', "tokens", OPT_COUNT, OF_CALL, AT(tokens), "N", 0, 1e12, NULL, "most tokens to write (the end of a text stops earlier, where the model knows it); 0 only reads the prompt"},
    {0, "temp", OPT_FLOAT, OF_CALL, AT(temp), "X", 0, 1e6, NULL, "temperature: below 1 plainer, above 1 wilder; 0 always takes the likeliest token"},
    {0, "top-k", OPT_COUNT, OF_CALL, AT(top_k), "N", 0, 1e12, NULL, "draw from the N likeliest tokens; 0 = all"},
    {0, "top-p", OPT_FLOAT, OF_CALL, AT(top_p), "P", 0, 1, NULL, "draw from the fewest of these that weigh P together; 1 = all"},
    {0, "seed", OPT_COUNT, OF_CALL, AT(seed), "N", 0, 9e15, "another one each time", "same seed, same text"},
    {'b', "batch", OPT_INT, OF_CALL, AT(batch), "N", 1, 1 << 16, NULL, "samples of the same prompt, computed side by side"},

    GROUP("Looking inside"),
    {0, "stats", OPT_FLAG, OF_CALL, AT(stats), NULL, 0, 0, "", "speed and memory, on the standard error"},
    {0, "dump-logits", OPT_TEXT, OF_CALL, AT(dump_logits), "FILE", 0, 0, "", "write a safetensors with the logits behind every token of the prompt: logits (tokens, V), f32"},
    {0, "dump-attention", OPT_TEXT, OF_CALL, AT(dump_attention), "FILE", 0, 0, "", "write the blocks that every token of the prompt chose, and its gates; scripts/attention_map.py draws it"},
    {0, "threads", OPT_INT, OF_CALL, AT(threads), "N", 0, 4096, "all", "threads to compute with"},
    {'h', "help", OPT_FLAG, OF_CALL, AT(help), NULL, 0, 0, "", "this text"},
};
#undef AT
#undef GROUP
enum { SAMPLE_OPTIONS = sizeof sample_options / sizeof sample_options[0] };

void sample_help(void) {
    SampleOptions defaults = sample_default();
    const char *p = program_name;
    printf("%s: continue a text with a model that train_nsa made\n\n"
           "usage: ./%s -e FOLDER [options]\n\n"
           "examples\n"
           "  ./%s -e out/run_001/latest -p \"Once upon a time\"\n"
           "  ./%s -e out/run_001/latest -i                    a line from you, a text from the model\n"
           "  ./%s -e out/run_001/latest -f story.txt -n 1k --temp 0.6 --stats\n"
           "  ./%s -e out/run_001/latest -p \"It was\" -b 4      four continuations\n",
           p, p, p, p, p, p);
    options_help(sample_options, SAMPLE_OPTIONS, &defaults);
    printf("\nIn brackets: the default. Whole numbers take k, m, g (1024, 1024^2, 1024^3).\n"
           "Long options take --name value or --name=value.\n");
}

void sample_check_options(const SampleOptions *o) {
    if (!o->model) die(2, "-e (--model) is needed: the folder of a checkpoint, such as -e out/run_001/latest (train one with ./train_nsa)");
    if (o->dump_logits && o->dump_attention && !strcmp(o->dump_logits, o->dump_attention))
        die(2, "--dump-logits and --dump-attention would both write %s: name two files", o->dump_logits);
    if (o->prompt && o->file) die(2, "-p (--prompt) and -f (--file) are both the prompt: give one of them");
    if (!o->interactive) return;
    if (o->batch > 1) die(2, "-b (--batch) %d cannot be interactive: leave out -i", o->batch);
    if (o->file && !strcmp(o->file, "-")) die(2, "-f - and -i (--interactive) would both read the standard input: name a file");
    if ((o->dump_logits || o->dump_attention) && !o->prompt && !o->file)
        die(2, "%s is about the prompt: give one with -p or -f", o->dump_logits ? "--dump-logits" : "--dump-attention");
}

// ----------------------------------------------------------------------------
// 4. Text in and out

typedef struct Sampler {
    SampleOptions options;
    Config config;
    Tokenizer tokenizer;
    int numbers;                // 1: without a tokenizer, and too many tokens for bytes: text is token numbers
    Model model;
    Decoder decoder;
    Candidate *heap;
    Rng *rng;                   // one for each row
    int *next;                  // (rows) the token drawn last, which is not in the cache yet; -1: none
    unsigned char *ended;       // (rows) 1 behind the end of the text
    Utf8Stream *utf8;           // (rows)
    Text *text;                 // (rows) what is written and not printed
    int64_t prefilled, steps;
    double prefill_seconds, decode_seconds;
} Sampler;

void print_out(Text *text) {
    if (text->len && fwrite(text->data, 1, (size_t)text->len, stdout) != (size_t)text->len) die(1, "cannot write to the standard output: %s", strerror(errno));
    if (fflush(stdout) != 0) die(1, "cannot write to the standard output: %s", strerror(errno));
    text->len = 0;
}

// Token numbers between spaces.
int parse_numbers(const char *text, int64_t len, int32_t **ids, int64_t *n, char *err) {
    *ids = (int32_t *)xmalloc((size_t)(len + 1) * sizeof(int32_t));
    *n = 0;
    for (const char *s = text, *end = text + len; s < end;) {
        char *after;
        if (isspace((unsigned char)*s)) { s++; continue; }
        const long id = strtol(s, &after, 10);
        if (after == s || id < 0 || id > INT_MAX || (*after && !isspace((unsigned char)*after)))
            return fail(err, "the prompt has \"%.20s\": this model has no tokenizer.json, so its text is token numbers such as 464 3290 (or name one with --tokenizer)", s);
        (*ids)[(*n)++] = (int32_t)id;
        s = after;
    }
    return 0;
}

// The tokens of a text, behind the token that is still to be read, if there is one; free(result) ends them. NULL: err says why not.
// No token at all starts a text: with the end of the one before, or, in bytes, with a new line.
int *tokens_of(const Sampler *s, const char *text, int64_t len, int64_t *n, char *err) {
    const Config *c = &s->config;
    const int pending = s->next[0] >= 0;
    int32_t *ids = NULL;
    int result = s->numbers ? parse_numbers(text, len, &ids, n, err) : tokenizer_encode(&s->tokenizer, text, len, &ids, n, err);
    int *tokens = (int *)xmalloc((size_t)(result < 0 ? 2 : *n + 2) * sizeof(int));
    if (pending) tokens[0] = s->next[0];
    for (int64_t i = 0; !result && i < *n; i++) {
        if (ids[i] >= c->vocab_size) result = fail(err, "the prompt has token %d at place %" PRId64 ", and the model only knows %d tokens", ids[i], i, c->vocab_size);
        else tokens[pending + i] = ids[i];
    }
    *n += pending;
    free(ids);
    if (!result && (*n || s->decoder.length)) return tokens;
    if (!result && c->eos_token_id < 0 && (s->numbers || '\n' >= c->vocab_size))
        result = fail(err, "this model has no token that starts a text: give a prompt with -p or -f");
    if (result) {
        free(tokens);
        return NULL;
    }
    tokens[(*n)++] = c->eos_token_id >= 0 ? c->eos_token_id : '\n';
    return tokens;
}

// What the prompt and n tokens more need, before it is taken.
void check_memory(const Sampler *s, int64_t prompt, int64_t more) {
    const Config *c = &s->config;
    int64_t bytes[CACHE_KINDS], total = model_bytes(c, 1, prompt, 0, 0, NULL), machine = total_memory_bytes();
    cache_bytes(bytes, c, s->options.batch, prompt + more);
    for (int i = 0; i < CACHE_KINDS; i++) total += bytes[i];
    if (machine && total > machine)
        die(2, "a prompt of %" PRId64 " tokens%s needs %s of memory and the machine has %s: use a shorter prompt%s", prompt, s->options.batch > 1 ? " and this batch" : "",
            human_bytes((double)total), human_bytes((double)machine), s->options.batch > 1 ? " or a smaller -b" : "");
}

enum { ROOM = 4096 };   // tokens to write that the caches have room for at first; -n may be a number that is never reached

// Reads tokens into the caches: the first ones in one pass, later ones step by step. Returns the logits behind them.
const real *feed(Sampler *s, const int *tokens, int64_t n) {
    const SampleOptions *o = &s->options;
    const double start = now_seconds();
    const real *logits = s->decoder.logits;
    if (s->decoder.length == 0) {
        const int64_t more = min64(o->tokens, ROOM);
        if (n > INT_MAX / 2) die(2, "a prompt of %" PRId64 " tokens is too long", n);
        if (n > s->config.max_position_embeddings)
            warn("the prompt has %" PRId64 " tokens, the model was trained on texts of %d: it may not know what to make of the distance", n, s->config.max_position_embeddings);
        check_memory(s, n, more);
        decoder_reserve(&s->decoder, n + more);
        logits = decoder_prefill(&s->decoder, tokens, n, o->dump_logits, o->dump_attention);
    } else {
        for (int64_t i = 0; i < n; i++) logits = decoder_step(&s->decoder, &tokens[i]);
    }
    s->prefilled += n;
    s->prefill_seconds += now_seconds() - start;
    s->next[0] = -1;
    return logits;
}

// A token becomes text, which is printed as it comes where there is but one row.
void write_token(Sampler *s, int row, int token) {
    int len;
    const char *piece = tokenizer_piece(&s->tokenizer, token, &len);
    if (s->numbers) text_add(&s->text[row], "%d ", token);
    else utf8_stream_push(&s->utf8[row], piece, len, &s->text[row]);
    if (s->options.batch == 1) print_out(&s->text[row]);
}

// Writes n tokens in every row, or up to the end of its text, or until Ctrl-C.
void write_tokens(Sampler *s, const real *logits, int64_t n) {
    const SampleOptions *o = &s->options;
    const int V = s->config.vocab_size;
    const double start = now_seconds();
    int writing = o->batch;
    memset(s->ended, 0, (size_t)o->batch);
    for (int64_t i = 0; i < n && writing && !stop_signal; i++) {
        if (i > 0) {
            logits = decoder_step(&s->decoder, s->next);
            s->steps++;
        }
        for (int r = 0; r < o->batch; r++) {
            if (s->ended[r]) continue;      // its token is computed on, and thrown away
            s->next[r] = draw_token(logits + (int64_t)r * V, V, o->temp, o->top_k, o->top_p, &s->rng[r], s->heap);
            s->ended[r] = s->next[r] == s->config.eos_token_id;
            writing -= s->ended[r];
            if (!s->ended[r]) write_token(s, r, s->next[r]);
        }
    }
    s->decode_seconds += now_seconds() - start;
    for (int r = 0; r < o->batch; r++) utf8_stream_flush(&s->utf8[r], &s->text[r]);
}

// Reads all of a file, or of the standard input.
char *read_prompt(const char *path, int64_t *len) {
    char err[ERR_LEN], *data;
    if (strcmp(path, "-")) {
        if (read_file(path, &data, len, err) < 0) die(1, "%s", err);
        return data;
    }
    Text text = {NULL, 0, 0};
    do {
        text_reserve(&text, 65536);
        text.len += (int64_t)fread(text.data + text.len, 1, 65536, stdin);
    } while (!feof(stdin) && !ferror(stdin));
    if (ferror(stdin)) die(1, "cannot read the standard input: %s", strerror(errno));
    text.data[text.len] = 0;
    *len = text.len;
    return text.data;
}

// A model of bytes with a larger --vocab says so in the metadata of its weights.
int folder_says_bytes(const char *folder) {
    SafeTensors st;
    char err[ERR_LEN];
    if (open_tensors(&st, folder, "model.safetensors", err) < 0) return 0;      // whoever reads the weights will say why
    const char *tokenizer = safetensors_meta(&st, "tokenizer");
    const int bytes = tokenizer && !strcmp(tokenizer, "bytes");
    safetensors_close(&st);
    return bytes;
}

// The folder's shape, tokenizer and weights.
void sampler_load(Sampler *s) {
    const SampleOptions *o = &s->options;
    char err[ERR_LEN], *folder = existing(format("%s/latest", o->model)), *config, *tokenizer;   // -e OUT means OUT/latest
    if (!folder) folder = xstrdup(o->model);
    if (!is_folder(folder)) die(1, "-e %s: there is no such folder", o->model);
    config = existing(format("%s/config.json", folder));
    if (!config) die(1, "-e %s holds no model (no %s/config.json)", o->model, folder);
    const int result = config_load(&s->config, config, err);
    if (result < 0) die(result == -2 ? 2 : 1, "%s", err);

    tokenizer = o->tokenizer ? xstrdup(o->tokenizer) : existing(format("%s/tokenizer.json", folder));
    if (!tokenizer) tokenizer_bytes(&s->tokenizer);
    else if (tokenizer_open(&s->tokenizer, tokenizer, err) < 0) die(1, "%s", err);
    if (tokenizer && s->tokenizer.vocab_size > s->config.vocab_size)
        die(1, "%s has %d tokens, the model knows %d: it is not the model's tokenizer", tokenizer, s->tokenizer.vocab_size, s->config.vocab_size);
    s->numbers = !tokenizer && s->config.vocab_size > 256 && !folder_says_bytes(folder);

    const int64_t bytes = count_params(&s->config) * (int64_t)sizeof(real), machine = total_memory_bytes();
    if (machine && bytes > machine) die(2, "the model in %s needs %s of memory and the machine has %s", folder, human_bytes((double)bytes), human_bytes((double)machine));
    model_create(&s->model, &s->config);
    if (checkpoint_load_weights(&s->model, folder, err) < 0) die(1, "%s", err);
    free(folder);
    free(config);
    free(tokenizer);
}

void sampler_create(Sampler *s) {
    SampleOptions *o = &s->options;
    int nsa = 0;
    for (int l = 0; l < s->config.num_hidden_layers; l++) nsa |= !layer_is_full(&s->config, l);
    if (o->dump_attention && !nsa) die(2, "--dump-attention: every layer of this model attends to everything, there is no choice to show");
    if (o->seed < 0) o->seed = ((int64_t)time(NULL) << 20 ^ (int64_t)getpid()) & INT32_MAX;
    decoder_create(&s->decoder, &s->model, o->batch);
    const size_t rows = (size_t)o->batch;
    s->heap = (Candidate *)xmalloc((size_t)s->config.vocab_size * sizeof(Candidate));
    s->rng = (Rng *)xcalloc(rows, sizeof(Rng));
    s->next = (int *)xcalloc(rows, sizeof(int));
    s->ended = (unsigned char *)xcalloc(rows, 1);
    s->utf8 = (Utf8Stream *)xcalloc(rows, sizeof(Utf8Stream));
    s->text = (Text *)xcalloc(rows, sizeof(Text));
    for (int r = 0; r < o->batch; r++) {
        s->rng[r].seed = (uint64_t)o->seed;
        s->rng[r].stream = (uint64_t)r;
        s->next[r] = -1;
    }
}

void sampler_free(Sampler *s) {
    for (int r = 0; r < s->options.batch; r++) free(s->text[r].data);
    void *all[] = {s->heap, s->rng, s->next, s->ended, s->utf8, s->text};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    decoder_free(&s->decoder);
    model_free(&s->model);
    tokenizer_free(&s->tokenizer);
}

// The prompt, echoed before what follows it, in every row.
void sample_prompt(Sampler *s, const char *prompt, int64_t len) {
    const SampleOptions *o = &s->options;
    int64_t n;
    char err[ERR_LEN];
    int *tokens = tokens_of(s, prompt, len, &n, err);
    if (!tokens) die(2, "%s", err);
    const real *logits = feed(s, tokens, n);
    free(tokens);
    if (!o->tokens) return;
    for (int r = 0; r < o->batch && !o->no_echo; r++) {
        for (int64_t i = 0; i < len; i += 1 << 20) utf8_stream_push(&s->utf8[r], prompt + i, (int)min64(len - i, 1 << 20), &s->text[r]);
        if (s->numbers && len && !isspace((unsigned char)prompt[len - 1])) text_put(&s->text[r], " ", 1);
    }
    if (o->batch == 1) print_out(&s->text[0]);
    write_tokens(s, logits, o->tokens);
    for (int r = 0; r < o->batch; r++) {
        if (o->batch > 1) printf("--- sample %d ---\n", r + 1);
        text_put(&s->text[r], "\n", 1);
        print_out(&s->text[r]);
    }
}

// What the terminal shows is what the model reads: an answer ends its line, and a line begins the next one. Enter alone
// adds nothing: the model goes on where it stopped.
void sample_interactively(Sampler *s) {
    const int terminal = isatty(0);
    char *line = NULL;
    size_t size = 0;
    signal(SIGINT, on_signal);      // ends an answer; a second time, the program
    for (;;) {
        if (terminal) fputs("> ", stdout);
        print_out(&s->text[0]);
        const ssize_t len = getline(&line, &size, stdin);
        if (len < 0) break;
        Text text = {NULL, 0, 0};
        int64_t n;
        const int64_t typed = len - (line[len - 1] == '\n');
        if (typed > 0 && s->decoder.length) text_put(&text, "\n", 1);
        text_put(&text, line, typed);
        char err[ERR_LEN];
        int *tokens = tokens_of(s, text.data, text.len, &n, err);
        if (!tokens) {      // another line may do better
            warn("%s", err);
            free(text.data);
            continue;
        }
        stop_signal = 0;
        write_tokens(s, feed(s, tokens, n), s->options.tokens);
        text_put(&s->text[0], "\n", 1);
        free(tokens);
        free(text.data);
    }
    if (terminal) fputs("\n", stdout);
    free(line);
}

void print_stats(const Sampler *s) {
    const Decoder *d = &s->decoder;
    const int rows = s->options.batch;
    int64_t bytes[CACHE_KINDS], total = 0;
    struct rusage usage;
    cache_bytes(bytes, &s->config, rows, d->capacity);
    for (int i = 0; i < CACHE_KINDS; i++) total += bytes[i];
    getrusage(RUSAGE_SELF, &usage);
#ifdef __APPLE__
    const double peak = (double)usage.ru_maxrss;
#else
    const double peak = 1024.0 * (double)usage.ru_maxrss;
#endif
    fprintf(stderr, "prefill    %" PRId64 " tokens in %.1f ms: %s tok/s\n", s->prefilled, 1e3 * s->prefill_seconds,
            human_count((double)s->prefilled / s->prefill_seconds));
    if (s->steps)
        fprintf(stderr, "decode     %" PRId64 " tokens in %.1f ms: %s tok/s, %.3f ms a token\n", s->steps * rows, 1e3 * s->decode_seconds,
                human_count((double)(s->steps * rows) / s->decode_seconds), 1e3 * s->decode_seconds / (double)s->steps);
    fprintf(stderr, "cache      %s for %" PRId64 " tokens, %" PRId64 " used: ", human_bytes((double)total), d->capacity, d->length);
    fprintf(stderr, "window %s, selected %s, compressed %s, full %s\n", human_bytes((double)bytes[WIN]), human_bytes((double)bytes[SLC]),
            human_bytes((double)bytes[CMP]), human_bytes((double)bytes[CACHE_FULL]));
    fprintf(stderr, "memory     %s at the peak, weights %s\n", human_bytes(peak), human_bytes((double)(s->model.num_elements * (int64_t)sizeof(real))));
    fprintf(stderr, "seed       %" PRId64 "\n", s->options.seed);
}

#ifndef SAMPLE_NO_MAIN
int main(int argc, char **argv) {
    Sampler s;
    SampleOptions *o = &s.options;
    start_process(argv);
    memset(&s, 0, sizeof s);
    program_name = "sample";
    *o = sample_default();
    options_parse(sample_options, SAMPLE_OPTIONS, o, o->given, argc, argv);
    if (o->help) {
        sample_help();
        if (fflush(stdout) != 0) die(1, "cannot write to the standard output: %s", strerror(errno));
        return 0;
    }
    sample_check_options(o);
#ifdef _OPENMP
    if (o->threads) omp_set_num_threads(o->threads);
#endif
    sampler_load(&s);
    sampler_create(&s);
    if (!o->interactive || o->prompt || o->file) {
        int64_t len = o->prompt ? (int64_t)strlen(o->prompt) : 0;
        char *text = o->file ? read_prompt(o->file, &len) : xstrdup(o->prompt ? o->prompt : "");
        sample_prompt(&s, text, len);
        free(text);
    }
    if (o->interactive) sample_interactively(&s);
    if (o->stats) print_stats(&s);
    sampler_free(&s);
    return 0;
}
#endif
