// CUDA's execution model on one CPU thread, for tests: threads are fibers.
//
// It is meant to be strict where a GPU may be lenient:
//   - shared memory holds NaN at the start of a block and is followed by a guard that is checked at its end;
//   - a copy that was started with cp.async takes place when it is waited for, not before, and until then
//     its target holds NaN;
//   - a barrier that not all threads reach is an error (every thread of a block takes part in __syncthreads);
//   - blocks, warps and lanes run in ascending or in descending order (`descending`), on until they have to
//     wait: a missing barrier, or a block that needs another one of its launch, shows as a difference;
//   - `beside` blocks are under way at a time, one unless told otherwise. They take turns where one waits for
//     another (dataflow.h) or takes a ticket, the youngest first and as far as it can go: a block that does
//     not wait for what it reads shows as a difference. If all of them wait, there is an error: no block may
//     need one that starts after it.
// Hopper's own instructions are in warpgroup.h beside this.
// Compiled with -fsanitize=thread, it reports every pair of accesses that nothing orders (fibers.h).
//
// Tensor-core products round as Hopper's may: exact products of tf32 operands (their last 13 bits are
// ignored), summed with the accumulator and truncated, not rounded, to float. So do its approximate
// functions: `rough` leaves two bits out.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <cmath>

#include "fibers.h"

namespace rlsedit {
namespace emulate {

struct Index {
  unsigned x = 1, y = 1, z = 1;
  Index(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

constexpr size_t kGuard = 256;
#ifdef __SANITIZE_THREAD__
constexpr bool kRenewed = true;  // a block's shared memory is not what another block had
#else
constexpr bool kRenewed = false;
#endif
constexpr int kWords = 8;  // that a lane can show to its warp at once

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;
};

struct Barrier {
  std::vector<int> waiting;
  Order order;
};

struct Warp {
  Barrier barrier;
  uint64_t words[2][32][kWords];
};

struct Wgmmas;  // what a thread takes part in of its warpgroup's products (warpgroup.h)

struct Fiber {
  Context context;
  Index thread;
  int turn = 0;                           // parity of the warp's exchanges
  std::vector<std::vector<Copy>> groups;  // committed, not yet waited for
  std::vector<Copy> open;
  std::shared_ptr<Wgmmas> wgmmas;
};

// What a running block occupies.
struct Place {
  Index block;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> memory;
  size_t room = 0;
  unsigned char* shared = nullptr;
  std::deque<int> ready;
  Barrier barrier, groups[8];  // of the block, and of its warpgroups
  int current = 0, finished = 0;
  bool paused = false;

  void fit(int threads, size_t bytes) {
    while (static_cast<int>(fibers.size()) < threads) fibers.push_back(std::make_unique<Fiber>());
    warps.resize(static_cast<size_t>(threads / 32));
    const size_t needed = bytes + kGuard + 16;
    if (kRenewed || room < needed) {
      memory.reset(new unsigned char[needed]);
      room = needed;
    }
    shared = memory.get() + (16 - reinterpret_cast<uintptr_t>(memory.get()) % 16) % 16;
    barrier.order.renew();
    for (Barrier& group : groups) group.order.renew();
    for (Warp& warp : warps) warp.barrier.order.renew();
  }
};

inline std::string left_open(Place& place, int threads, size_t bytes);  // warpgroup.h

// The GPU that is emulated: an H200, unless a test asks for another one.
struct Gpu {
  size_t most_shared = 227 * 1024;  // bytes that a block may have
  int processors = 132;
  bool warpgroups = true;  // wgmma
};

class Machine {
 public:
  Gpu gpu;
  Index block, grid;
  uint32_t shared_start = 1024 + 48;  // the address of shared memory, if possible no multiple of 1024
  bool descending = false;
  unsigned beside = 1;
  int launches = 0;

  static Machine& here() {
    static thread_local Machine machine;
    return machine;
  }

  ~Machine() {
    const Aside aside;
    running_.clear();
    idle_.clear();
  }

  void run(Index grid_size, int threads, size_t shared, std::function<void()> kernel) {
    if (shared > gpu.most_shared)
      throw std::runtime_error("a kernel asks for " + std::to_string(shared) + " bytes of shared memory");
    if (threads % 32 != 0 || threads > 1024) throw std::runtime_error("threads of a block");
    if (grid_size.x == 0 || grid_size.y == 0 || grid_size.z == 0 || grid_size.y > 65535 ||
        grid_size.z > 65535)
      throw std::runtime_error("grid of a launch");
    ++launches;
    grid = grid_size;
    kernel_ = std::move(kernel);
    threads_ = threads;
    bytes_ = shared;
    const size_t all = size_t(grid.x) * grid.y * grid.z;
    size_t started = 0;
    ended_.reset(new char[1]);
    while (started < all || !running_.empty()) {
      moved_ = false;
      try {
        if (started < all && running_.size() < beside) {
          start(descending ? all - 1 - started : started);
          ++started;
          go_on(running_.size() - 1);
        } else {
          for (size_t i = running_.size(); i-- > 0;) go_on(i);  // the youngest goes as far as it can
        }
        if (!moved_) throw std::runtime_error("a block waits for one that starts after it");
      } catch (...) {
        running_.clear();  // stuck in the middle of a kernel: never resumed
        throw;
      }
    }
    comes_behind(ended_.get());
  }

  Fiber& current() { return *at_->fibers[static_cast<size_t>(at_->current)]; }
  int thread() const { return at_->current; }
  unsigned threads() const { return static_cast<unsigned>(threads_); }
  unsigned char* shared() { return at_->shared; }
  size_t shared_bytes() const { return bytes_; }

  void wait_for_block(const char* file, int line) { wait(at_->barrier, threads_, orders(file, line)); }
  void wait_for_warp(const char* file, int line) { wait_for_warp(orders(file, line)); }
  void wait_for_warp(bool orders, bool ahead = false) {
    wait(at_->warps[static_cast<size_t>(at_->current / 32)].barrier, 32, orders, ahead);
  }

  // A warpgroup goes on as far as it can before another one does.
  void wait_for_group(int group) { wait(at_->groups[group], 128, true, true); }

  // A thread that waits for another one to wake it.
  void park() {
    Context& mine = current().context;
    Context::go(mine, next());
  }
  void wake(int thread) { at_->ready.push_back(thread); }
  void let_others() {
    wake(thread());
    park();
  }

  // A mistake of the kernel: the launch ends with it.
  void fail(const char* what) {
    failure_ = what;
    Context::go(current().context, main_);
  }

  // Every lane shows some words; afterwards every lane may read those of all.
  auto show(const void* words, size_t bytes, bool ahead = false) -> uint64_t (*)[kWords] {
    Warp& warp = at_->warps[static_cast<size_t>(at_->current / 32)];
    Fiber& fiber = current();
    const int turn = fiber.turn;
    fiber.turn ^= 1;
    std::memcpy(warp.words[turn][at_->current % 32], words, bytes);
    wait_for_warp(false, ahead);  // registers are exchanged, memory is not ordered
    return warp.words[turn];
  }

  // Called by a thread of a block: the blocks beside it go on.
  void pause() {
    at_->ready.push_front(at_->current);
    at_->paused = true;
    Context::go(current().context, main_);
  }
  void moved() { moved_ = true; }

 private:
  void start(size_t number) {
    const Aside aside;
    if (idle_.empty()) idle_.push_back(std::make_unique<Place>());
    running_.push_back(std::move(idle_.back()));
    idle_.pop_back();
    Place& place = *running_.back();
    place.fit(threads_, bytes_);
    const auto i = static_cast<unsigned>(number % (size_t(grid.x) * grid.y));
    place.block = Index(i % grid.x, i / grid.x, static_cast<unsigned>(number / (size_t(grid.x) * grid.y)));
    std::memset(place.shared, 0xff, bytes_);
    std::memset(place.shared + bytes_, 0x5a, kGuard);
    place.ready.clear();
    place.finished = 0;
    for (int i = 0; i < threads_; ++i) {
      Fiber& fiber = *place.fibers[static_cast<size_t>(i)];
      fiber.thread = Index(static_cast<unsigned>(i), 0, 0);
      fiber.context.start(&Machine::body);
      place.ready.push_back(descending ? threads_ - 1 - i : i);
    }
    moved_ = true;
  }

  // A block until it pauses or has finished.
  void go_on(size_t number) {
    const Aside aside;
    at_ = running_[number].get();
    block = at_->block;
    at_->paused = false;
    Context::go(main_, next());
    if (failure_ != nullptr) throw std::runtime_error(std::exchange(failure_, nullptr));
    if (at_->paused) return;
    if (at_->finished != threads_) throw std::runtime_error("a barrier that not all threads reach");
    for (size_t i = 0; i < kGuard; ++i)
      if (at_->shared[bytes_ + i] != 0x5a) throw std::runtime_error("a write behind the shared memory");
    bool open = false, pending = false;
    for (auto& fiber : at_->fibers) {
      for (const auto& group : fiber->groups) pending = pending || !group.empty();
      open = open || !fiber->open.empty();
      fiber->groups.clear();
      fiber->open.clear();
      fiber->context.end();
    }
    if (pending) throw std::runtime_error("a copy that nobody waited for");
    if (open) throw std::runtime_error("a copy that was not committed");
    const std::string what = left_open(*at_, threads_, bytes_);
    if (!what.empty()) throw std::runtime_error(what);
    moved_ = true;
    idle_.push_back(std::move(running_[number]));
    running_.erase(running_.begin() + static_cast<std::ptrdiff_t>(number));
  }

  void wait(Barrier& barrier, int all, bool orders, bool ahead = false) {
    const bool odd = barrier.order.odd();
    if (orders) barrier.order.arrive();
    {
      const Aside aside;
      barrier.waiting.push_back(at_->current);
      if (static_cast<int>(barrier.waiting.size()) < all) {
        Context& mine = current().context;  // before `next` makes another one the current
        Context::go(mine, next());
      } else {
        for (int i = 0; i < all; ++i) {
          const int other = barrier.waiting[static_cast<size_t>(descending != ahead ? all - 1 - i : i)];
          if (other == at_->current) continue;
          if (ahead)
            at_->ready.push_front(other);
          else
            at_->ready.push_back(other);
        }
        barrier.waiting.clear();
        barrier.order.turn();
      }
    }
    if (orders) barrier.order.leave(odd);
  }

  // The thread of this block that goes on now, or, if all wait or have finished, the machine.
  Context& next() {
    if (at_->ready.empty()) return main_;
    at_->current = at_->ready.front();
    at_->ready.pop_front();
    return current().context;
  }

  static void body() {
    for (;;) {
      Machine& machine = here();
      machine.kernel_();
      comes_before(machine.ended_.get());
      Context *mine, *other;
      {
        const Aside aside;
        ++machine.at_->finished;
        mine = &machine.current().context;
        other = &machine.next();
      }
      Context::go(*mine, *other);
    }
  }

  int threads_ = 0;
  size_t bytes_ = 0;
  bool moved_ = false;
  const char* failure_ = nullptr;
  std::function<void()> kernel_;
  std::vector<std::unique_ptr<Place>> idle_, running_;  // running: in the order of their start
  Place* at_ = nullptr;
  Context main_;
  std::unique_ptr<char[]> ended_;  // the threads that have finished come before what follows the launch
};

inline void copy_async(void* to, const void* from, int bytes, int valid) {
  if (reinterpret_cast<uintptr_t>(to) % static_cast<uintptr_t>(bytes) != 0 ||
      reinterpret_cast<uintptr_t>(from) % static_cast<uintptr_t>(bytes) != 0) {
    std::fprintf(stderr, "cp.async: misaligned address\n");
    std::abort();
  }
  std::memset(to, 0xff, static_cast<size_t>(bytes));
  const Aside aside;
  Machine::here().current().open.push_back({to, from, bytes, valid});
}

inline void copy_commit() {
  const Aside aside;
  Fiber& fiber = Machine::here().current();
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

inline void copy_wait(size_t left) {
  std::vector<std::vector<Copy>> done;
  {
    const Aside aside;
    auto& groups = Machine::here().current().groups;
    if (groups.size() <= left) return;
    const auto behind = groups.begin() + static_cast<std::ptrdiff_t>(groups.size() - left);
    done.assign(std::make_move_iterator(groups.begin()), std::make_move_iterator(behind));
    groups.erase(groups.begin(), behind);
  }
  for (const auto& group : done)
    for (const Copy& copy : group) {
      std::memset(copy.to, 0, static_cast<size_t>(copy.bytes));
      std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.valid));
    }
}

// The count that a block waits for, once it is there.
inline unsigned awaited(const unsigned* done, unsigned count) {
  for (;;) {
    const unsigned seen = __atomic_load_n(done, __ATOMIC_ACQUIRE);
    const Aside aside;
    if (seen >= count) {
      Machine::here().moved();
      return seen;
    }
    Machine::here().pause();
  }
}

template <class T>
T exchange(T value, int from) {
  T result;
  const Aside aside;
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
  const Aside aside;  // fragments are registers
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
  const Aside aside;
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
}  // namespace rlsedit

#include "warpgroup.h"

namespace rlsedit {

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
  const unsigned before = __atomic_fetch_add(counter, more, __ATOMIC_RELAXED);
  const rlsedit::emulate::Aside aside;
  rlsedit::emulate::Machine::here().moved();
  rlsedit::emulate::Machine::here().pause();
  return before;
}

#define RLSEDIT_DEVICE inline
#define RLSEDIT_HOST_DEVICE inline
#define __global__
#define __launch_bounds__(...)
#define threadIdx (::rlsedit::emulate::Machine::here().current().thread)
#define blockIdx (::rlsedit::emulate::Machine::here().block)
#define gridDim (::rlsedit::emulate::Machine::here().grid)
#define __syncthreads() (::rlsedit::emulate::Machine::here().wait_for_block(__FILE__, __LINE__))
#define __syncwarp() (::rlsedit::emulate::Machine::here().wait_for_warp(__FILE__, __LINE__))
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
