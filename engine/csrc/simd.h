// One vector of float lanes, one lane per training image, for the instruction set being compiled.
//
// Arithmetic uses the compiler's vector extensions; only what they cannot say (horizontal tests,
// powers of two) has code per instruction set. Every set has full-width vectors of its own.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
// GCC 12 warns of the undefined vectors in its own AVX-512 header (its bug 105593).
#pragma GCC diagnostic push
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace els {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef std::int32_t IntVec __attribute__((vector_size(kLanes * sizeof(std::int32_t))));
typedef std::uint16_t ShortVec __attribute__((vector_size(kLanes * sizeof(std::uint16_t))));
typedef std::uint8_t ByteVec __attribute__((vector_size(kLanes)));
// Two 16-bit integers in each lane.
typedef std::int16_t PairVec __attribute__((vector_size(kLanes * sizeof(std::int32_t))));

// Largest of the integers, either way, that queries are rounded to for products with bytes: two
// signed bytes, 256 high + low, hold it.
constexpr float kLargestQuery = 32512.0f;
// Products of such an integer and a byte whose sum 32 bits hold: 2^31 / (255 * 32512) = 259.
constexpr int kSummedProducts = 256;

inline Vec splat(float value) { return value - Vec{}; }

inline Vec load(const float* from) {
  Vec vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

inline ShortVec load_shorts(const std::uint16_t* from) {
  ShortVec vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

// Whether any bit of the result of a comparison is set.
template <typename Mask>
bool any(Mask mask) {
  std::uint64_t words[sizeof(mask) / sizeof(std::uint64_t)], bits = 0;
  static_assert(sizeof(words) == sizeof(mask));
  std::memcpy(words, &mask, sizeof(words));
  for (const std::uint64_t word : words) bits |= word;
  return bits != 0;
}

inline void store(Vec vector, float* to) { std::memcpy(to, &vector, sizeof(vector)); }

inline Vec min(Vec a, Vec b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(
      _mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec>(
      _mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a < b ? a : b;
#endif
}

inline Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(
      _mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#else
  return a > b ? a : b;
#endif
}

// Rows become columns.
inline void transpose(Vec (&rows)[kLanes]) {
#if defined(__AVX512F__)
  __m512i a[16], b[16];
  std::memcpy(a, rows, sizeof(a));
  for (int i = 0; i < 16; i += 2) {  // pairs of lanes
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // fours
    for (int half = 0; half < 2; ++half) {
      a[i + 2 * half] = _mm512_unpacklo_epi64(b[i + half], b[i + half + 2]);
      a[i + 2 * half + 1] = _mm512_unpackhi_epi64(b[i + half], b[i + half + 2]);
    }
  }
  for (int i = 0; i < 4; ++i) {  // and fours of those
    const __m512i even = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88);
    const __m512i odd = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
    const __m512i more_even = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
    const __m512i more_odd = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
    b[i] = _mm512_shuffle_i32x4(even, more_even, 0x88);
    b[4 + i] = _mm512_shuffle_i32x4(odd, more_odd, 0x88);
    b[8 + i] = _mm512_shuffle_i32x4(even, more_even, 0xdd);
    b[12 + i] = _mm512_shuffle_i32x4(odd, more_odd, 0xdd);
  }
  std::memcpy(rows, b, sizeof(b));
#elif defined(__AVX2__)
  __m256 a[8], b[8];
  std::memcpy(a, rows, sizeof(a));
  for (int i = 0; i < 8; i += 2) {  // pairs of lanes
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {  // fours
    for (int half = 0; half < 2; ++half) {
      a[i + 2 * half] = _mm256_shuffle_ps(b[i + half], b[i + half + 2], 0x44);
      a[i + 2 * half + 1] = _mm256_shuffle_ps(b[i + half], b[i + half + 2], 0xee);
    }
  }
  for (int i = 0; i < 4; ++i) {  // halves
    b[i] = _mm256_permute2f128_ps(a[i], a[4 + i], 0x20);
    b[4 + i] = _mm256_permute2f128_ps(a[i], a[4 + i], 0x31);
  }
  std::memcpy(rows, b, sizeof(b));
#else
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float swapped = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = swapped;
    }
  }
#endif
}

// Denormal results become zero in this thread: arithmetic on them is slow.
inline void flush_denormals() {
#if defined(__SSE2__)
  _mm_setcsr(_mm_getcsr() | 0x8040);
#endif
}

// Bit i is set where a[i] < b[i].
inline std::uint32_t mask_less(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_LT_OQ);
#elif defined(__AVX2__)
  return static_cast<std::uint32_t>(_mm256_movemask_ps(
      _mm256_cmp_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), _CMP_LT_OQ)));
#elif defined(__SSE2__)
  return static_cast<std::uint32_t>(
      _mm_movemask_ps(_mm_cmplt_ps(reinterpret_cast<__m128>(a), reinterpret_cast<__m128>(b))));
#else
  std::uint32_t mask = 0;
  for (int lane = 0; lane < kLanes; ++lane) mask |= std::uint32_t{a[lane] < b[lane]} << lane;
  return mask;
#endif
}

// sums + the lanes' dot products of two 16-bit integers with two others.
inline IntVec add_products(IntVec sums, PairVec a, PairVec b) {
#if defined(__AVX512BW__)
  return sums + reinterpret_cast<IntVec>(
                    _mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return sums + reinterpret_cast<IntVec>(
                    _mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return sums + reinterpret_cast<IntVec>(
                    _mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  const IntVec wide_a = reinterpret_cast<IntVec>(a), wide_b = reinterpret_cast<IntVec>(b);
  return sums + (wide_a >> 16) * (wide_b >> 16) + ((wide_a << 16) >> 16) * ((wide_b << 16) >> 16);
#endif
}

inline float min_lane(Vec a) {
  float least = a[0];
  for (int lane = 1; lane < kLanes; ++lane) least = a[lane] < least ? a[lane] : least;
  return least;
}

// Lanes are added in order, in double: the same bits on every call.
inline double sum_lanes(Vec a) {
  double sum = 0.0;
  for (int lane = 0; lane < kLanes; ++lane) sum += static_cast<double>(a[lane]);
  return sum;
}

// 2^t for t <= 0, 0 where it would be denormal, of n vectors in lockstep, which hides the latency
// of the dependent operations.
template <int n>
inline void exp2_nonpositive(const Vec (&t)[n], Vec (&power)[n]) {
  // Minimax on [0, 1]: relative error 1.6e-7 in float32, as good as the logits are.
  constexpr float kCoefficients[] = {8.989340251e-3f, 5.582631732e-2f, 2.401536176e-1f,
                                     6.931530731e-1f, 9.999999251e-1f};
  Vec fraction[n];
#if defined(__AVX512DQ__)
  // scalef takes the floor of its exponent, so the fraction must be the one above the floor.
  for (int i = 0; i < n; ++i) {
    fraction[i] = reinterpret_cast<Vec>(_mm512_reduce_ps(
        reinterpret_cast<__m512>(t[i]), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
  }
#else
  // Adding 1.5 * 2^23 leaves the rounded value in the low bits of the sum.
  constexpr float kMagic = 12582912.0f;
  const Vec floor_limit = splat(-126.0f);
  IntVec exponent[n];
  for (int i = 0; i < n; ++i) {
    const Vec clamped = t[i] < floor_limit ? floor_limit : t[i];
    const Vec shifted = (clamped - 0.5f) + kMagic;
    fraction[i] = clamped - (shifted - kMagic);
    exponent[i] = reinterpret_cast<IntVec>(shifted) << 23;
  }
#endif
  for (int i = 0; i < n; ++i) power[i] = splat(1.877576843e-3f);
#pragma GCC unroll 8
  for (float coefficient : kCoefficients) {
    for (int i = 0; i < n; ++i) power[i] = power[i] * fraction[i] + coefficient;
  }
  for (int i = 0; i < n; ++i) {
#if defined(__AVX512DQ__)
    power[i] = reinterpret_cast<Vec>(
        _mm512_scalef_ps(reinterpret_cast<__m512>(power[i]), reinterpret_cast<__m512>(t[i])));
#else
    const IntVec scaled = reinterpret_cast<IntVec>(power[i]) + exponent[i];
    power[i] = reinterpret_cast<Vec>(scaled & (t[i] > floor_limit));
#endif
  }
}

inline Vec bytes_to_floats(const std::uint8_t* bytes) {
#if defined(__AVX512F__)
  // Compilers convert one by one.
  const __m128i loaded = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  return reinterpret_cast<Vec>(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(loaded)));
#else
  ByteVec loaded;
  std::memcpy(&loaded, bytes, sizeof(loaded));
  return __builtin_convertvector(loaded, Vec);
#endif
}

}  // namespace els
