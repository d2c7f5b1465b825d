/* What the hot path spends its time on, up to eight times as fast as the calls of torch that do
 * the same (tests/benchmarks/compiled.py). A library, no module: compiled/__init__.py loads it, and
 * does without it where it was not built.
 *
 * Every function comes in one version for each kind of processor, which its name ends in. */

#if defined(__x86_64__)

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

/* The larger of two, and NaN once one of them is. */
#define LARGER(one, other) ((one) > (other) || (one) != (one) ? (one) : (other))

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define NAME(name) name##_avx2
#include "kernels.h"
#undef TARGET
#undef NAME

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define NAME(name) name##_avx512
#include "kernels.h"

/* -- products, for AVX-512: its 32 registers hold the sums of four rows and seven tokens ------- */

enum { LANES = 16, GROUP = 7 };

/* Columns that are summed at a time: the inputs of seven tokens fill 21 KB of the first cache. A
 * piece of 640 K weights and 14 tokens takes 87 us so, 99 with 512, 94 with 1,024. */
enum { CHUNK = 768 };

#define UNROLLED _Pragma("GCC unroll 8")

/* So many columns of some rows of weights, times some tokens; added to what is there where adds.
 * The compiler keeps the sums in registers where it knows both numbers. */
#define TILE(ROWS, COUNT)                                                                          \
    TARGET static void tile_##ROWS##_##COUNT(const float *x, const float *w, int64_t columns,      \
                                             int64_t some, float *out, int64_t stride, int adds)   \
    {                                                                                              \
        __m512 sums[ROWS][COUNT], weights[ROWS];                                                   \
        UNROLLED for (int r = 0; r < ROWS; r++)                                                    \
            UNROLLED for (int t = 0; t < COUNT; t++) sums[r][t] = _mm512_setzero_ps();             \
        for (int64_t c = 0; c < some; c += LANES) {                                                \
            UNROLLED for (int r = 0; r < ROWS; r++)                                                \
                weights[r] = _mm512_loadu_ps(w + r * columns + c);                                 \
            UNROLLED for (int t = 0; t < COUNT; t++) {                                             \
                const __m512 inputs = _mm512_loadu_ps(x + t * columns + c);                        \
                UNROLLED for (int r = 0; r < ROWS; r++)                                            \
                    sums[r][t] = _mm512_fmadd_ps(weights[r], inputs, sums[r][t]);                  \
            }                                                                                      \
        }                                                                                          \
        UNROLLED for (int r = 0; r < ROWS; r++)                                                    \
            UNROLLED for (int t = 0; t < COUNT; t++) {                                             \
                const float sum = _mm512_reduce_add_ps(sums[r][t]);                                \
                out[t * stride + r] = adds ? out[t * stride + r] + sum : sum;                      \
            }                                                                                      \
    }
#define TILES(COUNT) TILE(4, COUNT) TILE(1, COUNT)
TILES(1) TILES(2) TILES(3) TILES(4) TILES(5) TILES(6) TILES(7)

#define MULTIPLY(ROWS, COUNT)                                                                      \
    tile_##ROWS##_##COUNT(x + t * columns + c, w + r * columns + c, columns, some,                 \
                          out + t * stride + r, stride, c > 0)
#define CASE(COUNT)                                                                                \
    case COUNT:                                                                                    \
        for (; r + 4 <= rows; r += 4) MULTIPLY(4, COUNT);                                          \
        for (; r < rows; r++) MULTIPLY(1, COUNT);                                                  \
        break;

/* x @ w.T, of (tokens, columns) and (rows, columns), columns a multiple of 16, to out, whose rows
 * lie stride apart. Tokens go in groups of nearly one size, up to GROUP. */
void product_avx512(const float *x, int64_t tokens, const float *w, int64_t rows, int64_t columns,
                    float *out, int64_t stride)
{
    int64_t t = 0;
    for (int64_t groups = (tokens + GROUP - 1) / GROUP; groups > 0; groups--) {
        const int64_t count = (tokens - t + groups - 1) / groups;
        for (int64_t c = 0; c < columns; c += CHUNK) {
            const int64_t some = columns - c < CHUNK ? columns - c : CHUNK;
            int64_t r = 0;
            switch (count) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) }
        }
        t += count;
    }
}

/* Whose versions run here. Others were measured nowhere: there it is torch. */
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
