// A cuBLASLt for machines without one: the functions that ops/cuda_blaslt.c loads. It checks what the real one would refuse or compute
// wrongly without a word, and multiplies on the CPU in float64. A wrong argument is named on stderr and refused with status 7, invalid
// value.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>

#include "kernels/cuda/cu.h"

namespace {

enum { kInvalid = 7, kUnsupported = 15, kWorkspace = 4096 };
enum { kFloat = 0, kDouble = 1, kHalf = 2, kInt8 = 3, kInt32 = 10, kBfloat = 14, kE4m3 = 28 };
enum { kCompute32 = 68, kCompute64 = 70, kComputeInt = 72, kComputeTf32 = 77 };

struct Desc {
    int compute, scale;
    int32_t transposed[2];
};
struct Layout {
    int type;
    int64_t rows, cols, ld;
    int32_t batch;
    int64_t batch_stride;
};
struct Preference {
    uint64_t workspace;
    uint32_t alignment[4];
};
struct Algo {
    uint64_t data[8];
};
struct Heuristic {
    Algo algo;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};
static_assert(sizeof(Heuristic) == 96, "as in cublasLt.h");

int objects;  // created and not destroyed

int refuse(const char *why) {
    std::fprintf(stderr, "cublaslt stand-in: %s\n", why);
    return kInvalid;
}

int bytes_of(int type) {
    return type == kDouble ? 8 : type == kFloat || type == kInt32 ? 4 : type == kInt8 || type == kE4m3 ? 1 : 2;
}

double load(const void *data, int type, int64_t at) {
    switch (type) {
        case kDouble: return ((const double *)data)[at];
        case kFloat: return ((const float *)data)[at];
        case kHalf: return cu_f16_to_f32(((const uint16_t *)data)[at]);
        case kInt8: return ((const int8_t *)data)[at];
        case kInt32: return ((const int32_t *)data)[at];
        case kE4m3: return cu_e4m3_to_f32(((const uint8_t *)data)[at]);
        default: return emu::from_bits<float>((uint64_t)((const uint16_t *)data)[at] << 16);
    }
}
void store(void *data, int type, int64_t at, double value) {
    switch (type) {
        case kDouble: ((double *)data)[at] = value; break;
        case kFloat: ((float *)data)[at] = (float)value; break;
        case kHalf: ((uint16_t *)data)[at] = cu_f32_to_f16((float)value); break;
        case kInt32: ((int32_t *)data)[at] = (int32_t)value; break;
        default: ((uint16_t *)data)[at] = cu_f32_to_bf16((float)value); break;
    }
}

int check(const Desc &d, const Layout &a, const Layout &b, const Layout &c) {
    const int64_t m = d.transposed[0] ? a.cols : a.rows, k = d.transposed[0] ? a.rows : a.cols;
    const int64_t k2 = d.transposed[1] ? b.cols : b.rows, n = d.transposed[1] ? b.rows : b.cols;
    if (m != c.rows || n != c.cols || k != k2) return refuse("shapes do not match");
    if (m < 1 || n < 1 || k < 1) return refuse("a matrix is empty");
    for (const Layout *l : {&a, &b, &c}) {
        if (l->ld < l->rows) return refuse("a leading dimension is smaller than the rows");
        if (l->batch != c.batch || l->batch < 1) return refuse("batch counts differ");
    }
    if (c.batch > 1 && c.batch_stride == 0) return refuse("the results of a batch lie on each other");
    if (a.type != b.type) return refuse("a and b differ in type");
    const bool integers = a.type == kInt8, bytes = integers || a.type == kE4m3;
    if (bytes) {  // tensor cores of eight bits
        if (!d.transposed[0] || d.transposed[1]) return refuse("eight bits need a transposed and b not");
        if (m % 16 || n % 16 || k % 16 || a.ld % 16 || b.ld % 16 || c.ld % 4) return refuse("eight bits need multiples of 16");
        if (integers ? c.type != kInt32 || d.compute != kComputeInt || d.scale != kInt32
                     : c.type != kFloat || d.compute != kCompute32 || d.scale != kFloat)
            return refuse("eight bits with other sums than int32 of int8, float32 of e4m3");
        return 0;
    }
    if (d.compute == kComputeInt || c.type == kInt32) return refuse("int32 sums are for int8");
    const bool wide = a.type == kDouble;
    if (wide != (c.type == kDouble) || wide != (d.compute == kCompute64) || wide != (d.scale == kDouble))
        return refuse("float64 mixed with others");
    if (!wide && d.scale != kFloat) return refuse("scale type is not that of the sums");
    if (d.compute == kComputeTf32 && a.type != kFloat) return refuse("TF32 is for float32");
    if (!wide && c.type != a.type && c.type != kFloat) return refuse("no such output type");
    return 0;
}

}  // namespace

#define API extern "C" __attribute__((visibility("default"))) int

extern "C" __attribute__((visibility("default"))) int standin_objects() { return objects; }
static int searches, calls;
extern "C" __attribute__((visibility("default"))) int standin_searches() { return searches; }
extern "C" __attribute__((visibility("default"))) int standin_calls() { return calls; }

API cublasLtCreate(void **handle) {
    static int one;
    *handle = &one;
    return 0;
}
API cublasLtMatmulDescCreate(void **desc, int compute, int scale) {
    *desc = new Desc{compute, scale, {0, 0}};
    ++objects;
    return 0;
}
API cublasLtMatmulDescDestroy(void *desc) {
    delete (Desc *)desc;
    --objects;
    return 0;
}
API cublasLtMatmulDescSetAttribute(void *desc, int attribute, const void *value, size_t size) {
    if ((attribute != 3 && attribute != 4) || size != 4) return refuse("unknown attribute of a product");
    std::memcpy(&((Desc *)desc)->transposed[attribute - 3], value, size);
    return 0;
}
API cublasLtMatrixLayoutCreate(void **layout, int type, uint64_t rows, uint64_t cols, int64_t ld) {
    if (type != kFloat && type != kDouble && type != kHalf && type != kBfloat && type != kInt8 && type != kInt32 && type != kE4m3)
        return kUnsupported;
    *layout = new Layout{type, (int64_t)rows, (int64_t)cols, ld, 1, 0};
    ++objects;
    return 0;
}
API cublasLtMatrixLayoutDestroy(void *layout) {
    delete (Layout *)layout;
    --objects;
    return 0;
}
API cublasLtMatrixLayoutSetAttribute(void *layout, int attribute, const void *value, size_t size) {
    Layout *l = (Layout *)layout;
    if (attribute == 5 && size == 4) std::memcpy(&l->batch, value, size);
    else if (attribute == 6 && size == 8) std::memcpy(&l->batch_stride, value, size);
    else return refuse("unknown attribute of a matrix");
    return 0;
}
API cublasLtMatmulPreferenceCreate(void **preference) {
    *preference = new Preference{0, {256, 256, 256, 256}};
    ++objects;
    return 0;
}
API cublasLtMatmulPreferenceDestroy(void *preference) {
    delete (Preference *)preference;
    --objects;
    return 0;
}
API cublasLtMatmulPreferenceSetAttribute(void *preference, int attribute, const void *value, size_t size) {
    Preference *p = (Preference *)preference;
    if (attribute == 1 && size == 8) std::memcpy(&p->workspace, value, size);
    else if (attribute >= 5 && attribute <= 8 && size == 4) std::memcpy(&p->alignment[attribute - 5], value, size);
    else return refuse("unknown preference");
    return 0;
}
// What was promised is written into the algorithm, and held to at the product.
API cublasLtMatmulAlgoGetHeuristic(void *, void *desc, void *a, void *b, void *c, void *d, void *preference, int wanted, Heuristic *results,
                                   int *found) {
    ++searches;
    const Preference *p = (const Preference *)preference;
    if (c != d || wanted < 1) return refuse("c and d differ, or nothing is asked for");
    const int failed = check(*(Desc *)desc, *(Layout *)a, *(Layout *)b, *(Layout *)d);
    if (failed) return failed;
    const bool workspace = p->workspace >= kWorkspace && ((Layout *)d)->rows % 2;  // sometimes
    *results = Heuristic{};
    results->workspace = workspace ? (size_t)kWorkspace : 0;
    results->algo.data[0] = 0x5eed;
    results->algo.data[1] = results->workspace;
    for (int i = 0; i < 4; ++i) results->algo.data[2 + i] = p->alignment[i];
    *found = 1;
    return 0;
}
API cublasLtMatmul(void *handle, void *desc, const void *alpha, const void *a, void *a_layout, const void *b, void *b_layout,
                   const void *beta, const void *c, void *c_layout, void *d, void *d_layout, const Algo *algo, void *workspace,
                   size_t workspace_size, void *) {
    ++calls;
    const Desc &product = *(Desc *)desc;
    const Layout &la = *(Layout *)a_layout, &lb = *(Layout *)b_layout, &ld = *(Layout *)d_layout;
    if (!handle || c != d || c_layout != d_layout) return refuse("c and d differ");
    if (check(product, la, lb, ld)) return kInvalid;
    if (algo->data[0] != 0x5eed) return refuse("the algorithm is not one that was chosen");
    if (algo->data[1] > workspace_size || (algo->data[1] && !workspace)) return refuse("the workspace is smaller than asked for");
    const void *at[] = {a, b, c, d};
    const Layout *layouts[] = {&la, &lb, &ld, &ld};
    for (int i = 0; i < 4; ++i)
        if (((uintptr_t)at[i] | (uintptr_t)(layouts[i]->batch_stride * bytes_of(layouts[i]->type) * (ld.batch > 1))) % algo->data[2 + i])
            return refuse("a matrix is less aligned than was promised");
    if (workspace_size) std::memset(workspace, 0xFF, workspace_size);
    if (bytes_of(la.type) == 1 && (algo->data[2] < 16 || algo->data[3] < 16)) return refuse("eight bits need addresses of 16");
    const auto number = [&](const void *at) {
        return product.scale == kDouble ? *(const double *)at : product.scale == kInt32 ? *(const int32_t *)at : *(const float *)at;
    };
    const double scale = number(alpha), keep = number(beta);
    const int64_t depth = product.transposed[0] ? la.rows : la.cols;
    for (int64_t batch = 0; batch < ld.batch; ++batch) {
        for (int64_t j = 0; j < ld.cols; ++j) {
            for (int64_t i = 0; i < ld.rows; ++i) {
                double sum = 0;
                for (int64_t e = 0; e < depth; ++e)
                    sum += load(a, la.type, batch * la.batch_stride + (product.transposed[0] ? i * la.ld + e : e * la.ld + i)) *
                           load(b, lb.type, batch * lb.batch_stride + (product.transposed[1] ? e * lb.ld + j : j * lb.ld + e));
                const int64_t to = batch * ld.batch_stride + j * ld.ld + i;
                store(d, ld.type, to, scale * sum + (keep != 0 ? keep * load(c, ld.type, to) : 0.0));
            }
        }
    }
    return 0;
}
