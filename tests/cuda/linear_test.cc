// rbe_cuda_linear, the kernels themselves run on the CPU, against the float64 reference.
#include "device_case.h"
#include "kernels/cuda/cu.h"

namespace {

struct Product {
    Weight weight;
    Matrix x, got, truth;
    Product(const std::string &layout, int64_t rows, int64_t cols, int64_t tokens, std::mt19937 &random, rbe_dtype dtype,
            Weight::Codes codes = Weight::kWords, Matrix::Shape shape = Matrix::kRows)
        : weight(layout, rows, cols, random, codes), x(dtype, tokens, cols, shape), got(dtype, tokens, rows), truth(RBE_F64, tokens, rows) {
        x.fill(random);
        rbe_reference_linear(&weight.w, &x.view, weight.bias.data(), &truth.view);
    }
    void run(rbe_accuracy accuracy = RBE_ACCURACY_AUTO) {
        Device device;
        rbe_error err;
        std::memset(got.view.data, 0xFF, (size_t)(got.view.rows * got.view.cols * got.size()));
        ASSERT_EQ(rbe_cuda_linear(&weight.w, &x.view, weight.bias.data(), &got.view, accuracy, &device.device, &err), RBE_OK) << err.text;
    }
};

double room(rbe_dtype dtype) { return dtype == RBE_F32 ? kFloat32Error : kBfloat16Table; }

#if defined(EMU_TSAN)
const bool kRaces = true;  // a tenth of the speed: every kernel and path once
#else
const bool kRaces = false;
#endif

TEST(CudaLinear, EveryPathAndLayoutAgreesWithTheReference) {
    std::mt19937 random(1);
    const std::vector<std::string> kinds = {"rbe22_g64", "rbe32_g16", "rbe8x2_g8", "rbe16s_g8", "rbe22x2_g3"};
    for (const std::string &layout : kRaces ? kinds : kCudaLayouts) {
        for (rbe_dtype dtype : {RBE_F32, RBE_BF16, RBE_F16}) {
            if (kRaces && dtype == RBE_F16) continue;
            Product p(layout, kRaces ? 40 : 70, kRaces ? 70 : 150, 3, random, dtype, dtype == RBE_BF16 ? Weight::kPacked : Weight::kWords);
            for (int path = RBE_CUDA_LOOKUP; path <= RBE_CUDA_DECODE_GEMM; ++path) {
                const OnPath on(path);
                p.run();
                expect_near(p.got, p.truth, room(dtype), layout + " " + kPathNames[path] + " dtype " + std::to_string(dtype));
                if (::testing::Test::HasFatalFailure()) return;
            }
        }
    }
}

TEST(CudaLinear, SizesAroundEveryTileEdge) {
    std::mt19937 random(2);
    struct {
        const char *layout;
        int path;
        rbe_dtype dtype;
        int64_t rows, cols, tokens;
    } cases[] = {
        {"rbe22_g64", RBE_CUDA_TILES, RBE_BF16, 513, 200, 65}, {"rbe22_g100", RBE_CUDA_TILES, RBE_F16, 33, 250, 64},
        {"rbe32x2_g16", RBE_CUDA_TILES, RBE_BF16, 512, 40, 3}, {"rbe22_g128", RBE_CUDA_TILES, RBE_BF16, 20, 256, 70},
        {"rbe22_g3", RBE_CUDA_TILES, RBE_BF16, 20, 16, 5},     {"rbe22_g16", RBE_CUDA_GATHER, RBE_F32, 513, 40, 33},
        {"rbe22_g16", RBE_CUDA_GATHER, RBE_F32, 5, 33, 64},    {"rbe8x2_g8", RBE_CUDA_LOOKUP, RBE_BF16, 300, 256, 1},
        {"rbe8x2_g8", RBE_CUDA_LOOKUP, RBE_F32, 257, 264, 4},  {"rbe8x3_g5", RBE_CUDA_LOOKUP, RBE_F32, 9, 131, 3},
        {"rbe8_g8", RBE_CUDA_LOOKUP, RBE_F16, 70, 1100, 2},    {"rbe8x2_g16", RBE_CUDA_LOOKUP, RBE_F32, 3, 16, 1},
        {"rbe8x2_g8", RBE_CUDA_DECODE_MMA, RBE_BF16, 129, 65, 129}, {"rbe16s_g8", RBE_CUDA_DECODE_MMA, RBE_F16, 128, 136, 17},
        {"rbe16s_g8", RBE_CUDA_DECODE_MMA, RBE_BF16, 5, 520, 1},    {"rbe8x2_g8+int8", RBE_CUDA_DECODE_MMA, RBE_BF16, 7, 300, 50},
        {"rbe9r_g8", RBE_CUDA_TOKEN, RBE_F32, 17, 300, 16},    {"rbe22_g64", RBE_CUDA_TOKEN, RBE_BF16, 9, 65, 5},
        {"rbe8x2_g8", RBE_CUDA_FRAGMENTS, RBE_BF16, 97, 264, 17},   {"rbe8_g8", RBE_CUDA_FRAGMENTS, RBE_F16, 95, 512, 16},
        {"rbe8x3_g8", RBE_CUDA_FRAGMENTS, RBE_BF16, 66, 129, 3},    {"rbe8x4_g8", RBE_CUDA_FRAGMENTS, RBE_F16, 5, 65, 129},
        {"rbe16s_g8", RBE_CUDA_FRAGMENTS, RBE_BF16, 257, 256, 130}, {"rbe16sx2_g8", RBE_CUDA_FRAGMENTS, RBE_F16, 31, 71, 50},
        {"rbe8x2_g8", RBE_CUDA_FRAGMENTS, RBE_BF16, 9, 2304, 2},    {"rbe8x2_g8", RBE_CUDA_FRAGMENTS, RBE_F16, 300, 512, 60},
    };
    for (const auto &c : cases) {
        if (kRaces && c.rows * c.tokens * c.cols > 600000) continue;
        Product p(c.layout, c.rows, c.cols, c.tokens, random, c.dtype, Weight::kPacked);
        const OnPath on(c.path);
        p.run();
        expect_rounded(p.got, p.truth, room(c.dtype), std::string(c.layout) + " " + kPathNames[c.path] + " " + std::to_string(c.rows));
        if (::testing::Test::HasFatalFailure()) return;
    }
}

TEST(CudaLinear, GroupsOfEightWithoutAScaleAreDecodedIntoRegisters) {
    struct {
        const char *layout;
        rbe_dtype dtype;
        int64_t tokens;
        int path;
    } cases[] = {
        {"rbe8x2_g8", RBE_BF16, 1, RBE_CUDA_LOOKUP},      {"rbe8x2_g8", RBE_BF16, 2, RBE_CUDA_FRAGMENTS},      {"rbe8x4_g8", RBE_F16, 2048, RBE_CUDA_FRAGMENTS},
        {"rbe16s_g8", RBE_F16, 1, RBE_CUDA_FRAGMENTS},    {"rbe16sx2_g8", RBE_BF16, 16, RBE_CUDA_FRAGMENTS},   {"rbe8x5_g8", RBE_BF16, 16, RBE_CUDA_DECODE_MMA},
        {"rbe8x2_g16", RBE_BF16, 16, RBE_CUDA_DECODE_MMA}, {"rbe8x2_g8+int8", RBE_BF16, 16, RBE_CUDA_DECODE_MMA}, {"rbe8x2_g8", RBE_F32, 16, RBE_CUDA_DECODE_GEMM},
    };
    for (const auto &c : cases) {
        rbe_layout layout;
        rbe_error err;
        ASSERT_EQ(rbe_layout_parse(c.layout, std::strlen(c.layout), &layout, &err), RBE_OK) << err.text;
        EXPECT_EQ(rbe_cuda_plan(&layout, c.dtype, 4096, 4096, c.tokens), c.path) << c.layout << " " << c.tokens;
    }
}

TEST(CudaLinear, StridesAndUnalignedRows) {
    std::mt19937 random(3);
    for (Matrix::Shape shape : {Matrix::kPadded, Matrix::kTransposed, Matrix::kReversed, Matrix::kSpaced}) {
        for (const char *layout : {"rbe22_g16", "rbe8x2_g8", "rbe16s_g8"}) {
            for (rbe_dtype dtype : {RBE_F32, RBE_BF16}) {
                if (kRaces && shape != Matrix::kPadded) continue;
                Product p(layout, 20, 70, 5, random, dtype, Weight::kPacked, shape);
                p.run();
                expect_near(p.got, p.truth, room(dtype), std::string(layout) + " shape " + std::to_string(shape));
                if (::testing::Test::HasFatalFailure()) return;
            }
        }
    }
}

TEST(CudaLinear, AmplitudesReplaceTheCodesOwn) {
    std::mt19937 random(4);
    for (const char *layout : {"rbe22_g16", "rbe32_g8", "rbe9rx2_g8"}) {
        for (int path : {RBE_CUDA_TOKEN, RBE_CUDA_GATHER, RBE_CUDA_DECODE_GEMM}) {
            Product p(layout, 20, 50, 3, random, RBE_F32, Weight::kAmplitude);
            const OnPath on(path);
            p.run();
            expect_near(p.got, p.truth, kFloat32Error, layout);
        }
    }
}

TEST(CudaLinear, TheExactClassComputesHalfTypesInFloat32) {
    std::mt19937 random(5);
    for (const char *layout : {"rbe22_g16", "rbe8x2_g8", "rbe16s_g8"}) {
        Product p(layout, 30, 90, 6, random, RBE_BF16);
        p.run(RBE_ACCURACY_EXACT);
        expect_near(p.got, p.truth, kFloat32Error, layout);
    }
}

TEST(CudaLinear, Float64ComputesInFloat64) {
    std::mt19937 random(6);
    for (const char *layout : {"rbe22_g16", "rbe8x2_g8+fp8", "rbe16s_g8+sp0.05", "rbe8_g8+lr3"}) {
        Product p(layout, 13, 70, 3, random, RBE_F32);
        const std::vector<double> basis(p.weight.basis.begin(), p.weight.basis.end()), gain(p.weight.gain.begin(), p.weight.gain.end());
        const std::vector<double> bias(p.weight.bias.begin(), p.weight.bias.end());
        rbe_weight w = p.weight.w;
        w.real = RBE_F64;
        w.basis = basis.data();
        w.gain = gain.data();
        Matrix x(RBE_F64, 3, 70), got(RBE_F64, 3, 13), truth(RBE_F64, 3, 13);
        x.fill(random);
        rbe_reference_linear(&w, &x.view, bias.data(), &truth.view);
        Device device;
        rbe_error err;
        ASSERT_EQ(rbe_cuda_linear(&w, &x.view, bias.data(), &got.view, RBE_ACCURACY_AUTO, &device.device, &err), RBE_OK) << err.text;
        expect_near(got, truth, 1e-13, layout);
    }
}

// x rounded to int8 or e4m3 for the residual alone, which is a twentieth of the weight here; sums of bfloat16 beside it.
TEST(CudaLinear, FastResidualsAreMultipliedInEightBits) {
    std::mt19937 random(13);
    struct {
        const char *layout;
        rbe_dtype dtype;
        int64_t rows, cols, tokens;
        bool apart;
    } cases[] = {
        {"rbe8x2_g8+int8", RBE_BF16, 32, 80, 3, true},  {"rbe22_g16+fp8", RBE_F16, 48, 64, 17, false}, {"rbe22_g64+fp8", RBE_BF16, 32, 80, 16, true},
        {"rbe8_g8+int8", RBE_F32, 16, 48, 2, true},     {"rbe8x2_g8+int8", RBE_BF16, 31, 80, 3, false}, {"rbe8x2_g8+fp8", RBE_BF16, 32, 72, 3, false},
    };
    for (const auto &c : cases) {
        if (kRaces && c.dtype != RBE_BF16) continue;
        Product p(c.layout, c.rows, c.cols, c.tokens, random, c.dtype);
        const int calls = standin("standin_calls");
        p.run(RBE_ACCURACY_FAST);
        EXPECT_EQ(standin("standin_calls") - calls, c.apart ? 1 : 0) << c.layout;
        expect_rounded(p.got, p.truth, kBfloat16Table, c.layout);
    }
    rbe_cuda_use_workspace(1);  // 16 tokens at a time
    Product p("rbe22_g16+int8", 32, 48, 40, random, RBE_BF16);
    const OnPath on(RBE_CUDA_TILES);
    const int calls = standin("standin_calls");
    p.run(RBE_ACCURACY_FAST);
    rbe_cuda_use_workspace(0);
    EXPECT_EQ(standin("standin_calls") - calls, 3);
    expect_rounded(p.got, p.truth, kBfloat16Table, "pieces");
}

TEST(CudaLinear, HardwareWithoutFp8AddsTheResidualWhereItDecodes) {
    std::mt19937 random(14);
    for (int capability : {80, 86, 89, 90, 120}) {
        emu::options.capability = capability;
        Product fp8("rbe8x2_g8+fp8", 32, 48, 2, random, RBE_BF16), int8("rbe8x2_g8+int8", 32, 48, 2, random, RBE_BF16);
        const int calls = standin("standin_calls");
        fp8.run(RBE_ACCURACY_FAST);
        EXPECT_EQ(standin("standin_calls") - calls, capability >= 89) << capability;
        int8.run(RBE_ACCURACY_FAST);
        EXPECT_EQ(standin("standin_calls") - calls, 1 + (capability >= 89)) << capability;
        expect_near(fp8.got, fp8.truth, kBfloat16Table, "fp8");
        expect_near(int8.got, int8.truth, kBfloat16Table, "int8");
    }
    emu::options = {};
}

TEST(CudaLinear, LowRankIsTwoProductsBesideTheCodes) {
    std::mt19937 random(15);
    for (rbe_dtype dtype : {RBE_F32, RBE_BF16, RBE_F16}) {
        Product p("rbe8x2_g8+lr5", 20, 72, 3, random, dtype, Weight::kPacked);
        const int calls = standin("standin_calls");
        p.run();
        EXPECT_EQ(standin("standin_calls") - calls, 2);  // and the codes by lookup
        expect_near(p.got, p.truth, room(dtype), "lowrank");
    }
}

static __global__ void narrow_to_e4m3(const float *from, int count, uint8_t *to) {
    const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < count) to[i] = cu_f32_to_e4m3(from[i]);
}

TEST(CudaLinear, E4m3IsTheNearestTiesToEven) {
    std::vector<float> values;
    for (int b = 0; b < 0x7F; ++b) values.push_back(cu_e4m3_to_f32((uint8_t)b));
    std::vector<float> from = {0.0f, -0.0f, 448.0f, 449.0f, 1e9f, -1e9f, INFINITY};
    for (size_t i = 0; i + 1 < values.size(); ++i)
        for (float share : {0.0f, 0.25f, 0.5f, 0.75f}) from.push_back(values[i] + share * (values[i + 1] - values[i]));
    std::vector<uint8_t> to(from.size());
    ASSERT_EQ(cu_launch(narrow_to_e4m3, dim3(3), dim3(256), 0, nullptr, from.data(), (int)from.size(), to.data()), 0);
    for (size_t i = 0; i < from.size(); ++i) {
        const float size = std::min(std::fabs(from[i]), 448.0f);
        size_t best = 0;
        for (size_t j = 1; j < values.size(); ++j) {
            const float d = std::fabs(values[j] - size), least = std::fabs(values[best] - size);
            if (d < least || (d == least && j % 2 == 0)) best = j;
        }
        ASSERT_EQ(to[i], best | (std::signbit(from[i]) ? 0x80 : 0)) << from[i];
    }
}

TEST(CudaLinear, NonFiniteStaysInItsTokensRow) {
    std::mt19937 random(7);
    for (const char *layout : {"rbe22_g16", "rbe8x2_g8", "rbe16s_g8"}) {
        for (int path = RBE_CUDA_LOOKUP; path <= RBE_CUDA_DECODE_GEMM; ++path) {
            for (rbe_dtype dtype : {RBE_F32, RBE_BF16}) {
                if (kRaces) continue;
                Product p(layout, 20, 70, 3, random, dtype);
                p.x.set(1, 11, std::nan(""));
                const OnPath on(path);
                p.run();
                for (int64_t t = 0; t < 3; ++t)
                    for (int64_t i = 0; i < 20; ++i) ASSERT_EQ(std::isfinite(p.got.at(t, i)), t != 1) << layout << " " << kPathNames[path];
            }
        }
    }
}

TEST(CudaLinear, SameBitsInEveryOrderOfThreadsAndBlocks) {
    std::mt19937 random(8);
    for (const char *layout : {"rbe22_g16", "rbe8x2_g8", "rbe16s_g8"}) {
        for (int path = RBE_CUDA_LOOKUP; path <= RBE_CUDA_DECODE_GEMM; ++path) {
            Product p(layout, 40, 300, 3, random, RBE_BF16, Weight::kPacked);
            const OnPath on(path);
            std::vector<char> first;
            for (int order = 0; order < (kRaces ? 1 : 3); ++order) {
                emu::options = {(uint64_t)order + 5, order};
                p.run();
                if (order == 0) first = p.got.bytes;
                ASSERT_TRUE(first == p.got.bytes) << layout << " " << kPathNames[path];
            }
            emu::options = {};
        }
    }
}

TEST(CudaLinear, InterleavedCodes) {
    std::mt19937 random(9);
    Product p("rbe8x2_g8", 130, 50, 3, random, RBE_F32, Weight::kPacked);
    const int64_t count = p.weight.w.groups * 2;
    std::vector<uint8_t> tiles((size_t)(3 * count * 64)), back((size_t)(130 * count));
    Device device;
    rbe_error err;
    ASSERT_EQ(rbe_cuda_interleave(p.weight.packed.data(), 130, count, tiles.data(), &device.device, &err), RBE_OK) << err.text;
    for (int64_t i = 0; i < 192; ++i)
        for (int64_t q = 0; q < count; ++q)
            ASSERT_EQ(tiles[(size_t)((i / 64 * count + q) * 64 + i % 64)], i < 130 ? p.weight.packed[(size_t)(i * count + q)] : 0);
    ASSERT_EQ(rbe_cuda_deinterleave(tiles.data(), 130, count, back.data(), &device.device, &err), RBE_OK) << err.text;
    ASSERT_TRUE(back == p.weight.packed);
    p.weight.w.interleaved = tiles.data();
    p.weight.w.packed = nullptr;
    p.run();
    expect_near(p.got, p.truth, kFloat32Error, "interleaved");
}

TEST(CudaLinear, ShapesAreSearchedOnceAndNothingIsLeft) {
    std::mt19937 random(10);
    Product p("rbe22_g16", 20, 70, 5, random, RBE_F32);
    const OnPath on(RBE_CUDA_GATHER);
    p.run();
    const int searches = standin("standin_searches"), calls = standin("standin_calls");
    p.run();
    EXPECT_EQ(standin("standin_searches"), searches);
    EXPECT_GT(standin("standin_calls"), calls);
    EXPECT_EQ(standin("standin_objects"), 0);
}

TEST(CudaLinear, RefusesWhatDoesNotFit) {
    std::mt19937 random(11);
    const auto refused = [&](const char *word, const std::function<void(Product &)> &spoil) {
        Product p("rbe22_g16", 9, 40, 3, random, RBE_F32);
        spoil(p);
        Device device;
        rbe_error err;
        err.text[0] = 0;
        EXPECT_EQ(rbe_cuda_linear(&p.weight.w, &p.x.view, nullptr, &p.got.view, RBE_ACCURACY_AUTO, &device.device, &err), RBE_BAD_ARGUMENT);
        EXPECT_NE(std::string(err.text).find(word), std::string::npos) << err.text;
    };
    refused("x: has 41 columns", [](Product &p) { p.x.view.cols = 41; });
    refused("y: has 4 rows", [](Product &p) { p.got.view.rows = 4; });
    refused("y: must have the dtype of x", [](Product &p) { p.got.view.dtype = RBE_F16; });
    refused("codes: exactly one", [](Product &p) { p.weight.w.words = nullptr; });
    refused("gain: is missing", [](Product &p) { p.weight.w.gain = nullptr; });
    refused("groups a row", [](Product &p) { p.weight.w.groups = 9; });
}

TEST(CudaLinear, MissingMemoryIsReported) {
    std::mt19937 random(12);
    Product p("rbe22_g16", 9, 40, 3, random, RBE_F32);
    rbe_products products{nullptr, 0};
    rbe_device none = {[](void *, size_t) -> void * { return nullptr; }, nullptr, &products, nullptr, 0};
    rbe_error err;
    EXPECT_EQ(rbe_cuda_linear(&p.weight.w, &p.x.view, nullptr, &p.got.view, RBE_ACCURACY_AUTO, &none, &err), RBE_OUT_OF_MEMORY);
}

}  // namespace

int main(int count, char **arguments) {
    setenv("RBE_CUBLASLT", CUBLASLT_STANDIN, 1);
    ::testing::InitGoogleTest(&count, arguments);
    return RUN_ALL_TESTS();
}
