// Kernels one by one where they must give the reference's bits, and decoded weights, on every ISA the host has.
#include "product_case.h"

namespace {

TEST(Decode, EveryIsaAndLayout) {
    std::mt19937 random(13);
    for (const std::string &layout : kLayouts) {
        Weight weight(layout, 30, 131, random, Weight::kPacked);
        std::vector<float> truth(30 * 131), got(truth.size());
        rbe_reference_decode(&weight.w, truth.data());
        for (const std::string &isa : host_isas()) {
            const Using use(isa);
            rbe_error err;
            const Threads threads(2);
            ASSERT_EQ(rbe_decode(&weight.w, got.data(), &threads.parallel, &err), RBE_OK) << err.text;
            expect_near(got, truth, 1e-6, layout + " " + isa);
        }
    }
}

TEST(Kernels, ScalesAreThoseOfTheReferenceBitForBit) {
    std::mt19937 random(16);
    for (const char *layout : {"rbe32_g1", "rbe22_g1", "rbe9r_g1", "rbe4r_g1", "rbe2r_g1", "rbe22x3_g2"}) {
        for (Weight::Codes codes : {Weight::kWords, Weight::kPacked, Weight::kAmplitude}) {
            Weight weight(layout, 3, 1037, random, codes);
            const int64_t count = weight.w.groups * weight.w.layout.stages;
            if (codes == Weight::kAmplitude) {
                float *a = weight.amplitude.data();
                a[0] = 0.0f, a[1] = -0.0f, a[2] = 1.0f, a[3] = -5.0f, a[4] = NAN, a[5] = INFINITY, a[6] = 1e-30f, a[7] = -1e-30f;
                a[8] = std::nextafterf(0.5f / 256.0f, 0.0f), a[9] = 0.5f / 256.0f;  // rounding half up, just below and at a half
            }
            for (const std::string &isa : host_isas()) {
                for (int64_t i = 0; i < 3; ++i) {
                    std::vector<uint8_t> idx((size_t)count);
                    std::vector<float> scale((size_t)count);
                    const rbe_code_row row = {weight.w.layout.field, count, weight.w.words ? weight.w.words + i * count : nullptr,
                                              weight.w.packed ? weight.w.packed + i * weight.w.packed_stride : nullptr,
                                              weight.w.amplitude ? (const float *)weight.w.amplitude + i * count : nullptr, weight.w.seed,
                                              (uint32_t)(((weight.w.row0 + i) * weight.w.groups_total + weight.w.k0) * weight.w.layout.stages)};
                    const int64_t q0 = i * 5;  // anywhere in the row
                    rbe_kernels_of(isa.c_str())->unpack(&row, q0, count - q0, idx.data(), scale.data(), nullptr);
                    for (int64_t q = q0; q < count; ++q) {
                        const int64_t k = q / weight.w.layout.stages, s = q % weight.w.layout.stages;
                        const float truth = (float)rbe_reference_code_scale(&weight.w, i, k, s), got = scale[(size_t)(q - q0)];
                        ASSERT_EQ(idx[(size_t)(q - q0)], rbe_word_idx(rbe_reference_word(&weight.w, i, k, s))) << layout << " " << isa;
                        ASSERT_TRUE(std::memcmp(&truth, &got, 4) == 0 || (truth != truth && got != got)) << layout << " " << isa << " code " << q;
                    }
                }
            }
        }
    }
}

TEST(Kernels, HalfTypesConvertAsTheReference) {
    std::vector<uint16_t> bits(65536 + 3), back(bits.size());
    for (size_t i = 0; i < bits.size(); ++i) bits[i] = (uint16_t)i;
    std::vector<float> wide(bits.size()), between(bits.size());
    for (const std::string &isa : host_isas()) {
        const rbe_kernels *k = rbe_kernels_of(isa.c_str());
        for (bool bf16 : {true, false}) {
            const int64_t count = (int64_t)bits.size();
            (bf16 ? k->bf16_to_f32 : k->f16_to_f32)(bits.data(), count, wide.data());
            for (size_t i = 0; i < bits.size(); ++i) {
                const float truth = bf16 ? rbe_reference_bf16_to_f32(bits[i]) : rbe_reference_f16_to_f32(bits[i]);
                ASSERT_TRUE(wide[i] == truth || (wide[i] != wide[i] && truth != truth)) << isa << " " << i;
                between[i] = wide[i] + (i % 3 ? 0.25f : 0.5f) * (wide[(i + 1) % bits.size()] - wide[i]);  // ties among them
            }
            for (const std::vector<float> *in : {&wide, &between}) {
                (bf16 ? k->f32_to_bf16 : k->f32_to_f16)(in->data(), count, back.data());
                for (size_t i = 0; i < bits.size(); ++i) {
                    const uint16_t truth = bf16 ? rbe_reference_f64_to_bf16((*in)[i]) : rbe_reference_f64_to_f16((*in)[i]);
                    const bool nan = (*in)[i] != (*in)[i];
                    const float got = bf16 ? rbe_reference_bf16_to_f32(back[i]) : rbe_reference_f16_to_f32(back[i]);
                    ASSERT_TRUE(nan ? got != got : back[i] == truth) << isa << " bf16 " << bf16 << " " << (*in)[i] << ": " << back[i] << " for " << truth;
                }
            }
        }
    }
}

}  // namespace
