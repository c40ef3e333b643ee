#include <algorithm>
#include <vector>

#include "attention.h"

namespace kvrelay {
namespace {

constexpr int kDims = 32;        // bfloat16 of one vector
constexpr int kChunkDims = 64;   // of a value, added up at once
constexpr int kChunkHeads = 4;   // that share the loads of a value
constexpr int kAhead = kLanes;     // positions from where is read to what is asked for

constexpr int kKeysOfScratch = 512;

// KV heads of one turn.
using Heads = GenerationAttention::Heads;

int round_up(int value, int to) { return (value + to - 1) / to * to; }

// The sums of sixteen vectors, as one. A fixed tree.
inline __m512 sum_each(__m512 (&x)[kLanes]) {
  __m512 pairs[8], quads[4], eights[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]),
                             _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d even = _mm512_castps_pd(pairs[2 * i]), odd = _mm512_castps_pd(pairs[2 * i + 1]);
    quads[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(even, odd)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd)));
  }
  // Now each quarter of a vector holds four sums of its own quarter.
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    eights[i] = _mm512_add_ps(_mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0x88),
                              _mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0xdd));
  }
  return _mm512_add_ps(_mm512_shuffle_f32x4(eights[0], eights[1], 0x88),
                       _mm512_shuffle_f32x4(eights[0], eights[1], 0xdd));
}

inline __mmask32 dims_left_of(int left) {
  if (left <= 0) return 0;
  return left >= kDims ? __mmask32(~0u) : __mmask32((1u << left) - 1);
}

// Blocks lie far apart, and no processor guesses the next one: what is read a little later is
// asked for, a line at a time, since a burst of such wishes would not be heard.
inline void ask_for(const void* at) {
  _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T0);
}

// Products of one query with the keys of sixteen positions, bfloat16 that lie `at` bytes on.
template <bool kWhole, bool kAsks>
inline __m512 score(const bf16* query, const std::uint8_t* const* keys, std::int64_t at, int dim) {
  __m512 acc[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) acc[i] = _mm512_setzero_ps();
  for (int d = 0; d < dim; d += kDims) {
    const __mmask32 lanes = kWhole ? __mmask32(~0u) : dims_left_of(dim - d);
    const __m512i q = _mm512_maskz_loadu_epi16(lanes, query + d);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      const std::uint8_t* key = keys[i] + at + d * sizeof(bf16);
      if (kAsks) ask_for(keys[i + kAhead] + at + d * sizeof(bf16));
      const __m512i k = kWhole ? _mm512_loadu_si512(key) : _mm512_maskz_loadu_epi16(lanes, key);
      acc[i] = dot_pairs(acc[i], q, k);
    }
  }
  return sum_each(acc);
}

// result[head] += weights[head][i] * values[i] for up to kChunkHeads heads that share values,
// kChunkDims of them, `at` bytes on, position after position. Results are in the order of `split`.
template <KvKind kKind, int kHeads, bool kWhole>
inline void weigh_heads(const std::uint8_t* const* values, int count, std::int64_t at,
                        int dims_left, const float* weights, std::size_t weights_stride,
                        float* result, std::size_t width) {
  constexpr int kVectors = kChunkDims / kLanes;
  constexpr int kPartBytes = kDims * value_num_bytes(kKind);
  const __mmask32 first = kWhole ? __mmask32(~0u) : dims_left_of(dims_left);
  const __mmask32 second = kWhole ? __mmask32(~0u) : dims_left_of(dims_left - kDims);
  __m512 acc[kHeads][kVectors];
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[h][v] = _mm512_loadu_ps(result + h * width + v * kLanes);
  }
  for (int i = 0; i < count; ++i) {
    const std::uint8_t* value = values[i] + at;
    const std::uint8_t* later = values[i + kAhead] + at;
    ask_for(later);
    if (2 * kPartBytes > int(kLineBytes)) ask_for(later + kLineBytes);
    __m512 x[kVectors];
    split<kKind>(value, first, x[0], x[1]);
    split<kKind>(value + kPartBytes, second, x[2], x[3]);
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
      const __m512 weight = _mm512_set1_ps(weights[h * weights_stride + i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[h][v] = _mm512_fmadd_ps(weight, x[v], acc[h][v]);
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(result + h * width + v * kLanes, acc[h][v]);
  }
}

template <KvKind kKind, int kHeads>
void weigh_heads_of(const std::uint8_t* const* values, int count, std::int64_t at, int dims_left,
                    const float* weights, std::size_t stride, float* result, std::size_t width) {
  const auto weigh_them = dims_left >= kChunkDims ? weigh_heads<kKind, kHeads, true>
                                                  : weigh_heads<kKind, kHeads, false>;
  weigh_them(values, count, at, dims_left, weights, stride, result, width);
}

template <KvKind kKind>
void weigh(const std::uint8_t* const* values, int count, std::int64_t at, int dims_left,
           const float* weights, std::size_t stride, int num_heads, float* result,
           std::size_t width) {
  const auto weigh_them = num_heads == 1   ? weigh_heads_of<kKind, 1>
                          : num_heads == 2 ? weigh_heads_of<kKind, 2>
                          : num_heads == 3 ? weigh_heads_of<kKind, 3>
                                           : weigh_heads_of<kKind, 4>;
  weigh_them(values, count, at, dims_left, weights, stride, result, width);
}

// What sixteen positions keep, `at` bytes on, as bfloat16: [kLanes][width].
template <KvKind kKind>
void expand_rows(const std::uint8_t* const* rows, std::int64_t at, int dim, std::size_t width,
                 bf16* to) {
  for (int i = 0; i < kLanes; ++i) {
    for (int d = 0; d < dim; d += int(kLineBytes)) ask_for(rows[i + kAhead] + at + d);
    expand_row<kKind>(rows[i] + at, dim, to + i * width);
  }
}

// Of sixteen positions the scales of one head, `at` further on.
__m512 scales_of(const bf16* const* rows, std::int64_t at) {
  alignas(64) bf16 scales[kLanes];
  for (int i = 0; i < kLanes; ++i) scales[i] = rows[i][at];
  return load_bf16(scales);
}

}  // namespace

GenerationAttention::GenerationAttention(const AttentionShape& shape) : shape_(shape) {}

void GenerationAttention::run(Team& team, const KvView& kv, int num_rows,
                              const std::int32_t* positions, const std::int32_t* const* tables,
                              const bf16* queries, bf16* out, std::int64_t stride) {
  with_kind(kv.kind, [&](auto kind) {
    run_kind<decltype(kind)::value>(team, kv, num_rows, positions, tables, queries, out, stride);
  });
}

template <KvKind kKind>
void GenerationAttention::run_kind(Team& team, const KvView& kv, int num_rows,
                                   const std::int32_t* positions,
                                   const std::int32_t* const* tables, const bf16* queries,
                                   bf16* out, std::int64_t stride) {
  const int longest = *std::max_element(positions, positions + num_rows) + 1;
  const int num_heads = shape_.num_heads, num_kv_heads = shape_.num_kv_heads;
  const std::size_t width = std::size_t(num_heads) * shape_.head_dim;
  // In large steps, so that memory is not asked for anew with every few tokens.
  const std::size_t padded = round_up(longest, kKeysOfScratch) + kLanes;
  const std::size_t scratch_size = num_heads * (padded + round_up(shape_.head_dim, kChunkDims));
  scratch_.at_least(scratch_size * team.max_threads());
  const std::size_t num_slots = padded + kAhead;
  const std::size_t expanded_size = kLanes * std::size_t(round_up(shape_.head_dim, kChunkDims));
  rows_.at_least(num_slots * team.max_threads());
  key_scales_.at_least(num_slots * team.max_threads());
  expanded_.at_least(expanded_size * team.max_threads());
  // A turn takes all heads of a row, since they lie side by side in memory; only where there
  // are fewer rows than threads do heads take turns of their own.
  const int parts = num_rows < team.num_threads() ? num_kv_heads : 1;
  team.run(num_rows * parts, [&](int turn, int thread) {
    const int row = turn / parts, part = turn % parts;
    const Heads heads{part * num_kv_heads / parts, (part + 1) * num_kv_heads / parts};
    const Scratch scratch{scratch_.data() + scratch_size * thread,
                          rows_.data() + num_slots * thread,
                          key_scales_.data() + num_slots * thread,
                          expanded_.data() + expanded_size * thread};
    attend<kKind>(kv, positions[row], tables[row], heads, queries + row * width,
                  out + row * stride, scratch);
  });
}

template <KvKind kKind>
void GenerationAttention::attend(const KvView& kv, int position, const std::int32_t* table,
                                 Heads heads, const bf16* queries, bf16* out,
                                 const Scratch& scratch) const {
  constexpr bool kIsPlain = kKind == KvKind::kBfloat16, kIsScaled = kKind == KvKind::kInt8;
  const int dim = shape_.head_dim, group = shape_.group();
  const int first = shape_.first_seen(position) / kLanes * kLanes;
  const int num_keys = position + 1 - first;
  const int padded = round_up(num_keys, kLanes);
  const int num_heads = (heads.end - heads.begin) * group;
  const __m512 nothing = _mm512_set1_ps(-1e30f);
  const int first_seen = shape_.first_seen(position) - first;
  const std::size_t width = round_up(dim, kChunkDims);
  float* scores = scratch.scores;                            // [num_heads][padded]
  float* result = scores + std::size_t(num_heads) * padded;  // [num_heads][width]
  const std::uint8_t** rows = scratch.rows;
  const bf16** key_scales = scratch.key_scales;
  const std::uint8_t* expanded[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    expanded[i] = reinterpret_cast<const std::uint8_t*>(scratch.expanded + i * width);
  }

  // Where each position's K is; beyond the last, the last once more.
  for (int i = 0; i < padded + kAhead; ++i) {
    rows[i] = kv.key(table, std::min(first + i, position));
    if (kIsScaled) key_scales[i] = kv.key_scales(table, std::min(first + i, position));
  }
  for (int i = 0; i < padded; i += kLanes) {
    const __mmask16 seen = first_lanes(num_keys - i) &
                           __mmask16(first_seen > i ? ~first_lanes(first_seen - i) : 0xffff);
    __m512 scales = nothing;
    for (int head = 0; head < num_heads; ++head) {
      const bf16* query = queries + (heads.begin * group + head) * dim;
      const int kv_head = heads.begin + head / group;
      const std::int64_t at = kv_head * dim * value_num_bytes(kKind);
      __m512 products;
      if constexpr (kIsPlain) {
        const auto score_them = dim % kDims != 0    ? score<false, true>
                                : head % group == 0 ? score<true, true>
                                                    : score<true, false>;
        products = score_them(query, rows + i, at, dim);
      } else {
        if (head % group == 0) {
          expand_rows<kKind>(rows + i, at, dim, width, scratch.expanded);
          if (kIsScaled) scales = scales_of(key_scales + i, kv_head);
        }
        const auto score_them = dim % kDims != 0 ? score<false, false> : score<true, false>;
        products = score_them(query, expanded, 0, dim);
        if (kIsScaled) products = _mm512_mul_ps(products, scales);
      }
      _mm512_storeu_ps(scores + std::size_t(head) * padded + i,
                       _mm512_mask_mov_ps(nothing, seen, products));
    }
  }

  for (int head = 0; head < num_heads; ++head) {
    float* own = scores + std::size_t(head) * padded;
    __m512 top = nothing, total = _mm512_setzero_ps();
    for (int i = 0; i < padded; i += kLanes) top = _mm512_max_ps(top, _mm512_loadu_ps(own + i));
    const __m512 shift = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    for (int i = 0; i < padded; i += kLanes) {
      total = _mm512_add_ps(total, exp2(_mm512_sub_ps(_mm512_loadu_ps(own + i), shift)));
    }
    const __m512 divisor = _mm512_set1_ps(_mm512_reduce_add_ps(total));
    for (int i = 0; i < padded; i += kLanes) {
      const __m512 weight = exp2(_mm512_sub_ps(_mm512_loadu_ps(own + i), shift));
      _mm512_storeu_ps(own + i, _mm512_div_ps(weight, divisor));
    }
  }

  std::fill_n(result, num_heads * width, 0.0f);
  for (int i = 0; i < num_keys; i += kLanes) {
    const int count = std::min(kLanes, num_keys - i);
    for (int head = 0; head < num_heads; head += group) {
      const int kv_head = heads.begin + head / group;
      const std::int64_t at = kv.value_offset + kv_head * dim * value_num_bytes(kKind);
      if constexpr (kIsScaled) {
        const __m512 scales =
            scales_of(key_scales + i, kv.scale_value_offset / std::int64_t(sizeof(bf16)) + kv_head);
        for (int own = head; own < head + group; ++own) {
          float* weights = scores + std::size_t(own) * padded + i;
          _mm512_storeu_ps(weights, _mm512_mul_ps(_mm512_loadu_ps(weights), scales));
        }
      }
      for (int own = head; own < head + group; own += kChunkHeads) {
        const int together = std::min(kChunkHeads, head + group - own);
        const float* weights = scores + std::size_t(own) * padded + i;
        for (int chunk = 0; chunk < dim; chunk += kChunkDims) {
          weigh<kKind>(rows + i, count, at + chunk * value_num_bytes(kKind), dim - chunk, weights,
                       padded, together, result + own * width + chunk, width);
        }
      }
    }
  }

  for (int head = 0; head < num_heads; ++head) {
    bf16* to = out + (heads.begin * group + head) * dim;
    for (int d = 0; d < dim; d += kDims) {
      const float* from = result + head * width + d;
      const __m512i values =
          join<kKind>(_mm512_loadu_ps(from), _mm512_loadu_ps(from + kLanes));
      _mm512_mask_storeu_epi16(to + d, dims_left_of(dim - d), values);
    }
  }
}

}  // namespace kvrelay
