// rbe_cuda_gemm: cuBLASLt through dlopen, with prototypes of our own for the eleven functions used. Their types and numbers are part of its
// ABI from version 11 on.
//
// cuBLASLt is column-major: a row-major product c = a b is its c^T = b^T a^T, so operands change places and nothing is transposed.
// What its heuristic chose is kept for each shape, so a later call costs no search.
#define _GNU_SOURCE
#include "cuda_blaslt.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct lt_algo {
    uint64_t data[8];
} lt_algo;
typedef struct lt_heuristic {
    lt_algo algo;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
} lt_heuristic;

enum { CUDA_R_32F = 0, CUDA_R_64F = 1, CUDA_R_16F = 2, CUDA_R_8I = 3, CUDA_R_32I = 10, CUDA_R_16BF = 14, CUDA_R_8F_E4M3 = 28 };
enum { COMPUTE_32F = 68, COMPUTE_64F = 70, COMPUTE_32I = 72, COMPUTE_32F_FAST_TF32 = 77 };
enum { DESC_TRANSA = 3, DESC_TRANSB = 4, LAYOUT_BATCH_COUNT = 5, LAYOUT_BATCH_STRIDE = 6 };
enum { PREF_WORKSPACE = 1, PREF_ALIGN_A = 5, PREF_ALIGN_B = 6, PREF_ALIGN_C = 7, PREF_ALIGN_D = 8 };
enum { WORKSPACE = 32 << 20, CACHE = 128, DEVICES = 64 };

#define FUNCTIONS(X)                                                                                                             \
    X(cublasLtCreate, (void **handle))                                                                                           \
    X(cublasLtMatmulDescCreate, (void **desc, int compute, int scale))                                                           \
    X(cublasLtMatmulDescDestroy, (void *desc))                                                                                   \
    X(cublasLtMatmulDescSetAttribute, (void *desc, int attribute, const void *value, size_t size))                               \
    X(cublasLtMatrixLayoutCreate, (void **layout, int type, uint64_t rows, uint64_t cols, int64_t ld))                           \
    X(cublasLtMatrixLayoutDestroy, (void *layout))                                                                               \
    X(cublasLtMatrixLayoutSetAttribute, (void *layout, int attribute, const void *value, size_t size))                           \
    X(cublasLtMatmulPreferenceCreate, (void **preference))                                                                       \
    X(cublasLtMatmulPreferenceDestroy, (void *preference))                                                                       \
    X(cublasLtMatmulPreferenceSetAttribute, (void *preference, int attribute, const void *value, size_t size))                   \
    X(cublasLtMatmulAlgoGetHeuristic, (void *handle, void *desc, void *a, void *b, void *c, void *d, void *preference, int wanted, \
                                       lt_heuristic *results, int *found))                                                       \
    X(cublasLtMatmul, (void *handle, void *desc, const void *alpha, const void *a, void *a_layout, const void *b, void *b_layout, \
                       const void *beta, const void *c, void *c_layout, void *d, void *d_layout, const lt_algo *algo,            \
                       void *workspace, size_t workspace_size, void *stream))

static struct {
#define X(name, arguments) int(*name) arguments;
    FUNCTIONS(X)
#undef X
} lt;

typedef struct key {
    int64_t m, n, k, batch, strides[6];
    int32_t device, in, out, flags, align[3];
} key;
static struct {
    key of;
    lt_algo algo;
    size_t workspace;
} cache[CACHE];
static int cached, next_place;
static void *handles[DEVICES];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static rbe_status find(void *library, rbe_error *err) {
    const char *missing = NULL;
#define X(name, arguments)                         \
    {                                              \
        void *symbol = dlsym(library, #name);      \
        memcpy(&lt.name, &symbol, sizeof symbol);  \
        if (!symbol) missing = #name;              \
    }
    FUNCTIONS(X)
#undef X
    return missing ? rbe_fail(err, RBE_DEVICE_FAILED, "cuBLASLt: has no function %s; version 11 or later is needed", missing) : RBE_OK;
}

// The one that torch has loaded, or the newest that the loader finds. RBE_CUBLASLT names another file.
static rbe_status load(rbe_error *err) {
    static bool loaded;
    if (loaded) return RBE_OK;
    static const char *const names[] = {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so.11"};
    enum { NAMES = sizeof names / sizeof *names };
    const char *named = getenv("RBE_CUBLASLT");
    void *library = named && *named ? dlopen(named, RTLD_NOW) : NULL;
    if (named && *named && !library)
        return rbe_fail(err, RBE_DEVICE_FAILED, "cuBLASLt: RBE_CUBLASLT is '%s', which cannot be loaded: %s", named, dlerror());
    for (int i = 0; !library && i < NAMES; i++) library = dlopen(names[i], RTLD_NOW | RTLD_NOLOAD);
    for (int i = 0; !library && i < NAMES; i++) library = dlopen(names[i], RTLD_NOW);
    if (!library)
        return rbe_fail(err, RBE_DEVICE_FAILED,
                        "cuBLASLt: none of %s, %s and %s can be loaded; this product needs it. It comes with a CUDA build of torch; "
                        "RBE_CUBLASLT may name the file",
                        names[0], names[1], names[2]);
    const rbe_status status = find(library, err);
    loaded = status == RBE_OK;
    return status;
}

static rbe_status handle_of(int device, void **handle, rbe_error *err) {
    if (device < 0 || device >= DEVICES) return rbe_fail(err, RBE_DEVICE_FAILED, "device: was cuda:%d; must be below %d", device, DEVICES);
    const int failed = handles[device] ? 0 : lt.cublasLtCreate(&handles[device]);
    if (failed) handles[device] = NULL;
    *handle = handles[device];
    return failed ? rbe_fail(err, RBE_DEVICE_FAILED, "cuBLASLt: cannot be started on cuda:%d, status %d", device, failed) : RBE_OK;
}

// By rbe_dtype, then those of cuda_blaslt.h.
static const struct {
    int type, bytes;
} types[] = {
    [RBE_F32] = {CUDA_R_32F, 4},      [RBE_F64] = {CUDA_R_64F, 8},           [RBE_BF16] = {CUDA_R_16BF, 2},         [RBE_F16] = {CUDA_R_16F, 2},
    [RBE_GEMM_INT8] = {CUDA_R_8I, 1}, [RBE_GEMM_E4M3] = {CUDA_R_8F_E4M3, 1}, [RBE_GEMM_INT32] = {CUDA_R_32I, 4},
};

// The largest power of two, at most 256, that divides the address of every matrix of a batch.
static int32_t alignment(const void *data, int64_t batch_stride, int32_t type) {
    const uint64_t all = (uint64_t)(uintptr_t)data | (uint64_t)batch_stride * (uint64_t)types[type].bytes | 256u;
    return (int32_t)(all & (~all + 1));
}

typedef struct call {
    void *desc, *first, *second, *result, *preference;  // cuBLASLt's a and b are our b and a
} call;

static int describe(void **layout, int32_t type, int64_t rows, int64_t cols, int64_t stride, int64_t batch, int64_t batch_stride) {
    const int32_t count = (int32_t)batch;
    int failed = lt.cublasLtMatrixLayoutCreate(layout, types[type].type, (uint64_t)cols, (uint64_t)rows, stride);
    if (!failed && batch > 1) failed = lt.cublasLtMatrixLayoutSetAttribute(*layout, LAYOUT_BATCH_COUNT, &count, sizeof count);
    if (!failed && batch > 1)
        failed = lt.cublasLtMatrixLayoutSetAttribute(*layout, LAYOUT_BATCH_STRIDE, &batch_stride, sizeof batch_stride);
    return failed;
}

static int prepare(const rbe_gemm *g, call *c) {
    const bool wide = g->out == RBE_F64, integers = g->out == RBE_GEMM_INT32;
    const int compute = wide ? COMPUTE_64F : integers ? COMPUTE_32I : g->tf32 && g->in == RBE_F32 ? COMPUTE_32F_FAST_TF32 : COMPUTE_32F;
    const int32_t first = g->b.transposed, second = g->a.transposed;
    int failed = lt.cublasLtMatmulDescCreate(&c->desc, compute, wide ? CUDA_R_64F : integers ? CUDA_R_32I : CUDA_R_32F);
    if (!failed) failed = lt.cublasLtMatmulDescSetAttribute(c->desc, DESC_TRANSA, &first, sizeof first);
    if (!failed) failed = lt.cublasLtMatmulDescSetAttribute(c->desc, DESC_TRANSB, &second, sizeof second);
    if (!failed) failed = describe(&c->first, g->in, first ? g->n : g->k, first ? g->k : g->n, g->b.stride, g->batch, g->b.batch_stride);
    if (!failed) failed = describe(&c->second, g->in, second ? g->k : g->m, second ? g->m : g->k, g->a.stride, g->batch, g->a.batch_stride);
    return failed ? failed : describe(&c->result, g->out, g->m, g->n, g->c_stride, g->batch, g->c_batch_stride);
}

static rbe_status choose(const rbe_gemm *g, void *handle, call *c, const key *k, lt_algo *algo, size_t *workspace, rbe_error *err) {
    for (int i = 0; i < cached; i++) {
        if (memcmp(&cache[i].of, k, sizeof *k) == 0) {
            *algo = cache[i].algo;
            *workspace = cache[i].workspace;
            return RBE_OK;
        }
    }
    const uint64_t most = WORKSPACE;
    const int attributes[] = {PREF_ALIGN_A, PREF_ALIGN_B, PREF_ALIGN_C, PREF_ALIGN_D};
    const uint32_t aligned[] = {(uint32_t)k->align[1], (uint32_t)k->align[0], (uint32_t)k->align[2], (uint32_t)k->align[2]};
    lt_heuristic best;
    int found = 0, failed = lt.cublasLtMatmulPreferenceCreate(&c->preference);
    if (!failed) failed = lt.cublasLtMatmulPreferenceSetAttribute(c->preference, PREF_WORKSPACE, &most, sizeof most);
    for (int i = 0; !failed && i < 4; i++)
        failed = lt.cublasLtMatmulPreferenceSetAttribute(c->preference, attributes[i], &aligned[i], sizeof aligned[i]);
    if (!failed)
        failed =
            lt.cublasLtMatmulAlgoGetHeuristic(handle, c->desc, c->first, c->second, c->result, c->result, c->preference, 1, &best, &found);
    if (failed || found < 1)
        return rbe_fail(err, RBE_DEVICE_FAILED, "cuBLASLt: has no way to multiply %lld x %lld by %lld x %lld (types %d and %d), status %d",
                        (long long)g->m, (long long)g->k, (long long)g->k, (long long)g->n, types[g->in].type, types[g->out].type, failed);
    *algo = best.algo;
    *workspace = best.workspace;
    cache[next_place].of = *k;
    cache[next_place].algo = best.algo;
    cache[next_place].workspace = best.workspace;
    next_place = (next_place + 1) % CACHE;
    if (cached < CACHE) cached++;
    return RBE_OK;
}

static rbe_status multiply(const rbe_gemm *g, call *c, const rbe_device *device, rbe_error *err) {
    key k;
    memset(&k, 0, sizeof k);  // padding too: keys are compared as bytes
    k.m = g->m, k.n = g->n, k.k = g->k, k.batch = g->batch;
    const int64_t strides[6] = {g->a.stride, g->b.stride, g->c_stride, g->a.batch_stride, g->b.batch_stride, g->c_batch_stride};
    memcpy(k.strides, strides, sizeof strides);
    k.device = device->index, k.in = g->in, k.out = g->out;
    k.flags = g->a.transposed | g->b.transposed << 1 | g->tf32 << 2;
    k.align[0] = alignment(g->a.data, g->a.batch_stride, g->in);
    k.align[1] = alignment(g->b.data, g->b.batch_stride, g->in);
    k.align[2] = alignment(g->c, g->c_batch_stride, g->out);

    void *handle = NULL;
    lt_algo algo;
    size_t bytes = 0;
    pthread_mutex_lock(&lock);
    rbe_status status = handle_of(device->index, &handle, err);
    if (status == RBE_OK && prepare(g, c)) status = rbe_fail(err, RBE_DEVICE_FAILED, "cuBLASLt: refuses to describe a matrix");
    if (status == RBE_OK) status = choose(g, handle, c, &k, &algo, &bytes, err);
    pthread_mutex_unlock(&lock);
    if (status != RBE_OK) return status;

    rbe_products *products = device->products;
    if (bytes > products->bytes) {
        void *workspace = device->allocate(device->owner, bytes);
        if (!workspace) return rbe_fail(err, RBE_OUT_OF_MEMORY, "workspace: the device has no %zu bytes for cuBLASLt", bytes);
        *products = (rbe_products){workspace, bytes};
    }
    const double alpha64 = 1.0, beta64 = g->accumulate ? 1.0 : 0.0;
    const float alpha32 = 1.0f, beta32 = g->accumulate ? 1.0f : 0.0f;
    const int32_t alpha_whole = 1, beta_whole = g->accumulate;
    const bool wide = g->out == RBE_F64, integers = g->out == RBE_GEMM_INT32;
    const void *alpha = wide ? (const void *)&alpha64 : integers ? (const void *)&alpha_whole : &alpha32;
    const void *beta = wide ? (const void *)&beta64 : integers ? (const void *)&beta_whole : &beta32;
    const int failed = lt.cublasLtMatmul(handle, c->desc, alpha, g->b.data, c->first, g->a.data, c->second, beta, g->c, c->result, g->c,
                                         c->result, &algo, products->workspace, products->bytes, device->stream);
    return failed ? rbe_fail(err, RBE_DEVICE_FAILED, "cuBLASLt: a product failed with status %d", failed) : RBE_OK;
}

rbe_status rbe_cuda_gemm(const rbe_gemm *g, const rbe_device *device, rbe_error *err) {
    if (g->m == 0 || g->n == 0 || g->batch == 0) return RBE_OK;
    pthread_mutex_lock(&lock);
    rbe_status status = load(err);
    pthread_mutex_unlock(&lock);
    if (status != RBE_OK) return status;
    call c = {NULL, NULL, NULL, NULL, NULL};
    status = multiply(g, &c, device, err);
    if (c.preference) lt.cublasLtMatmulPreferenceDestroy(c.preference);
    if (c.desc) lt.cublasLtMatmulDescDestroy(c.desc);
    if (c.first) lt.cublasLtMatrixLayoutDestroy(c.first);
    if (c.second) lt.cublasLtMatrixLayoutDestroy(c.second);
    if (c.result) lt.cublasLtMatrixLayoutDestroy(c.result);
    return status;
}
