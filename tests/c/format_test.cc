// Layout strings, the curve table and seeded idx: what is accepted, what is refused and how it is said, values against the formulas.
#include "product_case.h"

namespace {

rbe_status parse(const std::string &text, rbe_layout *layout, rbe_error *err) {
    const std::vector<char> exact(text.begin(), text.end());  // no terminator: reading past the end is for the sanitizer to find
    return rbe_layout_parse(exact.data(), exact.size(), layout, err);
}

TEST(Layout, ReadsEveryPart) {
    rbe_layout l;
    rbe_error err;
    ASSERT_EQ(parse("rbe22_g128", &l, &err), RBE_OK) << err.text;
    EXPECT_EQ(l.field, RBE_FIELD_RBE22);
    EXPECT_EQ(l.bits, 22);
    EXPECT_EQ(l.group, 128);
    EXPECT_EQ(l.stages, 1);
    EXPECT_EQ(l.residual, RBE_RESIDUAL_NONE);
    ASSERT_EQ(parse("rbe8x16_g8+lr12", &l, &err), RBE_OK) << err.text;
    EXPECT_EQ(l.stages, 16);
    EXPECT_EQ(l.residual, RBE_RESIDUAL_LOWRANK);
    EXPECT_EQ(l.rank, 12);
    ASSERT_EQ(parse("rbe9rx3_g1+sp0.005", &l, &err), RBE_OK) << err.text;
    EXPECT_EQ(l.bits, 9);
    EXPECT_EQ(l.fraction, 0.005);  // correctly rounded, as a compiler reads it
    for (const char *good : {"rbe32_g65536", "rbe16s_g8", "rbe16sx2_g8+int8", "rbe22x1_g7+fp8", "rbe8_g1+sp0.999999999999999"})
        EXPECT_EQ(parse(good, &l, &err), RBE_OK) << good << ": " << err.text;
}

TEST(Layout, RefusesByNameAndLeavesTheResultAlone) {
    for (const char *bad : {"",
                            "rbe",
                            "rbe22",
                            "rbe22_g",
                            "rbe22_g0",
                            "rbe22_g-1",
                            "rbe22_g+8",
                            "rbe22_g08",
                            "rbe22_g65537",
                            "rbe22_g99999999999999999999",
                            "rbe22_g8 ",
                            " rbe22_g8",
                            "RBE22_g8",
                            "rbe7_g8",
                            "rbe16_g8",
                            "rbe9_g8",
                            "rbe22x_g8",
                            "rbe22x0_g8",
                            "rbe22x17_g8",
                            "rbe22x99999999999_g8",
                            "rbe22g8",
                            "rbe22_g8x2",
                            "rbe16s_g7",
                            "rbe16s_g16",
                            "rbe8_g8+",
                            "rbe8_g8+int",
                            "rbe8_g8+int8x",
                            "rbe8_g8+int8+fp8",
                            "rbe8_g8+int4",
                            "rbe8_g8+lr",
                            "rbe8_g8+lr0",
                            "rbe8_g8+lr65536",
                            "rbe8_g8+sp",
                            "rbe8_g8+sp0",
                            "rbe8_g8+sp0.0",
                            "rbe8_g8+sp1.0",
                            "rbe8_g8+sp1",
                            "rbe8_g8+sp.5",
                            "rbe8_g8+sp0,5",
                            "rbe8_g8+spnan",
                            "rbe8_g8+sp-0.5",
                            "rbe8_g8+sp1e-3",
                            "rbe8_g8+sp0.5junk",
                            "rbe8_g8+sp0.1234567890123456"}) {
        rbe_layout l = {};
        l.group = -77;
        rbe_error err = {};
        EXPECT_EQ(parse(bad, &l, &err), RBE_BAD_ARGUMENT) << bad;
        EXPECT_EQ(std::string(err.text).rfind("layout: ", 0), 0u) << bad << ": " << err.text;
        EXPECT_EQ(l.group, -77) << bad;
    }
    rbe_layout l;
    EXPECT_EQ(parse(std::string("rbe22_g8\0", 9), &l, nullptr), RBE_BAD_ARGUMENT);  // nowhere to put the sentence is no reason to crash
    rbe_error err;
    EXPECT_EQ(parse(std::string(100000, 'x'), &l, &err), RBE_BAD_ARGUMENT);
    EXPECT_EQ(rbe_layout_parse(nullptr, 0, &l, &err), RBE_BAD_ARGUMENT);
    EXPECT_EQ(rbe_layout_parse("rbe8_g8", 7, nullptr, &err), RBE_BAD_ARGUMENT);
    std::string wide = "rbe8_g8";
    while (wide.size() < 200) wide += "\xC3\xA9";  // a sentence is cut between characters, not inside one
    EXPECT_EQ(parse(wide, &l, &err), RBE_BAD_ARGUMENT);
    const char *shown = std::strchr(err.text, '\'');
    ASSERT_NE(shown, nullptr);
    EXPECT_EQ((std::strchr(shown + 1, '\'') - shown - 1 - 7) % 2, 0) << err.text;
}

TEST(Curves, TableIsWithinAStepOfTheFormulas) {
    const auto near = [](int curve, int a, double value) {
        const float got = rbe_curve_table[curve][a];
        EXPECT_NEAR(got, value, std::fabs(value) * 0x1p-24 * 1.0000001 + 1e-300) << "curve " << curve << " at " << a;
    };
    for (int a = 0; a < RBE_CURVE_POINTS; ++a) {
        const double r = a / 128.0;
        const double value[16] = {std::tanh(r / 2),
                                  std::tanh(r),
                                  std::sin(r / 2),
                                  -std::expm1(-r),
                                  std::sinh(r),
                                  2 * std::sinh(r / 2),
                                  2 * std::sinh(r / 2) * std::sinh(r / 2),
                                  std::expm1(r),
                                  r / std::sqrt(1 + r * r),
                                  r / (1 + r),
                                  std::atan(r) * 2 / M_PI,
                                  std::log1p(r),
                                  r * std::exp(-r * r / 2),
                                  j1(r),
                                  std::sin(r) * std::exp(-r * r / 4),
                                  r * r / (1 + r * r)};
        for (int f = 0; f < 16; ++f) near(2 * f, a, value[f]);
        const double slope[16] = {0.5 / std::cosh(r / 2) / std::cosh(r / 2),
                                  1 / std::cosh(r) / std::cosh(r),
                                  std::cos(r / 2) / 2,
                                  std::exp(-r),
                                  std::cosh(r),
                                  std::cosh(r / 2),
                                  std::sinh(r),
                                  std::exp(r),
                                  std::pow(1 + r * r, -1.5),
                                  1 / (1 + r) / (1 + r),
                                  2 / M_PI / (1 + r * r),
                                  1 / (1 + r),
                                  (1 - r * r) * std::exp(-r * r / 2),
                                  (j0(r) - jn(2, r)) / 2,
                                  (std::cos(r) - r / 2 * std::sin(r)) * std::exp(-r * r / 4),
                                  2 * r / (1 + r * r) / (1 + r * r)};
        for (int f = 0; f < 16; ++f) near(2 * f + 1, a, slope[f]);
    }
    EXPECT_EQ(RBE_CURVE_EXP, (1 * 4 + 3) * 2);
}

TEST(SeededIdx, AShardSeesTheLayersOwn) {
    // FORMAT.md's recurrence worked out by hand for c = 0 and seed 0: h = 0x9E3779B9
    uint32_t h = 0x9E3779B9u;
    h = (h ^ h >> 16) * 0x85EBCA6Bu;
    h = (h ^ h >> 13) * 0xC2B2AE35u;
    EXPECT_EQ(rbe_seeded_idx(0, 0, 0, 0, 9, 2), (h ^ h >> 16) >> 24);
    EXPECT_EQ(rbe_seeded_idx(5, 3, 4, 1, 9, 2), rbe_seeded_idx(5, 0, 0, (3 * 9 + 4) * 2 + 1, 9, 2));
    EXPECT_EQ(rbe_seeded_idx(5, 1ull << 32, 0, 0, 1, 1), rbe_seeded_idx(5, 0, 0, 0, 1, 1));  // modulo 2^32
    int counts[RBE_BASIS_VECTORS] = {};
    for (uint64_t q = 0; q < 256 * 64; ++q) ++counts[rbe_seeded_idx(1, 0, q, 0, 1 << 20, 1)];
    for (int count : counts) EXPECT_NEAR(count, 64, 6 * 8);  // six standard deviations
}

}  // namespace
