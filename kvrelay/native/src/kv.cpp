#include "kv.h"

#include <cmath>

namespace kvrelay {
namespace {

constexpr float kFp8Max = 448.0f;
constexpr float kInt8Max = 127.0f;
constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

void keep_bf16(const float* x, int size, bf16* to) {
  for (int i = 0; i < size; i += kLanes) {
    const __mmask16 lanes = first_lanes(size - i);
    _mm256_mask_storeu_epi16(to + i, lanes,
                             (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(lanes, x + i)));
  }
}

// Sixteen floats as e4m3, to nearest, ties to even.
__m128i to_fp8(__m512 x) {
  const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(_mm512_castps_si512(x), 24),
                                        _mm512_set1_epi32(0x80));
  // Of two operands the minimum is the second if one is no number.
  const __m512 size = _mm512_min_ps(_mm512_set1_ps(kFp8Max), _mm512_abs_ps(x));
  const __m512i bits = _mm512_castps_si512(size);
  // From 2**-6 on three bits of fraction are kept; below, whole steps of 2**-9 are counted.
  const __m512i is_odd = _mm512_and_si512(_mm512_srli_epi32(bits, 20), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_add_epi32(bits, _mm512_add_epi32(is_odd, _mm512_set1_epi32(0x7ffff)));
  const __m512i plain =
      _mm512_sub_epi32(_mm512_srli_epi32(rounded, 20), _mm512_set1_epi32(120 << 3));
  const __m512i steps = _mm512_cvtps_epi32(
      _mm512_roundscale_ps(_mm512_mul_ps(size, _mm512_set1_ps(512.0f)), kNearest));
  const __mmask16 is_small =
      _mm512_cmp_ps_mask(size, _mm512_set1_ps(0.015625f), _CMP_LT_OQ);
  const __mmask16 is_no_number = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  __m512i result = _mm512_mask_mov_epi32(plain, is_small, steps);
  result = _mm512_mask_mov_epi32(result, is_no_number, _mm512_set1_epi32(0x7f));
  return _mm512_cvtepi32_epi8(_mm512_or_si512(result, sign));
}

void keep_fp8(const float* x, int size, std::uint8_t* to) {
  for (int i = 0; i < size; i += kLanes) {
    const __mmask16 lanes = first_lanes(size - i);
    _mm_mask_storeu_epi8(to + i, lanes, to_fp8(_mm512_maskz_loadu_ps(lanes, x + i)));
  }
}

// The largest magnitude; no number if there is one that is none.
float largest(const float* x, int size) {
  __m512 top = _mm512_setzero_ps();
  __mmask16 is_no_number = 0;
  for (int i = 0; i < size; i += kLanes) {
    const __m512 values = _mm512_maskz_loadu_ps(first_lanes(size - i), x + i);
    is_no_number |= _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    top = _mm512_max_ps(top, _mm512_abs_ps(values));
  }
  return is_no_number ? NAN : _mm512_reduce_max_ps(top);
}

// To nearest, ties to even; the instruction for it takes the smallest numbers for zeros.
bf16 to_bf16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return 0x7fc0;
  return bf16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

bf16 keep_int8(const float* x, int size, std::uint8_t* to) {
  const bf16 scale = to_bf16(largest(x, size) / kInt8Max);
  const __m512 by = _mm512_set1_ps(to_float(scale));
  const __m512 most = _mm512_set1_ps(kInt8Max), least = _mm512_set1_ps(-kInt8Max);
  for (int i = 0; i < size; i += kLanes) {
    const __mmask16 lanes = first_lanes(size - i);
    const __m512 values = _mm512_div_ps(_mm512_maskz_loadu_ps(lanes, x + i), by);
    // What is no number keeps that in its scale.
    const __mmask16 is_number = scale == 0 ? 0 : _mm512_cmp_ps_mask(values, values, _CMP_ORD_Q);
    const __m512 whole = _mm512_roundscale_ps(values, kNearest);
    const __m512 kept = _mm512_maskz_min_ps(is_number, most, _mm512_max_ps(least, whole));
    _mm_mask_storeu_epi8(to + i, lanes, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(kept)));
  }
  return scale;
}

}  // namespace

void keep(KvKind kind, const float* x, int num_heads, int dim, std::uint8_t* values,
          bf16* scales) {
  switch (kind) {
    case KvKind::kBfloat16:
      return keep_bf16(x, num_heads * dim, reinterpret_cast<bf16*>(values));
    case KvKind::kFp8: return keep_fp8(x, num_heads * dim, values);
    case KvKind::kInt8:
      for (int head = 0; head < num_heads; ++head) {
        scales[head] = keep_int8(x + head * dim, dim, values + head * dim);
      }
  }
}

}  // namespace kvrelay
