// Column statistics and the two-sided softmax gradient of a chunk of a similarity matrix. Needs exponentials.hpp.
//
// Letters: R rows (queries) and C columns (keys) of the chunk; x similarities, z = scale * x. Columns, or rows, go to
// threads; all arithmetic is in float.

namespace {

template <class Io>
void columns_of_block(const typename Io::Stored* x, int64_t x_stride, int64_t R, int64_t count, float scale,
                      float* highest, float* sum) {
    alignas(64) float top[BLOCK], total[BLOCK];
    for (int64_t i = 0; i < count; ++i) top[i] = highest[i];
    for (int64_t r = 0; r < R; ++r) {
        const typename Io::Stored* row = x + r * x_stride;
        for (int64_t i = 0; i < count; ++i) {
            const float z = scale * Io::load(row[i]);
            top[i] = z > top[i] ? z : top[i];
        }
    }
    for (int64_t i = 0; i < count; ++i) {
        const float shrink = highest[i] == NEGATIVE_INFINITY ? 0.0f : exponential(highest[i] - top[i]);
        total[i] = sum[i] * shrink;
        highest[i] = top[i];
    }
    for (int64_t r = 0; r < R; ++r) {
        const typename Io::Stored* row = x + r * x_stride;
        for (int64_t i = 0; i < count; ++i) total[i] += exponential(scale * Io::load(row[i]) - top[i]);
    }
    for (int64_t i = 0; i < count; ++i) sum[i] = total[i];
}

template <class Io>
double pair_gradient_of_row(typename Io::Stored* __restrict x, int64_t C, float row_highest, float row_weight,
                            const float* __restrict highest, const float* __restrict weight, int64_t target,
                            float coefficient, float scale) {
    alignas(64) float raw[BLOCK], d[BLOCK];
    double of_scale = 0.0;
    for (int64_t first = 0; first < C; first += BLOCK) {
        const int64_t count = C - first < BLOCK ? C - first : BLOCK;
        for (int64_t i = 0; i < count; ++i) raw[i] = Io::load(x[first + i]);
        for (int64_t i = 0; i < count; ++i) {
            const float z = scale * raw[i];
            d[i] = row_weight * exponential(z - row_highest) + weight[first + i] * exponential(z - highest[first + i]);
        }
        if (target >= first && target < first + count) d[target - first] -= 2.0f * coefficient;
        float block_scale = 0.0f;
#pragma omp simd reduction(+ : block_scale)
        for (int64_t i = 0; i < count; ++i) block_scale += d[i] * raw[i];
        of_scale += block_scale;
        for (int64_t i = 0; i < count; ++i) x[first + i] = Io::store(scale * d[i]);
    }
    return of_scale;
}

}  // namespace

// dtype: 0 float32, 1 bfloat16. Merges a chunk into (C) running maxima and sums of exp(z - maximum).
extern "C" int memopt_column_statistics(int dtype, const void* x, int64_t x_stride, int64_t R, int64_t C, float scale,
                                        float* highest, float* sum, int threads) {
    if (dtype != 0 && dtype != 1) return 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t first = 0; first < C; first += BLOCK) {
        const int64_t count = C - first < BLOCK ? C - first : BLOCK;
        if (dtype == 0)
            columns_of_block<Float32>(static_cast<const float*>(x) + first, x_stride, R, count, scale, highest + first,
                                      sum + first);
        else
            columns_of_block<BFloat16>(static_cast<const uint16_t*>(x) + first, x_stride, R, count, scale,
                                       highest + first, sum + first);
    }
    return 0;
}

// Replaces x by scale * (row probability + column probability - 2 coefficient [column == target]), a probability being
// weight * exp(z - highest); `rows` is (2, R) and `columns` (2, C): highest and weight. of_scale is (R).
extern "C" int memopt_pair_gradient(int dtype, void* x, int64_t x_stride, int64_t R, int64_t C, const float* rows,
                                    const float* columns, const int64_t* target, float coefficient, float scale,
                                    float* of_scale, int threads) {
    if (dtype != 0 && dtype != 1) return 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < R; ++r) {
        const double sum =
            dtype == 0 ? pair_gradient_of_row<Float32>(static_cast<float*>(x) + r * x_stride, C, rows[r], rows[R + r],
                                                       columns, columns + C, target[r], coefficient, scale)
                       : pair_gradient_of_row<BFloat16>(static_cast<uint16_t*>(x) + r * x_stride, C, rows[r],
                                                        rows[R + r], columns, columns + C, target[r], coefficient,
                                                        scale);
        of_scale[r] = static_cast<float>(sum);
    }
    return 0;
}
