// Encoding on the device, run on the CPU: the very words that the C encoder gives, for every search, type and ragged end.
#include "../c/encode_case.h"
#include "device_case.h"
#include "kernels/cuda/encode.h"

namespace {

#ifdef EMU_TSAN
constexpr bool kSlow = true;  // the checks of a race cost thirty times the run
#else
constexpr bool kSlow = false;
#endif

// rows and columns: several blocks, a ragged last group
struct Shape {
    const char *layout;
    int64_t rows, cols;
};

void expect_words(const std::vector<int32_t> &got, const std::vector<int32_t> &truth, const std::string &what) {
    ASSERT_EQ(got.size(), truth.size()) << what;
    for (size_t i = 0; i < got.size(); ++i)
        ASSERT_EQ(got[i], truth[i]) << what << " at " << i << std::hex << ": " << got[i] << " for " << truth[i];
}

void encode_both(const rbe_weight &w, const rbe_matrix &dense, size_t count, const std::string &what) {
    std::vector<int32_t> truth(count, -1), got(count, -1);
    rbe_error err;
    Device device;
    ASSERT_EQ(rbe_encode(&w, &dense, truth.data(), nullptr, &err), RBE_OK) << err.text;
    ASSERT_EQ(rbe_cuda_encode(&w, &dense, got.data(), &device.device, &err), RBE_OK) << err.text;
    expect_words(got, truth, what);
}

TEST(CudaEncode, WordsAreThoseOfTheCpuForEverySearch) {
    std::mt19937 random(1);
    std::vector<Shape> shapes = {{"rbe8_g8", 9, 44}, {"rbe8x2_g8", 5, 44}, {"rbe16s_g8", 7, 30}, {"rbe9r_g7", 9, 40}, {"rbe9rx2_g6", 4, 20}};
    if (!kSlow)
        for (const Shape &more : {Shape{"rbe22_g16", 5, 70}, {"rbe22x2_g8", 3, 20}, {"rbe8x4_g5", 5, 23}, {"rbe16sx2_g8", 5, 30},
                                  {"rbe4r_g8", 6, 30}, {"rbe2rx3_g8", 4, 20}, {"rbe22_g40", 33, 40}, {"rbe8x2_g8+int8", 3, 20}})
            shapes.push_back(more);
    for (const Shape &shape : shapes) {
        Problem wide(shape.layout, shape.rows, shape.cols, random);
        wide.gain[1] = 0;
        encode_both(wide.w, wide.dense, wide.words.size(), std::string(shape.layout) + " float64");
        std::vector<float> basis(wide.basis.begin(), wide.basis.end()), gain(wide.gain.begin(), wide.gain.end());
        Matrix narrow(RBE_F32, shape.rows, shape.cols, Matrix::kTransposed);
        for (int64_t i = 0; i < shape.rows; ++i)
            for (int64_t j = 0; j < shape.cols; ++j) narrow.set(i, j, wide.weight[(size_t)(i * shape.cols + j)]);
        rbe_weight w = wide.w;
        w.real = RBE_F32, w.basis = basis.data(), w.gain = gain.data();
        w.row0 = 3;
        encode_both(w, narrow.view, wide.words.size(), shape.layout);
    }
}

TEST(CudaEncode, FineScalesAreThoseOfTheCpu) {
    if (kSlow) GTEST_SKIP() << "rbe32 walks 8192 cells a target; its memory accesses are those of rbe22";
    std::mt19937 random(2);
    for (const Shape &shape : {Shape{"rbe32_g16", 3, 30}, {"rbe32x2_g4", 1, 7}}) {
        Problem p(shape.layout, shape.rows, shape.cols, random);
        for (size_t i = 0; i < p.weight.size(); i += 5) p.weight[i] *= 1e-3;
        encode_both(p.w, p.dense, p.words.size(), shape.layout);
    }
}

TEST(CudaEncode, TiesGoToTheLowestWord) {
    std::mt19937 random(3);
    for (const char *layout : {"rbe8_g4", "rbe8x2_g4", "rbe9r_g4"}) {
        Problem p(layout, 6, 16, random);
        for (size_t j = 0; j < p.basis.size() / 4; ++j)  // few different vectors, some zero, at places far apart
            for (int e = 0; e < 4; ++e) p.basis[j * 4 + (size_t)e] = (double)((j * 7 + (size_t)e) % 5) - 2.0;
        for (double &w : p.weight) w = std::round(w);
        for (double &g : p.gain) g = 1;
        encode_both(p.w, p.dense, p.words.size(), layout);
    }
}

TEST(CudaEncode, GroupsTooLargeForSharedMemoryAreSearchedInMemory) {
    std::mt19937 random(4);
    Problem p("rbe8x2_g2000", 2, 2100, random);
    rbe_cu_codes codes = {};
    codes.rows = 2, codes.groups = 2, codes.stages = 2, codes.group = 2000;
    ASSERT_GT(rbe_cu_encode_memory(&codes, false), 0u);
    encode_both(p.w, p.dense, p.words.size(), "rbe8x2_g2000");
}

TEST(CudaEncode, ListedScalesAreSortedWithTheLowestWord) {
    for (rbe_field field : {RBE_FIELD_RBE22, RBE_FIELD_RBE9R, RBE_FIELD_RBE4R, RBE_FIELD_RBE2R}) {
        if (kSlow && field == RBE_FIELD_RBE22) continue;
        const int32_t count = rbe_cu_scale_count(field);
        std::vector<float> value((size_t)count);
        std::vector<uint32_t> word((size_t)count);
        ASSERT_EQ(rbe_cu_list_scales(field, value.data(), word.data(), nullptr), 0);
        for (size_t p = 0; p < value.size(); ++p) {
            ASSERT_EQ(rbe_reference_scale(field, word[p]), value[p]) << p;
            if (p == 0) continue;
            ASSERT_LE(value[p - 1], value[p]) << p;
            ASSERT_TRUE(value[p - 1] < value[p] || word[p - 1] == word[p]) << p;
        }
    }
}

void calibrate_both(Calibrated *c, int sweeps, const std::string &what) {
    rbe_error err;
    Device device;
    rbe_weight w = c->w;
    std::vector<int32_t> got(c->words.size(), -1), start = c->words;
    if (!c->calibration.factor) w.words = start.data();
    ASSERT_EQ(c->encode(sweeps, &err), RBE_OK) << err.text;
    ASSERT_EQ(rbe_cuda_encode_calibrated(&w, &c->dense, &c->calibration, got.data(), &device.device, &err), RBE_OK) << err.text;
    expect_words(got, c->words, what);
}

TEST(CudaEncode, CalibratedWordsAreThoseOfTheCpu) {
    std::vector<Shape> shapes = {{"rbe8x2_g8", 10, 37}, {"rbe16s_g8", 9, 30}, {"rbe9r_g8", 9, 27}};
    if (!kSlow)
        for (const Shape &more : {Shape{"rbe8_g6", 12, 40}, {"rbe22_g16", 3, 40}, {"rbe16sx2_g8", 4, 27}, {"rbe22x2_g8", 2, 18},
                                  {"rbe9rx2_g5", 4, 18}, {"rbe8x2_g40", 9, 100}})
            shapes.push_back(more);
    for (const Shape &shape : shapes) {
        Calibrated c(shape.layout, shape.rows, shape.cols, 7);
        calibrate_both(&c, 0, std::string(shape.layout) + " feedback");
        calibrate_both(&c, 2, std::string(shape.layout) + " feedback and sweeps");
        c.calibration.factor = nullptr;
        std::fill(c.words.begin(), c.words.end(), (int32_t)rbe_field_constant(c.w.layout.field));
        if (rbe_field_seeded(c.w.layout.field)) continue;  // a start must have the seed's idx
        calibrate_both(&c, 1, std::string(shape.layout) + " sweep of given codes");
    }
}

TEST(CudaEncode, RefusesWhatTheCpuRefuses) {
    Device device;
    rbe_error err;
    std::mt19937 random(6);
    Problem p("rbe8_g8", 3, 20, random);
    const auto encode = [&] { return rbe_cuda_encode(&p.w, &p.dense, p.words.data(), &device.device, &err); };
    p.weight[27] = NAN;
    EXPECT_EQ(encode(), RBE_BAD_ARGUMENT);
    EXPECT_NE(std::string(err.text).find("weight: element [1, 7] is not finite"), std::string::npos) << err.text;
    p.weight[27] = 1, p.gain[2] = INFINITY;
    EXPECT_EQ(encode(), RBE_BAD_ARGUMENT);
    EXPECT_NE(std::string(err.text).find("gain: row 2 is not finite"), std::string::npos) << err.text;
    p.gain[2] = 1, p.basis[5] = NAN;
    EXPECT_EQ(encode(), RBE_BAD_ARGUMENT);
    EXPECT_NE(std::string(err.text).find("basis:"), std::string::npos) << err.text;

    Calibrated c("rbe8x2_g8", 3, 20, 8);
    c.calibration.sweeps = 1;
    const auto calibrate = [&] { return rbe_cuda_encode_calibrated(&c.w, &c.dense, &c.calibration, c.words.data(), &device.device, &err); };
    c.hessian[1] = c.hessian[20] = 1e4f;
    EXPECT_EQ(calibrate(), RBE_BAD_ARGUMENT);
    EXPECT_NE(std::string(err.text).find("hessian: is not positive definite"), std::string::npos) << err.text;
    c.factor[45] = NAN;
    EXPECT_EQ(calibrate(), RBE_BAD_ARGUMENT);
    EXPECT_NE(std::string(err.text).find("hessian or factor: element [2, 5] is not finite"), std::string::npos) << err.text;
    c.gain[1] = 0;
    EXPECT_EQ(calibrate(), RBE_BAD_ARGUMENT);
    EXPECT_NE(std::string(err.text).find("gain: row 1 is not positive"), std::string::npos) << err.text;
    c.calibration.factor = nullptr;
    std::fill(c.words.begin(), c.words.end(), 0);
    c.words[5] = -1;
    c.w.words = c.words.data();
    EXPECT_EQ(calibrate(), RBE_BAD_ARGUMENT);
    EXPECT_NE(std::string(err.text).find("codes: the word at row 0, group 2, stage 1"), std::string::npos) << err.text;
}

}  // namespace
