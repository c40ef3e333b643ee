#include "matrix.h"

#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "tile.h"

namespace kvrelay {
namespace {

// Rows of one turn. A turn's inputs then stay in the second cache while its panel passes by,
// and a prompt's rows make turns enough for every thread.
constexpr int kTurnRows = 16 * kTileRows;

int ceil_div(int value, int by) { return (value + by - 1) / by; }

// Finishes one panel of up to kPanelOutputs columns. `column` is its first in packed order.
class Finisher {
 public:
  Finisher(const Output& output, const float* bias, int num_outputs)
      : output_(output), bias_(bias), num_outputs_(num_outputs) {}

  template <int kVectors>
  void operator()(int row, int column, __m512 (&acc)[kVectors]) const {
    if (bias_ != nullptr) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        acc[v] = _mm512_add_ps(acc[v], _mm512_loadu_ps(bias_ + column + v * kLanes));
      }
    }
    if (output_.finish == Finish::kSwiglu) {
      constexpr int kHalf = kVectors / 2;
      bf16* out = static_cast<bf16*>(output_.data) + row * output_.stride + column / 2;
#pragma GCC unroll 2
      for (int v = 0; v < kHalf; ++v) store_bf16(out + v * kLanes, swiglu(acc[v], acc[kHalf + v]));
      return;
    }
    float* out = static_cast<float*>(output_.data) + row * output_.stride + column;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int left = num_outputs_ - column - v * kLanes;
      if (left <= 0) return;
      const __mmask16 lanes = first_lanes(left);
      if (output_.finish == Finish::kAdd) {
        acc[v] = _mm512_add_ps(acc[v], _mm512_maskz_loadu_ps(lanes, out + v * kLanes));
      }
      _mm512_mask_storeu_ps(out + v * kLanes, lanes, acc[v]);
    }
  }

 private:
  const Output& output_;
  const float* bias_;
  int num_outputs_;
};

// ---------------------------------------------------------------------------- bfloat16

class Bf16Matrix final : public Matrix {
 public:
  Bf16Matrix(Team& team, const bf16* data, const float* bias, int num_outputs, int num_features,
             bool is_gated)
      : Matrix(num_outputs, num_features, bias, is_gated), num_pairs_(num_features / 2) {
    pack_bias(bias, kPanelOutputs);
    const int num = num_panels(kPanelOutputs);
    panels_.resize(std::size_t(num) * num_pairs_ * kPanelOutputs * 2);
    num_bytes_ = panels_.size() * sizeof(bf16);
    team.run(num, [&](int panel, int) { pack(data, panel); });
  }

  void multiply(Team& team, const Inputs& inputs, const Output& output) const override {
    const Finisher finish(output, bias_.data(), num_outputs_);
    const int num = num_panels(kPanelOutputs);
    const int num_row_turns = ceil_div(inputs.num_rows, kTurnRows);
    team.run(num * num_row_turns, [&](int turn, int) {
      const int panel = turn % num;
      const int first = turn / num * kTurnRows;
      const int num_rows = std::min(kTurnRows, inputs.num_rows - first);
      const bf16* weights = panels_.data() + panel_offset(panel);
      const bf16* next = weights + panel_offset(team.num_threads());
      for_tiles(num_rows, [&](auto rows, int row) {
        constexpr int kRows = decltype(rows)::value;
        __m512 acc[kRows][kPanelVectors];
        for (auto& vectors : acc) {
          for (__m512& vector : vectors) vector = _mm512_setzero_ps();
        }
        const bf16* from = inputs.data + (first + row) * inputs.stride;
        // A quarter of the next panel with each of the first tiles: all of it in one would be
        // more than memory gives meanwhile. With fewer tiles it is memory that is waited for.
        const int quarter = row / kTileRows;
        if (num_rows > 2 * kTileRows && quarter < kPanelVectors) {
          multiply_tile<kRows, true>(acc, from, inputs.stride, weights, num_pairs_,
                                     next + quarter * num_pairs_ * kLanes * 2);
        } else {
          multiply_tile<kRows>(acc, from, inputs.stride, weights, num_pairs_);
        }
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) finish(first + row + r, panel * kPanelOutputs, acc[r]);
      });
    });
  }

 private:
  std::size_t panel_offset(int panel) const {
    return std::size_t(panel) * num_pairs_ * kPanelOutputs * 2;
  }

  void pack(const bf16* data, int panel) {
    bf16* to = panels_.data() + panel_offset(panel);
    for (int column = 0; column < kPanelOutputs; ++column) {
      const int row = source_row(panel * kPanelOutputs + column, kPanelOutputs);
      if (row < 0) continue;
      const bf16* from = data + std::size_t(row) * num_features_;
      for (int pair = 0; pair < num_pairs_; ++pair) {
        std::memcpy(to + (std::size_t(pair) * kPanelOutputs + column) * 2, from + 2 * pair, 4);
      }
    }
  }

  int num_pairs_;
  Array<bf16> panels_;  // [panel][pair][kPanelOutputs][2]
};

// ------------------------------------------------------------------------------ blocks

constexpr int kBlockVectors = 2;
constexpr int kBlockOutputs = kBlockVectors * kLanes;
constexpr int kBlockPairs = kBlockFeatures / 2;

// How far ahead of its use a weight is asked for: far where little is computed on the way, and
// memory is what a step waits for.
constexpr int kNearBytes = 4 << 10;
constexpr int kFarBytes = 20 << 10;

inline void ask_for(const void* from, int num_bytes) {
  for (int i = 0; i < num_bytes; i += int(kLineBytes)) {
    _mm_prefetch(static_cast<const char*>(from) + i, _MM_HINT_T0);
  }
}

// Rows of one pass over a panel: their totals stay in the first cache.
constexpr int kPassRows = 8 * kTileRows;

std::uint16_t bf16_of_whole(int value) {
  const float number = float(value);
  std::uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  return std::uint16_t(bits >> 16);
}

// Four-bit numbers: one word holds four of one output and one member of a pair, so that each
// shift of a vector by four yields the next pair of sixteen outputs, looked up in a table.
template <int kOffset, bool kHasMinimum>
struct Nibbles {
  static constexpr int kGgufBytes = (kHasMinimum ? 4 : 2) + kBlockFeatures / 2;
  static constexpr int kBytes = kBlockOutputs * kBlockFeatures / 2;
  static constexpr bool kMinimum = kHasMinimum;

  __m512i table;

  Nibbles() {
    alignas(64) std::uint16_t values[32];
    for (int i = 0; i < 32; ++i) values[i] = bf16_of_whole(i % 16 - kOffset);
    table = _mm512_load_si512(values);
  }

  // One output's block as GGUF has it into its place in the packed one.
  static void pack(const std::uint8_t* block, int output, std::uint8_t* to) {
    const std::uint8_t* from = block + (kHasMinimum ? 4 : 2);
    for (int k = 0; k < kBlockFeatures; ++k) {
      const int value = k < 16 ? from[k] & 15 : from[k - 16] >> 4;
      const int pair = k / 2;
      const int vector = output / kLanes * (kBlockPairs / 4) + pair / 4;
      const int word = output % kLanes * 2 + k % 2;
      const int bit = pair % 4 * 4;
      to[vector * 64 + word * 2 + bit / 8] |= std::uint8_t(value << (bit % 8));
    }
  }

  // use(pair, vector, weights) for every pair of features, ascending.
  template <class Use>
  __attribute__((always_inline)) void each(const std::uint8_t* from, const Use& use) const {
#pragma GCC unroll 4
    for (int quad = 0; quad < kBlockPairs / 4; ++quad) {
      __m512i words[kBlockVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kBlockVectors; ++v) {
        words[v] = _mm512_loadu_si512(from + (v * (kBlockPairs / 4) + quad) * 64);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 2
        for (int v = 0; v < kBlockVectors; ++v) {
          use(quad * 4 + i, v, _mm512_permutexvar_epi16(words[v], table));
          words[v] = _mm512_srli_epi16(words[v], 4);
        }
      }
    }
  }
};

// Eight-bit numbers lie as pairs of bytes and are widened.
struct Octets {
  static constexpr int kGgufBytes = 2 + kBlockFeatures;
  static constexpr int kBytes = kBlockOutputs * kBlockFeatures;
  static constexpr bool kMinimum = false;

  static void pack(const std::uint8_t* block, int output, std::uint8_t* to) {
    for (int k = 0; k < kBlockFeatures; ++k) {
      const int at = (k / 2 * kBlockVectors + output / kLanes) * 32 + output % kLanes * 2 + k % 2;
      to[at] = block[2 + k];
    }
  }

  template <class Use>
  __attribute__((always_inline)) void each(const std::uint8_t* from, const Use& use) const {
#pragma GCC unroll 4
    for (int pair = 0; pair < kBlockPairs; ++pair) {
#pragma GCC unroll 2
      for (int v = 0; v < kBlockVectors; ++v) {
        const __m256i bytes = _mm256_loadu_si256(
            reinterpret_cast<const __m256i*>(from + (pair * kBlockVectors + v) * 32));
        // Even and odd members of pairs, as floats; packed again, each in its half of a word.
        const __m512i words = _mm512_cvtepi8_epi16(bytes);
        const __m512i even = _mm512_srai_epi32(_mm512_slli_epi32(words, 16), 16);
        const __m512i odd = _mm512_srai_epi32(words, 16);
        const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(_mm512_cvtepi32_ps(even)), 16);
        const __m512i high = _mm512_castps_si512(_mm512_cvtepi32_ps(odd));
        use(pair, v, _mm512_mask_blend_epi16(0xaaaaaaaau, low, high));
      }
    }
  }
};

template <class Format>
class BlockMatrix final : public Matrix {
 public:
  BlockMatrix(Team& team, const std::uint8_t* data, const float* bias, int num_outputs,
              int num_features, bool is_gated)
      : Matrix(num_outputs, num_features, bias, is_gated),
        num_blocks_(num_features / kBlockFeatures) {
    pack_bias(bias, kBlockOutputs);
    const int num = num_panels(kBlockOutputs);
    panels_.resize(std::size_t(num) * num_blocks_ * kBlockBytes);
    num_bytes_ = panels_.size();
    team.run(num, [&](int panel, int) { pack(data, panel); });
  }

  void multiply(Team& team, const Inputs& inputs, const Output& output) const override {
    const Finisher finish(output, bias_.data(), num_outputs_);
    const int num = num_panels(kBlockOutputs);
    team.run(num, [&](int panel, int) {
      const std::uint8_t* blocks = panels_.data() + std::size_t(panel) * num_blocks_ * kBlockBytes;
      const int column = panel * kBlockOutputs;
      switch (inputs.num_rows) {
        case 1: return few<1>(inputs, blocks, column, finish);
        case 2: return few<2>(inputs, blocks, column, finish);
        case 3: return few<3>(inputs, blocks, column, finish);
        case 4: return few<4>(inputs, blocks, column, finish);
        default: break;
      }
      for (int first = 0; first < inputs.num_rows; first += kPassRows) {
        const int num_rows = std::min(kPassRows, inputs.num_rows - first);
        many(inputs, first, num_rows, blocks, column, finish);
      }
    });
  }

  bool needs_block_sums() const override { return Format::kMinimum; }

 private:
  static constexpr int kScalesBytes = kBlockOutputs * 2;
  static constexpr int kMinimaBytes = Format::kMinimum ? kBlockOutputs * 2 : 0;
  static constexpr int kBlockBytes = kScalesBytes + kMinimaBytes + Format::kBytes;

  static __m512 halves(const std::uint8_t* from, int vector) {
    return load_half(reinterpret_cast<const std::uint16_t*>(from) + vector * kLanes);
  }

  void pack(const std::uint8_t* data, int panel) {
    for (int output = 0; output < kBlockOutputs; ++output) {
      const int row = source_row(panel * kBlockOutputs + output, kBlockOutputs);
      if (row < 0) continue;
      for (int block = 0; block < num_blocks_; ++block) {
        const std::uint8_t* from =
            data + (std::size_t(row) * num_blocks_ + block) * Format::kGgufBytes;
        std::uint8_t* to =
            panels_.data() + (std::size_t(panel) * num_blocks_ + block) * kBlockBytes;
        std::memcpy(to + output * 2, from, 2);
        if (Format::kMinimum) std::memcpy(to + kScalesBytes + output * 2, from + 2, 2);
        Format::pack(from, output, to + kScalesBytes + kMinimaBytes);
      }
    }
  }

  // Few rows: weights are unpacked in registers. More: once, into the first cache, for all.
  template <int kRows>
  void few(const Inputs& inputs, const std::uint8_t* blocks, int column,
           const Finisher& finish) const {
    __m512 total[kRows][kBlockVectors];
    for (auto& vectors : total) {
      for (__m512& vector : vectors) vector = _mm512_setzero_ps();
    }
    const std::int64_t sums_stride = inputs.stride / kBlockFeatures;
    for (int block = 0; block < num_blocks_; ++block) {
      const std::uint8_t* from = blocks + std::size_t(block) * kBlockBytes;
      ask_for(from + kFarBytes, kBlockBytes);
      const bf16* x = inputs.data + block * kBlockFeatures;
      __m512 sum[kRows][kBlockVectors];
      for (auto& vectors : sum) {
        for (__m512& vector : vectors) vector = _mm512_setzero_ps();
      }
      format_.each(from + kScalesBytes + kMinimaBytes, [&](int pair, int v, __m512i weights) {
#pragma GCC unroll 4
        for (int row = 0; row < kRows; ++row) {
          sum[row][v] =
              dot_pairs(sum[row][v], broadcast_pair(x + row * inputs.stride + 2 * pair), weights);
        }
      });
#pragma GCC unroll 2
      for (int v = 0; v < kBlockVectors; ++v) {
        const __m512 scale = halves(from, v);
#pragma GCC unroll 4
        for (int row = 0; row < kRows; ++row) {
          total[row][v] = _mm512_fmadd_ps(scale, sum[row][v], total[row][v]);
          if (Format::kMinimum) {
            const __m512 x_sum = _mm512_set1_ps(inputs.block_sums[row * sums_stride + block]);
            total[row][v] = _mm512_fmadd_ps(halves(from + kScalesBytes, v), x_sum, total[row][v]);
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) finish(row, column, total[row]);
  }

  void many(const Inputs& inputs, int first, int num_rows, const std::uint8_t* blocks, int column,
            const Finisher& finish) const {
    alignas(64) float total[kPassRows][kBlockOutputs];
    std::memset(total, 0, sizeof(float) * std::size_t(num_rows) * kBlockOutputs);
    alignas(64) bf16 weights[kBlockPairs][kBlockOutputs][2];
    const std::int64_t sums_stride = inputs.stride / kBlockFeatures;
    for (int block = 0; block < num_blocks_; ++block) {
      const std::uint8_t* from = blocks + std::size_t(block) * kBlockBytes;
      // So much is computed between two blocks that the processor forgets where they came from.
      ask_for(from + kNearBytes, kBlockBytes);
      format_.each(from + kScalesBytes + kMinimaBytes, [&](int pair, int v, __m512i values) {
        _mm512_store_si512(&weights[pair][v * kLanes], values);
      });
      __m512 scale[kBlockVectors], minimum[kBlockVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kBlockVectors; ++v) {
        scale[v] = halves(from, v);
        minimum[v] = Format::kMinimum ? halves(from + kScalesBytes, v) : _mm512_setzero_ps();
      }
      each_rows(num_rows, [&](auto rows, int row) {
        constexpr int kRows = decltype(rows)::value;
        __m512 sum[kRows][kBlockVectors];
        for (auto& vectors : sum) {
          for (__m512& vector : vectors) vector = _mm512_setzero_ps();
        }
        const bf16* x = inputs.data + (first + row) * inputs.stride + block * kBlockFeatures;
#pragma GCC unroll 4
        for (int pair = 0; pair < kBlockPairs; ++pair) {
          const __m512i low = _mm512_load_si512(&weights[pair][0]);
          const __m512i high = _mm512_load_si512(&weights[pair][kLanes]);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            const __m512i x_pair = broadcast_pair(x + r * inputs.stride + 2 * pair);
            sum[r][0] = dot_pairs(sum[r][0], x_pair, low);
            sum[r][1] = dot_pairs(sum[r][1], x_pair, high);
          }
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
          for (int v = 0; v < kBlockVectors; ++v) {
            float* at = &total[row + r][v * kLanes];
            __m512 value = _mm512_fmadd_ps(scale[v], sum[r][v], _mm512_load_ps(at));
            if (Format::kMinimum) {
              const float* sums = inputs.block_sums + (first + row + r) * sums_stride;
              value = _mm512_fmadd_ps(minimum[v], _mm512_set1_ps(sums[block]), value);
            }
            _mm512_store_ps(at, value);
          }
        }
      });
    }
    for (int row = 0; row < num_rows; ++row) {
      __m512 acc[kBlockVectors];
      for (int v = 0; v < kBlockVectors; ++v) acc[v] = _mm512_load_ps(&total[row][v * kLanes]);
      finish(first + row, column, acc);
    }
  }

  // As `for_tiles`, by eight rows: two vectors of outputs leave room for more of them.
  template <class Body>
  static void each_rows(int num_rows, const Body& body) {
    int row = 0;
    for (; row + 8 <= num_rows; row += 8) body(std::integral_constant<int, 8>(), row);
    if (num_rows - row >= 4) {
      body(std::integral_constant<int, 4>(), row);
      row += 4;
    }
    if (num_rows - row >= 2) {
      body(std::integral_constant<int, 2>(), row);
      row += 2;
    }
    if (num_rows - row == 1) body(std::integral_constant<int, 1>(), row);
  }

  int num_blocks_;
  Format format_;
  Array<std::uint8_t> panels_;  // [panel][block]{scales, minima, numbers}
};

using Q4_0 = Nibbles<8, false>;
using Q4_1 = Nibbles<0, true>;

}  // namespace

Matrix::Matrix(int num_outputs, int num_features, const float*, bool is_gated)
    : num_outputs_(num_outputs), num_features_(num_features), is_gated_(is_gated) {}

int Matrix::num_panels(int panel_outputs) const {
  if (!is_gated_) return ceil_div(num_outputs_, panel_outputs);
  return ceil_div(num_outputs_ / 2, panel_outputs / 2);
}

int Matrix::source_row(int column, int panel_outputs) const {
  if (!is_gated_) return column < num_outputs_ ? column : -1;
  const int half = panel_outputs / 2;
  const int inner = num_outputs_ / 2;
  const int pair = column / panel_outputs * half + column % half;
  if (pair >= inner) return -1;
  return column % panel_outputs < half ? pair : inner + pair;
}

void Matrix::pack_bias(const float* bias, int panel_outputs) {
  if (bias == nullptr) return;
  bias_.resize(std::size_t(num_panels(panel_outputs)) * panel_outputs);
  for (std::size_t column = 0; column < bias_.size(); ++column) {
    const int row = source_row(int(column), panel_outputs);
    if (row >= 0) bias_[column] = bias[row];
  }
}

std::unique_ptr<Matrix> pack_matrix(Team& team, WeightKind kind, const void* data,
                                    const float* bias, int num_outputs, int num_features,
                                    bool is_gated) {
  const auto* bytes = static_cast<const std::uint8_t*>(data);
  switch (kind) {
    case WeightKind::kBfloat16:
      return std::make_unique<Bf16Matrix>(team, static_cast<const bf16*>(data), bias, num_outputs,
                                          num_features, is_gated);
    case WeightKind::kQ4_0:
      return std::make_unique<BlockMatrix<Q4_0>>(team, bytes, bias, num_outputs, num_features,
                                                 is_gated);
    case WeightKind::kQ4_1:
      return std::make_unique<BlockMatrix<Q4_1>>(team, bytes, bias, num_outputs, num_features,
                                                 is_gated);
    case WeightKind::kQ8_0:
      return std::make_unique<BlockMatrix<Octets>>(team, bytes, bias, num_outputs, num_features,
                                                   is_gated);
  }
  throw std::invalid_argument("no such kind of weights");
}

void sum_blocks(const bf16* row, int num_blocks, float* sums) {
  const __m512i ones = _mm512_set1_epi32(0x3f803f80);
  for (int block = 0; block < num_blocks; ++block) {
    const __m512i x = _mm512_loadu_si512(row + block * kBlockFeatures);
    sums[block] = _mm512_reduce_add_ps(dot_pairs(_mm512_setzero_ps(), x, ones));
  }
}

}  // namespace kvrelay
