// The half-precision paths of rbe_linear against the float64 reference: every layout, size and type, and what float16 could lose.
#include "product_case.h"

namespace {

// Without AMX the tables are made in float32, so both are tested.
std::vector<std::string> half_isas() {
    std::vector<std::string> names;
    for (const std::string &isa : host_isas())
        if (rbe_kernels_of(isa.c_str())->half_rows) names.push_back(isa);
    return names;
}

// Every token within 1.5 error * its own root mean square, which few rows make.
void expect_tokens_near(const Matrix &got, const Matrix &truth, double error, const std::string &what) {
    for (int64_t t = 0; t < truth.view.rows; ++t) {
        std::vector<double> row;
        for (int64_t i = 0; i < truth.view.cols; ++i) row.push_back(truth.at(t, i));
        for (int64_t i = 0; i < truth.view.cols; ++i)
            ASSERT_LE(std::fabs(got.at(t, i) - row[(size_t)i]), 1.5 * error * rms(row)) << what << " at " << t << ", " << i;
    }
}

struct Half : Forward {
    using Forward::Forward;
    void check_half(const std::string &what) {
        const std::vector<char> before = y.surroundings();
        run(RBE_ACCURACY_FAST);
        expect_near(y, truth, kHalfError, what);
        std::vector<double> error, size;
        for (int64_t t = 0; t < y.view.rows; ++t)
            for (int64_t i = 0; i < y.view.cols; ++i) error.push_back(y.at(t, i) - truth.at(t, i)), size.push_back(truth.at(t, i));
        ASSERT_LE(rms(error), (kHalfRms + step_of(y.view.dtype)) * rms(size)) << what;
        ASSERT_EQ(before, y.surroundings()) << what << ": wrote outside y";
    }
};

TEST(HalfForward, EveryLayoutAgreesWithTheReference) {
    std::mt19937 random(1);
    for (const char *layout : {"rbe22_g64", "rbe22_g32", "rbe22_g128", "rbe32_g16", "rbe9r_g8", "rbe22_g1", "rbe22x2_g3", "rbe32_g100", "rbe9rx2_g128",
                               "rbe4r_g16", "rbe2r_g16", "rbe8x2_g8", "rbe22x16_g16"}) {
        for (Weight::Codes codes : {Weight::kWords, Weight::kPacked}) {
            Half f(layout, 53, 331, 35, random, codes);
            f.reference();
            for (const std::string &isa : half_isas()) {
                const Using use(isa, RBE_PATH_TABLE_HALF);
                f.check_half(std::string(layout) + " " + isa);
            }
        }
    }
}

TEST(HalfForward, SizesAroundEveryTileEdge) {
    std::mt19937 random(2);
    const auto check = [&](const char *layout, int64_t m, int64_t n, int64_t tokens) {
        Half f(layout, m, n, tokens, random, Weight::kPacked);
        f.reference();
        for (const std::string &isa : half_isas()) {
            const Using use(isa, RBE_PATH_TABLE_HALF);
            f.check_half(std::string(layout) + " " + isa + " " + std::to_string(m) + " x " + std::to_string(n) + ", " + std::to_string(tokens));
        }
    };
    for (int64_t tokens : {0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 130}) check("rbe22_g16", 19, 80, tokens);
    for (int64_t m : {1, 2, 7, 8, 9, 63, 64, 65, 129}) check("rbe22_g32", m, 96, 33);
    for (int64_t n : {1, 15, 16, 17, 31, 32, 33, 255, 256, 257, 513}) check("rbe22_g32", 9, n, 3);
    check("rbe22_g8", 1030, 64, 1030);  // y so large that it goes past the caches
}

// More codes than a sum in float16 may have.
TEST(HalfForward, LongSums) {
    std::mt19937 random(3);
    for (const char *layout : {"rbe22_g1", "rbe22x3_g4"}) {
        for (int64_t n : {255, 256, 257, 700, 1100}) {
            Half f(layout, 20, n, 40, random);
            f.reference();
            for (const std::string &isa : half_isas()) {
                const Using use(isa, RBE_PATH_TABLE_HALF);
                f.check_half(std::string(layout) + " " + isa + " columns " + std::to_string(n));
            }
        }
    }
}

TEST(HalfForward, TypesAndStrides) {
    std::mt19937 random(4);
    for (rbe_dtype dtype : {RBE_F32, RBE_BF16, RBE_F16}) {
        for (Matrix::Shape in : {Matrix::kRows, Matrix::kPadded, Matrix::kTransposed, Matrix::kReversed, Matrix::kSpaced}) {
            for (Matrix::Shape out : {Matrix::kRows, Matrix::kTransposed, Matrix::kReversed}) {
                Half f("rbe22_g16", 37, 300, 19, random, Weight::kWords, dtype, in, out);
                f.reference();
                for (const std::string &isa : half_isas()) {
                    const Using use(isa, RBE_PATH_TABLE_HALF);
                    f.check_half(isa + " dtype " + std::to_string(dtype) + " shapes " + std::to_string(in) + std::to_string(out));
                }
            }
        }
    }
}

// float16 ends at 65504 and 6e-8: a token's power of two must bring any token into that range, and a huge one must not push its neighbours out.
TEST(HalfForward, AnySizeOfTokenIsRight) {
    std::mt19937 random(5);
    const double sizes[] = {1.0, 1e4, 1e-6, 1e30, 1e-30, 1e-36, 1e36, 0.0};
    for (double basis : {1.0, 1e-4, 1e3}) {
        Half f("rbe22_g32", 40, 256, 70, random, Weight::kPacked);
        for (float &b : f.weight.basis) b *= (float)basis;
        std::fill(f.weight.bias.begin(), f.weight.bias.end(), 0.0f);
        for (int64_t t = 0; t < 70; ++t)
            for (int64_t j = 0; j < 256; ++j) f.x.set(t, j, f.x.at(t, j) * sizes[t % 8] / (sizes[t % 8] > 1e35 && basis > 1.0 ? basis : 1.0));
        f.reference();
        for (const std::string &isa : half_isas()) {
            const Using use(isa, RBE_PATH_TABLE_HALF);
            f.run(RBE_ACCURACY_FAST);
            expect_tokens_near(f.y, f.truth, kHalfError, isa + " basis " + std::to_string(basis));
        }
    }
}

// One column much larger than the others, as in the activations of language models, where the weights are made to cancel: the others must still count.
TEST(HalfForward, OutlierColumns) {
    std::mt19937 random(6);
    for (double outlier : {1e2, 1e4}) {
        Half f("rbe22_g16", 40, 512, 33, random, Weight::kPacked);
        for (int64_t t = 0; t < 33; ++t) f.x.set(t, 5, outlier);
        for (int64_t j = 0; j < 256; ++j) f.weight.basis[(size_t)(j * 16 + 5)] = 0.0f;
        f.reference();
        for (const std::string &isa : half_isas()) {
            const Using use(isa, RBE_PATH_TABLE_HALF);
            f.run(RBE_ACCURACY_FAST);
            expect_tokens_near(f.y, f.truth, kHalfError, isa + " outlier " + std::to_string(outlier));
        }
    }
}

// The largest sums that codes can make: every scale exp(2), every product of one sign.
TEST(HalfForward, LargestCodesDoNotOverflow) {
    std::mt19937 random(7);
    for (const char *layout : {"rbe22_g8", "rbe22_g32"}) {
        Half f(layout, 20, 8192, 33, random);
        for (int32_t &word : f.weight.words) word = (7 << 18) | (1 << RBE_DERIV_SHIFT) | 255 | (word & (255 << RBE_IDX_SHIFT));
        for (float &b : f.weight.basis) b = random() % 2 ? 1.99f : 1.98f;
        for (int64_t t = 0; t < 33; ++t)
            for (int64_t j = 0; j < 8192; ++j) f.x.set(t, j, t % 2 ? 1.99 : -1.99);
        f.reference();
        for (const std::string &isa : half_isas()) {
            const Using use(isa, RBE_PATH_TABLE_HALF);
            f.check_half(std::string(layout) + " " + isa);
        }
    }
}

// A token's result is its own, whatever stands beside it and however many.
TEST(HalfForward, TokensDoNotDependOnTheirNeighbours) {
    std::mt19937 random(8);
    for (const std::string &isa : half_isas()) {
        const Using use(isa, RBE_PATH_TABLE_HALF);
        Half many("rbe22_g32", 70, 300, 100, random, Weight::kPacked);
        many.x.set(3, 7, 1e20);
        many.run(RBE_ACCURACY_FAST);
        Half one("rbe22_g32", 70, 300, 1, random, Weight::kPacked);
        for (int64_t t : {0, 2, 64, 99}) {
            for (int64_t j = 0; j < 300; ++j) one.x.set(0, j, many.x.at(t, j));
            one.weight.w.packed = many.weight.w.packed;
            one.weight.w.basis = many.weight.w.basis;
            one.weight.w.gain = many.weight.w.gain;
            one.weight.bias = many.weight.bias;
            one.run(RBE_ACCURACY_FAST);
            for (int64_t i = 0; i < 70; ++i) ASSERT_EQ(one.y.at(0, i), many.y.at(t, i)) << isa << " at " << t << ", " << i;
        }
    }
}

TEST(HalfForward, NotTakenInTheExactClass) {
    std::mt19937 random(9);
    for (const std::string &isa : half_isas()) {
        Forward f("rbe22_g64", 64, 256, 64, random, Weight::kPacked);
        f.reference();
        const Using use(isa, RBE_PATH_TABLE_HALF);
        f.check(isa);
    }
}

}  // namespace
