// Reads the processor's features; the compiler's runtime also asks whether the operating system saves the wide registers.
#include "cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>

static bool has_f16c(void) {  // clang's __builtin_cpu_supports does not know it
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

static bool has_float16(void) {
    enum { FLOAT16 = 1 << 23, BF16_CONVERSIONS = 1 << 5 };
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & FLOAT16) && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & BF16_CONVERSIONS);
}
#endif

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

// AMX has 8 kB of registers a thread, which Linux saves only for processes that asked.
static bool amx_granted(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_TILE_DATA = 18, BF16_TILES = 1 << 22, TILES = 1 << 24, BYTE_TILES = 1 << 25, BF16_VECTORS = 1 << 5 };
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & BF16_TILES) || !(d & TILES) || !(d & BYTE_TILES)) return false;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & BF16_VECTORS)) return false;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_TILE_DATA) == 0;
}
#elif defined(__x86_64__)
static bool amx_granted(void) { return false; }
#endif

rbe_cpu rbe_cpu_detect(void) {
    rbe_cpu cpu = {false, false, false, false, false};
#if defined(__x86_64__)
    __builtin_cpu_init();
    cpu.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") && has_f16c();
    cpu.avx512 = cpu.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    cpu.avx512vbmi = cpu.avx512 && __builtin_cpu_supports("avx512vbmi");
    cpu.avx512fp16 = cpu.avx512vbmi && has_float16();
    cpu.avx512amx = cpu.avx512vbmi && amx_granted();
#endif
    return cpu;
}
