// Memory for long arrays, in huge pages where the system has them: weights are read from one
// end to the other in every step, and a page table of small pages would be read with them.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace kvrelay {

constexpr std::size_t kLineBytes = 64;
constexpr std::size_t kHugePageBytes = std::size_t(2) << 20;

template <class T>
class Array {
 public:
  Array() = default;
  explicit Array(std::size_t size) { resize(size); }
  Array(Array&& other) noexcept { *this = std::move(other); }
  Array& operator=(Array&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Array() { std::free(data_); }

  // Old contents are lost; new ones are zeros.
  void resize(std::size_t size) {
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
    if (size == 0) return;
    const std::size_t num_bytes = size * sizeof(T);
    const bool is_huge = num_bytes >= kHugePageBytes;
    const std::size_t unit = is_huge ? kHugePageBytes : kLineBytes;
    const std::size_t rounded = (num_bytes + unit - 1) / unit * unit;
    void* memory = std::aligned_alloc(unit, rounded);
    if (memory == nullptr) throw std::bad_alloc();
    if (is_huge) madvise(memory, rounded, MADV_HUGEPAGE);
    std::memset(memory, 0, rounded);
    data_ = static_cast<T*>(memory);
    size_ = size;
  }

  // For buffers that follow the largest batch seen.
  void at_least(std::size_t size) {
    if (size > size_) resize(size);
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  std::size_t size() const { return size_; }
  T& operator[](std::size_t i) { return data_[i]; }
  const T& operator[](std::size_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace kvrelay
