// The emulator's Hopper: barriers that count bytes, bulk copies, and products of a warpgroup (warpgroup.h).
//
// As strict as the rest of it (emulate.h):
//   - a bulk copy takes place when its barrier is waited for, and until then its target holds NaN; one that
//     is never waited for is an error, and so is a barrier that another proxy uses before it was fenced;
//   - wgmma reads shared memory and yields its sums when it is waited for: until then they are NaN. Its
//     left operand is what it was when issued;
//   - the descriptor is decoded bit by bit, and the swizzle is one of addresses, as in the PTX ISA. Shared
//     memory starts at an address that is no multiple of 1024;
//   - without a fence before it, or where the warps of a warpgroup do not all issue the same products, there
//     is an error.
// Not noticed: ordinary stores that wgmma reads without fence.proxy.async, and registers of the left operand
// that are changed too early, which the compiler looks after.
#pragma once

#include <map>

namespace rlsedit {
namespace emulate {

inline uint32_t shared_address(const void* place) {
  return Machine::here().shared_start +
         static_cast<uint32_t>(static_cast<const unsigned char*>(place) - Machine::here().shared());
}

inline void group_sync(int group) {
  Machine::here().wait_for_group(group);
}

struct Bulk {
  void* to;
  const void* from;
  int bytes;
};

struct CountingBarrier {
  int arrivals = 0, missing = 0, starter = 0;
  unsigned phase = 0;
  int64_t expected = 0, coming = 0;
  bool fenced = false;
  std::vector<Bulk> copies;
  std::vector<int> waiting;

  bool complete() const { return missing == 0 && expected == coming; }
  void next() {
    ++phase;
    missing = arrivals;
    expected = coming = 0;
    copies.clear();
  }
  void wake() {
    for (const int thread : waiting) Machine::here().wake(thread);
    waiting.clear();
  }
};

inline std::map<const void*, CountingBarrier>& counting_barriers() {
  static thread_local std::map<const void*, CountingBarrier> all;
  return all;
}

inline CountingBarrier& counting_barrier(const void* place) {
  auto& all = counting_barriers();
  const auto found = all.find(place);
  if (found == all.end()) Machine::here().fail("a barrier that was not started");
  return found->second;
}

inline void barrier_start(uint64_t* place, int arrivals) {
  const Aside aside;
  CountingBarrier fresh;
  fresh.arrivals = fresh.missing = arrivals;
  fresh.starter = Machine::here().thread();
  counting_barriers()[place] = fresh;
}

inline void fence_async() {
  const Aside aside;
  for (auto& [place, barrier] : counting_barriers())
    if (barrier.starter == Machine::here().thread()) barrier.fenced = true;
}

inline void barrier_arrive(uint64_t* place, int bytes) {
  CountingBarrier* barrier;
  {
    const Aside aside;
    barrier = &counting_barrier(place);
    if (barrier->missing == 0) Machine::here().fail("more threads arrive at a barrier than it counts");
  }
  comes_before(barrier);
  const Aside aside;
  --barrier->missing;
  barrier->expected += bytes;
  if (barrier->missing > 0) return;
  if (barrier->expected == 0) barrier->next();  // where bytes come, with the first that waits for them
  barrier->wake();
}

inline void copy_bulk(void* to, const void* from, int bytes, uint64_t* place) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  if (!aligned(to) || !aligned(from) || bytes % 16 != 0) Machine::here().fail("a misaligned bulk copy");
  std::memset(to, 0xff, static_cast<size_t>(bytes));
  CountingBarrier* barrier;
  {
    const Aside aside;
    barrier = &counting_barrier(place);
    if (!barrier->fenced) Machine::here().fail("a barrier that was started without a fence behind it");
    barrier->copies.push_back({to, from, bytes});
    barrier->coming += bytes;
    if (barrier->complete()) barrier->wake();
  }
  comes_before(barrier);  // whoever waits for it first takes the copy's part
}

inline void barrier_wait(uint64_t* place, int parity) {
  CountingBarrier* barrier;
  std::vector<Bulk> done;
  for (;;) {
    const Aside aside;
    barrier = &counting_barrier(place);
    if (static_cast<int>(barrier->phase & 1) != parity) break;
    if (barrier->complete()) {
      done = barrier->copies;
      break;
    }
    barrier->waiting.push_back(Machine::here().thread());
    Machine::here().park();
  }
  comes_behind(barrier);
  if (done.empty()) return;
  for (const Bulk& copy : done) std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
  comes_before(barrier);
  const Aside aside;
  barrier->next();
  barrier->wake();
}

struct Wgmma {
  float* sums;
  int columns;
  bool adds;
  uint64_t right;
  float left[2][8];  // rows g and g + 8 of the warp's
};

// Sums that are being formed: not yet in the registers.
struct Forming {
  float* at;
  std::vector<float> values;
  int pending;
};

struct Wgmmas {
  bool fenced = false;
  std::vector<Wgmma> open;
  std::vector<std::vector<Wgmma>> groups;
  std::vector<Forming> sums;
  std::vector<uint64_t> issued;
};

inline Wgmmas& wgmmas() {
  auto& mine = Machine::here().current().wgmmas;
  if (!mine) mine = std::make_shared<Wgmmas>();
  return *mine;
}

inline void wgmma_fence() {
  const Aside aside;
  wgmmas().fenced = true;
}

inline void wgmma_tf32(float* sums, int columns, const uint32_t (&a)[4], uint64_t right, bool adds) {
  const Aside aside;
  auto words = Machine::here().show(a, sizeof a, true);
  Wgmmas& mine = wgmmas();
  if (!mine.fenced) Machine::here().fail("wgmma without a fence before it");
  const int g = (Machine::here().thread() & 31) >> 2;
  Wgmma next{sums, columns, adds, right, {}};
  for (int t = 0; t < 4; ++t) {
    uint32_t all[4];
    std::memcpy(all, words[4 * g + t], sizeof all);
    for (int i = 0; i < 4; ++i) next.left[i & 1][t + 4 * (i >> 1)] = tf32(all[i]);
  }
  Forming* forming = nullptr;
  for (Forming& some : mine.sums)
    if (some.at == sums) forming = &some;
  if (forming == nullptr) {
    mine.sums.push_back({sums, std::vector<float>(sums, sums + columns / 2), 0});
    forming = &mine.sums.back();
    std::memset(sums, 0xff, static_cast<size_t>(columns / 2) * sizeof(float));
  }
  ++forming->pending;
  mine.open.push_back(next);
  mine.issued.push_back(right);
}

inline void wgmma_commit() {
  const Aside aside;
  Wgmmas& mine = wgmmas();
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

// Element k of column n of the right operand, as the descriptor has it: swizzled by 128, 64 or 32 bytes (1, 2
// or 3 in its upper bits), a column in a row of as many.
inline float wgmma_right(uint64_t descriptor, int n, int k, size_t bytes) {
  const uint32_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  const uint32_t width = 256u >> (descriptor >> 62), first = Machine::here().shared_start;
  uint32_t address = start + static_cast<uint32_t>(n / 8) * stride + static_cast<uint32_t>(n % 8) * width +
                     static_cast<uint32_t>(k * 4);
  address ^= (address >> 7 & (width / 16 - 1)) << 4;
  if (address < first || address + 4 > first + bytes)
    Machine::here().fail("wgmma reads outside of the shared memory");
  uint32_t word;
  std::memcpy(&word, Machine::here().shared() + (address - first), sizeof word);
  return tf32(word);
}

inline void wgmma_perform(Wgmmas& mine, const Wgmma& one) {
  constexpr int kColumns = 256;
  float right[kColumns / 4][8];  // columns 2 t and 2 t + 1 of every 8
  const int t = Machine::here().thread() & 3;
  if ((one.right >> 62) == 0 || (one.right >> 49 & 7) != 0)
    Machine::here().fail("a descriptor that the emulator does not know");
  for (int i = 0; i < one.columns / 4; ++i)
    for (int k = 0; k < 8; ++k)
      right[i][k] = wgmma_right(one.right, i / 2 * 8 + 2 * t + i % 2, k, Machine::here().shared_bytes());
  const Aside aside;
  size_t at = 0;
  while (mine.sums[at].at != one.sums) ++at;
  Forming& forming = mine.sums[at];
  for (int i = 0; i < one.columns / 2; ++i) {
    const float* left = one.left[i >> 1 & 1];
    const float* column = right[i / 4 * 2 + (i & 1)];
    double sum = one.adds ? static_cast<double>(forming.values[static_cast<size_t>(i)]) : 0.0;
    for (int k = 0; k < 8; ++k) sum += static_cast<double>(left[k]) * static_cast<double>(column[k]);
    forming.values[static_cast<size_t>(i)] = truncated(sum);
  }
  if (--forming.pending > 0) return;
  std::memcpy(forming.at, forming.values.data(), forming.values.size() * sizeof(float));
  mine.sums.erase(mine.sums.begin() + static_cast<std::ptrdiff_t>(at));
}

inline void wgmma_wait(size_t left) {
  Wgmmas& mine = wgmmas();
  {
    const Aside aside;
    mine.fenced = false;
    Machine::here().let_others();  // as late as it may be
  }
  while (mine.groups.size() > left) {
    for (const Wgmma& one : mine.groups.front()) wgmma_perform(mine, one);
    const Aside aside;
    mine.groups.erase(mine.groups.begin());
  }
  Machine::here().wait_for_warp(true, true);  // done for all lanes: none of them reads any more
}

// At the end of a block.
inline std::string left_open(Place& place, int threads, size_t bytes) {
  auto& all = counting_barriers();
  const auto first = all.lower_bound(place.shared), behind = all.lower_bound(place.shared + bytes);
  bool copies = false, products = false, differ = false;
  for (auto i = first; i != behind; ++i) copies = copies || !i->second.copies.empty();
  all.erase(first, behind);
  const auto issued = [&](int i) {
    const auto& own = place.fibers[static_cast<size_t>(i)]->wgmmas;
    return own ? own->issued : std::vector<uint64_t>();
  };
  for (int i = 0; i < threads; ++i) differ = differ || issued(i) != issued(i / 128 * 128);
  for (int i = 0; i < threads; ++i) {
    auto& own = place.fibers[static_cast<size_t>(i)]->wgmmas;
    products = products || (own && !own->sums.empty());
    own.reset();
  }
  if (copies) return "a bulk copy that nobody waited for";
  if (products) return "a wgmma that nobody waited for";
  if (differ) return "warps of a warpgroup issue different products";
  return {};
}

}  // namespace emulate
}  // namespace rlsedit
