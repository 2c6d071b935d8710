// NCCL for CUDA on the CPU: what train_nsa.cu asks of it, done by the exchanges of train_nsa.c, which is included before. Every call
// is finished when it returns.

#pragma once

enum ncclResult_t { ncclSuccess, ncclSystemError };
enum ncclDataType_t { ncclFloat = 4, ncclBfloat16 = 2, ncclChar = 1 };     // their bytes
enum ncclRedOp_t { ncclSum };
typedef int ncclComm_t;
typedef struct { char internal[128]; } ncclUniqueId;

static inline const char *ncclGetErrorString(ncclResult_t) { return "error"; }
static inline ncclResult_t ncclGetUniqueId(ncclUniqueId *id) { memset(id, 7, sizeof *id); return ncclSuccess; }
static inline ncclResult_t ncclCommInitRank(ncclComm_t *c, int ranks, ncclUniqueId id, int rank) {
    *c = id.internal[0] == 7 && id.internal[127] == 7 && ranks == comm.ranks && rank == comm.rank;
    return *c ? ncclSuccess : ncclSystemError;
}
static inline ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t *e) { *e = ncclSuccess; return ncclSuccess; }

// What is sent and received in a group, each pair of ranks in the order of its calls.
struct EmuMessages { std::vector<Parcel> out, in; };
static std::vector<EmuMessages> emu_messages;
static inline ncclResult_t ncclGroupStart() { emu_messages.assign((size_t)comm.ranks, EmuMessages()); return ncclSuccess; }
static inline ncclResult_t ncclSend(const void *x, size_t n, ncclDataType_t type, int peer, ncclComm_t, cudaStream_t) {
    emu_messages[(size_t)peer].out.push_back(Parcel{(const char *)x, NULL, (int64_t)(n * type), 0});
    return ncclSuccess;
}
static inline ncclResult_t ncclRecv(void *x, size_t n, ncclDataType_t type, int peer, ncclComm_t, cudaStream_t) {
    emu_messages[(size_t)peer].in.push_back(Parcel{NULL, (char *)x, 0, (int64_t)(n * type)});
    return ncclSuccess;
}
static inline ncclResult_t ncclGroupEnd() {
    size_t rounds = 0;
    for (const EmuMessages &m : emu_messages) rounds = std::max(rounds, std::max(m.out.size(), m.in.size()));
    for (size_t i = 0; i < rounds; i++) {
        std::vector<Parcel> parcels((size_t)comm.ranks);
        for (size_t r = 0; r < parcels.size(); r++) {
            const EmuMessages &m = emu_messages[r];
            if (i < m.out.size()) parcels[r].out = m.out[i].out, parcels[r].out_bytes = m.out[i].out_bytes;
            if (i < m.in.size()) parcels[r].in = m.in[i].in, parcels[r].in_bytes = m.in[i].in_bytes;
        }
        comm_exchange(parcels.data());
    }
    return ncclSuccess;
}

// (ranks,n): what each rank has
static inline std::vector<float> emu_all(const void *mine, size_t n) {
    std::vector<float> all(n * (size_t)comm.ranks);
    comm_gather(all.data(), mine, (int64_t)(n * sizeof(float)));
    return all;
}
static inline void emu_sum(void *out, const std::vector<float> &all, size_t from, size_t n) {
    const size_t row = all.size() / (size_t)comm.ranks;
    for (size_t i = 0; i < n; i++) {
        float sum = 0;
        for (size_t r = 0; r < (size_t)comm.ranks; r++) sum += all[r * row + from + i];
        ((float *)out)[i] = sum;
    }
}
static inline ncclResult_t ncclAllReduce(const void *in, void *out, size_t n, ncclDataType_t, ncclRedOp_t, ncclComm_t, cudaStream_t) {
    emu_sum(out, emu_all(in, n), 0, n);
    return ncclSuccess;
}
static inline ncclResult_t ncclReduceScatter(const void *in, void *out, size_t n, ncclDataType_t, ncclRedOp_t, ncclComm_t, cudaStream_t) {
    emu_sum(out, emu_all(in, n * (size_t)comm.ranks), (size_t)comm.rank * n, n);
    return ncclSuccess;
}
static inline ncclResult_t ncclReduce(const void *in, void *out, size_t n, ncclDataType_t, ncclRedOp_t, int root, ncclComm_t, cudaStream_t) {
    const std::vector<float> all = emu_all(in, n);
    if (comm.rank == root) emu_sum(out, all, 0, n);
    return ncclSuccess;
}
static inline ncclResult_t ncclAllGather(const void *in, void *out, size_t n, ncclDataType_t type, ncclComm_t, cudaStream_t) {
    std::vector<char> all(n * type * (size_t)comm.ranks);
    comm_gather(all.data(), in, (int64_t)(n * type));
    memcpy(out, all.data(), all.size());
    return ncclSuccess;
}
static inline ncclResult_t ncclBroadcast(const void *in, void *out, size_t n, ncclDataType_t type, int root, ncclComm_t, cudaStream_t) {
    std::vector<char> all(n * type * (size_t)comm.ranks);
    comm_gather(all.data(), in, (int64_t)(n * type));
    memcpy(out, all.data() + n * type * (size_t)root, n * type);
    return ncclSuccess;
}
