// Weights to encode: in float64 with the exact error of codes for it, and in float32 with a metric for calibrated encoding.
#ifndef RBE_ENCODE_CASE_H
#define RBE_ENCODE_CASE_H

#include "product_case.h"

constexpr double kRounding = 1e-9;  // relative error by which two float64 ways of writing one squared distance may differ

// What rbe_encode reads, in float64, with words to write.
struct Problem {
    rbe_weight w{};
    std::vector<double> basis, gain, weight;
    std::vector<int32_t> words;
    rbe_matrix dense{};

    Problem(const std::string &layout, int64_t rows, int64_t cols) {
        rbe_error err;
        EXPECT_EQ(rbe_layout_parse(layout.data(), layout.size(), &w.layout, &err), RBE_OK) << err.text;
        w.rows = rows, w.cols = cols, w.groups = w.groups_total = (cols + w.layout.group - 1) / w.layout.group;
        w.real = RBE_F64;
        w.rounded = true;
        w.seed = 5;
        basis.assign((size_t)(w.layout.stages * 256 * w.layout.group), 0.0);
        gain.assign((size_t)rows, 1.0);
        weight.assign((size_t)(rows * cols), 0.0);
        words.assign((size_t)(rows * w.groups * w.layout.stages), -1);
        w.basis = basis.data();
        w.gain = gain.data();
        dense = {weight.data(), RBE_F64, rows, cols, cols, 1};
    }
    Problem(const std::string &layout, int64_t rows, int64_t cols, std::mt19937 &random) : Problem(layout, rows, cols) {
        std::normal_distribution<double> normal;
        for (double &b : basis) b = normal(random);
        for (double &x : gain) x = (random() % 2 ? 1 : -1) * std::exp(0.5 * normal(random));
        for (double &x : weight) x = normal(random);
    }
    Problem(const Problem &) = delete;

    rbe_status encode(rbe_error *err, const rbe_parallel *threads = nullptr) { return rbe_encode(&w, &dense, words.data(), threads, err); }
    void must_encode() {
        rbe_error err;
        ASSERT_EQ(encode(&err), RBE_OK) << err.text;
    }
    uint32_t seeded(int64_t i, int64_t k, int64_t s) const {
        return rbe_seeded_idx(w.seed, (uint64_t)(w.row0 + i), (uint64_t)(w.k0 + k), (uint64_t)s, (uint64_t)w.groups_total,
                              (uint64_t)w.layout.stages);
    }
    // |w - gain * sum of vectors|^2 over the columns that exist
    double error(int64_t i, int64_t k, const uint32_t *codes) const {
        const int64_t g = w.layout.group;
        double sum = 0;
        for (int64_t e = 0; e < g && k * g + e < w.cols; ++e) {
            double left = weight[(size_t)(i * w.cols + k * g + e)];
            for (int64_t s = 0; s < w.layout.stages; ++s) {
                const double b = basis[(size_t)((s * 256 + rbe_word_idx(codes[s])) * g + e)];
                const bool negated = w.layout.field == RBE_FIELD_RBE16S && (codes[s] >> e & 1);
                left -= gain[(size_t)i] * rbe_reference_scale(w.layout.field, codes[s]) * (negated ? -b : b);
            }
            sum += left * left;
        }
        return sum;
    }
    uint32_t code(int64_t i, int64_t k = 0) const { return (uint32_t)words[(size_t)((i * w.groups + k) * w.layout.stages)]; }
};

// A weight in float32 with H = A A^T + identity and its upper triangular factor.
struct Calibrated {
    rbe_weight w{};
    int64_t n;
    std::vector<float> basis, gain, weight, hessian, factor;
    std::vector<int32_t> words;
    rbe_matrix dense{};
    rbe_calibration calibration{};

    Calibrated(const std::string &layout, int64_t rows, int64_t cols, unsigned seed) : n(cols) {
        rbe_error err;
        EXPECT_EQ(rbe_layout_parse(layout.data(), layout.size(), &w.layout, &err), RBE_OK) << err.text;
        std::mt19937 random(seed);
        std::normal_distribution<float> normal;
        w.rows = rows, w.cols = cols, w.groups = w.groups_total = (cols + w.layout.group - 1) / w.layout.group;
        w.real = RBE_F32, w.rounded = true, w.seed = 3;
        basis.resize((size_t)(w.layout.stages * 256 * w.layout.group));
        for (float &b : basis) b = normal(random);
        gain.resize((size_t)rows);
        for (float &x : gain) x = std::exp(0.3f * normal(random));
        weight.resize((size_t)(rows * cols));
        for (float &x : weight) x = normal(random);
        words.assign((size_t)(rows * w.groups * w.layout.stages), -1);
        std::vector<double> a((size_t)(n * n)), h((size_t)(n * n)), v((size_t)(n * n));
        for (double &x : a) x = normal(random);
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t j = 0; j < n; ++j) {
                for (int64_t k = 0; k < n; ++k) h[(size_t)(i * n + j)] += a[(size_t)(i * n + k)] * a[(size_t)(j * n + k)] / (1 + (double)k);
                h[(size_t)(i * n + j)] += i == j;
            }
        }
        for (int64_t j = n - 1; j >= 0; --j) {
            double square = h[(size_t)(j * n + j)];
            for (int64_t k = j + 1; k < n; ++k) square -= v[(size_t)(j * n + k)] * v[(size_t)(j * n + k)];
            v[(size_t)(j * n + j)] = std::sqrt(square);
            for (int64_t i = 0; i < j; ++i) {
                double value = h[(size_t)(i * n + j)];
                for (int64_t k = j + 1; k < n; ++k) value -= v[(size_t)(i * n + k)] * v[(size_t)(j * n + k)];
                v[(size_t)(i * n + j)] = value / v[(size_t)(j * n + j)];
            }
        }
        hessian.assign(h.begin(), h.end());
        factor.assign(v.begin(), v.end());
        w.basis = basis.data(), w.gain = gain.data();
        dense = {weight.data(), RBE_F32, rows, cols, cols, 1};
        calibration = {hessian.data(), factor.data(), 0};
    }
    Calibrated(const Calibrated &) = delete;

    rbe_status encode(int sweeps, rbe_error *err, const rbe_parallel *threads = nullptr) {
        calibration.sweeps = sweeps;
        return rbe_encode_calibrated(&w, &dense, &calibration, words.data(), threads, err);
    }
    double loss() {
        std::vector<float> decoded((size_t)(w.rows * n));
        rbe_weight coded = w;
        rbe_error err;
        coded.words = words.data();
        EXPECT_EQ(rbe_decode(&coded, decoded.data(), nullptr, &err), RBE_OK) << err.text;
        double sum = 0;
        for (int64_t r = 0; r < w.rows; ++r)
            for (int64_t i = 0; i < n; ++i)
                for (int64_t j = 0; j < n; ++j)
                    sum += ((double)weight[(size_t)(r * n + i)] - decoded[(size_t)(r * n + i)]) * hessian[(size_t)(i * n + j)] *
                           ((double)weight[(size_t)(r * n + j)] - decoded[(size_t)(r * n + j)]);
        return sum;
    }
};

#endif
