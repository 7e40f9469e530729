// Quantise and dequantise; generated code defines BLOCK, BITS, NOISY, TOP, N_PARTS, encode_0, decode_0 and scale_parts.
const int HALF = (BLOCK + 1) / 2;
struct Rows {
    int64_t rows, cols, flat;
    uint64_t start, key;
    int threads;
};
struct Place { int64_t row, at; int n; int64_t scale, codes; };

// block number i of the tensor: its row, its place and length in the row, the places of its scale and codes
INLINE Place place_of(const Rows& r, int64_t in_row, int64_t i) {
    int64_t row = i / in_row, k = i % in_row, at = k * BLOCK;
    int n = (int)(k == in_row - 1 ? r.cols - at : BLOCK);
    int64_t codes = BITS == 8 ? row * r.cols + at : row * bytes_in_row(r.cols, in_row, BLOCK) + k * HALF;
    return {row, at, n, i, codes};
}

template <class T> static void quantize_block(const T* x, uint8_t* out, float* scale, int n, uint32_t key, uint32_t index) {
    alignas(64) float buffer[2 * BLOCK + W];
    alignas(64) uint8_t wide[2 * BLOCK + W];
    vu maxima = {};
    int i = 0;
    for (; i + W <= n; i += W) maxima = umax(maxima, magnitude(load(x + i)));
    if (i < n) maxima = umax(maxima, magnitude(load_some(x + i, n - i)));
    Scale s = scale_of(maxima, TOP);
    *scale = s.scale;
    bool careful = s.lift != 1.0f;
    if (__builtin_expect(careful, 0)) {
        for (i = 0; i + W <= n; i += W) store(buffer + i, load(x + i));
        if (i < n) store(buffer + i, load_some(x + i, n - i));
        prepare(buffer, n, s);
    }
    vf inverse = splat(s.inverse);
    uint8_t* codes = BITS == 8 ? out : wide;
    Words words(key, index);
    auto code = [&](vf v) { return encode_0(v, inverse, NOISY ? noise_of(words.next(), 0) : splat(0)); };
    for (i = 0; i + W <= n; i += W) {
        prefetch(x + i + 1024);
        store_codes(codes + i, code(careful ? load(buffer + i) : load(x + i)));
    }
    if (i < n) {
        uint8_t some[W];
        store_codes(some, code(careful ? load(buffer + i) : load_some(x + i, n - i)));
        memcpy(codes + i, some, n - i);
    }
    if (BITS == 4) pack(out, wide, n);
}

template <bool PAST, class T> static void dequantize_block(const uint8_t* in, float scale, T* x, int n) {
    alignas(64) uint8_t wide[2 * BLOCK + W];
    if (BITS == 4) unpack(wide, in, n);
    const uint8_t* codes = BITS == 8 ? in : wide;
    vf c[N_PARTS + 1];
    scale_parts(scale, c);
    int i = 0;
    for (; i + W <= n; i += W) {
        if (BITS == 8) prefetch(in + i + 1024);
        vf value = decode_0(load_codes(codes + i), c);
        if (PAST) stream(x + i, value);
        else store(x + i, value);
    }
    if (i < n) store_some(x + i, decode_0(load_codes_some(codes + i, n - i), c), n - i);
}

template <class F> static void each_block(const Rows& r, F work) {
    int64_t in_row = blocks_in_row(r.cols, r.flat, BLOCK), count = r.rows * in_row;
    int64_t each = r.cols < BLOCK ? r.cols : BLOCK, per = 32768 / each > 0 ? 32768 / each : 1;
#pragma omp parallel for num_threads(r.threads) schedule(dynamic, 1) if (count > per && r.threads > 1)
    for (int64_t first = 0; first < count; first += per) {
        for (int64_t i = first; i < first + per && i < count; i++) work(place_of(r, in_row, i));
        stream_end();
    }
}
template <class T> static void quantize(const Rows& r, const T* x, uint8_t* codes, float* scales) {
    each_block(r, [&](const Place& b) {
        uint64_t row_start = r.start + b.row * r.cols;
        quantize_block(x + b.row * r.cols + b.at, codes + b.codes, scales + b.scale, b.n, row_key(r.key, row_start, 0),
                       (uint32_t)(row_start + b.at));
    });
}
// What is larger than most caches is written past them: a store into a cache would first read the line it overwrites.
template <class T> static void dequantize(const Rows& r, T* x, const uint8_t* codes, const float* scales) {
    bool past = r.rows * r.cols * (int64_t)sizeof(T) >= (int64_t)32 << 20;
    each_block(r, [&](const Place& b) {
        T* to = x + b.row * r.cols + b.at;
        if (past && (uintptr_t)to % (W * sizeof(T)) == 0) dequantize_block<true>(codes + b.codes, scales[b.scale], to, b.n);
        else dequantize_block<false>(codes + b.codes, scales[b.scale], to, b.n);
    });
}
#define BOTH(NAME, T)                                                                                        \
    extern "C" void quantize_##NAME(Rows r, const T* x, uint8_t* c, float* s) { quantize(r, x, c, s); }      \
    extern "C" void dequantize_##NAME(Rows r, T* x, const uint8_t* c, const float* s) { dequantize(r, x, c, s); }
BOTH(float, float)
BOTH(bf16, bf16)
BOTH(f16, f16)
