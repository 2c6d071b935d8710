// ----------------------------------------------------------------------------
// Tensor cores and asynchronous copies, as functions. CUDA on the CPU has its own.

typedef __nv_bfloat16 bf16;

#ifdef CUDA_ON_CPU
static inline void mma_16816(float d[4], const unsigned a[4], const unsigned b[2]) { emu_mma_16816(d, a, b); }
static inline void ldmatrix_x4(unsigned r[4], const void *row) { emu_ldmatrix_x4(r, row, false); }
static inline void ldmatrix_x4_turned(unsigned r[4], const void *row) { emu_ldmatrix_x4(r, row, true); }
static inline void cp_async_16(void *to, const void *from, int filled) { emu_cp_async(to, from, 16, filled); }
static inline void cp_async_commit(void) { emu_cp_async_commit(); }
template <int LEFT> static inline void cp_async_wait(void) { emu_cp_async_wait(LEFT); }
#else
__device__ static inline unsigned shared_address(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }

// d (16,8) += a (16,16) · b (16,8), bf16 into f32, by a warp.
__device__ static inline void mma_16816(float d[4], const unsigned a[4], const unsigned b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Four matrices (8,8): lane i names row i % 8 of matrix i / 8; a lane gets row lane / 4, columns 2·(lane % 4) and the next of each.
__device__ static inline void ldmatrix_x4(unsigned r[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ static inline void ldmatrix_x4_turned(unsigned r[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
// 16 bytes into shared memory, of which `filled` are copied and the rest are zero.
__device__ static inline void cp_async_16(void *to, const void *from, int filled) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(shared_address(to)), "l"(from), "r"(filled) : "memory");
}
__device__ static inline void cp_async_commit(void) { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ static inline void cp_async_wait(void) { asm volatile("cp.async.wait_group %0;" :: "n"(LEFT) : "memory"); }
#endif

// ----------------------------------------------------------------------------
// Matrix products of many experts in one launch. Rows are sorted by expert, those of expert e are start[e] .. start[e+1] of
// GPU memory: the host never learns how many. It launches as many blocks as there can be tiles; each finds its own expert and
// rows, or that there are none. Every number is summed by one thread in one order: the same bits always.

typedef struct Groups {
    const int64_t *start;       // (E+1), on the GPU
    int E;
    int64_t rows;               // at most
} Groups;

// A factor as it lies in memory: row r at x + (list ? list[r] : r)·columns; none from `rows` on.
template <typename F>
struct Factor {
    const F *x;
    const int *list;
    int rows, columns;
    __device__ const F *at(int row, int column) const { return x + (int64_t)(list ? list[row] : row) * columns + column; }
    __device__ int holds(int row, int column) const { return row < rows && column < columns; }
};

// What becomes of a product: it is stored, or added to a gradient.
template <typename F>
struct Store {
    F *out;
    int64_t columns;
    __device__ void one(int row, int column, float x) const { out[row * columns + column] = (F)x; }
    __device__ void two(int row, int column, float x, float y) const { *(__nv_bfloat162 *)(out + row * columns + column) = __floats2bfloat162_rn(x, y); }
};
struct Add {
    float *out;
    int64_t columns;
    __device__ void one(int row, int column, float x) const { out[row * columns + column] += x; }
    __device__ void two(int row, int column, float x, float y) const {
        float2 *at = (float2 *)(out + row * columns + column);
        *at = make_float2(at->x + x, at->y + y);
    }
};

// A block's tile of a product, out (TILE,TILE) = Σ_k a(row, k)·b(column, k). A factor lies with k along its rows, or turned: its
// rows are the k and its columns the tile's rows or columns. This tier is for any type and shape: a thread makes 4 x 4 numbers.
template <typename F, bool TURN_A, bool TURN_B>
struct SimpleProduct {
    enum { TILE = 64, DEPTH = 16, BLOCK = 256, BLOCKS = 2, BYTES = 0, EACH = 4, ACROSS = TILE / EACH };
    typedef float Tile[DEPTH][TILE + 4];
    float d[EACH][EACH];

    template <bool TURN>
    __device__ static void fill(Tile tile, const Factor<F> &x, int from, int k) {
        for (int i = threadIdx.x; i < TILE * DEPTH; i += BLOCK) {
            const int place = TURN ? i % TILE : i / DEPTH, depth = TURN ? i / TILE : i % DEPTH;
            const int row = TURN ? k + depth : from + place, column = TURN ? from + place : k + depth;
            tile[depth][place] = x.holds(row, column) ? (float)*x.at(row, column) : 0;
        }
    }

    __device__ void multiply(const Factor<F> &a, int a_from, const Factor<F> &b, int b_from, int k, int k_end) {
        __shared__ Tile as, bs;
        const int row = threadIdx.x / ACROSS * EACH, column = threadIdx.x % ACROSS * EACH;
        for (int i = 0; i < EACH * EACH; i++) d[i / EACH][i % EACH] = 0;
        for (; k < k_end; k += DEPTH) {
            fill<TURN_A>(as, a, a_from, k);
            fill<TURN_B>(bs, b, b_from, k);
            __syncthreads();
            for (int p = 0; p < DEPTH; p++)
                for (int i = 0; i < EACH * EACH; i++) d[i / EACH][i % EACH] += as[p][row + i / EACH] * bs[p][column + i % EACH];
            __syncthreads();
        }
    }

    template <typename To>
    __device__ void put(const To &to, int row, int rows, int column, int columns) const {
        row += threadIdx.x / ACROSS * EACH;
        column += threadIdx.x % ACROSS * EACH;
        for (int i = 0; i < EACH; i++)
            for (int j = 0; j < EACH; j++)
                if (row + i < rows && column + j < columns) to.one(row + i, column + j, d[i][j]);
    }
};

// The same by tensor cores, for bf16 whose rows are a multiple of 16 bytes and begin at one. Four warps make (64,64) each: at that
// size shared memory feeds the tensor cores with time to spare. Tiles of both factors come STAGES - 1 ahead of their use.
template <bool TURN_A, bool TURN_B>
struct FastProduct {
    enum { TILE = 128, DEPTH = 64, STAGES = 3, BLOCK = 128, BLOCKS = 2, NUMBERS = TILE * DEPTH, BYTES = STAGES * 2 * NUMBERS * 2, EACH = NUMBERS / 8 / BLOCK, PART = 64 };
    float d[PART / 16][PART / 8][4];

    __device__ static int part_row(void) { return threadIdx.x / WARP / 2 * PART; }
    __device__ static int part_column(void) { return threadIdx.x / WARP % 2 * PART; }

    // Numbers lie in chunks of 16 bytes; those of row r change places by r % 8, so that eight rows of a column of chunks, which
    // ldmatrix reads together, are in different banks.
    template <bool TURN>
    __device__ static int place(int row, int chunk) { return row * Lines<TURN>::LENGTH + (chunk ^ (row & 7)) * 8; }

    // A tile as it is copied: a thread takes one chunk of EACH of its lines, STEP lines apart.
    template <bool TURN>
    struct Lines {
        enum { LENGTH = TURN ? TILE : DEPTH, CHUNKS = LENGTH / 8, STEP = BLOCK / CHUNKS };
        int row[EACH];          // of the factor
        __device__ static int line(void) { return threadIdx.x / CHUNKS; }
        __device__ static int chunk(void) { return threadIdx.x % CHUNKS; }

        // Lines behind the last row read that again: the product does not keep theirs, or they are made zero.
        __device__ void find(const Factor<bf16> &x, int from) {
            const int first = from + line(), last = x.rows - 1;
            #pragma unroll
            for (int i = 0; i < EACH; i++) row[i] = first + i * STEP < last ? first + i * STEP : last;
            if (!x.list) return;
            #pragma unroll
            for (int i = 0; i < EACH; i++) row[i] = x.list[row[i]];
        }

        // What is behind the end of k is zero; what is behind that of the product's rows or columns is anything.
        __device__ void fetch(bf16 *tile, const Factor<bf16> &x, int from, int k) {
            if (TURN) find(x, k);
            const int column = (TURN ? from : k) + chunk() * 8, inside = column < x.columns, row_bytes = x.columns * (int)sizeof(bf16);
            const char *source = (const char *)(x.x + (inside ? column : 0));
            bf16 *to = tile + place<TURN>(line(), chunk());
            #pragma unroll
            for (int i = 0; i < EACH; i++)
                cp_async_16(to + i * STEP * LENGTH, source + (int64_t)row[i] * row_bytes, (TURN ? k + line() + i * STEP < x.rows : inside) ? 16 : 0);
        }
    };

    // 16 places (rows or columns of the product) by 16 k: the lane's eight lines begin at `at` and k.
    template <bool TURN>
    __device__ static void fragment(unsigned r[4], const bf16 *tile, int at, int k) {
        const bf16 *row = tile + place<TURN>((TURN ? k : at) + lane() % 8, (TURN ? at : k) / 8);
        if (TURN) ldmatrix_x4_turned(r, row);
        else ldmatrix_x4(r, row);
    }

    __device__ void multiply_tile(const bf16 *as, const bf16 *bs) {
        const int near = lane() / 8 % 2 * 8, far = lane() / 16 * 8;     // a's registers go by place first, b's by k
        #pragma unroll
        for (int k = 0; k < DEPTH; k += 16) {
            unsigned a[PART / 16][4], b[PART / 16][4];
            #pragma unroll
            for (int i = 0; i < PART / 16; i++) fragment<TURN_A>(a[i], as, part_row() + i * 16 + near, k + far);
            #pragma unroll
            for (int j = 0; j < PART / 16; j++) fragment<TURN_B>(b[j], bs, part_column() + j * 16 + far, k + near);
            #pragma unroll
            for (int i = 0; i < PART / 16; i++)
                #pragma unroll
                for (int j = 0; j < PART / 8; j++) mma_16816(d[i][j], a[i], b[j / 2] + j % 2 * 2);
        }
    }

    __device__ void multiply(const Factor<bf16> &a, int a_from, const Factor<bf16> &b, int b_from, int k, int k_end) {
        extern __shared__ uint4 product_tiles[];
        bf16 *tiles = (bf16 *)product_tiles;
        const int count = (k_end - k + DEPTH - 1) / DEPTH;
        Lines<TURN_A> a_lines;
        Lines<TURN_B> b_lines;
        if (!TURN_A) a_lines.find(a, a_from);       // the same rows for every tile
        if (!TURN_B) b_lines.find(b, b_from);
        #pragma unroll
        for (int i = 0; i < PART / 16 * (PART / 8) * 4; i++) d[i / 32][i / 4 % 8][i % 4] = 0;
        for (int next = 0; next < count + STAGES - 1; next++) {
            const int now = next - (STAGES - 1);
            if (now >= 0) {         // tile `now` is there for all, and the one before it, whose place `next` takes, is done with
                cp_async_wait<STAGES - 2>();
                __syncthreads();
            }
            bf16 *to = tiles + next % STAGES * 2 * NUMBERS;
            if (next < count) {
                a_lines.fetch(to, a, a_from, k + next * DEPTH);
                b_lines.fetch(to + NUMBERS, b, b_from, k + next * DEPTH);
            }
            cp_async_commit();
            if (now >= 0) multiply_tile(tiles + now % STAGES * 2 * NUMBERS, tiles + (now % STAGES * 2 + 1) * NUMBERS);
        }
    }

    template <typename To>
    __device__ void put(const To &to, int row, int rows, int column, int columns) const {
        row += part_row() + lane() / 4;
        column += part_column() + lane() % 4 * 2;
        #pragma unroll
        for (int i = 0; i < PART / 8; i++)
            #pragma unroll
            for (int j = 0; j < PART / 8; j++)
                if (row + i * 8 < rows && column + j * 8 < columns) to.two(row + i * 8, column + j * 8, d[i / 2][j][i % 2 * 2], d[i / 2][j][i % 2 * 2 + 1]);
    }
};

// Rows from .. to of an expert; expert -1: there are none.
typedef struct Piece { int expert, from, to; } Piece;

// The index-th of the pieces of `size` rows that every expert's rows are cut into; `to` is the end of the expert's rows. A warp
// looks together, each lane at one expert: lanes sum the pieces up to theirs, and the first whose sum is over index has it.
__device__ static inline Piece find_piece(const Groups &g, int index, int size) {
    for (int e = 0; e < g.E; e += WARP) {
        const int mine = e + lane(), from = mine < g.E ? (int)g.start[mine] : 0, to = mine < g.E ? (int)g.start[mine + 1] : 0;
        const int pieces = (to - from + size - 1) / size;
        int sum = pieces;
        for (int step = 1; step < WARP; step *= 2) {
            const int before = __shfl_up_sync(~0u, sum, step);
            if (lane() >= step) sum += before;
        }
        const unsigned over = __ballot_sync(~0u, sum > index);
        if (over) {
            const int owner = __ffs((int)over) - 1;
            const int at = from + (index - sum + pieces) * size;
            return {e + owner, __shfl_sync(~0u, at, owner), __shfl_sync(~0u, to, owner)};
        }
        index -= __shfl_sync(~0u, sum, WARP - 1);
    }
    return {-1, 0, 0};
}

// out (R,OUT) = inp (R,IN) · the expert's weight, which lies (OUT,IN), or where the product turns it (IN,OUT).
template <typename P, typename F>
__global__ void __launch_bounds__(P::BLOCK, P::BLOCKS) grouped_rows_kernel(F *out, int columns, Factor<F> inp, Factor<F> weight, int64_t stride, Groups g) {
    const int across = (columns + P::TILE - 1) / P::TILE, column = blockIdx.x % across * P::TILE;
    const Piece piece = find_piece(g, blockIdx.x / across, P::TILE);
    if (piece.expert < 0) return;
    inp.rows = piece.to;
    weight.x += piece.expert * stride;
    P product;
    product.multiply(inp, piece.from, weight, column, 0, inp.columns);
    product.put(Store<F>{out, columns}, piece.from, piece.to, column, columns);
}

// dweight of expert e (OC,C) += dout[rows of e] (.,OC)ᵀ · inp[rows of e] (.,C)
template <typename P, typename F>
__global__ void __launch_bounds__(P::BLOCK, P::BLOCKS) grouped_dweight_kernel(float *dweight, int64_t stride, Factor<F> dout, Factor<F> inp, Groups g) {
    const int down = (dout.columns + P::TILE - 1) / P::TILE, across = (inp.columns + P::TILE - 1) / P::TILE;
    const int expert = blockIdx.x / (down * across), row = blockIdx.x / across % down * P::TILE, column = blockIdx.x % across * P::TILE;
    const int from = (int)g.start[expert], to = (int)g.start[expert + 1];
    if (from == to) return;
    dout.rows = inp.rows = to;
    P product;
    product.multiply(dout, row, inp, column, from, to);
    product.put(Add{dweight + expert * stride, inp.columns}, row, dout.columns, column, inp.columns);
}

template <typename Kernel>
static Kernel *with_shared_memory(Kernel *kernel, int bytes) {
    if (bytes > 48 << 10) CUDA(cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    return kernel;
}

template <typename P, typename F>
static void grouped_rows(F *out, int64_t columns, Factor<F> inp, Factor<F> weight, int64_t stride, const Groups *g) {
    const int64_t pieces = min64(g->rows, g->rows / P::TILE + g->E), across = (columns + P::TILE - 1) / P::TILE;
    if (pieces * across == 0) return;
    with_shared_memory(grouped_rows_kernel<P, F>, P::BYTES);
    grouped_rows_kernel<P, F><<<grid(pieces * across, 1), P::BLOCK, P::BYTES>>>(out, (int)columns, inp, weight, stride, *g);
    LAUNCHED();
}

template <typename P, typename F>
static void grouped_weights(float *dweight, int64_t stride, Factor<F> dout, Factor<F> inp, const Groups *g) {
    const int64_t down = (dout.columns + P::TILE - 1) / P::TILE, across = (inp.columns + P::TILE - 1) / P::TILE;
    if (g->E * down * across == 0) return;
    with_shared_memory(grouped_dweight_kernel<P, F>, P::BYTES);
    grouped_dweight_kernel<P, F><<<grid(g->E * down * across, 1), P::BLOCK, P::BYTES>>>(dweight, stride, dout, inp, *g);
    LAUNCHED();
}

// Whether rows of c numbers of type F, at each of three places, can be read 16 bytes at a time.
template <typename F>
static int by_16_bytes(int64_t c, const void *x, const void *y, const void *z) {
    return c * sizeof(F) % 16 == 0 && ((uintptr_t)x | (uintptr_t)y | (uintptr_t)z) % 16 == 0;
}
template <typename F>
static int fits_fast(int64_t c, int64_t oc, int64_t stride, const void *x, const void *y, const void *z) {
    return sizeof(F) == sizeof(bf16) && by_16_bytes<F>(c, x, y, z) && by_16_bytes<F>(oc, x, y, z) && stride * sizeof(F) % 16 == 0;
}

// out (R,OC) = inp (R,C) · W_eᵀ for each expert e and its rows, W_e (OC,C) at weight + e·stride. With a list, inp's row r is list[r].
template <typename F>
static void grouped_forward(F *out, const F *inp, const int *list, const F *weight, int64_t stride, int64_t c, int64_t oc, const Groups *g) {
    const Factor<F> x = {inp, list, 0, (int)c}, w = {weight, NULL, (int)oc, (int)c};
    if constexpr (sizeof(F) == sizeof(bf16))
        if (fits_fast<F>(c, oc, stride, out, inp, weight)) return grouped_rows<FastProduct<false, false>>(out, oc, x, w, stride, g);
    grouped_rows<SimpleProduct<F, false, false>>(out, oc, x, w, stride, g);
}

// dinp (R,C) = dout (R,OC) · W_e. With a list, dout's row r is list[r].
template <typename F>
static void grouped_dinp(F *dinp, const F *dout, const int *list, const F *weight, int64_t stride, int64_t c, int64_t oc, const Groups *g) {
    const Factor<F> dy = {dout, list, 0, (int)oc}, w = {weight, NULL, (int)oc, (int)c};
    if constexpr (sizeof(F) == sizeof(bf16))
        if (fits_fast<F>(c, oc, stride, dinp, dout, weight)) return grouped_rows<FastProduct<false, true>>(dinp, c, dy, w, stride, g);
    grouped_rows<SimpleProduct<F, false, true>>(dinp, c, dy, w, stride, g);
}

// dW_e (OC,C) += dout[rows of e]ᵀ · inp[rows of e], at dweight + e·stride; either may have a list.
template <typename F>
static void grouped_dweight(float *dweight, int64_t stride, const F *dout, const int *dout_list, const F *inp, const int *inp_list,
                            int64_t c, int64_t oc, const Groups *g) {
    const Factor<F> dy = {dout, dout_list, 0, (int)oc}, x = {inp, inp_list, 0, (int)c};
    if constexpr (sizeof(F) == sizeof(bf16))
        if (fits_fast<F>(c, oc, stride, dweight, dout, inp)) return grouped_weights<FastProduct<true, true>>(dweight, stride, dy, x, g);
    grouped_weights<SimpleProduct<F, true, true>>(dweight, stride, dy, x, g);
}

// ----------------------------------------------------------------------------
// Mixture of experts, without asking the GPU how many rows an expert has

// V numbers of a row at once: 16 bytes where rows allow it, else one.
template <typename F, int V>
struct alignas(V * sizeof(F)) Pack {
    F x[V];
};
template <int V, typename F>
__device__ static inline Pack<F, V> pack_at(const F *p) { return *(const Pack<F, V> *)p; }

// row_of (N·k): each share's row (before: -1, and so it stays where a share was dropped); token (N·k): each row's token.
__global__ void share_rows_kernel(int *row_of, int *token, const int *list, const int64_t *rows, int k) {
    const int64_t i = global_thread();
    if (i >= *rows) return;
    row_of[list[i]] = (int)i;
    token[i] = list[i] / k;
}

// h (R,F) = SwiGLU(gate_up)
template <typename F, int V>
__global__ void grouped_swiglu_kernel(F *h, const F *gate_up, const int64_t *rows, int64_t f) {
    const int64_t item = global_thread() * V, i = item / f, j = item % f;
    if (i >= *rows) return;
    const Pack<F, V> a = pack_at<V>(gate_up + i * 2 * f + j), u = pack_at<V>(gate_up + i * 2 * f + f + j);
    Pack<F, V> out;
    for (int v = 0; v < V; v++) out.x[v] = (F)((float)a.x[v] * sigmoid((float)a.x[v]) * (float)u.x[v]);
    *(Pack<F, V> *)(h + item) = out;
}

// A warp a row. dh (R,F) is of the expert's output without its weight w: dweight[share] = <dh, h>. Then dgate_up = through SwiGLU of
// w·dh; and dh becomes w·h, which makes dW_down from the unweighted gradient of the output.
template <typename F, int V>
__global__ void grouped_swiglu_backward_kernel(float *dweight, F *dh, F *dgate_up, const F *gate_up, const float *weight, const int *list, const int64_t *rows, int64_t f) {
    const int64_t i = global_warp();
    if (i >= *rows) return;
    const float w = weight[list[i]];
    float sum = 0;
    for (int64_t j = lane() * V; j < f; j += WARP * V) {
        const Pack<F, V> a = pack_at<V>(gate_up + i * 2 * f + j), u = pack_at<V>(gate_up + i * 2 * f + f + j);
        Pack<F, V> g = pack_at<V>(dh + i * f + j), da, du;
        for (int v = 0; v < V; v++) {
            const float x = (float)a.x[v], y = (float)u.x[v], s = sigmoid(x), h = x * s * y, dy = w * (float)g.x[v];
            sum += (float)g.x[v] * h;
            g.x[v] = (F)(w * h);
            da.x[v] = (F)(dy * y * s * (1 + x * (1 - s)));
            du.x[v] = (F)(dy * x * s);
        }
        *(Pack<F, V> *)(dh + i * f + j) = g;
        *(Pack<F, V> *)(dgate_up + i * 2 * f + j) = da;
        *(Pack<F, V> *)(dgate_up + i * 2 * f + f + j) = du;
    }
    sum = warp_sum(sum);
    if (lane() == 0) dweight[list[i]] = sum;
}

// out (N,C) += Σ_slots weight·y[row of the share], in the order of the slots; without weights, Σ_slots y.
template <typename F, int V>
__global__ void combine_shares_kernel(F *out, const F *y, const float *weight, const int *row_of, int64_t n, int64_t c, int k) {
    const int64_t item = global_thread() * V, i = item / c, j = item % c;
    if (i >= n) return;
    Pack<F, V> all = pack_at<V>(out + item);
    float sum[V];
    for (int v = 0; v < V; v++) sum[v] = (float)all.x[v];
    for (int64_t share = i * k; share < (i + 1) * k; share++) {
        if (row_of[share] < 0) continue;
        const float w = weight ? weight[share] : 1;
        const Pack<F, V> part = pack_at<V>(y + row_of[share] * c + j);
        for (int v = 0; v < V; v++) sum[v] += w * (float)part.x[v];
    }
    for (int v = 0; v < V; v++) all.x[v] = (F)sum[v];
    *(Pack<F, V> *)(out + item) = all;
}

template <typename F>
static void combine_shares(F *out, const F *y, const float *weight, const int *row_of, const MoeShape *s) {
    enum { WIDE = 16 / sizeof(F) };
    const int64_t N = s->N, C = s->C;
    if (by_16_bytes<F>(C, out, y, NULL)) combine_shares_kernel<F, WIDE><<<grid(N * C / WIDE, THREADS), THREADS>>>(out, y, weight, row_of, N, C, s->k);
    else combine_shares_kernel<F, 1><<<grid(N * C, THREADS), THREADS>>>(out, y, weight, row_of, N, C, s->k);
    LAUNCHED();
}

template <typename F>
static void grouped_swiglu(F *h, const F *gate_up, const int64_t *rows, int64_t rows_max, int64_t f) {
    enum { WIDE = 16 / sizeof(F) };
    if (by_16_bytes<F>(f, h, gate_up, NULL)) grouped_swiglu_kernel<F, WIDE><<<grid(rows_max * f / WIDE, THREADS), THREADS>>>(h, gate_up, rows, f);
    else grouped_swiglu_kernel<F, 1><<<grid(rows_max * f, THREADS), THREADS>>>(h, gate_up, rows, f);
    LAUNCHED();
}

template <typename F>
static void grouped_swiglu_backward(float *dweight, F *dh, F *dgate_up, const F *gate_up, const Routing *r, const MoeShape *s) {
    enum { WIDE = 16 / sizeof(F) };
    const int64_t f = s->F, *rows = r->start + s->E;
    const unsigned blocks = grid(s->N * s->k, WARPS);
    if (by_16_bytes<F>(f, dh, dgate_up, gate_up)) grouped_swiglu_backward_kernel<F, WIDE><<<blocks, THREADS>>>(dweight, dh, dgate_up, gate_up, r->weight, r->row_token, rows, f);
    else grouped_swiglu_backward_kernel<F, 1><<<blocks, THREADS>>>(dweight, dh, dgate_up, gate_up, r->weight, r->row_token, rows, f);
    LAUNCHED();
}

// What forward and backward need besides; R = N·k.
template <typename F>
struct MoeScratch {
    int *row_of, *token;        // (R): see share_rows_kernel
    float *dweight;             // (R)
    F *h, *dgate_up, *rows;     // (R,F), (R,2F), (R,C)
};

// Carved from `memory`; returns its bytes (memory NULL: only counts). Forward alone (train 0) needs less.
template <typename F>
static int64_t moe_scratch2(MoeScratch<F> *m, const MoeShape *s, int train, void *memory) {
    const int64_t R = s->N * s->k, row = sizeof(F), ints = round_up(R * (int64_t)sizeof(int), 16);
    char *p = (char *)memory;
    m->row_of = (int *)p;
    m->token = (int *)(p += ints);
    m->h = (F *)(p += ints);
    m->rows = (F *)(p += round_up(R * s->F * row, 16));
    p += round_up(R * s->C * row, 16);
    m->dgate_up = (F *)p;
    if (train) p += round_up(R * 2 * s->F * row, 16);
    m->dweight = (float *)p;
    if (train) p += ints;
    return p - (char *)memory;
}

static void find_share_rows(int *row_of, int *token, const Routing *r, const MoeShape *s) {
    CUDA(cudaMemsetAsync(row_of, 0xff, (size_t)(s->N * s->k) * sizeof(int)));       // -1
    share_rows_kernel<<<grid(s->N * s->k, THREADS), THREADS>>>(row_of, token, r->row_token, r->start + s->E, s->k);
    LAUNCHED();
}

// out (N,C) += Σ_e w_e·expert_e(x), x (N,C); gate_up (N·k,2F), rows sorted by expert, is kept for backward.
template <typename F>
static void gpu_moe_forward2(F *out, F *gate_up, const F *x, const F *experts, const Routing *r, const MoeShape *s, void *scratch) {
    const int64_t C = s->C, Fe = s->F, stride = 3 * Fe * C;
    const F *down = experts + 2 * Fe * C;
    const Groups g = {r->start, s->E, s->N * s->k};
    MoeScratch<F> m;
    moe_scratch2(&m, s, 0, scratch);
    find_share_rows(m.row_of, m.token, r, s);
    grouped_forward(gate_up, x, m.token, experts, stride, C, 2 * Fe, &g);
    grouped_swiglu(m.h, gate_up, r->start + s->E, g.rows, Fe);
    grouped_forward(m.rows, m.h, NULL, down, stride, Fe, C, &g);
    combine_shares(out, m.rows, r->weight, m.row_of, s);
}

// dx (N,C) +=, dexperts +=; leaves dweight (N·k) for router_backward_kernel, and returns where it lies in `scratch`.
template <typename F>
static float *gpu_moe_backward2(F *dx, float *dexperts, const F *dout, const F *gate_up, const F *x, const F *experts,
                                const Routing *r, const MoeShape *s, void *scratch) {
    const int64_t C = s->C, Fe = s->F, stride = 3 * Fe * C, to_down = 2 * Fe * C;
    const Groups g = {r->start, s->E, s->N * s->k};
    MoeScratch<F> m;
    moe_scratch2(&m, s, 1, scratch);
    find_share_rows(m.row_of, m.token, r, s);
    device_zero(m.dweight, s->N * s->k * (int64_t)sizeof(float));       // a dropped share has no gradient
    grouped_dinp(m.h, dout, m.token, experts + to_down, stride, Fe, C, &g);
    grouped_swiglu_backward(m.dweight, m.h, m.dgate_up, gate_up, r, s);
    grouped_dweight(dexperts + to_down, stride, dout, m.token, m.h, (const int *)NULL, Fe, C, &g);
    grouped_dweight(dexperts, stride, m.dgate_up, (const int *)NULL, x, m.token, C, 2 * Fe, &g);
    grouped_dinp(m.rows, m.dgate_up, NULL, experts, stride, C, 2 * Fe, &g);
    combine_shares(dx, m.rows, NULL, m.row_of, s);
    return m.dweight;
}
