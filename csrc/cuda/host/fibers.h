// How the emulator goes from one thread of a kernel to another, and what it tells ThreadSanitizer of it.
//
// Compiled with -fsanitize=thread, every thread of a kernel is a thread for ThreadSanitizer too, ordered
// after another one only by what orders threads on a GPU: __syncthreads, __syncwarp, release and acquire, the
// start and the end of a launch. Two accesses to the same memory, one of them a write, which nothing orders,
// are reported with their lines, although the emulator runs one thread after another and the result is right.
// Shuffles and tensor-core products order nothing: they exchange registers (PTX ISA; CUDA's guide on
// __shfl_sync: "do not imply a memory barrier").
#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdlib>
#include <deque>
#include <memory>
#include <string>

#include <ucontext.h>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace rlsedit {
namespace emulate {

constexpr size_t kStack = 256 * 1024;

// `body`, to be begun on this stack.
inline void prepare(ucontext_t& place, char* stack, void (*body)()) {
  getcontext(&place);
  place.uc_stack.ss_sp = stack;
  place.uc_stack.ss_size = kStack;
  place.uc_link = nullptr;
  makecontext(&place, body, 0);
}

#ifdef __SANITIZE_THREAD__

// What the emulator itself reads and writes while one of these lives is nobody's race.
class Aside {
 public:
  Aside() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Aside() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
  Aside(const Aside&) = delete;
  Aside& operator=(const Aside&) = delete;
};

// Where threads meet: what they did before comes before what they do behind it. Two marks in turn, since the
// first to leave may be back before the last has left.
class Order {
 public:
  void renew() { marks_.reset(new char[2 * kApart]); }
  void arrive() { __tsan_release(mark()); }
  void leave(bool odd) { __tsan_acquire(&marks_[odd ? kApart : 0]); }
  bool odd() const { return odd_; }
  void turn() { odd_ = !odd_; }

 private:
  static constexpr size_t kApart = 64;
  char* mark() { return &marks_[odd_ ? kApart : 0]; }
  std::unique_ptr<char[]> marks_;
  bool odd_ = false;
};

// Where execution goes on: a thread of a kernel, on a stack of its own, or what launched it.
class Context {
 public:
  Context() = default;
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
  ~Context() {
    const Aside aside;
    end();
  }

  // Afresh for every block: a thread of one block is not the thread of another.
  void start(void (*body)()) {
    end();
    stack_.reset(new char[kStack]);
    prepare(fresh_, stack_.get(), body);
    is_fresh_ = true;
    known_ = __tsan_create_fiber(0);
  }
  // The thread is never gone on with.
  void end() {
    if (stack_ && known_) {
      auto& ended = Context::ended();
      ended.push_back(known_);
      if (ended.size() > kRemembered) {
        __tsan_destroy_fiber(ended.front());
        ended.pop_front();
      }
    }
    known_ = nullptr;
    stack_.reset();
  }
  // By the compiler's own jumps, which nothing intercepts; swapcontext calls the operating system.
  __attribute__((noinline, no_sanitize_thread)) static void go(Context& from, Context& to) {
    if (!from.stack_) from.known_ = __tsan_get_current_fiber();
    if (__builtin_setjmp(from.place_) == 0) enter(to);
  }

 private:
  // ThreadSanitizer gives the number of a thread that is gone to a new one, and takes what both did for the
  // deeds of one thread: so those that have ended stay known for a while. It knows 8,128 threads at most.
  static constexpr size_t kRemembered = 3000;
  static std::deque<void*>& ended() {
    static thread_local std::deque<void*> threads;
    return threads;
  }

  __attribute__((noinline, no_sanitize_thread)) static void enter(Context& to) {
    const bool fresh = to.is_fresh_;
    to.is_fresh_ = false;
    __tsan_switch_to_fiber(to.known_, __tsan_switch_to_fiber_no_sync);
    if (fresh) setcontext(&to.fresh_);
    __builtin_longjmp(to.place_, 1);
  }

  std::unique_ptr<char[]> stack_;
  ucontext_t fresh_;
  void* place_[5];
  bool is_fresh_ = false;
  void* known_ = nullptr;
};

// Whether the barrier in this line orders anything: the one that RLSEDIT_UNORDERED names ("cholesky.cu:78")
// is passed by all threads together as ever, but is no order. What is then no race is a barrier too many, or
// one that this tool cannot see.
inline bool orders(const char* file, int line) {
  static const std::string left_out = [] {
    const char* text = std::getenv("RLSEDIT_UNORDERED");
    return std::string(text == nullptr ? "" : text);
  }();
  if (left_out.empty()) return true;
  const Aside aside;
  const std::string here = "/" + std::string(file) + ":" + std::to_string(line), there = "/" + left_out;
  return here.size() < there.size() || here.compare(here.size() - there.size(), there.size(), there) != 0;
}

inline void comes_before(void* mark) {
  __tsan_release(mark);
}
inline void comes_behind(void* mark) {
  __tsan_acquire(mark);
}

#else

struct Aside {
  Aside() {}  // not trivial: no warning about one that is not used
};

struct Order {
  void renew() {}
  void arrive() {}
  void leave(bool) {}
  bool odd() const { return false; }
  void turn() {}
};

class Context {
 public:
  // `body` never returns: after a block it is in the middle of its loop, and goes on there for the next.
  void start(void (*body)()) {
    if (stack_) return;
    stack_.reset(new char[kStack]);
    prepare(fresh_, stack_.get(), body);
    is_fresh_ = true;
  }
  void end() {}
  static void go(Context& from, Context& to) {
    if (_setjmp(from.place_) != 0) return;
    if (!to.is_fresh_) _longjmp(to.place_, 1);
    to.is_fresh_ = false;
    setcontext(&to.fresh_);
  }

 private:
  std::unique_ptr<char[]> stack_;
  ucontext_t fresh_;
  jmp_buf place_;
  bool is_fresh_ = false;
};

inline bool orders(const char*, int) {
  return true;
}
inline void comes_before(void*) {}
inline void comes_behind(void*) {}

#endif

}  // namespace emulate
}  // namespace rlsedit
