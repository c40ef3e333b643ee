// What Python calls. Every function that can fail returns 0, or 1 with a text for
// kvrelay_error; nothing is thrown across the border.
#include <cstdio>
#include <exception>

#include "llama.h"

using kvrelay::Llama;

namespace {

thread_local char last_error[256] = "";

template <class Body>
int guarded(const Body& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(last_error, sizeof last_error, "%s", error.what());
    return 1;
  }
}

}  // namespace

extern "C" {

// Of the sources and flags this was built from.
const char* kvrelay_sources() { return KVRELAY_SOURCES; }

const char* kvrelay_error() { return last_error; }

void* kvrelay_model_new(const kvrelay::Shape* shape, int max_threads) {
  Llama* model = nullptr;
  guarded([&] { model = new Llama(*shape, max_threads); });
  return model;
}

void kvrelay_model_free(void* model) { delete static_cast<Llama*>(model); }

int kvrelay_set_matrix(void* model, int layer, int path, int product, int kind, const void* data,
                       const float* bias) {
  return guarded([&] {
    static_cast<Llama*>(model)->set_matrix(layer, kvrelay::Path(path), kvrelay::Product(product),
                                           kvrelay::WeightKind(kind), data, bias);
  });
}

int kvrelay_set_norm(void* model, int layer, int norm, const float* weights) {
  return guarded(
      [&] { static_cast<Llama*>(model)->set_norm(layer, kvrelay::Norm(norm), weights); });
}

int kvrelay_set_ends(void* model, const std::uint16_t* embedding, const float* last_norm,
                     int head_kind, const void* head, const float* rope) {
  return guarded([&] {
    auto* llama = static_cast<Llama*>(model);
    llama->set_embedding(embedding);
    llama->set_last_norm(last_norm);
    llama->set_head(kvrelay::WeightKind(head_kind), head);
    llama->set_rope(rope);
  });
}

void kvrelay_set_cache(void* model, void* data) {
  static_cast<Llama*>(model)->set_cache(static_cast<std::uint8_t*>(data));
}

void kvrelay_set_threads(void* model, int num_threads) {
  static_cast<Llama*>(model)->set_threads(num_threads);
}

// How one slot's K or V is kept. For tests: a step does it where it computes.
void kvrelay_keep(int kind, const float* x, int num_heads, int dim, std::uint8_t* values,
                  std::uint16_t* scales) {
  const kvrelay::PlainFloats plain;
  kvrelay::keep(kvrelay::KvKind(kind), x, num_heads, dim, values, scales);
}

std::size_t kvrelay_num_bytes(void* model) { return static_cast<Llama*>(model)->num_bytes(); }

int kvrelay_step(void* model, const kvrelay::StepRun* runs, int num_runs,
                 const std::int32_t* token_ids, const std::int32_t* tables, float* logits,
                 std::int32_t* likeliest) {
  return guarded([&] {
    static_cast<Llama*>(model)->step(runs, num_runs, token_ids, tables, logits, likeliest);
  });
}

}  // extern "C"
