// Layers on vectors: gated activations, norms, ReLU with packed bits, dropout. The text of vec.hpp comes before this.
// All arithmetic is float; sums over rows are float over a few hundred elements, and double beyond.

#include <initializer_list>

INLINE vf exponential(vf y) {  // below two units in the last place from -87 to 88, held at the ends beyond
    y = vmin(vmax(y, splat(-87.0f)), splat(88.0f));
    vf n = vfloor(fma(y, splat(1.44269504f), splat(0.5f)));
    vf r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), y));
    vf q = splat(1.0f / 5040);
    for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f}) q = fma(q, r, splat(c));
    return fma(vpower_of_two(n), fma(r * r, q, r), vpower_of_two(n));
}
INLINE vf sigmoid(vf x) { return splat(1) / (splat(1) + exponential(-x)); }
// erfc by the Chebyshev fit of Numerical Recipes, section 6.2: relative error below 1.2e-7
INLINE vf complementary_error(vf x) {
    vf z = vabs(x), t = splat(1) / fma(splat(0.5f), z, splat(1)), q = splat(0.17087277f);
    for (float c : {-0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f, -0.18628806f, 0.09678418f, 0.37409196f,
                    1.00002368f, -1.26551223f})
        q = fma(q, t, splat(c));
    vf tail = t * exponential(fma(-z, z, q));
    return select(ge(x, splat(0)), tail, splat(2) - tail);
}
// value and slope of an activation: 0 silu, 1 gelu, 2 gelu by tanh, which is x * sigmoid(2 u)
struct Activation { vf value, slope; };
template <int KIND> INLINE Activation activation(vf x) {
    if constexpr (KIND == 1) {
        vf below = splat(0.5f) * complementary_error(x * splat(-0.70710678f));
        vf density = splat(0.39894228f) * exponential(splat(-0.5f) * x * x);
        return {x * below, fma(x, density, below)};
    }
    vf twice_u = x, inner = splat(1);
    if constexpr (KIND == 2) {
        vf square = x * x;
        twice_u = x * fma(square, splat(0.0713548163f), splat(1.59576912f));
        inner = fma(square, splat(0.214064449f), splat(1.59576912f));
    }
    vf s = sigmoid(twice_u);
    // x s (1 - s) is 0 at both ends, also where x is huge
    return {x * s, fma(x * inner, s * (splat(1) - s), s)};
}

const int64_t PIECE = 16384;  // elements; a multiple of 8 and of W
template <class F> static void each_piece(int64_t n, int threads, F work) {
#pragma omp parallel for num_threads(threads) schedule(static) if (n > 2 * PIECE && threads > 1)
    for (int64_t first = 0; first < n; first += PIECE) work(first, first + PIECE < n ? first + PIECE : n);
}
// work(i, load, store) over the vectors of a piece; the last one is moved through memory
template <class F> INLINE void each_vector(int64_t first, int64_t stop, F work) {
    int64_t i = first;
    for (; i + W <= stop; i += W) work(i, W);
    if (i < stop) work(i, (int)(stop - i));
}
template <class T> INLINE vf get(const T* p, int m) { return m == W ? load(p) : load_some(p, m); }
template <class T> INLINE void put(T* p, vf x, int m) {
    if (m == W) store(p, x);
    else store_some(p, x, m);
}

template <int KIND, class T> static void gated_forward(const T* gate, const T* up, T* out, int64_t n, int threads) {
    each_piece(n, threads, [&](int64_t first, int64_t stop) {
        each_vector(first, stop, [&](int64_t i, int m) {
            put(out + i, activation<KIND>(get(gate + i, m)).value * get(up + i, m), m);
        });
    });
}
template <int KIND, class T>
static void gated_backward(const T* of_out, const T* gate, const T* up, T* of_gate, T* of_up, int64_t n, int threads) {
    each_piece(n, threads, [&](int64_t first, int64_t stop) {
        each_vector(first, stop, [&](int64_t i, int m) {
            vf g = get(of_out + i, m);
            Activation a = activation<KIND>(get(gate + i, m));
            vf to_gate = g * get(up + i, m) * a.slope;
            put(of_up + i, g * a.value, m);
            put(of_gate + i, to_gate, m);
        });
    });
}

INLINE double total(vf x) {
    double sum = 0;
    for (int i = 0; i < W; i++) sum += x[i];
    return sum;
}
// sum over i of f(i, m), f a vector that is zero beyond its m lanes
template <class F> INLINE double row_sum(int64_t n, F f) {
    const int64_t RUN = 32 * W;
    double sum = 0;
    for (int64_t from = 0; from < n; from += RUN) {
        vf part = {};
        each_vector(from, from + RUN < n ? from + RUN : n, [&](int64_t i, int m) { part = part + f(i, m); });
        sum += total(part);
    }
    return sum;
}
INLINE vf only(vf x, int m) { return m == W ? x : as_f(as_u(x) & (vu)(lanes() < splat_u((uint32_t)m))); }

struct Norm {
    int64_t rows, D;
    const float *weight, *bias;  // null where there is none
    float *mean, *inverse;       // mean is null for RMSNorm
    double eps;
    int threads;
};
template <class T> static void norm_forward(const Norm& a, const T* x, T* y) {
#pragma omp parallel for num_threads(a.threads) schedule(static) if (a.rows > 1 && a.threads > 1)
    for (int64_t row = 0; row < a.rows; row++) {
        const T* in = x + row * a.D;
        T* out = y + row * a.D;
        vf mean = {};
        if (a.mean) {
            a.mean[row] = (float)(row_sum(a.D, [&](int64_t i, int m) { return get(in + i, m); }) / a.D);
            mean = splat(a.mean[row]);
        }
        double squares = row_sum(a.D, [&](int64_t i, int m) {
            vf v = only(get(in + i, m) - mean, m);
            return v * v;
        });
        a.inverse[row] = (float)(1 / std::sqrt(squares / a.D + a.eps));
        vf inverse = splat(a.inverse[row]);
        each_vector(0, a.D, [&](int64_t i, int m) {
            vf v = (get(in + i, m) - mean) * inverse;
            if (a.weight) v = v * get(a.weight + i, m);
            if (a.bias) v = v + get(a.bias + i, m);
            put(out + i, v, m);
        });
    }
}
// Rows are cut into PARTS, whatever the number of threads, so that results do not depend on it. sums: (PARTS, 2, D).
const int PARTS = 16, TOGETHER = 16;
template <class T>
static void norm_backward(const Norm& a, const T* of_y, const T* kept, bool kept_output, T* of_x, double* sums, float* few) {
#pragma omp parallel for num_threads(a.threads) schedule(dynamic, 1) if (a.rows > 1 && a.threads > 1)
    for (int part = 0; part < PARTS; part++) {
        int64_t begin = a.rows * part / PARTS, end = a.rows * (part + 1) / PARTS;
        double* of_weight = sums + 2 * part * a.D;
        float *by_weight = few + 2 * part * a.D, *by_bias = by_weight + a.D;
        for (int64_t row = begin; row < end; row++) {
            const T *in = kept + row * a.D, *up = of_y + row * a.D;
            vf mean = splat(a.mean && !kept_output ? a.mean[row] : 0), inverse = splat(a.inverse[row]);
            auto unit = [&](int64_t i, int m) {
                vf v = get(in + i, m);
                if (!kept_output) return (v - mean) * inverse;
                if (a.bias) v = v - get(a.bias + i, m);
                return only(a.weight ? v / get(a.weight + i, m) : v, m);
            };
            auto weighted = [&](int64_t i, int m) {
                vf g = get(up + i, m);
                return a.weight ? g * get(a.weight + i, m) : g;
            };
            vf along = splat((float)(row_sum(a.D, [&](int64_t i, int m) { return weighted(i, m) * unit(i, m); }) / a.D));
            vf middle = {};
            if (a.mean) middle = splat((float)(row_sum(a.D, weighted) / a.D));
            each_vector(0, a.D, [&](int64_t i, int m) {
                vf u = unit(i, m), g = get(up + i, m);
                put(by_weight + i, get(by_weight + i, m) + g * u, m);
                put(by_bias + i, get(by_bias + i, m) + g, m);
                put(of_x + row * a.D + i, (weighted(i, m) - middle - u * along) * inverse, m);
            });
            if ((row - begin) % TOGETHER == TOGETHER - 1 || row == end - 1)
                for (int64_t i = 0; i < 2 * a.D; i++) {
                    of_weight[i] += by_weight[i];
                    by_weight[i] = 0;
                }
        }
    }
}

INLINE uint32_t bits_of(vm mask) {
#if MEMOPT_AVX512
    return mask;
#elif MEMOPT_AVX2
    return (uint32_t)_mm256_movemask_ps((__m256)mask);
#else
    uint32_t bits = 0;
    for (int i = 0; i < W; i++) bits |= (mask[i] & 1u) << i;
    return bits;
#endif
}
INLINE vm mask_of(uint32_t bits) {
#if MEMOPT_AVX512
    return (vm)bits;
#else
    return (vm)(((splat_u(bits) >> lanes()) & splat_u(1)) != splat_u(0));
#endif
}
INLINE void put_bits(uint8_t* p, vm mask, int m) {
    uint32_t bits = bits_of(mask) & ((1u << m) - 1);
    for (int i = 0; i < m; i += 8) p[i / 8] = (uint8_t)(bits >> i);
}
INLINE vm get_bits(const uint8_t* p, int m) {
    uint32_t bits = 0;
    for (int i = 0; i < m; i += 8) bits |= (uint32_t)p[i / 8] << i;
    return mask_of(bits);
}
template <class T> static void relu(const T* x, T* y, uint8_t* bits, int64_t n, int threads) {
    each_piece(n, threads, [&](int64_t first, int64_t stop) {
        each_vector(first, stop, [&](int64_t i, int m) {
            vf v = get(x + i, m);
            put_bits(bits + i / 8, gt(v, splat(0)), m);
            put(y + i, select(le(v, splat(0)), splat(0), v), m);
        });
    });
}
template <class T> static void masked(const T* x, const uint8_t* bits, float scale, T* y, int64_t n, int threads) {
    each_piece(n, threads, [&](int64_t first, int64_t stop) {
        each_vector(first, stop, [&](int64_t i, int m) {
            put(y + i, select(get_bits(bits + i / 8, m), get(x + i, m) * splat(scale), splat(0)), m);
        });
    });
}
template <class T> static void dropout(const T* x, uint64_t key, uint64_t below, float scale, T* y, int64_t n, int threads) {
    each_piece(n, threads, [&](int64_t first, int64_t stop) {
        Words words(row_key(key, (uint64_t)first, 0), (uint32_t)first);
        each_vector(first, stop, [&](int64_t i, int m) {
            vf drawn = as_f((vu)(words.next() >= splat_u((uint32_t)below)) & as_u(get(x + i, m) * splat(scale)));
            put(y + i, drawn, m);
        });
    });
}
extern "C" void pack_bits(const uint8_t* flags, uint8_t* bits, int64_t n, int threads) {
    each_piece(n, threads, [&](int64_t first, int64_t stop) {
        for (int64_t i = first; i < stop; i += 8) {
            uint8_t byte = 0;
            for (int k = 0; k < 8 && i + k < stop; k++) byte |= (uint8_t)((flags[i + k] != 0) << k);
            bits[i / 8] = byte;
        }
    });
}
extern "C" void unpack_bits(const uint8_t* bits, uint8_t* flags, int64_t n, int threads) {
    each_piece(n, threads, [&](int64_t first, int64_t stop) {
        for (int64_t i = first; i < stop; i++) flags[i] = (bits[i / 8] >> (i % 8)) & 1;
    });
}

#define LAYERS(NAME, T)                                                                                              \
    extern "C" void gated_forward_##NAME(int kind, const T* gate, const T* up, T* out, int64_t n, int threads) {     \
        auto run = kind == 0 ? gated_forward<0, T> : kind == 1 ? gated_forward<1, T> : gated_forward<2, T>;          \
        run(gate, up, out, n, threads);                                                                              \
    }                                                                                                                \
    extern "C" void gated_backward_##NAME(int kind, const T* of_out, const T* gate, const T* up, T* of_gate,         \
                                          T* of_up, int64_t n, int threads) {                                        \
        auto run = kind == 0 ? gated_backward<0, T> : kind == 1 ? gated_backward<1, T> : gated_backward<2, T>;       \
        run(of_out, gate, up, of_gate, of_up, n, threads);                                                           \
    }                                                                                                                \
    extern "C" void norm_forward_##NAME(const Norm* a, const T* x, T* y) { norm_forward(*a, x, y); }                 \
    extern "C" void norm_backward_##NAME(const Norm* a, const T* of_y, const T* kept, int kept_output, T* of_x,      \
                                         double* sums, float* few) {                                                 \
        norm_backward(*a, of_y, kept, kept_output != 0, of_x, sums, few);                                            \
    }                                                                                                                \
    extern "C" void relu_##NAME(const T* x, T* y, uint8_t* bits, int64_t n, int threads) {                           \
        relu(x, y, bits, n, threads);                                                                                \
    }                                                                                                                \
    extern "C" void masked_##NAME(const T* x, const uint8_t* bits, float scale, T* y, int64_t n, int threads) {      \
        masked(x, bits, scale, y, n, threads);                                                                       \
    }                                                                                                                \
    extern "C" void dropout_##NAME(const T* x, uint64_t key, uint64_t below, float scale, T* y, int64_t n,           \
                                   int threads) {                                                                    \
        dropout(x, key, below, scale, y, n, threads);                                                                \
    }
LAYERS(float, float)
LAYERS(bf16, bf16)
LAYERS(f16, f16)
