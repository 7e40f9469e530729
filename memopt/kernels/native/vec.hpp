// Vectors of W floats: the one vocabulary that generated kernels use. Arithmetic is by GCC/Clang vector types; what
// they lack comes from vec_avx512.hpp, vec_avx2.hpp or vec_generic.hpp, chosen by the compiler's flags.
// -ffp-contract=off: a product and a sum are two roundings unless fma is written.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define MEMOPT_AVX512 1
constexpr int W = 16;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define MEMOPT_AVX2 1
constexpr int W = 8;
#else
constexpr int W = 8;
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef float vf_any __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(4 * W), aligned(4), may_alias));

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

INLINE vf splat(float x) { return x - vf{}; }
INLINE vu splat_u(uint32_t x) { return x - vu{}; }
INLINE vf load(const float* p) { return *(const vf_any*)p; }
INLINE void store(float* p, vf x) { *(vf_any*)p = x; }
INLINE vu load_u(const uint32_t* p) { return *(const vu_any*)p; }
INLINE void store_u(uint32_t* p, vu x) { *(vu_any*)p = x; }
INLINE vu lanes() {
    vu x;
    for (int i = 0; i < W; i++) x[i] = i;
    return x;
}
INLINE vf as_f(vu x) { return (vf)x; }
INLINE vu as_u(vf x) { return (vu)x; }
INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

#if MEMOPT_AVX512
#include "vec_avx512.hpp"
#elif MEMOPT_AVX2
#include "vec_avx2.hpp"
#else
#include "vec_generic.hpp"
#endif

INLINE vf vabs(vf x) { return as_f(as_u(x) & splat_u(0x7fffffffu)); }
// a product and a sum where the number of roundings does not matter
INLINE vf mul_add(vf a, vf b, vf c) {
#if MEMOPT_AVX512 || MEMOPT_AVX2 || defined(__FP_FAST_FMAF)
    return fma(a, b, c);
#else
    return a * b + c;
#endif
}
INLINE vf vrsqrt(vf x) { return splat(1) / vsqrt(x); }
INLINE vf vneg(vf x) { return -x; }
INLINE vf vcopysign(vf x, vf like) {
#if MEMOPT_AVX512
    return (vf)_mm512_ternarylogic_epi32((__m512i)x, (__m512i)like, _mm512_set1_epi32(0x7fffffff), 0xe4);
#endif
    return as_f((as_u(x) & splat_u(0x7fffffffu)) | (as_u(like) & splat_u(0x80000000u)));
}
INLINE vf vsign(vf x) { return select(gt(x, splat(0)), splat(1), select(lt(x, splat(0)), splat(-1), splat(0))); }
INLINE vf vexponent(vf x) { return to_float((vi)(as_u(x) >> 23)) - splat(127); }
INLINE vf vpower_of_two(vf x) { return as_f((vu)(to_int(x) + 127) << 23); }
INLINE vf vroot4(vf x) { return vsqrt(vsqrt(x)); }
// What codecs need. The square root to about 1 ulp for normal x > 0: an estimate and one Newton step.
INLINE vf vsqrt_newton(vf x) {
#if MEMOPT_AVX512 || MEMOPT_AVX2
    vf r = rsqrt_estimate(x), s = x * r;
    return fma(as_f(as_u(r) - splat_u(0x800000u)), fma(-s, s, x), s);  // r / 2 by its exponent: products are scarce
#else
    return vsqrt(x);
#endif
}
// The same for finite x >= 0, 0 or next to it below.
INLINE vf vsqrt_fast(vf x) { return vsqrt_newton(vmax(x, splat(1e-30f))); }
// The same to 2**-11 for x > 0.
INLINE vf vsqrt_rough(vf x) {
#if MEMOPT_AVX512 || MEMOPT_AVX2
    return x * rsqrt_estimate(x);
#else
    return vsqrt(x);
#endif
}
// The fourth root to 2**-10 for x > 0.
INLINE vf vroot4_fast(vf x) {
#if MEMOPT_AVX512 || MEMOPT_AVX2
    return rsqrt_estimate(rsqrt_estimate(x));
#else
    return vsqrt(vsqrt(x));
#endif
}
INLINE vf vstep_down(vf x, vf d) {
#if MEMOPT_AVX2
    return as_f(as_u(x) + (vu)((vi)d < 0));  // more ports compare than shift
#else
    return as_f(as_u(x) + (vu)((vi)d >> 31));
#endif
}
INLINE vf vexp(vf x) {
    for (int i = 0; i < W; i++) x[i] = std::exp(x[i]);
    return x;
}
INLINE vf vlog(vf x) {
    for (int i = 0; i < W; i++) x[i] = std::log(x[i]);
    return x;
}

INLINE vf load(const bf16* p) { return as_f(load_u16((const uint16_t*)p) << 16); }
// float bits to bfloat16 in the upper half, to nearest even; a NaN stays a NaN
INLINE vu bf16_nearest(vf x) {
    vu b = as_u(x);
    vu r = b + splat_u(0x7fffu) + ((b >> 16) & splat_u(1u));
    return as_u(select(ne(x, x), as_f(b | splat_u(0x400000u)), as_f(r)));
}
// the same with 16 random bits: up with the probability of what is cut off; infinities and NaN stay
INLINE vu bf16_stochastic(vf x, vu noise) {
    vu b = as_u(x);
    return as_u(select(lt(vabs(x), splat(INFINITY)), as_f(b + noise), as_f(as_u(select(ne(x, x), as_f(b | splat_u(0x400000u)), x)))));
}
INLINE void store(bf16* p, vf x) { store_u16((uint16_t*)p, bf16_nearest(x) >> 16); }
INLINE void store_noisy(bf16* p, vf x, vu noise) { store_u16((uint16_t*)p, bf16_stochastic(x, noise) >> 16); }
INLINE vf load(const f16* p) { return half_to_float((const uint16_t*)p); }
INLINE void store(f16* p, vf x) { float_to_half((uint16_t*)p, x); }
INLINE void stream(bf16* p, vf x) { stream_u16((uint16_t*)p, bf16_nearest(x) >> 16); }
INLINE void stream(f16* p, vf x) { stream_half((uint16_t*)p, x); }
// fp16 at random: the cell below x is 2**max(exponent - 10, -24) wide
INLINE void store_noisy(f16* p, vf x, vu noise) {
    vu exponent = as_u(vmax(as_f(as_u(vabs(x)) & splat_u(0x7f800000u)), splat(6.103515625e-05f)));
    vf cell = as_f(exponent - splat_u(10u << 23)), inverse = as_f(splat_u(264u << 23) - exponent);
    vf scaled = x * inverse, low = vfloor(scaled);
    vf u = (to_float((vi)noise) + splat(0.5f)) * splat(1.0f / 65536);
    vf y = (low + select(lt(u, scaled - low), splat(1), splat(0))) * cell;
    float_to_half((uint16_t*)p, select(lt(vabs(x), splat(INFINITY)), y, x));
}
INLINE void store_noisy(float* p, vf x, vu) { store(p, x); }

// the first n < W elements, the rest zeros; and back
template <class T> INLINE vf load_some(const T* p, int n) {
    T x[W] = {};
    memcpy(x, p, n * sizeof(T));
    return load(x);
}
template <class T> INLINE void store_some(T* p, vf v, int n) {
    T x[W];
    store(x, v);
    memcpy(p, x, n * sizeof(T));
}
template <class T> INLINE void store_noisy_some(T* p, vf v, vu noise, int n) {
    T x[W];
    store_noisy(x, v, noise);
    memcpy(p, x, n * sizeof(T));
}
// a code is the low byte of BIAS + code: see memopt/kernels/codecs/base.py
INLINE void store_codes(uint8_t* p, vf x) { store_bytes(p, (vi)x); }
// Codes on their way to p: there at once where narrowing is one instruction, else in a buffer. narrow() brings n of
// them, narrow_pairs() 2 n of 4 bits: byte i has code i in its low nibble and code n + i in its high one. Both may read
// a vector further.
#if MEMOPT_NARROWS
INLINE void keep_codes(uint8_t* p, float*, vf x) { store_codes(p, x); }
INLINE void keep_codes_some(uint8_t* p, float*, vf x, int n) {
    uint8_t some[W];
    store_codes(some, x);
    memcpy(p, some, n);
}
INLINE void narrow(uint8_t*, const float*, int) {}
INLINE void narrow_pairs(uint8_t*, const float*, int) {}
#else
INLINE void keep_codes(uint8_t*, float* buffer, vf x) { store(buffer, x); }
INLINE void keep_codes_some(uint8_t*, float* buffer, vf x, int n) { store_some(buffer, x, n); }
#endif
INLINE vf load_codes_some(const uint8_t* p, int n) {
    uint8_t x[W] = {};
    memcpy(x, p, n);
    return load_codes(x);
}

// ---- random numbers: see memopt/kernels/hashing.py ----
INLINE uint64_t mix64(uint64_t x) {
    x += 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}
INLINE uint32_t row_key(uint64_t base, uint64_t row_start, uint64_t draw) {
    return mix64(base ^ ((row_start >> 32) * 2 + 1 + (draw << 33))) >> 32;
}
// The words of the elements first, first + 1, ..., then of the W elements after those, and so on.
struct Words {
    vu at;
    inline __attribute__((always_inline)) Words(uint32_t key, uint32_t first)
        : at(lanes() * splat_u(0x9E3779B1u) + splat_u(first * 0x9E3779B1u + key)) {}
    inline __attribute__((always_inline)) vu next() {
        vu h = (at ^ (at >> 14)) * splat_u(0x4DAD971Du);
        at = at + splat_u(W * 0x9E3779B1u);
        return h;
    }
};
// the noise of a slot, in [-1/2, 1/2), and its 16 bits
INLINE vf noise_of(vu word, int slot) {
    vu fraction = slot % 2 ? word >> 9 : word & splat_u(0x7fffffu);
    return as_f(fraction | splat_u(0x3f800000u)) - splat(1.5f);
}
INLINE vu half_of(vu word, int slot) { return slot % 2 ? word >> 16 : word & splat_u(0xffffu); }

// ---- scales: see memopt/kernels/quantize_torch.py ----
// The largest magnitude is kept as bits, so that infinities and NaN win.
INLINE vu magnitude(vf x) { return as_u(x) & splat_u(0x7fffffffu); }
INLINE vu umax(vu a, vu b) { return a > b ? a : b; }
INLINE uint32_t largest(vu x) {
#if MEMOPT_AVX512
    return _mm512_reduce_max_epu32((__m512i)x);
#else
    uint32_t m = 0;
    for (int i = 0; i < W; i++) m = x[i] > m ? x[i] : m;
    return m;
#endif
}
struct Scale { float scale, lift, inverse; };
INLINE Scale scale_of(vu maxima, float unit) {
    uint32_t m = largest(maxima);
    if (m >= 0x7f800000u) return {NAN, 0.0f, 0.0f};
    float s;
    memcpy(&s, &m, 4);
    float lift = s < 8.67361738e-19f ? 18446744073709551616.0f : 1.0f;
    return {s, lift, s > 0 ? unit / (s * lift) : 0.0f};
}
