#include "team.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <climits>

#include "simd.h"

namespace kvrelay {
namespace {

// A step has hundreds of rounds some microseconds apart, and waking a thread takes tens of
// them. So threads look for the next round for a moment before they sleep; not for long,
// since on a small machine somebody else needs the core.
constexpr int kLooksBeforeSleep = 4000;

// Who is waited for longer, and longer than his turns would have taken the caller, has lost its
// core to another process.
constexpr std::int64_t kLostCoreNs = 400'000;

// Then the caller goes on alone, at first for so long, twice as long whenever that was not
// enough. Waiting for a lost core hundreds of times a step would be slower than one thread.
constexpr std::int64_t kAloneNs = 4'000'000;
constexpr std::int64_t kMostAloneNs = 128'000'000;

constexpr int kLooksBeforeClock = 256;

std::int64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return std::int64_t(now.tv_sec) * 1'000'000'000 + now.tv_nsec;
}

enum Half { kNumber = 0, kThreads = 1 };  // of a round

std::uint32_t half_of(std::uint64_t round, Half half) { return round >> (32 * half); }

const std::uint32_t* word_of(const std::atomic<std::uint64_t>& round, Half half) {
  return reinterpret_cast<const std::uint32_t*>(&round) + half;
}

// Until that half changes, or for no reason.
void sleep_while(const std::atomic<std::uint64_t>& round, Half half, std::uint64_t is) {
  syscall(SYS_futex, word_of(round, half), FUTEX_WAIT_PRIVATE, half_of(is, half), nullptr, nullptr,
          0);
}

void wake_all(const std::atomic<std::uint64_t>& round, Half half) {
  syscall(SYS_futex, word_of(round, half), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace

Team::Team(int max_threads) {
  try {
    for (int thread = 1; thread < max_threads; ++thread) {
      workers_.emplace_back([this, thread] { work(thread); });
    }
  } catch (...) {  // as many threads as there may be
    stop();
    throw;
  }
  set_threads(max_threads);
}

Team::~Team() { stop(); }

void Team::stop() {
  is_stopping_ = true;
  round_.store(half_of(round_.load(), kNumber) + 1u);  // of no threads
  wake_all(round_, kNumber);
  wake_all(round_, kThreads);
  for (std::thread& worker : workers_) worker.join();
}

void Team::set_threads(int num_threads) {
  num_threads_ = num_threads < 1 ? 1 : num_threads > max_threads() ? max_threads() : num_threads;
}

void Team::run_together(int num_turns, Call call, const void* body) {
  num_turns_ = num_turns;
  call_ = call;
  body_ = body;
  next_turn_.store(0, std::memory_order_relaxed);
  num_busy_.store(num_threads_ - 1, std::memory_order_relaxed);
  const std::int64_t began_ns = now_ns();
  const std::uint64_t last = round_.load(std::memory_order_relaxed);
  round_.store(std::uint64_t(num_threads_) << 32 | (half_of(last, kNumber) + 1u));
  if (half_of(last, kThreads) != std::uint32_t(num_threads_)) wake_all(round_, kThreads);
  if (num_asleep_.load() > 0) wake_all(round_, kNumber);
  take_turns(0);
  wait_for_others(began_ns);
}

bool Team::stands_alone() {
  if (alone_until_ns_ == 0) return false;
  if (now_ns() < alone_until_ns_) return true;
  alone_until_ns_ = 0;
  return false;
}

void Team::wait_for_others(std::int64_t began_ns) {
  std::int64_t since_ns = 0, waited_ns = 0;
  for (int looks = 0; num_busy_.load(std::memory_order_acquire) > 0; ++looks) {
    _mm_pause();
    if (looks < kLooksBeforeClock) continue;
    if (since_ns == 0) since_ns = now_ns();
    waited_ns = now_ns() - since_ns;
    // It may be this very core that the other one needs.
    if (waited_ns > kLostCoreNs) sched_yield();
  }
  if (waited_ns > kLostCoreNs && waited_ns > num_threads_ * (since_ns - began_ns)) {
    alone_for_ns_ = std::min(std::max(2 * alone_for_ns_, kAloneNs), kMostAloneNs);
    alone_until_ns_ = now_ns() + alone_for_ns_;
  } else if (alone_for_ns_ > 0) {
    alone_for_ns_ -= alone_for_ns_ / 64 + 1;
  }
}

void Team::take_turns(int thread) {
  for (;;) {
    const int turn = next_turn_.fetch_add(1, std::memory_order_relaxed);
    if (turn >= num_turns_) return;
    call_(body_, turn, thread);
  }
}

void Team::work(int thread) {
  const PlainFloats plain;
  std::uint64_t last = 0;
  for (;;) {
    wait_for_round(last);
    last = round_.load(std::memory_order_acquire);
    if (is_stopping_) return;
    if (std::uint32_t(thread) < half_of(last, kThreads)) {
      take_turns(thread);
      num_busy_.fetch_sub(1, std::memory_order_release);
      continue;
    }
    while (half_of(round_.load(), kThreads) == half_of(last, kThreads)) {
      sleep_while(round_, kThreads, last);
    }
  }
}

void Team::wait_for_round(std::uint64_t last) {
  for (int looks = 0; looks < kLooksBeforeSleep; ++looks) {
    if (round_.load(std::memory_order_acquire) != last) return;
    _mm_pause();
  }
  num_asleep_.fetch_add(1);
  while (round_.load() == last) sleep_while(round_, kNumber, last);
  num_asleep_.fetch_sub(1);
}

}  // namespace kvrelay
