// Decoding, packing, checks and copies on the device, run on the CPU: bit for bit what the C code gives.
#include "device_case.h"
#include "kernels/cuda/codes.cuh"

namespace {

TEST(CudaCodes, DecodedWeightsAreThoseOfTheReference) {
    std::mt19937 random(1);
    for (const std::string &layout : kCudaLayouts) {
        for (Weight::Codes form : {Weight::kWords, Weight::kPacked}) {
            Weight weight(layout, 11, 70, random, form);
            std::vector<float> got(11 * 70), truth(11 * 70);
            Device device;
            rbe_error err;
            ASSERT_EQ(rbe_cuda_decode(&weight.w, got.data(), &device.device, &err), RBE_OK) << err.text;
            rbe_reference_decode(&weight.w, truth.data());
            expect_near(got, truth, kFloat32Error, layout);
        }
    }
}

static __global__ void scales(rbe_cu_codes codes, float *out) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < codes.rows) out[i] = cu_scale<float>(codes, cu_word(codes, i, 0), i, 0);
}

TEST(CudaCodes, ScalesAreThoseOfTheReferenceBitForBit) {
    std::mt19937 random(2);
    for (rbe_field field : {RBE_FIELD_RBE22, RBE_FIELD_RBE32, RBE_FIELD_RBE9R, RBE_FIELD_RBE4R, RBE_FIELD_RBE2R}) {
        std::vector<int32_t> words(4096);
        std::vector<float> got(words.size()), amplitude(words.size());
        for (int32_t &w : words) w = (int32_t)(((uint32_t)random() & rbe_field_mask(field)) | rbe_field_constant(field));
        std::normal_distribution<float> normal;
        for (float &a : amplitude) a = 0.6f * normal(random);
        amplitude[0] = 1.0f, amplitude[1] = -0.0f, amplitude[2] = 0x1p-9f, amplitude[3] = -0x1.fep-1f;
        rbe_cu_codes codes = {};
        codes.words = words.data();
        codes.rows = (int64_t)words.size(), codes.cols = codes.groups = 1;
        codes.stages = codes.group = 1;
        codes.field = field;
        codes.scaled = true;
        codes.seeded = rbe_field_seeded(field);
        codes.unstored = rbe_field_amp_unstored(field);
        codes.constant = rbe_field_constant(field);
        codes.rounded = true;
        for (bool with : {false, true}) {
            codes.amplitude = with ? amplitude.data() : nullptr;
            ASSERT_EQ(cu_launch(scales, dim3(16), dim3(256), 0, nullptr, codes, got.data()), 0);
            for (size_t i = 0; i < words.size(); ++i) {
                const uint32_t word = with ? rbe_reference_amplitude_word(field, (uint32_t)words[i], amplitude[i]) : (uint32_t)words[i];
                ASSERT_EQ(got[i], rbe_reference_scale(field, word)) << i;
            }
        }
    }
}

TEST(CudaCodes, PackedBytesAreThoseOfTheCpuAndComeBack) {
    std::mt19937 random(3);
    for (const char *layout : {"rbe32_g8", "rbe22_g8", "rbe8x3_g4", "rbe16s_g8", "rbe9r_g7", "rbe4r_g8", "rbe2rx2_g8"}) {
        for (int64_t cols : {1, 8, 40, 61}) {
            Weight weight(layout, 7, cols, random);
            rbe_error err;
            Device device;
            const int64_t bytes = rbe_packed_row_bytes(&weight.w.layout, weight.w.groups);
            std::vector<uint8_t> got((size_t)(7 * bytes), 0xFF), truth(got.size());
            ASSERT_EQ(rbe_pack(&weight.w, truth.data(), &err), RBE_OK) << err.text;
            ASSERT_EQ(rbe_cuda_pack(&weight.w, got.data(), &device.device, &err), RBE_OK) << err.text;
            ASSERT_TRUE(got == truth) << layout << " " << cols;
            rbe_weight packed = weight.w;
            packed.words = nullptr;
            packed.packed = got.data();
            packed.packed_stride = bytes;
            std::vector<int32_t> words(weight.words.size(), -1);
            ASSERT_EQ(rbe_cuda_unpack(&packed, words.data(), &device.device, &err), RBE_OK) << err.text;
            ASSERT_TRUE(words == weight.words) << layout << " " << cols;
        }
    }
}

TEST(CudaCodes, RefusesBitsOutsideTheLayoutAtTheirPlace) {
    std::mt19937 random(4);
    Device device;
    rbe_error err;
    Weight words("rbe22_g8", 5, 19, random);
    std::vector<uint8_t> bytes(5 * 9);
    words.words[3 * 3 + 1] |= 1 << 30;
    words.words[4 * 3 + 2] |= 1 << 30;
    EXPECT_EQ(rbe_cuda_pack(&words.w, bytes.data(), &device.device, &err), RBE_BAD_ARGUMENT);
    EXPECT_NE(std::string(err.text).find("row 3, group 1, stage 0"), std::string::npos) << err.text;
    Weight packed("rbe22_g8", 5, 19, random, Weight::kPacked);
    packed.packed[2 * 9 + 8] |= 0x80;
    std::vector<int32_t> out(15);
    EXPECT_EQ(rbe_cuda_unpack(&packed.w, out.data(), &device.device, &err), RBE_BAD_ARGUMENT);
    EXPECT_NE(std::string(err.text).find("row 2 has padding bits"), std::string::npos) << err.text;
    Weight seeded("rbe9r_g7", 5, 19, random);
    seeded.w.seed ^= 1;
    EXPECT_EQ(rbe_cuda_pack(&seeded.w, bytes.data(), &device.device, &err), RBE_BAD_ARGUMENT);
    EXPECT_NE(std::string(err.text).find("seed"), std::string::npos) << err.text;
}

TEST(CudaCodes, AnyWordsAreSafeToRead) {
    std::mt19937 random(5);
    for (const char *layout : {"rbe22_g8", "rbe8x2_g8+sp0.2", "rbe16s_g8"}) {
        Weight weight(layout, 5, 40, random);
        for (int32_t &w : weight.words) w = (int32_t)random();
        if (!weight.residual_right.empty()) std::memset(weight.residual_right.data(), 0x7F, weight.residual_right.size());
        std::vector<float> got(5 * 40);
        Device device;
        rbe_error err;
        ASSERT_EQ(rbe_cuda_decode(&weight.w, got.data(), &device.device, &err), RBE_OK) << err.text;
    }
}

TEST(CudaCodes, CopiesFollowStridesAndConvert) {
    std::vector<double> from(2 * 3 * 4 * 5);
    for (size_t i = 0; i < from.size(); ++i) from[i] = (double)i / 8.0;
    const rbe_cu_strided view = {from.data() + 4, 8, RBE_F64, 3, {3, 2, 5}, {20, 60, -1}};
    std::vector<uint16_t> got(30);
    ASSERT_EQ(rbe_cu_copy(&view, true, got.data(), RBE_BF16, nullptr), 0);
    for (int a = 0; a < 3; ++a)
        for (int b = 0; b < 2; ++b)
            for (int c = 0; c < 5; ++c)
                ASSERT_EQ(got[(size_t)((a * 2 + b) * 5 + c)], rbe_reference_f64_to_bf16(from[(size_t)(4 + a * 20 + b * 60 - c)]));
}

TEST(CudaCodes, SortedRowsAreStable) {
    std::mt19937 random(6);
    for (int64_t rows : {1, 31, 256, 700}) {
        std::vector<uint8_t> idx((size_t)(2 * 720));
        for (uint8_t &i : idx) i = (uint8_t)(random() % (rows > 300 ? 7 : 256));
        std::vector<int32_t> order((size_t)(2 * rows), -1), start(2 * 257, -1);
        ASSERT_EQ(rbe_cu_sort(idx.data(), 720, rows, 2, order.data(), start.data(), nullptr), 0);
        for (int q = 0; q < 2; ++q) {
            int64_t at = 0;
            for (int j = 0; j < 256; ++j) {
                ASSERT_EQ(start[(size_t)(q * 257 + j)], at);
                for (int64_t i = 0; i < rows; ++i) {
                    if (idx[(size_t)(q * 720 + i)] != j) continue;
                    ASSERT_EQ(order[(size_t)(q * rows + at++)], i);
                }
            }
            ASSERT_EQ(start[(size_t)(q * 257 + 256)], rows);
        }
    }
}

TEST(CudaCodes, GradientsOfADecodedWeightAreThoseOfTheCpu) {
    std::mt19937 random(8);
    for (const char *layout : {"rbe22_g8", "rbe8x2_g8", "rbe16s_g8", "rbe4r_g8"}) {
        for (Weight::Codes form : {Weight::kWords, Weight::kPacked}) {
            Weight weight(layout, 30, 45, random, form);
            std::vector<float> dense(30 * 45), basis(weight.basis.size(), NAN), gain(30, NAN), true_basis(basis.size()), true_gain(30);
            std::normal_distribution<float> normal;
            for (float &d : dense) d = normal(random);
            for (int64_t i = 0; i < 30; ++i) {  // straight from FORMAT
                double sum = 0;
                for (int64_t j = 0; j < 45; ++j)
                    for (int64_t s = 0; s < weight.w.layout.stages; ++s)
                        sum += dense[(size_t)(i * 45 + j)] * rbe_reference_code_scale(&weight.w, i, j / 8, s) *
                               rbe_reference_code_element(&weight.w, i, j / 8, s, j % 8);
                true_gain[(size_t)i] = (float)sum;
                for (int64_t j = 0; j < 45; ++j) {
                    for (int64_t s = 0; s < weight.w.layout.stages; ++s) {
                        const uint32_t word = rbe_reference_word(&weight.w, i, j / 8, s);
                        const bool negated = weight.w.layout.field == RBE_FIELD_RBE16S && (word >> (j % 8) & 1u);
                        const double value =
                            weight.gain[(size_t)i] * rbe_reference_code_scale(&weight.w, i, j / 8, s) * dense[(size_t)(i * 45 + j)];
                        true_basis[(size_t)((s * 256 + rbe_word_idx(word)) * 8 + j % 8)] += (float)(negated ? -value : value);
                    }
                }
            }
            Device device;
            rbe_error err;
            ASSERT_EQ(rbe_cuda_decode_backward(&weight.w, dense.data(), basis.data(), gain.data(), &device.device, &err), RBE_OK)
                << err.text;
            expect_near(gain, true_gain, kFloat32Error, layout);
            expect_near(basis, true_basis, kFloat32Error, layout);
        }
    }
}

void multiply_without_cublaslt() {
    setenv("RBE_CUBLASLT", "/nowhere/libcublasLt.so", 1);
    std::mt19937 random(7);
    Weight weight("rbe22_g16", 5, 40, random);
    Matrix x(RBE_F32, 3, 40), y(RBE_F32, 3, 5);
    Device device;
    rbe_error err;
    rbe_cuda_use_path(RBE_CUDA_DECODE_GEMM);
    const rbe_status status = rbe_cuda_linear(&weight.w, &x.view, nullptr, &y.view, RBE_ACCURACY_AUTO, &device.device, &err);
    std::fprintf(stderr, "%s\n", err.text);
    _Exit(status == RBE_DEVICE_FAILED ? 3 : 4);
}

TEST(CudaCodes, MissingCublasLtIsNamed) {
    EXPECT_EXIT(multiply_without_cublaslt(), ::testing::ExitedWithCode(3), "cuBLASLt: RBE_CUBLASLT is '/nowhere/libcublasLt.so'");
}

}  // namespace
