/*
When each kernel, copy and fill of a GPU program begins and ends, at the clocks and with the overlaps that it runs with; ncu runs kernels one
by one and shows no gaps. A library that the CUDA driver loads into a program as it is:

    make build/trace.so
    TRACE=trace.csv CUDA_INJECTION64_PATH=$PWD/build/trace.so ./train_nsacu ... -x 4
    python3 dev/profile_step.py trace.csv

By CUPTI of the CUDA Toolkit (Activity API). A line of trace.csv: begin and end in nanoseconds, the name in quotes.

SPDX-License-Identifier: MIT
*/

#include <cupti.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { BUFFER = 8 << 20, ALIGN = 8 };

static FILE *file;

char *__cxa_demangle(const char *mangled, char *buffer, size_t *length, int *status);      // of the C++ library

static void stop(const char *what, CUptiResult result) {
    const char *why = "?";
    cuptiGetResultString(result, &why);
    fprintf(stderr, "trace: %s: %s\n", what, why);
    _exit(1);       // this may be within exit already
}
#define CUPTI(call) do { const CUptiResult result = (call); if (result != CUPTI_SUCCESS) stop(#call, result); } while (0)

static void write_activity(uint64_t begin, uint64_t end, const char *mangled) {
    char *name = mangled[0] == '_' ? __cxa_demangle(mangled, NULL, NULL, NULL) : NULL;
    fprintf(file, "%llu,%llu,\"%s\"\n", (unsigned long long)begin, (unsigned long long)end, name ? name : mangled);
    free(name);
}

static void CUPTIAPI buffer_requested(uint8_t **buffer, size_t *size, size_t *most_records) {
    *size = BUFFER;
    *most_records = 0;      // as many as fit
    *buffer = aligned_alloc(ALIGN, BUFFER);
    if (!*buffer) {
        fprintf(stderr, "trace: no memory for records\n");
        exit(1);
    }
}

static void CUPTIAPI buffer_completed(CUcontext context, uint32_t stream, uint8_t *buffer, size_t size, size_t valid) {
    CUpti_Activity *record = NULL;
    size_t dropped = 0;
    (void)size;
    while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) switch (record->kind) {
        case CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL: {
            const CUpti_ActivityKernel9 *kernel = (const CUpti_ActivityKernel9 *)record;
            write_activity(kernel->start, kernel->end, kernel->name);
            break;
        }
        case CUPTI_ACTIVITY_KIND_MEMCPY: {
            const CUpti_ActivityMemcpy5 *copy = (const CUpti_ActivityMemcpy5 *)record;
            write_activity(copy->start, copy->end, "copy");
            break;
        }
        case CUPTI_ACTIVITY_KIND_MEMSET: {
            const CUpti_ActivityMemset4 *fill = (const CUpti_ActivityMemset4 *)record;
            write_activity(fill->start, fill->end, "fill");
            break;
        }
        default: break;
    }
    CUPTI(cuptiActivityGetNumDroppedRecords(context, stream, &dropped));
    if (dropped) fprintf(stderr, "trace: %zu records were dropped\n", dropped);
    free(buffer);
}

static void flush(void) {
    CUPTI(cuptiActivityFlushAll(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED));
    if (fclose(file)) perror("trace: TRACE");
}

int InitializeInjection(void);      // the name that the driver looks for
int InitializeInjection(void) {
    const char *path = getenv("TRACE");
    file = fopen(path ? path : "trace.csv", "w");
    if (!file) {
        perror(path ? path : "trace.csv");
        exit(1);
    }
    CUPTI(cuptiActivityRegisterCallbacks(buffer_requested, buffer_completed));
    CUPTI(cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL));
    CUPTI(cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMCPY));
    CUPTI(cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMSET));
    atexit(flush);
    return 1;
}
