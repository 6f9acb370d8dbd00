// qr_gain(R, K) -> (R'R)^-1 K' by two triangular solves: X R = K, then gain' R' = X
#include <torch/csrc/stable/library.h>

#include "factor.h"
#include "parallel.h"
#include "products.h"
#include "sweep.h"
#include "tensors.h"

namespace rlsedit {
namespace {

constexpr int64_t kMostStep = 64;

// Columns solved at a time: whole slabs, and blocks of columns are multiples of it.
template <class T>
int64_t step() {
  return engine<T>().nr > 16 ? 64 : 48;
}

// One of the two solves on the rows of a batch, in place: X <- X R^-1 from the first column on, or X R^-T
// from the last one back. Columns are numbered in the order in which they are solved.
template <class T>
class Solve {
 public:
  Solve(Matrix<const T> R, int64_t d, const Slabs<T>& X, bool transposed)
      : R_(R), d_(d), X_(X), transposed_(transposed) {}

  void run() {
    const int64_t blocks = (d_ + kBlockColumns - 1) / kBlockColumns;
    sweep(
        blocks, 0, [&](int64_t p) { solve(p, place(p, blocks)); },
        [&](int64_t p, int64_t q) { update(p, place(q, blocks)); });
  }

 private:
  struct Solved {
    int64_t first, n;
    Panels<T> left;  // these columns of X, a left operand (u x n)
  };

  int64_t place(int64_t p, int64_t blocks) const { return transposed_ ? blocks - 1 - p : p; }

  void solve(int64_t p, int64_t block) {
    const int64_t begin = block * kBlockColumns, end = std::min(d_, begin + kBlockColumns);
    const int64_t most = step<T>(), steps = (end - begin + most - 1) / most;
    solved_[p % 2].clear();
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t first = begin + (transposed_ ? steps - 1 - s : s) * most, n = std::min(most, end - first);
      solved_[p % 2].push_back(solve_columns(first, n));
      const int64_t from = transposed_ ? begin : first + n, to = transposed_ ? first : end;
      for (int64_t column = from; column < to; column += engine<T>().nr)
        subtract(solved_[p % 2].back(), column);
    }
  }

  Solved solve_columns(int64_t first, int64_t n) {
    const Engine<T>& e = engine<T>();
    const int64_t u = X_.u, ldx = column_distance(u);
    const Scratch<T> columns(n * ldx);
    T A[kMostStep * kMostStep];
    X_.gather(first, n, columns.get(), ldx);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = i; j < n; ++j) A[i * n + j] = *R_.at(first + i, first + j);
    e.solve_columns(columns.get(), ldx, u, A, n, n, transposed_);
    X_.scatter(first, n, columns.get(), ldx);
    Solved solved{first, n, Panels<T>(left_size<T>(u, n))};
    solved.left.shape(u, n, e.mr, e.mr * n);
    e.pack_left(solved.left.panel(0), solved.left.stride, columns.get(), u, n, 1, ldx);
    return solved;
  }

  void update(int64_t p, int64_t block) const {
    const int64_t begin = block * kBlockColumns, end = std::min(d_, begin + kBlockColumns);
    for (const Solved& solved : solved_[p % 2])
      for (int64_t column = begin; column < end; column += engine<T>().nr) subtract(solved, column);
  }

  // A slab of X minus the solved columns times their block of R.
  void subtract(const Solved& solved, int64_t column) const {
    const Engine<T>& e = engine<T>();
    const int64_t width = std::min(e.nr, d_ - column);
    alignas(64) T block[kMostStep * kMostNr];
    if (transposed_) {
      const Matrix<const T> at{R_.at(column, solved.first), R_.rs, R_.cs};
      e.pack_right(block, 0, at.data, width, solved.n, at.rs, at.cs);
    } else {
      const Matrix<const T> at{R_.at(solved.first, column), R_.rs, R_.cs};
      load_block<T>(block, e.nr, at, solved.n, width);
    }
    e.tile({solved.left.panel(0), solved.left.stride, block, 0, Slabs<T>::padded(X_.u), e.nr, solved.n, T(-1),
            T(1), X_.slab(column / e.nr), e.nr, 1, false, nullptr});
  }

  Matrix<const T> R_;
  int64_t d_;
  const Slabs<T>& X_;
  bool transposed_;
  std::vector<Solved> solved_[2];
};

// The same for few keys, where reading R decides: rows of R are streamed, nothing is packed. Keys as rows of
// adjacent elements; what an element loses is summed from zero and taken off once.
template <class T>
class FewSolve {
 public:
  FewSolve(Matrix<const T> R, int64_t d, Matrix<const T> K, int64_t u)
      : R_(R), d_(d), u_(u), X_(u * d), lost_(u * d) {
    for (int64_t c = 0; c < u; ++c)
      for (int64_t j = 0; j < d; ++j) X_.get()[c * d + j] = *K.at(c, j);
  }

  // X R = K, then Y R' = X; the gain (d x u) is Y'.
  void run(T* gain) {
    clear();
    for (int64_t i = 0; i < d_; i += kRows) {
      const int64_t end = std::min(d_, i + kRows);
      for (int64_t s = i; s < end; s += kInner) {
        const int64_t stop = std::min(end, s + kInner);
        substitute(s, stop, false);
        spread(s, stop, stop, end);
      }
      const int64_t tasks = (d_ - end + kColumns - 1) / kColumns;
      for_each_task(tasks, [&](int64_t task) {
        const int64_t first = end + task * kColumns;
        spread(i, end, first, std::min(d_, first + kColumns));
      });
    }
    clear();
    for (int64_t end = d_; end > 0;) {
      const int64_t i = (end - 1) / kRows * kRows;
      constexpr int64_t kEach = 16;
      for_each_task((end - i + kEach - 1) / kEach, [&](int64_t task) {
        const int64_t first = i + task * kEach;
        gather(first, std::min(end, first + kEach), end, d_);
      });
      for (int64_t stop = end; stop > i;) {
        const int64_t s = i + (stop - 1 - i) / kInner * kInner;
        gather(s, stop, stop, end);
        substitute(s, stop, true);
        stop = s;
      }
      end = i;
    }
    for (int64_t j = 0; j < d_; ++j)
      for (int64_t c = 0; c < u_; ++c) gain[j * u_ + c] = X_.get()[c * d_ + j];
  }

 private:
  static constexpr int64_t kRows = 192, kInner = 32, kColumns = 1024;

  void clear() { std::fill(lost_.get(), lost_.get() + u_ * d_, T(0)); }
  T* x(int64_t c) const { return X_.get() + c * d_; }
  T* lost(int64_t c) const { return lost_.get() + c * d_; }

  // Elements [s, stop) of all keys, by substitution among themselves: keys side by side, for the sums of one
  // key would wait for each other.
  void substitute(int64_t s, int64_t stop, bool transposed) {
    alignas(64) T block[kInner * kColumnStep] = {};
    for (int64_t j = s; j < stop; ++j)
      for (int64_t c = 0; c < u_; ++c) block[(j - s) * kColumnStep + c] = x(c)[j] - lost(c)[j];
    engine<T>().solve_columns(block, kColumnStep, u_, R_.at(s, s), R_.rs, stop - s, transposed);
    for (int64_t j = s; j < stop; ++j)
      for (int64_t c = 0; c < u_; ++c) x(c)[j] = block[(j - s) * kColumnStep + c];
  }

  // What elements [first, last) lose to the solved ones of rows [p, q), which lie before them.
  void spread(int64_t p, int64_t q, int64_t first, int64_t last) {
    if (first >= last) return;
    T part[kMostFew * kColumns];
    const int64_t n = last - first;
    engine<T>().combine(X_.get() + p, d_, u_, R_.at(p, first), R_.rs, q - p, n, part, n);
    for (int64_t c = 0; c < u_; ++c)
      for (int64_t j = 0; j < n; ++j) lost(c)[first + j] += part[c * n + j];
  }
  // What elements [p, q) lose to the solved ones [first, last), which lie behind them.
  void gather(int64_t p, int64_t q, int64_t first, int64_t last) {
    if (first >= last) return;
    T part[kMostFew * kInner];
    engine<T>().dots(R_.at(p, first), R_.rs, q - p, X_.get() + first, d_, u_, last - first, part, kInner);
    for (int64_t c = 0; c < u_; ++c)
      for (int64_t i = p; i < q; ++i) lost(c)[i] += part[c * kInner + i - p];
  }

  Matrix<const T> R_;
  int64_t d_, u_;
  Scratch<T> X_, lost_;
};

Tensor qr_gain(Tensor R, Tensor K) {
  const char* op = "qr_gain";
  check_floating(op, "R", R);
  check_square(op, "R", R);
  check_alike(op, "K", K, "R", R);
  const int64_t d = columns(R), u = rows(K);
  check_shape(op, "K", K, R, -1, d);
  Tensor gain = new_output(R, {d, u});
  for_dtype(R, [&](auto zero) {
    using T = decltype(zero);
    const auto make = [] { return nullptr; };  // nothing is written but the result
    for_each_element(batch_count(R), d * d * u, make, [&](int64_t b, std::nullptr_t) {
      const Matrix<const T> r = matrix<const T>(R, b);
      if (2 * u <= engine<T>().few && r.cs == 1)
        return FewSolve<T>(r, d, matrix<const T>(K, b), u).run(matrix<T>(gain, b).data);
      Slabs<T> X(u, d);
      X.fill(matrix<const T>(K, b), u);
      Solve<T>(r, d, X, false).run();
      Solve<T>(r, d, X, true).run();
      unpack(X.panels, matrix<T>(gain, b).data);
    });
  });
  return gain;
}

}  // namespace
}  // namespace rlsedit

STABLE_TORCH_LIBRARY_IMPL(rlsedit_kernels_cpu, CPU, m) {
  m.impl("qr_gain", TORCH_BOX(&rlsedit::qr_gain));
}
