// Y = A K' by wgmma, in 3xTF32 (Hopper)
//
//              d                  112 keys
//      +---------------+            +--+
//  192 |  ===[A]====>  |   x   K' = |  |    64 rows a warpgroup, 32 terms of both a step, 4 steps under way
//      +---------------+            +--+
//
// Bytes: A once for every 112 keys, K once for every 192 rows of A from the second-level cache, in both
// parts; flops 2 rows d u, three times over on the tensor cores.
//
//   1. K is split into high and low parts once, in the order of shared memory: tiles of up to 112 keys by 32
//      terms, swizzled, high and low one after the other
//   2. a block takes 192 rows, one such width of keys, and a part of d. Its three warpgroups have 64 rows
//      each. They share the tiles of K, a bulk copy each, and nothing else: each copies its own rows, so that
//      one may load and split fragments, or add, while the others keep the tensor cores busy.
//
// The sums of a step of 32 terms start from zero: first the 8 products of low parts, then the 4 of high ones,
// so that only the last 4 may lose bits of a sum of full size to truncation (mma.h); then they are added to
// the running sums, rounded.
#include "warpgroup_product.h"

#include <cstdlib>
#include <cstring>

#include "copy.h"
#include "gain_products.h"
#include "mma.h"
#include "warpgroup.h"

namespace rlsedit {
namespace {

constexpr int kTerms = 32;  // of a stage: a row of 128 bytes

// GROUPS warpgroups, 8 NT keys.
template <int GROUPS, int NT>
struct Stage {
  static constexpr int kThreads = 128 * GROUPS, kRows = 64 * GROUPS, kColumns = 8 * NT, kCount = 4;
  static constexpr int kLeftLd = kTerms + 4;  // fragments (4 apart, 4 side by side) lie in different banks
  static constexpr int kLeft = 64 * kLeftLd, kRight = kColumns * kTerms;  // of a warpgroup; high, or low
  static constexpr int kRightBytes = 2 * kRight * 4;
  static constexpr size_t kShared =
      1024 + kCount * (kRightBytes + size_t(GROUPS) * kLeft * 4) + 2 * kCount * sizeof(uint64_t);
  static_assert(kRight * 4 % 1024 == 0, "swizzled groups of 8 rows");
};

// tiles (b, key blocks, steps of 32, high and low, KEYS, 32); what is outside of K is zero.
template <int KEYS>
__global__ void __launch_bounds__(256)
    split_kernel(Matrices<const float> Ks, float* tiles, int64_t d, int64_t u) {
  const Matrix<const float> K = Ks[blockIdx.z];
  const int64_t step = blockIdx.x, steps = gridDim.x, block = blockIdx.y, blocks = gridDim.y;
  float* high = tiles + ((blockIdx.z * blocks + block) * steps + step) * (2 * KEYS * kTerms);
  float* low = high + KEYS * kTerms;
  const bool down = K.rs == 1 && K.cs != 1;  // threads side by side read adjacent elements
  for (int i = static_cast<int>(threadIdx.x); i < KEYS * kTerms; i += 256) {
    const int r = down ? i % KEYS : i / kTerms, c = down ? i / KEYS : i % kTerms;
    const int64_t key = block * KEYS + r, k = step * kTerms + c;
    const int place = r * kTerms + (c ^ (r & 7) << 2);
    uint32_t upper, lower;
    Tf32x3::split(key < u && k < d ? K.at(key, k) : 0.0f, upper, lower);
    high[place] = number(upper);
    low[place] = number(lower);
  }
}

template <int GROUPS, int NT>
__global__ void __launch_bounds__(Stage<GROUPS, NT>::kThreads, 1)
    warpgroup_kernel(Matrices<const float> As, const float* tiles, float* parts, int64_t rows, int64_t d,
                     int64_t u, int splits, int64_t depth) {
#ifdef RLSEDIT_WARPGROUPS
  using S = Stage<GROUPS, NT>;
  const int blocks = static_cast<int>(gridDim.y) / splits, split = static_cast<int>(blockIdx.y) / blocks;
  const int block = static_cast<int>(blockIdx.y) % blocks;
  const int group = static_cast<int>(threadIdx.x) / 128, thread = static_cast<int>(threadIdx.x) % 128;
  const int64_t b = blockIdx.z, row = static_cast<int64_t>(blockIdx.x) * S::kRows + 64 * group;
  const int64_t begin = split * depth, end = lesser<int64_t>(d, begin + depth);
  const int steps = static_cast<int>(ceil_div(end - begin, kTerms));
  const bool leads = threadIdx.x == 0;

  float* memory = shared_memory<float>();  // dynamic shared memory may start behind other
  memory += (1024 - shared_address(memory) % 1024) % 1024 / 4;
  float* left = memory + S::kCount * 2 * S::kRight + group * S::kCount * S::kLeft;
  uint64_t* full = reinterpret_cast<uint64_t*>(memory + S::kCount * (2 * S::kRight + GROUPS * S::kLeft));
  uint64_t* empty = full + S::kCount;
  if (leads) {
    for (int i = 0; i < S::kCount; ++i) {
      barrier_start(full + i, 1);
      barrier_start(empty + i, 4 * GROUPS);
    }
    fence_async();
  }
  __syncthreads();

  // Rows of A: each thread 4 of 16 bytes, always the same columns. No byte is read of what is outside.
  const Matrix<const float> A = As[b];
  const int first = thread / 8, chunk = thread % 8 * 4;
  const int below = static_cast<int>(lesser<int64_t>(greater<int64_t>(rows - row - first, 0), 64));
  const int across = static_cast<int>(end - begin) - chunk;
  const float* from = A.data + (row + first) * A.rs + begin + chunk;
  const int64_t apart = 16 * A.rs;
  const auto fetch_left = [&](int step) {
    const int valid = 4 * lesser(greater(across - step * kTerms, 0), 4);
    const float* next = valid > 0 ? from + step * kTerms : A.data;
    float* to = left + step % S::kCount * S::kLeft + first * S::kLeftLd + chunk;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      copy_async<16>(to + 16 * i * S::kLeftLd, next + i * apart, 16 * i < below ? valid : 0);
  };
  const float* right =
      tiles + ((b * blocks + block) * ceil_div(d, kTerms) + begin / kTerms) * (2 * S::kRight);
  const auto fetch_right = [&](int step) {
    uint64_t* there = full + step % S::kCount;
    barrier_expect(there, S::kRightBytes);
    copy_bulk(memory + step % S::kCount * (2 * S::kRight),
              right + static_cast<int64_t>(step) * (2 * S::kRight), S::kRightBytes, there);
  };
  for (int step = 0; step < S::kCount - 1; ++step) {
    if (step < steps) {
      fetch_left(step);
      if (leads) fetch_right(step);
    }
    copy_commit();
  }

  constexpr int kSteps = kTerms / 8;
  float sum[1][NT][4], part[NT][4];
  clear(sum);
  const int lane = lane_index(), corner = (thread / 32 * 16 + (lane >> 2)) * S::kLeftLd + (lane & 3);
  for (int step = 0; step < steps; ++step) {
    const int slot = step % S::kCount, ahead = step + S::kCount - 1;
    copy_wait<S::kCount - 2>();
    group_sync(group);  // the group's rows are there, and all of it have read those of the step before
    if (ahead < steps) fetch_left(ahead);
    copy_commit();
    uint32_t high[kSteps][4], low[kSteps][4];
    const float* a = left + slot * S::kLeft + corner;
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        Tf32x3::split(a[8 * (i & 1) * S::kLeftLd + 8 * k + 4 * (i >> 1)], high[k][i], low[k][i]);

    barrier_wait(full + slot, step / S::kCount & 1);
    converge();
    const uint64_t highs = right_descriptor(shared_address(memory + slot * (2 * S::kRight)));
    const uint64_t lows = highs + (S::kRight * 4 >> 4);
    wgmma_fence();
    wgmma<false>(part, low[0], highs);
    wgmma<true>(part, high[0], lows);
#pragma unroll
    for (int k = 1; k < kSteps; ++k) {
      wgmma<true>(part, low[k], highs + k * kNextTerms);
      wgmma<true>(part, high[k], lows + k * kNextTerms);
    }
#pragma unroll
    for (int k = 0; k < kSteps; ++k) wgmma<true>(part, high[k], highs + k * kNextTerms);
    wgmma_commit();
    if (leads && ahead < steps) {  // into the place of the step before, once nobody reads it
      if (step > 0) barrier_wait(empty + (step - 1) % S::kCount, (step - 1) / S::kCount & 1);
      fetch_right(ahead);
    }
    converge();
    wgmma_wait(part);
    if (lane == 0) barrier_arrive(empty + slot);
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[0][n][i] += part[n][i];
  }
  copy_wait<0>();

  const int64_t top = row + thread / 32 * 16, key = static_cast<int64_t>(block) * S::kColumns;
  float* to = parts + (b * splits + split) * rows * u;
  for_each_sum(sum, [&](int i, int j, float value) {
    if (top + i < rows && key + j < u) to[(top + i) * u + key + j] = value;
  });
#else
  __trap();
#endif
}

template <int GROUPS, int NT>
const float* form(Call& call, const Matrices<const float>& A, const Matrices<const float>& K, int64_t rows,
                  int64_t d, int64_t u, float* whole, int& splits) {
  using S = Stage<GROUPS, NT>;
  const int64_t batch = call.batch(), across = ceil_div(rows, S::kRows), keys = ceil_div(u, S::kColumns);
  const int64_t steps = ceil_div(d, kTerms);
  const unsigned z = static_cast<unsigned>(batch);
  float* tiles = call.scratch<float>(batch * keys * steps * 2 * S::kRight);
  launch(split_kernel<S::kColumns>, dim3(static_cast<unsigned>(steps), static_cast<unsigned>(keys), z), 256,
         0, call.stream(), K, tiles, d, u);
  int64_t count = best_splits(across * keys * batch, call.processors(), d, batch * rows * u);
  const int64_t depth = ceil_div(steps, count) * kTerms;
  count = ceil_div(d, depth);
  splits = static_cast<int>(count);
  float* parts = whole != nullptr && count == 1 ? whole : call.scratch<float>(batch * count * rows * u);
  launch(warpgroup_kernel<GROUPS, NT>,
         dim3(static_cast<unsigned>(across), static_cast<unsigned>(keys * count), z), S::kThreads, S::kShared,
         call.stream(), A, static_cast<const float*>(tiles), parts, rows, d, u, splits, depth);
  return parts;
}

}  // namespace

bool takes_warpgroups(const Call& call, const Matrices<const float>& A, int64_t u) {
  const char* asked = std::getenv("RLSEDIT_CUDA_WGMMA");  // off unless asked for: it has not been measured
  // Up to 32 keys reading A takes longer than the products do, however they are formed.
  if (asked == nullptr || std::strcmp(asked, "1") != 0 || u <= 32 || !call.has_warpgroups()) return false;
  bool aligned = A.cs == 1 && A.rs % 4 == 0 && reinterpret_cast<uintptr_t>(A.data) % 16 == 0;
  for (int i = 0; i < A.dims; ++i) aligned = aligned && A.strides[i] % 4 == 0;
  return aligned;
}

const float* warpgroup_products(Call& call, const Matrices<const float>& A, const Matrices<const float>& K,
                                int64_t rows, int64_t d, int64_t u, float* whole, int& splits) {
  // The width that leaves least to be done: keys in whole tiles, and 16 more for each time that A is read.
  int64_t width = 0, least = 0;
  for (const int64_t w : {112, 104, 64}) {
    const int64_t cost = ceil_div(u, w) * (w + 16);
    if (width == 0 || cost < least) {
      least = cost;
      width = w;
    }
  }
  const auto with = width == 112 ? form<3, 14> : width == 104 ? form<3, 13> : form<3, 8>;
  return with(call, A, K, rows, d, u, whole, splits);
}

}  // namespace rlsedit
