// Codes of one byte, interleaved and back, and the paths of rbe_linear for them (tables of bytes, tables in L1, digits) against the float64 reference.
#include <cstring>

#include "product_case.h"

namespace {

bool has_digits(const std::string &isa) { return rbe_kernels_of(isa.c_str())->digits_multiply; }
bool has_few(const std::string &isa) { return rbe_kernels_of(isa.c_str())->few_rows; }
bool has_lookups(const std::string &isa) { return rbe_kernels_of(isa.c_str())->lut8_rows; }

// Every element within error * the root mean square that a sum of n * M products of unit variance has in its row.
void expect_rows_near(const Forward &f, double error, const std::string &what) {
    const double size = std::sqrt((double)(f.weight.w.cols * f.weight.w.layout.stages));
    for (int64_t t = 0; t < f.y.view.rows; ++t)
        for (int64_t i = 0; i < f.y.view.cols; ++i)
            ASSERT_LE(std::fabs(f.y.at(t, i) - f.truth.at(t, i)), error * size * f.weight.gain[(size_t)i]) << what << " at " << t << ", " << i;
}

TEST(Interleave, PutsRowsSideBySideAndBackOnEveryIsa) {
    std::mt19937 random(1);
    for (int64_t rows : {1, 7, 8, 9, 63, 64, 65, 130}) {
        for (int64_t count : {1, 8, 13, 64, 96, 130}) {
            std::vector<uint8_t> packed((size_t)(rows * (count + 5)));
            for (uint8_t &b : packed) b = (uint8_t)random();
            for (const std::string &isa : host_isas()) {
                const Using use(isa);
                const int64_t tiles = rbe_interleaved_tiles(rows);
                std::vector<uint8_t> out((size_t)(tiles * count * 64), 0x5A), back((size_t)(rows * count), 0x5A);
                rbe_error err;
                ASSERT_EQ(rbe_interleave(packed.data(), count + 5, rows, count, out.data(), &err), RBE_OK);
                for (int64_t i = 0; i < tiles * 64; ++i)
                    for (int64_t q = 0; q < count; ++q)
                        ASSERT_EQ(out[(size_t)((i / 64 * count + q) * 64 + i % 64)], i < rows ? packed[(size_t)(i * (count + 5) + q)] : 0) << isa;
                ASSERT_EQ(rbe_deinterleave(out.data(), rows, count, back.data(), &err), RBE_OK);
                for (int64_t i = 0; i < rows; ++i)
                    for (int64_t q = 0; q < count; ++q) ASSERT_EQ(back[(size_t)(i * count + q)], packed[(size_t)(i * (count + 5) + q)]) << isa;
            }
        }
    }
}

TEST(Interleave, OtherFieldsAreRefused) {
    std::mt19937 random(2);
    Forward f("rbe16s_g8", 9, 40, 3, random, Weight::kPacked);
    f.weight.w.interleaved = f.weight.w.packed;
    f.weight.w.packed = nullptr;
    rbe_error err;
    EXPECT_EQ(rbe_linear(&f.weight.w, &f.x.view, nullptr, &f.y.view, RBE_ACCURACY_AUTO, nullptr, &err), RBE_BAD_ARGUMENT);
    EXPECT_NE(std::string(err.text).find("codes: are interleaved, but only codes of one byte"), std::string::npos) << err.text;
}

// However codes are given, a path computes the same bits.
TEST(Bytes, FormsOfTheCodesGiveTheSameBits) {
    for (const std::string &isa : host_isas()) {
        for (rbe_path path : {RBE_PATH_TABLE, RBE_PATH_TABLE_TOKEN, RBE_PATH_DECODE_DOT, RBE_PATH_DECODE, RBE_PATH_LUT8, RBE_PATH_FEW,
                              RBE_PATH_LOOKUP, RBE_PATH_LOOKUP_SPLIT, RBE_PATH_DIGITS}) {
            for (const char *layout : {"rbe8x2_g8", "rbe8x3_g8", "rbe8_g5", "rbe8x3_g4"}) {
                // without the path the plan decides, which weighs what turning the codes costs
                if ((path == RBE_PATH_FEW || path == RBE_PATH_LOOKUP) && !has_few(isa)) continue;
                if ((path == RBE_PATH_LOOKUP || path == RBE_PATH_LOOKUP_SPLIT) && !std::strstr(layout, "_g8")) continue;
                if ((path == RBE_PATH_LUT8 && !has_lookups(isa)) || ((path == RBE_PATH_DIGITS || path == RBE_PATH_LOOKUP_SPLIT) && !has_digits(isa))) continue;
                const Using use(isa, path);
                std::mt19937 one(3), other(3);
                Forward packed(layout, 77, 203, 5, one, Weight::kPacked), interleaved(layout, 77, 203, 5, other, Weight::kInterleaved);
                for (rbe_accuracy accuracy : {RBE_ACCURACY_EXACT, RBE_ACCURACY_FAST}) {
                    packed.run(accuracy);
                    interleaved.run(accuracy);
                    ASSERT_EQ(packed.y.bytes, interleaved.y.bytes) << layout << " " << isa << " path " << path;
                }
            }
        }
    }
}

TEST(Bytes, DecodeAndBackwardTakeInterleavedCodes) {
    std::mt19937 one(4), other(4);
    Weight packed("rbe8x2_g8", 70, 60, one, Weight::kPacked), interleaved("rbe8x2_g8", 70, 60, other, Weight::kInterleaved);
    std::vector<float> dense[2], dbasis[2], dgain[2];
    Matrix x(RBE_F32, 9, 60), dy(RBE_F32, 9, 70), dx0(RBE_F32, 9, 60), dx1(RBE_F32, 9, 60);
    x.fill(one);
    dy.fill(one);
    for (int side : {0, 1}) {
        const rbe_weight *w = side ? &interleaved.w : &packed.w;
        dense[side].resize(70 * 60);
        dbasis[side].resize(packed.basis.size());
        dgain[side].resize(70);
        rbe_error err;
        ASSERT_EQ(rbe_decode(w, dense[side].data(), nullptr, &err), RBE_OK) << err.text;
        const rbe_gradients out = {side ? &dx1.view : &dx0.view, dbasis[side].data(), dgain[side].data(), nullptr, nullptr, nullptr};
        ASSERT_EQ(rbe_linear_backward(w, &dy.view, &x.view, &out, RBE_ACCURACY_AUTO, nullptr, &err), RBE_OK) << err.text;
    }
    ASSERT_EQ(dense[0], dense[1]);
    ASSERT_EQ(dbasis[0], dbasis[1]);
    ASSERT_EQ(dgain[0], dgain[1]);
    ASSERT_EQ(dx0.bytes, dx1.bytes);
}

TEST(Bytes, EverySizeErrsByNoMoreThanItsClass) {
    std::mt19937 random(5);
    for (const std::string &isa : host_isas()) {
        for (const char *layout : {"rbe8_g8", "rbe8x2_g8", "rbe8x3_g8", "rbe8x4_g8", "rbe8x3_g4", "rbe8x4_g16", "rbe8x2_g20", "rbe8x2_g5", "rbe16s_g8", "rbe16sx2_g8"}) {
            const bool flipped = std::string(layout).find("16s") != std::string::npos;
            const int stages = flipped ? layout[6] == 'x' ? 2 : 1 : layout[4] == 'x' ? layout[5] - '0' : 1;
            for (int64_t m : {1, 63, 64, 65, 200}) {
                for (int64_t n : {5, 63, 64, 65, 250}) {
                    for (int64_t tokens : {1, 3, 6, 16, 17, 33}) {
                        Forward f(layout, m, n, tokens, random, flipped || (m + n) % 2 ? Weight::kPacked : Weight::kInterleaved);
                        f.reference();
                        const std::string what = std::string(layout) + " " + isa + " " + std::to_string(m) + "x" + std::to_string(n) + " tokens " +
                                                 std::to_string(tokens);
                        const std::vector<char> before = f.y.surroundings();
                        if (has_few(isa) && !flipped) {
                            const Using use(isa, RBE_PATH_FEW);
                            f.run(RBE_ACCURACY_EXACT);
                            expect_rows_near(f, kFloat32Error, what + " few");
                        }
                        if (has_few(isa) && !flipped && what.find("_g8 ") != std::string::npos) {
                            const Using use(isa, RBE_PATH_LOOKUP);
                            f.run(RBE_ACCURACY_EXACT);
                            expect_rows_near(f, kFloat32Error, what + " lookup");
                        }
                        if (has_digits(isa) && !flipped && what.find("_g8 ") != std::string::npos) {
                            const Using use(isa, RBE_PATH_LOOKUP_SPLIT);
                            f.run(RBE_ACCURACY_EXACT);
                            expect_rows_near(f, kFloat32Error, what + " lookup, matrix unit");
                            f.run(RBE_ACCURACY_FAST);
                            expect_rows_near(f, kByteError, what + " lookup, matrix unit, fast");
                        }
                        if (has_lookups(isa) && !flipped && tokens <= 3) {
                            const Using use(isa, RBE_PATH_LUT8);
                            f.run(RBE_ACCURACY_FAST);
                            expect_rows_near(f, kByteError, what + " bytes");
                            f.run(RBE_ACCURACY_EXACT);
                            expect_rows_near(f, kFloat32Error, what + " 24 bits");
                        }
                        if (has_digits(isa)) {
                            const Using use(isa, RBE_PATH_DIGITS);
                            f.run(RBE_ACCURACY_FAST);
                            expect_rows_near(f, tokens <= 32 && stages <= 2 ? kByteError : kTwoDigitsError, what + " digits");
                            if (!flipped || stages == 1) {
                                f.run(RBE_ACCURACY_EXACT);
                                expect_rows_near(f, kFloat32Error, what + " three digits");
                            }
                        }
                        ASSERT_EQ(before, f.y.surroundings()) << what << ": wrote outside y";
                    }
                }
            }
        }
    }
}

// More columns and tokens than are taken together, with what is left of them.
TEST(Bytes, LookedUpRowsOnTheMatrixUnitInSeveralParts) {
    std::mt19937 random(12);
    for (const std::string &isa : host_isas()) {
        if (!has_digits(isa)) continue;
        const Using use(isa, RBE_PATH_LOOKUP_SPLIT);
        for (const char *layout : {"rbe8_g8", "rbe8x2_g8", "rbe8x3_g8", "rbe8x4_g8"}) {
            for (rbe_dtype dtype : {RBE_F32, RBE_BF16}) {
                const double rounding = dtype == RBE_F32 ? 0.0 : 6.0 * kBfloat16Step;
                Forward f(layout, 130, 1063, 150, random, dtype == RBE_F32 ? Weight::kPacked : Weight::kInterleaved, dtype);
                f.reference();
                f.run(RBE_ACCURACY_EXACT);
                expect_rows_near(f, kFloat32Error + rounding, std::string(layout) + " " + isa);
                f.run(RBE_ACCURACY_FAST);
                expect_rows_near(f, kByteError + rounding, std::string(layout) + " fast " + isa);
            }
        }
    }
}

// Activations of every type, in any strides, that no path may read or write outside of.
TEST(Bytes, TypesAndStrides) {
    std::mt19937 random(9);
    for (const char *layout : {"rbe8x2_g8", "rbe16s_g8"}) {
        for (rbe_dtype dtype : {RBE_F32, RBE_BF16, RBE_F16}) {
            const double rounding = dtype == RBE_F32 ? 0.0 : 2.0 * (dtype == RBE_BF16 ? kBfloat16Step : kFloat16Step);
            for (Matrix::Shape shape : {Matrix::kRows, Matrix::kPadded, Matrix::kTransposed, Matrix::kReversed, Matrix::kSpaced}) {
                for (int64_t tokens : {1, 5, 18}) {
                    Forward f(layout, 77, 90, tokens, random, Weight::kPacked, dtype, shape, shape == Matrix::kSpaced ? Matrix::kPadded : shape);
                    f.reference();
                    for (const std::string &isa : host_isas()) {
                        for (rbe_path path : {RBE_PATH_LUT8, RBE_PATH_FEW, RBE_PATH_LOOKUP, RBE_PATH_LOOKUP_SPLIT, RBE_PATH_DIGITS}) {
                            const Using use(isa, path);
                            const std::vector<char> before = f.y.surroundings();
                            // the rounding of y is to a step of y, at most some times the root mean square of a row
                            f.run(RBE_ACCURACY_EXACT);
                            expect_rows_near(f, kFloat32Error + 3.0 * rounding, isa + " " + layout + " exact path " + std::to_string(path));
                            f.run(RBE_ACCURACY_FAST);
                            expect_rows_near(f, kByteError + 3.0 * rounding, isa + " " + layout + " fast path " + std::to_string(path));
                            ASSERT_EQ(before, f.y.surroundings()) << isa << ": wrote outside y";
                        }
                    }
                }
            }
        }
    }
}

// More columns than pass over the rows at once, and more tokens than a block.
TEST(Bytes, DigitsOverSeveralChunks) {
    std::mt19937 random(6);
    for (const std::string &isa : host_isas()) {
        if (!has_digits(isa)) continue;
        for (const char *layout : {"rbe8x2_g8", "rbe8_g1", "rbe16s_g8"}) {
            Forward f(layout, 130, 4200, 270, random, Weight::kPacked);
            f.reference();
            const Using use(isa, RBE_PATH_DIGITS);
            f.run(RBE_ACCURACY_FAST);
            expect_rows_near(f, kTwoDigitsError, isa + " " + layout);
            f.run(RBE_ACCURACY_EXACT);
            expect_rows_near(f, kFloat32Error, isa + " three digits " + layout);
        }
    }
}

// Codes are read row tile by row tile while tables are small, else 64 codes of all rows at a time: more than one tile of either, and what is left of them.
TEST(Bytes, OrdersOfReadingGiveTheSameBits) {
    for (const std::string &isa : host_isas()) {
        if (!has_lookups(isa)) continue;
        const Using use(isa, RBE_PATH_LUT8);
        for (int64_t tokens : {1, 5}) {
            const int64_t m = 331, n = 4100, codes = (n + 7) / 8 * 2;
            ASSERT_EQ(rbe_lut8_streams(tokens, codes, 1), tokens == 1);
            std::mt19937 one(4), other(4);
            Forward packed("rbe8x2_g8", m, n, tokens, one, Weight::kPacked), interleaved("rbe8x2_g8", m, n, tokens, other, Weight::kInterleaved);
            for (rbe_accuracy accuracy : {RBE_ACCURACY_EXACT, RBE_ACCURACY_FAST}) {
                packed.run(accuracy);
                interleaved.run(accuracy);
                ASSERT_EQ(packed.y.bytes, interleaved.y.bytes) << isa << " tokens " << tokens;
            }
            interleaved.reference();
            expect_rows_near(interleaved, kByteError, isa);
        }
    }
}

// The largest sums that digits can make: every code the vector of largest entries, every x the largest.
TEST(Bytes, DigitsDoNotOverflow) {
    std::mt19937 random(7);
    for (const std::string &isa : host_isas()) {
        for (const char *layout : {"rbe8_g8", "rbe8x2_g8", "rbe8x5_g4", "rbe8x16_g8"}) {
            for (int64_t tokens : {2, 16, 40}) {
                Forward f(layout, 64, 512, tokens, random, Weight::kInterleaved);
                for (float &b : f.weight.basis) b = random() % 2 ? 3.0f : -3.0f;
                for (int64_t t = 0; t < tokens; ++t)
                    for (int64_t j = 0; j < 512; ++j) f.x.set(t, j, t % 2 ? 1.0 : -1.0);
                f.reference();
                const Using use(isa, RBE_PATH_DIGITS);
                f.run(RBE_ACCURACY_FAST);
                expect_near(f.y, f.truth, kByteError, std::string(layout) + " " + isa);
                f.run(RBE_ACCURACY_EXACT);
                expect_near(f.y, f.truth, kFloat32Error, std::string(layout) + " three digits " + isa);
            }
        }
    }
}

// Few tokens are summed from the first column to the last in int32, up to 32768 columns, in chunks beyond: every product near the largest, of one sign.
TEST(Bytes, DigitsOfManyColumnsDoNotOverflow) {
    std::mt19937 random(10);
    for (const std::string &isa : host_isas()) {
        if (!has_digits(isa)) continue;
        for (const char *layout : {"rbe8_g8", "rbe8x2_g8", "rbe8x4_g8"}) {
            for (int64_t n : {32768, 32776}) {
                for (int64_t tokens : {2, 9}) {
                    Forward f(layout, 3, n, tokens, random, Weight::kInterleaved);
                    std::fill(f.weight.basis.begin(), f.weight.basis.end(), 2.98f);
                    f.weight.basis[0] = 3.0f;
                    for (int64_t t = 0; t < tokens; ++t)
                        for (int64_t j = 0; j < n; ++j) f.x.set(t, j, (t % 2 ? 1.0 : -1.0) * (j ? 0.99 : 1.0));
                    f.reference();
                    const Using use(isa, RBE_PATH_DIGITS);
                    f.run(RBE_ACCURACY_FAST);
                    expect_near(f.y, f.truth, kByteError, std::string(layout) + " columns " + std::to_string(n));
                    f.run(RBE_ACCURACY_EXACT);
                    expect_near(f.y, f.truth, kFloat32Error, std::string(layout) + " three digits, columns " + std::to_string(n));
                }
            }
        }
    }
}

TEST(Bytes, ZeroTinyAndHugeInputs) {
    std::mt19937 random(8);
    for (const std::string &isa : host_isas()) {
        for (rbe_path path : {RBE_PATH_LUT8, RBE_PATH_FEW, RBE_PATH_LOOKUP, RBE_PATH_LOOKUP_SPLIT, RBE_PATH_DIGITS}) {
            for (double value : {0.0, 1e-42, 1e-30, 1e30}) {
                Forward f("rbe8x2_g8", 70, 64, 1, random, Weight::kPacked);
                for (int64_t j = 0; j < 64; ++j) f.x.set(0, j, value);
                std::fill(f.weight.bias.begin(), f.weight.bias.end(), 0.0f);
                f.reference();
                const Using use(isa, path);
                for (rbe_accuracy accuracy : {RBE_ACCURACY_EXACT, RBE_ACCURACY_FAST}) {
                    f.run(accuracy);
                    // below 1e-36 a fast product may count as zero
                    const double error = accuracy == RBE_ACCURACY_EXACT ? kFloat32Error : kByteError;
                    for (int64_t i = 0; i < 70; ++i)
                        ASSERT_LE(std::fabs(f.y.at(0, i) - f.truth.at(0, i)), error * 12.0 * f.weight.gain[(size_t)i] * std::max(value, 1e-36) + 1e-37)
                            << isa << " path " << path << " value " << value;
                }
            }
        }
    }
}

}  // namespace
