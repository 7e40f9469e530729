// Shared by the loss kernels: storage types and exponentials that compilers turn into vector code.
// C++17, no torch headers; put before the kernels of one library.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

constexpr int64_t BLOCK = 512;
constexpr float NEGATIVE_INFINITY = -std::numeric_limits<float>::infinity();

struct Float32 {
    using Stored = float;
    static inline float load(Stored stored) { return stored; }
    static inline Stored store(float value) { return value; }
};

struct BFloat16 {
    using Stored = uint16_t;
    static inline float load(Stored stored) {
        uint32_t bits = static_cast<uint32_t>(stored) << 16;
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }
    static inline Stored store(float value) {  // to nearest, ties to even; NaN stays NaN
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        return static_cast<Stored>(value != value ? 0x7fc0u : rounded);
    }
};

// Written out, because contraction by the compiler would make z differ from one loop to the next.
inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// exp(y) - 1 as 2^n * (exp(r) - 1) + (2^n - 1) with |r| <= ln(2) / 2: `power` is 2^n, `rest` is exp(r) - 1.
// nearbyint and the split of ln(2) keep the error below two units in the last place. y is -88 to 88 or NaN; at -88 the
// power is exactly zero.
inline void split_exp(float y, float& power, float& rest) {
    float n = std::nearbyint(y * 1.44269504f);
    float r = multiply_add(n, -0.693359375f, y);
    r = multiply_add(n, 2.12194440e-4f, r);
    float q = 1.0f / 5040.0f;
    q = multiply_add(q, r, 1.0f / 720.0f);
    q = multiply_add(q, r, 1.0f / 120.0f);
    q = multiply_add(q, r, 1.0f / 24.0f);
    q = multiply_add(q, r, 1.0f / 6.0f);
    q = multiply_add(q, r, 0.5f);
    rest = multiply_add(r * r, q, r);
    int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    std::memcpy(&power, &bits, 4);
}

inline float exponential(float y) {  // for y <= 0 up to rounding, or NaN; zero below the smallest normal number
    float power, rest;
    split_exp(y < -88.0f ? -88.0f : y, power, rest);
    return multiply_add(power, rest, power);
}

inline float hyperbolic_tangent(float u) {  // through exp(2u) - 1, so that small arguments keep their precision
    float power, rest, bounded = u < -10.0f ? -10.0f : (u > 10.0f ? 10.0f : u);
    split_exp(2.0f * bounded, power, rest);
    float minus_one = multiply_add(power, rest, power - 1.0f);
    return minus_one / (minus_one + 2.0f);
}

}  // namespace
