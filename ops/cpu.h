// What the processor can do beyond the baseline of its architecture.
#ifndef RBE_CPU_H
#define RBE_CPU_H

#include <stdbool.h>

typedef struct rbe_cpu {
    bool avx2;        // AVX2, FMA, F16C, BMI2
    bool avx512;      // F, BW, DQ, VL and all of the above
    bool avx512vbmi;  // and VBMI
    bool avx512fp16;  // and VBMI, float16 arithmetic, bfloat16 conversions
    bool avx512amx;   // and VBMI, BF16, AMX tiles with BF16, which the operating system has granted
} rbe_cpu;

rbe_cpu rbe_cpu_detect(void);

#endif
