// Tests of what reads and writes: random numbers, JSON, safetensors, token files, the order of
// training, UTF-8 and the tokenizer. Run from the root of the repository:
//     make build/test_io && build/test_io

#include <sys/wait.h>

#define NSA_NO_MAIN
#include "../train_nsa.c"
#include "test/check.h"

char folder[256];  // for files that come and go

const char *temporary(const char *name) {  // good until the next but one call
    static char paths[2][512];
    static int turn = 0;
    turn = !turn;
    snprintf(paths[turn], sizeof paths[turn], "%s/%s", folder, name);
    return paths[turn];
}

const char *write_temporary(const char *name, const void *data, int64_t len) {
    char err[ERR_LEN];
    const char *path = temporary(name);
    if (write_file(path, (const char *)data, len, err) < 0) die(1, "%s", err);
    return path;
}

// An error is useful when it names the file and the trouble, in one line.
void check_error(int result, const char *err, const char *wanted, const char *what) {
    check(result == -1 && strstr(err, wanted) && !strchr(err, '\n'), "%s: wanted an error with \"%s\", got %d \"%s\"", what, wanted,
          result, result ? err : "");
}

// ----------------------------------------------------------------------------

void test_utilities(void) {
    // the known answers of Random123's Philox4x32-10
    const uint32_t known[3][10] = {
        {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
        {0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
        {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}};
    for (int i = 0; i < 3; i++) {
        uint32_t out[4];
        philox4x32(out, known[i], known[i] + 4);
        check(memcmp(out, known[i] + 6, sizeof out) == 0, "Philox known answer %d", i);
    }

    Rng rng = {1, 2, 0};
    int counts[7] = {0};
    for (int i = 0; i < 70000; i++) counts[rng_below(&rng, 7)]++;
    double chi2 = 0, mean = 0;
    for (int i = 0; i < 7; i++) chi2 += (counts[i] - 10000.0) * (counts[i] - 10000.0) / 10000;
    check(chi2 < 22.5, "rng_below(7) is not uniform: chi2 %g with 6 degrees of freedom", chi2);
    check(rng_below(&rng, 1) == 0, "rng_below(1)");
    int large = 0;
    for (int i = 0; i < 1000; i++) large += rng_below(&rng, 3ull << 62) >= 1ull << 63;
    check(large > 270 && large < 400, "rng_below(3 * 2^62): %d of 1000 in the upper third", large);
    for (int i = 0; i < 100000; i++) {
        double u = rng_uniform(&rng);
        if (u < 0 || u >= 1) check(0, "rng_uniform gave %g", u);
        mean += u / 100000;
    }
    check(fabs(mean - 0.5) < 0.005, "mean of rng_uniform %g", mean);
    Rng a = {5, 6, 3}, b = {5, 6, 0};
    for (int i = 0; i < 3; i++) rng_u32(&b);
    check(rng_u32(&a) == rng_u32(&b) && a.counter == 4, "the counter is the place");

    double m1 = 0, m2 = 0, m3 = 0, m4 = 0, neighbours = 0;
    const int n = 400000;
    for (int i = 0; i < n; i++) {
        double x = normal_at(3, 4, (uint64_t)i);
        m1 += x / n;
        m2 += x * x / n;
        m3 += x * x * x / n;
        m4 += x * x * x * x / n;
        if (i & 1) neighbours += x * normal_at(3, 4, (uint64_t)i - 1) / (n / 2);
    }
    check(fabs(m1) < 0.008 && fabs(m2 - 1) < 0.012 && fabs(m3) < 0.02 && fabs(m4 - 3) < 0.08, "moments of normal_at: %g %g %g %g", m1, m2, m3, m4);
    check(fabs(neighbours) < 0.01, "neighbouring normals correlate: %g", neighbours);
    check(normal_at(3, 4, 7) == normal_at(3, 4, 7) && normal_at(3, 4, 7) != normal_at(3, 5, 7) && normal_at(3, 4, 7) != normal_at(4, 4, 7),
          "normal_at depends on seed, stream and index");

    int bad = 0;
    for (uint32_t i = 0; i < 65536; i++) {
        float f = bf16_to_float((uint16_t)i);
        if (isnan(f)) bad += !isnan(bf16_to_float(float_to_bf16(f)));
        else bad += float_to_bf16(f) != i;
    }
    check(bad == 0, "bf16 round trip: %d differ", bad);
    const struct { float f; uint16_t b; } rounds[] = {{1.00390625f, 0x3f80}, {1.01171875f, 0x3f82}, {1.004f, 0x3f81}, {3.4e38f, 0x7f80},
                                                      {-1.00390625f, 0xbf80}, {1e-45f, 0}, {INFINITY, 0x7f80}};
    for (size_t i = 0; i < sizeof rounds / sizeof rounds[0]; i++)
        check(float_to_bf16(rounds[i].f) == rounds[i].b, "bf16 of %.9g is %04x", (double)rounds[i].f, float_to_bf16(rounds[i].f));
    uint32_t nan_bits = 0x7f800001;  // its upper half alone would be infinity
    float quiet;
    memcpy(&quiet, &nan_bits, 4);
    check(isnan(bf16_to_float(float_to_bf16(quiet))), "a NaN of low bits only");

    Text t = {NULL, 0, 0};
    for (int i = 0; i < 1000; i++) text_add(&t, "%d,", i);
    check(t.len == 3890 && strlen(t.data) == 3890, "a text of %" PRId64, t.len);
    free(t.data);
    char *s = format("%s-%d", "a", 7), err[ERR_LEN], *data;
    int64_t len;
    check(strcmp(s, "a-7") == 0, "format gave %s", s);
    free(s);
    check_error(read_file(folder, &data, &len, err), err, "is a folder", "read_file");
    check_error(read_file(temporary("none"), &data, &len, err), err, "No such file", "read_file");
    check_error(write_file(temporary("no/such"), "x", 1, err), err, "cannot create", "write_file");
    check(fail(err, "a\nb%c", 7) == -1 && strcmp(err, "a b ") == 0, "an error is one line");
    check(total_memory_bytes() > 1 << 20 && now_seconds() <= now_seconds(), "the machine has memory and a clock");
}

// ----------------------------------------------------------------------------

void test_json(void) {
    const char *const good[] = {"0", "-0", "1.5e-3", " [ ] ", "{}", "[1,2,[3]]", "{\"a\":{\"b\":null}}", "\"\\u00e9\\n\\/\\\\\\\"\"",
                                "\"\\ud83d\\ude42\"", "\"\xf0\x9f\x99\x82\"", "true", "\t\r\n false", "[9223372036854775807,-9223372036854775808]", "1E+2"};
    const struct { const char *text, *wanted; } bad[] = {
        {"", "ends where a value"}, {" ", "ends where"}, {"[1,", "ends where"}, {"[1,]", "value is missing"}, {"[1 2]", "',' or ']'"},
        {"{\"a\"}", "':'"}, {"{\"a\":1,}", "key in quotes"}, {"{a:1}", "key in quotes"}, {"{'a':1}", "key in quotes"}, {"{\"a\":1", "',' or '}'"},
        {"{\"a\":1,\"a\":2}", "twice"}, {"{\"a\":1,\"\\u0061\":2}", "twice"}, {"01", "not a number"}, {"-", "not a number"}, {"1.", "point"},
        {"1e", "exponent"}, {"1e999", "too large"}, {"+1", "value is missing"}, {".5", "value is missing"}, {"NaN", "value is missing"},
        {"Infinity", "value is missing"}, {"tru", "value is missing"}, {"nullx", "more text"}, {"1 1", "more text"}, {"\"a", "closing quote"},
        {"\"a\\", "closing quote"}, {"\"\\x\"", "escape"}, {"\"\\u12\"", "escape"}, {"\"\\u12g4\"", "escape"}, {"\"\\ud83d\"", "surrogate"},
        {"\"\\ude42\\ud83d\"", "surrogate"}, {"\"\\ud83dab\\ude42\"", "surrogate"}, {"\"\\ud83d\\u0041\"", "surrogate"}, {"\"a\nb\"", "control character"},
        {"\"\xff\"", "UTF-8"}, {"\"\xc3\"", "UTF-8"}, {"\"\xc0\x80\"", "UTF-8"}, {"\"\xed\xa0\x80\"", "UTF-8"}, {"\"\xf4\x90\x80\x80\"", "UTF-8"},
        {"\xef\xbb\xbf{}", "value is missing"}, {"[}", "value is missing"}, {"// x\n1", "value is missing"}};
    char err[ERR_LEN];
    Json *root;
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        int result = json_parse(&root, good[i], (int64_t)strlen(good[i]), err);
        check(result == 0, "JSON %s: %s", good[i], result ? err : "");
        json_free(root);
    }
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        check_error(json_parse(&root, bad[i].text, (int64_t)strlen(bad[i].text), err), err, bad[i].wanted, bad[i].text);
        json_free(root);
    }
    char deep[200];
    for (int depth = 64; depth <= 65; depth++) {
        memset(deep, '[', (size_t)depth);
        memset(deep + depth, ']', (size_t)depth);
        int result = json_parse(&root, deep, 2 * depth, err);
        check(depth == 64 ? result == 0 : result < 0 && strstr(err, "too deep"), "JSON of depth %d", depth);
        json_free(root);
    }
    const char *text = "{\"n\":9007199254740993,\"x\":-2.5e1,\"big\":1e20,\"huge\":99999999999999999999,\"s\":\"a\\u0000b\",\"l\":[true,false]}tail";
    check(json_parse(&root, text, (int64_t)strlen(text) - 4, err) == 0, "an object without NUL behind it");
    const Json *n = json_get(root, "n"), *x = json_get(root, "x"), *s = json_get(root, "s"), *l = json_get(root, "l");
    check(n && n->is_integer && n->integer == 9007199254740993, "integers keep 64 bits");
    check(x && !x->is_integer && x->number == -25, "numbers are doubles");
    check(!json_get(root, "big")->is_integer && !json_get(root, "huge")->is_integer && json_get(root, "huge")->number == 1e20, "too large for an integer");
    check(s && s->len == 3 && memcmp(s->str, "a\0b", 3) == 0, "a NUL in a string");
    check(l && l->len == 2 && l->child->number == 1 && l->child->next->number == 0, "a list");
    check(!json_get(root, "none") && !json_get(n, "n") && !json_get(NULL, "n"), "absent members");
    json_free(root);

    Text t = {NULL, 0, 0};
    text_add_json_string(&t, "a\"\\\n\t\x7f\xc3\xa9\xff\0z", 11);
    check(strcmp(t.data, "\"a\\\"\\\\\\n\\u0009\\u007f\xc3\xa9\\ufffd\\u0000z\"") == 0, "escaped: %s", t.data);
    check(json_parse(&root, t.data, t.len, err) == 0 && root->len == 13 && root->str[12] == 'z', "and back");
    json_free(root);
    free(t.data);
}

// ----------------------------------------------------------------------------

void test_safetensors(void) {
    char err[ERR_LEN];
    StWriter w;
    const char *path = temporary("good.safetensors");
    const int64_t two_three[] = {2, 3}, five[] = {5}, none[] = {0, 4}, six[] = {6}, one[] = {1}, three_two[] = {3, 2};
    real x[6] = {(real)1, (real)-2.5, (real)0.1, (real)1e10, (real)0, (real)3}, y[6];
    int64_t step[5] = {1, -2, 1ll << 62, 0, 5}, back[5];
    check(st_writer_begin(&w, path, err) == 0, "begin: %s", err);
    st_writer_meta(&w, "config", "{\"a\": \"\xc3\xa9\n\"}");
    st_writer_meta(&w, "format", "pt");
    st_writer_tensor(&w, "step", ST_I64, 1, five);
    st_writer_tensor(&w, "scalar", ST_F64, 0, NULL);
    st_writer_tensor(&w, "x", ST_F32, 2, two_three);
    st_writer_tensor(&w, "empty", ST_F32, 2, none);
    st_writer_tensor(&w, "x.bf16", ST_BF16, 1, six);
    check(st_writer_header(&w, err) == 0 && st_writer_data(&w, step, sizeof step, err) == 0 && st_writer_real(&w, x, 1, ST_F64, err) == 0 &&
          st_writer_real(&w, x, 6, ST_F32, err) == 0 && st_writer_real(&w, x, 6, ST_BF16, err) == 0 && st_writer_end(&w, err) == 0, "writing");
    SafeTensors st;
    check(safetensors_open(&st, path, err) == 0, "reading back: %s", err);
    check(st.count == 5 && strcmp(safetensors_meta(&st, "config"), "{\"a\": \"\xc3\xa9\n\"}") == 0 && !safetensors_meta(&st, "none"), "metadata");
    check((st.data - st.map.data) % 8 == 0, "the data are aligned");
    check(safetensors_read(&st, "step", ST_I64, 1, five, back, err) == 0 && memcmp(back, step, sizeof step) == 0, "integers");
    check(safetensors_read_real(&st, "x", 2, two_three, y, err) == 0, "floats");
    for (int i = 0; i < 6; i++) check((float)y[i] == (float)x[i], "float %d", i);
    check(safetensors_read_real(&st, "x.bf16", 1, six, y, err) == 0, "bf16");
    for (int i = 0; i < 6; i++) check((float)y[i] == bf16_to_float(float_to_bf16((float)x[i])), "bf16 %d", i);
    check(safetensors_read_real(&st, "scalar", 0, NULL, y, err) == 0 && y[0] == 1, "a double without dimensions");
    check(safetensors_read_real(&st, "empty", 2, none, y, err) == 0, "nothing");
    check_error(safetensors_read_real(&st, "z", 1, six, y, err), err, "tensor \"z\" is missing", "missing");
    check_error(safetensors_read_real(&st, "x", 2, three_two, y, err), err, "has shape [2,3], the configuration wants [3,2]", "shape");
    check_error(safetensors_read_real(&st, "x", 1, six, y, err), err, "wants [6]", "dimensions");
    check_error(safetensors_read_real(&st, "step", 1, five, y, err), err, "is I64", "dtype");
    check_error(safetensors_read(&st, "x", ST_BF16, 2, two_three, y, err), err, "is F32, BF16 is wanted", "dtype");
    check(strncmp(err, path, strlen(path)) == 0, "the error names the file: %s", err);
    safetensors_close(&st);

    st_writer_begin(&w, temporary("short"), err);
    st_writer_tensor(&w, "x", ST_F32, 1, one);
    check(st_writer_header(&w, err) == 0, "header");
    check_error(st_writer_end(&w, err), err, "0 bytes of data came, 4 were declared", "data missing");
    check_error(st_writer_end(&w, err), err, "not open", "a writer that is closed");
    st_writer_begin(&w, temporary("odd"), err);
    st_writer_tensor(&w, "a", ST_U8, 1, one);
    st_writer_tensor(&w, "b", ST_F32, 1, one);
    check_error(st_writer_header(&w, err), err, "wider types first", "alignment");
    check_error(st_writer_begin(&w, temporary("no/such"), err), err, "No such file", "a folder that is not there");
    if (access("/dev/full", W_OK) == 0) {  // every write fails with ENOSPC
        int result = st_writer_begin(&w, "/dev/full", err);
        int64_t many[] = {100000};
        real *zeros = (real *)xcalloc(100000, sizeof(real));
        st_writer_tensor(&w, "x", ST_F32, 1, many);
        if (!result) result = st_writer_header(&w, err);
        if (!result) result = st_writer_real(&w, zeros, 100000, ST_F32, err);
        if (!result) result = st_writer_end(&w, err);
        check_error(result, err, "/dev/full: cannot write: No space left", "a full disk");
        free(zeros);
    }

#define X(offsets) "{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":" offsets "}}"
#define TENSOR(name, begin, end) "\"" name "\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[" begin "," end "]}"
    const struct { const char *header; int64_t length /* -1: its own */, data; const char *wanted; } broken[] = {
        {X("[0,8]"), 1ll << 60, 8, "a header of 1152921504606846976 bytes"},
        {X("[0,8]"), -2, 8, "a header of 18446744073709551614 bytes"},
        {X("[0,8]"), 5000, 8, "cut short"},
        {X("[0,8]"), 10, 8, "bad safetensors header: broken JSON"},
        {"", 0, 0, "bad safetensors header: broken JSON"},
        {"[]", -1, 0, "it is a list, not an object"},
        {"{\"x\":5}", -1, 0, "tensor \"x\" is a number"},
        {"{\"x\":{}}", -1, 0, "unknown dtype"},
        {"{\"x\":{\"dtype\":\"F31\",\"shape\":[2],\"data_offsets\":[0,8]}}", -1, 8, "unknown dtype \"F31\""},
        {"{\"x\":{\"dtype\":\"F32\",\"shape\":[-2],\"data_offsets\":[0,8]}}", -1, 8, "bad shape"},
        {"{\"x\":{\"dtype\":\"F32\",\"shape\":[2.0],\"data_offsets\":[0,8]}}", -1, 8, "bad shape"},
        {"{\"x\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,2],\"data_offsets\":[0,8]}}", -1, 8, "bad shape"},
        {"{\"x\":{\"dtype\":\"F32\",\"shape\":2,\"data_offsets\":[0,8]}}", -1, 8, "bad shape"},
        {"{\"x\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904,4],\"data_offsets\":[0,0]}}", -1, 0, "does not fit"},
        {"{\"x\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,8]}}", -1, 8, "does not fit its 8 bytes"},
        {X("[0,9223372036854775807]"), -1, 8, "lies at bytes 0 to 9223372036854775807 of 8"},
        {X("[0,18446744073709551615]"), -1, 8, "bad data_offsets"},
        {X("[8,0]"), -1, 8, "lies at bytes 8 to 0"},
        {X("[0,8,8]"), -1, 8, "bad data_offsets"},
        {X("[0]"), -1, 8, "bad data_offsets"},
        {X("[0,8]"), -1, 7, "cut short, copy it again"},
        {X("[0,8]"), -1, 9, "the last 1 bytes belong to no tensor"},
        {X("[4,12]"), -1, 12, "4 bytes before tensor \"x\" belong to no tensor"},
        {"{" TENSOR("a", "0", "4") "," TENSOR("b", "2", "6") "}", -1, 6, "tensor \"b\" overlaps tensor \"a\""},
        {"{" TENSOR("a", "0", "4") "," TENSOR("b", "0", "4") "}", -1, 4, "overlaps"},
        {"{" TENSOR("a", "0", "4") "," TENSOR("a", "4", "8") "}", -1, 8, "has the key \"a\" twice"},
        {"{" TENSOR("a\\u0000b", "0", "4") "}", -1, 4, "NUL"},
        {"{\"__metadata__\":{\"a\":1}," TENSOR("a", "0", "4") "}", -1, 4, "metadata \"a\" is a number"},
        {"{\"__metadata__\":[]," TENSOR("a", "0", "4") "}", -1, 4, "__metadata__ is a list"},
    };
    for (size_t i = 0; i < sizeof broken / sizeof broken[0]; i++) {
        Text t = {NULL, 0, 0};
        char zeros[64] = {0};
        int64_t length = broken[i].length == -1 ? (int64_t)strlen(broken[i].header) : broken[i].length;
        text_put(&t, &length, 8);
        text_add(&t, "%s", broken[i].header);
        text_put(&t, zeros, broken[i].data);
        path = write_temporary("broken.safetensors", t.data, t.len);
        check_error(safetensors_open(&st, path, err), err, broken[i].wanted, broken[i].header);
        check(strncmp(err, path, strlen(path)) == 0, "the error names the file: %s", err);
        safetensors_close(&st);
        free(t.data);
    }
    check_error(safetensors_open(&st, write_temporary("tiny", "abc", 3), err), err, "only 3 bytes", "three bytes");
    check_error(safetensors_open(&st, write_temporary("tiny", "", 0), err), err, "only 0 bytes", "an empty file");
    check_error(safetensors_open(&st, folder, err), err, "is a folder", "a folder");
    check_error(safetensors_open(&st, temporary("none"), err), err, "No such file", "no file");
}

// ----------------------------------------------------------------------------

// A .bin file whose token i is i * step + offset; its header says `promised`.
const char *write_bin(const char *name, int version, int64_t count, int promised, int step, int offset) {
    Text t = {NULL, 0, 0};
    int32_t header[256] = {20240520, version, promised};
    text_put(&t, header, sizeof header);
    for (int64_t i = 0; i < count; i++) {
        uint32_t token = (uint32_t)(i * step + offset);
        text_put(&t, &token, version == 1 ? 2 : 4);  // little-endian: the low half comes first
    }
    const char *path = write_temporary(name, t.data, t.len);
    free(t.data);
    return path;
}

void test_data(void) {
    char err[ERR_LEN], *pattern;
    DataSet train, val;
    check(data_open(&train, &val, write_bin("a.bin", 1, 105, 105, 3, 1), NULL, NULL, 50257, err) == 0, "version 1");
    check(train.tokens == 94 && val.tokens == 11, "the split is at %" PRId64, train.tokens);
    check(stream_token(&train.streams[0], 93) == 280 && stream_token(&val.streams[0], 0) == 283, "tokens around the split");
    check_error(data_check(&train, 94, "-i", err), err, "has only 94 tokens, but -t 94 needs 95", "too short");
    check(data_check(&train, 93, "-i", err) == 0, "just long enough");
    check_error(data_check(&val, 64, "-i", err), err, "the last tenth of", "validation too short");
    data_free(&train);
    data_free(&val);
    check(data_open(&train, &val, write_bin("b.bin", 2, 50, 50, 100000, 0), temporary("a.bin"), NULL, 5000000, err) == 0, "version 2: %s", err);
    check(train.tokens == 50 && val.tokens == 105 && stream_token(&train.streams[0], 49) == 4900000, "uint32 tokens");
    data_free(&train);
    data_free(&val);
    pattern = format("%s/[ab].bin", folder);
    check(data_is_bin(pattern) && data_open(&train, &val, pattern, NULL, NULL, 5000000, err) == 0, "a pattern");
    check(train.num_streams == 2 && train.tokens == 139 && val.num_streams == 1 && val.tokens == 16, "a split in the second of two files");
    data_free(&train);
    data_free(&val);
    free(pattern);

    struct { const char *path, *wanted; int64_t vocab; } bad[] = {
        {"missing.bin", "No such file", 300}, {"no*match.bin", "no file matches", 300}, {".", "is a folder", 300}, {"text.bin", "not 20240520", 300},
        {"small.bin", "less than its header", 300}, {"cut.bin", "truncated token file: its header promises 100 tokens, which is 1224 bytes, but it has 1222", 300},
        {"long.bin", "oversized token file", 300}, {"v3.bin", "version 3", 300}, {"none.bin", "without tokens", 300}, {"negative.bin", "says -5", 300},
        {"over.bin", "token 99 is 300, but the vocabulary has only 300 tokens: give --vocab 301 or more", 300}, {"empty.txt", "the text is empty", 256},
        {"mixed*", "a text among token files", 300}, {"ascii.txt", "token 2 is 195, but the vocabulary has only 128", 128}};
    Text text = {NULL, 0, 0};
    for (int i = 0; i < 200; i++) text_add(&text, "not tokens ");
    write_temporary("text.bin", text.data, text.len);
    free(text.data);
    write_temporary("small.bin", "x", 1);
    write_bin("cut.bin", 1, 99, 100, 1, 0);
    write_bin("long.bin", 2, 101, 100, 1, 0);
    write_bin("v3.bin", 3, 10, 10, 1, 0);
    write_bin("none.bin", 1, 0, 0, 1, 0);
    write_bin("negative.bin", 1, 0, -5, 1, 0);
    write_bin("over.bin", 1, 100, 100, 1, 201);
    write_temporary("empty.txt", "", 0);
    write_bin("mixed1.bin", 1, 9, 9, 1, 0);
    write_temporary("mixed2.txt", "x", 1);
    write_temporary("ascii.txt", "ab\xc3\xa9 cdefghijk", 14);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        check_error(data_open(&train, &val, temporary(bad[i].path), NULL, NULL, bad[i].vocab, err), err, bad[i].wanted, bad[i].path);
    check_error(data_open(&train, &val, temporary("a.bin"), temporary("cut.bin"), NULL, 400, err), err, "cut.bin: truncated", "-j");

    write_temporary("1.txt", "0123456789", 10);
    write_temporary("2.txt", "abcdefghij", 10);
    pattern = format("%s/[12].txt", folder);
    check(!data_is_bin(pattern) && data_open(&train, &val, pattern, NULL, NULL, 256, err) == 0, "two texts");
    int tokens[32];
    stream_read(&train.streams[0], 8, 4, tokens);
    check(train.num_streams == 1 && train.tokens == 18 && val.tokens == 2 && tokens[1] == '9' && tokens[2] == 'a', "are one text");
    data_free(&train);
    data_free(&val);
    free(pattern);
    check(data_from_memory(&train, &val, "hello world!", 12, NULL, 256, err) == 0 && train.tokens == 10 && val.tokens == 2, "from memory");
    data_free(&train);
    data_free(&val);
    check_error(data_from_memory(&train, &val, "", 0, NULL, 256, err), err, "is empty", "nothing");
}

// Streams of the given lengths, whose tokens say where they stand: stream * 1000000 + place.
DataSet numbered_data(const int64_t *counts, int n) {
    DataSet d;
    memset(&d, 0, sizeof d);
    for (int k = 0; k < n; k++) {
        int32_t *tokens = (int32_t *)malloc((size_t)counts[k] * 4);
        for (int64_t i = 0; i < counts[k]; i++) tokens[i] = (int32_t)(k * 1000000 + i);
        FileMap file = {(const unsigned char *)tokens, 4 * counts[k], 0};
        DataBuffer *b = buffer_new(file);
        data_add(&d, b, file.data, counts[k], 4, INT64_C(1) << 32);
        buffer_release(b);
    }
    return d;
}

void test_order(void) {
    enum { T = 16, EPOCHS = 4 };
    const int64_t counts[] = {1000, 16, 17, 31, 32, 33, 500, 1};
    DataSet d = numbered_data(counts, 8);
    Order o, other;
    order_init(&o, &d, T, 42);
    check(o.windows == 61 + 0 + 1 + 1 + 1 + 1 + 30 + 0, "windows in an epoch: %" PRId64, o.windows);
    int tokens[T + 1], wrong = 0, *starts = (int *)xmalloc((size_t)(EPOCHS * o.windows) * sizeof(int));
    for (int64_t s = 0; s < EPOCHS * o.windows; s++) {
        wrong += order_next(&o, &d, tokens) != s;
        for (int i = 0; i <= T; i++) wrong += tokens[i] != tokens[0] + i;  // T + 1 tokens of one stream
        starts[s] = tokens[0];
    }
    check(!wrong, "windows are whole and numbered in order");
    int phases[EPOCHS], moved = 0;
    for (int e = 0; e < EPOCHS; e++) {
        int seen[8] = {0}, overlaps = 0, phase = -1;
        const int *epoch = starts + e * o.windows;
        for (int64_t i = 0; i < o.windows; i++) {
            seen[epoch[i] / 1000000]++;
            if (epoch[i] < 1000000) {
                overlaps += phase >= 0 && epoch[i] % T != phase;
                phase = epoch[i] % T;
            }
            for (int64_t j = 0; j < i; j++) overlaps += abs(epoch[i] - epoch[j]) < T;
            moved += e > 0 && epoch[i] / T != starts[i] / T;
        }
        phases[e] = phase;
        check(!overlaps && seen[0] == 61 && seen[1] == 0 && seen[2] == 1 && seen[3] == 1 && seen[6] == 30, "each window once in epoch %d", e);
    }
    check(phases[0] != phases[1] || phases[1] != phases[2] || phases[2] != phases[3], "phases differ between epochs");
    check(moved > (EPOCHS - 1) * o.windows * 8 / 10, "epochs are shuffled anew: %d moved", moved);
    wrong = 0;
    order_init(&other, &d, T, 42);
    for (int64_t s = EPOCHS * o.windows - 1; s >= 0; s -= 7) {  // any rank may ask for any sequence
        order_seek(&other, s);
        wrong += order_next(&other, &d, tokens) != s || tokens[0] != starts[s];
    }
    check(!wrong, "seeking gives what iterating gives");
    order_free(&other);
    order_init(&other, &d, T, 43);
    int same = 0;
    for (int64_t s = 0; s < o.windows; s++) {
        order_next(&other, &d, tokens);
        same += tokens[0] / T == starts[s] / T;
    }
    check(same < o.windows / 5, "another seed, another order: %d equal", same);
    order_free(&other);
    order_free(&o);
    free(starts);

    for (int64_t n = 1; n < 40; n++) {
        int seen[40] = {0}, bad = 0;
        for (int64_t i = 0; i < n; i++) seen[order_shuffle(7, 8, i, n)]++;
        for (int64_t i = 0; i < n; i++) bad += seen[i] != 1;
        check(!bad, "a permutation of %" PRId64, n);
    }
    double chi2 = 0;
    int table[5][5] = {{0}};
    for (uint64_t e = 0; e < 5000; e++)
        for (int i = 0; i < 5; i++) table[i][order_shuffle(7, e, i, 5)]++;
    for (int i = 0; i < 25; i++) chi2 += (table[i / 5][i % 5] - 1000.0) * (table[i / 5][i % 5] - 1000.0) / 1000;
    check(chi2 < 40, "every place for every window, equally often: chi2 %g", chi2);

    int64_t i = 0, covered = 0;
    for (wrong = 0; data_val_window(&d, T, i, tokens); i++) {
        for (int j = 0; j <= T; j++) wrong += tokens[j] != tokens[0] + j;
        wrong += tokens[0] % 1000000 % T != 0;
        covered += T;
    }
    check(!wrong && i == data_val_windows(&d, T) && i == 62 + 0 + 1 + 1 + 1 + 2 + 31 && covered == i * T, "validation windows: %" PRId64, i);
    check(data_val_window(&d, T, 62, tokens) && tokens[0] == 2000000 && !data_val_window(&d, T, -1, tokens), "a window of the third stream");
    data_free(&d);
}

// ----------------------------------------------------------------------------

void test_utf8(void) {
    // what Python's bytes.decode("utf-8", "replace") makes of them
    const struct { const char *bytes, *wanted; } cases[] = {
        {"plain", "plain"}, {"\xc3\xa9\xe4\xba\xba\xf0\x9f\x99\x82", "\xc3\xa9\xe4\xba\xba\xf0\x9f\x99\x82"}, {"a\xff" "b", "a\xef\xbf\xbd" "b"},
        {"\xe2\x82" "A", "\xef\xbf\xbd" "A"}, {"\xf0\x9f\x99", "\xef\xbf\xbd"}, {"\xed\xa0\x80", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"},
        {"\xc0\x80", "\xef\xbf\xbd\xef\xbf\xbd"}, {"\xe0\x80\xaf", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"}, {"\xf0\x9f\xc3\xa9", "\xef\xbf\xbd\xc3\xa9"},
        {"\xf4\x90\x80", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"}, {"\xe4\xba\xe4\xba\xba", "\xef\xbf\xbd\xe4\xba\xba"}, {"\xc3", "\xef\xbf\xbd"}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        for (int step = 1; step <= 20; step += 19) {
            Utf8Stream u;
            Text t = {NULL, 0, 0};
            memset(&u, 0, sizeof u);
            int n = (int)strlen(cases[i].bytes);
            for (int at = 0; at < n; at += step) utf8_stream_push(&u, cases[i].bytes + at, n - at < step ? n - at : step, &t);
            utf8_stream_flush(&u, &t);
            check(strcmp(t.data, cases[i].wanted) == 0, "UTF-8 stream %zu in steps of %d: %s", i, step, t.data);
            free(t.data);
        }
    Utf8Stream u;
    Text t = {NULL, 0, 0};
    memset(&u, 0, sizeof u);
    text_put(&t, "", 0);
    utf8_stream_push(&u, "\xe4\xba", 2, &t);
    check(t.len == 0, "half a character waits");
    utf8_stream_push(&u, "\xba", 1, &t);
    check(t.len == 3, "until it is whole");
    free(t.data);
}

void test_tokenizer_fixture(const char *kind, const Json *cases) {
    char err[ERR_LEN], *path = format("test/fixtures/tokenizer_%s.json", kind);
    Tokenizer t;
    if (tokenizer_open(&t, path, err) < 0) {
        check(0, "%s", err);
        free(path);
        return;
    }
    int len, specials = 0;
    for (int id = 0; id < t.vocab_size; id++) specials += tokenizer_special(&t, id, &len) != NULL && tokenizer_piece(&t, id, &len)[len] == 0 && len == 0;
    check(specials == 3 && t.eos_id >= 600 && t.vocab_size >= 605, "%s: %d special tokens, end %d of %d", kind, specials, t.eos_id, t.vocab_size);
    int64_t number = 0;
    for (const Json *c = cases->child; c; c = c->next, number++) {
        const Json *text = json_get(c, "text"), *wanted = json_get(c, kind);
        int32_t *ids;
        int64_t n, i = 0;
        check(tokenizer_encode(&t, text->str, text->len, &ids, &n, err) == 0, "encode");
        int same = n == wanted->len;
        for (const Json *w = wanted->child; w && same; w = w->next) same = ids[i++] == w->integer;
        check(same, "%s: case %" PRId64 " differs: %.60s", kind, number, text->str);
        Text back = {NULL, 0, 0};
        text_put(&back, "", 0);
        for (i = 0; i < n; i++) {
            const char *piece = tokenizer_special(&t, ids[i], &len);
            if (!piece) piece = tokenizer_piece(&t, ids[i], &len);
            text_put(&back, piece, len);
        }
        if (!t.nfc) check(back.len == text->len && memcmp(back.data, text->str, (size_t)back.len) == 0, "%s: case %" PRId64 " does not come back", kind, number);
        free(back.data);
        free(ids);
    }
    // bytes that are no UTF-8 go in and come out, too
    int32_t *ids;
    int64_t n, bytes = 0;
    tokenizer_encode(&t, "a\xff\xfe b\xc3 \xe4\xba", 9, &ids, &n, err);
    for (int64_t i = 0; i < n; i++) {
        tokenizer_piece(&t, ids[i], &len);
        bytes += len;
    }
    check(bytes == 9, "%s: invalid UTF-8 keeps its bytes: %" PRId64, kind, bytes);
    free(ids);
    // near-linear: a run of one letter, a run of signs that never merge
    double start = now_seconds();
    char *run = (char *)xmalloc(1000000);
    memset(run, 'a', 1000000);
    check(tokenizer_encode(&t, run, 1000000, &ids, &n, err) == 0 && n > 0, "a run");
    free(ids);
    memset(run, ' ', 1000000);
    check(tokenizer_encode(&t, run, 1000000, &ids, &n, err) == 0 && n > 0, "a run");
    free(ids);
    free(run);
    check(now_seconds() - start < 20, "%s: 2 MB of runs took %.1f s", kind, now_seconds() - start);
    // data are split between characters
    DataSet train, val;
    check(data_from_memory(&train, &val, "aaaaaaaa\xe4\xba\xba", 11, &t, t.vocab_size, err) == 0 && val.tokens == 0, "%s: split inside a character", kind);
    data_free(&train);
    data_free(&val);
    tokenizer_free(&t);
    free(path);
}

// `tree` with the first `from` replaced by `to` must be refused, for the reason `wanted`.
void test_tokenizer_refuses(const char *tree, const char *from, const char *to, const char *wanted) {
    char err[ERR_LEN];
    const char *at = strstr(tree, from);
    check(at != NULL, "the fixture has no %s", from);
    if (!at) return;
    Text text = {NULL, 0, 0};
    text_put(&text, tree, at - tree);
    text_add(&text, "%s%s", to, at + strlen(from));
    const char *path = write_temporary("tokenizer.json", text.data, text.len);
    Tokenizer t;
    int result = tokenizer_open(&t, path, err);
    check_error(result, err, wanted, to);
    check(result == 0 || strncmp(err, path, strlen(path)) == 0, "the error names the file: %s", err);
    if (!result) tokenizer_free(&t);
    free(text.data);
}

void test_tokenizer(void) {
    char err[ERR_LEN], *text;
    int64_t len;
    Json *root;
    if (read_file("test/fixtures/tokenizer_cases.json", &text, &len, err) < 0 || json_parse(&root, text, len, err) < 0) {
        check(0, "%s (run from the root of the repository)", err);
        return;
    }
    free(text);
    test_tokenizer_fixture("gpt2", json_get(root, "cases"));
    test_tokenizer_fixture("llama3", json_get(root, "cases"));
    test_tokenizer_fixture("qwen2", json_get(root, "cases"));
    json_free(root);

    if (read_file("test/fixtures/tokenizer_gpt2.json", &text, &len, err) < 0) die(1, "%s", err);
    const struct { const char *from, *to, *wanted; } gpt2[] = {
        {"\"type\":\"BPE\"", "\"type\":\"Unigram\"", "model type \"Unigram\" is not supported (only byte-level BPE)"},
        {"\"model\"", "\"modle\"", "not a tokenizer.json"},
        {"\"dropout\":null", "\"dropout\":0.1", "with dropout is not supported"},
        {"\"byte_fallback\":false", "\"byte_fallback\":true", "with byte_fallback"},
        {"\"end_of_word_suffix\":null", "\"end_of_word_suffix\":\"</w>\"", "with end_of_word_suffix"},
        {"\"normalizer\":null", "\"normalizer\":{\"type\":\"NFKC\"}", "normalizer \"NFKC\" is not supported"},
        {"\"add_prefix_space\":false", "\"add_prefix_space\":true", "add_prefix_space true"},
        {"\"use_regex\":true", "\"use_regex\":false", "use_regex false"},
        {"\"pre_tokenizer\":{\"type\":\"ByteLevel\"", "\"pre_tokenizer\":{\"type\":\"Whitespace\"", "pre_tokenizer \"Whitespace\" is not supported"},
        {"\"decoder\":{\"type\":\"ByteLevel\"", "\"decoder\":{\"type\":\"WordPiece\"", "decoder \"WordPiece\""},
        {"\"lstrip\":false", "\"lstrip\":true", "lstrip true is not supported"},
        {"\"a\":", "\"aaaaaaaa\":", "byte 0x61 is not in the vocabulary"},
        {"\"!\":0", "\"!\":1", "have the id 1"},
        {"\"!\":0", "\"!\":2000000000", "not a number in range"},
        {"\"!\":0", "\"!\":-1", "not a number in range"},
        {"\"!\":0", "\"!\":\"0\"", "not a number in range"},
        {"\"merges\":[\"", "\"merges\":[\"zq zq\",\"", "merge 0, \"zq zq\", is broken"},
        {"\"merges\":[\"", "\"merges\":[5,\"", "merge 0, \"\", is broken"},
        {"\"merges\":", "\"merge\":", "model.merges is missing"},
        {"\"vocab\":{", "\"vocab\":[{", "broken JSON"},
        {"\"id\":600", "\"id\":60", "has the id 60 of another token"},
    };
    for (size_t i = 0; i < sizeof gpt2 / sizeof gpt2[0]; i++) test_tokenizer_refuses(text, gpt2[i].from, gpt2[i].to, gpt2[i].wanted);
    test_tokenizer_refuses(text, text, "", "ends where a value should stand");
    free(text);
    if (read_file("test/fixtures/tokenizer_llama3.json", &text, &len, err) < 0) die(1, "%s", err);
    test_tokenizer_refuses(text, "{1,3}", "{1,4}", "the split pattern \"(?i:");
    test_tokenizer_refuses(text, "\"Isolated\"", "\"Removed\"", "not \"Isolated\"");
    test_tokenizer_refuses(text, "\"type\":\"Split\"", "\"type\":\"Digits\"", "starts with \"Digits\"");
    test_tokenizer_refuses(text, "\"use_regex\":false", "\"use_regex\":true", "use_regex true");
    free(text);

    Tokenizer t;
    int32_t *ids;
    int64_t n;
    int piece;
    tokenizer_bytes(&t);
    check(tokenizer_encode(&t, "a\0\xff", 3, &ids, &n, err) == 0 && n == 3 && ids[1] == 0 && ids[2] == 255, "bytes");
    check(t.vocab_size == 256 && t.eos_id == -1 && tokenizer_piece(&t, 255, &piece)[0] == '\xff' && piece == 1, "and back");
    tokenizer_piece(&t, 256, &piece);
    check(piece == 0, "a token that is none");
    free(ids);
    tokenizer_free(&t);
    check_error(tokenizer_open(&t, folder, err), err, "is a folder", "a folder");
}

// Rank 0 exchanges a byte with the ranks 1 and 2, who behave as told: each waits, gives its byte or not, waits and ends.
// What rank 0 says then is in `said`; its exit code is returned.
typedef struct Peer { int give; useconds_t before, after; } Peer;

int exchange_with(const Peer peers[2], char *said, size_t size) {
    int to[3][2], out[2];
    pid_t pid[3];
    fflush(stdout);
    if (pipe(out) < 0) die(1, "pipe: %s", strerror(errno));
    for (int r = 1; r < 3; r++) if (socketpair(AF_UNIX, SOCK_STREAM, 0, to[r]) < 0) die(1, "socketpair: %s", strerror(errno));
    for (int r = 0; r < 3; r++) {
        pid[r] = fork();
        if (pid[r] < 0) die(1, "fork: %s", strerror(errno));
        if (pid[r]) continue;
        for (int other = 1; other < 3; other++) {   // a connection ends when nobody holds it
            close(to[other][r == 0]);
            if (r && other != r) close(to[other][1]);
        }
        if (r) {
            const Peer *peer = &peers[r - 1];
            usleep(peer->before);
            const int gave = !peer->give || write(to[r][1], "", 1) == 1;
            usleep(peer->after);
            _exit(!gave);
        }
        int sockets[3] = {-1, to[1][0], to[2][0]};
        char in[3], byte = 0;
        dup2(out[1], 2);
        comm.rank = 0, comm.ranks = 3, comm.sockets = sockets, comm.started = 1;
        comm_gather(in, &byte, 1);
        _exit(0);
    }
    for (int r = 1; r < 3; r++) close(to[r][0]), close(to[r][1]);
    close(out[1]);
    const ssize_t n = read(out[0], said, size - 1);
    said[n > 0 ? n : 0] = 0;
    close(out[0]);
    int status = 0, code = -1;
    for (int r = 2; r >= 0; r--) {
        waitpid(pid[r], &status, 0);
        code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
        if (r) check(code == 0, "rank %d: exit %d", r, code);
    }
    return code;
}

// A rank that ends takes the others with it, seconds later. It is the first that has to be named.
void test_ranks(void) {
    const struct { Peer peers[2]; int code; const char *said; } cases[] = {
        {{{1, 0, 200000}, {1, 100000, 0}}, 0, ""},
        {{{1, 0, 0}, {1, 300000, 0}}, 0, ""},                                   // it had given what it had to
        {{{0, 100000, 0}, {1, 0, 400000}}, 1, ": rank 1 has ended:"},
        {{{1, 0, 400000}, {0, 100000, 0}}, 1, ": rank 2 has ended:"},
        {{{1, 0, 0}, {0, 400000, 0}}, 1, ": rank 1 has ended:"},                // rank 2 because of rank 1
        {{{0, 400000, 0}, {1, 0, 0}}, 1, ": rank 2 has ended:"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char said[512];
        const int code = exchange_with(cases[i].peers, said, sizeof said);
        check(code == cases[i].code && strstr(said, cases[i].said) && (code || !said[0]), "ranks, case %zu: exit %d, \"%s\"", i, code, said);
    }
}

int main(void) {
    const char *base = getenv("TMPDIR");
    snprintf(folder, sizeof folder, "%s/test_io_XXXXXX", base && strlen(base) < 200 ? base : "/tmp");
    if (!mkdtemp(folder)) die(1, "%s: %s", folder, strerror(errno));
    test_utilities();
    test_json();
    test_safetensors();
    test_data();
    test_order();
    test_utf8();
    test_tokenizer();
    test_ranks();
    FileList files;
    char err[ERR_LEN], *all = format("%s/*", folder);
    if (file_list(&files, all, err) == 0) {
        for (int i = 0; i < files.count; i++) unlink(files.names[i]);
        file_list_free(&files);
    }
    free(all);
    rmdir(folder);
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
