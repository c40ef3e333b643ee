// The KV of a cache, in blocks: where it is, how it is written, and how it is read.
//
// Quantized numbers are bfloat16 for whoever multiplies: each fp8 and each int8 is one, exactly.
// What scales they have is left to him, since a product may be scaled once instead of every factor.
#pragma once

#include <cstdint>
#include <type_traits>

#include "simd.h"

namespace kvrelay {

enum class KvKind : std::int32_t { kBfloat16 = 0, kFp8 = 1, kInt8 = 2 };

// body(std::integral_constant kind)
template <class Body>
inline void with_kind(KvKind kind, const Body& body) {
  switch (kind) {
    case KvKind::kBfloat16:
      return body(std::integral_constant<KvKind, KvKind::kBfloat16>());
    case KvKind::kFp8: return body(std::integral_constant<KvKind, KvKind::kFp8>());
    case KvKind::kInt8: return body(std::integral_constant<KvKind, KvKind::kInt8>());
  }
}

constexpr int value_num_bytes(KvKind kind) { return kind == KvKind::kBfloat16 ? 2 : 1; }

// Where one layer's K and V of a worker's cache are. All distances in bytes.
struct KvView {
  KvKind kind;
  std::uint8_t* data;  // of this layer, K
  std::int64_t block_stride;
  std::int64_t value_offset;  // from a K to its V
  std::int64_t slot_stride;
  int block_shift;  // blocks are of 2**block_shift slots

  // Of int8: one bfloat16 per slot and head.
  std::uint8_t* scales;  // of this layer, K's
  std::int64_t scale_value_offset;
  std::int64_t scale_slot_stride;

  std::uint8_t* key(const std::int32_t* table, int position) const {
    return data + block(table, position) * block_stride + slot(position) * slot_stride;
  }
  // [num_kv_heads], those of V scale_value_offset further on.
  bf16* key_scales(const std::int32_t* table, int position) const {
    return reinterpret_cast<bf16*>(scales + block(table, position) * block_stride +
                                   slot(position) * scale_slot_stride);
  }
  bf16* value_scales(const std::int32_t* table, int position) const {
    return key_scales(table, position) + scale_value_offset / std::int64_t(sizeof(bf16));
  }

 private:
  std::int64_t block(const std::int32_t* table, int position) const {
    return table[position >> block_shift];
  }
  std::int64_t slot(int position) const { return position & ((1 << block_shift) - 1); }
};

// Writes heads side by side, as KvLayout has it. `scales`: [num_heads], for int8 alone.
void keep(KvKind kind, const float* x, int num_heads, int dim, std::uint8_t* values, bf16* scales);

constexpr int kExpanded = 32;  // numbers of one vector of bfloat16

// Thirty-two int8 as bfloat16.
inline __m512i expand_int8(__m256i numbers) {
  const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(numbers)));
  const __m512 high =
      _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(numbers, 1)));
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// What e4m3 has beside plain exponents, by the low five bits: 0 to 7 of its smallest steps, and
// "no number".
alignas(64) constexpr bf16 kFp8Oddities[kExpanded] = {
    0x0000, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60,  //
    0,      0,      0,      0,      0,      0,      0,      0,       //
    0,      0,      0,      0,      0,      0,      0,      0,       //
    0,      0,      0,      0,      0,      0,      0,      0x7fc0};

// Thirty-two e4m3 as bfloat16.
inline __m512i expand_fp8(__m256i numbers) {
  const __m512i wide = _mm512_cvtepi8_epi16(numbers);
  // The sign is where it belongs; exponents begin at -6 there and at -126 here.
  const __m512i shifted =
      _mm512_and_si512(_mm512_slli_epi16(wide, 4), _mm512_set1_epi16(short(0x87f0)));
  const __m512i plain = _mm512_add_epi16(shifted, _mm512_set1_epi16(120 << 7));
  // 0x7f, which is no number, comes round to 0; 0 to 7 steps, which have no exponent, to 1 to 8.
  const __m256i turned = _mm256_and_si256(_mm256_add_epi8(numbers, _mm256_set1_epi8(1)),
                                          _mm256_set1_epi8(0x7f));
  const __mmask32 is_odd = _mm256_cmplt_epi8_mask(turned, _mm256_set1_epi8(9));
  const __m512i odd = _mm512_mask_permutexvar_epi16(plain, is_odd, wide,
                                                    _mm512_load_si512(kFp8Oddities));
  return _mm512_or_si512(odd, _mm512_and_si512(shifted, _mm512_set1_epi16(short(0x8000))));
}

template <KvKind kKind>
inline __m512i expand(__m256i numbers) {
  static_assert(kKind != KvKind::kBfloat16, "there is nothing to expand");
  return kKind == KvKind::kInt8 ? expand_int8(numbers) : expand_fp8(numbers);
}

// `size` numbers as bfloat16; `to` is written up to a multiple of kExpanded, with zeros.
template <KvKind kKind>
inline void expand_row(const std::uint8_t* from, int size, bf16* to) {
  int i = 0;
  for (; i + kExpanded <= size; i += kExpanded) {
    const __m256i numbers = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    _mm512_storeu_si512(to + i, expand<kKind>(numbers));
  }
  if (i < size) {
    const __m256i numbers = _mm256_maskz_loadu_epi8((1u << (size - i)) - 1, from + i);
    _mm512_storeu_si512(to + i, expand<kKind>(numbers));
  }
}

// Thirty-two numbers as floats, in an order that `join` undoes.
template <KvKind kKind>
inline void split(const std::uint8_t* from, __mmask32 lanes, __m512& a, __m512& b) {
  if constexpr (kKind == KvKind::kInt8) {
    const __m256i numbers = _mm256_maskz_loadu_epi8(lanes, from);
    a = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(numbers)));
    b = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(numbers, 1)));
  } else {
    __m512i numbers;
    if constexpr (kKind == KvKind::kBfloat16) {
      numbers = _mm512_maskz_loadu_epi16(lanes, from);
    } else {
      numbers = expand<kKind>(_mm256_maskz_loadu_epi8(lanes, from));
    }
    a = _mm512_castsi512_ps(_mm512_slli_epi32(numbers, 16));
    b = _mm512_castsi512_ps(_mm512_and_si512(numbers, _mm512_set1_epi32(int(0xffff0000))));
  }
}

// As bfloat16, to nearest.
template <KvKind kKind>
inline __m512i join(__m512 a, __m512 b) {
  if constexpr (kKind == KvKind::kInt8) return (__m512i)_mm512_cvtne2ps_pbh(b, a);
  const __m512i even = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(a));
  const __m512i odd = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(b));
  return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
}

}  // namespace kvrelay
