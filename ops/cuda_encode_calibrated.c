// rbe_cuda_encode_calibrated: the words that rbe_encode_calibrated gives. Feedback, searches and sweeps run on the device; values are
// checked first, which waits for it once.
#include "cuda_encode.h"

static rbe_status check(const rbe_weight *w, const rbe_matrix *dense, const rbe_calibration *c, const rbe_device *device,
                        unsigned long long **places, rbe_error *err) {
    const int64_t n = w->cols;
    void *stream = device->stream;
    RBE_TRY(rbe_cuda_check_encoding(w, dense, device, places, err));
    RBE_LAUNCH(rbe_cu_check_values(w->gain, w->real, 1, w->rows, 0, 1, RBE_CU_POSITIVE, *places + RBE_PLACE_GAIN_POSITIVE, stream), err);
    RBE_LAUNCH(rbe_cu_check_values(c->hessian, RBE_F32, n, n, n, 1, RBE_CU_FINITE, *places + RBE_PLACE_HESSIAN, stream), err);
    RBE_LAUNCH(rbe_cu_check_values(c->hessian, RBE_F32, 1, n, 0, n + 1, RBE_CU_POSITIVE, *places + RBE_PLACE_DIAGONAL, stream), err);
    if (!c->factor) return RBE_OK;
    RBE_LAUNCH(rbe_cu_check_values(c->factor, RBE_F32, n, n, n, 1, RBE_CU_FINITE, *places + RBE_PLACE_FACTOR, stream), err);
    RBE_LAUNCH(rbe_cu_check_values(c->factor, RBE_F32, 1, n, 0, n + 1, RBE_CU_POSITIVE, *places + RBE_PLACE_FACTOR_DIAGONAL, stream), err);
    return RBE_OK;
}

// The tables of every group, turned by its factor.
static rbe_status turn(const rbe_cuda_weight *w, const double *factors, float *turned, rbe_cu_search *search, const rbe_device *device,
                       rbe_error *err) {
    RBE_LAUNCH(rbe_cu_turn_basis(&w->codes, w->w->basis, factors, turned, device->stream), err);
    return rbe_cuda_fill_search(search, turned, RBE_F32, device, err);
}

static rbe_status start_from(const rbe_weight *w, int32_t *words, const rbe_device *device, rbe_error *err) {
    const rbe_cu_strided all = {w->words, sizeof *words, RBE_F32, 1, {w->rows * w->groups * w->layout.stages}, {1}};
    if (!w->words) return rbe_fail(err, RBE_BAD_ARGUMENT, "codes: must be given where there is no factor");
    RBE_TRY(rbe_cuda_check_words(w, device, err));
    RBE_LAUNCH(rbe_cu_copy(&all, false, words, RBE_F32, device->stream), err);
    return RBE_OK;
}

rbe_status rbe_cuda_encode_calibrated(const rbe_weight *w, const rbe_matrix *dense, const rbe_calibration *c, int32_t *words,
                                      const rbe_device *device, rbe_error *err) {
    RBE_TRY(rbe_check_encoding_shape(w, dense, words, err));
    RBE_TRY(rbe_check_calibration_shape(w, c, err));
    if (!c->factor) RBE_TRY(start_from(w, words, device, err));
    const int64_t m = w->rows, n = w->cols, g = w->layout.group, square = w->groups * g * g;
    void *stream = device->stream;
    unsigned long long *places;
    double *factors, *blocks;
    float *turned;
    rbe_cuda_weight bound;
    rbe_cu_calibrated pass = {.target = rbe_cuda_target(w, dense), .basis = w->basis, .words = words};
    RBE_TRY(check(w, dense, c, device, &places, err));
    RBE_TRY(rbe_cuda_take(device, square, sizeof *factors, &factors, err));
    RBE_TRY(rbe_cuda_take(device, square, sizeof *blocks, &blocks, err));
    if (c->sweeps) RBE_LAUNCH(rbe_cu_factor_blocks(c->hessian, n, g, blocks, places + RBE_PLACE_INDEFINITE, stream), err);
    RBE_TRY(rbe_cuda_refuse(w, places, device, err));
    RBE_TRY(rbe_cuda_bind(w, device, &bound, err));
    RBE_TRY(rbe_cuda_take_search(&bound, w->groups, device, &pass.search, err));
    RBE_TRY(rbe_cuda_take(device, w->groups * w->layout.stages * RBE_BASIS_VECTORS * g, sizeof *turned, &turned, err));
    RBE_TRY(rbe_cuda_take(device, m * n, sizeof *pass.error, &pass.error, err));
    RBE_TRY(rbe_cuda_take(device, m * n, sizeof *pass.pull, &pass.pull, err));
    const size_t bytes = rbe_cu_encode_memory(&bound.codes, true);
    if (bytes) RBE_TRY(rbe_cuda_take(device, (int64_t)bytes, 1, &pass.memory, err));
    if (c->factor) {
        RBE_LAUNCH(rbe_cu_block_triangles(c->factor, n, g, factors, stream), err);
        RBE_TRY(turn(&bound, factors, turned, &pass.search, device, err));
        RBE_LAUNCH(rbe_cu_zero(pass.pull, (size_t)(m * n) * sizeof *pass.pull, stream), err);
        pass.matrix = c->factor;
        pass.factors = factors;
        RBE_LAUNCH(rbe_cu_encode_feedback(&pass, stream), err);
    } else {
        RBE_LAUNCH(rbe_cu_encode_error(&pass, stream), err);
    }
    if (!c->sweeps) return RBE_OK;
    pass.matrix = c->hessian;
    pass.factors = blocks;
    RBE_LAUNCH(rbe_cu_zero(pass.pull, (size_t)(m * n) * sizeof *pass.pull, stream), err);
    RBE_LAUNCH(rbe_cu_encode_pull(&pass, stream), err);
    RBE_TRY(turn(&bound, blocks, turned, &pass.search, device, err));
    for (int round = 0; round < c->sweeps; round++) RBE_LAUNCH(rbe_cu_encode_sweep(&pass, stream), err);
    return RBE_OK;
}
