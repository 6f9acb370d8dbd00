#include "tensors.h"

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <utility>

namespace rlsedit {

using torch::headeronly::ScalarType;

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
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, " must be on the CPU");
  STD_TORCH_CHECK(t.dim() >= 2, op, ": ", name, " must have at least 2 dimensions, got shape ", describe(t));
  // What C++ and vector loads take for granted; memory from elsewhere (torch.frombuffer) may lie anywhere.
  const auto size = type == ScalarType::Double ? sizeof(double) : sizeof(float);
  const auto past = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % size;
  STD_TORCH_CHECK(past == 0, op, ": ", name, " must lie at an address that is a multiple of ", size,
                  " bytes, its element size, got a remainder of ", past, ": clone() it");
}

void check_alike(const char* op, const char* name, const Tensor& t, const char* first_name,
                 const Tensor& first) {
  check_floating(op, name, t);
  STD_TORCH_CHECK(t.scalar_type() == first.scalar_type(), op, ": ", name, " must have the dtype of ",
                  first_name);
}

void check_square(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(rows(t) == columns(t) && rows(t) > 0, op, ": ", name,
                  " must have shape (..., n, n) with n >= 1, got ", describe(t));
}

void check_shape(const char* op, const char* name, const Tensor& t, const Tensor& first, int64_t want_rows,
                 int64_t want_columns) {
  bool good = t.dim() == first.dim() && rows(t) > 0 && columns(t) > 0 &&
              (want_rows < 0 || rows(t) == want_rows) && (want_columns < 0 || columns(t) == want_columns);
  for (int64_t i = 0; good && i < t.dim() - 2; ++i) good = t.size(i) == first.size(i);
  const auto text = [](int64_t n) { return n < 0 ? std::string("u >= 1") : std::to_string(n); };
  STD_TORCH_CHECK(good, op, ": ", name, " must have shape (..., ", text(want_rows), ", ", text(want_columns),
                  ") and the leading dimensions of a tensor of shape ", describe(first), ", got ",
                  describe(t));
}

void check_writable(const char* op, const char* name, const Tensor& t) {
  // In the order of strides, every step must go beyond what the smaller ones reach.
  std::vector<std::pair<int64_t, int64_t>> steps;
  for (int64_t i = 0; i < t.dim(); ++i) {
    if (t.size(i) == 0) return;
    if (t.size(i) > 1) steps.emplace_back(t.stride(i), t.size(i));
  }
  std::sort(steps.begin(), steps.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : steps) {
    STD_TORCH_CHECK(stride > reach, op, ": ", name,
                    " is written in place and must not overlap itself, got a stride of ", stride,
                    " for shape ", describe(t));
    reach += stride * (size - 1);
  }
}

int64_t batch_count(const Tensor& t) {
  int64_t count = 1;
  for (int64_t i = 0; i < t.dim() - 2; ++i) count *= t.size(i);
  return count;
}

int64_t batch_offset(const Tensor& t, int64_t b) {
  int64_t offset = 0;
  for (int64_t i = t.dim() - 3; i >= 0; --i) {
    offset += b % t.size(i) * t.stride(i);
    b /= t.size(i);
  }
  return offset;
}

Tensor new_output(const Tensor& like, const Sizes& last) {
  Sizes sizes;
  for (int64_t i = 0; i < like.dim() - 2; ++i) sizes.push_back(like.size(i));
  sizes.insert(sizes.end(), last.begin(), last.end());
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()});
}

Tensor new_info(const Tensor& like) {
  Sizes sizes;
  for (int64_t i = 0; i < like.dim() - 2; ++i) sizes.push_back(like.size(i));
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, ScalarType::Int);
}

}  // namespace rlsedit
