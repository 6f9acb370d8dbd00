// Hopper's products of a warpgroup (wgmma), and what brings their operands into shared memory: bulk copies
// and the barriers that count their bytes.
//
// A warpgroup is 4 warps, the first of them a multiple of 4. It multiplies a left operand of 64 x 8 tf32
// numbers in registers by a right one of 8 x N in shared memory, asynchronously. PTX ISA 9.0:
//   - 9.7.15.5.1.1.2, fragments of m64nNk8: warp w holds rows [16 w, 16 w + 16), its lanes A and D as in
//     mma.h;
//   - 9.7.15.5.1.2, "K-major": a column of the right operand lies in one row of 128 bytes; swizzled by 128
//     bytes, chunk c (16 bytes) of row r is at c ^ (r & 7), in groups of 8 rows, 1024 bytes, which start at
//     multiples of 1024;
//   - 9.7.15.5.1.2.2, the descriptor: bits 0-13 start / 16; 16-29 leading offset / 16 (1: swizzled K-major
//     layouts do not use it); 32-45 offset from 8 rows to the next 8 / 16; 62-63 swizzle (1: 128 bytes). The
//     swizzle is one of address bits, so that 8 terms further is 32 bytes further;
//   - 9.7.15.7, fence, commit_group, wait_group.
// Only sm_90a has these: elsewhere a kernel that uses them is compiled without its body.
#pragma once

#include "port.h"

#if defined(RLSEDIT_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define RLSEDIT_WARPGROUPS
#endif

namespace rlsedit {

#ifdef RLSEDIT_WARPGROUPS

RLSEDIT_DEVICE uint32_t shared_address(const void* place) {
#ifdef RLSEDIT_EMULATE
  return emulate::shared_address(place);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(place));
#endif
}

// Barriers in shared memory (mbarrier), 8 bytes. A phase ends when so many threads have arrived and all the
// bytes have come that were expected; phases have parities 0, 1, 0, ...
RLSEDIT_DEVICE void barrier_start(uint64_t* barrier, int arrivals) {
#ifdef RLSEDIT_EMULATE
  emulate::barrier_start(barrier, arrivals);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
#endif
}

RLSEDIT_DEVICE void barrier_arrive(uint64_t* barrier) {
#ifdef RLSEDIT_EMULATE
  emulate::barrier_arrive(barrier, 0);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// Arrives, and lets the phase wait for so many bytes.
RLSEDIT_DEVICE void barrier_expect(uint64_t* barrier, int bytes) {
#ifdef RLSEDIT_EMULATE
  emulate::barrier_arrive(barrier, bytes);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
#endif
}

// Until the phase of this parity has ended.
RLSEDIT_DEVICE void barrier_wait(uint64_t* barrier, int parity) {
#ifdef RLSEDIT_EMULATE
  emulate::barrier_wait(barrier, parity);
#else
  const uint32_t place = shared_address(barrier);
  uint32_t ended;
  do {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(ended)
        : "r"(place), "r"(parity)
        : "memory");
  } while (ended == 0);
#endif
}

// Adjacent bytes (multiples of 16) from global to shared memory, counted by a barrier. They are written where
// wgmma reads, in the async proxy: no fence between the two (9.7.15.4).
RLSEDIT_DEVICE void copy_bulk(void* to, const void* from, int bytes, uint64_t* barrier) {
#ifdef RLSEDIT_EMULATE
  emulate::copy_bulk(to, from, bytes, barrier);
#else
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
#endif
}

// What this thread has written to shared memory (barriers that it has started, too) is seen by bulk copies
// and wgmma.
RLSEDIT_DEVICE void fence_async() {
#ifdef RLSEDIT_EMULATE
  emulate::fence_async();
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// The threads of a warpgroup wait for each other.
RLSEDIT_DEVICE void group_sync(int group) {
#ifdef RLSEDIT_EMULATE
  emulate::group_sync(group);
#else
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");  // barrier 0 is that of __syncthreads
#endif
}

// The lanes of a warp together again, behind what some of them did alone or left one after the other: wgmma
// is an instruction of whole warps.
RLSEDIT_DEVICE void converge() {
#ifdef RLSEDIT_EMULATE
  emulate::Machine::here().wait_for_warp(false, true);
#else
  __syncwarp();
#endif
}

// The right operand at an address of shared memory: 8 terms of rows of 128 bytes, swizzled.
RLSEDIT_DEVICE uint64_t right_descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = 1, kGroup = 8 * 128;
  return kSwizzle128 << 62 | (kGroup >> 4) << 32 | uint64_t(1) << 16 | (address & 0x3ffff) >> 4;
}
constexpr uint64_t kNextTerms = 32 >> 4;  // to be added to a descriptor for the next 8 terms

// Before the first product, and after registers of one have been read or written.
RLSEDIT_DEVICE void wgmma_fence() {
#ifdef RLSEDIT_EMULATE
  emulate::wgmma_fence();
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

RLSEDIT_DEVICE void wgmma_commit() {
#ifdef RLSEDIT_EMULATE
  emulate::wgmma_commit();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Until all of them are done; the compiler reads the sums behind this.
template <int NT>
RLSEDIT_DEVICE void wgmma_wait(float (&sum)[NT][4]) {
#ifdef RLSEDIT_EMULATE
  emulate::wgmma_wait(0);
  (void)sum;
#else
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(sum[n][i])::"memory");
#endif
}

#ifndef RLSEDIT_EMULATE
// wgmma of one N: its sums are operands 0 to N / 2 - 1, their numbers `list`; behind them four of A, the
// descriptor, and whether to add.
#define RLSEDIT_SUMS_64                                                                                \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26," \
  "%27,%28,%29,%30,%31"
#define RLSEDIT_SUMS_104 \
  RLSEDIT_SUMS_64 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51"
#define RLSEDIT_SUMS_112 RLSEDIT_SUMS_104 ",%52,%53,%54,%55"
#define RLSEDIT_SUM(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define RLSEDIT_SUMS_OF_8(n)                                                                      \
  RLSEDIT_SUM(n), RLSEDIT_SUM(n + 1), RLSEDIT_SUM(n + 2), RLSEDIT_SUM(n + 3), RLSEDIT_SUM(n + 4), \
      RLSEDIT_SUM(n + 5), RLSEDIT_SUM(n + 6), RLSEDIT_SUM(n + 7)
#define RLSEDIT_WGMMA(N, A0, A1, A2, A3, B, ADD, ...)                                                 \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #ADD ", 0; wgmma.mma_async.sync.aligned.m64n" #N    \
               "k8.f32.tf32.tf32 {" RLSEDIT_SUMS_##N "}, {%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 "}, %" #B \
                                                     ", p, 1, 1; }"                                   \
               : __VA_ARGS__                                                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(right), "n"(int(ADDS)))
#endif

// d = a times 8 terms of 8 NT columns, plus d if ADDS; `d` and `a` are not to be touched until it is done.
template <bool ADDS, int NT>
RLSEDIT_DEVICE void wgmma(float (&d)[NT][4], const uint32_t (&a)[4], uint64_t right) {
  static_assert(NT == 8 || NT == 13 || NT == 14, "widths that are written out");
#ifdef RLSEDIT_EMULATE
  emulate::wgmma_tf32(&d[0][0], 8 * NT, a, right, ADDS);
#else
  if constexpr (NT == 8)
    RLSEDIT_WGMMA(64, 32, 33, 34, 35, 36, 37, RLSEDIT_SUMS_OF_8(0));
  else if constexpr (NT == 13)
    RLSEDIT_WGMMA(104, 52, 53, 54, 55, 56, 57, RLSEDIT_SUMS_OF_8(0), RLSEDIT_SUM(8), RLSEDIT_SUM(9),
                  RLSEDIT_SUM(10), RLSEDIT_SUM(11), RLSEDIT_SUM(12));
  else
    RLSEDIT_WGMMA(112, 56, 57, 58, 59, 60, 61, RLSEDIT_SUMS_OF_8(0), RLSEDIT_SUM(8), RLSEDIT_SUM(9),
                  RLSEDIT_SUM(10), RLSEDIT_SUM(11), RLSEDIT_SUM(12), RLSEDIT_SUM(13));
#endif
}

#ifndef RLSEDIT_EMULATE
#undef RLSEDIT_WGMMA
#undef RLSEDIT_SUMS_OF_8
#undef RLSEDIT_SUM
#undef RLSEDIT_SUMS_112
#undef RLSEDIT_SUMS_104
#undef RLSEDIT_SUMS_64
#endif

#endif  // RLSEDIT_WARPGROUPS

}  // namespace rlsedit
