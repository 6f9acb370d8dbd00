// CUDA's execution model on one CPU thread, for tests: threads are fibers, blocks run one by one.
//
// It is meant to be strict where a GPU may be lenient:
//   - shared memory holds NaN at the start of a block and is followed by a guard that is checked at its end;
//   - a copy that was started with cp.async takes place when it is waited for, not before;
//   - a barrier that not all threads reach is an error (every thread of a block takes part in __syncthreads);
//   - blocks, warps and lanes run in ascending or in descending order (`descending`), on until they have to
//     wait: a missing barrier, or a block that needs another one of its launch, shows as a difference;
//   - a block that waits for another one (dataflow.h) finds it finished, or there is an error: no block may
//     need one that starts after it, in either order.
//
// Tensor-core products round as Hopper's may: exact products of tf32 operands (their last 13 bits are
// ignored), summed with the accumulator and truncated, not rounded, to float. So do its approximate
// functions: `rough` leaves two bits out.
#pragma once

#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <ucontext.h>

#include <cmath>

namespace rlsedit {
namespace emulate {

struct Index {
  unsigned x = 1, y = 1, z = 1;
  Index(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

constexpr size_t kMostShared = 227 * 1024;  // what a block may have on sm_90
constexpr int kProcessors = 132;
constexpr size_t kGuard = 256;
constexpr size_t kStack = 256 * 1024;
constexpr int kWords = 8;  // that a lane can show to its warp at once

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;
};

struct Barrier {
  std::vector<int> waiting;
};

struct Warp {
  Barrier barrier;
  uint64_t words[2][32][kWords];
};

struct Fiber {
  std::unique_ptr<char[]> stack;
  ucontext_t start;
  jmp_buf place;
  bool started = false;
  Index thread;
  int turn = 0;                           // parity of the warp's exchanges
  std::vector<std::vector<Copy>> groups;  // committed, not yet waited for
  std::vector<Copy> open;
};

class Machine {
 public:
  Index block, grid;
  bool descending = false;
  int launches = 0;

  static Machine& here() {
    static thread_local Machine machine;
    return machine;
  }

  void run(Index grid_size, int threads, size_t shared, std::function<void()> kernel) {
    if (shared > kMostShared)
      throw std::runtime_error("a kernel asks for " + std::to_string(shared) + " bytes of shared memory");
    if (threads % 32 != 0 || threads > 1024) throw std::runtime_error("threads of a block");
    if (grid_size.x == 0 || grid_size.y == 0 || grid_size.z == 0 || grid_size.y > 65535 ||
        grid_size.z > 65535)
      throw std::runtime_error("grid of a launch");
    ++launches;
    grid = grid_size;
    threads_ = threads;
    kernel_ = std::move(kernel);
    grow(threads, shared);
    const auto place = [&](unsigned i, unsigned count) { return descending ? count - 1 - i : i; };
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          block = Index(place(x, grid.x), place(y, grid.y), place(z, grid.z));
          run_block(shared);
        }
  }

  // The launch ends with an error; called by a thread of a block.
  [[noreturn]] void fail(const char* message) {
    failure_ = message;
    leave();
  }

  Fiber& current() { return *fibers_[static_cast<size_t>(current_)]; }
  unsigned char* shared() { return shared_.data() + offset_; }

  void wait_for_block() { wait(block_barrier_, threads_); }
  void wait_for_warp() { wait(warps_[static_cast<size_t>(current_ / 32)].barrier, 32); }

  // Every lane shows some words; afterwards every lane may read those of all.
 uint64_t (*show(const void* words, size_t bytes)) [kWords] {
   Warp& warp = warps_[static_cast<size_t>(current_ / 32)];
   Fiber& fiber = current();
   const int turn = fiber.turn;
   fiber.turn ^= 1;
   std::memcpy(warp.words[turn][current_ % 32], words, bytes);
   wait_for_warp();
   return warp.words[turn];
 }

 private : void grow(int threads, size_t shared) {
    while (static_cast<int>(fibers_.size()) < threads) {
      auto fiber = std::make_unique<Fiber>();
      fiber->stack.reset(new char[kStack]);
      fibers_.push_back(std::move(fiber));
    }
    warps_.resize(static_cast<size_t>(threads / 32));
    if (shared_.size() < shared + kGuard + 16) shared_.resize(shared + kGuard + 16);
    offset_ = (16 - reinterpret_cast<uintptr_t>(shared_.data()) % 16) % 16;
  }

  void run_block(size_t shared) {
    std::memset(this->shared(), 0xff, shared);
    std::memset(this->shared() + shared, 0x5a, kGuard);
    ready_.clear();
    finished_ = 0;
    failure_ = nullptr;
    for (int i = 0; i < threads_; ++i) {
      fibers_[static_cast<size_t>(i)]->thread = Index(static_cast<unsigned>(i), 0, 0);
      ready_.push_back(descending ? threads_ - 1 - i : i);
    }
    if (_setjmp(main_) == 0) resume_next();
    if (finished_ != threads_) {
      fibers_.clear();  // stuck in the middle of a kernel: never resumed
      throw std::runtime_error(failure_ != nullptr ? failure_ : "a barrier that not all threads reach");
    }
    for (size_t i = 0; i < kGuard; ++i)
      if (this->shared()[shared + i] != 0x5a) throw std::runtime_error("a write behind the shared memory");
    bool open = false, pending = false;
    for (int i = 0; i < threads_; ++i) {
      Fiber& fiber = *fibers_[static_cast<size_t>(i)];
      for (const auto& group : fiber.groups) pending = pending || !group.empty();
      open = open || !fiber.open.empty();
      fiber.groups.clear();
      fiber.open.clear();
    }
    if (pending) throw std::runtime_error("a copy that nobody waited for");
    if (open) throw std::runtime_error("a copy that was not committed");
  }

  void wait(Barrier& barrier, int all) {
    barrier.waiting.push_back(current_);
    if (static_cast<int>(barrier.waiting.size()) < all) {
      if (_setjmp(current().place) == 0) resume_next();
      return;
    }
    for (int i = 0; i < all; ++i) {
      const int other = barrier.waiting[static_cast<size_t>(descending ? all - 1 - i : i)];
      if (other != current_) ready_.push_back(other);
    }
    barrier.waiting.clear();
  }

  [[noreturn]] void leave() {
    block_barrier_.waiting.clear();
    for (Warp& warp : warps_) warp.barrier.waiting.clear();
    _longjmp(main_, 1);
  }

  [[noreturn]] void resume_next() {
    if (ready_.empty()) leave();
    current_ = ready_.front();
    ready_.pop_front();
    Fiber& fiber = current();
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, &Machine::body, 0);
    setcontext(&fiber.start);
    std::abort();
  }

  static void body() {
    for (;;) {
      Machine& machine = here();
      machine.kernel_();
      ++machine.finished_;
      if (_setjmp(machine.current().place) == 0) machine.resume_next();
    }
  }

  int threads_ = 0, current_ = 0, finished_ = 0;
  size_t offset_ = 0;
  std::function<void()> kernel_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Warp> warps_;
  std::vector<unsigned char> shared_;
  std::deque<int> ready_;
  const char* failure_ = nullptr;
  Barrier block_barrier_;
  jmp_buf main_;
};

inline void copy_async(void* to, const void* from, int bytes, int valid) {
  if (reinterpret_cast<uintptr_t>(to) % static_cast<uintptr_t>(bytes) != 0 ||
      reinterpret_cast<uintptr_t>(from) % static_cast<uintptr_t>(bytes) != 0) {
    std::fprintf(stderr, "cp.async: misaligned address\n");
    std::abort();
  }
  Machine::here().current().open.push_back({to, from, bytes, valid});
}

inline void copy_commit() {
  Fiber& fiber = Machine::here().current();
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

inline void copy_wait(size_t left) {
  Fiber& fiber = Machine::here().current();
  if (fiber.groups.size() <= left) return;
  const size_t done = fiber.groups.size() - left;
  for (size_t i = 0; i < done; ++i)
    for (const Copy& copy : fiber.groups[i]) {
      std::memset(copy.to, 0, static_cast<size_t>(copy.bytes));
      std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.valid));
    }
  fiber.groups.erase(fiber.groups.begin(), fiber.groups.begin() + static_cast<std::ptrdiff_t>(done));
}

// The count that a block waits for. Blocks run one by one: what is not done now never will be.
inline unsigned awaited(const unsigned* done, unsigned count) {
  if (*done < count) Machine::here().fail("a block waits for one that starts after it");
  return *done;
}

template <class T>
T exchange(T value, int from) {
  T result;
  std::memcpy(&result, Machine::here().show(&value, sizeof(T))[from & 31], sizeof(T));
  return result;
}

inline float truncated(double exact) {
  float result = static_cast<float>(exact);
  if (static_cast<double>(result) == exact || result - result != 0.0f) return result;
  const bool away = (exact > 0) ? result > exact : result < exact;
  if (away) {
    uint32_t bits;
    std::memcpy(&bits, &result, 4);
    --bits;
    std::memcpy(&result, &bits, 4);
  }
  return result;
}

inline float tf32(uint32_t bits) {
  float value;
  bits &= 0xffffe000u;
  std::memcpy(&value, &bits, 4);
  return value;
}

// What a special function of the GPU may return: all but the last two bits.
inline float rough(float exact) {
  uint32_t bits;
  std::memcpy(&bits, &exact, 4);
  bits &= 0xfffffffcu;
  std::memcpy(&exact, &bits, 4);
  return exact;
}

// mma.m16n8k8, tf32: a lane's fragments as in mma.h.
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  auto words = Machine::here().show(mine, sizeof mine);
  const int lane = static_cast<int>(Machine::here().current().thread.x) & 31, g = lane >> 2, t = lane & 3;
  const auto word = [&](int from, int i) {
    uint32_t all[6];
    std::memcpy(all, words[from], sizeof all);
    return tf32(all[i]);
  };
  for (int i = 0; i < 4; ++i) {
    const int row = g + (i >= 2 ? 8 : 0), column = 2 * t + (i & 1);
    double sum = d[i];
    for (int k = 0; k < 8; ++k) {
      const float left = word((row & 7) * 4 + (k & 3), (row >= 8 ? 1 : 0) + (k >= 4 ? 2 : 0));
      const float right = word(column * 4 + (k & 3), 4 + (k >= 4 ? 1 : 0));
      sum += static_cast<double>(left) * static_cast<double>(right);
    }
    d[i] = truncated(sum);
  }
}

// mma.m8n8k4, f64.
inline void mma_f64(double& d0, double& d1, double a, double b) {
  const double mine[2] = {a, b};
  auto words = Machine::here().show(mine, sizeof mine);
  const int lane = static_cast<int>(Machine::here().current().thread.x) & 31, g = lane >> 2, t = lane & 3;
  const auto word = [&](int from, int i) {
    double all[2];
    std::memcpy(all, words[from], sizeof all);
    return all[i];
  };
  for (int k = 0; k < 4; ++k) {
    d0 += word(g * 4 + k, 0) * word(2 * t * 4 + k, 1);
    d1 += word(g * 4 + k, 0) * word((2 * t + 1) * 4 + k, 1);
  }
}

}  // namespace emulate

using Stream = int;
using dim3 = emulate::Index;

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared, Stream, A... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  std::tuple<P...> values(arguments...);
  emulate::Machine::here().run(grid, threads, shared, [&] { std::apply(kernel, values); });
}

inline void clear_memory(void* memory, size_t bytes, Stream) {
  if (bytes > 0) std::memset(memory, 0, bytes);
}

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulate::Machine::here().shared());
}

}  // namespace rlsedit

struct alignas(16) int4 {
  int x, y, z, w;
};

inline unsigned atomicAdd(unsigned* counter, unsigned more) {
  const unsigned before = *counter;
  *counter += more;
  return before;
}

#define RLSEDIT_DEVICE inline
#define RLSEDIT_HOST_DEVICE inline
#define __global__
#define __launch_bounds__(...)
#define threadIdx (::rlsedit::emulate::Machine::here().current().thread)
#define blockIdx (::rlsedit::emulate::Machine::here().block)
#define gridDim (::rlsedit::emulate::Machine::here().grid)
#define __syncthreads() (::rlsedit::emulate::Machine::here().wait_for_block())
#define __syncwarp() (::rlsedit::emulate::Machine::here().wait_for_warp())
using std::fabs;
using std::fma;
using std::fmax;
using std::fmin;
using std::ilogb;
using std::ldexp;
using std::sqrt;
#define __shfl_sync(mask, value, from) (::rlsedit::emulate::exchange(value, from))
#define __shfl_xor_sync(mask, value, other) \
  (::rlsedit::emulate::exchange(value, (static_cast<int>(threadIdx.x) & 31) ^ (other)))
