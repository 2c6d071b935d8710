// Times the CPU program: what the machine can do (peak), a training step, and attention alone.
// `make bench` runs everything that dev/benchmarks.md reports; each figure is a median.
//
//   build/bench peak                         multiply-adds from registers, all threads: GFLOP/s
//   build/bench step KIND T B KV [STEPS]     a training step of 6 layers, width 384, 6 heads of 64, F=1024, V=256;
//                                            KIND: full, paper, short, medium, long
//   build/bench attention KIND T B KV [STEPS]   one layer's attention between the projections: forward, backward
//   build/bench matmul                       the shapes of that step
#define NSA_NO_MAIN
#include "train_nsa.c"

static int ascending(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *x, int n) {
    qsort(x, (size_t)n, sizeof *x, ascending);
    return x[n / 2];
}

// Twelve chains of vector multiply-adds a thread: what no matrix product can pass.
static double peak_gflops(void) {
    enum { CHAINS = 12 };
    const long count = 40000000;     // a fifth of a second: clocks and neighbours settle
    const double start = now_seconds();
    #pragma omp parallel
    {
        Vector x[CHAINS], a = {0}, b = {0};
        for (int i = 0; i < VECTOR; i++) { a[i] = (real)0.5; b[i] = (real)0.1; }
        UNROLL for (int i = 0; i < CHAINS; i++) x[i] = a + (real)i;
        for (long n = 0; n < count; n++) {
            UNROLL for (int i = 0; i < CHAINS; i++) x[i] = x[i] * a + b;
#if VECTOR_BYTES >= 32
            __asm__ volatile("" : "+v"(x[0]), "+v"(x[1]), "+v"(x[2]), "+v"(x[3]), "+v"(x[4]), "+v"(x[5]));
            __asm__ volatile("" : "+v"(x[6]), "+v"(x[7]), "+v"(x[8]), "+v"(x[9]), "+v"(x[10]), "+v"(x[11]));
#endif
        }
        Vector sum = b;
        UNROLL for (int i = 0; i < CHAINS; i++) sum += x[i];
        volatile real keep = sum[0];        // or the compiler would drop it all
        (void)keep;
    }
    return 2.0 * CHAINS * VECTOR * (double)count * thread_count() / (now_seconds() - start) / 1e9;
}

static Config bench_config(const char *kind, int kv, int layers) {
    Config c = config_default();
    c.vocab_size = 256;
    c.num_hidden_layers = layers;
    c.hidden_size = 384;
    c.num_attention_heads = 6;
    c.num_key_value_heads = kv;
    c.head_dim = c.v_head_dim = 64;
    c.intermediate_size = 1024;
    c.attention = strcmp(kind, "full") ? ATTENTION_NSA : ATTENTION_FULL;
    const struct { const char *name; int l, d, sel, n, w; } presets[] = {
        {"paper", 32, 16, 64, 16, 512}, {"short", 16, 16, 16, 5, 64}, {"medium", 32, 32, 32, 7, 128}, {"long", 64, 64, 64, 11, 256}};
    int found = c.attention == ATTENTION_FULL;
    for (int i = 0; i < 4; i++)
        if (!strcmp(kind, presets[i].name)) {
            found = 1;
            c.cmp_block = presets[i].l; c.cmp_stride = presets[i].d; c.sel_block = presets[i].sel;
            c.sel_blocks = presets[i].n; c.window = presets[i].w;
        }
    if (!found) die(2, "bench: %s is not full, paper, short, medium or long", kind);
    return c;
}

static void bench_step(const char *kind, int T, int B, int kv, int steps) {
    const Config c = bench_config(kind, kv, 6);
    const double gate_init[BRANCHES] = {-2, -2, 2};
    const StepInfo info = {0, 1, 1, 0, 1.0, 1};
    Model m;
    model_create(&m, &c);
    model_init(&m, 1, gate_init);
    model_alloc(&m, B, T, 0, 1);
    int *tokens = (int *)xmalloc(sizeof(int) * (size_t)(B * T)), *targets = (int *)xmalloc(sizeof(int) * (size_t)(B * T));
    Rng rng = {1, 2, 0};
    for (int i = 0; i < B * T; i++) { tokens[i] = (int)rng_below(&rng, 256); targets[i] = (int)rng_below(&rng, 256); }
    double *ms = (double *)xmalloc(sizeof(double) * (size_t)steps), *peak = (double *)xmalloc(sizeof(double) * (size_t)steps);
    for (int i = -1; i < steps; i++) {
        const double before = i < 0 ? 0 : peak_gflops(), start = now_seconds();
        model_zero_grads(&m);
        model_forward_backward(&m, tokens, targets, B, T, &info);
        const double norm = model_grad_norm(&m);
        model_adamw(&m, 1e-4, 0.9, 0.95, 1e-8, 0.1, i + 2, norm > 1 ? 1 / norm : 1);
        if (i >= 0) { ms[i] = (now_seconds() - start) * 1e3; peak[i] = before; }
    }
    const double t = median(ms, steps), p = median(peak, steps);
    // Dense FLOPs of a token: 6 a weight of the matrices, and causal attention's 7 products of H·D·T/2 multiply-adds a layer.
    const double flops = 6.0 * (double)m.num_elements + 7.0 * c.num_hidden_layers * T * c.num_attention_heads * c.head_dim;
    printf("step %-6s T=%-6d B=%-2d KV=%d  %9.1f ms  %8.0f tok/s", kind, T, B, kv, t, B * T / t * 1e3);
    if (c.attention == ATTENTION_FULL) printf("  %6.1f GFLOP/s, %.2f of the peak of %.0f", flops * B * T / t / 1e6, flops * B * T / t / 1e6 / p, p);
    printf("  (%d threads)\n", thread_count());
}

static void bench_attention(const char *kind, int T, int B, int kv, int steps) {
    const Config c = bench_config(kind, kv, 1);
    const double gate_init[BRANCHES] = {-2, -2, 2};
    Model m;
    model_create(&m, &c);
    model_init(&m, 1, gate_init);
    model_alloc(&m, B, T, 0, 1);
    double *fwd = (double *)xmalloc(sizeof(double) * (size_t)steps), *bwd = (double *)xmalloc(sizeof(double) * (size_t)steps);
    const int64_t wide = (int64_t)B * T * wide_row(&c, 0).size, heads = (int64_t)B * T * c.num_attention_heads * c.v_head_dim;
    for (int i = -1; i < steps; i++) {
        #pragma omp parallel for
        for (int64_t j = 0; j < wide; j++) m.acts[0].wide[j] = normal_at(1, 1, (uint64_t)j);
        #pragma omp parallel for
        for (int64_t j = 0; j < heads; j++) m.scratch.dattention[j] = normal_at(1, 2, (uint64_t)j);
        const double start = now_seconds();
        attention_core_forward(&m, 0, B, T);
        const double middle = now_seconds();
        attention_core_backward(&m, 0, B, T);
        if (i >= 0) { fwd[i] = (middle - start) * 1e3; bwd[i] = (now_seconds() - middle) * 1e3; }
    }
    const double f = median(fwd, steps), b = median(bwd, steps);
    printf("attention %-6s T=%-6d B=%-2d KV=%d  forward %8.1f ms  backward %8.1f ms  (%d threads)\n", kind, T, B, kv, f, b, thread_count());
}

static void bench_matmul(void) {
    const struct { const char *what; int64_t m, n, k; int a_turned, b_turned; } shapes[] = {
        {"forward  2048x1152x384", 2048, 1152, 384, 0, 1}, {"forward  2048x2048x384", 2048, 2048, 384, 0, 1},
        {"forward  2048x384x1024", 2048, 384, 1024, 0, 1}, {"dinp     2048x384x2048", 2048, 384, 2048, 0, 0},
        {"dweight  1152x384x2048", 1152, 384, 2048, 1, 0}, {"forward  768x640x128", 768, 640, 128, 0, 1},
        {"dweight  640x128x768", 640, 128, 768, 1, 0}};
    real *x = (real *)xmalloc(sizeof(real) << 23), *y = (real *)xmalloc(sizeof(real) << 23), *z = (real *)xmalloc(sizeof(real) << 23);
    for (int64_t i = 0; i < 1 << 23; i++) { x[i] = normal_at(1, 1, (uint64_t)i); y[i] = normal_at(1, 2, (uint64_t)i); z[i] = 0; }
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        const int64_t m = shapes[s].m, n = shapes[s].n, k = shapes[s].k;
        double gflops[21], share[21];
        for (int i = 0; i < 21; i++) {
            const double peak = peak_gflops(), start = now_seconds();
            for (int r = 0; r < 4; r++)
                matmul(m, n, k, x, shapes[s].a_turned ? 1 : k, shapes[s].a_turned ? m : 1, y, shapes[s].b_turned ? 1 : n, shapes[s].b_turned ? k : 1, z, n, 0);
            gflops[i] = 4 * 2.0 * (double)(m * n * k) / (now_seconds() - start) / 1e9;
            share[i] = gflops[i] / peak;
        }
        const double g = median(gflops, 21), f = median(share, 21);
        printf("matmul %-24s %6.1f GFLOP/s, %.2f of the peak (%d threads)\n", shapes[s].what, g, f, thread_count());
    }
}

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "";
    program_name = "bench";
    if (!strcmp(what, "peak")) printf("peak %.1f GFLOP/s (%d threads)\n", peak_gflops(), thread_count());
    else if (!strcmp(what, "matmul")) bench_matmul();
    else if ((!strcmp(what, "step") || !strcmp(what, "attention")) && argc >= 6) {
        const int T = atoi(argv[3]), B = atoi(argv[4]), kv = atoi(argv[5]), steps = argc > 6 ? atoi(argv[6]) : 5;
        if (T < 1 || B < 1 || kv < 1 || 6 % kv || steps < 1) die(2, "bench: T, B and STEPS from 1 on, KV a divisor of 6");
        if (what[0] == 's') bench_step(argv[2], T, B, kv, steps);
        else bench_attention(argv[2], T, B, kv, steps);
    } else die(2, "usage: bench peak | matmul | step KIND T B KV [STEPS] | attention KIND T B KV [STEPS]");
    return 0;
}
