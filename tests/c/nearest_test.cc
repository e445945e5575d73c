// The kernels of the encoders on every ISA: scores and their limit against plain sums, and thin products to the bit. And what relies on them:
// codes do not depend on the ISA.
#include "encode_case.h"

namespace {

constexpr double kScore = 1e-5;  // of |v| |b|: float32 sums of at most 37 products

struct Scores {
    int64_t rows, depth, stride;
    std::vector<float> v, basis, guide, score, most, top;
    Scores(int64_t rows, int64_t depth, std::mt19937 &random) : rows(rows), depth(depth), stride(depth + 3) {
        std::normal_distribution<float> normal;
        v.resize((size_t)(rows * stride)), basis.resize((size_t)(depth * 256)), guide.resize(256);
        for (float &x : v) x = normal(random);
        for (float &x : basis) x = normal(random);
        for (float &x : guide) x = std::fabs(normal(random));
        score.assign((size_t)(rows * 256), NAN), most.assign((size_t)(rows * RBE_SCORE_LANES), NAN), top.assign((size_t)rows, NAN);
    }
    void compute(const rbe_kernels *k, bool squared) {
        k->scores(rows, depth, v.data(), stride, basis.data(), squared ? nullptr : guide.data(), squared ? guide.data() : nullptr, score.data(),
                  most.data(), top.data());
    }
    double truth(int64_t r, int64_t j, bool squared) const {
        double sum = 0;
        for (int64_t e = 0; e < depth; ++e) sum += (double)v[(size_t)(r * stride + e)] * basis[(size_t)(e * 256 + j)];
        return squared ? std::fabs(sum * guide[(size_t)j]) : sum - guide[(size_t)j];
    }
};

TEST(Nearest, ScoresAreThoseOfPlainSums) {
    std::mt19937 random(60);
    for (int64_t rows : {1, 2, 7, 8, 9, 19}) {
        for (int64_t depth : {1, 3, 8, 37}) {
            Scores s(rows, depth, random);
            for (const std::string &isa : host_isas()) {
                for (bool squared : {false, true}) {
                    s.compute(rbe_kernels_of(isa.c_str()), squared);
                    for (int64_t r = 0; r < rows; ++r) {
                        float largest = -INFINITY;
                        for (int64_t j = 0; j < 256; ++j) {
                            const float got = s.score[(size_t)(r * 256 + j)];
                            ASSERT_NEAR(got, s.truth(r, j, squared), kScore * (double)(depth + 8) * 3) << isa << " " << rows << "x" << depth;
                            largest = std::max(largest, got);
                        }
                        ASSERT_EQ(s.top[(size_t)r], largest) << isa;
                        for (int64_t l = 0; l < RBE_SCORE_LANES; ++l) {
                            float lane = -INFINITY;
                            for (int64_t j = l; j < 256; j += RBE_SCORE_LANES) lane = std::max(lane, s.score[(size_t)(r * 256 + j)]);
                            ASSERT_EQ(s.most[(size_t)(r * RBE_SCORE_LANES + l)], lane) << isa;
                        }
                    }
                }
            }
        }
    }
}

TEST(Nearest, TheLimitLetsEnoughThrough) {
    std::mt19937 random(61);
    std::normal_distribution<float> normal;
    for (int64_t rows : {1, 3, 8}) {
        Scores s(rows, 8, random);
        std::vector<float> base((size_t)rows);
        for (float &x : base) x = 10 * std::fabs(normal(random));
        for (const std::string &isa : host_isas()) {
            const rbe_kernels *k = rbe_kernels_of(isa.c_str());
            for (bool squared : {false, true}) {
                s.compute(k, squared);
                for (int want : {1, 8}) {
                    const float limit = k->score_limit(rows, base.data(), squared, s.most.data(), want);
                    int passed = 0;
                    for (int64_t r = 0; r < rows; ++r)
                        for (int64_t j = 0; j < 256; ++j) {
                            const float score = s.score[(size_t)(r * 256 + j)];
                            passed += base[(size_t)r] - (squared ? score : 2.0f) * score <= limit;
                        }
                    EXPECT_GE(passed, want) << isa;
                    EXPECT_LE(passed, 8 * want) << isa;  // it is a limit, not everything
                }
            }
        }
    }
}

TEST(Nearest, WhatReachesALimitIsListedInOrder) {
    std::mt19937 random(62);
    std::vector<float> score(256);
    for (float &x : score) x = (float)(random() % 7);
    for (const std::string &isa : host_isas()) {
        for (float limit : {-1.0f, 0.0f, 3.0f, 6.0f, 7.0f, NAN}) {
            std::vector<int32_t> want, got(256, -1);
            for (int j = 0; j < 256; ++j)
                if (score[(size_t)j] >= limit) want.push_back(j);
            got.resize((size_t)rbe_kernels_of(isa.c_str())->at_least(score.data(), limit, got.data()));
            EXPECT_EQ(got, want) << isa << " " << limit;
        }
    }
}

TEST(AddRows, GivesTheBitsOfPlainLoops) {
    std::mt19937 random(63);
    std::normal_distribution<float> normal;
    for (int64_t rows : {1, 3, 4, 6, 9}) {
        for (int64_t cols : {0, 1, 15, 16, 33, 64, 131}) {
            const int64_t depth = 5, row = cols + 2;
            std::vector<float> e((size_t)(rows * depth)), matrix((size_t)(depth * row)), start((size_t)(rows * row));
            for (std::vector<float> *a : {&e, &matrix, &start})
                for (float &x : *a) x = normal(random);
            std::vector<float> truth = start;
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t i = 0; i < depth; ++i)
                    for (int64_t c = 0; c < cols; ++c) {
                        const volatile float product = e[(size_t)(r * depth + i)] * matrix[(size_t)(i * row + c)];  // rounded
                        truth[(size_t)(r * row + c)] += product;
                    }
            for (const std::string &isa : host_isas()) {
                std::vector<float> got = start;
                std::vector<float *> out;
                for (int64_t r = 0; r < rows; ++r) out.push_back(got.data() + r * row);
                rbe_kernels_of(isa.c_str())->add_rows(rows, depth, e.data(), matrix.data(), row, cols, out.data());
                EXPECT_EQ(got, truth) << isa << " " << rows << "x" << cols;
            }
        }
    }
}

TEST(Encode, CodesDoNotDependOnTheIsa) {
    std::mt19937 random(64);
    for (const char *layout : {"rbe8_g8", "rbe8x2_g8", "rbe8x4_g3", "rbe16s_g8", "rbe16sx2_g8", "rbe22_g16", "rbe22x2_g4", "rbe32_g5", "rbe9rx2_g7", "rbe8_g70"}) {
        for (double size : {1.0, 1e-30, 1e30}) {  // beyond what scores in float32 see, too
            if (size != 1.0 && !std::strncmp(layout, "rbe32", 5)) continue;  // 16 million scales for every candidate: minutes
            Problem p(layout, 9, 75, random);
            for (size_t b = 256; b < p.basis.size(); b += 5) p.basis[b] = p.basis[b - 256];  // ties
            for (double &x : p.weight) x *= size;
            std::vector<int32_t> first;
            for (const std::string &isa : host_isas()) {
                const Using use(isa);
                p.must_encode();
                if (first.empty()) first = p.words;
                EXPECT_EQ(p.words, first) << layout << " " << isa << " " << size;
            }
        }
        Calibrated c(layout, 9, 45, 65);
        std::vector<int32_t> first;
        for (const std::string &isa : host_isas()) {
            const Using use(isa);
            rbe_error err;
            ASSERT_EQ(c.encode(2, &err), RBE_OK) << err.text;
            if (first.empty()) first = c.words;
            EXPECT_EQ(c.words, first) << layout << " " << isa;
        }
    }
}

}  // namespace
