/* The kernels, for one kind of processor: included once for each, with NAME and TARGET defined.
 *
 * Blocks are laid out as gguf-py's quants.py reads them. A product of scale and quantum has at most
 * 24 significant bits, so it is exact whether or not the compiler fuses what follows. */

TARGET static inline float NAME(half)(const uint8_t *at)
{
    _Float16 value;
    memcpy(&value, at, sizeof value);
    return (float)value;
}

/* Scales and minima of the eight runs of 32 of Q4_K and Q5_K: six bits each in twelve bytes. */
TARGET static inline void NAME(scales)(const uint8_t *block, float *scales, float *minima)
{
    const float scale = NAME(half)(block), minimum = NAME(half)(block + 2);
    const uint8_t *at = block + 4;
    for (int i = 0; i < 4; i++) {
        scales[i] = scale * (float)(at[i] & 63);
        minima[i] = minimum * (float)(at[i + 4] & 63);
        scales[i + 4] = scale * (float)((at[i + 8] & 15) | (at[i] >> 6) << 4);
        minima[i + 4] = minimum * (float)((at[i + 8] >> 4) | (at[i + 4] >> 6) << 4);
    }
}

TARGET void NAME(q4_k)(const uint8_t *restrict block, int64_t blocks, float *restrict out)
{
    float scales[8], minima[8];
    for (; blocks > 0; blocks--, block += 144, out += 256) {
        NAME(scales)(block, scales, minima);
        for (int run = 0; run < 8; run += 2) {
            const uint8_t *quanta = block + 16 + 16 * run;
            float *low = out + 32 * run, *high = low + 32;
            for (int i = 0; i < 32; i++)
                low[i] = scales[run] * (float)(quanta[i] & 15) - minima[run];
            for (int i = 0; i < 32; i++)
                high[i] = scales[run + 1] * (float)(quanta[i] >> 4) - minima[run + 1];
        }
    }
}

TARGET void NAME(q5_k)(const uint8_t *restrict block, int64_t blocks, float *restrict out)
{
    float scales[8], minima[8];
    for (; blocks > 0; blocks--, block += 176, out += 256) {
        NAME(scales)(block, scales, minima);
        const uint8_t *fifth = block + 16;
        for (int run = 0; run < 8; run += 2) {
            const uint8_t *quanta = block + 48 + 16 * run;
            float *low = out + 32 * run, *high = low + 32;
            for (int i = 0; i < 32; i++)
                low[i] = scales[run] * (float)((quanta[i] & 15) | (fifth[i] >> run & 1) << 4) -
                         minima[run];
            for (int i = 0; i < 32; i++)
                high[i] = scales[run + 1] *
                              (float)(quanta[i] >> 4 | (fifth[i] >> (run + 1) & 1) << 4) -
                          minima[run + 1];
        }
    }
}

TARGET void NAME(q6_k)(const uint8_t *restrict block, int64_t blocks, float *restrict out)
{
    for (; blocks > 0; blocks--, block += 210, out += 256) {
        for (int half = 0; half < 2; half++) {
            const uint8_t *low = block + 64 * half, *next = low + 32, *high = block + 128 + 32 * half;
            float *at = out + 128 * half;
            for (int i = 0; i < 32; i++) at[i] = (float)(((low[i] & 15) | (high[i] & 3) << 4) - 32);
            for (int i = 0; i < 32; i++) at[i + 32] = (float)(((next[i] & 15) | (high[i] >> 2 & 3) << 4) - 32);
            for (int i = 0; i < 32; i++) at[i + 64] = (float)((low[i] >> 4 | (high[i] >> 4 & 3) << 4) - 32);
            for (int i = 0; i < 32; i++) at[i + 96] = (float)((next[i] >> 4 | (high[i] >> 6) << 4) - 32);
        }
        const float scale = NAME(half)(block + 208);
        for (int run = 0; run < 16; run++) {
            const float factor = scale * (float)(int8_t)block[192 + run];
            for (int i = 16 * run; i < 16 * run + 16; i++) out[i] *= factor;
        }
    }
}

TARGET void NAME(q8_0)(const uint8_t *restrict block, int64_t blocks, float *restrict out)
{
    for (; blocks > 0; blocks--, block += 34, out += 32) {
        const float scale = NAME(half)(block);
        for (int i = 0; i < 32; i++) out[i] = scale * (float)(int8_t)block[2 + i];
    }
}

TARGET void NAME(q4_0)(const uint8_t *restrict block, int64_t blocks, float *restrict out)
{
    for (; blocks > 0; blocks--, block += 18, out += 32) {
        const float scale = NAME(half)(block);
        for (int i = 0; i < 16; i++) out[i] = scale * (float)((block[2 + i] & 15) - 8);
        for (int i = 0; i < 16; i++) out[i + 16] = scale * (float)((block[2 + i] >> 4) - 8);
    }
}

TARGET void NAME(q5_0)(const uint8_t *restrict block, int64_t blocks, float *restrict out)
{
    for (; blocks > 0; blocks--, block += 22, out += 32) {
        const float scale = NAME(half)(block);
        uint32_t fifth;
        memcpy(&fifth, block + 2, sizeof fifth);
        for (int i = 0; i < 16; i++) {
            const int low = (block[6 + i] & 15) | (int)(fifth >> i & 1) << 4;
            const int high = block[6 + i] >> 4 | (int)(fifth >> (i + 16) & 1) << 4;
            out[i] = scale * (float)(low - 16);
            out[i + 16] = scale * (float)(high - 16);
        }
    }
}

/* -- sums ------------------------------------------------------------------------------------- */

/* The sum of 32, pairwise. */
TARGET static inline float NAME(total)(const float *lanes)
{
    float half[16], quarter[8];
    for (int i = 0; i < 16; i++) half[i] = lanes[i] + lanes[i + 16];
    for (int i = 0; i < 8; i++) quarter[i] = half[i] + half[i + 8];
    return ((quarter[0] + quarter[4]) + (quarter[2] + quarter[6])) +
           ((quarter[1] + quarter[5]) + (quarter[3] + quarter[7]));
}

/* See distances.py. Fills found: squared error, squared norm, and the largest that any run's
 * squared error is of its row's squared norm; NaN where one of them is. */
TARGET void NAME(sieve)(const float *model, const float *oracle, int64_t rows, int64_t columns,
                        int64_t run, double *found)
{
    double error = 0, norm = 0;
    float farthest = 0;
    for (int64_t row = 0; row < rows; row++, model += columns, oracle += columns) {
        float norms[32] = {0}, largest = 0;
        for (int64_t start = 0; start < columns; start += run) {
            float errors[32] = {0};
            for (int64_t i = start; i < start + run; i += 32)
                for (int lane = 0; lane < 32; lane++) {
                    const float one = oracle[i + lane], difference = model[i + lane] - one;
                    errors[lane] += difference * difference;
                    norms[lane] += one * one;
                }
            const float size = NAME(total)(errors);
            error += size;
            largest = LARGER(size, largest);
        }
        const float size = NAME(total)(norms);
        norm += size;
        const float apart = largest / size;
        farthest = LARGER(apart, farthest);
    }
    found[0] = error, found[1] = norm, found[2] = farthest;
}

#ifdef TILES
TARGET static inline Lanes NAME(load)(const float *at) { return *(const Unaligned *)at; }

TARGET static inline float NAME(sum)(Lanes all)
{
    const Half half = __builtin_shufflevector(all, all, 0, 1, 2, 3, 4, 5, 6, 7) +
                      __builtin_shufflevector(all, all, 8, 9, 10, 11, 12, 13, 14, 15);
    const Quarter quarter = __builtin_shufflevector(half, half, 0, 1, 2, 3) +
                            __builtin_shufflevector(half, half, 4, 5, 6, 7);
    return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

/* Some rows of weights, so many columns of them, times some tokens; added where adds. The compiler
 * keeps the sums in registers where it knows both numbers. */
#define TILE(ROWS, TOKENS)                                                                         \
    TARGET static inline void NAME(tile_##ROWS##_##TOKENS)(                                        \
        const float *x, const float *w, int64_t columns, int64_t some, float *out, int64_t stride, \
        int adds)                                                                                  \
    {                                                                                              \
        Lanes sums[ROWS][TOKENS], weights[ROWS];                                                   \
        UNROLLED for (int r = 0; r < ROWS; r++)                                                    \
            UNROLLED for (int t = 0; t < TOKENS; t++) sums[r][t] = (Lanes){0};                     \
        for (int64_t c = 0; c < some; c += LANES) {                                                \
            UNROLLED for (int r = 0; r < ROWS; r++) weights[r] = NAME(load)(w + r * columns + c);  \
            UNROLLED for (int t = 0; t < TOKENS; t++) {                                            \
                const Lanes inputs = NAME(load)(x + t * columns + c);                              \
                UNROLLED for (int r = 0; r < ROWS; r++) sums[r][t] += weights[r] * inputs;         \
            }                                                                                      \
        }                                                                                          \
        UNROLLED for (int r = 0; r < ROWS; r++)                                                    \
            UNROLLED for (int t = 0; t < TOKENS; t++)                                              \
                out[t * stride + r] = NAME(sum)(sums[r][t]) + (adds ? out[t * stride + r] : 0);    \
    }
#define EACH_TILE(DO) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7)
#define BOTH(TOKENS) TILE(4, TOKENS) TILE(1, TOKENS)
EACH_TILE(BOTH)

/* x @ w.T, (tokens, columns) and (rows, columns), columns a multiple of 16: out, whose rows lie
 * stride apart. */
TARGET void NAME(product)(const float *x, int64_t tokens, const float *w, int64_t rows,
                          int64_t columns, float *out, int64_t stride)
{
    const int64_t groups = (tokens + TILES - 1) / TILES;
    for (int64_t group = 0, t = 0; group < groups; group++) {
        const int64_t count = (tokens - t + groups - group - 1) / (groups - group);
        for (int64_t c = 0; c < columns; c += CHUNK) {
            const int64_t some = columns - c < CHUNK ? columns - c : CHUNK;
            int64_t r = 0;
#define AT(ROWS, TOKENS)                                                                           \
    NAME(tile_##ROWS##_##TOKENS)(x + t * columns + c, w + r * columns + c, columns, some,          \
                                 out + t * stride + r, stride, c > 0)
#define CASE(TOKENS)                                                                               \
    case TOKENS:                                                                                   \
        for (; r + 4 <= rows; r += 4) AT(4, TOKENS);                                               \
        for (; r < rows; r++) AT(1, TOKENS);                                                       \
        break;
            switch (count) { EACH_TILE(CASE) }
        }
        t += count;
    }
}
#undef AT
#undef CASE
#undef BOTH
#undef EACH_TILE
#undef TILE
#endif
