// The fused step's frame: what does not depend on the rule. A generated kernel defines N_STATES, N_SUMS, UNIT (elements
// that are whole blocks of every state), TILE and one_tile(), and includes this text after them.
struct Stored {
    uint8_t* data;      // codes, or the plain state
    float* scales;      // null for a plain state
};
struct Task {           // one parameter; all fields are 8 bytes wide
    int64_t rows, cols, flat;
    uint64_t start;     // global index of the first element
    uint64_t key;       // the parameter's number; while it is worked on, with seed and step mixed in
    char* param;
    const char* grad;
    Stored state[N_STATES ? N_STATES : 1];
};

// Rows of whole blocks are one long row, but for words whose index passes 2**32.
static Task joined(Task t) {
    uint64_t last = t.start + (uint64_t)(t.rows * t.cols) - 1;
    if (t.rows > 1 && t.cols % UNIT == 0 && t.start >> 32 == last >> 32) t.cols *= t.rows, t.rows = 1, t.flat = 1;
    return t;
}

INLINE int64_t blocks_in_row(const Task& t, int64_t block) { return blocks_in_row(t.cols, t.flat, block); }
INLINE vf first_lanes(vf x, int n) { return as_f(as_u(x) & (vu)(lanes() < splat_u((uint32_t)n))); }

// The values of a block's 4-bit codes, whatever the higher bits: a table of 16 where a permute finds them, else computed.
template <class D> struct Nibbles {
#if MEMOPT_AVX512
    vf values;
    explicit Nibbles(D decode) : values(decode(to_float((vi)lanes()))) {}
    inline __attribute__((always_inline)) vf operator()(vi code) const { return _mm512_permutexvar_ps((__m512i)code, values); }
#else
    D decode;
    explicit Nibbles(D decode) : decode(decode) {}
    inline __attribute__((always_inline)) vf operator()(vi code) const { return decode(to_float(code & 15)); }
#endif
};
template <class D> INLINE Nibbles<D> nibbles(D decode) { return Nibbles<D>(decode); }

// N numbers whose places repeat: those of the elements that follow the last N take theirs.
template <int N> struct Ring {
    float* first;
    inline __attribute__((always_inline)) float* operator+(int j) const { return first + (j & (N - 1)); }
};

// Elements with a new value that is no number start anew, in all their encoded states: zeros, which raise no scale.
static __attribute__((noinline, cold)) void start_anew(float* const* states, int count, int n) {
    for (int i = 0; i < n; i++) {
        bool sound = true;
        for (int j = 0; j < count; j++) sound &= std::isfinite(states[j][i]);
        for (int j = 0; j < count && !sound; j++) states[j][i] = 0;
    }
}
// The scale of a block whose values were changed, or are tiny and have to be made larger.
static __attribute__((noinline, cold)) Scale scale_again(float* values, int n, float unit) {
    vu maxima = {};
    for (int i = 0; i < n; i++) maxima = umax(maxima, magnitude(splat(values[i])));
    Scale s = scale_of(maxima, unit);
    prepare(values, n, s);
    return s;
}

static void one_tile(const Task& t, int64_t row, int64_t col, int n, const float* uniforms, double* sums);

// sums: one row of N_SUMS doubles for every task; step_key: from seed and step
extern "C" void run(const Task* tasks, int64_t count, const float* uniforms, double* sums, uint64_t step_key, int threads) {
    // Elements in one piece of work. The longer, the less often streams from memory begin anew; 64 pieces keep threads
    // busy. Sums are added up by pieces, which must be the same whatever else the call holds.
    const int64_t SHORT = 32768, LONG = 8 * SHORT;
    int64_t aim = 0;
    for (int64_t i = 0; i < count; i++) aim += tasks[i].rows * tasks[i].cols / 64;
    aim = N_SUMS || aim < SHORT ? SHORT : aim > LONG ? LONG : aim;
    int64_t* first = new int64_t[count + 1];
    first[0] = 0;
    for (int64_t i = 0; i < count; i++) {
        const Task t = joined(tasks[i]);
        int64_t tiles = t.rows * blocks_in_row(t, TILE), each = t.cols < TILE ? t.cols : TILE;
        int64_t per = aim / each > 0 ? aim / each : 1;
        first[i + 1] = first[i] + (tiles + per - 1) / per;
    }
    int64_t pieces = first[count];
    double* partial = N_SUMS ? new double[pieces * N_SUMS + 1]() : nullptr;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (pieces > 1 && threads > 1)
    for (int64_t piece = 0; piece < pieces; piece++) {
        int64_t low = 0, high = count;  // the task with first[low] <= piece < first[low + 1]
        while (high - low > 1) {
            int64_t middle = (low + high) / 2;
            (first[middle] <= piece ? low : high) = middle;
        }
        while (first[low + 1] <= piece) low++;
        Task t = joined(tasks[low]);
        t.key = mix64(step_key ^ t.key);
        int64_t in_row = blocks_in_row(t, TILE), each = t.cols < TILE ? t.cols : TILE;
        int64_t per = aim / each > 0 ? aim / each : 1, tiles = t.rows * in_row;
        int64_t begin = (piece - first[low]) * per, end = begin + per < tiles ? begin + per : tiles;
        for (int64_t tile = begin; tile < end; tile++) {
            int64_t row = tile / in_row, index = tile % in_row, col = index * TILE;
            int n = (int)(index == in_row - 1 ? t.cols - col : TILE);
            one_tile(t, row, col, n, uniforms, partial + piece * N_SUMS);
        }
    }
    for (int64_t i = 0; i < count && N_SUMS; i++)
        for (int k = 0; k < N_SUMS; k++) {
            sums[i * N_SUMS + k] = 0;
            for (int64_t piece = first[i]; piece < first[i + 1]; piece++) sums[i * N_SUMS + k] += partial[piece * N_SUMS + k];
        }
    delete[] first;
    delete[] partial;
}
