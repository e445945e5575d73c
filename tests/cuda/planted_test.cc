// The tool itself: kernels with a planted bug are caught, the same kernels without it pass. Which build catches which bug is in kCaught.
#include <gtest/gtest.h>

#include <sstream>
#include <vector>

#include "planted.cuh"

extern "C" const char *__tsan_default_options();
extern "C" const char *__tsan_default_options() { return "halt_on_error=1 exitcode=66"; }
extern "C" const char *__asan_default_options();
extern "C" const char *__asan_default_options() { return "exitcode=66 detect_stack_use_after_return=0"; }

namespace {

#if defined(EMU_TSAN)
enum { kBuild = 4 };
#elif defined(EMU_ASAN)
enum { kBuild = 2 };
#else
enum { kBuild = 1 };
#endif
enum { kPlain = 1, kAsan = 2, kTsan = 4, kAll = 7 };

uint16_t bf16(float f) { return cu_f32_to_bf16(f); }

template <Bug bug>
bool lookup_is_right(int splits) {
    const int rows = 6, cols = 1500;
    std::vector<uint8_t> code(rows * cols);
    std::vector<float> x(cols), y((size_t)rows * splits, 0.0f);
    std::unique_ptr<float[]> table(new float[256]);  // on the heap, so that a read past it is seen
    for (int j = 0; j < 256; ++j) table[j] = (float)(j % 17) - 8.0f;
    for (size_t i = 0; i < code.size(); ++i) code[i] = (uint8_t)(i * 37 + i / 11);
    for (int k = 0; k < cols; ++k) x[k] = (float)(k % 7) - 3.0f;
    cu_launch(lookup<bug>, dim3(rows, splits), dim3(256), 0, nullptr, code.data(), table.get(), x.data(), y.data(), cols);
    for (int o = 0; o < rows; ++o) {
        float want = 0.0f, got = 0.0f;
        for (int k = 0; k < cols; ++k) want += table[code[o * cols + k]] * x[k];  // whole numbers: exact in any order
        for (int s = 0; s < splits; ++s) got += y[(size_t)s * rows + o];
        if (!(got == want)) return false;
    }
    return true;
}

template <Bug bug>
bool pipeline_is_right() {
    const int depth = 16 * 9;
    std::vector<uint16_t> a(16 * depth), b(8 * depth);
    std::vector<float> d(256);
    for (size_t i = 0; i < a.size(); ++i) a[i] = bf16((float)(i % 13) - 6.0f);
    for (size_t i = 0; i < b.size(); ++i) b[i] = bf16((float)(i % 11) - 5.0f);
    cu_launch(pipeline<bug>, dim3(1), dim3(64), 0, nullptr, a.data(), b.data(), d.data(), depth);
    for (int r = 0; r < 16; ++r) {
        for (int c = 0; c < 8; ++c) {
            float want = 0.0f;
            for (int k = 0; k < depth; ++k) want += cu_bf16_to_f32(a[r * depth + k]) * cu_bf16_to_f32(b[c * depth + k]);
            if (!(d[r * 8 + c] + d[128 + r * 8 + c] == want)) return false;
        }
    }
    return true;
}

template <Bug bug>
bool is_right() {
    return bug >= Bug::no_wait ? pipeline_is_right<bug>() : lookup_is_right<bug>(2);
}

// Runs over several schedules in a child process: caught is a wrong result (status 1), a report of the runtime (77) or of a sanitizer (66).
template <Bug bug>
void expect_caught(int where) {
    if (!(where & kBuild)) GTEST_SKIP() << "not what this build catches";
    ASSERT_EXIT(
        {
            for (uint64_t seed = 1; seed <= 20; ++seed) {
                emu::options.seed = seed;
                if (!is_right<bug>()) _Exit(1);
            }
            _Exit(0);
        },
        [](int status) {
            return WIFEXITED(status) && (WEXITSTATUS(status) == 1 || WEXITSTATUS(status) == 66 || WEXITSTATUS(status) == 77);
        },
        "");
}

TEST(Planted, CorrectKernelsPassInEveryOrder) {
    for (int order = 0; order < 3; ++order) {
        for (uint64_t seed = 1; seed <= 4; ++seed) {
            emu::options = {seed, order};
            ASSERT_TRUE(lookup_is_right<Bug::none>(1));
            ASSERT_TRUE(lookup_is_right<Bug::none>(3));
            ASSERT_TRUE(pipeline_is_right<Bug::none>());
        }
    }
}

TEST(Planted, ReadPastATable) { expect_caught<Bug::read_past_table>(kAsan); }
TEST(Planted, MissingBarrierAfterAFill) { expect_caught<Bug::no_barrier_after_fill>(kAll); }
TEST(Planted, MissingBarrierBeforeReadingPartialSums) { expect_caught<Bug::no_barrier_before_reading>(kAll); }
TEST(Planted, RaceAcrossBlocks) { expect_caught<Bug::race_across_blocks>(kTsan); }
TEST(Planted, FullMaskWithEightLanes) { expect_caught<Bug::mask_of_absent_lanes>(kAll); }
TEST(Planted, BarrierInADivergentBranch) { expect_caught<Bug::divergent_barrier>(kAll); }
TEST(Planted, MissingWaitForCpAsync) { expect_caught<Bug::no_wait>(kAll); }
TEST(Planted, MissingBarrierAtTheEndOfAPipelinedLoop) { expect_caught<Bug::no_barrier_at_end_of_loop>(kTsan); }

TEST(Dialect, HalfTypesRoundToNearestEven) {
    for (uint32_t h = 0; h < 65536; ++h) {
        const float f = cu_f16_to_f32((uint16_t)h), b = cu_bf16_to_f32((uint16_t)h);
        ASSERT_TRUE(std::isnan(f) || cu_f32_to_f16(f) == h) << h;
        ASSERT_TRUE(std::isnan(b) || cu_f32_to_bf16(b) == h) << h;
    }
    ASSERT_EQ(cu_f32_to_f16(1.0f + 0x1p-11f), 0x3C00) << "ties to even";
    ASSERT_EQ(cu_f32_to_f16(1.0f + 0x3p-11f), 0x3C02);
    ASSERT_EQ(cu_f32_to_f16(65520.0f), 0x7C00);
    ASSERT_EQ(cu_f32_to_f16(0x1p-25f), 0);
    ASSERT_EQ(cu_f32_to_f16(0x3p-26f), 1);
    ASSERT_EQ(cu_f32_to_bf16(1.0f + 0x1p-8f), 0x3F80);
    ASSERT_TRUE(std::isnan(cu_e4m3_to_f32(0xFF)));
    ASSERT_EQ(cu_e4m3_to_f32(0x7E), 448.0f);
    ASSERT_EQ(cu_e4m3_to_f32(0x81), -0x1p-9f);
}

}  // namespace
