// The forward pass of the Llama family: rows in, KV written, logits out.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "attention.h"
#include "matrix.h"
#include "memory.h"
#include "team.h"

namespace kvrelay {

// Shared with Python, field by field.
struct Shape {
  std::int32_t hidden_size;
  std::int32_t num_layers;
  std::int32_t num_heads;
  std::int32_t num_kv_heads;
  std::int32_t head_dim;
  std::int32_t intermediate_size;
  std::int32_t vocab_size;
  std::int32_t num_positions;
  std::int32_t window;  // 0: none
  std::int32_t block_size;
  std::int32_t kv_kind;  // a KvKind
  float rms_norm_eps;
};

enum class Path : std::int32_t { kPrompt = 0, kGeneration = 1 };
enum class Product : std::int32_t { kQkv = 0, kOut = 1, kGateUp = 2, kDown = 3 };
enum class Norm : std::int32_t { kInput = 0, kQuery = 1, kKey = 2, kPost = 3 };

// Consecutive tokens of one sequence. Shared with Python, field by field.
struct StepRun {
  std::int32_t path;
  std::int32_t start;
  std::int32_t num_rows;
  std::int32_t first_token;  // into the step's token ids
  std::int32_t first_block;  // into the step's block tables
  std::int32_t logits_row;   // where the last row's logits go; -1: nowhere
};

class Llama {
 public:
  Llama(const Shape& shape, int max_threads);

  void set_threads(int num_threads) { team_.set_threads(num_threads); }
  // On the generation path the matrix of the prompt path is used where it has none of its own.
  void set_matrix(int layer, Path path, Product product, WeightKind kind, const void* data,
                  const float* bias);
  void set_norm(int layer, Norm norm, const float* weights);
  void set_last_norm(const float* weights);
  void set_embedding(const bf16* data);  // [vocab_size][hidden_size], copied
  void set_head(WeightKind kind, const void* data);
  void set_rope(const float* table);  // [num_positions][2][head_dim / 2]: cosines, sines
  void set_cache(std::uint8_t* data) { cache_ = data; }

  // `logits`: [rows][vocab_size]; `likeliest`: of each row its likeliest token, the lowest of
  // equals, or -1 if a logit is no finite number. Throws before anything is computed if a
  // position or token is none of this model; tables are taken at their word.
  void step(const StepRun* runs, int num_runs, const std::int32_t* token_ids,
            const std::int32_t* tables, float* logits, std::int32_t* likeliest);

  std::size_t num_bytes() const;

 private:
  struct Layer {
    std::unique_ptr<Matrix> matrices[2][4];
    Array<float> norms[4];
  };
  struct Row {
    std::int32_t position;
    std::int32_t token_id;
    const std::int32_t* table;
    std::int32_t logits_row;
  };

  void check(const StepRun* runs, int num_runs, const std::int32_t* token_ids) const;
  const Matrix& matrix(const Layer& layer, Path path, Product product) const;
  KvView kv_of(int layer) const;
  void pass(Path path, std::vector<Row>& rows, std::vector<Run>& runs);
  int keep_wanted(std::vector<Row>& rows, std::vector<Run>& runs);
  void attend(Path path, const KvView& kv, int num_rows, const std::vector<Run>& runs);
  void multiply(const Matrix& matrix, const Array<bf16>& rows, std::int64_t stride, int num_rows,
                const Output& output);
  void normalize(const float* norm, int num_rows, const float* from, Array<bf16>& to,
                 std::int64_t stride);
  void rotate_and_keep(const Layer& layer, const KvView& kv, const std::vector<Row>& rows);
  void rotate_row(const Layer& layer, const KvView& kv, const Row& row, float* qkv, bf16* queries);
  void finish(float* logits, std::int32_t* likeliest, int num_rows);
  template <class Body>
  void each_row(int num_rows, const Body& body);

  Shape shape_;
  Team team_;
  PromptAttention prompt_attention_;
  GenerationAttention generation_attention_;
  std::vector<Layer> layers_;
  Array<float> last_norm_;
  Array<bf16> embedding_;
  Array<float> rope_;
  std::unique_ptr<Matrix> head_;
  std::uint8_t* cache_ = nullptr;
  int block_shift_;
  float query_scale_;

  // Of one pass; they keep the size of the largest.
  std::int64_t hidden_stride_, attention_stride_, inner_stride_, qkv_stride_;
  Array<float> x_;
  Array<bf16> normed_, attended_, inner_, queries_;
  Array<float> qkv_, block_sums_;
  std::vector<std::int32_t> positions_;
  std::vector<const std::int32_t*> tables_;
  std::vector<float> wanted_;  // rows that sample, before the last norm
};

}  // namespace kvrelay
