// As much of torch's stable interface as the ops of csrc/cpu use, in plain C++: a trial can then be compiled
// as a whole with a sanitizer, threads included. Those of OpenMP, which torch's pool is made of, hide from
// ThreadSanitizer what orders them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#define STD_TORCH_CHECK(good, ...) \
  if (!(good)) throw std::runtime_error(torch::text(__VA_ARGS__))

namespace torch {

template <class... A>
std::string text(const A&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

namespace headeronly {
enum class ScalarType { Int, Float, Double };
}

namespace stable {
using headeronly::ScalarType;

// Strided, on memory that ends where the last element does.
class Tensor {
 public:
  Tensor(ScalarType type, std::vector<int64_t> sizes, std::vector<int64_t> strides, int64_t offset)
      : type_(type), sizes_(std::move(sizes)), strides_(std::move(strides)), offset_(offset) {
    int64_t last = offset_;
    bool empty = false;
    for (size_t i = 0; i < sizes_.size(); ++i) {
      empty = empty || sizes_[i] == 0;
      last += (sizes_[i] - 1) * strides_[i];
    }
    bytes_ = static_cast<size_t>(empty ? 0 : last + 1) * element_size();
    memory_.reset(new char[bytes_], std::default_delete<char[]>());
    std::memset(memory_.get(), 0xff, bytes_);  // NaN
  }
  int64_t dim() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t size(int64_t i) const { return sizes_[static_cast<size_t>(i)]; }
  int64_t stride(int64_t i) const { return strides_[static_cast<size_t>(i)]; }
  ScalarType scalar_type() const { return type_; }
  bool is_cpu() const { return true; }
  size_t element_size() const { return type_ == ScalarType::Double ? 8 : 4; }
  const void* const_data_ptr() const { return mutable_data_ptr(); }
  void* mutable_data_ptr() const {
    return bytes_ == 0 ? memory_.get() : memory_.get() + static_cast<size_t>(offset_) * element_size();
  }
  // The whole memory, gaps included.
  std::string bits() const { return std::string(memory_.get(), bytes_); }
  void put(const std::string& bits) const { std::memcpy(memory_.get(), bits.data(), bytes_); }

 private:
  ScalarType type_;
  std::vector<int64_t> sizes_, strides_;
  int64_t offset_;
  size_t bytes_;
  std::shared_ptr<char> memory_;
};

struct Sizes {
  const int64_t* data;
  size_t count;
};

inline Tensor new_empty(const Tensor&, Sizes sizes, ScalarType type) {
  std::vector<int64_t> shape(sizes.data, sizes.data + sizes.count), strides(sizes.count);
  int64_t step = 1;
  for (size_t i = sizes.count; i-- > 0; step *= shape[i]) strides[i] = step;
  return Tensor(type, shape, strides, 0);
}
inline Tensor new_empty(const Tensor& like, Sizes sizes) {
  return new_empty(like, sizes, like.scalar_type());
}

inline int& threads() {
  static int count = 1;
  return count;
}
inline uint32_t get_num_threads() {
  return static_cast<uint32_t>(threads());
}

// As torch does: in parts, one a thread; inside of one, without another thread.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  static thread_local bool inside = false;
  const int64_t n = end - begin, count = std::min<int64_t>(threads(), (n + grain - 1) / grain);
  if (n <= 0) return;
  if (inside || count == 1) return f(begin, end);
  const int64_t step = (n + count - 1) / count;
  const auto part = [&](int64_t first) {
    inside = true;
    if (first < end) f(first, std::min(end, first + step));
    inside = false;
  };
  std::vector<std::thread> others;
  for (int64_t i = 1; i < count; ++i) others.emplace_back(part, begin + i * step);
  part(begin);
  for (std::thread& other : others) other.join();
}

using Value = std::variant<Tensor, double>;
using Op = std::function<std::vector<Tensor>(const std::vector<Value>&)>;

struct Library {
  std::map<std::string, Op> ops;
  void impl(const char* name, Op op) { ops[name] = std::move(op); }
};
inline Library& library() {
  static Library all;
  return all;
}

template <class R, class... A, size_t... I>
Op boxed(R (*f)(A...), std::index_sequence<I...>) {
  return [f](const std::vector<Value>& given) -> std::vector<Tensor> {
    if constexpr (std::is_void_v<R>) {
      f(std::get<A>(given[I])...);
      return {};
    } else if constexpr (std::is_same_v<R, Tensor>) {
      return {f(std::get<A>(given[I])...)};
    } else {
      return std::apply([](const auto&... t) { return std::vector<Tensor>{t...}; },
                        f(std::get<A>(given[I])...));
    }
  };
}
template <class R, class... A>
Op box(R (*f)(A...)) {
  return boxed(f, std::index_sequence_for<A...>());
}

}  // namespace stable
}  // namespace torch

#define TORCH_BOX(f) torch::stable::box(f)
#define STABLE_TORCH_LIBRARY_IMPL(space, key, m)                                            \
  static void add_ops(torch::stable::Library& m);                                           \
  static const bool ops_added [[maybe_unused]] = (add_ops(torch::stable::library()), true); \
  static void add_ops(torch::stable::Library& m)
