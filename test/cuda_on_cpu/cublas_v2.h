// The little of cuBLAS that nsa.c calls, for CUDA on the CPU (see cuda_runtime.h).
#pragma once
#include "cuda_bf16.h"

typedef int cublasStatus_t;
enum { CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_NOT_SUPPORTED = 15 };
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum cudaDataType_t { CUDA_R_32F, CUDA_R_16BF };
typedef cudaDataType_t cudaDataType;
enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68 };
typedef struct emu_cublas *cublasHandle_t;
static inline const char *cublasGetStatusString(cublasStatus_t) { return "error"; }
static inline cublasStatus_t cublasCreate(cublasHandle_t *h) { *h = nullptr; return 0; }
static inline cublasStatus_t cublasSetStream(cublasHandle_t, cudaStream_t) { return 0; }
static inline cublasStatus_t cublasSetWorkspace(cublasHandle_t, void *, size_t) { return 0; }
static inline cublasStatus_t cublasDestroy(cublasHandle_t) { return 0; }

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

static inline cublasStatus_t cublasSgemmStridedBatched(cublasHandle_t, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, const float *alpha, const float *a, int lda,
                                                       long long sa, const float *b, int ldb, long long sb, const float *beta, float *c, int ldc, long long sc, int batch) {
    emu_gemm(m, n, k, *alpha, {a, CUDA_R_32F, lda, sa, ta == CUBLAS_OP_T}, {b, CUDA_R_32F, ldb, sb, tb == CUBLAS_OP_T}, *beta, {c, CUDA_R_32F, ldc, sc, false}, batch);
    return 0;
}
