// A weight to encode in float64 and the exact error of codes for it.
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

#endif
