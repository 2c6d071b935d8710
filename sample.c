/*
nsa.c: text from a trained model, one token at the cost of one token.

    make sample
    ./sample -e out/run_001/latest -p "Once upon a time"
    ./sample --help

samplecu is the same program on a GPU: `make samplecu` compiles this file with train_nsa.cu in the place of train_nsa.c.

Training computes all tokens of a text at once. Here each new token needs the keys and values of the old
ones, and they are kept. NSA makes that cheap to read:

    branch        kept for each layer              read for one token
    compression   one key a block, K~ and V~       all of them: t/d keys
    selection     all keys k_slc, v_slc            n blocks of l' keys
    window        the last w keys, in a ring       w keys
    full layers   all keys                         all of them: t keys

A block is compressed when its last token comes; until then its raw keys and values wait in a tail of at
most l tokens.

The sections: 1. what is kept, 2. decoding on the CPU (sample), 3. decoding on the GPU (samplecu), 4. the decoder,
5. drawing a token, 6. the command line, 7. text in and out, main.

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
// 1. What is kept

// Keys (rows,KV,slots,D) and values (rows,KV,slots,Dv): what one query reads lies together. Their numbers are `real`, and with
// samplecu --dtype bf16 bf16.
typedef struct KeyCache { void *k, *v; int64_t slots; } KeyCache;

typedef struct LayerCache {
    KeyCache branch[BRANCHES];      // a full-attention layer has the first one only, for every token
    void *tail[2];                  // (rows,l,KV·D), (rows,l,KV·Dv): raw k_cmp and v_cmp that later blocks need
} LayerCache;

typedef struct Decoder {
    Model *model;
    int rows;                       // texts side by side, all of the same length
    int64_t length, capacity;       // tokens in the caches, and how many they have room for
    LayerCache *layers;
    real *logits;                   // (rows,V), in the host's memory
    struct Working *work;           // what sections 2 and 3 compute with
} Decoder;

// The sections 2 and 3 each bring:
void decoder_open(Decoder *d);                                  // what does not depend on the capacity
void decoder_close(Decoder *d);
void decoder_room(Decoder *d);                                  // what does
int64_t decoder_room_bytes(const Config *c, int rows, int64_t tokens);
void *lists_grow(void *old, int64_t lists, int64_t old_slots, int64_t slots, int64_t slot_bytes);    // the same lists with more slots
void lists_free(void *lists);
void prefill_begin(Decoder *d, const int *tokens, int64_t T);   // the prompt into the first layer,
void prefill_layer(Decoder *d, int layer, int64_t T);           // through a layer, and what that leaves into the caches
void prompt_choices(const Decoder *d, int layer, int64_t T, int *block_idx, real *gates);       // (T,KV,n), (T,H,3) of that layer
void prompt_logits(Decoder *d, int64_t first, int64_t n, real *logits);                         // (n,V) behind tokens first..
void decode_token(Decoder *d, const int *tokens);               // one token more in each row, into d->logits

int64_t cache_slots(const Config *c, int layer, int branch, int64_t capacity) {
    if (layer_is_full(c, layer) || branch == SLC) return capacity;
    return branch == WIN ? min64(c->window, capacity) : compressed_seen(capacity - 1, c->cmp_block, c->cmp_stride);
}

static inline int cache_branches(const Config *c, int layer) { return layer_is_full(c, layer) ? 1 : BRANCHES; }

// Bytes of a number in the caches.
static inline int64_t cache_number(const Config *c) { return ON_GPU && c->torch_dtype == DTYPE_BF16 ? 2 : (int64_t)sizeof(real); }

// Bytes of the caches by kind, by branch and then full-attention layers, for `tokens` tokens.
enum { CACHE_FULL = BRANCHES, CACHE_KINDS };

void cache_bytes(int64_t bytes[CACHE_KINDS], const Config *c, int rows, int64_t tokens) {
    const int64_t width = (int64_t)rows * c->num_key_value_heads * (c->head_dim + c->v_head_dim) * cache_number(c);
    memset(bytes, 0, CACHE_KINDS * sizeof bytes[0]);
    for (int l = 0; l < c->num_hidden_layers; l++) {
        for (int b = 0; b < cache_branches(c, l); b++)
            bytes[layer_is_full(c, l) ? CACHE_FULL : b] += cache_slots(c, l, b, tokens) * width;
        if (!layer_is_full(c, l)) bytes[CMP] += c->cmp_block * width;
    }
}

// ----------------------------------------------------------------------------
// 2. Decoding on the CPU. The tail holds the tokens since the first one of the next block.

#ifndef NSA_CU
static const char *device_name = "machine", *memory_name = "memory";

typedef struct Working {
    real *angles;                   // (2,D): RoPE of this token, and of the first token of the block it completes
    real *compressed, *hidden;      // a block that is being compressed: (rows,KV,D | Dv), (rows,KV,2D | 2Dv)
    real *scratch;                  // for each thread: scores (G,capacity), importance (capacity)
} Working;

static int64_t thread_scratch(const Config *c, int64_t capacity) {
    return thread_count() * (c->num_attention_heads / c->num_key_value_heads + 1) * capacity;
}

void decoder_open(Decoder *d) {
    const Config *c = &d->model->config;
    const int64_t D = c->head_dim, Dv = c->v_head_dim, n = (int64_t)d->rows * c->num_key_value_heads;
    Working *w = d->work = (Working *)xcalloc(1, sizeof(Working));
    w->angles = (real *)xmalloc((size_t)(2 * D) * sizeof(real));
    w->compressed = (real *)xmalloc((size_t)(n * max64(D, Dv)) * sizeof(real));
    w->hidden = (real *)xmalloc((size_t)(n * compress_hidden(c->compress, (int)max64(D, Dv))) * sizeof(real));
    d->logits = (real *)xmalloc((size_t)d->rows * (size_t)c->vocab_size * sizeof(real));
}

void decoder_close(Decoder *d) {
    void *all[] = {d->work->angles, d->work->compressed, d->work->hidden, d->work->scratch, d->work, d->logits};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

void decoder_room(Decoder *d) {
    free(d->work->scratch);
    d->work->scratch = (real *)xmalloc((size_t)thread_scratch(&d->model->config, d->capacity) * sizeof(real));
}

int64_t decoder_room_bytes(const Config *c, int rows, int64_t tokens) {
    (void)rows;
    return thread_scratch(c, tokens) * (int64_t)sizeof(real);
}

int64_t peak_memory(const Decoder *d) {
    struct rusage usage;
    (void)d;
    getrusage(RUSAGE_SELF, &usage);
#ifdef __APPLE__
    return (int64_t)usage.ru_maxrss;
#else
    return 1024 * (int64_t)usage.ru_maxrss;
#endif
}

void *lists_grow(void *old, int64_t lists, int64_t old_slots, int64_t slots, int64_t slot_bytes) {
    char *grown = (char *)xmalloc((size_t)(lists * slots * slot_bytes));
    for (int64_t i = 0; i < lists && old; i++)
        memcpy(grown + i * slots * slot_bytes, (const char *)old + i * old_slots * slot_bytes, (size_t)(old_slots * slot_bytes));
    free(old);
    return grown;
}

void lists_free(void *lists) { free(lists); }

// Puts x (n,KV,width), x_row apart, into slots `first` and on of one row's lists (KV,slots,width); a ring goes round.
void lists_put(real *lists, int64_t slots, int64_t first, const real *x, int64_t x_row, int64_t n, int kv, int64_t width) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t h = 0; h < kv; h++)
            memcpy(lists + (h * slots + (first + i) % slots) * width, x + i * x_row + h * width, (size_t)width * sizeof(real));
}

void cache_put(KeyCache *cache, const Config *c, int row, int64_t first, const real *k, int64_t k_row,
                      const real *v, int64_t v_row, int64_t n) {
    const int KV = c->num_key_value_heads;
    lists_put((real *)cache->k + row * KV * cache->slots * c->head_dim, cache->slots, first, k, k_row, n, KV, c->head_dim);
    lists_put((real *)cache->v + row * KV * cache->slots * c->v_head_dim, cache->slots, first, v, v_row, n, KV, c->v_head_dim);
}

// Raw k_cmp and v_cmp of n tokens, from place `at` of the tail on.
void tail_put(LayerCache *cache, const Config *c, int row, int64_t at, const real *k, const real *v, int64_t x_row, int64_t n) {
    for (int i = 0; i < 2; i++) {
        const int64_t width = (int64_t)c->num_key_value_heads * (i ? c->v_head_dim : c->head_dim);
        for (int64_t t = 0; t < n; t++)
            memcpy((real *)cache->tail[i] + (row * c->cmp_block + at + t) * width, (i ? v : k) + t * x_row, (size_t)width * sizeof(real));
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

void prefill_begin(Decoder *d, const int *tokens, int64_t T) { model_embed(d->model, tokens, 1, T, NULL); }

void prefill_layer(Decoder *d, int layer, int64_t T) {
    model_layer_forward(d->model, layer, 1, T, NULL);
    cache_fill(d, layer, T);
}

void prompt_choices(const Decoder *d, int layer, int64_t T, int *block_idx, real *gates) {
    const Config *c = &d->model->config;
    const LayerActs *a = &d->model->acts[layer];
    memcpy(block_idx, a->block_idx, (size_t)(T * c->num_key_value_heads * c->sel_blocks) * sizeof(int));
    memcpy(gates, a->gates, (size_t)(T * c->num_attention_heads * BRANCHES) * sizeof(real));
}

// Logits of n rows of the last layer's output, from row `first` on.
void prompt_logits(Decoder *d, int64_t first, int64_t n, real *logits) {
    Model *m = d->model;
    const int64_t C = m->config.hidden_size, V = m->config.vocab_size;
    const real *x = m->acts[m->config.num_hidden_layers - 1].out;
    rmsnorm_forward(m->scratch.norm, m->final_rstd, x + first * C, m->norm, n, C, m->config.rms_norm_eps);
    linear_forward(logits, V, m->scratch.norm, C, m->head, n, C, V);
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
        real *lists = (real *)(v ? cache->branch[CMP].v : cache->branch[CMP].k), *tails = (real *)cache->tail[v];
        compress_forward(d->work->compressed, d->work->hidden, tails, &m->layers[layer].compress[v], &shape, m->scratch.compress);
        if (!v) rope(d->work->compressed, KV * D, d->work->angles + D, d->rows, 1, 0, (int)KV, (int)D, 1);
        for (int r = 0; r < d->rows; r++) {
            real *tail = tails + r * l * KV * D;
            lists_put(lists + r * KV * slots * D, slots, i, d->work->compressed + r * KV * D, KV * D, 1, (int)KV, D);
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
    rope(a->wide, row.size, d->work->angles, rows, 1, 0, H, D, 1);
    for (int b = 0; b < row.branches; b++) {
        const int compressed = nsa && b == CMP;
        if (!compressed) rope(a->wide + row.k[b], row.size, d->work->angles, rows, 1, 0, KV, D, 1);
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
        real *p = d->work->scratch + thread_index() * (G + 1) * d->capacity;
        int *idx = nsa ? a->block_idx + item * c->sel_blocks : NULL;
        for (int b = 0; b < row.branches; b++) {
            const KeyCache *keys = &cache->branch[b];
            const int64_t all = nsa && b == CMP ? seen : min64(t + 1, keys->slots);
            const real *k = (const real *)keys->k + item * keys->slots * D, *v = (const real *)keys->v + item * keys->slots * Dv;
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

void decode_token(Decoder *d, const int *tokens) {
    Model *m = d->model;
    const Config *c = &m->config;
    rope_angles(d->work->angles, d->length, c->head_dim, c->rope_theta);
    rope_angles(d->work->angles + c->head_dim, max64(0, d->length + 1 - c->cmp_block), c->head_dim, c->rope_theta);
    model_embed(m, tokens, d->rows, 1, NULL);
    for (int l = 0; l < c->num_hidden_layers; l++) {
        decode_attention(d, l);
        ffn_layer_forward(m, l, d->rows, 1, NULL);
    }
    prompt_logits(d, 0, d->rows, d->logits);
}
#endif

// ----------------------------------------------------------------------------
// 3. Decoding on the GPU. One token is one CUDA graph: some ten small kernels a layer, recorded once and launched again for every
// token. What changes from token to token, the tokens, their position and what follows from it, is the graph's input, which the kernels
// read from memory; it is recorded anew only when the caches move to a larger place. There are two graphs: one token in d completes a
// block of tokens that must be compressed, the others do without these kernels. All that is long is shared out among the whole GPU:
//
//     linear               a warp for each output reads its row of the weights once; several texts with weights in bf16 go to the tensor cores
//     token_kernel         gates, RoPE, the token's keys and values into the caches; where it completes a block of tokens, that block with its positions
//     compress_step        such a block becomes a compressed key and value
//     attention            a share of the keys, for the heads that have them in common; merge_kernel puts the shares together
//     selection            which blocks the selection branch reads, from the scores of the compressed branch
//
// Weights and caches are F, float or bf16 (--dtype); everything else, the residual stream too, is f32. Attention, selection and compression
// come in two tiers, as in training: simple kernels that take any shape and both types, and for bf16 fast ones (choose_tier): two
// launches for a layer's sparse attention, and one for compression.
//
// Atomics only count, no numbers of the model are added up by them, and shares depend on the position alone: the same seed gives the same text. The tail is a ring of l tokens.

#ifdef NSA_CU
static const char *device_name = "GPU", *memory_name = "GPU memory";

enum { MOST_THREADS = 1024 };       // of a block: the kernels that have few blocks and much to do
enum { DECODE_WARPS = 8, DECODE_THREADS = DECODE_WARPS * WARP };        // of a block: the fast kernels

// What one token reads of a list of keys: a branch's, or those of a full-attention layer. The splits of a launch are dealt out to the lists
// that it reads; each takes `share` keys of its list.
typedef struct Reading {
    int keys, share, first_split, splits;
    int fresh;                      // the slot of the key that the token brings, or -1: a compressed one comes with every d-th token
} Reading;

typedef struct Input {              // of the token to come
    int64_t position;
    Reading of[CACHE_KINDS];
    int blocks, each;               // selection blocks up to its own; so many of those to choose of a member of a team has at most, 0: there is no choice
    int tokens[];                   // (rows)
} Input;

// The shares of attention before they are merged: branch, row, head, split. Maximum of the scores, sum of exp, sum of exp · value.
typedef struct Shares { float *top, *sum, *out; } Shares;

// What fast_attend_kernel leaves of each tile of TILE_KEYS compressed keys for the choice: 2^score of MMA_ROWS heads, over their highest score in the block of threads so far,
// which is `top`, in units of log2. of: (rows,KV,groups,tiles,TILE_KEYS,MMA_ROWS) numbers of 16 bits, 11 of them digits, times 2^LEFT_SHIFT; top (rows,KV,groups,tiles,MMA_ROWS).
// Heads stand as a lane has them: 0, 8, 1, 9, ..
typedef struct HeadWeights { uint4 *of; float *top; } HeadWeights;

// For a team of blocks of threads that make the choice of a list and read what is chosen (fast_selected_kernel): what follows from its shape, and where things stand in a
// member's dynamic shared memory, in bytes.
typedef struct TeamPlan {
    int tile;                           // keys of a warp's tile of what is chosen: half of TILE_KEYS where so all of a member's keys are one round
    int team, places;                   // members of a team, 0: none fits; blocks that are chosen by their importance
    int slice, across, groups;          // numbers of out that a member adds up; threads that have them by fours, in so many groups
    int per_block, pieces, at_once;     // compressed blocks that begin in a selection block, strides in one, selection blocks that are weighed at once
    int guesses;                        // of its best blocks that a member fetches before it knows what is chosen: half of those that it may expect
    float per_slice, per_across, per_key;   // 1 / slice, 1 / across, 1 / sel_block
    // The choice has in the ring's place (with memory of its own the next kernel's blocks would not fit beside) its best candidates, at 0, and behind them those of groups
    // of threads; those it finds them among; weights of the compressed blocks near to some of its selection blocks; the importance of all of these; aside: the first shares
    // of the branches before, of each thread
    int candidates, near, importance, aside;
    // Behind the ring. partial: (groups,slice), the branches before; told: (team,slice), what each member has summed up; sums: (team,G) pairs of top, in units of
    // log2, and sum of weights; offered: (places,MOST_TEAM) candidates; arrived: (LETTERS) barriers; lse: (2,G) of the compressed branch and the window; gates: (G,3)
    int partial, told, sums, offered, arrived, lse, gates;
    int bytes;
} TeamPlan;

typedef struct Working {
    cudaStream_t stream;
    cudaGraphExec_t graph[2];       // of a token that completes no block, and of one that does; NULL: to be recorded
    Input *input;                   // in the host's memory
    int64_t free_bytes;             // before anything was taken
    int64_t least_free_bytes;       // since then
    int fast;                       // the tier
    int splits;                     // the most shares of a launch's keys
    TeamPlan plan;                  // of the fast tier's sparse attention
    void *memory;                   // of all that follows, on the GPU
    Input *device_input;
    double *frequency;              // (D/2) RoPE: what a pair turns by from one position to the next
    float *angles;                  // (2,D): RoPE of this token, and of the first token of the block it completes
    float *x, *mid;                 // (rows,C) residual stream before and behind attention
    float *wide, *gates;            // (rows,wide), (rows,H,3)
    bf16 *queries;                  // (rows,H,D) turned, for the fast tier
    void *flat[2], *hidden[2];      // F (rows·KV,l·D | l·Dv), (rows·KV,2D | 2Dv): blocks that are being compressed
    int *done;                      // of compression, see CompressStep
    HeadWeights heads;              // of the compressed branch, for the fast tier's choice
    float *scores;                  // (rows,H,score_row) of the compressed branch; this, importance and choice are the simple tier's
    float *importance;              // (rows,KV,blocks)
    int *block_idx;                 // (rows,KV,n)
    Shares parts;
    float *attention;               // (rows,H,Dv)
    float *ffn;                     // (rows,F), or of the chosen experts (rows,k,Fe)
    float *router, *share;          // (rows,E), (rows,k)
    int *choice;                    // (rows,k)
    float *logits;                  // (rows,V)
} Working;

// What the kernels of attention must know of the model.
typedef struct DecodeShape { int full, rows, H, KV, G, D, Dv, splits; SelectShape select; } DecodeShape;

static DecodeShape shape_of_config(const Config *c, int full, int rows, int splits) {
    const int H = c->num_attention_heads, KV = c->num_key_value_heads;
    DecodeShape s = {full, rows, H, KV, H / KV, c->head_dim, c->v_head_dim, splits, select_shape(c)};
    return s;
}
static DecodeShape decode_shape(const Decoder *d, int layer) { return shape_of_config(&d->model->config, layer_is_full(&d->model->config, layer), d->rows, d->work->splits); }

// ----------------------------------------------------------------------------
// Launches. These kernels are so short that setting up the next one takes as long as running this one. From sm_90 on the two overlap
// (programmatic dependent launch): a kernel lets its successor's blocks come as soon as its own have all begun, or later, when what it needs first has been
// asked for, and they wait where they first touch what others write (wait_for_previous does both, wait_only is for kernels that have something to do between
// the two). Each kernel waits, even before it returns: so all that came before it is done. What may be read before is
// what the kernels of this token do not write: weights, the input, older tokens' keys.
//
// On the same GPUs the blocks of threads of a cluster run at the same time and can wait for each other: a team. Elsewhere a team is one block.

// What members of a team tell each other goes into the other's shared memory, where a barrier counts the bytes that have come: one for each of LETTERS exchanges.
// Without clusters a member is alone.
enum { OFFERED, SUMMED, LETTERS };

#ifdef CUDA_ON_CPU
static inline void let_next_come(void) {}
static inline void wait_only(void) {}
static inline void wait_for_previous(void) {}
static inline void team_begin(uint64_t *, const int *) {}
static inline void team_there(void) { emu_cluster_barrier(); }
template <typename X> static inline void tell(X *x, X y, uint64_t *, int member) { *(X *)emu_of_block(x, member) = y; }
static inline void told(uint64_t *) { emu_cluster_barrier(); }
static inline void prefetch(const void *) {}
static inline void prefetch_bytes(const void *, int) {}
static inline uint64_t read_once(void) { return 0; }
template <typename X> static inline X by_now(X x) { return x; }
static inline void cp_async_16_once(void *to, const void *from, int filled, uint64_t) { cp_async_16(to, from, filled); }
#else
__device__ static inline void let_next_come(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ static inline void wait_only(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ static inline void wait_for_previous(void) {
    let_next_come();
    wait_only();
}
// So many bytes are going to come.
__device__ static inline void team_begin(uint64_t *arrived, const int bytes[LETTERS]) {
#if __CUDA_ARCH__ >= 900
    for (int i = 0; i < LETTERS && threadIdx.x == 0; i++) barrier_init(arrived + i, 1);
    if (threadIdx.x == 0) barriers_ready();
    for (int i = 0; i < LETTERS && threadIdx.x == 0; i++) barrier_expect(arrived + i, bytes[i]);
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
// Before anything is told.
__device__ static inline void team_there(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}
// y (8 or 16 bytes) goes where x lies in a member's memory.
template <typename X>
__device__ static inline void tell(X *x, X y, uint64_t *arrived, int member) {
#if __CUDA_ARCH__ >= 900
    unsigned to, barrier;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared_address(x)), "r"(member));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(barrier) : "r"(shared_address(arrived)), "r"(member));
    static_assert(sizeof y == 8 || sizeof y == 16, "there is an instruction for that");
    if constexpr (sizeof y == 8)
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" :: "r"(to), "l"(*(const uint64_t *)&y), "r"(barrier) : "memory");
    else
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, [%5];"
                     :: "r"(to), "r"(((const unsigned *)&y)[0]), "r"(((const unsigned *)&y)[1]), "r"(((const unsigned *)&y)[2]), "r"(((const unsigned *)&y)[3]), "r"(barrier) : "memory");
#else
    *x = y;
#endif
}
// Waits for all that is told in this exchange.
__device__ static inline void told(uint64_t *arrived) {
#if __CUDA_ARCH__ >= 900
    barrier_wait(arrived, 0);
#else
    __syncthreads();
#endif
}
// Works out x here, where there is time: the compiler would rather do that where x is needed, behind a wait.
__device__ static inline int by_now(int x) {
    asm volatile("" : "+r"(x));
    return x;
}
template <typename X>
__device__ static inline X *by_now(X *x) {
    asm volatile("" : "+l"(x));
    return x;
}
// Into the L2 cache: for weights, which nobody writes, before the wait.
__device__ static inline void prefetch(const void *p) { asm volatile("prefetch.global.L2 [%0];" :: "l"(p)); }
// The same of so many bytes, a multiple of 16.
__device__ static inline void prefetch_bytes(const void *p, int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(p), "r"(bytes));
#endif
}
// As cp_async_16, for what is read once: it is the first to leave the L2 cache, where the weights must stay until all keys have been read.
__device__ static inline uint64_t read_once(void) {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ static inline void cp_async_16_once(void *to, const void *from, int filled, uint64_t once) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" :: "r"(shared_address(to)), "l"(from), "r"(filled), "l"(once) : "memory");
}
#endif

// Compiled with -DPHASES, dev/cuda/decode bench prints when the first block of threads of each kernel of sparse attention came to these points.
enum { BEFORE, ALONE, ATTENDED, TOLD, NEXT_ALONE, KNOWN, WEIGHED, MET, CHOSEN, ATTENDED_CHOSEN, TOLD_AGAIN, MET_AGAIN, MERGED, PHASES_IN_ALL };
#ifdef PHASES
static const char *phase_names[] = {"the token before merged", "previous kernel waited for", "compressed keys attended", "sums written", "previous kernel waited for", "what is known asked for", "blocks weighed",
                                    "team waited for", "blocks chosen", "chosen blocks attended", "sums told", "team waited for", "merged"};
__device__ long long phase_clock[PHASES_IN_ALL];
__device__ static inline void phase(int which) {
    if (blockIdx.x || blockIdx.y || threadIdx.x) return;
    if (which == ALONE) phase_clock[BEFORE] = phase_clock[MERGED];
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(phase_clock[which]));
}
#else
DEVICE static inline void phase(int) {}
#endif

// Teams are of so many neighbours along y; 0: there are none.
static cudaLaunchConfig_t launch_config(cudaLaunchAttribute attributes[2], cudaStream_t stream, dim3 blocks, int64_t threads, int64_t shared, int team) {
    cudaLaunchConfig_t config = {};
    config.gridDim = blocks;
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = (size_t)shared;
    config.stream = stream;
    config.attrs = attributes;
    if (gpu.major < 9) return config;
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {1, (unsigned)team, 1};
    config.numAttrs = team ? 2 : 1;
    return config;
}

template <typename... Parameters, typename... Arguments>
static void launch_teams(cudaStream_t stream, void (*kernel)(Parameters...), dim3 blocks, int64_t threads, int64_t shared, int team, Arguments... arguments) {
    cudaLaunchAttribute attributes[2];
    const cudaLaunchConfig_t config = launch_config(attributes, stream, blocks, threads, shared, team);
    CUDA(cudaLaunchKernelEx(&config, kernel, (Parameters)arguments...));
    LAUNCHED();
}
template <typename... Parameters, typename... Arguments>
static void launch(cudaStream_t stream, void (*kernel)(Parameters...), dim3 blocks, int64_t threads, int64_t shared, Arguments... arguments) {
    launch_teams(stream, kernel, blocks, threads, shared, 0, arguments...);
}

// ----------------------------------------------------------------------------
// Linear maps of few rows: what counts is to read the weights once, 16 bytes at a time where they lie so.

enum { LINEAR_ROWS = 8 };       // rows that a warp meets its weights with at once

// N numbers of x, of which there are `left`, as f32.
template <int N, typename X>
__device__ static inline void read_numbers(float *to, const X *x, int64_t left, int aligned) {
    constexpr int P = pack_size<X> < N ? pack_size<X> : N;
    if (aligned) {
        #pragma unroll
        for (int i = 0; i < N; i += P) {
            const Pack<X, P> pack = load<P>(x + i);
            #pragma unroll
            for (int j = 0; j < P; j++) to[i + j] = (float)pack.of[j];
        }
    } else {
        #pragma unroll
        for (int i = 0; i < N; i++) to[i] = i < left ? (float)x[i] : 0;
    }
}

// A warp: dot[r] = Σ_j weight[j]·norm[j]·x[r,j], and with norm square[r] = Σ_j x[r,j]², for `rows` <= ROWS rows of x.
template <int ROWS, typename F, typename X>
__device__ static inline void warp_dots(float *dot, float *square, const F *weight, const float *norm, const X *x, int rows, int64_t c) {
    constexpr int N = pack_size<F>;
    const int aligned = c % N == 0 && ((uintptr_t)weight | (uintptr_t)norm | (uintptr_t)x) % 16 == 0;
    for (int r = 0; r < ROWS; r++) dot[r] = square[r] = 0;
    #pragma unroll 4
    for (int64_t j = N * lane(); j < c; j += N * WARP) {
        float w[N], y[N];
        read_numbers<N>(w, weight + j, c - j, aligned);
        if (norm) {
            read_numbers<N>(y, norm + j, c - j, aligned);
            for (int i = 0; i < N; i++) w[i] *= y[i];
        }
        for (int r = 0; r < ROWS; r++) {
            if (r >= rows) continue;
            read_numbers<N>(y, x + r * c + j, c - j, aligned);
            for (int i = 0; i < N; i++) dot[r] += w[i] * y[i];
            for (int i = 0; i < N && norm; i++) square[r] += y[i] * y[i];
        }
    }
    for (int r = 0; r < ROWS; r++) {
        if (r < rows) dot[r] = warp_sum(dot[r]);
        if (r < rows && norm) square[r] = warp_sum(square[r]);
    }
}

template <typename F>
__device__ static inline float warp_dot(const F *weight, const float *x, int64_t c) {
    float dot, square;
    warp_dots<1>(&dot, &square, weight, NULL, x, 1, c);
    return dot;
}

// out (rows,oc) = [add +] [rmsnorm](x (rows,c)) · weight (oc,c)ᵀ. With swiglu weight is (2oc,c), gate and up: out = silu(gate)·up.
template <typename F>
struct Linear {
    float *out;
    const float *add, *norm, *x;        // add, norm: or NULL
    const F *weight;
    int64_t rows, c, oc;
    double eps;
    int swiglu;
};

// RMSNorm's factor of a row whose squares add up to `square`.
template <typename F>
__device__ static inline float norm_scale(const Linear<F> *a, float square) { return (float)(1 / sqrt((double)square / (double)a->c + a->eps)); }
// Output o of row r, of the scaled sum y, with swiglu gate's, and up's.
template <typename F>
__device__ static inline void put_output(const Linear<F> *a, int64_t r, int64_t o, float y, float up) {
    const int64_t at = r * a->oc + o;
    a->out[at] = (a->add ? a->add[at] : 0) + (a->swiglu ? y * sigmoid(y) * up : y);
}

template <int ROWS, typename F>
__device__ static inline void warp_linear(float *y, const Linear<F> *a, const F *weight, int64_t r0, int rows) {
    float square[ROWS];
    warp_dots<ROWS>(y, square, weight, a->norm, a->x + r0 * a->c, rows, a->c);
    for (int r = 0; r < ROWS && a->norm; r++) y[r] *= norm_scale(a, square[r]);
}

template <typename F>
__device__ static inline void prefetch_row(const F *weight, int64_t c) {
    enum { LINE = 128 / sizeof(F) };
    for (int64_t j = LINE * lane(); j < c; j += LINE * WARP) prefetch(weight + j);
}

template <typename F, int ROWS>
__global__ void linear_kernel(Linear<F> a) {
    const int64_t item = global_warp(), o = item % a.oc, r0 = item / a.oc * ROWS;
    const int there = r0 < a.rows;
    if (there) prefetch_row(a.weight + o * a.c, a.c);
    if (there && a.swiglu) prefetch_row(a.weight + (a.oc + o) * a.c, a.c);
    wait_for_previous();
    if (!there) return;
    const int rows = (int)min64(ROWS, a.rows - r0);
    float y[ROWS], up[ROWS];
    warp_linear<ROWS>(y, &a, a.weight + o * a.c, r0, rows);
    if (a.swiglu) warp_linear<ROWS>(up, &a, a.weight + (a.oc + o) * a.c, r0, rows);
    for (int r = 0; r < ROWS; r++)
        if (lane() == 0 && r < rows) put_output(&a, r0 + r, o, y[r], a.swiglu ? up[r] : 0);
}

// The same of several rows, with weights in bf16, on the tensor cores. A block of threads has TILES times FAST_OUTPUTS outputs (with swiglu two tiles, gate's and up's) of up to
// MMA_ROWS rows, and its warps share c, in steps. The weights of the first steps wait in shared memory for what the previous kernel makes of x. x is the sum of two numbers
// of bf16, which leaves an error of 2^-17: what counts is to read the weights once, the second product is in their shadow.
enum { FAST_OUTPUTS = 8, FAST_STEP = 32, FAST_ROUND = DECODE_WARPS * FAST_STEP, FAST_STEPS = 16, MANY_TILES = 4 };
static int64_t fast_steps_bytes(int64_t steps) { return steps * DECODE_THREADS * (int64_t)sizeof(uint4); }

// In K a lane takes eight neighbours of both factors where the instruction's layout has four pairs: the order of a sum's terms is free.
__device__ static inline void mma_of_eights(float d[4], const uint4 &low, const uint4 &high, const uint4 &right) {
    const unsigned a[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}}, b[2][2] = {{right.x, right.y}, {right.z, right.w}};
    mma_16816(d, a[0], b[0]);
    mma_16816(d, a[1], b[1]);
}

// Zeros where nothing is there.
__device__ static inline void read_eight(float x[8], const float *from, int there) {
    if (there) read_numbers<8>(x, from, 8, 1);
    else for (int i = 0; i < 8; i++) x[i] = 0;
}
// x = first + rest, of bf16 each, as mma_of_eights takes them.
__device__ static inline void split_eight(uint4 *first, uint4 *rest, const float x[8]) {
    unsigned f[4], r[4];
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        f[i] = two_bf16(x[2 * i], x[2 * i + 1]);
        r[i] = two_bf16(x[2 * i] - low_of(f[i]), x[2 * i + 1] - high_of(f[i]));
    }
    *first = make_uint4(f[0], f[1], f[2], f[3]);
    *rest = make_uint4(r[0], r[1], r[2], r[3]);
}

// grid: outputs, rows by MMA_ROWS
template <int TILES>
__global__ void __launch_bounds__(DECODE_THREADS) fast_linear_kernel(Linear<bf16> a) {
    constexpr int AHEAD = TILES == 1 ? 4 : 2;       // steps whose x is asked for at once: a block waits less, or more blocks find registers
    __shared__ float sums[DECODE_WARPS][MMA_ROWS][TILES * FAST_OUTPUTS], squares[DECODE_WARPS][MMA_ROWS];
    extern __shared__ uint4 fast_shared[];      // weights (steps,TILES,threads)
    const int c = (int)a.c, oc = (int)a.oc, warp = threadIdx.x / WARP, low = lane() / 4, outputs = (a.swiglu ? 1 : TILES) * FAST_OUTPUTS, o0 = blockIdx.x * outputs;
    const int64_t r0 = (int64_t)blockIdx.y * MMA_ROWS;
    const int rows = (int)min64(MMA_ROWS, a.rows - r0), begin = warp * FAST_STEP, k0 = begin + lane() % 4 * 8;
    const int steps = begin < c ? (c - begin + FAST_ROUND - 1) / FAST_ROUND : 0, early = min32(steps, FAST_STEPS / TILES);
    const bf16 *weight[TILES];
    #pragma unroll
    for (int t = 0; t < TILES; t++) weight[t] = a.weight + (a.swiglu ? (int64_t)t * oc + min32(o0 + low, oc - 1) : min32(o0 + t * FAST_OUTPUTS + low, oc - 1)) * c + k0;
    #pragma unroll 1
    for (int step = 0; step < early; step++)
        #pragma unroll
        for (int t = 0; t < TILES; t++) {
            const int there = k0 + step * FAST_ROUND < c;
            cp_async_16(fast_shared + (step * TILES + t) * DECODE_THREADS + threadIdx.x, there ? weight[t] + step * FAST_ROUND : a.weight, there ? 16 : 0);
        }
    cp_async_commit();
    wait_for_previous();
    cp_async_wait<0>();         // a lane's own, so that warps need not meet
    float d[TILES][4] = {{0}}, square[2] = {0};
    #pragma unroll 1
    for (int step0 = 0; step0 < steps; step0 += AHEAD) {
        float x[AHEAD][2][8];
        #pragma unroll
        for (int n = 0; n < AHEAD; n++)
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                const int k = k0 + (step0 + n) * FAST_ROUND, r = low + half * 8;
                read_eight(x[n][half], a.x + (r0 + r) * c + k, r < rows && k < c);
            }
        #pragma unroll
        for (int n = 0; n < AHEAD; n++) {
            const int step = step0 + n, k = k0 + step * FAST_ROUND;
            if (step >= steps) break;
            float norm[8];
            uint4 first[2], rest[2];
            if (a.norm) read_eight(norm, a.norm + k, k < c);
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                for (int i = 0; i < 8 && a.norm; i++) {
                    square[half] += x[n][half][i] * x[n][half][i];
                    x[n][half][i] *= norm[i];
                }
                split_eight(&first[half], &rest[half], x[n][half]);
            }
            #pragma unroll
            for (int t = 0; t < TILES; t++) {
                uint4 w = {0, 0, 0, 0};
                if (step < early) w = fast_shared[(step * TILES + t) * DECODE_THREADS + threadIdx.x];
                else if (k < c) w = *(const uint4 *)(weight[t] + step * FAST_ROUND);
                mma_of_eights(d[t], first[0], first[1], w);
                mma_of_eights(d[t], rest[0], rest[1], w);
            }
        }
    }
    #pragma unroll
    for (int t = 0; t < TILES; t++)
        for (int e = 0; e < 4; e++) sums[warp][low + e / 2 * 8][t * FAST_OUTPUTS + lane() % 4 * 2 + e % 2] = d[t][e];
    for (int half = 0; half < 2; half++) {
        square[half] = quad_sum(square[half]);
        if (lane() % 4 == 0) squares[warp][low + half * 8] = square[half];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * outputs; i += DECODE_THREADS) {
        const int r = i / outputs, o = i % outputs;
        if (o0 + o >= oc) continue;
        float y = 0, up = 0, sum = 0;
        for (int v = 0; v < DECODE_WARPS; v++) {
            y += sums[v][r][o];
            if (a.swiglu) up += sums[v][r][(TILES - 1) * FAST_OUTPUTS + o];
            if (a.norm) sum += squares[v][r];
        }
        const float scale = a.norm ? norm_scale(&a, sum) : 1;
        put_output(&a, r0 + r, o0 + o, y * scale, up * scale);
    }
}

// Whether it is done here: it is where there are several rows, of whole eights at multiples of 16 bytes. Many tiles, which read x less often, where as many blocks as fill the GPU are left.
static int fast_linear(cudaStream_t, const Linear<float> *) { return 0; }
static int fast_linear(cudaStream_t stream, const Linear<bf16> *a) {
    if (a->rows == 1 || a->c % 8 || a->c > INT_MAX / 2 || a->oc > INT_MAX / 2 || ((uintptr_t)a->weight | (uintptr_t)a->norm | (uintptr_t)a->x) % 16) return 0;
    const int many = !a->swiglu && a->oc >= (int64_t)MANY_TILES * FAST_OUTPUTS * 4 * gpu.multiProcessorCount, tiles = a->swiglu ? 2 : many ? (int)MANY_TILES : 1;
    const int64_t steps = min64(FAST_STEPS / tiles, (a->c + FAST_ROUND - 1) / FAST_ROUND);
    const dim3 blocks(grid(a->oc, (many ? MANY_TILES : 1) * FAST_OUTPUTS), grid(a->rows, MMA_ROWS));
    launch(stream, tiles == 1 ? fast_linear_kernel<1> : tiles == 2 ? fast_linear_kernel<2> : fast_linear_kernel<MANY_TILES>, blocks, DECODE_THREADS, fast_steps_bytes(steps * tiles), *a);
    return 1;
}

template <typename F>
static void linear(cudaStream_t stream, float *out, const float *add, const float *norm, double eps, const float *x, const F *weight,
                   int64_t rows, int64_t c, int64_t oc, int swiglu) {
    const Linear<F> a = {out, add, norm, x, weight, rows, c, oc, eps, swiglu};
    if (fast_linear(stream, &a)) return;
    if (rows == 1) launch(stream, linear_kernel<F, 1>, grid(oc, WARPS), THREADS, 0, a);
    else launch(stream, linear_kernel<F, LINEAR_ROWS>, grid((rows + LINEAR_ROWS - 1) / LINEAR_ROWS * oc, WARPS), THREADS, 0, a);
}

// ----------------------------------------------------------------------------
// The token and its keys

// x (rows,C) = the tokens' embeddings; the first block makes the angles too.
template <typename F>
__global__ void begin_kernel(float *x, float *angles, const Input *input, const F *embed, int64_t c, const double *frequency, int half, int cmp_block) {
    wait_for_previous();
    const int64_t row = blockIdx.x, token = input->tokens[row], t = input->position;
    for (int64_t j = threadIdx.x; j < c; j += blockDim.x) x[row * c + j] = (float)embed[token * c + j];
    if (row > 0) return;
    for (int i = threadIdx.x; i < 2 * half; i += blockDim.x) {
        const double angle = (double)(i < half ? t : max64(0, t + 1 - cmp_block)) * frequency[i % half];
        float *row_of = angles + i / half * 2 * half + i % half;
        row_of[0] = (float)cos(angle);
        row_of[half] = (float)sin(angle);
    }
}

// Channel c of x (D) turned by RoPE.
__device__ static inline float turned(const float *x, const float *angles, int c, int d) {
    const int half = d / 2, j = c % half;
    return c < half ? x[j] * angles[j] - x[j + half] * angles[half + j] : x[j + half] * angles[j] + x[j] * angles[half + j];
}

typedef struct TokenCall {
    float *wide, *gates;
    bf16 *queries;              // of the fast tier, or NULL
    const float *gate_weight, *gate_bias, *angles;
    const Input *input;
    WideRow row;
    LayerCache cache;
    DecodeShape s;
    int gate;
} TokenCall;

// The block that this token completes is flattened, compressed and put into the cache. The KV heads that share their weights, a set, are the rows of linear
// maps: member m of a set is row m, or with one set for all KV heads (row, kv) = (m / KV, m % KV).
template <typename F>
struct CompressStep {
    F *flat[2], *hidden[2];             // of k and of v: (sets,members,l·D), (sets,members,2D); rounded as in training
    const float *angles;
    const Input *input;
    LayerCache cache;
    CompressWeights weights[2];         // positions and biases
    CompressMatrices<F> matrices[2];
    int KV, width[2], block, kind, sets, members;
    int *done;                          // (2,sets,members by MMA_ROWS): blocks of threads that are done with their part, of the fast tier; 0 before and after
};

// How many blocks of threads flatten the block of one list, of k or of v, and of all.
template <typename F>
DEVICE static inline int64_t flat_parts(const CompressStep<F> *a) { return (a->block * (int64_t)max32(a->width[0], a->width[1]) + THREADS - 1) / THREADS; }
template <typename F>
static int64_t flatten_blocks(const CompressStep<F> *a) { return 2 * (int64_t)a->sets * a->members * flat_parts(a); }
// The n-th THREADS numbers of both `flat`, (l,D) a list: the tokens of the block that wait in the tail, and the newest, which is in `wide`, with their positions.
template <typename F>
__device__ static inline void flatten(const CompressStep<F> *a, const TokenCall *token, int64_t n) {
    const int64_t parts = flat_parts(a), place = n / 2 / parts, i = n / 2 % parts * THREADS + threadIdx.x;
    const int v = (int)(n % 2), D = a->width[v];
    if (i >= (int64_t)a->block * D) return;
    const int64_t set = place / a->members, m = place % a->members, row = a->sets > 1 ? m : m / a->KV, kv = a->sets > 1 ? set : m % a->KV;
    const int64_t at = row * a->block + (a->input->position + 1 + i / D) % a->block, newest = i / D == a->block - 1;
    const F x = newest ? (F)token->wide[row * token->row.size + (v ? token->row.v : token->row.k)[CMP] + kv * D + i % D] : ((const F *)a->cache.tail[v])[(at * a->KV + kv) * D + i % D];
    a->flat[v][place * a->block * D + i] = (F)((float)x + (a->weights[v].pos ? a->weights[v].pos[i] : 0));
}

// A block of threads a row of `wide`: gates from q as it is, then q turned in place, keys and values into their caches. Those behind flatten what the token completes. grid: rows, then flatten_blocks
template <typename F>
__global__ void token_kernel(TokenCall a, CompressStep<F> completed) {
    wait_for_previous();
    if (blockIdx.x >= a.s.rows) {
        flatten(&completed, &a, blockIdx.x - a.s.rows);
        return;
    }
    const DecodeShape *s = &a.s;
    const int64_t r = blockIdx.x, t = a.input->position;
    const int D = s->D, Dv = s->Dv, half = D / 2;
    float *wide = a.wide + r * a.row.size;
    for (int j = threadIdx.x; j < BRANCHES * s->H && !s->full; j += blockDim.x) {
        float x = a.gate_bias[j];
        if (a.gate == GATE_INPUT) x += wide[a.row.gate + j];
        if (a.gate == GATE_Q_COND)
            for (int c = 0; c < D; c++) x += a.gate_weight[j * D + c] * wide[j / BRANCHES * D + c];
        a.gates[r * BRANCHES * s->H + j] = sigmoid(x);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < s->H * half; i += blockDim.x) {
        float *q = wide + i / half * D;
        const float first = turned(q, a.angles, i % half, D), second = turned(q, a.angles, i % half + half, D);
        q[i % half] = first;
        q[i % half + half] = second;
        if (!a.queries) continue;
        bf16 *query = a.queries + (r * s->H + i / half) * D + i % half;
        query[0] = __float2bfloat16_rn(first);
        query[half] = __float2bfloat16_rn(second);
    }
    for (int b = 0; b < a.row.branches; b++) {
        const float *k = wide + a.row.k[b], *v = wide + a.row.v[b];
        if (b == CMP && !s->full) {     // as they are, until their block is complete
            const int64_t at = r * s->select.cmp_block + t % s->select.cmp_block;
            F *tail_k = (F *)a.cache.tail[0] + at * s->KV * D, *tail_v = (F *)a.cache.tail[1] + at * s->KV * Dv;
            for (int i = threadIdx.x; i < s->KV * D; i += blockDim.x) tail_k[i] = (F)k[i];
            for (int i = threadIdx.x; i < s->KV * Dv; i += blockDim.x) tail_v[i] = (F)v[i];
            continue;
        }
        const KeyCache *to = &a.cache.branch[b];
        const int64_t slot = t % to->slots;
        F *keys = (F *)to->k, *values = (F *)to->v;
        for (int i = threadIdx.x; i < s->KV * D; i += blockDim.x) keys[((r * s->KV + i / D) * to->slots + slot) * D + i % D] = (F)turned(k + i / D * D, a.angles, i % D, D);
        for (int i = threadIdx.x; i < s->KV * Dv; i += blockDim.x) values[((r * s->KV + i / Dv) * to->slots + slot) * Dv + i % Dv] = (F)v[i];
    }
}

// A warp an output, for all members of a set.
template <typename F>
__global__ void hidden_kernel(CompressStep<F> a) {
    wait_for_previous();
    const int v = (int)blockIdx.y / a.sets, set = (int)blockIdx.y % a.sets;
    const int64_t D = a.width[v], LD = a.block * D, u = global_warp(), output = set * 2 * D + u;
    if (u >= 2 * D) return;
    const float bias = a.weights[v].fc1_bias[output];
    for (int m = 0; m < a.members; m += LINEAR_ROWS) {
        const int64_t place = (int64_t)set * a.members + m;
        const int rows = (int)min64(LINEAR_ROWS, a.members - m);
        float y[LINEAR_ROWS], unused[LINEAR_ROWS];
        warp_dots<LINEAR_ROWS>(y, unused, a.matrices[v].fc1 + output * LD, NULL, a.flat[v] + place * LD, rows, LD);
        for (int r = 0; r < LINEAR_ROWS; r++)
            if (r < rows && lane() == 0) a.hidden[v][(place + r) * 2 * D + u] = (F)gelu(y[r] + bias);
    }
}

// Channel c of the compressed block of `rows` members from `place` on, before RoPE.
template <typename F>
__device__ static inline void compressed_channel(float *y, const CompressStep<F> *a, int v, int64_t set, int64_t c, int64_t place, int rows) {
    const int64_t D = a->width[v], LD = a->block * D, output = set * D + c;
    float unused[LINEAR_ROWS];
    if (a->kind == COMPRESS_AVGPOOL) {
        for (int r = 0; r < rows; r++) {
            float sum = 0;
            for (int j = lane(); j < a->block; j += WARP) sum += (float)a->flat[v][(place + r) * LD + j * D + c];
            y[r] = warp_sum(sum) / (float)a->block;
        }
        return;
    }
    const int conv = a->kind == COMPRESS_CONV1D;
    if (conv) warp_dots<LINEAR_ROWS>(y, unused, a->matrices[v].conv + output * LD, NULL, a->flat[v] + place * LD, rows, LD);
    else warp_dots<LINEAR_ROWS>(y, unused, a->matrices[v].fc2 + output * 2 * D, NULL, a->hidden[v] + place * 2 * D, rows, 2 * D);
    for (int r = 0; r < rows; r++) y[r] += conv ? a->weights[v].conv_bias[output] : a->weights[v].fc2_bias[output];
}

// Channels c and, if there are both, c + D / 2 of a member's compressed block, y and z, go into the cache: a key turns by RoPE, a value does not.
template <typename F>
__device__ static inline void cache_compressed(const CompressStep<F> *a, int v, int set, int m, int c, int both, float y, float z) {
    const int D = a->width[v], half = (D + 1) / 2;
    const int64_t list = a->sets > 1 ? (int64_t)m * a->KV + set : m, slot = a->input->of[CMP].keys - 1;
    const float cosine = v ? 1 : a->angles[D + c], sine = v ? 0 : a->angles[D + half + c];
    F *to = (F *)(v ? a->cache.branch[CMP].v : a->cache.branch[CMP].k) + (list * a->cache.branch[CMP].slots + slot) * D;
    const float2 turned = turned_pair(y, z, cosine, sine);
    to[c] = (F)turned.x;
    if (both) to[c + half] = (F)turned.y;
}

// A warp makes the two channels that RoPE turns together, for all members of a set.
template <typename F>
__global__ void output_kernel(CompressStep<F> a) {
    wait_for_previous();
    const int v = (int)blockIdx.y / a.sets, set = (int)blockIdx.y % a.sets, D = a.width[v], half = (D + 1) / 2;
    const int64_t c = global_warp();
    if (c >= half) return;
    const int both = c + half < D;
    for (int m = 0; m < a.members; m += LINEAR_ROWS) {
        const int64_t place = (int64_t)set * a.members + m;
        const int rows = (int)min64(LINEAR_ROWS, a.members - m);
        float y[LINEAR_ROWS], z[LINEAR_ROWS] = {0};
        compressed_channel(y, &a, v, set, c, place, rows);
        if (both) compressed_channel(z, &a, v, set, c + half, place, rows);
        for (int r = 0; r < LINEAR_ROWS; r++)
            if (r < rows && lane() == 0) cache_compressed(&a, v, set, m + r, (int)c, both, y[r], z[r]);
    }
}

// ----------------------------------------------------------------------------
// Attention: one query for each head over the keys of one or two lists, which the splits share. First any shape: a block of threads takes
// up to HEADS of the heads that have these keys in common, and goes through its share in tiles of a warp. Heads go by fours.

enum { HEADS = 16, FOUR = 4, ATTEND_WARPS = HEADS / FOUR, HEADS_ROW = HEADS + FOUR, MOST_SPLITS = 128 };     // a row of 20 spares the banks
enum { MERGE_THREADS = 512 };

// The scores of a head: rows that can be read and written by fours.
DEVICE static inline int64_t score_row(int64_t slots) { return (slots + FOUR - 1) / FOUR * FOUR; }

// Where the shares of a head stand, one for each split. head = (row·KV + kv)·G + g, which is row·H + h.
__device__ static inline int64_t parts_of(const DecodeShape *s, int branch, int64_t head) { return (branch * s->rows * s->H + (int)head) * s->splits; }

// The keys from .. to-1 of a list, those of its n-th split: none behind the last.
typedef struct Stretch { int from, to; } Stretch;
__device__ static inline Stretch stretch_of(const Reading *r, int n) {
    const Stretch x = {n * r->share, min32((n + 1) * r->share, r->keys)};
    return x;
}

typedef struct AttendCall {
    const float *q;             // (rows,H,D), q_row apart
    int64_t q_row;
    const bf16 *queries;        // (rows,H,D), the fast tier's
    const Input *input;
    LayerCache cache;
    const int *block_idx;       // of the simple tier
    float *scores;              // (rows,H,score_row), for the compressed branch
    HeadWeights heads;          // of it, the fast tier's
    Shares parts;
    const float *gates;         // (rows,H,3)
    float *out;                 // (rows,H,Dv), of the fast tier's sparse attention, which merges for itself
    DecodeShape s;
    int lists[2];               // the kinds of the lists to read; the second one may be NO_LIST
} AttendCall;
enum { NO_LIST = -1 };

__device__ static inline int branch_of(int kind) { return kind == CACHE_FULL ? 0 : kind; }
// The kind of the list that a split reads.
__device__ static inline int kind_of(const AttendCall *a, int split) { return a->lists[1] != NO_LIST && split >= a->input->of[a->lists[1]].first_split ? a->lists[1] : a->lists[0]; }

static int64_t attend_numbers(const DecodeShape *s) { return HEADS_ROW * (s->D + s->Dv + WARP) + tile_size(s->D); }

// grid: (row, kv, group of heads), split
template <typename F>
__global__ void attend_kernel(AttendCall a) {
    extern __shared__ float shared[];
    __shared__ float top[HEADS], sum[HEADS], shrink[HEADS];
    __shared__ int64_t slot[WARP];      // where the keys of the tile lie
    const DecodeShape *s = &a.s;
    const int kind = kind_of(&a, blockIdx.y), branch = branch_of(kind), share = blockIdx.y - a.input->of[kind].first_split;
    const Stretch x = stretch_of(&a.input->of[kind], share);
    wait_for_previous();
    if (x.from >= x.to) return;
    const int D = s->D, Dv = s->Dv, G = s->G, groups = (G + HEADS - 1) / HEADS, warp = threadIdx.x / WARP;
    const int64_t list = blockIdx.x / groups, g0 = blockIdx.x % groups * HEADS;
    const int heads = (int)min64(HEADS, G - g0);
    float *q = shared, *out = q + D * HEADS_ROW, *p = out + Dv * HEADS_ROW, *tile = p + WARP * HEADS_ROW;   // (D,HEADS), (Dv,HEADS), (WARP,HEADS), (WARP,D)
    const float scale = 1 / (float)sqrt((double)D);
    for (int i = threadIdx.x; i < D * HEADS; i += blockDim.x) {
        const int64_t g = i / D, c = i % D;
        q[c * HEADS_ROW + g] = g < heads ? a.q[list / s->KV * a.q_row + (list % s->KV * G + g0 + g) * D + c] * scale : 0;
    }

    const KeyCache *cache = &a.cache.branch[branch];
    const F *k = (const F *)cache->k + list * cache->slots * D, *v = (const F *)cache->v + list * cache->slots * Dv;
    const int *idx = kind == SLC ? a.block_idx + list * s->select.n : NULL;
    float *scores = kind == CMP ? a.scores + (list * G + g0) * score_row(cache->slots) : NULL;
    for (int i = threadIdx.x; i < Dv * HEADS_ROW; i += blockDim.x) out[i] = 0;
    if (threadIdx.x < HEADS) top[threadIdx.x] = -INFINITY, sum[threadIdx.x] = 0;

    for (int k0 = x.from; k0 < x.to; k0 += WARP) {
        const int count = (int)min64(WARP, x.to - k0);
        __syncthreads();        // the tile before has been read
        for (int j = warp; j < count; j += ATTEND_WARPS) {
            const int key = k0 + j;
            const int64_t at = idx ? idx[key / s->select.sel_block] * (int64_t)s->select.sel_block + key % s->select.sel_block : key;
            for (int c = lane(); c < D; c += WARP) tile[j * tile_row(D) + c] = (float)k[at * D + c];
            if (lane() == 0) slot[j] = at;
        }
        __syncthreads();
        float y[FOUR] = {0};    // a warp has four heads, a lane a key
        for (int c = 0; c < D && lane() < count; c++) {
            const float4 four = *(const float4 *)(q + c * HEADS_ROW + warp * FOUR);
            const float key = tile[lane() * tile_row(D) + c];
            y[0] += four.x * key, y[1] += four.y * key, y[2] += four.z * key, y[3] += four.w * key;
        }
        for (int g = warp * FOUR; g < heads && g < (warp + 1) * FOUR; g++) {
            const float score = lane() < count ? y[g % FOUR] : -INFINITY, before = top[g], higher = fmaxf(before, warp_max(score));
            const float weight = lane() < count ? expf(score - higher) : 0, all = warp_sum(weight);
            p[lane() * HEADS_ROW + g] = weight;
            if (scores && lane() < count) scores[g * score_row(cache->slots) + k0 + lane()] = score;
            __syncwarp();       // all have read top
            if (lane() > 0) continue;
            top[g] = higher;
            shrink[g] = expf(before - higher);
            sum[g] = sum[g] * shrink[g] + all;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < (heads + FOUR - 1) / FOUR * Dv; i += blockDim.x) {     // a thread has four heads, a channel
            const int g = i / Dv * FOUR, c = i % Dv;
            float4 *o = (float4 *)(out + c * HEADS_ROW + g), four = *o;
            four = make_float4(four.x * shrink[g], four.y * shrink[g + 1], four.z * shrink[g + 2], four.w * shrink[g + 3]);
            #pragma unroll 8
            for (int j = 0; j < count; j++) {
                const float4 weight = *(const float4 *)(p + j * HEADS_ROW + g);
                const float value = (float)v[slot[j] * Dv + c];
                four.x += weight.x * value, four.y += weight.y * value, four.z += weight.z * value, four.w += weight.w * value;
            }
            *o = four;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < heads * Dv; i += blockDim.x) {
        const int g = i / Dv, c = i % Dv;
        const int64_t part = parts_of(s, branch, list * G + g0 + g) + share;
        a.parts.out[part * Dv + c] = out[c * HEADS_ROW + g];
        if (c == 0) a.parts.top[part] = top[g], a.parts.sum[part] = sum[g];
    }
}

// The highest score of a head, and Σ exp(score - that): a warp adds up the shares.
__device__ static inline void warp_merge(float *top, float *sum, const Shares *parts, int64_t first, int count) {
    float highest = -INFINITY, total = 0;
    for (int i = lane(); i < count; i += WARP) highest = fmaxf(highest, parts->top[first + i]);
    highest = warp_max(highest);
    for (int i = lane(); i < count; i += WARP) total += parts->sum[first + i] * expf(parts->top[first + i] - highest);
    *top = highest;
    *sum = warp_sum(total);
}

// out (rows,H,Dv) = Σ_branch gate · attention; a full-attention layer has no gates. A block of threads a head; no key: 0. A thread takes N
// neighbouring channels of every so-manieth share.
template <int N>
__global__ void merge_kernel(float *out, const float *gates, Shares parts, const Input *input, DecodeShape s) {
    __shared__ float factor[BRANCHES * MOST_SPLITS], sums[MERGE_THREADS * N];
    __shared__ int64_t part[BRANCHES * MOST_SPLITS];
    wait_for_previous();
    const int64_t head = blockIdx.x;
    const int branches = s.full ? 1 : BRANCHES, warp = threadIdx.x / WARP, thread = threadIdx.x;
    int count = 0;
    for (int b = 0; b < branches; b++) {
        const Reading *r = &input->of[s.full ? CACHE_FULL : b];
        const int64_t first = parts_of(&s, b, head);
        if (warp == b) {
            float top, sum;
            warp_merge(&top, &sum, &parts, first, r->splits);
            for (int i = lane(); i < r->splits; i += WARP) {
                factor[count + i] = (s.full ? 1 : gates[head * BRANCHES + b]) * expf(parts.top[first + i] - top) / sum;
                part[count + i] = first + i;
            }
        }
        count += r->splits;
    }
    __syncthreads();
    const int columns = s.Dv / N, across = columns < MERGE_THREADS ? columns : MERGE_THREADS, teams = MERGE_THREADS / across, team = thread / across;
    for (int c0 = 0; c0 < columns; c0 += across) {
        const int c = c0 + thread % across;
        if (c < columns && team < teams) {
            Pack<float, N> y = {{0}};
            #pragma unroll 8
            for (int i = team; i < count; i += teams) {
                const Pack<float, N> x = load<N>(parts.out + part[i] * s.Dv + c * N);
                for (int e = 0; e < N; e++) y.of[e] += factor[i] * x.of[e];
            }
            for (int e = 0; e < N; e++) sums[thread * N + e] = y.of[e];
        }
        __syncthreads();
        if (c < columns && team == 0)
            for (int e = 0; e < N; e++) {
                float y = 0;
                for (int i = 0; i < teams; i++) y += sums[(i * across + thread) * N + e];
                out[head * s.Dv + c * N + e] = y;
            }
        __syncthreads();
    }
}

// ----------------------------------------------------------------------------
// Selection

__device__ static inline int warp_count(int x) {
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

// The sum of x over a block of threads. `counts` (WARP) are not those of the call before, which some may still be reading.
__device__ static inline int block_count(int x, int *counts) {
    x = warp_count(x);
    if (lane() == 0) counts[threadIdx.x / WARP] = x;
    __syncthreads();
    return warp_count(lane() < (int)blockDim.x / WARP ? counts[lane()] : 0);
}

// Eq. 10 needs the log-sum-exp of each head of a group, lse (G): warps of a block take turns.
__device__ static inline void group_lse(float *lse, const Shares *parts, const DecodeShape *s, int64_t list, const Reading *r) {
    for (int g = threadIdx.x / WARP; g < s->G; g += blockDim.x / WARP) {
        float top, sum;
        warp_merge(&top, &sum, parts, parts_of(s, CMP, list * s->G + g), r->splits);
        if (lane() == 0) lse[g] = top + logf(sum);
    }
    __syncthreads();
}

// Eq. 10: the weight of a compressed block for all heads of a group, from their scores, `row` apart.
__device__ static inline float group_weight(const float *scores, int64_t row, const float *lse, int G) {
    float sum = 0;
    #pragma unroll 16
    for (int g = 0; g < G; g++) sum += expf(scores[g * row] - lse[g]);
    return sum;
}

// idx (rows,KV,n) from the scores (rows,H,row) of the compressed branch: a block of threads a list. As select_blocks_kernel does
// it, but one query has the whole block: the last importance that is taken is found bit by bit, since not negative floats are
// ordered as their bits are.
__global__ void __launch_bounds__(MOST_THREADS) select_kernel(int *block_idx, float *scores, int64_t row, float *importance, int64_t most_blocks, Shares parts, const Input *input, DecodeShape s) {
    extern __shared__ float lse[];      // (G)
    __shared__ int counts[2][WARP];
    wait_for_previous();
    const SelectShape *sel = &s.select;
    const int64_t list = blockIdx.x, blocks = input->blocks, first = sel->n_init, last = blocks - sel->n_local;
    const int warp = threadIdx.x / WARP, visible = input->of[CMP].keys;
    int *idx = block_idx + list * sel->n;
    if (blocks <= sel->n) {             // no choice to make
        for (int j = threadIdx.x; j < sel->n; j += blockDim.x) idx[j] = j < blocks ? j : -1;
        return;
    }
    group_lse(lse, &parts, &s, list, &input->of[CMP]);
    float *weights = scores + list * s.G * row, *score = importance + list * most_blocks;      // in the place of the first head's scores
    for (int64_t i = threadIdx.x; i < visible; i += blockDim.x) weights[i] = group_weight(weights + i, row, lse, s.G);
    __syncthreads();
    for (int64_t j = first + threadIdx.x; j < last; j += blockDim.x) score[j] = comparable(importance_of(weights, (int)j, visible, sel));
    __syncthreads();

    const int places = free_places(sel);
    unsigned least = 0;                 // the places-th highest importance: the highest that so many reach
    int calls = 0;
    for (int bit = 30; bit >= 0; bit--) {
        const unsigned higher = least | 1u << bit;
        int reached = 0;
        for (int64_t j = first + threadIdx.x; j < last; j += blockDim.x) reached += __float_as_uint(score[j]) >= higher;
        if (block_count(reached, counts[calls++ % 2]) >= places) least = higher;
    }
    int above = 0;
    for (int64_t j = first + threadIdx.x; j < last; j += blockDim.x) above += __float_as_uint(score[j]) > least;
    int ties = places - block_count(above, counts[calls % 2]), to = sel->n_init;        // of those that just reach it the first so many
    if (warp > 0) return;
    for (int64_t j0 = first; j0 < last; j0 += WARP) {
        const int64_t j = j0 + lane();
        const unsigned before = (1u << lane()) - 1, bits = j < last ? __float_as_uint(score[j]) : 0;
        const unsigned equal = __ballot_sync(~0u, j < last && bits == least);
        const int taken = j < last && (bits > least || (bits == least && __popc(equal & before) < ties));
        const unsigned all = __ballot_sync(~0u, taken);
        if (taken) idx[to + __popc(all & before)] = (int)j;
        to += __popc(all);
        ties -= __popc(equal);
    }
    for (int j = lane(); j < sel->n_init; j += WARP) idx[j] = j;
    for (int j = lane(); j < sel->n_local; j += WARP) idx[sel->n - sel->n_local + j] = (int)(last + j);
}

// ----------------------------------------------------------------------------
// The fast tier: bf16 on tensor cores, for the heads that training's fast attention takes. What counts is to read the keys and values once, at the speed of the
// memory, and to lose little time where there is little to read. A block of threads goes through its keys in rounds: each warp brings a tile of keys and values
// (cp.async) and has its scores, for up to 16 heads, the rows of a matrix instruction (fewer: the other rows are zero); then each warp has some channels of the sum
// over all warps' values. So no two warps have sums of the same numbers, which would have to be added up.

enum { TILE_KEYS = 16, HALF_TILE = TILE_KEYS / 2, ROUND_KEYS = DECODE_WARPS * TILE_KEYS, MOST_TEAM = 16 };
enum { CHOICE_MEMBERS = 4, CHOICE_GROUPS = DECODE_THREADS / CHOICE_MEMBERS, CHOICE_WEIGHTS = 8192 };
enum { TILE_CHUNKS = TILE_KEYS * MMA_ROWS / 8, LEFT_SHIFT = 15, TILES_AHEAD = 4 };       // of the weights that are left for the choice

// Heads of a list go by MMA_ROWS. HeadWeights: the tiles of so many compressed keys, and where those of the group-th of all lists' groups begin.
DEVICE static inline int head_groups(int G) { return (G + MMA_ROWS - 1) / MMA_ROWS; }
DEVICE static inline int64_t weight_tiles(int64_t keys) { return (keys + TILE_KEYS - 1) / TILE_KEYS; }
DEVICE static inline HeadWeights weights_of(const HeadWeights *x, int64_t group, int64_t tiles) {
    const HeadWeights of = {x->of + group * tiles * TILE_CHUNKS, x->top + group * tiles * MMA_ROWS};
    return of;
}

// A block's ring in shared memory: each of the SLOTS takes the keys (ROUND,D) or the values (ROUND,DV) of a round, of tiles of TILE keys. Two blocks fit on a multiprocessor at
// D = 64 and 128: so those of the next kernel can have asked for their keys while this one ends.
template <int D, int DV, int TILE = TILE_KEYS>
struct KeyRing {
    static constexpr int ROUND = DECODE_WARPS * TILE, SLOTS = D == 64 && TILE == TILE_KEYS ? 6 : 3, SLOT = ROUND * D, BYTES = SLOTS * SLOT * (int)sizeof(bf16);
    static_assert(DV <= D && DV % (8 * DECODE_WARPS) == 0, "values lie where keys do, and each warp has channels of its own");
};

template <int TILE>
static int64_t ring_bytes_by(int D) { return D == 64 ? KeyRing<64, 64, TILE>::BYTES : D == 128 ? KeyRing<128, 128, TILE>::BYTES : KeyRing<192, 128, TILE>::BYTES; }
static int64_t ring_bytes(int D, int tile = TILE_KEYS) { return tile == TILE_KEYS ? ring_bytes_by<TILE_KEYS>(D) : ring_bytes_by<HALF_TILE>(D); }
static int64_t most_selection_blocks(const Config *c, int64_t capacity) { return capacity / max64(c->sel_block, 1) + 1; }
DEVICE static inline int in_fours(int n) { return (n + FOUR - 1) / FOUR * FOUR; }

// i / n for i < QUOTIENTS, exactly; inverse is 1 / n. A division takes ten times as many instructions.
enum { QUOTIENTS = 1 << 20 };
DEVICE static inline int quotient(int i, float inverse) { return (int)(((float)i + 0.5f) * inverse); }

// The keys of a list that a block of threads goes through, those before `end`: the tiles of its warps in a round are `gap` apart, and so are the rounds.
typedef struct BlockKeys {
    const bf16 *k, *v;
    int first, gap, end;
    int fresh;              // the key that this token brings, or -1: none
    const int *idx;         // or NULL: the blocks of `block` slots in which the keys lie
    int block;
    float per_block;        // 1 / block
} BlockKeys;

// Those of a stretch of a list's keys that one of `members` blocks of threads has, which share its tiles.
template <int D, int DV, int TILE = TILE_KEYS>
__device__ static inline BlockKeys block_keys(const AttendCall *a, int branch, int64_t list, Stretch x, int fresh, int member, int members, const int *idx, float per_block) {
    const KeyCache *cache = &a->cache.branch[branch];
    const BlockKeys keys = {(const bf16 *)cache->k + list * cache->slots * D, (const bf16 *)cache->v + list * cache->slots * DV,
                            x.from + member * TILE, members * TILE, x.to, fresh, idx, a->s.select.sel_block, per_block};
    return keys;
}

// A round's keys come in an even step, its values in the next one. Where this warp's tile of it begins, and whether there is such a round at all.
__device__ static inline int tile_of_step(const BlockKeys *x, int step) { return x->first + (step / 2 * DECODE_WARPS + threadIdx.x / WARP) * x->gap; }
__device__ static inline int is_step(const BlockKeys *x, int step) { return x->first + step / 2 * DECODE_WARPS * x->gap < x->end; }
template <int TILE>
__device__ static inline int fresh_in(const BlockKeys *x, int step) { return tile_of_step(x, step) <= x->fresh && x->fresh < tile_of_step(x, step) + TILE; }

// The slot of a key: in its place, or where the block that it is in lies.
__device__ static inline int slot_of_key(const BlockKeys *x, int key) {
    if (!x->idx) return key;
    const int n = quotient(key, x->per_block);
    return key + (x->idx[n] - n) * x->block;
}
// A tile's keys or values, W numbers each, into a warp's part of a slot; zeros where there are none. Slots of a tile follow each other, unless blocks end within tiles.
template <int W, int TILE>
__device__ static inline void fetch_tile_of(bf16 *tile, const bf16 *from, const BlockKeys *x, int k0) {
    constexpr int CHUNKS = W / 8, EACH = TILE * CHUNKS / WARP;
    const int left = x->end - k0;
    const uint64_t once = read_once();
    if (x->idx && x->block % TILE) {
        #pragma unroll 1
        for (int i = lane(); i < TILE * CHUNKS; i += WARP) {
            const int row = i / CHUNKS, chunk = i % CHUNKS;
            cp_async_16_once(chunk_of<W>(tile, row, chunk), row < left ? from + (int64_t)slot_of_key(x, k0 + row) * W + chunk * 8 : from, row < left ? 16 : 0, once);
        }
        return;
    }
    const bf16 *first = from + (left > 0 ? (int64_t)slot_of_key(x, k0) * W : 0) + lane() * 8;
    #pragma unroll
    for (int n = 0; n < EACH; n++) {
        const int row = (n * WARP + lane()) / CHUNKS, chunk = (n * WARP + lane()) % CHUNKS;
        cp_async_16_once(chunk_of<W>(tile, row, chunk), first + (row < left ? n * WARP * 8 : 0), row < left ? 16 : 0, once);
    }
}
template <int D, int DV, int TILE = TILE_KEYS>
__device__ static inline void fetch_step(bf16 *ring, const BlockKeys *x, int step, int slot) {
    bf16 *to = ring + slot * KeyRing<D, DV, TILE>::SLOT;
    const int k0 = tile_of_step(x, step), tile = threadIdx.x / WARP * TILE;
    if constexpr (D == DV) fetch_tile_of<D, TILE>(to + tile * D, step % 2 ? x->v : x->k, x, k0);
    else if (step % 2) fetch_tile_of<DV, TILE>(to + tile * DV, x->v, x, k0);
    else fetch_tile_of<D, TILE>(to + tile * D, x->k, x, k0);
}

// The first steps, but for the tile with this token's key: this may be done before others have written it. Behind that fetch_fresh asks for the tile, and says whether
// there is one: what has been asked for must be waited for.
template <int D, int DV, int TILE = TILE_KEYS>
__device__ static inline void fetch_first(bf16 *ring, const BlockKeys *x) {
    #pragma unroll 1        // as most loops here: code that runs once has to come from memory
    for (int step = 0; step < KeyRing<D, DV, TILE>::SLOTS - 1; step++) {
        if (is_step(x, step) && !fresh_in<TILE>(x, step)) fetch_step<D, DV, TILE>(ring, x, step, step);
        cp_async_commit();
    }
}
template <int D, int DV, int TILE = TILE_KEYS>
__device__ static inline int fetch_fresh(bf16 *ring, const BlockKeys *x) {
    int found = 0;
    #pragma unroll 1
    for (int step = 0; step < KeyRing<D, DV, TILE>::SLOTS - 1; step++)
        if (is_step(x, step) && fresh_in<TILE>(x, step)) fetch_step<D, DV, TILE>(ring, x, step, step), found = 1;
    if (found) cp_async_commit();
    return found;
}

// The queries of heads head0 and on, as bf16, on their way into shared memory (MMA_ROWS,D) by way of registers.
template <int D> struct AskedQueries { static constexpr int CHUNKS = MMA_ROWS * D / 8, EACH = (CHUNKS + DECODE_THREADS - 1) / DECODE_THREADS; uint4 of[EACH]; };
template <int D>
__device__ static inline const uint4 *queries_of(const AttendCall *a, int64_t head0) { return (const uint4 *)(a->queries + head0 * D) + threadIdx.x; }
template <int D>
__device__ static inline AskedQueries<D> ask_queries(const uint4 *queries, int heads) {
    AskedQueries<D> x;
    const uint4 none = {0, 0, 0, 0};
    #pragma unroll
    for (int n = 0; n < AskedQueries<D>::EACH; n++) x.of[n] = (int)(n * DECODE_THREADS + threadIdx.x) < heads * (D / 8) ? queries[n * DECODE_THREADS] : none;
    return x;
}
template <int D>
__device__ static inline void put_queries(bf16 *queries, const AskedQueries<D> &x) {
    #pragma unroll
    for (int n = 0; n < AskedQueries<D>::EACH; n++) {
        const int i = n * DECODE_THREADS + threadIdx.x;
        if (i < AskedQueries<D>::CHUNKS) *(uint4 *)chunk_of<D>(queries, i / (D / 8), i % (D / 8)) = x.of[n];
    }
}

// What a warp has of a block's sums: of rows lane / 4 and 8 more the top, in units of log2, and the sum of the weights, as all warps have them, and channels
// CHANNELS·warp and on, two neighbours and so many times 8 further.
template <int DV> struct BlockSums { static constexpr int TILES = DV / 8 / DECODE_WARPS, CHANNELS = DV / DECODE_WARPS; float o[TILES][4], top[2], sum[2]; };

// Less than any score, and unlike -INFINITY a number that can be subtracted from itself: the top of no keys.
#define NO_TOP -1e30f

// What the warps of a block tell each other in a round: highest scores, and weights (MMA_ROWS,ROUND), of ROUND_KEYS at most.
typedef struct Round { float top[MMA_ROWS][DECODE_WARPS]; uint4 weights[MMA_ROWS * ROUND_KEYS / 8]; } Round;

// d (16,8) = queries (16,D) · a tile of 8 keys, turned: two sums side by side, which need not wait for each other.
template <int D>
__device__ static inline void half_tile_times_turned(float d[4], bf16 *queries, bf16 *tile) {
    static_assert(D % 32 == 0, "steps go in pairs");
    float odd[4] = {0};
    #pragma unroll
    for (int step = 0; step < D / 16; step += 2) {
        unsigned a[2][4], b[4];
        for (int i = 0; i < 2; i++) ldmatrix_x4(a[i], chunk_of<D>(queries, lane() % 16, (step + i) * 2 + lane() / 16));
        ldmatrix_x4(b, chunk_of<D>(tile, lane() % 8, step * 2 + lane() / 8));
        mma_16816(d, a[0], b);
        mma_16816(odd, a[1], b + 2);
    }
    for (int e = 0; e < 4; e++) d[e] += odd[e];
}

// A block goes through its keys. Weights are rounded before they are summed, so that they come up to 1. left: where those of whole tiles are left, or NULLs.
template <int D, int DV, int TILE = TILE_KEYS>
__device__ static inline void attend_keys(BlockSums<DV> *y, bf16 *ring, Round *round, const BlockKeys *x, bf16 *queries, HeadWeights left) {
    typedef KeyRing<D, DV, TILE> R;
    const int low = lane() / 4, pair = lane() % 4 * 2, warp = threadIdx.x / WARP;
    const float scale2 = 1 / sqrtf((float)D) * LOG2E;
    const unsigned ones[2] = {two_bf16(1, 1), two_bf16(1, 1)};
    bf16 *weights = (bf16 *)round->weights;
    float sums[4] = {0};
    for (int n = 0; n < BlockSums<DV>::TILES; n++)
        for (int e = 0; e < 4; e++) y->o[n][e] = 0;
    for (int i = 0; i < 2; i++) y->top[i] = NO_TOP;
    #pragma unroll 1
    for (int step = 0, slot = 0; is_step(x, step); step += 2, slot = (slot + 2) % R::SLOTS) {
        const int k0 = tile_of_step(x, step);
        float p[TILE / 8][4] = {{0}};
        cp_async_wait<R::SLOTS - 2>();
        __syncwarp();
        if constexpr (TILE == TILE_KEYS) tile_times_turned<D, TILE / 8>(p, queries, 0, ring + slot * R::SLOT + warp * TILE * D, 0);
        else half_tile_times_turned<D>(p[0], queries, ring + slot * R::SLOT + warp * TILE * D);
        #pragma unroll
        for (int i = 0; i < TILE / 8; i++)
            #pragma unroll
            for (int e = 0; e < 4; e++) {
                const int key = k0 + i * 8 + pair + e % 2;
                p[i][e] = key < x->end ? p[i][e] * scale2 : NO_TOP;
            }
        #pragma unroll
        for (int i = 0; i < 2; i++) {
            float highest = fmaxf(p[0][i * 2], p[0][i * 2 + 1]);
            if (TILE == TILE_KEYS) highest = fmaxf(highest, fmaxf(p[TILE / 8 - 1][i * 2], p[TILE / 8 - 1][i * 2 + 1]));
            highest = quad_max(highest);
            if (lane() % 4 == 0) round->top[low + i * 8][warp] = highest;
        }
        __syncthreads();        // all have done with the values before, too: their slot is free
        if (is_step(x, step + R::SLOTS - 1)) fetch_step<D, DV, TILE>(ring, x, step + R::SLOTS - 1, (slot + R::SLOTS - 1) % R::SLOTS);
        cp_async_commit();
        #pragma unroll
        for (int i = 0; i < 2; i++) {
            const float4 *tops = (const float4 *)round->top[low + i * 8], a = tops[0], b = tops[1];
            const float higher = fmaxf(y->top[i], fmaxf(fmaxf(fmaxf(a.x, a.y), fmaxf(a.z, a.w)), fmaxf(fmaxf(b.x, b.y), fmaxf(b.z, b.w)))), shrink = power_of_2(y->top[i] - higher);
            y->top[i] = higher;
            for (int n = 0; n < BlockSums<DV>::TILES; n++) y->o[n][i * 2] *= shrink, y->o[n][i * 2 + 1] *= shrink;
            sums[i * 2] *= shrink;
            #pragma unroll
            for (int n = 0; n < TILE / 8; n++) {
                for (int e = i * 2; e < i * 2 + 2; e++) p[n][e] = power_of_2(p[n][e] - higher);
                *(unsigned *)(chunk_of<R::ROUND>(weights, low + i * 8, warp * (TILE / 8) + n) + pair) = two_bf16(p[n][i * 2], p[n][i * 2 + 1]);
            }
        }
        if (TILE == TILE_KEYS && left.of && k0 < x->end) {
            constexpr float ONE = 1 << LEFT_SHIFT;
            unsigned *to = (unsigned *)(left.of + k0 / TILE_KEYS * TILE_CHUNKS) + low;
            #pragma unroll
            for (int n = 0; n < TILE / 8; n++)
                for (int e = 0; e < 2; e++) to[(n * 8 + pair + e) * (MMA_ROWS / 2)] = two_f16(ONE * p[n][e], ONE * p[n][e + 2]);
            if (lane() % 4 == 0) *(float2 *)(left.top + k0 + low * 2) = make_float2(y->top[0], y->top[1]);
        }
        cp_async_wait<R::SLOTS - 2>();
        __syncthreads();
        if (is_step(x, step + R::SLOTS)) fetch_step<D, DV, TILE>(ring, x, step + R::SLOTS, slot);
        cp_async_commit();
        bf16 *values = ring + (slot + 1) % R::SLOTS * R::SLOT;
        #pragma unroll
        for (int k = 0; k < R::ROUND; k += 2 * TILE_KEYS) {
            unsigned a[2][4], b[2][4];
            for (int i = 0; i < 2; i++) ldmatrix_x4(a[i], chunk_of<R::ROUND>(weights, lane() % MMA_ROWS, k / 8 + i * 2 + lane() / MMA_ROWS));
            if constexpr (BlockSums<DV>::TILES == 2) {
                for (int i = 0; i < 2; i++) {
                    ldmatrix_x4_turned(b[i], chunk_of<DV>(values, k + i * TILE_KEYS + lane() % TILE_KEYS, warp * 2 + lane() / TILE_KEYS));
                    mma_16816(y->o[0], a[i], b[i]);
                    mma_16816(y->o[1], a[i], b[i] + 2);
                }
            } else {
                ldmatrix_x4_turned(b[0], chunk_of<DV>(values, k + lane(), warp));
                mma_16816(y->o[0], a[0], b[0]);
                mma_16816(y->o[0], a[1], b[0] + 2);
            }
            for (int i = 0; i < 2; i++) mma_16816(sums, a[i], ones);
        }
    }
    for (int i = 0; i < 2; i++) y->sum[i] = sums[i * 2];
}

// Dense attention, or that of two branches, whose lists have splits of their own; with the weights of the compressed one. grid: (row, kv, group of heads), split
template <int D, int DV>
__global__ void __launch_bounds__(DECODE_THREADS, D == 192 ? 1 : 2) fast_attend_kernel(AttendCall a) {
    extern __shared__ uint4 fast_shared[];
    __shared__ Round round;
    __shared__ uint4 queries[MMA_ROWS * D / 8];
    const DecodeShape *s = &a.s;
    const int G = s->G, groups = head_groups(G), list = blockIdx.x / groups, g0 = blockIdx.x % groups * MMA_ROWS, heads = min32(MMA_ROWS, G - g0);
    const int kind = kind_of(&a, blockIdx.y), branch = branch_of(kind), share = blockIdx.y - a.input->of[kind].first_split;
    const int64_t head0 = (int64_t)list * G + g0;
    const HeadWeights left = kind == CMP ? weights_of(&a.heads, blockIdx.x, weight_tiles(a.cache.branch[CMP].slots)) : HeadWeights{};
    const Stretch stretch = stretch_of(&a.input->of[kind], share);
    bf16 *ring = (bf16 *)fast_shared;
    const BlockKeys keys = block_keys<D, DV>(&a, branch, list, stretch, a.input->of[kind].fresh, 0, 1, NULL, 0);
    let_next_come();
    fetch_first<D, DV>(ring, &keys);
    const uint4 *queries_from = by_now(queries_of<D>(&a, head0));
    const int part = by_now((int)parts_of(s, branch, head0 + lane() / 4) + share), next_part = by_now(8 * s->splits);      // of a thread's heads
    wait_only();
    phase(ALONE);
    if (stretch.from >= stretch.to) return;
    const AskedQueries<D> q = ask_queries<D>(queries_from, heads);
    const int fresh = fetch_fresh<D, DV>(ring, &keys);
    put_queries<D>((bf16 *)queries, q);
    if (fresh) cp_async_wait<0>();
    __syncthreads();
    BlockSums<DV> y;
    attend_keys<D, DV>(&y, ring, &round, &keys, (bf16 *)queries, left);
    phase(ATTENDED);
    for (int i = 0; i < 2; i++) {
        const int64_t at = part + i * next_part;
        if (lane() / 4 + i * 8 >= heads) continue;
        if (threadIdx.x < WARP && lane() % 4 == 0) a.parts.top[at] = y.top[i] * (1 / LOG2E), a.parts.sum[at] = y.sum[i];
        for (int n = 0; n < BlockSums<DV>::TILES; n++)
            *(float2 *)(a.parts.out + at * DV + threadIdx.x / WARP * BlockSums<DV>::CHANNELS + n * 8 + lane() % 4 * 2) = make_float2(y.o[n][i * 2], y.o[n][i * 2 + 1]);
    }
    phase(TOLD);
}

// ----------------------------------------------------------------------------
// Behind it fast_selected_kernel, by teams: a team has a list. A member finds the importance of its share of the blocks, offers the best of them to all others,
// reads its share of the blocks that are chosen, and tells each member what it has summed up of the heads, a slice of (G,DV), that this one adds up over
// all branches and members. Nearly all of its code runs once, with few warps, so that each
// instruction waits for the one before it: what the host can know is not worked out here.

// The first shares of the branches before, as each thread has them.
enum { EARLY = 5 };
typedef struct AskedShares { float4 of[EARLY]; float top[EARLY]; } AskedShares;
typedef struct SharesAside { float4 of[EARLY][DECODE_THREADS]; float top[EARLY][DECODE_THREADS]; } SharesAside;
__device__ static inline void put_aside(SharesAside *to, const AskedShares &x) {
    #pragma unroll
    for (int k = 0; k < EARLY; k++) to->of[k][threadIdx.x] = x.of[k], to->top[k][threadIdx.x] = x.top[k];
}

static int listed_candidates(int places, int own) { return max32(DECODE_THREADS, places * (own / CHOICE_GROUPS + 1)); }

// With room for so many blocks of keys; bytes are INT_MAX if they are too many.
static TeamPlan plan_team(const DecodeShape *s, int64_t blocks, int team) {
    const SelectShape *sel = &s->select;
    const int own = (int)((blocks + team - 1) / team), places = max32(free_places(sel), 0), slice = in_fours((s->G * s->Dv + team - 1) / team);
    TeamPlan p;
    p.tile = team * DECODE_WARPS * HALF_TILE >= sel->n * sel->sel_block ? HALF_TILE : TILE_KEYS;
    p.team = team, p.places = places;
    p.guesses = team > 1 ? places / (2 * team) : 0;
    p.slice = slice, p.across = min32(slice / FOUR, DECODE_THREADS), p.groups = DECODE_THREADS / p.across;
    p.per_block = sel->sel_block / sel->cmp_stride, p.pieces = sel->cmp_block / sel->cmp_stride, p.at_once = max32(1, min32(own, CHOICE_WEIGHTS / p.per_block));
    p.per_slice = 1 / (float)p.slice, p.per_across = 1 / (float)p.across, p.per_key = 1 / (float)sel->sel_block;
    const int64_t weights = p.at_once * (int64_t)p.per_block + p.pieces + 2 * TILE_KEYS;       // they begin and end within tiles
    const int64_t sizes[] = {2 * CHOICE_GROUPS * (int64_t)sizeof(uint64_t), listed_candidates(places, own) * (int64_t)sizeof(uint64_t), weights * (int64_t)sizeof(float), own * (int64_t)sizeof(float),
                             (int64_t)sizeof(SharesAside), 0,
                             p.groups * (int64_t)slice * (int64_t)sizeof(float), team * (int64_t)slice * (int64_t)sizeof(float), team * (int64_t)s->G * (int64_t)sizeof(float2),
                             places * MOST_TEAM * (int64_t)sizeof(uint64_t), LETTERS * (int64_t)sizeof(uint64_t), 2 * s->G * (int64_t)sizeof(float), BRANCHES * s->G * (int64_t)sizeof(float)};
    int none, *at[] = {&none, &p.candidates, &p.near, &p.importance, &p.aside, &none, &p.partial, &p.told, &p.sums, &p.offered, &p.arrived, &p.lse, &p.gates};
    int64_t used = 0;
    for (size_t i = 0; i < sizeof at / sizeof *at; i++) {
        if (at[i] == &none && i) used = max64(used, ring_bytes(s->D, p.tile));      // behind the ring
        *at[i] = (int)min64(used, INT_MAX);
        used = round_up(used + sizes[i], (int64_t)sizeof(float4));
    }
    p.bytes = (int)min64(used, INT_MAX);
    return p;
}

// The compressed blocks from .. to-1 that touch the selection blocks j0 .. j1-1, of those that the token sees.
__device__ static inline Stretch touching(int j0, int j1, int visible, const TeamPlan *p) {
    const Stretch x = {max32(j0 * p->per_block - p->pieces + 1, 0), min32(j1 * p->per_block, visible)};
    return x;
}

// The log-sum-exp of a branch of a head, in units of log2, from its shares, of which the first have been asked for: LSE_THREADS side by side.
enum { LSE_THREADS = 8 };
// The first share of a row of lse (2,G) that a thread has, and how many there are from it on.
typedef struct SharesOfRow { int first, left; } SharesOfRow;
__device__ static inline SharesOfRow shares_of_row(const AttendCall *a, int head0, int r, int compressed, int all) {
    const int G = a->s.G, second = r >= G, n = threadIdx.x % LSE_THREADS;
    const SharesOfRow x = {(int)parts_of(&a->s, second ? WIN : CMP, head0 + r - second * G) + n, (second ? all - compressed : compressed) - n};
    return x;
}
typedef struct AskedSums { float top[FOUR], sum[FOUR]; } AskedSums;
__device__ static inline AskedSums ask_sums(const Shares *parts, SharesOfRow row) {
    AskedSums x;
    #pragma unroll
    for (int i = 0; i < FOUR; i++) {
        x.top[i] = i * LSE_THREADS < row.left ? parts->top[row.first + i * LSE_THREADS] : NO_TOP;
        x.sum[i] = i * LSE_THREADS < row.left ? parts->sum[row.first + i * LSE_THREADS] : 0;
    }
    return x;
}
__device__ static inline float lse_of_shares(const Shares *parts, SharesOfRow x, AskedSums asked) {
    float highest = NO_TOP, total = 0;
    #pragma unroll 1
    while (x.left > 0) {
        const float before = highest;
        for (int i = 0; i < FOUR; i++) highest = fmaxf(highest, asked.top[i] * LOG2E);
        total *= power_of_2(before - highest);
        for (int i = 0; i < FOUR; i++) total += asked.sum[i] * power_of_2(asked.top[i] * LOG2E - highest);
        x.first += FOUR * LSE_THREADS, x.left -= FOUR * LSE_THREADS;
        if (x.left > 0) asked = ask_sums(parts, x);
    }
    float before = highest;
    for (int step = 1; step < LSE_THREADS; step *= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, step));
    total *= power_of_2(before - highest);
    for (int step = 1; step < LSE_THREADS; step *= 2) total += __shfl_xor_sync(~0u, total, step);
    return highest + log2f(total);
}

// Weights in MMA_ROWS heads of a warp's next TILES_AHEAD tiles of compressed keys, where there are so many from the first of them to the last one of all warps.
typedef struct AskedTiles { uint4 of[TILES_AHEAD]; float top[TILES_AHEAD]; } AskedTiles;
__device__ static inline HeadWeights weights_of_tile(const AttendCall *a, int list, int group, int tile) {      // where a lane's stand
    const HeadWeights from = weights_of(&a->heads, list * head_groups(a->s.G) + group, weight_tiles(a->cache.branch[CMP].slots));
    const HeadWeights x = {from.of + (int64_t)tile * TILE_CHUNKS + lane(), from.top + (int64_t)tile * MMA_ROWS + lane() % MMA_ROWS};
    return x;
}
__device__ static inline AskedTiles ask_tiles(HeadWeights from, int tiles) {
    AskedTiles x = {};
    #pragma unroll
    for (int n = 0; n < TILES_AHEAD; n++) {
        if (n * DECODE_WARPS >= tiles) break;
        x.of[n] = from.of[n * DECODE_WARPS * TILE_CHUNKS];
        x.top[n] = from.top[n * DECODE_WARPS * MMA_ROWS];
    }
    return x;
}
// near: what tiles first .. last of compressed blocks weigh in all heads (eq. 10), times 2^LEFT_SHIFT, which a choice does not mind. Two lanes have a key, each half of the heads, and a lane has the factor of one head.
__device__ static inline void add_heads(float *near, AskedTiles asked, const AttendCall *a, const float *lse, int list, int first, int last) {
    const int G = a->s.G, groups = head_groups(G);
    float sum[TILES_AHEAD] = {0};
    #pragma unroll 1
    for (int tile = first + threadIdx.x / WARP, group = 0; tile <= last;) {
        // the next ones are asked for before these are used
        const int more = group + 1 < groups, next_tile = more ? tile : tile + TILES_AHEAD * DECODE_WARPS, next_group = more ? group + 1 : 0;
        AskedTiles next = asked;
        if (next_tile <= last) next = ask_tiles(weights_of_tile(a, list, next_group, next_tile), last + 1 - next_tile);
        const int g = group * MMA_ROWS + lane() % MMA_ROWS / 2 + lane() % 2 * 8;
        const float less = g < G ? lse[g] : INFINITY;
        #pragma unroll
        for (int n = 0; n < TILES_AHEAD; n++) {
            const float factor = power_of_2(asked.top[n] - less);
            const unsigned pairs[4] = {asked.of[n].x, asked.of[n].y, asked.of[n].z, asked.of[n].w};
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 two = floats_of_f16(pairs[i]);
                sum[n] += two.x * __shfl_sync(~0u, factor, lane() % 2 * 8 + i * 2) + two.y * __shfl_sync(~0u, factor, lane() % 2 * 8 + i * 2 + 1);
            }
        }
        if (!more)
            #pragma unroll
            for (int n = 0; n < TILES_AHEAD; n++) {
                const int t = tile + n * DECODE_WARPS;
                const float both = sum[n] + __shfl_xor_sync(~0u, sum[n], 1);
                if (lane() % 2 == 0 && t <= last) near[(t - first) * TILE_KEYS + lane() / 2] = both;
                sum[n] = 0;
            }
        asked = next, tile = next_tile, group = next_group;
    }
}

// y += factor · x
__device__ static inline void add_times(float4 *y, float factor, float4 x) { *y = make_float4(y->x + factor * x.x, y->y + factor * x.y, y->z + factor * x.z, y->w + factor * x.w); }

// A candidate for a choice as one number: the higher the importance the higher, and of equals the lower index. None is 0.
__device__ static inline uint64_t candidate(int j, float importance) { return (uint64_t)__float_as_uint(importance) << 32 | (uint32_t)~j; }
__device__ static inline int candidate_index(uint64_t x) { return (int)~(uint32_t)x; }

// list: the candidates among which the `places` best of blocks first .. first+own-1 are, from their importance (own); returns how many. Where they are many they are
// dealt out to groups of threads: at most `places` groups have a best one, in `best`, as high as the places-th of the groups' bests, and nobody else has one to take.
__device__ static inline int list_candidates(uint64_t *list, uint64_t *best, const float *importance, int first, int own, int places) {
    __shared__ uint64_t least;
    __shared__ int count;
    if (own <= DECODE_THREADS) {
        if ((int)threadIdx.x < own) list[threadIdx.x] = candidate(first + threadIdx.x, importance[threadIdx.x]);
        __syncthreads();
        return own;
    }
    const int group = threadIdx.x / CHOICE_MEMBERS, member = threadIdx.x % CHOICE_MEMBERS, begin = group + member * CHOICE_GROUPS;
    uint64_t mine = 0;
    #pragma unroll 1
    for (int j = begin; j < own; j += DECODE_THREADS) {
        const uint64_t x = candidate(first + j, importance[j]);
        if (x > mine) mine = x;
    }
    for (int step = 1; step < CHOICE_MEMBERS; step *= 2) {
        const uint64_t other = __shfl_xor_sync(~0u, mine, step);
        if (other > mine) mine = other;
    }
    if (member == 0) best[group] = mine;
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    int higher = 0;
    for (int i = member; i < CHOICE_GROUPS; i += CHOICE_MEMBERS) higher += best[i] > mine;
    for (int step = 1; step < CHOICE_MEMBERS; step *= 2) higher += __shfl_xor_sync(~0u, higher, step);
    if (higher == places - 1 && member == 0) least = mine;
    __syncthreads();
    if (higher < places)
        #pragma unroll 1
        for (int j = begin; j < own; j += DECODE_THREADS) {
            const uint64_t x = candidate(first + j, importance[j]);
            if (x >= least) list[atomicAdd(&count, 1)] = x;     // in any order: what follows does not depend on it
        }
    __syncthreads();
    return count;
}

// best (places): the highest of a list in order, as many as there are. Threads side by side share a candidate.
__device__ static inline void sort_best(uint64_t *best, const uint64_t *list, int count, int places) {
    int across = 1;
    while (across < WARP && 2 * across * count <= DECODE_THREADS) across *= 2;
    #pragma unroll 1
    for (int i0 = 0; i0 < count; i0 += DECODE_THREADS / across) {
        const int i = i0 + threadIdx.x / across;
        const uint64_t x = i < count ? list[i] : ~(uint64_t)0;
        int rank = i < count ? 0 : places;
        #pragma unroll 4
        for (int other = threadIdx.x % across; other < count; other += across) rank += list[other] > x;
        for (int step = 1; step < across; step *= 2) rank += __shfl_xor_sync(~0u, rank, step);
        if (threadIdx.x % across == 0 && rank < places) best[rank] = x;
    }
}

// offered (places,MOST_TEAM) is read by PAIRS pairs of members: what nobody will offer is none.
enum { PAIRS = 4 };
__device__ static inline void offer_none(uint64_t *offered, int places, int team) {
    #pragma unroll 1
    for (int i = threadIdx.x; i < places * MOST_TEAM; i += DECODE_THREADS)
        if (i % MOST_TEAM >= team) offered[i] = 0;
}
// chosen (places): the blocks of the highest of all that members have offered, each in order: where a place has nothing that is higher, no place behind it has.
__device__ static inline void choose_offered(int *chosen, const uint64_t *offered, int places, int team) {
    #pragma unroll 1
    for (int i = threadIdx.x; i < places * MOST_TEAM; i += DECODE_THREADS) {
        const uint64_t x = offered[i];
        int rank = i % MOST_TEAM < team ? 0 : places;
        #pragma unroll 1
        for (int place = 0; place < places && rank < places; place++) {
            int higher = 0;
            #pragma unroll 1
            for (int m = 0; m < team; m += 2 * PAIRS) {
                ulonglong2 two[PAIRS];
                #pragma unroll
                for (int n = 0; n < PAIRS; n++) two[n] = ((const ulonglong2 *)(offered + place * MOST_TEAM + m))[n];
                #pragma unroll
                for (int n = 0; n < PAIRS; n++) higher += (two[n].x > x) + (two[n].y > x);
            }
            if (!higher) break;
            rank += higher;
        }
        if (rank < places) chosen[rank] = candidate_index(x);
    }
}

// Into the L2 cache: the keys and values of a selection block.
template <int D, int DV>
__device__ static inline void prefetch_block(const AttendCall *a, int list, int j) {
    const KeyCache *cache = &a->cache.branch[SLC];
    const int64_t first = (int64_t)j * a->s.select.sel_block;
    const int keys = (int)min64(a->s.select.sel_block, cache->slots - first);
    prefetch_bytes((const bf16 *)cache->k + (list * cache->slots + first) * D, keys * D * (int)sizeof(bf16));
    prefetch_bytes((const bf16 *)cache->v + (list * cache->slots + first) * DV, keys * DV * (int)sizeof(bf16));
}

// The importance of a member's share of the blocks that there are to choose of, [first, first+own), from the weights that the compressed branch has left, of which the first
// have been asked for; its best are offered to all members, and the very best of them fetched before it is known whether they are chosen.
template <int D, int DV>
__device__ static inline void offer_blocks(char *memory, const TeamPlan *p, const AttendCall *a, const AskedTiles &asked, int list, int first, int own, int visible, int member) {
    uint64_t *best = (uint64_t *)memory, *candidates = (uint64_t *)(memory + p->candidates), *offered = (uint64_t *)(memory + p->offered), *arrived = (uint64_t *)(memory + p->arrived);
    float *near = (float *)(memory + p->near), *importance = (float *)(memory + p->importance);
    if (threadIdx.x < CHOICE_GROUPS) best[threadIdx.x] = 0;
    #pragma unroll 1
    for (int j0 = first; j0 < first + own; j0 += p->at_once) {
        const int j1 = min32(j0 + p->at_once, first + own);
        const Stretch x = touching(j0, j1, visible, p);
        const int tile = x.from / TILE_KEYS, end = (x.to - 1) / TILE_KEYS;
        add_heads(near, j0 == first ? asked : ask_tiles(weights_of_tile(a, list, 0, tile + threadIdx.x / WARP), end + 1 - tile - (int)(threadIdx.x / WARP)), a, (const float *)(memory + p->lse), list, tile, end);
        __syncthreads();
        #pragma unroll 1
        for (int j = j0 + threadIdx.x; j < j1; j += DECODE_THREADS) importance[j - first] = comparable(importance_of(near - tile * TILE_KEYS, j, visible, p->pieces, p->per_block));
        __syncthreads();
    }
    phase(WEIGHED);
    if (own > 0) sort_best(best, candidates, list_candidates(candidates, best + CHOICE_GROUPS, importance, first, own, p->places), p->places);
    __syncthreads();
    if ((int)threadIdx.x < p->guesses && best[threadIdx.x]) prefetch_block<D, DV>(a, list, candidate_index(best[threadIdx.x]));
    #pragma unroll 1
    for (int i = threadIdx.x; i < p->places * MOST_TEAM; i += DECODE_THREADS)
        if (i % MOST_TEAM < p->team) tell(offered + i / MOST_TEAM * MOST_TEAM + member, best[i / MOST_TEAM], arrived + OFFERED, i % MOST_TEAM);
}

// The n-th share of a head, of those of both branches, of which the first `compressed` are the compressed one's; and what its sum is multiplied by.
__device__ static inline int share_of(const AttendCall *a, int head, int n, int compressed) {
    return (int)parts_of(&a->s, n < compressed ? CMP : WIN, head) + (n < compressed ? n : n - compressed);
}
__device__ static inline float share_factor(const char *memory, const TeamPlan *p, const AttendCall *a, int g, int n, int compressed, float top) {
    const int second = n >= compressed;
    return ((const float *)(memory + p->gates))[g * BRANCHES + (second ? WIN : CMP)] * power_of_2(top * LOG2E - ((const float *)(memory + p->lse))[second * a->s.G + g]);
}

// Of numbers [begin, end) of (G,DV) of a list, the sums of the branches before: a thread takes four neighbouring channels of every so-manieth share. The first shares of
// a thread's first channels are asked for as soon as they are there, and put aside in shared memory until the offers are on their way: registers are short until then.
// EarlyShares: which those are, and the first of the channels, -1: this thread has none.
typedef struct EarlyShares { int of[EARLY], channel; } EarlyShares;
template <int DV>
__device__ static inline EarlyShares early_shares(const TeamPlan *p, const AttendCall *a, int list, int begin, int end, int compressed, int all) {
    const int group = quotient(threadIdx.x, p->per_across), at = begin + (threadIdx.x - group * p->across) * FOUR;
    EarlyShares x = {};
    x.channel = by_now(at >= end || group >= p->groups ? -1 : at % DV);
    #pragma unroll
    for (int k = 0; k < EARLY; k++) x.of[k] = by_now(share_of(a, list * a->s.G + at / DV, min32(group + k * p->groups, all - 1), compressed));
    return x;
}
template <int DV>
__device__ static inline AskedShares ask_shares(const AttendCall *a, const EarlyShares &from) {
    AskedShares x = {};
    if (from.channel < 0) return x;
    #pragma unroll
    for (int k = 0; k < EARLY; k++) {
        x.of[k] = *(const float4 *)(a->parts.out + (int64_t)from.of[k] * DV + from.channel);
        x.top[k] = a->parts.top[from.of[k]];
    }
    return x;
}
// partial (groups,slice) = Σ gate · attention
template <int DV>
__device__ static inline void merge_first(char *memory, const TeamPlan *p, const AttendCall *a, int list, int begin, int end, int compressed, int all) {
    const int group = quotient(threadIdx.x, p->per_across), i0 = (threadIdx.x - group * p->across) * FOUR;
    const SharesAside *aside = (const SharesAside *)(memory + p->aside);
    #pragma unroll 1
    for (int i = i0; begin + i < end && group < p->groups; i += p->across * FOUR) {
        const int g = (begin + i) / DV;
        float4 y = make_float4(0, 0, 0, 0);
        int n = group;
        if (i == i0)
            #pragma unroll
            for (int k = 0; k < EARLY; k++, n += p->groups)
                if (n < all) add_times(&y, share_factor(memory, p, a, g, n, compressed, aside->top[k][threadIdx.x]), aside->of[k][threadIdx.x]);
        #pragma unroll 2
        for (; n < all; n += p->groups) {
            const int share = share_of(a, list * a->s.G + g, n, compressed);
            add_times(&y, share_factor(memory, p, a, g, n, compressed, a->parts.top[share]), *(const float4 *)(a->parts.out + (int64_t)share * DV + (begin + i) % DV));
        }
        *(float4 *)((float *)(memory + p->partial) + group * p->slice + i) = y;
    }
}

__device__ static inline float4 sum_of_partials(const float *partial, const TeamPlan *p, int i) {
    float4 y = make_float4(0, 0, 0, 0);
    #pragma unroll 8
    for (int n = 0; n < p->groups; n++) add_times(&y, 1, *(const float4 *)(partial + n * p->slice + i));
    return y;
}

// out = that, of which a thread has the first four already, and the selection branch, as all members have told it.
template <int DV>
__device__ static inline void merge_told(char *memory, const TeamPlan *p, const AttendCall *a, float4 first, int list, int begin, int end) {
    const int G = a->s.G, head0 = begin / DV, heads = begin < end ? (end - 1) / DV - head0 + 1 : 0;
    const float *gates = (const float *)(memory + p->gates), *told = (const float *)(memory + p->told);
    float2 *sums = (float2 *)(memory + p->sums);        // top becomes what a member's sums are multiplied by
    #pragma unroll 1
    for (int r0 = 0; r0 < heads; r0 += DECODE_THREADS / MOST_TEAM) {
        const int r = r0 + threadIdx.x / MOST_TEAM, g = head0 + min32(r, heads - 1), n = threadIdx.x % MOST_TEAM;
        const float2 none = {NO_TOP, 0}, x = n < p->team && r < heads ? sums[n * G + g] : none;
        float highest = x.x;
        for (int step = 1; step < MOST_TEAM; step *= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, step));
        const float weight = power_of_2(x.x - highest);
        float total = weight * x.y;
        for (int step = 1; step < MOST_TEAM; step *= 2) total += __shfl_xor_sync(~0u, total, step);
        if (n < p->team && r < heads) sums[n * G + g].x = fast_divide(gates[g * BRANCHES + SLC] * weight, total);
    }
    __syncthreads();
    #pragma unroll 1
    for (int i = threadIdx.x * FOUR; begin + i < end; i += DECODE_THREADS * FOUR) {
        const int g = (begin + i) / DV;
        float4 y = i < DECODE_THREADS * FOUR ? first : sum_of_partials((const float *)(memory + p->partial), p, i);
        #pragma unroll 8
        for (int n = 0; n < p->team; n++) add_times(&y, sums[n * G + g].x, *(const float4 *)(told + n * p->slice + i));
        *(float4 *)(a->out + (int64_t)list * G * DV + begin + i) = y;
    }
}

// The choice, the selection branch and the sum of the branches. grid: list, member
template <int D, int DV, int TILE>
__global__ void __launch_bounds__(DECODE_THREADS, D == 192 ? 1 : 2) fast_selected_kernel(AttendCall a, TeamPlan p) {
    extern __shared__ uint4 fast_shared[];
    __shared__ Round round;
    __shared__ uint4 queries[MMA_ROWS * D / 8];
    __shared__ int chosen[CHOICE_GROUPS];
    const DecodeShape *s = &a.s;
    const SelectShape *sel = &s->select;
    char *memory = (char *)fast_shared;
    const int G = s->G, list = blockIdx.x, member = blockIdx.y, team = p.team, warp = threadIdx.x / WARP, head0 = list * G;
    const int begin = min32(member * p.slice, G * DV), end = min32(begin + p.slice, G * DV);
    const int bytes[LETTERS] = {team * p.places * (int)sizeof(uint64_t), team * ((end - begin) * (int)sizeof(float) + G * (int)sizeof(float2))};
    uint64_t *arrived = (uint64_t *)(memory + p.arrived);
    team_begin(arrived, bytes);
    const int blocks = a.input->blocks, each = a.input->each, visible = a.input->of[CMP].keys, last = blocks - sel->n_local, first = sel->n_init + member * each, own = min32(first + each, last) - first;
    const int compressed = a.input->of[CMP].splits, shares = compressed + a.input->of[WIN].splits;
    // What the next kernel's blocks ask for is in the way of what this one asks for first, unless it is little: found with attention alone, where the next ones are
    // fast_attend_kernel's and have a round each (dev/cuda/decode)
    const int next_at_once = a.input->of[CMP].share <= ROUND_KEYS;
    const Stretch all = {0, a.input->of[SLC].keys};
    bf16 *ring = (bf16 *)fast_shared;
    offer_none((uint64_t *)(memory + p.offered), p.places, team);
    SharesOfRow row = shares_of_row(&a, head0, min32(threadIdx.x / LSE_THREADS, 2 * G - 1), compressed, shares);
    row.first = by_now(row.first), row.left = by_now(row.left);
    const Stretch weighed = touching(first, first + min32(own, p.at_once), visible, &p);
    const int tile = weighed.from / TILE_KEYS + warp, tiles = by_now(own > 0 && each > 0 ? (weighed.to - 1) / TILE_KEYS + 1 - tile : 0);
    HeadWeights weights = weights_of_tile(&a, list, 0, tile);
    weights.of = by_now(weights.of), weights.top = by_now(weights.top);
    const EarlyShares early = early_shares<DV>(&p, &a, list, begin, end, compressed, shares);
    const uint4 *queries_from = by_now(queries_of<D>(&a, head0));
    const float *gates_from = by_now(a.gates + head0 * BRANCHES + threadIdx.x);
    team_there();
    wait_only();
    phase(NEXT_ALONE);

    if (next_at_once) let_next_come();
    // All that is known by now is asked for at once
    AskedSums sums = ask_sums(&a.parts, row);
    const float gate = (int)threadIdx.x < G * BRANCHES ? *gates_from : 0;
    const AskedTiles asked = ask_tiles(weights, tiles);
    const AskedQueries<D> q = ask_queries<D>(queries_from, min32(MMA_ROWS, G));
    const AskedShares before = ask_shares<DV>(&a, early);
    #pragma unroll 1
    for (int r0 = 0; r0 < 2 * G; r0 += DECODE_THREADS / LSE_THREADS) {
        const int r = min32(r0 + threadIdx.x / LSE_THREADS, 2 * G - 1);
        if (r0) row = shares_of_row(&a, head0, r, compressed, shares), sums = ask_sums(&a.parts, row);
        const float lse = lse_of_shares(&a.parts, row, sums);
        if (threadIdx.x % LSE_THREADS == 0) ((float *)(memory + p.lse))[r] = lse;
    }
    #pragma unroll 1
    for (int i = threadIdx.x; i < G * BRANCHES; i += DECODE_THREADS) ((float *)(memory + p.gates))[i] = i < DECODE_THREADS ? gate : a.gates[head0 * BRANCHES + i];
    put_queries<D>((bf16 *)queries, q);
    put_aside((SharesAside *)(memory + p.aside), before);
    __syncthreads();
    if (!next_at_once) let_next_come();
    phase(KNOWN);

    if (each) offer_blocks<D, DV>(memory, &p, &a, asked, list, first, own, visible, member);
    merge_first<DV>(memory, &p, &a, list, begin, end, compressed, shares);      // while offers are on their way
    if (each) {
        told(arrived + OFFERED);
        phase(MET);
        choose_offered(chosen + sel->n_init, (const uint64_t *)(memory + p.offered), p.places, team);
        if (threadIdx.x < sel->n_init) chosen[threadIdx.x] = threadIdx.x;
        if (threadIdx.x < sel->n_local) chosen[sel->n - sel->n_local + threadIdx.x] = last + threadIdx.x;
    } else if (threadIdx.x < blocks) {
        chosen[threadIdx.x] = threadIdx.x;
    }
    __syncthreads();
    phase(CHOSEN);
    const BlockKeys keys = block_keys<D, DV, TILE>(&a, SLC, list, all, -1, member, team, chosen, p.per_key);
    #pragma unroll 1
    for (int g0 = 0; g0 < G; g0 += MMA_ROWS) {
        const int heads = min32(MMA_ROWS, G - g0);
        fetch_first<D, DV, TILE>(ring, &keys);
        if (g0) {
            put_queries<D>((bf16 *)queries, ask_queries<D>(queries_of<D>(&a, head0 + g0), heads));
            __syncthreads();
        }
        BlockSums<DV> y;
        int to_member[2][BlockSums<DV>::TILES];      // where sums will go, while keys are on their way
        for (int i = 0; i < 2; i++)
            for (int n = 0; n < BlockSums<DV>::TILES; n++) to_member[i][n] = by_now(quotient((g0 + lane() / 4 + i * 8) * DV + warp * BlockSums<DV>::CHANNELS + n * 8 + lane() % 4 * 2, p.per_slice));
        attend_keys<D, DV, TILE>(&y, ring, &round, &keys, (bf16 *)queries, {});
        phase(ATTENDED_CHOSEN);
        for (int i = 0; i < 2; i++) {
            const int head = g0 + lane() / 4 + i * 8, to = warp * 4 + lane() % 4;
            if (head >= G) continue;
            if (to < team) tell((float2 *)(memory + p.sums) + member * G + head, make_float2(y.top[i], y.sum[i]), arrived + SUMMED, to);
            for (int n = 0; n < BlockSums<DV>::TILES; n++) {
                const int at = head * DV + warp * BlockSums<DV>::CHANNELS + n * 8 + lane() % 4 * 2, of = to_member[i][n];
                tell((float2 *)((float *)(memory + p.told) + (member - of) * p.slice + at), make_float2(y.o[n][i * 2], y.o[n][i * 2 + 1]), arrived + SUMMED, of);
            }
        }
        __syncthreads();            // before other keys take these ones' place
    }
    phase(TOLD_AGAIN);
    const int i = threadIdx.x * FOUR;
    const float4 first_four = begin + i < end ? sum_of_partials((const float *)(memory + p.partial), &p, i) : make_float4(0, 0, 0, 0);
    told(arrived + SUMMED);
    phase(MET_AGAIN);
    merge_told<DV>(memory, &p, &a, first_four, list, begin, end);
    phase(MERGED);
}

// Compression in one launch: the linear map of `flat`, x (members,l·D) · weight (outputs,l·D)ᵀ, for up to MMA_ROWS members of a set. MLP: the first layer, of which
// a block of threads has FAST_OUTPUTS outputs; the last block to be done with its own makes the second layer. Else the convolution: as many outputs of the lower half
// and those that lie half of all further, which RoPE turns together. Warps share K, in steps. Weights of the first steps wait in shared memory for what token_kernel flattens.
enum { AT_ONCE = 8 };

// Eight numbers at x, and so often `stride` further, as many times as there are, else zeros; they need not be aligned. All are asked for before one is used.
__device__ static inline void load_eights(uint4 x[AT_ONCE], const bf16 *from, int stride, int count, int aligned) {
    const uint4 none = {0, 0, 0, 0};
    if (aligned) {
        #pragma unroll
        for (int n = 0; n < AT_ONCE; n++) x[n] = n < count ? *(const uint4 *)(from + n * stride) : none;
        return;
    }
    #pragma unroll
    for (int n = 0; n < AT_ONCE; n++) {
        const unsigned short *bits = (const unsigned short *)(from + n * stride);
        const auto two = [&](int i) { return n < count ? bits[i] | (unsigned)bits[i + 1] << 16 : 0; };
        x[n].x = two(0), x[n].y = two(2), x[n].z = two(4), x[n].w = two(6);
    }
}

// The second layer for members m0 .. m0+rows-1 of a set, hidden (members,2D) · fc2 (D,2D)ᵀ, into the cache: a warp has FAST_OUTPUTS channels of the lower half and those that turn with them.
__device__ static inline void second_layer(const CompressStep<bf16> *a, int v, int set, int m0, int rows) {
    const int D = a->width[v], half = D / 2, low = lane() / 4;
    const bf16 *hidden = a->hidden[v] + ((int64_t)set * a->members + m0) * 2 * D, *weight = a->matrices[v].fc2 + (int64_t)set * D * 2 * D;
    const float *bias = a->weights[v].fc2_bias + set * D;
    const int aligned = (uintptr_t)weight % 16 == 0;
    #pragma unroll 1
    for (int c0 = threadIdx.x / WARP * FAST_OUTPUTS; c0 < half; c0 += DECODE_WARPS * FAST_OUTPUTS) {
        float d[2][4] = {{0}};
        #pragma unroll 1
        for (int k = lane() % 4 * 8; k < 2 * D; k += AT_ONCE * FAST_STEP) {
            const int count = (2 * D - k + FAST_STEP - 1) / FAST_STEP;
            uint4 x[AT_ONCE], y[AT_ONCE], w[2][AT_ONCE];
            #pragma unroll
            for (int h = 0; h < 2; h++) load_eights(w[h], weight + (int64_t)(h * half + c0 + low) * 2 * D + k, FAST_STEP, count, aligned);
            load_eights(x, hidden + low * 2 * D + k, FAST_STEP, low < rows ? count : 0, 1);
            load_eights(y, hidden + (low + 8) * 2 * D + k, FAST_STEP, low + 8 < rows ? count : 0, 1);
            #pragma unroll
            for (int n = 0; n < AT_ONCE; n++)
                #pragma unroll
                for (int h = 0; h < 2; h++) mma_of_eights(d[h], x[n], y[n], w[h][n]);
        }
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            const int c = c0 + lane() % 4 * 2 + i % 2, m = low + i / 2 * 8;
            if (m < rows) cache_compressed(a, v, set, m0 + m, c, 1, d[0][i] + bias[c], d[1][i] + bias[half + c]);
        }
    }
}

// grid: outputs by FAST_OUTPUTS, (2,sets), members by MMA_ROWS
template <int MLP>
__global__ void __launch_bounds__(DECODE_THREADS) fast_compress_kernel(CompressStep<bf16> a) {
    constexpr int HALVES = MLP ? 1 : 2;
    static_assert(FAST_STEPS / HALVES % AT_ONCE == 0, "weights of steps at once wait all, or none does");
    __shared__ float sums[DECODE_WARPS][MMA_ROWS][HALVES * FAST_OUTPUTS];
    __shared__ int is_last;
    extern __shared__ uint4 fast_shared[];      // weights (FAST_STEPS,threads)
    const int v = (int)blockIdx.y / a.sets, set = (int)blockIdx.y % a.sets, D = a.width[v], outputs = MLP ? 2 * D : D, half = D / 2, K = a.block * D;
    const int warp = threadIdx.x / WARP, low = lane() / 4, c0 = blockIdx.x * FAST_OUTPUTS, m0 = blockIdx.z * MMA_ROWS, rows = min32(MMA_ROWS, a.members - m0);
    const int there = c0 < outputs / HALVES, k0 = warp * FAST_STEP + lane() % 4 * 8;
    const bf16 *weight = (MLP ? a.matrices[v].fc1 : a.matrices[v].conv) + ((int64_t)set * outputs + c0) * K;
    const float *bias = (MLP ? a.weights[v].fc1_bias : a.weights[v].conv_bias) + set * outputs + c0;
    const int aligned = (uintptr_t)weight % 16 == 0, early = there && aligned ? FAST_STEPS / HALVES : 0;       // steps whose weights come early
    let_next_come();
    #pragma unroll 4
    for (int i = 0; i < early * HALVES; i++) {
        const int k = k0 + i / HALVES * FAST_ROUND;
        if (k < K) cp_async_16(fast_shared + i * DECODE_THREADS + threadIdx.x, weight + ((int64_t)(i % HALVES * half) + low) * K + k, 16);
    }
    cp_async_commit();
    for (int c = blockIdx.x * DECODE_WARPS + warp; c < D && MLP; c += gridDim.x * DECODE_WARPS) prefetch_row(a.matrices[v].fc2 + ((int64_t)set * D + c) * 2 * D, 2 * D);
    const int64_t place = (int64_t)set * a.members + m0;
    const bf16 *flat = a.flat[v] + (place + low) * K + k0;
    wait_only();
    if (!there) return;
    cp_async_wait<0>();         // a lane's own, so that warps need not meet
    float d[HALVES][4] = {{0}};
    const int all = k0 < K ? (K - k0 + FAST_ROUND - 1) / FAST_ROUND : 0;
    #pragma unroll 1
    for (int step = 0; step < all; step += AT_ONCE) {
        uint4 x[AT_ONCE], y[AT_ONCE], w[AT_ONCE];
        load_eights(x, flat + step * FAST_ROUND, FAST_ROUND, low < rows ? all - step : 0, 1);
        load_eights(y, flat + 8 * K + step * FAST_ROUND, FAST_ROUND, low + 8 < rows ? all - step : 0, 1);
        #pragma unroll
        for (int h = 0; h < HALVES; h++) {
            if (step >= early) load_eights(w, weight + (int64_t)(h * half + low) * K + k0 + step * FAST_ROUND, FAST_ROUND, all - step, aligned);
            #pragma unroll
            for (int n = 0; n < AT_ONCE; n++)
                if (step + n < all) mma_of_eights(d[h], x[n], y[n], step < early ? fast_shared[((step + n) * HALVES + h) * DECODE_THREADS + threadIdx.x] : w[n]);
        }
    }
    #pragma unroll
    for (int e = 0; e < HALVES * 4; e++) sums[warp][low + e % 4 / 2 * 8][e / 4 * FAST_OUTPUTS + lane() % 4 * 2 + e % 2] = d[e / 4][e % 4];
    __syncthreads();
    const int m = threadIdx.x / FAST_OUTPUTS, c = threadIdx.x % FAST_OUTPUTS;
    if (m < rows) {
        float y = bias[c], z = MLP ? 0 : bias[half + c];
        for (int i = 0; i < DECODE_WARPS; i++) {
            y += sums[i][m][c];
            if (!MLP) z += sums[i][m][(HALVES - 1) * FAST_OUTPUTS + c];
        }
        if (MLP) a.hidden[v][(place + m) * outputs + c0 + c] = (bf16)gelu(y);
        else cache_compressed(&a, v, set, m0 + m, c0 + c, 1, y, z);
    }
    if (!MLP) return;

    // What other blocks have written is seen by the last one
    int *done = a.done + blockIdx.y * gridDim.z + blockIdx.z;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(done, 1) == outputs / FAST_OUTPUTS - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    if (threadIdx.x == 0) *done = 0;
    second_layer(&a, v, set, m0, rows);
}

// ----------------------------------------------------------------------------
// Mixture of experts: nobody counts the tokens of an expert here, each (row, choice) reads its expert's weights.

// choice, share (rows,k) from the router's logits (rows,E), which are used up: a warp a row. Ties go to the lower index.
__global__ void route_kernel(int *choice, float *share, float *logits, int64_t rows, int E, int k) {
    wait_for_previous();
    const int64_t row = global_warp();
    if (row >= rows) return;
    float *x = logits + row * E, top = -INFINITY, sum = 0, chosen = 0;
    for (int e = lane(); e < E; e += WARP) top = fmaxf(top, x[e]);
    top = warp_max(top);
    for (int e = lane(); e < E; e += WARP) sum += expf(x[e] - top);
    sum = warp_sum(sum);
    for (int i = 0; i < k; i++) {
        float best = -INFINITY;
        int at = E;
        for (int e = lane(); e < E; e += WARP)
            if (x[e] > best) best = x[e], at = e;
        for (int step = WARP / 2; step > 0; step /= 2) {
            const float other = __shfl_xor_sync(~0u, best, step);
            const int other_at = __shfl_xor_sync(~0u, at, step);
            if (other > best || (other == best && other_at < at)) best = other, at = other_at;
        }
        const float p = expf(best - top) / sum;
        if (lane() == 0) choice[row * k + i] = at < E ? at : 0, share[row * k + i] = p;      // only NaN finds nobody
        if (at < E && at % WARP == lane()) x[at] = -INFINITY;
        chosen += p;
    }
    __syncwarp();
    for (int i = lane(); i < k && k > 1; i += WARP) share[row * k + i] /= chosen;
}

// The chosen experts of each row: x (rows,C) -> hidden (rows,k,F) -> out (rows,C) = add + Σ share · expert(x).
template <typename F>
struct Experts {
    float *out, *hidden;
    const float *add, *x, *norm, *share;
    const F *experts;
    const int *choice;
    double eps;
    int k;
    MoeShape s;
};

template <typename F>
__global__ void expert_up_kernel(Experts<F> a) {
    wait_for_previous();
    const int64_t item = global_warp(), C = a.s.C, Fe = a.s.F, f = item % Fe, row = item / Fe / a.k;      // item = (row·k + choice)·Fe + f
    if (row >= a.s.N) return;
    const F *weight = a.experts + a.choice[item / Fe] * 3 * Fe * C;
    const Linear<F> call = {NULL, NULL, a.norm, a.x, NULL, a.s.N, C, Fe, a.eps, 1};
    float y, up;
    warp_linear<1>(&y, &call, weight + f * C, row, 1);
    warp_linear<1>(&up, &call, weight + (Fe + f) * C, row, 1);
    if (lane() == 0) a.hidden[item] = y * sigmoid(y) * up;
}

template <typename F>
__global__ void expert_down_kernel(Experts<F> a) {
    wait_for_previous();
    const int64_t item = global_warp(), C = a.s.C, Fe = a.s.F, c = item % C, row = item / C;
    if (row >= a.s.N) return;
    float sum = 0;
    for (int64_t i = row * a.k; i < (row + 1) * a.k; i++) sum += a.share[i] * warp_dot(a.experts + (a.choice[i] * 3 + 2) * Fe * C + c * Fe, a.hidden + i * Fe, Fe);
    if (lane() == 0) a.out[item] = a.add[item] + sum;
}

// ----------------------------------------------------------------------------
// A token through the model

static int completes_block(const Config *c, int64_t t) { return compressed_seen(t, c->cmp_block, c->cmp_stride) > compressed_seen(t - 1, c->cmp_block, c->cmp_stride); }

// What token t reads of one list, or of two, of which each has its own of the splits; all take equal shares, as small as that goes.
static void plan_lists(const Working *w, Reading *x, int64_t x_keys, Reading *y, int64_t y_keys) {
    int64_t share = y ? x_keys + y_keys : (x_keys + w->splits - 1) / w->splits;
    for (int n = 1; n < w->splits && y; n++) share = min64(share, max64((x_keys + n - 1) / n, (y_keys + w->splits - n - 1) / (w->splits - n)));
    share = round_up(max64(share, w->fast ? (int)ROUND_KEYS : WARP), TILE_KEYS);
    const Reading first = {(int)x_keys, (int)share, 0, (int)((x_keys + share - 1) / share), (int)x_keys - 1};
    *x = first;
    if (!y) return;
    const Reading second = {(int)y_keys, (int)share, first.splits, (int)((y_keys + share - 1) / share), (int)y_keys - 1};
    *y = second;
}

static void plan_token(Decoder *d, const int *tokens) {
    const Config *c = &d->model->config;
    const Working *w = d->work;
    Input *in = w->input;
    const int64_t t = d->length, own = t / max64(c->sel_block, 1), cmp = compressed_seen(t, c->cmp_block, c->cmp_stride), win = min64(t + 1, c->window);
    const int64_t slc = own < c->sel_blocks ? t + 1 : (c->sel_blocks - 1) * (int64_t)c->sel_block + t % c->sel_block + 1;
    in->position = t;
    in->blocks = (int)own + 1;
    in->each = 0;
    if (w->fast && has_nsa(c)) {
        const SelectShape sel = select_shape(c);
        const int64_t end = choice_end(t, &sel);
        if (end) in->each = (int)((end - sel.n_init + w->plan.team - 1) / w->plan.team);
    }
    plan_lists(w, &in->of[CMP], cmp, &in->of[WIN], win);
    in->of[WIN].fresh = (int)(t % max64(c->window, 1));      // slots are used again
    if (has_nsa(c) && !completes_block(c, t)) in->of[CMP].fresh = -1;
    plan_lists(w, &in->of[SLC], slc, NULL, 0);
    plan_lists(w, &in->of[CACHE_FULL], t + 1, NULL, 0);
    memcpy(in->tokens, tokens, (size_t)d->rows * sizeof(int));
}

static size_t input_bytes(const Decoder *d) { return sizeof(Input) + (size_t)d->rows * sizeof(int); }

typedef void FastKernel(AttendCall);
static FastKernel *dense_kernel_of(int D) { return D == 64 ? fast_attend_kernel<64, 64> : D == 128 ? fast_attend_kernel<128, 128> : fast_attend_kernel<192, 128>; }
typedef void SelectedKernel(AttendCall, TeamPlan);
template <int TILE>
static SelectedKernel *selected_kernel_by(int D) { return D == 64 ? fast_selected_kernel<64, 64, TILE> : D == 128 ? fast_selected_kernel<128, 128, TILE> : fast_selected_kernel<192, 128, TILE>; }
static SelectedKernel *selected_kernel_of(int D, int tile) { return tile == TILE_KEYS ? selected_kernel_by<TILE_KEYS>(D) : selected_kernel_by<HALF_TILE>(D); }

// Every head meets the keys of one list, or of two.
template <typename F>
static void launch_attend(const Working *w, AttendCall a, int first, int second) {
    const DecodeShape *s = &a.s;
    const int together = w->fast ? (int)MMA_ROWS : (int)HEADS;
    const dim3 blocks((unsigned)(s->rows * s->KV * ((s->G + together - 1) / together)), (unsigned)s->splits);
    a.lists[0] = first;
    a.lists[1] = second;
    if (w->fast) launch(w->stream, dense_kernel_of(s->D), blocks, DECODE_THREADS, ring_bytes(s->D), a);
    else launch(w->stream, attend_kernel<F>, blocks, ATTEND_WARPS * WARP, attend_numbers(s) * (int64_t)sizeof(float), a);
}

template <typename F>
static CompressStep<F> compress_step_of(const Decoder *d, int layer) {
    const Config *c = &d->model->config;
    const Model *g = d->model->twin;
    const LayerWeights *w = &g->layers[layer];
    const Working *a = d->work;
    const int KV = c->num_key_value_heads, D = c->head_dim, Dv = c->v_head_dim, sets = c->compress == COMPRESS_MLP ? 1 : KV, lists = d->rows * KV;
    const CompressStep<F> step = {{(F *)a->flat[0], (F *)a->flat[1]}, {(F *)a->hidden[0], (F *)a->hidden[1]}, a->angles, a->device_input, d->layers[layer],
                                  {w->compress[0], w->compress[1]}, {compress_matrices<F>(g, &w->compress[0]), compress_matrices<F>(g, &w->compress[1])},
                                  KV, {D, Dv}, c->cmp_block, c->compress, sets, lists / sets, a->done};
    return step;
}

// What token_kernel has flattened goes into the cache.
template <typename F>
static void compress_step(Decoder *d, int layer) {
    const Config *c = &d->model->config;
    const Working *a = d->work;
    const CompressStep<F> step = compress_step_of<F>(d, layer);
    const int D = c->head_dim, sets = step.sets;
    const int64_t most = max64(D, c->v_head_dim);
    if constexpr (std::is_same<F, bf16>::value)
        if (a->fast && compress_has_weights(c->compress)) {
            const int mlp = compress_hidden(c->compress, D) > 0;
            launch(a->stream, mlp ? fast_compress_kernel<1> : fast_compress_kernel<0>, dim3(grid(mlp ? 2 * most : most / 2, FAST_OUTPUTS), 2 * (unsigned)sets, grid(step.members, MMA_ROWS)), DECODE_THREADS,
                   fast_steps_bytes(FAST_STEPS), step);
            return;
        }
    if (compress_hidden(c->compress, D)) launch(a->stream, hidden_kernel<F>, dim3(grid(2 * most, WARPS), 2 * (unsigned)sets), THREADS, 0, step);
    launch(a->stream, output_kernel<F>, dim3(grid((most + 1) / 2, WARPS), 2 * (unsigned)sets), THREADS, 0, step);
}

static AttendCall attend_call(const Decoder *d, int layer) {
    const Config *c = &d->model->config;
    const Working *w = d->work;
    const AttendCall a = {w->wide, wide_row(c, layer).size, w->queries, w->device_input, d->layers[layer], w->block_idx,
                          w->scores, w->heads, w->parts, w->gates, w->attention, decode_shape(d, layer), {NO_LIST, NO_LIST}};
    return a;
}

// The simple tier's choice.
static void launch_choice(const Decoder *d, int layer) {
    const Working *w = d->work;
    const DecodeShape s = decode_shape(d, layer);
    const int64_t slots = d->layers[layer].branch[CMP].slots, most_blocks = most_selection_blocks(&d->model->config, d->capacity);
    launch(w->stream, select_kernel, (unsigned)(s.rows * s.KV), min64(MOST_THREADS, round_up(max64(slots, 1), WARP)), s.G * (int64_t)sizeof(float), w->block_idx, w->scores, score_row(slots), w->importance,
           most_blocks, w->parts, w->device_input, s);
}

static void launch_merge(const Decoder *d, int layer) {
    const Working *w = d->work;
    const DecodeShape s = decode_shape(d, layer);
    launch(w->stream, s.Dv % 4 ? merge_kernel<1> : merge_kernel<4>, (unsigned)(s.rows * s.H), MERGE_THREADS, 0, w->attention, w->gates, w->parts, w->device_input, s);
}

// wide, with q turned, and the caches -> attention
template <typename F>
static void decode_branches(Decoder *d, int layer, int completes) {
    const Working *w = d->work;
    const AttendCall a = attend_call(d, layer);
    if (completes && !a.s.full) compress_step<F>(d, layer);
    if (a.s.full) {
        launch_attend<F>(w, a, CACHE_FULL, NO_LIST);
    } else {
        launch_attend<F>(w, a, CMP, WIN);
        if (w->fast) {
            launch_teams(w->stream, selected_kernel_of(a.s.D, w->plan.tile), dim3((unsigned)(a.s.rows * a.s.KV), (unsigned)w->plan.team), DECODE_THREADS, w->plan.bytes, w->plan.team, a, w->plan);
            return;
        }
        launch_choice(d, layer);
        launch_attend<F>(w, a, SLC, NO_LIST);
    }
    launch_merge(d, layer);
}

// x -> mid
template <typename F>
static void decode_attention(Decoder *d, int layer, int completes) {
    const Config *c = &d->model->config;
    const Model *g = d->model->twin;
    const LayerWeights *w = &g->layers[layer];
    const DecodeShape s = decode_shape(d, layer);
    const WideRow row = wide_row(c, layer);
    Working *a = d->work;
    const int64_t rows = d->rows, C = c->hidden_size;
    const TokenCall token = {a->wide, a->gates, a->fast ? a->queries : NULL, w->gate_weight, w->gate_bias, a->angles, a->device_input, row, d->layers[layer], s, c->gate};
    linear(a->stream, a->wide, NULL, w->norm1, c->rms_norm_eps, a->x, matrix<F>(g, w->wide), rows, C, row.size, 0);
    const CompressStep<F> step = s.full ? CompressStep<F>{} : compress_step_of<F>(d, layer);
    launch(a->stream, token_kernel<F>, (unsigned)(rows + (completes && !s.full ? flatten_blocks(&step) : 0)), THREADS, 0, token, step);
    decode_branches<F>(d, layer, completes);
    linear(a->stream, a->mid, a->x, NULL, 0, a->attention, matrix<F>(g, w->o), rows, (int64_t)s.H * s.Dv, C, 0);
}

// mid -> x
template <typename F>
static void decode_ffn(Decoder *d, int layer) {
    const Config *c = &d->model->config;
    const Model *g = d->model->twin;
    const LayerWeights *w = &g->layers[layer];
    Working *a = d->work;
    const int64_t rows = d->rows, C = c->hidden_size, width = ffn_width(c, layer);
    if (width > 0) {
        linear(a->stream, a->ffn, NULL, w->norm2, c->rms_norm_eps, a->mid, matrix<F>(g, w->gate_up), rows, C, width, 1);
        linear(a->stream, a->x, a->mid, NULL, 0, a->ffn, matrix<F>(g, w->down), rows, width, C, 0);
    }
    if (!layer_is_moe(c, layer)) return;
    const Experts<F> e = {a->x, a->ffn, width > 0 ? a->x : a->mid, a->mid, w->norm2, a->share, matrix<F>(g, w->experts), a->choice, c->rms_norm_eps,
                          c->num_experts_per_tok, moe_shape(c, rows, 1, NULL)};
    linear(a->stream, a->router, NULL, w->norm2, c->rms_norm_eps, a->mid, matrix<F>(g, w->router), rows, C, c->num_experts, 0);
    launch(a->stream, route_kernel, grid(rows, WARPS), THREADS, 0, a->choice, a->share, a->router, rows, c->num_experts, e.k);
    launch(a->stream, expert_up_kernel<F>, grid(rows * e.k * e.s.F, WARPS), THREADS, 0, e);
    launch(a->stream, expert_down_kernel<F>, grid(rows * C, WARPS), THREADS, 0, e);
}

// Everything from the tokens to the logits, which is what a graph holds.
template <typename F>
static void decode_model(Decoder *d, int completes) {
    const Config *c = &d->model->config;
    const Model *g = d->model->twin;
    Working *w = d->work;
    const int64_t rows = d->rows, C = c->hidden_size, V = c->vocab_size;
    CUDA(cudaMemcpyAsync(w->device_input, w->input, input_bytes(d), cudaMemcpyHostToDevice, w->stream));
    begin_kernel<F><<<(unsigned)rows, THREADS, 0, w->stream>>>(w->x, w->angles, w->device_input, matrix<F>(g, g->embed), C, w->frequency, c->head_dim / 2, c->cmp_block);
    LAUNCHED();
    for (int l = 0; l < c->num_hidden_layers; l++) {
        decode_attention<F>(d, l, completes);
        decode_ffn<F>(d, l);
    }
    linear(w->stream, w->logits, NULL, g->norm, c->rms_norm_eps, w->x, matrix<F>(g, g->head), rows, C, V, 0);
    CUDA(cudaMemcpyAsync(d->logits, w->logits, (size_t)(rows * V) * sizeof(float), cudaMemcpyDeviceToHost, w->stream));
}

// What `work` asks of the stream, as a graph.
template <typename Work>
static cudaGraphExec_t record(cudaStream_t stream, Work work) {
    cudaGraph_t graph;
    cudaGraphExec_t result;
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    work();
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphInstantiate(&result, graph, 0));
    CUDA(cudaGraphDestroy(graph));
    return result;
}

void decode_token(Decoder *d, const int *tokens) {
    const Config *c = &d->model->config;
    Working *w = d->work;
    const int completes = has_nsa(c) && completes_block(c, d->length);
    cudaGraphExec_t *graph = &w->graph[completes];
    if (!*graph) *graph = record(w->stream, [&] {
        if (is_bf16(c)) decode_model<bf16>(d, completes);
        else decode_model<float>(d, completes);
    });
    plan_token(d, tokens);
    CUDA(cudaGraphLaunch(*graph, w->stream));
    CUDA(cudaStreamSynchronize(w->stream));
}

// ----------------------------------------------------------------------------
// Memory, and the prompt

// Carves what Working has on the GPU; m->memory NULL: only counts.
static void carve_working(Working *w, const Config *c, int64_t rows, int64_t capacity, Carver *m) {
    const int64_t C = c->hidden_size, H = c->num_attention_heads, KV = c->num_key_value_heads, D = c->head_dim, Dv = c->v_head_dim;
    const int64_t k = c->num_experts_per_tok, lists = rows * KV, nsa = has_nsa(c);
    int64_t wide = 0, width = 0;
    for (int l = 0; l < c->num_hidden_layers; l++) {
        wide = max64(wide, wide_row(c, l).size);
        width = max64(width, ffn_width(c, l));
    }
    if (c->num_experts) width = max64(width, k * c->moe_intermediate_size);
    const int64_t parts = (nsa ? BRANCHES : 1) * rows * H * w->splits, slots = nsa ? compressed_seen(capacity - 1, c->cmp_block, c->cmp_stride) : 0;
    char *input;
    carve(m, &input, (int64_t)sizeof(Input) + rows * (int64_t)sizeof(int));
    w->device_input = (Input *)input;
    carve(m, &w->frequency, D / 2);
    carve(m, &w->angles, 2 * D);
    carve(m, &w->x, rows * C);
    carve(m, &w->mid, rows * C);
    carve(m, &w->wide, rows * wide);
    carve(m, &w->gates, rows * H * BRANCHES);
    carve(m, &w->queries, w->fast * rows * H * D);
    for (int v = 0; v < 2; v++) {
        carve(m, (char **)&w->flat[v], nsa * lists * c->cmp_block * (v ? Dv : D) * cache_number(c));
        carve(m, (char **)&w->hidden[v], nsa * lists * 2 * (v ? Dv : D) * cache_number(c));
    }
    carve(m, &w->done, nsa * 2 * lists);
    const int64_t tiles = nsa * w->fast * lists * head_groups((int)(H / KV)) * weight_tiles(slots);
    carve(m, &w->heads.of, tiles * TILE_CHUNKS);
    carve(m, &w->heads.top, tiles * MMA_ROWS);
    carve(m, &w->scores, !w->fast * rows * H * score_row(slots));
    carve(m, &w->importance, nsa * !w->fast * lists * most_selection_blocks(c, capacity));
    carve(m, &w->block_idx, nsa * !w->fast * lists * c->sel_blocks);
    carve(m, &w->parts.top, parts);
    carve(m, &w->parts.sum, parts);
    carve(m, &w->parts.out, parts * Dv);
    carve(m, &w->attention, rows * H * Dv);
    carve(m, &w->ffn, rows * width);
    carve(m, &w->router, rows * c->num_experts);
    carve(m, &w->share, rows * k);
    carve(m, &w->choice, rows * k);
    carve(m, &w->logits, rows * c->vocab_size);
}

// What decides into how many shares the keys of a list are cut, of `lists` when `at_once` fit on the GPU: the time goes with how often it must
// be filled, and for each time with the keys of a share and with what a share costs without any, in keys of a list: one 64th of them where
// a block of threads is done with its own, a fourth in a team, which has to meet and to choose (measured: dev/benchmarks.md).
static const double SHARE_COST = 1.0 / 64, TEAM_COST = 1.0 / 4;
static double time_of_shares(int64_t lists, int64_t at_once, int shares, double cost) { return (double)((lists + at_once - 1) / at_once) * (1.0 / shares + cost); }

static int choose_splits(int64_t lists, int64_t slots) {
    int best = 1;
    for (int splits = 2; splits <= MOST_SPLITS; splits++)
        if (time_of_shares(lists * splits, slots, splits, SHARE_COST) < time_of_shares(lists * best, slots, best, SHARE_COST)) best = splits;
    return best;
}

// Fewer shares of `keys`, which take as many rounds, where the last round was for less than a quarter of the keys that it could have: 8 lists of 4607 keys took 16.4 us by 18
// shares and 19.1 by 33, which have 140 each. Where it is fuller more shares are no worse: 16 lists 26.2 us by 16, 27.1 by 12.
static int full_rounds(int splits, int64_t keys) {
    const int64_t each = (keys + splits - 1) / splits, rounds = (each + ROUND_KEYS - 1) / ROUND_KEYS;
    return rounds > 1 && (each - 1) % ROUND_KEYS + 1 < ROUND_KEYS / 4 ? (int)((keys + rounds * ROUND_KEYS - 1) / (rounds * ROUND_KEYS)) : splits;
}

// Kernels that share a multiprocessor must have divided its memory alike, between the cache and what is shared: else one waits for the other's end.
template <typename Kernel>
static void allow_all_shared(Kernel *kernel, int64_t bytes) {
    allow_shared(kernel, bytes, FAST_NAME, FAST_FIX);
    CUDA(cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
}

static void allow_linear(void) {
    allow_all_shared(fast_linear_kernel<1>, fast_steps_bytes(FAST_STEPS));
    allow_all_shared(fast_linear_kernel<2>, fast_steps_bytes(FAST_STEPS));
    allow_all_shared(fast_linear_kernel<MANY_TILES>, fast_steps_bytes(FAST_STEPS));
}

// Blocks of threads that fit on the GPU at the same time.
static int64_t blocks_at_once(int D) { return max64(1, (int64_t)gpu.sharedMemPerBlockOptin / ring_bytes(D)) * gpu.multiProcessorCount; }

// How many teams fit on the GPU at the same time; the memory of their blocks of threads is rounded up.
static int teams_at_once(TeamPlan *plan, int D) {
    SelectedKernel *kernel = selected_kernel_of(D, plan->tile);
    cudaFuncAttributes compiled;
    CUDA(cudaFuncGetAttributes(&compiled, (const void *)kernel));
    const int clusters = gpu.major >= 9 && compiled.ptxVersion >= 90;       // this GPU has them, and the code for it
    if (plan->team > 1 && !clusters) return 0;
    // More than half of a multiprocessor: two blocks would share one while others have none. The rest is the next kernel's.
    const int64_t half = (int64_t)gpu.sharedMemPerMultiprocessor / 2 - (int64_t)compiled.sharedSizeBytes - (int64_t)gpu.reservedSharedMemPerBlock + (int64_t)sizeof(float4);
    plan->bytes = (int)max64(plan->bytes, half);
    if (plan->bytes > (int64_t)gpu.sharedMemPerBlockOptin - (int64_t)compiled.sharedSizeBytes) return 0;
    allow_all_shared(kernel, plan->bytes);
    if (!clusters) return gpu.multiProcessorCount;
    cudaLaunchAttribute attributes[2];
    const cudaLaunchConfig_t config = launch_config(attributes, NULL, dim3(1, (unsigned)plan->team), DECODE_THREADS, plan->bytes, plan->team);
    int at_once = 0;
    CUDA(cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    if (cudaOccupancyMaxActiveClusters(&at_once, (const void *)kernel, &config) != cudaSuccess) at_once = 0, (void)cudaGetLastError();      // none so large
    return at_once;
}

// How large a team is: a power of two.
static TeamPlan choose_team(const DecodeShape *s, int64_t blocks) {
    TeamPlan best = {};
    double least = INFINITY;
    for (int team = 1; team <= MOST_TEAM; team *= 2) {
        TeamPlan plan = plan_team(s, blocks, team);
        const int at_once = teams_at_once(&plan, s->D);
        const double time = at_once > 0 ? time_of_shares((int64_t)s->rows * s->KV, at_once, team, TEAM_COST) : INFINITY;
        if (time < least) least = time, best = plan;
    }
    if (best.team) allow_all_shared(selected_kernel_of(s->D, best.tile), best.bytes);
    return best;
}

// What follows from the shape, the number of texts and the room for them. The fast tier is for a model that training's takes, and that does not choose more blocks
// than a team can offer in its memory.
static void choose_tier(Working *w, const Config *c, int rows, int64_t capacity) {
    device_open();
    const DecodeShape s = shape_of_config(c, 0, rows, 1);
    w->fast = tier_of_model(c) != TIER_SIMPLE;
    w->plan = {};
    if (has_nsa(c)) {
        const int64_t chosen = s.select.n * (int64_t)s.select.sel_block;
        if (w->fast && s.select.n <= CHOICE_GROUPS && chosen < QUOTIENTS && s.G * s.Dv * MOST_TEAM < QUOTIENTS) w->plan = choose_team(&s, most_selection_blocks(c, capacity));
        w->fast = w->plan.team > 0;
    }
    const int64_t together = w->fast ? (int64_t)MMA_ROWS : (int64_t)HEADS, at_once = w->fast ? blocks_at_once(s.D) : 2 * (int64_t)gpu.multiProcessorCount;
    w->splits = choose_splits((int64_t)rows * s.KV * ((s.G + together - 1) / together), at_once);
    if (w->fast && has_nsa(c)) w->splits = full_rounds(w->splits, compressed_seen(capacity - 1, c->cmp_block, c->cmp_stride) + c->window);
    // Of two splits one would have all of the compressed branch, which is by far the longer list
    w->splits = max32(has_nsa(c) ? 3 : 1, w->splits);
}

int64_t decoder_room_bytes(const Config *c, int rows, int64_t tokens) {
    Working none;
    Carver m = {NULL, 0};
    choose_tier(&none, c, rows, tokens);
    carve_working(&none, c, rows, tokens, &m);
    return m.used;
}

void decoder_open(Decoder *d) {
    Model *m = d->model;
    const Config *c = &m->config;
    Working *w = d->work = (Working *)xcalloc(1, sizeof(Working));
    w->free_bytes = w->least_free_bytes = device_memory();
    device_alloc(m, 1, 1, 0, 0);
    device_store(m);
    CUDA(cudaStreamCreate(&w->stream));         // one that waits for the work of the prompt, which has none of its own
    CUDA(cudaMallocHost((void **)&w->input, input_bytes(d)));
    CUDA(cudaMallocHost((void **)&d->logits, (size_t)d->rows * (size_t)c->vocab_size * sizeof(float)));
    const DecodeShape s = decode_shape(d, 0);
    const int64_t numbers = attend_numbers(&s) * (int64_t)sizeof(float);
    const char *wide_heads = "attention with heads this wide", *cpu = "sample, on the CPU";
    if (is_bf16(c)) allow_linear(), allow_shared(attend_kernel<bf16>, numbers, wide_heads, cpu);
    else allow_shared(attend_kernel<float>, numbers, wide_heads, cpu);
    allow_shared(select_kernel, s.G * (int64_t)sizeof(float), "selection for so many heads on a KV head", cpu);
    if (tier_of_model(c) == TIER_SIMPLE) return;
    allow_all_shared(dense_kernel_of(s.D), ring_bytes(s.D));
    allow_all_shared(fast_compress_kernel<0>, fast_steps_bytes(FAST_STEPS));
    allow_all_shared(fast_compress_kernel<1>, fast_steps_bytes(FAST_STEPS));
}

static void drop_graphs(Working *w) {
    for (int i = 0; i < 2; i++) {
        if (w->graph[i]) CUDA(cudaGraphExecDestroy(w->graph[i]));
        w->graph[i] = NULL;
    }
}

void decoder_close(Decoder *d) {
    Working *w = d->work;
    drop_graphs(w);
    CUDA(cudaFree(w->memory));
    CUDA(cudaFreeHost(w->input));
    CUDA(cudaFreeHost(d->logits));
    CUDA(cudaStreamDestroy(w->stream));
    device_free(d->model);
    free(w);
}

static void note_memory(Working *w) { w->least_free_bytes = min64(w->least_free_bytes, device_memory()); }
int64_t peak_memory(const Decoder *d) { return d->work->free_bytes - d->work->least_free_bytes; }

void decoder_room(Decoder *d) {
    const Config *c = &d->model->config;
    Working *w = d->work;
    Carver m = {NULL, 0};
    drop_graphs(w);
    CUDA(cudaFree(w->memory));
    choose_tier(w, c, d->rows, d->capacity);
    carve_working(w, c, d->rows, d->capacity, &m);
    m.memory = (char *)(w->memory = device_malloc(m.used));
    m.used = 0;
    carve_working(w, c, d->rows, d->capacity, &m);
    const int half = c->head_dim / 2;
    double *frequency = (double *)xmalloc((size_t)half * sizeof(double));
    for (int j = 0; j < half; j++) frequency[j] = pow(c->rope_theta, -2.0 * j / c->head_dim);
    to_device(w->frequency, frequency, half * (int64_t)sizeof(double));
    if (has_nsa(c)) CUDA(cudaMemset(w->done, 0, 2 * (size_t)d->rows * (size_t)c->num_key_value_heads * sizeof(int)));
    free(frequency);
    note_memory(w);
}

void *lists_grow(void *old, int64_t lists, int64_t old_slots, int64_t slots, int64_t slot_bytes) {
    void *grown = device_malloc(lists * slots * slot_bytes);
    const size_t bytes = (size_t)(slots * slot_bytes), old_bytes = (size_t)(old_slots * slot_bytes);
    if (old && old_bytes) CUDA(cudaMemcpy2D(grown, bytes, old, old_bytes, old_bytes, (size_t)lists, cudaMemcpyDeviceToDevice));
    CUDA(cudaFree(old));
    return grown;
}

void lists_free(void *lists) { CUDA(cudaFree(lists)); }

// Tokens first .. first + n - 1 of x (T,KV,width), tokens x_row apart, into their slots of every row's lists (rows,KV,slots,width).
template <typename F>
__global__ void fill_kernel(F *lists, int64_t slots, const F *x, int64_t x_row, int64_t first, int64_t n, int64_t rows, int kv, int width) {
    const int64_t item = global_thread(), c = item % width, h = item / width % kv, t = first + item / width / kv % n, r = item / width / kv / n;
    if (r < rows) lists[((r * kv + h) * slots + t % slots) * width + c] = x[t * x_row + h * width + c];
}

// The last `slots` of n tokens.
template <typename F>
static void fill(void *lists, int64_t slots, const F *x, int64_t x_row, int64_t n, int rows, int kv, int width) {
    const int64_t kept = min64(n, slots);
    if (kept == 0) return;
    fill_kernel<<<grid(rows * kv * kept * width, THREADS), THREADS>>>((F *)lists, slots, x, x_row, n - kept, kept, rows, kv, width);
    LAUNCHED();
}

// What the forward pass of a layer over the prompt (T tokens) leaves for later tokens, in every row.
template <typename F>
static void cache_fill(Decoder *d, int layer, int64_t T) {
    const Config *c = &d->model->config;
    const GpuActs<F> *a = &net<F>.acts[layer];
    const WideRow row = gpu_wide_row(c, layer);
    const LayerCache *cache = &d->layers[layer];
    const int rows = d->rows, KV = c->num_key_value_heads, D = c->head_dim, Dv = c->v_head_dim;
    for (int b = 0; b < row.branches; b++) {
        const KeyCache *to = &cache->branch[b];
        const F *k = a->wide + row.k[b], *v = a->wide + row.v[b];
        if (row.branches > 1 && b == CMP) {
            const int64_t blocks = compressed_seen(T - 1, c->cmp_block, c->cmp_stride);
            fill<F>(to->k, to->slots, a->compressed[0], (int64_t)KV * D, blocks, rows, KV, D);
            fill<F>(to->v, to->slots, a->compressed[1], (int64_t)KV * Dv, blocks, rows, KV, Dv);
            fill<F>(cache->tail[0], c->cmp_block, k, row.size, T, rows, 1, KV * D);
            fill<F>(cache->tail[1], c->cmp_block, v, row.size, T, rows, 1, KV * Dv);
        } else {
            fill<F>(to->k, to->slots, k, row.size, T, rows, KV, D);
            fill<F>(to->v, to->slots, v, row.size, T, rows, KV, Dv);
        }
    }
}

template <typename F>
static void prefill_begin_as(Decoder *d, const int *tokens, int64_t T) {
    note_memory(d->work);
    to_device(net<F>.work.tokens, tokens, T * (int64_t)sizeof(int));
    gpu_embed<F>(d->model->twin, 1, T, NULL);
}
void prefill_begin(Decoder *d, const int *tokens, int64_t T) {
    if (is_bf16(&d->model->config)) prefill_begin_as<bf16>(d, tokens, T);
    else prefill_begin_as<float>(d, tokens, T);
}

template <typename F>
static void prefill_layer_as(Decoder *d, int layer, int64_t T) {
    gpu_attention_layer_forward<F>(d->model->twin, layer, 1, T, NULL);
    gpu_ffn_layer_forward<F>(d->model->twin, layer, 1, T, NULL);
    cache_fill<F>(d, layer, T);
}
void prefill_layer(Decoder *d, int layer, int64_t T) {
    if (is_bf16(&d->model->config)) prefill_layer_as<bf16>(d, layer, T);
    else prefill_layer_as<float>(d, layer, T);
}

void prompt_choices(const Decoder *d, int layer, int64_t T, int *block_idx, real *gates) {
    const Config *c = &d->model->config;
    const int *chosen = is_bf16(c) ? net<bf16>.acts[layer].block_idx : net<float>.acts[layer].block_idx;
    const float *gate = is_bf16(c) ? net<bf16>.acts[layer].gates : net<float>.acts[layer].gates;
    to_host(block_idx, chosen, T * c->num_key_value_heads * c->sel_blocks * (int64_t)sizeof(int));
    to_host(gates, gate, T * c->num_attention_heads * BRANCHES * (int64_t)sizeof(float));
}

// The last layer has left the norm of its output for the head.
template <typename F>
static void prompt_logits_as(const Model *g, int64_t first, int64_t n, float *out) {
    const int64_t C = g->config.hidden_size, V = g->config.vocab_size;
    gpu_linear_forward(out, V, net<F>.work.norm + first * C, C, matrix<F>(g, g->head), n, C, V);
}

void prompt_logits(Decoder *d, int64_t first, int64_t n, real *logits) {
    const int64_t count = n * d->model->config.vocab_size;
    float *out = (float *)device_malloc(count * (int64_t)sizeof(float));
    if (is_bf16(&d->model->config)) prompt_logits_as<bf16>(d->model->twin, first, n, out);
    else prompt_logits_as<float>(d->model->twin, first, n, out);
    to_host(logits, out, count * (int64_t)sizeof(float));
    CUDA(cudaFree(out));
}
#endif

// ----------------------------------------------------------------------------
// 4. The decoder. The rest of the program sees a Decoder and four functions:
//   decoder_create, decoder_prefill (the prompt in one pass), decoder_step (one token more), decoder_free.

void decoder_create(Decoder *d, Model *m, int rows) {
    const Config *c = &m->config;
    memset(d, 0, sizeof *d);
    d->model = m;
    d->rows = rows;
    d->layers = (LayerCache *)xcalloc((size_t)c->num_hidden_layers, sizeof(LayerCache));
    decoder_open(d);
    for (int l = 0; l < c->num_hidden_layers; l++)
        for (int i = 0; i < 2 && !layer_is_full(c, l); i++)
            d->layers[l].tail[i] = lists_grow(NULL, rows, 0, c->cmp_block, c->num_key_value_heads * (i ? c->v_head_dim : c->head_dim) * cache_number(c));
}

void decoder_free(Decoder *d) {
    for (int l = 0; l < d->model->config.num_hidden_layers; l++) {
        for (int b = 0; b < BRANCHES; b++) { lists_free(d->layers[l].branch[b].k); lists_free(d->layers[l].branch[b].v); }
        for (int i = 0; i < 2; i++) lists_free(d->layers[l].tail[i]);
    }
    free(d->layers);
    decoder_close(d);
    memset(d, 0, sizeof *d);
}

// Room for `tokens` tokens. A ring that is not as long as the window yet has not wrapped either.
void decoder_reserve(Decoder *d, int64_t tokens) {
    const Config *c = &d->model->config;
    const int64_t lists = (int64_t)d->rows * c->num_key_value_heads;
    if (tokens <= d->capacity) return;
    d->capacity = max64(tokens, d->capacity + d->capacity / 2);
    for (int l = 0; l < c->num_hidden_layers; l++)
        for (int b = 0; b < cache_branches(c, l); b++) {
            KeyCache *cache = &d->layers[l].branch[b];
            const int64_t slots = cache_slots(c, l, b, d->capacity);
            if (cache->k && slots == cache->slots) continue;
            cache->k = lists_grow(cache->k, lists, cache->slots, slots, c->head_dim * cache_number(c));
            cache->v = lists_grow(cache->v, lists, cache->slots, slots, c->v_head_dim * cache_number(c));
            cache->slots = slots;
        }
    decoder_room(d);
}

// The logits of every token of the prompt, some rows at a time: (T,V) may be larger than the model.
int write_logits(Decoder *d, int64_t T, const char *path, char *err) {
    const int64_t V = d->model->config.vocab_size, rows = logit_rows(&d->model->config, T), shape[2] = {T, V};
    StWriter w;
    if (st_writer_begin(&w, path, err) < 0) return -1;
    st_writer_tensor(&w, "logits", ST_F32, 2, shape);
    if (st_writer_header(&w, err) < 0) return -1;
    real *logits = (real *)xmalloc((size_t)(rows * V) * sizeof(real));
    int result = 0;
    for (int64_t i = 0; i < T && !result; i += rows) {
        const int64_t n = min64(rows, T - i);
        prompt_logits(d, i, n, logits);
        result = st_writer_real(&w, logits, n * V, ST_F32, err);
    }
    free(logits);
    return result < 0 ? -1 : st_writer_end(&w, err);
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

int attention_dump_layer(StWriter *w, const Decoder *d, int layer, int64_t T, char *err) {
    const Config *c = &d->model->config;
    const int64_t choices = T * c->num_key_value_heads * c->sel_blocks, gates = T * c->num_attention_heads * BRANCHES;
    if (layer_is_full(c, layer)) return 0;
    int *block_idx = (int *)xmalloc((size_t)choices * sizeof(int));
    real *gate = (real *)xmalloc((size_t)gates * sizeof(real));
    prompt_choices(d, layer, T, block_idx, gate);
    int result = st_writer_data(w, block_idx, choices * (int64_t)sizeof(int), err);
    if (result >= 0) result = st_writer_real(w, gate, gates, ST_F32, err);
    free(block_idx);
    free(gate);
    return result;
}

// Starts every row with the same T tokens, in one pass of the training forward, whose memory is given back before decoding.
// Returns the logits (rows,V) behind the last token. dump_logits and dump_attention: files to write, or NULL.
const real *decoder_prefill(Decoder *d, const int *tokens, int64_t T, const char *dump_logits, const char *dump_attention) {
    Model *m = d->model;
    const Config *c = &m->config;
    const int64_t V = c->vocab_size;
    char err[ERR_LEN];
    StWriter attention;
    d->length = 0;
    decoder_reserve(d, T);
    device_alloc(m, 1, T, 0, 0);
    if (dump_attention && attention_dump_begin(&attention, c, tokens, T, dump_attention, err) < 0) die(1, "%s", err);
    prefill_begin(d, tokens, T);
    for (int l = 0; l < c->num_hidden_layers; l++) {
        prefill_layer(d, l, T);
        if (dump_attention && attention_dump_layer(&attention, d, l, T, err) < 0) die(1, "%s", err);
    }
    if (dump_attention && st_writer_end(&attention, err) < 0) die(1, "%s", err);
    if (dump_logits && write_logits(d, T, dump_logits, err) < 0) die(1, "%s", err);
    prompt_logits(d, T - 1, 1, d->logits);
    for (int r = 1; r < d->rows; r++) memcpy(d->logits + r * V, d->logits, (size_t)V * sizeof(real));
    d->length = T;
    device_alloc(m, d->rows, 1, 0, 0);
    return d->logits;
}

// Appends one token to each row, tokens (rows); returns the logits (rows,V) behind them.
const real *decoder_step(Decoder *d, const int *tokens) {
    decoder_reserve(d, d->length + 1);
    decode_token(d, tokens);
    d->length++;
    return d->logits;
}

// ----------------------------------------------------------------------------
// 5. Drawing a token

typedef struct Candidate { real logit; int id; } Candidate;

// The likelier one; of equals the one with the lower number.
static inline int comes_before(Candidate a, Candidate b) { return a.logit != b.logit ? a.logit > b.logit : a.id < b.id; }

// In a heap whose last one is up, heap[at] sinks below all that it comes before.
static void heap_sink(Candidate *heap, int64_t n, int64_t at) {
    const Candidate x = heap[at];
    for (int64_t child; (child = 2 * at + 1) < n; at = child) {
        if (child + 1 < n && comes_before(heap[child], heap[child + 1])) child++;
        if (comes_before(heap[child], x)) break;
        heap[at] = heap[child];
    }
    heap[at] = x;
}

// The k likeliest tokens, the likeliest first. One pass, with the k best so far in a heap: few of a vocabulary's tokens ever come before its last one.
static void likeliest_tokens(Candidate *best, const real *logits, int V, int64_t k) {
    for (int v = 0; v < k; v++) {
        best[v].logit = logits[v];
        best[v].id = v;
    }
    for (int64_t i = k / 2; i-- > 0;) heap_sink(best, k, i);
    for (int v = (int)k; v < V; v++) {
        if (logits[v] <= best[0].logit) continue;       // an equal one comes behind it, too
        best[0].logit = logits[v];
        best[0].id = v;
        heap_sink(best, k, 0);
    }
    for (int64_t n = k; n-- > 1;) {
        const Candidate last = best[0];
        best[0] = best[n];
        heap_sink(best, n, 0);
        best[n] = last;
    }
}

// What a logit weighs in the softmax, before it is divided by the sum.
static inline double softmax_weight(real logit, real top, double temp) { return exp((double)(logit - top) / temp); }

// Draws from softmax(logits / temp), of which only the top_k likeliest tokens stay (0: all), and of these only the fewest
// that hold top_p of what they weigh together. temp 0 takes the likeliest. heap: memory for V candidates.
int draw_token(const real *logits, int V, double temp, int64_t top_k, double top_p, Rng *rng, Candidate *heap) {
    enum { SORTED_AT_FIRST = 256 };     // of all tokens: more are sorted where these do not hold top_p
    int finite = 1;
    for (int v = 0; v < V; v++) finite &= isfinite(logits[v]) != 0;
    if (!finite) die(1, "the model's logits are not finite: its weights are broken");
    const int64_t k = top_k > 0 && top_k < V ? top_k : V;
    int64_t sorted = temp <= 0 ? 1 : k < V ? k : min64(V, SORTED_AT_FIRST), kept = 0;
    likeliest_tokens(heap, logits, V, sorted);
    const Candidate best = heap[0];
    double total = 0, mass = 0;
    if (temp <= 0) return best.id;
    for (int64_t i = 0; i < k; i++) total += softmax_weight(k < V ? heap[i].logit : logits[i], best.logit, temp);
    if (k == V && top_p >= 1) {         // everything stays: the order does not matter
        double x = rng_uniform(rng) * total;
        for (int v = 0; v < V; v++)
            if ((x -= softmax_weight(logits[v], best.logit, temp)) < 0) return v;
        return best.id;
    }
    for (; kept == 0 || (kept < k && mass < top_p * total); kept++) {
        if (kept == sorted) likeliest_tokens(heap, logits, V, sorted = min64(k, 8 * sorted));
        mass += softmax_weight(heap[kept].logit, best.logit, temp);
    }
    double x = rng_uniform(rng) * mass;
    for (int64_t i = 0; i < kept; i++)
        if ((x -= softmax_weight(heap[i].logit, best.logit, temp)) < 0) return heap[i].id;
    return best.id;
}

// ----------------------------------------------------------------------------
// 6. The command line

typedef struct SampleOptions {
    const char *model, *tokenizer, *prompt, *file, *dump_logits, *dump_attention;
    int interactive, no_echo, stats, help, batch, threads, dtype;
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
#ifdef NSA_CU
    {0, "dtype", OPT_CHOICE, OF_CALL, AT(dtype), "f32|bf16", 0, 0, NULL, "of weights, keys and values: f32 computes what ./sample does, bf16 is faster and takes half the memory"},
#endif
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
// 7. Text in and out

typedef struct Sampler {
    SampleOptions options;
    Config config;
    Tokenizer tokenizer;
    int numbers;                // 1: without a tokenizer, and too many tokens for bytes: text is token numbers
    Model model;
    Decoder decoder;
    int64_t memory;             // what there was for model and caches, in bytes; 0: nobody knows
    Candidate *heap;            // (rows,V)
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
    int64_t bytes[CACHE_KINDS], total = device_bytes(c, 1, prompt, 0, 0, NULL) + decoder_room_bytes(c, s->options.batch, prompt + more);
    cache_bytes(bytes, c, s->options.batch, prompt + more);
    for (int i = 0; i < CACHE_KINDS; i++) total += bytes[i];
    if (s->memory && total > s->memory)
        die(2, "a prompt of %" PRId64 " tokens%s needs %s of memory and the %s has %s: use a shorter prompt%s", prompt, s->options.batch > 1 ? " and this batch" : "",
            human_bytes((double)total), device_name, human_bytes((double)s->memory), s->options.batch > 1 ? " or a smaller -b" : "");
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
        #pragma omp parallel for if (o->batch > 1)
        for (int r = 0; r < o->batch; r++)
            if (!s->ended[r]) s->next[r] = draw_token(logits + (int64_t)r * V, V, o->temp, o->top_k, o->top_p, &s->rng[r], s->heap + (int64_t)r * V);
        for (int r = 0; r < o->batch; r++) {
            if (s->ended[r]) continue;      // its token is computed on, and thrown away
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
    s->config.torch_dtype = o->dtype;       // what is computed in, whatever the file holds: --dtype of samplecu, else f32

    tokenizer = o->tokenizer ? xstrdup(o->tokenizer) : existing(format("%s/tokenizer.json", folder));
    if (!tokenizer) tokenizer_bytes(&s->tokenizer);
    else if (tokenizer_open(&s->tokenizer, tokenizer, err) < 0) die(1, "%s", err);
    if (tokenizer && s->tokenizer.vocab_size > s->config.vocab_size)
        die(1, "%s has %d tokens, the model knows %d: it is not the model's tokenizer", tokenizer, s->tokenizer.vocab_size, s->config.vocab_size);
    s->numbers = !tokenizer && s->config.vocab_size > 256 && !folder_says_bytes(folder);

    const int64_t bytes = count_params(&s->config) * (int64_t)sizeof(real), machine = total_memory_bytes();
    if (machine && bytes > machine) die(2, "the model in %s needs %s of memory and the machine has %s", folder, human_bytes((double)bytes), human_bytes((double)machine));
    s->memory = device_memory();
    if (s->memory && bytes > s->memory) die(2, "the model in %s needs %s of memory and the %s has %s", folder, human_bytes((double)bytes), device_name, human_bytes((double)s->memory));
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
    s->heap = (Candidate *)xmalloc(rows * (size_t)s->config.vocab_size * sizeof(Candidate));
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
    cache_bytes(bytes, &s->config, rows, d->capacity);
    for (int i = 0; i < CACHE_KINDS; i++) total += bytes[i];
    fprintf(stderr, "prefill    %" PRId64 " tokens in %.1f ms: %s tok/s\n", s->prefilled, 1e3 * s->prefill_seconds,
            human_count((double)s->prefilled / s->prefill_seconds));
    if (s->steps)
        fprintf(stderr, "decode     %" PRId64 " tokens in %.1f ms: %s tok/s, %.3f ms a token\n", s->steps * rows, 1e3 * s->decode_seconds,
                human_count((double)(s->steps * rows) / s->decode_seconds), 1e3 * s->decode_seconds / (double)s->steps);
    fprintf(stderr, "cache      %s for %" PRId64 " tokens, %" PRId64 " used: ", human_bytes((double)total), d->capacity, d->length);
    fprintf(stderr, "window %s, selected %s, compressed %s, full %s\n", human_bytes((double)bytes[WIN]), human_bytes((double)bytes[SLC]),
            human_bytes((double)bytes[CMP]), human_bytes((double)bytes[CACHE_FULL]));
    fprintf(stderr, "%-10s %s at the peak, weights %s\n", memory_name, human_bytes((double)peak_memory(&s->decoder)), human_bytes((double)(s->model.num_elements * (int64_t)sizeof(real))));
    fprintf(stderr, "seed       %" PRId64 "\n", s->options.seed);
}

#ifndef SAMPLE_NO_MAIN
int main(int argc, char **argv) {
    Sampler s;
    SampleOptions *o = &s.options;
    start_process(argv);
    memset(&s, 0, sizeof s);
#ifdef NSA_CU
    program_name = "samplecu";
#else
    program_name = "sample";
#endif
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
