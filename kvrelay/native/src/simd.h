// Vectors of sixteen floats, and bfloat16 beside them. Nothing here depends on a library's
// mathematics. Whether two makers' processors round bfloat16 products alike is not taken on trust:
// what each makes of fixed rows is part of its numerics' name.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace kvrelay {

using bf16 = std::uint16_t;

constexpr int kLanes = 16;
constexpr float kLog2E = 1.4426950408889634f;

// Denormals as they are and rounding to nearest on this thread, whatever another library chose
// for it: neither may differ between the threads that compute rows.
class PlainFloats {
 public:
  PlainFloats() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~PlainFloats() { _mm_setcsr(before_); }
  PlainFloats(const PlainFloats&) = delete;
  PlainFloats& operator=(const PlainFloats&) = delete;

 private:
  unsigned before_;
};

inline float to_float(bf16 value) {
  const std::uint32_t bits = std::uint32_t(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// Sixteen neighbours as floats, exactly.
inline __m512 load_bf16(const bf16* from) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline __m512 load_half(const std::uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// Rounded to nearest, ties to even.
inline void store_bf16(bf16* to, __m512 values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(values));
}

inline __mmask16 first_lanes(int count) {
  return count >= kLanes ? __mmask16(0xffff) : __mmask16((1u << count) - 1);
}

// acc + sum of the products of two neighbours, per lane. `a` and `b` are pairs of bfloat16.
inline __m512 dot_pairs(__m512 acc, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}

// The pair at `from`, in every lane.
inline __m512i broadcast_pair(const bf16* from) {
  std::int32_t pair;
  std::memcpy(&pair, from, sizeof pair);
  return _mm512_set1_epi32(pair);
}

// 2**x, to about one unit in the last place; 0 far below, for x up to 127. Of no number, none:
// of two operands the maximum is the second then.
// Taylor's series of 2**f around 0 for |f| <= 1/2, where seven terms leave less than 2**-24.
inline __m512 exp2(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-150.0f), x);
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(1.5403530393381609e-4f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3333558146428443e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291076284772e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504108664821580e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022650695910071e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718055994531e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, whole);
}

// gate / (1 + e**-gate) * up
inline __m512 swiglu(__m512 gate, __m512 up) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 low = _mm512_mul_ps(gate, _mm512_set1_ps(-kLog2E));
  const __m512 power = exp2(_mm512_min_ps(low, _mm512_set1_ps(126.0f)));
  return _mm512_mul_ps(_mm512_div_ps(gate, _mm512_add_ps(one, power)), up);
}

}  // namespace kvrelay
