# nsa.c. `make` builds the programs, `make run` trains the small model, `make help` lists everything.
# Needs a C compiler and make. What else it finds, it uses; PORTABLE=1, OPENMP=0, MPI=0, NCCL=0, BLAS=1, WERROR=1,
# CC=clang and CFLAGS="..." change that.

ifeq ($(origin CC),default)
  CC := $(shell command -v gcc || command -v clang || echo cc)
endif
CFLAGS ?= -O3 -fno-math-errno -fno-trapping-math
WARNINGS = -Wall -Wextra $(if $(filter 1,$(WERROR)),-Werror) $(QUIET)
# clang reports every loop that it could not vectorise although a pragma asks for it
QUIET := $(if $(findstring clang,$(shell $(CC) --version 2>/dev/null)),-Wno-pass-failed)
LDLIBS = -lm

, := ,
hash := \#

# Whether a small program compiles and links with the flags $(1) and the include line $(2).
works = $(shell mkdir -p build && printf '$(2)\nint main(void) { return 0; }\n' > build/probe.c && \
          $(CC) $(1) build/probe.c -o build/probe >build/probe.txt 2>&1 && echo yes)

ifneq ($(MAKECMDGOALS),clean)
  ifneq ($(PORTABLE),1)
    NATIVE := $(if $(call works,-march=native),-march=native,$(if $(call works,-mcpu=native),-mcpu=native))
    # AVX-512 at full width where there is one; compilers hold it back by default
    NATIVE += $(if $(call works,-mprefer-vector-width=512),-mprefer-vector-width=512)
  endif
  ifneq ($(OPENMP),0)
    OMP := $(if $(call works,-fopenmp,$(hash)include <omp.h>),-fopenmp,$(if $(call works,-Xpreprocessor -fopenmp -lomp,$(hash)include <omp.h>),-Xpreprocessor -fopenmp -lomp))
  endif
  ifeq ($(BLAS),1)
    BLAS_LIBS ?= $(if $(call works,-lopenblas,$(hash)include <cblas.h>),-lopenblas,-lcblas)
    ifneq ($(call works,$(BLAS_LIBS),$(hash)include <cblas.h>),yes)
      $(error BLAS=1: cblas.h and $(BLAS_LIBS) were not found (Debian: apt install libopenblas-dev); or name the library, BLAS_LIBS="-L... -l...")
    endif
    DEFINES += -DUSE_CBLAS
    LDLIBS += $(BLAS_LIBS)
  endif
endif
SIMD_ONLY = -fopenmp-simd -Wno-unknown-pragmas
FLAGS = -std=gnu11 $(CFLAGS) $(NATIVE) $(WARNINGS) $(DEFINES) $(or $(OMP),$(SIMD_ONLY)) -I.
SANITIZE = -std=gnu11 -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all $(WARNINGS) $(SIMD_ONLY) -I.

NVCC ?= $(shell command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null)
# MPI, for runs on several ranks: how mpicc would call the compiler
ifneq ($(MPI),0)
  MPICC := $(shell command -v mpicc)
  MPI_SHOW := $(if $(MPICC),$(shell $(MPICC) -show))
  MPI_FLAGS := $(if $(MPICC),$(if $(call works,$(filter -I% -L% -l%,$(MPI_SHOW)),$(hash)include <mpi.h>),-DUSE_MPI $(filter -I% -L% -l% -Wl$(,)%,$(MPI_SHOW))))
endif
# NCCL, for runs on several GPUs: its header in the places where packages put it, or in NCCL_HOME/include
ifneq ($(NCCL),0)
  NCCL_HEADER := $(firstword $(wildcard $(NCCL_HOME)/include/nccl.h /usr/include/nccl.h /usr/local/include/nccl.h /usr/local/cuda/include/nccl.h))
  NCCL_FLAGS := $(if $(NCCL_HEADER),-DUSE_NCCL $(if $(NCCL_HOME),-I$(NCCL_HOME)/include -L$(NCCL_HOME)/lib -Xlinker -rpath=$(NCCL_HOME)/lib) -lnccl)
endif

PROGRAMS := $(basename $(wildcard train_nsa.c sample.c))
C_TESTS := $(if $(wildcard test/test_io.c),build/test_io) $(if $(wildcard test/test_nsa.c),build/test_nsa build/test_nsa_double) $(if $(wildcard test/test_sample.c),build/test_sample build/test_sample_double)
ASAN := $(if $(wildcard train_nsa.c),build/train_nsa_asan) $(if $(wildcard sample.c),build/sample_asan)
ASAN_TESTS := $(if $(wildcard test/test_io.c),build/test_io_asan) $(if $(wildcard test/test_nsa.c),build/test_nsa_asan) $(if $(wildcard test/test_sample.c),build/test_sample_asan)
SHELL_TESTS := $(wildcard test/test_*.sh)
EMBEDDED = build/modeling_nsa.h

.PHONY: all found run bench test test-asan test-gpu test-gpu-emulated asan fuzz clean help FORCE
.DELETE_ON_ERROR:

all: found $(PROGRAMS)

found:
	@echo "compiler   $(CC) $(shell $(CC) -dumpfullversion -dumpversion 2>/dev/null), $(CFLAGS) $(NATIVE)"
	@echo "OpenMP     $(if $(OMP),yes,no: one thread)"
	@echo "BLAS       $(if $(filter 1,$(BLAS)),$(BLAS_LIBS),not used$(,) BLAS=1 links one)"
	@echo "nvcc       $(if $(NVCC),$(NVCC),no: CPU programs only)"
	@echo "MPI        $(if $(MPI_FLAGS),$(MPICC),$(if $(filter 0,$(MPI)),not used (MPI=0),no$(,) several ranks need --init file: or tcp: (Debian: apt install libopenmpi-dev openmpi-bin)))"
	@echo "NCCL       $(if $(NCCL_FLAGS),$(NCCL_HEADER),$(if $(filter 0,$(NCCL)),not used (NCCL=0),no$(,) train_nsacu runs on one GPU (libnccl-dev$(,) or NCCL_HOME=/path$(,) names it)))"

# Every program depends on the files that its last compilation read (build/*.d), and on the flags.
DEPEND = -MMD -MP -MF build/$(notdir $@).d -MT $@

# the programs that may run on several ranks
train_nsa build/train_nsa_asan: LDLIBS += $(MPI_FLAGS)

train_nsa sample: %: %.c $(EMBEDDED) build/flags
	$(CC) $(FLAGS) $(DEPEND) $< -o $@ $(LDLIBS)

build/%_asan: %.c $(EMBEDDED) build/flags
	$(CC) $(SANITIZE) $(DEPEND) $< -o $@ $(LDLIBS)

build/%_asan: test/%.c $(EMBEDDED) build/flags
	$(CC) $(SANITIZE) $(DEPEND) $< -o $@ $(LDLIBS)

build/%_double: test/%.c $(EMBEDDED) build/flags
	$(CC) $(FLAGS) -Dreal=double $(DEPEND) $< -o $@ $(LDLIBS)

build/test_%: test/test_%.c $(EMBEDDED) build/flags
	$(CC) $(FLAGS) $(DEPEND) $< -o $@ $(LDLIBS)

-include $(wildcard build/*.d)

build/flags: FORCE
	@mkdir -p build
	@echo '$(CC) $(FLAGS) $(LDLIBS) $(MPI_FLAGS)' | cmp -s - $@ || echo '$(CC) $(FLAGS) $(LDLIBS) $(MPI_FLAGS)' > $@

# scripts/modeling_nsa.py goes into every checkpoint: the programs carry it as a string.
build/modeling_nsa.h: scripts/modeling_nsa.py
	@mkdir -p build
	(echo 'const char modeling_nsa_py[] ='; sed 's/\\/\\\\/g; s/"/\\"/g; s/^/"/; s/$$/\\n"/' $<; echo ';') > $@

# the generator of the built-in corpus, as a program of its own
tales: data/tales
data/tales: data/tales.c build/flags
	$(CC) $(FLAGS) $< -o $@ $(LDLIBS)
.PHONY: tales

run: $(PROGRAMS)
	./train_nsa

# what dev/benchmarks.md reports
bench: build/bench
	for i in 1 2 3; do ./build/bench peak; done; ./build/bench matmul
	./build/bench step full 256 8 6 11
	for T in 2048 8192; do for kind in full long; do ./build/bench step $$kind $$T 1 2 3; ./build/bench attention $$kind $$T 1 2 5; done; done
	for kind in full long; do ./build/bench step $$kind 32768 1 2 1; ./build/bench attention $$kind 32768 1 2 1; done
build/bench: dev/bench.c $(EMBEDDED) build/flags
	$(CC) $(FLAGS) $(DEPEND) $< -o $@ $(LDLIBS)

test: $(PROGRAMS) $(C_TESTS)
	@sh test/run_tests.sh $(C_TESTS) $(SHELL_TESTS)

# the same under the address and undefined-behaviour sanitizers
asan: $(ASAN)
test-asan: $(ASAN) $(ASAN_TESTS)
	@TRAIN=build/train_nsa_asan SAMPLE=build/sample_asan sh test/run_tests.sh $(ASAN_TESTS) $(SHELL_TESTS)

# everything that reads a file somebody else wrote, fuzzed: by libFuzzer where clang is there, else blindly
FUZZ_SECONDS ?= 60
CLANG := $(shell command -v clang)
fuzz: build/fuzz_standalone $(if $(CLANG),build/fuzz_readers)
	build/fuzz_standalone --seeds build/seeds
	$(if $(CLANG),build/fuzz_readers -max_total_time=$(FUZZ_SECONDS) -artifact_prefix=build/ build/seeds,build/fuzz_standalone --random 100000)

build/fuzz_readers: test/fuzz_readers.c $(EMBEDDED) build/flags
	$(CLANG) -std=gnu11 -O1 -g -fsanitize=fuzzer,address,undefined $(SIMD_ONLY) -Wno-pass-failed -I. $(DEPEND) $< -o $@ -lm

build/fuzz_standalone: test/fuzz_readers.c $(EMBEDDED) build/flags
	$(CC) $(SANITIZE) -DFUZZ_STANDALONE $(DEPEND) $< -o $@ -lm

KERNELS := $(patsubst dev/cuda/%.cu,build/%,$(wildcard dev/cuda/*.cu))
# the GPU programs: for the GPU that is here, else for every one that this nvcc knows of those below, and later ones through PTX.
# Hopper's own instructions are in code for 90a alone.
ifneq ($(and $(NVCC),$(filter train_nsacu samplecu build/test_nsa_cu build/test_sample_cu $(KERNELS) test-gpu,$(MAKECMDGOALS))),)
  GPU_HERE := $(subst .,,$(shell nvidia-smi --query-gpu=compute_cap --format=csv$(,)noheader 2>/dev/null | head -n 1))
  GPU_KNOWN := $(filter 80 89 90 100,$(patsubst sm_%,%,$(shell $(NVCC) --list-gpu-code 2>/dev/null)))
  code_for = $(foreach a,$(subst 90,90a,$(1)),-gencode=arch=compute_$(a)$(,)code=sm_$(a))
  GPU_ARCH ?= $(if $(GPU_HERE),$(call code_for,$(GPU_HERE)),$(call code_for,$(GPU_KNOWN)) $(foreach a,$(lastword $(GPU_KNOWN)),-gencode=arch=compute_$(a)$(,)code=compute_$(a)))
  NVCC_OMP := $(if $(findstring -fopenmp,$(OMP)),-Xcompiler -fopenmp)
endif
NVCC_FLAGS ?= -O3
NVCC_ALL = -std=c++17 --threads 0 $(NVCC_FLAGS) $(GPU_ARCH) -Werror all-warnings $(NVCC_OMP) -I.

TEST_HEADERS := $(wildcard test/*.h dev/cuda/*.h)
CU_SOURCES = train_nsa.cu train_nsa.c data/tales.c $(EMBEDDED) build/flags
NEEDS_NVCC = $(if $(NVCC),,@echo "$@: nvcc was not found: install the CUDA toolkit, or name it, NVCC=/path/to/nvcc"; exit 1)

# nvcc takes what the linker is told as -Xlinker
train_nsacu: $(CU_SOURCES)
	$(NEEDS_NVCC)
	$(NVCC) $(NVCC_ALL) $< -o $@ -lcublasLt $(patsubst -Wl$(,)%,-Xlinker %,$(MPI_FLAGS)) $(NCCL_FLAGS)

samplecu: sample.c $(CU_SOURCES)
	$(NEEDS_NVCC)
	$(NVCC) $(NVCC_ALL) -DNSA_CU -x cu $< -o $@ -lcublasLt

build/test_nsa_cu: test/test_nsa.cu $(TEST_HEADERS) $(CU_SOURCES)
	$(NVCC) $(NVCC_ALL) $< -o $@ -lcublasLt

build/test_sample_cu: test/test_sample.cu test/test_sample.c sample.c $(TEST_HEADERS) $(CU_SOURCES)
	$(NVCC) $(NVCC_ALL) $< -o $@ -lcublasLt

# kernels alone, one family a program: every version against the CPU, and with `bench` their times
$(KERNELS): build/%: dev/cuda/%.cu $(TEST_HEADERS) $(CU_SOURCES)
	$(NVCC) $(NVCC_ALL) $< -o $@ -lcublasLt

build/decode: sample.c

# when each kernel of a program runs (dev/trace.c), by CUPTI of the CUDA Toolkit, wherever that keeps it
CUDA_FOLDER = $(patsubst %/bin/,%,$(dir $(NVCC)))
CUPTI_FOLDERS = $(CUDA_FOLDER) $(CUDA_FOLDER)/extras/CUPTI
build/trace.so: dev/trace.c build/flags
	$(NEEDS_NVCC)
	$(CC) -std=gnu11 -O2 $(WARNINGS) -shared -fPIC $(CUPTI_FOLDERS:%=-isystem %/include) $< -o $@ \
	    $(foreach folder,$(CUPTI_FOLDERS),-L$(folder)/lib64 -L$(folder)/lib -Xlinker -rpath -Xlinker $(folder)/lib64) -lcupti -lstdc++

# the GPU against the CPU
test-gpu: train_nsa train_nsacu samplecu build/test_nsa_cu build/test_sample_cu $(KERNELS)
	@sh test/run_tests.sh build/test_nsa_cu build/test_sample_cu $(KERNELS) test/gpu.sh
	@START_DELAY=1 TRAIN=./train_nsacu sh test/run_tests.sh test/test_resume.sh
	@START_DELAY=1 SAMPLE=./samplecu sh test/run_tests.sh test/test_sample.sh

# The same without a GPU: test/cuda_on_cpu runs the kernels on the CPU. It finds wrong results, races of order, accesses out of
# bounds (EMULATE="-O1 -fsanitize=address,undefined"), not slowness.
CXX_EMULATED ?= $(CXX)
EMULATE ?= -O2
EMULATED = $(CXX_EMULATED) -std=c++17 $(EMULATE) -g -fno-math-errno -w -Wno-psabi $(or $(OMP),-Wno-unknown-pragmas) -Ibuild/emulated -Itest/cuda_on_cpu -I. -x c++
TRANSLATED = build/emulated/train_nsa.cu $(wildcard test/cuda_on_cpu/*) train_nsa.c data/tales.c $(EMBEDDED) build/flags
build/emulated/%: % test/cuda_on_cpu/translate.sed
	@mkdir -p $(dir $@)
	sed -E -f test/cuda_on_cpu/translate.sed $< > $@
build/train_nsacu_emulated: $(TRANSLATED)
	$(EMULATED) -DUSE_NCCL build/emulated/train_nsa.cu -o $@ $(MPI_FLAGS)
build/test_nsa_cu_emulated: build/emulated/test/test_nsa.cu $(TEST_HEADERS) $(TRANSLATED)
	$(EMULATED) $< -o $@
$(KERNELS:%=%_emulated): build/%_emulated: build/emulated/dev/cuda/%.cu build/emulated/dev/cuda/bench.h $(TEST_HEADERS) $(TRANSLATED)
	$(EMULATED) $< -o $@
build/decode_emulated: build/emulated/sample.c
build/samplecu_emulated: build/emulated/sample.c $(TRANSLATED)
	$(EMULATED) -DNSA_CU $< -o $@
build/test_sample_cu_emulated: build/emulated/test/test_sample.cu build/emulated/test/test_sample.c build/emulated/sample.c $(TEST_HEADERS) $(TRANSLATED)
	$(EMULATED) $< -o $@
test-gpu-emulated: train_nsa build/train_nsacu_emulated build/samplecu_emulated build/test_nsa_cu_emulated build/test_sample_cu_emulated $(KERNELS:%=%_emulated)
	@GPU=build/train_nsacu_emulated sh test/run_tests.sh build/test_nsa_cu_emulated build/test_sample_cu_emulated $(KERNELS:%=%_emulated) test/gpu.sh
	@TRAIN=build/train_nsacu_emulated sh test/run_tests.sh test/test_resume.sh
	@SAMPLE=build/samplecu_emulated sh test/run_tests.sh test/test_sample.sh

clean:
	rm -rf build train_nsa sample train_nsacu samplecu data/tales

help:
	@echo "make             the programs: $(PROGRAMS)"
	@echo "make run         builds, then trains the small model on the built-in corpus and prints samples"
	@echo "make test        every test that needs a compiler and nothing else"
	@echo "make test-asan   the same under AddressSanitizer and UBSan"
	@echo "make fuzz        fuzzes the readers of files for a minute (FUZZ_SECONDS=60)"
	@echo "make bench       times the CPU program: peak, matrix products, training steps, attention"
	@echo "make tales       data/tales, the generator of the built-in corpus and of long-range tasks"
	@echo "make train_nsacu the GPU program (nvcc, cuBLAS); GPU_ARCH=-arch=sm_89 chooses the GPU"
	@echo "make samplecu    the sampler on the GPU"
	@echo "make test-gpu    the GPU against the CPU"
	@echo "make test-gpu-emulated  the same without a GPU, the kernels run by the CPU"
	@echo "make clean       removes what was built; runs in out/ stay"
	@echo
	@echo "with  BLAS=1 (link CBLAS)  PORTABLE=1 (any CPU of this kind)  OPENMP=0 (one thread)"
	@echo "      WERROR=1 (warnings are errors)  CC=clang  CFLAGS=\"-O2 -g\""
	@echo
	@$(MAKE) -s found
