/*
nsa.c: GPTs with Native Sparse Attention (NSA, arXiv 2502.11089), trained in plain C.

This one file is the whole CPU program: text in, model folder out. It needs a C compiler and nothing
else (OpenMP makes it faster). train_nsa.cu includes it and replaces the computation by CUDA kernels.

What NSA is. Dense attention lets token t look at all t tokens before it, so a context twice as long
costs four times as much. NSA lets it look three ways at few things, and learns how to mix them:

    tokens 0 ........................................................ t
           |====|====|====|====|====|====|====|====|====|====|====|==
   cmp      [1]  [2]  [3]  [4]  [5]  [6]  [7]  [8]  [9] ...             every block, but each one
             :         :                        :                       squeezed into a single key
             : its attention weights say which blocks matter            and value: the overview
             v         v                        v
   slc     |####|    |####|                   |####|         |#######   the few best blocks, the first
                                                                        and the last: word for word
   win                                                  |############   the last w tokens: what is near

                 out(t) = g_cmp * o_cmp  +  g_slc * o_slc  +  g_win * o_win

The gates g come from the token itself. Each branch has its own keys and values. Choosing the blocks
costs little: their scores are the overview's attention weights, which are needed anyway.

    make                      build: needs a C compiler and make, nothing else
    ./train_nsa               train a small model on the built-in corpus and read what it writes
    ./train_nsa -i book.txt   train on your own text;  ./train_nsa --help  lists everything

The order of the sections; each uses only what stands above it:
    1. utilities       errors, memory, files, ranks, random numbers
    2. JSON and safetensors
    3. configuration   the model's shape, presets, config.json, the command line
    4. data            tokenizer, token files, the order of training
    5. layers          each one a forward and a backward, side by side
    6. model           the table of parameters, forward, backward, AdamW
    7. training        schedule, checkpoints, log, the loop, main

SPDX-License-Identifier: MIT
*/

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <glob.h>
#include <ifaddrs.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <time.h>
#ifdef USE_CBLAS
#include <cblas.h>
#endif
#ifdef USE_MPI
#define OMPI_SKIP_MPICXX 1
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>
#endif
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "token files and safetensors are little-endian, and are read as they lie in memory"
#endif

// The type of every activation and weight. The tests compile this file with -Dreal=double, where
// finite differences are sharp enough to check a gradient to nine digits.
#ifndef real
typedef float real;
#endif

// Small functions that the kernels of train_nsa.cu call too.
#ifdef __CUDACC__
#define DEVICE __host__ __device__
#else
#define DEVICE
#endif
#define INLINE static inline __attribute__((always_inline))

DEVICE INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
DEVICE INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// ----------------------------------------------------------------------------
// 1. Utilities: errors, memory, growing text

const char *program_name = "train_nsa";

enum { ERR_LEN = 512 };  // size of every `err` buffer

// One message is one line, whatever stands in the file names and values it quotes.
__attribute__((format(printf, 3, 0)))
static void one_line(char *line, size_t size, const char *fmt, va_list ap) {
    vsnprintf(line, size, fmt, ap);
    for (char *s = line; *s; s++) if ((unsigned char)*s < 32 || *s == 127) *s = ' ';
}

// This process among those that share the run (see Ranks): alone, it is rank 0 of 1.
typedef struct Comm {
    int rank, ranks, local_rank;    // local: among those of this host
    int shards;         // ranks that share the state of AdamW among them (-z 1), else 1
    int parts;          // neighbouring ranks that share each sequence (--context-parallel), else 1
    int mpi, *sockets;  // how to reach the others
    int together;       // in a phase that all ranks end together, and hear who failed in it
    int started;        // the first step is done
    int failed;         // the run ends, and nobody waits for the others
    double timeout, last_tick;      // seconds
} Comm;
Comm comm = {0, 1, 0, 1, 1, 0, NULL, 0, 0, 0, 45, 0};

int comm_agree(int code, char *err);
__attribute__((noreturn)) void comm_quit(int code);
__attribute__((noreturn, format(printf, 2, 3))) void die_together(int code, const char *fmt, ...);

// A usage error exits with 2, a failure of the machine or of a file with 1. Where several ranks may fail alike, one of them says it.
__attribute__((noreturn, format(printf, 2, 3)))
void die(int code, const char *fmt, ...) {
    char line[4 * ERR_LEN];
    va_list ap;
    va_start(ap, fmt);
    one_line(line, sizeof line, fmt, ap);
    va_end(ap);
    if (comm.together) {
        code = comm_agree(code, line);
        die_together(code, "%s", line);
    }
    fflush(stdout);
    if (comm.ranks > 1) fprintf(stderr, "%s: rank %d: %s\n", program_name, comm.rank, line);
    else fprintf(stderr, "%s: %s\n", program_name, line);
    comm_quit(code);
}

__attribute__((format(printf, 1, 2)))
void warn(const char *fmt, ...) {
    char line[4 * ERR_LEN];
    va_list ap;
    if (comm.rank) return;      // all ranks have the same reason
    va_start(ap, fmt);
    one_line(line, sizeof line, fmt, ap);
    va_end(ap);
    fflush(stdout);
    fprintf(stderr, "%s: warning: %s\n", program_name, line);
}

// Whatever reads a file returns 0, or -1 with one clear line in err. It never exits, so that a caller
// can add what it knows, and so that a fuzzer can run it: `return fail(err, "%s: ...", path)`.
__attribute__((format(printf, 2, 3)))
int fail(char *err, const char *fmt, ...) {
    char line[ERR_LEN];  // err itself may be among the arguments
    va_list ap;
    va_start(ap, fmt);
    one_line(line, sizeof line, fmt, ap);
    va_end(ap);
    memcpy(err, line, sizeof line);
    return -1;
}

// 64-byte aligned: a cache line, and the widest vector register.
void *xmalloc(size_t bytes) {
    void *p = NULL;
    if (posix_memalign(&p, 64, bytes ? bytes : 1) != 0) die(1, "out of memory: %zu bytes asked for", bytes);
    return p;
}

void *xcalloc(size_t n, size_t size) {
    if (size && n > SIZE_MAX / size) die(1, "out of memory: %zu times %zu bytes asked for", n, size);
    void *p = xmalloc(n * size);
    memset(p, 0, n * size);
    return p;
}

// For lists that grow; what it returns is aligned as malloc aligns.
void *xrealloc(void *old, size_t bytes) {
    void *p = realloc(old, bytes ? bytes : 1);
    if (!p) die(1, "out of memory: %zu bytes asked for", bytes);
    return p;
}

char *xstrdup(const char *s) {
    size_t n = strlen(s) + 1;
    return (char *)memcpy(xmalloc(n), s, n);
}

__attribute__((format(printf, 1, 2)))
char *format(const char *fmt, ...) {
    va_list ap, again;
    va_start(ap, fmt);
    va_copy(again, ap);
    int n = vsnprintf(NULL, 0, fmt, ap);
    va_end(ap);
    char *s = (char *)xmalloc((size_t)(n < 0 ? 0 : n) + 1);
    s[0] = 0;
    if (n > 0) vsnprintf(s, (size_t)n + 1, fmt, again);
    va_end(again);
    return s;
}

// A growing buffer of bytes, always NUL-terminated behind len. Starts as {0}; free(text.data) ends it.
typedef struct { char *data; int64_t len, cap; } Text;

void text_reserve(Text *t, int64_t more) {
    if (t->len + more + 1 <= t->cap) return;
    t->cap = 2 * t->cap > t->len + more + 1 ? 2 * t->cap : t->len + more + 32;
    t->data = (char *)xrealloc(t->data, (size_t)t->cap);
}

void text_put(Text *t, const void *bytes, int64_t n) {
    text_reserve(t, n);
    if (n > 0) memcpy(t->data + t->len, bytes, (size_t)n);
    t->len += n;
    t->data[t->len] = 0;
}

__attribute__((format(printf, 2, 3)))
void text_add(Text *t, const char *fmt, ...) {
    va_list ap, again;
    va_start(ap, fmt);
    va_copy(again, ap);
    int n = vsnprintf(NULL, 0, fmt, ap);
    va_end(ap);
    text_reserve(t, n > 0 ? n : 0);
    t->data[t->len] = 0;
    if (n > 0) vsnprintf(t->data + t->len, (size_t)n + 1, fmt, again);
    va_end(again);
    t->len += n > 0 ? n : 0;
}

// FNV-1a, of one piece after another
#define HASH_START UINT64_C(14695981039346656037)
static inline uint64_t hash_more(uint64_t h, const void *data, int64_t n) {
    for (int64_t i = 0; i < n; i++) h = (h ^ ((const unsigned char *)data)[i]) * 1099511628211u;
    return h;
}
static inline uint64_t hash_bytes(const char *s, int64_t n) {
    const uint64_t h = hash_more(HASH_START, s, n);
    return h ^ (h >> 32);
}

// Of something that may be larger than memory: then samples of it must do.
uint64_t hash_large(uint64_t h, const void *data, int64_t n) {
    enum { BLOCK = 4096, BLOCKS = 4096 };
    h = hash_more(h, &n, sizeof n);
    if (n <= BLOCK * BLOCKS) return hash_more(h, data, n);
    for (int64_t i = 0; i < BLOCKS; i++) h = hash_more(h, (const char *)data + (n - BLOCK) / (BLOCKS - 1) * i, BLOCK);
    return h;
}

// ----------------------------------------------------------------------------
// Files

// Reads a whole file, a pipe too, NUL-terminated behind len; free(*data) ends it.
int read_file(const char *path, char **data, int64_t *len, char *err) {
    *data = NULL;
    *len = 0;
    FILE *f = fopen(path, "rb");
    if (!f) return fail(err, "%s: cannot open: %s", path, strerror(errno));
    struct stat st;
    if (fstat(fileno(f), &st) == 0 && S_ISDIR(st.st_mode)) {
        fclose(f);
        return fail(err, "%s: is a folder, a file is needed", path);
    }
    size_t n = 0, cap = 0, got = 0;
    char *buf = NULL;
    do {
        n += got;
        if (n + 1 >= cap) {
            cap = cap ? 2 * cap : S_ISREG(st.st_mode) && st.st_size > 0 ? (size_t)st.st_size + 2 : 65536;
            char *bigger = (char *)realloc(buf, cap);
            if (!bigger) {
                free(buf);
                fclose(f);
                return fail(err, "%s: too large to read: no memory for %zu bytes", path, cap);
            }
            buf = bigger;
        }
    } while ((got = fread(buf + n, 1, cap - n - 1, f)) > 0);
    int bad = ferror(f), saved = errno;
    fclose(f);
    if (bad) {
        free(buf);
        return fail(err, "%s: cannot read: %s", path, strerror(saved));
    }
    buf[n] = 0;
    *data = buf;
    *len = (int64_t)n;
    return 0;
}

// Writes a whole file and makes sure that it is on the disk.
int write_file(const char *path, const char *data, int64_t len, char *err) {
    FILE *f = fopen(path, "wb");
    if (!f) return fail(err, "%s: cannot create: %s", path, strerror(errno));
    int ok = fwrite(data, 1, (size_t)len, f) == (size_t)len && fflush(f) == 0 && fsync(fileno(f)) == 0;
    int saved = errno;
    if (fclose(f) != 0 && ok) ok = 0, saved = errno;
    return ok ? 0 : fail(err, "%s: cannot write: %s", path, strerror(saved));
}

// A file as memory. Token files are larger than memory at times, so regular files are mapped, not
// read; a pipe cannot be mapped and is read.
typedef struct { const unsigned char *data; int64_t len; int mapped; } FileMap;

int file_map(FileMap *m, const char *path, char *err) {
    memset(m, 0, sizeof *m);
    int fd = open(path, O_RDONLY);
    if (fd < 0) return fail(err, "%s: cannot open: %s", path, strerror(errno));
    struct stat st;
    if (fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && st.st_size > 0) {
        void *p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        int saved = errno;
        close(fd);
        if (p == MAP_FAILED) return fail(err, "%s: cannot map: %s", path, strerror(saved));
        m->data = (const unsigned char *)p;
        m->len = (int64_t)st.st_size;
        m->mapped = 1;
        return 0;
    }
    close(fd);
    char *data = NULL;
    if (read_file(path, &data, &m->len, err) < 0) return -1;
    m->data = (const unsigned char *)data;
    return 0;
}

void file_unmap(FileMap *m) {
    if (m->mapped) munmap((void *)m->data, (size_t)m->len);
    else free((void *)m->data);
    memset(m, 0, sizeof *m);
}

// ----------------------------------------------------------------------------
// The machine

double now_seconds(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + 1e-9 * (double)ts.tv_nsec;
}

// OpenMP's threads wait for each other by spinning, up to 20 ms. Where another program wants one of the cores, every step then
// waits for a thread that is not running: a tenth of the speed. Let them sleep after half a millisecond. The library reads
// this before main begins, hence the second start; whoever has set such a variable is left alone.
void patient_threads(char **argv) {
#ifdef _OPENMP
    if (getenv("OMP_WAIT_POLICY") || getenv("GOMP_SPINCOUNT") || getenv("KMP_BLOCKTIME")) return;
    if (setenv("GOMP_SPINCOUNT", "10000", 1) == 0 && setenv("KMP_BLOCKTIME", "1", 1) == 0) execv("/proc/self/exe", argv);
#else
    (void)argv;     // one thread
#endif
}

// A data file that somebody cuts short while it is mapped raises this signal at the next look at it.
void on_lost_file(int signal_number) {
    static const char line[] = ": a file became shorter while it was read: leave the data alone while a run reads it\n";
    const ssize_t said = write(2, program_name, strlen(program_name)) + write(2, line, sizeof line - 1);
    (void)signal_number, (void)said;
    _exit(1);
}

// What every program does first.
void start_process(char **argv) {
    // A closed standard stream would hand its number to the first file that is opened, a log for example.
    int fd = open("/dev/null", O_RDWR);
    while (fd >= 0 && fd <= 2) fd = open("/dev/null", O_RDWR);
    if (fd > 2) close(fd);
    patient_threads(argv);
    signal(SIGXFSZ, SIG_IGN);       // a file over the limit is then an error like a full disk
    signal(SIGBUS, on_lost_file);
}

// Physical memory, 0 where the system does not say.
int64_t total_memory_bytes(void) {
    int64_t pages = (int64_t)sysconf(_SC_PHYS_PAGES), size = (int64_t)sysconf(_SC_PAGESIZE);
    return pages > 0 && size > 0 ? pages * size : 0;
}

// ----------------------------------------------------------------------------
// Ranks: the processes that share one run, on one machine or many. They talk through MPI or through plain sockets, and do one thing
// with either: an exchange, in which every rank has a parcel for each other one. All else is made of exchanges, with sums in the
// order of the ranks, so that the same ranks get the same bits. Who waits knows for whom: a rank that stays away for --timeout
// seconds is named, and the run ends.

typedef struct Parcel { const char *out; char *in; int64_t out_bytes, in_bytes; } Parcel;   // to and from one other rank

enum { COMM_CHUNK = 1 << 18 };      // numbers that two ranks exchange at a time

#ifdef USE_MPI
#define MPI(call) mpi_check((call), #call, __FILE__, __LINE__)
static void mpi_check(int status, const char *call, const char *file, int line) {
    if (status != MPI_SUCCESS) die(1, "%s:%d: %s: MPI error %d", file, line, call, status);
}
#endif

// Until the first step is done ranks may differ in how long they read files and compile kernels.
static double comm_patience(void) { return comm.timeout * (comm.started ? 1 : 10); }

// Ends this process, and with it the run. MPI takes the other ranks down; over sockets they see the connection close.
void comm_quit(int code) {
    comm.failed = 1;
    fflush(stdout);
#ifdef USE_MPI
    if (comm.mpi) MPI_Abort(MPI_COMM_WORLD, code);
#endif
    exit(code);
}

// The run ends because of ranks that are gone[r]. The lowest of the others says so.
__attribute__((noreturn))
static void comm_lost(const char *gone, const char *what) {
    Text names = {NULL, 0, 0};
    int speaker = -1, count = 0;
    for (int r = 0; r < comm.ranks; r++) {
        if (gone[r]) text_add(&names, "%s%d", count++ ? ", " : "", r);
        else if (speaker < 0) speaker = r;
    }
    if (comm.rank == speaker)
        fprintf(stderr, "%s: rank%s %s %s: the run ends here, its last checkpoint is whole\n", program_name, count > 1 ? "s" : "", names.data, what);
    else sleep(3);      // let that line out before MPI takes the others down
    comm_quit(1);
}

// Whoever waits may itself be waited for by others, who cannot tell. So, before a rank is named, all are asked: a rank that waits answers,
// one that hangs does not. Signs pass by the data: under MPI by their tag, on sockets as urgent bytes.
enum { SIGN_TAG = 1 };
static const char sign_ask = '?', sign_here = '!';

static void send_sign(int rank, const char *sign) {
#ifdef USE_MPI
    MPI_Request request;
    if (comm.mpi) {
        MPI(MPI_Isend(sign, 1, MPI_BYTE, rank, SIGN_TAG, MPI_COMM_WORLD, &request));
        MPI(MPI_Request_free(&request));
        return;
    }
#endif
    if (send(comm.sockets[rank], sign, 1, MSG_OOB | MSG_NOSIGNAL | MSG_DONTWAIT) < 0) return;      // then it will not answer either
}

// What a rank knows that waits in an exchange.
typedef struct Watch { double since, asked; char *heard; } Watch;

static void heard_sign(Watch *w, int rank, char sign) {
    w->heard[rank] = 1;
    if (sign == sign_ask) send_sign(rank, &sign_here);
}

static void watch(Watch *w) {
    const double answer = fmin(2, comm.timeout / 2);
    if (!w->asked && now_seconds() - w->since > comm_patience() - answer) {
        w->asked = now_seconds();
        memset(w->heard, 0, (size_t)comm.ranks);
        w->heard[comm.rank] = 1;
        for (int r = 0; r < comm.ranks; r++) if (r != comm.rank) send_sign(r, &sign_ask);
    }
    if (!w->asked || now_seconds() - w->asked < answer) return;
    char what[96];
    int all = 1;
    for (int r = 0; r < comm.ranks; r++) {
        all &= w->heard[r];
        w->heard[r] = !w->heard[r];     // now: who is gone
    }
    snprintf(what, sizeof what, "gave no sign of life for %g s (--timeout)", comm_patience());
    if (!all) comm_lost(w->heard, what);
    w->since = now_seconds();           // it was a long way
    w->asked = 0;
}

static Watch watch_new(void) {
    const Watch w = {now_seconds(), 0, (char *)xcalloc((size_t)comm.ranks, 1)};
    return w;
}

// Whoever waits for the other ranks in another way than in an exchange calls this again and again.
void comm_listen(Watch *w) {
    char sign;
#ifdef USE_MPI
    MPI_Status status;
    int there = 0;
    if (comm.mpi) MPI(MPI_Iprobe(MPI_ANY_SOURCE, SIGN_TAG, MPI_COMM_WORLD, &there, &status));
    if (there) {
        const int from = status.MPI_SOURCE;
        MPI(MPI_Recv(&sign, 1, MPI_BYTE, from, SIGN_TAG, MPI_COMM_WORLD, MPI_STATUS_IGNORE));
        heard_sign(w, from, sign);
    }
#endif
    for (int r = 0; r < comm.ranks && !comm.mpi; r++) {
        struct pollfd p = {comm.sockets[r], POLLPRI, 0};
        if (poll(&p, 1, 0) == 1 && (p.revents & POLLPRI) && recv(p.fd, &sign, 1, MSG_OOB | MSG_DONTWAIT) == 1) heard_sign(w, r, sign);
    }
    watch(w);
}

// Whether the other side has closed a connection, and nothing that it sent before waits to be read.
static int has_closed(int fd) {
    char byte;
    const ssize_t n = recv(fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT);
    return n == 0 || (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR);
}

// A rank that ends before all have what it owes them takes the others down, one after the other. So the first that is seen to have ended
// is remembered, though nothing is owed to or by it here: when another one is missed, that was why.
static void exchange_sockets(Parcel *p, Watch *w) {
    struct pollfd *fds = (struct pollfd *)xcalloc((size_t)comm.ranks, sizeof *fds);
    int first = -1;
    for (;;) {
        int64_t left = 0;
        for (int r = 0; r < comm.ranks; r++) {
            fds[r].fd = comm.sockets[r];
            fds[r].events = (short)(POLLPRI | (p[r].in_bytes ? POLLIN : 0) | (p[r].out_bytes ? POLLOUT : 0));
            left += p[r].in_bytes + p[r].out_bytes;
        }
        if (!left) break;
        const int ready = poll(fds, (nfds_t)comm.ranks, 100);
        if (ready < 0 && errno != EINTR) die(1, "cannot wait for the other ranks: %s", strerror(errno));
        for (int r = 0; r < comm.ranks; r++) {
            if (fds[r].fd < 0 || (ready > 0 && !fds[r].revents)) continue;
            ssize_t in = -1, out = -1;
            char sign;
            if ((fds[r].revents & POLLPRI) && recv(fds[r].fd, &sign, 1, MSG_OOB | MSG_DONTWAIT) == 1) heard_sign(w, r, sign);
            errno = EAGAIN;
            if (p[r].in_bytes && (in = recv(fds[r].fd, p[r].in, (size_t)p[r].in_bytes, MSG_DONTWAIT)) > 0) p[r].in += in, p[r].in_bytes -= in;
            if (in != 0 && p[r].out_bytes && (out = send(fds[r].fd, p[r].out, (size_t)p[r].out_bytes, MSG_DONTWAIT | MSG_NOSIGNAL)) > 0)
                p[r].out += out, p[r].out_bytes -= out;
            if (in > 0 || out > 0) w->since = now_seconds();
            else if (!p[r].in_bytes && !p[r].out_bytes) first = first < 0 && has_closed(fds[r].fd) ? r : first;
            else if (in == 0 || (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)) {
                char *gone = (char *)xcalloc((size_t)comm.ranks, 1);
                gone[first < 0 ? r : first] = 1;
                comm_lost(gone, "has ended");
            }
        }
        watch(w);
    }
    free(fds);
}

#ifdef USE_MPI
static void exchange_mpi(Parcel *p, Watch *w) {
    MPI_Request *request = (MPI_Request *)xmalloc(2 * (size_t)comm.ranks * sizeof *request);
    for (int r = 0; r < comm.ranks; r++) {
        request[2 * r] = request[2 * r + 1] = MPI_REQUEST_NULL;
        if (p[r].in_bytes) MPI(MPI_Irecv(p[r].in, (int)p[r].in_bytes, MPI_BYTE, r, 0, MPI_COMM_WORLD, &request[2 * r]));
        if (p[r].out_bytes) MPI(MPI_Isend(p[r].out, (int)p[r].out_bytes, MPI_BYTE, r, 0, MPI_COMM_WORLD, &request[2 * r + 1]));
    }
    for (int64_t tries = 0;; tries++) {
        int left = 0, done = 1;
        for (int i = 0; i < 2 * comm.ranks; i++) {
            if (request[i] == MPI_REQUEST_NULL) continue;
            MPI(MPI_Test(&request[i], &done, MPI_STATUS_IGNORE));
            left += !done;
        }
        if (!left) break;
        if (tries < 1000) {
            sched_yield();
            continue;
        }
        usleep(50);
        comm_listen(w);
    }
    free(request);
}
#endif

// parcels[r] is what this rank and rank r give each other; every rank calls it. The parcels are used up. An MPI message has at most
// INT_MAX bytes: who has more, cuts.
static void comm_exchange(Parcel *parcels) {
    Watch w = watch_new();
    memset(&parcels[comm.rank], 0, sizeof parcels[0]);
#ifdef USE_MPI
    if (comm.mpi) exchange_mpi(parcels, &w);
    else
#endif
    exchange_sockets(parcels, &w);
    free(w.heard);
}

static Parcel *parcels_new(void) { return (Parcel *)xcalloc((size_t)comm.ranks, sizeof(Parcel)); }

// all (ranks,bytes): what each rank has as `mine`.
void comm_gather(void *all, const void *mine, int64_t bytes) {
    memcpy((char *)all + comm.rank * bytes, mine, (size_t)bytes);
    if (comm.ranks == 1) return;
    Parcel *p = parcels_new();
    for (int r = 0; r < comm.ranks; r++) {
        const Parcel parcel = {(const char *)mine, (char *)all + r * bytes, bytes, bytes};
        p[r] = parcel;
    }
    comm_exchange(p);
    free(p);
}

// What rank 0 has.
void comm_broadcast(void *x, int64_t bytes) {
    if (comm.ranks == 1) return;
    Parcel *p = parcels_new();
    if (comm.rank == 0) for (int r = 1; r < comm.ranks; r++) p[r].out = (const char *)x, p[r].out_bytes = bytes;
    else p[0].in = (char *)x, p[0].in_bytes = bytes;
    comm_exchange(p);
    free(p);
}

// x (n): the sums over the ranks, the same bits on each.
void comm_sum(double *x, int64_t n) {
    if (comm.ranks == 1) return;
    double *all = (double *)xmalloc((size_t)(comm.ranks * min64(n, COMM_CHUNK)) * sizeof(double));
    for (int64_t i = 0; i < n; i += COMM_CHUNK) {
        const int64_t m = min64(n - i, COMM_CHUNK);
        comm_gather(all, x + i, m * (int64_t)sizeof(double));
        for (int64_t j = 0; j < m; j++) {
            x[i + j] = all[j];
            for (int r = 1; r < comm.ranks; r++) x[i + j] += all[r * m + j];
        }
    }
    free(all);
}

// The least x of all ranks.
int64_t comm_min(int64_t x) {
    int64_t *all = (int64_t *)xmalloc((size_t)comm.ranks * sizeof(int64_t));
    comm_gather(all, &x, sizeof x);
    for (int r = 0; r < comm.ranks; r++) x = min64(x, all[r]);
    free(all);
    return x;
}

// Which of the numbers [begin,end) are rank's: from, to. All ranks but the last have equally many, and start at whole 64s.
void comm_share(int64_t begin, int64_t end, int rank, int ranks, int64_t *from, int64_t *to) {
    const int64_t each = (end - begin) / ranks / 64 * 64;
    *from = begin + rank * each;
    *to = rank == ranks - 1 ? end : *from + each;
}

// The shares of [begin,end) a chunk at a time: that of rank r which starts `at` behind the share's beginning.
static int64_t comm_chunk(int64_t begin, int64_t end, int rank, int64_t at, int64_t *from) {
    int64_t to;
    comm_share(begin, end, rank, comm.ranks, from, &to);
    *from += at;
    return max64(0, min64(to - *from, COMM_CHUNK));
}

// Sums over the ranks, of this rank's share of x[begin..end); what the other shares then hold means nothing.
void comm_reduce_scatter(real *x, int64_t begin, int64_t end) {
    if (comm.ranks == 1) return;
    int64_t from, last_from, last_to, n;
    real *inbox = (real *)xmalloc((size_t)comm.ranks * COMM_CHUNK * sizeof(real));
    Parcel *p = parcels_new();
    comm_share(begin, end, comm.ranks - 1, comm.ranks, &last_from, &last_to);      // the longest
    for (int64_t at = 0; at < last_to - last_from; at += COMM_CHUNK) {
        for (int r = 0; r < comm.ranks; r++) {
            n = comm_chunk(begin, end, r, at, &from);
            const Parcel parcel = {(const char *)(x + from), (char *)(inbox + (int64_t)r * COMM_CHUNK), n * (int64_t)sizeof(real), 0};
            p[r] = parcel;
        }
        n = comm_chunk(begin, end, comm.rank, at, &from);
        for (int r = 0; r < comm.ranks; r++) p[r].in_bytes = n * (int64_t)sizeof(real);
        comm_exchange(p);
        memcpy(inbox + (int64_t)comm.rank * COMM_CHUNK, x + from, (size_t)n * sizeof(real));
        #pragma omp parallel for
        for (int64_t j = 0; j < n; j++) {
            real sum = inbox[j];
            for (int r = 1; r < comm.ranks; r++) sum += inbox[(int64_t)r * COMM_CHUNK + j];
            x[from + j] = sum;
        }
    }
    free(p);
    free(inbox);
}

// Every rank gets every share of x[begin..end) from the rank whose it is.
void comm_all_gather(real *x, int64_t begin, int64_t end) {
    if (comm.ranks == 1) return;
    int64_t from, last_from, last_to;
    Parcel *p = parcels_new();
    comm_share(begin, end, comm.ranks - 1, comm.ranks, &last_from, &last_to);
    for (int64_t at = 0; at < last_to - last_from; at += COMM_CHUNK) {
        const int64_t mine = comm_chunk(begin, end, comm.rank, at, &from);
        const char *out = (const char *)(x + from);
        for (int r = 0; r < comm.ranks; r++) {
            const int64_t n = comm_chunk(begin, end, r, at, &from);
            const Parcel parcel = {out, (char *)(x + from), mine * (int64_t)sizeof(real), n * (int64_t)sizeof(real)};
            p[r] = parcel;
        }
        comm_exchange(p);
    }
    free(p);
}

// A text that `parts` ranks share is cut into pieces of equal length, two for each. Part p has pieces p and 2·parts - 1 - p: the queries of the one
// see few keys, those of the other many, so that all parts have as much to attend to. The rows of a part are (own,B,length).
typedef struct Pieces { int parts, own, all; int64_t length, text; } Pieces;       // pieces of a part, of a text; tokens of a piece, of a text

// T: tokens of the text that each part has.
static inline Pieces pieces_of(int parts, int64_t T) {
    const int own = parts > 1 ? 2 : 1;
    const Pieces p = {parts, own, parts * own, T / own, T * parts};
    return p;
}
DEVICE static inline int piece_number(const Pieces *p, int part, int i) { return i ? p->all - 1 - part : part; }
static inline int own_part(const Pieces *p) { return comm.rank % p->parts; }
static inline int own_piece(const Pieces *p, int i) { return piece_number(p, own_part(p), i); }
static inline int64_t piece_start(const Pieces *p, int i) { return own_piece(p, i) * p->length; }      // position of the first token of this rank's i-th
// Where row x of a part is among those of the B texts (B,text). The rows of a micro-batch are as many as an int has numbers.
DEVICE static inline int64_t row_of_texts(const Pieces *p, int part, int64_t x, int64_t B) {
    const uint32_t length = (uint32_t)p->length, texts = (uint32_t)B, run = (uint32_t)x / length;       // run: which (piece, sequence)
    return run % texts * p->text + piece_number(p, part, (int)(run / texts)) * p->length + (uint32_t)x % length;
}

// Among the ranks that share B texts, of whose pieces `in` and `out` (B,all) have `bytes` each. Every rank gets the others' pieces of `out`,
// at their places in `in`. Or with `sums` what the others have at the places of its own: rank r's comes to the places of r's pieces.
void comm_exchange_pieces(char *in, const char *out, const Pieces *pieces, int64_t B, int64_t bytes, int sums) {
    const int me = own_part(pieces);
    const int64_t most = 8 * COMM_CHUNK;
    Parcel *p = parcels_new();
    for (int64_t b = 0; b < B; b++)
        for (int i = 0; i < pieces->own; i++)
            for (int64_t at = 0; at < bytes; at += most) {
                const int64_t n = min64(most, bytes - at), mine = (b * pieces->all + piece_number(pieces, me, i)) * bytes + at;
                memset(p, 0, (size_t)comm.ranks * sizeof *p);
                for (int part = 0; part < pieces->parts; part++) {
                    const int64_t theirs = (b * pieces->all + piece_number(pieces, part, i)) * bytes + at;
                    const Parcel parcel = {out + (sums ? theirs : mine), in + theirs, n, n};
                    if (part != me) p[comm.rank - me + part] = parcel;
                }
                comm_exchange(p);
            }
    free(p);
}

// x (n): the sums over the ranks that share texts.
void comm_sum_parts(int64_t *x, int64_t n) {
    const Pieces one = {comm.parts, 1, comm.parts, 0, 0};
    const int64_t bytes = n * (int64_t)sizeof(int64_t);
    int64_t *all = (int64_t *)xmalloc((size_t)(comm.parts * bytes));
    memcpy(all + own_part(&one) * n, x, (size_t)bytes);
    comm_exchange_pieces((char *)all, (const char *)all, &one, 1, bytes, 0);
    memset(x, 0, (size_t)bytes);
    for (int64_t i = 0; i < comm.parts * n; i++) x[i % n] += all[i];
    free(all);
}

// What a rank tells the others when they meet.
typedef struct Verdict { int32_t busy, code; char line[ERR_LEN]; } Verdict;

// A phase in which a rank may fail, or be busy for long, while the others wait for it. It ends with comm_agree.
void comm_begin(void) {
    comm.together = comm.ranks > 1;
    comm.last_tick = now_seconds();
}

// In such a phase, now and then: still at work.
void comm_tick(void) {
    if (!comm.together || now_seconds() - comm.last_tick < fmin(comm.timeout / 4, 5)) return;
    Verdict mine, *all = (Verdict *)xmalloc((size_t)comm.ranks * sizeof(Verdict));
    memset(&mine, 0, sizeof mine);
    mine.busy = 1;
    comm_gather(all, &mine, sizeof mine);
    free(all);
    comm.last_tick = now_seconds();
}

// Ends the phase: 0 where no rank failed, else on every rank the code of the lowest one that did, whose message becomes err.
int comm_agree(int code, char *err) {
    if (comm.ranks == 1) return code;
    Verdict mine, *all = (Verdict *)xmalloc((size_t)comm.ranks * sizeof(Verdict));
    int busy, first = -1, alike = 1;
    memset(&mine, 0, sizeof mine);
    mine.code = code;
    if (code) snprintf(mine.line, sizeof mine.line, "%s", err);
    do {
        comm_gather(all, &mine, sizeof mine);
        busy = 0;
        for (int r = 0; r < comm.ranks; r++) busy |= all[r].busy;
    } while (busy);
    comm.together = 0;
    for (int r = comm.ranks - 1; r >= 0; r--) if (all[r].code) first = r;
    if (first < 0) code = 0;
    else {
        code = all[first].code;
        for (int r = 0; r < comm.ranks; r++) alike &= all[r].code == code && !strcmp(all[r].line, all[first].line);
        if (alike) fail(err, "%s", all[first].line);
        else fail(err, "rank %d: %s", first, all[first].line);
    }
    free(all);
    return code;
}

// Ends the run for a reason that every rank has: one says it.
void die_together(int code, const char *fmt, ...) {
    char line[4 * ERR_LEN];
    va_list ap;
    va_start(ap, fmt);
    one_line(line, sizeof line, fmt, ap);
    va_end(ap);
    fflush(stdout);
    if (comm.rank == 0) fprintf(stderr, "%s: %s\n", program_name, line);
    exit(code);     // by comm_close, where the ranks meet once more
}

// comm_agree, where a failure of any is the end of all.
void comm_meet(void) {
    char err[ERR_LEN];
    const int code = comm_agree(0, err);
    if (code) die_together(code, "%s", err);
}

// A name for each of the things that all ranks must have alike, and a hash of it.
void comm_compare(const char *const *names, const uint64_t *hashes, int n, const char *fix) {
    uint64_t *all = (uint64_t *)xmalloc((size_t)(comm.ranks * n) * sizeof(uint64_t));
    comm_gather(all, hashes, n * (int64_t)sizeof(uint64_t));
    for (int i = 0; i < n; i++)
        for (int r = 1; r < comm.ranks; r++)
            if (all[r * n + i] != all[i]) die_together(2, "rank %d differs from rank 0 in %s: %s", r, names[i], fix);
    free(all);
}

// ----------------------------------------------------------------------------
// How ranks find each other

// The variables in which launchers say who is which. `mpi`: an MPI of this program meets the launcher's.
static const struct { const char *rank, *ranks; int mpi; } launchers[] = {
    {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", 1}, {"PMI_RANK", "PMI_SIZE", 1}, {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS", 1},
    {"SLURM_PROCID", "SLURM_NTASKS", 0}, {"RANK", "WORLD_SIZE", 0},
};
enum { LAUNCHERS = sizeof launchers / sizeof launchers[0], SLURM_ALLOCATION = 3 };     // a batch script has the latter's, alone as it is

static int env_count(const char *name, int least) {
    const char *s = getenv(name);
    char *end;
    const long x = s ? strtol(s, &end, 10) : -1;
    return s && end != s && !*end && x >= least && x <= 1 << 16 ? (int)x : -1;
}

// The launcher whose variables are set, or -1.
static int find_launcher(int with_init) {
    for (int i = 0; i < LAUNCHERS; i++) {
        comm.rank = env_count(launchers[i].rank, 0);
        comm.ranks = env_count(launchers[i].ranks, 1);
        if (comm.rank >= 0 && comm.rank < comm.ranks && (with_init || i != SLURM_ALLOCATION)) return i;
    }
    comm.rank = 0;
    comm.ranks = 1;
    return -1;
}

// Before ranks can talk they all fail alike, and the first one says why.
__attribute__((noreturn, format(printf, 2, 3)))
static void die_apart(int code, const char *fmt, ...) {
    va_list ap;
    fflush(stdout);
    if (comm.rank > 0) sleep(1);
    else {
        char line[4 * ERR_LEN];
        va_start(ap, fmt);
        one_line(line, sizeof line, fmt, ap);
        va_end(ap);
        fprintf(stderr, "%s: %s\n", program_name, line);
    }
    exit(code);
}

#define MESH_MAGIC UINT64_C(0x6e73612e63303031)
enum { MESH_NAME = 1024 };      // of the text "HOST HOST ... PORT" that says where a rank listens

typedef struct Greeting { uint64_t magic, secret; int32_t from, to; } Greeting;

static int listen_on(const char *port, int *chosen) {
    struct addrinfo hints, *list = NULL;
    struct sockaddr_storage name;
    socklen_t len = sizeof name;
    char text[16];
    int fd = -1, yes = 1;
    memset(&hints, 0, sizeof hints);
    hints.ai_family = AF_INET;
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = AI_PASSIVE;
    if (getaddrinfo(NULL, port, &hints, &list) == 0 && (fd = socket(list->ai_family, SOCK_STREAM, 0)) >= 0 &&
        (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes) < 0 || bind(fd, list->ai_addr, list->ai_addrlen) < 0 || listen(fd, comm.ranks + 16) < 0 ||
         getsockname(fd, (struct sockaddr *)&name, &len) < 0 || getnameinfo((struct sockaddr *)&name, len, NULL, 0, text, sizeof text, NI_NUMERICSERV) != 0))
        close(fd), fd = -1;
    if (fd < 0) die(1, "--init: cannot listen on port %s: %s", port, strerror(errno));
    freeaddrinfo(list);
    *chosen = atoi(text);
    return fd;
}

// Where this machine can be reached, itself last: "10.0.0.5 127.0.0.1 PORT".
static void own_name(char name[MESH_NAME], int port) {
    struct ifaddrs *list = NULL;
    char host[64];
    int n = 0;
    if (getifaddrs(&list) < 0) die(1, "--init: cannot list the network's interfaces: %s", strerror(errno));
    for (int loopback = 0; loopback < 2; loopback++)
        for (const struct ifaddrs *a = list; a; a = a->ifa_next)
            if (a->ifa_addr && a->ifa_addr->sa_family == AF_INET && (a->ifa_flags & IFF_UP) && !(a->ifa_flags & IFF_LOOPBACK) == !loopback &&
                getnameinfo(a->ifa_addr, sizeof(struct sockaddr_in), host, sizeof host, NULL, 0, NI_NUMERICHOST) == 0 && n + 80 < MESH_NAME)
                n += snprintf(name + n, sizeof host, "%s ", host);
    snprintf(name + n, (size_t)(MESH_NAME - n), "%d", port);
    freeifaddrs(list);
}

// All bytes of a small message, within the seconds; 0, or -1.
static int socket_move(int fd, void *data, size_t n, int out, double seconds) {
    const double end = now_seconds() + seconds;
    for (size_t done = 0; done < n;) {
        struct pollfd p = {fd, (short)(out ? POLLOUT : POLLIN), 0};
        if (now_seconds() > end) return -1;
        if (poll(&p, 1, 100) <= 0) continue;
        const ssize_t moved = out ? send(fd, (char *)data + done, n - done, MSG_NOSIGNAL | MSG_DONTWAIT) : recv(fd, (char *)data + done, n - done, MSG_DONTWAIT);
        if (moved > 0) done += (size_t)moved;
        else if (moved == 0 || (errno != EAGAIN && errno != EINTR)) return -1;
    }
    return 0;
}

// One try at one address: the rank `to` is there and answers, or -1.
static int call_address(const struct addrinfo *a, int to, uint64_t *secret) {
    const int fd = socket(a->ai_family, SOCK_STREAM | SOCK_NONBLOCK, 0);
    Greeting hello = {MESH_MAGIC, *secret, comm.rank, to}, answer;
    if (fd < 0) return -1;
    struct pollfd p = {fd, POLLOUT, 0};
    int status = connect(fd, a->ai_addr, a->ai_addrlen) == 0 || errno == EINPROGRESS ? 0 : -1, error = 0;
    socklen_t len = sizeof error;
    if (status == 0) status = poll(&p, 1, 3000) == 1 && getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &len) == 0 && !error ? 0 : -1;
    if (status == 0) status = socket_move(fd, &hello, sizeof hello, 1, 3);
    if (status == 0) status = socket_move(fd, &answer, sizeof answer, 0, 30);
    if (status == 0 && answer.magic == MESH_MAGIC && answer.from == to && answer.to == comm.rank) return *secret = answer.secret, fd;
    close(fd);
    return -1;
}

// Connects to the rank `to`, which listens at one of the hosts of "HOST HOST ... PORT"; -1 where none answers.
static int call_rank(const char *name, int to, uint64_t *secret) {
    char *hosts = xstrdup(name), *port = strrchr(hosts, ' '), *rest = hosts;
    int fd = -1;
    if (!port) return free(hosts), -1;
    *port++ = 0;
    for (char *host; fd < 0 && (host = strsep(&rest, " "));) {
        struct addrinfo hints, *list = NULL;
        memset(&hints, 0, sizeof hints);
        hints.ai_family = AF_INET;
        hints.ai_socktype = SOCK_STREAM;
        if (!*host || getaddrinfo(host, port, &hints, &list) != 0) continue;
        for (const struct addrinfo *a = list; a && fd < 0; a = a->ai_next) fd = call_address(a, to, secret);
        freeaddrinfo(list);
    }
    free(hosts);
    return fd;
}

// Takes in `count` ranks that call here. Whoever does not know the secret is none of ours.
static void answer_calls(int listener, int count, uint64_t expected, uint64_t secret, const char *init) {
    const double end = now_seconds() + comm_patience();
    while (count > 0) {
        struct pollfd p = {listener, POLLIN, 0};
        if (now_seconds() > end) die(1, "--init %s: %d of %d ranks did not come within %g s", init, count, comm.ranks, comm_patience());
        if (poll(&p, 1, 100) <= 0) continue;
        const int fd = accept(listener, NULL, NULL);
        Greeting hello;
        if (fd < 0) continue;
        int good = socket_move(fd, &hello, sizeof hello, 0, 3) == 0 && hello.magic == MESH_MAGIC && hello.secret == expected && hello.to == comm.rank &&
                   hello.from > comm.rank && hello.from < comm.ranks && comm.sockets[hello.from] < 0;
        Greeting answer = {MESH_MAGIC, secret, comm.rank, hello.from};
        if (good && socket_move(fd, &answer, sizeof answer, 1, 3) == 0) comm.sockets[hello.from] = fd, count--;
        else close(fd);
    }
}

// --init tcp:HOST:PORT or file:PATH. All find rank 0, there or by the address that it leaves in the file; it tells them where the
// others are, and each connects to all before it.
static void open_sockets(const char *init) {
    char mine[MESH_NAME], *names = (char *)xcalloc((size_t)comm.ranks, MESH_NAME), err[ERR_LEN], *line = NULL;
    const char *path = !strncmp(init, "file:", 5) ? init + 5 : NULL, *host = path ? NULL : init + 4, *port = host ? strrchr(host, ':') : "0";
    uint64_t key = 0, secret = 0;       // key: what one must know to call rank 0; secret: to call anybody
    int chosen, yes = 1;
    int64_t len;
    const double end = now_seconds() + comm_patience();
    if (path ? !*path : !port || port == host || atoi(port + 1) < 1 || atoi(port + 1) > 65535)
        die_apart(2, "--init %s: use mpi, file:PATH (a path that every rank sees) or tcp:HOST:PORT (of rank 0)", init);
    if (comm.rank == 0) {
        FILE *random = fopen("/dev/urandom", "rb");
        if (!random || fread(&secret, sizeof secret, 1, random) != 1) die(1, "/dev/urandom: cannot read: %s", strerror(errno));
        fclose(random);
        if (path) key = secret;
    }
    comm.sockets = (int *)xmalloc((size_t)comm.ranks * sizeof(int));
    for (int r = 0; r < comm.ranks; r++) comm.sockets[r] = -1;
    const int listener = listen_on(comm.rank == 0 && host ? port + 1 : "0", &chosen);
    own_name(mine, chosen);
    if (comm.rank == 0) {
        if (path) {     // appears whole, under its name
            char *part = format("%s.part", path), *text = format("%016" PRIx64 " %s", secret, mine);
            if (write_file(part, text, (int64_t)strlen(text), err) < 0) die(1, "--init: %s", err);
            if (rename(part, path) != 0) die(1, "--init: %s: cannot create: %s", path, strerror(errno));
            free(part);
            free(text);
        }
        answer_calls(listener, comm.ranks - 1, key, secret, init);
        if (path) unlink(path);
    } else {
        char *where = path ? NULL : format("%.*s %s", (int)(port - host), host, port + 1);
        while (comm.sockets[0] < 0) {       // a file of an earlier run names a port where nobody knows its secret
            int have = !path;
            if (path && read_file(path, &line, &len, err) == 0) have = len > 17 && sscanf(line, "%16" SCNx64, &secret) == 1;
            if (have) comm.sockets[0] = call_rank(path ? line + 17 : where, 0, &secret);
            free(line);
            line = NULL;
            if (comm.sockets[0] >= 0) break;
            if (now_seconds() > end) die(1, "--init %s: rank %d did not find rank 0 within %g s", init, comm.rank, comm_patience());
            usleep(50000);
        }
        free(where);
    }
    // Where everybody listens, by way of rank 0.
    memcpy(names + (int64_t)comm.rank * MESH_NAME, mine, MESH_NAME);
    int bad = 0;
    if (comm.rank == 0) {
        for (int r = 1; r < comm.ranks; r++) bad |= socket_move(comm.sockets[r], names + (int64_t)r * MESH_NAME, MESH_NAME, 0, comm_patience());
        for (int r = 1; r < comm.ranks; r++) bad |= socket_move(comm.sockets[r], names, (size_t)comm.ranks * MESH_NAME, 1, comm_patience());
    } else {
        bad |= socket_move(comm.sockets[0], mine, MESH_NAME, 1, comm_patience());
        bad |= socket_move(comm.sockets[0], names, (size_t)comm.ranks * MESH_NAME, 0, comm_patience());
    }
    if (bad) die(1, "--init %s: the connection to %s broke", init, comm.rank ? "rank 0" : "a rank");
    for (int r = 1; r < comm.rank; r++) {
        uint64_t known = secret;
        if ((comm.sockets[r] = call_rank(names + (int64_t)r * MESH_NAME, r, &known)) < 0)
            die(1, "--init %s: rank %d cannot reach rank %d at %s", init, comm.rank, r, names + (int64_t)r * MESH_NAME);
    }
    if (comm.rank) answer_calls(listener, comm.ranks - 1 - comm.rank, secret, secret, init);
    close(listener);
    for (int r = 0; r < comm.ranks; r++)
        if (r != comm.rank && setsockopt(comm.sockets[r], IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes) < 0) die(1, "--init %s: %s", init, strerror(errno));
    free(names);
}

#ifdef USE_MPI
static void open_mpi(void) {
    int level, rank, ranks;
    if (MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &level) != MPI_SUCCESS) die_apart(1, "MPI does not start");
    comm.mpi = 1;
    MPI(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN));
    MPI(MPI_Comm_rank(MPI_COMM_WORLD, &rank));
    MPI(MPI_Comm_size(MPI_COMM_WORLD, &ranks));
    if (ranks != comm.ranks) {
        comm.mpi = 0;
        die_apart(2, "%d processes were started, but MPI sees %d: start them with this MPI's mpirun, srun --mpi=pmix, or --init file:PATH", comm.ranks, ranks);
    }
    comm.rank = rank;
}
#endif

// Where the run ends well, all ranks end together. Where it does not, nobody waits.
static void comm_close(void) {
    if (comm.failed || comm.ranks == 1) return;
    char last = 0, *all = (char *)xmalloc((size_t)comm.ranks);
    comm_gather(all, &last, 1);
    free(all);
#ifdef USE_MPI
    if (comm.mpi) MPI_Finalize();
#endif
}

// The first thing of a program that may be a rank of several. From here on rank 0 alone writes to the terminal.
void comm_open(int argc, char **argv) {
    const char *init = NULL;
    for (int i = 1; i < argc; i++) {        // before the options are parsed, so that the ranks can agree on what is wrong with them
        if (!strcmp(argv[i], "--init") && i + 1 < argc) init = argv[i + 1];
        else if (!strncmp(argv[i], "--init=", 7)) init = argv[i] + 7;
    }
    const int launcher = find_launcher(init != NULL), sockets = init && (!strncmp(init, "tcp:", 4) || !strncmp(init, "file:", 5));
    if (init && !sockets && strcmp(init, "mpi") != 0) die_apart(2, "--init must be mpi, file:PATH or tcp:HOST:PORT, not \"%s\"", init);
    if (init && launcher < 0)
        die_apart(2, "--init %s: which rank is this, of how many? mpirun and srun say so, or set RANK and WORLD_SIZE", init);
    if (comm.ranks == 1) return;
    if (!sockets && !launchers[launcher].mpi && !init)
        die_apart(2, "%s says that there are %d ranks: how do they find each other? --init mpi, file:PATH or tcp:HOST:PORT", launchers[launcher].ranks, comm.ranks);
    if (sockets) open_sockets(init);
    else {
#ifdef USE_MPI
        open_mpi();
#else
        die_apart(2, "%d ranks were started, but this program was built without MPI: install it (Debian: apt install libopenmpi-dev) and make again, "
                  "or use --init tcp:HOST:PORT or file:PATH", comm.ranks);
#endif
    }
    if (atexit(comm_close) != 0) die(1, "no memory for the end of the program");
    if (comm.rank && !freopen("/dev/null", "w", stdout)) die(1, "/dev/null: cannot open: %s", strerror(errno));
    enum { HOST = 256 };
    char host[HOST] = "", *hosts = (char *)xmalloc((size_t)comm.ranks * HOST);
    if (gethostname(host, HOST - 1) != 0) die(1, "this machine has no name: %s", strerror(errno));
    comm_gather(hosts, host, HOST);
    for (int r = 0; r < comm.rank; r++) comm.local_rank += !strcmp(hosts + (int64_t)r * HOST, host);
    free(hosts);
    comm_begin();
}

// ----------------------------------------------------------------------------
// Random numbers. Philox4x32-10 (Salmon et al. 2011) scrambles a 128-bit counter under a 64-bit key.
// No state: random number i is a function of (seed, stream, i), the same for any thread, rank or order.

DEVICE static inline void philox4x32(uint32_t out[4], const uint32_t counter[4], const uint32_t key[2]) {
    uint32_t a = counter[0], b = counter[1], c = counter[2], d = counter[3], k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t p = (uint64_t)0xD2511F53u * a, q = (uint64_t)0xCD9E8D57u * c;
        a = (uint32_t)(q >> 32) ^ b ^ k0;
        b = (uint32_t)q;
        c = (uint32_t)(p >> 32) ^ d ^ k1;
        d = (uint32_t)p;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = a; out[1] = b; out[2] = c; out[3] = d;
}

// Block `index` of a stream: four random words.
static inline void philox_block(uint32_t out[4], uint64_t seed, uint64_t stream, uint64_t index) {
    uint32_t counter[4] = {(uint32_t)index, (uint32_t)(index >> 32), (uint32_t)stream, (uint32_t)(stream >> 32)};
    uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    philox4x32(out, counter, key);
}

// Two words as a number in [0, 1) with all 53 bits of a double.
static inline double uniform_of(uint32_t hi, uint32_t lo) {
    return (double)((((uint64_t)hi << 32) | lo) >> 11) * 0x1p-53;
}

// A sequence of numbers; `counter` counts the words drawn, so that saving it saves the place.
typedef struct { uint64_t seed, stream, counter; } Rng;

uint32_t rng_u32(Rng *r) {
    uint32_t words[4];
    philox_block(words, r->seed, r->stream, r->counter >> 2);
    return words[r->counter++ & 3];
}

double rng_uniform(Rng *r) {
    uint32_t hi = rng_u32(r), lo = rng_u32(r);
    return uniform_of(hi, lo);
}

// A number in [0, n), n >= 1. The first 2^64 mod n values are drawn again, else small results
// would come up too often.
uint64_t rng_below(Rng *r, uint64_t n) {
    uint64_t surplus = (0 - n) % n, x;
    do {
        x = (uint64_t)rng_u32(r) << 32;
        x |= rng_u32(r);
    } while (x < surplus);
    return x % n;
}

// Standard normal number `index` of a stream (Box-Muller: two uniforms make two normals).
real normal_at(uint64_t seed, uint64_t stream, uint64_t index) {
    uint32_t w[4];
    philox_block(w, seed, stream, index >> 1);
    double radius = sqrt(-2.0 * log(1.0 - uniform_of(w[0], w[1]))), angle = 2.0 * M_PI * uniform_of(w[2], w[3]);
    return (real)(radius * (index & 1 ? sin(angle) : cos(angle)));
}

// ----------------------------------------------------------------------------
// bfloat16 is the upper half of a float

static inline float bf16_to_float(uint16_t b) {
    uint32_t bits = (uint32_t)b << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

// Rounds to nearest, ties to even. A NaN stays one (rounding could carry it into infinity).
static inline uint16_t float_to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// ----------------------------------------------------------------------------
// 2. JSON and safetensors
// UTF-8, the encoding of both

// The character at s, which has n >= 1 bytes left: its length, or 0 where the bytes are not UTF-8
// (cut off, longer than needed, a surrogate, beyond U+10FFFF).
int utf8_decode(const char *s, int64_t n, uint32_t *cp) {
    const unsigned char *u = (const unsigned char *)s;
    if (u[0] < 0x80) {
        *cp = u[0];
        return 1;
    }
    int len = u[0] >= 0xc2 && u[0] < 0xe0 ? 2 : u[0] >= 0xe0 && u[0] < 0xf0 ? 3 : u[0] >= 0xf0 && u[0] < 0xf5 ? 4 : 0;
    if (!len || n < len) return 0;
    uint32_t c = u[0] & (0x7fu >> len);
    for (int i = 1; i < len; i++) {
        if ((u[i] & 0xc0) != 0x80) return 0;
        c = (c << 6) | (u[i] & 0x3f);
    }
    if ((len == 3 && c < 0x800) || (len == 4 && c < 0x10000) || c > 0x10ffff || (c >= 0xd800 && c < 0xe000)) return 0;
    *cp = c;
    return len;
}

int utf8_encode(char *s, uint32_t c) {
    if (c < 0x80) {
        s[0] = (char)c;
        return 1;
    }
    int len = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (int i = len - 1; i > 0; i--, c >>= 6) s[i] = (char)(0x80 | (c & 0x3f));
    s[0] = (char)((0xf00 >> len) | c);
    return len;
}

// ----------------------------------------------------------------------------
// JSON: a strict parser into a tree. Nodes and strings live in a few large chunks, because a
// tokenizer.json has half a million of them, and all die together.

enum { JSON_NULL, JSON_BOOL, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT, JSON_MAX_DEPTH = 64 };

typedef struct Json Json;
struct Json {
    int type, is_integer;   // is_integer: written without fraction and exponent, and it fits int64_t
    double number;          // numbers; booleans are 0 or 1
    int64_t integer;
    const char *key, *str;  // NUL-terminated UTF-8; key only inside an object
    int64_t key_len, len;   // len: bytes of a string, members of an array or object
    Json *child, *next;     // first member; next member of the same parent
};

typedef struct JsonChunk { struct JsonChunk *next; size_t used, size; } JsonChunk;  // its bytes follow

typedef struct {
    Json root;  // first, so that a pointer to the root is a pointer to the whole
    JsonChunk *chunks;
    const char *text;
    int64_t pos, len;
    char *err;
} JsonDoc;

const char *json_type_name(int type) {
    const char *const names[] = {"null", "a boolean", "a number", "a string", "a list", "an object"};
    return names[type];
}

void *json_alloc(JsonDoc *d, size_t bytes) {
    bytes = (bytes + 7) & ~(size_t)7;
    if (!d->chunks || d->chunks->size - d->chunks->used < bytes) {
        size_t size = d->chunks ? 2 * d->chunks->size : 4096;
        size = size > 1 << 20 ? 1 << 20 : size;
        size = size < bytes ? bytes : size;
        JsonChunk *c = (JsonChunk *)xmalloc(sizeof(JsonChunk) + size);
        c->next = d->chunks;
        c->used = 0;
        c->size = size;
        d->chunks = c;
    }
    void *p = (char *)(d->chunks + 1) + d->chunks->used;
    d->chunks->used += bytes;
    return p;
}

void json_free(Json *root) {
    if (!root) return;
    JsonDoc *d = (JsonDoc *)root;
    for (JsonChunk *c = d->chunks, *next; c; c = next) {
        next = c->next;
        free(c);
    }
    free(d);
}

int json_fail(JsonDoc *d, int64_t at, const char *what) {
    return fail(d->err, "broken JSON at byte %" PRId64 ": %s", at, what);
}

int json_peek(const JsonDoc *d) { return d->pos < d->len ? (unsigned char)d->text[d->pos] : -1; }

void json_skip_space(JsonDoc *d) {
    while (d->pos < d->len && strchr(" \t\n\r", d->text[d->pos]) && d->text[d->pos]) d->pos++;
}

// Four hex digits, or -1.
int json_hex4(const JsonDoc *d, int64_t at) {
    int value = 0;
    for (int i = 0; i < 4; i++) {
        int c = at + i < d->len ? (unsigned char)d->text[at + i] : 0;
        if (!isxdigit(c)) return -1;
        value = value * 16 + (c <= '9' ? c - '0' : (c | 32) - 'a' + 10);
    }
    return value;
}

int json_string(JsonDoc *d, const char **str, int64_t *len) {
    int64_t start = d->pos + 1, end = start;
    while (end < d->len && d->text[end] != '"') end += d->text[end] == '\\' ? 2 : 1;
    if (end >= d->len) return json_fail(d, d->pos, "a string without its closing quote");
    char *out = (char *)json_alloc(d, (size_t)(end - start) + 1), *o = out;  // decoding never makes it longer
    for (int64_t i = start; i < end;) {
        uint32_t c;
        if (d->text[i] != '\\') {
            int n = utf8_decode(d->text + i, end - i, &c);
            if (!n) return json_fail(d, i, "not UTF-8");
            if (c < 32) return json_fail(d, i, "a control character in a string (it must be escaped)");
            memcpy(o, d->text + i, (size_t)n);
            o += n;
            i += n;
            continue;
        }
        const char *plain = "\"\\/bfnrt", *means = "\"\\/\b\f\n\r\t", *which = strchr(plain, d->text[i + 1]);
        if (which && *which) {
            *o++ = means[which - plain];
            i += 2;
            continue;
        }
        int high = d->text[i + 1] == 'u' ? json_hex4(d, i + 2) : -1, low = 0;
        if (high < 0) return json_fail(d, i, "an unknown escape in a string");
        c = (uint32_t)high;
        if (high >= 0xd800 && high < 0xe000) {  // half of a character above U+FFFF: the other half must follow
            if (high < 0xdc00 && i + 7 < end && d->text[i + 6] == '\\' && d->text[i + 7] == 'u') low = json_hex4(d, i + 8);
            if (low < 0xdc00 || low >= 0xe000) return json_fail(d, i, "half of a surrogate pair");
            c = 0x10000 + (((uint32_t)high - 0xd800) << 10) + ((uint32_t)low - 0xdc00);
            i += 6;
        }
        i += 6;
        o += utf8_encode(o, c);
    }
    *o = 0;
    *str = out;
    *len = o - out;
    d->pos = end + 1;
    return 0;
}

int json_number(JsonDoc *d, Json *v) {
    int64_t start = d->pos;
    int digits = 0, whole = 1;
    if (json_peek(d) == '-') d->pos++;
    int leading_zero = json_peek(d) == '0';
    for (; isdigit(json_peek(d)); d->pos++) digits++;
    if (!digits || (leading_zero && digits > 1)) return json_fail(d, start, "not a number as JSON writes them");
    if (json_peek(d) == '.') {
        whole = 0;
        d->pos++;
        if (!isdigit(json_peek(d))) return json_fail(d, start, "a number without digits behind its point");
        while (isdigit(json_peek(d))) d->pos++;
    }
    if (json_peek(d) == 'e' || json_peek(d) == 'E') {
        whole = 0;
        d->pos++;
        if (json_peek(d) == '+' || json_peek(d) == '-') d->pos++;
        if (!isdigit(json_peek(d))) return json_fail(d, start, "a number without digits in its exponent");
        while (isdigit(json_peek(d))) d->pos++;
    }
    char *copy = (char *)json_alloc(d, (size_t)(d->pos - start) + 1);  // the text has no NUL behind it
    memcpy(copy, d->text + start, (size_t)(d->pos - start));
    copy[d->pos - start] = 0;
    v->type = JSON_NUMBER;
    v->number = strtod(copy, NULL);
    if (!isfinite(v->number)) return json_fail(d, start, "a number too large");
    errno = 0;
    v->integer = whole ? strtoll(copy, NULL, 10) : 0;
    v->is_integer = whole && errno == 0;
    return 0;
}

int json_compare_keys(const void *a, const void *b) {
    const Json *x = *(const Json *const *)a, *y = *(const Json *const *)b;
    int order = memcmp(x->key, y->key, (size_t)(x->key_len < y->key_len ? x->key_len : y->key_len));
    return order ? order : (x->key_len > y->key_len) - (x->key_len < y->key_len);
}

// Two members of one name: readers disagree about which one counts, so neither does.
int json_check_duplicates(JsonDoc *d, const Json *object, int64_t at) {
    if (object->len < 2) return 0;
    const Json **keys = (const Json **)xmalloc((size_t)object->len * sizeof(Json *));
    int64_t n = 0;
    int result = 0;
    for (const Json *m = object->child; m; m = m->next) keys[n++] = m;
    qsort(keys, (size_t)n, sizeof(Json *), json_compare_keys);
    for (int64_t i = 1; i < n && !result; i++)
        if (json_compare_keys(&keys[i - 1], &keys[i]) == 0)
            result = fail(d->err, "broken JSON: the object at byte %" PRId64 " has the key \"%.80s\" twice", at, keys[i]->key);
    free(keys);
    return result;
}

int json_value(JsonDoc *d, Json *v, int depth) {
    json_skip_space(d);
    int64_t start = d->pos;
    int c = json_peek(d);
    if (c == '"') {
        v->type = JSON_STRING;
        return json_string(d, &v->str, &v->len);
    }
    if (c == '-' || isdigit(c)) return json_number(d, v);
    if (c == '{' || c == '[') {
        if (depth == JSON_MAX_DEPTH) return json_fail(d, start, "lists and objects nested too deep");
        v->type = c == '{' ? JSON_OBJECT : JSON_ARRAY;
        int close = c == '{' ? '}' : ']';
        Json **link = &v->child;
        d->pos++;
        json_skip_space(d);
        if (json_peek(d) == close) {
            d->pos++;
            return 0;
        }
        for (;;) {
            Json *m = (Json *)json_alloc(d, sizeof(Json));
            memset(m, 0, sizeof *m);
            if (c == '{') {
                json_skip_space(d);
                if (json_peek(d) != '"') return json_fail(d, d->pos, "a key in quotes is missing");
                if (json_string(d, &m->key, &m->key_len) < 0) return -1;
                json_skip_space(d);
                if (json_peek(d) != ':') return json_fail(d, d->pos, "a ':' is missing");
                d->pos++;
            }
            if (json_value(d, m, depth + 1) < 0) return -1;
            *link = m;
            link = &m->next;
            v->len++;
            json_skip_space(d);
            int end = json_peek(d);
            if (end != ',' && end != close)
                return json_fail(d, d->pos, c == '{' ? "a ',' or '}' is missing" : "a ',' or ']' is missing");
            d->pos++;
            if (end == close) return c == '{' ? json_check_duplicates(d, v, start) : 0;
        }
    }
    const char *const words[] = {"null", "false", "true"};
    for (int i = 0; i < 3; i++) {
        int64_t n = (int64_t)strlen(words[i]);
        if (d->len - d->pos < n || memcmp(d->text + d->pos, words[i], (size_t)n) != 0) continue;
        v->type = i ? JSON_BOOL : JSON_NULL;
        v->number = i == 2;
        d->pos += n;
        return 0;
    }
    return json_fail(d, start, c < 0 ? "it ends where a value should stand" : "a value is missing");
}

// Parses len bytes (no NUL needed). json_free(*root) ends the tree; the text may go before it.
int json_parse(Json **root, const char *text, int64_t len, char *err) {
    JsonDoc *d = (JsonDoc *)xcalloc(1, sizeof(JsonDoc));
    *root = NULL;
    d->text = text;
    d->len = len;
    d->err = err;
    int result = json_value(d, &d->root, 0);
    json_skip_space(d);
    if (result == 0 && d->pos < len) result = json_fail(d, d->pos, "more text behind the end");
    d->text = NULL;
    if (result < 0) json_free(&d->root);
    else *root = &d->root;
    return result;
}

// The member `key` of an object; NULL when absent, or when `object` is none.
const Json *json_get(const Json *object, const char *key) {
    if (!object || object->type != JSON_OBJECT) return NULL;
    for (const Json *m = object->child; m; m = m->next)
        if (strcmp(m->key, key) == 0 && m->key_len == (int64_t)strlen(key)) return m;
    return NULL;
}

int json_is_string(const Json *v, const char *s) {
    return v && v->type == JSON_STRING && v->len == (int64_t)strlen(s) && memcmp(v->str, s, (size_t)v->len) == 0;
}

// Quoted and escaped. What is not UTF-8 becomes U+FFFD: every reader must accept our files.
void text_add_json_string(Text *t, const char *s, int64_t len) {
    text_put(t, "\"", 1);
    for (int64_t i = 0; i < len;) {
        uint32_t c = 0;
        int n = utf8_decode(s + i, len - i, &c);
        if (!n) text_put(t, "\\ufffd", 6);
        else if (c == '"' || c == '\\') text_add(t, "\\%c", (int)c);
        else if (c == '\n') text_put(t, "\\n", 2);
        else if (c < 32 || c == 127) text_add(t, "\\u%04x", (unsigned)c);
        else text_put(t, s + i, n);
        i += n ? n : 1;
    }
    text_put(t, "\"", 1);
}

// ----------------------------------------------------------------------------
// safetensors: 8 bytes length of the header; the header, JSON: name -> dtype, shape, place; the data.
// Nothing in a header is believed before it is checked: a tensor that passed lies inside the file.

enum { ST_BOOL, ST_U8, ST_I8, ST_U16, ST_I16, ST_F16, ST_BF16, ST_U32, ST_I32, ST_F32, ST_U64, ST_I64, ST_F64, ST_DTYPES };
const char *const st_dtype_names[ST_DTYPES] = {"BOOL", "U8", "I8", "U16", "I16", "F16", "BF16", "U32", "I32", "F32", "U64", "I64", "F64"};
const int st_dtype_bytes[ST_DTYPES] = {1, 1, 1, 2, 2, 2, 2, 4, 4, 4, 8, 8, 8};

enum { ST_MAX_DIMS = 8, ST_MAX_HEADER = 100000000, ST_SYNC = 256 << 20 };  // ST_MAX_HEADER is also the limit of the Python package

typedef struct {
    const char *name;
    int dtype, ndim;
    int64_t shape[ST_MAX_DIMS];
    int64_t begin, end;  // bytes, counted from SafeTensors.data
} StTensor;

typedef struct {
    StTensor *tensors;  // sorted by name
    int count;
    const unsigned char *data;
    int64_t data_len;
    Json *header;  // owns the names and the metadata
    const char *path;
    FileMap map;
} SafeTensors;

void safetensors_close(SafeTensors *st) {
    free(st->tensors);
    free((void *)st->path);
    json_free(st->header);
    file_unmap(&st->map);
    memset(st, 0, sizeof *st);
}

int st_compare_names(const void *a, const void *b) { return strcmp(((const StTensor *)a)->name, ((const StTensor *)b)->name); }

int st_compare_places(const void *a, const void *b) {
    const StTensor *x = (const StTensor *)a, *y = (const StTensor *)b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return (x->end > y->end) - (x->end < y->end);
}

// a list of n non-negative integers
int st_int_list(const Json *list, int64_t *out, int max) {
    if (!list || list->type != JSON_ARRAY || list->len > max) return -1;
    int n = 0;
    for (const Json *v = list->child; v; v = v->next) {
        if (v->type != JSON_NUMBER || !v->is_integer || v->integer < 0) return -1;
        out[n++] = v->integer;
    }
    return n;
}

int st_parse_tensor(StTensor *t, const Json *m, int64_t data_len, char *err) {
    const Json *dtype = json_get(m, "dtype");
    int64_t place[2];
    t->name = m->key;
    if ((int64_t)strlen(m->key) != m->key_len) return fail(err, "the name of tensor \"%s\" has a NUL in it", m->key);
    if (m->type != JSON_OBJECT) return fail(err, "tensor \"%s\" is %s, not an object", m->key, json_type_name(m->type));
    for (t->dtype = 0; t->dtype < ST_DTYPES && !json_is_string(dtype, st_dtype_names[t->dtype]);) t->dtype++;
    if (t->dtype == ST_DTYPES)
        return fail(err, "tensor \"%s\" has the unknown dtype \"%.40s\"", m->key, dtype && dtype->type == JSON_STRING ? dtype->str : "");
    t->ndim = st_int_list(json_get(m, "shape"), t->shape, ST_MAX_DIMS);
    if (t->ndim < 0) return fail(err, "tensor \"%s\" has a bad shape: up to %d sizes >= 0 are wanted", m->key, ST_MAX_DIMS);
    if (st_int_list(json_get(m, "data_offsets"), place, 2) != 2)
        return fail(err, "tensor \"%s\" has bad data_offsets: two numbers >= 0 are wanted", m->key);
    t->begin = place[0];
    t->end = place[1];
    if (t->begin > t->end || t->end > data_len)
        return fail(err, "tensor \"%s\" lies at bytes %" PRId64 " to %" PRId64 " of %" PRId64 " bytes of data%s", m->key, t->begin, t->end,
                    data_len, t->begin > t->end ? "" : ": the file is cut short, copy it again");
    int64_t bytes = st_dtype_bytes[t->dtype];
    int overflow = 0;
    for (int i = 0; i < t->ndim; i++) overflow |= __builtin_mul_overflow(bytes, t->shape[i], &bytes);
    if (overflow || bytes != t->end - t->begin)
        return fail(err, "tensor \"%s\": its shape does not fit its %" PRId64 " bytes of data", m->key, t->end - t->begin);
    return 0;
}

// Over a file that already lies in memory; st keeps pointing into it.
int safetensors_parse(SafeTensors *st, const unsigned char *file, int64_t len, char *err) {
    memset(st, 0, sizeof *st);
    uint64_t n = 0;
    if (len < 8) return fail(err, "not a safetensors file: only %" PRId64 " bytes", len);
    memcpy(&n, file, 8);
    if (n > ST_MAX_HEADER) return fail(err, "not a safetensors file: a header of %" PRIu64 " bytes (the limit is %d)", n, ST_MAX_HEADER);
    if ((int64_t)n > len - 8) return fail(err, "cut short: a header of %" PRIu64 " bytes, but the file has only %" PRId64 "; copy it again", n, len);
    if (json_parse(&st->header, (const char *)file + 8, (int64_t)n, err) < 0) return fail(err, "bad safetensors header: %s", err);
    const Json *root = st->header;
    int result = root->type == JSON_OBJECT ? 0 : fail(err, "bad safetensors header: it is %s, not an object", json_type_name(root->type));
    st->data = file + 8 + n;
    st->data_len = len - 8 - (int64_t)n;
    st->tensors = (StTensor *)xcalloc((size_t)root->len + 1, sizeof(StTensor));
    for (const Json *m = root->child; m && !result; m = m->next) {
        if (strcmp(m->key, "__metadata__") != 0) {
            result = st_parse_tensor(&st->tensors[st->count++], m, st->data_len, err);
            continue;
        }
        if (m->type != JSON_OBJECT) result = fail(err, "bad safetensors header: __metadata__ is %s, not an object", json_type_name(m->type));
        for (const Json *v = m->child; v && !result; v = v->next)
            if (v->type != JSON_STRING) result = fail(err, "bad safetensors header: metadata \"%s\" is %s, not a string", v->key,
                                                     json_type_name(v->type));
    }
    // Every byte belongs to one tensor: no two overlap, and nothing hides between them.
    qsort(st->tensors, (size_t)st->count, sizeof(StTensor), st_compare_places);
    int64_t at = 0;
    for (int i = 0; i < st->count && !result; i++) {
        const StTensor *t = &st->tensors[i];
        if (t->begin < at) result = fail(err, "tensor \"%s\" overlaps tensor \"%s\"", t->name, st->tensors[i - 1].name);
        else if (t->begin > at) result = fail(err, "%" PRId64 " bytes before tensor \"%s\" belong to no tensor", t->begin - at, t->name);
        at = t->end;
    }
    if (!result && at != st->data_len)
        result = fail(err, "the last %" PRId64 " bytes belong to no tensor; copy the file again", st->data_len - at);
    qsort(st->tensors, (size_t)st->count, sizeof(StTensor), st_compare_names);
    if (result < 0) safetensors_close(st);
    return result;
}

int safetensors_open(SafeTensors *st, const char *path, char *err) {
    FileMap map;
    memset(st, 0, sizeof *st);
    if (file_map(&map, path, err) < 0) return -1;
    if (safetensors_parse(st, map.data, map.len, err) < 0) {
        file_unmap(&map);
        return fail(err, "%s: %s", path, err);
    }
    st->map = map;
    st->path = xstrdup(path);
    return 0;
}

const StTensor *safetensors_find(const SafeTensors *st, const char *name) {
    StTensor key;
    key.name = name;
    return (const StTensor *)bsearch(&key, st->tensors, (size_t)st->count, sizeof(StTensor), st_compare_names);
}

// The metadata string `key`; NULL when absent.
const char *safetensors_meta(const SafeTensors *st, const char *key) {
    const Json *v = json_get(json_get(st->header, "__metadata__"), key);
    return v ? v->str : NULL;
}

void st_add_shape(Text *t, int ndim, const int64_t *shape) {
    text_put(t, "[", 1);
    for (int i = 0; i < ndim; i++) text_add(t, "%s%" PRId64, i ? "," : "", shape[i]);
    text_put(t, "]", 1);
}

// The tensor of that name if it has exactly that shape, else NULL.
const StTensor *safetensors_expect(const SafeTensors *st, const char *name, int ndim, const int64_t *shape, char *err) {
    const StTensor *t = safetensors_find(st, name);
    const char *path = st->path ? st->path : "safetensors";
    if (!t) {
        fail(err, "%s: tensor \"%s\" is missing: the file belongs to another model or configuration", path, name);
        return NULL;
    }
    int same = t->ndim == ndim;
    for (int i = 0; i < ndim && same; i++) same = t->shape[i] == shape[i];
    if (same) return t;
    Text found = {NULL, 0, 0}, wanted = {NULL, 0, 0};
    st_add_shape(&found, t->ndim, t->shape);
    st_add_shape(&wanted, ndim, shape);
    fail(err, "%s: tensor \"%s\" has shape %s, the configuration wants %s", path, name, found.data, wanted.data);
    free(found.data);
    free(wanted.data);
    return NULL;
}

// Copies a tensor as it is; `dtype` must be its own.
int safetensors_read(const SafeTensors *st, const char *name, int dtype, int ndim, const int64_t *shape, void *out, char *err) {
    const StTensor *t = safetensors_expect(st, name, ndim, shape, err);
    if (!t) return -1;
    if (t->dtype != dtype)
        return fail(err, "%s: tensor \"%s\" is %s, %s is wanted", st->path ? st->path : "safetensors", name,
                    st_dtype_names[t->dtype], st_dtype_names[dtype]);
    if (t->end > t->begin) memcpy(out, st->data + t->begin, (size_t)(t->end - t->begin));
    return 0;
}

static inline int64_t st_count(const StTensor *t) { return (t->end - t->begin) / st_dtype_bytes[t->dtype]; }

// n numbers of a tensor, from number `first` on, in any of the formats that weights come in.
int st_tensor_real(const SafeTensors *st, const StTensor *t, int64_t first, int64_t n, real *out, char *err) {
    const unsigned char *p = st->data + t->begin + first * st_dtype_bytes[t->dtype];  // maybe not aligned, hence memcpy
    switch (t->dtype) {
    case ST_F32:
        for (int64_t i = 0; i < n; i++) {
            float x;
            memcpy(&x, p + 4 * i, 4);
            out[i] = (real)x;
        }
        return 0;
    case ST_F64:
        for (int64_t i = 0; i < n; i++) {
            double x;
            memcpy(&x, p + 8 * i, 8);
            out[i] = (real)x;
        }
        return 0;
    case ST_BF16:
        for (int64_t i = 0; i < n; i++) {
            uint16_t x;
            memcpy(&x, p + 2 * i, 2);
            out[i] = (real)bf16_to_float(x);
        }
        return 0;
    default:
        return fail(err, "%s: tensor \"%s\" is %s, weights must be F32, BF16 or F64", st->path ? st->path : "safetensors", t->name,
                    st_dtype_names[t->dtype]);
    }
}

int safetensors_read_real(const SafeTensors *st, const char *name, int ndim, const int64_t *shape, real *out, char *err) {
    const StTensor *t = safetensors_expect(st, name, ndim, shape, err);
    comm_tick();
    return t ? st_tensor_real(st, t, 0, st_count(t), out, err) : -1;
}

// ----------------------------------------------------------------------------
// Writing safetensors, streamed: the tensors are declared, then their bytes follow in that order, so
// that a state of 100 GB needs no second copy. After an error the writer is closed.

typedef struct {
    FILE *file;
    char *path, *part;  // written as PATH.part, which takes the name when it is whole; NULL where path is a device
    Text meta, tensors;
    int64_t declared, written;
    int misaligned;
} StWriter;

void st_writer_close(StWriter *w) {
    if (w->file) fclose(w->file);
    if (w->part) unlink(w->part);
    free(w->part);
    free(w->path);
    free(w->meta.data);
    free(w->tensors.data);
    memset(w, 0, sizeof *w);
}

int st_writer_fail(StWriter *w, const char *why, char *err) {
    fail(err, "%s: cannot write: %s", w->path ? w->path : "safetensors", why);
    st_writer_close(w);
    return -1;
}

int st_writer_begin(StWriter *w, const char *path, char *err) {
    memset(w, 0, sizeof *w);
    w->path = xstrdup(path);
    struct stat st;
    if (stat(path, &st) != 0 || S_ISREG(st.st_mode)) w->part = format("%s.part", path);
    w->file = fopen(w->part ? w->part : path, "wb");
    return w->file ? 0 : st_writer_fail(w, strerror(errno), err);
}

void st_writer_meta(StWriter *w, const char *key, const char *value) {
    if (w->meta.len) text_put(&w->meta, ",", 1);
    text_add_json_string(&w->meta, key, (int64_t)strlen(key));
    text_put(&w->meta, ":", 1);
    text_add_json_string(&w->meta, value, (int64_t)strlen(value));
}

void st_writer_tensor(StWriter *w, const char *name, int dtype, int ndim, const int64_t *shape) {
    int64_t bytes = st_dtype_bytes[dtype];
    for (int i = 0; i < ndim; i++) bytes *= shape[i];
    if (w->declared % st_dtype_bytes[dtype]) w->misaligned = 1;
    text_put(&w->tensors, ",", 1);
    text_add_json_string(&w->tensors, name, (int64_t)strlen(name));
    text_add(&w->tensors, ":{\"dtype\":\"%s\",\"shape\":", st_dtype_names[dtype]);
    st_add_shape(&w->tensors, ndim, shape);
    text_add(&w->tensors, ",\"data_offsets\":[%" PRId64 ",%" PRId64 "]}", w->declared, w->declared + bytes);
    w->declared += bytes;
}

int st_writer_header(StWriter *w, char *err) {
    if (!w->file) return st_writer_fail(w, "it is not open", err);
    // PyTorch views the file in place, which needs each tensor aligned to its own type
    if (w->misaligned) return st_writer_fail(w, "a tensor would not be aligned (declare the wider types first)", err);
    Text h = {NULL, 0, 0};
    text_add(&h, "{\"__metadata__\":{%s}%s}", w->meta.data ? w->meta.data : "", w->tensors.data ? w->tensors.data : "");
    while (h.len % 8) text_put(&h, " ", 1);
    uint64_t n = (uint64_t)h.len;
    int ok = fwrite(&n, 8, 1, w->file) == 1 && fwrite(h.data, 1, (size_t)n, w->file) == (size_t)n, saved = errno;
    free(h.data);
    return ok ? 0 : st_writer_fail(w, strerror(saved), err);
}

int st_writer_data(StWriter *w, const void *data, int64_t bytes, char *err) {
    if (!w->file) return st_writer_fail(w, "it is not open", err);
    if (bytes > 0 && fwrite(data, 1, (size_t)bytes, w->file) != (size_t)bytes) return st_writer_fail(w, strerror(errno), err);
    // To the disk now and then, so that the last fsync is not the longest wait of a run.
    if (w->written / ST_SYNC != (w->written + bytes) / ST_SYNC && (fflush(w->file) != 0 || fsync(fileno(w->file)) != 0))
        return st_writer_fail(w, strerror(errno), err);
    w->written += bytes;
    comm_tick();
    return 0;
}

// Converts to F32, BF16 or F64 on the way.
int st_writer_real(StWriter *w, const real *x, int64_t n, int dtype, char *err) {
    union { float f32[4096]; uint16_t bf16[4096]; double f64[4096]; } chunk;
    if (dtype != ST_F32 && dtype != ST_BF16 && dtype != ST_F64) return st_writer_fail(w, "weights are F32, BF16 or F64", err);
    for (int64_t i = 0; i < n; i += 4096) {
        int m = n - i < 4096 ? (int)(n - i) : 4096;
        for (int j = 0; j < m; j++) {
            if (dtype == ST_F32) chunk.f32[j] = (float)x[i + j];
            else if (dtype == ST_BF16) chunk.bf16[j] = float_to_bf16((float)x[i + j]);
            else chunk.f64[j] = (double)x[i + j];
        }
        if (st_writer_data(w, &chunk, (int64_t)m * st_dtype_bytes[dtype], err) < 0) return -1;
    }
    return 0;
}

int st_writer_end(StWriter *w, char *err) {
    if (!w->file) return st_writer_fail(w, "it is not open", err);
    if (w->written != w->declared) {
        char why[96];
        snprintf(why, sizeof why, "%" PRId64 " bytes of data came, %" PRId64 " were declared", w->written, w->declared);
        return st_writer_fail(w, why, err);
    }
    if (fflush(w->file) != 0 || fsync(fileno(w->file)) != 0) return st_writer_fail(w, strerror(errno), err);
    int bad = fclose(w->file) != 0, saved = errno;
    w->file = NULL;
    if (bad) return st_writer_fail(w, strerror(saved), err);
    if (w->part && rename(w->part, w->path) != 0) return st_writer_fail(w, strerror(errno), err);
    free(w->part);
    w->part = NULL;
    st_writer_close(w);
    return 0;
}

// ----------------------------------------------------------------------------
// 3. Configuration: the shape of a model

enum { ATTENTION_NSA, ATTENTION_FULL };
enum { GATE_INPUT, GATE_Q_COND, GATE_STATIC };
enum { DTYPE_F32, DTYPE_BF16 };
enum { CMP, SLC, WIN, BRANCHES };  // the order of the branches everywhere

#define MAX_LAYERS 1024
#define ATTENTION_NAMES "nsa|full"
extern const char compress_names[];     // the section on compression has its names, and all else about it
int compress_has_weights(int kind);
#define GATE_NAMES "input|q_cond|static"
#define PRESET_NAMES "paper|short|medium|long"
#define SCHEDULE_NAMES "cosine|linear|constant|wsd|restarts"

// Everything that config.json says: with it and the weights a model is complete.
typedef struct Config {
    int vocab_size;                 // V
    int hidden_size;                // C
    int intermediate_size;          // F
    int num_hidden_layers;          // L
    int num_attention_heads;        // H
    int num_key_value_heads;        // KV, each shared by H/KV heads
    int head_dim;                   // D, of q and k
    int v_head_dim;                 // Dv
    int max_position_embeddings;    // T of the training; nothing depends on it but warnings
    double rope_theta, rms_norm_eps;
    int tie_word_embeddings;        // 1: lm_head is embed_tokens
    int attention;                  // ATTENTION_NSA, or FULL in every layer
    unsigned char full_layer[MAX_LAYERS];  // 1: this layer of an NSA model is full attention
    int cmp_block, cmp_stride;      // l, d
    int sel_block, sel_blocks;      // l', n
    int sel_init_blocks, sel_local_blocks;  // of the n, the first and the last ones always taken
    int window;                     // w
    int compress, gate;
    int num_experts, num_shared_experts, num_experts_per_tok, moe_intermediate_size;
    int first_dense_layers;         // the layers before the first MoE
    double capacity_factor;         // 0: dropless
    double z_loss_coef, balance_loss_coef;
    int eos_token_id;               // -1: none
    int torch_dtype;                // of model.safetensors
} Config;

static inline int layer_is_full(const Config *c, int layer) {
    return c->attention == ATTENTION_FULL || c->full_layer[layer];
}

static inline int layer_is_moe(const Config *c, int layer) {
    return c->num_experts > 0 && layer >= c->first_dense_layers;
}

// The settings of the sparse attention, from the paper's to ever longer contexts than "short".
typedef struct { int cmp_block, cmp_stride, sel_block, sel_blocks, window; } Preset;

static const Preset presets[] = {
    {32, 16, 64, 16, 512},  // paper
    {16, 16, 16,  5,  64},  // short
    {32, 32, 32,  7, 128},  // medium
    {64, 64, 64, 11, 256},  // long
};

void config_preset(Config *c, int preset) {
    const Preset *p = &presets[preset];
    c->cmp_block = p->cmp_block;
    c->cmp_stride = p->cmp_stride;
    c->sel_block = p->sel_block;
    c->sel_blocks = p->sel_blocks;
    c->window = p->window;
    c->sel_init_blocks = 1;
    c->sel_local_blocks = 2;
}

// The small model of `./train_nsa` alone. A size that is 0 here follows from the others, see
// config_complete; vocab_size follows from the data.
Config config_default(void) {
    Config c;
    memset(&c, 0, sizeof c);
    c.num_hidden_layers = 3;
    c.hidden_size = 128;
    c.num_attention_heads = 4;
    c.num_key_value_heads = 2;
    c.max_position_embeddings = 256;
    c.rope_theta = 10000;
    c.rms_norm_eps = 1e-5;
    c.tie_word_embeddings = 1;
    c.z_loss_coef = 1e-3;
    c.balance_loss_coef = 1e-2;
    c.eos_token_id = -1;
    config_preset(&c, 1);
    return c;
}

// `-e dN` is GPT-2's family: depth N, width 64N. Dense, it has N heads of 64, each with its own keys and
// values, like llm.c's dN. With NSA the heads that share keys and values choose their blocks together,
// and the more share the better the blocks are used: about 4N/3 heads of 64 (a multiple of 4), and as
// many KV heads as leave at least 16 heads to each. d12 is 16 heads on 1 KV head: 124.5M parameters, to
// GPT-2's 124.4M.
int model_depth(const char *name) {  // of "d12", 0: it is another name
    int depth = 0, end = 0;
    return sscanf(name, "d%4d%n", &depth, &end) == 1 && !name[end] && isdigit((unsigned char)name[1]) ? depth : 0;
}

void config_depth(Config *c, int depth) {
    c->num_hidden_layers = depth;
    c->hidden_size = 64 * depth;
    c->head_dim = 64;
    c->max_position_embeddings = 1024;
    if (c->attention == ATTENTION_FULL) {
        c->num_attention_heads = c->num_key_value_heads = depth;
        return;
    }
    int heads = (int)(depth / 3.0 + 0.5) * 4, kv = heads / 16;
    if (heads < 4) heads = 4;
    if (kv < 1) kv = 1;
    while (heads % kv) kv--;
    c->num_attention_heads = heads;
    c->num_key_value_heads = kv;
    config_preset(c, 0);
}

// Sizes that were left open: D = C/H, Dv = D, KV = H, F = 8C/3 rounded up to a multiple of 64, and
// experts that together cost a token what the dense FFN would.
void config_complete(Config *c) {
    if (!c->head_dim && c->num_attention_heads > 0) c->head_dim = c->hidden_size / c->num_attention_heads;
    if (!c->v_head_dim) c->v_head_dim = c->head_dim;
    if (!c->num_key_value_heads) c->num_key_value_heads = c->num_attention_heads;
    if (!c->intermediate_size) c->intermediate_size = (int)(((int64_t)c->hidden_size * 8 + 191) / 192 * 64);
    if (c->num_experts && !c->num_experts_per_tok) c->num_experts_per_tok = c->num_experts < 2 ? 1 : 2;
    int active = c->num_experts_per_tok + c->num_shared_experts;
    if (c->num_experts && !c->moe_intermediate_size && active > 0)
        c->moe_intermediate_size = (c->intermediate_size / active + 31) / 32 * 32;
}

// ----------------------------------------------------------------------------
// The keys of config.json: one table, walked to read, to write and to check.

enum { KEY_INT, KEY_FLOAT, KEY_BOOL, KEY_CHOICE, KEY_LAYERS, KEY_TOKEN };

typedef struct {
    const char *name;     // in config.json
    const char *option;   // on the command line, NULL: none
    int type;
    size_t offset;        // in Config
    double min, max;
    int weights;          // 1: weights of another value do not fit
    const char *choices;  // KEY_CHOICE: the names of 0, 1, 2...
} ConfigKey;

static const ConfigKey config_keys[] = {
    {"vocab_size", "vocab", KEY_INT, offsetof(Config, vocab_size), 1, 1 << 28, 1, NULL},
    {"hidden_size", "width", KEY_INT, offsetof(Config, hidden_size), 1, 1 << 20, 1, NULL},
    {"intermediate_size", "ffn-width", KEY_INT, offsetof(Config, intermediate_size), 1, 1 << 24, 1, NULL},
    {"num_hidden_layers", "layers", KEY_INT, offsetof(Config, num_hidden_layers), 1, MAX_LAYERS, 1, NULL},
    {"num_attention_heads", "heads", KEY_INT, offsetof(Config, num_attention_heads), 1, 1 << 16, 1, NULL},
    {"num_key_value_heads", "kv-heads", KEY_INT, offsetof(Config, num_key_value_heads), 1, 1 << 16, 1, NULL},
    {"head_dim", "head-dim", KEY_INT, offsetof(Config, head_dim), 2, 1 << 16, 1, NULL},
    {"v_head_dim", "v-head-dim", KEY_INT, offsetof(Config, v_head_dim), 1, 1 << 16, 1, NULL},
    {"max_position_embeddings", "seq-len", KEY_INT, offsetof(Config, max_position_embeddings), 1, 1 << 30, 0, NULL},
    {"rope_theta", "rope-theta", KEY_FLOAT, offsetof(Config, rope_theta), 1, 1e15, 0, NULL},
    {"rms_norm_eps", NULL, KEY_FLOAT, offsetof(Config, rms_norm_eps), 0, 1, 0, NULL},
    {"tie_word_embeddings", "untied-head", KEY_BOOL, offsetof(Config, tie_word_embeddings), 0, 1, 1, NULL},
    {"attention", "attention", KEY_CHOICE, offsetof(Config, attention), 0, 0, 1, ATTENTION_NAMES},
    {"full_layers", "full-layers", KEY_LAYERS, offsetof(Config, full_layer), 0, 0, 1, NULL},
    {"cmp_block", "cmp-block", KEY_INT, offsetof(Config, cmp_block), 1, 1 << 20, 1, NULL},
    {"cmp_stride", "cmp-stride", KEY_INT, offsetof(Config, cmp_stride), 1, 1 << 20, 0, NULL},
    {"sel_block", "sel-block", KEY_INT, offsetof(Config, sel_block), 1, 1 << 20, 0, NULL},
    {"sel_blocks", "sel-blocks", KEY_INT, offsetof(Config, sel_blocks), 1, 1 << 20, 0, NULL},
    {"sel_init_blocks", "sel-init", KEY_INT, offsetof(Config, sel_init_blocks), 0, 1 << 20, 0, NULL},
    {"sel_local_blocks", "sel-local", KEY_INT, offsetof(Config, sel_local_blocks), 1, 1 << 20, 0, NULL},
    {"window", "window", KEY_INT, offsetof(Config, window), 1, 1 << 30, 0, NULL},
    {"compress", "compress", KEY_CHOICE, offsetof(Config, compress), 0, 0, 1, compress_names},
    {"gate", "gate", KEY_CHOICE, offsetof(Config, gate), 0, 0, 1, GATE_NAMES},
    {"num_experts", "experts", KEY_INT, offsetof(Config, num_experts), 0, 1 << 16, 1, NULL},
    {"num_shared_experts", "shared-experts", KEY_INT, offsetof(Config, num_shared_experts), 0, 1 << 10, 1, NULL},
    {"num_experts_per_tok", "experts-per-token", KEY_INT, offsetof(Config, num_experts_per_tok), 0, 1 << 16, 0, NULL},
    {"moe_intermediate_size", "expert-width", KEY_INT, offsetof(Config, moe_intermediate_size), 0, 1 << 20, 1, NULL},
    {"first_dense_layers", "dense-layers", KEY_INT, offsetof(Config, first_dense_layers), 0, MAX_LAYERS, 1, NULL},
    {"capacity_factor", "capacity-factor", KEY_FLOAT, offsetof(Config, capacity_factor), 0, 1e6, 0, NULL},
    {"z_loss_coef", "z-loss", KEY_FLOAT, offsetof(Config, z_loss_coef), 0, 1e6, 0, NULL},
    {"balance_loss_coef", "balance-loss", KEY_FLOAT, offsetof(Config, balance_loss_coef), 0, 1e6, 0, NULL},
    {"eos_token_id", NULL, KEY_TOKEN, offsetof(Config, eos_token_id), -1, 1 << 28, 0, NULL},
    {"torch_dtype", "dtype", KEY_CHOICE, offsetof(Config, torch_dtype), 0, 0, 0, "float32|bfloat16"},
};
enum { CONFIG_KEYS = sizeof config_keys / sizeof config_keys[0] };

static inline size_t config_key_size(const ConfigKey *key) {
    return key->type == KEY_FLOAT ? sizeof(double) : key->type == KEY_LAYERS ? MAX_LAYERS : sizeof(int);
}

// The number of a name in "first|second|third", -1 if it is not there.
int choice_index(const char *choices, const char *name, int64_t len) {
    for (int i = 0;; i++) {
        const char *end = strchr(choices, '|');
        int64_t n = end ? end - choices : (int64_t)strlen(choices);
        if (n == len && !memcmp(choices, name, (size_t)n)) return i;
        if (!end) return -1;
        choices = end + 1;
    }
}

// Choice i of "first|second|third" as printf's "%.*s" takes it.
const char *choice_name(const char *choices, int i, int *len) {
    for (; i > 0; i--) choices = strchr(choices, '|') + 1;
    const char *end = strchr(choices, '|');
    *len = end ? (int)(end - choices) : (int)strlen(choices);
    return choices;
}

// ----------------------------------------------------------------------------
// What a model must satisfy. A message names the option to change, and the symbols of the paper.

int config_validate(const Config *c, char *err) {
    for (int i = 0; i < CONFIG_KEYS; i++) {
        const ConfigKey *key = &config_keys[i];
        const char *at = (const char *)c + key->offset;
        if (key->type != KEY_INT && key->type != KEY_FLOAT && key->type != KEY_TOKEN) continue;
        double x = key->type == KEY_FLOAT ? *(const double *)(const void *)at : *(const int *)(const void *)at;
        if (!(x >= key->min && x <= key->max))
            return fail(err, "%s%s%s%s%s is %.15g: it must be from %.15g to %.15g", key->option ? "--" : "",
                        key->option ? key->option : "",
                        key->option ? " (" : "", key->name, key->option ? ")" : "", x, key->min, key->max);
    }
    int L = c->num_hidden_layers, C = c->hidden_size;
    int H = c->num_attention_heads, KV = c->num_key_value_heads, D = c->head_dim;
    if (H % KV) return fail(err, "--kv-heads %d must divide --heads %d", KV, H);
    if (D % 2) return fail(err, "--head-dim %d must be even (RoPE turns pairs of channels)", D);
    if ((int64_t)H * D > 1 << 24 || (int64_t)H * c->v_head_dim > 1 << 24)
        return fail(err, "--heads %d times --head-dim %d (--v-head-dim %d) must be at most %d", H, D, c->v_head_dim,
                    1 << 24);

    int nsa_layers = 0;
    for (int layer = 0; layer < MAX_LAYERS; layer++) {
        if (layer >= L && c->full_layer[layer])
            return fail(err, "--full-layers names layer %d: with --layers %d they are 0 to %d", layer, L, L - 1);
        nsa_layers += layer < L && !layer_is_full(c, layer);
    }
    if (nsa_layers) {
        int l = c->cmp_block, d = c->cmp_stride, s = c->sel_block, n = c->sel_blocks;
        if (l % d) return fail(err, "--cmp-stride %d must divide --cmp-block %d (d | l)", d, l);
        if (s % d) return fail(err, "--cmp-stride %d must divide --sel-block %d (d | l')", d, s);
        if (l > s) return fail(err, "--cmp-block %d must be at most --sel-block %d (l <= l')", l, s);
        if (n < c->sel_init_blocks + c->sel_local_blocks)
            return fail(err, "--sel-blocks %d must be at least --sel-init %d + --sel-local %d, the blocks always taken (n >= n_init + n_local)",
                        n, c->sel_init_blocks, c->sel_local_blocks);
        if ((int64_t)l * D > 1 << 24 || (int64_t)l * c->v_head_dim > 1 << 24)
            return fail(err, "--cmp-block %d times --head-dim %d (--v-head-dim %d) must be at most %d", l, D, c->v_head_dim,
                        1 << 24);
    }
    if (c->num_experts) {
        if (c->num_experts_per_tok < 1 || c->num_experts_per_tok > c->num_experts)
            return fail(err, "--experts-per-token %d must be from 1 to --experts %d", c->num_experts_per_tok,
                        c->num_experts);
        if (c->moe_intermediate_size < 1)
            return fail(err, "--expert-width %d must be at least 1", c->moe_intermediate_size);
        if ((int64_t)c->num_shared_experts * c->moe_intermediate_size > 1 << 24)
            return fail(err, "--shared-experts %d times --expert-width %d must be at most %d", c->num_shared_experts,
                        c->moe_intermediate_size, 1 << 24);
        if (c->first_dense_layers > L)
            return fail(err, "--dense-layers %d must be at most --layers %d", c->first_dense_layers, L);
    }
    if (c->eos_token_id >= c->vocab_size)
        return fail(err, "eos_token_id %d must be below vocab_size %d", c->eos_token_id, c->vocab_size);

    double experts = (double)c->moe_intermediate_size * ((double)c->num_experts + c->num_shared_experts);
    double layer = 2.0 * C * H * ((double)D + c->v_head_dim) + 3.0 * C * (c->intermediate_size + experts);
    double parameters = 2.0 * c->vocab_size * C + L * layer;
    if (parameters > 1e13)
        return fail(err, "a model of about %.1e parameters is too large: use a smaller --width, --layers or --vocab",
                    parameters);
    return 0;
}

// ----------------------------------------------------------------------------
// config.json

// The shortest decimal that reads back as the same double, and that JSON readers take for a float.
void text_add_double(Text *out, double x) {
    char digits[40];
    for (int precision = 1; precision <= 17; precision++) {
        snprintf(digits, sizeof digits, "%.*g", precision, x);
        if (strtod(digits, NULL) == x) break;
    }
    text_add(out, "%s%s", digits, strpbrk(digits, ".en") ? "" : ".0");
}

void config_write(const Config *c, Text *out) {
    text_add(out, "{\n  \"model_type\": \"nsa\",\n  \"architectures\": [\"NSAForCausalLM\"],\n  \"auto_map\": {\n"
                  "    \"AutoConfig\": \"modeling_nsa.NSAConfig\",\n"
                  "    \"AutoModelForCausalLM\": \"modeling_nsa.NSAForCausalLM\"\n  }");
    for (int i = 0; i < CONFIG_KEYS; i++) {
        const ConfigKey *key = &config_keys[i];
        const void *at = (const char *)c + key->offset;
        text_add(out, ",\n  \"%s\": ", key->name);
        int value = key->type == KEY_FLOAT || key->type == KEY_LAYERS ? 0 : *(const int *)at;
        if (key->type == KEY_FLOAT) text_add_double(out, *(const double *)at);
        else if (key->type == KEY_BOOL) text_add(out, "%s", value ? "true" : "false");
        else if (key->type == KEY_TOKEN && value < 0) text_add(out, "null");
        else if (key->type == KEY_CHOICE) {
            int len;
            const char *name = choice_name(key->choices, value, &len);
            text_add(out, "\"%.*s\"", len, name);
        } else if (key->type == KEY_LAYERS) {
            int listed = 0;
            text_add(out, "[");
            for (int layer = 0; layer < c->num_hidden_layers; layer++)
                if (((const unsigned char *)at)[layer]) text_add(out, "%s%d", listed++ ? ", " : "", layer);
            text_add(out, "]");
        } else text_add(out, "%d", value);
    }
    text_add(out, "\n}\n");
}

int config_parse_key(const ConfigKey *key, const Json *value, void *at, char *err) {
    int is_int = value->type == JSON_NUMBER && value->is_integer && value->integer >= INT_MIN && value->integer <= INT_MAX;
    switch (key->type) {
    case KEY_INT:
        if (!is_int) return fail(err, "\"%s\" must be a whole number", key->name);
        *(int *)at = (int)value->integer;
        return 0;
    case KEY_TOKEN:
        if (value->type != JSON_NULL && (!is_int || value->integer < 0))
            return fail(err, "\"%s\" must be a token number or null", key->name);
        *(int *)at = value->type == JSON_NULL ? -1 : (int)value->integer;
        return 0;
    case KEY_FLOAT:
        if (value->type != JSON_NUMBER) return fail(err, "\"%s\" must be a number", key->name);
        *(double *)at = value->number;
        return 0;
    case KEY_BOOL:
        if (value->type != JSON_BOOL) return fail(err, "\"%s\" must be true or false", key->name);
        *(int *)at = (int)value->number;
        return 0;
    case KEY_CHOICE: {
        int choice = value->type == JSON_STRING ? choice_index(key->choices, value->str, value->len) : -1;
        if (choice < 0) return fail(err, "\"%s\" must be one of %s", key->name, key->choices);
        *(int *)at = choice;
        return 0;
    }
    default:
        if (value->type != JSON_ARRAY) return fail(err, "\"%s\" must be a list of layer numbers", key->name);
        for (const Json *item = value->child; item; item = item->next) {
            if (item->type != JSON_NUMBER || !item->is_integer || item->integer < 0 || item->integer >= MAX_LAYERS)
                return fail(err, "\"%s\" must be a list of layer numbers from 0 to %d", key->name, MAX_LAYERS - 1);
            ((unsigned char *)at)[item->integer] = 1;
        }
        return 0;
    }
}

// Every key must be there. Keys that are not ours are the business of whoever wrote them.
int config_parse_root(Config *c, const Json *root, char *err) {
    memset(c, 0, sizeof *c);
    if (root->type != JSON_OBJECT) return fail(err, "not a JSON object");
    const Json *model_type = json_get(root, "model_type");
    if (!json_is_string(model_type, "nsa"))
        return fail(err, "\"model_type\" must be \"nsa\": only this program's models are read");
    for (int i = 0; i < CONFIG_KEYS; i++) {
        const ConfigKey *key = &config_keys[i];
        const Json *value = json_get(root, key->name);
        if (!value && !strcmp(key->name, "torch_dtype")) value = json_get(root, "dtype");  // its name in transformers 5
        if (!value) return fail(err, "the key \"%s\" is missing", key->name);
        if (config_parse_key(key, value, (char *)c + key->offset, err) < 0) return -1;
    }
    return config_validate(c, err) < 0 ? -2 : 0;
}

// Reads the text of a config.json. Returns -1 where it is malformed, -2 where it says what cannot be.
int config_parse(Config *c, const char *text, int64_t len, char *err) {
    Json *root;
    if (json_parse(&root, text, len, err) < 0) return -1;
    int result = config_parse_root(c, root, err);
    json_free(root);
    return result;
}

int config_load(Config *c, const char *path, char *err) {
    char *text, why[ERR_LEN];
    int64_t len;
    if (read_file(path, &text, &len, err) < 0) return -1;
    int result = config_parse(c, text, len, why);
    free(text);
    if (result < 0) fail(err, "%s: %s", path, why);
    return result;
}

// Whether weights of shape `file` can be used as `c`; says which option stands against it.
int config_same_weights(const Config *c, const Config *file, const char *path, char *err) {
    for (int i = 0; i < CONFIG_KEYS; i++) {
        const ConfigKey *key = &config_keys[i];
        const char *a = (const char *)c + key->offset, *b = (const char *)file + key->offset;
        if (!key->weights || !memcmp(a, b, config_key_size(key))) continue;
        if (!strcmp(key->name, "cmp_block") && !compress_has_weights(c->compress)) continue;  // a mean has no weights
        if (key->type == KEY_INT)
            return fail(err, "--%s %d contradicts the weights in %s (%d): leave it out, or take the shape alone, -e %s/config.json",
                        key->option, *(const int *)(const void *)a, path, *(const int *)(const void *)b, path);
        return fail(err, "--%s contradicts the weights in %s: leave it out, or take the shape alone, -e %s/config.json",
                    key->option, path, path);
    }
    return 0;
}

// ----------------------------------------------------------------------------
// The command line. One table of options says everything: it parses, checks, prints --help, and is
// what a checkpoint remembers. sample.c has a table of its own for the same functions.

enum {
    OPT_GROUP,   // a heading of --help
    OPT_FLAG,    // int 0|1; alone it means 1
    OPT_INT,     // int
    OPT_COUNT,   // int64_t; both take k, m, g for 1024, 1024^2, 1024^3
    OPT_FLOAT,   // double
    OPT_TEXT,    // const char *
    OPT_PROMPT,  // the same, and may be empty
    OPT_CHOICE,  // int, number of the name in "first|second"
    OPT_TRIPLE,  // double[3], "a,b,c"
    OPT_LAYERS,  // unsigned char[MAX_LAYERS], "0,5"
};

enum {
    OF_MODEL = 1,  // is kept in config.json
    OF_RUN,        // is remembered by the run: -y takes it from there
    OF_CALL,       // belongs to this call of the program alone
};

typedef struct {
    char letter;           // 0: none
    const char *name;
    int type, of;
    size_t offset;         // of the value, in the struct that the table describes
    const char *argument;  // as --help shows it; the names of an OPT_CHOICE
    double min, max;       // 0, 0: checked elsewhere (config_validate)
    const char *shown;     // the default as --help shows it, NULL: the value itself
    const char *help;
} Option;

#define MAX_OPTIONS 128

// "-b (--batch)", "--window": how messages call an option.
const char *option_label(const Option *o) {
    static char label[64];
    if (o->letter) snprintf(label, sizeof label, "-%c (--%s)", o->letter, o->name);
    else snprintf(label, sizeof label, "--%s", o->name);
    return label;
}

// Whole number with an optional k, m or g.
int parse_count(const char *s, int64_t *value) {
    char *end;
    errno = 0;
    long long x = strtoll(s, &end, 10);
    if (end == s || errno || isspace((unsigned char)*s)) return -1;
    int shift = *end == 'k' || *end == 'K' ? 10 : *end == 'm' || *end == 'M' ? 20 : *end == 'g' || *end == 'G' ? 30 : 0;
    if (shift) end++;
    if (*end || x > (INT64_MAX >> shift) || x < -(INT64_MAX >> shift)) return -1;
    *value = (int64_t)x * ((int64_t)1 << shift);
    return 0;
}

int parse_double(const char *s, char stop, double *value, const char **rest) {
    char *end;
    errno = 0;
    *value = strtod(s, &end);
    if (end == s || *end != stop || isspace((unsigned char)*s) || strpbrk(s, "xXnN") || !isfinite(*value)) return -1;
    *rest = end + (stop != 0);
    return 0;
}

// Sets one option from its text.
int option_set(const Option *o, void *values, const char *text, char *err) {
    void *at = (char *)values + o->offset;
    const char *label = option_label(o), *rest = text;
    int64_t count = 0;
    double number = 0;
    if (!*text && o->type != OPT_LAYERS && o->type != OPT_PROMPT)
        return fail(err, "%s needs a value: %s", label, o->argument ? o->argument : "0 or 1");
    switch (o->type) {
    case OPT_FLAG:
        if (strcmp(text, "0") && strcmp(text, "1"))
            return fail(err, "%s stands alone or takes 0 or 1, not \"%s\"", label, text);
        *(int *)at = *text == '1';
        return 0;
    case OPT_INT:
    case OPT_COUNT:
        if (parse_count(text, &count) < 0) return fail(err, "%s needs a whole number, not \"%s\"", label, text);
        number = (double)count;
        if (o->type == OPT_INT && (count > INT_MAX || count < INT_MIN)) return fail(err, "%s %s is too large", label, text);
        break;
    case OPT_FLOAT:
        if (parse_double(text, 0, &number, &rest) < 0) return fail(err, "%s needs a number, not \"%s\"", label, text);
        break;
    case OPT_TEXT:
    case OPT_PROMPT:
        *(const char **)at = text;
        return 0;
    case OPT_CHOICE:
        count = choice_index(o->argument, text, (int64_t)strlen(text));
        if (count < 0) return fail(err, "%s must be one of %s, not \"%s\"", label, o->argument, text);
        *(int *)at = (int)count;
        return 0;
    case OPT_TRIPLE:
        for (int i = 0; i < 3; i++)
            if (parse_double(rest, i < 2 ? ',' : 0, (double *)at + i, &rest) < 0 || fabs(((double *)at)[i]) > 1000)
                return fail(err, "%s needs three numbers (from -1000 to 1000) such as -2,-2,2, not \"%s\"", label, text);
        return 0;
    case OPT_LAYERS:
        memset(at, 0, MAX_LAYERS);
        while (*rest) {
            char *end;
            long layer = strtol(rest, &end, 10);
            if (!isdigit((unsigned char)*rest) || layer >= MAX_LAYERS || (*end && (*end != ',' || !end[1])))
                return fail(err, "%s needs layer numbers such as 0,5 (from 0 to %d), not \"%s\"", label, MAX_LAYERS - 1,
                            text);
            ((unsigned char *)at)[layer] = 1;
            rest = end + (*end == ',');
        }
        return 0;
    }
    if (o->max > o->min && !(number >= o->min && number <= o->max))
        return fail(err, "%s %s is out of range: it must be from %.15g to %.15g", label, text, o->min, o->max);
    if (o->type == OPT_INT) *(int *)at = (int)count;
    else if (o->type == OPT_COUNT) *(int64_t *)at = count;
    else *(double *)at = number;
    return 0;
}

// The value as text that option_set takes.
void option_text(const Option *o, const void *values, Text *out) {
    const void *at = (const char *)values + o->offset;
    if (o->type == OPT_FLAG || o->type == OPT_INT) text_add(out, "%d", *(const int *)at);
    else if (o->type == OPT_COUNT) text_add(out, "%" PRId64, *(const int64_t *)at);
    else if (o->type == OPT_FLOAT) text_add(out, "%.17g", *(const double *)at);
    else if (o->type == OPT_TEXT) text_add(out, "%s", *(const char *const *)at ? *(const char *const *)at : "");
    else if (o->type == OPT_CHOICE) {
        int len;
        const char *name = choice_name(o->argument, *(const int *)at, &len);
        text_add(out, "%.*s", len, name);
    } else if (o->type == OPT_TRIPLE) {
        const double *x = (const double *)at;
        text_add(out, "%.17g,%.17g,%.17g", x[0], x[1], x[2]);
    } else {
        int listed = 0;
        for (int i = 0; i < MAX_LAYERS; i++)
            if (((const unsigned char *)at)[i]) text_add(out, "%s%d", listed++ ? "," : "", i);
    }
}

// Edits (a letter more, less, or another one) between two names: who is meant by "--widht"?
int edit_distance(const char *a, const char *b) {
    int row[64], n = (int)strlen(b);
    if (n > 62) return 99;
    for (int j = 0; j <= n; j++) row[j] = j;
    for (int i = 1; a[i - 1]; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= n; j++) {
            int best = diagonal + (a[i - 1] != b[j - 1]);
            if (row[j] + 1 < best) best = row[j] + 1;
            if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
            diagonal = row[j];
            row[j] = best;
        }
    }
    return row[n];
}

__attribute__((noreturn))
void unknown_option(const Option *table, int rows, const char *argument, const char *name) {
    const char *nearest = NULL;
    int least = 4;
    for (int i = 0; i < rows; i++) {
        if (table[i].type == OPT_GROUP) continue;
        int distance = edit_distance(name, table[i].name);
        if (distance < least && distance < (int)strlen(table[i].name)) least = distance, nearest = table[i].name;
    }
    if (nearest) die(2, "unknown option %s: did you mean --%s?", argument, nearest);
    die(2, "unknown option %s: see %s --help", argument, program_name);
}

// `-b8`, `-b 8`, `--batch 8`, `--batch=8`; a flag alone or with 0|1. given[i] says that row i was set.
void options_parse(const Option *table, int rows, void *values, unsigned char *given, int argc, char **argv) {
    char err[ERR_LEN];
    for (int i = 1; i < argc; i++) {
        const char *arg = argv[i], *value = NULL;
        char name[64] = "";
        if (arg[0] != '-' || !arg[1])
            die(2, "unexpected argument \"%s\": every value follows an option, see %s --help", arg, program_name);
        if (arg[1] == '-') {
            const char *equals = strchr(arg, '=');
            int len = equals ? (int)(equals - arg) - 2 : (int)strlen(arg) - 2;
            snprintf(name, sizeof name, "%.*s", len, arg + 2);
            if (equals) value = equals + 1;
        } else if (arg[2]) value = arg[2] == '=' ? arg + 3 : arg + 2;

        int row = -1;
        for (int j = 0; j < rows && row < 0; j++)
            if (table[j].type != OPT_GROUP && (arg[1] == '-' ? !strcmp(name, table[j].name) : arg[1] == table[j].letter))
                row = j;
        if (row < 0) unknown_option(table, rows, arg, arg[1] == '-' ? name : arg + 1);

        const Option *o = &table[row];
        if (!value && o->type == OPT_FLAG) {
            int follows = i + 1 < argc && (!strcmp(argv[i + 1], "0") || !strcmp(argv[i + 1], "1"));
            value = follows ? argv[++i] : "1";
        } else if (!value) {
            if (i + 1 >= argc) die(2, "%s needs a value: %s", option_label(o), o->argument);
            value = argv[++i];
        }
        if (option_set(o, values, value, err) < 0) die(2, "%s", err);
        given[row] = 1;
    }
}

// The row whose value lies at `offset`.
int option_row(const Option *table, int rows, size_t offset) {
    for (int i = 0; i < rows; i++)
        if (table[i].type != OPT_GROUP && table[i].offset == offset) return i;
    return -1;
}

// Prints the options in two columns, the second one wrapped; `values` holds the defaults.
void options_help(const Option *table, int rows, const void *values) {
    enum { COLUMN = 29, WIDTH = 80 };
    for (int i = 0; i < rows; i++) {
        const Option *o = &table[i];
        if (o->type == OPT_GROUP) {
            printf("\n%s\n", o->help);
            continue;
        }
        char left[96], letter[8] = "    ";
        if (o->letter) snprintf(letter, sizeof letter, "-%c, ", o->letter);
        const char *argument = o->type == OPT_CHOICE ? "NAME" : o->argument;
        snprintf(left, sizeof left, "  %s--%s%s%s", letter, o->name, argument ? " " : "", argument ? argument : "");
        printf("%-*s", COLUMN, left);
        int at = (int)strlen(left) > COLUMN ? (int)strlen(left) : COLUMN;

        Text text = {NULL, 0, 0};
        text_add(&text, "%s", o->help);
        if (o->type == OPT_CHOICE) {
            text_add(&text, ":");
            for (const char *s = o->argument; *s; s++)
                if (s == o->argument || s[-1] == '|')
                    text_add(&text, "%s%.*s", s == o->argument ? " " : ", ", (int)strcspn(s, "|"), s);
        }
        if (!o->shown || *o->shown) {
            text_add(&text, " [");
            if (o->shown) text_add(&text, "%s", o->shown);
            else if (o->type == OPT_FLOAT)
                text_add(&text, "%g", *(const double *)(const void *)((const char *)values + o->offset));
            else if (o->type == OPT_TRIPLE) {
                const double *x = (const double *)(const void *)((const char *)values + o->offset);
                text_add(&text, "%g,%g,%g", x[0], x[1], x[2]);
            } else option_text(o, values, &text);
            text_add(&text, "]");
        }
        for (const char *word = text.data; *word;) {
            int len = (int)strcspn(word, " ");
            if (at + 1 + len > WIDTH || (at == (int)strlen(left) && at > COLUMN)) printf("\n%*s", COLUMN, ""), at = COLUMN;
            printf("%s%.*s", at > COLUMN ? " " : "", len, word);
            at += len + (at > COLUMN);
            word += len + (word[len] == ' ');
        }
        printf("\n");
        free(text.data);
    }
}

// ----------------------------------------------------------------------------
// The options of train_nsa

enum { SCHEDULE_COSINE, SCHEDULE_LINEAR, SCHEDULE_CONSTANT, SCHEDULE_WSD, SCHEDULE_RESTARTS };

typedef struct Options {
    const char *train_data, *val_data, *tokenizer, *model, *out;
    int help, resume, evaluate_only;
    Config config;       // what was given of it
    int preset, untied_head, dtype, stochastic_rounding;
    double gate_init[BRANCHES];
    int batch, seq_len;
    int64_t total_batch, max_steps, warmup;
    double lr, final_lr_frac, weight_decay, beta1, beta2, eps, grad_clip, dropout;
    int schedule, cycles;
    int64_t val_every, val_steps, sample_every, sample_len, checkpoint_every, keep, early_stop;
    int recompute, zero, context_parallel, overfit, skip_bad_steps, threads;
    const char *init;
    double timeout, tflops, link;
    int plan, ranks;
    int64_t seed;
    unsigned char given[MAX_OPTIONS];  // which rows of the table were on the command line
} Options;

// What the two programs differ in: what --help says of -b where it is not its value (see choose_micro_batch), and what --plan
// counts with. TFLOP/s of a training step and GB/s between two ranks as measured: dev/benchmarks.md, Several ranks.
#ifdef NSA_GPU
#define MICRO_BATCH "what fits the GPU and divides -d; without -d at most 2"
#define PLAN_TFLOPS 350
#define PLAN_LINK 317
enum { ON_GPU = 1 };
#else
#define MICRO_BATCH NULL
#define PLAN_TFLOPS 0.18
#define PLAN_LINK 0.7
enum { ON_GPU = 0 };
#endif

// Every default of a run in one place. seq_len and total_batch 0, lr and warmup -1: worked out later.
Options options_default(void) {
    Options o;
    memset(&o, 0, sizeof o);
    o.config = config_default();
    o.preset = 1;
    o.gate_init[CMP] = o.gate_init[SLC] = -2;
    o.gate_init[WIN] = 2;
    o.batch = 2;
    o.max_steps = 1800;
    o.lr = -1;
    o.warmup = -1;
    o.final_lr_frac = 0.1;
    o.cycles = 4;
    o.weight_decay = 0.1;
    o.beta1 = 0.9;
    o.beta2 = 0.95;
    o.eps = 1e-8;
    o.grad_clip = 1;
    o.val_every = 200;
    o.val_steps = 40;
    o.sample_every = 600;
    o.sample_len = 300;
    o.checkpoint_every = 600;
    o.keep = 2;
    o.seed = 1337;
    o.timeout = comm.timeout;
    o.context_parallel = 1;
    o.ranks = 1;
    o.tflops = PLAN_TFLOPS;
    o.link = PLAN_LINK;
    return o;
}

#define AT(field) offsetof(Options, field)
#define GROUP(title) {0, NULL, OPT_GROUP, 0, 0, NULL, 0, 0, NULL, title}
static const Option train_options[] = {
    GROUP("Data"),
    {'i', "train-data", OPT_TEXT, OF_RUN, AT(train_data), "FILE", 0, 0, "built-in tales",
     "what to train on: a text in UTF-8, or a .bin of tokens; \"a*.bin\" in quotes takes many"},
    {'j', "val-data", OPT_TEXT, OF_RUN, AT(val_data), "FILE", 0, 0, "last tenth of -i",
     "what to validate on"},
    {0, "tokenizer", OPT_TEXT, OF_RUN, AT(tokenizer), "FILE", 0, 0, "the one beside the .bin or in -e FOLDER, else bytes",
     "byte-level BPE, a tokenizer.json"},
    {0, "vocab", OPT_INT, OF_MODEL, AT(config.vocab_size), "N", 1, 1 << 28, "the tokenizer's; text 256, .bin 50257",
     "size of the vocabulary"},
    {'t', "seq-len", OPT_INT, OF_RUN, AT(seq_len), "T", 1, 1 << 26, "256; -e dN 1024; -e FILE its own",
     "tokens of context"},

    GROUP("Run"),
    {'o', "out", OPT_TEXT, OF_CALL, AT(out), "FOLDER", 0, 0, "out/run_001, 002...",
     "where checkpoints and log.jsonl go; never overwrites a run"},
    {'y', "resume", OPT_FLAG, OF_CALL, AT(resume), NULL, 0, 0, "",
     "continue the run in -o (without -o: the newest one) from its last checkpoint; options not given stay as they were"},
    {'x', "max-steps", OPT_COUNT, OF_RUN, AT(max_steps), "N", 0, 1e12, NULL,
     "steps in all; 0 evaluates and exits"},
    {'v', "val-every", OPT_COUNT, OF_RUN, AT(val_every), "N", 0, 1e12, NULL,
     "validate every N steps, and at the last"},
    {'m', "val-steps", OPT_COUNT, OF_RUN, AT(val_steps), "N", 0, 1e12, NULL,
     "batches of -b sequences a validation takes; 0 = all there are"},
    {'s', "sample-every", OPT_COUNT, OF_RUN, AT(sample_every), "N", 0, 1e12, NULL,
     "write a sample every N steps, and at the last"},
    {'g', "sample-len", OPT_COUNT, OF_RUN, AT(sample_len), "N", 1, 1e6, NULL,
     "tokens of a sample"},
    {'n', "checkpoint-every", OPT_COUNT, OF_RUN, AT(checkpoint_every), "N", 0, 1e12, NULL,
     "checkpoint every N steps, and at the last"},
    {0, "keep", OPT_COUNT, OF_RUN, AT(keep), "N", 0, 1e9, NULL,
     "keep the newest N checkpoints, and the best one; 0 = all"},
    {0, "early-stop", OPT_COUNT, OF_RUN, AT(early_stop), "N", 0, 1e9, NULL,
     "stop after N validations without a better one; 0 = never"},
    {0, "skip-bad-steps", OPT_FLAG, OF_RUN, AT(skip_bad_steps), NULL, 0, 0, "stop",
     "pass over a step whose loss or gradient is not finite"},
    {'a', "overfit", OPT_FLAG, OF_RUN, AT(overfit), NULL, 0, 0, "",
     "train on the first batch again and again, to see that the model can learn"},
    {0, "seed", OPT_COUNT, OF_RUN, AT(seed), "N", 0, 9e15, NULL,
     "of weights, data order, dropout and samples: same seed, same run"},
    {'h', "help", OPT_FLAG, OF_CALL, AT(help), NULL, 0, 0, "",
     "this text"},

    GROUP("Optimisation"),
    {'b', "batch", OPT_INT, OF_RUN, AT(batch), "B", 1, 1 << 20, MICRO_BATCH,
     "sequences of one micro-batch"},
    {'d', "total-batch", OPT_COUNT, OF_RUN, AT(total_batch), "TOKENS", 1, 1e12, "B*T a rank",
     "tokens of one step, a multiple of B*T and of the ranks (or groups of P ranks): the gradients of several micro-batches are summed"},
    {'l', "lr", OPT_FLOAT, OF_RUN, AT(lr), "X", 0, 10, "from the width: 2e-3 at 128, 6e-4 at 768",
     "peak learning rate"},
    {'u', "warmup", OPT_COUNT, OF_RUN, AT(warmup), "N", 0, 1e12, "steps/15, at most 2000",
     "steps of warm-up"},
    {'k', "schedule", OPT_CHOICE, OF_RUN, AT(schedule), SCHEDULE_NAMES, 0, 0, NULL,
     "of the learning rate after the warm-up"},
    {'q', "final-lr-frac", OPT_FLOAT, OF_RUN, AT(final_lr_frac), "X", 0, 1, NULL,
     "last learning rate, as a fraction of the peak"},
    {0, "cycles", OPT_INT, OF_RUN, AT(cycles), "N", 1, 1e6, NULL,
     "cosines of equal length of --schedule restarts"},
    {'c', "weight-decay", OPT_FLOAT, OF_RUN, AT(weight_decay), "X", 0, 100, NULL,
     "on every weight but norms, biases and positions"},
    {0, "beta1", OPT_FLOAT, OF_RUN, AT(beta1), "X", 0, 0.999999999, NULL,
     "AdamW: memory of the mean"},
    {0, "beta2", OPT_FLOAT, OF_RUN, AT(beta2), "X", 0, 0.999999999, NULL,
     "AdamW: memory of the square"},
    {0, "eps", OPT_FLOAT, OF_RUN, AT(eps), "X", 1e-30, 1, NULL,
     "AdamW: keeps the division finite"},
    {0, "grad-clip", OPT_FLOAT, OF_RUN, AT(grad_clip), "X", 0, 1e9, NULL,
     "largest norm of the gradient; 0 = any"},
    {0, "dropout", OPT_FLOAT, OF_RUN, AT(dropout), "P", 0, 0.99, NULL,
     "share dropped of the embedding and of each residual addition"},

    GROUP("Model"),
    {'e', "model", OPT_TEXT, OF_CALL, AT(model), "WHAT", 0, 0, "the small one below",
     "d6, d12, d24... (GPT-2's family: depth N, width 64N), a config.json, or a checkpoint folder to start from"},
    {0, "layers", OPT_INT, OF_MODEL, AT(config.num_hidden_layers), "L", 0, 0, NULL,
     "layers"},
    {0, "width", OPT_INT, OF_MODEL, AT(config.hidden_size), "C", 0, 0, NULL,
     "channels of a token"},
    {0, "heads", OPT_INT, OF_MODEL, AT(config.num_attention_heads), "H", 0, 0, NULL,
     "query heads"},
    {0, "kv-heads", OPT_INT, OF_MODEL, AT(config.num_key_value_heads), "KV", 1, 1 << 16, "2; --heads if that is given",
     "key and value heads; H/KV heads share one and choose their blocks together"},
    {0, "head-dim", OPT_INT, OF_MODEL, AT(config.head_dim), "D", 1, 1 << 16, "C/H",
     "width of a query and of a key"},
    {0, "v-head-dim", OPT_INT, OF_MODEL, AT(config.v_head_dim), "DV", 1, 1 << 16, "D",
     "width of a value"},
    {0, "ffn-width", OPT_INT, OF_MODEL, AT(config.intermediate_size), "F", 1, 1 << 24, "8C/3, a multiple of 64",
     "hidden width of the SwiGLU"},
    {0, "rope-theta", OPT_FLOAT, OF_MODEL, AT(config.rope_theta), "X", 0, 0, NULL,
     "base of the rotary positions; larger for longer contexts"},
    {0, "untied-head", OPT_FLAG, OF_MODEL, AT(untied_head), NULL, 0, 0, "",
     "give the output its own matrix instead of the embedding's"},
    {0, "dtype", OPT_CHOICE, OF_MODEL, AT(dtype), "f32|bf16", 0, 0, "f32; -e FOLDER its own",
     "of the weights in checkpoints, and of the GPU's activations (on the CPU all arithmetic is f32)"},
    {0, "stochastic-rounding", OPT_FLAG, OF_RUN, AT(stochastic_rounding), NULL, 0, 0, NULL,
     "the GPU's bf16 copy of the weights goes up or down by chance instead of to the nearest"},

    GROUP("Attention"),
    {0, "attention", OPT_CHOICE, OF_MODEL, AT(config.attention), ATTENTION_NAMES, 0, 0, NULL,
     "sparse or dense"},
    {0, "full-layers", OPT_LAYERS, OF_MODEL, AT(config.full_layer), "0,5", 0, 0, "none",
     "layers of an NSA model that stay dense, counted from 0"},
    {0, "preset", OPT_CHOICE, OF_MODEL, AT(preset), PRESET_NAMES, 0, 0, "short; -e dN paper",
     "the next five at once"},
    {0, "cmp-block", OPT_INT, OF_MODEL, AT(config.cmp_block), "l", 0, 0, NULL,
     "tokens squeezed into one (32, 16, 32, 64)"},
    {0, "cmp-stride", OPT_INT, OF_MODEL, AT(config.cmp_stride), "d", 0, 0, NULL,
     "from one such block to the next (16, 16, 32, 64)"},
    {0, "sel-block", OPT_INT, OF_MODEL, AT(config.sel_block), "l'", 0, 0, NULL,
     "tokens of a selected block (64, 16, 32, 64)"},
    {0, "sel-blocks", OPT_INT, OF_MODEL, AT(config.sel_blocks), "n", 0, 0, NULL,
     "blocks a query selects, with those always taken (16, 5, 7, 11)"},
    {0, "window", OPT_INT, OF_MODEL, AT(config.window), "w", 0, 0, NULL,
     "last tokens always seen (512, 64, 128, 256)"},
    {0, "sel-init", OPT_INT, OF_MODEL, AT(config.sel_init_blocks), "N", 0, 0, NULL,
     "first blocks always taken"},
    {0, "sel-local", OPT_INT, OF_MODEL, AT(config.sel_local_blocks), "N", 0, 0, NULL,
     "last blocks always taken"},
    {0, "compress", OPT_CHOICE, OF_MODEL, AT(config.compress), compress_names, 0, 0, NULL,
     "how a block becomes one token"},
    {0, "gate", OPT_CHOICE, OF_MODEL, AT(config.gate), GATE_NAMES, 0, 0, NULL,
     "what weighs the branches"},
    {0, "gate-init", OPT_TRIPLE, OF_CALL, AT(gate_init), "C,S,W", 0, 0, NULL,
     "biases the gates of compression, selection and window start from"},

    GROUP("Mixture of experts"),
    {0, "experts", OPT_INT, OF_MODEL, AT(config.num_experts), "E", 0, 0, NULL,
     "routed experts of a layer; 0 = a dense FFN"},
    {0, "shared-experts", OPT_INT, OF_MODEL, AT(config.num_shared_experts), "S", 0, 0, NULL,
     "experts that every token takes"},
    {0, "experts-per-token", OPT_INT, OF_MODEL, AT(config.num_experts_per_tok), "K", 1, 1 << 16, "2",
     "routed experts a token takes"},
    {0, "expert-width", OPT_INT, OF_MODEL, AT(config.moe_intermediate_size), "FE", 1, 1 << 20, "F/(K+S), a multiple of 32",
     "hidden width of one expert"},
    {0, "dense-layers", OPT_INT, OF_MODEL, AT(config.first_dense_layers), "M", 0, 0, NULL,
     "first layers that keep a dense FFN"},
    {0, "capacity-factor", OPT_FLOAT, OF_MODEL, AT(config.capacity_factor), "X", 0, 0, NULL,
     "in training an expert takes X times its fair share of tokens at most; 0 = any"},
    {0, "z-loss", OPT_FLOAT, OF_MODEL, AT(config.z_loss_coef), "X", 0, 0, NULL,
     "keeps the router's logits small"},
    {0, "balance-loss", OPT_FLOAT, OF_MODEL, AT(config.balance_loss_coef), "X", 0, 0, NULL,
     "keeps the experts equally busy"},

    GROUP("Machine"),
    {0, "threads", OPT_INT, OF_CALL, AT(threads), "N", 0, 4096, "all",
     "threads to compute with"},
    {'r', "recompute", OPT_INT, OF_RUN, AT(recompute), "N", 0, 2, NULL,
     "compute again in the backward pass instead of keeping: 1 the FFNs, 2 whole layers"},
    {'z', "zero", OPT_INT, OF_CALL, AT(zero), "N", 0, 1, NULL,
     "1 shards the state of AdamW over the ranks; a run goes on with any number of them"},
    {0, "context-parallel", OPT_INT, OF_CALL, AT(context_parallel), "P", 1, 1 << 16, NULL,
     "ranks that share each sequence, for contexts longer than the memory of one; P divides the ranks, 2P divides -t"},
    {0, "init", OPT_TEXT, OF_CALL, AT(init), "HOW", 0, 0, "mpi, under mpirun",
     "how several ranks find each other: mpi, file:PATH that all see, or tcp:HOST:PORT of rank 0"},
    {0, "timeout", OPT_FLOAT, OF_CALL, AT(timeout), "SECONDS", 1, 1e6, NULL,
     "how long a rank may be silent before the run ends; ten times as long until the first step is done"},

    GROUP("Plan"),
    {0, "plan", OPT_FLAG, OF_CALL, AT(plan), NULL, 0, 0, "",
     "print what a run with these options would take on each rank, and exit: memory, communication, time of a step"},
    {0, "ranks", OPT_INT, OF_CALL, AT(ranks), "N", 1, 1 << 16, NULL,
     "of the run that is planned"},
    {0, "tflops", OPT_FLOAT, OF_CALL, AT(tflops), "X", 1e-6, 1e6, NULL,
     "TFLOP/s that a rank reaches in a training step"},
    {0, "link", OPT_FLOAT, OF_CALL, AT(link), "GB/S", 1e-6, 1e6, NULL,
     "speed of an all-reduce between the ranks: for each, 2(N-1)/N of the bytes by the time"},
};
#undef AT
#undef GROUP
enum { TRAIN_OPTIONS = sizeof train_options / sizeof train_options[0] };

// Whether the option whose value is the field `at` of *o was on the command line.
static inline int option_given(const Options *o, const void *at) {
    return o->given[option_row(train_options, TRAIN_OPTIONS, (size_t)((const char *)at - (const char *)o))];
}

void train_help(void) {
    Options defaults = options_default();
    const char *p = program_name;
    printf("%s: train a GPT with Native Sparse Attention\n\n"
           "usage: ./%s [options]     without options: a small model, built-in tales\n\n"
           "examples\n"
           "  ./%s -i book.txt                          on your own text, as bytes\n"
           "  ./%s -i book.txt -x 5000 --width 256      a larger model, for longer\n"
           "  ./%s -y                                   continue the newest run\n"
           "  ./%s -i \"tok/*.bin\" -e d12 -t 8k -d 512k  124M parameters on tokens\n"
           "  ./%s -e out/run_001 -j test.txt -x 0      the loss of a model on a text\n"
           "  ./%s --attention full                     the dense twin, to compare\n",
           p, p, p, p, p, p, p, p);
    options_help(train_options, TRAIN_OPTIONS, &defaults);
    printf("\nIn brackets: the default. Whole numbers take k, m, g (1024, 1024^2, 1024^3).\n"
           "Long options take --name value or --name=value. What is given beats --preset\n"
           "and -e dN, in any order.\n");
}

// The model's shape: where it starts from, then --preset, then every option given.
// `from` is the shape of the file that -e or -y names, NULL: none.
void config_from_options(Config *c, const Options *o, const Config *from) {
    int depth = o->model ? model_depth(o->model) : 0;
    *c = from ? *from : config_default();
    if (!from) {
        if (option_given(o, &o->config.attention)) c->attention = o->config.attention;
        if (depth) config_depth(c, depth);
        else if (option_given(o, &o->config.num_attention_heads)) c->num_key_value_heads = 0;
    }
    if (option_given(o, &o->preset)) config_preset(c, o->preset);
    for (int i = 0; i < CONFIG_KEYS; i++) {
        const ConfigKey *key = &config_keys[i];
        size_t offset = offsetof(Options, config) + key->offset;
        int row = option_row(train_options, TRAIN_OPTIONS, offset);
        if (row >= 0 && o->given[row]) memcpy((char *)c + key->offset, (const char *)o + offset, config_key_size(key));
    }
    if (option_given(o, &o->untied_head)) c->tie_word_embeddings = !o->untied_head;
    if (option_given(o, &o->dtype)) c->torch_dtype = o->dtype;
    if (o->seq_len) c->max_position_embeddings = o->seq_len;
    config_complete(c);
}

// ----------------------------------------------------------------------------
// 4. Data: Unicode tables
// Byte-level BPE cuts text into words by Unicode category before it merges bytes, and Qwen's
// tokenizers normalise it first (NFC), so both need tables. To agree with Hugging Face `tokenizers`
// they take its versions: categories of Unicode 16.0, normal forms of Unicode 9.0.

// Made by dev/unicode_tables.py from Unicode 16.0.0.
const char unicode_letters[] =
    "f%<)<S#-#'#(9$B$h2'.1'*#$#j''$$%&$#)#$%$#$6$w%$s'+p($I%#)Ll%='&QNG$$i&$#2$*$-%%#3#$AA}%.#;D,$'#(8'#,#&#:;*-(:$(4"
    "M_Y&#5#*,22'*%$%8$)$#&&&#3#0$$%1$-#+('$%8$)$$$$$$C&$#6%3+$%$8$)$$$'&#5#2$:#.*%$%8$)$$$'&#B$$%2#4#$(&%$&&$$#$$&$&"
    "%&.9#X*$%$9$2&#=%%#%$B#'*$%$9$,$'&#C$$$2$4+$%$L%#3#(%+%;((4&:$+$#%)_S$$/)_$$#$'$:$#$,$$,#%'$#8&D#d%*$G>'z&N7#3('"
    "&&#&$*%'//#4I$#(#%N$c.$&%)$#$&%L$&%D$&%)$#$&%1$]$&%g%I23z%%(&t7%3$<(o%)**405141/$%2WG#'#h%}%*'%E$#(j%-BUA%'.O'<Z"
    "9,Xw%#d&R4*ZA0$-O=GM%-G%-(N%%M&$($$&#(l)e%h,%(%I%(%*$#$#$#$B%X$)$#&%$)&&%('/(%$){&#0#3/l&#'#%,$#&')#$#$#$&$-%&('"
    "'#X$n~%s*)&&$/I$#(#%[*#39,)$)$)$)$)$)$)$)u%#t2$N'($'z%)%$~%$&(N$d&4CT2c4vj*e%qs;h%Q%}+&2-$7R3B%j%U+%m&%g%%$$#$*8"
    "2$%$&$9AW1Uc%(&#$$.>-9<@*R@#3'$,-'$L:%$*79&#&U$#&$%'%#$#;%%-*%/(%(%(,)$)$N$0)y&Alm//9'Twl,f/%p&J)/'(#$,$/$'$#$$$"
    "$$r&Ec/5d%%YL.{&'$o'H<)<.}%&(%(%(%%G.$<$5$$$1%0Fc'~/@&TSC06$*)I-A%G'*Th(5G'G'K+W/-$1$)$$$-$1$)$$&W/k-,8-*;($M$+j"
    "%(%#$O$$&#%9-9,Bf%5$$-8-<k%[)$e%#2&$%$@N@&@G*$>>Y-8-504u&m%[V0V0GJ>,9k+M)$3%`@-#+8N4R7>9/X^$%#0PD;=GA#%#+F&#/S1&"
    "8#$#G4$;6$d%)$#$&$1$,*RJ*%$%8$)$$$'&#5#/'B,$#%#$I$#<#$#PX5&7%BS7$$#e)RM&HS7#`N0#l%=I)f)O{&d%C*%#%*$$$:2#$#e&*%J3"
    "#$#@#-K*#8#.Q6#5m%t)DC+$H4#UAw&)$$$I8#<($$$C1#|-52#$/$Ee'#t%vBu*p){|%g&2vG4(<en'(m6bs*Aw_}5*B4s%4A5S3&C7(5m1Pb*d"
    "%i'o%(#g%/e%$$#@py)+hMM,z|,&$)$$$u,2#A%%#1&+f0}q%q&(/&+*,ut)y%$k%$$%#%$%&$.$#$)$e%$&%*$)$>$&$'$#&)$j.%;$;$B$;$B$"
    ";$B$;$B$;$*ob%B)(v+b%{'P-)3#v-A5Oe3>s*A%#p3)$&$$$1$q)`h%*#eL&$=$$$#%#$,$&$#$#)#'#$#$#$%$$$#%#$#$#$#$#$$$#%&$)$&$"
    "&$#$,$3(%$'$3k|'~nSDns')l*%bm)1cj+2v7gw%b5gVso((vt'";
const char unicode_numbers[] =
    "T,a'$(#%%bT,o',s),w0,}&,'(s&,}&,}&,%(u&/z&,+)n&,o&)*5t&,g&,}&,k%6}+,k%,~:6lA%~*,),9,a-,i'-p(,),c),{%,o',),{F#&()"
    ",s)V%'g;`s%8a8AfR#|<#<+1%n.&s',B*$1D,K1qyD,i),u-(e(,J,s),9,{%,q0,at:,n3P/]4$l.=H&A#+#o''w),mC*<)K+p%'9(k($%2%Qe%"
    "+X$B%p%'o&*;*M)a.(T,),i,Bi(,N&w&)o'Ai',a%,y',*6l+,m.,}&,o/,m&,)6q%.a15d&,c9,{%@r*,k%,c1,m&7rGu&ni4,cs%,{%,o',$)q"
    "4,w+9dz=,iU6/6s&;~HU}s%,c1,w3,h+,{:+i',l=_$%$&q%P$1cD/|c&,";
const char unicode_combining[] =
    "s<7u*##w*#&k*##w*##g*#'k*#$w)#&k*#$w)#-k*#'$#&k*#*u*##a+##u*#%k*#%u*#$k*$%u*#&k*##u*##w*#$k*##u*##x*#$y*##x*#$y*"
    "##x*#/u*f,'u*z+#k*#&u*##k*#%u*##m*##k*#(u*#(k*#$u*##k*#$u*##m*##s*##u*##-##.##/##0##1##2##3##4##5#$6##7##8##9$#:"
    "$#;##<$#u*##k*$#5m%*u*##B##C##DT#>##@##A##B##C##D##E##F#$u*#$k*#'u*##k*#$u*##k*3#Gl&)u*%&u*##k*##u*%$u*$#k*#$u*#"
    "#k*G#HB#u*##k*#$u*##k*#$u*#%k*##u*#$k*##u*##k*#%u*##k*##u*##k*##u*##k*##u*##k*#$u*k()u*##k*##u*F&u*$+u*$%u*$'u*O"
    "%k*a'0u*$#k*#$u*##k*#$u*##k*#%u*#%k*##>##@##A#%u*##k*#$u*#$k*#'u*a%#*3#,&#u*##k*#$u*n&#*3#,u&#*3#,u&#*3#,u&#*3#,"
    "h'#,h'#,*#y%##b&l&#*3#,h'#,e'#,t&$n&##,0&r&s&$}&1&c'q%$k*>#k*$#k*$#g*[#j'##k'$#m'(&k'%#k'$$u*##,$$u*c%#k*w&#*$$,"
    "w%#k*~:%u*sC#,C#,h(#,-#u*x)#s*x'#m*##u*##k*j*#u*##k*l%#,7*u*%#k*T'u*#(k*#$u*##k*}&#*2#,J#u*##k*#)u*Z$,_#*.$,h%#*"
    "c(%u*$#$#'k*#$u*#&k*##u*$)$'#k*)#u*&$u*s)$u*##k*#)u*##k*#$u*##y*##e*##k*##w)#Hu*(#u*##x*##k*##u*##k*a;$u*#$$#&u*"
    "#%$#$u*'#u*&$$##u*##k*##u*#$$#&k*##u*km&%u*v'#,g&Cu*o5#i*##s*##w*##m*#$o*p&$+opE#u*',u*D$u*u%$u*g,#,j)#,>4u*^%k*"
    "I#,f&#*/#,~*#u*$$u*##k*%$u*($u*$#u*X#,g+#,wp9#=t<)u*#)k*#$u*nD#k*q*#k*~''u*c]#k*$#u*L#u*##$##k*'#,p(#u*##k*zQ#,]"
    "#,^#,##*j%%u*T$,c%#*q%#,,#*q&#,##*}(#*##,v%#*3#,;)u*&'u*z)#,&#*d'#,##*l+#,##*g'#,}&#,##*z&#,jO#,ol9'$`)u*te:#$i|"
    "($g*#%$&#q*#'g*+*k*%'u*#$k*B&u*}'%u*f|&)u*$3u*%)u*$$u*$'u*xn%)k*t&(u*##*";
const char unicode_decompositions[] =
    "y%iW$s'b'u|<v|<i&n&c%Q6+a'f'/a%cPlO^,+&]eu0vg-{l9rz<ke*pd&tg%d]%o%M9a~w+fst&pz|'kor+%z}p+li&bi%nP%esd(prd(or'iFe"
    "na(bb~'pu({m&fm&%cr'hEco%fs('om&sla(7)hfa(Lf>sfa(~da(%eFob~'kes&%|~p+aaq+z~p+lq(+%si%mj%vh%yi%m)k'&$#$$#8$#>$#*$"
    "#b%%'C$'&$#$$#8$#*$+&$#$$#8$#*%->$%&$#$$#8$#>$#*&/&$#$$#8$#*$+$&3&$#$$#8$#>$#*$#b%%'C$'&$#$$#8$#*$+&$#$$#8$#*%->"
    "$%&$#$$#8$#>$#*&/&$#$$#8$#*$+$%#*$v&2$e%2$d%:$e%:$d%Y$e%Y$`$$e%$$d%8$e%8$d%.$e%.$d%6$e%6$b%6$e%6&b%2$e%2$d%:$e%:"
    "$d%.$e%.$d%Y$e%Y$d%6$e%6$`8$e%8$d%:$e%:$d%.$e%.$d%C$e%C$b%8$e%8&b%>$e%>$d%2$e%2$d%:$e%:$d%Y$e%Y$d%.'%8$e%8$b%C$e"
    "%C%b%$$e%$$d%C$e%C$d%6$e%6(`$$e%$$d%C$e%C$d%6$e%6'b%2$e%2$d%:$e%:$d%d%$e%d%&^$$e%$$d%C$e%C$d%6$e%6$b%$$e%$$d%8$e"
    "%8$d%C$e%C$d%6$e%6$b%C$e%C$d%6$e%6&b%>$e%>$d%2$e%2$d%:$e%:$d%b%$e%b%$d%d%$e%d%$d%Y$e%Y$`8$e%8$`8$e%8$d%*$%$$e%$$"
    "d%.$e%.$d%6$e%6Fz%h%$e%h%1Wh%$e%h%An&6$e%6$S6$e%6$W6$e%6$W6$e%6${)2$e%2$d%$$e%$$d%6$e%6$d%&$e%&%v&2$e%2$o82$%2$p"
    ":2$e%2&r-6$e%6$[6$e%6$[Y$e%Y$i<2$%2$n&6$s16$xH6'j%$$e%$&U&$e%&$y($$e%$$b%$$e%$$>$$e%$$f/K$e%K$d%O$e%O$[K$e%K$d%O"
    "$e%O$[K$e%K$d%O$e%O$WK$e%K$d%O$e%O$^K$e%K$d%O$e%O$^K$e%K$d%O$e%O$h%j%$e%j%$b%j%$e%j%&|%6$e%6*r%.$e%.$[C$e%C$q*2$"
    "e%2$f%2$e%2$b..$e%.$yA2$%2$jC2$e%2~+eO#$%#%H#$8%Th(#-pN#*i*$$uU$$tT#$}T$$'$$'$%/$%/$$+$$g%$=h&*$;*$;$$+$$'$$'$$H"
    "$=G*$;*$.$$/$$+$(5$$#*Po'&$#*%&$'<*(L$$&&$9:.8:De%::(&$#*%&$'k%*([$$&&$9:;i&K$%Ko%j):$e%:1p%:$e%:$d%*$e%*&Y:$e%:"
    "&{-*$%*$~/*$e%*$b%*$e%*&b%2$e%2$d%*$e%*$W*$e%*&k.*$%*$p/*$e%*$x%2$e%2$d%*$e%*$d%d%$e%d%$[*$e%*&[*$e%*|,wC|&$#`$g"
    "%`$f%~&$k%`e(i,`%K`4F`}6{KU+3U&)UH`V$%V$%V$-V$-V$%V$5V$+Vs&e-l($#p(3p%y%$%y%%=y%y%w+_&/_Gh%_$%_$-_&B_y*}5r'&#n'$"
    "#t'3p%g&$%g&[o*x&Zo&p&$%p&$$x&e'q+b'a'c+p%*1p%$#l'%#j'$+p%h'i+h&$%h&$$v'w'y,v&%#n($)v&$(r(|.c;]-7](-](-](-]0Ym&-"
    "i&a(%#e($k'w%%%w%,l'w%5g%]-7](-](-](-]0Ym&t&},z&yc&sf)S%'S%'S%'S%'S'+SMw%S%'S&'S$%S%)Sl:zk2~%$e%~%$b%.$e%.$d%4$e"
    "%4$d%G$e%G$w)$$e%$$z-.$e%.$d%4$e%4$d%G$e%G$d%C$e%C$d%Q$e%Q$s.&$%&$$$$%$$v0Q$e%Q$d%f%$e%f%$cB:$%:$fD.$e%.$b%2$e%2"
    "$b%.$e%.$d%4$e%4$d%*$e%*$d%C$e%C$d%d&$e%d&$b%f%$e%f%$y)$$e%$$|-$$e%$$d%4$e%4$d%G$e%G$b%4$e%4$m}32$%2$ra4G$e%G$d%"
    "Q$e%Q$b%$$e%$$d%.$e%.$d%4$e%4$b%.$e%.$d%4$e%4$d%G$e%G$d%Q$e%Q${)$$e%$$d%*$e%*$y(&$%&$$$$%$$z3$$e%$$d%.$e%.$`.$e%"
    ".$d%4$e%4$ma42$%2$rc4G$e%G$b%.$e%.$d%4$e%4$m2.$%.$-.$%.$ap3.$%.$~c4.$e%.$d%4$e%4$d%G$e%G$d%Q$e%Q$b%|%$e%|%$d%f%$"
    "e%f%$d%Q$e%Q$g3$$%$$%*$%*$n5>$e%>$d%4$e%4$b%&$e%&$d%$$e%$$d%*$e%*$d%.$e%.$d%4$e%4$b%.$e%.$d%*$e%*$b%.$e%.$b%8$e%"
    "8$d%4$e%4$d%G$e%G$GG$;*$)b%$'b%%o4.(f84$e%4$d%A$e%A$o)$$e%$$d%&$e%&$d%A$e%A$d%>$e%>$s|38$%8$pz3$$%$$$&$%&$$A$%A$"
    "$>$%>$mz3:$%:$di44$e%4$d%A$e%A$d%>$e%>$w)$$e%$$d%&$e%&$d%A$e%A$d%>$e%>$u}38$%8$nj4A$e%A$d%4$e%4$W4$e%4$d%A$e%A$w"
    ")$$e%$$d%&$e%&$d%A$e%A$d%>$e%>$k~38$%8$|r3$$%$$$&$%&$$A$%A$$>$%>$$4$%4$d94$e%4$d%A$e%A$}7$$%$$$&$%&$$A$%A$$>$%>$"
    "$4$%4$z9&$e%&$d%4$e%4$d%A$e%A$d%>$e%>*}ZM$#I$cq2&$%&$$$$%$$$<$%<$hs2M$#I$ws2&$%&$$$$%$$$<$%<$lq2M$#I${q2&$%&$$$$"
    "%$&bt2M$#I$qt2&$%&$$$$%$&jr2M$#I$yr2&$%&$$$$%$$$<$%<$~t2M$#I$ou2&$%&$$$$%$$$<$%<$hs2M$#I$ws2&$%&$$$$%$$$<$%<$|u2"
    "M$#I$mv2&$%&$$$$%$$$<$%<$|s2M$#I$mt2&$%&$$$$%$&rv2M$#I$cw2&$%&$$$$%$&rt2M$#I$cu2&$%&$$$$%$$$<$%<%hw2I%yw2&%#$%#<"
    "$lu2M$#I${u2&$%&$$$$%$$$<$%<$bx2M$#I$qx2&$%&$$$$%$$$<$%<$bx2&$,#$5&$2#$7&$4#$9&$6#$D&$=#$0&$3#$*&$-#&eo2($%($%($"
    "%($%($%($%($%($%($%($%($%($%($%($%($%($F($%($%($%($%($%($%($%($%($%($%($%($%($%($%($%($i&($%($%($%($%($%($%($%($"
    "%($%($%($%($%($%($%($%($nx2:$#2$qx2($px2($,(%-<$g}2($ja3:$#2$#&$8#$9(%u%#&jX<$sp4($lx2($4(%5<${}2($db3&$<#$B&$>#"
    "$@($qa3&$#$$#<$h}2:$#2$F&$z&#&w%<$F<$h&:$#2$#&$A#%sf3&$#$$#<$tb3:$#2$/&$Y#$FM$#I$+<$/<$p%:$#2$#&$Q#$JI$vV&${T#$t"
    "Y#&}u4($vw2($-(%,<${a3($td3&$I#$_&$W#$X($nV#&iy4#$%#x,zd3#'n^#$e+#v&ut50$'06'0Ca'0$+0$&0Yi&0(-0&)0;T0%'0>R0&10&'"
    "0%)0:~k60%um60.K0$ll60$'0$ym60$%0&=0$%0&)0$%0*)0$%0&10$%0&)0$%0GZ0$/0$%0$'0Ud&0$%0$L0$%0*e%0$%0$%0$%0a%mr*#$%#uf"
    "%h}%1mRuc&,%',%',%',%',%',%',%',%',%',%',%',&),%',%',*1,$#W%),$#W%),$#W%),$#W%),$#W:p&,-y(,1@,%',%',%',%',%',%',"
    "%',%',%',%',%',&),%',%',*1,$#W%),$#W%),$#W%),$#W%),$#W:p&,&{',$%,$%,$%,'9,w{]c}W#$bh8#${t9#$hF#$lb4#$vq5#$ih&#$g"
    "cO#$##$t~K#$ieD#$|iF#$ce%#$e}'#$at.#$of(#$yy&#$i<#$g8#$qj'#$||8#${X#${d%#$qW#$mj,#${o*#$qz'#$l|N#$oy%#$cm0#$ab'#"
    "$qm.#$ss0#$~zH#$qr-#$on/#$ib%#$z}8#$cu4#$er&#$lp:#$uv'#$}r&#$cf&#$}}3#$deI#$mI#$u6#$of-#$mn&#$qd'#$sw%#$kf(#$wm&"
    "#$w(#$ij'#$ci(#$km%#$mO#$xi8#$g3#$ok%#$ep&#$}t+#$}p)#$pf.#$vm@#${o&#$cv3#$ik%#$xa+#$kt&#$yk.#$gy(#$fkG#$ma%#$ux*"
    "#$oe%#$s7#$cb+#$s4#$}u0#$plJ#$ka=#$vq=#$C#$a}9#$ac%#$yp&#$aq-#$~g)#$ne:#${c'#$}w5#$drF#$ox*#$el%#$cc.#$sD#$fq6#$"
    "uq8#$vn:#$sb,#$pa-#$wo4#$bf'#${n0#$bq:#$ss%#${m4#$uq*#${s&#$~r4#$wn7#$~~6#$xm(#$oe5#$tx4#$id-#$va9#$sR#$m)#$w|/#"
    "$es.#$me&#$ex'#$i~&#$twG#$g9#$s}%#$md&#${{&#$oy(#$qg(#$sg3#${u%#$il%#$u&#$nkO#$go.#$cu%#$an7#$bz>#$cY#$o*#$mP#$y"
    "~(#$uH#$o[#$u~%#$cl%#$kN#$el+#$ly(#$il)#$yY#$vcI#$k,#${G#$s}2#$gt0#$qD#$z};#$a7#$ea%#$}t'#$um,#$|~'#$by7#$}r'#$e"
    "y%#$eC#$uL#$ie.#$g/#$al)#$o.#$ag-#$gv%#$o(#${0#$fiM#$e~:#$au0#$sz%#$zsB#$hn-#$wK#$cj)#$m(#$sj(#$ip%#$cn'#$aq%#$k"
    "l+#$iq)#$er+#$dnD#$gd>#$noJ#$o|.#$a+#$qa&#$e:#$sc&#$m9#$mX#$it%#$aq2#$vkL#$}p,#$mwA#$x~K#$uk*#$ar,#$o|5#$vc>#$mA"
    "#$o{&#$gp)#$i|6#$v{J#$mD#$iw'#$gp(#$a8#$c:#$km%#$ub'#$wC#$un(#$kj(#$H#$gc(#$y{%#$joJ#$at2#$fe2#${{3#$oS#$u{,#$ko"
    ",#$kh&#$}J#$fjC#${p&#$in.#$lb'#$u(#$u;#$rr(#$vH#$og2#$doF#$kzA#$~z>#$l&#$mf*#$il%#$}x1#$r}5#$ka-#$nt&#$ub:#$j}&#"
    "$a~*#$vh*#$bj;#$tv*#$yq%#&mP#%ua+#&jv.#$i}5#${b%#$wM#$i%#$1#$y%#$g}3#$zd2#$eW#%cs&#%sx%#&s~%#$e0#'sp'#$=#$}%#$sr"
    "%#$bj*#$yj&#$jmL#${7#$y)#$k<#$Z#$i*#$gK#$a*#$q)#$oC#$})#$wd%#$7#$yk%#$e1#$q%#$u)#$m^#$y,#$u.#$kE#$my%#${-#$s4#$g"
    "K#$s/#$qE#$up%#$q.#$9#$$#$3#$/#$1#$g&#$%#${.#$k'#$i8#$sI#$N#$w&#$k7#$y,#$qD#$k,#$##${C#$su%#$}+#$g;#$w&#$k>#$q&#"
    "$wQ#$u+#$yx&#$}5#$a'#$zvC#$goe,#$dkp+#&pqA#$wa%#$d(#$pD#$gB#$}&#$y8#$m&#$aQ#$x'#$q'#${'#$eN#$}(#$u,#$D#$a5#$g0#$"
    "qc%#$1#$s,#$q'#$}6#${*#$t'#$}+#$b&#$w,#$m'#$u=#${(#$s&#$k4#$c6#${-#$+#$}&#$sk%#$k'#$c=#$k>#$C#$y(#$y3#$m9#$gq&#$"
    "|c&#$e+#$g+#$y8#$},#$q&#$c2#$'#$m.#$F#$V#$w(#$6#$m=#$kD#$c5#$o/#$}1#$g-#$a9#$i0#$k]#$o-#$ma%#$mB#$s'#$D#$y6#$y&#"
    "$~%#$s&#$(#$E#$c(#$m(#$o<#$kI#$}7#$u6#$w1#$ui%#${)#$u*#${+#$m%#$;#$g&#$oT#$or%#$wln*#$.#$mr)#$jzq,#$oq%#$g%#$mqb"
    "-#$u~(#$ok6#$pyc,#$a(#i%hn|%g(%Vo&.4s&$#u&$wrt's&$#u&$ltt'o&$#i($#F$%F$%F$%F$%F$%F$%F%'F$%F$%F$%F$%F%'F%'F$%F%'F"
    "$%F%'F$%F$%F$%F$%F$Mk($*{%$7{%$5{%wb)yvb(n%%'n%27n%l'k,b&$%b&a5qGp'$#x'h/u;f'$#d'%#h'm+a4j&$%j&flYawq&m%$%m%$1s%"
    "$#u%$#{'$#}'$#c(|%a)m%$%m%$%s%$%s%$$u%$%u%}ux%hnk*#$,#$5#$}lh+#$xwg+#$g(#$=#$w'#$a+#$c%#$g(#$S#$db3#$m{y+#$zqi+#"
    "$1#$D#$J#$azh+#$pfy+#$oj3#$q%#$u{h+#$~zh+#$=#$pT#$cU#$5#$gx|-#$|s|-#$@#$jr3#$cv3#$9#$}%#$-#$nv3#$y{3#$'#$Z#$P#$9"
    "#$%#$F#$k&#$3#$5#$V#$7#$'#$##$##$wqj+#$xcx*#$|i3#$N#$cbk+#$hak+#$/#$N#$e-#$x)#$D#$e%#${&#$s(#$X#$o'#$D#$g%#$##$N"
    "#$H#$3#$B#$u9#$d5#$g5#$f0#$k%#$pp%#$y|&#$f6#$q%#$V#$t+#$e.#$$#$g+#$kvm+#$tqm+#$-#$B#$L#$3#$i'#$kjn+#$m'#$pen+#$e"
    "&#$;#$h(#$o,#$jf7#$@#$gp7#$s&#$##$}ao+#$bwn+#$N#$B#$;#$ilo+#$nko+#$1#$k]#$nZ#$dz7#$i~7#$@#$o(#$l&#$wsp+#$rgp+#$w"
    "gp+#$zdp+#$(#$F#$w)#$%#$ln8#$gp8#${%#$N#$}%#$~s8#$yhi,#$bgi,#$aw8#$)#$)#$L#$ama.#$pia.#$qhr+#$##$~j|*#$dz6#$##$r"
    "y8#$wyr,#$my=#$huw,#$5#$r|8#$wa9#$m&#$7#$i%#$c,#$jk9#$`#$sn9#$qms+#$djs+#$s+#$+#$'#$&#$c&#$L#$m%#$>#$9#$e&#$L#$+"
    "#$X#$9#$m'#$s(#$k%#$i+#${ht+#$djt+#$j'#$g*#$Z#$o)#$int+#$djt+#$f)#$[#$|r:#$wa;#$N#$c%#$p%#$p|:#$}l;#$_#$c|u+#$dt"
    "u+#$o5#$t.#$br;#${v;#$~w;#$l%#$c|/#$)#$qf/#$t)#${y1#$dsF#$ob7#$+#$/#$c'#$8#$e}v+#$v~q,#$wm<#$x*#$u0#$m&#$ctv+#$n"
    "sv+#$l*#$k3#$|z<#$a~<#$o)#$w'#$u/#$kuv+#$|qv+#$bs=#$ww=#$uqw+#$hnw+#$pw=#$qy=#$a&#$Z#$%#$yix+#$rx3#${a4#$hgx+#$i"
    "gy+#$v}x+#$@#$x)#$u.#$u%#$y&#$r&#$u%#$B#$=#$cwx+#$n|x+#$w3#$g'#$fa@#$mg@#$*#$s~x+#$jny+#${;#${|x+#$g&#$fzx+#$u*#"
    "$Y#$(#$fw@#$kz@#$m&#$.#$s&#$}cu*#$xwt*#$asy+#$fmy+#$cez+#$vyy+#$=#$Z#$mc{+#$f~z+#$N#${r{+#${1#$nr{+#$F#$jcB#$ceB"
    "#$hdB#$##$coB#$N#$N#$L#$s'#$fqB#$gwB#$s~|+#$z||+#$ae}+#$ta}+#$urd+#$~gd+#$gm~+#$R#$k,#$~pa-#$;#$khC#$qt~+#$$#$s%"
    "#$X#$~u~+#$%#$##${%#$xjC#$eoC#$hnC#$k(#$mlc-#$nua,#$e'#$i'#$fyC#$ald-#$rhb,#$kpb,#${%#$lob,#$e)#$hiD#$}nD#$7#$-#"
    "$}rc,#$}6#$##$h|c,#$nlD#$c{f-#$fad,#$)#$rxD#$yhg-#$p{c,#$fdE#$ueE#$,#$_#$cpe,#$nie,#$lgE#$cnE#$}&#$o'#$bsE#$m{i-"
    "#$c%#$~zi-#$wfj-#$p~e,#$igf,#$nef,#$w)#$9#$oyf,#${'#$hxf,#$ecg,#$bbg,#${mh+#$f|l,#$wsF#$m(#$puF#$oyF#$t|8#$ct},#"
    "$@#$vtA#$5#$fug+#$)#$ew*#$lxN#$ukG#$.#$H#$vh>#$cj>#$'#$7#$w%#$iyh,#$jyh,#$w&#$u'#$}'#$f,#$i-#$y%#$o*#$j4#$}*#$'#"
    "$D#$qyh,#$s7#$~,#$bzn-#$miH#$'#$k%#$}ml,#$vhl,#$}si,#$tbp-#$+#$ikp-#$i6#$z}p-#$q|H#$;#$9#$'#$i'#$f%#$}+#$|%#$c-#"
    "$l(#$o'#$Z#$~kI#$crI#$e%#$|qI#$ixI#$)#$gbl,#$nxk,#$1#$t|I#$q~I#$x|S#$y|~-#$i/#$tcu-#$5#$}rJ#$e(#$o-#$q0#$skm,#$z"
    "em,#$P#$a)#$e)#$men,#$xxh%#$~ef*#$A#$o&#$crf*#$zbf*#$u)#$w|p,#$Z#$jgp,#$g)#$e%#$mtp,#$vsp,#$a6#$s-#$%#$d)#$m<#$]"
    "#$ytq,#$zyp,#$lgO#$kjO#$krq,#$hv~-#$yvO#$|nD#$kuD#$a}r,#$g1#$jbc.#$3#$gbP#$uct,#$z~c.#$gjd.#$djt,#$##$a%#$k{t,#$"
    "~nt,#$xfP#$qkP#$m+#$Z#$a'#$loP#$}mg.#$dkv,#$e7#$s/#$nsQ#$c%#$oxQ#$ggx,#$|}i.#$scj.#$u4#$w+#$rnx,#$djR#$inR#$-#$1"
    "#$7#$1#$o%#$udz,#";

enum { OTHER, LETTER, NUMBER, SPACE, END };  // END: behind the last character

typedef struct { uint32_t c, a, b, excluded; } Decomposition;  // c = a followed by b (0: a alone)

unsigned char unicode_class[0x110000], unicode_ccc[0x110000];  // ccc: canonical combining class
Decomposition unicode_decomposition[2304];                     // sorted by c
Decomposition unicode_composition[2304];                       // those that compose again, sorted by a, b
int unicode_decompositions_count, unicode_compositions_count;

// One number of a table: a character below 60 is the number, a higher one its remainder modulo 30.
uint32_t table_number(const char **p) {
    int c = *(*p)++, digit = c - '#' - (c > '?') - (c > '\\');
    return digit < 60 ? (uint32_t)digit : (uint32_t)(digit - 60) + 30 * table_number(p);
}

int32_t table_signed(const char **p) {
    uint32_t n = table_number(p);
    return n & 1 ? -(int32_t)(n / 2) - 1 : (int32_t)(n / 2);
}

// Ranges: gap, length - 1 and, where value is 0, the value.
void table_ranges(unsigned char *table, const char *p, int value) {
    for (uint32_t c = 0; *p;) {
        c += table_number(&p);
        uint32_t last = c + table_number(&p);
        int v = value ? value : (int)table_number(&p);
        while (c <= last) table[c++] = (unsigned char)v;
    }
}

int compare_compositions(const void *a, const void *b) {
    const Decomposition *x = (const Decomposition *)a, *y = (const Decomposition *)b;
    if (x->a != y->a) return x->a < y->a ? -1 : 1;
    return (x->b > y->b) - (x->b < y->b);
}

int compare_decompositions(const void *a, const void *b) {
    uint32_t x = ((const Decomposition *)a)->c, y = ((const Decomposition *)b)->c;
    return (x > y) - (x < y);
}

void unicode_init(void) {
    const uint32_t spaces[] = {9, 10, 11, 12, 13, 32, 0x85, 0xa0, 0x1680, 0x2000, 0x2001, 0x2002, 0x2003, 0x2004, 0x2005, 0x2006,
                               0x2007, 0x2008, 0x2009, 0x200a, 0x2028, 0x2029, 0x202f, 0x205f, 0x3000};
    if (unicode_decompositions_count) return;
    for (size_t i = 0; i < sizeof spaces / sizeof spaces[0]; i++) unicode_class[spaces[i]] = SPACE;
    table_ranges(unicode_class, unicode_letters, LETTER);
    table_ranges(unicode_class, unicode_numbers, NUMBER);
    table_ranges(unicode_ccc, unicode_combining, 0);
    const char *p = unicode_decompositions;
    uint32_t seconds[128], c = 0, a = 0;
    int n = (int)table_number(&p), count = 0;
    for (int i = 0; i < n; i++) seconds[i] = (i ? seconds[i - 1] : 0) + (uint32_t)table_signed(&p);
    while (*p) {
        Decomposition *d = &unicode_decomposition[count++];
        d->c = c += table_number(&p);
        d->a = a += (uint32_t)table_signed(&p);
        uint32_t kind = table_number(&p);
        d->b = kind ? seconds[(kind - 1) / 2] : 0;
        d->excluded = kind ? (kind - 1) & 1 : 1;
        if (!d->excluded) unicode_composition[unicode_compositions_count++] = *d;
    }
    qsort(unicode_composition, (size_t)unicode_compositions_count, sizeof(Decomposition), compare_compositions);
    unicode_decompositions_count = count;
}

// ----------------------------------------------------------------------------
// NFC: take every character apart, sort the marks behind each base, put together what goes together.

typedef struct { uint32_t *c; int64_t n, cap; } CodePoints;

void code_points_push(CodePoints *v, uint32_t c) {
    if (v->n == v->cap) v->c = (uint32_t *)xrealloc(v->c, sizeof(uint32_t) * (size_t)(v->cap = 2 * v->cap + 64));
    v->c[v->n++] = c;
}

// Hangul syllables are arithmetic: 19 leading, 21 middle and 27 (or no) trailing letters.
enum { HANGUL = 0xac00, HANGUL_L = 0x1100, HANGUL_V = 0x1161, HANGUL_T = 0x11a7, HANGUL_COUNT = 19 * 21 * 28 };

void nfc_decompose(CodePoints *v, uint32_t c) {
    if (c >= HANGUL && c < (uint32_t)HANGUL + HANGUL_COUNT) {
        uint32_t i = c - HANGUL;
        code_points_push(v, HANGUL_L + i / (21 * 28));
        code_points_push(v, HANGUL_V + i / 28 % 21);
        if (i % 28) code_points_push(v, HANGUL_T + i % 28);
        return;
    }
    Decomposition key = {c, 0, 0, 0};
    const Decomposition *d = (const Decomposition *)bsearch(&key, unicode_decomposition, (size_t)unicode_decompositions_count,
                                                            sizeof key, compare_decompositions);
    if (!d) {
        code_points_push(v, c);
        return;
    }
    nfc_decompose(v, d->a);
    if (d->b) code_points_push(v, d->b);
}

// The character that is a followed by b, or 0.
uint32_t nfc_compose(uint32_t a, uint32_t b) {
    if (a - HANGUL_L < 19 && b - HANGUL_V < 21) return HANGUL + ((a - HANGUL_L) * 21 + (b - HANGUL_V)) * 28;
    if (a - HANGUL < HANGUL_COUNT && (a - HANGUL) % 28 == 0 && b - HANGUL_T - 1 < 27) return a + b - HANGUL_T;
    Decomposition key = {0, a, b, 0};
    const Decomposition *d = (const Decomposition *)bsearch(&key, unicode_composition, (size_t)unicode_compositions_count, sizeof key,
                                                            compare_compositions);
    return d ? d->c : 0;
}

int compare_u64(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

// Sorts each run of marks by class. Marks of one class keep their order: the place is part of the key.
void nfc_order(CodePoints *v) {
    for (int64_t start = 0, end; start < v->n; start = end + 1) {
        int sorted = 1;
        for (end = start; end < v->n && unicode_ccc[v->c[end]]; end++)
            if (end > start && unicode_ccc[v->c[end - 1]] > unicode_ccc[v->c[end]]) sorted = 0;
        if (sorted) continue;
        size_t n = (size_t)(end - start);
        uint64_t *keys = (uint64_t *)xmalloc(sizeof(uint64_t) * n);
        uint32_t *marks = (uint32_t *)xmalloc(sizeof(uint32_t) * n);
        memcpy(marks, v->c + start, sizeof(uint32_t) * n);
        for (size_t i = 0; i < n; i++) keys[i] = (uint64_t)unicode_ccc[marks[i]] << 56 | i;
        qsort(keys, n, sizeof(uint64_t), compare_u64);
        for (size_t i = 0; i < n; i++) v->c[start + (int64_t)i] = marks[keys[i] & 0xffffffffffffff];
        free(keys);
        free(marks);
    }
}

// A mark joins the last base unless a mark of the same or a higher class stands between them.
void nfc_join(CodePoints *v) {
    int64_t kept = 0, base = -1;
    int last_class = -1;  // of the marks kept behind the base
    for (int64_t i = 0; i < v->n; i++) {
        int ccc = unicode_ccc[v->c[i]];
        uint32_t joined = base >= 0 && last_class < ccc ? nfc_compose(v->c[base], v->c[i]) : 0;
        if (joined) {
            v->c[base] = joined;
            continue;
        }
        if (ccc == 0) base = kept;
        last_class = ccc ? ccc : -1;
        v->c[kept++] = v->c[i];
    }
    v->n = kept;
}

// Adds the NFC form of s to `out`. What lies below U+0300 is NFC already; only as the base of marks that
// follow can it change. Bytes that are not UTF-8 pass through, and nothing combines across them.
void nfc_add(Text *out, const char *s, int64_t n) {
    CodePoints v = {NULL, 0, 0};
    for (int64_t i = 0; i < n;) {
        uint32_t c;
        int64_t run = i, base;
        while (run < n && (unsigned char)s[run] < 0xcc) run++;  // 0xcc is where U+0300 begins
        base = run;
        if (run < n && run > i) {
            base = run - 1 > i && (s[run - 1] & 0xc0) == 0x80 ? run - 2 : run - 1;
            if (utf8_decode(s + base, run - base, &c) != run - base) base = run;
        }
        text_put(out, s + i, base - i);
        i = base;
        v.n = 0;
        for (int len; i < n && (len = utf8_decode(s + i, n - i, &c)) && (c >= 0x300 || i == base); i += len) nfc_decompose(&v, c);
        if (i == base && i < n) text_put(out, s + i++, 1);
        nfc_order(&v);
        nfc_join(&v);
        for (int64_t j = 0; j < v.n; j++) {
            char utf8[4];
            text_put(out, utf8, utf8_encode(utf8, v.c[j]));
        }
    }
    free(v.c);
}

// ----------------------------------------------------------------------------
// Cutting text into words, by hand-written matchers for the three patterns in use. Bytes that are not
// UTF-8 (which Hugging Face never sees, its input being a string) count as OTHER characters.

enum { PATTERN_BYTES, PATTERN_GPT2, PATTERN_LLAMA3, PATTERN_QWEN2 };

const struct { const char *regex; int pattern; } split_patterns[] = {
    {"'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+", PATTERN_GPT2},
    {"'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+", PATTERN_GPT2},
    {"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+", PATTERN_LLAMA3},
    {"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+", PATTERN_QWEN2},
};

static inline int class_at(const char *s, int64_t n, int64_t at, int *len) {
    uint32_t c;
    *len = 0;
    if (at >= n) return END;
    *len = utf8_decode(s + at, n - at, &c);
    if (*len) return unicode_class[c];
    *len = 1;
    return OTHER;
}

int64_t skip_class(const char *s, int64_t n, int64_t at, int wanted) {
    int len;
    while (class_at(s, n, at, &len) == wanted) at += len;
    return at;
}

// Bytes of 's 't 'm 'd 're 've 'll at s, or 0. Without case, the long s is an s too.
int contraction(const char *s, int64_t n, int any_case) {
    if (n < 2 || s[0] != '\'') return 0;
    int lower = any_case ? 32 : 0, a = s[1] | lower, b = n > 2 ? s[2] | lower : 0;
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
    if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return 3;
    return any_case && n > 2 && memcmp(s + 1, "\xc5\xbf", 2) == 0 ? 3 : 0;
}

static inline int is_newline(const char *s, int64_t n, int64_t at) { return at < n && (s[at] == '\n' || s[at] == '\r'); }

// Where the word that starts at `at` ends.
int64_t word_end(int pattern, const char *s, int64_t n, int64_t at) {
    int len, next_len, c = class_at(s, n, at, &len), next = class_at(s, n, at + len, &next_len);
    int apostrophe = contraction(s + at, n - at, pattern != PATTERN_GPT2);
    if (apostrophe) return at + apostrophe;
    int64_t end;
    if (pattern == PATTERN_GPT2) {
        // a run of one class, with at most one blank before it
        if (s[at] == ' ' && next != SPACE && next != END) return skip_class(s, n, at + 1, next);
        if (c != SPACE) return skip_class(s, n, at, c);
    } else {
        // letters, with one character before them that is neither a digit nor a line end
        if (c == LETTER) return skip_class(s, n, at, LETTER);
        if (c != NUMBER && !is_newline(s, n, at) && next == LETTER) return skip_class(s, n, at + len, LETTER);
        if (c == NUMBER) {
            end = at + len;
            for (int i = 1; i < (pattern == PATTERN_LLAMA3 ? 3 : 1) && class_at(s, n, end, &len) == NUMBER; i++) end += len;
            return end;
        }
        // signs, with one blank before them and the line ends behind them
        if (c == OTHER || (s[at] == ' ' && next == OTHER)) {
            end = skip_class(s, n, c == OTHER ? at : at + 1, OTHER);
            while (is_newline(s, n, end)) end++;
            return end;
        }
        // white space up to its last line end
        for (end = skip_class(s, n, at, SPACE); end > at; end--)
            if (is_newline(s, n, end - 1)) return end;
    }
    // white space; its last character is left for the word behind it
    int64_t last = at;
    for (end = at; class_at(s, n, end, &len) == SPACE; end += len) last = end;
    return end < n && last > at ? last : end;
}

// ----------------------------------------------------------------------------
// Tokenizer: bytes, or a byte-level BPE read from a Hugging Face tokenizer.json

typedef struct { int64_t start; int32_t len; int known, special; } TokenPiece;  // place in Tokenizer.bytes
typedef struct { uint64_t pair; uint32_t rank; int32_t id; } Merge;             // pair = left << 32 | right
typedef struct { char *text; int64_t len; int32_t id; int normalized; } AddedToken;

typedef struct {
    int pattern, nfc, ignore_merges;
    int vocab_size, eos_id;      // eos_id -1: none
    Text bytes;                  // the bytes of all pieces
    TokenPiece *pieces;          // vocab_size of them
    int32_t byte_id[256];
    int32_t *words;              // hash table: bytes of a piece -> id, -1 empty
    Merge *merges;               // hash table: pair -> rank, id; id -1 empty
    uint64_t words_mask, merges_mask;
    AddedToken *added;           // longest first
    int num_added;
} Tokenizer;

void tokenizer_free(Tokenizer *t) {
    for (int i = 0; i < t->num_added; i++) free(t->added[i].text);
    free(t->added);
    free(t->bytes.data);
    free(t->pieces);
    free(t->words);
    free(t->merges);
    memset(t, 0, sizeof *t);
}

void tokenizer_bytes(Tokenizer *t) {
    memset(t, 0, sizeof *t);
    t->pattern = PATTERN_BYTES;
    t->vocab_size = 256;
    t->eos_id = -1;
    t->pieces = (TokenPiece *)xcalloc(256, sizeof(TokenPiece));
    for (int i = 0; i < 256; i++) {
        char c = (char)i;
        t->pieces[i].start = i;
        t->pieces[i].len = t->pieces[i].known = 1;
        t->byte_id[i] = i;
        text_put(&t->bytes, &c, 1);
    }
}

static inline uint64_t hash_pair(uint64_t pair) {
    pair *= 0x9E3779B97F4A7C15u;
    return pair ^ (pair >> 32);
}

uint64_t table_mask(int64_t entries) {  // size - 1 of a table at most half full
    uint64_t size = 16;
    while (size < 2 * (uint64_t)entries) size *= 2;
    return size - 1;
}

// The id of a piece, or -1; `slot` (may be NULL) is where it stands or would.
int32_t tokenizer_word(const Tokenizer *t, const char *s, int64_t n, uint64_t *slot) {
    uint64_t i = hash_bytes(s, n) & t->words_mask;
    for (; t->words[i] >= 0; i = (i + 1) & t->words_mask) {
        const TokenPiece *p = &t->pieces[t->words[i]];
        if (p->len == n && memcmp(t->bytes.data + p->start, s, (size_t)n) == 0) break;
    }
    if (slot) *slot = i;
    return t->words[i];
}

static inline const Merge *tokenizer_merge(const Tokenizer *t, int32_t left, int32_t right) {
    uint64_t pair = (uint64_t)(uint32_t)left << 32 | (uint32_t)right, i = hash_pair(pair) & t->merges_mask;
    while (t->merges[i].id >= 0 && t->merges[i].pair != pair) i = (i + 1) & t->merges_mask;
    return &t->merges[i];
}

// A vocabulary writes bytes as visible characters: printable Latin-1 as itself, the others as U+0100 and
// on. Adds the bytes of s to `out`; -1 where a character stands for no byte.
int byte_level_decode(Text *out, const char *s, int64_t n) {
    for (int64_t i = 0; i < n;) {
        uint32_t c = 0;
        int len = utf8_decode(s + i, n - i, &c), byte = -1;
        if (c >= 0x100 && c < 0x144) {  // the (c - 0x100)-th of the bytes that are not printable
            byte = (int)c - 0x100;
            byte += byte <= 32 ? 0 : byte <= 66 ? 127 - 33 : 173 - 67;
        } else if ((c > 32 && c < 127) || (c > 160 && c < 256 && c != 173)) {
            byte = (int)c;
        }
        if (!len || byte < 0) return -1;
        char b = (char)byte;
        text_put(out, &b, 1);
        i += len;
    }
    return 0;
}

const char *json_type_field(const Json *v) {  // "type" of an object, for messages too
    const Json *type = json_get(v, "type");
    return type && type->type == JSON_STRING ? type->str : v && v->type == JSON_NULL ? "null" : "(none)";
}

int json_is_true(const Json *v) { return v && v->type == JSON_BOOL && v->number != 0; }

int json_is_unset(const Json *v) {  // absent, null, false, 0 or ""
    return !v || v->type == JSON_NULL || (v->type == JSON_STRING && v->len == 0) ||
           ((v->type == JSON_BOOL || v->type == JSON_NUMBER) && v->number == 0);
}

int tokenizer_parse_byte_level(const Json *b, int regex_wanted, char *err) {
    const Json *use_regex = json_get(b, "use_regex");
    if (json_is_true(json_get(b, "add_prefix_space"))) return fail(err, "pre_tokenizer with add_prefix_space true is not supported");
    if ((!use_regex || json_is_true(use_regex)) == regex_wanted) return 0;
    return fail(err, "pre_tokenizer ByteLevel with use_regex %s here is not supported", regex_wanted ? "false" : "true");
}

int tokenizer_parse_pattern(Tokenizer *t, const Json *pre, char *err) {
    const char *const wanted = "(only ByteLevel, or Sequence of Split and ByteLevel, as in GPT-2, Llama-3 and Qwen2)";
    if (strcmp(json_type_field(pre), "ByteLevel") == 0) {
        t->pattern = PATTERN_GPT2;
        return tokenizer_parse_byte_level(pre, 1, err);
    }
    const Json *list = json_get(pre, "pretokenizers");
    if (strcmp(json_type_field(pre), "Sequence") != 0 || !list || list->type != JSON_ARRAY)
        return fail(err, "pre_tokenizer \"%.60s\" is not supported %s", json_type_field(pre), wanted);
    const Json *split = list->child, *byte_level = split ? split->next : NULL;
    if (list->len != 2 || strcmp(json_type_field(split), "Split") != 0 || strcmp(json_type_field(byte_level), "ByteLevel") != 0)
        return fail(err, "a pre_tokenizer Sequence of %" PRId64 " steps that starts with \"%.60s\" is not supported %s", list->len,
                    split ? json_type_field(split) : "", wanted);
    const Json *regex = json_get(json_get(split, "pattern"), "Regex");
    if (!regex || regex->type != JSON_STRING) return fail(err, "a pre_tokenizer Split without a Regex is not supported %s", wanted);
    if (!json_is_string(json_get(split, "behavior"), "Isolated") || json_is_true(json_get(split, "invert")))
        return fail(err, "a pre_tokenizer Split that is not \"Isolated\", or inverted, is not supported");
    for (size_t i = 0; i < sizeof split_patterns / sizeof split_patterns[0]; i++)
        if (json_is_string(regex, split_patterns[i].regex)) t->pattern = split_patterns[i].pattern;
    if (!t->pattern) return fail(err, "the split pattern \"%.200s\" is not supported (only those of GPT-2, Llama-3 and Qwen2)", regex->str);
    return tokenizer_parse_byte_level(byte_level, 0, err);
}

int compare_added(const void *a, const void *b) {
    int64_t x = ((const AddedToken *)a)->len, y = ((const AddedToken *)b)->len;
    return (x < y) - (x > y);
}

// An id that a list of n entries may sensibly use; the table of pieces is as long as the largest.
int token_id_of(const Json *id, int64_t n) {
    return id && id->type == JSON_NUMBER && id->is_integer && id->integer >= 0 && id->integer < 4 * n + 65536 ? (int)id->integer : -1;
}

int tokenizer_parse_vocab(Tokenizer *t, const Json *vocab, const Json *added, char *err) {
    int64_t entries = vocab->len + (added ? added->len : 0);
    for (const Json *v = vocab->child; v; v = v->next) {
        int id = token_id_of(v, entries);
        if (id < 0) return fail(err, "the id of vocabulary entry \"%.60s\" is not a number in range", v->key);
        if (id >= t->vocab_size) t->vocab_size = id + 1;
    }
    for (const Json *a = added ? added->child : NULL; a; a = a->next) {
        int id = token_id_of(json_get(a, "id"), entries);
        const Json *content = json_get(a, "content");
        if (id < 0 || !content || content->type != JSON_STRING || content->len == 0)
            return fail(err, "an entry of added_tokens lacks its content or a sensible id");
        if (id >= t->vocab_size) t->vocab_size = id + 1;
    }
    t->pieces = (TokenPiece *)xcalloc((size_t)t->vocab_size + 1, sizeof(TokenPiece));
    t->words_mask = table_mask(entries);
    t->words = (int32_t *)xmalloc((t->words_mask + 1) * sizeof(int32_t));
    memset(t->words, 0xff, (t->words_mask + 1) * sizeof(int32_t));
    for (const Json *v = vocab->child; v; v = v->next) {
        TokenPiece *p = &t->pieces[v->integer];
        uint64_t slot;
        if (p->known) return fail(err, "two vocabulary entries have the id %" PRId64, v->integer);
        p->known = 1;
        p->start = t->bytes.len;
        int plain = byte_level_decode(&t->bytes, v->key, v->key_len) == 0;
        if (!plain) {  // no text can give it; it stands for itself
            t->bytes.len = p->start;
            text_put(&t->bytes, v->key, v->key_len);
        }
        if (t->bytes.len - p->start > INT32_MAX) return fail(err, "a vocabulary entry is too long");
        p->len = (int32_t)(t->bytes.len - p->start);
        if (!plain || p->len == 0) continue;
        tokenizer_word(t, t->bytes.data + p->start, p->len, &slot);
        t->words[slot] = (int32_t)v->integer;
    }
    for (int i = 0; i < 256; i++) {
        char c = (char)i;
        t->byte_id[i] = tokenizer_word(t, &c, 1, NULL);
        if (t->byte_id[i] < 0) return fail(err, "byte 0x%02x is not in the vocabulary: only byte-level BPE with all 256 bytes is supported", i);
    }
    return 0;
}

int tokenizer_parse_merges(Tokenizer *t, const Json *merges, char *err) {
    Text pair = {NULL, 0, 0};
    t->merges_mask = table_mask(merges->len);
    t->merges = (Merge *)xmalloc((t->merges_mask + 1) * sizeof(Merge));
    for (uint64_t i = 0; i <= t->merges_mask; i++) t->merges[i].id = -1;
    uint32_t rank = 0;
    int result = 0;
    for (const Json *m = merges->child; m && !result; m = m->next, rank++) {
        // "left right", or ["left", "right"] since tokenizers 0.20
        const char *left = NULL, *right = NULL;
        int64_t left_len = 0, right_len = 0;
        const char *blank = m->type == JSON_STRING ? (const char *)memchr(m->str, ' ', (size_t)m->len) : NULL;
        if (blank) {
            left = m->str;
            left_len = blank - m->str;
            right = blank + 1;
            right_len = m->len - left_len - 1;
        } else if (m->type == JSON_ARRAY && m->len == 2 && m->child->type == JSON_STRING && m->child->next->type == JSON_STRING) {
            left = m->child->str;
            left_len = m->child->len;
            right = m->child->next->str;
            right_len = m->child->next->len;
        }
        int32_t a = -1, b = -1, id = -1;
        pair.len = 0;
        if (left && byte_level_decode(&pair, left, left_len) == 0) {
            int64_t cut = pair.len;
            if (byte_level_decode(&pair, right, right_len) == 0 && cut > 0 && pair.len > cut) {
                a = tokenizer_word(t, pair.data, cut, NULL);
                b = tokenizer_word(t, pair.data + cut, pair.len - cut, NULL);
                id = tokenizer_word(t, pair.data, pair.len, NULL);
            }
        }
        if (id < 0 || a < 0 || b < 0)
            result = fail(err, "merge %u, \"%.60s\", is broken: its two sides and the result must be in the vocabulary", rank,
                          blank ? m->str : left ? left : "");
        else {
            Merge *slot = (Merge *)tokenizer_merge(t, a, b);
            slot->pair = (uint64_t)(uint32_t)a << 32 | (uint32_t)b;
            slot->rank = rank;
            slot->id = id;
        }
    }
    free(pair.data);
    return result;
}

int tokenizer_parse_added(Tokenizer *t, const Json *added, char *err) {
    // names under which the usual tokenizers keep the end of a text, the strongest first
    const char *const ends[] = {"<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]"};
    size_t best = sizeof ends / sizeof ends[0];
    t->added = (AddedToken *)xcalloc((size_t)(added ? added->len : 0) + 1, sizeof(AddedToken));
    for (const Json *a = added ? added->child : NULL; a; a = a->next) {
        const Json *content = json_get(a, "content");
        int special = json_is_true(json_get(a, "special"));
        const char *const unsupported[] = {"single_word", "lstrip", "rstrip"};
        for (int i = 0; i < 3; i++)
            if (json_is_true(json_get(a, unsupported[i])))
                return fail(err, "added token \"%.60s\" with %s true is not supported", content->str, unsupported[i]);
        AddedToken *token = &t->added[t->num_added++];
        token->id = (int32_t)json_get(a, "id")->integer;
        token->normalized = json_is_true(json_get(a, "normalized"));
        Text text = {NULL, 0, 0};
        if (token->normalized && t->nfc) nfc_add(&text, content->str, content->len);
        else text_put(&text, content->str, content->len);
        token->text = text.data;
        token->len = text.len;
        TokenPiece *p = &t->pieces[token->id];
        if (p->known && (p->len != content->len || memcmp(t->bytes.data + p->start, content->str, (size_t)p->len) != 0))
            return fail(err, "added token \"%.60s\" has the id %d of another token", content->str, token->id);
        if (!p->known) {
            p->start = t->bytes.len;
            p->len = (int32_t)content->len;
            text_put(&t->bytes, content->str, content->len);
        }
        p->known = 1;
        p->special = special;
        for (size_t i = 0; i < best; i++)
            if (json_is_string(content, ends[i])) {
                best = i;
                t->eos_id = token->id;
            }
    }
    qsort(t->added, (size_t)t->num_added, sizeof(AddedToken), compare_added);
    return 0;
}

// What tokenizer.json says about truncation, padding and post-processing is about single prompts, not
// about text to train on: it is left aside, as with encode(text, add_special_tokens=False).
int tokenizer_parse_tree(Tokenizer *t, const Json *root, char *err) {
    const Json *model = json_get(root, "model"), *normalizer = json_get(root, "normalizer"), *added = json_get(root, "added_tokens");
    const Json *decoder = json_get(root, "decoder"), *pre = json_get(root, "pre_tokenizer");
    const Json *vocab = json_get(model, "vocab"), *merges = json_get(model, "merges");
    if (!model || model->type != JSON_OBJECT) return fail(err, "this is not a tokenizer.json: \"model\" is missing");
    // old files have no type; only BPE has merges
    if (json_get(model, "type") ? !json_is_string(json_get(model, "type"), "BPE") : !merges)
        return fail(err, "model type \"%.60s\" is not supported (only byte-level BPE)", json_type_field(model));
    const char *const unsupported[] = {"dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"};
    for (int i = 0; i < 4; i++)
        if (!json_is_unset(json_get(model, unsupported[i]))) return fail(err, "a BPE model with %s is not supported", unsupported[i]);
    if (!vocab || vocab->type != JSON_OBJECT) return fail(err, "model.vocab is missing, or not an object");
    if (!merges || merges->type != JSON_ARRAY) return fail(err, "model.merges is missing, or not a list");
    if (added && added->type != JSON_ARRAY) return fail(err, "added_tokens is %s, not a list", json_type_name(added->type));
    if (normalizer && normalizer->type != JSON_NULL && strcmp(json_type_field(normalizer), "NFC") != 0)
        return fail(err, "normalizer \"%.60s\" is not supported (only NFC, or none)", json_type_field(normalizer));
    if (decoder && decoder->type != JSON_NULL && strcmp(json_type_field(decoder), "ByteLevel") != 0)
        return fail(err, "decoder \"%.60s\" is not supported (only ByteLevel)", json_type_field(decoder));
    if (!pre) return fail(err, "pre_tokenizer is missing (ByteLevel is needed)");
    t->nfc = normalizer && normalizer->type != JSON_NULL;
    t->ignore_merges = json_is_true(json_get(model, "ignore_merges"));
    if (tokenizer_parse_pattern(t, pre, err) < 0 || tokenizer_parse_vocab(t, vocab, added, err) < 0) return -1;
    if (tokenizer_parse_merges(t, merges, err) < 0) return -1;
    return tokenizer_parse_added(t, added, err);
}

int tokenizer_parse(Tokenizer *t, const char *text, int64_t len, char *err) {
    Json *root;
    memset(t, 0, sizeof *t);
    t->eos_id = -1;
    unicode_init();
    if (json_parse(&root, text, len, err) < 0) return -1;
    int result = tokenizer_parse_tree(t, root, err);
    json_free(root);
    if (result < 0) tokenizer_free(t);
    return result;
}

int tokenizer_open(Tokenizer *t, const char *path, char *err) {
    char *text;
    int64_t len;
    memset(t, 0, sizeof *t);
    if (read_file(path, &text, &len, err) < 0) return -1;
    int result = tokenizer_parse(t, text, len, err);
    free(text);
    return result < 0 ? fail(err, "%s: %s", path, err) : 0;
}

// The bytes of a token. Special tokens are no text: they give none (tokenizer_special names them).
const char *tokenizer_piece(const Tokenizer *t, int id, int *len) {
    *len = 0;
    if (id < 0 || id >= t->vocab_size || !t->pieces[id].known || t->pieces[id].special) return "";
    *len = t->pieces[id].len;
    return t->bytes.data + t->pieces[id].start;
}

// The name of a special token, like <|endoftext|>; NULL and 0 for any other.
const char *tokenizer_special(const Tokenizer *t, int id, int *len) {
    *len = 0;
    if (id < 0 || id >= t->vocab_size || !t->pieces[id].special) return NULL;
    *len = t->pieces[id].len;
    return t->bytes.data + t->pieces[id].start;
}

// ----------------------------------------------------------------------------
// Encoding. A text's words repeat, so the last word of each hash is remembered by where it stood in
// the text and where its ids stand in the output: a cache without storage of its own.

typedef struct { const char *word; int64_t out; int32_t len, count; } CachedWord;
typedef struct { uint64_t key; int32_t left, right; } HeapItem;  // key = rank << 32 | place

typedef struct {
    const Tokenizer *tokenizer;
    int32_t *ids;
    int64_t n, cap;
    CachedWord *cache;
    uint64_t cache_mask;
    int32_t *symbol, *next, *previous;  // the word being merged, as a linked list
    HeapItem *heap;
    int64_t heap_len, scratch, longest;  // longest: word that could not be merged, its places being int32_t
} Encoder;

void encoder_put(Encoder *e, int32_t id) {
    if (e->n == e->cap) e->ids = (int32_t *)xrealloc(e->ids, sizeof(int32_t) * (size_t)(e->cap = 2 * e->cap + 256));
    e->ids[e->n++] = id;
}

void heap_push(Encoder *e, HeapItem item) {
    int64_t i = e->heap_len++;
    for (; i > 0 && e->heap[(i - 1) / 2].key > item.key; i = (i - 1) / 2) e->heap[i] = e->heap[(i - 1) / 2];
    e->heap[i] = item;
}

HeapItem heap_pop(Encoder *e) {
    HeapItem top = e->heap[0], last = e->heap[--e->heap_len];
    int64_t i = 0;
    for (int64_t child; (child = 2 * i + 1) < e->heap_len; i = child) {
        if (child + 1 < e->heap_len && e->heap[child + 1].key < e->heap[child].key) child++;
        if (e->heap[child].key >= last.key) break;
        e->heap[i] = e->heap[child];
    }
    e->heap[i] = last;
    return top;
}

void encoder_pair(Encoder *e, int32_t at) {  // offers the pair that starts at `at` for merging
    if (at < 0 || e->next[at] < 0) return;
    int32_t left = e->symbol[at], right = e->symbol[e->next[at]];
    const Merge *m = tokenizer_merge(e->tokenizer, left, right);
    if (m->id < 0) return;
    HeapItem item = {(uint64_t)m->rank << 32 | (uint32_t)at, left, right};
    heap_push(e, item);
}

// Merges the pair of lowest rank, the leftmost of equals, until none is left: n log n for n bytes.
void encoder_merge(Encoder *e, const char *s, int32_t n) {
    if (n > e->scratch) {
        e->scratch = n + n / 2 + 64;
        e->symbol = (int32_t *)xrealloc(e->symbol, (size_t)e->scratch * sizeof(int32_t));
        e->next = (int32_t *)xrealloc(e->next, (size_t)e->scratch * sizeof(int32_t));
        e->previous = (int32_t *)xrealloc(e->previous, (size_t)e->scratch * sizeof(int32_t));
        e->heap = (HeapItem *)xrealloc(e->heap, 3 * (size_t)e->scratch * sizeof(HeapItem));  // n - 1, and 2 for each merge
    }
    for (int32_t i = 0; i < n; i++) {
        e->symbol[i] = e->tokenizer->byte_id[(unsigned char)s[i]];
        e->next[i] = i + 1 < n ? i + 1 : -1;
        e->previous[i] = i - 1;
    }
    e->heap_len = 0;
    for (int32_t i = 0; i + 1 < n; i++) encoder_pair(e, i);
    while (e->heap_len > 0) {
        HeapItem item = heap_pop(e);
        int32_t at = (int32_t)(uint32_t)item.key, right = e->next[at];
        if (e->symbol[at] != item.left || right < 0 || e->symbol[right] != item.right) continue;  // merged since
        e->symbol[at] = tokenizer_merge(e->tokenizer, item.left, item.right)->id;
        e->symbol[right] = -1;
        e->next[at] = e->next[right];
        if (e->next[at] >= 0) e->previous[e->next[at]] = at;
        encoder_pair(e, e->previous[at]);
        encoder_pair(e, at);
    }
    for (int32_t i = 0; i >= 0; i = e->next[i]) encoder_put(e, e->symbol[i]);
}

void encoder_word(Encoder *e, const char *s, int64_t n) {
    CachedWord *slot = n <= 64 ? &e->cache[hash_bytes(s, n) & e->cache_mask] : NULL;
    if (slot && slot->len == n && memcmp(slot->word, s, (size_t)n) == 0) {
        for (int32_t i = 0; i < slot->count; i++) encoder_put(e, e->ids[slot->out + i]);
        return;
    }
    int64_t out = e->n;
    int32_t whole = e->tokenizer->ignore_merges ? tokenizer_word(e->tokenizer, s, n, NULL) : -1;
    if (whole >= 0) encoder_put(e, whole);
    else if (n < INT32_MAX / 2) encoder_merge(e, s, (int32_t)n);
    else e->longest = n;
    if (!slot) return;
    slot->word = s;
    slot->out = out;
    slot->len = (int32_t)n;
    slot->count = (int32_t)(e->n - out);
}

// The first added token in s at or behind `from`; its start is *at (n when there is none).
const AddedToken *find_added(const Tokenizer *t, const char *s, int64_t n, int64_t from, int normalized, int64_t *at) {
    unsigned char first[256] = {0};
    int any = 0;
    for (int i = 0; i < t->num_added; i++)
        if (t->added[i].normalized == normalized) any = first[(unsigned char)t->added[i].text[0]] = 1;
    *at = n;
    for (int64_t p = from; any && p < n; p++) {
        if (!first[(unsigned char)s[p]]) continue;
        for (int i = 0; i < t->num_added; i++) {
            const AddedToken *a = &t->added[i];
            if (a->normalized != normalized || a->len > n - p || memcmp(a->text, s + p, (size_t)a->len) != 0) continue;
            *at = p;
            return a;
        }
    }
    return NULL;
}

void encoder_text(Encoder *e, const char *s, int64_t n) {  // normalised text
    for (int64_t at = 0, end; at < n;) {
        const AddedToken *a = find_added(e->tokenizer, s, n, at, 1, &end);
        for (int64_t next; at < end; at = next) {
            next = at + word_end(e->tokenizer->pattern, s + at, end - at, 0);
            encoder_word(e, s + at, next - at);
        }
        if (!a) break;
        encoder_put(e, a->id);
        at = end + a->len;
    }
}

// As Hugging Face does it: added tokens are found in the text as it is; what lies between them is
// normalised, searched for the added tokens that are marked as normalised, cut into words and merged.
int tokenizer_encode(const Tokenizer *t, const char *text, int64_t len, int32_t **ids, int64_t *n, char *err) {
    Encoder e;
    memset(&e, 0, sizeof e);
    e.tokenizer = t;
    *ids = NULL;
    *n = 0;
    e.cap = t->pattern == PATTERN_BYTES ? len + 1 : len / 3 + 16;
    e.ids = (int32_t *)xmalloc((size_t)e.cap * sizeof(int32_t));
    if (t->pattern == PATTERN_BYTES) {
        for (int64_t i = 0; i < len; i++) encoder_put(&e, (unsigned char)text[i]);
    } else {
        Text normal = {NULL, 0, 0};
        if (t->nfc) text_reserve(&normal, 3 * len);  // the most that NFC can need; the cache points into it, so it must not move
        e.cache_mask = table_mask(len / 8 < 32768 ? len / 8 : 32768);
        e.cache = (CachedWord *)xcalloc(e.cache_mask + 1, sizeof(CachedWord));
        for (int64_t at = 0, end; at < len;) {
            const AddedToken *a = find_added(t, text, len, at, 0, &end);
            int64_t start = normal.len;
            if (t->nfc) nfc_add(&normal, text + at, end - at);
            if (t->nfc) encoder_text(&e, normal.data + start, normal.len - start);
            else encoder_text(&e, text + at, end - at);
            if (!a) break;
            encoder_put(&e, a->id);
            at = end + a->len;
        }
        free(normal.data);
    }
    free(e.cache);
    free(e.symbol);
    free(e.next);
    free(e.previous);
    free(e.heap);
    if (e.longest) {
        free(e.ids);
        return fail(err, "a text with a word of %" PRId64 " bytes cannot be encoded: is it text?", e.longest);
    }
    *ids = e.ids;
    *n = e.n;
    return 0;
}

// ----------------------------------------------------------------------------
// UTF-8 as it streams out of a model: only whole characters go on, what is none becomes U+FFFD

typedef struct { char buf[8]; int n; } Utf8Stream;

// Can more bytes make a character of these? The bytes that may follow form an interval, so if any
// do, the lowest or the highest do.
int utf8_is_prefix(const char *s, int n) {
    uint32_t c;
    char low[4], high[4];
    memset(low, 0x80, 4);
    memset(high, 0xbf, 4);
    for (int i = 0; i < n; i++) low[i] = high[i] = s[i];
    for (int len = n + 1; len <= 4; len++)
        if (utf8_decode(low, len, &c) == len || utf8_decode(high, len, &c) == len) return 1;
    return 0;
}

void utf8_stream_push(Utf8Stream *u, const char *bytes, int len, Text *out) {
    for (int i = 0; i < len; i++) {
        u->buf[u->n++] = bytes[i];
        while (u->n > 0) {
            uint32_t c;
            int whole = utf8_decode(u->buf, u->n, &c), used = whole;
            if (!whole && utf8_is_prefix(u->buf, u->n)) break;
            if (!whole) used = u->n > 1 ? u->n - 1 : 1;  // all but the byte that broke it
            text_put(out, whole ? u->buf : "\xef\xbf\xbd", whole ? whole : 3);
            u->n -= used;
            memmove(u->buf, u->buf + used, (size_t)u->n);
        }
    }
}

void utf8_stream_flush(Utf8Stream *u, Text *out) {
    if (u->n) text_put(out, "\xef\xbf\xbd", 3);
    u->n = 0;
}

// ----------------------------------------------------------------------------
// Token files and texts as streams of tokens. Token files stay where they are, mapped, and may be
// larger than memory. Training and validation share the buffer of a file that is split.

typedef struct { FileMap file; int users; } DataBuffer;
typedef struct { const unsigned char *tokens; int64_t count; int width; int64_t vocab; DataBuffer *buffer; } TokenStream;  // width: bytes a token; every token is below vocab
typedef struct { char *name; TokenStream *streams; int num_streams; int64_t tokens; } DataSet;

static inline uint32_t stream_token(const TokenStream *s, int64_t i) {
    uint32_t wide;
    uint16_t narrow;
    if (s->width == 1) return s->tokens[i];
    if (s->width == 2) {
        memcpy(&narrow, s->tokens + 2 * i, 2);
        return narrow;
    }
    memcpy(&wide, s->tokens + 4 * i, 4);
    return wide;
}

void stream_read(const TokenStream *s, int64_t start, int64_t n, int *tokens) {
    for (int64_t i = 0; i < n; i++) {
        const uint32_t token = stream_token(s, start + i);
        if (token >= s->vocab)      // stream_check saw none, so the mapped file is another one now
            die(1, "a data file was changed while it was read: token %u is not among the %" PRId64 " of the vocabulary", token, s->vocab);
        tokens[i] = (int)token;
    }
}

// A .bin file in memory: 256 int32 (magic, version, count, zeros), then the tokens.
int bin_parse(TokenStream *s, const unsigned char *file, int64_t len, char *err) {
    int32_t header[3];
    memset(s, 0, sizeof *s);
    if (len < 1024) return fail(err, "not a token file: %" PRId64 " bytes are less than its header of 1024", len);
    memcpy(header, file, sizeof header);
    if (header[0] != 20240520)
        return fail(err, "not a token file: it begins with %d, not 20240520 (a text must not be named .bin; data/tokenize.py makes token files)",
                    header[0]);
    if (header[1] != 1 && header[1] != 2) return fail(err, "token file of version %d: only 1 (uint16) and 2 (uint32) are known", header[1]);
    s->width = 2 * header[1];
    s->count = header[2];
    s->tokens = file + 1024;
    if (s->count <= 0) return fail(err, "token file without tokens: its header says %d", header[2]);
    if (len != 1024 + s->count * s->width)
        return fail(err, "%s token file: its header promises %d tokens, which is %" PRId64 " bytes, but it has %" PRId64 "; make or copy it again",
                    len < 1024 + s->count * s->width ? "truncated" : "oversized", header[2], 1024 + s->count * s->width, len);
    return 0;
}

// Looks at every token once, so that nothing later has to.
int stream_check(const TokenStream *s, int64_t vocab, char *err) {
    const int64_t block = 65536;  // only a block with a bad token is searched for it
    for (int64_t start = 0; start < s->count; start += block) {
        int64_t n = s->count - start < block ? s->count - start : block;
        uint32_t most = 0;
        for (int64_t i = 0; i < n; i++) {
            uint32_t token = stream_token(s, start + i);
            most = token > most ? token : most;
        }
        if ((int64_t)most < vocab) continue;
        for (int64_t i = start; ; i++) {
            const int64_t token = stream_token(s, i);
            if (token >= 1 << 28) return fail(err, "token %" PRId64 " is %" PRId64 ", more than any vocabulary has (%d): these are not tokens", i, token, 1 << 28);
            if (token >= vocab)
                return fail(err, "token %" PRId64 " is %" PRId64 ", but the vocabulary has only %" PRId64 " tokens: give --vocab %" PRId64 " or more, or the right tokenizer",
                            i, token, vocab, token + 1);
        }
    }
    return 0;
}

DataBuffer *buffer_new(FileMap file) {
    DataBuffer *b = (DataBuffer *)xcalloc(1, sizeof(DataBuffer));
    b->file = file;
    b->users = 1;
    return b;
}

void buffer_release(DataBuffer *b) {
    if (--b->users > 0) return;
    file_unmap(&b->file);
    free(b);
}

void data_free(DataSet *d) {
    for (int i = 0; i < d->num_streams; i++) buffer_release(d->streams[i].buffer);
    free(d->streams);
    free(d->name);
    memset(d, 0, sizeof *d);
}

void data_add(DataSet *d, DataBuffer *buffer, const unsigned char *tokens, int64_t count, int width, int64_t vocab) {
    if (count <= 0) return;
    d->streams = (TokenStream *)xrealloc(d->streams, (size_t)(d->num_streams + 1) * sizeof(TokenStream));
    TokenStream s = {tokens, count, width, vocab, buffer};
    d->streams[d->num_streams++] = s;
    d->tokens += count;
    buffer->users++;
}

int64_t data_train_share(int64_t n) { return n / 10 * 9 + n % 10 * 9 / 10; }  // floor(0.9 n)

// ----------------------------------------------------------------------------
// Opening a data set: one file, or the files that a quoted pattern matches, in sorted order

typedef struct { char **names; int count; } FileList;

void file_list_add(FileList *l, const char *name) {
    l->names = (char **)xrealloc(l->names, (size_t)(l->count + 1) * sizeof(char *));
    l->names[l->count++] = xstrdup(name);
}

void file_list_free(FileList *l) {
    for (int i = 0; i < l->count; i++) free(l->names[i]);
    free(l->names);
    memset(l, 0, sizeof *l);
}

int file_list(FileList *l, const char *arg, char *err) {
    struct stat st;
    memset(l, 0, sizeof *l);
    if (stat(arg, &st) == 0) {  // before any pattern: a name may have brackets in it
        file_list_add(l, arg);
        return 0;
    }
    if (!strpbrk(arg, "*?[")) return fail(err, "%s: cannot open: %s", arg, strerror(errno));
    glob_t found;
    int result = glob(arg, 0, NULL, &found);
    for (size_t i = 0; result == 0 && i < found.gl_pathc; i++) file_list_add(l, found.gl_pathv[i]);
    if (result == 0 || result == GLOB_NOMATCH) globfree(&found);
    return l->count ? 0 : fail(err, "%s: no file matches this pattern", arg);
}

int is_bin_name(const char *name) {
    size_t n = strlen(name);
    return n >= 4 && strcmp(name + n - 4, ".bin") == 0;
}

// Does the argument name token files? Decides the vocabulary where nothing else does.
int data_is_bin(const char *arg) {
    char err[ERR_LEN];
    FileList files;
    if (file_list(&files, arg, err) < 0) return is_bin_name(arg);
    int result = is_bin_name(files.names[0]);
    file_list_free(&files);
    return result;
}

// Adds a text to a data set: its bytes as they lie, or what the tokenizer makes of them.
int data_add_text(DataSet *d, DataBuffer *buffer, const unsigned char *text, int64_t len, const Tokenizer *tokenizer, int64_t vocab, char *err) {
    if (!tokenizer || tokenizer->pattern == PATTERN_BYTES) {
        data_add(d, buffer, text, len, 1, vocab);
    } else {
        int32_t *ids;
        int64_t n;
        if (tokenizer_encode(tokenizer, (const char *)text, len, &ids, &n, err) < 0) return -1;
        FileMap file = {(const unsigned char *)ids, 4 * n, 0};
        buffer = buffer_new(file);
        data_add(d, buffer, file.data, n, 4, vocab);
        buffer_release(buffer);
    }
    return d->num_streams ? stream_check(&d->streams[d->num_streams - 1], vocab, err) : 0;
}

// val NULL: all of the text trains. A tokenizer must not see half a character, so its cut moves on to
// the next whole one.
int data_split_text(DataSet *train, DataSet *val, DataBuffer *buffer, const Tokenizer *tokenizer, int64_t vocab, char *err) {
    const unsigned char *text = buffer->file.data;
    int64_t len = buffer->file.len, cut = val ? data_train_share(len) : len;
    if (len == 0) return fail(err, "the text is empty");
    if (tokenizer && tokenizer->pattern != PATTERN_BYTES)
        while (cut < len && (text[cut] & 0xc0) == 0x80) cut++;
    if (data_add_text(train, buffer, text, cut, tokenizer, vocab, err) < 0) return -1;
    return val ? data_add_text(val, buffer, text + cut, len - cut, tokenizer, vocab, err) : 0;
}

int data_load_bins(DataSet *train, DataSet *val, const FileList *files, int64_t vocab, char *err) {
    DataSet all;
    int result = 0;
    memset(&all, 0, sizeof all);
    for (int i = 0; i < files->count && !result; i++) {
        FileMap file;
        TokenStream s;
        if (!is_bin_name(files->names[i])) result = fail(err, "%s: a text among token files (.bin): name them apart", files->names[i]);
        if (result || (result = file_map(&file, files->names[i], err)) < 0) break;
        DataBuffer *buffer = buffer_new(file);
        result = bin_parse(&s, file.data, file.len, err);
        if (!result) result = stream_check(&s, vocab, err);
        if (result) fail(err, "%s: %s", files->names[i], err);
        else data_add(&all, buffer, s.tokens, s.count, s.width, vocab);
        buffer_release(buffer);
    }
    int64_t left = val ? data_train_share(all.tokens) : all.tokens;  // tokens that still go to training
    for (int i = 0; i < all.num_streams && !result; i++) {
        const TokenStream *s = &all.streams[i];
        int64_t n = s->count < left ? s->count : left;
        data_add(train, s->buffer, s->tokens, n, s->width, vocab);
        if (val) data_add(val, s->buffer, s->tokens + n * s->width, s->count - n, s->width, vocab);
        left -= n;
    }
    data_free(&all);
    return result;
}

// Several texts are one long text: windows may cross from one into the next.
int data_load_texts(DataSet *train, DataSet *val, const FileList *files, const Tokenizer *tokenizer, int64_t vocab, char *err) {
    FileMap file;
    Text all = {NULL, 0, 0};
    int result = 0;
    for (int i = 0; i < files->count && !result; i++) {
        if (files->count > 1 && is_bin_name(files->names[i])) result = fail(err, "%s: a token file among texts: name them apart", files->names[i]);
        if (result || (result = file_map(&file, files->names[i], err)) < 0 || files->count == 1) break;
        text_put(&all, file.data, file.len);
        file_unmap(&file);
    }
    if (!result && files->count > 1) {
        file.data = (const unsigned char *)all.data;
        file.len = all.len;
        file.mapped = 0;
        all.data = NULL;
    }
    free(all.data);
    if (result) return -1;
    DataBuffer *buffer = buffer_new(file);
    result = data_split_text(train, val, buffer, tokenizer, vocab, err);
    buffer_release(buffer);
    return result ? fail(err, "%s%s: %s", files->names[0], files->count > 1 ? " and the others" : "", err) : 0;
}

int data_load(DataSet *train, DataSet *val, const char *arg, const Tokenizer *tokenizer, int64_t vocab, char *err) {
    FileList files;
    if (file_list(&files, arg, err) < 0) return -1;
    int result = is_bin_name(files.names[0]) ? data_load_bins(train, val, &files, vocab, err)
                                             : data_load_texts(train, val, &files, tokenizer, vocab, err);
    file_list_free(&files);
    train->name = xstrdup(arg);
    if (val) val->name = format("the last tenth of %s", arg);
    return result;
}

// Opens both sets. Without val_arg the first nine tenths of the training data train, the rest validates.
// `tokenizer` (NULL: bytes) is for texts; every token is checked to lie below `vocab`.
int data_open(DataSet *train, DataSet *val, const char *train_arg, const char *val_arg, const Tokenizer *tokenizer, int64_t vocab, char *err) {
    memset(train, 0, sizeof *train);
    memset(val, 0, sizeof *val);
    int result = data_load(train, val_arg ? NULL : val, train_arg, tokenizer, vocab, err);
    if (!result && val_arg) result = data_load(val, NULL, val_arg, tokenizer, vocab, err);
    if (result) {
        data_free(train);
        data_free(val);
    }
    return result;
}

// The same for a text in memory, which is copied.
int data_from_memory(DataSet *train, DataSet *val, const char *text, int64_t len, const Tokenizer *tokenizer, int64_t vocab, char *err) {
    FileMap file = {(const unsigned char *)memcpy(xmalloc((size_t)len + 1), text, (size_t)len), len, 0};
    DataBuffer *buffer = buffer_new(file);
    memset(train, 0, sizeof *train);
    memset(val, 0, sizeof *val);
    train->name = xstrdup("the built-in corpus");
    val->name = xstrdup("the last tenth of the built-in corpus");
    int result = data_split_text(train, val, buffer, tokenizer, vocab, err);
    buffer_release(buffer);
    if (result) {
        data_free(train);
        data_free(val);
        return fail(err, "the built-in corpus: %s", err);
    }
    return 0;
}

// Is there at least one window of T + 1 tokens? `option` is the one that named the data.
int data_check(const DataSet *d, int T, const char *option, char *err) {
    int64_t longest = 0;
    for (int i = 0; i < d->num_streams; i++)
        if (d->streams[i].count > longest) longest = d->streams[i].count;
    if (longest > T) return 0;
    return fail(err, "%s: %s has only %" PRId64 " tokens%s, but -t %d needs %d: give more text or a smaller -t", option,
                d->name ? d->name : "the data", longest, d->num_streams > 1 ? " in its longest file" : "", T, T + 1);
}

// ----------------------------------------------------------------------------
// The order of training: windows of T + 1 tokens at stride T (so that every token but the first is
// predicted once), from a random phase, shuffled anew each epoch. Which window is sequence number s of the
// run follows from the seed and s alone, so any batch size, any number of ranks and any resumed run agree.

typedef struct {
    uint64_t seed;
    int T;
    int64_t epoch, index;  // where the next window stands
    int64_t windows;       // in an epoch
    int64_t *first;        // (num_streams + 1) number of each stream's first window
} Order;

enum { ORDER_SHUFFLE = 0x4f524452, ORDER_PHASE = 0x50484153 };  // upper halves of Philox streams; the epoch is the lower

// The number of windows must not depend on the phase, or sequence numbers would not say in which epoch
// they lie: a stream has as many as fit from the last phase, but at least one if it is long enough.
int64_t order_stream_windows(int64_t count, int T) { return count > T ? (count < 2 * (int64_t)T ? 1 : count / T - 1) : 0; }

void order_init(Order *o, const DataSet *d, int T, uint64_t seed) {
    memset(o, 0, sizeof *o);
    o->seed = seed;
    o->T = T;
    o->first = (int64_t *)xcalloc((size_t)d->num_streams + 1, sizeof(int64_t));
    for (int i = 0; i < d->num_streams; i++) o->first[i + 1] = o->first[i] + order_stream_windows(d->streams[i].count, T);
    o->windows = o->first[d->num_streams];
    if (o->windows < 1) die(2, "%s is too short for sequences of %d tokens: give more text or a smaller -t", d->name ? d->name : "the data", T);
}

void order_free(Order *o) {
    free(o->first);
    o->first = NULL;
}

void order_seek(Order *o, int64_t sequence) {
    o->epoch = sequence / o->windows;
    o->index = sequence % o->windows;
}

// Place `index` of a random permutation of 0 .. n-1, computed, not stored: a Feistel network permutes
// the numbers of an even count of bits, and what falls behind n goes round again until it does not. So
// an epoch of billions of windows takes no memory, and seeking takes no time.
int64_t order_shuffle(uint64_t seed, uint64_t stream, int64_t index, int64_t n) {
    int half = 1;
    while (half < 31 && (int64_t)1 << (2 * half) < n) half++;
    uint64_t x = (uint64_t)index, mask = ((uint64_t)1 << half) - 1;
    do {
        uint64_t left = x >> half, right = x & mask;
        for (uint64_t round = 0; round < 8; round++) {
            uint32_t words[4];
            philox_block(words, seed, stream, round << 32 | right);
            uint64_t mixed = (left ^ words[0]) & mask;
            left = right;
            right = mixed;
        }
        x = left << half | right;
    } while (x >= (uint64_t)n);
    return (int64_t)x;
}

// Writes the next window, T + 1 tokens, and returns its sequence number.
int64_t order_next(Order *o, const DataSet *d, int *tokens) {
    int64_t sequence = o->epoch * o->windows + o->index, T = o->T;
    int64_t window = order_shuffle(o->seed, (uint64_t)ORDER_SHUFFLE << 32 | (uint64_t)o->epoch, o->index, o->windows);
    Rng rng = {o->seed, (uint64_t)ORDER_PHASE << 32 | (uint64_t)o->epoch, 0};
    int64_t phase = (int64_t)rng_below(&rng, (uint64_t)T);
    int low = 0, high = d->num_streams;  // the stream with first[low] <= window < first[low + 1]
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (o->first[middle] <= window) low = middle;
        else high = middle;
    }
    const TokenStream *s = &d->streams[low];
    if (s->count < 2 * T) phase %= s->count - T;  // the one window of a short stream must fit
    stream_read(s, phase + (window - o->first[low]) * T, T + 1, tokens);
    if (++o->index == o->windows) {
        o->index = 0;
        o->epoch++;
    }
    return sequence;
}

// ----------------------------------------------------------------------------
// Validation reads consecutive windows from the start, the same at every evaluation

int64_t data_val_windows(const DataSet *d, int T) {
    int64_t n = 0;
    for (int i = 0; i < d->num_streams; i++) n += (d->streams[i].count - 1) / T;
    return n;
}

// The i-th window of T + 1 tokens: 1, or 0 where there is none.
int data_val_window(const DataSet *d, int T, int64_t i, int *tokens) {
    for (int k = 0; k < d->num_streams && i >= 0; k++) {
        int64_t n = (d->streams[k].count - 1) / T;
        if (i < n) {
            stream_read(&d->streams[k], i * T, T + 1, tokens);
            return 1;
        }
        i -= n;
    }
    return 0;
}

// ----------------------------------------------------------------------------
// 5. Layers

// ----------------------------------------------------------------------------
// Matrix products. Everything expensive in this program ends in tile_multiply: a
// few rows of A times a few vectors of B, held in registers while it runs down k.

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#if defined(__CUDACC__)
#define UNROLL
#elif defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

typedef real Vector __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));
enum {
    VECTOR = VECTOR_BYTES / (int)sizeof(real),      // numbers in a vector
    MR = VECTOR_BYTES == 64 ? 12 : 6,               // rows of a tile: MR * NRV accumulators fill the register file
    NRV = 2, NR = NRV * VECTOR,                     // columns of a tile
    KC = 384, MC = 8 * MR, NC = 2048                // cache blocking of the packed product
};

static inline int thread_count(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

static inline int thread_index(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// c (rows,NR) = or += a (rows,k) · b (k,NR). a[i,p] lies at a[i*a_row + p*a_col]; rows of b and c are contiguous.
// `rows` is a constant wherever this is inlined, so that the accumulators are registers.
INLINE void tile_multiply(const int rows, int64_t k, const real *a, int64_t a_row, int64_t a_col,
                          const real *b, int64_t b_row, real *c, int64_t c_row, int accumulate) {
    Vector sum[MR][NRV];
    const Vector zero = {0};
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < NRV; j++) {
            if (accumulate) __builtin_prefetch(c + i * c_row + j * VECTOR);     // c is read when the sums are done
            sum[i][j] = zero;
        }
    for (int64_t p = 0; p < k; p++) {
        Vector bv[NRV];
        UNROLL for (int j = 0; j < NRV; j++) {
            bv[j] = *(const Vector *)(b + p * b_row + j * VECTOR);
            __builtin_prefetch(b + (p + 16) * b_row + j * VECTOR);      // b comes from the outer cache
        }
        UNROLL for (int i = 0; i < rows; i++) {
            const real x = a[i * a_row + p * a_col];
            UNROLL for (int j = 0; j < NRV; j++) sum[i][j] += x * bv[j];
        }
    }
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < NRV; j++) {
            Vector *out = (Vector *)(c + i * c_row + j * VECTOR);
            if (accumulate) sum[i][j] += *out;
            *out = sum[i][j];
        }
}

// One column panel: c (m,NR) = or += a (m,k) · b (k,NR), in tiles of MR, then MR/3, then single rows.
void panel_multiply(int64_t m, int64_t k, const real *a, int64_t a_row, int64_t a_col,
                    const real *b, int64_t b_row, real *c, int64_t c_row, int accumulate) {
    int64_t i = 0;
    for (; i + MR <= m; i += MR)
        tile_multiply(MR, k, a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row, accumulate);
    for (; i + MR / 3 <= m; i += MR / 3)
        tile_multiply(MR / 3, k, a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row, accumulate);
    for (; i < m; i++)
        tile_multiply(1, k, a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row, accumulate);
}

// c (m,n) = or += a (m,k) · b (k,n), one thread, nothing packed: for the small blocks of attention, which
// lie in the cache. A last panel narrower than NR goes through zero-padded copies.
void block_multiply(int64_t m, int64_t n, int64_t k, const real *a, int64_t a_row, int64_t a_col,
                    const real *b, int64_t b_row, real *c, int64_t c_row, int accumulate) {
    int64_t j = 0;
    for (; j + NR <= n; j += NR) panel_multiply(m, k, a, a_row, a_col, b + j, b_row, c + j, c_row, accumulate);
    int64_t rest = n - j;
    if (rest == 0) return;
    real panel[KC * NR], tile[MC * NR];
    for (int64_t p0 = 0; p0 < k; p0 += KC) {
        int64_t pk = min64(KC, k - p0);
        for (int64_t p = 0; p < pk; p++)
            for (int64_t x = 0; x < NR; x++) panel[p * NR + x] = x < rest ? b[(p0 + p) * b_row + j + x] : 0;
        for (int64_t i0 = 0; i0 < m; i0 += MC) {
            int64_t mi = min64(MC, m - i0);
            panel_multiply(mi, pk, a + i0 * a_row + p0 * a_col, a_row, a_col, panel, NR, tile, NR, 0);
            for (int64_t i = 0; i < mi; i++)
                for (int64_t x = 0; x < rest; x++) {
                    real *out = c + (i0 + i) * c_row + j + x;
                    *out = tile[i * NR + x] + (accumulate || p0 ? *out : 0);
                }
        }
    }
}

// Four numbers, for turning squares of 4x4 on their side in registers.
typedef real Vector4 __attribute__((vector_size(4 * sizeof(real)), aligned(sizeof(real)), may_alias));

// out[c * out_row + r] = in[r * in_row + c]
static inline void transpose(real *out, int64_t out_row, const real *in, int64_t in_row, int64_t rows, int64_t cols) {
    int64_t r = 0;
#if defined(__has_builtin) && !defined(__CUDACC__)
#if __has_builtin(__builtin_shufflevector)
    for (; r + 4 <= rows; r += 4) {
        const real *x = in + r * in_row;
        int64_t c = 0;
        for (; c + 4 <= cols; c += 4) {
            const Vector4 x0 = *(const Vector4 *)(x + c), x1 = *(const Vector4 *)(x + in_row + c);
            const Vector4 x2 = *(const Vector4 *)(x + 2 * in_row + c), x3 = *(const Vector4 *)(x + 3 * in_row + c);
            const Vector4 a = __builtin_shufflevector(x0, x1, 0, 4, 1, 5), b = __builtin_shufflevector(x0, x1, 2, 6, 3, 7);
            const Vector4 d = __builtin_shufflevector(x2, x3, 0, 4, 1, 5), e = __builtin_shufflevector(x2, x3, 2, 6, 3, 7);
            real *o = out + c * out_row + r;
            *(Vector4 *)o = __builtin_shufflevector(a, d, 0, 1, 4, 5);
            *(Vector4 *)(o + out_row) = __builtin_shufflevector(a, d, 2, 3, 6, 7);
            *(Vector4 *)(o + 2 * out_row) = __builtin_shufflevector(b, e, 0, 1, 4, 5);
            *(Vector4 *)(o + 3 * out_row) = __builtin_shufflevector(b, e, 2, 3, 6, 7);
        }
        for (; c < cols; c++)
            for (int64_t i = 0; i < 4; i++) out[c * out_row + r + i] = x[i * in_row + c];
    }
#endif
#endif
    for (; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) out[c * out_row + r] = in[r * in_row + c];
}

// Packs a (lines,k) matrix, x[i,p] at x[i*line + p*col], into panels of `width` lines: panel, then p, then line.
// The last panel is filled up with zeros, so that the inner loop never meets an edge.
INLINE void pack_panels(real *out, const int width, int64_t lines, int64_t k, const real *x, int64_t line, int64_t col) {
    for (int64_t i0 = 0; i0 < lines; i0 += width, out += k * width) {
        const int64_t w = min64(width, lines - i0);
        const real *from = x + i0 * line;
        if (w < width) memset(out, 0, (size_t)(k * width) * sizeof(real));
        if (line == 1 && w == width)
            for (int64_t p = 0; p < k; p++) memcpy(out + p * width, from + p * col, (size_t)width * sizeof(real));
        else if (col == 1)
            transpose(out, width, from, line, w, k);
        else
            for (int64_t p = 0; p < k; p++)
                for (int64_t i = 0; i < w; i++) out[p * width + i] = from[i * line + p * col];
    }
}

// Cuts `n` into equal parts of at most `most`, each a multiple of `step`.
static inline int64_t equal_part(int64_t n, int64_t most, int64_t step) {
    const int64_t parts = (n + most - 1) / most;
    return round_up((n + parts - 1) / parts, step);
}

// A thread's packed panels: of a, then of b. Taken at its first product, kept for all later ones.
enum { PACK_A = MC * KC, PACK_B = KC * (NC + NR) };
static __thread real *pack_memory;

// One thread's share of matmul: the classic blocking (Goto and van de Geijn 2008): panels of b in the outer cache,
// panels of a in the inner one, the tile in registers.
static void packed_multiply(int64_t m, int64_t n, int64_t k, const real *a, int64_t a_row, int64_t a_col,
                            const real *b, int64_t b_row, int64_t b_col, real *c, int64_t c_row, int accumulate) {
    const int64_t nc = equal_part(n, NC, NR), kc = equal_part(k, KC, 4);
    if (!pack_memory) pack_memory = (real *)xmalloc((PACK_A + PACK_B) * sizeof(real));
    real *pack_a = pack_memory, *pack_b = pack_memory + PACK_A;
    for (int64_t j0 = 0; j0 < n; j0 += nc)
        for (int64_t p0 = 0; p0 < k; p0 += kc) {
            int64_t nj = min64(nc, n - j0), kp = min64(kc, k - p0);
            int add = accumulate || p0 > 0;
            pack_panels(pack_b, NR, nj, kp, b + p0 * b_row + j0 * b_col, b_col, b_row);
            for (int64_t i0 = 0; i0 < m; i0 += MC) {
                int64_t mi = min64(MC, m - i0);
                pack_panels(pack_a, MR, mi, kp, a + i0 * a_row + p0 * a_col, a_row, a_col);
                for (int64_t j = 0; j < nj; j += NR)
                    for (int64_t i = 0; i < mi; i += MR) {
                        real *out = c + (i0 + i) * c_row + j0 + j;
                        const real *ap = pack_a + i * kp, *bp = pack_b + j * kp;
                        int64_t rows = min64(MR, mi - i), cols = min64(NR, nj - j);
                        if (rows == MR && cols == NR) {
                            tile_multiply(MR, kp, ap, 1, MR, bp, NR, out, c_row, add);
                        } else {
                            real tile[MR * NR];
                            tile_multiply(MR, kp, ap, 1, MR, bp, NR, tile, NR, 0);
                            for (int64_t r = 0; r < rows; r++)
                                for (int64_t x = 0; x < cols; x++)
                                    out[r * c_row + x] = tile[r * NR + x] + (add ? out[r * c_row + x] : 0);
                        }
                    }
            }
        }
}

// A product with a handful of rows is bound by reading b once; packing it would read it twice.
static void few_rows_multiply(int64_t m, int64_t n, int64_t k, const real *a, int64_t a_row,
                              const real *b, int64_t b_col, real *c, int64_t c_row, int accumulate) {
    #pragma omp parallel for if (n * k > 32768)
    for (int64_t j = 0; j < n; j++)
        for (int64_t i = 0; i < m; i++) {
            const real *x = a + i * a_row, *y = b + j * b_col;
            real sum = 0;
            #pragma omp simd reduction(+ : sum)
            for (int64_t p = 0; p < k; p++) sum += x[p] * y[p];
            c[i * c_row + j] = sum + (accumulate ? c[i * c_row + j] : 0);
        }
}

// c (m,n) = or += a (m,k) · b (k,n), rows of c contiguous, a and b through any strides; all threads.
void matmul(int64_t m, int64_t n, int64_t k, const real *a, int64_t a_row, int64_t a_col,
            const real *b, int64_t b_row, int64_t b_col, real *c, int64_t c_row, int accumulate) {
    if (m == 0 || n == 0 || k == 0) return;
    if (m <= 3 && a_col == 1 && b_row == 1) {
        few_rows_multiply(m, n, k, a, a_row, b, b_col, c, c_row, accumulate);
        return;
    }
#ifdef USE_CBLAS
    // A matrix as it lies, or turned: a vector may look like both, and only one has room for its rows.
    const int a_plain = a_col == 1 && a_row >= k, b_plain = b_col == 1 && b_row >= n;
    if ((a_plain || (a_row == 1 && a_col >= m)) && (b_plain || (b_row == 1 && b_col >= k))) {
        const CBLAS_TRANSPOSE ta = a_plain ? CblasNoTrans : CblasTrans, tb = b_plain ? CblasNoTrans : CblasTrans;
        const int lda = (int)(a_plain ? a_row : a_col), ldb = (int)(b_plain ? b_row : b_col);
        if (sizeof(real) == 4)
            cblas_sgemm(CblasRowMajor, ta, tb, (int)m, (int)n, (int)k, 1, (const float *)a, lda, (const float *)b, ldb,
                        (float)accumulate, (float *)c, (int)c_row);
        else
            cblas_dgemm(CblasRowMajor, ta, tb, (int)m, (int)n, (int)k, 1, (const double *)a, lda, (const double *)b, ldb,
                        accumulate, (double *)c, (int)c_row);
        return;
    }
#endif
    // A grid of threads over c: the one whose parts have the least edge packs the least.
    int threads = m * n * k > 64 * 64 * 64 ? thread_count() : 1, grid_m = 1;
    int64_t least = INT64_MAX;
    for (int g = 1; g <= threads; g++) {
        if (threads % g) continue;
        int64_t part_m = round_up((m + g - 1) / g, MR), part_n = round_up((n + threads / g - 1) / (threads / g), NR);
        int64_t cost = part_m * part_n * 64 + (part_m + part_n) * 64 * 8;
        if (cost < least) least = cost, grid_m = g;
    }
    int grid_n = threads / grid_m;
    int64_t part_m = round_up((m + grid_m - 1) / grid_m, MR), part_n = round_up((n + grid_n - 1) / grid_n, NR);
    #pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int part = 0; part < threads; part++) {
        int64_t i = (part % grid_m) * part_m, j = (part / grid_m) * part_n;
        if (i < m && j < n)
            packed_multiply(min64(part_m, m - i), min64(part_n, n - j), k, a + i * a_row, a_row, a_col,
                            b + j * b_col, b_row, b_col, c + i * c_row + j, c_row, accumulate);
    }
}

// A linear layer: out (N,OC) = inp (N,C) · weight (OC,C)ᵀ. Rows of inp and out lie inp_row and out_row apart, so that
// several projections of the same input are one product with one wide output.
void linear_forward(real *out, int64_t out_row, const real *inp, int64_t inp_row, const real *weight,
                    int64_t n, int64_t c, int64_t oc) {
    matmul(n, oc, c, inp, inp_row, 1, weight, 1, c, out, out_row, 0);
}

// dinp (N,C) = or += dout (N,OC) · weight; dweight (OC,C) += doutᵀ · inp. dinp may be NULL.
void linear_backward(real *dinp, int64_t dinp_row, real *dweight, const real *dout, int64_t dout_row,
                     const real *inp, int64_t inp_row, const real *weight,
                     int64_t n, int64_t c, int64_t oc, int accumulate_dinp) {
    if (dinp) matmul(n, c, oc, dout, dout_row, 1, weight, c, 1, dinp, dinp_row, accumulate_dinp);
    matmul(oc, c, n, dout, 1, dout_row, inp, inp_row, 1, dweight, c, 1);
}

// ----------------------------------------------------------------------------
// Small functions

// exp for the inner loops: in float a polynomial without branches (relative error 1e-7), so that the compiler makes
// vectors of it; in double the library's. Below -87 it is 0, and NaN stays NaN.
DEVICE static inline real fast_exp(real x) {
    if (sizeof(real) == sizeof(double)) return (real)exp((double)x);
    float z = (float)x, y = z > -87.0f ? z : -87.0f;
    y = y < 88.0f ? y : 88.0f;
    float shifted = y * 1.44269504f + 12582912.0f;      // 1.5 * 2^23: the integer part moves into the low mantissa bits
    float n = shifted - 12582912.0f;
    float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;      // ln 2 in two parts
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720; p = p * r + 1.0f / 120; p = p * r + 1.0f / 24; p = p * r + 1.0f / 6; p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    uint32_t bits;
    float power;        // 2^n: n + 127 moved into the exponent
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127u) << 23;
    memcpy(&power, &bits, sizeof power);
    return z < -87.0f ? 0 : (real)(p * power + (z - z));
}

static inline real root(real x) { return sizeof(real) == sizeof(double) ? (real)sqrt((double)x) : (real)sqrtf((float)x); }
DEVICE static inline real sigmoid(real x) { return 1 / (1 + fast_exp(-x)); }

// GELU in its tanh form, written with a sigmoid: tanh(u) = 2 sigmoid(2u) - 1.
static const double gelu_c = 0.79788456080286535588, gelu_k = 0.044715;       // sqrt(2/pi), Hendrycks and Gimpel 2016
DEVICE static inline real gelu(real x) { return x * sigmoid((real)(2 * gelu_c) * (x + (real)gelu_k * x * x * x)); }
DEVICE static inline real gelu_slope(real x) {
    real s = sigmoid((real)(2 * gelu_c) * (x + (real)gelu_k * x * x * x));
    return s + x * s * (1 - s) * (real)(2 * gelu_c) * (1 + (real)(3 * gelu_k) * x * x);
}

static inline real dot(const real *a, const real *b, int64_t n) {
    real sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

// ----------------------------------------------------------------------------
// RMSNorm: out = inp / sqrt(mean(inp²) + eps) * weight. inp, out (N,C), rstd (N) is 1/sqrt(...), kept for backward.

void rmsnorm_forward(real *out, real *rstd, const real *inp, const real *weight, int64_t n, int64_t c, double eps) {
    #pragma omp parallel for if (n * c > 4096)
    for (int64_t i = 0; i < n; i++) {
        const real *x = inp + i * c;
        real s = 1 / (real)sqrt((double)dot(x, x, c) / (double)c + eps), *o = out + i * c;
        for (int64_t j = 0; j < c; j++) o[j] = x[j] * s * weight[j];
        rstd[i] = s;
    }
}

// The normalised input again, from the saved rstd: cheaper to make twice than to keep.
void rmsnorm_again(real *out, const real *rstd, const real *inp, const real *weight, int64_t n, int64_t c) {
    #pragma omp parallel for if (n * c > 4096)
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < c; j++) out[i * c + j] = inp[i * c + j] * rstd[i] * weight[j];
}

// With y = x·rstd: dx += rstd·(dy·w - y·mean(dy·w·y)); dw += Σ dy·y. Threads share the columns of dw, in row order.
void rmsnorm_backward(real *dinp, real *dweight, const real *dout, const real *inp, const real *rstd,
                      const real *weight, int64_t n, int64_t c) {
    #pragma omp parallel for if (n * c > 4096)
    for (int64_t i = 0; i < n; i++) {
        const real *x = inp + i * c, *dy = dout + i * c;
        real s = rstd[i], mean = 0, *dx = dinp + i * c;
        #pragma omp simd reduction(+ : mean)
        for (int64_t j = 0; j < c; j++) mean += dy[j] * weight[j] * x[j];
        mean *= s * s / (real)c;
        for (int64_t j = 0; j < c; j++) dx[j] += s * (dy[j] * weight[j] - x[j] * mean);
    }
    #pragma omp parallel for if (n * c > 4096)
    for (int64_t j0 = 0; j0 < c; j0 += 64)
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = j0; j < min64(j0 + 64, c); j++) dweight[j] += dout[i * c + j] * inp[i * c + j] * rstd[i];
}

// ----------------------------------------------------------------------------
// RoPE: the pair (x_j, x_{j+D/2}) turns by position · theta^(-2j/D) (rotate_half convention). In place on x, whose N rows
// lie x_row apart and hold `heads` heads of D; row i stands at position (i % period) * step. `turn` is +1 forward;
// backward is the opposite turn (-1), the transpose of a rotation.

// One row of the table: D/2 cosines, then D/2 sines.
void rope_angles(real *row, int64_t position, int d, double theta) {
    for (int j = 0; j < d / 2; j++) {
        const double angle = (double)position * pow(theta, -2.0 * j / d);
        row[j] = (real)cos(angle);
        row[d / 2 + j] = (real)sin(angle);
    }
}

void rope_table(real *table, int64_t positions, int d, double theta) {
    #pragma omp parallel for
    for (int64_t p = 0; p < positions; p++) rope_angles(table + p * d, p, d, theta);
}

void rope(real *x, int64_t x_row, const real *table, int64_t n, int64_t period, int64_t step, int heads, int d, int turn) {
    #pragma omp parallel for if (n * heads * d > 4096)
    for (int64_t i = 0; i < n; i++) {
        const real *cosine = table + (i % period) * step * d, *sine = cosine + d / 2;
        for (int h = 0; h < heads; h++) {
            real *a = x + i * x_row + h * d, *b = a + d / 2;
            for (int j = 0; j < d / 2; j++) {
                real aj = a[j], bj = b[j], sj = (real)turn * sine[j];
                a[j] = aj * cosine[j] - bj * sj;
                b[j] = bj * cosine[j] + aj * sj;
            }
        }
    }
}

// ----------------------------------------------------------------------------
// Attention. Every branch of NSA, and full attention, is softmax(q·kᵀ/sqrt(D))·v under one of three masks, so that one
// kernel serves all. It works as FlashAttention does (Dao 2022): a tile of queries meets the keys block by block
// with a running maximum and sum, and what is kept for backward is the log-sum-exp of each row; no (T,T) array exists.
//
// The G = H/KV query heads that share a key head are rows of the same small matrix products. In the selection
// branch the queries of a tile choose differently: for each key block, the queries that took it are gathered.

enum { MASK_WINDOW, MASK_COMPRESSED, MASK_SELECTED };

typedef struct Mask {
    int kind;
    int64_t window;             // WINDOW: query t sees keys t-window+1 .. t; full attention is a window as long as the text
    int block, stride;          // COMPRESSED: key i is seen iff i·stride + block - 1 <= t
    int sel_block, n;           // SELECTED: keys <= t of the blocks block_idx (B,T,KV,n), ascending, -1 behind the last
    const int *block_idx;
    const unsigned char *order; // SELECTED, on Hopper: (B,KV,T), the order in which queries are taken together (train_nsa.cu)
} Mask;

// How many compressed blocks a query at position t sees; with t = T-1 it is Nc = (T-l)/d + 1, the number of blocks.
DEVICE static inline int64_t compressed_seen(int64_t t, int block, int stride) {
    return t + 1 < block ? 0 : (t + 1 - block) / stride + 1;
}

// The keys [lo, hi) that the query at position t may see (selection: within its blocks).
DEVICE static inline void key_range(const Mask *mask, int64_t t, int64_t *lo, int64_t *hi) {
    *lo = mask->kind == MASK_WINDOW ? max64(0, t - mask->window + 1) : 0;
    *hi = mask->kind == MASK_COMPRESSED ? compressed_seen(t, mask->block, mask->stride) : t + 1;
}

// Sizes of an attention call. q (B,T,H,D), k (B,Tk,KV,D), v (B,Tk,KV,Dv): tokens lie q_row, k_row, v_row numbers apart. Query t is the one of
// position t0 + t: more than 0 where q is a piece of the text (--context-parallel).
typedef struct AttentionShape {
    int64_t B, T, Tk;
    int H, KV, D, Dv;
    int64_t q_row, k_row, v_row, t0;
} AttentionShape;

enum { TILE_ROWS = 768, CHUNK_ROWS = 96, KEY_BLOCK = 64 };

static inline int64_t tile_queries(const AttentionShape *s) {
    return min64(max64(1, TILE_ROWS / (s->H / s->KV)), s->T);
}
static inline int64_t chunk_queries(const AttentionShape *s) { return max64(1, CHUNK_ROWS / (s->H / s->KV)); }
static inline int64_t key_block(const Mask *mask) { return mask->kind == MASK_SELECTED ? mask->sel_block : KEY_BLOCK; }

// Keys turned on their side once a call, so that S = q·kᵀ reads rows: (B,KV,blocks,width,block), zero behind the last key.
static inline int64_t side_row(int64_t block) { return round_up(block, NR); }
static inline int64_t side_size(int64_t block, int64_t tk, int width) { return (tk + block - 1) / block * width * side_row(block); }

void turn_on_side(real *out, const real *x, int64_t x_row, int64_t B, int64_t tk, int kv, int width, int64_t block) {
    int64_t blocks = (tk + block - 1) / block, row = side_row(block);
    #pragma omp parallel for collapse(2)
    for (int64_t bh = 0; bh < B * kv; bh++)
        for (int64_t j = 0; j < blocks; j++) {
            real *o = out + (bh * blocks + j) * width * row;
            int64_t rows = min64(block, tk - j * block);
            if (rows < row) memset(o, 0, (size_t)(width * row) * sizeof(real));
            transpose(o, row, x + ((bh / kv) * tk + j * block) * x_row + (bh % kv) * width, x_row, rows, width);
        }
}

// Which queries of a tile visit which key block: `queries` (relative to the tile) sorted by block, start[j] the first of
// block first + j. For the windows this is a range of consecutive queries; for selection it is the inverse of block_idx.
typedef struct Visits { int64_t first, blocks; int *start, *count, *queries; int consecutive; } Visits;

static void find_visits(Visits *visits, const Mask *mask, const AttentionShape *s, int64_t b, int kv, int64_t t0, int64_t t1) {
    int64_t block = key_block(mask), lo, hi, unused;
    key_range(mask, s->t0 + t0, &lo, &unused);
    key_range(mask, s->t0 + t1 - 1, &unused, &hi);
    visits->first = lo / block;
    visits->blocks = hi > lo ? (hi + block - 1) / block - visits->first : 0;
    visits->consecutive = mask->kind != MASK_SELECTED;
    if (visits->consecutive) {
        for (int64_t t = t0; t < t1; t++) visits->queries[t - t0] = (int)(t - t0);
        for (int64_t j = 0, from = t0, to = t0; j < visits->blocks; j++) {
            int64_t k0 = (visits->first + j) * block;       // query t visits iff lo(t) < k0 + block and hi(t) > k0
            for (; from < t1; from++) { key_range(mask, s->t0 + from, &lo, &hi); if (hi > k0) break; }
            for (to = max64(to, from); to < t1; to++) { key_range(mask, s->t0 + to, &lo, &hi); if (lo >= k0 + block) break; }
            visits->start[j] = (int)(from - t0);
            visits->count[j] = (int)(to - from);
        }
        return;
    }
    const int *idx = mask->block_idx + ((b * s->T + t0) * s->KV + kv) * mask->n;
    int64_t idx_row = (int64_t)s->KV * mask->n;
    memset(visits->count, 0, (size_t)visits->blocks * sizeof(int));
    for (int64_t t = 0; t < t1 - t0; t++)
        for (int i = 0; i < mask->n && idx[t * idx_row + i] >= 0; i++) visits->count[idx[t * idx_row + i]]++;
    for (int64_t j = 0, sum = 0; j < visits->blocks; j++) {
        visits->start[j] = (int)sum;
        sum += visits->count[j];
        visits->count[j] = 0;
    }
    for (int64_t t = 0; t < t1 - t0; t++)
        for (int i = 0; i < mask->n && idx[t * idx_row + i] >= 0; i++) {
            int j = idx[t * idx_row + i];
            visits->queries[visits->start[j] + visits->count[j]++] = (int)t;
        }
}

// One thread's working memory for a tile, carved from `memory`; returns the numbers it needs (memory NULL: only counts).
typedef struct TileScratch {
    real *q, *o, *dout, *dq, *max, *sum;                    // the tile, row (t,g): (rows,D), (rows,Dv), ...; max doubles as lse, sum as delta
    real *chunk_q, *chunk_o, *chunk_dq, *scores, *dscores;  // the gathered rows and their (rows, block) scores
    Visits visits;
} TileScratch;

static real *take(real **memory, int64_t *used, int64_t n) {
    real *p = *memory ? *memory + *used : NULL;
    *used += round_up(n, 16);
    return p;
}

int64_t tile_scratch(TileScratch *w, real *memory, const AttentionShape *s, const Mask *mask, int backward) {
    int64_t g = s->H / s->KV, rows = tile_queries(s) * g, chunk = chunk_queries(s) * g, block = key_block(mask), used = 0;
    int64_t blocks = (s->Tk + block - 1) / block, per_int = (int64_t)(sizeof(real) / sizeof(int));
    int64_t queries = tile_queries(s) * (mask->kind == MASK_SELECTED ? mask->n : 1);
    w->q = take(&memory, &used, rows * s->D);
    w->o = take(&memory, &used, rows * s->Dv);
    w->dout = backward ? take(&memory, &used, rows * s->Dv) : NULL;
    w->dq = backward ? take(&memory, &used, rows * s->D) : NULL;
    w->max = take(&memory, &used, rows);
    w->sum = take(&memory, &used, rows);
    w->chunk_q = take(&memory, &used, chunk * s->D);
    w->chunk_o = take(&memory, &used, chunk * s->Dv);
    w->chunk_dq = backward ? take(&memory, &used, chunk * s->D) : NULL;
    w->scores = take(&memory, &used, chunk * side_row(block));
    w->dscores = backward ? take(&memory, &used, chunk * side_row(block)) : NULL;
    w->visits.start = (int *)take(&memory, &used, blocks / per_int + 1);
    w->visits.count = (int *)take(&memory, &used, blocks / per_int + 1);
    w->visits.queries = (int *)take(&memory, &used, queries / per_int + 1);
    return used;
}

// Rows (t,g) of a chunk of queries, to or from the tile (rows of `width`); one query is g consecutive rows.
static inline void gather(real *out, const real *tile, const int *queries, int64_t count, int64_t size) {
    for (int64_t i = 0; i < count; i++) memcpy(out + i * size, tile + queries[i] * size, (size_t)size * sizeof(real));
}
static inline void scatter(real *tile, const real *in, const int *queries, int64_t count, int64_t size) {
    for (int64_t i = 0; i < count; i++) memcpy(tile + queries[i] * size, in + i * size, (size_t)size * sizeof(real));
}

// Hides what lies outside [from, to) of a row of scores: exp makes 0 of it. Whole rows of whole vectors then go through
// the loops below, which is faster than cutting them to what is seen.
static inline void hide_outside(real *p, int64_t from, int64_t to, int64_t width) {
    for (int64_t c = 0; c < from; c++) p[c] = -INFINITY;
    for (int64_t c = to; c < width; c++) p[c] = -INFINITY;
}

// The running softmax (Milakov and Gimelshein 2018) of one row over one block: scores become p = exp(s - max).
static inline void softmax_row(real *p, int64_t from, int64_t to, int64_t width, real *max, real *sum, real *o, int dv) {
    real top = *max, total = 0;
    hide_outside(p, from, to, width);
    #pragma omp simd reduction(max : top)
    for (int64_t c = 0; c < width; c++) top = p[c] > top ? p[c] : top;
    #pragma omp simd reduction(+ : total)
    for (int64_t c = 0; c < width; c++) { p[c] = fast_exp(p[c] - top); total += p[c]; }
    if (top > *max) {
        real shrink = fast_exp(*max - top);
        *sum *= shrink;
        for (int j = 0; j < dv; j++) o[j] *= shrink;
        *max = top;
    }
    *sum += total;
}

// out (B,T,H,Dv) and lse (B,T,H): softmax attention under the mask; a query that sees nothing gets 0 and -inf.
// side_k: memory of B·KV·side_size(key_block, Tk, D); memory: thread_count() · tile_scratch(...).
void attention_forward(real *out, real *lse, const real *q, const real *k, const real *v, const Mask *mask,
                       const AttentionShape *s, real *side_k, real *memory) {
    const int64_t T = s->T, H = s->H, KV = s->KV, D = s->D, Dv = s->Dv, G = H / KV;
    const int64_t block = key_block(mask), row = side_row(block), tq = tile_queries(s), tiles = (T + tq - 1) / tq;
    const int64_t side = side_size(block, s->Tk, s->D);
    const real scale = 1 / (real)sqrt((double)D);
    TileScratch sizes;
    const int64_t scratch = tile_scratch(&sizes, NULL, s, mask, 0);
    turn_on_side(side_k, k, s->k_row, s->B, s->Tk, s->KV, s->D, block);
    #pragma omp parallel for schedule(dynamic)
    for (int64_t item = 0; item < s->B * KV * tiles; item++) {
        const int64_t b = item / (KV * tiles), kv = item / tiles % KV, t0 = (tiles - 1 - item % tiles) * tq, t1 = min64(t0 + tq, T);
        TileScratch w;
        tile_scratch(&w, memory + thread_index() * scratch, s, mask, 0);
        find_visits(&w.visits, mask, s, b, (int)kv, t0, t1);
        for (int64_t t = t0; t < t1; t++)
            for (int64_t j = 0; j < G * D; j++) w.q[(t - t0) * G * D + j] = q[(b * T + t) * s->q_row + kv * G * D + j] * scale;
        memset(w.o, 0, (size_t)((t1 - t0) * G * Dv) * sizeof(real));
        for (int64_t r = 0; r < (t1 - t0) * G; r++) { w.max[r] = -INFINITY; w.sum[r] = 0; }

        for (int64_t j = 0; j < w.visits.blocks; j++) {
            const int64_t k0 = (w.visits.first + j) * block, keys = min64(block, s->Tk - k0), width = round_up(keys, NR);
            const real *side_j = side_k + (b * KV + kv) * side + (w.visits.first + j) * D * row;
            const real *v_j = v + (b * s->Tk + k0) * s->v_row + kv * Dv;
            for (int64_t i0 = 0; i0 < w.visits.count[j]; i0 += chunk_queries(s)) {
                const int64_t count = min64(chunk_queries(s), w.visits.count[j] - i0);
                const int *queries = w.visits.queries + w.visits.start[j] + i0;
                real *qc = w.visits.consecutive ? w.q + queries[0] * G * D : w.chunk_q;
                real *oc = w.visits.consecutive ? w.o + queries[0] * G * Dv : w.chunk_o;
                if (!w.visits.consecutive) {
                    gather(qc, w.q, queries, count, G * D);
                    gather(oc, w.o, queries, count, G * Dv);
                }
                block_multiply(count * G, width, D, qc, D, 1, side_j, row, w.scores, row, 0);
                for (int64_t i = 0; i < count; i++) {
                    int64_t lo, hi;
                    key_range(mask, s->t0 + t0 + queries[i], &lo, &hi);
                    for (int64_t g = 0; g < G; g++)
                        softmax_row(w.scores + (i * G + g) * row, max64(lo - k0, 0), min64(hi - k0, keys), width,
                                    &w.max[queries[i] * G + g], &w.sum[queries[i] * G + g], oc + (i * G + g) * Dv, s->Dv);
                }
                block_multiply(count * G, Dv, keys, w.scores, row, 1, v_j, s->v_row, oc, Dv, 1);
                if (!w.visits.consecutive) scatter(w.o, oc, queries, count, G * Dv);
            }
        }
        for (int64_t r = 0; r < (t1 - t0) * G; r++) {
            const int64_t th = (b * T + t0 + r / G) * H + kv * G + r % G;
            const real inverse = w.sum[r] > 0 ? 1 / w.sum[r] : w.sum[r];      // a NaN stays one
            lse[th] = w.sum[r] == 0 ? -INFINITY : w.max[r] + (real)log((double)w.sum[r]);
            for (int64_t c = 0; c < Dv; c++) out[th * Dv + c] = w.o[r * Dv + c] * inverse;
        }
    }
}

// How many threads share the queries of one (b, kv) in backward: where there are fewer (b, kv) than threads, each takes
// some tiles and sums dk and dv of its own, added up in a fixed order afterwards (the same bits on every run).
int64_t attention_parts(const AttentionShape *s) {
    int64_t items = s->B * s->KV, threads = thread_count(), parts = 1;
    while (items * parts < 4 * threads && items * parts % threads) parts++;
    return parts;
}

// dq, dk, dv (strided as q, k, v) += the gradients of attention_forward, given dout (B,T,H,Dv); `gate` (B,T,H,·), element
// gate[th*gate_row], multiplies dout (NULL: 1) as it multiplied out (section 3.2: do_b = g_b·do), out and lse are what
// forward left. P = exp(S - lse), dV += PᵀdO, dP = dO·Vᵀ, dS = P∘(dP - <dO,O>), dQ += dS·K, dK += dSᵀQ.
// side_k, side_v: B·KV·side_size; parts_memory: attention_parts·B·Tk·KV·(D+Dv) numbers where parts > 1.
void attention_backward(real *dq, real *dk, real *dv, const real *dout, const real *gate, int64_t gate_row,
                        const real *out, const real *lse, const real *q, const real *k, const real *v, const Mask *mask,
                        const AttentionShape *s, real *side_k, real *side_v, real *parts_memory, real *memory) {
    const int64_t T = s->T, Tk = s->Tk, H = s->H, KV = s->KV, D = s->D, Dv = s->Dv, G = H / KV;
    const int64_t block = key_block(mask), row = side_row(block), tq = tile_queries(s), tiles = (T + tq - 1) / tq;
    const int64_t side = side_size(block, Tk, s->D), side_of_v = side_size(block, Tk, s->Dv);
    const int64_t parts = attention_parts(s), part_size = s->B * Tk * KV * (D + Dv);
    const real scale = 1 / (real)sqrt((double)D);
    TileScratch sizes;
    const int64_t scratch = tile_scratch(&sizes, NULL, s, mask, 1);
    turn_on_side(side_k, k, s->k_row, s->B, Tk, s->KV, s->D, block);
    turn_on_side(side_v, v, s->v_row, s->B, Tk, s->KV, s->Dv, block);
    if (parts > 1) memset(parts_memory, 0, (size_t)(parts * part_size) * sizeof(real));
    #pragma omp parallel for schedule(dynamic)
    for (int64_t item = 0; item < s->B * KV * parts; item++) {
        const int64_t b = item / (KV * parts), kv = item / parts % KV, part = item % parts;
        real *own = parts_memory + part * part_size;        // laid out (B,Tk,KV,D), then (B,Tk,KV,Dv)
        real *dk_own = parts > 1 ? own : dk, *dv_own = parts > 1 ? own + s->B * Tk * KV * D : dv;
        const int64_t dk_row = parts > 1 ? KV * D : s->k_row, dv_row = parts > 1 ? KV * Dv : s->v_row;
        TileScratch w;
        tile_scratch(&w, memory + thread_index() * scratch, s, mask, 1);
        for (int64_t tile = part; tile < tiles; tile += parts) {
            const int64_t t0 = tile * tq, t1 = min64(t0 + tq, T);
            find_visits(&w.visits, mask, s, b, (int)kv, t0, t1);
            for (int64_t r = 0; r < (t1 - t0) * G; r++) {
                const int64_t bt = b * T + t0 + r / G, h = kv * G + r % G, th = bt * H + h;
                const real g = gate ? gate[th * gate_row] : 1;
                for (int64_t c = 0; c < D; c++) w.q[r * D + c] = q[bt * s->q_row + h * D + c] * scale;
                for (int64_t c = 0; c < Dv; c++) w.dout[r * Dv + c] = dout[th * Dv + c] * g;
                w.max[r] = lse[th];
                w.sum[r] = dot(w.dout + r * Dv, out + th * Dv, Dv);
            }
            memset(w.dq, 0, (size_t)((t1 - t0) * G * D) * sizeof(real));

            for (int64_t j = 0; j < w.visits.blocks; j++) {
                const int64_t kj = w.visits.first + j, k0 = kj * block, keys = min64(block, Tk - k0), width = round_up(keys, NR), at = b * Tk + k0;
                const real *side_kj = side_k + (b * KV + kv) * side + kj * D * row;
                const real *side_vj = side_v + (b * KV + kv) * side_of_v + kj * Dv * row;
                for (int64_t i0 = 0; i0 < w.visits.count[j]; i0 += chunk_queries(s)) {
                    const int64_t count = min64(chunk_queries(s), w.visits.count[j] - i0), rows = count * G;
                    const int *queries = w.visits.queries + w.visits.start[j] + i0;
                    const int direct = w.visits.consecutive;
                    real *qc = direct ? w.q + queries[0] * G * D : w.chunk_q, *doc = direct ? w.dout + queries[0] * G * Dv : w.chunk_o;
                    real *dqc = direct ? w.dq + queries[0] * G * D : w.chunk_dq;
                    if (!direct) {
                        gather(qc, w.q, queries, count, G * D);
                        gather(doc, w.dout, queries, count, G * Dv);
                        gather(dqc, w.dq, queries, count, G * D);
                    }
                    block_multiply(rows, width, D, qc, D, 1, side_kj, row, w.scores, row, 0);
                    block_multiply(rows, width, Dv, doc, Dv, 1, side_vj, row, w.dscores, row, 0);
                    for (int64_t r = 0; r < rows; r++) {
                        const int64_t i = queries[r / G];
                        int64_t lo, hi;
                        key_range(mask, s->t0 + t0 + i, &lo, &hi);
                        real *p = w.scores + r * row, *ds = w.dscores + r * row;
                        const real top = w.max[i * G + r % G], delta = w.sum[i * G + r % G];
                        hide_outside(p, max64(lo - k0, 0), min64(hi - k0, keys), width);
                        #pragma omp simd
                        for (int64_t c = 0; c < width; c++) { p[c] = fast_exp(p[c] - top); ds[c] = p[c] * (ds[c] - delta); }
                    }
                    block_multiply(keys, Dv, rows, w.scores, 1, row, doc, Dv, dv_own + at * dv_row + kv * Dv, dv_row, 1);
                    block_multiply(keys, D, rows, w.dscores, 1, row, qc, D, dk_own + at * dk_row + kv * D, dk_row, 1);
                    block_multiply(rows, D, keys, w.dscores, row, 1, k + at * s->k_row + kv * D, s->k_row, dqc, D, 1);
                    if (!direct) scatter(w.dq, dqc, queries, count, G * D);
                }
            }
            for (int64_t r = 0; r < (t1 - t0) * G; r++) {
                real *d = dq + (b * T + t0 + r / G) * s->q_row + (kv * G + r % G) * D;
                for (int64_t c = 0; c < D; c++) d[c] += w.dq[r * D + c] * scale;
            }
        }
    }
    if (parts == 1) return;
    #pragma omp parallel for
    for (int64_t bt = 0; bt < s->B * Tk; bt++)
        for (int64_t part = 0; part < parts; part++) {
            const real *own = parts_memory + part * part_size, *own_v = own + s->B * Tk * KV * D;
            for (int64_t c = 0; c < KV * D; c++) dk[bt * s->k_row + c] += own[bt * KV * D + c];
            for (int64_t c = 0; c < KV * Dv; c++) dv[bt * s->v_row + c] += own_v[bt * KV * Dv + c];
        }
}

// ----------------------------------------------------------------------------
// Compression (paper eq. 7): block i of l tokens, [i·d, i·d+l), becomes one key (or value) phi(x_{i·d} .. x_{i·d+l-1}).
// x (B,T,KV,D) strided -> out (B,Nc,KV,D), before RoPE.
//
// To add a compression of your own: its name and number here, its tensors in compress_tensors, a case in compress_forward
// and one in compress_backward. Options, config.json, init, checkpoints and AdamW follow from these (the README has an example).

enum { COMPRESS_MLP, COMPRESS_GROUPED_MLP, COMPRESS_CONV1D, COMPRESS_AVGPOOL, COMPRESS_COUNT };
const char compress_names[] = "mlp|grouped_mlp|conv1d|avgpool";

typedef struct CompressWeights { real *pos, *fc1, *fc1_bias, *fc2, *fc2_bias, *conv, *conv_bias; } CompressWeights;

// One tensor of a compression: its name behind "compress_k.", its pointer in CompressWeights, its shape.
typedef struct CompressTensor { const char *name; size_t slot; int ndim; int64_t shape[3]; } CompressTensor;
enum { COMPRESS_TENSORS = 5 };      // the most that a kind has

// Lists the tensors of a kind, for KV heads of D channels and blocks of l tokens; returns how many.
int compress_tensors(CompressTensor *list, int kind, int64_t KV, int64_t l, int64_t D) {
#define TENSOR(name, pointer, ndim, ...) {name, offsetof(CompressWeights, pointer), ndim, {__VA_ARGS__}}
    const CompressTensor mlp[] = {
        TENSOR("pos", pos, 2, l, D, 0),
        TENSOR("fc1.weight", fc1, 2, 2 * D, l * D, 0), TENSOR("fc1.bias", fc1_bias, 1, 2 * D, 0, 0),
        TENSOR("fc2.weight", fc2, 2, D, 2 * D, 0), TENSOR("fc2.bias", fc2_bias, 1, D, 0, 0)};
    const CompressTensor grouped_mlp[] = {
        TENSOR("pos", pos, 2, l, D, 0),
        TENSOR("fc1.weight", fc1, 3, KV, 2 * D, l * D), TENSOR("fc1.bias", fc1_bias, 2, KV, 2 * D, 0),
        TENSOR("fc2.weight", fc2, 3, KV, D, 2 * D), TENSOR("fc2.bias", fc2_bias, 2, KV, D, 0)};
    const CompressTensor conv1d[] = {
        TENSOR("conv.weight", conv, 3, KV, D, l * D), TENSOR("conv.bias", conv_bias, 2, KV, D, 0)};
#undef TENSOR
    const CompressTensor *from = kind == COMPRESS_MLP ? mlp : kind == COMPRESS_GROUPED_MLP ? grouped_mlp : conv1d;
    const int count = kind == COMPRESS_AVGPOOL ? 0 : kind == COMPRESS_CONV1D ? 2 : 5;
    for (int i = 0; i < count; i++) list[i] = from[i];
    return count;
}

int compress_has_weights(int kind) {
    CompressTensor list[COMPRESS_TENSORS];
    return compress_tensors(list, kind, 1, 1, 1) > 0;
}

static inline real **compress_pointer(CompressWeights *w, const CompressTensor *t) { return (real **)(void *)((char *)w + t->slot); }

typedef struct CompressShape { int64_t B, T, x_row; int KV, D, block, stride, kind; } CompressShape;

enum { COMPRESS_CHUNK = 512 };      // blocks flattened at a time

DEVICE static inline int64_t compress_blocks(const CompressShape *s) { return compressed_seen(s->T - 1, s->block, s->stride); }

// The width of what a kind keeps for backward, for each block and KV head: the MLP's hidden layer before its GELU.
int64_t compress_hidden(int kind, int d) { return kind == COMPRESS_MLP || kind == COMPRESS_GROUPED_MLP ? 2 * d : 0; }

// Numbers of working memory.
int64_t compress_scratch(int kind, int d, int block) {
    return compress_has_weights(kind) ? COMPRESS_CHUNK * ((int64_t)block * d + 2 * compress_hidden(kind, d) + d) : 0;
}

// Which KV heads a set of weights serves: `mlp` has one set for all, the others one for each.
DEVICE static inline int compress_sets(const CompressShape *s) { return s->kind == COMPRESS_MLP ? 1 : s->KV; }

// Row r of a set of weights is a block and a head: where its tokens start in x, and where its result lies in out.
typedef struct BlockPlace { int64_t x, out; } BlockPlace;
DEVICE static inline BlockPlace block_place(const CompressShape *s, int set, int64_t r) {
    const int heads = s->KV / compress_sets(s);
    const int64_t nc = compress_blocks(s), bi = r / heads, b = bi / nc, i = bi % nc, kv = set + r % heads;
    BlockPlace place = {(b * s->T + i * s->stride) * s->x_row + kv * s->D, bi * s->KV + kv};
    return place;
}

// flat (rows, l·D): the tokens of each block side by side, plus the learned intra-block position (l,D), if there is one.
static void compress_flatten(real *flat, const real *x, const real *pos, const CompressShape *s, int set, int64_t r0, int64_t rows) {
    #pragma omp parallel for
    for (int64_t r = 0; r < rows; r++) {
        const real *from = x + block_place(s, set, r0 + r).x;
        for (int64_t j = 0; j < s->block; j++)
            for (int64_t c = 0; c < s->D; c++)
                flat[(r * s->block + j) * s->D + c] = from[j * s->x_row + c] + (pos ? pos[j * s->D + c] : 0);
    }
}

void compress_forward(real *out, real *hidden, const real *x, const CompressWeights *w, const CompressShape *s, real *scratch) {
    const int64_t D = s->D, LD = s->block * D, W = compress_hidden(s->kind, s->D), sets = compress_sets(s);
    const int64_t rows = s->B * compress_blocks(s) * s->KV / sets;
    for (int set = 0; set < sets; set++)
        for (int64_t r0 = 0; r0 < rows; r0 += COMPRESS_CHUNK) {
            const int64_t n = min64(COMPRESS_CHUNK, rows - r0);
            if (s->kind == COMPRESS_AVGPOOL) {
                for (int64_t r = 0; r < n; r++) {
                    const BlockPlace place = block_place(s, set, r0 + r);
                    real *o = out + place.out * D;
                    for (int64_t c = 0; c < D; c++) o[c] = 0;
                    for (int64_t j = 0; j < s->block; j++)
                        for (int64_t c = 0; c < D; c++) o[c] += x[place.x + j * s->x_row + c] / (real)s->block;
                }
                continue;
            }
            real *flat = scratch, *h = flat + COMPRESS_CHUNK * LD, *y = h + 2 * COMPRESS_CHUNK * W;
            compress_flatten(flat, x, w->pos, s, set, r0, n);
            const real *bias;
            if (s->kind == COMPRESS_CONV1D) {
                linear_forward(y, D, flat, LD, w->conv + set * D * LD, n, LD, D);
                bias = w->conv_bias + set * D;
            } else {
                linear_forward(h, W, flat, LD, w->fc1 + set * W * LD, n, LD, W);
                #pragma omp parallel for
                for (int64_t r = 0; r < n; r++) {
                    real *keep = hidden + block_place(s, set, r0 + r).out * W, *hr = h + r * W;
                    const real *b = w->fc1_bias + set * W;
                    #pragma omp simd
                    for (int64_t c = 0; c < W; c++) {
                        keep[c] = hr[c] + b[c];
                        hr[c] = gelu(keep[c]);
                    }
                }
                linear_forward(y, D, h, W, w->fc2 + set * D * W, n, W, D);
                bias = w->fc2_bias + set * D;
            }
            for (int64_t r = 0; r < n; r++) {
                real *o = out + block_place(s, set, r0 + r).out * D;
                for (int64_t c = 0; c < D; c++) o[c] = y[r * D + c] + bias[c];
            }
        }
}

// dx (strided as x) and the gradients of the weights, given dout (B,Nc,KV,D). Blocks overlap, so one token's gradient is a sum.
void compress_backward(real *dx, const CompressWeights *dw, const real *dout, const real *hidden, const real *x,
                       const CompressWeights *w, const CompressShape *s, real *scratch) {
    const int64_t D = s->D, LD = s->block * D, W = compress_hidden(s->kind, s->D), sets = compress_sets(s);
    const int64_t rows = s->B * compress_blocks(s) * s->KV / sets;
    for (int set = 0; set < sets; set++)
        for (int64_t r0 = 0; r0 < rows; r0 += COMPRESS_CHUNK) {
            const int64_t n = min64(COMPRESS_CHUNK, rows - r0);
            real *flat = scratch, *h = flat + COMPRESS_CHUNK * LD, *dh = h + COMPRESS_CHUNK * W, *dy = dh + COMPRESS_CHUNK * W;
            if (s->kind == COMPRESS_AVGPOOL) {
                for (int64_t r = 0; r < n; r++) {
                    const BlockPlace place = block_place(s, set, r0 + r);
                    for (int64_t j = 0; j < s->block; j++)
                        for (int64_t c = 0; c < D; c++) dx[place.x + j * s->x_row + c] += dout[place.out * D + c] / (real)s->block;
                }
                continue;
            }
            for (int64_t r = 0; r < n; r++)
                memcpy(dy + r * D, dout + block_place(s, set, r0 + r).out * D, (size_t)D * sizeof(real));
            compress_flatten(flat, x, w->pos, s, set, r0, n);
            real *bias = (s->kind == COMPRESS_CONV1D ? dw->conv_bias : dw->fc2_bias) + set * D;
            for (int64_t r = 0; r < n; r++)
                for (int64_t c = 0; c < D; c++) bias[c] += dy[r * D + c];
            // The gradient of `flat` takes its place once dweight has read it.
            if (s->kind == COMPRESS_CONV1D) {
                matmul(D, LD, n, dy, 1, D, flat, LD, 1, dw->conv + set * D * LD, LD, 1);
                matmul(n, LD, D, dy, D, 1, w->conv + set * D * LD, LD, 1, flat, LD, 0);
            } else {
                #pragma omp parallel for
                for (int64_t r = 0; r < n; r++) {
                    const real *kept = hidden + block_place(s, set, r0 + r).out * W;
                    real *hr = h + r * W;
                    #pragma omp simd
                    for (int64_t c = 0; c < W; c++) hr[c] = gelu(kept[c]);
                }
                linear_backward(dh, W, dw->fc2 + set * D * W, dy, D, h, W, w->fc2 + set * D * W, n, W, D, 0);
                #pragma omp parallel for
                for (int64_t r = 0; r < n; r++) {
                    const real *kept = hidden + block_place(s, set, r0 + r).out * W;
                    real *dr = dh + r * W;
                    #pragma omp simd
                    for (int64_t c = 0; c < W; c++) dr[c] *= gelu_slope(kept[c]);
                }
                for (int64_t r = 0; r < n; r++)
                    for (int64_t c = 0; c < W; c++) dw->fc1_bias[set * W + c] += dh[r * W + c];
                matmul(W, LD, n, dh, 1, W, flat, LD, 1, dw->fc1 + set * W * LD, LD, 1);
                matmul(n, LD, W, dh, W, 1, w->fc1 + set * W * LD, LD, 1, flat, LD, 0);
                for (int64_t r = 0; r < n; r++)
                    for (int64_t j = 0; j < LD; j++) dw->pos[j] += flat[r * LD + j];
            }
            for (int64_t r = 0; r < n; r++) {
                real *to = dx + block_place(s, set, r0 + r).x;
                for (int64_t j = 0; j < s->block; j++)
                    for (int64_t c = 0; c < D; c++) to[j * s->x_row + c] += flat[(r * s->block + j) * D + c];
            }
        }
}

// ----------------------------------------------------------------------------
// Selection (paper eq. 8 to 12): which blocks of the text each query reads in full. The importance of a selection block is
// the attention that the compressed branch gives to its tokens, summed over the heads that share keys. No gradient.

typedef struct SelectShape { int cmp_block, cmp_stride, sel_block, n, n_init, n_local; } SelectShape;

// A text of at most n blocks leaves no choice: every query takes all of its own.
static inline int takes_all_blocks(int64_t T, int64_t n, int64_t sel_block) { return T <= n * sel_block; }

// Eq. 9 read geometrically: how many of the d-token pieces of compressed block i, which has `pieces` of them, lie in selection block j, which
// has `per_block`.
DEVICE static inline int pieces_inside(int i, int j, int pieces, int per_block) {
    const int begin = i > j * per_block ? i : j * per_block, end = i + pieces < (j + 1) * per_block ? i + pieces : (j + 1) * per_block;
    return end > begin ? end - begin : 0;
}

// importance (blocks) of each selection block, from the weights of the `visible` compressed blocks, summed over the heads.
static inline void block_importance(real *importance, const real *weights, int64_t blocks, int64_t visible, const SelectShape *s) {
    const int64_t per_block = s->sel_block / s->cmp_stride, pieces = s->cmp_block / s->cmp_stride;
    for (int64_t j = 0; j < blocks; j++) {
        importance[j] = 0;
        for (int64_t i = max64(0, j * per_block - pieces + 1); i < min64((j + 1) * per_block, visible); i++)
            importance[j] += weights[i] * (real)pieces_inside(i, j, pieces, per_block);
    }
}

// idx (n): the first n_init and last n_local of `blocks` candidates, then the most important up to n in all (ties to the lower
// index), ascending; -1 behind the last. `importance` has `blocks` values.
void choose_blocks(int *idx, const real *importance, int64_t blocks, const SelectShape *s) {
    const int n = s->n;
    if (blocks <= n) {
        for (int i = 0; i < n; i++) idx[i] = i < blocks ? i : -1;
        return;
    }
    // The free places, kept sorted by importance while the candidates stream by. An equal later one goes behind.
    int found = 0, places = n - s->n_init - s->n_local, *best = idx + s->n_init;
    for (int64_t j = s->n_init; j < blocks - s->n_local && places > 0; j++) {
        if (found == places && !(importance[j] > importance[best[found - 1]])) continue;
        int at = found < places ? found++ : places - 1;
        for (; at > 0 && importance[j] > importance[best[at - 1]]; at--) best[at] = best[at - 1];
        best[at] = (int)j;
    }
    for (int i = 1; i < places; i++)        // insertion sort: ascending indices
        for (int at = i; at > 0 && best[at - 1] > best[at]; at--) { int x = best[at]; best[at] = best[at - 1]; best[at - 1] = x; }
    for (int i = 0; i < s->n_init; i++) idx[i] = i;
    for (int i = 0; i < s->n_local; i++) idx[n - s->n_local + i] = (int)(blocks - s->n_local + i);
}

// Numbers of working memory for one thread.
static inline int64_t select_queries(const AttentionShape *s) { return chunk_queries(s); }
int64_t select_scratch(const AttentionShape *s, int sel_block) {
    const int64_t G = s->H / s->KV, nc = round_up(s->Tk, KEY_BLOCK), q = select_queries(s);
    return round_up(q * G * s->D, 16) + q * G * side_row(KEY_BLOCK) + round_up(q * nc, 16) + round_up((s->t0 + s->T) / sel_block + 1, 16);
}

// block_idx (B,T,KV,n) from q (B,T,H,D), the compressed keys on their side (as attention_forward left them in side_k)
// and the compressed branch's lse (B,T,H): p = exp(q·K~/sqrt(D) - lse), summed over the heads of a group (eq. 10).
void select_forward(int *block_idx, const real *q, const real *side_k, const real *lse, const AttentionShape *s,
                    const SelectShape *sel, real *memory) {
    const int64_t T = s->T, H = s->H, KV = s->KV, D = s->D, G = H / KV, tq = select_queries(s), tiles = (T + tq - 1) / tq;
    const int64_t row = side_row(KEY_BLOCK), side = side_size(KEY_BLOCK, s->Tk, s->D), nc = round_up(s->Tk, KEY_BLOCK);
    const int64_t scratch = select_scratch(s, sel->sel_block);
    const real scale = 1 / (real)sqrt((double)D);
    #pragma omp parallel for schedule(dynamic)
    for (int64_t item = 0; item < s->B * KV * tiles; item++) {
        const int64_t b = item / (KV * tiles), kv = item / tiles % KV, t0 = (tiles - 1 - item % tiles) * tq, t1 = min64(t0 + tq, T);
        real *qt = memory + thread_index() * scratch, *scores = qt + round_up(tq * G * D, 16);
        real *sum = scores + tq * G * row, *importance = sum + round_up(tq * nc, 16);
        // A tile whose queries all have at most n candidates has no choice to make.
        const int64_t last = s->t0 + t1 - 1, seen = last / sel->sel_block + 1 <= sel->n ? 0 : compressed_seen(last, sel->cmp_block, sel->cmp_stride);
        for (int64_t t = t0; seen > 0 && t < t1; t++)
            for (int64_t c = 0; c < G * D; c++) qt[(t - t0) * G * D + c] = q[(b * T + t) * s->q_row + kv * G * D + c] * scale;
        for (int64_t k0 = 0; k0 < seen; k0 += KEY_BLOCK) {
            block_multiply((t1 - t0) * G, row, D, qt, D, 1, side_k + (b * KV + kv) * side + k0 / KEY_BLOCK * D * row, row, scores, row, 0);
            for (int64_t t = t0; t < t1; t++) {
                const int64_t keys = max64(0, min64(KEY_BLOCK, compressed_seen(s->t0 + t, sel->cmp_block, sel->cmp_stride) - k0));
                real *to = sum + (t - t0) * nc + k0;
                for (int64_t c = 0; c < KEY_BLOCK; c++) to[c] = 0;
                for (int64_t g = 0; g < G; g++) {
                    const real *x = scores + ((t - t0) * G + g) * row, top = lse[(b * T + t) * H + kv * G + g];
                    #pragma omp simd
                    for (int64_t c = 0; c < keys; c++) to[c] += fast_exp(x[c] - top);
                }
            }
        }
        for (int64_t t = t0; t < t1; t++) {
            const int64_t blocks = (s->t0 + t) / sel->sel_block + 1, visible = compressed_seen(s->t0 + t, sel->cmp_block, sel->cmp_stride);
            if (blocks > sel->n) block_importance(importance, sum + (t - t0) * nc, blocks, visible, sel);
            choose_blocks(block_idx + ((b * T + t) * KV + kv) * sel->n, importance, blocks, sel);
        }
    }
}

// ----------------------------------------------------------------------------
// Gates (paper eq. 5): o(t,h) = Σ_b g_b(t,h)·o_b(t,h) over the branches cmp, slc, win. gates (B,T,H,3) are sigmoids of
//   input   x·Wgᵀ + bg, whose product with x is part of the wide projection; logits (N,3H) strided, bias (3H)
//   q_cond  w(h,b)·q(t,h) + bias(h,b), q before RoPE; weight (H,3,D), bias (H,3)
//   static  bias (H,3)

void gates_forward(real *gates, const real *logits, int64_t logits_row, const real *q, int64_t q_row, const real *weight,
                   const real *bias, int64_t n, int h, int d, int kind) {
    #pragma omp parallel for if (n * h > 1024)
    for (int64_t i = 0; i < n; i++)
        for (int j = 0; j < BRANCHES * h; j++) {
            real x = bias[j];
            if (kind == GATE_INPUT) x += logits[i * logits_row + j];
            if (kind == GATE_Q_COND) x += dot(weight + j * d, q + i * q_row + j / BRANCHES * d, d);
            gates[i * BRANCHES * h + j] = sigmoid(x);
        }
}

// From dgates (N,H,3), which it turns into the gradient of the logits: dlogits (input), dq += and dweight (q_cond), dbias.
void gates_backward(real *dgates, real *dlogits, int64_t dlogits_row, real *dq, const real *q, int64_t q_row, real *dweight,
                    real *dbias, const real *gates, const real *weight, int64_t n, int h, int d, int kind) {
    #pragma omp parallel for
    for (int j = 0; j < BRANCHES * h; j++)
        for (int64_t i = 0; i < n; i++) {
            const real g = gates[i * BRANCHES * h + j], dx = dgates[i * BRANCHES * h + j] * g * (1 - g);
            dgates[i * BRANCHES * h + j] = dx;
            dbias[j] += dx;
            if (kind == GATE_INPUT) dlogits[i * dlogits_row + j] = dx;
            if (kind == GATE_Q_COND)
                for (int c = 0; c < d; c++) dweight[j * d + c] += dx * q[i * q_row + j / BRANCHES * d + c];
        }
    if (kind != GATE_Q_COND) return;
    #pragma omp parallel for
    for (int64_t i = 0; i < n; i++)
        for (int j = 0; j < BRANCHES * h; j++)
            for (int c = 0; c < d; c++) dq[i * q_row + j / BRANCHES * d + c] += dgates[i * BRANCHES * h + j] * weight[j * d + c];
}

// out (N,H,Dv) = Σ_b gates(·,b)·branch[b] (N,H,Dv)
void branches_sum(real *out, real *const branch[BRANCHES], const real *gates, int64_t nh, int dv) {
    #pragma omp parallel for
    for (int64_t i = 0; i < nh; i++) {
        const real *g = gates + i * BRANCHES, *a = branch[CMP] + i * dv, *b = branch[SLC] + i * dv, *c = branch[WIN] + i * dv;
        for (int j = 0; j < dv; j++) out[i * dv + j] = g[CMP] * a[j] + g[SLC] * b[j] + g[WIN] * c[j];
    }
}

// dgates (N,H,3) = <dout, branch[b]>
void branches_dgates(real *dgates, real *const branch[BRANCHES], const real *dout, int64_t nh, int dv) {
    #pragma omp parallel for
    for (int64_t i = 0; i < nh; i++)
        for (int b = 0; b < BRANCHES; b++) dgates[i * BRANCHES + b] = dot(dout + i * dv, branch[b] + i * dv, dv);
}

// ----------------------------------------------------------------------------
// SwiGLU: h = silu(a)·u, with a and u the two halves of each row of gate_up (N,2F); h (N,F).

void swiglu_forward(real *h, const real *gate_up, int64_t n, int64_t f) {
    #pragma omp parallel for if (n * f > 4096)
    for (int64_t i = 0; i < n; i++) {
        const real *a = gate_up + i * 2 * f, *u = a + f;
        real *o = h + i * f;
        #pragma omp simd
        for (int64_t j = 0; j < f; j++) o[j] = a[j] * sigmoid(a[j]) * u[j];
    }
}

void swiglu_backward(real *dgate_up, const real *dh, const real *gate_up, int64_t n, int64_t f) {
    #pragma omp parallel for if (n * f > 4096)
    for (int64_t i = 0; i < n; i++) {
        const real *a = gate_up + i * 2 * f, *u = a + f, *d = dh + i * f;
        real *da = dgate_up + i * 2 * f, *du = da + f;
        #pragma omp simd
        for (int64_t j = 0; j < f; j++) {
            const real s = sigmoid(a[j]), x = a[j], y = u[j], g = d[j];
            da[j] = g * y * s * (1 + x * (1 - s));
            du[j] = g * x * s;
        }
    }
}

// ----------------------------------------------------------------------------
// Dropout: the mask is a function of (seed, step, site, element) alone, so that any split of the batch and any device
// draws the same. Element e takes word e%4 of Philox(counter = {e/4, site, step}, key = seed). x (n) in place, at element e0.

DEVICE static inline uint32_t dropout_limit(double p) { return (uint32_t)(p * 4294967296.0); }     // words below it are dropped

DEVICE static inline void dropout_words(uint32_t word[4], int64_t quad, uint64_t seed, int64_t step, int site) {
    const uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    const uint32_t counter[4] = {(uint32_t)quad, (uint32_t)((uint64_t)quad >> 32), (uint32_t)site, (uint32_t)step};
    philox4x32(word, counter, key);
}

void dropout_apply(real *x, int64_t n, int64_t e0, double p, uint64_t seed, int64_t step, int site) {
    if (p <= 0) return;
    const uint32_t limit = dropout_limit(p);
    const real keep = (real)(1 / (1 - p));
    const int64_t first = e0 / 4, last = (e0 + n + 3) / 4;
    #pragma omp parallel for if (n > 4096)
    for (int64_t quad = first; quad < last; quad++) {
        uint32_t word[4];
        dropout_words(word, quad, seed, step, site);
        for (int64_t e = max64(quad * 4, e0); e < min64(quad * 4 + 4, e0 + n); e++) x[e - e0] *= word[e % 4] < limit ? 0 : keep;
    }
}

// ----------------------------------------------------------------------------
// Mixture of experts (section 3.3 of the design; DeepSeekMoE's shared and routed experts). The router's softmax picks k
// of E experts for each token; each expert is a SwiGLU that sees its tokens gathered into rows.

typedef struct MoeShape {
    int64_t N, C, F;            // tokens, model width, width of one expert
    int E, k;
    double capacity;            // an expert keeps ceil(capacity·N·k/E) tokens; 0: all
    int parts;                  // ranks that share the micro-batch, N tokens each
} MoeShape;

// What routing decided, kept for backward.
typedef struct Routing {
    real *probs;                // (N,E) softmax of the router
    real *lse;                  // (N) logsumexp of its logits
    int *choice;                // (N,k) experts, most probable first
    real *weight;               // (N,k) renormalised, 0 where dropped
    int *row_token;             // (N·k) rows sorted by expert: token·k + slot
    int64_t *start;             // (E+1) first row of each expert, dropped choices left out
    int64_t *load;              // (E) choices before drops, in the end those of all parts of the micro-batch
} Routing;

// One token's share in one expert, and the two orders that capacity needs (ties: the lower index).
typedef struct Share { real prob; int row; } Share;
static int more_probable(const void *a, const void *b) {
    const Share *x = (const Share *)a, *y = (const Share *)b;
    return x->prob != y->prob ? (x->prob < y->prob ? 1 : -1) : (x->row > y->row) - (x->row < y->row);
}
static int earlier(const void *a, const void *b) {
    const Share *x = (const Share *)a, *y = (const Share *)b;
    return (x->row > y->row) - (x->row < y->row);
}

// From router logits (N,E) in r->probs, in place.
void moe_route(Routing *r, const MoeShape *s) {
    const int64_t N = s->N;
    const int E = s->E, k = s->k;
    #pragma omp parallel for
    for (int64_t i = 0; i < N; i++) {
        real *p = r->probs + i * E, top = p[0], sum = 0, chosen = 0;
        for (int e = 1; e < E; e++) top = p[e] > top ? p[e] : top;
        for (int e = 0; e < E; e++) sum += p[e] = (real)exp((double)(p[e] - top));
        for (int e = 0; e < E; e++) p[e] /= sum;
        r->lse[i] = top + (real)log((double)sum);
        int *c = r->choice + i * k;
        for (int j = 0; j < k; j++) {           // the most probable not yet chosen; ties to the lower index
            int best = -1;
            for (int e = 0; e < E; e++) {
                int taken = 0;
                for (int x = 0; x < j; x++) taken |= c[x] == e;
                if (!taken && (best < 0 || p[e] > p[best])) best = e;
            }
            c[j] = best;
            chosen += p[best];
        }
        for (int j = 0; j < k; j++) r->weight[i * k + j] = k == 1 ? p[c[j]] : p[c[j]] / chosen;
    }
    for (int e = 0; e < E; e++) r->load[e] = 0;
    for (int64_t x = 0; x < N * k; x++) r->load[r->choice[x]]++;
    r->start[0] = 0;
    for (int e = 0; e < E; e++) r->start[e + 1] = r->start[e] + r->load[e];
    for (int64_t x = 0; x < N * k; x++) r->row_token[r->start[r->choice[x]]++] = (int)x;
    for (int e = E; e > 0; e--) r->start[e] = r->start[e - 1];
    r->start[0] = 0;
    if (s->capacity <= 0) return;
    // Over capacity, the most probable tokens stay; the rest weigh nothing.
    const int64_t limit = (int64_t)ceil(s->capacity * (double)N * k / E);
    Share *share = (Share *)xmalloc((size_t)max64(N, 1) * sizeof(Share));
    int64_t to = 0;
    for (int e = 0; e < E; e++) {
        const int64_t from = r->start[e], load = r->load[e], keep = min64(load, limit);
        r->start[e] = to;
        for (int64_t x = 0; x < load; x++) {
            share[x].row = r->row_token[from + x];
            share[x].prob = r->probs[share[x].row / k * E + e];
        }
        if (keep < load) {
            qsort(share, (size_t)load, sizeof(Share), more_probable);
            for (int64_t x = keep; x < load; x++) r->weight[share[x].row] = 0;
            qsort(share, (size_t)keep, sizeof(Share), earlier);
        }
        for (int64_t x = 0; x < keep; x++) r->row_token[to++] = share[x].row;
    }
    r->start[E] = to;
    free(share);
}

// A SwiGLU's weights: gate_up (2F,C) holds gate_proj, then up_proj; down (C,F). Expert e of a layer is the e-th of a row of them.
static inline const real *expert_gate_up(const real *experts, const MoeShape *s, int e) { return experts + e * 3 * s->F * s->C; }
static inline const real *expert_down(const real *experts, const MoeShape *s, int e) { return experts + (e * 3 + 2) * s->F * s->C; }

int64_t moe_scratch(const MoeShape *s) { return s->N * (2 * s->C + 2 * s->F + 2 * s->F) + s->N * s->k; }

// out (N,C) += Σ_e w_e·expert_e(x), x (N,C); gate_up (N·k,2F), rows sorted by expert, is kept for backward.
void moe_forward(real *out, real *gate_up, const real *x, const real *experts, const Routing *r, const MoeShape *s, real *scratch) {
    const int64_t C = s->C, F = s->F;
    real *rows = scratch, *y = rows + s->N * C, *h = y + s->N * C;
    for (int e = 0; e < s->E; e++) {
        const int64_t from = r->start[e], n = r->start[e + 1] - from;
        #pragma omp parallel for
        for (int64_t i = 0; i < n; i++) memcpy(rows + i * C, x + r->row_token[from + i] / s->k * C, (size_t)C * sizeof(real));
        linear_forward(gate_up + from * 2 * F, 2 * F, rows, C, expert_gate_up(experts, s, e), n, C, 2 * F);
        swiglu_forward(h, gate_up + from * 2 * F, n, F);
        linear_forward(y, C, h, F, expert_down(experts, s, e), n, F, C);
        #pragma omp parallel for
        for (int64_t i = 0; i < n; i++) {
            const int row = r->row_token[from + i];
            for (int64_t c = 0; c < C; c++) out[row / s->k * C + c] += r->weight[row] * y[i * C + c];
        }
    }
}

// dx (N,C) += through the experts; dexperts +=; dprobs (N,E) = the gradient of the softmax probabilities.
void moe_backward(real *dx, real *dexperts, real *dprobs, const real *dout, const real *gate_up, const real *x,
                  const real *experts, const Routing *r, const MoeShape *s, real *scratch) {
    const int64_t C = s->C, F = s->F, N = s->N;
    const int k = s->k;
    real *rows = scratch, *dy = rows + N * C, *h = dy + N * C, *dh = h + N * F, *dgate_up = dh + N * F, *dweight = dgate_up + N * 2 * F;
    memset(dweight, 0, (size_t)(N * k) * sizeof(real));     // a dropped share has no gradient
    for (int e = 0; e < s->E; e++) {
        const int64_t from = r->start[e], n = r->start[e + 1] - from;
        real *dw_gate_up = dexperts + (expert_gate_up(experts, s, e) - experts), *dw_down = dexperts + (expert_down(experts, s, e) - experts);
        #pragma omp parallel for
        for (int64_t i = 0; i < n; i++) {
            memcpy(rows + i * C, x + r->row_token[from + i] / k * C, (size_t)C * sizeof(real));
            memcpy(dy + i * C, dout + r->row_token[from + i] / k * C, (size_t)C * sizeof(real));
        }
        swiglu_forward(h, gate_up + from * 2 * F, n, F);
        matmul(n, F, C, dy, C, 1, expert_down(experts, s, e), F, 1, dh, F, 0);
        #pragma omp parallel for
        for (int64_t i = 0; i < n; i++) {       // <dout, expert(x)> = <Wdᵀ·dout, h>
            const int row = r->row_token[from + i];
            dweight[row] = dot(dh + i * F, h + i * F, F);
            for (int64_t c = 0; c < C; c++) dy[i * C + c] *= r->weight[row];
            for (int64_t c = 0; c < F; c++) dh[i * F + c] *= r->weight[row];
        }
        linear_backward(NULL, 0, dw_down, dy, C, h, F, NULL, n, F, C, 0);
        swiglu_backward(dgate_up, dh, gate_up + from * 2 * F, n, F);
        linear_backward(dy, C, dw_gate_up, dgate_up, 2 * F, rows, C, expert_gate_up(experts, s, e), n, C, 2 * F, 0);
        #pragma omp parallel for
        for (int64_t i = 0; i < n; i++)
            for (int64_t c = 0; c < C; c++) dx[r->row_token[from + i] / k * C + c] += dy[i * C + c];
    }
    // w_j = p_j / Σ chosen p, so dp_j = (dw_j - Σ_i dw_i·w_i) / Σ chosen p; with k = 1, w = p.
    #pragma omp parallel for
    for (int64_t i = 0; i < N; i++) {
        real *dp = dprobs + i * s->E, chosen = 0, mean = 0;
        for (int e = 0; e < s->E; e++) dp[e] = 0;
        for (int j = 0; j < k; j++) chosen += r->probs[i * s->E + r->choice[i * k + j]];
        for (int j = 0; j < k; j++) mean += dweight[i * k + j] * r->probs[i * s->E + r->choice[i * k + j]] / chosen;
        for (int j = 0; j < k; j++) dp[r->choice[i * k + j]] = k == 1 ? dweight[i] : (dweight[i * k + j] - mean) / chosen;
    }
}

// The router's own terms (section 3.3), added to z and balance: z_coef·mean(lse²), balance_coef·E·Σ_e f_e·P_e, from the logsumexps
// (N), the sums of each expert's probabilities (E), and the loads (E). Where ranks share the micro-batch both are this one's part of it: their
// mean is the whole one's.
static void moe_losses_of_sums(double *z, double *balance, const real *lse, const double *p, const int64_t *load, const MoeShape *s, double z_coef,
                               double balance_coef) {
    double squares = 0, sum = 0;
    for (int64_t i = 0; i < s->N; i++) squares += (double)lse[i] * (double)lse[i];
    for (int e = 0; e < s->E; e++) sum += (double)load[e] / (double)(s->N * s->k * s->parts) * (p[e] / (double)s->N);
    *z += z_coef * squares / (double)s->N;
    *balance += balance_coef * s->E * sum;
}

void moe_losses(double *z, double *balance, const Routing *r, const MoeShape *s, double z_coef, double balance_coef) {
    double *p = (double *)xcalloc((size_t)s->E, sizeof(double));
    for (int64_t i = 0; i < s->N; i++)
        for (int e = 0; e < s->E; e++) p[e] += (double)r->probs[i * s->E + e];
    *z = *balance = 0;
    moe_losses_of_sums(z, balance, r->lse, p, r->load, s, z_coef, balance_coef);
    free(p);
}

// dprobs (N,E) -> the gradient of the router's logits, in place, with the two terms' own gradients times `scale`.
void router_backward(real *dprobs, const Routing *r, const MoeShape *s, double z_coef, double balance_coef, double scale) {
    const int E = s->E;
    #pragma omp parallel for
    for (int64_t i = 0; i < s->N; i++) {
        const real *p = r->probs + i * E;
        real *d = dprobs + i * E, mean = 0;
        for (int e = 0; e < E; e++) {
            d[e] += (real)(scale * balance_coef * E / (double)s->N * (double)r->load[e] / (double)(s->N * s->k * s->parts));
            mean += p[e] * d[e];
        }
        const real dz = (real)(scale * z_coef * 2 / (double)s->N) * r->lse[i];
        for (int e = 0; e < E; e++) d[e] = p[e] * (d[e] - mean + dz);
    }
}

// ----------------------------------------------------------------------------
// 6. The model: one table of parameters, one allocation of activations, forward, backward, AdamW.

// One row of the table. Everything that touches all parameters (init, load, save, count, AdamW) walks the table.
typedef struct Param {
    char name[112];             // the tensor's name in model.safetensors
    int ndim;
    int64_t shape[4];
    int64_t offset, count;      // in numbers, from the start of the weights
    int bucket;                 // 0 the embedding, 1 + l layer l, then the rest: their gradients are done at about the same time
} Param;

// Numbers [first, first + count) of a tensor, whose AdamW state lies at adam_m + at. Where ranks share the state (-z 1), each has
// its share of every bucket; else it has all tensors whole.
typedef struct Slice { int param; int64_t first, count, at; } Slice;

// Where a layer's weights lie. Projections of the same input stand next to each other in the table, so that
// `wide` is one matrix: q | k of each branch | v of each branch | gate logits (gate = input).
typedef struct LayerWeights {
    real *norm1, *wide, *o, *norm2;
    CompressWeights compress[2];        // of keys, of values
    real *gate_weight, *gate_bias;      // gate_weight: q_cond only
    real *gate_up, *down;               // dense FFN, or the shared experts
    real *router, *experts;
} LayerWeights;

// Where the parts of a wide row lie.
typedef struct WideRow { int branches; int64_t q, k[BRANCHES], v[BRANCHES], gate, size; } WideRow;

// What a layer keeps from forward for backward.
typedef struct LayerActs {
    real *x, *out;                      // (B,T,C) residual stream before and behind the layer
    real *rstd1, *wide;                 // (B,T), (B,T,wide)
    real *compressed[2], *hidden[2];    // (B,Nc,KV,D | Dv) after RoPE, (B,Nc,KV,2D | 2Dv)
    real *branch[BRANCHES], *lse[BRANCHES];     // (B,T,H,Dv), (B,T,H)
    real *gates;                        // (B,T,H,3)
    int *block_idx;                     // (B,T,KV,n)
    real *mid, *rstd2;                  // (B,T,C) behind attention
    real *gate_up;                      // (B,T,2F)
    real *expert_gate_up;               // (B·T·k,2Fe)
    Routing routing;
} LayerActs;

// Buffers that every layer uses in turn.
typedef struct Scratch {
    real *norm, *attention, *ffn, *y, *dx, *dnorm, *dwide, *dattention, *dgates, *dgate_up, *dffn, *logits;
    real *dcompressed[2], *side_k, *side_v, *parts, *tile, *compress, *experts, *dprobs;
    real *keys, *dkeys;                 // (B,text,keys and values of a wide row), where ranks share texts
} Scratch;

// What a training step tells the layers; NULL where the model only looks (evaluation, sampling).
typedef struct StepInfo {
    double dropout;
    uint64_t seed;
    int64_t step, first_sequence;       // the index in the total batch of row 0: dropout masks do not depend on the split
    double grad_scale;                  // 1 / number of micro-batches of all ranks (a part of a shared one counts as one)
    int last;                           // of this rank's: a layer's gradient is whole when its backward is done
} StepInfo;

typedef struct Model {
    Config config;
    Param *params;
    int num_params, cap_params;
    int64_t num_elements;
    int bucket, num_slices;             // bucket: of the next tensor that is listed
    Slice *slices;
    int64_t state_elements;             // of adam_m, and of adam_v
    real *weights, *grads, *adam_m, *adam_v;
    LayerWeights *layers;
    real *embed, *norm, *head;          // head is embed where tied

    int B, T, recompute, train;         // what the activations were made for
    int parts;                          // ranks that share each text; every T here is this one's part of it
    int stochastic_rounding;            // of the GPU's bf16 copy of the weights
    LayerActs *acts;
    Scratch scratch;
    real *memory, *rope, *final_rstd;
    int64_t rope_positions;

    double loss;                        // of the last forward: mean cross entropy
    double moe_z, moe_balance;          // and the router's terms, summed over the layers
    double *gate_sum;                   // (L,3) sums of gates since model_stats_reset, over gate_count[l] (token, head)s
    int64_t *gate_count;
    double *moe_load;                   // (L,E) choices of each expert since then
    struct Model *twin;                 // train_nsacu: the same model in the GPU's memory, which does the work
} Model;

// ----------------------------------------------------------------------------
// The table

static real *add_param(Model *m, int ndim, int64_t a, int64_t b, int64_t c, const char *format_, ...) {
    if (m->num_params == m->cap_params) {
        m->cap_params = m->cap_params ? 2 * m->cap_params : 64;
        m->params = (Param *)xrealloc(m->params, (size_t)m->cap_params * sizeof(Param));
    }
    Param *p = &m->params[m->num_params++];
    memset(p, 0, sizeof *p);
    va_list args;
    va_start(args, format_);
    vsnprintf(p->name, sizeof p->name, format_, args);
    va_end(args);
    const int64_t shape[3] = {a, b, c};
    p->ndim = ndim;
    p->count = 1;
    for (int i = 0; i < ndim; i++) { p->shape[i] = shape[i]; p->count *= shape[i]; }
    p->offset = m->num_elements;
    p->bucket = m->bucket;
    m->num_elements += p->count;
    return m->weights ? m->weights + p->offset : NULL;
}

// "k" or "v" of the compressed branch, d channels wide.
static void add_compress_params(Model *m, CompressWeights *w, int layer, const char *name, int64_t d) {
    const Config *c = &m->config;
    CompressTensor list[COMPRESS_TENSORS];
    const int count = compress_tensors(list, c->compress, c->num_key_value_heads, c->cmp_block, d);
    for (int i = 0; i < count; i++)
        *compress_pointer(w, &list[i]) = add_param(m, list[i].ndim, list[i].shape[0], list[i].shape[1], list[i].shape[2],
                                                   "model.layers.%d.self_attn.compress_%s.%s", layer, name, list[i].name);
}

static void add_ffn_params(Model *m, real **gate_up, real **down, int layer, const char *name, int64_t f) {
    const int64_t C = m->config.hidden_size;
    *gate_up = add_param(m, 2, f, C, 0, "model.layers.%d.mlp.%sgate_proj.weight", layer, name);
    add_param(m, 2, f, C, 0, "model.layers.%d.mlp.%sup_proj.weight", layer, name);
    *down = add_param(m, 2, C, f, 0, "model.layers.%d.mlp.%sdown_proj.weight", layer, name);
}

// Lists every tensor once; sets the pointers into m->weights where there are weights.
static void list_params(Model *m) {
    const Config *c = &m->config;
    const int64_t C = c->hidden_size, H = c->num_attention_heads, KV = c->num_key_value_heads, D = c->head_dim, Dv = c->v_head_dim;
    const char *branch[BRANCHES] = {"cmp_", "slc_", "win_"};
    m->num_params = 0;
    m->num_elements = 0;
    m->bucket = 0;
    m->embed = add_param(m, 2, c->vocab_size, C, 0, "model.embed_tokens.weight");
    for (int l = 0; l < c->num_hidden_layers; l++) {
        LayerWeights *w = &m->layers[l];
        const int full = layer_is_full(c, l), branches = full ? 1 : BRANCHES;
        m->bucket = 1 + l;
        w->norm1 = add_param(m, 1, C, 0, 0, "model.layers.%d.input_layernorm.weight", l);
        w->wide = add_param(m, 2, H * D, C, 0, "model.layers.%d.self_attn.q_proj.weight", l);
        for (int b = 0; b < branches; b++)
            add_param(m, 2, KV * D, C, 0, "model.layers.%d.self_attn.k_%sproj.weight", l, full ? "" : branch[b]);
        for (int b = 0; b < branches; b++)
            add_param(m, 2, KV * Dv, C, 0, "model.layers.%d.self_attn.v_%sproj.weight", l, full ? "" : branch[b]);
        if (!full) {
            if (c->gate == GATE_INPUT) {
                add_param(m, 2, BRANCHES * H, C, 0, "model.layers.%d.self_attn.g_proj.weight", l);
                w->gate_bias = add_param(m, 1, BRANCHES * H, 0, 0, "model.layers.%d.self_attn.g_proj.bias", l);
            } else if (c->gate == GATE_Q_COND) {
                w->gate_weight = add_param(m, 3, H, BRANCHES, D, "model.layers.%d.self_attn.gate_q.weight", l);
                w->gate_bias = add_param(m, 2, H, BRANCHES, 0, "model.layers.%d.self_attn.gate_q.bias", l);
            } else {
                w->gate_bias = add_param(m, 2, H, BRANCHES, 0, "model.layers.%d.self_attn.gate.bias", l);
            }
            add_compress_params(m, &w->compress[0], l, "k", D);
            add_compress_params(m, &w->compress[1], l, "v", Dv);
        }
        w->o = add_param(m, 2, C, H * Dv, 0, "model.layers.%d.self_attn.o_proj.weight", l);
        w->norm2 = add_param(m, 1, C, 0, 0, "model.layers.%d.post_attention_layernorm.weight", l);
        if (!layer_is_moe(c, l)) {
            add_ffn_params(m, &w->gate_up, &w->down, l, "", c->intermediate_size);
            continue;
        }
        w->router = add_param(m, 2, c->num_experts, C, 0, "model.layers.%d.mlp.gate.weight", l);
        for (int e = 0; e < c->num_experts; e++) {
            char name[32];
            real *gate_up, *down;
            snprintf(name, sizeof name, "experts.%d.", e);
            add_ffn_params(m, &gate_up, &down, l, name, c->moe_intermediate_size);
            if (e == 0) w->experts = gate_up;
        }
        if (c->num_shared_experts > 0)
            add_ffn_params(m, &w->gate_up, &w->down, l, "shared_experts.", (int64_t)c->num_shared_experts * c->moe_intermediate_size);
    }
    m->bucket = 1 + c->num_hidden_layers;
    m->norm = add_param(m, 1, C, 0, 0, "model.norm.weight");
    m->head = c->tie_word_embeddings ? m->embed : add_param(m, 2, c->vocab_size, C, 0, "lm_head.weight");
}

static inline int ends_with(const char *s, const char *end) {
    size_t n = strlen(s), k = strlen(end);
    return n >= k && !strcmp(s + n - k, end);
}
static inline int param_is_norm(const Param *p) { return ends_with(p->name, "norm.weight"); }
// AdamW decays every .weight but the norms'.
static inline int param_decays(const Param *p) { return ends_with(p->name, ".weight") && !param_is_norm(p); }

// A model with its table and zeroed weights.
void model_create(Model *m, const Config *config) {
    memset(m, 0, sizeof *m);
    m->config = *config;
    const int64_t L = config->num_hidden_layers;
    m->layers = (LayerWeights *)xcalloc((size_t)L, sizeof(LayerWeights));
    m->gate_sum = (double *)xcalloc((size_t)(L * BRANCHES), sizeof(double));
    m->gate_count = (int64_t *)xcalloc((size_t)L, sizeof(int64_t));
    m->moe_load = (double *)xcalloc((size_t)(L * max64(1, config->num_experts)), sizeof(double));
    list_params(m);
    m->weights = (real *)xcalloc((size_t)m->num_elements, sizeof(real));
    list_params(m);
}

static inline int bucket_count(const Model *m) { return m->config.num_hidden_layers + 2; }

// Where a bucket's numbers lie, whatever stands between its tensors too: [begin,end).
void bucket_range(const Model *m, int bucket, int64_t *begin, int64_t *end) {
    *begin = *end = m->num_elements;
    for (int i = m->num_params - 1; i >= 0 && m->params[i].bucket >= bucket; i--) {
        if (m->params[i].bucket > bucket) *end = m->params[i].offset;
        *begin = m->params[i].offset;
    }
}

// The numbers of a bucket that this rank updates.
void bucket_share(const Model *m, int bucket, int64_t *from, int64_t *to) {
    bucket_range(m, bucket, from, to);
    if (comm.shards > 1) comm_share(*from, *to, comm.rank, comm.shards, from, to);
}

// What this rank has the state of: sets slices and state_elements.
void list_slices(Model *m) {
    free(m->slices);
    m->slices = (Slice *)xmalloc((size_t)m->num_params * sizeof(Slice));
    m->num_slices = 0;
    m->state_elements = 0;
    int64_t from = 0, to = 0;
    for (int i = 0; i < m->num_params; i++) {
        const Param *p = &m->params[i];
        if (i == 0 || p->bucket != p[-1].bucket) bucket_share(m, p->bucket, &from, &to);
        const int64_t begin = max64(from, p->offset), end = min64(to, p->offset + p->count);
        if (begin >= end) continue;
        const Slice slice = {i, begin - p->offset, end - begin, m->state_elements};
        m->slices[m->num_slices++] = slice;
        m->state_elements += slice.count;
    }
}

// The table alone, for counting.
void table_create(Model *m, const Config *config) {
    memset(m, 0, sizeof *m);
    m->config = *config;
    m->layers = (LayerWeights *)xcalloc((size_t)config->num_hidden_layers, sizeof(LayerWeights));
    list_params(m);
}

void table_free(Model *m) {
    free(m->layers);
    free(m->params);
    free(m->slices);
}

// The number of parameters, and in *state (or NULL) of how many this rank has AdamW's state.
int64_t count_state(const Config *config, int64_t *state) {
    Model m;
    table_create(&m, config);
    if (state) {
        list_slices(&m);
        *state = m.state_elements;
    }
    table_free(&m);
    return m.num_elements;
}
int64_t count_params(const Config *config) { return count_state(config, NULL); }

// Section 3: weights and pos normal(0, 0.02), o_proj and down_proj by 1/sqrt(2L) smaller, norms 1, biases 0 but the gates'.
void model_init(Model *m, uint64_t seed, const double gate_init[BRANCHES]) {
    for (int i = 0; i < m->num_params; i++) {
        const Param *p = &m->params[i];
        real *w = m->weights + p->offset;
        const int residual = ends_with(p->name, "o_proj.weight") || ends_with(p->name, "down_proj.weight");
        const int gate = ends_with(p->name, "g_proj.bias") || ends_with(p->name, "gate_q.bias") || ends_with(p->name, ".gate.bias");
        const real sd = (real)(residual ? 0.02 / sqrt(2.0 * m->config.num_hidden_layers) : 0.02);
        if (param_is_norm(p))
            for (int64_t x = 0; x < p->count; x++) w[x] = 1;
        else if (ends_with(p->name, ".bias"))
            for (int64_t x = 0; x < p->count; x++) w[x] = gate ? (real)gate_init[x % BRANCHES] : 0;
        else {
            #pragma omp parallel for
            for (int64_t x = 0; x < p->count; x++) w[x] = sd * normal_at(seed, (uint64_t)i, (uint64_t)x);
        }
    }
}

void model_free(Model *m) {
    void *all[] = {m->params, m->slices, m->weights, m->grads, m->adam_m, m->adam_v, m->layers, m->acts, m->memory, m->gate_sum, m->gate_count, m->moe_load};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    memset(m, 0, sizeof *m);
}

void model_stats_reset(Model *m) {
    memset(m->gate_sum, 0, (size_t)(m->config.num_hidden_layers * BRANCHES) * sizeof(double));
    memset(m->gate_count, 0, (size_t)m->config.num_hidden_layers * sizeof(int64_t));
    memset(m->moe_load, 0, (size_t)(m->config.num_hidden_layers * max64(1, m->config.num_experts)) * sizeof(double));
}

// ----------------------------------------------------------------------------
// Shapes and memory

static WideRow wide_row(const Config *c, int layer) {
    const int64_t H = c->num_attention_heads, KV = c->num_key_value_heads, D = c->head_dim, Dv = c->v_head_dim;
    WideRow w;
    memset(&w, 0, sizeof w);
    w.branches = layer_is_full(c, layer) ? 1 : BRANCHES;
    w.size = H * D;
    for (int b = 0; b < w.branches; b++, w.size += KV * D) w.k[b] = w.size;
    for (int b = 0; b < w.branches; b++, w.size += KV * Dv) w.v[b] = w.size;
    w.gate = w.size;
    if (w.branches > 1 && c->gate == GATE_INPUT) w.size += BRANCHES * H;
    return w;
}

// The queries of one piece of a text, and all its keys.
static AttentionShape attention_shape(const Config *c, int64_t B, const Pieces *p, int piece, int64_t q_row, int64_t k_row) {
    AttentionShape s = {B, p->length, p->text, c->num_attention_heads, c->num_key_value_heads, c->head_dim, c->v_head_dim, q_row, k_row, k_row, piece * p->length};
    return s;
}

// The attention of one branch (0 where the layer is full): its mask and shape. block_idx: the choices of these queries. The compressed branch has
// its own dense keys.
static Mask branch_mask(const Config *c, const int *block_idx, AttentionShape *s, int layer, int branch) {
    Mask mask;
    memset(&mask, 0, sizeof mask);
    mask.kind = MASK_WINDOW;
    mask.window = layer_is_full(c, layer) ? s->Tk : c->window;
    if (layer_is_full(c, layer) || branch == WIN) return mask;
    if (branch == SLC && takes_all_blocks(s->Tk, c->sel_blocks, c->sel_block)) {
        mask.window = s->Tk;
    } else if (branch == SLC) {
        mask.kind = MASK_SELECTED;
        mask.sel_block = c->sel_block;
        mask.n = c->sel_blocks;
        mask.block_idx = block_idx;
    } else {
        mask.kind = MASK_COMPRESSED;
        mask.block = c->cmp_block;
        mask.stride = c->cmp_stride;
        s->Tk = compressed_seen(s->Tk - 1, c->cmp_block, c->cmp_stride);
        s->k_row = (int64_t)s->KV * s->D;
        s->v_row = (int64_t)s->KV * s->Dv;
    }
    return mask;
}

static CompressShape compress_shape(const Config *c, int64_t B, int64_t T, int64_t wide, int values) {
    CompressShape s = {B, T, wide, c->num_key_value_heads, values ? c->v_head_dim : c->head_dim, c->cmp_block, c->cmp_stride, c->compress};
    return s;
}

static SelectShape select_shape(const Config *c) {
    SelectShape s = {c->cmp_block, c->cmp_stride, c->sel_block, c->sel_blocks, c->sel_init_blocks, c->sel_local_blocks};
    return s;
}

static MoeShape moe_shape(const Config *c, int64_t n, int parts, const StepInfo *info) {
    MoeShape s = {n, c->hidden_size, c->moe_intermediate_size, c->num_experts, c->num_experts_per_tok, info ? c->capacity_factor : 0, parts};
    return s;
}

// Columns of a wide row that are keys and values.
static inline int64_t keys_width(const WideRow *row) { return row->gate - row->k[0]; }

static inline int64_t ffn_width(const Config *c, int layer) {
    return layer_is_moe(c, layer) ? (int64_t)c->num_shared_experts * c->moe_intermediate_size : c->intermediate_size;
}

// The rows of logits made at a time: few enough to stay near the cache, never (B·T,V).
static inline int64_t logit_rows(const Config *c, int64_t n) {
    return min64(n, min64(4096, max64(64, ((int64_t)8 << 20) / c->vocab_size)));
}

static int *take_ints(real **memory, int64_t *used, int64_t n) {
    return (int *)take(memory, used, (n * (int64_t)sizeof(int) + (int64_t)sizeof(real) - 1) / (int64_t)sizeof(real));
}

// What the layers keep, carved from `memory`; returns the numbers it takes (memory NULL: only counts). Without training all
// layers share one set; recompute 1 shares what the FFN keeps (backward makes it again), 2 all but each layer's input.
static int64_t carve_acts(LayerActs *acts, const Config *c, int64_t B, int64_t T, int recompute, int train, real *memory) {
    const int64_t N = B * T, C = c->hidden_size, H = c->num_attention_heads, KV = c->num_key_value_heads, D = c->head_dim, Dv = c->v_head_dim;
    const int64_t L = c->num_hidden_layers, E = c->num_experts, k = c->num_experts_per_tok, nc = compressed_seen(T * comm.parts - 1, c->cmp_block, c->cmp_stride);
    const int keep_attention = train && recompute < 2, keep_ffn = train && recompute < 1;
    int64_t used = 0, wide = 0, width = 0, nsa = 0, moe = 0;
    for (int l = 0; l < L; l++) {       // shared buffers fit the largest layer
        wide = max64(wide, wide_row(c, l).size);
        width = max64(width, ffn_width(c, l));
        nsa |= !layer_is_full(c, l);
        moe |= layer_is_moe(c, l);
    }
    real *x = take(&memory, &used, N * C), *other = train ? NULL : take(&memory, &used, N * C);
    for (int l = 0; l < L; l++) {
        LayerActs *a = &acts[l];
        if (l > 0 && !(keep_attention || keep_ffn)) *a = acts[0];
        a->x = x;
        x = a->out = train ? take(&memory, &used, N * C) : l % 2 ? acts[0].x : other;
        if (keep_attention || l == 0) {
            const int all = !keep_attention, is_nsa = all ? (int)nsa : !layer_is_full(c, l);
            a->rstd1 = take(&memory, &used, N);
            a->wide = take(&memory, &used, N * (all ? wide : wide_row(c, l).size));
            for (int b = 0; b < (is_nsa ? BRANCHES : 1); b++) {
                a->branch[b] = take(&memory, &used, N * H * Dv);
                a->lse[b] = take(&memory, &used, N * H);
            }
            if (is_nsa) {
                a->gates = take(&memory, &used, N * H * BRANCHES);
                a->block_idx = take_ints(&memory, &used, N * KV * c->sel_blocks);
                for (int v = 0; v < 2; v++) {
                    a->compressed[v] = take(&memory, &used, B * nc * KV * (v ? Dv : D));
                    a->hidden[v] = take(&memory, &used, B * nc * KV * compress_hidden(c->compress, v ? (int)Dv : (int)D));
                }
            }
            a->mid = take(&memory, &used, N * C);
        }
        if (keep_ffn || l == 0) {
            a->rstd2 = take(&memory, &used, N);
            a->gate_up = take(&memory, &used, N * 2 * (keep_ffn ? ffn_width(c, l) : width));
            if (keep_ffn ? layer_is_moe(c, l) : moe) {
                a->expert_gate_up = take(&memory, &used, N * k * 2 * c->moe_intermediate_size);
                a->routing.probs = take(&memory, &used, N * E);
                a->routing.lse = take(&memory, &used, N);
                a->routing.weight = take(&memory, &used, N * k);
                a->routing.choice = take_ints(&memory, &used, N * k);
                a->routing.row_token = take_ints(&memory, &used, N * k);
                a->routing.start = (int64_t *)take_ints(&memory, &used, 2 * (E + 1));
                a->routing.load = (int64_t *)take_ints(&memory, &used, 2 * E);
            }
        } else {
            a->rstd2 = acts[0].rstd2;
            a->gate_up = acts[0].gate_up;
            a->expert_gate_up = acts[0].expert_gate_up;
            a->routing = acts[0].routing;
        }
    }
    return used;
}

static int64_t carve_scratch(Scratch *s, const Config *c, int64_t B, int64_t T, int train, real *memory) {
    const int64_t N = B * T, C = c->hidden_size, H = c->num_attention_heads, KV = c->num_key_value_heads, D = c->head_dim, Dv = c->v_head_dim;
    const Pieces pieces = pieces_of(comm.parts, T);
    const int64_t nc = compressed_seen(pieces.text - 1, c->cmp_block, c->cmp_stride), threads = thread_count();
    int64_t used = 0, wide = 0, width = 0, side_k = 0, side_v = 0, parts = 0, tile = 0, compress = 0, nsa = 0, keys = 0;
    for (int l = 0; l < c->num_hidden_layers; l++) {
        const WideRow row = wide_row(c, l);
        wide = max64(wide, row.size);
        width = max64(width, ffn_width(c, l));
        nsa |= !layer_is_full(c, l);
        if (comm.parts > 1) keys = max64(keys, B * pieces.text * keys_width(&row));
        for (int b = 0; b < row.branches; b++) {
            AttentionShape shape = attention_shape(c, B, &pieces, pieces.all - 1, 0, 0);        // the last piece takes the most
            const Mask mask = branch_mask(c, NULL, &shape, l, b);
            TileScratch w;
            tile = max64(tile, threads * tile_scratch(&w, NULL, &shape, &mask, train));
            side_k = max64(side_k, B * KV * side_size(key_block(&mask), shape.Tk, (int)D));
            side_v = max64(side_v, B * KV * side_size(key_block(&mask), shape.Tk, (int)Dv));
            if (attention_parts(&shape) > 1) parts = max64(parts, attention_parts(&shape) * B * shape.Tk * KV * (D + Dv));
            if (mask.kind == MASK_COMPRESSED) tile = max64(tile, threads * select_scratch(&shape, c->sel_block));
        }
    }
    if (nsa) compress = compress_scratch(c->compress, (int)max64(D, Dv), c->cmp_block);
    const MoeShape moe = moe_shape(c, N, comm.parts, NULL);
    s->norm = take(&memory, &used, N * C);
    s->y = take(&memory, &used, N * C);
    s->attention = take(&memory, &used, N * H * Dv);
    s->ffn = take(&memory, &used, N * width);
    s->side_k = take(&memory, &used, side_k);
    s->tile = take(&memory, &used, tile);
    s->compress = take(&memory, &used, compress);
    s->logits = take(&memory, &used, logit_rows(c, N) * c->vocab_size);
    s->experts = c->num_experts ? take(&memory, &used, moe_scratch(&moe)) : NULL;
    s->keys = take(&memory, &used, keys);
    if (!train) return used;
    s->dkeys = take(&memory, &used, keys);
    s->dx = take(&memory, &used, N * C);
    s->dnorm = take(&memory, &used, N * C);
    s->dwide = take(&memory, &used, N * wide);
    s->dattention = take(&memory, &used, N * H * Dv);
    s->dgates = take(&memory, &used, nsa ? N * H * BRANCHES : 0);
    s->dgate_up = take(&memory, &used, N * 2 * width);
    s->dffn = take(&memory, &used, N * width);
    s->dcompressed[0] = take(&memory, &used, nsa ? B * nc * KV * D : 0);
    s->dcompressed[1] = take(&memory, &used, nsa ? B * nc * KV * Dv : 0);
    s->side_v = take(&memory, &used, side_v);
    s->parts = take(&memory, &used, parts);
    s->dprobs = take(&memory, &used, N * c->num_experts);
    return used;
}

// Bytes of the parts of a model, given in numbers; `table` (or NULL) gets a line for each part.
int64_t memory_table(const int64_t part[5], Text *table) {
    const char *name[] = {"weights", "gradients", "AdamW state", "activations", "working memory"};
    const int64_t size = (int64_t)sizeof(real);
    int64_t total = 0;
    for (int i = 0; i < 5; i++) {
        total += part[i] * size;
        if (table && part[i]) text_add(table, "  %-16s %10.1f MB\n", name[i], (double)(part[i] * size) / 1e6);
    }
    if (table) text_add(table, "  %-16s %10.1f MB\n", "total", (double)total / 1e6);
    return total;
}

// What a model takes, before it is taken. T: tokens of a sequence, or of this rank's part of it.
int64_t model_bytes(const Config *c, int64_t B, int64_t T, int recompute, int train, Text *table) {
    LayerActs *acts = (LayerActs *)xcalloc((size_t)c->num_hidden_layers, sizeof(LayerActs));
    Scratch scratch;
    int64_t state;
    const int64_t params = count_state(c, &state);
    const int64_t part[] = {params, train ? params : 0, train ? 2 * state : 0, carve_acts(acts, c, B, T, recompute, train, NULL),
                            carve_scratch(&scratch, c, B, T, train, NULL) + B * T + max64(T * comm.parts, 1) * c->head_dim +
                                (int64_t)thread_count() * (PACK_A + PACK_B)};
    free(acts);
    return memory_table(part, table);
}

// Takes what model_bytes counted: activations for up to B·T tokens, and with `train` gradients and AdamW's state.
void model_alloc(Model *m, int64_t B, int64_t T, int recompute, int train) {
    const Config *c = &m->config;
    free(m->acts);
    free(m->memory);
    m->B = (int)B;
    m->T = (int)T;
    m->recompute = recompute;
    m->train = train;
    m->parts = comm.parts;
    m->acts = (LayerActs *)xcalloc((size_t)c->num_hidden_layers, sizeof(LayerActs));
    m->rope_positions = T * m->parts;
    const int64_t table = round_up(m->rope_positions * c->head_dim, 16), rstd = round_up(B * T, 16);
    const int64_t acts = carve_acts(m->acts, c, B, T, recompute, train, NULL), scratch = carve_scratch(&m->scratch, c, B, T, train, NULL);
    m->memory = (real *)xmalloc((size_t)(table + rstd + acts + scratch) * sizeof(real));
    m->rope = m->memory;
    m->final_rstd = m->rope + table;
    carve_acts(m->acts, c, B, T, recompute, train, m->final_rstd + rstd);
    carve_scratch(&m->scratch, c, B, T, train, m->final_rstd + rstd + acts);
    rope_table(m->rope, m->rope_positions, c->head_dim, c->rope_theta);
    if (train && !m->grads) {
        list_slices(m);
        m->grads = (real *)xcalloc((size_t)m->num_elements, sizeof(real));
        m->adam_m = (real *)xcalloc((size_t)m->state_elements, sizeof(real));
        m->adam_v = (real *)xcalloc((size_t)m->state_elements, sizeof(real));
    }
}

// ----------------------------------------------------------------------------
// Forward

// A dropout site on y (N,C); nothing happens where there is no step.
static void residual_dropout(real *y, const Model *m, int64_t T, int64_t n, int site, const StepInfo *info) {
    const Pieces p = pieces_of(m->parts, T);
    const int64_t C = m->config.hidden_size, B = n / T, size = p.length * C;
    for (int64_t x = 0; info && x < p.own * B; x++)
        dropout_apply(y + x * size, size, (info->first_sequence * p.text + row_of_texts(&p, own_part(&p), x * p.length, B)) * C, info->dropout, info->seed, info->step, site);
}

static void add_residual(real *out, const real *x, const real *y, int64_t n) {
    #pragma omp parallel for
    for (int64_t i = 0; i < n; i++) out[i] = x[i] + y[i];
}

// tokens (B,T) -> acts[0].x (B,T,C)
void model_embed(Model *m, const int *tokens, int64_t B, int64_t T, const StepInfo *info) {
    const int64_t C = m->config.hidden_size;
    real *x = m->acts[0].x;
    for (int64_t i = 0; i < B * T; i++) memcpy(x + i * C, m->embed + tokens[i] * C, (size_t)C * sizeof(real));
    residual_dropout(x, m, T, B * T, 0, info);
}

// RoPE of a piece's queries, and of its keys but the compressed branch's, which turn as blocks.
static void rope_piece(real *wide, const Model *m, const WideRow *row, const Pieces *p, int i, int64_t rows, int turn) {
    const Config *c = &m->config;
    const real *angles = m->rope + piece_start(p, i) * c->head_dim;
    rope(wide, row->size, angles, rows, p->length, 1, c->num_attention_heads, c->head_dim, turn);
    for (int b = 0; b < row->branches; b++)
        if (row->branches == 1 || b != CMP) rope(wide + row->k[b], row->size, angles, rows, p->length, 1, c->num_key_value_heads, c->head_dim, turn);
}

// The keys and values of whole texts, those of all branches side by side: columns k[0] .. gate of the wide rows as they lie, or where ranks share
// the texts the same columns of all of them, (B,text), in work.keys. `again`: they are there already.
typedef struct TextKeys { real *x; int64_t row; } TextKeys;
static TextKeys text_keys(const Model *m, real *wide, const WideRow *row, const Pieces *p, int64_t B, int again) {
    TextKeys keys = {wide + row->k[0], row->size};
    if (p->parts == 1) return keys;
    keys.x = m->scratch.keys;
    keys.row = keys_width(row);
    if (again) return keys;
    #pragma omp parallel for
    for (int64_t x = 0; x < p->own * p->length * B; x++)
        memcpy(keys.x + row_of_texts(p, own_part(p), x, B) * keys.row, wide + x * row->size + row->k[0], (size_t)keys.row * sizeof(real));
    comm_exchange_pieces((char *)keys.x, (const char *)keys.x, p, B, p->length * keys.row * (int64_t)sizeof(real), 0);
    return keys;
}

// The way back of their gradients: dwide = the sums over the ranks of what each has for this one's rows, in the order of the ranks. Overwrites work.keys.
static void text_keys_backward(const Model *m, real *dwide, const WideRow *row, const Pieces *p, int64_t B) {
    const int64_t width = keys_width(row);
    const int me = own_part(p);
    real *theirs = m->scratch.keys;
    const real *mine = m->scratch.dkeys;
    comm_exchange_pieces((char *)theirs, (const char *)mine, p, B, p->length * width * (int64_t)sizeof(real), 1);
    #pragma omp parallel for
    for (int64_t x = 0; x < p->own * p->length * B; x++)
        for (int part = 0; part < p->parts; part++) {
            const real *from = (part == me ? mine : theirs) + row_of_texts(p, part, x, B) * width;
            real *to = dwide + x * row->size + row->k[0];
            for (int64_t j = 0; j < width; j++) to[j] = (part ? to[j] : 0) + from[j];
        }
}

// From the wide row to the output of the heads (B,T,H,Dv), which it returns: RoPE, compression, selection, the branches' attention
// and their sum under the gates. Where ranks share texts, the rows are those of two pieces, each a call of attention over all keys.
const real *attention_core_forward(Model *m, int layer, int64_t B, int64_t T) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->layers[layer];
    LayerActs *a = &m->acts[layer];
    Scratch *s = &m->scratch;
    const WideRow row = wide_row(c, layer);
    const Pieces p = pieces_of(m->parts, T);
    const int64_t N = B * T, rows = B * p.length;
    const int H = c->num_attention_heads, KV = c->num_key_value_heads, D = c->head_dim, nsa = row.branches > 1;

    if (nsa)        // before RoPE turns q
        gates_forward(a->gates, a->wide + row.gate, row.size, a->wide, row.size, w->gate_weight, w->gate_bias, N, H, D, c->gate);
    for (int i = 0; i < p.own; i++) rope_piece(a->wide + i * rows * row.size, m, &row, &p, i, rows, 1);
    const TextKeys keys = text_keys(m, a->wide, &row, &p, B, 0);
    for (int b = 0; b < row.branches; b++) {
        const int compressed = nsa && b == CMP;
        const real *k = keys.x + row.k[b] - row.k[0], *v = keys.x + row.v[b] - row.k[0];
        if (compressed) {
            for (int i = 0; i < 2; i++) {
                const CompressShape cs = compress_shape(c, B, p.text, keys.row, i);
                compress_forward(a->compressed[i], a->hidden[i], i ? v : k, &w->compress[i], &cs, s->compress);
            }
            k = a->compressed[0];
            v = a->compressed[1];
            const int64_t nc = compressed_seen(p.text - 1, c->cmp_block, c->cmp_stride);
            rope(a->compressed[0], (int64_t)KV * D, m->rope, B * nc, max64(nc, 1), c->cmp_stride, KV, D, 1);
        }
        for (int i = 0; i < p.own; i++) {
            const int64_t first = i * rows;
            AttentionShape shape = attention_shape(c, B, &p, own_piece(&p, i), row.size, keys.row);
            int *block_idx = nsa ? a->block_idx + first * KV * c->sel_blocks : NULL;
            const Mask mask = branch_mask(c, block_idx, &shape, layer, b);
            const real *q = a->wide + first * row.size;
            attention_forward(a->branch[b] + first * H * c->v_head_dim, a->lse[b] + first * H, q, k, v, &mask, &shape, s->side_k, s->tile);
            if (compressed) {
                const SelectShape select = select_shape(c);
                select_forward(block_idx, q, s->side_k, a->lse[CMP] + first * H, &shape, &select, s->tile);
            }
        }
    }
    if (!nsa) return a->branch[0];
    branches_sum(s->attention, a->branch, a->gates, N * H, c->v_head_dim);
    return s->attention;
}

// x + attention(rmsnorm(x)): acts.x -> acts.mid
static void attention_layer_forward(Model *m, int layer, int64_t B, int64_t T, const StepInfo *info) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->layers[layer];
    LayerActs *a = &m->acts[layer];
    Scratch *s = &m->scratch;
    const int64_t N = B * T, C = c->hidden_size, wide = wide_row(c, layer).size, HDv = (int64_t)c->num_attention_heads * c->v_head_dim;
    rmsnorm_forward(s->norm, a->rstd1, a->x, w->norm1, N, C, c->rms_norm_eps);
    linear_forward(a->wide, wide, s->norm, C, w->wide, N, C, wide);
    linear_forward(s->y, C, attention_core_forward(m, layer, B, T), HDv, w->o, N, HDv, C);
    residual_dropout(s->y, m, T, N, 2 * layer + 1, info);
    add_residual(a->mid, a->x, s->y, N * C);
}

// x + ffn(rmsnorm(x)): acts.mid -> acts.out
static void ffn_layer_forward(Model *m, int layer, int64_t B, int64_t T, const StepInfo *info) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->layers[layer];
    LayerActs *a = &m->acts[layer];
    Scratch *s = &m->scratch;
    const int64_t N = B * T, C = c->hidden_size, F = ffn_width(c, layer);
    rmsnorm_forward(s->norm, a->rstd2, a->mid, w->norm2, N, C, c->rms_norm_eps);
    if (F > 0) {
        linear_forward(a->gate_up, 2 * F, s->norm, C, w->gate_up, N, C, 2 * F);
        swiglu_forward(s->ffn, a->gate_up, N, F);
        linear_forward(s->y, C, s->ffn, F, w->down, N, F, C);
    } else {
        memset(s->y, 0, (size_t)(N * C) * sizeof(real));
    }
    if (layer_is_moe(c, layer)) {
        const MoeShape moe = moe_shape(c, N, m->parts, info);
        linear_forward(a->routing.probs, moe.E, s->norm, C, w->router, N, C, moe.E);
        moe_route(&a->routing, &moe);
        if (m->parts > 1) comm_sum_parts(a->routing.load, moe.E);
        moe_forward(s->y, a->expert_gate_up, s->norm, w->experts, &a->routing, &moe, s->experts);
    }
    residual_dropout(s->y, m, T, N, 2 * layer + 2, info);
    add_residual(a->out, a->mid, s->y, N * C);
}

void model_layer_forward(Model *m, int layer, int64_t B, int64_t T, const StepInfo *info) {
    const Config *c = &m->config;
    const LayerActs *a = &m->acts[layer];
    attention_layer_forward(m, layer, B, T, info);
    ffn_layer_forward(m, layer, B, T, info);
    if (!layer_is_full(c, layer)) {
        const int64_t n = B * T * c->num_attention_heads;
        for (int64_t i = 0; i < n * BRANCHES; i++) m->gate_sum[layer * BRANCHES + i % BRANCHES] += (double)a->gates[i];
        m->gate_count[layer] += n;
    }
    if (layer_is_moe(c, layer)) {
        const MoeShape moe = moe_shape(c, B * T, m->parts, info);
        double z, balance;
        moe_losses(&z, &balance, &a->routing, &moe, c->z_loss_coef, c->balance_loss_coef);
        m->moe_z += z;
        m->moe_balance += balance;
        for (int e = 0; e < moe.E; e++) m->moe_load[layer * moe.E + e] += (double)a->routing.load[e];
    }
}

static real *layers_forward(Model *m, const int *tokens, int64_t B, int64_t T, const StepInfo *info) {
    if (B * T > (int64_t)m->B * m->T || T * m->parts > m->rope_positions) die(1, "internal error: a batch of %" PRId64 "x%" PRId64 " in memory for %dx%d", B, T, m->B, m->T);
    m->moe_z = m->moe_balance = 0;
    model_embed(m, tokens, B, T, info);
    for (int l = 0; l < m->config.num_hidden_layers; l++) model_layer_forward(m, l, B, T, info);
    return m->acts[m->config.num_hidden_layers - 1].out;
}

// One row of logits (V) becomes its softmax; returns the cross entropy of `target`.
static double softmax_cross_entropy(real *p, int64_t v, int target) {
    real top = p[0], sum = 0;
    #pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < v; j++) top = p[j] > top ? p[j] : top;
    const real at_target = p[target];
    #pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < v; j++) { p[j] = fast_exp(p[j] - top); sum += p[j]; }
    const real inverse = 1 / sum;
    for (int64_t j = 0; j < v; j++) p[j] *= inverse;
    return log((double)sum) - (double)(at_target - top);
}

// Logits of some rows at a time, their cross entropy and, where info is given, the whole backward of the head
// at once, since logits are too many to keep: dx (B,T,C) = gradient of the last layer's output. Mean cross entropy.
static double head_loss(Model *m, const real *x, const int *targets, int64_t N, const StepInfo *info) {
    const Config *c = &m->config;
    Scratch *s = &m->scratch;
    const int64_t C = c->hidden_size, V = c->vocab_size, rows = logit_rows(c, N);
    double *loss = (double *)xmalloc((size_t)rows * sizeof(double)), total = 0;
    rmsnorm_forward(s->norm, m->final_rstd, x, m->norm, N, C, c->rms_norm_eps);
    for (int64_t i0 = 0; i0 < N; i0 += rows) {
        const int64_t n = min64(rows, N - i0);
        linear_forward(s->logits, V, s->norm + i0 * C, C, m->head, n, C, V);
        const real scale = info ? (real)(info->grad_scale / (double)N) : 0;
        #pragma omp parallel for
        for (int64_t i = 0; i < n; i++) {
            real *p = s->logits + i * V;
            loss[i] = softmax_cross_entropy(p, V, targets[i0 + i]);
            if (!info) continue;
            p[targets[i0 + i]] -= 1;
            for (int64_t j = 0; j < V; j++) p[j] *= scale;
        }
        for (int64_t i = 0; i < n; i++) total += loss[i];
        if (info) linear_backward(s->dnorm + i0 * C, C, m->grads + (m->head - m->weights), s->logits, V, s->norm + i0 * C, C, m->head, n, C, V, 0);
    }
    if (info) {
        memset(s->dx, 0, (size_t)(N * C) * sizeof(real));
        rmsnorm_backward(s->dx, m->grads + (m->norm - m->weights), s->dnorm, x, m->final_rstd, m->norm, N, C);
    }
    free(loss);
    return total / (double)N;
}

// Mean cross entropy of targets (B,T) after tokens (B,T); no dropout, no capacity.
double model_evaluate(Model *m, const int *tokens, const int *targets, int64_t B, int64_t T) {
    const real *x = layers_forward(m, tokens, B, T, NULL);
    return m->loss = head_loss(m, x, targets, B * T, NULL);
}

// logits (B,T,V), or with last_only (B,V) of the last position, by this rank alone.
void model_logits(Model *m, const int *tokens, int64_t B, int64_t T, real *logits, int last_only) {
    const int64_t C = m->config.hidden_size, V = m->config.vocab_size;
    const int parts = m->parts;
    m->parts = 1;
    const real *x = layers_forward(m, tokens, B, T, NULL);
    m->parts = parts;
    rmsnorm_forward(m->scratch.norm, m->final_rstd, x, m->norm, B * T, C, m->config.rms_norm_eps);
    const int64_t skip = last_only ? T : 1;
    linear_forward(logits, V, m->scratch.norm + (skip - 1) * C, skip * C, m->head, last_only ? B : B * T, C, V);
}

// ----------------------------------------------------------------------------
// Backward. `dx` (B,T,C) carries the gradient of the residual stream down the layers.

static inline real *grad_of(const Model *m, const real *weight) { return weight ? m->grads + (weight - m->weights) : NULL; }

static void ffn_layer_backward(Model *m, int layer, int64_t B, int64_t T, const StepInfo *info) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->layers[layer];
    LayerActs *a = &m->acts[layer];
    Scratch *s = &m->scratch;
    const int64_t N = B * T, C = c->hidden_size, F = ffn_width(c, layer);
    real *dy = s->y;
    memcpy(dy, s->dx, (size_t)(N * C) * sizeof(real));
    residual_dropout(dy, m, T, N, 2 * layer + 2, info);
    rmsnorm_again(s->norm, a->rstd2, a->mid, w->norm2, N, C);
    if (F > 0) {
        swiglu_forward(s->ffn, a->gate_up, N, F);
        linear_backward(s->dffn, F, grad_of(m, w->down), dy, C, s->ffn, F, w->down, N, F, C, 0);
        swiglu_backward(s->dgate_up, s->dffn, a->gate_up, N, F);
        linear_backward(s->dnorm, C, grad_of(m, w->gate_up), s->dgate_up, 2 * F, s->norm, C, w->gate_up, N, C, 2 * F, 0);
    } else {
        memset(s->dnorm, 0, (size_t)(N * C) * sizeof(real));
    }
    if (layer_is_moe(c, layer)) {
        const MoeShape moe = moe_shape(c, N, m->parts, info);
        moe_backward(s->dnorm, grad_of(m, w->experts), s->dprobs, dy, a->expert_gate_up, s->norm, w->experts, &a->routing, &moe, s->experts);
        router_backward(s->dprobs, &a->routing, &moe, c->z_loss_coef, c->balance_loss_coef, info->grad_scale);
        linear_backward(s->dnorm, C, grad_of(m, w->router), s->dprobs, moe.E, s->norm, C, w->router, N, C, moe.E, 1);
    }
    rmsnorm_backward(s->dx, grad_of(m, w->norm2), s->dnorm, a->mid, a->rstd2, w->norm2, N, C);
}

// From the gradient of the heads' output, dattention (B,T,H,Dv), to that of the wide row, dwide.
void attention_core_backward(Model *m, int layer, int64_t B, int64_t T) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->layers[layer];
    LayerActs *a = &m->acts[layer];
    Scratch *s = &m->scratch;
    const WideRow row = wide_row(c, layer);
    const Pieces p = pieces_of(m->parts, T);
    const int64_t N = B * T, rows = B * p.length, nc = compressed_seen(p.text - 1, c->cmp_block, c->cmp_stride);
    const int H = c->num_attention_heads, KV = c->num_key_value_heads, D = c->head_dim, Dv = c->v_head_dim, nsa = row.branches > 1;

    if (nsa) branches_dgates(s->dgates, a->branch, s->dattention, N * H, Dv);
    memset(s->dwide, 0, (size_t)(N * row.size) * sizeof(real));
    const TextKeys keys = text_keys(m, a->wide, &row, &p, B, m->recompute >= 2);
    real *dkeys = p.parts > 1 ? s->dkeys : s->dwide + row.k[0];     // rows as those of keys
    if (p.parts > 1) memset(dkeys, 0, (size_t)(B * p.text * keys.row) * sizeof(real));
    for (int b = 0; b < row.branches; b++) {
        const int compressed = nsa && b == CMP;
        const int64_t k_at = row.k[b] - row.k[0], v_at = row.v[b] - row.k[0];
        const real *k = compressed ? a->compressed[0] : keys.x + k_at, *v = compressed ? a->compressed[1] : keys.x + v_at;
        real *dk = compressed ? s->dcompressed[0] : dkeys + k_at, *dv = compressed ? s->dcompressed[1] : dkeys + v_at;
        if (compressed) {
            memset(dk, 0, (size_t)(B * nc * KV * D) * sizeof(real));
            memset(dv, 0, (size_t)(B * nc * KV * Dv) * sizeof(real));
        }
        for (int i = 0; i < p.own; i++) {
            const int64_t first = i * rows, heads = first * H;
            AttentionShape shape = attention_shape(c, B, &p, own_piece(&p, i), row.size, keys.row);
            const Mask mask = branch_mask(c, nsa ? a->block_idx + first * KV * c->sel_blocks : NULL, &shape, layer, b);
            attention_backward(s->dwide + first * row.size, dk, dv, s->dattention + heads * Dv, nsa ? a->gates + heads * BRANCHES + b : NULL, BRANCHES,
                               a->branch[b] + heads * Dv, a->lse[b] + heads, a->wide + first * row.size, k, v, &mask, &shape, s->side_k, s->side_v, s->parts, s->tile);
        }
        if (!compressed) continue;
        rope(dk, (int64_t)KV * D, m->rope, B * nc, max64(nc, 1), c->cmp_stride, KV, D, -1);
        for (int i = 0; i < 2; i++) {       // of what these queries say of the blocks: the weights' gradients are summed over the ranks later
            const CompressShape cs = compress_shape(c, B, p.text, keys.row, i);
            CompressWeights wc = w->compress[i], dw = wc;
            CompressTensor list[COMPRESS_TENSORS];
            const int count = compress_tensors(list, c->compress, KV, c->cmp_block, cs.D);
            for (int t = 0; t < count; t++) *compress_pointer(&dw, &list[t]) = grad_of(m, *compress_pointer(&wc, &list[t]));
            const int64_t at = i ? v_at : k_at;
            compress_backward(dkeys + at, &dw, s->dcompressed[i], a->hidden[i], keys.x + at, &wc, &cs, s->compress);
        }
    }
    if (p.parts > 1) text_keys_backward(m, s->dwide, &row, &p, B);
    for (int i = 0; i < p.own; i++) rope_piece(s->dwide + i * rows * row.size, m, &row, &p, i, rows, -1);
    if (!nsa) return;
    // A gate on q reads q before RoPE: turn the kept one back (nothing needs it turned any more).
    for (int i = 0; i < p.own && c->gate == GATE_Q_COND; i++)
        rope(a->wide + i * rows * row.size, row.size, m->rope + piece_start(&p, i) * D, rows, p.length, 1, H, D, -1);
    gates_backward(s->dgates, s->dwide + row.gate, row.size, s->dwide, a->wide, row.size, grad_of(m, w->gate_weight),
                   grad_of(m, w->gate_bias), a->gates, w->gate_weight, N, H, D, c->gate);
}

static void attention_layer_backward(Model *m, int layer, int64_t B, int64_t T, const StepInfo *info) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->layers[layer];
    LayerActs *a = &m->acts[layer];
    Scratch *s = &m->scratch;
    const int64_t N = B * T, C = c->hidden_size, wide = wide_row(c, layer).size, HDv = (int64_t)c->num_attention_heads * c->v_head_dim;
    const real *attention = a->branch[0];
    if (!layer_is_full(c, layer)) {
        branches_sum(s->attention, a->branch, a->gates, N * c->num_attention_heads, c->v_head_dim);
        attention = s->attention;
    }
    memcpy(s->y, s->dx, (size_t)(N * C) * sizeof(real));
    residual_dropout(s->y, m, T, N, 2 * layer + 1, info);
    linear_backward(s->dattention, HDv, grad_of(m, w->o), s->y, C, attention, HDv, w->o, N, HDv, C, 0);
    attention_core_backward(m, layer, B, T);
    rmsnorm_again(s->norm, a->rstd1, a->x, w->norm1, N, C);
    linear_backward(s->dnorm, C, grad_of(m, w->wide), s->dwide, wide, s->norm, C, w->wide, N, C, wide, 0);
    rmsnorm_backward(s->dx, grad_of(m, w->norm1), s->dnorm, a->x, a->rstd1, w->norm1, N, C);
}

// A training micro-batch: grads += grad_scale · d(cross entropy + router terms). Returns the mean cross entropy.
double model_forward_backward(Model *m, const int *tokens, const int *targets, int64_t B, int64_t T, const StepInfo *info) {
    const int64_t C = m->config.hidden_size, N = B * T;
    const real *x = layers_forward(m, tokens, B, T, info);
    m->loss = head_loss(m, x, targets, N, info);
    for (int l = m->config.num_hidden_layers - 1; l >= 0; l--) {
        if (m->recompute >= 2) attention_layer_forward(m, l, B, T, info);
        if (m->recompute >= 1) ffn_layer_forward(m, l, B, T, info);
        ffn_layer_backward(m, l, B, T, info);
        attention_layer_backward(m, l, B, T, info);
    }
    // Rows of the embedding are shared out by token id: each is added up by one thread, in order.
    residual_dropout(m->scratch.dx, m, T, N, 0, info);
    real *dembed = grad_of(m, m->embed);
    const int threads = thread_count();
    #pragma omp parallel for
    for (int t = 0; t < threads; t++)
        for (int64_t i = 0; i < N; i++)
            if (tokens[i] % threads == t)
                for (int64_t j = 0; j < C; j++) dembed[tokens[i] * C + j] += m->scratch.dx[i * C + j];
    return m->loss;
}

// ----------------------------------------------------------------------------
// AdamW (Loshchilov and Hutter 2019)

void model_zero_grads(Model *m) { memset(m->grads, 0, (size_t)m->num_elements * sizeof(real)); }

enum { SUM_CHUNK = 1 << 16 };

// The sums of the gradients over the ranks: of all numbers, or of this rank's shares of them.
void model_reduce_grads(Model *m) {
    for (int b = 0; b < bucket_count(m); b++) {
        int64_t begin, end;
        bucket_range(m, b, &begin, &end);
        comm_reduce_scatter(m->grads, begin, end);
        if (comm.shards == 1) comm_all_gather(m->grads, begin, end);
    }
}

// Of x (n), added up in chunks of fixed size, so that it does not depend on the number of threads.
static double square_sum(const real *x, int64_t n) {
    const int64_t chunks = (n + SUM_CHUNK - 1) / SUM_CHUNK;
    double *sums = (double *)xcalloc((size_t)chunks, sizeof(double)), total = 0;
    #pragma omp parallel for
    for (int64_t i = 0; i < chunks; i++) {
        double sum = 0;
        #pragma omp simd reduction(+ : sum)
        for (int64_t j = i * SUM_CHUNK; j < min64((i + 1) * SUM_CHUNK, n); j++) sum += (double)x[j] * (double)x[j];
        sums[i] = sum;
    }
    for (int64_t i = 0; i < chunks; i++) total += sums[i];
    free(sums);
    return total;
}

// The global norm, over all ranks.
double model_grad_norm(const Model *m) {
    if (comm.shards == 1) return sqrt(square_sum(m->grads, m->num_elements));
    double total = 0;
    for (int b = 0; b < bucket_count(m); b++) {
        int64_t from, to;
        bucket_share(m, b, &from, &to);
        total += square_sum(m->grads + from, to - from);
    }
    comm_sum(&total, 1);
    return sqrt(total);
}

// m = b1·m + (1-b1)·g, v = b2·v + (1-b2)·g², w -= lr·(m̂ / (sqrt(v̂) + eps) + decay·w); t counts from 1; g = clip · gradient.
void model_adamw(Model *m, double lr, double beta1, double beta2, double eps, double decay, int64_t t, double clip) {
    const real b1 = (real)beta1, b2 = (real)beta2, e = (real)eps, scale = (real)clip;
    const real rate = (real)(lr / (1 - pow(beta1, (double)t))), inverse = (real)(1 / (1 - pow(beta2, (double)t)));
    for (int i = 0; i < m->num_slices; i++) {
        const Slice *slice = &m->slices[i];
        const Param *p = &m->params[slice->param];
        const real shrink = (real)(param_decays(p) ? lr * decay : 0);
        real *w = m->weights + p->offset + slice->first, *am = m->adam_m + slice->at, *av = m->adam_v + slice->at;
        const real *grad = m->grads + p->offset + slice->first;
        #pragma omp parallel for simd if (slice->count > 4096)
        for (int64_t j = 0; j < slice->count; j++) {
            const real g = grad[j] * scale;
            am[j] = b1 * am[j] + (1 - b1) * g;
            av[j] = b2 * av[j] + (1 - b2) * g * g;
            w[j] -= rate * am[j] / (root(av[j] * inverse) + e) + shrink * w[j];
        }
    }
    if (comm.shards == 1) return;
    for (int b = 0; b < bucket_count(m); b++) {
        int64_t begin, end;
        bucket_range(m, b, &begin, &end);
        comm_all_gather(m->weights, begin, end);
    }
}

// Which layer's output first holds a NaN or an infinity after a forward pass that kept the outputs: -1 is the embedding, the
// number of layers the head.
int model_bad_layer(const Model *m, int64_t n) {
    const int64_t size = n * m->config.hidden_size;
    for (int l = -1; l < m->config.num_hidden_layers; l++) {
        const real *x = l < 0 ? m->acts[0].x : m->acts[l].out;
        for (int64_t i = 0; i < size; i++)
            if (!isfinite((double)x[i])) return l;
    }
    return m->config.num_hidden_layers;
}

// ----------------------------------------------------------------------------
// The device that trains. Section 7 calls it by these names: here they are the functions above; train_nsa.cu, which defines
// NSA_GPU, brings twins that do the same on a GPU.

#ifdef NSA_GPU
int64_t device_memory(void);
void device_plan(void);             // so that memory can be counted where the device is not
void device_describe(const Config *c, Text *out);
int64_t device_bytes(const Config *c, int64_t B, int64_t T, int recompute, int train, Text *table);
void device_alloc(Model *m, int64_t B, int64_t T, int recompute, int train);
void device_store(Model *m);        // weights and AdamW's state, to the device
void device_fetch(Model *m);        // and back, for a checkpoint
double device_evaluate(Model *m, const int *tokens, const int *targets, int64_t B, int64_t T);
void device_logits(Model *m, const int *tokens, int64_t B, int64_t T, real *logits, int last_only);
void device_zero_grads(Model *m);
double device_forward_backward(Model *m, const int *tokens, const int *targets, int64_t B, int64_t T, const StepInfo *info);
int device_bad_layer(const Model *m, int64_t n);
void device_reduce_grads(Model *m);
double device_grad_norm(const Model *m);
void device_adamw(Model *m, double lr, double beta1, double beta2, double eps, double decay, int64_t t, double clip);
#else
#define device_memory total_memory_bytes
#define device_bytes model_bytes
#define device_alloc model_alloc
#define device_evaluate model_evaluate
#define device_logits model_logits
#define device_zero_grads model_zero_grads
#define device_forward_backward model_forward_backward
#define device_bad_layer model_bad_layer
#define device_reduce_grads model_reduce_grads
#define device_grad_norm model_grad_norm
#define device_adamw model_adamw
static inline void device_plan(void) {}
static inline void device_store(Model *m) { (void)m; }      // they lie where they are used
static inline void device_fetch(Model *m) { (void)m; }
static inline void device_describe(const Config *c, Text *out) {
    (void)c;
    text_add(out, "%d thread%s, %s", thread_count(), thread_count() > 1 ? "s" : "", sizeof(real) == 4 ? "f32" : "f64");
}
#endif

// ----------------------------------------------------------------------------
// 7. Training

#define TALES_NO_MAIN
#include "data/tales.c"
#include "build/modeling_nsa.h"  // modeling_nsa_py: scripts/modeling_nsa.py as a string, made by the Makefile

enum { TALES_SEED = 1, TALES_BYTES = 4 << 20 };  // the corpus of `./train_nsa` alone

// Where a run is. With the weights and AdamW's state this is all that the next step depends on: data
// order, dropout and samples are functions of the seed and of these numbers.
typedef struct {
    int64_t step;      // updates done
    int64_t sequence;  // the next one of the training order
    int64_t tokens;    // trained on so far
    int64_t best_step, stale;  // of the best validation; validations since then
    double best_val;
} Progress;

typedef struct {
    Options options;   // every default filled in
    Config config;
    char *start;       // folder whose weights to start from, NULL: none
    char *out;         // folder of the run, NULL: writes nothing
    Tokenizer tokenizer;
    char *tokenizer_text;  // tokenizer.json, NULL: bytes, or tokens whose text is unknown
    int64_t tokenizer_len;
    DataSet train, val;
    Order order;
    int bytes;         // 1: tokens are bytes
    int ranks;         // of this run, or of the one that is planned
    int groups;        // of ranks that share each sequence
    int accumulation;  // micro-batches of a step, of each group
    int64_t memory;    // bytes
    int *tokens, *targets, *window;
    double *moe_load;  // (L,E) choices in the last training step
    Progress progress;
    FILE *log;
} Run;

// Tokens of a sequence that one rank has.
static inline int part_tokens(const Options *o) { return o->seq_len / o->context_parallel; }

// What one step has to say.
typedef struct { double loss, val_loss, moe_z, moe_balance, lr, grad_norm, seconds; int evaluated, skipped; char where[32]; } StepReport;

// ----------------------------------------------------------------------------
// The learning rate of a step (counted from 0): a linear warm-up to the peak, then the schedule, which
// ends at final_lr_frac of the peak.

double learning_rate(const Options *o, int64_t step) {
    if (step < o->warmup) return o->lr * (double)(step + 1) / (double)o->warmup;
    double steps = (double)(o->max_steps - o->warmup), done = steps > 0 ? (double)(step - o->warmup) / steps : 1;
    double fall = 0;  // 0 at the peak, 1 at the end
    if (o->schedule == SCHEDULE_COSINE) fall = 0.5 - 0.5 * cos(M_PI * done);
    else if (o->schedule == SCHEDULE_LINEAR) fall = done;
    else if (o->schedule == SCHEDULE_WSD) fall = done < 0.8 ? 0 : (done - 0.8) / 0.2;  // stable, then decay in the last fifth
    else if (o->schedule == SCHEDULE_RESTARTS) fall = 0.5 - 0.5 * cos(M_PI * (done * o->cycles - floor(done * o->cycles)));
    return o->lr * (1 - fall * (1 - o->final_lr_frac));
}

// ----------------------------------------------------------------------------
// Numbers for people

// "1.50 GB", "812 kB"; each call may use one of four buffers.
const char *human(double x, const char *unit) {
    static char buffers[4][32];
    static int next;
    char *s = buffers[next++ & 3];
    const char *prefix = " kMGTPE";
    while (x >= 999.5 && prefix[1]) x /= 1000, prefix++;
    snprintf(s, sizeof buffers[0], "%.*f%s%.*s%s", *prefix == ' ' || x >= 99.95 ? 0 : x >= 9.995 ? 1 : 2, x,
             *unit ? " " : "", *prefix != ' ', prefix, unit);
    return s;
}

const char *human_bytes(double x) { return human(x, "B"); }
const char *human_count(double x) { return human(x, ""); }

const char *human_time(double seconds) {
    static char s[32];
    long t = seconds > 0 && seconds < 1e9 ? (long)(seconds + 0.5) : 0;
    if (t >= 86400) snprintf(s, sizeof s, "%ldd %02ldh", t / 86400, t / 3600 % 24);
    else if (t >= 3600) snprintf(s, sizeof s, "%ld:%02ld:%02ld", t / 3600, t / 60 % 60, t % 60);
    else snprintf(s, sizeof s, "%ld:%02ld", t / 60, t % 60);
    return s;
}

// ----------------------------------------------------------------------------
// Folders

int is_folder(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

int is_there(const char *path) {  // a dangling link counts
    struct stat st;
    return lstat(path, &st) == 0;
}

// The path itself if something lies there, else NULL.
char *existing(char *path) {
    if (is_there(path)) return path;
    free(path);
    return NULL;
}

// The folder itself must be on the disk before what lies in it can be relied upon. Some file systems
// do not know fsync of a folder (EINVAL); they are as safe as they can be.
int sync_folder(const char *path, char *err) {
    int fd = open(path, O_RDONLY);
    if (fd < 0) return fail(err, "%s: cannot open: %s", path, strerror(errno));
    int bad = fsync(fd) != 0 && errno != EINVAL, saved = errno;
    close(fd);
    return bad ? fail(err, "%s: cannot write: %s", path, strerror(saved)) : 0;
}

int make_folders(const char *path, char *err) {
    char *part = xstrdup(path);
    int result = 0;
    for (char *p = part + 1; !result; p++) {
        if (*p && *p != '/') continue;
        char c = *p;
        *p = 0;
        if (mkdir(part, 0777) != 0 && !(errno == EEXIST && is_folder(part)))
            result = fail(err, "%s: cannot create this folder: %s", part, strerror(errno));
        *p = c;
        if (!c) break;
    }
    free(part);
    return result;
}

// Deletes a folder of files, not what lies deeper: nothing of ours does.
void remove_folder(const char *path) {
    DIR *dir = opendir(path);
    if (!dir) return;
    for (struct dirent *e; (e = readdir(dir));) {
        char *file = format("%s/%s", path, e->d_name);
        if (strcmp(e->d_name, ".") && strcmp(e->d_name, "..")) unlink(file);
        free(file);
    }
    closedir(dir);
    rmdir(path);
}

// The step of a checkpoint's folder name, -1 for any other name.
int64_t step_of_name(const char *name) {
    char again[40];
    long long step;
    if (sscanf(name, "step_%lld", &step) != 1 || step < 0) return -1;
    snprintf(again, sizeof again, "step_%08lld", step);
    return strcmp(name, again) ? -1 : (int64_t)step;
}

// The step that OUT/latest or OUT/best points to, -1: none.
int64_t step_of_link(const char *out, const char *link) {
    char *path = format("%s/%s", out, link), target[256];
    ssize_t n = readlink(path, target, sizeof target - 1);
    free(path);
    if (n < 0) return -1;
    target[n] = 0;
    return step_of_name(target);
}

// OUT/latest -> step_00001000. The new link takes the old one's place in one move, so that at any
// moment one of the two is there.
int point_link(const char *out, const char *link, const char *target, char *err) {
    char *path = format("%s/%s", out, link), *temporary = format("%s/.%s.tmp", out, link);
    unlink(temporary);
    int result = 0;
    if (symlink(target, temporary) != 0 || rename(temporary, path) != 0)
        result = fail(err, "%s: cannot point it to %s: %s", path, target, strerror(errno));
    free(path);
    free(temporary);
    return result;
}

// What a killed run may have left half done: .step_00001000.tmp and such.
void remove_leftovers(const char *out) {
    DIR *dir = opendir(out);
    if (!dir) return;
    for (struct dirent *e; (e = readdir(dir));) {
        size_t n = strlen(e->d_name);
        if (strncmp(e->d_name, ".step_", 6) || n < 4 || strcmp(e->d_name + n - 4, ".tmp")) continue;
        char *path = format("%s/%s", out, e->d_name);
        remove_folder(path);
        free(path);
    }
    closedir(dir);
}

// Deletes all but the newest `keep` checkpoints, never those that latest and best point to.
void remove_old_checkpoints(const char *out, int64_t keep) {
    int64_t latest = step_of_link(out, "latest"), best = step_of_link(out, "best");
    for (int64_t after = -1;;) {
        int64_t oldest = -1, newer = 0;
        DIR *dir = opendir(out);
        if (!dir) return;
        for (struct dirent *e; (e = readdir(dir));) {
            int64_t step = step_of_name(e->d_name);
            if (step <= after) continue;
            newer++;
            if (oldest < 0 || step < oldest) oldest = step;
        }
        closedir(dir);
        if (newer <= keep) return;
        after = oldest;
        if (oldest == latest || oldest == best) continue;
        // Renamed first: a folder that bears a checkpoint's name is always whole.
        char *path = format("%s/step_%08" PRId64, out, oldest), *doomed = format("%s/.step_%08" PRId64 ".tmp", out, oldest);
        if (rename(path, doomed) == 0) remove_folder(doomed);
        free(path);
        free(doomed);
    }
}

// ----------------------------------------------------------------------------
// Checkpoints: a Hugging Face model folder, and beside the weights what resuming needs.

int write_weights(const Run *run, const Model *model, const char *folder, char *err) {
    StWriter w;
    int dtype = run->config.torch_dtype == DTYPE_BF16 ? ST_BF16 : ST_F32;
    char *path = format("%s/model.safetensors", folder);
    int result = st_writer_begin(&w, path, err);
    free(path);
    if (result < 0) return -1;
    st_writer_meta(&w, "format", "pt");
    if (run->bytes) st_writer_meta(&w, "tokenizer", "bytes");       // with --vocab, the size alone does not tell
    for (int i = 0; i < model->num_params; i++)
        st_writer_tensor(&w, model->params[i].name, dtype, model->params[i].ndim, model->params[i].shape);
    if (st_writer_header(&w, err) < 0) return -1;
    for (int i = 0; i < model->num_params; i++)
        if (st_writer_real(&w, model->weights + model->params[i].offset, model->params[i].count, dtype, err) < 0) return -1;
    return st_writer_end(&w, err);
}

void meta_count(StWriter *w, const char *key, int64_t value) {
    char text[32];
    snprintf(text, sizeof text, "%" PRId64, value);
    st_writer_meta(w, key, text);
}

// The name of the state's file: one, or with -z 1 one of each rank.
char *state_name(const char *folder, int rank, int ranks) {
    return ranks == 1 ? format("%s/state.safetensors", folder) : format("%s/state-%05d-of-%05d.safetensors", folder, rank + 1, ranks);
}

// AdamW's m and v, the full weights where model.safetensors has rounded ones, the progress, the options. Of a tensor that ranks
// share, each has a list of numbers, and says which of the tensor's is the first.
int write_state(const Run *run, const Model *model, const char *folder, char *err) {
    StWriter w;
    const Progress *p = &run->progress;
    const char *kinds[] = {"adam_m", "adam_v", "master"};
    const real *values[] = {model->adam_m, model->adam_v, model->weights};
    int count = run->config.torch_dtype == DTYPE_BF16 ? 3 : 2;
    char *path = state_name(folder, comm.shards > 1 ? comm.rank : 0, comm.shards);
    int result = st_writer_begin(&w, path, err);
    free(path);
    if (result < 0) return -1;

    char best[40];
    snprintf(best, sizeof best, "%.17g", p->best_val);  // 17 digits bring back every bit
    meta_count(&w, "step", p->step);
    meta_count(&w, "sequence", p->sequence);
    meta_count(&w, "tokens", p->tokens);
    meta_count(&w, "seed", run->options.seed);
    meta_count(&w, "micro_batch", run->options.batch);
    st_writer_meta(&w, "best_val_loss", best);
    meta_count(&w, "best_step", p->best_step);
    meta_count(&w, "validations_since_best", p->stale);
    for (int i = 0; i < TRAIN_OPTIONS; i++) {
        const Option *o = &train_options[i];
        if (o->type == OPT_GROUP || o->of != OF_RUN) continue;
        Text value = {NULL, 0, 0};
        option_text(o, &run->options, &value);
        char *key = format("option.%s", o->name);
        if (value.len) st_writer_meta(&w, key, value.data);
        free(key);
        free(value.data);
    }
    for (int i = 0; i < model->num_slices; i++) {
        const Slice *slice = &model->slices[i];
        const Param *p = &model->params[slice->param];
        if (slice->count == p->count) continue;
        char *key = format("first.%s", p->name);
        meta_count(&w, key, slice->first);
        free(key);
    }
    for (int kind = 0; kind < count; kind++)
        for (int i = 0; i < model->num_slices; i++) {
            const Slice *slice = &model->slices[i];
            const Param *p = &model->params[slice->param];
            const int whole = slice->count == p->count;
            char *name = format("%s.%s", kinds[kind], p->name);
            st_writer_tensor(&w, name, ST_F32, whole ? p->ndim : 1, whole ? p->shape : &slice->count);
            free(name);
        }
    if (st_writer_header(&w, err) < 0) return -1;
    for (int kind = 0; kind < count; kind++)
        for (int i = 0; i < model->num_slices; i++) {
            const Slice *slice = &model->slices[i];
            const int64_t at = kind < 2 ? slice->at : model->params[slice->param].offset + slice->first;
            if (st_writer_real(&w, values[kind] + at, slice->count, ST_F32, err) < 0) return -1;
        }
    return st_writer_end(&w, err);
}

int write_folder_file(const char *folder, const char *name, const char *text, int64_t len, char *err) {
    char *path = format("%s/%s", folder, name);
    int result = write_file(path, text, len, err);
    free(path);
    return result;
}

// What one rank writes for all.
int write_model_files(const Run *run, const Model *model, const char *folder, char *err) {
    Text config = {NULL, 0, 0};
    config_write(&run->config, &config);
    int result = write_folder_file(folder, "config.json", config.data, config.len, err);
    free(config.data);
    if (result < 0 || write_weights(run, model, folder, err) < 0) return -1;
    if (run->tokenizer_text &&
        write_folder_file(folder, "tokenizer.json", run->tokenizer_text, run->tokenizer_len, err) < 0)
        return -1;
    return write_folder_file(folder, "modeling_nsa.py", modeling_nsa_py, (int64_t)strlen(modeling_nsa_py), err);
}

// Written under another name and renamed when every byte of every rank is on the disk: whoever reads OUT/latest, at
// any moment, finds a whole checkpoint. After an error the earlier ones are as they were.
int checkpoint_save(const Run *run, const Model *model, char *err) {
    int64_t step = run->progress.step;
    const int first = comm.rank == 0;
    int result = 0;
    char *name = format("step_%08" PRId64, step), *folder = format("%s/%s", run->out, name);
    char *temporary = format("%s/.%s.tmp", run->out, name), *aside = format("%s/.%s.old.tmp", run->out, name);
    comm_begin();
    if (first) {
        remove_folder(temporary);
        if (fsync(fileno(run->log)) != 0) result = fail(err, "%s/log.jsonl: cannot write: %s", run->out, strerror(errno));
        if (!result && mkdir(temporary, 0777) != 0) result = fail(err, "%s: cannot create this folder: %s", temporary, strerror(errno));
    }
    result = comm_agree(result, err);
    if (!result) {
        comm_begin();
        if (first) result = write_model_files(run, model, temporary, err);
        if (!result && (first || comm.shards > 1)) result = write_state(run, model, temporary, err);
        result = comm_agree(result, err);
    }
    comm_begin();
    if (first) {
        if (!result) result = sync_folder(temporary, err);
        if (!result && is_there(folder)) rename(folder, aside);  // from before a resume: no link points to it
        if (!result && rename(temporary, folder) != 0) result = fail(err, "%s: cannot create: %s", folder, strerror(errno));
        if (!result) result = sync_folder(run->out, err);
        if (!result) result = point_link(run->out, "latest", name, err);
        if (!result && run->progress.best_step == step) result = point_link(run->out, "best", name, err);
        if (!result) result = sync_folder(run->out, err);
        remove_folder(result < 0 ? temporary : aside);
        if (!result && run->options.keep) remove_old_checkpoints(run->out, run->options.keep);
    }
    result = comm_agree(result, err);
    free(name);
    free(folder);
    free(temporary);
    free(aside);
    return result;
}

int open_tensors(SafeTensors *st, const char *folder, const char *name, char *err) {
    char *path = format("%s/%s", folder, name);
    int result = safetensors_open(st, path, err);
    free(path);
    return result;
}

// Reads the weights of a folder into a model of that shape.
int checkpoint_load_weights(Model *model, const char *folder, char *err) {
    SafeTensors st;
    if (open_tensors(&st, folder, "model.safetensors", err) < 0) return -1;
    int result = 0;
    for (int i = 0; i < model->num_params && !result; i++) {
        const Param *p = &model->params[i];
        result = safetensors_read_real(&st, p->name, p->ndim, p->shape, model->weights + p->offset, err);
    }
    // A tied model may carry its head a second time.
    int tied_head = model->config.tie_word_embeddings && safetensors_find(&st, "lm_head.weight");
    int unknown = st.count - model->num_params - tied_head;
    if (!result && unknown > 0) warn("%s: %d tensors are not of this model and are ignored", st.path, unknown);
    safetensors_close(&st);
    return result;
}

int meta_read(const SafeTensors *st, const char *key, int64_t *value, char *err) {
    const char *text = safetensors_meta(st, key);
    if (!text || !*text || parse_count(text, value) < 0)
        return fail(err, "%s: the metadata \"%s\" is missing or broken", st->path, key);
    return 0;
}

int read_progress(Progress *p, const SafeTensors *st, char *err) {
    const char *best = safetensors_meta(st, "best_val_loss");
    if (!best) return fail(err, "%s: the metadata \"best_val_loss\" is missing", st->path);
    char *end;
    p->best_val = strtod(best, &end);
    if (end == best || *end || isnan(p->best_val)) return fail(err, "%s: the metadata \"best_val_loss\" is \"%.40s\", not a number", st->path, best);
    if (meta_read(st, "step", &p->step, err) < 0 || meta_read(st, "sequence", &p->sequence, err) < 0 ||
        meta_read(st, "tokens", &p->tokens, err) < 0 || meta_read(st, "best_step", &p->best_step, err) < 0 ||
        meta_read(st, "validations_since_best", &p->stale, err) < 0)
        return -1;
    const int64_t most = INT64_C(1) << 60, counts[] = {p->step, p->sequence, p->tokens, p->stale};
    for (int i = 0; i < 4; i++)
        if (counts[i] < 0 || counts[i] > most) return fail(err, "%s: a count in its metadata is out of range: %" PRId64, st->path, counts[i]);
    if (p->best_step < -1 || p->best_step > p->step) return fail(err, "%s: the metadata \"best_step\" is behind its step", st->path);
    return 0;
}

// The files of a saved state: one, or one of each rank that wrote it.
typedef struct StateFiles { SafeTensors *files; int count; } StateFiles;

void state_close(StateFiles *s) {
    for (int i = 0; i < s->count; i++) safetensors_close(&s->files[i]);
    free(s->files);
    memset(s, 0, sizeof *s);
}

int state_open(StateFiles *s, const char *folder, char *err) {
    int ranks = 1, result = 0;
    char *whole = state_name(folder, 0, 1);
    DIR *dir = is_there(whole) ? NULL : opendir(folder);
    for (struct dirent *e; dir && (e = readdir(dir));) {
        int rank, of;
        if (sscanf(e->d_name, "state-%5d-of-%5d.safetensors", &rank, &of) == 2 && of > ranks) ranks = of;
    }
    if (dir) closedir(dir);
    free(whole);
    s->count = 0;
    s->files = (SafeTensors *)xcalloc((size_t)ranks, sizeof(SafeTensors));
    for (int r = 0; r < ranks && !result; r++) {
        char *path = state_name(folder, r, ranks);
        result = safetensors_open(&s->files[r], path, err);
        free(path);
        if (result < 0) break;
        s->count++;
        const char *step = safetensors_meta(&s->files[r], "step"), *first = safetensors_meta(&s->files[0], "step");
        if (r && (!step || !first || strcmp(step, first) != 0)) result = fail(err, "%s: it is not of the step of the first rank's", s->files[r].path);
    }
    if (result < 0) state_close(s);
    return result;
}

// Numbers [first, first + count) of `kind`.TENSOR, from the files that have them. The ranks' parts follow each other.
int state_read(const StateFiles *s, const char *kind, const Param *p, int64_t first, int64_t count, real *out, char *err) {
    char *name = format("%s.%s", kind, p->name), *key = format("first.%s", p->name);
    int64_t at = first;
    int result = 0;
    for (int f = 0; f < s->count && !result; f++) {
        const SafeTensors *st = &s->files[f];
        const char *begin = safetensors_meta(st, key);
        const StTensor *t = safetensors_find(st, name);
        int64_t from = 0;
        if (begin ? !t : s->count > 1 && !t) continue;
        if (!begin) t = safetensors_expect(st, name, p->ndim, p->shape, err);
        else if (parse_count(begin, &from) < 0 || from < 0 || from > p->count || st_count(t) > p->count - from)
            t = NULL, fail(err, "%s: tensor \"%s\" is no part of the configuration's", st->path, name);
        if (!t) result = -1;
        else if (from <= at && at < first + count && from + st_count(t) > at) {
            const int64_t n = min64(first + count, from + st_count(t)) - at;
            result = st_tensor_real(st, t, at - from, n, out + (at - first), err);
            at += n;
        }
    }
    if (!result && at < first + count) result = fail(err, "%s: numbers %" PRId64 " to %" PRId64 " of tensor \"%s\" are missing", s->files[0].path, at, first + count, name);
    comm_tick();
    free(name);
    free(key);
    return result;
}

// AdamW's state, the unrounded weights and the progress: after checkpoint_load_weights.
int checkpoint_load_state(Run *run, Model *model, const char *folder, char *err) {
    StateFiles s;
    if (state_open(&s, folder, err) < 0) return -1;
    int result = read_progress(&run->progress, &s.files[0], err), has_master = 0;
    for (int i = 0; i < model->num_slices && !result; i++) {
        const Slice *slice = &model->slices[i];
        const Param *p = &model->params[slice->param];
        result = state_read(&s, "adam_m", p, slice->first, slice->count, model->adam_m + slice->at, err);
        if (!result) result = state_read(&s, "adam_v", p, slice->first, slice->count, model->adam_v + slice->at, err);
    }
    for (int i = 0; i < s.files[0].count; i++) has_master |= !strncmp(s.files[0].tensors[i].name, "master.", 7);
    for (int i = 0; i < model->num_params && !result && has_master; i++) {
        const Param *p = &model->params[i];
        result = state_read(&s, "master", p, 0, p->count, model->weights + p->offset, err);
    }
    state_close(&s);
    return result;
}

// The options that a saved run had and this call does not give.
int checkpoint_load_options(Options *o, const char *folder, char *err) {
    StateFiles s;
    if (state_open(&s, folder, err) < 0) return -1;
    int result = 0;
    for (int i = 0; i < TRAIN_OPTIONS && !result; i++) {
        const Option *row = &train_options[i];
        if (row->type == OPT_GROUP || row->of != OF_RUN || o->given[i]) continue;
        char *key = format("option.%s", row->name), why[ERR_LEN];
        const char *value = safetensors_meta(&s.files[0], key);
        if (value && option_set(row, o, xstrdup(value), why) < 0)
            result = fail(err, "%s: metadata \"%s\": %s", s.files[0].path, key, why);
        else if (!value && row->type != OPT_TEXT && row->type != OPT_LAYERS)
            warn("%s does not say what %s was: going on with the default", s.files[0].path, option_label(row));
        free(key);
    }
    state_close(&s);
    return result;
}

// ----------------------------------------------------------------------------
// The log: one JSON object a step

void log_number(Text *line, const char *key, double x) {
    if (isfinite(x)) text_add(line, "%s%.9g", key, x);
    else text_add(line, "%snull", key);
}

void log_write(const Run *run, const Text *line) {
    if (fwrite(line->data, 1, (size_t)line->len, run->log) != (size_t)line->len || fflush(run->log) != 0)
        die(1, "%s/log.jsonl: cannot write: %s", run->out, strerror(errno));
}

// Opens the log, and locks it: two programs in one folder would destroy each other's work. A resumed run
// first cuts off what was logged after its checkpoint, and a last line that a killed run did not finish.
void log_open(Run *run) {
    char *path = format("%s/log.jsonl", run->out), *line = NULL;
    size_t size = 0;
    off_t keep = 0;
    run->log = fopen(path, "a+");
    if (!run->log) die(1, "%s: cannot open: %s", path, strerror(errno));
    struct flock lock;
    memset(&lock, 0, sizeof lock);
    lock.l_type = F_WRLCK;
    if (fcntl(fileno(run->log), F_SETLK, &lock) != 0 && (errno == EACCES || errno == EAGAIN))
        die(1, "%s: another program is writing this run", path);
    if (run->options.resume) {
        for (ssize_t n; (n = getline(&line, &size, run->log)) > 0; keep += n) {
            long long step = -1;
            if (line[n - 1] != '\n') break;
            if (sscanf(line, " { \"step\" : %lld", &step) == 1 && step > run->progress.step) break;
        }
        if (ftruncate(fileno(run->log), keep) != 0)
            die(1, "%s: cannot cut it back to step %" PRId64 ": %s", path, run->progress.step, strerror(errno));
        free(line);
    }
    fseek(run->log, 0, SEEK_END);
    free(path);
}

// Mean gate per layer and branch, as the last evaluation found them; null for layers that have none.
void log_gates(Text *line, const Model *model) {
    const Config *c = &model->config;
    text_add(line, ",\"gates\":[");
    for (int layer = 0; layer < c->num_hidden_layers; layer++) {
        const double *g = model->gate_sum + layer * BRANCHES;
        double n = model->gate_count[layer] ? (double)model->gate_count[layer] : 1;
        if (layer) text_add(line, ",");
        if (layer_is_full(c, layer)) text_add(line, "null");
        else for (int b = 0; b < BRANCHES; b++) log_number(line, b ? "," : "[", g[b] / n);
        if (!layer_is_full(c, layer)) text_add(line, "]");
    }
    text_add(line, "]");
}

// The share of the choices that each expert got before drops: of a training step, or of an evaluation without one; null for layers
// without experts.
void log_moe_load(Text *line, const Config *c, const double *loads) {
    text_add(line, ",\"moe_load\":[");
    for (int layer = 0; layer < c->num_hidden_layers; layer++) {
        const double *load = loads + (int64_t)layer * c->num_experts;
        double sum = 0;
        for (int e = 0; e < c->num_experts; e++) sum += load[e];
        if (layer) text_add(line, ",");
        if (!layer_is_moe(c, layer)) text_add(line, "null");
        else for (int e = 0; e < c->num_experts; e++) log_number(line, e ? "," : "[", sum > 0 ? load[e] / sum : 0);
        if (layer_is_moe(c, layer)) text_add(line, "]");
    }
    text_add(line, "]");
}

void log_step(const Run *run, const Model *model, const StepReport *r) {
    if (!run->log) return;      // of another rank
    Text line = {NULL, 0, 0};
    text_add(&line, "{\"step\":%" PRId64, run->progress.step);
    if (r->seconds > 0) log_number(&line, ",\"loss\":", r->loss);
    if (r->evaluated) log_number(&line, ",\"val_loss\":", r->val_loss);
    if (r->seconds > 0) {
        if (run->config.num_experts) {
            log_number(&line, ",\"moe_z\":", r->moe_z);
            log_number(&line, ",\"moe_balance\":", r->moe_balance);
        }
        log_number(&line, ",\"lr\":", r->lr);
        log_number(&line, ",\"grad_norm\":", r->grad_norm);
    }
    text_add(&line, ",\"tokens\":%" PRId64, run->progress.tokens);
    if (r->seconds > 0) {
        log_number(&line, ",\"tok/s\":", (double)run->options.total_batch / r->seconds);
        log_number(&line, ",\"ms\":", 1e3 * r->seconds);
    }
    text_add(&line, ",\"mem\":%" PRId64 ",\"ranks\":%d", run->memory, comm.ranks);
    if (r->evaluated) log_gates(&line, model);
    if (run->config.num_experts) log_moe_load(&line, &run->config, r->seconds > 0 ? run->moe_load : model->moe_load);
    text_add(&line, "}\n");
    log_write(run, &line);
    free(line.data);
}

// ----------------------------------------------------------------------------
// The terminal: one line a step

void print_step(const Run *run, const StepReport *r, double seconds_left) {
    const Progress *p = &run->progress;
    char total[24], val[32] = "", best[32] = "";
    int width = snprintf(total, sizeof total, "%" PRId64, run->options.max_steps);
    if (r->evaluated) snprintf(val, sizeof val, "val %.4f", r->val_loss);
    if (isfinite(p->best_val)) snprintf(best, sizeof best, "best %.4f", p->best_val);
    printf("step %*" PRId64 "/%s %5.1f%% | loss %7.4f | %-10s %-11s | lr %.2e | norm %7.3f | %8s tok/s | %s left%s\n",
           width, p->step, total,
           100.0 * (double)p->step / (double)run->options.max_steps, r->loss, val, best, r->lr, r->grad_norm,
           human_count((double)run->options.total_batch / r->seconds), human_time(seconds_left), r->skipped ? " | not finite: skipped" : "");
    fflush(stdout);
}

// ----------------------------------------------------------------------------
// Samples while training: the context is computed anew for every token, which is slow and needs
// nothing but the training forward. sample.c does it with a cache.

// Draws from the 40 likeliest tokens at temperature 0.5: small models ramble above it.
int sample_token(const real *logits, int vocab, Rng *rng) {
    enum { TOP = 40 };
    int ids[TOP], n = 0;
    for (int v = 0; v < vocab; v++) {
        if (n == TOP && !(logits[v] > logits[ids[n - 1]])) continue;
        int at = n < TOP ? n++ : n - 1;
        for (; at > 0 && logits[v] > logits[ids[at - 1]]; at--) ids[at] = ids[at - 1];
        ids[at] = v;
    }
    double p[TOP], sum = 0;
    for (int i = 0; i < n; i++) sum += p[i] = exp((double)(logits[ids[i]] - logits[ids[0]]) / 0.5);
    double x = rng_uniform(rng) * sum;
    for (int i = 0; i < n; i++)
        if ((x -= p[i]) < 0) return ids[i];
    return ids[0];
}

volatile sig_atomic_t stop_signal;

void print_sample(Run *run, Model *model) {
    int T = run->options.seq_len, n = 0, V = run->config.vocab_size, text_known = run->bytes || run->tokenizer_text;
    int eos = run->config.eos_token_id;
    int *context = run->window;  // free between steps
    real *logits = (real *)xmalloc((size_t)V * sizeof(real));
    Rng rng = {(uint64_t)run->options.seed, 0x53414d504c450000ull + (uint64_t)run->progress.step, 0};
    Utf8Stream utf8;
    Text text = {NULL, 0, 0};
    memset(&utf8, 0, sizeof utf8);
    context[n++] = eos >= 0 ? eos : run->bytes ? '\n' : run->tokens[0];
    printf("\n--- sample at step %" PRId64 "%s\n", run->progress.step,
           text_known ? "" : " (token numbers: there is no tokenizer.json)");
    for (int64_t i = 0; i < run->options.sample_len && !stop_signal; i++) {
        device_logits(model, context, 1, n, logits, 1);
        comm_tick();
        int token = sample_token(logits, V, &rng);
        if (token == eos) break;
        if (n == T) memmove(context, context + 1, (size_t)--n * sizeof(int));
        context[n++] = token;
        int len;
        const char *piece = tokenizer_piece(&run->tokenizer, token, &len);
        text.len = 0;
        if (text_known) utf8_stream_push(&utf8, piece, len, &text);
        else text_add(&text, "%d ", token);
        if (text.len) fwrite(text.data, 1, (size_t)text.len, stdout);
        fflush(stdout);
    }
    text.len = 0;
    utf8_stream_flush(&utf8, &text);
    if (text.len) fwrite(text.data, 1, (size_t)text.len, stdout);
    printf("\n---\n\n");
    fflush(stdout);
    free(text.data);
    free(logits);
}

// ----------------------------------------------------------------------------
// One validation, one step

// What this rank has of the window, row `row` of `rows` in its tokens and targets.
static void take_window(Run *run, int64_t row, int64_t rows) {
    const Pieces p = pieces_of(comm.parts, part_tokens(&run->options));
    for (int i = 0; i < p.own; i++) {
        const int64_t to = (i * rows + row) * p.length, from = piece_start(&p, i);
        memcpy(run->tokens + to, run->window + from, (size_t)p.length * sizeof(int));
        memcpy(run->targets + to, run->window + from + 1, (size_t)p.length * sizeof(int));
    }
}

// Mean cross entropy over the first val_steps batches of the validation data, or all there are; groups of ranks take turns. The
// last batch may have fewer rows.
double evaluate(Run *run, Model *model) {
    const int B = run->options.batch, T = run->options.seq_len, L = run->config.num_hidden_layers;
    const int64_t all = data_val_windows(&run->val, T), windows = run->options.val_steps ? min64(all, run->options.val_steps * B) : all;
    const int64_t batches = (windows + B - 1) / B;
    double *sums = (double *)xcalloc((size_t)(batches + L), sizeof(double)), *counts = sums + batches, sum = 0;
    model_stats_reset(model);
    for (int64_t i = comm.rank / comm.parts; i < batches; i += run->groups) {
        const int rows = (int)min64(B, windows - i * B);
        for (int64_t row = 0; row < rows; row++) {
            data_val_window(&run->val, T, i * B + row, run->window);
            take_window(run, row, rows);
        }
        sums[i] = rows * device_evaluate(model, run->tokens, run->targets, rows, part_tokens(&run->options)) / comm.parts;
    }
    for (int l = 0; l < L; l++) counts[l] = (double)model->gate_count[l];
    comm_sum(sums, batches + L);
    comm_sum(model->gate_sum, L * BRANCHES);
    comm_sum(model->moe_load, (int64_t)L * run->config.num_experts);
    for (int l = 0; l < L; l++) model->gate_count[l] = (int64_t)counts[l];
    for (int64_t i = 0; i < batches; i++) sum += sums[i];       // in order, for any ranks
    free(sums);
    return sum / (double)windows;
}

// Gradients of the whole batch, micro-batch by micro-batch, then one update. Groups of ranks take its sequences in their order.
enum { NO_LAYER = INT_MAX };
StepReport train_step(Run *run, Model *model) {
    const Options *o = &run->options;
    Progress *p = &run->progress;
    StepReport r;
    StepInfo info;
    double start = now_seconds();
    int B = o->batch, T = part_tokens(o);
    memset(&r, 0, sizeof r);
    info.dropout = o->dropout;
    info.seed = (uint64_t)o->seed;
    info.step = p->step;
    info.grad_scale = 1.0 / ((double)run->accumulation * comm.ranks);
    device_zero_grads(model);
    model_stats_reset(model);
    const int64_t mine = (int64_t)(comm.rank / comm.parts) * run->accumulation * B;
    int64_t bad_layer = NO_LAYER;
    order_seek(&run->order, (o->overfit ? 0 : p->sequence) + mine);
    for (int micro = 0; micro < run->accumulation; micro++) {
        info.first_sequence = mine + (int64_t)micro * B;
        info.last = micro == run->accumulation - 1;
        for (int row = 0; row < B; row++) {
            order_next(&run->order, &run->train, run->window);
            take_window(run, row, B);
        }
        r.loss += device_forward_backward(model, run->tokens, run->targets, B, T, &info) * info.grad_scale;
        if (!isfinite(model->loss) && bad_layer == NO_LAYER) bad_layer = device_bad_layer(model, (int64_t)B * T);
        r.moe_z += model->moe_z * info.grad_scale;
        r.moe_balance += model->moe_balance * info.grad_scale;
    }
    double sums[] = {r.loss, r.moe_z, r.moe_balance};
    comm_sum(sums, 3);
    r.loss = sums[0];
    r.moe_z = sums[1];
    r.moe_balance = sums[2];
    if (!isfinite(r.loss)) {
        const int64_t layer = comm_min(bad_layer), layers = run->config.num_hidden_layers;
        if (layer >= layers) snprintf(r.where, sizeof r.where, ", first in the output head");
        else if (layer < 0) snprintf(r.where, sizeof r.where, ", first in the embedding");
        else snprintf(r.where, sizeof r.where, ", first in layer %d", (int)layer);
    }
    device_reduce_grads(model);
    const Config *c = &run->config;
    if (c->num_experts) {
        memcpy(run->moe_load, model->moe_load, (size_t)c->num_hidden_layers * (size_t)c->num_experts * sizeof(double));
        comm_sum(run->moe_load, (int64_t)c->num_hidden_layers * c->num_experts);
    }
    r.lr = learning_rate(o, p->step);
    r.grad_norm = device_grad_norm(model);
    p->step++;
    p->sequence += (int64_t)run->groups * run->accumulation * B;
    p->tokens += o->total_batch;
    // One infinity or NaN in the gradients would make every weight NaN.
    r.skipped = !isfinite(r.loss) || !isfinite(r.grad_norm);
    if (r.skipped && !o->skip_bad_steps)
        die_together(1, "step %" PRId64 ": the %s is not finite (%g%s): try a lower --lr, or --skip-bad-steps to pass over such steps",
            p->step, isfinite(r.loss) ? "gradient" : "loss", isfinite(r.loss) ? r.grad_norm : r.loss, r.where);
    double clip = o->grad_clip > 0 && r.grad_norm > o->grad_clip ? o->grad_clip / r.grad_norm : 1;
    if (!r.skipped) device_adamw(model, r.lr, o->beta1, o->beta2, o->eps, o->weight_decay, p->step, clip);
    r.seconds = now_seconds() - start;
    comm.started = 1;
    return r;
}

// ----------------------------------------------------------------------------
// From the command line to a run that can start. What cannot work is said here, before any work.

// out/run_001, out/run_002...: the one behind the last, or the last one that has a checkpoint (NULL: none). Numbers only grow,
// so that the last is the newest whatever was deleted.
char *numbered_out(int free_one) {
    long last = 0;
    DIR *dir = opendir("out");
    for (struct dirent *entry; dir && (entry = readdir(dir));) {
        char *end, *latest = format("out/%s/latest", entry->d_name);
        const long number = !strncmp(entry->d_name, "run_", 4) && isdigit((unsigned char)entry->d_name[4]) ? strtol(entry->d_name + 4, &end, 10) : 0;
        if (number > last && number < 1000000000 && !*end && (free_one || is_folder(latest))) last = number;
        free(latest);
    }
    if (dir) closedir(dir);
    return free_one ? format("out/run_%03ld", last + 1) : last ? format("out/run_%03ld", last) : NULL;
}

// Makes the folder of the run. Another program may have taken the number meanwhile. Other ranks find the first one's.
void make_out(Run *run) {
    char err[ERR_LEN], name[PATH_MAX] = "";
    int numbered = !run->options.out && !run->options.resume;
    if (comm.rank == 0) {
        if (numbered && make_folders("out", err) < 0) die(1, "%s", err);
        while (numbered && mkdir(run->out, 0777) != 0 && errno == EEXIST) {
            free(run->out);
            run->out = numbered_out(1);
        }
        if (make_folders(run->out, err) < 0) die(1, "%s", err);
        snprintf(name, sizeof name, "%s", run->out);
    }
    if (comm.ranks == 1) return;
    comm_meet();
    comm_broadcast(name, sizeof name);
    comm_begin();
    free(run->out);
    run->out = xstrdup(name);
    if (!is_folder(run->out)) die(1, "%s, the folder of the run, is not to be seen here: it must be on a disk that all ranks share", run->out);
}

// Which folder to write, which to start from.
void find_folders(Run *run) {
    Options *o = &run->options;
    char err[ERR_LEN];
    if (o->resume) {
        if (o->model) die(2, "-y continues a run with its own model: leave out -e, or start a new run from it without -y");
        run->out = o->out ? xstrdup(o->out) : numbered_out(0);
        if (!run->out) die(2, "-y: there is no run in out/ to continue: name its folder with -o, or start one without -y");
        run->start = format("%s/latest", run->out);
        if (!is_folder(run->start))
            die(2, "-y: %s holds no checkpoint to continue (no %s): start a new run elsewhere, without -y", run->out,
                run->start);
        if (checkpoint_load_options(o, run->start, err) < 0) die(1, "%s", err);
        if (o->evaluate_only) run->out = NULL;  // the log stays what the training wrote
        return;
    }
    if (o->model && is_folder(o->model)) {
        run->start = existing(format("%s/latest", o->model));  // -e OUT means -e OUT/latest
        if (!run->start) run->start = xstrdup(o->model);
    }
    if (!o->evaluate_only && o->out) {
        char *log = existing(format("%s/log.jsonl", o->out)), *latest = existing(format("%s/latest", o->out));
        if (latest) die(2, "-o %s holds a run already: continue it with -y or choose another -o", o->out);
        if (log) die(2, "-o %s holds a run that ended before its first checkpoint: delete it or choose another -o", o->out);
        char *config = existing(format("%s/config.json", o->out));
        if (config) die(2, "-o %s is the folder of a model (it has a config.json): choose another -o", o->out);
    }
    if (o->out) run->out = xstrdup(o->out);
    else if (!o->evaluate_only) run->out = numbered_out(1);
}

// The data that decides the vocabulary, NULL: the built-in corpus.
const char *main_data(const Options *o) { return o->evaluate_only && o->val_data ? o->val_data : o->train_data; }

// The tokenizer: the one that was named, else the one of the model, else the one beside the .bin.
void find_tokenizer(Run *run) {
    Options *o = &run->options;
    const char *data = main_data(o), *slash = data ? strrchr(data, '/') : NULL;
    char err[ERR_LEN], *path = NULL;
    if (option_given(o, &o->tokenizer)) path = xstrdup(o->tokenizer);
    if (!path && run->start) path = existing(format("%s/tokenizer.json", run->start));
    if (!path && data && data_is_bin(data))
        path = existing(format("%.*stokenizer.json", slash ? (int)(slash - data) + 1 : 0, data));
    o->tokenizer = path;
    run->bytes = !path && !(data && data_is_bin(data));
    if (!path) tokenizer_bytes(&run->tokenizer);
    else if (tokenizer_open(&run->tokenizer, path, err) < 0 ||
             read_file(path, &run->tokenizer_text, &run->tokenizer_len, err) < 0)
        die(1, "%s", err);
}

// The shape of the model, from -e, --preset and the options; its vocabulary from the data.
void find_config(Run *run) {
    Options *o = &run->options;
    Config from, *c = &run->config;
    char err[ERR_LEN], *path = NULL;
    if (run->start) path = format("%s/config.json", run->start);
    else if (o->model && !model_depth(o->model)) path = xstrdup(o->model);
    if (path && !is_there(path))
        die(1, "%s: is not there: -e takes d6, d12..., a config.json or a checkpoint folder", path);
    int result = path ? config_load(&from, path, err) : 0;
    if (result < 0) die(result == -2 ? 2 : 1, "%s", err);
    config_from_options(c, o, path ? &from : NULL);
    int asks_for_experts = option_given(o, &o->config.num_experts_per_tok) || option_given(o, &o->config.num_shared_experts) ||
                           option_given(o, &o->config.moe_intermediate_size) || option_given(o, &o->config.capacity_factor);
    if (asks_for_experts && !c->num_experts)
        die(2, "the options of a mixture of experts need --experts: how many are routed");
    if (!c->num_experts && (option_given(o, &o->config.first_dense_layers) || option_given(o, &o->config.z_loss_coef) || option_given(o, &o->config.balance_loss_coef)))
        warn("--dense-layers, --z-loss and --balance-loss say nothing without --experts");
    if (run->start && option_given(o, o->gate_init)) warn("--gate-init is where the gates of a new model start: those of %s stay as they are", run->start);
    if (o->stochastic_rounding && (!c->torch_dtype || !ON_GPU)) warn("--stochastic-rounding says nothing %s", ON_GPU ? "without --dtype bf16" : "on the CPU");
    if (option_given(o, &o->cycles) && o->schedule != SCHEDULE_RESTARTS) warn("--cycles says nothing without --schedule restarts");

    if (!c->vocab_size) c->vocab_size = run->tokenizer_text ? run->tokenizer.vocab_size : run->bytes ? 256 : 50257;
    if (run->tokenizer_text && run->tokenizer.vocab_size > c->vocab_size)
        die(2, "--vocab %d is smaller than the %d tokens of %s", c->vocab_size, run->tokenizer.vocab_size, o->tokenizer);
    if (run->tokenizer_text) c->eos_token_id = run->tokenizer.eos_id;
    if (config_validate(c, err) < 0) die(2, "%s", err);
    if (run->start && config_same_weights(c, &from, run->start, err) < 0) die(2, "%s", err);
    free(path);
}

// Without -b the GPU takes as many sequences at once as its memory holds and -d divides into; the CPU, whose speed does not
// depend on it, keeps its default.
void choose_micro_batch(Options *o, const Config *c) {
#ifdef NSA_GPU
    if (option_given(o, &o->batch) || o->resume || o->plan) return;
    const int64_t sequences = o->total_batch ? o->total_batch / o->seq_len / (comm.ranks / comm.parts) : o->batch, free_bytes = device_memory() / 20 * 19;
    int64_t B = max64(1, min64(sequences, INT_MAX / o->seq_len));       // 1: run_model says what does not fit
    while (B > 1 && (sequences % B || device_bytes(c, B, part_tokens(o), o->recompute, !o->evaluate_only, NULL) > free_bytes)) B--;
    comm_meet();
    o->batch = (int)comm_min(B);
    comm_begin();
#else
    (void)o, (void)c;
#endif
}

// What sequences that ranks share must satisfy.
static void check_context_parallel(const Run *run) {
    const Options *o = &run->options;
    const int P = o->context_parallel, T = o->seq_len;
    if (P == 1) return;
    if (run->ranks % P)
        die(2, "--context-parallel %d must divide the number of ranks, %d: %s", P, run->ranks, o->plan ? "use another --ranks" : "start as many ranks as it, or a multiple, with mpirun -np");
    if (T % (2 * P))
        die(2, "-t (--seq-len) %d must be a multiple of 2 times --context-parallel %d (each rank has two pieces of a sequence): use -t %d", T, P, (T / (2 * P) + 1) * 2 * P);
    if (o->evaluate_only) return;
    if (run->config.capacity_factor > 0)
        die(2, "--capacity-factor chooses among all tokens of a micro-batch, and with --context-parallel %d no rank has them all: leave out one of the two", P);
    if (o->sample_every && o->sample_len > T / (2 * P))
        die(2, "-g (--sample-len) %" PRId64 " is too long for --context-parallel %d: one rank alone writes samples, of at most %d tokens: use -g %d, or -s 0",
            o->sample_len, P, T / (2 * P), T / (2 * P));
}

// Batch, steps and rates that were left open.
void complete_options(Run *run) {
    Options *o = &run->options;
    if (!o->seq_len) o->seq_len = run->config.max_position_embeddings;
    check_context_parallel(run);
    choose_micro_batch(o, &run->config);
    int64_t micro = (int64_t)o->batch * o->seq_len;
    if (micro > INT_MAX)
        die(2, "-b %d times -t %d is more than %d tokens in a micro-batch: use a smaller -b", o->batch, o->seq_len,
            INT_MAX);
    const int64_t least = micro * run->groups;
    if (!o->total_batch) o->total_batch = least;
    if (o->total_batch % least) {
        char ranks[48] = "", other[32] = "";
        int64_t each = o->total_batch / o->seq_len / run->groups, b = o->batch;     // sequences of a group
        while (each && each % b) b--;
        if (run->groups > 1) snprintf(ranks, sizeof ranks, "%d %sranks times ", run->groups, comm.parts > 1 ? "groups of " : "");
        if (each * o->seq_len * run->groups == o->total_batch) snprintf(other, sizeof other, ", or -b %" PRId64, b);
        die(2, "-d (--total-batch) %" PRId64 " must be a multiple of %s-b %d times -t %d: use -d %" PRId64 "%s",
            o->total_batch, ranks, o->batch, o->seq_len, (o->total_batch / least + 1) * least, other);
    }
    if (o->total_batch / least > INT_MAX)
        die(2, "-d (--total-batch) %" PRId64 " is too large for -b %d", o->total_batch, o->batch);
    run->accumulation = (int)(o->total_batch / least);
    if (o->lr < 0) {  // wider models want smaller steps
        double lr = 2e-3 * pow(128.0 / run->config.hidden_size, 2.0 / 3);
        o->lr = lr < 2e-3 ? lr : 2e-3;
    }
    if (o->warmup < 0) o->warmup = o->max_steps / 15 < 2000 ? o->max_steps / 15 : 2000;
    if (o->early_stop && !o->val_every) die(2, "--early-stop needs validations: use -v N");
}

void open_data(Run *run) {
    Options *o = &run->options;
    char err[ERR_LEN];
    const Tokenizer *tokenizer = run->tokenizer_text ? &run->tokenizer : NULL;
    int result;
    int64_t vocab = run->config.vocab_size;
    if (o->evaluate_only && o->val_data) result = data_load(&run->val, NULL, o->val_data, tokenizer, vocab, err);
    else if (o->train_data) result = data_open(&run->train, &run->val, o->train_data, o->val_data, tokenizer, vocab, err);
    else {
        int64_t len;
        char *text = tales_make(TALES_SEED, TALES_BYTES, &len);
        result = data_from_memory(&run->train, &run->val, text, len, tokenizer, vocab, err);
        free(text);
        if (!result && o->val_data) {
            data_free(&run->val);
            result = data_load(&run->val, NULL, o->val_data, tokenizer, vocab, err);
        }
    }
    if (result < 0) die(1, "%s", err);
    if (data_check(&run->val, o->seq_len, o->val_data ? "-j" : "-i", err) < 0) die(2, "%s", err);
    if (o->evaluate_only) return;
    if (data_check(&run->train, o->seq_len, "-i", err) < 0) die(2, "%s", err);
    order_init(&run->order, &run->train, o->seq_len, (uint64_t)o->seed);
}

static uint64_t hash_data(uint64_t h, const DataSet *d) {
    for (int i = 0; i < d->num_streams; i++) h = hash_large(h, d->streams[i].tokens, d->streams[i].count * d->streams[i].width);
    return h;
}

// Ranks that differ in what they were told or read would train nonsense.
void compare_ranks(const Run *run) {
    const char *names[] = {"the model", "the options", "the tokenizer", "the training data", "the validation data"};
    enum { KINDS = sizeof names / sizeof names[0] };
    Text options = {NULL, 0, 0}, config = {NULL, 0, 0};
    for (int i = 0; i < TRAIN_OPTIONS; i++) {
        const Option *o = &train_options[i];
        // names of files may differ from machine to machine, what is in them may not
        if (o->type == OPT_GROUP || o->type == OPT_TEXT || o->offset == offsetof(Options, threads)) continue;
        option_text(o, &run->options, &options);
        text_put(&options, ",", 1);
    }
    config_write(&run->config, &config);
    const uint64_t hashes[KINDS] = {hash_more(HASH_START, config.data, config.len), hash_more(HASH_START, options.data, options.len),
        hash_more(HASH_START, run->tokenizer_text, run->tokenizer_len), hash_data(HASH_START, &run->train), hash_data(HASH_START, &run->val)};
    comm_compare(names, hashes, KINDS, "start every rank with the same options on copies of the same files");
    free(options.data);
    free(config.data);
}

// ----------------------------------------------------------------------------
// --plan: what a run would take, by the functions that a run counts its memory with, and by formulas

// How many of `per` keys each query of T sees on average, from its own position back.
static double mean_keys(double per, double T) { return per >= T ? (T + 1) / 2 : per - per * (per - 1) / (2 * T); }

// FLOPs of a token in forward: `matrices` those of products with weights, `attention` those of scores and sums.
void token_flops(const Config *c, double T, double *matrices, double *attention) {
    Model m;
    table_create(&m, c);
    *matrices = *attention = 0;
    for (int i = 0; i < m.num_params; i++) {
        const Param *p = &m.params[i];
        double share = p->ndim > 1 ? 1 : 0;     // of the tokens that it is multiplied with
        if (strstr(p->name, ".mlp.experts.")) share = (double)c->num_experts_per_tok / c->num_experts;
        if (strstr(p->name, ".compress_")) share *= (c->compress == COMPRESS_MLP ? (double)c->num_key_value_heads : 1) / c->cmp_stride;
        if (ends_with(p->name, ".pos") || (i == 0 && !c->tie_word_embeddings)) share = 0;
        *matrices += 2 * share * (double)p->count;
    }
    const double H = c->num_attention_heads, D = c->head_dim, Dv = c->v_head_dim;
    const double selected = mean_keys((double)c->sel_blocks * c->sel_block, T), window = mean_keys(c->window, T), blocks = fmax(0, (T - c->cmp_block) / c->cmp_stride + 1) / 2;
    for (int l = 0; l < c->num_hidden_layers; l++) {
        const double keys = layer_is_full(c, l) ? (T + 1) / 2 : selected + window + blocks;
        *attention += 2 * H * (D + Dv) * keys + (layer_is_full(c, l) ? 0 : 2 * H * D * blocks);     // the last: importance
    }
    table_free(&m);
}

void print_plan(const Run *run) {
    const Options *o = &run->options;
    const Config *c = &run->config;
    const double N = run->ranks, T = o->seq_len, tokens = (double)o->total_batch / N;     // of a rank
    Text table = {NULL, 0, 0};
    double matrices, attention;
    int64_t state;
    device_plan();
    const double params = (double)count_state(c, &state), bytes = (double)device_bytes(c, o->batch, part_tokens(o), o->recompute, 1, &table);
    token_flops(c, T, &matrices, &attention);
    // Backward: two products for each of forward's, five of attention's for its two. -r 2 makes forward again, -r 1 (about) its FFN's half.
    const double forward = matrices + attention, backward = 2 * matrices + 2.5 * attention + (o->recompute > 1 ? forward : o->recompute ? matrices / 2 : 0);
    const double rate = o->tflops * 1e12, link = o->link * 1e9, sent = N > 1 ? (N - 1) / N * 4 * params : 0;
    const double back = ON_GPU && o->zero && c->torch_dtype == DTYPE_BF16 ? sent / 2 : sent;      // gradients or weights
    const double compute = tokens * (forward + backward) / rate, micro = (double)o->batch * part_tokens(o) * backward / rate;
    const double embedding = sent * (double)c->vocab_size * c->hidden_size / params;      // the last bucket: nothing is left to hide it
    const double reduce = (o->zero ? sent : sent + back) / link, hidden = fmin(micro, reduce * (1 - embedding / fmax(sent, 1))), gather = o->zero ? back / link : 0;
    // Of each layer: keys and values go to the other parts in forward and again for backward, which sends their gradients back.
    double keys = 0;
    for (int l = 0; l < c->num_hidden_layers; l++) {
        const WideRow row = wide_row(c, l);
        keys += 3 * (double)(comm.parts - 1) * tokens * (double)keys_width(&row) * (ON_GPU && c->torch_dtype == DTYPE_BF16 ? 2 : 4);
    }
    const double step = compute + reduce - hidden + gather + keys / link;
    printf("plan       %d rank%s, %s parameters, steps of %s tokens (%d %s%s x %d x %d x %d)\n", run->ranks, run->ranks > 1 ? "s" : "", human_count(params),
           human_count((double)o->total_batch), run->groups, comm.parts > 1 ? "group" : "rank", run->groups > 1 ? "s" : "", run->accumulation, o->batch, o->seq_len);
    printf("memory     %s on each rank%s\n%s", human_bytes(bytes), o->zero && N > 1 ? ", with its share of AdamW's state (-z 1)" : "", table.data);
    printf("exchanged  %s sent by each rank in a step: gradients in f32%s\n", human_bytes(sent + back),
           !o->zero ? ", both ways" : back < sent ? " one way, weights in bf16 back" : " one way, weights in f32 back");
    if (comm.parts > 1) printf("           %s besides: keys and values, and their gradients, of the %d ranks that share each sequence\n", human_bytes(keys), comm.parts);
    printf("compute    %s a token, forward and backward: %.3g s a step at %g TFLOP/s (--tflops)\n", human((forward + backward), "FLOP"), compute, o->tflops);
    printf("between    %.3g s at %g GB/s (--link), of which backward hides %.3g s\n", reduce + gather + keys / link, o->link, hidden);
    printf("step       %.3g s, %s tok/s; %.1f%% of it is compute\n", step, human_count((double)o->total_batch / step), 100 * compute / step);
    free(table.data);
}

// Everything up to, but not including, the model's memory.
void run_prepare(Run *run, int argc, char **argv) {
    memset(run, 0, sizeof *run);
    Options *o = &run->options;
    *o = options_default();
    options_parse(train_options, TRAIN_OPTIONS, o, o->given, argc, argv);
    comm.timeout = o->timeout;
    run->ranks = o->plan ? o->ranks : comm.ranks;
    run->groups = run->ranks / o->context_parallel;
    comm.shards = o->zero ? run->ranks : 1;
    comm.parts = o->context_parallel;
    for (size_t i = 0, only[] = {offsetof(Options, ranks), offsetof(Options, tflops), offsetof(Options, link)}; i < 3; i++)
        if (!o->plan && option_given(o, (const char *)o + only[i]))
            die(2, "%s is for --plan%s", option_label(&train_options[option_row(train_options, TRAIN_OPTIONS, only[i])]), i ? "" : ": a run has the ranks that mpirun starts");
    if (o->help) {
        comm_meet();
        train_help();
        if (fflush(stdout) != 0) die(1, "cannot write to the standard output: %s", strerror(errno));
        exit(0);
    }
    o->evaluate_only = option_given(o, &o->max_steps) && o->max_steps == 0;
    for (int i = 0; i < TRAIN_OPTIONS; i++) {       // a checkpoint remembers them, in UTF-8
        const Option *row = &train_options[i];
        const char *text = row->type == OPT_TEXT && row->of == OF_RUN ? *(const char **)((char *)o + row->offset) : NULL;
        uint32_t unused;
        for (int n; text && *text; text += n)
            if ((n = utf8_decode(text, (int64_t)strlen(text), &unused)) <= 0)
                die(2, "%s: this name is not UTF-8, so that a checkpoint cannot remember it: rename or link the file", option_label(row));
    }
    run->progress.best_val = INFINITY;
    run->progress.best_step = -1;
    find_folders(run);
    find_tokenizer(run);
    find_config(run);
    complete_options(run);
    if (o->plan) {
        comm_meet();
        print_plan(run);
        exit(0);
    }
#ifdef _OPENMP
    if (o->threads) omp_set_num_threads(o->threads);
#endif
    open_data(run);
    comm_meet();
    compare_ranks(run);
    comm_begin();
    int64_t micro = (int64_t)o->batch * part_tokens(o);
    run->tokens = (int *)xmalloc((size_t)micro * sizeof(int));
    run->targets = (int *)xmalloc((size_t)micro * sizeof(int));
    run->window = (int *)xmalloc(((size_t)o->seq_len + 1) * sizeof(int));
    run->tokens[0] = 0;
    run->moe_load = (double *)xcalloc((size_t)run->config.num_hidden_layers * (size_t)max64(1, run->config.num_experts), sizeof(double));
}

// ----------------------------------------------------------------------------
// What was found, before the first step

void print_header(const Run *run, const Model *model, const Text *memory) {
    const Options *o = &run->options;
    const Config *c = &run->config;
    int len, full = 0;
    for (int layer = 0; layer < c->num_hidden_layers; layer++) full += layer_is_full(c, layer);
    printf("model      %d layer%s, width %d, %d heads of %d on %d kv head%s, vocabulary %d: %s parameters%s%s\n",
           c->num_hidden_layers, c->num_hidden_layers > 1 ? "s" : "", c->hidden_size, c->num_attention_heads, c->head_dim,
           c->num_key_value_heads, c->num_key_value_heads > 1 ? "s" : "", c->vocab_size,
           human_count((double)model->num_elements), run->start ? ", from " : "", run->start ? run->start : "");
    if (full == c->num_hidden_layers) printf("attention  full\n");
    else {
        const char *name = choice_name(compress_names, c->compress, &len);
        printf("attention  nsa: blocks of %d every %d compressed (%.*s); %d blocks of %d selected; window %d",
               c->cmp_block, c->cmp_stride, len, name, c->sel_blocks, c->sel_block, c->window);
        name = choice_name(GATE_NAMES, c->gate, &len);
        printf("; gates %.*s", len, name);
        if (full) printf("; %d layers full", full);
        printf("\n");
    }
    if (c->num_experts)
        printf("experts    %d of width %d, %d a token, %d shared, from layer %d on\n", c->num_experts,
               c->moe_intermediate_size, c->num_experts_per_tok, c->num_shared_experts, c->first_dense_layers);
    printf("tokenizer  %s\n", run->tokenizer_text ? o->tokenizer : run->bytes ? "none: bytes" : "none: token numbers");
    const char *data = main_data(o) ? main_data(o) : "built-in tales";
    if (o->evaluate_only) printf("data       %s: %s tokens to validate on\n", data, human_count((double)run->val.tokens));
    else {
        printf("data       %s: %s tokens to train on, %s to validate on%s%s\n", data,
               human_count((double)run->train.tokens), human_count((double)run->val.tokens),
               o->val_data ? " from " : "", o->val_data ? o->val_data : "");
        const char *schedule = choice_name(SCHEDULE_NAMES, o->schedule, &len);
        char ranks[48] = "";
        if (run->groups > 1) snprintf(ranks, sizeof ranks, "%d %sranks x ", run->groups, comm.parts > 1 ? "groups of " : "");
        printf("training   steps %" PRId64 " to %" PRId64 " of %s tokens (%s%d x %d x %d): %.2f epochs\n",
               run->progress.step + 1, o->max_steps, human_count((double)o->total_batch), ranks, run->accumulation, o->batch,
               o->seq_len, (double)o->max_steps * (double)o->total_batch / (double)run->train.tokens);
        printf("rate       %g, %.*s, warm-up %" PRId64 " steps\n", o->lr, len, schedule, o->warmup);
    }
    printf("memory     %s, counted before it is taken\n%s", human_bytes((double)run->memory), memory->data);
    Text machine = {NULL, 0, 0};
    device_describe(&run->config, &machine);
    printf("machine    %s%s\n", machine.data, o->zero && comm.ranks == 1 ? "; -z 1 has nothing to shard: one process" : "");
    free(machine.data);
    if (comm.ranks > 1) {
        char share[64] = "";
        if (comm.parts > 1) snprintf(share, sizeof share, ", %d share each sequence, %d tokens each", comm.parts, part_tokens(o));
        printf("ranks      %d%s%s\n", comm.ranks, share, o->zero ? ", each with its share of AdamW's state" : "");
    }
    if (run->out) printf("output     %s\n", run->out);
    printf("\n");
    fflush(stdout);
}

// Counts the memory, takes it, and fills it with weights.
void run_model(Run *run, Model *model) {
    const Options *o = &run->options;
    char err[ERR_LEN];
    Text table = {NULL, 0, 0};
    int train = !o->evaluate_only;
    int64_t machine = device_memory();
    run->memory = device_bytes(&run->config, o->batch, part_tokens(o), o->recompute, train, &table);
    if (machine && run->memory > machine)
        die(2, "this needs %s of memory and the machine has %s: use a smaller -b (%d) or -t (%d)%s%s",
            human_bytes((double)run->memory), human_bytes((double)machine), o->batch, o->seq_len,
            train && o->recompute < 2 ? ", or -r 2" : "", run->groups > 1 ? ", or a larger --context-parallel" : "");
    model_create(model, &run->config);
    model->stochastic_rounding = o->stochastic_rounding;
    device_alloc(model, o->batch, part_tokens(o), o->recompute, train);
    if (!run->start) model_init(model, (uint64_t)o->seed, o->gate_init);
    else if (checkpoint_load_weights(model, run->start, err) < 0) die(1, "%s", err);
    if (o->resume && train && checkpoint_load_state(run, model, run->start, err) < 0) die(1, "%s", err);
    if (o->resume && train && run->progress.step >= o->max_steps)
        die(2, "-y: %s is at step %" PRId64 " of %" PRId64 ": nothing is left to do, continue it with a larger -x",
            run->out, run->progress.step, o->max_steps);
    if (o->resume && o->early_stop && run->progress.stale >= o->early_stop)
        die(2, "-y: %s stopped early after %" PRId64 " validations without a better one: use a larger --early-stop to go on",
            run->out, run->progress.stale);
    device_store(model);
    if (run->out) make_out(run);
    if (run->out && comm.rank == 0) log_open(run);
    if (run->out && comm.rank == 0 && o->resume) remove_leftovers(run->out);
    comm_meet();
    const char *const names[] = {"the weights", "the step"};
    const uint64_t hashes[] = {hash_large(HASH_START, model->weights, model->num_elements * (int64_t)sizeof(real)), (uint64_t)run->progress.step};
    comm_compare(names, hashes, 2, "every rank must start from a copy of the same checkpoint");
    print_header(run, model, &table);
    free(table.data);
}

// ----------------------------------------------------------------------------
// The loop

// The first signal ends the run after its step, the second at once.
void on_signal(int signal_number) {
    if (stop_signal) _exit(128 + signal_number);
    stop_signal = signal_number;
}

void catch_signals(void) {
    struct sigaction action, old;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_signal;
    action.sa_flags = SA_RESTART;
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGHUP, NULL, &old);
    if (old.sa_handler != SIG_IGN) sigaction(SIGHUP, &action, NULL);  // a lost terminal, unless nohup forgives it
}

// -x 0: the loss, and nothing is written but a line of the log that -o names.
void run_evaluate(Run *run, Model *model) {
    StepReport r;
    memset(&r, 0, sizeof r);
    r.val_loss = evaluate(run, model);
    r.evaluated = 1;
    if (run->log) log_step(run, model, &r);
    if (!isfinite(r.val_loss)) die_together(1, "the validation loss is not finite (%g)", r.val_loss);
    printf("val_loss %#.10g\n", r.val_loss);
    if (fflush(stdout) != 0) die(1, "cannot write to the standard output: %s", strerror(errno));
}

// Returns 1 where this is the best validation so far.
int note_validation(Progress *p, double val_loss) {
    int better = val_loss < p->best_val;
    p->stale = better ? 0 : p->stale + 1;
    if (better) p->best_val = val_loss, p->best_step = p->step;
    return better;
}

void run_train(Run *run, Model *model) {
    const Options *o = &run->options;
    Progress *p = &run->progress;
    char err[ERR_LEN];
    int64_t first = p->step;
    double start = now_seconds();
    int stopped = 0;
    for (int done = 0; !done;) {
        StepReport r = train_step(run, model);
        int better = 0, every_step_done = p->step >= o->max_steps;
        r.evaluated = every_step_done || (o->val_every && p->step % o->val_every == 0);
        if (r.evaluated) {
            r.val_loss = evaluate(run, model);
            better = note_validation(p, r.val_loss);
        }
        int early = o->early_stop && p->stale >= o->early_stop;
        double stop = stop_signal != 0;
        comm_sum(&stop, 1);     // a signal may reach some ranks only
        done = every_step_done || early || stop > 0;
        log_step(run, model, &r);
        print_step(run, &r, (now_seconds() - start) / (double)(p->step - first) * (double)(o->max_steps - p->step));
        if (r.evaluated && !isfinite(r.val_loss)) {     // not worth a checkpoint, nor the loss of an older one
            const char *latest = existing(format("%s/latest", run->out));
            die_together(1, "step %" PRId64 ": the validation loss is not finite (%g): try a lower --lr%s%s", p->step, r.val_loss,
                latest ? "; the last checkpoint is kept: " : "", latest ? latest : "");
        }
        if (done || (o->checkpoint_every && p->step % o->checkpoint_every == 0) || (o->early_stop && better)) {
            device_fetch(model);
            if (checkpoint_save(run, model, err) < 0) die_together(1, "no checkpoint of step %" PRId64 ": %s", p->step, err);
        }
        if (early && !every_step_done)
            printf("stopped early: no better validation than %.4f at step %" PRId64 "\n", p->best_val, p->best_step);
        stopped = stop > 0;
        if (o->sample_every && !stopped && (done || p->step % o->sample_every == 0)) {
            comm_begin();
            if (comm.rank == 0) print_sample(run, model);
            comm_meet();
        }
    }
    if (run->log && fclose(run->log) != 0) die(1, "%s/log.jsonl: cannot write: %s", run->out, strerror(errno));
    if (stopped && p->step < o->max_steps) {
        printf("stopped by a signal after step %" PRId64 " of %" PRId64 ", saved in %s/latest: ./%s -y -o %s continues\n",
               p->step, o->max_steps, run->out, program_name, run->out);
        return;
    }
    printf("done in %s: loss %.4f on the validation data at step %" PRId64 ", the best one\n",
           human_time(now_seconds() - start), p->best_val, p->best_step);
    printf("  sample    ./sample -e %s/latest -p \"Once upon a time\"\n", run->out);
    printf("  continue  ./%s -y -o %s -x %" PRId64 "\n", program_name, run->out, 2 * o->max_steps);
}

int train_main(int argc, char **argv) {
    Run run;
    Model model;
    start_process(argv);
    comm_open(argc, argv);
    run_prepare(&run, argc, argv);
    run_model(&run, &model);
    if (run.options.evaluate_only) run_evaluate(&run, &model);
    else {
        catch_signals();
        run_train(&run, &model);
    }
    return 0;
}

#if !defined(NSA_NO_MAIN) && !defined(NSA_GPU)
int main(int argc, char **argv) { return train_main(argc, argv); }
#endif
