// Weight matrices in the order in which a product reads them, and the products.
//
// A product's every output is one chain of additions over the input features, in ascending
// order, whatever the number of rows, of threads, or the other rows. So a row's bits depend on
// the row alone. Two forms of weights, two chains:
//
//  - bfloat16: pairs of features are added to one float32 accumulator, first to last;
//  - blocks (GGUF's Q4_0, Q4_1, Q8_0): the 32 features of a block are added up from zero, with
//    the stored whole numbers as weights (bfloat16 holds them exactly); then
//    total += scale * sum, and for Q4_1 total += minimum * (the sum of the row's 32 inputs).
#pragma once

#include <cstdint>
#include <memory>

#include "memory.h"
#include "simd.h"
#include "team.h"

namespace kvrelay {

constexpr int kBlockFeatures = 32;

enum class WeightKind : std::int32_t { kBfloat16 = 0, kQ4_0 = 1, kQ4_1 = 2, kQ8_0 = 3 };

// What becomes of a product. `out` of a row is `row * stride` further on.
enum class Finish {
  kStore,   // float32: out = product + bias
  kAdd,     // float32: out += product + bias
  kSwiglu,  // bfloat16: out = silu(first half of the outputs) * second half
};

struct Output {
  Finish finish;
  void* data;
  std::int64_t stride;  // elements
};

// Rows of inputs. Features beyond `num_features`, up to a multiple of 32, are zeros.
struct Inputs {
  const bf16* data;
  std::int64_t stride;  // elements
  int num_rows;
  const float* block_sums;  // [num_rows][stride / 32], for a matrix that needs them
};

class Matrix {
 public:
  virtual ~Matrix() = default;
  virtual void multiply(Team& team, const Inputs& inputs, const Output& output) const = 0;
  virtual bool needs_block_sums() const { return false; }

  int num_outputs() const { return num_outputs_; }
  int num_features() const { return num_features_; }
  std::size_t num_bytes() const { return num_bytes_; }

 protected:
  Matrix(int num_outputs, int num_features, const float* bias, bool is_gated);

  // The stored row that is column `column` of the packed order. Gated: gates and ups take turns
  // by half a panel, so that both of a pair are at hand when a panel is finished.
  int source_row(int column, int panel_outputs) const;
  int num_panels(int panel_outputs) const;
  void pack_bias(const float* bias, int panel_outputs);

  int num_outputs_;
  int num_features_;
  bool is_gated_;
  std::size_t num_bytes_ = 0;
  Array<float> bias_;  // in packed order; empty if there is none
};

// `data`: bfloat16 [num_outputs][num_features], or the blocks of GGUF in that order of rows.
// `bias`: [num_outputs] or null. Gated: the first half of the outputs are gates.
std::unique_ptr<Matrix> pack_matrix(Team& team, WeightKind kind, const void* data,
                                    const float* bias, int num_outputs, int num_features,
                                    bool is_gated);

// Sums of blocks of 32 inputs, in the order that `Inputs` wants.
void sum_blocks(const bf16* row, int num_blocks, float* sums);

}  // namespace kvrelay
