// Any CPU: compiler vectors, and loops over lanes that the compiler turns into what there is.
typedef vi vm;
INLINE vm lt(vf a, vf b) { return a < b; }
INLINE vm le(vf a, vf b) { return a <= b; }
INLINE vm gt(vf a, vf b) { return a > b; }
INLINE vm ge(vf a, vf b) { return a >= b; }
INLINE vm eq(vf a, vf b) { return a == b; }
INLINE vm ne(vf a, vf b) { return a != b; }
INLINE vm both(vm a, vm b) { return a & b; }
INLINE vm either(vm a, vm b) { return a | b; }
INLINE vm negate(vm a) { return ~a; }
INLINE vf select(vm m, vf a, vf b) { return (vf)(((vi)a & m) | ((vi)b & ~m)); }
INLINE vf vmin(vf a, vf b) { return select(a < b, a, b); }
INLINE vf vmax(vf a, vf b) { return select(a > b, a, b); }
INLINE vf fma(vf a, vf b, vf c) {
    for (int i = 0; i < W; i++) {
#if defined(__FP_FAST_FMAF) || defined(__ARM_FEATURE_FMA)
        c[i] = __builtin_fmaf(a[i], b[i], c[i]);
#else
        c[i] = (float)((double)a[i] * b[i] + c[i]);
#endif
    }
    return c;
}
INLINE vf vsqrt(vf a) {
    for (int i = 0; i < W; i++) a[i] = std::sqrt(a[i]);
    return a;
}
INLINE vf to_float(vi a) { return __builtin_convertvector(a, vf); }
INLINE vi to_int(vf a) { return __builtin_convertvector(a, vi); }
INLINE vf vfloor(vf a) {
    vf t = to_float(to_int(a));
    t = t - select(t > a, splat(1), splat(0));
    // beyond 2**23 every float is whole, and the conversion would overflow
    return select((vf)((vi)a & 0x7fffffff) < splat(8388608.0f), t, a);
}
INLINE vi load_bytes(const uint8_t* p) {
    vi a;
    for (int i = 0; i < W; i++) a[i] = p[i];
    return a;
}
INLINE vf load_codes(const uint8_t* p) { return to_float(load_bytes(p)); }
INLINE void store_bytes(uint8_t* p, vi a) {
    for (int i = 0; i < W; i++) p[i] = (uint8_t)a[i];
}
#define MEMOPT_NARROWS 0
INLINE void narrow(uint8_t* __restrict p, const float* __restrict x, int n) {
    int i = 0;
    for (; i + W <= n; i += W) store_bytes(p + i, (vi)load(x + i));
    for (; i < n; i++) p[i] = (uint8_t)as_u(load(x + i))[0];
}
INLINE void narrow_pairs(uint8_t* __restrict p, const float* __restrict x, int n) {
    int i = 0;
    for (; i + W <= n; i += W) store_bytes(p + i, (vi)((as_u(load(x + i)) & 15) | (as_u(load(x + n + i)) << 4)));
    for (; i < n; i++) p[i] = (uint8_t)((as_u(load(x + i))[0] & 15) | (as_u(load(x + n + i))[0] << 4));
}
INLINE vu load_u16(const uint16_t* p) {
    vu a;
    for (int i = 0; i < W; i++) a[i] = p[i];
    return a;
}
INLINE void store_u16(uint16_t* p, vu a) {
    for (int i = 0; i < W; i++) p[i] = (uint16_t)a[i];
}
// fp16 by integer steps: exact one way, to nearest even the other
INLINE vf half_to_float(const uint16_t* p) {
    vu h = load_u16(p), sign = (h & 0x8000u) << 16, rest = h & 0x7fffu;
    vf finite = as_f(rest << 13) * splat(5.192296858534828e+33f);  // 2**112 moves the exponent, subnormals too
    vu special = (rest << 13) | 0x7f800000u;
    return as_f(sign | as_u(select((vm)(rest >= 0x7c00u), as_f(special), finite)));
}
INLINE void float_to_half(uint16_t* p, vf x) {
    vu b = as_u(x), sign = (b >> 16) & 0x8000u, m = b & 0x7fffffffu;
    vu normal = (m + 0xc8000fffu + ((m >> 13) & 1u)) >> 13;
    vu small = as_u(as_f(m) + splat(0.5f)) - 0x3f000000u;  // the addition rounds to multiples of 2**-24
    vu special = 0x7c00u | ((vu)(m > 0x7f800000u) & 0x200u);
    vu finite = (vu)(m < 0x38800000u) & small;
    finite |= (vu)(m >= 0x38800000u) & normal;
    vu big = (vu)(m >= 0x477ff000u);
    store_u16(p, sign | (big & special) | (~big & finite));
}
template <int N> INLINE vf take(const float* table, vi i) {
    vf a;
    for (int k = 0; k < W; k++) a[k] = table[i[k]];
    return a;
}
INLINE void stream(float* p, vf x) { *(vf_any*)p = x; }
INLINE void stream_u16(uint16_t* p, vu a) { store_u16(p, a); }
INLINE void stream_half(uint16_t* p, vf x) { float_to_half(p, x); }
INLINE void stream_end() {}
