// Threads that share one loop at a time. Who takes which turn is left to chance, and so must
// never show in a result: every turn writes what no other turn writes or reads.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace kvrelay {

class Team {
 public:
  explicit Team(int max_threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // How many threads take part from now on, the caller's included.
  void set_threads(int num_threads);
  int num_threads() const { return num_threads_; }
  int max_threads() const { return int(workers_.size()) + 1; }

  // body(turn, thread) for every turn in [0, num_turns); returns when all are done.
  template <class Body>
  void run(int num_turns, const Body& body) {
    if (num_threads_ == 1 || num_turns <= 1 || stands_alone()) {
      for (int turn = 0; turn < num_turns; ++turn) body(turn, 0);
      return;
    }
    run_together(num_turns, &call<Body>, &body);
  }

 private:
  using Call = void (*)(const void* body, int turn, int thread);

  // A body that threw here would leave the others with a loop that is gone: better to end.
  template <class Body>
  static void call(const void* body, int turn, int thread) noexcept {
    (*static_cast<const Body*>(body))(turn, thread);
  }

  void run_together(int num_turns, Call call, const void* body);
  bool stands_alone();
  void wait_for_others(std::int64_t began_ns);
  void take_turns(int thread);
  void work(int thread);
  void wait_for_round(std::uint64_t last);
  void stop();

  std::vector<std::thread> workers_;
  int num_threads_ = 1;

  // Nanoseconds by a clock that never goes back; see `wait_for_others`.
  std::int64_t alone_until_ns_ = 0;
  std::int64_t alone_for_ns_ = 0;

  // One round of the loop. Written by the caller between rounds.
  int num_turns_ = 0;
  Call call_ = nullptr;
  const void* body_ = nullptr;

  // Its number in the low half, in the high one how many threads take part in it: whoever sees
  // the one sees the other, so threads that do not take part need not be waited for.
  alignas(64) std::atomic<std::uint64_t> round_{0};
  alignas(64) std::atomic<int> next_turn_{0};
  alignas(64) std::atomic<int> num_busy_{0};
  alignas(64) std::atomic<int> num_asleep_{0};
  std::atomic<bool> is_stopping_{false};
};

}  // namespace kvrelay
