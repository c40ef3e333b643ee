// The product of a few rows of bfloat16 with a panel of bfloat16, in registers.
#pragma once

#include "simd.h"

namespace kvrelay {

constexpr int kPanelVectors = 4;
constexpr int kPanelOutputs = kPanelVectors * kLanes;
constexpr int kTileRows = 6;  // with four vectors of outputs, what 32 registers hold

// acc[row][v] += rows * panel, pair by pair. `panel`: [num_pairs][kPanelOutputs][2]. With kAsks,
// a line from `ahead` on is brought nearer with every pair.
template <int kRows, bool kAsks = false>
inline void multiply_tile(__m512 (&acc)[kRows][kPanelVectors], const bf16* rows,
                          std::int64_t stride, const bf16* panel, int num_pairs,
                          const bf16* ahead = nullptr) {
  for (int pair = 0; pair < num_pairs; ++pair) {
    if (kAsks) _mm_prefetch(reinterpret_cast<const char*>(ahead + pair * kLanes * 2), _MM_HINT_T1);
    __m512i weights[kPanelVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) {
      weights[v] = _mm512_loadu_si512(panel + (std::int64_t(pair) * kPanelOutputs + v * kLanes) * 2);
    }
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row) {
      const __m512i x = broadcast_pair(rows + row * stride + 2 * pair);
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v) acc[row][v] = dot_pairs(acc[row][v], x, weights[v]);
    }
  }
}

// body(std::integral_constant rows, first row) for groups of up to `kTileRows` rows.
template <class Body>
inline void for_tiles(int num_rows, const Body& body) {
  int row = 0;
  for (; row + kTileRows <= num_rows; row += kTileRows) {
    body(std::integral_constant<int, kTileRows>(), row);
  }
  switch (num_rows - row) {
    case 1: body(std::integral_constant<int, 1>(), row); break;
    case 2: body(std::integral_constant<int, 2>(), row); break;
    case 3: body(std::integral_constant<int, 3>(), row); break;
    case 4: body(std::integral_constant<int, 4>(), row); break;
    case 5: body(std::integral_constant<int, 5>(), row); break;
    default: break;
  }
}

}  // namespace kvrelay
