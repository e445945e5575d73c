// rbe_encode of several stages: near the best pairs, the same whatever the threads and strides; and what encoding refuses.
#include "encode_case.h"

namespace {

constexpr double kBeamExcess = 0.05;  // squared error above that of the best of all pairs; measured 0.03 with random vectors

TEST(EncodeStages, ComeNearTheBestPairs) {
    std::mt19937 random(46);
    Problem p("rbe8x2_g8", 4, 80, random);
    for (size_t b = p.basis.size() / 2; b < p.basis.size(); ++b) p.basis[b] *= 0.5;
    p.must_encode();
    double got = 0, best = 0;
    for (int64_t i = 0; i < p.w.rows; ++i) {
        for (int64_t k = 0; k < p.w.groups; ++k) {
            const uint32_t *codes = (const uint32_t *)&p.words[(size_t)((i * p.w.groups + k) * 2)];
            got += p.error(i, k, codes);
            double least = INFINITY;
            for (uint32_t a = 0; a < 256; ++a) {
                for (uint32_t b = 0; b < 256; ++b) {
                    const uint32_t pair[2] = {a << RBE_IDX_SHIFT, b << RBE_IDX_SHIFT};
                    least = std::min(least, p.error(i, k, pair));
                }
            }
            best += least;
        }
    }
    EXPECT_GE(got, best * (1 - kRounding));
    EXPECT_LE(got, best * (1 + kBeamExcess));
}

TEST(EncodeStages, FindWhatWasMadeFromCodes) {
    // Vectors far apart and stages that shrink: the codes that made W are the only good ones.
    std::mt19937 random(47);
    for (const char *layout : {"rbe8x3_g16", "rbe16sx2_g8", "rbe22x2_g32", "rbe32x2_g32", "rbe9rx2_g32", "rbe4rx2_g32"}) {
        Problem p(layout, 3, 64, random);
        const int64_t g = p.w.layout.group, stages = p.w.layout.stages;
        for (int64_t s = 0; s < stages; ++s)
            for (int64_t b = 0; b < 256 * g; ++b) p.basis[(size_t)(s * 256 * g + b)] *= std::pow(0.05, (double)s);
        double size = 0, left = 0;
        for (int64_t i = 0; i < p.w.rows; ++i) {
            for (int64_t k = 0; k < p.w.groups; ++k) {
                std::vector<uint32_t> codes;
                for (int64_t s = 0; s < stages; ++s) {
                    uint32_t word = ((uint32_t)random() & rbe_field_mask(p.w.layout.field)) | rbe_field_constant(p.w.layout.field);
                    if (rbe_field_seeded(p.w.layout.field)) word = (word & ~(255u << RBE_IDX_SHIFT)) | p.seeded(i, k, s) << RBE_IDX_SHIFT;
                    codes.push_back(word | 128u);  // a scale that is not near zero
                }
                for (int64_t e = 0; e < g; ++e) {
                    double sum = 0;
                    for (int64_t s = 0; s < stages; ++s) {
                        const double b = p.basis[(size_t)((s * 256 + rbe_word_idx(codes[(size_t)s])) * g + e)];
                        const bool negated = p.w.layout.field == RBE_FIELD_RBE16S && (codes[(size_t)s] >> e & 1);
                        sum += rbe_reference_scale(p.w.layout.field, codes[(size_t)s]) * (negated ? -b : b);
                    }
                    double &x = p.weight[(size_t)(i * p.w.cols + k * g + e)];
                    x = p.gain[(size_t)i] * sum;
                    size += x * x;
                }
            }
        }
        p.must_encode();
        for (int64_t i = 0; i < p.w.rows; ++i)
            for (int64_t k = 0; k < p.w.groups; ++k)
                left += p.error(i, k, (const uint32_t *)&p.words[(size_t)((i * p.w.groups + k) * stages)]);
        EXPECT_LE(left, size * 1e-4) << layout;
    }
}

TEST(EncodeStages, DoNotDependOnThreadsOrStrides) {
    std::mt19937 random(48);
    for (const char *layout : {"rbe8x2_g8", "rbe8x4_g3", "rbe16sx2_g8", "rbe22x2_g4", "rbe9rx3_g5", "rbe2rx3_g5", "rbe32_g8", "rbe22_g64"}) {
        Problem p(layout, 7, 20, random);
        p.must_encode();
        const std::vector<int32_t> alone = p.words;
        rbe_error err;
        for (int count : {2, 3, 8}) {
            const Threads threads(count);
            ASSERT_EQ(p.encode(&err, &threads.parallel), RBE_OK) << err.text;
            EXPECT_EQ(p.words, alone) << layout << " with " << count << " threads";
        }
        Matrix other(RBE_F64, 7, 20, Matrix::kReversed);
        for (int64_t i = 0; i < 7; ++i)
            for (int64_t j = 0; j < 20; ++j) other.set(i, j, p.weight[(size_t)(i * 20 + j)]);
        p.dense = other.view;
        ASSERT_EQ(p.encode(&err), RBE_OK) << err.text;
        EXPECT_EQ(p.words, alone) << layout;
        // rows are encoded each on its own: a shard gets the layer's codes
        p.w.rows = p.dense.rows = 2;
        p.w.row0 = 0;
        ASSERT_EQ(p.encode(&err), RBE_OK) << err.text;
        const size_t shard = (size_t)(2 * p.w.groups * p.w.layout.stages);
        EXPECT_TRUE(std::equal(p.words.begin(), p.words.begin() + (int64_t)shard, alone.begin())) << layout;
    }
}

TEST(Encode, EveryWordIsOneThatTheLayoutHolds) {
    std::mt19937 random(49);
    for (const char *layout : {"rbe32_g3", "rbe22x2_g4", "rbe8x16_g2", "rbe16sx3_g8", "rbe9rx2_g7", "rbe4rx2_g7", "rbe22_g1", "rbe8_g300"}) {
        Problem p(layout, 3, 23, random);
        p.w.row0 = 11, p.w.k0 = 2, p.w.groups_total = p.w.groups + 4;
        p.must_encode();
        p.w.words = p.words.data();
        rbe_error err;
        EXPECT_EQ(rbe_check_codes(&p.w, &err), RBE_OK) << layout << ": " << err.text;
    }
}

TEST(Encode, RefusesWhatIsNotFiniteOrDoesNotFit) {
    std::mt19937 random(50);
    const auto refused = [&](const char *says, void (*spoil)(Problem &)) {
        Problem p("rbe22_g4", 3, 10, random);
        spoil(p);
        rbe_error err = {};
        EXPECT_EQ(p.encode(&err), RBE_BAD_ARGUMENT) << says;
        EXPECT_NE(std::strstr(err.text, says), nullptr) << says << ": " << err.text;
    };
    for (double bad : {(double)NAN, (double)INFINITY, -(double)INFINITY}) {
        static double value;
        value = bad;
        refused("weight", [](Problem &p) { p.weight[17] = value; });
        refused("gain", [](Problem &p) { p.gain[2] = value; });
        refused("basis", [](Problem &p) { p.basis[1000] = value; });
    }
    refused("weight", [](Problem &p) { p.dense.rows = 2; });
    refused("weight", [](Problem &p) { p.dense.cols = 9; });
}

}  // namespace
