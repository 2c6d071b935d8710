// The driver's tensor maps for CUDA on the CPU (see cuda_runtime.h): bf16 in four dimensions, rows of 128 bytes, swizzled.
#pragma once
#include "cuda_runtime.h"

typedef int CUresult;
typedef uint32_t cuuint32_t;
typedef uint64_t cuuint64_t;
enum { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

static inline CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType, cuuint32_t rank, void *base, const cuuint64_t *size, const cuuint64_t *strides,
                                              const cuuint32_t *box, const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                              CUtensorMapFloatOOBfill) {
    if (rank != 4 || (uintptr_t)base % 16 || box[0] != 64) return CUDA_ERROR_INVALID_VALUE;
    map->base = (const char *)base;
    for (int i = 0; i < 4; i++) {
        map->size[i] = size[i];
        map->stride[i] = i ? strides[i - 1] : 2;
        map->box[i] = box[i];
        if (size[i] < 1 || size[i] > UINT32_MAX || box[i] < 1 || box[i] > 256 || (i && map->stride[i] % 16)) return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}
enum { cudaEnableDefault };
static inline cudaError_t cudaGetDriverEntryPointByVersion(const char *, void **entry, unsigned, unsigned long long, void *) {
    *entry = (void *)cuTensorMapEncodeTiled;
    return 0;
}
