// rbe_linear on every ISA the host has, every path, layout, shape class, type and stride, against the float64 reference.
#include "product_case.h"

namespace {

// Of floats alone: their results are those of float32 sums.
const rbe_path kExactPaths[] = {RBE_PATH_TABLE, RBE_PATH_TABLE_TOKEN, RBE_PATH_DECODE_DOT, RBE_PATH_DECODE, RBE_PATH_FEW, RBE_PATH_LOOKUP, RBE_PATH_LOOKUP_SPLIT};
const rbe_path kPaths[] = {RBE_PATH_PLANNED,    RBE_PATH_TABLE,  RBE_PATH_TABLE_TOKEN, RBE_PATH_LUT8,
                           RBE_PATH_DECODE_DOT, RBE_PATH_DECODE, RBE_PATH_DIGITS, RBE_PATH_FEW, RBE_PATH_LOOKUP, RBE_PATH_LOOKUP_SPLIT, RBE_PATH_TABLE_HALF};

TEST(Linear, EveryIsaPathAndLayoutAgreesWithTheReference) {
    std::mt19937 random(1);
    for (const std::string &layout : kLayouts) {
        for (Weight::Codes codes : {Weight::kWords, Weight::kPacked}) {
            for (int64_t tokens : {1, 2, 5, 16, 35}) {
                Forward f(layout, 53, 131, tokens, random, codes);
                f.reference();
                for (const std::string &isa : host_isas()) {
                    for (rbe_path path : kExactPaths) {
                        const Using use(isa, path);
                        f.check(layout + " " + isa + " path " + std::to_string(path) + " tokens " + std::to_string(tokens));
                    }
                }
            }
        }
    }
}

TEST(Linear, SizesAroundEveryTileEdge) {
    std::mt19937 random(2);
    for (const std::string &isa : host_isas()) {
        for (rbe_path path : kExactPaths) {
            const Using use(isa, path);
            for (int64_t tokens : {0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65}) {
                Forward f("rbe22_g16", 9, 40, tokens, random);
                f.reference();
                f.check(isa + " tokens " + std::to_string(tokens));
            }
            for (int64_t m : {1, 2, 3, 4, 5, 11, 12, 13, 47, 48, 49, 255, 256, 257}) {
                Forward f("rbe8x2_g8", m, 24, 17, random, Weight::kPacked);
                f.reference();
                f.check(isa + " rows " + std::to_string(m));
            }
            for (int64_t n : {1, 2, 7, 8, 9, 15, 16, 17, 1023, 1024, 1025}) {
                for (const char *layout : {"rbe22_g8", "rbe8x3_g8"}) {
                    Forward f(layout, 5, n, 3, random, Weight::kPacked);
                    f.reference();
                    f.check(isa + " columns " + std::to_string(n) + " " + layout);
                }
            }
        }
    }
}

TEST(Linear, PlannedPathsAtLargerSizes) {
    std::mt19937 random(3);
    for (const char *layout : {"rbe22_g64", "rbe8x2_g8", "rbe16s_g8"}) {
        for (int64_t tokens : {1, 4, 40, 300}) {
            Forward f(layout, 300, 520, tokens, random, Weight::kPacked);
            f.reference();
            f.check(std::string(layout) + " tokens " + std::to_string(tokens));
        }
    }
}

TEST(Linear, TypesAndStrides) {
    std::mt19937 random(4);
    for (rbe_dtype dtype : {RBE_F32, RBE_BF16, RBE_F16}) {
        for (Matrix::Shape in : {Matrix::kRows, Matrix::kPadded, Matrix::kTransposed, Matrix::kReversed, Matrix::kSpaced}) {
            for (Matrix::Shape out : {Matrix::kRows, Matrix::kTransposed, Matrix::kReversed}) {
                Forward f("rbe22_g16", 37, 300, 19, random, Weight::kWords, dtype, in, out);
                f.reference();
                for (const std::string &isa : host_isas()) {
                    for (rbe_path path : kExactPaths) {
                        const Using use(isa, path);
                        f.check(isa + " dtype " + std::to_string(dtype) + " shapes " + std::to_string(in) + std::to_string(out));
                    }
                }
            }
        }
    }
}

TEST(Linear, BroadcastInput) {
    std::mt19937 random(5);
    Forward f("rbe22_g16", 20, 50, 33, random);
    f.x.view.row_stride = 0;
    f.reference();
    for (const std::string &isa : host_isas()) {
        const Using use(isa, RBE_PATH_TABLE);
        f.check(isa);
    }
}

TEST(Linear, AmplitudesReplaceTheCodesOwn) {
    std::mt19937 random(6);
    for (const char *layout : {"rbe22_g16", "rbe32x2_g8", "rbe9r_g5", "rbe4r_g5", "rbe2r_g3"}) {
        Forward f(layout, 33, 70, 9, random, Weight::kAmplitude);
        f.reference();
        for (const std::string &isa : host_isas()) {
            for (rbe_path path : kExactPaths) {
                const Using use(isa, path);
                f.check(std::string(layout) + " " + isa);
            }
        }
    }
}

TEST(Linear, NonFiniteStaysInItsTokensRow) {
    std::mt19937 random(7);
    for (const char *layout : {"rbe22_g16", "rbe22_g36", "rbe8x2_g8", "rbe16s_g8"}) {
        for (const double bad : {(double)NAN, (double)INFINITY, -(double)INFINITY}) {
            Forward f(layout, 40, 72, 5, random, Weight::kPacked);
            f.x.set(3, 41, bad);
            for (const std::string &isa : host_isas()) {
                for (rbe_path path : kPaths) {
                    const Using use(isa, path);
                    f.run(RBE_ACCURACY_FAST);
                    for (int64_t t = 0; t < 5; ++t)
                        for (int64_t i = 0; i < 40; ++i) ASSERT_EQ(std::isfinite(f.y.at(t, i)), t != 3) << layout << " " << isa << " path " << path;
                }
            }
        }
    }
}

// What pads the last group of the basis must not reach a result, whatever it is.
TEST(Linear, PaddingOfTheBasisIsNeverRead) {
    std::mt19937 random(8);
    for (const char *layout : {"rbe22_g16", "rbe8x2_g8", "rbe8x2_g16"}) {
        Forward f(layout, 30, 8, 6, random, Weight::kPacked);
        f.reference();
        const int64_t g = f.weight.w.layout.group;
        if (g > 8)
            for (size_t i = 0; i < f.weight.basis.size(); ++i)
                if ((int64_t)i % g >= 8) f.weight.basis[i] = NAN;
        for (const std::string &isa : host_isas()) {
            for (rbe_path path : kExactPaths) {
                const Using use(isa, path);
                f.check(std::string(layout) + " " + isa);
            }
        }
    }
}

TEST(Linear, SameBitsRunToRunAndForAnyNumberOfThreads) {
    std::mt19937 random(9);
    for (const char *layout : {"rbe22_g16", "rbe8x2_g8", "rbe16s_g8"}) {
        for (int64_t tokens : {1, 2, 20, 130}) {
            for (rbe_path path : kPaths) {
                Forward f(layout, 203, 330, tokens, random, Weight::kPacked);
                const Using use(host_isas().back(), path);
                for (rbe_accuracy accuracy : {RBE_ACCURACY_FAST, RBE_ACCURACY_EXACT}) {
                    f.run(accuracy);
                    const std::vector<char> once = f.y.bytes;
                    for (int count : {1, 2, 3, 7}) {
                        const Threads threads(count);
                        std::fill(f.y.bytes.begin(), f.y.bytes.end(), (char)0x5A);
                        f.run(accuracy, &threads.parallel);
                        ASSERT_EQ(once, f.y.bytes) << layout << " tokens " << tokens << " path " << path << " threads " << count;
                    }
                }
            }
        }
    }
}

// Without byte tables the fast class rounds W to bfloat16 at most, as a dense bfloat16 layer does.
TEST(Linear, FastClassErrsAsBfloat16Weights) {
    std::mt19937 random(17);
    for (const char *layout : {"rbe22_g64", "rbe8x2_g8", "rbe16s_g8", "rbe8x2_g8+int8"}) {
        for (rbe_dtype dtype : {RBE_F32, RBE_BF16, RBE_F16}) {
            Forward f(layout, 50, 256, 40, random, Weight::kPacked, dtype);
            f.reference();
            for (const std::string &isa : host_isas()) {
                for (rbe_path path : {RBE_PATH_TABLE, RBE_PATH_DECODE}) {
                    const Using use(isa, path);
                    f.run(RBE_ACCURACY_FAST);
                    expect_near(f.y, f.truth, kFastError, std::string(layout) + " " + isa);
                }
            }
        }
    }
}

TEST(Linear, Float64TakesTheReference) {
    std::mt19937 random(12);
    Forward f("rbe22_g16", 9, 40, 3, random, Weight::kWords);
    std::vector<double> basis(f.weight.basis.begin(), f.weight.basis.end()), gain(f.weight.gain.begin(), f.weight.gain.end()),
        bias(f.weight.bias.begin(), f.weight.bias.end());
    Matrix x(RBE_F64, 3, 40), y(RBE_F64, 3, 9), truth(RBE_F64, 3, 9);
    x.fill(random);
    f.weight.w.real = RBE_F64;
    f.weight.w.basis = basis.data();
    f.weight.w.gain = gain.data();
    rbe_error err;
    ASSERT_EQ(rbe_linear(&f.weight.w, &x.view, bias.data(), &y.view, RBE_ACCURACY_AUTO, nullptr, &err), RBE_OK) << err.text;
    rbe_reference_linear(&f.weight.w, &x.view, bias.data(), &truth.view);
    ASSERT_EQ(y.bytes, truth.bytes);
}

TEST(Linear, RefusesWhatDoesNotFit) {
    std::mt19937 random(14);
    rbe_error err;
    const auto refused = [&](const char *word, const std::function<void(Forward &)> &spoil, const char *layout = "rbe22_g16") {
        Forward f(layout, 9, 40, 3, random);
        spoil(f);
        err.text[0] = 0;
        EXPECT_EQ(rbe_linear(&f.weight.w, &f.x.view, f.weight.bias.data(), &f.y.view, RBE_ACCURACY_AUTO, nullptr, &err), RBE_BAD_ARGUMENT);
        EXPECT_NE(std::string(err.text).find(word), std::string::npos) << err.text;
    };
    refused("gain: row 4", [](Forward &f) { f.weight.gain[4] = NAN; });
    refused("x: has 39 columns", [](Forward &f) { f.x.view.cols = 39; });
    refused("y: has 2 rows", [](Forward &f) { f.y.view.rows = 2; });
    refused("y: must have the dtype of x", [](Forward &f) { f.y.view.dtype = RBE_BF16; });
    refused("x: is float64", [](Forward &f) { f.x.view.dtype = RBE_F64; });
    refused("rounded", [](Forward &f) { f.weight.w.amplitude = f.weight.basis.data(), f.weight.w.rounded = false; });
    refused("amplitude", [](Forward &f) { f.weight.w.amplitude = f.weight.basis.data(); }, "rbe8_g8");
    refused("codes", [](Forward &f) { f.weight.words[5] = -1; });
    refused("residual_scale", [](Forward &f) { f.weight.w.residual.scale = nullptr; }, "rbe8_g8+int8");
    refused("residual_right: column 40", [](Forward &f) { f.weight.residual_right[4] = 40; }, "rbe8_g8+sp0.05");
    refused("basis", [](Forward &f) { f.weight.w.basis = nullptr; });
}

TEST(Linear, UnknownIsaIsRefusedAtFirstUse) {
    GTEST_FLAG_SET(death_test_style, "threadsafe");  // a fresh process: the choice is made once
    EXPECT_EXIT(
        {
            setenv("RBE_ISA", "sse9", 1);
            std::mt19937 random(15);
            Forward f("rbe22_g16", 9, 40, 3, random);
            rbe_error err;
            const rbe_status status = rbe_linear(&f.weight.w, &f.x.view, nullptr, &f.y.view, RBE_ACCURACY_AUTO, nullptr, &err);
            fprintf(stderr, "%s\n", err.text);
            exit(status == RBE_BAD_ARGUMENT ? 7 : 0);
        },
        testing::ExitedWithCode(7), "RBE_ISA: is 'sse9', but must be unset or one of scalar, avx2, avx512, neon");
    EXPECT_EXIT(
        {
            setenv("RBE_ISA", "scalar", 1);
            exit(std::string(rbe_isa_name()) == "scalar" ? 8 : 0);
        },
        testing::ExitedWithCode(8), "");
}

}  // namespace
