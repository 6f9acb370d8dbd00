// Work sharing on torch's own thread pool, the only one this library uses.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <vector>

namespace rlsedit {

// How many threads n tasks are shared by.
inline int64_t workers(int64_t n) {
  return std::min<int64_t>(n, torch::stable::get_num_threads());
}

// Run f(task, worker) for the tasks 0, ..., n - 1, each once, in any order. Tasks are handed out one at a
// time, so a thread that is held up does not hold up the others; what f computes must not depend on who runs
// it: worker, of 0, ..., count - 1, is for memory of its own. An exception ends the tasks and is thrown here
// as it is; torch would make it one of its own that says nothing.
template <class F>
void share(int64_t n, int64_t count, const F& f) {
  if (count <= 1) {
    for (int64_t i = 0; i < n; ++i) f(i, int64_t{0});
    return;
  }
  std::atomic<int64_t> next{0}, arrived{0};
  std::atomic<bool> failed{false};
  std::exception_ptr why;
  torch::stable::parallel_for(0, count, 1, [&](int64_t, int64_t) {
    const int64_t worker = arrived++;
    try {
      for (int64_t i = next++; i < n; i = next++) f(i, worker);
    } catch (...) {
      if (!failed.exchange(true)) why = std::current_exception();
      next = n;
    }
  });
  if (failed) std::rethrow_exception(why);
}

template <class F>
void for_each_task(int64_t n, const F& f) {
  share(n, workers(n), [&f](int64_t task, int64_t) { f(task); });
}

// Run f(b, space) for the elements of a batch: side by side when they are many and small (inner loops then
// run on one thread), one after the other, each on all threads, otherwise. `work` is the number of
// multiply-adds of one element. make() takes the memory of one; it is called for all threads before the first
// f, so that a batch for which memory is short fails before anything is written.
template <class Make, class F>
void for_each_element(int64_t batch, int64_t work, const Make& make, const F& f) {
  constexpr int64_t kSmall = 1 << 22;  // about 0.1 ms: below, sharing an element costs more than it gains
  const int64_t count = batch > 1 && work <= kSmall ? workers(batch) : std::min<int64_t>(batch, 1);
  std::vector<decltype(make())> spaces;
  spaces.reserve(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) spaces.push_back(make());
  share(batch, count, [&](int64_t b, int64_t worker) { f(b, spaces[static_cast<size_t>(worker)]); });
}

}  // namespace rlsedit
