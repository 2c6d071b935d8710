/*
nsa.c on the GPU: the same program as train_nsa.c, with the same options, files and log, computed by CUDA.

train_nsa.c is included whole: configuration, data, tokenizer, checkpoints, schedule, log, the training loop, and the CPU
model that test/test_nsa.cu checks this one against. What is added here is one twin for each computation:

    1. utilities       errors, memory, sums, matrix products (cuBLAS)
    2. layers          each one a forward and a backward kernel; shapes and formulas stand above their twins in train_nsa.c
    3. model           memory, forward, backward, AdamW: the device_* functions that the training loop calls

The kernels of this file are the simple tier: any shape, f32, no atomics, so that the same seed gives the same bits.

SPDX-License-Identifier: MIT
*/

#define NSA_GPU
#ifdef NSA_CU_NO_MAIN
#define NSA_NO_MAIN
#endif
#include "train_nsa.c"

#include <cublas_v2.h>
#include <cuda_runtime.h>

// ----------------------------------------------------------------------------
// 1. Utilities

#define CUDA(call) cuda_check((call), #call, __FILE__, __LINE__)
#define CUBLAS(call) cublas_check((call), #call, __FILE__, __LINE__)

static void cuda_check(cudaError_t status, const char *call, const char *file, int line) {
    if (status != cudaSuccess) die(1, "%s:%d: %s: %s", file, line, call, cudaGetErrorString(status));
}

static void cublas_check(cublasStatus_t status, const char *call, const char *file, int line) {
    if (status != CUBLAS_STATUS_SUCCESS) die(1, "%s:%d: %s: %s", file, line, call, cublasGetStatusString(status));
}

static cublasHandle_t cublas;
static cudaDeviceProp gpu;      // all zero until device_open

// The first GPU that the system shows (CUDA_VISIBLE_DEVICES chooses). Called before anything else of CUDA.
static void device_open(void) {
    if (gpu.major) return;
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess || count == 0)
        die(1, "no GPU to compute on (%s): train_nsa and sample are the same programs for the CPU", status != cudaSuccess ? cudaGetErrorString(status) : "none is visible");
    CUDA(cudaSetDevice(0));
    CUDA(cudaGetDeviceProperties(&gpu, 0));
    CUBLAS(cublasCreate(&cublas));
}

int64_t device_memory(void) {
    size_t free_bytes = 0, total = 0;
    device_open();
    CUDA(cudaMemGetInfo(&free_bytes, &total));
    return (int64_t)free_bytes;
}

void device_describe(Text *out) { text_add(out, "%s (sm_%d%d), f32", gpu.name, gpu.major, gpu.minor); }

static void *device_malloc(int64_t bytes) {
    void *p = NULL;
    CUDA(cudaMalloc(&p, (size_t)max64(bytes, 1)));
    CUDA(cudaMemset(p, 0, (size_t)max64(bytes, 1)));
    return p;
}
static void to_device(void *device, const void *host, int64_t bytes) { CUDA(cudaMemcpy(device, host, (size_t)bytes, cudaMemcpyHostToDevice)); }
static void to_host(void *host, const void *device, int64_t bytes) { CUDA(cudaMemcpy(host, device, (size_t)bytes, cudaMemcpyDeviceToHost)); }
static void device_zero(void *p, int64_t bytes) { if (bytes > 0) CUDA(cudaMemsetAsync(p, 0, (size_t)bytes)); }
static void device_copy(void *to, const void *from, int64_t bytes) { CUDA(cudaMemcpyAsync(to, from, (size_t)bytes, cudaMemcpyDeviceToDevice)); }

// Kernels of one thread an item take grid(items, THREADS) blocks, those of one warp an item grid(items, WARPS).
enum { THREADS = 256, WARP = 32, WARPS = THREADS / WARP };
static unsigned grid(int64_t items, int64_t per_block) {
    const int64_t blocks = (items + per_block - 1) / per_block;
    if (blocks > INT_MAX) die(1, "internal error: a kernel of %" PRId64 " blocks", blocks);
    return (unsigned)blocks;
}
static void launched(const char *file, int line) { cuda_check(cudaGetLastError(), "kernel", file, line); }
#define LAUNCHED() launched(__FILE__, __LINE__)

__device__ static inline int64_t global_thread(void) { return (int64_t)blockIdx.x * blockDim.x + threadIdx.x; }
__device__ static inline int64_t global_warp(void) { return global_thread() / WARP; }
__device__ static inline int lane(void) { return (int)(threadIdx.x % WARP); }

__device__ static inline float warp_sum(float x) {
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}
__device__ static inline float warp_max(float x) {
    for (int step = WARP / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

// c (m,n) = or += op(a) (m,k) · op(b) (k,n), row-major, `batch` times with strides; op turns a matrix on its side.
// cuBLAS counts columns first: a row-major matrix is its own transpose there, hence b before a.
static void gemm(int64_t m, int64_t n, int64_t k, const float *a, int64_t lda, int turn_a, const float *b, int64_t ldb, int turn_b,
                 float *c, int64_t ldc, int accumulate, int64_t batch = 1, int64_t stride_a = 0, int64_t stride_b = 0, int64_t stride_c = 0) {
    if (m == 0 || n == 0 || k == 0 || batch == 0) return;
    const float one = 1, beta = accumulate ? 1.0f : 0.0f;
    CUBLAS(cublasSgemmStridedBatched(cublas, turn_b ? CUBLAS_OP_T : CUBLAS_OP_N, turn_a ? CUBLAS_OP_T : CUBLAS_OP_N, (int)n, (int)m, (int)k,
                                     &one, b, (int)ldb, stride_b, a, (int)lda, stride_a, &beta, c, (int)ldc, stride_c, (int)batch));
}

// out (N,OC) = inp (N,C) · weight (OC,C)ᵀ
static void gpu_linear_forward(float *out, int64_t out_row, const float *inp, int64_t inp_row, const float *weight, int64_t n, int64_t c, int64_t oc) {
    gemm(n, oc, c, inp, inp_row, 0, weight, c, 1, out, out_row, 0);
}

// dinp (N,C) = or += dout (N,OC) · weight; dweight (OC,C) += doutᵀ · inp. dinp may be NULL.
static void gpu_linear_backward(float *dinp, int64_t dinp_row, float *dweight, const float *dout, int64_t dout_row, const float *inp, int64_t inp_row,
                                const float *weight, int64_t n, int64_t c, int64_t oc, int accumulate_dinp) {
    if (dinp) gemm(n, c, oc, dout, dout_row, 0, weight, c, 0, dinp, dinp_row, accumulate_dinp);
    gemm(oc, c, n, dout, dout_row, 1, inp, inp_row, 0, dweight, c, 1);
}

// Sums down the columns of something that is a matrix (rows,cols) of `value(row, col)`: gradients of biases, norms, gates.
// Rows are cut into at most SUM_PARTS parts of fixed size and the parts are added in order: no atomics, the same bits always.
enum { SUM_PARTS = 64, SUM_ROWS = 8 };

template <typename Value>
__global__ void column_parts_kernel(float *parts, int64_t rows, int64_t cols, int64_t part_rows, Value value) {
    __shared__ float sums[SUM_ROWS][WARP];
    const int64_t col = (int64_t)blockIdx.x * WARP + threadIdx.x, from = blockIdx.y * part_rows;
    float sum = 0;
    if (col < cols)
        for (int64_t row = from + threadIdx.y; row < min64(from + part_rows, rows); row += SUM_ROWS) sum += value(row, col);
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || col >= cols) return;
    for (int i = 1; i < SUM_ROWS; i++) sum += sums[i][threadIdx.x];
    parts[blockIdx.y * cols + col] = sum;
}

__global__ void add_parts_kernel(float *out, const float *parts, int64_t count, int64_t cols) {
    const int64_t col = global_thread();
    if (col >= cols) return;
    double sum = 0;
    for (int64_t i = 0; i < count; i++) sum += (double)parts[i * cols + col];
    out[col] += (float)sum;
}

// out (cols) += Σ_rows value(row, col); parts: SUM_PARTS · cols numbers.
template <typename Value>
static void column_sums(float *out, int64_t rows, int64_t cols, Value value, float *parts) {
    if (rows == 0 || cols == 0) return;
    const int64_t part_rows = max64((rows + SUM_PARTS - 1) / SUM_PARTS, SUM_ROWS), count = (rows + part_rows - 1) / part_rows;
    column_parts_kernel<<<dim3(grid(cols, WARP), (unsigned)count), dim3(WARP, SUM_ROWS)>>>(parts, rows, cols, part_rows, value);
    LAUNCHED();
    add_parts_kernel<<<grid(cols, THREADS), THREADS>>>(out, parts, count, cols);
    LAUNCHED();
}

// A matrix as it lies in memory.
struct Plain {
    const float *x;
    int64_t row_size;
    __device__ float operator()(int64_t row, int64_t col) const { return x[row * row_size + col]; }
};

// ----------------------------------------------------------------------------
// 2. Layers

// ----------------------------------------------------------------------------
// Embedding, dropout, residual addition

__global__ void embed_kernel(float *out, const int *tokens, const float *embed, int64_t n, int64_t c) {
    const int64_t i = global_thread();
    if (i < n * c) out[i] = embed[tokens[i / c] * c + i % c];
}

// What dropout does at one site; p = 0: nothing.
typedef struct Dropout { double p; uint64_t seed; int64_t step, first; int site; } Dropout;

static Dropout dropout_at(const Config *c, int64_t T, int site, const StepInfo *info) {
    Dropout d = {0, 0, 0, 0, site};
    if (info) d.p = info->dropout, d.seed = info->seed, d.step = info->step, d.first = info->first_sequence * T * c->hidden_size;
    return d;
}

// out = x + dropout(y), elementwise; x may be NULL, out may be x or y.
__global__ void dropout_add_kernel(float *out, const float *x, const float *y, int64_t n, Dropout d) {
    const int64_t i = global_thread();
    if (i >= n) return;
    float keep = 1;
    if (d.p > 0) {
        uint32_t word[4];
        const int64_t e = d.first + i;
        dropout_words(word, e / 4, d.seed, d.step, d.site);
        keep = word[e % 4] < dropout_limit(d.p) ? 0 : (float)(1 / (1 - d.p));
    }
    out[i] = (x ? x[i] : 0) + y[i] * keep;
}

static void dropout_add(float *out, const float *x, const float *y, int64_t n, Dropout d) {
    dropout_add_kernel<<<grid(n, THREADS), THREADS>>>(out, x, y, n, d);
    LAUNCHED();
}

// dembed (V,C) += the rows of dx (N,C) of each token, in the order of the text: `places` (N) sorted by token, token i of those
// that occur at places[start[i]] .. places[start[i+1]].
__global__ void embed_backward_kernel(float *dembed, const float *dx, const int *occurring, const int *start, const int *places, int64_t c) {
    const int64_t token = occurring[blockIdx.x];
    for (int64_t j = threadIdx.x; j < c; j += blockDim.x) {
        float sum = 0;
        for (int i = start[blockIdx.x]; i < start[blockIdx.x + 1]; i++) sum += dx[places[i] * c + j];
        dembed[token * c + j] += sum;
    }
}

// ----------------------------------------------------------------------------
// RMSNorm, a warp a row

__global__ void rmsnorm_forward_kernel(float *out, float *rstd, const float *inp, const float *weight, int64_t n, int64_t c, double eps) {
    const int64_t i = global_warp();
    if (i >= n) return;
    const float *x = inp + i * c;
    float sum = 0;
    for (int64_t j = lane(); j < c; j += WARP) sum += x[j] * x[j];
    const float s = (float)(1 / sqrt((double)warp_sum(sum) / (double)c + eps));
    for (int64_t j = lane(); j < c; j += WARP) out[i * c + j] = x[j] * s * weight[j];
    if (lane() == 0) rstd[i] = s;
}

static void gpu_rmsnorm_forward(float *out, float *rstd, const float *inp, const float *weight, int64_t n, int64_t c, double eps) {
    rmsnorm_forward_kernel<<<grid(n, WARPS), THREADS>>>(out, rstd, inp, weight, n, c, eps);
    LAUNCHED();
}

__global__ void rmsnorm_again_kernel(float *out, const float *rstd, const float *inp, const float *weight, int64_t n, int64_t c) {
    const int64_t i = global_thread();
    if (i < n * c) out[i] = inp[i] * rstd[i / c] * weight[i % c];
}

static void gpu_rmsnorm_again(float *out, const float *rstd, const float *inp, const float *weight, int64_t n, int64_t c) {
    rmsnorm_again_kernel<<<grid(n * c, THREADS), THREADS>>>(out, rstd, inp, weight, n, c);
    LAUNCHED();
}

__global__ void rmsnorm_dinp_kernel(float *dinp, const float *dout, const float *inp, const float *rstd, const float *weight, int64_t n, int64_t c) {
    const int64_t i = global_warp();
    if (i >= n) return;
    const float *x = inp + i * c, *dy = dout + i * c, s = rstd[i];
    float sum = 0;
    for (int64_t j = lane(); j < c; j += WARP) sum += dy[j] * weight[j] * x[j];
    const float mean = warp_sum(sum) * s * s / (float)c;
    for (int64_t j = lane(); j < c; j += WARP) dinp[i * c + j] += s * (dy[j] * weight[j] - x[j] * mean);
}

struct NormWeightGradient {
    const float *dout, *inp, *rstd;
    int64_t c;
    __device__ float operator()(int64_t row, int64_t col) const { return dout[row * c + col] * inp[row * c + col] * rstd[row]; }
};

static void gpu_rmsnorm_backward(float *dinp, float *dweight, const float *dout, const float *inp, const float *rstd, const float *weight,
                                 int64_t n, int64_t c, float *parts) {
    rmsnorm_dinp_kernel<<<grid(n, WARPS), THREADS>>>(dinp, dout, inp, rstd, weight, n, c);
    LAUNCHED();
    const NormWeightGradient value = {dout, inp, rstd, c};
    column_sums(dweight, n, c, value, parts);
}

// ----------------------------------------------------------------------------
// RoPE, a thread a pair

__global__ void rope_kernel(float *x, int64_t x_row, const float *table, int64_t n, int64_t period, int64_t step, int heads, int d, float turn) {
    const int64_t item = global_thread(), half = d / 2;
    if (item >= n * heads * half) return;
    const int64_t j = item % half, h = item / half % heads, i = item / half / heads;
    const float *angles = table + (i % period) * step * d;
    float *a = x + i * x_row + h * d + j, *b = a + half;
    const float aj = *a, bj = *b, cosine = angles[j], sine = turn * angles[half + j];
    *a = aj * cosine - bj * sine;
    *b = bj * cosine + aj * sine;
}

static void gpu_rope(float *x, int64_t x_row, const float *table, int64_t n, int64_t period, int64_t step, int heads, int d, int turn) {
    if (n == 0) return;
    rope_kernel<<<grid(n * heads * (d / 2), THREADS), THREADS>>>(x, x_row, table, n, period, step, heads, d, (float)turn);
    LAUNCHED();
}

// ----------------------------------------------------------------------------
// Attention, one kernel for all masks. A warp takes one query and head. Its lanes are 32 keys while scores are made, and the
// channels of the value while these are summed: no score is kept but the 32 of the moment.

enum { ATTENTION_WARPS = 4 };

// Lanes that each walk down a row of their own would fetch 32 lines of memory for 32 numbers: rows come through a tile in shared
// memory, (32, width) with an odd row size, so that neither its filling nor its reading meets a bank twice.
DEVICE static inline int tile_row(int width) { return width | 1; }
DEVICE static inline int tile_size(int width) { return WARP * tile_row(width); }

// Rows i < count of the tile from x + i·x_row.
__device__ static inline void fill_tile(float *tile, const float *x, int64_t x_row, int count, int width) {
    for (int i = 0; i < count; i++)
        for (int c = lane(); c < width; c += WARP) tile[i * tile_row(width) + c] = x[i * x_row + c];
}

// The i-th stretch [lo, hi) of keys that query t sees: one, or one for each selected block. Returns 0 behind the last.
__device__ static inline int key_stretch(const Mask *mask, const int *idx, int i, int64_t t, int64_t *lo, int64_t *hi) {
    if (mask->kind != MASK_SELECTED) {
        key_range(mask, t, lo, hi);
        return i == 0;
    }
    if (i >= mask->n || idx[i] < 0) return 0;
    *lo = (int64_t)idx[i] * mask->sel_block;
    *hi = min64(*lo + mask->sel_block, t + 1);
    return 1;
}

// Rows of work: the heads that share keys lie together, then neighbouring queries.
typedef struct QueryRow { int64_t b, t, h, kv, bt, th; } QueryRow;
__device__ static inline QueryRow query_row(int64_t row, const AttentionShape *s) {
    const int64_t G = s->H / s->KV;
    QueryRow r;
    r.t = row / G % s->T;
    r.kv = row / G / s->T % s->KV;
    r.b = row / G / s->T / s->KV;
    r.h = r.kv * G + row % G;
    r.bt = r.b * s->T + r.t;
    r.th = r.bt * s->H + r.h;
    return r;
}

// Numbers of shared memory that a warp of each kernel takes.
DEVICE static inline int forward_numbers(const AttentionShape *s) { return s->D + s->Dv + WARP + tile_size(s->D); }
DEVICE static inline int dq_numbers(const AttentionShape *s) { return 2 * s->D + s->Dv + WARP + tile_size(s->D) + tile_size(s->Dv); }
DEVICE static inline int dkv_numbers(const AttentionShape *s) { return 2 * s->D + 2 * s->Dv + 2 * WARP + tile_size(s->D) + tile_size(s->Dv); }

__global__ void attention_forward_kernel(float *out, float *lse, const float *q, const float *k, const float *v, Mask mask, AttentionShape s) {
    extern __shared__ float shared[];
    const int64_t row = global_warp();
    if (row >= s.B * s.T * s.H) return;
    const QueryRow r = query_row(row, &s);
    float *qs = shared + (threadIdx.x / WARP) * forward_numbers(&s), *o = qs + s.D, *p = o + s.Dv, *keys = p + WARP;
    const float scale = 1 / (float)sqrt((double)s.D);
    for (int c = lane(); c < s.D; c += WARP) qs[c] = q[r.bt * s.q_row + r.h * s.D + c] * scale;
    for (int c = lane(); c < s.Dv; c += WARP) o[c] = 0;
    __syncwarp();
    float top = -INFINITY, sum = 0;
    const int *idx = mask.block_idx + (r.bt * s.KV + r.kv) * mask.n;
    int64_t lo, hi;
    for (int i = 0; key_stretch(&mask, idx, i, r.t, &lo, &hi); i++)
        for (int64_t k0 = lo; k0 < hi; k0 += WARP) {
            const int count = (int)min64(WARP, hi - k0);
            fill_tile(keys, k + (r.b * s.Tk + k0) * s.k_row + r.kv * s.D, s.k_row, count, s.D);
            __syncwarp();
            float x = -INFINITY;
            if (lane() < count) {
                const float *key = keys + lane() * tile_row(s.D);
                x = 0;
                for (int c = 0; c < s.D; c++) x += qs[c] * key[c];
            }
            const float higher = fmaxf(top, warp_max(x)), shrink = expf(top - higher), weight = lane() < count ? expf(x - higher) : 0;
            p[lane()] = weight;
            sum = sum * shrink + warp_sum(weight);
            top = higher;
            __syncwarp();
            const float *values = v + (r.b * s.Tk + k0) * s.v_row + r.kv * s.Dv;
            for (int c = lane(); c < s.Dv; c += WARP) {
                float a = o[c] * shrink;
                for (int j = 0; j < count; j++) a += p[j] * values[j * s.v_row + c];
                o[c] = a;
            }
            __syncwarp();
        }
    const float inverse = sum > 0 ? 1 / sum : sum;      // a NaN stays one
    for (int c = lane(); c < s.Dv; c += WARP) out[r.th * s.Dv + c] = o[c] * inverse;
    if (lane() == 0) lse[r.th] = sum == 0 ? -INFINITY : top + logf(sum);
}

// dq += through the scores; delta (B,T,H) = <gate·dout, out>, which the kernel of dk and dv needs again.
__global__ void attention_dq_kernel(float *dq, float *delta, const float *dout, const float *gate, const float *out, const float *lse,
                                    const float *q, const float *k, const float *v, Mask mask, AttentionShape s) {
    extern __shared__ float shared[];
    const int64_t row = global_warp();
    if (row >= s.B * s.T * s.H) return;
    const QueryRow r = query_row(row, &s);
    float *qs = shared + (threadIdx.x / WARP) * dq_numbers(&s), *dqs = qs + s.D, *dos = dqs + s.D, *ds = dos + s.Dv;
    float *keys = ds + WARP, *values = keys + tile_size(s.D);
    const float scale = 1 / (float)sqrt((double)s.D), g = gate ? gate[r.th * BRANCHES] : 1, l = lse[r.th];
    for (int c = lane(); c < s.D; c += WARP) qs[c] = q[r.bt * s.q_row + r.h * s.D + c] * scale, dqs[c] = 0;
    for (int c = lane(); c < s.Dv; c += WARP) dos[c] = dout[r.th * s.Dv + c] * g;
    __syncwarp();
    // Summed in the order of dP below and in the next kernel, so that a query with a single key gets exactly no gradient.
    float d = 0;
    for (int c = 0; c < s.Dv; c++) d += dos[c] * out[r.th * s.Dv + c];
    if (lane() == 0) delta[r.th] = d;
    const int *idx = mask.block_idx + (r.bt * s.KV + r.kv) * mask.n;
    int64_t lo, hi;
    for (int i = 0; key_stretch(&mask, idx, i, r.t, &lo, &hi); i++)
        for (int64_t k0 = lo; k0 < hi; k0 += WARP) {
            const int count = (int)min64(WARP, hi - k0);
            const int64_t at = r.b * s.Tk + k0;
            fill_tile(keys, k + at * s.k_row + r.kv * s.D, s.k_row, count, s.D);
            fill_tile(values, v + at * s.v_row + r.kv * s.Dv, s.v_row, count, s.Dv);
            __syncwarp();
            float x = 0, dp = 0;
            if (lane() < count) {
                const float *key = keys + lane() * tile_row(s.D), *value = values + lane() * tile_row(s.Dv);
                for (int c = 0; c < s.D; c++) x += qs[c] * key[c];
                for (int c = 0; c < s.Dv; c++) dp += dos[c] * value[c];
            }
            ds[lane()] = lane() < count ? expf(x - l) * (dp - d) * scale : 0;
            __syncwarp();
            for (int c = lane(); c < s.D; c += WARP) {
                float a = dqs[c];
                for (int j = 0; j < count; j++) a += ds[j] * keys[j * tile_row(s.D) + c];
                dqs[c] = a;
            }
            __syncwarp();
        }
    for (int c = lane(); c < s.D; c += WARP) dq[r.bt * s.q_row + r.h * s.D + c] += dqs[c];
}

// Lists sorted by key: item x belongs to list `key(x, m)` for one of its M slots (a slot of -1: none). For selection the
// items are queries and the lists blocks, for a mixture of experts tokens and experts. One warp counts or writes one list.
__global__ void lists_count_kernel(int64_t *count, const int *keys, int64_t groups, int64_t items, int64_t slots, int64_t item_row, int64_t group_row,
                                   int64_t inner, int64_t inner_row, int64_t lists) {
    const int64_t list = global_warp();
    if (list >= groups * inner * lists) return;
    const int64_t key = list % lists, in = list / lists % inner, group = list / lists / inner;
    const int *base = keys + group * group_row + in * inner_row;
    int64_t n = 0;
    for (int64_t x0 = 0; x0 < items; x0 += WARP) {
        int found = 0;
        if (x0 + lane() < items)
            for (int64_t m = 0; m < slots; m++) found |= base[(x0 + lane()) * item_row + m] == key;
        n += __popc(__ballot_sync(~0u, found));
    }
    if (lane() == 0) count[list] = n;
}

// start (lists + 1) = the sums of count before each list, for each group anew from group·group_items on.
__global__ void lists_start_kernel(int64_t *start, const int64_t *count, int64_t lists, int64_t group_items) {
    int64_t sum = blockIdx.x * group_items;
    for (int64_t i = 0; i < lists; i++) {
        start[blockIdx.x * (lists + 1) + i] = sum;
        sum += count[blockIdx.x * lists + i];
    }
    start[blockIdx.x * (lists + 1) + lists] = sum;
}

// Writes the items (with `slotted`, item·slots + slot) of each list in ascending order.
__global__ void lists_fill_kernel(int *out, const int64_t *start, const int *keys, int64_t groups, int64_t items, int64_t slots, int64_t item_row,
                                  int64_t group_row, int64_t inner, int64_t inner_row, int64_t lists, int slotted) {
    const int64_t list = global_warp();
    if (list >= groups * inner * lists) return;
    const int64_t key = list % lists, in = list / lists % inner, group = list / lists / inner;
    const int *base = keys + group * group_row + in * inner_row;
    int64_t to = start[(list / lists) * (lists + 1) + key];
    for (int64_t x0 = 0; x0 < items; x0 += WARP) {
        int slot = -1;
        if (x0 + lane() < items)
            for (int64_t m = 0; m < slots; m++)
                if (base[(x0 + lane()) * item_row + m] == key) slot = (int)m;
        const unsigned found = __ballot_sync(~0u, slot >= 0);
        if (slot >= 0) out[to + __popc(found & ((1u << lane()) - 1))] = (int)(slotted ? (x0 + lane()) * slots + slot : x0 + lane());
        to += __popc(found);
    }
}

// Which queries took which block: for each (b, kv), `queries` sorted by block from start[(b·KV + kv)·(blocks + 1) + j] on.
typedef struct Takers { int64_t *count, *start; int *queries; int64_t blocks; } Takers;

static void find_takers(const Takers *takers, const int *block_idx, int64_t n, const AttentionShape *s) {
    const int64_t lists = s->B * s->KV * takers->blocks, row = s->KV * n;
    lists_count_kernel<<<grid(lists, WARPS), THREADS>>>(takers->count, block_idx, s->B, s->T, n, row, s->T * row, s->KV, n, takers->blocks);
    LAUNCHED();
    lists_start_kernel<<<(unsigned)(s->B * s->KV), 1>>>(takers->start, takers->count, takers->blocks, s->T * n);
    LAUNCHED();
    lists_fill_kernel<<<grid(lists, WARPS), THREADS>>>(takers->queries, takers->start, block_idx, s->B, s->T, n, row, s->T * row, s->KV, n, takers->blocks, 0);
    LAUNCHED();
}

// dk, dv +=: a warp takes one key of one KV head and meets the (query, head) rows that see it, 32 at a time.
__global__ void attention_dkv_kernel(float *dk, float *dv, const float *dout, const float *gate, const float *delta, const float *lse,
                                     const float *q, const float *k, const float *v, Mask mask, AttentionShape s, Takers takers) {
    extern __shared__ float shared[];
    const int64_t item = global_warp(), G = s.H / s.KV;
    if (item >= s.B * s.KV * s.Tk) return;
    const int64_t key = item % s.Tk, kv = item / s.Tk % s.KV, b = item / s.Tk / s.KV;
    float *ks = shared + (threadIdx.x / WARP) * dkv_numbers(&s), *vs = ks + s.D, *dks = vs + s.Dv, *dvs = dks + s.D;
    float *p = dvs + s.Dv, *ds = p + WARP, *queries = ds + WARP, *douts = queries + tile_size(s.D);
    const int64_t at = b * s.Tk + key;
    for (int c = lane(); c < s.D; c += WARP) ks[c] = k[at * s.k_row + kv * s.D + c], dks[c] = 0;
    for (int c = lane(); c < s.Dv; c += WARP) vs[c] = v[at * s.v_row + kv * s.Dv + c], dvs[c] = 0;
    __syncwarp();
    const float scale = 1 / (float)sqrt((double)s.D);
    int64_t from = key, to = s.T;       // the queries: a range, or for selection places in the list of takers
    const int *list = NULL;
    if (mask.kind == MASK_WINDOW) to = min64(s.T, key + mask.window);
    if (mask.kind == MASK_COMPRESSED) from = key * mask.stride + mask.block - 1;
    if (mask.kind == MASK_SELECTED) {
        const int64_t *start = takers.start + (b * s.KV + kv) * (takers.blocks + 1) + key / mask.sel_block;
        list = takers.queries;
        from = start[0];
        to = start[1];
    }
    for (int64_t x0 = 0; x0 < (to - from) * G; x0 += WARP) {
        const int count = (int)min64(WARP, (to - from) * G - x0);
        for (int i = 0; i < count; i++) {       // row x is query x / G of the range or list, head x % G of the group
            const int64_t x = x0 + i, bt = b * s.T + (list ? list[from + x / G] : from + x / G), h = kv * G + x % G;
            for (int c = lane(); c < s.D; c += WARP) queries[i * tile_row(s.D) + c] = q[bt * s.q_row + h * s.D + c];
            for (int c = lane(); c < s.Dv; c += WARP) douts[i * tile_row(s.Dv) + c] = dout[(bt * s.H + h) * s.Dv + c];
        }
        __syncwarp();
        const int64_t x = x0 + lane();
        float weight = 0, slope = 0;
        if (lane() < count) {
            const int64_t t = list ? list[from + x / G] : from + x / G, th = (b * s.T + t) * s.H + kv * G + x % G;
            if (t >= key || mask.kind == MASK_COMPRESSED) {
                const float *query = queries + lane() * tile_row(s.D), *d = douts + lane() * tile_row(s.Dv), g = gate ? gate[th * BRANCHES] : 1;
                float score = 0, dp = 0;
                for (int c = 0; c < s.D; c++) score += ks[c] * query[c];
                for (int c = 0; c < s.Dv; c++) dp += vs[c] * (d[c] * g);
                const float probability = expf(score * scale - lse[th]);
                weight = probability * g;
                slope = probability * (dp - delta[th]) * scale;
            }
        }
        p[lane()] = weight;
        ds[lane()] = slope;
        __syncwarp();
        for (int c = lane(); c < s.D; c += WARP) {
            float a = dks[c];
            for (int j = 0; j < count; j++) a += ds[j] * queries[j * tile_row(s.D) + c];
            dks[c] = a;
        }
        for (int c = lane(); c < s.Dv; c += WARP) {
            float a = dvs[c];
            for (int j = 0; j < count; j++) a += p[j] * douts[j * tile_row(s.Dv) + c];
            dvs[c] = a;
        }
        __syncwarp();
    }
    for (int c = lane(); c < s.D; c += WARP) dk[at * s.k_row + kv * s.D + c] += dks[c];
    for (int c = lane(); c < s.Dv; c += WARP) dv[at * s.v_row + kv * s.Dv + c] += dvs[c];
}

// Warps of a block whose shared memory (`numbers` a warp) fits; tells the kernel how much it may take.
template <typename Kernel>
static int warps_that_fit(Kernel kernel, int64_t numbers, const char *what) {
    int warps = ATTENTION_WARPS;
    const int64_t bytes = numbers * (int64_t)sizeof(float), most = (int64_t)gpu.sharedMemPerBlockOptin;
    while (warps > 1 && warps * bytes > most) warps /= 2;
    if (bytes > most) die(2, "%s needs %" PRId64 " bytes of a GPU block's memory and this GPU has %" PRId64 ": use a smaller --head-dim or --v-head-dim", what, bytes, most);
    CUDA(cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)(warps * bytes)));
    return warps;
}

static void gpu_attention_forward(float *out, float *lse, const float *q, const float *k, const float *v, const Mask *mask, const AttentionShape *s) {
    const int64_t numbers = forward_numbers(s);
    const int warps = warps_that_fit(attention_forward_kernel, numbers, "attention");
    attention_forward_kernel<<<grid(s->B * s->T * s->H, warps), warps * WARP, (size_t)(warps * numbers) * sizeof(float)>>>(out, lse, q, k, v, *mask, *s);
    LAUNCHED();
}

static void gpu_attention_backward(float *dq, float *dk, float *dv, const float *dout, const float *gate, const float *out, const float *lse,
                                   const float *q, const float *k, const float *v, const Mask *mask, const AttentionShape *s, float *delta,
                                   const Takers *takers) {
    int64_t numbers = dq_numbers(s);
    int warps = warps_that_fit(attention_dq_kernel, numbers, "attention");
    attention_dq_kernel<<<grid(s->B * s->T * s->H, warps), warps * WARP, (size_t)(warps * numbers) * sizeof(float)>>>(dq, delta, dout, gate, out, lse, q, k, v, *mask, *s);
    LAUNCHED();
    if (s->Tk == 0) return;
    if (mask->kind == MASK_SELECTED) find_takers(takers, mask->block_idx, mask->n, s);
    numbers = dkv_numbers(s);
    warps = warps_that_fit(attention_dkv_kernel, numbers, "attention");
    attention_dkv_kernel<<<grid(s->B * s->KV * s->Tk, warps), warps * WARP, (size_t)(warps * numbers) * sizeof(float)>>>(
        dk, dv, dout, gate, delta, lse, q, k, v, *mask, *s, *takers);
    LAUNCHED();
}

// ----------------------------------------------------------------------------
// Compression. Blocks become rows of one matrix for each set of weights: (sets, rows, l·D), row r a block and a head.

// Where a block of a set lies: in x its first token, in the result its row.
typedef struct Place { int64_t x, out; } Place;
DEVICE static inline Place compress_place(const CompressShape *s, int64_t nc, int64_t sets, int64_t set, int64_t r) {
    const int64_t heads = s->KV / sets, bi = r / heads, kv = set + r % heads;
    Place place = {(bi / nc * s->T + bi % nc * s->stride) * s->x_row + kv * s->D, bi * s->KV + kv};
    return place;
}

// What the kernels below share: item = ((set·rows + r)·l + j)·D + c, or without j.
typedef struct CompressCall { CompressShape s; int64_t nc, sets, rows; } CompressCall;
static CompressCall compress_call(const CompressShape *s) {
    const int64_t nc = compress_blocks(s), sets = compress_sets(s);
    CompressCall call = {*s, nc, sets, s->B * nc * s->KV / sets};
    return call;
}

__global__ void compress_flatten_kernel(float *flat, const float *x, const float *pos, CompressCall a) {
    const int64_t item = global_thread(), D = a.s.D, l = a.s.block;
    if (item >= a.sets * a.rows * l * D) return;
    const int64_t c = item % D, j = item / D % l, r = item / D / l;
    flat[item] = x[compress_place(&a.s, a.nc, a.sets, r / a.rows, r % a.rows).x + j * a.s.x_row + c] + (pos ? pos[j * D + c] : 0);
}

__global__ void compress_mean_kernel(float *out, const float *x, CompressCall a) {
    const int64_t item = global_thread(), D = a.s.D;
    if (item >= a.sets * a.rows * D) return;
    const int64_t c = item % D, r = item / D;
    const Place place = compress_place(&a.s, a.nc, a.sets, r / a.rows, r % a.rows);
    float sum = 0;
    for (int64_t j = 0; j < a.s.block; j++) sum += x[place.x + j * a.s.x_row + c] / (float)a.s.block;
    out[place.out * D + c] = sum;
}

// x (sets, rows, width) += bias (sets, width)
__global__ void add_bias_kernel(float *x, const float *bias, int64_t sets, int64_t rows, int64_t width) {
    const int64_t i = global_thread();
    if (i < sets * rows * width) x[i] += bias[i / (rows * width) * width + i % width];
}

__global__ void gelu_kernel(float *out, const float *x, int64_t n) {
    const int64_t i = global_thread();
    if (i < n) out[i] = gelu(x[i]);
}

__global__ void gelu_backward_kernel(float *dx, const float *x, int64_t n) {
    const int64_t i = global_thread();
    if (i < n) dx[i] *= gelu_slope(x[i]);
}

// Rows (sets, rows, D) to their places in out (B,Nc,KV,D), or back from there.
__global__ void compress_place_kernel(float *out, float *rows, CompressCall a, int back) {
    const int64_t item = global_thread(), D = a.s.D;
    if (item >= a.sets * a.rows * D) return;
    const int64_t r = item / D, to = compress_place(&a.s, a.nc, a.sets, r / a.rows, r % a.rows).out * D + item % D;
    if (back) rows[item] = out[to];
    else out[to] = rows[item];
}

// dx +=: every token gathers from the blocks that cover it. dflat (sets, rows, l·D), or with NULL the mean of dout (B,Nc,KV,D).
__global__ void compress_gather_kernel(float *dx, const float *dflat, const float *dout, CompressCall a) {
    const int64_t item = global_thread(), D = a.s.D, KV = a.s.KV, T = a.s.T, l = a.s.block, d = a.s.stride;
    if (item >= a.s.B * T * KV * D) return;
    const int64_t c = item % D, kv = item / D % KV, t = item / D / KV % T, b = item / D / KV / T;
    float sum = 0;
    for (int64_t i = t < l ? 0 : (t - l) / d + 1; i < a.nc && i * d <= t; i++) {
        const int64_t heads = KV / a.sets, set = kv / heads, r = (b * a.nc + i) * heads + kv % heads;
        sum += dflat ? dflat[((set * a.rows + r) * l + t - i * d) * D + c] : dout[((b * a.nc + i) * KV + kv) * D + c] / (float)l;
    }
    dx[(b * T + t) * a.s.x_row + kv * D + c] += sum;
}

// Numbers of working memory: flat, two hidden layers, the result.
static int64_t gpu_compress_scratch(const CompressShape *s) {
    const CompressCall a = compress_call(s);
    return compress_has_weights(s->kind) ? a.sets * a.rows * (s->block * s->D + 2 * compress_hidden(s->kind, s->D) + s->D) : 0;
}

static void gpu_compress_forward(float *out, float *hidden, const float *x, const CompressWeights *w, const CompressShape *s, float *scratch) {
    const CompressCall a = compress_call(s);
    const int64_t D = s->D, LD = s->block * D, W = compress_hidden(s->kind, s->D), sets = a.sets, rows = a.rows, all = sets * rows;
    if (all == 0) return;
    if (s->kind == COMPRESS_AVGPOOL) {
        compress_mean_kernel<<<grid(all * D, THREADS), THREADS>>>(out, x, a);
        LAUNCHED();
        return;
    }
    float *flat = scratch, *h = flat + all * LD, *y = h + 2 * all * W;
    compress_flatten_kernel<<<grid(all * LD, THREADS), THREADS>>>(flat, x, w->pos, a);
    LAUNCHED();
    if (s->kind == COMPRESS_CONV1D) {
        gemm(rows, D, LD, flat, LD, 0, w->conv, LD, 1, y, D, 0, sets, rows * LD, D * LD, rows * D);
    } else {
        gemm(rows, W, LD, flat, LD, 0, w->fc1, LD, 1, hidden, W, 0, sets, rows * LD, W * LD, rows * W);
        add_bias_kernel<<<grid(all * W, THREADS), THREADS>>>(hidden, w->fc1_bias, sets, rows, W);
        gelu_kernel<<<grid(all * W, THREADS), THREADS>>>(h, hidden, all * W);
        LAUNCHED();
        gemm(rows, D, W, h, W, 0, w->fc2, W, 1, y, D, 0, sets, rows * W, D * W, rows * D);
    }
    add_bias_kernel<<<grid(all * D, THREADS), THREADS>>>(y, s->kind == COMPRESS_CONV1D ? w->conv_bias : w->fc2_bias, sets, rows, D);
    compress_place_kernel<<<grid(all * D, THREADS), THREADS>>>(out, y, a, 0);
    LAUNCHED();
}

static void gpu_compress_backward(float *dx, const CompressWeights *dw, float *dout, const float *hidden, const float *x, const CompressWeights *w,
                                  const CompressShape *s, float *scratch, float *parts) {
    const CompressCall a = compress_call(s);
    const int64_t D = s->D, LD = s->block * D, W = compress_hidden(s->kind, s->D), sets = a.sets, rows = a.rows, all = sets * rows;
    if (all == 0) return;
    float *flat = scratch, *h = flat + all * LD, *dh = h + all * W, *dy = dh + all * W;
    if (compress_has_weights(s->kind)) {
        compress_place_kernel<<<grid(all * D, THREADS), THREADS>>>(dout, dy, a, 1);
        compress_flatten_kernel<<<grid(all * LD, THREADS), THREADS>>>(flat, x, w->pos, a);
        LAUNCHED();
        float *bias = s->kind == COMPRESS_CONV1D ? dw->conv_bias : dw->fc2_bias;
        for (int64_t set = 0; set < sets; set++) column_sums(bias + set * D, rows, D, Plain{dy + set * rows * D, D}, parts);
    }
    // The gradient of `flat` takes its place once dweight has read it.
    if (s->kind == COMPRESS_CONV1D) {
        gemm(D, LD, rows, dy, D, 1, flat, LD, 0, dw->conv, LD, 1, sets, rows * D, rows * LD, D * LD);
        gemm(rows, LD, D, dy, D, 0, w->conv, LD, 0, flat, LD, 0, sets, rows * D, D * LD, rows * LD);
    } else if (compress_has_weights(s->kind)) {
        gelu_kernel<<<grid(all * W, THREADS), THREADS>>>(h, hidden, all * W);
        LAUNCHED();
        gemm(D, W, rows, dy, D, 1, h, W, 0, dw->fc2, W, 1, sets, rows * D, rows * W, D * W);
        gemm(rows, W, D, dy, D, 0, w->fc2, W, 0, dh, W, 0, sets, rows * D, D * W, rows * W);
        gelu_backward_kernel<<<grid(all * W, THREADS), THREADS>>>(dh, hidden, all * W);
        LAUNCHED();
        for (int64_t set = 0; set < sets; set++) column_sums(dw->fc1_bias + set * W, rows, W, Plain{dh + set * rows * W, W}, parts);
        gemm(W, LD, rows, dh, W, 1, flat, LD, 0, dw->fc1, LD, 1, sets, rows * W, rows * LD, W * LD);
        gemm(rows, LD, W, dh, W, 0, w->fc1, LD, 0, flat, LD, 0, sets, rows * W, W * LD, rows * LD);
        column_sums(dw->pos, all, LD, Plain{flat, LD}, parts);
    }
    compress_gather_kernel<<<grid(s->B * s->T * s->KV * D, THREADS), THREADS>>>(dx, compress_has_weights(s->kind) ? flat : NULL, dout, a);
    LAUNCHED();
}

// ----------------------------------------------------------------------------
// Selection. Rows (b,t,kv) are done a chunk at a time, so that their attention weights (chunk, Nc) never become (B,T,KV,Nc).

enum { SELECT_NUMBERS = 1 << 24, SELECT_HEADS = 4 };      // of a chunk; heads that a thread meets a key with at once
static int64_t select_chunk(const AttentionShape *s, const SelectShape *sel) {
    const int64_t row = s->Tk + s->T / sel->sel_block + 1;
    return min64(s->B * s->T * s->KV, max64(1024, SELECT_NUMBERS / row));
}
static int64_t gpu_select_scratch(const AttentionShape *s, const SelectShape *sel) {
    return select_chunk(s, sel) * (s->Tk + s->T / sel->sel_block + 1);
}

// weights (chunk, Nc) = exp(q·K~/sqrt(D) - lse) summed over the heads of a group (eq. 10): a block of threads a row.
__global__ void select_weights_kernel(float *weights, const float *q, const float *k, const float *lse, int64_t row0, AttentionShape s, SelectShape sel) {
    extern __shared__ float shared[];
    const int64_t row = row0 + blockIdx.x, G = s.H / s.KV, kv = row % s.KV, bt = row / s.KV, t = bt % s.T, b = bt / s.T;
    if (t / sel.sel_block + 1 <= sel.n) return;     // no choice to make
    const float scale = 1 / (float)sqrt((double)s.D);
    for (int64_t c = threadIdx.x; c < G * s.D; c += blockDim.x) shared[c] = q[bt * s.q_row + kv * G * s.D + c] * scale;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < compressed_seen(t, sel.cmp_block, sel.cmp_stride); i += blockDim.x) {
        const float *key = k + (b * s.Tk + i) * s.k_row + kv * s.D;
        float sum = 0;
        for (int64_t g0 = 0; g0 < G; g0 += SELECT_HEADS) {
            float x[SELECT_HEADS] = {0};
            for (int c = 0; c < s.D; c++)
                for (int g = 0; g < SELECT_HEADS; g++) x[g] += g0 + g < G ? shared[(g0 + g) * s.D + c] * key[c] : 0;
            for (int g = 0; g < SELECT_HEADS && g0 + g < G; g++) sum += expf(x[g] - lse[bt * s.H + kv * G + g0 + g]);
        }
        weights[blockIdx.x * s.Tk + i] = sum;
    }
}

// Eq. 9, 11, 12: a warp a row. Taken blocks are marked by an importance of -1.
__global__ void select_blocks_kernel(int *block_idx, float *importance, const float *weights, int64_t row0, int64_t rows, AttentionShape s, SelectShape sel) {
    const int64_t i = global_warp();
    if (i >= rows) return;
    const int64_t row = row0 + i, t = row / s.KV % s.T, blocks = t / sel.sel_block + 1, visible = compressed_seen(t, sel.cmp_block, sel.cmp_stride);
    int *idx = block_idx + row * sel.n;
    if (blocks <= sel.n) {
        for (int j = lane(); j < sel.n; j += WARP) idx[j] = j < blocks ? j : -1;
        return;
    }
    const int64_t per_block = sel.sel_block / sel.cmp_stride, pieces = sel.cmp_block / sel.cmp_stride;
    const int64_t first = sel.n_init, last = blocks - sel.n_local;
    float *score = importance + i * (s.T / sel.sel_block + 1);
    const float *w = weights + i * s.Tk;
    for (int64_t j = first + lane(); j < last; j += WARP) {
        float sum = 0;
        for (int64_t x = max64(0, j * per_block - pieces + 1); x < min64((j + 1) * per_block, visible); x++)
            sum += w[x] * (float)pieces_inside(x, j, &sel);
        score[j] = sum >= 0 ? sum : 0;      // NaN, from a model that is lost anyway, must not leave a place empty
    }
    __syncwarp();
    for (int place = sel.n - sel.n_init - sel.n_local; place > 0; place--) {
        float best = -0.5f;
        int64_t at = last;
        for (int64_t j = first + lane(); j < last; j += WARP)
            if (score[j] > best) best = score[j], at = j;
        for (int step = WARP / 2; step > 0; step /= 2) {
            const float other = __shfl_xor_sync(~0u, best, step);
            const int64_t other_at = __shfl_xor_sync(~0u, (long long)at, step);
            if (other > best || (other == best && other_at < at)) best = other, at = other_at;
        }
        if (lane() == 0) score[at] = -1;
        __syncwarp();
    }
    int to = sel.n_init;
    for (int64_t j0 = first; j0 < last; j0 += WARP) {
        const int taken = j0 + lane() < last && score[j0 + lane()] < 0;
        const unsigned all = __ballot_sync(~0u, taken);
        if (taken) idx[to + __popc(all & ((1u << lane()) - 1))] = (int)(j0 + lane());
        to += __popc(all);
    }
    for (int j = lane(); j < sel.n_init; j += WARP) idx[j] = j;
    for (int j = lane(); j < sel.n_local; j += WARP) idx[sel.n - sel.n_local + j] = (int)(last + j);
}

static void gpu_select_forward(int *block_idx, const float *q, const float *k, const float *lse, const AttentionShape *s, const SelectShape *sel, float *scratch) {
    const int64_t rows = s->B * s->T * s->KV, chunk = select_chunk(s, sel), bytes = s->H / s->KV * s->D * (int64_t)sizeof(float);
    float *weights = scratch, *importance = weights + chunk * s->Tk;
    if (bytes > (int64_t)gpu.sharedMemPerBlockOptin) die(2, "selection needs %" PRId64 " bytes of a GPU block's memory and this GPU has %zu: use more --kv-heads", bytes, gpu.sharedMemPerBlockOptin);
    CUDA(cudaFuncSetAttribute((const void *)select_weights_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    for (int64_t row = 0; row < rows; row += chunk) {
        const int64_t n = min64(chunk, rows - row);
        select_weights_kernel<<<(unsigned)n, (unsigned)min64(128, round_up(max64(s->Tk, 1), WARP)), (size_t)bytes>>>(weights, q, k, lse, row, *s, *sel);
        select_blocks_kernel<<<grid(n, WARPS), THREADS>>>(block_idx, importance, weights, row, n, *s, *sel);
        LAUNCHED();
    }
}

// ----------------------------------------------------------------------------
// Gates and the sum of the branches

__global__ void gates_forward_kernel(float *gates, const float *logits, int64_t logits_row, const float *q, int64_t q_row, const float *weight,
                                     const float *bias, int64_t n, int h, int d, int kind) {
    const int64_t item = global_thread(), j = item % (BRANCHES * h), i = item / (BRANCHES * h);
    if (i >= n) return;
    float x = bias[j];
    if (kind == GATE_INPUT) x += logits[i * logits_row + j];
    if (kind == GATE_Q_COND)
        for (int c = 0; c < d; c++) x += weight[j * d + c] * q[i * q_row + j / BRANCHES * d + c];
    gates[item] = sigmoid(x);
}

typedef struct Branches { const float *of[BRANCHES]; } Branches;

__global__ void branches_sum_kernel(float *out, Branches branch, const float *gates, int64_t nh, int dv) {
    const int64_t item = global_thread();
    if (item >= nh * dv) return;
    const float *g = gates + item / dv * BRANCHES;
    out[item] = g[CMP] * branch.of[CMP][item] + g[SLC] * branch.of[SLC][item] + g[WIN] * branch.of[WIN][item];
}

// dlogits (N,H,3) = <dout, branch>·g·(1-g), a warp a (token, head); for gate = input it goes to its place in the wide row too.
__global__ void gates_backward_kernel(float *dlogits, float *dwide, int64_t wide_row, const float *dout, Branches branch, const float *gates, int64_t nh,
                                      int h, int dv, int kind) {
    const int64_t i = global_warp();
    if (i >= nh) return;
    for (int b = 0; b < BRANCHES; b++) {
        float sum = 0;
        for (int c = lane(); c < dv; c += WARP) sum += dout[i * dv + c] * branch.of[b][i * dv + c];
        const float g = gates[i * BRANCHES + b], dx = warp_sum(sum) * g * (1 - g);
        if (lane() > 0) continue;
        dlogits[i * BRANCHES + b] = dx;
        if (kind == GATE_INPUT) dwide[i / h * wide_row + i % h * BRANCHES + b] = dx;
    }
}

__global__ void gates_dq_kernel(float *dq, int64_t q_row, const float *dlogits, const float *weight, int64_t n, int h, int d) {
    const int64_t item = global_thread(), c = item % d, head = item / d % h, i = item / d / h;
    if (i >= n) return;
    float sum = 0;
    for (int b = 0; b < BRANCHES; b++) sum += dlogits[(i * h + head) * BRANCHES + b] * weight[(head * BRANCHES + b) * d + c];
    dq[i * q_row + head * d + c] += sum;
}

struct GateWeightGradient {
    const float *dlogits, *q;
    int64_t q_row, h, d;
    __device__ float operator()(int64_t row, int64_t col) const {
        const int64_t j = col / d;
        return dlogits[row * BRANCHES * h + j] * q[row * q_row + j / BRANCHES * d + col % d];
    }
};

// ----------------------------------------------------------------------------
// SwiGLU

__global__ void swiglu_forward_kernel(float *h, const float *gate_up, int64_t n, int64_t f) {
    const int64_t item = global_thread();
    if (item >= n * f) return;
    const float a = gate_up[item / f * 2 * f + item % f], u = gate_up[item / f * 2 * f + f + item % f];
    h[item] = a * sigmoid(a) * u;
}

__global__ void swiglu_backward_kernel(float *dgate_up, const float *dh, const float *gate_up, int64_t n, int64_t f) {
    const int64_t item = global_thread();
    if (item >= n * f) return;
    const int64_t at = item / f * 2 * f + item % f;
    const float x = gate_up[at], y = gate_up[at + f], s = sigmoid(x), g = dh[item];
    dgate_up[at] = g * y * s * (1 + x * (1 - s));
    dgate_up[at + f] = g * x * s;
}

static void gpu_swiglu_forward(float *h, const float *gate_up, int64_t n, int64_t f) {
    swiglu_forward_kernel<<<grid(n * f, THREADS), THREADS>>>(h, gate_up, n, f);
    LAUNCHED();
}

static void gpu_swiglu_backward(float *dgate_up, const float *dh, const float *gate_up, int64_t n, int64_t f) {
    swiglu_backward_kernel<<<grid(n * f, THREADS), THREADS>>>(dgate_up, dh, gate_up, n, f);
    LAUNCHED();
}

// ----------------------------------------------------------------------------
// Mixture of experts

__global__ void moe_route_kernel(Routing r, MoeShape s) {
    const int64_t i = global_thread();
    if (i >= s.N) return;
    float *p = r.probs + i * s.E, top = p[0], sum = 0, chosen = 0;
    for (int e = 1; e < s.E; e++) top = fmaxf(top, p[e]);
    for (int e = 0; e < s.E; e++) sum += p[e] = expf(p[e] - top);
    for (int e = 0; e < s.E; e++) p[e] /= sum;
    r.lse[i] = top + logf(sum);
    int *c = r.choice + i * s.k;
    for (int j = 0; j < s.k; j++) {     // the most probable not yet chosen; ties to the lower index
        int best = -1;
        for (int e = 0; e < s.E; e++) {
            int taken = 0;
            for (int x = 0; x < j; x++) taken |= c[x] == e;
            if (!taken && (best < 0 || p[e] > p[best])) best = e;
        }
        c[j] = best;
        chosen += p[best];
    }
    for (int j = 0; j < s.k; j++) r.weight[i * s.k + j] = s.k == 1 ? p[c[j]] : p[c[j]] / chosen;
}

// An expert over capacity keeps its most probable tokens (ties: the lower index): a share outweighed by `limit` others in its
// list is dropped, here by choosing expert -1.
__global__ void moe_drop_kernel(int *kept, Routing r, const int *rows, const int64_t *start, MoeShape s, int64_t limit) {
    const int64_t x = global_thread();
    if (x >= s.N * s.k) return;
    const int e = r.choice[x];
    const float p = r.probs[x / s.k * s.E + e];
    int64_t before = 0;
    for (int64_t i = start[e]; i < start[e + 1]; i++) {
        const float other = r.probs[rows[i] / s.k * s.E + e];
        before += other > p || (other == p && rows[i] < x);
    }
    kept[x] = before < limit ? e : -1;
    if (before >= limit) r.weight[x] = 0;
}

static void moe_lists(int *rows, int64_t *start, int64_t *load, const int *choice, const MoeShape *s) {
    lists_count_kernel<<<grid(s->E, WARPS), THREADS>>>(load, choice, 1, s->N, s->k, s->k, 0, 1, 0, s->E);
    lists_start_kernel<<<1, 1>>>(start, load, s->E, 0);
    lists_fill_kernel<<<grid(s->E, WARPS), THREADS>>>(rows, start, choice, 1, s->N, s->k, s->k, 0, 1, 0, s->E, 1);
    LAUNCHED();
}

// spare: N·k ints twice, then E numbers of 64 bits, in numbers: see gpu_moe_scratch
static void gpu_moe_route(const Routing *r, const MoeShape *s, float *spare) {
    moe_route_kernel<<<grid(s->N, THREADS), THREADS>>>(*r, *s);
    LAUNCHED();
    moe_lists(r->row_token, r->start, r->load, r->choice, s);
    if (s->capacity <= 0) return;
    int64_t *count = (int64_t *)spare;
    int *kept = (int *)(count + s->E), *rows = kept + s->N * s->k;
    device_copy(rows, r->row_token, s->N * s->k * (int64_t)sizeof(int));
    const int64_t limit = (int64_t)ceil(s->capacity * (double)s->N * s->k / s->E);
    moe_drop_kernel<<<grid(s->N * s->k, THREADS), THREADS>>>(kept, *r, rows, r->start, *s, limit);
    LAUNCHED();
    moe_lists(r->row_token, r->start, count, kept, s);
}

static int64_t gpu_moe_scratch(const MoeShape *s) { return moe_scratch(s) + 2 * s->N * s->k + 2 * s->E + 16; }

__global__ void gather_rows_kernel(float *out, const float *x, const int *rows, int64_t n, int64_t c, int k) {
    const int64_t item = global_thread();
    if (item < n * c) out[item] = x[rows[item / c] / k * c + item % c];
}

// out[token] += weight · y, or with weight NULL += y; a token is at most once among the rows.
__global__ void scatter_rows_kernel(float *out, const float *y, const float *weight, const int *rows, int64_t n, int64_t c, int k) {
    const int64_t item = global_thread();
    if (item >= n * c) return;
    const int row = rows[item / c];
    out[row / k * c + item % c] += (weight ? weight[row] : 1) * y[item];
}

// dweight[row] = <dh, h>; then dy and dh carry the share's weight.
__global__ void moe_dweight_kernel(float *dweight, float *dy, float *dh, const float *h, const float *weight, const int *rows, int64_t n, int64_t c, int64_t f) {
    const int64_t i = global_warp();
    if (i >= n) return;
    const int row = rows[i];
    float sum = 0;
    for (int64_t j = lane(); j < f; j += WARP) sum += dh[i * f + j] * h[i * f + j];
    sum = warp_sum(sum);
    if (lane() == 0) dweight[row] = sum;
    for (int64_t j = lane(); j < c; j += WARP) dy[i * c + j] *= weight[row];
    for (int64_t j = lane(); j < f; j += WARP) dh[i * f + j] *= weight[row];
}

// From the gradient of the shares' weights to that of the router's logits: through the renormalisation, the two terms' own
// gradients, and the softmax.
__global__ void router_backward_kernel(float *dprobs, const float *dweight, Routing r, MoeShape s, double z_coef, double balance_coef, double scale) {
    const int64_t i = global_thread();
    if (i >= s.N) return;
    const float *p = r.probs + i * s.E;
    const int *choice = r.choice + i * s.k;
    float *d = dprobs + i * s.E, chosen = 0, mean = 0, total = 0;
    for (int e = 0; e < s.E; e++) d[e] = 0;
    for (int j = 0; j < s.k; j++) chosen += p[choice[j]];
    for (int j = 0; j < s.k; j++) mean += dweight[i * s.k + j] * p[choice[j]] / chosen;
    for (int j = 0; j < s.k; j++) d[choice[j]] = s.k == 1 ? dweight[i] : (dweight[i * s.k + j] - mean) / chosen;
    for (int e = 0; e < s.E; e++) {
        d[e] += (float)(scale * balance_coef * s.E / (double)s.N * (double)r.load[e] / (double)(s.N * s.k));
        total += p[e] * d[e];
    }
    const float dz = (float)(scale * z_coef * 2 / (double)s.N) * r.lse[i];
    for (int e = 0; e < s.E; e++) d[e] = p[e] * (d[e] - total + dz);
}

static void gpu_moe_forward(float *out, float *gate_up, const float *x, const float *experts, const Routing *r, const MoeShape *s, float *scratch) {
    const int64_t C = s->C, F = s->F;
    float *rows = scratch, *y = rows + s->N * C, *h = y + s->N * C;
    int64_t *start = (int64_t *)xmalloc((size_t)(s->E + 1) * sizeof(int64_t));
    to_host(start, r->start, (s->E + 1) * (int64_t)sizeof(int64_t));
    for (int e = 0; e < s->E; e++) {
        const int64_t from = start[e], n = start[e + 1] - from;
        if (n == 0) continue;
        gather_rows_kernel<<<grid(n * C, THREADS), THREADS>>>(rows, x, r->row_token + from, n, C, s->k);
        LAUNCHED();
        gpu_linear_forward(gate_up + from * 2 * F, 2 * F, rows, C, expert_gate_up(experts, s, e), n, C, 2 * F);
        gpu_swiglu_forward(h, gate_up + from * 2 * F, n, F);
        gpu_linear_forward(y, C, h, F, expert_down(experts, s, e), n, F, C);
        scatter_rows_kernel<<<grid(n * C, THREADS), THREADS>>>(out, y, r->weight, r->row_token + from, n, C, s->k);
        LAUNCHED();
    }
    free(start);
}

// dx (N,C) +=, dexperts +=; leaves dweight (N·k) for router_backward_kernel, and returns where it lies in `scratch`.
static float *gpu_moe_backward(float *dx, float *dexperts, const float *dout, const float *gate_up, const float *x, const float *experts,
                               const Routing *r, const MoeShape *s, float *scratch) {
    const int64_t C = s->C, F = s->F, N = s->N;
    float *rows = scratch, *dy = rows + N * C, *h = dy + N * C, *dh = h + N * F, *dgate_up = dh + N * F, *dweight = dgate_up + N * 2 * F;
    int64_t *start = (int64_t *)xmalloc((size_t)(s->E + 1) * sizeof(int64_t));
    to_host(start, r->start, (s->E + 1) * (int64_t)sizeof(int64_t));
    device_zero(dweight, N * s->k * (int64_t)sizeof(float));        // a dropped share has no gradient
    for (int e = 0; e < s->E; e++) {
        const int64_t from = start[e], n = start[e + 1] - from;
        const int *list = r->row_token + from;
        float *dw_gate_up = dexperts + (expert_gate_up(experts, s, e) - experts), *dw_down = dexperts + (expert_down(experts, s, e) - experts);
        if (n == 0) continue;
        gather_rows_kernel<<<grid(n * C, THREADS), THREADS>>>(rows, x, list, n, C, s->k);
        gather_rows_kernel<<<grid(n * C, THREADS), THREADS>>>(dy, dout, list, n, C, s->k);
        LAUNCHED();
        gpu_swiglu_forward(h, gate_up + from * 2 * F, n, F);
        gemm(n, F, C, dy, C, 0, expert_down(experts, s, e), F, 0, dh, F, 0);
        moe_dweight_kernel<<<grid(n, WARPS), THREADS>>>(dweight, dy, dh, h, r->weight, list, n, C, F);
        LAUNCHED();
        gpu_linear_backward(NULL, 0, dw_down, dy, C, h, F, NULL, n, F, C, 0);
        gpu_swiglu_backward(dgate_up, dh, gate_up + from * 2 * F, n, F);
        gpu_linear_backward(dy, C, dw_gate_up, dgate_up, 2 * F, rows, C, expert_gate_up(experts, s, e), n, C, 2 * F, 0);
        scatter_rows_kernel<<<grid(n * C, THREADS), THREADS>>>(dx, dy, nullptr, list, n, C, s->k);
        LAUNCHED();
    }
    free(start);
    return dweight;
}

// moe_losses on the host, from the little that it needs: the logsumexps, the probabilities' sums and the loads.
static void gpu_moe_losses(double *z, double *balance, double *load_sum, const Routing *r, const MoeShape *s, double z_coef, double balance_coef,
                           float *sums, float *parts) {
    float *lse = (float *)xmalloc((size_t)(s->N + s->E) * sizeof(float)), *p = lse + s->N;
    int64_t *load = (int64_t *)xmalloc((size_t)s->E * sizeof(int64_t));
    device_zero(sums, s->E * (int64_t)sizeof(float));
    column_sums(sums, s->N, s->E, Plain{r->probs, s->E}, parts);
    to_host(lse, r->lse, s->N * (int64_t)sizeof(float));
    to_host(p, sums, s->E * (int64_t)sizeof(float));
    to_host(load, r->load, s->E * (int64_t)sizeof(int64_t));
    double squares = 0, sum = 0;
    for (int64_t i = 0; i < s->N; i++) squares += (double)lse[i] * (double)lse[i];
    for (int e = 0; e < s->E; e++) {
        sum += (double)load[e] / (double)(s->N * s->k) * ((double)p[e] / (double)s->N);
        load_sum[e] += (double)load[e];
    }
    *z += z_coef * squares / (double)s->N;
    *balance += balance_coef * s->E * sum;
    free(lse);
    free(load);
}

// ----------------------------------------------------------------------------
// The head: a block of threads turns one row of logits into its gradient, and leaves the cross entropy.

__device__ static float block_reduce(float x, int want_max) {
    __shared__ float of_warp[WARPS];
    x = want_max ? warp_max(x) : warp_sum(x);
    __syncthreads();        // the last call's results have been read
    if (lane() == 0) of_warp[threadIdx.x / WARP] = x;
    __syncthreads();
    float all = of_warp[0];
    for (int i = 1; i < WARPS; i++) all = want_max ? fmaxf(all, of_warp[i]) : all + of_warp[i];
    return all;
}

__global__ void cross_entropy_kernel(float *logits, float *loss, const int *targets, int64_t v, float scale, int gradient) {
    float *p = logits + blockIdx.x * v, top = -INFINITY, sum = 0;
    const int target = targets[blockIdx.x];
    for (int64_t j = threadIdx.x; j < v; j += blockDim.x) top = fmaxf(top, p[j]);
    top = block_reduce(top, 1);
    for (int64_t j = threadIdx.x; j < v; j += blockDim.x) sum += expf(p[j] - top);
    sum = block_reduce(sum, 0);
    if (threadIdx.x == 0) loss[blockIdx.x] = logf(sum) - (p[target] - top);
    __syncthreads();
    if (!gradient) return;
    for (int64_t j = threadIdx.x; j < v; j += blockDim.x) p[j] = (expf(p[j] - top) / sum - (j == target ? 1.0f : 0.0f)) * scale;
}

// ----------------------------------------------------------------------------
// 3. The model. Its twin in the GPU's memory is a Model too: the table of parameters and the layout of what the layers keep
// are those of train_nsa.c, at other addresses. The working memory is this program's own.

typedef struct GpuScratch {
    float *norm, *y, *attention, *ffn, *compress, *select, *logits, *experts, *parts, *sums, *loss;
    float *dx, *dnorm, *dwide, *dattention, *dgates, *dgate_up, *dffn, *dcompressed[2], *delta, *dprobs;
    Takers takers;
    int *tokens, *targets, *places, *occurring, *start;     // (N), (N), and the lists of embed_backward_kernel
    double *norm_sums;
} GpuScratch;

static GpuScratch scratch;
// The tests hand the CPU's choice of blocks over, (L) arrays of (B,T,KV,n) in the GPU's memory, so that a tie that falls the
// other way does not look like an error.
static int **given_block_idx;

static int64_t carve_gpu_scratch(GpuScratch *s, const Config *c, int64_t B, int64_t T, int train, float *memory) {
    const int64_t N = B * T, C = c->hidden_size, H = c->num_attention_heads, KV = c->num_key_value_heads, D = c->head_dim, Dv = c->v_head_dim;
    int64_t used = 0, wide = 0, width = 0, nsa = 0, compress = 0, select = 0;
    for (int l = 0; l < c->num_hidden_layers; l++) {
        wide = max64(wide, wide_row(c, l).size);
        width = max64(width, ffn_width(c, l));
        nsa |= !layer_is_full(c, l);
    }
    const int64_t nc = nsa ? compressed_seen(T - 1, c->cmp_block, c->cmp_stride) : 0;
    if (nsa) {
        AttentionShape shape = attention_shape(c, B, T, 0);
        const SelectShape sel = select_shape(c);
        shape.Tk = nc;
        select = gpu_select_scratch(&shape, &sel);
        for (int i = 0; i < 2; i++) {
            const CompressShape cs = compress_shape(c, B, T, 0, i);
            compress = max64(compress, gpu_compress_scratch(&cs));
        }
    }
    int64_t columns = max64(max64(C, c->num_experts), BRANCHES * H * D);        // the widest sum of columns
    columns = max64(columns, max64(c->cmp_block, 2) * max64(D, Dv));
    const MoeShape moe = moe_shape(c, N, NULL);
    s->norm = take(&memory, &used, N * C);
    s->y = take(&memory, &used, N * C);
    s->attention = take(&memory, &used, N * H * Dv);
    s->ffn = take(&memory, &used, N * width);
    s->compress = take(&memory, &used, compress);
    s->select = take(&memory, &used, select);
    s->logits = take(&memory, &used, logit_rows(c, N) * c->vocab_size);
    s->experts = c->num_experts ? take(&memory, &used, gpu_moe_scratch(&moe)) : NULL;
    s->parts = take(&memory, &used, SUM_PARTS * columns);
    s->sums = take(&memory, &used, max64(c->num_experts, BRANCHES));
    s->loss = take(&memory, &used, N);
    s->tokens = take_ints(&memory, &used, N);
    s->targets = take_ints(&memory, &used, N);
    if (!train) return used;
    s->dx = take(&memory, &used, N * C);
    s->dnorm = take(&memory, &used, N * C);
    s->dwide = take(&memory, &used, N * wide);
    s->dattention = take(&memory, &used, N * H * Dv);
    s->dgates = take(&memory, &used, nsa ? N * H * BRANCHES : 0);
    s->dgate_up = take(&memory, &used, N * 2 * width);
    s->dffn = take(&memory, &used, N * width);
    s->dcompressed[0] = take(&memory, &used, B * nc * KV * D);
    s->dcompressed[1] = take(&memory, &used, B * nc * KV * Dv);
    s->delta = take(&memory, &used, N * H);
    s->dprobs = take(&memory, &used, N * c->num_experts);
    s->takers.blocks = nsa ? (T - 1) / c->sel_block + 1 : 0;
    s->takers.count = (int64_t *)take_ints(&memory, &used, 2 * B * KV * s->takers.blocks);
    s->takers.start = (int64_t *)take_ints(&memory, &used, 2 * B * KV * (s->takers.blocks + 1));
    s->takers.queries = take_ints(&memory, &used, nsa ? N * KV * c->sel_blocks : 0);
    s->places = take_ints(&memory, &used, N);
    s->occurring = take_ints(&memory, &used, N);
    s->start = take_ints(&memory, &used, N + 1);
    s->norm_sums = (double *)take_ints(&memory, &used, 2 * (count_params(c) / SUM_CHUNK + 1));
    return used;
}

int64_t device_bytes(const Config *c, int64_t B, int64_t T, int recompute, int train, Text *table) {
    LayerActs *acts = (LayerActs *)xcalloc((size_t)c->num_hidden_layers, sizeof(LayerActs));
    GpuScratch none;
    const int64_t params = count_params(c);
    const int64_t part[] = {params, train ? params : 0, train ? 2 * params : 0, carve_acts(acts, c, B, T, recompute, train, NULL),
                            carve_gpu_scratch(&none, c, B, T, train, NULL) + B * T + T * c->head_dim};
    free(acts);
    return memory_table(part, table);
}

void device_alloc(Model *m, int64_t B, int64_t T, int recompute, int train) {
    const Config *c = &m->config;
    int nsa = 0, len;
    for (int l = 0; l < c->num_hidden_layers; l++) nsa |= !layer_is_full(c, l);
    if (nsa && c->compress != COMPRESS_MLP && c->compress != COMPRESS_GROUPED_MLP && c->compress != COMPRESS_CONV1D && c->compress != COMPRESS_AVGPOOL) {
        const char *name = choice_name(compress_names, c->compress, &len);
        die(2, "--compress %.*s has no kernels here yet: train_nsa, on the CPU, knows it", len, name);
    }
    device_open();
    Model *g = m->twin;
    if (g) {        // other activations for the same weights
        free(g->acts);
        CUDA(cudaFree(g->memory));
    } else {
        g = m->twin = (Model *)xcalloc(1, sizeof(Model));
        g->config = *c;
        g->layers = (LayerWeights *)xcalloc((size_t)c->num_hidden_layers, sizeof(LayerWeights));
        g->weights = (float *)device_malloc(m->num_elements * (int64_t)sizeof(float));
        list_params(g);
    }
    g->B = (int)B;
    g->T = (int)T;
    g->recompute = recompute;
    g->train = train;
    if (train && !g->grads) {
        float **state[] = {&g->grads, &g->adam_m, &g->adam_v};
        for (int i = 0; i < 3; i++) *state[i] = (float *)device_malloc(m->num_elements * (int64_t)sizeof(float));
        m->adam_m = (real *)xcalloc((size_t)m->num_elements, sizeof(real));     // for checkpoints
        m->adam_v = (real *)xcalloc((size_t)m->num_elements, sizeof(real));
    }
    g->acts = (LayerActs *)xcalloc((size_t)c->num_hidden_layers, sizeof(LayerActs));
    g->rope_positions = T;
    const int64_t table = round_up(T * c->head_dim, 16), rstd = round_up(B * T, 16);
    const int64_t acts = carve_acts(g->acts, c, B, T, recompute, train, NULL), work = carve_gpu_scratch(&scratch, c, B, T, train, NULL);
    g->memory = (float *)device_malloc((table + rstd + acts + work) * (int64_t)sizeof(float));
    g->rope = g->memory;
    g->final_rstd = g->rope + table;
    carve_acts(g->acts, c, B, T, recompute, train, g->final_rstd + rstd);
    carve_gpu_scratch(&scratch, c, B, T, train, g->final_rstd + rstd + acts);
    float *angles = (float *)xmalloc((size_t)table * sizeof(float));
    rope_table(angles, T, c->head_dim, c->rope_theta);
    to_device(g->rope, angles, T * c->head_dim * (int64_t)sizeof(float));
    free(angles);
}

void device_free(Model *m) {
    Model *g = m->twin;
    float *all[] = {g->weights, g->grads, g->adam_m, g->adam_v, g->memory};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) CUDA(cudaFree(all[i]));
    free(g->layers);
    free(g->params);
    free(g->acts);
    free(g);
    m->twin = NULL;
}

void device_store(Model *m) {
    const int64_t bytes = m->num_elements * (int64_t)sizeof(float);
    to_device(m->twin->weights, m->weights, bytes);
    if (!m->twin->train) return;
    to_device(m->twin->adam_m, m->adam_m, bytes);
    to_device(m->twin->adam_v, m->adam_v, bytes);
}

void device_fetch(Model *m) {
    const int64_t bytes = m->num_elements * (int64_t)sizeof(float);
    to_host(m->weights, m->twin->weights, bytes);
    if (!m->twin->train) return;
    to_host(m->adam_m, m->twin->adam_m, bytes);
    to_host(m->adam_v, m->twin->adam_v, bytes);
}

// ----------------------------------------------------------------------------
// Forward: each function is its namesake of train_nsa.c with kernels for loops.

static Branches branches_of(const LayerActs *a) {
    Branches b = {{a->branch[0], a->branch[1], a->branch[2]}};
    return b;
}

static const float *gpu_attention_core_forward(Model *g, int layer, int64_t B, int64_t T) {
    const Config *c = &g->config;
    const LayerWeights *w = &g->layers[layer];
    const LayerActs *a = &g->acts[layer];
    const WideRow row = wide_row(c, layer);
    const int64_t N = B * T;
    const int H = c->num_attention_heads, KV = c->num_key_value_heads, D = c->head_dim, nsa = row.branches > 1;

    if (nsa) {      // before RoPE turns q
        gates_forward_kernel<<<grid(N * BRANCHES * H, THREADS), THREADS>>>(a->gates, a->wide + row.gate, row.size, a->wide, row.size, w->gate_weight,
                                                                          w->gate_bias, N, H, D, c->gate);
        LAUNCHED();
    }
    gpu_rope(a->wide, row.size, g->rope, N, T, 1, H, D, 1);
    for (int b = 0; b < row.branches; b++) {
        const int compressed = nsa && b == CMP;
        AttentionShape shape = attention_shape(c, B, T, row.size);
        const Mask mask = branch_mask(c, a, &shape, layer, b);
        float *k = a->wide + row.k[b], *v = a->wide + row.v[b];
        if (compressed) {
            for (int i = 0; i < 2; i++) {
                const CompressShape cs = compress_shape(c, B, T, row.size, i);
                gpu_compress_forward(a->compressed[i], a->hidden[i], i ? v : k, &w->compress[i], &cs, scratch.compress);
            }
            k = a->compressed[0];
            v = a->compressed[1];
            gpu_rope(k, shape.k_row, g->rope, B * shape.Tk, max64(shape.Tk, 1), c->cmp_stride, KV, D, 1);
        } else {
            gpu_rope(k, row.size, g->rope, N, T, 1, KV, D, 1);
        }
        gpu_attention_forward(a->branch[b], a->lse[b], a->wide, k, v, &mask, &shape);
        if (compressed) {
            const SelectShape select = select_shape(c);
            gpu_select_forward(a->block_idx, a->wide, k, a->lse[CMP], &shape, &select, scratch.select);
            if (given_block_idx) device_copy(a->block_idx, given_block_idx[layer], N * KV * c->sel_blocks * (int64_t)sizeof(int));
        }
    }
    if (!nsa) return a->branch[0];
    branches_sum_kernel<<<grid(N * H * c->v_head_dim, THREADS), THREADS>>>(scratch.attention, branches_of(a), a->gates, N * H, c->v_head_dim);
    LAUNCHED();
    return scratch.attention;
}

static void gpu_attention_layer_forward(Model *g, int layer, int64_t B, int64_t T, const StepInfo *info) {
    const Config *c = &g->config;
    const LayerWeights *w = &g->layers[layer];
    const LayerActs *a = &g->acts[layer];
    const int64_t N = B * T, C = c->hidden_size, wide = wide_row(c, layer).size, HDv = (int64_t)c->num_attention_heads * c->v_head_dim;
    gpu_rmsnorm_forward(scratch.norm, a->rstd1, a->x, w->norm1, N, C, c->rms_norm_eps);
    gpu_linear_forward(a->wide, wide, scratch.norm, C, w->wide, N, C, wide);
    gpu_linear_forward(scratch.y, C, gpu_attention_core_forward(g, layer, B, T), HDv, w->o, N, HDv, C);
    dropout_add(a->mid, a->x, scratch.y, N * C, dropout_at(c, T, 2 * layer + 1, info));
}

static void gpu_ffn_layer_forward(Model *g, int layer, int64_t B, int64_t T, const StepInfo *info) {
    const Config *c = &g->config;
    const LayerWeights *w = &g->layers[layer];
    const LayerActs *a = &g->acts[layer];
    const int64_t N = B * T, C = c->hidden_size, F = ffn_width(c, layer);
    gpu_rmsnorm_forward(scratch.norm, a->rstd2, a->mid, w->norm2, N, C, c->rms_norm_eps);
    if (F > 0) {
        gpu_linear_forward(a->gate_up, 2 * F, scratch.norm, C, w->gate_up, N, C, 2 * F);
        gpu_swiglu_forward(scratch.ffn, a->gate_up, N, F);
        gpu_linear_forward(scratch.y, C, scratch.ffn, F, w->down, N, F, C);
    } else {
        device_zero(scratch.y, N * C * (int64_t)sizeof(float));
    }
    if (layer_is_moe(c, layer)) {
        const MoeShape moe = moe_shape(c, N, info);
        gpu_linear_forward(a->routing.probs, moe.E, scratch.norm, C, w->router, N, C, moe.E);
        gpu_moe_route(&a->routing, &moe, scratch.experts + round_up(moe_scratch(&moe), 16));
        gpu_moe_forward(scratch.y, a->expert_gate_up, scratch.norm, w->experts, &a->routing, &moe, scratch.experts);
    }
    dropout_add(a->out, a->mid, scratch.y, N * C, dropout_at(c, T, 2 * layer + 2, info));
}

// What the log and the loss say of a layer, gathered in the host's model.
static void gpu_layer_stats(Model *m, int layer, int64_t B, int64_t T, const StepInfo *info) {
    const Config *c = &m->config;
    const LayerActs *a = &m->twin->acts[layer];
    if (!layer_is_full(c, layer) && !info) {        // gates are logged at validations
        const int64_t n = B * T * c->num_attention_heads;
        float sums[BRANCHES];
        device_zero(scratch.sums, sizeof sums);
        column_sums(scratch.sums, n, BRANCHES, Plain{a->gates, BRANCHES}, scratch.parts);
        to_host(sums, scratch.sums, sizeof sums);
        for (int b = 0; b < BRANCHES; b++) m->gate_sum[layer * BRANCHES + b] += (double)sums[b];
        m->gate_count[layer] += n;
    }
    if (layer_is_moe(c, layer)) {
        const MoeShape moe = moe_shape(c, B * T, info);
        gpu_moe_losses(&m->moe_z, &m->moe_balance, m->moe_load + layer * moe.E, &a->routing, &moe, c->z_loss_coef, c->balance_loss_coef,
                       scratch.sums, scratch.parts);
    }
}

static const float *gpu_layers_forward(Model *m, const int *tokens, int64_t B, int64_t T, const StepInfo *info) {
    Model *g = m->twin;
    const int64_t N = B * T, C = g->config.hidden_size;
    if (N > (int64_t)g->B * g->T || T > g->rope_positions) die(1, "internal error: a batch of %" PRId64 "x%" PRId64 " in memory for %dx%d", B, T, g->B, g->T);
    m->moe_z = m->moe_balance = 0;
    to_device(scratch.tokens, tokens, N * (int64_t)sizeof(int));
    embed_kernel<<<grid(N * C, THREADS), THREADS>>>(g->acts[0].x, scratch.tokens, g->embed, N, C);
    LAUNCHED();
    dropout_add(g->acts[0].x, NULL, g->acts[0].x, N * C, dropout_at(&g->config, T, 0, info));
    for (int l = 0; l < g->config.num_hidden_layers; l++) {
        gpu_attention_layer_forward(g, l, B, T, info);
        gpu_ffn_layer_forward(g, l, B, T, info);
        gpu_layer_stats(m, l, B, T, info);
    }
    return g->acts[g->config.num_hidden_layers - 1].out;
}

static double gpu_head_loss(Model *g, const float *x, const int *targets, int64_t N, const StepInfo *info) {
    const Config *c = &g->config;
    const int64_t C = c->hidden_size, V = c->vocab_size, rows = logit_rows(c, N);
    const float scale = info ? (float)(info->grad_scale / (double)N) : 0;
    to_device(scratch.targets, targets, N * (int64_t)sizeof(int));
    gpu_rmsnorm_forward(scratch.norm, g->final_rstd, x, g->norm, N, C, c->rms_norm_eps);
    for (int64_t i0 = 0; i0 < N; i0 += rows) {
        const int64_t n = min64(rows, N - i0);
        gpu_linear_forward(scratch.logits, V, scratch.norm + i0 * C, C, g->head, n, C, V);
        cross_entropy_kernel<<<(unsigned)n, THREADS>>>(scratch.logits, scratch.loss + i0, scratch.targets + i0, V, scale, info != NULL);
        LAUNCHED();
        if (info) gpu_linear_backward(scratch.dnorm + i0 * C, C, g->grads + (g->head - g->weights), scratch.logits, V, scratch.norm + i0 * C, C, g->head, n, C, V, 0);
    }
    if (info) {
        device_zero(scratch.dx, N * C * (int64_t)sizeof(float));
        gpu_rmsnorm_backward(scratch.dx, g->grads + (g->norm - g->weights), scratch.dnorm, x, g->final_rstd, g->norm, N, C, scratch.parts);
    }
    float *loss = (float *)xmalloc((size_t)N * sizeof(float));
    to_host(loss, scratch.loss, N * (int64_t)sizeof(float));
    double total = 0;
    for (int64_t i = 0; i < N; i++) total += (double)loss[i];
    free(loss);
    return total / (double)N;
}

double device_evaluate(Model *m, const int *tokens, const int *targets, int64_t B, int64_t T) {
    const float *x = gpu_layers_forward(m, tokens, B, T, NULL);
    return m->loss = gpu_head_loss(m->twin, x, targets, B * T, NULL);
}

void device_logits(Model *m, const int *tokens, int64_t B, int64_t T, real *logits, int last_only) {
    Model *g = m->twin;
    const int64_t C = m->config.hidden_size, V = m->config.vocab_size, N = last_only ? B : B * T, skip = last_only ? T : 1, rows = logit_rows(&m->config, B * T);
    const float *x = gpu_layers_forward(m, tokens, B, T, NULL);
    gpu_rmsnorm_forward(scratch.norm, g->final_rstd, x, g->norm, B * T, C, m->config.rms_norm_eps);
    for (int64_t i0 = 0; i0 < N; i0 += rows) {
        const int64_t n = min64(rows, N - i0);
        gpu_linear_forward(scratch.logits, V, scratch.norm + ((i0 + 1) * skip - 1) * C, skip * C, g->head, n, C, V);
        to_host(logits + i0 * V, scratch.logits, n * V * (int64_t)sizeof(float));
    }
}

// ----------------------------------------------------------------------------
// Backward

static void gpu_ffn_layer_backward(Model *g, int layer, int64_t B, int64_t T, const StepInfo *info) {
    const Config *c = &g->config;
    const LayerWeights *w = &g->layers[layer];
    const LayerActs *a = &g->acts[layer];
    const int64_t N = B * T, C = c->hidden_size, F = ffn_width(c, layer);
    float *dy = scratch.y;
    dropout_add(dy, NULL, scratch.dx, N * C, dropout_at(c, T, 2 * layer + 2, info));
    gpu_rmsnorm_again(scratch.norm, a->rstd2, a->mid, w->norm2, N, C);
    if (F > 0) {
        gpu_swiglu_forward(scratch.ffn, a->gate_up, N, F);
        gpu_linear_backward(scratch.dffn, F, grad_of(g, w->down), dy, C, scratch.ffn, F, w->down, N, F, C, 0);
        gpu_swiglu_backward(scratch.dgate_up, scratch.dffn, a->gate_up, N, F);
        gpu_linear_backward(scratch.dnorm, C, grad_of(g, w->gate_up), scratch.dgate_up, 2 * F, scratch.norm, C, w->gate_up, N, C, 2 * F, 0);
    } else {
        device_zero(scratch.dnorm, N * C * (int64_t)sizeof(float));
    }
    if (layer_is_moe(c, layer)) {
        const MoeShape moe = moe_shape(c, N, info);
        const float *dweight = gpu_moe_backward(scratch.dnorm, grad_of(g, w->experts), dy, a->expert_gate_up, scratch.norm, w->experts, &a->routing, &moe, scratch.experts);
        router_backward_kernel<<<grid(N, THREADS), THREADS>>>(scratch.dprobs, dweight, a->routing, moe, c->z_loss_coef, c->balance_loss_coef, info->grad_scale);
        LAUNCHED();
        gpu_linear_backward(scratch.dnorm, C, grad_of(g, w->router), scratch.dprobs, moe.E, scratch.norm, C, w->router, N, C, moe.E, 1);
    }
    gpu_rmsnorm_backward(scratch.dx, grad_of(g, w->norm2), scratch.dnorm, a->mid, a->rstd2, w->norm2, N, C, scratch.parts);
}

static void gpu_attention_core_backward(Model *g, int layer, int64_t B, int64_t T) {
    const Config *c = &g->config;
    const LayerWeights *w = &g->layers[layer];
    const LayerActs *a = &g->acts[layer];
    const WideRow row = wide_row(c, layer);
    const int64_t N = B * T;
    const int H = c->num_attention_heads, KV = c->num_key_value_heads, D = c->head_dim, nsa = row.branches > 1;

    device_zero(scratch.dwide, N * row.size * (int64_t)sizeof(float));
    for (int b = 0; b < row.branches; b++) {
        const int compressed = nsa && b == CMP;
        AttentionShape shape = attention_shape(c, B, T, row.size);
        const Mask mask = branch_mask(c, a, &shape, layer, b);
        const float *k = compressed ? a->compressed[0] : a->wide + row.k[b], *v = compressed ? a->compressed[1] : a->wide + row.v[b];
        float *dk = compressed ? scratch.dcompressed[0] : scratch.dwide + row.k[b], *dv = compressed ? scratch.dcompressed[1] : scratch.dwide + row.v[b];
        if (compressed) {
            device_zero(dk, B * shape.Tk * shape.k_row * (int64_t)sizeof(float));
            device_zero(dv, B * shape.Tk * shape.v_row * (int64_t)sizeof(float));
        }
        gpu_attention_backward(scratch.dwide, dk, dv, scratch.dattention, nsa ? a->gates + b : NULL, a->branch[b], a->lse[b], a->wide, k, v, &mask, &shape,
                               scratch.delta, &scratch.takers);
        if (!compressed) {
            gpu_rope(dk, row.size, g->rope, N, T, 1, KV, D, -1);
            continue;
        }
        gpu_rope(dk, shape.k_row, g->rope, B * shape.Tk, max64(shape.Tk, 1), c->cmp_stride, KV, D, -1);
        for (int i = 0; i < 2; i++) {
            const CompressShape cs = compress_shape(c, B, T, row.size, i);
            CompressWeights wc = w->compress[i], dw = wc;
            CompressTensor list[COMPRESS_TENSORS];
            const int count = compress_tensors(list, c->compress, KV, c->cmp_block, cs.D);
            for (int t = 0; t < count; t++) *compress_pointer(&dw, &list[t]) = grad_of(g, *compress_pointer(&wc, &list[t]));
            const int64_t at = (i ? row.v : row.k)[CMP];
            gpu_compress_backward(scratch.dwide + at, &dw, scratch.dcompressed[i], a->hidden[i], a->wide + at, &wc, &cs, scratch.compress, scratch.parts);
        }
    }
    gpu_rope(scratch.dwide, row.size, g->rope, N, T, 1, H, D, -1);
    if (!nsa) return;
    gates_backward_kernel<<<grid(N * H, WARPS), THREADS>>>(scratch.dgates, scratch.dwide + row.gate, row.size, scratch.dattention, branches_of(a), a->gates,
                                                           N * H, H, c->v_head_dim, c->gate);
    LAUNCHED();
    column_sums(grad_of(g, w->gate_bias), N, BRANCHES * H, Plain{scratch.dgates, BRANCHES * H}, scratch.parts);
    if (c->gate != GATE_Q_COND) return;
    // A gate on q reads q before RoPE: turn the kept one back (nothing needs it turned any more).
    gpu_rope(a->wide, row.size, g->rope, N, T, 1, H, D, -1);
    const GateWeightGradient value = {scratch.dgates, a->wide, row.size, H, D};
    column_sums(grad_of(g, w->gate_weight), N, (int64_t)BRANCHES * H * D, value, scratch.parts);
    gates_dq_kernel<<<grid(N * H * D, THREADS), THREADS>>>(scratch.dwide, row.size, scratch.dgates, w->gate_weight, N, H, D);
    LAUNCHED();
}

static void gpu_attention_layer_backward(Model *g, int layer, int64_t B, int64_t T, const StepInfo *info) {
    const Config *c = &g->config;
    const LayerWeights *w = &g->layers[layer];
    const LayerActs *a = &g->acts[layer];
    const int64_t N = B * T, C = c->hidden_size, wide = wide_row(c, layer).size, HDv = (int64_t)c->num_attention_heads * c->v_head_dim;
    const float *attention = a->branch[0];
    if (!layer_is_full(c, layer)) {
        branches_sum_kernel<<<grid(N * HDv, THREADS), THREADS>>>(scratch.attention, branches_of(a), a->gates, N * c->num_attention_heads, c->v_head_dim);
        LAUNCHED();
        attention = scratch.attention;
    }
    dropout_add(scratch.y, NULL, scratch.dx, N * C, dropout_at(c, T, 2 * layer + 1, info));
    gpu_linear_backward(scratch.dattention, HDv, grad_of(g, w->o), scratch.y, C, attention, HDv, w->o, N, HDv, C, 0);
    gpu_attention_core_backward(g, layer, B, T);
    gpu_rmsnorm_again(scratch.norm, a->rstd1, a->x, w->norm1, N, C);
    gpu_linear_backward(scratch.dnorm, C, grad_of(g, w->wide), scratch.dwide, wide, scratch.norm, C, w->wide, N, C, wide, 0);
    gpu_rmsnorm_backward(scratch.dx, grad_of(g, w->norm1), scratch.dnorm, a->x, a->rstd1, w->norm1, N, C, scratch.parts);
}

// The places of each token that occurs, in the order of the text: made by the host, which has the tokens.
static void gpu_embed_backward(Model *g, const int *tokens, int64_t N) {
    const int64_t V = g->config.vocab_size, C = g->config.hidden_size;
    int *next = (int *)xcalloc((size_t)(V + 1), sizeof(int)), *places = (int *)xmalloc((size_t)(3 * N + 1) * sizeof(int)), *occurring = places + N, *start = occurring + N;
    for (int64_t i = 0; i < N; i++) next[tokens[i] + 1]++;
    int found = 0;
    for (int64_t v = 0; v < V; v++) {
        if (next[v + 1]) occurring[found] = (int)v, start[found++] = next[v];
        next[v + 1] += next[v];
    }
    start[found] = (int)N;
    for (int64_t i = 0; i < N; i++) places[next[tokens[i]]++] = (int)i;
    to_device(scratch.places, places, N * (int64_t)sizeof(int));
    to_device(scratch.occurring, occurring, found * (int64_t)sizeof(int));
    to_device(scratch.start, start, (found + 1) * (int64_t)sizeof(int));
    embed_backward_kernel<<<(unsigned)found, THREADS>>>(g->grads + (g->embed - g->weights), scratch.dx, scratch.occurring, scratch.start, scratch.places, C);
    LAUNCHED();
    free(next);
    free(places);
}

double device_forward_backward(Model *m, const int *tokens, const int *targets, int64_t B, int64_t T, const StepInfo *info) {
    Model *g = m->twin;
    const int64_t N = B * T;
    const float *x = gpu_layers_forward(m, tokens, B, T, info);
    m->loss = gpu_head_loss(g, x, targets, N, info);
    for (int l = g->config.num_hidden_layers - 1; l >= 0; l--) {
        if (g->recompute >= 2) gpu_attention_layer_forward(g, l, B, T, info);
        if (g->recompute >= 1) gpu_ffn_layer_forward(g, l, B, T, info);
        gpu_ffn_layer_backward(g, l, B, T, info);
        gpu_attention_layer_backward(g, l, B, T, info);
    }
    dropout_add(scratch.dx, NULL, scratch.dx, N * g->config.hidden_size, dropout_at(&g->config, T, 0, info));
    gpu_embed_backward(g, tokens, N);
    return m->loss;
}

int device_bad_layer(const Model *m, int64_t n) {
    Model look = *m;        // the outputs, fetched for once
    const int64_t size = n * m->config.hidden_size, L = m->config.num_hidden_layers;
    float *outputs = (float *)xmalloc((size_t)((L + 1) * size) * sizeof(float));
    look.acts = (LayerActs *)xcalloc((size_t)L, sizeof(LayerActs));
    for (int64_t l = 0; l <= L; l++) {
        to_host(outputs + l * size, l < L ? m->twin->acts[l].x : m->twin->acts[l - 1].out, size * (int64_t)sizeof(float));
        if (l < L) look.acts[l].x = outputs + l * size, look.acts[l].out = outputs + (l + 1) * size;
    }
    const int layer = model_bad_layer(&look, n);
    free(outputs);
    free(look.acts);
    return layer;
}

// ----------------------------------------------------------------------------
// AdamW

void device_zero_grads(Model *m) { device_zero(m->twin->grads, m->num_elements * (int64_t)sizeof(float)); }

// A block sums one chunk, in double precision and in a fixed order.
__global__ void square_sums_kernel(double *sums, const float *x, int64_t n) {
    __shared__ double of_thread[THREADS];
    const int64_t from = (int64_t)blockIdx.x * SUM_CHUNK;
    double sum = 0;
    for (int64_t i = from + threadIdx.x; i < min64(from + SUM_CHUNK, n); i += THREADS) sum += (double)x[i] * (double)x[i];
    of_thread[threadIdx.x] = sum;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < half) of_thread[threadIdx.x] += of_thread[threadIdx.x + half];
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = of_thread[0];
}

double device_grad_norm(const Model *m) {
    const int64_t chunks = (m->num_elements + SUM_CHUNK - 1) / SUM_CHUNK;
    double *sums = (double *)xmalloc((size_t)chunks * sizeof(double)), total = 0;
    square_sums_kernel<<<(unsigned)chunks, THREADS>>>(scratch.norm_sums, m->twin->grads, m->num_elements);
    LAUNCHED();
    to_host(sums, scratch.norm_sums, chunks * (int64_t)sizeof(double));
    for (int64_t i = 0; i < chunks; i++) total += sums[i];
    free(sums);
    return sqrt(total);
}

typedef struct AdamStep { float b1, b2, eps, clip, rate, inverse, shrink; } AdamStep;

__global__ void adamw_kernel(float *w, float *am, float *av, const float *grad, int64_t n, AdamStep a) {
    const int64_t i = global_thread();
    if (i >= n) return;
    const float g = grad[i] * a.clip;
    am[i] = a.b1 * am[i] + (1 - a.b1) * g;
    av[i] = a.b2 * av[i] + (1 - a.b2) * g * g;
    w[i] -= a.rate * am[i] / (sqrtf(av[i] * a.inverse) + a.eps) + a.shrink * w[i];
}

void device_adamw(Model *m, double lr, double beta1, double beta2, double eps, double decay, int64_t t, double clip) {
    const Model *g = m->twin;
    AdamStep a = {(float)beta1, (float)beta2, (float)eps, (float)clip, (float)(lr / (1 - pow(beta1, (double)t))), (float)(1 / (1 - pow(beta2, (double)t))), 0};
    for (int i = 0; i < m->num_params; i++) {
        const Param *p = &m->params[i];
        a.shrink = (float)(param_decays(p) ? lr * decay : 0);
        adamw_kernel<<<grid(p->count, THREADS), THREADS>>>(g->weights + p->offset, g->adam_m + p->offset, g->adam_v + p->offset, g->grads + p->offset, p->count, a);
        LAUNCHED();
    }
    CUDA(cudaDeviceSynchronize());      // so that a step's time is its own
}

#ifndef NSA_CU_NO_MAIN
int main(int argc, char **argv) {
    program_name = "train_nsacu";
    return train_main(argc, argv);
}
#endif
