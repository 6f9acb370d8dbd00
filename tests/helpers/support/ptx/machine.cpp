// What the threads of a kernel do together (instructions.h), on the emulator of csrc/cuda/host: barriers,
// shuffles, products, copies, order between blocks; and the launch of a kernel.
#include "machine.h"

#include <dlfcn.h>

#include <map>
#include <utility>

using namespace ptx;

namespace {

unsigned char* in_shared(u64 address, u64 bytes, const char* what) {
  Machine& machine = Machine::here();
  const u32 start = machine.shared_start;
  if (address < start || address + bytes > start + machine.shared_bytes()) machine.fail(what);
  return machine.shared() + (address - start);
}

unsigned* counter(u64 place) {
  if (place % 4 != 0 || place < 4096) Machine::here().fail("a misaligned atomic access");
  return reinterpret_cast<unsigned*>(place);
}

// What a thread saw at its last acquire: the same number once more means that it waits.
struct Seen {
  u64 place = 0;
  u32 value = 0;
  unsigned x = 0, y = 0, z = 0;
};
thread_local std::map<const emulate::Fiber*, Seen> seen;

u32 acquired(unsigned* from, u32 value) {
  Machine& machine = Machine::here();
  Seen& last = seen[&machine.current()];
  const Seen now{reinterpret_cast<u64>(from), value, machine.block.x, machine.block.y, machine.block.z};
  const bool again =
      last.place == now.place && last.value == value && last.x == now.x && last.y == now.y && last.z == now.z;
  last = now;
  if (!again) {
    machine.moved();
    return value;
  }
  machine.pause();
  const u32 later = __atomic_load_n(from, __ATOMIC_ACQUIRE);
  if (later != value) machine.moved();
  seen[&machine.current()].value = later;
  return later;
}

}  // namespace

EXPORTED void ptx_fail(const char* what) {
  Machine::here().fail(what);
  std::abort();  // a thread that failed is never gone on with
}

EXPORTED void ptx_barrier(u32 number, u32 threads) {
  Machine& machine = Machine::here();
  if (threads == 0 || threads == machine.threads())
    machine.wait_for_block(__FILE__, __LINE__);
  else if (threads == 128 && number > 0)
    machine.wait_for_group(static_cast<int>(number) - 1);
  else
    machine.fail("a barrier that the emulator does not know");
}

EXPORTED void ptx_warp_sync(u32 lanes) {
  if (lanes != 0xffffffffu) Machine::here().fail("a barrier of a part of a warp");
  Machine::here().wait_for_warp(__FILE__, __LINE__);
}

// PTX ISA, shfl.sync; `segment`: the last lane in bits 0-4, the mask of the lanes of a segment in bits 8-12.
EXPORTED u32 ptx_shuffle(int mode, u32 value, u32 b, u32 c, u32 lanes, bool* in_range) {
  if (lanes != 0xffffffffu) Machine::here().fail("a shuffle of a part of a warp");
  auto words = Machine::here().show(&value, sizeof value);
  const int lane = Machine::here().thread() & 31;
  const int last = static_cast<int>(c & 31), mask = static_cast<int>(c >> 8 & 31),
            by = static_cast<int>(b & 31);
  const int most = (lane & mask) | (last & ~mask & 31), least = lane & mask;
  int from = 0;
  bool inside = true;
  if (mode == 0) {
    from = least | (by & ~mask & 31);
    inside = from <= most;
  } else if (mode == 1) {
    from = lane ^ by;
    inside = from <= most;
  } else if (mode == 2) {
    from = lane - by;
    inside = from >= most;
  } else {
    from = lane + by;
    inside = from <= most;
  }
  *in_range = inside;
  u32 result;
  memcpy(&result, words[inside ? from : lane], sizeof result);
  return result;
}

// PTX ISA, ldmatrix and stmatrix, .m8n8 .b16: matrix i lies in rows of 16 bytes, at the addresses of lanes 8
// i to 8 i + 7; lane l has 4 bytes of each, of row l / 4 those from 4 (l % 4) on.
EXPORTED void ptx_load_matrices(u32* d, int count, u64 row) {
  auto words = Machine::here().show(&row, sizeof row);
  const int lane = Machine::here().thread() & 31;
  for (int i = 0; i < count; ++i) {
    const u64 from = words[8 * i + lane / 4][0];
    if (from % 16 != 0) Machine::here().fail("ldmatrix: a misaligned row");
    memcpy(&d[i], in_shared(from, 16, "ldmatrix outside of shared memory") + 4 * (lane % 4), 4);
  }
}
EXPORTED void ptx_store_matrices(const u32* values, int count, u64 row) {
  auto words = Machine::here().show(&row, sizeof row);
  const int lane = Machine::here().thread() & 31;
  for (int i = 0; i < count; ++i) {
    const u64 to = words[8 * i + lane / 4][0];
    if (to % 16 != 0) Machine::here().fail("stmatrix: a misaligned row");
    memcpy(in_shared(to, 16, "stmatrix outside of shared memory") + 4 * (lane % 4), &values[i], 4);
  }
}

EXPORTED void ptx_mma_tf32(f32* d, const u32* a, const u32* b) {
  emulate::mma_tf32(*reinterpret_cast<float (*)[4]>(d), *reinterpret_cast<const u32(*)[4]>(a),
                    *reinterpret_cast<const u32(*)[2]>(b));
}
// m8n8k4, and m16n8k4, k8 and k16, whose fragments are those of the halves of the rows and parts of the terms
// in turn.
EXPORTED void ptx_mma_f64(f64* d, const f64* a, const f64* b, int halves, int parts) {
  for (int part = 0; part < parts; ++part) {
    for (int half = 0; half < halves; ++half) {
      emulate::mma_f64(d[2 * half], d[2 * half + 1], a[halves * part + half], b[part]);
    }
  }
}

EXPORTED void ptx_copy(u64 to, u64 from, int bytes, u32 valid) {
  if (to % bytes != 0 || from % bytes != 0) Machine::here().fail("cp.async: a misaligned address");
  if (static_cast<int>(valid) > bytes) Machine::here().fail("cp.async: more bytes than it copies");
  unsigned char* place = in_shared(to, static_cast<u64>(bytes), "cp.async outside of shared memory");
  emulate::copy_async(place, reinterpret_cast<const void*>(from), bytes, static_cast<int>(valid));
}
EXPORTED void ptx_copy_commit() {
  emulate::copy_commit();
}
EXPORTED void ptx_copy_wait(int left) {
  emulate::copy_wait(static_cast<size_t>(left));
}
EXPORTED void ptx_prefetch(u64 place) {
  if (place < 4096) Machine::here().fail("a prefetch of address 0");
}

EXPORTED u32 ptx_acquire(u64 place) {
  unsigned* from = counter(place);
  return acquired(from, __atomic_load_n(from, __ATOMIC_ACQUIRE));
}
EXPORTED void ptx_release(u64 place, u32 value) {
  __atomic_store_n(counter(place), value, __ATOMIC_RELEASE);
  Machine::here().moved();
}
EXPORTED u32 ptx_add(u64 place, u32 more) {
  unsigned* at = counter(place);
  if (more == 0) return acquired(at, __atomic_load_n(at, __ATOMIC_ACQUIRE));  // a look at it
  const unsigned before = __atomic_fetch_add(at, more, __ATOMIC_ACQ_REL);
  Machine::here().moved();
  Machine::here().pause();
  return before;
}
EXPORTED u32 ptx_exchange(u64 place, u32 value) {
  Machine::here().moved();
  return __atomic_exchange_n(counter(place), value, __ATOMIC_ACQ_REL);
}

// Hopper's.

namespace {
uint64_t* barrier_at(u64 place) {
  if (place % 8 != 0) Machine::here().fail("a misaligned barrier");
  return reinterpret_cast<uint64_t*>(in_shared(place, 8, "a barrier outside of shared memory"));
}
}  // namespace

EXPORTED void ptx_barrier_init(u64 place, u32 arrivals) {
  emulate::barrier_start(barrier_at(place), static_cast<int>(arrivals));
}
EXPORTED void ptx_barrier_arrive(u64 place, u32 bytes) {
  emulate::barrier_arrive(barrier_at(place), static_cast<int>(bytes));
}
EXPORTED bool ptx_barrier_wait(u64 place, u32 parity) {
  emulate::barrier_wait(barrier_at(place), static_cast<int>(parity));
  return true;
}
EXPORTED void ptx_copy_bulk(u64 to, u64 from, u32 bytes, u64 barrier) {
  if (to % 16 != 0) Machine::here().fail("a misaligned bulk copy");
  emulate::copy_bulk(in_shared(to, bytes, "a bulk copy outside of shared memory"),
                     reinterpret_cast<const void*>(from), static_cast<int>(bytes), barrier_at(barrier));
}
EXPORTED void ptx_fence_async() {
  emulate::fence_async();
}
EXPORTED void ptx_wgmma_fence() {
  emulate::wgmma_fence();
}
EXPORTED void ptx_wgmma_commit() {
  emulate::wgmma_commit();
}
EXPORTED void ptx_wgmma_wait() {
  emulate::wgmma_wait(0);
}
EXPORTED void ptx_wgmma(f32* sums, int columns, const u32* a, u64 right, bool adds) {
  emulate::wgmma_tf32(sums, columns, *reinterpret_cast<const u32(*)[4]>(a), right, adds);
}

// A launch.

void ptx::launch(const Code& code, emulate::Index grid, emulate::Index block, size_t shared,
                 void** arguments) {
  Machine& machine = Machine::here();
  if (block.y != 1 || block.z != 1) throw std::runtime_error("blocks of more than one dimension");
  if (block.x > code.most_threads) throw std::runtime_error("more threads than the kernel was compiled for");
  const size_t bytes = shared + code.bytes;
  seen.clear();
  u64* counts = launch_begins(code, u64(grid.x) * grid.y * grid.z);
  machine.run(grid, static_cast<int>(block.x), bytes, [&] {
    const auto place = machine.block;
    const Thread thread{{static_cast<u32>(machine.thread()), 0, 0},
                        {block.x, 1, 1},
                        {place.x, place.y, place.z},
                        {grid.x, grid.y, grid.z},
                        machine.shared(),
                        machine.shared_start,
                        static_cast<u32>(bytes),
                        counts};
    code.run(thread, arguments);
    if (profiling()) thread_ends(thread);
  });
}

Code ptx::loaded(void* library, const std::string& name) {
  Code code;
  code.name = name;
  const auto find = [&](const char* symbol) { return dlsym(library, symbol); };
  code.run = reinterpret_cast<decltype(code.run)>(find("ptx_kernel"));
  if (code.run == nullptr) throw std::runtime_error("no kernel in the library of a kernel");
  code.places = static_cast<const char* const*>(find("ptx_sites"));
  if (profiling() && code.places == nullptr)
    throw std::runtime_error("a kernel that was not compiled for a profile");
  code.bytes = *static_cast<const unsigned*>(find("ptx_static"));
  code.most_threads = *static_cast<const unsigned*>(find("ptx_most_threads"));
  return code;
}
