// AVX-512 F, BW, DQ, VL: 16 lanes, masks in mask registers.
typedef __mmask16 vm;
INLINE vm lt(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
INLINE vm le(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
INLINE vm gt(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
INLINE vm ge(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
INLINE vm eq(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
INLINE vm ne(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ); }
INLINE vm both(vm a, vm b) { return a & b; }
INLINE vm either(vm a, vm b) { return a | b; }
INLINE vm negate(vm a) { return ~a; }
INLINE vf select(vm m, vf a, vf b) { return _mm512_mask_blend_ps(m, b, a); }
INLINE vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf vsqrt(vf a) { return _mm512_sqrt_ps(a); }
INLINE vf vfloor(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
INLINE vf rsqrt_estimate(vf a) { return _mm512_rsqrt14_ps(a); }
INLINE vf to_float(vi a) { return _mm512_cvtepi32_ps((__m512i)a); }
INLINE vi to_int(vf a) { return (vi)_mm512_cvttps_epi32(a); }
INLINE vf load_codes(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
INLINE vi load_bytes(const uint8_t* p) { return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
#define MEMOPT_NARROWS 1  // codes are narrowed by one instruction
INLINE void store_bytes(uint8_t* p, vi a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)a)); }
INLINE vu load_u16(const uint16_t* p) { return (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
INLINE void store_u16(uint16_t* p, vu a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)a)); }
INLINE vf half_to_float(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
INLINE void float_to_half(uint16_t* p, vf x) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// Tables by permutes, 32 entries each: a gather takes two to three times as long. Lanes beyond N are never asked for.
template <int N, int AT> INLINE vf table_part(const float* table) {
    if constexpr (N >= AT + 16) return _mm512_loadu_ps(table + AT);
    return _mm512_maskz_loadu_ps((__mmask16)((1u << (N > AT ? N - AT : 0)) - 1), table + AT);
}
template <int N, int AT, int SPAN> INLINE vf take_span(const float* table, vi i) {
    if constexpr (SPAN == 16) return _mm512_permutexvar_ps((__m512i)i, table_part<N, AT>(table));
    if constexpr (SPAN == 32)
        return _mm512_permutex2var_ps(table_part<N, AT>(table), (__m512i)i, table_part<N, AT + 16>(table));
    if constexpr (SPAN > 32) {
        vf low = take_span<N, AT, SPAN / 2>(table, i);
        if constexpr (AT + SPAN / 2 >= N) return low;
        vm upper = _mm512_test_epi32_mask((__m512i)i, _mm512_set1_epi32(SPAN / 2));
        return select(upper, take_span<N, AT + SPAN / 2, SPAN / 2>(table, i), low);
    }
}
constexpr int power_above(int n) { return n <= 16 ? 16 : 2 * power_above((n + 1) / 2); }
template <int N> INLINE vf take(const float* table, vi i) {
    if constexpr (N <= 256) return take_span<N, 0, power_above(N)>(table, i);
    return _mm512_i32gather_ps((__m512i)i, table, 4);
}
// past the caches, for what nothing reads soon; p is a multiple of the vector's bytes
INLINE void stream(float* p, vf x) { _mm512_stream_ps(p, x); }
INLINE void stream_u16(uint16_t* p, vu a) { _mm256_stream_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)a)); }
INLINE void stream_half(uint16_t* p, vf x) {
    _mm256_stream_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
INLINE void stream_end() { _mm_sfence(); }
