// Every kernel of the product engine against plain loops in double, in memory that ends where the operands
// end. Free of torch and of Python, so that any compiler can build it and any emulator run it
// (test_compilers.py). Prints a line per kernel that is wrong; returns how many there are.
#include "engine.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <vector>

namespace {

using rlsedit::Engine;

int wrong = 0;
uint64_t seed = 1;

double number() {  // in (-1, 1), the same everywhere
  seed = seed * 6364136223846793005u + 1442695040888963407u;
  return static_cast<double>(static_cast<int64_t>(seed) >> 11) / 4503599627370496.0;
}

template <class T>
std::vector<T> numbers(int64_t count) {
  std::vector<T> out(static_cast<size_t>(count));
  for (T& x : out) x = static_cast<T>(number());
  return out;
}

// On a cache line, as the kernels may expect of panels and columns.
template <class T>
struct Aligned {
  explicit Aligned(int64_t count) : size(static_cast<size_t>(count)) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, size * sizeof(T)) != 0) std::abort();
    data.reset(static_cast<T*>(p));
    for (size_t i = 0; i < size; ++i) data.get()[i] = std::numeric_limits<T>::quiet_NaN();
  }
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  size_t size;
  std::unique_ptr<T, Free> data;
  operator T*() const { return data.get(); }
};

template <class T>
struct Check {
  const char* engine;
  const char* kernel;
  double worst = 0.0;

  // What sums of `terms` products, of sizes up to one, may be off.
  void operator()(double found, double expected, int64_t terms) {
    const double unit = static_cast<double>(std::numeric_limits<T>::epsilon());
    const double error = std::fabs(found - expected) / (unit * static_cast<double>(terms + 1));
    if (!(error <= worst)) worst = error;
  }
  ~Check() {
    if (worst < 4.0) return;
    std::printf("%s, %d bytes, %s: %g\n", engine, static_cast<int>(sizeof(T)), kernel, worst);
    ++wrong;
  }
};

int64_t up(int64_t n, int64_t step) {
  return (n + step - 1) / step * step;
}

template <class T>
void products(const Engine<T>& e, int64_t m, int64_t n, int64_t k, bool lower, int64_t cs, bool past_cache) {
  const int64_t rs = cs == 1 ? up(n > m ? n : m, 16) : 1, step = cs == 1 ? 1 : m + 3;
  const std::vector<T> A = numbers<T>(m * k), B = lower ? A : numbers<T>(n * k);
  const Aligned<T> a(up(m, e.mr) * k), b(up(n, e.nr) * k), C(rs * m + step * n + 16), M(rs * (n + m) + 16);
  e.pack_left(a, e.mr * k, A.data(), m, k, k, 1);
  e.pack_right(b, e.nr * k, B.data(), n, k, k, 1);
  const bool mirrored = cs == 1 && !lower;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) C[i * rs + j * step] = T(1);
  e.tile({a, e.mr * k, b, e.nr * k, m, n, k, T(-1), T(0.5), C, rs, step, lower,
          mirrored ? static_cast<T*>(M) : nullptr, past_cache});
  if (lower) e.mirror(C, rs, step, m);
  Check<T> tile{e.name, lower ? "tile, lower" : "tile"}, turned{e.name, "tile, mirrored"};
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0.5;
      for (int64_t p = 0; p < k; ++p)
        sum -= static_cast<double>(A[static_cast<size_t>(i * k + p)]) *
               static_cast<double>(B[static_cast<size_t>(j * k + p)]);
      tile(static_cast<double>(C[i * rs + j * step]), sum, k);
      if (mirrored) turned(static_cast<double>(M[j * rs + i]), sum, k);
    }
}

template <class T>
void few(const Engine<T>& e, int64_t u, int64_t rows, int64_t d) {
  const std::vector<T> A = numbers<T>(rows * d), K = numbers<T>(u * d), L = numbers<T>(u * rows);
  std::vector<T> y(static_cast<size_t>(u * rows)), z(static_cast<size_t>(u * d)), C = A;
  e.dots(A.data(), d, rows, K.data(), d, u, d, y.data(), rows);
  e.combine(L.data(), rows, u, A.data(), d, rows, d, z.data(), d);
  std::vector<T> Lt(static_cast<size_t>(rows * u));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < u; ++c) Lt[static_cast<size_t>(i * u + c)] = L[static_cast<size_t>(c * rows + i)];
  e.add_few(C.data(), d, rows, d, Lt.data(), u, K.data(), d, u);
  Check<T> dots{e.name, "dots"}, combine{e.name, "combine"}, add{e.name, "add_few"};
  const auto at = [](const std::vector<T>& x, int64_t i) {
    return static_cast<double>(x[static_cast<size_t>(i)]);
  };
  for (int64_t c = 0; c < u; ++c) {
    for (int64_t i = 0; i < rows; ++i) {
      double sum = 0.0;
      for (int64_t p = 0; p < d; ++p) sum += at(A, i * d + p) * at(K, c * d + p);
      dots(at(y, c * rows + i), sum, d);
    }
    for (int64_t j = 0; j < d; ++j) {
      double sum = 0.0;
      for (int64_t i = 0; i < rows; ++i) sum += at(L, c * rows + i) * at(A, i * d + j);
      combine(at(z, c * d + j), sum, rows);
    }
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < d; ++j) {
      double sum = at(A, i * d + j);
      for (int64_t c = 0; c < u; ++c) sum += at(L, c * rows + i) * at(K, c * d + j);
      add(at(C, i * d + j), sum, u);
    }
}

// A = L L' with a diagonal near two, and what follows from the factor: solves of a panel and of columns.
template <class T>
void triangles(const Engine<T>& e, int64_t n) {
  std::vector<T> A(static_cast<size_t>(n * n)), exact(static_cast<size_t>(n * n));
  const auto at = [n](std::vector<T>& x, int64_t i, int64_t j) -> T& {
    return x[static_cast<size_t>(i * n + j)];
  };
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j <= i; ++j)
      at(exact, i, j) = static_cast<T>(i == j ? 2.0 : number() / static_cast<double>(n));
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      double sum = 0.0;
      for (int64_t p = 0; p <= j; ++p)
        sum += static_cast<double>(at(exact, i, p)) * static_cast<double>(at(exact, j, p));
      at(A, i, j) = static_cast<T>(sum);
    }
  Check<T> factor{e.name, "factor"}, lower{e.name, "solve_lower"}, upper{e.name, "solve_upper"};
  if (e.factor(A.data(), n, n) != 0) factor(1.0, 0.0, 0);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j <= i; ++j)
      factor(static_cast<double>(at(A, i, j)), static_cast<double>(at(exact, i, j)), n);
  // With L x = b and then L' y = x, the residuals are small.
  const std::vector<T> right = numbers<T>(e.nr * n);
  const Aligned<T> x(e.nr * n), y(e.nr * n);
  std::vector<T> rows(static_cast<size_t>(e.nr * n));
  e.pack_right(x, 0, right.data(), e.nr, n, n, 1);
  e.solve_lower(x, exact.data(), n, n);
  e.unpack_right(rows.data(), n, x, e.nr, n);
  for (int64_t i = 0; i < e.nr * n; ++i) y[i] = x[i];
  e.solve_upper(y, exact.data(), n, n);
  for (int64_t c = 0; c < e.nr; ++c)
    for (int64_t i = 0; i < n; ++i) {
      double down = 0.0, back = 0.0;
      for (int64_t p = 0; p <= i; ++p)
        down +=
            static_cast<double>(at(exact, i, p)) * static_cast<double>(rows[static_cast<size_t>(c * n + p)]);
      for (int64_t p = i; p < n; ++p)
        back += static_cast<double>(at(exact, p, i)) * static_cast<double>(y[p * e.nr + c]);
      lower(down, static_cast<double>(right[static_cast<size_t>(c * n + i)]), n);
      upper(back, static_cast<double>(x[i * e.nr + c]), n);
    }
  at(A, n - 1, n - 1) = std::numeric_limits<T>::quiet_NaN();
  if (e.factor(A.data(), n, n) != n) factor(1.0, 0.0, 0);
}

// Rows of X appended to an upper triangular A: A_new'A_new = A'A + X'X, and X R = B by columns.
template <class T>
void columns(const Engine<T>& e, int64_t u, int64_t n) {
  const int64_t ldx = up(u, rlsedit::kColumnStep);
  std::vector<T> A(static_cast<size_t>(n * n)), E(static_cast<size_t>(n * n));
  const Aligned<T> X(n * ldx), Y(n * ldx), B(n * ldx);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = i; j < n; ++j)
      A[static_cast<size_t>(i * n + j)] = static_cast<T>(i == j ? 2.0 : number() / static_cast<double>(n));
  for (int64_t c = 0; c < n; ++c)
    for (int64_t i = 0; i < ldx; ++i)
      X[c * ldx + i] = B[c * ldx + i] = static_cast<T>(i < u ? number() : 0.0);
  const auto gram = [n](const std::vector<T>& R, int64_t i, int64_t j) {
    double sum = 0.0;
    for (int64_t p = 0; p <= (i < j ? i : j); ++p)
      sum += static_cast<double>(R[static_cast<size_t>(p * n + i)]) *
             static_cast<double>(R[static_cast<size_t>(p * n + j)]);
    return sum;
  };
  Check<T> solve{e.name, "solve_columns"}, append{e.name, "reflect"};
  for (const bool transposed : {false, true}) {
    const Aligned<T> S(n * ldx);
    for (int64_t i = 0; i < n * ldx; ++i) S[i] = B[i];
    e.solve_columns(S, ldx, u, A.data(), n, n, transposed);
    for (int64_t c = 0; c < n; ++c)
      for (int64_t i = 0; i < u; ++i) {
        double sum = 0.0;
        for (int64_t p = 0; p < n; ++p) {
          const int64_t row = transposed ? c : p, column = transposed ? p : c;
          if (row <= column)
            sum += static_cast<double>(S[p * ldx + i]) *
                   static_cast<double>(A[static_cast<size_t>(row * n + column)]);
        }
        solve(sum, static_cast<double>(B[c * ldx + i]), n);
      }
  }
  const std::vector<T> before = A;
  e.reflect(A.data(), n, X, Y, ldx, u, n, E.data());
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = gram(before, i, j);
      for (int64_t p = 0; p < u; ++p)
        sum += static_cast<double>(B[i * ldx + p]) * static_cast<double>(B[j * ldx + p]);
      append(gram(A, i, j), sum, 2 * (u + n));
    }
}

template <class T>
void all(const Engine<T>& e) {
  for (const bool lower : {false, true})
    for (const int64_t k : {int64_t{1}, int64_t{17}, e.kc + 5}) {
      products(e, 48, lower ? 48 : 2 * e.nr, k, lower, 1, false);
      products(e, 96, lower ? 96 : 96, k, lower, 1, true);
      products(e, 53, lower ? 53 : e.nr + 3, k, lower, 1, false);
      products(e, 21, lower ? 21 : 19, k, lower, 2, false);
    }
  for (const int64_t u : {1, 3, 8, 16}) few(e, u, 13, 139);
  for (const int64_t n : {1, 7, 33, 64}) triangles(e, n);
  for (const int64_t u : {1, 5, 40}) columns(e, u, u == 40 ? 64 : 11);
}

}  // namespace

int main() {
  all(*rlsedit::baseline_engine<float>());
  all(*rlsedit::baseline_engine<double>());
  all(rlsedit::engine<float>());
  all(rlsedit::engine<double>());
  std::printf("%s\n", rlsedit::engine<float>().name);
  return wrong;
}
