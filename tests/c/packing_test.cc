// Code words <-> packed bytes: exact bits at every count, and every kind of input that must be refused.
#include "product_case.h"

namespace {

// The bits of a row one by one, from FORMAT.md's table.
std::vector<uint8_t> packed_by_hand(const Weight &weight, int64_t row) {
    const rbe_layout &l = weight.w.layout;
    std::vector<int> places;  // word bit of each stored bit
    const auto field = [&](int shift, int width) {
        for (int b = 0; b < width; ++b) places.push_back(shift + b);
    };
    if (l.field == RBE_FIELD_RBE32) field(0, 32);
    if (l.field == RBE_FIELD_RBE22) field(0, 22);
    if (l.field == RBE_FIELD_RBE8) field(10, 8);
    if (l.field == RBE_FIELD_RBE16S) field(0, 8), field(10, 8);
    if (l.field == RBE_FIELD_RBE9R) field(0, 8), field(9, 1);
    if (l.field == RBE_FIELD_RBE4R) field(5, 3), field(9, 1);
    if (l.field == RBE_FIELD_RBE2R) field(7, 1), field(9, 1);
    const int64_t count = weight.w.groups * l.stages;
    std::vector<uint8_t> bytes((size_t)((count * (int64_t)places.size() + 7) / 8));
    for (int64_t q = 0; q < count; ++q) {
        for (size_t b = 0; b < places.size(); ++b) {
            const size_t bit = (size_t)q * places.size() + b;
            const uint32_t value = (uint32_t)weight.words[(size_t)(row * count + q)] >> places[b] & 1u;
            bytes[bit / 8] = (uint8_t)(bytes[bit / 8] | value << bit % 8);
        }
    }
    return bytes;
}

const char *const kFields[] = {"rbe32", "rbe22", "rbe8", "rbe16s", "rbe9r", "rbe4r", "rbe2r"};

TEST(Packing, ExactBitsBothWaysAtEveryCount) {
    std::mt19937 random(21);
    for (const char *field : kFields) {
        for (int stages : {1, 2, 3, 16}) {
            for (int64_t groups : {1, 2, 3, 5, 7, 8, 9, 33}) {
                const std::string layout = std::string(field) + "x" + std::to_string(stages) + "_g8";
                for (int64_t rows : {1, 3}) {
                    Weight weight(layout, rows, groups * 8 - 3, random);
                    const std::vector<int32_t> words = weight.words;
                    rbe_error err;
                    const int64_t bytes = rbe_packed_row_bytes(&weight.w.layout, groups), stride = bytes + 5;
                    std::vector<uint8_t> packed((size_t)(rows * bytes + 16), 0xEE);
                    ASSERT_EQ(rbe_pack(&weight.w, packed.data(), &err), RBE_OK) << layout << ": " << err.text;
                    std::vector<uint8_t> spread((size_t)(rows * stride), 0x77);
                    for (int64_t i = 0; i < rows; ++i) {
                        const std::vector<uint8_t> row(packed.begin() + i * bytes, packed.begin() + (i + 1) * bytes);
                        ASSERT_EQ(row, packed_by_hand(weight, i)) << layout << " row " << i;
                        std::copy(row.begin(), row.end(), spread.begin() + i * stride);
                    }
                    for (size_t b = (size_t)(rows * bytes); b < packed.size(); ++b)
                        ASSERT_EQ(packed[b], 0xEE) << layout << ": wrote past the end";
                    // back again, from rows with other bytes between them
                    weight.w.words = nullptr;
                    weight.w.packed = spread.data();
                    weight.w.packed_stride = stride;
                    std::vector<int32_t> back(words.size() + 4, 0x5A5A5A5A);
                    ASSERT_EQ(rbe_unpack(&weight.w, back.data(), &err), RBE_OK) << layout << ": " << err.text;
                    for (size_t q = 0; q < words.size(); ++q) ASSERT_EQ(back[q], words[q]) << layout << " code " << q;
                    for (size_t q = words.size(); q < back.size(); ++q) ASSERT_EQ(back[q], 0x5A5A5A5A) << layout << ": wrote past the end";
                    for (int64_t i = 0; i < rows; ++i)
                        for (int64_t q = 0; q < groups * stages; ++q)
                            ASSERT_EQ(rbe_reference_word(&weight.w, i, q / stages, q % stages),
                                      (uint32_t)words[(size_t)(i * groups * stages + q)]);
                }
            }
        }
    }
}

TEST(Packing, RefusesEveryBitThatTheLayoutDoesNotStore) {
    std::mt19937 random(22);
    for (const char *field : kFields) {
        for (int bit = 0; bit < 32; ++bit) {
            Weight weight(std::string(field) + "x2_g8", 2, 20, random);
            const rbe_field f = weight.w.layout.field;
            const bool stored = (rbe_field_mask(f) & ~rbe_field_constant(f)) >> bit & 1u;
            const bool drawn = rbe_field_seeded(f) && bit >= RBE_IDX_SHIFT && bit < RBE_SUB_SHIFT;
            weight.words[9] ^= (int32_t)(1u << bit);  // row 1, group 1, stage 1
            std::vector<uint8_t> packed(200);
            rbe_error err = {};
            const rbe_status status = rbe_pack(&weight.w, packed.data(), &err);
            if (stored && !drawn) {
                EXPECT_EQ(status, RBE_OK) << field << " bit " << bit << ": " << err.text;
            } else {
                EXPECT_EQ(status, RBE_BAD_ARGUMENT) << field << " bit " << bit;
                EXPECT_NE(std::strstr(err.text, "row 1, group 1, stage 1"), nullptr) << err.text;
                EXPECT_EQ(rbe_check_codes(&weight.w, &err), RBE_BAD_ARGUMENT);
            }
        }
    }
}

TEST(Packing, RefusesPaddingBitsThatAreSet) {
    std::mt19937 random(23);
    for (const char *layout : {"rbe22_g8", "rbe9r_g8", "rbe22x3_g8"}) {
        Weight weight(layout, 2, 8, random, Weight::kPacked);
        const int used = weight.w.layout.bits * weight.w.layout.stages % 8;
        for (int bit = 0; bit < 8; ++bit) {
            weight.packed.back() ^= (uint8_t)(1 << bit);
            rbe_error err = {};
            std::vector<int32_t> words(64);
            EXPECT_EQ(rbe_unpack(&weight.w, words.data(), &err), bit < used ? RBE_OK : RBE_BAD_ARGUMENT) << layout << " bit " << bit;
            EXPECT_EQ(std::strstr(err.text, "packed row 1") != nullptr, bit >= used) << err.text;
            weight.packed.back() ^= (uint8_t)(1 << bit);
        }
    }
}

TEST(Packing, RefusesShapesThatDoNotAgree) {
    std::mt19937 random(24);
    const auto refused = [&](const char *what, const char *says, void (*spoil)(rbe_weight &)) {
        Weight weight("rbe9r_g8", 3, 20, random);
        std::vector<uint8_t> packed(200);
        rbe_error err = {};
        ASSERT_EQ(rbe_pack(&weight.w, packed.data(), &err), RBE_OK) << err.text;
        spoil(weight.w);
        EXPECT_EQ(rbe_pack(&weight.w, packed.data(), &err), RBE_BAD_ARGUMENT) << what;
        EXPECT_NE(std::strstr(err.text, says), nullptr) << what << ": " << err.text;
    };
    refused("no rows", "0 rows", [](rbe_weight &w) { w.rows = 0; });
    refused("negative rows", "-3 rows", [](rbe_weight &w) { w.rows = -3; });
    refused("no columns", "0 columns", [](rbe_weight &w) { w.cols = 0; });
    refused("groups that columns do not give", "groups", [](rbe_weight &w) { w.groups = 2; });
    refused("columns near the limit", "groups", [](rbe_weight &w) { w.cols = INT64_MAX; });
    refused("a product that overflows", "addressed", [](rbe_weight &w) { w.rows = INT64_MAX / 2; });
    refused("a shard before the layer", "row0, k0", [](rbe_weight &w) { w.row0 = -1; });
    refused("a shard past the layer's groups", "row0, k0", [](rbe_weight &w) { w.k0 = w.groups_total; });
    refused("another seed", "seed", [](rbe_weight &w) { w.seed ^= 1; });
    refused("neither words nor bytes", "not in 0", [](rbe_weight &w) { w.words = nullptr; });
    refused("both words and bytes", "not in 2", [](rbe_weight &w) { w.packed = (const uint8_t *)w.words; });
    refused("a field that is none", "layout", [](rbe_weight &w) { w.layout.field = RBE_FIELD_COUNT; });
    refused("bits of another field", "layout", [](rbe_weight &w) { w.layout.bits = 22; });
    refused("no stages", "layout", [](rbe_weight &w) { w.layout.stages = 0; });

    Weight weight("rbe22_g8", 3, 20, random, Weight::kPacked);
    std::vector<int32_t> words(64);
    rbe_error err = {};
    weight.w.packed_stride -= 1;
    EXPECT_EQ(rbe_unpack(&weight.w, words.data(), &err), RBE_BAD_ARGUMENT);
    EXPECT_NE(std::strstr(err.text, "bytes apart"), nullptr) << err.text;
    EXPECT_EQ(rbe_check_codes(nullptr, &err), RBE_BAD_ARGUMENT);
}

}  // namespace
