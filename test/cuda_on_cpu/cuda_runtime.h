// CUDA on the CPU, for tests: enough of CUDA to run the kernels of train_nsa.cu and sample.c where there is no GPU.
//
// A kernel's threads are fibers of one CPU thread: each runs until it waits for others (__syncthreads, __syncwarp, a shuffle,
// a matrix instruction), then the next one runs. Blocks are shared out among the CPU's threads; those of a cluster have one each. What a GPU leaves undefined is
// made to fail here: fresh memory is NaN, cp.async delivers nothing before it is waited for, nor does the copy engine, whose target is NaN
// until then; wgmma computes at its wait; an exited lane that a mask names or a barrier that not all reach ends the program. Under AddressSanitizer and UBSan, accesses out of bounds
// (dynamic shared memory too) and misaligned ones are found. EMU_REVERSE=1 runs the threads of a block the other way round: a missing barrier
// shows as another result. Nothing here says how fast a kernel is.
//
// test/cuda_on_cpu/translate.sed turns what only nvcc reads (launches, dynamic shared memory) into C++.

#pragma once
#define CUDA_ON_CPU 1

#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <new>
#include <setjmp.h>
#include <thread>
#include <ucontext.h>
#include <unistd.h>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define __grid_constant__
#define __CUDA_ARCH__ 900
#define __CUDA_ARCH_FEAT_SM90_ALL

struct uint3 { unsigned x, y, z; };
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) ulonglong2 { unsigned long long x, y; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ----------------------------------------------------------------------------
// Threads of a block

static thread_local dim3 blockDim, gridDim;

// The tensor map of cuda.h, four dimensions, rows of 128 swizzled bytes.
struct alignas(64) CUtensorMap { const char *base; uint64_t size[4], stride[4]; unsigned box[4]; };
namespace emu {

enum { WARP = 32, WARPGROUP = 128, MAX_THREADS = 1024, STACK = 256 << 10, NAMED = 16, SHARED_ALIGN = 1024 };

[[noreturn]] static inline void stop(const char *what);

struct Barrier { int arrived = 0; unsigned generation = 0; };

struct Warp {
    Barrier barrier;
    uint64_t slot[2][WARP][4];      // what the lanes hand each other; two, so that a lane may be one exchange ahead
};

struct CopyAsync { void *to; const void *from; int bytes, filled; };

// A matrix product of a warpgroup, as one of its threads will do its share: rows lane / 4 and 8 more of its warp's 16.
struct WarpgroupProduct { float (*d)[4]; int n; bool in_registers, add, turned; float a[2][16]; uint64_t a_matrix, b_matrix; };

// A copy of the copy engine on its way: the box of a tensor map, in rows of 128 bytes. The thread that asked for it, whose parameter the map is, may be done.
struct BoxCopy { uint64_t *barrier; char *to; ::CUtensorMap map; int at[4]; };

struct Thread {
    uint3 idx;
    bool started, done;
    unsigned exchanges;             // that this lane has taken part in
    int fiber;
    std::vector<std::vector<CopyAsync>> copies;     // groups of cp.async; the last one is open
    std::vector<std::vector<WarpgroupProduct>> products;    // groups of wgmma; the last one is open
};

struct Fiber {
    jmp_buf at;
    ucontext_t context;
    char *stack;
    bool entered;
    int thread;
    void *fake_stack;
};

// The barrier of a cluster's blocks; one that has ended counts as arrived.
struct Cluster {
    std::mutex lock;
    std::condition_variable change;
    int size, blocks, arrived = 0;
    unsigned generation = 0;
    char *shared[16];               // dynamic shared memory of each
    void release_if_complete() {
        if (arrived < blocks) return;
        arrived = 0;
        generation++;
        change.notify_all();
    }
    void wait() {
        std::unique_lock<std::mutex> hold(lock);
        const unsigned before = generation;
        arrived++;
        release_if_complete();
        change.wait(hold, [&] { return generation != before; });
    }
    void leave() {
        std::unique_lock<std::mutex> hold(lock);
        blocks--;
        release_if_complete();
    }
};

// CPU threads that stay: run(n, work) has work(0) .. work(n - 1) done side by side.
struct Crew {
    std::mutex lock;
    std::condition_variable change;
    std::function<void(int)> work;
    int size = 0, wanted = 0, running = 0;
    unsigned round = 0;
    void member(int me, unsigned seen) {
        std::unique_lock<std::mutex> hold(lock);
        for (;;) {
            change.wait(hold, [&] { return round != seen; });
            seen = round;
            if (me >= wanted) continue;
            hold.unlock();
            work(me);
            hold.lock();
            if (--running == 0) change.notify_all();
        }
    }
    void run(int n, const std::function<void(int)> &what) {
        std::unique_lock<std::mutex> hold(lock);
        for (; size < n; size++) std::thread(&Crew::member, this, size, round).detach();
        work = what;
        wanted = running = n;
        round++;
        change.notify_all();
        change.wait(hold, [&] { return running == 0; });
    }
};
inline Crew *crew = new Crew();     // for as long as its threads

struct Worker {     // one CPU thread
    Cluster *cluster = nullptr;     // of the running block
    std::vector<Fiber *> fibers;
    std::vector<int> idle;
    std::vector<Thread> threads;
    Warp warps[MAX_THREADS / WARP];
    Barrier block, warpgroups[MAX_THREADS / WARPGROUP], named[NAMED];
    std::vector<BoxCopy> boxes;
    int live, count, next, fiber, current;      // threads not done; of the block; next to start; running fiber; running thread
    int64_t waits;                  // since somebody got on
    int any = 0;                    // of __syncthreads_or
    char *shared = nullptr;
    size_t shared_bytes = 0;
    uint3 block_idx;
    std::function<void()> body;
    const char *name = "";
    jmp_buf home;
    const void *home_stack = nullptr;
    size_t home_size = 0;
};

static thread_local Worker *worker;

[[noreturn]] static inline void stop(const char *what) {
    fprintf(stderr, "CUDA on the CPU: %s: block (%u,%u,%u), thread %u of %s\n", what, worker->block_idx.x, worker->block_idx.y, worker->block_idx.z,
            worker->current >= 0 ? worker->threads[worker->current].idx.x : 0, worker->name);
    fflush(NULL);
    _exit(99);
}

static inline Thread &self() { return worker->threads[worker->current]; }

// Switching fibers, and what AddressSanitizer must know of it.
static inline void enter(int to, void **save) {
    Worker *w = worker;
    Fiber *f = w->fibers[to];
    w->fiber = to;
    w->current = f->thread;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(save, f->stack, STACK);
#else
    (void)save;
#endif
    if (f->entered) _longjmp(f->at, 1);
    f->entered = true;
    setcontext(&f->context);
    abort();
}

static inline void arrived(void *fake) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    (void)fake;
#endif
}

static void fiber_main();

static inline int new_fiber() {
    Worker *w = worker;
    if (!w->idle.empty()) {
        const int f = w->idle.back();
        w->idle.pop_back();
        return f;
    }
    Fiber *f = new Fiber();
    f->stack = (char *)malloc(STACK);
    f->entered = false;
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = f->stack;
    f->context.uc_stack.ss_size = STACK;
    f->context.uc_link = nullptr;
    makecontext(&f->context, fiber_main, 0);
    w->fibers.push_back(f);
    return (int)w->fibers.size() - 1;
}

static inline int order(int i) {
    static const bool reverse = getenv("EMU_REVERSE") && atoi(getenv("EMU_REVERSE"));
    return reverse ? worker->count - 1 - i : i;
}

// Gives a fiber the next thread of the block to start.
static inline void start_thread(int fiber) {
    Worker *w = worker;
    const int t = order(w->next++);
    w->fibers[fiber]->thread = t;
    w->threads[t].fiber = fiber;
    w->threads[t].started = true;
    w->current = t;
    w->waits = 0;
}

// The fiber to run when this one waits or ends: a new thread's, else the next that is not done; -1: all are done.
static inline int next_fiber() {
    Worker *w = worker;
    if (w->next < w->count) {
        const int f = new_fiber();
        const int keep = w->current;
        start_thread(f);
        w->current = keep;
        return f;
    }
    for (int i = 1; i <= w->count; i++) {
        const Thread &t = w->threads[(w->current + i) % w->count];
        if (t.started && !t.done) return t.fiber;
    }
    return -1;
}

static inline void yield() {
    Worker *w = worker;
    if (++w->waits > 8 * (int64_t)w->count + 64) stop("threads wait for each other at different places");
    const int to = next_fiber();
    Fiber *f = w->fibers[w->fiber];
    if (to == w->fiber) return;
    if (_setjmp(f->at) == 0) enter(to, &f->fake_stack);
    arrived(f->fake_stack);
}

static inline void release_if_complete(Barrier &b, int expected) {
    if (b.arrived == 0 || b.arrived < expected) return;
    b.arrived = 0;
    b.generation++;
    worker->waits = 0;
}

static inline void wait(Barrier &b, int expected) {
    const unsigned generation = b.generation;
    b.arrived++;
    release_if_complete(b, expected);
    while (b.generation == generation) yield();
}

static inline int lane_of(int thread) { return thread % WARP; }
static inline unsigned alive_lanes(int warp) {
    unsigned mask = 0;
    for (int i = 0; i < WARP && warp * WARP + i < worker->count; i++)
        if (!worker->threads[warp * WARP + i].done) mask |= 1u << i;
    return mask;
}

static inline Warp &join(unsigned mask) {
    Worker *w = worker;
    const int warp = w->current / WARP;
    const unsigned there = w->count - warp * WARP >= WARP ? ~0u : (1u << (w->count - warp * WARP)) - 1;
    if (!(mask >> lane_of(w->current) & 1)) stop("a lane joins an exchange whose mask does not name it");
    if (mask & ~alive_lanes(warp) & there) stop("a mask names a lane that has exited");
    return w->warps[warp];
}

static inline void sync_warp(unsigned mask) {
    Warp &warp = join(mask);
    const int here = worker->count - worker->current / WARP * WARP;
    wait(warp.barrier, __builtin_popcount(here >= WARP ? mask : mask & ((1u << here) - 1)));
}

// Every lane of the mask lays down up to 32 bytes and sees those of the others.
static inline uint64_t (*exchange(unsigned mask, const void *mine, size_t bytes))[4] {
    Warp &warp = join(mask);
    uint64_t(*slot)[4] = warp.slot[self().exchanges++ % 2];
    memcpy(slot[lane_of(worker->current)], mine, bytes);
    sync_warp(mask);
    return slot;
}

static void fiber_main() {
    arrived(nullptr);
    Worker *w = worker;
    for (;;) {
        w->body();
        Thread &t = self();
        t.done = true;
        t.copies.clear();
        w->live--;
        w->waits = 0;
        release_if_complete(w->block, w->live);     // threads that have ended count as arrived
        const int me = w->fiber;
        if (w->next < w->count) {
            start_thread(me);
            continue;
        }
        const int to = next_fiber();
        Fiber *f = w->fibers[me];
        w->idle.push_back(me);
        if (_setjmp(f->at) == 0) {
            if (to >= 0) enter(to, &f->fake_stack);
#if defined(__SANITIZE_ADDRESS__)
            __sanitizer_start_switch_fiber(&f->fake_stack, w->home_stack, w->home_size);
#endif
            _longjmp(w->home, 1);
        }
        arrived(f->fake_stack);
    }
}

static inline void run_block(uint3 block, dim3 grid, dim3 threads, size_t shared, const std::function<void()> &body, const char *name, Cluster *cluster = nullptr) {
    if (!worker) worker = new Worker();
    Worker *w = worker;
    w->count = w->live = (int)(threads.x * threads.y * threads.z);
    w->next = 0;
    w->waits = 0;
    w->block = Barrier();
    for (Barrier &b : w->warpgroups) b = Barrier();
    for (Barrier &b : w->named) b = Barrier();
    w->boxes.clear();
    w->block_idx = block;
    blockDim = threads;
    gridDim = grid;
    w->name = name;
    w->body = body;
    w->cluster = cluster;
    w->threads.assign((size_t)w->count, Thread());
    for (int i = 0; i < w->count; i++)
        w->threads[i].idx = {i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y};
    for (int i = 0; i * WARP < w->count; i++) w->warps[i].barrier = Barrier();
    // its own allocation, so that AddressSanitizer knows its end
    const size_t whole = (shared + SHARED_ALIGN - 1) / SHARED_ALIGN * SHARED_ALIGN;
    char *memory = shared ? (char *)aligned_alloc(SHARED_ALIGN, whole) : nullptr;
    if (shared) memset(memory, 0xff, whole);
#if defined(__SANITIZE_ADDRESS__)
    if (shared) __asan_poison_memory_region(memory + shared, whole - shared);
#endif
    w->shared = memory;
    w->shared_bytes = shared;
    if (cluster) cluster->shared[block.y % (unsigned)cluster->size] = memory;
    const int f = new_fiber();
    start_thread(f);
#if defined(__SANITIZE_ADDRESS__)
    void *fake = nullptr;
    if (_setjmp(w->home) == 0) enter(f, &fake);
    __sanitizer_finish_switch_fiber(fake, &w->home_stack, &w->home_size);
#else
    if (_setjmp(w->home) == 0) enter(f, nullptr);
#endif
    w->current = -1;
    if (w->live) stop("threads of a block are left over");
    if (!w->boxes.empty()) stop("a block ends before what it copies has been waited for");
#if defined(__SANITIZE_ADDRESS__)
    if (shared) __asan_unpoison_memory_region(memory, whole);
#endif
    free(memory);
    if (cluster) cluster->leave();
}

}  // namespace emu

#define threadIdx (emu::self().idx)
#define blockIdx (emu::worker->block_idx)
static inline void *emu_shared() { return emu::worker->shared; }

static inline void __syncthreads() { emu::wait(emu::worker->block, emu::worker->live); }
static inline int __syncthreads_or(int yes) {
    __syncthreads();
    if (yes) emu::worker->any = 1;
    __syncthreads();
    const int any = emu::worker->any;
    __syncthreads();
    emu::worker->any = 0;
    return any;
}
static inline void __syncwarp(unsigned mask = ~0u) { emu::sync_warp(mask); }
static inline void emu_cluster_barrier() {
    if (emu::worker->live != emu::worker->count) emu::stop("a thread has exited before a barrier of its cluster");
    __syncthreads();
    if (emu::worker->cluster && emu::worker->current == 0) emu::worker->cluster->wait();
    __syncthreads();
}

// Where x, in dynamic shared memory, lies in that of a block of the cluster.
static inline void *emu_of_block(void *x, int block) {
    const emu::Worker *w = emu::worker;
    return w->cluster ? w->cluster->shared[block] + ((char *)x - w->shared) : x;
}

template <typename T>
static inline T emu_from_lane(const uint64_t (*slot)[4], int lane) {
    T x;
    memcpy(&x, slot[lane], sizeof x);
    return x;
}
template <typename T>
static inline T __shfl_sync(unsigned mask, T x, int from, int width = 32) {
    const int lane = emu::lane_of(emu::worker->current);
    return emu_from_lane<T>(emu::exchange(mask, &x, sizeof x), lane / width * width + (from & (width - 1)));
}
template <typename T>
static inline T __shfl_xor_sync(unsigned mask, T x, int bits, int width = 32) {
    const int lane = emu::lane_of(emu::worker->current), from = lane ^ bits;
    const uint64_t(*slot)[4] = emu::exchange(mask, &x, sizeof x);
    return from / width == lane / width ? emu_from_lane<T>(slot, from) : x;
}
template <typename T>
static inline T __shfl_up_sync(unsigned mask, T x, int by, int width = 32) {
    const int lane = emu::lane_of(emu::worker->current), from = lane - by;
    const uint64_t(*slot)[4] = emu::exchange(mask, &x, sizeof x);
    return from >= lane / width * width ? emu_from_lane<T>(slot, from) : x;
}
static inline unsigned __ballot_sync(unsigned mask, int yes) {
    const uint64_t(*slot)[4] = emu::exchange(mask, &yes, sizeof yes);
    unsigned result = 0;
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1) result |= (unsigned)(emu_from_lane<int>(slot, i) != 0) << i;
    return result;
}
static inline int __any_sync(unsigned mask, int yes) { return __ballot_sync(mask, yes) != 0; }
template <typename T>
static inline T __reduce_max_sync(unsigned mask, T x) {
    const uint64_t(*slot)[4] = emu::exchange(mask, &x, sizeof x);
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1 && emu_from_lane<T>(slot, i) > x) x = emu_from_lane<T>(slot, i);
    return x;
}
template <typename T>
static inline T __reduce_min_sync(unsigned mask, T x) { return ~__reduce_max_sync(mask, (T)~x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline unsigned __vmaxu2(unsigned a, unsigned b) { return (a >> 16 > b >> 16 ? a : b) & ~0xffffu | ((a & 0xffff) > (b & 0xffff) ? a : b) & 0xffff; }
static inline void __threadfence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static inline int atomicAdd(int *p, int x) { return __atomic_fetch_add(p, x, __ATOMIC_SEQ_CST); }
static inline unsigned __float_as_uint(float x) { unsigned u; memcpy(&u, &x, 4); return u; }
static inline float __uint_as_float(unsigned u) { float x; memcpy(&x, &u, 4); return x; }

// ----------------------------------------------------------------------------
// What PTX does in train_nsa.cu

// cp.async: 16 bytes, of which `filled` come from memory and the rest are zero.
static inline void emu_cp_async(void *to, const void *from, int bytes, int filled) {
    emu::Thread &t = emu::self();
    if (((uintptr_t)to | (filled ? (uintptr_t)from : 0)) % (unsigned)bytes) emu::stop("cp.async is misaligned");
    if (t.copies.empty()) t.copies.emplace_back();
    t.copies.back().push_back({to, from, bytes, filled});
}
static inline void emu_cp_async_commit() {
    emu::Thread &t = emu::self();
    if (t.copies.empty()) t.copies.emplace_back();
    t.copies.emplace_back();
}
static inline void emu_cp_async_wait(int left) {    // until at most `left` committed groups are on their way
    auto &groups = emu::self().copies;
    while (groups.size() > 1 && (int)groups.size() - 1 > left) {
        for (const emu::CopyAsync &c : groups.front()) {
            memset(c.to, 0, (size_t)c.bytes);
            if (c.filled) memcpy(c.to, c.from, (size_t)c.filled);
        }
        groups.erase(groups.begin());
    }
}

// ldmatrix.x4: lane i names row i % 8 of matrix i / 8, 16 bytes; register j of a lane is of matrix j: row lane / 4, columns 2·(lane % 4) and the next.
static inline void emu_ldmatrix_x4(unsigned r[4], const void *row, bool turned) {
    if ((uintptr_t)row % 16) emu::stop("ldmatrix is misaligned");
    const uint64_t(*slot)[4] = emu::exchange(~0u, &row, sizeof row);
    const int lane = emu::lane_of(emu::worker->current);
    for (int j = 0; j < 4; j++) {
        unsigned short two[2];
        for (int i = 0; i < 2; i++) {
            const int line = turned ? lane % 4 * 2 + i : lane / 4, column = turned ? lane / 4 : lane % 4 * 2 + i;
            two[i] = emu_from_lane<const unsigned short *>(slot, j * 8 + line)[column];
        }
        memcpy(&r[j], two, 4);
    }
    __syncwarp();       // nobody writes there before all have read
}

// Numbers of 16 bits with 11 digits, to the nearest even.
static inline float emu_float_of_f16(unsigned x) {
    const float size = x & 0x7c00 ? ldexpf((float)(1024 + x % 1024), (int)(x >> 10 & 31) - 25) : ldexpf((float)(x % 1024), -24);
    return (x & 0x7c00) == 0x7c00 ? NAN : x & 0x8000 ? -size : size;
}
static inline unsigned emu_f16(float x) {
    const float size = fabsf(x);
    const unsigned sign = signbit(x) ? 0x8000 : 0;
    if (size != size) return 0x7fff;
    if (!(size < 65520)) emu::stop("a number too large for 16 bits");
    const int exponent = size < 0x1p-14f ? -14 : ilogbf(size);
    return sign + (((unsigned)(exponent + 14)) << 10) + (unsigned)lrintf(ldexpf(size, 10 - exponent));
}

static inline float emu_float_of_bf16(unsigned x) { return __uint_as_float(x << 16); }

// mma.m16n8k16, numbers of 16 bits into f32: d (16,8) += a (16,16) · b (16,8)
static inline void emu_mma_of_16_bits(float d[4], const unsigned a[4], const unsigned b[2], float (*number)(unsigned)) {
    struct { unsigned a[4], b[2]; } mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    const uint64_t(*slot)[4] = emu::exchange(~0u, &mine, sizeof mine);
    const int lane = emu::lane_of(emu::worker->current), group = lane / 4, pair = lane % 4 * 2;
    float A[2][16], B[2][16];
    for (int q = 0; q < 4; q++) {
        unsigned regs[6], cols[6];
        memcpy(regs, slot[group * 4 + q], sizeof regs);
        for (int r = 0; r < 4; r++) {
            A[r % 2][r / 2 * 8 + q * 2] = number(regs[r] & 0xffff);
            A[r % 2][r / 2 * 8 + q * 2 + 1] = number(regs[r] >> 16);
        }
        for (int n = 0; n < 2; n++) {
            memcpy(cols, slot[(pair + n) * 4 + q], sizeof cols);
            for (int r = 0; r < 2; r++) {
                B[n][r * 8 + q * 2] = number(cols[4 + r] & 0xffff);
                B[n][r * 8 + q * 2 + 1] = number(cols[4 + r] >> 16);
            }
        }
    }
    for (int m = 0; m < 2; m++)
        for (int n = 0; n < 2; n++) {
            float sum = 0;
            for (int k = 0; k < 16; k++) sum += A[m][k] * B[n][k];
            d[m * 2 + n] += sum;
        }
}

static inline void emu_mma_16816(float d[4], const unsigned a[4], const unsigned b[2]) { emu_mma_of_16_bits(d, a, b, emu_float_of_bf16); }
static inline void emu_mma_16816_f16(float d[4], const unsigned a[4], const unsigned b[2]) { emu_mma_of_16_bits(d, a, b, emu_float_of_f16); }

// Hopper's barriers in shared memory, 8 bytes.
struct EmuBarrier { uint32_t made : 8, phase : 4, arrivals : 10, missing : 10; int32_t bytes; };
enum { EMU_BARRIER_MADE = 0xb5 };
static inline EmuBarrier *emu_barrier(uint64_t *barrier) {
    EmuBarrier *b = (EmuBarrier *)barrier;
    if (b->made != EMU_BARRIER_MADE) emu::stop("a barrier in shared memory is used before it is made");
    return b;
}
static inline void emu_barrier_init(uint64_t *barrier, int arrivals) { *(EmuBarrier *)barrier = {EMU_BARRIER_MADE, 0, (unsigned)arrivals, (unsigned)arrivals, 0}; }
static inline void emu_barrier_end_phase(EmuBarrier *b) {
    if (b->missing || b->bytes) return;
    b->phase ^= 1;
    b->missing = b->arrivals;
    emu::worker->waits = 0;
}
static inline void emu_barrier_arrive(uint64_t *barrier, int bytes) {
    EmuBarrier *b = emu_barrier(barrier);
    if (b->missing == 0) emu::stop("more threads arrive at a barrier than it was made for");
    b->bytes += bytes;
    b->missing--;
    emu_barrier_end_phase(b);
}

static inline void emu_barrier_arrive_copied(uint64_t *barrier) {     // the copies are made now
    emu_cp_async_commit();
    emu_cp_async_wait(0);
    emu_barrier_arrive(barrier, 0);
}

static inline char *emu_swizzled(char *base, size_t place) {       // chunk of 16 bytes ^ row of 128
    const size_t at = (size_t)(base - emu::worker->shared) + place;
    return emu::worker->shared + (at ^ (at >> 7 & 7) << 4);
}
static inline size_t emu_box_bytes(const CUtensorMap *m) { return (size_t)m->box[0] * m->box[1] * m->box[2] * m->box[3] * 2; }
static inline void emu_copy_box(void *to, const CUtensorMap *map, int column, int head, int token, int batch, uint64_t *barrier) {
    const size_t offset = (size_t)((char *)to - emu::worker->shared);
    emu_barrier(barrier);
    if (offset % 128 || offset + emu_box_bytes(map) > emu::worker->shared_bytes) emu::stop("a box is copied to where it cannot lie");
    memset(to, 0xff, emu_box_bytes(map));
    emu::worker->boxes.push_back({barrier, (char *)to, *map, {column, head, token, batch}});
}
static inline void emu_deliver(const emu::BoxCopy &c) {
    const CUtensorMap *m = &c.map;
    size_t place = 0;
    for (unsigned b = 0; b < m->box[3]; b++)
        for (unsigned t = 0; t < m->box[2]; t++)
            for (unsigned h = 0; h < m->box[1]; h++)
                for (unsigned i = 0; i < m->box[0]; i++, place += 2) {
                    const int64_t at[4] = {c.at[0] + (int64_t)i, c.at[1] + (int64_t)h, c.at[2] + (int64_t)t, c.at[3] + (int64_t)b};
                    uint16_t x = 0;
                    bool inside = true;
                    for (int d = 0; d < 4; d++) inside &= at[d] >= 0 && at[d] < (int64_t)m->size[d];
                    if (inside) memcpy(&x, m->base + at[0] * 2 + at[1] * m->stride[1] + at[2] * m->stride[2] + at[3] * m->stride[3], 2);
                    memcpy(emu_swizzled(c.to, place), &x, 2);
                }
    EmuBarrier *b = emu_barrier(c.barrier);
    b->bytes -= (int32_t)place;
    emu_barrier_end_phase(b);
}
static inline void emu_barrier_wait(uint64_t *barrier, int parity) {
    const EmuBarrier *b = emu_barrier(barrier);
    while (b->phase == parity) {
        auto &boxes = emu::worker->boxes;
        for (size_t i = 0; i < boxes.size();) {
            if (boxes[i].barrier != barrier) { i++; continue; }
            const emu::BoxCopy c = boxes[i];
            boxes.erase(boxes.begin() + i);
            emu_deliver(c);
        }
        if (b->phase == parity) emu::yield();
    }
}
static inline void emu_named_barrier(int id, int threads, bool stay) {
    emu::Barrier &b = emu::worker->named[id];
    if (id <= 0 || id >= emu::NAMED || threads % emu::WARP) emu::stop("no such barrier");
    if (stay) return emu::wait(b, threads);
    b.arrived++;
    emu::release_if_complete(b, threads);
}

// wgmma. A descriptor: address / 16 in bits 0-13, offset between groups of 64 along a turned row / 16 in 16-29, between groups of 8 rows / 16
// in 32-45, swizzle of 128 bytes = 1 in 62-63.
static inline unsigned emu_shared_address(const void *p) { return (unsigned)((const char *)p - emu::worker->shared); }
static inline float emu_factor(uint64_t matrix, int row, int k, bool turned) {
    const size_t start = (matrix & 0x3fff) << 4, leading = (matrix >> 16 & 0x3fff) << 4, stride = (matrix >> 32 & 0x3fff) << 4;
    if (matrix >> 62 != 1 || (start >> 7 & 7)) emu::stop("wgmma: a matrix that is not swizzled by 128 bytes, or does not begin at 1024");
    const size_t place = turned ? row / 64 * leading + row % 64 * 2 + k / 8 * stride + k % 8 * 128 : row / 8 * stride + row % 8 * 128 + k * 2;
    if (start + place + 2 > emu::worker->shared_bytes) emu::stop("wgmma: a matrix ends behind shared memory");
    uint16_t x;
    memcpy(&x, emu_swizzled(emu::worker->shared + start, place), 2);
    return __uint_as_float((unsigned)x << 16);
}
static inline void emu_wgmma(float (*d)[4], int n, const unsigned *a, uint64_t a_matrix, uint64_t b_matrix, int add, bool turned) {
    emu::Thread &t = emu::self();
    emu::WarpgroupProduct p = {d, n, a != nullptr, add != 0, turned, {{0}}, a_matrix, b_matrix};
    uint64_t mine[4] = {a_matrix, b_matrix, 0, 0};
    if (a) memcpy(mine + 2, a, 16);
    const uint64_t(*slot)[4] = emu::exchange(~0u, mine, sizeof mine);
    if (slot[0][0] != a_matrix || slot[0][1] != b_matrix) emu::stop("wgmma: the lanes name different matrices");
    for (int q = 0; a && q < 4; q++) {
        unsigned regs[4];
        memcpy(regs, &slot[emu::lane_of(emu::worker->current) / 4 * 4 + q][2], 16);
        for (int r = 0; r < 4; r++) {
            p.a[r % 2][r / 2 * 8 + q * 2] = __uint_as_float(regs[r] << 16);
            p.a[r % 2][r / 2 * 8 + q * 2 + 1] = __uint_as_float(regs[r] & 0xffff0000u);
        }
    }
    emu::wait(emu::worker->warpgroups[emu::worker->current / emu::WARPGROUP], emu::WARPGROUP);
    if (t.products.empty()) t.products.emplace_back();
    t.products.back().push_back(p);
}
static inline void emu_wgmma_commit() {
    auto &groups = emu::self().products;
    if (groups.empty()) groups.emplace_back();
    groups.emplace_back();
}
static inline void emu_wgmma_wait(int left) {
    auto &groups = emu::self().products;
    const int warp = emu::worker->current % emu::WARPGROUP / emu::WARP, lane = emu::lane_of(emu::worker->current);
    while (groups.size() > 1 && (int)groups.size() - 1 > left) {
        for (emu::WarpgroupProduct &p : groups.front()) {
            for (int k = 0; k < 16 && !p.in_registers; k++)
                for (int r = 0; r < 2; r++) p.a[r][k] = emu_factor(p.a_matrix, warp * 16 + lane / 4 + r * 8, k, false);
            for (int i = 0; i < p.n / 8; i++)
                for (int e = 0; e < 2; e++) {
                    float sum[2] = {0, 0};
                    for (int k = 0; k < 16; k++) {
                        const float b = emu_factor(p.b_matrix, i * 8 + lane % 4 * 2 + e, k, p.turned);
                        sum[0] += p.a[0][k] * b, sum[1] += p.a[1][k] * b;
                    }
                    for (int r = 0; r < 2; r++) p.d[i][r * 2 + e] = (p.add ? p.d[i][r * 2 + e] : 0) + sum[r];
                }
        }
        groups.erase(groups.begin());
    }
    __syncwarp();       // nobody goes on, and lets the factors be overwritten, before all have read
}

// ----------------------------------------------------------------------------
// The runtime: one stream in the order of the calls, and graphs that record it

typedef int cudaError_t;
enum { cudaSuccess = 0, cudaErrorMemoryAllocation = 2, cudaErrorNotReady = 600 };
typedef struct emu_stream *cudaStream_t;
typedef std::vector<std::function<void()>> emu_recording;
typedef emu_recording *cudaGraph_t;
typedef emu_recording *cudaGraphExec_t;
typedef double *cudaEvent_t;
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
enum { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal, cudaStreamCaptureModeRelaxed };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributePreferredSharedMemoryCarveout = 9, cudaFuncAttributeNonPortableClusterSizeAllowed = 14, cudaSharedmemCarveoutMaxShared = 100 };

struct cudaDeviceProp {
    char name[256];
    int major, minor, multiProcessorCount;
    size_t totalGlobalMem, sharedMemPerBlockOptin, sharedMemPerMultiprocessor, reservedSharedMemPerBlock;
    int l2CacheSize;
};

inline emu_recording *emu_captured = nullptr;

static inline void emu_do(std::function<void()> work) {
    if (emu_captured) emu_captured->push_back(work);
    else work();
}

// EMU_GPUS=2 is a machine with two: every process is one of its own, so that a number is all that they differ in.
static inline cudaError_t cudaGetDeviceCount(int *n) { *n = getenv("EMU_GPUS") ? atoi(getenv("EMU_GPUS")) : 1; return 0; }
static inline cudaError_t cudaDeviceGetPCIBusId(char *name, int len, int device) { snprintf(name, (size_t)len, "0000:%02x:00.0", device); return 0; }
static inline cudaError_t cudaSetDevice(int) { return 0; }
static inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "CUDA on the CPU");
    p->major = 9;
    p->multiProcessorCount = 4;
    p->sharedMemPerBlockOptin = 227 << 10;
    p->sharedMemPerMultiprocessor = 228 << 10;
    p->reservedSharedMemPerBlock = 1 << 10;
    p->totalGlobalMem = (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGE_SIZE);
    return 0;
}
static inline cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    *total = (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGE_SIZE);
    *free_bytes = (size_t)sysconf(_SC_AVPHYS_PAGES) * (size_t)sysconf(_SC_PAGE_SIZE);
    return 0;
}
static inline const char *cudaGetErrorString(cudaError_t e) { return e == cudaErrorMemoryAllocation ? "out of memory" : "error"; }
static inline cudaError_t cudaGetLastError() { return 0; }
static inline cudaError_t cudaDeviceSynchronize() { return 0; }
static inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return 0; }
static inline cudaError_t cudaStreamCreate(cudaStream_t *s) { *s = nullptr; return 0; }
enum { cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2 };
static inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned) { return cudaStreamCreate(s); }
static inline cudaError_t cudaStreamDestroy(cudaStream_t) { return 0; }
template <typename T> static inline cudaError_t cudaMalloc(T **p, size_t bytes) {
    *p = (T *)aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (*p) memset((void *)*p, 0xff, (bytes + 255) / 256 * 256);
    return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}
template <typename T> static inline cudaError_t cudaMallocHost(T **p, size_t bytes) { return cudaMalloc(p, bytes); }
static inline cudaError_t cudaFree(void *p) { free(p); return 0; }
static inline cudaError_t cudaFreeHost(void *p) { free(p); return 0; }
static inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, cudaMemcpyKind, cudaStream_t = nullptr) {
    emu_do([=] { memmove(to, from, n); });
    return 0;
}
static inline cudaError_t cudaMemcpy(void *to, const void *from, size_t n, cudaMemcpyKind k) { return cudaMemcpyAsync(to, from, n, k); }
static inline cudaError_t cudaMemcpy2D(void *to, size_t to_row, const void *from, size_t from_row, size_t width, size_t rows, cudaMemcpyKind) {
    emu_do([=] { for (size_t i = 0; i < rows; i++) memmove((char *)to + i * to_row, (const char *)from + i * from_row, width); });
    return 0;
}
static inline cudaError_t cudaMemsetAsync(void *p, int byte, size_t n, cudaStream_t = nullptr) {
    emu_do([=] { memset(p, byte, n); });
    return 0;
}
static inline cudaError_t cudaMemset(void *p, int byte, size_t n) { return cudaMemsetAsync(p, byte, n); }
static inline cudaError_t cudaFuncSetAttribute(const void *, int, int value) { return value > (227 << 10); }
static inline cudaError_t cudaStreamBeginCapture(cudaStream_t, int) { emu_captured = new emu_recording(); return 0; }
static inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *g) { *g = emu_captured; emu_captured = nullptr; return 0; }
static inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t *e, cudaGraph_t g, unsigned long long = 0) { *e = new emu_recording(*g); return 0; }
static inline cudaError_t cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t) { for (auto &work : *e) emu_do(work); return 0; }
static inline cudaError_t cudaGraphDestroy(cudaGraph_t g) { delete g; return 0; }
static inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t e) { delete e; return 0; }
static inline double emu_seconds() { timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec; }
static inline cudaError_t cudaEventCreate(cudaEvent_t *e) { *e = new double(0); return 0; }
static inline cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t = nullptr) { *e = emu_seconds(); return 0; }
static inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) { return cudaEventCreate(e); }
static inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned = 0) { return 0; }
static inline cudaError_t cudaEventQuery(cudaEvent_t) { return 0; }
static inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return 0; }
static inline cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) { *ms = (float)(1e3 * (*b - *a)); return 0; }
static inline cudaError_t cudaEventDestroy(cudaEvent_t e) { delete e; return 0; }

// kernel<<<grid, block, shared, stream>>>(arguments), as translate.sed writes it
template <typename Call>
struct emu_launcher {
    Call call;
    const char *name;
    dim3 grid, block;
    size_t shared;
    unsigned cluster;       // so many blocks along y
    template <typename... Args> void operator()(Args... args) const {
        const emu_launcher me = *this;
        const size_t threads = (size_t)block.x * block.y * block.z;
        if (!grid.x || !grid.y || !grid.z || !threads || threads > emu::MAX_THREADS || grid.y > 65535 || grid.z > 65535 || grid.y % cluster || shared > (227u << 10)) {
            fprintf(stderr, "CUDA on the CPU: %s<<<(%u,%u,%u), (%u,%u,%u), %zu>>> cannot be launched\n", name, grid.x, grid.y, grid.z, block.x, block.y, block.z, shared);
            exit(99);
        }
        emu_do([=] {
            const int64_t blocks = (int64_t)me.grid.x * me.grid.y * me.grid.z;
            const std::function<void()> body = [=] { me.call(args...); };
            const auto index = [=](int64_t i) { return uint3{(unsigned)(i % me.grid.x), (unsigned)(i / me.grid.x % me.grid.y), (unsigned)(i / me.grid.x / me.grid.y)}; };
            if (me.cluster > 1) {
                for (int64_t i = 0; i < blocks; i++) {
                    const uint3 first = index(i);
                    if (first.y % me.cluster) continue;
                    emu::Cluster cluster;
                    cluster.size = cluster.blocks = (int)me.cluster;
                    emu::crew->run((int)me.cluster, [&](int member) { emu::run_block({first.x, first.y + (unsigned)member, first.z}, me.grid, me.block, me.shared, body, me.name, &cluster); });
                }
                return;
            }
            #pragma omp parallel for schedule(dynamic) if (blocks > 1)
            for (int64_t i = 0; i < blocks; i++)
                emu::run_block(index(i), me.grid, me.block, me.shared, body, me.name);
        });
    }
};
template <typename Call>
static inline emu_launcher<Call> emu_launch(Call call, const char *name, dim3 grid, dim3 block, size_t shared = 0, cudaStream_t = nullptr, unsigned cluster = 1) {
    return {call, name, grid, block, shared, cluster};
}

// The same by a function, with attributes. A dependent launch begins here when all before it is done.
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute { cudaLaunchAttributeID id; struct { dim3 clusterDim; int programmaticStreamSerializationAllowed; } val; };
struct cudaLaunchConfig_t { dim3 gridDim, blockDim; size_t dynamicSmemBytes; cudaStream_t stream; cudaLaunchAttribute *attrs; unsigned numAttrs; };
struct cudaFuncAttributes { int ptxVersion; size_t sharedSizeBytes; };
enum { EMU_CLUSTER_BLOCKS = 4 };        // blocks in clusters that the GPU takes at once: as many as it has multiprocessors
static inline unsigned emu_cluster_of(const cudaLaunchConfig_t *c) {
    for (unsigned i = 0; i < c->numAttrs; i++)
        if (c->attrs[i].id == cudaLaunchAttributeClusterDimension) return c->attrs[i].val.clusterDim.y;
    return 1;
}
template <typename Kernel, typename... Arguments>
static inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *c, Kernel *kernel, Arguments... arguments) {
    emu_launch([=](auto... a) { kernel(a...); }, "kernel", c->gridDim, c->blockDim, c->dynamicSmemBytes, c->stream, emu_cluster_of(c))(arguments...);
    return 0;
}
static inline cudaError_t cudaOccupancyMaxActiveClusters(int *n, const void *, const cudaLaunchConfig_t *c) {
    *n = EMU_CLUSTER_BLOCKS / (int)emu_cluster_of(c);
    return 0;
}
static inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *a, const void *) {
    a->ptxVersion = 90;
    a->sharedSizeBytes = 0;
    return 0;
}
