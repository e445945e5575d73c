// Reads the processor's features; the compiler's runtime also asks whether the operating system saves the wide registers.
#include "cpu.h"

rbe_cpu rbe_cpu_detect(void) {
    rbe_cpu cpu = {false, false, false};
#if defined(__x86_64__)
    __builtin_cpu_init();
    cpu.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
               __builtin_cpu_supports("bmi2");
    cpu.avx512 = cpu.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    cpu.avx512vbmi = cpu.avx512 && __builtin_cpu_supports("avx512vbmi");
#endif
    return cpu;
}
