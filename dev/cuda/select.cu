// The choice of blocks: from queries and compressed keys to block_idx (paper eq. 8 to 12), without any gradient.
//
//   weights   what the heads of a group give to each compressed block: scores once more, on tensor cores (fast_select_weights)
//   choice    version 1: select_blocks_kernel, any n: the best of all, n times over, in memory
//             version 2: select_few_kernel, n - n_init - n_local <= 32: the best so far one a lane, importances pass by in registers
//
//   make build/select && build/select            both choices against the CPU's, with many ties
//   build/select bench 65536 64 4 128            times on this GPU: T, heads, KV heads, D; preset paper, random normal q and k

#define NSA_CU_NO_MAIN
#include "../../train_nsa.cu"
#include "test/check.h"
#include "bench.h"

static Rng rng = {31, 1, 0};

// The last `rows` rows of a text of `blocks` blocks. Weights are small whole numbers: sums are exact, and equal ones frequent.
static void check_choice(int64_t blocks, int KV, SelectShape sel, int64_t rows, uint64_t values) {
    const int64_t T = blocks * sel.sel_block - sel.sel_block / 2;
    AttentionShape s;
    memset(&s, 0, sizeof s);
    s.B = 1, s.T = T, s.KV = KV, s.H = KV, s.Tk = compressed_seen(T - 1, sel.cmp_block, sel.cmp_stride);
    const int64_t row0 = T * KV - rows, size = rows * s.Tk, count = rows * sel.n;
    float *weights = (float *)xmalloc((size_t)size * sizeof *weights), *importance = (float *)xmalloc((size_t)(blocks + 1) * sizeof *importance);
    int *want = (int *)xmalloc((size_t)count * sizeof *want), *got = (int *)xmalloc((size_t)count * sizeof *got);
    for (int64_t i = 0; i < size; i++) weights[i] = (float)rng_below(&rng, values);
    for (int64_t i = 0; i < rows; i++) {
        const int64_t t = (row0 + i) / KV;
        block_importance(importance, weights + i * s.Tk, t / sel.sel_block + 1, compressed_seen(t, sel.cmp_block, sel.cmp_stride), &sel);
        choose_blocks(want + i * sel.n, importance, t / sel.sel_block + 1, &sel);
    }
    float *device_weights = (float *)device_malloc(size * 4), *device_importance = (float *)device_malloc(rows * (T / sel.sel_block + 1) * 4);
    int *block_idx = (int *)device_malloc(T * KV * sel.n * 4);
    to_device(device_weights, weights, size * 4);
    for (int version = 1; version <= 2; version++) {
        if (version == 2 && sel.n - sel.n_init - sel.n_local > WARP) continue;
        CUDA(cudaMemset(block_idx, 0x77, (size_t)(T * KV * sel.n * 4)));
        if (version == 1) select_blocks_kernel<<<grid(rows, WARPS), THREADS>>>(block_idx, device_importance, device_weights, row0, rows, s, sel);
        else select_few_kernel<<<grid(rows, WARPS), THREADS>>>(block_idx, device_weights, row0, rows, s, sel);
        LAUNCHED();
        to_host(got, block_idx + row0 * sel.n, count * 4);
        int64_t other = 0;
        for (int64_t i = 0; i < count; i++) other += got[i] != want[i];
        check(other == 0, "version %d, %d blocks, l=%d d=%d l'=%d n=%d+%d+%d, KV=%d: %d of %d are others than the CPU's", version, (int)blocks, sel.cmp_block, sel.cmp_stride,
              sel.sel_block, sel.n_init, sel.n - sel.n_init - sel.n_local, sel.n_local, KV, (int)other, (int)count);
    }
    void *all[] = {device_weights, device_importance, block_idx};
    for (int i = 0; i < 3; i++) CUDA(cudaFree(all[i]));
    free(weights), free(importance), free(want), free(got);
}

static int check_all(void) {
    const SelectShape paper = {32, 16, 64, 16, 1, 2}, one = {8, 8, 8, 4, 0, 1}, forced = {8, 4, 8, 3, 1, 2}, most = {16, 4, 16, 35, 1, 2}, more = {16, 8, 32, 60, 2, 3};
    const SelectShape *shapes[] = {&paper, &one, &forced, &most, &more};
    const int64_t blocks[] = {3, 17, 36, 250, 300, 1100};
    for (int i = 0; i < 5; i++)
        for (int j = 0; j < 6; j++) {
            check_choice(blocks[j], 1 + j % 2, *shapes[i], min64(40, blocks[j] * shapes[i]->sel_block / 2), 2);
            check_choice(blocks[j], 1 + j % 2, *shapes[i], min64(40, blocks[j] * shapes[i]->sel_block / 2), 1000);
        }
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}

// ----------------------------------------------------------------------------
// Times

static int bench(int64_t T, int H, int KV, int D) {
    const SelectShape sel = {32, 16, 64, 16, 1, 2};
    const Mask mask = {MASK_COMPRESSED, 0, sel.cmp_block, sel.cmp_stride, 0, 0, NULL};
    AttentionShape s = {1, T, T, H, KV, D, D, (int64_t)H * D, (int64_t)KV * D, (int64_t)KV * D, 0};
    s.Tk = compressed_seen(T - 1, sel.cmp_block, sel.cmp_stride);
    if (!fast_attention(&s, &mask)) die(2, "bench: the fast tier takes D = 64 and 128");
    const int64_t rows = T * KV, chunk = select_chunk(&s, &sel), nq = T * H * D, nk = s.Tk * KV * D;
    bf16 *q = (bf16 *)device_malloc(nq * 2), *k = (bf16 *)device_malloc(nk * 2), *out = (bf16 *)device_malloc(nq * 2);
    float *lse = (float *)device_malloc(T * H * 4), *weights = (float *)device_malloc(gpu_select_scratch(&s, &sel) * 4), *importance = weights + chunk * s.Tk;
    int *block_idx = (int *)device_malloc(rows * sel.n * 4);
    fill_normal(q, nq, 1);
    fill_normal(k, nk, 2);
    fast_attention_forward(out, lse, q, k, k, &mask, &s);
    // Each part over all chunks, the choice on weights of the last one: what it costs does not depend on them much.
    const auto each = [&](auto part) {
        for (int64_t row = 0; row < rows; row += chunk) part(row, min64(chunk, rows - row));
        LAUNCHED();
    };
    const double scores = median_ms(9, [&] { each([&](int64_t row, int64_t n) { fast_select_weights(weights, q, k, lse, row, n, &s, &sel); }); });
    const double first = median_ms(9, [&] { each([&](int64_t row, int64_t n) { select_blocks_kernel<<<grid(n, WARPS), THREADS>>>(block_idx, importance, weights, row, n, s, sel); }); });
    const double second = median_ms(9, [&] { each([&](int64_t row, int64_t n) { select_few_kernel<<<grid(n, WARPS), THREADS>>>(block_idx, weights, row, n, s, sel); }); });
    const double all = median_ms(9, [&] { gpu_select_forward(block_idx, q, k, lse, &s, &sel, &mask, weights); });
    const double flops = (double)T * H * (double)s.Tk / 2 * 2 * D, bytes = (double)rows * (double)s.Tk / 2 * 4;
    printf("T=%" PRId64 " H=%d KV=%d D=%d, %" PRId64 " rows a chunk, on %s\n", T, H, KV, D, chunk, gpu.name);
    printf("weights             %8.3f ms  %6.0f TFLOP/s\n", scores, flops / scores * 1e-9);
    printf("choice, version 1   %8.3f ms  %6.0f GB/s of weights\n", first, bytes / first * 1e-6);
    printf("choice, version 2   %8.3f ms  %6.0f GB/s\n", second, bytes / second * 1e-6);
    printf("all                 %8.3f ms\n", all);
    void *memory[] = {q, k, out, lse, weights, block_idx};
    for (int i = 0; i < 6; i++) CUDA(cudaFree(memory[i]));
    return 0;
}

int main(int argc, char **argv) {
    program_name = "select";
    setvbuf(stdout, NULL, _IOLBF, 0);
    device_open();
    if (argc == 1 || (argc == 2 && !strcmp(argv[1], "check"))) return check_all();
    if (argc != 6 || strcmp(argv[1], "bench")) {
        fprintf(stderr, "usage: select [check] | select bench T H KV D\n");
        return 2;
    }
    const int64_t T = atoll(argv[2]);
    const int H = atoi(argv[3]), KV = atoi(argv[4]), D = atoi(argv[5]);
    if (T < 64 || H < 1 || KV < 1 || H % KV) die(2, "bench: T is at least 64, and KV divides H");
    return bench(T, H, KV, D);
}
