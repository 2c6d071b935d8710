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
static void random_numbers(F *x, int64_t n, uint32_t seed) {
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
