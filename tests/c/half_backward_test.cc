// The half-precision path of rbe_linear_backward against the float64 reference: every layout, size and type, and what float16 could lose.
#include "backward_case.h"

namespace {

// Root mean square error over that of the gradient: dP, x and (of dscale) P in one bfloat16 piece each, sums in float16.
constexpr double kDxRms = 2e-3, kBasisRms = 3e-3, kScaleRms = 4e-3;
constexpr double kWorst = 1e-2;  // of one entry, over the largest

std::vector<std::string> half_isas() {
    std::vector<std::string> names;
    for (const std::string &isa : host_isas()) {
        const rbe_kernels *kernels = rbe_kernels_of(isa.c_str());
        if (kernels->half_backward && kernels->half_dx) names.push_back(isa);
    }
    return names;
}

double rms_error(const std::vector<double> &got, const std::vector<double> &truth) {
    std::vector<double> error;
    for (size_t i = 0; i < truth.size(); ++i) error.push_back(got[i] - truth[i]);
    return rms(error) / std::max(rms(truth), 1e-300);
}

std::vector<double> values(const std::vector<float> &v) { return {v.begin(), v.end()}; }
std::vector<double> values(const Matrix &m) {
    std::vector<double> v;
    for (int64_t r = 0; r < m.view.rows; ++r)
        for (int64_t c = 0; c < m.view.cols; ++c) v.push_back(m.at(r, c));
    return v;
}

struct HalfBackward : Backward {
    using Backward::Backward;
    void check_half(const std::string &what) {
        const std::vector<char> before = got.dx.surroundings();
        run(nullptr, RBE_ACCURACY_FAST);
        const rbe_gradients &o = got.out;
        if (o.dx) near(values(got.dx), values(truth.dx), kDxRms + step_of(x.view.dtype), what + " dx");
        if (o.basis) near(values(got.basis), values(truth.basis), kBasisRms, what + " dbasis");
        if (o.gain) near(values(got.gain), values(truth.gain), kScaleRms, what + " dgain");
        if (o.bias) near(values(got.bias), values(truth.bias), kFloat32Error, what + " dbias");
        if (o.scale) near(values(got.scale), values(truth.scale), kScaleRms, what + " dscale");
        if (o.amplitude) near(values(got.amplitude), values(truth.amplitude), kScaleRms, what + " damplitude");
        ASSERT_EQ(before, got.dx.surroundings()) << what << ": wrote outside dx";
    }
    // A few entries, or some that dwarf the others, are no sample of a root mean square.
    static void near(const std::vector<double> &got, const std::vector<double> &truth, double error, const std::string &what) {
        ASSERT_LE(rms_error(got, truth), (truth.size() < 100 ? 2.0 : 1.25) * error) << what;
        double largest = 0.0;
        for (double t : truth) largest = std::max(largest, std::fabs(t));
        const double room = kWorst * largest;
        for (size_t i = 0; i < truth.size(); ++i) ASSERT_LE(std::fabs(got[i] - truth[i]), room) << what << " at " << i << ": " << got[i] << " for " << truth[i];
    }
};

// Enough entries to hold the path to the figures of docs/operators.md.
TEST(HalfBackward, ErrorIsTheDocumentedOne) {
    std::mt19937 random(14);
    for (const char *layout : {"rbe22_g64", "rbe4r_g32"}) {
        HalfBackward b(layout, 600, 512, 150, random, Weight::kPacked);
        b.reference();
        for (const std::string &isa : half_isas()) {
            const Using use(isa, RBE_PATH_TABLE_HALF);
            b.run(nullptr, RBE_ACCURACY_FAST);
            EXPECT_LE(rms_error(values(b.got.dx), values(b.truth.dx)), kDxRms) << layout;
            EXPECT_LE(rms_error(values(b.got.basis), values(b.truth.basis)), kBasisRms) << layout;
            EXPECT_LE(rms_error(values(b.got.scale), values(b.truth.scale)), kScaleRms) << layout;
            EXPECT_LE(rms_error(values(b.got.gain), values(b.truth.gain)), kScaleRms) << layout;
        }
    }
}

TEST(HalfBackward, EveryLayoutAgreesWithTheReference) {
    std::mt19937 random(1);
    for (const char *layout : {"rbe22_g64", "rbe22_g32", "rbe22_g128", "rbe32_g16", "rbe9r_g8", "rbe22_g1", "rbe22x2_g3", "rbe32_g100", "rbe9rx2_g128",
                               "rbe4r_g16", "rbe2r_g16", "rbe8x2_g8", "rbe22x16_g16"}) {
        for (Weight::Codes codes : {Weight::kWords, Weight::kPacked}) {
            HalfBackward b(layout, 53, 331, 35, random, codes);
            b.reference();
            for (const std::string &isa : half_isas()) {
                const Using use(isa, RBE_PATH_TABLE_HALF);
                b.check_half(std::string(layout) + " " + isa);
            }
        }
    }
}

TEST(HalfBackward, SizesAroundEveryTileEdge) {
    std::mt19937 random(2);
    const auto check = [&](const char *layout, int64_t m, int64_t n, int64_t tokens) {
        HalfBackward b(layout, m, n, tokens, random, Weight::kPacked);
        b.reference();
        for (const std::string &isa : half_isas()) {
            const Using use(isa, RBE_PATH_TABLE_HALF);
            b.check_half(std::string(layout) + " " + isa + " " + std::to_string(m) + " x " + std::to_string(n) + ", " + std::to_string(tokens));
        }
    };
    for (int64_t tokens : {0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 192, 193, 511, 513, 700}) check("rbe22_g16", 19, 80, tokens);
    for (int64_t m : {1, 2, 15, 16, 17, 31, 32, 33, 97, 513}) check("rbe22_g32", m, 96, 70);
    for (int64_t n : {1, 15, 16, 17, 31, 32, 33, 255, 256, 257, 513}) check("rbe22_g32", 40, n, 70);
    check("rbe22_g64", 5121, 64, 70);   // so many rows that dy of 128 tokens does not fit the cache
    check("rbe22_g64", 3000, 100, 300);  // and of 256
    check("rbe22_g64", 9000, 64, 33);  // codes with more places than a sum in float16 may have
}

TEST(HalfBackward, TypesAndStrides) {
    std::mt19937 random(4);
    for (rbe_dtype dtype : {RBE_F32, RBE_BF16, RBE_F16}) {
        for (Matrix::Shape in : {Matrix::kRows, Matrix::kPadded, Matrix::kTransposed, Matrix::kReversed, Matrix::kSpaced}) {
            for (Matrix::Shape out : {Matrix::kRows, Matrix::kTransposed, Matrix::kReversed}) {
                HalfBackward b("rbe22_g16", 37, 100, 79, random, Weight::kWords, dtype, in, out);
                b.reference();
                for (const std::string &isa : half_isas()) {
                    const Using use(isa, RBE_PATH_TABLE_HALF);
                    b.check_half(isa + " dtype " + std::to_string(dtype) + " shapes " + std::to_string(in) + std::to_string(out));
                }
            }
        }
    }
}

TEST(HalfBackward, AmplitudesAndTheirGradient) {
    std::mt19937 random(5);
    for (const char *layout : {"rbe22_g16", "rbe32x2_g8", "rbe9r_g5", "rbe4r_g5", "rbe2r_g3"}) {
        HalfBackward b(layout, 33, 70, 40, random, Weight::kAmplitude);
        b.edge_amplitudes();
        b.weight.gain[3] = 0.0f;
        b.reference();
        for (const std::string &isa : half_isas()) {
            const Using use(isa, RBE_PATH_TABLE_HALF);
            b.check_half(std::string(layout) + " " + isa);
        }
    }
}

TEST(HalfBackward, EachGradientAlone) {
    std::mt19937 random(7);
    for (int wanted = 0; wanted < 6; ++wanted) {
        HalfBackward b("rbe22_g16", 70, 90, 40, random, Weight::kAmplitude);
        b.reference();
        b.want(wanted);
        for (const std::string &isa : half_isas()) {
            const Using use(isa, RBE_PATH_TABLE_HALF);
            b.check_half("only " + std::to_string(wanted));
        }
    }
}

// Gradients of a loss that is not scaled, and of one that is: float16 ends at 65504 and 6e-8.
TEST(HalfBackward, AnySizeOfGradientActivationBasisAndGain) {
    std::mt19937 random(8);
    const auto check = [&](double dy, double x, double basis, double gain) {
        HalfBackward b("rbe22_g32", 60, 256, 140, random, Weight::kPacked);
        for (float &v : b.weight.basis) v *= (float)basis;
        for (float &v : b.weight.gain) v *= (float)gain;
        for (int64_t t = 0; t < 140; ++t) {
            for (int64_t j = 0; j < 256; ++j) b.x.set(t, j, b.x.at(t, j) * x);
            for (int64_t i = 0; i < 60; ++i) b.dy.set(t, i, b.dy.at(t, i) * dy);
        }
        b.reference();
        for (const std::string &isa : half_isas()) {
            const Using use(isa, RBE_PATH_TABLE_HALF);
            b.check_half(isa + " dy " + std::to_string(dy) + " x " + std::to_string(x) + " basis " + std::to_string(basis) + " gain " + std::to_string(gain));
        }
    };
    for (double dy : {1e-8, 1e4, 1e-18, 1e12}) check(dy, 1.0, 1.0, 1.0);
    for (double x : {1e-8, 1e4, 1e-18, 1e12}) check(1.0, x, 1.0, 1.0);
    for (double basis : {1e-6, 1e5}) check(1.0, 1.0, basis, 1.0);
    for (double gain : {1e-6, 1e5}) check(1.0, 1.0, 1.0, gain);
    check(1e-12, 1e10, 1e-3, 1e4);
}

// Tokens whose gradients and activations differ in size by more than float16 has: each dx is right by itself, and what is summed over tokens as a whole.
TEST(HalfBackward, TokensOfAnySizeSideBySide) {
    std::mt19937 random(9);
    const double dy[] = {1.0, 1e-8, 1e4, 0.0, 1e-2}, x[] = {1.0, 1e3, 1e-6, 1.0, 0.0, 10.0, 1e-2};
    HalfBackward b("rbe22_g32", 60, 256, 140, random, Weight::kPacked);
    for (int64_t t = 0; t < 140; ++t) {
        for (int64_t j = 0; j < 256; ++j) b.x.set(t, j, b.x.at(t, j) * x[t % 7]);
        for (int64_t i = 0; i < 60; ++i) b.dy.set(t, i, b.dy.at(t, i) * dy[t % 5]);
    }
    b.reference();
    for (const std::string &isa : half_isas()) {
        const Using use(isa, RBE_PATH_TABLE_HALF);
        b.check_half(isa);
        for (int64_t t = 0; t < 140; ++t) {
            std::vector<double> error, size;
            for (int64_t j = 0; j < 256; ++j) error.push_back(b.got.dx.at(t, j) - b.truth.dx.at(t, j)), size.push_back(b.truth.dx.at(t, j));
            ASSERT_LE(rms(error), 2 * kDxRms * rms(size)) << isa << " token " << t;
        }
    }
}

// The largest sums that codes and tokens can make: every scale exp(2), every product of one sign.
TEST(HalfBackward, LargestSumsDoNotOverflow) {
    std::mt19937 random(10);
    for (int64_t tokens : {64, 128, 256}) {
        HalfBackward b("rbe22_g8", 3000, 32, tokens, random);
        for (int32_t &word : b.weight.words) word = (7 << 18) | (1 << RBE_DERIV_SHIFT) | 255 | (3 << RBE_IDX_SHIFT);
        for (float &v : b.weight.basis) v = random() % 2 ? 1.99f : 1.98f;
        for (float &v : b.weight.gain) v = 1.99f;
        for (int64_t t = 0; t < tokens; ++t) {
            for (int64_t j = 0; j < 32; ++j) b.x.set(t, j, 1.99);
            for (int64_t i = 0; i < 3000; ++i) b.dy.set(t, i, 1.99);
        }
        b.reference();
        for (const std::string &isa : half_isas()) {
            const Using use(isa, RBE_PATH_TABLE_HALF);
            b.run(nullptr, RBE_ACCURACY_FAST);
            for (const auto &[got, truth] : {std::make_pair(values(b.got.dx), values(b.truth.dx)), std::make_pair(values(b.got.scale), values(b.truth.scale))})
                ASSERT_LE(rms_error(got, truth), 5e-3) << isa << " tokens " << tokens;  // sums of one sign are rounded to one side
        }
    }
}

TEST(HalfBackward, NonFiniteStaysInItsTokensRowOfDx) {
    std::mt19937 random(11);
    for (const double bad : {(double)NAN, (double)INFINITY, -(double)INFINITY}) {
        Backward b("rbe22_g16", 40, 70, 40, random);
        b.dy.set(2, 11, bad);
        for (const std::string &isa : half_isas()) {
            const Using use(isa, RBE_PATH_TABLE_HALF);
            b.run(nullptr, RBE_ACCURACY_FAST);
            for (int64_t t = 0; t < 40; ++t)
                for (int64_t j = 0; j < 70; ++j) ASSERT_EQ(std::isfinite(b.got.dx.at(t, j)), t != 2) << isa;
            ASSERT_FALSE(std::isfinite(b.got.bias[11]));
            ASSERT_FALSE(std::isfinite(b.got.gain[11]));
            ASSERT_TRUE(std::isfinite(b.got.gain[12]));
        }
        Backward x("rbe22_g16", 40, 70, 40, random);
        x.x.set(3, 20, bad);
        for (const std::string &isa : half_isas()) {
            const Using use(isa, RBE_PATH_TABLE_HALF);
            x.run(nullptr, RBE_ACCURACY_FAST);
            for (double v : values(x.got.dx)) ASSERT_TRUE(std::isfinite(v)) << isa;
            for (float v : x.got.gain) ASSERT_FALSE(std::isfinite(v)) << isa;
            for (int64_t i = 0; i < 40; ++i)
                for (int64_t k = 0; k < 5; ++k) ASSERT_EQ(std::isfinite(x.got.scale[(size_t)(i * 5 + k)]), k != 1) << isa;
        }
    }
}

TEST(HalfBackward, SameBitsRunToRunAndForAnyNumberOfThreads) {
    std::mt19937 random(12);
    for (const char *layout : {"rbe22_g16", "rbe9rx2_g32"}) {
        for (rbe_dtype dtype : {RBE_F32, RBE_BF16}) {
            Backward b(layout, 150, 700, 300, random, Weight::kPacked, dtype);
            for (const std::string &isa : half_isas()) {
                const Using use(isa, RBE_PATH_TABLE_HALF);
                const Gradients &g = b.got;
                const auto all = [&] { return std::make_tuple(g.dx.bytes, g.basis, g.gain, g.bias, g.scale); };
                b.run(nullptr, RBE_ACCURACY_FAST);
                const auto once = all();
                for (int count : {1, 2, 3, 7}) {
                    const Threads threads(count);
                    b.run(&threads.parallel, RBE_ACCURACY_FAST);
                    ASSERT_TRUE(once == all()) << layout << " threads " << count;
                }
            }
        }
    }
}

// Classes on every ISA: exact is never in float16, and fast is what exact is where there is no float16.
TEST(HalfBackward, ClassesAreKept) {
    std::mt19937 random(13);
    Backward b("rbe22_g64", 64, 256, 64, random, Weight::kPacked);
    b.reference();
    for (const std::string &isa : host_isas()) {
        const Using use(isa, RBE_PATH_TABLE_HALF);
        b.run(nullptr, RBE_ACCURACY_EXACT);
        expect_near(b.got.dx, b.truth.dx, kFloat32Error, isa);
        expect_near(b.got.scale, b.truth.scale, kFloat32Error, isa);
        b.run(nullptr, RBE_ACCURACY_FAST);
        const rbe_kernels *kernels = rbe_kernels_of(isa.c_str());
        const bool halves = kernels->half_backward && kernels->half_dx;
        ASSERT_EQ(rms_error(values(b.got.dx), values(b.truth.dx)) > 1e-4, halves) << isa;
        ASSERT_LE(rms_error(values(b.got.dx), values(b.truth.dx)), kDxRms) << isa;
    }
}

}  // namespace
