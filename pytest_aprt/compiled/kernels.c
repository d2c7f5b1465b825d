/* What the hot path spends its time on, up to eight times as fast as the calls of torch that do the
 * same (tests/benchmarks/compiled.py). A library, no module: compiled/__init__.py loads it, and does
 * without it where it was not built.
 *
 * Every function comes in one version for each kind of processor, which its name ends in. */

#include <stdint.h>
#include <string.h>

enum { LANES = 16 };
typedef float Lanes __attribute__((vector_size(64)));
typedef float Half __attribute__((vector_size(32)));
typedef float Quarter __attribute__((vector_size(16)));
typedef float Unaligned __attribute__((vector_size(64), aligned(4), may_alias));

/* The larger of two, and NaN once one of them is. */
#define LARGER(one, other) ((one) > (other) || (one) != (one) ? (one) : (other))
#define UNROLLED _Pragma("GCC unroll 16")

/* Columns that are summed at a time: the inputs of seven tokens fill 21 KB of the first cache. A
 * piece of 640 K weights and 14 tokens takes 87 us so, 99 with 512, 94 with 1,024. */
enum { CHUNK = 768 };

#if defined(__x86_64__)

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define NAME(name) name##_avx2
#include "kernels.h"
#undef TARGET
#undef NAME

/* 32 registers of 16 hold the sums of four rows and seven tokens. */
#define TILES 7
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define NAME(name) name##_avx512
#include "kernels.h"

/* Whose versions run here. Others than these were measured nowhere, and torch is quick there. */
const char *processor(void)
{
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return "";
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return "avx512";
    return "avx2";
}

#else

const char *processor(void) { return ""; }

#endif
