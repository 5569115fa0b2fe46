// Vectors of one instruction set, chosen when the file is compiled: AVX-512 (with or without BF16 and VNNI) or AVX2.
//
//   Floats   LANES float32                        Ints    2 * LANES int16, or their LANES int32 sums
//   Halves   2 * LANES bfloat16
//
// `operands` loads as many numbers of a row as fill a register, whatever their type, and `dot` adds their products. With
// a count fewer are loaded, and zeros stand behind them. Operands are multiplied in PARTS: bfloat16 without instructions of
// its own as float32, its even numbers, then its odd ones. `nibbles<K>` are the K-th of words of four, the lowest first.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>

using bf16 = uint16_t;

inline float widen(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline float widen(float x) { return x; }

// To the nearest, ties to even; NaN stays NaN.
inline bf16 narrow(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return x == x ? bf16(rounded) : bf16(0x7FC0);
}
inline void put(bf16* at, float x) { *at = narrow(x); }
inline void put(float* at, float x) { *at = x; }

// x as a number of type T holds it.
template <class T> inline float rounded(float x) {
    T held;
    put(&held, x);
    return widen(held);
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

constexpr int LANES = 16, ROWS_AT_ONCE = 4, COLUMNS_AT_ONCE = 4, PANEL_ROWS = 12;
using Floats = __m512;
using Ints = __m512i;
using Halves = __m512i;

inline Floats zeros() { return _mm512_setzero_ps(); }
inline Ints no_ints() { return _mm512_setzero_si512(); }
inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Floats all(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_set1_epi16(short(*p)), _mm512_set1_epi32(int(0xFFFF0000))));
}
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline Floats load(const bf16* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(Floats x) { return _mm512_reduce_add_ps(x); }
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline void store_sums(const Floats (&x)[4], float* out) {
    __m256 half[4];
    for (int i = 0; i < 4; i++) half[i] = _mm256_add_ps(_mm512_castps512_ps256(x[i]), _mm512_extractf32x8_ps(x[i], 1));
    __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}
inline Halves operands(const bf16* p) { return _mm512_loadu_si512(p); }
inline Floats operands(const float* p) { return load(p); }
#if defined(__AVX512BF16__)
template <class T> constexpr int PARTS = 1;
template <int K> inline Halves part_of(Halves x) { return x; }
inline Floats dot(Floats sums, Halves a, Halves b) { return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b); }

// Two bfloat16, the first in the lower half. A register of them is made from, and adds up to, LANES numbers at a time.
struct Pair { uint32_t bits; };
inline Halves all(Pair x) { return _mm512_set1_epi32(int(x.bits)); }
inline Halves load(const Pair* p) { return _mm512_loadu_si512(p); }
inline Floats multiply_add(Halves a, Halves b, Floats c) { return dot(c, a, b); }
inline __mmask16 first_lanes(int64_t count) {
    return count >= LANES ? __mmask16(0xFFFF) : count > 0 ? __mmask16((1u << count) - 1) : __mmask16(0);
}
inline Floats load(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(first_lanes(count), p); }
inline void store(Pair* p, Halves x, int64_t count) { _mm512_mask_storeu_epi32(p, first_lanes(count), x); }
// One behind the other, rounded; and each number beside the one in its place.
inline Halves halves(Floats first, Floats second) { return (Halves)_mm512_cvtne2ps_pbh(second, first); }
inline Halves interleaved(Floats first, Floats second) {
    const __m512i places = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                            20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(places, halves(first, second));
}
#else
template <class T> constexpr int PARTS = sizeof(T) == 2 ? 2 : 1;
template <int K> inline Floats part_of(Halves x) {
    return _mm512_castsi512_ps(K ? _mm512_and_si512(x, _mm512_set1_epi32(int(0xFFFF0000))) : _mm512_slli_epi32(x, 16));
}
#endif
template <int K> inline Floats part_of(Floats x) { return x; }
inline Floats dot(Floats sums, Floats a, Floats b) { return multiply_add(a, b, sums); }
inline Ints load_shorts(const int16_t* p) { return _mm512_loadu_si512(p); }
inline Ints load_bytes(const int8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Halves operands(const bf16* p, int64_t count) { return _mm512_maskz_loadu_epi16((1u << count) - 1, p); }
inline Floats operands(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p); }
inline Ints load_shorts(const int16_t* p, int64_t count) { return _mm512_maskz_loadu_epi16((1u << count) - 1, p); }
inline Ints load_bytes(const int8_t* p, int64_t count) {
    return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8((1u << count) - 1, p));
}
inline Ints in_first(int32_t x) { return _mm512_zextsi128_si512(_mm_cvtsi32_si128(x)); }
template <int K> inline Ints nibbles(Ints words) {
    Ints lowest = _mm512_srli_epi16(words, 4 * K);
    return K == 3 ? lowest : _mm512_and_si512(lowest, _mm512_set1_epi16(15));
}
inline Ints dot(Ints sums, Ints a, Ints b) {
#if defined(__AVX512VNNI__)
    return _mm512_dpwssd_epi32(sums, a, b);
#else
    return _mm512_add_epi32(sums, _mm512_madd_epi16(a, b));
#endif
}
inline Ints plus(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }

#elif defined(__AVX2__) && defined(__FMA__)

constexpr int LANES = 8, ROWS_AT_ONCE = 2, COLUMNS_AT_ONCE = 4, PANEL_ROWS = 6;
using Floats = __m256;
using Ints = __m256i;
using Halves = __m256i;

inline Floats zeros() { return _mm256_setzero_ps(); }
inline Ints no_ints() { return _mm256_setzero_si256(); }
inline Floats all(float x) { return _mm256_set1_ps(x); }
inline Floats all(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_set1_epi16(short(*p)), _mm256_set1_epi32(int(0xFFFF0000))));
}
inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline Floats load(const bf16* p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(Floats x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}
inline Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Halves operands(const bf16* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Floats operands(const float* p) { return load(p); }
template <class T> constexpr int PARTS = sizeof(T) == 2 ? 2 : 1;
template <int K> inline Floats part_of(Halves x) {
    return _mm256_castsi256_ps(K ? _mm256_and_si256(x, _mm256_set1_epi32(int(0xFFFF0000))) : _mm256_slli_epi32(x, 16));
}
template <int K> inline Floats part_of(Floats x) { return x; }
inline Floats dot(Floats sums, Floats a, Floats b) { return multiply_add(a, b, sums); }
inline Ints load_shorts(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Ints load_bytes(const int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// As many numbers as fill a register, the first `count` from memory.
template <class T, int N> struct Part {
    alignas(32) T numbers[N] = {};
    Part(const T* p, int64_t count) { std::memcpy(numbers, p, size_t(count) * sizeof(T)); }
};
inline Halves operands(const bf16* p, int64_t count) { return operands(Part<bf16, 16>(p, count).numbers); }
inline Floats operands(const float* p, int64_t count) { return load(Part<float, 8>(p, count).numbers); }
inline Ints load_shorts(const int16_t* p, int64_t count) { return load_shorts(Part<int16_t, 16>(p, count).numbers); }
inline Ints load_bytes(const int8_t* p, int64_t count) { return load_bytes(Part<int8_t, 16>(p, count).numbers); }
inline Ints in_first(int32_t x) { return _mm256_zextsi128_si256(_mm_cvtsi32_si128(x)); }
template <int K> inline Ints nibbles(Ints words) {
    Ints lowest = _mm256_srli_epi16(words, 4 * K);
    return K == 3 ? lowest : _mm256_and_si256(lowest, _mm256_set1_epi16(15));
}
inline Ints dot(Ints sums, Ints a, Ints b) { return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b)); }
inline Ints plus(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Floats to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }

#else
#error "these kernels are for AVX2 and AVX-512"
#endif

template <int N> inline void store_sums(const Floats (&x)[N], float* out) {
    for (int i = 0; i < N; i++) out[i] = sum(x[i]);
}

// e^x to float32's precision, without branches, so that loops over it become vectors; 0 below -87, NaN stays NaN.
inline float exponential(float x) {
    float clipped = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float whole = (clipped * 1.44269504f + 12582912.0f) - 12582912.0f;
    float rest = clipped - whole * 0.693359375f + whole * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * rest + 1.3981999507e-3f;
    y = y * rest + 8.3334519073e-3f;
    y = y * rest + 4.1665795894e-2f;
    y = y * rest + 1.6666665459e-1f;
    y = y * rest + 5.0000001201e-1f;
    y = y * rest * rest + rest + 1.0f;
    uint32_t bits = uint32_t(int32_t(whole) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return x < -87.0f ? 0.0f : y * power;
}
