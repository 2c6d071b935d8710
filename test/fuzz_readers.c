// Fuzzing everything that reads a file somebody else wrote. With libFuzzer:
//     clang -g -O1 -fsanitize=fuzzer,address,undefined -I. test/fuzz_readers.c -o build/fuzz_readers -lm
//     clang -g -O1 -fsanitize=address,undefined -I. -DFUZZ_STANDALONE test/fuzz_readers.c -o build/fuzz_standalone -lm
//     build/fuzz_standalone --seeds build/seeds && build/fuzz_readers build/seeds
// Without libFuzzer (any compiler): build/fuzz_standalone --random 100000 changes the seeds blindly, and
// build/fuzz_standalone FILES runs the given inputs, for example a crash that was found.
// The first byte of an input chooses the reader, the rest is the file.

#define NSA_NO_MAIN
#include "../train_nsa.c"

#define MUST(what) do { if (!(what)) { fprintf(stderr, "broken promise: %s\n", #what); abort(); } } while (0)

// A byte-level tokenizer with a few merges, and all that a tokenizer.json may have.
void small_tokenizer(Text *t, const char *pattern, int nfc) {
    text_add(t, "{\"added_tokens\":[{\"id\":260,\"content\":\"<|endoftext|>\",\"special\":true,\"normalized\":false}],\"normalizer\":%s,"
             "\"pre_tokenizer\":", nfc ? "{\"type\":\"NFC\"}" : "null");
    if (pattern) {
        text_add(t, "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"Regex\":");
        text_add_json_string(t, pattern, (int64_t)strlen(pattern));
        text_add(t, "},\"behavior\":\"Isolated\",\"invert\":false},{\"type\":\"ByteLevel\",\"use_regex\":false}]}");
    } else text_add(t, "{\"type\":\"ByteLevel\",\"add_prefix_space\":false}");
    text_add(t, ",\"decoder\":{\"type\":\"ByteLevel\"},\"model\":{\"type\":\"BPE\",\"ignore_merges\":%s,\"vocab\":{", nfc ? "true" : "false");
    for (int i = 0, other = 0; i < 256; i++) {
        char utf8[5] = {0};
        int visible = (i > 32 && i < 127) || (i > 160 && i != 173);
        utf8_encode(utf8, (uint32_t)(visible ? i : 256 + other++));
        text_add_json_string(t, utf8, (int64_t)strlen(utf8));
        text_add(t, ":%d,", i);
    }
    text_add(t, "\"aa\":256,\"aaaa\":257,\"th\":258,\"the\":259},\"merges\":[\"a a\",[\"aa\",\"aa\"],\"t h\",\"th e\"]}}");
}

void fuzz_encode(const Tokenizer *t, const char *text, int64_t len) {
    char err[ERR_LEN];
    int32_t *ids;
    int64_t n, at = 0;
    if (tokenizer_encode(t, text, len, &ids, &n, err) < 0) return;
    for (int64_t i = 0; i < n; i++) {
        int size;
        MUST(ids[i] >= 0 && ids[i] < t->vocab_size);
        const char *piece = tokenizer_special(t, ids[i], &size);
        if (!piece) piece = tokenizer_piece(t, ids[i], &size);
        MUST(t->nfc || (at + size <= len && memcmp(text + at, piece, (size_t)size) == 0));
        at += size;
    }
    MUST(t->nfc || at == len);
    free(ids);
}

void fuzz_safetensors(const unsigned char *data, int64_t len) {
    char err[ERR_LEN];
    SafeTensors st;
    if (safetensors_parse(&st, data, len, err) < 0) return;
    for (int i = 0; i < st.count; i++) {
        const StTensor *t = &st.tensors[i];
        int64_t n = (t->end - t->begin) / st_dtype_bytes[t->dtype];
        MUST(safetensors_find(&st, t->name) == t && t->begin >= 0 && t->end <= st.data_len);
        real *x = (real *)xmalloc((size_t)n * sizeof(real));
        safetensors_read_real(&st, t->name, t->ndim, t->shape, x, err);
        free(x);
    }
    safetensors_meta(&st, "config");
    safetensors_close(&st);
}

void fuzz_json(const char *data, int64_t len) {
    char err[ERR_LEN];
    Config config;
    Json *root;
    memset(&config, 0, sizeof config);
    config_parse(&config, data, len, err);
    if (json_parse(&root, data, len, err) < 0) return;
    Text t = {NULL, 0, 0};
    if (root->type == JSON_STRING) {  // quoting and parsing gives the same string
        Json *again;
        text_add_json_string(&t, root->str, root->len);
        MUST(json_parse(&again, t.data, t.len, err) == 0 && again->len == root->len && memcmp(again->str, root->str, (size_t)root->len) == 0);
        json_free(again);
        free(t.data);
    }
    json_free(root);
}

void fuzz_bin(const unsigned char *data, int64_t len) {
    char err[ERR_LEN];
    TokenStream s;
    if (bin_parse(&s, data, len, err) < 0 || stream_check(&s, 50257, err) < 0) return;
    for (int64_t i = 0; i < s.count; i++) MUST(stream_token(&s, i) < 50257);
}

void fuzz_tokenizer(const char *data, int64_t len) {
    char err[ERR_LEN];
    Tokenizer t;
    if (tokenizer_parse(&t, data, len, err) < 0) return;
    const char *text = "the aaaaa the\r\n\n 123 <|endoftext|>e\xcc\x81\xff it's";
    fuzz_encode(&t, text, (int64_t)strlen(text));
    tokenizer_free(&t);
}

void fuzz_text(const char *data, int64_t len) {
    static Tokenizer tokenizers[3];
    char err[ERR_LEN];
    for (int i = 0; i < 3; i++) {
        if (!tokenizers[i].vocab_size) {
            Text t = {NULL, 0, 0};
            small_tokenizer(&t, i ? split_patterns[i + 1].regex : NULL, i == 2);
            MUST(tokenizer_parse(&tokenizers[i], t.data, t.len, err) == 0);
            free(t.data);
        }
        fuzz_encode(&tokenizers[i], data, len);
    }
    Utf8Stream u;
    Text out = {NULL, 0, 0}, normal = {NULL, 0, 0}, again = {NULL, 0, 0};
    memset(&u, 0, sizeof u);
    for (int64_t i = 0; i < len; i += 3) utf8_stream_push(&u, data + i, len - i < 3 ? (int)(len - i) : 3, &out);
    utf8_stream_flush(&u, &out);
    for (int64_t i = 0, n; i < out.len; i += n) {  // only whole characters go on
        uint32_t c;
        n = utf8_decode(out.data + i, out.len - i, &c);
        MUST(n > 0);
    }
    nfc_add(&normal, data, len);
    MUST(normal.len <= 3 * len);
    nfc_add(&again, normal.data ? normal.data : "", normal.len);  // normal text is normal
    MUST(again.len == normal.len && (!again.len || memcmp(again.data, normal.data, (size_t)again.len) == 0));
    free(out.data);
    free(normal.data);
    free(again.data);
}

#ifdef __cplusplus
extern "C"
#endif
int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size) {
    if (size < 1) return 0;
    // a copy of just that length, so that reading one byte too many is noticed
    int64_t len = (int64_t)size - 1;
    unsigned char *data = (unsigned char *)malloc((size_t)len + !len);
    memcpy(data, input + 1, (size_t)len);
    switch (input[0] % 5) {
    case 0: fuzz_safetensors(data, len); break;
    case 1: fuzz_json((const char *)data, len); break;
    case 2: fuzz_bin(data, len); break;
    case 3: fuzz_tokenizer((const char *)data, len); break;
    case 4: fuzz_text((const char *)data, len); break;
    }
    free(data);
    return 0;
}

#ifdef FUZZ_STANDALONE
enum { SEEDS = 8 };

void make_seed(Text *t, int i) {
    char reader = (char)(i < 3 ? i : i < 6 ? 3 : 4);
    Config config;
    memset(&config, 0, sizeof config);
    text_put(t, &reader, 1);
    if (i == 0) {
        const char *header = "{\"__metadata__\":{\"config\":\"{}\"},\"a\":{\"dtype\":\"F32\",\"shape\":[2,1],\"data_offsets\":[0,8]},"
                             "\"b\":{\"dtype\":\"BF16\",\"shape\":[3],\"data_offsets\":[8,14]}}     ";
        int64_t n = (int64_t)strlen(header);
        text_put(t, &n, 8);
        text_put(t, header, n);
        text_put(t, "12345678901234", 14);
    }
    if (i == 1) {  // a small model
        config.vocab_size = 256;
        config.hidden_size = config.intermediate_size = 64;
        config.num_hidden_layers = config.num_attention_heads = config.num_key_value_heads = 2;
        config.head_dim = config.v_head_dim = config.sel_block = config.cmp_block = 32;
        config.cmp_stride = config.window = config.max_position_embeddings = 32;
        config.sel_blocks = 3;
        config.sel_init_blocks = config.sel_local_blocks = 1;
        config.rope_theta = 10000;
        config.rms_norm_eps = 1e-5;
        config_write(&config, t);
    }
    if (i == 2) {
        int32_t file[260] = {20240520, 1, 8};
        text_put(t, file, sizeof file);
    }
    if (i >= 3 && i < 6) small_tokenizer(t, i > 3 ? split_patterns[i - 2].regex : NULL, i == 5);
    if (i == 6) text_add(t, "The aaaa's the<|endoftext|> it'S 1234 \xc3\xa9" "e\xcc\x81\xe1\x84\x80\xe1\x85\xa1\xe1\x86\xa8\r\n\n  x\xc2\xa0\xe3\x80\x80y '\xc5\xbf");
    if (i == 7) text_add(t, "\xff\xfe\xf0\x9f\x99\x82\xed\xa0\x80 a\xcc\xa3\xcc\x87\xcc\xb8 \xf0\x9d\x85\x9f");
}

int main(int argc, char **argv) {
    program_name = "fuzz_standalone";
    char err[ERR_LEN];
    Text seeds[SEEDS];
    for (int i = 0; i < SEEDS; i++) {
        memset(&seeds[i], 0, sizeof(Text));
        make_seed(&seeds[i], i);
    }
    if (argc == 3 && strcmp(argv[1], "--seeds") == 0) {
        if (mkdir(argv[2], 0777) < 0 && errno != EEXIST) die(1, "%s: %s", argv[2], strerror(errno));
        for (int i = 0; i < SEEDS; i++) {
            char *path = format("%s/seed_%d", argv[2], i);
            if (write_file(path, seeds[i].data, seeds[i].len, err) < 0) die(1, "%s", err);
            free(path);
        }
    } else if (argc == 3 && strcmp(argv[1], "--random") == 0) {
        Rng rng = {1, 1, 0};
        for (int64_t k = 0, n = atoll(argv[2]); k < n; k++) {
            Text t = {NULL, 0, 0};
            const Text *seed = &seeds[k % SEEDS];
            text_put(&t, seed->data, seed->len);
            for (uint64_t j = k < SEEDS ? 0 : 1 + rng_below(&rng, 8); j > 0; j--) {
                char *at = t.data + rng_below(&rng, (uint64_t)t.len);
                switch (rng_below(&rng, 5)) {
                case 0: *at = (char)rng_u32(&rng); break;
                case 1: *at ^= (char)(1 << rng_below(&rng, 8)); break;
                case 2: *at = "{}[]\",:0-9\\"[rng_below(&rng, 11)]; break;
                case 3: t.len = at - t.data + 1; break;  // cut short
                case 4: {  // a piece moves
                    int64_t room = t.data + t.len - at, from = (int64_t)rng_below(&rng, (uint64_t)t.len);
                    if (room > t.len - from) room = t.len - from;
                    memmove(at, t.data + from, (size_t)rng_below(&rng, (uint64_t)room + 1));
                }
                }
            }
            LLVMFuzzerTestOneInput((const uint8_t *)t.data, (size_t)t.len);
            free(t.data);
        }
        printf("%s inputs, no crash\n", argv[2]);
    } else {
        if (argc < 2) die(2, "give files, or --seeds FOLDER, or --random COUNT");
        for (int i = 1; i < argc; i++) {
            char *data;
            int64_t len;
            if (read_file(argv[i], &data, &len, err) < 0) die(1, "%s", err);
            LLVMFuzzerTestOneInput((const uint8_t *)data, (size_t)len);
            free(data);
        }
    }
    for (int i = 0; i < SEEDS; i++) free(seeds[i].data);
    return 0;
}
#endif
