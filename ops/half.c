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

void rbe_half_scale(float most, int exponent, int bound, float *scale, float *unscale) {
    enum { RANGE = 126 };  // powers of two whose inverse is a normal number too
    int own = 0;
    *scale = *unscale = 1.0f;
    if (most == 0.0f || !isfinite(most)) return;
    frexpf(most, &own);
    const int power = bound - own - exponent, kept = power > RANGE ? RANGE : power < -RANGE ? -RANGE : power;
    *scale = ldexpf(1.0f, kept);
    *unscale = ldexpf(1.0f, -kept);
}

const uint16_t *rbe_half_basis(const rbe_kernels *kernels, const rbe_weight *w) {
    const int64_t g = w->layout.group, size = rbe_half_size(RBE_BASIS_VECTORS, g);
    uint16_t *basis = rbe_scratch_take(w->layout.stages * size, sizeof *basis);
    for (int64_t s = 0; basis && s < w->layout.stages; ++s)
        kernels->half_basis(g, (const float *)w->basis + s * RBE_BASIS_VECTORS * g, basis + s * size);
    return basis;
}
