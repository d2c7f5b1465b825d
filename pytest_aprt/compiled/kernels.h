/* The decoders and the sieve, for one kind of processor: included once for each, with NAME and
 * TARGET defined.
 *
 * Blocks are laid out as gguf-py's quants.py reads them. A product of scale and quantum has at most
 * 24 significant bits, so it is exact whether or not the compiler fuses what follows. */

TARGET static inline float NAME(half)(const uint8_t *at)
{
    uint16_t bits;
    memcpy(&bits, at, sizeof bits);
    return _cvtsh_ss(bits);
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
            const uint8_t *low = block + 64 * half, *high = block + 128 + 32 * half;
            float *at = out + 128 * half;
            for (int i = 0; i < 32; i++)
                at[i] = (float)(((low[i] & 15) | (high[i] & 3) << 4) - 32);
            for (int i = 0; i < 32; i++)
                at[i + 32] = (float)(((low[i + 32] & 15) | (high[i] >> 2 & 3) << 4) - 32);
            for (int i = 0; i < 32; i++)
                at[i + 64] = (float)((low[i] >> 4 | (high[i] >> 4 & 3) << 4) - 32);
            for (int i = 0; i < 32; i++)
                at[i + 96] = (float)((low[i + 32] >> 4 | (high[i] >> 6) << 4) - 32);
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
