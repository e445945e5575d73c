// Random weights, activations and threads for the tests of products, and the float64 reference to compare with.
#ifndef RBE_PRODUCT_CASE_H
#define RBE_PRODUCT_CASE_H

#include <gtest/gtest.h>
#include <pthread.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "kernels/reference/reference.h"
#include "ops/dispatch.h"
#include "ops/plan.h"
#include "ops/rbe.h"

// Largest error over the root mean square of the true values. float32 sums of some hundred products err by less than this.
constexpr double kFloat32Error = 2e-5;
constexpr double kBfloat16Step = 0x1p-8, kFloat16Step = 0x1p-11;  // relative error of one rounding
// W and x rounded to bfloat16: 1.6e-3 root mean square; five times that for the worst of some thousand, and rows differ in size.
constexpr double kFastError = 2e-2;
// Tables in float16 and, on a matrix unit, x in one bfloat16 piece: 7e-4 and 1.8e-3 root mean square; the worst of some thousand in the largest rows.
constexpr double kHalfError = 3e-2, kHalfRms = 3.5e-3;
// Gradients where x is of a half type: products of two bfloat16 pieces err by 2^-15 of an entry, and the largest entry is 30 times the rms here.
constexpr double kHalfGradientError = 1e-3;
// Bytes for P, or one digit of W: uniform rounding to 1/127 of the largest; six times the 1.3 to 1.7 % root mean square for the worst of some hundred.
constexpr double kByteError = 0.1;
// Two digits of W: the second has 126 steps at two stages and 62 at four, so up to 7e-4 root mean square.
constexpr double kTwoDigitsError = 5e-3;

inline const std::vector<std::string> kLayouts = {"rbe22_g64",   "rbe32_g16", "rbe9r_g8",   "rbe22_g1",   "rbe22x2_g3", "rbe32_g100", "rbe9rx2_g128",
                                           "rbe8x2_g8",   "rbe8_g8",   "rbe8x4_g16", "rbe8x3_g5",  "rbe16s_g8",  "rbe16sx2_g8",
                                           "rbe8x2_g8+int8", "rbe22_g32+fp8", "rbe8_g8+lr3", "rbe16s_g8+sp0.05"};

inline std::vector<std::string> host_isas() {
    std::vector<std::string> names;
    for (const char *name : {"scalar", "neon", "avx2", "avx512", "avx512vbmi", "avx512fp16", "avx512amx"})
        if (rbe_kernels_of(name)) names.push_back(name);
    return names;
}

inline const char *byte_lookups() {  // the ISA that has them, if the host does
    return rbe_kernels_of("avx512vbmi") ? "avx512vbmi" : nullptr;
}

// Uses one ISA, and one path, until it goes out of scope.
struct Using {
    explicit Using(const std::string &isa, rbe_path path = RBE_PATH_PLANNED) {
        rbe_use_kernels(rbe_kernels_of(isa.c_str()));
        rbe_use_path(path);
    }
    ~Using() {
        rbe_use_kernels(nullptr);
        rbe_use_path(RBE_PATH_PLANNED);
    }
};

inline double rms(const std::vector<double> &v) {
    double sum = 0.0;
    for (double x : v) sum += x * x;
    return v.empty() ? 0.0 : std::sqrt(sum / (double)v.size());
}

// A matrix with room around it, so that a write outside shows.
struct Matrix {
    rbe_matrix view{};
    std::vector<char> bytes;
    int64_t low = 0;  // first element of the view's storage

    enum Shape { kRows, kPadded, kTransposed, kReversed, kSpaced };
    Matrix(rbe_dtype dtype, int64_t rows, int64_t cols, Shape shape = kRows) {
        int64_t r = cols, c = 1;
        if (shape == kPadded) r = cols + 3;
        if (shape == kTransposed) r = 1, c = rows + 2;
        if (shape == kReversed) r = -(cols + 1), c = -1;
        if (shape == kSpaced) c = 3, r = 3 * cols + 1;
        view = {nullptr, dtype, rows, cols, r, c};
        int64_t lowest = 0, highest = 0;
        for (int64_t reach : {r * (rows - 1), c * (cols - 1)})
            if (rows > 0 && cols > 0) (reach < 0 ? lowest : highest) += reach;
        const int64_t guard = 64;
        low = guard - lowest;
        bytes.assign((size_t)((highest - lowest + 1 + 2 * guard) * size()), (char)0x5A);
        view.data = bytes.data() + low * size();
    }
    Matrix(const Matrix &) = delete;
    int64_t size() const { return view.dtype == RBE_F64 ? 8 : view.dtype == RBE_F32 ? 4 : 2; }
    double at(int64_t r, int64_t c) const { return rbe_reference_at(&view, r, c); }
    void set(int64_t r, int64_t c, double value) {
        rbe_reference_store(view.data, view.dtype, r * view.row_stride + c * view.col_stride, value);
    }
    void fill(std::mt19937 &random) {
        std::normal_distribution<double> normal;
        for (int64_t r = 0; r < view.rows; ++r)
            for (int64_t c = 0; c < view.cols; ++c) set(r, c, normal(random));
    }
    // Bytes that no element of the view covers.
    std::vector<char> surroundings() const {
        std::vector<char> left = bytes;
        for (int64_t r = 0; r < view.rows; ++r)
            for (int64_t c = 0; c < view.cols; ++c)
                std::memset(left.data() + (low + r * view.row_stride + c * view.col_stride) * size(), 0, (size_t)size());
        return left;
    }
};

// A weight and everything it points to.
struct Weight {
    rbe_weight w{};
    std::vector<int32_t> words;
    std::vector<uint8_t> packed, interleaved;
    std::vector<float> basis, gain, amplitude, bias, residual_scale, residual_right_scale;
    std::vector<uint8_t> residual_values, residual_right;

    enum Codes { kWords, kPacked, kAmplitude, kInterleaved };
    Weight(const std::string &layout, int64_t rows, int64_t cols, std::mt19937 &random, Codes codes = kWords) {
        rbe_error err;
        EXPECT_EQ(rbe_layout_parse(layout.data(), layout.size(), &w.layout, &err), RBE_OK) << err.text;
        const int64_t g = w.layout.group, stages = w.layout.stages;
        w.rows = rows;
        w.cols = cols;
        w.groups = (cols + g - 1) / g;
        w.row0 = 3, w.k0 = 2, w.groups_total = w.groups + 5, w.seed = 77;
        w.real = RBE_F32;
        w.rounded = true;
        std::normal_distribution<float> normal;
        basis.resize((size_t)(stages * 256 * g));
        for (float &b : basis) b = normal(random);
        gain.resize((size_t)rows);
        for (float &x : gain) x = std::exp(0.3f * normal(random));
        bias.resize((size_t)rows);
        for (float &x : bias) x = normal(random);
        const int64_t count = w.groups * stages;
        words.resize((size_t)(rows * count));
        for (int64_t i = 0; i < rows; ++i) {
            for (int64_t q = 0; q < count; ++q) {
                uint32_t word = ((uint32_t)random() & rbe_field_mask(w.layout.field)) | rbe_field_constant(w.layout.field);
                if (rbe_field_seeded(w.layout.field)) {
                    const uint32_t idx = rbe_seeded_idx(w.seed, (uint64_t)(w.row0 + i), (uint64_t)(w.k0 + q / stages), (uint64_t)(q % stages),
                                                        (uint64_t)w.groups_total, (uint64_t)stages);
                    word = (word & ~(255u << RBE_IDX_SHIFT)) | idx << RBE_IDX_SHIFT;
                }
                words[(size_t)(i * count + q)] = (int32_t)word;
            }
        }
        w.words = words.data();
        if (codes == kPacked || codes == kInterleaved) pack(err);
        if (codes == kInterleaved) interleave();
        if (codes == kAmplitude) {
            amplitude.resize(words.size());
            for (float &a : amplitude) a = 0.6f * normal(random);  // some beyond 1
            w.amplitude = amplitude.data();
        }
        w.basis = basis.data();
        w.gain = gain.data();
        add_residual(random);
    }
    Weight(const Weight &) = delete;

    void pack(rbe_error &err) {
        const int64_t bytes = rbe_packed_row_bytes(&w.layout, w.groups);
        packed.resize((size_t)(w.rows * bytes));
        EXPECT_EQ(rbe_pack(&w, packed.data(), &err), RBE_OK) << err.text;
        w.words = nullptr;
        w.packed = packed.data();
        w.packed_stride = bytes;
    }

    void interleave() {
        const int64_t count = w.groups * w.layout.stages, side = RBE_INTERLEAVED_ROWS;
        interleaved.assign((size_t)(rbe_interleaved_tiles(w.rows) * count * side), 0);
        for (int64_t i = 0; i < w.rows; ++i)
            for (int64_t q = 0; q < count; ++q) interleaved[(size_t)((i / side * count + q) * side + i % side)] = packed[(size_t)(i * count + q)];
        w.packed = nullptr;
        w.interleaved = interleaved.data();
    }

    void add_residual(std::mt19937 &random) {
        const int64_t m = w.rows, n = w.cols, r = w.layout.rank;
        const auto bytes = [&](std::vector<uint8_t> &v, int64_t size, uint8_t mask) {
            v.resize((size_t)size);
            for (uint8_t &b : v) b = (uint8_t)random() & mask;
        };
        if (w.layout.residual == RBE_RESIDUAL_INT8 || w.layout.residual == RBE_RESIDUAL_FP8) {
            bytes(residual_values, m * n, w.layout.residual == RBE_RESIDUAL_FP8 ? 0xBF : 0xFF);  // 0xBF: no NaN
            residual_scale.assign((size_t)m, 0.01f);
        } else if (w.layout.residual == RBE_RESIDUAL_LOWRANK) {
            bytes(residual_values, m * r, 0xFF);
            bytes(residual_right, r * n, 0xFF);
            residual_scale.assign((size_t)r, 0.02f);
            residual_right_scale.assign((size_t)r, 0.003f);
        } else if (w.layout.residual == RBE_RESIDUAL_SPARSE) {
            const int64_t count = rbe_reference_sparse_count(&w);
            residual_values.resize((size_t)(m * count * 2));
            residual_right.resize((size_t)(m * count * 4));
            for (int64_t i = 0; i < m; ++i) {
                for (int64_t p = 0; p < count; ++p) {
                    const int32_t column = (int32_t)(p * n / count);
                    std::memcpy(&residual_right[(size_t)(i * count + p) * 4], &column, 4);
                    rbe_reference_store(residual_values.data(), RBE_F16, i * count + p, (double)((int)(random() % 200) - 100) / 32.0);
                }
            }
        }
        w.residual = {residual_values.data(), residual_scale.data(), residual_right.data(), residual_right_scale.data()};
    }
};

// Threads that take one share each, the last one first, so that an order which matters shows.
struct Threads {
    rbe_parallel parallel;
    explicit Threads(int count) : parallel{run, this, count} {}
    struct Share {
        rbe_body body;
        void *context;
        int64_t begin, end;
    };
    static void *start(void *pointer) {
        const Share *s = (const Share *)pointer;
        s->body(s->begin, s->end, s->context);
        return nullptr;
    }
    static void run(void *pool, int64_t begin, int64_t end, int64_t grain, rbe_body body, void *context) {
        const int64_t threads = ((Threads *)pool)->parallel.threads, length = end - begin;
        const int64_t step = std::max(grain, (length + threads - 1) / threads);
        std::vector<Share> shares;
        for (int64_t b = begin; b < end; b += step) shares.push_back({body, context, b, std::min(end, b + step)});
        std::vector<pthread_t> ids(shares.size());
        for (size_t i = shares.size(); i-- > 0;) ASSERT_EQ(pthread_create(&ids[i], nullptr, start, &shares[i]), 0);
        for (pthread_t id : ids) pthread_join(id, nullptr);
    }
};

inline double step_of(rbe_dtype dtype) { return dtype == RBE_BF16 ? kBfloat16Step : dtype == RBE_F16 ? kFloat16Step : 0.0; }

// Every element within error * rms(truth) plus half a step of the type, non-finite where the truth is.
inline void expect_near(const Matrix &got, const Matrix &truth, double error, const std::string &what) {
    std::vector<double> finite;
    for (int64_t r = 0; r < truth.view.rows; ++r)
        for (int64_t c = 0; c < truth.view.cols; ++c)
            if (std::isfinite(truth.at(r, c))) finite.push_back(truth.at(r, c));
    const double room = error * rms(finite), step = step_of(got.view.dtype);
    for (int64_t r = 0; r < truth.view.rows; ++r) {
        for (int64_t c = 0; c < truth.view.cols; ++c) {
            const double g = got.at(r, c), t = truth.at(r, c);
            ASSERT_EQ(std::isfinite(g), std::isfinite(t)) << what << " at " << r << ", " << c << ": " << g << " for " << t;
            if (!std::isfinite(t)) continue;
            ASSERT_LE(std::fabs(g - t), room + step * std::fabs(t)) << what << " at " << r << ", " << c << ": " << g << " for " << t;
        }
    }
}

inline void expect_near(const std::vector<float> &got, const std::vector<float> &truth, double error, const std::string &what) {
    const double room = error * rms(std::vector<double>(truth.begin(), truth.end()));
    ASSERT_EQ(got.size(), truth.size());
    for (size_t i = 0; i < got.size(); ++i)
        ASSERT_LE(std::fabs((double)got[i] - truth[i]), room) << what << " at " << i << ": " << got[i] << " for " << truth[i];
}

// A forward product and its true value.
struct Forward {
    Weight weight;
    Matrix x, y, truth;
    Forward(const std::string &layout, int64_t m, int64_t n, int64_t tokens, std::mt19937 &random, Weight::Codes codes = Weight::kWords,
            rbe_dtype dtype = RBE_F32, Matrix::Shape in = Matrix::kRows, Matrix::Shape out = Matrix::kRows)
        : weight(layout, m, n, random, codes), x(dtype, tokens, n, in), y(dtype, tokens, m, out), truth(RBE_F64, tokens, m) {
        x.fill(random);
    }
    void reference() { rbe_reference_linear(&weight.w, &x.view, weight.bias.data(), &truth.view); }
    void run(rbe_accuracy accuracy = RBE_ACCURACY_EXACT, const rbe_parallel *threads = nullptr) {
        rbe_error err;
        ASSERT_EQ(rbe_linear(&weight.w, &x.view, weight.bias.data(), &y.view, accuracy, threads, &err), RBE_OK) << err.text;
    }
    void check(const std::string &what) {
        const std::vector<char> before = y.surroundings();
        run();
        expect_near(y, truth, kFloat32Error, what);
        ASSERT_EQ(before, y.surroundings()) << what << ": wrote outside y";
    }
};

#endif
