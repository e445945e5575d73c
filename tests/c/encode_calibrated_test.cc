// rbe_encode_calibrated and rbe_decode_backward: against brute force, never a worse loss by a sweep, whatever the threads; and what they refuse.
#include "encode_case.h"

namespace {

constexpr double kFloat32 = 1e-5;  // losses of float32 weights, computed twice

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

TEST(EncodeCalibrated, FeedbackGainsAndSweepsNeverLose) {
    for (const char *layout : {"rbe8_g8", "rbe8x2_g8", "rbe16s_g8", "rbe16sx2_g8", "rbe22_g8", "rbe32_g16", "rbe9r_g16", "rbe8x3_g5"}) {
        Calibrated c(layout, 70, 45, 1);  // more rows than a block, a ragged last group
        rbe_error err;
        ASSERT_EQ(rbe_encode(&c.w, &c.dense, c.words.data(), nullptr, &err), RBE_OK) << err.text;
        double before = c.loss();
        for (int sweeps = 0; sweeps < 4; ++sweeps) {
            ASSERT_EQ(c.encode(sweeps, &err), RBE_OK) << err.text;
            const double now = c.loss();
            EXPECT_LE(now, before * (sweeps ? 1 + kFloat32 : 1.0)) << layout << " sweeps " << sweeps;
            before = now;
        }
    }
}

TEST(EncodeCalibrated, OneGroupIsTheBestOfAllVectors) {
    Calibrated c("rbe8_g8", 40, 8, 2);
    rbe_error err;
    ASSERT_EQ(c.encode(0, &err), RBE_OK) << err.text;
    for (int64_t r = 0; r < c.w.rows; ++r) {
        double least = INFINITY, got = INFINITY;
        for (int j = 0; j < 256; ++j) {
            double sum = 0, e[8];
            for (int i = 0; i < 8; ++i) e[i] = c.weight[(size_t)(r * 8 + i)] - (double)c.gain[(size_t)r] * c.basis[(size_t)(j * 8 + i)];
            for (int i = 0; i < 8; ++i)
                for (int k = 0; k < 8; ++k) sum += e[i] * c.hessian[(size_t)(i * 8 + k)] * e[k];
            least = std::min(least, sum);
            if (rbe_word_idx((uint32_t)c.words[(size_t)r]) == (uint32_t)j) got = sum;
        }
        EXPECT_LE(got, least * (1 + kFloat32)) << "row " << r;
    }
}

TEST(EncodeCalibrated, SweepsFromGivenCodesDoNotDependOnThreads) {
    Calibrated one("rbe8x2_g8", 150, 40, 3), many("rbe8x2_g8", 150, 40, 3);
    rbe_error err;
    Threads threads(3);
    for (Calibrated *c : {&one, &many}) {
        ASSERT_EQ(rbe_encode(&c->w, &c->dense, c->words.data(), nullptr, &err), RBE_OK) << err.text;
        const double before = c->loss();
        c->calibration.factor = nullptr;
        ASSERT_EQ(c->encode(2, &err, c == &many ? &threads.parallel : nullptr), RBE_OK) << err.text;
        EXPECT_LT(c->loss(), before);
    }
    EXPECT_EQ(one.words, many.words);
}

TEST(EncodeCalibrated, RefusesWhatItCannotUse) {
    rbe_error err;
    const auto refused = [&](const char *word, auto change) {
        Calibrated c("rbe8_g8", 3, 16, 4);
        change(c);
        EXPECT_EQ(c.encode(1, &err), RBE_BAD_ARGUMENT) << word;
        EXPECT_NE(std::string(err.text).find(word), std::string::npos) << err.text;
    };
    refused("hessian", [](Calibrated &c) { c.calibration.hessian = nullptr; });
    refused("hessian", [](Calibrated &c) { c.hessian[0] = -1; });
    refused("hessian", [](Calibrated &c) { c.hessian[1] = NAN; });
    refused("positive definite", [](Calibrated &c) { std::fill(c.hessian.begin(), c.hessian.end(), 1.0f); });
    refused("factor", [](Calibrated &c) { c.factor[17] = 0; });
    refused("gain", [](Calibrated &c) { c.gain[2] = -1; });
    refused("k0", [](Calibrated &c) { c.w.groups_total = 3; c.w.k0 = 1; });
    Calibrated c("rbe8_g8", 3, 16, 4);
    EXPECT_EQ(c.encode(-1, &err), RBE_BAD_ARGUMENT);
}

TEST(DecodeBackward, IsTheDerivativeOfDecode) {
    for (const char *layout : {"rbe8x2_g8", "rbe16s_g8", "rbe22_g16", "rbe9rx2_g16"}) {
        Calibrated c(layout, 9, 37, 5);
        rbe_error err;
        ASSERT_EQ(rbe_encode(&c.w, &c.dense, c.words.data(), nullptr, &err), RBE_OK) << err.text;
        c.w.words = c.words.data();
        std::vector<float> dbasis(c.basis.size()), dgain(c.gain.size()), decoded(c.weight.size());
        Threads threads(3);
        ASSERT_EQ(rbe_decode_backward(&c.w, c.weight.data(), dbasis.data(), dgain.data(), &threads.parallel, &err), RBE_OK) << err.text;
        // W is linear in the basis and in the gain: <dW, W> = <dbasis, basis> = <dgain, gain>
        ASSERT_EQ(rbe_decode(&c.w, decoded.data(), nullptr, &err), RBE_OK) << err.text;
        double whole = 0, size = 0, by_basis = 0, by_gain = 0;
        for (size_t i = 0; i < decoded.size(); ++i) {
            whole += (double)decoded[i] * c.weight[i];
            size += std::fabs((double)decoded[i] * c.weight[i]);
        }
        for (size_t i = 0; i < dbasis.size(); ++i) by_basis += (double)dbasis[i] * c.basis[i];
        for (size_t i = 0; i < dgain.size(); ++i) by_gain += (double)dgain[i] * c.gain[i];
        EXPECT_NEAR(by_basis, whole, kFloat32 * size) << layout;
        EXPECT_NEAR(by_gain, whole, kFloat32 * size) << layout;
    }
}

}  // namespace
