#include "tensors.h"

#ifndef RLSEDIT_EMULATE
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <sstream>
#include <utility>
#include <vector>

namespace rlsedit {

using torch::headeronly::ScalarType;

namespace {

std::string describe(const Tensor& t) {
  std::ostringstream out;
  out << '(';
  for (int64_t i = 0; i < t.dim(); ++i) out << (i > 0 ? ", " : "") << t.size(i);
  out << ')';
  return out.str();
}

void check_floating(const char* op, const char* name, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, op, ": ", name,
                  " must be float32 or float64, got scalar type ", static_cast<int>(type));
  STD_TORCH_CHECK(t.dim() >= 2, op, ": ", name, " must have at least 2 dimensions, got shape ", describe(t));
  const auto size = type == ScalarType::Double ? sizeof(double) : sizeof(float);
  const auto past = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % size;
  STD_TORCH_CHECK(past == 0, op, ": ", name, " must lie at an address that is a multiple of ", size,
                  " bytes, its element size, got a remainder of ", past, ": clone() it");
#ifndef RLSEDIT_EMULATE
  STD_TORCH_CHECK(t.is_cuda(), op, ": ", name, " must be on a CUDA device");
#endif
}

const Tensor& checked(const char* op, const char* name, const Tensor& t) {
  check_floating(op, name, t);
  return t;
}

Stream current_stream(const Tensor& t) {
#ifdef RLSEDIT_EMULATE
  (void)t;
  return 0;
#else
  void* stream = nullptr;
  const auto status = aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream);
  STD_TORCH_CHECK(status == AOTI_TORCH_SUCCESS, "torch does not tell its current CUDA stream");
  return static_cast<Stream>(stream);
#endif
}

}  // namespace

Call::Call(const char* op, const char* name, const Tensor& first)
    : op_(op),
      first_(checked(op, name, first)),
#ifndef RLSEDIT_EMULATE
      guard_(first.get_device_index()),
#endif
      stream_(current_stream(first)) {
  STD_TORCH_CHECK(batch() <= 65535, op, ": at most 65535 matrices at once, got ", batch());
}

void Call::floating(const char* name, const Tensor& t) const {
  check_floating(op_, name, t);
  STD_TORCH_CHECK(t.scalar_type() == first_.scalar_type(), op_, ": ", name,
                  " must have the dtype of the first argument");
  STD_TORCH_CHECK(t.get_device_index() == first_.get_device_index(), op_, ": ", name,
                  " must be on the device of the first argument");
}

void Call::square(const char* name, const Tensor& t) const {
  STD_TORCH_CHECK(rows(t) == columns(t) && rows(t) > 0, op_, ": ", name,
                  " must have shape (..., n, n) with n >= 1, got ", describe(t));
}

void Call::shape(const char* name, const Tensor& t, int64_t want_rows, int64_t want_columns) const {
  bool good = t.dim() == first_.dim() && rows(t) > 0 && columns(t) > 0 &&
              (want_rows < 0 || rows(t) == want_rows) && (want_columns < 0 || columns(t) == want_columns);
  for (int64_t i = 0; good && i < t.dim() - 2; ++i) good = t.size(i) == first_.size(i);
  const auto text = [](int64_t n) { return n < 0 ? std::string("n >= 1") : std::to_string(n); };
  STD_TORCH_CHECK(good, op_, ": ", name, " must have shape (..., ", text(want_rows), ", ", text(want_columns),
                  ") and the leading dimensions of a tensor of shape ", describe(first_), ", got ",
                  describe(t));
}

void Call::writable(const char* name, const Tensor& t) const {
  // In the order of strides, every step must go beyond what the smaller ones reach.
  std::vector<std::pair<int64_t, int64_t>> steps;
  for (int64_t i = 0; i < t.dim(); ++i)
    if (t.size(i) > 1) steps.emplace_back(t.stride(i), t.size(i));
  std::sort(steps.begin(), steps.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : steps) {
    STD_TORCH_CHECK(stride > reach, op_, ": ", name,
                    " is written in place and must not overlap itself, got a stride of ", stride,
                    " for shape ", describe(t));
    reach += stride * (size - 1);
  }
}

void Call::require(bool good, const char* what) const {
  STD_TORCH_CHECK(good, op_, ": ", what);
}

#ifdef RLSEDIT_EMULATE
int64_t Call::most_shared() const {
  return static_cast<int64_t>(emulate::Machine::here().gpu.most_shared);
}
int64_t Call::processors() const {
  return emulate::Machine::here().gpu.processors;
}
bool Call::has_warpgroups() const {
  return emulate::Machine::here().gpu.warpgroups;
}
#else
namespace {
int64_t attribute(const Tensor& t, cudaDeviceAttr wanted) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, wanted, t.get_device_index()), "attribute of the device");
  return value;
}
}  // namespace

int64_t Call::most_shared() const {
  return attribute(first_, cudaDevAttrMaxSharedMemoryPerBlockOptin);
}
int64_t Call::processors() const {
  return attribute(first_, cudaDevAttrMultiProcessorCount);
}

bool Call::has_warpgroups() const {
  return std::strstr(RLSEDIT_CUDA_ARCHITECTURES, "90a") != nullptr &&
         attribute(first_, cudaDevAttrComputeCapabilityMajor) == 9 &&
         attribute(first_, cudaDevAttrComputeCapabilityMinor) == 0;
}
#endif

int64_t Call::batch() const {
  int64_t count = 1;
  for (int64_t i = 0; i < first_.dim() - 2; ++i) count *= first_.size(i);
  return count;
}

Tensor Call::empty(const Sizes& last) const {
  Sizes sizes;
  for (int64_t i = 0; i < first_.dim() - 2; ++i) sizes.push_back(first_.size(i));
  sizes.insert(sizes.end(), last.begin(), last.end());
  return torch::stable::new_empty(first_, {sizes.data(), sizes.size()});
}

Tensor Call::info() const {
  Sizes sizes;
  for (int64_t i = 0; i < first_.dim() - 2; ++i) sizes.push_back(first_.size(i));
  return torch::stable::new_empty(first_, {sizes.data(), sizes.size()}, ScalarType::Int);
}

void Call::lead(const Tensor& t, int& dims, int64_t* sizes, int64_t* strides) const {
  dims = 0;
  for (int64_t i = 0; i < t.dim() - 2; ++i) {
    const int64_t size = t.size(i), stride = t.stride(i);
    if (size == 1) continue;
    if (dims > 0 && strides[dims - 1] == size * stride) {  // adjacent to the one before
      sizes[dims - 1] *= size;
      strides[dims - 1] = stride;
      continue;
    }
    STD_TORCH_CHECK(dims < kBatchDims, op_, ": at most ", kBatchDims,
                    " leading dimensions that cannot be joined; make the tensor contiguous");
    sizes[dims] = size;
    strides[dims++] = stride;
  }
}

}  // namespace rlsedit

#ifdef RLSEDIT_EMULATE
// For the tests: blocks, warps and lanes run in descending order.
extern "C" __attribute__((visibility("default"))) void rlsedit_emulate_descending(int yes) {
  rlsedit::emulate::Machine::here().descending = yes != 0;
}
// So many blocks are under way at a time.
extern "C" __attribute__((visibility("default"))) void rlsedit_emulate_beside(int blocks) {
  rlsedit::emulate::Machine::here().beside = static_cast<unsigned>(blocks);
}
// The GPU that is emulated: bytes of shared memory that a block may have, multiprocessors, whether it has
// wgmma.
extern "C" __attribute__((visibility("default"))) void rlsedit_emulate_gpu(int shared, int processors,
                                                                           int warpgroups) {
  rlsedit::emulate::Machine::here().gpu = {static_cast<size_t>(shared), processors, warpgroups != 0};
}
// Kernels launched by this thread so far.
extern "C" __attribute__((visibility("default"))) int rlsedit_emulate_launches() {
  return rlsedit::emulate::Machine::here().launches;
}
#else
// For the loader: what this library was compiled for, such as "80-real 90a-real 100-virtual".
extern "C" __attribute__((visibility("default"))) const char* rlsedit_cuda_architectures() {
  return RLSEDIT_CUDA_ARCHITECTURES;
}
#endif
