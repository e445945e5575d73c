// One const table of kernels per ISA; an entry that is missing is inherited from the level below when the tables are resolved.
#include "dispatch.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "cpu.h"

#define TABLE(isa_, width_)                                                                                                                  \
    {.isa = #isa_, .name = #isa_, .width = width_, .unpack = rbe_unpack__##isa_, .amplitude_gradient = rbe_amplitude_gradient__##isa_,       \
     .bf16_to_f32 = rbe_bf16_to_f32__##isa_, .f16_to_f32 = rbe_f16_to_f32__##isa_, .f32_to_bf16 = rbe_f32_to_bf16__##isa_,                   \
     .f32_to_f16 = rbe_f32_to_f16__##isa_, .transpose = rbe_transpose__##isa_, .transpose_stream = rbe_transpose_stream__##isa_, .gemm = rbe_gemm__##isa_,                                     \
     .scores = rbe_scores__##isa_, .score_limit = rbe_score_limit__##isa_, .at_least = rbe_at_least__##isa_,                                                       \
     .add_rows = rbe_add_rows__##isa_, .table_rows = rbe_table_rows__##isa_, .table_token = rbe_table_token__##isa_, .table_dot = rbe_table_dot__##isa_,                       \
     .decode_row = rbe_decode_row__##isa_, .dot_rows = rbe_dot_rows__##isa_, .table_backward = rbe_table_backward__##isa_,                   \
     .scatter_row = rbe_scatter_row__##isa_, .add_scaled = rbe_add_scaled__##isa_, .add_scaled_i8 = rbe_add_scaled_i8__##isa_,               \
     .add_lookup = rbe_add_lookup__##isa_}

static const rbe_kernels scalar = TABLE(scalar, 1);
#ifdef RBE_HAVE_AVX2
static const rbe_kernels avx2 = TABLE(avx2, 8);
#endif
#ifdef RBE_HAVE_AVX512
static const rbe_kernels avx512 = TABLE(avx512, 16);
static const rbe_kernels avx512vbmi = {
    .isa = "avx512", .name = "avx512vbmi", .lut8_quantise = rbe_lut8_quantise__avx512vbmi, .lut8_rows = rbe_lut8_rows__avx512vbmi,
    .lut8_interleaved = rbe_lut8_interleaved__avx512vbmi, .turn_bytes = rbe_turn_bytes__avx512vbmi,
    .few_tables = rbe_few_tables__avx512, .few_rows = rbe_few_rows__avx512, .few_interleaved = rbe_few_interleaved__avx512,
    .lookup_rows = rbe_lookup_rows__avx512};
#ifdef RBE_HAVE_AVX512FP16
static const rbe_kernels avx512fp16 = {
    .isa = "avx512", .name = "avx512fp16", .largest = rbe_largest__avx512fp16, .half_rows = rbe_half_rows__avx512fp16,
    .half_widen = rbe_half_widen__avx512fp16, .half_turn = rbe_half_turn__avx512fp16, .half_backward = rbe_half_backward__avx512fp16};
#endif
static const rbe_kernels avx512amx = {.isa = "avx512", .name = "avx512amx", .split_rows = rbe_split_rows__avx512amx,
                                      .split_cols = rbe_split_cols__avx512amx, .split_both = rbe_split_both__avx512amx, .gemm_split = rbe_gemm_split__avx512amx,
                                      .lookup_split = rbe_lookup_split__avx512amx,
                                      .split_begin = rbe_split_begin__avx512amx, .split_end = rbe_split_end__avx512amx,
                                      .digits_of_basis = rbe_digits_of_basis__avx512amx,
                                      .digits_of_tokens = rbe_digits_of_tokens__avx512amx, .digits_of_codes = rbe_digits_of_codes__avx512amx,
                                      .digits_multiply = rbe_digits_multiply__avx512amx, .digits_stream = rbe_digits_stream__avx512amx,
                                      .digits_order = rbe_digits_order__avx512amx,
                                      .half_basis = rbe_half_basis__avx512amx, .half_tokens = rbe_half_tokens__avx512amx,
                                      .half_table = rbe_half_table__avx512amx, .half_columns = rbe_half_columns__avx512amx,
                                      .half_dx = rbe_half_dx__avx512amx, .half_dbasis = rbe_half_dbasis__avx512amx};
#endif
#ifdef RBE_HAVE_NEON
static const rbe_kernels neon = TABLE(neon, 4);
#endif

// From the lowest level up. A level with features that only some of its processors have is listed once more with them, under one name.
typedef struct level {
    const rbe_kernels *own;
    bool usable;
} level;

enum { LEVELS_MAX = 8 };
static const char *const names = "scalar, avx2, avx512, neon";
static rbe_kernels resolved[LEVELS_MAX];  // ascending
static int count;
static const rbe_kernels *chosen;  // NULL: RBE_ISA is not a name
static _Atomic(const rbe_kernels *) override;
static pthread_once_t once = PTHREAD_ONCE_INIT;

// Behind `width` both tables are arrays of pointers: entries that own lacks come from below.
static void inherit(rbe_kernels *out, const rbe_kernels *own, const rbe_kernels *below) {
    *out = *own;
    if (!below) return;
    if (!out->width) out->width = below->width;
    const size_t first = offsetof(rbe_kernels, unpack);
    for (size_t at = first; at < sizeof *out; at += sizeof(void (*)(void)))
        if (!*(void (**)(void))(void *)((char *)out + at)) memcpy((char *)out + at, (const char *)below + at, sizeof(void (*)(void)));
}

// A name that this build or host lacks is still a name: it asks for more than there is, and nothing is lowered.
static bool known(const char *name) {
    return !strcmp(name, "scalar") || !strcmp(name, "avx2") || !strcmp(name, "avx512") || !strcmp(name, "neon");
}

// The best of an ISA.
static const rbe_kernels *find(const char *isa) {
    for (int i = count; i-- > 0;)
        if (!strcmp(resolved[i].isa, isa)) return &resolved[i];
    return NULL;
}

static void resolve(void) {
    const rbe_cpu cpu = rbe_cpu_detect();
    (void)cpu;
    const level levels[] = {
        {&scalar, true},
#ifdef RBE_HAVE_NEON
        {&neon, true},
#endif
#ifdef RBE_HAVE_AVX2
        {&avx2, cpu.avx2},
#endif
#ifdef RBE_HAVE_AVX512
        {&avx512, cpu.avx512},
        {&avx512vbmi, cpu.avx512vbmi},
#ifdef RBE_HAVE_AVX512FP16
        {&avx512fp16, cpu.avx512fp16},
#endif
        {&avx512amx, cpu.avx512amx},
#endif
    };
    for (size_t i = 0; i < sizeof levels / sizeof *levels; ++i) {
        if (!levels[i].usable) continue;
        inherit(&resolved[count], levels[i].own, count ? &resolved[count - 1] : NULL);
        ++count;
    }
    const char *wanted = getenv("RBE_ISA");
    if (!wanted || !*wanted)
        chosen = &resolved[count - 1];
    else if (known(wanted))
        chosen = find(wanted) ? find(wanted) : &resolved[count - 1];
}

const rbe_kernels *rbe_kernels_of(const char *name) {
    pthread_once(&once, resolve);
    for (int i = count; i-- > 0;)
        if (!strcmp(resolved[i].name, name)) return &resolved[i];
    return NULL;
}

void rbe_use_kernels(const rbe_kernels *kernels) { atomic_store(&override, kernels); }

rbe_status rbe_choose_kernels(const rbe_kernels **kernels, rbe_error *err) {
    pthread_once(&once, resolve);
    const rbe_kernels *set = atomic_load(&override);
    *kernels = set ? set : chosen;
    if (*kernels) return RBE_OK;
    return rbe_fail(err, RBE_BAD_ARGUMENT, "RBE_ISA: is '%.64s', but must be unset or one of %s", getenv("RBE_ISA") ? getenv("RBE_ISA") : "",
                    names);
}

bool rbe_reads_interleaved(void) {
    const rbe_kernels *kernels;
    return rbe_choose_kernels(&kernels, NULL) == RBE_OK && kernels->lut8_interleaved;
}

const char *rbe_isa_name(void) {
    const rbe_kernels *kernels;
    return rbe_choose_kernels(&kernels, NULL) == RBE_OK ? kernels->isa : "refused: RBE_ISA is not an ISA's name";
}
