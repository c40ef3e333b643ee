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

inline __mmask32 dims_left(int left) {
  return left >= kDims ? __mmask32(~0u) : __mmask32((1u << left) - 1);
}

// Blocks lie far apart, and no processor guesses the next one: what is read a little later is
// asked for, a line at a time, since a burst of such wishes would not be heard.
inline void ask_for(const bf16* at) {
  _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
}

// Products of one query with the keys of sixteen positions.
template <bool kWhole, bool kAsks>
inline __m512 score(const bf16* query, const bf16* const* keys, int at, int dim) {
  __m512 acc[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) acc[i] = _mm512_setzero_ps();
  for (int d = 0; d < dim; d += kDims) {
    const __mmask32 lanes = kWhole ? __mmask32(~0u) : dims_left(dim - d);
    const __m512i q = _mm512_maskz_loadu_epi16(lanes, query + d);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      const bf16* key = keys[i] + at + d;
      if (kAsks) ask_for(keys[i + kAhead] + at + d);
      const __m512i k = kWhole ? _mm512_loadu_si512(key) : _mm512_maskz_loadu_epi16(lanes, key);
      acc[i] = dot_pairs(acc[i], q, k);
    }
  }
  return sum_each(acc);
}

// result[head] += weights[head][i] * values[i] for up to kChunkHeads heads that share values,
// kChunkDims of them, position after position.
template <int kHeads, bool kWhole>
inline void weigh_heads(const bf16* const* values, int count, std::int64_t at, int dims_left,
                        const float* weights, std::size_t weights_stride, float* result,
                        std::size_t width) {
  constexpr int kVectors = kChunkDims / kLanes;
  __mmask16 lanes[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const int left = dims_left - v * kLanes;
    lanes[v] = left > 0 ? first_lanes(left) : __mmask16(0);
  }
  __m512 acc[kHeads][kVectors];
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[h][v] = _mm512_loadu_ps(result + h * width + v * kLanes);
  }
  for (int i = 0; i < count; ++i) {
    const bf16* value = values[i] + at;
    ask_for(values[i + kAhead] + at);
    ask_for(values[i + kAhead] + at + kDims);
    __m512 x[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const bf16* part = value + v * kLanes;
      const __m256i half = kWhole ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(part))
                                  : _mm256_maskz_loadu_epi16(lanes[v], part);
      x[v] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
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

template <int kHeads>
void weigh_heads_of(const bf16* const* values, int count, std::int64_t at, int dims_left,
                    const float* weights, std::size_t weights_stride, float* result,
                    std::size_t width) {
  if (dims_left >= kChunkDims) {
    weigh_heads<kHeads, true>(values, count, at, dims_left, weights, weights_stride, result, width);
  } else {
    weigh_heads<kHeads, false>(values, count, at, dims_left, weights, weights_stride, result,
                               width);
  }
}

void weigh(const bf16* const* values, int count, std::int64_t at, int dims_left,
           const float* weights, std::size_t stride, int num_heads, float* result,
           std::size_t width) {
  switch (num_heads) {
    case 1: return weigh_heads_of<1>(values, count, at, dims_left, weights, stride, result, width);
    case 2: return weigh_heads_of<2>(values, count, at, dims_left, weights, stride, result, width);
    case 3: return weigh_heads_of<3>(values, count, at, dims_left, weights, stride, result, width);
    default: return weigh_heads_of<4>(values, count, at, dims_left, weights, stride, result, width);
  }
}

}  // namespace

GenerationAttention::GenerationAttention(const AttentionShape& shape) : shape_(shape) {}

void GenerationAttention::run(Team& team, const KvView& kv, int num_rows,
                              const std::int32_t* positions, const std::int32_t* const* tables,
                              const bf16* queries, bf16* out, std::int64_t stride) {
  const int longest = *std::max_element(positions, positions + num_rows) + 1;
  const int num_heads = shape_.num_heads, num_kv_heads = shape_.num_kv_heads;
  const std::size_t width = std::size_t(num_heads) * shape_.head_dim;
  // In large steps, so that memory is not asked for anew with every few tokens.
  const std::size_t padded = round_up(longest, kKeysOfScratch) + kLanes;
  const std::size_t scratch_size = num_heads * (padded + round_up(shape_.head_dim, kChunkDims));
  scratch_.at_least(scratch_size * team.max_threads());
  rows_.at_least((padded + kAhead) * team.max_threads());
  // A turn takes all heads of a row, since they lie side by side in memory; only where there
  // are fewer rows than threads do heads take turns of their own.
  const int parts = num_rows < team.num_threads() ? num_kv_heads : 1;
  team.run(num_rows * parts, [&](int turn, int thread) {
    const int row = turn / parts, part = turn % parts;
    const Heads heads{part * num_kv_heads / parts, (part + 1) * num_kv_heads / parts};
    attend(kv, positions[row], tables[row], heads, queries + row * width, out + row * stride,
           scratch_.data() + scratch_size * thread, rows_.data() + (padded + kAhead) * thread);
  });
}

void GenerationAttention::attend(const KvView& kv, int position, const std::int32_t* table,
                                 Heads heads, const bf16* queries, bf16* out,
                                 float* scratch, const bf16** rows) const {
  const int dim = shape_.head_dim, group = shape_.group();
  const int first = shape_.first_seen(position) / kLanes * kLanes;
  const int num_keys = position + 1 - first;
  const int padded = round_up(num_keys, kLanes);
  const int num_heads = (heads.end - heads.begin) * group;
  const __m512 nothing = _mm512_set1_ps(-1e30f);
  const int first_seen = shape_.first_seen(position) - first;
  const std::size_t width = round_up(dim, kChunkDims);
  float* scores = scratch;                                 // [num_heads][padded]
  float* result = scratch + std::size_t(num_heads) * padded;  // [num_heads][width]

  // Where each position's K is; beyond the last, the last once more.
  for (int i = 0; i < padded + kAhead; ++i) {
    rows[i] = kv.key(table, std::min(first + i, position));
  }
  for (int i = 0; i < padded; i += kLanes) {
    const __mmask16 seen = first_lanes(num_keys - i) &
                           __mmask16(first_seen > i ? ~first_lanes(first_seen - i) : 0xffff);
    for (int head = 0; head < num_heads; ++head) {
      const bf16* query = queries + (heads.begin * group + head) * dim;
      const int at = (heads.begin + head / group) * dim;
      const auto products = dim % kDims != 0    ? score<false, true>
                            : head % group == 0 ? score<true, true>
                                                : score<true, false>;
      _mm512_storeu_ps(scores + std::size_t(head) * padded + i,
                       _mm512_mask_mov_ps(nothing, seen, products(query, rows + i, at, dim)));
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
      const int at = (heads.begin + head / group) * dim;
      for (int own = head; own < head + group; own += kChunkHeads) {
        const int together = std::min(kChunkHeads, head + group - own);
        for (int chunk = 0; chunk < dim; chunk += kChunkDims) {
          weigh(rows + i, count, kv.value_offset + at + chunk, dim - chunk, scores + std::size_t(own) * padded + i,
                padded, together, result + own * width + chunk, width);
        }
      }
    }
  }

  for (int head = 0; head < num_heads; ++head) {
    bf16* to = out + (heads.begin * group + head) * dim;
    for (int d = 0; d < dim; d += kLanes) {
      const __m512 values = _mm512_loadu_ps(result + head * width + d);
      _mm256_mask_storeu_epi16(to + d, first_lanes(dim - d), (__m256i)_mm512_cvtneps_pbh(values));
    }
  }
}

}  // namespace kvrelay
