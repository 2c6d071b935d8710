// The choice of blocks: from queries and compressed keys to block_idx (paper eq. 8 to 12), without any gradient.
//
//   importance    version 1: scores once more with mma.sync, their weights to memory (fast_select_weights), summed into blocks by a kernel of their own (gpu_importance)
//                 version 4: no scores of its own: Hopper's forward kernel of the compressed branch leaves each head's weights of blocks in the L2 cache, and warps of it that
//                 have nothing else to do sum them up (hopper_importance_forward). Versions 2 and 3 are told of in README.md.
//   choice        version 1: select_blocks_kernel, any n: the best of all, n times over, in memory
//                 version 2: select_few_kernel, n - n_init - n_local <= 32: the best so far one a lane, importances pass by in registers
//
//   make build/select && build/select            importances against double precision, choices against the CPU's, with many ties
//   build/select bench 65536 64 4 128            times on this GPU: T, heads, KV heads, D; preset paper, random normal q and k

#define NSA_CU_NO_MAIN
#include "../../train_nsa.cu"
#include "test/check.h"
#include "bench.h"
#include <algorithm>
#include <vector>

static Rng rng = {31, 1, 0};

static SelectShape paper = {32, 16, 64, 16, 1, 2};

// The choice that the CPU makes of the rows row0 .. row0+rows-1, from their importances (rows, row_size).
static void host_choice(int *idx, const float *importance, int64_t row_size, int64_t row0, int64_t rows, const AttentionShape *s, const SelectShape *sel) {
    for (int64_t i = 0; i < rows; i++) choose_blocks(idx + i * sel->n, importance + i * row_size, (row0 + i) / s->KV % s->T / sel->sel_block + 1, sel);
}
static int64_t different(const int *a, const int *b, int64_t n) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) count += a[i] != b[i];
    return count;
}

// The last `rows` rows of a text of `blocks` blocks. Weights are small whole numbers: sums are exact, and equal ones frequent.
static void check_choice(int64_t blocks, int KV, SelectShape sel, int64_t rows, uint64_t values) {
    const int64_t T = blocks * sel.sel_block - sel.sel_block / 2;
    AttentionShape s;
    memset(&s, 0, sizeof s);
    s.B = 1, s.T = T, s.KV = KV, s.H = KV, s.Tk = compressed_seen(T - 1, sel.cmp_block, sel.cmp_stride);
    const int64_t row0 = T * KV - rows, size = rows * s.Tk, count = rows * sel.n, row_size = importance_row(&s, &sel);
    float *weights = (float *)xmalloc((size_t)size * sizeof *weights), *importance = (float *)xmalloc((size_t)(rows * row_size) * sizeof *importance);
    int *want = (int *)xmalloc((size_t)count * sizeof *want), *got = (int *)xmalloc((size_t)count * sizeof *got);
    for (int64_t i = 0; i < size; i++) weights[i] = (float)rng_below(&rng, values);
    for (int64_t i = 0; i < rows; i++) {
        const int64_t t = (row0 + i) / KV;
        block_importance(importance + i * row_size, weights + i * s.Tk, t / sel.sel_block + 1, compressed_seen(t, sel.cmp_block, sel.cmp_stride), &sel);
    }
    host_choice(want, importance, row_size, row0, rows, &s, &sel);
    float *device_weights = (float *)device_malloc(size * 4), *device_importance = (float *)device_malloc(rows * row_size * 4);
    int *block_idx = (int *)device_malloc(T * KV * sel.n * 4);
    to_device(device_weights, weights, size * 4);
    for (int version = 1; version <= 2; version++) {
        if (version == 2 && free_places(&sel) > WARP) continue;
        CUDA(cudaMemset(block_idx, 0x77, (size_t)(T * KV * sel.n * 4)));
        CUDA(cudaMemset(device_importance, 0xff, (size_t)(rows * row_size * 4)));
        gpu_importance(device_importance, device_weights, row0, rows, &s, &sel);
        const auto kernel = version == 1 ? select_blocks_kernel : select_few_kernel;
        kernel<<<grid(rows, WARPS), THREADS>>>(block_idx, device_importance, row_size, row0, rows, s, sel);
        LAUNCHED();
        to_host(got, block_idx + row0 * sel.n, count * 4);
        const int64_t other = different(got, want, count);
        check(other == 0, "version %d, %d blocks, l=%d d=%d l'=%d n=%d+%d+%d, KV=%d: %d of %d are others than the CPU's", version, (int)blocks, sel.cmp_block, sel.cmp_stride,
              sel.sel_block, sel.n_init, free_places(&sel), sel.n_local, KV, (int)other, (int)count);
    }
    void *all[] = {device_weights, device_importance, block_idx};
    for (int i = 0; i < 3; i++) CUDA(cudaFree(all[i]));
    free(weights), free(importance), free(want), free(got);
}

static float *host_of_bf16(const bf16 *x, int64_t n) {
    uint16_t *bits = (uint16_t *)xmalloc((size_t)n * sizeof *bits);
    float *y = (float *)xmalloc((size_t)n * sizeof *y);
    to_host(bits, x, n * 2);
    for (int64_t i = 0; i < n; i++) {
        const uint32_t word = (uint32_t)bits[i] << 16;
        memcpy(y + i, &word, 4);
    }
    free(bits);
    return y;
}

// The compressed branch that leaves importances: its result and log-sum-exp against double precision, then `got`, the importances, and the choice; first with a block
// of threads for each tile of rows, then with 3, which use the memory of what is left again and again, and must find the same.
template <typename Importances, typename Choices>
static void check_importances_left(const bf16 *q, const bf16 *k, const float *host_q, const float *host_k, const float *host_lse, float *got, int *block_idx, const AttentionShape *s,
                                   const SelectShape *sel, const Mask *mask, Importances importances_right, Choices choices_right) {
    const int64_t tokens = s->B * s->T, heads = tokens * s->H, nv = s->B * s->Tk * s->v_row, G = s->H / s->KV, n = tokens * s->KV * importance_row(s, sel);
    const int processors = gpu.multiProcessorCount;
    bf16 *v = (bf16 *)device_malloc(nv * 2), *out = (bf16 *)device_malloc(heads * s->Dv * 2);
    float *lse = (float *)device_malloc(heads * 4), *importance = (float *)device_malloc(n * 4), *got_lse = (float *)xmalloc((size_t)heads * 4);
    fill_normal(v, nv, 77);
    gpu.multiProcessorCount = 1 << 20;
    const int64_t bytes = left_numbers(s, sel) * 4;
    float *scratch = (float *)device_malloc(bytes);
    CUDA(cudaMemset(scratch, 0xff, (size_t)bytes));
    CUDA(cudaMemset(importance, 0xff, (size_t)(n * 4)));
    hopper_importance_forward(out, lse, importance, q, k, v, mask, s, sel, scratch);
    to_host(got, importance, n * 4);
    gpu_choose_blocks(block_idx, importance, 0, tokens * s->KV, s, sel);       // which may destroy them
    to_host(got_lse, lse, heads * 4);
    for (int64_t i = 0; i < n; i++) got[i] = ldexpf(got[i], -WEIGHT_SHIFT - FACTOR_SHIFT);
    float *host_v = host_of_bf16(v, nv), *host_out = host_of_bf16(out, heads * s->Dv);
    double error = 0, size = 0, lse_error = 0;
    for (int64_t i = 0; i < heads; i++) {
        const int64_t bt = i / s->H, h = i % s->H, kv = h / G, b = bt / s->T, seen = compressed_seen(bt % s->T, sel->cmp_block, sel->cmp_stride);
        std::vector<double> sum((size_t)s->Dv);
        for (int64_t x = 0; x < seen; x++) {
            double score = 0;
            for (int c = 0; c < s->D; c++) score += (double)host_q[bt * s->q_row + h * s->D + c] * (double)host_k[(b * s->Tk + x) * s->k_row + kv * s->D + c];
            for (int c = 0; c < s->Dv; c++) sum[(size_t)c] += exp(score / sqrt((double)s->D) - (double)host_lse[i]) * (double)host_v[(b * s->Tk + x) * s->v_row + kv * s->Dv + c];
        }
        for (int c = 0; c < s->Dv; c++) {
            const double x = sum[(size_t)c], difference = (double)host_out[i * s->Dv + c] - x;
            error += difference * difference;
            size += x * x;
        }
        if (seen) lse_error = fmax(lse_error, fabs((double)got_lse[i] - (double)host_lse[i]));
    }
    check(sqrt(error / size) < 5e-3 && lse_error < 1e-4, "compressed branch that leaves importances, B=%d T=%d G=%d KV=%d D=%d: errors %.1e and, of lse, %.1e", (int)s->B, (int)s->T, (int)G, s->KV, s->D,
          sqrt(error / size), lse_error);
    importances_right(4, 5e-4);        // weights of 11 digits
    choices_right(4, 1e-5);
    gpu.multiProcessorCount = 3;
    CUDA(cudaMemset(scratch, 0xff, (size_t)bytes));
    hopper_importance_forward(out, lse, importance, q, k, v, mask, s, sel, scratch);
    std::vector<float> again((size_t)n);
    to_host(again.data(), importance, n * 4);
    float *out_again = host_of_bf16(out, heads * s->Dv);
    int other = memcmp(out_again, host_out, (size_t)(heads * s->Dv) * 4) != 0;
    for (int64_t i = 0; i < tokens * s->KV; i++)
        for (int64_t j = 0, at = i * importance_row(s, sel); j < choice_end(i / s->KV % s->T, sel); j++, at++) other += ldexpf(again[(size_t)at], -WEIGHT_SHIFT - FACTOR_SHIFT) != got[at];
    check(other == 0, "compressed branch that leaves importances, B=%d T=%d G=%d KV=%d D=%d: 3 blocks of threads find others than many", (int)s->B, (int)s->T, (int)G, s->KV, s->D);
    gpu.multiProcessorCount = processors;
    void *all[] = {v, out, lse, scratch, importance};
    for (int i = 0; i < 5; i++) CUDA(cudaFree(all[i]));
    free(got_lse), free(host_v), free(host_out), free(out_again);
}

// Importances from random q and k, in two calls whose cut lies anywhere, against double precision; then the whole choice against the CPU's of the same importances.
// q stands in a wider row.
static const double IMPORTANCE_ERROR = 1e-4;
static void check_importance(int64_t B, int64_t T, int G, int KV, int D, SelectShape sel, int64_t cut) {
    const Mask mask = {MASK_COMPRESSED, 0, sel.cmp_block, sel.cmp_stride, 0, 0, NULL};
    AttentionShape s = {B, T, compressed_seen(T - 1, sel.cmp_block, sel.cmp_stride), G * KV, KV, D, D, (int64_t)G * KV * D + 24, (int64_t)KV * D, (int64_t)KV * D};
    const int64_t rows = B * T * KV, nq = B * T * s.q_row, nk = B * s.Tk * s.k_row, nl = B * T * s.H, row_size = importance_row(&s, &sel), per_block = sel.sel_block / sel.cmp_stride;
    bf16 *q = (bf16 *)device_malloc(nq * 2), *k = (bf16 *)device_malloc(nk * 2);
    fill_normal(q, nq, (uint32_t)(T + G));
    fill_normal(k, nk, (uint32_t)(T + D));
    float *host_q = host_of_bf16(q, nq), *host_k = host_of_bf16(k, nk), *host_lse = (float *)xmalloc((size_t)nl * 4), *got = (float *)xmalloc((size_t)(rows * row_size) * 4);
    double *want = (double *)xcalloc((size_t)(rows * row_size), sizeof *want), *p = (double *)xmalloc((size_t)s.Tk * sizeof *p);
    for (int64_t row = 0; row < rows; row++) {
        const int64_t kv = row % KV, bt = row / KV, b = bt / T, seen = compressed_seen(bt % T, sel.cmp_block, sel.cmp_stride);
        for (int64_t h = kv * G; h < (kv + 1) * G; h++) {
            double sum = 0;
            for (int64_t i = 0; i < seen; i++) {
                double score = 0;
                for (int c = 0; c < D; c++) score += (double)host_q[bt * s.q_row + h * D + c] * (double)host_k[(b * s.Tk + i) * s.k_row + kv * D + c];
                sum += p[i] = exp(score / sqrt((double)D));
            }
            host_lse[bt * s.H + h] = (float)log(sum);
            for (int64_t i = 0; i < seen; i++)
                for (int64_t j = i / per_block; j < row_size && j * per_block < i + sel.cmp_block / sel.cmp_stride; j++)
                    want[row * row_size + j] += p[i] / exp((double)host_lse[bt * s.H + h]) * (double)pieces_inside(i, j, sel.cmp_block / sel.cmp_stride, per_block);
        }
    }
    float *lse = (float *)device_malloc(nl * 4), *importance = (float *)device_malloc(rows * row_size * 4), *weights = (float *)device_malloc(rows * s.Tk * 4);
    float *scratch = (float *)device_malloc(gpu_select_scratch<bf16>(&s, &sel, &mask) * 4);
    int *block_idx = (int *)device_malloc(rows * sel.n * 4), *chosen = (int *)xmalloc((size_t)(rows * sel.n) * 4), *host_chosen = (int *)xmalloc((size_t)(rows * sel.n) * 4);
    to_device(lse, host_lse, nl * 4);
    const auto importances_right = [&](int version, double limit) {
        double worst = 0;
        for (int64_t row = 0; row < rows; row++)
            for (int64_t j = 0; j < choice_end(row / KV % T, &sel); j++) {
                const double x = want[row * row_size + j], error = fabs((double)got[row * row_size + j] - x) / x;
                worst = error <= worst ? worst : error == error ? error : INFINITY;
            }
        check(worst < limit, "version %d, importances of B=%d T=%d G=%d KV=%d D=%d, l=%d d=%d l'=%d n=%d: error %.1e", version, (int)B, (int)T, G, KV, D, sel.cmp_block, sel.cmp_stride,
              sel.sel_block, sel.n, worst);
    };
    // The choices are the CPU's of these importances. With a `tie` the blocks' numbers may be others, where another order of adding makes them equal or not: the
    // importances chosen, in order of size, are the CPU's up to that.
    const auto choices_right = [&](int version, double tie) {
        int64_t other = 0;
        to_host(chosen, block_idx, rows * sel.n * 4);
        host_choice(host_chosen, got, row_size, 0, rows, &s, &sel);
        for (int64_t row = 0; row < rows; row++) {
            const int *mine = chosen + row * sel.n, *cpu = host_chosen + row * sel.n;
            if (!different(mine, cpu, sel.n)) continue;
            std::vector<double> of_mine, of_cpu;
            int wrong = tie == 0;
            for (int i = 0; i < sel.n && !wrong; i++) {
                const int is_free = i >= sel.n_init && i < sel.n - sel.n_local;
                wrong = (!is_free && mine[i] != cpu[i]) || (i > 0 && mine[i] <= mine[i - 1]) || mine[i] >= row_size;
                if (!wrong && is_free) of_mine.push_back((double)got[row * row_size + mine[i]]), of_cpu.push_back((double)got[row * row_size + cpu[i]]);
            }
            std::sort(of_mine.begin(), of_mine.end());
            std::sort(of_cpu.begin(), of_cpu.end());
            for (size_t i = 0; i < of_mine.size(); i++) wrong |= !(fabs(of_mine[i] - of_cpu[i]) <= tie * of_cpu[i]);
            other += wrong;
        }
        check(other == 0, "version %d, choice of B=%d T=%d G=%d KV=%d D=%d: those of %d of %d rows are others than the CPU's", version, (int)B, (int)T, G, KV, D, (int)other, (int)rows);
    };
    if (fast_attention(&s, &mask)) {
        CUDA(cudaMemset(importance, 0xff, (size_t)(rows * row_size * 4)));
        for (int64_t row = 0, n = cut; row < rows; row += n, n = rows - row)
            fast_select_weights(weights + row * s.Tk, q, k, lse, row, n, &s, &sel), gpu_importance(importance + row * row_size, weights + row * s.Tk, row, n, &s, &sel);
        to_host(got, importance, rows * row_size * 4);
        importances_right(1, IMPORTANCE_ERROR);
    }
    CUDA(cudaMemset(block_idx, 0x77, (size_t)(rows * sel.n * 4)));
    gpu_select_forward(block_idx, q, k, lse, &s, &sel, &mask, scratch);
    choices_right(1, 0);
    if (fast_attention(&s, &mask) && hopper_choice(&s, &sel, &mask)) check_importances_left(q, k, host_q, host_k, host_lse, got, block_idx, &s, &sel, &mask, importances_right, choices_right);
    void *all[] = {q, k, lse, importance, weights, scratch, block_idx};
    for (int i = 0; i < 7; i++) CUDA(cudaFree(all[i]));
    free(host_q), free(host_k), free(host_lse), free(got), free(want), free(p), free(chosen), free(host_chosen);
}

static int check_all(void) {
    const SelectShape one = {8, 8, 8, 4, 0, 1}, forced = {8, 4, 8, 3, 1, 2}, most = {16, 4, 16, 35, 1, 2}, more = {16, 8, 32, 60, 2, 3};
    const SelectShape *shapes[] = {&paper, &one, &forced, &most, &more};
    const int64_t blocks[] = {3, 17, 36, 250, 300, 1100};
    for (int i = 0; i < 5; i++)
        for (int j = 0; j < 6; j++) {
            check_choice(blocks[j], 1 + j % 2, *shapes[i], min64(40, blocks[j] * shapes[i]->sel_block / 2), 2);
            check_choice(blocks[j], 1 + j % 2, *shapes[i], min64(40, blocks[j] * shapes[i]->sel_block / 2), 1000);
        }
    // tiles of 32 blocks that end inside and at a text's end, keys that do not fill a block, groups that fill a tile of rows or not, shapes that only
    // version 1 takes; one local block, whose keys are not all seen
    const SelectShape narrow = {8, 4, 8, 4, 1, 1}, same = {8, 8, 8, 4, 0, 1}, local = {4, 2, 4, 5, 1, 2}, wide = {16, 4, 16, 40, 1, 1}, forced_only = {8, 4, 8, 3, 1, 2};
    const SelectShape fours = {8, 4, 16, 4, 1, 1}, fours_local = {4, 2, 8, 5, 1, 2}, fours_forced = {8, 4, 16, 3, 1, 2}, fours_many = {8, 4, 16, 40, 1, 1};      // as version 4 wants
    check_importance(1, 331, 16, 1, 64, fours, 100);
    check_importance(2, 277, 4, 2, 64, fours, 301);
    check_importance(1, 530, 8, 2, 128, fours, 77);
    check_importance(1, 600, 16, 1, 128, fours, 599);
    check_importance(1, 531, 6, 1, 64, fours_local, 256);
    check_importance(1, 130, 3, 2, 64, fours, 100);
    check_importance(1, 130, 2, 1, 64, fours_forced, 100);
    check_importance(1, 200, 24, 1, 128, fours, 100);
    check_importance(1, 777, 4, 1, 128, fours_many, 100);
    check_importance(1, 190, 32, 2, 64, fours_local, 100);
    check_importance(1, 331, 16, 1, 64, narrow, 100);
    check_importance(2, 277, 4, 2, 64, narrow, 301);
    check_importance(1, 530, 8, 2, 128, narrow, 77);
    check_importance(1, 600, 16, 1, 128, narrow, 599);
    check_importance(1, 300, 32, 1, 128, same, 1);
    check_importance(2, 541, 12, 1, 64, same, 500);
    check_importance(1, 531, 6, 1, 64, local, 256);
    check_importance(1, 777, 4, 1, 128, wide, 100);
    check_importance(1, 130, 3, 2, 64, narrow, 100);
    check_importance(1, 130, 2, 1, 64, forced_only, 100);
    check_importance(1, 1500, 16, 1, 64, paper, 1024);
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}

// ----------------------------------------------------------------------------
// Times

enum { RUNS = 9 };

static int bench(int64_t T, int H, int KV, int D) {
    const SelectShape sel = paper;
    const Mask mask = {MASK_COMPRESSED, 0, sel.cmp_block, sel.cmp_stride, 0, 0, NULL};
    AttentionShape s = {1, T, T, H, KV, D, D, (int64_t)H * D, (int64_t)KV * D, (int64_t)KV * D, 0};
    s.Tk = compressed_seen(T - 1, sel.cmp_block, sel.cmp_stride);
    if (!fast_attention(&s, &mask)) die(2, "bench: the fast tier takes D = 64 and 128");
    const int64_t rows = T * KV, row_size = importance_row(&s, &sel), chunk = select_chunk(&s, &sel), nq = T * H * D, nk = s.Tk * KV * D;
    bf16 *q = (bf16 *)device_malloc(nq * 2), *k = (bf16 *)device_malloc(nk * 2), *out = (bf16 *)device_malloc(nq * 2);
    float *lse = (float *)device_malloc(T * H * 4), *importance = (float *)device_malloc(gpu_select_scratch<bf16>(&s, &sel, &mask) * 4), *weights = importance + chunk * row_size;
    int *block_idx = (int *)device_malloc(rows * sel.n * 4);
    fill_normal(q, nq, 1);
    fill_normal(k, nk, 2);
    fast_attention_forward(out, lse, q, k, k, &mask, &s);
    const double pairs = (double)T * H * (double)s.Tk / 2, numbers = (double)rows * (double)s.Tk / 2, per_block = sel.sel_block / sel.cmp_stride;
    printf("T=%" PRId64 " H=%d KV=%d D=%d on %s; chunks of %" PRId64 " rows for version 1 of the importances\n", T, H, KV, D, gpu.name, chunk);
    // Each part over all chunks.
    const auto each = [&](int64_t size, auto part) {
        return median_ms(RUNS, [&] {
            for (int64_t row = 0; row < rows; row += size) part(row, min64(size, rows - row));
            LAUNCHED();
        });
    };
    const auto report_scores = [&](const char *name, double ms) { printf("%-44s %8.3f ms  %6.0f TFLOP/s  %5.2f T powers of 2 a second\n", name, ms, 2 * pairs * D / ms * 1e-9, pairs / ms * 1e-9); };
    const auto report_bytes = [&](const char *name, double ms, double count) { printf("%-44s %8.3f ms  %6.0f GB/s\n", name, ms, count * 4 / ms * 1e-6); };
    report_scores("weights, mma.sync", each(chunk, [&](int64_t row, int64_t n) { fast_select_weights(weights, q, k, lse, row, n, &s, &sel); }));
    report_bytes("importances of the weights", each(chunk, [&](int64_t row, int64_t n) { gpu_importance(importance, weights, row, n, &s, &sel); }), numbers * (1 + 1 / per_block));
    // The choice of the importances of the last chunk, but for version 1, which destroys them: what it costs hardly depends on them.
    report_bytes("choice, version 2", each(chunk, [&](int64_t row, int64_t n) { select_few_kernel<<<grid(n, WARPS), THREADS>>>(block_idx, importance, row_size, row, n, s, sel); }), numbers / per_block);
    report_bytes("choice, version 1", each(chunk, [&](int64_t row, int64_t n) { select_blocks_kernel<<<grid(n, WARPS), THREADS>>>(block_idx, importance, row_size, row, n, s, sel); }),
                 numbers / per_block);
    printf("%-44s %8.3f ms\n", "importances, version 1, and choice", median_ms(RUNS, [&] { gpu_select_forward(block_idx, q, k, lse, &s, &sel, &mask, importance); }));
    printf("%-44s %8.3f ms\n", "compressed branch alone", median_ms(RUNS, [&] { gpu_attention_forward(out, lse, q, k, k, &mask, &s); }));
    printf("%-44s %8.3f ms\n", "compressed branch and choice, as models run it", median_ms(RUNS, [&] { gpu_compressed_forward(out, lse, block_idx, q, k, k, &mask, &s, &sel, importance); }));
    void *memory[] = {q, k, out, lse, importance, block_idx};
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
