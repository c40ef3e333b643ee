#include <algorithm>
#include <type_traits>

#include "attention.h"
#include "tile.h"

namespace kvrelay {
namespace {

constexpr int kTileVectors = kKeyTile / kLanes;
static_assert(kTileVectors == kPanelVectors, "scores are a product with a panel of keys");

// Queries of one turn: with a group of three heads, 96 rows, whose scores fit the first cache.
constexpr int kTurnPositions = 32;

// Lower than any score, and yet a number: what is masked weighs 2**-large = 0 beside it.
constexpr float kNothing = -1e30f;

int ceil_div(int value, int by) { return (value + by - 1) / by; }
int round_up(int value, int to) { return ceil_div(value, to) * to; }

}  // namespace

// What a thread keeps of the rows of its turn.
struct PromptAttention::Scratch {
  float* highest;   // [rows]
  float* total;     // [rows][kLanes]: sums of weights, by lane
  float* scores;    // [rows][kKeyTile]
  float* result;    // [rows][value_panels * kPanelOutputs]
  bf16* weights;    // [rows][kKeyTile]

  static std::size_t size(int num_rows, int value_panels) {
    const std::size_t rows = std::size_t(num_rows + kLanes);
    return rows * (1 + kLanes + kKeyTile + std::size_t(value_panels) * kPanelOutputs + kKeyTile / 2);
  }

  Scratch(float* at, int num_rows, int value_panels) {
    const std::size_t rows = std::size_t(num_rows);
    total = at;
    scores = total + rows * kLanes;
    result = scores + rows * kKeyTile;
    weights = reinterpret_cast<bf16*>(result + rows * value_panels * kPanelOutputs);
    highest = reinterpret_cast<float*>(weights + rows * kKeyTile);
  }
};

PromptAttention::PromptAttention(const AttentionShape& shape)
    : shape_(shape),
      value_panels_(ceil_div(shape.head_dim, kPanelOutputs)),
      key_tile_size_(std::size_t(shape.head_dim) * kKeyTile),
      value_tile_size_(std::size_t(value_panels_) * kPanelOutputs * kKeyTile) {}

void PromptAttention::run(Team& team, const KvView& kv, const Run& run, const bf16* queries,
                          bf16* out, std::int64_t stride) {
  with_kind(kv.kind, [&](auto kind) {
    run_kind<decltype(kind)::value>(team, kv, run, queries, out, stride);
  });
}

template <KvKind kKind>
void PromptAttention::run_kind(Team& team, const KvView& kv, const Run& run, const bf16* queries,
                               bf16* out, std::int64_t stride) {
  constexpr bool kIsScaled = kKind == KvKind::kInt8;
  const int num_keys = run.start + run.num_rows;
  const int first_tile = shape_.first_seen(run.start) / kKeyTile;
  num_tiles_ = ceil_div(num_keys, kKeyTile) - first_tile;
  const std::size_t tiles = std::size_t(num_tiles_) * shape_.num_kv_heads;
  keys_.at_least(tiles * key_tile_size_);
  values_.at_least(tiles * value_tile_size_);
  key_scales_.at_least(tiles * kKeyTile);
  value_scales_.at_least(tiles * kKeyTile);
  const std::size_t row_size = 2 * round_up(shape_.head_dim, kExpanded);
  expanded_.at_least(row_size * team.max_threads());
  team.run(int(tiles), [&](int turn, int thread) {
    pack<kKind>(kv, run, first_tile, turn % num_tiles_, turn / num_tiles_,
                expanded_.data() + row_size * thread);
  });

  const int rows_of_turn = kTurnPositions * shape_.group();
  const std::size_t scratch_size = Scratch::size(rows_of_turn, value_panels_);
  scratch_.at_least(scratch_size * team.max_threads());
  const int num_parts = ceil_div(run.num_rows, kTurnPositions);
  team.run(num_parts * shape_.num_kv_heads, [&](int turn, int thread) {
    // The longest first, so that no thread is left alone with one at the end.
    const int part = num_parts - 1 - turn / shape_.num_kv_heads;
    const int first = part * kTurnPositions;
    attend<kIsScaled>(run, first_tile, turn % shape_.num_kv_heads, first,
                      std::min(kTurnPositions, run.num_rows - first), queries, out, stride,
                      scratch_.data() + scratch_size * thread);
  });
}

// One tile of keys and values of one head, as panels. Slots beyond the run are zeros: whatever
// lies in them may be no number at all, and would spoil even a weight of zero.
template <KvKind kKind>
void PromptAttention::pack(const KvView& kv, const Run& run, int first_tile, int tile, int kv_head,
                           bf16* expanded) {
  const int dim = shape_.head_dim;
  const std::size_t at = std::size_t(kv_head) * num_tiles_ + tile;
  bf16* keys = keys_.data() + at * key_tile_size_;
  bf16* values = values_.data() + at * value_tile_size_;
  const int first = (first_tile + tile) * kKeyTile;
  const int num_keys = std::min(kKeyTile, run.start + run.num_rows - first);
  if (num_keys < kKeyTile) std::memset(keys, 0, key_tile_size_ * sizeof(bf16));
  if (num_keys < kKeyTile || dim % kPanelOutputs != 0) {
    std::memset(values, 0, value_tile_size_ * sizeof(bf16));
  }
  if (kKind == KvKind::kInt8) {
    float* key_scales = key_scales_.data() + at * kKeyTile;
    float* value_scales = value_scales_.data() + at * kKeyTile;
    std::fill_n(key_scales + num_keys, kKeyTile - num_keys, 0.0f);
    std::fill_n(value_scales + num_keys, kKeyTile - num_keys, 0.0f);
    for (int i = 0; i < num_keys; ++i) {
      key_scales[i] = to_float(kv.key_scales(run.table, first + i)[kv_head]);
      value_scales[i] = to_float(kv.value_scales(run.table, first + i)[kv_head]);
    }
  }
  for (int i = 0; i < num_keys; ++i) {
    const std::uint8_t* kept =
        kv.key(run.table, first + i) + kv_head * dim * value_num_bytes(kKind);
    const bf16 *key, *value;
    if constexpr (kKind == KvKind::kBfloat16) {
      key = reinterpret_cast<const bf16*>(kept);
      value = reinterpret_cast<const bf16*>(kept + kv.value_offset);
    } else {
      key = expanded, value = expanded + round_up(dim, kExpanded);
      expand_row<kKind>(kept, dim, expanded);
      expand_row<kKind>(kept + kv.value_offset, dim, expanded + round_up(dim, kExpanded));
    }
    for (int pair = 0; pair < dim / 2; ++pair) {
      std::memcpy(keys + (pair * kKeyTile + i) * 2, key + 2 * pair, 4);
    }
    for (int d = 0; d < dim; ++d) {
      const int panel = d / kPanelOutputs;
      values[((panel * (kKeyTile / 2) + i / 2) * kPanelOutputs + d % kPanelOutputs) * 2 + i % 2] =
          value[d];
    }
  }
}

template <bool kIsScaled>
void PromptAttention::attend(const Run& run, int first_tile, int kv_head, int first_row,
                             int num_positions, const bf16* queries, bf16* out,
                             std::int64_t stride, float* memory) {
  const int dim = shape_.head_dim, group = shape_.group();
  const int num_rows = num_positions * group;
  const int width = value_panels_ * kPanelOutputs;
  const int first_position = run.start + first_row;
  const int last_position = first_position + num_positions - 1;
  Scratch scratch(memory, num_rows, value_panels_);
  std::fill_n(scratch.highest, num_rows, kNothing);
  std::fill_n(scratch.total, std::size_t(num_rows) * kLanes, 0.0f);
  std::fill_n(scratch.result, std::size_t(num_rows) * width, 0.0f);

  // The heads of a group lie side by side, so rows of a position are neighbours; from one
  // position to the next it is further than from row to row, hence the copy.
  alignas(64) bf16 own[kTurnPositions * 8 * 128];
  Array<bf16> large;
  bf16* rows = own;
  if (std::size_t(num_rows) * dim > sizeof own / sizeof own[0]) {
    large.resize(std::size_t(num_rows) * dim);
    rows = large.data();
  }
  for (int i = 0; i < num_positions; ++i) {
    const bf16* from = queries +
                       (std::int64_t(first_row + i) * shape_.num_heads + kv_head * group) * dim;
    std::memcpy(rows + std::size_t(i) * group * dim, from, sizeof(bf16) * group * dim);
  }

  const int begin = shape_.first_seen(first_position) / kKeyTile;
  for (int tile = begin; tile <= last_position / kKeyTile; ++tile) {
    const std::size_t at = std::size_t(kv_head) * num_tiles_ + (tile - first_tile);
    const bf16* keys = keys_.data() + at * key_tile_size_;
    const bf16* values = values_.data() + at * value_tile_size_;
    const float* key_scales = kIsScaled ? key_scales_.data() + at * kKeyTile : nullptr;
    const float* value_scales = kIsScaled ? value_scales_.data() + at * kKeyTile : nullptr;
    const int tile_start = tile * kKeyTile;
    // Whether every row of this turn sees the whole tile.
    const bool is_whole = tile_start + kKeyTile - 1 <= first_position &&
                          shape_.first_seen(last_position) <= tile_start;

    for_tiles(num_rows, [&](auto tile_rows, int row) {
      constexpr int kRows = decltype(tile_rows)::value;
      __m512 acc[kRows][kPanelVectors];
      for (auto& vectors : acc) {
        for (__m512& vector : vectors) vector = _mm512_setzero_ps();
      }
      multiply_tile<kRows>(acc, rows + std::size_t(row) * dim, dim, keys, dim / 2);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kPanelVectors; ++v) {
          _mm512_storeu_ps(scratch.scores + std::size_t(row + r) * kKeyTile + v * kLanes,
                           acc[r][v]);
        }
      }
    });

    for (int row = 0; row < num_rows; ++row) {
      const float* from = scratch.scores + std::size_t(row) * kKeyTile;
      __m512 scores[kTileVectors];
      __m512 top = _mm512_set1_ps(kNothing);
      if (is_whole) {
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) {
          scores[v] = _mm512_loadu_ps(from + v * kLanes);
          if (kIsScaled) {
            scores[v] = _mm512_mul_ps(scores[v], _mm512_loadu_ps(key_scales + v * kLanes));
          }
        }
      } else {
        const int position = first_position + row / group;
        const int end = std::clamp(position + 1 - tile_start, 0, kKeyTile);
        const int start = std::clamp(shape_.first_seen(position) - tile_start, 0, kKeyTile);
        const std::uint64_t below = end == 64 ? ~0ull : (1ull << end) - 1;
        const std::uint64_t seen = below & (start == 64 ? 0ull : ~0ull << start);
        const __m512 masked = _mm512_set1_ps(2 * kNothing);
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) {
          const __mmask16 lanes = __mmask16(seen >> (v * kLanes));
          scores[v] = _mm512_mask_loadu_ps(masked, lanes, from + v * kLanes);
          if (kIsScaled) {
            scores[v] = _mm512_mask_mul_ps(masked, lanes, scores[v],
                                           _mm512_loadu_ps(key_scales + v * kLanes));
          }
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) top = _mm512_max_ps(top, scores[v]);
      const float before = scratch.highest[row];
      const float highest = std::max(before, _mm512_reduce_max_ps(top));
      const __m512 shift = _mm512_set1_ps(highest);
      float* total_at = scratch.total + std::size_t(row) * kLanes;
      __m512 total = _mm512_loadu_ps(total_at);
      if (highest > before) {
        const __m512 shrink = exp2(_mm512_set1_ps(before - highest));
        total = _mm512_mul_ps(total, shrink);
        float* result = scratch.result + std::size_t(row) * width;
        for (int d = 0; d < width; d += kLanes) {
          _mm512_storeu_ps(result + d, _mm512_mul_ps(_mm512_loadu_ps(result + d), shrink));
        }
        scratch.highest[row] = highest;
      }
      bf16* weights = scratch.weights + std::size_t(row) * kKeyTile;
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        const __m512 weight = exp2(_mm512_sub_ps(scores[v], shift));
        total = _mm512_add_ps(total, weight);
        store_bf16(weights + v * kLanes,
                   kIsScaled
                       ? _mm512_mul_ps(weight, _mm512_loadu_ps(value_scales + v * kLanes))
                       : weight);
      }
      _mm512_storeu_ps(total_at, total);
    }

    for (int panel = 0; panel < value_panels_; ++panel) {
      const bf16* panel_values = values + std::size_t(panel) * kPanelOutputs * kKeyTile;
      for_tiles(num_rows, [&](auto tile_rows, int row) {
        constexpr int kRows = decltype(tile_rows)::value;
        float* result = scratch.result + std::size_t(row) * width + panel * kPanelOutputs;
        __m512 acc[kRows][kPanelVectors];
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
          for (int v = 0; v < kPanelVectors; ++v) {
            acc[r][v] = _mm512_loadu_ps(result + r * width + v * kLanes);
          }
        }
        multiply_tile<kRows>(acc, scratch.weights + std::size_t(row) * kKeyTile, kKeyTile,
                             panel_values, kKeyTile / 2);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
          for (int v = 0; v < kPanelVectors; ++v) {
            _mm512_storeu_ps(result + r * width + v * kLanes, acc[r][v]);
          }
        }
      });
    }
  }

  for (int row = 0; row < num_rows; ++row) {
    const float total = _mm512_reduce_add_ps(
        _mm512_loadu_ps(scratch.total + std::size_t(row) * kLanes));
    const __m512 divisor = _mm512_set1_ps(total);
    const float* result = scratch.result + std::size_t(row) * width;
    bf16* to = out + (first_row + row / group) * stride + (kv_head * group + row % group) * dim;
    for (int d = 0; d < dim; d += kLanes) {
      const __m256i values = (__m256i)_mm512_cvtneps_pbh(
          _mm512_div_ps(_mm512_loadu_ps(result + d), divisor));
      _mm256_mask_storeu_epi16(to + d, first_lanes(dim - d), values);
    }
  }
}

}  // namespace kvrelay
