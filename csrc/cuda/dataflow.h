// Order between the blocks of one launch, without a barrier of all of them: tickets, and counts of what is
// done.
//
// Progress. A block does not work on what its index says but on a ticket, the next number of a counter, and
// it waits for lower tickets only. A ticket is taken by a block that runs, and a block that runs is never
// taken off its multiprocessor for one that has not started: so the lowest unfinished ticket is held by a
// block that runs and waits for nobody. It finishes, and so on: no deadlock, whatever order the blocks start
// in and however few of them fit on the GPU.
//
// Memory. The threads of a block write, all meet at a barrier, and one of them makes the count larger by a
// release; in a block that waits one thread reads the count by an acquire, and all meet at a barrier.
// Barriers order the threads of a block, release and acquire order the two threads, and the relation is
// transitive (PTX ISA, "Causality Order"): what was written before `publish` is read after `wait`. It holds
// along a chain as well, where a block publishes after it has waited for another. A first-level cache may
// still hold what was there before: such data are read by cp.async of 16 bytes, which goes past it, and never
// through ld.global.nc.
//
// Others on the GPU. Kernels of other streams, graphs and processes take multiprocessors from blocks that
// have not started, not from those that run, and a GPU that is shared by time slices stops and resumes all
// blocks of a process together: the argument holds, and waits only become longer. Counters are cleared on the
// stream before every launch, by a node of its own where a graph is captured, so that neither a replay nor a
// launch that failed leaves them dirty, and every call has its own.
//
// Should it be wrong all the same, a wait does not last for ever: after kPatience looks, half a minute where
// the longest launch takes a tenth of a second, the kernel ends with a trap ("unspecified launch failure").
// Looks are counted and not time, of which a process that is stopped has none.
#pragma once

#include "port.h"

namespace rlsedit {

// A counter has a sector of memory of its own.
constexpr int kCounterSize = 8;

constexpr unsigned kPatience = 1u << 25;  // looks of about a microsecond

// The block's ticket, 0 first. `room`: a word of shared memory, free again afterwards.
RLSEDIT_DEVICE unsigned take_ticket(unsigned* counter, unsigned* room) {
  if (threadIdx.x == 0) *room = atomicAdd(counter, 1u);
  __syncthreads();
  const unsigned ticket = *room;
  __syncthreads();
  return ticket;
}

// A count that other blocks make larger. Thread 0 remembers what it saw: what is behind is not asked for
// again.
class Awaited {
 public:
  RLSEDIT_DEVICE explicit Awaited(const unsigned* done) : done_(done) {}

  // All threads: until the count is at least `count`. A block that nobody waits for next polls less often.
  RLSEDIT_DEVICE void wait(unsigned count, bool urgent) {
    if (threadIdx.x == 0 && seen_ < count) {
#ifdef RLSEDIT_EMULATE
      seen_ = emulate::awaited(done_, count);
      (void)urgent;
#else
      for (unsigned looks = 0;; ++looks) {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen_) : "l"(done_) : "memory");
        if (seen_ >= count) break;
        if (looks == kPatience) __trap();
        if (!urgent) __nanosleep(200);
      }
#endif
    }
    __syncthreads();
  }

 private:
  const unsigned* done_;
  unsigned seen_ = 0;
};

// The host's side: counters in a call's workspace, cleared on its stream before every launch that uses them.
template <class Call>
class Counters {
 public:
  Counters(Call& call, int64_t count)
      : call_(call),
        bytes_(static_cast<size_t>(count) * kCounterSize * sizeof(unsigned)),
        memory_(call.template scratch<unsigned>(count * kCounterSize)) {}  // elements of 4 or 8 bytes

  unsigned* cleared() const {
    clear_memory(memory_, bytes_, call_.stream());
    return memory_;
  }

 private:
  const Call& call_;
  size_t bytes_;
  unsigned* memory_;
};

// All threads: what the block has written is there for those who wait for `count`.
RLSEDIT_DEVICE void publish(unsigned* done, unsigned count) {
  __syncthreads();
  if (threadIdx.x == 0) {
#ifdef RLSEDIT_EMULATE
    __atomic_store_n(done, count, __ATOMIC_RELEASE);
#else
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(done), "r"(count) : "memory");
#endif
  }
}

}  // namespace rlsedit
