// What the half-precision paths share: powers of two that keep float16 in range, and the basis for the matrix unit.
#include <math.h>

#include "product.h"

int rbe_basis_exponent(const rbe_weight *w) {
    enum { LANES = 8 };
    const int64_t g = w->layout.group, vectors = w->layout.stages * (int64_t)RBE_BASIS_VECTORS;
    float most = 0.0f;
    for (int64_t j = 0; j < vectors; ++j) {
        const float *b = (const float *)w->basis + j * g;
        float part[LANES] = {0}, sum = 0.0f;
        int64_t e = 0;
        for (; e + LANES <= g; e += LANES)
            for (int i = 0; i < LANES; ++i) part[i] += fabsf(b[e + i]);
        for (; e < g; ++e) sum += fabsf(b[e]);
        for (int i = 0; i < LANES; ++i) sum += part[i];
        if (sum > most) most = sum;
    }
    int exponent = 0;
    if (isfinite(most)) frexpf(most, &exponent);
    return exponent;
}

int rbe_half_power(float most, int exponent, int bound) {
    int own = 0;
    if (most == 0.0f || !isfinite(most)) return 0;
    frexpf(most, &own);
    const int power = bound - own - exponent;
    return power > RBE_HALF_RANGE ? RBE_HALF_RANGE : power < -RBE_HALF_RANGE ? -RBE_HALF_RANGE : power;
}

const uint16_t *rbe_half_basis(const rbe_kernels *kernels, const rbe_weight *w) {
    const int64_t g = w->layout.group, size = rbe_half_size(RBE_BASIS_VECTORS, g);
    uint16_t *basis = rbe_scratch_take(w->layout.stages * size, sizeof *basis);
    for (int64_t s = 0; basis && s < w->layout.stages; ++s)
        kernels->half_basis(RBE_BASIS_VECTORS, g, (const float *)w->basis + s * RBE_BASIS_VECTORS * g, basis + s * size);
    return basis;
}

const uint16_t *rbe_half_basis_turned(const rbe_kernels *kernels, const rbe_weight *w) {
    const int64_t g = w->layout.group, size = rbe_half_size((g + 31) / 32 * 32, RBE_BASIS_VECTORS);
    uint16_t *basis = rbe_scratch_take(w->layout.stages * size, sizeof *basis);
    const rbe_scratch_mark mark = rbe_scratch_begin();
    float *turned = rbe_scratch_take(g * RBE_BASIS_VECTORS, sizeof *turned);
    for (int64_t s = 0; basis && turned && s < w->layout.stages; ++s) {
        kernels->transpose((const float *)w->basis + s * RBE_BASIS_VECTORS * g, g, RBE_BASIS_VECTORS, g, turned, RBE_BASIS_VECTORS, RBE_BASIS_VECTORS);
        kernels->half_basis(g, RBE_BASIS_VECTORS, turned, basis + s * size);
    }
    rbe_scratch_end(mark);
    return turned ? basis : NULL;
}
