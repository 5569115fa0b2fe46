// Decoding and prompts on a CPU: products with dense and quantised weights, experts, norms, routing, latent attention.
//
// Each function of the last part is called from Python with a pointer to its arguments, 8 bytes each, in the order of
// its struct. Nothing here allocates what the caller sees, and nothing checks: the modules beside this file do.
//
// Products keep one order of summation whatever the number of rows, so that a row's result does not depend on its
// company. Quantised weights meet rows of int16 with one scale each, of which a sum loses less than bfloat16 does.
#include "simd.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

namespace {

template <class F> void parallel(int64_t items, int64_t threads, F run) {
    if (threads <= 1 || items <= 1) {
        for (int64_t i = 0; i < items; i++) run(i);
        return;
    }
#pragma omp parallel for num_threads(int(threads)) schedule(dynamic, 1)
    for (int64_t i = 0; i < items; i++) run(i);
}

// Items of `size` numbers each, of which little is computed, in shares that are worth a thread.
template <class F> void spread(int64_t items, int64_t size, int64_t threads, F run) {
    const int64_t share = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, size));
    parallel((items + share - 1) / share, threads, [&](int64_t i) {
        for (int64_t j = i * share; j < std::min(items, (i + 1) * share); j++) run(j);
    });
}

constexpr int64_t AHEAD = 8192, PAGE = 4096, LINE = 64;  // bytes; AHEAD is how long before its use memory is fetched

int64_t whole_lines(int64_t bytes) { return (bytes + LINE - 1) / LINE * LINE; }

// Memory that lives until the calling thread's next use of the same tag. It begins with a line: a register's load that
// reaches into a second one takes twice as long.
template <class T, int TAG> T* scratch(int64_t size) {
    struct alignas(LINE) Line { char bytes[LINE]; };
    static thread_local std::vector<Line> memory;
    const size_t lines = size_t(whole_lines(size * int64_t(sizeof(T))) / LINE);
    if (memory.size() < lines) memory.resize(lines);
    return reinterpret_cast<T*>(memory.data());
}

// ------------------------------------------------------------------------------------------------ weights and rows

enum Dtype : int64_t { FLOAT32 = 0, BFLOAT16 = 1 };
enum Format : int64_t { HALF = 0, INT8 = 1, INT4 = 2, FULL = 3 };  // dense: bfloat16 and float32

struct Weight {
    const char* data;
    const char* scale;
    const uint8_t* zero;
    int64_t format;
    int64_t group;  // columns that share a scale, of INT4

    // From row `first` of a stack of [.., in] rows on.
    Weight from(int64_t first, int64_t in) const {
        if (format == HALF) return {data + first * in * 2, nullptr, nullptr, format, group};
        if (format == FULL) return {data + first * in * 4, nullptr, nullptr, format, group};
        if (format == INT8) return {data + first * in, scale + first * 4, nullptr, format, group};
        int64_t groups = in / group;
        return {data + first * in / 2, scale + first * groups * 2, zero ? zero + first * groups : nullptr, format, group};
    }
};

// Rows of activations as a format's products take them.
struct Rows {
    const char* data;
    int64_t stride;  // bytes
    const float* scales;
};

inline void fetch(const void* at) { __builtin_prefetch(static_cast<const char*>(at) + AHEAD); }

// Fetches N rows of a weight that are read side by side. A processor foresees by itself how rows are read that lie pages
// apart, but not several within a page: such rows, where each begins at the end of another, are fetched as they lie.
template <int N> class Fetched {
public:
    template <class Row> Fetched(const Row* w, int64_t row_bytes) : whole(row_bytes < PAGE) {
        for (int n = 0; n < N; n++) {
            rows[n] = reinterpret_cast<const char*>(w[n].data);
            whole &= rows[n] == rows[0] + n * row_bytes;
        }
    }

    // Before STEP bytes of each row are read, behind `done` of them. GCC drops calls of what does nothing but this.
    template <int64_t STEP> __attribute__((always_inline)) void ask(int64_t done) const {
        if (N == 1) return;
        if (whole) for (int64_t i = 0; i < N * STEP; i += LINE) fetch(rows[0] + N * done + i);
        else for (int n = 0; n < N; n++) fetch(rows[n] + done);
    }

private:
    const char* rows[N];
    bool whole;
};

// Fills in a format's sums of M rows of `in` numbers with N of a weight. A single row meets those of the weight one after
// the other, for memory is read fastest as it lies, unless sums of a single row are slower than memory, or it is too
// short to fill the processor's pipeline, or the row of x is to stay in the first-level cache and cannot.
template <class F, int M, int N, class T>
void set_sums(T (&sums)[M][N], const char* const* x, const typename F::Row* w, int64_t in, int64_t x_bytes) {
    constexpr bool is_fast = F::CHAINS * int64_t(sizeof(T)) >= LINE;
    if (M > 1 || N == 1 || !is_fast || in < 16 * F::STEP || x_bytes > 1 << 14) return F::set_sums(sums, x, w, in);
    for (int n = 0; n < N; n++) {
        T one[1][1];
        F::set_sums(one, x, w + n, in);
        sums[0][n] = one[0][0];
    }
}

template <class T> struct Dense {
    static constexpr int ROWS = ROWS_AT_ONCE, CHAINS = 1;  // of sums, of a single row with another
    static constexpr int64_t STEP = sizeof(Floats) / sizeof(T);
    struct Row { const T* data; };
    static Row row(const Weight& w, int64_t n, int64_t in) { return {reinterpret_cast<const T*>(w.data) + n * in}; }

    template <int M, int N>
    static void tile(const char* const* x, const float*, const Row* w, int64_t in, int64_t, float* const* out) {
        Floats sums[M][N];
        ::set_sums<Dense>(sums, x, w, in, in * int64_t(sizeof(T)));
        for (int m = 0; m < M; m++) store_sums(sums[m], out[m]);
    }

    template <int M, int N>
    static void set_sums(Floats (&found)[M][N], const char* const* x, const Row* w, int64_t in) {
        const Fetched<N> rows(w, in * int64_t(sizeof(T)));
        Floats sums[M][N];
        for (auto& row : sums) for (auto& each : row) each = zeros();
        auto add_part = [&](auto part, int64_t i, auto... count) {
            decltype(part_of<part>(operands(w->data))) b[N];
            for (int n = 0; n < N; n++) b[n] = part_of<part>(operands(w[n].data + i, count...));
            for (int m = 0; m < M; m++) {
                auto a = part_of<part>(operands(reinterpret_cast<const T*>(x[m]) + i, count...));
                for (int n = 0; n < N; n++) sums[m][n] = dot(sums[m][n], a, b[n]);
            }
        };
        auto add = [&](int64_t i, auto... count) {
            add_part(std::integral_constant<int, 0>{}, i, count...);
            if constexpr (PARTS<T> == 2) add_part(std::integral_constant<int, 1>{}, i, count...);
        };
        int64_t i = 0;
        for (; i + STEP <= in; i += STEP) {
            rows.template ask<sizeof(Floats)>(i * int64_t(sizeof(T)));
            add(i);
        }
        if (i < in) add(i, in - i);
        std::memcpy(found, sums, sizeof(sums));
    }
};

struct Int8 {
    static constexpr int ROWS = ROWS_AT_ONCE, CHAINS = 4;  // whole numbers may be added in any order
    static constexpr int64_t STEP = 2 * LANES;
    struct Row { const int8_t* data; float scale; };
    static Row row(const Weight& w, int64_t n, int64_t in) {
        return {reinterpret_cast<const int8_t*>(w.data) + n * in, reinterpret_cast<const float*>(w.scale)[n]};
    }

    template <int M, int N>
    static void tile(const char* const* x, const float* scales, const Row* w, int64_t in, int64_t, float* const* out) {
        Ints sums[M][N];
        ::set_sums<Int8>(sums, x, w, in, in * 2);
        for (int m = 0; m < M; m++) {
            Floats wide[N];
            for (int n = 0; n < N; n++) wide[n] = to_floats(sums[m][n]);
            store_sums(wide, out[m]);
            for (int n = 0; n < N; n++) out[m][n] *= scales[m] * w[n].scale;
        }
    }

    template <int M, int N> static void set_sums(Ints (&found)[M][N], const char* const* x, const Row* w, int64_t in) {
        constexpr int MANY = M * N == 1 ? CHAINS : 1;
        const Fetched<N> rows(w, in);
        Ints sums[MANY][M][N];
        for (auto& chain : sums) for (auto& row : chain) for (auto& each : row) each = no_ints();
        auto add = [&](int chain, int64_t i, auto... count) {
            Ints b[N];
            for (int n = 0; n < N; n++) b[n] = load_bytes(w[n].data + i, count...);
            for (int m = 0; m < M; m++) {
                Ints a = load_shorts(reinterpret_cast<const int16_t*>(x[m]) + i, count...);
                for (int n = 0; n < N; n++) sums[chain][m][n] = dot(sums[chain][m][n], a, b[n]);
            }
        };
        int64_t i = 0;
        for (; i + MANY * STEP <= in; i += MANY * STEP) {
            rows.template ask<MANY * STEP>(i);
            for (int chain = 0; chain < MANY; chain++) add(chain, i + chain * STEP);
        }
        for (; i < in; i += STEP)
            if (i + STEP <= in) add(0, i);
            else add(0, i, in - i);
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++) {
                found[m][n] = sums[0][m][n];
                for (int chain = 1; chain < MANY; chain++) found[m][n] = plus(found[m][n], sums[chain][m][n]);
            }
    }
};

// Rows that meet INT4 lie as words of four nibbles come apart: in chunks, of which every fourth number comes first, from
// the first on, then every fourth from the second on, and so forth. Behind them are the sums of the chunks, negative, of
// which a weight's zeros are taken.
int64_t chunk_of(int64_t group) {
    for (int64_t chunk : {8 * LANES, 4 * LANES})
        if (group % chunk == 0) return chunk;
    return 32;
}

struct Int4 {
    static constexpr int ROWS = ROWS_AT_ONCE;
    struct Row { const uint8_t* data; const bf16* scale; const uint8_t* zero; };
    static Row row(const Weight& w, int64_t n, int64_t in) {
        int64_t groups = in / w.group;
        return {reinterpret_cast<const uint8_t*>(w.data) + n * in / 2, reinterpret_cast<const bf16*>(w.scale) + n * groups,
                w.zero ? w.zero + n * groups : nullptr};
    }

    template <int M, int N>
    static void tile(const char* const* x, const float* scales, const Row* w, int64_t in, int64_t group, float* const* out) {
        // rows of the weight that share what is loaded of several rows of x
        constexpr int SIDE = M > 1 && N % 2 == 0 && LANES == 16 ? 2 : 1;
        Floats sums[M][N];
        for (int n = 0; n < N; n += SIDE) {
            Floats part[M][SIDE];
            if (chunk_of(group) == 8 * LANES) set_sums(part, x, w + n, in, group);
            else set_sums(part, x, w + n, in, group, chunk_of(group) / 4);
            for (int m = 0; m < M; m++)
                for (int side = 0; side < SIDE; side++) sums[m][n + side] = part[m][side];
        }
        for (int m = 0; m < M; m++) {
            store_sums(sums[m], out[m]);
            for (int n = 0; n < N; n++) out[m][n] *= scales[m];
        }
    }

    template <int M, int N, class... Count>
    static void set_sums(Floats (&found)[M][N], const char* const* x, const Row* w, int64_t in, int64_t group,
                         Count... count) {
        const int64_t chunk = chunk_of(group), words = chunk / 4;
        const Fetched<N> rows(w, in / 2);
        int64_t g = 0, rest = group;
        Floats sums[M][N];
        for (auto& row : sums) for (auto& each : row) each = zeros();
        for (int64_t i = 0, c = 0; i < in; i += chunk, c++) {
            rows.template ask<4 * LANES>(i / 2);
            Ints b[N][4], part[M][N];
            for (int n = 0; n < N; n++) {
                Ints four = load_shorts(reinterpret_cast<const int16_t*>(w[n].data + i / 2), count...);
                b[n][0] = nibbles<0>(four), b[n][1] = nibbles<1>(four);
                b[n][2] = nibbles<2>(four), b[n][3] = nibbles<3>(four);
                const int32_t zero = w[n].zero ? w[n].zero[g] : 8;
                for (int m = 0; m < M; m++)
                    part[m][n] = in_first(zero * reinterpret_cast<const int32_t*>(x[m] + in * 2)[c]);
            }
            for (int m = 0; m < M; m++)
                for (int k = 0; k < 4; k++) {
                    Ints a = load_shorts(reinterpret_cast<const int16_t*>(x[m]) + i + k * words, count...);
                    for (int n = 0; n < N; n++) part[m][n] = dot(part[m][n], a, b[n][k]);
                }
            for (int n = 0; n < N; n++) {
                Floats scale = all(w[n].scale + g);
                for (int m = 0; m < M; m++) sums[m][n] = multiply_add(to_floats(part[m][n]), scale, sums[m][n]);
            }
            if ((rest -= chunk) == 0) g++, rest = group;
        }
        std::memcpy(found, sums, sizeof(sums));
    }
};

// The largest int16 code of a row, such that sums of `in` products with int8 stay within int32 in every lane.
int largest_code(int64_t in) {
    return int(std::min<int64_t>(32767, int64_t(std::numeric_limits<int32_t>::max()) * LANES / (127 * in)));
}

template <class T> void quantise(const T* x, int64_t in, Format format, int64_t group, int16_t* out, float* scale) {
    float most = 0;
    bool finite = true;
    for (int64_t i = 0; i < in; i++) {
        float size = std::fabs(widen(x[i]));
        finite &= size <= std::numeric_limits<float>::max();
        most = std::max(most, size);
    }
    float limit = float(largest_code(in));
    float factor = finite && most > 0 ? limit / most : 0;
    *scale = finite ? most / limit : std::numeric_limits<float>::quiet_NaN();
    if (!(factor <= std::numeric_limits<float>::max())) factor = 0, *scale = 0;  // of denormal numbers
    // adding 1.5 * 2^23 rounds to the nearest whole number, ties to even
    auto code = [&](float value) { return int16_t((value * factor + 12582912.0f) - 12582912.0f); };
    if (format == INT8) {
        for (int64_t i = 0; i < in; i++) out[i] = code(widen(x[i]));
        return;
    }
    const int64_t chunk = chunk_of(group), words = chunk / 4;
    int32_t* sums = reinterpret_cast<int32_t*>(out + in);
    for (int64_t c = 0; c < in; c += chunk) {
        for (int64_t k = 0; k < 4; k++)
            for (int64_t j = 0; j < words; j++) out[c + k * words + j] = code(widen(x[c + 4 * j + k]));
        *sums++ = -std::accumulate(out + c, out + c + chunk, int32_t(0));
    }
}

// Bytes of a row of `in` numbers as products with a weight take it.
int64_t row_bytes(const Weight& w, int64_t in) {
    return w.format == FULL ? in * 4 : w.format == INT4 ? whole_lines(in * 2 + in / chunk_of(w.group) * 4) : in * 2;
}

// What products of a format take for `count` rows of `in` numbers; quantised ones lie in scratch memory of the tag.
template <int TAG>
Rows prepared(const char* x, int64_t dtype, int64_t count, int64_t in, const Weight& w, int64_t threads) {
    const int64_t stride = row_bytes(w, in);
    if (w.format == HALF || w.format == FULL) return {x, stride, nullptr};
    const Format format = Format(w.format);
    char* codes = scratch<char, TAG>(count * stride);
    float* scales = scratch<float, TAG>(count);
    parallel(count, count * in < 1 << 15 ? 1 : threads, [&](int64_t r) {
        int16_t* row = reinterpret_cast<int16_t*>(codes + r * stride);
        if (dtype == BFLOAT16)
            quantise(reinterpret_cast<const bf16*>(x) + r * in, in, format, w.group, row, scales + r);
        else
            quantise(reinterpret_cast<const float*>(x) + r * in, in, format, w.group, row, scales + r);
    });
    return {codes, stride, scales};
}

// out[r][c - first] = x[rows[r]] . w[c], for c of [first, last), with `row_of(c)` the row of the weight.
template <class F, int N, class RowOf>
void columns(const Rows& x, const int64_t* rows, int64_t count, int64_t in, int64_t group, int64_t c, RowOf row_of,
             float* out, int64_t stride) {
    typename F::Row w[N];
    for (int n = 0; n < N; n++) w[n] = row_of(c + n);
    const char* at[F::ROWS];
    float* to[F::ROWS];
    float scales[F::ROWS];
    for (int64_t r = 0; r < count; r += F::ROWS) {
        int64_t many = std::min<int64_t>(F::ROWS, count - r);
        for (int64_t m = 0; m < many; m++) {
            int64_t row = rows ? rows[r + m] : r + m;
            at[m] = x.data + row * x.stride;
            to[m] = out + (r + m) * stride;
            scales[m] = x.scales ? x.scales[row] : 1.0f;
        }
        if (many == F::ROWS) F::template tile<F::ROWS, N>(at, scales, w, in, group, to);
        else if (many == 1) F::template tile<1, N>(at, scales, w, in, group, to);
        else if constexpr (F::ROWS > 2) {
            if (many == 2) F::template tile<2, N>(at, scales, w, in, group, to);
            else F::template tile<3, N>(at, scales, w, in, group, to);
        }
    }
}

template <class F, class RowOf>
void product(const Rows& x, const int64_t* rows, int64_t count, int64_t in, int64_t group, int64_t first, int64_t last,
             RowOf row_of, float* out, int64_t stride) {
    // few enough rows to stay in the first-level cache while all columns pass
    int64_t block = std::max<int64_t>(16, (1 << 15) / (2 * in) / 4 * 4);
    for (int64_t r = 0; r < count; r += block) {
        int64_t many = std::min(block, count - r);
        const int64_t* some = rows ? rows + r : nullptr;
        Rows here = rows ? x : Rows{x.data + r * x.stride, x.stride, x.scales ? x.scales + r : nullptr};
        int64_t c = first;
        for (; c + COLUMNS_AT_ONCE <= last; c += COLUMNS_AT_ONCE)
            columns<F, COLUMNS_AT_ONCE>(here, some, many, in, group, c, row_of, out + r * stride + c - first, stride);
        for (; c < last; c++)
            columns<F, 1>(here, some, many, in, group, c, row_of, out + r * stride + c - first, stride);
    }
}

// The same for consecutive rows of a weight of any format.
void product(const Rows& x, const int64_t* rows, int64_t count, int64_t in, const Weight& w, int64_t first, int64_t last,
             float* out, int64_t stride) {
    auto run = [&](auto format) {
        using F = decltype(format);
        product<F>(x, rows, count, in, w.group, first, last, [&](int64_t n) { return F::row(w, n, in); }, out, stride);
    };
    if (w.format == HALF) run(Dense<bf16>{});
    else if (w.format == FULL) run(Dense<float>{});
    else if (w.format == INT8) run(Int8{});
    else run(Int4{});
}

int64_t bytes_of(const Weight& w, int64_t out, int64_t in) {
    return out * in * (w.format == FULL ? 8 : w.format == HALF ? 4 : w.format == INT8 ? 2 : 1) / 2;
}

constexpr int64_t WORTH_A_THREAD = 1 << 16;  // bytes of weights below which a second thread costs more than it brings

// ---------------------------------------------------------------------------------------------------- linear layers

struct LinearArgs {
    const char* x;
    int64_t dtype, rows, out_features, in;
    Weight w;
    const char* bias;
    char* out;
    int64_t threads;
};

template <class T> void linear(const LinearArgs& a) {
    const int64_t width = a.rows > 8 ? 64 : 256;
    int64_t threads = bytes_of(a.w, a.out_features, a.in) < WORTH_A_THREAD ? 1 : a.threads;
    Rows x = prepared<0>(a.x, a.dtype, a.rows, a.in, a.w, threads);
    const T* bias = reinterpret_cast<const T*>(a.bias);
    T* out = reinterpret_cast<T*>(a.out);
    parallel((a.out_features + width - 1) / width, threads, [&](int64_t item) {
        int64_t first = item * width, last = std::min(first + width, a.out_features), n = last - first;
        float* sums = scratch<float, 1>(a.rows * width);
        product(x, nullptr, a.rows, a.in, a.w, first, last, sums, width);
        for (int64_t r = 0; r < a.rows; r++) {
            T* to = out + r * a.out_features + first;
            const float* from = sums + r * width;
            if (bias) for (int64_t c = 0; c < n; c++) put(to + c, from[c] + widen(bias[first + c]));
            else for (int64_t c = 0; c < n; c++) put(to + c, from[c]);
        }
    });
}

// ------------------------------------------------------------------------------- products of many rows, in float32

// out[m][n] = sum_k a[m][k] * b[n][k]. Of `a`, neighbours lie side by side along one axis or the other, so that
// layers' products forward and backward are all of this kind.
struct ProductArgs {
    const float* a;
    int64_t a_row, a_inner;  // strides
    const float* b;
    int64_t b_row, b_inner;  // strides
    float* out;
    int64_t out_row;  // stride
    int64_t adds;     // to what `out` holds
    int64_t rows, columns, inner, threads;
    int64_t rounds;  // to bfloat16 what is multiplied
};

constexpr int64_t INNER = 256;  // numbers of a row after which sums go to memory: blocks of both sides stay in caches
constexpr int64_t PANELS = 10;  // PANEL_ROWS rows each that a thread takes at once, at most

// Rows of one side of a product from some place on; of halves, two neighbours along the inner axis are one number.
template <class T> struct Side {
    const T* at;
    int64_t row, inner;  // strides
};

// sums[m][n] of M rows and V registers of columns; where `a` is ALONG, a row's numbers lie side by side.
template <int M, int V, bool ALONG, class T>
void panel(const T* a, int64_t stride, const T* b, int64_t b_step, int64_t inner, bool first, float* out,
           int64_t out_stride) {
    Floats sums[M][V];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) sums[m][v] = first ? zeros() : load(out + m * out_stride + v * LANES);
    for (int64_t k = 0; k < inner; k++) {
        decltype(load(b)) columns[V];
        for (int v = 0; v < V; v++) columns[v] = load(b + k * b_step + v * LANES);
        for (int m = 0; m < M; m++) {
            auto x = all(ALONG ? a[m * stride + k] : a[k * stride + m]);
            for (int v = 0; v < V; v++) sums[m][v] = multiply_add(x, columns[v], sums[m][v]);
        }
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) store(out + m * out_stride + v * LANES, sums[m][v]);
}

// `valid` columns of V registers, for the first `rows` rows of `a`, up to M at once.
template <int M, int V, bool ALONG, class T>
void panels(Side<T> a, const T* b, int64_t b_step, int64_t rows, int64_t valid, int64_t inner, bool first, float* out,
            int64_t out_row) {
    const int64_t stride = ALONG ? a.row : a.inner;
    float spare[M * V * LANES];
    for (; rows >= M; rows -= M, a.at += M * a.row, out += M * out_row) {
        if (valid == V * LANES) {
            panel<M, V, ALONG>(a.at, stride, b, b_step, inner, first, out, out_row);
            continue;
        }
        for (int m = 0; m < M && !first; m++)
            std::copy(out + m * out_row, out + m * out_row + valid, spare + m * V * LANES);
        panel<M, V, ALONG>(a.at, stride, b, b_step, inner, first, spare, V * LANES);
        for (int m = 0; m < M; m++)
            std::copy(spare + m * V * LANES, spare + m * V * LANES + valid, out + m * out_row);
    }
    if constexpr (M > 1)
        if (rows) panels<M / 2, V, ALONG>(a, b, b_step, rows, valid, inner, first, out, out_row);
}

// A block of the inner axis: all columns of `rows` rows, whose sums begin at `out`.
template <bool ALONG, class T>
void product_block(const ProductArgs& p, Side<T> a, const T* b, int64_t b_step, int64_t rows, int64_t inner, bool first,
                   float* out) {
    for (int64_t c = 0; c < p.columns; c += 2 * LANES) {
        const int64_t left = p.columns - c;
        if (left > LANES)
            panels<PANEL_ROWS, 2, ALONG>(a, b + c, b_step, rows, std::min<int64_t>(left, 2 * LANES), inner, first, out + c,
                                         p.out_row);
        else panels<PANEL_ROWS, 1, ALONG>(a, b + c, b_step, rows, left, inner, first, out + c, p.out_row);
    }
}

template <bool ALONG> void product_rows(const ProductArgs& a, const float* b, int64_t b_step, int64_t first, int64_t last) {
    for (int64_t k = 0; k < a.inner; k += INNER) {
        const Side<float> rows{a.a + first * a.a_row + k * a.a_inner, a.a_row, a.a_inner};
        product_block<ALONG>(a, rows, b + k * b_step, b_step, last - first, std::min(INNER, a.inner - k),
                             k == 0 && !a.adds, a.out + first * a.out_row);
    }
}

// Columns of `b` side by side, and zeros where they do not fill two registers.
const float* side_by_side(const ProductArgs& a, int64_t width) {
    float* out = scratch<float, 11>(width * a.inner);
    spread(width / LANES, LANES * a.inner, a.threads, [&](int64_t block) {
        const int64_t n = block * LANES, many = std::clamp<int64_t>(a.columns - n, 0, LANES);
        const int64_t row = a.b_row, step = a.b_inner, inner = a.inner;
        const float* from = a.b + n * row;
        for (int64_t k = 0; k < inner; k++) {
            float* to = out + k * width + n;
            for (int64_t j = 0; j < many; j++) to[j] = from[j * row + k * step];
            for (int64_t j = many; j < LANES; j++) to[j] = 0;
        }
    });
    return out;
}

// Rows that one thread takes at once, in shares of one size for all threads: gradients of weights have few.
int64_t rows_at_once(const ProductArgs& a) {
    const int64_t threads = std::max<int64_t>(1, a.threads), count = (a.rows + PANEL_ROWS - 1) / PANEL_ROWS;
    const int64_t rounds = (count + PANELS * threads - 1) / (PANELS * threads);
    return PANEL_ROWS * ((count + rounds * threads - 1) / (rounds * threads));
}

void product_of_many(const ProductArgs& a) {
    if (!a.rows) return;
    int64_t width = (a.columns + 2 * LANES - 1) / (2 * LANES) * 2 * LANES, step = a.b_inner;
    const float* b = a.b;
    if (a.b_row != 1 || a.columns % LANES) b = side_by_side(a, width), step = width;
    const int64_t part = rows_at_once(a);
    parallel((a.rows + part - 1) / part, a.threads, [&](int64_t i) {
        int64_t first = i * part, last = std::min(a.rows, first + part);
        if (a.a_inner == 1) product_rows<true>(a, b, step, first, last);
        else product_rows<false>(a, b, step, first, last);
    });
}

#if defined(__AVX512BF16__)
// The same of numbers rounded to bfloat16, and sums in float32. Two neighbours along the inner axis are multiplied by one
// instruction, so they lie side by side; behind the last of an odd number is a zero.

// `count` numbers of a row, in pairs.
void pair_along(const float* x, int64_t count, Pair* out) {
    for (int64_t k = 0; k < count; k += 2 * LANES)
        store(out + k / 2, halves(load(x + k, count - k), load(x + k + LANES, count - k - LANES)), (count + 1 - k) / 2);
}

// Of two rows, what stands in one place of both. `second` may be null, for zeros.
void pair_across(const float* first, const float* second, int64_t count, Pair* out) {
    for (int64_t i = 0; i < count; i += LANES)
        store(out + i, interleaved(load(first + i, count - i), second ? load(second + i, count - i) : zeros()), count - i);
}

// `count` numbers along the inner axis, of `rows` rows that lie side by side along the other.
void pairs_across(const float* x, int64_t inner, int64_t count, int64_t rows, Pair* out, int64_t out_step) {
    for (int64_t k = 0; k < count; k += 2)
        pair_across(x + k * inner, k + 1 < count ? x + (k + 1) * inner : nullptr, rows, out + k / 2 * out_step);
}

// Columns of `b` side by side, in pairs along the inner axis.
const Pair* paired(const ProductArgs& a, int64_t width) {
    const int64_t steps = (a.inner + 1) / 2;
    Pair* out = scratch<Pair, 16>(width * steps);
    if (a.b_row == 1) {
        constexpr int64_t MANY = 32;
        spread((a.inner + MANY - 1) / MANY, MANY * width, a.threads, [&](int64_t i) {
            const int64_t k = i * MANY;
            pairs_across(a.b + k * a.b_inner, a.b_inner, std::min(MANY, a.inner - k), a.columns, out + k / 2 * width, width);
        });
        return out;
    }
    spread((a.columns + LANES - 1) / LANES, LANES * a.inner, a.threads, [&](int64_t block) {
        const int64_t n = block * LANES, many = std::min<int64_t>(LANES, a.columns - n);
        Pair* rows = scratch<Pair, 17>(LANES * steps);
        for (int64_t j = 0; j < many; j++) pair_along(a.b + (n + j) * a.b_row, a.inner, rows + j * steps);
        for (int64_t k = 0; k < steps; k++)
            for (int64_t j = 0; j < many; j++) out[k * width + n + j] = rows[j * steps + k];
    });
    return out;
}

void product_of_halves(const ProductArgs& a) {
    if (!a.rows) return;
    const int64_t width = (a.columns + 2 * LANES - 1) / (2 * LANES) * 2 * LANES, part = rows_at_once(a);
    const Pair* b = paired(a, width);
    parallel((a.rows + part - 1) / part, a.threads, [&](int64_t i) {
        const int64_t row = i * part, rows = std::min(part, a.rows - row);
        Pair* mine = scratch<Pair, 18>(part * INNER / 2);
        for (int64_t k = 0; k < a.inner; k += INNER) {
            const int64_t count = std::min(INNER, a.inner - k), steps = (count + 1) / 2;
            const float* from = a.a + row * a.a_row + k * a.a_inner;
            const bool first = k == 0 && !a.adds;
            float* out = a.out + row * a.out_row;
            if (a.a_inner == 1) {
                for (int64_t r = 0; r < rows; r++) pair_along(from + r * a.a_row, count, mine + r * steps);
                product_block<true>(a, Side<Pair>{mine, steps, 1}, b + k / 2 * width, width, rows, steps, first, out);
            } else {
                pairs_across(from, a.a_inner, count, rows, mine, part);
                product_block<false>(a, Side<Pair>{mine, 1, part}, b + k / 2 * width, width, rows, steps, first, out);
            }
        }
    });
}
#endif

// ---------------------------------------------------------------------------------------------------------- experts

struct ExpertArgs {
    const char* x;
    int64_t dtype, tokens, dim, topk, experts, width;
    const int64_t* ids;
    const float* weights;
    Weight gate_up, down;
    int64_t shared_width;  // 0 without shared experts
    Weight shared_gate, shared_up, shared_down;
    const char* residual;
    char* out;
    int64_t threads;
};

// The tokens of one expert, or of the shared ones.
struct Crowd {
    Weight gate, up, down;
    int64_t width, first, count;  // its copies are first .. first + count - 1
    int64_t hidden, codes;        // where its activations begin, in numbers, and they as `down` takes them, in bytes
};

void make_crowds(const ExpertArgs& a, std::vector<Crowd>& crowds, std::vector<int64_t>& token_of,
                 std::vector<int64_t>& copy_of) {
    std::vector<int64_t> start(size_t(a.experts) + 1, 0);
    auto real = [&](int64_t e) { return e >= 0 && e < a.experts; };
    for (int64_t i = 0; i < a.tokens * a.topk; i++) if (real(a.ids[i])) start[size_t(a.ids[i]) + 1]++;
    for (int64_t e = 0; e < a.experts; e++) start[size_t(e) + 1] += start[size_t(e)];
    int64_t routed = start[size_t(a.experts)], hidden = 0, codes = 0;
    token_of.resize(size_t(routed + (a.shared_width ? a.tokens : 0)));
    copy_of.assign(size_t(a.tokens * a.topk), -1);
    for (int64_t e = 0; e < a.experts; e++) {
        int64_t count = start[size_t(e) + 1] - start[size_t(e)];
        if (!count) continue;
        Weight gate = a.gate_up.from(2 * e * a.width, a.dim), up = a.gate_up.from((2 * e + 1) * a.width, a.dim);
        crowds.push_back({gate, up, a.down.from(e * a.dim, a.width), a.width, start[size_t(e)], count, hidden, codes});
        hidden += count * a.width, codes += count * row_bytes(a.down, a.width);
    }
    for (int64_t i = 0; i < a.tokens * a.topk; i++) {
        if (!real(a.ids[i])) continue;
        int64_t at = start[size_t(a.ids[i])]++;
        token_of[size_t(at)] = i / a.topk;
        copy_of[size_t(i)] = at;
    }
    if (!a.shared_width) return;
    crowds.push_back({a.shared_gate, a.shared_up, a.shared_down, a.shared_width, routed, a.tokens, hidden, codes});
    for (int64_t t = 0; t < a.tokens; t++) token_of[size_t(routed + t)] = t;
}

void activate(const float* gate, const float* up, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i++) out[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

template <class T> void mix_experts(const ExpertArgs& a) {
    std::vector<Crowd> crowds;
    std::vector<int64_t> token_of, copy_of;
    make_crowds(a, crowds, token_of, copy_of);
    int64_t copies = int64_t(token_of.size()), total = 0, bytes = 0, widest = 0, most = 0;
    for (const Crowd& each : crowds) {
        total += each.count * each.width;
        bytes += each.count * row_bytes(each.down, each.width);
        widest = std::max(widest, each.width);
        most = std::max(most, each.count);
    }
    Rows by_format[4] = {};
    for (const Crowd& each : crowds)
        if (!by_format[each.gate.format].data)
            by_format[each.gate.format] =
                each.gate.format == INT4 ? prepared<2>(a.x, a.dtype, a.tokens, a.dim, each.gate, a.threads)
                                         : prepared<0>(a.x, a.dtype, a.tokens, a.dim, each.gate, a.threads);
    float* hidden = scratch<float, 3>(total);
    char* codes = scratch<char, 4>(bytes);
    float* code_scales = scratch<float, 4>(copies);
    float* mixed = scratch<float, 5>(copies * a.dim);

    // gate and up of every copy
    const int64_t part = most > 8 ? 32 : 64, parts = (widest + part - 1) / part;
    parallel(int64_t(crowds.size()) * parts, a.threads, [&](int64_t item) {
        const Crowd& c = crowds[size_t(item / parts)];
        int64_t first = item % parts * part, last = std::min(first + part, c.width), n = last - first;
        if (n <= 0) return;
        float* gate = scratch<float, 1>(c.count * 2 * part);
        float* up = gate + c.count * part;
        const Rows& x = by_format[c.gate.format];
        const int64_t* rows = token_of.data() + c.first;
        product(x, rows, c.count, a.dim, c.gate, first, last, gate, part);
        product(x, rows, c.count, a.dim, c.up, first, last, up, part);
        for (int64_t r = 0; r < c.count; r++)
            activate(gate + r * part, up + r * part, n, hidden + c.hidden + r * c.width + first);
    });
    // as the down projections take them
    parallel(int64_t(crowds.size()), total < 1 << 14 ? 1 : a.threads, [&](int64_t item) {
        const Crowd& c = crowds[size_t(item)];
        for (int64_t r = 0; r < c.count && c.down.format != FULL; r++) {
            const float* from = hidden + c.hidden + r * c.width;
            int16_t* to = reinterpret_cast<int16_t*>(codes + c.codes + r * row_bytes(c.down, c.width));
            if (c.down.format == HALF)
                for (int64_t i = 0; i < c.width; i++) to[i] = int16_t(narrow(from[i]));
            else
                quantise(from, c.width, Format(c.down.format), c.down.group, to, code_scales + c.first + r);
        }
    });
    const int64_t cut = most > 8 ? 64 : 128, cuts = (a.dim + cut - 1) / cut;
    parallel(int64_t(crowds.size()) * cuts, a.threads, [&](int64_t item) {
        const Crowd& c = crowds[size_t(item / cuts)];
        int64_t first = item % cuts * cut, last = std::min(first + cut, a.dim);
        Rows rows{codes + c.codes, row_bytes(c.down, c.width), code_scales + c.first};
        if (c.down.format == HALF) rows.scales = nullptr;
        if (c.down.format == FULL) rows = {reinterpret_cast<const char*>(hidden + c.hidden), c.width * 4, nullptr};
        product(rows, nullptr, c.count, c.width, c.down, first, last, mixed + c.first * a.dim + first, a.dim);
    });
    // the sum of each token's copies
    parallel(a.tokens, a.tokens < 16 ? 1 : a.threads, [&](int64_t t) {
        float* sums = scratch<float, 1>(a.dim);
        std::fill(sums, sums + a.dim, 0.0f);
        auto add = [&](int64_t copy, float weight) {
            const float* from = mixed + copy * a.dim;
            for (int64_t i = 0; i < a.dim; i++) sums[i] += weight * from[i];
        };
        for (int64_t j = 0; j < a.topk; j++)
            if (int64_t copy = copy_of[size_t(t * a.topk + j)]; copy >= 0) add(copy, a.weights[t * a.topk + j]);
        if (a.shared_width) add(copies - a.tokens + t, 1.0f);
        T* out = reinterpret_cast<T*>(a.out) + t * a.dim;
        const T* residual = reinterpret_cast<const T*>(a.residual) + (a.residual ? t * a.dim : 0);
        for (int64_t i = 0; i < a.dim; i++) put(out + i, a.residual ? widen(residual[i]) + sums[i] : sums[i]);
    });
}

// ----------------------------------------------------------------------------------------------------------- router

struct RouteArgs {
    const char* x;
    int64_t x_dtype, tokens, dim, experts;
    const char* weight;
    int64_t weight_dtype;
    const float* bias;
    int64_t softmax, topk, groups, topk_groups, normalize;
    double scale;
    const int64_t* given;
    int64_t trained;          // choices by whose scores the gates are divided, were nothing given
    const int64_t* limits;    // of choices, for each token; null without
    const float* thresholds;  // shares of the best choice's score below which others are dropped; null without
    int64_t* ids;
    float* weights;
    float* scores;
    int64_t threads;
};

template <class X, class W> float inner(const X* x, const W* w, int64_t size) {
    Floats sums = zeros();
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) sums = multiply_add(load(x + i), load(w + i), sums);
    float total = sum(sums);
    for (; i < size; i++) total += widen(x[i]) * widen(w[i]);
    return total;
}

// The place of the largest among those not taken; there is one even among NaN.
int64_t largest(const float* values, const uint8_t* taken, int64_t size) {
    int64_t best = -1;
    for (int64_t i = 0; i < size; i++)
        if (!taken[i] && (best < 0 || values[i] > values[best])) best = i;
    return best;
}

void close_groups(const RouteArgs& a, const float* choice, uint8_t* taken) {
    int64_t size = a.experts / a.groups;
    float* best = scratch<float, 6>(a.groups);
    uint8_t* open = scratch<uint8_t, 7>(a.groups);
    for (int64_t g = 0; g < a.groups; g++) {
        const float* of = choice + g * size;
        float first = of[0], second = -std::numeric_limits<float>::infinity();
        for (int64_t i = 1; i < size; i++) {
            if (of[i] > first) second = first, first = of[i];
            else if (of[i] > second) second = of[i];
        }
        best[g] = a.bias && size > 1 ? first + second : first;
        open[g] = 0;
    }
    for (int64_t i = 0; i < a.topk_groups; i++) open[largest(best, open, a.groups)] = 1;
    for (int64_t e = 0; e < a.experts; e++) taken[e] = !open[e / size];
}

// Leave a token what its limit and its threshold leave of its choices, the best first.
void drop(const RouteArgs& a, int64_t t, const float* scores, int64_t* ids) {
    float best = 0;
    for (int64_t j = 0; j < a.topk; j++) {
        if (a.limits && j >= a.limits[t]) ids[j] = -1;
        else best = std::max(best, scores[ids[j]]);
    }
    for (int64_t j = 0; j < a.topk; j++)
        if (a.thresholds && ids[j] >= 0 && scores[ids[j]] < best * a.thresholds[t]) ids[j] = -1;
}

template <class X, class W> void route_token(const RouteArgs& a, int64_t t) {
    const X* x = reinterpret_cast<const X*>(a.x) + t * a.dim;
    const W* weight = reinterpret_cast<const W*>(a.weight);
    float* scores = a.scores + t * a.experts;
    int64_t* ids = a.ids + t * a.topk;
    float* weights = a.weights + t * a.topk;
    for (int64_t e = 0; e < a.experts; e++) scores[e] = inner(x, weight + e * a.dim, a.dim);
    if (a.softmax) {
        float most = *std::max_element(scores, scores + a.experts), total = 0;
        for (int64_t e = 0; e < a.experts; e++) total += scores[e] = std::exp(scores[e] - most);
        for (int64_t e = 0; e < a.experts; e++) scores[e] /= total;
    } else {
        for (int64_t e = 0; e < a.experts; e++) scores[e] = 1.0f / (1.0f + std::exp(-scores[e]));
    }
    float total = 0;
    if (a.given) {
        std::copy(a.given + t * a.topk, a.given + (t + 1) * a.topk, ids);
        for (int64_t j = 0; j < a.topk; j++) total += ids[j] < 0 ? 0.0f : scores[ids[j]];
    } else {
        float* choice = scratch<float, 8>(a.experts);
        uint8_t* taken = scratch<uint8_t, 9>(a.experts);
        for (int64_t e = 0; e < a.experts; e++) choice[e] = a.bias ? scores[e] + a.bias[e] : scores[e], taken[e] = 0;
        if (a.groups > 1) close_groups(a, choice, taken);
        for (int64_t j = 0; j < std::max(a.topk, a.trained); j++) {
            int64_t e = largest(choice, taken, a.experts);
            taken[e] = 1;
            if (j < a.topk) ids[j] = e;
            if (j < a.trained) total += scores[e];
        }
        drop(a, t, scores, ids);
    }
    float factor = a.normalize ? float(a.scale) / (total + 1e-20f) : float(a.scale);
    for (int64_t j = 0; j < a.topk; j++) weights[j] = ids[j] < 0 ? 0.0f : scores[ids[j]] * factor;
}

// ------------------------------------------------------------------------------------------------------------ norms

struct NormArgs {
    int64_t dtype;
    const char* x;
    const char* delta;  // added first; null without
    const char* weight;
    char* total;
    char* out;
    int64_t rows, dim, out_row;  // the last is a stride
    double eps;
    int64_t threads;
};

template <class T> void norm_row(const T* x, const T* weight, int64_t dim, float eps, T* out) {
    float factor = 1.0f / std::sqrt(inner(x, x, dim) / float(dim) + eps);
    for (int64_t i = 0; i < dim; i++) put(out + i, rounded<T>(widen(x[i]) * factor) * widen(weight[i]));
}

template <class T> void norm(const NormArgs& a) {
    auto row = [&](const char* base, int64_t r) { return reinterpret_cast<const T*>(base) + r * a.dim; };
    spread(a.rows, a.dim, a.threads, [&](int64_t r) {
        const T* x = row(a.x, r);
        if (a.delta) {
            const T* delta = row(a.delta, r);
            T* total = const_cast<T*>(row(a.total, r));
            for (int64_t i = 0; i < a.dim; i++) put(total + i, widen(x[i]) + widen(delta[i]));
            x = total;
        }
        norm_row(x, row(a.weight, 0), a.dim, float(a.eps), reinterpret_cast<T*>(a.out) + r * a.out_row);
    });
}

struct NormBackwardArgs {
    const float* grad;  // of `out`
    const float* x;     // what was normed
    const float* weight;
    const float* added;  // to the gradient of x; null without
    float* grad_x;
    float* shares;  // [blocks, dim]: of the gradient of the weight
    int64_t rows, dim;
    double eps;
    int64_t threads;
};

constexpr int64_t NORM_ROWS = 64;  // of a block, whatever the number of threads

void norm_backward(const NormBackwardArgs& a, int64_t block) {
    const int64_t dim = a.dim;
    const float* weight = a.weight;
    float* share = a.shares + block * dim;
    std::fill(share, share + dim, 0.0f);
    for (int64_t r = block * NORM_ROWS; r < std::min(a.rows, (block + 1) * NORM_ROWS); r++) {
        const float* x = a.x + r * dim;
        const float* grad = a.grad + r * dim;
        float* out = a.grad_x + r * dim;
        const float factor = 1.0f / std::sqrt(inner(x, x, dim) / float(dim) + float(a.eps));
        for (int64_t i = 0; i < dim; i++) out[i] = grad[i] * weight[i];
        const float mean = inner(out, x, dim) * factor / float(dim);
        for (int64_t i = 0; i < dim; i++) {
            float normed = x[i] * factor;
            share[i] += grad[i] * normed;
            out[i] = (out[i] - normed * mean) * factor;
        }
        if (const float* added = a.added ? a.added + r * dim : nullptr)
            for (int64_t i = 0; i < dim; i++) out[i] += added[i];
    }
}

struct SumArgs {
    int64_t dtype;
    const char* x;
    const char* delta;
    char* out;
    int64_t size, threads;
};

template <class T> void sum_of_both(const SumArgs& a) {
    const int64_t part = 1 << 15;
    parallel((a.size + part - 1) / part, a.threads, [&](int64_t i) {
        for (int64_t j = i * part; j < std::min(a.size, (i + 1) * part); j++)
            put(reinterpret_cast<T*>(a.out) + j,
                widen(reinterpret_cast<const T*>(a.x)[j]) + widen(reinterpret_cast<const T*>(a.delta)[j]));
    });
}

// ------------------------------------------------------------------------------------------------- latent attention

// Neighbours 2i and 2i + 1 turned by the angle of their pair.
template <class T> void rotate(const T* x, const float* cos, const float* sin, int64_t half, T* out) {
    for (int64_t i = 0; i < half; i++) {
        float even = widen(x[2 * i]), odd = widen(x[2 * i + 1]);
        put(out + 2 * i, even * cos[i] - odd * sin[i]);
        put(out + 2 * i + 1, even * sin[i] + odd * cos[i]);
    }
}

struct WriteArgs {
    int64_t dtype;
    const char* kv;
    int64_t tokens, latent, rope, kept;  // numbers of the latent; of these the row holds the first `kept`
    const char* weight;
    const float* cos;
    const float* sin;
    double eps;
    char* rows;
    int64_t row_stride;
    const int64_t* slots;
};

template <class T> void write_latent(const WriteArgs& a) {
    T* normed = scratch<T, 0>(a.latent);
    for (int64_t t = 0; t < a.tokens; t++) {
        const T* kv = reinterpret_cast<const T*>(a.kv) + t * (a.latent + a.rope);
        T* row = reinterpret_cast<T*>(a.rows) + a.slots[t] * a.row_stride;
        norm_row(kv, reinterpret_cast<const T*>(a.weight), a.latent, float(a.eps), normed);
        std::copy(normed, normed + a.kept, row);
        int64_t half = a.rope / 2;
        rotate(kv + a.latent, a.cos + t * half, a.sin + t * half, half, row + a.kept);
    }
}

constexpr int TILE = 8, KEYS = 32, SPAN = 32;  // queries, keys and columns at once

// sums[m][c] += sum_j weights[m][j] * rows[j][c], j < count. In bfloat16 rows and weights go two by two: there is one
// more behind an odd count, of weight 0. The order of the columns of `sums` within each whole SPAN is its own; `settled`
// puts them right.
template <int M, class T>
void weighted_rest(const T* const* rows, int64_t count, const T* const* weights, int64_t first, int64_t width, float* sums) {
    for (int m = 0; m < M; m++)
        for (int64_t j = 0; j < count; j++) {
            const float weight = widen(weights[m][j]);
            for (int64_t c = first; c < width; c++) sums[m * width + c] += weight * widen(rows[j][c]);
        }
}

template <int M>
void weighted_rows(const bf16* const* rows, int64_t count, const bf16* const* weights, int64_t width, float* sums) {
    int64_t pairs = (count + 1) / 2;
    auto both = [&](int m, int64_t j) { return reinterpret_cast<const uint32_t*>(weights[m])[j]; };
#if defined(__AVX512BF16__)
    const int64_t whole = width / SPAN * SPAN;
    for (int64_t c = 0; c < whole; c += SPAN) {
        __m512 low[M], high[M];
        for (int m = 0; m < M; m++) low[m] = load(sums + m * width + c), high[m] = load(sums + m * width + c + 16);
        for (int64_t j = 0; j < pairs; j++) {
            __m512i one = operands(rows[2 * j] + c), two = operands(rows[2 * j + 1] + c);
            __m512bh first = (__m512bh)_mm512_unpacklo_epi16(one, two), second = (__m512bh)_mm512_unpackhi_epi16(one, two);
            for (int m = 0; m < M; m++) {
                __m512bh weight = (__m512bh)_mm512_set1_epi32(int(both(m, j)));
                low[m] = _mm512_dpbf16_ps(low[m], first, weight);
                high[m] = _mm512_dpbf16_ps(high[m], second, weight);
            }
        }
        for (int m = 0; m < M; m++) store(sums + m * width + c, low[m]), store(sums + m * width + c + 16, high[m]);
    }
#else
    const int64_t whole = width / LANES * LANES;
    for (int m = 0; m < M; m++)
        for (int64_t j = 0; j < pairs; j++) {
            Floats one = all(widen(bf16(both(m, j)))), two = all(widen(bf16(both(m, j) >> 16)));
            for (int64_t c = 0; c < whole; c += LANES) {
                float* at = sums + m * width + c;
                Floats first = multiply_add(one, load(rows[2 * j] + c), load(at));
                store(at, multiply_add(two, load(rows[2 * j + 1] + c), first));
            }
        }
#endif
    if (whole < width) weighted_rest<M>(rows, count, weights, whole, width, sums);
}

template <int M>
void weighted_rows(const float* const* rows, int64_t count, const float* const* weights, int64_t width, float* sums) {
    int64_t c = 0;
    for (; c + LANES <= width; c += LANES) {
        Floats total[M];
        for (int m = 0; m < M; m++) total[m] = load(sums + m * width + c);
        for (int64_t j = 0; j < count; j++) {
            Floats row = load(rows[j] + c);
            for (int m = 0; m < M; m++) total[m] = multiply_add(row, all(weights[m][j]), total[m]);
        }
        for (int m = 0; m < M; m++) store(sums + m * width + c, total[m]);
    }
    if (c < width) weighted_rest<M>(rows, count, weights, c, width, sums);
}

// Of the first `many` of TILE rows; more may be computed.
template <class T>
void weighted_rows(const T* const* rows, int64_t count, const T* const* weights, int many, int64_t width, float* sums) {
    if (many == 1) weighted_rows<1>(rows, count, weights, width, sums);
    else if (many <= TILE / 2) weighted_rows<TILE / 2>(rows, count, weights, width, sums);
    else weighted_rows<TILE>(rows, count, weights, width, sums);
}

void settled(const float* sums, int64_t width, float factor, float* out) {
    for (int64_t c = 0; c < width; c++) out[c] = sums[c] * factor;
}

void settled(const float* sums, int64_t width, float factor, bf16* out) {
    int64_t c = 0;
#if defined(__AVX512BF16__)
    for (; c + SPAN <= width; c += SPAN)
        for (int lane = 0; lane < 4; lane++)
            for (int i = 0; i < 4; i++) {
                out[c + 8 * lane + i] = narrow(sums[c + 4 * lane + i] * factor);
                out[c + 8 * lane + 4 + i] = narrow(sums[c + 16 + 4 * lane + i] * factor);
            }
#endif
    for (; c < width; c++) out[c] = narrow(sums[c] * factor);
}

struct AbsorbArgs {
    int64_t dtype;
    const char* q;
    int64_t q_token, q_head;  // strides
    int64_t tokens, heads, nope, rope, latent;
    const char* w_uk;
    int64_t w_head, w_row;  // strides
    const float* cos;
    const float* sin;
    char* out;
    int64_t threads;
};

template <class T> void absorb(const AbsorbArgs& a, int64_t head, int64_t first) {
    int many = int(std::min<int64_t>(TILE, a.tokens - first));
    float* sums = scratch<float, 1>(TILE * a.latent);
    std::fill(sums, sums + TILE * a.latent, 0.0f);
    T held[TILE][KEYS];
    const T* weights[TILE];
    for (int m = 0; m < TILE; m++) weights[m] = held[std::min(m, many - 1)];
    auto query = [&](int m) { return reinterpret_cast<const T*>(a.q) + (first + m) * a.q_token + head * a.q_head; };
    for (int64_t j = 0; j < a.nope; j += KEYS) {
        int64_t count = std::min<int64_t>(KEYS, a.nope - j);
        const T* rows[KEYS];
        for (int64_t i = 0; i < KEYS; i++)
            rows[i] = reinterpret_cast<const T*>(a.w_uk) + head * a.w_head + (j + std::min(i, count - 1)) * a.w_row;
        for (int m = 0; m < many; m++) {
            std::copy(query(m) + j, query(m) + j + count, held[m]);
            if (count % 2) held[m][count] = T(0);
        }
        weighted_rows(rows, count, weights, many, a.latent, sums);
    }
    for (int m = 0; m < many; m++) {
        T* out = reinterpret_cast<T*>(a.out) + ((first + m) * a.heads + head) * (a.latent + a.rope);
        settled(sums + m * a.latent, a.latent, 1.0f, out);
        int64_t half = a.rope / 2;
        rotate(query(m) + a.nope, a.cos + (first + m) * half, a.sin + (first + m) * half, half, out + a.latent);
    }
}

struct ProjectArgs {
    int64_t dtype;
    const char* mixed;
    int64_t tokens, heads, latent, v;
    const char* w_uv;
    int64_t w_head, w_row;  // strides
    char* out;
    int64_t threads;
};

template <class T> void project(const ProjectArgs& a, int64_t head) {
    using F = Dense<T>;
    constexpr int64_t SIZE = sizeof(T);
    float* sums = scratch<float, 1>(a.tokens * a.v);
    Rows rows{a.mixed + head * a.latent * SIZE, a.heads * a.latent * SIZE, nullptr};
    const T* weight = reinterpret_cast<const T*>(a.w_uv) + head * a.w_head;
    auto row_of = [&](int64_t n) { return typename F::Row{weight + n * a.w_row}; };
    product<F>(rows, nullptr, a.tokens, a.latent, 0, 0, a.v, row_of, sums, a.v);
    T* out = reinterpret_cast<T*>(a.out) + head * a.v;
    for (int64_t t = 0; t < a.tokens; t++)
        for (int64_t i = 0; i < a.v; i++) put(out + t * a.heads * a.v + i, sums[t * a.v + i]);
}

struct AttentionArgs {
    int64_t dtype;
    const char* q;  // [tokens, heads, key width]
    int64_t heads, key_heads, key_width, value_width;
    const char* rows;
    int64_t row_stride, value_offset;  // of the first head's value in a row; the keys of all heads come first
    int64_t value_stride;              // between the values of neighbouring heads
    const int64_t* tables;
    int64_t table_stride, block_size;
    const int64_t* context_lens;
    const int64_t* cu_seqlens;
    int64_t seqs;
    double scale;
    char* out;  // [tokens, heads, value width]
    int64_t threads;
};

// Up to TILE rows of one sequence and key head; row r is head r % group of the group, of query r / group.
struct Queries {
    int64_t seq, key_head, first;
};

// KEYS scores times `scale`, and the largest of those that are numbers.
float scaled_top(float* scores, float scale) {
    Floats most = all(-std::numeric_limits<float>::infinity());
    for (int i = 0; i < KEYS; i += LANES) {
        Floats each = multiply_add(load(scores + i), all(scale), zeros());
        store(scores + i, each);
        most = larger(each, most);
    }
    float lanes[LANES];
    store(lanes, most);
    return *std::max_element(lanes, lanes + LANES);
}

float sum_of_all(const float* scores) {
    Floats total = zeros();
    for (int i = 0; i < KEYS; i += LANES) total = multiply_add(load(scores + i), all(1.0f), total);
    return sum(total);
}

template <class T> void attend(const AttentionArgs& a, const Queries& tile) {
    int64_t group = a.heads / a.key_heads, begin = a.cu_seqlens[tile.seq];
    int64_t length = a.cu_seqlens[tile.seq + 1] - begin, context = a.context_lens[tile.seq];
    int many = int(std::min<int64_t>(TILE, length * group - tile.first));
    const char* q[TILE];
    T* out[TILE];
    int64_t seen[TILE], most = 0;  // keys that a row sees
    for (int m = 0; m < many; m++) {
        int64_t query = (tile.first + m) / group, head = tile.key_head * group + (tile.first + m) % group;
        int64_t row = (begin + query) * a.heads + head;
        q[m] = a.q + row * a.key_width * int64_t(sizeof(T));
        out[m] = reinterpret_cast<T*>(a.out) + row * a.value_width;
        seen[m] = context - length + query + 1;
        most = std::max(most, seen[m]);
    }
    float* sums = scratch<float, 1>(2 * TILE * a.value_width);  // weighted_rows may write to more rows than it is given
    std::fill(sums, sums + 2 * TILE * a.value_width, 0.0f);
    float best[TILE], total[TILE] = {}, scores[TILE][KEYS];
    T weights[TILE][KEYS] = {};
    const T nothing[KEYS] = {};
    std::fill(best, best + TILE, -std::numeric_limits<float>::infinity());
    const int64_t* table = a.tables + tile.seq * a.table_stride;
    float scale = float(a.scale);
    for (int64_t j = 0; j < most; j += KEYS) {
        int64_t count = std::min<int64_t>(KEYS, most - j);
        typename Dense<T>::Row keys[KEYS];
        const T* values[KEYS];
        int64_t block = j / a.block_size, offset = j % a.block_size;
        for (int64_t i = 0; i < KEYS; i++) {
            if (i < count) {
                const T* row = reinterpret_cast<const T*>(a.rows) + (table[block] * a.block_size + offset) * a.row_stride;
                keys[i].data = row + tile.key_head * a.key_width;
                values[i] = row + a.value_offset + tile.key_head * a.value_stride;
                if (++offset == a.block_size) block++, offset = 0;
            } else {
                keys[i] = keys[i - 1], values[i] = values[i - 1];
            }
        }
        for (int m = 0; m < many; m += ROWS_AT_ONCE) {
            int rest = std::min(ROWS_AT_ONCE, many - m);
            for (int64_t i = 0; i < count; i += COLUMNS_AT_ONCE) {
                float* to[ROWS_AT_ONCE];
                for (int r = 0; r < rest; r++) to[r] = scores[m + r] + i;
                if (rest == ROWS_AT_ONCE)
                    Dense<T>::template tile<ROWS_AT_ONCE, COLUMNS_AT_ONCE>(q + m, nullptr, keys + i, a.key_width, 0, to);
                else
                    for (int r = 0; r < rest; r++)
                        Dense<T>::template tile<1, COLUMNS_AT_ONCE>(q + m + r, nullptr, keys + i, a.key_width, 0, to + r);
            }
        }
        for (int m = 0; m < many; m++) {
            int64_t visible = std::min(count, seen[m] - j);
            if (visible <= 0) {
                std::fill(weights[m], weights[m] + KEYS, T(0));
                continue;
            }
            std::fill(scores[m] + visible, scores[m] + KEYS, -std::numeric_limits<float>::infinity());
            float highest = std::max(best[m], scaled_top(scores[m], scale));
            float shrink = exponential(best[m] - highest);
            for (int64_t i = 0; i < KEYS; i++) scores[m][i] = exponential(scores[m][i] - highest);
            for (int64_t i = 0; i < KEYS; i++) put(weights[m] + i, scores[m][i]);
            best[m] = highest;
            total[m] = total[m] * shrink + sum_of_all(scores[m]);
            if (shrink != 1.0f)
                for (int64_t c = 0; c < a.value_width; c++) sums[m * a.value_width + c] *= shrink;
        }
        // Values of keys that a row does not see may be no numbers, and 0 times them is none: rows that see as many keys
        // go together.
        for (int m = 0, end; m < many; m = end) {
            int64_t visible = std::min(count, seen[m] - j);
            for (end = m + 1; end < many && std::min(count, seen[end] - j) == visible; end++) {}
            if (visible <= 0) continue;
            const T* given[TILE];
            for (int r = 0; r < TILE; r++) given[r] = r < end - m ? weights[m + r] : nothing;
            const T* read[KEYS];
            for (int64_t i = 0; i < KEYS; i++) read[i] = values[std::min(i, visible - 1)];
            weighted_rows(read, visible, given, end - m, a.value_width, sums + m * a.value_width);
        }
    }
    for (int m = 0; m < many; m++) settled(sums + m * a.value_width, a.value_width, 1.0f / total[m], out[m]);
}

// ------------------------------------------------------------------------- attention without a cache, with gradients

struct VarlenArgs {
    const float* q;
    const float* k;
    const float* v;
    int64_t q_token, q_head, k_token, k_head, v_token, v_head;  // strides
    const int64_t* cu_seqlens;
    int64_t seqs, heads, key_heads, width, value_width;
    double scale;
    float* out;  // [tokens, heads, value width]
    float* lse;  // [tokens, heads]: log of the sum of what weights are made of
    int64_t threads;
    const float* grad;  // of `out`, laid out alike
    float* grad_q;      // laid out as [tokens, heads, width]
    float* grad_k;
    float* grad_v;
};

constexpr int64_t BLOCK = 64;  // queries at once

// out = a b, or added to it, of a.rows x inner numbers and inner x columns that lie side by side.
void multiply(const float* a, int64_t a_row, int64_t a_inner, const float* b, int64_t b_step, int64_t rows,
              int64_t columns, int64_t inner, float* out, int64_t out_row, bool adds = false) {
    ProductArgs args{a, a_row, a_inner, b, 1, b_step, out, out_row, adds, rows, columns, inner, 1, 0};
    if (a_inner == 1) product_rows<true>(args, b, b_step, 0, rows);
    else product_rows<false>(args, b, b_step, 0, rows);
}

int64_t whole_registers(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

// Rows of `width` numbers as columns, and zeros behind the last.
template <int TAG> const float* transposed(const float* x, int64_t stride, int64_t rows, int64_t width) {
    int64_t padded = whole_registers(rows);
    float* out = scratch<float, TAG>(width * padded);
    for (int64_t c = 0; c < width; c++) {
        for (int64_t j = 0; j < rows; j++) out[c * padded + j] = x[j * stride + c];
        std::fill(out + c * padded + rows, out + (c + 1) * padded, 0.0f);
    }
    return out;
}

// Scores of one query, `seen` of them, become weights before they are divided by their sum, which is returned; `padded`
// are whole registers, and the weights behind the last are 0.
float weigh(float* scores, int64_t seen, int64_t padded, float scale, float* lse) {
    std::fill(scores + seen, scores + padded, -std::numeric_limits<float>::infinity());
    Floats most = all(-std::numeric_limits<float>::infinity()), total = zeros();
    for (int64_t j = 0; j < padded; j += LANES) {
        Floats scaled = multiply_add(load(scores + j), all(scale), zeros());
        store(scores + j, scaled);
        most = larger(most, scaled);
    }
    float lanes[LANES];
    store(lanes, most);
    float top = *std::max_element(lanes, lanes + LANES);
    for (int64_t j = 0; j < padded; j++) scores[j] = exponential(scores[j] - top);
    for (int64_t j = 0; j < padded; j += LANES) total = multiply_add(load(scores + j), all(1.0f), total);
    *lse = top + std::log(sum(total));
    return sum(total);
}

// One sequence and key head.
struct Place {
    int64_t begin, length, key_head, group;
};

Place place_of(const VarlenArgs& a, int64_t item) {
    int64_t seq = item / a.key_heads, begin = a.cu_seqlens[seq];
    return {begin, a.cu_seqlens[seq + 1] - begin, item % a.key_heads, a.heads / a.key_heads};
}

void varlen_forward(const VarlenArgs& a, const Place& at) {
    const float* k = a.k + at.begin * a.k_token + at.key_head * a.k_head;
    const float* v = a.v + at.begin * a.v_token + at.key_head * a.v_head;
    int64_t padded = whole_registers(at.length);
    const float* keys = transposed<12>(k, a.k_token, at.length, a.width);
    float* scores = scratch<float, 13>(BLOCK * padded);
    for (int64_t h = at.key_head * at.group; h < (at.key_head + 1) * at.group; h++)
        for (int64_t i = 0; i < at.length; i += BLOCK) {
            int64_t rows = std::min(BLOCK, at.length - i), seen = i + rows, first = at.begin + i;
            const float* q = a.q + first * a.q_token + h * a.q_head;
            float* out = a.out + (first * a.heads + h) * a.value_width;
            float totals[BLOCK];
            multiply(q, a.q_token, 1, keys, padded, rows, whole_registers(seen), a.width, scores, padded);
            for (int64_t r = 0; r < rows; r++)
                totals[r] = weigh(scores + r * padded, i + r + 1, whole_registers(seen), float(a.scale),
                                  a.lse + (first + r) * a.heads + h);
            multiply(scores, padded, 1, v, a.v_token, rows, a.value_width, seen, out, a.heads * a.value_width);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t c = 0; c < a.value_width; c++) out[r * a.heads * a.value_width + c] /= totals[r];
        }
}

// With weights p and d the sum over a query's out * grad: d p = grad v^T, d scores = p (d p - d) scale.
void varlen_backward(const VarlenArgs& a, const Place& at) {
    const float* k = a.k + at.begin * a.k_token + at.key_head * a.k_head;
    const float* v = a.v + at.begin * a.v_token + at.key_head * a.v_head;
    float* grad_k = a.grad_k + (at.begin * a.key_heads + at.key_head) * a.width;
    float* grad_v = a.grad_v + (at.begin * a.key_heads + at.key_head) * a.value_width;
    int64_t padded = whole_registers(at.length), q_row = a.heads * a.width, out_row = a.heads * a.value_width;
    const float* keys = transposed<12>(k, a.k_token, at.length, a.width);
    const float* values = transposed<14>(v, a.v_token, at.length, a.value_width);
    float* weights = scratch<float, 13>(BLOCK * padded);
    float* slopes = scratch<float, 15>(BLOCK * padded);
    float scale = float(a.scale);
    for (int64_t h = at.key_head * at.group; h < (at.key_head + 1) * at.group; h++)
        for (int64_t i = 0; i < at.length; i += BLOCK) {
            int64_t rows = std::min(BLOCK, at.length - i), seen = i + rows, first = at.begin + i;
            const float* q = a.q + first * a.q_token + h * a.q_head;
            const float* grad = a.grad + (first * a.heads + h) * a.value_width;
            const float* out = a.out + (first * a.heads + h) * a.value_width;
            multiply(q, a.q_token, 1, keys, padded, rows, whole_registers(seen), a.width, weights, padded);
            multiply(grad, out_row, 1, values, padded, rows, whole_registers(seen), a.value_width, slopes, padded);
            for (int64_t r = 0; r < rows; r++) {
                float* p = weights + r * padded;
                float* slope = slopes + r * padded;
                float lse = a.lse[(first + r) * a.heads + h];
                float mean = inner(out + r * out_row, grad + r * out_row, a.value_width);
                for (int64_t j = 0; j <= i + r; j++) p[j] = exponential(p[j] * scale - lse);
                for (int64_t j = 0; j <= i + r; j++) slope[j] = p[j] * (slope[j] - mean) * scale;
                std::fill(p + i + r + 1, p + seen, 0.0f);
                std::fill(slope + i + r + 1, slope + seen, 0.0f);
            }
            multiply(slopes, padded, 1, k, a.k_token, rows, a.width, seen, a.grad_q + first * q_row + h * a.width, q_row);
            multiply(slopes, 1, padded, q, a.q_token, seen, a.width, rows, grad_k, a.key_heads * a.width, true);
            multiply(weights, 1, padded, grad, out_row, seen, a.value_width, rows, grad_v, a.key_heads * a.value_width, true);
        }
}

// ------------------------------------------------------------------------- queries and keys of two parts, in training

// [nope ; rope] of tokens and heads, of which the second part is turned by its token's angles, or back.
struct TurnArgs {
    const float* x;
    int64_t token, head;  // strides
    int64_t tokens, heads, nope, half;
    const float* cos;
    const float* sin;
    int64_t back;
    float* out;
    int64_t out_token, out_head;  // strides
    int64_t threads;
};

void turn(const TurnArgs& a, int64_t t) {
    const float* cos = a.cos + t * a.half;
    const float* sin = a.sin + t * a.half;
    const float sign = a.back ? -1.0f : 1.0f;
    for (int64_t h = 0; h < a.heads; h++) {
        const float* x = a.x + t * a.token + h * a.head;
        float* out = a.out + t * a.out_token + h * a.out_head;
        std::copy(x, x + a.nope, out);
        for (int64_t i = 0; i < a.half; i++) {
            const float even = x[a.nope + 2 * i], odd = x[a.nope + 2 * i + 1], turned = sign * sin[i];
            out[a.nope + 2 * i] = even * cos[i] - odd * turned;
            out[a.nope + 2 * i + 1] = even * turned + odd * cos[i];
        }
    }
}

// k = [the first part of `both` ; the key that all heads share]; backward from the gradients of k and of the second part.
struct KeysArgs {
    float* both;  // [tokens, heads, nope + v], or its gradient
    float* key;   // [tokens, rope], or its gradient
    float* k;     // [tokens, heads, nope + rope], or its gradient
    const float* grad_v;  // [tokens, heads, v]
    int64_t tokens, heads, nope, rope, v, threads;
};

void join_keys(const KeysArgs& a, int64_t t) {
    for (int64_t h = t * a.heads; h < (t + 1) * a.heads; h++) {
        const float* both = a.both + h * (a.nope + a.v);
        float* k = a.k + h * (a.nope + a.rope);
        std::copy(both, both + a.nope, k);
        std::copy(a.key + t * a.rope, a.key + (t + 1) * a.rope, k + a.nope);
    }
}

void join_keys_backward(const KeysArgs& a, int64_t t) {
    float* key = a.key + t * a.rope;
    std::fill(key, key + a.rope, 0.0f);
    for (int64_t h = t * a.heads; h < (t + 1) * a.heads; h++) {
        float* both = a.both + h * (a.nope + a.v);
        const float* k = a.k + h * (a.nope + a.rope);
        std::copy(k, k + a.nope, both);
        std::copy(a.grad_v + h * a.v, a.grad_v + (h + 1) * a.v, both + a.nope);
        for (int64_t i = 0; i < a.rope; i++) key[i] += k[a.nope + i];
    }
}

// out[t] = sum_j y[inverse[t * topk + j]]
struct CopiesArgs {
    const float* y;
    const int64_t* inverse;
    int64_t tokens, topk, dim;
    float* out;
    int64_t threads;
};

void sum_copies(const CopiesArgs& a, int64_t t) {
    const int64_t* rows = a.inverse + t * a.topk;
    float* out = a.out + t * a.dim;
    std::copy(a.y + rows[0] * a.dim, a.y + (rows[0] + 1) * a.dim, out);
    for (int64_t j = 1; j < a.topk; j++)
        for (int64_t i = 0; i < a.dim; i++) out[i] += a.y[rows[j] * a.dim + i];
}

// --------------------------------------------------------------------------------------------------------- sampling

struct SampleArgs {
    int64_t dtype;
    const char* logits;
    int64_t rows, vocab;
    const float* temperature;
    const double* uniforms;  // null: all rows are greedy
    int64_t* tokens;
    float* logprobs;
    int64_t threads;
    const int64_t* top_k;  // of each row, where 0, 1 and 0 are off; null: off in all
    const float* top_p;
    const float* min_p;
};

struct UniformArgs {
    const int64_t* seeds;
    const int64_t* positions;
    int64_t rows;
    double* out;
};

uint64_t mix(uint64_t x) {  // splitmix64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

constexpr int64_t STRIPE = 32;  // sums and largest numbers that are kept side by side

// Logits of a row over its temperature, filled up with -inf to whole stripes, and their powers over that of `top`.
struct Weighed {
    float* scaled;
    float* powers;
    float top;
    double total;
};

float largest(const float* x, int64_t count) {
    float most[STRIPE];
    std::copy(x, x + STRIPE, most);
    for (int64_t i = 0; i < count; i += STRIPE)
        for (int64_t j = 0; j < STRIPE; j++) most[j] = x[i + j] > most[j] ? x[i + j] : most[j];
    return *std::max_element(most, most + STRIPE);
}

void set_powers(Weighed& w, int64_t vocab, float top) {
    const float* scaled = w.scaled;  // by itself: the compiler cannot know that no store changes `w`
    float* powers = w.powers;
    float part[STRIPE] = {};
    for (int64_t i = 0; i < vocab; i += STRIPE)
        for (int64_t j = 0; j < STRIPE; j++) part[j] += powers[i + j] = exponential(scaled[i + j] - top);
    w.top = top, w.total = 0;
    for (float each : part) w.total += each;
}

template <class T> Weighed weighed(const T* logits, int64_t vocab, float temperature) {
    float* scaled = scratch<float, 1>(vocab + STRIPE);
    Weighed w = {scaled, scratch<float, 10>(vocab + STRIPE), 0, 0};
    for (int64_t i = 0; i < vocab; i++) scaled[i] = widen(logits[i]) / temperature;
    std::fill(scaled + vocab, scaled + vocab + STRIPE, -std::numeric_limits<float>::infinity());
    set_powers(w, vocab, largest(scaled, vocab));
    return w;
}

constexpr int64_t DRAWN = 8 * STRIPE;  // powers that are summed up before the place is looked for among them

// The first place at which the sum of powers exceeds a share of the whole, never one whose power is 0.
int64_t drawn(const float* powers, int64_t vocab, double uniform) {
    int64_t blocks = (vocab + DRAWN - 1) / DRAWN, last = vocab - 1;
    double* sums = scratch<double, 16>(blocks);
    double whole = 0, seen = 0;
    for (int64_t b = 0; b < blocks; b++) {
        double part[8] = {};
        const float* end = powers + std::min((b + 1) * DRAWN, (vocab + STRIPE - 1) / STRIPE * STRIPE);
        for (const float* p = powers + b * DRAWN; p < end; p += 8)
            for (int64_t j = 0; j < 8; j++) part[j] += p[j];
        sums[b] = 0;
        for (double each : part) sums[b] += each;
        whole += sums[b];
    }
    double point = uniform * whole;
    for (int64_t b = 0; b < blocks; seen += sums[b], b++) {
        if (!(sums[b] > 0)) continue;
        double before = seen;
        if (seen + sums[b] >= point)
            for (int64_t i = b * DRAWN; i < std::min((b + 1) * DRAWN, vocab); i++)
                if (powers[i] > 0) {
                    last = i;
                    if ((before += powers[i]) > point) return i;
                }
    }
    return last;
}

constexpr int64_t BUCKETS = 1024, BUCKETS_OF_ONE = 32;  // of what tokens lie below the top; the last holds the rest

int64_t bucket_of(const Weighed& w, int64_t i) {
    float below = (w.top - w.scaled[i]) * BUCKETS_OF_ONE;
    return below < float(BUCKETS - 1) ? int64_t(below) : BUCKETS - 1;
}

// The likeliest tokens of a row in their order, of equal ones the lower first, by buckets of which only those are sorted
// that a filter cuts through. Tokens whose power is 0 are not among them.
struct Ranking {
    Weighed& w;
    int64_t vocab;
    int64_t counts[BUCKETS] = {};
    double sums[BUCKETS] = {};  // of powers

    Ranking(Weighed& weighed, int64_t size) : w(weighed), vocab(size) {
        for (int64_t i = 0; i < vocab; i++)
            if (w.powers[i] > 0) {
                int64_t b = bucket_of(w, i);
                counts[b]++, sums[b] += w.powers[i];
            }
    }

    // Take the powers of what comes behind the first of a bucket, for as long as `stays` of each token in turn.
    template <class F> void cut(int64_t bucket, F stays) {
        int64_t* tokens = scratch<int64_t, 18>(counts[bucket]);
        int64_t count = 0;
        for (int64_t i = 0; i < vocab; i++) {
            if (!(w.powers[i] > 0)) continue;
            int64_t b = bucket_of(w, i);
            if (b > bucket) w.powers[i] = 0;
            else if (b == bucket) tokens[count++] = i;
        }
        auto before = [&](int64_t i, int64_t j) { return w.scaled[i] != w.scaled[j] ? w.scaled[i] > w.scaled[j] : i < j; };
        std::sort(tokens, tokens + count, before);
        int64_t kept = 0;
        while (kept < count && stays(tokens[kept])) kept++;
        for (int64_t i = kept; i < count; i++) w.powers[tokens[i]] = 0;
        counts[bucket] = kept, sums[bucket] = 0;
        for (int64_t i = 0; i < kept; i++) sums[bucket] += w.powers[tokens[i]];
        std::fill(counts + bucket + 1, counts + BUCKETS, 0);
        std::fill(sums + bucket + 1, sums + BUCKETS, 0.0);
    }

    void keep_first(int64_t k) {
        int64_t seen = 0, b = 0;
        while (b < BUCKETS && seen + counts[b] < k) seen += counts[b++];
        if (b < BUCKETS) cut(b, [&](int64_t) { return seen++ < k; });
    }

    // The fewest whose probabilities, of all that is left, come to `p`; one at least.
    void keep_share(double p) {
        double whole = 0, before = 0;
        for (double each : sums) whole += each;
        int64_t b = 0;
        while (b < BUCKETS && (!counts[b] || (before + sums[b]) / whole < p)) before += sums[b++];
        bool is_first = before == 0;
        if (b < BUCKETS)
            cut(b, [&](int64_t token) {
                bool stays = is_first || before / whole < p;
                is_first = false, before += w.powers[token];
                return stays;
            });
    }
};

// Take the powers of what a row's filters drop: top-k, then top-p, then min-p.
void filter(const SampleArgs& a, int64_t r, Weighed& w) {
    int64_t k = a.top_k ? a.top_k[r] : 0;
    float p = a.top_p ? a.top_p[r] : 1, least = a.min_p ? a.min_p[r] : 0;
    if (k > 0 || p < 1) {
        Ranking ranking(w, a.vocab);
        if (k > 0) ranking.keep_first(k);
        if (p < 1) ranking.keep_share(p);
    }
    if (!(least > 0)) return;
    const float floor = w.top + std::log(least);
    for (int64_t i = 0; i < a.vocab; i++) w.powers[i] = w.scaled[i] < floor ? 0 : w.powers[i];
}

int64_t chosen(const SampleArgs& a, int64_t r, Weighed& w) {
    if (a.temperature[r] != 0 && a.uniforms) {
        filter(a, r, w);
        return drawn(w.powers, a.vocab, a.uniforms[r]);
    }
    return std::min<int64_t>(a.vocab - 1, std::find(w.scaled, w.scaled + a.vocab, w.top) - w.scaled);
}

float temperature_of(const SampleArgs& a, int64_t r) { return a.temperature[r] == 0 ? 1.0f : a.temperature[r]; }

template <class T> void sample_row(const SampleArgs& a, int64_t r) {
    Weighed w = weighed(reinterpret_cast<const T*>(a.logits) + r * a.vocab, a.vocab, temperature_of(a, r));
    int64_t token = chosen(a, r, w);
    a.tokens[r] = token;
    a.logprobs[r] = float(double(w.scaled[token] - w.top) - std::log(w.total));
}

// What requests ask of their tokens: entries name row * vocab + token, the rows rising.
struct AdjustedArgs {
    SampleArgs sample;
    const int64_t* bias_at;
    const float* bias;
    int64_t biased;
    const int64_t* seen_at;
    const int64_t* counts;
    int64_t seen;
    const float* repetition;
    const float* frequency;
    const float* presence;
    const int64_t* mask_rows;
    const uint32_t* bits;  // the lower half of each word of 64 first
    int64_t masked, words;
    const int64_t* bans;
    int64_t banned;
};

// The entries of a row, from `first` to before `last`.
struct Span {
    int64_t first, last;
};

Span entries(const int64_t* at, int64_t count, int64_t row, int64_t vocab) {
    const int64_t* first = std::partition_point(at, at + count, [&](int64_t each) { return each < row * vocab; });
    const int64_t* last = std::partition_point(first, at + count, [&](int64_t each) { return each < (row + 1) * vocab; });
    return {first - at, last - at};
}

void keep_allowed(const uint32_t* bits, int64_t vocab, float* scaled, float* powers) {
    const float none = -std::numeric_limits<float>::infinity();
    for (int64_t first = 0; first < vocab; first += STRIPE) {  // as many as a word of 32 bits
        uint32_t word = bits[first / STRIPE];
        if (word == ~uint32_t(0)) continue;
        for (uint32_t j = 0; j < STRIPE; j++) {
            bool stays = word >> j & 1;
            scaled[first + j] = stays ? scaled[first + j] : none;
            powers[first + j] = stays ? powers[first + j] : 0.0f;
        }
    }
}

// Adding and taking away divide by the temperature as the logits did; the factors of repetition do not depend on it.
void adjust(const AdjustedArgs& a, int64_t r, Weighed& w) {
    const int64_t vocab = a.sample.vocab, begin = r * vocab;
    const float temperature = temperature_of(a.sample, r), none = -std::numeric_limits<float>::infinity();
    Span bias = entries(a.bias_at, a.biased, r, vocab), seen = entries(a.seen_at, a.seen, r, vocab);
    for (int64_t i = bias.first; i < bias.last; i++) w.scaled[a.bias_at[i] - begin] += a.bias[i] / temperature;
    for (int64_t i = seen.first; i < seen.last; i++) {
        float& z = w.scaled[a.seen_at[i] - begin];
        z = z > 0 ? z / a.repetition[r] : z * a.repetition[r];
        z -= (a.frequency[r] * float(a.counts[i]) + (a.counts[i] > 0 ? a.presence[r] : 0)) / temperature;
    }
    for (int64_t i = bias.first; i < bias.last; i++)
        w.powers[a.bias_at[i] - begin] = exponential(w.scaled[a.bias_at[i] - begin] - w.top);
    for (int64_t i = seen.first; i < seen.last; i++)
        w.powers[a.seen_at[i] - begin] = exponential(w.scaled[a.seen_at[i] - begin] - w.top);
    int64_t mask = std::lower_bound(a.mask_rows, a.mask_rows + a.masked, r) - a.mask_rows;
    if (mask < a.masked && a.mask_rows[mask] == r) keep_allowed(a.bits + 2 * mask * a.words, vocab, w.scaled, w.powers);
    Span bans = entries(a.bans, a.banned, r, vocab);
    float* before = scratch<float, 17>(bans.last - bans.first);
    for (int64_t i = bans.first; i < bans.last; i++) {
        float& z = w.scaled[a.bans[i] - begin];
        before[i - bans.first] = z, z = none;
    }
    float top = largest(w.scaled, vocab);
    if (top == none) {  // the bans would leave nothing: what stood before each first
        for (int64_t i = bans.last - 1; i >= bans.first; i--) w.scaled[a.bans[i] - begin] = before[i - bans.first];
        top = largest(w.scaled, vocab);
    } else {
        for (int64_t i = bans.first; i < bans.last; i++) w.powers[a.bans[i] - begin] = 0;
    }
    // far from the top of before, powers would be too small or too large to tell
    if (std::fabs(top - w.top) < 30) w.top = top;
    else set_powers(w, vocab, top);
}

template <class T> void sample_adjusted_row(const AdjustedArgs& a, int64_t r) {
    const T* logits = reinterpret_cast<const T*>(a.sample.logits) + r * a.sample.vocab;
    float temperature = temperature_of(a.sample, r);
    Weighed w = weighed(logits, a.sample.vocab, temperature);
    double lse = double(w.top) + std::log(w.total);
    adjust(a, r, w);
    int64_t token = chosen(a.sample, r, w);
    a.sample.tokens[r] = token;
    a.sample.logprobs[r] = float(double(widen(logits[token]) / temperature) - lse);
}

// ----------------------------------------------------------------------------------------------------------- drafts

struct DraftArgs {
    const int64_t* numbers;  // of each sequence: the fields below, its tokens, its block table
    int64_t stride, seqs, width;
    const int64_t* newest;  // of each table row
    const int64_t* lengths;
    const int64_t* drafts;
    int64_t drafts_row;  // stride
    int64_t blocks, block_size, spare_slot;
    int64_t* rows;
    int64_t* token_ids;
    int64_t* positions;
    int64_t* slots;
    int64_t* seen;
    int64_t* known;
    int64_t* samples;
    int64_t* sample_positions;
};

enum DraftField { ROW, LENGTH, SAMPLES, LIMIT, SLOTS, FIELDS };

// The slot of a position, or nobody's from `bound` on.
int64_t slot_of(const int64_t* table, int64_t position, int64_t bound, int64_t block_size, int64_t spare_slot) {
    return position < bound ? table[position / block_size] * block_size + position % block_size : spare_slot;
}

void draft_inputs(const DraftArgs& a, int64_t s) {
    const int64_t* fields = a.numbers + s * a.stride;
    const int64_t* given = fields + FIELDS;
    int64_t row = fields[ROW], known = fields[LENGTH] ? fields[LENGTH] : a.lengths[row];
    int64_t samples = std::max<int64_t>(1, std::min(fields[SAMPLES], fields[LIMIT] - known));
    // a table is never shorter than what is bound to it; it may be where a bound is nobody's
    int64_t bound = std::min({known - 1 + samples, fields[SLOTS], a.blocks * a.block_size});
    for (int64_t j = 0; j < a.width; j++) {
        int64_t position = known - 1 + j, at = s * a.width + j;
        int64_t own = j ? a.drafts[(j - 1) * a.drafts_row + row] : a.newest[row];
        a.token_ids[at] = fields[LENGTH] ? given[j] : own;
        a.positions[at] = position;
        a.sample_positions[at] = position + 1;
        a.slots[at] = slot_of(given + a.width, position, bound, a.block_size, a.spare_slot);
    }
    a.rows[s] = row;
    a.seen[s] = known - 1 + a.width;
    a.known[s] = known;
    a.samples[s] = samples;
}

struct NextSlotArgs {
    const int64_t* tables;
    int64_t table_stride, blocks;
    const int64_t* positions;
    int64_t seqs;
    const int64_t* num_slots;
    int64_t num_slots_stride, block_size, spare_slot;
    int64_t* slots;
    int64_t* seen;
};

struct AcceptArgs {
    const int64_t* samples;
    const int64_t* token_ids;
    int64_t seqs, width;
    const int64_t* num_samples;
    const int64_t* lengths;
    int64_t* places;
    int64_t* newest;
    int64_t* positions;
    int64_t* known;
};

void accept_drafts(const AcceptArgs& a, int64_t s) {
    const int64_t* samples = a.samples + s * a.width;
    const int64_t* drafts = a.token_ids + s * a.width + 1;
    int64_t accepted = 0, most = std::min(a.num_samples[s], a.width) - 1;
    while (accepted < most && samples[accepted] == drafts[accepted]) accepted++;
    a.places[s] = s * a.width + accepted;
    a.newest[s] = samples[accepted];
    a.positions[s] = a.lengths[s] + accepted;
    a.known[s] = a.positions[s] + 1;
}

struct LikeliestArgs {
    int64_t dtype;
    const char* logits;
    int64_t rows, vocab, threads;
    int64_t* tokens;
};

// The first of the largest; a number that is none counts as the largest.
template <class T> int64_t most_likely(const T* logits, int64_t vocab) {
    float most[STRIPE];
    bool is_number[STRIPE];
    std::fill(most, most + STRIPE, -std::numeric_limits<float>::infinity());
    std::fill(is_number, is_number + STRIPE, true);
    int64_t whole = vocab / STRIPE * STRIPE;
    for (int64_t i = 0; i < whole; i += STRIPE)
        for (int64_t j = 0; j < STRIPE; j++) {
            float each = widen(logits[i + j]);
            most[j] = each > most[j] ? each : most[j];
            is_number[j] &= each == each;
        }
    for (int64_t i = whole; i < vocab; i++) {
        float each = widen(logits[i]);
        most[0] = each > most[0] ? each : most[0];
        is_number[0] &= each == each;
    }
    float top = *std::max_element(most, most + STRIPE);
    bool all_numbers = std::find(is_number, is_number + STRIPE, false) == is_number + STRIPE;
    for (int64_t i = 0; i < vocab; i++) {
        float each = widen(logits[i]);
        if (all_numbers ? each == top : each != each) return i;
    }
    return vocab - 1;
}

struct PutArgs {
    int64_t* target;
    const int64_t* places;
    int64_t count;
    const int64_t* numbers;
};

struct AngleArgs {
    const int64_t* positions;
    int64_t tokens;
    const float* theta;
    int64_t half;
    double scale;
    float* cos;
    float* sin;
};

struct EmbedArgs {
    const int64_t* ids;
    int64_t tokens;
    const char* weight;
    int64_t vocab, row_bytes;
    char* out;
};

struct SiluArgs {
    int64_t dtype;
    const char* gate;
    const char* up;
    char* out;
    int64_t rows, width, gate_row, up_row, threads;  // the third and fourth are strides
    const float* grad;                               // of `out`, and of what it is made of, all without gaps
    float* grad_gate;
    float* grad_up;
};

template <class T> void silu_mul(const SiluArgs& a) {
    spread(a.rows, a.width, a.threads, [&](int64_t r) {
        const T* gates = reinterpret_cast<const T*>(a.gate) + r * a.gate_row;
        const T* ups = reinterpret_cast<const T*>(a.up) + r * a.up_row;
        T* out = reinterpret_cast<T*>(a.out) + r * a.width;
        const int64_t width = a.width;  // else it may be what is written, and the loop no vectors
        for (int64_t i = 0; i < width; i++) {
            float gate = widen(gates[i]);
            put(out + i, rounded<T>(gate / (1.0f + exponential(-gate))) * widen(ups[i]));
        }
    });
}

void silu_mul_backward(const SiluArgs& a) {
    spread(a.rows, a.width, a.threads, [&](int64_t r) {
        const float* gates = reinterpret_cast<const float*>(a.gate) + r * a.gate_row;
        const float* ups = reinterpret_cast<const float*>(a.up) + r * a.up_row;
        const float* grad = a.grad + r * a.width;
        float* grad_gate = a.grad_gate + r * a.width;
        float* grad_up = a.grad_up + r * a.width;
        const int64_t width = a.width;
        for (int64_t i = 0; i < width; i++) {
            float gate = gates[i], sigmoid = 1.0f / (1.0f + exponential(-gate));
            grad_up[i] = grad[i] * gate * sigmoid;
            grad_gate[i] = grad[i] * ups[i] * sigmoid * (1.0f + gate * (1.0f - sigmoid));
        }
    });
}

// Of experts in training: rows [gate ; up] without gaps, and a weight for each.
struct WeightedSiluArgs {
    const float* both;
    const float* weights;
    float* out;
    int64_t rows, width, threads;
    const float* grad;  // of `out`
    float* grad_both;
    float* grad_weights;
};

void weighted_silu_mul(const WeightedSiluArgs& a) {
    spread(a.rows, a.width, a.threads, [&](int64_t r) {
        const int64_t width = a.width;
        const float *gates = a.both + 2 * r * width, *ups = gates + width;
        const float weight = a.weights[r];
        float* out = a.out + r * width;
        for (int64_t i = 0; i < width; i++)
            out[i] = gates[i] / (1.0f + exponential(-gates[i])) * ups[i] * weight;
    });
}

void weighted_silu_mul_backward(const WeightedSiluArgs& a) {
    spread(a.rows, a.width, a.threads, [&](int64_t r) {
        const int64_t width = a.width;
        const float *gates = a.both + 2 * r * width, *ups = gates + width, *grad = a.grad + r * width;
        const float weight = a.weights[r];
        float *out = a.out + r * width, *grad_gates = a.grad_both + 2 * r * width, *grad_ups = grad_gates + width;
        for (int64_t i = 0; i < width; i++) {
            float gate = gates[i], up = ups[i], sigmoid = 1.0f / (1.0f + exponential(-gate));
            float activated = gate * sigmoid, weighted = grad[i] * weight;
            out[i] = activated * up;
            grad_ups[i] = weighted * activated;
            grad_gates[i] = weighted * up * sigmoid * (1.0f + gate * (1.0f - sigmoid));
        }
        a.grad_weights[r] = inner(grad, out, width);
        for (int64_t i = 0; i < width; i++) out[i] *= weight;
    });
}

// ------------------------------------------------------------------------------------------------ log-probabilities

struct LogprobArgs {
    float* logits;
    int64_t rows, vocab;
    const int64_t* targets;
    float* logprobs;
    float* entropy;
    float* lse;
    int64_t threads;
    const float* grad;  // of the log-probabilities
};

void logprob_row(const LogprobArgs& a, int64_t r) {
    const float* x = a.logits + r * a.vocab;
    float most[STRIPE], total[STRIPE] = {}, weighted[STRIPE] = {};
    int64_t whole = a.vocab / STRIPE * STRIPE;
    std::fill(most, most + STRIPE, -std::numeric_limits<float>::infinity());
    for (int64_t i = 0; i < whole; i += STRIPE)
        for (int64_t j = 0; j < STRIPE; j++) most[j] = x[i + j] > most[j] ? x[i + j] : most[j];
    for (int64_t i = whole; i < a.vocab; i++) most[0] = std::max(most[0], x[i]);
    float top = *std::max_element(most, most + STRIPE);
    for (int64_t i = 0; i < whole; i += STRIPE)
        for (int64_t j = 0; j < STRIPE; j++) {
            float power = exponential(x[i + j] - top);
            total[j] += power, weighted[j] += power * x[i + j];
        }
    for (int64_t i = whole; i < a.vocab; i++) {
        float power = exponential(x[i] - top);
        total[0] += power, weighted[0] += power * x[i];
    }
    double sum = 0, mean = 0;
    for (int64_t j = 0; j < STRIPE; j++) sum += total[j], mean += weighted[j];
    double lse = top + std::log(sum);
    a.lse[r] = float(lse);
    a.logprobs[r] = float(x[a.targets[r]] - lse);
    a.entropy[r] = float(lse - mean / sum);
}

void logprob_row_backward(const LogprobArgs& a, int64_t r) {
    float* x = a.logits + r * a.vocab;
    const float grad = a.grad[r], lse = a.lse[r];
    const int64_t vocab = a.vocab;
    for (int64_t i = 0; i < vocab; i++) x[i] = exponential(x[i] - lse) * -grad;
    x[a.targets[r]] += grad;
}

}  // namespace

// ------------------------------------------------------------------------------------------------ what Python calls

extern "C" {

// Calls of the functions below one after the other: each entry of the table is a function and its arguments.
void kogia_replay(void* const* table, int64_t count) {
    for (int64_t i = 0; i < count; i++) reinterpret_cast<void (*)(const void*)>(table[2 * i])(table[2 * i + 1]);
}

void kogia_linear(const LinearArgs* a) { a->dtype == BFLOAT16 ? linear<bf16>(*a) : linear<float>(*a); }

void kogia_product(const ProductArgs* a) {
#if defined(__AVX512BF16__)
    if (a->rounds) return product_of_halves(*a);
#endif
    product_of_many(*a);
}

void kogia_turn(const TurnArgs* a) {
    spread(a->tokens, a->heads * (a->nope + 2 * a->half), a->threads, [&](int64_t t) { turn(*a, t); });
}

void kogia_join_keys(const KeysArgs* a) {
    spread(a->tokens, a->heads * (a->nope + a->rope), a->threads, [&](int64_t t) { join_keys(*a, t); });
}

void kogia_join_keys_backward(const KeysArgs* a) {
    spread(a->tokens, a->heads * (a->nope + a->v), a->threads, [&](int64_t t) { join_keys_backward(*a, t); });
}

void kogia_sum_copies(const CopiesArgs* a) {
    spread(a->tokens, a->topk * a->dim, a->threads, [&](int64_t t) { sum_copies(*a, t); });
}

void kogia_varlen_forward(const VarlenArgs* a) {
    parallel(a->seqs * a->key_heads, a->threads, [&](int64_t i) { varlen_forward(*a, place_of(*a, i)); });
}

void kogia_varlen_backward(const VarlenArgs* a) {
    parallel(a->seqs * a->key_heads, a->threads, [&](int64_t i) { varlen_backward(*a, place_of(*a, i)); });
}

void kogia_mix_experts(const ExpertArgs* a) { a->dtype == BFLOAT16 ? mix_experts<bf16>(*a) : mix_experts<float>(*a); }

void kogia_route(const RouteArgs* a) {
    parallel(a->tokens, a->tokens < 16 ? 1 : a->threads, [&](int64_t t) {
        if (a->x_dtype == BFLOAT16)
            a->weight_dtype == BFLOAT16 ? route_token<bf16, bf16>(*a, t) : route_token<bf16, float>(*a, t);
        else
            a->weight_dtype == BFLOAT16 ? route_token<float, bf16>(*a, t) : route_token<float, float>(*a, t);
    });
}

void kogia_norm(const NormArgs* a) { a->dtype == BFLOAT16 ? norm<bf16>(*a) : norm<float>(*a); }

void kogia_norm_backward(const NormBackwardArgs* a) {
    parallel((a->rows + NORM_ROWS - 1) / NORM_ROWS, a->threads, [&](int64_t i) { norm_backward(*a, i); });
}

void kogia_sum(const SumArgs* a) { a->dtype == BFLOAT16 ? sum_of_both<bf16>(*a) : sum_of_both<float>(*a); }

void kogia_write_latent(const WriteArgs* a) {
    a->dtype == BFLOAT16 ? write_latent<bf16>(*a) : write_latent<float>(*a);
}

void kogia_absorb_query(const AbsorbArgs* a) {
    int64_t tiles = (a->tokens + TILE - 1) / TILE;
    bool few = a->tokens * a->heads * a->nope * a->latent < 1 << 18;
    parallel(a->heads * tiles, few ? 1 : a->threads, [&](int64_t i) {
        int64_t head = i / tiles, first = i % tiles * TILE;
        a->dtype == BFLOAT16 ? absorb<bf16>(*a, head, first) : absorb<float>(*a, head, first);
    });
}

void kogia_project_values(const ProjectArgs* a) {
    bool few = a->tokens * a->heads * a->v * a->latent < 1 << 18;
    parallel(a->heads, few ? 1 : a->threads, [&](int64_t head) {
        a->dtype == BFLOAT16 ? project<bf16>(*a, head) : project<float>(*a, head);
    });
}

void kogia_angles(const AngleArgs* a) {
    for (int64_t i = 0; i < a->tokens * a->half; i++) {
        float angle = float(a->positions[i / a->half]) * a->theta[i % a->half];
        a->cos[i] = std::cos(angle) * float(a->scale);
        a->sin[i] = std::sin(angle) * float(a->scale);
    }
}

void kogia_embed(const EmbedArgs* a) {
    for (int64_t t = 0; t < a->tokens; t++) {
        char* out = a->out + t * a->row_bytes;
        if (a->ids[t] >= 0 && a->ids[t] < a->vocab)
            std::memcpy(out, a->weight + a->ids[t] * a->row_bytes, size_t(a->row_bytes));
        else
            std::memset(out, 0, size_t(a->row_bytes));
    }
}

void kogia_silu_mul(const SiluArgs* a) { a->dtype == BFLOAT16 ? silu_mul<bf16>(*a) : silu_mul<float>(*a); }

void kogia_uniforms(const UniformArgs* a) {
    for (int64_t i = 0; i < a->rows; i++) {
        uint64_t state = uint64_t(a->seeds[i]) + (uint64_t(a->positions[i]) + 1) * 0x9E3779B97F4A7C15u;
        a->out[i] = double(mix(state) >> 11) * 0x1p-53;
    }
}

void kogia_silu_mul_backward(const SiluArgs* a) { silu_mul_backward(*a); }

void kogia_weighted_silu_mul(const WeightedSiluArgs* a) { weighted_silu_mul(*a); }

void kogia_weighted_silu_mul_backward(const WeightedSiluArgs* a) { weighted_silu_mul_backward(*a); }

void kogia_logprob(const LogprobArgs* a) {
    spread(a->rows, a->vocab, a->threads, [&](int64_t r) { logprob_row(*a, r); });
}

void kogia_logprob_backward(const LogprobArgs* a) {
    spread(a->rows, a->vocab, a->threads, [&](int64_t r) { logprob_row_backward(*a, r); });
}

void kogia_sample(const SampleArgs* a) {
    parallel(a->rows, a->threads, [&](int64_t r) {
        a->dtype == BFLOAT16 ? sample_row<bf16>(*a, r) : sample_row<float>(*a, r);
    });
}

void kogia_draft_inputs(const DraftArgs* a) {
    for (int64_t s = 0; s < a->seqs; s++) draft_inputs(*a, s);
}

void kogia_next_slots(const NextSlotArgs* a) {
    for (int64_t s = 0; s < a->seqs; s++) {
        int64_t position = a->positions[s];
        int64_t bound = std::min(a->num_slots[s * a->num_slots_stride], a->blocks * a->block_size);
        a->slots[s] = slot_of(a->tables + s * a->table_stride, position, bound, a->block_size, a->spare_slot);
        a->seen[s] = position + 1;
    }
}

void kogia_accept_drafts(const AcceptArgs* a) {
    for (int64_t s = 0; s < a->seqs; s++) accept_drafts(*a, s);
}

void kogia_most_likely_tokens(const LikeliestArgs* a) {
    spread(a->rows, a->vocab, a->threads, [&](int64_t r) {
        if (a->dtype == BFLOAT16)
            a->tokens[r] = most_likely(reinterpret_cast<const bf16*>(a->logits) + r * a->vocab, a->vocab);
        else
            a->tokens[r] = most_likely(reinterpret_cast<const float*>(a->logits) + r * a->vocab, a->vocab);
    });
}

void kogia_put_numbers(const PutArgs* a) {
    for (int64_t i = 0; i < a->count; i++) a->target[a->places[i]] = a->numbers[i];
}

void kogia_sample_adjusted(const AdjustedArgs* a) {
    parallel(a->sample.rows, a->sample.threads, [&](int64_t r) {
        a->sample.dtype == BFLOAT16 ? sample_adjusted_row<bf16>(*a, r) : sample_adjusted_row<float>(*a, r);
    });
}

void kogia_cached_attention(const AttentionArgs* a) {
    std::vector<Queries> tiles;
    int64_t keys = 0;
    for (int64_t s = 0; s < a->seqs; s++) {
        int64_t rows = (a->cu_seqlens[s + 1] - a->cu_seqlens[s]) * (a->heads / a->key_heads);
        for (int64_t h = 0; h < a->key_heads; h++)
            for (int64_t first = 0; first < rows; first += TILE) {
                tiles.push_back({s, h, first});
                keys += a->context_lens[s];
            }
    }
    parallel(int64_t(tiles.size()), keys < 512 ? 1 : a->threads, [&](int64_t i) {
        a->dtype == BFLOAT16 ? attend<bf16>(*a, tiles[size_t(i)]) : attend<float>(*a, tiles[size_t(i)]);
    });
}
}
