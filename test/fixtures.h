// The fixtures of dev/reference.py as test_nsa.c and test_nsa.cu read them; include it after train_nsa.c. One that cannot be read
// ends the test.

typedef struct Fixture {
    char *name;                 // NAME of test/fixtures/NAME.safetensors
    SafeTensors st;
    Config config;
    int64_t B, T;
    int *tokens, *targets;      // (B,T)
    int in_training;            // its logits, loss and gradients are those of training; eval_logits and eval_loss are there too
} Fixture;

static void fixture_open(Fixture *f, const char *path) {
    char err[ERR_LEN];
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    memset(f, 0, sizeof *f);
    f->name = format("%.*s", (int)strcspn(name, "."), name);
    if (safetensors_open(&f->st, path, err) < 0) die(1, "%s", err);
    const char *text = safetensors_meta(&f->st, "config"), *training = safetensors_meta(&f->st, "training");
    const StTensor *t = safetensors_find(&f->st, "tokens");
    if (!text || !training || !t || t->ndim != 2 || t->dtype != ST_I32) die(1, "%s: not a fixture", path);
    if (config_parse(&f->config, text, (int64_t)strlen(text), err) < 0) die(1, "%s: its configuration is refused: %s", path, err);
    f->in_training = !strcmp(training, "1");
    f->B = t->shape[0];
    f->T = t->shape[1] - 1;
    f->tokens = (int *)xmalloc((size_t)(f->B * f->T) * sizeof(int));
    f->targets = (int *)xmalloc((size_t)(f->B * f->T) * sizeof(int));
    for (int64_t b = 0; b < f->B; b++) {
        const unsigned char *row = f->st.data + t->begin + b * (f->T + 1) * 4;
        memcpy(f->tokens + b * f->T, row, (size_t)f->T * 4);
        memcpy(f->targets + b * f->T, row + 4, (size_t)f->T * 4);
    }
}

static void fixture_close(Fixture *f) {
    free(f->name);
    free(f->tokens);
    free(f->targets);
    safetensors_close(&f->st);
}

static void fixture_tensor(const Fixture *f, const char *name, int ndim, const int64_t *shape, real *out) {
    char err[ERR_LEN];
    if (safetensors_read_real(&f->st, name, ndim, shape, out, err) < 0) die(1, "%s", err);
}

static void fixture_logits(const Fixture *f, const char *name, real *out) {
    const int64_t shape[3] = {f->B, f->T, f->config.vocab_size};
    fixture_tensor(f, name, 3, shape, out);
}

// In double whatever real is.
static double fixture_number(const Fixture *f, const char *name) {
    const int64_t one = 1;
    double x = 0;
    char err[ERR_LEN];
    if (safetensors_read(&f->st, name, ST_F64, 1, &one, &x, err) < 0) die(1, "%s", err);
    return x;
}

// "param" or "grad" of every tensor of the model, each at its offset of out.
static void fixture_params(const Fixture *f, const Model *m, const char *kind, real *out) {
    for (int i = 0; i < m->num_params; i++) {
        const Param *p = &m->params[i];
        char *name = format("%s.%s", kind, p->name);
        fixture_tensor(f, name, p->ndim, p->shape, out + p->offset);
        free(name);
    }
}

static void for_each_fixture(void (*test)(const Fixture *)) {
    glob_t found;
    memset(&found, 0, sizeof found);
    if (glob("test/fixtures/*.safetensors", 0, NULL, &found) != 0 || found.gl_pathc == 0)
        die(1, "no fixtures in test/fixtures: run this from the root of the repository");
    for (size_t i = 0; i < found.gl_pathc; i++) {
        Fixture f;
        fixture_open(&f, found.gl_pathv[i]);
        test(&f);
        fixture_close(&f);
    }
    globfree(&found);
}
