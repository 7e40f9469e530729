// AVX2 with FMA and F16C: 8 lanes, masks as all-ones lanes.
typedef vi vm;
INLINE vm lt(vf a, vf b) { return (vm)_mm256_cmp_ps(a, b, _CMP_LT_OQ); }
INLINE vm le(vf a, vf b) { return (vm)_mm256_cmp_ps(a, b, _CMP_LE_OQ); }
INLINE vm gt(vf a, vf b) { return (vm)_mm256_cmp_ps(a, b, _CMP_GT_OQ); }
INLINE vm ge(vf a, vf b) { return (vm)_mm256_cmp_ps(a, b, _CMP_GE_OQ); }
INLINE vm eq(vf a, vf b) { return (vm)_mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
INLINE vm ne(vf a, vf b) { return (vm)_mm256_cmp_ps(a, b, _CMP_NEQ_UQ); }
INLINE vm both(vm a, vm b) { return a & b; }
INLINE vm either(vm a, vm b) { return a | b; }
INLINE vm negate(vm a) { return ~a; }
INLINE vf select(vm m, vf a, vf b) { return _mm256_blendv_ps(b, a, (__m256)m); }
INLINE vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
INLINE vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vf vsqrt(vf a) { return _mm256_sqrt_ps(a); }
INLINE vf vfloor(vf a) { return _mm256_floor_ps(a); }
INLINE vf rsqrt_estimate(vf a) { return _mm256_rsqrt_ps(a); }
INLINE vf to_float(vi a) { return _mm256_cvtepi32_ps((__m256i)a); }
INLINE vi to_int(vf a) { return (vi)_mm256_cvttps_epi32(a); }
INLINE vi load_bytes(const uint8_t* p) { return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
INLINE vf load_codes(const uint8_t* p) { return to_float(load_bytes(p)); }
INLINE void store_u16(uint16_t* p, vu a) {  // a < 2**16
    __m256i packed = _mm256_packus_epi32((__m256i)a, (__m256i)a);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x88)));
}
INLINE void store_bytes(uint8_t* p, vi a) {  // the low bytes, of each half into its first four, then both together
    const __m128i low = _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    __m256i x = _mm256_shuffle_epi8((__m256i)a, _mm256_broadcastsi128_si256(low));
    _mm_storel_epi64((__m128i*)p, _mm_unpacklo_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
}
#define MEMOPT_NARROWS 0
// the low bits of four vectors as bytes, which takes half the shuffles of one at a time
INLINE __m256i narrowed(const float* x, int mask) {
    __m256i b[4];
    for (int k = 0; k < 4; k++)
        b[k] = _mm256_and_si256(_mm256_loadu_si256((const __m256i*)(x + k * W)), _mm256_set1_epi32(mask));
    __m256i bytes = _mm256_packus_epi16(_mm256_packus_epi32(b[0], b[1]), _mm256_packus_epi32(b[2], b[3]));
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
INLINE void narrow(uint8_t* __restrict p, const float* __restrict x, int n) {
    int i = 0;
    for (; i + 4 * W <= n; i += 4 * W) _mm256_storeu_si256((__m256i*)(p + i), narrowed(x + i, 255));
    for (; i < n; i++) memcpy(p + i, x + i, 1);
}
INLINE void narrow_pairs(uint8_t* __restrict p, const float* __restrict x, int n) {
    int i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
        __m256i high = _mm256_slli_epi16(narrowed(x + n + i, 15), 4);
        _mm256_storeu_si256((__m256i*)(p + i), _mm256_or_si256(narrowed(x + i, 15), high));
    }
    for (; i < n; i++) p[i] = (uint8_t)((as_u(load(x + i))[0] & 15) | (as_u(load(x + n + i))[0] << 4));
}
INLINE vu load_u16(const uint16_t* p) { return (vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
INLINE vf half_to_float(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
INLINE void float_to_half(uint16_t* p, vf x) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
template <int N> INLINE vf take(const float* table, vi i) {
    if constexpr (N == 16) {
        vf low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)i);
        vf high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)i);
        return _mm256_blendv_ps(low, high, (__m256)(i << 28));
    }
    return _mm256_i32gather_ps(table, (__m256i)i, 4);
}
// past the caches, for what nothing reads soon; p is a multiple of the vector's bytes
INLINE void stream(float* p, vf x) { _mm256_stream_ps(p, x); }
INLINE void stream_u16(uint16_t* p, vu a) { store_u16(p, a); }
INLINE void stream_half(uint16_t* p, vf x) { float_to_half(p, x); }
INLINE void stream_end() { _mm_sfence(); }
