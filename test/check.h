// Counts what a test finds; failing results say what they saw. Test programs end with "N passed, N failed".

static int passed = 0, failed = 0;

__attribute__((format(printf, 2, 3)))
static void check(int ok, const char *fmt, ...) {
    if (ok) {
        passed++;
        return;
    }
    va_list ap;
    va_start(ap, fmt);
    printf("FAILED ");
    vprintf(fmt, ap);
    printf("\n");
    va_end(ap);
    failed++;
}
