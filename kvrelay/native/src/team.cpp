#include "team.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>

namespace kvrelay {
namespace {

// A step has hundreds of rounds some microseconds apart, and waking a thread takes tens of
// them. So threads look for the next round for a moment before they sleep; not for long,
// since on a small machine somebody else needs the core.
constexpr int kLooksBeforeSleep = 4000;

// Whoever waits for a thread that lost its core must not keep it from getting one.
constexpr int kLooksBeforeYield = 2000;

void sleep_while(const std::atomic<std::uint32_t>& word, std::uint32_t value) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void wake_all(const std::atomic<std::uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace

Team::Team(int max_threads) {
  for (int thread = 1; thread < max_threads; ++thread) {
    workers_.emplace_back([this, thread] { work(thread); });
  }
  set_threads(max_threads);
}

Team::~Team() {
  is_stopping_ = true;
  round_.fetch_add(1);
  wake_all(round_);
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
  num_wanted_.store(num_threads_, std::memory_order_relaxed);
  num_busy_.store(int(workers_.size()), std::memory_order_relaxed);
  round_.fetch_add(1);
  if (num_asleep_.load() > 0) wake_all(round_);
  take_turns(0);
  for (int looks = 0; num_busy_.load(std::memory_order_acquire) > 0; ++looks) {
    if (looks < kLooksBeforeYield) {
      _mm_pause();
    } else {
      sched_yield();
    }
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
  std::uint32_t last = 0;
  for (;;) {
    wait_for_round(last);
    last = round_.load(std::memory_order_acquire);
    if (is_stopping_) return;
    if (thread < num_wanted_.load(std::memory_order_relaxed)) take_turns(thread);
    num_busy_.fetch_sub(1, std::memory_order_release);
  }
}

void Team::wait_for_round(std::uint32_t last) {
  for (int looks = 0; looks < kLooksBeforeSleep; ++looks) {
    if (round_.load(std::memory_order_acquire) != last) return;
    _mm_pause();
  }
  num_asleep_.fetch_add(1);
  while (round_.load() == last) sleep_while(round_, last);
  num_asleep_.fetch_sub(1);
}

}  // namespace kvrelay
