// rbe_cuda_linear_backward, the kernels themselves run on the CPU, against the float64 reference.
#include <algorithm>

#include "../c/backward_case.h"
#include "device_case.h"

namespace {

#if defined(EMU_TSAN)
const bool kRaces = true;  // a tenth of the speed: every kernel and path once
#else
const bool kRaces = false;
#endif

struct Backward : BackwardCase {
    Backward(const std::string &layout, int64_t m, int64_t n, int64_t tokens, std::mt19937 &random, Weight::Codes codes = Weight::kWords,
             rbe_dtype dtype = RBE_F32, Matrix::Shape shape = Matrix::kRows)
        : BackwardCase(layout, m, n, tokens, random, codes, dtype, shape) {
        reference();
    }
    void run() {
        Device device;
        rbe_error err;
        ASSERT_EQ(rbe_cuda_linear_backward(&weight.w, &dy.view, &x.view, &got.out, &device.device, &err), RBE_OK) << err.text;
    }
    void check(const std::string &what) {
        run();
        const double room = x.view.dtype == RBE_F32 ? kFloat32Error : kBfloat16Gradient;
        if (got.out.dx) expect_near(got.dx, truth.dx, room, what + " dx");
        if (got.out.basis) expect_rounded(got.basis, truth.basis, room, what + " dbasis");
        if (got.out.gain) expect_near(got.gain, truth.gain, room, what + " dgain");
        if (got.out.bias) expect_near(got.bias, truth.bias, kFloat32Error, what + " dbias");
        if (got.out.scale) expect_near(got.scale, truth.scale, room, what + " dscale");
        if (got.out.amplitude) expect_near(got.amplitude, truth.amplitude, room, what + " damplitude");
    }
};

const int kPaths[] = {RBE_CUDA_GATHER, RBE_CUDA_DECODE_GEMM};  // by table where there is one, and dense

// Every layout in float32; the half types, which differ in the table's type and in the kernels that read x, on one layout of each kind.
TEST(CudaBackward, BothWaysAndEveryLayoutAgreeWithTheReference) {
    std::mt19937 random(1);
    const std::vector<std::string> kinds = {"rbe22_g64", "rbe8x2_g8", "rbe16s_g8"};
    for (const std::string &layout : kRaces ? kinds : kCudaLayouts) {
        for (rbe_dtype dtype : {RBE_F32, RBE_BF16, RBE_F16}) {
            if (dtype != RBE_F32 && std::find(kinds.begin(), kinds.end(), layout) == kinds.end()) continue;
            if (kRaces && dtype == RBE_F16) continue;
            const bool narrow = layout.find("_g1") == layout.size() - 3 || layout.find("_g3") != std::string::npos;
            Backward b(layout, kRaces ? 20 : 43, narrow ? 10 : kRaces ? 37 : 70, 5, random, Weight::kPacked, dtype);
            for (int path : kPaths) {
                const OnPath on(path);
                b.check(layout + " path " + kPathNames[path] + " dtype " + std::to_string(dtype));
                if (::testing::Test::HasFatalFailure()) return;
            }
        }
    }
}

// More than 16 and more than 32 rows of one code, an odd number of tokens, and runs of rows and tokens.
TEST(CudaBackward, ManyRowsOfACodeAndProductsInPieces) {
    std::mt19937 random(2);
    for (const char *layout : {"rbe22_g16", "rbe8x2_g8", "rbe16s_g8"}) {
        for (rbe_dtype dtype : {RBE_F32, RBE_BF16}) {
            if (kRaces && dtype == RBE_F32) continue;
            Backward b(layout, kRaces ? 40 : 100, kRaces ? 16 : 40, kRaces ? 67 : 131, random, Weight::kWords, dtype);
            for (int32_t &word : b.weight.words) word = (int32_t)(((uint32_t)word & ~(254u << RBE_IDX_SHIFT)));  // idx 0 or 1
            rbe_reference_linear_backward(&b.weight.w, &b.dy.view, &b.x.view, &b.truth.out);
            for (int path : kPaths) {
                for (int64_t bytes : {0, 20000}) {
                    const OnPath on(path);
                    rbe_cuda_use_workspace(bytes);
                    b.check(std::string(layout) + " path " + kPathNames[path] + " workspace " + std::to_string(bytes));
                    rbe_cuda_use_workspace(0);
                    if (::testing::Test::HasFatalFailure()) return;
                }
            }
        }
    }
}

// dx = dy W of the codes by table, then dx += dy R: three products by cuBLASLt beside those of the table, in two pieces of rows.
TEST(CudaBackward, ResidualsOfEightBitsBesideCodesByTable) {
    std::mt19937 random(9);
    for (const char *layout : {"rbe22_g16+int8", "rbe8x2_g8+fp8"}) {
        for (rbe_dtype dtype : {RBE_F32, RBE_BF16, RBE_F16}) {
            if (kRaces && dtype != RBE_BF16) continue;
            Backward b(layout, 40, 50, 9, random, Weight::kPacked, dtype);
            const OnPath by_table(RBE_CUDA_GATHER);
            int calls[2];
            for (int pieces = 0; pieces < 2; ++pieces) {
                rbe_cuda_use_workspace(pieces ? 25 * 50 * (int64_t)b.x.size() : 0);
                calls[pieces] = standin("standin_calls");
                b.check(std::string(layout) + " dtype " + std::to_string(dtype));
                calls[pieces] = standin("standin_calls") - calls[pieces];
                rbe_cuda_use_workspace(0);
            }
            EXPECT_EQ(calls[1], calls[0] + 1) << layout;
        }
    }
}

TEST(CudaBackward, AmplitudesAndTheirGradient) {
    std::mt19937 random(3);
    for (const char *layout : {"rbe22_g16", "rbe32x2_g8", "rbe9r_g5"}) {
        if (kRaces && layout[3] != '2') continue;
        Backward b(layout, 33, kRaces ? 30 : 70, 9, random, Weight::kAmplitude);
        b.edge_amplitudes();
        rbe_reference_linear_backward(&b.weight.w, &b.dy.view, &b.x.view, &b.truth.out);
        for (int path : kPaths) {
            const OnPath on(path);
            b.check(std::string(layout) + " path " + kPathNames[path]);
        }
    }
}

TEST(CudaBackward, EachGradientAloneAndNoTokens) {
    std::mt19937 random(4);
    for (int path : kPaths) {
        const OnPath on(path);
        for (int which = 0; which < 6; ++which) {
            Backward b("rbe22_g16", 20, 50, 6, random, Weight::kAmplitude);
            rbe_gradients all = b.got.out;
            b.got.out = rbe_gradients{};
            if (which == 0) b.got.out.dx = all.dx;
            if (which == 1) b.got.out.basis = all.basis;
            if (which == 2) b.got.out.gain = all.gain;
            if (which == 3) b.got.out.bias = all.bias;
            if (which == 4) b.got.out.amplitude = all.amplitude;
            if (which == 5) b.got.out.scale = all.scale;
            b.check("gradient " + std::to_string(which));
        }
        Backward none("rbe8x2_g8", 20, 50, 0, random);
        none.check("no tokens");
    }
}

TEST(CudaBackward, StridesOfTheInputs) {
    std::mt19937 random(5);
    for (Matrix::Shape shape : {Matrix::kPadded, Matrix::kTransposed, Matrix::kReversed}) {
        if (kRaces) continue;
        for (int path : kPaths) {
            const OnPath on(path);
            Backward b("rbe22_g16", 20, 50, 6, random, Weight::kPacked, RBE_BF16, shape);
            b.check("shape " + std::to_string(shape));
        }
    }
}

TEST(CudaBackward, Float64ComputesInFloat64) {
    std::mt19937 random(6);
    for (const char *layout : {"rbe22x2_g8", "rbe16s_g8", "rbe8_g5+lr3"}) {
        if (kRaces) continue;
        Weight weight(layout, 13, 40, random, Weight::kPacked);
        const std::vector<double> basis(weight.basis.begin(), weight.basis.end()), gain(weight.gain.begin(), weight.gain.end());
        rbe_weight w = weight.w;
        w.real = RBE_F64;
        w.basis = basis.data();
        w.gain = gain.data();
        Matrix x(RBE_F64, 3, 40), dy(RBE_F64, 3, 13), dx(RBE_F64, 3, 40), true_dx(RBE_F64, 3, 40);
        x.fill(random);
        dy.fill(random);
        std::vector<double> got[3] = {std::vector<double>(basis.size()), std::vector<double>(13), std::vector<double>(13)},
                            truth[3] = {got[0], got[1], got[2]};
        const rbe_gradients out = {&dx.view, got[0].data(), got[1].data(), got[2].data(), nullptr, nullptr};
        const rbe_gradients want = {&true_dx.view, truth[0].data(), truth[1].data(), truth[2].data(), nullptr, nullptr};
        Device device;
        rbe_error err;
        rbe_reference_linear_backward(&w, &dy.view, &x.view, &want);
        ASSERT_EQ(rbe_cuda_linear_backward(&w, &dy.view, &x.view, &out, &device.device, &err), RBE_OK) << err.text;
        expect_near(dx, true_dx, 1e-13, layout);
        for (int g = 0; g < 3; ++g)
            for (size_t i = 0; i < got[g].size(); ++i)
                ASSERT_NEAR(got[g][i], truth[g][i], 1e-12 * rms(truth[g])) << layout << " gradient " << g;
    }
}

TEST(CudaBackward, SameBitsInEveryOrderOfThreadsAndBlocks) {
    std::mt19937 random(7);
    for (const char *layout : {"rbe22_g16", "rbe16s_g8"}) {
        for (int path : kPaths) {
            if (kRaces) continue;
            const OnPath on(path);
            Backward b(layout, 60, 70, 40, random, Weight::kPacked, RBE_BF16);
            const Gradients &g = b.got;
            const auto all = [&] { return std::make_tuple(g.dx.bytes, g.basis, g.gain, g.bias, g.scale); };
            b.run();
            const auto once = all();
            for (int order = 0; order < 3; ++order) {
                emu::options = {(uint64_t)order + 5, order};
                b.run();
                ASSERT_TRUE(once == all()) << layout << " " << kPathNames[path];
            }
            emu::options = {};
        }
    }
}

TEST(CudaBackward, RefusesWhatDoesNotFit) {
    std::mt19937 random(8);
    for (const Misfit &misfit : kMisfits) {
        Backward b("rbe22_g16", 9, 40, 3, random);
        misfit.spoil(b);
        Device device;
        rbe_error err;
        err.text[0] = 0;
        EXPECT_EQ(rbe_cuda_linear_backward(&b.weight.w, &b.dy.view, &b.x.view, &b.got.out, &device.device, &err), RBE_BAD_ARGUMENT);
        EXPECT_NE(std::string(err.text).find(misfit.word), std::string::npos) << err.text;
    }
}

}  // namespace

int main(int count, char **arguments) {
    setenv("RBE_CUBLASLT", CUBLASLT_STANDIN, 1);
    ::testing::InitGoogleTest(&count, arguments);
    return RUN_ALL_TESTS();
}
