// The little of cuBLASLt that nsa.c calls, for CUDA on the CPU (see cuda_runtime.h).
#pragma once
#include "cuda_bf16.h"

typedef int cublasStatus_t;
enum { CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_NOT_SUPPORTED = 15 };
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum cudaDataType_t { CUDA_R_32F, CUDA_R_16BF };
typedef cudaDataType_t cudaDataType;
enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68 };

struct emu_matrix {     // columns first
    const void *data;
    cudaDataType type;
    int64_t ld, stride;
    bool turned;
    float at(int64_t batch, int64_t row, int64_t col) const {
        const int64_t i = batch * stride + (turned ? row * ld + col : col * ld + row);
        return type == CUDA_R_32F ? ((const float *)data)[i] : (float)((const __nv_bfloat16 *)data)[i];
    }
};

static inline void emu_gemm(int64_t m, int64_t n, int64_t k, float alpha, emu_matrix a, emu_matrix b, float beta, emu_matrix c, int64_t batch) {
    emu_do([=] {
        #pragma omp parallel for collapse(2)
        for (int64_t s = 0; s < batch; s++)
            for (int64_t j = 0; j < n; j++) {
                std::vector<float> column((size_t)m, 0.0f);
                for (int64_t p = 0; p < k; p++) {
                    const float x = b.at(s, p, j);
                    for (int64_t i = 0; i < m; i++) column[(size_t)i] += a.at(s, i, p) * x;
                }
                for (int64_t i = 0; i < m; i++) {
                    const float y = alpha * column[(size_t)i] + (beta != 0 ? beta * c.at(s, i, j) : 0);
                    const int64_t at = s * c.stride + j * c.ld + i;
                    if (c.type == CUDA_R_32F) ((float *)c.data)[at] = y;
                    else ((__nv_bfloat16 *)c.data)[at] = __nv_bfloat16(y);
                }
            }
    });
}

typedef struct emu_lt *cublasLtHandle_t;
enum cublasLtMatmulDescAttributes_t { CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB };
enum cublasLtMatrixLayoutAttribute_t { CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET };
enum cublasLtMatmulPreferenceAttributes_t { CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES };
struct emu_lt_desc { cublasOperation_t a, b; };
struct emu_lt_layout { cudaDataType type; int64_t rows, cols, ld, batch, stride; };
typedef emu_lt_desc *cublasLtMatmulDesc_t;
typedef emu_lt_layout *cublasLtMatrixLayout_t;
typedef int *cublasLtMatmulPreference_t;
struct cublasLtMatmulAlgo_t { int data[16]; };
struct cublasLtMatmulHeuristicResult_t { cublasLtMatmulAlgo_t algo; size_t workspaceSize; cublasStatus_t state; float wavesCount; };

static inline cublasStatus_t cublasLtCreate(cublasLtHandle_t *h) { *h = nullptr; return 0; }
static inline cublasStatus_t cublasLtDestroy(cublasLtHandle_t) { return 0; }
static inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *d, cublasComputeType_t, cudaDataType) { *d = new emu_lt_desc{CUBLAS_OP_N, CUBLAS_OP_N}; return 0; }
static inline cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) { delete d; return 0; }
static inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t what, const void *value, size_t) {
    (what == CUBLASLT_MATMUL_DESC_TRANSA ? d->a : d->b) = *(const cublasOperation_t *)value;
    return 0;
}
static inline cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *l, cudaDataType type, uint64_t rows, uint64_t cols, int64_t ld) {
    *l = new emu_lt_layout{type, (int64_t)rows, (int64_t)cols, ld, 1, 0};
    return 0;
}
static inline cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) { delete l; return 0; }
static inline cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t l, cublasLtMatrixLayoutAttribute_t what, const void *value, size_t) {
    if (what == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT) l->batch = *(const int32_t *)value;
    else l->stride = *(const int64_t *)value;
    return 0;
}
static inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *p) { *p = new int(0); return 0; }
static inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) { delete p; return 0; }
static inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t, const void *, size_t) { return 0; }
static inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                                            cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int, cublasLtMatmulHeuristicResult_t *r, int *found) {
    memset(r, 0, sizeof *r);
    *found = 1;
    return 0;
}
static inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t d, const void *alpha, const void *a, cublasLtMatrixLayout_t la, const void *b, cublasLtMatrixLayout_t lb,
                                            const void *beta, const void *, cublasLtMatrixLayout_t, void *c, cublasLtMatrixLayout_t lc, const cublasLtMatmulAlgo_t *, void *, size_t,
                                            cudaStream_t) {
    const int64_t k = d->a == CUBLAS_OP_T ? la->rows : la->cols;
    if ((d->b == CUBLAS_OP_T ? lb->cols : lb->rows) != k || (d->a == CUBLAS_OP_T ? la->cols : la->rows) != lc->rows || (d->b == CUBLAS_OP_T ? lb->rows : lb->cols) != lc->cols) return 7;
    emu_gemm(lc->rows, lc->cols, k, *(const float *)alpha, {a, la->type, la->ld, la->stride, d->a == CUBLAS_OP_T}, {b, lb->type, lb->ld, lb->stride, d->b == CUBLAS_OP_T},
             *(const float *)beta, {c, lc->type, lc->ld, lc->stride, false}, lc->batch);
    return 0;
}
