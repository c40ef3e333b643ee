// Attention over KV that lies in blocks, with a fixed order of additions.
//
// A row sees the keys up to its own position, in tiles that begin at multiples of kKeyTile.
// Prompt rows and generated rows go two ways, as their weights do; on each way the order in
// which a row adds up is a function of its position alone. What the cache keeps of K and V is all
// that rows attend to, rows of the same chunk too. Where that has scales, products with keys and
// weights of values are scaled, not the numbers.
#pragma once

#include <cstdint>

#include "kv.h"
#include "memory.h"
#include "simd.h"
#include "team.h"

namespace kvrelay {

constexpr int kKeyTile = 64;

struct AttentionShape {
  int num_heads;
  int num_kv_heads;
  int head_dim;
  int window;  // 0: a row sees all before it

  int group() const { return num_heads / num_kv_heads; }
  int first_seen(int position) const {
    return window > 0 && position >= window ? position - window + 1 : 0;
  }
};

// Consecutive rows of one sequence.
struct Run {
  int start;
  int num_rows;
  const std::int32_t* table;
};

// Queries are bfloat16, scaled by log2(e) / sqrt(head_dim): [num_rows][num_heads * head_dim].
// So are results, `stride` elements from row to row.
class PromptAttention {
 public:
  explicit PromptAttention(const AttentionShape& shape);
  void run(Team& team, const KvView& kv, const Run& run, const bf16* queries, bf16* out,
           std::int64_t stride);

 private:
  struct Scratch;
  template <KvKind kKind>
  void run_kind(Team& team, const KvView& kv, const Run& run, const bf16* queries, bf16* out,
                std::int64_t stride);
  template <KvKind kKind>
  void pack(const KvView& kv, const Run& run, int first_tile, int tile, int kv_head, bf16* row);
  template <bool kIsScaled>
  void attend(const Run& run, int first_tile, int kv_head, int first_row, int num_rows,
              const bf16* queries, bf16* out, std::int64_t stride, float* scratch);

  AttentionShape shape_;
  int value_panels_;
  std::size_t key_tile_size_;
  std::size_t value_tile_size_;
  int num_tiles_ = 0;
  Array<bf16> keys_;    // [kv_head][tile][pair of dims][kKeyTile][2]
  Array<bf16> values_;  // [kv_head][tile][panel][pair of keys][kPanelOutputs][2]
  Array<float> key_scales_, value_scales_;  // [kv_head][tile][kKeyTile]
  Array<bf16> expanded_;                    // [thread][a K and a V]
  Array<float> scratch_;
};

// One row by itself, as all generated tokens are computed.
class GenerationAttention {
 public:
  struct Heads {
    int begin, end;  // KV heads
  };

  explicit GenerationAttention(const AttentionShape& shape);

  // Rows [0, num_rows) at positions[row], each with a table of its own.
  void run(Team& team, const KvView& kv, int num_rows, const std::int32_t* positions,
           const std::int32_t* const* tables, const bf16* queries, bf16* out, std::int64_t stride);

 private:
  struct Scratch {
    float* scores;              // [num_heads][keys], then [num_heads][width] of results
    const std::uint8_t** rows;  // where each position's K is
    const bf16** key_scales;    // of int8
    bf16* expanded;             // [kLanes][width], of what is quantized
  };

  template <KvKind kKind>
  void run_kind(Team& team, const KvView& kv, int num_rows, const std::int32_t* positions,
                const std::int32_t* const* tables, const bf16* queries, bf16* out,
                std::int64_t stride);
  template <KvKind kKind>
  void attend(const KvView& kv, int position, const std::int32_t* table, Heads heads,
              const bf16* queries, bf16* out, const Scratch& scratch) const;

  AttentionShape shape_;
  Array<float> scratch_;
  Array<const std::uint8_t*> rows_;
  Array<const bf16*> key_scales_;
  Array<bf16> expanded_;
};

}  // namespace kvrelay
