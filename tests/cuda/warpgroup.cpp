// A product of one warpgroup for test_warpgroup.py, as it should be and with mistakes that have to show.
#include <cstring>

#include "warpgroup.h"

using namespace rlsedit;

namespace {

constexpr int kRows = 64, kColumns = 104, kTerms = 32;

enum Mistake {
  kNone,
  kNoWaitForSums,
  kNoWaitForCopy,
  kNoFence,
  kNoFenceOfBarrier,
  kThreeWarps,
  kFewBytes,
  kNoCopy,
  kSumsReadEarly,
  kNotStarted,
};

// out = A B' with A (64, 32) as it is, B (104, 32) as it is to lie in shared memory.
void product_kernel(const float* A, const float* B, float* out, int mistake) {
  float* memory = shared_memory<float>();
  memory += (1024 - shared_address(memory) % 1024) % 1024 / 4;
  uint64_t* there = reinterpret_cast<uint64_t*>(memory + kColumns * kTerms);
  const int bytes = kColumns * kTerms * 4;
  if (threadIdx.x == 0) {
    if (mistake != kNotStarted) barrier_start(there, 1);
    if (mistake != kNoFenceOfBarrier) fence_async();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    barrier_expect(there, bytes);
    if (mistake != kNoCopy) copy_bulk(memory, B, mistake == kFewBytes ? bytes - 16 : bytes, there);
  }
  if (mistake != kNoWaitForCopy) barrier_wait(there, 0);
  const int g = lane_index() >> 2, t = lane_index() & 3, top = 16 * warp_index();
  float sum[13][4];
  if (mistake != kNoFence) wgmma_fence();
  uint64_t right = right_descriptor(shared_address(memory));
  for (int k = 0; k < kTerms; k += 8, right += kNextTerms) {
    uint32_t a[4];
    for (int i = 0; i < 4; ++i)
      std::memcpy(&a[i], &A[(top + g + 8 * (i & 1)) * kTerms + k + t + 4 * (i >> 1)], 4);
    if (mistake == kThreeWarps && warp_index() == 3) continue;
    k == 0 ? wgmma<false>(sum, a, right) : wgmma<true>(sum, a, right);
  }
  wgmma_commit();
  const float early = sum[0][0];
  if (mistake != kNoWaitForSums) wgmma_wait(sum);
  if (mistake == kSumsReadEarly) sum[0][0] = early;
  for (int n = 0; n < 13; ++n)
    for (int i = 0; i < 4; ++i)
      out[(top + g + 8 * (i >> 1)) * kColumns + 8 * n + 2 * t + (i & 1)] = sum[n][i];
}

char message[256];

}  // namespace

extern "C" const char* product(const float* A, const float* B, float* out, int mistake, int descending) {
  message[0] = 0;
  emulate::Machine::here().descending = descending != 0;
  try {
    launch(product_kernel, dim3(1), 128, 1024 + kColumns * kTerms * 4 + 16, 0, A, B, out, mistake);
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), sizeof message - 1);
  }
  return message;
}
