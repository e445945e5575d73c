// rbe_encode_calibrated and rbe_decode_backward: against brute force, never a worse loss by a sweep, whatever the threads; and what they refuse.
#include "encode_case.h"

namespace {

constexpr double kFloat32 = 1e-5;  // losses of float32 weights, computed twice

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
