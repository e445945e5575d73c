// What the CUDA products share: checks that read no values, workspaces, and a weight as the kernels want it.
#ifndef RBE_OPS_CUDA_INTERNAL_H
#define RBE_OPS_CUDA_INTERNAL_H

#include "cuda.h"
#include "cuda_blaslt.h"

static inline int64_t rbe_cuda_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
static inline int64_t rbe_cuda_smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline bool rbe_cuda_half(rbe_dtype dtype) { return dtype == RBE_BF16 || dtype == RBE_F16; }
static inline size_t rbe_cuda_bytes(rbe_dtype dtype) { return dtype == RBE_F64 ? 8 : dtype == RBE_F32 ? 4 : 2; }
static inline bool rbe_cuda_has_table(const rbe_layout *l) { return l->field != RBE_FIELD_RBE16S && l->residual == RBE_RESIDUAL_NONE; }

int64_t rbe_cuda_workspace(void);  // bytes that a product cut into pieces takes at a time, about

rbe_status rbe_cuda_status(int error, rbe_error *err);  // of a launch
rbe_status rbe_cuda_take(const rbe_device *device, int64_t count, size_t size, void *out,
                         rbe_error *err);  // *(void **)out = count * size bytes

// Shapes, dtypes and pointers of a weight and of a matrix that a product reads or writes.
rbe_status rbe_cuda_check(const rbe_weight *w, rbe_error *err);

// Refuses words with bits outside the layout (cuda_codes.c); waits for the device.
rbe_status rbe_cuda_check_words(const rbe_weight *w, const rbe_device *device, rbe_error *err);

// Codes that are interleaved are laid out as rows first.
typedef struct rbe_cuda_weight {
    const rbe_weight *w;
    rbe_cu_codes codes;
    rbe_cu_residual residual;
    int64_t count, pitch;  // Q, and rows padded to RBE_CU_ROWS
} rbe_cuda_weight;
rbe_status rbe_cuda_bind(const rbe_weight *w, const rbe_device *device, rbe_cuda_weight *out, rbe_error *err);
// Rows row0 .. row0+rows-1 alone.
rbe_cuda_weight rbe_cuda_rows(const rbe_cuda_weight *w, int64_t row0, int64_t rows);

// x with neighbouring columns and of type dtype: x itself, or a copy in a workspace.
rbe_status rbe_cuda_dense(const rbe_matrix *x, rbe_dtype dtype, const rbe_device *device, rbe_cu_matrix *out, rbe_error *err);

// The table of a run of tokens: table[q, j, t] = <basis[s, j], x[t, k-th group]>, rows of pitch_t numbers, all of x's type; basis [M, 256,
// g] of that type. And the two products that its gradient enters (backward).
typedef struct rbe_cuda_table {
    const rbe_layout *layout;
    int64_t cols, tokens, pitch_t;
    rbe_dtype dtype;
    const void *basis;
    bool tf32;
} rbe_cuda_table;
rbe_status rbe_cuda_make_table(const rbe_cuda_table *t, const rbe_cu_matrix *x, void *table, const rbe_device *device, rbe_error *err);
// dx[t, k-th group] = sum over s, j of dtable[q, j, t] basis[s, j]
rbe_status rbe_cuda_table_dx(const rbe_cuda_table *t, const void *dtable, const rbe_cu_matrix *dx, const rbe_device *device,
                             rbe_error *err);
// partial[k, s, j] (+)= sum over t of dtable[q, j, t] x[t, k-th group], float32
rbe_status rbe_cuda_table_dbasis(const rbe_cuda_table *t, const void *dtable, const rbe_cu_matrix *x, bool accumulate, float *partial,
                                 const rbe_device *device, rbe_error *err);

#define RBE_TRY(expression)                       \
    do {                                          \
        const rbe_status tried_ = (expression);   \
        if (tried_ != RBE_OK) return tried_;      \
    } while (0)
#define RBE_LAUNCH(expression, err) RBE_TRY(rbe_cuda_status(expression, err))

#endif
