// A device for the tests: memory that starts as NaN and is freed with it, the stand-in for cuBLASLt, and products compared with the
// reference.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <memory>

#include "../c/product_case.h"
#include "cu_host.h"
#include "ops/cuda.h"

// bfloat16 tables and weights: each product rounded once or twice to 2^-9 of its size, sums of some hundred; five times the root mean
// square for the worst element of some thousand, and rows differ in size.
constexpr double kBfloat16Table = 2e-2;

// Gradients by bfloat16 tables: the table's gradient is rounded once for every 16 rows of a code, and scales of random codes have a long
// tail.
constexpr double kBfloat16Gradient = 4e-2;

inline const std::vector<std::string> kCudaLayouts = [] {
    std::vector<std::string> all = kLayouts;
    for (const char *few_bits : {"rbe4r_g8", "rbe2rx2_g16"})
        if (std::find(all.begin(), all.end(), few_bits) == all.end()) all.push_back(few_bits);
    return all;
}();

struct Device {
    rbe_products products{nullptr, 0};
    rbe_device device{allocate, this, &products, nullptr, 0};
    std::vector<std::unique_ptr<char[]>> memory;
    static void *allocate(void *owner, size_t bytes) {
        auto &memory = ((Device *)owner)->memory;
        memory.emplace_back(new char[bytes + 256]);
        char *at = memory.back().get();
        at += 256 - (uintptr_t)at % 256;
        std::memset(at, 0xFF, bytes);
        return at;
    }
};

inline int standin(const char *counter) {
    static void *library = dlopen(CUBLASLT_STANDIN, RTLD_NOW);
    int (*read)() = nullptr;
    void *symbol = library ? dlsym(library, counter) : nullptr;
    std::memcpy(&read, &symbol, sizeof read);
    return read ? read() : -1;
}

// Paths that a layout has for a type are taken, others fall back to the plan.
struct OnPath {
    explicit OnPath(int path) { rbe_cuda_use_path(path); }
    ~OnPath() { rbe_cuda_use_path(-1); }
};

inline const char *kPathNames[] = {"lookup", "token", "tiles", "gather", "fragments", "decode_mma", "decode_gemm"};

// As expect_near, for results whose rounding errors grow with the row of W they belong to: room is error times the root mean square of the
// truth of that row, or of all if that is more. Of a gradient of the basis only what is not zero counts.
inline void expect_rounded(const Matrix &got, const Matrix &truth, double error, const std::string &what) {
    std::vector<double> all;
    for (int64_t t = 0; t < truth.view.rows; ++t)
        for (int64_t i = 0; i < truth.view.cols; ++i) all.push_back(truth.at(t, i));
    const double whole = rms(all), step = step_of(got.view.dtype);
    for (int64_t i = 0; i < truth.view.cols; ++i) {
        std::vector<double> row;
        for (int64_t t = 0; t < truth.view.rows; ++t) row.push_back(truth.at(t, i));
        const double room = error * std::max(whole, rms(row));
        for (int64_t t = 0; t < truth.view.rows; ++t)
            ASSERT_LE(std::fabs(got.at(t, i) - truth.at(t, i)), room + step * std::fabs(truth.at(t, i)))
                << what << " at " << t << ", " << i;
    }
}
inline void expect_rounded(const std::vector<float> &got, const std::vector<float> &truth, double error, const std::string &what) {
    std::vector<double> some;
    for (float t : truth)
        if (t != 0.0f) some.push_back(t);
    const double room = error * rms(some);
    ASSERT_EQ(got.size(), truth.size());
    for (size_t i = 0; i < got.size(); ++i)
        ASSERT_LE(std::fabs((double)got[i] - truth[i]), truth[i] == 0.0f ? 0.0 : room)
            << what << " at " << i << ": " << got[i] << " for " << truth[i];
}
