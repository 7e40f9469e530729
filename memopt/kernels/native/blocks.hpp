// Blocks of a row, 4-bit codes, and scales that need care: see memopt/kernels/blocks.py and quantize_torch.py.
INLINE int64_t blocks_in_row(int64_t cols, int64_t flat, int64_t block) {
    if (flat) return (cols + block - 1) / block;
    return cols < 2 * block ? 1 : cols / block;
}
INLINE int64_t bytes_in_row(int64_t cols, int64_t blocks, int64_t block) {  // 4-bit codes
    return (blocks - 1) * ((block + 1) / 2) + (cols - (blocks - 1) * block + 1) / 2;
}
// 4-bit codes of one block: its first half lies in the low nibbles.
typedef uint8_t vb __attribute__((vector_size(64)));
typedef uint8_t vb_any __attribute__((vector_size(64), aligned(1), may_alias));
INLINE void unpack(uint8_t* __restrict out, const uint8_t* __restrict in, int n) {
    int half = (n + 1) / 2, i = 0;
    for (; i + 64 <= n - half; i += 64) {
        vb x = *(const vb_any*)(in + i);
        *(vb_any*)(out + i) = x & 15;
        *(vb_any*)(out + half + i) = x >> 4;
    }
    for (; i < half; i++) {
        out[i] = in[i] & 15;
        if (half + i < n) out[half + i] = in[i] >> 4;
    }
}
INLINE void pack(uint8_t* __restrict out, const uint8_t* __restrict in, int n) {
    int half = (n + 1) / 2, i = 0;
    for (; i + 64 <= n - half; i += 64)
        *(vb_any*)(out + i) = *(const vb_any*)(in + i) | (*(const vb_any*)(in + half + i) << 4);
    for (; i < half; i++) out[i] = (uint8_t)(in[i] | (half + i < n ? in[half + i] << 4 : 0));
}
// bytes of two codes, each in the low nibble
INLINE void store_nibbles(uint8_t* p, vu low, vu high) { store_bytes(p, (vi)((low & 15) | (high << 4))); }
// blocks with an infinity or NaN encode zeros; tiny ones are made larger first
INLINE void prepare(float* values, int n, const Scale& s) {
    if (__builtin_expect(s.lift != 1.0f, 0))
        for (int i = 0; i < n; i++) values[i] = s.lift == 0 ? 0 : values[i] * s.lift;
}
