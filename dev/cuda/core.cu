// The whole attention of a layer as train_nsa.cu runs it between its two projections: gates, RoPE, compression of keys and values, the three
// branches and the choice of blocks, their gated sum; and backward. This is what dense attention is compared with.
//
//   make build/core && build/core                    against the CPU, in bf16
//   build/core bench T H KV D [full]                 times on this GPU, batch 1, preset paper: random normal queries, keys and values
//   build/core model FOLDER T FILE [LAYER]           those of a trained model that reads the text or tokens FILE: neighbouring queries
//                                                    of a text choose nearly the same blocks, random ones do not

#define NSA_CU_NO_MAIN
#include "../../train_nsa.cu"
#include "test/check.h"
#include "bench.h"

// A model of one layer around this attention, in bf16. What is outside of it is small.
static Config core_config(int H, int KV, int D, int full) {
    Config c = config_default();
    char err[ERR_LEN];
    c.num_hidden_layers = 1;
    c.hidden_size = 64;
    c.intermediate_size = 64;
    c.vocab_size = 256;
    c.num_attention_heads = H;
    c.num_key_value_heads = KV;
    c.head_dim = D;
    c.v_head_dim = D == 192 ? 128 : D;
    config_preset(&c, 0);      // paper
    c.attention = full ? ATTENTION_FULL : ATTENTION_NSA;
    c.torch_dtype = DTYPE_BF16;
    config_complete(&c);
    if (config_validate(&c, err) < 0) die(2, "%s", err);
    return c;
}

static void numbers(float *x, int64_t n, uint64_t seed) {
    for (int64_t i = 0; i < n; i++) x[i] = bf16_to_float(float_to_bf16((float)normal_at(seed, 1, (uint64_t)i)));
}

// n rows of the host's f32 numbers, `width` of `row` each, to bf16 on the GPU.
static void give_rows(bf16 *to, const float *x, int64_t n, int64_t width, int64_t row) {
    uint16_t *bits = (uint16_t *)xcalloc((size_t)(n * row), sizeof *bits);
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < width; j++) bits[i * row + j] = float_to_bf16(x[i * width + j]);
    to_device(to, bits, n * row * 2);
    free(bits);
}

// ----------------------------------------------------------------------------
// Against the CPU

static void check_core(int64_t B, int64_t T, int H, int KV, int D, int full) {
    const Config c = core_config(H, KV, D, full);
    const double gate_init[BRANCHES] = {-2, -2, 2};
    const int64_t N = B * T, width = wide_row(&c, 0).size, row = gpu_wide_row(&c, 0).size, heads = N * H * c.v_head_dim;
    Model cpu, gpu_model;
    model_create(&cpu, &c);
    model_alloc(&cpu, B, T, 0, 1);
    model_create(&gpu_model, &c);
    device_alloc(&gpu_model, B, T, 0, 1);
    model_init(&cpu, 3, gate_init);
    memcpy(gpu_model.weights, cpu.weights, (size_t)cpu.num_elements * sizeof(real));
    device_store(&gpu_model);
    device_zero_grads(&gpu_model);

    float *got = (float *)xmalloc((size_t)max64(max64(N * width, heads), cpu.num_elements) * sizeof *got);
    numbers(cpu.acts[0].wide, N * width, 1);
    give_rows(net<bf16>.acts[0].wide, cpu.acts[0].wide, N, width, row);
    const real *out = attention_core_forward(&cpu, 0, B, T);
    int *choice = (int *)device_malloc(max64(1, N * KV * c.sel_blocks) * (int64_t)sizeof(int));
    if (!full) to_device(choice, cpu.acts[0].block_idx, N * KV * c.sel_blocks * (int64_t)sizeof(int));
    given_block_idx = full ? NULL : &choice;
    fetch_rows(got, gpu_attention_core_forward<bf16>(gpu_model.twin, 0, B, T), N, H * c.v_head_dim, H * c.v_head_dim);
    const double forward = error_of(got, out, heads);

    numbers(cpu.scratch.dattention, heads, 2);
    give_rows(net<bf16>.work.dattention, cpu.scratch.dattention, heads, 1, 1);
    attention_core_backward(&cpu, 0, B, T);
    gpu_attention_core_backward<bf16>(gpu_model.twin, 0, B, T);
    fetch_rows(got, net<bf16>.work.dwide, N, width, row);
    const double backward = error_of(got, cpu.scratch.dwide, N * width);
    to_host(got, gpu_model.twin->grads, cpu.num_elements * (int64_t)sizeof(float));
    const double weights = full ? 0 : error_of(got, cpu.grads, cpu.num_elements);
    given_block_idx = NULL;

    printf("%-4s B=%d T=%-4d H=%-2d KV=%d D=%-3d   out %.1e  dq, dk, dv, dgates %.1e  weights of the compression %.1e\n", full ? "full" : "nsa", (int)B, (int)T, H, KV, D, forward, backward, weights);
    check(forward < 2e-2, "forward: error %.2e", forward);
    check(backward < 3e-2, "backward: error %.2e", backward);
    check(weights < 3e-2, "weights of the compression: error %.2e", weights);
    free(got);
    CUDA(cudaFree(choice));
    device_free(&gpu_model);
    model_free(&cpu);
    model_free(&gpu_model);
}

static int check_all(void) {
    for (int full = 0; full < 2; full++) {
        check_core(1, 1200, 4, 1, 64, full);
        check_core(2, 333, 4, 2, 128, full);
        check_core(1, 161, 4, 1, 192, full);
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}

// ----------------------------------------------------------------------------
// Times

// `layer` of the model, whose wide rows are there: as they are before RoPE.
static void time_core(Model *m, int layer, int64_t T) {
    const Config *c = &m->config;
    const GpuActs<bf16> *a = &net<bf16>.acts[layer];
    const int64_t row = gpu_wide_row(c, layer).size, bytes = T * row * 2, dn = T * c->num_attention_heads * c->v_head_dim;
    bf16 *wide = (bf16 *)device_malloc(bytes);
    device_copy(wide, a->wide, bytes);
    fill_normal(net<bf16>.work.dattention, dn, 5);
    const int runs = T <= 262144 ? 11 : 3;     // seconds each
    const double forward = median_ms(runs, [&] { device_copy(a->wide, wide, bytes); }, [&] { gpu_attention_core_forward<bf16>(m->twin, layer, 1, T); });
    const double backward = median_ms(runs, [&] { gpu_attention_core_backward<bf16>(m->twin, layer, 1, T); });
    printf("%s T=%" PRId64 " H=%d KV=%d D=%d/%d: forward %.3f ms, backward %.3f ms, on %s\n", layer_is_full(c, layer) ? "full" : "nsa", T, c->num_attention_heads, c->num_key_value_heads,
           c->head_dim, c->v_head_dim, forward, backward, gpu.name);
    if (!layer_is_full(c, layer)) print_sharing(a->block_idx, T, c->num_key_value_heads, c->sel_blocks, c->sel_block);
    CUDA(cudaFree(wide));
}

static int bench_random(int64_t T, int H, int KV, int D, int full) {
    const Config c = core_config(H, KV, D, full);
    const double gate_init[BRANCHES] = {-2, -2, 2};
    const int64_t n = T * gpu_wide_row(&c, 0).size;
    Model m;
    model_create(&m, &c);
    model_init(&m, 3, gate_init);
    device_alloc(&m, 1, T, 0, 1);
    device_store(&m);
    device_zero_grads(&m);
    fill_normal(net<bf16>.acts[0].wide, n, 7);
    printf("memory %.3f GB, with all that its backward pass needs: ", (double)device_bytes(&c, 1, T, 0, 1, NULL) / 1e9);
    time_core(&m, 0, T);
    device_free(&m);
    model_free(&m);
    return 0;
}

static int bench_model(const char *folder, int64_t T, const char *file, int layer) {
    Config c;
    DataSet data;
    Tokenizer tokenizer;
    Model m;
    char err[ERR_LEN], *path = format("%s/config.json", folder), *words = format("%s/tokenizer.json", folder);
    const int has_words = is_there(words);
    if (config_load(&c, path, err) < 0) die(1, "%s", err);
    c.torch_dtype = DTYPE_BF16;
    if (layer < 0 || layer >= c.num_hidden_layers) die(2, "layer %d: the model has %d, counted from 0", layer, c.num_hidden_layers);
    if (has_words && tokenizer_open(&tokenizer, words, err) < 0) die(1, "%s", err);
    memset(&data, 0, sizeof data);
    if (data_load(&data, NULL, file, has_words ? &tokenizer : NULL, c.vocab_size, err) < 0) die(1, "%s", err);
    if (data_check(&data, (int)T, "FILE", err) < 0) die(2, "%s", err);
    int *tokens = (int *)xmalloc((size_t)(T + 1) * sizeof *tokens);
    data_val_window(&data, (int)T, 0, tokens);
    model_create(&m, &c);
    if (checkpoint_load_weights(&m, folder, err) < 0) die(1, "%s", err);
    device_alloc(&m, 1, T, 0, 1);
    device_store(&m);
    device_zero_grads(&m);
    // The layer's input, then its projections once more: attention has turned those of the pass through the model.
    const LayerWeights *w = &m.twin->layers[layer];
    const GpuActs<bf16> *a = &net<bf16>.acts[layer];
    gpu_layers_forward<bf16>(&m, tokens, 1, T, NULL);
    gpu_norm_again<bf16>(net<bf16>.work.norm, a->rstd1, a->x, w->norm1, T, c.hidden_size);
    gpu_linear_forward(a->wide, gpu_wide_row(&c, layer).size, net<bf16>.work.norm, c.hidden_size, matrix<bf16>(m.twin, w->wide), T, c.hidden_size, wide_row(&c, layer).size);
    printf("%s, layer %d, on %s: ", folder, layer, file);
    time_core(&m, layer, T);
    device_free(&m);
    model_free(&m);
    data_free(&data);
    if (has_words) tokenizer_free(&tokenizer);
    free(tokens);
    free(path);
    free(words);
    return 0;
}

int main(int argc, char **argv) {
    program_name = "core";
    setvbuf(stdout, NULL, _IOLBF, 0);
    device_open();
    if (argc == 1 || (argc == 2 && !strcmp(argv[1], "check"))) return check_all();
    const int full = argc == 7 && !strcmp(argv[6], "full");
    if ((argc == 6 || full) && !strcmp(argv[1], "bench")) {
        const int64_t T = atoll(argv[2]);
        const int H = atoi(argv[3]), KV = atoi(argv[4]), D = atoi(argv[5]);
        if (T < 1 || H < 1 || KV < 1 || D < 1) die(2, "bench: T, H, KV and D are positive numbers");
        return bench_random(T, H, KV, D, full);
    }
    if ((argc == 5 || argc == 6) && !strcmp(argv[1], "model")) {
        if (atoll(argv[3]) < 1) die(2, "model: T is a positive number, not '%s'", argv[3]);
        return bench_model(argv[2], atoll(argv[3]), argv[4], argc == 6 ? atoi(argv[5]) : 0);
    }
    fprintf(stderr, "usage: core [check] | core bench T H KV D [full] | core model FOLDER T FILE [LAYER]\n");
    return 2;
}
