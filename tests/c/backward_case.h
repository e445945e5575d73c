// A random backward product, its gradients and their true values.
#ifndef RBE_BACKWARD_CASE_H
#define RBE_BACKWARD_CASE_H

#include "product_case.h"

struct Gradients {
    Matrix dx;
    std::vector<float> basis, gain, bias, amplitude, scale;
    rbe_gradients out{};
    Gradients(const Weight &weight, rbe_dtype dtype, int64_t tokens, Matrix::Shape shape)
        : dx(dtype, tokens, weight.w.cols, shape), basis(weight.basis.size(), NAN), gain(weight.gain.size(), NAN), bias(weight.gain.size(), NAN),
          amplitude(weight.amplitude.size(), NAN), scale(weight.words.size(), NAN) {
        out = {&dx.view, basis.data(), gain.data(), bias.data(), amplitude.empty() ? nullptr : amplitude.data(), scale.data()};
    }
};

struct BackwardCase {
    Weight weight;
    Matrix x, dy;
    Gradients got, truth;
    BackwardCase(const std::string &layout, int64_t m, int64_t n, int64_t tokens, std::mt19937 &random, Weight::Codes codes = Weight::kWords,
                 rbe_dtype dtype = RBE_F32, Matrix::Shape in = Matrix::kRows, Matrix::Shape out = Matrix::kRows)
        : weight(layout, m, n, random, codes), x(dtype, tokens, n, in), dy(dtype, tokens, m, in), got(weight, dtype, tokens, out),
          truth(weight, RBE_F64, tokens, Matrix::kRows) {
        x.fill(random);
        dy.fill(random);
    }
    void reference() { rbe_reference_linear_backward(&weight.w, &dy.view, &x.view, &truth.out); }
    // Amplitudes at the ends of their range, and beyond.
    void edge_amplitudes() { weight.amplitude[0] = 1.0f, weight.amplitude[1] = -1.0f, weight.amplitude[2] = 0.0f, weight.amplitude[3] = 3.0f; }
    // Only gradient `wanted` of six.
    void want(int wanted) {
        rbe_gradients &out = got.out;
        if (wanted != 0) out.dx = nullptr;
        if (wanted != 1) out.basis = nullptr;
        if (wanted != 2) out.gain = nullptr;
        if (wanted != 3) out.bias = nullptr;
        if (wanted != 4) out.amplitude = nullptr;
        if (wanted != 5) out.scale = nullptr;
    }
};

// What must be refused, and a word of the sentence that says so.
struct Misfit {
    const char *word;
    void (*spoil)(BackwardCase &);
};
const Misfit kMisfits[] = {
    {"dy: has 2 rows", [](BackwardCase &b) { b.dy.view.rows = 2; }},
    {"dx: has 41 columns", [](BackwardCase &b) { b.got.dx.view.cols = 41; }},
    {"dy: must have the dtype of x", [](BackwardCase &b) { b.dy.view.dtype = RBE_F16; }},
    {"amplitude: its gradient", [](BackwardCase &b) { b.got.out.amplitude = b.got.scale.data(); }},
};

struct Backward : BackwardCase {
    using BackwardCase::BackwardCase;
    void run(const rbe_parallel *threads = nullptr, rbe_accuracy accuracy = RBE_ACCURACY_AUTO) {
        rbe_error err;
        ASSERT_EQ(rbe_linear_backward(&weight.w, &dy.view, &x.view, &got.out, accuracy, threads, &err), RBE_OK) << err.text;
    }
    void check(const std::string &what) {
        const std::vector<char> before = got.dx.surroundings();
        run();
        const double error = x.view.dtype == RBE_F32 ? kFloat32Error : kHalfGradientError;
        if (got.out.dx) expect_near(got.dx, truth.dx, error, what + " dx");
        if (got.out.basis) expect_near(got.basis, truth.basis, error, what + " dbasis");
        if (got.out.gain) expect_near(got.gain, truth.gain, error, what + " dgain");
        if (got.out.bias) expect_near(got.bias, truth.bias, error, what + " dbias");
        if (got.out.scale) expect_near(got.scale, truth.scale, error, what + " dscale");
        if (got.out.amplitude) expect_near(got.amplitude, truth.amplitude, error, what + " damplitude");
        ASSERT_EQ(before, got.dx.surroundings()) << what << ": wrote outside dx";
    }
};

#endif
