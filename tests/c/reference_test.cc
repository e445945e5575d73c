// The scalar specification against what it specifies: narrow floats, amplitudes, W written out again, and gradients by finite differences.
#include "product_case.h"

namespace {

constexpr double kFloat64Error = 1e-12;  // float64 sums of some hundred products of size one
constexpr double kDifference =
    1e-6;  // step of a central difference; the loss is at most quadratic in what is moved, so its error is rounding
constexpr double kGradientError = 1e-7;  // of gradients of size one: rounding of the loss over kDifference

TEST(NarrowFloats, EveryValueComesBackAndHalvesGoToEven) {
    const auto check = [](const char *what, float (*widen)(uint16_t), uint16_t (*narrow)(double), uint16_t infinity) {
        for (uint32_t bits = 0; bits < 65536; ++bits) {
            const double value = widen((uint16_t)bits);
            if ((bits & 0x7FFFu) > infinity) {
                EXPECT_TRUE(std::isnan(value) && std::isnan(widen(narrow(value)))) << what << " " << bits;
                continue;
            }
            ASSERT_EQ(narrow(value), bits) << what;
            if ((bits & 0x7FFFu) + 1 >= infinity) continue;
            const double next = widen((uint16_t)(bits + 1)), half = (value + next) / 2;  // exact in float64
            ASSERT_EQ(narrow(half), bits + (bits & 1)) << what << ": half to even";
            ASSERT_EQ(narrow(std::nextafter(half, value)), bits) << what;
            ASSERT_EQ(narrow(std::nextafter(half, next)), bits + 1) << what;
        }
        EXPECT_EQ(narrow(1e300), infinity) << what;
        EXPECT_EQ(narrow(-INFINITY), infinity | 0x8000u) << what;
        EXPECT_EQ(narrow(-1e-300), 0x8000u) << what;
    };
    check("bfloat16", rbe_reference_bf16_to_f32, rbe_reference_f64_to_bf16, 0x7F80);
    check("float16", rbe_reference_f16_to_f32, rbe_reference_f64_to_f16, 0x7C00);
    EXPECT_EQ(rbe_reference_f16_to_f32(0x0001), 0x1p-24f);
    EXPECT_EQ(rbe_reference_f16_to_f32(0x7BFF), 65504.0f);
    EXPECT_EQ(rbe_reference_f64_to_f16(65520.0), 0x7C00);  // half of the last step rounds to infinity
    EXPECT_EQ(rbe_reference_e4m3fn_to_f32(0x01), 0x1p-9f);
    EXPECT_EQ(rbe_reference_e4m3fn_to_f32(0x38), 1.0f);
    EXPECT_EQ(rbe_reference_e4m3fn_to_f32(0xFE), -448.0f);
    EXPECT_TRUE(std::isnan(rbe_reference_e4m3fn_to_f32(0x7F)) && std::isnan(rbe_reference_e4m3fn_to_f32(0xFF)));
}

TEST(Scale, RoundsEveryOperationToFloat32) {
    const float *t = rbe_curve_table[RBE_CURVE_EXP];
    const uint32_t curve = rbe_field_constant(RBE_FIELD_RBE9R);
    for (uint32_t amp = 0; amp < 256; ++amp) {
        EXPECT_EQ(rbe_reference_scale(RBE_FIELD_RBE22, curve | amp), t[amp]);
        EXPECT_EQ(rbe_reference_scale(RBE_FIELD_RBE9R, curve | 1u << RBE_SIGN_SHIFT | amp), -t[amp]);
        volatile float step = t[amp + 1] - t[amp], part = step * (777.0f / 1024.0f),
                       sum = t[amp] + part;  // volatile: no fusing, no excess precision
        EXPECT_EQ(rbe_reference_scale(RBE_FIELD_RBE32, curve | 777u << RBE_FINE_SHIFT | amp), sum);
    }
    EXPECT_EQ(rbe_reference_scale(RBE_FIELD_RBE8, 0x3FC00), 1.0f);
    EXPECT_EQ(rbe_reference_scale(RBE_FIELD_RBE16S, 0x3FCFF), 1.0f);
}

TEST(Amplitude, RoundsHalfUpAndStopsBelowOne) {
    const uint32_t kept = 2u << RBE_CAT_SHIFT | 1u << RBE_SUB_SHIFT | 200u << RBE_IDX_SHIFT | 1u << RBE_DERIV_SHIFT;
    const uint32_t junk = 999u << RBE_FINE_SHIFT | 1u << RBE_SIGN_SHIFT | 123u;
    const auto word22 = [&](double a) { return rbe_reference_amplitude_word(RBE_FIELD_RBE22, kept | junk, a); };
    const auto word32 = [&](double a) { return rbe_reference_amplitude_word(RBE_FIELD_RBE32, kept | junk, a); };
    const auto coarse = [&](uint32_t k, uint32_t sign) { return kept | sign << RBE_SIGN_SHIFT | k; };
    const auto fine = [&](uint32_t k, uint32_t sign) { return kept | sign << RBE_SIGN_SHIFT | k >> 10 | (k & 1023u) << RBE_FINE_SHIFT; };
    for (uint32_t k = 0; k < 255; ++k) {
        const double half = (k + 0.5) / 256;
        EXPECT_EQ(word22(half), coarse(k + 1, 0));
        EXPECT_EQ(word22(-half), coarse(k + 1, 1));
        EXPECT_EQ(word22(std::nextafter(half, 0.0)), coarse(k, 0));  // adding 0.5 before flooring would round this one up at k = 0
        EXPECT_EQ(word22((double)std::nextafterf((float)half, 0.0f)), coarse(k, 0));
    }
    for (uint32_t k : {0u, 1u, 1023u, 1024u, 131071u, (1u << 18) - 2}) {
        const double half = (k + 0.5) / (1 << 18);
        EXPECT_EQ(word32(half), fine(k + 1, 0));
        EXPECT_EQ(word32(std::nextafter(half, 0.0)), fine(k, 0));
    }
    for (double a : {255.5 / 256, 1.0, 1.5, 1e300, (double)INFINITY}) {
        EXPECT_EQ(word22(a), coarse(255, 0)) << a;
        EXPECT_EQ(word22(-a), coarse(255, 1)) << a;
    }
    for (double a : {1.0, 2.0, (double)INFINITY}) EXPECT_EQ(word32(-a), fine((1u << 18) - 1, 1)) << a;
    EXPECT_EQ(word22(0.0), coarse(0, 0));
    EXPECT_EQ(word22(-0.0), coarse(0, 0));  // sign = a < 0
    EXPECT_EQ(word22(-1e-300), coarse(0, 1));
    EXPECT_TRUE(std::isnan(rbe_reference_amplitude_scale(RBE_FIELD_RBE22, kept, NAN, true)));
    EXPECT_TRUE(std::isnan(rbe_reference_amplitude_slope(RBE_FIELD_RBE22, kept, NAN, false)));
}

TEST(Amplitude, SlopeIsThatOfTheCellAndItsGradientStopsAtOne) {
    std::mt19937 random(31);
    for (int i = 0; i < 2000; ++i) {
        const uint32_t word = (uint32_t)random();
        const double a = (random() % 2 ? 1 : -1) * ((double)(random() % 256) + 0.25) / 256,
                     step = 1e-4;  // inside a cell with room on both sides
        const double low = rbe_reference_amplitude_scale(RBE_FIELD_RBE32, word, a - step, false);
        const double high = rbe_reference_amplitude_scale(RBE_FIELD_RBE32, word, a + step, false);
        ASSERT_NEAR(rbe_reference_amplitude_slope(RBE_FIELD_RBE32, word, a, false), (high - low) / (2 * step), 1e-9);
        ASSERT_EQ(rbe_reference_amplitude_slope(RBE_FIELD_RBE22, word, a, true),
                  rbe_reference_amplitude_slope(RBE_FIELD_RBE32, word, a, true));
    }
    const uint32_t word = rbe_field_constant(RBE_FIELD_RBE9R);  // exp(r) - 1: slope > 0
    const auto gradient = [&](double a, double dscale) { return rbe_reference_amplitude_gradient(RBE_FIELD_RBE22, word, a, true, dscale); };
    EXPECT_EQ(gradient(1.0, -2.0), 0.0);  // descent would raise a above 1
    EXPECT_EQ(gradient(-1.5, 2.0), 0.0);
    EXPECT_GT(gradient(1.0, 2.0), 0.0);  // descent brings it back
    EXPECT_LT(gradient(-1.5, -2.0), 0.0);
    EXPECT_LT(gradient(0.999, -2.0), 0.0);
    EXPECT_TRUE(std::isnan(gradient(1.0, NAN)));
}

// W once more, from the definition, without the code under test but for the scale.
std::vector<double> written_out(const Weight &weight) {
    const rbe_weight &w = weight.w;
    const int64_t g = w.layout.group, stages = w.layout.stages;
    std::vector<double> dense((size_t)(w.rows * w.cols));
    for (int64_t i = 0; i < w.rows; ++i) {
        for (int64_t j = 0; j < w.cols; ++j) {
            double sum = 0;
            for (int64_t s = 0; s < stages; ++s) {
                const size_t code = (size_t)((i * w.groups + j / g) * stages + s);
                uint32_t word = (uint32_t)weight.words[code];
                if (w.amplitude) word = rbe_reference_amplitude_word(w.layout.field, word, weight.amplitude[code]);
                double value = weight.basis[(size_t)((s * 256 + (word >> 10 & 255)) * g + j % g)];
                if (w.layout.field == RBE_FIELD_RBE16S && (word >> (j % g) & 1)) value = -value;
                sum += rbe_reference_scale(w.layout.field, word) * value;
            }
            dense[(size_t)(i * w.cols + j)] = weight.gain[(size_t)i] * sum + rbe_reference_residual(&w, i, j);
        }
    }
    return dense;
}

TEST(Reference, ProductIsThatOfTheWeightWrittenOut) {
    std::mt19937 random(32);
    for (const std::string &layout : kLayouts) {
        for (const auto codes : {Weight::kWords, Weight::kPacked, Weight::kAmplitude}) {
            for (const auto &[m, n, tokens] : {std::tuple<int, int, int>{1, 1, 1}, {3, 17, 5}, {2, 70, 0}, {4, 9, 67}}) {
                Weight weight(layout, m, n, random, codes);
                if (codes == Weight::kAmplitude && (weight.w.layout.field == RBE_FIELD_RBE8 || weight.w.layout.field == RBE_FIELD_RBE16S))
                    continue;
                const std::vector<double> dense = written_out(weight);
                Matrix x(RBE_F64, tokens, n, Matrix::kSpaced), y(RBE_F64, tokens, m, Matrix::kTransposed), truth(RBE_F64, tokens, m);
                x.fill(random);
                for (int t = 0; t < tokens; ++t) {
                    for (int i = 0; i < m; ++i) {
                        double sum = weight.bias[(size_t)i];
                        for (int j = 0; j < n; ++j) sum += x.at(t, j) * dense[(size_t)(i * n + j)];
                        truth.set(t, i, sum);
                    }
                }
                rbe_reference_linear(&weight.w, &x.view, weight.bias.data(), &y.view);
                expect_near(y, truth, kFloat64Error, layout);
            }
        }
    }
}

TEST(Reference, ResidualsAreWhatTheirNumbersSay) {
    std::mt19937 random(33);
    Weight int8("rbe8_g8+int8", 2, 5, random), fp8("rbe8_g8+fp8", 2, 5, random), low("rbe8_g8+lr3", 2, 5, random),
        sparse("rbe8_g8+sp0.5", 2, 5, random);
    for (int64_t i = 0; i < 2; ++i) {
        for (int64_t j = 0; j < 5; ++j) {
            EXPECT_EQ(rbe_reference_residual(&int8.w, i, j), (double)(int8_t)int8.residual_values[(size_t)(i * 5 + j)] * 0.01f);
            EXPECT_EQ(rbe_reference_residual(&fp8.w, i, j),
                      (double)rbe_reference_e4m3fn_to_f32(fp8.residual_values[(size_t)(i * 5 + j)]) * 0.01f);
            double sum = 0;
            for (int64_t p = 0; p < 3; ++p)
                sum += (double)(int8_t)low.residual_values[(size_t)(i * 3 + p)] * 0.02f * (int8_t)low.residual_right[(size_t)(p * 5 + j)] *
                       0.003f;
            EXPECT_NEAR(rbe_reference_residual(&low.w, i, j), sum, 1e-12);
        }
        EXPECT_EQ(rbe_reference_sparse_count(&sparse.w), 2);  // 2.5, halves to even
        EXPECT_EQ(rbe_reference_residual(&sparse.w, i, 2),
                  rbe_reference_load(sparse.residual_values.data(), RBE_F16, i * 2 + 1));  // columns 0 and 2
        EXPECT_EQ(rbe_reference_residual(&sparse.w, i, 3), 0.0);
    }
}

// A float64 copy of a weight, so that gradients can be had by finite differences.
struct Wide {
    Weight narrow;
    rbe_weight w;
    std::vector<double> basis, gain, bias, amplitude;
    Wide(const std::string &layout, int64_t m, int64_t n, std::mt19937 &random, bool trained)
        : narrow(layout, m, n, random, trained ? Weight::kAmplitude : Weight::kWords),
          w(narrow.w),
          basis(narrow.basis.begin(), narrow.basis.end()),
          gain(narrow.gain.begin(), narrow.gain.end()),
          bias(narrow.bias.begin(), narrow.bias.end()) {
        w.real = RBE_F64;
        w.rounded = false;
        w.basis = basis.data();
        w.gain = gain.data();
        for (size_t q = 0; q < narrow.amplitude.size(); ++q)  // away from the kinks: the middle of a cell
            amplitude.push_back((random() % 2 ? 1 : -1) * ((double)(random() % 256) + 0.5) / 256);
        w.amplitude = amplitude.empty() ? nullptr : amplitude.data();
    }
};

TEST(Reference, GradientsAreThoseOfFiniteDifferences) {
    std::mt19937 random(34);
    for (const char *layout :
         {"rbe32_g3", "rbe22x2_g5", "rbe9r_g4", "rbe4r_g4", "rbe2r_g3", "rbe8x2_g4", "rbe16s_g8", "rbe22_g100", "rbe8_g8+int8", "rbe22_g3+lr2"}) {
        const int64_t m = 3, n = 11, tokens = 4;
        const bool scaled = std::string(layout).rfind("rbe8", 0) && std::string(layout).rfind("rbe16s", 0);
        Wide wide(layout, m, n, random, scaled);
        const int64_t codes = m * wide.w.groups * wide.w.layout.stages;
        Matrix x(RBE_F64, tokens, n, Matrix::kPadded), dy(RBE_F64, tokens, m, Matrix::kReversed), y(RBE_F64, tokens, m),
            dx(RBE_F64, tokens, n, Matrix::kSpaced);
        x.fill(random), dy.fill(random);
        const auto loss = [&] {
            rbe_reference_linear(&wide.w, &x.view, wide.bias.data(), &y.view);
            double sum = 0;
            for (int64_t t = 0; t < tokens; ++t)
                for (int64_t i = 0; i < m; ++i) sum += dy.at(t, i) * y.at(t, i);
            return sum;
        };
        const auto slope = [&](double &moved) {
            const double at = moved;
            moved = at + kDifference;
            const double high = loss();
            moved = at - kDifference;
            const double low = loss();
            moved = at;
            return (high - low) / (2 * kDifference);
        };
        std::vector<double> dbasis(wide.basis.size()), dgain((size_t)m), dbias((size_t)m), damplitude((size_t)codes), dscale((size_t)codes);
        const rbe_gradients out = {&dx.view,     dbasis.data(), dgain.data(), dbias.data(), scaled ? damplitude.data() : nullptr,
                                   dscale.data()};
        rbe_reference_linear_backward(&wide.w, &dy.view, &x.view, &out);
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t j = 0; j < n; ++j)
                ASSERT_NEAR(dx.at(t, j), slope(((double *)x.view.data)[t * x.view.row_stride + j * x.view.col_stride]), kGradientError)
                    << layout;
        for (int64_t i = 0; i < m; ++i) {
            ASSERT_NEAR(dgain[(size_t)i], slope(wide.gain[(size_t)i]), kGradientError) << layout;
            ASSERT_NEAR(dbias[(size_t)i], slope(wide.bias[(size_t)i]), kGradientError) << layout;
        }
        for (size_t b = 0; b < dbasis.size(); ++b) {
            if (dbasis[b] == 0 && b % 97 != 0) continue;  // most vectors are not used: a sample of them will do
            ASSERT_NEAR(dbasis[b], slope(wide.basis[b]), kGradientError) << layout << " basis " << b;
        }
        for (size_t q = 0; scaled && q < damplitude.size(); ++q) {
            ASSERT_NEAR(damplitude[q], slope(wide.amplitude[q]), kGradientError * 10) << layout;  // of slopes up to 15
            const uint32_t word = (uint32_t)wide.narrow.words[q];
            const double da = rbe_reference_amplitude_slope(wide.w.layout.field, word, wide.amplitude[q], false);
            ASSERT_NEAR(damplitude[q], dscale[q] * da, kGradientError) << layout;
        }
    }
}

}  // namespace
