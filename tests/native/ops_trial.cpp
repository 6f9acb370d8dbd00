// Every op of csrc/cpu at the edges of tiles and panels, on tensors of all layouts whose memory ends where
// they do, by one thread, two and five: nothing outside is touched, and the bits are those of one thread.
// Compiled with a sanitizer, without torch (test_sanitized_ops.py). Prints a line for each case that is
// wrong; returns how many.
#include <cmath>
#include <cstdio>

#include "engine.h"
#include "without_torch.h"

namespace {

using torch::stable::ScalarType;
using torch::stable::Tensor;
using torch::stable::Value;
using Sizes = std::vector<int64_t>;

uint64_t seed = 1;

uint64_t drawn() {
  seed = seed * 6364136223846793005u + 1442695040888963407u;
  return seed >> 33;
}
int64_t below(int64_t n) {
  return static_cast<int64_t>(drawn() % static_cast<uint64_t>(n));
}
double number() {  // in (-1, 1)
  return static_cast<double>(static_cast<int64_t>(drawn()) - (1 << 30)) / static_cast<double>(1 << 30);
}

// Rows adjacent, columns adjacent, neither; with gaps, and at addresses that no vector is aligned to.
Tensor empty(ScalarType type, const Sizes& batch, int64_t rows, int64_t columns) {
  const int64_t layout = below(4), gap = below(3);
  int64_t rs = columns, cs = 1;
  if (layout == 1) rs = 1, cs = rows + gap;
  if (layout == 2) cs = 2 + gap, rs = columns * cs + gap;
  if (layout == 3) rs = columns + gap;
  int64_t step = (rows - 1) * rs + (columns - 1) * cs + 1;
  Sizes sizes = batch, strides(batch.size());
  for (size_t i = batch.size(); i-- > 0; step *= std::max<int64_t>(1, batch[i]))
    strides[i] = step += below(2);
  sizes.insert(sizes.end(), {rows, columns});
  strides.insert(strides.end(), {rs, cs});
  return Tensor(type, sizes, strides, below(4));
}

// Calls f(b, i, j, x) for every element x.
template <class F>
void each(const Tensor& t, const F& f) {
  const int64_t n = t.dim(), rows = t.size(n - 2), columns = t.size(n - 1);
  int64_t count = 1;
  for (int64_t i = 0; i < n - 2; ++i) count *= t.size(i);
  for (int64_t b = 0; b < count; ++b) {
    int64_t offset = 0, rest = b;
    for (int64_t i = n - 3; i >= 0; rest /= t.size(i--)) offset += rest % t.size(i) * t.stride(i);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t at = offset + i * t.stride(n - 2) + j * t.stride(n - 1);
        if (t.scalar_type() == ScalarType::Double)
          f(b, i, j, static_cast<double*>(t.mutable_data_ptr())[at]);
        else
          f(b, i, j, static_cast<float*>(t.mutable_data_ptr())[at]);
      }
  }
}

struct Case {
  ScalarType type;
  Sizes batch;
  int64_t d, u, v;

  Tensor any(int64_t rows, int64_t columns, double scale = 1.0) const {
    const Tensor t = empty(type, batch, rows, columns);
    each(t, [&](int64_t, int64_t, int64_t, auto& x) {
      x = static_cast<std::decay_t<decltype(x)>>(scale * number());
    });
    return t;
  }
  // Positive definite: its diagonal dominates.
  Tensor symmetric(int64_t n) const {
    const Tensor t = empty(type, batch, n, n);
    each(t, [&](int64_t b, int64_t i, int64_t j, auto& x) {
      const int64_t p = (std::max(i, j) * 31 + std::min(i, j) * 17 + b * 7) % 13 - 6;
      x = static_cast<std::decay_t<decltype(x)>>(
          i == j ? 2.0 : static_cast<double>(p) / static_cast<double>(8 * n));
    });
    return t;
  }
  Tensor triangular(int64_t n) const {
    const Tensor t = any(n, n, 1.0 / static_cast<double>(n));
    each(t, [](int64_t, int64_t i, int64_t j, auto& x) { x = i > j ? 0 : i == j ? x + 1 : x; });
    return t;
  }
  std::vector<Value> arguments(const std::string& op) const {
    const double small = 0.1 / static_cast<double>(d);
    if (op == "gain_products") return {symmetric(d), any(u, d)};
    if (op == "key_products") return {any(d, v), any(u, d)};
    if (op == "cholesky") return {symmetric(d)};
    if (op == "gain_solve") return {any(d, u), symmetric(u), 0.5};
    if (op == "downdate_") return {symmetric(d), any(d, u, small), -1.0};
    if (op == "downdate_gain_products_") return {symmetric(d), any(d, u, small), any(u, d), -1.0};
    if (op == "rls_update_") return {symmetric(d), any(u, d), 0.5, 0.9};
    if (op == "weight_update_") return {any(d, v), any(u, d), any(u, v), any(d, u)};
    if (op == "qr_append_") return {triangular(d), any(u, d)};
    if (op == "qr_append_rhs_") return {triangular(d), any(d, v), any(u, d), any(u, v)};
    if (op == "qr_gain") return {triangular(d), any(u, d)};
    if (op == "add_product_") return {any(d, v), any(d, u), any(v, u), -0.5};
    throw std::runtime_error("no arguments for " + op);
  }
};

// Whether all elements are numbers, and the gaps between them as they were.
bool sound(const Tensor& t) {
  const std::string bits = t.bits();
  bool good = true;
  each(t, [&](int64_t, int64_t, int64_t, auto& x) {
    good = good && std::isfinite(x);
    std::memset(&x, 0xff, sizeof(x));
  });
  good = good && t.bits().find_first_not_of('\xff') == std::string::npos;
  t.put(bits);
  return good;
}

// The bits of what an op returns and of its arguments as it leaves them.
std::vector<std::string> run(const torch::stable::Op& op, const std::vector<Value>& given, bool& good) {
  std::vector<Tensor> all = op(given);
  for (const Value& value : given)
    if (const Tensor* t = std::get_if<Tensor>(&value)) all.push_back(*t);
  std::vector<std::string> bits;
  for (const Tensor& t : all) {
    good = good && (t.scalar_type() == ScalarType::Int || sound(t));
    bits.push_back(t.bits());
  }
  return bits;
}

int wrong(const std::string& name, const torch::stable::Op& op, const Case& one) {
  const std::vector<Value> given = one.arguments(name);
  std::vector<std::string> before, alone;
  for (const Value& value : given)
    if (const Tensor* t = std::get_if<Tensor>(&value)) before.push_back(t->bits());
  bool good = true;
  for (const int threads : {1, 2, 5}) {
    torch::stable::threads() = threads;
    size_t i = 0;
    for (const Value& value : given)
      if (const Tensor* t = std::get_if<Tensor>(&value)) t->put(before[i++]);
    const std::vector<std::string> found = run(op, given, good);
    if (threads == 1) alone = found;
    good = good && found == alone;
  }
  if (!good)
    std::printf("%s: %d bytes, batch of %d dimensions, d %d, u %d, v %d\n", name.c_str(),
                one.type == ScalarType::Double ? 8 : 4, static_cast<int>(one.batch.size()),
                static_cast<int>(one.d), static_cast<int>(one.u), static_cast<int>(one.v));
  return good ? 0 : 1;
}

}  // namespace

int main(int count, char** words) {
  const int64_t most = count > 1 ? std::atoi(words[1]) : 1 << 20;  // multiply-adds of a case
  // Around panels of 6, 8 and 12 rows and 4 to 32 columns, tiles of 48, 96 and 192, and what counts as few
  // keys.
  const Sizes sizes = {1, 2, 5, 7, 13, 16, 17, 31, 33, 47, 48, 49, 95, 97, 191, 192, 193, 260, 385};
  const Sizes keys = {1, 2, 3, 4, 5, 8, 9, 16, 17, 24, 33, 49, 65, 97, 193, 257};
  const std::vector<Sizes> batches = {{}, {0}, {1}, {3}, {2, 2}};
  int bad = 0, tried = 0;
  for (const auto& [name, op] : torch::stable::library().ops)
    for (const ScalarType type : {ScalarType::Float, ScalarType::Double})
      for (const int64_t d : sizes)
        for (const int64_t u : keys) {
          const Case one{type, batches[static_cast<size_t>(below(5))], d, u,
                         sizes[static_cast<size_t>(below(19))]};
          int64_t work = d * (d + one.v) * u;
          for (const int64_t n : one.batch) work *= std::max<int64_t>(1, n);
          if (work > most) continue;
          bad += wrong(name, op, one);
          ++tried;
        }
  std::printf("%s: %d ops, %d cases\n", rlsedit::engine<float>().name,
              static_cast<int>(torch::stable::library().ops.size()), tried);
  return bad;
}
