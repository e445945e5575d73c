// rbe_encode of one stage against brute force: the joint minimum over idx and scale, its ties, and input with nothing to encode.
#include "encode_case.h"

namespace {

// Every word of a layout but for idx, in rising order; amp_fine is left at zero.
std::vector<uint32_t> words_without_idx(rbe_field field) {
    std::vector<uint32_t> list;
    const uint32_t mask = rbe_field_mask(field) & 0x003FFFFFu & ~(255u << RBE_IDX_SHIFT), constant = rbe_field_constant(field);
    for (uint32_t word = 0; word <= mask; ++word)
        if ((word & ~mask) == 0 && (word & constant) == constant) list.push_back(word);
    return list;
}

int64_t p_columns(const std::string &layout) {  // one whole group and part of another
    return layout == "rbe22_g1" ? 2 : layout == "rbe16s_g8" ? 11 : 7;
}

// The lowest word of rbe22 whose scale is 1.
uint32_t scale_one_word() {
    for (uint32_t word : words_without_idx(RBE_FIELD_RBE22))
        if (rbe_reference_scale(RBE_FIELD_RBE22, word) == 1.0f) return word;
    return 0;
}

TEST(EncodeOneStage, IsTheJointMinimumOfEveryWord) {
    std::mt19937 random(41);
    for (const char *layout : {"rbe22_g1", "rbe22_g5", "rbe9r_g4", "rbe4r_g4", "rbe2r_g3", "rbe8_g5", "rbe16s_g8"}) {
        for (int seed = 0; seed < 2; ++seed) {
            Problem p(layout, 2, p_columns(layout), random);
            p.must_encode();
            const std::vector<uint32_t> rest = words_without_idx(p.w.layout.field);
            for (int64_t i = 0; i < p.w.rows; ++i) {
                for (int64_t k = 0; k < p.w.groups; ++k) {
                    const uint32_t got = p.code(i, k);
                    double least = INFINITY;
                    for (uint32_t word : rest) {
                        for (uint32_t j = 0; j < 256; ++j) {
                            if (rbe_field_seeded(p.w.layout.field) && j != p.seeded(i, k, 0)) continue;
                            const uint32_t candidate = word | j << RBE_IDX_SHIFT;
                            least = std::min(least, p.error(i, k, &candidate));
                        }
                    }
                    EXPECT_LE(p.error(i, k, &got), least * (1 + kRounding)) << layout << " row " << i << " group " << k;
                    EXPECT_EQ(got & ~rbe_field_mask(p.w.layout.field), 0u);
                }
            }
        }
    }
}

// One vector that is not zero, group size 1: the code is then the representable scale nearest to w.
struct Nearest : Problem {
    Nearest(const char *field, const std::vector<double> &targets) : Problem(std::string(field) + "_g1", (int64_t)targets.size(), 1) {
        std::fill(basis.begin(), basis.end(), 1.0);  // all alike: idx 0 wins every tie
        weight = targets;
        dense.data = weight.data();
    }
};

TEST(EncodeOneStage, ScaleIsTheNearestAndTiesGoToTheLowestWord) {
    // Every distinct scale of rbe22 with its lowest word; targets on scales, halfway between neighbours, and just off halfway.
    std::vector<std::pair<float, uint32_t>> scales;
    for (uint32_t word : words_without_idx(RBE_FIELD_RBE22)) scales.push_back({rbe_reference_scale(RBE_FIELD_RBE22, word) + 0.0f, word});
    std::stable_sort(scales.begin(), scales.end(), [](auto &a, auto &b) { return a.first < b.first; });
    scales.erase(std::unique(scales.begin(), scales.end(), [](auto &a, auto &b) { return a.first == b.first; }), scales.end());
    std::vector<double> targets;
    std::vector<uint32_t> wanted;
    constexpr uint32_t kEither = 0xFFFFFFFFu;  // not a word of rbe22
    for (size_t s = 0; s < scales.size(); ++s) {
        targets.push_back(scales[s].first);
        wanted.push_back(scales[s].second);
        if (s + 1 == scales.size()) break;
        const double half = ((double)scales[s].first + scales[s + 1].first) / 2;  // exact in float64, and as far from one as from the other
        targets.insert(targets.end(), {half, std::nextafter(half, -10.0), std::nextafter(half, 10.0)});
        wanted.insert(wanted.end(), {std::min(scales[s].second, scales[s + 1].second), kEither, kEither});
    }
    targets.insert(targets.end(), {100.0, -100.0, 1e30});
    wanted.insert(wanted.end(), {scales.back().second, scales.front().second, scales.back().second});
    Nearest p("rbe22", targets);
    p.must_encode();
    for (size_t i = 0; i < targets.size(); ++i) {
        const uint32_t got = p.code((int64_t)i);
        if (wanted[i] != kEither) {
            ASSERT_EQ(got, wanted[i]) << "target " << targets[i];
        } else {  // just off halfway: one of the two it lies between, and the nearer one
            const double half = targets[i - (targets[i] < targets[i - 1] ? 1 : 2)], value = rbe_reference_scale(RBE_FIELD_RBE22, got);
            ASSERT_EQ(value < half, targets[i] < half) << "target " << targets[i];
        }
    }
}

// Words (amp_fine 0) of the cells in which a curve moves least.
std::vector<uint32_t> flattest_cells(size_t count) {
    std::vector<std::pair<double, uint32_t>> cells;
    for (uint32_t curve = 0; curve < RBE_CURVES; ++curve)
        for (uint32_t amp = 0; amp < 256; ++amp)
            cells.push_back({std::fabs((double)rbe_curve_table[curve][amp + 1] / rbe_curve_table[curve][amp] - 1),
                             curve / 2 << RBE_SUB_SHIFT | (curve & 1) << RBE_DERIV_SHIFT | amp});
    std::sort(cells.begin(), cells.end());
    std::vector<uint32_t> words;
    for (size_t i = 0; i < count; ++i) words.push_back(cells[i].second);
    return words;
}

TEST(EncodeOneStage, FineScaleIsTheNearestOfAllMillions) {
    std::mt19937 random(42);
    std::uniform_real_distribution<double> uniform(-8, 8);
    std::vector<double> targets = {0.0, 1.0, -1.0, 1e-9, -3e-6, 7.38, 7.3890562, 9.0, 0.5, 0.0078, -0.1, -0.3};
    for (int i = 0; i < 12; ++i) targets.push_back(uniform(random));
    for (int i = 0; i < 8; ++i) targets.push_back(rbe_reference_scale(RBE_FIELD_RBE32, (uint32_t)random()));
    for (uint32_t cell : flattest_cells(8)) {  // many fine steps share one float32 there: the lowest of them is wanted, from either side
        const double value = rbe_reference_scale(RBE_FIELD_RBE32, cell | (uint32_t)(random() % 1024) << RBE_FINE_SHIFT);
        targets.insert(targets.end(), {value * (1 - 1e-10), value * (1 + 1e-10)});
    }
    std::vector<double> least(targets.size(), INFINITY);
    std::vector<uint32_t> wanted(targets.size());
    for (uint32_t top = 0; top < 1u << 14; ++top) {     // amp_fine, cat, sub
        for (uint32_t low = 0; low < 1u << 9; ++low) {  // deriv, amp; the sign below
            const uint32_t word = top << RBE_SUB_SHIFT | low;
            const double value = rbe_reference_scale(RBE_FIELD_RBE32, word);
            for (size_t i = 0; i < targets.size(); ++i) {
                const double plus = std::fabs(value - targets[i]), minus = std::fabs(-value - targets[i]);
                const uint32_t negative = word | 1u << RBE_SIGN_SHIFT;
                if (plus < least[i] || (plus == least[i] && word < wanted[i])) least[i] = plus, wanted[i] = word;
                if (minus < least[i] || (minus == least[i] && negative < wanted[i])) least[i] = minus, wanted[i] = negative;
            }
        }
    }
    Nearest p("rbe32", targets);
    p.must_encode();
    for (size_t i = 0; i < targets.size(); ++i) EXPECT_EQ(p.code((int64_t)i), wanted[i]) << "target " << targets[i];
}

TEST(EncodeOneStage, TiesBetweenVectorsGoToTheLowestWord) {
    for (const char *layout : {"rbe22_g4", "rbe32_g4", "rbe8_g4", "rbe16s_g8"}) {
        std::mt19937 random(43);
        Problem p(layout, 3, 8, random);
        const size_t g = (size_t)p.w.layout.group;
        for (size_t e = 0; e < g; ++e) {
            p.basis[200 * g + e] = p.basis[30 * g + e] = p.basis[77 * g + e];  // three alike
            p.basis[31 * g + e] = -p.basis[77 * g + e];                        // and one that a sign makes alike
            p.weight[e] = 1.25 * p.basis[77 * g + e];                          // row 0: nearest to them
        }
        std::fill(p.gain.begin(), p.gain.end(), 1.25);
        p.must_encode();
        EXPECT_EQ(rbe_word_idx(p.code(0)), 30u) << layout;
        if (p.w.layout.field == RBE_FIELD_RBE22) {
            EXPECT_EQ(p.code(0), scale_one_word() | 30u << RBE_IDX_SHIFT);
        }
    }
}

TEST(EncodeOneStage, NothingToEncodeGivesTheLowestWord) {
    std::mt19937 random(44);
    for (const char *layout : {"rbe22_g4", "rbe32_g4", "rbe9r_g4", "rbe4r_g4"}) {
        Problem p(layout, 3, 10, random);
        const uint32_t constant = rbe_field_constant(p.w.layout.field);
        const auto lowest = [&](int64_t i, int64_t k) { return constant ? constant | p.seeded(i, k, 0) << RBE_IDX_SHIFT : 0u; };
        for (size_t j = 0; j < 10; ++j) p.weight[j] = 0;  // row 0: zeros
        p.gain[1] = 0;                                    // row 1: whatever the code, W is zero
        p.must_encode();
        for (int64_t k = 0; k < 3; ++k) {
            EXPECT_EQ(p.code(0, k), lowest(0, k)) << layout;
            EXPECT_EQ(p.code(1, k), lowest(1, k)) << layout;
        }
        std::fill(p.basis.begin(), p.basis.end(), 0.0);  // no vector to scale
        p.must_encode();
        for (int64_t k = 0; k < 3; ++k) EXPECT_EQ(p.code(2, k), lowest(2, k)) << layout;
    }
    Problem signs("rbe16s_g8", 1, 16, random);
    std::fill(signs.weight.begin(), signs.weight.end(), 0.0);
    signs.must_encode();
    EXPECT_EQ(signs.code(0) & 255u, 0u) << "the sign of nothing is bit 0";
}

TEST(EncodeOneStage, TheCutLastGroupComparesOnlyColumnsThatExist) {
    std::mt19937 random(45);
    for (const char *layout : {"rbe8_g4", "rbe22_g4", "rbe16s_g8"}) {
        Problem p(layout, 1, p_columns(layout) - p_columns(layout) % 4 + 1, random);
        const int64_t g = p.w.layout.group, last = p.w.groups - 1;
        for (int64_t j = 0; j < 256; ++j)
            for (int64_t e = 1; e < g; ++e)
                p.basis[(size_t)(j * g + e)] = 1e6 * (double)(j + 1);  // would drown everything if it were looked at
        p.must_encode();
        const uint32_t got = p.code(0, last);
        const double target = p.weight.back();
        double least = INFINITY;
        for (int64_t j = 0; j < 256 && p.w.layout.field == RBE_FIELD_RBE8; ++j)
            least = std::min(least, std::pow(target - p.gain[0] * p.basis[(size_t)(j * g)], 2));
        for (int64_t j = 0; j < 256 && p.w.layout.field == RBE_FIELD_RBE16S; ++j)
            least = std::min(least, std::pow(std::fabs(target) - std::fabs(p.gain[0] * p.basis[(size_t)(j * g)]), 2));
        if (p.w.layout.field == RBE_FIELD_RBE22) least = 1e-6;  // some of 256 vectors times a scale comes this near
        EXPECT_LE(p.error(0, last, &got), least * (1 + kRounding)) << layout;
        EXPECT_EQ(got & 0xFEu & (p.w.layout.field == RBE_FIELD_RBE16S ? ~0u : 0u), 0u) << "signs of columns that do not exist";
    }
}

}  // namespace
