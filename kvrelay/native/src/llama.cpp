#include "llama.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace kvrelay {
namespace {

// Below so many rows, work of a row at a time is done before another thread has heard of it.
constexpr int kRowsWorthSharing = 32;
constexpr int kRowsOfTurn = 16;

std::int64_t round_up(std::int64_t value, std::int64_t to) { return (value + to - 1) / to * to; }

int log2_of(int value) {
  int shift = 0;
  while ((1 << shift) < value) ++shift;
  return shift;
}

AttentionShape attention_shape(const Shape& shape) {
  return {shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.window};
}

Array<float> copy(const float* from, std::size_t size) {
  Array<float> to(size);
  std::memcpy(to.data(), from, size * sizeof(float));
  return to;
}

// 1 / root mean square. Four chains of sixteen lanes, then a fixed tree.
float scale_of(const float* x, int size, float eps) {
  __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                    _mm512_setzero_ps()};
  for (int i = 0, chain = 0; i < size; i += kLanes, chain = (chain + 1) % 4) {
    const __m512 values = _mm512_maskz_loadu_ps(first_lanes(size - i), x + i);
    sums[chain] = _mm512_fmadd_ps(values, values, sums[chain]);
  }
  const __m512 sum = _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
  return 1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / float(size) + eps);
}

void normalize_head(float* x, int size, const float* norm, float eps) {
  const __m512 scale = _mm512_set1_ps(scale_of(x, size, eps));
  for (int i = 0; i < size; i += kLanes) {
    const __mmask16 lanes = first_lanes(size - i);
    const __m512 values = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, x + i), scale);
    _mm512_mask_storeu_ps(x + i, lanes,
                          _mm512_mul_ps(values, _mm512_maskz_loadu_ps(lanes, norm + i)));
  }
}

// Turns the two halves of a head by its position's angles.
void rotate_head(float* x, const float* rope, int half) {
  for (int i = 0; i < half; i += kLanes) {
    const __mmask16 lanes = first_lanes(half - i);
    const __m512 a = _mm512_maskz_loadu_ps(lanes, x + i);
    const __m512 b = _mm512_maskz_loadu_ps(lanes, x + half + i);
    const __m512 cosine = _mm512_maskz_loadu_ps(lanes, rope + i);
    const __m512 sine = _mm512_maskz_loadu_ps(lanes, rope + half + i);
    const __m512 first = _mm512_fmsub_ps(a, cosine, _mm512_mul_ps(b, sine));
    const __m512 second = _mm512_fmadd_ps(b, cosine, _mm512_mul_ps(a, sine));
    _mm512_mask_storeu_ps(x + i, lanes, first);
    _mm512_mask_storeu_ps(x + half + i, lanes, second);
  }
}

void round_scaled(const float* from, int size, float scale, bf16* to) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int i = 0; i < size; i += kLanes) {
    const __mmask16 lanes = first_lanes(size - i);
    const __m512 values = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, from + i), factor);
    _mm256_mask_storeu_epi16(to + i, lanes, (__m256i)_mm512_cvtneps_pbh(values));
  }
}

}  // namespace

Llama::Llama(const Shape& shape, int max_threads)
    : shape_(shape),
      team_(max_threads),
      prompt_attention_(attention_shape(shape)),
      generation_attention_(attention_shape(shape)),
      layers_(shape.num_layers),
      block_shift_(log2_of(shape.block_size)),
      query_scale_(kLog2E / std::sqrt(float(shape.head_dim))),
      hidden_stride_(round_up(shape.hidden_size, kBlockFeatures)),
      attention_stride_(round_up(shape.num_heads * shape.head_dim, kBlockFeatures)),
      inner_stride_(round_up(shape.intermediate_size, kBlockFeatures)),
      qkv_stride_((shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim) {}

void Llama::set_matrix(int layer, Path path, Product product, WeightKind kind, const void* data,
                       const float* bias) {
  const int width = shape_.num_heads * shape_.head_dim;
  int num_outputs = 0, num_features = 0;
  switch (product) {
    case Product::kQkv: num_outputs = int(qkv_stride_), num_features = shape_.hidden_size; break;
    case Product::kOut: num_outputs = shape_.hidden_size, num_features = width; break;
    case Product::kGateUp:
      num_outputs = 2 * shape_.intermediate_size, num_features = shape_.hidden_size;
      break;
    case Product::kDown:
      num_outputs = shape_.hidden_size, num_features = shape_.intermediate_size;
      break;
  }
  layers_[layer].matrices[int(path)][int(product)] = pack_matrix(
      team_, kind, data, bias, num_outputs, num_features, product == Product::kGateUp);
}

void Llama::set_norm(int layer, Norm norm, const float* weights) {
  const bool is_of_head = norm == Norm::kQuery || norm == Norm::kKey;
  layers_[layer].norms[int(norm)] =
      copy(weights, is_of_head ? shape_.head_dim : shape_.hidden_size);
}

void Llama::set_last_norm(const float* weights) { last_norm_ = copy(weights, shape_.hidden_size); }

void Llama::set_embedding(const bf16* data) {
  const std::size_t size = std::size_t(shape_.vocab_size) * shape_.hidden_size;
  embedding_.resize(size);
  std::memcpy(embedding_.data(), data, size * sizeof(bf16));
}

void Llama::set_head(WeightKind kind, const void* data) {
  head_ = pack_matrix(team_, kind, data, nullptr, shape_.vocab_size, shape_.hidden_size, false);
}

void Llama::set_rope(const float* table) {
  rope_ = copy(table, std::size_t(shape_.num_positions) * shape_.head_dim);
}

std::size_t Llama::num_bytes() const {
  std::size_t total = embedding_.size() * sizeof(bf16) + head_->num_bytes();
  for (const Layer& layer : layers_) {
    for (const auto& path : layer.matrices) {
      for (const auto& matrix : path) total += matrix ? matrix->num_bytes() : 0;
    }
  }
  return total;
}

void Llama::step(const StepRun* runs, int num_runs, const std::int32_t* token_ids,
                 const std::int32_t* tables, float* logits, std::int32_t* likeliest) {
  check(runs, num_runs, token_ids);
  const PlainFloats plain;
  int num_wanted = 0;
  for (int i = 0; i < num_runs; ++i) num_wanted = std::max(num_wanted, runs[i].logits_row + 1);
  wanted_.resize(std::size_t(num_wanted) * shape_.hidden_size);
  // Prompts first: generated rows of the same sequence see them, never the other way round.
  for (const Path path : {Path::kPrompt, Path::kGeneration}) {
    std::vector<Row> rows;
    std::vector<Run> attended;
    for (int i = 0; i < num_runs; ++i) {
      const StepRun& run = runs[i];
      if (run.path != int(path)) continue;
      const std::int32_t* table = tables + run.first_block;
      attended.push_back({run.start, run.num_rows, table});
      for (int row = 0; row < run.num_rows; ++row) {
        const bool is_last = row + 1 == run.num_rows;
        rows.push_back({run.start + row, token_ids[run.first_token + row], table,
                        is_last ? run.logits_row : -1});
      }
    }
    if (!rows.empty()) pass(path, rows, attended);
  }
  if (num_wanted == 0) return;
  normalize(last_norm_.data(), num_wanted, wanted_.data(), normed_, hidden_stride_);
  multiply(*head_, normed_, hidden_stride_, num_wanted,
           {Finish::kStore, logits, shape_.vocab_size});
  finish(logits, likeliest, num_wanted);
}

// What is wrong here would be somebody else's memory, read or written.
void Llama::check(const StepRun* runs, int num_runs, const std::int32_t* token_ids) const {
  for (int i = 0; i < num_runs; ++i) {
    const StepRun& run = runs[i];
    const std::int64_t end = std::int64_t(run.start) + run.num_rows;
    if (run.start < 0 || run.num_rows < 1 || end > shape_.num_positions) {
      throw std::out_of_range("rows [" + std::to_string(run.start) + ", " + std::to_string(end) +
                              ") of " + std::to_string(shape_.num_positions) + " positions");
    }
    for (int row = 0; row < run.num_rows; ++row) {
      const std::int32_t token_id = token_ids[run.first_token + row];
      if (token_id < 0 || token_id >= shape_.vocab_size) {
        throw std::out_of_range("a token is outside [0, " + std::to_string(shape_.vocab_size) + ")");
      }
    }
  }
}

void Llama::pass(Path path, std::vector<Row>& rows, std::vector<Run>& runs) {
  int num_rows = int(rows.size());
  const std::int64_t hidden = shape_.hidden_size;
  x_.at_least(num_rows * hidden);
  qkv_.at_least(num_rows * qkv_stride_);
  queries_.at_least(num_rows * attention_stride_);
  attended_.at_least(num_rows * attention_stride_);
  inner_.at_least(num_rows * inner_stride_);
  positions_.resize(num_rows);
  tables_.resize(num_rows);
  for (int i = 0; i < num_rows; ++i) {
    positions_[i] = rows[i].position;
    tables_[i] = rows[i].table;
  }
  each_row(num_rows, [&](int i) {
    const bf16* from = embedding_.data() + rows[i].token_id * hidden;
    float* to = x_.data() + i * hidden;
    for (int k = 0; k < hidden; ++k) to[k] = to_float(from[k]);
  });

  for (int index = 0; index < shape_.num_layers; ++index) {
    const Layer& layer = layers_[index];
    const KvView kv = kv_of(index);
    normalize(layer.norms[int(Norm::kInput)].data(), num_rows, x_.data(), normed_, hidden_stride_);
    multiply(matrix(layer, path, Product::kQkv), normed_, hidden_stride_, num_rows,
             {Finish::kStore, qkv_.data(), qkv_stride_});
    rotate_and_keep(layer, kv, rows);
    if (index + 1 == shape_.num_layers) {
      // Of the last layer, only rows that sample are needed beyond their KV.
      num_rows = keep_wanted(rows, runs);
      if (num_rows == 0) return;
    }
    attend(path, kv, num_rows, runs);
    multiply(matrix(layer, path, Product::kOut), attended_, attention_stride_, num_rows,
             {Finish::kAdd, x_.data(), hidden});
    normalize(layer.norms[int(Norm::kPost)].data(), num_rows, x_.data(), normed_, hidden_stride_);
    multiply(matrix(layer, path, Product::kGateUp), normed_, hidden_stride_, num_rows,
             {Finish::kSwiglu, inner_.data(), inner_stride_});
    multiply(matrix(layer, path, Product::kDown), inner_, inner_stride_, num_rows,
             {Finish::kAdd, x_.data(), hidden});
  }
  for (int i = 0; i < num_rows; ++i) {
    std::memcpy(wanted_.data() + rows[i].logits_row * hidden, x_.data() + i * hidden,
                hidden * sizeof(float));
  }
}

// Moves the rows that sample to the front, each a run of its own; returns how many there are.
int Llama::keep_wanted(std::vector<Row>& rows, std::vector<Run>& runs) {
  const std::size_t hidden = shape_.hidden_size;
  const std::size_t width = std::size_t(shape_.num_heads) * shape_.head_dim;
  int kept = 0;
  runs.clear();
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (rows[i].logits_row < 0) continue;
    std::memmove(x_.data() + kept * hidden, x_.data() + i * hidden, hidden * sizeof(float));
    std::memmove(queries_.data() + kept * width, queries_.data() + i * width, width * sizeof(bf16));
    positions_[kept] = rows[i].position;
    tables_[kept] = rows[i].table;
    rows[kept] = rows[i];
    runs.push_back({rows[i].position, 1, rows[i].table});
    ++kept;
  }
  return kept;
}

void Llama::attend(Path path, const KvView& kv, int num_rows, const std::vector<Run>& runs) {
  if (path == Path::kGeneration) {
    generation_attention_.run(team_, kv, num_rows, positions_.data(), tables_.data(),
                              queries_.data(), attended_.data(), attention_stride_);
    return;
  }
  const std::int64_t width = std::int64_t(shape_.num_heads) * shape_.head_dim;
  std::int64_t first = 0;
  for (const Run& run : runs) {
    prompt_attention_.run(team_, kv, run, queries_.data() + first * width,
                          attended_.data() + first * attention_stride_, attention_stride_);
    first += run.num_rows;
  }
}

void Llama::multiply(const Matrix& matrix, const Array<bf16>& rows, std::int64_t stride,
                     int num_rows, const Output& output) {
  if (matrix.needs_block_sums()) {
    const int num_blocks = int(stride / kBlockFeatures);
    block_sums_.at_least(std::size_t(num_rows) * num_blocks);
    each_row(num_rows, [&](int row) {
      sum_blocks(rows.data() + row * stride, num_blocks,
                 block_sums_.data() + std::int64_t(row) * num_blocks);
    });
  }
  matrix.multiply(team_, {rows.data(), stride, num_rows, block_sums_.data()}, output);
}

const Matrix& Llama::matrix(const Layer& layer, Path path, Product product) const {
  const auto& own = layer.matrices[int(path)][int(product)];
  return own ? *own : *layer.matrices[int(Path::kPrompt)][int(product)];
}

KvView Llama::kv_of(int layer) const {
  const KvKind kind = KvKind(shape_.kv_kind);
  const std::int64_t num_parts = 2 * std::int64_t(shape_.num_layers);
  KvView view{};
  view.kind = kind;
  view.block_shift = block_shift_;
  view.slot_stride = std::int64_t(shape_.num_kv_heads) * shape_.head_dim * value_num_bytes(kind);
  view.value_offset = view.slot_stride * shape_.block_size;
  view.data = cache_ + layer * 2 * view.value_offset;
  view.block_stride = num_parts * view.value_offset;
  if (kind != KvKind::kInt8) return view;
  // Scales follow their block's values.
  view.scale_slot_stride = shape_.num_kv_heads * std::int64_t(sizeof(bf16));
  view.scale_value_offset = view.scale_slot_stride * shape_.block_size;
  view.scales = cache_ + view.block_stride + layer * 2 * view.scale_value_offset;
  view.block_stride += num_parts * view.scale_value_offset;
  return view;
}

template <class Body>
void Llama::each_row(int num_rows, const Body& body) {
  if (num_rows < kRowsWorthSharing) {
    for (int row = 0; row < num_rows; ++row) body(row);
    return;
  }
  team_.run((num_rows + kRowsOfTurn - 1) / kRowsOfTurn, [&](int turn, int) {
    const int end = std::min(num_rows, (turn + 1) * kRowsOfTurn);
    for (int row = turn * kRowsOfTurn; row < end; ++row) body(row);
  });
}

void Llama::normalize(const float* norm, int num_rows, const float* from, Array<bf16>& to,
                      std::int64_t stride) {
  const int size = shape_.hidden_size;
  to.at_least(num_rows * stride);
  each_row(num_rows, [&](int row) {
    const float* x = from + std::int64_t(row) * size;
    bf16* out = to.data() + row * stride;
    const __m512 scale = _mm512_set1_ps(scale_of(x, size, shape_.rms_norm_eps));
    for (int i = 0; i < size; i += kLanes) {
      const __mmask16 lanes = first_lanes(size - i);
      const __m512 values = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, x + i), scale);
      const __m512 result = _mm512_mul_ps(values, _mm512_maskz_loadu_ps(lanes, norm + i));
      _mm256_mask_storeu_epi16(out + i, lanes, (__m256i)_mm512_cvtneps_pbh(result));
    }
  });
}

void Llama::rotate_and_keep(const Layer& layer, const KvView& kv, const std::vector<Row>& rows) {
  const int width = shape_.num_heads * shape_.head_dim;
  each_row(int(rows.size()), [&](int i) {
    rotate_row(layer, kv, rows[i], qkv_.data() + i * qkv_stride_,
               queries_.data() + std::int64_t(i) * width);
  });
}

void Llama::rotate_row(const Layer& layer, const KvView& kv, const Row& row, float* qkv,
                       bf16* queries) {
  const int dim = shape_.head_dim;
  const float* rope = rope_.data() + std::int64_t(row.position) * dim;
  const Array<float>& query_norm = layer.norms[int(Norm::kQuery)];
  const Array<float>& key_norm = layer.norms[int(Norm::kKey)];
  for (int head = 0; head < shape_.num_heads; ++head) {
    float* x = qkv + head * dim;
    if (query_norm.size()) normalize_head(x, dim, query_norm.data(), shape_.rms_norm_eps);
    rotate_head(x, rope, dim / 2);
    round_scaled(x, dim, query_scale_, queries + head * dim);
  }
  float* keys = qkv + shape_.num_heads * dim;
  for (int head = 0; head < shape_.num_kv_heads; ++head) {
    float* x = keys + head * dim;
    if (key_norm.size()) normalize_head(x, dim, key_norm.data(), shape_.rms_norm_eps);
    rotate_head(x, rope, dim / 2);
  }
  std::uint8_t* at = kv.key(row.table, row.position);
  const bool has_scales = kv.kind == KvKind::kInt8;
  keep(kv.kind, keys, shape_.num_kv_heads, dim, at,
       has_scales ? kv.key_scales(row.table, row.position) : nullptr);
  keep(kv.kind, keys + shape_.num_kv_heads * dim, shape_.num_kv_heads, dim, at + kv.value_offset,
       has_scales ? kv.value_scales(row.table, row.position) : nullptr);
}

void Llama::finish(float* logits, std::int32_t* likeliest, int num_rows) {
  const int size = shape_.vocab_size;
  team_.run(num_rows, [&](int row, int) {
    const float* x = logits + std::int64_t(row) * size;
    const __m512 infinity = _mm512_set1_ps(INFINITY);
    __m512 top = _mm512_set1_ps(-INFINITY);
    __mmask16 finite = 0xffff;
    for (int i = 0; i < size; i += kLanes) {
      const __mmask16 lanes = first_lanes(size - i);
      const __m512 values = _mm512_maskz_loadu_ps(lanes, x + i);
      finite &= _mm512_cmp_ps_mask(_mm512_abs_ps(values), infinity, _CMP_LT_OQ);
      top = _mm512_mask_max_ps(top, lanes, top, values);
    }
    likeliest[row] = -1;
    if (finite != 0xffff) return;
    const __m512 highest = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    for (int i = 0; i < size; i += kLanes) {
      const __m512 values = _mm512_maskz_loadu_ps(first_lanes(size - i), x + i);
      const __mmask16 found =
          _mm512_mask_cmp_ps_mask(first_lanes(size - i), values, highest, _CMP_EQ_OQ);
      if (found) {
        likeliest[row] = i + __builtin_ctz(found);
        return;
      }
    }
  });
}

}  // namespace kvrelay
