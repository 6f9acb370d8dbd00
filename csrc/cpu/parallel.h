// Work sharing on torch's own thread pool, the only one this library uses.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace rlsedit {

// Run f(0), ..., f(n - 1), each once, in any order and on any thread. Tasks are handed out one at a time, so
// a thread that is held up does not hold up the others; f must not depend on who runs it.
template <class F>
void for_each_task(int64_t n, const F& f) {
  const int64_t threads = std::min<int64_t>(n, torch::stable::get_num_threads());
  if (threads <= 1) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < n; i = next++) f(i);
  });
}

// The elements of a batch: side by side when they are many and small (inner loops then run on one thread),
// one after the other, each on all threads, otherwise. `work` is the number of multiply-adds of one element.
template <class F>
void for_each_element(int64_t batch, int64_t work, const F& f) {
  constexpr int64_t kSmall = 1 << 22;  // about 0.1 ms: below, sharing an element costs more than it gains
  if (batch > 1 && work <= kSmall) {
    for_each_task(batch, f);
  } else {
    for (int64_t b = 0; b < batch; ++b) f(b);
  }
}

}  // namespace rlsedit
