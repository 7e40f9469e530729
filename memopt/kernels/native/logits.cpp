// Softmax statistics of a chunk of logits, and its softmax gradient in place. Needs exponentials.hpp before it.
//
// Letters: R rows, V vocabulary entries; x stored logits, z = cap(scale * (x + bias)) final logits, q soft targets.
// Rows go to threads; a row is walked in blocks that stay in the first-level cache. All arithmetic is in float,
// sums over a row are kept per block in float and over blocks in double.

namespace {

struct Transform {  // z = cap * tanh(scale * (x + bias) / cap); cap 0 means none
    const float* bias;
    float scale, cap;
};

// Raw and final logits of one block. A short last block is filled up with final logits of minus infinity, whose
// exponentials are zero, so that the loops over exponentials have a constant length.
template <class Io>
inline void load_block(const typename Io::Stored* __restrict x, int64_t count, int64_t first, const Transform& how,
                       float* __restrict raw, float* __restrict z) {
    for (int64_t i = 0; i < count; ++i) raw[i] = Io::load(x[first + i]);
    for (int64_t i = count; i < BLOCK; ++i) raw[i] = 0.0f;
    if (how.bias != nullptr)
        for (int64_t i = 0; i < count; ++i) raw[i] += how.bias[first + i];
    for (int64_t i = 0; i < BLOCK; ++i) z[i] = raw[i] * how.scale;
    if (how.cap > 0.0f) {
        const float inverse = 1.0f / how.cap;
        for (int64_t i = 0; i < BLOCK; ++i) z[i] = how.cap * hyperbolic_tangent(z[i] * inverse);
    }
    for (int64_t i = count; i < BLOCK; ++i) z[i] = NEGATIVE_INFINITY;
}

// Four partial results each, so that an operation need not wait for the one before it.
constexpr int64_t PART = BLOCK / 4;

inline float larger(float a, float b) { return a > b ? a : b; }

inline float largest(const float* __restrict z) {
    float a = NEGATIVE_INFINITY, b = a, c = a, d = a;
#pragma omp simd reduction(max : a, b, c, d)
    for (int64_t i = 0; i < PART; ++i) {
        a = larger(z[i], a);
        b = larger(z[i + PART], b);
        c = larger(z[i + 2 * PART], c);
        d = larger(z[i + 3 * PART], d);
    }
    return larger(larger(a, b), larger(c, d));
}

// e = exp(z - reference), and its sum.
inline float exponentials(const float* __restrict z, float reference, float* __restrict e) {
    for (int64_t i = 0; i < BLOCK; ++i) e[i] = exponential(z[i] - reference);
    float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
#pragma omp simd reduction(+ : a, b, c, d)
    for (int64_t i = 0; i < PART; ++i) {
        a += e[i];
        b += e[i + PART];
        c += e[i + 2 * PART];
        d += e[i + 3 * PART];
    }
    return (a + b) + (c + d);
}

struct RowInputs {
    int64_t V;
    Transform how;
    const float* class_weight;  // null for ones
    const float* soft;          // this row's target probabilities, or null
    int64_t target;             // outside [0, V) for none
};

template <class Io>
void statistics_of_row(const typename Io::Stored* x, const RowInputs& row, bool want_weighted, bool want_expected,
                       float* out, int64_t stride, int64_t* argmax) {
    alignas(64) float raw[BLOCK], z[BLOCK], e[BLOCK];
    float highest = NEGATIVE_INFINITY, target_logit = 0.0f;
    double sum = 0.0, expected = 0.0, weighted = 0.0;
    int64_t best = 0;
    for (int64_t first = 0; first < row.V; first += BLOCK) {
        const int64_t count = row.V - first < BLOCK ? row.V - first : BLOCK;
        load_block<Io>(x, count, first, row.how, raw, z);
        if (row.target >= first && row.target < first + count) target_logit = z[row.target - first];
        const float block_highest = largest(z);
        if (block_highest > highest) {
            const double shrink = highest == NEGATIVE_INFINITY ? 0.0 : std::exp(double(highest) - double(block_highest));
            if (shrink > 0.0) expected = shrink * (expected + sum * (double(highest) - double(block_highest)));
            sum *= shrink;
            highest = block_highest;
            best = first;
            while (z[best - first] != highest) ++best;
        }
        const float reference = highest == NEGATIVE_INFINITY ? 0.0f : highest;
        sum += exponentials(z, reference, e);
        float block_expected = 0.0f, block_weighted = 0.0f;
        if (want_expected) {
#pragma omp simd reduction(+ : block_expected)
            for (int64_t i = 0; i < BLOCK; ++i) block_expected += e[i] == 0.0f ? 0.0f : e[i] * (z[i] - reference);
            expected += block_expected;
        }
        if (want_weighted) {
            if (row.class_weight != nullptr)
                for (int64_t i = 0; i < count; ++i) z[i] *= row.class_weight[first + i];
            if (row.soft != nullptr)
                for (int64_t i = 0; i < count; ++i) z[i] *= row.soft[first + i];
#pragma omp simd reduction(+ : block_weighted)
            for (int64_t i = 0; i < count; ++i) block_weighted += z[i];
            weighted += block_weighted;
        }
    }
    out[0 * stride] = highest;
    out[1 * stride] = static_cast<float>(sum);
    out[2 * stride] = static_cast<float>(expected);
    out[3 * stride] = target_logit;
    out[4 * stride] = static_cast<float>(weighted);
    *argmax = best;
}

struct RowCoefficients {
    float lse, of_softmax, of_target, of_uniform;
};

template <class Io>
float gradient_of_row(typename Io::Stored* __restrict x, const RowInputs& row, const RowCoefficients& by,
                      bool want_scale) {
    alignas(64) float raw[BLOCK], z[BLOCK], d[BLOCK];
    double scale_gradient = 0.0;
    const float inverse = row.how.cap > 0.0f ? 1.0f / row.how.cap : 0.0f;
    for (int64_t first = 0; first < row.V; first += BLOCK) {
        const int64_t count = row.V - first < BLOCK ? row.V - first : BLOCK;
        load_block<Io>(x, count, first, row.how, raw, z);
        for (int64_t i = 0; i < BLOCK; ++i) d[i] = by.of_softmax * exponential(z[i] - by.lse);
        if (by.of_uniform != 0.0f) {
            if (row.class_weight != nullptr)
                for (int64_t i = 0; i < count; ++i) d[i] -= by.of_uniform * row.class_weight[first + i];
            else
                for (int64_t i = 0; i < BLOCK; ++i) d[i] -= by.of_uniform;
        }
        if (row.soft != nullptr) {
            if (row.class_weight != nullptr)
                for (int64_t i = 0; i < count; ++i)
                    d[i] -= by.of_target * row.class_weight[first + i] * row.soft[first + i];
            else
                for (int64_t i = 0; i < count; ++i) d[i] -= by.of_target * row.soft[first + i];
        } else if (row.target >= first && row.target < first + count) {
            d[row.target - first] -= by.of_target;
        }
        if (row.how.cap > 0.0f)
            for (int64_t i = 0; i < count; ++i) {
                const float ratio = z[i] * inverse;
                d[i] *= 1.0f - ratio * ratio;
            }
        if (want_scale) {
            float block_scale = 0.0f;
#pragma omp simd reduction(+ : block_scale)
            for (int64_t i = 0; i < count; ++i) block_scale += d[i] * raw[i];
            scale_gradient += block_scale;
        }
        for (int64_t i = 0; i < BLOCK; ++i) d[i] *= row.how.scale;
        for (int64_t i = 0; i < count; ++i) x[first + i] = Io::store(d[i]);
    }
    return static_cast<float>(scale_gradient);
}

}  // namespace

// dtype: 0 float32, 1 bfloat16. Strides are in elements. `target` or `soft` may be null; a target outside [0, V) belongs
// to no entry here. `out` is (5, R): maximum, sum of exp(z - maximum), sum of exp(z - maximum) * (z - maximum), target logit, sum of
// weight * soft * z. Returns 0, or 1 for a dtype it does not know.
extern "C" int memopt_logit_statistics(int dtype, const void* x, int64_t x_stride, int64_t R, int64_t V,
                                       const float* bias, float scale, float cap, const float* class_weight,
                                       const float* soft, int64_t soft_stride, const int64_t* target,
                                       int want_weighted, int want_expected, float* out, int64_t* argmax,
                                       int threads) {
    if (dtype != 0 && dtype != 1) return 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < R; ++r) {
        const RowInputs row{V, Transform{bias, scale, cap}, class_weight, soft == nullptr ? nullptr : soft + r * soft_stride,
                            target == nullptr ? -1 : target[r]};
        if (dtype == 0)
            statistics_of_row<Float32>(static_cast<const float*>(x) + r * x_stride, row, want_weighted, want_expected,
                                       out + r, R, argmax + r);
        else
            statistics_of_row<BFloat16>(static_cast<const uint16_t*>(x) + r * x_stride, row, want_weighted,
                                        want_expected, out + r, R, argmax + r);
    }
    return 0;
}

// Replaces x by the gradient of sum over rows of of_softmax * lse - of_target * (target logit) - of_uniform * sum(w z)
// with respect to x; `coefficients` is (4, R): lse, of_softmax, of_target, of_uniform. `scale_gradient` is (R) or null.
extern "C" int memopt_softmax_gradient(int dtype, void* x, int64_t x_stride, int64_t R, int64_t V, const float* bias,
                                       float scale, float cap, const float* class_weight, const float* soft,
                                       int64_t soft_stride, const int64_t* target, const float* coefficients,
                                       float* scale_gradient, int threads) {
    if (dtype != 0 && dtype != 1) return 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < R; ++r) {
        const RowInputs row{V, Transform{bias, scale, cap}, class_weight, soft == nullptr ? nullptr : soft + r * soft_stride,
                            target == nullptr ? -1 : target[r]};
        const RowCoefficients by{coefficients[r], coefficients[R + r], coefficients[2 * R + r], coefficients[3 * R + r]};
        const bool want_scale = scale_gradient != nullptr;
        const float of_scale =
            dtype == 0 ? gradient_of_row<Float32>(static_cast<float*>(x) + r * x_stride, row, by, want_scale)
                       : gradient_of_row<BFloat16>(static_cast<uint16_t*>(x) + r * x_stride, row, by, want_scale);
        if (want_scale) scale_gradient[r] = of_scale;
    }
    return 0;
}
