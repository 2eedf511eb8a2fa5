// One vector type per instruction set behind the same few functions. A file that includes this names its
// instruction set by DSP_ISA; everything lives in a namespace of that name, so that no two builds of one
// inline function can be mistaken for each other by the linker.
#pragma once

#include <cstdint>

#ifndef DSP_ISA
#error "define DSP_ISA before including core/simd.h"
#endif

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

// Keeps a loaded vector in its register: compilers fold a load into each of its uses, and load it again for
// each.
#if defined(__AVX512F__)
#define DSP_KEEP(v) asm("" : "+v"(v))
#elif defined(__x86_64__)
#define DSP_KEEP(v) asm("" : "+x"(v))
#elif defined(__aarch64__)
#define DSP_KEEP(v) asm("" : "+w"(v))
#else
#define DSP_KEEP(v) static_cast<void>(v)
#endif
#define DSP_UNROLL _Pragma("GCC unroll 16")
#define DSP_INLINE inline __attribute__((always_inline))

namespace dsp {
namespace DSP_ISA {

#if defined(__AVX512F__)

using Vec = __m512;
constexpr int kLanes = 16;
constexpr bool kMasksAreFree = true;
constexpr bool kHasHalf = true;
constexpr bool kManyRegisters = true;

DSP_INLINE __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
DSP_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
DSP_INLINE Vec load_lanes(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
DSP_INLINE Vec load_half(const float* lo, const float* hi) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(lo)), _mm256_loadu_ps(hi), 1);
}
DSP_INLINE Vec load_half_lanes(const float* lo, const float* hi, int n) {
  const __mmask8 mask = static_cast<__mmask8>(first_lanes(n));
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_maskz_loadu_ps(mask, lo)),
                            _mm256_maskz_loadu_ps(mask, hi), 1);
}
DSP_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
DSP_INLINE void store_lanes(float* p, Vec v, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
DSP_INLINE void store_half_lanes(float* lo, float* hi, Vec v, int n) {
  const __mmask8 mask = static_cast<__mmask8>(first_lanes(n));
  _mm256_mask_storeu_ps(lo, mask, _mm512_castps512_ps256(v));
  _mm256_mask_storeu_ps(hi, mask, _mm512_extractf32x8_ps(v, 1));
}
DSP_INLINE Vec set1(float a) { return _mm512_set1_ps(a); }
DSP_INLINE Vec zero() { return _mm512_setzero_ps(); }
DSP_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
DSP_INLINE void fma_to(Vec& c, Vec a, Vec b) { asm("vfmadd231ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b)); }
DSP_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
DSP_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
DSP_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
// max(a, b) and min(a, b) give b when either is NaN: pass the data as b and NaN goes through.
DSP_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
DSP_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
// As max, but NaN once there stays.
DSP_INLINE Vec max_nan(Vec a, Vec b) {
  return _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
}
// The lanes whose bit in `mask` is set: from and to their own places; the others are those of v, or left
// alone.
DSP_INLINE Vec merge_mask(Vec v, const float* p, uint32_t mask) {
  return _mm512_mask_loadu_ps(v, static_cast<__mmask16>(mask), p);
}
DSP_INLINE void store_mask(float* p, Vec v, uint32_t mask) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), v);
}
// Neighbouring values, one to each lane whose bit is set.
DSP_INLINE Vec load_expand(const float* p, uint32_t mask) {
  return _mm512_maskz_expandloadu_ps(static_cast<__mmask16>(mask), p);
}
// v in the first n lanes, 0 in the others.
DSP_INLINE Vec keep_lanes(Vec v, int n) { return _mm512_maskz_mov_ps(first_lanes(n), v); }
// 0 where `sign` is 0 or below, else v: also where it is NaN, as in torch.
DSP_INLINE Vec where_positive(Vec sign, Vec v) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(sign, zero(), _CMP_NLE_UQ), v);
}
// The even elements of two neighbouring vectors.
DSP_INLINE Vec even(Vec a, Vec b) {
  const __m512i index = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  return _mm512_permutex2var_ps(a, index, b);
}

// The even elements to one place, the odd ones to another.
DSP_INLINE void store_apart(float* evens, float* odds, Vec v) {
  const __m512i index = _mm512_set_epi32(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0);
  const Vec apart = _mm512_permutexvar_ps(index, v);
  _mm256_storeu_ps(evens, _mm512_castps512_ps256(apart));
  _mm256_storeu_ps(odds, _mm512_extractf32x8_ps(apart, 1));
}

// The elements of two vectors in turn: of their first halves, and of their second.
DSP_INLINE Vec zip_low(Vec a, Vec b) {
  const __m512i index = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutex2var_ps(a, index, b);
}
DSP_INLINE Vec zip_high(Vec a, Vec b) {
  const __m512i index = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
  return _mm512_permutex2var_ps(a, index, b);
}

DSP_INLINE float sum_lanes(Vec v) {
  const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

#elif defined(__AVX2__)

using Vec = __m256;
constexpr int kLanes = 8;
constexpr bool kMasksAreFree = false;
constexpr bool kHasHalf = false;
constexpr bool kManyRegisters = false;

DSP_INLINE __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
}
DSP_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
DSP_INLINE Vec load_lanes(const float* p, int n) { return _mm256_maskload_ps(p, first_lanes(n)); }
DSP_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
DSP_INLINE void store_lanes(float* p, Vec v, int n) { _mm256_maskstore_ps(p, first_lanes(n), v); }
DSP_INLINE Vec set1(float a) { return _mm256_set1_ps(a); }
DSP_INLINE Vec zero() { return _mm256_setzero_ps(); }
DSP_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
DSP_INLINE void fma_to(Vec& c, Vec a, Vec b) { asm("vfmadd231ps %2, %1, %0" : "+x"(c) : "x"(a), "x"(b)); }
DSP_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
DSP_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
DSP_INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
DSP_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
DSP_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
DSP_INLINE Vec max_nan(Vec a, Vec b) {
  return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
}
DSP_INLINE __m256i lanes_of(uint32_t mask) {
  const __m256i bits = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bits), bits);
}
DSP_INLINE Vec merge_mask(Vec v, const float* p, uint32_t mask) {
  const __m256i lanes = lanes_of(mask);
  return _mm256_blendv_ps(v, _mm256_maskload_ps(p, lanes), _mm256_castsi256_ps(lanes));
}
DSP_INLINE void store_mask(float* p, Vec v, uint32_t mask) { _mm256_maskstore_ps(p, lanes_of(mask), v); }
DSP_INLINE Vec keep_lanes(Vec v, int n) { return _mm256_and_ps(v, _mm256_castsi256_ps(first_lanes(n))); }
DSP_INLINE Vec where_positive(Vec sign, Vec v) {
  return _mm256_and_ps(v, _mm256_cmp_ps(sign, zero(), _CMP_NLE_UQ));
}
DSP_INLINE Vec even(Vec a, Vec b) {
  const Vec mixed = _mm256_shuffle_ps(a, b, 0x88);
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xd8));
}

DSP_INLINE void store_apart(float* evens, float* odds, Vec v) {
  const Vec apart = _mm256_permutevar8x32_ps(v, _mm256_set_epi32(7, 5, 3, 1, 6, 4, 2, 0));
  _mm_storeu_ps(evens, _mm256_castps256_ps128(apart));
  _mm_storeu_ps(odds, _mm256_extractf128_ps(apart, 1));
}

DSP_INLINE Vec zip_low(Vec a, Vec b) {
  return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
}
DSP_INLINE Vec zip_high(Vec a, Vec b) {
  return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
}

DSP_INLINE float sum_lanes(Vec v) {
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

#else

using Vec = float __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr bool kMasksAreFree = false;
constexpr bool kHasHalf = false;
#if defined(__aarch64__)
constexpr bool kManyRegisters = true;
#else
constexpr bool kManyRegisters = false;
#endif

DSP_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
DSP_INLINE Vec load_lanes(const float* p, int n) {
  Vec v = {0, 0, 0, 0};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
DSP_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof(v)); }
DSP_INLINE void store_lanes(float* p, Vec v, int n) {
  for (int i = 0; i < n; ++i) p[i] = v[i];
}
DSP_INLINE Vec set1(float a) { return Vec{a, a, a, a}; }
DSP_INLINE Vec zero() { return Vec{0, 0, 0, 0}; }
#if defined(__aarch64__)
DSP_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return reinterpret_cast<Vec>(vfmaq_f32(reinterpret_cast<float32x4_t>(c), reinterpret_cast<float32x4_t>(a),
                                         reinterpret_cast<float32x4_t>(b)));
}
#else
DSP_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
#endif
DSP_INLINE Vec add(Vec a, Vec b) { return a + b; }
DSP_INLINE Vec mul(Vec a, Vec b) { return a * b; }
DSP_INLINE Vec div(Vec a, Vec b) { return a / b; }
DSP_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
DSP_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
DSP_INLINE Vec max_nan(Vec a, Vec b) { return (a != a) | (b < a) ? a : b; }
DSP_INLINE Vec merge_mask(Vec v, const float* p, uint32_t mask) {
  if (mask == (1u << kLanes) - 1u) return load(p);
  for (int i = 0; i < kLanes; ++i)
    if ((mask >> i & 1u) != 0) v[i] = p[i];
  return v;
}
DSP_INLINE void store_mask(float* p, Vec v, uint32_t mask) {
  if (mask == (1u << kLanes) - 1u) {
    store(p, v);
    return;
  }
  for (int i = 0; i < kLanes; ++i)
    if ((mask >> i & 1u) != 0) p[i] = v[i];
}
DSP_INLINE Vec keep_lanes(Vec v, int n) {
  for (int i = n; i < kLanes; ++i) v[i] = 0;
  return v;
}
DSP_INLINE Vec where_positive(Vec sign, Vec v) { return sign <= zero() ? zero() : v; }
DSP_INLINE float sum_lanes(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
DSP_INLINE Vec even(Vec a, Vec b) { return Vec{a[0], a[2], b[0], b[2]}; }
DSP_INLINE void store_apart(float* evens, float* odds, Vec v) {
  for (int i = 0; i < kLanes / 2; ++i) {
    evens[i] = v[2 * i];
    odds[i] = v[2 * i + 1];
  }
}
DSP_INLINE Vec zip_low(Vec a, Vec b) { return Vec{a[0], b[0], a[1], b[1]}; }
DSP_INLINE Vec zip_high(Vec a, Vec b) { return Vec{a[2], b[2], a[3], b[3]}; }

#endif

#if !defined(__AVX512F__) && !defined(__AVX2__)
DSP_INLINE void fma_to(Vec& c, Vec a, Vec b) { c = fma(a, b, c); }
#endif

#if !defined(__AVX512F__)
DSP_INLINE Vec load_expand(const float* p, uint32_t mask) {
  float lanes[kLanes] = {};
  for (int i = 0; i < kLanes; ++i)
    if ((mask >> i & 1u) != 0) lanes[i] = *p++;
  return load(lanes);
}
// Never taken: two half vectors make one only where kHasHalf.
DSP_INLINE Vec load_half(const float* lo, const float*) { return load(lo); }
DSP_INLINE Vec load_half_lanes(const float* lo, const float*, int n) { return load_lanes(lo, n); }
DSP_INLINE void store_half_lanes(float* lo, float*, Vec v, int n) { store_lanes(lo, v, n); }
#endif

// A vector of 64 bytes on every machine, which the compiler cuts to the width at hand: sums over it have the
// same order everywhere. Operators do the arithmetic.
template <typename T>
struct WideVector {
  typedef T Type __attribute__((vector_size(64)));
};
template <typename T>
using Wide = typename WideVector<T>::Type;
template <typename T>
constexpr int64_t kWideLanes = 64 / sizeof(T);

// By halves, on every machine.
template <typename T>
DSP_INLINE T sum_wide(const Wide<T>& v) {
  constexpr int64_t lanes = kWideLanes<T>;
  alignas(64) T a[lanes];
  __builtin_memcpy(a, &v, sizeof(a));
  for (int64_t half = lanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) a[i] += a[i + half];
  return a[0];
}

#if defined(__AVX512F__)
template <>
DSP_INLINE float sum_wide<float>(const Wide<float>& v) {
  return sum_lanes(reinterpret_cast<Vec>(v));
}
#endif

// Past the caches: for outputs that nobody reads soon, at aligned addresses.
template <typename T>
DSP_INLINE void stream_wide(const Wide<T>& v, T* at) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(at), reinterpret_cast<__m512i>(v));
#elif defined(__AVX2__)
  __m256i halves[2];
  __builtin_memcpy(halves, &v, sizeof(halves));
  _mm256_stream_si256(reinterpret_cast<__m256i*>(at), halves[0]);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(at) + 1, halves[1]);
#else
  __builtin_memcpy(at, &v, sizeof(v));
#endif
}

}  // namespace DSP_ISA
}  // namespace dsp
