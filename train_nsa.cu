/*
nsa.c on the GPU: the same program as train_nsa.c, with the same options, files and log, computed by CUDA.

train_nsa.c is included whole: configuration, data, tokenizer, checkpoints, schedule, log, the training loop, and the CPU
model that test/test_nsa.cu checks this one against. What is added here is one twin for each computation:

    1. utilities       errors, several GPUs (NCCL), memory, sums, matrix products (cuBLASLt)
    2. layers          each one a forward and a backward kernel; shapes and formulas stand above their twins in train_nsa.c
    3. model           memory, forward, backward, AdamW: the device_* functions that the training loop calls

Precision (--dtype) is a template argument F, float or bf16: the type of activations, of their gradients, and of the copy of the
weights that matrix products read. Master weights, AdamW's state, the gradients of weights, everything about softmaxes (scores,
log-sum-exp, gates, routing) and all sums are f32 in both.

Two tiers of kernels: simple ones that take any shape and both types, and for bf16 fast ones on tensor cores (attention with heads
of 64, 128 or 192/128), the attention of heads of 64 and 128 once more for Hopper. No kernel adds with atomics: the same seed gives the same bits.

SPDX-License-Identifier: MIT
*/

#define NSA_GPU
#ifdef NSA_CU_NO_MAIN
#define NSA_NO_MAIN
#endif
#include "train_nsa.c"

#include <cublasLt.h>
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#ifdef USE_NCCL
#include <nccl.h>
#endif
#include <type_traits>

typedef __nv_bfloat16 bf16;

// ----------------------------------------------------------------------------
// 1. Utilities

#define CUDA(call) cuda_check((call), #call, __FILE__, __LINE__)
#define CUBLAS(call) cublas_check((call), #call, __FILE__, __LINE__)

static void cuda_check(cudaError_t status, const char *call, const char *file, int line) {
    if (status != cudaSuccess) die(1, "%s:%d: %s: %s", file, line, call, cudaGetErrorString(status));
}

static void cublas_check(cublasStatus_t status, const char *call, const char *file, int line) {
    if (status != CUBLAS_STATUS_SUCCESS) die(1, "%s:%d: %s: cuBLAS status %d", file, line, call, (int)status);
}

static cublasLtHandle_t cublas;
static void *cublas_workspace;
static cudaDeviceProp gpu;      // all zero until device_open
enum { CUBLAS_WORKSPACE = 32 << 20 };

// ----------------------------------------------------------------------------
// Several GPUs, one a rank. What the hosts say to each other goes the way of train_nsa.c (Ranks there); gradients and weights go from GPU to GPU
// by NCCL, on a stream of their own, so that backward goes on meanwhile.

#ifdef USE_NCCL
#define NCCL(call) nccl_check((call), #call, __FILE__, __LINE__)
static void nccl_check(ncclResult_t status, const char *call, const char *file, int line) {
    if (status != ncclSuccess) die(1, "%s:%d: %s: %s", file, line, call, ncclGetErrorString(status));
}

static ncclComm_t nccl;
static cudaStream_t between_ranks;
static cudaEvent_t computed, reduced;       // what the one stream waits for from the other

// A rank's GPU is its own: two that compute on one would be slower than one rank, and NCCL refuses them.
static void nccl_open(int device, int count) {
    enum { NAME = 320 };
    char name[NAME] = "", *all = (char *)xmalloc((size_t)comm.ranks * NAME);
    ncclUniqueId id;
    CUDA(cudaDeviceGetPCIBusId(name, 64, device));
    if (gethostname(name + strlen(name), NAME - 65) != 0) die(1, "this machine has no name: %s", strerror(errno));
    comm_meet();
    comm_gather(all, name, NAME);
    for (int r = 0; r < comm.ranks; r++)
        for (int other = 0; other < r; other++)
            if (!strcmp(all + r * NAME, all + other * NAME))
                die_together(2, "ranks %d and %d would share one GPU: their machine has %d for more ranks than that: start one rank for each GPU, mpirun -np %d", other, r, count, count);
    free(all);
    if (comm.rank == 0) NCCL(ncclGetUniqueId(&id));
    comm_broadcast(&id, sizeof id);
    NCCL(ncclCommInitRank(&nccl, comm.ranks, id, comm.rank));
    CUDA(cudaStreamCreateWithFlags(&between_ranks, cudaStreamNonBlocking));
    CUDA(cudaEventCreateWithFlags(&computed, cudaEventDisableTiming));
    CUDA(cudaEventCreateWithFlags(&reduced, cudaEventDisableTiming));
    comm_begin();
}

// What NCCL is asked for from here on works on what has been asked of the GPU so far.
static void nccl_after_compute(void) {
    CUDA(cudaEventRecord(computed));
    CUDA(cudaStreamWaitEvent(between_ranks, computed, 0));
}

// Waits until NCCL is done. A rank that is gone would keep the GPU waiting for good: the host must not wait on the GPU for that.
static void nccl_wait(void) {
    Watch w = watch_new();
    cudaError_t status;
    CUDA(cudaEventRecord(reduced, between_ranks));
    while ((status = cudaEventQuery(reduced)) == cudaErrorNotReady) {
        ncclResult_t failed;
        NCCL(ncclCommGetAsyncError(nccl, &failed));
        if (failed != ncclSuccess) die(1, "NCCL: %s: a rank may be gone", ncclGetErrorString(failed));
        if (now_seconds() - w.since > 1) comm_listen(&w);
    }
    CUDA(status);
    free(w.heard);
}

// The shares of [begin,end), as in comm_share: all ranks have `each` numbers, and the last has the rest too.
static void nccl_shares(int64_t begin, int64_t end, int64_t *each, int64_t *mine, int64_t *rest) {
    int64_t to;
    comm_share(begin, end, 0, comm.ranks, mine, &to);
    *each = comm.ranks > 1 ? to - *mine : end - begin;
    *mine = begin + comm.rank * *each;
    *rest = begin + comm.ranks * *each;
}

// The sums of all of x (n), on every rank.
static void nccl_sum(float *x, int64_t n) { NCCL(ncclAllReduce(x, x, (size_t)n, ncclFloat, ncclSum, nccl, between_ranks)); }

// The sums of x[begin..end) over the ranks: all of them, or with -z 1 this rank's share.
static void nccl_reduce(float *x, int64_t begin, int64_t end) {
    int64_t each, mine, rest;
    if (comm.shards == 1) {
        nccl_sum(x + begin, end - begin);
        return;
    }
    nccl_shares(begin, end, &each, &mine, &rest);
    NCCL(ncclGroupStart());
    if (each) NCCL(ncclReduceScatter(x + begin, x + mine, (size_t)each, ncclFloat, ncclSum, nccl, between_ranks));
    if (rest < end) NCCL(ncclReduce(x + rest, x + rest, (size_t)(end - rest), ncclFloat, ncclSum, comm.ranks - 1, nccl, between_ranks));
    NCCL(ncclGroupEnd());
}

// Every rank gets every share of x[begin..end).
template <typename F>
static void nccl_gather(F *x, int64_t begin, int64_t end) {
    const ncclDataType_t type = sizeof(F) == 2 ? ncclBfloat16 : ncclFloat;
    int64_t each, mine, rest;
    nccl_shares(begin, end, &each, &mine, &rest);
    NCCL(ncclGroupStart());
    if (each) NCCL(ncclAllGather(x + mine, x + begin, (size_t)each, type, nccl, between_ranks));
    if (rest < end) NCCL(ncclBroadcast(x + rest, x + rest, (size_t)(end - rest), type, comm.ranks - 1, nccl, between_ranks));
    NCCL(ncclGroupEnd());
}

// As comm_exchange_pieces, of the GPUs' memory. The host waits: what is asked of the GPU next finds everything there.
static void nccl_exchange_pieces(char *in, const char *out, const Pieces *pieces, int64_t B, int64_t bytes, int sums) {
    const int me = own_part(pieces);
    nccl_after_compute();
    NCCL(ncclGroupStart());
    for (int64_t b = 0; b < B; b++)
        for (int i = 0; i < pieces->own; i++)
            for (int part = 0; part < pieces->parts; part++) {
                const int64_t theirs = (b * pieces->all + piece_number(pieces, part, i)) * bytes, mine = (b * pieces->all + piece_number(pieces, me, i)) * bytes;
                if (part == me) continue;
                NCCL(ncclSend(out + (sums ? theirs : mine), (size_t)bytes, ncclChar, comm.rank - me + part, nccl, between_ranks));
                NCCL(ncclRecv(in + theirs, (size_t)bytes, ncclChar, comm.rank - me + part, nccl, between_ranks));
            }
    NCCL(ncclGroupEnd());
    nccl_wait();
}
#else       // with one rank there is nobody to talk to, and nccl_open lets no more start
static void nccl_open(int device, int count) {
    (void)device, (void)count;
    die(2, "%d ranks need NCCL, and %s was built without: install it (libnccl2 and libnccl-dev, https://developer.nvidia.com/nccl) and make again", comm.ranks, program_name);
}
static void nccl_after_compute(void) {}
static void nccl_wait(void) {}
static void nccl_reduce(float *x, int64_t begin, int64_t end) { (void)x, (void)begin, (void)end; }
template <typename F> static void nccl_gather(F *x, int64_t begin, int64_t end) { (void)x, (void)begin, (void)end; }
static void nccl_sum(float *x, int64_t n) { (void)x, (void)n; }
static void nccl_exchange_pieces(char *in, const char *out, const Pieces *pieces, int64_t B, int64_t bytes, int sums) { (void)in, (void)out, (void)pieces, (void)B, (void)bytes, (void)sums; }
#endif

// The first GPU that the system shows (CUDA_VISIBLE_DEVICES chooses), the second for the second rank of a machine, and so on. Called
// before anything else of CUDA.
static void device_open(void) {
    if (gpu.major) return;
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess || count == 0)
        die(1, "no GPU to compute on (%s): train_nsa and sample are the same programs for the CPU", status != cudaSuccess ? cudaGetErrorString(status) : "none is visible");
    const int device = comm.local_rank % count;     // a launcher may show each rank one GPU
    CUDA(cudaSetDevice(device));
    CUDA(cudaGetDeviceProperties(&gpu, device));
    if (comm.ranks > 1) nccl_open(device, count);
    CUBLAS(cublasLtCreate(&cublas));
    CUDA(cudaMalloc(&cublas_workspace, CUBLAS_WORKSPACE));
}

// Where there is no GPU, memory is counted for an H100.
void device_plan(void) {
    int count = 0;
    if (cudaGetDeviceCount(&count) == cudaSuccess && count > 0) return;
    (void)cudaGetLastError();
    gpu.major = 9;
    gpu.multiProcessorCount = 132;
    gpu.sharedMemPerBlockOptin = 227 << 10;
    gpu.sharedMemPerMultiprocessor = 228 << 10;
    gpu.reservedSharedMemPerBlock = 1 << 10;
}

int64_t device_memory(void) {
    size_t free_bytes = 0, total = 0;
    device_open();
    CUDA(cudaMemGetInfo(&free_bytes, &total));
    return (int64_t)free_bytes;
}

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

// Memory is counted (memory NULL) and then carved by the same calls, so that what is printed is what is taken.
typedef struct Carver { char *memory; int64_t used; } Carver;
template <typename X>
static void carve(Carver *m, X **p, int64_t n) {
    *p = m->memory ? (X *)(m->memory + m->used) : NULL;
    m->used += round_up(n * (int64_t)sizeof(X), 256);
}

// Kernels of one thread an item take grid(items, THREADS) blocks, those of one warp an item grid(items, WARPS).
enum { THREADS = 256, WARP = 32, WARPS = THREADS / WARP };
static unsigned grid(int64_t items, int64_t per_block) {
    const int64_t blocks = (items + per_block - 1) / per_block;
    if (blocks > INT_MAX) die(1, "internal error: a kernel of %" PRId64 " blocks", blocks);
    return (unsigned)blocks;
}
static void launched(const char *file, int line) { cuda_check(cudaGetLastError(), "kernel", file, line); }
#define LAUNCHED() launched(__FILE__, __LINE__)

// Lets a kernel take `bytes` of a block's shared memory.
template <typename Kernel>
static void allow_shared(Kernel *kernel, int64_t bytes, const char *what, const char *fix) {
    const int64_t most = (int64_t)gpu.sharedMemPerBlockOptin;
    if (bytes > most) die(2, "%s needs %" PRId64 " bytes of a GPU block's memory and this GPU has %" PRId64 ": use %s", what, bytes, most, fix);
    CUDA(cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
}

__device__ static inline int64_t global_thread(void) { return (int64_t)blockIdx.x * blockDim.x + threadIdx.x; }
__device__ static inline int64_t global_warp(void) { return global_thread() / WARP; }
__device__ static inline int lane(void) { return (int)(threadIdx.x % WARP); }
DEVICE static inline int min32(int a, int b) { return a < b ? a : b; }
DEVICE static inline int max32(int a, int b) { return a > b ? a : b; }

__device__ static inline float warp_sum(float x) {
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}
__device__ static inline float warp_max(float x) {
    for (int step = WARP / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

// N neighbours that are loaded and stored at once: kernels that only pass through memory take 16 bytes a thread where sizes allow,
// else N = 1.
template <typename F, int N> struct alignas(sizeof(F) * N) Pack { F of[N]; };
template <typename F> constexpr int pack_size = 16 / (int)sizeof(F);
template <int N, typename F> __device__ static inline Pack<F, N> load(const F *p) { return *(const Pack<F, N> *)p; }
template <int N, typename F> __device__ static inline void store(F *p, const Pack<F, N> &x) { *(Pack<F, N> *)p = x; }
template <typename F> static inline int packs(int64_t size) { return size % pack_size<F> == 0; }

// ----------------------------------------------------------------------------
// Matrix products, all through cuBLASLt. Which of its kernels is best for a product it is asked once, and the answer kept.

template <typename X> constexpr cudaDataType_t cuda_type = std::is_same<X, float>::value ? CUDA_R_32F : CUDA_R_16BF;

// What decides the kernel. As bytes, with no gaps: it is compared with memcmp.
typedef struct Product {
    int64_t m, n, k, lda, ldb, ldc, batch, stride_a, stride_b, stride_c;
    int32_t turn_a, turn_b, type_in, type_out, accumulate, alignment;
} Product;
typedef struct ProductPlan {
    Product product;
    cublasLtMatmulDesc_t call;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulAlgo_t algorithm;
} ProductPlan;

static cublasLtMatrixLayout_t matrix_layout(cudaDataType_t type, int64_t rows, int64_t cols, int64_t ld, int64_t batch, int64_t stride) {
    cublasLtMatrixLayout_t layout;
    const int32_t count = (int32_t)batch;
    CUBLAS(cublasLtMatrixLayoutCreate(&layout, type, (uint64_t)rows, (uint64_t)cols, ld));
    CUBLAS(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count));
    CUBLAS(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride, sizeof stride));
    return layout;
}

// cuBLAS counts columns first: a row-major matrix is its own transpose there, hence b before a.
static void product_plan(ProductPlan *plan, const Product *p) {
    const cublasOperation_t first = p->turn_b ? CUBLAS_OP_T : CUBLAS_OP_N, second = p->turn_a ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cudaDataType_t in = (cudaDataType_t)p->type_in, out = (cudaDataType_t)p->type_out;
    const size_t workspace = CUBLAS_WORKSPACE;
    const uint32_t alignment = (uint32_t)p->alignment;
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulHeuristicResult_t best;
    int found = 0;
    plan->product = *p;
    CUBLAS(cublasLtMatmulDescCreate(&plan->call, CUBLAS_COMPUTE_32F, CUDA_R_32F));      // without TF32
    CUBLAS(cublasLtMatmulDescSetAttribute(plan->call, CUBLASLT_MATMUL_DESC_TRANSA, &first, sizeof first));
    CUBLAS(cublasLtMatmulDescSetAttribute(plan->call, CUBLASLT_MATMUL_DESC_TRANSB, &second, sizeof second));
    plan->b = p->turn_b ? matrix_layout(in, p->k, p->n, p->ldb, p->batch, p->stride_b) : matrix_layout(in, p->n, p->k, p->ldb, p->batch, p->stride_b);
    plan->a = p->turn_a ? matrix_layout(in, p->m, p->k, p->lda, p->batch, p->stride_a) : matrix_layout(in, p->k, p->m, p->lda, p->batch, p->stride_a);
    plan->c = matrix_layout(out, p->n, p->m, p->ldc, p->batch, p->stride_c);
    CUBLAS(cublasLtMatmulPreferenceCreate(&preference));
    CUBLAS(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace));
    const cublasLtMatmulPreferenceAttributes_t aligned[] = {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                                                            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    for (int i = 0; i < 4; i++) CUBLAS(cublasLtMatmulPreferenceSetAttribute(preference, aligned[i], &alignment, sizeof alignment));
    CUBLAS(cublasLtMatmulAlgoGetHeuristic(cublas, plan->call, plan->b, plan->a, plan->c, plan->c, preference, 1, &best, &found));
    if (!found) die(1, "cuBLAS knows no kernel for a product of (%" PRId64 ",%" PRId64 ") and (%" PRId64 ",%" PRId64 ")", p->m, p->k, p->k, p->n);
    CUBLAS(cublasLtMatmulPreferenceDestroy(preference));
    plan->algorithm = best.algo;
}

static const ProductPlan *product_find(const Product *p) {
    enum { PLANS = 1024 };      // a model has a few dozen; mixtures of experts without grouped products many
    static ProductPlan *plans[PLANS];
    ProductPlan **place = &plans[hash_more(HASH_START, p, sizeof *p) % PLANS];
    if (*place && memcmp(&(*place)->product, p, sizeof *p) == 0) return *place;
    if (*place) {       // two products that share a place take turns
        const cublasLtMatrixLayout_t layouts[] = {(*place)->a, (*place)->b, (*place)->c};
        for (int i = 0; i < 3; i++) CUBLAS(cublasLtMatrixLayoutDestroy(layouts[i]));
        CUBLAS(cublasLtMatmulDescDestroy((*place)->call));
    } else {
        *place = (ProductPlan *)xcalloc(1, sizeof(ProductPlan));
    }
    product_plan(*place, p);
    return *place;
}

// The largest power of two up to 16 that divides every address given.
static int32_t alignment_of(const void *a, const void *b, const void *c) {
    const uintptr_t all = (uintptr_t)a | (uintptr_t)b | (uintptr_t)c | 16;
    return (int32_t)(all & (~all + 1));
}

// c (m,n) = or += op(a) (m,k) · op(b) (k,n), row-major, rows ld apart, `batch` times with strides; op turns a matrix on its side.
template <typename In, typename Out>
static void gemm(int64_t m, int64_t n, int64_t k, const In *a, int64_t lda, int turn_a, const In *b, int64_t ldb, int turn_b,
                 Out *c, int64_t ldc, int accumulate, int64_t batch = 1, int64_t stride_a = 0, int64_t stride_b = 0, int64_t stride_c = 0) {
    if (m == 0 || n == 0 || k == 0 || batch == 0) return;
    Product p;
    memset(&p, 0, sizeof p);
    p.m = m, p.n = n, p.k = k, p.lda = lda, p.ldb = ldb, p.ldc = ldc;
    p.batch = batch, p.stride_a = stride_a, p.stride_b = stride_b, p.stride_c = stride_c;
    p.turn_a = turn_a, p.turn_b = turn_b, p.type_in = cuda_type<In>, p.type_out = cuda_type<Out>, p.accumulate = accumulate;
    p.alignment = alignment_of(a, b, c);
    const ProductPlan *plan = product_find(&p);
    const float one = 1, beta = accumulate ? 1.0f : 0.0f;
    CUBLAS(cublasLtMatmul(cublas, plan->call, &one, b, plan->b, a, plan->a, &beta, c, plan->c, c, plan->c, &plan->algorithm, cublas_workspace, CUBLAS_WORKSPACE, 0));
}

// out (N,OC) = inp (N,C) · weight (OC,C)ᵀ
template <typename F, typename Out>
static void gpu_linear_forward(Out *out, int64_t out_row, const F *inp, int64_t inp_row, const F *weight, int64_t n, int64_t c, int64_t oc) {
    gemm(n, oc, c, inp, inp_row, 0, weight, c, 1, out, out_row, 0);
}

// dinp (N,C) = or += dout (N,OC) · weight; dweight (OC,C) += doutᵀ · inp. dinp may be NULL.
template <typename F>
static void gpu_linear_backward(F *dinp, int64_t dinp_row, float *dweight, const F *dout, int64_t dout_row, const F *inp, int64_t inp_row,
                                const F *weight, int64_t n, int64_t c, int64_t oc, int accumulate_dinp) {
    if (dinp) gemm(n, c, oc, dout, dout_row, 0, weight, c, 0, dinp, dinp_row, accumulate_dinp);
    if (dweight) gemm(oc, c, n, dout, dout_row, 1, inp, inp_row, 0, dweight, c, 1);
}

// ----------------------------------------------------------------------------
// Tensor cores and asynchronous copies, as functions. CUDA on the CPU has its own.

// Code for Hopper's own instructions: kernels of these are empty, and what they call is not called, where another architecture is compiled.
#if defined __CUDA_ARCH_FEAT_SM90_ALL
#define HOPPER_CODE 1
#else
#define HOPPER_CODE 0
#endif
#define HOPPER_DEVICE [[maybe_unused]] __device__

#ifdef CUDA_ON_CPU
static inline void mma_16816(float d[4], const unsigned a[4], const unsigned b[2]) { emu_mma_16816(d, a, b); }
static inline void mma_16816_f16(float d[4], const unsigned a[4], const unsigned b[2]) { emu_mma_16816_f16(d, a, b); }
static inline void ldmatrix_x4(unsigned r[4], const void *row) { emu_ldmatrix_x4(r, row, false); }
static inline void ldmatrix_x4_turned(unsigned r[4], const void *row) { emu_ldmatrix_x4(r, row, true); }
static inline void cp_async_16(void *to, const void *from, int filled) { emu_cp_async(to, from, 16, filled); }
static inline void cp_async_4(void *to, const void *from, int filled) { emu_cp_async(to, from, 4, filled); }
static inline void cp_async_8(void *to, const void *from) { emu_cp_async(to, from, 8, 8); }
static inline void cp_async_commit(void) { emu_cp_async_commit(); }
template <int LEFT> static inline void cp_async_wait(void) { emu_cp_async_wait(LEFT); }
static inline float power_of_2(float x) { return exp2f(x); }
static inline float fast_divide(float x, float y) { return x / y; }
static inline unsigned two_f16(float low, float high) { return emu_f16(low) | emu_f16(high) << 16; }
static inline float2 floats_of_f16(unsigned pair) { return make_float2(emu_float_of_f16(pair & 0xffff), emu_float_of_f16(pair >> 16)); }
static inline unsigned shared_address(const void *p) { return emu_shared_address(p); }
template <int N> static inline void wgmma(float (*d)[4], uint64_t a, uint64_t b, int add) { emu_wgmma(d, N, nullptr, a, b, add, false); }
template <int N> static inline void wgmma_turned(float (*d)[4], const unsigned a[4], uint64_t b) { emu_wgmma(d, N, a, 0, b, 1, true); }
static inline void wgmma_begin(void) {}
static inline void wgmma_commit(void) { emu_wgmma_commit(); }
template <int LEFT> static inline void wgmma_wait(void) { emu_wgmma_wait(LEFT); }
template <int N> static inline void wgmma_done(float (*)[4]) {}
static inline void barrier_init(uint64_t *barrier, int arrivals) { emu_barrier_init(barrier, arrivals); }
static inline void barriers_ready(void) {}
static inline void barrier_arrive(uint64_t *barrier) { emu_barrier_arrive(barrier, 0); }
static inline void barrier_arrive_copied(uint64_t *barrier) { emu_barrier_arrive_copied(barrier); }
static inline void barrier_expect(uint64_t *barrier, int bytes) { emu_barrier_arrive(barrier, bytes); }
static inline void barrier_wait(uint64_t *barrier, int parity) { emu_barrier_wait(barrier, parity); }
static inline void copy_box(bf16 *to, const CUtensorMap *map, int column, int head, int token, int batch, uint64_t *barrier) { emu_copy_box(to, map, column, head, token, batch, barrier); }
static inline void shared_written(void) {}
static inline void threads_sync(int id, int threads) { emu_named_barrier(id, threads, true); }
static inline void threads_arrive(int id, int threads) { emu_named_barrier(id, threads, false); }
template <int N> static inline void registers_fewer(void) {}
template <int N> static inline void registers_more(void) {}
#else
__device__ static inline unsigned shared_address(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }

// d (16,8) += a (16,16) · b (16,8), bf16 into f32, by a warp.
__device__ static inline void mma_16816(float d[4], const unsigned a[4], const unsigned b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The same of numbers with 11 digits.
HOPPER_DEVICE static inline void mma_16816_f16(float d[4], const unsigned a[4], const unsigned b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Four matrices (8,8): lane i names row i % 8 of matrix i / 8; a lane gets row lane / 4, columns 2·(lane % 4) and the next of each.
__device__ static inline void ldmatrix_x4(unsigned r[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ static inline void ldmatrix_x4_turned(unsigned r[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
// 16 bytes into shared memory, of which `filled` are copied and the rest are zero.
__device__ static inline void cp_async_16(void *to, const void *from, int filled) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(shared_address(to)), "l"(from), "r"(filled) : "memory");
}
__device__ static inline void cp_async_4(void *to, const void *from, int filled) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" :: "r"(shared_address(to)), "l"(from), "r"(filled) : "memory");
}
HOPPER_DEVICE static inline void cp_async_8(void *to, const void *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" :: "r"(shared_address(to)), "l"(from) : "memory");
}
__device__ static inline void cp_async_commit(void) { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ static inline void cp_async_wait(void) { asm volatile("cp.async.wait_group %0;" :: "n"(LEFT) : "memory"); }
__device__ static inline float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ static inline float fast_divide(float x, float y) { return __fdividef(x, y); }
// Two numbers of 16 bits, 11 of them digits.
HOPPER_DEVICE static inline unsigned two_f16(float low, float high) {
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
HOPPER_DEVICE static inline float2 floats_of_f16(unsigned pair) {
    float2 x;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}" : "=f"(x.x), "=f"(x.y) : "r"(pair));
    return x;
}

// What Hopper has beyond that (sm_90a): matrix products by a warpgroup, four warps in step, on factors in shared memory, that go on while the
// threads do other work; copies of boxes by the copy engine; barriers in shared memory that count arrivals and bytes.
//
// d (64,N) = [d +] a (64,16) · b (16,N), bf16 into f32. Warp w of the four holds rows 16w .. 16w+15 of d, in each group of 8 columns as mma_16816 does.
// Factors in shared memory are named by a descriptor (swizzled_matrix). wgmma: a lies as (64,16), b as (N,16). wgmma_turned: a is in registers, as for
// mma_16816, b lies as (16,N), and the product is added. Between issue and wgmma_wait nothing may touch d, nor a in registers.
template <int N> __device__ static inline void wgmma(float (*d)[4], uint64_t a, uint64_t b, int add);
template <int N> __device__ static inline void wgmma_turned(float (*d)[4], const unsigned a[4], uint64_t b);

// The registers of d as operands, and their names.
#define SUM(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define SUMS_64 SUM(0), SUM(1), SUM(2), SUM(3), SUM(4), SUM(5), SUM(6), SUM(7)
#define SUMS_112 SUMS_64, SUM(8), SUM(9), SUM(10), SUM(11), SUM(12), SUM(13)
#define SUMS_128 SUMS_112, SUM(14), SUM(15)
#define NAMES_64 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
                 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES_112 NAMES_64 "," \
                  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
                  "%48,%49,%50,%51,%52,%53,%54,%55"
#define NAMES_128 NAMES_112 ",%56,%57,%58,%59,%60,%61,%62,%63"
template <> HOPPER_DEVICE inline void wgmma<64>(float (*d)[4], uint64_t a, uint64_t b, int add) {
    asm volatile("{.reg .pred add; setp.ne.b32 add, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES_64 "}, %32, %33, add, 1, 1, 0, 0;}"
                 : SUMS_64 : "l"(a), "l"(b), "r"(add));
}
template <> HOPPER_DEVICE inline void wgmma_turned<64>(float (*d)[4], const unsigned a[4], uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES_64 "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
                 : SUMS_64 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
template <> HOPPER_DEVICE inline void wgmma<112>(float (*d)[4], uint64_t a, uint64_t b, int add) {
    asm volatile("{.reg .pred add; setp.ne.b32 add, %58, 0; wgmma.mma_async.sync.aligned.m64n112k16.f32.bf16.bf16 {" NAMES_112 "}, %56, %57, add, 1, 1, 0, 0;}"
                 : SUMS_112 : "l"(a), "l"(b), "r"(add));
}
template <> HOPPER_DEVICE inline void wgmma<128>(float (*d)[4], uint64_t a, uint64_t b, int add) {
    asm volatile("{.reg .pred add; setp.ne.b32 add, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES_128 "}, %64, %65, add, 1, 1, 0, 0;}"
                 : SUMS_128 : "l"(a), "l"(b), "r"(add));
}
template <> HOPPER_DEVICE inline void wgmma_turned<128>(float (*d)[4], const unsigned a[4], uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES_128 "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
                 : SUMS_128 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#undef SUM
#undef SUMS_64
#undef SUMS_112
#undef SUMS_128
#undef NAMES_64
#undef NAMES_112
#undef NAMES_128

// Registers that were written since the last product may be its factors and sums. Products up to wgmma_commit are a group; wgmma_wait<LEFT> waits
// until at most LEFT groups are on their way, and wgmma_done tells the compiler that a result is new from there on.
HOPPER_DEVICE static inline void wgmma_begin(void) { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
HOPPER_DEVICE static inline void wgmma_commit(void) { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> __device__ static inline void wgmma_wait(void) { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(LEFT) : "memory"); }
template <int N> __device__ static inline void wgmma_done(float (*d)[4]) {
    #pragma unroll
    for (int n = 0; n < N / 8; n++) asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3]) :: "memory");
}

// A barrier's phase ends when `arrivals` have arrived and all expected bytes have come; waiting is for the end of the phase of that parity.
HOPPER_DEVICE static inline void barrier_init(uint64_t *barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
HOPPER_DEVICE static inline void barriers_ready(void) { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ static inline void barrier_arrive(uint64_t *barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared_address(barrier)) : "memory"); }
// Arrives when all that this thread has asked for with cp_async is there.
HOPPER_DEVICE static inline void barrier_arrive_copied(uint64_t *barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(shared_address(barrier)) : "memory");
}
HOPPER_DEVICE static inline void barrier_expect(uint64_t *barrier, int bytes) {       // and arrive
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(shared_address(barrier)), "r"(bytes) : "memory");
}
HOPPER_DEVICE static inline void barrier_wait(uint64_t *barrier, int parity) {
    int done;
    do {
        asm volatile("{.reg .pred done; mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2; selp.b32 %0, 1, 0, done;}"
                     : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
    } while (!done);
}
// The box of the map at these coordinates, in rows of 128 bytes whose chunks of 16 are mixed up as chunk_of<64> does.
HOPPER_DEVICE static inline void copy_box(bf16 *to, const CUtensorMap *map, int column, int head, int token, int batch, uint64_t *barrier) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5,%6}], [%2];"
                 :: "r"(shared_address(to)), "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(head), "r"(token), "r"(batch) : "memory");
}
// What this thread has written to shared memory, or read there, comes before what matrix products and copy engine do after the next barrier.
HOPPER_DEVICE static inline void shared_written(void) { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Barriers among some of a block's threads: `threads` in all arrive, and those that sync wait for the rest.
HOPPER_DEVICE static inline void threads_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory"); }
HOPPER_DEVICE static inline void threads_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" :: "r"(id), "r"(threads) : "memory"); }
// A warpgroup that copies leaves registers to those that compute.
template <int N> __device__ static inline void registers_fewer(void) { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(N)); }
template <int N> __device__ static inline void registers_more(void) { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(N)); }
#endif

// ----------------------------------------------------------------------------
// Matrix products of many experts in one launch. Rows are sorted by expert, those of expert e are start[e] .. start[e+1] of
// GPU memory: the host never learns how many. It launches as many blocks as there can be tiles; each finds its own expert and
// rows, or that there are none. Every number is summed by one thread in one order: the same bits always.

typedef struct Groups {
    const int64_t *start;       // (E+1), on the GPU
    int E;
    int64_t rows;               // at most
} Groups;

// A factor as it lies in memory: row r at x + (list ? list[r] : r)·columns; none from `rows` on.
template <typename F>
struct Factor {
    const F *x;
    const int *list;
    int rows, columns;
    __device__ const F *at(int row, int column) const { return x + (int64_t)(list ? list[row] : row) * columns + column; }
    __device__ int holds(int row, int column) const { return row < rows && column < columns; }
};

// What becomes of a product: it is stored, or added to a gradient.
template <typename F>
struct Store {
    F *out;
    int64_t columns;
    __device__ void one(int row, int column, float x) const { out[row * columns + column] = (F)x; }
    __device__ void two(int row, int column, float x, float y) const { *(__nv_bfloat162 *)(out + row * columns + column) = __floats2bfloat162_rn(x, y); }
};
struct Add {
    float *out;
    int64_t columns;
    __device__ void one(int row, int column, float x) const { out[row * columns + column] += x; }
    __device__ void two(int row, int column, float x, float y) const {
        float2 *at = (float2 *)(out + row * columns + column);
        *at = make_float2(at->x + x, at->y + y);
    }
};

// A block's tile of a product, out (TILE,TILE) = Σ_k a(row, k)·b(column, k). A factor lies with k along its rows, or turned: its
// rows are the k and its columns the tile's rows or columns. This tier is for any type and shape: a thread makes 4 x 4 numbers.
template <typename F, bool TURN_A, bool TURN_B>
struct SimpleProduct {
    enum { TILE = 64, DEPTH = 16, BLOCK = 256, BLOCKS = 2, BYTES = 0, EACH = 4, ACROSS = TILE / EACH };
    typedef float Tile[DEPTH][TILE + 4];
    float d[EACH][EACH];

    template <bool TURN>
    __device__ static void fill(Tile tile, const Factor<F> &x, int from, int k) {
        for (int i = threadIdx.x; i < TILE * DEPTH; i += BLOCK) {
            const int place = TURN ? i % TILE : i / DEPTH, depth = TURN ? i / TILE : i % DEPTH;
            const int row = TURN ? k + depth : from + place, column = TURN ? from + place : k + depth;
            tile[depth][place] = x.holds(row, column) ? (float)*x.at(row, column) : 0;
        }
    }

    __device__ void multiply(const Factor<F> &a, int a_from, const Factor<F> &b, int b_from, int k, int k_end) {
        __shared__ Tile as, bs;
        const int row = threadIdx.x / ACROSS * EACH, column = threadIdx.x % ACROSS * EACH;
        for (int i = 0; i < EACH * EACH; i++) d[i / EACH][i % EACH] = 0;
        for (; k < k_end; k += DEPTH) {
            fill<TURN_A>(as, a, a_from, k);
            fill<TURN_B>(bs, b, b_from, k);
            __syncthreads();
            for (int p = 0; p < DEPTH; p++)
                for (int i = 0; i < EACH * EACH; i++) d[i / EACH][i % EACH] += as[p][row + i / EACH] * bs[p][column + i % EACH];
            __syncthreads();
        }
    }

    template <typename To>
    __device__ void put(const To &to, int row, int rows, int column, int columns) const {
        row += threadIdx.x / ACROSS * EACH;
        column += threadIdx.x % ACROSS * EACH;
        for (int i = 0; i < EACH; i++)
            for (int j = 0; j < EACH; j++)
                if (row + i < rows && column + j < columns) to.one(row + i, column + j, d[i][j]);
    }
};

// The same by tensor cores, for bf16 whose rows are a multiple of 16 bytes and begin at one. Four warps make (64,64) each: at that
// size shared memory feeds the tensor cores with time to spare. Tiles of both factors come STAGES - 1 ahead of their use.
template <bool TURN_A, bool TURN_B>
struct FastProduct {
    enum { TILE = 128, DEPTH = 64, STAGES = 3, BLOCK = 128, BLOCKS = 2, NUMBERS = TILE * DEPTH, BYTES = STAGES * 2 * NUMBERS * 2, EACH = NUMBERS / 8 / BLOCK, PART = 64 };
    float d[PART / 16][PART / 8][4];

    __device__ static int part_row(void) { return threadIdx.x / WARP / 2 * PART; }
    __device__ static int part_column(void) { return threadIdx.x / WARP % 2 * PART; }

    // Numbers lie in chunks of 16 bytes; those of row r change places by r % 8, so that eight rows of a column of chunks, which
    // ldmatrix reads together, are in different banks.
    template <bool TURN>
    __device__ static int place(int row, int chunk) { return row * Lines<TURN>::LENGTH + (chunk ^ (row & 7)) * 8; }

    // A tile as it is copied: a thread takes one chunk of EACH of its lines, STEP lines apart.
    template <bool TURN>
    struct Lines {
        enum { LENGTH = TURN ? TILE : DEPTH, CHUNKS = LENGTH / 8, STEP = BLOCK / CHUNKS };
        int row[EACH];          // of the factor
        __device__ static int line(void) { return threadIdx.x / CHUNKS; }
        __device__ static int chunk(void) { return threadIdx.x % CHUNKS; }

        // Lines behind the last row read that again: the product does not keep theirs, or they are made zero.
        __device__ void find(const Factor<bf16> &x, int from) {
            const int first = from + line(), last = x.rows - 1;
            #pragma unroll
            for (int i = 0; i < EACH; i++) row[i] = first + i * STEP < last ? first + i * STEP : last;
            if (!x.list) return;
            #pragma unroll
            for (int i = 0; i < EACH; i++) row[i] = x.list[row[i]];
        }

        // What is behind the end of k is zero; what is behind that of the product's rows or columns is anything.
        __device__ void fetch(bf16 *tile, const Factor<bf16> &x, int from, int k) {
            if (TURN) find(x, k);
            const int column = (TURN ? from : k) + chunk() * 8, inside = column < x.columns, row_bytes = x.columns * (int)sizeof(bf16);
            const char *source = (const char *)(x.x + (inside ? column : 0));
            bf16 *to = tile + place<TURN>(line(), chunk());
            #pragma unroll
            for (int i = 0; i < EACH; i++)
                cp_async_16(to + i * STEP * LENGTH, source + (int64_t)row[i] * row_bytes, (TURN ? k + line() + i * STEP < x.rows : inside) ? 16 : 0);
        }
    };

    // 16 places (rows or columns of the product) by 16 k: the lane's eight lines begin at `at` and k.
    template <bool TURN>
    __device__ static void fragment(unsigned r[4], const bf16 *tile, int at, int k) {
        const bf16 *row = tile + place<TURN>((TURN ? k : at) + lane() % 8, (TURN ? at : k) / 8);
        if (TURN) ldmatrix_x4_turned(r, row);
        else ldmatrix_x4(r, row);
    }

    __device__ void multiply_tile(const bf16 *as, const bf16 *bs) {
        const int near = lane() / 8 % 2 * 8, far = lane() / 16 * 8;     // a's registers go by place first, b's by k
        #pragma unroll
        for (int k = 0; k < DEPTH; k += 16) {
            unsigned a[PART / 16][4], b[PART / 16][4];
            #pragma unroll
            for (int i = 0; i < PART / 16; i++) fragment<TURN_A>(a[i], as, part_row() + i * 16 + near, k + far);
            #pragma unroll
            for (int j = 0; j < PART / 16; j++) fragment<TURN_B>(b[j], bs, part_column() + j * 16 + far, k + near);
            #pragma unroll
            for (int i = 0; i < PART / 16; i++)
                #pragma unroll
                for (int j = 0; j < PART / 8; j++) mma_16816(d[i][j], a[i], b[j / 2] + j % 2 * 2);
        }
    }

    __device__ void multiply(const Factor<bf16> &a, int a_from, const Factor<bf16> &b, int b_from, int k, int k_end) {
        extern __shared__ uint4 product_tiles[];
        bf16 *tiles = (bf16 *)product_tiles;
        const int count = (k_end - k + DEPTH - 1) / DEPTH;
        Lines<TURN_A> a_lines;
        Lines<TURN_B> b_lines;
        if (!TURN_A) a_lines.find(a, a_from);       // the same rows for every tile
        if (!TURN_B) b_lines.find(b, b_from);
        #pragma unroll
        for (int i = 0; i < PART / 16 * (PART / 8) * 4; i++) d[i / 32][i / 4 % 8][i % 4] = 0;
        for (int next = 0; next < count + STAGES - 1; next++) {
            const int now = next - (STAGES - 1);
            if (now >= 0) {         // tile `now` is there for all, and the one before it, whose place `next` takes, is done with
                cp_async_wait<STAGES - 2>();
                __syncthreads();
            }
            bf16 *to = tiles + next % STAGES * 2 * NUMBERS;
            if (next < count) {
                a_lines.fetch(to, a, a_from, k + next * DEPTH);
                b_lines.fetch(to + NUMBERS, b, b_from, k + next * DEPTH);
            }
            cp_async_commit();
            if (now >= 0) multiply_tile(tiles + now % STAGES * 2 * NUMBERS, tiles + (now % STAGES * 2 + 1) * NUMBERS);
        }
    }

    template <typename To>
    __device__ void put(const To &to, int row, int rows, int column, int columns) const {
        row += part_row() + lane() / 4;
        column += part_column() + lane() % 4 * 2;
        #pragma unroll
        for (int i = 0; i < PART / 8; i++)
            #pragma unroll
            for (int j = 0; j < PART / 8; j++)
                if (row + i * 8 < rows && column + j * 8 < columns) to.two(row + i * 8, column + j * 8, d[i / 2][j][i % 2 * 2], d[i / 2][j][i % 2 * 2 + 1]);
    }
};

// Rows from .. to of an expert; expert -1: there are none.
typedef struct Piece { int expert, from, to; } Piece;

// The index-th of the pieces of `size` rows that every expert's rows are cut into; `to` is the end of the expert's rows. A warp
// looks together, each lane at one expert: lanes sum the pieces up to theirs, and the first whose sum is over index has it.
__device__ static inline Piece find_piece(const Groups &g, int index, int size) {
    for (int e = 0; e < g.E; e += WARP) {
        const int mine = e + lane(), from = mine < g.E ? (int)g.start[mine] : 0, to = mine < g.E ? (int)g.start[mine + 1] : 0;
        const int pieces = (to - from + size - 1) / size;
        int sum = pieces;
        for (int step = 1; step < WARP; step *= 2) {
            const int before = __shfl_up_sync(~0u, sum, step);
            if (lane() >= step) sum += before;
        }
        const unsigned over = __ballot_sync(~0u, sum > index);
        if (over) {
            const int owner = __ffs((int)over) - 1;
            const int at = from + (index - sum + pieces) * size;
            return {e + owner, __shfl_sync(~0u, at, owner), __shfl_sync(~0u, to, owner)};
        }
        index -= __shfl_sync(~0u, sum, WARP - 1);
    }
    return {-1, 0, 0};
}

// out (R,OUT) = inp (R,IN) · the expert's weight, which lies (OUT,IN), or where the product turns it (IN,OUT).
template <typename P, typename F>
__global__ void __launch_bounds__(P::BLOCK, P::BLOCKS) grouped_rows_kernel(F *out, int columns, Factor<F> inp, Factor<F> weight, int64_t stride, Groups g) {
    const int across = (columns + P::TILE - 1) / P::TILE, column = blockIdx.x % across * P::TILE;
    const Piece piece = find_piece(g, blockIdx.x / across, P::TILE);
    if (piece.expert < 0) return;
    inp.rows = piece.to;
    weight.x += piece.expert * stride;
    P product;
    product.multiply(inp, piece.from, weight, column, 0, inp.columns);
    product.put(Store<F>{out, columns}, piece.from, piece.to, column, columns);
}

// dweight of expert e (OC,C) += dout[rows of e] (.,OC)ᵀ · inp[rows of e] (.,C)
template <typename P, typename F>
__global__ void __launch_bounds__(P::BLOCK, P::BLOCKS) grouped_dweight_kernel(float *dweight, int64_t stride, Factor<F> dout, Factor<F> inp, Groups g) {
    const int down = (dout.columns + P::TILE - 1) / P::TILE, across = (inp.columns + P::TILE - 1) / P::TILE;
    const int expert = blockIdx.x / (down * across), row = blockIdx.x / across % down * P::TILE, column = blockIdx.x % across * P::TILE;
    const int from = (int)g.start[expert], to = (int)g.start[expert + 1];
    if (from == to) return;
    dout.rows = inp.rows = to;
    P product;
    product.multiply(dout, row, inp, column, from, to);
    product.put(Add{dweight + expert * stride, inp.columns}, row, dout.columns, column, inp.columns);
}

template <typename P, typename F>
static void grouped_rows(F *out, int64_t columns, Factor<F> inp, Factor<F> weight, int64_t stride, const Groups *g) {
    const int64_t pieces = min64(g->rows, g->rows / P::TILE + g->E), across = (columns + P::TILE - 1) / P::TILE;
    if (pieces * across == 0) return;
    allow_shared(grouped_rows_kernel<P, F>, P::BYTES, "a mixture of experts in bf16", "--dtype f32");
    grouped_rows_kernel<P, F><<<grid(pieces * across, 1), P::BLOCK, P::BYTES>>>(out, (int)columns, inp, weight, stride, *g);
    LAUNCHED();
}

template <typename P, typename F>
static void grouped_weights(float *dweight, int64_t stride, Factor<F> dout, Factor<F> inp, const Groups *g) {
    const int64_t down = (dout.columns + P::TILE - 1) / P::TILE, across = (inp.columns + P::TILE - 1) / P::TILE;
    if (g->E * down * across == 0) return;
    allow_shared(grouped_dweight_kernel<P, F>, P::BYTES, "a mixture of experts in bf16", "--dtype f32");
    grouped_dweight_kernel<P, F><<<grid(g->E * down * across, 1), P::BLOCK, P::BYTES>>>(dweight, stride, dout, inp, *g);
    LAUNCHED();
}

// Whether rows of c numbers of type F, at each of three places, can be read 16 bytes at a time.
template <typename F>
static int by_16_bytes(int64_t c, const void *x, const void *y, const void *z) {
    return c * sizeof(F) % 16 == 0 && ((uintptr_t)x | (uintptr_t)y | (uintptr_t)z) % 16 == 0;
}
template <typename F>
static int fits_fast(int64_t c, int64_t oc, int64_t stride, const void *x, const void *y, const void *z) {
    return sizeof(F) == sizeof(bf16) && by_16_bytes<F>(c, x, y, z) && by_16_bytes<F>(oc, x, y, z) && stride * sizeof(F) % 16 == 0;
}

// out (R,OC) = inp (R,C) · W_eᵀ for each expert e and its rows, W_e (OC,C) at weight + e·stride. With a list, inp's row r is list[r].
template <typename F>
static void grouped_forward(F *out, const F *inp, const int *list, const F *weight, int64_t stride, int64_t c, int64_t oc, const Groups *g) {
    const Factor<F> x = {inp, list, 0, (int)c}, w = {weight, NULL, (int)oc, (int)c};
    if constexpr (sizeof(F) == sizeof(bf16))
        if (fits_fast<F>(c, oc, stride, out, inp, weight)) return grouped_rows<FastProduct<false, false>>(out, oc, x, w, stride, g);
    grouped_rows<SimpleProduct<F, false, false>>(out, oc, x, w, stride, g);
}

// dinp (R,C) = dout (R,OC) · W_e. With a list, dout's row r is list[r].
template <typename F>
static void grouped_dinp(F *dinp, const F *dout, const int *list, const F *weight, int64_t stride, int64_t c, int64_t oc, const Groups *g) {
    const Factor<F> dy = {dout, list, 0, (int)oc}, w = {weight, NULL, (int)oc, (int)c};
    if constexpr (sizeof(F) == sizeof(bf16))
        if (fits_fast<F>(c, oc, stride, dinp, dout, weight)) return grouped_rows<FastProduct<false, true>>(dinp, c, dy, w, stride, g);
    grouped_rows<SimpleProduct<F, false, true>>(dinp, c, dy, w, stride, g);
}

// dW_e (OC,C) += dout[rows of e]ᵀ · inp[rows of e], at dweight + e·stride; either may have a list.
template <typename F>
static void grouped_dweight(float *dweight, int64_t stride, const F *dout, const int *dout_list, const F *inp, const int *inp_list,
                            int64_t c, int64_t oc, const Groups *g) {
    const Factor<F> dy = {dout, dout_list, 0, (int)oc}, x = {inp, inp_list, 0, (int)c};
    if constexpr (sizeof(F) == sizeof(bf16))
        if (fits_fast<F>(c, oc, stride, dweight, dout, inp)) return grouped_weights<FastProduct<true, true>>(dweight, stride, dy, x, g);
    grouped_weights<SimpleProduct<F, true, true>>(dweight, stride, dy, x, g);
}

// ----------------------------------------------------------------------------
// Sums down the columns of something that is a matrix (rows,cols) of `value(row, col)`: gradients of biases, norms, gates.
// Rows are cut into at most SUM_PARTS parts of fixed size and the parts are added in order: no atomics, the same bits always.
enum { SUM_PARTS = 64, SUM_ROWS = 8, ADD_ROWS = 32 };

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
    __shared__ double sums[ADD_ROWS][WARP];
    const int64_t col = (int64_t)blockIdx.x * WARP + threadIdx.x;
    double sum = 0;
    if (col < cols)
        for (int64_t i = threadIdx.y; i < count; i += ADD_ROWS) sum += (double)parts[i * cols + col];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || col >= cols) return;
    for (int i = 1; i < ADD_ROWS; i++) sum += sums[i][threadIdx.x];
    out[col] += (float)sum;
}

// out (cols) += the sum of `count` rows of parts.
static void add_parts(float *out, const float *parts, int64_t count, int64_t cols) {
    add_parts_kernel<<<grid(cols, WARP), dim3(WARP, ADD_ROWS)>>>(out, parts, count, cols);
    LAUNCHED();
}

// out (cols) += Σ_rows value(row, col); parts: SUM_PARTS · cols numbers.
template <typename Value>
static void column_sums(float *out, int64_t rows, int64_t cols, Value value, float *parts) {
    if (rows == 0 || cols == 0) return;
    const int64_t part_rows = max64((rows + SUM_PARTS - 1) / SUM_PARTS, SUM_ROWS), count = (rows + part_rows - 1) / part_rows;
    column_parts_kernel<<<dim3(grid(cols, WARP), (unsigned)count), dim3(WARP, SUM_ROWS)>>>(parts, rows, cols, part_rows, value);
    LAUNCHED();
    add_parts(out, parts, count, cols);
}

// A matrix as it lies in memory.
template <typename F>
struct Plain {
    const F *x;
    int64_t row_size;
    __device__ float operator()(int64_t row, int64_t col) const { return x[row * row_size + col]; }
};

// ----------------------------------------------------------------------------
// 2. Layers

// ----------------------------------------------------------------------------
// Embedding, dropout

// What dropout does at one site to the rows of B sequences, of c numbers each; p = 0: nothing.
typedef struct Dropout { double p; uint64_t seed; int64_t step, first; int site, part; Pieces pieces; int64_t B, c; } Dropout;

static Dropout dropout_at(const Model *g, int64_t B, int64_t T, int site, const StepInfo *info) {
    const Pieces pieces = pieces_of(g->parts, T);
    Dropout d = {0, 0, 0, 0, site, own_part(&pieces), pieces, B, g->config.hidden_size};
    if (info) d.p = info->dropout, d.seed = info->seed, d.step = info->step, d.first = info->first_sequence * pieces.text * d.c;
    return d;
}

// The element that a row begins with. Where nobody shares texts rows lie as in these: no division is spent on it.
__device__ static inline int64_t dropout_row(const Dropout *d, int64_t row) {
    return d->first + (d->pieces.parts > 1 ? row_of_texts(&d->pieces, d->part, row, d->B) : row) * d->c;
}

// What dropout multiplies element e of its site by.
__device__ static inline float dropout_factor(const Dropout *d, int64_t e) {
    if (d->p <= 0) return 1;
    uint32_t word[4];
    dropout_words(word, e / 4, d->seed, d->step, d->site);
    return word[e % 4] < dropout_limit(d->p) ? 0 : (float)(1 / (1 - d->p));
}

template <typename F>
__global__ void embed_kernel(F *out, const int *tokens, const F *embed, int64_t c, Dropout d) {
    const F *row = embed + tokens[blockIdx.x] * c;
    const int64_t e = dropout_row(&d, blockIdx.x);
    for (int64_t j = threadIdx.x; j < c; j += blockDim.x) out[blockIdx.x * c + j] = (F)((float)row[j] * dropout_factor(&d, e + j));
}

// A block a row.
template <typename F>
__global__ void dropout_kernel(F *out, const F *x, Dropout d) {
    const int64_t e = dropout_row(&d, blockIdx.x), at = blockIdx.x * d.c;
    for (int64_t j = threadIdx.x; j < d.c; j += blockDim.x) out[at + j] = (F)((float)x[at + j] * dropout_factor(&d, e + j));
}

// The gradient behind dropout: dx itself where there is none, else in `spare`.
template <typename F>
static const F *dropout_backward(F *spare, const F *dx, int64_t rows, Dropout d) {
    if (d.p <= 0) return dx;
    dropout_kernel<<<grid(rows, 1), THREADS>>>(spare, dx, d);
    LAUNCHED();
    return spare;
}

// Rows to add up: those at places[start] .. places[the next list's start - 1], or with places NULL rows start and so on. Their sum is added to row `to`
// of the result, or where `to` is negative becomes row ~to of `parts`.
typedef struct RowList { int start, to; } RowList;

// The embedding's backward: out (V,C), parts and x in rows of c numbers, lists (count + 1), the last for its start alone. A warp takes a list and WARP packs of its
// rows' columns, several rows on their way at once. Long lists come cut into parts of one length: a text's commonest token would keep a warp busy long after all others are done.
template <typename F, int N>
__global__ void add_rows_kernel(float *out, float *parts, const F *x, const int *places, const RowList *lists, int count, int64_t c) {
    constexpr int AT_ONCE = 4;
    const int64_t list = global_warp(), j = ((int64_t)blockIdx.y * WARP + lane()) * N;
    if (list >= count) return;
    const int to = lists[list].to, end = lists[list + 1].start;
    const F *columns = x + (j < c ? j : 0);     // lanes past the last column stay: they hand places on
    Pack<float, N> sum = {};
    for (int from = lists[list].start; from < end; from += WARP) {
        const int rows = min32(end - from, WARP), at = from + min32(lane(), rows - 1), place = places ? places[at] : at;
        for (int i = 0; i < rows; i += AT_ONCE) {
            Pack<F, N> row[AT_ONCE];
            for (int r = 0; r < AT_ONCE; r++) row[r] = load<N>(columns + (int64_t)__shfl_sync(~0u, place, i + r) * c);     // past the end the last one again
            for (int r = 0; r < AT_ONCE; r++)
                for (int v = 0; v < N; v++) sum.of[v] += i + r < rows ? (float)row[r].of[v] : 0;
        }
    }
    if (j >= c) return;
    float *result = (to < 0 ? parts + (int64_t)~to * c : out + (int64_t)to * c) + j;
    if (to >= 0) {
        const Pack<float, N> before = load<N>(result);
        for (int v = 0; v < N; v++) sum.of[v] += before.of[v];
    }
    store<N>(result, sum);
}

template <typename F>
static void add_rows(float *out, float *parts, const F *x, const int *places, const RowList *lists, int count, int64_t c) {
    constexpr int N = pack_size<F>;
    if (count == 0) return;
    if (packs<F>(c)) add_rows_kernel<F, N><<<dim3(grid(count, WARPS), grid(c, WARP * N)), THREADS>>>(out, parts, x, places, lists, count, c);
    else add_rows_kernel<F, 1><<<dim3(grid(count, WARPS), grid(c, WARP)), THREADS>>>(out, parts, x, places, lists, count, c);
    LAUNCHED();
}

// ----------------------------------------------------------------------------
// Residual addition and RMSNorm in one pass, a warp a row: out = x + dropout(y), norm = out·rstd·weight. y may be NULL: then
// out is x and not written.

template <typename F, int N>
__global__ void add_norm_kernel(F *out, F *norm, float *rstd, const F *x, const F *y, const float *weight, int64_t n, int64_t c, double eps, Dropout d) {
    const int64_t i = global_warp();
    if (i >= n) return;
    const F *row = y ? out + i * c : x + i * c;
    const int64_t e = dropout_row(&d, i);
    float sum = 0;
    for (int64_t j = lane() * N; j < c; j += WARP * N) {
        Pack<F, N> a = load<N>(x + i * c + j);
        if (y) {
            const Pack<F, N> b = load<N>(y + i * c + j);
            for (int v = 0; v < N; v++) a.of[v] = (F)((float)a.of[v] + (float)b.of[v] * dropout_factor(&d, e + j + v));
            store<N>(out + i * c + j, a);
        }
        for (int v = 0; v < N; v++) sum += (float)a.of[v] * (float)a.of[v];
    }
    const float s = (float)(1 / sqrt((double)warp_sum(sum) / (double)c + eps));
    for (int64_t j = lane() * N; j < c; j += WARP * N) {        // a lane reads what it wrote itself
        Pack<F, N> a = load<N>(row + j);
        for (int v = 0; v < N; v++) a.of[v] = (F)((float)a.of[v] * s * weight[j + v]);
        store<N>(norm + i * c + j, a);
    }
    if (lane() == 0) rstd[i] = s;
}

template <typename F>
static void gpu_add_norm(F *out, F *norm, float *rstd, const F *x, const F *y, const float *weight, int64_t n, int64_t c, double eps, Dropout d) {
    constexpr int N = pack_size<F>;
    if (packs<F>(c)) add_norm_kernel<F, N><<<grid(n, WARPS), THREADS>>>(out, norm, rstd, x, y, weight, n, c, eps, d);
    else add_norm_kernel<F, 1><<<grid(n, WARPS), THREADS>>>(out, norm, rstd, x, y, weight, n, c, eps, d);
    LAUNCHED();
}

template <typename F>
static void gpu_rmsnorm_forward(F *norm, float *rstd, const F *x, const float *weight, int64_t n, int64_t c, double eps) {
    const Dropout none = {0, 0, 0, 0, 0, 0, {1, 1, 1, 0, 0}, 0, 0};
    gpu_add_norm<F>(NULL, norm, rstd, x, NULL, weight, n, c, eps, none);
}

template <typename F, int N>
__global__ void norm_again_kernel(F *norm, const float *rstd, const F *x, const float *weight, int64_t n, int64_t c) {
    const int64_t i = global_thread() * N;
    if (i >= n * c) return;
    Pack<F, N> a = load<N>(x + i);
    const float s = rstd[i / c];
    for (int v = 0; v < N; v++) a.of[v] = (F)((float)a.of[v] * s * weight[i % c + v]);
    store<N>(norm + i, a);
}

// norm from a kept rstd.
template <typename F>
static void gpu_norm_again(F *norm, const float *rstd, const F *x, const float *weight, int64_t n, int64_t c) {
    constexpr int N = pack_size<F>;
    if (packs<F>(c)) norm_again_kernel<F, N><<<grid(n * c / N, THREADS), THREADS>>>(norm, rstd, x, weight, n, c);
    else norm_again_kernel<F, 1><<<grid(n * c, THREADS), THREADS>>>(norm, rstd, x, weight, n, c);
    LAUNCHED();
}

// dx += s·(dy·w - x·mean), s = rstd, mean = s²·<dy·w, x>/C; parts (blocks,C) = each block's Σ dy·x·s, the gradient of w. A block takes several rows at a time, and a
// thread has the same columns of all: its weights and sums stay in registers, and so does what it has loaded until the block knows <dy·w, x>. Rows too wide for
// that, 4096 numbers of bf16, take several packs a thread, much of which lies in local memory.
enum { NORM_ROWS = 4, NORM_THREADS = 512, NORM_COLUMNS = 128 };         // of a block; of a thread, at most
enum { NORM_RESIDENT = 512, NORM_BLOCKS = 792 };                        // threads whose registers fit on a multiprocessor; blocks, at most

template <typename F, int N, int PACKS>
__global__ void __launch_bounds__(NORM_THREADS) rmsnorm_backward_kernel(F *dx, float *parts, const F *dy, const F *inp, const float *rstd, const float *weight, int64_t n, int64_t c) {
    constexpr int ROWS = PACKS == 1 ? NORM_ROWS : 1;
    __shared__ float dots[2][ROWS][NORM_THREADS / WARP];        // of each warp; twice, so that one barrier a turn is enough
    const float share = 1 / (float)c;
    float w[PACKS][N], sums[PACKS][N];
    int turn = 0;
    for (int k = 0; k < PACKS; k++) {
        const int64_t j = ((int64_t)k * blockDim.x + threadIdx.x) * N;
        for (int v = 0; v < N; v++) w[k][v] = j < c ? weight[j + v] : 0, sums[k][v] = 0;
    }
    for (int64_t row = (int64_t)blockIdx.x * ROWS; row < n; row += (int64_t)gridDim.x * ROWS, turn ^= 1) {
        Pack<F, N> x[ROWS][PACKS], d[ROWS][PACKS], g[ROWS][PACKS];
        float s[ROWS];
        for (int r = 0; r < ROWS; r++) {
            s[r] = row + r < n ? rstd[row + r] : 0;
            for (int k = 0; k < PACKS; k++) {
                const int64_t j = ((int64_t)k * blockDim.x + threadIdx.x) * N, at = min64(row + r, n - 1) * c + (j < c ? j : 0);
                x[r][k] = load<N>(inp + at);
                d[r][k] = load<N>(dy + at);
                g[r][k] = load<N>(dx + at);
            }
        }
        for (int r = 0; r < ROWS; r++) {
            float dot = 0;
            for (int k = 0; k < PACKS; k++)
                for (int v = 0; v < N; v++) dot += (float)d[r][k].of[v] * w[k][v] * (float)x[r][k].of[v];
            dot = warp_sum(dot);
            if (lane() == 0) dots[turn][r][threadIdx.x / WARP] = dot;
        }
        __syncthreads();
        for (int r = 0; r < ROWS; r++) {
            float dot = 0;
            for (int i = 0; i < (int)blockDim.x / WARP; i++) dot += dots[turn][r][i];
            const float mean = dot * s[r] * s[r] * share;
            for (int k = 0; k < PACKS; k++) {
                const int64_t j = ((int64_t)k * blockDim.x + threadIdx.x) * N;
                for (int v = 0; v < N; v++) {
                    const float a = (float)x[r][k].of[v], b = (float)d[r][k].of[v];
                    g[r][k].of[v] = (F)((float)g[r][k].of[v] + s[r] * (b * w[k][v] - a * mean));
                    sums[k][v] += b * a * s[r];
                }
                if (row + r < n && j < c) store<N>(dx + (row + r) * c + j, g[r][k]);
            }
        }
    }
    for (int k = 0; k < PACKS; k++) {
        const int64_t j = ((int64_t)k * blockDim.x + threadIdx.x) * N;
        for (int v = 0; v < N; v++)
            if (j < c) parts[blockIdx.x * c + j + v] = sums[k][v];
    }
}

// dinp (N,C) +=, dweight (C) +=; parts: NORM_BLOCKS · C numbers.
template <typename F>
static void gpu_rmsnorm_backward(F *dinp, float *dweight, const F *dout, const F *inp, const float *rstd, const float *weight, int64_t n, int64_t c, float *parts) {
    constexpr int N = pack_size<F>;
    if (c > NORM_THREADS * NORM_COLUMNS) die(2, "RMSNorm takes rows of up to %d numbers on a GPU: use a smaller --width", NORM_THREADS * NORM_COLUMNS);
    const int64_t pack = packs<F>(c) ? N : 1, threads = min64(round_up((c + pack - 1) / pack, WARP), NORM_THREADS), wide = c > threads * pack, rows = wide ? 1 : NORM_ROWS;
    const auto kernel = packs<F>(c) ? (wide ? rmsnorm_backward_kernel<F, N, NORM_COLUMNS / N> : rmsnorm_backward_kernel<F, N, 1>)
                                    : (wide ? rmsnorm_backward_kernel<F, 1, NORM_COLUMNS> : rmsnorm_backward_kernel<F, 1, 1>);
    const int64_t blocks = min64((n + rows - 1) / rows, min64(NORM_RESIDENT / threads * gpu.multiProcessorCount, NORM_BLOCKS));
    kernel<<<(unsigned)blocks, (unsigned)threads>>>(dinp, parts, dout, inp, rstd, weight, n, c);
    LAUNCHED();
    add_parts(dweight, parts, blocks, c);
}

// ----------------------------------------------------------------------------
// RoPE of all heads of a token in one launch: those of q and of each branch's k, wherever in the wide row they lie.

typedef struct Heads { int count, segments, of[1 + BRANCHES]; int64_t at[1 + BRANCHES]; } Heads;
static void heads_add(Heads *h, int64_t at, int count) {
    h->at[h->segments] = at;
    h->of[h->segments++] = count;
    h->count += count;
}

// Where head h lies in its row.
__device__ static inline int64_t head_place(const Heads *heads, int h, int d) {
    int i = 0;
    for (; h >= heads->of[i]; i++) h -= heads->of[i];
    return heads->at[i] + (int64_t)h * d;
}

// A pair (a, b) of channels turned by an angle; -sine turns back.
__device__ static inline float2 turned_pair(float a, float b, float cosine, float sine) { return make_float2(a * cosine - b * sine, b * cosine + a * sine); }
// The pairs (a.x, b.x) and (a.y, b.y), of neighbouring channels.
__device__ static inline void turn_back(float2 *a, float2 *b, float2 cosine, float2 sine) {
    const float2 x = turned_pair(a->x, b->x, cosine.x, -sine.x), y = turned_pair(a->y, b->y, cosine.y, -sine.y);
    *a = make_float2(x.x, y.x), *b = make_float2(x.y, y.y);
}

// x (n, x_row), in place; or with `from`, an f32 gradient (n,heads,d), its result there. Row i is at position i % period · step of
// `table` (positions,d), the cosines of the d/2 pairs and then their sines; turn = -1 turns back. A thread takes N neighbouring pairs
// (j, j + d/2) of a row's heads threadIdx.y, threadIdx.y + blockDim.y, ..., of which it asks for ROPE_HEADS at once.
enum { ROPE_HEADS = 2 };
template <typename F, int N>
__global__ void rope_kernel(F *x, int64_t x_row, const float *from, const float *table, int64_t n, int64_t period, int64_t step, const __grid_constant__ Heads heads, int d, float turn) {
    const int half = d / 2;
    const int64_t i = (int64_t)blockIdx.x * blockDim.z + threadIdx.z;
    if (i >= n) return;
    const float *angles = table + (i % period) * step * d;
    for (int j = (int)threadIdx.x * N; j < half; j += (int)blockDim.x * N) {
        const Pack<float, N> cosine = load<N>(angles + j), sine = load<N>(angles + half + j);
        for (int h0 = (int)threadIdx.y; h0 < heads.count; h0 += ROPE_HEADS * (int)blockDim.y) {
            Pack<float, N> aj[ROPE_HEADS], bj[ROPE_HEADS];
            #pragma unroll
            for (int u = 0; u < ROPE_HEADS; u++) {
                const int h = h0 + u * (int)blockDim.y;
                if (h >= heads.count) continue;
                if (from) {
                    aj[u] = load<N>(from + (i * heads.count + h) * d + j);
                    bj[u] = load<N>(from + (i * heads.count + h) * d + half + j);
                } else {
                    const F *a = x + i * x_row + head_place(&heads, h, d) + j;
                    const Pack<F, N> first = load<N>(a), second = load<N>(a + half);
                    for (int v = 0; v < N; v++) aj[u].of[v] = (float)first.of[v], bj[u].of[v] = (float)second.of[v];
                }
            }
            #pragma unroll
            for (int u = 0; u < ROPE_HEADS; u++) {
                const int h = h0 + u * (int)blockDim.y;
                if (h >= heads.count) continue;
                F *a = x + i * x_row + head_place(&heads, h, d) + j;
                Pack<F, N> first, second;
                for (int v = 0; v < N; v++) {
                    const float2 turned = turned_pair(aj[u].of[v], bj[u].of[v], cosine.of[v], turn * sine.of[v]);
                    first.of[v] = (F)turned.x;
                    second.of[v] = (F)turned.y;
                }
                store<N>(a, first);
                store<N>(a + half, second);
            }
        }
    }
}

template <typename F>
static void gpu_rope(F *x, int64_t x_row, const float *from, const float *table, int64_t n, int64_t period, int64_t step, const Heads *heads, int d, int turn) {
    if (n == 0 || heads->count == 0) return;
    const int whole = packs<F>(d / 2) && packs<F>(x_row), N = whole ? pack_size<F> : 1;
    auto *kernel = whole ? rope_kernel<F, pack_size<F>> : rope_kernel<F, 1>;
    // A block takes the packs of a head, some heads of a row, as many each time, and where that leaves threads more rows.
    const int of_head = min32(d / 2 / N, THREADS), most = THREADS / of_head, times = max32((heads->count + most - 1) / most, min32(ROPE_HEADS, heads->count));
    const int at_once = (heads->count + times - 1) / times;
    const int rows = min32(64, THREADS / (of_head * at_once));
    kernel<<<grid(n, rows), dim3((unsigned)of_head, (unsigned)at_once, (unsigned)rows)>>>(x, x_row, from, table, n, period, step, *heads, d, (float)turn);
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
template <typename F>
__device__ static inline void fill_tile(float *tile, const F *x, int64_t x_row, int count, int width) {
    for (int i = 0; i < count; i++)
        for (int c = lane(); c < width; c += WARP) tile[i * tile_row(width) + c] = (float)x[i * x_row + c];
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

// The queries [from, to) that see any of the keys [k0, k0 + count), where these are a range.
DEVICE static inline void query_range(const Mask *mask, int64_t k0, int64_t count, const AttentionShape *s, int64_t *from, int64_t *to) {
    *from = min64(s->T, max64(0, (mask->kind == MASK_COMPRESSED ? k0 * mask->stride + mask->block - 1 : k0) - s->t0));
    *to = mask->kind == MASK_WINDOW ? min64(s->T, k0 + count - 1 + min64(mask->window, s->Tk) - s->t0) : s->T;
    *to = max64(*from, *to);
}

// Rows of work: the heads that share keys lie together, then neighbouring queries. t is the query's position.
typedef struct QueryRow { int64_t b, t, h, kv, bt, th; } QueryRow;
__device__ static inline QueryRow query_row(int64_t row, const AttentionShape *s) {
    const int64_t G = s->H / s->KV;
    QueryRow r;
    const int64_t t = row / G % s->T;
    r.t = s->t0 + t;
    r.kv = row / G / s->T % s->KV;
    r.b = row / G / s->T / s->KV;
    r.h = r.kv * G + row % G;
    r.bt = r.b * s->T + t;
    r.th = r.bt * s->H + r.h;
    return r;
}

// Numbers of shared memory that a warp of each kernel takes.
DEVICE static inline int forward_numbers(const AttentionShape *s) { return s->D + s->Dv + WARP + tile_size(s->D); }
DEVICE static inline int dq_numbers(const AttentionShape *s) { return 2 * s->D + s->Dv + WARP + tile_size(s->D) + tile_size(s->Dv); }
DEVICE static inline int dkv_numbers(const AttentionShape *s) { return 2 * s->D + 2 * s->Dv + 2 * WARP + tile_size(s->D) + tile_size(s->Dv); }

template <typename F>
__global__ void attention_forward_kernel(F *out, float *lse, const F *q, const F *k, const F *v, Mask mask, AttentionShape s) {
    extern __shared__ float shared[];
    const int64_t row = global_warp();
    if (row >= s.B * s.T * s.H) return;
    const QueryRow r = query_row(row, &s);
    float *qs = shared + (threadIdx.x / WARP) * forward_numbers(&s), *o = qs + s.D, *p = o + s.Dv, *keys = p + WARP;
    const float scale = 1 / (float)sqrt((double)s.D);
    for (int c = lane(); c < s.D; c += WARP) qs[c] = (float)q[r.bt * s.q_row + r.h * s.D + c] * scale;
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
            const F *values = v + (r.b * s.Tk + k0) * s.v_row + r.kv * s.Dv;
            for (int c = lane(); c < s.Dv; c += WARP) {
                float a = o[c] * shrink;
                for (int j = 0; j < count; j++) a += p[j] * (float)values[j * s.v_row + c];
                o[c] = a;
            }
            __syncwarp();
        }
    const float inverse = sum > 0 ? 1 / sum : sum;      // a NaN stays one
    for (int c = lane(); c < s.Dv; c += WARP) out[r.th * s.Dv + c] = (F)(o[c] * inverse);
    if (lane() == 0) lse[r.th] = sum == 0 ? -INFINITY : top + logf(sum);
}

// dq (B,T,H,D), f32, = or += through the scores; delta (B,T,H) = <gate·dout, out>, which the kernel of dk and dv needs again.
template <typename F>
__global__ void attention_dq_kernel(float *dq, int accumulate, float *delta, const F *dout, const float *gate, const F *out, const float *lse,
                                    const F *q, const F *k, const F *v, Mask mask, AttentionShape s) {
    extern __shared__ float shared[];
    const int64_t row = global_warp();
    if (row >= s.B * s.T * s.H) return;
    const QueryRow r = query_row(row, &s);
    float *qs = shared + (threadIdx.x / WARP) * dq_numbers(&s), *dqs = qs + s.D, *dos = dqs + s.D, *ds = dos + s.Dv;
    float *keys = ds + WARP, *values = keys + tile_size(s.D);
    const float scale = 1 / (float)sqrt((double)s.D), g = gate ? gate[r.th * BRANCHES] : 1, l = lse[r.th];
    for (int c = lane(); c < s.D; c += WARP) qs[c] = (float)q[r.bt * s.q_row + r.h * s.D + c] * scale, dqs[c] = 0;
    for (int c = lane(); c < s.Dv; c += WARP) dos[c] = (float)dout[r.th * s.Dv + c] * g;
    __syncwarp();
    // delta is <dO, O> = Σ p·dP. From O it is the quicker sum, in the order of dP below and in the next kernel, so that a query with a
    // single key gets exactly no gradient. An O that was rounded to bf16 would leave a row of dS whose sum is not 0: there the keys
    // are passed twice.
    constexpr int from_out = std::is_same<F, float>::value;
    float d = 0;
    for (int c = 0; c < s.Dv && from_out; c++) d += dos[c] * (float)out[r.th * s.Dv + c];
    const int *idx = mask.block_idx + (r.bt * s.KV + r.kv) * mask.n;
    int64_t lo, hi;
    for (int pass = from_out; pass < 2; pass++) {
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
                const float p = lane() < count ? expf(x - l) : 0;
                if (pass == 0) {
                    d += warp_sum(p * dp);
                    __syncwarp();
                    continue;
                }
                ds[lane()] = p * (dp - d) * scale;
                __syncwarp();
                for (int c = lane(); c < s.D; c += WARP) {
                    float a = dqs[c];
                    for (int j = 0; j < count; j++) a += ds[j] * keys[j * tile_row(s.D) + c];
                    dqs[c] = a;
                }
                __syncwarp();
            }
    }
    if (lane() == 0) delta[r.th] = d;
    for (int c = lane(); c < s.D; c += WARP) dq[r.th * s.D + c] = (accumulate ? dq[r.th * s.D + c] : 0) + dqs[c];
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

// dk, dv: a warp takes one key of one KV head and meets the (query, head) rows that see it, 32 at a time.
template <typename F>
__global__ void attention_dkv_kernel(F *dk, F *dv, const F *dout, const float *gate, const float *delta, const float *lse,
                                     const F *q, const F *k, const F *v, Mask mask, AttentionShape s, Takers takers) {
    extern __shared__ float shared[];
    const int64_t item = global_warp(), G = s.H / s.KV;
    if (item >= s.B * s.KV * s.Tk) return;
    const int64_t key = item % s.Tk, kv = item / s.Tk % s.KV, b = item / s.Tk / s.KV;
    float *ks = shared + (threadIdx.x / WARP) * dkv_numbers(&s), *vs = ks + s.D, *dks = vs + s.Dv, *dvs = dks + s.D;
    float *p = dvs + s.Dv, *ds = p + WARP, *queries = ds + WARP, *douts = queries + tile_size(s.D);
    const int64_t at = b * s.Tk + key;
    for (int c = lane(); c < s.D; c += WARP) ks[c] = (float)k[at * s.k_row + kv * s.D + c], dks[c] = 0;
    for (int c = lane(); c < s.Dv; c += WARP) vs[c] = (float)v[at * s.v_row + kv * s.Dv + c], dvs[c] = 0;
    __syncwarp();
    const float scale = 1 / (float)sqrt((double)s.D);
    int64_t from, to;       // the queries: a range, or for selection places in the list of takers
    const int *list = NULL;
    query_range(&mask, key, 1, &s, &from, &to);
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
            for (int c = lane(); c < s.D; c += WARP) queries[i * tile_row(s.D) + c] = (float)q[bt * s.q_row + h * s.D + c];
            for (int c = lane(); c < s.Dv; c += WARP) douts[i * tile_row(s.Dv) + c] = (float)dout[(bt * s.H + h) * s.Dv + c];
        }
        __syncwarp();
        const int64_t x = x0 + lane();
        float weight = 0, slope = 0;
        if (lane() < count) {
            const int64_t t = list ? list[from + x / G] : from + x / G, th = (b * s.T + t) * s.H + kv * G + x % G;
            if (s.t0 + t >= key || mask.kind == MASK_COMPRESSED) {
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
    for (int c = lane(); c < s.D; c += WARP) dk[at * s.k_row + kv * s.D + c] = (F)dks[c];
    for (int c = lane(); c < s.Dv; c += WARP) dv[at * s.v_row + kv * s.Dv + c] = (F)dvs[c];
}

// Warps of a block whose shared memory (`numbers` a warp) fits; tells the kernel how much it may take.
template <typename Kernel>
static int warps_that_fit(Kernel *kernel, int64_t numbers) {
    int warps = ATTENTION_WARPS;
    const int64_t bytes = numbers * (int64_t)sizeof(float);
    while (warps > 1 && warps * bytes > (int64_t)gpu.sharedMemPerBlockOptin) warps /= 2;
    allow_shared(kernel, warps * bytes, "attention", "a smaller --head-dim or --v-head-dim");
    return warps;
}

template <typename F>
static void simple_attention_forward(F *out, float *lse, const F *q, const F *k, const F *v, const Mask *mask, const AttentionShape *s) {
    const int64_t numbers = forward_numbers(s);
    const int warps = warps_that_fit(attention_forward_kernel<F>, numbers);
    attention_forward_kernel<F><<<grid(s->B * s->T * s->H, warps), warps * WARP, (size_t)(warps * numbers) * sizeof(float)>>>(out, lse, q, k, v, *mask, *s);
    LAUNCHED();
}

template <typename F>
static void simple_attention_backward(float *dq, int accumulate_dq, F *dk, F *dv, const F *dout, const float *gate, const F *out, const float *lse,
                                      const F *q, const F *k, const F *v, const Mask *mask, const AttentionShape *s, float *delta, const Takers *takers) {
    int64_t numbers = dq_numbers(s);
    int warps = warps_that_fit(attention_dq_kernel<F>, numbers);
    attention_dq_kernel<F><<<grid(s->B * s->T * s->H, warps), warps * WARP, (size_t)(warps * numbers) * sizeof(float)>>>(
        dq, accumulate_dq, delta, dout, gate, out, lse, q, k, v, *mask, *s);
    LAUNCHED();
    if (s->Tk == 0) return;
    if (mask->kind == MASK_SELECTED) find_takers(takers, mask->block_idx, mask->n, s);
    numbers = dkv_numbers(s);
    warps = warps_that_fit(attention_dkv_kernel<F>, numbers);
    attention_dkv_kernel<F><<<grid(s->B * s->KV * s->Tk, warps), warps * WARP, (size_t)(warps * numbers) * sizeof(float)>>>(
        dk, dv, dout, gate, delta, lse, q, k, v, *mask, *s, *takers);
    LAUNCHED();
}

// ----------------------------------------------------------------------------
// Compression. Blocks become rows of one matrix for each set of weights: (sets, rows, l·D), row r a block and a head.

// What the kernels below share: the rows of all sets one behind the other.
typedef struct CompressCall { CompressShape s; int64_t nc, sets, rows; } CompressCall;
static CompressCall compress_call(const CompressShape *s) {
    const int64_t nc = compress_blocks(s), sets = compress_sets(s);
    CompressCall call = {*s, nc, sets, s->B * nc * s->KV / sets};
    return call;
}
__device__ static inline BlockPlace place_of(const CompressCall *a, int64_t row) { return block_place(&a->s, (int)(row / a->rows), row % a->rows); }

// flat (sets·rows, l·D), a block of threads a row
template <typename F, int N>
__global__ void compress_flatten_kernel(F *flat, const F *x, const float *pos, CompressCall a) {
    const int D = a.s.D, size = (int)a.s.block * D;
    const F *from = x + place_of(&a, blockIdx.x).x;
    for (int i = threadIdx.x * N; i < size; i += blockDim.x * N) {
        Pack<F, N> y = load<N>(from + i / D * a.s.x_row + i % D);
        for (int n = 0; n < N && pos; n++) y.of[n] = (F)((float)y.of[n] + pos[i + n]);
        store<N>(flat + blockIdx.x * (int64_t)size + i, y);
    }
}

// A warp a row.
template <typename F>
__global__ void compress_mean_kernel(F *out, const F *x, CompressCall a) {
    const int64_t row = global_warp();
    if (row >= a.sets * a.rows) return;
    const BlockPlace place = place_of(&a, row);
    for (int c = lane(); c < a.s.D; c += WARP) {
        float sum = 0;
        for (int64_t j = 0; j < a.s.block; j++) sum += (float)x[place.x + j * a.s.x_row + c] / (float)a.s.block;
        out[place.out * a.s.D + c] = (F)sum;
    }
}

// x (sets, rows, width) += bias (sets, width)
template <typename F>
__global__ void add_bias_kernel(F *x, const float *bias, int64_t sets, int64_t rows, int64_t width) {
    const int64_t i = global_thread();
    if (i < sets * rows * width) x[i] = (F)((float)x[i] + bias[i / (rows * width) * width + i % width]);
}

template <typename F>
__global__ void gelu_kernel(F *out, const F *x, int64_t n) {
    const int64_t i = global_thread();
    if (i < n) out[i] = (F)gelu((float)x[i]);
}

template <typename F>
__global__ void gelu_backward_kernel(F *dx, const F *x, int64_t n) {
    const int64_t i = global_thread();
    if (i < n) dx[i] = (F)((float)dx[i] * gelu_slope((float)x[i]));
}

// Rows (sets, rows, D) to their places in out (B,Nc,KV,D), or back from there; a warp a row.
template <typename F>
__global__ void compress_place_kernel(F *out, F *rows, CompressCall a, int back) {
    const int64_t row = global_warp(), D = a.s.D;
    if (row >= a.sets * a.rows) return;
    const int64_t to = place_of(&a, row).out;
    for (int64_t c = lane(); c < D; c += WARP) {
        if (back) rows[row * D + c] = out[to * D + c];
        else out[to * D + c] = rows[row * D + c];
    }
}

// dx: every token gathers from the blocks that cover it. dflat (sets, rows, l·D), or with NULL the mean of dout (B,Nc,KV,D). A thread N channels of
// a token and head.
template <typename F, int N>
__global__ void compress_gather_kernel(F *dx, const F *dflat, const F *dout, CompressCall a) {
    const int64_t D = a.s.D, KV = a.s.KV, T = a.s.T, l = a.s.block, d = a.s.stride, item = global_thread(), c = item % (D / N) * N, row = item / (D / N);
    if (row >= a.s.B * T * KV) return;
    const int64_t kv = row % KV, bt = row / KV, t = bt % T, b = bt / T, heads = KV / a.sets, set = kv / heads;
    const int64_t first = t < l ? 0 : (t - l) / d + 1, last = min64(t / d + 1, a.nc);
    float sum[N] = {0};
    for (int64_t i = first; i < last; i++) {
        const int64_t r = (b * a.nc + i) * heads + kv % heads;
        const Pack<F, N> x = load<N>(dflat ? dflat + ((set * a.rows + r) * l + t - i * d) * D + c : dout + ((b * a.nc + i) * KV + kv) * D + c);
        for (int n = 0; n < N; n++) sum[n] += (float)x.of[n];
    }
    Pack<F, N> y;
    for (int n = 0; n < N; n++) y.of[n] = (F)(dflat ? sum[n] : sum[n] / (float)l);
    store<N>(dx + bt * a.s.x_row + kv * D + c, y);
}

// Whether keys or values x of these heads can be met 16 bytes at a time.
template <typename F>
static int packs_of_heads(const F *x, const CompressShape *s) { return packs<F>(s->D) && packs<F>(s->x_row) && (uintptr_t)x % 16 == 0; }
template <typename F>
static void compress_flatten(F *flat, const F *x, const float *pos, const CompressCall *a) {
    const auto kernel = packs_of_heads(x, &a->s) ? compress_flatten_kernel<F, pack_size<F>> : compress_flatten_kernel<F, 1>;
    kernel<<<grid(a->sets * a->rows, 1), THREADS>>>(flat, x, pos, *a);
    LAUNCHED();
}
template <typename F>
static void compress_gather(F *dx, const F *dflat, const F *dout, const CompressCall *a) {
    const int wide = packs_of_heads(dx, &a->s);
    const auto kernel = wide ? compress_gather_kernel<F, pack_size<F>> : compress_gather_kernel<F, 1>;
    kernel<<<grid(a->s.B * a->s.T * a->s.KV * (a->s.D / (wide ? pack_size<F> : 1)), THREADS), THREADS>>>(dx, dflat, dout, *a);
    LAUNCHED();
}

// Numbers of working memory: flat, two hidden layers, the result.
static int64_t gpu_compress_scratch(const CompressShape *s) {
    const CompressCall a = compress_call(s);
    return compress_has_weights(s->kind) ? a.sets * a.rows * (s->block * s->D + 2 * compress_hidden(s->kind, s->D) + s->D) : 0;
}

// w: the small vectors (pos and biases), f32; m: the matrices that products read.
template <typename F> struct CompressMatrices { const F *fc1, *fc2, *conv; };

template <typename F>
static void gpu_compress_forward(F *out, F *hidden, const F *x, const CompressWeights *w, const CompressMatrices<F> *m, const CompressShape *s, F *scratch) {
    const CompressCall a = compress_call(s);
    const int64_t D = s->D, LD = s->block * D, W = compress_hidden(s->kind, s->D), sets = a.sets, rows = a.rows, all = sets * rows;
    if (all == 0) return;
    if (s->kind == COMPRESS_AVGPOOL) {
        compress_mean_kernel<<<grid(all, WARPS), THREADS>>>(out, x, a);
        LAUNCHED();
        return;
    }
    F *flat = scratch, *h = flat + all * LD, *y = h + 2 * all * W;
    compress_flatten(flat, x, w->pos, &a);
    if (s->kind == COMPRESS_CONV1D) {
        gemm(rows, D, LD, flat, LD, 0, m->conv, LD, 1, y, D, 0, sets, rows * LD, D * LD, rows * D);
    } else {
        gemm(rows, W, LD, flat, LD, 0, m->fc1, LD, 1, hidden, W, 0, sets, rows * LD, W * LD, rows * W);
        add_bias_kernel<<<grid(all * W, THREADS), THREADS>>>(hidden, w->fc1_bias, sets, rows, W);
        gelu_kernel<<<grid(all * W, THREADS), THREADS>>>(h, hidden, all * W);
        LAUNCHED();
        gemm(rows, D, W, h, W, 0, m->fc2, W, 1, y, D, 0, sets, rows * W, D * W, rows * D);
    }
    add_bias_kernel<<<grid(all * D, THREADS), THREADS>>>(y, s->kind == COMPRESS_CONV1D ? w->conv_bias : w->fc2_bias, sets, rows, D);
    compress_place_kernel<<<grid(all, WARPS), THREADS>>>(out, y, a, 0);
    LAUNCHED();
}

// dx: every token's, whether a block covers it or not; dw +=.
template <typename F>
static void gpu_compress_backward(F *dx, const CompressWeights *dw, F *dout, const F *hidden, const F *x, const CompressWeights *w, const CompressMatrices<F> *m,
                                  const CompressShape *s, F *scratch, float *parts) {
    const CompressCall a = compress_call(s);
    const int64_t D = s->D, LD = s->block * D, W = compress_hidden(s->kind, s->D), sets = a.sets, rows = a.rows, all = sets * rows;
    const int weights = compress_has_weights(s->kind) && all > 0;
    F *flat = scratch, *h = flat + all * LD, *dh = h + all * W, *dy = dh + all * W;
    if (weights) {
        compress_place_kernel<<<grid(all, WARPS), THREADS>>>(dout, dy, a, 1);
        compress_flatten(flat, x, w->pos, &a);
        float *bias = s->kind == COMPRESS_CONV1D ? dw->conv_bias : dw->fc2_bias;
        for (int64_t set = 0; set < sets; set++) column_sums(bias + set * D, rows, D, Plain<F>{dy + set * rows * D, D}, parts);
    }
    // The gradient of `flat` takes its place once dweight has read it.
    if (weights && s->kind == COMPRESS_CONV1D) {
        gemm(D, LD, rows, dy, D, 1, flat, LD, 0, dw->conv, LD, 1, sets, rows * D, rows * LD, D * LD);
        gemm(rows, LD, D, dy, D, 0, m->conv, LD, 0, flat, LD, 0, sets, rows * D, D * LD, rows * LD);
    } else if (weights) {
        gelu_kernel<<<grid(all * W, THREADS), THREADS>>>(h, hidden, all * W);
        LAUNCHED();
        gemm(D, W, rows, dy, D, 1, h, W, 0, dw->fc2, W, 1, sets, rows * D, rows * W, D * W);
        gemm(rows, W, D, dy, D, 0, m->fc2, W, 0, dh, W, 0, sets, rows * D, D * W, rows * W);
        gelu_backward_kernel<<<grid(all * W, THREADS), THREADS>>>(dh, hidden, all * W);
        LAUNCHED();
        for (int64_t set = 0; set < sets; set++) column_sums(dw->fc1_bias + set * W, rows, W, Plain<F>{dh + set * rows * W, W}, parts);
        gemm(W, LD, rows, dh, W, 1, flat, LD, 0, dw->fc1, LD, 1, sets, rows * W, rows * LD, W * LD);
        gemm(rows, LD, W, dh, W, 0, m->fc1, LD, 0, flat, LD, 0, sets, rows * W, W * LD, rows * LD);
        column_sums(dw->pos, all, LD, Plain<F>{flat, LD}, parts);
    }
    compress_gather(dx, compress_has_weights(s->kind) ? (const F *)flat : nullptr, (const F *)dout, &a);
}

// ----------------------------------------------------------------------------
// Selection. Rows (b,t,kv) are done a chunk at a time, so that neither their importances (chunk, importance_row) nor, where these are summed from them by a
// kernel of its own, their weights (chunk, Nc) ever become (B,T,KV,...).

enum { SELECT_NUMBERS = 1 << 26, SELECT_HEADS = 4 };      // of a chunk, enough for several waves of blocks; heads that a thread meets a key with at once
static int64_t importance_row(const AttentionShape *s, const SelectShape *sel) { return (s->t0 + s->T) / sel->sel_block + 1; }
static int64_t select_chunk(const AttentionShape *s, const SelectShape *sel) {
    return min64(s->B * s->T * s->KV, max64(1024, SELECT_NUMBERS / (s->Tk + importance_row(s, sel))));
}
// Enough for any piece of the text, if s is its last one: earlier ones have shorter rows, but more of them in a chunk.
static int64_t select_scratch(const AttentionShape *s, const SelectShape *sel) {
    const int64_t numbers = s->Tk + importance_row(s, sel);
    return min64(s->B * s->T * s->KV * numbers, max64(SELECT_NUMBERS, 1024 * numbers));
}

// Places that are left to the most important blocks.
DEVICE static inline int free_places(const SelectShape *sel) { return sel->n - sel->n_init - sel->n_local; }
static int nothing_to_choose(const AttentionShape *s, const SelectShape *sel) { return takes_all_blocks(s->t0 + s->T, sel->n, sel->sel_block) || free_places(sel) == 0; }
// The blocks before this one are those that query t may choose of, or takes in any case because they are the first; 0: it has no choice, and takes all.
template <typename I>
DEVICE static inline I choice_end(I t, const SelectShape *sel) {
    const I blocks = t / sel->sel_block + 1;
    return blocks > sel->n ? blocks - sel->n_local : 0;
}

// weights (chunk, Nc) = exp(q·K~/sqrt(D) - lse) summed over the heads of a group (eq. 10): a block of threads a row.
template <typename F>
__global__ void select_weights_kernel(float *weights, const F *q, const F *k, const float *lse, int64_t row0, AttentionShape s, SelectShape sel) {
    extern __shared__ float shared[];
    const int64_t row = row0 + blockIdx.x, G = s.H / s.KV, kv = row % s.KV, bt = row / s.KV, t = s.t0 + bt % s.T, b = bt / s.T;
    if (!choice_end(t, &sel)) return;
    const float scale = 1 / (float)sqrt((double)s.D);
    for (int64_t c = threadIdx.x; c < G * s.D; c += blockDim.x) shared[c] = (float)q[bt * s.q_row + kv * G * s.D + c] * scale;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < compressed_seen(t, sel.cmp_block, sel.cmp_stride); i += blockDim.x) {
        const F *key = k + (b * s.Tk + i) * s.k_row + kv * s.D;
        float sum = 0;
        for (int64_t g0 = 0; g0 < G; g0 += SELECT_HEADS) {
            float x[SELECT_HEADS] = {0};
            for (int c = 0; c < s.D; c++)
                for (int g = 0; g < SELECT_HEADS; g++) x[g] += g0 + g < G ? shared[(g0 + g) * s.D + c] * (float)key[c] : 0;
            for (int g = 0; g < SELECT_HEADS && g0 + g < G; g++) sum += expf(x[g] - lse[bt * s.H + kv * G + g0 + g]);
        }
        weights[blockIdx.x * s.Tk + i] = sum;
    }
}

// Eq. 9 of block j, from the weights of the compressed blocks that are seen.
__device__ static inline float importance_of(const float *weights, int j, int visible, int pieces, int per_block) {
    const int end = min32((j + 1) * per_block, visible);
    float sum = 0;
    for (int i = max32(0, j * per_block - pieces + 1); i < end; i++) sum += weights[i] * (float)pieces_inside(i, j, pieces, per_block);
    return sum;
}
__device__ static inline float importance_of(const float *weights, int j, int visible, const SelectShape *sel) {
    return importance_of(weights, j, visible, sel->cmp_block / sel->cmp_stride, sel->sel_block / sel->cmp_stride);
}

// importance (rows, row_size) of the blocks that a row may choose of, from its weights (rows, Tk). A block of threads a row.
__global__ void importance_kernel(float *importance, int64_t row_size, const float *weights, int64_t row0, AttentionShape s, SelectShape sel) {
    const int64_t t = s.t0 + (row0 + blockIdx.x) / s.KV % s.T;
    const int visible = (int)compressed_seen(t, sel.cmp_block, sel.cmp_stride);
    for (int j = threadIdx.x; j < (int)choice_end(t, &sel); j += blockDim.x) importance[blockIdx.x * row_size + j] = importance_of(weights + blockIdx.x * s.Tk, j, visible, &sel);
}
static void gpu_importance(float *importance, const float *weights, int64_t row0, int64_t rows, const AttentionShape *s, const SelectShape *sel) {
    importance_kernel<<<grid(rows, 1), THREADS>>>(importance, importance_row(s, sel), weights, row0, *s, *sel);
    LAUNCHED();
}

// A row of the choice: the blocks it may choose of are [first, last), those before and behind are taken.
typedef struct Choice { int *idx, first, last; } Choice;

// 0: there is no such row, or nothing to choose in it.
__device__ static inline int choice_of(Choice *x, int64_t i, int *block_idx, int64_t row0, int64_t rows, const AttentionShape *s, const SelectShape *sel) {
    const int64_t row = row0 + i;
    if (i < 0 || i >= rows) return 0;
    const int t = (int)s->t0 + (int)((unsigned)row / (unsigned)s->KV % (unsigned)s->T), blocks = t / sel->sel_block + 1;      // rows of 2^32 are more than any memory holds
    x->idx = block_idx + row * sel->n;
    x->first = sel->n_init;
    x->last = choice_end(t, sel);
    for (int j = lane(); j < sel->n && !x->last; j += WARP) x->idx[j] = j < blocks ? j : -1;
    if (!x->last) return 0;
    for (int j = lane(); j < sel->n_init; j += WARP) x->idx[j] = j;
    for (int j = lane(); j < sel->n_local; j += WARP) x->idx[sel->n - sel->n_local + j] = x->last + j;
    return free_places(sel) > 0;
}

// NaN, from a model that is lost anyway, must not leave a place empty.
__device__ static inline float comparable(float importance) { return importance >= 0 ? importance : 0; }

// Eq. 11, 12: a warp a row, whose importances pass by from the last to the first, as recent blocks often are the most important. The best so far are kept
// in order, one a lane, so there are at most WARP of them; of equal ones the first block is ahead. Importances are not negative: they compare as their bits
// do, and 0 stands for none.
struct BestBlocks {
    int wanted, kept_at = INT_MAX, kept = 0, least = 1;        // kept, least: bits of an importance, plus 1; what takes a place is at least `least`

    __device__ explicit BestBlocks(int places) : wanted(places) {}
    __device__ static int value_of(float importance) { return (int)__float_as_uint(comparable(importance)) + 1; }
    // Before any is met: this lane is going to meet `highest`, among others. The last of as many lanes' highest as there are places is not above the last that is
    // to be chosen: what is below it need not be met.
    __device__ void expect(int highest) {
        #pragma unroll
        for (int size = 2; size <= WARP; size *= 2)         // in order (Batcher 1968)
            #pragma unroll
            for (int step = size / 2; step > 0; step /= 2) {
                const int other = __shfl_xor_sync(~0u, highest, step);
                highest = !(lane() & step) == !(lane() & size) ? max32(highest, other) : min32(highest, other);
            }
        least = max32(__shfl_sync(~0u, highest, wanted - 1), 1);
    }
    // WARP blocks: this lane's is j0 - lane, and its value 0 if it may not be chosen.
    __device__ void meet(int j0, int value) {
        for (unsigned better = __ballot_sync(~0u, value >= least); better; better &= better - 1) {
            const int from = __ffs((int)better) - 1;
            const int one = __shfl_sync(~0u, value, from), before = __shfl_up_sync(~0u, kept, 1), before_at = __shfl_up_sync(~0u, kept_at, 1);
            const int place = __popc(__ballot_sync(~0u, kept > one));
            if (lane() > place) kept = before, kept_at = before_at;
            if (lane() == place) kept = one, kept_at = j0 - from;
            least = max32(__shfl_sync(~0u, kept, wanted - 1), least);
            better &= __ballot_sync(~0u, value >= least) | 1u << from;
        }
    }
    __device__ void store(int *idx) const {
        int rank = 0;
        for (int place = 0; place < wanted; place++) rank += __shfl_sync(~0u, kept_at, place) < kept_at;
        if (lane() < wanted) idx[rank] = kept_at;
    }
};

enum { CHOICE_LOADS = 16 };      // importances of a lane that are on their way at once
__global__ void select_few_kernel(int *block_idx, float *importance, int64_t row_size, int64_t row0, int64_t rows, AttentionShape s, SelectShape sel) {
    Choice x;
    const int64_t i = rows - 1 - global_warp();     // late queries, which have the most blocks, come first
    if (!choice_of(&x, i, block_idx, row0, rows, &s, &sel)) return;
    importance += i * row_size;
    BestBlocks best(free_places(&sel));
    for (int j0 = x.last - 1; j0 >= x.first; j0 -= CHOICE_LOADS * WARP) {
        int of[CHOICE_LOADS], highest = 0;
        #pragma unroll
        for (int u = 0; u < CHOICE_LOADS; u++) {
            const int j = j0 - u * WARP - lane();
            of[u] = j >= x.first ? BestBlocks::value_of(importance[j]) : 0;
            highest = max32(highest, of[u]);
        }
        if (j0 == x.last - 1) best.expect(highest);
        #pragma unroll
        for (int u = 0; u < CHOICE_LOADS; u++)
            if (j0 - u * WARP >= x.first) best.meet(j0 - u * WARP, of[u]);
    }
    best.store(x.idx + sel.n_init);
}

// The same for any n: taken blocks are marked by an importance of -1.
__global__ void select_blocks_kernel(int *block_idx, float *importance, int64_t row_size, int64_t row0, int64_t rows, AttentionShape s, SelectShape sel) {
    Choice x;
    if (!choice_of(&x, global_warp(), block_idx, row0, rows, &s, &sel)) return;
    const int64_t first = x.first, last = x.last;
    int *idx = x.idx;
    float *score = importance + global_warp() * row_size;
    for (int64_t j = first + lane(); j < last; j += WARP) score[j] = comparable(score[j]);
    __syncwarp();
    for (int place = free_places(&sel); place > 0; place--) {
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
}

// block_idx of the rows row0 .. row0+rows-1; their importances are lost.
static void gpu_choose_blocks(int *block_idx, float *importance, int64_t row0, int64_t rows, const AttentionShape *s, const SelectShape *sel) {
    const auto kernel = free_places(sel) <= WARP ? select_few_kernel : select_blocks_kernel;
    kernel<<<grid(rows, WARPS), THREADS>>>(block_idx, importance, importance_row(s, sel), row0, rows, *s, *sel);
    LAUNCHED();
}

template <typename F>
static void simple_select_weights(float *weights, const F *q, const F *k, const float *lse, int64_t row0, int64_t rows, const AttentionShape *s, const SelectShape *sel) {
    const int64_t bytes = s->H / s->KV * s->D * (int64_t)sizeof(float);
    allow_shared(select_weights_kernel<F>, bytes, "selection", "more --kv-heads");
    select_weights_kernel<F><<<(unsigned)rows, (unsigned)min64(128, round_up(max64(s->Tk, 1), WARP)), (size_t)bytes>>>(weights, q, k, lse, row0, *s, *sel);
    LAUNCHED();
}

// ----------------------------------------------------------------------------
// Fast attention: the same masks as attention_forward_kernel and its backward above, from bf16 with sums in f32, on tensor cores
// (mma.sync, sm_80 and later), for (D,Dv) = (64,64), (128,128), (192,128).
//
// It is FlashAttention-2 (Dao 2023) with rows of work that are (query, head): row r = t·G + g of one (b, kv), so that all G heads of a
// group meet one tile of keys. A warp owns 16 rows, the height of a matrix instruction. A team of warps shares a stream of key and value
// tiles in shared memory: the whole block where the keys of its queries are a range, one warp where each query has blocks of its own.
// Nothing is added by atomics and every sum has a fixed order: the same bits on every run.

#define LOG2E 1.4426950408889634f
static const char *const FAST_NAME = "attention in bf16", *const FAST_FIX = "--dtype f32";       // when a block's memory is too small
enum { MMA_ROWS = 16, FAST_WARPS = 4, RANGE_KEYS = 64, SELECTED_KEYS = 32, SELECTED_WARPS = 2 };

// 1 if the fast tier takes this shape: row sizes that 16-byte copies can follow, and positions that fit an int.
static int fast_attention(const AttentionShape *s, const Mask *mask) {
    const int wide = (s->D == 64 && s->Dv == 64) || (s->D == 128 && s->Dv == 128) || (s->D == 192 && s->Dv == 128);
    const int64_t rows = s->T * (s->H / s->KV), keys = s->Tk * (mask->kind == MASK_COMPRESSED ? mask->stride : 1);
    return wide && s->q_row % 8 == 0 && s->k_row % 8 == 0 && s->v_row % 8 == 0 && rows < INT_MAX / 2 && keys < INT_MAX / 2;
}

__device__ static inline unsigned two_bf16(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    unsigned u;
    memcpy(&u, &pair, sizeof u);
    return u;
}
__device__ static inline float low_of(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ static inline float high_of(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }

// Four lanes share a row of a matrix instruction's result.
__device__ static inline float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ static inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// A tile is (rows, W) in shared memory. Its chunks of 16 bytes lie mixed up within each row, so that 8 rows of the same chunk, which
// is what ldmatrix reads at once, are in different banks.
template <int W>
__device__ static inline bf16 *chunk_of(bf16 *tile, int row, int chunk) { return tile + row * W + ((chunk ^ (row & 7)) << 3); }

// A tile of n rows: i < count from x + i·x_row, the others zero, by threads member, member + members, ...
template <int W>
__device__ static inline void fetch_tile(bf16 *tile, int n, const bf16 *x, int64_t x_row, int count, int member, int members) {
    if (members % (W / 8) == 0) {       // each thread stays in its chunk and goes down
        const int chunk = member % (W / 8), first = member / (W / 8), step = members / (W / 8);
        const bf16 *from = x + first * x_row + chunk * 8;
        for (int row = first; row < n; row += step, from += step * x_row) cp_async_16(chunk_of<W>(tile, row, chunk), row < count ? from : x, row < count ? 16 : 0);
        return;
    }
    for (int i = member; i < n * (W / 8); i += members) {
        const int row = i / (W / 8), chunk = i % (W / 8), there = row < count;
        cp_async_16(chunk_of<W>(tile, row, chunk), x + (there ? row : 0) * x_row + chunk * 8, there ? 16 : 0);
    }
}

// d (16, 8·N) += a (16,W) · (rows first .. first+8N-1 of the tile)ᵀ
template <int W, int N>
__device__ static inline void times_turned(float (*d)[4], const unsigned (*a)[4], bf16 *tile, int first) {
    #pragma unroll
    for (int step = 0; step < W / 16; step++)
        #pragma unroll
        for (int n = 0; n < N; n += 2) {
            unsigned b[4];
            ldmatrix_x4(b, chunk_of<W>(tile, first + n * 8 + lane() / 16 * 8 + lane() % 8, step * 2 + lane() / 8 % 2));
            mma_16816(d[n], a[step], b);
            mma_16816(d[n + 1], a[step], b + 2);
        }
}

// The same with rows left .. left+15 of another tile as the left factor.
template <int W, int N>
__device__ static inline void tile_times_turned(float (*d)[4], bf16 *left_tile, int left, bf16 *tile, int first) {
    #pragma unroll
    for (int step = 0; step < W / 16; step++) {
        unsigned a[4];
        ldmatrix_x4(a, chunk_of<W>(left_tile, left + lane() % 16, step * 2 + lane() / 16));
        #pragma unroll
        for (int n = 0; n < N; n += 2) {
            unsigned b[4];
            ldmatrix_x4(b, chunk_of<W>(tile, first + n * 8 + lane() / 16 * 8 + lane() % 8, step * 2 + lane() / 8 % 2));
            mma_16816(d[n], a, b);
            mma_16816(d[n + 1], a, b + 2);
        }
    }
}

// d (16,W) += a (16,16) · (rows first .. first+15 of the tile)
template <int W>
__device__ static inline void times_rows(float (*d)[4], const unsigned a[4], bf16 *tile, int first) {
    #pragma unroll
    for (int n = 0; n < W / 8; n += 2) {
        unsigned b[4];
        ldmatrix_x4_turned(b, chunk_of<W>(tile, first + lane() % 16, n + lane() / 16));
        mma_16816(d[n], a, b);
        mma_16816(d[n + 1], a, b + 2);
    }
}

// Two neighbouring results (16,8) as a left factor (16,16): the layouts agree, nothing moves between lanes.
__device__ static inline void as_left_factor(unsigned a[4], const float (*x)[4]) {
    a[0] = two_bf16(x[0][0], x[0][1]);
    a[1] = two_bf16(x[0][2], x[0][3]);
    a[2] = two_bf16(x[1][0], x[1][1]);
    a[3] = two_bf16(x[1][2], x[1][3]);
}

// A result (16,W), rows times low and high (8 rows below), as bf16 into rows first .. first+15 of a tile.
template <int W>
__device__ static inline void put_rows(bf16 *tile, int first, const float (*x)[4], float low, float high) {
    const int row = first + lane() / 4, pair = lane() % 4 * 2;
    #pragma unroll
    for (int n = 0; n < W / 8; n++) {
        *(unsigned *)(chunk_of<W>(tile, row, n) + pair) = two_bf16(x[n][0] * low, x[n][1] * low);
        *(unsigned *)(chunk_of<W>(tile, row + 8, n) + pair) = two_bf16(x[n][2] * high, x[n][3] * high);
    }
}

// The 16 rows of a warp: first + i of those of (b, kv), up to `last`; behind it they repeat the last row and are not written.
typedef struct FastRows { int b, kv, first, last; } FastRows;
__device__ static inline int row_at(const FastRows *x, int i) { return min32(x->first + i, x->last); }
__device__ static inline int64_t token_of_row(const FastRows *x, int row, const AttentionShape *s) { return x->b * s->T + row / (s->H / s->KV); }
__device__ static inline int head_of_row(const FastRows *x, int row, const AttentionShape *s) { return x->kv * (s->H / s->KV) + row % (s->H / s->KV); }
__device__ static inline int64_t place_of_row(const FastRows *x, int row, const AttentionShape *s) { return token_of_row(x, row, s) * s->H + head_of_row(x, row, s); }
// Where row i lies, and whether it is one.
__device__ static inline int64_t place_of(const FastRows *x, int i, const AttentionShape *s) { return place_of_row(x, row_at(x, i), s); }
__device__ static inline int is_row(const FastRows *x, int i) { return x->first + i <= x->last; }

// The two rows of a lane, at x + place(row)·row_size, as left factors of W columns.
template <int W>
__device__ static inline void read_left_factor(unsigned (*a)[4], const bf16 *low, const bf16 *high) {
    #pragma unroll
    for (int step = 0; step < W / 16; step++) {
        const int column = step * 16 + lane() % 4 * 2;
        a[step][0] = *(const unsigned *)(low + column);
        a[step][1] = *(const unsigned *)(high + column);
        a[step][2] = *(const unsigned *)(low + column + 8);
        a[step][3] = *(const unsigned *)(high + column + 8);
    }
}

// Work of a kernel in which a team takes 16·TEAM rows: for ranges of keys, tiles of rows of each (b, kv); for selection (TEAM = 1)
// one query's heads, or 16 of them. Selection goes through one (b, kv) after the other, whose keys then stay in the L2 cache.
template <int TEAM>
DEVICE static inline int items_of_keys(const AttentionShape *s) {       // for one (b, kv)
    const int T = (int)s->T, G = s->H / s->KV;
    return TEAM == 1 ? T * ((G + MMA_ROWS - 1) / MMA_ROWS) : (T * G + MMA_ROWS * TEAM - 1) / (MMA_ROWS * TEAM);
}
template <int TEAM>
DEVICE static inline int64_t team_items(const AttentionShape *s) { return s->B * s->KV * items_of_keys<TEAM>(s); }

// The keys that a team walks through, a tile [k0, end) after the other: one stretch, or those of the blocks idx.
typedef struct KeyWalk { const int *idx; int i, k0, end, limit; } KeyWalk;

// Late queries have the most keys: they come first, so that no long work is left for the end.
template <int TEAM, int KEYS>
__device__ static inline void team_begin(FastRows *x, KeyWalk *walk, int item, const Mask *mask, const AttentionShape *s) {
    const int G = s->H / s->KV, bkv = (int)s->B * s->KV, items = items_of_keys<TEAM>(s);
    const int at = TEAM == 1 ? item / items : item % bkv, tile = items - 1 - (TEAM == 1 ? item % items : item / bkv);
    int64_t lo, hi, unused;
    x->b = at / s->KV;
    x->kv = at % s->KV;
    walk->k0 = -KEYS;
    if (TEAM == 1) {
        const int parts = (G + MMA_ROWS - 1) / MMA_ROWS, t = tile / parts;
        x->first = t * G + tile % parts * MMA_ROWS;
        x->last = t * G + G - 1;
        walk->idx = mask->block_idx + ((x->b * s->T + t) * s->KV + x->kv) * mask->n;
        walk->i = -1;
        walk->end = 0;
        walk->limit = (int)min64(s->t0 + t + 1, s->Tk);
    } else {
        const int first = tile * TEAM * MMA_ROWS;
        x->first = first + (int)(threadIdx.x / WARP) * MMA_ROWS;
        x->last = (int)s->T * G - 1;
        key_range(mask, s->t0 + first / G, &lo, &unused);
        key_range(mask, s->t0 + min32(first + TEAM * MMA_ROWS - 1, x->last) / G, &unused, &hi);
        walk->idx = NULL;
        walk->i = 0;
        walk->k0 += (int)min64(lo, s->Tk);
        walk->end = walk->limit = (int)min64(hi, s->Tk);
    }
}

// On to the next tile; 0 behind the last.
template <int KEYS>
__device__ static inline int next_keys(KeyWalk *w, const Mask *mask) {
    w->k0 += KEYS;
    while (w->k0 >= w->end) {
        if (!w->idx || ++w->i >= mask->n || w->idx[w->i] < 0) return 0;
        w->k0 = w->idx[w->i] * mask->sel_block;
        w->end = min32(w->k0 + mask->sel_block, w->limit);
    }
    return 1;
}

template <int TEAM>
__device__ static inline void team_sync(void) {
    if (TEAM == 1) __syncwarp();
    else __syncthreads();
}

// The keys that the two rows of a lane see, and those that all rows of the warp see: tiles inside these need no mask.
typedef struct SeenKeys { int lo[2], hi[2], all_lo, all_hi; } SeenKeys;
template <int TEAM>
__device__ static inline SeenKeys seen_keys(const FastRows *x, const Mask *mask, const AttentionShape *s) {
    SeenKeys seen = {{0, 0}, {INT_MAX, INT_MAX}, 0, INT_MAX};
    if constexpr (TEAM > 1) {       // else one query, whose tiles end where it does
        const int G = s->H / s->KV;
        int64_t lo, hi;
        for (int i = 0; i < 2; i++) {
            key_range(mask, s->t0 + row_at(x, lane() / 4 + i * 8) / G, &lo, &hi);
            seen.lo[i] = (int)min64(lo, s->Tk);
            seen.hi[i] = (int)min64(hi, s->Tk);
        }
        key_range(mask, s->t0 + row_at(x, MMA_ROWS - 1) / G, &lo, &hi);
        seen.all_lo = (int)min64(lo, s->Tk);
        key_range(mask, s->t0 + row_at(x, 0) / G, &lo, &hi);
        seen.all_hi = (int)min64(hi, s->Tk);
    }
    return seen;
}

// p (16,KEYS) of a warp's rows and the keys from k0 on: those that a row does not see, or that are not before `end`, become `value`. Keys may stand in the
// order of their place in a block of PER_BLOCK keys: the first of every block, then the second, and so on.
template <int KEYS, int PER_BLOCK = 1>
__device__ static inline void hide_keys(float (*p)[4], int k0, int end, const SeenKeys *seen, float value) {
    constexpr int BLOCKS = KEYS / PER_BLOCK;
    #pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
        #pragma unroll
        for (int e = 0; e < 4; e++) {
            const int key = k0 + (n * 8 % BLOCKS + lane() % 4 * 2 + e % 2) * PER_BLOCK + n * 8 / BLOCKS;
            if (key < seen->lo[e / 2] || key >= min32(seen->hi[e / 2], end)) p[n][e] = value;
        }
}

// Scores p (16,KEYS) to exponentials, under the highest score of each row so far; what was summed before them shrinks by `shrink`.
template <int KEYS>
__device__ static inline void online_softmax(float (*p)[4], float top[2], float sum[2], float shrink[2], float scale2) {
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        float higher = top[i];
        #pragma unroll
        for (int n = 0; n < KEYS / 8; n++) higher = fmaxf(higher, fmaxf(p[n][i * 2], p[n][i * 2 + 1]));
        higher = quad_max(higher);
        const float shift = higher == -INFINITY ? 0 : higher * scale2;
        shrink[i] = power_of_2(top[i] * scale2 - shift);
        float more_sum = 0;
        #pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
            #pragma unroll
            for (int e = i * 2; e < i * 2 + 2; e++) {
                p[n][e] = power_of_2(p[n][e] * scale2 - shift);
                more_sum += p[n][e];
            }
        sum[i] = sum[i] * shrink[i] + more_sum;
        top[i] = higher;
    }
}

// The walk's tile of keys, and that of values behind it.
template <int D, int DV, int TEAM>
__device__ static inline void fetch_keys(bf16 *tile, const KeyWalk *w, const bf16 *keys, const bf16 *values, const AttentionShape *s, int member) {
    constexpr int KEYS = TEAM == 1 ? SELECTED_KEYS : RANGE_KEYS, MEMBERS = TEAM * WARP;
    fetch_tile<D>(tile, KEYS, keys + w->k0 * s->k_row, s->k_row, w->end - w->k0, member, MEMBERS);
    fetch_tile<DV>(tile + KEYS * D, KEYS, values + w->k0 * s->v_row, s->v_row, w->end - w->k0, member, MEMBERS);
}

// What a warp of such a kernel begins with.
template <int D, int DV, int TEAM>
struct TeamWork {
    enum { KEYS = TEAM == 1 ? SELECTED_KEYS : RANGE_KEYS, MEMBERS = TEAM * WARP, STAGE = KEYS * (D + DV) };     // STAGE: numbers of a tile of keys and values
    int member, low, high;          // this thread among its team's; the two rows of its lane
    FastRows rows;
    KeyWalk walk;
    SeenKeys seen;
    const bf16 *keys, *values;      // of (b, kv)
    bf16 *memory;                   // two stages in shared memory

    // 0: there is no work for this team.
    __device__ int begin(bf16 *shared, const bf16 *k, const bf16 *v, const Mask *mask, const AttentionShape *s) {
        const int team = threadIdx.x / MEMBERS;
        const int64_t item = (int64_t)blockIdx.x * (blockDim.x / MEMBERS) + team;
        if (item >= team_items<TEAM>(s)) return 0;
        member = threadIdx.x % MEMBERS;
        memory = shared + team * 2 * STAGE;
        team_begin<TEAM, KEYS>(&rows, &walk, (int)item, mask, s);
        seen = seen_keys<TEAM>(&rows, mask, s);
        keys = k + (rows.b * s->Tk * s->k_row + rows.kv * D);
        values = v + (rows.b * s->Tk * s->v_row + rows.kv * DV);
        low = row_at(&rows, lane() / 4);
        high = row_at(&rows, lane() / 4 + 8);
        return 1;
    }

    __device__ void read_queries(unsigned (*qs)[4], const bf16 *q, const AttentionShape *s) const {
        read_left_factor<D>(qs, q + token_of_row(&rows, low, s) * s->q_row + head_of_row(&rows, low, s) * D,
                            q + token_of_row(&rows, high, s) * s->q_row + head_of_row(&rows, high, s) * D);
    }

    __device__ void fetch(int stage, const AttentionShape *s) const { fetch_keys<D, DV, TEAM>(memory + stage * STAGE, &walk, keys, values, s, member); }

    // Brings the tile `stage` and sends for the next one; 0 in *more: there is none.
    __device__ void next_tile(int stage, int *more, const Mask *mask, const AttentionShape *s) {
        *more = next_keys<KEYS>(&walk, mask);
        if (*more) fetch(stage ^ 1, s);
        cp_async_commit();
        cp_async_wait<1>();
        team_sync<TEAM>();
    }
};

template <int D, int DV, int TEAM>
static int64_t team_bytes(void) { return 2 * (TEAM == 1 ? SELECTED_KEYS : RANGE_KEYS) * (D + DV) * (int64_t)sizeof(bf16); }

// ----------------------------------------------------------------------------
// Forward: out (B,T,H,DV) and lse (B,T,H)

template <int D, int DV, int TEAM>
__global__ void __launch_bounds__((TEAM == 1 ? SELECTED_WARPS : TEAM) * WARP, TEAM == 1 ? (D == 64 ? 6 : 3) : D == 64 ? 3 : 2)
fast_forward_kernel(bf16 *out, float *lse, const bf16 *q, const bf16 *k, const bf16 *v, Mask mask, AttentionShape s) {
    typedef TeamWork<D, DV, TEAM> Work;
    constexpr int KEYS = Work::KEYS;
    extern __shared__ uint4 fast_shared[];
    Work work;
    if (!work.begin((bf16 *)fast_shared, k, v, &mask, &s)) return;
    const FastRows &rows = work.rows;
    const SeenKeys &seen = work.seen;
    const float scale = 1 / sqrtf((float)D), scale2 = scale * LOG2E;

    unsigned qs[D / 16][4];
    work.read_queries(qs, q, &s);
    float o[DV / 8][4] = {{0}}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};

    int more = next_keys<KEYS>(&work.walk, &mask);
    if (more) work.fetch(0, &s);
    cp_async_commit();
    for (int stage = 0; more; stage ^= 1) {
        const int k0 = work.walk.k0, end = work.walk.end;
        bf16 *key_tile = work.memory + stage * Work::STAGE, *value_tile = key_tile + KEYS * D;
        work.next_tile(stage, &more, &mask, &s);

        float p[KEYS / 8][4] = {{0}};
        times_turned<D, KEYS / 8>(p, qs, key_tile, 0);
        if (k0 < seen.all_lo || k0 + KEYS > min32(seen.all_hi, end)) {
            hide_keys<KEYS>(p, k0, end, &seen, -INFINITY);
        }
        float shrink[2];
        online_softmax<KEYS>(p, top, sum, shrink, scale2);
        #pragma unroll
        for (int n = 0; n < DV / 8; n++)
            #pragma unroll
            for (int e = 0; e < 4; e++) o[n][e] *= shrink[e / 2];
        #pragma unroll
        for (int n = 0; n < KEYS / 8; n += 2) {
            unsigned a[4];
            as_left_factor(a, p + n);
            times_rows<DV>(o, a, value_tile, n * 8);
        }
        team_sync<TEAM>();
    }

    float inverse[2];
    for (int i = 0; i < 2; i++) {
        const float total = quad_sum(sum[i]);
        inverse[i] = total > 0 ? 1 / total : total;      // a NaN stays one
        if (lane() % 4 == 0 && rows.first + lane() / 4 + i * 8 <= rows.last)
            lse[place_of_row(&rows, i ? work.high : work.low, &s)] = total == 0 ? -INFINITY : top[i] * scale + logf(total);
    }
    bf16 *result = work.memory + work.member / WARP * MMA_ROWS * DV;
    put_rows<DV>(result, 0, o, inverse[0], inverse[1]);
    __syncwarp();
    for (int i = lane(); i < MMA_ROWS * (DV / 8); i += WARP) {
        const int row = i / (DV / 8), chunk = i % (DV / 8);
        if (rows.first + row <= rows.last)
            *(uint4 *)(out + place_of_row(&rows, rows.first + row, &s) * DV + chunk * 8) = *(const uint4 *)chunk_of<DV>(result, row, chunk);
    }
}

template <int D, int DV, int TEAM>
static void forward_of_shape(bf16 *out, float *lse, const bf16 *q, const bf16 *k, const bf16 *v, const Mask *mask, const AttentionShape *s) {
    const int teams = TEAM == 1 ? SELECTED_WARPS : 1;
    const int64_t bytes = teams * team_bytes<D, DV, TEAM>();
    allow_shared(fast_forward_kernel<D, DV, TEAM>, bytes, FAST_NAME, FAST_FIX);
    fast_forward_kernel<D, DV, TEAM><<<grid(team_items<TEAM>(s), teams), teams * TEAM * WARP, (size_t)bytes>>>(out, lse, q, k, v, *mask, *s);
    LAUNCHED();
}

template <int TEAM>
static void forward_of_team(bf16 *out, float *lse, const bf16 *q, const bf16 *k, const bf16 *v, const Mask *mask, const AttentionShape *s) {
    if (s->D == 64) forward_of_shape<64, 64, TEAM>(out, lse, q, k, v, mask, s);
    else if (s->D == 128) forward_of_shape<128, 128, TEAM>(out, lse, q, k, v, mask, s);
    else forward_of_shape<192, 128, TEAM>(out, lse, q, k, v, mask, s);
}

static void fast_attention_forward(bf16 *out, float *lse, const bf16 *q, const bf16 *k, const bf16 *v, const Mask *mask, const AttentionShape *s) {
    if (mask->kind == MASK_SELECTED) forward_of_team<1>(out, lse, q, k, v, mask, s);
    else forward_of_team<FAST_WARPS>(out, lse, q, k, v, mask, s);
}

// ----------------------------------------------------------------------------
// Backward of the queries: dq (B,T,H,D) f32 = or += g·dS·K, with dS = P∘(dO·Vᵀ - <dout, out>)/sqrt(D); delta (B,T,H) = g·<dout, out> is for
// the kernel of dk and dv. P = exp(S - lse) is there at once, so that keys are done 16 or 32 at a time.

// The end of a warp's rows: dq = or += sum·factor, of each of a lane's two rows; four lanes write 32 bytes, which is what memory is written in.
template <int D, typename Rows>
__device__ static inline void store_dq(float *dq, int accumulate, const float (*sum)[4], const float factor[2], const Rows *rows, const AttentionShape *s) {
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = lane() / 4 + i * 8;
        if (!is_row(rows, row)) continue;
        float2 *to = (float2 *)(dq + place_of(rows, row, s) * D + lane() % 4 * 2);
        #pragma unroll
        for (int n = 0; n < D / 8; n++) {
            const float2 old = accumulate ? to[n * 4] : make_float2(0, 0);
            to[n * 4] = make_float2(old.x + sum[n][i * 2] * factor[i], old.y + sum[n][i * 2 + 1] * factor[i]);
        }
    }
}

template <int D, int DV, int TEAM>
__global__ void __launch_bounds__((TEAM == 1 ? SELECTED_WARPS : TEAM) * WARP, TEAM == 1 ? (D == 64 ? 6 : 3) : D == 64 ? 3 : 2)
fast_dq_kernel(float *dq, int accumulate, float *delta, const bf16 *dout, const float *gate, const bf16 *out, const float *lse, const bf16 *q, const bf16 *k,
               const bf16 *v, Mask mask, AttentionShape s) {
    typedef TeamWork<D, DV, TEAM> Work;
    constexpr int KEYS = Work::KEYS, STEP = D == 192 ? 16 : 32;
    extern __shared__ uint4 fast_shared[];
    Work work;
    if (!work.begin((bf16 *)fast_shared, k, v, &mask, &s)) return;
    const FastRows &rows = work.rows;
    const SeenKeys &seen = work.seen;
    const float scale = 1 / sqrtf((float)D), scale2 = scale * LOG2E;

    unsigned qs[D / 16][4], dos[DV / 16][4];
    float lse2[2], d[2] = {0, 0};
    work.read_queries(qs, q, &s);
    const int64_t place[2] = {place_of_row(&rows, work.low, &s), place_of_row(&rows, work.high, &s)};
    read_left_factor<DV>(dos, dout + place[0] * DV, dout + place[1] * DV);
    for (int step = 0; step < DV / 16; step++) {
        unsigned o[1][4];
        read_left_factor<16>(o, out + place[0] * DV + step * 16, out + place[1] * DV + step * 16);
        #pragma unroll
        for (int e = 0; e < 4; e++) d[e % 2] += low_of(dos[step][e]) * low_of(o[0][e]) + high_of(dos[step][e]) * high_of(o[0][e]);
    }
    for (int i = 0; i < 2; i++) {
        lse2[i] = lse[place[i]] * LOG2E;
        d[i] = quad_sum(d[i]);
        if (lane() % 4 == 0 && rows.first + lane() / 4 + i * 8 <= rows.last) delta[place[i]] = d[i] * (gate ? gate[place[i] * BRANCHES] : 1);
    }
    float sum[D / 8][4] = {{0}};

    int more = next_keys<KEYS>(&work.walk, &mask);
    if (more) work.fetch(0, &s);
    cp_async_commit();
    for (int stage = 0; more; stage ^= 1) {
        const int k0 = work.walk.k0, end = work.walk.end;
        bf16 *key_tile = work.memory + stage * Work::STAGE, *value_tile = key_tile + KEYS * D;
        work.next_tile(stage, &more, &mask, &s);
        const int masked = k0 < seen.all_lo || k0 + KEYS > min32(seen.all_hi, end);
        #pragma unroll 1
        for (int j = 0; j < KEYS; j += STEP) {
            float p[STEP / 8][4] = {{0}}, dp[STEP / 8][4] = {{0}};
            times_turned<D, STEP / 8>(p, qs, key_tile, j);
            times_turned<DV, STEP / 8>(dp, dos, value_tile, j);
            #pragma unroll
            for (int n = 0; n < STEP / 8; n++)
                #pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int key = k0 + j + n * 8 + lane() % 4 * 2 + e % 2, hidden = masked && (key < seen.lo[e / 2] || key >= min32(seen.hi[e / 2], end));
                    dp[n][e] = hidden ? 0 : power_of_2(p[n][e] * scale2 - lse2[e / 2]) * (dp[n][e] - d[e / 2]);
                }
            #pragma unroll
            for (int n = 0; n < STEP / 8; n += 2) {
                unsigned a[4];
                as_left_factor(a, dp + n);
                times_rows<D>(sum, a, key_tile, j + n * 8);
            }
        }
        team_sync<TEAM>();
    }

    const float factors[2] = {scale * (gate ? gate[place[0] * BRANCHES] : 1), scale * (gate ? gate[place[1] * BRANCHES] : 1)};
    store_dq<D>(dq, accumulate, sum, factors, &rows, &s);
}

template <int D, int DV, int TEAM>
static void dq_of_shape(float *dq, int accumulate, float *delta, const bf16 *dout, const float *gate, const bf16 *out, const float *lse, const bf16 *q,
                        const bf16 *k, const bf16 *v, const Mask *mask, const AttentionShape *s) {
    const int teams = TEAM == 1 ? SELECTED_WARPS : 1;
    const int64_t bytes = teams * team_bytes<D, DV, TEAM>();
    allow_shared(fast_dq_kernel<D, DV, TEAM>, bytes, FAST_NAME, FAST_FIX);
    fast_dq_kernel<D, DV, TEAM><<<grid(team_items<TEAM>(s), teams), teams * TEAM * WARP, (size_t)bytes>>>(dq, accumulate, delta, dout, gate, out, lse, q, k, v, *mask, *s);
    LAUNCHED();
}

// ----------------------------------------------------------------------------
// Backward of the keys: dv = (P·g)ᵀ·dO, dk = dSᵀ·Q. A block owns a tile of keys, 16 a warp, and streams the rows (query, head) that see
// them: row x is query x / G of a range or of a list of takers, head x % G of the group. Scores come out turned, (keys, rows), so that
// P and dS are left factors of the second products as they are, and every warp sums its own keys in registers.
//
// The first keys have many more queries than the last ones, and the first block has them all: long queues are cut into parts, whose sums
// go to `partial` and are added up in order by a second kernel. Queues that are ranges are cut at the same positions for all tiles, and parts that
// see the same queries are worked on at the same time: then q and dout come from memory once, and for the others from the L2 cache.

enum { PARTS_PER_PROCESSOR = 6, FINE_PARTS = 16, PART_ROWS = 512, FINE_ROWS = 32768, PART_THREADS = 256, PLACE_SLOTS = 4 };

// `most`: keys of a tile at most. A selected block is one tile or several.
DEVICE static inline int tile_keys(int most, const Mask *mask) { return mask->kind == MASK_SELECTED && mask->sel_block < most ? (mask->sel_block + 15) / 16 * 16 : most; }
DEVICE static inline int64_t tiles_of_block(int most, const Mask *mask) { return (mask->sel_block + tile_keys(most, mask) - 1) / tile_keys(most, mask); }
DEVICE static inline int64_t key_tiles(int most, const Mask *mask, const AttentionShape *s) {
    const int64_t size = mask->kind == MASK_SELECTED ? mask->sel_block : most, blocks = (s->Tk + size - 1) / size;
    return mask->kind == MASK_SELECTED ? blocks * tiles_of_block(most, mask) : blocks;
}

typedef struct KeyTile { int64_t b, kv, k0, count, from, to; } KeyTile;
__device__ static inline KeyTile key_tile_at(int64_t item, int most, const Mask *mask, const AttentionShape *s, const Takers *takers) {
    const int64_t tiles = key_tiles(most, mask, s), tile = item % tiles, bkv = item / tiles;
    KeyTile x = {bkv / s->KV, bkv % s->KV, tile * most, 0, 0, 0};
    if (mask->kind != MASK_SELECTED) {
        x.count = min64(most, s->Tk - x.k0);
        query_range(mask, x.k0, x.count, s, &x.from, &x.to);
        return x;
    }
    const int64_t block = tile / tiles_of_block(most, mask), inside = tile % tiles_of_block(most, mask) * tile_keys(most, mask);
    x.k0 = block * mask->sel_block + inside;
    x.count = max64(0, min64(min64(tile_keys(most, mask), mask->sel_block - inside), s->Tk - x.k0));
    if (block < takers->blocks && x.count > 0) {
        const int64_t *start = takers->start + bkv * (takers->blocks + 1) + block;
        x.from = start[0];
        x.to = start[1];
    }
    return x;
}

// How the work is cut: at most `queries` of a tile make one part, of PART_ROWS rows at least; FINE_ROWS are worth the beginning and the end of a part. `items` and
// `slots` are bounds for the launch and for the memory, which hold for any lists: all parts, and those that go to memory, slot_size numbers each.
typedef struct Parts { int64_t tiles, queries, items, slots, slot_size; } Parts;
// Lists are cut into equal parts, ranges at multiples of `queries`.
DEVICE static inline int64_t parts_of_queue(const Mask *mask, int64_t from, int64_t to, int64_t queries) {
    if (to - from <= queries) return 1;
    return mask->kind == MASK_SELECTED ? (to - from + queries - 1) / queries : (to - 1) / queries - from / queries + 1;
}
static Parts attention_parts_of(int most, const Mask *mask, const AttentionShape *s) {
    const int64_t each = key_tiles(most, mask, s), G = s->H / s->KV, bkv = s->B * s->KV;
    const auto sum_over_tiles = [&](auto of) {
        int64_t sum = 0, from, to;
        for (int64_t i = 0; i < each; i++) {
            query_range(mask, i * most, min64(most, s->Tk - i * most), s, &from, &to);
            sum += of(from, to);
        }
        return sum * bkv;
    };
    const int listed = mask->kind == MASK_SELECTED;
    const int64_t work = listed ? s->T * mask->n * tiles_of_block(most, mask) * bkv : sum_over_tiles([](int64_t from, int64_t to) { return to - from; });
    Parts p = {each * bkv, 0, 0, 0, (int64_t)tile_keys(most, mask) * (s->D + s->Dv)};
    const int64_t processors = gpu.multiProcessorCount;
    p.queries = max64((PART_ROWS + G - 1) / G, work / (PARTS_PER_PROCESSOR * processors) + 1);
    // Where tiles are few or of very different length the last parts are waited for.
    if (listed || p.tiles < PARTS_PER_PROCESSOR * processors) p.queries = max64(min64(p.queries, FINE_ROWS / G), work / (FINE_PARTS * processors) + 1);
    if (listed) {
        p.items = p.tiles + work / p.queries;       // a tile of L queries has at most 1 + L / queries parts
        p.slots = 2 * (work / p.queries);           // and one with several, fewer than 2·L / queries
        return p;
    }
    const auto parts = [&](int64_t from, int64_t to) { return parts_of_queue(mask, from, to, p.queries); };
    p.items = sum_over_tiles(parts);
    p.slots = sum_over_tiles([&](int64_t from, int64_t to) { return parts(from, to) > 1 ? parts(from, to) : 0; });
    return p;
}

// What the kernels know of it: where each tile's parts start among all parts, and among those that go to memory (tiles + 1 each); and which part of which
// tile each block takes, of which the last ones may have none.
typedef struct TilePart { int tile, part, parts; } TilePart;
typedef struct PartLists { int *start, *slot; TilePart *order; int tiles, items, queries; } PartLists;
// `partial`: these lists, then the parts.
static int64_t parts_header(const Parts *p) { return round_up(2 * (p->tiles + 1) + 3 * p->items, 32); }
static int64_t parts_numbers(int most, const Mask *mask, const AttentionShape *s) {
    const Parts p = attention_parts_of(most, mask, s);
    return parts_header(&p) + p.slots * p.slot_size;
}
// One block: each thread counts the parts of a stretch of tiles, then writes where they start.
__global__ void fast_parts_kernel(PartLists lists, int most, Mask mask, AttentionShape s, Takers takers) {
    __shared__ int items[PART_THREADS], slots[PART_THREADS];
    const int64_t tiles = lists.tiles, each = (tiles + PART_THREADS - 1) / PART_THREADS, first = min64(threadIdx.x * each, tiles), last = min64(first + each, tiles);
    const auto parts_of_tile = [&](int64_t i) {
        const KeyTile x = key_tile_at(i, most, &mask, &s, &takers);
        return (int)parts_of_queue(&mask, x.from, x.to, lists.queries);
    };
    int item = 0, kept = 0;
    for (int64_t i = first; i < last; i++) {
        const int parts = parts_of_tile(i);
        item += parts;
        kept += parts > 1 ? parts : 0;
    }
    items[threadIdx.x] = item;
    slots[threadIdx.x] = kept;
    __syncthreads();
    item = kept = 0;
    for (int i = 0; i < (int)threadIdx.x; i++) item += items[i], kept += slots[i];
    for (int64_t i = first; i < last; i++) {
        const int parts = parts_of_tile(i);
        lists.start[i] = item;
        lists.slot[i] = kept;
        item += parts;
        kept += parts > 1 ? parts : 0;
    }
    if (last == tiles) lists.start[tiles] = item, lists.slot[tiles] = kept;     // several threads may stand at the end: they agree
}
// The part with this number: of the last tile that starts there or before.
__device__ static inline TilePart part_at(const PartLists *lists, int item) {
    int64_t tile = 0;
    for (int64_t end = lists->tiles; end - tile > 1;) {
        const int64_t middle = (tile + end) / 2;
        if (lists->start[middle] <= item) tile = middle;
        else end = middle;
    }
    const TilePart part = {(int)tile, item - lists->start[tile], lists->start[tile + 1] - lists->start[tile]};
    return part;
}
// A thread a part. Parts of lists stay in order. Those of ranges that begin at the same position, of a (b, kv), are to follow each other: before a part come as many as the tiles
// have before this position, and of this position those of the tiles before.
__global__ void order_parts_kernel(PartLists lists, int most, Mask mask, AttentionShape s, Takers takers) {
    const int item = (int)global_thread();
    if (item >= lists.items) return;
    if (item >= lists.start[lists.tiles]) {     // the bound is higher
        lists.order[item].parts = 0;
        return;
    }
    const auto position = [&](int64_t tile) { return key_tile_at(tile, most, &mask, &s, &takers).from / lists.queries; };
    const TilePart own = part_at(&lists, item);
    if (mask.kind == MASK_SELECTED) {
        lists.order[item] = own;
        return;
    }
    const int64_t each = key_tiles(most, &mask, &s), first = own.tile / each * each, at = position(own.tile) + own.part;
    int64_t place = lists.start[first];
    for (int64_t i = first; i < first + each; i++) {
        const int64_t parts = lists.start[i + 1] - lists.start[i], before = at - position(i);
        place += max64(0, min64(before, parts)) + (i < own.tile && before >= 0 && before < parts);
    }
    lists.order[place] = own;
}

// Makes the lists at `partial`; none where no tile is cut.
static PartLists make_parts(const Parts *p, int most, const Mask *mask, const AttentionShape *s, const Takers *takers, float *partial) {
    int *start = (int *)partial, *slot = start + p->tiles + 1;
    const PartLists lists = {start, slot, p->slots > 0 ? (TilePart *)(slot + p->tiles + 1) : NULL, (int)p->tiles, (int)p->items, (int)p->queries};
    if (!lists.order) return lists;
    fast_parts_kernel<<<1, PART_THREADS>>>(lists, most, *mask, *s, *takers);
    order_parts_kernel<<<grid(p->items, THREADS), THREADS>>>(lists, most, *mask, *s, *takers);
    LAUNCHED();
    return lists;
}

// The part that a block of threads takes: x is its tile with the queries of this part; 0 for a block behind the last part. Without lists a block has a tile.
typedef struct KeyPart { KeyTile x; TilePart of; } KeyPart;
__device__ static inline int part_of_block(KeyPart *own, const PartLists *lists, int most, const Mask *mask, const AttentionShape *s, const Takers *takers) {
    TilePart of = {(int)blockIdx.x, 0, 1};
    if (lists->order) of = lists->order[blockIdx.x];
    const int part = of.part, parts = of.parts;
    if (parts == 0) return 0;
    const KeyTile all = key_tile_at(of.tile, most, mask, s, takers);
    own->x = all;
    own->of = of;
    if (parts == 1) return 1;
    if (mask->kind == MASK_SELECTED) {
        const int length = (int)(all.to - all.from), each = (length + parts - 1) / parts;
        own->x.from = all.from + part * each;
        own->x.to = all.from + min32((part + 1) * each, length);
    } else {
        const int first = ((int)all.from / lists->queries + part) * lists->queries;
        own->x.from = max64(all.from, first);
        own->x.to = min64(all.to, first + lists->queries);
    }
    return 1;
}

// A block's shared memory: keys and values, then two stages of rows, each of q, dout and three numbers; tokens and heads of four stages.
template <int D, int DV, int ROWS>
static int64_t dkv_bytes(int keys) {
    return (keys + 2 * ROWS) * (D + DV) * (int64_t)sizeof(bf16) + 2 * 3 * ROWS * (int64_t)sizeof(float) + PLACE_SLOTS * 2 * ROWS * (int64_t)sizeof(int);
}

template <int D, int DV, int ROWS>
static int dkv_fits(void) { return dkv_bytes<D, DV, ROWS>(RANGE_KEYS) <= (int64_t)gpu.sharedMemPerBlockOptin; }

// Whether the query at position t sees a key. With selection, key and query are of the same list.
__device__ static inline int sees_key(const Mask *mask, int t, int key) {
    if (mask->kind == MASK_COMPRESSED) return key * mask->stride + mask->block - 1 <= t;
    return key <= t && (mask->kind == MASK_SELECTED || t - key < mask->window);
}

template <int D, int DV, int ROWS>
__global__ void __launch_bounds__(FAST_WARPS * WARP, D == 64 ? 3 : 2)
fast_dkv_kernel(bf16 *dk, bf16 *dv, const bf16 *dout, const float *gate, const float *delta, const float *lse, const bf16 *q, const bf16 *k, const bf16 *v,
                Mask mask, AttentionShape s, Takers takers, float *partial, PartLists lists) {
    constexpr int STEP = D == 64 ? 32 : 16, STAGE = ROWS * (D + DV);
    extern __shared__ uint4 fast_shared[];
    KeyPart own;
    if (!part_of_block(&own, &lists, RANGE_KEYS, &mask, &s, &takers)) return;
    const KeyTile x = own.x;
    const int64_t from = x.from;
    const int keys = blockDim.x / 2, count = (int)x.count, G = s.H / s.KV;
    const int rows = (int)(x.to - from) * G, stages = (rows + ROWS - 1) / ROWS, t0 = (int)s.t0;
    const int *list = mask.kind == MASK_SELECTED ? takers.queries + from : NULL;
    bf16 *key_tile = (bf16 *)fast_shared, *value_tile = key_tile + keys * D, *memory = value_tile + keys * DV;
    float *numbers = (float *)(memory + 2 * STAGE);                 // (stage, lse / delta / gate, ROWS)
    int *places = (int *)(numbers + 2 * 3 * ROWS);                  // (slot, token / head, ROWS)
    const float scale = 1 / sqrtf((float)D), scale2 = scale * LOG2E;

    // Tokens and heads of a stage's rows, head -1: none. They are on their way two stages before the rows themselves.
    const auto fetch_places = [&](int stage) {
        int *tokens = places + stage % PLACE_SLOTS * 2 * ROWS;
        for (int i = threadIdx.x; i < ROWS; i += blockDim.x) {
            const int row = stage * ROWS + i, query = row / G;
            tokens[ROWS + i] = row < rows ? (int)x.kv * G + row - query * G : -1;
            if (list) cp_async_4(tokens + i, list + (row < rows ? query : 0), row < rows ? 4 : 0);
            else tokens[i] = row < rows ? (int)from + query : 0;
        }
    };
    const auto fetch_stage = [&](int stage) {
        const int *tokens = places + stage % PLACE_SLOTS * 2 * ROWS, *heads = tokens + ROWS;
        bf16 *q_tile = memory + stage % 2 * STAGE, *dout_tile = q_tile + ROWS * D;
        for (int i = threadIdx.x; i < ROWS * (D / 8); i += blockDim.x) {
            const int row = i / (D / 8), chunk = i % (D / 8), head = heads[row];
            cp_async_16(chunk_of<D>(q_tile, row, chunk), head < 0 ? q : q + (x.b * s.T + tokens[row]) * s.q_row + head * D + chunk * 8, head < 0 ? 0 : 16);
        }
        for (int i = threadIdx.x; i < ROWS * (DV / 8); i += blockDim.x) {
            const int row = i / (DV / 8), chunk = i % (DV / 8), head = heads[row];
            cp_async_16(chunk_of<DV>(dout_tile, row, chunk), head < 0 ? dout : dout + ((x.b * s.T + tokens[row]) * s.H + head) * DV + chunk * 8, head < 0 ? 0 : 16);
        }
        for (int i = threadIdx.x; i < ROWS; i += blockDim.x) {
            const int there = heads[i] < 0 ? 0 : 4;
            const int64_t place = there ? (x.b * s.T + tokens[i]) * s.H + heads[i] : 0;
            float *to_numbers = numbers + stage % 2 * 3 * ROWS + i;
            cp_async_4(to_numbers, lse + place, there);
            cp_async_4(to_numbers + ROWS, delta + place, there);
            if (gate) cp_async_4(to_numbers + 2 * ROWS, gate + place * BRANCHES, there);
            else to_numbers[2 * ROWS] = 1;
        }
    };

    const int mine = threadIdx.x / WARP * MMA_ROWS, first_key = (int)x.k0 + mine + lane() / 4;
    float dks[D / 8][4] = {{0}}, dvs[DV / 8][4] = {{0}};
    if (stages > 0) {
        fetch_tile<D>(key_tile, keys, k + (x.b * s.Tk + x.k0) * s.k_row + x.kv * D, s.k_row, count, threadIdx.x, blockDim.x);
        fetch_tile<DV>(value_tile, keys, v + (x.b * s.Tk + x.k0) * s.v_row + x.kv * DV, s.v_row, count, threadIdx.x, blockDim.x);
        fetch_places(0);
        fetch_places(1);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        fetch_stage(0);
        fetch_places(2);
        cp_async_commit();
        fetch_stage(1);
        fetch_places(3);
        cp_async_commit();
    }
    for (int stage = 0; stage < stages; stage++) {
        cp_async_wait<1>();
        __syncthreads();
        const int *tokens = places + stage % PLACE_SLOTS * 2 * ROWS, last = min32(rows - stage * ROWS, ROWS) - 1;
        // Queries ascend, keys too: the corners say whether everything between them is seen.
        const int masked = !sees_key(&mask, t0 + tokens[0], (int)x.k0 + count - 1) || !sees_key(&mask, t0 + tokens[last], (int)x.k0);
        const float *lses = numbers + stage % 2 * 3 * ROWS, *deltas = lses + ROWS, *gates = deltas + ROWS;
        bf16 *q_tile = memory + stage % 2 * STAGE, *dout_tile = q_tile + ROWS * D;
        #pragma unroll 1
        for (int j = 0; j < ROWS; j += STEP) {
            // Rows behind the last are all zeros: they add nothing to any sum. Keys behind the last are other rows of the result.
            float p[STEP / 8][4] = {{0}}, ds[STEP / 8][4] = {{0}};
            tile_times_turned<D, STEP / 8>(p, key_tile, mine, q_tile, j);
            tile_times_turned<DV, STEP / 8>(ds, value_tile, mine, dout_tile, j);
            #pragma unroll
            for (int n = 0; n < STEP / 8; n++) {
                const int row = j + n * 8 + lane() % 4 * 2;
                #pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int at = row + e % 2, hidden = masked && !sees_key(&mask, t0 + tokens[at], first_key + e / 2 * 8);
                    const float probability = hidden ? 0 : power_of_2(p[n][e] * scale2 - lses[at] * LOG2E);
                    p[n][e] = probability * gates[at];
                    ds[n][e] = probability * (ds[n][e] * gates[at] - deltas[at]);
                }
            }
            #pragma unroll
            for (int n = 0; n < STEP / 8; n += 2) {
                unsigned a[4];
                as_left_factor(a, p + n);
                times_rows<DV>(dvs, a, dout_tile, j + n * 8);
                as_left_factor(a, ds + n);
                times_rows<D>(dks, a, q_tile, j + n * 8);
            }
        }
        __syncthreads();
        if (stage + 2 < stages) {
            fetch_stage(stage + 2);
            fetch_places(stage + 4);
        }
        cp_async_commit();
    }

    if (own.of.parts > 1) {        // (keys, D + DV) of this part
        #pragma unroll
        for (int i = 0; i < 2; i++) {
            float *to_key = partial + ((lists.slot[own.of.tile] + own.of.part) * (int64_t)keys + mine + lane() / 4 + i * 8) * (D + DV) + lane() % 4 * 2;
            #pragma unroll
            for (int n = 0; n < D / 8; n++) *(float2 *)(to_key + n * 8) = make_float2(dks[n][i * 2] * scale, dks[n][i * 2 + 1] * scale);
            #pragma unroll
            for (int n = 0; n < DV / 8; n++) *(float2 *)(to_key + D + n * 8) = make_float2(dvs[n][i * 2], dvs[n][i * 2 + 1]);
        }
        return;
    }
    // The warp's own keys and values have been read for the last time: the results pass through their place.
    __syncwarp();
    put_rows<D>(key_tile, mine, dks, scale, scale);
    put_rows<DV>(value_tile, mine, dvs, 1, 1);
    __syncwarp();
    for (int i = lane(); i < MMA_ROWS * (D / 8); i += WARP) {
        const int row = mine + i / (D / 8), chunk = i % (D / 8);
        if (row < count) *(uint4 *)(dk + (x.b * s.Tk + x.k0 + row) * s.k_row + x.kv * D + chunk * 8) = *(const uint4 *)chunk_of<D>(key_tile, row, chunk);
    }
    for (int i = lane(); i < MMA_ROWS * (DV / 8); i += WARP) {
        const int row = mine + i / (DV / 8), chunk = i % (DV / 8);
        if (row < count) *(uint4 *)(dv + (x.b * s.Tk + x.k0 + row) * s.v_row + x.kv * DV + chunk * 8) = *(const uint4 *)chunk_of<DV>(value_tile, row, chunk);
    }
}

// dk, dv of the tiles that were cut: their parts in order. Four blocks a tile, a thread 8 numbers of dv or 8 of each half of dk, which with angles are turned back.
__global__ void fast_add_parts_kernel(bf16 *dk, bf16 *dv, const float *angles, const float *partial, const int *slot, int most, Mask mask, AttentionShape s, Takers takers) {
    const int first = slot[blockIdx.x], last = slot[blockIdx.x + 1], wide = s.D + s.Dv, keys = tile_keys(most, &mask), pairs = s.D / 16, each = pairs + s.Dv / 8;
    if (first == last) return;
    const KeyTile x = key_tile_at(blockIdx.x, most, &mask, &s, &takers);
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < x.count * each; i += gridDim.y * blockDim.x) {
        const int row = i / each, at = i % each, is_dk = at < pairs, c = is_dk ? at * 8 : s.D + (at - pairs) * 8;
        const int64_t token = x.b * s.Tk + x.k0 + row;
        float2 sum[2][4] = {};
        for (int part = first; part < last; part++)
            for (int half = 0; half <= is_dk; half++) {
                const float4 *from = (const float4 *)(partial + (part * (int64_t)keys + row) * wide + c + half * s.D / 2), a = from[0], b = from[1];
                sum[half][0].x += a.x, sum[half][0].y += a.y, sum[half][1].x += a.z, sum[half][1].y += a.w;
                sum[half][2].x += b.x, sum[half][2].y += b.y, sum[half][3].x += b.z, sum[half][3].y += b.w;
            }
        const float2 *of_key = is_dk && angles ? (const float2 *)(angles + (x.k0 + row) * s.D + c) : NULL;
        for (int j = 0; j < 4 && of_key; j++) turn_back(&sum[0][j], &sum[1][j], of_key[j], of_key[s.D / 4 + j]);
        bf16 *to = is_dk ? dk + token * s.k_row + x.kv * s.D + c : dv + token * s.v_row + x.kv * s.Dv + c - s.D;
        for (int half = 0; half <= is_dk; half++)
            *(uint4 *)(to + half * s.D / 2) = make_uint4(two_bf16(sum[half][0].x, sum[half][0].y), two_bf16(sum[half][1].x, sum[half][1].y), two_bf16(sum[half][2].x, sum[half][2].y),
                                                         two_bf16(sum[half][3].x, sum[half][3].y));
    }
}

// Which queries took which block, what find_takers finds by reading all of block_idx for every block. Here a warp goes through the choices of
// TAKER_QUERIES queries once, one query after the other: its blocks are all different, so that the lanes count without getting in each
// other's way. Three steps: how often each stretch of queries takes each block; where its takers go; these written down.
enum { TAKER_QUERIES = 128 };
static int64_t taker_stretches(const AttentionShape *s) { return (s->T + TAKER_QUERIES - 1) / TAKER_QUERIES; }

// seen (B,KV,stretches,blocks): counts, or with `fill` where the takers of the stretch begin in their list. A block of one warp a stretch. Choices of
// AHEAD queries, as far as a warp holds them, are asked for at once: one after the other, each query would wait for memory.
__global__ void takers_kernel(int *seen, Takers takers, const int *block_idx, int64_t n, AttentionShape s, int64_t stretches, int fill) {
    enum { AHEAD = 16 };
    extern __shared__ int taken[];      // so many of this block so far; with `fill` the next place in the list of (b, kv)
    const int64_t stretch = blockIdx.x % stretches, bkv = blockIdx.x / stretches, t0 = stretch * TAKER_QUERIES, t1 = min64(t0 + TAKER_QUERIES, s.T);
    const int64_t *start = takers.start + bkv * (takers.blocks + 1);
    int *own = seen + blockIdx.x * takers.blocks, *to = fill ? takers.queries + start[0] : NULL;
    for (int64_t j = lane(); j < takers.blocks; j += WARP) taken[j] = fill ? own[j] + (int)(start[j] - start[0]) : 0;
    __syncwarp();
    const auto choices_of = [&](int64_t t) { return block_idx + ((bkv / s.KV * s.T + t) * s.KV + bkv % s.KV) * n; };
    for (int64_t t = t0; t < t1; t += AHEAD) {
        int first[AHEAD];       // of each query's choices, a lane
        #pragma unroll
        for (int u = 0; u < AHEAD; u++) first[u] = t + u < t1 && lane() < n ? choices_of(t + u)[lane()] : -1;
        #pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            for (int64_t m = lane(); m < n && t + u < t1; m += WARP) {
                const int block = m < WARP ? first[u] : choices_of(t + u)[m];
                if (block < 0) continue;
                const int place = taken[block]++;
                if (fill) to[place] = (int)(t + u);
            }
            __syncwarp();
        }
    }
    for (int64_t j = lane(); j < takers.blocks && !fill; j += WARP) own[j] = taken[j];
}

// A thread a block: its count, and of each stretch where it begins.
__global__ void takers_count_kernel(int *seen, Takers takers, int64_t lists, int64_t stretches) {
    const int64_t list = global_thread(), block = list % takers.blocks;
    if (list >= lists) return;
    int *of_stretch = seen + list / takers.blocks * stretches * takers.blocks + block, sum = 0;
    #pragma unroll 8
    for (int64_t i = 0; i < stretches; i++) {
        const int count = of_stretch[i * takers.blocks];
        of_stretch[i * takers.blocks] = sum;
        sum += count;
    }
    takers.count[list] = sum;
}

// As lists_start_kernel, by all threads of a block.
__global__ void takers_start_kernel(Takers takers, int64_t group_items) {
    __shared__ int64_t sums[PART_THREADS];
    const int64_t each = (takers.blocks + PART_THREADS - 1) / PART_THREADS, first = min64(threadIdx.x * each, takers.blocks), last = min64(first + each, takers.blocks);
    const int64_t *count = takers.count + blockIdx.x * takers.blocks;
    int64_t *start = takers.start + blockIdx.x * (takers.blocks + 1), sum = 0;
    for (int64_t i = first; i < last; i++) sum += count[i];
    sums[threadIdx.x] = sum;
    __syncthreads();
    sum = blockIdx.x * group_items;
    for (int i = 0; i < (int)threadIdx.x; i++) sum += sums[i];
    for (int64_t i = first; i < last; i++) {
        start[i] = sum;
        sum += count[i];
    }
    if (threadIdx.x == PART_THREADS - 1) start[takers.blocks] = sum;
}

static int64_t takers_scratch(const AttentionShape *s, const Mask *mask) {
    return mask->kind == MASK_SELECTED ? s->B * s->KV * taker_stretches(s) * ((s->Tk - 1) / mask->sel_block + 1) : 0;
}
static int64_t fast_attention_partial(const AttentionShape *s, const Mask *mask) {
    return max64(takers_scratch(s, mask), parts_numbers(RANGE_KEYS, mask, s));      // the lists are made before the parts are
}

static Takers takers_or_none(const Takers *takers) {
    const Takers none = {NULL, NULL, NULL, 0};
    return takers ? *takers : none;
}

static void fast_takers(const Takers *takers, const int *block_idx, int64_t n, const AttentionShape *s, int *seen) {
    const int64_t stretches = taker_stretches(s), bkv = s->B * s->KV, bytes = takers->blocks * (int64_t)sizeof(int);
    if (bytes > (int64_t)gpu.sharedMemPerBlockOptin) {
        find_takers(takers, block_idx, n, s);
        return;
    }
    allow_shared(takers_kernel, bytes, FAST_NAME, FAST_FIX);
    takers_kernel<<<grid(bkv * stretches, 1), WARP, (size_t)bytes>>>(seen, *takers, block_idx, n, *s, stretches, 0);
    takers_count_kernel<<<grid(bkv * takers->blocks, WARP), WARP>>>(seen, *takers, bkv * takers->blocks, stretches);
    takers_start_kernel<<<(unsigned)bkv, PART_THREADS>>>(*takers, s->T * n);
    takers_kernel<<<grid(bkv * stretches, 1), WARP, (size_t)bytes>>>(seen, *takers, block_idx, n, *s, stretches, 1);
    LAUNCHED();
}

template <int D, int DV, int ROWS>
static void dkv_of_shape(bf16 *dk, bf16 *dv, const bf16 *dout, const float *gate, const float *delta, const float *lse, const bf16 *q, const bf16 *k, const bf16 *v,
                         const Mask *mask, const AttentionShape *s, const Takers *takers, float *partial) {
    const Parts p = attention_parts_of(RANGE_KEYS, mask, s);
    const int keys = tile_keys(RANGE_KEYS, mask);
    const int64_t bytes = dkv_bytes<D, DV, ROWS>(keys);
    const Takers queues = takers_or_none(takers);
    const PartLists lists = make_parts(&p, RANGE_KEYS, mask, s, &queues, partial);
    allow_shared(fast_dkv_kernel<D, DV, ROWS>, bytes, FAST_NAME, FAST_FIX);
    fast_dkv_kernel<D, DV, ROWS><<<grid(p.items, 1), (unsigned)(keys / MMA_ROWS * WARP), (size_t)bytes>>>(
        dk, dv, dout, gate, delta, lse, q, k, v, *mask, *s, queues, partial + parts_header(&p), lists);
    LAUNCHED();
    if (!lists.order) return;
    fast_add_parts_kernel<<<dim3(grid(p.tiles, 1), 4), THREADS>>>(dk, dv, (const float *)NULL, partial + parts_header(&p), lists.slot, RANGE_KEYS, *mask, *s, queues);
    LAUNCHED();
}

template <int D, int DV, int ROWS>
static void backward_of_shape(float *dq, int accumulate_dq, bf16 *dk, bf16 *dv, const bf16 *dout, const float *gate, const bf16 *out, const float *lse, const bf16 *q,
                              const bf16 *k, const bf16 *v, const Mask *mask, const AttentionShape *s, float *delta, const Takers *takers, float *partial) {
    if (mask->kind == MASK_SELECTED) dq_of_shape<D, DV, 1>(dq, accumulate_dq, delta, dout, gate, out, lse, q, k, v, mask, s);
    else dq_of_shape<D, DV, FAST_WARPS>(dq, accumulate_dq, delta, dout, gate, out, lse, q, k, v, mask, s);
    if (s->Tk > 0) dkv_of_shape<D, DV, ROWS>(dk, dv, dout, gate, delta, lse, q, k, v, mask, s, takers, partial);
}

// dq (B,T,H,D) f32, without gaps, = or += ; dk, dv (strided as k, v) = . dout (B,T,H,Dv) is that of the branches' sum: the gate multiplies it
// here. delta: B·T·H numbers, partial: fast_attention_partial.
static void fast_attention_backward(float *dq, int accumulate_dq, bf16 *dk, bf16 *dv, const bf16 *dout, const float *gate, const bf16 *out, const float *lse, const bf16 *q,
                             const bf16 *k, const bf16 *v, const Mask *mask, const AttentionShape *s, float *delta, const Takers *takers, float *partial) {
    if (mask->kind == MASK_SELECTED && s->Tk > 0) fast_takers(takers, mask->block_idx, mask->n, s, (int *)partial);
    if (s->D == 64) backward_of_shape<64, 64, 64>(dq, accumulate_dq, dk, dv, dout, gate, out, lse, q, k, v, mask, s, delta, takers, partial);
    else if (s->D == 128 && dkv_fits<128, 128, 64>()) backward_of_shape<128, 128, 64>(dq, accumulate_dq, dk, dv, dout, gate, out, lse, q, k, v, mask, s, delta, takers, partial);
    else if (s->D == 128) backward_of_shape<128, 128, 32>(dq, accumulate_dq, dk, dv, dout, gate, out, lse, q, k, v, mask, s, delta, takers, partial);
    else backward_of_shape<192, 128, 32>(dq, accumulate_dq, dk, dv, dout, gate, out, lse, q, k, v, mask, s, delta, takers, partial);
}

// ----------------------------------------------------------------------------
// The same on Hopper (sm_90a): wgmma instead of mma.sync, which reaches 3/4 of the matrix units there at best.
// A block is a warpgroup that copies and two or three that compute, 64 rows each: tiles come by the copy engine into rings of buffers, `full` and `empty`
// barriers pass them to and fro, and while one warpgroup is at its exponentials the others keep the matrix units busy (FlashAttention-3, Shah et al. 2024).
//
// A tile of rows is whole tokens with all heads of a group: a box (64 channels, G heads, tokens) of q as it lies in memory. Where G does not
// divide the tile's rows, the last ones stay empty.

enum { WARPGROUP = 4 * WARP, PANEL = 64, SLAB_ROWS = 64, HOPPER_KEYS = 128, NARROW_KEYS = 112 };      // a panel is 64 channels of a tile: rows of 128 bytes, as swizzled
struct alignas(1024) SharedKilobyte { unsigned char bytes[1024]; };     // what a swizzled tile must be aligned to

// Whether this program was compiled for this GPU's wgmma.
__global__ void hopper_code_kernel(int *there) { *there = HOPPER_CODE; }
static int hopper_code(void) {
    static int there = -1;
    if (there >= 0) return there;
    device_open();
    there = gpu.major == 9 && gpu.minor == 0;
    if (!there || !cublas) return there;        // the GPU of device_plan cannot be asked
    int *on_device = (int *)device_malloc(sizeof there);
    hopper_code_kernel<<<1, 1>>>(on_device);
    LAUNCHED();
    to_host(&there, on_device, sizeof there);
    CUDA(cudaFree(on_device));
    return there;
}

// 1 if this tier takes the shape, which fast_attention has let pass. Of selection, where blocks fill most of the 64 rows of
// wgmma and the heads of a group are enough for a box of their own.
static int hopper_attention(const AttentionShape *s, const Mask *mask) {
    const int64_t G = s->H / s->KV;
    if (mask->kind == MASK_SELECTED && (mask->sel_block <= SLAB_ROWS / 2 || G < 4)) return 0;
    return s->D == s->Dv && (s->D == 64 || s->D == 128) && G <= SLAB_ROWS && hopper_code();
}

// A tensor of four dimensions, the innermost first: their sizes, from the second on how many numbers lie between neighbours, and the box of each, of the first
// PANEL. They may overlap, and need not ascend.
typedef struct TensorShape { int64_t size[4], stride[4], box[4]; } TensorShape;
static CUtensorMap tensor_map_of_shape(const bf16 *x, const TensorShape *shape) {
    static decltype(&cuTensorMapEncodeTiled) encode;
    if (!encode) {
        void *entry = NULL;
        #if defined CUDA_ON_CPU || CUDART_VERSION >= 12050
        CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, NULL));
        #else
        CUDA(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault));
        #endif
        if (!entry) die(1, "the GPU's driver knows no tensor maps: it must be of CUDA 12 or later");
        memcpy(&encode, &entry, sizeof encode);
    }
    CUtensorMap map;
    cuuint64_t sizes[4], strides[4];
    cuuint32_t box[4], steps[4];
    for (int i = 0; i < 4; i++) sizes[i] = (cuuint64_t)shape->size[i], strides[i] = (cuuint64_t)shape->stride[i] * 2, box[i] = (cuuint32_t)shape->box[i], steps[i] = 1;
    const CUresult status = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, (void *)x, sizes, strides + 1, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS)
        die(1, "internal error: tensor map of (%" PRId64 ",%" PRId64 ",%" PRId64 ",%" PRId64 "): CUDA error %d", shape->size[3], shape->size[2], shape->size[1], shape->size[0], (int)status);
    return map;
}
// A tensor (B,T,heads,width) whose tokens lie `row` numbers apart, to be read in boxes of PANEL channels, `box_heads` and `box_tokens`.
static CUtensorMap tensor_map(const bf16 *x, int64_t width, int64_t heads, int64_t T, int64_t B, int64_t row, int64_t box_heads, int64_t box_tokens) {
    const TensorShape shape = {{width, heads, T, B}, {1, width, row, T * row}, {PANEL, box_heads, box_tokens, 1}};
    return tensor_map_of_shape(x, &shape);
}
static int64_t slab_tokens(const AttentionShape *s, int64_t rows) { return rows / (s->H / s->KV); }
static CUtensorMap query_map(const bf16 *x, int64_t width, int64_t row, const AttentionShape *s, int64_t rows) {
    return tensor_map(x, width, s->H, s->T, s->B, row, s->H / s->KV, slab_tokens(s, rows));
}
static CUtensorMap key_map(const bf16 *x, int64_t width, int64_t row, const AttentionShape *s, int64_t keys) {
    return tensor_map(x, width, s->KV, s->Tk, s->B, row, 1, keys);
}

// A tile (rows, W) in shared memory is its panels one behind the other. Brings a box of each from (b, token, head).
template <int W>
__device__ static inline void copy_tile(bf16 *tile, int rows, const CUtensorMap *map, int b, int token, int head, uint64_t *full) {
    #pragma unroll
    for (int panel = 0; panel < W / PANEL; panel++) copy_box(tile + panel * rows * PANEL, map, panel * PANEL, head, token, b, full);
}
HOPPER_DEVICE static inline bf16 *panel_chunk(bf16 *tile, int rows, int row, int chunk) { return chunk_of<PANEL>(tile + chunk / 8 * rows * PANEL, row, chunk % 8); }

// A factor of wgmma: from `on` numbers behind this place of a tile on. Groups of 8 rows follow each other, a panel follows `rows` rows. What changes from one
// product to the next is added to the descriptor, not to the address: one addition instead of the whole again.
HOPPER_DEVICE static inline uint64_t swizzled_matrix(const bf16 *at, int rows, int on) {
    const unsigned low = (shared_address(at) >> 4 | (unsigned)(rows * PANEL * 2 >> 4) << 16) + (unsigned)(on * 2 >> 4), high = 8 * PANEL * 2 >> 4 | 1u << 30;
    return (uint64_t)high << 32 | low;
}
// d (64,N) = left (64,W), of a tile of left_rows, · (N rows of another)ᵀ
template <int W, int N>
__device__ static inline void slab_times_turned(float (*d)[4], const bf16 *left, int left_rows, const bf16 *tile, int rows) {
    #pragma unroll
    for (int step = 0; step < W / 16; step++) {
        const int panel = step / 4 * PANEL, inside = step % 4 * 16;
        wgmma<N>(d, swizzled_matrix(left, left_rows, panel * left_rows + inside), swizzled_matrix(tile, rows, panel * rows + inside), step > 0);
    }
}
// d (64,W) += left (64,ROWS) · (the tile (ROWS,W))
template <int W, int ROWS>
__device__ static inline void factor_times_rows(float (*d)[4], const unsigned (*left)[4], const bf16 *tile) {
    #pragma unroll
    for (int step = 0; step < ROWS / 16; step++) wgmma_turned<W>(d, left[step], swizzled_matrix(tile, ROWS, step * 16 * PANEL));
}

// x, of which the compiler is to know that all lanes of a warp have the same: what follows from it, such as the factors of wgmma, then is computed once a warp.
// All lanes must be here.
HOPPER_DEVICE static inline int same_in_warp(int x) { return __shfl_sync(~0u, x, 0); }

// A warp has done with a buffer: all its lanes have, when one of them says so.
HOPPER_DEVICE static inline void let_go(uint64_t *empty) {
    __syncwarp();
    if (lane() == 0) barrier_arrive(empty);
}

// Where one stands in a ring of N buffers, and the parity of the round.
template <int N>
struct Ring {
    int at = 0, parity = 0;
    __device__ void next() {
        if (++at == N) at = 0, parity ^= 1;
    }
    __device__ void skip(int n) {
        for (; n > 0; n--) next();
    }
};

// The `round`-th item of this block where items become smaller: blocks take them to and fro, so that all have as much to do.
HOPPER_DEVICE static inline int64_t item_to_and_fro(int round) {
    const int blocks = gridDim.x;
    return (int64_t)round * blocks + (round % 2 ? blocks - 1 - (int)blockIdx.x : (int)blockIdx.x);
}

// The `round`-th tile of rows of this block, tokens t0 .. t0 + tokens - 1 of (b, kv), and the `steps` tiles of keys from k0 on that they see.
// Late tokens come first.
typedef struct RowTile { int b, kv, t0, k0, steps; } RowTile;
template <int ROWS, int KEYS>
__device__ static inline void keys_of_tile(RowTile *x, const Mask *mask, const AttentionShape *s) {
    int64_t lo, hi, unused;
    key_range(mask, s->t0 + x->t0, &lo, &unused);
    key_range(mask, s->t0 + min64(x->t0 + ROWS / (s->H / s->KV), s->T) - 1, &unused, &hi);
    x->k0 = (int)lo;
    x->steps = (int)((max64(0, min64(hi, s->Tk) - lo) + KEYS - 1) / KEYS);
}
template <int ROWS, int KEYS>
__device__ static inline int row_tile(RowTile *x, int round, const Mask *mask, const AttentionShape *s) {
    const int bkv = (int)s->B * s->KV, tokens = ROWS / (s->H / s->KV), tiles = ((int)s->T + tokens - 1) / tokens;
    const int64_t item = item_to_and_fro(round);
    if (item >= (int64_t)tiles * bkv) return 0;
    x->b = (int)(item % bkv) / s->KV;
    x->kv = (int)(item % bkv) % s->KV;
    x->t0 = (tiles - 1 - (int)(item / bkv)) * tokens;
    keys_of_tile<ROWS, KEYS>(x, mask, s);
    return 1;
}

// Whether a window is gone through in tiles of NARROW_KEYS: where they cover what a tile of rows sees of it with clearly fewer keys than tiles of HOPPER_KEYS
// (519 keys for 8 queries and a window of 512: 560 instead of 640).
static int narrow_tiles(int64_t rows, const Mask *mask, const AttentionShape *s) {
    const int64_t seen = mask->window + slab_tokens(s, rows) - 1;
    return mask->kind == MASK_WINDOW && 20 * round_up(seen, NARROW_KEYS) < 19 * round_up(seen, HOPPER_KEYS);
}

// Where in a tile of rows the 16 of this warp begin, which is one of the warpgroup `slab` among those that compute.
HOPPER_DEVICE static inline int first_of_warp(int slab) { return slab * SLAB_ROWS + (int)(threadIdx.x / WARP) % 4 * MMA_ROWS; }
// These rows.
template <int ROWS>
__device__ static inline FastRows rows_of_warp(const RowTile *x, int slab, const AttentionShape *s) {
    const int G = s->H / s->KV, tokens = min32((int)s->T - x->t0, ROWS / G);
    const FastRows rows = {x->b, x->kv, x->t0 * G + first_of_warp(slab), (x->t0 + tokens) * G - 1};
    return rows;
}

// Registers a thread: a block has those that it was started with, which are shared out by warpgroup, the one that copies gets few. Who asks for more than the
// others have given back waits for ever.
template <int SLABS> constexpr int copy_registers = SLABS == 2 ? 24 : 32;
template <int SLABS> constexpr int compute_registers = SLABS == 2 ? 240 : 160;
enum { MERGE_REGISTERS = 40 };      // where the warps that copy have lists to merge
template <int SLABS> constexpr int merged_registers = SLABS == 2 ? 232 : 152;
template <int SLABS> constexpr int all_registers = 65536 / WARPGROUP / (SLABS + 1) / 8 * 8 * (SLABS + 1);
static_assert(copy_registers<2> + 2 * compute_registers<2> <= all_registers<2> && copy_registers<3> + 3 * compute_registers<3> <= all_registers<3>, "registers");
static_assert(MERGE_REGISTERS + 2 * merged_registers<2> <= all_registers<2> && MERGE_REGISTERS + 3 * merged_registers<3> <= all_registers<3>, "registers");

// The gated sum of the branches (eq. 5), as the last of them makes it: out (B,T,H,Dv) = Σ gate·branch, `before` are the branches before it, gates (B,T,H,3).
template <typename F> struct BranchSum { F *out; const F *before[BRANCHES - 1]; const float *gates; };

// The 16 rows of a warp in memory, a chunk of 8 channels a lane at a time.
template <int DV>
struct RowChunks {
    enum { COUNT = MMA_ROWS * (DV / 8) / WARP };
    int64_t place;      // of row lane % 16
    __device__ RowChunks(const FastRows *rows, const AttentionShape *s) : place(place_of(rows, lane() % MMA_ROWS, s)) {}
    __device__ static int row(int i) { return i * (WARP / (DV / 8)) + lane() / (DV / 8); }
    __device__ static int chunk(void) { return lane() % (DV / 8); }
    __device__ int64_t of_row(int row) const { return __shfl_sync(~0u, (long long)place, row); }
    __device__ int64_t of_chunk(int i) const { return of_row(row(i)) * DV + chunk() * 8; }
};
// What the sum takes of the branches before, asked for while the last products are on their way.
template <int DV>
struct BranchesBefore {
    uint4 of[BRANCHES - 1][RowChunks<DV>::COUNT];
    float gate[BRANCHES];       // of row lane % 16
    __device__ void fetch(const BranchSum<bf16> *total, const FastRows *rows, const AttentionShape *s) {
        const RowChunks<DV> chunks(rows, s);
        #pragma unroll
        for (int b = 0; b < BRANCHES; b++) gate[b] = total->gates[chunks.place * BRANCHES + b];
        #pragma unroll
        for (int i = 0; i < RowChunks<DV>::COUNT; i++) {
            const int64_t at = chunks.of_chunk(i);
            #pragma unroll
            for (int b = 0; b < BRANCHES - 1; b++) of[b][i] = *(const uint4 *)(total->before[b] + at);
        }
    }
    // Of chunk i, whose last branch is `last`.
    __device__ uint4 sum(int i, uint4 last) const {
        float g[BRANCHES];
        #pragma unroll
        for (int b = 0; b < BRANCHES; b++) g[b] = __shfl_sync(~0u, gate[b], RowChunks<DV>::row(i));
        const unsigned all[BRANCHES][4] = {{of[0][i].x, of[0][i].y, of[0][i].z, of[0][i].w}, {of[1][i].x, of[1][i].y, of[1][i].z, of[1][i].w}, {last.x, last.y, last.z, last.w}};
        unsigned y[4];
        #pragma unroll
        for (int c = 0; c < 4; c++) {
            float low = 0, high = 0;
            #pragma unroll
            for (int b = 0; b < BRANCHES; b++) low += g[b] * low_of(all[b][c]), high += g[b] * high_of(all[b][c]);
            y[c] = two_bf16(low, high);
        }
        return make_uint4(y[0], y[1], y[2], y[3]);
    }
};

// The end of a row of online softmax: writes its log-sum-exp, -INFINITY where it saw no key, and returns the factor of its sums.
HOPPER_DEVICE static inline float end_of_row(float *lse, int64_t place, int there, float top, float sum, const AttentionShape *s) {
    const float all = quad_sum(sum), inverse = all > 0 ? 1 / all : all;      // a NaN stays one
    if (lane() % 4 == 0 && there) lse[place] = all == 0 ? -INFINITY : top / sqrtf((float)s->D) + logf(all);
    return inverse;
}

// The end of a warp's rows: out = o / sum and lse, and with `before` the sum of the branches. The results pass through the place of the warpgroup's queries, which
// have been read for the last time.
template <int DV>
__device__ static inline void store_rows(bf16 *out, float *lse, const float (*o)[4], const float top[2], const float sum[2], bf16 *tile, int tile_rows, int slab, int sync,
                                         const FastRows *rows, const AttentionShape *s, bf16 *total, const BranchesBefore<DV> *before) {
    const int first = first_of_warp(slab);
    const RowChunks<DV> chunks(rows, s);
    float inverse[2];
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = lane() / 4 + i * 8;
        inverse[i] = end_of_row(lse, chunks.of_row(row), is_row(rows, row), top[i], sum[i], s);
    }
    threads_sync(sync, WARPGROUP);
    #pragma unroll
    for (int n = 0; n < DV / 8; n++)
        #pragma unroll
        for (int i = 0; i < 2; i++)
            *(unsigned *)(panel_chunk(tile, tile_rows, first + lane() / 4 + i * 8, n) + lane() % 4 * 2) = two_bf16(o[n][i * 2] * inverse[i], o[n][i * 2 + 1] * inverse[i]);
    __syncwarp();
    #pragma unroll
    for (int i = 0; i < RowChunks<DV>::COUNT; i++) {
        const int64_t at = chunks.of_chunk(i);
        const uint4 x = *(const uint4 *)panel_chunk(tile, tile_rows, first + chunks.row(i), chunks.chunk()), y = total ? before->sum(i, x) : x;
        if (!is_row(rows, chunks.row(i))) continue;
        *(uint4 *)(out + at) = x;
        if (total) *(uint4 *)(total + at) = y;
    }
}

// ----------------------------------------------------------------------------
// Forward on Hopper. The scores of the next tile of keys are on their way while the exponentials of this one are made; warpgroups take turns at
// issuing their products, so that one makes exponentials while another multiplies.
//
// Of the compressed branch the choice of blocks wants the weights once more, summed over the keys of each selected block (eq. 9) and over the heads of a
// group (eq. 10). The exponentials are here; but their row's log-sum-exp, without which heads cannot be summed, is known only at its end. So
// WITH_IMPORTANCES each warp leaves the first of the two sums in memory, for each row and block, under the highest score of the row as far as that tile, which it
// leaves with them; and while the next tile of rows is computed, the warps that have nothing to copy sum up over heads what this one left. That is read again so
// soon that most of it still is in the L2 cache.
// Keys of a tile stand in the order of their place in a block: a lane then has all four of a block, and what its last one gives to the next block is
// its neighbour's.

enum { BRANCH_ALONE, WITH_IMPORTANCES, WITH_SUM };      // what hopper_forward_kernel makes: the branch, and beside it importances, or the sum of all branches
enum { BLOCK_KEYS = 4, TILE_BLOCKS = HOPPER_KEYS / BLOCK_KEYS };        // compressed keys that begin in a selected block; selected blocks of a tile
// Weights are left times 2^12: the least number of 16 bits is then 2^-36 of the weight of the highest score, the largest sum 2^15. Factors count times 2^15.
enum { WEIGHT_SHIFT = 12, FACTOR_SHIFT = 15 };
enum { CHUNK_BLOCKS = 8, SUM_BLOCKS = 2 * TILE_BLOCKS, SUM_HEADS = WARP / 2 };      // blocks of a row that lie together; blocks and heads that a warp sums up at once
enum { SUM_WARPS = 3, SUM_STAGES = 4 };     // warps that sum up, and how many times that much each has room for
template <int SLABS> constexpr int sum_registers = SLABS == 2 ? 56 : 32;
template <int SLABS> constexpr int summed_registers = SLABS == 2 ? 224 : 160;
static_assert(sum_registers<2> + 2 * summed_registers<2> <= all_registers<2> && sum_registers<3> + 3 * summed_registers<3> <= all_registers<3>, "registers");
// importance (B,T,KV,row): what the choice is made of, times 2^(WEIGHT_SHIFT + FACTOR_SHIFT). `left` has what each block of threads leaves of two tiles of ROWS rows,
// that at hand and the one before: weights (blocks / CHUNK_BLOCKS, ROWS, CHUNK_BLOCKS), `row` blocks rounded up, then top (blocks / TILE_BLOCKS, ROWS), the score,
// times log2(e)/sqrt(D), under whose exponential the weights of a tile of keys are.
typedef struct BlockWeights { float *importance; unsigned char *left; int row, blocks; SelectShape sel; } BlockWeights;
template <int ROWS> __device__ __host__ constexpr int64_t weight_bytes(int64_t blocks) { return ROWS * (blocks * 2 + blocks / TILE_BLOCKS * 4); }
template <int ROWS>
HOPPER_DEVICE static inline unsigned short *weights_left(const BlockWeights *x, int turn) { return (unsigned short *)(x->left + ((int64_t)blockIdx.x * 2 + turn) * weight_bytes<ROWS>(x->blocks)); }
template <int ROWS>
HOPPER_DEVICE static inline float *tops_left(const BlockWeights *x, int turn) { return (float *)(weights_left<ROWS>(x, turn) + (int64_t)ROWS * x->blocks); }
// WITH_IMPORTANCES keys i = BLOCK_KEYS·j + c are read by their block j: `more` has the blocks of the first `rest` places, of which there is one more than of the others.
typedef struct KeyMaps { CUtensorMap k, v, more_k, more_v; int rest; } KeyMaps;

template <int D, int DV, int KEYS>
struct HopperForward {
    enum { SLABS = D == 64 ? 3 : 2, ROWS = SLABS * SLAB_ROWS, STAGES = D == 64 ? 4 : 2, TILES = 2, THREADS = (SLABS + 1) * WARPGROUP };
    enum { BYTES = (TILES * ROWS * D + STAGES * KEYS * (D + DV)) * 2, BARRIERS = 2 * TILES + 4 * STAGES, LEFT_BARRIERS = 4 };
};

// What a warp sums up at once: the weights of SUM_BLOCKS blocks in SUM_HEADS heads, with their tops and log-sum-exps.
struct alignas(16) SumStage { uint4 of[SUM_BLOCKS / CHUNK_BLOCKS][SUM_HEADS]; float top[SUM_BLOCKS / TILE_BLOCKS][SUM_HEADS], lse[SUM_HEADS]; };

// Where a warp stands among its queries of a tile of rows: query t, of which blocks before `end` may be chosen, blocks block0 .. block0 + SUM_BLOCKS - 1, heads
// from h0 on. All heads come, then the next blocks, then the next query that has a choice; behind the last one t is INT_MAX.
struct SumWalk {
    int t, end, block0, h0;
    __device__ void begin(int from, int position0, int tokens, const SelectShape *sel) {
        block0 = h0 = 0;
        for (t = from; t < tokens; t += SUM_WARPS) {
            end = choice_end(position0 + t, sel);
            if (end > 0) return;
        }
        t = INT_MAX;
    }
    __device__ int last_heads(int G) const { return h0 + SUM_HEADS >= G; }
    __device__ void next(int position0, int tokens, int G, const SelectShape *sel) {
        if (!last_heads(G)) h0 += SUM_HEADS;
        else if (block0 + SUM_BLOCKS < end) h0 = 0, block0 += SUM_BLOCKS;
        else begin(t + SUM_WARPS, position0, tokens, sel);
    }
};

// The importances of this warp's queries of a tile of rows, whose weights and tops have been left. A head's weights count by a factor, 2^top over its sum of all
// exponentials; the sum over heads is a product of weights (16 blocks, heads) and factors (heads, 8). Two of the eight columns are for each lane of a quad: what 11
// digits hold of a factor, and the rest. They are zero but in one of four products, so that a lane's sums are those of blocks of its own.
template <int ROWS>
HOPPER_DEVICE static inline void sum_heads_of_tile(SumStage *stages, int warp, const unsigned short *weights, const float *top, const float *lse, const RowTile *x,
                                                   const BlockWeights *left, const AttentionShape *s) {
    constexpr int CHUNKS = SUM_BLOCKS / CHUNK_BLOCKS;
    const int G = s->H / s->KV, tokens = min32(ROWS / G, (int)s->T - x->t0), position0 = (int)s->t0 + x->t0, half = lane() / SUM_HEADS, head = lane() % SUM_HEADS;
    const int64_t token0 = x->b * s->T + x->t0;
    float *importance = left->importance + (token0 * s->KV + x->kv) * left->row + lane() % 4 * 16 + lane() / 4;
    lse += token0 * s->H + x->kv * G + head;
    weights += (half * ROWS + head) * CHUNK_BLOCKS;
    top += half * ROWS + head;
    SumWalk ahead, now;
    ahead.begin(warp, position0, tokens, &left->sel);
    now = ahead;
    const auto fetch = [&](SumStage *stage) {
        if (ahead.t < tokens) {
            // Zeros for heads that are none, and for blocks of a tile of keys that nobody has seen.
            const int row = ahead.t * G + ahead.h0, is_head = ahead.h0 + head < G, tile = ahead.block0 / TILE_BLOCKS, two = tile + 1 < x->steps;
            const unsigned short *from = weights + (is_head ? ahead.block0 * ROWS + row * CHUNK_BLOCKS : 0);
            #pragma unroll
            for (int i = 0; i < CHUNKS / 2; i++) cp_async_16(&stage->of[2 * i + half][head], from + 2 * i * ROWS * CHUNK_BLOCKS, is_head && (two || i < CHUNKS / 4) ? 16 : 0);
            cp_async_4(&stage->top[half][head], top + (is_head ? tile * ROWS + row : 0), is_head && (two || half == 0) ? 4 : 0);
            if (half == 0) cp_async_4(&stage->lse[head], lse + (is_head ? ahead.t * s->H + ahead.h0 : 0), is_head ? 4 : 0);
            ahead.next(position0, tokens, G, &left->sel);
        }
        cp_async_commit();
    };
    #pragma unroll
    for (int i = 0; i < SUM_STAGES - 1; i++) fetch(stages + i);
    float sum[4] = {0, 0, 0, 0};
    for (int at = 0; now.t < tokens; at = at + 1 < SUM_STAGES ? at + 1 : 0) {
        cp_async_wait<SUM_STAGES - 2>();
        __syncwarp();
        fetch(stages + (at > 0 ? at - 1 : SUM_STAGES - 1));
        SumStage *stage = stages + at;
        // This lane's column of the factors, of heads 2·(lane % 4), the next and the same 8 further. (A top is not above its log-sum-exp but where there is none.)
        float factor[4];
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            const int of_head = lane() % 4 * 2 + i % 2 + i / 2 * 8;
            const float all = power_of_2(fminf(stage->top[half][of_head] - stage->lse[of_head] * LOG2E, 0) + FACTOR_SHIFT);
            const float digits = __uint_as_float(__float_as_uint(all) & 0xffffe000u);
            factor[i] = lane() / 4 % 2 ? all - digits : digits;
        }
        const unsigned column[2] = {two_f16(factor[0], factor[1]), two_f16(factor[2], factor[3])};
        #pragma unroll
        for (int i = 0; i < CHUNKS / 2; i++) {
            unsigned of[4];
            ldmatrix_x4_turned(of, &stage->of[2 * i + lane() / 8 % 2][lane() / 16 * 8 + lane() % 8]);
            const unsigned mine[2] = {lane() / 8 == i ? column[0] : 0, lane() / 8 == i ? column[1] : 0};
            mma_16816_f16(sum, of, mine);
        }
        if (now.last_heads(G)) {
            float *to = importance + (int64_t)now.t * s->KV * left->row + now.block0;
            const int j = now.block0 + lane() % 4 * 16 + lane() / 4;
            if (j < now.end) to[0] = sum[0] + sum[1];
            if (j + 8 < now.end) to[8] = sum[2] + sum[3];
            sum[0] = sum[1] = sum[2] = sum[3] = 0;
        }
        now.next(position0, tokens, G, &left->sel);
    }
}

// A tile of keys or values (HOPPER_KEYS,W) WITH_IMPORTANCES, those of the blocks from compressed key k0 on: TILE_BLOCKS rows of each place.
template <int W>
__device__ static inline void copy_blocks(bf16 *tile, const CUtensorMap *map, const CUtensorMap *more, int rest, int b, int k0, int kv, uint64_t *full) {
    #pragma unroll
    for (int c = 0; c < BLOCK_KEYS; c++)
        #pragma unroll
        for (int panel = 0; panel < W / PANEL; panel++)
            copy_box(tile + (panel * HOPPER_KEYS + c * TILE_BLOCKS) * PANEL, c < rest ? more : map, kv * W + panel * PANEL, k0 / BLOCK_KEYS, c, b, full);
}

template <int D, int DV, int KEYS, int MAKES>
__global__ void __launch_bounds__(HopperForward<D, DV, KEYS>::THREADS, 1)
hopper_forward_kernel(bf16 *out, float *lse, BlockWeights left, BranchSum<bf16> total, const __grid_constant__ CUtensorMap q_map, const __grid_constant__ KeyMaps maps,
                      Mask mask, AttentionShape s) {
    #if HOPPER_CODE
    constexpr bool IMPORTANCES = MAKES == WITH_IMPORTANCES;
    static_assert(!IMPORTANCES || KEYS == HOPPER_KEYS, "tiles of whole blocks");
    typedef HopperForward<D, DV, KEYS> Plan;
    constexpr int SLABS = Plan::SLABS, ROWS = Plan::ROWS, STAGES = Plan::STAGES, TILES = Plan::TILES;
    extern __shared__ SharedKilobyte hopper_shared[];
    bf16 *q_tiles = (bf16 *)hopper_shared, *key_tiles = q_tiles + TILES * ROWS * D, *value_tiles = key_tiles + STAGES * KEYS * D;
    uint64_t *q_full = (uint64_t *)(value_tiles + STAGES * KEYS * DV), *q_empty = q_full + TILES;
    uint64_t *k_full = q_empty + TILES, *k_empty = k_full + STAGES, *v_full = k_empty + STAGES, *v_empty = v_full + STAGES;
    uint64_t *left_full = v_empty + STAGES, *left_empty = left_full + 2;
    SumStage *stages = (SumStage *)(left_empty + 2);
    const int group = same_in_warp(threadIdx.x / WARPGROUP), G = s.H / s.KV;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2 && IMPORTANCES; i++) barrier_init(left_full + i, SLABS * 4), barrier_init(left_empty + i, SUM_WARPS);
        for (int i = 0; i < TILES; i++) barrier_init(q_full + i, 1), barrier_init(q_empty + i, SLABS * 4);      // every warp lets go
        for (int i = 0; i < STAGES; i++) barrier_init(k_full + i, 1), barrier_init(v_full + i, 1), barrier_init(k_empty + i, SLABS * 4), barrier_init(v_empty + i, SLABS * 4);
        barriers_ready();
    }
    __syncthreads();
    RowTile x;
    Ring<TILES> q_ring;
    Ring<STAGES> k_ring, v_ring;
    Ring<2> left_ring;

    if (group == 0) {
        registers_fewer<IMPORTANCES ? sum_registers<SLABS> : copy_registers<SLABS>>();
        const int warp = same_in_warp(threadIdx.x / WARP) - 1;      // of those that sum up
        if (IMPORTANCES && warp >= 0) {
            for (int round = 0; row_tile<ROWS, KEYS>(&x, round, &mask, &s); round++) {
                barrier_wait(left_full + left_ring.at, left_ring.parity);
                sum_heads_of_tile<ROWS>(stages + warp * SUM_STAGES, warp, weights_left<ROWS>(&left, left_ring.at), tops_left<ROWS>(&left, left_ring.at), lse, &x, &left, &s);
                let_go(left_empty + left_ring.at);
                left_ring.next();
            }
        }
        if (threadIdx.x > 0) return;
        for (int round = 0; row_tile<ROWS, KEYS>(&x, round, &mask, &s); round++) {
            barrier_wait(q_empty + q_ring.at, q_ring.parity ^ 1);
            barrier_expect(q_full + q_ring.at, ROWS / G * G * D * 2);
            copy_tile<D>(q_tiles + q_ring.at * ROWS * D, ROWS, &q_map, x.b, x.t0, x.kv * G, q_full + q_ring.at);
            q_ring.next();
            for (int i = 0; i < x.steps; i++) {
                barrier_wait(k_empty + k_ring.at, k_ring.parity ^ 1);
                barrier_expect(k_full + k_ring.at, KEYS * D * 2);
                if constexpr (IMPORTANCES) copy_blocks<D>(key_tiles + k_ring.at * KEYS * D, &maps.k, &maps.more_k, maps.rest, x.b, x.k0 + i * KEYS, x.kv, k_full + k_ring.at);
                else copy_tile<D>(key_tiles + k_ring.at * KEYS * D, KEYS, &maps.k, x.b, x.k0 + i * KEYS, x.kv, k_full + k_ring.at);
                k_ring.next();
                barrier_wait(v_empty + v_ring.at, v_ring.parity ^ 1);
                barrier_expect(v_full + v_ring.at, KEYS * DV * 2);
                if constexpr (IMPORTANCES) copy_blocks<DV>(value_tiles + v_ring.at * KEYS * DV, &maps.v, &maps.more_v, maps.rest, x.b, x.k0 + i * KEYS, x.kv, v_full + v_ring.at);
                else copy_tile<DV>(value_tiles + v_ring.at * KEYS * DV, KEYS, &maps.v, x.b, x.k0 + i * KEYS, x.kv, v_full + v_ring.at);
                v_ring.next();
            }
        }
        return;
    }

    registers_more<IMPORTANCES ? summed_registers<SLABS> : compute_registers<SLABS>>();
    const int slab = group - 1, own_sync = SLABS + 1 + slab;       // named barriers: 1 .. SLABS are the turns, then each warpgroup's own
    const float scale2 = LOG2E / sqrtf((float)D);
    const auto take_turn = [&] { threads_sync(1 + slab, 2 * WARPGROUP); };
    const auto pass_turn = [&] { threads_arrive(1 + (slab + 1) % SLABS, 2 * WARPGROUP); };
    if (slab == SLABS - 1) pass_turn();

    for (int round = 0; row_tile<ROWS, KEYS>(&x, round, &mask, &s); round++) {
        const FastRows rows = rows_of_warp<ROWS>(&x, slab, &s);
        const SeenKeys seen = seen_keys<FAST_WARPS>(&rows, &mask, &s);
        const int steps = same_in_warp(x.steps);
        bf16 *q_tile = q_tiles + q_ring.at * ROWS * D;
        float o[DV / 8][4] = {{0}}, p[KEYS / 8][4], top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, shrink[2];
        unsigned weights[KEYS / 16][4];
        BranchesBefore<DV> others;
        float before[2] = {0, 0};               // what the last block of the tile before gives to the first of this one
        unsigned short *weights_at = weights_left<ROWS>(&left, left_ring.at);       // where those of the tile of keys at hand go
        float *top_at = tops_left<ROWS>(&left, left_ring.at);
        const int left_row = first_of_warp(slab) + lane() / 4;
        if (IMPORTANCES) barrier_wait(left_empty + left_ring.at, left_ring.parity ^ 1);

        const auto issue_scores = [&] {
            barrier_wait(k_full + k_ring.at, k_ring.parity);
            take_turn();
            wgmma_begin();
            slab_times_turned<D, KEYS>(p, q_tile + slab * SLAB_ROWS * PANEL, ROWS, key_tiles + k_ring.at * KEYS * D, KEYS);
            wgmma_commit();
        };
        const auto issue_values = [&] {
            barrier_wait(v_full + v_ring.at, v_ring.parity);
            wgmma_begin();
            factor_times_rows<DV, KEYS>(o, weights, value_tiles + v_ring.at * KEYS * DV);
            wgmma_commit();
        };
        // The weights of the tile whose exponentials are p. A key weighs as many pieces of it as lie in the block, 2, 2, 2 and 1; the last one's other piece is the
        // next block's.
        const auto leave_weights = [&] {
            constexpr int GROUPS = TILE_BLOCKS / 8;
            constexpr float ONE = 1 << WEIGHT_SHIFT;
            #pragma unroll
            for (int i = 0; i < 2; i++) {
                before[i] *= shrink[i];
                #pragma unroll
                for (int n = 0; n < GROUPS; n++) {
                    const auto key = [&](int c, int e) { return p[c * GROUPS + n][i * 2 + e]; };
                    const float neighbour = __shfl_sync(~0u, key(3, 1), lane() ^ lane() % 4 ^ (lane() + 3) % 4);
                    const float low = 2 * ONE * (key(0, 0) + key(1, 0) + key(2, 0)) + ONE * (key(3, 0) + (lane() % 4 ? neighbour : before[i]));
                    const float high = 2 * ONE * (key(0, 1) + key(1, 1) + key(2, 1)) + ONE * (key(3, 1) + key(3, 0));
                    before[i] = neighbour;
                    *(unsigned *)(weights_at + (n * ROWS + i * 8) * CHUNK_BLOCKS + (unsigned)(left_row * CHUNK_BLOCKS + lane() % 4 * 2)) = two_f16(low, high);
                }
                if (lane() % 4 == 0) top_at[i * 8 + (unsigned)left_row] = top[i] * scale2;
            }
            weights_at += TILE_BLOCKS * ROWS;
            top_at += ROWS;
        };
        const auto exponentials = [&](int k0) {
            if (k0 < seen.all_lo || k0 + KEYS > seen.all_hi) hide_keys<KEYS, IMPORTANCES ? BLOCK_KEYS : 1>(p, k0, INT_MAX, &seen, -INFINITY);
            online_softmax<KEYS>(p, top, sum, shrink, scale2);
            if constexpr (IMPORTANCES) leave_weights();
        };
        const auto as_weights = [&] {
            #pragma unroll
            for (int n = 0; n < KEYS / 16; n++) as_left_factor(weights[n], p + 2 * n);
        };

        barrier_wait(q_full + q_ring.at, q_ring.parity);
        if (steps > 0) {
            issue_scores();
            pass_turn();
            wgmma_wait<0>();
            wgmma_done<KEYS>(p);
            let_go(k_empty + k_ring.at);
            k_ring.next();
            exponentials(x.k0);
            as_weights();
            for (int i = 1; i < steps; i++) {
                issue_scores();
                issue_values();
                pass_turn();
                wgmma_wait<1>();
                wgmma_done<KEYS>(p);
                let_go(k_empty + k_ring.at);
                k_ring.next();
                exponentials(x.k0 + i * KEYS);
                wgmma_wait<0>();
                wgmma_done<DV>(o);
                let_go(v_empty + v_ring.at);
                v_ring.next();
                #pragma unroll
                for (int n = 0; n < DV / 8; n++)
                    #pragma unroll
                    for (int e = 0; e < 4; e++) o[n][e] *= shrink[e / 2];
                as_weights();
            }
            issue_values();
            if (MAKES == WITH_SUM) others.fetch(&total, &rows, &s);
            wgmma_wait<0>();
            wgmma_done<DV>(o);
            let_go(v_empty + v_ring.at);
            v_ring.next();
        }

        store_rows<DV>(out, lse, o, top, sum, q_tile, ROWS, slab, own_sync, &rows, &s, MAKES == WITH_SUM ? total.out : NULL, &others);
        shared_written();
        __syncwarp();
        let_go(q_empty + q_ring.at);
        q_ring.next();
        if constexpr (IMPORTANCES) {
            let_go(left_full + left_ring.at);
            left_ring.next();
        }
    }
    if (slab == 0) take_turn();     // the turn that nobody needs any more
    #endif
}

template <int ROWS>
static unsigned row_blocks(const AttentionShape *s) {
    const int64_t tokens = slab_tokens(s, ROWS);
    return (unsigned)min64(gpu.multiProcessorCount, s->B * s->KV * ((s->T + tokens - 1) / tokens));
}

// A map of the keys or values x (B,Tk,KV,width) WITH_IMPORTANCES: (text, place in a block, block, head and channel). With `one_more` there is a block behind those
// that are whole, of fewer places.
static CUtensorMap block_map(const bf16 *x, int64_t width, int64_t row, const AttentionShape *s, int one_more) {
    const int64_t whole = s->Tk / BLOCK_KEYS, rest = s->Tk % BLOCK_KEYS;
    const TensorShape shape = {{s->KV * width, whole + one_more, one_more ? rest : BLOCK_KEYS, s->B}, {1, BLOCK_KEYS * row, row, s->Tk * row}, {PANEL, TILE_BLOCKS, 1, 1}};
    return tensor_map_of_shape(x, &shape);
}

template <int D, int DV, int KEYS, int MAKES>
static void hopper_forward_of_shape(bf16 *out, float *lse, BlockWeights left, const BranchSum<bf16> *total, const bf16 *q, const bf16 *k, const bf16 *v, const Mask *mask,
                                    const AttentionShape *s) {
    typedef HopperForward<D, DV, KEYS> Plan;
    const int64_t stages = MAKES == WITH_IMPORTANCES ? SUM_WARPS * SUM_STAGES * (int64_t)sizeof(SumStage) : 0;
    const int64_t bytes = Plan::BYTES + (Plan::BARRIERS + Plan::LEFT_BARRIERS) * (int64_t)sizeof(uint64_t) + stages;
    const CUtensorMap q_map = query_map(q, D, s->q_row, s, Plan::ROWS);
    KeyMaps maps = {q_map, q_map, q_map, q_map, 0};        // without keys none is read, but a map must be of something
    if (MAKES == WITH_IMPORTANCES) {
        maps.rest = (int)(s->Tk % BLOCK_KEYS);
        if (s->Tk >= BLOCK_KEYS) maps.k = block_map(k, D, s->k_row, s, 0), maps.v = block_map(v, DV, s->v_row, s, 0);
        if (maps.rest) maps.more_k = block_map(k, D, s->k_row, s, 1), maps.more_v = block_map(v, DV, s->v_row, s, 1);
    } else if (s->Tk) {
        maps.k = key_map(k, D, s->k_row, s, KEYS), maps.v = key_map(v, DV, s->v_row, s, KEYS);
    }
    const auto kernel = hopper_forward_kernel<D, DV, KEYS, MAKES>;
    const BranchSum<bf16> no_total = {NULL, {NULL, NULL}, NULL};
    allow_shared(kernel, bytes, FAST_NAME, FAST_FIX);
    kernel<<<row_blocks<Plan::ROWS>(s), Plan::THREADS, (size_t)bytes>>>(out, lse, left, total ? *total : no_total, q_map, maps, *mask, *s);
    LAUNCHED();
}
template <int D, int DV, int MAKES>
static void hopper_range_forward_making(bf16 *out, float *lse, const bf16 *q, const bf16 *k, const bf16 *v, const Mask *mask, const AttentionShape *s, const BranchSum<bf16> *total) {
    BlockWeights none;
    memset(&none, 0, sizeof none);
    if (narrow_tiles(HopperForward<D, DV, NARROW_KEYS>::ROWS, mask, s)) hopper_forward_of_shape<D, DV, NARROW_KEYS, MAKES>(out, lse, none, total, q, k, v, mask, s);
    else hopper_forward_of_shape<D, DV, HOPPER_KEYS, MAKES>(out, lse, none, total, q, k, v, mask, s);
}
template <int D, int DV>
static void hopper_range_forward(bf16 *out, float *lse, const bf16 *q, const bf16 *k, const bf16 *v, const Mask *mask, const AttentionShape *s, const BranchSum<bf16> *total) {
    if (total) hopper_range_forward_making<D, DV, WITH_SUM>(out, lse, q, k, v, mask, s, total);
    else hopper_range_forward_making<D, DV, BRANCH_ALONE>(out, lse, q, k, v, mask, s, NULL);
}

// ----------------------------------------------------------------------------
// Queries that choose alike, side by side. The kernels of selection take some queries together, through all blocks that any of these chose, and much of what they do is
// in vain where the choices differ. In a text a token chooses like some of those around it, but not most like the next one: the 4 queries of a group that are
// found here, among 64, take 28 different blocks together where 4 neighbours take 40 (a trained model at 65536 tokens).
// In each window of 64 queries those with the most blocks in common become pairs, then pairs of pairs, and so on: the pair that has most of all first, and
// then of what is left. Which blocks a query or a group has is a bit each, of block % 256: a longer text's blocks share bits, and a pair may seem worth a little more than
// it is. What comes out of attention is the same to the last bit in any order.

enum { ORDER_WINDOW = 64, ORDER_BITS = 256, ORDER_WORDS = ORDER_BITS / WARP };

// order (B,KV,T): the query at `place` of the order is this one; `order` is that of its (b, kv).
__device__ static inline int query_at(const unsigned char *order, int place) { return place / ORDER_WINDOW * ORDER_WINDOW + order[place]; }
__device__ static inline const unsigned char *order_of(const Mask *mask, int b, int kv, const AttentionShape *s) { return mask->order + (b * s->KV + kv) * s->T; }

// A block a window, a thread a query, and a group of them. What a last window lacks keeps the order of the text.
__global__ void __launch_bounds__(ORDER_WINDOW) order_queries_kernel(unsigned char *order, const int *block_idx, int64_t n, AttentionShape s) {
    typedef struct alignas(16) Bits { unsigned word[ORDER_WORDS]; } Bits;
    __shared__ Bits bits[ORDER_WINDOW];
    alignas(16) __shared__ unsigned short single[ORDER_WINDOW];         // of each group: all bits while it is in no pair, then none
    __shared__ int partner[ORDER_WINDOW];
    __shared__ unsigned firsts[ORDER_WINDOW / WARP];
    const int me = (int)threadIdx.x, windows = ((int)s.T + ORDER_WINDOW - 1) / ORDER_WINDOW;
    const int64_t bkv = blockIdx.x / windows, b = bkv / s.KV, kv = bkv % s.KV, t0 = (int64_t)(blockIdx.x % windows) * ORDER_WINDOW;
    unsigned char *to = order + bkv * s.T + t0;
    if (t0 + ORDER_WINDOW > s.T) {
        if (t0 + me < s.T) to[me] = (unsigned char)me;
        return;
    }
    for (int w = 0; w < ORDER_WORDS; w++) bits[me].word[w] = 0;
    const int *blocks = block_idx + ((b * s.T + t0 + me) * s.KV + kv) * n;
    for (int64_t i = 0; i < n && blocks[i] >= 0; i++) bits[me].word[blocks[i] % ORDER_BITS / WARP] |= 1u << blocks[i] % WARP;
    __syncthreads();

    int group = me, place = 0;      // of this query: its group, and where in the group
    for (int groups = ORDER_WINDOW; groups > 1; groups /= 2) {
        // This thread as the group `me`: what a pair with each other group is worth, 16 bits each: the blocks in common, of equals the nearest by me ^ j, so that
        // groups that are all alike have found each other at once. 0: no pair.
        Bits mine = bits[me];
        unsigned worth[ORDER_WINDOW / 2];
        #pragma unroll
        for (int i = 0; i < ORDER_WINDOW / 2; i++) {
            worth[i] = 0;
            if (i * 2 >= groups) continue;
            #pragma unroll
            for (int j = i * 2; j < i * 2 + 2; j++) {
                int common = 0;
                #pragma unroll
                for (int w = 0; w < ORDER_WORDS; w++) common += __popc(mine.word[w] & bits[j].word[w]);
                if (j != me) worth[i] |= (unsigned)((common + 1) * ORDER_WINDOW + ORDER_WINDOW - 1 - (me ^ j)) << j % 2 * 16;
            }
        }
        int with = 0, paired = me >= groups;
        single[me] = paired ? 0 : 0xffff;
        __syncthreads();
        do {
            if (!paired) {
                unsigned most = 0;
                #pragma unroll
                for (int i = 0; i < ORDER_WINDOW / 2; i++) {
                    worth[i] &= ((const unsigned *)single)[i];
                    most = __vmaxu2(most, worth[i]);
                }
                with = me ^ (ORDER_WINDOW - 1 - max32(most & 0xffff, most >> 16) % ORDER_WINDOW);
                partner[me] = with;
            }
            __syncthreads();
            if (!paired && partner[with] == me) paired = 1, single[me] = 0;     // both want each other most: so do the two of the best pair that is left, at least
        } while (__syncthreads_or(!paired));
        // Pairs in the order of their firsts.
        const int is_first = me < groups && me < with;
        const unsigned word = __ballot_sync(~0u, is_first);
        if (lane() == 0) firsts[me / WARP] = word;
        if (me < groups)
            for (int w = 0; w < ORDER_WORDS; w++) mine.word[w] |= bits[with].word[w];
        __syncthreads();
        int pair = __popc(firsts[me / WARP] & ((1u << lane()) - 1));
        for (int i = 0; i < me / WARP; i++) pair += __popc(firsts[i]);
        if (is_first) bits[pair] = mine, partner[me] = pair, partner[with] = ~pair;
        __syncthreads();
        const int joined = partner[group];
        place += joined < 0 ? ORDER_WINDOW / groups : 0;
        group = joined < 0 ? ~joined : joined;
        __syncthreads();
    }
    to[place] = (unsigned char)me;
}

static void order_queries(unsigned char *order, const Mask *mask, const AttentionShape *s) {
    const int64_t windows = s->B * s->KV * ((s->T + ORDER_WINDOW - 1) / ORDER_WINDOW);
    if (windows == 0) return;
    order_queries_kernel<<<grid(windows, 1), ORDER_WINDOW>>>(order, mask->block_idx, mask->n, *s);
    LAUNCHED();
}

// ----------------------------------------------------------------------------
// Forward on Hopper for selection. A warpgroup takes the 64 rows of some queries that lie side by side in the order above, goes through the blocks that any of these
// chose, once, and gives weight 0 to the rows that did not choose a block. Each warpgroup has a warp that copies for it and rings of its own.
// What a multiprocessor can fetch from the L2 cache is one limit. At D = 128 a warpgroup therefore has two such sets of queries (HALVES), whose tiles come once: a
// step is a tile and a half that takes it. What the warps of a warpgroup do between two products is the other limit: they wait for each other. A warp has
// some heads of all queries, not all heads of some: when few chose a block, every warp has few rows with work and none has all.

template <int D> constexpr int selected_slabs = D == 64 ? 3 : 2;
// A warp has a quarter of the heads of all queries where they can be divided so, else all heads of some.
DEVICE static inline int heads_of_warp(int G) { return G % 4 ? G : G / 4; }
static CUtensorMap group_map(const bf16 *x, int64_t width, int64_t row, const AttentionShape *s) {
    return tensor_map(x, width, s->H, s->T, s->B, row, heads_of_warp((int)(s->H / s->KV)), 1);
}
// The 16 rows of a warp: row i is the (first + i) / heads-th of `tokens` queries from the place t0 of the order on, of that head head0 + (first + i) % heads. Behind the
// last they repeat it and are not written.
struct GroupRows {
    const unsigned char *order;
    int b, kv, t0, tokens, first, head0, heads;
    __device__ GroupRows(int G) : order(NULL), b(0), kv(0), t0(0), tokens(0) {
        const int warp = (int)(threadIdx.x / WARP) % 4;
        heads = heads_of_warp(G);
        first = G % 4 ? warp * MMA_ROWS : 0;
        head0 = G % 4 ? 0 : warp * heads;
    }
    __device__ void at(const RowTile *x, int from, int most, const Mask *mask, const AttentionShape *s) {
        b = x->b, kv = x->kv, t0 = from;
        tokens = min32(most, (int)s->T - from);
        order = order_of(mask, b, kv, s);
    }
    __device__ int query(int i) const { return (first + i) / heads; }
    __device__ int token(int i) const { return query_at(order, t0 + min32(query(i), tokens - 1)); }
    // A bit for each query of the upper (0) or lower (1) 8 rows.
    __device__ unsigned queries(int lower) const { return (unsigned)same_in_warp((int)(~0u << query(8 * lower) & ~0u >> (WARP - 1 - query(8 * lower + 7)))); }
};
HOPPER_DEVICE static inline int is_row(const GroupRows *x, int i) { return x->query(i) < x->tokens; }
// The token of its text.
HOPPER_DEVICE static inline int token_of(const GroupRows *x, int i, const AttentionShape *) { return x->token(i); }
HOPPER_DEVICE static inline int token_of(const FastRows *x, int i, const AttentionShape *s) { return row_at(x, i) / (s->H / s->KV); }
HOPPER_DEVICE static inline int64_t place_of(const GroupRows *x, int i, const AttentionShape *s) {
    return (x->b * s->T + x->token(i)) * s->H + x->kv * (s->H / s->KV) + x->head0 + (x->first + i) % x->heads;
}
// What a lane's two rows see of the blocks that they chose, keys counted from the first query on: none behind themselves. All queries of a group see what lies before the
// window of the order that it begins in.
HOPPER_DEVICE static inline int has_later_keys(const RowTile *x, int k0, int keys) { return k0 + keys - 1 > x->t0 / ORDER_WINDOW * ORDER_WINDOW; }
HOPPER_DEVICE static inline SeenKeys seen_keys_of_group(const GroupRows *x) {
    const SeenKeys seen = {{INT_MIN, INT_MIN}, {x->token(lane() / 4) + 1, x->token(lane() / 4 + 8) + 1}, INT_MIN, x->t0 / ORDER_WINDOW * ORDER_WINDOW + 1};
    return seen;
}
// Of a lane's two rows those FROM .. TO - 1.
template <int FROM, int TO> struct LaneRows { enum { from = FROM, to = TO }; };

// The `round`-th group of queries of this warpgroup: those at the places t0 .. t0 + HALVES·(SLAB_ROWS / G) - 1 of (b, kv), one (b, kv) after the other, whose keys then
// stay in the L2 cache.
template <int SLABS, int HALVES>
__device__ static inline int query_group(RowTile *x, int round, int slab, const AttentionShape *s) {
    const int tokens = HALVES * (SLAB_ROWS / (s->H / s->KV)), groups = ((int)s->T + tokens - 1) / tokens;
    const int64_t item = ((int64_t)round * gridDim.x + blockIdx.x) * SLABS + slab;
    if (item >= s->B * s->KV * groups) return 0;
    x->b = (int)(item / groups) / s->KV;
    x->kv = (int)(item / groups) % s->KV;
    x->t0 = (int)(item % groups) * tokens;
    return 1;
}

// The lists of the queries, merged: each lane has one, and where it stands in it. Returns the next block and, a bit a lane, who chose it; -1 at the end.
struct BlockMerge {
    const int *idx;
    int n, i, head, after;
    __device__ int at(int place) const { return place < n && idx[place] >= 0 ? idx[place] : INT_MAX; }
    __device__ void begin(const RowTile *x, int tokens, const Mask *mask, const AttentionShape *s) {
        const int place = x->t0 + lane(), there = lane() < tokens && place < (int)s->T;
        idx = mask->block_idx + ((x->b * s->T + query_at(order_of(mask, x->b, x->kv, s), there ? place : 0)) * s->KV + x->kv) * mask->n;
        n = there ? mask->n : 0;
        i = 1;
        head = at(0);
        after = at(1);
    }
    __device__ int next(unsigned *choosers) {
        const int block = __reduce_min_sync(~0u, head);
        *choosers = __ballot_sync(~0u, head == block);
        if (head == block) {
            head = after;
            after = head == INT_MAX ? INT_MAX : at(++i);
        }
        return block == INT_MAX ? -1 : block;
    }
};
struct alignas(8) Chosen { int block; unsigned choosers; };     // what goes with a tile of keys; a block of -1, without a tile, ends a group of queries

// A warpgroup's part of shared memory: its queries (and with DOUT the gradients of their results), rings of keys and values, who chose these.
template <int D, int DV, int K_STAGES, int V_STAGES, int DOUT, int HALVES_ = 1>
struct SelectedSlab {
    enum { HALVES = HALVES_, Q_ROWS = HALVES * SLAB_ROWS, KEY_STAGES = K_STAGES, VALUE_STAGES = V_STAGES };
    enum { SLABS = selected_slabs<D>, KEYS = SLAB_ROWS, THREADS = (SLABS + 1) * WARPGROUP, BARRIERS = 2 + 2 * (K_STAGES + V_STAGES) };
    enum { TILES = (Q_ROWS * (D + DOUT * DV) + KEYS * (K_STAGES * D + V_STAGES * DV)) * 2, BYTES = SLABS * (TILES + (BARRIERS + K_STAGES) * 8) };
    bf16 *q_tile, *dout_tile, *key_tiles, *value_tiles;
    uint64_t *q_full, *q_empty, *k_full, *k_empty, *v_full, *v_empty;
    Chosen *chosen;

    __device__ void begin(SharedKilobyte *shared, int slab) {
        unsigned char *memory = (unsigned char *)shared;
        q_tile = (bf16 *)(memory + slab * TILES);
        dout_tile = q_tile + Q_ROWS * D;
        key_tiles = dout_tile + DOUT * Q_ROWS * DV;
        value_tiles = key_tiles + K_STAGES * KEYS * D;
        q_full = (uint64_t *)(memory + SLABS * TILES) + slab * BARRIERS;
        q_empty = q_full + 1;
        k_full = q_empty + 1, k_empty = k_full + K_STAGES;
        v_full = k_empty + K_STAGES, v_empty = v_full + V_STAGES;
        chosen = (Chosen *)(memory + SLABS * (TILES + BARRIERS * 8)) + slab * K_STAGES;
    }
    __device__ void make_barriers() const {     // every warp lets go
        barrier_init(q_full, 1), barrier_init(q_empty, 4);
        for (int i = 0; i < K_STAGES; i++) barrier_init(k_full + i, 1), barrier_init(k_empty + i, 4);
        for (int i = 0; i < V_STAGES; i++) barrier_init(v_full + i, 1), barrier_init(v_empty + i, 4);
        barriers_ready();
    }
    // All that the warp that copies does.
    __device__ void bring(const CUtensorMap *q_map, const CUtensorMap *dout_map, const CUtensorMap *k_map, const CUtensorMap *v_map, int slab, const Mask *mask,
                          const AttentionShape *s) const {
        const int G = s->H / s->KV, tokens = SLAB_ROWS / G, heads = heads_of_warp(G), boxes = G / heads;        // of a query
        RowTile x;
        Ring<1> q_ring;
        Ring<K_STAGES> k_ring;
        Ring<V_STAGES> v_ring;
        for (int round = 0; query_group<SLABS, HALVES>(&x, round, slab, s); round++) {
            barrier_wait(q_empty, q_ring.parity ^ 1);
            if (lane() == 0) barrier_expect(q_full, HALVES * tokens * G * (D + DOUT * DV) * 2);
            __syncwarp();
            for (int i = lane(); i < HALVES * tokens * boxes; i += WARP) {
                const int place = x.t0 + i / boxes, t = place < (int)s->T ? query_at(order_of(mask, x.b, x.kv, s), place) : (int)s->T;        // behind the text are zeros
                const int half = i / boxes / tokens, head = i % boxes * heads, row = (i % boxes * MMA_ROWS + i / boxes % tokens * heads) * PANEL;
                copy_tile<D>(q_tile + half * SLAB_ROWS * D + row, SLAB_ROWS, q_map, x.b, t, x.kv * G + head, q_full);
                if (DOUT) copy_tile<DV>(dout_tile + half * SLAB_ROWS * DV + row, SLAB_ROWS, dout_map, x.b, t, x.kv * G + head, q_full);
            }
            q_ring.next();
            BlockMerge merge;
            merge.begin(&x, HALVES * tokens, mask, s);
            int before = -1;
            for (int more = 1; more;) {
                Chosen next;
                next.block = merge.next(&next.choosers);
                more = next.block >= 0;
                barrier_wait(k_empty + k_ring.at, k_ring.parity ^ 1);
                if (lane() == 0) {
                    chosen[k_ring.at] = next;
                    if (more) {
                        barrier_expect(k_full + k_ring.at, KEYS * D * 2);
                        copy_tile<D>(key_tiles + k_ring.at * KEYS * D, KEYS, k_map, x.b, next.block * KEYS, x.kv, k_full + k_ring.at);
                    } else {
                        barrier_arrive(k_full + k_ring.at);
                    }
                }
                k_ring.next();
                // Backward needs keys and values at the same time, forward the next tile's keys before this one's values.
                const int block = DOUT ? next.block : before;
                before = next.block;
                if (block < 0) continue;
                barrier_wait(v_empty + v_ring.at, v_ring.parity ^ 1);
                if (lane() == 0) {
                    barrier_expect(v_full + v_ring.at, KEYS * DV * 2);
                    copy_tile<DV>(value_tiles + v_ring.at * KEYS * DV, KEYS, v_map, x.b, block * KEYS, x.kv, v_full + v_ring.at);
                }
                v_ring.next();
            }
        }
    }
    // What was chosen with the tile of keys `at`: the lane that lets go of it reads it, and tells the others by same_in_warp.
    __device__ Chosen read_chosen(int at) const {
        Chosen now = {0, 0};
        if (lane() == 0) now = chosen[at];
        return now;
    }
};
HOPPER_DEVICE static inline Chosen same_in_warp(const Chosen &x) {
    const Chosen same = {__shfl_sync(~0u, x.block, 0), __shfl_sync(~0u, x.choosers, 0)};
    return same;
}

// Of the four lanes of a row x[j] of lane i is channels 2·i and 2·i + 1 of the j-th 8 of 32; then lane i has the i-th 8: a transposition, of 2x2 and then of their 2x2.
HOPPER_DEVICE static inline uint4 eight_of_row(unsigned x[4]) {
    const int odd = lane() & 1, high = lane() & 2;
    #pragma unroll
    for (int j = 0; j < 4; j += 2) {
        const unsigned other = __shfl_xor_sync(~0u, odd ? x[j] : x[j + 1], 1);
        if (odd) x[j] = other;
        else x[j + 1] = other;
    }
    #pragma unroll
    for (int j = 0; j < 2; j++) {
        const unsigned other = __shfl_xor_sync(~0u, high ? x[j] : x[j + 2], 2);
        if (high) x[j] = other;
        else x[j + 2] = other;
    }
    return make_uint4(x[0], x[1], x[2], x[3]);
}

// Rows (16,DV) of a warp, o over the sums of its weights, and their log-sum-exps. From registers, so that the queries' tile is free for the next ones.
template <int DV>
__device__ static inline void store_group_rows(bf16 *out, float *lse, const float (*o)[4], const float top[2], const float sum[2], const GroupRows *rows, const AttentionShape *s) {
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = lane() / 4 + i * 8, there = is_row(rows, row);
        const int64_t place = place_of(rows, row, s);
        const float inverse = end_of_row(lse, place, there, top[i], sum[i], s);
        #pragma unroll
        for (int m = 0; m < DV / 32; m++) {
            unsigned x[4];
            #pragma unroll
            for (int j = 0; j < 4; j++) x[j] = two_bf16(o[m * 4 + j][i * 2] * inverse, o[m * 4 + j][i * 2 + 1] * inverse);
            const uint4 eight = eight_of_row(x);
            if (there) *(uint4 *)(out + place * DV + (m * 4 + lane() % 4) * 8) = eight;
        }
    }
}

// Weights are relative to a score that is the highest of the row so far, or less by a factor of 2^LAZY at most: what was summed before seldom has to shrink.
enum { LAZY = 8 };
template <int D, int DV, int HALVES> using SelectedForward = SelectedSlab<D, DV, 3, HALVES == 2 ? 2 : 3, 0, HALVES>;

template <int D, int DV, int HALVES>
__global__ void __launch_bounds__(SelectedForward<D, DV, HALVES>::THREADS, 1)
hopper_selected_forward_kernel(bf16 *out, float *lse, const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                               const __grid_constant__ CUtensorMap v_map, Mask mask, AttentionShape s) {
    #if HOPPER_CODE
    typedef SelectedForward<D, DV, HALVES> Plan;
    constexpr int SLABS = Plan::SLABS, KEYS = Plan::KEYS;
    extern __shared__ SharedKilobyte hopper_shared[];
    const int group = same_in_warp(threadIdx.x / WARPGROUP), slab = same_in_warp(group ? group - 1 : threadIdx.x / WARP);       // of a warp that copies: whom it does it for
    Plan my;
    my.begin(hopper_shared, slab);
    if (group == 0 && slab < SLABS && lane() == 0) my.make_barriers();
    __syncthreads();
    if (group == 0) {
        registers_fewer<MERGE_REGISTERS>();
        if (slab < SLABS) my.bring(&q_map, NULL, &k_map, &v_map, slab, &mask, &s);
        return;
    }

    registers_more<merged_registers<SLABS>>();
    const float scale2 = LOG2E / sqrtf((float)D);
    const int G = s.H / s.KV, tokens = SLAB_ROWS / G;
    GroupRows rows(G);
    const int query[2] = {rows.query(lane() / 4), rows.query(lane() / 4 + 8)};      // of a lane's two rows, in a half
    // Bits of `choosers`: of the queries of this warp's upper and lower rows, and of all queries of a half.
    const unsigned own[2] = {rows.queries(0), rows.queries(1)}, all = (1u << tokens) - 1;       // G is 4 at least
    RowTile x;
    Ring<1> q_ring;
    Ring<Plan::KEY_STAGES> k_ring;
    Ring<Plan::VALUE_STAGES> v_ring;
    for (int round = 0; query_group<SLABS, HALVES>(&x, round, slab, &s); round++) {
        // Of a lane's two rows: sums of weighted values of each half, scores of a step (as results of wgmma lie), then what online softmax knows of each row.
        float o[HALVES][DV / 8][4] = {{{0}}}, p[KEYS / 8][4], top[HALVES][2], sum[HALVES][2], shrink[2];
        #pragma unroll
        for (int half = 0; half < HALVES; half++) top[half][0] = top[half][1] = -INFINITY, sum[half][0] = sum[half][1] = 0;
        unsigned weights[KEYS / 16][4];
        int shrinks = 0;        // bit i: o must shrink in a lane's row i
        // A tile of keys and a half that takes it, the last to do so or not: the step at hand and the next one, which is looked up while products are on their way.
        struct Step { int block, half, last; unsigned choosers; } now, next = {0, 0, 1, 0};
        unsigned others = 0;        // who of the second half chose the next one's tile
        Chosen ahead = {0, 0};
        const auto read_ahead = [&] {       // in time for look_ahead
            if (!next.last) return;
            barrier_wait(my.k_full + k_ring.at, k_ring.parity);
            ahead = my.read_chosen(k_ring.at);
        };
        const auto look_ahead = [&] {
            if (!next.last) {
                next.half = next.last = 1;
                next.choosers = others;
                return;
            }
            const Chosen chosen = same_in_warp(ahead);
            const unsigned first = chosen.choosers & all;
            others = HALVES == 2 ? chosen.choosers >> tokens : 0;
            next.block = chosen.block;
            next.half = HALVES == 2 && !first;
            next.last = next.half || !others;
            next.choosers = next.half ? others : first;
        };
        int tile = 0;           // where the one at hand lies
        const auto issue_scores = [&] {
            now = next;
            tile = k_ring.at;
            wgmma_begin();
            slab_times_turned<D, KEYS>(p, my.q_tile + now.half * SLAB_ROWS * D, SLAB_ROWS, my.key_tiles + tile * KEYS * D, KEYS);
            wgmma_commit();
            if (now.last) k_ring.next();
        };
        const auto issue_values_of = [&](float (*sums)[4]) {
            #pragma unroll
            for (int i = 0; i < 2; i++)
                if (shrinks >> i & 1)
                    #pragma unroll
                    for (int n = 0; n < DV / 8; n++) sums[n][i * 2] *= shrink[i], sums[n][i * 2 + 1] *= shrink[i];
            barrier_wait(my.v_full + v_ring.at, v_ring.parity);
            wgmma_begin();
            factor_times_rows<DV, KEYS>(sums, weights, my.value_tiles + v_ring.at * KEYS * DV);
            wgmma_commit();
        };
        const auto issue_values = [&](int half) {
            if (HALVES == 2 && half) issue_values_of(o[HALVES - 1]);
            else issue_values_of(o[0]);
        };
        const auto scores_done = [&] {
            wgmma_done<KEYS>(p);
            if (now.last) let_go(my.k_empty + tile);
        };
        const auto values_done = [&](int last) {
            wgmma_wait<0>();
            #pragma unroll
            for (int half = 0; half < HALVES; half++) wgmma_done<DV>(o[half]);
            if (last) {
                let_go(my.v_empty + v_ring.at);
                v_ring.next();
            }
        };
        const auto exponentials_of = [&](auto which) {      // of these rows of a lane; nobody of the others chose the block
            typedef decltype(which) Which;
            shrinks = 0;
            #pragma unroll
            for (int i = 0; i < 2; i++) {
                if (i < Which::from || i >= Which::to) {
                    #pragma unroll
                    for (int n = 0; n < KEYS / 8; n++) p[n][i * 2] = p[n][i * 2 + 1] = 0;
                    continue;
                }
                const float before = now.half ? top[HALVES - 1][i] : top[0][i];
                float higher = before;
                #pragma unroll
                for (int n = 0; n < KEYS / 8; n++) higher = fmaxf(higher, fmaxf(p[n][i * 2], p[n][i * 2 + 1]));
                higher = quad_max(higher);
                const int member = now.choosers >> query[i] & 1, grows = member && !((higher - before) * scale2 <= LAZY);
                if (!grows) higher = before;
                const float shift = member ? higher * scale2 : INFINITY;        // a query sees something of each block that it chose
                shrink[i] = grows ? power_of_2(before * scale2 - shift) : 1;
                shrinks |= __any_sync(~0u, grows) << i;
                float more_sum = 0;
                #pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
                    #pragma unroll
                    for (int e = i * 2; e < i * 2 + 2; e++) {
                        p[n][e] = power_of_2(p[n][e] * scale2 - shift);
                        more_sum += p[n][e];
                    }
                #pragma unroll
                for (int half = 0; half < HALVES; half++)
                    if (now.half == half) {
                        top[half][i] = higher;
                        sum[half][i] = sum[half][i] * shrink[i] + more_sum;
                    }
            }
        };
        const auto exponentials = [&] {
            const int k0 = now.block * KEYS - (int)s.t0;     // from the first query on
            if (has_later_keys(&x, k0, KEYS)) {
                rows.at(&x, x.t0 + now.half * tokens, tokens, &mask, &s);
                const SeenKeys seen = seen_keys_of_group(&rows);
                hide_keys<KEYS>(p, k0, INT_MAX, &seen, -INFINITY);
            }
            if (!(now.choosers & own[1])) exponentials_of(LaneRows<0, 1>());
            else if (!(now.choosers & own[0])) exponentials_of(LaneRows<1, 2>());
            else exponentials_of(LaneRows<0, 2>());
        };
        const auto as_weights = [&] {       // when no product reads the old ones any more
            #pragma unroll
            for (int n = 0; n < KEYS / 16; n++) as_left_factor(weights[n], p + 2 * n);
        };

        barrier_wait(my.q_full, q_ring.parity);
        q_ring.next();
        read_ahead();
        look_ahead();       // every query has a block
        issue_scores();
        read_ahead();
        look_ahead();
        wgmma_wait<0>();
        scores_done();
        exponentials();
        as_weights();
        while (next.block >= 0) {
            const Step before = now;
            issue_scores();
            read_ahead();
            issue_values(before.half);
            look_ahead();
            wgmma_wait<1>();
            scores_done();
            exponentials();
            values_done(before.last);
            as_weights();
        }
        let_go(my.q_empty);
        let_go(my.k_empty + k_ring.at);
        k_ring.next();
        issue_values(now.half);
        values_done(1);
        #pragma unroll
        for (int half = 0; half < HALVES; half++) {
            rows.at(&x, x.t0 + half * tokens, tokens, &mask, &s);
            store_group_rows<DV>(out, lse, o[half], top[half], sum[half], &rows, &s);
        }
    }
    #endif
}

template <int SLABS, int HALVES>
static unsigned query_group_blocks(const AttentionShape *s) {
    const int64_t tokens = HALVES * slab_tokens(s, SLAB_ROWS), groups = s->B * s->KV * ((s->T + tokens - 1) / tokens);
    return (unsigned)min64(gpu.multiProcessorCount, (groups + SLABS - 1) / SLABS);
}

// Whether warpgroups take two sets of queries at once: where they have enough of them to do, so that it does not matter when each is done.
enum { ROUNDS_IN_HALVES = 24 };
static int selected_in_halves(const AttentionShape *s) { return s->B * s->H * s->T >= (int64_t)ROUNDS_IN_HALVES * 2 * SLAB_ROWS * selected_slabs<128> * gpu.multiProcessorCount; }
template <int D, int DV, int HALVES>
static void hopper_selected_forward_of_shape(bf16 *out, float *lse, const bf16 *q, const bf16 *k, const bf16 *v, const Mask *mask, const AttentionShape *s) {
    typedef SelectedForward<D, DV, HALVES> Plan;
    allow_shared(hopper_selected_forward_kernel<D, DV, HALVES>, Plan::BYTES, FAST_NAME, FAST_FIX);
    hopper_selected_forward_kernel<D, DV, HALVES><<<query_group_blocks<Plan::SLABS, HALVES>(s), Plan::THREADS, (size_t)Plan::BYTES>>>(
        out, lse, group_map(q, D, s->q_row, s), key_map(k, D, s->k_row, s, Plan::KEYS), key_map(v, DV, s->v_row, s, Plan::KEYS), *mask, *s);
    LAUNCHED();
}

// Whether queries that are taken together share the blocks that they take: blocks must be tiles.
static int shares_blocks(const Mask *mask) { return mask->sel_block == SLAB_ROWS; }

// With `total`, of a range of keys, the sum of the branches too.
static void hopper_attention_forward(bf16 *out, float *lse, const bf16 *q, const bf16 *k, const bf16 *v, const Mask *mask, const AttentionShape *s, const BranchSum<bf16> *total = NULL) {
    if (mask->kind == MASK_SELECTED && !shares_blocks(mask)) fast_attention_forward(out, lse, q, k, v, mask, s);
    else if (mask->kind == MASK_SELECTED && s->D == 64) hopper_selected_forward_of_shape<64, 64, 1>(out, lse, q, k, v, mask, s);
    else if (mask->kind == MASK_SELECTED && selected_in_halves(s)) hopper_selected_forward_of_shape<128, 128, 2>(out, lse, q, k, v, mask, s);
    else if (mask->kind == MASK_SELECTED) hopper_selected_forward_of_shape<128, 128, 1>(out, lse, q, k, v, mask, s);
    else if (s->D == 64) hopper_range_forward<64, 64>(out, lse, q, k, v, mask, s, total);
    else hopper_range_forward<128, 128>(out, lse, q, k, v, mask, s, total);
}

// ----------------------------------------------------------------------------
// Backward on Hopper. It is given, for each row (query, head): x = lse·log2(e) - log2(gate), so that 2^(score·log2(e) - x) = gate·P, and y = <dout, out>. With these
// dV = (gate·P)ᵀ·dout and dS = gate·P∘(dout·Vᵀ - y): no gate any more. A row without keys has x = infinity, which makes all of it 0.

typedef float2 RowStats;
__device__ static inline RowStats row_stats(float lse, float gate, float y) { return make_float2(lse == -INFINITY ? INFINITY : lse * LOG2E - log2f(gate), y); }

// What is turned back by RoPE as it is made. dq, when its last part or its only one is made, as a whole: it goes there, in rows `row` numbers apart. dk where it lies.
// The angles are rope_kernel's table from the first query and from the first key on; NULL: dk stays as it is.
template <typename F> struct TurnedBack { F *dq; int64_t row; const float *angles, *key_angles; };
static TurnedBack<bf16> turned_or_none(const TurnedBack<bf16> *turned) { return turned ? *turned : TurnedBack<bf16>{NULL, 0, NULL, NULL}; }

// Another branch, whose part of dq is made in one go with that of the one at hand.
template <typename F> struct OtherBranch { const RowStats *stats; const F *k, *v; Mask mask; AttentionShape s; };

// The branches whose part of dq is made in one go: their keys and values, the stats of the rows in them. They differ in the mask and in the shape's keys.
typedef struct DqBranch { CUtensorMap k, v; Mask mask; AttentionShape s; const RowStats *stats; } DqBranch;
typedef struct DqKeys { DqBranch of[2]; int count; } DqKeys;

// As store_dq where these are the last part: what is at dq, if anything, and sum·scale together, turned back.
template <int D, typename Rows>
__device__ static inline void store_turned_dq(const TurnedBack<bf16> *turned, const float *dq, int accumulate, const float (*sum)[4], float scale, const Rows *rows, const AttentionShape *s) {
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = lane() / 4 + i * 8, there = is_row(rows, row);
        const int64_t place = place_of(rows, row, s);
        const float *before = dq + place * D + lane() % 4 * 2, *angles = turned->angles + (int64_t)token_of(rows, row, s) * D + lane() % 4 * 2;
        bf16 *to = turned->dq + place / s->H * turned->row + place % s->H * D + lane() % 4 * 8;
        #pragma unroll
        for (int m = 0; m < D / 64; m++) {
            unsigned first[4], second[4];       // of the pairs (c, c + D/2), 32 at a time
            #pragma unroll
            for (int j = 0; j < 4; j++) {
                const int n = m * 4 + j, half = D / 2;
                const float2 a0 = accumulate ? *(const float2 *)(before + n * 8) : make_float2(0, 0), b0 = accumulate ? *(const float2 *)(before + n * 8 + half) : make_float2(0, 0);
                const float2 cosine = *(const float2 *)(angles + n * 8), sine = *(const float2 *)(angles + n * 8 + half);
                const float *a1 = sum[n] + i * 2, *b1 = sum[n + D / 16] + i * 2;
                float2 a = make_float2(a0.x + a1[0] * scale, a0.y + a1[1] * scale), b = make_float2(b0.x + b1[0] * scale, b0.y + b1[1] * scale);
                turn_back(&a, &b, cosine, sine);
                first[j] = two_bf16(a.x, a.y);
                second[j] = two_bf16(b.x, b.y);
            }
            const uint4 low = eight_of_row(first), high = eight_of_row(second);
            if (there) *(uint4 *)(to + m * 32) = low, *(uint4 *)(to + m * 32 + D / 2) = high;
        }
    }
}

// dq, as fast_dq_kernel. The products of a tile follow those of the one before without a gap. (Queries and dout as left factors in registers would
// spare shared memory half its work, but ptxas 13.0 gives such registers, live through the whole loop, to the slopes as well.)
template <int D, int DV, int KEYS>
struct HopperDq {
    enum { SLABS = 2, ROWS = SLABS * SLAB_ROWS, STAGES = 4, THREADS = (SLABS + 1) * WARPGROUP };
    enum { BYTES = (ROWS + STAGES * KEYS) * (D + DV) * 2, BARRIERS = 2 + 2 * STAGES };
};

template <int D, int DV, int KEYS>
__global__ void __launch_bounds__(HopperDq<D, DV, KEYS>::THREADS, 1)
hopper_dq_kernel(float *dq, int accumulate, TurnedBack<bf16> turned, const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap dout_map, const __grid_constant__ DqKeys keys) {
    #if HOPPER_CODE
    typedef HopperDq<D, DV, KEYS> Plan;
    constexpr int SLABS = Plan::SLABS, ROWS = Plan::ROWS, STAGES = Plan::STAGES;
    extern __shared__ SharedKilobyte hopper_shared[];
    bf16 *q_tile = (bf16 *)hopper_shared, *dout_tile = q_tile + ROWS * D, *key_tiles = dout_tile + ROWS * DV, *value_tiles = key_tiles + STAGES * KEYS * D;
    uint64_t *q_full = (uint64_t *)(value_tiles + STAGES * KEYS * DV), *q_empty = q_full + 1, *full = q_empty + 1, *empty = full + STAGES;
    const AttentionShape &s = keys.of[0].s;
    const int group = same_in_warp(threadIdx.x / WARPGROUP), G = s.H / s.KV;
    if (threadIdx.x == 0) {
        barrier_init(q_full, 1), barrier_init(q_empty, SLABS * 4);
        for (int i = 0; i < STAGES; i++) barrier_init(full + i, 1), barrier_init(empty + i, SLABS * 4);
        barriers_ready();
    }
    __syncthreads();
    RowTile x;
    Ring<1> q_ring;
    Ring<STAGES> ring;

    if (group == 0) {
        registers_fewer<copy_registers<SLABS>>();
        if (threadIdx.x > 0) return;
        for (int round = 0; row_tile<ROWS, KEYS>(&x, round, &keys.of[0].mask, &s); round++) {
            barrier_wait(q_empty, q_ring.parity ^ 1);
            barrier_expect(q_full, ROWS / G * G * (D + DV) * 2);
            copy_tile<D>(q_tile, ROWS, &q_map, x.b, x.t0, x.kv * G, q_full);
            copy_tile<DV>(dout_tile, ROWS, &dout_map, x.b, x.t0, x.kv * G, q_full);
            q_ring.next();
            for (int branch = 0; branch < keys.count; branch++) {
                const DqBranch *of = &keys.of[branch];
                keys_of_tile<ROWS, KEYS>(&x, &of->mask, &of->s);
                for (int i = 0; i < x.steps; i++, ring.next()) {
                    barrier_wait(empty + ring.at, ring.parity ^ 1);
                    barrier_expect(full + ring.at, KEYS * (D + DV) * 2);
                    copy_tile<D>(key_tiles + ring.at * KEYS * D, KEYS, &of->k, x.b, x.k0 + i * KEYS, x.kv, full + ring.at);
                    copy_tile<DV>(value_tiles + ring.at * KEYS * DV, KEYS, &of->v, x.b, x.k0 + i * KEYS, x.kv, full + ring.at);
                }
            }
        }
        return;
    }

    registers_more<compute_registers<SLABS>>();
    const int slab = group - 1;
    const float scale = 1 / sqrtf((float)D), scale2 = scale * LOG2E, factors[2] = {scale, scale};
    for (int round = 0; row_tile<ROWS, KEYS>(&x, round, &keys.of[0].mask, &s); round++) {
        const FastRows rows = rows_of_warp<ROWS>(&x, slab, &s);
        unsigned slopes[KEYS / 16][4];
        float p[KEYS / 8][4], dp[KEYS / 8][4], sum[D / 8][4] = {{0}};
        barrier_wait(q_full, q_ring.parity);
        for (int branch = 0; branch < keys.count; branch++) {
            const DqBranch *of = &keys.of[branch];
            keys_of_tile<ROWS, KEYS>(&x, &of->mask, &of->s);
            const SeenKeys seen = seen_keys<FAST_WARPS>(&rows, &of->mask, &of->s);
            const int steps = same_in_warp(x.steps);
            RowStats of_row[2];
            #pragma unroll
            for (int i = 0; i < 2; i++) of_row[i] = of->stats[place_of_row(&rows, row_at(&rows, lane() / 4 + i * 8), &s)];
            int last = 0;       // the stage before this one
            for (int i = 0; i < steps; i++, ring.next()) {
                const bf16 *key_tile = key_tiles + ring.at * KEYS * D, *value_tile = value_tiles + ring.at * KEYS * DV;
                barrier_wait(full + ring.at, ring.parity);
                wgmma_begin();
                slab_times_turned<D, KEYS>(p, q_tile + slab * SLAB_ROWS * PANEL, ROWS, key_tile, KEYS);
                wgmma_commit();
                slab_times_turned<DV, KEYS>(dp, dout_tile + slab * SLAB_ROWS * PANEL, ROWS, value_tile, KEYS);
                wgmma_commit();
                wgmma_wait<1>();        // the scores, and before them the last tile's sum
                wgmma_done<KEYS>(p);
                if (i > 0) let_go(empty + last);
                last = ring.at;
                const int k0 = x.k0 + i * KEYS, masked = k0 < seen.all_lo || k0 + KEYS > seen.all_hi;
                #pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
                    #pragma unroll
                    for (int e = 0; e < 4; e++) p[n][e] = power_of_2(p[n][e] * scale2 - of_row[e / 2].x);
                if (masked) hide_keys<KEYS>(p, k0, INT_MAX, &seen, 0);
                wgmma_wait<0>();
                wgmma_done<KEYS>(dp);
                #pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
                    #pragma unroll
                    for (int e = 0; e < 4; e++) dp[n][e] = p[n][e] * (dp[n][e] - of_row[e / 2].y);
                #pragma unroll
                for (int n = 0; n < KEYS / 16; n++) as_left_factor(slopes[n], dp + 2 * n);
                wgmma_begin();
                factor_times_rows<D, KEYS>(sum, slopes, key_tile);
                wgmma_commit();
            }
            wgmma_wait<0>();
            wgmma_done<D>(sum);
            if (steps > 0) let_go(empty + last);
        }
        let_go(q_empty);
        q_ring.next();

        if (turned.dq) store_turned_dq<D>(&turned, dq, accumulate, sum, scale, &rows, &s);
        else store_dq<D>(dq, accumulate, sum, factors, &rows, &s);
    }
    #endif
}

// The same with selection, for groups of queries that choose alike, as hopper_selected_forward_kernel.
template <int D, int DV> using SelectedDq = SelectedSlab<D, DV, 3, 2, 1>;

template <int D, int DV>
__global__ void __launch_bounds__(SelectedDq<D, DV>::THREADS, 1)
hopper_selected_dq_kernel(float *dq, int accumulate, TurnedBack<bf16> turned, const RowStats *stats, const __grid_constant__ CUtensorMap q_map,
                          const __grid_constant__ CUtensorMap dout_map, const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map, Mask mask, AttentionShape s) {
    #if HOPPER_CODE
    constexpr int SLABS = selected_slabs<D>, KEYS = SLAB_ROWS;
    extern __shared__ SharedKilobyte hopper_shared[];
    const int group = same_in_warp(threadIdx.x / WARPGROUP), slab = same_in_warp(group ? group - 1 : threadIdx.x / WARP);
    SelectedDq<D, DV> my;
    my.begin(hopper_shared, slab);
    if (group == 0 && slab < SLABS && lane() == 0) my.make_barriers();
    __syncthreads();
    if (group == 0) {
        registers_fewer<MERGE_REGISTERS>();
        if (slab < SLABS) my.bring(&q_map, &dout_map, &k_map, &v_map, slab, &mask, &s);
        return;
    }

    registers_more<merged_registers<SLABS>>();
    const float scale = 1 / sqrtf((float)D), scale2 = scale * LOG2E, factors[2] = {scale, scale};
    const int G = s.H / s.KV, tokens = SLAB_ROWS / G;
    GroupRows rows(G);
    const int query[2] = {rows.query(lane() / 4), rows.query(lane() / 4 + 8)};
    RowTile x;
    Ring<1> q_ring;
    Ring<3> k_ring;
    Ring<2> v_ring;
    for (int round = 0; query_group<SLABS, 1>(&x, round, slab, &s); round++) {
        rows.at(&x, x.t0, tokens, &mask, &s);
        float p[KEYS / 8][4], dp[KEYS / 8][4], sum[D / 8][4] = {{0}};
        unsigned slopes[KEYS / 16][4];
        RowStats of_row[2];
        #pragma unroll
        for (int i = 0; i < 2; i++) of_row[i] = stats[place_of(&rows, lane() / 4 + i * 8, &s)];
        barrier_wait(my.q_full, q_ring.parity);
        q_ring.next();
        Chosen now, next;       // as in forward
        int tile = 0;
        const auto next_tile = [&] {
            barrier_wait(my.k_full + k_ring.at, k_ring.parity);
            next = same_in_warp(my.read_chosen(k_ring.at));
        };
        const auto issue_scores = [&] {     // and dout·Vᵀ
            now = next;
            tile = k_ring.at;
            barrier_wait(my.v_full + v_ring.at, v_ring.parity);
            wgmma_begin();
            slab_times_turned<D, KEYS>(p, my.q_tile, SLAB_ROWS, my.key_tiles + tile * KEYS * D, KEYS);
            wgmma_commit();
            slab_times_turned<DV, KEYS>(dp, my.dout_tile, SLAB_ROWS, my.value_tiles + v_ring.at * KEYS * DV, KEYS);
            wgmma_commit();
            k_ring.next();
        };
        const auto issue_sum = [&](int at) {
            wgmma_begin();
            factor_times_rows<D, KEYS>(sum, slopes, my.key_tiles + at * KEYS * D);
            wgmma_commit();
        };
        const auto powers = [&] {
            const int k0 = now.block * KEYS - (int)s.t0;     // from the first query on
            const float shift[2] = {now.choosers >> query[0] & 1 ? of_row[0].x : INFINITY, now.choosers >> query[1] & 1 ? of_row[1].x : INFINITY};
            wgmma_done<KEYS>(p);
            #pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
                #pragma unroll
                for (int e = 0; e < 4; e++) p[n][e] = power_of_2(p[n][e] * scale2 - shift[e / 2]);
            if (has_later_keys(&x, k0, KEYS)) {
                const SeenKeys seen = seen_keys_of_group(&rows);
                hide_keys<KEYS>(p, k0, INT_MAX, &seen, 0);
            }
        };
        const auto make_slopes = [&] {
            wgmma_done<KEYS>(dp);
            let_go(my.v_empty + v_ring.at);
            v_ring.next();
            #pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
                #pragma unroll
                for (int e = 0; e < 4; e++) dp[n][e] = p[n][e] * (dp[n][e] - of_row[e / 2].y);
        };
        const auto as_factor = [&] {        // when no product reads the old one any more
            #pragma unroll
            for (int n = 0; n < KEYS / 16; n++) as_left_factor(slopes[n], dp + 2 * n);
        };
        next_tile();
        issue_scores();
        next_tile();
        wgmma_wait<1>();
        powers();
        wgmma_wait<0>();
        make_slopes();
        as_factor();
        while (next.block >= 0) {
            const int before = tile;
            issue_scores();
            issue_sum(before);
            wgmma_wait<2>();
            powers();
            next_tile();        // looked up while products are on their way, as late as that: its tile's place may have been let go of just now
            wgmma_wait<1>();
            make_slopes();
            wgmma_wait<0>();
            wgmma_done<D>(sum);
            let_go(my.k_empty + before);
            as_factor();
        }
        let_go(my.k_empty + k_ring.at);
        k_ring.next();
        issue_sum(tile);
        wgmma_wait<0>();
        wgmma_done<D>(sum);
        let_go(my.k_empty + tile);
        let_go(my.q_empty);
        if (turned.dq) store_turned_dq<D>(&turned, dq, accumulate, sum, scale, &rows, &s);
        else store_dq<D>(dq, accumulate, sum, factors, &rows, &s);
    }
    #endif
}

// dk, dv, as fast_dkv_kernel: a block owns a tile of keys, or a part of its queue of queries, and scores are turned, (keys, rows). Where keys are a range
// each of two warpgroups has 64 of them. With selection (LISTED) both have the same 64 and take turns at the stages of the queue, whose queries come
// one by one, as the list of takers names them; one adds up both sums. angles: TurnedBack's of the keys, or NULL.
template <int D, int DV, int LISTED>
struct HopperDkv {
    static constexpr int SLABS = 2, KEYS = LISTED ? SLAB_ROWS : HOPPER_KEYS, ROWS = 64, STAGES = D == 64 ? 6 : 4, USERS = LISTED ? 1 : SLABS, THREADS = (SLABS + 1) * WARPGROUP;
    enum { BYTES = (KEYS + STAGES * ROWS) * (D + DV) * 2, BARRIERS = 1 + 2 * STAGES };
};
struct alignas(16) StageStats { RowStats of_row[64]; int position[64]; };      // of a stage's rows

template <int D, int DV, int LISTED>
__global__ void __launch_bounds__(HopperDkv<D, DV, LISTED>::THREADS, 1)
hopper_dkv_kernel(bf16 *dk, bf16 *dv, const RowStats *stats, const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap dout_map,
                  const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map, Mask mask, AttentionShape s, Takers takers,
                  const float *angles, float *partial, PartLists lists) {
    #if HOPPER_CODE
    typedef HopperDkv<D, DV, LISTED> Plan;
    constexpr int SLABS = Plan::SLABS, ROWS = Plan::ROWS, KEYS = Plan::KEYS, STAGES = Plan::STAGES;
    extern __shared__ SharedKilobyte hopper_shared[];
    KeyPart own;
    if (!part_of_block(&own, &lists, KEYS, &mask, &s, &takers)) return;
    const KeyTile x = own.x;
    const int64_t from = x.from;
    const int G = s.H / s.KV, tokens = ROWS / G, queue = (int)(x.to - from), steps = (queue + tokens - 1) / tokens;
    // A window's tiles each begin where the position is a multiple of their queries' number, and go round: so neighbours, too, meet the same queries at the same time.
    const int behind = LISTED || own.of.parts > 1 || steps == 0 ? 0 : (int)from / tokens % steps, turn = behind ? steps - behind : 0;
    bf16 *key_tile = (bf16 *)hopper_shared, *value_tile = key_tile + KEYS * D, *q_tiles = value_tile + KEYS * DV, *dout_tiles = q_tiles + STAGES * ROWS * D;
    StageStats *stage_stats = (StageStats *)(dout_tiles + STAGES * ROWS * DV);
    uint64_t *keys_full = (uint64_t *)(stage_stats + STAGES), *full = keys_full + 1, *empty = full + STAGES;
    const int group = same_in_warp(threadIdx.x / WARPGROUP);
    if (threadIdx.x == 0) {
        barrier_init(keys_full, 1);
        for (int i = 0; i < STAGES; i++) barrier_init(full + i, 2 * WARP + 1), barrier_init(empty + i, Plan::USERS * WARPGROUP);      // the copying warp brings the stats too
        barriers_ready();
    }
    // Rows that no box reaches are zero for good: they add nothing to any sum.
    for (int i = threadIdx.x; i < STAGES * (ROWS - tokens * G) * (D + DV) / 8; i += blockDim.x) {
        const int chunk = i % ((D + DV) / 8), row = i / ((D + DV) / 8) % (ROWS - tokens * G) + tokens * G, stage = i / ((D + DV) / 8) / (ROWS - tokens * G);
        *(uint4 *)(chunk < D / 8 ? panel_chunk(q_tiles + stage * ROWS * D, ROWS, row, chunk) : panel_chunk(dout_tiles + stage * ROWS * DV, ROWS, row, chunk - D / 8)) = make_uint4(0, 0, 0, 0);
    }
    shared_written();
    __syncthreads();
    Ring<STAGES> ring;

    if (group == 0) {
        registers_fewer<copy_registers<SLABS>>();
        if (steps == 0) return;
        if (threadIdx.x == 0) {
            barrier_expect(keys_full, KEYS * (D + DV) * 2);
            copy_tile<D>(key_tile, KEYS, &k_map, (int)x.b, (int)x.k0, (int)x.kv, keys_full);
            copy_tile<DV>(value_tile, KEYS, &v_map, (int)x.b, (int)x.k0, (int)x.kv, keys_full);
        }
        // Stages go round the four warps: one alone, that has a copy to ask for per query, would be slower than the products. Tokens are known a stage ahead.
        // Behind the end of the queue the last one comes again, with numbers that make nothing of it.
        constexpr int WARPS = WARPGROUP / WARP, EACH = ROWS / WARP;
        int place[EACH], head[EACH], token[EACH];       // of this lane's rows: the place in the stage, the head
        const auto token_at = [&](int at) { return LISTED ? takers.queries[from + min32(at, queue - 1)] : (int)from + at; };
        const int warp = threadIdx.x / WARP;
        const RowStats *of_head = stats + x.b * s.T * s.H + x.kv * G;
        const auto go_round = [&](int at) { return LISTED || at < steps ? at : at - steps; };
        int at = go_round(warp + turn);     // which tokens of the queue a stage has
        #pragma unroll
        for (int i = 0; i < EACH; i++) {
            place[i] = (i * WARP + lane()) / G;
            head[i] = (i * WARP + lane()) % G;
            token[i] = token_at(at * tokens + place[i]);
        }
        ring.skip(warp);
        for (int stage = warp; stage < steps; stage += WARPS, ring.skip(WARPS)) {
            bf16 *q_tile = q_tiles + ring.at * ROWS * D, *dout_tile = dout_tiles + ring.at * ROWS * DV;
            StageStats *to = stage_stats + ring.at;
            const int next = go_round(at + WARPS);
            barrier_wait(empty + ring.at, ring.parity ^ 1);
            if (lane() == 0) barrier_expect(full + ring.at, tokens * G * (D + DV) * 2);
            __syncwarp();
            #pragma unroll
            for (int i = 0; i < EACH; i++) {
                const int row = i * WARP + lane();
                if (row >= tokens * G || (LISTED ? head[i] : row)) continue;       // a lane brings a query, the first one all of a range
                copy_tile<D>(q_tile + row * PANEL, ROWS, &q_map, (int)x.b, token[i], (int)x.kv * G, full + ring.at);
                copy_tile<DV>(dout_tile + row * PANEL, ROWS, &dout_map, (int)x.b, token[i], (int)x.kv * G, full + ring.at);
            }
            #pragma unroll
            for (int i = 0; i < EACH; i++) {
                const int row = i * WARP + lane();
                to->position[row] = (int)s.t0 + token[i];
                if (row < tokens * G && at * tokens + place[i] < queue) cp_async_8(to->of_row + row, of_head + (int64_t)token[i] * s.H + head[i]);
                else to->of_row[row] = make_float2(INFINITY, 0);
                token[i] = token_at(next * tokens + place[i]);
            }
            at = next;
            barrier_arrive(full + ring.at);
            barrier_arrive_copied(full + ring.at);
        }
        return;
    }

    registers_more<compute_registers<SLABS>>();
    const int slab = group - 1, mine = (LISTED ? 0 : slab * SLAB_ROWS) + (int)(threadIdx.x / WARP) % 4 * MMA_ROWS, own_keys = LISTED ? 0 : slab * SLAB_ROWS;
    const int first_key = (int)x.k0 + mine + lane() / 4, count = (int)x.count;
    const float scale = 1 / sqrtf((float)D), scale2 = scale * LOG2E;
    float dks[D / 8][4] = {{0}}, dvs[DV / 8][4] = {{0}}, p[ROWS / 8][4], ds[ROWS / 8][4];
    unsigned weights[ROWS / 16][4], slopes[ROWS / 16][4];
    if (steps > 0) barrier_wait(keys_full, 0);
    const auto issue_scores = [&](int at) {
        wgmma_begin();
        slab_times_turned<D, ROWS>(p, key_tile + own_keys * PANEL, KEYS, q_tiles + at * ROWS * D, ROWS);
        wgmma_commit();
    };
    const auto issue_slopes = [&](int at) {
        wgmma_begin();
        slab_times_turned<DV, ROWS>(ds, value_tile + own_keys * PANEL, KEYS, dout_tiles + at * ROWS * DV, ROWS);
        wgmma_commit();
    };
    const auto issue_sums = [&](int at) {
        wgmma_begin();
        factor_times_rows<DV, ROWS>(dvs, weights, dout_tiles + at * ROWS * DV);
        factor_times_rows<D, ROWS>(dks, slopes, q_tiles + at * ROWS * D);
        wgmma_commit();
    };
    // While products are on their way: queries ascend, keys too, so the corners say whether everything between them is seen; and the rows' numbers, where there
    // are registers for all of them.
    int masked = 0;
    float4 held[D == 64 ? ROWS / 8 : 1] = {};
    const auto of_two = [&](int at, int n) { return *(const float4 *)(stage_stats[at].of_row + n * 8 + lane() % 4 * 2); };
    const auto two_rows = [&](int at, int n) { return D == 64 ? held[D == 64 ? n : 0] : of_two(at, n); };
    const auto look_up = [&](int at) {
        const int *position = stage_stats[at].position;
        masked = !sees_key(&mask, position[0], (int)x.k0 + count - 1) || !sees_key(&mask, position[ROWS - 1], (int)x.k0);
        #pragma unroll
        for (int n = 0; n < (D == 64 ? ROWS / 8 : 0); n++) held[n] = of_two(at, n);
    };
    // Scores, which are there, to gate·P.
    const auto make_weights = [&](int at) {
        const StageStats *of = stage_stats + at;
        const auto powers = [&](auto hides) {       // once with, once without: no branches in the loop
            #pragma unroll
            for (int n = 0; n < ROWS / 8; n++) {
                const float4 two = two_rows(at, n);
                #pragma unroll
                for (int e = 0; e < 4; e++) {
                    p[n][e] = power_of_2(p[n][e] * scale2 - (e % 2 ? two.z : two.x));
                    if (decltype(hides)::value && !sees_key(&mask, of->position[n * 8 + lane() % 4 * 2 + e % 2], first_key + e / 2 * 8)) p[n][e] = 0;
                }
            }
        };
        wgmma_done<ROWS>(p);
        if (masked) powers(std::true_type());
        else powers(std::false_type());
    };
    // And with dout·Vᵀ the slopes.
    const auto make_slopes = [&](int at) {
        wgmma_done<ROWS>(ds);
        #pragma unroll
        for (int n = 0; n < ROWS / 8; n++) {
            const float4 two = two_rows(at, n);
            #pragma unroll
            for (int e = 0; e < 4; e++) ds[n][e] = p[n][e] * (ds[n][e] - (e % 2 ? two.w : two.y));
        }
    };
    const auto as_factors = [&] {       // when no product reads the old ones any more
        #pragma unroll
        for (int n = 0; n < ROWS / 16; n++) as_left_factor(weights[n], p + 2 * n), as_left_factor(slopes[n], ds + 2 * n);
    };
    const auto sums_done = [&](int at) {
        wgmma_done<DV>(dvs);
        wgmma_done<D>(dks);
        barrier_arrive(empty + at);     // each lane for itself, as each has read the stats: so compute-sanitizer can follow
    };

    const auto make_factors = [&] {     // of the stage at hand, when it is there
        barrier_wait(full + ring.at, ring.parity);
        issue_scores(ring.at);
        issue_slopes(ring.at);
        look_up(ring.at);
        wgmma_wait<1>();
        make_weights(ring.at);
        wgmma_wait<0>();
        make_slopes(ring.at);
        as_factors();
    };

    // The sums of a stage and the scores of the next are on their way together, as far as registers reach: at D = 64 with dout·Vᵀ; at D = 128 the exponentials
    // are made under the sums, and dout·Vᵀ follows these. Queries that come one by one are what is waited for: there a stage is let go of at once.
    constexpr int STRIDE = LISTED ? SLABS : 1;
    const int first = LISTED ? slab : 0;
    ring.skip(first);
    if constexpr (D > 64 && LISTED) {
        for (int i = first; i < steps; i += STRIDE, ring.skip(STRIDE)) {
            make_factors();
            issue_sums(ring.at);
            wgmma_wait<0>();
            sums_done(ring.at);
        }
    } else if (first < steps) {
        make_factors();
        for (int i = first + STRIDE; i < steps; i += STRIDE) {
            const int before = ring.at;
            ring.skip(STRIDE);
            if constexpr (D == 64) {
                issue_sums(before);
                barrier_wait(full + ring.at, ring.parity);
                issue_scores(ring.at);
                issue_slopes(ring.at);
                wgmma_wait<2>();
                sums_done(before);
                look_up(ring.at);
                wgmma_wait<1>();
                make_weights(ring.at);
                wgmma_wait<0>();
            } else {
                barrier_wait(full + ring.at, ring.parity);
                issue_scores(ring.at);
                issue_sums(before);
                look_up(ring.at);
                wgmma_wait<1>();
                make_weights(ring.at);
                wgmma_wait<0>();
                sums_done(before);
                issue_slopes(ring.at);
                wgmma_wait<0>();
            }
            make_slopes(ring.at);
            as_factors();
        }
        issue_sums(ring.at);
        wgmma_wait<0>();
        sums_done(ring.at);
    }
    if constexpr (LISTED) {     // the second warpgroup's sums go to the first through the stages' place, which no copy will reach any more
        float4 *sums = (float4 *)q_tiles + threadIdx.x % WARPGROUP;
        threads_sync(1 + SLABS, SLABS * WARPGROUP);
        #pragma unroll
        for (int n = 0; n < (D + DV) / 8 && slab == 1; n++) {
            const float *of = n < D / 8 ? dks[n] : dvs[n - D / 8];
            sums[n * WARPGROUP] = make_float4(of[0], of[1], of[2], of[3]);
        }
        threads_sync(1 + SLABS, SLABS * WARPGROUP);
        if (slab == 1) return;
        #pragma unroll
        for (int n = 0; n < (D + DV) / 8; n++) {
            const float4 more = sums[n * WARPGROUP];
            float *to = n < D / 8 ? dks[n] : dvs[n - D / 8];
            to[0] += more.x, to[1] += more.y, to[2] += more.z, to[3] += more.w;
        }
    }

    if (own.of.parts > 1) {        // (keys, D + DV) of this part
        const int keys = tile_keys(KEYS, &mask);
        #pragma unroll
        for (int i = 0; i < 2; i++) {
            if (mine + lane() / 4 + i * 8 >= keys) continue;
            float *to_key = partial + ((lists.slot[own.of.tile] + own.of.part) * (int64_t)keys + mine + lane() / 4 + i * 8) * (D + DV) + lane() % 4 * 2;
            #pragma unroll
            for (int n = 0; n < D / 8; n++) *(float2 *)(to_key + n * 8) = make_float2(dks[n][i * 2] * scale, dks[n][i * 2 + 1] * scale);
            #pragma unroll
            for (int n = 0; n < DV / 8; n++) *(float2 *)(to_key + D + n * 8) = make_float2(dvs[n][i * 2], dvs[n][i * 2 + 1]);
        }
        return;
    }
    // The keys and values have been read for the last time by all who read these: the results pass through their place.
    threads_sync(1 + slab, WARPGROUP);
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = mine + lane() / 4 + i * 8;
        const float *of_key = angles ? angles + (x.k0 + min32(row, count - 1)) * D + lane() % 4 * 2 : NULL;
        #pragma unroll
        for (int n = 0; n < D / 16; n++) {
            float2 a = make_float2(dks[n][i * 2] * scale, dks[n][i * 2 + 1] * scale), b = make_float2(dks[n + D / 16][i * 2] * scale, dks[n + D / 16][i * 2 + 1] * scale);
            if (angles) turn_back(&a, &b, *(const float2 *)(of_key + n * 8), *(const float2 *)(of_key + n * 8 + D / 2));
            *(unsigned *)(panel_chunk(key_tile, KEYS, row, n) + lane() % 4 * 2) = two_bf16(a.x, a.y);
            *(unsigned *)(panel_chunk(key_tile, KEYS, row, n + D / 16) + lane() % 4 * 2) = two_bf16(b.x, b.y);
        }
        #pragma unroll
        for (int n = 0; n < DV / 8; n++) *(unsigned *)(panel_chunk(value_tile, KEYS, row, n) + lane() % 4 * 2) = two_bf16(dvs[n][i * 2], dvs[n][i * 2 + 1]);
    }
    __syncwarp();
    for (int i = lane(); i < MMA_ROWS * ((D + DV) / 8); i += WARP) {
        const int row = mine + i / ((D + DV) / 8), chunk = i % ((D + DV) / 8);
        if (row >= count) continue;
        const int64_t token = x.b * s.Tk + x.k0 + row;
        if (chunk < D / 8) *(uint4 *)(dk + token * s.k_row + x.kv * D + chunk * 8) = *(const uint4 *)panel_chunk(key_tile, KEYS, row, chunk);
        else *(uint4 *)(dv + token * s.v_row + x.kv * DV + chunk * 8 - D) = *(const uint4 *)panel_chunk(value_tile, KEYS, row, chunk - D / 8);
    }
    #endif
}

// `partial`: the parts as for fast_dkv_kernel; before them the lists of takers are made there.
static int hopper_keys(const Mask *mask) { return mask->kind == MASK_SELECTED ? SLAB_ROWS : HOPPER_KEYS; }
static int64_t hopper_attention_partial(const AttentionShape *s, const Mask *mask) { return max64(takers_scratch(s, mask), parts_numbers(hopper_keys(mask), mask, s)); }

template <int D, int DV, int KEYS>
static void hopper_dq_of_shape(float *dq, int accumulate, const TurnedBack<bf16> *turned, const RowStats *stats, const bf16 *dout, const bf16 *q, const bf16 *k, const bf16 *v, const Mask *mask,
                               const AttentionShape *s, const OtherBranch<bf16> *other) {
    typedef HopperDq<D, DV, KEYS> Plan;
    const int64_t bytes = Plan::BYTES + Plan::BARRIERS * (int64_t)sizeof(uint64_t);
    const CUtensorMap q_map = query_map(q, D, s->q_row, s, Plan::ROWS), dout_map = query_map(dout, DV, s->H * DV, s, Plan::ROWS);
    const auto branch = [&](const RowStats *of, const bf16 *keys, const bf16 *values, const Mask *m, const AttentionShape *shape) {
        const DqBranch x = {shape->Tk ? key_map(keys, D, shape->k_row, shape, KEYS) : q_map, shape->Tk ? key_map(values, DV, shape->v_row, shape, KEYS) : q_map, *m, *shape, of};
        return x;
    };
    DqKeys keys = {{branch(stats, k, v, mask, s)}, other ? 2 : 1};
    if (other) keys.of[1] = branch(other->stats, other->k, other->v, &other->mask, &other->s);
    allow_shared(hopper_dq_kernel<D, DV, KEYS>, bytes, FAST_NAME, FAST_FIX);
    hopper_dq_kernel<D, DV, KEYS><<<row_blocks<Plan::ROWS>(s), Plan::THREADS, (size_t)bytes>>>(dq, accumulate, turned_or_none(turned), q_map, dout_map, keys);
    LAUNCHED();
}

template <int D, int DV>
static void hopper_selected_dq_of_shape(float *dq, int accumulate, const TurnedBack<bf16> *turned, const RowStats *stats, const bf16 *dout, const bf16 *q, const bf16 *k,
                                        const bf16 *v, const Mask *mask, const AttentionShape *s) {
    typedef SelectedDq<D, DV> Plan;
    allow_shared(hopper_selected_dq_kernel<D, DV>, Plan::BYTES, FAST_NAME, FAST_FIX);
    hopper_selected_dq_kernel<D, DV><<<query_group_blocks<Plan::SLABS, 1>(s), Plan::THREADS, (size_t)Plan::BYTES>>>(
        dq, accumulate, turned_or_none(turned), stats, group_map(q, D, s->q_row, s), group_map(dout, DV, s->H * DV, s), key_map(k, D, s->k_row, s, Plan::KEYS),
        key_map(v, DV, s->v_row, s, Plan::KEYS), *mask, *s);
    LAUNCHED();
}

template <int D, int DV, int LISTED>
static void hopper_dkv_of_shape(bf16 *dk, bf16 *dv, const RowStats *stats, const bf16 *dout, const bf16 *q, const bf16 *k, const bf16 *v, const Mask *mask,
                                const AttentionShape *s, const Takers *takers, const float *key_angles, float *partial) {
    typedef HopperDkv<D, DV, LISTED> Plan;
    const int64_t bytes = Plan::BYTES + Plan::STAGES * (int64_t)sizeof(StageStats) + Plan::BARRIERS * (int64_t)sizeof(uint64_t);
    const int64_t box_rows = LISTED ? s->H / s->KV : Plan::ROWS;
    const Parts p = attention_parts_of(Plan::KEYS, mask, s);
    const Takers queues = takers_or_none(takers);
    const PartLists lists = make_parts(&p, Plan::KEYS, mask, s, &queues, partial);
    const CUtensorMap q_map = query_map(q, D, s->q_row, s, box_rows), dout_map = query_map(dout, DV, s->H * DV, s, box_rows);
    const CUtensorMap k_map = key_map(k, D, s->k_row, s, Plan::KEYS), v_map = key_map(v, DV, s->v_row, s, Plan::KEYS);
    allow_shared(hopper_dkv_kernel<D, DV, LISTED>, bytes, FAST_NAME, FAST_FIX);
    hopper_dkv_kernel<D, DV, LISTED><<<grid(p.items, 1), Plan::THREADS, (size_t)bytes>>>(dk, dv, stats, q_map, dout_map, k_map, v_map, *mask, *s, queues,
                                                                                        key_angles, partial + parts_header(&p), lists);
    LAUNCHED();
    if (!lists.order) return;
    fast_add_parts_kernel<<<dim3(grid(p.tiles, 1), 4), THREADS>>>(dk, dv, key_angles, partial + parts_header(&p), lists.slot, Plan::KEYS, *mask, *s, queues);
    LAUNCHED();
}

template <int D, int DV>
static void hopper_backward_of_shape(float *dq, int accumulate_dq, bf16 *dk, bf16 *dv, const bf16 *dout, const float *gate, const bf16 *out, const float *lse, const RowStats *stats,
                                     const bf16 *q, const bf16 *k, const bf16 *v, const Mask *mask, const AttentionShape *s, float *delta, const Takers *takers, float *partial,
                                     const OtherBranch<bf16> *other, const TurnedBack<bf16> *turned) {
    constexpr int WIDE = D == 64 ? HOPPER_KEYS : 64, NARROW = D == 64 ? NARROW_KEYS : 64;       // keys of a tile of dq: at D=128 there is memory for four stages of 64
    if (dq && mask->kind == MASK_SELECTED && shares_blocks(mask)) hopper_selected_dq_of_shape<D, DV>(dq, accumulate_dq, turned, stats, dout, q, k, v, mask, s);
    else if (dq && mask->kind == MASK_SELECTED) dq_of_shape<D, DV, 1>(dq, accumulate_dq, delta, dout, gate, out, lse, q, k, v, mask, s);
    else if (dq && narrow_tiles(HopperDq<D, DV, NARROW>::ROWS, mask, s)) hopper_dq_of_shape<D, DV, NARROW>(dq, accumulate_dq, turned, stats, dout, q, k, v, mask, s, other);
    else if (dq) hopper_dq_of_shape<D, DV, WIDE>(dq, accumulate_dq, turned, stats, dout, q, k, v, mask, s, other);
    if (s->Tk == 0) return;
    const float *key_angles = turned_or_none(turned).key_angles;
    if (mask->kind == MASK_SELECTED) hopper_dkv_of_shape<D, DV, 1>(dk, dv, stats, dout, q, k, v, mask, s, takers, key_angles, partial);
    else hopper_dkv_of_shape<D, DV, 0>(dk, dv, stats, dout, q, k, v, mask, s, takers, key_angles, partial);
}

// As fast_attention_backward; stats (B,T,H), as branches_backward_kernel makes them.
static void hopper_attention_backward(float *dq, int accumulate_dq, bf16 *dk, bf16 *dv, const bf16 *dout, const float *gate, const bf16 *out, const float *lse, const RowStats *stats,
                                      const bf16 *q, const bf16 *k, const bf16 *v, const Mask *mask, const AttentionShape *s, float *delta, const Takers *takers, float *partial,
                                      const OtherBranch<bf16> *other = NULL, const TurnedBack<bf16> *turned = NULL) {
    if (mask->kind == MASK_SELECTED && s->Tk > 0) fast_takers(takers, mask->block_idx, mask->n, s, (int *)partial);
    if (s->D == 64) hopper_backward_of_shape<64, 64>(dq, accumulate_dq, dk, dv, dout, gate, out, lse, stats, q, k, v, mask, s, delta, takers, partial, other, turned);
    else hopper_backward_of_shape<128, 128>(dq, accumulate_dq, dk, dv, dout, gate, out, lse, stats, q, k, v, mask, s, delta, takers, partial, other, turned);
}

// ----------------------------------------------------------------------------
// Selection: weights (rows, Tk) of row (b,t,kv) = Σ over its heads of exp(q·K~/sqrt(D) - lse), as select_weights_kernel. Scores come out
// turned, (keys, rows), so that heads lie beside each other: 8 of them are the columns of one matrix instruction, whose sum is one addition
// and two shuffles. A warp holds 32 rows as right factors in registers: 4 / NB tokens with NB·8 heads each (fewer heads: padded), and
// groups of more than 32 heads in passes. Keys pass by in tiles that the block's warps share.

template <int NB>
DEVICE static inline int64_t select_tokens(void) { return FAST_WARPS * (4 / NB); }

template <int D, int NB>
__global__ void __launch_bounds__(FAST_WARPS * WARP, D == 64 ? 3 : 2)
fast_select_kernel(float *weights, const bf16 *q, const bf16 *k, const float *lse, int64_t row0, int64_t rows, int64_t first_tile, AttentionShape s, SelectShape sel) {
    constexpr int KEYS = RANGE_KEYS, TOKENS = 4 / NB;
    extern __shared__ uint4 fast_shared[];
    const int G = s.H / s.KV, tid = threadIdx.x, pair = lane() % 4 * 2;
    const int64_t per_text = (s.T + select_tokens<NB>() - 1) / select_tokens<NB>(), tile = first_tile + blockIdx.x / s.KV, kv = blockIdx.x % s.KV, b = tile / per_text;
    const int64_t t0 = tile % per_text * select_tokens<NB>(), last = min64(t0 + select_tokens<NB>(), s.T) - 1, mine = t0 + tid / WARP * TOKENS;
    if (!choice_end(s.t0 + last, &sel)) return;
    const int seen = (int)min64(compressed_seen(s.t0 + last, sel.cmp_block, sel.cmp_stride), s.Tk);
    const bf16 *keys = k + b * s.Tk * s.k_row + kv * D;
    bf16 *memory = (bf16 *)fast_shared;
    const float scale2 = LOG2E / sqrtf((float)D);
    // Lanes of a quad have the same sums: each writes those of one token.
    const int64_t t = mine + lane() % 4, row = (b * s.T + t) * s.KV + kv;
    const int writes = lane() % 4 < TOKENS && t < s.T && row >= row0 && row < row0 + rows ? (int)min64(compressed_seen(s.t0 + t, sel.cmp_block, sel.cmp_stride), s.Tk) : 0;
    float *to = weights + (writes ? row - row0 : 0) * s.Tk;

    for (int head0 = 0; head0 < G; head0 += NB * 8) {
        unsigned qs[4][D / 16][2];
        float lse2[4][2];
        #pragma unroll
        for (int n = 0; n < 4; n++) {
            const int64_t bt = b * s.T + min64(mine + n / NB, s.T - 1);
            const int head = head0 + n % NB * 8;
            const bf16 *query = q + bt * s.q_row + (kv * G + min32(head + lane() / 4, G - 1)) * D + pair;
            #pragma unroll
            for (int step = 0; step < D / 16; step++) {
                qs[n][step][0] = *(const unsigned *)(query + step * 16);
                qs[n][step][1] = *(const unsigned *)(query + step * 16 + 8);
            }
            for (int e = 0; e < 2; e++) lse2[n][e] = head + pair + e < G ? lse[bt * s.H + kv * G + head + pair + e] * LOG2E : INFINITY;
        }
        fetch_tile<D>(memory, KEYS, keys, s.k_row, seen, tid, FAST_WARPS * WARP);
        cp_async_commit();
        for (int k0 = 0, stage = 0; k0 < seen; k0 += KEYS, stage ^= 1) {
            bf16 *key_tile = memory + stage * KEYS * D;
            if (k0 + KEYS < seen) fetch_tile<D>(memory + (stage ^ 1) * KEYS * D, KEYS, keys + (k0 + KEYS) * s.k_row, s.k_row, seen - k0 - KEYS, tid, FAST_WARPS * WARP);
            cp_async_commit();
            cp_async_wait<1>();
            __syncthreads();
            #pragma unroll 1
            for (int j = 0; j < KEYS; j += MMA_ROWS) {
                float p[4][4] = {{0}}, sum[TOKENS][2] = {{0}};
                #pragma unroll
                for (int step = 0; step < D / 16; step++) {
                    unsigned a[4];
                    ldmatrix_x4(a, chunk_of<D>(key_tile, j + lane() % 16, step * 2 + lane() / 16));
                    #pragma unroll
                    for (int n = 0; n < 4; n++) mma_16816(p[n], a, qs[n][step]);
                }
                #pragma unroll
                for (int n = 0; n < 4; n++)
                    #pragma unroll
                    for (int e = 0; e < 4; e++) sum[n / NB][e / 2] += power_of_2(p[n][e] * scale2 - lse2[n][e % 2]);
                #pragma unroll
                for (int i = 0; i < 2; i++) {
                    float mine_of_quad = 0;
                    #pragma unroll
                    for (int token = 0; token < TOKENS; token++) {
                        const float all = quad_sum(sum[token][i]);
                        if (lane() % 4 == token) mine_of_quad = all;
                    }
                    const int key = k0 + j + lane() / 4 + i * 8;
                    if (key < writes) to[key] = head0 ? to[key] + mine_of_quad : mine_of_quad;
                }
            }
            __syncthreads();
        }
    }
}

// The tiles of `tokens` tokens, in each text anew, that hold the rows row0 .. row0+rows-1.
typedef struct TokenTiles { int64_t first, count; } TokenTiles;
static TokenTiles tiles_of_rows(int64_t tokens, int64_t row0, int64_t rows, const AttentionShape *s) {
    const int64_t per_text = (s->T + tokens - 1) / tokens, from = row0 / s->KV, to = (row0 + rows - 1) / s->KV;
    const int64_t first = from / s->T * per_text + from % s->T / tokens;
    const TokenTiles tiles = {first, to / s->T * per_text + to % s->T / tokens - first + 1};
    return tiles;
}

template <int D, int NB>
static void select_of_shape(float *weights, const bf16 *q, const bf16 *k, const float *lse, int64_t row0, int64_t rows, const AttentionShape *s, const SelectShape *sel) {
    const TokenTiles tiles = tiles_of_rows(select_tokens<NB>(), row0, rows, s);
    const int64_t bytes = 2 * RANGE_KEYS * D * (int64_t)sizeof(bf16);
    allow_shared(fast_select_kernel<D, NB>, bytes, FAST_NAME, FAST_FIX);
    fast_select_kernel<D, NB><<<grid(tiles.count * s->KV, 1), FAST_WARPS * WARP, (size_t)bytes>>>(weights, q, k, lse, row0, rows, tiles.first, *s, *sel);
    LAUNCHED();
}

template <int D>
static void select_of_width(float *weights, const bf16 *q, const bf16 *k, const float *lse, int64_t row0, int64_t rows, const AttentionShape *s, const SelectShape *sel) {
    const int G = s->H / s->KV;
    if (G <= 8) select_of_shape<D, 1>(weights, q, k, lse, row0, rows, s, sel);
    else if (G <= 16) select_of_shape<D, 2>(weights, q, k, lse, row0, rows, s, sel);
    else select_of_shape<D, 4>(weights, q, k, lse, row0, rows, s, sel);
}

// weights[(row - row0)·Tk + i] for the rows row0 .. row0+rows-1 of (b,t,kv) that have a choice, and the keys i that they see.
static void fast_select_weights(float *weights, const bf16 *q, const bf16 *k, const float *lse, int64_t row0, int64_t rows, const AttentionShape *s, const SelectShape *sel) {
    if (rows <= 0 || s->Tk <= 0) return;
    if (s->D == 64) select_of_width<64>(weights, q, k, lse, row0, rows, s, sel);
    else if (s->D == 128) select_of_width<128>(weights, q, k, lse, row0, rows, s, sel);
    else select_of_width<192>(weights, q, k, lse, row0, rows, s, sel);
}

// ----------------------------------------------------------------------------
// The compressed branch on Hopper with the choice of blocks: hopper_forward_kernel WITH_IMPORTANCES, then the choice. Texts, or where one is too long stretches of
// its queries, are done one after the other, so that importances of some thousands of queries are all that lies in memory.

enum { IMPORTANCE_NUMBERS = 5 << 26 };      // f32, 1.25 GiB

// 1 if the branch's kernel can leave importances: of blocks as the paper has them, four compressed ones long and each of these two strides, the last of which is
// local and not to be chosen, so that the tiles that a query sees are all that matter.
static int hopper_choice(const AttentionShape *s, const SelectShape *sel, const Mask *mask) {
    return hopper_attention(s, mask) && sel->sel_block == BLOCK_KEYS * sel->cmp_stride && sel->cmp_block == 2 * sel->cmp_stride && sel->n_local > 0 && free_places(sel) > 0;
}
// Numbers that are left, of one tile of rows of each block of threads and of that which it computes.
template <int D>
static int64_t left_numbers_of_size(const AttentionShape *s, int64_t blocks) {
    constexpr int ROWS = HopperForward<D, D, HOPPER_KEYS>::ROWS;
    return row_blocks<ROWS>(s) * 2 * weight_bytes<ROWS>(blocks) / (int64_t)sizeof(float);
}
static int64_t left_numbers(const AttentionShape *s, const SelectShape *sel) {
    const int64_t blocks = round_up(importance_row(s, sel), SUM_BLOCKS);
    return s->D == 64 ? left_numbers_of_size<64>(s, blocks) : left_numbers_of_size<128>(s, blocks);
}
static int64_t choice_tile(const AttentionShape *s) {
    return slab_tokens(s, s->D == 64 ? (int)HopperForward<64, 64, HOPPER_KEYS>::ROWS : (int)HopperForward<128, 128, HOPPER_KEYS>::ROWS);
}
// Texts, and queries of one, that are done at once: whole texts or whole waves of tiles.
static int64_t choice_queries(int64_t *texts, const AttentionShape *s, const SelectShape *sel) {
    const int64_t most = max64(1, IMPORTANCE_NUMBERS / (s->KV * importance_row(s, sel))), tile = choice_tile(s), wave = max64(1, gpu.multiProcessorCount / s->KV) * tile;
    *texts = max64(1, min64(s->B, most / s->T));
    return most >= s->T ? s->T : most > wave ? most / wave * wave : max64(tile, most / tile * tile);
}
// As select_scratch.
static int64_t hopper_choice_scratch(const AttentionShape *s, const SelectShape *sel) {
    const int64_t of_query = s->KV * importance_row(s, sel);
    return left_numbers(s, sel) + min64(s->B * s->T * of_query, max64(IMPORTANCE_NUMBERS, choice_tile(s) * of_query));
}

// The branch, and the importances (B,T,KV,importance_row).
static void hopper_importance_forward(bf16 *out, float *lse, float *importance, const bf16 *q, const bf16 *k, const bf16 *v, const Mask *mask, const AttentionShape *s,
                                      const SelectShape *sel, float *scratch) {
    const int row = (int)importance_row(s, sel);
    const BlockWeights left = {importance, (unsigned char *)scratch, row, (int)round_up(row, SUM_BLOCKS), *sel};
    if (s->D == 64) hopper_forward_of_shape<64, 64, HOPPER_KEYS, WITH_IMPORTANCES>(out, lse, left, NULL, q, k, v, mask, s);
    else hopper_forward_of_shape<128, 128, HOPPER_KEYS, WITH_IMPORTANCES>(out, lse, left, NULL, q, k, v, mask, s);
}

// gpu_compressed_forward, where hopper_choice lets it.
static void hopper_compressed_forward(bf16 *out, float *lse, int *block_idx, const bf16 *q, const bf16 *k, const bf16 *v, const Mask *mask, const AttentionShape *s,
                                      const SelectShape *sel, float *scratch) {
    int64_t texts;
    const int64_t queries = choice_queries(&texts, s, sel);
    float *importance = scratch + left_numbers(s, sel);
    for (int64_t b = 0; b < s->B; b += texts)
        for (int64_t t = 0; t < s->T; t += queries) {
            AttentionShape part = *s;
            part.B = min64(texts, s->B - b);
            part.T = min64(queries, s->T - t);
            part.t0 += t;
            const int64_t token = b * s->T + t;
            hopper_importance_forward(out + token * s->H * s->Dv, lse + token * s->H, importance, q + token * s->q_row, k + b * s->Tk * s->k_row, v + b * s->Tk * s->v_row, mask, &part,
                                      sel, scratch);
            gpu_choose_blocks(block_idx + token * s->KV * sel->n, importance, 0, part.B * part.T * s->KV, &part, sel);
        }
}

// ----------------------------------------------------------------------------
// Attention and selection by the tier that takes the shape

static int is_bf16(const Config *c) { return c->torch_dtype == DTYPE_BF16; }

// Whether a model's attention runs on tensor cores, and whether with Hopper's kernels, which take stats. (Its selected branch alone may not.)
enum { TIER_SIMPLE, TIER_FAST, TIER_HOPPER };
static int tier_of_model(const Config *c) {
    const Pieces whole = pieces_of(1, 1);
    AttentionShape s = attention_shape(c, 1, &whole, 0, 8, 8);
    Mask mask;
    memset(&mask, 0, sizeof mask);
    return !is_bf16(c) || !fast_attention(&s, &mask) ? TIER_SIMPLE : hopper_attention(&s, &mask) ? TIER_HOPPER : TIER_FAST;
}

// Whether Hopper's kernels make dq, dk and dv, which can turn them back.
template <typename F>
static int turns_back(const AttentionShape *s, const Mask *mask) {
    return std::is_same<F, bf16>::value && fast_attention(s, mask) && hopper_attention(s, mask) && (mask->kind != MASK_SELECTED || shares_blocks(mask));
}
// Whether its kernels are those that take queries in groups, of which mask->order tells.
template <typename F>
static int groups_queries(const AttentionShape *s, const Mask *mask) { return mask->kind == MASK_SELECTED && turns_back<F>(s, mask); }

// Numbers of scratch that backward takes in bf16.
static int64_t gpu_attention_partial(const AttentionShape *s, const Mask *mask) { return hopper_attention(s, mask) ? hopper_attention_partial(s, mask) : fast_attention_partial(s, mask); }

template <typename F, int N>
__global__ void branches_sum_kernel(BranchSum<F> total, const F *last, int64_t nh, int dv) {
    const int64_t item = global_thread() * N;
    if (item >= nh * dv) return;
    const float *g = total.gates + item / dv * BRANCHES;
    float sum[N] = {0};
    for (int b = 0; b < BRANCHES; b++) {
        const Pack<F, N> x = load<N>((b == WIN ? last : total.before[b]) + item);
        for (int v = 0; v < N; v++) sum[v] += g[b] * (float)x.of[v];
    }
    Pack<F, N> y;
    for (int v = 0; v < N; v++) y.of[v] = (F)sum[v];
    store<N>(total.out + item, y);
}

// The sum by itself, where the kernel of the window does not make it. last, the window's result, is (nh,dv), as the others and `out`; nh = B·T·H.
template <typename F>
static void gpu_branches_sum(const BranchSum<F> *total, const F *last, int64_t nh, int dv) {
    constexpr int N = pack_size<F>;
    if (packs<F>(dv)) branches_sum_kernel<F, N><<<grid(nh * dv / N, THREADS), THREADS>>>(*total, last, nh, dv);
    else branches_sum_kernel<F, 1><<<grid(nh * dv, THREADS), THREADS>>>(*total, last, nh, dv);
    LAUNCHED();
}

// With `total`, of the window, which is the last branch, the sum of the branches too.
template <typename F>
static void gpu_attention_forward(F *out, float *lse, const F *q, const F *k, const F *v, const Mask *mask, const AttentionShape *s, const BranchSum<F> *total = NULL) {
    int fast = 0;
    if constexpr (std::is_same<F, bf16>::value) {
        fast = fast_attention(s, mask);
        if (fast && hopper_attention(s, mask)) return hopper_attention_forward(out, lse, q, k, v, mask, s, total);
        if (fast) fast_attention_forward(out, lse, q, k, v, mask, s);
    }
    if (!fast) simple_attention_forward(out, lse, q, k, v, mask, s);
    if (total) gpu_branches_sum(total, out, s->B * s->T * s->H, s->Dv);
}

// With `other`, which only Hopper's kernels take and a range of keys, dq is of both branches; without dq only dk and dv are made. With `turned`, where turns_back,
// this branch's part goes there, and with accumulate_dq what is at dq; and dk may be turned, too.
template <typename F>
static void gpu_attention_backward(float *dq, int accumulate_dq, F *dk, F *dv, const F *dout, const float *gate, const F *out, const float *lse, const RowStats *stats,
                                   const F *q, const F *k, const F *v, const Mask *mask, const AttentionShape *s, float *delta, const Takers *takers, float *partial,
                                   const OtherBranch<F> *other = NULL, const TurnedBack<F> *turned = NULL) {
    if constexpr (std::is_same<F, bf16>::value)
        if (fast_attention(s, mask))
            return hopper_attention(s, mask) ? hopper_attention_backward(dq, accumulate_dq, dk, dv, dout, gate, out, lse, stats, q, k, v, mask, s, delta, takers, partial, other, turned)
                                             : fast_attention_backward(dq, accumulate_dq, dk, dv, dout, gate, out, lse, q, k, v, mask, s, delta, takers, partial);
    simple_attention_backward(dq, accumulate_dq, dk, dv, dout, gate, out, lse, q, k, v, mask, s, delta, takers);
}

// The choice of blocks; k (B,Tk,KV,D) are the compressed keys, lse that of the compressed branch.
template <typename F>
static void gpu_select_forward(int *block_idx, const F *q, const F *k, const float *lse, const AttentionShape *s, const SelectShape *sel, const Mask *mask, float *scratch) {
    const int none = nothing_to_choose(s, sel), fast = std::is_same<F, bf16>::value && fast_attention(s, mask);
    const int64_t rows = s->B * s->T * s->KV, chunk = select_chunk(s, sel);
    float *importance = scratch, *weights = importance + chunk * importance_row(s, sel);
    for (int64_t row = 0; row < rows; row += chunk) {
        const int64_t n = min64(chunk, rows - row);
        if (!none) {
            if constexpr (std::is_same<F, bf16>::value)
                if (fast) fast_select_weights(weights, q, k, lse, row, n, s, sel);
            if (!fast) simple_select_weights(weights, q, k, lse, row, n, s, sel);
            gpu_importance(importance, weights, row, n, s, sel);
        }
        gpu_choose_blocks(block_idx, importance, row, n, s, sel);
    }
}

// The compressed branch, and the choice of blocks that follows from it.
template <typename F>
static void gpu_compressed_forward(F *out, float *lse, int *block_idx, const F *q, const F *k, const F *v, const Mask *mask, const AttentionShape *s, const SelectShape *sel, float *scratch) {
    if constexpr (std::is_same<F, bf16>::value)
        if (fast_attention(s, mask) && hopper_choice(s, sel, mask) && !nothing_to_choose(s, sel)) return hopper_compressed_forward(out, lse, block_idx, q, k, v, mask, s, sel, scratch);
    gpu_attention_forward<F>(out, lse, q, k, v, mask, s);
    gpu_select_forward<F>(block_idx, q, k, lse, s, sel, mask, scratch);
}
// Numbers of scratch that it takes.
template <typename F>
static int64_t gpu_select_scratch(const AttentionShape *s, const SelectShape *sel, const Mask *mask) {
    const int leaves_weights = std::is_same<F, bf16>::value && fast_attention(s, mask) && hopper_choice(s, sel, mask);
    return max64(select_scratch(s, sel), leaves_weights ? hopper_choice_scratch(s, sel) : 0);
}

// ----------------------------------------------------------------------------
// Gates and the sum of the branches

template <typename F>
__global__ void gates_forward_kernel(float *gates, const F *logits, int64_t logits_row, const F *q, int64_t q_row, const float *weight,
                                     const float *bias, int64_t n, int h, int d, int kind) {
    const int64_t item = global_thread(), j = item % (BRANCHES * h), i = item / (BRANCHES * h);
    if (i >= n) return;
    float x = bias[j];
    if (kind == GATE_INPUT) x += (float)logits[i * logits_row + j];
    if (kind == GATE_Q_COND)
        for (int c = 0; c < d; c++) x += weight[j * d + c] * (float)q[i * q_row + j / BRANCHES * d + c];
    gates[item] = sigmoid(x);
}

template <typename F> struct Branches { const F *of[BRANCHES]; const float *lse[BRANCHES]; };      // (N,H,Dv) and (N,H)

// What backward needs of the outputs of COUNT branches, 1 or all. One pass makes all of it, as reading them is what takes the time: `sum` as
// branches_sum_kernel made it; dlogits (N,H,3) = <dout, branch>·g·(1-g), and the same in the wide row, dwide; stats (COUNT,N,H). What is not wanted is NULL,
// and gates are where there are none. Neighbours in x, a power of two of them, take a (token, head), N channels at a time.
template <typename F, int N, int COUNT>
__global__ void branches_backward_kernel(F *sum, float *dlogits, F *dwide, int64_t wide_row, RowStats *stats, const F *dout, Branches<F> branch, const float *gates,
                                         int64_t nh, int h, int dv) {
    const int64_t item = (int64_t)blockIdx.x * blockDim.y + threadIdx.y, i = min64(item, nh - 1);       // no thread leaves: all of them shuffle
    float g[COUNT], lse[COUNT], y[COUNT] = {0};
    #pragma unroll
    for (int b = 0; b < COUNT; b++) {       // asked for before the sums that they wait for
        g[b] = gates ? gates[i * BRANCHES + b] : 1;
        lse[b] = branch.lse[b][i];
    }
    for (int c = threadIdx.x * N; c < dv; c += blockDim.x * N) {
        const Pack<F, N> d = load<N>(dout + i * dv + c);
        Pack<F, N> x[COUNT], out;
        #pragma unroll
        for (int b = 0; b < COUNT; b++) x[b] = load<N>(branch.of[b] + i * dv + c);
        for (int v = 0; v < N; v++) {
            float o = 0;
            for (int b = 0; b < COUNT; b++) {
                y[b] += (float)d.of[v] * (float)x[b].of[v];
                o += g[b] * (float)x[b].of[v];
            }
            out.of[v] = (F)o;
        }
        if (sum && item < nh) store<N>(sum + i * dv + c, out);
    }
    for (int away = blockDim.x / 2; away > 0; away /= 2)
        #pragma unroll
        for (int b = 0; b < COUNT; b++) y[b] += __shfl_xor_sync(~0u, y[b], away);
    if (threadIdx.x > 0 || item >= nh) return;
    F *to_wide = dwide ? dwide + i / h * wide_row + i % h * BRANCHES : NULL;
    #pragma unroll
    for (int b = 0; b < COUNT; b++) {
        const float dx = y[b] * g[b] * (1 - g[b]);
        if (dlogits) dlogits[i * BRANCHES + b] = dx;
        if (to_wide) to_wide[b] = (F)dx;
        if (stats) stats[b * nh + i] = row_stats(lse[b], g[b], y[b]);
    }
}

template <typename F, int COUNT>
static void gpu_branches_backward(F *sum, float *dlogits, F *dwide, int64_t wide_row, RowStats *stats, const F *dout, Branches<F> branch, const float *gates, int64_t n, int h, int dv) {
    const auto kernel = packs<F>(dv) ? branches_backward_kernel<F, pack_size<F>, COUNT> : branches_backward_kernel<F, 1, COUNT>;
    int lanes = 1;
    while (lanes < WARP && lanes * (packs<F>(dv) ? pack_size<F> : 1) < dv) lanes *= 2;
    kernel<<<grid(n * h, THREADS / lanes), dim3(lanes, THREADS / lanes)>>>(sum, dlogits, dwide, wide_row, stats, dout, branch, gates, n * h, h, dv);
    LAUNCHED();
}

// The stats alone, of one branch; gate as for attention's backward.
template <typename F>
static void gpu_row_stats(RowStats *stats, const F *dout, const float *gate, const F *out, const float *lse, int64_t rows, int dv) {
    const Branches<F> branch = {{out}, {lse}};
    gpu_branches_backward<F, 1>(NULL, NULL, NULL, 0, stats, dout, branch, gate, rows, 1, dv);
}

template <typename F>
__global__ void gates_dq_kernel(F *dq, int64_t q_row, const float *dlogits, const float *weight, int64_t n, int h, int d) {
    const int64_t item = global_thread(), c = item % d, head = item / d % h, i = item / d / h;
    if (i >= n) return;
    float sum = 0;
    for (int b = 0; b < BRANCHES; b++) sum += dlogits[(i * h + head) * BRANCHES + b] * weight[(head * BRANCHES + b) * d + c];
    dq[i * q_row + head * d + c] = (F)((float)dq[i * q_row + head * d + c] + sum);
}

template <typename F>
struct GateWeightGradient {
    const float *dlogits;
    const F *q;
    int64_t q_row, h, d;
    __device__ float operator()(int64_t row, int64_t col) const {
        const int64_t j = col / d;
        return dlogits[row * BRANCHES * h + j] * (float)q[row * q_row + j / BRANCHES * d + col % d];
    }
};

// ----------------------------------------------------------------------------
// SwiGLU

// In bf16 the rounding of the result hides that of the fast power and division.
template <typename F>
__device__ static inline float sigmoid_of(float x) {
    if constexpr (sizeof(F) == sizeof(bf16)) return fast_divide(1, 1 + power_of_2(-x * LOG2E));
    else return sigmoid(x);
}

// gate_up (n,2f) = a | u: h (n,f) = silu(a)·u. With `rows` (on the GPU) only so many of the n rows. A block has a row, or some where these are short.
template <typename F, int N>
__global__ void swiglu_forward_kernel(F *h, const F *gate_up, int64_t n, int f, const int64_t *rows) {
    const int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= (rows ? *rows : n)) return;
    for (int j = (int)threadIdx.x * N; j < f; j += (int)blockDim.x * N) {
        const Pack<F, N> a = load<N>(gate_up + row * 2 * f + j), u = load<N>(gate_up + row * 2 * f + f + j);
        Pack<F, N> y;
        for (int v = 0; v < N; v++) y.of[v] = (F)((float)a.of[v] * sigmoid_of<F>((float)a.of[v]) * (float)u.of[v]);
        store<N>(h + row * f + j, y);
    }
}

// gate_up becomes its gradient in place; h (n,f), where it was not kept, is made again (AGAIN) for the gradient of the matrix behind it. dh may be h.
template <typename F, int N, int AGAIN>
__global__ void swiglu_backward_kernel(F *gate_up, F *h, const F *dh, int64_t n, int f) {
    const int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= n) return;
    for (int j = (int)threadIdx.x * N; j < f; j += (int)blockDim.x * N) {
        F *at = gate_up + row * 2 * f + j;
        const Pack<F, N> a = load<N>(at), u = load<N>(at + f), g = load<N>(dh + row * f + j);
        Pack<F, N> da, du, y;
        for (int v = 0; v < N; v++) {
            const float x = (float)a.of[v], up = (float)u.of[v], s = sigmoid_of<F>(x), d = (float)g.of[v];
            y.of[v] = (F)(x * s * up);
            da.of[v] = (F)(d * up * s * (1 + x * (1 - s)));
            du.of[v] = (F)(d * x * s);
        }
        store<N>(at, da);
        store<N>(at + f, du);
        if (AGAIN) store<N>(h + row * f + j, y);
    }
}

// Threads of a block along a row of f numbers, N each at a time, and rows of a block.
static dim3 row_threads(int64_t f, int N) {
    const unsigned along = (unsigned)min64(THREADS, round_up((f + N - 1) / N, WARP));
    return dim3(along, THREADS / along);
}

template <typename F>
static void gpu_swiglu_forward(F *h, const F *gate_up, int64_t n, int64_t f, const int64_t *rows = NULL) {
    const int N = packs<F>(f) ? pack_size<F> : 1;
    const auto kernel = N > 1 ? swiglu_forward_kernel<F, pack_size<F>> : swiglu_forward_kernel<F, 1>;
    const dim3 threads = row_threads(f, N);
    kernel<<<grid(n, threads.y), threads>>>(h, gate_up, n, (int)f, rows);
    LAUNCHED();
}

template <typename F>
static void gpu_swiglu_backward(F *gate_up, F *h, const F *dh, int64_t n, int64_t f) {      // h NULL: it was kept
    const int N = packs<F>(f) ? pack_size<F> : 1;
    const auto kernel = N > 1 ? (h ? swiglu_backward_kernel<F, pack_size<F>, 1> : swiglu_backward_kernel<F, pack_size<F>, 0>)
                              : (h ? swiglu_backward_kernel<F, 1, 1> : swiglu_backward_kernel<F, 1, 0>);
    const dim3 threads = row_threads(f, N);
    kernel<<<grid(n, threads.y), threads>>>(gate_up, h, dh, n, (int)f);
    LAUNCHED();
}

// ----------------------------------------------------------------------------
// Mixture of experts

__global__ void moe_route_kernel(Routing r, MoeShape s, const int *given) {
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
        c[j] = given ? given[i * s.k + j] : best;
        chosen += p[c[j]];
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

// given: the experts (N,k) to take instead of the most probable ones, or NULL. count (E), kept and rows (N·k): working memory
// that a capacity needs
static void gpu_moe_route(const Routing *r, const MoeShape *s, const int *given, int64_t *count, int *kept, int *rows) {
    moe_route_kernel<<<grid(s->N, THREADS), THREADS>>>(*r, *s, given);
    LAUNCHED();
    moe_lists(r->row_token, r->start, r->load, r->choice, s);
    if (s->capacity <= 0) return;
    device_copy(rows, r->row_token, s->N * s->k * (int64_t)sizeof(int));
    const int64_t limit = (int64_t)ceil(s->capacity * (double)s->N * s->k / s->E);
    moe_drop_kernel<<<grid(s->N * s->k, THREADS), THREADS>>>(kept, *r, rows, r->start, *s, limit);
    LAUNCHED();
    moe_lists(r->row_token, r->start, count, kept, s);
}

// The loads of all parts of the micro-batch.
static void gpu_sum_loads(int64_t *load, const MoeShape *s) {
    const int64_t bytes = s->E * (int64_t)sizeof(int64_t);
    int64_t *sums = (int64_t *)xmalloc((size_t)bytes);
    to_host(sums, load, bytes);
    comm_sum_parts(sums, s->E);
    to_device(load, sums, bytes);
    free(sums);
}

// From the gradient of the shares' weights to that of the router's logits, dlogits (N,E): through the renormalisation, the two
// terms' own gradients, and the softmax. dprobs (N,E): working memory.
template <typename F>
__global__ void router_backward_kernel(F *dlogits, float *dprobs, const float *dweight, Routing r, MoeShape s, double z_coef, double balance_coef, double scale) {
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
        d[e] += (float)(scale * balance_coef * s.E / (double)s.N * (double)r.load[e] / (double)(s.N * s.k * s.parts));
        total += p[e] * d[e];
    }
    const float dz = (float)(scale * z_coef * 2 / (double)s.N) * r.lse[i];
    for (int e = 0; e < s.E; e++) dlogits[i * s.E + e] = (F)(p[e] * (d[e] - total + dz));
}

// row_of (N·k): each share's row (before: -1, and so it stays where a share was dropped); token (N·k): each row's token.
__global__ void share_rows_kernel(int *row_of, int *token, const int *list, const int64_t *rows, int k) {
    const int64_t i = global_thread();
    if (i >= *rows) return;
    row_of[list[i]] = (int)i;
    token[i] = list[i] / k;
}

// A warp a row. dh (R,F) is of the expert's output without its weight w: dweight[share] = <dh, h>. Then the gradient through SwiGLU of
// w·dh, in place of gate_up; and dh becomes w·h, which makes dW_down from the unweighted gradient of the output.
template <typename F, int V>
__global__ void grouped_swiglu_backward_kernel(float *dweight, F *dh, F *gate_up, const float *weight, const int *list, const int64_t *rows, int64_t f) {
    const int64_t i = global_warp();
    if (i >= *rows) return;
    const float w = weight[list[i]];
    float sum = 0;
    for (int64_t j = lane() * V; j < f; j += WARP * V) {
        const Pack<F, V> a = load<V>(gate_up + i * 2 * f + j), u = load<V>(gate_up + i * 2 * f + f + j);
        Pack<F, V> g = load<V>(dh + i * f + j), da, du;
        for (int v = 0; v < V; v++) {
            const float x = (float)a.of[v], y = (float)u.of[v], s = sigmoid_of<F>(x), h = x * s * y, dy = w * (float)g.of[v];
            sum += (float)g.of[v] * h;
            g.of[v] = (F)(w * h);
            da.of[v] = (F)(dy * y * s * (1 + x * (1 - s)));
            du.of[v] = (F)(dy * x * s);
        }
        store<V>(dh + i * f + j, g);
        store<V>(gate_up + i * 2 * f + j, da);
        store<V>(gate_up + i * 2 * f + f + j, du);
    }
    sum = warp_sum(sum);
    if (lane() == 0) dweight[list[i]] = sum;
}

// out (N,C) += Σ_slots weight·y[row of the share], in the order of the slots; without weights, Σ_slots y.
template <typename F, int V>
__global__ void combine_shares_kernel(F *out, const F *y, const float *weight, const int *row_of, int64_t n, int64_t c, int k) {
    const int64_t item = global_thread() * V, i = item / c, j = item % c;
    if (i >= n) return;
    Pack<F, V> all = load<V>(out + item);
    float sum[V];
    for (int v = 0; v < V; v++) sum[v] = (float)all.of[v];
    for (int64_t share = i * k; share < (i + 1) * k; share++) {
        if (row_of[share] < 0) continue;
        const float w = weight ? weight[share] : 1;
        const Pack<F, V> part = load<V>(y + row_of[share] * c + j);
        for (int v = 0; v < V; v++) sum[v] += w * (float)part.of[v];
    }
    for (int v = 0; v < V; v++) all.of[v] = (F)sum[v];
    store<V>(out + item, all);
}

template <typename F>
static void combine_shares(F *out, const F *y, const float *weight, const int *row_of, const MoeShape *s) {
    constexpr int WIDE = pack_size<F>;
    const int64_t N = s->N, C = s->C;
    if (packs<F>(C)) combine_shares_kernel<F, WIDE><<<grid(N * C / WIDE, THREADS), THREADS>>>(out, y, weight, row_of, N, C, s->k);
    else combine_shares_kernel<F, 1><<<grid(N * C, THREADS), THREADS>>>(out, y, weight, row_of, N, C, s->k);
    LAUNCHED();
}

template <typename F>
static void grouped_swiglu_backward(float *dweight, F *dh, F *gate_up, const Routing *r, const MoeShape *s) {
    constexpr int WIDE = pack_size<F>;
    const int64_t f = s->F, *rows = r->start + s->E;
    const unsigned blocks = grid(s->N * s->k, WARPS);
    if (packs<F>(f)) grouped_swiglu_backward_kernel<F, WIDE><<<blocks, THREADS>>>(dweight, dh, gate_up, r->weight, r->row_token, rows, f);
    else grouped_swiglu_backward_kernel<F, 1><<<blocks, THREADS>>>(dweight, dh, gate_up, r->weight, r->row_token, rows, f);
    LAUNCHED();
}

// What forward and backward need besides; R = N·k.
template <typename F>
struct MoeScratch {
    int *row_of, *token;        // (R): see share_rows_kernel
    F *h, *rows;                // (R,F), (R,C)
};

template <typename F>
static void carve_moe_scratch(MoeScratch<F> *m, const MoeShape *s, Carver *memory) {
    const int64_t R = s->N * s->k;
    carve(memory, &m->row_of, R);
    carve(memory, &m->token, R);
    carve(memory, &m->h, R * s->F);
    carve(memory, &m->rows, R * s->C);
}

static void find_share_rows(int *row_of, int *token, const Routing *r, const MoeShape *s) {
    CUDA(cudaMemsetAsync(row_of, 0xff, (size_t)(s->N * s->k) * sizeof(int)));       // -1
    share_rows_kernel<<<grid(s->N * s->k, THREADS), THREADS>>>(row_of, token, r->row_token, r->start + s->E, s->k);
    LAUNCHED();
}

static Groups expert_groups(const Routing *r, const MoeShape *s) {
    const Groups g = {r->start, s->E, s->N * s->k};
    return g;
}

// gate_up (N·k,2F), rows sorted by expert, which is kept for backward.
template <typename F>
static void gpu_moe_gate_up(F *gate_up, const F *x, const F *experts, const Routing *r, const MoeShape *s, const MoeScratch<F> *m) {
    const Groups g = expert_groups(r, s);
    find_share_rows(m->row_of, m->token, r, s);
    grouped_forward(gate_up, x, (const int *)m->token, experts, 3 * s->F * s->C, s->C, 2 * s->F, &g);
}

// out (N,C) += Σ_e w_e·expert_e(x), x (N,C)
template <typename F>
static void gpu_moe_forward(F *out, F *gate_up, const F *x, const F *experts, const Routing *r, const MoeShape *s, const MoeScratch<F> *m) {
    const int64_t C = s->C, Fe = s->F;
    const Groups g = expert_groups(r, s);
    gpu_moe_gate_up(gate_up, x, experts, r, s, m);
    gpu_swiglu_forward(m->h, gate_up, g.rows, Fe, r->start + s->E);
    grouped_forward(m->rows, (const F *)m->h, (const int *)NULL, experts + 2 * Fe * C, 3 * Fe * C, Fe, C, &g);
    combine_shares(out, (const F *)m->rows, r->weight, m->row_of, s);
}

// dx (N,C) +=, dexperts +=, dweight (N·k) for router_backward_kernel; gate_up becomes its gradient.
template <typename F>
static void gpu_moe_backward(F *dx, float *dexperts, float *dweight, const F *dout, F *gate_up, const F *x, const F *experts,
                             const Routing *r, const MoeShape *s, const MoeScratch<F> *m) {
    const int64_t C = s->C, Fe = s->F, stride = 3 * Fe * C, to_down = 2 * Fe * C;
    const Groups g = expert_groups(r, s);
    const int *token = m->token, *none = NULL;
    find_share_rows(m->row_of, m->token, r, s);
    device_zero(dweight, s->N * s->k * (int64_t)sizeof(float));         // a dropped share has no gradient
    grouped_dinp(m->h, dout, token, experts + to_down, stride, Fe, C, &g);
    grouped_swiglu_backward(dweight, m->h, gate_up, r, s);
    grouped_dweight(dexperts + to_down, stride, dout, token, (const F *)m->h, none, Fe, C, &g);
    grouped_dweight(dexperts, stride, (const F *)gate_up, none, x, token, C, 2 * Fe, &g);
    grouped_dinp(m->rows, (const F *)gate_up, none, experts, stride, C, 2 * Fe, &g);
    combine_shares(dx, (const F *)m->rows, (const float *)NULL, m->row_of, s);
}

// The router's losses and loads, added up on the host from the little that they need: the logsumexps, the probabilities' sums and the loads.
static void gpu_moe_losses(double *z, double *balance, double *load_sum, const Routing *r, const MoeShape *s, double z_coef, double balance_coef,
                           float *sums, float *parts) {
    float *lse = (float *)xmalloc((size_t)(s->N + s->E) * sizeof(float)), *p = lse + s->N;
    double *p_sums = (double *)xmalloc((size_t)s->E * sizeof(double));
    int64_t *load = (int64_t *)xmalloc((size_t)s->E * sizeof(int64_t));
    device_zero(sums, s->E * (int64_t)sizeof(float));
    column_sums(sums, s->N, s->E, Plain<float>{r->probs, s->E}, parts);
    to_host(lse, r->lse, s->N * (int64_t)sizeof(float));
    to_host(p, sums, s->E * (int64_t)sizeof(float));
    to_host(load, r->load, s->E * (int64_t)sizeof(int64_t));
    for (int e = 0; e < s->E; e++) {
        p_sums[e] = (double)p[e];
        load_sum[e] += (double)load[e];
    }
    moe_losses_of_sums(z, balance, lse, p_sums, load, s, z_coef, balance_coef);
    free(p_sums);
    free(lse);
    free(load);
}

// ----------------------------------------------------------------------------
// The head: a block of threads turns one row of logits into its gradient, and leaves the cross entropy.
enum { LOSS_THREADS = 512 };

__device__ static float block_reduce(float x, int want_max) {
    __shared__ float of_warp[LOSS_THREADS / WARP];
    x = want_max ? warp_max(x) : warp_sum(x);
    __syncthreads();        // the last call's results have been read
    if (lane() == 0) of_warp[threadIdx.x / WARP] = x;
    __syncthreads();
    float all = of_warp[0];
    for (int i = 1; i < LOSS_THREADS / WARP; i++) all = want_max ? fmaxf(all, of_warp[i]) : all + of_warp[i];
    return all;
}

// e^(x - top) as loss_power(x · unit - top · unit). A rounding of logits to bf16 hides that of the fast powers; in f32 the CPU's results are wanted.
template <typename F> constexpr float loss_unit = sizeof(F) == sizeof(bf16) ? LOG2E : 1;
template <typename F> __device__ static inline float loss_power(float x) {
    if constexpr (sizeof(F) == sizeof(bf16)) return power_of_2(x);
    else return expf(x);
}

// logits (rows, ld), V of a row used and ld a multiple of 16 bytes: row i becomes `scale` times its gradient, zero past V, or with gradient = 0 stays.
// A row is looked at twice, for the sum and for the gradient, but its first `kept` numbers are read from memory once: they wait in shared memory.
template <typename F>
__global__ void __launch_bounds__(LOSS_THREADS, 2) cross_entropy_kernel(F *logits, int64_t ld, float *loss, const int *targets, int64_t v, float scale, int gradient, int64_t kept) {
    constexpr int N = pack_size<F>, STEP = LOSS_THREADS * N;
    constexpr float UNIT = loss_unit<F>;
    extern __shared__ uint4 loss_row[];
    F *p = logits + blockIdx.x * ld, *copy = (F *)loss_row;
    const int64_t first = threadIdx.x * N, whole = v / N * N, rest = whole + threadIdx.x;      // packs of nothing but logits, and this thread's logit behind them
    for (int64_t j = first; j < kept; j += STEP) cp_async_16(copy + j, p + j, 16);             // a thread reads what it has copied itself
    cp_async_commit();
    const int target = targets[blockIdx.x];
    const float at_target = (float)p[target];
    float mine = rest < v ? (float)p[rest] : -1e38f, sum = rest < v ? 1 : 0;       // of this thread's share; at first below any logit, but a number: -∞ - -∞ is none
    const auto add = [&](const Pack<F, N> &x) {
        float higher = mine, more = 0;
        for (int i = 0; i < N; i++) higher = fmaxf(higher, (float)x.of[i]);
        for (int i = 0; i < N; i++) more += loss_power<F>((float)x.of[i] * UNIT - higher * UNIT);
        sum = sum * loss_power<F>(mine * UNIT - higher * UNIT) + more;
        mine = higher;
    };
    int64_t j = first;
    cp_async_wait<0>();
    for (; j < kept; j += STEP) add(load<N>(copy + j));
    for (; j < whole; j += STEP) add(load<N>(p + j));
    const float top = block_reduce(mine, 1);
    sum = block_reduce(sum * loss_power<F>(mine * UNIT - top * UNIT), 0);
    if (threadIdx.x == 0) loss[blockIdx.x] = logf(sum) - (at_target - top);
    if (!gradient) return;
    const float factor = scale / sum;
    const auto probability = [&](F x) { return loss_power<F>((float)x * UNIT - top * UNIT) * factor; };
    const auto to_gradient = [&](Pack<F, N> x, int64_t at) {
        for (int i = 0; i < N; i++) x.of[i] = (F)probability(x.of[i]);
        store<N>(p + at, x);
    };
    for (j = first; j < kept; j += STEP) to_gradient(load<N>(copy + j), j);
    for (; j < whole; j += STEP) to_gradient(load<N>(p + j), j);
    for (j = rest; j < ld; j += LOSS_THREADS) p[j] = (F)(j < v ? probability(p[j]) : 0);
    __syncthreads();
    if (threadIdx.x == 0) p[target] = (F)(probability((F)at_target) - scale);
}

// loss (rows), and with `gradient` the logits' gradients in their place.
template <typename F>
static void gpu_cross_entropy(F *logits, int64_t ld, float *loss, const int *targets, int64_t rows, int64_t v, float scale, int gradient) {
    const int64_t half = (int64_t)gpu.sharedMemPerBlockOptin / 2 - 1024;      // two blocks on a multiprocessor, each with 1 KB of CUDA's own
    const int64_t kept = min64(v / pack_size<F>, half / 16) * pack_size<F>;
    allow_shared(cross_entropy_kernel<F>, kept * (int64_t)sizeof(F), "the cross entropy", "a smaller --vocab");
    cross_entropy_kernel<F><<<(unsigned)rows, LOSS_THREADS, (size_t)(kept * (int64_t)sizeof(F))>>>(logits, ld, loss, targets, v, scale, gradient, kept);
    LAUNCHED();
}

// ----------------------------------------------------------------------------
// 3. The model. Its twin in the GPU's memory (m->twin) is a Model too, for the table of parameters and the f32 numbers behind it:
// weights, gradients, AdamW's state. What the precision decides is in a Net.

// What a layer keeps from forward for backward: LayerActs of train_nsa.c with its types.
template <typename F>
struct GpuActs {
    F *x, *out;                                 // (B,T,C)
    F *norm1, *norm2;                           // (B,T,C), the norms of x and mid: kept, or work.norm
    float *rstd1;                               // (B,T)
    F *wide;                                    // (B,T,row), rows of whole 16 bytes
    F *compressed[2], *hidden[2];               // (B,Nc,KV,D | Dv), (B,Nc,KV,2D | 2Dv)
    F *branch[BRANCHES];                        // (B,T,H,Dv)
    float *lse[BRANCHES], *gates;               // (B,T,H), (B,T,H,3)
    int *block_idx;                             // (B,T,KV,n)
    unsigned char *order;                       // (B,KV,T) of each piece: how Hopper's kernels of selection take queries
    F *mid;                                     // (B,T,C)
    float *rstd2;                               // (B,T)
    F *gate_up, *expert_gate_up;                // (B,T,2F), (B·T·k,2Fe)
    F *h;                                       // (B,T,F), silu(gate)·up: kept, or work.ffn
    Routing routing;
};

// Buffers that every layer uses in turn.
template <typename F>
struct GpuScratch {
    F *norm, *y, *attention, *ffn, *compress, *logits, *dx, *dnorm, *dwide, *dattention, *dcompressed[2], *drouter;     // dcompressed: of each own piece
    F *keys, *dkeys;                            // as in Scratch; dkeys of each own piece
    float *select, *parts, *sums, *loss, *dgates, *dq, *delta, *partial, *dprobs, *dweight;
    RowStats *stats;                            // of the branches (3,B,T,H), for Hopper's kernels; else NULL
    int *kept, *shares;                         // (N·k) twice: experts with a capacity
    int64_t *count;                             // (E)
    MoeScratch<F> moe;
    Takers takers;
    int *tokens, *targets, *places;             // (N)
    RowList *lists;                             // of gpu_embed_backward
    double *norm_sums;
};

template <typename F>
struct Net {
    F *weights;                                 // the twin's own, or a bf16 copy of them
    GpuActs<F> *acts;
    GpuScratch<F> work;
    char *memory;
};
template <typename F> static Net<F> net;        // one model at a time

// In bf16 with -z 1 a rank has master weights of its own slices alone, where their state lies, and whole what kernels read in f32.
// The twin's `weights` are then nothing but places, those of the gradients.
static struct { float *masters, *small; int64_t *small_at; } zero1;     // small_at[i]: of tensor i in small; masters NULL: not so
static int shares_masters(const Config *c, int train) { return train && comm.shards > 1 && c->torch_dtype == DTYPE_BF16; }

// What kernels read in f32: all that is no matrix of a product, and the weights of gates on q.
static int param_is_small(const Param *p) { return !ends_with(p->name, ".weight") || param_is_norm(p) || ends_with(p->name, ".gate_q.weight"); }

// Numbers of the small tensors; small_at as above, or NULL.
static int64_t count_small(const Model *m, int64_t *small_at) {
    int64_t n = 0;
    for (int i = 0; i < m->num_params; i++) {
        if (small_at) small_at[i] = n;
        if (param_is_small(&m->params[i])) n += m->params[i].count;
    }
    return n;
}

// The tests hand the CPU's choices over, of blocks (L) arrays of (B,T,KV,n) and of experts (L) arrays of (N,k) in the GPU's
// memory, so that a tie that falls the other way does not look like an error.
static int **given_block_idx, **given_experts;

// Rows of the wide projection's result, long enough for loads of 16 bytes; columns past wide_row's size are not used.
static WideRow gpu_wide_row(const Config *c, int layer) {
    WideRow w = wide_row(c, layer);
    w.size = round_up(w.size, 16);
    return w;
}

// Products with the head take a vocabulary of whole 64 tokens: with 50257, GPT-2's, cuBLAS has only slow kernels. The rows of the head past V
// are whatever lies behind it among the weights. Their logits are not looked at and their gradients are zero, which is what these
// products then add to the gradients that lie there.
static int64_t logit_row(const Config *c) { return round_up(c->vocab_size, 64); }
// Numbers behind the last weight, so that there is always something.
static int64_t weights_slack(const Config *c) { return (logit_row(c) - c->vocab_size) * c->hidden_size; }
// Lists of at most so many rows add up the embedding's gradient, and how many lists that takes (gpu_embed_backward), each kind's end included: a token that occurs
// has one at least, and one more for its parts' sums if it is cut.
enum { LIST_ROWS = WARP };
static int64_t row_lists(int64_t n) { return n + 1 + n / LIST_ROWS + 1; }
// Rows of logits made at a time: enough to fill the GPU, never (B·T,V).
static int64_t gpu_logit_rows(const Config *c, int64_t n) { return min64(n, max64(128, ((int64_t)1 << 28) / logit_row(c) / 128 * 128)); }

static int has_nsa(const Config *c) {
    for (int l = 0; l < c->num_hidden_layers; l++)
        if (!layer_is_full(c, l)) return 1;
    return 0;
}

// Without training all layers share one set, as in carve_acts; with recomputation what is made again is shared.
template <typename F>
static void carve_gpu_acts(GpuActs<F> *acts, const Config *c, int64_t B, int64_t T, int recompute, int train, Carver *m) {
    const int64_t N = B * T, C = c->hidden_size, H = c->num_attention_heads, KV = c->num_key_value_heads, D = c->head_dim, Dv = c->v_head_dim;
    const int64_t L = c->num_hidden_layers, E = c->num_experts, k = c->num_experts_per_tok, nc = compressed_seen(T * comm.parts - 1, c->cmp_block, c->cmp_stride);
    const int keep_attention = train && recompute < 2, keep_ffn = train && recompute < 1, nsa = has_nsa(c);
    int64_t wide = 0, width = 0, moe = 0;
    for (int l = 0; l < L; l++) {       // shared buffers fit the largest layer
        wide = max64(wide, gpu_wide_row(c, l).size);
        width = max64(width, ffn_width(c, l));
        moe |= layer_is_moe(c, l);
    }
    F *x, *other = NULL;
    carve(m, &x, N * C);
    if (!train) carve(m, &other, N * C);
    for (int l = 0; l < L; l++) {
        GpuActs<F> *a = &acts[l];
        if (l > 0) *a = acts[0];
        a->x = x;
        if (train) carve(m, &a->out, N * C);
        else a->out = l % 2 ? acts[0].x : other;
        x = a->out;
        carve(m, &a->rstd1, N);         // the layer before writes it
        if (keep_attention || l == 0) {
            const int is_nsa = keep_attention ? !layer_is_full(c, l) : nsa;
            carve(m, &a->wide, N * (keep_attention ? gpu_wide_row(c, l).size : wide));
            for (int b = 0; b < (is_nsa ? BRANCHES : 1); b++) {
                carve(m, &a->branch[b], N * H * Dv);
                carve(m, &a->lse[b], N * H);
            }
            if (is_nsa) {
                carve(m, &a->gates, N * H * BRANCHES);
                carve(m, &a->block_idx, N * KV * c->sel_blocks);
                carve(m, &a->order, N * KV);
                for (int v = 0; v < 2; v++) {
                    carve(m, &a->compressed[v], B * nc * KV * (v ? Dv : D));
                    carve(m, &a->hidden[v], B * nc * KV * compress_hidden(c->compress, v ? (int)Dv : (int)D));
                }
            }
            carve(m, &a->mid, N * C);
            carve(m, &a->rstd2, N);
        }
        if (keep_ffn || l == 0) {
            carve(m, &a->gate_up, N * 2 * (keep_ffn ? ffn_width(c, l) : width));
            if (keep_ffn) carve(m, &a->norm1, N * C), carve(m, &a->norm2, N * C), carve(m, &a->h, N * ffn_width(c, l));
            if (keep_ffn ? layer_is_moe(c, l) : moe) {
                carve(m, &a->expert_gate_up, N * k * 2 * c->moe_intermediate_size);
                carve(m, &a->routing.probs, N * E);
                carve(m, &a->routing.lse, N);
                carve(m, &a->routing.weight, N * k);
                carve(m, &a->routing.choice, N * k);
                carve(m, &a->routing.row_token, N * k);
                carve(m, &a->routing.start, E + 1);
                carve(m, &a->routing.load, E);
            }
        }
    }
}

template <typename F>
static void carve_gpu_scratch(GpuScratch<F> *s, const Config *c, int64_t B, int64_t T, int train, Carver *m) {
    const int64_t N = B * T, C = c->hidden_size, H = c->num_attention_heads, KV = c->num_key_value_heads, D = c->head_dim, Dv = c->v_head_dim;
    const int64_t E = c->num_experts, k = c->num_experts_per_tok;
    const int nsa = has_nsa(c), tier = tier_of_model(c);
    const Pieces p = pieces_of(comm.parts, T);
    int64_t wide = 0, width = 0, compress = 0, select = 0, partial = 0, keys = 0;
    for (int l = 0; l < c->num_hidden_layers; l++) {
        const WideRow row = gpu_wide_row(c, l);
        wide = max64(wide, row.size);
        width = max64(width, ffn_width(c, l));
        if (p.parts > 1) keys = max64(keys, B * p.text * keys_width(&row));
        for (int b = 0; b < row.branches && tier > TIER_SIMPLE; b++)
            for (int i = 0; i < p.all; i++) {       // of any piece, so that all ranks take as much
                AttentionShape shape = attention_shape(c, B, &p, i, 0, 0);
                const Mask mask = branch_mask(c, NULL, &shape, l, b);
                partial = max64(partial, gpu_attention_partial(&shape, &mask));
            }
    }
    const int64_t nc = nsa ? compressed_seen(p.text - 1, c->cmp_block, c->cmp_stride) : 0;
    if (nsa) {
        AttentionShape shape = attention_shape(c, B, &p, p.all - 1, 0, 0);
        const SelectShape sel = select_shape(c);
        const Mask mask = branch_mask(c, NULL, &shape, 0, CMP);
        select = gpu_select_scratch<F>(&shape, &sel, &mask);
        for (int i = 0; i < 2; i++) {
            const CompressShape cs = compress_shape(c, B, p.text, 0, i);
            compress = max64(compress, gpu_compress_scratch(&cs));
        }
    }
    int64_t columns = max64(E, BRANCHES * H * D);       // the widest sum of columns
    columns = max64(columns, max64(c->cmp_block, 2) * max64(D, Dv));
    carve(m, &s->norm, N * C);
    carve(m, &s->y, N * C);
    carve(m, &s->attention, N * H * Dv);
    carve(m, &s->ffn, N * width);
    carve(m, &s->compress, compress);
    carve(m, &s->select, select);
    carve(m, &s->logits, gpu_logit_rows(c, N) * logit_row(c));
    carve(m, &s->parts, max64(SUM_PARTS * columns, NORM_BLOCKS * C));
    carve(m, &s->sums, max64(E, BRANCHES));
    carve(m, &s->loss, N);
    carve(m, &s->tokens, N);
    carve(m, &s->targets, N);
    if (E) {
        const MoeShape moe = moe_shape(c, N, comm.parts, NULL);
        carve_moe_scratch(&s->moe, &moe, m);
        carve(m, &s->kept, N * k);
        carve(m, &s->shares, N * k);
        carve(m, &s->count, E);
    }
    carve(m, &s->keys, keys);
    if (!train) return;
    carve(m, &s->dkeys, p.own * keys);
    carve(m, &s->dx, N * C);
    carve(m, &s->dnorm, N * C);
    carve(m, &s->dwide, N * wide);
    carve(m, &s->dattention, N * H * Dv);
    carve(m, &s->dgates, nsa ? N * H * BRANCHES : 0);
    carve(m, &s->dq, N * H * D);
    carve(m, &s->dcompressed[0], p.own * B * nc * KV * D);
    carve(m, &s->dcompressed[1], p.own * B * nc * KV * Dv);
    carve(m, &s->delta, N * H);
    carve(m, &s->partial, partial);
    s->stats = NULL;
    if (tier == TIER_HOPPER) carve(m, &s->stats, (nsa ? BRANCHES : 1) * N * H);
    carve(m, &s->dprobs, N * E);
    carve(m, &s->drouter, N * E);
    carve(m, &s->dweight, E ? N * k : 0);
    s->takers.blocks = nsa ? (p.text - 1) / c->sel_block + 1 : 0;
    carve(m, &s->takers.count, B * KV * s->takers.blocks);
    carve(m, &s->takers.start, B * KV * (s->takers.blocks + 1));
    carve(m, &s->takers.queries, nsa ? N * KV * c->sel_blocks : 0);
    carve(m, &s->places, N);
    carve(m, &s->lists, row_lists(N));
    carve(m, &s->norm_sums, count_params(c) / SUM_CHUNK + c->num_hidden_layers + 3);     // of every bucket by itself
}

// Bytes of activations, and of working memory with the table of RoPE and the last norm.
template <typename F>
static void net_bytes(int64_t bytes[2], const Config *c, int64_t B, int64_t T, int recompute, int train) {
    GpuActs<F> *acts = (GpuActs<F> *)xcalloc((size_t)c->num_hidden_layers, sizeof(GpuActs<F>));
    GpuScratch<F> work;
    Carver m = {NULL, 0};
    carve_gpu_acts(acts, c, B, T, recompute, train, &m);
    bytes[0] = m.used;
    m.used = 0;
    carve_gpu_scratch(&work, c, B, T, train, &m);
    float *rope, *rstd;
    carve(&m, &rope, T * comm.parts * c->head_dim);
    carve(&m, &rstd, B * T);
    bytes[1] = m.used;
    free(acts);
}

int64_t device_bytes(const Config *c, int64_t B, int64_t T, int recompute, int train, Text *table) {
    int64_t bytes[2], state;
    const int64_t params = count_state(c, &state), number = (int64_t)sizeof(float);
    device_open();      // how sums are cut into parts follows from the GPU
    if (is_bf16(c)) net_bytes<bf16>(bytes, c, B, T, recompute, train);
    else net_bytes<float>(bytes, c, B, T, recompute, train);
    int64_t all = params + weights_slack(c), weights = is_bf16(c) ? all + all / 2 + 1 : all;
    if (shares_masters(c, train)) {
        Model m;
        table_create(&m, c);
        weights += state + count_small(&m, NULL) - all;
        table_free(&m);
    }
    const int64_t part[] = {weights, train ? all : 0, train ? 2 * state : 0, bytes[0] / number, bytes[1] / number};
    return memory_table(part, table);
}

// Memory for a number a parameter.
template <typename F>
static F *weights_alloc(const Model *g) {
    const int64_t slack = weights_slack(&g->config);
    F *p = (F *)device_malloc((g->num_elements + slack) * (int64_t)sizeof(F));
    device_zero(p + g->num_elements, slack * (int64_t)sizeof(F));
    return p;
}

template <typename F>
static void net_alloc(Model *g, int64_t B, int64_t T, int recompute, int train) {
    const Config *c = &g->config;
    Net<F> *n = &net<F>;
    int64_t bytes[2];
    net_bytes<F>(bytes, c, B, T, recompute, train);
    if constexpr (std::is_same<F, float>::value) n->weights = g->weights;
    else if (!n->weights) n->weights = weights_alloc<F>(g);
    CUDA(cudaFree(n->memory));      // of activations for other sizes
    free(n->acts);
    n->memory = (char *)device_malloc(bytes[0] + bytes[1]);
    n->acts = (GpuActs<F> *)xcalloc((size_t)c->num_hidden_layers, sizeof(GpuActs<F>));
    Carver m = {n->memory, 0};
    carve_gpu_acts(n->acts, c, B, T, recompute, train, &m);
    carve_gpu_scratch(&n->work, c, B, T, train, &m);
    for (int l = 0; l < c->num_hidden_layers; l++)
        if (!n->acts[l].norm1) n->acts[l].norm1 = n->acts[l].norm2 = n->work.norm, n->acts[l].h = n->work.ffn;
    carve(&m, &g->rope, T * g->parts * c->head_dim);
    carve(&m, &g->final_rstd, B * T);
}

template <typename F>
static void net_free(Model *g) {
    Net<F> *n = &net<F>;
    if ((void *)n->weights != (void *)g->weights) CUDA(cudaFree(n->weights));
    CUDA(cudaFree(n->memory));
    free(n->acts);
    memset(n, 0, sizeof *n);
}

void device_alloc(Model *m, int64_t B, int64_t T, int recompute, int train) {
    const Config *c = &m->config;
    int len;
    if (has_nsa(c) && c->compress != COMPRESS_MLP && c->compress != COMPRESS_GROUPED_MLP && c->compress != COMPRESS_CONV1D && c->compress != COMPRESS_AVGPOOL) {
        const char *name = choice_name(compress_names, c->compress, &len);
        die(2, "--compress %.*s has no kernels here yet: train_nsa, on the CPU, knows it", len, name);
    }
    device_open();
    Model *g = m->twin;
    if (!g) {       // else other activations for the same weights
        g = m->twin = (Model *)xcalloc(1, sizeof(Model));
        g->config = *c;
        g->layers = (LayerWeights *)xcalloc((size_t)c->num_hidden_layers, sizeof(LayerWeights));
        list_params(g);      // counts
        if (shares_masters(c, train)) {
            list_slices(g);
            zero1.masters = (float *)device_malloc(g->state_elements * (int64_t)sizeof(float));
            zero1.small_at = (int64_t *)xmalloc((size_t)g->num_params * sizeof(int64_t));
            zero1.small = (float *)device_malloc(count_small(g, zero1.small_at) * (int64_t)sizeof(float));
            g->weights = g->grads = weights_alloc<float>(g);
        } else {
            g->weights = weights_alloc<float>(g);
        }
        list_params(g);
    }
    g->B = (int)B;
    g->T = (int)T;
    g->parts = comm.parts;
    g->recompute = recompute;
    g->train = train;
    if (train && !g->adam_m) {
        if (!g->grads) g->grads = weights_alloc<float>(g);
        float **state[] = {&g->adam_m, &g->adam_v};
        list_slices(g);
        list_slices(m);
        for (int i = 0; i < 2; i++) *state[i] = (float *)device_malloc(g->state_elements * (int64_t)sizeof(float));
        m->adam_m = (real *)xcalloc((size_t)m->state_elements, sizeof(real));     // for checkpoints
        m->adam_v = (real *)xcalloc((size_t)m->state_elements, sizeof(real));
    }
    if (is_bf16(c)) net_alloc<bf16>(g, B, T, recompute, train);
    else net_alloc<float>(g, B, T, recompute, train);
    g->rope_positions = T * g->parts;
    const int64_t bytes = g->rope_positions * c->head_dim * (int64_t)sizeof(float);
    float *angles = (float *)xmalloc((size_t)bytes);
    rope_table(angles, g->rope_positions, c->head_dim, c->rope_theta);
    to_device(g->rope, angles, bytes);
    free(angles);
}

void device_free(Model *m) {
    Model *g = m->twin;
    if (is_bf16(&g->config)) net_free<bf16>(g);
    else net_free<float>(g);
    float *all[] = {zero1.masters ? NULL : g->weights, g->grads, g->adam_m, g->adam_v, zero1.masters, zero1.small};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) CUDA(cudaFree(all[i]));
    free(g->layers);
    free(g->params);
    free(g->slices);
    free(g);
    free(zero1.small_at);
    memset(&zero1, 0, sizeof zero1);
    m->twin = NULL;
}

// ----------------------------------------------------------------------------
// What the log's head says of the device.

void device_describe(const Config *c, Text *out) {
    text_add(out, "%s (sm_%d%d), %s", gpu.name, gpu.major, gpu.minor, is_bf16(c) ? "bf16" : "f32");
    if (is_bf16(c) && tier_of_model(c) == TIER_SIMPLE)
        text_add(out, "; attention by the simple kernels: heads of %d/%d, the fast ones take 64, 128 and 192/128", c->head_dim, c->v_head_dim);
}

// ----------------------------------------------------------------------------
// Weights in bf16. To the nearest, or stochastically (--stochastic-rounding): up or down with the chance that makes the mean right.
// The chance is a hash of the number itself and its place, so that a run that is resumed rounds as it did before.

__device__ static inline bf16 round_weight(float x, int64_t place, int stochastic) {
    if (!stochastic || !isfinite(x)) return __float2bfloat16_rn(x);
    uint32_t bits = __float_as_uint(x), h = bits ^ (uint32_t)place * 0x9e3779b9u;
    h = (h ^ h >> 16) * 0x85ebca6bu;
    h = (h ^ h >> 13) * 0xc2b2ae35u;
    return __ushort_as_bfloat16((unsigned short)((bits + ((h ^ h >> 16) & 0xffff)) >> 16));
}

__global__ void round_weights_kernel(bf16 *out, const float *weights, int64_t n, int stochastic) {
    const int64_t i = global_thread();
    if (i < n) out[i] = round_weight(weights[i], i, stochastic);
}

// Every rank gets all numbers of x (as many as the weights) from the ranks whose slices they are.
template <typename F>
static void gather_buckets(const Model *g, F *x) {
    nccl_after_compute();
    for (int b = 0; b < bucket_count(g); b++) {
        int64_t begin, end;
        bucket_range(g, b, &begin, &end);
        nccl_gather(x, begin, end);
    }
}

// A slice of the master weights, and the part of a small tensor that it is.
static void store_small(const Model *g, const Slice *slice) {
    if (!param_is_small(&g->params[slice->param])) return;
    device_copy(zero1.small + zero1.small_at[slice->param] + slice->first, zero1.masters + slice->at, slice->count * (int64_t)sizeof(float));
}

// Where masters are shared, the gradients' memory is free before the first step and between steps: all weights pass through it.
void device_store(Model *m) {
    const Model *g = m->twin;
    const int64_t n = m->num_elements, number = (int64_t)sizeof(float);
    to_device(g->weights, m->weights, n * number);
    if (is_bf16(&m->config)) {
        round_weights_kernel<<<grid(n, THREADS), THREADS>>>(net<bf16>.weights, g->weights, n, m->stochastic_rounding);
        LAUNCHED();
    }
    for (int i = 0; i < g->num_slices && zero1.masters; i++) {
        const Slice *slice = &g->slices[i];
        device_copy(zero1.masters + slice->at, g->weights + g->params[slice->param].offset + slice->first, slice->count * number);
    }
    for (int i = 0; i < g->num_params && zero1.masters; i++)
        if (param_is_small(&g->params[i])) device_copy(zero1.small + zero1.small_at[i], g->weights + g->params[i].offset, g->params[i].count * number);
    if (!g->train) return;
    to_device(g->adam_m, m->adam_m, m->state_elements * number);
    to_device(g->adam_v, m->adam_v, m->state_elements * number);
}

void device_fetch(Model *m) {
    const Model *g = m->twin;
    const int64_t number = (int64_t)sizeof(float);
    if (zero1.masters) {
        for (int i = 0; i < g->num_slices; i++) {
            const Slice *slice = &g->slices[i];
            device_copy(g->weights + g->params[slice->param].offset + slice->first, zero1.masters + slice->at, slice->count * number);
        }
        gather_buckets(g, g->weights);
        nccl_wait();
    }
    to_host(m->weights, g->weights, m->num_elements * number);
    if (!g->train) return;
    to_host(m->adam_m, g->adam_m, m->state_elements * number);
    to_host(m->adam_v, g->adam_v, m->state_elements * number);
}

// A matrix as products read it; `w` is its place in the twin's weights.
template <typename F>
static const F *matrix(const Model *g, const float *w) { return net<F>.weights + (w - g->weights); }

// What kernels read in f32; `w` is its place too.
static float *small(const Model *g, float *w) {
    if (!zero1.masters || !w) return w;
    int low = 0, high = g->num_params;      // params[low].offset <= place < params[high].offset
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (g->params[middle].offset <= w - g->weights) low = middle;
        else high = middle;
    }
    if (!param_is_small(&g->params[low])) die(1, "internal error: %s is read in f32", g->params[low].name);
    return zero1.small + zero1.small_at[low] + (w - g->weights - g->params[low].offset);
}

// ----------------------------------------------------------------------------
// Forward: each function is its namesake of train_nsa.c with kernels for loops. Norms are made by whoever adds to the residual
// stream: a layer finds the norm of its input in norm1, and leaves that of the next one's input in the next one's.

template <typename F>
static Branches<F> branches_of(const GpuActs<F> *a) {
    Branches<F> b = {{a->branch[0], a->branch[1], a->branch[2]}, {a->lse[0], a->lse[1], a->lse[2]}};
    return b;
}

template <typename F>
static CompressMatrices<F> compress_matrices(const Model *g, const CompressWeights *w) {
    CompressMatrices<F> m = {matrix<F>(g, w->fc1), matrix<F>(g, w->fc2), matrix<F>(g, w->conv)};
    return m;
}

// The vectors beside them.
static CompressWeights compress_vectors(const Model *g, const CompressWeights *w) {
    CompressWeights v;
    memset(&v, 0, sizeof v);
    v.pos = small(g, w->pos);
    v.fc1_bias = small(g, w->fc1_bias);
    v.fc2_bias = small(g, w->fc2_bias);
    v.conv_bias = small(g, w->conv_bias);
    return v;
}

// Heads that turn with their token's place: q's and those of each branch's k but the compressed one's, which turn as blocks.
static Heads turning_heads(const Config *c, const WideRow *row, int with_q) {
    Heads h;
    memset(&h, 0, sizeof h);
    if (with_q) heads_add(&h, row->q, c->num_attention_heads);
    for (int b = 0; b < row->branches; b++)
        if (row->branches == 1 || b != CMP) heads_add(&h, row->k[b], c->num_key_value_heads);
    return h;
}
static Heads some_heads(int count) {
    Heads h;
    memset(&h, 0, sizeof h);
    heads_add(&h, 0, count);
    return h;
}

// As text_keys: the keys and values of whole texts.
template <typename F> struct GpuTextKeys { F *x; int64_t row; };

// A thread a number of the rows (N,width) that this part has of them.
template <typename F>
__global__ void text_keys_kernel(F *keys, const F *wide, int64_t wide_row, int64_t n, int64_t width, Pieces p, int part, int64_t B) {
    const int64_t i = global_thread(), x = i / width, j = i % width;
    if (i < n) keys[row_of_texts(&p, part, x, B) * width + j] = wide[x * wide_row + j];
}

template <typename F>
static GpuTextKeys<F> gpu_text_keys(F *wide, const WideRow *row, const Pieces *p, int64_t B, int again) {
    GpuTextKeys<F> keys = {wide + row->k[0], row->size};
    if (p->parts == 1) return keys;
    keys.x = net<F>.work.keys;
    keys.row = keys_width(row);
    if (again) return keys;
    const int64_t n = p->own * p->length * B * keys.row;
    text_keys_kernel<<<grid(n, THREADS), THREADS>>>(keys.x, (const F *)wide + row->k[0], row->size, n, keys.row, *p, own_part(p), B);
    LAUNCHED();
    nccl_exchange_pieces((char *)keys.x, (const char *)keys.x, p, B, p->length * keys.row * (int64_t)sizeof(F), 0);
    return keys;
}

// x (n) += the one behind it
template <typename F>
__global__ void add_next_kernel(F *x, int64_t n) {
    const int64_t i = global_thread();
    if (i < n) x[i] = (F)((float)x[i] + (float)x[n + i]);
}
template <typename F>
static void add_pieces(F *x, int64_t n, const Pieces *p) {
    if (p->own == 1 || n == 0) return;
    add_next_kernel<<<grid(n, THREADS), THREADS>>>(x, n);
    LAUNCHED();
}

// As text_keys_backward: what this part and the others have for its rows, in the order of the parts.
template <typename F>
__global__ void text_keys_sum_kernel(F *dwide, int64_t wide_row, const F *mine, const F *theirs, int64_t n, int64_t width, Pieces p, int me, int64_t B) {
    const int64_t i = global_thread(), x = i / width, j = i % width;
    if (i >= n) return;
    float sum = 0;
    for (int part = 0; part < p.parts; part++) sum += (float)(part == me ? mine : theirs)[row_of_texts(&p, part, x, B) * width + j];
    dwide[x * wide_row + j] = (F)sum;
}

template <typename F>
static void gpu_text_keys_backward(F *dwide, const WideRow *row, const Pieces *p, int64_t B) {
    const int64_t width = keys_width(row), n = p->own * p->length * B * width;
    F *mine = net<F>.work.dkeys, *theirs = net<F>.work.keys;
    add_pieces(mine, B * p->text * width, p);
    nccl_exchange_pieces((char *)theirs, (const char *)mine, p, B, p->length * width * (int64_t)sizeof(F), 1);
    text_keys_sum_kernel<<<grid(n, THREADS), THREADS>>>(dwide + row->k[0], row->size, (const F *)mine, (const F *)theirs, n, width, *p, own_part(p), B);
    LAUNCHED();
}

template <typename F>
static const F *gpu_attention_core_forward(Model *g, int layer, int64_t B, int64_t T) {
    const Config *c = &g->config;
    const LayerWeights *w = &g->layers[layer];
    GpuScratch<F> *s = &net<F>.work;
    const GpuActs<F> *a = &net<F>.acts[layer];
    const WideRow row = gpu_wide_row(c, layer);
    const Heads turning = turning_heads(c, &row, 1), blocks = some_heads(c->num_key_value_heads);
    const Pieces p = pieces_of(g->parts, T);
    const int64_t N = B * T, rows = B * p.length;
    const int H = c->num_attention_heads, KV = c->num_key_value_heads, D = c->head_dim, nsa = row.branches > 1;

    if (nsa) {      // before RoPE turns q
        gates_forward_kernel<<<grid(N * BRANCHES * H, THREADS), THREADS>>>(a->gates, (const F *)a->wide + row.gate, row.size, (const F *)a->wide, row.size, small(g, w->gate_weight),
                                                                          small(g, w->gate_bias), N, H, D, c->gate);
        LAUNCHED();
    }
    for (int i = 0; i < p.own; i++)
        gpu_rope<F>(a->wide + i * rows * row.size, row.size, NULL, g->rope + piece_start(&p, i) * D, rows, p.length, 1, &turning, D, 1);
    const GpuTextKeys<F> keys = gpu_text_keys<F>(a->wide, &row, &p, B, 0);
    for (int b = 0; b < row.branches; b++) {
        const int compressed = nsa && b == CMP;
        F *k = keys.x + row.k[b] - row.k[0], *v = keys.x + row.v[b] - row.k[0];
        if (compressed) {
            for (int i = 0; i < 2; i++) {
                const CompressShape cs = compress_shape(c, B, p.text, keys.row, i);
                const CompressMatrices<F> m = compress_matrices<F>(g, &w->compress[i]);
                const CompressWeights vectors = compress_vectors(g, &w->compress[i]);
                gpu_compress_forward<F>(a->compressed[i], a->hidden[i], i ? v : k, &vectors, &m, &cs, s->compress);
            }
            k = a->compressed[0];
            v = a->compressed[1];
            const int64_t nc = compressed_seen(p.text - 1, c->cmp_block, c->cmp_stride);
            gpu_rope<F>(k, (int64_t)KV * D, NULL, g->rope, B * nc, max64(nc, 1), c->cmp_stride, &blocks, D, 1);
        }
        for (int i = 0; i < p.own; i++) {
            const int64_t first = i * rows;
            AttentionShape shape = attention_shape(c, B, &p, own_piece(&p, i), row.size, keys.row);
            int *block_idx = nsa ? a->block_idx + first * KV * c->sel_blocks : NULL;
            Mask mask = branch_mask(c, block_idx, &shape, layer, b);
            const F *q = a->wide + first * row.size;
            F *out = a->branch[b] + first * H * c->v_head_dim;
            float *lse = a->lse[b] + first * H;
            if (groups_queries<F>(&shape, &mask)) order_queries(a->order + first * KV, &mask, &shape), mask.order = a->order + first * KV;
            if (!compressed) {
                const int64_t at = first * H * c->v_head_dim;
                const BranchSum<F> total = {s->attention + at, {a->branch[CMP] + at, a->branch[SLC] + at}, a->gates + first * H * BRANCHES};
                gpu_attention_forward<F>(out, lse, q, k, v, &mask, &shape, nsa && b == WIN ? &total : NULL);
                continue;
            }
            const SelectShape select = select_shape(c);
            gpu_compressed_forward<F>(out, lse, block_idx, q, k, v, &mask, &shape, &select, s->select);
            if (given_block_idx) device_copy(block_idx, given_block_idx[layer] + first * KV * c->sel_blocks, rows * KV * c->sel_blocks * (int64_t)sizeof(int));
        }
    }
    return nsa ? s->attention : a->branch[0];
}

// From norm1 to norm2.
template <typename F>
static void gpu_attention_layer_forward(Model *g, int layer, int64_t B, int64_t T, const StepInfo *info) {
    const Config *c = &g->config;
    const LayerWeights *w = &g->layers[layer];
    GpuScratch<F> *s = &net<F>.work;
    const GpuActs<F> *a = &net<F>.acts[layer];
    const int64_t N = B * T, C = c->hidden_size, HDv = (int64_t)c->num_attention_heads * c->v_head_dim;
    gpu_linear_forward(a->wide, gpu_wide_row(c, layer).size, a->norm1, C, matrix<F>(g, w->wide), N, C, wide_row(c, layer).size);
    gpu_linear_forward(s->y, C, gpu_attention_core_forward<F>(g, layer, B, T), HDv, matrix<F>(g, w->o), N, HDv, C);
    gpu_add_norm<F>(a->mid, a->norm2, a->rstd2, a->x, s->y, small(g, w->norm2), N, C, c->rms_norm_eps, dropout_at(g, B, T, 2 * layer + 1, info));
}

// What backward needs of the FFN: norm2 to gate_up, and the experts' routing and gate_up.
template <typename F>
static void gpu_ffn_inputs_forward(Model *g, int layer, int64_t N, const StepInfo *info) {
    const Config *c = &g->config;
    const LayerWeights *w = &g->layers[layer];
    GpuScratch<F> *s = &net<F>.work;
    const GpuActs<F> *a = &net<F>.acts[layer];
    const int64_t C = c->hidden_size, width = ffn_width(c, layer);
    gpu_linear_forward(a->gate_up, 2 * width, a->norm2, C, matrix<F>(g, w->gate_up), N, C, 2 * width);
    if (!layer_is_moe(c, layer)) return;
    const MoeShape moe = moe_shape(c, N, g->parts, info);
    gpu_linear_forward(a->routing.probs, moe.E, a->norm2, C, matrix<F>(g, w->router), N, C, moe.E);
    gpu_moe_route(&a->routing, &moe, given_experts ? given_experts[layer] : NULL, s->count, s->kept, s->shares);
    if (g->parts > 1) gpu_sum_loads(a->routing.load, &moe);
}

// From norm2 to the norm of out: the next layer's norm1, or the head's in work.norm.
template <typename F>
static void gpu_ffn_layer_forward(Model *g, int layer, int64_t B, int64_t T, const StepInfo *info) {
    const Config *c = &g->config;
    const LayerWeights *w = &g->layers[layer];
    GpuScratch<F> *s = &net<F>.work;
    const GpuActs<F> *a = &net<F>.acts[layer];
    const int64_t N = B * T, C = c->hidden_size, width = ffn_width(c, layer);
    const int last = layer + 1 == c->num_hidden_layers;
    gpu_ffn_inputs_forward<F>(g, layer, N, info);
    if (width > 0) {
        gpu_swiglu_forward(a->h, a->gate_up, N, width);
        gpu_linear_forward(s->y, C, a->h, width, matrix<F>(g, w->down), N, width, C);
    } else {
        device_zero(s->y, N * C * (int64_t)sizeof(F));
    }
    if (layer_is_moe(c, layer)) {
        const MoeShape moe = moe_shape(c, N, g->parts, info);
        gpu_moe_forward<F>(s->y, a->expert_gate_up, a->norm2, matrix<F>(g, w->experts), &a->routing, &moe, &s->moe);
    }
    const GpuActs<F> *next = a + 1;
    gpu_add_norm<F>(a->out, last ? s->norm : next->norm1, last ? g->final_rstd : next->rstd1, a->mid, s->y, small(g, last ? g->norm : g->layers[layer + 1].norm1), N, C,
                    c->rms_norm_eps, dropout_at(g, B, T, 2 * layer + 2, info));
}

// What the log and the loss say of a layer, gathered in the host's model.
template <typename F>
static void gpu_layer_stats(Model *m, int layer, int64_t B, int64_t T, const StepInfo *info) {
    const Config *c = &m->config;
    GpuScratch<F> *s = &net<F>.work;
    const GpuActs<F> *a = &net<F>.acts[layer];
    if (!layer_is_full(c, layer) && !info) {        // gates are logged at validations
        const int64_t n = B * T * c->num_attention_heads;
        float sums[BRANCHES];
        device_zero(s->sums, sizeof sums);
        column_sums(s->sums, n, BRANCHES, Plain<float>{a->gates, BRANCHES}, s->parts);
        to_host(sums, s->sums, sizeof sums);
        for (int b = 0; b < BRANCHES; b++) m->gate_sum[layer * BRANCHES + b] += (double)sums[b];
        m->gate_count[layer] += n;
    }
    if (layer_is_moe(c, layer)) {
        const MoeShape moe = moe_shape(c, B * T, m->twin->parts, info);
        gpu_moe_losses(&m->moe_z, &m->moe_balance, &m->moe_load[layer * c->num_experts], &a->routing, &moe, c->z_loss_coef, c->balance_loss_coef, s->sums, s->parts);
    }
}

// work.tokens to the first layer's input, and its norm.
template <typename F>
static void gpu_embed(const Model *g, int64_t B, int64_t T, const StepInfo *info) {
    const GpuActs<F> *a = net<F>.acts;
    const int64_t N = B * T, C = g->config.hidden_size;
    embed_kernel<<<(unsigned)N, THREADS>>>(a->x, net<F>.work.tokens, matrix<F>(g, g->embed), C, dropout_at(g, B, T, 0, info));
    LAUNCHED();
    gpu_rmsnorm_forward<F>(a->norm1, a->rstd1, a->x, small(g, g->layers[0].norm1), N, C, g->config.rms_norm_eps);
}

// Leaves the last layer's output, and its norm in work.norm.
template <typename F>
static void gpu_layers_forward(Model *m, const int *tokens, int64_t B, int64_t T, const StepInfo *info) {
    Model *g = m->twin;
    const int64_t N = B * T;
    if (N > (int64_t)g->B * g->T || T * g->parts > g->rope_positions) die(1, "internal error: a batch of %" PRId64 "x%" PRId64 " in memory for %dx%d", B, T, g->B, g->T);
    m->moe_z = m->moe_balance = 0;
    to_device(net<F>.work.tokens, tokens, N * (int64_t)sizeof(int));
    gpu_embed<F>(g, B, T, info);
    for (int l = 0; l < g->config.num_hidden_layers; l++) {
        gpu_attention_layer_forward<F>(g, l, B, T, info);
        gpu_ffn_layer_forward<F>(g, l, B, T, info);
        gpu_layer_stats<F>(m, l, B, T, info);
    }
}

// The cross entropy of each token in work.loss, and with `info` the gradients of the head and of its input, which becomes work.dx.
template <typename F>
static void gpu_head_loss(Model *g, const int *targets, int64_t N, const StepInfo *info) {
    const Config *c = &g->config;
    GpuScratch<F> *s = &net<F>.work;
    const int64_t C = c->hidden_size, V = c->vocab_size, rows = gpu_logit_rows(c, N), ld = logit_row(c);
    const F *head = matrix<F>(g, g->head);
    const float scale = info ? (float)(info->grad_scale / (double)N) : 0;
    to_device(s->targets, targets, N * (int64_t)sizeof(int));
    for (int64_t i = 0; i < N; i += rows) {
        const int64_t n = min64(rows, N - i);
        gpu_linear_forward(s->logits, ld, s->norm + i * C, C, head, n, C, ld);
        gpu_cross_entropy(s->logits, ld, s->loss + i, s->targets + i, n, V, scale, info != NULL);
        if (info) gpu_linear_backward(s->dnorm + i * C, C, g->grads + (g->head - g->weights), s->logits, ld, s->norm + i * C, C, head, n, C, ld, 0);
    }
    if (info) {
        device_zero(s->dx, N * C * (int64_t)sizeof(F));
        gpu_rmsnorm_backward<F>(s->dx, g->grads + (g->norm - g->weights), s->dnorm, net<F>.acts[c->num_hidden_layers - 1].out, g->final_rstd, small(g, g->norm), N, C, s->parts);
    }
}

// Waits for everything asked of the GPU so far.
static double mean_loss(const float *losses, int64_t N) {
    float *loss = (float *)xmalloc((size_t)N * sizeof(float));
    to_host(loss, losses, N * (int64_t)sizeof(float));
    double total = 0;
    for (int64_t i = 0; i < N; i++) total += (double)loss[i];
    free(loss);
    return total / (double)N;
}

template <typename F>
static double gpu_evaluate(Model *m, const int *tokens, const int *targets, int64_t B, int64_t T) {
    gpu_layers_forward<F>(m, tokens, B, T, NULL);
    gpu_head_loss<F>(m->twin, targets, B * T, NULL);
    return mean_loss(net<F>.work.loss, B * T);
}

double device_evaluate(Model *m, const int *tokens, const int *targets, int64_t B, int64_t T) {
    return m->loss = is_bf16(&m->config) ? gpu_evaluate<bf16>(m, tokens, targets, B, T) : gpu_evaluate<float>(m, tokens, targets, B, T);
}

// n rows of numbers of the GPU, `row` apart, as f32 of the host.
template <typename F>
static void fetch_rows(float *to, const F *from, int64_t n, int64_t width, int64_t row) {
    F *x = (F *)xmalloc((size_t)(n * row) * sizeof(F));
    to_host(x, from, n * row * (int64_t)sizeof(F));
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < width; j++) to[i * width + j] = (float)x[i * row + j];
    free(x);
}

template <typename F>
static void gpu_logits(Model *m, const int *tokens, int64_t B, int64_t T, real *logits, int last_only) {
    Model *g = m->twin;
    GpuScratch<F> *s = &net<F>.work;
    const int64_t C = m->config.hidden_size, V = m->config.vocab_size, N = last_only ? B : B * T, skip = last_only ? T : 1;
    const int64_t rows = gpu_logit_rows(&m->config, B * T), ld = logit_row(&m->config);
    const int parts = g->parts;
    g->parts = 1;
    gpu_layers_forward<F>(m, tokens, B, T, NULL);
    g->parts = parts;
    for (int64_t i = 0; i < N; i += rows) {
        const int64_t n = min64(rows, N - i);
        gpu_linear_forward(s->logits, ld, s->norm + ((i + 1) * skip - 1) * C, skip * C, matrix<F>(g, g->head), n, C, ld);
        fetch_rows(logits + i * V, s->logits, n, V, ld);
    }
}

void device_logits(Model *m, const int *tokens, int64_t B, int64_t T, real *logits, int last_only) {
    if (is_bf16(&m->config)) gpu_logits<bf16>(m, tokens, B, T, logits, last_only);
    else gpu_logits<float>(m, tokens, B, T, logits, last_only);
}

// ----------------------------------------------------------------------------
// Backward

template <typename F>
static void gpu_ffn_layer_backward(Model *g, int layer, int64_t B, int64_t T, const StepInfo *info) {
    const Config *c = &g->config;
    const LayerWeights *w = &g->layers[layer];
    GpuScratch<F> *s = &net<F>.work;
    const GpuActs<F> *a = &net<F>.acts[layer];
    const int64_t N = B * T, C = c->hidden_size, width = ffn_width(c, layer);
    const F *dy = dropout_backward(s->y, s->dx, N, dropout_at(g, B, T, 2 * layer + 2, info));
    if (width > 0) {
        gemm(N, width, C, dy, C, 0, matrix<F>(g, w->down), width, 0, s->ffn, width, 0);
        gpu_swiglu_backward(a->gate_up, a->h == s->ffn ? s->ffn : NULL, s->ffn, N, width);
        gpu_linear_backward<F>(NULL, 0, grad_of(g, w->down), dy, C, a->h, width, NULL, N, width, C, 0);
        gpu_linear_backward(s->dnorm, C, grad_of(g, w->gate_up), a->gate_up, 2 * width, a->norm2, C, matrix<F>(g, w->gate_up), N, C, 2 * width, 0);
    } else {
        device_zero(s->dnorm, N * C * (int64_t)sizeof(F));
    }
    if (layer_is_moe(c, layer)) {
        const MoeShape moe = moe_shape(c, N, g->parts, info);
        gpu_moe_backward<F>(s->dnorm, grad_of(g, w->experts), s->dweight, dy, a->expert_gate_up, a->norm2, matrix<F>(g, w->experts), &a->routing, &moe, &s->moe);
        router_backward_kernel<<<grid(N, THREADS), THREADS>>>(s->drouter, s->dprobs, s->dweight, a->routing, moe, c->z_loss_coef, c->balance_loss_coef, info->grad_scale);
        LAUNCHED();
        gpu_linear_backward(s->dnorm, C, grad_of(g, w->router), s->drouter, moe.E, a->norm2, C, matrix<F>(g, w->router), N, C, moe.E, 1);
    }
    gpu_rmsnorm_backward<F>(s->dx, grad_of(g, w->norm2), s->dnorm, a->mid, a->rstd2, small(g, w->norm2), N, C, s->parts);
}

// dwide of all branches, every column of it, from dattention. Gives forward's result again.
template <typename F>
static const F *gpu_attention_core_backward(Model *g, int layer, int64_t B, int64_t T) {
    const Config *c = &g->config;
    const LayerWeights *w = &g->layers[layer];
    GpuScratch<F> *s = &net<F>.work;
    const GpuActs<F> *a = &net<F>.acts[layer];
    const WideRow row = gpu_wide_row(c, layer);
    const Pieces p = pieces_of(g->parts, T);
    const int64_t N = B * T, rows = B * p.length, nc = compressed_seen(p.text - 1, c->cmp_block, c->cmp_stride);
    const int H = c->num_attention_heads, KV = c->num_key_value_heads, D = c->head_dim, Dv = c->v_head_dim, nsa = row.branches > 1;
    const Heads turning = turning_heads(c, &row, 0), queries = some_heads(H), blocks = some_heads(KV);
    const GpuTextKeys<F> keys = gpu_text_keys<F>(a->wide, &row, &p, B, g->recompute >= 2);
    F *dkeys = p.parts > 1 ? s->dkeys : s->dwide + row.k[0];        // rows as those of keys
    const int64_t size = B * p.text * keys.row;
    // Hopper's kernels make dq of the compressed branch and the window together. The last part turns it back, where its kernel can, and a dense layer's turns dk.
    const int one_dq = nsa && tier_of_model(c) == TIER_HOPPER, turns[2][BRANCHES] = {{CMP, SLC, WIN}, {CMP, WIN, SLC}};
    int turned_dq = 0;
    if (p.own > 1) device_zero(dkeys + size, size * (int64_t)sizeof(F));        // compression leaves its gradients with the first piece's

    if (nsa)
        gpu_branches_backward<F, BRANCHES>(s->attention, s->dgates, c->gate == GATE_INPUT ? s->dwide + row.gate : NULL, row.size, s->stats, s->dattention, branches_of(a), a->gates,
                                           N, H, Dv);
    else if (s->stats)
        gpu_row_stats<F>(s->stats, s->dattention, NULL, a->branch[0], a->lse[0], N * H, Dv);
    for (int turn = 0; turn < row.branches; turn++) {
        const int b = turns[one_dq][turn], compressed = nsa && b == CMP;
        const int64_t k_at = row.k[b] - row.k[0], v_at = row.v[b] - row.k[0];
        const F *k = compressed ? a->compressed[0] : keys.x + k_at, *v = compressed ? a->compressed[1] : keys.x + v_at;
        const int dq_later = compressed && one_dq;
        F *dk = compressed ? s->dcompressed[0] : dkeys + k_at, *dv = compressed ? s->dcompressed[1] : dkeys + v_at;
        for (int i = 0; i < p.own; i++) {       // each piece has gradients of its own of all keys
            const int64_t first = i * rows, heads = first * H, dk_step = compressed ? B * nc * KV * D : size, dv_step = compressed ? B * nc * KV * Dv : size;
            AttentionShape shape = attention_shape(c, B, &p, own_piece(&p, i), row.size, keys.row);
            Mask mask = branch_mask(c, nsa ? a->block_idx + first * KV * c->sel_blocks : NULL, &shape, layer, b);
            if (groups_queries<F>(&shape, &mask)) mask.order = a->order + first * KV;
            OtherBranch<F> other = {NULL, a->compressed[0], a->compressed[1], mask, attention_shape(c, B, &p, own_piece(&p, i), row.size, keys.row)};
            if (one_dq) other.mask = branch_mask(c, NULL, &other.s, layer, CMP), other.stats = s->stats + CMP * N * H + heads;
            const TurnedBack<F> turned = {s->dwide + first * row.size + row.q, row.size, g->rope + piece_start(&p, i) * D, nsa ? NULL : g->rope};
            turned_dq = turn + 1 == row.branches && turns_back<F>(&shape, &mask);
            gpu_attention_backward<F>(dq_later ? NULL : s->dq + heads * D, turn > one_dq, dk + i * dk_step, dv + i * dv_step, s->dattention + heads * Dv, nsa ? a->gates + heads * BRANCHES + b : NULL,
                                      a->branch[b] + heads * Dv, a->lse[b] + heads, s->stats ? s->stats + b * N * H + heads : NULL, a->wide + first * row.size, k, v, &mask, &shape,
                                      s->delta, &s->takers, s->partial, b == WIN && one_dq ? &other : NULL, turned_dq ? &turned : NULL);
        }
        if (!compressed) continue;
        add_pieces(dk, B * nc * KV * D, &p);
        add_pieces(dv, B * nc * KV * Dv, &p);
        gpu_rope<F>(dk, (int64_t)KV * D, NULL, g->rope, B * nc, max64(nc, 1), c->cmp_stride, &blocks, D, -1);
        for (int i = 0; i < 2; i++) {
            const CompressShape cs = compress_shape(c, B, p.text, keys.row, i);
            const CompressMatrices<F> m = compress_matrices<F>(g, &w->compress[i]);
            const CompressWeights vectors = compress_vectors(g, &w->compress[i]);
            CompressWeights wc = w->compress[i], dw = wc;
            CompressTensor list[COMPRESS_TENSORS];
            const int count = compress_tensors(list, c->compress, KV, c->cmp_block, cs.D);
            for (int t = 0; t < count; t++) *compress_pointer(&dw, &list[t]) = grad_of(g, *compress_pointer(&wc, &list[t]));
            const int64_t at = i ? v_at : k_at;
            gpu_compress_backward<F>(dkeys + at, &dw, s->dcompressed[i], a->hidden[i], keys.x + at, &vectors, &m, &cs, s->compress, s->parts);
        }
    }
    if (p.parts > 1) gpu_text_keys_backward<F>(s->dwide, &row, &p, B);
    for (int i = 0; i < p.own; i++) {
        const float *angles = g->rope + piece_start(&p, i) * D;
        F *dwide = s->dwide + i * rows * row.size;
        if (nsa || !turned_dq) gpu_rope<F>(dwide, row.size, NULL, angles, rows, p.length, 1, &turning, D, -1);
        if (!turned_dq) gpu_rope<F>(dwide + row.q, row.size, s->dq + i * rows * H * D, angles, rows, p.length, 1, &queries, D, -1);
    }
    if (!nsa) return a->branch[0];
    column_sums(grad_of(g, w->gate_bias), N, BRANCHES * H, Plain<float>{s->dgates, BRANCHES * H}, s->parts);
    if (c->gate != GATE_Q_COND) return s->attention;
    // A gate on q reads q before RoPE: turn the kept one back (nothing needs it turned any more).
    for (int i = 0; i < p.own; i++)
        gpu_rope<F>(a->wide + i * rows * row.size + row.q, row.size, NULL, g->rope + piece_start(&p, i) * D, rows, p.length, 1, &queries, D, -1);
    const GateWeightGradient<F> value = {s->dgates, a->wide, row.size, H, D};
    column_sums(grad_of(g, w->gate_weight), N, (int64_t)BRANCHES * H * D, value, s->parts);
    gates_dq_kernel<<<grid(N * H * D, THREADS), THREADS>>>(s->dwide, row.size, s->dgates, small(g, w->gate_weight), N, H, D);
    LAUNCHED();
    return s->attention;
}

template <typename F>
static void gpu_attention_layer_backward(Model *g, int layer, int64_t B, int64_t T, const StepInfo *info) {
    const Config *c = &g->config;
    const LayerWeights *w = &g->layers[layer];
    GpuScratch<F> *s = &net<F>.work;
    const GpuActs<F> *a = &net<F>.acts[layer];
    const int64_t N = B * T, C = c->hidden_size, wide = wide_row(c, layer).size, row = gpu_wide_row(c, layer).size, HDv = (int64_t)c->num_attention_heads * c->v_head_dim;
    const F *dy = dropout_backward(s->y, s->dx, N, dropout_at(g, B, T, 2 * layer + 1, info));
    gpu_linear_backward<F>(s->dattention, HDv, NULL, dy, C, NULL, HDv, matrix<F>(g, w->o), N, HDv, C, 0);
    const F *attention = gpu_attention_core_backward<F>(g, layer, B, T);        // made again where dattention is read
    gpu_linear_backward<F>(NULL, HDv, grad_of(g, w->o), dy, C, attention, HDv, NULL, N, HDv, C, 0);
    if (g->recompute) gpu_norm_again<F>(a->norm1, a->rstd1, a->x, small(g, w->norm1), N, C);
    gpu_linear_backward(s->dnorm, C, grad_of(g, w->wide), s->dwide, row, a->norm1, C, matrix<F>(g, w->wide), N, C, wide, 0);
    gpu_rmsnorm_backward<F>(s->dx, grad_of(g, w->norm1), s->dnorm, a->x, a->rstd1, small(g, w->norm1), N, C, s->parts);
}

// dembed (V,C) += the rows of dx (N,C) of each token, in the order of the text. The lists are made by the host, which has the tokens: of the places of each that occurs,
// those of more than LIST_ROWS rows in parts, and behind them those of the parts' sums, which lie where dnorm was.
template <typename F>
static void gpu_embed_backward(Model *g, const int *tokens, int64_t N) {
    const int64_t V = g->config.vocab_size, C = g->config.hidden_size;
    GpuScratch<F> *s = &net<F>.work;
    float *dembed = g->grads + (g->embed - g->weights), *sums = (float *)s->dnorm;
    int *next = (int *)xcalloc((size_t)(V + 1), sizeof(int)), *places = (int *)xmalloc((size_t)N * sizeof(int));
    RowList *lists = (RowList *)xmalloc((size_t)row_lists(N) * sizeof *lists), *long_ones = lists + N + 1;
    int count = 0, long_count = 0, parts = 0;
    for (int64_t i = 0; i < N; i++) next[tokens[i] + 1]++;
    for (int64_t v = 0; v < V; v++) {
        const int rows = next[v + 1];
        if (rows > LIST_ROWS) long_ones[long_count++] = RowList{parts, (int)v};
        for (int i = 0; i < rows; i += LIST_ROWS) lists[count++] = RowList{next[v] + i, rows > LIST_ROWS ? ~parts++ : (int)v};
        next[v + 1] += next[v];
    }
    lists[count] = RowList{(int)N, 0};
    long_ones[long_count] = RowList{parts, 0};
    memmove(lists + count + 1, long_ones, (size_t)(long_count + 1) * sizeof *lists);
    for (int64_t i = 0; i < N; i++) places[next[tokens[i]]++] = (int)i;
    to_device(s->places, places, N * (int64_t)sizeof(int));
    to_device(s->lists, lists, (count + long_count + 2) * (int64_t)sizeof *lists);
    add_rows<F>(dembed, sums, s->dx, s->places, s->lists, count, C);
    add_rows<float>(dembed, NULL, sums, NULL, s->lists + count + 1, long_count, C);
    free(next);
    free(places);
    free(lists);
}

// What forward did not keep of a layer, from its input on. Of the norms it leaves norm2, for the FFN's backward.
template <typename F>
static void gpu_layer_again(Model *g, int layer, int64_t B, int64_t T, const StepInfo *info) {
    const Config *c = &g->config;
    const LayerWeights *w = &g->layers[layer];
    const GpuActs<F> *a = &net<F>.acts[layer];
    if (g->recompute >= 2) {
        gpu_norm_again<F>(a->norm1, a->rstd1, a->x, small(g, w->norm1), B * T, c->hidden_size);
        gpu_attention_layer_forward<F>(g, layer, B, T, info);
    } else if (g->recompute >= 1) {
        gpu_norm_again<F>(a->norm2, a->rstd2, a->mid, small(g, w->norm2), B * T, c->hidden_size);
    }
    if (g->recompute < 1) return;
    gpu_ffn_inputs_forward<F>(g, layer, B * T, info);
    if (!layer_is_moe(c, layer)) return;
    const MoeShape moe = moe_shape(c, B * T, g->parts, info);
    gpu_moe_gate_up<F>(a->expert_gate_up, a->norm2, matrix<F>(g, w->experts), &a->routing, &moe, &net<F>.work.moe);
}

// A bucket's gradients are what they will be on this rank: the sums over the ranks are made while backward goes on.
static void bucket_done(Model *g, int bucket, const StepInfo *info) {
    int64_t begin, end;
    if (comm.ranks == 1 || !info->last) return;
    bucket_range(g, bucket, &begin, &end);
    nccl_after_compute();
    nccl_reduce(g->grads, begin, end);
}

template <typename F>
static double gpu_forward_backward(Model *m, const int *tokens, const int *targets, int64_t B, int64_t T, const StepInfo *info) {
    Model *g = m->twin;
    GpuScratch<F> *s = &net<F>.work;
    const int64_t N = B * T;
    gpu_layers_forward<F>(m, tokens, B, T, info);
    gpu_head_loss<F>(g, targets, N, info);
    bucket_done(g, bucket_count(g) - 1, info);
    for (int l = g->config.num_hidden_layers - 1; l >= 0; l--) {
        gpu_layer_again<F>(g, l, B, T, info);
        gpu_ffn_layer_backward<F>(g, l, B, T, info);
        gpu_attention_layer_backward<F>(g, l, B, T, info);
        bucket_done(g, 1 + l, info);
    }
    dropout_backward(s->dx, s->dx, N, dropout_at(g, B, T, 0, info));      // in place
    gpu_embed_backward<F>(g, tokens, N);
    bucket_done(g, 0, info);
    return mean_loss(s->loss, N);
}

double device_forward_backward(Model *m, const int *tokens, const int *targets, int64_t B, int64_t T, const StepInfo *info) {
    return m->loss = is_bf16(&m->config) ? gpu_forward_backward<bf16>(m, tokens, targets, B, T, info) : gpu_forward_backward<float>(m, tokens, targets, B, T, info);
}

template <typename F>
static void fetch_outputs(float *outputs, const Config *c, int64_t n) {
    const int64_t C = c->hidden_size;
    for (int64_t l = 0; l <= c->num_hidden_layers; l++)
        fetch_rows(outputs + l * n * C, l < c->num_hidden_layers ? net<F>.acts[l].x : net<F>.acts[l - 1].out, n, C, C);
}

int device_bad_layer(const Model *m, int64_t n) {
    Model look = *m;        // the outputs, fetched for once
    const int64_t size = n * m->config.hidden_size, L = m->config.num_hidden_layers;
    float *outputs = (float *)xmalloc((size_t)((L + 1) * size) * sizeof(float));
    if (is_bf16(&m->config)) fetch_outputs<bf16>(outputs, &m->config, n);
    else fetch_outputs<float>(outputs, &m->config, n);
    look.acts = (LayerActs *)xcalloc((size_t)L, sizeof(LayerActs));
    for (int64_t l = 0; l < L; l++) look.acts[l].x = outputs + l * size, look.acts[l].out = outputs + (l + 1) * size;
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

// Backward has asked for the sums, bucket by bucket.
void device_reduce_grads(Model *m) {
    (void)m;
    if (comm.ranks > 1) nccl_wait();
}

double device_grad_norm(const Model *m) {
    const Model *g = m->twin;
    const int slices = comm.shards > 1;
    double *place = is_bf16(&m->config) ? net<bf16>.work.norm_sums : net<float>.work.norm_sums, total = 0;
    int64_t chunks = 0;
    for (int b = 0; b < (slices ? bucket_count(g) : 1); b++) {
        int64_t from = 0, to = g->num_elements;
        if (slices) bucket_share(g, b, &from, &to);
        if (from == to) continue;
        const unsigned blocks = grid(to - from, SUM_CHUNK);
        square_sums_kernel<<<blocks, THREADS>>>(place + chunks, g->grads + from, to - from);
        LAUNCHED();
        chunks += blocks;
    }
    double *sums = (double *)xmalloc((size_t)chunks * sizeof(double));
    to_host(sums, place, chunks * (int64_t)sizeof(double));
    for (int64_t i = 0; i < chunks; i++) total += sums[i];
    free(sums);
    if (slices) comm_sum(&total, 1);
    return sqrt(total);
}

typedef struct AdamStep { float b1, b2, eps, clip, rate, inverse, shrink; int stochastic; } AdamStep;

// `copy`: the weights in bf16, or NULL; `place` is where w lies among all weights.
__global__ void adamw_kernel(float *w, bf16 *copy, float *am, float *av, const float *grad, int64_t place, int64_t n, AdamStep a) {
    const int64_t i = global_thread();
    if (i >= n) return;
    const float g = grad[i] * a.clip;
    am[i] = a.b1 * am[i] + (1 - a.b1) * g;
    av[i] = a.b2 * av[i] + (1 - a.b2) * g * g;
    w[i] -= a.rate * am[i] / (sqrtf(av[i] * a.inverse) + a.eps) + a.shrink * w[i];
    if (copy) copy[i] = round_weight(w[i], place + i, a.stochastic);
}

void device_adamw(Model *m, double lr, double beta1, double beta2, double eps, double decay, int64_t t, double clip) {
    const Model *g = m->twin;
    AdamStep a = {(float)beta1, (float)beta2, (float)eps, (float)clip, (float)(lr / (1 - pow(beta1, (double)t))), (float)(1 / (1 - pow(beta2, (double)t))), 0, m->stochastic_rounding};
    const int64_t small_bytes = zero1.masters ? count_small(g, NULL) * (int64_t)sizeof(float) : 0;
    device_zero(zero1.small, small_bytes);
    for (int i = 0; i < g->num_slices; i++) {
        const Slice *slice = &g->slices[i];
        const Param *p = &g->params[slice->param];
        const int64_t at = p->offset + slice->first;
        float *w = zero1.masters ? zero1.masters + slice->at : g->weights + at;
        bf16 *copy = is_bf16(&m->config) ? net<bf16>.weights + at : NULL;
        a.shrink = (float)(param_decays(p) ? lr * decay : 0);
        adamw_kernel<<<grid(slice->count, THREADS), THREADS>>>(w, copy, g->adam_m + slice->at, g->adam_v + slice->at, g->grads + at, at, slice->count, a);
        LAUNCHED();
        if (zero1.masters) store_small(g, slice);
    }
    if (comm.shards > 1) {
        if (!zero1.masters) gather_buckets(g, g->weights);
        else {
            gather_buckets(g, net<bf16>.weights);
            nccl_sum(zero1.small, small_bytes / (int64_t)sizeof(float));      // each number is one rank's, and 0 on the others
        }
        nccl_wait();
    }
    CUDA(cudaDeviceSynchronize());      // so that a step's time is its own
}

#ifndef NSA_CU_NO_MAIN
int main(int argc, char **argv) {
    program_name = "train_nsacu";
    return train_main(argc, argv);
}
#endif
