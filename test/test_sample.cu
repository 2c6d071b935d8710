// The tests of test_sample.c with the GPU's decoder: cached decoding on the GPU gives the logits of the CPU's training forward,
// and the same greedy tokens. Run from the root of the repository:
//     make test-gpu, or without a GPU make test-gpu-emulated

#define NSA_CU
#if !defined(__CUDACC__) && !defined(EVERY)
#define EVERY 13        // where the CPU runs the kernels
#endif
#include "test_sample.c"
