// Small kernels for test_emulator.py: mistakes that the emulator has to notice, and one tile of every engine.
#include <cstring>

#include "copy.h"
#include "dataflow.h"
#include "mma.h"

using namespace rlsedit;

namespace {

char message[256];

template <class F>
const char* said(const F& f) {
  message[0] = 0;
  try {
    f();
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), sizeof message - 1);
  }
  return message;
}

// Thread i takes what thread i + 32 (of the next warp) has written; `waits` says whether it waits for it.
void neighbour_kernel(float* out, int waits) {
  float* room = shared_memory<float>();
  const int i = static_cast<int>(threadIdx.x);
  room[i] = static_cast<float>(i);
  if (waits) __syncthreads();
  out[i] = room[(i + 32) % 64];
}

void divergent_kernel(int) {
  if (threadIdx.x < 32) __syncthreads();
}

void beyond_kernel(int behind) {
  shared_memory<float>()[64 + behind] = 1.0f;
}

// kind 0: as it should be; 1: read before it was waited for; 2: never waited for.
void copy_kernel(const float* from, float* out, int kind) {
  float* room = shared_memory<float>();
  copy_async<4>(room + threadIdx.x, from + threadIdx.x, 4);
  copy_commit();
  if (kind == 0) copy_wait<0>();
  out[threadIdx.x] = room[threadIdx.x];
  if (kind == 1) copy_wait<0>();
}

// Every block adds its number to what the one before it has left: in the order of tickets, or of blocks.
void chain_kernel(unsigned* counters, float* sums, int by_ticket, int waits) {
  unsigned* done = counters + kCounterSize;
  const unsigned ticket = take_ticket(counters, shared_memory<unsigned>());
  const unsigned number = by_ticket ? ticket : blockIdx.x;
  Awaited before(done);
  if (waits) before.wait(number, true);
  if (threadIdx.x == 0) sums[number] = (number > 0 ? sums[number - 1] : 0.0f) + static_cast<float>(number);
  publish(done, number + 1);
}

// A lane takes what the next one has written. kind 0: after __syncwarp; 1: after a shuffle, which in the
// emulator comes to the same and on a GPU orders nothing; 2: after nothing.
void lane_kernel(float* out, int kind) {
  float* room = shared_memory<float>();
  const int i = lane_index();
  room[i] = static_cast<float>(i);
  float word = 0.0f;
  if (kind == 0) __syncwarp();
  if (kind == 1) word = __shfl_xor_sync(0xffffffffu, 1.0f, 1) - 1.0f;
  out[i] = room[(i + 1) % 32] + word;
}

// A thread takes what the next one has copied, both having waited for their own copies only.
void borrowing_kernel(const float* from, float* out, int waits) {
  float* room = shared_memory<float>();
  const int i = static_cast<int>(threadIdx.x);
  copy_async<4>(room + i, from + i, 4);
  copy_commit();
  copy_wait<0>();
  if (waits) __syncthreads();
  out[i] = room[(i + 1) % 64];
}

template <class E, bool TURNED>
void tile_kernel(const typename E::T* A, const typename E::T* B, typename E::T* out, int depth) {
  typename E::T sum[1][1][4];
  clear(sum);
  multiply<E, 1, 1, TURNED>(sum, A, depth, B, TURNED ? 8 : depth, depth);
  for_each_sum(sum, [&](int i, int j, typename E::T value) { out[i * 8 + j] = value; });
}

}  // namespace

extern "C" {

void descending(int yes) {
  emulate::Machine::here().descending = yes != 0;
}
const char* neighbour(float* out, int waits) {
  return said([&] { launch(neighbour_kernel, dim3(1), 64, 256, 0, out, waits); });
}
const char* divergent() {
  return said([&] { launch(divergent_kernel, dim3(1), 64, 0, 0, 0); });
}
const char* beyond(int behind) {
  return said([&] { launch(beyond_kernel, dim3(1), 32, 256, 0, behind); });
}
const char* too_much() {
  return said([&] { launch(beyond_kernel, dim3(1), 32, 228 * 1024, 0, 0); });
}
const char* copied(const float* from, float* out, int kind) {
  return said([&] { launch(copy_kernel, dim3(1), 32, 128, 0, from, out, kind); });
}
const char* lanes(float* out, int kind) {
  return said([&] { launch(lane_kernel, dim3(1), 32, 128, 0, out, kind); });
}
const char* borrowed(const float* from, float* out, int waits) {
  return said([&] { launch(borrowing_kernel, dim3(1), 64, 256, 0, from, out, waits); });
}
void beside(int blocks) {
  emulate::Machine::here().beside = static_cast<unsigned>(blocks);
}
const char* chained(unsigned* counters, float* sums, int blocks, int by_ticket, int waits) {
  clear_memory(counters, 2 * kCounterSize * sizeof(unsigned), 0);
  return said([&] {
    launch(chain_kernel, dim3(static_cast<unsigned>(blocks)), 64, 256, 0, counters, sums, by_ticket, waits);
  });
}
void tile_tf32x3(const float* A, const float* B, float* out, int depth, int turned) {
  launch(turned ? tile_kernel<Tf32x3, true> : tile_kernel<Tf32x3, false>, dim3(1), 32, 0, 0, A, B, out,
         depth);
}
void tile_float32(const float* A, const float* B, float* out, int depth, int turned) {
  launch(turned ? tile_kernel<Ffma, true> : tile_kernel<Ffma, false>, dim3(1), 32, 0, 0, A, B, out, depth);
}
void tile_float64(const double* A, const double* B, double* out, int depth, int turned) {
  launch(turned ? tile_kernel<Dmma, true> : tile_kernel<Dmma, false>, dim3(1), 32, 0, 0, A, B, out, depth);
}
}
