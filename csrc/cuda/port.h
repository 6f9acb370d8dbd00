// What the kernels need of CUDA. With RLSEDIT_EMULATE the same source compiles for a CPU (host/emulate.h):
// the tests run every kernel there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#ifdef RLSEDIT_EMULATE

#include "host/emulate.h"

#else

#include <cuda_runtime.h>

#define RLSEDIT_DEVICE __device__ __forceinline__
#define RLSEDIT_HOST_DEVICE __host__ __device__ __forceinline__

namespace rlsedit {

using Stream = cudaStream_t;

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// More than 48 KB of dynamic shared memory have to be allowed, once a kernel and device. The limit only
// grows: a thread that launches with less cannot take it from one that has asked for more and not launched
// yet.
inline void allow_shared(const void* function, size_t shared) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  int device = 0;
  check(cudaGetDevice(&device), "the current device");
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& most = allowed[{function, device}];
  if (shared <= most) return;
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
        "shared memory of a kernel");
  most = shared;
}

// Put a kernel on the stream; `shared` bytes of dynamic shared memory. The host never waits. Nothing is
// launched for an empty grid, which CUDA would refuse: no matrices, no work.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared, Stream stream, A... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared > 48 * 1024) allow_shared(function, shared);
  std::tuple<P...> values(arguments...);
  std::apply(
      [&](auto&... value) {
        void* pointers[] = {&value...};
        check(cudaLaunchKernel(function, grid, dim3(threads), pointers, shared, stream),
              "launch of a kernel");
      },
      values);
}

// Zero bytes, on the stream.
inline void clear_memory(void* memory, size_t bytes, Stream stream) {
  if (bytes > 0) check(cudaMemsetAsync(memory, 0, bytes, stream), "clearing of memory");
}

// The block's dynamic shared memory.
template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

}  // namespace rlsedit

#endif

namespace rlsedit {

RLSEDIT_HOST_DEVICE constexpr int64_t ceil_div(int64_t n, int64_t by) {
  return (n + by - 1) / by;
}
template <class T>
RLSEDIT_HOST_DEVICE constexpr T lesser(T a, T b) {
  return a < b ? a : b;
}
template <class T>
RLSEDIT_HOST_DEVICE constexpr T greater(T a, T b) {
  return a < b ? b : a;
}

// A pointer into global memory, where the compiler does not see that it is one and would address it
// generically.
template <class T>
RLSEDIT_DEVICE T* in_global(T* pointer) {
#ifndef RLSEDIT_EMULATE
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

RLSEDIT_DEVICE int lane_index() {
  return static_cast<int>(threadIdx.x) & 31;
}
RLSEDIT_DEVICE int warp_index() {
  return static_cast<int>(threadIdx.x) >> 5;
}

}  // namespace rlsedit
