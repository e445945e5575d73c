// rbe_linear_backward on every ISA the host has, both paths, every layout, shape class, type and stride, against the float64 reference.
#include "backward_case.h"

namespace {

const rbe_path kPaths[] = {RBE_PATH_TABLE, RBE_PATH_DECODE};

TEST(Backward, EveryIsaPathAndLayoutAgreesWithTheReference) {
    std::mt19937 random(1);
    for (const std::string &layout : kLayouts) {
        for (int64_t tokens : {1, 21}) {
            Backward b(layout, 43, 131, tokens, random, Weight::kPacked);
            b.reference();
            for (const std::string &isa : host_isas()) {
                for (rbe_path path : kPaths) {
                    const Using use(isa, path);
                    b.check(layout + " " + isa + " path " + std::to_string(path) + " tokens " + std::to_string(tokens));
                }
            }
        }
    }
}

TEST(Backward, SizesAroundEveryTileEdge) {
    std::mt19937 random(2);
    const auto check = [&](const char *layout, int64_t m, int64_t n, int64_t tokens) {
        Backward b(layout, m, n, tokens, random, Weight::kPacked);
        b.reference();
        for (const std::string &isa : host_isas()) {
            for (rbe_path path : kPaths) {
                const Using use(isa, path);
                b.check(isa + " path " + std::to_string(path) + " " + std::to_string(m) + " x " + std::to_string(n) + ", " + std::to_string(tokens));
            }
        }
    };
    for (int64_t tokens : {0, 1, 3, 4, 5, 16, 31, 32, 33, 63, 64, 65, 129}) check("rbe22_g16", 9, 20, tokens);
    for (int64_t m : {1, 2, 15, 16, 17, 95, 96, 97}) check("rbe8x2_g8", m, 20, 5);
    for (int64_t n : {1, 7, 8, 9, 255, 256, 257}) check("rbe22_g8", 3, n, 3);
    check("rbe22_g16", 10241, 16, 40);  // so many rows that a tile of dy is halved to fit the cache
}

TEST(Backward, MoreTokensThanABlock) {
    std::mt19937 random(3);
    for (const char *layout : {"rbe22_g8", "rbe16s_g8"}) {
        Backward b(layout, 5, 24, 600, random);
        b.reference();
        for (rbe_path path : kPaths) {
            const Using use(host_isas().back(), path);
            b.check(layout);
        }
    }
}

TEST(Backward, TypesAndStrides) {
    std::mt19937 random(4);
    for (rbe_dtype dtype : {RBE_F32, RBE_BF16, RBE_F16}) {
        for (Matrix::Shape in : {Matrix::kRows, Matrix::kPadded, Matrix::kTransposed, Matrix::kReversed, Matrix::kSpaced}) {
            for (Matrix::Shape out : {Matrix::kRows, Matrix::kTransposed, Matrix::kReversed}) {
                Backward b("rbe22_g16", 17, 50, 9, random, Weight::kWords, dtype, in, out);
                b.reference();
                for (const std::string &isa : host_isas()) {
                    for (rbe_path path : kPaths) {
                        const Using use(isa, path);
                        b.check(isa + " dtype " + std::to_string(dtype) + " shapes " + std::to_string(in) + std::to_string(out));
                    }
                }
            }
        }
    }
}

TEST(Backward, AmplitudesAndTheirGradient) {
    std::mt19937 random(5);
    for (const char *layout : {"rbe22_g16", "rbe32x2_g8", "rbe9r_g5", "rbe4r_g5", "rbe2r_g3"}) {
        Backward b(layout, 33, 70, 9, random, Weight::kAmplitude);
        b.edge_amplitudes();
        b.reference();
        for (const std::string &isa : host_isas()) {
            for (rbe_path path : kPaths) {
                const Using use(isa, path);
                b.check(std::string(layout) + " " + isa);
            }
        }
    }
}

TEST(Backward, ZeroGainStillHasAGradient) {
    std::mt19937 random(6);
    Backward b("rbe22_g16", 20, 40, 9, random, Weight::kAmplitude);
    b.weight.gain[3] = 0.0f;
    b.reference();
    ASSERT_NE(b.truth.gain[3], 0.0f);
    for (const std::string &isa : host_isas()) {
        for (rbe_path path : kPaths) {
            const Using use(isa, path);
            b.check(isa);
        }
    }
}

TEST(Backward, EachGradientAlone) {
    std::mt19937 random(7);
    for (int wanted = 0; wanted < 6; ++wanted) {
        Backward b("rbe22_g16", 20, 40, 9, random, Weight::kAmplitude);
        b.reference();
        b.want(wanted);
        for (rbe_path path : kPaths) {
            const Using use(host_isas().back(), path);
            b.check("only " + std::to_string(wanted));
        }
    }
}

TEST(Backward, NonFiniteStaysInItsTokensRowOfDx) {
    std::mt19937 random(8);
    for (const char *layout : {"rbe22_g16", "rbe16s_g8"}) {
        for (const double bad : {(double)NAN, (double)INFINITY}) {
            Backward b(layout, 40, 70, 5, random);
            b.dy.set(2, 11, bad);
            for (const std::string &isa : host_isas()) {
                for (rbe_path path : kPaths) {
                    const Using use(isa, path);
                    b.run();
                    for (int64_t t = 0; t < 5; ++t)
                        for (int64_t j = 0; j < 70; ++j) ASSERT_EQ(std::isfinite(b.got.dx.at(t, j)), t != 2) << layout << " " << isa << " path " << path;
                    ASSERT_FALSE(std::isfinite(b.got.bias[11]));
                    ASSERT_FALSE(std::isfinite(b.got.gain[11]));
                    ASSERT_TRUE(std::isfinite(b.got.gain[12]));
                }
            }
        }
    }
}

TEST(Backward, SameBitsRunToRunAndForAnyNumberOfThreads) {
    std::mt19937 random(9);
    for (const char *layout : {"rbe22_g16", "rbe8x2_g8", "rbe16s_g8"}) {
        for (rbe_path path : kPaths) {
            Backward b(layout, 150, 700, 70, random, Weight::kPacked, RBE_BF16);
            const Using use(host_isas().back(), path);
            b.run();
            const Gradients &g = b.got;
            const auto all = [&] { return std::make_tuple(g.dx.bytes, g.basis, g.gain, g.bias, g.scale); };
            const auto once = all();
            for (int count : {1, 2, 3, 7}) {
                const Threads threads(count);
                b.run(&threads.parallel);
                ASSERT_TRUE(once == all()) << layout << " path " << path << " threads " << count;
            }
        }
    }
}

TEST(Backward, RefusesWhatDoesNotFit) {
    std::mt19937 random(10);
    for (const Misfit &misfit : kMisfits) {
        Backward b("rbe22_g16", 9, 40, 3, random);
        misfit.spoil(b);
        rbe_error err;
        err.text[0] = 0;
        EXPECT_EQ(rbe_linear_backward(&b.weight.w, &b.dy.view, &b.x.view, &b.got.out, RBE_ACCURACY_AUTO, nullptr, &err), RBE_BAD_ARGUMENT);
        EXPECT_NE(std::string(err.text).find(misfit.word), std::string::npos) << err.text;
    }
}

}  // namespace
