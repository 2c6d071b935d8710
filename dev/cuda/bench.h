// What the programs of this folder share; include it after train_nsa.cu.

// x (n) normal random numbers, the same for the same seed.
template <typename F>
__global__ void normal_kernel(F *x, int64_t n, uint32_t seed) {
    const int64_t i = global_thread();
    if (i >= n) return;
    uint32_t word[4];
    const uint32_t counter[4] = {(uint32_t)i, (uint32_t)(i >> 32), 0, 0}, key[2] = {seed, 0};
    philox4x32(word, counter, key);
    const float u = ((float)word[0] + 0.5f) * 2.3283064e-10f, angle = (float)word[1] * 1.4629180e-9f;      // Box and Muller: 2^-32, 2π·2^-32
    x[i] = (F)(sqrtf(-2 * logf(u)) * cosf(angle));
}
template <typename F>
static void fill_normal(F *x, int64_t n, uint32_t seed) {
    normal_kernel<<<grid(n, THREADS), THREADS>>>(x, n, seed);
    LAUNCHED();
}

static int ascending(const void *a, const void *b) {
    const float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

// The median time of `runs` runs of `work` by the GPU's clock, after one that is not counted; `before` each, whose time is not either.
enum { MOST_RUNS = 101 };
template <typename Before, typename Run>
static double median_ms(int runs, Before before, Run work) {
    float ms[MOST_RUNS];
    cudaEvent_t begin, end;
    CUDA(cudaEventCreate(&begin));
    CUDA(cudaEventCreate(&end));
    before();
    work();
    for (int i = 0; i < runs; i++) {
        before();
        CUDA(cudaEventRecord(begin));
        work();
        CUDA(cudaEventRecord(end));
        CUDA(cudaEventSynchronize(end));
        CUDA(cudaEventElapsedTime(&ms[i], begin, end));
    }
    CUDA(cudaEventDestroy(begin));
    CUDA(cudaEventDestroy(end));
    qsort(ms, (size_t)runs, sizeof *ms, ascending);
    return (double)ms[runs / 2];
}
template <typename Run>
static double median_ms(int runs, Run work) { return median_ms(runs, [] {}, work); }

// |a - b| / |b|, norms; NaN is not small.
static double error_of(const float *a, const float *b, int64_t n) {
    double diff = 0, norm = 0;
    for (int64_t i = 0; i < n; i++) {
        diff += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        norm += (double)b[i] * (double)b[i];
    }
    const double e = sqrt(diff / norm);
    return diff == 0 ? 0 : e == e ? e : INFINITY;
}

// How many different blocks `count` neighbouring queries of the first text take together, on average; alone each takes up to n. block_idx
// (T,KV,n) is the host's.
static double blocks_together(const int *block_idx, int64_t T, int KV, int n, int64_t sel_block, int count) {
    int64_t groups = 0, different = 0, *seen = (int64_t *)xcalloc((size_t)((T - 1) / sel_block + 1), sizeof *seen);
    for (int kv = 0; kv < KV; kv++)
        for (int64_t t0 = 0; t0 + count <= T; t0 += count) {
            groups++;
            for (int64_t i = 0; i < (int64_t)count * n; i++) {
                const int block = block_idx[((t0 + i / n) * KV + kv) * n + i % n];
                if (block >= 0 && seen[block] != groups) seen[block] = groups, different++;
            }
        }
    free(seen);
    return (double)different / (double)max64(groups, 1);
}
static void print_sharing(const int *device_block_idx, int64_t T, int KV, int n, int64_t sel_block) {
    const int64_t count = T * KV * n;
    int *idx = (int *)xmalloc((size_t)count * sizeof *idx);
    to_host(idx, device_block_idx, count * (int64_t)sizeof *idx);
    printf("    %.1f blocks a query; 4 neighbours take %.1f different ones together, 8 take %.1f\n", blocks_together(idx, T, KV, n, sel_block, 1),
           blocks_together(idx, T, KV, n, sel_block, 4), blocks_together(idx, T, KV, n, sel_block, 8));
    free(idx);
}
